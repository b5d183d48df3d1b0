"""
slowmo_hf beside what else there is, on hosts of one's own (`benchmarks/hosts.py`) whose link is throttled. Needs root
and iproute2.

    python benchmarks/peers.py --rho 3.1
    python benchmarks/peers.py --rho 3.1 --steps 240 --same_seconds --dataset zalando-datasets/fashion_mnist

rho is a / c: a stand-alone all-reduce of the parameters' bytes over a step's computation alone. First c is measured,
then the link is set to 2 (m-1)/m 4 P / (rho c) bytes per second. Every system runs the same script
(`benchmarks/peer_job.py`) under `accelerate launch` as one machine of m: steps are timed, and with `--steps` a model
is trained to a validation loss. The record is written after every system, and the same command goes on where it was
stopped.
"""

from __future__ import annotations

import datetime
import importlib.util
import json
import shlex
import statistics
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

from safetensors.torch import save_file
from transformers import HfArgumentParser

import peer_pictures
import pictures
from hosts import Hosts, why_not
from image.data import load_images
from image.pixels import SmallImages, make_dataset
from measuring import hardware, versions
from peer_job import SYSTEMS, Training, package, period
from records import mean_sd, mean_with_interval

JOB = str(Path(__file__).with_name("peer_job.py"))
TARGET = 1.01  # times DDP's final validation loss: what "seconds to target" is measured to


@dataclass
class PeerArguments(Training):
    """What is compared, on which link."""

    rho: list[float] = field(
        default_factory=lambda: [0.5, 1.5, 3.1, 10.0], metadata={"help": "All-reduce over computation."}
    )
    systems: list[str] = field(default_factory=lambda: list(SYSTEMS), metadata={"help": "Names of peer_job.SYSTEMS."})
    hosts: int = field(default=4, metadata={"help": "Machines."})
    mtu: int = field(default=1500, metadata={"help": "Bytes of a packet."})
    steps: int = field(
        default=0, metadata={"help": "Training steps for the validation loss over time; 0: step times alone."}
    )
    same_seconds: bool = field(
        default=False, metadata={"help": "--steps are DDP's; others train for as many seconds, to the same target."}
    )
    seeds: list[int] = field(
        default_factory=lambda: [0], metadata={"help": "Of the model and the batches; a row for each."}
    )
    dataset: str | None = field(
        default=None, metadata={"help": "A folder, or a name on the Hub; none: the shipped images."}
    )
    output: str = field(default="benchmarks/records/peers.json", metadata={"help": "The record."})
    plot: bool = field(default=False, metadata={"help": "Write a PNG beside the record."})

    def __post_init__(self) -> None:
        unknown = sorted(set(self.systems) - set(SYSTEMS))
        if unknown:
            raise ValueError(f"systems must be of {list(SYSTEMS)}, got {unknown}.")
        if self.look_every % self.sync_every or self.steps % self.look_every:
            raise ValueError(
                f"look_every must be a multiple of sync_every, and steps one of look_every, got {self.look_every} "
                f"with sync_every={self.sync_every} and steps={self.steps}."
            )
        if self.timed_rounds < 5:
            raise ValueError(f"timed_rounds must be >= 5, for a median, got {self.timed_rounds}.")


def payload_bytes(system: str, parameters: int, hosts: int, sync_every: int) -> float:
    """Of fp32 parameters or gradients per step and host, by theory; compressed ones without their scales."""
    ring = 2 * (hosts - 1) / hosts * 4 * parameters
    if "sgp" in system or "dpsgd" in system:
        alone = "no average" in system or "slowmo" not in system.partition(" ")[2]
        return 4 * parameters if alone else (4 * parameters * (sync_every - 1) + ring) / sync_every
    if system.startswith(("ddp", "slowmo_hf all_reduce")):
        return ring / (2 if "bf16" in system else 1)
    factor = {"int8": 0.25, "bf16": 0.5}.get(system.rpartition(", ")[2], 1.0)
    momentum = 2 if "double averaging" in system else 1  # SGD's momentum travels too
    return ring / sync_every * factor * momentum


def missing(system: str) -> str | None:
    """Why a system cannot run here."""
    name = package(system)
    return f"{name} is not installed" if importlib.util.find_spec(name) is None else None


def is_ours(system: str) -> bool:
    """Whether it is not a peer."""
    return package(system) == "slowmo_hf"


class Record:
    """The rows measured so far, of one command."""

    def __init__(self, args: PeerArguments) -> None:
        self.args, self.path = args, Path(args.output)
        self.values: dict[str, Any] = {"rows": []}
        if self.path.exists():
            self.values = json.loads(self.path.read_text())
        self.values |= {
            "command": shlex.join(["python", "benchmarks/peers.py", *sys.argv[1:]]),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "hardware": hardware(),
            "versions": versions(),
        }

    def row(self, system: str, rho: float, seed: int) -> dict[str, Any] | None:
        """A system's, where it was measured."""
        found = (
            row
            for row in self.values["rows"]
            if (row["system"], row["rho"], row.get("seed", 0)) == (system, rho, seed)
        )
        return next(found, None)

    def budget(self, system: str, rho: float, seed: int) -> tuple[int, float]:
        """
        Steps and seconds that a system trains for; one of them is 0.

        Raises:
            ValueError: Seconds are to be DDP's, which has not been measured.
        """
        if not self.args.same_seconds or system == "ddp" or not self.args.steps:
            return self.args.steps, 0.0
        ddp = self.row("ddp", rho, seed)
        if ddp is None:
            raise ValueError(
                f"same_seconds needs 'ddp' before the others, got systems={self.args.systems}. Put ddp first."
            )
        return 0, self.args.steps * ddp["seconds_per_step"]

    def write(self) -> None:
        """Beside, and renamed."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".tmp")
        beside.write_text(json.dumps(self.values, indent=1) + "\n")
        beside.replace(self.path)


def decode(dataset: str | None, path: Path) -> None:
    """
    Write the images once for all jobs: uint8 of shape (rows, 1, 28, 28), labels int64 (safetensors).

    Raises:
        ValueError: Images are others than Fashion-MNIST's kind, which the model is made for.
    """
    sets = load_images(dataset)
    tensors = {}
    for name, rows in (("train", sets.train), ("test", sets.test)):
        images = make_dataset(rows, sets)
        if not isinstance(images, SmallImages) or images.images.shape[1:] != (1, 28, 28):
            raise ValueError(
                f"dataset must hold grey images of 28 x 28 pixels, got {dataset!r} with others. Use Fashion-MNIST or "
                "MNIST."
            )
        tensors |= {f"{name}_images": images.images, f"{name}_labels": images.labels}
    save_file(tensors, path)


def run(
    hosts: Hosts, images: Path, system: str, args: PeerArguments, steps: int, seed: int = 0, seconds: float = 0.0
) -> dict[str, Any]:
    """One system's figures; training for `steps`, or where there are none for `seconds`."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "figures.json"
        flags = {
            "system": system,
            "images": images,
            "output": output,
            "steps": steps,
            "seconds": seconds,
            "seed": seed,
        }
        flags |= {name: getattr(args, name) for name in Training.__dataclass_fields__}
        hosts.launch(
            JOB, *[word for name, value in flags.items() for word in (f"--{name}", str(value))], timeout_seconds=1200
        )
        figures: dict[str, Any] = json.loads(output.read_text())
    return figures


def row_of(
    system: str, rho: float, link: float, args: PeerArguments, figures: dict[str, Any], seed: int = 0
) -> dict[str, Any]:
    """A row of the record."""
    sync_every = period(system, args.sync_every)
    seconds = statistics.median(figures["round_seconds_per_step"])
    compute = figures["compute_seconds_per_step"]
    return {
        "system": system,
        "version": figures["version"],
        "rho": rho,
        "seed": seed,
        "hosts": args.hosts,
        "mtu": args.mtu,
        "link_mbit_per_s": link,
        "allreduce_over_compute": figures["allreduce_seconds"] / compute,
        "sync_every": sync_every,
        "parameters": figures["parameters"],
        "compute_seconds_per_step": compute,
        "allreduce_seconds": figures["allreduce_seconds"],
        "seconds_per_step": seconds,
        "round_seconds_per_step": figures["round_seconds_per_step"],
        "utilisation": compute / seconds,
        "bytes_per_worker_per_step": figures["interface_bytes_per_step"],
        "theory_bytes": payload_bytes(system, figures["parameters"], args.hosts, sync_every),
        "seconds_to_target": None,
        "final_validation_loss": figures.get("final_validation_loss"),
        "curve": figures.get("curve", []),
        "runs": len(figures["round_seconds_per_step"]),
    }


def set_targets(rows: list[dict[str, Any]]) -> None:
    """
    Seconds until the validation loss was first at most `TARGET` times DDP's final one, and until it was first at most
    the lowest final one of any system that is not ours, by link and seed; None where it never was.
    """
    for row in rows:
        peers = _finals_of_peers(row, rows)
        row["seconds_to_target"] = _seconds_to(TARGET * peers.get("ddp", 0.0), row["curve"])
        row["seconds_to_best_peer"] = _seconds_to(min(peers.values(), default=0.0), row["curve"])


def _finals_of_peers(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, float]:
    """Final losses of the systems that are not ours, on a row's link and seed."""
    there = (
        other
        for other in rows
        if (other["rho"], other.get("seed", 0)) == (row["rho"], row.get("seed", 0)) and other["curve"]
    )
    return {other["system"]: other["final_validation_loss"] for other in there if not is_ours(other["system"])}


def _seconds_to(loss: float, curve: list[dict[str, float]]) -> float | None:
    return min((look["seconds"] for look in curve if look["validation_loss"] <= loss), default=None)


def table(rows: list[dict[str, Any]]) -> str:
    """What a step takes and sends: a line per system and link."""
    lines = ["| ρ | system | step, ms | utilisation | bytes / theory | times DDP |", "|---" * 6 + "|"]
    for row in sorted(rows, key=lambda row: row["rho"]):
        if "not_run" in row:
            lines.append(f"| {row['rho']:g} | {row['system']} | not run: {row['not_run']} | | | |")
            continue
        base = next(
            (other["seconds_per_step"] for other in rows if other["system"] == "ddp" and other["rho"] == row["rho"]),
            None,
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
    lines = [f"| system | {metric.replace('_', ' ')} (seeds) | minus that of {than} |", "|---|---|---|"]
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
        there = (
            other
            for other in rows
            if (other["rho"], other["seed"]) == (row["rho"], row["seed"]) and other[name] is not None
        )
        ratios.append(row[name] / min(other[name] for other in there if not is_ours(other["system"])))
    spread_words = f" ({min(ratios):.2f} to {max(ratios):.2f})" if len(own) > 1 else ""
    return [f"{statistics.mean(row[name] for row in own):.1f}", f"{statistics.mean(ratios):.2f}{spread_words}"]


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """
    Write utilisation by link to NAME_steps.png, and where systems were trained the loss over seconds on the slowest
    link to NAME.png (`peer_pictures`).
    """
    note = "Means over seeds, bands from the lowest to the highest."
    slowest = max(row["rho"] for row in rows)
    shares = {
        statistics.mean(found[slowest]): series.name
        for series in peer_pictures.series_of(rows)
        if slowest in (found := peer_pictures.utilisations(rows, series))
    }
    most, least = max(shares), min(shares)
    title = f"On the slowest link {shares[most]} computes {most:.0f} % of the time, {shares[least]} {least:.0f} %"
    pictures.save(peer_pictures.utilisation(rows, title, note), path.with_name(f"{path.stem}_steps.png"))
    trained = [row for row in rows if row["curve"]]
    if trained:
        rho = max(row["rho"] for row in trained)
        ends = peer_pictures.at_the_end(trained, rho)
        first = min(ends, key=ends.__getitem__)
        title = f"{first} ends at the lowest loss of {len(ends)}: {ends[first]:.3f}"
        note += f" An all-reduce takes {rho:g} times a step's computation."
        pictures.save(peer_pictures.loss_over_seconds(trained, rho, title, note), path.with_name(f"{path.stem}.png"))


def measure(hosts: Hosts, images: Path, record: Record) -> None:
    """What the record does not have yet, link by link."""
    args = record.args
    for rho in args.rho:
        left = [
            (seed, system) for seed in args.seeds for system in args.systems if record.row(system, rho, seed) is None
        ]
        if not left:
            continue
        hosts.throttle(None)
        figures = run(hosts, images, "ddp", args, steps=0)
        payload = payload_bytes("ddp", figures["parameters"], args.hosts, args.sync_every)
        link = 8 * payload / (rho * figures["compute_seconds_per_step"]) / 1e6
        hosts.throttle(link)
        for seed, system in left:
            reason = missing(system)
            row: dict[str, Any] = {"system": system, "rho": rho, "seed": seed, "not_run": reason}
            if reason is None:
                steps, seconds = record.budget(system, rho, seed)
                row = row_of(system, rho, link, args, run(hosts, images, system, args, steps, seed, seconds), seed)
            record.values["rows"].append(row)
            record.write()
            print(table(record.values["rows"][-1:]).splitlines()[-1], flush=True)


def main() -> None:
    """Measure, and print the tables."""
    (args,) = HfArgumentParser(PeerArguments).parse_args_into_dataclasses()
    refusal = why_not()
    if refusal:
        sys.exit(f"peers.py: {refusal}")
    record = Record(args)
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images.safetensors"
        decode(args.dataset, images)
        with Hosts(args.hosts, mtu=args.mtu, real_time=True) as hosts:
            measure(hosts, images, record)
    rows = record.values["rows"]
    set_targets([row for row in rows if "not_run" not in row])
    record.write()
    print(table(rows))
    if args.same_seconds:
        print(same_seconds_table([row for row in rows if "not_run" not in row]))
    if args.plot:
        plot([row for row in rows if "not_run" not in row], record.path.with_suffix(".png"))


if __name__ == "__main__":
    main()
