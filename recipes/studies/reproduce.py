"""
The paper's tables: runs a study of settings x seeds, one record per run, and prints and plots the table of what there
is.

    python recipes/studies/reproduce.py --study table1 --dataset_name FOLDER_OF_FASHION_MNIST
    python recipes/studies/reproduce.py --study table1 --task translation

An interrupted study goes on where it stopped: a run whose record is there is not run again. `--scale paper` runs
nothing: it prints the cluster command of every row at the paper's size.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import torch
from transformers import HfArgumentParser

sys.path.insert(0, str(Path(__file__).parents[1]))  # recipes/, whose folders share modules

from image import data as image_data
from records import SettingError, end_program, environment, mean_sd, mean_with_interval, write_record
from studies import small_images, small_translation
from studies.plan import TASKS, Run, Tuned, choose, sweeps, table1, tuning, without_slowmo
from translation import data as translation_data


@dataclass(frozen=True)
class Shown:
    """
    How a task is run and shown.

    Args:
        module (`ModuleType`): Has `load`, `train` and `LIBRARIES`.
        columns (`tuple[str, ...]`): Metrics of the table: the paper's, then others.
        gain (`str`): The metric whose paired gain the table has.
        curves (`tuple[str, str]`): What the plot shows over epochs.
        script (`str`): That trains it at the paper's size, below recipes/.
    """

    module: ModuleType
    columns: tuple[str, ...]
    gain: str
    curves: tuple[str, str]
    script: str


SHOWN = {
    "image_classification": Shown(
        module=small_images,
        columns=("best_validation_accuracy", "training_loss", "validation_nll", "test_accuracy"),
        gain="test_accuracy",
        curves=("validation_accuracy", "training_loss"),
        script="image/train.py",
    ),
    "translation": Shown(
        module=small_translation,
        columns=("validation_bleu", "training_loss", "best_validation_nll", "validation_nll", "test_bleu"),
        gain="test_bleu",
        curves=("validation_nll", "training_loss"),
        script="translation/train.py",
    ),
}
RECORDS = Path(__file__).parents[1] / "records"


@dataclass
class Arguments:
    """What to run, and where its records are."""

    study: str = field(default="table1", metadata={"help": "What to run.", "choices": ["tuning", "table1", "sweep"]})
    task: str = field(default="image_classification", metadata={"help": "On what.", "choices": list(SHOWN)})
    scale: str = field(
        default="small",
        metadata={"help": "small runs here; paper prints cluster commands.", "choices": ["small", "paper"]},
    )
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": f"{small_images.HUB_NAME} by default, or a folder with its train.parquet and test.parquet; for "
            "translation the shipped help text by default, or what translation.py takes."
        },
    )
    seeds: int | None = field(
        default=None,
        metadata={
            "help": "Seeds per row of table1; 5 by default, 3 of translation. On images the Local SGD pair has 8 at "
            "least."
        },
    )
    bases: list[str] | None = field(default=None, metadata={"help": "Only these."})
    epochs: int | None = field(default=None, metadata={"help": "Instead of the study's, for a dry run."})
    jobs: int = field(default=os.cpu_count() or 1, metadata={"help": "Runs at a time, each on one core."})
    max_runs: int | None = field(default=None, metadata={"help": "Stop after so many; the next call goes on."})
    records: str = field(default=str(RECORDS), metadata={"help": "Folder of the records."})
    plot: bool = field(default=False, metadata={"help": "Write a PNG beside the records."})

    def __post_init__(self) -> None:
        for name, least in (("seeds", 1), ("epochs", 1), ("jobs", 1), ("max_runs", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise SettingError(f"{name} must be >= {least}, got {value}. Set --{name}.")
        for base in self.bases or ():
            if base not in TASKS[self.task].bases:
                raise SettingError(
                    f"bases must be some of {', '.join(TASKS[self.task].bases)}, got {base!r}. Set --bases."
                )


def main() -> None:
    """Parse, then run a study or print the cluster's commands."""
    parser = HfArgumentParser(Arguments)
    parser.error = end  # argparse's own would print all flags first
    try:
        (arguments,) = parser.parse_args_into_dataclasses()
        if arguments.scale == "paper":
            print("\n".join(paper_commands(arguments.task)))
        else:
            run_study(arguments, Path(arguments.records))
    except (SettingError, image_data.DataError, translation_data.DataError) as error:
        end(error)


def end(error: object) -> NoReturn:
    """End the program with one line."""
    end_program(__file__, error)


def run_study(arguments: Arguments, folder: Path) -> None:
    """Run what is missing, then show what is there."""
    left = arguments.max_runs
    while (missing := [run for run in study_runs(arguments, folder) if not find_record(run, folder)]) and left != 0:
        missing = missing[:left]  # what tuning has chosen brings more
        print(f"{len(missing)} runs to do", flush=True)
        run_all(missing, arguments, folder)
        left = None if left is None else left - len(missing)
    records = [record for run in study_runs(arguments, folder) if (record := find_record(run, folder))]
    print(table(records, arguments.task))
    if arguments.plot and records:
        draw = plot_sweep if arguments.study == "sweep" else plot
        draw(records, arguments.task, folder / arguments.task / f"{arguments.study}.png")


def study_runs(arguments: Arguments, folder: Path) -> list[Run]:
    """
    The runs of a study, in the order in which they are done; those of the table and the sweeps wait for what tuning
    chooses.
    """
    undecided = dict.fromkeys(TASKS[arguments.task].bases, Tuned())
    tried = [
        record for run in _asked(arguments, tuning(arguments.task, undecided)) if (record := find_record(run, folder))
    ]
    chosen = choose(tried, arguments.task)
    tried += [
        record
        for run in _asked(arguments, tuning(arguments.task, chosen))
        if run.slowmo and (record := find_record(run, folder))
    ]
    chosen = choose(tried, arguments.task)
    if arguments.study == "table1":
        return _asked(arguments, table1(arguments.task, chosen, arguments.seeds))
    return _asked(arguments, {"tuning": tuning, "sweep": sweeps}[arguments.study](arguments.task, chosen))


def _asked(arguments: Arguments, runs: list[Run]) -> list[Run]:
    runs = [run for run in runs if arguments.bases is None or run.base in arguments.bases]
    return [replace(run, epochs=arguments.epochs) for run in runs] if arguments.epochs else runs


# ---- running ----


def run_all(runs: list[Run], arguments: Arguments, folder: Path) -> None:
    """Several at a time, each in a process of its own with one thread; each writes its record when it is done."""
    folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(arguments.jobs, get_context("spawn"), initializer=_one_thread) as pool:
        under_way = [pool.submit(run_one, run, arguments.dataset_name, str(folder)) for run in runs]
        try:
            for number, done in enumerate(as_completed(under_way), start=1):
                record = done.result()
                metrics = {name: round(value, 4) for name, value in record["metrics"].items()}
                print(f"{number}/{len(runs)} {record['name']}: {metrics}, {record['seconds']:.0f} s", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # the others would fail too, one after the other
            raise


def _one_thread() -> None:
    torch.set_num_threads(1)


def run_one(run: Run, dataset_name: str | None, folder: str) -> dict[str, Any]:
    """One run and its record."""
    module, data = SHOWN[run.task].module, _load(run.task, dataset_name)
    _check_same_data(data, run.task, dataset_name, Path(folder))
    told = module.train(run, data)
    config = run.config
    record = {
        "name": run.name,
        "run": asdict(run),
        "study": run.study,
        "task": run.task,
        "base": run.base,
        "slowmo": run.slowmo,
        "exact_average": run.exact_average,
        "workers": run.workers,
        "sync_every": run.sync_every,
        "outer_lr": config.outer_lr,
        "outer_momentum": run.outer_momentum,
        "inner_lr": run.inner_lr,
        "inner_state": run.inner_state,
        "seed": run.seed,
        **told,
        **environment(module.LIBRARIES),
        "command": f"python recipes/studies/reproduce.py --study {run.study} --task {run.task}",
        "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}, one core per run, all workers in one process",
    }
    write_record(record, Path(folder) / f"{run.name}.json")
    return record


def _check_same_data(data: Any, task: str, dataset_name: str | None, folder: Path) -> None:
    """Runs on other data than the records beside them would be compared as if they were of the same."""
    for path in sorted(folder.glob(f"{task}/*/*.json")):
        record = _read(path)
        if record and record["dataset_sha256"] != data.sha256:
            raise SettingError(
                f"dataset_name must be what the records in {str(folder)!r} are of, {record['dataset']!r} with SHA-256 "
                f"{record['dataset_sha256'][:12]} as in {path.relative_to(folder)}, got {dataset_name!r}, which is "
                f"{data.name!r} with {data.sha256[:12]}. Set --dataset_name, or --records to another folder."
            )


@functools.cache
def _load(task: str, dataset_name: str | None) -> Any:
    return SHOWN[task].module.load(dataset_name)


def find_record(run: Run, folder: Path) -> dict[str, Any] | None:
    """The record of this very run; None where there is none, or where it is of other settings or cannot be read."""
    record = _read(folder / f"{run.name}.json")
    return record if record and run.matches(record) else None


def _read(path: Path) -> dict[str, Any] | None:
    """A record; None where it is not there, or half written: it is run again."""
    try:
        record: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return record


# ---- showing ----


def table(records: list[dict[str, Any]], task: str) -> str:
    """
    A row per setting: mean ± standard deviation (n) of every metric, and the paired gain of slow momentum with its 95
    % interval.
    """
    settings, columns, gain = _by_setting(records), SHOWN[task].columns, SHOWN[task].gain
    lines = [
        f"| setting | {' | '.join(columns)} | gain in {gain.replace('_', ' ')} |",
        "|---|" + "---|" * (len(columns) + 1),
    ]
    for key, own in settings.items():
        cells = [f"{mean_sd([record['metrics'][name] for record in own])} ({len(own)})" for name in columns]
        partners = settings.get(_setting(without_slowmo(own[0]["run"])), [])
        lines.append(
            f"| {_words(key)} | {' | '.join(cells)} | {paired_gain(own, partners, gain) if own[0]['slowmo'] else ''} |"
        )
    return "\n".join(lines)


def _by_setting(records: list[dict[str, Any]]) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """Runs that differ in their seed alone stand together."""
    settings: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in records:
        settings.setdefault(_setting(record["run"]), []).append(record)
    return settings


def _setting(run: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(value for name, value in run.items() if name not in ("seed", "study", "task"))


def _words(key: tuple[Any, ...]) -> str:
    base, momentum, lr, sync_every, _, inner_state, exact, *_ = key
    words = f"{base}, γ {lr:g}, τ {sync_every}" + (f", β {momentum:g}" if momentum else "")
    return words + _state_words(inner_state) + ("" if exact else ", no average")


def _state_words(inner_state: str) -> str:
    return "" if inner_state == "auto" else f", state {inner_state}"


def _mean(own: list[dict[str, Any]], metric: str) -> float:
    return statistics.mean(record["metrics"][metric] for record in own)


def paired_gain(own: list[dict[str, Any]], partners: list[dict[str, Any]], metric: str) -> str:
    """Mean difference over the seeds that both have, with its 95 % interval."""
    theirs = {record["seed"]: record["metrics"][metric] for record in partners}
    differences = [record["metrics"][metric] - theirs[record["seed"]] for record in own if record["seed"] in theirs]
    return mean_with_interval(differences)


def plot(records: list[dict[str, Any]], task: str, path: Path) -> None:
    """The task's curves of the average over epochs, a line per setting, the mean over seeds."""
    figure, axes = _panels(2, (12, 5))
    for axis, name in zip(axes, SHOWN[task].curves, strict=True):
        for key, own in _by_setting(records).items():
            curves = [[look[name] for look in record["curve"]] for record in own]
            axis.plot(
                [look["epoch"] for look in own[0]["curve"]],
                [statistics.mean(values) for values in zip(*curves, strict=True)],
                label=_words(key),
            )
        axis.set(xlabel="epoch", ylabel=name.replace("_", " "))
    axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=120)


def swept(
    records: list[dict[str, Any]], field_name: str, metric: str
) -> dict[tuple[Any, ...], list[tuple[float, float]]]:
    """
    (value of one setting, mean over seeds of the metric), ascending, of runs that differ in it alone; three at least,
    by the rest.
    """
    lines: dict[tuple[Any, ...], list[tuple[float, float]]] = {}
    for own in _by_setting(records).values():
        run = own[0]["run"]
        lines.setdefault(_setting({**run, field_name: 0}), []).append((run[field_name], _mean(own, metric)))
    return {key: sorted(line) for key, line in lines.items() if len(line) > 2}


def plot_sweep(records: list[dict[str, Any]], task: str, path: Path) -> None:
    """The task's final metric over τ, over β, and for every inner state and average at the middle setting."""
    metric = SHOWN[task].gain
    figure, axes = _panels(3, (16, 5))
    for axis, name, words in zip(axes, ("sync_every", "outer_momentum"), ("τ, steps per round", "β"), strict=False):
        lines = swept(records, name, metric)
        for key, line in lines.items():
            base, momentum, _, sync_every, _, inner_state, *_ = key
            held = f"β {momentum:g}" if name == "sync_every" else f"τ {sync_every}"
            axis.plot(*zip(*line, strict=True), "o-", label=f"{base}, {held}{_state_words(inner_state)}")
        axis.set(xlabel=words, ylabel=metric.replace("_", " "))
        if lines:
            axis.legend(fontsize="small")
    axes[0].set_xscale("log")
    periods = sorted({record["run"]["sync_every"] for record in records})
    axes[0].set_xticks(periods, periods)
    axes[0].minorticks_off()
    middle = [
        (f"{_words(key)} ({len(own)})", _mean(own, metric))
        for key, own in _by_setting(records).items()
        if own[0]["run"]["sync_every"] == 12
    ]
    states = [(words, value) for words, value in middle if "state" in words or not words.startswith("local_sgd")]
    axes[2].plot([value for _, value in states], [words for words, _ in states], "o")
    axes[2].set(xlabel=metric.replace("_", " "))
    figure.savefig(path, dpi=120)


def _panels(count: int, size: tuple[int, int]) -> tuple[Any, Any]:
    """A figure that no window shows, and its panels, side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, count)
    for axis in axes:
        axis.grid(alpha=0.3)
    return figure, axes


# ---- the paper's size ----


# Presets of the recipes, and the bases that the paper's Table 1 has for them.
PAPER_ROWS = {
    "image_classification": dict.fromkeys(("cifar10", "imagenet"), ("local_sgd", "sgp", "osgp", "all_reduce")),
    "translation": {"wmt16": ("local_sgd", "sgp", "all_reduce")},
}


def paper_commands(task: str) -> list[str]:
    """
    One `accelerate launch` command per row, with and without slow momentum, for the machines of the paper
    (docs/launch.md).
    """
    launch = f"accelerate launch --config_file recipes/configs/several_machines.yaml recipes/{SHOWN[task].script}"
    rows = [(preset, base) for preset, bases in PAPER_ROWS[task].items() for base in bases]
    return [
        f"{launch} --preset {preset} --base {base}{end}"
        for preset, base in rows
        for end in (" --outer_momentum 0", "")
    ]


if __name__ == "__main__":
    main()
