"""
Checkpoints are whole or refused: damage, other settings, other numbers of workers, kills, rotation, failing or
separate disks.
"""

import json
import logging
import os
import random
import resource
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback

import slowmo_hf.checkpoints.state
from harness import patience, run_workers
from slowmo_hf import SlowMoCallback, SlowMoConfig
from slowmo_hf.checkpoints.files import seal, verify_checkpoint
from slowmo_hf.contents import CheckpointError
from tiny import Recorder, Regression, Rows, SmallNorm, arguments, equal, recorded, stand_in_for_the_hub, values

STEPS, EPOCH, MIDDLE = 9, 6, 5  # rounds end at 4 and 8, an epoch at 6
CONFIG = SlowMoConfig(sync_every=4, outer_momentum=0.5, timeout_seconds=patience(30))
PLAIN = SlowMoConfig.local_sgd(4, timeout_seconds=patience(30))
GOSSIP = {
    "sgp": SlowMoConfig(base="sgp", sync_every=4, timeout_seconds=patience(30)),
    "osgp": SlowMoConfig(base="osgp", sync_every=4, timeout_seconds=patience(30)),
    "own anchors": SlowMoConfig(base="sgp", sync_every=4, exact_average=False, timeout_seconds=patience(30)),
}


class Stop(TrainerCallback):
    """Ends training after a step's save."""

    def __init__(self, step):
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


class Steps(TrainerCallback):
    """Counts the steps that have begun."""

    begun = 0

    def on_step_begin(self, args, state, control, **kwargs):
        self.begun += 1


@contextmanager
def heard():
    """What the package says meanwhile."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("slowmo_hf")
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


def of_rank_0(lines):
    """Lines come once per job."""
    box = [lines]
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def make(folder, config=CONFIG, model=None, data=None, watchers=(), kind=Trainer, ours=SlowMoCallback, **settings):
    """
    (recorder, trainer), with a checkpoint after every step unless `settings` say otherwise; config None is stock
    training.
    """
    recorder = Recorder()
    last = [watcher for watcher in watchers if isinstance(watcher, Stop)]  # when the save is finished
    callbacks = [
        recorder,
        *(w for w in watchers if w not in last),
        *([ours(config)] if config else []),
        *last,
    ]
    defaults = {"max_steps": STEPS, "learning_rate": 0.02, "save_strategy": "steps", "save_steps": 1, "seed": 5}
    rows = data or Rows(24, torch.float32)
    trainer = kind(
        model=model or Regression(torch.float32),
        args=arguments(folder, **{**defaults, "per_device_train_batch_size": 2, **settings}),
        train_dataset=rows,
        eval_dataset=rows,
        callbacks=callbacks,
    )
    return recorder, trainer


def train(folder, *arguments_of_make, resume=None, stop=None, watchers=(), **settings):
    """
    Train; returns the recording, with the inner optimizer's state, what was said, and the trainer's arguments as they
    are left.
    """
    with heard() as said:
        recorder, trainer = make(
            folder, *arguments_of_make, watchers=[*watchers, *([Stop(stop)] if stop else [])], **settings
        )
        try:
            trainer.train(resume_from_checkpoint=resume)
        except KeyboardInterrupt:
            assert stop
    inner = trainer.optimizer.optimizer.state_dict()["state"]
    kept = {name: getattr(trainer.args, name) for name in ("save_total_limit", "save_on_each_node", "hub_strategy")}
    best = trainer.state.best_global_step
    return {**recorded(trainer, recorder), "inner": inner, "said": of_rank_0(said), "args": kept, "best": best}


def same_end(first, resumed, steps=None):
    """
    Weights and buffers after every step that both have taken, the final ones, and the inner optimizer's state: bit for
    bit.
    """
    count = len(resumed["after"])
    assert 0 < count == (steps or count)
    for mine, other in zip(first["after"][-count:], resumed["after"], strict=True):
        assert equal(mine, other)
    assert equal(first["final"], resumed["final"])
    assert first["inner"].keys() == resumed["inner"].keys()
    for index, state in first["inner"].items():
        assert equal(state, resumed["inner"][index])


def rank0(act):
    """Do it on rank 0 while the other waits."""
    dist.barrier()
    if dist.get_rank() == 0:
        act()
    dist.barrier()


def copy(checkpoint, output, change=lambda folder: None):
    """A copy of a checkpoint in another output folder, changed; returns it."""
    target = Path(output) / checkpoint.name

    def act():
        shutil.copytree(checkpoint, target)
        change(target)

    rank0(act)
    return target


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()
    }


def checkpoints(folder):
    return {path.name for path in Path(folder).glob("*checkpoint-*")}


def whole(folder):
    """Names of the checkpoints that `verify_checkpoint` lets pass."""
    found = set()
    for path in Path(folder).glob("checkpoint-*"):
        try:
            verify_checkpoint(path)
        except CheckpointError:
            continue
        found.add(path.name)
    return found


def reseal(folder):
    """Digests that fit what is there now, as a thorough forger would."""
    manifest = json.loads((folder / "slowmo" / "manifest.json").read_text())
    seal(folder, {name: value for name, value in manifest.items() if name not in ("version", "files", "sha256")})


def flip(path, offset, bit=0):
    content = bytearray(path.read_bytes())
    content[offset] ^= 1 << bit
    path.write_bytes(content)


def _save(folder):
    """
    The runs that all tests below copy from. Their folder is moved afterwards: what a checkpoint recorded of its place
    is stale.
    """
    first = train(folder / "there" / "run")
    for name, config in {"plain": PLAIN, **GOSSIP}.items():
        train(folder / "there" / name, config, stop=MIDDLE, save_steps=MIDDLE)
    rank0(lambda: (folder / "there").rename(folder / "here"))
    return first


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder of the runs, and what each rank recorded of the main one."""
    folder = tmp_path_factory.mktemp("saved")
    return folder / "here", run_workers(_save, 2, folder)


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
        "version": ("worker_1.json has version 7", "reads 1"),
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
    return free["said"], momentum["said"], len(free["after"]), len(momentum["after"])


def test_free_settings_may_change_and_that_is_said(saved, tmp_path):
    for free, momentum, *steps in run_workers(_check_free_settings, 2, saved[0], tmp_path):
        timeouts = f"timeout_seconds {patience(30):.1f} -> 40.0"
        assert f"resumed with other settings: outer_momentum 0.5 -> 0.25, {timeouts}" in free
        assert "resumed with other settings: outer_momentum 0.0 -> 0.5" in momentum
        assert steps == [STEPS - MIDDLE] * 2


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
    back = train(folder / "ours", None, resume=True)  # a stock Trainer takes ours
    assert equal(back["start"], load_file(here / "run" / "checkpoint-5" / "model.safetensors"))
    assert len(back["after"]) == STEPS - MIDDLE

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


# ---- unfinished checkpoints and rotation ----


def _check_unfinished(here, folder, first):
    first = first[dist.get_rank()]
    copy(here / "run" / "checkpoint-5", folder, lambda t: (t / "slowmo" / "worker_0.pt.tmp").write_text("half"))
    copy(here / "run" / "checkpoint-7", folder, lambda t: (t / "slowmo" / "manifest.json").unlink())
    rank0(lambda: (folder / "incomplete-checkpoint-7").mkdir())  # of an earlier kill
    resumed = train(folder, resume=True, save_strategy="no")
    same_end(first, resumed, STEPS - MIDDLE)
    assert checkpoints(folder) == {"checkpoint-5", "incomplete-checkpoint-7"}
    assert (folder / "incomplete-checkpoint-7" / "slowmo" / "shared.json").exists()
    again = train(folder, resume=True)  # over the stale file
    same_end(first, again, STEPS - MIDDLE)
    dist.barrier()
    assert whole(folder) == {f"checkpoint-{step}" for step in range(5, STEPS + 1)}
    return resumed["said"]


def test_an_unfinished_checkpoint_is_set_aside(saved, tmp_path):
    first, _ = run_workers(_check_unfinished, 2, *(saved[0], tmp_path, saved[1]))
    assert any("checkpoint-7 was never finished: it is set aside as incomplete-checkpoint-7" in line for line in first)


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
                kept = {STEPS, run["best"]}
            assert checkpoints(output) == whole(output) == {f"checkpoint-{step}" for step in kept}
    return True


@pytest.mark.slow
def test_rotation_always_leaves_a_whole_checkpoint(tmp_path):
    run_workers(_check_rotation, 2, tmp_path)


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
