"""
How every picture here looks: one strong colour for ours, greys for the others, names beside their lines, bands over
seeds, plain ticks; and the same bytes whenever it is drawn. matplotlib is imported where something is drawn.
"""

from __future__ import annotations

import functools
import statistics
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

P, T = ParamSpec("P"), TypeVar("T")

OURS, OURS_LIGHT = "#0072b2", "#5aa5d6"  # Okabe and Ito's blue: told from grey and orange by every eye
LINK = "#e69f00"
DARK, GREY, LIGHT = "#333333", "#6b6b6b", "#909090"
PAPER, FAINT = "#ffffff", "#e4e4e4"
WIDTH = 8.0  # inches: 768 pixels of a page, where the smallest text has 11
TITLE_CHARACTERS, NOTE_CHARACTERS = 78, 118  # of a line of that width

STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9.5,
    "axes.labelsize": 9.5,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": LIGHT,
    "axes.labelcolor": DARK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.8,
    "xtick.color": LIGHT,
    "ytick.color": LIGHT,
    "xtick.labelcolor": DARK,
    "ytick.labelcolor": DARK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "text.color": DARK,
    "lines.linewidth": 1.8,
    "axes.formatter.useoffset": False,  # 0.35, not 3.5e-1 and no sum to do in one's head
    "axes.formatter.limits": (-6, 9),
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "svg.fonttype": "path",  # a page that has not the font shows the same
    "svg.hashsalt": "slowmo_hf",
}


def styled(draw: Callable[P, T]) -> Callable[P, T]:
    """Draw in the style of this module, whatever the caller's matplotlib is set to."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> T:
        from matplotlib import style

        with style.context(["default", STYLE]):
            return draw(*args, **kwargs)

    return drawn


def panels(title: str, note: str, rows: int, columns: int, height: float, **layout: Any) -> tuple[Figure, Any]:
    """
    A figure that no window shows, under its finding and above what must be known to read it, and its panels as an
    array of `rows` x `columns`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08, wspace=0.04, hspace=0.06)
    title, note = _wrapped(title, TITLE_CHARACTERS), _wrapped(note, NOTE_CHARACTERS)
    figure.suptitle(title, x=0.012, ha="left", fontsize=11.5, fontweight="bold", linespacing=1.3)
    figure.supxlabel(note, x=0.012, ha="left", fontsize=8.5, color=GREY, linespacing=1.35)
    return figure, figure.subplots(rows, columns, squeeze=False, **layout)


def _wrapped(text: str, width: int) -> str:
    return "\n".join(part for line in text.splitlines() for part in textwrap.wrap(line, width))


@styled
def save(figure: Figure, path: Path) -> None:
    """As its suffix says; an SVG has no date in it, and no random names."""
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


def line_with_band(
    axis: Axes, xs: Sequence[float], values: Sequence[Sequence[float]], colour: str, **line: Any
) -> list[float]:
    """The mean of the values (of seeds) at every x, and a band from the lowest to the highest; returns the means."""
    means = [statistics.mean(there) for there in values]
    axis.fill_between(
        xs, [min(there) for there in values], [max(there) for there in values], color=colour, alpha=0.2, linewidth=0
    )
    axis.plot(xs, means, color=colour, **line)
    return means


def name_lines(axis: Axes, ends: Sequence[tuple[float, str, str]], gap: float = 0.07) -> None:
    """
    Write names beside a panel's right edge, at the heights (data, name, colour) where their lines end; `gap` of the
    panel's height apart at least. Limits must be set before.
    """
    to_panel = axis.transData + axis.transAxes.inverted()
    left = axis.get_xlim()[0]
    wanted = sorted((float(to_panel.transform((left, height))[1]), name, colour) for height, name, colour in ends)
    heights = apart([height for height, _, _ in wanted], gap)
    for height, (_, name, colour) in zip(heights, wanted, strict=True):
        axis.text(1.015, height, name, color=colour, transform=axis.transAxes, va="center", fontsize=9)


def apart(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending heights, moved as little as makes neighbours `gap` apart."""
    moved = list(heights)
    for _ in range(200):
        for n in range(len(moved) - 1):
            missing = gap - (moved[n + 1] - moved[n])
            if missing > 0:
                moved[n] -= missing / 2
                moved[n + 1] += missing / 2
    return moved
