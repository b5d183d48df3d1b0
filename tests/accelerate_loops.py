"""What loops under Accelerate share."""

from __future__ import annotations

import torch
import torch.distributed as dist
from accelerate import Accelerator

from harness import patience
from slowmo_hf import SlowMoConfig, SlowMoOptimizer


def settings(**fields):
    return SlowMoConfig(**{"sync_every": 4, **fields}, timeout_seconds=patience(20))


def on_all_ranks(value):
    """One tensor of every rank."""
    found = [torch.zeros_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(found, value.contiguous())
    return found


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def linear(make=torch.optim.SGD, ours=True, **fields):
    """(accelerator, model, optimizer), not prepared: a linear layer, by a stock optimizer or by ours around it."""
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    optimizer = make(model.parameters(), lr=0.1)
    return accelerator, model, SlowMoOptimizer(optimizer, settings(**fields)) if ours else optimizer


def train_on(accelerator, model, optimizer, steps):
    """The weights after these steps, each worker's of its own data."""
    for step in steps:
        torch.manual_seed(100 * step + accelerator.process_index)
        batch = torch.randn(8, 4).to(next(model.parameters()).dtype)
        accelerator.backward(model(batch).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    return weights(model)
