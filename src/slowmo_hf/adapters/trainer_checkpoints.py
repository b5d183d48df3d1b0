"""
A Trainer run's checkpoints: our part of each is written before Trainer's own, sealed after it, pushed, and found again
on resume.
"""

from __future__ import annotations

import re
import shutil
import uuid
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, SaveStrategy

from .. import upstream
from ..checkpoints.claim import Claim, is_claimed
from ..checkpoints.files import FOLDER, LOCK
from ..checkpoints.manifest import (
    TRAINER_STATE,
    Digests,
    Stamps,
    is_whole,
    recorded_saves,
    refuse_another_save,
    seal_again,
    stamps,
    unseal,
    verify_in_turns,
)
from ..checkpoints.state import check_snapshot, seal_snapshot, write_snapshot
from ..checkpoints.together import (
    Checked,
    Keeping,
    begin_together,
    deleting_older_than,
    finish_together,
    keeps_files,
    read_together,
    together,
    turn_at_reading,
)
from ..contents import CheckpointError
from ..log import logger, of_this_rank
from ..training.outer_loop import OuterLoop

_NFS_SECONDS = 100.0  # for the lock of a dead machine, which NFS keeps for 90
_ASIDE = "_incomplete-"  # what begins with "_" Trainer does not push to the Hub
_OLDER_ASIDE = "incomplete-"  # of older versions
_FIRST = {LOCK, "config.json", "generation_config.json"}  # what a save begins with
# What Trainer's saves write behind these, whole or in part.
_TRAINERS = re.compile(
    r"(model|pytorch_model|adapter_|optimizer|scheduler|scaler|rng_state|training_args|token|vocab|global_step).*"
)


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
        self._claim: Claim | None = None  # while a save is under way
        self._keeping: Keeping | None = None
        self._sealed: tuple[Path, Stamps] | None = None  # behind a seal, until all have been told of the save
        if args.save_strategy != SaveStrategy.NO:
            self._decide_who_keeps()
        args.save_total_limit, args.hub_strategy = None, HubStrategy.END

    def _decide_who_keeps(self) -> Keeping:
        """Collective, and once: a run that saves nothing needs no folder that can be written."""
        if self._keeping is None:
            whole_on_each = self.args.save_only_model or not self.outer_loop.workers.holds_shards
            folder = Path(str(self.args.output_dir))
            self._keeping = keeps_files(self.outer_loop, folder, whole_on_each=whole_on_each)
            if not self._keeping.all_see and not self.args.save_on_each_node:
                logger.info("output_dir is not shared by all machines: save_on_each_node is set until training ends")
                self.args.save_on_each_node = True
        return self._keeping

    def end(self) -> None:
        """Training has ended, also by an error: arguments are as they were, and no save is under way."""
        self._release()
        for name, value in self._given.items():
            setattr(self.args, name, value)

    # ---- saving ----

    def write(self, folder: Path, objects: dict[str, Any]) -> None:
        """Write our part, synced, before Trainer's own. Collective; with `save_only_model` nothing is written."""
        if self.args.save_only_model:
            return

        keeping, words = self._decide_who_keeps(), f"checkpoint {folder} cannot be written"
        shared = keeping.shared_of(self.outer_loop)

        def claim() -> None:
            patience_seconds = min(_NFS_SECONDS, self.outer_loop.config.timeout_seconds / 2)  # the others wait
            self._claim = self._claim or Claim(folder, patience_seconds)

        try:
            begin_together(self.outer_loop, words, folder, keeping, claim)
            together(
                self.outer_loop,
                words,
                lambda: write_snapshot(str(folder), self.outer_loop, shared=shared, objects=objects),
            )
        except CheckpointError:
            self._release()
            raise
        self._written = folder

    def finish(self, folder: Path, state: TrainerState) -> None:
        """
        Trainer's part is written too: seal the folder, and when every machine has, delete what is over
        `save_total_limit`. Collective.
        """
        keeping = self._decide_who_keeps()

        def keep(digests: Digests) -> None:
            if not keeping.seals:
                return
            if self._written == folder:
                if not (folder / FOLDER).is_dir():
                    self._give_up(folder)
                    return
                if not (folder / TRAINER_STATE).is_file():
                    self._take_back(folder)
                    return
                seal_snapshot(folder, self.outer_loop, digests)
            is_sealed.append(True)

        def rotate() -> None:
            if is_sealed:
                with deleting_older_than(folder):
                    self._rotate(folder, state.best_model_checkpoint)
                stamped.update(stamps(folder))

        is_sealed: list[bool] = []
        stamped = Stamps()
        try:
            finish_together(self.outer_loop, folder, keeping, keep)
            together(self.outer_loop, f"checkpoint {folder} cannot be finished", rotate)
            self._sealed = (folder, stamped)
        finally:
            self._release()
            self._written = None

    def seal_again(self) -> None:
        """
        Callbacks have been told of the save, and may have written over Trainer's files in it, or deleted some: the
        manifest says what is there now. Collective.
        """
        if self._sealed is None:
            return
        (folder, stamped), self._sealed = self._sealed, None
        self.world.gather_objects(None)  # other ranks' callbacks write too
        words = f"checkpoint {folder} cannot be finished"
        together(self.outer_loop, words, lambda: seal_again(folder, stamped) if stamped else None)

    def _release(self) -> None:
        if self._claim is not None:
            self._claim.release()
            self._claim = None

    def _give_up(self, folder: Path) -> None:
        """Another program has taken our part of a save away, where a file system has no locks: training goes on."""
        of_this_rank.warning(
            "%s was taken away by another program while it was being written: this save is lost, training goes on "
            "from memory",
            folder,
        )
        with suppress(OSError):
            if folder.exists():  # what Trainer has written since then
                _set_aside(folder)

    def _take_back(self, folder: Path) -> None:
        """A subclass has saved nothing that a Trainer goes on from: our part alone would pass for a checkpoint."""
        shutil.rmtree(folder / FOLDER, ignore_errors=True)
        self._release()
        with suppress(OSError):
            folder.rmdir()  # where nothing else is in it

    def push(self, trainer: Trainer, folder: Path) -> None:
        """What Trainer would have pushed to the Hub before the checkpoint was whole."""
        if self.args.push_to_hub:
            self.args.hub_strategy = self._given["hub_strategy"]
            try:
                upstream.push_checkpoint(trainer, str(folder))
            finally:
                self.args.hub_strategy = HubStrategy.END

    def keep_the_best_alone(self, folder: Path, best: str | None) -> None:
        """
        What Trainer does with `save_total_limit=1` where training has ended: the last checkpoint goes.

        Args:
            folder (`Path`): Of this run. A run that was resumed from another's may have found no better one than that
                run's best, whose folder is left alone.
        """
        is_ours_to_do = self._given["save_total_limit"] == 1 and self._keeping is not None and self._keeping.seals
        if is_ours_to_do and best and Path(best).is_dir():  # or nothing would be left
            with deleting_older_than(folder):
                self._delete(path for path in self._ended(folder) if path.resolve() != Path(best).resolve())

    def _rotate(self, newest: Path, best: str | None) -> None:
        """Delete what is over `save_total_limit` beside the newest, neither of these, and all that is set aside."""
        limit = self._given["save_total_limit"]
        if not limit or limit < 0:
            return
        keep = {newest.resolve(), *([Path(best).resolve()] if best else [])}
        found = self._ended(newest.parent)
        over = max(0, len(found) - max(limit, len(keep)))
        self._delete([path for path in found if path.resolve() not in keep][:over])
        for path in newest.parent.glob(f"{_ASIDE}{PREFIX_CHECKPOINT_DIR}-*"):  # stock Trainer would count them
            shutil.rmtree(path, ignore_errors=True)

    def _ended(self, folder: Path) -> list[Path]:
        """By age, as Trainer does. A save that has failed has our part alone, and counts for none."""
        ended = [path for path in _checkpoints(folder) if is_whole(path) or not (path / FOLDER).is_dir()]
        return sorted(ended, key=lambda path: path.stat().st_mtime)

    def _delete(self, checkpoints: Iterable[Path]) -> None:
        for path in checkpoints:
            logger.info("deleting %s: save_total_limit=%d", path, self._given["save_total_limit"])
            try:  # half deleted it is no checkpoint
                shutil.rmtree(_set_aside(path), ignore_errors=True)
            except OSError:  # a file system that renames no folders
                unseal(path)
                shutil.rmtree(path)

    # ---- resuming ----

    def resume(self, state: TrainerState, loaded: str | None) -> dict[str, Any]:
        """
        Take up the checkpoint that Trainer has loaded. Collective.

        Args:
            state (`TrainerState`): The resumed one.
            loaded (`str`, *optional*): The folder; None where it is not known.

        Returns:
            `dict`: State dictionaries of this worker's own scheduler and scaler.

        Raises:
            CheckpointError: It is damaged or does not fit; the same on every rank, before the first step.
        """
        asked = self.args.resume_from_checkpoint
        folder = Path(str(loaded or (asked if isinstance(asked, str) else "an unknown folder")))
        callbacks: Any = state.stateful_callbacks
        is_ours = bool(recorded_saves(callbacks, state.global_step)) or (folder / FOLDER).exists()
        if not any(self.world.gather_objects(is_ours)):
            logger.warning(
                "resumed at step %d from a checkpoint without local training's state: its weights, and its optimizer "
                "where it has one, are taken, slow momentum starts fresh, and every worker takes rank 0's inner "
                "optimizer state",
                state.global_step,
            )
            return {}

        def verify() -> None:
            if not (folder / FOLDER).is_dir():
                way = "say where it is: TrainingArguments(resume_from_checkpoint=...)"
                if loaded is not None:
                    way = f"put its folder {FOLDER} there"
                raise CheckpointError(
                    f"the part of local training is not in {folder}. Resume from another checkpoint, or {way}."
                )
            refuse_another_save(folder, callbacks)
            verify_in_turns(folder, *turn)

        def check() -> Checked:
            return check_snapshot(str(folder), self.outer_loop, state.global_step)

        words, turn = "the checkpoint cannot be resumed", turn_at_reading(self.outer_loop, folder)
        together(self.outer_loop, words, verify)  # nobody reads what has been found damaged
        return read_together(self.outer_loop, words, check)


def set_aside_unfinished(args: TrainingArguments) -> None:
    """
    Rename checkpoints that a killed run left unfinished, so that `resume_from_checkpoint=True` takes the newest whole
    one: those of ours, and above the newest whole one all. What a living run is writing is left alone.

    Each rank does it and waits for nobody, for a Trainer may be made on one rank alone. Behind it this rank sees no
    unfinished one of ours, whichever rank was the first to rename it. A stock one has no lock, and its writer is the
    machine's first rank: that one alone takes it, behind its own saves.
    """
    folder = Path(str(args.output_dir))
    for path in _checkpoints(folder, _OLDER_ASIDE):
        with suppress(OSError):
            _set_aside(path)
    found = [(path, is_whole(path)) for path in _checkpoints(folder)]
    newest = max((number for number, (_, whole) in enumerate(found) if whole), default=-1)
    is_first = args.local_process_index == 0
    for number, (path, whole) in enumerate(found):
        if not whole and ((path / FOLDER).exists() or (number > newest and is_first and _is_trainers(path))):
            _set_aside_as_unfinished(path, told_by_others=not is_first)


def _is_trainers(folder: Path) -> bool:
    """Whether a Trainer has begun to save here; a subclass of it may have files of its own alone, and be done."""
    try:
        names = {path.name for path in folder.iterdir()} - _FIRST
    except OSError:  # another rank has renamed it
        return True
    return not names or any(map(_TRAINERS.fullmatch, names))


def _set_aside_as_unfinished(path: Path, *, told_by_others: bool) -> None:
    if is_claimed(path):
        if not told_by_others:
            of_this_rank.warning("%s is left alone: another program is writing it", path)
    elif not is_whole(path):  # a save that has ended since then
        try:
            of_this_rank.warning("%s was never finished: it is set aside as %s", path, _set_aside(path).name)
        except OSError as error:
            if path.exists() and not told_by_others:  # else another rank was faster
                of_this_rank.warning("%s was never finished, and cannot be set aside (%s)", path, error)


def _set_aside(path: Path) -> Path:
    """
    Rename to what no resume takes. Of several ranks the first one does: its first rename is to a name of its own, and
    the others fail there, before they delete what was set aside under the last name.
    """
    aside = path.with_name(_ASIDE + path.name.removeprefix(_OLDER_ASIDE))
    taken = path.rename(aside.with_name(f"{aside.name}-{uuid.uuid4().hex}"))
    shutil.rmtree(aside, ignore_errors=True)
    return taken.rename(aside)


def _checkpoints(folder: Path, prefix: str = "") -> list[Path]:
    """Trainer's checkpoints in a folder, the oldest first."""
    found = []
    for path in folder.glob(f"{prefix}{PREFIX_CHECKPOINT_DIR}-*"):
        match = re.fullmatch(rf"{prefix}{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)
        if match and path.is_dir():
            found.append((int(match.group(1)), path))
    return [path for _, path in sorted(found)]
