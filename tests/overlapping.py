"""What tests of overlapped rounds share."""

from __future__ import annotations

import torch

import slowmo_hf
from slowmo_hf import SlowMoOptimizer
from tiny import Regression, Rows, two_groups, values, warmup_and_decay

STEPS = 14
LR = 0.05
HOW = {"plain": {}, "int8": {"compression": "int8"}, "sharded": {"shard_slow_state": True}}


def rows_of(step, rank):
    start = 16 * step + 4 * rank
    return slice(start, start + 4)


def train(config, name, rank):
    """Parameters after every step, and what a look shows after every second one."""
    model, rows = Regression(), Rows(STEPS * 16)
    optimizer = SlowMoOptimizer(two_groups(model, name, LR), config)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer.inner_optimizer, warmup_and_decay)
    after, shown, reports = [], {}, []
    for step in range(STEPS):
        batch = rows_of(step, rank)
        model(rows.x[batch], rows.y[batch])["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        after.append(values(model))
        if step % 2:
            with slowmo_hf.consensus(optimizer):
                shown[step] = values(model)
        reports.append(slowmo_hf.last_round(optimizer))
    return after, shown, reports


class Still(torch.nn.Module):
    """One weight, and a buffer that is changed from outside."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((4,), 8.0, dtype=torch.float64))
        self.register_buffer("seen", torch.zeros(1, dtype=torch.float64))
        self.register_buffer("count", torch.zeros(1, dtype=torch.int64))

    def forward(self, target):
        return (self.weight - target).square().sum() / 2


def looks(model, optimizer):
    with slowmo_hf.consensus(optimizer):
        pass
