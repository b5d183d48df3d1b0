"""Rooms of the outer loop by themselves: the account by a clock of its own, the clock, a round that is interrupted."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import slowmo_hf
from slowmo_hf import SlowMoConfig, SlowMoOptimizer, run_in_process
from slowmo_hf.algorithm import slow_momentum
from slowmo_hf.algorithm.norms import Norms
from slowmo_hf.algorithm.starts import TrainingOn
from slowmo_hf.training import account
from slowmo_hf.training.account import Account, Spent
from slowmo_hf.training.clock import Clock, Rates


class Time:
    """Seconds and bytes that pass when a test says so."""

    def __init__(self, monkeypatch):
        self.now, self.bytes = 100.0, 7
        monkeypatch.setattr(account.time, "perf_counter", lambda: self.now)

    def passes(self, seconds, sent=0):
        self.now += seconds
        self.bytes += sent


@pytest.fixture
def time(monkeypatch):
    return Time(monkeypatch)


def report(own):
    return own.report(1, Norms(), lambda values: values, consensus_is_known=False, has_velocity=True)


def test_every_second_is_of_one_kind(time):
    """
    3 s computed; 2 s of an exchange, 4 s of an evaluation inside which 5 s are waited for others; 1 s of a round, in
    which 6 s of a pause count for nothing: 3 s communicated of 6, half.
    """
    own = Account(lambda: time.bytes)
    time.passes(3)
    with own.communicating():
        time.passes(2, sent=10)
    with own.paused():
        time.passes(4)
        with own.communicating():
            time.passes(5)
    with own.communicating():
        time.passes(1, sent=20)
        with own.paused(), own.paused():
            time.passes(6)
        assert own.communicated_before == 2.0
        assert own.computed_seconds == 3.0
        told = report(own)
    assert (told.seconds, own.spent.utilisation, told.bytes_sent) == (3.0, 0.5, 30)
    assert own.spent == Spent(3.0, 3.0, 2.0)


def test_what_is_sent_apart_is_in_no_report(time):
    """Its bytes are not, its seconds are: 1 s of 4 was communication."""
    own = Account(lambda: time.bytes)
    time.passes(3)
    with own.communicating(), own.apart():
        time.passes(1, sent=1000)
    time.passes(0, sent=5)
    told = report(own)
    assert (told.seconds, own.spent.utilisation, told.bytes_sent) == (1.0, 0.75, 5)
    own.close()
    time.passes(2)
    assert (report(own).seconds, own.spent.utilisation, report(own).bytes_sent) == (0.0, 1.0, 0)


def test_an_error_ends_a_pause(time):
    own = Account(lambda: time.bytes)
    with pytest.raises(ValueError, match="boom"), own.communicating(), own.paused(), own.apart():
        raise ValueError("boom")
    time.passes(1)
    assert own.computed_seconds == 0.0
    report(own)
    assert own.spent.utilisation == 1.0
    assert own.computed_seconds == 1.0


def test_the_clock_in_numbers():
    """Rounds every 3 steps; exchanges at all others, numbered without a gap; an idle step is not a trained one."""
    clock, due = Clock(SlowMoConfig(base="sgp", sync_every=3)), []
    for _ in range(7):
        clock.step([0.1])
        due.append(clock.exchange_number if clock.exchange_is_due else "round" if clock.round_is_due else None)
        if clock.round_is_due:
            clock.begin_round()
    assert due == [0, 1, "round", 2, 3, "round", 4]
    assert (clock.rounds, clock.local_steps, clock.trained_steps) == (2, 1, 7)
    clock.idle()
    assert (clock.attempted_steps, clock.trained_steps, clock.local_steps) == (8, 7, 1)
    clock.drop_round(3, Rates())
    assert (clock.rounds, clock.local_steps) == (1, 4)


def trained(steps, **settings):
    weight = torch.nn.Parameter(torch.zeros(3))
    optimizer = SlowMoOptimizer(torch.optim.SGD([weight], lr=0.1), SlowMoConfig(sync_every=2, **settings))
    for _ in range(steps):
        weight.grad = torch.ones(3)
        optimizer.step()
    return optimizer.outer_loop


def test_a_plain_round_that_fails_is_no_round(monkeypatch):
    """Two steps stay local, none is counted as a round, and the next one takes all three."""
    loop = trained(1)

    def boom(*args):
        raise ValueError("boom")

    with monkeypatch.context() as patched:
        patched.setattr(type(loop.parts.slow.update), "update_", boom)
        with pytest.raises(ValueError, match="boom"):
            loop.step([0.1])
    assert (loop.in_flight.rounds, loop.rounds, loop.clock.local_steps) == ([], 0, 2)
    loop.step([0.1])
    assert loop.step([0.1]).round == 1


def test_a_launch_that_is_interrupted_leaves_nothing_to_the_next_run(monkeypatch):
    """Ctrl-C between the messages and the next step; then another state is taken up."""
    loop = trained(1, overlap_steps=1)
    depart_ = TrainingOn.depart_

    def interrupted(self, pieces):
        depart_(self, pieces)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(TrainingOn, "depart_", interrupted)
        with pytest.raises(KeyboardInterrupt):
            loop.step([0.1])
    assert loop.base.away
    loop.in_flight.forget()
    assert not loop.base.away
    assert loop.in_flight.rounds == []


@pytest.mark.parametrize("settings", [{}, {"shard_slow_state": True}, {"compression": "int8"}])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_round_that_fails_half_way_lets_its_memory_go(settings, workers, monkeypatch):
    """Without the garbage collector. The first round is as ever, the second fails at its first piece."""
    update_, armed = slow_momentum.slow_momentum_update_, []

    def fails(*args, **settings):
        if armed:
            raise MemoryError("no room")
        update_(*args, **settings)

    monkeypatch.setattr(slow_momentum, "slow_momentum_update_", fails)

    def work(rank):
        weight = torch.nn.Parameter(torch.zeros(2000))
        config = SlowMoConfig(sync_every=1, bucket_bytes=1024, **settings)
        optimizer = SlowMoOptimizer(torch.optim.SGD([weight], lr=0.1), config)
        weight.grad = torch.ones(2000)
        optimizer.step()
        optimizer.outer_loop.workers.world.gather_objects(None)  # all have had the first
        armed.append(rank)
        gc.collect()
        gc.disable()
        with pytest.raises(MemoryError):
            optimizer.step()
        anchors = [weakref.ref(item.flat) for item in optimizer.outer_loop.parts.slow.anchors]
        del optimizer
        return [anchor() is None for anchor in anchors]

    try:
        assert run_in_process(work, workers) == [[True]] * workers
    finally:
        gc.enable()


def test_a_state_that_is_refused_leaves_the_view():
    """The average stays shown, and the local weights come back behind it."""

    def work(rank):
        weight = torch.nn.Parameter(torch.zeros(3))
        optimizer = SlowMoOptimizer(torch.optim.SGD([weight], lr=0.1), SlowMoConfig(sync_every=4))
        weight.grad = torch.full((3,), float(rank))
        optimizer.step()
        local, state = weight.tolist(), optimizer.inner_optimizer.state_dict()
        with slowmo_hf.consensus(optimizer):
            shown = weight.tolist()
            with pytest.raises(ValueError, match="slow state has version 7; this package reads 1"):
                optimizer.load_state_dict({**state, "slowmo": {"version": 7}})
            assert weight.tolist() == shown != local
        assert weight.tolist() == local

    run_in_process(work, 2)
