"""Overlapped rounds with buffers and bf16, and at the end."""

from __future__ import annotations

import re
import time

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator

import slowmo_hf
from harness import patience, run_workers
from overlapping import HOW, LR, STEPS, Still, rows_of
from slowmo_hf import SlowMoConfig, SlowMoOptimizer, run_in_process
from tiny import Regression, Rows, equal, two_groups, values


class Normed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.norm = torch.nn.BatchNorm1d(4)
        self.head = torch.nn.Linear(4, 1)

    def forward(self, x):
        return self.head(self.norm(x)).square().mean()


def _normed(config):
    accelerator = Accelerator(cpu=True)
    bare = Normed()
    model, optimizer = accelerator.prepare(bare, SlowMoOptimizer(torch.optim.SGD(bare.parameters(), lr=0.1), config))
    seen = []
    for step in range(5):
        inputs = (
            torch.randn(6, 4, generator=torch.Generator().manual_seed(10 * step + dist.get_rank())) + dist.get_rank()
        )
        accelerator.backward(model(inputs))
        optimizer.step()
        optimizer.zero_grad()
        seen.append(values(bare))
    return seen


def test_buffers_meet_at_once_and_parameters_later():
    first, second = run_workers(_normed, 2, SlowMoConfig.local_sgd(3, overlap_steps=1))
    means = [[seen["norm.running_mean"] for seen in one] for one in (first, second)]
    assert not torch.equal(means[0][1], means[1][1])
    assert torch.equal(means[0][2], means[1][2])
    assert not torch.equal(first[2]["head.weight"], second[2]["head.weight"])
    assert not torch.equal(first[3]["head.weight"], second[3]["head.weight"]), "each keeps its own progress"


def test_bf16_without_progress_is_the_rounded_anchor():
    """Learning rate 0 in the overlapped step: what is taken in is what a plain round hands back, bit for bit."""

    def train(rank, overlap_steps):
        torch.manual_seed(1)
        p = torch.nn.Parameter(torch.randn(50).bfloat16())
        inner = torch.optim.SGD([p], lr=0.1)
        optimizer = SlowMoOptimizer(inner, SlowMoConfig(sync_every=3, outer_momentum=0.5, overlap_steps=overlap_steps))
        for step in range(8):
            inner.param_groups[0]["lr"] = 0.0 if step % 3 == 0 else 0.1
            p.grad = torch.randn(50, generator=torch.Generator().manual_seed(10 * step + rank)).bfloat16()
            optimizer.step()
        return p.detach().clone()

    plain, overlapped = (run_in_process(lambda rank, n=n: train(rank, n), 3) for n in (0, 1))
    for mine, other in zip(plain, overlapped, strict=True):
        assert torch.equal(mine, other)


def _leaves_early(config, batches):
    """Rank 1 has fewer batches; the end of both is the average that counts what was in flight."""
    rank = dist.get_rank()
    model = torch.nn.Linear(1, 1, bias=False).double()
    torch.nn.init.constant_(model.weight, 8.0)
    optimizer = SlowMoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), config)
    with slowmo_hf.join(optimizer):
        for _ in range(batches[rank]):
            ((model(torch.ones(1, 1).double()) - rank) ** 2 / 2).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    with slowmo_hf.consensus(optimizer):
        return model.weight.item(), optimizer.outer_loop.rounds


@pytest.mark.parametrize("how", HOW)  # one number alone in its block is exact
def test_a_worker_that_leaves_early_takes_part_and_the_end_takes_in_what_travels(how):
    """
    sync_every 2, n 1, weights by steps since the round before: rounds at 2, 4 and 6, the last one in flight at the
    end.
    """
    x, anchor, velocity, then, steps = [8.0, 8.0], 8.0, 0.0, None, [0, 0]
    for step in range(1, 7):
        for rank in (0, 1):
            if step <= (6, 3)[rank]:
                x[rank] -= 0.1 * (x[rank] - rank)
                steps[rank] += 1
        if step % 2 == 1 and then is not None:
            x, then = [anchor + (x[i] - then[i]) for i in (0, 1)], None
        if step % 2 == 0:
            average = sum(steps[i] * x[i] for i in (0, 1)) / sum(steps)
            velocity = 0.5 * velocity + (anchor - average)
            anchor, then, steps = anchor - velocity, list(x), [0, 0]
    config = SlowMoConfig(sync_every=2, overlap_steps=1, **HOW[how], timeout_seconds=patience(20))
    for end, rounds in run_workers(_leaves_early, 2, config, (6, 3)):
        assert end == pytest.approx(anchor, abs=1e-12)
        assert rounds == 3


def _ends_before_a_buffer_changes(config):
    """
    Rank 0 has 6 batches, rank 1 12. Its buffer changes at step 9, the round of 12 goes ahead, and at the end all
    compare buffers.
    """
    rank = dist.get_rank()
    model = Still()
    optimizer = SlowMoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), config)
    called, prepared = Accelerator(cpu=True).prepare(model, optimizer)
    with slowmo_hf.join(optimizer):
        for step in range(1, (6, 12)[rank] + 1):
            if step == 9:
                model.seen += 3
            called(torch.tensor(float(rank))).backward()
            prepared.step()
            prepared.zero_grad()
    with slowmo_hf.consensus(optimizer):
        return model.weight[0].item(), model.seen.item()


@pytest.mark.parametrize("how", HOW)
def test_an_end_hears_of_a_round_before_it_waits_for_its_messages(how):
    """
    At 6 both count, and it is taken in at 7; from there on rank 1 alone trains, and alone counts: its 3 in the buffer
    is all's.
    """
    config = SlowMoConfig.local_sgd(6, overlap_steps=1, **HOW[how], timeout_seconds=patience(20))
    at_6 = 1 + 7 * 0.9**6
    at_7 = (8 * 0.9**6 + at_6) / 2 + (1 + 7 * 0.9**7 - at_6)
    for end, seen in run_workers(_ends_before_a_buffer_changes, 2, config):
        assert end == pytest.approx(1 + (at_7 - 1) * 0.9**5, abs=1e-12)
        assert seen == 3


def _drops_a_run_in_flight(config):
    """
    Three runs in turn, left while a round travels, one rank slower: whether its second stage has set out by then
    differs by rank.
    """
    ends = []
    for _ in range(3):
        model = Still()
        optimizer = SlowMoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), config)
        for _ in range(9):
            time.sleep(0.03 * (1 - dist.get_rank()))
            model.weight.grad = model.weight.detach() - dist.get_rank()
            optimizer.step()
        ends.append(model.weight[0].item())
    return ends


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
def test_runs_in_turn_are_the_same_whatever_is_left_in_flight(how):
    config = SlowMoConfig.local_sgd(4, overlap_steps=3, **HOW[how], timeout_seconds=patience(20))
    for ends in run_workers(_drops_a_run_in_flight, 2, config):
        assert ends == [ends[0]] * 3


def _meets_nan(config):
    model, rows = Regression(), Rows(STEPS * 16)
    optimizer = SlowMoOptimizer(two_groups(model, "sgd", LR), config)
    for step in range(8):
        batch = rows_of(step, dist.get_rank())
        model(rows.x[batch], rows.y[batch])["loss"].backward()
        if step == 2 and dist.get_rank() == 1:
            model.head.weight.grad.fill_(float("nan"))
        try:
            optimizer.step()
        except ValueError as error:
            return step + 1, str(error)
        optimizer.zero_grad()
    return None


@pytest.mark.parametrize("how", HOW)
def test_nan_on_one_rank_is_told_at_the_next_meeting(how):
    config = SlowMoConfig.local_sgd(3, overlap_steps=1, **HOW[how], timeout_seconds=patience(20))
    first, second = run_workers(_meets_nan, 2, config)
    assert first == second
    step, words = first
    assert step == 6
    assert re.match(r"rank 1 on \S+, step 6: its parameters are not finite", words)
    assert "rank 0" not in words


def _loads_after_nan(folder, how):
    config = SlowMoConfig.local_sgd(3, overlap_steps=1, **HOW[how], timeout_seconds=patience(20))
    accelerator = Accelerator(cpu=True)
    bare, rows = Regression(), Rows(STEPS * 16)
    model, optimizer = accelerator.prepare(bare, SlowMoOptimizer(two_groups(bare, "sgd", LR), config))
    slowmo_hf.register_for_checkpointing(accelerator, optimizer)

    def step(number, spoil=False):
        batch = rows_of(number, dist.get_rank())
        accelerator.backward(model(rows.x[batch], rows.y[batch])["loss"])
        if spoil and dist.get_rank() == 1:
            bare.head.weight.grad.fill_(float("nan"))
        optimizer.step()
        optimizer.zero_grad()

    step(0)
    step(1)
    accelerator.save_state(folder)
    for number in range(2, 8):
        step(number)
    good = values(bare)
    accelerator.wait_for_everyone()
    accelerator.load_state(folder)
    step(2, spoil=True)
    step(3)
    accelerator.load_state(folder)
    for number in range(2, 8):
        step(number)
    return equal(values(bare), good)


@pytest.mark.parametrize("how", HOW)
def test_a_good_checkpoint_is_gone_on_with_after_nan(tmp_path, how):
    assert run_workers(_loads_after_nan, 2, str(tmp_path / "saved"), how) == [True, True]


def _leaves_before_the_due_step(config):
    """Pass by pass: rank 1 leaves the second block at step 5, before what set out at 4 is due at 6; rank 0 at 7."""
    rank = dist.get_rank()
    model = torch.nn.Linear(1, 1, bias=False).double()
    torch.nn.init.constant_(model.weight, 8.0)
    optimizer = SlowMoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), config)
    with slowmo_hf.join(optimizer):
        for _ in range((7, 5)[rank]):
            ((model(torch.ones(1, 1).double()) - rank) ** 2 / 2).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.weight.item(), not optimizer.outer_loop.in_flight.rounds


@pytest.mark.parametrize("how", HOW)
def test_a_worker_that_left_before_takes_in_what_the_others_have(how):
    x = [8.0, 8.0]
    then = []
    for step in range(1, 8):
        for rank in (0, 1):
            if step <= (7, 5)[rank]:
                x[rank] -= 0.1 * (x[rank] - rank)
        if step == 4:
            then, anchor = list(x), sum(x) / 2
        if step == 6:
            x[0] = anchor + (x[0] - then[0])
    x[1] = anchor + (x[1] - then[1])
    config = SlowMoConfig.local_sgd(4, overlap_steps=2, **HOW[how], timeout_seconds=patience(20))
    results = run_workers(_leaves_before_the_due_step, 2, config)
    assert [taken for _, taken in results] == [True, True]
    assert [weight for weight, _ in results] == pytest.approx(x, abs=1e-12)


def test_bf16_with_progress_takes_in_the_rounded_anchor():
    """The anchor 1 + 2^-8, which bf16 rounds to 1, and progress 2^-7 on both: 1 + 2^-7 is shown and taken in."""

    def work(rank):
        weight = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
        optimizer = SlowMoOptimizer(torch.optim.SGD([weight], lr=1.0), SlowMoConfig.local_sgd(3, overlap_steps=2))
        seen = []
        for moves in (2.0**-7 * (rank == 0), 0.0, 0.0, 2.0**-7, 0.0):
            weight.grad = torch.full_like(weight, -moves)
            optimizer.step()
            with slowmo_hf.consensus(optimizer):
                seen.append(weight.item())
        return optimizer.outer_loop.parts.slow.anchors[0].flat.item(), seen[3], weight.item()

    assert run_in_process(work, 2) == [(1 + 2**-8, 1 + 2**-7, 1 + 2**-7)] * 2
