"""What a recipe's run is and has cost, in each of its checkpoints: a run that goes on stays that run."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import get_last_checkpoint

from records import SettingError
from slowmo_hf import RoundReport, SlowMoCallback, SlowMoConfig

# Of a run's settings, those that may change when it goes on: they leave what was trained as it is.
_FREE = {"stash_device", "slow_state_device", "shard_slow_state", "bucket_bytes", "timeout_seconds"}
_TRAINING = (
    *("learning_rate", "optim", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "lr_scheduler_type"),
    *("warmup_steps", "seed", "data_seed", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("label_smoothing_factor", "max_grad_norm", "bf16", "fp16"),
)
# What a checkpoint's optimizer and schedule bring back, whatever is asked; and what does change behind a checkpoint.
_LOADED = {"learning_rate", "optim", "weight_decay", "inner_momentum", "adam_beta1", "adam_beta2", "adam_epsilon"}
_MAY_CHANGE = {"outer_lr", "outer_momentum", "compression", *_TRAINING} - _LOADED


def settings_of(config: SlowMoConfig, args: TrainingArguments, task: dict[str, Any]) -> dict[str, Any]:
    """What a record says of how its model was trained; `task` has the recipe's own. Of JSON's types."""
    settings = {name: value for name, value in config.to_dict().items() if name not in _FREE}
    settings |= {name: getattr(args, name) for name in _TRAINING}
    return dict(json.loads(json.dumps(settings | task)))


def checkpoint_to_resume(args: TrainingArguments, settings: dict[str, Any]) -> str | None:
    """
    `--resume_from_checkpoint true`: the newest whole one in the output folder, and a fresh start where there is none,
    so that a job that is requeued runs the same command again. Anything else is a path, from which a run may go on
    with other settings. All ranks decide alike.

    Raises:
        SettingError: There is no such folder. The checkpoint is of a run with another value of a setting: of any with
            true, else of one that Trainer takes from the checkpoint. Trainer is to make the callbacks anew.
    """
    asked = args.resume_from_checkpoint
    if args.restore_callback_states_from_checkpoint:
        raise SettingError(
            "restore_callback_states_from_checkpoint must be false, got True: the recipe's callbacks go on from a "
            "checkpoint by themselves. Leave --restore_callback_states_from_checkpoint out."
        )
    if asked is None or asked.lower() == "false":
        return None
    if asked.lower() != "true":
        _check_is_there(asked)
        has_optimizer = any(Path(asked).glob("optimizer*"))  # of `save_only_model` there is none
        loaded = {name: value for name, value in settings.items() if name in _LOADED and has_optimizer}
        _refuse_others(asked, loaded, f"from {asked!r}", "leave --resume_from_checkpoint out")
        return asked
    if not Path(args.output_dir).is_dir():
        return None
    # As at a Trainer's start: what a killed run left unfinished is set aside.
    SlowMoCallback().on_init_end(args, TrainerState(), TrainerControl())
    found = get_last_checkpoint(args.output_dir)
    _refuse_others(found, settings, f"with the run in output_dir={args.output_dir!r}", "set --output_dir")
    return found


def _check_is_there(checkpoint: str) -> None:
    """On one machine at least; Trainer says what it lacks on another. All ranks decide alike."""
    if not any(gather_object([Path(checkpoint).is_dir()])):
        raise SettingError(
            f"resume_from_checkpoint must be true, false or a checkpoint's folder, got {checkpoint!r}, which is no "
            "folder. Set --resume_from_checkpoint."
        )


def check_resumed_model(checkpoint: str | None, shape: dict[str, Any], model: str, flags: str) -> None:
    """
    A checkpoint must be of a model of the same shape: its weights may fit another and mean something else. All ranks
    decide alike.

    Args:
        checkpoint (`str`, *optional*): As `checkpoint_to_resume` gives it.
        shape (`dict[str, Any]`): This run's: fields of a model's `config.json`, and `num_labels`.
        model (`str`): What this run's model is called in the error.
        flags (`str`): That choose it.

    Raises:
        SettingError: It is of another shape.
    """
    if checkpoint is None:
        return
    file = Path(checkpoint) / "config.json"
    config = json.loads(file.read_text()) if file.is_file() else {}
    if "label2id" in config:
        config["num_labels"] = len(config["label2id"])
    for there in gather_object([{name: config[name] for name in shape if name in config}]):
        if any(shape[name] != value for name, value in there.items()):
            raise SettingError(
                f"resume_from_checkpoint must be of a model of the same size, got {checkpoint!r} with {there}, and "
                f"{model} is {shape}. Set {flags} to that run's, or start anew in another --output_dir, without "
                "--resume_from_checkpoint."
            )


def _refuse_others(checkpoint: str | None, settings: dict[str, Any], where: str, anew: str) -> None:
    """Raise for the first setting that the checkpoint's run had otherwise."""
    for name, was, now in _differences(_noted(checkpoint), settings):
        back = f"Leave --{name} out" if was is None else f"Set --{name}"
        change = "; to change it on the way set --resume_from_checkpoint to a checkpoint's folder"
        raise SettingError(
            f"{name} must be {was!r} to go on {where}, got {now!r}. {back}, or {anew} for a run of its own"
            f"{change if name in _MAY_CHANGE else ''}."
        )


def _noted(checkpoint: str | None) -> dict[str, Any]:
    """What `OneRun` has left there; nothing where it was not."""
    file = Path(checkpoint or "") / "trainer_state.json"
    callbacks = json.loads(file.read_text()).get("stateful_callbacks", {}) if checkpoint and file.is_file() else {}
    return dict(callbacks.get(OneRun.__name__, {}).get("attributes", {}))


def _differences(noted: dict[str, Any], settings: dict[str, Any]) -> list[list[Any]]:
    there = noted.get("settings", {})
    return [[name, there[name], now] for name, now in settings.items() if name in there and there[name] != now]


class OneRun(TrainerCallback, ExportableState):
    """
    Counts over all parts of a run, and notes it in every checkpoint.

    Args:
        trainer (`Trainer`): That will train, with a `SlowMoCallback`.
        settings (`dict[str, Any]`): Of this part (`settings_of`).

    Attributes:
        workers (`int`): While it trains and behind it.
        seconds (`float`): From the first step to the last, evaluations and saves included; what was lost behind a
            checkpoint is not among them.
        rounds (`int`), bytes_sent (`int`), seconds_communicating (`float`): Of this rank.
        changed_on_resume (`list`): [step, setting, before, after] of every setting that another part has otherwise.
    """

    def __init__(self, trainer: Trainer, settings: dict[str, Any]) -> None:
        self._slowmo = next(c for c in trainer.callback_handler.callbacks if isinstance(c, SlowMoCallback))
        self.settings = settings
        self._last: RoundReport | None = None
        self._take_up({}, 0)
        trainer.add_callback(self)

    def _take_up(self, noted: dict[str, Any], step: int) -> None:
        self._seconds_before = noted.get("seconds", 0.0)
        self._begun, self._ended = time.perf_counter(), 0.0
        self.rounds, self.bytes_sent = noted.get("rounds", 0), noted.get("bytes_sent", 0)
        self.seconds_communicating = noted.get("seconds_communicating", 0.0)
        changed = [[step, *change] for change in _differences(noted, self.settings)]
        self.changed_on_resume = [*noted.get("changed_on_resume", []), *changed]

    @property
    def workers(self) -> int:
        """0 before training starts."""
        return self._slowmo.workers

    @property
    def seconds(self) -> float:
        """Until now, or until training ended."""
        return self._seconds_before + (self._ended or time.perf_counter()) - self._begun

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go on from the checkpoint's counts."""
        callbacks: Any = state.stateful_callbacks
        noted = callbacks.setdefault(type(self).__name__, {})  # Trainer's save looks it up
        self._take_up(noted.get("attributes", {}) if state.global_step else {}, state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count the round that this step has ended, if it has."""
        report = self._slowmo.last_round
        if report is not None and report is not self._last:
            self._last = report
            self.rounds = report.round
            self.bytes_sent += report.bytes_sent
            self.seconds_communicating += report.seconds

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """What comes behind is no training."""
        self._ended = time.perf_counter()

    def state(self) -> dict[str, Any]:
        """What `trainer_state.json` holds of it (`ExportableState`): rank 0's."""
        names = ("settings", "seconds", "rounds", "bytes_sent", "seconds_communicating", "changed_on_resume")
        return {"args": {}, "attributes": {name: getattr(self, name) for name in names}}
