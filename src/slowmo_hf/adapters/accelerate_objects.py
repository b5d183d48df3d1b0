"""What Accelerate saves of rank 0 alone."""

from __future__ import annotations

import hashlib
from typing import Any

from accelerate.accelerator import Accelerator

from .. import upstream
from ..checkpoints.together import together
from ..training.outer_loop import OuterLoop
from ..training.written import is_plain


def own_objects(accelerator: Accelerator, outer_loop: OuterLoop) -> dict[str, Any]:
    """
    What Accelerate writes of rank 0 alone: a scaler that skipped a step on one rank, the schedulers that it held back,
    those that a worker drives by its own loss (`ReduceLROnPlateau`), and what else the program has registered, if it
    is numbers and words. Where all agree, Accelerate's do. Collective.
    """
    held = held_beside(accelerator)
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


def held_beside(accelerator: Accelerator) -> dict[str, Any]:
    """What has a state beside models and optimizers, by its name in our files."""
    _, schedulers, registered, _ = upstream.held_by(accelerator)
    held = {f"scheduler.{index}": one for index, one in enumerate(schedulers)}
    held |= {f"registered.{index}": one for index, one in enumerate(registered)}
    return held if accelerator.scaler is None else {"scaler": accelerator.scaler, **held}
