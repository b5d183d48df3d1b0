"""
What all ranks do together about a checkpoint: who writes what, the first file and the last, and taking one up. What
fails on one rank is the same error on all.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..contents import CheckpointError
from ..training.outer_loop import OuterLoop
from ..wire.job import host_name, place_on_machine
from .files import FOLDER, Digests, Stamps, file_digests


@dataclass(frozen=True)
class Keeping:
    """
    What a process writes of what all workers share.

    Args:
        place (`int`): Among the processes that see the same files.
        sees_rank_0s (`bool`): Files of rank 0, and so those of all that see them too.
        all_see (`bool`): Whether every process does: on one file system.
    """

    place: int
    sees_rank_0s: bool
    all_see: bool

    @property
    def seals(self) -> bool:
        """The manifest, once on every file system: rank 0, and the first of a machine that does not see its files."""
        return self.place == 0

    def shared_of(self, outer_loop: OuterLoop) -> bool:
        """Its part of the shared state of an optimizer, whose workers may be of another size than another's."""
        return self.place < outer_loop.workers.size


def keeps_files(outer_loop: OuterLoop, folder: Path, local_rank: int) -> Keeping:
    """
    Who writes what into this folder. Collective.

    Raises:
        CheckpointError: It cannot be written, or a worker spans machines that do not share it.
    """
    workers = outer_loop.workers
    world = workers.world
    token = folder / f".{outer_loop.run_id}"

    def leave_token() -> None:
        problem = outer_loop.tensors.problem()
        if problem:  # the slow state lies as the parameters did at the start
            raise CheckpointError(problem)
        folder.mkdir(parents=True, exist_ok=True)
        if world.rank == 0:
            token.touch()

    together(outer_loop, f"{folder} cannot be written", leave_token)
    sees_it = token.exists()
    all_see = all(world.gather_objects(sees_it))
    if world.rank == 0:
        token.unlink()
    first = world.rank if sees_it else local_rank

    def refuse_over_machines() -> None:
        if first == 0 and workers.place:
            raise CheckpointError(
                f"processes_per_worker must be at most a machine's processes where machines do not share {folder}, "
                f"got {workers.size}: worker {workers.index} spans machines, and its state would be on another one's "
                "disk than this process reads. Put the folder on a shared file system, or set "
                "processes_per_worker='node'."
            )

    together(outer_loop, f"{folder} cannot be written", refuse_over_machines)
    return Keeping(place=first, sees_rank_0s=sees_it, all_see=all_see)


def together(outer_loop: OuterLoop, words: str, act: Callable[[], None]) -> None:
    """
    Do it on every rank. Collective.

    Raises:
        CheckpointError: It failed on some; the same words on all, with rank, host and reason.
    """
    failure = ""
    try:
        act()
    except Exception as error:  # safetensors and torch.save raise their own; one rank alone must never leave
        failure = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    failures = outer_loop.workers.world.gather_objects((host_name(), failure))
    told = [f"rank {rank} on {host}: {failure}" for rank, (host, failure) in enumerate(failures) if failure]
    if told:
        raise CheckpointError(f"{words}. {'; '.join(told)}")


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
        saves = "; ".join(f"rank {rank} on {host}: {save}" for rank, (save, host) in enumerate(told))
        raise CheckpointError(
            f"{words}. All ranks must have the same save, got {saves}. Delete the later ones, or copy one checkpoint "
            "to all machines, and resume from it."
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
    words, own, found = f"checkpoint {folder} cannot be finished", Digests(), Digests()

    def read() -> None:
        if keeping.sees_rank_0s:
            own.update(file_digests(folder, world.rank, world.world_size, before))

    together(outer_loop, words, read)
    for digests in world.gather_objects(own):
        found |= digests if keeping.sees_rank_0s else {}
    together(outer_loop, words, lambda: act(found))


def turn_on_machine(outer_loop: OuterLoop) -> tuple[int, int]:
    """
    Which of a checkpoint's files this process verifies: turn and turns, for `verify_in_turns`. Collective. Where the
    launchers' words do not fit each other (a card per task, each with LOCAL_RANK=0) every process reads all.
    """
    world = outer_loop.workers.world
    told = world.gather_objects(place_on_machine())
    size = told[0][1]
    fits = size > 0 and told == [(rank % size, size) for rank in range(len(told))] and len(told) % size == 0
    return told[world.rank] if fits else (0, 1)
