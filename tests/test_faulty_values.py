"""NaN on one rank, a look that fails, a rank that is slow but in time."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

import slowmo_hf
from apart import HOST
from faulty import eight_steps
from harness import patience, run_workers
from slowmo_hf import SlowMoConfig, SlowMoOptimizer
from tiny import Regression, Rows, values


def _not_a_number(rank):
    """NaN in one worker's parameters is an error on both before anything is saved from them."""
    for step, model, _ in eight_steps():
        if rank == 1 and step == 6:
            model.head.weight.data[0, 0] = float("nan")


@pytest.mark.slow
@pytest.mark.apart(_not_a_number, survivors=(0, 1))
def test_not_a_number_on_one_rank_is_the_same_error_on_both(apart):
    (first, second), _ = apart
    assert first == second
    assert first.startswith(f"ValueError: rank 1 on {HOST}, step 8: its parameters are not finite"), first


def _failed_look():
    """NaN on one rank in a look: an error on both, and both have their own weights back."""
    rank = dist.get_rank()
    model = Regression(torch.float32)
    optimizer = SlowMoOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), SlowMoConfig(sync_every=4, timeout_seconds=patience(20))
    )
    model(Rows(4, torch.float32).x, Rows(4, torch.float32).y)["loss"].backward()
    optimizer.step()
    if rank == 1:
        model.head.weight.data[0, 0] = float("nan")
    before = values(model)
    with (
        pytest.raises(ValueError, match=r"rank 1 on .* its parameters are not finite"),
        slowmo_hf.consensus(optimizer),
    ):
        pass
    after = values(model)
    return all(torch.equal(before[name].nan_to_num(7.0), after[name].nan_to_num(7.0)) for name in before)


def test_a_look_that_fails_gives_the_local_weights_back():
    assert run_workers(_failed_look, 2) == [True, True]


def _slow_but_in_time(base):
    rank = dist.get_rank()
    _train_slowly = time.sleep if rank == 1 else (lambda seconds: None)
    model = Regression(torch.float32)
    optimizer = SlowMoOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), SlowMoConfig(base=base, sync_every=2, timeout_seconds=8)
    )
    rows = Rows(4, torch.float32)
    for _step in range(2):
        model(rows.x, rows.y)["loss"].backward()
        _train_slowly(2.0)
        optimizer.step()
        optimizer.zero_grad()
    return values(model)


@pytest.mark.slow
def test_a_rank_that_is_slow_but_in_time_changes_nothing():
    first, second = run_workers(_slow_but_in_time, 2, "local_sgd")
    assert all(torch.equal(first[name], second[name]) for name in first)
