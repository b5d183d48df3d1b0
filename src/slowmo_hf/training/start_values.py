"""
The start's values: every process gets the first one's, and only what differs travels. DDP has sent most of it before.
"""

from __future__ import annotations

import torch

from ..algorithm.digest import digest
from ..dtensors import is_sharded
from ..wire.averages import Averages
from ..wire.communicator import Communicator
from ..wire.workers import Workers
from .clock import Clock
from .model_tensors import ModelTensors, hash48


def equalise_(communicator: Communicator, tensors: list[torch.Tensor], longest_message: int) -> int:
    """
    Give every process the first one's values of those tensors that differ anywhere, bit for bit. Collective. Where
    all are equal a process sends 8 bytes to each other one.

    Args:
        communicator (`Communicator`): The processes.
        tensors (`list[torch.Tensor]`): Dense, of any dtype; the same shapes and dtypes everywhere.
        longest_message (`int`): In bytes.

    Returns:
        `int`: How many tensors were sent; the same on every process.
    """
    if communicator.world_size == 1 or not tensors:
        return 0
    digests = torch.stack([digest(t).to(tensors[0].device) for t in tensors]).tolist()
    combined = communicator.gather_header([hash48([str(number) for number in digests])])
    if bool((combined == combined[0]).all()):
        return 0
    everywhere = zip(*communicator.gather_objects(digests), strict=True)
    differing = [t for t, numbers in zip(tensors, everywhere, strict=True) if len(set(numbers)) > 1]
    Averages(communicator, longest_message).broadcast_(differing)
    return len(differing)


def make_equal(workers: Workers, tensors: ModelTensors, clock: Clock, *, include_frozen: bool) -> None:
    """Rank 0's values are everybody's; of shards, those of the first counterpart. Collective."""
    own = workers.world.gather_header([hash48(tensors.own_lines())])
    values = tensors.values(include_frozen=include_frozen, include_own=bool((own == own[0]).all()))
    for among, sharded in ((workers.world, False), (workers.between, True)):
        alike = [tensor for tensor in values if is_sharded(tensor) is sharded]
        equalise_(among, alike, workers.config.bucket_bytes // 2)
    tensors.rewritten()
    tensors.others.begin(workers, clock)
