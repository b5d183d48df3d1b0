"""Pictures of the records of `reproduce.py`: pairs with and without slow momentum, and sweeps of one setting."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pictures
from pictures import DARK, GREY, OURS
from records import half_interval
from studies.plan import without_slowmo
from studies.showing import NAMES, SHOWN, by_setting, paired_differences, setting_of, swept_runs, words_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Records = list[dict[str, Any]]
PERIOD = 12  # of the table, around which sweeps go
STATES = {"reset": "reset", "maintain": "kept", "average": "averaged"}


def plot(records: Records, task: str, path: Path) -> None:
    """Write `pairs` of a table's records."""
    pictures.save(pairs(records, task), path)


def plot_sweep(records: Records, task: str, path: Path) -> None:
    """Write `sweep` of a sweep's records."""
    pictures.save(sweep(records, task), path)


# ---- pairs ----


@dataclass(frozen=True)
class Pair:
    """An inner method's runs without slow momentum and with it; one of the two may not have been run."""

    name: str
    without: Records
    with_it: Records

    def differences(self, metric: str) -> list[float]:
        """With minus without, seed by seed, as `shown_as` has them."""
        scale, _ = shown_as(metric)
        return [scale * difference for difference in paired_differences(self.with_it, self.without, metric)]


def shown_as(metric: str) -> tuple[float, str]:
    """A metric's factor and unit."""
    if "accuracy" in metric:
        return 100.0, "points"
    return 1.0, "BLEU" if "bleu" in metric else "nats per token"


def pairs_of(records: Records, task: str) -> list[Pair]:
    """In the order of `NAMES`; a pair has its inner method's name, or its settings where the method has several."""
    settings = by_setting(records)
    slow = {key: setting_of(without_slowmo(own[0]["run"])) for key, own in settings.items() if own[0]["slowmo"]}
    rows = [(key, own, []) for key, own in settings.items() if not own[0]["slowmo"] and key not in slow.values()]
    rows += [(key, settings.get(partner, []), settings[key]) for key, partner in slow.items()]
    rows.sort(key=lambda row: list(NAMES).index(row[0][0]))
    bases = [key[0] for key, _, _ in rows]
    names = {**NAMES, **SHOWN[task].names}
    return [
        Pair(names[key[0]] if bases.count(key[0]) == 1 else words_of(key), without, with_it)
        for key, without, with_it in rows
    ]


@pictures.styled
def pairs(records: Records, task: str) -> Figure:
    """
    A row of panels per metric: the means of each pair, and the mean paired difference, all with 95 % intervals (none
    where there is one run).
    """
    rows, metrics = pairs_of(records, task), SHOWN[task].drawn
    title = "\n".join(finding(words, metric, rows) for metric, words in metrics.items())
    note = f"Dots: means over seeds. Lines: 95 % intervals (Student's t). {_data(records)}{_unlike(rows)}"
    height = 1.1 + len(metrics) * (0.75 + 0.5 * len(rows))
    figure, axes = pictures.panels(
        title, note, len(metrics), 2, height, sharey="row", gridspec_kw={"width_ratios": (1.25, 1)}
    )
    for (levels, gains), (metric, words) in zip(axes, metrics.items(), strict=True):
        _draw_levels(levels, rows, metric, words)
        _draw_differences(gains, rows, metric)
    return figure


def finding(words: str, metric: str, rows: Sequence[Pair]) -> str:
    """What slow momentum changes, and where no change is shown, because the 95 % interval of the difference has 0."""
    _, unit = shown_as(metric)
    shown: dict[str, float] = {}
    unclear: list[str] = []
    for pair in rows:
        differences = pair.differences(metric)
        half = half_interval(differences)
        if half is None:
            continue
        mean = statistics.mean(differences)
        if abs(mean) > half:
            shown[pair.name] = mean
        else:
            unclear.append(pair.name)
    unit = " points" if unit == "points" else ""
    parts = []
    if shown:
        verb = "raises" if min(shown.values()) > 0 else "lowers" if max(shown.values()) < 0 else "changes"
        form = ("+" if verb == "changes" else "") + (".1f" if unit else ".2f")
        sizes = (
            f"{(mean if verb == 'changes' else abs(mean)):{form}}".replace("-", "−") + f"{unit} with {name}"
            for name, mean in shown.items()
        )
        parts.append(f"Slow momentum {verb} {words} by {' and '.join(sizes)}")
    if unclear:
        whose = "no change" if shown else f"no change of {words}"
        parts.append(f"{whose} is shown with {' and '.join(unclear)} (intervals contain 0)")
    sentence = "; ".join(parts) or f"{words}: one run a row, no interval"
    return sentence[0].upper() + sentence[1:]


def _draw_levels(axis: Axes, rows: Sequence[Pair], metric: str, words: str) -> None:
    scale, unit = shown_as(metric)
    for place, pair in enumerate(rows):
        for own, colour, up in ((pair.without, GREY, -0.14), (pair.with_it, OURS, 0.14)):
            if own:
                values = [scale * record["metrics"][metric] for record in own]
                _dot(axis, statistics.mean(values), place + (up if pair.with_it else 0), half_interval(values), colour)
    axis.set_yticks(range(len(rows)), [f"{pair.name}\n{_seeds(pair)}" for pair in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlabel(_axis_words(words, unit))
    axis.set_title("● without", loc="left", color=GREY)
    axis.set_title("● with slow momentum", loc="right", color=OURS)
    axis.tick_params(axis="y", length=0)
    axis.grid(visible=False, axis="y")


def _draw_differences(axis: Axes, rows: Sequence[Pair], metric: str) -> None:
    _, unit = shown_as(metric)
    digits = {"nats per token": 3, "points": 2, "BLEU": 1}[unit]
    axis.axvline(0, color=DARK, linewidth=1)
    for place, pair in enumerate(rows):
        differences = pair.differences(metric)
        if differences:
            mean, half = statistics.mean(differences), half_interval(differences)
            _dot(axis, mean, place, half, OURS)
            interval = f" [{mean - half:+.{digits}f}, {mean + half:+.{digits}f}]" if half is not None else ""
            text = f"{mean:+.{digits}f}{interval}".replace("-", "−")
            axis.text(mean, place - 0.2, text, ha="center", va="bottom", fontsize=8.5, color=OURS, bbox=_OVER)
    axis.margins(x=0.4)
    axis.locator_params(axis="x", nbins=5)
    axis.set_xlabel(f"with minus without, {unit}")
    axis.set_title("paired difference", loc="left")
    axis.tick_params(axis="y", length=0)
    axis.grid(visible=False, axis="y")


_OVER = {"facecolor": pictures.PAPER, "edgecolor": "none", "pad": 0.8}  # text over a line


def _axis_words(words: str, unit: str) -> str:
    return {"points": f"{words}, %", "BLEU": words}.get(unit, f"{words}, {unit} (less is better)")


def _dot(axis: Axes, x: float, y: float, half: float | None, colour: str) -> None:
    """A mean and its interval, lying; open where there is one run."""
    axis.errorbar([x], [y], xerr=None if half is None else [half], fmt="o", color=colour, **_look(half is not None))


def _look(several: bool) -> dict[str, Any]:
    return {"markersize": 5.5, "elinewidth": 1.8, "markerfacecolor": None if several else pictures.PAPER}


def _seeds(pair: Pair) -> str:
    count = len(pair.with_it or pair.without)
    return f"{count} seeds" if count > 1 else "1 seed"


def _unlike(rows: Sequence[Pair]) -> str:
    """Pairs that differ in the exact average too: gossip as published has none."""
    unlike = [
        pair.name
        for pair in rows
        if pair.without and pair.with_it and pair.without[0]["exact_average"] != pair.with_it[0]["exact_average"]
    ]
    return f" {' and '.join(unlike)} without slow momentum: as published, no exact average." if unlike else ""


def _data(records: Records) -> str:
    """Whose records they are, in a few words."""
    workers = sorted({record["run"]["workers"] for record in records})
    return f"{' or '.join(map(str, workers))} workers."


# ---- sweeps ----


@pictures.styled
def sweep(records: Records, task: str) -> Figure:
    """
    The task's metric over the period, over slow momentum, and by what becomes of the inner state at a round, at one
    range; an open dot is one run, a full one the mean over seeds with its 95 % interval.
    """
    metric, words = SHOWN[task].gain, SHOWN[task].drawn[SHOWN[task].gain]
    periods, momenta = swept_runs(records, "sync_every"), swept_runs(records, "outer_momentum")
    note = f"Open dots: one run. Full dots: means over seeds with 95 % intervals (Student's t). {_data(records)}"
    note += f"{_seed_spread(records, metric)} Where they do not vary, τ is {PERIOD} and β {beta_of(records):g}."
    figure, axes = pictures.panels(sweep_finding(periods, metric), note, 1, 3, 3.9, sharey=True)
    by_period, by_momentum, by_state = axes[0]
    scale, unit = shown_as(metric)
    by_period.set(ylabel=_axis_words(words, unit), xscale="log", xlabel="local steps per round, τ")
    ends = []
    for key, line in periods.items():
        _draw_line(by_period, line, metric, _colour(key[1]))
        name = "with slow\nmomentum" if key[1] else "without"
        ends.append((scale * _mean(line[-1][1], metric), name, _colour(key[1])))
    ticks = sorted({int(value) for line in periods.values() for value, _ in line})
    by_period.set_xticks(ticks, [str(tick) for tick in ticks])
    by_period.minorticks_off()
    for line in momenta.values():
        _draw_line(by_momentum, line, metric, OURS)
    by_momentum.set_xlabel("slow momentum, β")
    _draw_states(by_state, records, metric)
    for axis in axes[0]:
        axis.grid(visible=False, axis="x")
    pictures.name_lines(by_period, ends, gap=0.13)
    return figure


def _seed_spread(records: Records, metric: str) -> str:
    """How far a run alone can be trusted: the standard deviation over seeds, of settings that have three at least."""
    scale, unit = shown_as(metric)
    values = [[scale * record["metrics"][metric] for record in own] for own in by_setting(records).values()]
    spreads = [statistics.stdev(own) for own in values if len(own) > 2]
    return f" Over seeds the sd is {min(spreads):.1f} to {max(spreads):.1f} {unit}." if spreads else ""


def sweep_finding(periods: dict[tuple[Any, ...], list[tuple[float, Records]]], metric: str) -> str:
    """Where slow momentum is ahead: the least and the most over the periods that were run with and without it."""
    scale, unit = shown_as(metric)
    means = {(key[1] > 0, value): scale * _mean(own, metric) for key, line in periods.items() for value, own in line}
    gains = {
        value: means[True, value] - mean
        for (slow, value), mean in means.items()
        if not slow and (True, value) in means
    }
    if not gains:
        return "Nothing to compare over the period yet"
    ahead = [value for value, gain in gains.items() if gain > 0]
    if len(ahead) < len(gains):
        return f"Slow momentum is ahead at {len(ahead)} of {len(gains)} periods"
    return (
        f"Slow momentum is ahead at every period, {min(ahead):g} to {max(ahead):g} steps, "
        f"by {min(gains.values()):.1f} to {max(gains.values()):.1f} {unit}"
    )


def beta_of(records: Records) -> float:
    """The table's slow momentum: that of most of Local SGD's runs with any."""
    runs = [record["run"] for record in records if record["run"]["base"] == "local_sgd"]
    momenta = [run["outer_momentum"] for run in runs if run["outer_momentum"]]
    return max(momenta, key=momenta.count, default=0.0)


def states_of(records: Records) -> dict[tuple[str, bool], Records]:
    """Local SGD's runs by (what becomes of the inner state, with slow momentum), at the table's period and β."""
    local = [record["run"] | {"record": record} for record in records if record["run"]["base"] == "local_sgd"]
    local = [run for run in local if run["sync_every"] == PERIOD]
    beta = beta_of(records)
    found: dict[tuple[str, bool], Records] = {}
    for run in local:
        if run["outer_momentum"] in (0.0, beta):
            state = "reset" if run["inner_state"] == "auto" else run["inner_state"]  # what auto is for SGD
            own = found.setdefault((state, run["outer_momentum"] > 0), [])
            if run["seed"] not in {record["run"]["seed"] for record in own}:
                own.append(run["record"])
    return found


def _draw_states(axis: Axes, records: Records, metric: str) -> None:
    scale, _ = shown_as(metric)
    for (state, slow), own in states_of(records).items():
        values = [scale * record["metrics"][metric] for record in own]
        place = list(STATES).index(state) + (0.13 if slow else -0.13)
        _standing_dot(axis, place, values, _colour(slow))
    axis.set_xticks(range(len(STATES)), list(STATES.values()))
    axis.set_xlim(-0.5, len(STATES) - 0.5)
    axis.set_xlabel("SGD's momentum at a round")


def _draw_line(axis: Axes, line: Sequence[tuple[float, Records]], metric: str, colour: str) -> None:
    scale, _ = shown_as(metric)
    axis.plot(
        [value for value, _ in line], [scale * _mean(own, metric) for _, own in line], color=colour, linewidth=1.2
    )
    for value, own in line:
        values = [scale * record["metrics"][metric] for record in own]
        _standing_dot(axis, value, values, colour if own[0]["slowmo"] else GREY)


def _standing_dot(axis: Axes, x: float, values: list[float], colour: str) -> None:
    half = half_interval(values)
    axis.errorbar(
        [x],
        [statistics.mean(values)],
        yerr=None if half is None else [half],
        fmt="o",
        color=colour,
        **_look(half is not None),
    )


def _colour(slow: float) -> str:
    return OURS if slow else GREY


def _mean(own: Records, metric: str) -> float:
    return statistics.mean(record["metrics"][metric] for record in own)
