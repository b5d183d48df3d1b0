"""
Line 6: the workers' displacements to their sums. A reduction knows how; one launch of it has memory of its own, so
that several may travel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

import torch

from ..algorithm.layout import Bucket, FlatAnchor, Piece
from ..algorithm.norms import squared_norm
from ..algorithm.outer_update import Sum
from ..algorithm.starts import Base
from ..contents import Contents, Restored, Saved
from ..log import logger
from .averages import Averages, Buffers

T = TypeVar("T")
Memory = Callable[[int, torch.dtype, torch.device, int], torch.Tensor]  # elements, dtype, device, slot

# Messages that are waited for: while one travels the next is packed and the last one taken in, so on a slow link a
# round costs little more than its bytes. Each is an eighth of what travels, for every one waits for the link's latency
# too, but this many bytes at least.
MESSAGE_BYTES = 16 * 2**20
_MOST_MESSAGES = 8
HELD_BACK = "bucket_elements"  # a setting of a checkpoint whose run held back something in its reduction
OTHER_NUMBER = "it was saved by another number of workers"
OWN_SLOTS = 2  # buffers from here on belong to one message each


def bytes_per_message(item: FlatAnchor, bucket_bytes: int, *, ahead: bool) -> int:
    """
    Those behind the computation have time enough, and starting one costs some: few and large. Of the others two share
    `bucket_bytes`.
    """
    if ahead:
        return bucket_bytes
    return min(bucket_bytes // 2, max(MESSAGE_BYTES, -(-item.flat.nbytes // _MOST_MESSAGES)))


class Message(Protocol):
    """One bucket's, under way. It does not hold its launch, which holds it: slow state goes when it is let go."""

    def result(self, launch: Launch) -> Sum:
        """Wait for it."""

    def updated(self, launch: Launch) -> None:
        """What it brought has been used."""

    def drain(self, launch: Launch) -> None:
        """Wait for what is under way, and leave what it brings."""


class Reduction(Protocol):
    """
    How the workers' displacements become sums.

    Attributes:
        averages (`Averages`): The workers, their weights and message memory.
        updates_at_owners (`bool`): Whether each worker updates a part: an update is then collective, and new anchors
            travel behind it.
    """

    averages: Averages
    updates_at_owners: bool

    @property
    def payload_bytes(self) -> float:
        """What this process sends in a launch, by theory."""

    def reserve(self, buffers: Buffers) -> None:
        """Make what a launch needs now, so that a round allocates nothing."""

    def start(self, launch: Launch, base: Base) -> Iterator[Message]:
        """Every bucket's message, sent when it is asked for."""

    def start_second_stages(self, *, wait: bool) -> None:
        """
        Of launches that travel, where a reduction takes two stages that need no update between them.

        Args:
            wait (`bool`): For first stages that are still under way; else those stay as they are.
        """

    def read(self, launch: Launch) -> None:
        """All its sums have been used."""

    def new_anchors(self, launch: Launch | None) -> Iterator[tuple[Piece, torch.Tensor]]:
        """Behind the outer update: every piece of the parameters with its new anchor."""

    def landed(self, anchors: dict[FlatAnchor, torch.Tensor]) -> Launch | None:
        """
        Of a checkpoint's round, whose update is done: a launch whose new anchors, by layout, have come; None where
        they are in the anchors.
        """

    def summed(self, values: list[float]) -> list[float]:
        """Of the whole model, from those of the pieces that this worker updates."""

    def saved(self, *, agree: bool, keep: bool) -> Saved:
        """As `Part.saved`: what one round holds back for the next."""

    def restore(self, saved: Saved, *, same_number: bool) -> Restored:
        """As `Part.restore`."""

    def forget(self) -> None:
        """Begin with nothing held back, and nothing under way."""


def one_ahead(messages: Iterable[T]) -> Iterator[T]:
    """Start the next message before the last one is waited for: it is packed while that travels."""
    under_way: T | None = None
    for started in messages:
        if under_way is not None:
            yield under_way
        under_way = started
    if under_way is not None:
        yield under_way


class Launch:
    """
    One launch of a reduction: its memory, and what is still to be waited for.

    Args:
        reduction (`Reduction`): How.
        ahead (`float`, *optional*): This worker's weight where the others' are not known yet: all messages set out
            together, in buffers of their own, and travel until `sums` is read. None: each is sent when the one before
            it is wanted.
        shows (`bool`, *optional*, defaults to `False`): A mean is to be shown, and no anchor updated.
    """

    def __init__(self, reduction: Reduction, *, ahead: float | None = None, shows: bool = False) -> None:
        self.reduction, self.shows = reduction, shows
        self.is_ahead = ahead is not None
        self.weight = reduction.averages.weight if ahead is None else ahead
        self.weights = reduction.averages.weights  # of all; ahead they are known later
        self.of_progress = False  # since a step that has set out before
        self.own_squares: list[torch.Tensor] = []
        self.messages: Iterable[Message] = ()
        self._buffers: Buffers | None = reduction.averages.pool.take()

    def send(self, base: Base) -> None:
        """What this worker brings sets out; or, where it is not ahead, will do so bucket by bucket."""
        self.of_progress = base.away
        self.messages = self.reduction.start(self, base)
        if self.is_ahead:
            self.messages = list(self.messages)

    def memory(self, elements: int, dtype: torch.dtype, device: torch.device, slot: int = 0) -> torch.Tensor:
        """Some of its own."""
        assert self._buffers is not None
        return self._buffers.get(elements, dtype, device, slot)

    def sums(self) -> Iterator[Sum]:
        """
        Every bucket's: the weighted sums over workers of origin - x_i, and of its squared norm. Use each before the
        next.
        """
        if self.is_ahead:
            self.reduction.start_second_stages(wait=True)
        messages = self.messages
        if not self.is_ahead:  # a generator, which holds this launch: after an error it goes with its frame
            messages, self.messages = one_ahead(messages), ()
        for message in messages:
            yield message.result(self)
            message.updated(self)
        self.reduction.read(self)

    @property
    def own_is_finite(self) -> bool:
        """Whether this worker's own part had neither NaN nor infinity."""
        return all(bool(torch.isfinite(square)) for square in self.own_squares)

    def drain(self) -> None:
        """Wait for what is under way, and leave what it brings."""
        self.reduction.start_second_stages(wait=True)
        for message in self.messages:
            message.drain(self)
        self.close()

    def close(self) -> None:
        """Nothing of it is under way: its memory is free."""
        if self._buffers is not None:
            self.reduction.averages.pool.give(self._buffers)
        self._buffers, self.messages = None, ()


class UpdatedByAll:
    """
    What reductions share whose sums come to every worker, which updates all anchors itself.

    Args:
        averages (`Averages`): The workers.
        buckets (`list[Bucket]`): What messages carry, of the whole layout.
    """

    updates_at_owners = False

    def __init__(self, averages: Averages, buckets: list[Bucket]) -> None:
        self.averages, self.buckets = averages, buckets

    def read(self, launch: Launch) -> None:
        """As `Reduction.read`."""
        launch.close()

    def new_anchors(self, launch: Launch | None) -> Iterator[tuple[Piece, torch.Tensor]]:
        """This worker has updated them all."""
        return ((piece, piece.anchor) for bucket in self.buckets for piece in bucket.pieces)

    def landed(self, anchors: dict[FlatAnchor, torch.Tensor]) -> Launch | None:
        """They are in the anchors."""
        return None

    def summed(self, values: list[float]) -> list[float]:
        """They are of the whole model."""
        return values


class AllReduce(UpdatedByAll):
    """
    The exact average (line 6) by all-reduce.

    What travels is the displacement anchor - x_i, not x_i: the mean is the pseudo-gradient itself, free of the
    cancellation that anchor - mean(x_i) has, and the consensus distance follows from its norms without a message.

    Args:
        averages (`Averages`): The workers.
        buckets (`list[Bucket]`): Of the anchors, one message each.
        own_memory (`bool`): Whether every message has a buffer of its own, as those need that set out together; else
            two take turns.
    """

    def __init__(self, averages: Averages, buckets: list[Bucket], *, own_memory: bool) -> None:
        super().__init__(averages, buckets)
        self._own_memory = own_memory

    def reserve(self, buffers: Buffers) -> None:
        """As `Reduction.reserve`."""
        for number, bucket in enumerate(self.buckets):
            buffers.get(*self._place(bucket, number))

    @property
    def payload_bytes(self) -> float:
        """As `Reduction.payload_bytes`: a ring sends 2 (m-1)/m of each message."""
        m = self.averages.communicator.world_size
        return sum(2 * (m - 1) / m * (b.elements + 1) * b.item.flat.element_size() for b in self.buckets)

    def _place(self, bucket: Bucket, number: int) -> tuple[int, torch.dtype, torch.device, int]:
        slot = OWN_SLOTS + number if self._own_memory else number % 2
        return bucket.elements + 1, bucket.item.flat.dtype, bucket.item.flat.device, slot

    def start(self, launch: Launch, base: Base) -> Iterator[Message]:
        """As `Reduction.start`. The squared norm rides in the last element of its bucket's message."""
        weight = launch.weight
        for number, bucket in enumerate(self.buckets):
            message = launch.memory(*self._place(bucket, number))
            squares = []
            for piece, run in bucket.runs(message):
                base.displacement_(piece, run)
                squares.append(squared_norm(run))
                if weight != 1:
                    run.mul_(weight)
            launch.own_squares.append(torch.stack(squares).sum())
            message[-1] = weight * launch.own_squares[-1]
            yield _AllReduced(bucket, message, self.averages.communicator.start_sum_(message))

    def start_second_stages(self, *, wait: bool) -> None:
        """One stage is all."""

    def saved(self, *, agree: bool, keep: bool) -> Saved:
        """Nothing is held back."""
        return Saved()

    def restore(self, saved: Saved, *, same_number: bool) -> Restored:
        """Nothing is taken up."""
        return nothing_held_back(saved.own, same_number=same_number)

    def forget(self) -> None:
        """Nothing is held back."""


class _AllReduced:
    """A message of `AllReduce`."""

    def __init__(self, bucket: Bucket, message: torch.Tensor, wait: Callable[[], None]) -> None:
        self._bucket, self._message, self._wait = bucket, message, wait

    def result(self, launch: Launch) -> Sum:
        self._wait()
        return self._bucket, self._message[:-1], float(self._message[-1])

    def updated(self, launch: Launch) -> None:
        pass

    def drain(self, launch: Launch) -> None:
        self._wait()


def nothing_held_back(own: Contents, *, same_number: bool) -> Restored:
    """For reductions that hold nothing back: what another kind did is dropped, and that is said."""

    def take_up() -> None:
        if HELD_BACK in own.settings:
            why = "compression is off" if same_number else OTHER_NUMBER
            logger.warning("what compression has held back is dropped: %s", why)

    return take_up


def own_displacements(averages: Averages, buckets: list[Bucket], base: Base) -> Iterator[Sum]:
    """
    For a round without an average: every bucket with this worker's own pseudo-gradient. Nothing is sent.
    """
    with averages.pool.lent() as buffers:
        for bucket in buckets:
            message = buffers.get(bucket.elements, bucket.item.flat.dtype, bucket.item.flat.device)
            for piece, run in bucket.runs(message):
                base.own_displacement_(piece, run)
            yield bucket, message, 0.0


def show_mean_(reduction: Reduction, base: Base) -> tuple[float, bool]:
    """
    Put the mean of the workers' x_i into this worker's parameters.

    Returns:
        `tuple[float, bool]`: The mean of the displacements' squared norm, and whether this worker's own was finite.
    """
    launch = Launch(reduction, shows=True)
    launch.send(base)
    weight, square = reduction.averages.total_weight, 0.0
    for bucket, total, square_sum in launch.sums():
        square += square_sum
        elsewhere = bucket.item.flat.device != total.device  # a slow state in main memory
        for piece, run in bucket.runs(total):
            run.div_(weight)
            origin = base.shown_from(piece)
            piece.values().copy_(torch.sub(origin.to(run.device) if elsewhere else origin, run, out=run))
    return reduction.summed([square / weight])[0], launch.own_is_finite
