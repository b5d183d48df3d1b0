"""TRL's trainers: what they gather for their logs stays within a worker between rounds, and the logs are of all."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from harness import patience, run_workers
from slowmo_hf import SlowMoCallback, SlowMoConfig
from test_trainer_breadth import tiny_llama, tokenizer

TAU, STEPS = 4, 8
TEXTS = ["a b c d e", "b c d", "c d e f g h", "d e"]


def settings(folder, **more):
    return {
        **{"output_dir": folder, "max_steps": STEPS, "per_device_train_batch_size": 2, "learning_rate": 0.01},
        **{"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True, "bf16": False},
        **{"logging_steps": TAU, "max_length": 8, "dataloader_num_workers": 0},
        **more,
    }


def sft(folder, callbacks):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = Dataset.from_dict({"text": [TEXTS[i % 4] for i in range(48)]})
    return SFTTrainer(
        tiny_llama(),
        SFTConfig(**settings(folder)),
        train_dataset=rows,
        processing_class=tokenizer(),
        callbacks=callbacks,
    )


def dpo(folder, callbacks):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = [{"prompt": "a b", "chosen": TEXTS[i % 4], "rejected": TEXTS[(i + 1) % 4]} for i in range(48)]
    return DPOTrainer(
        tiny_llama(),
        ref_model=tiny_llama(),
        args=DPOConfig(**settings(folder, max_length=16)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        callbacks=callbacks,
    )


def reward(folder, callbacks):
    from datasets import Dataset
    from transformers import LlamaForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    config = copy.deepcopy(tiny_llama().config)
    config.num_labels, config.pad_token_id = 1, tokenizer().pad_token_id
    rows = [{"chosen": TEXTS[i % 4], "rejected": TEXTS[(i + 1) % 4]} for i in range(48)]
    return RewardTrainer(
        LlamaForSequenceClassification(config),
        args=RewardConfig(**settings(folder)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        callbacks=callbacks,
    )


TRAINERS = {"sft": sft, "dpo": dpo, "reward": reward}


class Watch(TrainerCallback):
    """Counts gloo's collectives of every step, and keeps this rank's own metrics where all are about to log."""

    def __init__(self):
        self.counts, self.own, self.prof = [], [], None

    def on_step_begin(self, args, state, control, **kwargs):
        self.prof = profile(activities=[ProfilerActivity.CPU])
        self.prof.__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        self.prof.__exit__(None, None, None)
        self.counts.append(sum(event.name.startswith("gloo:") for event in self.prof.events()))
        if control.should_log:
            self.own.append(copy.deepcopy(dict(self.trainer._metrics["train"])))


def train(kind, folder):
    torch.manual_seed(0)
    watch = Watch()
    callback = SlowMoCallback(SlowMoConfig(sync_every=TAU, timeout_seconds=patience(30)))
    watch.trainer = trainer = TRAINERS[kind](folder, [watch, callback])
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("slowmo_hf").addHandler(handler)
    trainer.train()
    assert "gather" not in vars(trainer.accelerator)
    return watch.counts, watch.own, trainer.state.log_history, [line for line in lines if "gathers metrics" in line]


@pytest.mark.parametrize("kind", TRAINERS)
def test_metrics_are_those_of_all_workers(tmp_path, kind):
    """No collective at a local step; at a log the mean of the workers' means, and the sum of their tokens."""
    ranks = run_workers(train, 2, kind, str(tmp_path))
    (counts, own, history, said), (other_counts, other_own, _, nothing) = ranks
    for counted in (counts, other_counts):
        assert [count for step, count in enumerate(counted, 1) if step % TAU] == [0] * (STEPS - STEPS // TAU)
        assert all(counted[TAU - 1 :: TAU])
    assert len(said) == 1
    assert not nothing
    entries = [entry for entry in history if "loss" in entry]
    assert len(entries) == len(own) == STEPS // TAU
    for entry, mine, others in zip(entries, own, other_own, strict=True):
        assert len(mine) >= 3
        for name in mine:
            means = [sum(its[name]) / len(its[name]) for its in (mine, others)]
            expected = sum(means) if name == "num_tokens" else sum(means) / 2
            assert entry[name] == pytest.approx(expected, rel=1e-3, abs=1e-6), name  # Trainer rounds what it logs
    assert own[0] != other_own[0]


def train_own_loss(folder):
    """A subclass whose own loss gathers: what reaches the loss stays as it is."""
    from trl import SFTTrainer

    class Coupled(SFTTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
            self.seen = self.accelerator.gather(loss.detach())
            return loss

    torch.manual_seed(0)
    watch = Watch()
    callback = SlowMoCallback(SlowMoConfig(sync_every=TAU, timeout_seconds=patience(30)))
    watch.trainer = trainer = sft(folder, [watch, callback])
    trainer.__class__ = Coupled
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("slowmo_hf").addHandler(handler)
    trainer.train()
    return watch.counts, len(trainer.seen), [line for line in lines if "gathers over all ranks" in line]


def test_a_loss_that_gathers_is_left_alone_and_said(tmp_path):
    (counts, seen, said), (_, _, nothing) = run_workers(train_own_loss, 2, str(tmp_path))
    assert all(counts)
    assert seen == 2
    assert len(said) == 1
    assert "Coupled gathers over all ranks in its training steps" in said[0]
    assert not nothing
