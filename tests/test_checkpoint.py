"""Checkpoints under Trainer: resumed bit for bit, and with what may differ."""

import shutil

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import TrainerCallback

from harness import patience, run_workers
from saved_runs import CONFIG, GOSSIP, MIDDLE, STEPS, checkpoints, copy, heard, make, of_rank_0, same_end, train, whole
from slowmo_hf import SlowMoCallback, SlowMoConfig
from slowmo_hf.contents import CheckpointError
from tiny import Regression, Rows, SmallNorm, equal, recorded

# ---- what may differ, and stock Trainer ----


def _check_free_settings(here, folder):
    copy(here / "run" / "checkpoint-5", folder / "free")
    free = train(folder / "free", SlowMoConfig(sync_every=4, outer_momentum=0.25, timeout_seconds=40), resume=True)
    copy(here / "plain" / "checkpoint-5", folder / "plain")
    assert not any(
        name.startswith("velocity")
        for name in load_file(folder / "plain" / "checkpoint-5" / "slowmo" / "shared.safetensors")
    )
    momentum = train(folder / "plain", CONFIG, resume=True)
    copy(here / "run" / "checkpoint-5", folder / "without")
    without = train(folder / "without", SlowMoConfig(sync_every=4, outer_momentum=0), resume=True)
    runs = (free, momentum, without)
    return *(run["said"] for run in runs), *(len(run["after"]) for run in runs)


def test_free_settings_may_change_and_that_is_said(saved, tmp_path):
    for free, momentum, without, *steps in run_workers(_check_free_settings, 2, saved[0], tmp_path):
        timeouts = f"timeout_seconds {patience(30):.1f} -> 40.0"
        assert f"resumed with other settings: outer_momentum 0.5 -> 0.25, {timeouts}" in free
        assert "resumed with other settings: outer_momentum 0.0 -> 0.5" in momentum
        assert "resumed with other settings: outer_momentum 0.5 -> 0.0" in " ".join(without)
        assert steps == [STEPS - MIDDLE] * 3


def _check_stock(here, folder):
    stock = train(folder / "stock", None, stop=MIDDLE, save_steps=MIDDLE)
    dist.barrier()
    kept = load_file(folder / "stock" / "checkpoint-5" / "model.safetensors")
    moments = torch.load(folder / "stock" / "checkpoint-5" / "optimizer.pt", weights_only=True)["state"]
    first = Moments()
    ours = train(folder / "stock", resume=True, watchers=[first])
    assert equal(ours["start"], kept)
    assert all(equal(first.moments[index], state) for index, state in moments.items())
    assert len(ours["after"]) == STEPS - MIDDLE
    assert stock["said"] == []

    copy(here / "run" / "checkpoint-5", folder / "ours")
    # A stock Trainer takes ours.
    back = train(folder / "ours", None, resume=True, save_steps=MIDDLE + 1, stop=MIDDLE + 1)
    assert equal(back["start"], load_file(here / "run" / "checkpoint-5" / "model.safetensors"))
    assert len(back["after"]) == 1
    dist.barrier()
    # It has carried our record along, without our part. That is of an older save, and nothing is missing.
    assert "SlowMoCallback" in (folder / "ours" / "checkpoint-6" / "trainer_state.json").read_text()
    third = train(folder / "ours", resume=True)
    assert equal(third["start"], load_file(folder / "ours" / "checkpoint-6" / "model.safetensors"))
    assert len(third["after"]) == STEPS - MIDDLE - 1

    train(folder / "model", save_only_model=True, save_steps=MIDDLE, stop=MIDDLE)
    dist.barrier()
    lean = folder / "model" / "checkpoint-5"
    assert not (lean / "slowmo").exists()
    kept = load_file(lean / "model.safetensors")
    again = train(folder / "model", resume=True)
    assert equal(again["start"], kept)
    assert len(again["after"]) == STEPS - MIDDLE
    return ours["said"], again["said"]


class Moments(TrainerCallback):
    """The inner optimizer's state before the first step."""

    moments = None

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        if self.moments is None:
            inner = optimizer.optimizer.state_dict()["state"]
            self.moments = {index: {key: value.clone() for key, value in own.items()} for index, own in inner.items()}


def test_stock_checkpoints_start_ours_and_ours_stock(saved, tmp_path):
    for ours, again in run_workers(_check_stock, 2, saved[0], tmp_path):
        for said in (ours, again):
            assert any("resumed at step 5 from a checkpoint without local training's state" in line for line in said)


# ---- another number of workers ----


class Slow(TrainerCallback):
    """Anchors, velocities and clock before the first step."""

    def __init__(self):
        self.trainer = None
        self.found = None

    def on_step_begin(self, args, state, control, **kwargs):
        if self.found is None:
            (loop,) = (c.outer_loop for c in self.trainer.callback_handler.callbacks if isinstance(c, SlowMoCallback))
            slow = {f"anchor.{i}": item.flat.clone() for i, item in enumerate(loop.parts.slow.anchors)}
            slow |= {f"velocity.{i}": velocity.clone() for i, velocity in enumerate(loop.parts.slow.update.velocities)}
            self.found = slow, loop.attempted_steps, loop.rounds


def _check_other_number(here, folder):
    """Each process has its own copies: nothing is asked of `torch.distributed`, which a single process has not."""
    for name, config in {"run": CONFIG, "sgp": GOSSIP["sgp"], "osgp": GOSSIP["osgp"]}.items():
        slow = Slow()
        with heard() as said:
            recorder, trainer = make(folder / name, config, watchers=[slow], max_steps=STEPS, save_strategy="no")
            slow.trainer = trainer
            trainer.train(resume_from_checkpoint=True)
        assert equal(recorder.start, load_file(here / name / "checkpoint-5" / "model.safetensors")), name
        found, attempted_steps, rounds = slow.found
        assert equal(found, load_file(here / name / "checkpoint-5" / "slowmo" / "shared.safetensors")), name
        assert (attempted_steps, rounds) == (MIDDLE, 1)
        assert len(recorder.after) == STEPS - MIDDLE
        assert any("in place of 2: all start from the average" in line for line in of_rank_0(said))
    with pytest.raises(
        CheckpointError, match=r"saved by 2 workers with exact_average=False.*Start as many, or begin a new run"
    ):
        train(folder / "own anchors", GOSSIP["own anchors"], resume=True)
    return True


@pytest.mark.parametrize("workers", [1, 3])
def test_another_number_of_workers_starts_from_the_average(saved, tmp_path, workers):
    for name in ("run", "sgp", "osgp", "own anchors"):
        shutil.copytree(saved[0] / name / "checkpoint-5", tmp_path / name / "checkpoint-5")
    run_workers(_check_other_number, workers, saved[0], tmp_path)


# ---- models and repeated training ----


def _check_models(folder):
    cases = {
        "buffers averaged": (CONFIG, SmallNorm, torch.float32),
        "buffers local": (
            SlowMoConfig(sync_every=4, model_buffers="local", timeout_seconds=patience(30)),
            SmallNorm,
            torch.float32,
        ),
        "bfloat16": (CONFIG, lambda: Regression(torch.bfloat16), torch.bfloat16),
    }
    for name, (config, model, dtype) in cases.items():
        first = train(folder / name, config, model(), Rows(24, dtype), save_steps=MIDDLE)
        copy(folder / name / "checkpoint-5", folder / f"{name} again")
        resumed = train(folder / f"{name} again", config, model(), Rows(24, dtype), resume=True, save_strategy="no")
        same_end(first, resumed, STEPS - MIDDLE)
    return first["after"][MIDDLE]


def test_buffers_and_bfloat16_inside_a_round(tmp_path):
    first, second = run_workers(_check_models, 2, tmp_path)
    assert not equal(first, second)


def _check_train_twice(folder):
    recorder, trainer = make(folder / "run", save_total_limit=5)
    trainer.train()
    trainer.train()
    assert trainer.args.save_total_limit == 5
    dist.barrier()
    assert "checkpoint-9" in whole(folder / "run") == checkpoints(folder / "run")
    second = {**recorded(trainer, recorder), "inner": trainer.optimizer.optimizer.state_dict()["state"]}
    copy(folder / "run" / "checkpoint-7", folder / "again")
    same_end(second, train(folder / "again", resume=True), 2)
    trainer.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-7"))  # the same Trainer goes back
    third = {**recorded(trainer, recorder), "inner": trainer.optimizer.optimizer.state_dict()["state"]}
    same_end(second, third, 2)
    return True


def test_train_twice_and_resume(tmp_path):
    run_workers(_check_train_twice, 2, tmp_path)
