"""
A checkpoint is of one save: branches, renamed callbacks, mixed folders, half a folder, a second program beside the
run, folders that cannot be written, and settings that a file names.
"""

import errno
import fcntl
import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from slowmo_hf import SlowMoCallback, SlowMoConfig, verify_checkpoint
from slowmo_hf.checkpoints.claim import is_claimed
from slowmo_hf.checkpoints.manifest import is_whole, seal
from slowmo_hf.contents import CheckpointError
from tiny import Heard, arguments, values

STEPS = 10


class Gate(nn.Module):
    """A gated layer; `spare` never has a gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.up, self.gate, self.spare = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(2, 2)
        self.down = nn.Linear(4, 2, bias=False)

    def forward(self, x, labels):
        return {"loss": nn.functional.mse_loss(self.down(self.up(x) * self.gate(x).sigmoid()), labels)}


def rows():
    generator = torch.Generator().manual_seed(2)
    return [
        {"x": torch.randn(6, generator=generator), "labels": torch.randn(2, generator=generator)} for _ in range(40)
    ]


def make(folder, callback=None, before=(), after=(), model=None, **settings):
    """A Trainer of 10 steps that saves at 4, 8 and its end; the callback is AdamW's with a round every 3 steps."""
    defaults = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 4, "learning_rate": 0.05, "seed": 3}
    callback = callback or SlowMoCallback(SlowMoConfig(sync_every=3, outer_momentum=0.4))
    return Trainer(
        model or Gate(),
        arguments(folder, **{**defaults, **settings}),
        train_dataset=rows(),
        callbacks=[*before, callback, *after],
    )


def train(folder, *arguments_of_make, resume=None, **settings):
    trainer = make(folder, *arguments_of_make, **settings)
    trainer.train(resume_from_checkpoint=str(resume) if isinstance(resume, Path) else resume)
    return values(trainer.model)


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def reseal(checkpoint, **changes):
    manifest = json.loads((checkpoint / "slowmo/manifest.json").read_text())
    kept = {name: value for name, value in manifest.items() if name not in ("version", "files", "sha256")} | changes
    seal(checkpoint, {name: value for name, value in kept.items() if value is not None})


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with its saves at 4 and 8, and how it ended."""
    folder = tmp_path_factory.mktemp("run")
    end = train(folder)
    shutil.rmtree(folder / "checkpoint-10")
    return folder, end


@pytest.fixture
def copied(run, tmp_path):
    """A copy of it that a test may spoil."""
    shutil.copytree(run[0], tmp_path / "run")
    return tmp_path / "run", run[1]


# ---- branches, records, mixtures ----


def test_a_copy_of_another_branch_goes_on_as_that_branch(copied, tmp_path):
    """Step 8 of a first branch is copied away; a second one from step 4, of the same run, takes its place."""
    folder, end = copied
    away = shutil.copytree(folder / "checkpoint-8", tmp_path / "away" / "checkpoint-8")
    other = SlowMoCallback(SlowMoConfig(sync_every=3, outer_momentum=0.9))
    second = train(folder, other, resume=folder / "checkpoint-4", learning_rate=0.2)
    assert not same(second, end)
    first, now = (
        json.loads((place / "slowmo/manifest.json").read_text()) for place in (away, folder / "checkpoint-8")
    )
    assert first["run"] == now["run"]
    assert first["save"] != now["save"]
    assert same(train(folder, resume=away), end)


@pytest.mark.parametrize(
    "names", [["slowmo"], ["trainer_state.json"], ["slowmo/shared.json", "slowmo/shared.safetensors"]]
)
def test_files_of_two_branches_are_refused(copied, tmp_path, names):
    """With digests that fit, as a sync tool would leave them that makes the manifest anew."""
    folder, _ = copied
    away = shutil.copytree(folder / "checkpoint-8", tmp_path / "checkpoint-8")
    train(folder, resume=folder / "checkpoint-4")
    for name in names:
        source, target = folder / "checkpoint-8" / name, away / name
        if source.is_dir():
            shutil.rmtree(target)
            shutil.copytree(source, target)
        else:
            shutil.copy(source, target)
    reseal(away)
    with pytest.raises(CheckpointError, match="they are of different saves"):
        verify_checkpoint(away)
    with pytest.raises(CheckpointError, match="they are of different saves"):
        train(tmp_path / "new", resume=away)


class Mine(SlowMoCallback):
    """As a project has it."""


class Renamed(SlowMoCallback):
    """Its later name."""


def test_a_renamed_callback_goes_on_with_every_workers_state(tmp_path):
    config = SlowMoConfig(sync_every=3, base="sgp", exact_average=False)
    end = train(tmp_path, Mine(config))
    assert "Mine" in json.loads((tmp_path / "checkpoint-4/trainer_state.json").read_text())["stateful_callbacks"]
    assert same(train(tmp_path, Renamed(config), resume=tmp_path / "checkpoint-4"), end)
    assert same(train(tmp_path, Mine(config), resume=tmp_path / "checkpoint-8"), end)  # written by the other name


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize(
    "record", ["gone", None, {"run": None}, {"run": "r"}, {"run": "r", "save": "s"}, {"run": 5, "save": []}, [[]]]
)
def test_a_record_that_is_gone_or_of_another_save_is_refused(copied, record, sealed):
    folder, _ = copied
    checkpoint = folder / "checkpoint-4"

    def change(state):
        if record == "gone":
            del state["stateful_callbacks"]["SlowMoCallback"]
        else:
            state["stateful_callbacks"]["SlowMoCallback"]["attributes"]["checkpoint"] = record

    edit(checkpoint / "trainer_state.json", change)
    if sealed:
        reseal(checkpoint)
    with pytest.raises(CheckpointError, match=r"trainer_state\.json is of save .* different saves"):
        train(folder, resume=checkpoint)


def test_our_part_that_is_gone_is_refused_by_name(copied):
    folder, _ = copied
    shutil.rmtree(folder / "checkpoint-8/slowmo")
    assert is_whole(folder / "checkpoint-8"), "it is not for us to rename it"
    said = r"the part of local training is not in .*checkpoint-8\. Resume from another .* put its folder slowmo there"
    with pytest.raises(CheckpointError, match=said):
        train(folder, resume=True)


def test_a_checkpoint_from_before_saves_had_a_name_goes_on(copied):
    """Its manifest and parts have a run alone, and Trainer's state the run and a folder that is gone."""
    folder, end = copied
    checkpoint = folder / "checkpoint-8"
    for path in (checkpoint / "slowmo").glob("*.json"):
        if path.name != "manifest.json":
            edit(path, lambda part: part.pop("save"))

    def change(state):
        record = state["stateful_callbacks"]["SlowMoCallback"]["attributes"]["checkpoint"]
        record["folder"] = "/no/such/folder"
        del record["save"]

    edit(checkpoint / "trainer_state.json", change)
    reseal(checkpoint, save=None)
    assert same(train(folder, resume=checkpoint), end)


class SaveAt(TrainerCallback):
    """Asks for a save after SlowMoCallback has looked."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save |= state.global_step == 6


def test_a_save_that_a_later_callback_asks_for_is_recorded_as_itself(tmp_path):
    """At a round's end, where that is allowed: before it was recorded as the save before it."""
    end = train(tmp_path, after=[SaveAt()])
    verify_checkpoint(tmp_path / "checkpoint-6")
    assert same(train(tmp_path, resume=tmp_path / "checkpoint-6"), end)


# ---- half a folder ----


def empty(folder):
    folder.mkdir()


def locked(folder):
    """Killed before `slowmo/` is made; the lock went with the process, its file did not."""
    folder.mkdir()
    (folder / ".slowmo-saving").touch()


def without_state(folder):
    """Killed in Trainer's own files, before ours (save_strategy="best")."""
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"half")


def half_a_state(folder):
    without_state(folder)
    (folder / "trainer_state.json").write_text('{"global_step": 9, "log_h')


def half_of_ours(folder):
    half_a_state(folder)
    (folder / "slowmo").mkdir()


@pytest.mark.parametrize("left", [empty, locked, without_state, half_a_state, half_of_ours])
def test_what_a_kill_leaves_stops_no_restart(copied, left):
    folder, end = copied
    left(folder / "checkpoint-9")
    shutil.copytree(folder / "checkpoint-9", folder / "checkpoint-12")
    without_state(folder / "checkpoint-2")  # below a whole one: somebody's own
    assert not is_whole(folder / "checkpoint-9")
    with Heard() as heard:
        assert same(train(folder, resume=True), end)
    assert len(heard.about("was never finished", "WARNING")) == 2
    names = {path.name for path in folder.iterdir()}
    wholes = {f"checkpoint-{step}" for step in (4, 8, 10)}
    assert names == {"checkpoint-2", *wholes, "_incomplete-checkpoint-9", "_incomplete-checkpoint-12"}


def test_a_process_that_is_killed_before_its_first_file(tmp_path):
    """A program of its own, killed by the kernel as it makes `checkpoint-8/slowmo`, and started again."""
    program = f"""
        import os, signal, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import test_one_save as here
        def look(event, given):
            path = str(given[0]) if event == "os.mkdir" else ""
            if path.endswith("checkpoint-8/slowmo") and os.path.isdir(os.path.dirname(path)):
                os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(look)
        here.train({str(tmp_path)!r})
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, timeout=120)
    assert done.returncode == -9, done.stderr.decode()[-2000:]
    assert not any((tmp_path / "checkpoint-8").glob("slowmo"))
    assert same(train(tmp_path, resume=True), train(tmp_path / "never killed"))
    assert (tmp_path / "_incomplete-checkpoint-8").is_dir()
    verify_checkpoint(tmp_path / "checkpoint-8")


# ---- a second program on the same folder ----

SECOND = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_one_save as here
here.make(sys.argv[1])
"""


class Meanwhile(TrainerCallback, ExportableState):
    """Does something where Trainer asks for its state: between our files and the end of the save at step 8."""

    def __init__(self, act, step=8):
        self.act, self.step, self.now, self.folder = act, step, 0, None

    def on_step_end(self, args, state, control, **kwargs):
        self.now, self.folder = state.global_step, Path(args.output_dir)

    def state(self):
        if self.now == self.step:
            self.act(self.folder)
        return {"args": {}, "attributes": {}}


def test_a_second_program_leaves_a_save_under_way_alone(run, tmp_path):
    said = []

    def second(folder):
        done = subprocess.run([sys.executable, "-c", SECOND, folder], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        said.append(done.stdout + done.stderr)

    assert same(train(tmp_path, before=[Meanwhile(second), Meanwhile(make)]), run[1])
    assert "checkpoint-8 is left alone: another program is writing it" in said[0]
    assert {path.name for path in tmp_path.iterdir()} == {f"checkpoint-{step}" for step in (4, 8, 10)}
    verify_checkpoint(tmp_path / "checkpoint-8")
    assert not (tmp_path / "checkpoint-8/.slowmo-saving").exists()


def test_without_locks_a_save_may_be_lost_and_training_goes_on(run, tmp_path, monkeypatch):
    """The second program sets the folder aside; the run says so, and its next save is whole."""

    def no_locks(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    own = Trainer._save_checkpoint

    def save_and_lose(trainer, *given):
        own(trainer, *given)
        if trainer.state.global_step == 8:
            make(tmp_path)

    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr(Trainer, "_save_checkpoint", save_and_lose)
    with Heard() as heard:
        end = train(tmp_path, save_steps=8)
    assert same(end, run[1])
    assert heard.about("checkpoint-8 was taken away by another program while it was being written", "WARNING")
    assert {path.name for path in tmp_path.iterdir()} == {"_incomplete-checkpoint-8", "checkpoint-10"}
    verify_checkpoint(tmp_path / "checkpoint-10")


def fail(folder):
    raise KeyError("a user's mistake")


def test_a_save_that_failed_is_no_longer_claimed_when_its_trainer_trains_again(tmp_path):
    """In one process, as in a notebook."""
    trainer = make(tmp_path, before=[Meanwhile(fail, step=4)])
    with pytest.raises(KeyError):
        trainer.train()
    assert not is_claimed(tmp_path / "checkpoint-4")
    trainer.remove_callback(Meanwhile)
    with pytest.raises(ValueError, match="No valid checkpoint"):  # the half one is set aside; stock Trainer's words
        trainer.train(resume_from_checkpoint=True)
    assert {path.name for path in tmp_path.iterdir()} == {"_incomplete-checkpoint-4"}
    trainer.train()
    verify_checkpoint(tmp_path / "checkpoint-4")


# ---- a folder that cannot be written ----


def spoiled(folder, **settings):
    """A Trainer whose output folder has become a file: root too can write nothing there."""
    trainer = make(folder, **settings)
    shutil.rmtree(folder, ignore_errors=True)
    folder.write_text("no folder")
    return trainer


def test_a_run_that_saves_nothing_needs_no_folder(run, tmp_path):
    trainer = spoiled(tmp_path / "out", save_strategy="no")
    trainer.train()
    assert same(values(trainer.model), run[1])


def test_a_save_into_a_folder_that_cannot_be_written_is_told(tmp_path):
    """At the start where saves are planned; at the save where a callback asks for one."""
    for name, settings in {"planned": {}, "asked": {"save_strategy": "no", "before": [SaveAt()]}}.items():
        with pytest.raises(CheckpointError, match=f"{name} cannot be written. rank 0 on .*Error"):
            spoiled(tmp_path / name, **settings).train()


def test_a_save_that_a_callback_asks_for_is_whole_without_a_strategy(run, tmp_path):
    assert same(train(tmp_path, before=[SaveAt()], save_strategy="no"), run[1])
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-6"]
    assert same(train(tmp_path, resume=True, save_strategy="no"), run[1])


def test_a_folder_that_cannot_be_renamed_is_left_and_said(copied, monkeypatch):
    folder, _ = copied
    empty(folder / "checkpoint-9")

    def refuse(path, target):
        raise PermissionError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "rename", refuse)
    with Heard() as heard:
        make(folder)
    assert heard.about("checkpoint-9 was never finished, and cannot be set aside", "WARNING")


# ---- what a save leaves ----


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "rmsprop"])
@pytest.mark.parametrize("config", [{}, {"inner_state": "reset"}, {"inner_state": "average"}, {"base": "osgp"}])
def test_a_save_leaves_the_optimizers_state_as_it_was(tmp_path, optim, config):
    """Parameters without a gradient have none, and after a reset at step 4 nobody has; plain SGD never."""
    found = {}

    class Look(TrainerCallback):
        def __init__(self, place):
            self.place = place

        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            inner = optimizer.optimizer
            found[self.place, state.global_step] = {id(p): sorted(inner.state[p]) for p in list(inner.state)}

        on_save = on_step_end

    settings = SlowMoConfig(**{"sync_every": 4, **config})
    train(tmp_path, SlowMoCallback(settings), before=[Look("before")], after=[Look("after")], optim=optim)
    assert {step for _, step in found} == {*range(1, STEPS + 1)}
    for step in range(1, STEPS + 1):
        assert found["before", step] == found["after", step]
        assert len(found["after", step]) <= 5, "the spare layer has none"


# ---- settings that a file names ----

HOSTILE = "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\nfrom torch.optim import SGD as Chosen\n"


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    """A module that nobody has imported; whether it has run."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "chosen_by_a_file.py").write_text(HOSTILE)
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    return (tmp_path / "code" / "ran").exists


@pytest.mark.parametrize(
    "named",
    ["chosen_by_a_file.Chosen", "torch.optim.lr_scheduler.StepLR", "torch.hub.load", "os.system", 5, ["a"], None],
)
def test_nothing_is_imported_because_a_checkpoint_names_it(copied, hostile, named):
    folder, _ = copied
    checkpoint = folder / "checkpoint-4"
    edit(
        checkpoint / "trainer_state.json",
        lambda state: state["stateful_callbacks"]["SlowMoCallback"]["args"]["config"].update(outer_optimizer=named),
    )
    before = set(sys.modules)
    with pytest.raises(ValueError, match="nothing is imported because a file names it"):
        train(folder, resume=checkpoint, restore_callback_states_from_checkpoint=True)
    assert not hostile()
    assert "chosen_by_a_file" not in set(sys.modules) - before


@pytest.mark.parametrize("config", [5, "sgp", [], {"sync_every": {}}, {"base": []}, {"no": 1}, {"outer_lr": "1"}])
def test_settings_of_another_kind_are_refused_by_name(copied, config):
    folder, _ = copied
    checkpoint = folder / "checkpoint-4"
    edit(
        checkpoint / "trainer_state.json",
        lambda state: state["stateful_callbacks"]["SlowMoCallback"]["args"].update(config=config),
    )
    with pytest.raises(ValueError, match=r"must be|unknown settings"):
        train(folder, resume=checkpoint, restore_callback_states_from_checkpoint=True)


def test_a_programs_own_outer_optimizer_is_restored(tmp_path, hostile):
    """Its class, and one of torch's, which no program has to name."""
    own = SlowMoConfig(
        sync_every=3, outer_optimizer="chosen_by_a_file.Chosen", outer_optimizer_kwargs={"momentum": 0.5}
    )
    assert hostile(), "the program asked for it"
    end = train(tmp_path / "own", SlowMoCallback(own))
    restore = {"restore_callback_states_from_checkpoint": True}
    assert same(train(tmp_path / "own", SlowMoCallback(own), resume=True, **restore), end)
    torchs = SlowMoConfig.diloco(sync_every=3)
    end = train(tmp_path / "torch", SlowMoCallback(torchs))
    assert same(train(tmp_path / "torch", SlowMoCallback(), resume=True, **restore), end)
    torchs = SlowMoConfig.from_dict({"outer_optimizer": "torch.optim.Adagrad"})
    assert torchs.outer_optimizer_class() is torch.optim.Adagrad
