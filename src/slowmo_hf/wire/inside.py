"""
What the processes of one worker do together. Each speaks for its own part of the model with its counterparts in the
other workers, its column; nobody leads.

    whole parameters (DDP inside)    the part is one n-th of the flat layout; what has come is handed out to all
    shards (FSDP2 inside)            the part is the process's own shards; nothing is handed out
"""

from __future__ import annotations

from typing import Protocol

import torch

from ..algorithm.layout import FlatAnchor, flat_layouts
from ..dtensors import is_sharded
from .averages import Averages
from .workers import Workers


class Inside(Protocol):
    """
    How a worker's processes hold one model.

    Attributes:
        has_all (`bool`): Whether this process has anchors for all of its own parameters.
    """

    has_all: bool

    def part(self, layout: FlatAnchor) -> FlatAnchor:
        """What this process speaks for, of the layout of all parameters that it has."""

    def mean_(self, between: Averages, tensors: list[torch.Tensor]) -> None:
        """Replace what is laid out like the parameters (an optimizer's state) by the workers' mean. Collective."""

    def hand_out_(self, tensors: list[torch.Tensor]) -> None:
        """What is laid out like the parameters is everywhere what the process that speaks for it has. Collective."""

    def overwritten(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """What the next hand-out of these replaces here: runs of them."""

    def average_others_(self, between: Averages, floating: list[torch.Tensor], integer: list[torch.Tensor]) -> None:
        """
        Replace what no optimizer holds, buffers and frozen parameters, by the mean of all workers; integers by the
        maximum. Collective.
        """


class WholeInside:
    """
    Every process has the whole model, and all of a worker have it equal.

    Args:
        workers (`Workers`): With their groups.
        longest_message (`int`): In bytes.
        cut (`bool`): False where tensors must stay whole: then the first process speaks for them all.
    """

    def __init__(self, workers: Workers, longest_message: int, *, cut: bool) -> None:
        self._averages = Averages(workers.inside, longest_message)
        self._place, self._places = workers.inside.rank, workers.size if cut else 1
        self.has_all = workers.size == 1

    def part(self, layout: FlatAnchor) -> FlatAnchor:
        """As `Inside.part`."""
        return layout.part(self._place, self._places)

    def mean_(self, between: Averages, tensors: list[torch.Tensor]) -> None:
        """As `Inside.mean_`."""
        between.mean_(tensors, (self._place, self._places))
        self.hand_out_(tensors)

    def hand_out_(self, tensors: list[torch.Tensor]) -> None:
        """As `Inside.hand_out_`."""
        self._averages.hand_out_(tensors, self._places)

    def overwritten(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """As `Inside.overwritten`: the parts that others speak for."""
        if self.has_all:
            return []
        others = [place for place in range(self._places) if place != self._place]
        layouts = flat_layouts([tensors]) if tensors else []
        parts = [layout.part(place, self._places) for layout in layouts for place in others]
        return [span.values() for part in parts for span in part.spans]

    def average_others_(self, between: Averages, floating: list[torch.Tensor], integer: list[torch.Tensor]) -> None:
        """As `Inside.average_others_`. DDP gives all the first process's, so that they are those that count."""
        if self._place == 0:
            between.mean_(floating)
            between.max_(integer)
        self._averages.broadcast_([*floating, *integer])


class ShardedInside:
    """
    Every process has its own shards. Buffers are whole, and each process's own.

    Args:
        workers (`Workers`): With their groups.
        longest_message (`int`): In bytes.
    """

    has_all = True

    def __init__(self, workers: Workers, longest_message: int) -> None:
        self._averages = Averages(workers.inside, longest_message)

    def part(self, layout: FlatAnchor) -> FlatAnchor:
        """As `Inside.part`."""
        return layout

    def mean_(self, between: Averages, tensors: list[torch.Tensor]) -> None:
        """As `Inside.mean_`."""
        between.mean_(tensors)

    def hand_out_(self, tensors: list[torch.Tensor]) -> None:
        """As `Inside.hand_out_`: everything is where it belongs."""

    def overwritten(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """As `Inside.overwritten`."""
        return []

    def average_others_(self, between: Averages, floating: list[torch.Tensor], integer: list[torch.Tensor]) -> None:
        """As `Inside.average_others_`: what is whole over all processes, for each has seen other data."""
        between.mean_(floating)
        between.max_(integer)
        self._averages.mean_([tensor for tensor in floating if not is_sharded(tensor)])
        self._averages.max_([tensor for tensor in integer if not is_sharded(tensor)])
