"""Trainers as users write them: streams, loaders, logs and checkpoints of their own, copies."""

from __future__ import annotations

import copy
import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer

from harness import patience, run_workers
from slowmo_hf import SlowMoCallback, SlowMoConfig, SlowMoOptimizer, join, last_round, run_in_process
from tiny import Heard, Regression, Rows, arguments, equal, values

CONFIG = SlowMoConfig(sync_every=2, timeout_seconds=patience(60))


def made(folder, cls=Trainer, config=CONFIG, data=None, **settings):
    return cls(
        model=Regression(torch.float32),
        args=arguments(folder, **{"max_steps": 8, "learning_rate": 0.05, **settings}),
        train_dataset=data or Rows(128, torch.float32),
        callbacks=[SlowMoCallback(config)],
    )


def heard_of(words, *args, **kwargs):
    """Warnings with these words, of a run."""
    with Heard() as heard:
        made(*args, **kwargs).train()
    return heard.about(words, "WARNING")


def what_is_told(check, folder):
    """Rank 0's lines; the other rank says nothing."""
    said, nothing = run_workers(check, 2, str(folder))
    assert not any(nothing.values())
    return said


# ---- data ----


class Stream(IterableDataset):
    def __iter__(self):
        rows = Rows(128, torch.float32)
        return (rows[index] for index in range(len(rows)))


class SameLoader(Trainer):
    """Every rank reads all rows in one order: `prepare` was forgotten."""

    def get_train_dataloader(self):
        return DataLoader(self.train_dataset, batch_size=4)


def check_data(folder):
    words = "broadcasts each batch"
    apart = {"dispatch_batches": False}
    return {
        "stream": heard_of(words, folder, data=Stream()),
        "stream, read by each": heard_of(words, folder, data=Stream(), accelerator_config=apart),
        "alike": heard_of("moved alike", folder, SameLoader),
        "not alike": heard_of("moved alike", folder),
        "alike, at rest": heard_of("moved alike", folder, SameLoader, learning_rate=0.0),
        "alike, all-reduce": heard_of("moved alike", folder, SameLoader, config=SlowMoConfig(base="all_reduce")),
    }


def test_a_worker_that_goes_on_alone_does_not_move_like_all(caplog):
    """The other one has ended: the mean of those that train is its own."""

    def work(worker):
        torch.manual_seed(worker)
        weight = torch.nn.Parameter(torch.zeros(3))
        optimizer = SlowMoOptimizer(torch.optim.SGD([weight], lr=0.1), SlowMoConfig(sync_every=2))
        with join(optimizer):
            for _ in range(2 if worker else 12):
                weight.grad = torch.randn(3)
                optimizer.step()
        return last_round(optimizer).round

    assert run_in_process(work, 2)[0] >= 4
    assert not [line for line in caplog.messages if "moved alike" in line]


def test_data_that_couple_ranks_or_are_everybodys_are_told(tmp_path):
    said = what_is_told(check_data, tmp_path)
    (line,) = said.pop("stream")
    assert "accelerator_config={'dispatch_batches': False}" in line
    (line,) = said.pop("alike")
    assert "in 3 rounds" in line
    assert "DistributedSampler" in line
    assert not any(said.values())


def check_rounds(folder):
    def with_period(period, **settings):
        return heard_of("no round is ahead", folder, config=SlowMoConfig(sync_every=period, **settings))

    return {
        "none": with_period(9),
        "none, plain": with_period(9, outer_momentum=0),
        "one": with_period(8, outer_momentum=0),
        "gossip": with_period(9, base="sgp"),
        "DiLoCo": heard_of("no round is ahead", folder, config=SlowMoConfig.diloco()),
        "no rounds at all": heard_of("no round is", folder, config=SlowMoConfig(base="all_reduce", outer_momentum=0)),
    }


def test_a_run_that_is_shorter_than_a_round_is_told(tmp_path):
    said = what_is_told(check_rounds, tmp_path)
    for name in ("none", "none, plain"):
        (line,) = said.pop(name)
        assert "no round is ahead: 8 steps, and sync_every is 9." in line
    (line,) = said.pop("DiLoCo")
    assert "sync_every is 500." in line
    assert not any(said.values())


# ---- logs ----


class OwnLosses(Trainer):
    """Logs a loss of its own at every third step."""

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        if self.state.global_step % 3 == 0:
            self.log({"loss": 100.0})
        return loss


def entries(folder, cls):
    trainer = made(folder, cls, logging_strategy="steps", logging_steps=4)
    trainer.train()
    return [entry for entry in trainer.state.log_history if entry.get("loss", 100.0) != 100.0]


def check_logs(folder):
    return entries(folder, OwnLosses), entries(folder, Trainer)


def test_a_loss_of_ones_own_in_the_log_leaves_the_workers_losses_alone(tmp_path):
    (own, stock), _ = run_workers(check_logs, 2, str(tmp_path))
    assert len(own) == 2
    for entry, other in zip(own, stock, strict=True):
        assert entry["loss"] == pytest.approx(other["loss"], abs=1e-4)
        losses = [entry[f"slowmo/loss_worker_{worker}"] for worker in range(2)]
        assert losses == [other[f"slowmo/loss_worker_{worker}"] for worker in range(2)]
        assert sum(losses) / 2 == pytest.approx(entry["loss"], abs=1e-4)


# ---- copies ----


class Counting(SlowMoCallback):
    """With something of its own."""

    seen = 0

    def on_step_end(self, *args, **kwargs):
        self.seen += 1
        super().on_step_end(*args, **kwargs)


def check_copies(folder):
    trainer = made(folder)
    trainer.remove_callback(SlowMoCallback)
    trainer.add_callback(Counting(CONFIG))
    found = []
    for moment in ("before", "after"):
        (ours,) = (one for one in trainer.callback_handler.callbacks if isinstance(one, Counting))
        for copied in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
            found.append((moment, copied.config == CONFIG, copied.seen, copied.outer_loop is None))
        again = copy.deepcopy(trainer)
        found.append(equal(values(trainer.model), values(again.model)))
        if moment == "before":
            trainer.train()
            again.train()
            found.append(equal(values(trainer.model), values(again.model)))
    return found


def test_the_callback_and_its_trainer_can_be_copied(tmp_path):
    """Before training, and then it trains as the original does; and after it."""
    for found in run_workers(check_copies, 2, str(tmp_path)):
        before, after = [("before", True, 0, True)] * 2, [("after", True, 8, True)] * 2
        assert found == [*before, True, True, *after, True]


# ---- checkpoints ----


class OwnCheckpoints(Trainer):
    """A file of its own and none of Trainer's, as LLaVA saves its projector."""

    def _save_checkpoint(self, model, trial, **kwargs):
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.args.local_process_index == 0:
            folder.mkdir(exist_ok=True)
            (folder / "projector.bin").write_text(str(self.state.global_step))


def check_checkpoints(folder):
    made(folder, OwnCheckpoints, save_strategy="steps", save_steps=4).train()
    dist.barrier()
    with Heard() as heard:
        made(folder)
    dist.barrier()
    found = {path.parent.name: path.read_text() for path in Path(folder).glob("checkpoint-*/projector.bin")}
    return found, heard.about("never finished"), sorted(os.listdir(folder))


def test_finished_checkpoints_of_ones_own_form_stay(tmp_path):
    (tmp_path / "checkpoint-9").mkdir()  # of a stock run that was killed
    (tmp_path / "checkpoint-9/config.json").write_text("{}")
    for found, told, names in run_workers(check_checkpoints, 2, str(tmp_path)):
        assert found == {"checkpoint-4": "4", "checkpoint-8": "8"}
        assert not [line for line in told if "checkpoint-9" not in line]
        assert names == ["_incomplete-checkpoint-9", "checkpoint-4", "checkpoint-8"]
