"""
Many workers in one process: the part of torch.distributed's interface that `communicator` uses, between threads that
take turns.
"""

from __future__ import annotations

import copy
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, TypeVar

import torch

from ..random_state import RandomState

T = TypeVar("T")
Item = TypeVar("Item")
BACKEND = "in_process"
_here = threading.local()


def run_in_process(work: Callable[[int], T], workers: int) -> list[T]:
    """
    Call `work(rank)` for every worker of a job that lives in this process: for many small workers on one machine.

        def work(rank):
            model, optimizer = ..., SlowMoOptimizer(..., SlowMoConfig(base="sgp"))
            ...  # a plain training loop; consensus and last_round work too

        results = slowmo_hf.run_in_process(work, workers=16)

    Inside, the package sees a job of `workers` processes and runs as it always does; only the wire is another. Workers
    are threads of which one runs at a time, until it has to wait for another, in a fixed order: runs repeat bit for
    bit. Each has random generators (Python, numpy, torch) of its own, which start where the caller's are; the caller's
    are left as they were. With `base="all_reduce"` `step` averages the gradients, where DDP does so in the backward
    pass: what a loop does between the two, such as clipping, sees this worker's own.

    Args:
        work (`Callable`): Called with each rank, from 0 on.
        workers (`int`): How many, at least 1.

    Returns:
        `list`: What each worker returned, by rank.

    Raises:
        ValueError: `workers` is below 1.
        RuntimeError: A worker failed (its error is the cause, and if a ValueError, this is one too), or all wait; or
            one of its own workers has called it.
    """
    if workers < 1:
        raise ValueError(f"workers must be >= 1, got {workers}.")
    if current() is not None:
        raise RuntimeError("run_in_process was called by one of its own workers: run one job after the other.")
    return World(workers).run(work)


def together(call: Callable[[list[Item]], Sequence[T]], item: Item) -> T:
    """
    In a worker of `run_in_process`: wait for all, call once for all, and return this worker's entry of the result.

        loss = slowmo_hf.together(losses_of_all, batch)  # losses_of_all([batch of worker 0, of worker 1, ...])

    One batched pass takes the place of one per worker; every worker calls it, equally often. Nothing is copied.

    Args:
        call (`Callable`): Takes the items of all workers and returns an entry for each, by rank. The one of the worker
            that comes last is called, with that worker's random generators.
        item (`Any`): This worker's.

    Raises:
        RuntimeError: It is called outside of such a worker.
    """
    wire = current()
    if wire is None:
        raise RuntimeError("together must be called by a worker of run_in_process, got no such worker's thread.")
    return wire.together(call, item)


def current() -> Wire | None:
    """The wire of the worker whose thread this is; None elsewhere."""
    return getattr(_here, "wire", None)


class _WrongValue(RuntimeError, ValueError):
    """A worker has failed by a ValueError: whoever waits for that has it too."""


class _Ended(BaseException):
    """Unwinds a worker after another has failed, one at a time; no `except Exception` stops it."""


@dataclass
class _Turn:
    """A worker's place in the order."""

    may_run: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    is_ready: Callable[[], bool] | None = None  # what it waits for; None where it could run
    waits_for: str = ""
    ended: bool = False
    random_state: RandomState | None = None


@dataclass(eq=False)
class Group:
    """Some workers; `meetings[n, name]` is what each has brought to the group's n-th collective."""

    ranks: list[int]
    meetings: dict[tuple[int, str], dict[int, Any]] = field(default_factory=dict)
    taken: dict[tuple[int, str], int] = field(default_factory=dict)
    letters: dict[tuple[int, int, int], deque[torch.Tensor]] = field(default_factory=dict)  # by source, target, tag


class World:
    """The workers, whose turn it is, and what is under way between them."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.turns = [_Turn() for _ in range(size)]
        self.groups = [Group(list(range(size)))]
        self.failure: tuple[str, BaseException | None] | None = None
        self.all_ended = threading.Event()

    def run(self, work: Callable[[int], T]) -> list[T]:
        """All workers, until every thread has ended."""
        results: list[Any] = [None] * self.size
        at_the_call = RandomState.take()
        for turn in self.turns:
            turn.random_state = at_the_call
        ranks = range(self.size)
        threads = [threading.Thread(target=self._live, args=(rank, work, results), daemon=True) for rank in ranks]
        for thread in threads:
            thread.start()
        self.turns[0].may_run.release()
        try:
            self.all_ended.wait()  # no join: one that is interrupted takes a thread that runs on for ended
        except BaseException:  # KeyboardInterrupt
            self.fail("the caller was interrupted", None)
            self.all_ended.wait()
            raise
        finally:
            for thread in threads if self.all_ended.is_set() else []:
                thread.join()
            at_the_call.give_back()
        if self.failure is not None:
            words, cause = self.failure
            raise (_WrongValue if isinstance(cause, ValueError) else RuntimeError)(words) from cause
        return results

    def _live(self, rank: int, work: Callable[[int], T], results: list[Any]) -> None:
        _here.wire = Wire(self, rank)
        try:
            self._take_turn(rank)
            results[rank] = work(rank)
        except _Ended:
            pass
        except BaseException as error:
            self.fail(f"worker {rank} failed: {type(error).__name__}: {error}", error)
        self.turns[rank].ended = True
        self._pass_on(rank)

    def wait(self, rank: int, is_ready: Callable[[], bool], what: str) -> None:
        """Let others run until `is_ready()`."""
        if self.failure is not None:  # a `finally` that meets again while its worker is ended: nobody would come
            raise _Ended
        if is_ready():
            return
        turn = self.turns[rank]
        turn.is_ready, turn.waits_for, turn.random_state = is_ready, what, RandomState.take()
        self._pass_on(rank)
        self._take_turn(rank)
        turn.is_ready = None

    def _pass_on(self, rank: int) -> None:
        """
        To the next worker, in the order of ranks, that need not wait; after a failure to the next one that is left.
        """
        left = [turn for turn in self.turns[rank + 1 :] + self.turns[: rank + 1] if not turn.ended]
        if not left:
            self.all_ended.set()
            return
        able = [turn for turn in left if turn.is_ready is None or turn.is_ready()]
        if not able and self.failure is None:
            at = [
                f"worker {r} {'has returned' if t.ended else 'waits for ' + t.waits_for}"
                for r, t in enumerate(self.turns)
            ]
            self.fail(
                f"all workers wait for each other: {'; '.join(at)}. Every worker must take the same number of steps.",
                None,
            )
        (left if self.failure else able)[0].may_run.release()

    def _take_turn(self, rank: int) -> None:
        self.turns[rank].may_run.acquire()
        if self.failure is not None:
            raise _Ended
        random_state = self.turns[rank].random_state
        if random_state is not None:
            random_state.give_back()

    def fail(self, words: str, error: BaseException | None) -> None:
        """End all workers; the first failure is the one that is told."""
        self.failure = self.failure or (words, error)


class Work:
    """What a collective or a message returns."""

    def __init__(self, wait: Callable[[], None] | None = None) -> None:
        self._wait = wait

    def wait(self, timeout: timedelta | None = None) -> None:
        """
        Until it is done; others run meanwhile. There are no time-outs in one process: that all wait is known at once.
        """
        if self._wait is not None:
            wait, self._wait = self._wait, None
            wait()

    def is_completed(self) -> bool:
        """Whether it was waited for: workers take turns, and nothing arrives meanwhile."""
        return self._wait is None


class Wire:
    """One worker's view, with the names of `torch.distributed`."""

    ReduceOp = SimpleNamespace(SUM="sum", MAX="max")

    def __init__(self, world: World, rank: int) -> None:
        self._world, self._rank = world, rank
        self._groups_made = 0
        self._meetings_held: dict[int, int] = {}
        self.known: Any = None  # what the communicator remembers of this worker's groups
        self.group = SimpleNamespace(WORLD=world.groups[0])

    def get_rank(self) -> int:
        """This worker's."""
        return self._rank

    def get_world_size(self) -> int:
        """Workers in the job."""
        return self._world.size

    def get_backend(self) -> str:
        """A name of our own."""
        return BACKEND

    def get_backend_config(self) -> str:
        """The same for every device: tensors stay where they are."""
        return f"cpu:{BACKEND},cuda:{BACKEND}"

    def new_group(self, ranks: list[int], timeout: timedelta | None = None) -> Group:
        """Every worker makes the same groups in the same order; the first one that comes makes it for all."""
        self._groups_made += 1
        if len(self._world.groups) == self._groups_made:
            self._world.groups.append(Group(list(ranks)))
        return self._world.groups[self._groups_made]

    # ---- collectives ----

    def _meet(
        self, name: str, mine: Any, group: Group, take: Callable[[dict[int, Any]], object], async_op: bool
    ) -> Work:
        """
        Bring `mine`; when all have, `take` what they brought, by rank in the job. Whose `name` differs waits, and the
        wait is told.
        """
        number = self._meetings_held[id(group)] = self._meetings_held.get(id(group), -1) + 1
        meeting = number, f"{name} of {_size(mine)}" if isinstance(mine, torch.Tensor) else name
        brought = group.meetings.setdefault(meeting, {})
        brought[self._rank] = mine

        def wait() -> None:
            self._world.wait(
                self._rank,
                lambda: len(brought) == len(group.ranks),
                f"{meeting[1]}, number {number} of workers {group.ranks}",
            )
            take(brought)
            group.taken[meeting] = group.taken.get(meeting, 0) + 1
            if group.taken[meeting] == len(group.ranks):
                del group.meetings[meeting], group.taken[meeting]

        work = Work(wait)
        if not async_op:
            work.wait()
        return work

    def all_reduce(self, tensor: torch.Tensor, op: Any = None, group: Any = None, async_op: bool = False) -> Work:
        """The sum in the order of ranks, the same on all; or the maximum."""
        is_max = op == self.ReduceOp.MAX

        def take(brought: dict[int, torch.Tensor]) -> None:
            first, *others = (brought[rank] for rank in sorted(brought))
            tensor.copy_(first)
            for other in others:
                torch.maximum(tensor, other, out=tensor) if is_max else tensor.add_(other)

        return self._meet(f"all_reduce ({op or self.ReduceOp.SUM})", tensor.clone(), group, take, async_op)

    def all_gather(
        self, tensors: list[torch.Tensor], tensor: torch.Tensor, group: Any = None, async_op: bool = False
    ) -> Work:
        """Everybody's tensor."""

        def take(brought: dict[int, torch.Tensor]) -> None:
            for rank, into in zip(group.ranks, tensors, strict=True):
                into.copy_(brought[rank])

        return self._meet("all_gather", tensor.clone(), group, take, async_op)

    def all_to_all_single(
        self, output: torch.Tensor, input: torch.Tensor, group: Any = None, async_op: bool = False
    ) -> Work:
        """Of everybody's tensor the part that is this worker's."""
        mine = group.ranks.index(self._rank)

        def take(brought: dict[int, torch.Tensor]) -> None:
            for rank, into in zip(group.ranks, output.chunk(len(group.ranks)), strict=True):
                into.copy_(brought[rank].chunk(len(group.ranks))[mine])

        return self._meet("all_to_all", input.clone(), group, take, async_op)

    def all_gather_object(self, objects: list[Any], value: Any, group: Any = None) -> None:
        """Copies of everybody's value."""

        def take(brought: dict[int, Any]) -> None:
            objects[:] = [copy.deepcopy(brought[rank]) for rank in group.ranks]

        # Copies of copies: who takes them last may come after a change.
        self._meet("all_gather_object", copy.deepcopy(value), group, take, False)

    def broadcast(self, tensor: torch.Tensor, src: int, group: Any = None, async_op: bool = False) -> Work:
        """The tensor of `src`, a rank in the job."""
        return self._meet("broadcast", tensor.clone(), group, lambda brought: tensor.copy_(brought[src]), async_op)

    def together(self, call: Callable[[list[Item]], Sequence[T]], item: Item) -> T:
        """The module's `together`."""
        mine: list[Any] = [item]  # then, after the call, `[item, entry]`

        def take(brought: dict[int, list[Any]]) -> None:
            if len(mine) == 1:
                given = [brought[rank] for rank in sorted(brought)]
                try:
                    for one, entry in zip(given, call([one[0] for one in given]), strict=True):
                        one.append(entry)
                except BaseException as error:  # told here: a worker that catches it must not go on alone
                    self._world.fail(f"together failed: {type(error).__name__}: {error}", error)
                    raise

        self._meet("together", mine, self.group.WORLD, take, False)
        return mine[1]  # type: ignore[no-any-return]

    # ---- messages ----

    def P2POp(
        self, op: str, tensor: torch.Tensor, peer: int, group: Any, tag: int
    ) -> tuple[str, torch.Tensor, int, Group, int]:
        """One message, to be sent or received."""
        return op, tensor, peer, group, tag

    isend, irecv = "isend", "irecv"

    def batch_isend_irecv(self, ops: list[tuple[str, torch.Tensor, int, Group, int]]) -> list[Work]:
        """Send all that are to be sent; a receipt waits for its message."""
        return [
            (self._send if op == self.isend else self._receive)(tensor, peer, group, tag)
            for op, tensor, peer, group, tag in ops
        ]

    def _send(self, tensor: torch.Tensor, peer: int, group: Group, tag: int) -> Work:
        group.letters.setdefault((self._rank, peer, tag), deque()).append(tensor.clone())
        return Work()

    def _receive(self, tensor: torch.Tensor, peer: int, group: Group, tag: int) -> Work:
        key = (peer, self._rank, tag)

        def wait() -> None:
            self._world.wait(self._rank, lambda: bool(group.letters.get(key)), f"message {tag} from worker {peer}")
            letter = group.letters[key].popleft()
            if not group.letters[key]:
                del group.letters[key]
            if (sent := _size(letter)) != (own := _size(tensor)):
                raise RuntimeError(f"worker {peer} sent {sent} in message {tag}, worker {self._rank} expects {own}.")
            tensor.copy_(letter)

        return Work(wait)


def _size(tensor: torch.Tensor) -> str:
    return f"{tensor.numel()} elements ({tensor.dtype})"
