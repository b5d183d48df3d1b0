"""
The records of `reproduce.py --task multi30k` in tables: beside the paper's rows of WMT'16 En-De, what settings differ
by, seed by seed, and the runs at the size of the published figure.

    python recipes/studies/multi30k_tables.py recipes/records
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # recipes/, whose folders share modules

from records import DataError, check_holds, end_program, mean_and_interval
from studies.plan import Run, Tuned, make_run, published, sweeps
from studies.run_records import find_record
from studies.showing import paired_differences

RATE = 0.005
SEEDS = range(1, 6)  # of which most settings have three
METRICS = {"validation_nll": 3, "test_bleu_mean_of_5": 2}  # and the digits that are shown
FIGURE = 41.02  # Wu et al. (2021): BLEU, tokenised and lower-cased, of the mean of the last ten checkpoints
AS_PUBLISHED = "test_bleu_tokenised_lowercase_mean_of_10"
BESIDE = {"test_bleu_mean_of_10": 2, "test_nll_mean_of_10": 3, "test_nll_bits_mean_of_10": 3}  # and the digits


def _four(base: str, beta: float = 0.0, rate: float = RATE) -> Callable[[int], Run]:
    """The run of four workers at each seed."""
    return partial(make_run, "table1", "multi30k", base, beta, rate)


def _two(beta: float) -> Callable[[int], Run]:
    """The run of Local Adam by two workers at each seed."""
    runs = sweeps("multi30k", {"local_sgd": Tuned(RATE)})
    first = next(run for run in runs if run.outer_momentum == beta)
    return lambda seed: replace(first, seed=seed)


_AT_ITS_RATE = _four("all_reduce", rate=RATE / 2)  # which tuning chose for AR-Adam, and 0.005 for the others
# The paper's Table 1: BLEU and training loss, presumably in bits.
PAPER = {
    "Local Adam": (26.62, 2.520, _four("local_sgd")),
    "Local Adam, slow momentum": (27.14, 2.480, _four("local_sgd", 0.1)),
    "SGP": (26.92, 2.500, _four("sgp")),
    "SGP, slow momentum": (27.84, 2.447, _four("sgp", 0.1)),
    "AR-Adam": (27.17, 2.468, _four("all_reduce")),
    "AR-Adam at half the rate": (None, None, _AT_ITS_RATE),
}
# In words, the first and what it is compared with; two workers have twice the tokens each.
PAIRS = {
    "AR-Adam at half the rate, minus AR-Adam": (_AT_ITS_RATE, _four("all_reduce")),
    "Local Adam minus AR-Adam": (_four("local_sgd"), _four("all_reduce")),
    "Local Adam minus AR-Adam at half the rate": (_four("local_sgd"), _AT_ITS_RATE),
    "Local Adam, β = 0.1 minus 0": (_four("local_sgd", 0.1), _four("local_sgd")),
    "SGP minus AR-Adam": (_four("sgp"), _four("all_reduce")),
    "SGP minus AR-Adam at half the rate": (_four("sgp"), _AT_ITS_RATE),
    "SGP minus Local Adam": (_four("sgp"), _four("local_sgd")),
    "SGP, β = 0.1 minus 0": (_four("sgp", 0.1), _four("sgp")),
    "Local Adam of 2 workers minus AR-Adam": (_two(0.0), _four("all_reduce")),
    "Local Adam of 2 workers minus AR-Adam at half the rate": (_two(0.0), _AT_ITS_RATE),
    "of 2 workers, β = 0.2 minus 0": (_two(0.2), _two(0.0)),
    "of 2 workers, β = 0.5 minus 0": (_two(0.5), _two(0.0)),
    "of 2 workers, β = 0.5 minus 0.2": (_two(0.5), _two(0.2)),
}


def differences(name: str, metric: str, folder: Path) -> list[float]:
    """Of one of `PAIRS`, over the seeds that have a record of both, ascending."""
    first, other = PAIRS[name]
    return paired_differences(_found(first, folder), _found(other, folder), metric)


def _found(run: Callable[[int], Run], folder: Path) -> list[dict[str, Any]]:
    return [record for seed in SEEDS if (record := find_record(run(seed), folder))]


def beside_the_paper(folder: Path) -> str:
    """A row per row of the paper: its figures, then ours, the mean over seeds with its 95 % interval."""
    lines = [
        "| row | paper: BLEU | loss, bits | nats | here: BLEU, mean of 5 | loss, bits | nats | seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, (bleu, loss, run) in PAPER.items():
        records = _found(run, folder)
        theirs = ["", "", ""]
        if bleu is not None and loss is not None:
            theirs = [f"{bleu:.2f}", f"{loss:.3f}", f"{loss * math.log(2):.3f}"]
        metrics = [record["metrics"] for record in records]
        ours = [
            _cell([own["test_bleu_mean_of_5"] for own in metrics], "", 2),
            _cell([own["training_loss"] / math.log(2) for own in metrics], "", 3),
            f"{fmean(own['training_loss'] for own in metrics):.3f}" if metrics else "not run",
        ]
        lines.append(f"| {' | '.join([name, *theirs, *ours, str(len(records))])} |")
    return "\n".join(lines)


def differences_table(folder: Path) -> str:
    """A row per pair with a record: NLL and BLEU, the mean with its 95 % interval, then every seed's difference."""
    lines = [
        "| seeds 1, 2, 3 | validation NLL, nats | of each | bits | BLEU, mean of 5 | of each |",
        "|---|---|---|---|---|---|",
    ]
    for name in PAIRS:
        found = {metric: differences(name, metric, folder) for metric in METRICS}
        nlls, bleus = (_cells(found[metric], digits) for metric, digits in METRICS.items())
        if any(found.values()):
            bits = f"{fmean(found['validation_nll']) / math.log(2):+.3f}"
            lines.append(f"| {' | '.join([name, *nlls, bits, *bleus])} |")
    return "\n".join(lines)


def at_the_published_size(folder: Path) -> str:
    """A row per seed, then their means with 95 % intervals. All figures are of the mean of ten checkpoints."""
    lines = [
        "| seed | passes, best | updates | BLEU as published | minus 41.02 | sacreBLEU | test NLL, nats | bits |",
        "|---|---|---|---|---|---|---|---|",
    ]
    records = [record for run in published("multi30k") if (record := find_record(run, folder))]
    for record in records:
        (best,) = record["epochs_of_models"]["best"]
        told = [str(record["seed"]), f"{len(record['curve'])}, {best}", f"{record['steps']:,}"]
        lines.append(f"| {' | '.join([*told, *_beside_the_figure([record])])} |")
    if len(records) > 1:
        lines.append(f"| {' | '.join(['mean', '', '', *_beside_the_figure(records)])} |")
    return "\n".join(lines)


def _beside_the_figure(records: list[dict[str, Any]]) -> list[str]:
    """BLEU as published, its distance to the figure, and what is beside it."""
    values = {name: [record["metrics"][name] for record in records] for name in (AS_PUBLISHED, *BESIDE)}
    bleus = values[AS_PUBLISHED]
    distance = _cell([bleu - FIGURE for bleu in bleus], "+", 2)
    return [_cell(bleus, "", 2), distance, *(_cell(values[name], "", digits) for name, digits in BESIDE.items())]


def _cells(values: list[float], digits: int) -> tuple[str, str]:
    return _cell(values, "+", digits), ", ".join(f"{value:+.{digits}f}" for value in values)


def _cell(values: list[float], sign: str, digits: int) -> str:
    return mean_and_interval(values, digits, sign) if values else "not run"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0].strip())
    parser.add_argument("folder", type=Path, help="of the records")
    records = parser.parse_args().folder
    try:
        check_holds(records, "multi30k/*/*.json", "reproduce.py --task multi30k")
    except DataError as error:
        end_program(__file__, error)
    print(beside_the_paper(records), differences_table(records), at_the_published_size(records), sep="\n\n")


if __name__ == "__main__":
    main()
