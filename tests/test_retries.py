"""Programs that catch an error of training on one rank and begin again in the same processes."""

from __future__ import annotations

import gc
import time

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from transformers import Trainer, TrainerCallback

import slowmo_hf
from harness import patience, run_workers
from slowmo_hf import SlowMoCallback, SlowMoConfig, SlowMoOptimizer
from tiny import Regression, Rows, arguments, equal, values

SETTINGS = {"local_sgd": {}, "overlapped": {"overlap_steps": 2}, "sgp": {"base": "sgp"}}


def config_of(base):
    return SlowMoConfig(sync_every=4, timeout_seconds=patience(20), **SETTINGS[base])


class FailsOnce(TrainerCallback):
    """On rank 1, at an event of a step."""

    def __init__(self, event, step=6):
        self.step, self.there = step, dist.get_rank() == 1
        setattr(self, event, self.fail)

    def fail(self, args, state, control, **kwargs):
        if self.there and state.global_step == self.step:
            self.there = False
            raise ValueError("a bad batch")


def by_trainer(folder, base, fails):
    trainer = Trainer(
        model=Regression(),
        args=arguments(folder, max_steps=10, learning_rate=0.05),
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


def retried(folder, train, base, event, step):
    """Whether the second try ends as a run that fails nowhere; what the first one said, and how long both took."""
    undisturbed = train(folder, base, None)
    fails, words, came = FailsOnce(event, step), [], time.monotonic()
    for _ in range(3):
        try:
            return equal(train(folder, base, fails), undisturbed), words, time.monotonic() - came
        except Exception as error:
            words.append(f"{type(error).__name__}: {error}")
        gc.collect()
    return False, words, 0.0


@pytest.mark.slow
@pytest.mark.parametrize("base", SETTINGS)
@pytest.mark.parametrize("train", [by_trainer, by_loop])
def test_a_second_try_in_the_same_processes_is_as_a_first(tmp_path, train, base):
    """Who has not failed has begun a collective, which nobody joins: the second try has groups of its own."""
    (is_right, heard, seconds), (others, failed, _) = run_workers(
        retried, 2, str(tmp_path), train, base, "on_step_end", 6
    )
    assert failed == ["ValueError: a bad batch"]
    assert len(heard) == 1
    assert "rank 1 on " in heard[0]
    assert is_right
    assert others
    if train is by_trainer:  # a loop's error is told when its optimizer is let go
        assert "left at step 6: ValueError: a bad batch" in heard[0]
        assert base == "sgp" or seconds < patience(15)  # a gossip message is waited for till `timeout_seconds`


@pytest.mark.slow
def test_an_error_before_training_begins_is_told(tmp_path):
    """In a callback's `on_train_begin`, where the others wait for the start."""
    given = (str(tmp_path), by_trainer, "local_sgd", "on_train_begin", 0)
    (is_right, heard, seconds), (others, failed, _) = run_workers(retried, 2, *given)
    assert failed == ["ValueError: a bad batch"]
    assert len(heard) == 1
    assert "rank 1 on " in heard[0]
    assert "left at step 0: ValueError: a bad batch" in heard[0]
    assert is_right
    assert others
    assert seconds < patience(15)
