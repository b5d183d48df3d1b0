"""The start of a run: every rank gets the values of the first one."""

from __future__ import annotations

from ..dtensors import is_sharded
from ..wire.averages import Averages
from ..wire.workers import Workers
from .model_tensors import ModelTensors


def make_equal(workers: Workers, tensors: ModelTensors, *, include_frozen: bool) -> None:
    """Rank 0's values are everybody's; of shards, those of its counterparts. Collective."""
    values = tensors.values(include_frozen=include_frozen)
    for among, sharded in ((workers.world, False), (workers.between, True)):
        alike = [tensor for tensor in values if is_sharded(tensor) is sharded]
        Averages(among, workers.config.bucket_bytes // 2).broadcast_(alike)
    tensors.rewritten()
    tensors.remember_buffers()
