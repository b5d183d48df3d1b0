"""
What a program changes between a load and the first pass, while workers' own wait: settings of an optimizer and of a
scheduler stay; of weights it is told that they are gone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..log import logger
from .digests import digests_of
from .model_tensors import ModelTensors
from .optimizers_inside import parameters_of


class LoadedSettings:
    """
    Options of parameter groups, and what is numbers and words beside them, as a program has loaded them. Every
    worker's own come later: what the program sets meanwhile (a learning rate, an optimizer without state) stays. Of
    weights it knows whether any were written.

    Args:
        optimizers (`Sequence`): Loaded, and bare: no wrappers. Of another all settings are the program's.
        beside (`Mapping[str, Any]`): What has a state beside them, by its name in our files.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], beside: Mapping[str, Any]) -> None:
        self._written = {id(one): _WrittenSince(one) for one in optimizers}
        self._beside: dict[str, Any] | None = dict(beside)
        self._states = copy.deepcopy(_plain_states(beside))

    def changes(self, optimizer: torch.optim.Optimizer, tensors: ModelTensors) -> Callable[[Mapping[str, Any]], None]:
        """
        To be called when all ranks have rank 0's values, before each one's own are loaded.

        Returns:
            `Callable`: To be called behind that, with the states that were saved beside them. All optimizers have
            these, and the first gives them back. Written weights that are gone are told.
        """
        written = self._written.get(id(optimizer)) or _WrittenSince(optimizer, is_loaded=False)
        give_back_own = written.changes(tensors)
        beside, self._beside = self._beside, None
        now = _plain_states(beside or {})

        def give_back(states: Mapping[str, Any]) -> None:
            for name, one in (beside or {}).items():
                if name in states:
                    own = changed(self._states[name], now[name]) if name in self._states and name in now else {}
                    one.load_state_dict({**states[name], **own} if own else states[name])
            give_back_own()  # last: a scheduler's load may write learning rates

        return give_back


def _plain_states(held: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Of what holds numbers and words alone."""
    states = {name: one.state_dict() for name, one in held.items() if not isinstance(one, torch.nn.Module)}
    return {name: state for name, state in states.items() if isinstance(state, dict) and is_plain(state)}


class _WrittenSince:
    """
    Knows, from now on, which weights and which settings of an optimizer have been written. Reads all weights, now and
    when it is asked.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, is_loaded: bool = True) -> None:
        # Kept: else another could have the identity of one that is gone.
        self._params = list(parameters_of(optimizer)) if is_loaded else []
        self._digests = dict(zip(map(id, self._params), digests_of(self._params), strict=True))
        self._optimizer = optimizer
        self._had_state = bool(optimizer.state) or not is_loaded
        self._groups = [_comparable(group) if is_loaded else {} for group in optimizer.param_groups]

    def changes(self, tensors: ModelTensors) -> Callable[[], None]:
        """
        What gives back options of groups that were set, and a state that was emptied; a warning tells of weights that
        were written and are gone.
        """
        by_passes = {id(tensor) for tensor in tensors.written_by_passes()}
        known = [pair for pair in zip(tensors.names, tensors.trainable, strict=True) if id(pair[1]) in self._digests]
        digests = digests_of(param for _, param in known)
        written = [
            (name, param, digest)
            for (name, param), digest in zip(known, digests, strict=True)
            if id(param) not in by_passes and self._digests[id(param)] != digest
        ]
        optimizer = self._optimizer
        is_emptied = self._had_state and not optimizer.state
        pairs = zip(self._groups, optimizer.param_groups, strict=False)
        options = [{k: v for k, v in changed(*pair).items() if k != "params"} for pair in pairs]

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
    """The options, with copies of those that could be written in place."""
    return {
        name: value.clone() if isinstance(value, torch.Tensor) else copy.deepcopy(value) if is_plain(value) else value
        for name, value in group.items()
    }


def changed(then: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """What is new, and what is another now."""
    return {name: value for name, value in now.items() if name not in then or _differ(then[name], value)}


def _differ(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return not torch.equal(one, other)
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return True
    try:
        return bool(one != other)
    except (RuntimeError, ValueError):  # of arrays and lists of tensors
        return one is not other


def is_plain(state: Any) -> bool:
    """Whether it holds numbers and words alone."""
    if isinstance(state, dict):
        return all(is_plain(value) for value in state.values())
    if isinstance(state, (list, tuple)):
        return all(is_plain(value) for value in state)
    return state is None or type(state) in (bool, int, float, str)
