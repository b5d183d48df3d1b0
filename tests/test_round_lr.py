"""gamma of a round is the mean learning rate of its attempted steps, per parameter group."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from transformers.optimization import Adafactor, AdafactorSchedule

from harness import patience
from slowmo_hf import SlowMoConfig, SlowMoOptimizer, run_in_process
from slowmo_hf.training.clock import Clock, Rates

TAU = 6


def restarts(step):
    """Cosine from 0.1 to 0, anew every 15 steps, which is no multiple of a round."""
    return 0.05 * (1 + math.cos(math.pi * (step % 15) / 15))


def other(step):
    """A group of another schedule: warm-up, then steps down."""
    return min(1.0, (step + 1) / 9) * 0.2 * 0.5 ** (step // 10)


def none(step):
    return None


class Worker:
    """Two parameters in groups of their own with gradients 0.3 x + noise, plain SGD written out."""

    class Inner(torch.optim.SGD):
        """A group without a rate moves by 0.01, as Adafactor's steps by its own."""

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(p.grad * (0.01 if group["lr"] is None else group["lr"]))

    def __init__(self, rank, schedules, **settings):
        torch.manual_seed(0)
        self.params = [torch.nn.Parameter(torch.randn(5, dtype=torch.float64)) for _ in range(2)]
        inner = self.Inner([{"params": [p], "lr": 0.1} for p in self.params])
        self.schedules, self.inner = schedules, inner
        for group, schedule in zip(inner.param_groups, schedules, strict=True):
            group["lr"] = schedule(0)
        config = SlowMoConfig(**{"sync_every": TAU, **settings}, timeout_seconds=patience(20))
        self.optimizer = SlowMoOptimizer(inner, config)
        self.rank, self.step_number = rank, 0

    def step(self):
        for index, p in enumerate(self.params):
            p.grad = gradient(p.detach(), self.rank, self.step_number, index)
        for group, schedule in zip(self.inner.param_groups, self.schedules, strict=True):
            group["lr"] = schedule(self.step_number)
        self.optimizer.step()
        self.step_number += 1

    def values(self):
        return [p.detach().clone() for p in self.params]


def gradient(x, rank, step, index):
    draw = torch.Generator().manual_seed(7919 * step + 31 * rank + index)
    return 0.3 * x + torch.randn(5, generator=draw, dtype=torch.float64)


def by_the_paper(schedules, steps, workers, beta, alpha, overlap=0):
    """
    Algorithm 1 in its own form: u <- beta u + (x_{t,0} - x_{t,tau}) / gamma_t, x_{t+1,0} = x_{t,0} - alpha gamma_t u,
    with gamma_t the mean of the round. With `overlap` workers take the new start in later, with their progress since.
    """
    torch.manual_seed(0)
    start = [torch.randn(5, dtype=torch.float64) for _ in range(2)]
    crew = [[x.clone() for x in start] for _ in range(workers)]
    u = [torch.zeros(5, dtype=torch.float64) for _ in range(2)]
    departed, in_force = None, [[], []]
    for step in range(steps):
        for index, schedule in enumerate(schedules):
            gamma = schedule(step)
            in_force[index].append(1.0 if gamma is None else gamma)
            for rank, x in enumerate(crew):
                x[index] = x[index] - (0.01 if gamma is None else gamma) * gradient(x[index], rank, step, index)
        if departed is not None and step + 1 == departed[0]:
            for x, then in zip(crew, departed[1], strict=True):
                for index in range(2):
                    x[index] = start[index] + (x[index] - then[index])
            departed = None
        if (step + 1) % TAU == 0:
            then = [list(x) for x in crew]
            for index in range(2):
                gamma = math.fsum(in_force[index]) / TAU
                mean = sum(x[index] for x in then) / workers
                u[index] = beta * u[index] + (start[index] - mean) / gamma
                start[index] = start[index] - alpha * gamma * u[index]
            in_force = [[], []]
            if overlap:
                departed = (step + 1 + overlap, then)
            else:
                crew = [list(start) for _ in crew]
    return crew


@pytest.mark.parametrize("overlap", [0, 2])
@pytest.mark.parametrize("schedules", [(restarts, other), (restarts, none)], ids=["two schedules", "one without"])
def test_a_schedule_with_restarts_is_the_papers(schedules, overlap):
    settings = {"outer_momentum": 0.6, "outer_lr": 0.9, "overlap_steps": overlap}

    def work(rank):
        worker = Worker(rank, schedules, **settings)
        for _ in range(47):
            worker.step()
        return worker.values()

    expected = by_the_paper(schedules, 47, 3, 0.6, 0.9, overlap)
    for found, wanted in zip(run_in_process(work, 3), expected, strict=True):
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_one_round_moves_at_most_what_all_steps_at_the_largest_rate_would():
    """
    Gradient 1, alpha 1, beta 1/2: alpha / (1 - beta) tau gamma_max, also after a restart from a rate of almost 0. With
    the last step's rate the round after a restart moved more than ten times that.
    """

    def work(rank):
        p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        inner = torch.optim.SGD([p], lr=0.1)
        optimizer = SlowMoOptimizer(inner, SlowMoConfig(sync_every=12))
        ends = [0.0]
        for step in range(96):
            inner.param_groups[0]["lr"] = 0.05 * (1 + math.cos(math.pi * (step % 48) / 48))
            p.grad = torch.ones_like(p)
            optimizer.step()
            if (step + 1) % 12 == 0:
                ends.append(p.item())
        return [before - after for before, after in pairwise(ends)]

    for moves in run_in_process(work, 2):
        assert max(moves) <= 12 * 0.1 / (1 - 0.5)
        assert moves[4] > moves[3]


@pytest.mark.parametrize("lr", [0.1, 1e-3, 0.3, 7e-5])
def test_equal_rates_have_that_mean_to_the_last_bit(lr):
    rates = Rates()
    for _ in range(7):
        rates.count([lr, 3 * lr])
    assert rates.mean == [lr, 3 * lr]
    assert Rates().and_then(rates).mean == rates.and_then(Rates()).mean == [lr, 3 * lr]


def test_a_launch_that_is_dropped_gives_its_steps_back():
    """Rates 1, 2 set out and come back; with the 6 of the step since their mean is 3."""
    before, since = Rates(), Rates()
    before.count([1.0])
    before.count([2.0])
    since.count([6.0])
    assert before.and_then(since).mean == [3.0]
    assert before.and_then(since).steps == 3


def test_a_clock_whose_round_is_dropped_counts_its_steps_again():
    """The same by the clock; a step of others, in which this worker idles, has no rate."""
    clock = Clock(SlowMoConfig(sync_every=2))
    for lr in (1.0, 2.0):
        clock.step([lr])
    steps, rates = clock.local_steps, clock.rates
    clock.begin_round()
    clock.step([6.0])
    assert clock.rates.mean == [6.0]
    clock.drop_round(steps, rates)
    clock.idle()
    assert (clock.local_steps, clock.rates.steps, clock.rates.mean) == (3, 3, [3.0])


def test_a_tensor_as_a_rate_is_read_at_its_step():
    """Capturable optimizers keep it in a tensor, which a scheduler fills anew: no alias of it is counted."""

    def work(rank):
        p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        rate = torch.tensor(0.1, dtype=torch.float64)
        inner = torch.optim.SGD([p], lr=rate)
        optimizer = SlowMoOptimizer(inner, SlowMoConfig(sync_every=4, timeout_seconds=patience(20)))
        for value in (0.1, 0.2, 0.3):
            rate.fill_(value)
            p.grad = torch.ones_like(p)
            optimizer.step()
        return optimizer.outer_loop.clock.rates.mean

    for (mean,) in run_in_process(work, 2):
        assert mean == pytest.approx(0.2, abs=1e-15)


@pytest.mark.parametrize("base", ["local_sgd", "all_reduce"])
def test_the_mean_goes_on_where_a_state_was_saved(base):
    """`state_dict` of every step at which there is one; an older one without the rates is taken too."""

    def work(rank):
        whole = Worker(rank, (restarts, other), base=base)
        for number in range(1, 20):
            whole.step()
            if number % TAU == 0 or base == "all_reduce":
                state = whole.optimizer.state_dict()
                again = Worker(rank, (restarts, other), base=base)
                again.optimizer.begun()
                for p, q in zip(again.params, whole.params, strict=True):
                    p.data.copy_(q)
                again.optimizer.load_state_dict(state)
                assert again.optimizer.outer_loop.clock.rates == whole.optimizer.outer_loop.clock.rates
                state["slowmo"].pop("rates")
                again.optimizer.load_state_dict(state)
                assert again.optimizer.outer_loop.clock.rates.mean == []
        return True

    assert run_in_process(work, 2) == [True, True]


def test_rates_that_differ_for_good_are_told_once(caplog):
    """transformers' own recipe takes a worker's rate from its own weights; each round uses the largest, as ever."""

    def work(rank):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3)
        inner = Adafactor(model.parameters(), lr=None, relative_step=True, scale_parameter=True, warmup_init=True)
        schedule = AdafactorSchedule(inner)
        optimizer = SlowMoOptimizer(inner, SlowMoConfig(sync_every=2))
        used, own = [], []
        for step in range(8):
            torch.manual_seed(100 * step + rank)
            model(torch.randn(8, 4)).square().mean().backward()
            own.append(float(inner.param_groups[0]["lr"]))
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if step % 2:
                used += optimizer.state_dict()["slowmo"]["outer_optimizer"]["previous_inner_lr"]
        return used, own

    (used, own), (theirs, others) = run_in_process(work, 2)
    assert used == theirs
    means = [[sum(rates[i : i + 2]) / 2 for i in (0, 2, 4, 6)] for rates in (own, others)]
    assert used == pytest.approx([max(pair) for pair in zip(*means, strict=True)], rel=1e-12)
    assert sum(a != b for a, b in zip(*means, strict=True)) >= 2
    told = [line for line in caplog.messages if "inner learning rates differ between workers" in line]
    assert len(told) == 1
    assert "A step skipped on one rank does this, or a rate that comes from a worker's own weights" in told[0]
