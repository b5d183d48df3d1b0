"""Where parameters lie in flat memory of our own: anchors, the buckets that messages carry, the pieces worked on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

# Elements that the arithmetic of a round works on at a time, by device: on a CPU a run's message, anchor, velocity and
# parameter then stay in its cache from the first operation to the last. Elsewhere each operation is a kernel launch,
# and whole tensors are better.
CACHED_ELEMENTS = {"cpu": 2**18}


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
        flat = flat_view(self.param)
        return flat if flat.numel() == self.stop - self.start else flat[self.start : self.stop]

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


def rounded(anchor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The anchor's value as a parameter of `dtype` holds it, in the anchor's own dtype."""
    return anchor if dtype == anchor.dtype else anchor.to(dtype).to(anchor.dtype)
