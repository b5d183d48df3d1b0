"""Tables and plots of the records of `reproduce.py`: a row or line per setting, the mean over seeds."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from records import mean_sd, mean_with_interval
from studies.plan import without_slowmo


@dataclass(frozen=True)
class Shown:
    """
    How a task's records are shown.

    Args:
        columns (`tuple[str, ...]`): Metrics of the table: the paper's, then others. One in nats is shown in bits with
            `_bits` behind it.
        gain (`str`): The metric whose paired gain the table has.
        curves (`tuple[str, str]`): What the plot shows over epochs.
    """

    columns: tuple[str, ...]
    gain: str
    curves: tuple[str, str]


SHOWN = {
    "image_classification": Shown(
        columns=("best_validation_accuracy", "training_loss", "validation_nll", "test_accuracy"),
        gain="test_accuracy",
        curves=("validation_accuracy", "training_loss"),
    ),
    "translation": Shown(
        columns=(
            *("validation_bleu", "training_loss", "training_loss_bits", "best_validation_nll", "validation_nll"),
            *("validation_nll_bits", "test_bleu"),
        ),
        gain="test_bleu",
        curves=("validation_nll", "training_loss"),
    ),
    "multi30k": Shown(
        columns=(
            "best_validation_nll",
            "training_loss",
            "test_bleu",
            "test_bleu_mean_of_5",
            "test_bleu_tokenised_lowercase_mean_of_5",
        ),
        gain="test_bleu_mean_of_5",
        curves=("validation_nll", "training_loss"),
    ),
    "cifar10": Shown(
        columns=("best_test_accuracy", "training_loss", "test_nll", "test_accuracy"),
        gain="test_accuracy",
        curves=("test_accuracy", "training_loss"),
    ),
}


def data_line(records: list[dict[str, Any]]) -> str:
    """What the records are of, to stand above their table and plot."""
    return f"Data: {', '.join(sorted({record['dataset'] for record in records})) or 'no record yet'}"


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
        cells = [f"{mean_sd([_shown(record, name) for record in own])} ({len(own)})" for name in columns]
        partners = settings.get(_setting(without_slowmo(own[0]["run"])), [])
        lines.append(
            f"| {_words(key)} | {' | '.join(cells)} | {paired_gain(own, partners, gain) if own[0]['slowmo'] else ''} |"
        )
    return "\n".join(lines)


def _shown(record: dict[str, Any], column: str) -> float:
    metric = column.removesuffix("_bits")
    value: float = record["metrics"][metric]
    return value if metric == column else value / math.log(2)


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
