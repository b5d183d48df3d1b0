"""
The paper's tables: runs a study of settings x seeds, one record per run, and prints and plots the table of what there
is.

    python recipes/studies/reproduce.py --study table1 --dataset_name FOLDER_OF_FASHION_MNIST
    python recipes/studies/reproduce.py --study table1 --task translation
    python recipes/studies/reproduce.py --scale gpu --dataset_name FOLDER_OF_CIFAR10

An interrupted study goes on where it stopped: a run whose record is there is not run again. `--scale gpu` runs
CIFAR-10 at the paper's size, 32 workers in one process on one GPU. `--scale paper` runs nothing: it prints the
cluster command of every row at the paper's size.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context, parent_process
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import datasets
import torch
from transformers import HfArgumentParser

sys.path.insert(0, str(Path(__file__).parents[1]))  # recipes/, whose folders share modules

from records import DataError, SettingError, end_program, hardware, write_record
from studies import cifar10, multi30k, small_images, small_translation
from studies.drawing import plot, plot_sweep
from studies.gpu import GpuArguments, gpu_runs, run_one_by_one
from studies.kept import Clock, Keeper
from studies.plan import TASKS, Run, Tuned, choose, published, sweeps, table1, tuning
from studies.progress import Progress
from studies.run_records import check_same_data, command_of, find_record, make_record, outcome
from studies.showing import data_line, table

# Modules with `load`, `train` and `LIBRARIES`, and the scripts that train at the paper's size on a cluster.
MODULES: dict[str, ModuleType] = {
    "image_classification": small_images,
    "translation": small_translation,
    "multi30k": multi30k,
}
SCRIPTS = {"image_classification": "image/train.py", "translation": "translation/train.py"}
KEPT = ("multi30k",)  # whose runs take an hour of a core; they may have a GPU
RECORDS = Path(__file__).parents[1] / "records"
# glibc would map the memory of every large tensor anew, and in a thread (each worker is one) whatever the thresholds:
# each time a fifth of a run's time on one core.
KEEP_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(4 * 2**30),
    "MALLOC_TRIM_THRESHOLD_": str(8 * 2**30),
}


@dataclass
class Arguments:
    """What to run, and where its records are."""

    study: str = field(
        default="table1",
        metadata={
            "help": "What to run; published is all-reduce at the size of a published figure, of multi30k.",
            "choices": ["tuning", "table1", "sweep", "published"],
        },
    )
    task: str = field(default="image_classification", metadata={"help": "On what.", "choices": list(MODULES)})
    scale: str = field(
        default="small",
        metadata={
            "help": "small runs here; gpu is CIFAR-10 at the paper's size; paper prints cluster commands.",
            "choices": ["small", "gpu", "paper"],
        },
    )
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": f"{small_images.HUB_NAME} by default, or a folder with its train.parquet and test.parquet; for "
            "translation the shipped help text by default, or what recipes/translation/train.py takes; for multi30k a "
            f"folder with it; for --scale gpu {cifar10.PRESET['dataset_name']} by default, or a folder with Parquet "
            "files of its columns."
        },
    )
    seeds: int | None = field(
        default=None,
        metadata={
            "help": "Seeds per row of table1; 5 by default, 3 of translation and of --scale gpu. The Local SGD pair "
            "has 8 at least on images, and 3 on other tasks."
        },
    )
    bases: list[str] | None = field(default=None, metadata={"help": "Only these."})
    inner_lr: float | None = field(
        default=None, metadata={"help": "Of table1 and sweep: peak learning rate, instead of what tuning chooses."}
    )
    outer_momentum: float | None = field(
        default=None,
        metadata={
            "help": "Of table1 and images' and help text's sweep: slow momentum, instead of what tuning chooses."
        },
    )
    epochs: int | None = field(default=None, metadata={"help": "Instead of the study's, for a dry run."})
    jobs: int = field(
        default=os.cpu_count() or 1,
        metadata={"help": "Runs at a time, each a process; --scale gpu does one at a time."},
    )
    threads: int = field(
        default=1,
        metadata={"help": "CPU threads of each run at --scale small; figures of another number differ by rounding."},
    )
    max_runs: int | None = field(default=None, metadata={"help": "Stop after so many; the next call goes on."})
    records: str = field(default=str(RECORDS), metadata={"help": "Folder of the records."})
    plot: bool = field(default=False, metadata={"help": "Write a PNG beside the records."})

    def __post_init__(self) -> None:
        if self.scale == "gpu":
            for name, only in (("study", "table1"), ("task", "image_classification")):
                if getattr(self, name) != only:
                    raise SettingError(f"{name} must be left out with --scale gpu, got {getattr(self, name)!r}.")
            self.task = "cifar10"
        if self.scale == "paper" and self.task not in PAPER_ROWS:
            raise SettingError(
                f"task must be {' or '.join(PAPER_ROWS)} with --scale paper, got {self.task!r}. Set --task."
            )
        for name, least in (("seeds", 1), ("epochs", 1), ("jobs", 1), ("threads", 1), ("max_runs", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise SettingError(f"{name} must be >= {least}, got {value}. Set --{name}.")
        for name, low, high in (("inner_lr", 0.0, float("inf")), ("outer_momentum", 0.0, 1.0)):
            value = getattr(self, name)
            if value is not None and not low < value < high:
                raise SettingError(f"{name} must be > {low:g} and < {high:g}, got {value}. Set --{name}.")
            if value is not None and (self.study not in ("table1", "sweep") or self.scale != "small"):
                raise SettingError(
                    f"{name} is of --study table1 and sweep at --scale small, got {value} with --study {self.study} "
                    f"--scale {self.scale}. Leave it out."
                )
        if self.threads > 1 and self.scale != "small":
            raise SettingError(
                f"threads is of --scale small, got {self.threads} with --scale {self.scale}. Leave it out."
            )
        if self.seeds is not None and self.study != "table1":
            raise SettingError(
                f"seeds is of --study table1, got {self.seeds} with --study {self.study}. Leave it out."
            )
        if self.outer_momentum is not None and self.study == "sweep" and TASKS[self.task].two_workers:
            raise SettingError(
                f"outer_momentum must be left out with --study sweep of task {self.task}, which runs "
                f"{', '.join(map(str, TASKS[self.task].two_workers))}, got {self.outer_momentum}."
            )
        if self.study == "published" and not TASKS[self.task].published:
            having = ", ".join(name for name, task in TASKS.items() if task.published)
            raise SettingError(f"study published is of task {having}, got task {self.task!r}. Set --task or --study.")
        for base in self.bases or ():
            if base not in TASKS[self.task].bases:
                raise SettingError(
                    f"bases must be some of {', '.join(TASKS[self.task].bases)}, got {base!r}. Set --bases."
                )


def main() -> None:
    """Parse, then run a study or print the cluster's commands."""
    parser = HfArgumentParser((Arguments, GpuArguments))
    parser.error = end  # argparse's own would print all flags first
    try:
        arguments, gpu = parser.parse_args_into_dataclasses()
        if arguments.scale != "gpu":
            check_no_gpu_flags(arguments, gpu)
        if arguments.scale == "paper":
            print(
                "RANK=0 MAIN=192.168.1.10 PORT=29500  # on each machine: its number, and machine 0's address and port"
            )
            print("\n".join(paper_commands(arguments.task)))
        elif arguments.scale == "gpu":
            sizes = {**gpu.sizes, **({"epochs": arguments.epochs} if arguments.epochs else {})}
            runs = gpu_runs(arguments.seeds, arguments.bases, sizes)
            run_one_by_one(runs, gpu, arguments.dataset_name, Path(arguments.records), arguments.max_runs)
            show(runs, arguments, Path(arguments.records))
        else:
            run_study(arguments, Path(arguments.records), gpu.device or "cpu")
    except (SettingError, DataError) as error:
        end(error)


def check_no_gpu_flags(arguments: Arguments, gpu: GpuArguments) -> None:
    """Flags of another scale are refused; --device is for tasks that are kept too."""
    for name, own in vars(GpuArguments()).items():
        value = getattr(gpu, name)
        if value != own and not (name == "device" and arguments.task in KEPT):
            also = f" and --task {', '.join(KEPT)}" if name == "device" else ""
            raise SettingError(
                f"{name} is for --scale gpu{also}, got {value!r} with --scale {arguments.scale} and --task "
                f"{arguments.task}."
            )


def end(error: object) -> NoReturn:
    """End the program with one line."""
    end_program(__file__, error)


def run_study(arguments: Arguments, folder: Path, device: str) -> None:
    """Run what is missing, then show what is there."""
    left = arguments.max_runs
    while (missing := [run for run in study_runs(arguments, folder) if not find_record(run, folder)]) and left != 0:
        missing = missing[:left]  # what tuning has chosen brings more
        print(f"{len(missing)} runs to do", flush=True)
        run_all(missing, arguments, folder, device)
        left = None if left is None else left - len(missing)
    runs = study_runs(arguments, folder)
    if not runs and _waits_for_tuning(arguments):
        one_rate = arguments.study == "sweep" and TASKS[arguments.task].two_workers
        print(
            f"{arguments.study} waits for what tuning chooses, and {str(folder)!r} does not have all of that. Run "
            f"--study tuning first; or set --inner_lr{'' if one_rate else ' and --outer_momentum'}."
        )
    elif not runs:
        print(f"{arguments.study} of {arguments.task} has no runs of {', '.join(arguments.bases or ())}.")
    show(runs, arguments, folder)


def show(runs: Sequence[Run], arguments: Arguments, folder: Path) -> None:
    """Print and plot the records that are there."""
    records = [record for run in runs if (record := find_record(run, folder))]
    print(f"{data_line(records)}\n{table(records, arguments.task)}")
    if arguments.plot and records:
        draw = plot_sweep if arguments.study == "sweep" else plot
        draw(records, arguments.task, folder / arguments.task / f"{arguments.study}.png")


def study_runs(arguments: Arguments, folder: Path) -> list[Run]:
    """
    The runs of a study, in the order in which they are done; those of the table and the sweeps wait for what tuning
    chooses, where it is not given.
    """
    if arguments.study == "published":
        return _asked(arguments, published(arguments.task))
    tried: list[dict[str, Any]] = []
    while True:  # what has been tried says what else is tried
        tunes = _sized(arguments, tuning(arguments.task, tried))
        found = [record for run in tunes if (record := find_record(run, folder))]
        if found == tried:
            break
        tried = found
    if arguments.study == "tuning":
        return _asked(arguments, tunes)
    lr, momentum = arguments.inner_lr, arguments.outer_momentum
    chosen = {
        base: Tuned(lr or own.inner_lr, None if base == "all_reduce" else momentum or own.outer_momentum)
        for base, own in choose(tried, arguments.task).items()
    }
    return _tuned_runs(arguments, chosen)


def _tuned_runs(arguments: Arguments, chosen: dict[str, Tuned]) -> list[Run]:
    """Of the table or the sweeps."""
    if arguments.study == "table1":
        return _asked(arguments, table1(arguments.task, chosen, arguments.seeds))
    return _asked(arguments, sweeps(arguments.task, chosen))


def _waits_for_tuning(arguments: Arguments) -> bool:
    """Whether the study would have runs of these bases if tuning had chosen."""
    anything = dict.fromkeys(TASKS[arguments.task].bases, Tuned(0.1, 0.1))
    return arguments.study in ("table1", "sweep") and bool(_tuned_runs(arguments, anything))


def _asked(arguments: Arguments, runs: list[Run]) -> list[Run]:
    return _sized(arguments, [run for run in runs if arguments.bases is None or run.base in arguments.bases])


def _sized(arguments: Arguments, runs: list[Run]) -> list[Run]:
    return [replace(run, epochs=arguments.epochs) for run in runs] if arguments.epochs else runs


# ---- running ----


def run_all(runs: list[Run], arguments: Arguments, folder: Path, device: str) -> None:
    """Several at a time, each in a process of its own; each writes its record when it is done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingError(
            f"records must be a folder that can be written, got {str(folder)!r}: {error}. Set --records."
        ) from error
    progress = Progress(len(runs), arguments.jobs)
    with pool_of(arguments.jobs, arguments.threads) as pool:
        under_way = {pool.submit(run_one, run, arguments.dataset_name, str(folder), device): run.name for run in runs}
        print(progress.line(list(under_way.values())), flush=True)
        try:
            for done in as_completed(under_way):
                record = done.result()
                progress.count(record["seconds"])
                print(f"{progress.done}/{len(runs)} {outcome(record)}", flush=True)
                print(progress.line([name for run, name in under_way.items() if not run.done()]), flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # the others would fail too, one after the other
            raise


def pool_of(jobs: int, threads: int) -> ProcessPoolExecutor:
    """Processes for runs, which end with this one."""
    for name, value in KEEP_MEMORY.items():
        os.environ.setdefault(name, value)  # read by a process when it starts
    return ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_start_process, initargs=(threads,))


def _start_process(threads: int) -> None:
    threading.Thread(target=_end_with_the_program, daemon=True).start()
    torch.set_num_threads(threads)
    logging.getLogger("slowmo_hf").setLevel(logging.WARNING)  # a table at each start would hide this program's lines
    datasets.disable_progress_bars()


def _end_with_the_program() -> None:
    """A run whose program was killed would go on, and wait for another for ever."""
    program = parent_process()
    assert program is not None
    program.join()
    os._exit(1)


def run_one(run: Run, dataset_name: str | None, folder: str, device: str = "cpu") -> dict[str, Any]:
    """One run and its record."""
    module, data = MODULES[run.task], _load(run.task, dataset_name)
    check_same_data(data, run.task, dataset_name, Path(folder))
    threads = torch.get_num_threads()
    command = command_of(run, dataset_name)
    command += f" --device {device}" if device != "cpu" else ""
    command += f" --threads {threads}" if threads > 1 else ""
    cores = "one core" if threads == 1 else f"{threads} cores"
    machine = f"{hardware()}, {cores} per run, all workers in one process"
    if device != "cpu":
        machine = f"{torch.cuda.get_device_name()} for several runs at a time, {machine}"
    keeper = _keeper(run, data, Path(folder), device) if run.task in KEPT else None
    told = module.train(run, data, *([keeper, device] if keeper else []))
    record = make_record(run, told, module.LIBRARIES, command, machine)
    write_record(record, Path(folder) / f"{run.name}.json")
    if keeper:
        keeper.forget()
    return record


def _keeper(run: Run, data: Any, folder: Path, device: str) -> Keeper:
    """A run that is cut off goes on from its last epoch's end."""
    identity = {"run": asdict(run), "dataset_sha256": data.sha256}
    every = 1 if device == "cpu" else 8  # epochs; of minutes here, of seconds there
    return Keeper(folder / f"{run.name}.state", identity, every, Clock(None), cpu=device == "cpu")


@functools.cache
def _load(task: str, dataset_name: str | None) -> Any:
    return MODULES[task].load(dataset_name)


# ---- the paper's size ----


# The paper's machines of eight GPUs by preset of the recipes, and the bases that its Table 1 has for it.
PAPER_GPUS = 8
PAPER_ROWS = {
    "image_classification": {
        "cifar10": (4, ("local_sgd", "sgp", "osgp", "all_reduce")),
        "imagenet": (32, ("local_sgd", "sgp", "osgp", "all_reduce")),
    },
    "translation": {"wmt16": (8, ("local_sgd", "sgp", "all_reduce"))},
}


def paper_commands(task: str) -> list[str]:
    """
    One `accelerate launch` command per row, for the machines of the paper (docs/launch.md): every inner method
    without slow momentum and with it, but all-reduce without alone. RANK, MAIN and PORT are the shell's: this
    machine's number from 0, and an address and a port of machine 0.
    """
    commands = []
    for preset, (machines, bases) in PAPER_ROWS[task].items():
        launch = (
            f"accelerate launch --multi_gpu --mixed_precision bf16 --num_machines {machines} "
            f"--num_processes {machines * PAPER_GPUS} --machine_rank $RANK --main_process_ip $MAIN "
            f"--main_process_port $PORT recipes/{SCRIPTS[task]} --preset {preset}"
        )
        for base in bases:
            commands.append(f"{launch} --base {base} --outer_momentum 0")
            if base != "all_reduce":
                commands.append(f"{launch} --base {base}")
    return commands


if __name__ == "__main__":
    main()
