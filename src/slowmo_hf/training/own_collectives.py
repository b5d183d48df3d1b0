"""What the program itself sends between rounds: found by counting, whatever function it calls, and said once."""

from __future__ import annotations

import weakref
from contextlib import suppress
from typing import Any

import torch

from ..upstream import collectives_of_job, has_step_hooks, run_as_written
from ..wire.workers import Workers
from .account import Account
from .clock import Clock

_STEPS = 3  # on end: two may be rare meetings that touch


class OwnCollectives:
    """
    A loss that gathers, a metric, a loader that broadcasts: at one step after the other, inside a round, they make
    each rank wait for the slowest. What evaluations and views gather is not counted.

    Args:
        workers (`Workers`): Of the job.
        clock (`Clock`): Of the loop.
        account (`Account`): Of the loop. It counts.

    Attributes:
        is_said (`bool`): It was, here or by who knows the call's name.
    """

    def __init__(self, workers: Workers, clock: Clock, account: Account) -> None:
        self._workers, self._clock, self._account = workers, clock, account
        self._before, self._on_end, self.is_said = 0, 0, False
        self._called_at = (-1, -1)  # rounds and steps
        self.begin()

    def refuse_sending_step(self, optimizer: torch.optim.Optimizer) -> None:
        """
        Watch an inner optimizer's first step: one that sends over the job (a Muon or Shampoo whose ranks share the
        work) hands every worker what others have computed from their own weights. Not where a closure is given, or
        the program has a hook of its own there, which may send too.

        Raises:
            ValueError: In that step, on all ranks.
        """
        before: list[int] = []  # none where training has begun inside this step
        training = weakref.ref(self)  # a step that failed leaves the hooks to a later training

        @run_as_written
        def note(*called: Any) -> None:
            before[:] = [collectives_of_job()]

        @run_as_written
        def judge(optimizer: Any, args: Any, kwargs: Any) -> None:
            for handle in handles:
                handle.remove()
            has_closure = any(map(callable, (*args[1:], *kwargs.values())))
            if training() is not None and before and collectives_of_job() > before[0] and not has_closure:
                raise ValueError(
                    f"the inner optimizer {type(optimizer).__name__} sends over all ranks in its own step: a "
                    "worker would get what others have computed from their own weights and data. Use one whose step "
                    "is local (torch.optim.Muon), or base='all_reduce'."
                )

        handles: list[Any] = []
        with suppress(AttributeError):  # a class by hand has no hooks
            if not has_step_hooks(optimizer):
                handles += [optimizer.register_step_pre_hook(note), optimizer.register_step_post_hook(judge)]

    def at_call(self, name: str) -> None:
        """A call of Accelerate's that gathers, in training: a second one in a round, at another step, is told."""
        before, self._called_at = self._called_at, (self._clock.rounds, self._clock.attempted_steps)
        if self.is_said or before[0] != self._called_at[0] or before[1] == self._called_at[1]:
            return
        self.is_said = True
        self._workers.logger.warning(
            "accelerator.%s over all ranks at steps %d and %d, between rounds: each waits for the slowest rank, and "
            "counts as communication. Gather at rounds (step %% %d == 0), or in evaluations.",
            name,
            before[1],
            self._called_at[1],
            self._clock.config.sync_every,
        )

    def begin(self) -> None:
        """A step begins: what came before was not of one."""
        self._before = self._account.collectives_of_training()

    def at_step(self) -> None:
        """Behind an inner step that the clock does not count yet."""
        before, self._before = self._before, self._account.collectives_of_training()
        if self._clock.local_steps == 0:  # a round lies before it
            self._on_end = 0
        self._on_end = self._on_end + 1 if self._before > before else 0
        if self._on_end == _STEPS and not self.is_said:
            self.is_said, step = True, self._clock.attempted_steps + 1
            self._workers.logger.warning(
                "the program itself runs collectives over all ranks at each step of %d to %d, between rounds (a loss "
                "that gathers, a metric, a loader that broadcasts): each waits for the slowest rank. Gather at rounds "
                "(step %% %d == 0), or in evaluations.",
                step - _STEPS + 1,
                step,
                self._clock.config.sync_every,
            )
