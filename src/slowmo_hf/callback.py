"""SlowMoCallback: Trainer's events drive the outer loop; nothing else in the user's script changes."""

from __future__ import annotations

import copy
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import DefaultFlowCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from . import upstream
from .communicator import processes_in_job
from .config import GOSSIP_BASES, SlowMoConfig
from .isolation import Isolation, ddp_wrappers, refuse_unsupported
from .log import logger, make_heard
from .model_tensors import inner_lrs
from .outer_loop import OuterLoop
from .round_report import RoundReport
from .stop_signals import REQUEUE_EXIT_CODE, StopSignals
from .trainer_checkpoints import TrainerCheckpoints, set_aside_unfinished


class SlowMoCallback(TrainerCallback, ExportableState):
    """
    Turns a stock `Trainer` run into Local SGD with slow momentum (SlowMo, https://huggingface.co/papers/1910.00643).

        Trainer(..., callbacks=[SlowMoCallback()]).train()

    is all there is to write. Evaluation and saved models see the workers' average; training then goes on from the
    local weights; at the end the model is the average. Make it the last callback, so that it sees what the others ask
    for.

    Args:
        config (`SlowMoConfig` or `dict`, *optional*): The settings, or `SlowMoConfig.to_dict()` of them; the defaults
            where it is None.
    """

    def __init__(self, config: SlowMoConfig | dict[str, Any] | None = None) -> None:
        self.config = SlowMoConfig.from_dict(config) if isinstance(config, dict) else config or SlowMoConfig()
        self.checkpoint: dict[str, Any] | None = None
        self._checkpoints: TrainerCheckpoints | None = None
        self.outer_loop: OuterLoop | None = None
        self._isolation: Isolation | None = None
        self._training = False
        self._ended = self._stopped = False
        self._planned_end: int | None = None  # max_steps, where it is the same on all ranks
        self._stop_signals: StopSignals | None = None
        self._stock_token_average: bool | None = None
        self._unlogged: list[RoundReport] = []
        self._round_ended = False  # at this step
        self._beyond: _Beyond | None = None
        self._trainer: weakref.ref[Trainer] | None = None

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

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compare and equalise the ranks, switch off what couples them, take the anchors."""
        make_heard()
        self._follow()
        callbacks: Any = state.stateful_callbacks
        callbacks.setdefault(type(self).__name__, {})  # a stock checkpoint has none, and Trainer's save looks it up
        self._restore(args)  # a run that failed (auto_find_batch_size) never reached its end
        refuse_unsupported()
        optimizer = _raw_optimizer(kwargs["optimizer"])
        outer_loop = OuterLoop(optimizer, self.config, kwargs["model"])
        wrappers = ddp_wrappers(kwargs["model"].parameters(), within=self._find_trainer().model_wrapped)
        if args.world_size != processes_in_job():
            raise RuntimeError(
                f"torch.distributed has {processes_in_job()} processes, but TrainingArguments.world_size is "
                f"{args.world_size}: every process would train on all data. On CPU, set use_cpu=True or "
                "ACCELERATE_USE_CPU=true (docs/launch.md)."
            )
        if args.world_size > 1 and not wrappers:
            raise RuntimeError(
                f"world_size is {args.world_size}, but no DistributedDataParallel wrapper of the model was found, so "
                "it is unknown who averages gradients. Launch with torchrun or accelerate launch."
            )
        self.outer_loop = None
        outer_loop.start(attempted_steps=state.global_step, broadcast_frozen=not wrappers)
        if self.config.base != "all_reduce":
            self._isolation = Isolation(wrappers, outer_loop.workers.gradients.group)
            self._isolate_tokens(args)
            _advise(args, self.config)
        self._take_up_checkpoints(outer_loop, args, state, kwargs)
        self.outer_loop = outer_loop
        self._training, self._ended, self._stopped = True, False, False
        self._unlogged, self._round_ended = [], False
        if self.config.base in GOSSIP_BASES:
            plans = set(outer_loop.workers.world.gather_objects(state.max_steps))
            self._planned_end = plans.pop() if len(plans) == 1 else None
        if self.config.has_rounds:
            self._stop_signals = StopSignals(self._on_signal)
        if args.eval_on_start:
            # Workers agree, so nothing is sent: it keeps what the evaluation draws from the generators.
            outer_loop.consensus.show()

    def _take_up_checkpoints(
        self, outer_loop: OuterLoop, args: TrainingArguments, state: TrainerState, events: dict[str, Any]
    ) -> None:
        """From here on checkpoints are complete; a run that was resumed goes on from every worker's own state."""
        if not self.config.has_rounds:
            return  # stock training: Trainer's checkpoints are complete
        self._checkpoints = TrainerCheckpoints(args, outer_loop)
        if state.global_step:
            callbacks: Any = state.stateful_callbacks or {}
            recorded = callbacks.get(type(self).__name__)
            recorded = recorded[-1] if isinstance(recorded, list) else recorded
            try:
                objects = self._checkpoints.resume(state, recorded["attributes"]["checkpoint"] if recorded else None)
            except Exception:
                self._restore(args)
                raise
            for name, own in self._own_objects(events).items():
                if name in objects:
                    own.load_state_dict(objects[name])

    def _own_objects(self, events: dict[str, Any]) -> dict[str, Any]:
        """What else differs between workers: a scaler that skipped a step, and the scheduler that it held back."""
        scaler = getattr(self._find_trainer().accelerator, "scaler", None)
        return {} if scaler is None else {"scaler": scaler, "scheduler": events["lr_scheduler"]}

    def state(self) -> dict[str, Any]:
        """
        What `trainer_state.json` holds of this callback (`ExportableState`): its settings, and where our part of the
        checkpoint is.
        """
        return {"args": {"config": self.config.to_dict()}, "attributes": {"checkpoint": self.checkpoint}}

    def _isolate_tokens(self, args: TrainingArguments) -> None:
        """
        Trainer would gather the token count at every step and scale the loss for gradients averaged over the world.
        """
        self._stock_token_average = args.average_tokens_across_devices
        if args.average_tokens_across_devices and args.world_size > 1:
            logger.info("average_tokens_across_devices is switched off until training ends: it gathers at every step")
        args.average_tokens_across_devices = False

    def _on_signal(self, name: str) -> None:
        if self.outer_loop is not None:
            self.outer_loop.status.stop_asked = True
        logger.warning(
            "%s: all ranks save when they next take in a round, and exit with code %d", name, REQUEUE_EXIT_CODE
        )

    def _restore(self, args: TrainingArguments) -> None:
        self._training = False
        if self._stop_signals is not None:
            self._stop_signals.release()
            self._stop_signals = None
        if self._isolation is not None:
            self._isolation.release()
            self._isolation = None
        if self._checkpoints is not None:
            self._checkpoints.end()
            self._checkpoints = None
        if self._stock_token_average is not None:
            args.average_tokens_across_devices = self._stock_token_average
            self._stock_token_average = None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """
        Leave the average (or the best model, if Trainer has just loaded it) in the model, and DDP as it was.

        Raises:
            SystemExit: A signal asked for the end: with `REQUEUE_EXIT_CODE`, after the save.
        """
        if self.outer_loop is None:
            return
        if self.outer_loop.view.is_shown or not args.load_best_model_at_end:
            self._end(args, state, kwargs, pass_end_is_ahead=False)
            self.outer_loop.consensus.keep()
        self._log(control)
        self._restore(args)
        self.outer_loop.workers.roll_call.leave("its training ended")
        if self._stopped:
            logger.warning(
                "saved at step %d after a signal: exit code %d asks for a requeue",
                state.global_step,
                REQUEUE_EXIT_CODE,
            )
            raise SystemExit(REQUEUE_EXIT_CODE)

    # ---- the clock ----

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """
        Count the step (also one that the scaler skipped), and do a round if one is due: the scheduler has not stepped
        yet.
        """
        assert self.outer_loop is not None
        if self._beyond is not None:
            return
        report = self.outer_loop.step(inner_lrs(_raw_optimizer(kwargs["optimizer"])))
        self._round_ended = report is not None
        if report is not None:
            self._unlogged.append(report)

    # ---- looks: evaluation and saving follow on_step_end and on_epoch_end ----

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """
        Give the local weights back. The generators went back after the look: the next batches have been drawn since.
        """
        if self.outer_loop is not None:
            self.outer_loop.consensus.restore(give_back_random_state=False)
            if state.global_step >= state.max_steps and self._beyond is None:
                self._beyond = _Beyond.of(kwargs["model"], state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the average where an evaluation, a save or the end follows; log the rounds where Trainer logs."""
        if self._beyond is not None:
            self._beyond.undo(state, control)
            self._beyond = None
        if self.outer_loop is not None and self._round_ended:
            self._stop_with_others(state, control, self.outer_loop.status.somebody_ended)
        if not self._all_gather(control):
            self._stop_with_others(state, control, True)
        self._look_if_due(args, state, control, kwargs)
        if control.should_log or control.should_training_stop:
            self._log(control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """
        As at a step's end; a rank that stops ends with the others first, and then all do what an epoch's end asks for.
        """
        if not control.should_training_stop and not self._all_gather(control):
            control.should_training_stop = True
        if control.should_training_stop:
            self._end(args, state, kwargs)
        self._look_if_due(args, state, control, kwargs)

    def _all_gather(self, control: TrainerControl) -> bool:
        """Meet before Trainer gathers: False where a rank has ended, and will not come."""
        return (
            not _gathers(control) or self._ended or self.outer_loop is None or self.outer_loop.meet_before_gathering()
        )

    @property
    def _all_are_asked_to_stop(self) -> bool:
        return self.outer_loop is not None and self.outer_loop.status.stop_agreed

    def _stop_with_others(self, state: TrainerState, control: TrainerControl, somebody_ended: bool) -> None:
        """A rank that was sent a signal, or has no more data, has said so where all met: all stop together."""
        if somebody_ended:
            logger.warning(
                "a rank has ended its training (out of data, or asked to stop): all stop with it at step %d, and "
                "nothing is evaluated or saved there",
                state.global_step,
            )
            _stop_at_once(control)  # the rest gathers, and that rank will not come
            self._stopped = False  # nothing is saved, and nobody need come back
        elif self._all_are_asked_to_stop and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = self._stopped = True

    def _look_if_due(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, events: dict[str, Any]
    ) -> None:
        if self.outer_loop is None:
            return
        if control.should_evaluate or control.should_save:
            self.outer_loop.consensus.show()
        elif control.should_training_stop and not control.should_log:  # a log comes first, which all gather for
            self._end(args, state, events)
        if self._checkpoints and control.should_evaluate:
            # save_strategy="best" decides after the evaluation, and Trainer writes state() before on_save.
            self._folder(args, state)
        if self._checkpoints and control.should_save:
            self._checkpoints.write(self._folder(args, state), self._states(events))

    def _end(
        self, args: TrainingArguments, state: TrainerState, events: dict[str, Any], *, pass_end_is_ahead: bool = True
    ) -> None:
        """Once: all ranks end together, on the average."""
        if self.outer_loop is not None and not self._ended:
            self._ended = True
            meetings = _Meetings(args, state, self._planned_end, _steps_per_pass(args, events.get("train_dataloader")))
            all_stop = state.global_step == self._planned_end or self._stopped or self.outer_loop.status.somebody_ended
            all_meet_here = all_stop or (pass_end_is_ahead and meetings.at_pass_end(state.global_step))
            self.outer_loop.end(all_meet_here=all_meet_here, others_meet_at=meetings.at)
            if self.config.has_rounds:
                state.global_step = self.outer_loop.attempted_steps
                # Trainer gathers it once more: an int 0 where no step has followed a log, and a float elsewhere, would
                # abort in gloo.
                trainer: Any = self._find_trainer()
                trainer.current_flos = float(trainer.current_flos)

    def _folder(self, args: TrainingArguments, state: TrainerState) -> Path:
        """Trainer's checkpoint folder of this step; recorded for `trainer_state.json`."""
        trainer = self._find_trainer()
        folder = Path(upstream.output_folder(trainer)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        run = self.outer_loop.run_id if self.outer_loop and not args.save_only_model else None
        self.checkpoint = {"run": run, "folder": str(folder)}
        return folder

    def _states(self, events: dict[str, Any]) -> dict[str, Any]:
        return {name: own.state_dict() for name, own in self._own_objects(events).items()}

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that the average was what Trainer saw; undo what the evaluation drew from the random generators."""
        self._after_look("evaluated")

    def on_predict(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        """As after an evaluation."""
        self._after_look("predicted with")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """As after an evaluation; then the checkpoint is whole."""
        self._after_look("saved")
        if self._checkpoints:
            folder = self._folder(args, state)
            self._checkpoints.finish(folder, self._states(kwargs), state)
            self._checkpoints.push(self._find_trainer(), folder)

    def _after_look(self, verb: str) -> None:
        if self.outer_loop is None or not self._training:
            return
        if self.outer_loop.view.is_shown:
            self.outer_loop.view.give_back_random_state()
        elif not self.outer_loop.clock.workers_agree:
            raise RuntimeError(
                f"one worker's own weights were {verb}, not the average: another callback asked for it after "
                "SlowMoCallback had looked. Make SlowMoCallback the last callback."
            )

    # ---- logs ----

    def _log(self, control: TrainerControl) -> None:
        """
        Emit the rounds since the last log through Trainer's own `log`: sums of bytes and seconds, the last round's
        norms.
        """
        if not self._unlogged:
            return
        rounds, self._unlogged = self._unlogged, []
        logs = rounds[-1].to_logs()
        logs["slowmo/bytes_sent"] = sum(r.bytes_sent for r in rounds)
        logs["slowmo/seconds"] = sum(r.seconds for r in rounds)
        logs["slowmo/utilisation"] = sum(r.utilisation for r in rounds) / len(rounds)
        should_log = control.should_log
        self._find_trainer().log(logs)
        control.should_log = should_log  # on_log clears it, and Trainer would leave its own loss out

    def _follow(self) -> None:
        """The Trainer whose event this is: of all that hold this callback, the one that is calling it."""
        trainer = upstream.calling_object(Trainer)
        if trainer is not None:
            self._trainer = weakref.ref(trainer)

    def _find_trainer(self) -> Trainer:
        trainer = self._trainer() if self._trainer else None
        if trainer is None:
            raise RuntimeError("no Trainer is known to this SlowMoCallback: call callback.attach(trainer).")
        return trainer


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
class _Beyond:
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
    def of(cls, model: torch.nn.Module, state: TrainerState) -> _Beyond:
        """Keep them."""
        return cls(
            [(t, t.detach().clone()) for t in (*model.parameters(), *model.buffers())], state.global_step, state.epoch
        )

    @torch.no_grad()
    def undo(self, state: TrainerState, control: TrainerControl) -> None:
        """
        As if it had not been taken; training ends, and what its last step asked for has been done by the run that took
        it.
        """
        for tensor, value in self.kept:
            tensor.copy_(value)
        state.global_step, state.epoch = self.step, self.epoch
        _stop_at_once(control)


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


def _raw_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """Behind Accelerate's wrapper. A SlowMoOptimizer there would mean two outer loops over one model."""
    raw = getattr(optimizer, "optimizer", optimizer)
    if hasattr(raw, "outer_loop"):
        raise ValueError("the Trainer's optimizer is a SlowMoOptimizer: use it or SlowMoCallback, not both.")
    assert isinstance(raw, torch.optim.Optimizer)
    return raw


def _advise(args: TrainingArguments, config: SlowMoConfig) -> None:
    """What couples the ranks because the user asked for it is left alone, and said."""
    if args.world_size == 1:
        return
    if args.logging_strategy == "steps" and config.overlap_steps:
        logger.info(
            "logging_steps=%s: each log gathers the loss of all ranks, and waits for the slowest", args.logging_steps
        )
    elif args.logging_strategy == "steps" and int(args.logging_steps) % config.sync_every:
        logger.info(
            "logging_steps=%s: each log gathers the loss of all ranks; a multiple of sync_every=%d would wait for "
            "nobody",
            args.logging_steps,
            config.sync_every,
        )
    if getattr(args, "include_num_input_tokens_seen", "no") not in ("no", False):
        logger.warning("include_num_input_tokens_seen gathers at every micro-batch; leave it out for a quiet wire")
