"""
The files of a worker of several processes: each writes what it speaks for.

    shared_shard_1, worker_0_shard_1    of the process at place 1
    shared_shard_0, worker_0_shard_0    and, where every process has the whole model, what is equal in a worker

A worker of one process has `shared` and `worker_0`.
"""

from __future__ import annotations

from pathlib import Path

import torch

from ..contents import CheckpointError, Contents
from ..wire.workers import Workers
from .files import FOLDER, read_part

SHARED = "shared"


def part_name(name: str, place: int, places: int) -> str:
    """A file's, without its ending."""
    return name if places == 1 else f"{name}_shard_{place}"


def read_for(workers: Workers, folder: str, name: str) -> Contents:
    """
    What a process needs of one file of a worker, or of the files of its processes.

    Args:
        workers (`Workers`): This process's.
        name (`str`): The file's, without place and ending.

    Raises:
        CheckpointError: A file is missing or damaged, or processes of another kind or number have written them.
    """
    if not (Path(folder) / FOLDER / f"{name}_shard_0.json").exists():
        return _of_this_kind(workers, read_part(folder, name), places=1)
    first = _at(folder, name, 0, settings_alone=workers.holds_shards and workers.place > 0)
    places = first.count("processes_per_worker", least=1)
    _of_this_kind(workers, first, places=places)
    if workers.place and places == workers.size:
        own = _of_its_save(first, _at(folder, name, workers.place))
        return own if workers.holds_shards else _completed(first, own)
    if places == workers.size:
        return first
    return _joined(first, [_of_its_save(first, _at(folder, name, place)) for place in range(1, places)])


def _at(folder: str, name: str, place: int, *, settings_alone: bool = False) -> Contents:
    contents = read_part(folder, f"{name}_shard_{place}", settings_alone=settings_alone)
    if contents.count("place") != place:
        contents.refuse("place", f"is {contents.settings['place']}, not {place}")
    return contents


def _of_this_kind(workers: Workers, contents: Contents, *, places: int) -> Contents:
    if "outer_optimizer" in contents.objects and places != workers.size:
        raise CheckpointError(
            f"{contents.source}.pt: the state of the outer optimizer is of {places} processes per worker, this run "
            f"has {workers.size}: it cannot be cut anew. Set processes_per_worker={places}, or load its model and "
            "begin a new run."
        )
    was_sharded = contents.flag("sharded")
    here = f"{workers.size} {'shards' if workers.holds_shards else 'whole models'}"
    there = f"{places} {'shards' if was_sharded else 'whole models'}"
    if was_sharded != workers.holds_shards or (was_sharded and places != workers.size):
        raise CheckpointError(
            f"{contents.source}.json is of workers whose processes hold {there}; here they hold {here}. Resume with "
            "the same dp_shard_size, or load its model and begin a new run."
        )
    return contents


def _of_its_save(first: Contents, other: Contents) -> Contents:
    for key in ("run", "save", "attempted_steps", "workers", "processes_per_worker", "sharded"):
        if other.settings.get(key) != first.settings.get(key):
            raise CheckpointError(
                f"{other.source}.json has {key} {other.settings.get(key)!r}, {Path(first.source).name}.json "
                f"{first.settings.get(key)!r}: they are of different saves. Resume from another checkpoint."
            )
    return other


def _completed(first: Contents, own: Contents) -> Contents:
    """What is equal in a worker, and a process's own part."""
    settings, tensors, objects = ({**ours, **its} for ours, its in zip(first.tables, own.tables, strict=True))
    return Contents(settings, tensors, objects, own.source)


def _joined(first: Contents, others: list[Contents]) -> Contents:
    """With what all processes of a worker had, of whom there were other numbers: whole layouts."""
    tensors = dict(first.tensors)
    for name in others[0].tensors:
        parts = [contents.tensors.get(name) for contents in (first, *others)]
        if any(part is None or part.dim() != 1 or part.dtype != parts[0].dtype for part in parts):  # type: ignore[union-attr]
            raise CheckpointError(
                f"{others[0].source}.safetensors: {name} does not fit the files of its worker's other processes. "
                "Resume from another checkpoint."
            )
        tensors[name] = torch.cat(parts)  # type: ignore[arg-type]
    at_anchors = all(contents.flag("at_anchors") for contents in (first, *others))
    return Contents({**first.settings, "at_anchors": at_anchors}, tensors, first.objects, first.source)
