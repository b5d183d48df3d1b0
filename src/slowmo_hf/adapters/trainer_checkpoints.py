"""
A Trainer run's checkpoints: our part of each is written before Trainer's own, sealed after it, pushed, and found again
on resume.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.state import PartialState
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy

from .. import upstream
from ..checkpoints.files import FOLDER, is_whole, run_of, seal, verify_checkpoint
from ..checkpoints.state import check_snapshot, finish_together, keeps_files, read_together, together, write_snapshot
from ..contents import CheckpointError
from ..log import logger
from ..training.outer_loop import OuterLoop

_ASIDE = "incomplete-"


class TrainerCheckpoints:
    """
    Makes Trainer's checkpoints complete, whole or absent, from `begin` to `end` of a training run.

    Args:
        args (`TrainingArguments`): The run's. While it lasts, `save_total_limit` is hidden from Trainer, which would
            delete the last whole checkpoint before the new one is finished, and kept here; so is `hub_strategy`, for
            Trainer would push a checkpoint before it is whole. Without a shared file system `save_on_each_node` is
            set.
        outer_loop (`OuterLoop`): Started.
    """

    def __init__(self, args: TrainingArguments, outer_loop: OuterLoop) -> None:
        self.args = args
        self.outer_loop = outer_loop
        self.world = outer_loop.workers.world
        self._given = {name: getattr(args, name) for name in ("save_total_limit", "hub_strategy", "save_on_each_node")}
        self._written: Path | None = None
        self.keeper = keeps_files(outer_loop, Path(str(args.output_dir)), args.local_process_index)
        keepers = sum(self.world.gather_objects(self.keeper))
        if keepers > 1 and not args.save_on_each_node:
            logger.info("output_dir is not shared by all machines: save_on_each_node is set until training ends")
            args.save_on_each_node = True
        args.save_total_limit, args.hub_strategy = None, HubStrategy.END

    def end(self) -> None:
        """Give the arguments back as they were."""
        for name, value in self._given.items():
            setattr(self.args, name, value)

    # ---- saving ----

    def write(self, folder: Path, objects: dict[str, Any]) -> None:
        """Write our part, synced, before Trainer's own. Collective; with `save_only_model` nothing is written."""
        if self.args.save_only_model:
            return

        def write() -> None:
            write_snapshot(str(folder), self.outer_loop, shared=self.keeper, objects=objects)

        together(self.outer_loop, f"checkpoint {folder} cannot be written", write)
        self._written = folder

    def finish(self, folder: Path, objects: dict[str, Any], state: TrainerState) -> None:
        """Trainer's part is written too: seal the folder, then delete what is over `save_total_limit`. Collective."""
        if self._written != folder:  # save_strategy="best" decides after the evaluation
            self.write(folder, objects)

        def keep() -> None:
            if not self.keeper:
                return
            if self._written == folder:
                seal(folder, {"run": self.outer_loop.run_id, "step": state.global_step})
            self._rotate(folder, state.best_model_checkpoint)

        finish_together(self.outer_loop, folder, keep)
        self._written = None

    def push(self, trainer: Trainer, folder: Path) -> None:
        """What Trainer would have pushed to the Hub before the checkpoint was whole."""
        if self.args.push_to_hub:
            self.args.hub_strategy = self._given["hub_strategy"]
            try:
                upstream.push_checkpoint(trainer, str(folder))
            finally:
                self.args.hub_strategy = HubStrategy.END

    def _rotate(self, newest: Path, best: str | None) -> None:
        limit = self._given["save_total_limit"]
        if not limit or limit < 0:
            return
        keep = {newest.resolve(), *([Path(best).resolve()] if best else [])}
        found = sorted(_checkpoints(newest.parent), key=lambda path: path.stat().st_mtime)  # as Trainer does
        over = max(0, len(found) - max(limit, len(keep)))
        for path in [path for path in found if path.resolve() not in keep][:over]:
            logger.info("deleting %s: save_total_limit=%d", path, limit)
            # Under another name: a half-deleted folder is no checkpoint.
            shutil.rmtree(_set_aside(path), ignore_errors=True)

    # ---- resuming ----

    def resume(self, state: TrainerState, recorded: dict[str, Any] | None) -> dict[str, Any]:
        """
        Take up the checkpoint that Trainer has loaded. Collective.

        Args:
            state (`TrainerState`): The resumed one.
            recorded (`dict`, *optional*): What `trainer_state.json` says of our part: its run and folder. None: a
                stock run's.

        Returns:
            `dict`: State dictionaries of this worker's own scheduler and scaler.

        Raises:
            CheckpointError: It is damaged or does not fit; the same on every rank, before the first step.
        """
        if not recorded or not recorded.get("run"):
            logger.warning(
                "resumed at step %d from a checkpoint without local training's state: its weights and optimizer are "
                "taken, slow momentum starts fresh, and every worker takes rank 0's inner optimizer state",
                state.global_step,
            )
            return {}

        def verify() -> None:
            folder = self._find(state, recorded)
            if self.keeper:
                verify_checkpoint(folder)

        def check() -> Callable[[], dict[str, Any]]:
            return check_snapshot(str(self._find(state, recorded)), self.outer_loop, state.global_step)

        words = "the checkpoint cannot be resumed"
        together(self.outer_loop, words, verify)  # nobody reads what a keeper has found damaged
        objects = read_together(self.outer_loop, words, check)
        logger.info("resumed at step %d with every worker's own state", state.global_step)
        return objects

    def _find(self, state: TrainerState, recorded: dict[str, Any]) -> Path:
        name = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        asked = self.args.resume_from_checkpoint
        candidates = [Path(str(self.args.output_dir)) / name, Path(str(recorded.get("folder")))]
        if isinstance(asked, str):
            candidates.insert(0, Path(asked))
        for folder in candidates:
            # A checkpoint of the same step may be another run's. A damaged manifest tells no run: it is refused later,
            # by name.
            if (folder / FOLDER).is_dir() and run_of(folder) in (recorded["run"], None):
                return folder
        raise CheckpointError(
            f"the part of local training is in none of {', '.join(map(str, candidates))}. Say where the checkpoint "
            "is: TrainingArguments(resume_from_checkpoint=...)."
        )


def set_aside_unfinished(args: TrainingArguments) -> None:
    """
    Rename checkpoints that a killed run left unfinished, so that `resume_from_checkpoint=True` takes the newest whole
    one.
    """
    if args.local_process_index == 0:
        for path in _checkpoints(Path(str(args.output_dir))):
            if not is_whole(path):
                try:
                    aside = _set_aside(path)
                except FileNotFoundError:
                    continue  # another machine's first process on the same file system was faster
                logger.warning("%s was never finished: it is set aside as %s", path, aside.name)
    PartialState().wait_for_everyone()  # type: ignore[no-untyped-call]


def _set_aside(path: Path) -> Path:
    """Rename, in one step, to what no resume takes."""
    aside = path.with_name(_ASIDE + path.name)
    shutil.rmtree(aside, ignore_errors=True)
    return path.rename(aside)


def _checkpoints(folder: Path) -> list[Path]:
    """Trainer's checkpoints in a folder, the oldest first."""
    found = []
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        match = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)
        if match and path.is_dir():
            found.append((int(match.group(1)), path))
    return [path for _, path in sorted(found)]
