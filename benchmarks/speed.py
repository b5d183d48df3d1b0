"""
What a change of the code costs: start, local step, round and view of this checkout against another's, in one run.

    git worktree add ../before COMMIT
    python benchmarks/speed.py --before ../before/src

Two gloo processes on this machine, one thread each. Both checkouts' processes live side by side and take turns, and
all are started anew several times. A turn trains every setting for a few rounds and gives the median of each part;
figures are medians over turns, and a ratio is new / before. The last result is `benchmarks/records/speed.json`.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import slowmo_hf
from measuring import arguments_of, check_at_least, commit_of, milliseconds, origin, ratio, source_of
from slowmo_hf import SlowMoConfig, SlowMoOptimizer

ROOT = Path(__file__).parents[1]
AT_MOST = 1.02
PROCESSES, SYNC_EVERY, ROUNDS, WARM_ROUNDS = 2, 6, 10, 2
SETTINGS: dict[str, dict[str, Any]] = {
    "slow momentum": {},
    "overlapped": {"overlap_steps": 2},
    "int8": {"compression": "int8"},
    "sharded": {"shard_slow_state": True},
    "SGP": {"base": "sgp"},
}


@dataclass
class SpeedArguments:
    """Against what, and how often."""

    before: str | None = field(default=None, metadata={"help": "Folder `src` of the other checkout."})
    restarts: int = field(default=5, metadata={"help": "How often all processes are started anew."})
    turns: int = field(default=12, metadata={"help": "Of each checkout, between two starts."})
    tensors: int = field(default=64, metadata={"help": "Of the model, square."})
    side: int = field(default=64, metadata={"help": "Of each tensor."})
    output: str = field(
        default=str(ROOT / "benchmarks" / "records" / "speed.json"), metadata={"help": "Where the record is written."}
    )
    serve: bool = field(default=False, metadata={"help": "Be one of the processes (not for people)."})

    def __post_init__(self) -> None:
        check_at_least(1, self, "restarts", "turns", "tensors", "side")


# ---- one process ----


def seconds(call: Callable[[], Any]) -> float:
    """Of a call that all processes begin together."""
    dist.barrier()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(args: SpeedArguments, settings: dict[str, Any]) -> dict[str, float]:
    """Medians of one setting, in seconds."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(args.side, args.side)) for _ in range(args.tensors)]
    config = SlowMoConfig(sync_every=SYNC_EVERY, **settings)
    optimizer = SlowMoOptimizer(torch.optim.SGD(params, lr=1e-3), config)
    for param in params:
        param.grad = torch.full_like(param, 1e-3)
    found: dict[str, list[float]] = {"start": [seconds(optimizer.step)], "local step": [], "round": [], "view": []}
    for step in range(2, SYNC_EVERY * ROUNDS + 1):
        in_round = step % SYNC_EVERY  # a round begins at 0, and ends overlap_steps later
        took = seconds(optimizer.step)
        if step > SYNC_EVERY * WARM_ROUNDS:
            found["round" if in_round in (0, config.overlap_steps) else "local step"].append(took)
        if in_round == SYNC_EVERY - 1:
            found["view"].append(seconds(lambda: look(optimizer)))
    return {name: statistics.median(values) for name, values in found.items()}


def look(optimizer: SlowMoOptimizer) -> None:
    """Show the average, and give the local weights back."""
    with slowmo_hf.consensus(optimizer):
        pass


def serve(args: SpeedArguments) -> None:
    """A line in, a turn's figures out, until there is no more."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for setting in SETTINGS.values():
        measure(args, setting)  # warm
    print("ready", flush=True)
    for _ in sys.stdin:
        print(json.dumps({name: measure(args, settings) for name, settings in SETTINGS.items()}), flush=True)
    dist.destroy_process_group()


# ---- both checkouts ----


class Checkout:
    """The processes of one of them."""

    def __init__(self, source: Path, args: SpeedArguments) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, __file__, "--serve", "--tensors", str(args.tensors), "--side", str(args.side)]
        job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(PROCESSES)}
        self.processes = [
            subprocess.Popen(
                command,
                env={**os.environ, **job, "RANK": str(rank), "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            for rank in range(PROCESSES)
        ]

    def lines(self) -> list[str]:
        """The next one of each process."""
        found = [process.stdout.readline() for process in self.processes if process.stdout]
        if not all(found):
            sys.exit(f"speed.py: a process of {self.processes[0].args} ended early; run it by itself to see why.")
        return found

    def turn(self) -> dict[str, dict[str, float]]:
        """Mean over processes of every figure."""
        for process in self.processes:
            assert process.stdin
            process.stdin.write("go\n")
            process.stdin.flush()
        found = [json.loads(line) for line in self.lines()]
        return {
            setting: {part: statistics.fmean(one[setting][part] for one in found) for part in parts}
            for setting, parts in found[0].items()
        }

    def end(self) -> None:
        """Let the processes go: they read to the end of their input."""
        for process in self.processes:
            process.communicate()


def compare(args: SpeedArguments, sources: dict[str, Path]) -> dict[str, Any]:
    """All figures, by setting and part."""
    turns: dict[str, list[dict[str, dict[str, float]]]] = {name: [] for name in sources}
    for start in range(args.restarts):
        running = {name: Checkout(source, args) for name, source in sources.items()}
        for checkout in running.values():
            checkout.lines()
        for turn in range(args.turns):
            names = list(running) if (start + turn) % 2 else list(running)[::-1]
            for name in names:
                turns[name].append(running[name].turn())
        for checkout in running.values():
            checkout.end()
    figures: dict[str, Any] = {}
    for setting in SETTINGS:
        figures[setting] = {}
        for part in turns["new"][0][setting]:
            new, before = ([turn[setting][part] for turn in turns[name]] for name in ("new", "before"))
            figures[setting][part] = {
                "new": milliseconds(new),
                "before": milliseconds(before),
                "new / before": ratio(new, before, at_most=AT_MOST),
            }
    return figures


def main() -> None:
    """Compare, print a table, write the record."""
    args = arguments_of(SpeedArguments)
    if args.serve:
        serve(args)
        return
    sources = {"new": ROOT / "src", "before": source_of("speed.py", args.before)}
    figures = compare(args, sources)
    for setting, parts in figures.items():
        for part, figure in parts.items():
            told = figure["new / before"]
            print(
                f"{setting:<14} {part:<11} {figure['new']['median_ms']:8.3f} ms, before "
                f"{figure['before']['median_ms']:8.3f}, ratio {told['ratio']:.3f} ({told['p10']:.3f} to "
                f"{told['p90']:.3f}){'' if told['met'] else '  over ' + str(AT_MOST)}"
            )
    settings = {
        name: value for name, value in asdict(args).items() if name in ("restarts", "turns", "tensors", "side")
    }
    from records import write_record  # not in the processes that are timed: it imports much

    record = {
        **origin(),
        "commits": {name: commit_of(source) for name, source in sources.items()},
        "arguments": settings,
        "figures": figures,
    }
    write_record(record, Path(args.output))


if __name__ == "__main__":
    main()
