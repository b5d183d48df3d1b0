"""What every recipe leaves behind, and how it ends: a JSON record, a table, a picture, one line on bad input."""

from __future__ import annotations

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
from typing import Any, NoReturn

import accelerate
import torch
import transformers
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import slowmo_hf
from slowmo_hf import SlowMoCallback, SlowMoConfig

# Two-sided 95 % points of Student's t by degrees of freedom.
T95 = {
    1: 12.706,
    2: 4.303,
    3: 3.182,
    4: 2.776,
    5: 2.571,
    6: 2.447,
    7: 2.365,
    8: 2.306,
    9: 2.262,
    10: 2.228,
    11: 2.201,
    12: 2.179,
}


class SettingError(ValueError):
    """A flag's value cannot be used; the message names the flag."""


def end_program(script: str, error: object) -> NoReturn:
    """End the program with one line, however many the error has, that starts with the script's name."""
    sys.exit(f"{Path(script).name}: {' '.join(str(error).split())}")


def checkpoint_to_resume(args: TrainingArguments) -> str | None:
    """
    `--resume_from_checkpoint true`: the newest whole one in the output folder, and a fresh start where there is none,
    so that a job that is requeued runs the same command again. Anything else is a path.
    """
    asked = args.resume_from_checkpoint
    if asked is None or asked.lower() not in ("true", "false"):
        return asked
    return get_last_checkpoint(args.output_dir) if asked.lower() == "true" and os.path.isdir(args.output_dir) else None


def describe_run(
    config: SlowMoConfig, trainer: Trainer, seconds: float, libraries: list[ModuleType]
) -> dict[str, Any]:
    """
    The part of a record that is the same for every task: settings, rounds, bytes, time, and what is needed to run it
    again.

    Args:
        seconds (`float`): Of `trainer.train()`.
        libraries (`list[ModuleType]`): Whose versions matter beside Python's, torch's, transformers', accelerate's and
            ours.
    """
    rounds = [entry for entry in trainer.state.log_history if "slowmo/round" in entry]
    counted = config.base != "all_reduce"  # what DDP sends is its own
    workers = next(c for c in trainer.callback_handler.callbacks if isinstance(c, SlowMoCallback)).workers
    return {
        "model": f"{type(trainer.model).__name__}, {sum(p.numel() for p in trainer.model.parameters()):,} parameters",
        "base": config.base,
        "slowmo": config.outer_optimizer == "slow_momentum" and config.outer_momentum > 0,
        "exact_average": config.exact_average,
        "workers": workers,
        "processes": trainer.args.world_size,
        "sync_every": config.sync_every,
        "outer_lr": config.outer_lr,
        "outer_momentum": config.outer_momentum,
        "inner_optimizer": type(getattr(trainer.optimizer, "optimizer", trainer.optimizer)).__name__,
        "inner_lr": trainer.args.learning_rate,
        "inner_state": config.inner_state,
        "seed": trainer.args.seed,
        "steps": trainer.state.global_step,
        "rounds": rounds[-1]["slowmo/round"] if rounds else 0,
        "bytes_sent_per_worker": sum(entry["slowmo/bytes_sent"] for entry in rounds) if counted else None,
        "seconds": seconds,
        "seconds_communicating": sum(entry["slowmo/seconds"] for entry in rounds) if counted else None,
        "command": shlex.join(sys.argv),
        **environment(libraries),
        "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}, {_device_name(trainer.args.device)}",
    }


def _device_name(device: torch.device) -> str:
    return f"{device}, {torch.cuda.get_device_name(device)}" if device.type == "cuda" else str(device)


def environment(libraries: list[ModuleType]) -> dict[str, Any]:
    """What a figure depends on beside its settings: versions and the commit."""
    modules = (slowmo_hf, torch, transformers, accelerate, *libraries)
    versions = {"python": platform.python_version(), **{module.__name__: module.__version__ for module in modules}}
    return {"versions": versions, "commit": _commit()}


def _commit() -> str | None:
    """Of the recipe's own repository, or None outside one."""
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
    print("\n".join(f"{name:<24}{value}" for name, value in rows.items()), flush=True)


def _or_not_counted(value: float | None, spec: str) -> str:
    return "not counted" if value is None else format(value, spec)


def plot(history: list[dict[str, float]], path: Path, curves: dict[str, str]) -> None:
    """
    Trainer's log over optimizer steps, as a PNG.

    Args:
        history (`list[dict[str, float]]`): `trainer.state.log_history`.
        curves (`dict[str, str]`): One panel each: what the log calls it, and what its axis says.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(curves), 1, sharex=True, figsize=(7, 3 * len(curves)), layout="constrained")
    for axis, (key, label) in zip(axes, curves.items(), strict=True):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        axis.plot([step for step, _ in points], [value for _, value in points], marker=".")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel("optimizer steps")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def mean_sd(values: list[float], sign: str = "") -> str:
    """Mean and, of more than one, standard deviation; with `sign` "+" the mean has one."""
    return f"{statistics.mean(values):{sign}.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")


def mean_with_interval(differences: list[float]) -> str:
    """Of paired differences, with Student's 95 % interval and their number; empty where there are none."""
    if len(differences) < 2:
        return f"{differences[0]:+.4f} (1)" if differences else ""
    half = T95.get(len(differences) - 1, 1.96) * statistics.stdev(differences) / math.sqrt(len(differences))
    mean = statistics.mean(differences)
    return f"{mean:+.4f} [{mean - half:+.4f}, {mean + half:+.4f}] ({len(differences)})"
