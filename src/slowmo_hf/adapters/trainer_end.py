"""The end of training, of all ranks together: who stops, and where Trainer makes the others meet until then."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    DefaultFlowCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from .. import upstream
from ..log import logger, of_this_rank
from ..training.outer_loop import OuterLoop
from .stop_signals import REQUEUE_EXIT_CODE
from .trainer_methods import Method, replace_method


class Ending:
    """
    Ends a training run on all ranks together.

    Args:
        outer_loop (`OuterLoop`): Started.
        max_steps (`int`): Trainer's, on this rank. Collective with a gossip base: where all ranks plan the same end,
            they need not ask for it.
    """

    def __init__(self, outer_loop: OuterLoop, max_steps: int) -> None:
        self.outer_loop = outer_loop
        self.ended = self.stopped = self.round_ended = False  # the last: at this step
        self.saved_at: int | None = None  # the step of the last checkpoint
        self._planned_end: int | None = None  # max_steps, where it is the same on all ranks
        if outer_loop.config.gossips:
            plans = set(outer_loop.workers.world.gather_objects(max_steps))
            self._planned_end = plans.pop() if len(plans) == 1 else None

    def on_signal(self, name: str) -> None:
        """Ask all ranks to save and stop."""
        self.outer_loop.status.stop_asked = True
        of_this_rank.warning(
            "%s: all ranks save when the next round is applied, and exit with code %d", name, REQUEUE_EXIT_CODE
        )

    def all_gather(self, control: TrainerControl) -> bool:
        """Meet before Trainer gathers: False where a rank has ended, and will not come."""
        return not _gathers(control) or self.ended or self.outer_loop.meet_before_gathering()

    def stop_with_others(self, state: TrainerState, control: TrainerControl) -> None:
        """A rank that was sent a signal, or has no more data, has said so where all met: all stop together."""
        if self.round_ended:
            self._stop_with_others(state, control, self.outer_loop.status.somebody_ended)
        if not self.all_gather(control):
            self._stop_with_others(state, control, True)

    def _stop_with_others(self, state: TrainerState, control: TrainerControl, somebody_ended: bool) -> None:
        if somebody_ended:
            _stop_at_once(control)  # the rest gathers, and that rank will not come
            self.stopped = False  # nothing is saved, and nobody need come back
        elif self.outer_loop.clock.stop_agreed and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = self.stopped = True

    def save_if_stopped(self, state: TrainerState, control: TrainerControl) -> None:
        """
        At the pass's end, which follows a stop: with `save_strategy="best"` the evaluation of the step has taken the
        save back.
        """
        if self.stopped and self.saved_at != state.global_step:
            control.should_save, control.should_evaluate = True, False

    def end(
        self,
        trainer: Any,
        args: TrainingArguments,
        state: TrainerState,
        *,
        pass_end_is_ahead: bool = True,
        loaded: torch.nn.Module | None = None,
    ) -> None:
        """
        Once: all ranks end together, on the average.

        Args:
            loaded (`torch.nn.Module`, *optional*): A model whose weights of now stay: the best, which Trainer has just
                loaded. A rank that ends with gossip takes part in the others' exchanges, and in its own weights.
        """
        if self.ended:
            return
        self.ended = True
        steps_per_pass = _steps_per_pass(args, trainer.callback_handler.train_dataloader)
        meetings = _Meetings(args, state, self._planned_end, steps_per_pass)
        all_stop = state.global_step == self._planned_end or self.stopped or self.outer_loop.status.somebody_ended
        all_meet_here = all_stop or (pass_end_is_ahead and meetings.at_pass_end(state.global_step))
        kept = _copies_of(loaded) if loaded is not None and self.outer_loop.config.gossips else []
        self.outer_loop.end(all_meet_here=all_meet_here, others_meet_at=meetings.at)
        _write_back(kept)
        if self.outer_loop.status.somebody_ended_early:
            logger.warning(
                "a rank has ended its training (out of data, or asked to stop): all stop with it at step %d, and "
                "nothing is evaluated or saved there",
                self.outer_loop.attempted_steps,
            )
        if self.outer_loop.config.has_rounds:
            state.global_step = self.outer_loop.attempted_steps
            # Trainer gathers it once more: an int 0 where no step has followed a log, and a float elsewhere, would
            # abort in gloo.
            trainer.current_flos = float(trainer.current_flos)

    def exit_if_stopped(self, step: int) -> None:
        """Raise `SystemExit` with `REQUEUE_EXIT_CODE` where a signal asked for the end, and the save is done."""
        if self.stopped:
            logger.warning("saved at step %d after a signal: exit code %d asks for a requeue", step, REQUEUE_EXIT_CODE)
            raise SystemExit(REQUEUE_EXIT_CODE)


def refuse_uncounted(counted_step: int, state: TrainerState) -> None:
    """
    Refuse a Trainer whose own loop leaves out the event at which steps are counted: it would have no rounds.

    Raises:
        RuntimeError: This step has come to its end uncounted.
    """
    if counted_step != state.global_step - 1:
        raise RuntimeError(
            f"this Trainer came to the end of step {state.global_step} without on_optimizer_step, where steps are "
            "counted: it would have no rounds. In its training loop call "
            "self.callback_handler.on_optimizer_step(args, self.state, self.control) behind optimizer.step(), before "
            "global_step is raised, as Trainer does."
        )


def checked_loop(find_trainer: Callable[[], Trainer], outer_loop: OuterLoop | None) -> OuterLoop:
    """
    The one that counts a step, if the step is of what training began with; `find_trainer` where there is one.

    Raises:
        RuntimeError: Training has begun without the callback, or the Trainer has another optimizer now.
    """
    if outer_loop is None:
        raise RuntimeError(
            "a SlowMoCallback came to a Trainer that trains already: it begins where training begins. Add it before "
            "trainer.train(). To begin later, train the first part without it, and go on from its checkpoint with it "
            "(resume_from_checkpoint=True)."
        )
    inner: Any = find_trainer().optimizer
    while inner is not outer_loop.inner_optimizer and hasattr(inner, "optimizer"):  # a wrapper of it steps it
        inner = inner.optimizer
    if inner is not outer_loop.inner_optimizer:
        raise RuntimeError(
            f"the Trainer's optimizer was replaced in training (by {type(inner).__name__}): rounds know the "
            "parameters, rates and state of the one that it began with. Make it before trainer.train(); for stages "
            "(layers unfrozen, another optimizer) call trainer.train() for each."
        )
    return outer_loop


def stays_in(trainer: Trainer, callback: TrainerCallback, given_back: ExitStack) -> None:
    """
    Until training ends no callback can take ours out of its Trainer: there would be neither rounds nor DDP. Trainer
    itself may: it puts another in its place where it begins anew (`auto_find_batch_size`).
    """
    handler = trainer.callback_handler

    def kept(remove: Method) -> Method:
        @functools.wraps(remove)
        def refuse(*args: Any, **kwargs: Any) -> Any:
            before = list(handler.callbacks)
            result = remove(*args, **kwargs)
            trains = upstream.is_telling(handler, "call_event") and not upstream.is_telling(handler, "on_train_end")
            if trains and callback not in handler.callbacks:
                handler.callbacks = before
                raise RuntimeError(
                    "SlowMoCallback cannot be removed while its Trainer trains: workers would train on apart, without "
                    "rounds and without DDP. Remove it when trainer.train() has returned, and go on from its "
                    "checkpoint without it."
                )
            return result

        return refuse

    for name in ("remove_callback", "pop_callback"):
        replace_method(handler, name, kept, given_back)


@dataclass
class _Meetings:
    """
    Where Trainer's own settings make the ranks that train on log, evaluate, save or end.

    Args:
        planned_end (`int`, *optional*): `max_steps`, where it is the same on all ranks.
        steps_per_pass (`int`, *optional*): Of the data, where they have a length.
    """

    args: TrainingArguments
    state: TrainerState
    planned_end: int | None
    steps_per_pass: int | None

    def at(self, step: int) -> bool:
        """After a step, or where its pass over the data ends with it."""
        there, control = self._there(step), TrainerControl()
        DefaultFlowCallback().on_step_end(self.args, there, control)
        return _gathers(control) or control.should_training_stop or self.at_pass_end(step)

    def at_pass_end(self, step: int) -> bool:
        """Where a pass ends with this step, and "epoch" strategies ask for something."""
        if not self.steps_per_pass or step % self.steps_per_pass:
            return False
        there, control = self._there(step), TrainerControl()
        there.epoch = step / self.steps_per_pass
        DefaultFlowCallback().on_epoch_end(self.args, there, control)
        return _gathers(control)

    def _there(self, step: int) -> TrainerState:
        there = copy.copy(self.state)
        there.global_step, there.max_steps = step, self.planned_end or step + 1
        return there


@dataclass
class StepTooMany:
    """
    Before a step too many: Trainer, resumed from a checkpoint of the last step in the middle of a pass, takes one more
    and stops then.

    Args:
        kept (`list`): Parameters and buffers with copies of their values.
        step (`int`), epoch (`float`): Trainer's clock.
    """

    kept: list[tuple[torch.Tensor, torch.Tensor]]
    step: int
    epoch: float

    @classmethod
    def of(cls, model: torch.nn.Module, state: TrainerState) -> StepTooMany:
        """Keep them."""
        return cls(_copies_of(model), state.global_step, state.epoch)

    def undo(self, state: TrainerState, control: TrainerControl) -> None:
        """
        As if it had not been taken; training ends, and what its last step asked for has been done by the run that took
        it.
        """
        _write_back(self.kept)
        state.global_step, state.epoch = self.step, self.epoch
        _stop_at_once(control)


def _copies_of(model: torch.nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Parameters and buffers with copies of their values."""
    return [(tensor, tensor.detach().clone()) for tensor in (*model.parameters(), *model.buffers())]


@torch.no_grad()
def _write_back(kept: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for tensor, value in kept:
        tensor.copy_(value)


def best_model(args: TrainingArguments, state: TrainerState) -> str:
    """What Trainer has loaded at the end, in words; empty where it is the end's own."""
    best = state.best_model_checkpoint if args.load_best_model_at_end else None
    return f"the best checkpoint's, {best}" if best else ""


def _gathers(control: TrainerControl) -> bool:
    """Whether Trainer is about to meet all ranks in collectives of its own."""
    return control.should_log or control.should_evaluate or control.should_save


def _stop_at_once(control: TrainerControl) -> None:
    """Training ends, and nothing is logged, evaluated or saved."""
    control.should_training_stop = True
    control.should_log = control.should_evaluate = control.should_save = False


def _steps_per_pass(args: TrainingArguments, dataloader: Any) -> int | None:
    """Optimizer steps of a pass over the data, as Trainer counts them; None where they have no length."""
    try:
        return max(1, -(-len(dataloader) // args.gradient_accumulation_steps))
    except TypeError:
        return None
