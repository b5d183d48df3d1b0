"""
What the start costs: `accelerator.prepare` and the first forward pass with `SlowMoOptimizer`, against the same program
without it.

    python benchmarks/start_cost.py --real_time
    python benchmarks/start_cost.py --real_time --before FOLDER/src     # another checkout's, too

Two gloo processes on this machine under Accelerate and DDP, one thread each, started anew for every repetition; the
programs take turns. Figures are medians. The last result is `benchmarks/records/start_cost.json`.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator

from measuring import arguments_of, check_at_least, commit_of, milliseconds, origin, ratio, source_of
from slowmo_hf import SlowMoConfig, SlowMoOptimizer

ROOT = Path(__file__).parents[1]
AT_MOST = 1.1
PROCESSES = 2


@dataclass
class StartArguments:
    """How large a model, and how often."""

    repeats: int = field(default=15, metadata={"help": "Of each program."})
    layers: int = field(default=25, metadata={"help": "Of the model: linear and normalised."})
    width: int = field(default=1024, metadata={"help": "Of each layer, whose weight is square."})
    rows: int = field(default=32, metadata={"help": "Of the batch."})
    before: str | None = field(default=None, metadata={"help": "Folder `src` of another checkout."})
    real_time: bool = field(
        default=False, metadata={"help": "Starts run at real-time priority: other work on the machine waits for them."}
    )
    output: str = field(
        default=str(ROOT / "benchmarks" / "records" / "start_cost.json"),
        metadata={"help": "Where the record is written."},
    )
    serve: str = field(default="", metadata={"help": "Be a process of this program (not for people)."})

    def __post_init__(self) -> None:
        check_at_least(1, self, "repeats", "layers", "width", "rows")


def model_of(args: StartArguments) -> torch.nn.Module:
    """The same on every process."""
    torch.manual_seed(0)
    layers = [[torch.nn.Linear(args.width, args.width), torch.nn.LayerNorm(args.width)] for _ in range(args.layers)]
    return torch.nn.Sequential(*(module for pair in layers for module in pair))


def serve(args: StartArguments) -> None:
    """Start once, and say how many seconds it took."""
    torch.set_num_threads(1)
    if args.real_time:  # before gloo makes its threads
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(10))
    dist.init_process_group("gloo")
    accelerator, model, rows = Accelerator(cpu=True), model_of(args), torch.randn(args.rows, args.width)
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    if args.serve != "stock":
        optimizer = SlowMoOptimizer(optimizer, SlowMoConfig(sync_every=8))
    dist.barrier()
    start = time.perf_counter()
    model, optimizer = accelerator.prepare(model, optimizer)
    model(rows)
    print(json.dumps(time.perf_counter() - start), flush=True)
    dist.destroy_process_group()


def seconds(program: str, args: StartArguments) -> float:
    """Of one start, mean over processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sizes = [f"--{name}={getattr(args, name)}" for name in ("layers", "width", "rows", "real_time")]
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(PROCESSES), "OMP_NUM_THREADS": "1"}
    source = args.before if program == "before" and args.before else str(ROOT / "src")
    job |= {"LOCAL_WORLD_SIZE": str(PROCESSES), "ACCELERATE_USE_CPU": "true", "PYTHONPATH": source}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, f"--serve={program}", *sizes],
            env={**os.environ, **job, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(PROCESSES)
    ]
    told = [process.communicate()[0] for process in processes]
    if not all(told):
        sys.exit(f"start_cost.py: a process of {processes[0].args} ended early; run it by itself to see why.")
    return sum(json.loads(words) for words in told) / PROCESSES


def compare(args: StartArguments) -> dict[str, Any]:
    """All figures. The first turn is not counted: files are read then."""
    programs = ["ours", "stock", *(["before"] if args.before else [])]
    found: dict[str, list[float]] = {program: [] for program in programs}
    for turn in range(args.repeats + 1):
        for program in programs if turn % 2 else programs[::-1]:
            found[program].append(seconds(program, args))
    counted = {program: values[1:] for program, values in found.items()}
    figures: dict[str, Any] = {program: milliseconds(values) for program, values in counted.items()}
    figures["ours / stock"] = ratio(counted["ours"], counted["stock"], at_most=AT_MOST)
    if args.before:
        figures["before / stock"] = ratio(counted["before"], counted["stock"])
    return figures


def main() -> None:
    """Compare, print, write the record."""
    args = arguments_of(StartArguments)
    if args.serve:
        serve(args)
        return
    before = None if args.before is None else source_of("start_cost.py", args.before)
    figures = compare(args)
    for program in [name for name in figures if "/" not in name]:
        print(f"{program:<8} {figures[program]['median_ms']:8.1f} ms")
    told = figures["ours / stock"]
    over = "" if told["met"] else f" over {AT_MOST}"
    print(f"ratio {told['ratio']:.3f} ({told['p10']:.3f} to {told['p90']:.3f}){over}")
    from records import commit, write_record  # not in the processes that are timed: it imports much

    record = {
        **origin(),
        "commit": commit(),
        **({"commit_before": commit_of(before)} if before else {}),
        "arguments": {
            name: value for name, value in asdict(args).items() if name not in ("output", "serve", "before")
        },
        "parameter_bytes": sum(4 * p.numel() for p in model_of(args).parameters()),
        "figures": figures,
    }
    write_record(record, Path(args.output))


if __name__ == "__main__":
    main()
