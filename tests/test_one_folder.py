"""Programs that write into one output folder, and what goes from it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch.distributed as dist

import slowmo_hf.adapters.accelerate_checkpoints as accelerate_checkpoints
import slowmo_hf.adapters.trainer_checkpoints as trainer_checkpoints
import slowmo_hf.checkpoints.claim as claim
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
    claim._WAIT_SECONDS = 0.5
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
