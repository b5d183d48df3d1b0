"""Making workers agree: parameters cut into flat buckets of our own memory, and averages of any list of tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch

from .communicator import Communicator
from .round_report import Norms, squared_norm

T = TypeVar("T")


def flat_view(tensor: torch.Tensor) -> torch.Tensor:
    """All elements of a dense tensor in memory order, as a view: right for channels-last and other permuted strides.

    Raises:
        ValueError: The tensor's memory has holes or overlaps.
    """
    tensor = tensor.detach()
    if tensor.is_contiguous():
        return tensor.view(-1)
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride != expected:
            raise ValueError(f"memory is not dense: shape {tuple(tensor.shape)}, strides {tensor.stride()}.")
        expected *= size
    return tensor.as_strided((tensor.numel(),), (1,))


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of anchors, velocity and reductions: fp64 for fp64, fp32 for every other floating dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# Elements that the arithmetic of a round works on at a time, by device: on a CPU a run's message, anchor, velocity and
# parameter then stay in its cache from the first operation to the last. Elsewhere each operation is a kernel launch,
# and whole tensors are better.
CACHED_ELEMENTS = {"cpu": 2**18}
# Messages that are waited for: while one travels the next is packed and the last one taken in, so on a slow link a
# round costs little more than its bytes. Each is an eighth of what travels, for every one waits for the link's latency
# too, but this many bytes at least.
MESSAGE_BYTES = 16 * 2**20
_MOST_MESSAGES = 8
OWN_SLOTS = 2  # buffers from here on belong to one message each


@dataclass(eq=False)
class Piece:
    """A run of one parameter: what the arithmetic of a round works on at a time.

    Args:
        item (`FlatAnchor`): Where its anchor lies.
        param (`torch.Tensor`): The parameter.
        group (`int`): Its inner parameter group.
        start (`int`), stop (`int`): Its elements, in memory order.
        offset (`int`): Where they lie in the flat anchor.
        anchor (`torch.Tensor`): They themselves there, a view.
    """

    item: FlatAnchor
    param: torch.Tensor
    group: int
    start: int
    stop: int
    offset: int
    anchor: torch.Tensor

    def values(self) -> torch.Tensor:
        """The parameter's own elements, a view made anew: its memory may have been replaced."""
        return flat_view(self.param)[self.start : self.stop]

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """This run of another flat tensor, laid out like `item.flat`."""
        return flat[self.offset : self.offset + self.stop - self.start]


@dataclass(eq=False)
class Bucket:
    """A run of a flat anchor: what one message carries. `pieces` fill it without a gap, from `offset` on."""

    item: FlatAnchor
    offset: int
    elements: int
    pieces: list[Piece]

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """This run of another flat tensor, laid out like `item.flat`."""
        return flat[self.offset : self.offset + self.elements]

    def runs(self, message: torch.Tensor) -> list[tuple[Piece, torch.Tensor]]:
        """Every piece with its run of a message."""
        return [(p, message[p.offset - self.offset : p.offset - self.offset + p.stop - p.start]) for p in self.pieces]


@dataclass(eq=False)
class FlatAnchor:
    """
    The anchors on one device in one wide dtype, in one flat tensor; groups[i] is the inner parameter group of
    params[i].
    """

    flat: torch.Tensor
    params: list[torch.Tensor]
    groups: list[int]

    def anchors(self) -> list[torch.Tensor]:
        """One view per parameter, with the parameter's shape and strides."""
        return views_like(self.flat, self.params)

    def buckets(self, bucket_bytes: int) -> list[Bucket]:
        """Cut into runs of at most `bucket_bytes`; a tensor larger than that spans several."""
        longest = max(1, bucket_bytes // self.flat.element_size())
        cached = CACHED_ELEMENTS.get(self.flat.device.type, longest)
        pieces_of: dict[int, list[Piece]] = {}
        low = 0
        for param, group in zip(self.params, self.groups, strict=True):
            start = 0
            while start < param.numel():
                bucket, within = divmod(low + start, longest)
                stop = min(param.numel(), start + cached, start + longest - within)
                anchor = self.flat[low + start : low + stop]
                pieces_of.setdefault(bucket, []).append(Piece(self, param, group, start, stop, low + start, anchor))
                start = stop
            low += param.numel()
        return [Bucket(self, i * longest, min(longest, low - i * longest), pieces) for i, pieces in pieces_of.items()]


def views_like(flat: torch.Tensor, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Cut a flat tensor into views with the shapes and strides of `tensors`, one after the other."""
    views, offset = [], 0
    for tensor in tensors:
        views.append(flat.as_strided(tensor.shape, tensor.stride(), flat.storage_offset() + offset))
        offset += tensor.numel()
    return views


def flat_layouts(groups: Iterable[list[torch.Tensor]]) -> list[FlatAnchor]:
    """
    Where parameters lie in flat anchors, one per (device, wide dtype), group after group; `flat` has no memory yet
    ("meta").
    """
    found: dict[tuple[torch.device, torch.dtype], FlatAnchor] = {}
    for group, params in enumerate(groups):
        for param in params:
            dtype = wide_dtype(param.dtype)
            layout = found.setdefault(
                (param.device, dtype), FlatAnchor(torch.empty(0, dtype=dtype, device="meta"), [], [])
            )
            layout.params.append(param)
            layout.groups.append(group)
    for layout in found.values():
        layout.flat = layout.flat.new_empty(sum(p.numel() for p in layout.params))
    return list(found.values())


def flat_anchors(layouts: Iterable[FlatAnchor]) -> list[FlatAnchor]:
    """Copy parameters into fresh memory of these layouts."""
    anchors = []
    for layout in layouts:
        anchor = FlatAnchor(
            torch.empty_like(layout.flat, device=layout.params[0].device), layout.params, layout.groups
        )
        for view, param in zip(anchor.anchors(), anchor.params, strict=True):
            view.copy_(param.detach())
        anchors.append(anchor)
    return anchors


# What one bucket's message brings: the weighted sums over workers of the displacements, in a reused buffer, and of
# their squared norms.
Sum = tuple[Bucket, torch.Tensor, float]


def one_ahead(messages: Iterable[Callable[[], T]]) -> Iterator[T]:
    """Start the next message before the last one is waited for: it is packed while that travels."""
    under_way: Callable[[], T] | None = None
    for started in messages:
        if under_way:
            yield under_way()
        under_way = started
    if under_way:
        yield under_way()


class Base:
    """
    What a worker brings to an average, x_i, and takes from it. As it stands it is Local SGD: x_i is the parameters.

    Displacements are measured from an origin that is the same on every worker: here the anchor as it was handed back,
    rounded to the parameter's dtype.
    """

    def origin(self, piece: Piece) -> torch.Tensor:
        """What displacements are measured from."""
        return rounded(piece.anchor, piece.param.dtype)

    def shown_from(self, piece: Piece) -> torch.Tensor:
        """What the mean displacement is taken from where the average is shown."""
        return self.origin(piece)

    def displacement_(self, piece: Piece, out: torch.Tensor) -> None:
        """Write origin - x_i into `out`."""
        torch.sub(self.origin(piece), piece.values(), out=out)

    def own_displacement_(self, piece: Piece, out: torch.Tensor) -> None:
        """Write this worker's own pseudo-gradient into `out`, for rounds without an average."""
        self.displacement_(piece, out)

    def hand_back_(self, piece: Piece) -> None:
        """Start anew from the anchor: x_i, and the parameter."""
        piece.values().copy_(piece.anchor)

    def settle(self) -> None:
        """Wait for what is under way, and leave it due when it was."""

    def end_average(self) -> None:
        """What was under way is in the average."""

    def stay(self) -> None:
        """There was no round after all: what was launched is not waited for any more."""


class ExactAverager:
    """
    The exact average (line 6) by all-reduce, in two buffers that take turns.

    What travels is the displacement anchor - x_i, not x_i: the mean is the pseudo-gradient itself, free of the
    cancellation that anchor - mean(x_i) has, and the consensus distance follows from its norms without a message.

    Args:
        communicator (`Communicator`): The workers.
        bucket_bytes (`int`): Both buffers have no more.
        at_once (`bool`, *optional*, defaults to `False`): For `sums_at_once`: every message has a buffer of its own,
            of `bucket_bytes` at most.
    """

    def __init__(self, communicator: Communicator, bucket_bytes: int, *, at_once: bool = False) -> None:
        self.communicator = communicator
        self.bucket_bytes = bucket_bytes
        self._at_once = at_once
        self.weights, self.total_weight = [1.0] * communicator.world_size, float(communicator.world_size)
        self._buffers: dict[tuple[torch.device, torch.dtype, int], torch.Tensor] = {}
        self._own_squares: list[torch.Tensor] = []

    def weigh(self, weights: list[int]) -> None:
        """From now on worker i counts for weights[i] of their sum; equal ones, and all 0, are the plain mean."""
        even = len(set(weights)) == 1
        self.weights = [1.0 if even else float(weight) for weight in weights]
        self.total_weight = sum(self.weights)

    @property
    def weight(self) -> float:
        """This worker's."""
        return self.weights[self.communicator.rank]

    @property
    def own_is_finite(self) -> bool:
        """Whether this worker's own part of the last sums had neither NaN nor infinity."""
        return all(bool(torch.isfinite(square)) for square in self._own_squares)

    def take_anchors(self, layouts: list[FlatAnchor]) -> tuple[list[FlatAnchor], list[Bucket]]:
        """This worker's anchors, which begin with the parameters' values, and the buckets that cut them."""
        anchors = flat_anchors(layouts)
        return anchors, [bucket for item in anchors for bucket in self.buckets(item)]

    def buckets(self, item: FlatAnchor) -> list[Bucket]:
        """
        What each message carries. Those behind the computation have time enough, and starting one costs some: few and
        large.
        """
        if self._at_once:
            return item.buckets(self.bucket_bytes)
        return item.buckets(min(self._longest_message, max(MESSAGE_BYTES, -(-item.flat.nbytes // _MOST_MESSAGES))))

    def reserve(self, buckets: list[Bucket]) -> None:
        """
        Make the buffers of `sums` (`sums_at_once`) now, so that a round allocates nothing; those of the start's
        broadcast go.
        """
        self._buffers.clear()
        for number, bucket in enumerate(buckets):
            self._message(bucket, number)

    def _message(self, bucket: Bucket, number: int) -> torch.Tensor:
        """
        Memory for a bucket's message: two take turns, or each has its own, apart from what other averages use
        meanwhile.
        """
        slot = OWN_SLOTS + number if self._at_once else number % 2
        return self._buffer(bucket.elements + 1, bucket.item.flat.dtype, bucket.item.flat.device, slot)

    def _buffer(self, elements: int, dtype: torch.dtype, device: torch.device, slot: int = 0) -> torch.Tensor:
        key = (device, dtype, slot)
        if key not in self._buffers or self._buffers[key].numel() < elements:
            self._buffers[key] = torch.empty(elements, dtype=dtype, device=device)
        return self._buffers[key][:elements]

    def drop_residuals(self) -> None:
        """Forget what a round holds back for the next: here nothing."""

    def gather_states(self, states: list[torch.Tensor], *, keep: bool) -> list[torch.Tensor]:
        """
        Slow states laid out like this worker's anchors (they, velocities) as they are over all workers: see
        `ShardedAverager`.
        """
        return states

    def take_own_(self, states: list[torch.Tensor], wholes: list[torch.Tensor]) -> None:
        """The inverse: into slow state laid out like this worker's anchors goes what is its own of the whole."""
        for state, whole in zip(states, wholes, strict=True):
            state.copy_(whole)

    def over_workers(self, norms: Norms) -> Norms:
        """
        Of a round's whole pseudo-gradient and velocity, from those of the pieces that this worker has updated: here
        all.
        """
        return norms

    def sums(self, buckets: list[Bucket], base: Base) -> Iterator[Sum]:
        """What a round takes."""
        return self.exact_sums(buckets, base)

    def exact_sums(self, buckets: list[Bucket], base: Base) -> Iterator[Sum]:
        """
        Every bucket with the weighted sums over workers of origin - x_i, and of its squared norm, which rides in the
        last element of the same message. The next bucket is packed while one travels.

        Returns:
            `Iterator[Sum]`: The tensor lies in a reused buffer: use it before the next one.
        """
        return one_ahead(self._start_sums(buckets, base, self.weight))

    def sums_at_once(self, buckets: list[Bucket], base: Base, weight: float) -> Iterator[Sum]:
        """
        The same with all messages started before this returns, in buffers of their own: they travel until the iterator
        is read. `weight` is this worker's: the others' may not be known yet.
        """
        started = list(self._start_sums(buckets, base, weight))
        return (arrive() for arrive in started)

    def start_second_stages(self, *, wait: bool) -> None:
        """
        Of messages that travel, where an average takes two stages: here one is all.

        Args:
            wait (`bool`): For first stages that are still under way; else those stay as they are.
        """

    def _start_sums(self, buckets: list[Bucket], base: Base, weight: float) -> Iterator[Callable[[], Sum]]:
        self._own_squares = []
        for number, bucket in enumerate(buckets):
            yield self._start_sum(bucket, base, weight, self._message(bucket, number))

    def _start_sum(self, bucket: Bucket, base: Base, weight: float, message: torch.Tensor) -> Callable[[], Sum]:
        squares = []
        for piece, run in bucket.runs(message):
            base.displacement_(piece, run)
            squares.append(squared_norm(run))
            if weight != 1:
                run.mul_(weight)
        self._own_squares.append(torch.stack(squares).sum())
        message[-1] = weight * self._own_squares[-1]
        wait = self.communicator.start_sum_(message)

        def arrive() -> Sum:
            wait()
            return bucket, message[:-1], float(message[-1])

        return arrive

    def own_displacements(self, buckets: list[Bucket], base: Base) -> Iterator[Sum]:
        """
        The same for a round without an average: every bucket with this worker's own pseudo-gradient. Nothing is sent.
        """
        for bucket in buckets:
            message = self._buffer(bucket.elements, bucket.item.flat.dtype, bucket.item.flat.device)
            for piece, run in bucket.runs(message):
                base.own_displacement_(piece, run)
            yield bucket, message, 0.0

    def show_mean_(self, buckets: list[Bucket], base: Base) -> float:
        """
        Put the mean of the workers' x_i into this worker's parameters; returns the mean of the displacements' squared
        norm.
        """
        square_sum = 0.0
        for bucket, total, drift_square_sum in self.exact_sums(buckets, base):
            square_sum += drift_square_sum
            for piece, run in bucket.runs(total):
                run.div_(self.total_weight)
                piece.values().copy_(torch.sub(base.shown_from(piece), run, out=run))
        return square_sum / self.total_weight

    @property
    def _longest_message(self) -> int:
        """Bytes of one of the buffers that share `bucket_bytes`."""
        return self.bucket_bytes // 2

    def mean_(self, tensors: list[torch.Tensor]) -> None:
        """Replace floating-point tensors by their mean over workers, in place, every element exactly once."""
        self._each_bucket(tensors, wide_dtype, self._mean_)

    def _mean_(self, flat: torch.Tensor) -> None:
        if self.weight != 1:
            flat.mul_(self.weight)
        self.communicator.start_sum_(flat)()
        flat.div_(self.total_weight)

    def max_(self, tensors: list[torch.Tensor]) -> None:
        """Replace integer and boolean tensors by their maximum over workers, in place."""
        self._each_bucket(tensors, lambda _: torch.int64, self.communicator.max_)

    def broadcast_(self, tensors: list[torch.Tensor]) -> None:
        """Replace tensors of any dtype by the first rank's, bit for bit."""
        self._each_bucket(tensors, lambda dtype: dtype, self.communicator.broadcast_)

    def _each_bucket(
        self,
        tensors: list[torch.Tensor],
        wire_dtype: Callable[[torch.dtype], torch.dtype],
        collective: Callable[[torch.Tensor], None],
    ) -> None:
        if self.communicator.world_size == 1:
            return
        queues: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
        for tensor in tensors:
            queues.setdefault((tensor.device, wire_dtype(tensor.dtype)), []).append(tensor)
        for (device, dtype), queue in queues.items():
            shape_only = torch.empty(sum(t.numel() for t in queue), dtype=dtype, device="meta")
            for bucket in FlatAnchor(shape_only, queue, [0] * len(queue)).buckets(self._longest_message):
                flat = self._buffer(bucket.elements, dtype, device)
                for piece, run in bucket.runs(flat):
                    run.copy_(piece.values())
                collective(flat)
                for piece, run in bucket.runs(flat):
                    piece.values().copy_(run)


def rounded(anchor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The anchor's value as a parameter of `dtype` holds it, in the anchor's own dtype."""
    return anchor if dtype == anchor.dtype else anchor.to(dtype).to(anchor.dtype)
