"""`reproduce.py --scale gpu`: CIFAR-10 at the paper's size, run after run on one device, within a limit of time."""

from __future__ import annotations

import platform
import shlex
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch

from records import SettingError, write_record
from studies import cifar10
from studies.kept import Clock, Keeper
from studies.plan import TASKS, PaperRun, table1
from studies.progress import Progress
from studies.run_records import check_same_data, find_record, make_record, outcome

TASK = "cifar10"


@dataclass
class GpuArguments:
    """How `--scale gpu` computes, how long, and what a dry run makes smaller."""

    device: str | None = field(
        default=None,
        metadata={
            "help": "--scale gpu: cuda where there is one. Multi30k: cpu, unless cuda is given.",
            "choices": ["cpu", "cuda"],
        },
    )
    gradients: str = field(
        default="batched",
        metadata={
            "help": "batched: one pass for all workers. in_turn: one after the other, in one CUDA graph. alone: each "
            "worker launches its own.",
            "choices": list(cifar10.GRADIENTS),
        },
    )
    tf32: bool = field(default=True, metadata={"help": "TF32 in convolutions and products on a GPU."})
    minutes: float | None = field(
        default=None,
        metadata={
            "help": "Start no epoch that would not end in this time, imports not counted; the run's state is kept for "
            "the next call."
        },
    )
    keep_every: int = field(default=25, metadata={"help": "Epochs between two saves of a run's state."})
    workers: int | None = field(default=None, metadata={"help": "Instead of 32, for a dry run."})
    batch_size: int | None = field(default=None, metadata={"help": "Per worker, instead of 128, for a dry run."})
    architecture: str | None = field(default=None, metadata={"help": "Instead of resnet18, for a dry run."})
    max_train_samples: int | None = field(
        default=None, metadata={"help": "The first training images, and as many test images, for a dry run."}
    )
    look_every: int | None = field(
        default=None, metadata={"help": "Epochs between evaluations of the average, in place of 10."}
    )

    def __post_init__(self) -> None:
        for name in ("minutes", "keep_every", "workers", "batch_size", "max_train_samples", "look_every"):
            value, least = getattr(self, name), 0 if name == "minutes" else 1
            if value is not None and value < least:
                raise SettingError(f"{name} must be >= {least}, got {value}. Set --{name}.")
        if self.architecture not in (None, "small", "resnet18"):
            raise SettingError(
                f"architecture must be small or resnet18, got {self.architecture!r}. Set --architecture."
            )
        if self.device == "cuda" and not torch.cuda.is_available():
            raise SettingError("device must be cpu where no GPU is found, got 'cuda'. Leave --device out.")

    @property
    def machine(self) -> cifar10.Machine:
        """Where and how gradients are computed."""
        return cifar10.Machine(self.device or ("cuda" if torch.cuda.is_available() else "cpu"), self.gradients)

    @property
    def sizes(self) -> dict[str, Any]:
        """Fields of `PaperRun` that were set."""
        names = ("workers", "batch_size", "architecture", "max_train_samples", "look_every")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


def gpu_runs(seeds: int | None, bases: list[str] | None, sizes: dict[str, Any]) -> list[PaperRun]:
    """The rows of the table, the most telling ones first; `sizes` are fields of `PaperRun` with other values."""
    given = TASKS[TASK].given
    assert given is not None
    runs = cast(list[PaperRun], table1(TASK, dict.fromkeys(TASKS[TASK].bases, given), seeds))
    return [replace(run, **sizes) for run in runs if bases is None or run.base in bases]


def run_one_by_one(
    runs: list[PaperRun], gpu: GpuArguments, dataset_name: str | None, folder: Path, max_runs: int | None
) -> None:
    """What is missing, as far as time and `max_runs` go; each run writes its record when it is whole."""
    missing = [run for run in runs if not find_record(run, folder)]
    print(f"{len(missing)} runs to do", flush=True)
    if not missing[:max_runs]:
        return
    clock, machine = Clock(gpu.minutes), gpu.machine
    if machine.device == "cuda":
        torch.backends.cudnn.benchmark = True  # every batch has one shape
        torch.backends.cudnn.allow_tf32 = gpu.tf32
        torch.set_float32_matmul_precision("high" if gpu.tf32 else "highest")
    data = cifar10.load(dataset_name, machine.device, gpu.max_train_samples)
    check_same_data(data, TASK, dataset_name, folder)
    reserve = 0.0  # seconds that the run before would have kept for two more epochs
    progress = Progress(len(missing[:max_runs]))
    for number, run in enumerate(missing[:max_runs], start=1):
        print(progress.line([run.name]), flush=True)
        if not clock.has(reserve):
            print("no time is left for another run; the next call goes on", flush=True)
            return
        identity = {"run": asdict(run), "dataset_sha256": data.sha256}
        keeper = Keeper(folder / f"{run.name}.state", identity, gpu.keep_every, clock, cpu=machine.device == "cpu")
        told = cifar10.train(run, data, machine, keeper)
        if told is None:
            print(f"{run.name} is left in {keeper.folder.name}; the next call goes on with it", flush=True)
            return
        reserve = keeper.reserve
        command = "python recipes/studies/reproduce.py --scale gpu --dataset_name FOLDER"
        flags = {"gradients": machine.gradients, "epochs": run.epochs, **gpu.sizes}
        command += "".join(f" --{name} {shlex.quote(str(value))}" for name, value in flags.items())
        hardware = f"{machine.name}, {platform.machine()}, all workers in one process"
        record = make_record(run, told, cifar10.LIBRARIES, command, hardware)
        write_record(record, folder / f"{run.name}.json")
        keeper.forget()
        progress.count(record["seconds"])
        print(f"{number}/{len(missing)} {outcome(record)}, {record['seconds_per_epoch']:.2f} s an epoch", flush=True)
