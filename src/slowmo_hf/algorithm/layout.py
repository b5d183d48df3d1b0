"""Where parameters lie in flat memory of our own: anchors, the buckets that messages carry, the pieces worked on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch

from ..contents import Contents
from ..dtensors import local
from ..upstream import copy_each_

# Elements that the arithmetic of a round works on at a time, by device: on a CPU a run's message, anchor, velocity and
# parameter then stay in its cache from the first operation to the last. Elsewhere each operation is a kernel launch,
# and whole tensors are better.
CACHED_ELEMENTS = {"cpu": 2**18}
# Of a chunk elsewhere, which has several tensors: what is computed on the way stays small beside the model.
CHUNK_ELEMENTS = 2**22


def flat_view(tensor: torch.Tensor) -> torch.Tensor:
    """
    All elements of a dense tensor that this process has, in memory order, as a view: right for channels-last and other
    permuted strides.

    Raises:
        ValueError: The tensor's memory has holes or overlaps.
    """
    tensor = local(tensor).detach()
    if tensor.is_contiguous():
        return tensor.view(-1)
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride != expected:
            raise ValueError(f"memory is not dense: shape {tuple(tensor.shape)}, strides {tensor.stride()}.")
        expected *= size
    return tensor.as_strided((tensor.numel(),), (1,))


def has_dense_memory(tensor: torch.Tensor) -> bool:
    """Whether `flat_view` has a view of it."""
    if tensor.layout != torch.strided:
        return False
    try:
        flat_view(tensor)
    except ValueError:
        return False
    return True


def strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """Those that tell the order of its memory: of dimensions that have one element they say nothing."""
    if tensor.numel() <= 1:
        return ()
    return tuple(stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size != 1)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of anchors, velocity and reductions: fp64 for fp64, fp32 for every other floating dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(eq=False)
class Span:
    """
    A run of one parameter.

    Args:
        param (`torch.Tensor`): The parameter.
        group (`int`): Its inner parameter group.
        start (`int`), stop (`int`): Its elements, of those that this process has, in memory order; so many `elements`.
    """

    param: torch.Tensor
    group: int
    start: int
    stop: int
    elements: int = field(init=False)  # read for every span of every round, view and exchange

    def __post_init__(self) -> None:
        self.elements = self.stop - self.start

    def values(self) -> torch.Tensor:
        """The parameter's own elements, a view made anew: its memory may have been replaced."""
        flat = flat_view(self.param)
        return flat if flat.numel() == self.elements else flat[self.start : self.stop]

    def view_of(self, run: torch.Tensor) -> torch.Tensor:
        """As many elements in other memory: with the parameter's shape and strides, where this is all of it."""
        own = local(self.param)
        return run.as_strided(own.shape, own.stride()) if self.elements == own.numel() else run


@dataclass(eq=False)
class Piece(Span):
    """
    What the arithmetic of a round works on at a time.

    Args:
        item (`FlatAnchor`): Where its anchor lies.
        offset (`int`): From where on.
        anchor (`torch.Tensor`): The elements there, a view.
    """

    item: FlatAnchor
    offset: int
    anchor: torch.Tensor

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """This run of another flat tensor, laid out like `item.flat`."""
        return flat[self.offset : self.offset + self.elements]


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
        return [(p, message[p.offset - self.offset : p.offset - self.offset + p.elements]) for p in self.pieces]

    def pack_(self, message: torch.Tensor) -> None:
        """Copy the parameters' elements into a message."""
        copy_each_(self._split(message), [piece.values() for piece in self.pieces])

    def unpack_(self, message: torch.Tensor) -> None:
        """The inverse of `pack_`."""
        copy_each_([piece.values() for piece in self.pieces], self._split(message))

    def _split(self, message: torch.Tensor) -> list[torch.Tensor]:
        """The runs alone, in a third of the time: gossip asks at every step."""
        return list(message.split_with_sizes([piece.elements for piece in self.pieces]))

    def chunks(self) -> list[Bucket]:
        """
        Cut between pieces, where the dtype of parameters changes and before it is too long; a longer piece is alone.
        """
        chunks: list[Bucket] = []
        longest = CACHED_ELEMENTS.get(self.item.flat.device.type, CHUNK_ELEMENTS)
        for piece in self.pieces:
            last = chunks[-1] if chunks else None
            if last and piece.param.dtype == last.dtype and last.elements + piece.elements <= longest:
                last.pieces.append(piece)
                last.elements += piece.elements
            else:
                chunks.append(Bucket(self.item, piece.offset, piece.elements, [piece]))
        return chunks

    @property
    def dtype(self) -> torch.dtype:
        """The first parameter's; of a chunk all parameters'."""
        return self.pieces[0].param.dtype


@dataclass(eq=False)
class FlatAnchor:
    """
    The anchors on one device in one wide dtype, in one flat tensor.

    Args:
        flat (`torch.Tensor`): They themselves; a layout alone has no memory ("meta").
        spans (`list[Span]`): What lies there, one after the other.
        device (`torch.device`): The parameters'.
        first (`int`): Where it begins in the layout that it is a part of,
        whole_elements (`int`): which has so many.
    """

    flat: torch.Tensor
    spans: list[Span]
    device: torch.device
    first: int
    whole_elements: int

    def runs(self, flat: torch.Tensor) -> Iterator[tuple[Span, torch.Tensor]]:
        """Every span with its run of a flat tensor that is laid out like this one."""
        at = 0
        for span in self.spans:
            yield span, flat[at : at + span.elements]
            at += span.elements

    def views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """One view per span of a flat tensor that is laid out like this one: `Span.view_of`."""
        return [span.view_of(run) for span, run in self.runs(flat)]

    def anchors(self) -> list[torch.Tensor]:
        """The views of its own."""
        return self.views(self.flat)

    def buckets(self, bucket_bytes: int) -> list[Bucket]:
        """Cut into runs of at most `bucket_bytes`; a tensor larger than that spans several."""
        longest = max(1, bucket_bytes // self.flat.element_size())
        cached = CACHED_ELEMENTS.get(self.flat.device.type, longest)
        pieces_of: dict[int, list[Piece]] = {}
        low = 0
        for span in self.spans:
            start = 0
            while start < span.elements:
                bucket, within = divmod(low + start, longest)
                stop = min(span.elements, start + cached, start + longest - within)
                pieces_of.setdefault(bucket, []).append(
                    Piece(
                        item=self,
                        param=span.param,
                        group=span.group,
                        start=span.start + start,
                        stop=span.start + stop,
                        offset=low + start,
                        anchor=self.flat[low + start : low + stop],
                    )
                )
                start = stop
            low += span.elements
        return [Bucket(self, i * longest, min(longest, low - i * longest), pieces) for i, pieces in pieces_of.items()]

    def part(self, place: int, places: int) -> FlatAnchor:
        """The layout of one of `places` equal parts, of which the last may be shorter."""
        elements = self.flat.numel()
        length = -(-elements // places)
        first, last = min(elements, place * length), min(elements, (place + 1) * length)
        spans, at = [], 0
        for span in self.spans:
            start, stop = max(first - at, 0), min(last - at, span.elements)
            if start < stop:
                spans.append(replace(span, start=span.start + start, stop=span.start + stop))
            at += span.elements
        return FlatAnchor(self.flat.new_empty(last - first, device="meta"), spans, self.device, first, elements)

    def of_checkpoint(self, contents: Contents, name: str) -> torch.Tensor:
        """
        A tensor of a checkpoint that is laid out like this; or like the whole, of which this part is taken.

        Raises:
            CheckpointError: It is missing, does not fit, or is not finite.
        """
        found, whole = contents.tensors.get(name), self.flat.new_empty(self.whole_elements, device="meta")
        if found is None or found.shape != whole.shape:
            return contents.tensor(name, self.flat)
        return contents.tensor(name, whole)[self.first : self.first + self.flat.numel()]


def flat_layouts(
    groups: Iterable[list[torch.Tensor]], wide: Callable[[torch.dtype], torch.dtype] = wide_dtype
) -> list[FlatAnchor]:
    """
    Where tensors lie in flat anchors, one per (device, wide dtype), group after group; of DTensors this process's
    shards.
    """
    found: dict[tuple[torch.device, torch.dtype], list[Span]] = {}
    for group, params in enumerate(groups):
        for param in params:
            spans = found.setdefault((param.device, wide(param.dtype)), [])
            elements = local(param).numel()
            if elements:
                spans.append(Span(param, group, 0, elements))
    layouts = []
    for (device, dtype), spans in found.items():
        elements = sum(span.elements for span in spans)
        layouts.append(FlatAnchor(torch.empty(elements, dtype=dtype, device="meta"), spans, device, 0, elements))
    return layouts


def flat_anchors(layouts: Iterable[FlatAnchor]) -> list[FlatAnchor]:
    """Copy parameters into fresh memory of these layouts."""
    anchors = []
    for layout in layouts:
        anchor = replace(layout, flat=torch.empty_like(layout.flat, device=layout.device))
        for span, run in anchor.runs(anchor.flat):
            run.copy_(span.values())
        anchors.append(anchor)
    return anchors


def rounded(anchor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The anchor's value as a parameter of `dtype` holds it, in the anchor's own dtype."""
    return anchor if dtype == anchor.dtype else anchor.to(dtype).to(anchor.dtype)
