"""Making workers agree: parameters cut into flat buckets of our own memory, and averages of any list of tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from .communicator import Communicator


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


@dataclass
class Bucket:
    """A run of a flat anchor: what one message carries.

    Args:
        anchor (`torch.Tensor`): The run itself, a view.
        pieces (`list`): (parameter, start, stop, offset): elements start to stop of the parameter lie at offset.
        parts (`list`): (inner parameter group, its run within `anchor`): one part per group that the bucket touches.
    """

    anchor: torch.Tensor
    pieces: list[tuple[torch.Tensor, int, int, int]]
    parts: list[tuple[int, torch.Tensor]]


@dataclass
class FlatAnchor:
    """The anchors on one device in one wide dtype, in one flat tensor; groups[i] is the inner parameter group of params[i]."""

    flat: torch.Tensor
    params: list[torch.Tensor]
    groups: list[int]

    def anchors(self) -> list[torch.Tensor]:
        """One view per parameter, with the parameter's shape and strides."""
        return views_like(self.flat, self.params)

    def buckets(self, bucket_bytes: int) -> list[Bucket]:
        """Cut into runs of at most `bucket_bytes`; a tensor larger than that spans several."""
        longest = max(1, bucket_bytes // self.flat.element_size())
        bounds = [0]
        for param in self.params:
            bounds.append(bounds[-1] + param.numel())
        return [self._bucket(bounds, start, min(start + longest, bounds[-1])) for start in range(0, bounds[-1], longest)]

    def _bucket(self, bounds: list[int], start: int, stop: int) -> Bucket:
        anchor = self.flat[start:stop]
        pieces = []
        ends: dict[int, tuple[int, int]] = {}
        for param, group, low, high in zip(self.params, self.groups, bounds, bounds[1:], strict=False):
            first, last = max(start, low), min(stop, high)
            if first < last:
                pieces.append((param, first - low, last - low, first - start))
                ends[group] = (ends.get(group, (first, 0))[0], last)
        return Bucket(anchor, pieces, [(group, anchor[first - start : last - start]) for group, (first, last) in ends.items()])


def views_like(flat: torch.Tensor, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Cut a flat tensor into views with the shapes and strides of `tensors`, one after the other."""
    views, offset = [], 0
    for tensor in tensors:
        views.append(flat.as_strided(tensor.shape, tensor.stride(), flat.storage_offset() + offset))
        offset += tensor.numel()
    return views


def flat_anchors(groups: Iterable[list[torch.Tensor]]) -> list[FlatAnchor]:
    """Copy parameters into fresh flat anchors: one per (device, wide dtype), group after group."""
    found: dict[tuple[torch.device, torch.dtype], FlatAnchor] = {}
    for group, params in enumerate(groups):
        for param in params:
            dtype = wide_dtype(param.dtype)
            anchor = found.setdefault((param.device, dtype), FlatAnchor(torch.empty(0, dtype=dtype, device=param.device), [], []))
            anchor.params.append(param)
            anchor.groups.append(group)
    for anchor in found.values():
        anchor.flat = anchor.flat.new_empty(sum(p.numel() for p in anchor.params))
        for view, param in zip(anchor.anchors(), anchor.params, strict=True):
            view.copy_(param.detach())
    return list(found.values())


class ExactAverager:
    """
    The exact average (line 6) by all-reduce, in one reused buffer of at most `bucket_bytes`.

    What travels is the displacement anchor - x_i, not x_i: the mean is the pseudo-gradient itself, free of the cancellation
    that anchor - mean(x_i) has, and the consensus distance follows from its norms without a message.
    """

    def __init__(self, communicator: Communicator, bucket_bytes: int) -> None:
        self.communicator = communicator
        self.bucket_bytes = bucket_bytes
        self._buffers: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}

    def reserve(self, anchors: list[FlatAnchor]) -> None:
        """Make the buffers now, so that a round allocates nothing; those of the start's broadcast go."""
        self._buffers.clear()
        for item in anchors:
            elements = min(item.flat.numel(), self.bucket_bytes // item.flat.element_size())
            self._buffer(elements + 1, item.flat.dtype, item.flat.device)

    def _buffer(self, elements: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        key = (device, dtype)
        if key not in self._buffers or self._buffers[key].numel() < elements:
            self._buffers[key] = torch.empty(elements, dtype=dtype, device=device)
        return self._buffers[key][:elements]

    def mean_displacement(self, bucket: Bucket) -> tuple[torch.Tensor, float]:
        """
        The mean over workers of anchor - x_i, and of its squared norm, which rides in the last element of the same message.
        The anchor counts as it was handed back: rounded to the parameter's dtype.

        Returns:
            `tuple[torch.Tensor, float]`: The first lies in the reused buffer: use it before the next call.
        """
        message = self._buffer(bucket.anchor.numel() + 1, bucket.anchor.dtype, bucket.anchor.device)
        displacement = message[:-1]
        for param, start, stop, offset in bucket.pieces:
            handed_back = _rounded(bucket.anchor[offset : offset + stop - start], param.dtype)
            torch.sub(handed_back, flat_view(param)[start:stop], out=displacement[offset : offset + stop - start])
        message[-1] = squared_norm(displacement)
        self.communicator.mean_(message)
        return displacement, float(message[-1])

    def show_mean_(self, bucket: Bucket) -> None:
        """Put the mean of the workers' parameters into this worker's own."""
        mean_displacement, _ = self.mean_displacement(bucket)
        for param, start, stop, offset in bucket.pieces:
            handed_back = _rounded(bucket.anchor[offset : offset + stop - start], param.dtype)
            average = mean_displacement[offset : offset + stop - start]
            flat_view(param)[start:stop].copy_(torch.sub(handed_back, average, out=average))

    def mean_(self, tensors: list[torch.Tensor]) -> None:
        """Replace floating-point tensors by their mean over workers, in place, every element exactly once."""
        self._each_bucket(tensors, wide_dtype, self.communicator.mean_)

    def max_(self, tensors: list[torch.Tensor]) -> None:
        """Replace integer and boolean tensors by their maximum over workers, in place."""
        self._each_bucket(tensors, lambda _: torch.int64, self.communicator.max_)

    def broadcast_(self, tensors: list[torch.Tensor]) -> None:
        """Replace tensors of any dtype by rank 0's, bit for bit."""
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
            for bucket in FlatAnchor(shape_only, queue, [0] * len(queue)).buckets(self.bucket_bytes):
                flat = self._buffer(bucket.anchor.numel(), dtype, device)
                for tensor, start, stop, offset in bucket.pieces:
                    flat[offset : offset + stop - start].copy_(flat_view(tensor)[start:stop])
                collective(flat)
                for tensor, start, stop, offset in bucket.pieces:
                    flat_view(tensor)[start:stop].copy_(flat[offset : offset + stop - start])


def _rounded(anchor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The anchor's value as a parameter of `dtype` holds it, in the anchor's own dtype."""
    return anchor if dtype == anchor.dtype else anchor.to(dtype).to(anchor.dtype)


def squared_norm(flat: torch.Tensor) -> float:
    """The squared 2-norm."""
    # In rows, summed in fp64: one fp32 norm over 60 million elements was measured up to 4 % low.
    rows = flat.numel() // 4096
    parts = [torch.linalg.vector_norm(flat[: rows * 4096].view(rows, 4096), dim=1), torch.linalg.vector_norm(flat[rows * 4096 :]).view(1)]
    return float(torch.cat(parts).double().square().sum())
