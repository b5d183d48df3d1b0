"""A run of `reproduce.py` that is left at an epoch's end and gone on with by a later call, bit for bit on the CPU."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

import slowmo_hf

PROGRESS, WEIGHTS = "progress.json", "weights.pt"


@dataclass
class Progress:
    """What one worker knows of its run at an epoch's end."""

    epochs: int = 0
    steps: int = 0
    rounds: int = 0
    bytes_sent: int = 0
    seconds: float = 0.0  # looks and saves included
    training_seconds: float = 0.0  # without them
    longest_epoch: float = 0.0  # of this call, seconds, its look included
    curve: list[dict[str, Any]] = field(default_factory=list)

    def count(self, report: slowmo_hf.RoundReport | None) -> None:
        """One step more, and the round that ended with it, if any; `report` is the last round's."""
        self.steps += 1
        if report and report.round > self.rounds:
            self.rounds, self.bytes_sent = report.round, self.bytes_sent + report.bytes_sent


class Clock:
    """Whether something still ends in time."""

    def __init__(self, minutes: float | None) -> None:
        self.end = None if minutes is None else time.monotonic() + 60 * minutes

    def has(self, seconds: float) -> bool:
        """Whether so much time is left."""
        return self.end is None or time.monotonic() + seconds <= self.end


@dataclass
class Keeper:
    """
    Keeps one run's state, a folder per save, `epoch20/`, which `accelerator.save_state` fills with what every worker
    has (docs/checkpoints.md). The newest whole one is gone on with, and the older ones are removed. On the CPU a run
    goes on bit for bit. Where gossip is left inside a round, the bytes of that round's first exchanges go uncounted.

    Args:
        folder (`Path`): Of this run alone.
        run (`dict[str, Any]`): What the state must be of: settings, and the data's digest. Another's is not taken up,
            which a printed line says.
        every (`int`): Epochs between two saves.
        clock (`Clock`): The run is left where twice its longest epoch and its longest save would not end in time. With
            a limit the first epoch of a call is saved too: from then on it is known how long that takes.
        cpu (`bool`): Whether it is computed there.
    """

    folder: Path
    run: dict[str, Any]
    every: int
    clock: Clock
    cpu: bool

    def __post_init__(self) -> None:
        self.newest = self._newest()
        self.reserve = self.longest_save = 0.0  # seconds
        self._save_start = 0.0

    def _newest(self) -> Path | None:
        """Saves that were cut off, and those of another run, are passed over."""
        for path in sorted(self.folder.glob("epoch*"), key=_epoch_of, reverse=True):
            try:
                slowmo_hf.verify_checkpoint(path)
                held = json.loads((path / PROGRESS).read_text())["run"]
                if held == json.loads(json.dumps(self.run)):
                    return path
                print(f"{path} is of {held}, not of {self.run}: the run begins anew, and its first save removes it")
            except (ValueError, OSError, KeyError):
                continue
        return None

    def of(self, progress: Progress) -> Path:
        """Where the state of this epoch's end lies."""
        return self.folder / f"epoch{progress.epochs}"

    def decide(self, workers: list[Progress], last_epoch: int) -> list[tuple[bool, bool]]:
        """(Save?, leave?) at an epoch's end, the same for all workers; a save's folder is there from then on."""
        first = workers[0]
        self.reserve = 2 * (first.longest_epoch + self.longest_save)
        leave = first.epochs < last_epoch and not self.clock.has(self.reserve)
        is_unknown = self.clock.end is not None and not self.longest_save
        save = leave or (first.epochs < last_epoch and (first.epochs % self.every == 0 or is_unknown))
        if save:
            self._save_start = time.monotonic()
            into = self.of(first)
            shutil.rmtree(into, ignore_errors=True)  # one that was cut off
            into.mkdir(parents=True)
            (into / PROGRESS).write_text(json.dumps({"run": self.run, "progress": asdict(first)}))
        return [(save, leave)] * len(workers)

    def saved(self, progress: Progress) -> None:
        """The save of this epoch's end is whole."""
        self.longest_save = max(self.longest_save, time.monotonic() - self._save_start)
        for older in set(self.folder.glob("epoch*")) - {self.of(progress)}:
            shutil.rmtree(older)

    def forget(self) -> None:
        """Remove all states: the run is over."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _epoch_of(path: Path) -> int:
    digits = path.name.removeprefix("epoch")
    return int(digits) if digits.isdigit() else -1


class KeptWorker:
    """One worker's part of a `Keeper`; all workers do the same at the same step."""

    def __init__(
        self,
        keeper: Keeper,
        rank: int,
        model: torch.nn.Module,
        optimizer: slowmo_hf.SlowMoOptimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
    ) -> None:
        self.keeper, self.rank, self.model, self.optimizer = keeper, rank, model, optimizer
        self.accelerator = Accelerator(cpu=keeper.cpu)
        self.accelerator.register_for_checkpointing(scheduler)
        slowmo_hf.register_for_checkpointing(self.accelerator, optimizer)

    def take_up(self) -> Progress:
        """Where the run was left; its beginning where there is no state."""
        newest = self.keeper.newest
        if newest is None:
            return Progress()
        if self.rank == 0:  # whose values the others start from, before each takes up what it has alone
            self.model.load_state_dict(torch.load(newest / WEIGHTS, map_location="cpu", weights_only=True))
        self.accelerator.load_state(str(newest))
        return Progress(**json.loads((newest / PROGRESS).read_text())["progress"])

    def end_epoch(self, progress: Progress, last_epoch: int) -> bool:
        """Save if that is due; whether the run is left here."""
        save, leave = slowmo_hf.together(lambda workers: self.keeper.decide(workers, last_epoch), progress)
        if save:
            into = self.keeper.of(progress)
            with slowmo_hf.consensus(self.optimizer):
                if self.rank == 0:  # copies: a row of stacked tensors would be saved with all the others
                    values = {name: value.clone() for name, value in self.model.state_dict().items()}
                    torch.save(values, into / WEIGHTS)
            self.accelerator.save_state(str(into))  # then it is sealed
            if self.rank == 0:
                self.keeper.saved(progress)
        return leave
