"""
A round of node workers, this checkout's against another's, in one run: its time, and what every process sends and
holds.

    git worktree add ../before COMMIT
    python benchmarks/columns.py --before ../before/src --record benchmarks/records/columns.json

Two workers of two processes. Each process is a host of its own (`hosts.py`: root, iproute2): it has a throttled link
to the other worker, and a link as fast as the machine to its mate. Sides take turns, and every turn starts four new
processes. Without `--before` this checkout is compared with itself, which tells what one run can tell apart.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from hosts import Hosts, why_not
from measuring import arguments_of, check_at_least, commit_of, origin, ratio
from slowmo_hf import SlowMoConfig, SlowMoOptimizer, last_round

ROOT = Path(__file__).parents[1]
WORKERS, PROCESSES = 2, 2  # and so many in each
AT_MOST = 0.55
MIB, SIDE = 2**20, 256
WARM_ROUNDS = 1
TURN_SECONDS = 600.0  # a turn that takes longer hangs
PORT = 29600
SIDES = ("before", "after")


@dataclass
class ColumnArguments:
    """Against what, over which link, and how often."""

    before: str = field(default=str(ROOT / "src"), metadata={"help": "Folder `src` of the other checkout."})
    mbit_per_s: float = field(default=40.0, metadata={"help": "Of every process's link to the other worker."})
    mebibytes: list[int] = field(default_factory=lambda: [4, 16], metadata={"help": "Of fp32 parameters, by model."})
    turns: int = field(default=5, metadata={"help": "Of each side; each starts new processes."})
    rounds: int = field(default=3, metadata={"help": "That a turn counts, after one to warm up."})
    record: str | None = field(default=None, metadata={"help": "Where the record is written; nowhere by default."})
    serve: bool = field(default=False, metadata={"help": "Be one of the processes (not for people)."})

    def __post_init__(self) -> None:
        if not Path(self.before, "slowmo_hf").is_dir():
            raise ValueError(
                f"before must be a folder that holds slowmo_hf, got {self.before!r}. Give a checkout's folder src."
            )
        check_at_least(1, self, "turns", "rounds")
        if not self.mebibytes or min(self.mebibytes) < 1:
            raise ValueError(f"mebibytes must be >= 1 for every model, got {self.mebibytes}.")


# ---- one process ----


class Layers(torch.nn.Module):
    """Square layers side by side, of so many MiB; the loss takes all of them."""

    def __init__(self, mebibytes: int) -> None:
        super().__init__()
        count = mebibytes * MIB // (4 * SIDE * SIDE)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(SIDE, SIDE, bias=False) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A loss."""
        return torch.stack([layer(x).square().mean() for layer in self.layers]).sum()


def link_bytes() -> tuple[int, int]:
    """What this host's interfaces have sent, headers included: to the other worker, and to its mates."""
    sent = {path.parts[-3]: int(path.read_text()) for path in Path("/sys/class/net").glob("*/statistics/tx_bytes")}
    return sent["eth0"], sum(count for name, count in sent.items() if name.startswith("mate"))


def slow_state_bytes(optimizer: SlowMoOptimizer) -> int:
    """Of the anchors and velocities that this process holds, memory that they share once."""
    assert optimizer.outer_loop is not None
    slow = optimizer.outer_loop.parts.slow
    tensors = [*(item.flat for item in slow.anchors), *slow.update.velocities]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def digest(model: torch.nn.Module) -> str:
    """Of all parameters, bit for bit."""
    found = hashlib.sha256()
    for param in model.parameters():
        found.update(param.detach().numpy().tobytes())
    return found.hexdigest()[:16]


def measure(args: ColumnArguments, mebibytes: int) -> dict[str, Any]:
    """One model's rounds on this process."""
    torch.manual_seed(0)
    bare = Layers(mebibytes)
    config = SlowMoConfig(sync_every=1, outer_momentum=0.5, processes_per_worker=PROCESSES)
    optimizer = SlowMoOptimizer(torch.optim.SGD(bare.parameters(), lr=0.1), config)
    model = DistributedDataParallel(bare)
    torch.manual_seed(1 + dist.get_rank())
    rounds: dict[str, list[float]] = {
        name: [] for name in ("seconds", "report_seconds", "payload", "between", "inside")
    }
    for _ in range(WARM_ROUNDS + args.rounds):
        model(torch.randn(2, SIDE)).backward()
        assert optimizer.outer_loop is not None
        workers = optimizer.outer_loop.parts.workers
        dist.barrier()
        payload, (between, inside) = workers.bytes_sent, link_bytes()
        start = time.perf_counter()
        optimizer.step()
        took, (between_now, inside_now) = time.perf_counter() - start, link_bytes()
        report = last_round(optimizer)
        assert report is not None
        figures = (
            took,
            report.seconds,
            workers.bytes_sent - payload,
            between_now - between,
            inside_now - inside,
        )
        for name, value in zip(rounds, figures, strict=True):
            rounds[name].append(value)
        optimizer.zero_grad()
        dist.barrier()
    return {
        **{name: values[WARM_ROUNDS:] for name, values in rounds.items()},
        "slow_state": slow_state_bytes(optimizer),
        "weights": digest(bare),
    }


def serve(args: ColumnArguments) -> None:
    """All models, a line of figures at the end."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    figures: dict[Any, Any] = {mebibytes: measure(args, mebibytes) for mebibytes in args.mebibytes}
    figures["source"] = str(Path(inspect.getfile(SlowMoConfig)).parents[1])
    dist.barrier()
    print(json.dumps(figures), flush=True)
    dist.destroy_process_group()


# ---- both sides ----


def turn(hosts: Hosts, source: Path, args: ColumnArguments, port: int) -> list[dict[str, Any]]:
    """Every rank's figures by model, of four new processes that import the package from `source`."""
    sizes = [str(size) for size in args.mebibytes]
    command = [sys.executable, __file__, "--serve", "--rounds", str(args.rounds), "--mebibytes", *sizes]
    world = {"MASTER_ADDR": hosts.address(0), "MASTER_PORT": str(port), "WORLD_SIZE": str(hosts.count)}
    started = [
        hosts.start(
            rank,
            *command,
            **world,
            RANK=str(rank),
            LOCAL_RANK=str(rank % PROCESSES),
            LOCAL_WORLD_SIZE=str(PROCESSES),
            PYTHONPATH=str(source),
        )
        for rank in range(hosts.count)
    ]
    deadline = time.monotonic() + TURN_SECONDS
    for rank, process in enumerate(started):
        code = process.wait(timeout=max(1.0, deadline - time.monotonic()))
        if code:
            sys.exit(f"columns.py: rank {rank} of {source} ended with code {code}:\n{hosts.printed(process)[-4000:]}")
    found = [json.loads(hosts.printed(process).splitlines()[-1]) for process in started]
    if imported := {one.pop("source") for one in found} - {str(source)}:
        sys.exit(f"columns.py: the package was imported from {imported.pop()}, and not from {source}.")
    return found


def compare(args: ColumnArguments, sources: dict[str, Path]) -> dict[str, list[list[dict[str, Any]]]]:
    """By side, every turn's figures of all ranks. Who goes first changes from turn to turn."""
    turns: dict[str, list[list[dict[str, Any]]]] = {side: [] for side in SIDES}
    with Hosts(WORKERS * PROCESSES, mbit_per_s=args.mbit_per_s, mates=PROCESSES) as hosts:
        for number in range(args.turns):
            for place, side in enumerate(SIDES if number % 2 == 0 else SIDES[::-1]):
                turns[side].append(turn(hosts, sources[side], args, PORT + 2 * number + place))
                print(f"turn {number + 1} of {args.turns}, {side}: done", file=sys.stderr, flush=True)
    return turns


# ---- figures ----


def of_model(turns: dict[str, list[list[dict[str, Any]]]], mebibytes: int) -> dict[str, Any]:
    """
    One model's figures: by side the round's seconds, the slowest rank's, and every rank's bytes; the ratio of a turn's
    median rounds, after / before.
    """
    found: dict[str, Any] = {}
    medians: dict[str, dict[str, list[float]]] = {}
    weights = set()
    for side in SIDES:
        # JSON's keys are strings
        of_ranks = [[rank[str(mebibytes)] for rank in one] for one in turns[side]]
        weights |= {rank["weights"] for one in of_ranks for rank in one}
        found[side] = {}
        medians[side] = {}
        for name in ("seconds", "report_seconds"):
            slowest = [[max(each) for each in zip(*(rank[name] for rank in one), strict=True)] for one in of_ranks]
            medians[side][name] = [median(one) for one in slowest]
            found[side][name] = spread([value for one in slowest for value in one])
        for name in ("payload", "between", "inside"):
            by_rank = zip(*of_ranks, strict=True)
            found[side][f"{name}_bytes"] = [
                round(median(value for rank in same for value in rank[name])) for same in by_rank
            ]
        found[side]["slow_state_bytes"] = [rank["slow_state"] for rank in of_ranks[-1]]
    found["after / before"] = ratio(medians["after"]["seconds"], medians["before"]["seconds"], at_most=AT_MOST)
    found["after / before, as reported"] = ratio(
        medians["after"]["report_seconds"], medians["before"]["report_seconds"]
    )
    found["same_weights"] = len(weights) == 1  # of all ranks and turns, on both sides
    return found


def spread(values: list[float]) -> dict[str, float]:
    """n, median, minimum and maximum."""
    figures = {"median": median(values), "min": min(values), "max": max(values)}
    return {"n": len(values), **{name: round(value, 4) for name, value in figures.items()}}


def table(figures: dict[str, Any]) -> str:
    """A line per model and side; its last columns are the largest of all processes, in MB."""
    lines = [
        f"{'MiB':>4} {'side':<7}{'round, s (min to max)':>26}{'as reported':>13}{'payload':>9}{'link':>7}"
        f"{'inside':>8}{'slow state':>12}{'  after / before (p10 to p90)'}"
    ]
    for mebibytes, model in figures.items():
        for side in SIDES:
            one, told = model[side], model["after / before"]
            seconds = one["seconds"]
            most = [max(one[f"{name}_bytes"]) / 1e6 for name in ("payload", "between", "inside", "slow_state")]
            row = (
                f"{mebibytes:>4} {side:<7}"
                f"{seconds['median']:>10.3f} ({seconds['min']:.3f} to {seconds['max']:.3f})"
                f"{one['report_seconds']['median']:>12.3f}{most[0]:>9.2f}{most[1]:>7.2f}{most[2]:>8.2f}{most[3]:>12.2f}"
            )
            if side == "after":
                row += f"  {told['ratio']:.3f} ({told['p10']:.3f} to {told['p90']:.3f})"
                row += "" if told["met"] else f", over {AT_MOST}"
                row += "" if model["same_weights"] else "; WEIGHTS DIFFER"
            lines.append(row)
    return "\n".join(lines)


def main() -> None:
    """Compare, print a table, write the record."""
    args = arguments_of(ColumnArguments)
    if args.serve:
        serve(args)
        return
    if refusal := why_not():
        sys.exit(f"columns.py: {refusal}")
    load, start = os.getloadavg(), time.perf_counter()
    sources = {"before": Path(args.before).resolve(), "after": ROOT / "src"}
    turns = compare(args, sources)
    figures = {mebibytes: of_model(turns, mebibytes) for mebibytes in args.mebibytes}
    print(table(figures))
    if args.record is None:
        return
    settings = {name: value for name, value in asdict(args).items() if name not in ("before", "record", "serve")}
    from records import write_record  # not in the processes that are timed: it imports much

    record = {
        **origin(),
        "seconds": round(time.perf_counter() - start, 1),
        "commits": {side: commit_of(source) for side, source in sources.items()},
        "link": f"{args.mbit_per_s:g} Mbit/s each way for every process, between workers; inside a worker unthrottled",
        "load_average_before": round(load[0], 2),
        "arguments": settings,
        "figures": figures,
    }
    write_record(record, Path(args.record))


if __name__ == "__main__":
    main()
