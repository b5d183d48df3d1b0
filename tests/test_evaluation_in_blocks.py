"""`model.eval()` inside a `consensus` block holds on behind it, as if it had been called there."""

from __future__ import annotations

import contextlib
import logging

import pytest
import torch
from torch import nn

import slowmo_hf
from accelerate_loops import linear, on_all_ranks, train_on, weights
from harness import run_workers
from slowmo_hf import SlowMoConfig, SlowMoOptimizer, run_in_process
from test_evaluation import Loop, same
from tiny import Heard

WORDS = "model.eval() was called inside a consensus block"


def inside_a_round(rank, **settings):
    """A run behind its first round and a backward pass; its own weights, the last round's model and the average."""
    loop = Loop(rank, **settings)
    for step in range(6):
        torch.manual_seed(step)
        loop.step()
    loop.optimizer.zero_grad()
    loop.model(torch.ones(2, 4, dtype=torch.float64)).sum().backward()
    own = loop.state()
    loop.model.eval()
    last_round = loop.state()
    loop.model.train()
    with slowmo_hf.consensus(loop.optimizer):
        average = loop.state()
    return loop, own, last_round, average


def plain(loop, average):
    with slowmo_hf.consensus(loop.optimizer):
        loop.model.eval()
        assert same(loop.state(), average)


def nested(loop, average):
    with slowmo_hf.consensus(loop.optimizer):
        with slowmo_hf.consensus(loop.optimizer):
            loop.model.eval()
        assert same(loop.state(), average)


def left_by_an_error(loop, average):
    with contextlib.suppress(KeyError), slowmo_hf.consensus(loop.optimizer):
        loop.model.eval()
        raise KeyError


def before_and_inside(loop, average):
    loop.model.eval()
    plain(loop, average)


def behind_a_train(loop, average):
    loop.model.eval()
    with slowmo_hf.consensus(loop.optimizer):
        loop.model.train()
        loop.model.eval()


def two_blocks(loop, average):
    plain(loop, average)
    with slowmo_hf.consensus(loop.optimizer):
        assert same(loop.state(), average)


def with_gradients_inside(loop, average):
    """An evaluation that forgets torch.no_grad() is none of training there."""
    with slowmo_hf.consensus(loop.optimizer):
        loop.model.eval()
        loop.model(torch.ones(2, 4, dtype=torch.float64)).sum().backward()
    loop.optimizer.zero_grad()


BLOCKS = [plain, nested, left_by_an_error, before_and_inside, behind_a_train, two_blocks, with_gradients_inside]


@pytest.mark.parametrize("back", ["train", "pass", "step"])
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.__name__)
def test_behind_the_block_the_last_rounds_model_is_shown(block, back):
    """On all workers, without a message, until training goes on; it goes on from the own weights."""

    def work(rank):
        loop, own, last_round, average = inside_a_round(rank)
        block(loop, average)
        assert same(loop.state(), last_round)
        with torch.no_grad():
            loop.model(torch.ones(2, 4, dtype=torch.float64))
        assert same(loop.state(), last_round)
        assert not same(last_round, own)
        assert not same(last_round, average)
        if back == "train":
            loop.model.train()
        elif back == "pass":
            loop.model(torch.ones(2, 4, dtype=torch.float64))
        else:
            loop.optimizer.param_groups[0]["lr"] = 0.0
            loop.optimizer.step()
        assert same(loop.state(), own)
        return last_round, loop.optimizer.outer_loop.workers.bytes_sent

    (shown, sent), (theirs, _) = run_in_process(work, 2)
    assert same(shown, theirs)
    if block is plain:
        assert sent == run_in_process(bytes_of_one_block, 2)[0]


def bytes_of_one_block(rank):
    loop, *_ = inside_a_round(rank)
    with slowmo_hf.consensus(loop.optimizer):
        pass
    return loop.optimizer.outer_loop.workers.bytes_sent


@pytest.mark.parametrize("before", [False, True])
def test_a_train_inside_brings_own_weights_behind_it(before):
    """Also where `model.eval()` was called before the block; and a submodule's eval() asks for nothing."""

    def work(rank):
        loop, own, _, average = inside_a_round(rank)
        if before:
            loop.model.eval()
        with slowmo_hf.consensus(loop.optimizer):
            loop.model.eval()
            loop.model.train()
            loop.model[1].eval()
            assert same(loop.state(), average)
        assert same(loop.state(), own)
        with slowmo_hf.consensus(loop.optimizer):
            pass
        assert same(loop.state(), own)
        return True

    assert run_in_process(work, 2) == [True, True]


@pytest.mark.parametrize("where", ["behind", "inside"])
def test_a_finish_leaves_the_average(where):
    def work(rank):
        loop, _, _, average = inside_a_round(rank)
        with slowmo_hf.consensus(loop.optimizer):
            loop.model.eval()
            if where == "inside":
                slowmo_hf.finish(loop.optimizer)
                with slowmo_hf.consensus(loop.optimizer):
                    loop.model.eval()
        slowmo_hf.finish(loop.optimizer)
        assert same(loop.state(), average)
        loop.model.train()
        assert same(loop.state(), average)
        return True

    assert run_in_process(work, 2) == [True, True]


def test_what_is_loaded_inside_goes_with_the_block():
    """As ever; and it is no longer taken for weights that the program has chosen."""

    def work(rank):
        loop, own, last_round, average = inside_a_round(rank)
        with slowmo_hf.consensus(loop.optimizer):
            loop.model.load_state_dict({name: value * 0 for name, value in average.items()})
        assert same(loop.state(), own)
        loop.model.eval()
        assert same(loop.state(), last_round)
        return True

    assert run_in_process(work, 2) == [True, True]


def test_of_two_optimizers_each_shows_its_own():
    """Two parts of one model, in the blocks of both and of one; and another model that is not evaluated."""

    def work(rank):
        torch.manual_seed(0)
        model, other = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1)).double(), nn.Linear(3, 1).double()
        config = SlowMoConfig(sync_every=2, outer_momentum=0.0)
        one, two, third = (SlowMoOptimizer(torch.optim.SGD(m.parameters(), lr=0.1), config) for m in (*model, other))
        draw = torch.Generator().manual_seed(rank)
        for _ in range(3):
            rows = torch.randn(4, 3, generator=draw, dtype=torch.float64)
            (model(rows).square().mean() + other(rows).square().mean()).backward()
            for optimizer in (one, two, third):
                optimizer.step()
                optimizer.zero_grad()
        own, others = weights(model), weights(other)
        model.eval()
        last_round = weights(model)
        model.train()
        with slowmo_hf.consensus(one), slowmo_hf.consensus(two), slowmo_hf.consensus(third):
            model.eval()
        found = [weights(model)]
        model.train()
        with slowmo_hf.consensus(one):
            model.eval()
        found.append(weights(model))
        model.train()
        assert torch.equal(weights(model), own)
        assert torch.equal(weights(other), others)
        assert all(torch.equal(each, last_round) for each in found)
        return last_round, own

    (shown, own), (theirs, _) = run_in_process(work, 2)
    assert torch.equal(shown, theirs)
    assert not torch.equal(shown, own)


@pytest.mark.parametrize("settings", [{"shard_slow_state": True}, {"base": "sgp", "exact_average": False}])
@pytest.mark.parametrize("back", [True, False])
def test_where_a_worker_has_not_the_anchors_the_next_evaluation_is_told(settings, back, caplog):
    """The way out that `model.eval()` names stays one: the block ends without an error, and own weights are back."""

    def work(rank):
        loop = Loop(rank, **settings)
        for _ in range(5):
            loop.step()
        own = loop.state()
        for _ in range(2):
            with slowmo_hf.consensus(loop.optimizer), torch.no_grad():
                loop.model.eval()
                loop.model(torch.ones(2, 4, dtype=torch.float64))
            if back:
                loop.model.train()
            with torch.no_grad():
                nn.Linear(4, 1, dtype=torch.float64)(torch.ones(2, 4, dtype=torch.float64))
                if not back:
                    loop.model(torch.ones(2, 4, dtype=torch.float64))
            assert same(loop.state(), own)
        loop.step()
        return True

    with caplog.at_level(logging.WARNING, logger="slowmo_hf"):
        assert run_in_process(work, 2) == [True, True]
    told = [line for line in caplog.messages if WORDS in line]
    assert len(told) == (not back)
    assert all(f"{list(settings)[-1]}=" in line and "Evaluate inside `with slowmo_hf.con" in line for line in told)


def under_accelerate():
    """DDP's wrapper, before the first round and behind it; rank 0 alone goes on evaluating."""
    accelerator, bare, optimizer = linear()
    model, optimizer = accelerator.prepare(bare, optimizer)
    found = []
    with Heard() as heard:
        for steps in (range(2), range(2, 4), range(4, 6)):
            model.train()
            own = train_on(accelerator, model, optimizer, steps).clone()
            with slowmo_hf.consensus(optimizer):
                model.eval()
                average = weights(bare).clone()
            shown = weights(bare).clone()
            if accelerator.is_main_process:
                with torch.no_grad():
                    model.module(torch.ones(2, 4))
            found.append((own, average, shown, torch.equal(*on_all_ranks(shown))))
    return found, len(heard.about("model.eval() before the first round")), optimizer.optimizer.outer_loop.rounds


def test_a_loop_under_accelerate():
    for rank, (found, warnings, rounds) in enumerate(run_workers(under_accelerate, 2)):
        (own, average, shown, agree), at_round, inside = found
        assert torch.equal(shown, own)
        assert not agree
        assert not torch.equal(own, average)
        assert warnings == (rank == 0)
        assert rounds == 1
        assert all(torch.equal(value, at_round[0]) for value in at_round[1:3])
        assert torch.equal(inside[2], at_round[0])
        assert inside[3]
        assert not torch.equal(inside[0], inside[2])
