"""The costs line: medians of several rounds of all ranks, when it is said again, and what it advises."""

from __future__ import annotations

import math
import time

import pytest
import torch
import torch.distributed as dist

import slowmo_hf
from harness import run_workers
from slowmo_hf import SlowMoConfig, SlowMoOptimizer, run_in_process
from slowmo_hf.training.account import Spent, mean_utilisation
from slowmo_hf.training.costs import Costs, enough_steps
from slowmo_hf.training.ending import log_end
from tiny import Heard

TAU = 4
SLEEPS = (0.02, 0.06)  # seconds of a step's computation, by rank


class Few:
    """Two workers of one process."""

    class world:
        world_size = 2

    size = 1


def fed(config, rounds):
    """The lines after rounds of ((computed, communicated) of rank 0, of rank 1)."""
    costs, lines = Costs(config, Few), []
    costs.hosts = ["here", "there"]
    for number, told in enumerate(rounds):
        assert costs.hear(number, [Spent(*one) for one in told])
        lines.append(costs.news(1000))
    return lines


def test_a_line_rests_on_the_medians_of_rounds_two_to_four():
    """
    By hand, tau 4: the first round and one odd round count for nothing. Steps take 10 and 30 ms, 20 in the mean, the
    slowest 1.5 times that. A round takes 20 ms, for so long the slowest communicates; utilisation is the mean of
    40/140 and 120/140, 57.1 %. No sync_every gives 90 %, for rank 0 waits for rank 1.
    """
    told = ((0.04, 0.10), (0.12, 0.02))
    lines = fed(SlowMoConfig(sync_every=TAU), [((9.0, 9.0),) * 2, told, ((0.04, 5.0), (0.12, 4.92)), told])
    assert lines[:3] == [""] * 3
    assert lines[3] == (
        "costs: 20.00 ms computation per step, 20.0 ms per round, utilisation 57.1 %, 1,000 bytes sent per round and "
        "worker, slowest is worker 1 (rank 1 on there), 1.50 times the mean computation. no sync_every gives 90 %: "
        "the others wait for the slowest. overlap_steps=1 would hide the round."
    )


@pytest.mark.parametrize("factor", [1.1, 1.3])
@pytest.mark.parametrize("which", ["computed", "communicated"])
def test_it_is_said_again_when_a_cost_has_changed_by_a_fifth(factor, which):
    """And not before ten rounds more: the change comes at once."""
    before = ((0.04, 0.04),) * 2
    after = ((0.04 * factor, 0.04) if which == "computed" else (0.04, 0.04 * factor),) * 2
    lines = fed(SlowMoConfig(sync_every=TAU), [before] * 4 + [after] * 20)
    said = [number for number, line in enumerate(lines) if line]
    assert said == ([3, 13] if factor > 1.2 else [3])


def test_a_cost_that_is_no_part_of_the_time_is_not_said_again():
    """A round of 1 ms in 1 s of steps is twice as long."""
    lines = fed(SlowMoConfig(sync_every=TAU), [((1.0, 0.001),) * 2] * 4 + [((1.0, 0.002),) * 2] * 20)
    assert sum(map(bool, lines)) == 1


def test_enough_steps_are_enough():
    """In t steps a rank computes t mean of t most + round: the t that is named reaches the share, t - 1 does not."""
    for mean, most, spent in ((0.01, 0.01, 0.2), (0.01, 0.0103, 0.2), (0.3, 0.3, 0.01)):
        words = enough_steps(mean, most, spent).split(", ")
        for share, one in zip((0.9, 0.95), words, strict=True):
            t = int(one.split()[2])
            assert t * mean / (t * most + spent) >= share - 1e-9
            assert t == 1 or (t - 1) * mean / ((t - 1) * most + spent) < share
    assert enough_steps(0.01, 0.0108, 0.2).split(", ")[1] == (
        "no sync_every gives 95 %: the others wait for the slowest"
    )
    # 0.95 x 0.2 s over 0.01 - 0.95 x 0.0104 s are 1,584 steps: longer than anybody waits for a round.
    assert enough_steps(0.01, 0.0104, 0.2).split(", ") == [
        "sync_every >= 282 would give 90 %",
        "no sync_every up to 1,000 gives 95 %",
    ]


SLOW_ROUND = ((0.04, 0.025),) * 2  # a step takes 10 ms, a round 25


@pytest.mark.parametrize(
    ("settings", "overlap", "compression"),
    [
        ({}, 3, True),
        # Two stages of 12.5 ms take two steps each, which are a round's steps; so do those of a sharded slow state.
        ({"compression": "int8"}, None, False),
        ({"compression": "int8", "sync_every": 8}, 4, False),
        ({"shard_slow_state": True, "sync_every": 8}, 4, False),  # the rules refuse a code beside it
        ({"compression": "int8", "sync_every": 8, "overlap_steps": 2}, 6, False),
        ({"inner_state": "average"}, None, True),
        ({"overlap_steps": 1}, None, True),  # 1 + 3 are a round's steps
        ({"base": "sgp"}, None, False),
    ],
)
def test_advice_keeps_to_the_rules(settings, overlap, compression):
    """And what it advises can be set: a megabyte on a slow link."""
    config = SlowMoConfig(**{"sync_every": TAU, **settings})
    costs = Costs(config, Few)
    for number in range(4):
        costs.hear(number, [Spent(0.01 * config.sync_every, 0.025)] * 2)
    line = costs.news(2 * 2**20)
    assert (f"overlap_steps={overlap} would" in line) == (overlap is not None)
    assert overlap is not None or "overlap_steps" not in line
    assert ('compression="int8" would' in line) == compression


def test_nothing_is_advised_where_it_would_not_help():
    """A round of 2 % of the time; and one of a few bytes, which waits for latency."""
    cheap = fed(SlowMoConfig(sync_every=TAU), [((0.98, 0.02),) * 2] * 4)[3]
    assert "overlap_steps" not in cheap
    assert "compression" not in cheap
    assert "compression" not in fed(SlowMoConfig(sync_every=TAU), [SLOW_ROUND] * 4)[3]


def test_who_has_measured_nothing_is_not_averaged():
    assert mean_utilisation([Spent(1.0, 1.0), Spent()]) is None
    assert mean_utilisation([]) is None
    assert mean_utilisation([Spent(1.0, 1.0), Spent(3.0, 1.0)]) == 0.625


def train_unevenly():
    """Workers that compute for different times, by sleeping."""
    weight = torch.nn.Parameter(torch.zeros(8))
    optimizer = SlowMoOptimizer(torch.optim.SGD([weight], lr=0.1), SlowMoConfig(sync_every=TAU))
    rank, told, own = dist.get_rank(), [], []
    with Heard() as heard:
        for step in range(1, 6 * TAU + 1):
            time.sleep(SLEEPS[rank])
            weight.grad = torch.full((8,), float(rank))
            optimizer.step()
            if step % TAU == 0:
                told.append(slowmo_hf.last_round(optimizer).utilisation)
                own.append(optimizer.outer_loop.account.spent)
    return told, own, heard.about("costs:")


def test_utilisation_is_the_mean_over_ranks_of_the_round_before():
    """
    Rank 0 computes 20 ms a step and waits for rank 1, which takes 60: its share is a third, rank 1's nearly 1. Each
    report has the mean of what all ranks measured in the round before, the first one none.
    """
    (told, own, said), (other, others, nothing) = run_workers(train_unevenly, 2)
    assert told == other, "the same on all ranks, to the last bit"
    assert told[0] is None
    for number, utilisation in enumerate(told[1:]):
        assert utilisation == (own[number].utilisation + others[number].utilisation) / 2
    assert math.isclose(sorted(told[2:])[2], (1 / 3 + 1) / 2, abs_tol=0.12)
    assert len(said) == 1
    assert not nothing
    assert "slowest is worker 1 (rank 1 on " in said[0]
    assert 1.3 < float(said[0].split(" times the mean")[0].split()[-1]) < 1.6


def test_after_a_state_is_taken_up_it_is_said_anew():
    """Rounds of one step: the line after the fifth round, and after the fifth one of what goes on; none in between."""

    def work(rank):
        weight = torch.nn.Parameter(torch.zeros(3))
        optimizer = SlowMoOptimizer(torch.optim.SGD([weight], lr=0.1), SlowMoConfig(sync_every=1))
        said = []
        for step in range(1, 13):
            weight.grad = torch.ones(3)
            optimizer.step()
            said.append(len(heard.about("costs:")))
            if step == 6:
                optimizer.load_state_dict(optimizer.state_dict())
        return said

    with Heard() as heard:
        said = run_in_process(work, 2)[0]
    assert (said[3], said[5], said[9], said[11]) == (0, 1, 1, 2)


# ---- totals ----


def test_totals_are_of_each_rank_and_the_end_says_their_mean():
    """Computed 3 / (3 + 1) and 1 / (1 + 5): 54.2 % on average."""
    costs = Costs(SlowMoConfig(sync_every=4), Few)
    costs.hear(0, [Spent(1.0, 2.0, 0.5), Spent(3.0, 4.0, 0.5)])
    costs.hear(1, [Spent(10.0, 20.0, 5.0), Spent(30.0, 40.0, 5.0)])
    assert costs.totals == [Spent(11.0, 22.0, 5.5), Spent(33.0, 44.0, 5.5)]
    weight = torch.nn.Parameter(torch.zeros(3))
    optimizer = SlowMoOptimizer(torch.optim.SGD([weight], lr=0.1), SlowMoConfig(sync_every=2))
    weight.grad = torch.ones(3)
    optimizer.step()
    optimizer.outer_loop.parts.costs.totals = [Spent(1.0, 3.0), Spent(5.0, 1.0)]
    with Heard() as heard:
        log_end(optimizer.outer_loop.parts, optimizer.outer_loop.in_flight)
    (line,) = heard.about("sent per worker")
    assert line.endswith("; 2 s communicated or waited and 3 s computed, the mean over ranks: utilisation 54.2 %")


def spent_by_a_worker(rank):
    weight = torch.nn.Parameter(torch.zeros(3))
    optimizer = SlowMoOptimizer(torch.optim.SGD([weight], lr=0.1), SlowMoConfig(sync_every=2))
    spent = []
    for step in range(6):
        weight.grad = torch.ones(3)
        optimizer.step()
        if step % 2:
            spent.append(optimizer.outer_loop.account.spent.computed)
    slowmo_hf.finish(optimizer)
    return sum(spent), [one.computed for one in optimizer.outer_loop.parts.costs.totals]


def test_the_last_rounds_seconds_are_in_the_totals():
    ranks = run_in_process(spent_by_a_worker, 2)
    for _, totals in ranks:
        assert totals == pytest.approx([spent for spent, _ in ranks])
