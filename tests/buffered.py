"""Loops with buffers that change."""

from __future__ import annotations

import torch

from harness import patience
from slowmo_hf import SlowMoConfig, SlowMoOptimizer

SYNC_EVERY = 2


class Loop:
    """One worker's training; `lengths` are of its batches, in turn."""

    def __init__(self, rank, model, **settings):
        self.model = model
        config = SlowMoConfig(**{"sync_every": SYNC_EVERY, "timeout_seconds": patience(20)} | settings)
        self.optimizer = SlowMoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), config)
        self.draw = torch.Generator().manual_seed(rank)

    def step(self, length=5):
        self.model(torch.randn(length, 4, generator=self.draw)).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
