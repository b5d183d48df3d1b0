"""Compressed rounds: whole runs, a convex problem, checkpoints, settings."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.distributed as dist

import slowmo_hf
from harness import patience, run_workers
from slowmo_hf import SlowMoConfig, SlowMoOptimizer, run_in_process
from slowmo_hf.algorithm.codec import BFloat16, Int8
from slowmo_hf.checkpoints.state import check_snapshot, write_snapshot
from slowmo_hf.names import CODES
from slowmo_hf.wire.error_feedback import shard_elements
from slowmo_hf.wire.reduction import AllReduce
from tiny import Heard, Regression, Rows, held_back, two_groups, values

# ---- whole runs ----


STEPS = 9
CONFIGS = {
    "int8": SlowMoConfig(sync_every=3, compression="int8", outer_momentum=0.6, timeout_seconds=patience(30)),
    "int8, buckets": SlowMoConfig(sync_every=3, compression="int8", bucket_bytes=1024, timeout_seconds=patience(30)),
    "int8, buckets, overlapped": SlowMoConfig(
        sync_every=4, overlap_steps=2, compression="int8", bucket_bytes=1024, timeout_seconds=patience(30)
    ),
    "bf16, diloco": SlowMoConfig.diloco(sync_every=4, compression="bf16", timeout_seconds=patience(30)),
    "bf16, state averaged": SlowMoConfig.local_sgd(
        3, compression="bf16", inner_state="average", timeout_seconds=patience(30)
    ),
}


class Wide(Regression):
    """
    With a layer of 400 elements more in fp32, so that there are two anchors and, with small buckets, several buckets.
    """

    def __init__(self):
        super().__init__()
        self.extra = torch.nn.Linear(20, 20, bias=False)

    def forward(self, x, labels):
        found = super().forward(x, labels)
        return {"loss": found["loss"] + self.extra(x.float().repeat(1, 5)).square().mean()}


def begin(config, rank):
    model, rows = Wide(), Rows(STEPS * 16)
    inner = two_groups(model, "sgd", 0.05)
    inner.add_param_group({"params": model.extra.parameters(), "lr": 0.02})
    optimizer = SlowMoOptimizer(inner, config)

    def step_once(step):
        start = 16 * step + 4 * rank
        model(rows.x[start : start + 4], rows.y[start : start + 4])["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, optimizer, step_once


def train(config, rank):
    """Parameters after every step, bytes of every round, what is held back at the end."""
    model, optimizer, step_once = begin(config, rank)
    after, sent = [], []
    for step in range(STEPS):
        step_once(step)
        after.append(values(model))
        report = slowmo_hf.last_round(optimizer)
        sent.append(report.bytes_sent if report else 0)
    optimizer.outer_loop.in_flight.settle()
    return after, sent, held_back(optimizer)


def every_config():
    return {name: train(config, dist.get_rank()) for name, config in CONFIGS.items()}


def expected_bytes(elements_of_buckets, workers, code):
    """(m-1) shards to their owners and (m-1) copies of the owned one; behind each 8 bytes, weight or squared norm."""
    sizes = [code.message_bytes(shard_elements(n, workers), wide) for n, wide in elements_of_buckets]
    return (workers - 1) * sum(2 * (size + 8) for size in sizes)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 3, 4])
def test_processes_and_threads_agree_bit_for_bit(workers):
    """
    All workers among themselves at a round's end; gloo and one process with one another throughout, where no exact
    average of three or more comes in, whose order of summation is another. Bytes by the formula.
    """
    processes = run_workers(every_config, workers)
    for name, config in CONFIGS.items():
        threads = run_in_process(lambda rank, config=config: train(config, rank), workers)
        for (after, sent, held), found in zip(threads, processes, strict=True):
            right, right_sent, right_held = found[name]
            alike = workers == 2 or config.inner_state != "average"
            for step in range(STEPS):
                assert not alike or all(torch.equal(after[step][key], right[step][key]) for key in after[step]), (
                    name,
                    step,
                )
                if (step + 1) % config.sync_every == 0 and not config.overlap_steps:
                    assert all(torch.equal(after[step][key], threads[0][0][step][key]) for key in after[step]), (
                        name,
                        step,
                    )
                    assert all(
                        torch.equal(right[step][key], processes[0][name][0][step][key]) for key in right[step]
                    ), (name, step)
            assert held.keys() == right_held.keys() != set()
            assert not alike or all(torch.equal(held[key], right_held[key]) for key in held)
            assert sent == right_sent
            header = 13 * 8 * (workers - 1)
            wide, narrow = (31, torch.float64), (400, torch.float32)
            if name == "int8":
                assert sent[2] == expected_bytes([wide, narrow], workers, Int8()) + header
            if name == "int8, buckets, overlapped":  # taken in at step 6; each message has 1024 bytes
                narrows = [(256, torch.float32), (144, torch.float32)]
                assert sent[5] == expected_bytes([wide, *narrows], workers, Int8()) + header
            if name == "int8, buckets":  # halves of 1024 bytes: 128 elements
                narrows = [(128, torch.float32)] * 3 + [(16, torch.float32)]
                assert sent[2] == expected_bytes([wide, *narrows], workers, Int8()) + header
            if name == "bf16, diloco":
                assert sent[3] == expected_bytes([wide, narrow], workers, BFloat16()) + header


def one_round(config, rank):
    """A round of 100,000 parameters."""
    param = torch.nn.Parameter(torch.zeros(100_000))
    optimizer = SlowMoOptimizer(torch.optim.SGD([param], lr=1.0), config)
    param.grad = torch.randn(100_000, generator=torch.Generator().manual_seed(rank))
    optimizer.step()
    return slowmo_hf.last_round(optimizer), param.detach().clone()


@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize(("name", "most"), [("int8", 0.27), ("bf16", 0.51)])
def test_bytes_against_the_uncompressed_ring(workers, name, most):
    """All that the round has sent, header and scales included, against 2 (m-1)/m 4P."""
    runs = run_in_process(lambda rank: one_round(SlowMoConfig.local_sgd(1, compression=name), rank), workers)
    exact = run_in_process(lambda rank: one_round(SlowMoConfig.local_sgd(1), rank), workers)
    ring = 2 * (workers - 1) / workers * 4 * 100_000
    for (report, param), (exact_report, exact_param) in zip(runs, exact, strict=True):
        assert report.bytes_sent <= most * ring
        assert exact_report.bytes_sent >= ring
        assert torch.equal(param, runs[0][1])
        assert (
            param - exact_param
        ).abs().max() < 0.05  # the largest of 100,000 normal numbers is 4.5, and 4.5/127 = 0.035
        assert report.consensus_distance == pytest.approx(exact_report.consensus_distance, rel=1e-2)


def test_without_compression_nothing_is_new():
    for config in (SlowMoConfig(), SlowMoConfig(compression="int8")):  # alone, a worker quantises nothing either
        _, optimizer, step_once = begin(config, 0)
        step_once(0)
        assert type(optimizer.outer_loop.parts.slow.reduction) is AllReduce
    alone = [train(SlowMoConfig(sync_every=3, compression=name), 0)[0][-1] for name in ("none", "int8")]
    assert all(torch.equal(alone[0][key], alone[1][key]) for key in alone[0])


# ---- a convex problem ----


PULL = 1000.0


def convex(rank, name, feedback):
    """
    Worker i pulls element 0 to +-PULL, where the workers' forces cancel, and all others to 1. A round's displacement
    of element 0 makes the scale 8 times the largest displacement of the others, whose codes are 0: without feedback
    they never move.
    """
    target = torch.ones(64, dtype=torch.float64)
    target[0] = PULL if rank == 0 else -PULL
    param = torch.nn.Parameter(torch.zeros(64, dtype=torch.float64))
    inner = torch.optim.SGD([param], lr=0.05)
    optimizer = SlowMoOptimizer(inner, SlowMoConfig.local_sgd(2, compression=name))
    for step in range(400):
        inner.param_groups[0]["lr"] = 0.05 * (1 - step / 400)
        param.grad = param.detach() - target
        optimizer.step()
        if not feedback:
            optimizer.outer_loop.parts.slow.reduction.forget()
    return float((param.detach()[1:] - 1).square().mean() / 2), float(param.detach()[0])


@pytest.mark.slow
def test_feedback_reaches_the_uncompressed_loss_and_without_it_training_stands_still():
    """The loss starts at 0.5. Tolerance: 1e-3 of that."""
    exact = run_in_process(lambda rank: convex(rank, "none", True), 2)[0][0]
    assert exact < 1e-3 * 0.5
    for name in CODES:
        loss, middle = run_in_process(lambda rank, name=name: convex(rank, name, True), 2)[0]
        assert loss == pytest.approx(exact, abs=1e-3 * 0.5), name
        assert abs(middle) < 1e-3 * PULL, "the forces cancel"
    blind, _ = run_in_process(lambda rank: convex(rank, "int8", False), 2)[0]
    assert blind == 0.5


# ---- checkpoints ----


def other(config, **settings):
    return SlowMoConfig.from_dict({**config.to_dict(), **settings})


SAVED = SlowMoConfig(sync_every=3, compression="int8", bucket_bytes=1024)
# Saved while the round of 6 is under way.
BEHIND = SlowMoConfig(sync_every=3, overlap_steps=2, compression="int8", bucket_bytes=1024)
RESUMED = {  # settings, workers: bit for bit, own and shard residuals kept, what the log says
    "same": ({}, 2, True, (True, True), ""),
    "same, overlapped": ({}, 2, True, (True, True), ""),
    "bf16": ({"compression": "bf16"}, 2, False, (True, True), "compression 'int8' -> 'bf16'"),
    "other buckets": (
        {"bucket_bytes": 2048},
        2,
        False,
        (True, False),
        "held back is dropped: bucket_bytes now cuts other shards",
    ),
    "off": ({"compression": "none"}, 2, False, (False, False), "held back is dropped: compression is off"),
    "three workers": ({}, 3, False, (False, False), "held back is dropped: it was saved by another number of workers"),
}


def saver(folder, config, rank):
    """Saved at the end of a round, after 6 of 9 steps, and inside the next, after 7."""
    model, optimizer, step_once = begin(config, rank)
    held = {}
    for step in range(STEPS):
        step_once(step)
        if step in (5, 6):
            write_snapshot(f"{folder}/{step}", optimizer.outer_loop, shared=rank == 0, objects={})
            held[step] = held_back(optimizer)
    return values(model), held


def resumer(folder, step, config, rank, trained_before):
    """
    Into an outer loop that has begun, or has had a round and holds something back; its weights and what is held back
    then.
    """
    model, optimizer, step_once = begin(config, rank)
    for before in range(4 if trained_before else 1):
        step_once(before)
    check_snapshot(f"{folder}/{step}", optimizer.outer_loop)()
    # At a round's end the file holds no weights: Trainer and Accelerate have loaded the anchors.
    if step == 5 and not config.overlap_steps:
        for piece in optimizer.outer_loop.parts.slow.pieces:
            optimizer.outer_loop.base.hand_back_(piece)
    held = held_back(optimizer)
    for later in range(step + 1, STEPS):
        step_once(later)
    return values(model), held


@pytest.mark.slow
@pytest.mark.parametrize("case", RESUMED)
def test_resume(tmp_path, case):
    settings, workers, is_same, kept, words = RESUMED[case]
    config = BEHIND if "overlapped" in case else SAVED
    saved = run_in_process(lambda rank: saver(tmp_path, config, rank), 2)
    for step in (5, 6):
        logging.getLogger("slowmo_hf").setLevel(logging.INFO)
        with Heard() as said:
            found = run_in_process(
                lambda rank, step=step: resumer(
                    tmp_path, step, other(config, **settings), rank, trained_before=step == 6
                ),
                workers,
            )
        assert len(said.about("held back")) == ("held back" in words), "once per job"
        assert bool(said.about(words))
        for rank, (weights, held) in enumerate(found):
            if is_same:
                assert all(torch.equal(weights[key], saved[rank][0][key]) for key in weights)
            for key, part in held.items():
                if kept[key.startswith("shard")]:
                    assert torch.equal(part, saved[rank][1][step][key]), (key, step)
                    assert part.any() or key.startswith("shard")
                else:
                    assert not part.any(), key


# ---- settings ----


@pytest.mark.parametrize("base", ["sgp", "osgp", "dpsgd", "all_reduce"])
@pytest.mark.parametrize("name", CODES)
def test_other_bases_refuse_it(base, name):
    with pytest.raises(
        ValueError,
        match=rf"compression='{name}' needs base='local_sgd', got base='{base}': .*Leave compression at 'none'",
    ):
        SlowMoConfig(base=base, compression=name)


def test_an_unknown_compression_is_refused():
    with pytest.raises(ValueError, match=r"compression must be one of none, bf16, int8, got 'morse'"):
        SlowMoConfig(compression="morse")
