"""
Ranks that differ, fall behind or die: the right result, or an error on every surviving rank within the time-out
+ 10 s whose first line names rank, host, step and cause. No launcher here that would end the survivors first.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import tempfile
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from transformers import Trainer, TrainerCallback

import slowmo_hf
from apart import HOST, TIMEOUT_SECONDS
from faulty import eight_steps
from harness import patience
from slowmo_hf import SlowMoCallback, SlowMoConfig, SlowMoOptimizer
from slowmo_hf.wire.communicator import Communicator
from slowmo_hf.wire.roll_call import RollCall
from tiny import Regression, Rows, arguments


def raises(step):
    if step == 6:
        raise ValueError("bad batch\nwith a second line")


def exits(step):
    if step == 6:
        sys.exit(0)


def is_killed(step):
    if step == 6:
        os.kill(os.getpid(), signal.SIGKILL)


def is_slow(step):
    if step == 6:
        time.sleep(TIMEOUT_SECONDS + 30)


def freezes(step):
    if step == 6:
        os.kill(os.getpid(), signal.SIGSTOP)


def stops_early(step):
    if step == 6:
        raise StopIteration


def is_killed_in_the_round(step):
    if step == 8:
        start_sum = Communicator.start_sum_

        def die(self, flat):
            start_sum(self, flat)
            os.kill(os.getpid(), signal.SIGKILL)

        Communicator.start_sum_ = die


def is_killed_in_a_compressed_round(step):
    if step == 8:
        start_all_gather = Communicator.start_all_gather

        def die(self, rows, mine):
            start_all_gather(self, rows, mine)
            os.kill(os.getpid(), signal.SIGKILL)

        Communicator.start_all_gather = die


def is_killed_between_two_stages(step):
    if step == 8:
        Communicator.start_all_gather = lambda self, rows, mine: os.kill(os.getpid(), signal.SIGKILL)


def never_starts(step):
    time.sleep(TIMEOUT_SECONDS + 30)


WHERE = f"on {re.escape(HOST)}"
LAST_SEEN = "last seen at step 4, the round"
IN_TIME = f"within timeout_seconds={TIMEOUT_SECONDS:g}"
LATE = f"{IN_TIME}: .*{LAST_SEEN}"
TABLE = {
    "raises": (
        raises,
        "local_sgd",
        rf"rank 1 {WHERE} left at step 5: ValueError: bad batch\. It was missed at step 8, the round, by rank 0 "
        rf"{WHERE}",
    ),
    "exits": (exits, "local_sgd", rf"rank 1 {WHERE} left at step 5: its process ended\. It was missed at step 8"),
    "is killed": (
        is_killed,
        "local_sgd",
        rf"rank 1 {WHERE} left without a word after step 4; {LAST_SEEN}\. It was missed at step 8",
    ),
    "is slow": (
        is_slow,
        "local_sgd",
        rf"rank 1 {WHERE} did not come to step 8, the round, {LATE}",
    ),
    "freezes": (
        freezes,
        "local_sgd",
        rf"rank 1 {WHERE} did not come to step 8, the round, {LATE}",
    ),
    "stops early": (
        stops_early,
        "local_sgd",
        rf"rank 1 {WHERE} did not come to step 8, the round, {LATE}",
    ),
    "is killed in the round": (
        is_killed_in_the_round,
        "local_sgd",
        rf"rank 1 {WHERE} left without a word after step 8; last seen at step 8, the round",
    ),
    "is killed in a compressed round": (
        is_killed_in_a_compressed_round,
        "int8",
        rf"rank 1 {WHERE} left without a word after step 8; last seen at step 8, the round",
    ),
    "is killed between the stages of a round that travels": (
        is_killed_between_two_stages,
        "int8, overlapped",
        rf"rank 1 {WHERE} left without a word after step 8; last seen at step 8, the round",
    ),
    "raises, sgp": (
        raises,
        "sgp",
        rf"rank 1 {WHERE} left at step 5: ValueError: bad batch\. It was missed at step 6, the exchange",
    ),
    "is killed, sgp": (
        is_killed,
        "sgp",
        rf"rank 1 {WHERE} left without a word after step 4; {LAST_SEEN}\. It was missed at step 6, the exchange",
    ),
    "is killed, osgp": (
        is_killed,
        "osgp",
        rf"rank 1 {WHERE} left without a word after step 4; {LAST_SEEN}\. It was missed at step [67], the exchange",
    ),
    # Two steps later: the round of step 8 goes ahead, and is heard of at 10.
    "raises, overlapped": (
        raises,
        "overlapped",
        rf"rank 1 {WHERE} left at step 5: ValueError: bad batch\. It was missed at step 8, the round",
    ),
    "is killed, overlapped": (
        is_killed,
        "overlapped",
        rf"rank 1 {WHERE} left without a word after step 4; {LAST_SEEN}\. It was missed at step (8, the round|6, the "
        f"round of step 4)",
    ),
    "is slow, overlapped": (
        is_slow,
        "overlapped",
        rf"rank 1 {WHERE} did not come to step 8, the round, {LATE}",
    ),
    "is killed in the round, overlapped": (
        is_killed_in_the_round,
        "overlapped",
        rf"rank 1 {WHERE} left without a word after step 8; last seen at step 8, the round",
    ),
    "never starts": (
        never_starts,
        "local_sgd",
        rf"rank 1 \(its host is unknown\) has not come to the start {IN_TIME}",
    ),
}


def _train(rank, fault, base):
    """
    A custom loop of 16 steps, rounds every 4; the fault meets rank 1 before its inner step. A message may still arrive
    whose sender is killed behind it: the rank is then missed in the next round.
    """
    model = Regression(torch.float32)
    int8, overlapped = {"compression": "int8"}, {"overlap_steps": 2}
    settings = {"int8": int8, "overlapped": overlapped, "int8, overlapped": int8 | overlapped}.get(
        base, {"base": base}
    )
    config = SlowMoConfig(**settings, sync_every=4, timeout_seconds=TIMEOUT_SECONDS)
    optimizer = SlowMoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), config)
    rows = Rows(4, torch.float32)
    if fault is never_starts and rank == 1:
        fault(0)
    for step in range(1, 17):
        loss = model(rows.x, rows.y)["loss"]
        loss.backward()
        if rank == 1:
            fault(step)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [pytest.param(words, marks=pytest.mark.apart(_train, *case), id=name) for name, (*case, words) in TABLE.items()],
)
def test_a_fault_on_one_rank_is_an_error_on_the_other(apart, words):
    (told,), seconds = apart
    assert re.match(f"RuntimeError: (optimizer step \\d+: )?{words}", told), told
    assert seconds < TIMEOUT_SECONDS + patience(13), f"{seconds:.1f} s"


def _freezes_with_the_store(rank, base):
    """Rank 0, whose process keeps the store: nobody can be asked any more."""
    _train(1 - rank, freezes, base)  # the table's faults meet rank 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "base",
    [
        pytest.param(
            base,
            marks=pytest.mark.apart(_freezes_with_the_store, base, world_size=3, survivors=(1, 2), store_lives_with=0),
        )
        for base in ("local_sgd", "sgp")
    ],
)
def test_a_rank_that_freezes_with_the_store_is_an_error_on_the_others(apart, base):
    told, seconds = apart
    for words in told:
        first = words.splitlines()[0]
        assert "rank 0, or the launcher that keeps the job's key-value store, hangs or left without a word" in first, (
            words
        )
    assert seconds < TIMEOUT_SECONDS + patience(13), f"{seconds:.1f} s"


class Freezes(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if dist.get_rank() == 1 and state.global_step == 5:
            os.kill(os.getpid(), signal.SIGSTOP)


def _freezes_inside_a_worker(rank):
    trainer = Trainer(
        model=Regression(torch.float32),
        args=arguments(tempfile.mkdtemp(), max_steps=12, learning_rate=0.05),
        train_dataset=Rows(200, torch.float32),
        callbacks=[
            SlowMoCallback(SlowMoConfig(sync_every=8, processes_per_worker=2, timeout_seconds=TIMEOUT_SECONDS)),
            Freezes(),
        ],
    )
    trainer.train()


@pytest.mark.slow
@pytest.mark.apart(_freezes_inside_a_worker, world_size=4, survivors=(0, 2, 3))
def test_a_process_that_freezes_inside_a_worker_is_named_by_its_worker_and_by_others(apart):
    """Ranks 0 and 1 are one worker: rank 0 waits for 1 in DDP, whose own error names nobody."""
    told, seconds = apart
    assert re.match(
        rf"RuntimeError: rank 1 {WHERE} did not come to step 5, training, {IN_TIME}",
        told[0],
    ), told[0]
    assert "(" in told[0]
    for words in told[1:]:
        assert f"rank 1 on {HOST}" in words.splitlines()[0], words
    assert seconds < TIMEOUT_SECONDS + patience(13), f"{seconds:.1f} s"


def _meets_a_closed_connection(rank):
    """
    As DDP with several buckets: one collective times out and closes the connection, and the error that is raised is
    another's.
    """
    flat = torch.zeros(8)
    group = dist.new_group(timeout=timedelta(seconds=1))
    roll_call = RollCall(TIMEOUT_SECONDS)
    roll_call.enter(4, "the round")
    roll_call.at(6, "training")
    roll_call.coupled = (0, 1)
    freezes(6 * rank)
    with pytest.raises(RuntimeError, match="Timed out"):
        dist.all_reduce(flat, group=group)
    dist.all_reduce(flat, group=group)


@pytest.mark.slow
@pytest.mark.apart(_meets_a_closed_connection, world_size=2)
def test_a_collective_after_one_that_timed_out_is_told_as_late_too(apart):
    (told,), _ = apart
    late = rf"RuntimeError: rank 1 {WHERE} did not come to step 6, training, {LATE}"
    assert re.match(late, told), told
    assert "(Application timeout caused pair closure)" in told


def _freezes_in_the_round(rank):
    if rank == 0:
        Communicator.start_sum_ = lambda self, flat: os.kill(os.getpid(), signal.SIGSTOP)
    model, rows = Regression(torch.float32), Rows(4, torch.float32)
    config = SlowMoConfig(sync_every=4, processes_per_worker=2, timeout_seconds=TIMEOUT_SECONDS)
    optimizer = SlowMoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), config)
    model = torch.nn.parallel.DistributedDataParallel(model)
    for _ in range(4):
        model(rows.x, rows.y)["loss"].backward()
        optimizer.step()


@pytest.mark.slow
@pytest.mark.apart(_freezes_in_the_round, world_size=4, survivors=(1, 2, 3))
def test_a_process_that_freezes_in_the_round_is_named_by_mate_and_counterpart_and_who_waits_for_those(apart):
    """
    Rank 2 is its counterpart and misses it in the sum; rank 1 waits for it inside, and sees that another has
    given up; rank 3 waits for rank 2, which says whom it has missed.
    """
    told, seconds = apart
    for words in told:
        assert f"rank 0 on {HOST}" in words.splitlines()[0], words
    assert seconds < TIMEOUT_SECONDS + patience(20), f"{seconds:.1f} s"


@pytest.mark.slow
@pytest.mark.parametrize(
    "base",
    [
        pytest.param(base, marks=pytest.mark.apart(_train, is_killed, base, world_size=4, survivors=(0, 2, 3)))
        for base in ("local_sgd", "sgp")
    ],
)
def test_every_survivor_of_four_names_the_dead_rank(apart, base):
    told, seconds = apart
    for words in told:
        assert f"rank 1 on {HOST} left without a word after step 4" in words.splitlines()[0], words
    assert seconds < TIMEOUT_SECONDS + patience(13)


# ---- in an evaluation, where Trainer gathers over all ranks ----


class Evaluates(Trainer):
    """Something meets rank 1 in its second batch."""

    fault, batches = None, 0

    def prediction_step(self, *args, **kwargs):
        self.batches += 1
        if dist.get_rank() == 1 and self.batches == 2:
            self.fault()
        return super().prediction_step(*args, **kwargs)


def _dies_in_an_evaluation(rank, fault):
    trainer = Evaluates(
        model=Regression(torch.float32),
        args=arguments(tempfile.mkdtemp(), max_steps=8, learning_rate=0.05, eval_strategy="steps", eval_steps=6),
        train_dataset=Rows(200, torch.float32),
        eval_dataset=Rows(64, torch.float32),
        callbacks=[SlowMoCallback(SlowMoConfig(sync_every=4, timeout_seconds=TIMEOUT_SECONDS))],
    )
    trainer.fault = fault
    trainer.train()


def _dies_in_a_view(rank):
    """Of a custom loop, which reduces its own metrics."""
    for step, _, optimizer in eight_steps():
        if step == 6:
            with slowmo_hf.consensus(optimizer):
                if rank == 1:
                    killed()
                dist.all_reduce(torch.zeros(1))


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def refused():
    raise ValueError("bad row")


IN_AN_EVALUATION = {
    "is killed": (_dies_in_an_evaluation, (killed,), "left without a word after step 6; last seen at step 6, a view"),
    "raises": (_dies_in_an_evaluation, (refused,), "left at step 6: ValueError: bad row"),
    "is killed, in a loop": (_dies_in_a_view, (), "left without a word after step 6; last seen at step 6, a view"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        pytest.param(words, marks=pytest.mark.apart.with_args(check, *given), id=name)
        for name, (check, given, words) in IN_AN_EVALUATION.items()
    ],
)
def test_a_rank_that_fails_in_an_evaluation_is_named(apart, words):
    """Inside a round: the local weights go back before the error is told."""
    (told,), seconds = apart
    assert told.startswith(f"RuntimeError: rank 1 on {HOST} {words}"), told
    assert seconds < TIMEOUT_SECONDS + patience(13)
