"""
The complete state of an outer loop at one optimizer step, for a checkpoint: what all workers share, and what each has
alone. Every part writes its own fields and checks them again; here stand those of the whole.

    shared  run, save, workers, processes, config, parameters              here
            processes_per_worker, place, sharded, of workers of several    here
            processes or shards; at_anchors                                here
            attempted_steps, rounds; parted                                Clock
            parameters_alone                                               StatusExchange
            averaged_buffers, averaged_buffer.NAME                         LocalTensors
            anchor.i, velocity.i (own with exact_average=False)            SlowState
            previous_inner_lrs, or the object outer_optimizer (likewise)   OuterUpdate
    own     run, save, workers, attempted_steps; the caller's objects      here
            local_steps, rates                                             Clock
            changed_buffers, remade_buffers, buffer.NAME;                  LocalTensors
            parameter.NAME, where workers differ
            the objects inner_optimizer, inner_optimizer_shards            InnerState
            bucket_elements, residual.i, shard_residual.i                  ErrorFeedback, with compression
            departed, departed.i                                           InFlight, TrainingOn, of a round in flight
            weight, in_flight, numerator.i, message.k.source.i             GossipBase, where workers differ

`run` stays when a run is resumed; `save` is of one save of one branch of it. The manifest and Trainer's state hold
both. An older checkpoint has no `save`. With `at_anchors` parameters are taken from anchors: the model's own file may
lack some, or have rounded them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from ..config import SlowMoConfig
from ..contents import CheckpointError, Contents, Saved, check_all, save_all
from ..log import logger
from ..training.inner_state import OBJECT, SHARDS
from ..training.outer_loop import OuterLoop
from .files import write_part
from .manifest import Digests, Stamps, seal
from .places import SHARED, part_name, read_for
from .together import Checked

# Settings that give the saved state its meaning; with another value it cannot be taken up. The others may change, and
# that is said.
_FIXED = (
    "base",
    "sync_every",
    "outer_optimizer",
    "exact_average",
    "inner_state",
    "model_buffers",
    "topology",
    "peers",
    "staleness",
    "overlap_steps",
)


def save_names(outer_loop: OuterLoop) -> dict[str, str]:
    """Which save a checkpoint is that is written now."""
    return {"run": outer_loop.run_id, "save": outer_loop.save_id}


def seal_snapshot(
    folder: Path, outer_loop: OuterLoop, known: Digests | None = None, before: Stamps | None = None
) -> None:
    """Write the manifest of what every process has written: once on every file system."""
    seal(folder, {**save_names(outer_loop), "step": outer_loop.attempted_steps}, known, before)


def write_snapshot(
    folder: str, outer_loop: OuterLoop, *, shared: bool, objects: dict[str, Any], within: str = ""
) -> None:
    """
    Write this process's part of a checkpoint; every process calls it at the same step. Nothing that may fail on one
    alone comes first: with `shard_slow_state` workers meet at its beginning, and bring the slow state together.

    Args:
        folder (`str`): The checkpoint's.
        outer_loop (`OuterLoop`): The average may be shown: the local weights are taken from where they are put by.
        shared (`bool`): Whether this process also writes its part of what all workers share.
        objects (`dict`): State dictionaries of each worker's own: scheduler, scaler.
        within (`str`, *optional*): Where among several optimizers' of a program: a folder's name and a slash.
    """
    workers, loop = outer_loop.workers, outer_loop
    loop.in_flight.settle()
    speaks_for_all = workers.place == 0 or workers.holds_shards
    parts = [*loop.saved_parts, loop.inner_state] if speaks_for_all else loop.cut_parts
    saved = save_all(parts, agree=loop.clock.workers_agree, keep=shared)
    header: dict[str, Any] = {**save_names(loop), "workers": workers.count}
    if workers.size > 1:
        header |= {"processes_per_worker": workers.size, "place": workers.place}
    if workers.size > 1 or workers.holds_shards:  # one process may hold the only shard
        header["sharded"] = workers.holds_shards
    if shared:
        if speaks_for_all:
            run = {"processes": workers.world.world_size, "config": loop.config.to_dict()}
            saved.shared.add(Contents({**run, "parameters": loop.tensors.fingerprint()}))
        else:
            saved.shared.add(Contents({"attempted_steps": loop.attempted_steps}))
        if loop.clock.workers_agree and loop.config.exact_average:
            saved.shared.add(Contents({"at_anchors": loop.parts.slow.are_parameters(saved.shared)}))  # of its part
        saved.shared.add(Contents(header))
        write_part(folder, within + part_name(SHARED, workers.place, workers.size), saved.shared)
    if speaks_for_all:
        saved.own.add(Contents(objects=objects))
    saved.own.add(Contents({**header, "attempted_steps": loop.attempted_steps}))
    write_part(folder, within + part_name(f"worker_{workers.index}", workers.place, workers.size), saved.own)


def check_snapshot(folder: str, outer_loop: OuterLoop, step: int | None = None, within: str = "") -> Checked:
    """
    Check a checkpoint's state, after `OuterLoop.start`. Every process calls it, and none takes it up before all have
    checked: their own files may be damaged on one alone. Nothing is sent.

    On another number of workers all start from the average, which is in the model already, with the shared anchors,
    velocity and clock; worker i takes the inner optimizer of worker i modulo the old number. Local weights, messages
    in flight and what compression has held back are dropped.

    Args:
        step (`int`, *optional*): Trainer's, which it must be of.
        within (`str`, *optional*): As `write_snapshot`.

    Raises:
        CheckpointError: The checkpoint is damaged or of another run, model or setting; nothing has been changed.
    """
    workers = outer_loop.workers
    shared = read_for(workers, folder, within + SHARED)
    _check(Path(folder), shared, outer_loop)
    run, then = shared.word("run"), shared.count("workers", least=1)
    own = read_for(workers, folder, f"{within}worker_{workers.index % then}")
    for key in ("run", "attempted_steps", "workers", "save"):
        if own.settings.get(key) != shared.settings.get(key):
            raise CheckpointError(
                f"{folder}: worker {workers.index}'s file has {key} {own.settings.get(key)!r}, the shared one has "
                f"{shared.settings.get(key)!r}: they are of different saves. Resume from another checkpoint."
            )
    if step is not None and shared.count("attempted_steps") != step:
        raise CheckpointError(f"{folder} is of step {shared.count('attempted_steps')}, Trainer's of step {step}.")
    for name, value in own.objects.items():  # what a program has registered may be of any kind
        if name.startswith(("scaler", "scheduler")) and not isinstance(value, dict):
            raise CheckpointError(
                f"{own.source}.pt: {name} is {type(value).__name__}, not a state dictionary. Resume from another "
                "checkpoint."
            )
    same_number = then == workers.count
    if not same_number:
        _say_another_number(folder, then, outer_loop)
    parts = [*outer_loop.saved_parts, outer_loop.inner_state]
    take_up_parts = check_all(parts, Saved(shared, own), same_number=same_number)
    at_anchors = shared.flag("at_anchors")

    @torch.no_grad()
    def take_up() -> dict[str, Any]:
        take_up_parts()
        if at_anchors:
            outer_loop.parts.slow.give_parameters_(shared)
        outer_loop.parts.hand_out_unchecked()
        outer_loop.parts.share_last_round()
        outer_loop.run_id = run
        if same_number:
            logger.info("resumed at step %d with every worker's own state", outer_loop.attempted_steps)
        return {name: value for name, value in own.objects.items() if name not in (OBJECT, SHARDS)}

    return Checked({key: shared.settings.get(key) for key in ("run", "save", "attempted_steps")}, take_up)


def _say_another_number(folder: str, then: int, outer_loop: OuterLoop) -> None:
    now = outer_loop.workers.count
    if not outer_loop.config.exact_average:
        raise CheckpointError(
            f"{folder} was saved by {then} workers with exact_average=False, where anchors and velocities are each "
            f"worker's own; this run has {now}. Start as many, or begin a new run from its model."
        )
    logger.warning(
        "resumed with %d workers in place of %d: all start from the average with the shared velocity; local weights "
        "and messages in flight are dropped, inner optimizer states are dealt out in turn",
        now,
        then,
    )


def _comparable(fingerprint: list[str], outer_loop: OuterLoop) -> list[str]:
    """
    Parameters; of frozen ones all but the dtype, which a first pass may cast (4-bit layers' biases); of buffers that
    all have alike the names, for shapes may have changed in training.
    """
    own = {f"buffer {name}" for name in outer_loop.tensors.others.own()}
    lines = [line.split(": ")[0] if line.startswith("buffer ") else line for line in fingerprint]
    frozen = re.compile(r"(frozen \d+: .*\]) \S+ frozen")
    return [frozen.sub(r"\1", line) for line in lines if line not in own]


def _check(folder: Path, shared: Contents, outer_loop: OuterLoop) -> None:
    # An older one lacks later settings.
    saved, now = (SlowMoConfig().to_dict() | shared.part("config").settings, outer_loop.config.to_dict())
    for name in _FIXED:
        if saved.get(name) != now[name]:
            raise CheckpointError(
                f"{name} is {now[name]!r}, but {folder} was saved with {saved.get(name)!r}, which gives its state its "
                f"meaning. Set {name}={saved.get(name)!r} to resume; or load its model and begin a new run."
            )
    if unknown := sorted(saved.keys() - now.keys()):
        raise CheckpointError(
            f"{shared.source}.json: config has settings that this slowmo_hf does not know ({', '.join(unknown)}): a "
            "newer release has written it. Install that one on every machine, or load its model and begin a new run."
        )
    changed = {
        name: (saved.get(name), value)
        for name, value in now.items()
        if name not in _FIXED and saved.get(name) != value
    }
    if changed:
        logger.info(
            "resumed with other settings: %s",
            ", ".join(f"{name} {old!r} -> {new!r}" for name, (old, new) in changed.items()),
        )
    problem = outer_loop.tensors.problem()
    if problem:
        raise CheckpointError(problem)
    saved_lines = shared.names("parameters")
    then, here = (_comparable(lines, outer_loop) for lines in (saved_lines, outer_loop.tensors.fingerprint()))
    if then != here:
        odd = [line for line in (*then, *here) if (line in then) != (line in here)]
        raise CheckpointError(
            f"{folder} is of another model or parameter set: {odd[:3] or 'another order'} differ. Train the same "
            "parameters to resume; or load its model and begin a new run."
        )
