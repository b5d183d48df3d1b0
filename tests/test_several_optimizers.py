"""Several optimizers in one program share one status exchange, which says whose a message is."""

from __future__ import annotations

import random
import re
import time
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist

import slowmo_hf
from harness import patience, run_workers
from slowmo_hf import SlowMoConfig, SlowMoOptimizer, run_in_process


def make(rank, sizes, **settings):
    """An optimizer with a parameter group per size."""
    torch.manual_seed(0)
    groups = [{"params": [torch.nn.Parameter(torch.randn(size))], "lr": 0.1 / (i + 1)} for i, size in enumerate(sizes)]
    config = SlowMoConfig(**{"sync_every": 2, "timeout_seconds": patience(20)} | settings)
    optimizer = SlowMoOptimizer(torch.optim.SGD(groups), config)
    draw = torch.Generator().manual_seed(100 * rank + len(sizes))

    def step():
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = torch.randn(param.shape, generator=draw)
        optimizer.step()

    return optimizer, step


def weights(optimizer):
    return [param.detach().clone() for group in optimizer.param_groups for param in group["params"]]


def train(rank, kinds, steps):
    """All of them, in turn: their weights, and what a view shows."""
    made = [make(rank, sizes, **settings) for sizes, settings in kinds]
    for _ in range(steps):
        for _, step in made:
            step()
    found = []
    for optimizer, _ in made:
        with slowmo_hf.consensus(optimizer):
            shown = weights(optimizer)
        found += [*weights(optimizer), *shown]
    return found


def in_turn_and_alone():
    kinds = [((3,), {}), ((5, 7, 2), {"overlap_steps": 1}), ((4, 4), {"base": "sgp"})]
    rank = dist.get_rank()
    alone = [value for kind in kinds for value in train(rank, [kind], 5)]
    return train(rank, kinds, 5), alone


def test_each_trains_as_it_would_alone():
    """Bit for bit, with other numbers of groups, one of them overlapped, so that its status is heard of later."""
    for together, alone in run_workers(in_turn_and_alone, 2):
        assert len(together) == 12
        assert all(torch.equal(one, other) for one, other in zip(together, alone, strict=True))


def travelling(naps):
    """Two optimizers whose rounds travel in two stages, on ranks that are fast and slow in turn."""
    rank = dist.get_rank()
    draw, made = random.Random(rank), []
    for size in (3000, 70_000):
        made.append(make(rank, (size,), sync_every=4, overlap_steps=3, compression="int8"))
    for _ in range(24):
        for _, step in made:
            step()
            time.sleep(draw.random() * naps)
    return [weights(optimizer)[0] for optimizer, _ in made]


def test_rounds_of_two_optimizers_travel_apart():
    """Second stages set out in whatever order first ones have come, on each rank by itself."""
    hurried, slow = (run_workers(travelling, 3, naps) for naps in (0.0, 0.01))
    for one, other in zip(hurried, slow, strict=True):
        assert all(torch.equal(mine, its) for mine, its in zip(one, other, strict=True))


def halves(seconds):
    """One model, a layer for each of two optimizers with these time-outs; the ends of this rank."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 1))
    configs = [SlowMoConfig(sync_every=2 + i, timeout_seconds=patience(limit)) for i, limit in enumerate(seconds)]
    optimizers = [
        SlowMoOptimizer(torch.optim.SGD(layer.parameters(), lr=0.1), config)
        for layer, config in zip(model, configs, strict=True)
    ]
    draw = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(5):
        model(torch.randn(4, 3, generator=draw)).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return torch.cat([param.detach().flatten() for param in model.parameters()])


def both_halves():
    return halves((20, 20)), halves((20, 21))


def test_optimizers_with_other_time_outs_know_each_other():
    """What one trains is no changed frozen parameter of the other's, whose round would average it."""
    for alike, unlike in run_workers(both_halves, 2):
        assert torch.equal(alike, unlike)


def test_wires_of_optimizers_that_are_gone_are_used_again():
    """Each lives until the next one has started: two wires serve however many there are."""

    def work(rank):
        held, groups = [], []
        for _ in range(6):
            optimizer, step = make(rank, (3,))
            step()
            groups.append(optimizer.outer_loop.workers.between.group)
            held[:] = [optimizer]  # the one before goes
            del optimizer, step
        return len({id(group) for group in groups})

    assert run_in_process(work, 2) == [2, 2]


def crosswise(rank, other, settings):
    """In one order at step 1, where both start; rank 1 in another at step 2, where both have a round."""
    made = [make(rank, (3,), **settings), make(rank, other, **settings)]
    try:
        for turn in range(4):
            for _, step in reversed(made) if (turn, rank) == (1, 1) else made:
                step()
    except RuntimeError as error:
        return str(error)
    return ""


def crosswise_over_gloo(other, settings):
    return crosswise(dist.get_rank(), other, settings)


@pytest.mark.parametrize("other", [(3,), (5, 5)])
@pytest.mark.parametrize("settings", [{}, {"overlap_steps": 1}])
def test_crosswise_is_told_on_every_rank(settings, other):
    for words in run_workers(crosswise_over_gloo, 2, other, settings):
        assert re.match(
            r"ranks wait for each other with different optimizers: rank 0 on \S+ at step 2 of optimizer 0 \(of "
            r"parameter 0\); rank 1 on \S+ at step 2 of optimizer 1 \(of parameter 0( and 1 more)?\). Step, evaluate",
            words,
        ), words


def two_joins():
    """Four steps of both here, one there."""
    rank = dist.get_rank()
    made = [make(rank, (3,)), make(rank, (5,))]
    try:
        with slowmo_hf.join(made[0][0]), slowmo_hf.join(made[1][0]):
            for _ in range(4 if rank else 1):
                for _, each in made:
                    each()
    except RuntimeError as error:
        return str(error)
    return ""


def test_uneven_data_of_two_optimizers_is_told_as_such():
    for words in run_workers(two_joins, 2):
        assert "A rank that has left `join`, or come to `finish`, takes part in the rounds of that one" in words


def test_crosswise_in_one_process():
    def work(rank):
        words = crosswise(rank, (5, 5), {})
        assert not words, words

    with pytest.raises(RuntimeError, match="ranks wait for each other with different optimizers"):
        run_in_process(work, 2)


@pytest.mark.parametrize("step", [4, 5, "finished", "shown"])
def test_a_new_one_says_whose_steps_it_loses(step, caplog):
    """It starts from rank 0's weights: everyone's behind a round or `finish`, and where the average is shown."""

    def work(rank):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 1)

        def made():
            return SlowMoOptimizer(
                torch.optim.SGD(model.parameters(), lr=0.1), SlowMoConfig(sync_every=4, outer_momentum=0.0)
            )

        def train(optimizer, steps):
            for at in range(steps):
                model(torch.full((2, 3), rank + at + 1.0)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()

        first = made()
        train(first, step if isinstance(step, int) else 5)
        if step == "finished":
            slowmo_hf.finish(first)
        with slowmo_hf.consensus(first) if step == "shown" else nullcontext():
            second = made()
            train(second, 1)

    run_in_process(work, 2)
    told = [record.getMessage() for record in caplog.records if "another SlowMoOptimizer" in record.getMessage()]
    words = (
        "has trained 2 of these parameters for 1 steps since its last round, each worker on its own: this start has"
    )
    assert [words in line for line in told] == ([True] if step == 5 else [])
