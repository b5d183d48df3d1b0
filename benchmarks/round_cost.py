"""
What local training costs: a local step, a round, its arithmetic, a gossip exchange, memory. Two gloo processes on this
machine, one thread each.

    python benchmarks/round_cost.py
    python benchmarks/round_cost.py --device cuda --processes 1      a round's arithmetic on a card (on_device.py)

Everything that is compared is measured in one run, interleaved, in an order that changes from repetition to repetition
(the same on all ranks). A timing is the mean over the ranks, which start it together; figures are medians with the
10th and 90th percentile. The last result is `benchmarks/records/round_cost.json`; docs/benchmarks.md says what each
figure means.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from measuring import MemoryGauge, arguments_of, interleaved, mean_over_ranks, milliseconds, origin, ratio
from on_device import measure_arithmetic, measure_overlap
from records import commit, write_record
from round_parts import (
    BenchmarkArguments,
    Parts,
    Textbook,
    forward,
    local_training,
    outer_step_of,
    round_model,
    step_model,
    step_of,
)
from slowmo_hf import SlowMoConfig, SlowMoOptimizer, consensus, last_round

# Allowed beside the large tensors: the message's last element, norms, and in a look the state of the random
# generators.
SMALL_BYTES = 16384


# ---- a local step ----


def measure_step(args: BenchmarkArguments) -> dict[str, Any]:
    """A local step with DDP and SlowMoOptimizer against a step with neither. Nobody waits for anybody in either."""
    bare = step_model(args)
    ours = DistributedDataParallel(copy.deepcopy(bare))
    tokens = torch.randint(1024, (max(1, args.step_tokens // 64), 64))
    optimizer = SlowMoOptimizer(torch.optim.AdamW(ours.parameters(), lr=1e-3), SlowMoConfig(sync_every=10**9))
    calls = {
        "bare": step_of(bare, torch.optim.AdamW(bare.parameters(), lr=1e-3), tokens),
        "ours": step_of(ours, optimizer, tokens),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repetition in range(args.step_repeats + 4):
        for name in ("bare", "ours") if repetition % 2 else ("ours", "bare"):
            start = time.perf_counter()
            calls[name]()
            seconds[name].append(time.perf_counter() - start)
    counted = {name: mean_over_ranks(values[4:]) for name, values in seconds.items()}
    return {
        "parameters": sum(p.numel() for p in bare.parameters()),
        "bare": milliseconds(counted["bare"]),
        "ours": milliseconds(counted["ours"]),
        "ours / bare": ratio(counted["ours"], counted["bare"], at_most=1.02),
    }


# ---- a round, its parts, its arithmetic ----


def measure_round(args: BenchmarkArguments) -> dict[str, Any]:
    """Rounds with one flat buffer and with small buckets, the parts of a round, and three forms of the arithmetic."""
    model = round_model(args)
    lean_model = copy.deepcopy(model)
    optimizer = local_training(model, sync_every=1)
    lean = local_training(lean_model, sync_every=1, bucket_bytes=args.lean_bucket_bytes)
    textbook = Textbook(list(model.parameters()))
    calls: dict[str, Callable[[], Any]] = {
        "round, default bucket_bytes": optimizer.step,
        "round, lean bucket_bytes": lean.step,
        **Parts(list(model.parameters())).calls(),
        "outer step": outer_step_of(optimizer),
        "outer step, lean bucket_bytes": outer_step_of(lean),
        "textbook with temporaries": textbook.with_temporaries,
        "textbook in place": textbook.in_place,
    }
    both = [*model.parameters(), *lean_model.parameters()]

    @torch.no_grad()
    def drift_apart() -> None:
        torch._foreach_add_(both, 1e-4 * (dist.get_rank() + 1))

    seconds = interleaved(calls, args.repeats, before=drift_apart)
    parts = [
        sum(each)
        for each in zip(*(seconds[name] for name in ("copy_in", "all_reduce", "arithmetic", "copy_out")), strict=True)
    ]
    report = last_round(optimizer)
    assert report is not None
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tensors": len(list(model.parameters())),
        "bucket_bytes": {"default": optimizer.config.bucket_bytes, "lean": args.lean_bucket_bytes},
        "bytes_sent_per_round_and_process": report.bytes_sent,
        **{name: milliseconds(values) for name, values in seconds.items()},
        "sum of parts": milliseconds(parts),
        "round / parts, default": ratio(seconds["round, default bucket_bytes"], parts, at_most=1.25),
        "round / parts, lean": ratio(seconds["round, lean bucket_bytes"], parts, at_most=1.25),
        "textbook with temporaries / outer step": ratio(
            seconds["textbook with temporaries"], seconds["outer step"], at_least=2.5
        ),
        "textbook in place / outer step": ratio(seconds["textbook in place"], seconds["outer step"]),
    }


# ---- a gossip exchange ----


class PlainExchange:
    """
    The same bytes as one exchange, sent and received in one flat message by two processes, with nothing around it.
    """

    def __init__(self, params: list[torch.Tensor]) -> None:
        self.out = torch.cat([p.detach().view(-1) for p in params])
        self.into = torch.empty_like(self.out)

    def __call__(self) -> None:
        other = 1 - dist.get_rank()
        ops = [dist.P2POp(dist.irecv, self.into, other), dist.P2POp(dist.isend, self.out, other)]
        for work in dist.batch_isend_irecv(ops):
            work.wait()


def measure_exchange(args: BenchmarkArguments) -> dict[str, Any]:
    """One SGP exchange against the same bytes sent plainly; a step of OSGP against its computation alone, a wait."""
    never = 10**9
    model = round_model(args)
    sgp = local_training(model, base="sgp", sync_every=never)
    osgp = local_training(copy.deepcopy(model), base="osgp", sync_every=never)

    def compute() -> None:
        time.sleep(args.compute_seconds)

    def overlapped() -> None:
        compute()
        osgp.step()

    overlapped()  # the first message is under way from here on
    calls = {"sgp exchange": sgp.step, "plain exchange": PlainExchange(list(model.parameters()))}
    seconds = interleaved(calls, args.repeats)
    behind = interleaved({"osgp step": overlapped, "computation alone": compute}, args.repeats)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "compute_seconds": args.compute_seconds,
        **{name: milliseconds(values) for name, values in {**seconds, **behind}.items()},
        "sgp exchange / plain": ratio(seconds["sgp exchange"], seconds["plain exchange"], at_most=1.2),
        "osgp step / computation": ratio(behind["osgp step"], behind["computation alone"], at_most=1.05),
    }


# ---- memory ----


def measure_memory_at(
    args: BenchmarkArguments, bucket_bytes: int, stash_device: str, dtype: torch.dtype, sharded: bool = False
) -> dict[str, Any]:
    """Bytes of one process over those of the same model without us."""
    model = round_model(args, dtype)
    forward(model)
    params = sum(p.numel() for p in model.parameters())
    gauge = MemoryGauge()
    optimizer = local_training(
        model, sync_every=2, bucket_bytes=bucket_bytes, stash_device=stash_device, shard_slow_state=sharded
    )
    optimizer.step()
    gauge.read()
    optimizer.step()
    between = gauge.read()  # the peak is the round's
    optimizer.step()
    gauge.read()
    with consensus(optimizer):
        look = gauge.read()
    stash_bytes = params * dtype.itemsize
    wanted = 2 * 4 * params // (args.processes if sharded else 1) + bucket_bytes
    return {
        "bucket_bytes": bucket_bytes,
        "stash_device": stash_device,
        "dtype": str(dtype).removeprefix("torch."),
        "shard_slow_state": sharded,
        "parameters": params,
        "between rounds": between,
        "while the average is looked at": look,
        "after the look": gauge.read(),
        "bytes_per_parameter": {
            "between rounds": round(between["tensors"] / params, 2),
            "while the average is looked at": round(look["tensors"] / params, 2),
        },
        "target": {"between rounds": f"<= {wanted}", "while the average is looked at": f"<= {wanted + stash_bytes}"},
        "met": between["tensors"] <= wanted + SMALL_BYTES and look["tensors"] <= wanted + stash_bytes + SMALL_BYTES,
    }


def measure_memory(args: BenchmarkArguments) -> list[dict[str, Any]]:
    """
    Both points of bucket_bytes, both places for the stash, bf16 parameters, and slow state sharded over the processes.
    """
    default = SlowMoConfig().bucket_bytes
    measure_memory_at(args, default, "same", torch.float32)  # what is allocated once per process
    cases: list[tuple[Any, ...]] = [
        (b, s, torch.float32) for b in (default, args.lean_bucket_bytes) for s in ("same", "cpu")
    ]
    cases += [(b, "same", torch.bfloat16) for b in (default, args.lean_bucket_bytes)]
    cases += [(b, "same", torch.float32, True) for b in (default, args.lean_bucket_bytes)]
    return [measure_memory_at(args, *case) for case in cases]


# ---- the run ----

BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:gloo"}  # NCCL refuses two processes on one card
MEASURES: dict[str, Callable[[BenchmarkArguments], Any]] = {
    "step": measure_step,
    "round": measure_round,
    "exchange": measure_exchange,
    "memory": measure_memory,
    "arithmetic": measure_arithmetic,
    "overlap": measure_overlap,
}


def measure(args: BenchmarkArguments) -> dict[str, Any]:
    """All parts, in one process of several that have met in `torch.distributed`."""
    torch.manual_seed(0)
    return {name: MEASURES[name](args) for name in args.parts}


def _worker(rank: int, args: BenchmarkArguments, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(args.processes), LOCAL_WORLD_SIZE=str(args.processes), OMP_NUM_THREADS="1"
    )
    dist.init_process_group(
        BACKENDS[args.device], init_method=f"file://{folder}/store", rank=rank, world_size=args.processes
    )
    figures = measure(args)
    if rank == 0:
        Path(folder, "figures.json").write_text(json.dumps(figures))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Start the processes, gather the figures, write the record."""
    args = arguments_of(BenchmarkArguments)
    load = os.getloadavg()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_worker, args=(args, folder), nprocs=args.processes)
        figures = json.loads(Path(folder, "figures.json").read_text())
    record = {
        **origin(args.device),
        "commit": commit(),
        "seconds": round(time.perf_counter() - start, 1),
        "backend": f"{BACKENDS[args.device]}, {args.link}",
        "threads_per_process": 1,
        "load_average_before": round(load[0], 2),
        "arguments": asdict(args),
        **figures,
    }
    write_record(record, Path(args.output))
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
