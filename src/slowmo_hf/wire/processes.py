"""Some processes of the job: their group, messages between them, and what is said when one of them fails."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch

from . import in_process
from .failures import SLICE_SECONDS, Witness, first_line
from .job import backends, processes_in_job, rank_in_job, wire

# A default group, ranks in it and a purpose. A job may follow another in one process: on some ranks its default group
# may get the id of the other's.
_Ranks = tuple[weakref.ref[Any], tuple[int, ...], str]


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
        notes (`dict`): What the runs among the same ranks leave for each other, by name; time-outs may differ.
    """

    groups: dict[tuple[_Ranks, float], Any] = field(default_factory=dict)
    under_way: dict[int, list[Transfer]] = field(default_factory=dict)
    owed: dict[int, Callable[[], None]] = field(default_factory=dict)
    notes: dict[_Ranks | None, dict[str, list[Any]]] = field(default_factory=dict)


_of_process = _Known()


def _known() -> _Known:
    worker = in_process.current()
    if worker is None:
        return _of_process
    worker.known = worker.known or _Known()
    return worker.known  # type: ignore[no-any-return]


def forget_groups() -> None:
    """Those of this process are not used again: collectives that some ranks have given up are left in them."""
    known = _known()
    for those in (known.groups, known.under_way, known.owed):
        those.clear()


def _own_group(ranks: _Ranks, timeout_seconds: float) -> Any:
    groups = _known().groups
    if (ranks, timeout_seconds) not in groups:
        # `ddp_timeout` is ignored on CPU; a group of our own fails in our time.
        groups[ranks, timeout_seconds] = wire().new_group(list(ranks[1]), timeout=timedelta(seconds=timeout_seconds))
    return groups[ranks, timeout_seconds]


@dataclass(eq=False)
class Transfer:
    """Messages under way: a send to every target and a receipt from every source."""

    works: list[Any]
    message: torch.Tensor
    received: list[torch.Tensor]
    words: str
    peers: list[int] = field(default_factory=list)  # ranks in the job
    done: bool = False


class Processes:
    """
    Some processes of the job and messages from one to another; `Communicator`, whose arguments these are, adds what
    all of them do together.
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
        self._among: _Ranks | None = None
        self.ranks = list(range(processes_in_job())) if ranks is None else list(ranks)
        self.world_size = len(self.ranks)
        self.member = rank_in_job() in self.ranks
        self.rank = self.ranks.index(rank_in_job()) if self.member else -1
        self.backend = "none"
        self._by_device: dict[str, str] = {}
        self._small_device = self.wire_device = torch.device("cpu")
        if self.world_size > 1:
            self._among = (weakref.ref(wire().group.WORLD), tuple(self.ranks), purpose)
            self.group = _own_group(self._among, timeout_seconds)
            self._by_device = backends()
            self.backend = self._by_device.get(device.type, wire().get_backend())
            if self._by_device.get("cpu") != "gloo":
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

    def notes(self, name: str) -> list[Any]:
        """What this process's runs among these ranks have left for each other under a name, to be added to."""
        return _known().notes.setdefault(self._among, {}).setdefault(name, [])

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

    def _wait(self, work: Any, device: torch.device) -> None:
        """
        Wait for a collective; on gloo, no longer than until another rank gives up: that one is not always a neighbour
        of this. Parameters in main memory and buffers on a card have a backend each, and NCCL ends a group whose wait
        has a time limit that passes.
        """
        if self._by_device.get(device.type, self.backend) != "gloo" or self.witness is None:
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
            wire().P2POp(wire().irecv, into, self.ranks[s], self.group, tag)
            for s, into in zip(sources, received, strict=True)
        ]
        ops += [wire().P2POp(wire().isend, message, self.ranks[t], self.group, tag) for t in targets]
        self.bytes_sent += message.nbytes * len(targets)
        peers = sorted({*targets, *sources})
        transfer_ranks = [self.ranks[peer] for peer in peers]
        words = f"exchange with worker {', '.join(map(str, peers))} (rank {', '.join(map(str, transfer_ranks))})"
        try:
            works = wire().batch_isend_irecv(ops) if ops else []
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
        under_way = _known().under_way.get(id(self.group), [])
        if transfer in under_way:  # else the groups have been forgotten, by another run of this process
            under_way.remove(transfer)
