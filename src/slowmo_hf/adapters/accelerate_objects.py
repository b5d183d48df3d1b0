"""What Accelerate saves of rank 0 alone, and what a program sets between a load and the first pass."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.accelerator import Accelerator
from torch.nn import Module

from .. import upstream
from ..checkpoints.together import together
from ..training.model_tensors import ModelTensors
from ..training.optimizers_inside import parameters_of
from ..training.outer_loop import OuterLoop
from ..training.written import WrittenSince, changed, is_plain


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
    own = {name: state for name, state in states.items() if is_plain(state)}
    everywhere = outer_loop.workers.world.gather_objects(hashlib.sha256(repr(own).encode()).digest())
    kept = own if len(set(everywhere)) > 1 else {}
    if accelerator.scaler is not None:
        kept |= {name: state for name, state in states.items() if name.startswith(("scaler", "scheduler."))}
    return kept


def _held_beside(accelerator: Accelerator) -> dict[str, Any]:
    """What has a state beside models and optimizers, by its name in our files."""
    _, schedulers, registered, _ = upstream.held_by(accelerator)
    held = {f"scheduler.{index}": one for index, one in enumerate(schedulers)}
    held |= {f"registered.{index}": one for index, one in enumerate(registered)}
    return held if accelerator.scaler is None else {"scaler": accelerator.scaler, **held}


class LoadedSettings:
    """
    Options of parameter groups, and what is numbers and words beside them, as one `accelerator.load_state` has loaded
    them. Every worker's own come at the first pass: what the program sets meanwhile (a learning rate, an optimizer
    without state) stays. Of weights it knows whether any were written.

    Args:
        accelerator (`accelerate.Accelerator`): The one that has loaded.
        optimizers (`Sequence`): The inner ones, that wait for their workers' own.
    """

    def __init__(self, accelerator: Accelerator, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._accelerator = accelerator
        self._written = {id(one): WrittenSince(parameters_of(one), one) for one in optimizers}
        self._beside: dict[str, dict[str, Any]] | None = copy.deepcopy(self._beside_now())

    def _beside_now(self) -> dict[str, dict[str, Any]]:
        held = {name: one for name, one in _held_beside(self._accelerator).items() if not isinstance(one, Module)}
        states = {name: one.state_dict() for name, one in held.items()}
        return {name: state for name, state in states.items() if isinstance(state, dict) and is_plain(state)}

    def changes(self, optimizer: torch.optim.Optimizer, tensors: ModelTensors) -> Callable[[dict[str, Any]], None]:
        """
        Call before a worker's own are loaded, and the result behind it, with what was saved beside them. All have
        that, and the first optimizer gives it back. Written weights that are gone are told.
        """
        written = self._written.get(id(optimizer))
        give_back_own = None if written is None else written.changes(tensors)
        beside, then, self._beside = self._beside_now(), self._beside, None

        def give_back(objects: dict[str, Any]) -> None:
            if give_back_own is not None:
                give_back_own()
            if then is None:
                return
            for name, one in _held_beside(self._accelerator).items():
                if name in objects:
                    own = changed(then[name], beside[name]) if name in then and name in beside else {}
                    one.load_state_dict({**objects[name], **own} if own else objects[name])

        return give_back
