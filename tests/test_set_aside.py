"""Unfinished checkpoints are set aside where a Trainer is made: by each rank for itself, once, and not pushed."""

from __future__ import annotations

import inspect
import re
import shutil
import time

import pytest
import torch
import torch.distributed as dist
import transformers.trainer
from huggingface_hub.utils import filter_repo_objects
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

import slowmo_hf.adapters.trainer_checkpoints as trainer_checkpoints
from harness import patience, run_workers
from slowmo_hf import SlowMoCallback, SlowMoConfig
from slowmo_hf.adapters.trainer_checkpoints import set_aside_unfinished
from slowmo_hf.checkpoints.claim import Claim
from tiny import Heard, Regression, Rows, arguments, equal, values


def trainer_of(folder, **settings):
    return Trainer(
        model=Regression(torch.float32),
        args=arguments(folder, **{"max_steps": 4, "learning_rate": 0.05, **settings}),
        train_dataset=Rows(64, torch.float32),
        callbacks=[SlowMoCallback(SlowMoConfig(sync_every=2, timeout_seconds=patience(30)))],
    )


def leave_half(path, content="new"):
    """What a killed save leaves."""
    (path / "slowmo").mkdir(parents=True)
    (path / "slowmo/worker_0.pt").write_text(content)
    (path / "model.safetensors").write_text(content)


def found(folder):
    """Names, and what the half saves hold."""
    return {path.name: (path / "slowmo/worker_0.pt").read_text() for path in folder.iterdir() if path.is_dir()}


# ---- each rank for itself ----


def made_on_one_rank_first(folder):
    """Rank 0 makes its Trainer and goes on; rank 1 comes when it sees that, and what it sees then is set aside too."""
    made = folder / "made"
    if dist.get_rank() == 0:
        leave_half(folder / "checkpoint-9")
        trainer = trainer_of(folder)
        assert found(folder) == {"_incomplete-checkpoint-9": "new"}
        leave_half(folder / "checkpoint-11", "newer")
        made.touch()
    else:
        deadline = time.monotonic() + patience(15)
        while not made.exists():
            assert time.monotonic() < deadline, "rank 0 waits in its constructor"
            time.sleep(0.02)
        trainer = trainer_of(folder)
        assert get_last_checkpoint(str(folder)) is None
    trainer.train()
    return values(trainer.model), found(folder)


def test_a_trainer_is_made_on_one_rank_alone(tmp_path):
    """As with a stock Trainer, whose constructor sends nothing."""
    (ours, left), (theirs, _) = run_workers(made_on_one_rank_first, 2, tmp_path)
    assert left == {"_incomplete-checkpoint-9": "new", "_incomplete-checkpoint-11": "newer"}
    assert equal(ours, theirs)


def racing(folder):
    """Twenty times all ranks at once; what an earlier kill has left lies under the last name."""
    args, mine = arguments(folder), []
    for turn in range(20):
        if dist.get_rank() == 0:
            for step in (9, 12):
                leave_half(folder / f"checkpoint-{step}", f"{turn}")
        dist.barrier()
        with Heard() as heard:
            set_aside_unfinished(args)
        assert get_last_checkpoint(str(folder)) is None, "behind its own call"
        dist.barrier()
        assert found(folder) == {f"_incomplete-checkpoint-{step}": f"{turn}" for step in (9, 12)}
        mine += heard.lines
        dist.barrier()
    return mine


def test_of_ranks_that_race_one_sets_aside_and_says_so(tmp_path):
    said = [line for lines in run_workers(racing, 3, tmp_path) for line in lines]
    assert len(said) == 2 * 20
    assert all("was never finished: it is set aside as _incomplete-checkpoint-" in line for _, line in said)


def test_a_rank_that_comes_between_loses_nothing(tmp_path, monkeypatch):
    """Another rank sets aside what this one has just found unfinished: this one deletes nothing of it."""
    leave_half(tmp_path / "_incomplete-checkpoint-9", "of an earlier kill")
    leave_half(tmp_path / "checkpoint-9")
    args = arguments(tmp_path)

    def meanwhile(path):
        monkeypatch.undo()
        set_aside_unfinished(args)
        return False

    monkeypatch.setattr(trainer_checkpoints, "is_claimed", meanwhile)
    with Heard() as heard:
        set_aside_unfinished(args)
    assert found(tmp_path) == {"_incomplete-checkpoint-9": "new"}
    assert len(heard.lines) == 1


def beside_a_save(folder):
    """Rank 0 is writing; both make a Trainer."""
    path = folder / "checkpoint-9"
    claim = Claim(path) if dist.get_rank() == 0 else None
    dist.barrier()
    with Heard() as heard:
        trainer_of(folder)
    dist.barrier()
    there = path.is_dir()
    dist.barrier()
    if claim:
        claim.release()
    return there, heard.lines


def test_a_save_under_way_is_left_alone_by_every_rank_and_said_once(tmp_path):
    (there, said), (still, others) = run_workers(beside_a_save, 2, tmp_path)
    assert there
    assert still
    assert [level for level, line in said if "left alone: another program is writing it" in line] == ["WARNING"]
    assert others == []


# ---- out of the Hub's way ----


def patterns():
    """What Trainer's two uploads of `output_dir` leave out, from its source."""
    lists = re.findall(r"ignore_patterns=(\[.*?\])", inspect.getsource(transformers.trainer))
    assert len(lists) == 2
    return [eval(text, {"PREFIX_CHECKPOINT_DIR": PREFIX_CHECKPOINT_DIR}) for text in lists]


def test_what_is_set_aside_is_not_pushed(tmp_path):
    """Nor what a version before has set aside; a half checkpoint of a stock run is not either."""
    leave_half(tmp_path / "checkpoint-9")
    leave_half(tmp_path / "incomplete-checkpoint-4")
    (tmp_path / "model.safetensors").write_text("whole")
    trainer_of(tmp_path)
    assert set(found(tmp_path)) == {"_incomplete-checkpoint-9", "_incomplete-checkpoint-4"}
    files = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 5
    for ignored in patterns():
        assert list(filter_repo_objects(files, ignore_patterns=ignored)) == ["model.safetensors"]


def test_what_a_version_before_has_set_aside_gets_the_name_of_now(tmp_path):
    """The newest of a step stays; what only looks like one is the user's."""
    leave_half(tmp_path / "incomplete-checkpoint-4", "first")
    leave_half(tmp_path / "incomplete-checkpoint-5", "first")
    leave_half(tmp_path / "checkpoint-4", "second")
    leave_half(tmp_path / "incomplete-checkpoint-mine", "mine")
    with Heard() as heard:
        set_aside_unfinished(arguments(tmp_path))
    assert found(tmp_path) == {
        "_incomplete-checkpoint-4": "second",
        "_incomplete-checkpoint-5": "first",
        "incomplete-checkpoint-mine": "mine",
    }
    assert len(heard.about("checkpoint-4 was never finished", "WARNING")) == 1


@pytest.mark.parametrize("limit", [1, 2])
def test_a_deletion_leaves_nothing(tmp_path, monkeypatch, limit):
    """What `save_total_limit` deletes is no checkpoint, and not pushed, from its first file on."""
    deleted, own = [], shutil.rmtree

    def rmtree(path, *args, **kwargs):
        deleted.append(path.name)
        own(path, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    trainer_of(tmp_path, save_strategy="steps", save_steps=1, save_total_limit=limit).train()
    assert {path.name for path in tmp_path.iterdir()} == {f"checkpoint-{step}" for step in (3, 4)[-limit:]}
    gone = {f"_incomplete-checkpoint-{step}" for step in (1, 2, 3)[: 4 - limit]}
    assert gone <= set(deleted)
    assert not [name for name in deleted if name.startswith("checkpoint-")]
