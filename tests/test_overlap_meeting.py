"""The meeting of an overlapped round travels too; ranks that end or load meanwhile."""

from __future__ import annotations

import dataclasses
import re
import time

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator

import slowmo_hf
from harness import patience, run_workers
from overlapping import HOW, Still, looks
from slowmo_hf import SlowMoConfig, SlowMoOptimizer, run_in_process
from slowmo_hf.checkpoints.state import check_snapshot, write_snapshot
from tiny import message_memory

# ---- the meeting travels too ----


# Rounds at 6, 12 and 18; from 12 on ahead.
AHEAD = SlowMoConfig(sync_every=6, outer_momentum=0.5, overlap_steps=3, timeout_seconds=patience(20))


def _ahead(config, steps, events):
    """
    Events by (rank, step) happen before the inner step. (seconds, weight, buffer, stop requested) of every step, or
    the error's.
    """
    model = Still()
    optimizer = SlowMoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), config)
    accelerator = Accelerator(cpu=True)
    called, prepared = accelerator.prepare(model, optimizer)
    rank, told = dist.get_rank(), []
    for step in range(1, steps + 1):
        try:
            events.get((rank, step), lambda model, optimizer: None)(model, optimizer)
            accelerator.backward(called(torch.tensor(float(rank))))
            start = time.monotonic()
            prepared.step()
        except (ValueError, RuntimeError) as error:
            return step, str(error)
        prepared.zero_grad()
        buffers = (model.seen.item(), model.count.item())
        told.append((time.monotonic() - start, model.weight[0].item(), buffers, slowmo_hf.stop_requested(optimizer)))
    return told


def sleeps(model, optimizer):
    time.sleep(1)


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
def test_nobody_waits_for_a_worker_that_is_less_than_n_steps_behind(how):
    """
    Rank 1 is a second late for step 12. Rank 0 waits at 15, where the round is taken in; at 14 where the update stands
    half-way; without overlap at 12. Values do not change.
    """
    late = {(1, 12): sleeps}
    for base, waits_at in (
        (AHEAD, 14 if how == "sharded" else 15),
        (SlowMoConfig(sync_every=6, outer_momentum=0.5), 12),
    ):
        config = dataclasses.replace(base, **HOW[how])
        first, second = run_workers(_ahead, 2, config, 19, late)
        for rank, told in enumerate(run_workers(_ahead, 2, config, 19, {})):
            assert [values for _, *values in told] == [values for _, *values in (first, second)[rank]]
        assert [step for step, (seconds, *_) in enumerate(first, start=1) if seconds > 0.5] == [waits_at]


def changes_buffers(model, optimizer):
    model.seen += 1 + 2 * dist.get_rank()
    model.count += 5 + dist.get_rank()


def test_a_buffer_that_changes_behind_the_meeting_is_averaged_when_it_is_heard_of():
    """
    At step 10 on both: round 12 has gone ahead, and is heard of at 15. From then on all meet at the round, and average
    there.
    """
    events = {(rank, step): changes_buffers for rank in (0, 1) for step in (10, 17)}
    for rank, told in enumerate(run_workers(_ahead, 2, AHEAD, 19, events)):
        buffers = [values[1] for _, *values in told]
        own = (1.0 + 2 * rank, 5 + rank)
        assert buffers == [(0.0, 0)] * 9 + [own] * 5 + [(2.0, 6)] * 2 + [(2.0 + own[0], 6 + own[1])] + [(4.0, 12)] * 2


def test_a_buffer_that_changes_on_one_rank_alone():
    events = {(1, 10): changes_buffers}
    for rank, told in enumerate(run_workers(_ahead, 2, AHEAD, 16, events)):
        buffers = [values[1] for _, *values in told]
        assert buffers == [(0.0, 0)] * 9 + [(3.0, 6) if rank else (0.0, 0)] * 5 + [(1.5, 6)] * 2


def adds_a_parameter(model, optimizer):
    optimizer.param_groups[0]["params"].append(torch.nn.Parameter(torch.zeros(3)))


def asks_for_a_stop(model, optimizer):
    optimizer.outer_loop.status.stop_asked = True


def test_what_differs_is_told_on_all_when_it_is_heard_of():
    """
    Another parameter set on rank 1: there at once, on rank 0 when it takes in. A look where the other has a round:
    alike.
    """
    (first, words), (second, same) = run_workers(_ahead, 2, AHEAD, 19, {(1, 11): adds_a_parameter})
    assert (first, second) == (15, 15)
    assert words == same
    assert re.match(r"rank 1 on \S+, step 12: the parameter set changed after the start", words)
    (first, words), (second, same) = run_workers(_ahead, 2, AHEAD, 19, {(1, 12): looks})
    assert (first, second) == (15, 12)
    assert words == same
    assert re.match(
        r"ranks met at different places: rank 0 on \S+ at step 12, the round; rank 1 on \S+ at step 11, a view", words
    )


def _refused_after_an_end(config):
    """Rank 1 has ended after step 10; the parameter set of rank 0 changes at 11."""
    model, rank = Still(), dist.get_rank()
    optimizer = SlowMoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), config)
    try:
        with slowmo_hf.join(optimizer):
            for step in range(1, (18, 10)[rank] + 1):
                if step == 11:
                    adds_a_parameter(model, optimizer)
                model.weight.grad = model.weight.detach() - rank
                optimizer.step()
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
def test_a_refusal_keeps_its_cause_where_a_rank_has_ended(how):
    config = dataclasses.replace(AHEAD, **HOW[how], timeout_seconds=6)
    for words in run_workers(_refused_after_an_end, 2, config):
        assert re.match(r"rank 0 on \S+, step 12: the parameter set changed after the start", words), words


def _mends(config, processes):
    """
    The last rank has another parameter set from step 11 on, which is told at 15 (sharded at 14), and then the old one
    again. A look, and their mean.
    """
    model, rank, ranks = Still(), dist.get_rank(), dist.get_world_size()
    optimizer = SlowMoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), config)
    called = torch.nn.parallel.DistributedDataParallel(model)
    for step in range(1, 19):
        if (rank, step) == (ranks - 1, 11):
            adds_a_parameter(model, optimizer)
        optimizer.zero_grad()
        called(torch.tensor(float(rank // processes))).backward()
        try:
            optimizer.step()
        except ValueError:
            assert step == 15 - config.shard_slow_state
            if rank == ranks - 1:
                del optimizer.param_groups[0]["params"][-1]
            mean = model.weight.detach().clone()
            dist.all_reduce(mean)
            with slowmo_hf.consensus(optimizer):
                shown = model.weight.detach().clone()
            told = (
                shown.tolist(),
                (mean / ranks).tolist(),
                optimizer.outer_loop.rounds,
                optimizer.outer_loop.clock.local_steps,
            )
    return told, slowmo_hf.last_round(optimizer).round, optimizer.outer_loop.rounds


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("how", HOW)
def test_a_round_that_was_refused_never_was(processes, how):
    """
    Rounds at 6 and 18 are left; the look behind the error is the mean of what the workers have. With two processes a
    worker it is one that does not lead, whose leader has sent its part.
    """
    config = dataclasses.replace(AHEAD, processes_per_worker=processes, **HOW[how])
    for (shown, mean, rounds, local_steps), last, rounds_at_18 in run_workers(
        _mends, 2 * processes, config, processes
    ):
        assert shown == pytest.approx(mean, abs=1e-12)
        assert (rounds, local_steps) == (1, 9 - config.shard_slow_state)
        assert (last, rounds_at_18) == (1, 2)


def _logs(config):
    """Rank 1 is late for step 12, where all then gather for a log. (seconds, utilisation) of the round of step 12."""
    model, rank = Still(), dist.get_rank()
    optimizer = SlowMoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), config)
    for step in range(1, 16):
        if (rank, step) == (1, 12):
            time.sleep(1)
        model.weight.grad = model.weight.detach() - rank
        optimizer.step()
        if step == 12:
            optimizer.outer_loop.meet_before_gathering()
    report = slowmo_hf.last_round(optimizer)
    return report.round, report.seconds, optimizer.outer_loop.account.spent.utilisation


def test_a_wait_for_a_round_at_a_log_is_in_its_report():
    (number, seconds, utilisation), _ = run_workers(_logs, 2, AHEAD)
    assert number == 2
    assert seconds > 0.9
    assert utilisation < 0.2


def test_all_hear_of_a_stop_at_the_same_step():
    for told in run_workers(_ahead, 2, AHEAD, 19, {(1, 11): asks_for_a_stop}):
        assert [stop for *_, stop in told] == [False] * 14 + [True] * 5


# ---- ranks that end, resume or load while a round is in flight ----


def some_steps(rank, config, steps):
    """An optimizer that has made them, on gradients of its own."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(300))
    optimizer = SlowMoOptimizer(torch.optim.SGD([weight], lr=0.1, momentum=0.9), config)
    draw = torch.Generator().manual_seed(rank)
    for _ in range(steps):
        weight.grad = torch.randn(300, generator=draw)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(("ends_at", "logs_at"), [(4, 4), (5, 5), (4, 5), (8, 9)])
def test_a_rank_that_has_ended_meets_one_that_gathers_before_the_update(how, ends_at, logs_at):
    """Neither waits for the other crosswise: the one that gathers is told that somebody has ended."""
    config = SlowMoConfig(sync_every=4, overlap_steps=3, **HOW[how])

    def work(rank):
        loop = some_steps(rank, config, ends_at if rank == 0 else logs_at).outer_loop
        all_go = loop.meet_before_gathering() if rank else None
        loop.end()
        loop.consensus.restore()
        return all_go, loop.attempted_steps

    assert run_in_process(work, 2) == [(None, logs_at), (False, logs_at)]


@pytest.mark.parametrize("how", HOW)
def test_on_another_number_of_workers_a_round_in_flight_has_reset_the_inner_state(tmp_path, how):
    config = SlowMoConfig(sync_every=4, overlap_steps=2, **HOW[how])

    def save(rank):
        loop = some_steps(rank, config, 5).outer_loop
        write_snapshot(str(tmp_path), loop, shared=rank == 0, objects={})

    def resume(rank):
        optimizer = some_steps(rank, config, 1)
        check_snapshot(str(tmp_path), optimizer.outer_loop)()
        return len(optimizer.state)

    run_in_process(save, 2)
    assert run_in_process(resume, 2) == [1, 1]
    assert run_in_process(resume, 3) == [0, 0, 0]


def test_a_view_in_flight_keeps_no_memory():
    """Its messages are beside those of a sharded round, and go."""

    def work(rank):
        config = SlowMoConfig(sync_every=4, overlap_steps=3, shard_slow_state=True, bucket_bytes=1024)
        optimizer = some_steps(rank, config, 8)
        loop = optimizer.outer_loop
        with slowmo_hf.consensus(optimizer):
            pass
        loop.in_flight.apply()
        return sum(memory.nbytes for memory in message_memory(loop))

    # To and from all, for 300 elements in two messages, each filled up to a multiple of two.
    assert run_in_process(work, 2) == [2 * 4 * 300] * 2


def test_a_round_that_was_refused_holds_nothing_back():
    """What its codes have not said belongs to a message that was never applied."""

    def work(rank):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(300))
        config = SlowMoConfig(sync_every=6, overlap_steps=3, compression="int8")
        optimizer = SlowMoOptimizer(torch.optim.SGD([weight], lr=0.1), config)
        draw = torch.Generator().manual_seed(rank)
        for step in range(1, 16):
            if (rank, step) == (1, 11):
                adds_a_parameter(None, optimizer)
            weight.grad = torch.randn(300, generator=draw)
            if step < 15:
                optimizer.step()
                continue
            with pytest.raises(ValueError, match=r"rank 1 .*, step 12: the parameter set changed after the start"):
                optimizer.step()
        held = optimizer.outer_loop.parts.slow.reduction.ends.residuals
        return [bool(one.any()) for of in held for one in (of.own, of.owned)]

    assert run_in_process(work, 2) == [[False, False]] * 2
