"""Trainer's saving and resuming, as calls of `TrainerCheckpoints`."""

from __future__ import annotations

import functools
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .. import upstream
from ..checkpoints.last_lines import Saves
from ..checkpoints.state import save_names
from ..training.outer_loop import OuterLoop
from ..training.written import LoadedSettings
from .trainer_checkpoints import TrainerCheckpoints
from .trainer_methods import Looks, Method, and_then, replace_method


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
        self._saves = Saves("trainer.train(resume_from_checkpoint={})", raised_in="trainer.py")

    def begin(self, trainer: Trainer, looks: Looks, given_back: ExitStack) -> None:
        """From here to the end the Trainer's checkpoints are complete."""
        self._saves.begin()
        given_back.callback(self._checkpoints.end)
        wrap = functools.partial(self._around_own_files, trainer, looks)
        replace_method(trainer, upstream.SAVE_CHECKPOINT, wrap, given_back)
        seal_again = functools.partial(and_then, lambda *event: self._checkpoints.seal_again())
        replace_method(trainer.callback_handler, "on_save", seal_again, given_back)

    def end(self) -> None:
        """Training has ended, and by no error: one from now on is not this run's."""
        self._saves.end()

    def resume(self, trainer: Trainer, state: TrainerState, loaded: LoadedSettings) -> None:
        """
        Go on from every worker's own state, if the checkpoint that Trainer has loaded is ours, but for what the
        program has set since then. Collective.
        """
        give_back = loaded.changes(self.outer_loop.inner_state.optimizer, self.outer_loop.tensors)
        folder = upstream.loaded_checkpoint(trainer)
        objects = self._checkpoints.resume(state, folder)
        if folder is not None:
            self._saves.add(folder)
        give_back(objects)
        if "scaler" in objects and trainer.accelerator.scaler is not None:
            trainer.accelerator.scaler.load_state_dict(objects["scaler"])

    def record(self) -> dict[str, str] | None:
        """Which save our part of a checkpoint is that Trainer writes now, for `trainer_state.json`."""
        return None if self.args.save_only_model else save_names(self.outer_loop)

    def keep_the_best_alone(self, trainer: Trainer, state: TrainerState) -> None:
        """As `TrainerCheckpoints.keep_the_best_alone`, where training has ended."""
        self._checkpoints.keep_the_best_alone(Path(upstream.output_folder(trainer)), state.best_model_checkpoint)

    def _around_own_files(self, trainer: Trainer, looks: Looks, save: Method) -> Method:
        @functools.wraps(save)
        def save_all(*args: Any, **kwargs: Any) -> Any:
            """Collective: our part before Trainer's own files; behind them the checkpoint is whole, and is pushed."""
            folder = Path(upstream.output_folder(trainer)) / f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}"
            states = {name: own.state_dict() for name, own in _own_objects(trainer).items()}
            with looks.look(keep_writes=True):
                self.outer_loop.consensus.hear_of_writes()
                self._checkpoints.write(folder, states)
                result = save(*args, **kwargs)
                self._checkpoints.finish(folder, trainer.state)
                if not self.args.save_only_model:  # nothing goes on from weights alone
                    self._saves.add(folder)
                self._checkpoints.push(trainer, folder)
            return result

        return save_all


def _own_objects(trainer: Trainer) -> dict[str, Any]:
    scaler = getattr(trainer.accelerator, "scaler", None)
    return {} if scaler is None else {"scaler": scaler, "scheduler": trainer.lr_scheduler}
