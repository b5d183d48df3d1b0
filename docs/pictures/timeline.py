"""A round as a timeline, drawn to scale from two rows of a record: DDP's steps above, a round of ours below."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pictures
from pictures import DARK, FAINT, GREY, LINK, OURS, PAPER

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LANES = {"worker 1": 0.0, "slow link": 1.0, "worker 2": 2.0}
WORKERS = ("worker 1", "worker 2")
THICK = 0.76
NEXT = 4.5  # from one system's first lane to the other's


@dataclass(frozen=True)
class Times:
    """Milliseconds of a row: a step's computation, a step in all, one all-reduce; and its steps per round."""

    compute: float
    step: float
    all_reduce: float
    sync_every: int

    @classmethod
    def of(cls, row: dict[str, Any]) -> Times:
        """Of a row of benchmarks/peers.py."""
        names = ("compute_seconds_per_step", "seconds_per_step", "allreduce_seconds")
        return cls(*(1e3 * row[name] for name in names), row["sync_every"])

    @property
    def round(self) -> float:
        """Milliseconds of a round."""
        return self.sync_every * self.step


def draw_round(ddp: dict[str, Any], ours: dict[str, Any]) -> Figure:
    """Two workers of each, and the link between them."""
    theirs, times = Times.of(ddp), Times.of(ours)
    note = (
        f"To scale, as measured on {ours['hosts']} hosts (two are drawn). An all-reduce takes "
        f"{ours['rho']:g} times a step's computation."
    )
    return _draw(theirs, times, title_of(theirs, times), note)


def title_of(theirs: Times, times: Times) -> str:
    """How many steps of DDP go into a round."""
    steps = times.round / theirs.step
    return f"{times.sync_every} local steps and one average take as long as {steps:.1f} steps of DDP"


@pictures.styled
def _draw(theirs: Times, times: Times, title: str, note: str) -> Figure:
    figure, ((axis,),) = pictures.panels(title, note, 1, 1, 4.5)
    end = (int(times.round / theirs.step) + 1) * theirs.step
    axis.set(xlim=(-2, end), ylim=(NEXT + 3.9, -1.15), xlabel="milliseconds")
    axis.grid(visible=False)
    axis.spines["left"].set_visible(False)
    _draw_ddp(axis, theirs, end)
    _draw_ours(axis, times, end)
    places = [(top + lane, name) for top in (0.0, NEXT) for name, lane in LANES.items()]
    axis.set_yticks([place for place, _ in places], [name for _, name in places])
    axis.tick_params(axis="y", length=0)
    return figure


def _draw_ddp(axis: Axes, times: Times, end: float) -> None:
    _heading(axis, 0.0, "Stock DDP: all wait for the link at every step", DARK)
    for n in range(int(end / times.step) + 1):
        start = n * times.step
        for worker in WORKERS:
            _block(axis, LANES[worker], start, start + times.compute, DARK, end, str(n + 1))
            _block(axis, LANES[worker], start + times.compute, start + times.step, FAINT, end, "waits", GREY)
        after = start + times.step
        _block(axis, LANES["slow link"], after - times.all_reduce, after, LINK, end, "gradients")


def _draw_ours(axis: Axes, times: Times, end: float) -> None:
    _heading(axis, NEXT, f"slowmo_hf: {times.sync_every} local steps, then one average over the link", OURS)
    alone = times.sync_every * times.compute
    for worker in WORKERS:
        lane = NEXT + LANES[worker]
        for n in range(times.sync_every):
            _block(axis, lane, n * times.compute, (n + 1) * times.compute, OURS, end, str(n + 1))
        _block(axis, lane, alone, times.round, FAINT, end, "waits", GREY)
        for n in range(4):
            start = times.round + n * times.compute
            _block(axis, lane, start, start + times.compute, OURS, end, str(n + 1))
    link = NEXT + LANES["slow link"]
    axis.text(alone / 2, link, "silent: each worker trains alone", ha="center", va="center", color=GREY, fontsize=9)
    _block(axis, link, alone, times.round, LINK, end, "weights, averaged")
    below = NEXT + LANES["worker 2"] + THICK / 2
    axis.plot([times.round] * 2, [NEXT - THICK / 2 - 0.12, below + 0.12], color=DARK, linewidth=2.2)
    axis.annotate(
        "slow momentum's update: the average, moved on the way that earlier rounds went;\n"
        "all workers start the next round from this one model",
        (times.round, below + 0.1),
        (times.round - 25, below + 0.86),
        ha="right",
        va="center",
        fontsize=9,
        arrowprops={"arrowstyle": "->", "color": DARK, "connectionstyle": "angle,angleA=0,angleB=90"},
    )


def _heading(axis: Axes, top: float, text: str, colour: str) -> None:
    axis.text(0, top - 0.68, text, color=colour, fontsize=10, fontweight="bold", va="center")


def _block(
    axis: Axes, lane: float, start: float, stop: float, colour: str, end: float, text: str, ink: str = PAPER
) -> None:
    """A stretch of time in a lane, and its text where there is room."""
    shown = min(stop, end) - start
    if shown < (stop - start) / 4:
        return
    axis.barh(lane, shown, THICK, start, color=colour, edgecolor=PAPER, linewidth=0.8)
    if stop <= end:
        ink = DARK if colour == LINK else ink
        axis.text(start + shown / 2, lane, text, ha="center", va="center", color=ink, fontsize=8)
