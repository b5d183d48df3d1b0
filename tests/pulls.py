"""Workers that each pull one weight towards a value of their own."""

from __future__ import annotations

import torch

from slowmo_hf import SlowMoOptimizer

PULLS = torch.linspace(-1, 1, 16).double()


def pulled(config, rank, workers, steps, lr=0.1):
    """A quadratic per worker in one number; every worker pulls to a place of its own."""
    weight = torch.nn.Parameter(torch.full((1,), 2.0, dtype=torch.float64))
    optimizer = SlowMoOptimizer(torch.optim.SGD([weight], lr=lr), config)
    after = []
    for _ in range(steps):
        weight.grad = weight.detach() - PULLS[rank]
        optimizer.step()
        after.append(weight.detach().clone())
    return torch.stack(after)
