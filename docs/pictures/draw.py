"""
Draws every picture of the docs from the committed records, as SVG beside this file, the same bytes each time:

    python docs/pictures/draw.py

A title says a finding with the records' own figures. One that its records no longer bear out ends the program.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import timeline

import peer_pictures
import pictures
from peer_pictures import ACCELERATE, DDP, OURS, PLAIN, TORCHFT
from records import half_interval
from studies import drawing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SLOW = 3.1  # all-reduce over computation: what the paper's figures imply for WMT
HALF = 0.5  # and for ImageNet


def peer_rows(name: str) -> list[dict[str, Any]]:
    """Of a record of benchmarks/peers.py, without systems that could not run."""
    rows = json.loads((ROOT / f"benchmarks/records/{name}.json").read_text())["rows"]
    return [row for row in rows if "not_run" not in row]


def study(task: str, name: str) -> list[dict[str, Any]]:
    """The records of a study of recipes/studies/reproduce.py."""
    return [json.loads(path.read_text()) for path in sorted((ROOT / f"recipes/records/{task}/{name}").glob("*.json"))]


def true(claim: bool, title: str) -> str:
    """
    The title, where its claim holds.

    Raises:
        ValueError: The records say otherwise now.
    """
    if not claim:
        raise ValueError(f"The records do not bear out this title any more: {title!r}. Write another.")
    return title


def round_timeline() -> Figure:
    """A round beside DDP's steps, to scale."""
    rows = {row["system"]: row for row in peer_rows("peers") if row["rho"] == SLOW}
    return timeline.draw_round(rows["ddp"], rows["slowmo_hf local_sgd, slowmo"])


def loss_over_seconds() -> Figure:
    """Ours, the best peer, accelerate's and DDP on the link of `SLOW`."""
    rows = [row for row in peer_rows("peers_same_seconds") if row["rho"] == SLOW]
    finals: dict[str, list[float]] = {}
    for row in rows:
        finals.setdefault(row["system"], []).append(row["final_validation_loss"])
    means = {system: statistics.mean(losses) for system, losses in finals.items()}
    ours, best = (means[series.systems[0]] for series in (OURS, TORCHFT))
    gaps = peer_pictures.leads(rows, SLOW)
    (steps,) = {row["curve"][-1]["step"] for row in DDP.of(rows, SLOW)}
    theirs = {row["seed"]: row["seconds_to_target"] for row in TORCHFT.of(rows, SLOW)}
    ratios = [row["seconds_to_target"] / theirs[row["seed"]] for row in OURS.of(rows, SLOW)]
    title = true(
        best == min(mean for system, mean in means.items() if "slowmo_hf" not in system)
        and _below(gaps)
        and min(ratios) < 1 < max(ratios),
        f"On a slow link slowmo_hf ends at a loss of {ours:.3f}, the best peer at {best:.3f}",
    )
    note = (
        f"Each has the seconds of DDP's {steps} steps. Four hosts; an all-reduce takes {SLOW:g} times a step's "
        f"computation. Means of {len(gaps)} seeds (accelerate {len(ACCELERATE.of(rows, SLOW))}), bands from the "
        f"lowest to the highest. slowmo_hf minus the best peer of the seed: {_interval(gaps)}. No lead is shown "
        f"early on: 1.01 times DDP's final loss takes {min(ratios):.2f} to {max(ratios):.2f} of torchft's seconds."
    )
    return peer_pictures.loss_over_seconds(rows, SLOW, title, note, losses=(0.32, 0.5))


def final_losses() -> Figure:
    """The same systems' ends on three links."""
    rows = peer_rows("peers_same_seconds")
    gaps = {rho: peer_pictures.leads(rows, rho) for rho in sorted({row["rho"] for row in rows})}
    slowest = max(gaps)
    title = true(
        all(gap < 0 for own in gaps.values() for gap in own)
        and all(_below(own) for rho, own in gaps.items() if rho != slowest)
        and not _below(gaps[slowest]),
        "Given DDP's seconds, slowmo_hf's best setting ends lower than every peer, with every seed",
    )
    found = "; ".join(f"{_interval(own)} at {rho:g}" for rho, own in gaps.items())
    note = (
        "Dots: seeds; strokes and figures: their means. All-reduce: in steps' computation. "
        f"slowmo_hf minus the best peer of the seed: {found}, "
        f"where the interval of {len(gaps[slowest])} seeds contains 0."
    )
    return peer_pictures.final_losses(rows, title, note)


def _interval(values: list[float]) -> str:
    """The mean and its 95 % interval."""
    mean, half = statistics.mean(values), half_interval(values) or 0.0
    return f"{mean:.4f} [{mean - half:.4f}, {mean + half:.4f}]".replace("-", "−")


def _below(values: list[float]) -> bool:
    """Whether the mean's 95 % interval is below 0."""
    return statistics.mean(values) + (half_interval(values) or 0.0) < 0


def link_rows() -> list[dict[str, Any]]:
    """Runs to a loss where a system has some on a link, else the one whose steps alone were timed."""
    trained = peer_rows("peers_same_seconds")
    there = {(row["system"], row["rho"]) for row in trained}
    return trained + [row for row in peer_rows("peers") if (row["system"], row["rho"]) not in there]


def utilisation() -> Figure:
    """By link: ours with and without the wire's help, two peers, DDP."""
    rows = link_rows()
    shares = {
        series.name: peer_pictures.utilisations(rows, series) for series in (OURS, DDP, TORCHFT, ACCELERATE, PLAIN)
    }
    ours, ddp = (statistics.mean(shares[series.name][SLOW]) for series in (OURS, DDP))
    title = true(ours > ddp, f"On a slow link slowmo_hf computes {ours:.0f} % of the time, DDP {ddp:.0f} %")
    note = (
        f"Four hosts. Title: ρ = {SLOW:g}. Means of 2 to 5 seeds, bands from lowest to highest; "
        f"at ρ = {HALF:g} and for plain rounds one run. Overlapped by 2 steps, at ρ = 10 by 4. At "
        f"ρ = {HALF:g} not measured; DDP there computes {shares[DDP.name][HALF][0]:.0f} % of the time."
    )
    return peer_pictures.utilisation(rows, title, note)


def table1() -> Figure:
    """The paper's Table 1 in small, images."""
    return drawing.pairs(study("image_classification", "table1"), "image_classification")


def translation() -> Figure:
    """And translation."""
    return drawing.pairs(study("translation", "table1"), "translation")


def sweep_records() -> list[dict[str, Any]]:
    """The sweeps' runs, and of the settings that the table has its seeds in their place."""
    table = study("image_classification", "table1")
    there = {drawing.setting_of(record["run"]) for record in table}
    return table + [
        record for record in study("image_classification", "sweep") if drawing.setting_of(record["run"]) not in there
    ]


def sweep() -> Figure:
    """Around the Local SGD pair."""
    return drawing.sweep(sweep_records(), "image_classification")


PICTURES = {
    "round": round_timeline,
    "loss_over_seconds": loss_over_seconds,
    "final_losses": final_losses,
    "utilisation": utilisation,
    "table1": table1,
    "sweep": sweep,
    "translation": translation,
}


def main(folder: Path = HERE) -> None:
    """Draw all."""
    for name, draw in PICTURES.items():
        pictures.save(draw(), folder / f"{name}.svg")
        print(folder / f"{name}.svg")


if __name__ == "__main__":
    main()
