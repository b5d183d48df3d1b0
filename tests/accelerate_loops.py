"""What loops under Accelerate share."""

from __future__ import annotations

import torch
import torch.distributed as dist

from harness import patience
from slowmo_hf import SlowMoConfig


def settings(**fields):
    return SlowMoConfig(**{"sync_every": 4, **fields}, timeout_seconds=patience(20))


def on_all_ranks(value):
    """One tensor of every rank."""
    found = [torch.zeros_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(found, value.contiguous())
    return found


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])
