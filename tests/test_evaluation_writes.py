"""What forward passes write in an evaluation is no write of the program's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from slowmo_hf import SlowMoConfig, SlowMoOptimizer, run_in_process


@pytest.mark.parametrize("loads", [False, True])
def test_an_embedding_that_passes_renormalise_comes_back(loads):
    """Its table is written in evaluations too; and what the program loads there stays."""

    def work(rank):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(6, 3, max_norm=1.0), nn.Flatten(), nn.Linear(6, 1))
        optimizer = SlowMoOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), SlowMoConfig(sync_every=2))
        draw = torch.Generator().manual_seed(rank)
        for _ in range(3):
            model(torch.randint(0, 6, (4, 2), generator=draw)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        own = model[0].weight.detach().clone()
        model.eval()
        shown = model[0].weight.detach().clone()
        with torch.no_grad():
            model(torch.arange(6).view(3, 2))
            moved = not torch.equal(model[0].weight, shown)
        if loads:
            model.load_state_dict({name: value * 0 + 0.25 for name, value in model.state_dict().items()})
        model.train()
        return own, model[0].weight.detach().clone(), moved

    ranks = run_in_process(work, 2)
    for own, back, moved in ranks:
        assert moved
        assert torch.equal(back, torch.full_like(own, 0.25) if loads else own)
    assert not torch.equal(ranks[0][0], ranks[1][0])
