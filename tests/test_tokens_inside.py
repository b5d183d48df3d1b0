"""Losses over tokens, of workers of several processes: divided by all tokens of the worker."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from transformers import Trainer

from harness import IS_TRANSFORMERS_4, run_workers
from llama import tiny_llama
from slowmo_hf import SlowMoCallback
from tiny import arguments, values

STEPS, LENGTH = 3, 8


def rows(kept):
    """Sentences of which the even ones keep one label, the odd ones `kept`: processes take turns."""
    made = []
    for index in range(4 * STEPS * dist.get_world_size()):
        tokens = torch.randint(3, 20, (LENGTH,), generator=torch.Generator().manual_seed(index))
        labels = tokens.clone()
        labels[1 + (kept if index % 2 else 1) :] = -100
        made.append({"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels})
    return made


def trained(folder, callbacks, **settings):
    """The weights after a few steps of SGD, and the losses that were logged."""
    torch.manual_seed(0)
    model = tiny_llama()
    args = arguments(
        folder,
        max_steps=STEPS,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=1,
        learning_rate=0.5,
        max_grad_norm=0.0,
        optim="sgd",
        logging_strategy="steps",
        logging_steps=1,
        **settings,
    )
    trainer = Trainer(model, args, train_dataset=rows(LENGTH - 1), callbacks=callbacks)
    trainer.train()
    return values(model), [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def beside_stock(folder):
    """One worker of all processes, which is stock training, with the user's loss and with the model's own."""
    pairs = {}
    for name, average in (("by all tokens", True), ("by each process's", False)):
        found = [
            trained(f"{folder}/{name}", made, average_tokens_across_devices=average)
            for made in ([], [SlowMoCallback(processes_per_worker=2, sync_every=2, outer_momentum=0.0)])
        ]
        pairs[name] = found
    return pairs


def test_a_worker_averages_over_its_tokens(tmp_path):
    """Also what the log says; without the argument each process divides by its own, which is something else."""
    pairs = run_workers(beside_stock, 2, str(tmp_path))[0]
    for name, (stock, ours) in pairs.items():
        for key, value in stock[0].items():
            torch.testing.assert_close(ours[0][key], value, rtol=0, atol=1e-6, msg=f"{name}: {key}")
        assert ours[1] == pytest.approx(stock[1], abs=1e-4), name
    averaged, apart = (pairs[name][1][0] for name in pairs)
    assert max(float((averaged[key] - apart[key]).abs().max()) for key in averaged) > 1e-3


def given(folder):
    """Of every micro-batch what the loss is divided by, and this process's own labels; workers of two among four."""
    torch.manual_seed(0)
    model, seen = tiny_llama(), []

    def note(module, args, kwargs):
        labels = kwargs["labels"][:, 0 if IS_TRANSFORMERS_4 else 1 :]
        seen.append((float(kwargs["num_items_in_batch"]), int(labels.ne(-100).sum())))

    model.register_forward_pre_hook(note, with_kwargs=True)
    args = arguments(folder, max_steps=STEPS, gradient_accumulation_steps=2, per_device_train_batch_size=1)
    callback = SlowMoCallback(processes_per_worker=2, sync_every=50, outer_momentum=0.0)
    Trainer(model, args, train_dataset=rows(LENGTH - 1), callbacks=[callback]).train()
    return seen


def test_the_tokens_are_the_workers_own(tmp_path):
    """
    The mean over its two processes, of both micro-batches, and not over all four. transformers 4 counts the first
    label of a sentence too, which nothing predicts.
    """
    ranks = run_workers(given, 4, str(tmp_path))
    means = set()
    for mates in (ranks[:2], ranks[2:]):
        for update in range(STEPS):
            micro = [one for rank in mates for one in rank[2 * update : 2 * update + 2]]
            expected = sum(own for _, own in micro) / 2
            assert [by for by, _ in micro] == [expected] * 4
            means.add((update, expected))
    assert len(means) > STEPS, "workers with equally many would hide a mean over all"
