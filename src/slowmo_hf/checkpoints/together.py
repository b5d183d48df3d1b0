"""
What all ranks do together about a checkpoint: who writes what, the first file and the last, and taking one up. What
fails on one rank is the same error on all.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..contents import CheckpointError
from ..log import of_this_rank
from ..training.outer_loop import OuterLoop
from ..wire.job import host_name, is_in_process, said_by_ranks
from .files import FOLDER, MANIFEST
from .manifest import Digests, Stamps, file_digests
from .places import part_name


@dataclass(frozen=True)
class Keeping:
    """
    What a process writes of what all workers share.

    Args:
        place (`int`): Among the processes that see the same files.
        mates (`tuple[int, ...]`): Their ranks, ascending.
        all_see (`bool`): Whether every process does: on one file system.
    """

    place: int
    mates: tuple[int, ...]
    all_see: bool

    @property
    def seals(self) -> bool:
        """The manifest, once on every file system."""
        return self.place == 0

    def shared_of(self, outer_loop: OuterLoop) -> bool:
        """Its part of the shared state of an optimizer, whose workers may be of another size than another's."""
        return self.place < outer_loop.workers.size


def keeps_files(outer_loop: OuterLoop, folder: Path, *, whole_on_each: bool) -> Keeping:
    """
    Who writes what into this folder: whose files each process sees is tried out. Collective.

    Args:
        whole_on_each (`bool`): Whether Trainer's or Accelerate's own files are whole on each file system; those of a
            model in shards lie in parts.

    Raises:
        CheckpointError: It cannot be written, is another for processes of one machine, or is on several disks where it
            must not be.
    """
    workers = outer_loop.workers
    world = workers.world
    tokens: list[Path] = [folder / name for name in world.gather_objects(f".{uuid.uuid4().hex}")]

    def leave_token() -> None:
        problem = outer_loop.tensors.problem()
        if problem:  # the slow state lies as the parameters did at the start
            raise CheckpointError(problem)
        folder.mkdir(parents=True, exist_ok=True)
        tokens[world.rank].touch()

    words = f"{folder} cannot be written"
    try:
        together(outer_loop, words, leave_token)
        mates = tuple(rank for rank, token in enumerate(tokens) if rank == world.rank or token.exists())
        all_see = all(len(seen) == world.world_size for seen in world.gather_objects(mates))
    finally:
        with suppress(OSError):
            tokens[world.rank].unlink()

    def refuse_several() -> None:
        local = 0 if is_in_process() else int(os.environ.get("LOCAL_RANK", 0))
        if world.rank - local not in mates:
            raise CheckpointError(
                f"all processes of a machine must have one folder, got {folder.resolve()}, which process "
                f"{world.rank - local} of this machine does not write to: a time of day in its name is another on "
                "every process. Choose it once, in the launch command or on rank 0 and broadcast."
            )

    def refuse_over_machines() -> None:
        if not whole_on_each and not all_see:
            raise CheckpointError(
                f"machines do not share {folder}, and the model is sharded: its parts would lie on several disks, and "
                "nobody could resume from them. Put the folder on a shared file system, or save nothing while it "
                "trains (Trainer: save_strategy='no')."
            )
        if world.rank - workers.place not in mates:
            raise CheckpointError(
                f"processes_per_worker must be at most a machine's processes where machines do not share {folder}, "
                f"got {workers.size}: worker {workers.index} spans machines, and its state would be on another one's "
                "disk than this process reads. Put the folder on a shared file system, or set "
                "processes_per_worker='node'."
            )

    together(outer_loop, words, refuse_several)
    together(outer_loop, words, refuse_over_machines)
    return Keeping(place=mates.index(world.rank), mates=mates, all_see=all_see)


def together(outer_loop: OuterLoop, words: str, act: Callable[[], None]) -> None:
    """
    Do it on every rank. Collective.

    Raises:
        CheckpointError: It failed on some; the same words on all, with ranks, hosts and reasons.
    """
    failure = ""
    try:
        act()
    except Exception as error:  # safetensors and torch.save raise their own; one rank alone must never leave
        failure = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    told = said_by_ranks(outer_loop.workers.world.gather_objects((host_name(), failure)))
    if told:
        raise CheckpointError(f"{words}. {told}")


@dataclass(frozen=True)
class Checked:
    """
    A checkpoint that this process can take up: a call does, in place, and returns the `objects` that `write_snapshot`
    was given. Collective among the processes of a worker.

    Args:
        save (`dict`): Which one it is: run, save and step.
    """

    save: dict[str, Any]
    take_up: Callable[[], dict[str, Any]]

    def __call__(self) -> dict[str, Any]:
        """Take it up."""
        return self.take_up()


def read_together(outer_loop: OuterLoop, words: str, check: Callable[[], Checked]) -> dict[str, Any]:
    """
    Take up a checkpoint once every rank has checked its part, and all have the same save: machines with disks of their
    own may have been left with different ones. Collective; raises as `together`, and then no rank has changed.

    Args:
        check (`Callable`): Returns what `check_snapshot` does.
    """
    checked: list[Checked] = []
    objects: dict[str, Any] = {}
    together(outer_loop, words, lambda: checked.append(check()))
    told = outer_loop.workers.world.gather_objects((checked[0].save, host_name()))
    if any(save != told[0][0] for save, _ in told):
        saves = said_by_ranks([(host, str(save)) for save, host in told])
        raise CheckpointError(
            f"{words}. All ranks must have the same save, got {saves}. Delete the later ones, and resume from the "
            "newest that all machines have (docs/checkpoints.md)."
        )
    together(outer_loop, words, lambda: objects.update(checked[0]()))
    return objects


def begin_together(
    outer_loop: OuterLoop, words: str, folder: Path, keeping: Keeping, claim: Callable[[], None]
) -> None:
    """
    Before the first file of ours: what an earlier save has left there would be sealed with this one's. Collective;
    raises as `together`.

    Args:
        claim (`Callable`): Called on who seals, first.
    """

    def begin() -> None:
        if keeping.seals:
            claim()
            shutil.rmtree(folder / FOLDER, ignore_errors=True)

    together(outer_loop, words, begin)


def finish_together(
    outer_loop: OuterLoop,
    folder: Path,
    keeping: Keeping,
    act: Callable[[Digests], None],
    before: Stamps | None = None,
) -> None:
    """
    Act on a checkpoint once the files of every rank are there. Collective; raises as `together`.

    Args:
        act (`Callable`): Is given the digests of files that processes which see them all have read between them.
        before (`dict`, *optional*): See `file_digests`.
    """
    world = outer_loop.workers.world
    world.gather_objects(None)
    words, own, names = f"checkpoint {folder} cannot be finished", Digests(), list[str]()

    def read() -> None:
        names.extend(_own_files(outer_loop, folder))
        own.update(file_digests(folder, keeping.place, len(keeping.mates), before))

    together(outer_loop, words, read)
    told = world.gather_objects((names, own))
    found, written = Digests(), dict[str, int]()
    for rank in keeping.mates:
        found |= told[rank][1]
        written |= dict.fromkeys(told[rank][0], rank)

    def act_on_all() -> None:
        if keeping.seals and (folder / FOLDER).is_dir():
            _refuse_missing(folder, written)
        act(found)

    together(outer_loop, words, act_on_all)


@contextmanager
def deleting_older_than(newest: Path) -> Iterator[None]:
    """What cannot be deleted is left: another program may delete, too, and the newest is whole."""
    try:
        yield
    except OSError as error:
        of_this_rank.warning("checkpoints older than %s cannot be deleted (%s)", newest, error)


def _own_files(outer_loop: OuterLoop, folder: Path) -> list[str]:
    """Of this process alone, as it sees them itself."""
    workers = outer_loop.workers
    own = part_name(f"worker_{workers.index}", workers.place, workers.size)
    with suppress(FileNotFoundError):  # another program takes the folder away: who keeps it sees that
        return [str(path.relative_to(folder)) for path in (folder / FOLDER).rglob(f"{own}.*")]
    return []


def _refuse_missing(folder: Path, written: dict[str, int]) -> None:
    """
    `CheckpointError` where a file is not here that another rank has written: whose files each sees was tried out when
    the run began, and a mount may have gone since then.
    """
    for name, rank in written.items():
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder / name} is missing here, and rank {rank} has written it: it no longer sees the same files. "
                "Mount the folder there again, and resume from an older checkpoint."
            )


def turn_at_reading(outer_loop: OuterLoop, folder: Path) -> tuple[int, int]:
    """
    Which of a checkpoint's files this process verifies: turn and turns, for `verify_in_turns`. Collective. Processes
    whose manifest is one file, by its number and times, deal all files out between them, on however many machines;
    machines with disks of their own read their own.
    """
    world = outer_loop.workers.world
    try:
        told = (folder / FOLDER / MANIFEST).stat()
        seen = (told.st_ino, told.st_ctime_ns, told.st_size)
    except OSError:
        seen = None  # `verify_in_turns` says so
    mates = [rank for rank, other in enumerate(world.gather_objects(seen)) if other == seen]
    return mates.index(world.rank), len(mates)
