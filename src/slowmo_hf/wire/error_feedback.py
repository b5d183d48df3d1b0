r"""
Compressed rounds: the exact average in one or two bytes per element, with error feedback at both places that quantise.

A bucket is cut into m shards, one per worker, its owner. Q is quantise and dequantise, w_i a worker's weight, W their
sum:

    p_i     = w_i (anchor - x_i) + (W/m) e_i          worker i
    e_i    <- (m/W) (p_i - Q(p_i))                    its residual
    shard r of Q(p_1) ... Q(p_m) goes to worker r     all-to-all, and the weights
    s_r     = sum_i Q(p_i)[r] + (W/m) E_r             worker r, in fp32 at least
    E_r    <- (m/W) (s_r - Q(s_r))                    the shard owner's residual
    Q(s_1) ... Q(s_m) go to all                       all-gather
    pseudo_grad = Q(s) / W                            the same bytes, so the same bits, on all

What was applied over rounds, and the mean of what is held back, is the sum of the true displacements: quantisation
delays, it never loses. With unequal weights the residuals keep the unit of the plain mean (W = m).

Sources: error feedback, Karimireddy et al. 2019, EF-SGD (https://huggingface.co/papers/1901.09847); at both ends of
the exchange, Tang et al. 2019, DoubleSqueeze (https://huggingface.co/papers/1905.05957).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..algorithm.codec import BLOCK, Code
from ..algorithm.layout import Bucket, FlatAnchor
from ..algorithm.norms import squared_norm
from ..algorithm.outer_update import Sum
from ..algorithm.starts import Base
from ..contents import Contents, Restored, Saved
from ..log import logger
from .averages import Averages
from .reduction import HELD_BACK, OTHER_NUMBER, Launch, Memory

_RIDER_BYTES = 8  # one fp64 behind each shard: its sender's weight, then its owner's squared norm


def shard_elements(elements: int, workers: int) -> int:
    """Elements of each worker's shard of a bucket, in whole blocks: the last shards are filled up with zeros."""
    return -(-elements // (workers * BLOCK)) * BLOCK


@dataclass(eq=False)
class Residuals:
    """
    What one bucket's quantisation has held back; the message is made in its place.

    Args:
        bucket (`Bucket`): Where in the anchors.
        own (`torch.Tensor`): This worker's, as long as all m shards.
        owned (`torch.Tensor`): Of the sum of the shard that this worker owns.
    """

    bucket: Bucket
    own: torch.Tensor
    owned: torch.Tensor


class ErrorFeedback:
    """
    The ends of a round that travels quantised; all update. The squared norms are exact.

    Memory beyond the messages, per trainable element: 4 bytes of worker's residual and 4/m of shard owner's (8 for
    fp64).

    Behind the computation a worker knows its own weight alone, of order 1, and w_i stands for W/m in its own residual:
    one that has not trained since the last round keeps what it holds back.

    Args:
        averages (`Averages`): At least two workers.
        buckets (`list[Bucket]`): Of the anchors.
        code (`Code`): How to round.
    """

    def __init__(self, averages: Averages, buckets: list[Bucket], code: Code) -> None:
        self.averages, self.buckets, self.code = averages, buckets, code
        self.workers = averages.communicator.world_size
        self.residuals = [self._nothing(bucket) for bucket in buckets]

    def _nothing(self, bucket: Bucket) -> Residuals:
        flat, shard = bucket.item.flat, shard_elements(bucket.elements, self.workers)
        return Residuals(bucket, flat.new_zeros(self.workers * shard), flat.new_zeros(shard))

    def row_bytes(self, number: int) -> int:
        """A shard and its rider."""
        owned = self.residuals[number].owned
        return self.code.message_bytes(owned.numel(), owned.dtype) + _RIDER_BYTES

    def reserve(self, memory: Memory) -> None:
        """The sum of all shards."""
        for held in self.residuals:
            memory(held.own.numel(), held.own.dtype, held.own.device, 0)

    def pack_(self, number: int, launch: Launch, base: Base, rows: torch.Tensor) -> torch.Tensor:
        """Add the displacement to the residual, and quantise; every owner gets its shard, and this worker's weight."""
        bucket, message = self.buckets[number], self.residuals[number].own
        # W/m, what 1 in a residual is in a message.
        unit = launch.weight if launch.is_ahead else self.averages.total_weight / self.workers
        scratch = launch.memory(bucket.elements, message.dtype, message.device)
        squares = []
        _scale_(message, unit or 1.0)
        for (piece, run), (_, held) in zip(bucket.runs(scratch), bucket.runs(message), strict=True):
            base.displacement_(piece, run)
            squares.append(squared_norm(run))
            held.add_(run, alpha=launch.weight)
        for shard, row in zip(message.view(self.workers, -1), rows, strict=True):
            if unit:
                self.code.encode_(shard, row[:-_RIDER_BYTES])
            else:
                row.zero_()  # which says 0, and leaves the residual
        _riders(rows).fill_(launch.weight)
        _scale_(message, 1 / (unit or 1.0))
        return torch.stack(squares).sum()

    def sum_(self, number: int, launch: Launch, rows: torch.Tensor) -> Sum:
        """Into the residual of this worker's shard comes the sum of all."""
        owned = self.residuals[number].owned
        unit = float(_riders(rows).sum()) / self.workers
        _scale_(owned, unit)
        for row in rows:
            self.code.decode_(row[:-_RIDER_BYTES], owned, add=True)
        return self.buckets[number], owned, unit

    def share(self, number: int, launch: Launch, total: Sum, square: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """It is quantised, and goes to all; behind it its owner's squared norm."""
        _, owned, unit = total
        mine = rows[0]  # what came in has been read: its memory is free
        self.code.encode_(owned, mine[:-_RIDER_BYTES])
        mine[-_RIDER_BYTES:].view(torch.float64).copy_(square)
        _scale_(owned, 1 / unit)
        return mine

    def gathered(self, number: int, launch: Launch, rows: torch.Tensor) -> Sum:
        """The same on all."""
        bucket, owned = self.buckets[number], self.residuals[number].owned
        total = launch.memory(self.workers * owned.numel(), owned.dtype, owned.device)
        for shard, row in zip(total.view(self.workers, -1), rows, strict=True):
            self.code.decode_(row[:-_RIDER_BYTES], shard)
        return bucket, total[: bucket.elements], sum(_riders(rows).flatten().tolist())

    # ---- state ----

    def saved(self) -> Saved:
        """What is held back; and the buckets' sizes, which cut the shards."""
        tensors = {f"shard_residual.{number}": held.owned for number, held in enumerate(self.residuals)}
        for index, of_item in enumerate(self._by_item()):
            tensors[f"residual.{index}"] = _joined([held.own[: held.bucket.elements] for held in of_item])
        return Saved(own=Contents({HELD_BACK: self._sizes}, tensors))

    @property
    def _sizes(self) -> list[int]:
        return [held.bucket.elements for held in self.residuals]

    def _by_item(self) -> list[list[Residuals]]:
        found: dict[FlatAnchor, list[Residuals]] = {}
        for held in self.residuals:
            found.setdefault(held.bucket.item, []).append(held)
        return list(found.values())

    def restore(self, own: Contents, *, same_number: bool) -> Restored:
        """
        Check it. Where buckets have other sizes the shard owner's do not fit, and are dropped with a warning; where
        compression was off nothing was held back.
        """
        if HELD_BACK not in own.settings or not self.residuals:
            return self.forget
        if not same_number:
            return lambda: self._drop(OTHER_NUMBER)
        residuals = [
            (held, held.bucket.of(held.bucket.item.of_checkpoint(own, f"residual.{index}")))
            for index, of_item in enumerate(self._by_item())
            for held in of_item
        ]
        fits = own.numbers(HELD_BACK) == self._sizes
        owned = [
            (held.owned, own.tensor(f"shard_residual.{number}", held.owned))
            for number, held in enumerate(self.residuals if fits else [])
        ]

        def take_up() -> None:
            self.forget() if fits else self._drop("bucket_bytes now cuts other shards, of whose sums it is")
            for held, residual in residuals:
                held.own[: held.bucket.elements].copy_(residual)
            for mine, residual in owned:
                mine.copy_(residual)

        return take_up

    def _drop(self, why: str) -> None:
        self.forget()
        logger.warning("what compression has held back is dropped: %s", why)

    def forget(self) -> None:
        """Begin with nothing held back."""
        for held in self.residuals:
            held.own.zero_()
            held.owned.zero_()


def _joined(pieces: list[torch.Tensor]) -> torch.Tensor:
    """One after the other, in main memory: a save needs none on the device."""
    sizes = [piece.numel() for piece in pieces]
    joined = torch.empty(sum(sizes), dtype=pieces[0].dtype)
    for into, piece in zip(torch.split(joined, sizes), pieces, strict=True):
        into.copy_(piece)
    return joined


def _riders(rows: torch.Tensor) -> torch.Tensor:
    return rows[:, -_RIDER_BYTES:].view(torch.float64)


def _scale_(residual: torch.Tensor, factor: float) -> None:
    if factor != 1:  # workers that count alike, as a rule
        residual.mul_(factor)
