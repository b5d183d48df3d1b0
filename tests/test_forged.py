"""
Forged checkpoints: of every kind of run each value in each file is taken away or made wrong in its turn. The error
names file and field, and nothing of the run that reads it has changed. Then the folder: digests, entries and links
that lead out of it, identities and records that are another save's. There are more than a thousand, none is taken, and
none ends in another error than `CheckpointError`.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from slowmo_hf import SlowMoConfig, SlowMoOptimizer, run_in_process
from slowmo_hf.checkpoints.files import read_part, write_part
from slowmo_hf.checkpoints.manifest import refuse_another_save, verify_checkpoint
from slowmo_hf.checkpoints.state import check_snapshot, save_names, seal_snapshot, write_snapshot
from slowmo_hf.checkpoints.together import read_together
from slowmo_hf.contents import CheckpointError, Contents

STEPS = 7
CASES = {  # inner optimizer, settings; saved after 7 steps, inside a round or while one is in flight
    "slow momentum": ("adamw", {"sync_every": 4, "model_buffers": "local"}),
    "DiLoCo": (
        "sgd",
        {
            "sync_every": 4,
            "outer_optimizer": "torch.optim.SGD",
            "outer_optimizer_kwargs": '{"momentum": 0.9, "nesterov": true}',
        },
    ),
    "int8": ("sgd", {"sync_every": 4, "compression": "int8"}),
    "overlapped": ("sgd", {"sync_every": 6, "overlap_steps": 3}),
    "sharded, overlapped": ("sgd", {"sync_every": 6, "overlap_steps": 3, "shard_slow_state": True}),
    "OSGP": ("sgd", {"base": "osgp", "sync_every": 5, "staleness": 2}),
    "SGP, no average": ("sgd", {"base": "sgp", "sync_every": 5, "exact_average": False}),
}
# What is told apart from its meaning: which save a file is of, and what a run says of itself in the log.
HEADER = ("version", "run", "save", "processes")


def train(inner, settings):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))
    kinds = {"sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), "adamw": lambda p: torch.optim.AdamW(p)}
    optimizer = SlowMoOptimizer(kinds[inner](model.parameters()), SlowMoConfig(**settings))
    for _ in range(STEPS):
        model(torch.randn(8, 3)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def wrong_tensors(value, may_be_infinite):
    yield "gone", None
    yield "of another rank", value[None]
    yield "longer", torch.cat([value.flatten(), value.flatten()[:1] if value.numel() else value.new_zeros(1)])
    yield "of another dtype", value.to(torch.float16 if value.dtype != torch.float16 else torch.float32)
    if value.is_floating_point() and not may_be_infinite:
        yield "NaN", torch.full_like(value, float("nan"))
        yield "infinite", torch.full_like(value, float("-inf"))


def wrong_settings(value):
    yield "gone", None
    yield "a word", "nonsense"
    yield "an object", {"a": 1}
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield "negative", -1
        yield "NaN", float("nan")
        yield "huge", 10**9
    if isinstance(value, list) and value:
        yield "a list of objects", [{}] * len(value)


def forgeries(contents):
    """(field, what is wrong, forged contents), one at a time."""
    for name, value in contents.tensors.items():
        for words, wrong in wrong_tensors(value, name.startswith(("buffer.", "averaged_buffer."))):
            tensors = {**contents.tensors, name: wrong}
            there = {key: tensor for key, tensor in tensors.items() if tensor is not None}
            yield name, words, Contents(contents.settings, there, contents.objects)
    for name, value in contents.settings.items():
        if name in HEADER:
            continue
        for words, wrong in wrong_settings(value):
            settings = copy.deepcopy(contents.settings)
            settings.pop(name) if wrong is None else settings.update({name: wrong})
            yield name, words, Contents(settings, contents.tensors, contents.objects)
        for inner, part in value.items() if isinstance(value, dict) and name != "config" else ():
            for words, wrong in wrong_settings(part):
                settings = copy.deepcopy(contents.settings)
                settings[name].pop(inner) if wrong is None else settings[name].update({inner: wrong})
                yield inner, words, Contents(settings, contents.tensors, contents.objects)
    for name, value in contents.objects.items():
        for words, wrong in (("gone", None), *wrong_objects(value)):
            objects = {key: state for key, state in contents.objects.items() if key != name}
            yield (
                name,
                words,
                Contents(contents.settings, contents.tensors, objects | ({name: wrong} if words != "gone" else {})),
            )


def wrong_objects(value):
    """An optimizer's state, wrong in its turn: no state, its groups, its parameters, each value of the first."""
    yield "empty", {}
    yield "a list", [value]
    yield "without a group", {**value, "param_groups": []}
    yield "with a list for states", {**value, "state": [value["state"]]}
    group = value["param_groups"][0]
    for words, numbers in (("twice", [0] * len(group["params"])), ("by name", [str(n) for n in group["params"]])):
        yield f"with parameters {words}", {**value, "param_groups": [{**group, "params": numbers}]}
    yield "without lr", {**value, "param_groups": [{key: own for key, own in group.items() if key != "lr"}]}
    for key, own in group.items():
        if isinstance(own, int | float) and not isinstance(own, bool):
            for wrong in ("nonsense", float("nan"), [own]):
                yield f"with {key} {wrong}", {**value, "param_groups": [{**group, key: wrong}]}
    yield "of a parameter more", {**value, "state": {**value["state"], 99: {}}}
    for number, states in value["state"].items():
        yield f"with a word for {number}", {**value, "state": {**value["state"], number: "nonsense"}}
        for key, own in states.items():
            if isinstance(own, torch.Tensor):
                for words, wrong in (("a word", "nonsense"), ("of another shape", own.new_zeros(7))):
                    yield (
                        f"with {number}.{key} {words}",
                        {**value, "state": {**value["state"], number: {**states, key: wrong}}},
                    )


# What may be missing or otherwise: an older file lacks it, or another run's value means something.
ALLOWED = {
    ("parameters_alone", "gone"),  # an older checkpoint has none
    ("rates", "gone"),  # likewise
    ("bucket_elements", "gone"),  # compression was off
    ("departed", "gone"),  # no round was in flight
    ("weight", "gone"),  # workers agreed
}


def state_of(model, optimizer):
    """Copies of all that a restore could change."""
    loop = optimizer.outer_loop
    slow = loop.parts.slow
    held = [
        *(item.flat for item in slow.anchors),
        *slow.update.velocities,
        *slow.reduction.saved(agree=False, keep=True).own.tensors.values(),
    ]
    inner = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    base = [*getattr(loop.base, "numerators", {}).values(), *getattr(loop.base, "departed", {}).values()]
    tensors = [*model.parameters(), *model.buffers(), *held, *inner, *base]
    clock = (loop.attempted_steps, loop.rounds, loop.clock.local_steps, len(loop.in_flight.rounds), loop.run_id)
    return [t.detach().clone() for t in tensors], clock


def try_all(folder, inner, settings, rank):
    """What every forgery was told, on rank 0 alone: nothing is sent. At the end the true checkpoint is taken up."""
    model, optimizer = train(inner, settings)
    write_snapshot(folder, optimizer.outer_loop, shared=rank == 0, objects={})
    optimizer.outer_loop.workers.world.gather_objects(None)
    before, told = state_of(model, optimizer), []
    for part in ("shared", "worker_0") if rank == 0 else ():
        true = read_part(folder, part)
        for field, wrong, forged in forgeries(true):
            write_part(folder, part, forged)
            if not forged.objects:
                Path(folder, "slowmo", f"{part}.pt").unlink(missing_ok=True)
            words = ""
            try:
                check_snapshot(folder, optimizer.outer_loop)()
            except CheckpointError as error:
                words = str(error)
                now = state_of(model, optimizer)
                assert now[1] == before[1], (field, wrong)
                assert all(torch.equal(a, b) for a, b in zip(now[0], before[0], strict=True)), (field, wrong)
            told.append((part, field, wrong, words))
            write_part(folder, part, true)
            if not words:  # it was taken up: the next one begins from the true state again
                check_snapshot(folder, optimizer.outer_loop)()
                before = state_of(model, optimizer)
    return told


@pytest.mark.parametrize("case", CASES)
def test_every_wrong_value_is_told_with_file_and_field(tmp_path, case, subtests):
    inner, settings = CASES[case]
    told, _ = run_in_process(lambda rank: try_all(str(tmp_path), inner, settings, rank), 2)
    assert len(told) > 140
    for part, field, wrong, words in told:
        with subtests.test(f"{part}: {field} {wrong}"):
            if (field, wrong) == ("config", "an object"):
                assert re.match(r"\w+ is .*, but .* was saved with", words)
                continue
            if (field, wrong) in ALLOWED:
                assert words == ""
                continue
            assert f"{tmp_path}/slowmo/{part}." in words or "they are of different saves" in words, words
            assert field in words, words


def test_a_file_that_is_wrong_on_one_rank_changes_none(tmp_path):
    """Worker 1's own: both are told, and train on as if nothing had been read."""

    def work(rank):
        model, optimizer = train("sgd", {"sync_every": 4})
        loop = optimizer.outer_loop
        write_snapshot(str(tmp_path), loop, shared=rank == 0, objects={})
        loop.workers.world.gather_objects(None)
        if rank == 1:
            true = read_part(tmp_path, "worker_1")
            write_part(
                tmp_path, "worker_1", Contents({**true.settings, "local_steps": -1}, true.tensors, true.objects)
            )
        with torch.no_grad():
            for param in model.parameters():  # what would be undone
                param.add_(1)
        before = state_of(model, optimizer)
        with pytest.raises(CheckpointError, match=r"rank 1 on .*worker_1\.json: local_steps must be a whole number"):
            read_together(loop, "it cannot be resumed", lambda: check_snapshot(str(tmp_path), loop))
        now = state_of(model, optimizer)
        assert now[1] == before[1]
        assert all(torch.equal(one, other) for one, other in zip(now[0], before[0], strict=True))

    run_in_process(work, 2)


# ---- the folder ----


class Folder:
    """A checkpoint as Trainer leaves it, with files of ours and another's; `spoiled` is a forged copy."""

    def __init__(self, place):
        self.place, self.true = place, place / "true"
        _, optimizer = train("adamw", {"sync_every": 4})
        write_snapshot(str(self.true), optimizer.outer_loop, shared=True, objects={})
        self.loop = optimizer.outer_loop
        torch.save(optimizer.inner_optimizer.state_dict(), self.true / "optimizer.pt")
        self.names = save_names(self.loop)
        self.write_state(self.true, self.state(self.names))
        seal_snapshot(self.true, self.loop)
        self.manifest = json.loads((self.true / "slowmo/manifest.json").read_text())
        self.outside = place / "outside"
        self.outside.mkdir()

    def state(self, record):
        args = {"config": SlowMoConfig(sync_every=4).to_dict()}
        callbacks = {"SlowMoCallback": {"args": args, "attributes": {"checkpoint": record}}}
        return {"global_step": STEPS, "stateful_callbacks": callbacks}

    def write_state(self, folder, state):
        (folder / "trainer_state.json").write_text(json.dumps(state))

    def spoiled(self):
        folder = self.place / "spoiled"
        shutil.rmtree(folder, ignore_errors=True)
        return Path(shutil.copytree(self.true, folder))

    def seal(self, folder, manifest):
        """A manifest of any content whose own digest fits."""
        manifest = {key: value for key, value in manifest.items() if key != "sha256"}
        digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
        (folder / "slowmo/manifest.json").write_text(json.dumps({**manifest, "sha256": digest}))

    def reseal(self, folder):
        """Digests that fit the files."""
        files = {
            name: {
                "bytes": (folder / name).stat().st_size,
                "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest(),
            }
            for name in self.manifest["files"]
            if (folder / name).is_file()
        }
        self.seal(folder, {**self.manifest, "files": files})


NO_VALUES = (None, True, -1, 10**30, float("nan"), "nonsense", "", [], [[]], {}, {"a": 1})


def forged_manifests(folder):
    """Every value of it another, with a digest of its own that fits."""
    for name in ("version", "run", "save", "step", "files"):
        for value in NO_VALUES:
            yield f"{name} {value}", {**folder.manifest, name: value}
        yield f"{name} gone", {key: value for key, value in folder.manifest.items() if key != name}
    for name, entry in folder.manifest["files"].items():
        others = {key: value for key, value in folder.manifest["files"].items() if key != name}
        for value in NO_VALUES:
            yield f"{name}: {value}", {**folder.manifest, "files": {**others, name: value}}
            for field in ("bytes", "sha256"):
                yield (
                    f"{name}.{field} {value}",
                    {**folder.manifest, "files": {**others, name: {**entry, field: value}}},
                )
        if name.startswith("slowmo/"):
            yield f"{name} not listed", {**folder.manifest, "files": others}


def forged_places(folder):
    """(what, act): files that lie outside, to which entries and links lead, with the digests of what is there."""
    for name, entry in folder.manifest["files"].items():
        others = {key: value for key, value in folder.manifest["files"].items() if key != name}
        outside = folder.outside / Path(name).name
        shutil.copy(folder.true / name, outside)
        entries = (f"../outside/{outside.name}", str(outside), f"slowmo/../../outside/{outside.name}", f"{name}\0")
        for wrong in entries:
            yield (
                f"{name} as {wrong}",
                lambda place, w=wrong, o=others, e=entry: folder.seal(
                    place, {**folder.manifest, "files": {**o, w: e}}
                ),
            )

        def link(place, target, name=name):
            (place / name).unlink()
            (place / name).symlink_to(target)

        links = (
            outside,
            f"../../outside/{outside.name}" if "/" in name else f"../outside/{outside.name}",
            Path(name).name,
        )
        for target in links:
            yield f"{name} -> {target}", lambda place, t=target, link=link: link(place, t)
        yield f"{name} is a folder", lambda place, name=name: ((place / name).unlink(), (place / name).mkdir())
        yield f"{name} is a pipe", lambda place, name=name: ((place / name).unlink(), os.mkfifo(place / name))

    def move(place):
        shutil.rmtree(folder.outside / "slowmo", ignore_errors=True)
        shutil.move(place / "slowmo", folder.outside / "slowmo")
        (place / "slowmo").symlink_to(folder.outside / "slowmo")

    yield "slowmo/ is a link", move
    yield "a part more", lambda place: shutil.copy(place / "slowmo/worker_0.pt", place / "slowmo/worker_1.pt")


def forged_identities(folder):
    """Records of Trainer's state, and names of parts, of no save or another; every digest fits."""
    run, save = folder.names["run"], folder.names["save"]
    wrong = [value for value in NO_VALUES if isinstance(value, str) or not isinstance(value, dict)] + [{"a": 1}, {}]
    records = [
        *wrong,
        *({"run": run, "save": value} for value in (*wrong, f"{run}-6", save[::-1], save + "0")),
        *({"run": value} for value in (*wrong, run)),
        {"run": run, "folder": str(folder.true)},  # as an older one, beside a manifest that has a save
        {"run": run[::-1], "folder": "."},
        {"save": save},
    ]
    for record in records:
        yield f"record {record}", lambda place, record=record: folder.write_state(place, folder.state(record))
    for value in wrong:
        states = [
            value,
            {"stateful_callbacks": value},
            {"stateful_callbacks": {"SlowMoCallback": value}},
            {"stateful_callbacks": {"SlowMoCallback": {"attributes": value}}},
        ]
        for state in states:
            yield f"state {state}", lambda place, state=state: folder.write_state(place, state)
    for name in ("shared", "worker_0"):
        for field in ("run", "save"):
            for value in (*wrong, "another"):

                def swap(place, name=name, field=field, value=value):
                    path = place / f"slowmo/{name}.json"
                    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))

                yield f"{name}.{field} {value}", swap


BYTES = {
    "nothing": b"",
    "zeros": bytes(64),
    "a list": b"[]",
    "a deep list": b"[" * 100_000,
    "no text": b"\xff\xfe\x00",
    "a huge header": b"\xff" * 8 + b"{}",
    "a call": b"cos\nsystem\n(S'true'\ntR.",
    "a pickle that ends": b"\x80\x02}q\x00",
}


def forged_files(folder):
    """Bytes that are no file of its kind; every digest fits."""
    for name in folder.manifest["files"]:
        if name.startswith("slowmo/") or name == "trainer_state.json":
            for words, content in BYTES.items():
                yield f"{name} {words}", lambda place, name=name, content=content: (place / name).write_bytes(content)


def refused(folder, place):
    """What a resume says, in the order of its checks; empty where it is taken."""
    try:
        try:
            state = place / "trainer_state.json"
            callbacks = json.loads(state.read_text())["stateful_callbacks"] if state.is_file() else None
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            callbacks = None  # Trainer itself cannot read it; from outside the checkpoint is verified all the same
        verify_checkpoint(place)
        refuse_another_save(place, callbacks)
        check_snapshot(str(place), folder.loop, STEPS)
    except CheckpointError as error:
        return str(error)
    return ""


def test_no_forged_folder_is_taken(tmp_path, subtests):
    folder = Folder(tmp_path)
    assert refused(folder, folder.true) == ""
    (folder.spoiled() / "notes.txt").write_text("a user's own file")
    assert refused(folder, tmp_path / "spoiled") == ""
    inside = folder.spoiled()  # a link that stays inside leads nowhere else
    (inside / "optimizer.pt").rename(inside / "slowmo-optimizer")
    (inside / "optimizer.pt").symlink_to("slowmo-optimizer")
    assert refused(folder, inside) == ""

    tried = 0
    for words, manifest in forged_manifests(folder):
        place, tried = folder.spoiled(), tried + 1
        folder.seal(place, manifest)
        with subtests.test(f"manifest: {words}"):
            assert refused(folder, place).startswith(str(tmp_path))
    for words, act in forged_places(folder):
        place, tried = folder.spoiled(), tried + 1
        act(place)
        with subtests.test(f"place: {words}"):
            assert re.search("leads out of|is missing|is not in the manifest", refused(folder, place))
    for words, act in (*forged_identities(folder), *forged_files(folder)):
        place, tried = folder.spoiled(), tried + 1
        act(place)
        folder.reseal(place)
        with subtests.test(words):
            assert refused(folder, place).startswith(str(tmp_path)), words
    assert tried > 500
