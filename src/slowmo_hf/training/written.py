"""
What a program changes between a load and the first pass, while workers' own wait: settings of an optimizer stay; of
weights it is told that they are gone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ..log import logger
from .digests import digests_of
from .model_tensors import ModelTensors


class WrittenSince:
    """
    Knows, from now on, which weights and which settings of an optimizer have been written. Reads all weights, now and
    when it is asked.

    Args:
        params (`Iterable[torch.Tensor]`): As they have been loaded.
        optimizer (`torch.optim.Optimizer`): The same, bare: no wrapper.
    """

    def __init__(self, params: Iterable[torch.Tensor], optimizer: torch.optim.Optimizer) -> None:
        self._params = list(params)  # else another could have the identity of one that is gone
        self._digests = dict(zip(map(id, self._params), digests_of(self._params), strict=True))
        self._optimizer = optimizer
        self._had_state = bool(optimizer.state)
        self._groups = [_comparable(group) for group in optimizer.param_groups]

    def changes(self, tensors: ModelTensors) -> Callable[[], None]:
        """
        To be called when all ranks have rank 0's values, before each one's own are loaded.

        Returns:
            `Callable`: To be called behind that. Options of groups that were set, and a state that was emptied, are so
            again; a warning tells of weights that were written and are gone.
        """
        by_passes = {id(tensor) for tensor in tensors.written_by_passes()}
        written = [
            (name, param, digest)
            for name, param, digest in zip(
                tensors.names, tensors.trainable, digests_of(tensors.trainable), strict=True
            )
            if id(param) not in by_passes and self._digests.get(id(param), digest) != digest
        ]
        optimizer = self._optimizer
        is_emptied = self._had_state and not optimizer.state
        pairs = zip(self._groups, optimizer.param_groups, strict=False)
        # A flag of a group is a mode, which goes with the weights that are loaded.
        options = [{k: v for k, v in changed(*pair).items() if type(v) is not bool} for pair in pairs]

        def give_back() -> None:
            if is_emptied:
                optimizer.state.clear()
            for group, own in zip(optimizer.param_groups, options, strict=False):
                group.update(own)
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

        return give_back


def _comparable(group: dict[str, Any]) -> dict[str, Any]:
    """A copy of the options that can be compared; the names alone of others."""
    return {
        name: value.clone() if isinstance(value, torch.Tensor) else copy.deepcopy(value) if is_plain(value) else None
        for name, value in group.items()
    }


def changed(then: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """What is new, and numbers, words and tensors that are others now."""
    return {name: value for name, value in now.items() if name not in then or _differ(then[name], value)}


def _differ(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return not torch.equal(one, other)
    return is_plain(one) and is_plain(other) and bool(one != other)


def is_plain(state: Any) -> bool:
    """Whether it holds numbers and words alone."""
    if isinstance(state, dict):
        return all(is_plain(value) for value in state.values())
    if isinstance(state, (list, tuple)):
        return all(is_plain(value) for value in state)
    return state is None or type(state) in (bool, int, float, str)
