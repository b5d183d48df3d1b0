"""
What is said when a process of a custom loop ends: inside a round, that its model has one worker's own weights; by an
error, from which checkpoint to go on.
"""

from __future__ import annotations

import atexit
import sys
import weakref
from typing import Any

from .. import upstream
from ..checkpoints.last_lines import Saves
from ..wire.job import in_each_child, is_in_process

_told: weakref.WeakSet[Any] = weakref.WeakSet()
in_each_child(_told.clear)


def _all_are_finished() -> bool:
    return all(one.outer_loop is None or one.outer_loop.in_flight.is_over for one in _told)


saves = Saves("accelerator.load_state({})", is_over=_all_are_finished)


def tell_at_exit(optimizer: Any) -> None:
    """
    Say so when the process ends, once per job, unless it fails or was asked to stop.

    Args:
        optimizer (`SlowMoOptimizer`): Its training has begun.
    """
    if not _told:
        atexit.unregister(_tell)
        atexit.register(_tell)
    _told.add(optimizer)
    # Else nobody knows what a loop saves; and plain all-reduce's saves are stock ones.
    if upstream.accelerate_is_in_use() and not is_in_process() and optimizer.config.has_rounds:
        saves.begin()


def _tell() -> None:
    if getattr(sys, "last_value", None) is None:  # else the process has failed, and says why
        for optimizer in _told:
            words = _unfinished(optimizer)
            if words:
                optimizer.outer_loop.workers.logger.warning("%s", words)


def _unfinished(optimizer: Any) -> str:
    loop = optimizer.outer_loop
    # The rank of then: at a process's end its job may be gone.
    if loop is None or not loop.parts.trains_alone or loop.workers.world.rank:
        return ""
    clock = loop.clock
    has_saved = loop.status.stop_agreed  # a run that was asked to stop, and goes on later
    if clock.workers_agree or loop.in_flight.is_over or has_saved:
        return ""
    model = "the last round's, without them" if loop.view.is_of_last_round else "one worker's own"
    return (
        f"training ended at step {clock.attempted_steps}, {clock.local_steps} steps after the last round: the model "
        f"that rank 0 leaves is {model}. Add slowmo_hf.finish(optimizer) after the last step: the average of all "
        "workers stays in the model then."
    )
