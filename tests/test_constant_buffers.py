"""Buffers that nobody averages: sparse ones, which must stay as they are, and those without values."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from torch import nn

from slowmo_hf import SlowMoConfig, SlowMoOptimizer, run_in_process
from tiny import Rows, error_of

WORKERS = 2


class Graph(nn.Module):
    """A graph's neighbours as a sparse buffer, in one of torch's layouts, and a buffer without values."""

    def __init__(self, layout):
        super().__init__()
        torch.manual_seed(2)
        self.linear = nn.Linear(4, 1).double()
        links = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.5], [0.0, 0.5, 0.0]], dtype=torch.float64)
        self.register_buffer("links", links.to_sparse(layout=layout) if layout else links)
        self.register_buffer("nothing", torch.ones(3, device="meta"))

    def forward(self, x):
        return self.linear(self.links @ x)


def on_a_graph(worker, layout, policy="average", change=None):
    model = Graph(layout)
    optimizer = SlowMoOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), SlowMoConfig(sync_every=2, model_buffers=policy)
    )
    said = ""
    for step in range(4):
        optimizer.zero_grad()
        model(Rows(3, seed=10 * worker + step).x).square().mean().backward()
        if step == change:
            model.links = model.links * 2
        said = said or error_of(optimizer.step)
    return said, {name: p.detach().clone() for name, p in model.named_parameters()}


LAYOUTS = [torch.sparse_coo, torch.sparse_csr]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_constant_sparse_buffer_is_left_alone(layout):
    """The same weights as with a dense one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: CSR is in beta state
        sparse = run_in_process(lambda worker: on_a_graph(worker, layout), WORKERS)
    dense = run_in_process(lambda worker: on_a_graph(worker, None), WORKERS)
    for (said, mine), (_, right) in zip(sparse, dense, strict=True):
        assert said == ""
        for name, value in right.items():
            torch.testing.assert_close(mine[name], value, rtol=0, atol=1e-12)


@pytest.mark.parametrize("policy", ["average", "local"])
def test_a_sparse_buffer_that_changes_is_told_on_every_worker(policy):
    """On one worker alone it has changed."""

    def work(worker):
        return on_a_graph(worker, torch.sparse_coo, policy, change=2 if worker else None)[0]

    first, second = run_in_process(work, WORKERS)
    assert first == second
    assert re.match(
        r"ValueError: rank 1 on .*, step 4: buffer 'links' changes in training, and has layout torch.sparse_coo", first
    )
