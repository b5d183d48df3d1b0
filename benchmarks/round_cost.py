"""
What local training costs: a local step, a round, its arithmetic, a gossip exchange, memory. Two gloo processes on this
machine, one thread each.

    python benchmarks/round_cost.py

Everything that is compared is measured in one run, interleaved, in an order that changes from repetition to repetition
(the same on all ranks). A timing is the mean over the ranks, which start it together; figures are medians with the
10th and 90th percentile. The last result is `benchmarks/records/round_cost.json`; benchmarks/README.md says what each
figure means.
"""

from __future__ import annotations

import copy
import ctypes
import datetime
import gc
import json
import os
import platform
import random
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import accelerate
import torch
import torch.distributed as dist
import transformers
from torch.nn.parallel import DistributedDataParallel
from transformers import GPT2Config, GPT2LMHeadModel, HfArgumentParser, T5Config, T5ForConditionalGeneration

import slowmo_hf
from slowmo_hf import SlowMoConfig, SlowMoOptimizer, consensus, last_round

BETA = 0.5
MIB = 2**20
# Allowed beside the large tensors: the message's last element, norms, and in a look the state of the random
# generators.
SMALL_BYTES = 16384


@dataclass
class BenchmarkArguments:
    """
    Sizes and repetitions. The defaults are T5-small for rounds (60.5 M parameters, 131 tensors) and a small GPT-2 for
    steps.
    """

    repeats: int = field(default=25, metadata={"help": "Repetitions of every part of a round."})
    step_repeats: int = field(default=200, metadata={"help": "Repetitions of the local step."})
    processes: int = field(default=2, metadata={"help": "Processes, one worker each."})
    d_model: int = field(default=512, metadata={"help": "Width of the T5 that rounds are measured on."})
    layers: int = field(default=6, metadata={"help": "Its layers, in encoder and decoder each."})
    vocab_size: int = field(default=32128, metadata={"help": "Its vocabulary."})
    step_width: int = field(default=256, metadata={"help": "Width of the GPT-2 that the local step is measured on."})
    step_tokens: int = field(default=192, metadata={"help": "Tokens per local step."})
    compute_seconds: float = field(
        default=2.0,
        metadata={
            "help": "Wait that stands in for a step's computation behind OSGP's exchange; 1 Gbit/s sends the T5 in it."
        },
    )
    lean_bucket_bytes: int = field(
        default=25 * MIB, metadata={"help": "The small bucket, in bytes; the large one is the default."}
    )
    parts: list[str] = field(
        default_factory=lambda: ["step", "round", "exchange", "memory"],
        metadata={"help": "What to measure: step, round, exchange, memory."},
    )
    link: str = field(
        default="loopback", metadata={"help": "What the processes are joined by, in words, for the record."}
    )
    output: str = field(default="benchmarks/records/round_cost.json", metadata={"help": "The record."})


# ---- models and clocks ----


def round_model(args: BenchmarkArguments, dtype: torch.dtype = torch.float32) -> T5ForConditionalGeneration:
    """A T5 with random weights."""
    config = T5Config(
        d_model=args.d_model,
        d_ff=4 * args.d_model,
        num_layers=args.layers,
        vocab_size=args.vocab_size,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config).to(dtype)


def forward(model: torch.nn.Module) -> None:
    """A forward pass of a few tokens: the first one with gradients starts local training."""
    tokens = torch.ones(1, 4, dtype=torch.long)
    model(input_ids=tokens, labels=tokens)


def local_training(model: torch.nn.Module, **settings: Any) -> SlowMoOptimizer:
    """Local training of `model`, started; its inner step does nothing, for there are no gradients."""
    optimizer = SlowMoOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), SlowMoConfig(outer_momentum=BETA, **settings)
    )
    forward(model)
    return optimizer


def timed(call: Callable[[], Any]) -> float:
    """Seconds of `call`, which all ranks start together."""
    dist.barrier()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def interleaved(
    calls: dict[str, Callable[[], Any]], repeats: int, before: Callable[[], None] | None = None
) -> dict[str, list[float]]:
    """Seconds of every call in every repetition, mean over ranks. The first two repetitions are not counted."""
    order = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 2):
        if before is not None:
            before()
        for name in order.sample(sorted(calls), len(calls)):
            seconds[name].append(timed(calls[name]))
    return {name: mean_over_ranks(values[2:]) for name, values in seconds.items()}


def mean_over_ranks(values: list[float]) -> list[float]:
    """Element by element."""
    mean = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(mean)
    return [float(v) for v in mean / dist.get_world_size()]


def quantile(values: list[float], q: float) -> float:
    return float(torch.quantile(torch.tensor(values, dtype=torch.float64), q))


def milliseconds(seconds: list[float]) -> dict[str, float]:
    """n, median and spread."""
    figures = {"median_ms": 0.5, "p10_ms": 0.1, "p90_ms": 0.9}
    return {"n": len(seconds), **{name: round(1e3 * quantile(seconds, q), 3) for name, q in figures.items()}}


def ratio(
    above: list[float], below: list[float], *, at_most: float | None = None, at_least: float | None = None
) -> dict[str, Any]:
    """The ratio of two medians against its target, and the spread of the repetitions' own ratios."""
    own = [a / b for a, b in zip(above, below, strict=True)]
    value = quantile(above, 0.5) / quantile(below, 0.5)
    figures: dict[str, Any] = {
        "n": len(own),
        "ratio": round(value, 4),
        "p10": round(quantile(own, 0.1), 4),
        "p90": round(quantile(own, 0.9), 4),
    }
    if at_most is not None:
        figures |= {"target": f"<= {at_most}", "met": value <= at_most}
    if at_least is not None:
        figures |= {"target": f">= {at_least}", "met": value >= at_least}
    return figures


# ---- a local step ----


def step_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer, tokens: torch.Tensor) -> Callable[[], None]:
    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()

    return step


def measure_step(args: BenchmarkArguments) -> dict[str, Any]:
    """A local step with DDP and SlowMoOptimizer against a step with neither. Nobody waits for anybody in either."""
    config = GPT2Config(n_embd=args.step_width, n_layer=4, n_head=4, vocab_size=1024, n_positions=64, use_cache=False)
    bare = GPT2LMHeadModel(config)
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


class Parts:
    """The parts that any round has, on flat memory of its own: what a round is held against."""

    def __init__(self, params: list[torch.Tensor]) -> None:
        self.params = [p.detach().clone() for p in params]
        self.received = [torch.empty_like(p) for p in self.params]
        self.flat = torch.cat([p.view(-1) for p in self.params])
        self.anchor, self.velocity = self.flat.clone(), torch.zeros_like(self.flat)
        self.pieces = list(self.flat.split([p.numel() for p in self.params]))

    def copy_in(self) -> None:
        for piece, param in zip(self.pieces, self.params, strict=True):
            piece.copy_(param.view(-1))

    def all_reduce(self) -> None:
        dist.all_reduce(self.flat)

    def arithmetic(self) -> None:
        self.velocity.mul_(BETA).add_(self.flat)
        self.anchor.sub_(self.velocity)

    def copy_out(self) -> None:
        for piece, received in zip(self.pieces, self.received, strict=True):
            received.view(-1).copy_(piece)

    def calls(self) -> dict[str, Callable[[], None]]:
        return {name: getattr(self, name) for name in ("copy_in", "all_reduce", "arithmetic", "copy_out")}


class Textbook:
    """Lines 7 and 8 of Algorithm 1 as one would write them down, per tensor: each operation makes a new tensor."""

    def __init__(self, averages: list[torch.Tensor], inner_lr: float = 0.1) -> None:
        self.averages = [p.detach().clone() for p in averages]
        self.anchors = [p.clone() for p in self.averages]
        self.momenta = [torch.zeros_like(p) for p in self.averages]
        self.inner_lr = inner_lr

    @torch.no_grad()
    def with_temporaries(self) -> None:
        for index, average in enumerate(self.averages):
            anchor, momentum = self.anchors[index], self.momenta[index]
            momentum = BETA * momentum + (anchor - average) / self.inner_lr
            self.anchors[index] = anchor - self.inner_lr * momentum
            self.momenta[index] = momentum

    @torch.no_grad()
    def in_place(self) -> None:
        """The same in four passes without a temporary, which is how fairscale and torchdistx compute it."""
        for anchor, momentum, average in zip(self.anchors, self.momenta, self.averages, strict=True):
            momentum.mul_(BETA).sub_(average, alpha=1 / self.inner_lr).add_(anchor, alpha=1 / self.inner_lr)
            anchor.sub_(momentum, alpha=self.inner_lr)


def outer_step_of(optimizer: SlowMoOptimizer) -> Callable[[], None]:
    """The package's arithmetic alone: its outer optimizer's step on a pseudo-gradient that is already there."""
    assert optimizer.outer_loop is not None
    outer = optimizer.outer_loop.outer_optimizer
    anchors = [anchor for group in outer.param_groups for anchor in group["params"]]
    pseudo_grads = [torch.full_like(anchor, 1e-3) for anchor in anchors]

    def outer_step() -> None:
        for anchor, pseudo_grad in zip(anchors, pseudo_grads, strict=True):
            anchor.grad = pseudo_grad
        outer.step()
        for anchor in anchors:
            anchor.grad = None

    return outer_step


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


def tensor_bytes() -> int:
    """Bytes of all tensors that Python can reach, shared memory once."""
    tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor) and o.device.type == "cpu"]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def process_bytes(field: str) -> int:
    """A line of /proc/self/status in bytes: VmRSS, the resident set now, or VmHWM, its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def settle() -> None:
    """Give free memory back to the system."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


class MemoryGauge:
    """Bytes since the gauge was made: tensors, resident set, and the resident set's peak since the last reading."""

    def __init__(self) -> None:
        settle()
        self.tensors, self.resident = tensor_bytes(), process_bytes("VmRSS")
        self._reset_peak()

    def _reset_peak(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")

    def read(self) -> dict[str, int]:
        peak = process_bytes("VmHWM") - self.resident
        settle()
        figures = {
            "tensors": tensor_bytes() - self.tensors,
            "resident": process_bytes("VmRSS") - self.resident,
            "resident_peak": peak,
        }
        self._reset_peak()
        return figures


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

MEASURES: dict[str, Callable[[BenchmarkArguments], Any]] = {
    "step": measure_step,
    "round": measure_round,
    "exchange": measure_exchange,
    "memory": measure_memory,
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
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=args.processes)
    figures = measure(args)
    if rank == 0:
        Path(folder, "figures.json").write_text(json.dumps(figures))
    dist.barrier()
    dist.destroy_process_group()


def hardware() -> dict[str, Any]:
    """What ran it."""
    cpu = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": cpu[0] if cpu else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
    }


def versions() -> dict[str, str]:
    """What was run."""
    modules = {"torch": torch, "transformers": transformers, "accelerate": accelerate, "slowmo_hf": slowmo_hf}
    return {"python": platform.python_version(), **{name: str(module.__version__) for name, module in modules.items()}}


def main() -> None:
    """Start the processes, gather the figures, write the record."""
    (args,) = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses()
    load = os.getloadavg()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_worker, args=(args, folder), nprocs=args.processes)
        figures = json.loads(Path(folder, "figures.json").read_text())
    record = {
        "command": shlex.join(["python", "benchmarks/round_cost.py", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - start, 1),
        "backend": f"gloo, {args.link}",
        "threads_per_process": 1,
        "hardware": hardware(),
        "load_average_before": round(load[0], 2),
        "versions": versions(),
        "arguments": asdict(args),
        **figures,
    }
    path = Path(args.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
