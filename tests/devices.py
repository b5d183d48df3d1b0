"""Tests that run on each device: on the CPU everywhere, on a CUDA device (marked `cuda`) where there is one."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist

# Several ranks share one card over gloo, whose messages go through main memory; NCCL refuses two ranks on one card.
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:gloo"}
CUDA = pytest.param("cuda", marks=pytest.mark.cuda)

on_each_device = pytest.mark.parametrize("device", ["cpu", CUDA])


def take(device: str) -> None:
    """In a worker process, before all else: every rank is on the first card, and what it computes can be repeated."""
    if device == "cpu":
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")
    os.environ["CUDA_VISIBLE_DEVICES"] = visible[0]  # of several cards Trainer would use all
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS reads it once; without it deterministic mode raises
    torch.cuda.set_device(0)
    if dist.is_initialized():
        os.environ["LOCAL_RANK"] = "0"  # accelerate chooses the card by it


def rank() -> int:
    """0 without `torch.distributed`."""
    return dist.get_rank() if dist.is_initialized() else 0


def join_alone(device: str, folder: str, backend: str | None = None) -> None:
    """
    Make a process group of this process alone, which the harness does not: NCCL on a card, gloo on the CPU, or another
    backend.
    """
    card = {"device_id": torch.device("cuda", 0)} if device == "cuda" else {}
    backend = backend or ("nccl" if device == "cuda" else "gloo")
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1, **card)
