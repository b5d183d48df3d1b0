"""The plan of the start: the bytes that it says are those that rounds send, and a momentum's rounds."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import slowmo_hf
from harness import run_workers
from slowmo_hf import SlowMoConfig, SlowMoOptimizer
from slowmo_hf.training.plan import Plan, enough_rounds, in_bytes
from tiny import train_node_workers

KINDS = {
    "local_sgd": {},
    "int8": {"compression": "int8"},
    "bf16": {"compression": "bf16"},
    "overlapped": {"overlap_steps": 1},
    "shards": {"shard_slow_state": True},
    "sgp": {"base": "sgp"},
    "osgp": {"base": "osgp"},
    "dpsgd": {"base": "dpsgd"},
    "no average": {"base": "sgp", "exact_average": False},
    "small messages": {"bucket_bytes": 1024},
}


def measured():
    """By kind: what the plan says of a round, and what reports count over whole cycles of exchanges; DDP's bytes."""
    out = {}
    for name, settings in KINDS.items():
        weights = [torch.nn.Parameter(torch.zeros(700)), torch.nn.Parameter(torch.zeros(13, dtype=torch.float64))]
        config = SlowMoConfig(sync_every=3, **settings)
        optimizer = SlowMoOptimizer(torch.optim.SGD(weights, lr=0.1), config)
        sent, rounds = [], 2
        while len(sent) < rounds:
            for weight in weights:
                weight.grad = torch.full_like(weight, float(dist.get_rank()))
            optimizer.step()
            report = slowmo_hf.last_round(optimizer)
            if report is not None and report.round > len(sent):
                sent.append(report.bytes_sent)
            if settings.get("base"):
                rounds = optimizer.outer_loop.base.topology.cycle_length
        plan = Plan.of(optimizer.outer_loop.parts)
        out[name] = plan.bytes_per_round, sum(sent) / len(sent), plan.ddp_bytes_per_step, plan.steps
    return out


@pytest.mark.parametrize("workers", [2, 3])
def test_the_plans_bytes_are_sent(workers):
    """Of every way; a ring of DDP sends 2 (m-1)/m of the gradients. A message's bytes are counted as whole ones."""
    for out in run_workers(measured, workers):
        for name, (planned, sent, ddp, steps) in out.items():
            assert planned == pytest.approx(sent, abs=3), name
            assert ddp == pytest.approx(2 * (workers - 1) / workers * (4 * 700 + 8 * 13))
            assert steps is None


def of_node_workers():
    _, optimizer = train_node_workers()
    plan = Plan.of(optimizer.outer_loop.parts)
    return plan.bytes_per_round, slowmo_hf.last_round(optimizer).bytes_sent, plan.ddp_bytes_per_step


def test_a_worker_of_two_processes_is_planned_as_one():
    """Both send a half of 31 fp64 parameters; between two workers a ring sends each once."""
    for planned, sent, ddp in run_workers(of_node_workers, 4):
        assert planned == sent
        assert ddp == 31 * 8


def test_steps_and_rounds_ahead():
    weight = torch.nn.Parameter(torch.zeros(4))
    optimizer = SlowMoOptimizer(torch.optim.SGD([weight], lr=0.1), SlowMoConfig(sync_every=4))
    weight.grad = torch.ones(4)
    for _ in range(6):
        optimizer.step()
    optimizer.outer_loop.clock.max_steps = 17
    plan = Plan.of(optimizer.outer_loop.parts)
    assert (plan.steps, plan.rounds) == (11, 3), "8, 12 and 16 of the steps 7 to 17"
    assert Plan(250.0, 0.0, 100.0, 11, 3).words(4) == (
        "11 steps and 3 rounds ahead, 250 bytes per worker and round of 4 steps, 750 bytes in all (DDP: 1.1 kB)"
    )
    assert "; 950 bytes in all" in Plan(250.0, 50.0, 100.0, 16, 3).words(4).replace(", ", "; "), "4 steps behind them"
    assert Plan(2.5e6, 0.0, 1e6, None, None).words(12) == (
        "2.5 MB per worker and round of 12 steps (DDP: 12 MB); the number of steps is not known here"
    )


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.7, 0.9])
def test_enough_rounds_lose_less_than_a_tenth(beta):
    """Equal pseudo-gradients of 1, lines 7 and 8: of T / (1 - beta) a run of T rounds goes all but beta/10 of it."""

    def lost(rounds):
        velocity = gone = 0.0
        for _ in range(rounds):
            velocity = beta * velocity + 1
            gone += velocity
        return 1 - gone * (1 - beta) / rounds

    least = enough_rounds(beta)
    assert lost(least) <= beta / 10
    assert lost(least // 2) > beta / 10
    assert enough_rounds(0.5) == 20
    assert enough_rounds(0.9) == 100


def test_bytes_have_a_unit():
    assert [in_bytes(n) for n in (0, 999, 1000, 12_345_678, 4e9, 3e15)] == [
        *("0 bytes", "999 bytes", "1 kB", "12.3 MB", "4 GB", "3,000 TB")
    ]
