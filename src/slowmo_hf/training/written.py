"""What a program writes into parameters between a load and the first pass: workers' own come over it; it is told."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from ..log import logger
from .digests import digests_of
from .model_tensors import ModelTensors


class WrittenSince:
    """
    Knows, from now on, which of these have been written. Reads them all, now and when it is asked.

    Args:
        params (`Iterable[torch.Tensor]`): As they have been loaded.
    """

    def __init__(self, params: Iterable[torch.Tensor]) -> None:
        self._params = list(params)  # else another could have the identity of one that is gone
        self._digests = dict(zip(map(id, self._params), digests_of(self._params), strict=True))

    def watch(self, tensors: ModelTensors) -> Callable[[], None]:
        """
        To be called when all ranks have rank 0's values, before each one's own are loaded.

        Returns:
            `Callable`: To be called behind that: warns of what was written and is gone.
        """
        by_passes = {id(tensor) for tensor in tensors.written_by_passes()}
        written = [
            (name, param, digest)
            for name, param, digest in zip(
                tensors.names, tensors.trainable, digests_of(tensors.trainable), strict=True
            )
            if id(param) not in by_passes and self._digests.get(id(param), digest) != digest
        ]

        def tell() -> None:
            now = digests_of(param for _, param, _ in written)
            undone = [name for (name, _, digest), other in zip(written, now, strict=True) if other != digest]
            if undone:
                logger.warning(
                    "what the program has written into %s and %d more since the checkpoint was loaded is undone: each "
                    "worker goes on from its own weights. To train on from other weights begin a new run: load the "
                    "model alone, with a new optimizer.",
                    undone[0],
                    len(undone) - 1,
                )

        return tell
