"""
The problem of the tests of SlowMoOptimizer: loss ½ ||w - target||², so that the gradient is w - target and a run can
be followed by hand.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch.optim import SGD

from harness import patience
from slowmo_hf import SlowMoConfig, SlowMoOptimizer

START = (1.0, -2.0, 3.0)
NEVER = 10**6


class Tracker(torch.nn.Module):
    def __init__(self, dtype=torch.float64, start=START):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(start, dtype=dtype))

    def forward(self, target):
        return 0.5 * ((self.w - target.to(self.w.dtype)) ** 2).sum()


def target(rank, step):
    return torch.tensor(
        [math.sin(3.0 * rank + step), math.cos(rank - 2.0 * step), rank + 0.1 * step], dtype=torch.float64
    )


def pull(x, rank, step):
    return x - target(rank, step)


def simulate(steps, *, world=2, lr=0.1, tau=2, alpha=1.0, beta=0.5, gradient=pull, skipped=()):
    """
    Algorithm 1 by hand with SGD inside: x_r <- x_r - lr g_r; every tau steps v <- beta r v + (a - mean x), x_r = a <-
    a - alpha v. r is of the rounds' mean rates.
    """
    anchor, velocity, previous_lr = torch.tensor(START, dtype=torch.float64), 0.0, None
    x, of_round = [anchor] * world, []
    for step in range(steps):
        now = lr(step) if callable(lr) else lr
        of_round.append(now)
        x = [x[r] if (r, step) in skipped else x[r] - now * gradient(x[r], r, step) for r in range(world)]
        if (step + 1) % tau == 0:
            mean, of_round = sum(of_round) / tau, []
            velocity = beta * (mean / previous_lr if previous_lr else 1.0) * velocity + anchor - sum(x) / world
            anchor, previous_lr = anchor - alpha * velocity, mean
            x = [anchor] * world
    return x


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def new_accelerator(**settings):
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    return Accelerator(cpu=True, **settings)


def prepared(config, make=lambda params: SGD(params, lr=0.1), dtype=torch.float64, **settings):
    accelerator = new_accelerator(**settings)
    model = Tracker(dtype)
    model, optimizer = accelerator.prepare(model, SlowMoOptimizer(make(model.parameters()), config))
    return accelerator, model, optimizer


def weights(model):
    return getattr(model, "module", model).w.detach().clone()


def train(model, optimizer, steps, first=0, scheduler=None):
    for step in range(first, first + steps):
        optimizer.zero_grad()
        model(target(rank(), step)).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def tau(n, **settings):
    return SlowMoConfig(sync_every=n, timeout_seconds=patience(20), **settings)


def close(left, right, tolerance=1e-12):
    torch.testing.assert_close(left.double(), right.double(), rtol=tolerance, atol=tolerance)


def bitwise(left, right):
    torch.testing.assert_close(left, right, rtol=0, atol=0)


def mean_over_ranks(tensor):
    total = tensor.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()
