"""Checkpoints that are damaged, do not fit, or meet a disk that fails."""

import json
import os
import random
import resource
import shutil

import pytest
import torch
import torch.distributed as dist
from transformers import TrainerCallback

import slowmo_hf.checkpoints.manifest
import slowmo_hf.checkpoints.state
from harness import patience, run_workers
from saved_runs import CONFIG, GOSSIP, MIDDLE, STEPS, contents, copy, train, whole
from slowmo_hf import SlowMoConfig
from slowmo_hf.checkpoints.manifest import file_digests, seal, verify_checkpoint, verify_in_turns
from slowmo_hf.contents import CheckpointError
from tiny import Regression, error_of, values


class Steps(TrainerCallback):
    """Counts the steps that have begun."""

    begun = 0

    def on_step_begin(self, args, state, control, **kwargs):
        self.begun += 1


def reseal(folder):
    """Digests that fit what is there now, as a thorough forger would."""
    manifest = json.loads((folder / "slowmo" / "manifest.json").read_text())
    seal(folder, {name: value for name, value in manifest.items() if name not in ("version", "files", "sha256")})


def flip(path, offset, bit=0):
    content = bytearray(path.read_bytes())
    content[offset] ^= 1 << bit
    path.write_bytes(content)


# ---- damage ----


WRITTEN = {
    *(f"slowmo/{part}" for part in ("shared.json", "shared.safetensors")),
    *(f"slowmo/worker_{i}.{end}" for i in (0, 1) for end in ("json", "safetensors", "pt")),
    *(
        "model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "trainer_state.json",
        "training_args.bin",
        "rng_state_0.pth",
        "rng_state_1.pth",
    ),
}


def test_every_damage_of_every_file_is_refused(saved, tmp_path):
    folder, other = saved[0] / "run" / "checkpoint-5", saved[0] / "run" / "checkpoint-7"
    listed = json.loads((folder / "slowmo" / "manifest.json").read_text())["files"]
    assert set(listed) == WRITTEN
    target = tmp_path / "checkpoint-5"
    shutil.copytree(folder, target)
    verify_checkpoint(target)
    draw = random.Random(0)
    for name in listed:
        path, good, swapped = target / name, (folder / name).read_bytes(), (other / name).read_bytes()
        cuts = [good[: draw.randrange(len(good))] for _ in range(15)]
        damages = [b"", None, good + b"\0", *([swapped] if swapped != good else []), *cuts]
        for _ in range(50):
            flipped = bytearray(good)
            flipped[draw.randrange(len(good))] ^= 1 << draw.randrange(8)
            damages.append(bytes(flipped))
        for damage in damages:
            path.unlink() if damage is None else path.write_bytes(damage)
            with pytest.raises(CheckpointError) as error:
                verify_checkpoint(target)
            assert str(path) in str(error.value)
            assert isinstance(error.value, ValueError)
            path.write_bytes(good)
    verify_checkpoint(target)


@pytest.mark.parametrize("processes", [1, 2, 3, 5, 20])
def test_processes_of_a_machine_read_every_file_once(saved, tmp_path, processes):
    """What they read is what the manifest has, and one of them finds a damage that keeps the size."""
    target = tmp_path / "checkpoint-5"
    shutil.copytree(saved[0] / "run" / "checkpoint-5", target)
    manifest = target / "slowmo" / "manifest.json"
    listed = json.loads(manifest.read_text())["files"]
    found = [file_digests(target, turn, processes) for turn in range(processes)]
    assert sorted(name for some in found for name in some) == sorted(listed)
    assert {name: entry for some in found for name, entry in some.items()} == listed
    sizes = [sum(entry["bytes"] for entry in some.values()) for some in found]
    largest = max(entry["bytes"] for entry in listed.values())
    assert max(sizes) <= sum(sizes) / processes + largest
    for name in listed:
        good = (target / name).read_bytes()
        flip(target / name, len(good) // 2)
        finders = [bool(error_of(verify_in_turns, target, turn, processes)) for turn in range(processes)]
        assert sum(finders) == 1 or name.endswith(("shared.json", "trainer_state.json")), name  # read by all
        assert any(finders)
        (target / name).write_bytes(good)


class Reads(TrainerCallback):
    """How many bytes this process has read for digests."""

    def __init__(self):
        self.bytes, digest = 0, slowmo_hf.checkpoints.manifest._digest

        def counted(path):
            self.bytes += path.stat().st_size
            return digest(path)

        slowmo_hf.checkpoints.manifest._digest = counted


def _check_readers(folder):
    reads = Reads()
    train(folder, watchers=[reads], max_steps=MIDDLE, save_steps=MIDDLE)
    saving, reads.bytes = reads.bytes, 0
    os.environ.update(LOCAL_RANK=str(dist.get_rank()), LOCAL_WORLD_SIZE="2")
    train(folder, resume=True, max_steps=MIDDLE, save_strategy="no")
    return saving, reads.bytes


def test_no_process_reads_a_whole_checkpoint(tmp_path):
    ranks = run_workers(_check_readers, 2, tmp_path)
    manifest = json.loads((tmp_path / f"checkpoint-{MIDDLE}" / "slowmo" / "manifest.json").read_text())
    whole_ = sum(entry["bytes"] for entry in manifest["files"].values())
    for moment in (0, 1):
        assert sum(rank[moment] for rank in ranks) == whole_, ("saving", "resuming")[moment]
        assert max(rank[moment] for rank in ranks) < 0.8 * whole_


def _check_places_that_do_not_fit(folder):
    """A card per task: every process is told LOCAL_RANK=0."""
    reads = Reads()
    train(folder, watchers=[reads], max_steps=MIDDLE, save_steps=MIDDLE)
    os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="2")
    reads.bytes = 0
    train(folder, resume=True, max_steps=MIDDLE, save_strategy="no")
    return reads.bytes


def test_what_launchers_tell_of_machines_is_not_asked(tmp_path):
    ranks = run_workers(_check_places_that_do_not_fit, 2, tmp_path)
    manifest = json.loads((tmp_path / f"checkpoint-{MIDDLE}" / "slowmo" / "manifest.json").read_text())
    whole_ = sum(entry["bytes"] for entry in manifest["files"].values())
    assert sum(ranks) == whole_
    assert max(ranks) < 0.8 * whole_


def test_damage_of_the_manifest_is_refused(saved, tmp_path):
    target = tmp_path / "checkpoint-5"
    shutil.copytree(saved[0] / "run" / "checkpoint-5", target)
    manifest = target / "slowmo" / "manifest.json"
    good, draw = manifest.read_bytes(), random.Random(0)
    flips = []
    for _ in range(400):
        flipped = bytearray(good)
        flipped[draw.randrange(len(good))] ^= 1 << draw.randrange(8)
        flips.append(bytes(flipped))
    one_less = json.loads(good)
    del one_less["files"]["optimizer.pt"]
    for damage in (
        None,
        b"",
        b"[]",
        b"{}",
        b'{"files": {}}',
        json.dumps(one_less).encode(),
        good[: len(good) // 2],
        *flips,
    ):
        manifest.unlink() if damage is None else manifest.write_bytes(damage)
        with pytest.raises(CheckpointError, match=r"manifest\.json"):
            verify_checkpoint(target)
    manifest.write_bytes(good)
    verify_checkpoint(target)


# ---- refusals ----


def _edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _remove(folder, *names):
    for name in names:
        (folder / "slowmo" / name).unlink()


def _swap(folder, other, names):
    for path in (other / "slowmo").glob(names):
        shutil.copy(path, folder / "slowmo" / path.name)


class Frozen(Regression):
    """With one of two equally numbered parts not trained."""

    def __init__(self, name):
        super().__init__(torch.float32)
        getattr(self, name).requires_grad_(False)


class Wide(Regression):
    def __init__(self):
        super().__init__(torch.float32)
        self.body, self.head = torch.nn.Linear(4, 6), torch.nn.Linear(6, 1)


def _check_refusals(here, folder):
    """What every case was refused with, on this rank."""
    five, four = here / "run" / "checkpoint-5", here / "run" / "checkpoint-4"
    train(folder / "frozen", CONFIG, Frozen("body"), stop=MIDDLE, save_steps=MIDDLE)
    files = [f"worker_1.{end}" for end in ("json", "safetensors", "pt")]

    def resealed(change, *args, **kwargs):
        return lambda target: (change(target, *args, **kwargs), reseal(target))

    cases = {
        "damaged": (five, lambda t: flip(t / "slowmo" / "worker_1.safetensors", -3), CONFIG, None),
        "damaged settings": (five, lambda t: flip(t / "slowmo" / "worker_1.json", 4), CONFIG, None),
        "damaged model": (five, lambda t: flip(t / "model.safetensors", -3), CONFIG, None),
        "no manifest": (five, lambda t: (t / "slowmo" / "manifest.json").write_text(""), CONFIG, None),
        "one file gone": (five, lambda t: _remove(t, "worker_1.pt"), CONFIG, None),
        "one file gone, sealed": (five, resealed(_remove, "worker_1.pt"), CONFIG, None),
        "gone": (five, resealed(_remove, *files), CONFIG, None),
        "other step": (five, resealed(_swap, four, "worker_1.*"), CONFIG, None),
        "all of other step": (five, resealed(_swap, four, "*.*"), CONFIG, None),
        "other run": (five, resealed(lambda t: _edit(t / "slowmo" / "worker_1.json", run="another")), CONFIG, None),
        "version": (five, resealed(lambda t: _edit(t / "slowmo" / "worker_1.json", version=7)), CONFIG, None),
        "nameless": (
            five,
            resealed(lambda t: (t / "slowmo" / "worker_1.json").write_text('{"version": 1}')),
            CONFIG,
            None,
        ),
        "emptied tensors": (five, resealed(_swap_tensors), CONFIG, None),
        "sync_every": (five, lambda t: None, SlowMoConfig(sync_every=3, timeout_seconds=patience(30)), None),
        "base": (five, lambda t: None, GOSSIP["sgp"], None),
        "parameters": (folder / "frozen" / "checkpoint-5", lambda t: None, CONFIG, Frozen("head")),
        "wide": (five, lambda t: None, CONFIG, Wide()),
        "own anchors, moved settings": (here / "own anchors" / "checkpoint-5", lambda t: None, GOSSIP["sgp"], None),
    }
    words = {}
    for name, (source, change, config, model) in cases.items():
        output = folder / name
        copy(source, output, change)
        before, steps = contents(output), Steps()
        with pytest.raises((CheckpointError, RuntimeError)) as error:
            train(output, config, model, resume=True, watchers=[steps])
        assert steps.begun == 0, name
        assert isinstance(error.value, CheckpointError) == (name != "wide"), (name, error.value)
        words[name] = str(error.value)
        dist.barrier()
        assert contents(output) == before, name
    return words


def _swap_tensors(folder):
    shutil.copy(folder / "slowmo" / "shared.safetensors", folder / "slowmo" / "worker_1.safetensors")


def test_what_does_not_fit_is_refused_on_both_ranks_before_the_first_step(saved, tmp_path):
    first, second = run_workers(_check_refusals, 2, saved[0], tmp_path)
    assert first == second
    told = {
        "damaged": ("worker_1.safetensors", "Resume from another checkpoint"),
        "damaged settings": ("worker_1.json", "Resume from another checkpoint"),
        "damaged model": ("model.safetensors", "Resume from another checkpoint"),
        "no manifest": ("manifest.json", "Resume from another checkpoint"),
        "one file gone": ("worker_1.pt is missing", "Resume from another checkpoint"),
        "one file gone, sealed": ("worker_1.pt", "Resume from another checkpoint"),
        "gone": ("rank 1", "worker_1.json is missing", "Resume from another checkpoint"),
        "other step": ("worker 1", "attempted_steps 4", "Resume from another checkpoint"),
        "all of other step": ("trainer_state.json is of save", "-5'", "-4'", "they are of different saves"),
        "other run": ("worker 1", "run 'another'", "Resume from another checkpoint"),
        "version": ("worker_1.json is of format 7", "reads format 1", "another release has written it"),
        "nameless": ("worker 1", "run None"),
        "emptied tensors": ("rank 1", "parameter."),
        "sync_every": ("sync_every is 3", "Set sync_every=4"),
        "base": ("base is 'sgp'", "Set base='local_sgd'"),
        "parameters": ("another model or parameter set", "head.bias", "begin a new run"),
        "wide": ("size mismatch", "body.weight"),
        "own anchors, moved settings": ("exact_average is True", "Set exact_average=False"),
    }
    assert told.keys() == first.keys()
    for name, pieces in told.items():
        for piece in pieces:
            assert piece in first[name], (name, first[name])


# ---- a disk that fails ----


class DiskFails(TrainerCallback):
    """From a step on, files on rank 1 may not be longer than a few bytes, as on a disk that has just filled up."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 7 and dist.get_rank() == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (700, resource.RLIM_INFINITY))


def _check_disk_error(folder):
    words = {}
    write_part = slowmo_hf.checkpoints.state.write_part

    def failing(checkpoint, name, contents):
        if checkpoint.endswith("-7") and dist.get_rank() == 1:
            raise OSError(28, "No space left on device")
        write_part(checkpoint, name, contents)

    slowmo_hf.checkpoints.state.write_part = failing
    for name, watchers in {"error": [], "full": [DiskFails()]}.items():
        with pytest.raises(CheckpointError) as error:
            train(folder / name, watchers=watchers)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        slowmo_hf.checkpoints.state.write_part = write_part
        words[name] = str(error.value)
        dist.barrier()
        assert whole(folder / name) == {f"checkpoint-{step}" for step in range(1, 7)}
    resumed = train(folder / "error", resume=True)
    assert len(resumed["after"]) == STEPS - 6
    dist.barrier()
    assert "checkpoint-7" in whole(folder / "error")
    assert values(Regression(torch.float32)).keys() == resumed["final"].keys()
    return words


def test_a_disk_error_on_one_rank_ends_all_with_the_same_words(tmp_path):
    words, others = run_workers(_check_disk_error, 2, tmp_path)
    assert words == others
    for name in ("error", "full"):
        assert "checkpoint-7 cannot be written. rank 1 on " in words[name]
    assert "No space left on device" in words["error"]
