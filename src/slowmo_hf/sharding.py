"""
Slow state sharded over workers (`shard_slow_state`): of every bucket, worker r alone keeps the anchors and the
velocity of shard r.

    shard r of every x_i goes to worker r    all-to-all
    pseudo_grad = mean_i(anchor - x_i)       line 6, on shard r by worker r
    velocity, anchor                         lines 7 and 8, on shard r by worker r    PiecewiseUpdate.update_
    x_i = every shard's anchor               all-gather

These are the two halves of a ring all-reduce, with the update between them: its bytes, and 2P/m of slow state in place
of 2P. For an optimizer's state inside data-parallel training this is ZeRO's first stage (Rajbhandari et al. 2019,
https://huggingface.co/papers/1910.02054).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle

import torch

from .averager import CACHED_ELEMENTS, Base, Bucket, ExactAverager, FlatAnchor, Piece, Sum, one_ahead
from .communicator import Communicator
from .round_report import Norms, squared_norm

_LEAST_MESSAGE_BYTES = 2**16  # of a small model: each message is filled up to a multiple of m elements


@dataclass(eq=False)
class Shard:
    """
    This worker's part of a bucket.

    Args:
        whole (`Bucket`): The bucket; its pieces have no anchors of their own.
        own (`Bucket`): The part: `elements` of it in a flat tensor of this worker's shards, the last ones of a bucket
            filled up.
    """

    whole: Bucket
    own: Bucket


@dataclass(eq=False)
class Reduced:
    """A shard's sum, behind the all-to-all."""

    shard: Shard
    total: torch.Tensor
    drift_square_sum: float
    rows: torch.Tensor  # for what is handed out


class ShardedAverager(ExactAverager):
    """
    An average whose sums reach each worker for its own shard alone; what becomes of them there goes to all. Buffers
    and inner states are averaged as ever.

    Memory: messages to and from all, of one bucket and the next.

    Args:
        communicator (`Communicator`): The workers.
        bucket_bytes (`int`): Of all messages.
        state_device (`str`): Where the shards lie: `"same"` as the parameters, or `"cpu"`, in pinned memory where
            those are on a CUDA device.
    """

    def __init__(self, communicator: Communicator, bucket_bytes: int, state_device: str) -> None:
        super().__init__(communicator, bucket_bytes)
        self.workers = communicator.world_size
        self._state_device = torch.device("cpu") if state_device == "cpu" else None
        self._shards: list[list[Shard]] = []  # by item

    # ---- the cut ----

    def take_anchors(self, layouts: list[FlatAnchor]) -> tuple[list[FlatAnchor], list[Bucket]]:
        """This worker's shards, one flat tensor per layout, and the buckets that cut them."""
        cuts = [self._cut(layout) for layout in layouts]
        self._shards = [shards for _, shards in cuts]
        return [item for item, _ in cuts], [shard.own for shard in self._all_shards()]

    def buckets(self, item: FlatAnchor) -> list[Bucket]:
        """
        Four messages, of a bucket and the next, are there at once, and a fifth while gloo gathers: together no more
        than `bucket_bytes`, nor than the parameters need.
        """
        return item.buckets(min(self._longest_message, max(item.flat.nbytes // 5, _LEAST_MESSAGE_BYTES)))

    @property
    def _longest_message(self) -> int:
        return self.bucket_bytes // 5

    def _cut(self, layout: FlatAnchor) -> tuple[FlatAnchor, list[Shard]]:
        wholes = self.buckets(layout)
        lengths = [-(-whole.elements // self.workers) for whole in wholes]
        device = layout.params[0].device
        beside_gpu = device.type == "cuda" and self._state_device is not None  # every round copies it over: pinned
        flat = torch.zeros(
            sum(lengths), dtype=layout.flat.dtype, device=self._state_device or device, pin_memory=beside_gpu
        )
        item, shards, offset = FlatAnchor(flat, [], []), [], 0
        for whole, length in zip(wholes, lengths, strict=True):
            own = Bucket(item, offset, length, [])
            first = whole.offset + self.communicator.rank * length
            for piece in whole.pieces:
                own.pieces += _part(piece, first, own)
            shards.append(Shard(whole, own))
            offset += length
        return item, shards

    def reserve(self, buckets: list[Bucket]) -> None:
        """Make the buffers."""
        self._buffers.clear()
        for number, shard in enumerate(self._all_shards()):
            self._messages(shard, number)

    def _messages(self, shard: Shard, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Memory of what goes to all and comes from all: a row per worker. Two buckets take turns."""
        elements, device = self.workers * shard.own.elements, shard.whole.pieces[0].param.device
        outgoing, incoming = (
            self._buffer(elements, shard.own.item.flat.dtype, device, 2 * (number % 2) + side) for side in (0, 1)
        )
        return outgoing.view(self.workers, -1), incoming.view(self.workers, -1)

    def _all_shards(self) -> list[Shard]:
        return [shard for shards in self._shards for shard in shards]

    # ---- the round ----

    def sums(self, buckets: list[Bucket], base: Base) -> Iterator[Sum]:
        """
        Every bucket of this worker's with the weighted sums over workers of origin - x_i, and of its squared norm. Its
        anchors go to all when the next one is asked for: they have been updated by then.
        """
        for reduced in one_ahead(self._send_all(base)):
            own = reduced.shard.own
            yield own, reduced.total.to(own.item.flat.device), reduced.drift_square_sum
            self._hand_out(reduced, own.of(own.item.flat))

    def show_mean_(self, buckets: list[Bucket], base: Base) -> float:
        """
        Put the mean of the workers' x_i into this worker's parameters; returns the mean of the displacements' squared
        norm.
        """
        square_sum = 0.0
        for reduced in one_ahead(self._send_all(base)):
            square_sum += reduced.drift_square_sum
            for piece, run in reduced.shard.own.runs(reduced.total):
                run.div_(self.total_weight)
                torch.sub(base.shown_from(piece).to(run.device), run, out=run)
            self._hand_out(reduced, reduced.total)
        return self._summed([square_sum / self.total_weight])[0]

    def over_workers(self, norms: Norms) -> Norms:
        """Each worker has counted its own shards."""
        return Norms.of(self._summed(norms.squares))

    def _summed(self, values: list[float]) -> list[float]:
        return self.communicator.gather_header(values).sum(0).tolist()

    def _send_all(self, base: Base) -> Iterator[Callable[[], Reduced]]:
        self._own_squares = []
        for number, shard in enumerate(self._all_shards()):
            yield self._send(shard, base, number)

    def _send(self, shard: Shard, base: Base, number: int) -> Callable[[], Reduced]:
        """Every shard of x_i to its owner. Not the displacement: its anchor is there alone."""
        outgoing, incoming = self._messages(shard, number)
        flat, squares = outgoing.view(-1), []
        for piece, run in shard.whole.runs(flat):
            run.copy_(piece.values())
            squares.append(squared_norm(run))
        flat[shard.whole.elements :].zero_()
        self._own_squares.append(torch.stack(squares).sum())
        wait = self.communicator.start_all_to_all(_bytes(flat), _bytes(incoming.view(-1)))

        def arrive() -> Reduced:
            wait()
            return Reduced(shard, incoming[0], self._sum_rows(shard.own, incoming, base), outgoing)

        return arrive

    def _sum_rows(self, own: Bucket, rows: torch.Tensor, base: Base) -> float:
        """
        Into the first row comes the weighted sum of the displacements of all, in the order of workers; returns their
        squared norm's.
        """
        square = torch.zeros((), dtype=torch.float64, device=rows.device)
        for piece, total in own.runs(rows[0]):
            origin = base.origin(piece).to(rows.device)
            for row, weight in zip(rows, self.weights, strict=True):
                run = row[piece.offset - own.offset :][: total.numel()]
                torch.sub(origin, run, out=run)
                square += weight * squared_norm(run)
                if weight != 1:
                    run.mul_(weight)
                if run.data_ptr() != total.data_ptr():
                    total.add_(run)
        return float(square)

    def _hand_out(self, reduced: Reduced, mine: torch.Tensor) -> None:
        """To all goes what this worker has made of its shard, and into the parameters what all have."""
        rows = self._gather(reduced.rows, mine.to(reduced.rows.device))
        for piece, run in reduced.shard.whole.runs(rows.view(-1)):
            piece.values().copy_(run)

    def _gather(self, rows: torch.Tensor, mine: torch.Tensor) -> torch.Tensor:
        self.communicator.start_all_gather(_bytes(rows.view(-1)).view(self.workers, -1), _bytes(mine))()
        return rows

    # ---- state ----

    def gather_states(self, states: list[torch.Tensor], *, keep: bool) -> list[torch.Tensor]:
        """
        Slow states laid out like this worker's shards, brought together in main memory. Collective over workers: one
        that has no room for them takes part to the end, and raises then.

        Args:
            states (`list[torch.Tensor]`): All anchors, then perhaps all velocities.
            keep (`bool`): False where this worker only sends its own: the tensors that it gets are empty.
        """
        cuts = list(zip(states, cycle(self._shards), strict=False))
        found: list[torch.Tensor] = []
        failure: Exception | None = None
        try:
            for state, shards in cuts:
                found.append(
                    torch.empty(sum(shard.whole.elements for shard in shards) if keep else 0, dtype=state.dtype)
                )
        except (RuntimeError, MemoryError) as error:
            failure, keep = error, False
        for index, (state, shards) in enumerate(cuts):
            for number, shard in enumerate(shards):
                outgoing, _ = self._messages(shard, number)
                rows = self._gather(outgoing, shard.own.of(state).to(outgoing.device)).view(-1)
                if keep:
                    shard.whole.of(found[index]).copy_(rows[: shard.whole.elements])
        if failure is not None:
            raise failure
        return found

    def take_own_(self, states: list[torch.Tensor], wholes: list[torch.Tensor]) -> None:
        """The inverse, without a message."""
        # Without momentum there are no velocities.
        for state, whole, shards in zip(states, wholes, self._shards, strict=False):
            for shard in shards:
                first = self.communicator.rank * shard.own.elements
                part = shard.whole.of(whole)[first : first + shard.own.elements]
                shard.own.of(state)[: part.numel()].copy_(part)


def _part(piece: Piece, first: int, own: Bucket) -> list[Piece]:
    """
    What of a piece lies in a shard that begins at `first` of the whole layout, with the parameter's values in its
    anchors.
    """
    flat = own.item.flat
    cached = CACHED_ELEMENTS.get(flat.device.type, own.elements)
    low, high = max(piece.offset, first), min(piece.offset + piece.stop - piece.start, first + own.elements)
    parts = []
    for begin in range(low, high, cached):
        end = min(begin + cached, high)
        offset = own.offset + begin - first
        start = piece.start + begin - piece.offset
        part = Piece(
            own.item, piece.param, piece.group, start, start + end - begin, offset, flat[offset : offset + end - begin]
        )
        part.anchor.copy_(part.values())
        parts.append(part)
    return parts


def _bytes(flat: torch.Tensor) -> torch.Tensor:
    return flat.view(torch.uint8)
