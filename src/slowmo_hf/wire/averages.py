"""Averages of any list of tensors over some processes, and the memory that messages lie in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from ..algorithm.layout import flat_layouts, wide_dtype
from .communicator import Communicator


class Buffers:
    """Message memory of what is under way together, by device, dtype and slot; each grows to what is asked of it."""

    def __init__(self) -> None:
        self.flat: dict[tuple[torch.device, torch.dtype, int], torch.Tensor] = {}

    def get(self, elements: int, dtype: torch.dtype, device: torch.device, slot: int = 0) -> torch.Tensor:
        """The first `elements` of one, with whatever it held."""
        key = (device, dtype, slot)
        if key not in self.flat or self.flat[key].numel() < elements:
            self.flat[key] = torch.empty(elements, dtype=dtype, device=device)
        return self.flat[key][:elements]


class Pool:
    """
    Buffers that are used again: whoever sends takes some, and gives them back when all has arrived. One set is kept,
    the last that was given; a view while a round is in flight has more for a while.
    """

    def __init__(self) -> None:
        self.free: list[Buffers] = []

    def take(self) -> Buffers:
        """Nobody else's until they are given back; those of a launch that is dropped never are."""
        return self.free.pop() if self.free else Buffers()

    def give(self, buffers: Buffers) -> None:
        """All that was under way in them has arrived."""
        self.free = [buffers]

    @contextmanager
    def lent(self) -> Iterator[Buffers]:
        """For collectives that are waited for."""
        buffers = self.take()
        yield buffers
        self.give(buffers)


class Averages:
    """
    Means, maxima and copies of lists of tensors over the processes of a communicator.

    Args:
        communicator (`Communicator`): The processes.
        longest_message (`int`): In bytes.
    """

    def __init__(self, communicator: Communicator, longest_message: int) -> None:
        self.communicator = communicator
        self.pool = Pool()
        self._longest_message = longest_message
        self.weights, self.total_weight = [1.0] * communicator.world_size, float(communicator.world_size)

    def weigh(self, weights: list[int]) -> None:
        """From now on process i counts for weights[i] of their sum; equal ones, and all 0, are the plain mean."""
        even = len(set(weights)) == 1
        self.weights = [1.0 if even else float(weight) for weight in weights]
        self.total_weight = sum(self.weights)

    @property
    def weight(self) -> float:
        """This process's."""
        return self.weights[self.communicator.rank]

    def mean_(self, tensors: list[torch.Tensor], part: tuple[int, int] = (0, 1)) -> None:
        """
        Replace floating-point and complex tensors by their mean, in place, every element exactly once.

        Args:
            part (`tuple[int, int]`, *optional*): Place and places, as of `FlatAnchor.part`: the rest stays as it is.
        """
        real = [torch.view_as_real(t.detach()) if t.is_complex() else t for t in tensors]
        self._each_bucket(real, wide_dtype, self._mean_, part)

    def _mean_(self, flat: torch.Tensor) -> None:
        scale = 2.0 ** -math.ceil(math.log2(self.total_weight))  # or the sum of large values would be infinite
        if self.weight * scale != 1:
            flat.mul_(self.weight * scale)
        self.communicator.start_sum_(flat)()
        flat.div_(self.total_weight * scale)

    def max_(self, tensors: list[torch.Tensor]) -> None:
        """Replace integer and boolean tensors by their maximum, in place."""
        self._each_bucket(tensors, lambda _: torch.int64, self.communicator.max_)

    def broadcast_(self, tensors: list[torch.Tensor]) -> None:
        """Replace tensors of any dtype by the first process's, bit for bit."""
        self._each_bucket(tensors, lambda dtype: dtype, self.communicator.broadcast_)

    def hand_out_(self, tensors: list[torch.Tensor], places: int) -> None:
        """
        Replace each of `places` parts of floating-point tensors, cut as `mean_` cuts them, by what the process of that
        place has, bit for bit: an all-gather.
        """
        if self.communicator.world_size == 1 or not tensors:
            return
        with self.pool.lent() as buffers:
            for layout in flat_layouts([tensors]):
                dtypes = {span.param.dtype for span in layout.spans}
                dtype = dtypes.pop() if len(dtypes) == 1 else layout.flat.dtype
                for place in range(places):
                    for bucket in layout.part(place, places).buckets(self._longest_message):
                        flat = buffers.get(bucket.elements, dtype, layout.device)
                        if place == self.communicator.rank:
                            bucket.pack_(flat)
                        self.communicator.broadcast_(flat, source=place)
                        if place != self.communicator.rank:
                            bucket.unpack_(flat)

    def _each_bucket(
        self,
        tensors: list[torch.Tensor],
        wire_dtype: Callable[[torch.dtype], torch.dtype],
        collective: Callable[[torch.Tensor], None],
        part: tuple[int, int] = (0, 1),
    ) -> None:
        if self.communicator.world_size == 1 or not tensors:
            return
        with self.pool.lent() as buffers:
            for layout in flat_layouts([tensors], wire_dtype):
                for bucket in layout.part(*part).buckets(self._longest_message):
                    flat = buffers.get(bucket.elements, layout.flat.dtype, layout.device)
                    bucket.pack_(flat)
                    collective(flat)
                    bucket.unpack_(flat)
