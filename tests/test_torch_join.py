"""torch's Join is refused where it would couple workers, and works where it does not."""

from __future__ import annotations

import tempfile
import time

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed.algorithms.join import Join
from transformers import Trainer

import slowmo_hf
from harness import patience, run_workers
from slowmo_hf import SlowMoCallback, SlowMoConfig, SlowMoOptimizer
from tiny import Regression, Rows, arguments, equal, error_of, values

CONFIG = SlowMoConfig(sync_every=2, timeout_seconds=patience(60))
SGD = torch.optim.SGD


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def joined(case):
    """What Join says, how long it took, and the sums of two workers' weights where it says nothing."""
    accelerator, bare, rows = Accelerator(cpu=True), Regression(), Rows(64)
    base = "all_reduce" if case in ("stock", "momentum") else "sgp" if case == "gossip" else "local_sgd"
    config = SlowMoConfig(
        base=base, sync_every=4, outer_momentum=0.0 if case == "stock" else 0.5, timeout_seconds=patience(20)
    )
    model, optimizer = accelerator.prepare(bare, SlowMoOptimizer(SGD(bare.parameters(), lr=0.1), config))

    def step(number):
        accelerator.backward(model(rows.x[number : number + 4], rows.y[number : number + 4])["loss"])
        optimizer.step()
        optimizer.zero_grad()

    def uneven(enable=True):
        with model.join() if case == "DDP's own" else Join([model], enable=enable):
            for number in range(6 if rank() == 0 or not enable else 0 if case == "no rows here" else 3):
                step(number + 8 * rank())

    if case in ("after the start", "DDP's own", "momentum", "finished"):
        step(0)
    if case == "closed":
        with Join([model]), torch.no_grad():
            model(rows.x, rows.y)
    if case == "finished":
        slowmo_hf.finish(optimizer)
        with Join([model]), torch.no_grad():
            for _ in range(3 + rank()):
                model(rows.x, rows.y)
        said = []
        for number in range(6 + rank()):  # the Join that was left sends no more: workers may be uneven
            step(number)
        said.append(error_of(uneven))
        with slowmo_hf.join(optimizer):
            pass
        said.append(accelerator.gather(torch.tensor([rank() + 1.0])).tolist())
        return said, values(bare)
    began = time.monotonic()
    error = error_of(uneven, enable=False) if case == "switched off" else "" if case == "closed" else error_of(uneven)
    if case == "closed":
        with slowmo_hf.join(optimizer):
            for number in range(5 + 2 * rank()):
                step(number)
        error = accelerator.gather(torch.tensor([rank() + 1.0])).tolist()
    return error, time.monotonic() - began, values(bare)


@pytest.mark.parametrize("case", ["before the start", "after the start", "DDP's own", "gossip", "momentum"])
def test_join_is_refused_on_every_rank(case):
    (first, seconds, _), (second, _, _) = run_workers(joined, 2, case)
    assert first == second
    base = {"gossip": "sgp", "momentum": "all_reduce"}.get(case, "local_sgd")
    assert first.startswith(
        f"ValueError: torch's Join (accelerator.join_uneven_inputs) cannot be used with base='{base}'"
    )
    way_out = "Use `with slowmo_hf.join(optimizer):`" if base == "local_sgd" else "equally many batches"
    assert way_out in first
    assert seconds < patience(5)


def test_a_rank_without_rows_in_join_makes_nobody_wait():
    with pytest.raises(AssertionError, match=r"rank 0:[\s\S]*torch's Join"):
        run_workers(joined_and_raised, 2, time_limit_seconds=15)


def joined_and_raised():
    error = joined("no rows here")[0]
    if error:
        raise RuntimeError(error)


@pytest.mark.parametrize("case", ["stock", "switched off"])
def test_join_that_couples_nothing_of_ours_works(case):
    """Plain all-reduce is stock training; `enable=False` (accelerate's with even batches) does nothing."""
    (first, _, mine), (second, _, others) = run_workers(joined, 2, case)
    assert (first, second) == ("", "")
    assert equal(mine, others) == (case == "stock")


def test_a_join_that_was_left_couples_nobody():
    """What it sends at every forward pass, more on the worker with more rows, would be in the way of a gather."""
    (gathered, _, mine), (gathered_there, _, others) = run_workers(joined, 2, "closed")
    assert gathered == gathered_there == [1.0, 2.0]
    assert not equal(mine, others)
    (said, mine), (said_there, others) = run_workers(joined, 2, "finished")
    assert said == said_there
    assert "slowmo_hf.join" in said[0]
    assert said[1] == [1.0, 2.0]


def trained_twice():
    """A Trainer's wrapper is given back, so Join works behind it: two passes here, three there."""
    trainer = Trainer(
        Regression(torch.float32),
        arguments(tempfile.mkdtemp(), max_steps=4),
        train_dataset=Rows(32, torch.float32),
        callbacks=[SlowMoCallback(CONFIG)],
    )
    trainer.train()
    rows, model, passes = Rows(4, torch.float32), trainer.model_wrapped, 0
    with Join([model]):
        for _ in range(2 + rank()):
            model(rows.x, rows.y)["loss"].backward()
            passes += 1
    return passes


def test_join_works_behind_a_trainers_end():
    assert run_workers(trained_twice, 2) == [2, 3]
