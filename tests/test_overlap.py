"""Overlapped rounds: the average travels while workers train on, and what it brings is what the equation says."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

import slowmo_hf
from harness import run_workers
from overlapping import LR, STEPS, rows_of, train
from slowmo_hf import SlowMoConfig, SlowMoOptimizer, run_in_process
from slowmo_hf.algorithm.codec import BLOCK
from slowmo_hf.names import CODES, find
from slowmo_hf.wire.communicator import Arrival, Communicator
from tiny import Regression, Rows, equal, message_memory, two_groups, values, warmup_and_decay

CASES = {  # sync_every 5: rounds at 5 and 10
    "local sgd": (SlowMoConfig.local_sgd(5, overlap_steps=2), "sgd"),
    "slow momentum, reset": (SlowMoConfig(sync_every=5, outer_momentum=0.6, overlap_steps=3), "sgd"),
    "alpha, adam": (SlowMoConfig(sync_every=5, outer_momentum=0.4, outer_lr=0.8, overlap_steps=4), "adamw"),
    "int8": (SlowMoConfig(sync_every=5, outer_momentum=0.6, overlap_steps=3, compression="int8"), "sgd"),
    "bf16, to the last step": (
        SlowMoConfig(sync_every=7, outer_momentum=0.6, overlap_steps=6, compression="bf16"),
        "sgd",
    ),
    "diloco": (SlowMoConfig.diloco(sync_every=5, overlap_steps=1), "adamw"),
    # 14 is a round: in flight at the end.
    "to the last step": (
        SlowMoConfig(sync_every=7, outer_momentum=0.6, overlap_steps=6),
        "sgd",
    ),
}


class Feedback:
    """
    The mean of displacements as it travels in codes: Q(s) / m, s = sum of Q(d_i + e_i) + E; e and E are what Q has
    left.
    """

    def __init__(self, code, workers, elements):
        self.code, self.workers = code, workers
        self.own, self.owned = torch.zeros(workers, elements).double(), torch.zeros(elements).double()

    def rounded(self, values):
        blocks = torch.nn.functional.pad(values, (0, -len(values) % BLOCK))
        return self.code.dequantise(*self.code.quantise(blocks)).double()[: len(values)]

    def mean(self, displacements):
        said = []
        for own, displacement in zip(self.own, displacements, strict=True):
            whole = displacement + own
            said.append(self.rounded(whole))
            own.copy_(whole - said[-1])
        total = sum(said) + self.owned
        applied = self.rounded(total)
        self.owned = total - applied
        return applied / self.workers


def by_hand(config, name, workers):
    """
    All workers in one place, from the equations alone. At k: Delta = anchor - mean x_k, v = beta r v + Delta, anchor =
    anchor - alpha v (or torch's SGD on the anchor); a compressed Delta is `Feedback`'s. At k + n: x_i = anchor + (x_i
    - x_i at k). A look shows the mean of the x_i as if all were taken in now.
    """
    crew = []
    for _ in range(workers):
        model = Regression()
        optimizer = two_groups(model, name, LR)
        crew.append((model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_and_decay)))
    rows = Rows(STEPS * 16)
    anchor = [p.detach().clone().requires_grad_() for p in crew[0][0].parameters()]
    velocity, previous_lrs, departed, due = [torch.zeros_like(a) for a in anchor], None, None, 0
    outer = None
    if config.outer_optimizer != "slow_momentum":
        outer = torch.optim.SGD(anchor, lr=config.outer_lr, momentum=0.9, nesterov=True)
    groups = [0, 0, 1, 1]  # body, head
    sizes = [a.numel() for a in anchor]
    feedback = (
        Feedback(find(CODES[config.compression])(), workers, sum(sizes)) if config.compression != "none" else None
    )
    after, shown, in_force = [], {}, []
    with torch.no_grad():
        for step in range(STEPS):
            in_force.append([group["lr"] for group in crew[0][1].param_groups])
            for rank, (model, optimizer, _) in enumerate(crew):
                batch = rows_of(step, rank)
                with torch.enable_grad():
                    model(rows.x[batch], rows.y[batch])["loss"].backward()
                optimizer.step()
                optimizer.zero_grad()
            if departed is not None and step + 1 == due:
                for (model, optimizer, _), then in zip(crew, departed, strict=True):
                    for p, a, x in zip(model.parameters(), anchor, then, strict=True):
                        p.copy_(a + (p - x))
                    if config.inner_state == "auto" and name == "sgd":
                        optimizer.state.clear()
                departed = None
            if (step + 1) % config.sync_every == 0:
                departed = [[p.detach().clone() for p in model.parameters()] for model, _, _ in crew]
                due = step + 1 + config.overlap_steps
                lrs, in_force = [sum(of_one) / config.sync_every for of_one in zip(*in_force, strict=True)], []
                displacements = [
                    torch.cat([(a - x).flatten() for a, x in zip(anchor, then, strict=True)]) for then in departed
                ]
                mean = feedback.mean(displacements) if feedback else sum(displacements) / workers
                for j, (a, run) in enumerate(zip(anchor, mean.split(sizes), strict=True)):
                    pseudo_grad = run.view_as(a)
                    if outer is not None:
                        a.grad = pseudo_grad
                        continue
                    ratio = lrs[groups[j]] / previous_lrs[groups[j]] if previous_lrs else 1.0
                    velocity[j] = config.outer_momentum * ratio * velocity[j] + pseudo_grad
                    a.sub_(config.outer_lr * velocity[j])
                if outer is not None:
                    outer.step()
                previous_lrs = lrs
            after.append([values(model) for model, _, _ in crew])
            names = [key for key, _ in crew[0][0].named_parameters()]
            wholes = []
            for i, (model, _, _) in enumerate(crew):
                xs = list(model.parameters())
                wholes.append(
                    [a + (p - x) for a, p, x in zip(anchor, xs, departed[i], strict=True)] if departed else xs
                )
            shown[step] = {key: sum(whole[j].detach() for whole in wholes) / workers for j, key in enumerate(names)}
            for _, _, schedule in crew:
                schedule.step()
    return after, shown


def close(mine, other):
    for name, value in other.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("case", CASES)
def test_parameters_and_looks_are_those_of_the_equation(case):
    """Float64, four workers, every step."""
    config, name = CASES[case]
    after, shown = by_hand(config, name, 4)
    for rank, (mine, looks, _) in enumerate(run_in_process(lambda rank: train(config, name, rank), 4)):
        for step in range(STEPS):
            close(mine[step], after[step][rank])
        for step, look in looks.items():
            close(look, shown[step])


def _train_here(config, name):
    return train(config, name, dist.get_rank())


@pytest.mark.parametrize("case", ["slow momentum, reset", "int8"])
def test_processes_do_the_same(case):
    config, name = CASES[case]
    together = run_in_process(lambda rank: train(config, name, rank), 2)
    for (mine, looks, reports), (after, shown, told) in zip(
        run_workers(_train_here, 2, config, name), together, strict=True
    ):
        for step in range(STEPS):
            close(mine[step], after[step])
        for step, look in looks.items():
            close(look, shown[step])
        assert [r and r.round for r in reports] == [r and r.round for r in told] == [None] * 7 + [1] * 5 + [2] * 2
        payload = 8 * (31 + 1)  # the consensus distance rides along
        if config.compression == "int8":  # twice a block of 256, its scale and a weight or norm
            payload = 2 * (256 + 8 + 8)
        header = 8 * (10 + 2)
        assert [r.bytes_sent for r in reports if r] == [payload + header] * 7
        for r, t in zip(reports[7:], told[7:], strict=True):
            assert r.consensus_distance == pytest.approx(t.consensus_distance, rel=1e-9)
            assert r.pseudo_grad_norm == pytest.approx(t.pseudo_grad_norm, rel=1e-9)


# ---- the wire ----


def _order(config):
    """What happens on the wire, in order, with the steps between."""
    events = []
    start_sum = Communicator.start_sum_

    def noted(self, flat):
        wait = start_sum(self, flat)
        if self.world_size == 1 or flat.numel() < 20:
            return wait
        events.append("sent")
        return lambda: (events.append("waits"), wait())[1]

    Communicator.start_sum_ = noted
    model, rows = Regression(), Rows(STEPS * 16)
    optimizer = SlowMoOptimizer(two_groups(model, "sgd", LR), config)
    for step in range(8):
        batch = rows_of(step, dist.get_rank())
        model(rows.x[batch], rows.y[batch])["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        events.append(step + 1)
    return events


def _two_stages(config):
    """The same of a compressed round; a step takes longer than a stage."""
    events = []

    def noted(name, start):
        def started(self, *tensors):
            events.append(name)
            arrival = start(self, *tensors)
            return (
                Arrival(lambda: (events.append("waits"), arrival())[1], arrival.is_here)
                if name == "to all"
                else arrival
            )

        return started

    Communicator.start_all_to_all = noted("to owners", Communicator.start_all_to_all)
    Communicator.start_all_gather = noted("to all", Communicator.start_all_gather)
    model, rows = Regression(), Rows(STEPS * 16)
    optimizer = SlowMoOptimizer(two_groups(model, "sgd", LR), config)
    for step in range(10):
        batch = rows_of(step, dist.get_rank())
        model(rows.x[batch], rows.y[batch])["loss"].backward()
        time.sleep(0.2)
        optimizer.step()
        optimizer.zero_grad()
        events.append(step + 1)
    return events


@pytest.mark.slow
def test_the_second_stage_of_a_compressed_round_travels_too():
    """
    It sets out at the first step that finds the first one here; with one step of overlap it has to be waited for.
    """
    for events in run_workers(_two_stages, 2, SlowMoConfig.local_sgd(5, overlap_steps=3, compression="int8")):
        assert events == [1, 2, 3, 4, "to owners", 5, "to all", 6, 7, "waits", 8, 9, "to owners", 10]
    for events in run_workers(_two_stages, 2, SlowMoConfig.local_sgd(5, overlap_steps=1, compression="int8")):
        assert events == [1, 2, 3, 4, "to owners", 5, "to all", "waits", 6, 7, 8, 9, "to owners", 10]


def test_nobody_waits_before_the_average_is_due():
    config = SlowMoConfig.local_sgd(3, overlap_steps=2)
    for events in run_workers(_order, 2, config):
        assert events == [1, 2, "sent", 3, 4, "waits", 5, "sent", 6, 7, "waits", 8]
    for events in run_workers(_order, 2, SlowMoConfig.local_sgd(3)):
        assert events == [1, 2, "sent", "waits", 3, 4, 5, "sent", "waits", 6, 7, 8]


def _small_buckets(rank, bucket_bytes):
    config = SlowMoConfig(sync_every=3, overlap_steps=1, bucket_bytes=bucket_bytes)
    torch.manual_seed(0)
    model = torch.nn.Linear(40, 40).double()
    optimizer = SlowMoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), config)
    for step in range(7):
        inputs = torch.randn(4, 40, generator=torch.Generator().manual_seed(10 * step + rank), dtype=torch.float64)
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return values(model), len(optimizer.outer_loop.parts.slow.buckets)


def test_many_buckets_travel_together():
    one, many = (run_in_process(lambda rank, size=size: _small_buckets(rank, size), 2) for size in (2**20, 2048))
    assert (one[0][1], many[0][1]) == (1, 7)
    for (mine, _), (other, _) in zip(one, many, strict=True):
        close(mine, other)


# ---- settings ----


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"sync_every": 4, "overlap_steps": 4},
            r"overlap_steps must be in \[0, sync_every\), got 4 with sync_every=4",
        ),
        ({"overlap_steps": -1}, r"overlap_steps must be in \[0, sync_every\), got -1"),
        ({"overlap_steps": 1.5}, "overlap_steps must be an integer, got 1.5"),
        (
            {"overlap_steps": 2, "base": "sgp"},
            "overlap_steps=2 needs base='local_sgd', got base='sgp'",
        ),
        ({"overlap_steps": 2, "base": "all_reduce"}, "overlap_steps=2 needs base='local_sgd'"),
        (
            {"overlap_steps": 2, "inner_state": "average"},
            "overlap_steps=2 needs inner_state='auto' or .*, got inner_state='average': .* averaged at once",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        SlowMoConfig(**settings)


def test_one_state_cannot_speak_for_workers_that_are_never_the_same():
    def save(rank):
        optimizer = SlowMoOptimizer(two_groups(Regression(), "sgd", LR), SlowMoConfig(sync_every=2, overlap_steps=1))
        rows = Rows(4)
        for _ in range(2):
            Regression()(rows.x, rows.y)
            optimizer.step()
        return optimizer.outer_loop.state_dict()

    with pytest.raises(RuntimeError) as failed:
        run_in_process(save, 2)
    assert "training cannot be saved with overlap_steps=1" in str(failed.value.__cause__ or failed.value)


def test_memory_is_one_copy_more_and_messages_for_all():
    def count(rank, overlap_steps, bucket_bytes):
        model = torch.nn.Linear(64, 64)
        config = SlowMoConfig(overlap_steps=overlap_steps, bucket_bytes=bucket_bytes)
        optimizer = SlowMoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), config)
        for _ in range(13):
            model(torch.ones(1, 64)).sum().backward()
            optimizer.step()
        with slowmo_hf.consensus(optimizer):
            pass
        loop = optimizer.outer_loop
        kept = [*message_memory(loop), *getattr(loop.base, "departed", {}).values()]
        return sum(t.nbytes for t in kept), sum(p.nbytes for p in model.parameters())

    # Messages kept: two of 2048 bytes, or all, of 4096.
    for bucket_bytes, plain, overlapped in (
        (2**20, 1, 1),
        (4096, 2, 5),
    ):
        for overlap_steps, messages in ((0, plain), (2, overlapped)):
            (kept, size), _ = run_in_process(lambda rank, n=overlap_steps, size=bucket_bytes: count(rank, n, size), 2)
            payload = size if messages != 2 else 4096
            assert kept == payload + 4 * messages + (size if overlap_steps else 0)


def test_equal_is_not_vacuous():
    first, second = (
        run_in_process(lambda rank, n=n: train(SlowMoConfig(sync_every=5, overlap_steps=n), "sgd", rank), 2)
        for n in (0, 2)
    )
    assert equal(first[0][0][3], second[0][0][3])
    assert not equal(first[0][0][5], second[0][0][5])
