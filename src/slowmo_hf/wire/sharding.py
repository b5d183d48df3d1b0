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

from dataclasses import dataclass
from itertools import cycle

import torch

from ..algorithm.layout import CACHED_ELEMENTS, Bucket, FlatAnchor, Piece, rounded
from ..algorithm.norms import squared_norm
from ..algorithm.outer_update import Sum
from ..algorithm.starts import Base
from ..contents import Contents, Restored, Saved
from .averages import Averages
from .reduction import Launch, Memory, nothing_held_back

_LEAST_MESSAGE_BYTES = 2**16  # of a small model: each message is filled up to a multiple of m elements
MESSAGES_AT_ONCE = 5  # of a bucket and the next, to and from all, and one more while gloo gathers


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


class Shards:
    """
    The ends of a round whose every shard is updated by its owner. No number is rounded.

    Args:
        averages (`Averages`): The workers.
        layouts (`list[FlatAnchor]`): The parameters'.
        bucket_bytes (`int`): Of all messages; of one where they travel behind the computation.
        state_device (`str`): Where the shards lie: `"same"` as the parameters, or `"cpu"`, in pinned memory where
            those are on a CUDA device.
        ahead (`bool`): Whether messages travel behind the computation.
    """

    def __init__(
        self, averages: Averages, layouts: list[FlatAnchor], bucket_bytes: int, state_device: str, *, ahead: bool
    ) -> None:
        self.averages = averages
        self.workers = averages.communicator.world_size
        self._bucket_bytes, self._ahead = bucket_bytes, ahead
        self._state_device = torch.device("cpu") if state_device == "cpu" else None
        cuts = [self._cut(layout) for layout in layouts]
        self.anchors = [item for item, _ in cuts]  # this worker's shards, one flat tensor per layout
        self._by_item = [shards for _, shards in cuts]
        self._shards = [shard for shards in self._by_item for shard in shards]
        self.buckets = [shard.whole for shard in self._shards]

    # ---- the cut ----

    def _cut(self, layout: FlatAnchor) -> tuple[FlatAnchor, list[Shard]]:
        wholes = layout.buckets(self._bytes_per_message(layout))
        lengths = [-(-whole.elements // self.workers) for whole in wholes]
        device = layout.device
        beside_gpu = device.type == "cuda" and self._state_device is not None  # every round copies it over: pinned
        flat = torch.zeros(
            sum(lengths), dtype=layout.flat.dtype, device=self._state_device or device, pin_memory=beside_gpu
        )
        item, shards, offset = FlatAnchor(flat, [], device, 0, flat.numel()), [], 0
        for whole, length in zip(wholes, lengths, strict=True):
            own = Bucket(item, offset, length, [])
            first = whole.offset + self.averages.communicator.rank * length
            for piece in whole.pieces:
                own.pieces += _part(piece, first, own)
            shards.append(Shard(whole, own))
            offset += length
        return item, shards

    def _bytes_per_message(self, layout: FlatAnchor) -> int:
        """Those that are waited for take no more together than `bucket_bytes`, nor than the parameters need."""
        if self._ahead:
            return self._bucket_bytes
        least = max(layout.flat.nbytes // MESSAGES_AT_ONCE, _LEAST_MESSAGE_BYTES)
        return min(self._bucket_bytes // MESSAGES_AT_ONCE, least)

    @property
    def own_buckets(self) -> list[Bucket]:
        """What this worker updates."""
        return [shard.own for shard in self._shards]

    def row_bytes(self, number: int) -> int:
        """A shard."""
        own = self._shards[number].own
        return own.elements * own.item.flat.element_size()

    def reserve(self, memory: Memory) -> None:
        """A round needs nothing beside the rows."""

    # ---- the round ----

    def pack_(self, number: int, launch: Launch, base: Base, rows: torch.Tensor) -> torch.Tensor:
        """Every shard of x_i, for its owner. Not the displacement: its anchor is there alone."""
        shard, squares = self._shards[number], []
        flat = self._wide(number, rows).view(-1)
        for piece, run in shard.whole.runs(flat):
            base.brought_(piece, run)
            squares.append(squared_norm(run))
        flat[shard.whole.elements :].zero_()
        return torch.stack(squares).sum()

    def sum_(self, number: int, launch: Launch, rows: torch.Tensor) -> Sum:
        """
        Into the first row comes the weighted sum of the displacements of all, in the order of workers; and their
        squared norm's.
        """
        own, wide = self._shards[number].own, self._wide(number, rows)
        square = torch.zeros((), dtype=torch.float64, device=rows.device)
        for piece, total in own.runs(wide[0]):
            anchor = rounded(piece.anchor, piece.param.dtype).to(rows.device)
            origin = torch.zeros_like(anchor[:1]) if launch.of_progress else anchor
            for row, weight in zip(wide, launch.weights, strict=True):
                run = row[piece.offset - own.offset :][: total.numel()]
                torch.sub(origin, run, out=run)
                square += weight * squared_norm(run)
                if weight != 1:
                    run.mul_(weight)
                if run.data_ptr() != total.data_ptr():
                    total.add_(run)
        device = rows.device if launch.shows else own.item.flat.device
        return own, wide[0].to(device), float(square)

    def share(self, number: int, launch: Launch, total: Sum, square: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """What this worker has made of its shard: its anchors, or what is shown."""
        own, shown, _ = total
        mine = shown if launch.shows else own.of(own.item.flat)
        return mine.to(rows.device).view(torch.uint8)

    def gathered(self, number: int, launch: Launch, rows: torch.Tensor) -> Sum:
        """What all have made of theirs."""
        whole = self._shards[number].whole
        return whole, self._wide(number, rows).view(-1)[: whole.elements], 0.0

    def _wide(self, number: int, rows: torch.Tensor) -> torch.Tensor:
        return rows.view(self._shards[number].own.item.flat.dtype)

    # ---- state ----

    def saved(self) -> Saved:
        """Nothing is held back."""
        return Saved()

    def restore(self, own: Contents, *, same_number: bool) -> Restored:
        """Nothing is taken up."""
        return nothing_held_back(own, same_number=same_number)

    def forget(self) -> None:
        """Nothing is held back."""

    def gather(self, states: list[torch.Tensor], *, keep: bool) -> list[torch.Tensor]:
        """
        Slow states laid out like this worker's shards, brought together in main memory. Collective over workers: one
        that has no room for them takes part to the end, and raises then.

        Args:
            states (`list[torch.Tensor]`): All anchors, then perhaps all velocities.
            keep (`bool`): False where this worker only sends its own: the tensors that it gets are empty.
        """
        cuts = list(zip(states, cycle(self._by_item), strict=False))
        found: list[torch.Tensor] = []
        failure: Exception | None = None
        try:
            for state, shards in cuts:
                found.append(
                    torch.empty(sum(shard.whole.elements for shard in shards) if keep else 0, dtype=state.dtype)
                )
        except (RuntimeError, MemoryError) as error:
            failure, keep = error, False
        communicator = self.averages.communicator
        with self.averages.pool.lent() as buffers:
            for index, (state, shards) in enumerate(cuts):
                for shard in shards:
                    device = shard.whole.item.device
                    mine = shard.own.of(state).to(device)
                    rows = buffers.get(self.workers * mine.nbytes, torch.uint8, device)
                    communicator.start_all_gather(rows.view(self.workers, -1), mine.view(torch.uint8))()
                    if keep:
                        shard.whole.of(found[index]).copy_(rows.view(state.dtype)[: shard.whole.elements])
        if failure is not None:
            raise failure
        return found

    def take_own_(self, states: list[torch.Tensor], wholes: list[torch.Tensor]) -> None:
        """The inverse, without a message."""
        # Without momentum there are no velocities.
        for state, whole, shards in zip(states, wholes, self._by_item, strict=False):
            for shard in shards:
                first = self.averages.communicator.rank * shard.own.elements
                part = shard.whole.of(whole)[first : first + shard.own.elements]
                shard.own.of(state)[: part.numel()].copy_(part)


def _part(piece: Piece, first: int, own: Bucket) -> list[Piece]:
    """
    What of a piece lies in a shard that begins at `first` of the whole layout, with the parameter's values in its
    anchors.
    """
    flat = own.item.flat
    cached = CACHED_ELEMENTS.get(flat.device.type, own.elements)
    low, high = max(piece.offset, first), min(piece.offset + piece.elements, first + own.elements)
    parts = []
    for begin in range(low, high, cached):
        end = min(begin + cached, high)
        offset = own.offset + begin - first
        start = piece.start + begin - piece.offset
        anchor = flat[offset : offset + end - begin]
        part = Piece(piece.param, piece.group, start, start + end - begin, own.item, offset, anchor)
        part.anchor.copy_(part.values())
        parts.append(part)
    return parts
