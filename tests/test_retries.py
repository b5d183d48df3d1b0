"""Programs that catch an error of training on one rank and begin again in the same processes."""

from __future__ import annotations

import gc
import time
import weakref
from contextlib import suppress

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from transformers import Trainer, TrainerCallback

import slowmo_hf
from harness import patience, run_workers
from slowmo_hf import SlowMoCallback, SlowMoConfig, SlowMoOptimizer
from tiny import Regression, Rows, arguments, equal, values

SETTINGS = {"local_sgd": {}, "overlapped": {"overlap_steps": 2}, "sgp": {"base": "sgp"}, "osgp": {"base": "osgp"}}


def config_of(base):
    # A gossip message is waited for until then.
    return SlowMoConfig(sync_every=4, timeout_seconds=patience(8 if base == "sgp" else 20), **SETTINGS[base])


class FailsOnce(TrainerCallback):
    """At an event of a step, which ranks have."""

    def __init__(self, event, steps):
        self.step = steps.get(dist.get_rank() if dist.is_initialized() else 0, -1)
        setattr(self, event, self.fail)

    def fail(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.step = -1
            raise ValueError("a bad batch")


def by_trainer(folder, base, fails, **settings):
    trainer = Trainer(
        model=Regression(),
        args=arguments(folder, max_steps=10, learning_rate=0.05, **settings),
        train_dataset=Rows(128),
        callbacks=[SlowMoCallback(config_of(base)), *([fails] if fails else [])],
    )
    trainer.train()
    return values(trainer.model)


def by_loop(folder, base, fails):
    accelerator = Accelerator(cpu=True)
    model = Regression()
    optimizer = SlowMoOptimizer(torch.optim.SGD(model.parameters(), lr=0.05), config_of(base))
    model, optimizer = accelerator.prepare(model, optimizer)
    rows = Rows(80, seed=dist.get_rank())
    for step in range(10):
        accelerator.backward(model(rows.x[8 * step : 8 * step + 8], rows.y[8 * step : 8 * step + 8])["loss"])
        optimizer.step()
        optimizer.zero_grad()
        if fails is not None:
            fails.fail(None, type("State", (), {"global_step": step + 1}), None)
    slowmo_hf.finish(optimizer)
    return values(accelerator.unwrap_model(model))


def retried(folder, train, base, event, steps):
    """Whether the second try ends as a run that fails nowhere; what the first one said, and how long both took."""
    undisturbed = train(folder, base, None)
    fails, words, came = FailsOnce(event, steps), [], time.monotonic()
    for _ in range(3):
        try:
            return equal(train(folder, base, fails), undisturbed), words, time.monotonic() - came
        except Exception as error:
            words.append(f"{type(error).__name__}: {error}")
        gc.collect()
    return False, words, 0.0


@pytest.mark.slow
@pytest.mark.parametrize("base", ["local_sgd", "overlapped", "sgp"])
@pytest.mark.parametrize("train", [by_trainer, by_loop])
def test_a_second_try_in_the_same_processes_is_as_a_first(tmp_path, train, base):
    """Who has not failed has begun a collective, which nobody joins: the second try has groups of its own."""
    (is_right, heard, seconds), (others, failed, _) = run_workers(
        retried, 2, str(tmp_path), train, base, "on_step_end", {1: 6}
    )
    assert failed == ["ValueError: a bad batch"]
    assert len(heard) == 1
    assert "rank 1 on " in heard[0]
    assert is_right
    assert others
    if train is by_trainer:  # a loop's error is told when its optimizer is let go
        assert "left at step 6: ValueError: a bad batch" in heard[0]
        assert base == "sgp" or seconds < patience(20)  # a gossip message is waited for till `timeout_seconds`


@pytest.mark.slow
def test_an_error_before_training_begins_is_told(tmp_path):
    """In a callback's `on_train_begin`, where the others wait for the start."""
    given = (str(tmp_path), by_trainer, "local_sgd", "on_train_begin", {1: 0})
    (is_right, heard, seconds), (others, failed, _) = run_workers(retried, 2, *given)
    assert failed == ["ValueError: a bad batch"]
    assert len(heard) == 1
    assert "rank 1 on " in heard[0]
    assert "left at step 0: ValueError: a bad batch" in heard[0]
    assert is_right
    assert others
    assert seconds < patience(20)


@pytest.mark.slow
@pytest.mark.parametrize(("base", "steps"), [("overlapped", {0: 9, 1: 7}), ("osgp", {0: 7, 1: 6})])
def test_a_second_try_where_each_rank_has_failed_by_itself(tmp_path, base, steps):
    """Nobody has missed anybody, and what one rank has launched nobody joins."""
    given = (str(tmp_path), by_trainer, base, "on_step_end", steps)
    for is_right, words, seconds in run_workers(retried, 2, *given):
        assert is_right
        assert words == ["ValueError: a bad batch"]
        assert seconds < patience(20)


class OutOfMemory(TrainerCallback):
    """On both ranks in the first run; rank 1 fails in another way before the one that Trainer begins then."""

    def __init__(self):
        self.begun, self.there = 0, True

    def on_train_begin(self, args, state, control, **kwargs):
        self.begun += 1
        if dist.get_rank() == 1 and self.begun == 2:
            raise ValueError("a bad file")

    def on_step_end(self, args, state, control, **kwargs):
        if self.there:
            self.there = False
            raise RuntimeError("CUDA out of memory.")


def begun_anew(folder):
    undisturbed, fails, words = by_trainer(folder, "local_sgd", None), OutOfMemory(), []
    came = time.monotonic()
    try:
        by_trainer(folder, "local_sgd", fails, auto_find_batch_size=True)
    except Exception as error:
        words.append(f"{type(error).__name__}: {error}")
    seconds = time.monotonic() - came
    return equal(by_trainer(folder, "local_sgd", fails), undisturbed), words, seconds


@pytest.mark.slow
def test_runs_that_trainer_begins_anew_stay_in_step(tmp_path):
    """`auto_find_batch_size`: one `train` begins two runs, and the second one fails before it has begun on rank 1."""
    (is_right, (words,), seconds), (others, failed, _) = run_workers(begun_anew, 2, str(tmp_path))
    assert failed == ["ValueError: a bad file"]
    assert "left at step 0: ValueError: a bad file" in words
    assert is_right
    assert others
    assert seconds < patience(20)


def behind_an_error(folder):
    """Settings can be others, and nothing holds the Trainer."""
    fails = FailsOnce("on_step_end", {0: 6, 1: 6})
    ours = SlowMoCallback(config_of("local_sgd"))
    trainer = Trainer(
        model=Regression(),
        args=arguments(folder, max_steps=10, learning_rate=0.05),
        train_dataset=Rows(128),
        callbacks=[ours, fails],
    )
    gc.disable()
    with suppress(ValueError):
        trainer.train()
    assert trainer.state.global_step == 6
    ours.config = SlowMoConfig(sync_every=2, timeout_seconds=patience(20))
    left = [weakref.ref(trainer), weakref.ref(trainer.model)]
    del trainer, ours, fails  # the callback has the model
    return [one() is not None for one in left]


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_error_that_is_caught_leaves_nothing_behind(tmp_path, ranks):
    assert run_workers(behind_an_error, ranks, str(tmp_path)) == [[False, False]] * ranks
