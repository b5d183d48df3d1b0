"""
The paper's tables: runs a study of settings x seeds, one record per run, and prints and plots the table of what there is.

    python recipes/reproduce.py --study table1 --dataset_name FOLDER_OF_FASHION_MNIST

An interrupted study goes on where it stopped: a run whose record is there is not run again. `--scale paper` runs nothing: it prints the
cluster command of every row at the paper's size.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import datasets
import small_images
import torch
from records import environment, write_record
from studies import BASES, Run, Tuned, choose, sweeps, table1, tuning
from transformers import HfArgumentParser

METRIC_TUNED = "validation_accuracy"  # the final one
RECORDS = Path(__file__).parent / "records"
# Two-sided 95 % points of Student's t by degrees of freedom.
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228, 11: 2.201, 12: 2.179}


@dataclass
class Arguments:
    """What to run, and where its records are."""

    study: str = field(default="table1", metadata={"help": "What to run.", "choices": ["tuning", "table1", "sweep"]})
    task: str = field(default="image_classification", metadata={"help": "On what.", "choices": ["image_classification", "translation"]})
    scale: str = field(default="small", metadata={"help": "small runs here; paper prints cluster commands.", "choices": ["small", "paper"]})
    dataset_name: str | None = field(
        default=None, metadata={"help": f"{small_images.HUB_NAME} by default; or a folder with train.parquet and test.parquet of it."}
    )
    seeds: int = field(default=5, metadata={"help": "Seeds per row of table1; the Local SGD pair has 8 at least."})
    bases: list[str] | None = field(default=None, metadata={"help": "Only these."})
    epochs: int | None = field(default=None, metadata={"help": "Instead of the study's, for a dry run."})
    jobs: int = field(default=os.cpu_count() or 1, metadata={"help": "Runs at a time, each on one core."})
    max_runs: int | None = field(default=None, metadata={"help": "Stop after so many; the next call goes on."})
    records: str = field(default=str(RECORDS), metadata={"help": "Folder of the records."})
    plot: bool = field(default=False, metadata={"help": "Write a PNG beside the records."})


def main() -> None:
    """Run what is missing, then show what is there."""
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    if arguments.scale == "paper":
        print("\n".join(paper_commands(arguments.task)))
        return
    if arguments.task != "image_classification":
        sys.exit(
            f"reproduce.py: task must be image_classification at --scale small, got {arguments.task}. Use --scale paper for its commands."
        )
    folder = Path(arguments.records)
    left = arguments.max_runs
    while (missing := [run for run in study_runs(arguments, folder) if not find_record(run, folder)]) and left != 0:
        missing = missing[:left]  # what tuning has chosen brings more
        print(f"{len(missing)} runs to do", flush=True)
        run_all(missing, arguments, folder)
        left = None if left is None else left - len(missing)
    records = [record for run in study_runs(arguments, folder) if (record := find_record(run, folder))]
    print(table(records))
    if arguments.plot and records:
        plot(records, folder / f"{arguments.study}_{arguments.task}.png")


def study_runs(arguments: Arguments, folder: Path) -> list[Run]:
    """The runs of a study, in the order in which they are done; those of the table and the sweeps wait for what tuning chooses."""
    undecided = dict.fromkeys(BASES, Tuned())
    tried = [record for run in _asked(arguments, tuning(arguments.task, undecided)) if (record := find_record(run, folder))]
    chosen = choose(tried, METRIC_TUNED)
    tried += [record for run in _asked(arguments, tuning(arguments.task, chosen)) if run.slowmo and (record := find_record(run, folder))]
    chosen = choose(tried, METRIC_TUNED)
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
        for number, done in enumerate(as_completed(under_way), start=1):
            record = done.result()
            metrics = {name: round(value, 4) for name, value in record["metrics"].items()}
            print(f"{number}/{len(runs)} {record['name']}: {metrics}, {record['seconds']:.0f} s", flush=True)


def _one_thread() -> None:
    torch.set_num_threads(1)


def run_one(run: Run, dataset_name: str | None, folder: str) -> dict[str, Any]:
    """One run and its record."""
    told = small_images.train(run, _load(dataset_name))
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
        **environment([datasets]),
        "command": f"python recipes/reproduce.py --study {run.study} --task {run.task}",
        "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}, one core per run, all workers in one process",
    }
    write_record(record, Path(folder) / f"{run.name}.json")
    return record


_loaded: dict[str | None, small_images.Images] = {}


def _load(dataset_name: str | None) -> small_images.Images:
    if dataset_name not in _loaded:
        _loaded[dataset_name] = small_images.load(dataset_name)
    return _loaded[dataset_name]


def find_record(run: Run, folder: Path) -> dict[str, Any] | None:
    """The record of this very run; None where there is none, or where it is of other settings or cannot be read."""
    try:
        record: dict[str, Any] = json.loads((folder / f"{run.name}.json").read_text())
    except (OSError, ValueError):
        return None
    return record if run.matches(record) else None


# ---- showing ----

METRICS = ("best_validation_accuracy", "training_loss", "validation_nll", "test_accuracy")


def table(records: list[dict[str, Any]]) -> str:
    """A row per setting: mean ± standard deviation (n) of every metric, and the paired gain of slow momentum with its 95 % interval."""
    settings = _by_setting(records)
    lines = ["| setting | " + " | ".join(METRICS) + " | gain in test accuracy |", "|---|" + "---|" * (len(METRICS) + 1)]
    for key, own in settings.items():
        cells = [_mean_sd([record["metrics"][name] for record in own]) for name in METRICS]
        partners = settings.get(_setting({**own[0]["run"], "outer_momentum": 0.0}), [])
        lines.append(f"| {_words(key)} | {' | '.join(cells)} | {paired_gain(own, partners) if own[0]['slowmo'] else ''} |")
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
    return words + ("" if inner_state == "auto" else f", state {inner_state}") + ("" if exact else ", no average")


def _mean_sd(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{spread} ({len(values)})"


def paired_gain(own: list[dict[str, Any]], partners: list[dict[str, Any]], metric: str = "test_accuracy") -> str:
    """Mean difference over the seeds that both have, with the 95 % interval of Student's t."""
    theirs = {record["seed"]: record["metrics"][metric] for record in partners}
    differences = [record["metrics"][metric] - theirs[record["seed"]] for record in own if record["seed"] in theirs]
    if len(differences) < 2:
        return f"{differences[0]:+.4f} (1)" if differences else ""
    half = T95.get(len(differences) - 1, 1.96) * statistics.stdev(differences) / math.sqrt(len(differences))
    mean = statistics.mean(differences)
    return f"{mean:+.4f} [{mean - half:+.4f}, {mean + half:+.4f}] ({len(differences)})"


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """Validation accuracy and training loss of the average over epochs, a line per setting, the mean over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for axis, name in zip(axes, ("validation_accuracy", "training_loss"), strict=True):
        for key, own in _by_setting(records).items():
            curves = [[look[name] for look in record["curve"]] for record in own]
            axis.plot(
                [look["epoch"] for look in own[0]["curve"]],
                [statistics.mean(values) for values in zip(*curves, strict=True)],
                label=_words(key),
            )
        axis.set_xlabel("epoch")
        axis.set_ylabel(name.replace("_", " "))
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


# ---- the paper's size ----


# Presets of the recipes, and the bases that the paper's Table 1 has for them.
PAPER_ROWS = {
    "image_classification": dict.fromkeys(("cifar10", "imagenet"), ("local_sgd", "sgp", "osgp", "all_reduce")),
    "translation": {"wmt16": ("local_sgd", "sgp", "all_reduce")},
}


def paper_commands(task: str) -> list[str]:
    """One `accelerate launch` command per row, with and without slow momentum, for the machines of the paper (docs/launch.md)."""
    launch = f"accelerate launch --config_file recipes/configs/several_machines.yaml recipes/{task}.py"
    rows = [(preset, base) for preset, bases in PAPER_ROWS[task].items() for base in bases]
    return [f"{launch} --preset {preset} --base {base}{end}" for preset, base in rows for end in (" --outer_momentum 0", "")]


if __name__ == "__main__":
    main()
