"""Forward passes of an evaluation: what they write is no write of the program's, and they are compiled once."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from harness import patience, run_workers
from slowmo_hf import SlowMoConfig, SlowMoOptimizer, consensus, finish, run_in_process
from tiny import equal, values


@pytest.mark.parametrize("loads", ["", "another", "and back"])
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
        if loads == "and back":
            shown = {name: value.clone() for name, value in model.state_dict().items()}
            model.load_state_dict({name: value * 2 for name, value in shown.items()})
            model.load_state_dict(shown)
        elif loads:
            model.load_state_dict({name: value * 0 + 0.25 for name, value in model.state_dict().items()})
        model.train()
        return own, model[0].weight.detach().clone(), moved

    ranks = run_in_process(work, 2)
    for own, back, moved in ranks:
        assert moved
        assert torch.equal(back, torch.full_like(own, 0.25) if loads == "another" else own)
    assert not torch.equal(ranks[0][0], ranks[1][0])


@pytest.mark.parametrize(
    "more",
    [{}, {"base": "osgp"}, {"overlap_steps": 1}, {"model_buffers": "local"}, {"shard_slow_state": True}],
    ids=str,
)
def test_a_training_pass_inside_a_view_leaves_no_trace_at_any_step(more):
    """Monte Carlo dropout, new statistics for SWA: at a round's end, where nothing is sent, as between rounds."""

    def trained(rank, looks):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), spectral_norm(nn.Linear(4, 3)))
        config = SlowMoConfig(**{"sync_every": 3, "outer_momentum": 0.5, **more})
        optimizer = SlowMoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), config)
        draw = torch.Generator().manual_seed(rank)
        for _ in range(7):
            model(torch.randn(4, 3, generator=draw)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            before = values(model)
            if looks:
                with consensus(optimizer), torch.no_grad():
                    shown = values(model)
                    model(torch.ones(4, 3).cumsum(0))
                    assert not equal(values(model), shown), "the pass moves statistics"
                assert equal(values(model), before)
        finish(optimizer)
        return values(model)

    def work(rank):
        return trained(rank, looks=True), trained(rank, looks=False)

    for watched, quiet in run_in_process(work, 2):
        assert equal(watched, quiet)


def compilations():
    """After each of ten evaluations, each inside a round."""
    warnings.filterwarnings("ignore", message=".*global hooks on modules.*")  # torch's, of the start's own hook
    count, seen = [], []

    def backend(graph, inputs):
        count.append(graph)
        return graph.forward

    bare = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1), nn.Linear(4, 1))
    model = torch.compile(bare, backend=backend)
    config = SlowMoConfig(sync_every=3, timeout_seconds=patience(20))
    optimizer = SlowMoOptimizer(torch.optim.SGD(bare.parameters(), lr=0.1), config)
    torch.manual_seed(dist.get_rank())
    for _ in range(10):
        for _ in range(4):
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            model(torch.randn(8, 4))
        model.train()
        seen.append(len(count))
    return seen


def test_evaluations_of_a_compiled_model_are_compiled_once():
    """As in a stock loop: one for training, one for evaluations. torch gives up after eight."""
    for seen in run_workers(compilations, 2):
        assert seen == [2] * 10
