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

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import repeat

import torch

from .averager import CACHED_ELEMENTS, OWN_SLOTS, Base, Bucket, ExactAverager, FlatAnchor, Sum, one_ahead
from .communicator import Arrival, Communicator
from .round_report import squared_norm

# Elements with one scale. An outlier makes its own block coarse, so a small one is finer; a scale in 256 costs 1.6 %
# of an int8 message.
BLOCK = 256
CODES = {"bf16": torch.bfloat16, "int8": torch.int8}
_RIDER_BYTES = 8  # one fp64 behind each shard: its sender's weight, then its owner's squared norm
_MOST_TEMPORARY = 2**24  # elements that quantisation works on at a time where memory has no cache to fit


# ---- numbers ----


def quantise(values: torch.Tensor, code: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Round to codes and scales. int8: per block of `BLOCK` elements scale = max |x| / 127 and code = x / scale, to the
    nearest, ties to even, so |x - code scale| <= scale / 2. bf16: to the nearest, ties to even; no scales.

    Args:
        values (`torch.Tensor`): Flat, fp32 or fp64; for int8 a multiple of `BLOCK`.
        code (`torch.dtype`): `torch.int8` or `torch.bfloat16`.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Codes, and scales in the dtype of `values`.
    """
    if code == torch.bfloat16:
        return values.to(code), values.new_empty(0)
    blocks = values.view(-1, BLOCK)
    # A product, not a quotient by a number, which CUDA rounds otherwise than a CPU. The smallest normal number stands
    # in for 0 and for denormals, which are too coarse for a scale: what is below half of it becomes 0.
    scales = blocks.abs().amax(1).mul_(1 / 127).clamp_(min=torch.finfo(values.dtype).tiny)
    return (blocks / scales[:, None]).round_().clamp_(-127, 127).to(code).view(-1), scales


def dequantise(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The values that codes stand for, in the dtype of `scales`."""
    values = codes.to(scales.dtype)
    return values.view(-1, BLOCK).mul_(scales[:, None]).view(-1) if codes.dtype == torch.int8 else values


# ---- messages: scales, then codes, in bytes ----


def message_bytes(elements: int, code: torch.dtype, wide: torch.dtype) -> int:
    """Size of the message of a shard, a multiple of 8 so that the next one is aligned too."""
    scales = elements // BLOCK * wide.itemsize if code == torch.int8 else 0
    return -(-(scales + elements * code.itemsize) // 8) * 8


def shard_elements(elements: int, workers: int) -> int:
    """Elements of each worker's shard of a bucket, in whole blocks: the last shards are filled up with zeros."""
    return -(-elements // (workers * BLOCK)) * BLOCK


def encode_(values: torch.Tensor, message: torch.Tensor, code: torch.dtype) -> None:
    """Quantise into `message`; in `values` stays the error, what the message does not say."""
    for part, codes, scales in _parts(values, message, code):
        new_codes, new_scales = quantise(part, code)
        codes.copy_(new_codes)
        scales.copy_(new_scales)
        part.sub_(dequantise(new_codes, new_scales))


def decode_(message: torch.Tensor, out: torch.Tensor, code: torch.dtype, *, add: bool = False) -> None:
    """Write what `message` says into `out`, or add it there."""
    for part, codes, scales in _parts(out, message, code):
        part.add_(dequantise(codes, scales)) if add else part.copy_(dequantise(codes, scales))


def _parts(
    values: torch.Tensor, message: torch.Tensor, code: torch.dtype
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Values with the views of their codes and scales, in runs that stay in a processor's cache."""
    elements = values.numel()
    scale_bytes = elements // BLOCK * values.element_size() if code == torch.int8 else 0
    scales = message[:scale_bytes].view(values.dtype)
    codes = message[scale_bytes : scale_bytes + elements * code.itemsize].view(code)
    step = CACHED_ELEMENTS.get(values.device.type, _MOST_TEMPORARY)
    of_blocks = torch.split(scales, step // BLOCK) if scale_bytes else repeat(scales)
    return zip(torch.split(values, step), torch.split(codes, step), of_blocks, strict=False)


# ---- the round ----


class TwoStages:
    """
    One bucket's two stages: shards under way to their owners, then sums under way to all. The second is started by
    whoever comes first, `start_second_stages` between steps or the one who wants the result. A failure is the
    result's: between steps a leader would fail alone.
    """

    def __init__(self, to_owners: Arrival, share: Callable[[], Callable[[], Sum]]) -> None:
        self.to_owners = to_owners
        self._share = share
        self._to_all: Callable[[], Sum] | None = None
        self._failure: RuntimeError | None = None

    def start_second_stage(self) -> None:
        """Wait for the first, and start it; once."""
        if self._to_all is not None or self._failure is not None:
            return
        try:
            self.to_owners()
            self._to_all = self._share()
        except RuntimeError as failure:
            self._failure = failure

    def result(self) -> Sum:
        """Wait for both."""
        self.start_second_stage()
        if self._failure is not None:
            raise self._failure
        assert self._to_all is not None
        return self._to_all()


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


class CompressedAverager(ExactAverager):
    """
    An average whose rounds travel quantised. Looks, buffers and inner states are averaged as ever, and leave the
    residuals alone.

    Memory beyond `ExactAverager`'s, per trainable element: 4 bytes of worker's residual and 4/m of shard owner's (8
    for fp64), and messages to and from all for a bucket and the next (`at_once`: for all), together: 2 bytes with
    int8, 4 with bf16, per element.

    Behind the computation a worker knows its own weight alone, of order 1, and w_i stands for W/m in its own residual:
    one that has not trained since the last round keeps what it holds back.

    Args:
        communicator (`Communicator`): At least two workers.
        bucket_bytes (`int`): Of the uncompressed message.
        code (`torch.dtype`): `torch.int8` or `torch.bfloat16`.
        at_once (`bool`, *optional*, defaults to `False`): For `sums_at_once`: messages of their own for every bucket.
    """

    def __init__(
        self, communicator: Communicator, bucket_bytes: int, code: torch.dtype, *, at_once: bool = False
    ) -> None:
        super().__init__(communicator, bucket_bytes, at_once=at_once)
        self.code = code
        self._first_stages: deque[TwoStages] = deque()
        self.workers = communicator.world_size
        self._residuals: dict[tuple[FlatAnchor, int], Residuals] = {}

    def reserve(self, buckets: list[Bucket]) -> None:
        """Make the buffers and the residuals, which are 0."""
        super().reserve(buckets)
        self._residuals.clear()
        for number, bucket in enumerate(buckets):
            shard = shard_elements(bucket.elements, self.workers)
            flat = bucket.item.flat
            self._residuals[bucket.item, bucket.offset] = Residuals(
                bucket, flat.new_zeros(self.workers * shard), flat.new_zeros(shard)
            )
            self._buffer(self.workers * shard, flat.dtype, flat.device)
            self._messages(bucket, number)

    def sums(self, buckets: list[Bucket], base: Base) -> Iterator[Sum]:
        """
        As `ExactAverager.sums`, quantised. The next bucket is packed while one travels; the squared norms are exact.
        """
        unit = self.total_weight / self.workers  # W/m: what 1 in a residual is in a message
        return one_ahead(message.result for message in self._send_all(buckets, base, self.weight, unit))

    def sums_at_once(self, buckets: list[Bucket], base: Base, weight: float) -> Iterator[Sum]:
        """
        As `ExactAverager.sums_at_once`; second stages set out when first ones have come, at the latest when the
        iterator is read.
        """
        messages = list(self._send_all(buckets, base, weight, unit=weight))
        self._first_stages = deque(messages)
        self.communicator.owe(lambda: self.start_second_stages(wait=True))
        # NCCL wants one order over all its communicators: not one that depends on what is here.
        if not self.communicator.fails_cleanly:
            self.start_second_stages(wait=True)
        return self._results(messages)

    def _results(self, messages: list[TwoStages]) -> Iterator[Sum]:
        self.start_second_stages(wait=True)
        for message in messages:
            yield message.result()

    def start_second_stages(self, *, wait: bool) -> None:
        """In the buckets' order, the same on all workers."""
        while self._first_stages and (wait or self._first_stages[0].to_owners.is_here()):
            self._first_stages.popleft().start_second_stage()
            if not self._first_stages:
                self.communicator.owe(None)

    def _send_all(self, buckets: list[Bucket], base: Base, weight: float, unit: float) -> Iterator[TwoStages]:
        self._own_squares = []
        for number, bucket in enumerate(buckets):
            yield self._send(bucket, base, number, weight, unit)

    def _message(self, bucket: Bucket, number: int) -> torch.Tensor:
        """Of an exact average: none travels while another does."""
        return self._buffer(bucket.elements + 1, bucket.item.flat.dtype, bucket.item.flat.device, number % 2)

    def _messages(self, bucket: Bucket, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Memory of the messages to all and from all, shape (workers, bytes): a shard and its rider in a row."""
        flat = bucket.item.flat
        row = message_bytes(shard_elements(bucket.elements, self.workers), self.code, flat.dtype) + _RIDER_BYTES
        slot = OWN_SLOTS + 2 * number if self._at_once else 2 * (number % 2)
        outgoing, incoming = (
            self._buffer(self.workers * row, torch.uint8, flat.device, slot + side) for side in (0, 1)
        )
        return outgoing.view(self.workers, row), incoming.view(self.workers, row)

    def _send(self, bucket: Bucket, base: Base, number: int, weight: float, unit: float) -> TwoStages:
        """Add the displacement to the residual, quantise, and send every owner its shard, and this worker's weight."""
        message = self._residuals[bucket.item, bucket.offset].own
        scratch = self._buffer(bucket.elements, message.dtype, message.device)
        outgoing, incoming = self._messages(bucket, number)
        squares = []
        _scale_(message, unit or 1.0)
        for (piece, run), (_, held) in zip(bucket.runs(scratch), bucket.runs(message), strict=True):
            base.displacement_(piece, run)
            squares.append(squared_norm(run))
            held.add_(run, alpha=weight)
        self._own_squares.append(torch.stack(squares).sum())
        for shard, row in zip(message.view(self.workers, -1), outgoing, strict=True):
            if unit:
                encode_(shard, row[:-_RIDER_BYTES], self.code)
            else:
                row.zero_()  # which says 0, and leaves the residual
        _riders(outgoing).fill_(weight)
        _scale_(message, 1 / (unit or 1.0))
        square = weight * self._own_squares[-1]
        to_owners = self.communicator.start_all_to_all(outgoing.view(-1), incoming.view(-1))
        return TwoStages(to_owners, lambda: self._share(bucket, outgoing, incoming, square))

    def _share(
        self, bucket: Bucket, gathered: torch.Tensor, incoming: torch.Tensor, square: torch.Tensor
    ) -> Callable[[], Sum]:
        """
        Sum the shard that this worker owns, quantise it, and send it to all; behind each sum its owner's squared norm.
        """
        owned = self._residuals[bucket.item, bucket.offset].owned
        unit = float(_riders(incoming).sum()) / self.workers
        _scale_(owned, unit)
        for row in incoming:
            decode_(row[:-_RIDER_BYTES], owned, self.code, add=True)
        mine = incoming[0]  # what came in has been read, and what went out has gone: their memory is free
        encode_(owned, mine[:-_RIDER_BYTES], self.code)
        mine[-_RIDER_BYTES:].view(torch.float64).copy_(square)
        _scale_(owned, 1 / unit)
        wait = self.communicator.start_all_gather(gathered, mine)

        def arrive() -> Sum:
            wait()
            total = self._buffer(self.workers * owned.numel(), owned.dtype, owned.device)
            for shard, row in zip(total.view(self.workers, -1), gathered, strict=True):
                decode_(row[:-_RIDER_BYTES], shard, self.code)
            return bucket, total[: bucket.elements], sum(_riders(gathered).flatten().tolist())

        return arrive

    # ---- state ----

    def residuals(self) -> tuple[list[int], dict[str, torch.Tensor]]:
        """What is held back, for a checkpoint: the buckets' sizes, which cut the shards, and tensors by name."""
        tensors = {f"shard_residual.{number}": held.owned for number, held in enumerate(self._residuals.values())}
        for index, of_item in enumerate(self._by_item()):
            tensors[f"residual.{index}"] = torch.cat([held.own[: held.bucket.elements] for held in of_item])
        return self._sizes, tensors

    @property
    def _sizes(self) -> list[int]:
        return [held.bucket.elements for held in self._residuals.values()]

    def _by_item(self) -> list[list[Residuals]]:
        found: dict[FlatAnchor, list[Residuals]] = {}
        for held in self._residuals.values():
            found.setdefault(held.bucket.item, []).append(held)
        return list(found.values())

    def put_residuals(self, sizes: list[int], tensors: dict[str, torch.Tensor]) -> bool:
        """Take them up, in place. False where buckets have other sizes, and the shard owner's do not fit."""
        for index, of_item in enumerate(self._by_item()):
            for held in of_item:
                held.own[: held.bucket.elements].copy_(held.bucket.of(tensors[f"residual.{index}"]))
        if sizes != self._sizes:
            return False
        for number, held in enumerate(self._residuals.values()):
            held.owned.copy_(tensors[f"shard_residual.{number}"])
        return True

    def drop_residuals(self) -> None:
        """Begin with nothing held back, and nothing under way."""
        self._first_stages.clear()
        self.communicator.owe(None)
        for held in self._residuals.values():
            held.own.zero_()
            held.owned.zero_()


def _riders(rows: torch.Tensor) -> torch.Tensor:
    return rows[:, -_RIDER_BYTES:].view(torch.float64)


def _scale_(residual: torch.Tensor, factor: float) -> None:
    if factor != 1:  # workers that count alike, as a rule
        residual.mul_(factor)
