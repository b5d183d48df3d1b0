"""
slowmo_hf beside what else there is, on hosts of one's own (`benchmarks/hosts.py`) whose link is throttled. Needs root
and iproute2.

    python benchmarks/peers.py --rho 3.1
    python benchmarks/peers.py --rho 3.1 --steps 240 --same_seconds --dataset zalando-datasets/fashion_mnist

rho is a / c: a stand-alone all-reduce of the parameters' bytes over a step's computation alone. First c is measured,
then the link is set to 2 (m-1)/m 4 P / (rho c) bytes per second. Every system runs the same script
(`benchmarks/peer_job.py`) under `accelerate launch` as one machine of m: steps are timed, and with `--steps` a model
is trained to a loss on the test images. The record is written after every system, and the same command goes on where
it was stopped.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

from safetensors.torch import save_file

import peer_pictures
import pictures
from hosts import Hosts, why_not
from image.data import load_images
from image.pixels import SmallImages, make_dataset
from measuring import arguments_of, check_at_least, origin
from peer_systems import SYSTEMS, Training, package, period
from peer_tables import same_seconds_table, set_targets, table
from records import DataError, commit, end_program, write_record
from studies.advice import advised

JOB = str(Path(__file__).with_name("peer_job.py"))


@dataclass
class PeerArguments(Training):
    """What is compared, on which link."""

    rho: list[float] = field(
        default_factory=lambda: [0.5, 1.5, 3.1, 10.0], metadata={"help": "All-reduce over computation."}
    )
    systems: list[str] = field(default_factory=lambda: list(SYSTEMS), metadata={"help": "Of peer_systems.SYSTEMS."})
    hosts: int = field(default=4, metadata={"help": "Machines."})
    mtu: int = field(default=1500, metadata={"help": "Bytes of a packet."})
    steps: int = field(default=0, metadata={"help": "Training steps for the loss over time; 0: step times alone."})
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
            raise ValueError(f"systems must be of {list(SYSTEMS)}, got {unknown}. Set --systems.")
        check_at_least(2, self, "hosts")
        if min(self.rho) <= 0:
            raise ValueError(f"rho must be > 0, got {self.rho}. Set --rho.")
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


class Record:
    """
    The rows measured so far, of one command.

    Raises:
        ValueError: The file has rows of other settings than these, or does not say of which.
    """

    def __init__(self, args: PeerArguments) -> None:
        self.args, self.path = args, Path(args.output)
        of_rows = ("rho", "systems", "seeds", "output", "plot")
        settings = {name: value for name, value in asdict(args).items() if name not in of_rows}
        self.values: dict[str, Any] = {"rows": []}
        if self.path.exists():
            self.values = json.loads(self.path.read_text())
            if self.values.get("settings") != settings:
                raise ValueError(
                    f"output must be a new file, or a record of the same settings, got {args.output!r} with "
                    f"{self.values.get('settings', 'none')}. Set --output."
                )
        self.values |= origin() | {"settings": settings}

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
        """As it is now."""
        write_record(self.values, self.path)


def decode(dataset: str | None, path: Path) -> None:
    """
    Write the images once for all jobs: uint8 of shape (rows, 1, 28, 28), labels int64 (safetensors).

    Raises:
        DataError: They cannot be read, or are others than Fashion-MNIST's kind, which the model is made for.
    """
    tensors = {}
    with advised("--dataset to a folder with Fashion-MNIST or MNIST: train*.parquet and test*.parquet."):
        sets = load_images(dataset)
        for name, rows in (("train", sets.train), ("test", sets.test)):
            images = make_dataset(rows, sets)
            if not isinstance(images, SmallImages) or images.images.shape[1:] != (1, 28, 28):
                raise DataError(f"dataset must hold grey images of 28 x 28 pixels, got {dataset!r} with others.")
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
            record.values["rows"].append({**row, "commit": commit()})  # of this row: an older record is gone on with
            record.write()
            print(table(record.values["rows"][-1:]).splitlines()[-1], flush=True)


def main() -> None:
    """Measure, and print the tables."""
    args = arguments_of(PeerArguments)
    refusal = why_not()
    if refusal:
        sys.exit(f"peers.py: {refusal}")
    try:
        record = Record(args)
    except ValueError as error:
        end_program(__file__, error)
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images.safetensors"
        try:
            decode(args.dataset, images)
        except DataError as error:
            end_program(__file__, error)
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
