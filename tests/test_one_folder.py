"""Programs that write into one output folder, and what goes from it."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import slowmo_hf.adapters.accelerate_checkpoints as accelerate_checkpoints
import slowmo_hf.adapters.trainer_checkpoints as trainer_checkpoints
from accelerate_loops import linear, train_on
from harness import patience, run_workers
from saved_runs import STEPS, train
from slowmo_hf import CheckpointError, SlowMoConfig, verify_checkpoint
from slowmo_hf.adapters.accelerate_checkpoints import _rotate
from slowmo_hf.checkpoints.claim import Claim
from tiny import Heard


def saved_beside_another_program(folder):
    other = Claim(folder / "checkpoint-4") if dist.get_rank() == 0 else None
    (folder / "checkpoint-4" / "slowmo").mkdir(parents=True, exist_ok=True)
    (folder / "checkpoint-4" / "slowmo" / "theirs.json").write_text("{}")
    dist.barrier()
    trainer_checkpoints._NFS_SECONDS = 0.5
    config = SlowMoConfig(sync_every=4, timeout_seconds=patience(20))
    with pytest.raises(CheckpointError) as caught:
        train(folder, config, save_steps=4)
    if other is not None:
        other.release()
    return str(caught.value), (folder / "checkpoint-4" / "slowmo" / "theirs.json").exists()


def test_a_save_into_a_folder_that_another_program_writes_is_refused(tmp_path):
    """The other one's files stay."""
    (words, stays), others = run_workers(saved_beside_another_program, 2, tmp_path)
    assert others == (words, stays)
    assert f"{tmp_path / 'checkpoint-4'} is being written by another program: two runs save into one folder." in words
    assert stays


def saved_where_an_old_one_cannot_go(folder, under_accelerate):
    """Another program takes an old checkpoint away while it is deleted."""

    def gone(*args, **kwargs):
        raise FileNotFoundError("it was here")

    with Heard() as said:
        if under_accelerate:
            accelerate_checkpoints.shutil = SimpleNamespace(rmtree=gone)
            for number in range(3):
                (folder / f"checkpoint_{number}").mkdir()
            _rotate(folder / "checkpoint_2", 1)
        else:
            trainer_checkpoints._set_aside = gone
            trainer_checkpoints.shutil = SimpleNamespace(rmtree=gone)
            train(folder, SlowMoConfig(sync_every=4, timeout_seconds=patience(20)), save_total_limit=1)
            verify_checkpoint(folder / f"checkpoint-{STEPS}")
    return said.about("cannot be deleted (it was here)", "WARNING")


@pytest.mark.parametrize("under_accelerate", [False, True])
def test_an_old_checkpoint_that_cannot_be_deleted_is_told_and_training_goes_on(tmp_path, under_accelerate):
    said = run_workers(saved_where_an_old_one_cannot_go, 1, tmp_path, under_accelerate)[0]
    assert len(said) == (1 if under_accelerate else STEPS - 1)


@pytest.mark.parametrize("limit", [None, 2])
def test_what_was_set_aside_goes_with_save_total_limit(tmp_path, limit):
    """Stock Trainer would have counted it among its checkpoints."""
    names = {"_incomplete-checkpoint-3", "_incomplete-checkpoint-2-0a1b"}
    for name in names:
        (tmp_path / name / "slowmo").mkdir(parents=True)
    config = SlowMoConfig(sync_every=4, timeout_seconds=patience(20))
    train(tmp_path, config, save_steps=4, save_total_limit=limit)
    assert {path.name for path in tmp_path.glob("_incomplete*")} == (set() if limit else names)


def resumed_behind_a_save_that_was_cut_off(folder, left):
    """Three saves, of which the last one is cut off: weights behind the second, and those that are loaded."""

    def begun():
        accelerator, *parts = linear(sync_every=4)
        accelerator.project_configuration.set_directories(str(folder))
        accelerator.project_configuration.automatic_checkpoint_naming = True
        return accelerator, *accelerator.prepare(*parts)

    accelerator, model, optimizer = begun()
    for number in range(3):
        train_on(accelerator, model, optimizer, range(3 * number, 3 * number + 3))
        accelerator.save_state()
    accelerator.wait_for_everyone()
    last = folder / "checkpoints" / "checkpoint_2"
    if accelerator.is_main_process:
        (last / "slowmo" / "manifest.json").unlink()
        if left == "nothing":
            shutil.rmtree(last)
            last.mkdir()
        elif left == "a stock one":
            shutil.rmtree(last / "slowmo")
    accelerator.wait_for_everyone()
    undisturbed, model, optimizer = begun()
    train_on(undisturbed, model, optimizer, range(6))
    expected = train_on(undisturbed, model, optimizer, range(6, 9))
    again, model, optimizer = begun()
    with Heard() as said:
        again.load_state()
    return torch.equal(train_on(again, model, optimizer, range(6, 9)), expected), said.about("is loaded in its place")


@pytest.mark.parametrize("left", ["our part", "nothing", "a stock one"])
def test_accelerates_newest_checkpoint_that_was_finished_is_loaded(tmp_path, left):
    """A stock one is taken as Accelerate takes it."""
    (goes_on, said), (other_goes_on, _) = run_workers(resumed_behind_a_save_that_was_cut_off, 2, tmp_path, left)
    folder = tmp_path / "checkpoints"
    words = f"{folder / 'checkpoint_2'} was never finished: checkpoint_1 is loaded in its place"
    assert said == ([] if left == "a stock one" else [words])
    assert [goes_on, other_goes_on] == [left != "a stock one"] * 2
