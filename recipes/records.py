"""What every recipe leaves behind, and how it ends: a JSON record, a table, a picture, one line on bad input."""

from __future__ import annotations

import itertools
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

import accelerate
import torch
import transformers
from transformers import Trainer, TrainingArguments

import pictures
import slowmo_hf
from slowmo_hf import SlowMoConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from one_run import OneRun

# Two-sided 95 % points of Student's t, of 1 to 30 degrees of freedom. The last serves for more: it is a little wide.
# fmt: off
T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)
# fmt: on


class SettingError(ValueError):
    """A flag's value cannot be used; the message names the flag."""


class DataError(ValueError):
    """The data cannot be used; the message names the setting, its value, the rule and the flag that mends it."""


def end_program(script: str, error: object) -> NoReturn:
    """End the program with one line, however many the error has, that starts with the script's name."""
    sys.exit(f"{Path(script).name}: {' '.join(str(error).split())}")


def check_holds(folder: Path, pattern: str, written_by: str) -> None:
    """
    Raises:
        DataError: There are no such files.
    """
    if not any(folder.glob(pattern)):
        raise DataError(f"folder must hold {pattern}, written by {written_by}, got {str(folder)!r}. Give another.")


def divide_warm_up(args: Any) -> None:
    """
    Before the arguments' own checks: transformers 4 takes whole steps in `warmup_steps`, a fraction of all steps in
    `warmup_ratio`.
    """
    if TrainingArguments.__dataclass_fields__["warmup_steps"].type in (int, "int"):
        if 0 < args.warmup_steps < 1:
            args.warmup_ratio = args.warmup_ratio or args.warmup_steps
        args.warmup_steps = math.floor(args.warmup_steps)


def describe_run(config: SlowMoConfig, trainer: Trainer, run: OneRun, libraries: list[ModuleType]) -> dict[str, Any]:
    """
    The part of a record that is the same for every task: settings, rounds, bytes, time, and what is needed to run it
    again.

    Args:
        run (`OneRun`): Behind `trainer.train()`.
        libraries (`list[ModuleType]`): Whose versions matter beside Python's, torch's, transformers', accelerate's and
            ours.
    """
    counted = config.base != "all_reduce"  # what DDP sends is its own
    return {
        "model": f"{type(trainer.model).__name__}, {sum(p.numel() for p in trainer.model.parameters()):,} parameters",
        "base": config.base,
        "slowmo": config.outer_optimizer == "slow_momentum" and config.outer_momentum > 0,
        "exact_average": config.exact_average,
        "workers": run.workers,
        "processes": trainer.args.world_size,
        "sync_every": config.sync_every,
        "outer_lr": config.outer_lr,
        "outer_momentum": config.outer_momentum,
        "inner_optimizer": type(getattr(trainer.optimizer, "optimizer", trainer.optimizer)).__name__,
        "inner_lr": trainer.args.learning_rate,
        "inner_state": config.inner_state,
        "seed": trainer.args.seed,
        "changed_on_resume": run.changed_on_resume,
        "steps": trainer.state.global_step,
        "rounds": run.rounds,
        "bytes_sent_per_worker": run.bytes_sent if counted else None,
        "seconds": run.seconds,
        "seconds_communicating": run.seconds_communicating if counted else None,
        "settings": run.settings,
        "mixed_precision": trainer.accelerator.mixed_precision,  # a launcher may have set it
        "command": shlex.join(sys.argv),
        **environment(libraries),
        "hardware": f"{hardware()}, {_device_name(trainer.args.device)}",
    }


def _device_name(device: torch.device) -> str:
    return f"{device}, {torch.cuda.get_device_name(device)}" if device.type == "cuda" else str(device)


def environment(libraries: list[ModuleType]) -> dict[str, Any]:
    """What a figure depends on beside its settings: versions, the commit, and the machine in words."""
    modules = (slowmo_hf, torch, transformers, accelerate, *libraries)
    versions = {"python": platform.python_version(), **{module.__name__: module.__version__ for module in modules}}
    return {"versions": versions, "commit": commit(), "hardware": hardware()}


def hardware() -> str:
    """Of this machine, as far as it is the same for all runs."""
    return f"{os.cpu_count()} CPU cores, {platform.machine()}"


def commit() -> str | None:
    """Of this repository; None outside one, or without git."""
    try:
        result = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


def write_record(record: dict[str, Any], path: Path) -> None:
    """Write beside, then rename: a reader never sees half a record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(record, indent=2) + "\n")
    beside.replace(path)


def print_table(record: dict[str, Any], results: dict[str, str]) -> None:
    """The run in a few lines: the task's own `results`, then what every run has."""
    rows = {
        **results,
        "workers": record["workers"],
        "rounds": record["rounds"] or "none: gradients averaged at every step"
        if record["base"] == "all_reduce"
        else record["rounds"],
        "bytes sent per worker": _or_not_counted(record["bytes_sent_per_worker"], ",.0f"),
        "seconds communicating": _or_not_counted(record["seconds_communicating"], ".1f"),
        "seconds in all": f"{record['seconds']:.1f}",
    }
    print("\n".join(f"{name:<23} {value}" for name, value in rows.items()), flush=True)


def _or_not_counted(value: float | None, spec: str) -> str:
    return "not counted" if value is None else format(value, spec)


# What `--plot` shows beside the task's own quality: what the log calls it, and its panel's title.
PANELS = {
    "loss": "training loss",
    "slowmo/consensus_distance": "drift: consensus distance",
    "slowmo/utilisation": "share of the time computing, %",
    "slowmo/bytes_sent": "sent per worker so far, MB",
}


def plot(history: list[dict[str, float]], path: Path, quality: tuple[str, str], record: dict[str, Any]) -> None:
    """Trainer's log over optimizer steps, as a picture (`training_figure`)."""
    pictures.save(training_figure(history, quality, record), path)


@pictures.styled
def training_figure(history: list[dict[str, float]], quality: tuple[str, str], record: dict[str, Any]) -> Figure:
    """
    Panels of loss, quality, drift, utilisation and bytes over optimizer steps, under what the run came to.

    Args:
        history (`list[dict[str, float]]`): `trainer.state.log_history`.
        quality (`tuple[str, str]`): What the log calls the task's metric, and what a reader calls it.
        record (`dict[str, Any]`): The run's (`describe_run`).
    """
    key, words = quality
    curves = {name: _curve(history, name) for name in dict.fromkeys(("loss", key, *PANELS))}
    figure, axes = pictures.panels(_training_title(record, words, curves[key]), _training_note(record), 2, 3, 4.6)
    for axis, (name, points) in zip(axes.flat, curves.items(), strict=False):
        axis.set_title({**PANELS, key: words}[name])
        axis.set_xlim(0, 1.03 * record["steps"])
        if points:
            axis.plot(*zip(*points, strict=True), ".-", color=pictures.OURS, linewidth=1.4)
            axis.locator_params(nbins=5)
        else:
            axis.text(0.5, 0.5, "not in the log", transform=axis.transAxes, ha="center", color=pictures.GREY)
            axis.set_yticks([])
        if name == "slowmo/utilisation":
            axis.set_ylim(0, 104)
    for axis in axes[1]:
        axis.set_xlabel("optimizer steps")
    axes.flat[-1].remove()
    return figure


def _curve(history: list[dict[str, float]], name: str) -> list[tuple[float, float]]:
    """(step, value); bytes add up, and shares are in percent."""
    points = [(entry["step"], entry[name]) for entry in history if name in entry]
    if name == "slowmo/bytes_sent":
        sums = itertools.accumulate(value for _, value in points)
        return [(step, value / 1e6) for (step, _), value in zip(points, sums, strict=True)]
    return [(step, 100 * value) for step, value in points] if name == "slowmo/utilisation" else points


def _training_title(record: dict[str, Any], words: str, points: list[tuple[float, float]]) -> str:
    reached = f"{words} {points[-1][1]:.4g}" if points else f"{words} was not measured"
    return f"{reached[0].upper()}{reached[1:]} after {record['steps']:,} steps of {record['workers']} workers"


def _training_note(record: dict[str, Any]) -> str:
    rounds = f"{record['rounds']} rounds, one every {record['sync_every']} steps" if record["rounds"] else "no rounds"
    momentum = f"slow momentum {record['outer_momentum']:g}" if record["slowmo"] else "no slow momentum"
    return f"{record['base']}, {momentum}; {rounds}; one run, seed {record['seed']}"


def mean_sd(values: list[float], sign: str = "") -> str:
    """Mean and, of more than one, standard deviation; with `sign` "+" the mean has one."""
    return f"{statistics.mean(values):{sign}.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")


def half_interval(values: list[float]) -> float | None:
    """Half of the mean's 95 % interval by Student's t; None of a value alone."""
    if len(values) < 2:
        return None
    return T95[min(len(values) - 1, len(T95)) - 1] * statistics.stdev(values) / math.sqrt(len(values))


def mean_and_interval(values: list[float], digits: int = 4, sign: str = "+") -> str:
    """The mean and, of more than one, Student's 95 % interval, with so many digits behind the point."""
    mean, half = statistics.mean(values), half_interval(values)
    interval = "" if half is None else f" [{mean - half:{sign}.{digits}f}, {mean + half:{sign}.{digits}f}]"
    return f"{mean:{sign}.{digits}f}{interval}"


def mean_with_interval(differences: list[float]) -> str:
    """Of paired differences, with their number; empty where there are none."""
    return f"{mean_and_interval(differences)} ({len(differences)})" if differences else ""
