"""
How figures are taken here: clocks, medians and ratios against targets, bytes of memory, and what a record says of the
machine.
"""

from __future__ import annotations

import ctypes
import datetime
import gc
import os
import platform
import random
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import accelerate
import torch
import torch.distributed as dist
import transformers

import slowmo_hf

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))  # whose `records` writes those of here too

# ---- flags ----

_Arguments = TypeVar("_Arguments")


def arguments_of(kind: type[_Arguments]) -> _Arguments:
    """This program's flags, a field of a dataclass each; a wrong one ends it with one line."""

    def end(error: object) -> NoReturn:
        from records import end_program  # not in the processes that are timed: it imports much

        end_program(sys.argv[0], error)

    parser = transformers.HfArgumentParser(kind)
    parser.error = end  # argparse's own would print all flags first
    try:
        (found,) = parser.parse_args_into_dataclasses()
    except ValueError as error:
        end(error)
    return found


def check_at_least(least: float, arguments: object, *names: str) -> None:
    """
    Raises:
        ValueError: One of these is less.
    """
    for name in names:
        if getattr(arguments, name) < least:
            raise ValueError(f"{name} must be >= {least:g}, got {getattr(arguments, name)}. Set --{name}.")


# ---- clocks and ratios ----


def timed(call: Callable[[], Any], device: str = "cpu") -> float:
    """Seconds of `call`, which all ranks start together; on a CUDA device, until the device has done its work."""
    dist.barrier()
    if device == "cuda":
        return device_seconds(call)
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def device_seconds(call: Callable[[], Any]) -> float:
    """
    Seconds between two CUDA events around `call`, on an idle device: its kernels, the gaps between them, and what the
    host takes to start the first one.
    """
    torch.cuda.synchronize()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def interleaved(
    calls: dict[str, Callable[[], Any]], repeats: int, before: Callable[[], None] | None = None, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of every call in every repetition, mean over ranks. The first two repetitions are not counted."""
    order = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 2):
        if before is not None:
            before()
        for name in order.sample(sorted(calls), len(calls)):
            seconds[name].append(timed(calls[name], device))
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


# ---- memory ----


def tensor_bytes() -> int:
    """Bytes of all tensors that Python can reach, shared memory once."""
    found = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor) and o.device.type == "cpu"]
    with torch.no_grad():  # a DTensor has no storage of its own
        tensors = [t.to_local() if hasattr(t, "to_local") else t for t in found]
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


# ---- the machine ----


def origin(device: str = "cpu") -> dict[str, Any]:
    """Of a record: by which command it was made and when, on what, and of which versions."""
    program = Path(sys.argv[0]).resolve()
    return {
        "command": shlex.join(["python", f"benchmarks/{program.name}", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "hardware": hardware(device),
        "versions": versions(),
    }


def source_of(script: str, before: str | None) -> Path:
    """The folder `src` of another checkout; the program ends with one line where it holds no package."""
    if before is None or not Path(before, "slowmo_hf").is_dir():
        sys.exit(f"{script}: before must be a folder that holds slowmo_hf, got {before!r}. Set --before.")
    return Path(before).resolve()


def commit_of(source: Path) -> str:
    """Its commit, "-dirty" where its files are others; empty where git does not know it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=7"]
    try:
        return subprocess.run(command, cwd=source, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def hardware(device: str = "cpu") -> dict[str, Any]:
    """What ran it."""
    cpu = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = {
        "cpu": cpu[0] if cpu else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
    }
    return {**found, "device": device_facts(device)} if device == "cuda" else found


def device_facts(device: str) -> dict[str, Any]:
    """The device that figures are of: a CUDA device's name, memory and software, or that it is the CPU."""
    if device == "cpu":
        return {"name": "cpu"}
    found = torch.cuda.get_device_properties(0)
    return {
        "name": found.name,
        "memory_gib": round(found.total_memory / 2**30, 1),
        "multiprocessors": found.multi_processor_count,
        "capability": f"{found.major}.{found.minor}",
        "cuda": torch.version.cuda,
    }


def versions() -> dict[str, str]:
    """What was run."""
    modules = {"torch": torch, "transformers": transformers, "accelerate": accelerate, "slowmo_hf": slowmo_hf}
    return {"python": platform.python_version(), **{name: str(module.__version__) for name, module in modules.items()}}
