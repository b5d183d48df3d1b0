"""
What a change of the code does to training: twelve settings, each trained by this checkout and by another, and compared
bit for bit.

    git worktree add ../before COMMIT
    python benchmarks/trajectories.py --before ../before/src

Every worker's parameters and buffers after every step, those shown in a look, the final average, and the bytes and
norms of every round are hashed or kept in both. Workers live in one process (`run_in_process`), so that runs repeat.
The exit code is 1 where anything differs.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import slowmo_hf
from measuring import arguments_of, source_of
from slowmo_hf import SlowMoConfig, SlowMoOptimizer

ROOT = Path(__file__).parents[1]
STEPS, WORKERS, LOOK = 26, 4, 7
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {  # inner optimizer, settings
    "slow momentum": ("sgd", {"sync_every": 4, "outer_momentum": 0.6}),
    "Local Adam": ("adamw", {"sync_every": 5, "outer_momentum": 0.4, "model_buffers": "local"}),
    "double averaging": ("sgd", {"sync_every": 3, "outer_momentum": 0.0, "inner_state": "average"}),
    "DiLoCo": (
        "adamw",
        {
            "sync_every": 4,
            "outer_optimizer": "torch.optim.SGD",
            "outer_optimizer_kwargs": '{"momentum": 0.9, "nesterov": true}',
            "outer_lr": 0.7,
        },
    ),
    "overlapped": ("sgd", {"sync_every": 5, "overlap_steps": 2}),
    "int8": ("sgd", {"sync_every": 4, "compression": "int8", "bucket_bytes": 4096}),
    "overlapped bf16": ("adamw", {"sync_every": 5, "overlap_steps": 3, "compression": "bf16"}),
    "sharded": ("sgd", {"sync_every": 4, "shard_slow_state": True, "bucket_bytes": 4096}),
    "SGP": ("sgd", {"base": "sgp", "sync_every": 6}),
    "OSGP": ("adamw", {"base": "osgp", "sync_every": 7, "staleness": 2}),
    "D-PSGD, no average": ("sgd", {"base": "dpsgd", "sync_every": 6, "exact_average": False}),
    "all-reduce": ("sgd", {"base": "all_reduce", "sync_every": 4}),
}


@dataclass
class TrajectoryArguments:
    """Against what."""

    before: str | None = field(default=None, metadata={"help": "Folder `src` of the other checkout."})
    constant_lr: bool = field(default=False, metadata={"help": "No warm-up: a round's rate is that of each step."})
    show: bool = field(default=False, metadata={"help": "Print this checkout's trajectories as JSON, and end."})


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """Of all bits, by name."""
    found = hashlib.sha256()
    for name, tensor in tensors.items():
        found.update(name.encode() + tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def train(rank: int, inner: str, settings: dict[str, Any], *, constant_lr: bool) -> dict[str, Any]:
    """One worker's run on rows of its own."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(12, 40), torch.nn.BatchNorm1d(40), torch.nn.Tanh(), torch.nn.Linear(40, 3)
    )
    torch.manual_seed(1 + rank)
    groups = [
        {"params": list(model[0].parameters()), "lr": 0.05},
        {"params": [*model[1].parameters(), *model[3].parameters()]},
    ]
    base = torch.optim.SGD(groups, lr=0.1, momentum=0.9) if inner == "sgd" else torch.optim.AdamW(groups, lr=0.01)
    optimizer = SlowMoOptimizer(base, SlowMoConfig(**settings))
    scheduler = torch.optim.lr_scheduler.LambdaLR(base, lambda step: 1.0 if constant_lr else min(step / 4, 1.0))
    steps, reports, seen = [], [], 0
    for step in range(STEPS):
        model(torch.randn(8, 12)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        steps.append(digest(model.state_dict()))
        report = slowmo_hf.last_round(optimizer)
        if report and report.round != seen:
            seen = report.round
            reports.append([report.round, report.bytes_sent, report.pseudo_grad_norm, report.consensus_distance])
        if step % LOOK == LOOK - 1:
            with slowmo_hf.consensus(optimizer):
                steps.append(digest(model.state_dict()))
    with slowmo_hf.consensus(optimizer):
        return {"steps": steps, "reports": reports, "average": digest(model.state_dict())}


def trajectories(*, constant_lr: bool) -> dict[str, Any]:
    """All settings, all workers."""
    torch.set_num_threads(1)
    return {
        name: slowmo_hf.run_in_process(lambda rank, own=own: train(rank, *own, constant_lr=constant_lr), WORKERS)
        for name, own in SETTINGS.items()
    }


def of_checkout(source: Path, *, constant_lr: bool) -> dict[str, Any]:
    """The same by another checkout's package, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(source)}
    command = [sys.executable, __file__, "--show", "--constant_lr", str(constant_lr)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"trajectories.py: {source} fails: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def main() -> None:
    """Compare, a line per setting."""
    args = arguments_of(TrajectoryArguments)
    if args.show:
        print(json.dumps(trajectories(constant_lr=args.constant_lr)))
        return
    sources = (ROOT / "src", source_of("trajectories.py", args.before))
    here, before = (of_checkout(source, constant_lr=args.constant_lr) for source in sources)
    for name in SETTINGS:
        kinds = [
            kind
            for kind in ("steps", "reports", "average")
            if any(a[kind] != b[kind] for a, b in zip(here[name], before[name], strict=True))
        ]
        print(f"{name:<20} {'the same' if not kinds else 'differs: ' + ', '.join(kinds)}")
    sys.exit(here != before)


if __name__ == "__main__":
    main()
