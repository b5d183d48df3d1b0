"""
Forged checkpoints: of every kind of run each value in each file is taken away or made wrong in its turn. The error
names file and field, and nothing of the run that reads it has changed.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch

from slowmo_hf import SlowMoConfig, SlowMoOptimizer, run_in_process
from slowmo_hf.checkpoints.files import read_part, write_part
from slowmo_hf.checkpoints.state import check_snapshot, read_together, write_snapshot
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
HEADER = ("version", "run", "processes")


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
        for words, wrong in (("gone", None), ("empty", {}), ("without a group", {**value, "param_groups": []})):
            objects = {key: state for key, state in contents.objects.items() if key != name}
            yield (
                name,
                words,
                Contents(contents.settings, contents.tensors, objects | ({name: wrong} if words != "gone" else {})),
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
    assert len(told) > 60
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
