"""What Accelerate saves of rank 0 alone, and what a program sets between a load and the first pass."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from accelerate.accelerator import Accelerator

from .. import upstream
from ..checkpoints.together import together
from ..training.outer_loop import OuterLoop


def own_objects(accelerator: Accelerator, outer_loop: OuterLoop) -> dict[str, Any]:
    """
    What Accelerate writes of rank 0 alone: a scaler that skipped a step on one rank, the schedulers that it held back,
    those that a worker drives by its own loss (`ReduceLROnPlateau`), and what else the program has registered, if it
    is numbers and words. Where all agree, Accelerate's do. Collective.
    """
    held = _held_beside(accelerator)
    states: dict[str, Any] = {}

    def take() -> None:
        states.update({name: one.state_dict() for name, one in held.items()})

    together(outer_loop, "schedulers and registered objects cannot be saved", take)
    # Functions are not ours to keep, and tensors may be a whole model's.
    own = {name: state for name, state in states.items() if _is_plain(state)}
    everywhere = outer_loop.workers.world.gather_objects(repr(own))
    kept = own if len(set(everywhere)) > 1 else {}
    if accelerator.scaler is not None:
        kept |= {name: state for name, state in states.items() if name.startswith(("scaler", "scheduler."))}
    return kept


def _held_beside(accelerator: Accelerator) -> dict[str, Any]:
    """What has a state beside models and optimizers, by its name in our files."""
    held = {f"scheduler.{index}": one for index, one in enumerate(upstream.prepared_schedulers(accelerator))}
    held |= {f"registered.{index}": one for index, one in enumerate(upstream.registered_objects(accelerator))}
    return held if accelerator.scaler is None else {"scaler": accelerator.scaler, **held}


class LoadedSettings:
    """
    Options of an optimizer's parameter groups, and the states beside it, as `accelerator.load_state` has loaded them.
    Every worker's own come at the first pass: what the program sets meanwhile (a learning rate) stays.

    Args:
        accelerator (`accelerate.Accelerator`): The one that has loaded.
        optimizer (`torch.optim.Optimizer`): The inner one.
    """

    def __init__(self, accelerator: Accelerator, optimizer: torch.optim.Optimizer) -> None:
        self._accelerator, self._optimizer = accelerator, optimizer
        self._loaded = copy.deepcopy(self._now())

    def _now(self) -> dict[str, dict[str, Any]]:
        found = {
            f"group.{index}": {name: value for name, value in group.items() if name != "params"}
            for index, group in enumerate(self._optimizer.param_groups)
        }
        return found | {name: one.state_dict() for name, one in _held_beside(self._accelerator).items()}

    def changes(self) -> Callable[[dict[str, Any]], None]:
        """Call before every worker's own are loaded, and the result behind it, with what was saved beside them."""
        changed = {name: _changed(self._loaded.get(name, {}), now) for name, now in self._now().items()}

        def give_back(objects: dict[str, Any]) -> None:
            for index, group in enumerate(self._optimizer.param_groups):
                group.update(changed.get(f"group.{index}", {}))
            for name, one in _held_beside(self._accelerator).items():
                if name in objects:
                    one.load_state_dict({**objects[name], **changed.get(name, {})})

        return give_back


def _changed(then: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Numbers and words that are others now; a flag is a mode, which goes with the weights that are loaded."""
    return {
        name: value
        for name, value in now.items()
        if type(value) is not bool and name in then and _differ(then[name], value)
    }


def _differ(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return not torch.equal(one, other)
    return _is_plain(one) and _is_plain(other) and bool(one != other)


def _is_plain(state: Any) -> bool:
    """Whether it holds numbers and words alone."""
    if isinstance(state, dict):
        return all(_is_plain(value) for value in state.values())
    if isinstance(state, (list, tuple)):
        return all(_is_plain(value) for value in state)
    return state is None or type(state) in (bool, int, float, str)
