"""Bytes of memory that a run takes on a device, for tests on each."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch

from measuring import tensor_bytes
from slowmo_hf import consensus, last_round


def allocated(device: str) -> int:
    """Bytes of tensors on a device; on the CPU of those that Python can reach, shared memory once."""
    gc.collect()
    if device == "cuda":
        return torch.cuda.memory_allocated()
    return tensor_bytes()


def peak(device: str, call: Callable[[], Any]) -> int | None:
    """Bytes that `call` takes at its peak beyond what is there before; None on the CPU."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = allocated(device)
    call()
    return torch.cuda.max_memory_allocated() - before if device == "cuda" else None


def taken(device: str, before: int, start: Callable[[], Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """
    Beyond `before`, which has the gradients: what a run with rounds every 2 steps keeps between rounds, and what a
    round and a look take at their peaks. `start` makes anchors, velocity and buckets.
    """
    start()
    kept = allocated(device) - before
    optimizer.step()
    at_round = peak(device, optimizer.step)
    optimizer.step()  # takes in what was overlapped
    assert last_round(optimizer).round == 1

    def look() -> None:
        with consensus(optimizer):
            pass

    return {"kept": kept, "round": at_round, "look": peak(device, look)}
