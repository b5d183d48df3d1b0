"""
Line 6 in two stages, over owners: of every bucket, worker r owns shard r.

    shard r of what every worker brings goes to worker r     all-to-all
    worker r sums them
    what comes of the sum goes to all                        all-gather

`Ends` says what is packed, summed and handed out: numbers in few bytes (`error_feedback.py`), or the shards of a slow
state that its owner alone has (`sharding.py`), which it updates between the two stages.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from ..algorithm.layout import Bucket, FlatAnchor, Piece
from ..algorithm.outer_update import Sum
from ..algorithm.starts import Base
from ..contents import Contents, Restored, Saved
from .averages import Averages, Buffers
from .communicator import Arrival, Communicator
from .reduction import OWN_SLOTS, Launch, Memory, Message, UpdatedByAll

M = TypeVar("M", bound="_InTwoStages")


class Ends(Protocol):
    """
    What happens at the ends of both stages. Rows have shape (workers, bytes), one per worker.

    Attributes:
        buckets (`list[Bucket]`): What messages carry, of the whole layout.
    """

    buckets: list[Bucket]

    def row_bytes(self, number: int) -> int:
        """Of bucket `number`: bytes for one owner."""

    def reserve(self, memory: Memory) -> None:
        """Make what a round needs beside the rows."""

    def pack_(self, number: int, launch: Launch, base: Base, rows: torch.Tensor) -> torch.Tensor:
        """Write what each owner gets into its row; the squared norm of what this worker brings, 0-dim."""

    def sum_(self, number: int, launch: Launch, rows: torch.Tensor) -> Sum:
        """Of every worker's row, this worker's shard: its bucket, the sum, that of the squared norms."""

    def share(self, number: int, launch: Launch, total: Sum, square: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """The bytes that go to all, in the memory of the first row or elsewhere, not in the other rows."""

    def gathered(self, number: int, launch: Launch, rows: torch.Tensor) -> Sum:
        """The whole bucket with what has come from all owners: sums; or new anchors, a view, where those update."""

    def saved(self) -> Saved:
        """What one round holds back for the next."""

    def restore(self, own: Contents, *, same_number: bool) -> Restored:
        """Check it; the result takes it up."""

    def forget(self) -> None:
        """As `Reduction.forget`."""


class TwoStage(UpdatedByAll):
    """
    A reduction over owners. All update.

    Memory: messages to and from all, of one bucket and the next; of all buckets where they set out together.

    Args:
        averages (`Averages`): The workers.
        ends (`Ends`): What travels.
        ahead (`bool`): Whether rounds set out together.
    """

    def __init__(self, averages: Averages, ends: Ends, *, ahead: bool) -> None:
        super().__init__(averages, ends.buckets)
        self.ends = ends
        self._communicator, self._ahead = averages.communicator, ahead
        self._first_stages: deque[tuple[_SumForAll, Launch]] = deque()

    @property
    def payload_bytes(self) -> float:
        """As `Reduction.payload_bytes`: in each stage a row for every other worker."""
        others = self._communicator.world_size - 1
        return sum(2 * others * self.ends.row_bytes(number) for number in range(len(self.buckets)))

    def reserve(self, buffers: Buffers) -> None:
        """As `Reduction.reserve`."""
        self.ends.reserve(buffers.get)
        for number in range(len(self.buckets)):
            self._rows(number, buffers.get, ahead=self._ahead)

    def _rows(self, number: int, memory: Memory, *, ahead: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Memory of the messages to all and from all."""
        workers, bucket = self._communicator.world_size, self.buckets[number]
        device, row = bucket.item.device, self.ends.row_bytes(number)
        slot = OWN_SLOTS + 2 * number if ahead else 2 * (number % 2)
        outgoing, incoming = (memory(workers * row, torch.uint8, device, slot + side) for side in (0, 1))
        return outgoing.view(workers, row), incoming.view(workers, row)

    def start(self, launch: Launch, base: Base) -> Iterator[Message]:
        """
        As `Reduction.start`. Second stages set out when first ones have come, at the latest when the sums are read.
        """
        for number in range(len(self.buckets)):
            message = self._send(_SumForAll, number, launch, base)
            if launch.is_ahead:
                self._first_stages.append((message, launch))
                self._communicator.owe(lambda: self.start_second_stages(wait=True))
            yield message
        # NCCL wants one order over all its communicators: not one that depends on what is here.
        if not self._communicator.fails_cleanly:
            self.start_second_stages(wait=True)

    def _send(self, kind: type[M], number: int, launch: Launch, base: Base) -> M:
        """The first stage of bucket `number`."""
        outgoing, incoming = self._rows(number, launch.memory, ahead=launch.is_ahead)
        launch.own_squares.append(self.ends.pack_(number, launch, base, outgoing))
        square = launch.weight * launch.own_squares[-1]
        to_owners = self._communicator.start_all_to_all(outgoing.view(-1), incoming.view(-1))
        return kind(self._communicator, self.ends, number, square, outgoing, incoming, to_owners)

    def start_second_stages(self, *, wait: bool) -> None:
        """In the buckets' order, the same on all workers."""
        while self._first_stages and (wait or self._first_stages[0][0].to_owners.is_here()):
            message, launch = self._first_stages.popleft()
            message.start_second_stage(launch)
            if not self._first_stages:
                self._communicator.owe(None)

    def saved(self, *, agree: bool, keep: bool) -> Saved:
        """As `Part.saved`."""
        return self.ends.saved()

    def restore(self, saved: Saved, *, same_number: bool) -> Restored:
        """As `Part.restore`."""
        return self.ends.restore(saved.own, same_number=same_number)

    def forget(self) -> None:
        """As `Reduction.forget`."""
        self._first_stages.clear()
        self._communicator.owe(None)
        self.ends.forget()


class TwoStageAtOwners(TwoStage):
    """The same where each shard's owner does the outer update, between the stages: the second brings new anchors."""

    updates_at_owners = True

    @property
    def payload_bytes(self) -> float:
        """As `Reduction.payload_bytes`; and the three squared norms of `summed`."""
        return super().payload_bytes + 3 * 8 * (self._communicator.world_size - 1)

    def start(self, launch: Launch, base: Base) -> Iterator[Message]:
        """As `Reduction.start`. Second stages set out behind the update."""
        for number in range(len(self.buckets)):
            yield self._send(_SumForOwner, number, launch, base)

    def read(self, launch: Launch) -> None:
        """Ahead, new anchors are under way."""
        if not launch.is_ahead:
            launch.close()

    def new_anchors(self, launch: Launch | None) -> Iterator[tuple[Piece, torch.Tensor]]:
        """As `Reduction.new_anchors`: what has come from every shard's owner."""
        assert launch is not None
        for message in launch.messages:
            assert isinstance(message, _SumForOwner)
            message.arrived()
        for number in range(len(self.buckets)):
            bucket, anchors = self._anchors(number, launch)
            yield from bucket.runs(anchors)
        launch.close()

    def landed(self, anchors: dict[FlatAnchor, torch.Tensor]) -> Launch | None:
        """As `Reduction.landed`."""
        launch = Launch(self, ahead=1.0)
        for number in range(len(self.buckets)):
            bucket, here = self._anchors(number, launch)
            here.copy_(bucket.of(anchors[bucket.item]))
        return launch

    def _anchors(self, number: int, launch: Launch) -> tuple[Bucket, torch.Tensor]:
        rows, _ = self._rows(number, launch.memory, ahead=launch.is_ahead)
        bucket, anchors, _ = self.ends.gathered(number, launch, rows)
        return bucket, anchors

    def summed(self, values: list[float]) -> list[float]:
        """As `Reduction.summed`: every owner has counted its own shards."""
        return self._communicator.gather_header(values).sum(0).tolist()


@dataclass(eq=False)
class _InTwoStages:
    """One bucket's, under way."""

    communicator: Communicator
    ends: Ends
    number: int
    square: torch.Tensor  # weighted: of what this worker brought
    outgoing: torch.Tensor  # then what comes from all owners
    incoming: torch.Tensor
    to_owners: Arrival
    to_all: Callable[[], None] | None = None

    def share(self, launch: Launch, total: Sum) -> None:
        """Start the second stage."""
        mine = self.ends.share(self.number, launch, total, self.square, self.incoming)
        self.to_all = self.communicator.start_all_gather(self.outgoing, mine)


@dataclass(eq=False)
class _SumForAll(_InTwoStages):
    """
    The second stage is started by whoever comes first, `start_second_stages` between steps or the one who wants the
    result. A failure is the result's: between steps a process would fail alone.
    """

    failure: RuntimeError | None = None

    def start_second_stage(self, launch: Launch) -> None:
        """Wait for the first, and start it; once."""
        if self.to_all is not None or self.failure is not None:
            return
        try:
            self.to_owners()
            self.share(launch, self.ends.sum_(self.number, launch, self.incoming))
        except RuntimeError as failure:
            self.failure = failure

    def result(self, launch: Launch) -> Sum:
        """Wait for both."""
        self.drain(launch)
        return self.ends.gathered(self.number, launch, self.outgoing)

    def updated(self, launch: Launch) -> None:
        """All have used the same."""

    def drain(self, launch: Launch) -> None:
        """Wait for both, and leave what they bring."""
        self.start_second_stage(launch)
        if self.failure is not None:
            raise self.failure
        assert self.to_all is not None
        self.to_all()


@dataclass(eq=False)
class _SumForOwner(_InTwoStages):
    """
    Where a shard's owner does the outer update between the stages the second brings new anchors: into the parameters
    at once where they are waited for.
    """

    total: Sum | None = None

    def result(self, launch: Launch) -> Sum:
        """Wait for the first stage: this worker's shard."""
        self.to_owners()
        self.total = self.ends.sum_(self.number, launch, self.incoming)
        return self.total

    def updated(self, launch: Launch) -> None:
        """Start the second."""
        assert self.total is not None
        self.share(launch, self.total)
        if not launch.is_ahead:
            self.arrived()
            bucket, anchors, _ = self.ends.gathered(self.number, launch, self.outgoing)
            bucket.unpack_(anchors)

    def arrived(self) -> None:
        """Wait for the second, if it was started."""
        if self.to_all is not None:
            self.to_all()

    def drain(self, launch: Launch) -> None:
        """Wait for what is under way."""
        self.to_owners() if self.to_all is None else self.to_all()
