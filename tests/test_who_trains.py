"""One DDP model and several optimizers, of ours and stock ones: who averages gradients, and who is told."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator

import slowmo_hf
from accelerate_loops import linear, on_all_ranks, settings, train_on, weights
from harness import run_workers
from slowmo_hf import SlowMoOptimizer
from tiny import Heard, error_of


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def finished():
    """(accelerator, prepared model, optimizer) behind five steps of local training, which has ended."""
    accelerator, model, optimizer = linear(outer_momentum=0.0, sync_every=50)
    model, optimizer = accelerator.prepare(model, optimizer)
    train_on(accelerator, model, optimizer, range(5))
    slowmo_hf.finish(optimizer)
    return accelerator, model, optimizer


def by_stock(accelerator, model, steps):
    """What DDP trains from these weights, in a wrapper of its own, with a stock optimizer."""
    twin = accelerator.prepare_model(copy.deepcopy(accelerator.unwrap_model(model)))
    return train_on(accelerator, twin, sgd(twin), steps)


def alone(accelerator, model, steps):
    """What this worker trains from these weights with nobody."""
    twin = copy.deepcopy(accelerator.unwrap_model(model))
    return train_on(accelerator, twin, sgd(twin), steps)


def behind_finish():
    """A stock optimizer; one of ours that averages at every step; and ours itself, twice."""
    found = {}
    accelerator, model, _kept = finished()
    expected = by_stock(accelerator, model, range(5, 9))
    found["stock"] = train_on(accelerator, model, accelerator.prepare(sgd(model)), range(5, 9)), expected

    accelerator, model, _kept = finished()
    expected = by_stock(accelerator, model, range(5, 9))
    every_step = accelerator.prepare(SlowMoOptimizer(sgd(model), settings(base="all_reduce", outer_momentum=0.0)))
    found["all_reduce"] = train_on(accelerator, model, every_step, range(5, 9)), expected

    accelerator, model, optimizer = finished()
    expected = alone(accelerator, model, range(5, 8))
    found["ours"] = train_on(accelerator, model, optimizer, range(5, 8)), expected
    slowmo_hf.finish(optimizer)
    expected = alone(accelerator, model, range(8, 10))
    found["ours, once more"] = train_on(accelerator, model, optimizer, range(8, 10)), expected
    return found


def test_behind_finish_gradients_are_averaged_for_who_wants_it():
    for found in run_workers(behind_finish, 2):
        for name, (trained, expected) in found.items():
            assert torch.equal(trained, expected), name


def accumulated(base, evaluates):
    """
    Two steps of two micro-batches each behind `finish`: by stock DDP in a wrapper of its own, and in ours, whose first
    pass is inside `no_sync()`.
    """
    accelerator, model, _kept = finished()
    if evaluates:
        with torch.no_grad():
            model(torch.ones(1, 4))
    accelerator.gradient_accumulation_steps = 2
    twin = accelerator.prepare_model(copy.deepcopy(accelerator.unwrap_model(model)))
    inner = sgd(model)
    ours = SlowMoOptimizer(inner, settings(base=base, outer_momentum=0.0)) if base else inner
    ends = []
    for trained, optimizer in ((twin, accelerator.prepare(sgd(twin))), (model, accelerator.prepare(ours))):
        accelerator.step = 0
        for micro in range(4):
            torch.manual_seed(10 * micro + accelerator.process_index)
            with accelerator.accumulate(trained):
                accelerator.backward(trained(torch.randn(8, 4)).square().mean())
                optimizer.step()
                optimizer.zero_grad()
        ends.append(weights(trained))
    return ends


def all_accumulated():
    return {
        (base, evaluates): accumulated(base, evaluates) for base in ("", "all_reduce") for evaluates in (False, True)
    }


def test_behind_finish_micro_batches_are_averaged_too():
    first, second = run_workers(all_accumulated, 2)
    for name, (stock, ours) in first.items():
        torch.testing.assert_close(ours, stock, rtol=0, atol=1e-7, msg=str(name))
        assert torch.equal(ours, second[name][1]), name


def in_turn():
    """Ours, stock, ours: what is said at the step whose gradients were averaged, and the steps behind it."""
    accelerator, model, optimizer = finished()
    train_on(accelerator, model, accelerator.prepare(sgd(model)), range(5, 7))
    with Heard() as heard:
        train_on(accelerator, model, optimizer, range(7, 8))
        said = heard.about("this step's gradients were averaged over all workers", "WARNING")
    expected = alone(accelerator, model, range(8, 10))
    return said, train_on(accelerator, model, optimizer, range(8, 10)), expected


def test_training_that_comes_back_is_apart_again():
    for rank, (said, trained, expected) in enumerate(run_workers(in_turn, 2)):
        assert len(said) == (rank == 0)
        assert torch.equal(trained, expected)


def workers_of_two(ends):
    """Four processes in workers of two; then stock, over all four, where ours has finished, or is gone."""
    accelerator, bare = Accelerator(cpu=True), torch.nn.Linear(4, 1)
    model, optimizer = accelerator.prepare(
        bare, SlowMoOptimizer(sgd(bare), settings(outer_momentum=0.0, processes_per_worker=2))
    )
    group = model.process_group
    train_on(accelerator, model, optimizer, range(3))
    inside = model.process_group is not group
    if ends == "finish":
        slowmo_hf.finish(optimizer)
    else:
        with slowmo_hf.consensus(optimizer):
            averaged = copy.deepcopy(accelerator.unwrap_model(model).state_dict())
        accelerator.unwrap_model(model).load_state_dict(averaged)
        accelerator.free_memory()
        del optimizer
    expected = by_stock(accelerator, model, range(3, 6))
    trained = train_on(accelerator, model, accelerator.prepare(sgd(model)), range(3, 6))
    return inside, model.process_group is group, torch.equal(trained, expected)


@pytest.mark.parametrize("ends", ["finish", "is gone"])
def test_workers_of_several_processes_give_the_model_back(ends):
    assert run_workers(workers_of_two, 4, ends) == [(True, True, True)] * 4


def one_behind_the_other():
    """A worker per process, finished; then workers of two in the same wrapper: mates have one model between rounds."""
    accelerator, model, _kept = finished()
    pairs = settings(outer_momentum=0.0, sync_every=50, processes_per_worker=2)
    trained = train_on(accelerator, model, accelerator.prepare(SlowMoOptimizer(sgd(model), pairs)), range(5, 8))
    first, mate, other, others_mate = on_all_ranks(trained)
    return torch.equal(first, mate), torch.equal(other, others_mate), torch.equal(first, other)


def test_a_finished_one_leaves_nothing_to_the_next():
    assert run_workers(one_behind_the_other, 4) == [(True, True, False)] * 4


def at_once():
    """Two bases in one model: told at the start, or at the first step of the one that was there first."""
    said = {}
    for name, first, second in (("started", "local_sgd", "all_reduce"), ("stepping", "all_reduce", "local_sgd")):
        accelerator, bare = Accelerator(cpu=True), torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
        made = [
            SlowMoOptimizer(sgd(part), settings(base=base, outer_momentum=0.0))
            for part, base in zip(bare, (first, second), strict=True)
        ]
        model, *optimizers = accelerator.prepare(bare, *made)

        def step(model=model, optimizers=optimizers):
            model(torch.ones(2, 4)).sum().backward()
            for optimizer in optimizers:
                optimizer.step()

        said[name] = error_of(step)
    return said


def test_all_reduce_beside_local_training_is_refused():
    for said in run_workers(at_once, 2):
        for name, kind in (("started", "ValueError"), ("stepping", "RuntimeError")):
            assert said[name].startswith(kind), said
            assert "base='all_reduce' needs DDP's average of gradients, and another SlowMoOptimizer, " in said[name]


def a_stock_one_beside():
    """The head's optimizer is not wrapped; then it is; then a leftover holds what ours trains, and no more."""
    heard_of = []
    for wraps in (False, True, None):
        accelerator, bare = Accelerator(cpu=True), torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
        body = SlowMoOptimizer(sgd(bare if wraps is None else bare[0]), settings(outer_momentum=0.0))
        head = torch.optim.AdamW(bare[1].parameters())
        model, *optimizers = accelerator.prepare(bare, body, SlowMoOptimizer(head, body.config) if wraps else head)
        with Heard() as heard:
            for _ in range(3):
                accelerator.backward(model(torch.ones(2, 4) * dist.get_rank()).sum())
                optimizers[0].step()
                optimizers[0].zero_grad()
        heard_of.append(heard.about("Wrap it too", "WARNING"))
    return heard_of


def test_a_stock_optimizer_beside_ours_is_told_of():
    first, other = run_workers(a_stock_one_beside, 2)
    (said,) = first[0]
    assert said.startswith(
        "AdamW trains 2 parameters of a model that exchanges no gradients now: nobody averages theirs"
    )
    assert first[1:] == [[], []]
    assert other == [[], [], []]


def start():
    """The control: from the same weights, local and stock training end at different ones on two ranks."""
    accelerator, model, _ = finished()
    ranks = on_all_ranks(alone(accelerator, model, range(5, 9)))
    return torch.equal(*ranks), torch.equal(*on_all_ranks(by_stock(accelerator, model, range(5, 9)))), weights(model)


def test_the_two_differ():
    first, second = run_workers(start, 2)
    assert first[:2] == second[:2] == (False, True)
    assert torch.equal(first[2], second[2])
