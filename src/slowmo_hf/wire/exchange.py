"""
The messages of one gossip exchange. The first element of the first one tells whether its sender's parameters are
finite: it is NaN where they are not, and is read before anything of the exchange is mixed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from ..algorithm.layout import Bucket, FlatAnchor
from ..algorithm.topology import Schedule
from .communicator import Communicator
from .processes import Transfer


@dataclass
class Exchange:
    """
    The messages of one optimizer step, and the memory that they lie in; flat tensors are laid out like the anchors.
    """

    outgoing: dict[FlatAnchor, torch.Tensor]
    incoming: list[dict[FlatAnchor, torch.Tensor]]
    received: list[dict[FlatAnchor, torch.Tensor]] = field(default_factory=list)  # those of this step's sources
    targets: list[int] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    tag: int = 0
    weight: Transfer | None = None
    buckets: list[Transfer] = field(default_factory=list)
    step: int = 0  # the optimizer step that it follows
    finiteness: torch.Tensor | None = None  # of this worker's parameters then: 1, or NaN

    @classmethod
    def make(
        cls, flats: dict[FlatAnchor, torch.Tensor], *, wire: torch.device, degree: int, in_place: bool
    ) -> Exchange:
        """
        Fresh memory for one.

        Args:
            flats (`dict`): What goes out: itself where it may (`in_place`) and lies where it can travel from.
            degree (`int`): Messages that can come in.
        """
        in_place = in_place and all(flat.device == wire for flat in flats.values())
        outgoing = flats if in_place else {i: torch.empty_like(f, device=wire) for i, f in flats.items()}
        incoming = [{i: torch.empty_like(f, device=wire) for i, f in flats.items()} for _ in range(degree)]
        return cls(outgoing, incoming)

    def address(self, topology: Schedule, here: int, number: int, step: int, messages: int) -> None:
        """It is for the peers of exchange `number` of the schedule, `messages` to each; nothing is sent."""
        self.targets, self.sources = topology.targets(here, number), topology.sources(here, number)
        self.received = self.incoming[: len(self.sources)]
        self.tag, self.step = number * messages, step
        self.weight, self.buckets, self.finiteness = None, [], None

    def fill(self, weights: list[float], messages: list[dict[FlatAnchor, torch.Tensor]], buckets: int) -> None:
        """It has come, with these weights and messages of a checkpoint."""
        for received, message in zip(self.received, messages, strict=True):
            for item, flat in message.items():
                received[item].copy_(flat)
        self.weight = _arrived([torch.tensor([weight], dtype=torch.float64) for weight in weights])
        self.buckets = [_arrived([]) for _ in range(buckets)]
        self.sources, self.finiteness = [], None

    def send(self, communicator: Communicator, bucket: Bucket) -> None:
        """The next bucket, and to receive as many."""
        into = [bucket.of(flat[bucket.item]) for flat in self.received]
        message, tag = bucket.of(self.outgoing[bucket.item]), self.tag + 1 + len(self.buckets)
        self.buckets.append(communicator.exchange(message, self.targets, into, self.sources, tag))

    def send_weight(self, communicator: Communicator, weight: float) -> None:
        """The push-sum weight that goes with them."""
        message = torch.tensor([weight], dtype=torch.float64, device=communicator.wire_device)
        into = [torch.empty_like(message) for _ in self.sources]
        self.weight = communicator.exchange(message, self.targets, into, self.sources, self.tag)

    def mark_(self, first: Bucket, finiteness: torch.Tensor) -> None:
        """Before the first message sets out: what it tells of its sender. Nothing waits for the device here."""
        element = first.of(self.outgoing[first.item])[:1]
        self.finiteness = finiteness.to(element.device)
        element.mul_(self.finiteness.to(element.dtype))  # 1 changes nothing, NaN makes it NaN

    def lost(self, first: list[Bucket], here: int) -> int | None:
        """
        The worker whose parameters were not finite, of those whose first message has come and of this one; None where
        all were. On an accelerator one small copy, behind a message that was waited for.

        Args:
            first (`list[Bucket]`): The first bucket; empty where nothing travels.
            here (`int`): This worker.
        """
        told = [(here, self.finiteness)] if self.finiteness is not None else []
        for source, flat in zip(self.sources, self.received, strict=False):  # a checkpoint's have no sources
            told += [(source, bucket.of(flat[bucket.item])[0]) for bucket in first]
        read = torch.stack([mark.double() for _, mark in told]).tolist() if told else []
        return min(
            (worker for (worker, _), mark in zip(told, read, strict=True) if not math.isfinite(mark)), default=None
        )


def _arrived(received: list[torch.Tensor]) -> Transfer:
    return Transfer([], torch.empty(0), received, "a message of a checkpoint", done=True)
