"""SlowMoCallback: Trainer's events drive the outer loop; nothing else in the user's script changes."""

from __future__ import annotations

import weakref
from contextlib import ExitStack
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from .. import upstream
from ..dtensors import sharded_modules
from ..log import make_heard
from ..training.ending import log_end
from ..training.model_tensors import inner_lrs
from ..training.optimizers_inside import parameters_of
from ..training.outer_loop import OuterLoop
from ..training.program import compare_programs
from ..training.report import RoundReport
from ..training.written import LoadedSettings
from .given import ConfigInUse, Settings, config_of
from .isolation import Isolation, ddp_wrappers, refusal
from .refusals import JoinRefusal
from .stop_signals import StopSignals
from .trainer_checkpoints import set_aside_unfinished
from .trainer_end import Ending, StepTooMany, best_model, checked_loop, refuse_uncounted, stays_in
from .trainer_gathers import average_tokens_inside
from .trainer_logs import RoundLogs
from .trainer_methods import Looks, given_back_of
from .trainer_saves import TrainerSaves
from .trainer_start import (
    advise,
    program_of,
    raw_optimizer,
    refuse_resumable_saves,
    refuse_shared,
    refuse_wrong_launch,
)
from .trainer_views import TrainerViews


class SlowMoCallback(TrainerCallback, ExportableState):
    """
    Turns a stock `Trainer` run into Local SGD with slow momentum (SlowMo, https://huggingface.co/papers/1910.00643).

        Trainer(..., callbacks=[SlowMoCallback(outer_momentum=0)]).train()  # 0: for Adam and fewer than 8 workers

    is all there is to write. Evaluation and saved models see the workers' average; training then goes on from the
    local weights; at the end the model is the average. `trainer.evaluate`, `predict` and `save_model` see the average
    too where your own code calls them while it trains, on all ranks; `slowmo_hf.consensus(trainer)` is for anything
    else.

    Args:
        config (`SlowMoConfig` or `dict`, *optional*): The settings, or `SlowMoConfig.to_dict()` of them; the defaults
            where it is None.
        settings (*optional*): Fields of `SlowMoConfig` in place of `config`: `SlowMoCallback(sync_every=24)`.

    Raises:
        ValueError, TypeError: `config` is something else; a setting is wrong, or there is none of that name.
    """

    config = ConfigInUse("_training")

    def __init__(self, config: Settings = None, **settings: Any) -> None:
        self.config = config_of(config, settings, write="SlowMoCallback({})")
        self.checkpoint: dict[str, Any] | None = None
        self.outer_loop: OuterLoop | None = None
        self._ending: Ending | None = None
        self._saves: TrainerSaves | None = None
        self._training = False
        self.looks = Looks()
        self._given_back = ExitStack()  # its Trainer's, from the start of training
        self._round_logs = RoundLogs()
        self._counted_step = -1  # Trainer's, of the last step that was counted
        self._step_too_many: StepTooMany | None = None
        self._trainer: weakref.ref[Trainer] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """The settings, and what a subclass has added: a copy has not begun to train."""
        return {**vars(self), **vars(SlowMoCallback(self.config))}

    def attach(self, trainer: Trainer) -> SlowMoCallback:
        """Tell the callback its Trainer. Optional: without it, it knows the one that calls its events."""
        self._trainer = weakref.ref(trainer)
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        return self

    @property
    def last_round(self) -> RoundReport | None:
        """The report of the last round, or None before the first."""
        return self.outer_loop.last_round if self.outer_loop else None

    @property
    def workers(self) -> int:
        """Workers in this job, processes over processes per worker; 0 before training starts."""
        return self.outer_loop.workers.count if self.outer_loop else 0

    # ---- the start and the end ----

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set aside what a killed run left unfinished."""
        make_heard()
        set_aside_unfinished(args)

    def begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        *,
        model: Any,
        optimizer: Any,
        loaded: LoadedSettings | None,
    ) -> None:
        """
        Compare and equalise the ranks, switch off what couples them, take the anchors. It is called behind all
        callbacks' `on_train_begin` (`trainer_start.py`): they may freeze some, and load weights. `loaded` is what
        they have begun with, where they have resumed.
        """
        make_heard()
        self._follow()
        callbacks: Any = state.stateful_callbacks
        callbacks.setdefault(type(self).__name__, {})  # a stock checkpoint has none, and Trainer's save looks it up
        self._restore()  # a run that failed (auto_find_batch_size) never reached its end
        self._given_back = given_back_of(self._find_trainer())
        self._given_back.close()  # nor did that of a callback in whose place Trainer has put this one
        self._given_back.callback(setattr, self, "_training", False)
        sharded = sharded_modules([model])
        refused = refusal([model], optimizer, has_rounds=self.config.has_rounds)
        refuse_resumable_saves(args, model)
        inner = raw_optimizer(optimizer)
        outer_loop = OuterLoop(inner, self.config, model)
        trained = [*model.parameters(), *parameters_of(inner)]  # a head beside the model, too
        wrappers = ddp_wrappers(trained, within=self._find_trainer().model_wrapped)
        refuse_wrong_launch(args, wrappers or sharded)
        self.outer_loop = self._ending = None  # the slow state of a run before goes first
        self._round_logs = RoundLogs()
        outer_loop.clock.max_steps = state.max_steps
        outer_loop.start(attempted_steps=state.global_step, broadcast_frozen=not wrappers, refused=refused)
        compare_programs(outer_loop.workers.world, program_of(args))
        self._given_back.callback(JoinRefusal(wrappers, self.config).release)
        average_tokens = args.average_tokens_across_devices
        if self.config.base != "all_reduce":
            group, timeout = outer_loop.workers.gradients.group, self.config.timeout_seconds
            self._given_back.callback(Isolation(wrappers, group, sharded, timeout_seconds=timeout).release)
            average_tokens_inside(self._find_trainer(), group, self._given_back)
            loader = self._find_trainer().callback_handler.train_dataloader
            advise(args, state, outer_loop.parts, loader)
        if self.config.has_rounds:  # without, it is stock training: Trainer's checkpoints are complete
            self._take_up_checkpoints(TrainerSaves(args, outer_loop), state, loaded)
        self.outer_loop = outer_loop
        stays_in(self._find_trainer(), self, self._given_back)
        self._training, self._counted_step, self._step_too_many = True, -1, None
        self._ending = Ending(outer_loop, state.max_steps)
        TrainerViews(self._find_trainer(), outer_loop, self._ending, self._end, self._given_back)
        if self.config.has_rounds:
            self._given_back.callback(StopSignals(self._ending.on_signal).release)
            self._round_logs.begin(self._find_trainer(), outer_loop, self._given_back)
            self.looks.begin(
                self._find_trainer(),
                outer_loop,
                catch_up=self._catch_up,
                average_tokens=average_tokens,
                given_back=self._given_back,
            )

    def _take_up_checkpoints(self, saves: TrainerSaves, state: TrainerState, loaded: LoadedSettings | None) -> None:
        """From here on checkpoints are complete; a run that was resumed goes on from every worker's own state."""
        self._saves = saves
        saves.begin(self._find_trainer(), self.looks, self._given_back)
        if state.global_step and loaded is not None:
            try:
                saves.resume(self._find_trainer(), state, loaded)
            except Exception:
                self._restore()
                raise

    def state(self) -> dict[str, Any]:
        """
        What `trainer_state.json` holds of this callback (`ExportableState`): its settings, and which save our part of
        the checkpoint is.
        """
        if self._saves:
            self.checkpoint = self._saves.record()
        return {"args": {"config": self.config.to_dict()}, "attributes": {"checkpoint": self.checkpoint}}

    def _restore(self) -> None:
        if self._saves:
            self._saves.end()
        self._training, self._saves = False, None
        self._given_back.close()
        self._given_back = ExitStack()

    def _end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        """
        Behind all callbacks of `on_train_end`: leave the average (or the best model, if Trainer has just loaded it) in
        the model, and DDP as it was.

        Raises:
            SystemExit: A signal asked for the end: with `REQUEUE_EXIT_CODE`, after the save.
        """
        if self.outer_loop is None or self._ending is None:
            return
        trainer, best = self._find_trainer(), best_model(args, state)
        if self.outer_loop.view.is_shown or not best:
            self._ending.end(trainer, args, state, pass_end_is_ahead=False, loaded=trainer.model if best else None)
            self.outer_loop.consensus.keep(loaded=bool(best))
        log_end(self.outer_loop.parts, self.outer_loop.in_flight, best)
        if self._saves and not self._ending.stopped:  # a requeue goes on from the last one
            self._saves.keep_the_best_alone(trainer, state)
        self._restore()
        self.outer_loop.workers.roll_call.leave("its training ended")
        self._ending.exit_if_stopped(state.global_step)

    # ---- the clock ----

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count the step, also one that the scaler skipped, and do a round if one is due: before the scheduler's."""
        self._count_step(kwargs["optimizer"], state)

    def _count_step(self, optimizer: Any, state: TrainerState) -> None:
        if self._step_too_many is not None or self._counted_step == state.global_step:
            return
        outer_loop = checked_loop(self._find_trainer, self.outer_loop if self._training else None)
        assert self._ending is not None
        self._counted_step = state.global_step
        report = outer_loop.step(inner_lrs(raw_optimizer(optimizer)))
        self._ending.round_ended = report is not None
        if report is not None:
            self._round_logs.rounds.append(report)
            outer_loop.in_flight.watch()

    def _catch_up(self) -> None:
        """A callback before this one shows the average where the step has been taken: it is counted first."""
        trainer = self._find_trainer()
        if upstream.is_telling(trainer.callback_handler, "on_optimizer_step"):
            self._count_step(trainer.optimizer, trainer.state)

    # ---- around the steps; what they show is in `trainer_views.py` ----

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A step too many leaves no trace: the first behind a resume. A later one was asked for, by `max_steps`."""
        is_first = self._training and self._counted_step < 0 < state.global_step
        if is_first and state.global_step >= state.max_steps and self._step_too_many is None:
            self._step_too_many = StepTooMany.of(kwargs["model"], state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """
        Take a step too many back.

        Raises:
            RuntimeError: The Trainer's own loop counts no steps.
        """
        if self._step_too_many is not None:
            self._step_too_many.undo(state, control)
            self._step_too_many = None
        elif self._training:
            refuse_uncounted(self._counted_step, state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """What a signal asked for is saved."""
        if self._ending:
            self._ending.saved_at = state.global_step

    # ---- its Trainer ----

    def _follow(self) -> None:
        """The Trainer whose event this is: of all that hold this callback, the one that is calling it."""
        callers = upstream.calling_objects(Trainer)
        if callers:
            callbacks = [c for c in callers[0].callback_handler.callbacks if isinstance(c, SlowMoCallback)]
            refuse_shared(callbacks, self._trainer() if self._training and self._trainer else None, callers[1:])
            self._trainer = weakref.ref(callers[0])

    def _find_trainer(self) -> Trainer:
        trainer = self._trainer() if self._trainer else None
        if trainer is None:
            raise RuntimeError("no Trainer is known to this SlowMoCallback: call callback.attach(trainer).")
        return trainer
