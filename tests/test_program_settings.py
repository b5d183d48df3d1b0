"""Settings of Trainer and Accelerate that differ between ranks: said at the start, with both values and both ranks."""

from __future__ import annotations

import re

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import Trainer

from apart import HOST
from harness import patience, run_workers
from slowmo_hf import SlowMoCallback, SlowMoConfig, SlowMoOptimizer
from tiny import Heard, Regression, Rows, arguments, error_of

CONFIG = {"sync_every": 2}


def by_trainer(folder, zero, one):
    """Two steps; the error, warnings of a difference, and how many rows were trained on."""
    model = Regression(torch.float32)
    settings = {"max_steps": 2, "learning_rate": 0.05, **(one if dist.get_rank() else zero)}
    trainer = Trainer(
        model=model,
        args=arguments(folder, **settings),
        train_dataset=Rows(64, torch.float32),
        callbacks=[SlowMoCallback(SlowMoConfig(**CONFIG, timeout_seconds=patience(20)))],
    )
    with Heard() as heard:
        error = error_of(trainer.train)
    rows = sum(len(x) for x, _ in model.seen)
    return error, heard.about("differs"), rows


def difference(name, zero, one):
    has = [f"rank {rank} on {HOST} has {name} = {value!r}" for rank, value in enumerate((zero, one))]
    return f"ValueError: ranks differ at the start: {', '.join(has)}. "


@pytest.mark.parametrize(("name", "zero", "one"), [("gradient_accumulation_steps", 1, 2), ("max_grad_norm", 1.0, 0.5)])
def test_under_trainer_a_difference_is_the_same_error_on_both_before_a_step(tmp_path, name, zero, one):
    (first, _, rows), (second, _, others) = run_workers(by_trainer, 2, tmp_path, {name: zero}, {name: one})
    assert first == second
    assert first.startswith(difference(name, zero, one)), first
    assert (rows, others) == (0, 0)


def test_under_trainer_another_batch_size_is_said_and_trained_with(tmp_path):
    size = "per_device_train_batch_size"
    (first, said, rows), (second, silent, others) = run_workers(by_trainer, 2, tmp_path, {size: 4}, {size: 8})
    assert (first, second) == ("", "")
    assert (rows, others) == (8, 16)
    (words,) = said
    assert words.startswith(f"{size} differs: 4 on rank 0, 8 on rank 1. "), words
    assert silent == []


def test_the_same_rows_cut_into_smaller_batches_are_no_error(tmp_path):
    zero, one = ({"per_device_train_batch_size": 8 // n, "gradient_accumulation_steps": n} for n in (1, 2))
    (first, _, rows), (second, _, others) = run_workers(by_trainer, 2, tmp_path, zero, one)
    assert (first, second) == ("", "")
    assert (rows, others) == (16, 16)


def test_equal_settings_are_no_word(tmp_path):
    both = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.0}
    assert run_workers(by_trainer, 2, tmp_path, both, both) == [("", [], 16), ("", [], 16)]


def by_accelerate(accumulation, sizes):
    """A pass over the data as Accelerate teaches it; as `by_trainer`."""
    rank = dist.get_rank()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation[rank])
    bare = Regression(torch.float32)
    config = SlowMoConfig(**CONFIG, timeout_seconds=patience(20))
    model, optimizer, loader = accelerator.prepare(
        bare,
        SlowMoOptimizer(torch.optim.SGD(bare.parameters(), lr=0.05), config),
        DataLoader(Rows(64, torch.float32), batch_size=sizes[rank]),
    )
    steps = 0

    def train():
        nonlocal steps
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch)["loss"])
                optimizer.step()
                optimizer.zero_grad()
            steps += accelerator.sync_gradients
            if steps == 2:
                break

    with Heard() as heard:
        error = error_of(train)
    return error, heard.about("differs"), sum(len(x) for x, _ in bare.seen)


def test_under_accelerate_another_accumulation_is_the_same_error_on_both():
    (first, _, _), (second, _, _) = run_workers(by_accelerate, 2, (1, 2), (4, 4))
    assert first == second
    assert first.startswith(difference("accelerator.gradient_accumulation_steps", 1, 2)), first
    assert re.search("let the DataLoader's batch size differ", first)


def test_under_accelerate_another_batch_size_is_said_and_trained_with():
    (first, said, rows), (second, silent, others) = run_workers(by_accelerate, 2, (1, 1), (4, 8))
    assert (first, second) == ("", "")
    assert (rows, others) == (8, 16)
    (words,) = said
    assert words.startswith("the DataLoader's batch size differs: 4 on rank 0, 8 on rank 1. "), words
    assert silent == []


def test_under_accelerate_the_same_rows_cut_into_smaller_batches_are_no_error():
    (first, _, rows), (second, _, others) = run_workers(by_accelerate, 2, (1, 2), (8, 4))
    assert (first, second) == ("", "")
    assert (rows, others) == (16, 16)
