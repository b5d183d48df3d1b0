"""Tables of the rows of `peers.py`: what a step takes and sends, the paper's Table 2, seeds, seconds to a loss."""

from __future__ import annotations

import statistics
from typing import Any

from peer_systems import package
from records import mean_sd, mean_with_interval

TARGET = 1.01  # times DDP's final loss: what "seconds to target" is measured to


def is_ours(system: str) -> bool:
    """Whether it is not a peer."""
    return package(system) == "slowmo_hf"


def set_targets(rows: list[dict[str, Any]]) -> None:
    """
    Seconds until the loss was first at most `TARGET` times DDP's final one, and until it was first at most
    the lowest final one of any system that is not ours, by link and seed; None where it never was.
    """
    for row in rows:
        peers = _finals_of_peers(row, rows)
        row["seconds_to_target"] = _seconds_to(TARGET * peers.get("ddp", 0.0), row["curve"])
        row["seconds_to_best_peer"] = _seconds_to(min(peers.values(), default=0.0), row["curve"])


def _finals_of_peers(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, float]:
    """Final losses of the systems that are not ours, on a row's link and seed."""
    there = (other for other in rows if _beside(row, other) and other["curve"])
    return {other["system"]: other["final_validation_loss"] for other in there if not is_ours(other["system"])}


def _beside(row: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether both are of one link and seed."""
    return (row["rho"], row.get("seed", 0)) == (other["rho"], other.get("seed", 0))


def _seconds_to(loss: float, curve: list[dict[str, float]]) -> float | None:
    return min((look["seconds"] for look in curve if look["validation_loss"] <= loss), default=None)


def table(rows: list[dict[str, Any]]) -> str:
    """What a step takes and sends: a line per system, link and seed, beside DDP of that link and seed."""
    lines = ["| ρ | system | step, ms | utilisation | bytes / theory | times DDP |", "|---" * 6 + "|"]
    for row in sorted(rows, key=lambda row: row["rho"]):
        if "not_run" in row:
            lines.append(f"| {row['rho']:g} | {row['system']} | not run: {row['not_run']} | | | |")
            continue
        base = next(
            (other["seconds_per_step"] for other in rows if other["system"] == "ddp" and _beside(row, other)), None
        )
        faster = f"{base / row['seconds_per_step']:.2f}" if base else ""
        cells = [
            f"{row['rho']:g}",
            row["system"],
            f"{1e3 * row['seconds_per_step']:.1f}",
            f"{100 * row['utilisation']:.1f} %",
        ]
        cells += [f"{row['bytes_per_worker_per_step'] / row['theory_bytes']:.3f}", faster]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


TABLE2 = {  # the rows of the paper's Table 2: without and with slow momentum
    "all-reduce": ("slowmo_hf all_reduce", "slowmo_hf all_reduce, slowmo"),
    "Local SGD": ("slowmo_hf local_sgd", "slowmo_hf local_sgd, slowmo"),
    "SGP": ("slowmo_hf sgp", "slowmo_hf sgp, slowmo"),
    "SGP, no average": ("slowmo_hf sgp", "slowmo_hf sgp, slowmo, no average"),
    "OSGP": ("slowmo_hf osgp", "slowmo_hf osgp, slowmo"),
    "double averaging": ("slowmo_hf local_sgd, double averaging", None),
}


def table2(rows: list[dict[str, Any]], ratios: tuple[float, ...] = (0.5, 3.1)) -> str:
    """
    The paper's Table 2 at the ratios that it implies for ImageNet (0.5) and WMT (3.1): ms per step, and what slow
    momentum adds.
    """
    found = {(row["rho"], row["system"]): 1e3 * row["seconds_per_step"] for row in rows if "not_run" not in row}
    lines = [
        "| base | " + " | ".join(f"ρ {rho:g}: without, with, more" for rho in ratios) + " |",
        "|---" * (1 + len(ratios)) + "|",
    ]
    for words, (plain, slow) in TABLE2.items():
        cells = []
        for rho in ratios:
            without, with_it = found.get((rho, plain)), found.get((rho, slow or ""))
            more = f"{100 * (with_it / without - 1):+.1f} %" if without and with_it else ""
            cells.append(", ".join([*(f"{ms:.1f}" for ms in (without, with_it) if ms), *([more] if more else [])]))
        lines.append(f"| {words} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(rows: list[dict[str, Any]], metric: str = "final_validation_loss", than: str | None = None) -> str:
    """
    A line per system: a metric over seeds, and the paired difference to one system, the first by default. None is left
    out.
    """
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        if row[metric] is not None:
            found.setdefault(row["system"], {})[row["seed"]] = row[metric]
    than = than or next(iter(found))
    words = metric.replace("_validation", "").replace("_", " ")  # it is of the test images
    lines = [f"| system | {words} (seeds) | minus that of {than} |", "|---|---|---|"]
    for system, own in found.items():
        gaps = [value - found[than][seed] for seed, value in own.items() if seed in found[than]]
        lines.append(
            f"| {system} | {mean_sd(list(own.values()))} ({len(own)}) | "
            f"{'' if system == than else mean_sd(gaps, '+')} |"
        )
    return "\n".join(lines)


def same_seconds_table(rows: list[dict[str, Any]]) -> str:
    """
    A line per link and system that trained for DDP's seconds, means over seeds: seconds to 1.01 times DDP's final
    loss, and to the lowest final loss of a system that is not ours; each also over those of whichever of these was
    there first with the same seed (range). Of ours the final loss minus that lowest one too.
    """
    columns = [
        "ρ",
        "system",
        "steps",
        "seconds to DDP's loss",
        "over the first peer's",
        "to the best peer's",
        "over its own",
    ]
    lines = [
        f"| {' | '.join([*columns, 'final loss (seeds)', 'minus the best peer of the seed'])} |",
        "|---" * 9 + "|",
    ]
    found: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["rho"], row["system"]), []).append(row)
    for (rho, system), own in sorted(found.items(), key=lambda entry: entry[0][0]):
        cells = [f"{rho:g}", system, f"{statistics.mean(row['curve'][-1]['step'] for row in own):.0f}"]
        for name in ("seconds_to_target", "seconds_to_best_peer"):
            cells += _seconds_and_ratio(own, rows, name)
        finals = [row["final_validation_loss"] for row in own]
        margins = (
            [row["final_validation_loss"] - min(_finals_of_peers(row, rows).values()) for row in own]
            if is_ours(system)
            else []
        )
        cells += [f"{mean_sd(finals)} ({len(own)})", mean_with_interval(margins)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _seconds_and_ratio(own: list[dict[str, Any]], rows: list[dict[str, Any]], name: str) -> list[str]:
    reached = [row for row in own if row[name] is not None]
    if len(reached) < len(own):
        return [f"{len(reached)} of {len(own)} seeds" if reached else "not reached", ""]
    ratios = []
    for row in own:
        there = (other for other in rows if _beside(row, other) and other[name] is not None)
        ratios.append(row[name] / min(other[name] for other in there if not is_ours(other["system"])))
    spread_words = f" ({min(ratios):.2f} to {max(ratios):.2f})" if len(own) > 1 else ""
    return [f"{statistics.mean(row[name] for row in own):.1f}", f"{statistics.mean(ratios):.2f}{spread_words}"]
