"""A loop of eight steps and a stream that cannot be read twice: what tests of faults and of unequal data share."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.utils.data import IterableDataset

from apart import TIMEOUT_SECONDS
from slowmo_hf import SlowMoConfig, SlowMoOptimizer
from tiny import Regression, Rows


def eight_steps():
    """A custom loop with rounds at 4 and 8; what each step has left is shown after it."""
    model = Regression(torch.float32)
    optimizer = SlowMoOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), SlowMoConfig(sync_every=4, timeout_seconds=TIMEOUT_SECONDS)
    )
    rows = Rows(4, torch.float32)
    for step in range(1, 9):
        model(rows.x, rows.y)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        yield step, model, optimizer


BATCHES = {0: 6, 1: 4}  # 6 batches here, 4 there


class OnePass(IterableDataset):
    """A stream sharded by hand that cannot be read twice. Accelerate takes every second batch of four rows of it."""

    def __init__(self):
        rows = Rows(48, torch.float32, seed=dist.get_rank())
        self.rows = iter([rows[index] for index in range(8 * BATCHES[dist.get_rank()])])

    def __iter__(self):
        yield from self.rows


LR = 0.1
