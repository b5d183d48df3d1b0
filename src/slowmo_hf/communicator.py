"""The only file that talks to other processes: sums in flat buffers, headers, objects, messages; bytes counted."""

from __future__ import annotations

import os
import pickle
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from . import in_process, upstream

T = TypeVar("T")

_LET_GO_SECONDS = 0.1  # at a process's end
SLICE_SECONDS = 0.5  # between looks whether another rank has given up or left


@dataclass
class _Known:
    """
    What a worker has of its groups.

    Args:
        groups (`dict`): `new_group` is collective and leaks: once per process for a default group, ranks, purpose and
            time-out.
        under_way (`dict`): Messages that nobody has waited for yet, by group. A run may be dropped with some in
            flight; to let go of a posted receipt would leave its sender stuck, and with it every later message between
            the two. The next run in the group finishes them first.
        owed (`dict`): Likewise collectives that this rank has yet to start, and others of the group may have started,
            by group.
    """

    groups: dict[tuple[int, tuple[int, ...], str, float], Any] = field(default_factory=dict)
    under_way: dict[int, list[Transfer]] = field(default_factory=dict)
    owed: dict[int, Callable[[], None]] = field(default_factory=dict)


_of_process = _Known()


def _wire() -> Any:
    """torch.distributed; or, in a worker of `run_in_process`, what stands for it there."""
    return in_process.current() or dist


def _known() -> _Known:
    wire = in_process.current()
    if wire is None:
        return _of_process
    wire.known = wire.known or _Known()
    return wire.known  # type: ignore[no-any-return]


def _own_group(ranks: Sequence[int], purpose: str, timeout_seconds: float) -> Any:
    groups = _known().groups
    key = (id(_wire().group.WORLD), tuple(ranks), purpose, timeout_seconds)
    if key not in groups:
        # `ddp_timeout` is ignored on CPU; a group of our own fails in our time.
        groups[key] = _wire().new_group(list(ranks), timeout=timedelta(seconds=timeout_seconds))
    return groups[key]


class Witness(Protocol):
    """Who knows of the other ranks when a collective fails."""

    def somebody_is_gone(self) -> bool:
        """Whether a rank has given up or left, so that a collective waits in vain."""

    def explain(self, error: Exception | None, ranks: Iterable[int]) -> RuntimeError:
        """The failure in the words of the rank that caused it."""


@dataclass(eq=False)
class Arrival:
    """A collective under way: `is_here` tells whether there is nothing to wait for."""

    wait: Callable[[], None]
    is_here: Callable[[], bool]

    def __call__(self) -> None:
        """Wait."""
        self.wait()


@dataclass(eq=False)
class Transfer:
    """Messages under way: a send to every target and a receipt from every source."""

    works: list[Any]
    message: torch.Tensor
    received: list[torch.Tensor]
    words: str
    peers: list[int] = field(default_factory=list)  # ranks in the job
    done: bool = False


class Communicator:
    """
    Some processes of the job, all of them by default. In a world of one, or without `torch.distributed`, nothing is
    sent.

    Making one is collective over the whole job, also for processes that are not in `ranks` (their `member` is False).

    Args:
        timeout_seconds (`float`): A collective or message that takes longer raises.
        device (`torch.device`): Where the parameters are. Headers travel from there unless the CPU has a backend;
            peer-to-peer messages from `wire_device`, which is the CPU where the device's backend is gloo.
        ranks (`Sequence[int]`, *optional*): Ranks in the job, ascending; all where it is None.
        purpose (`str`, *optional*): Communicators of different purposes have process groups, and so wires, of their
            own.
        witness (`Witness`, *optional*): Says which rank a failure comes from; without one it is torch's own error.
        patience_seconds (`float`, *optional*, defaults to `0`): How long a collective still waits where somebody is
            known to be gone: for the word of a rank that knows more.
    """

    def __init__(
        self,
        timeout_seconds: float,
        device: torch.device,
        ranks: Sequence[int] | None = None,
        *,
        purpose: str = "rounds",
        witness: Witness | None = None,
        patience_seconds: float = 0.0,
    ) -> None:
        self.witness = witness
        self.patience_seconds = patience_seconds
        self.bytes_sent = 0
        self.timeout_seconds = timeout_seconds
        self.group: Any = None
        self.ranks = list(range(processes_in_job())) if ranks is None else list(ranks)
        self.world_size = len(self.ranks)
        self.member = rank_in_job() in self.ranks
        self.rank = self.ranks.index(rank_in_job()) if self.member else -1
        self.backend = "none"
        self._small_device = self.wire_device = torch.device("cpu")
        if self.world_size > 1:
            self.group = _own_group(self.ranks, purpose, timeout_seconds)
            backends = _backends()
            self.backend = backends.get(device.type, _wire().get_backend())
            if backends.get("cpu") != "gloo":
                self._small_device = device
            if self.backend != "gloo":  # gloo's peer-to-peer messages read main memory
                self.wire_device = device
        for transfer in list(_known().under_way.get(id(self.group), [])):
            self.finish(transfer)
        start_owed = _known().owed.pop(id(self.group), None)
        if start_owed is not None:
            start_owed()

    def owe(self, start: Callable[[], None] | None) -> None:
        """
        What the next run in this group does first, if this one is dropped before it does: to start collectives that
        others have started. None: nothing any more.
        """
        if start is None:
            _known().owed.pop(id(self.group), None)
        else:
            _known().owed[id(self.group)] = start

    @property
    def fails_cleanly(self) -> bool:
        """
        Whether a collective that a rank misses raises, and at once where its process is gone; NCCL must not be entered
        in vain.
        """
        return self.backend in ("gloo", in_process.BACKEND)

    @contextmanager
    def _counted(self, payload_bytes: float = 0, peers: Sequence[int] | None = None) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if self.witness is None:
                raise
            raise self.witness.explain(error, self.ranks if peers is None else peers) from error
        self.bytes_sent += round(payload_bytes)

    def _wait(self, work: Any) -> None:
        """
        Wait for a collective; on gloo, no longer than until another rank gives up: that one is not always a neighbour
        of this.
        """
        if self.backend != "gloo" or self.witness is None:
            work.wait()
            return
        gone_since: float | None = None
        while not work.is_completed():
            try:
                work.wait(timedelta(seconds=SLICE_SECONDS))
            except RuntimeError:
                if work.is_completed():  # it has failed, or arrived just behind this slice's end: `wait` tells which
                    break
                if gone_since is None and self.witness.somebody_is_gone():
                    gone_since = time.monotonic()
                if gone_since is not None and time.monotonic() - gone_since >= self.patience_seconds:
                    raise RuntimeError("another rank has given up") from None
        work.wait()

    # ---- collectives ----

    def start_sum_(self, flat: torch.Tensor) -> Callable[[], None]:
        """
        Start to replace `flat` by its sum over workers, in place; the result waits for it. Counts a ring's 2 (m-1)/m
        of its bytes.

        Args:
            flat (`torch.Tensor`): Contiguous and our own: gloo is silently wrong on views that are not dense.
        """
        if self.world_size == 1 or flat.numel() == 0:
            return lambda: None
        assert flat.is_contiguous()
        with self._counted(self._ring_bytes(flat)):
            work = _wire().all_reduce(flat, group=self.group, async_op=True)
        return self._arrival(work, flat)

    def start_all_to_all(self, outgoing: torch.Tensor, incoming: torch.Tensor) -> Arrival:
        """
        Start to send part i of `outgoing` to worker i, its own to itself, and to put what worker i sends into part i
        of `incoming`; the result waits for it. Counts (m-1)/m of the bytes.

        Args:
            outgoing (`torch.Tensor`), incoming (`torch.Tensor`): Contiguous bytes (`torch.uint8`), m equal parts, of
                one size everywhere.
        """
        assert outgoing.numel() % self.world_size == 0
        if self.world_size == 1:
            incoming.copy_(outgoing)
            return Arrival(lambda: None, lambda: True)
        with self._counted((self.world_size - 1) / self.world_size * outgoing.nbytes):
            work = _wire().all_to_all_single(incoming, outgoing, group=self.group, async_op=True)
        return self._arrival(work, incoming)

    def start_all_gather(self, rows: torch.Tensor, mine: torch.Tensor) -> Callable[[], None]:
        """
        Start to put every worker's `mine` into its row of `rows`; the result waits for it. Counts (m-1) times the
        bytes of one.

        Args:
            rows (`torch.Tensor`): Contiguous bytes (`torch.uint8`), shape (m, len(mine)); not in the memory of `mine`.
            mine (`torch.Tensor`): Contiguous bytes.
        """
        if self.world_size == 1:
            rows.copy_(mine)
            return lambda: None
        with self._counted((self.world_size - 1) * mine.nbytes):
            work = _wire().all_gather(list(rows), mine, group=self.group, async_op=True)
        return self._arrival(work, rows)

    def _arrival(self, work: Any, into: torch.Tensor) -> Arrival:
        def wait() -> None:
            with self._counted():
                self._wait(work)
                if into.is_cuda:
                    torch.cuda.synchronize(into.device)

        return Arrival(wait, work.is_completed)

    def max_(self, flat: torch.Tensor) -> None:
        """Replace `flat` by its maximum over workers, in place."""
        if self.world_size == 1 or flat.numel() == 0:
            return
        with self._counted(self._ring_bytes(flat)):
            self._wait(_wire().all_reduce(flat, op=_wire().ReduceOp.MAX, group=self.group, async_op=True))

    def gather_header(self, header: list[float]) -> torch.Tensor:
        """Every worker's header: float64, shape (world_size, len(header)), on the CPU."""
        return self.start_gather_header(header)()

    def start_gather_header(self, header: list[float]) -> Callable[[], torch.Tensor]:
        """Start to send `header` to all; the result waits for theirs, and returns what `gather_header` does."""
        mine = torch.tensor(header, dtype=torch.float64, device=self._small_device)
        if self.world_size == 1:
            return lambda: mine[None].cpu()
        rows = [torch.empty_like(mine) for _ in range(self.world_size)]
        with self._counted((self.world_size - 1) * mine.nbytes):
            work = _wire().all_gather(rows, mine, group=self.group, async_op=True)

        def wait() -> torch.Tensor:
            with self._counted():
                self._wait(work)
            return torch.stack(rows).cpu()

        return wait

    def gather_objects(self, value: Any) -> list[Any]:
        """Every worker's `value`, by rank. For the start and for errors: objects are pickled."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        with self._counted():
            _wire().all_gather_object(values, value, group=self.group)
        return values

    def broadcast_(self, flat: torch.Tensor) -> None:
        """Replace `flat` by the first rank's, in place."""
        if self.world_size > 1 and flat.numel():
            with self._counted():  # bytes: every dtype travels
                self._wait(
                    _wire().broadcast(flat.view(torch.uint8), src=self.ranks[0], group=self.group, async_op=True)
                )

    def broadcast_outcome(self, act: Callable[[], T]) -> T:
        """Run `act` on the first rank alone; its result, or its error, is everybody's. Objects are pickled."""
        if self.world_size == 1:
            return act()
        if self.rank == 0:
            try:
                result = act()
            except Exception as failure:
                kind = type(failure) if type(failure) in (ValueError, RuntimeError) else RuntimeError
                with suppress(RuntimeError):  # the failure in hand says more
                    self._broadcast_object((None, kind(str(failure))))
                raise
            self._broadcast_object((result, None))
            return result
        result, error = self._broadcast_object(None)
        if error is not None:
            raise error
        return result

    def _broadcast_object(self, value: Any) -> Any:
        """torch's `broadcast_object_list`, but for the wait: on gloo no longer than until another rank gives up."""
        data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        length = torch.tensor([len(data)], device=self._small_device)
        self.broadcast_(length)
        told = data.to(self._small_device) if self.rank == 0 else length.new_empty(int(length), dtype=torch.uint8)
        self.broadcast_(told)
        return value if self.rank == 0 else pickle.loads(told.cpu().numpy().tobytes())

    def _ring_bytes(self, flat: torch.Tensor) -> float:
        return 2 * (self.world_size - 1) / self.world_size * flat.nbytes

    # ---- messages ----

    def exchange(
        self, message: torch.Tensor, targets: list[int], received: list[torch.Tensor], sources: list[int], tag: int
    ) -> Transfer:
        """
        Start to send `message` to every target and to receive one from every source; returns at once.

        Args:
            message (`torch.Tensor`): Contiguous, on `wire_device`; must not change before the transfer is finished.
            targets (`list[int]`), sources (`list[int]`): Ranks in this communicator.
            received (`list[torch.Tensor]`): A tensor like `message` for every source.
            tag (`int`): The same at both ends, different for messages that are under way together.
        """
        tag %= 2**30
        ops = [
            _wire().P2POp(_wire().irecv, into, self.ranks[s], self.group, tag)
            for s, into in zip(sources, received, strict=True)
        ]
        ops += [_wire().P2POp(_wire().isend, message, self.ranks[t], self.group, tag) for t in targets]
        self.bytes_sent += message.nbytes * len(targets)
        peers = sorted({*targets, *sources})
        transfer_ranks = [self.ranks[peer] for peer in peers]
        words = f"exchange with worker {', '.join(map(str, peers))} (rank {', '.join(map(str, transfer_ranks))})"
        try:
            works = _wire().batch_isend_irecv(ops) if ops else []
        except NotImplementedError as error:
            raise RuntimeError(
                f"base must be local_sgd or all_reduce on backend {self.backend!r}, which has no peer-to-peer "
                "messages. Use gloo or NCCL."
            ) from error
        except RuntimeError as error:
            failure = RuntimeError(f"{words} could not start: {first_line(error)}")
            raise (self.witness.explain(failure, transfer_ranks) if self.witness else failure) from error
        transfer = Transfer(works, message, received, words, transfer_ranks)
        _known().under_way.setdefault(id(self.group), []).append(transfer)
        return transfer

    def finish(self, transfer: Transfer) -> None:
        """
        Wait until the messages have arrived and gone.

        Raises:
            RuntimeError: A peer died or did not answer within `timeout_seconds`.
        """
        if transfer.done:
            return
        with self._counted(peers=transfer.peers):
            for work in transfer.works:
                try:
                    work.wait(timedelta(seconds=self.timeout_seconds))
                except RuntimeError as error:
                    raise RuntimeError(f"{transfer.words} failed: {first_line(error)}") from error
        transfer.done = True
        _known().under_way[id(self.group)].remove(transfer)


def is_collective_failure(error: BaseException) -> bool:
    """Whether it was raised by a collective of anybody's: torch's own types (NCCL), or gloo's words."""
    words = str(error)
    return isinstance(error, RuntimeError) and (
        isinstance(error, dist.DistError) or "/gloo/" in words or "pair closure" in words
    )


def is_timeout(error: BaseException) -> bool:
    """
    Whether a collective was given up for its time. Only the first that waits on a connection of gloo's says that it
    "timed out"; the connection is closed with it, and those after it say "Application timeout caused pair closure".
    """
    words = str(error).lower()
    return "timed out" in words or "timeout" in words


def first_line(error: BaseException) -> str:
    """What an error says, without its stack; its type where it says nothing."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _backends() -> dict[str, str]:
    """The default group's backend by device type, for example {"cpu": "gloo", "cuda": "nccl"}."""
    return dict(pair.split(":") for pair in str(_wire().get_backend_config()).split(",") if ":" in pair)


def job_store() -> Any:
    """
    The job's key-value store (`set`, `get`, `check`, `delete_key`), which lives in the launcher or with rank 0; None
    in a worker of `run_in_process`, where nobody can be missed.
    """
    return None if is_in_process() else upstream.default_store()


def leave_job() -> None:
    """
    End gloo's threads before the process ends: with torch 2.13 one process in seven that exits with a gloo group alive
    aborts ("terminate called without an active exception"), and a finished job counts as failed. A thread that is slow
    to let go of its last message still needs the interpreter: it gets a moment of it (without, 2 of some 400 processes
    aborted on a busy machine).
    """
    if dist.is_available() and dist.is_initialized() and dist.get_backend() == "gloo":
        dist.destroy_process_group()
        time.sleep(_LET_GO_SECONDS)


def rank_in_job() -> int:
    """This process's rank in `torch.distributed`'s world; 0 where it is not initialised."""
    return int(_wire().get_rank()) if _has_wire() else 0


def processes_in_job() -> int:
    """The size of `torch.distributed`'s world; 1 where it is not initialised."""
    return int(_wire().get_world_size()) if _has_wire() else 1


def _has_wire() -> bool:
    return is_in_process() or (dist.is_available() and dist.is_initialized())


def is_in_process() -> bool:
    """Whether this is a worker of `run_in_process`: without DDP, launcher and time-outs."""
    return in_process.current() is not None


def processes_on_machine(world_size: int) -> int:
    """
    Processes of this job on this machine, from LOCAL_WORLD_SIZE and never from host names (containers share them).
    """
    return world_size if is_in_process() else int(os.environ.get("LOCAL_WORLD_SIZE", world_size))


def machines_in_job(world_size: int) -> int:
    """Number of machines; 1 where the launcher does not say."""
    return max(1, world_size // processes_on_machine(world_size))


def host_name() -> str:
    """This machine's name; nothing is looked up."""
    return socket.gethostname()


def host_and_address() -> tuple[str, str]:
    """This machine's name and the address that its name resolves to ("unresolved" where it does not)."""
    host = host_name()
    try:
        return host, socket.gethostbyname(host)
    except OSError:
        return host, "unresolved"
