"""Tables of the records of `reproduce.py`: a row per setting, the mean over seeds."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
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
        drawn (`dict[str, str]`): Metrics of the picture, and what a reader calls them.
        names (`dict[str, str]`): Inner methods of other names than the usual ones (`NAMES`).
    """

    columns: tuple[str, ...]
    gain: str
    drawn: dict[str, str]
    names: dict[str, str] = field(default_factory=dict)


NAMES = {"all_reduce": "all-reduce", "local_sgd": "Local SGD", "sgp": "SGP", "osgp": "OSGP"}
_ADAM = {"local_sgd": "Local Adam", "all_reduce": "AR-Adam"}
SHOWN = {
    "image_classification": Shown(
        columns=(
            "validation_accuracy",
            "best_validation_accuracy",
            "training_loss",
            "validation_nll",
            "test_accuracy",
        ),
        gain="test_accuracy",
        drawn={"test_accuracy": "test accuracy"},
    ),
    "translation": Shown(
        columns=(
            *("validation_bleu", "training_loss", "training_loss_bits", "best_validation_nll", "validation_nll"),
            *("validation_nll_bits", "test_bleu"),
        ),
        gain="test_bleu",
        drawn={"validation_nll": "validation NLL", "test_bleu": "test BLEU"},
        names=_ADAM,
    ),
    "multi30k": Shown(
        columns=(
            *("validation_nll", "validation_nll_bits", "training_loss", "training_loss_bits"),
            *("test_bleu", "test_bleu_mean_of_5", "test_bleu_tokenised_lowercase_mean_of_5"),
        ),
        gain="test_bleu_mean_of_5",
        drawn={"validation_nll": "validation NLL", "test_bleu_mean_of_5": "test BLEU"},
        names=_ADAM,
    ),
    "cifar10": Shown(
        columns=("best_test_accuracy", "training_loss", "test_nll", "test_accuracy"),
        gain="test_accuracy",
        drawn={"test_accuracy": "test accuracy"},
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
    settings, columns, gain = by_setting(records), SHOWN[task].columns, SHOWN[task].gain
    lines = [
        f"| setting | {' | '.join(map(in_words, columns))} | gain in {in_words(gain)} |",
        "|---|" + "---|" * (len(columns) + 1),
    ]
    for key, own in settings.items():
        cells = [f"{mean_sd([_shown(record, name) for record in own])} ({len(own)})" for name in columns]
        partners = settings.get(setting_of(without_slowmo(own[0]["run"])), [])
        gained = paired_gain(own, partners, gain) if own[0]["slowmo"] else ""
        lines.append(f"| {words_of(key)} | {' | '.join(cells)} | {gained} |")
    return "\n".join(lines)


def in_words(metric: str) -> str:
    """A metric's name in a record, for readers."""
    words = metric.replace("_", " ").replace("nll", "NLL").replace("bleu", "BLEU")
    return words.replace(" bits", ", bits").replace(" tokenised", ", tokenised").replace(" mean", ", mean")


def _shown(record: dict[str, Any], column: str) -> float:
    metric = column.removesuffix("_bits")
    value: float = record["metrics"][metric]
    return value if metric == column else value / math.log(2)


def by_setting(records: list[dict[str, Any]]) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """Runs that differ in their seed alone stand together."""
    settings: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in records:
        settings.setdefault(setting_of(record["run"]), []).append(record)
    return settings


def setting_of(run: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(value for name, value in run.items() if name not in ("seed", "study", "task"))


def words_of(key: tuple[Any, ...]) -> str:
    base, momentum, lr, sync_every, _, inner_state, exact, *_ = key
    words = f"{base}, γ {lr:g}, τ {sync_every}" + (f", β {momentum:g}" if momentum else "")
    return words + _state_words(inner_state) + ("" if exact else ", no average")


def _state_words(inner_state: str) -> str:
    return "" if inner_state == "auto" else f", state {inner_state}"


def paired_gain(own: list[dict[str, Any]], partners: list[dict[str, Any]], metric: str) -> str:
    """Mean difference over the seeds that both have, with its 95 % interval."""
    return mean_with_interval(paired_differences(own, partners, metric))


def paired_differences(own: list[dict[str, Any]], partners: list[dict[str, Any]], metric: str) -> list[float]:
    """Of the seeds that both have."""
    mine, theirs = ({record["run"]["seed"]: record["metrics"][metric] for record in side} for side in (own, partners))
    return [value - theirs[seed] for seed, value in mine.items() if seed in theirs]


def swept_runs(
    records: list[dict[str, Any]], field_name: str
) -> dict[tuple[Any, ...], list[tuple[float, list[dict[str, Any]]]]]:
    """
    (value of one setting, its runs), ascending, of runs that differ in it and in their seeds alone; three values at
    least, by the rest.
    """
    lines: dict[tuple[Any, ...], list[tuple[float, list[dict[str, Any]]]]] = {}
    for own in by_setting(records).values():
        run = own[0]["run"]
        lines.setdefault(setting_of({**run, field_name: 0}), []).append((run[field_name], own))
    return {key: sorted(line, key=lambda point: point[0]) for key, line in lines.items() if len(line) > 2}
