"""
What a Trainer's loop sees of the average, whatever the order of its callbacks: it is shown behind all callbacks of a
step's or a pass's end, and put away before any of the next begin; and behind all of training's end it stays.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from ..training.outer_loop import OuterLoop
from .trainer_end import Ending
from .trainer_gathers import TrainerGathers
from .trainer_methods import Method, and_then, replace_method


class TrainerViews:
    """
    Evaluations, saves and the end, which follow `on_step_end` and `on_epoch_end`.

    Args:
        trainer (`Trainer`): That trains.
        outer_loop (`OuterLoop`): Started.
        ending (`Ending`): Its end.
        end (`Callable`): Leaves the average in the model; is given the event's arguments.
        given_back (`ExitStack`): What gives the Trainer's events back as they were.
    """

    def __init__(
        self,
        trainer: Trainer,
        outer_loop: OuterLoop,
        ending: Ending,
        end: Callable[[TrainingArguments, TrainerState, TrainerControl], None],
        given_back: ExitStack,
    ) -> None:
        self._trainer, self._outer_loop, self._ending = trainer, outer_loop, ending
        given_back.callback(self._put_away)
        self._gathers = TrainerGathers(trainer, outer_loop, given_back)
        handler = trainer.callback_handler
        for event in ("on_epoch_begin", "on_step_begin"):
            replace_method(handler, event, self._local_before, given_back)
        behind = {"on_step_end": self._behind_step, "on_epoch_end": self._behind_pass, "on_train_end": end}
        for event, act in behind.items():
            replace_method(handler, event, functools.partial(and_then, act), given_back)

    def _local_before(self, tell: Method) -> Method:
        @functools.wraps(tell)
        def restore_and_tell(*args: Any, **kwargs: Any) -> Any:
            # The generators went back after the view: batches have been drawn since.
            self._outer_loop.consensus.restore(give_back_random_state=False)
            parts = self._outer_loop.parts
            parts.own_collectives.begin()
            if parts.clock.attempted_steps == parts.clock.begun_at:
                parts.account.skip()
            return tell(*args, **kwargs)

        return restore_and_tell

    def _put_away(self) -> None:
        """Where training fails inside a view: local weights return; behind its end the average stays."""
        if self._outer_loop.view.is_shown and self._ending.ended:
            self._outer_loop.view.keep()
        elif self._outer_loop.view.is_shown:
            self._outer_loop.consensus.restore()

    def _behind_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        self._ending.stop_with_others(state, control)
        self._look_if_due(args, state, control)

    def _behind_pass(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        """As at a step's end; a rank that stops ends with the others first."""
        self._ending.save_if_stopped(state, control)
        if not control.should_training_stop and not self._ending.all_gather(control):
            control.should_training_stop = True
        if control.should_training_stop:
            self._end(args, state)
        self._look_if_due(args, state, control)

    def _look_if_due(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        """Show the average where an evaluation, a save or the end follows."""
        if control.should_evaluate or control.should_save:
            self._outer_loop.consensus.show(keep_writes=True)
        elif control.should_training_stop and not control.should_log:  # a log comes first, which all gather for
            self._end(args, state)
        if control.should_log:
            self._gathers.bring_together()

    def _end(self, args: TrainingArguments, state: TrainerState) -> None:
        self._ending.end(self._trainer, args, state)
        self._outer_loop.consensus.show(keep_writes=True)
