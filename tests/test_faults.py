"""
Ranks that differ, stop, fall behind or die: the right result, or an error on every surviving rank within the time-out
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
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from packaging.version import Version
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback

import slowmo_hf
from apart import HOST, TIMEOUT_SECONDS
from harness import patience, run_workers
from slowmo_hf import SlowMoCallback, SlowMoConfig, SlowMoOptimizer
from slowmo_hf.wire.communicator import Communicator
from slowmo_hf.wire.roll_call import RollCall
from tiny import Heard, Regression, Rows, arguments, values

# ---- faults, by the rank they happen on ----


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
    assert seconds < TIMEOUT_SECONDS + patience(13), f"{seconds:.1f} s"  # 3: processes start


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
    assert seconds < TIMEOUT_SECONDS + patience(20), f"{seconds:.1f} s"  # 10: four processes start


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


# ---- values ----


def _eight_steps():
    """A custom loop with rounds at 4 and 8; what each step has left is shown after it."""
    model = Regression(torch.float32)
    optimizer = SlowMoOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), SlowMoConfig(sync_every=4, timeout_seconds=TIMEOUT_SECONDS)
    )
    rows = Rows(4, torch.float32)
    for step in range(1, 9):
        model(rows.x, rows.y)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        yield step, model, optimizer


def _not_a_number(rank):
    """NaN in one worker's parameters is an error on both before anything is saved from them."""
    for step, model, _ in _eight_steps():
        if rank == 1 and step == 6:
            model.head.weight.data[0, 0] = float("nan")


@pytest.mark.slow
@pytest.mark.apart(_not_a_number, survivors=(0, 1))
def test_not_a_number_on_one_rank_is_the_same_error_on_both(apart):
    (first, second), _ = apart
    assert first == second
    assert first.startswith(f"ValueError: rank 1 on {HOST}, step 8: its parameters are not finite"), first


def _failed_look():
    """NaN on one rank in a look: an error on both, and both have their own weights back."""
    rank = dist.get_rank()
    model = Regression(torch.float32)
    optimizer = SlowMoOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), SlowMoConfig(sync_every=4, timeout_seconds=patience(20))
    )
    model(Rows(4, torch.float32).x, Rows(4, torch.float32).y)["loss"].backward()
    optimizer.step()
    if rank == 1:
        model.head.weight.data[0, 0] = float("nan")
    before = values(model)
    with (
        pytest.raises(ValueError, match=r"rank 1 on .* its parameters are not finite"),
        slowmo_hf.consensus(optimizer),
    ):
        pass
    after = values(model)
    return all(torch.equal(before[name].nan_to_num(7.0), after[name].nan_to_num(7.0)) for name in before)


def test_a_look_that_fails_gives_the_local_weights_back():
    assert run_workers(_failed_look, 2) == [True, True]


def _slow_but_in_time(base):
    rank = dist.get_rank()
    _train_slowly = time.sleep if rank == 1 else (lambda seconds: None)
    model = Regression(torch.float32)
    optimizer = SlowMoOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), SlowMoConfig(base=base, sync_every=2, timeout_seconds=8)
    )
    rows = Rows(4, torch.float32)
    for _step in range(2):
        model(rows.x, rows.y)["loss"].backward()
        _train_slowly(2.0)
        optimizer.step()
        optimizer.zero_grad()
    return values(model)


@pytest.mark.slow
def test_a_rank_that_is_slow_but_in_time_changes_nothing():
    first, second = run_workers(_slow_but_in_time, 2, "local_sgd")
    assert all(torch.equal(first[name], second[name]) for name in first)


# ---- uneven data ----


class Uneven(TrainerCallback):
    """Stops one rank's training at a step: its data have run out, or somebody asked for it."""

    def __init__(self, rank, step):
        self.rank, self.step = rank, step

    def on_step_end(self, args, state, control, **kwargs):
        if dist.get_rank() == self.rank and state.global_step == self.step:
            control.should_training_stop = True


def _stop_one_rank(folder, step, base, rank):
    config = SlowMoConfig(base=base, sync_every=4, timeout_seconds=patience(20), outer_momentum=0.5)
    args = arguments(
        folder,
        max_steps=20,
        learning_rate=0.05,
        logging_strategy="steps",
        logging_steps=4,
        save_strategy="steps",
        save_steps=8,
    )
    trainer = Trainer(
        model=Regression(torch.float32),
        args=args,
        train_dataset=Rows(400, torch.float32),
        callbacks=[Uneven(rank, step), SlowMoCallback(config)],
    )
    with Heard() as heard:
        trainer.train()
    model = trainer.accelerator.unwrap_model(trainer.model)
    return values(model), trainer.state.global_step, heard.about("all stop with it at step")


@pytest.mark.parametrize(
    ("step", "end", "base", "rank"),
    [(5, 8, "local_sgd", 1), (5, 8, "local_sgd", 0), (8, 12, "local_sgd", 1), (7, 8, "sgp", 1)],
)
def test_under_trainer_all_ranks_stop_together_at_the_round(tmp_path, step, end, base, rank):
    (first, first_step, heard), (second, second_step, nothing) = run_workers(
        _stop_one_rank, 2, tmp_path, step, base, rank
    )
    assert not nothing, "once per job, whoever it was"
    assert first_step == second_step == end
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert len(heard) == 1
    assert f"step {end}" in heard[0]
    assert (tmp_path / "checkpoint-8").exists() == (end > 8)  # what was saved before is whole
    if end > 8:
        slowmo_hf.verify_checkpoint(tmp_path / "checkpoint-8")


def _stop_between_rounds(folder, strategies):
    """Rank 1 stops at step 5; Trainer gathers at step 6, no multiple of sync_every."""
    trainer = Trainer(
        model=Regression(torch.float32),
        args=arguments(folder, max_steps=20, learning_rate=0.05, **strategies),
        train_dataset=Rows(400, torch.float32),
        eval_dataset=Rows(8, torch.float32),
        callbacks=[
            Uneven(1, 5),
            local := LocalWeights(),
            SlowMoCallback(SlowMoConfig.local_sgd(4, timeout_seconds=patience(20))),
        ],
    )
    trainer.train()
    return values(trainer.accelerator.unwrap_model(trainer.model)), trainer.state.global_step, local.seen


class LocalWeights(TrainerCallback):
    """A worker's own weights after every optimizer step, before the round. Stands before SlowMoCallback."""

    def __init__(self):
        self.seen = {}

    def on_optimizer_step(self, args, state, control, model, **kwargs):
        self.seen[state.global_step + 1] = values(model)


@pytest.mark.parametrize(
    "strategies",
    [
        {"logging_strategy": "steps", "logging_steps": 3},
        {"eval_strategy": "steps", "eval_steps": 3},
        {"save_strategy": "steps", "save_steps": 3},
    ],
    ids=["log", "evaluation", "save"],
)
def test_a_rank_that_ended_between_rounds_is_told_before_trainer_gathers(tmp_path, strategies):
    """All stop at step 6, on the average of rank 0 with two steps since the round of step 4 and rank 1 with one."""
    (first, first_step, zero), (second, second_step, one) = run_workers(_stop_between_rounds, 2, tmp_path, strategies)
    assert first_step == second_step == 6
    assert max(one) == 5
    for name, value in first.items():
        assert torch.equal(value, second[name])
        torch.testing.assert_close(value, (2 * zero[6][name] + one[5][name]) / 3)
    assert not (tmp_path / "checkpoint-6").exists()


BATCHES = {0: 6, 1: 4}  # 6 batches here, 4 there


def _stop_at(folder, step, strategies):
    """
    Rank 1 is told to stop at a step where Trainer gathers. Steps at which losses were logged and evaluated, and the
    end.
    """
    trainer = Trainer(
        model=Regression(torch.float32),
        args=arguments(folder, num_train_epochs=2, learning_rate=0.05, **strategies),
        train_dataset=Rows(80, torch.float32),  # 10 steps to the epoch
        eval_dataset=Rows(8, torch.float32),
        callbacks=[Uneven(1, step), SlowMoCallback(SlowMoConfig.local_sgd(4, timeout_seconds=patience(20)))],
    )
    trainer.train()
    told = [
        {key: [entry["step"] for entry in trainer.state.log_history if key in entry]} for key in ("loss", "eval_loss")
    ]
    return values(trainer.accelerator.unwrap_model(trainer.model)), trainer.state.global_step, told


@pytest.mark.parametrize(
    ("step", "strategies", "end", "logged", "evaluated"),
    [
        (8, {"logging_strategy": "steps", "logging_steps": 4}, 12, [4, 8], []),
        (6, {"logging_strategy": "steps", "logging_steps": 3}, 8, [3, 6], []),
        (8, {"save_strategy": "steps", "save_steps": 8, "eval_strategy": "epoch"}, 10, [], [10]),
    ],
    ids=["at a log", "at a log between rounds", "at a save, evaluated by epochs"],
)
def test_a_rank_that_is_told_to_stop_where_trainer_gathers_gathers_first(
    tmp_path, step, strategies, end, logged, evaluated
):
    """
    The others learn it where all next meet, a round or, at step 10, the epoch's end, which all then evaluate at
    together.
    """
    (first, first_step, (losses, evals)), (second, second_step, _) = run_workers(
        _stop_at, 2, tmp_path, step, strategies
    )
    assert first_step == second_step == end
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert losses["loss"] == logged
    assert evals["eval_loss"] == evaluated


def _epochs(folder, ours):
    epoch = dict.fromkeys(("logging_strategy", "eval_strategy", "save_strategy"), "epoch")
    trainer = Trainer(
        model=Regression(torch.float32),
        args=arguments(folder, num_train_epochs=2, learning_rate=0.05, **epoch),
        train_dataset=Rows(40, torch.float32),
        eval_dataset=Rows(8, torch.float32),
        callbacks=[SlowMoCallback(SlowMoConfig.local_sgd(4, timeout_seconds=patience(20)))] if ours else [],
    )
    trainer.train()
    told = {
        key: [entry["step"] for entry in trainer.state.log_history if key in entry] for key in ("loss", "eval_loss")
    }
    return told, sorted(path.name for path in Path(folder).glob("checkpoint-*"))


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_last_epochs_log_evaluation_and_save_are_there(tmp_path, world_size):
    ours, stock = (run_workers(_epochs, world_size, tmp_path / str(ours), ours) for ours in (True, False))
    assert ours == stock
    steps = [10, 20] if world_size == 1 else [5, 10]
    assert ours[0] == ({"loss": steps, "eval_loss": steps}, sorted(f"checkpoint-{step}" for step in steps))


class OnePass(IterableDataset):
    """A stream sharded by hand that cannot be read twice. Accelerate takes every second batch of four rows of it."""

    def __init__(self):
        rows = Rows(48, torch.float32, seed=dist.get_rank())
        self.rows = iter([rows[index] for index in range(8 * BATCHES[dist.get_rank()])])

    def __iter__(self):
        yield from self.rows


def _one_pass(folder, strategies):
    trainer = Trainer(
        model=Regression(torch.float32),
        args=arguments(
            folder, max_steps=20, learning_rate=0.05, accelerator_config={"dispatch_batches": False}, **strategies
        ),
        train_dataset=OnePass(),
        callbacks=[local := LocalWeights(), SlowMoCallback(SlowMoConfig.local_sgd(3, timeout_seconds=patience(20)))],
    )
    trainer.train()
    return values(trainer.accelerator.unwrap_model(trainer.model)), trainer.state.global_step, local.seen


@pytest.mark.skipif(
    Version(version("accelerate")) < Version("1.15"), reason="a stock Trainer fails with 1.3 at a stream that is spent"
)
@pytest.mark.parametrize(
    ("strategies", "end", "weights"),
    [
        ({}, 6, (3, 1)),
        ({"logging_strategy": "steps", "logging_steps": 5}, 5, (2, 1)),
        ({"save_strategy": "steps", "save_steps": 3}, 6, (3, 1)),
    ],
    ids=["quiet", "log between rounds", "save at rounds"],
)
def test_a_stream_that_ends_first_on_one_rank_under_trainer(tmp_path, strategies, end, weights):
    """
    Rounds at 3 and 6; rank 1 has one step after the first, rank 0 the rest. They stop where they next meet, on the
    weighted mean.
    """
    (first, first_step, zero), (second, second_step, one) = run_workers(_one_pass, 2, tmp_path, strategies)
    assert first_step == second_step == end
    assert (max(zero), max(one)) == (end, 4)
    for name, value in first.items():
        assert torch.equal(value, second[name])
        torch.testing.assert_close(value, (weights[0] * zero[end][name] + weights[1] * one[4][name]) / sum(weights))


LR = 0.1


def _joined(config, momentum):
    """Quadratic per worker; the model is one number, so the round is done by hand below."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    model = torch.nn.Linear(1, 1, bias=False).double()
    torch.nn.init.constant_(model.weight, 8.0)
    optimizer = SlowMoOptimizer(torch.optim.SGD(model.parameters(), lr=LR), config)
    seen = []
    with slowmo_hf.join(optimizer):
        for _batch in range(BATCHES[rank]):
            ((model(torch.ones(1, 1).double()) - rank) ** 2 / 2).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append(model.weight.item())
    local = model.weight.item()
    with slowmo_hf.consensus(optimizer):
        shown = model.weight.item()
    return seen, local, shown, optimizer.outer_loop.attempted_steps


def _by_hand(sync_every, beta):
    """
    All workers in one process: rounds at multiples of sync_every, weighted by local steps; the end is the weighted
    average.
    """
    x, anchor, velocity, counts = {0: 8.0, 1: 8.0}, 8.0, 0.0, {0: 0, 1: 0}
    for step in range(1, 7):
        for rank in (0, 1):
            if step <= BATCHES[rank]:
                x[rank] -= LR * (x[rank] - rank)
                counts[rank] += 1
        if step % sync_every == 0:
            total = sum(counts.values())
            velocity = beta * velocity + sum(counts[rank] * (anchor - x[rank]) for rank in x) / total
            anchor -= velocity
            x, counts = {0: anchor, 1: anchor}, {0: 0, 1: 0}
    total = sum(counts.values())
    average = sum(counts[rank] * x[rank] for rank in x) / total if total else anchor
    return x, average


@pytest.mark.parametrize("sync_every", [2, 3, 4, 5, 7])
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_join_weighs_workers_by_their_local_steps(sync_every, beta):
    config = SlowMoConfig(sync_every=sync_every, outer_momentum=beta, timeout_seconds=patience(20))
    results = run_workers(_joined, 2, config, 0.0)
    x, average = _by_hand(sync_every, beta)
    for rank, (seen, local, shown, clock) in enumerate(results):
        assert len(seen) == BATCHES[rank]
        assert clock == 6
        assert local == pytest.approx(x[rank], abs=1e-12)
        assert shown == pytest.approx(average, abs=1e-12)


def _no_data_at_all(config):
    rank = dist.get_rank()
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = Regression(torch.float32)
    model, optimizer = accelerator.prepare(model, SlowMoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), config))
    rows = Rows(4, torch.float32)
    with slowmo_hf.join(optimizer):
        for _ in range(4 if rank == 0 else 0):
            accelerator.backward(model(rows.x, rows.y)["loss"])
            optimizer.step()
            optimizer.zero_grad()
    return values(accelerator.unwrap_model(model))


def test_join_with_a_worker_that_has_no_data():
    first, second = run_workers(_no_data_at_all, 2, SlowMoConfig.local_sgd(2, timeout_seconds=patience(20)))
    alone = Regression(torch.float32)
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
    rows = Rows(4, torch.float32)
    for _ in range(4):
        alone(rows.x, rows.y)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, value in values(alone).items():
        torch.testing.assert_close(first[name], value, rtol=1e-6, atol=1e-7)
        assert torch.equal(first[name], second[name])


@pytest.mark.parametrize("base", ["sgp", "osgp", "dpsgd", "all_reduce"])
def test_join_refuses_bases_that_exchange_at_every_step(base):
    optimizer = SlowMoOptimizer(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1), SlowMoConfig(base=base))
    with pytest.raises(ValueError, match=f"join needs base='local_sgd', got '{base}'"), slowmo_hf.join(optimizer):
        pass


def _different_looks(rank):
    for step, _, optimizer in _eight_steps():
        if rank == 1 and step == 6:
            with slowmo_hf.consensus(optimizer):
                pass


@pytest.mark.slow
@pytest.mark.apart(_different_looks, survivors=(0, 1))
def test_a_look_on_one_rank_alone_is_told_on_both(apart):
    (first, second), seconds = apart
    places = f"rank 0 on {HOST} at step 8, the round; rank 1 on {HOST} at step 6, a view of the average"
    assert first == second
    assert first.startswith(f"RuntimeError: ranks met at different places: {places}"), first
    assert seconds < TIMEOUT_SECONDS


class ManyPasses(OnePass):
    """A stream sharded by hand that can be read again."""

    def __init__(self):
        super().__init__()
        self.rows = list(self.rows)


def _evaluate_after_each_pass(rank):
    trainer = Trainer(
        model=Regression(torch.float32),
        args=arguments(
            tempfile.mkdtemp(),
            max_steps=12,
            learning_rate=0.05,
            eval_strategy="epoch",
            accelerator_config={"dispatch_batches": False},
        ),
        train_dataset=ManyPasses(),
        eval_dataset=Rows(8, torch.float32),
        callbacks=[SlowMoCallback(SlowMoConfig.local_sgd(4, timeout_seconds=TIMEOUT_SECONDS))],
    )
    trainer.train()


@pytest.mark.slow
@pytest.mark.apart(_evaluate_after_each_pass, survivors=(0, 1))
def test_passes_of_other_lengths_that_end_in_evaluations_are_told_on_both(apart):
    """Rank 1's pass ends at step 4, in a round that both did; nobody evaluates there while the other trains on."""
    (first, second), seconds = apart
    places = (
        f"rank 0 on {HOST} at step 6, a log, an evaluation or a save; rank 1 on {HOST} at step 4, a log, an "
        "evaluation or a save"
    )
    assert first == second
    assert first.startswith(f"RuntimeError: ranks met at different places: {places}"), first
    assert seconds < TIMEOUT_SECONDS + patience(13)


class Slope(torch.nn.Module):
    """Its gradient is 1 everywhere: the parameter tells how many steps were taken."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3))

    def forward(self, x, labels=None, **kwargs):
        return {"loss": self.weight.sum() + 0 * x.sum()}


class Ends(TrainerCallback):
    """Ends each rank's training at a step of its own."""

    def __init__(self, steps):
        self.step = steps[dist.get_rank()]

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_training_stop = True


def _gossip_that_ends(ends, settings, flags):
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=Slope(),
            args=arguments(
                folder,
                max_steps=12,
                learning_rate=1.0,
                lr_scheduler_type="constant",
                optim="sgd",
                max_grad_norm=0.0,
                **flags,
            ),
            train_dataset=Rows(rows := 24 * len(ends), torch.float32),  # 6 steps a pass
            eval_dataset=Rows(rows, torch.float32),
            callbacks=[
                Ends(ends),
                SlowMoCallback(
                    SlowMoConfig(sync_every=8, outer_momentum=0.0, timeout_seconds=patience(20), **settings)
                ),
            ],
        )
        trainer.train()
    weight = trainer.accelerator.unwrap_model(trainer.model).weight
    return trainer.state.global_step, (-weight).tolist()


ENDS = {
    "one rank": ((None, 5), 8, {}),
    "one rank, before a log": ((None, 5), 6, {"logging_strategy": "steps", "logging_steps": 6}),
    "one rank, at a round": ((None, 8), 12, {}),
    "one rank, at the end of a pass": ((None, 6), 6, {"eval_strategy": "epoch"}),
    "one rank, before the end of a pass": ((None, 5), 6, {"logging_strategy": "epoch"}),
    "all at a round": ((8, 8), 8, {}),
    "all at one step": ((5, 5), 5, {}),
    "all at steps of their own": ((6, 5), 6, {}),
    "two of three": ((None, 5, 6), 8, {}),
}


GOSSIP = {
    "sgp": {"base": "sgp"},
    "osgp": {"base": "osgp"},
    "dpsgd": {"base": "dpsgd"},
    "no average": {"base": "sgp", "exact_average": False},
}


@pytest.mark.parametrize("case", ENDS)
@pytest.mark.parametrize("base", GOSSIP)
def test_gossip_ranks_that_end_between_rounds_pass_messages_on_until_all_stop(case, base):
    """
    With slope 1 the average is the mean number of steps: a rank that has ended keeps its share, and takes no step.
    """
    ends, last, flags = ENDS[case]
    for step, weight in run_workers(_gossip_that_ends, len(ends), ends, GOSSIP[base], flags):
        assert step == last
        assert weight == pytest.approx([sum(end or last for end in ends) / len(ends)] * 3, rel=1e-6)
