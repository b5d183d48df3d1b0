"""A state that lacks something of this worker's, or of the slow state: it is said where it is saved or loaded."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from slowmo_hf import SlowMoConfig, SlowMoOptimizer, run_in_process

TAU = 3


def new(make=torch.optim.Adam, **settings):
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1)
    config = SlowMoConfig(sync_every=TAU, outer_momentum=0.5, **settings)
    return model, SlowMoOptimizer(make(model.parameters(), lr=0.1), config)


def train(model, optimizer, worker, steps=TAU):
    for step in range(steps):
        torch.manual_seed(100 * worker + step)
        (10**worker * model(torch.randn(4, 2)).square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()


def resumed(taken_from, make=torch.optim.Adam, **settings):
    """Both workers after a resume: one round, a save by each, a load of what `taken_from` says."""
    states = {}

    def save(worker):
        model, optimizer = new(make, **settings)
        train(model, optimizer, worker)
        states[worker] = copy.deepcopy(optimizer.state_dict())

    def load(worker):
        model, optimizer = new(make, **settings)
        optimizer.load_state_dict(copy.deepcopy(states[taken_from(worker)]))
        train(model, optimizer, worker)
        return model.weight.detach().clone()

    run_in_process(save, 2)
    return run_in_process(load, 2)


def told(caplog):
    return [line for line in caplog.messages if "own inner state" in line]


@pytest.mark.parametrize(("worker", "other"), [(0, 1), (1, 0)])
def test_one_workers_adam_for_all_is_told_once(caplog, worker, other):
    resumed(lambda _: worker)
    (line,) = told(caplog)
    assert f"that worker {other} loads is worker {worker}'s" in line
    assert "accelerator.save_state" in line


def test_a_file_per_rank_is_the_run_that_was_never_stopped(caplog):
    found = resumed(lambda worker: worker)

    def never_stopped(worker):
        model, optimizer = new()
        train(model, optimizer, worker)
        train(model, optimizer, worker)
        return model.weight.detach().clone()

    for one, other in zip(found, run_in_process(never_stopped, 2), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert not told(caplog)


def test_workers_that_had_no_state_of_their_own_are_not_told(caplog):
    """Of plain SGD nobody has any; and one worker's state is gone on with by two."""
    resumed(lambda _: 0, make=torch.optim.SGD)
    model, optimizer = new()
    train(model, optimizer, 0)
    alone = copy.deepcopy(optimizer.state_dict())

    def load(worker):
        model, optimizer = new()
        optimizer.load_state_dict(copy.deepcopy(alone))
        train(model, optimizer, worker)

    run_in_process(load, 2)
    assert not told(caplog)


def test_state_that_a_round_resets_is_anybodys(caplog):
    """Or averages; SGD's momentum is reset by default."""
    found = [
        resumed(lambda _: 0, make=lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9)),
        resumed(lambda worker: worker, make=lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9)),
    ]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    resumed(lambda _: 0, inner_state="average")
    assert not told(caplog)


def test_what_torchs_distributed_checkpoint_drops_is_told(caplog):
    def work(worker):
        model, optimizer = new()
        get_optimizer_state_dict(model, optimizer)  # nothing is there yet
        assert not caplog.messages
        train(model, optimizer, worker)
        kept = sorted(get_optimizer_state_dict(model, optimizer))
        return kept, sorted(get_optimizer_state_dict(model, optimizer))

    for kept in run_in_process(work, 1):
        assert kept == 2 * (["param_groups", "state"],)
    (line,) = (line for line in caplog.messages if "torch.distributed.checkpoint" in line)  # once, of two saves
    assert "the slow state (anchors, slow momentum) and the clock are not saved" in line
