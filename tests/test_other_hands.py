"""Checkpoints in other hands: of other releases, of another user, with links, on file systems of other kinds."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

import slowmo_hf
from slowmo_hf import SlowMoConfig, SlowMoOptimizer, verify_checkpoint
from slowmo_hf.adapters import trainer_checkpoints
from slowmo_hf.checkpoints import files
from slowmo_hf.checkpoints.claim import Claim, is_claimed
from slowmo_hf.checkpoints.manifest import is_whole, seal_again, stamps
from slowmo_hf.checkpoints.state import check_snapshot, seal_snapshot, write_snapshot
from slowmo_hf.contents import CheckpointError


@pytest.fixture
def saved(tmp_path):
    """(folder, outer loop) of a sealed checkpoint inside a round, which links to a file outside."""
    model = torch.nn.Linear(3, 1)
    optimizer = SlowMoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), SlowMoConfig(sync_every=4))
    for _ in range(6):
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
    folder = tmp_path / "checkpoint"
    write_snapshot(str(folder), optimizer.outer_loop, shared=True, objects={"scheduler.0": {"last_epoch": 3}})
    (tmp_path / "base.safetensors").write_text("a frozen model, which is everyone's")
    (folder / "base.safetensors").symlink_to(tmp_path / "base.safetensors")
    (folder / "again.json").symlink_to("slowmo/shared.json")  # one that stays inside
    seal_snapshot(folder, optimizer.outer_loop)
    return folder, optimizer.outer_loop


def changed(folder, name, **more):
    """The file with other values; a manifest's own digest fits."""
    path = folder / "slowmo" / name
    content = json.loads(path.read_text()) | more
    if name == "manifest.json":
        content.pop("sha256")
        content["sha256"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(content))


def test_another_format_is_no_damage(saved):
    folder, loop = saved
    assert json.loads((folder / "slowmo/manifest.json").read_text())["slowmo_hf"] == slowmo_hf.__version__
    changed(folder, "manifest.json", version=2, slowmo_hf="0.9.1")
    with pytest.raises(CheckpointError, match=r"is of format 2, and this slowmo_hf reads format 1") as error:
        verify_checkpoint(folder)
    assert "another release has written it (0.9.1). Install that one" in str(error.value)
    assert "damaged" not in str(error.value)
    changed(folder, "shared.json", version=3)
    with pytest.raises(CheckpointError, match=r"shared\.json is of format 3"):
        check_snapshot(str(folder), loop)


def test_settings_of_a_newer_release_are_named(saved):
    folder, loop = saved
    config = json.loads((folder / "slowmo/shared.json").read_text())["config"]
    changed(folder, "shared.json", config={**config, "drift_correction": True})
    with pytest.raises(CheckpointError, match=r"does not know \(drift_correction\): a newer release"):
        check_snapshot(str(folder), loop)
    changed(folder, "shared.json", config=config)
    check_snapshot(str(folder), loop)


def test_a_state_that_is_no_dictionary_is_refused(saved):
    folder, loop = saved
    state = torch.load(folder / "slowmo/worker_0.pt", weights_only=True)
    torch.save({**state, "scheduler.0": 7}, folder / "slowmo/worker_0.pt")
    with pytest.raises(CheckpointError, match=r"worker_0\.pt: scheduler\.0 is int, not a state dictionary"):
        check_snapshot(str(folder), loop)


def test_a_link_that_leads_out_is_no_part_of_a_checkpoint(saved):
    """A stock Trainer resumes from such a folder; what lies outside is not read."""
    folder, _ = saved
    listed = json.loads((folder / "slowmo/manifest.json").read_text())["files"]
    assert "base.safetensors" not in listed
    assert "again.json" in listed
    verify_checkpoint(folder)
    (folder / "base.safetensors").unlink()
    verify_checkpoint(folder)


def test_every_file_has_the_rights_that_the_process_gives(saved, tmp_path):
    """safetensors writes files that their owner alone can read."""
    (tmp_path / "plain").touch()
    expected = stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    for path in (saved[0] / "slowmo").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == expected, path.name


@pytest.mark.parametrize("name", ["manifest.json", "shared.json", "shared.safetensors", "worker_0.pt"])
def test_a_file_that_may_not_be_read_is_not_called_missing(saved, monkeypatch, name):
    """The first error is the system's; the second is what safetensors makes of it."""
    folder, loop = saved
    read_text, open_file = Path.read_text, Path.open

    def refused(path, *args, **kwargs):
        if Path(path).name == name:
            raise PermissionError(13, "Permission denied", str(path))
        return (read_text if not args and not kwargs else open_file)(path, *args, **kwargs)

    def not_found(path, *args, **kwargs):
        raise FileNotFoundError(f"No such file or directory: {path}")

    monkeypatch.setattr(Path, "read_text", refused)
    monkeypatch.setattr(Path, "open", refused)
    monkeypatch.setattr(torch, "load", refused)
    monkeypatch.setattr(files, "load_file", not_found if name.endswith("safetensors") else safetensors.torch.load_file)
    with pytest.raises(CheckpointError, match=rf"{name} cannot be read .*Give this user the right"):
        verify_checkpoint(folder)
    if name != "manifest.json":
        with pytest.raises(CheckpointError, match=rf"{name} cannot be read"):
            check_snapshot(str(folder), loop)


def test_old_checkpoints_go_where_folders_cannot_be_renamed(saved, tmp_path, monkeypatch):
    """Half deleted they pass for none: what says that they are whole goes first."""
    folder, _ = saved
    (folder / "trainer_state.json").write_text("{}")
    rmtree, left = shutil.rmtree, []

    def see(path, **kwargs):
        left.append((Path(path).is_dir(), is_whole(path)))
        rmtree(path, **kwargs)

    def no_rename(*args):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "rename", no_rename)
    monkeypatch.setattr(shutil, "rmtree", see)
    checkpoints = object.__new__(trainer_checkpoints.TrainerCheckpoints)
    checkpoints._given = {"save_total_limit": 1}
    checkpoints._delete([folder])
    assert left == [(True, False)]
    assert not folder.exists()


def test_a_child_of_fork_leaves_its_parents_lock(tmp_path):
    """Also one that has a lock of its own, under the number that the parent's had."""
    claim = Claim(tmp_path / "run")
    lock = tmp_path / "run" / files.LOCK
    child = os.fork()
    if child == 0:
        own = Claim(tmp_path / "own")
        del claim
        os._exit(0 if lock.exists() and is_claimed(tmp_path / "own") and own else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert lock.exists()
    claim.release()
    assert not lock.exists()


FORKS = """
import atexit, os, sys
from types import SimpleNamespace
from slowmo_hf.checkpoints import last_lines
from slowmo_hf.wire import roll_call

told = []
atexit.register(lambda: print(told, len(last_lines._runs), flush=True))  # behind what is registered later
roll_call._listen()
roll_call._going.append(SimpleNamespace(leave=told.append, register=SimpleNamespace(note=lambda: None)))
last_lines.Saves("{}").begin()
if os.fork():
    os.wait()
"""


def test_a_child_of_fork_tells_no_end_of_its_parents_run():
    """It ends as a program does, with what is registered for the exit."""
    done = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True, check=True)
    assert [line for line in done.stdout.splitlines() if line.startswith("[")] == ["[] 0", "['its process ended'] 1"]


def test_registered_objects_may_have_states_of_any_kind(saved):
    folder, loop = saved
    state = torch.load(folder / "slowmo/worker_0.pt", weights_only=True)
    torch.save({**state, "registered.0": [1, 2], "registered.1": "word"}, folder / "slowmo/worker_0.pt")
    taken = check_snapshot(str(folder), loop)()
    assert (taken["registered.0"], taken["registered.1"]) == ([1, 2], "word")


def test_a_link_that_takes_a_files_place_behind_the_seal_is_no_part_of_it(saved, tmp_path):
    """As an `on_save` callback does that moves a model to a store."""
    folder, loop = saved
    (folder / "model.safetensors").write_text("weights")
    seal_snapshot(folder, loop)
    stamped = stamps(folder)
    (folder / "model.safetensors").replace(tmp_path / "stored")
    (folder / "model.safetensors").symlink_to(tmp_path / "stored")
    seal_again(folder, stamped)
    verify_checkpoint(folder)
    assert "model.safetensors" not in json.loads((folder / "slowmo/manifest.json").read_text())["files"]


def test_a_folder_that_may_not_be_read_is_a_checkpoint_error(saved, monkeypatch):
    def refused(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", refused)
    with pytest.raises(CheckpointError, match="checkpoint cannot be read"):
        verify_checkpoint(saved[0])
