"""Pictures of the records of `peers.py`: the loss over seconds, final losses and utilisation by link."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

import pictures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Series:
    """A line: the systems that it is of (one a link), what a reader calls it, and its look."""

    systems: tuple[str, ...]
    name: str
    colour: str
    dashes: str = "-"

    def of(self, rows: Rows, rho: float) -> list[dict[str, Any]]:
        """Its runs on a link, a seed each."""
        return [row for row in rows if row["rho"] == rho and row["system"] in self.systems]


WIRE = "slowmo_hf local_sgd, slowmo, maintained, overlapped by {}, int8"
OURS = Series((WIRE.format(2), WIRE.format(4)), "slowmo_hf, int8, overlapped", pictures.OURS)
PLAIN = Series(("slowmo_hf local_sgd, slowmo",), "slowmo_hf, plain rounds", pictures.OURS_LIGHT)
TORCHFT = Series(("torchft DiLoCo, delayed",), "torchft DiLoCo, delayed", pictures.GREY, "--")
ACCELERATE = Series(("accelerate LocalSGD",), "accelerate LocalSGD", pictures.LIGHT, "-.")
DDP = Series(("ddp",), "DDP", pictures.DARK)
SERIES = (OURS, TORCHFT, ACCELERATE, DDP)


MOST = 6  # series that a reader tells apart


def series_of(rows: Rows) -> list[Series]:
    """Those with a name here and a run; where there are few in all, or none has a name, others by their own too."""
    named = [series for series in (*SERIES, PLAIN) if any(row["system"] in series.systems for row in rows)]
    known = {system for series in named for system in series.systems}
    others = [system for system in dict.fromkeys(row["system"] for row in rows) if system not in known]
    if named and len(named) + len(others) > MOST:
        return named
    return named + [Series((system,), system, pictures.GREY, ":") for system in others[:MOST]]


def at_the_end(rows: Rows, rho: float) -> dict[str, float]:
    """The loss of the last look on a link by the series' names, the means over their runs."""
    found = {
        series.name: [row["curve"][-1]["validation_loss"] for row in series.of(rows, rho)]
        for series in series_of(rows)
    }
    return {name: statistics.mean(losses) for name, losses in found.items() if losses}


# ---- loss over seconds ----


def looks(own: Rows) -> list[tuple[float, list[float]]]:
    """
    (seconds, the seeds' losses) look by look as far as all seeds have one, and at last each seed's own end: seconds
    are means over seeds.
    """
    curves = [row["curve"] for row in own]
    together = list(zip(*curves, strict=False))
    ends = tuple(curve[-1] for curve in curves)
    if together[-1:] != [ends]:
        together.append(ends)
    return [
        (statistics.mean(look["seconds"] for look in there), [look["validation_loss"] for look in there])
        for there in together
    ]


@pictures.styled
def loss_over_seconds(
    rows: Rows, rho: float, title: str, note: str = "", losses: tuple[float, float] | None = None
) -> Figure:
    """A line per system on one link: the mean over seeds, and a band from the lowest seed to the highest."""
    figure, ((axis,),) = pictures.panels(title, note, 1, 1, 4.4)
    ends, last = [], 0.0
    for series in series_of(rows):
        own = [row for row in series.of(rows, rho) if row["curve"]]
        if own:
            seconds, values = zip(*looks(own), strict=True)
            heights = pictures.line_with_band(axis, seconds, values, series.colour, linestyle=series.dashes)
            ends.append((heights[-1], f"{series.name}  {heights[-1]:.3f}", series.colour))
            last = max(last, *seconds)
    axis.set(xlabel="seconds of training", ylabel="test loss")
    axis.set_xlim(0, 1.005 * last)
    axis.locator_params(axis="y", nbins=6)
    if losses:
        axis.set_ylim(*losses)
    pictures.name_lines(axis, ends)
    return figure


@pictures.styled
def final_losses(rows: Rows, title: str, note: str) -> Figure:
    """The loss at the end, a dot a seed, by link and system."""
    links = sorted({row["rho"] for row in rows})
    figure, axes = pictures.panels(title, note, 1, len(links), 3.0, sharex=True, sharey=True)
    for axis, rho in zip(axes[0], links, strict=True):
        for place, series in enumerate(SERIES):
            losses = [row["final_validation_loss"] for row in series.of(rows, rho)]
            axis.plot(losses, [place] * len(losses), "o", color=series.colour, markersize=4.5, alpha=0.55)
            mean = statistics.mean(losses)
            axis.plot([mean], [place], "|", color=series.colour, markersize=17, markeredgewidth=2)
            axis.text(max(losses) + 0.006, place, f"{mean:.3f}", color=series.colour, va="center", fontsize=9)
        axis.set_title(f"all-reduce: {rho:g} steps")
        axis.set_xlabel("final test loss")
        axis.grid(visible=False, axis="y")
        axis.tick_params(axis="y", length=0)
    axes[0][0].set_yticks(range(len(SERIES)), [series.name for series in SERIES])
    axes[0][0].set(ylim=(len(SERIES) - 0.5, -0.6), xlim=(0.318, 0.505))
    return figure


def leads(rows: Rows, rho: float) -> list[float]:
    """Our final loss minus that of the best peer of the same seed, whichever that is, a value per seed."""
    gaps = []
    for row in OURS.of(rows, rho):
        there = [other for other in rows if (other["rho"], other["seed"]) == (rho, row["seed"])]
        peers = [other["final_validation_loss"] for other in there if not other["system"].startswith("slowmo_hf")]
        gaps.append(row["final_validation_loss"] - min(peers))
    return gaps


# ---- utilisation ----


def utilisations(rows: Rows, series: Series) -> dict[float, list[float]]:
    """By link, in percent, a value per run."""
    links = sorted({row["rho"] for row in rows if row["system"] in series.systems})
    return {rho: [100 * row["utilisation"] for row in series.of(rows, rho)] for rho in links}


@pictures.styled
def utilisation(rows: Rows, title: str, note: str = "") -> Figure:
    """A line per system over links: the mean over runs, and a band from the lowest to the highest."""
    figure, ((axis,),) = pictures.panels(title, note, 1, 1, 4.2)
    ends = []
    for series in series_of(rows):
        found = utilisations(rows, series)
        heights = pictures.line_with_band(
            axis, list(found), list(found.values()), series.colour, linestyle=series.dashes, marker="o", markersize=4.5
        )
        ends.append((heights[-1], f"{series.name}  {heights[-1]:.0f} %", series.colour))
    links = sorted({row["rho"] for row in rows})
    axis.set(
        xscale="log" if len(links) > 1 else "linear",
        xlabel="all-reduce over a step's computation (ρ): slower link to the right",
        ylabel="share of the time computing, %",
        ylim=(0, 104),
    )
    axis.set_xticks(links, [f"{rho:g}" for rho in links])
    axis.minorticks_off()
    axis.margins(x=0.02)
    _end_at(axis, links)
    pictures.name_lines(axis, ends)
    return figure


def _end_at(axis: Axes, links: Sequence[float]) -> None:
    """Lines end at the panel's edge, where their names are."""
    axis.set_xlim(links[0] * 0.93, links[-1] * 1.02)
