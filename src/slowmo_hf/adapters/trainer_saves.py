"""Trainer's events of saving and resuming, as calls of `TrainerCheckpoints`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .. import upstream
from ..training.outer_loop import OuterLoop
from .trainer_checkpoints import TrainerCheckpoints


class TrainerSaves:
    """
    The checkpoints of one training run: complete from its start to `end`.

    With them goes what else differs between workers: a scaler that skipped a step, and the scheduler that it held
    back.

    Args:
        args (`TrainingArguments`): The run's.
        outer_loop (`OuterLoop`): Started.
    """

    def __init__(self, args: TrainingArguments, outer_loop: OuterLoop) -> None:
        self.args = args
        self.outer_loop = outer_loop
        self._checkpoints = TrainerCheckpoints(args, outer_loop)

    def end(self) -> None:
        """Give the arguments back as they were."""
        self._checkpoints.end()

    def resume(self, trainer: Trainer, scheduler: Any, state: TrainerState, callback_name: str) -> None:
        """Go on from every worker's own state, if the checkpoint that Trainer has loaded is ours. Collective."""
        callbacks: Any = state.stateful_callbacks or {}
        recorded = callbacks.get(callback_name)
        recorded = recorded[-1] if isinstance(recorded, list) else recorded
        objects = self._checkpoints.resume(state, recorded["attributes"]["checkpoint"] if recorded else None)
        for name, own in _own_objects(trainer, scheduler).items():
            if name in objects:
                own.load_state_dict(objects[name])

    def record(self, trainer: Trainer, state: TrainerState) -> dict[str, Any]:
        """Where our part of this step's checkpoint is, for `trainer_state.json`."""
        run = None if self.args.save_only_model else self.outer_loop.run_id
        return {"run": run, "folder": str(_folder(trainer, state))}

    def write(self, trainer: Trainer, scheduler: Any, state: TrainerState) -> None:
        """Before Trainer's own files. Collective."""
        self._checkpoints.write(_folder(trainer, state), _states(trainer, scheduler))

    def finish(self, trainer: Trainer, scheduler: Any, state: TrainerState) -> None:
        """After Trainer's own files: the checkpoint is whole, and pushed. Collective."""
        folder = _folder(trainer, state)
        self._checkpoints.finish(folder, _states(trainer, scheduler), state)
        self._checkpoints.push(trainer, folder)


def _folder(trainer: Trainer, state: TrainerState) -> Path:
    """Trainer's checkpoint folder of this step."""
    return Path(upstream.output_folder(trainer)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _own_objects(trainer: Trainer, scheduler: Any) -> dict[str, Any]:
    scaler = getattr(trainer.accelerator, "scaler", None)
    return {} if scaler is None else {"scaler": scaler, "scheduler": scheduler}


def _states(trainer: Trainer, scheduler: Any) -> dict[str, Any]:
    return {name: own.state_dict() for name, own in _own_objects(trainer, scheduler).items()}
