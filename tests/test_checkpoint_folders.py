"""Folders of checkpoints: unfinished ones, rotation, the Hub, machines that do not share files."""

import errno
import fcntl
import json
import os
import shutil
import stat
import threading
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback

from harness import patience, run_workers
from saved_runs import EPOCH, MIDDLE, STEPS, checkpoints, contents, copy, heard, rank0, same_end, train, whole
from slowmo_hf import SlowMoConfig
from slowmo_hf.checkpoints.claim import Claim, is_claimed
from slowmo_hf.checkpoints.files import LOCK, read_part, write_part
from slowmo_hf.checkpoints.manifest import file_digests, seal, verify_checkpoint
from slowmo_hf.contents import CheckpointError, Contents
from tiny import equal, stand_in_for_the_hub

# ---- unfinished checkpoints and rotation ----


def _check_unfinished(here, folder, first):
    first = first[dist.get_rank()]
    copy(here / "run" / "checkpoint-5", folder, lambda t: (t / "slowmo" / "worker_0.pt.tmp").write_text("half"))
    copy(here / "run" / "checkpoint-7", folder, lambda t: (t / "slowmo" / "manifest.json").unlink())
    rank0(lambda: (folder / "_incomplete-checkpoint-7").mkdir())  # of an earlier kill
    with heard() as said:
        resumed = train(folder, resume=True, save_strategy="no")
    same_end(first, resumed, STEPS - MIDDLE)
    assert checkpoints(folder) == {"checkpoint-5", "_incomplete-checkpoint-7"}
    assert (folder / "_incomplete-checkpoint-7" / "slowmo" / "shared.json").exists()
    again = train(folder, resume=True)  # over the stale file
    same_end(first, again, STEPS - MIDDLE)
    dist.barrier()
    assert whole(folder) == {f"checkpoint-{step}" for step in range(5, STEPS + 1)}
    added = folder / "added"
    copy(here / "run" / "checkpoint-5", added)
    copy(here / "run" / "checkpoint-7", added, lambda t: (t / "slowmo" / "manifest.json").unlink())
    same_end(first, train(added, resume=True, added=True), STEPS - MIDDLE)
    return [line for line in said if "was never finished" in line]


def test_an_unfinished_checkpoint_is_set_aside(saved, tmp_path):
    first, second = run_workers(_check_unfinished, 2, *(saved[0], tmp_path, saved[1]))
    (said,) = first + second  # by the rank that does it
    assert "checkpoint-7 was never finished: it is set aside as _incomplete-checkpoint-7" in said


class Guard(TrainerCallback):
    """From the first save on there is a whole checkpoint, at every event and before every deletion."""

    def __init__(self, folder):
        self.folder = folder
        self.saves = 0

    def look(self, without=""):
        if self.saves:
            assert whole(self.folder) - {without}, f"no whole checkpoint left without {without}"

    def on_step_begin(self, args, state, control, **kwargs):
        self.look()

    def on_save(self, args, state, control, **kwargs):
        self.look()
        self.saves += 1

    @contextmanager
    def watching(self):
        """Every deletion is looked at."""
        delete = shutil.rmtree

        def rmtree(path, *args, **kwargs):
            self.look(Path(path).name)
            delete(path, *args, **kwargs)

        shutil.rmtree = rmtree
        try:
            yield
        finally:
            shutil.rmtree = delete


def _check_rotation(folder):
    best = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "metric_for_best_model": "loss"}
    for limit in (1, 2):
        for name, settings in {"newest": {}, "best": {**best, "greater_is_better": True}}.items():
            output = folder / f"{name}-{limit}"
            guard = Guard(output)
            with guard.watching():
                run = train(output, watchers=[guard], save_total_limit=limit, **settings)
            dist.barrier()
            assert guard.saves == STEPS
            assert run["args"] == {"save_total_limit": limit, "save_on_each_node": False, "hub_strategy": "every_save"}
            kept = {STEPS, STEPS - 1} if limit == 2 else {STEPS}
            if settings:
                assert run["best"] < STEPS - 1
                assert equal(run["final"], load_file(output / f"checkpoint-{run['best']}" / "model.safetensors"))
                kept = {run["best"]} if limit == 1 else {STEPS, run["best"]}  # at the end, as with stock Trainer
            assert checkpoints(output) == whole(output) == {f"checkpoint-{step}" for step in kept}
    return True


@pytest.mark.slow
def test_rotation_always_leaves_a_whole_checkpoint(tmp_path):
    run_workers(_check_rotation, 2, tmp_path)


def test_a_lock_goes_with_its_process_and_not_to_its_children(tmp_path):
    claim = Claim(tmp_path / "checkpoint-3")
    assert is_claimed(tmp_path / "checkpoint-3")
    (starts, started), (waits, ends) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:  # as a DataLoader's worker: it outlives the lock
        os.close(ends)
        os.write(started, b"1")
        os.read(waits, 1)
        os._exit(0)
    try:
        os.read(starts, 1)
        assert is_claimed(tmp_path / "checkpoint-3")
        os.close(claim._descriptor)  # what the kernel does for a killed process
        claim._descriptor = None
        assert not is_claimed(tmp_path / "checkpoint-3")
    finally:
        os.close(ends)
        os.waitpid(child, 0)


# ---- when Trainer saves, and from where it resumes ----


class AlsoAt(TrainerCallback):
    """Asks for a save at the last step of an epoch: the epoch's end asks for one more."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save |= state.global_step == EPOCH


def _check_save_strategies(folder, cases):
    best = {"save_strategy": "best", "metric_for_best_model": "loss", "eval_strategy": "steps", "eval_steps": 1}
    all_cases = {
        "epoch": ({"save_strategy": "epoch"}, []),
        "both": ({"save_strategy": "epoch"}, [AlsoAt()]),
        "best": (best, []),
    }
    for name in cases:
        settings, watchers = all_cases[name]
        first = train(folder / name, watchers=watchers, **settings)
        dist.barrier()
        found = sorted(whole(folder / name))
        assert set(found) == checkpoints(folder / name)
        assert "checkpoint-6" in found if name != "best" else len(found) > 2
        for checkpoint in found:
            step = int(checkpoint.rpartition("-")[2])
            if step not in (1, MIDDLE, EPOCH, 7):
                continue
            copy(folder / name / checkpoint, folder / f"{name}-{step}")
            resumed = train(folder / f"{name}-{step}", resume=True, watchers=watchers, **settings)
            assert any("with every worker's own state" in line for line in resumed["said"]), (
                checkpoint,
                resumed["said"],
            )
            same_end(first, resumed, STEPS - step)
    return True


@pytest.mark.slow
@pytest.mark.parametrize("cases", [pytest.param(("epoch", "both"), id="epoch"), pytest.param(("best",), id="best")])
def test_saves_at_epochs_and_of_the_best_are_whole(tmp_path, cases):
    run_workers(_check_save_strategies, 2, tmp_path, cases)


def _check_places(here, folder, first):
    """The folder that a checkpoint recorded is gone in all cases."""
    first = first[dist.get_rank()]
    inside = copy(here / "run" / "checkpoint-5", folder / "inside")
    same_end(first, train(folder / "inside", resume=str(inside)), STEPS - MIDDLE)

    kept = copy(here / "run" / "checkpoint-5", folder / "kept")
    same_end(first, train(folder / "new", resume=str(kept), resume_from_checkpoint=str(kept)), STEPS - MIDDLE)

    copy(here / "run" / "checkpoint-5", folder / "restored")
    other = SlowMoConfig(sync_every=7, timeout_seconds=patience(30))
    restored = train(folder / "restored", other, resume=True, restore_callback_states_from_checkpoint=True)
    same_end(first, restored, STEPS - MIDDLE)

    # Elsewhere, though output_dir is empty or holds another run's checkpoint of the same step, and through a link.
    link = folder / "latest"
    rank0(lambda: link.symlink_to(kept, target_is_directory=True))
    copy(here / "plain" / "checkpoint-5", folder / "beside")
    for output, path in {"empty": kept, "beside": kept, "linked": link}.items():
        same_end(first, train(folder / output, resume=str(path)), STEPS - MIDDLE)
    same_end(first, train(folder / "own train", resume=Path(kept), kind=OwnTrain), STEPS - MIDDLE)


class OwnTrain(Trainer):
    """As libraries do that wrap `train`, with names of their own."""

    def train(self, resume_from_checkpoint=None, **kwargs):
        where, resume_from_checkpoint = resume_from_checkpoint, "elsewhere"
        return super().train(where, **kwargs)


def test_a_checkpoint_is_found_where_it_is(saved, tmp_path):
    run_workers(_check_places, 2, *(saved[0], tmp_path, saved[1]))


# ---- callbacks that are told of a save ----


class Tidy(TrainerCallback):
    """Writes one of Trainer's files anew and deletes another; where told to, one of ours too."""

    def __init__(self, spoils=False):
        self.spoils = spoils

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if dist.get_rank() == dist.get_world_size() - 1:  # rank 0 makes the manifest, and must wait for it
            time.sleep(0.2)
            told = json.loads((folder / "trainer_state.json").read_text())
            (folder / "trainer_state.json").write_text(json.dumps(told))
            (folder / "training_args.bin").unlink()
            if self.spoils:
                (folder / "slowmo" / "shared.json").write_text("{}")


def _check_tidied(folder):
    first = train(folder / "run", watchers=[Tidy()])
    dist.barrier()
    assert whole(folder / "run") == {f"checkpoint-{step}" for step in range(1, STEPS + 1)}
    inside = folder / "run" / f"checkpoint-{MIDDLE}"
    verify_checkpoint(inside)
    assert "training_args.bin" not in (inside / "slowmo" / "manifest.json").read_text()
    same_end(first, train(folder / "again", resume=str(inside)), STEPS - MIDDLE)

    def damage():
        state = inside / "trainer_state.json"
        state.write_text(state.read_text().replace("global_step", "global_stop", 1))

    rank0(damage)
    with pytest.raises(CheckpointError, match=r"trainer_state.json is not what was written"):
        verify_checkpoint(inside)
    train(folder / "spoilt", watchers=[Tidy(spoils=True)], max_steps=1)
    dist.barrier()
    with pytest.raises(CheckpointError, match=r"shared.json has 2 bytes, the manifest says"):
        verify_checkpoint(folder / "spoilt/checkpoint-1")


def test_what_a_callback_makes_of_trainers_files_is_sealed_too(tmp_path):
    """`on_save` comes behind the save: a stock run resumes from such a folder. What is ours nobody else may write."""
    run_workers(_check_tidied, 2, tmp_path)


@pytest.mark.parametrize(("error", "refused"), [(errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True)])
def test_a_file_system_that_syncs_no_folders(tmp_path, monkeypatch, error, refused):
    sync, synced = os.fsync, []

    def sync_files_alone(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(error, os.strerror(error))
        sync(descriptor)
        synced.append(descriptor)

    monkeypatch.setattr(os, "fsync", sync_files_alone)
    part = Contents({"step": 3}, {"weight": torch.ones(2)})
    with pytest.raises(OSError, match="Input/output") if refused else nullcontext():
        write_part(tmp_path, "shared", part)
        assert torch.equal(read_part(tmp_path, "shared").tensors["weight"], torch.ones(2))
        assert len(synced) == 2


# ---- the Hub ----


def _check_hub(folder, strategy, name):
    hub = folder / "hub"

    def keep(uploaded, place):
        """Each version of a checkpoint, as it is when it is pushed."""
        if place:
            shutil.copytree(uploaded, hub / f"{len(list(hub.glob('*')))}" / place)

    stand_in_for_the_hub(keep)
    push = {"push_to_hub": True, "hub_strategy": strategy, "hub_always_push": True}
    first = train(folder / "run", save_steps=MIDDLE, **push)
    assert first["args"]["hub_strategy"] == strategy
    dist.barrier()
    pushed = hub / "0" / name
    verify_checkpoint(pushed)
    resumed = train(folder / "again", resume=str(pushed), resume_from_checkpoint=str(pushed), save_strategy="no")
    same_end(first, resumed, STEPS - MIDDLE)


@pytest.mark.parametrize(
    ("strategy", "name"), [("checkpoint", "last-checkpoint"), ("all_checkpoints", f"checkpoint-{MIDDLE}")]
)
def test_a_checkpoint_from_the_hub_goes_on(tmp_path, strategy, name):
    """Trainer would push it before the manifest is there, and a resume would refuse it."""
    run_workers(_check_hub, 2, tmp_path, strategy, name)


# ---- machines that do not share files ----


def _check_own_disks(folder):
    os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    rank = dist.get_rank()
    config = SlowMoConfig(sync_every=4, processes_per_worker=1, timeout_seconds=patience(30))
    mine = folder / f"machine-{rank}"
    first = train(mine / "run", config, save_total_limit=5)
    assert first["args"] == {"save_total_limit": 5, "save_on_each_node": False, "hub_strategy": "every_save"}
    assert any("save_on_each_node is set until training ends" in line for line in first["said"])
    assert checkpoints(mine / "run") == whole(mine / "run") == {f"checkpoint-{step}" for step in range(5, STEPS + 1)}
    names = set(contents(mine / "run" / "checkpoint-5"))
    assert {"slowmo/shared.json", f"slowmo/worker_{rank}.json", "model.safetensors"} <= names
    assert f"slowmo/worker_{1 - rank}.json" not in names
    shutil.copytree(mine / "run" / "checkpoint-5", mine / "again" / "checkpoint-5")
    shutil.copytree(mine / "run" / "checkpoint-5", mine / "short" / "checkpoint-5")
    same_end(first, train(mine / "again", config, resume=True), STEPS - MIDDLE)
    if rank == 1:
        (mine / "short" / "checkpoint-5" / "slowmo" / "worker_1.safetensors").unlink()
    with pytest.raises(CheckpointError) as error:
        train(mine / "short", config, resume=True)
    return str(error.value)


def test_machines_without_a_shared_file_system(tmp_path):
    words, others = run_workers(_check_own_disks, 2, tmp_path)
    assert words == others
    assert "rank 1 on " in words
    assert "rank 0 on " not in words
    assert "worker_1.safetensors is missing" in words


def _check_a_worker_over_own_disks(folder):
    os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    config = SlowMoConfig(sync_every=4, processes_per_worker=2, timeout_seconds=patience(30))
    mine = folder / f"machine-{dist.get_rank()}"
    with pytest.raises(CheckpointError) as error:
        train(mine, config)
    assert not whole(mine)
    return str(error.value)


def test_a_worker_over_machines_without_a_shared_file_system_is_refused(tmp_path):
    """The second machine would have a folder without anchors, which nobody can resume from."""
    words, others = run_workers(_check_a_worker_over_own_disks, 2, tmp_path)
    assert words.replace("machine-0", "machine-1", 1) == others  # each rank's own folder, and then the same
    assert "rank 1 on " in words
    assert "processes_per_worker must be at most a machine's processes" in words


def folders_by_the_clock(folder):
    """One machine, whose processes name their folders a second apart."""
    os.environ.update(LOCAL_RANK=str(dist.get_rank()), LOCAL_WORLD_SIZE="2")
    with pytest.raises(CheckpointError) as error:
        train(folder / f"run-{dist.get_rank()}", SlowMoConfig(sync_every=4, timeout_seconds=patience(30)))
    return str(error.value)


def test_processes_of_a_machine_have_one_folder(tmp_path):
    """Else rank 1's part would be in a folder without Trainer's own files, and nobody could resume."""
    words, others = run_workers(folders_by_the_clock, 2, tmp_path)
    assert f"got {tmp_path / 'run-1'}, which process 0 of this machine does not write to" in words
    assert "all processes of a machine must have one folder" in others


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    sync, rename, done = os.fsync, Path.replace, []

    def noted_sync(descriptor):
        done.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        sync(descriptor)

    def noted_rename(path, to):
        done.append("name")
        return rename(path, to)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(Path, "replace", noted_rename)
    write_part(tmp_path, "shared", Contents({"step": 3}))
    assert done == ["file", "name", "folder"] * 2


def test_all_that_a_manifest_lists_is_on_the_disk_before_it(tmp_path, monkeypatch):
    """Trainer's files and their folders too: an older checkpoint may be deleted at once."""
    checkpoint, sync, done = tmp_path / "checkpoint-3", os.fsync, []
    write_part(checkpoint, "shared", Contents({"step": 3}))
    (checkpoint / "global_step3").mkdir()
    for name in ("model.safetensors", "global_step3/optimizer.pt"):
        (checkpoint / name).write_text(name)

    def noted_sync(descriptor):
        done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", noted_sync)
    seal(checkpoint, {"run": "r", "step": 3}, file_digests(checkpoint))
    manifest = done.index(checkpoint / "slowmo" / "manifest.json.tmp")
    files = {checkpoint / name for name in json.loads((checkpoint / "slowmo/manifest.json").read_text())["files"]}
    assert {checkpoint / "model.safetensors", checkpoint / "global_step3/optimizer.pt"} < files
    assert set(done[:manifest]) == files | {tmp_path, checkpoint, checkpoint / "slowmo", checkpoint / "global_step3"}


def test_who_looks_does_not_cost_a_save_its_lock(tmp_path):
    (tmp_path / LOCK).touch()
    looks = os.open(tmp_path / LOCK, os.O_RDONLY)
    fcntl.flock(looks, fcntl.LOCK_SH)
    threading.Timer(0.3, os.close, (looks,)).start()
    claim = Claim(tmp_path)
    assert is_claimed(tmp_path)
    claim.release()
