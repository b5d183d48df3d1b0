"""
The documented bytes of memory (README.md, docs/wire.md), counted on the device: between rounds on any, at the peak of
a round and of a look on a CUDA device.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from devices import BACKENDS, CUDA, take
from harness import patience, run_workers
from memory import allocated, taken
from slowmo_hf import SlowMoConfig, SlowMoOptimizer

WIDTHS = {"cpu": 128, "cuda": 1024}
BUCKET_BYTES = {"cpu": 2**16, "cuda": 2**20}

# By case: workers, settings, and what lies on the device between rounds: in copies of the fp32 parameters, and beside
# them messages and sums of two buckets, in `bucket_bytes`. A bucket is half of that; of overlapped rounds all of it.
CODES = 2 * (1 + 4 / 256) / 4  # int8 messages to and from all, with a scale for every 256 elements
CASES = {
    "plain": (1, {}, 4 / 4 + 4 / 4, 1),
    "plain, stash on the cpu": (1, {"stash_device": "cpu"}, 4 / 4 + 4 / 4, 1),
    "overlapped": (1, {"overlap_steps": 1}, 2 + 1 + 1, 0),  # x_i at step k, and all messages at once
    "sharded alone, on the cpu": (1, {"shard_slow_state": True, "slow_state_device": "cpu"}, 0, 4 / 5),
    "int8": (2, {"compression": "int8"}, 2 + 1 + 1 / 2, 1 + 1 / 2),  # a worker's residual and a shard owner's
    "bf16": (2, {"compression": "bf16"}, 2 + 1 + 1 / 2, 1 + 1),
    "overlapped int8": (2, {"compression": "int8", "overlap_steps": 1}, 2 + 1 + 1 + 1 / 2 + CODES, 2),
    "sharded": (2, {"shard_slow_state": True}, 2 / 2, 4 / 5),
    "sharded, on the cpu": (2, {"shard_slow_state": True, "slow_state_device": "cpu"}, 0, 4 / 5),
}


def memory_of(device, settings):
    take(device)
    width, bucket_bytes = WIDTHS[device], BUCKET_BYTES[device]
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(8))).to(device)
    batch = torch.randn(4, width, device=device)
    model(batch).square().mean().backward()  # gradients and cuBLAS's own workspaces are there from here on
    before = allocated(device)
    config = SlowMoConfig(
        sync_every=2, outer_momentum=0.5, bucket_bytes=bucket_bytes, timeout_seconds=patience(60), **settings
    )
    optimizer = SlowMoOptimizer(torch.optim.SGD(model.parameters(), lr=1e-3), config)
    found = taken(device, before, lambda: model(batch), optimizer)
    payload = sum(p.numel() * p.element_size() for p in model.parameters())
    states = [item.flat for item in optimizer.outer_loop.parts.slow.anchors] + (
        optimizer.outer_loop.parts.slow.update.velocities
    )
    return {
        **found,
        "payload": payload,
        "pinned": {state.is_pinned() for state in states if state.device.type == "cpu"},
    }


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_memory_is_as_documented(device, name):
    """What is small takes less than 16 kB; on CUDA, where each tensor is rounded up, the bound is a loose one."""
    workers, settings, copies, messages = CASES[name]
    on_cpu = settings.get("slow_state_device") == "cpu"
    if device == "cpu" and on_cpu:
        copies = 2 / workers  # one place
    slack = 4 * BUCKET_BYTES[device] + 2**16 + (2**20 if device == "cuda" else 0)
    for sizes in run_workers(memory_of, workers, device, settings, backend=BACKENDS[device]):
        payload = sizes["payload"]
        assert copies * payload <= sizes["kept"] <= copies * payload + slack, sizes
        if device == "cpu":
            assert abs(sizes["kept"] - copies * payload - messages * BUCKET_BYTES[device]) < 2**14, sizes
        if device == "cuda":
            stash = payload if settings.get("stash_device") != "cpu" else 0
            assert sizes["round"] <= slack, sizes
            assert stash <= sizes["look"] <= stash + slack, sizes
            assert sizes["pinned"] == ({True} if on_cpu else set()), "main memory beside a card is pinned"
