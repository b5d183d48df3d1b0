"""`finish`: the end of a custom loop leaves the exact average in the model, and who forgets it is told."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import slowmo_hf
from harness import patience, run_workers
from launcher import run_really, run_script
from slowmo_hf import SlowMoConfig, SlowMoOptimizer, run_in_process
from slowmo_hf.checkpoints.state import check_snapshot, write_snapshot
from tiny import Heard, train_node_workers

KINDS = {
    "local sgd": {"sync_every": 4},
    "shorter than a round": {"sync_every": 50},
    "at a round's end": {"sync_every": 5},
    "overlapped": {"sync_every": 4, "overlap_steps": 3},
    "sharded, overlapped": {"sync_every": 4, "overlap_steps": 3, "shard_slow_state": True},
    "int8": {"sync_every": 4, "compression": "int8"},
    "SGP": {"base": "sgp", "sync_every": 4},
    "OSGP": {"base": "osgp", "sync_every": 7, "staleness": 2},
    "D-PSGD, no average": {"base": "dpsgd", "sync_every": 4, "exact_average": False},
    "all-reduce": {"base": "all_reduce", "outer_momentum": 0.0},
}


def begin(rank, **settings):
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(40, dtype=torch.float64))
    config = SlowMoConfig(**settings, timeout_seconds=patience(20))
    optimizer = SlowMoOptimizer(torch.optim.SGD([weight], lr=0.1, momentum=0.5), config)
    draw = torch.Generator().manual_seed(rank)

    def step():
        weight.grad = torch.randn(40, generator=draw, dtype=torch.float64)
        optimizer.step()

    return weight, optimizer, step


@pytest.mark.parametrize("kind", KINDS)
def test_the_exact_average_stays(kind):
    """What a view shows before, on all; once more, and a view behind it, change nothing; training goes on from it."""

    def work(rank):
        weight, optimizer, step = begin(rank, **KINDS[kind])
        for _ in range(10):
            step()
        local = weight.detach().clone()
        with slowmo_hf.consensus(optimizer):
            shown = weight.detach().clone()
        slowmo_hf.finish(optimizer)
        kept = weight.detach().clone()
        slowmo_hf.finish(optimizer)
        with slowmo_hf.consensus(optimizer):
            seen = weight.detach().clone()
        step()
        return local, shown, kept, seen, torch.equal(weight, kept)

    workers = run_in_process(work, 3)
    for local, shown, kept, seen, unchanged in workers:
        assert torch.equal(kept, workers[0][2])
        torch.testing.assert_close(kept, shown, rtol=0, atol=1e-15)
        torch.testing.assert_close(seen, kept, rtol=0, atol=1e-15)
        assert not unchanged
        # A gossip base's average is of numerators, and one in flight of what all would have if they took it in now.
        if kind in ("local sgd", "shorter than a round", "int8"):
            mean = sum(one[0] for one in workers) / 3
            torch.testing.assert_close(kept, mean, rtol=0, atol=1e-12)
            assert not torch.equal(local, kept)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "all-reduce"])
def test_a_run_that_has_finished_can_be_saved_and_gone_on_with(tmp_path, kind):
    """Another run takes it up, and both make the same steps from the average on, bit for bit."""

    def work(rank):
        weight, optimizer, step = begin(rank, **KINDS[kind])
        for _ in range(10):
            step()
        slowmo_hf.finish(optimizer)
        write_snapshot(str(tmp_path), optimizer.outer_loop, shared=rank == 0, objects={})
        optimizer.outer_loop.workers.world.gather_objects(None)
        other, resumed, _ = begin(rank, **KINDS[kind])
        other.grad = torch.zeros_like(other)
        resumed.step()
        with torch.no_grad():
            other.copy_(weight)  # the model is in the checkpoint beside
        check_snapshot(str(tmp_path), resumed.outer_loop)()
        for _ in range(7):
            step()
            other.grad = weight.grad.clone()
            resumed.step()
            assert torch.equal(other, weight)

    run_in_process(work, 2)


def uneven():
    """Rank 1 has fewer batches, and ends first."""
    weight, optimizer, step = begin(dist.get_rank(), sync_every=4)
    for _ in range(10 if dist.get_rank() == 0 else 6):
        step()
    slowmo_hf.finish(optimizer)
    return weight.detach(), optimizer.outer_loop.attempted_steps


def test_a_rank_that_ends_first_takes_part():
    (one, step), (other, same_step) = run_workers(uneven, 2)
    assert torch.equal(one, other)
    assert step == same_step == 10


def in_pairs():
    """Two workers of two processes, a round in flight: what a view shows, what stays."""
    model, optimizer = train_node_workers(overlap_steps=1)
    with slowmo_hf.consensus(optimizer):
        shown = [param.detach().clone() for param in model.parameters()]
    slowmo_hf.finish(optimizer)
    return shown, [param.detach().clone() for param in model.parameters()]


def test_workers_of_several_processes():
    found = run_workers(in_pairs, 4)
    for shown, kept in found:
        assert all(torch.equal(one, other) for one, other in zip(kept, found[0][1], strict=True))
        for one, other in zip(shown, kept, strict=True):
            torch.testing.assert_close(other, one, rtol=0, atol=1e-15)


SCRIPT = """
import sys, torch
from accelerate import Accelerator
import slowmo_hf
from slowmo_hf import SlowMoConfig, SlowMoOptimizer

accelerator = Accelerator(cpu=True)
torch.manual_seed(0)
model = torch.nn.Linear(4, 1)
data = torch.utils.data.DataLoader(torch.randn(60, 4), batch_size=3)
optimizer = SlowMoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), SlowMoConfig(sync_every=4))
model, optimizer, data = accelerator.prepare(model, optimizer, data)
for batch in data:
    accelerator.backward(model(batch).square().mean())
    optimizer.step()
    optimizer.zero_grad()
if sys.argv[1] == "finish":
    slowmo_hf.finish(optimizer)
if sys.argv[1] == "end_training":
    accelerator.end_training()
weight = next(model.parameters()).detach().flatten().tolist()
open(f"{sys.argv[2]}/weight_{accelerator.process_index}", "w").write(str(weight))
"""
NOTICE = "training ended at step 10, 2 steps after the last round"


def run(tmp_path, how):
    """How many models ranks have at their end, and how often one is told."""
    script = tmp_path / "loop.py"
    script.write_text(SCRIPT)
    if how == "nothing":  # a forked script's objects are gone before its process ends
        said = run_really([str(script), how, str(tmp_path)], "-m torch.distributed.run --nproc-per-node 2")
    else:
        said = run_script([str(script), how, str(tmp_path)], 2, tmp_path / how)
    weights = [(tmp_path / f"weight_{rank}").read_text() for rank in (0, 1)]
    return len(set(weights)), said.count(NOTICE)


@pytest.mark.slow
def test_a_program_that_ends_inside_a_round_is_told_once(tmp_path):
    assert run(tmp_path, "nothing") == (2, 1)


def test_finish_leaves_one_model(tmp_path):
    assert run(tmp_path, "finish") == (1, 0)


def test_end_training_finishes(tmp_path):
    assert run(tmp_path, "end_training") == (1, 0)


def fails_and_finishes():
    """Rank 1 at step 6 of 8, in a `try` whose `finally` finishes."""
    _, optimizer, step = begin(dist.get_rank(), sync_every=4)
    with Heard() as said:
        try:
            for number in range(1, 9):
                if number == 6 and dist.get_rank():
                    raise ValueError("a bad batch")
                step()
        except ValueError as error:
            assert said.lines == []
            slowmo_hf.finish(optimizer)
            return str(error), said.about("finish while", "WARNING")
        slowmo_hf.finish(optimizer)
    return "", said.about("finish while", "WARNING")


def test_a_finish_that_an_error_passes_is_told_at_once():
    """By the rank whose error waits for the others' end."""
    (_, others), (error, words) = run_workers(fails_and_finishes, 2)
    assert error == "a bad batch"
    assert len(words) == 1
    assert "slowmo_hf.finish while ValueError is handled (a bad batch): this rank takes part in" in words[0]
    assert others == []


def finishes_where_no_error_goes_on():
    """Behind a stream's end; and of a run that begins while another's error is handled."""
    with Heard() as said:
        _, optimizer, step = begin(dist.get_rank(), sync_every=4)
        try:
            batches = iter(range(6))
            while True:
                next(batches)
                step()
        except StopIteration:
            slowmo_hf.finish(optimizer)
        try:
            raise ValueError("a first try")
        except ValueError:
            _, optimizer, step = begin(dist.get_rank(), sync_every=4)
            for _ in range(6):
                step()
            slowmo_hf.finish(optimizer)
    return said.about("finish while")


def test_a_finish_that_no_error_passes_is_quiet():
    assert run_workers(finishes_where_no_error_goes_on, 2) == [[], []]
