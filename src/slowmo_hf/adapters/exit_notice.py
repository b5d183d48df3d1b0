"""
What is said when a process of a custom loop ends: inside a round, that its model has one worker's own weights; by an
error, from which checkpoint to go on.
"""

from __future__ import annotations

import atexit
import os
import sys
import weakref
from typing import Any

from .. import upstream
from ..checkpoints.last_lines import Saves
from ..log import logger
from ..training.clock import Clock
from ..wire.job import in_each_child, is_in_process

_told: weakref.WeakSet[Any] = weakref.WeakSet()
in_each_child(_told.clear)


def _all_are_finished() -> bool:
    return all(one.outer_loop is None or one.outer_loop.in_flight.is_over for one in _told)


saves = Saves("accelerator.load_state({})", is_over=_all_are_finished)


def tell_at_exit(optimizer: Any) -> None:
    """
    Say so when the process ends, or before that when the optimizer goes (a program in a function): once per job,
    unless it fails or was asked to stop.

    Args:
        optimizer (`SlowMoOptimizer`): Its training has begun.
    """
    if not _told:
        atexit.unregister(_tell)
        atexit.register(_tell)
    _told.add(optimizer)
    loop = optimizer.outer_loop
    # The rank of now: at a process's end its job may be gone.
    if loop.parts.trains_alone and not loop.workers.world.rank:
        weakref.finalize(optimizer, _tell_of_dropped, loop.clock, os.getpid()).atexit = False
    # Else nobody knows what a loop saves; and plain all-reduce's saves are stock ones.
    if upstream.accelerate_is_in_use() and not is_in_process() and optimizer.config.has_rounds:
        saves.begin()


def _tell() -> None:
    if getattr(sys, "last_value", None) is not None:
        return  # the process has failed, and says why
    for optimizer in _told:
        loop = optimizer.outer_loop
        if loop is not None and loop.parts.trains_alone and not loop.workers.world.rank and _is_unfinished(loop.clock):
            loop.workers.logger.warning(_UNFINISHED, loop.clock.attempted_steps, loop.clock.local_steps)


def _tell_of_dropped(clock: Clock, process: int) -> None:
    if process == os.getpid() and _is_unfinished(clock):
        logger.warning(_UNFINISHED, clock.attempted_steps, clock.local_steps)


def _is_unfinished(clock: Clock) -> bool:
    return not (clock.workers_agree or clock.is_over or clock.stop_agreed)  # asked to stop, it goes on later


_UNFINISHED = (
    "training ended at step %d, %d steps after the last round: the model that rank 0 leaves is not the workers' "
    "average. Add slowmo_hf.finish(optimizer) after the last step: the average of all stays in the model then."
)
