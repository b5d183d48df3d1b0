"""Many workers in one process: failures end all, none hangs; one call for all workers."""

from __future__ import annotations

import signal
import threading
import time

import pytest
import torch

import slowmo_hf
from pulls import pulled
from slowmo_hf import SlowMoConfig, SlowMoOptimizer, run_in_process, together
from slowmo_hf.wire.communicator import Communicator
from slowmo_hf.wire.job import processes_in_job, rank_in_job

# ---- failures ----


def _fails(rank):
    if rank == 2:
        raise ValueError("bad batch")
    pulled(SlowMoConfig(sync_every=2), rank, 4, 6)


def _returns_early(rank):
    pulled(SlowMoConfig(sync_every=2), rank, 4, 2 if rank == 1 else 6)


def _meets_again_when_ended(rank):
    communicator = Communicator(5, torch.device("cpu"))
    if rank == 1:
        raise ValueError("bad batch")
    try:
        communicator.gather_header([1.0])
    finally:
        communicator.gather_header([2.0])


def _meets_for_something_else(rank):
    communicator = Communicator(5, torch.device("cpu"))
    communicator.max_(torch.ones(1)) if rank == 0 else communicator.gather_header([1.0])


def _wait_for_each_others_messages(rank):
    communicator, mine = Communicator(5, torch.device("cpu")), torch.ones(2)
    communicator.finish(communicator.exchange(mine, [], [torch.empty(2)], [(rank + 1) % 4], 6))


def _sum_other_dtypes(rank):
    Communicator(5, torch.device("cpu")).start_sum_(torch.ones(2, dtype=torch.float64 if rank else torch.bfloat16))()


def _sends_less_than_is_expected(rank):
    communicator, into = Communicator(5, torch.device("cpu")), torch.empty(2)
    mine = torch.ones(1 if rank == 1 else 2)
    communicator.finish(communicator.exchange(mine, [(rank - 1) % 4], [into], [(rank + 1) % 4], 6))


def _has_other_gradients(rank):
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    weights[rank % 2].grad = torch.ones(1)
    SlowMoOptimizer(torch.optim.SGD(weights, lr=1.0), SlowMoConfig(base="all_reduce")).step()


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("work", "words"),
    [
        (
            _sum_other_dtypes,
            r"worker 0 waits for all_reduce \(sum\) of 2 elements \(torch.bfloat16\), .*of 2 elements "
            r"\(torch.float64\)",
        ),
        (
            _sends_less_than_is_expected,
            r"worker 1 sent 1 elements \(torch.float32\) in message 6, worker 0 expects 2 elements",
        ),
        (
            _has_other_gradients,
            "averages the gradients of all trainable parameters, as DDP does, and 1 of 2 have none",
        ),
        (_meets_again_when_ended, "worker 1 failed: ValueError: bad batch"),
        (
            _meets_for_something_else,
            r"worker 0 waits for all_reduce \(max\) of 1 elements .*worker 1 waits for all_gather of 1 elements",
        ),
        (
            _wait_for_each_others_messages,
            "worker 0 waits for message 6 from worker 1; .*worker 3 waits for message 6 from worker 0",
        ),
        (_fails, "worker 2 failed: ValueError: bad batch"),
        (_returns_early, "all workers wait for each other: worker 0 waits for all_gather .*worker 1 has returned"),
    ],
)
def test_a_failure_ends_all_workers(work, words):
    before = threading.active_count()
    with pytest.raises(RuntimeError, match=words) as raised:
        run_in_process(work, 4)
    assert threading.active_count() == before, "all have ended"
    assert isinstance(raised.value.__cause__, ValueError) == ("bad batch" in words)


def test_workers_are_unwound_one_at_a_time():
    inside, most = [], []

    def work(rank):
        communicator = Communicator(5, torch.device("cpu"))
        try:
            if rank == 3:
                raise ValueError("bad batch")
            communicator.gather_header([1.0])
        finally:
            inside.append(rank)
            time.sleep(0.01)
            most.append(len(inside))
            inside.remove(rank)

    with pytest.raises(RuntimeError, match="worker 3 failed"):
        run_in_process(work, 4)
    assert most == [1] * 4


@pytest.mark.timeout(60)
def test_an_interrupt_ends_all_workers():
    """Worker 0, whose thread is the first one waited for, computes on for a while after the signal."""
    threads, generator, came = threading.enumerate(), torch.get_rng_state(), []

    def work(rank):
        communicator = Communicator(5, torch.device("cpu"))
        for step in range(1000):
            if (rank, step) == (0, 3):
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            if step >= 3:
                time.sleep(0.2 if rank == 0 else 0.01)
                torch.rand(1)
            communicator.gather_header([1.0])
            came.append(step)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            run_in_process(work, 4)
    finally:
        signal.signal(signal.SIGINT, before)
    assert 2 <= max(came) < 999
    assert threading.enumerate() == threads
    assert torch.equal(torch.get_rng_state(), generator)


def test_nothing_is_shared_by_accident():
    """
    Worker 1 comes last to the meeting, takes its copies at once, and goes on to change what it gave.
    """

    def work(rank):
        communicator, given = Communicator(5, torch.device("cpu")), {"numbers": [rank]}
        got = communicator.gather_objects(given)
        given["numbers"].append("later")
        return got

    assert run_in_process(work, 2) == [[{"numbers": [0]}, {"numbers": [1]}]] * 2


def test_the_start_table_says_where_workers_are(caplog):
    caplog.set_level("INFO", logger="slowmo_hf")
    run_in_process(lambda rank: pulled(SlowMoConfig(sync_every=2), rank, 3, 2), 3)
    assert caplog.text.count("3 workers, in this process:") == 1


def test_what_is_refused():
    with pytest.raises(ValueError, match="workers must be >= 1, got 0"):
        run_in_process(lambda rank: None, 0)
    with pytest.raises(RuntimeError, match="called by one of its own workers"):
        run_in_process(lambda rank: run_in_process(lambda inner: None, 2), 2)
    with pytest.raises(RuntimeError, match="processes_per_worker must be 1 inside run_in_process"):
        run_in_process(lambda rank: pulled(SlowMoConfig(processes_per_worker="2"), rank, 4, 2), 4)


def test_the_job_is_seen_inside_and_gone_outside():
    assert run_in_process(lambda rank: (rank_in_job(), processes_in_job()), 3) == [(0, 3), (1, 3), (2, 3)]
    assert (rank_in_job(), processes_in_job()) == (0, 1)


def test_join_works_inside():
    """Uneven data, as between processes: 3 steps here, 1 there, one round of 3; weights by local steps."""

    def work(rank):
        weight = torch.nn.Parameter(torch.full((1,), 4.0, dtype=torch.float64))
        optimizer = SlowMoOptimizer(torch.optim.SGD([weight], lr=1.0), SlowMoConfig.local_sgd(3))
        with slowmo_hf.join(optimizer):
            for _ in range(3 - 2 * rank):
                weight.grad = torch.ones(1, dtype=torch.float64)
                optimizer.step()
        return weight.item()

    assert run_in_process(work, 2) == pytest.approx([4 - (3 * 3 + 1 * 1) / 4] * 2)


# ---- together ----


def test_one_call_serves_all_workers():
    """Items by rank, an entry for each; a call a round, in the turn of the worker that comes last."""
    calls = []

    def squares(items):
        calls.append(items)
        return [item**2 for item in items]

    def work(rank):
        return [together(squares, 10 * step + rank) for step in range(3)]

    assert run_in_process(work, 4) == [[(10 * step + rank) ** 2 for step in range(3)] for rank in range(4)]
    assert calls == [[10 * step + rank for rank in range(4)] for step in range(3)]
    assert run_in_process(lambda rank: together(squares, 5), 1) == [25]


def test_nothing_is_copied_and_generators_stay_each_workers_own():
    """What the one call draws is drawn from the last worker's generator; the others' go on as if alone."""
    given = [torch.zeros(2) for _ in range(3)]

    def work(rank):
        torch.manual_seed(rank)
        got = together(lambda items: [(items[rank], torch.rand(1).item()) for rank in range(len(items))], given[rank])
        return got, torch.rand(1).item()

    for rank, ((got, _), drawn) in enumerate(run_in_process(work, 3)):
        assert got is given[rank]
        alone = torch.Generator().manual_seed(rank)
        skipped = 3 if rank == 2 else 0
        assert drawn == pytest.approx(torch.rand(skipped + 1, generator=alone)[-1].item())


def _the_call_fails(items):
    raise ValueError("bad batch")


def _catches_it(rank):
    try:
        return together(_the_call_fails, rank)
    except ValueError:
        return together(lambda items: items, rank)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("work", "words", "cause"),
    [
        (lambda rank: together(_the_call_fails, rank), "^together failed: ValueError: bad batch$", ValueError),
        (_catches_it, "^together failed: ValueError: bad batch$", ValueError),
        (lambda rank: together(lambda items: items[1:], rank), "^together failed: ValueError: zip", ValueError),
        (
            lambda rank: [together(lambda items: items, rank) for _ in range(3 - (rank == 2))],
            r"worker 0 waits for together, number 2 of workers \[0, 1, 2, 3\]; .*worker 2 has returned",
            type(None),
        ),
        (
            lambda rank: together(list, rank) if rank else Communicator(5, torch.device("cpu")).gather_objects(rank),
            "all workers wait for each other: worker 0 waits for all_gather.*; worker 1 waits for together, number 0",
            type(None),
        ),
    ],
    ids=["fails", "is caught", "too few entries", "one time less", "something else"],
)
def test_a_call_that_cannot_serve_all_ends_the_job(work, words, cause):
    before = threading.active_count()
    with pytest.raises(RuntimeError, match=words) as raised:
        run_in_process(work, 4)
    assert type(raised.value.__cause__) is cause
    assert threading.active_count() == before, "all have ended"


def test_together_is_for_workers_alone():
    with pytest.raises(RuntimeError, match="together must be called by a worker of run_in_process"):
        together(list, 1)


def test_a_workers_value_error_is_one_for_the_caller_too():
    def work(rank):
        if rank:
            raise ValueError("no")
        return SlowMoConfig()

    with pytest.raises(ValueError, match="worker 1 failed: ValueError: no") as told:
        run_in_process(work, 2)
    assert isinstance(told.value, RuntimeError)
    with pytest.raises(RuntimeError, match="worker 0 failed: KeyError") as told:
        run_in_process(lambda rank: {}[rank], 2)
    assert not isinstance(told.value, ValueError)
