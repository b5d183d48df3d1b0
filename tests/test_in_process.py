"""Many workers in one process: the same numbers as in as many processes, bit for bit from run to run, and no hang."""

from __future__ import annotations

import random
import signal
import threading
import time

import numpy as np
import pytest
import torch
from accelerate import Accelerator

import slowmo_hf
from harness import run_workers
from reference import gossip_reference, slowmo_reference
from slowmo_hf import SlowMoConfig, SlowMoOptimizer, run_in_process, together
from slowmo_hf.config import GOSSIP_BASES
from slowmo_hf.wire.communicator import Communicator
from slowmo_hf.wire.gossip import make_topology
from slowmo_hf.wire.job import processes_in_job, rank_in_job
from tiny import Regression, Rows, two_groups, values, warmup_and_decay

STEPS = 11
CASES = {
    "local sgd": (SlowMoConfig(sync_every=4, outer_momentum=0.6), "sgd"),
    "local adam": (SlowMoConfig(sync_every=4, outer_momentum=0.6), "adamw"),
    "double averaging": (SlowMoConfig.local_sgd(3, inner_state="average"), "sgd"),
    "diloco": (SlowMoConfig.diloco(sync_every=4), "adamw"),
    "sgp": (SlowMoConfig(base="sgp", sync_every=4), "sgd"),
    "sgp, no average": (SlowMoConfig(base="sgp", sync_every=4, exact_average=False), "sgd"),
    "sgp, two peers": (SlowMoConfig(base="sgp", sync_every=4, peers=2), "adamw"),
    "osgp": (SlowMoConfig(base="osgp", sync_every=5, staleness=2), "sgd"),
    "dpsgd": (SlowMoConfig(base="dpsgd", sync_every=4), "sgd"),
    "lookahead": (SlowMoConfig(sync_every=3, outer_lr=0.5, outer_momentum=0.0, inner_state="maintain"), "sgd"),
    "dpsgd, double averaging": (SlowMoConfig(base="dpsgd", sync_every=4, inner_state="average"), "adamw"),
    "all_reduce": (SlowMoConfig(base="all_reduce", sync_every=4), "sgd"),
    "all_reduce alone": (SlowMoConfig(base="all_reduce", outer_momentum=0.0), "adamw"),
}


def _train(config, name, rank, wrap=lambda model: model):
    """Parameters after every step, what a look shows after the last, bytes."""
    model, rows = Regression(), Rows(STEPS * 16)
    optimizer = SlowMoOptimizer(two_groups(model, name, 0.05), config)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer.inner_optimizer, warmup_and_decay)
    called, after, sent = wrap(model), [], []
    for step in range(STEPS):
        start = 16 * step + 4 * rank
        called(rows.x[start : start + 4], rows.y[start : start + 4])["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        after.append(values(model))
        report = slowmo_hf.last_round(optimizer)
        sent.append(report.bytes_sent if report else 0)
    with slowmo_hf.consensus(optimizer):
        shown = values(model)
    return after, shown, sent


def _in_processes():
    def wrap(model):
        return torch.nn.parallel.DistributedDataParallel(model)

    return {case: _train(config, name, rank_in_job(), wrap) for case, (config, name) in CASES.items()}


@pytest.fixture(scope="module")
def processes():
    return run_workers(_in_processes, 4)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_threads_train_what_processes_do(processes, case):
    config, name = CASES[case]
    threads = run_in_process(lambda rank: _train(config, name, rank), 4)
    for (after, shown, sent), right in zip(threads, processes, strict=True):
        right_after, right_shown, right_sent = right[case]
        for mine, other in zip([*after, shown], [*right_after, right_shown], strict=True):
            for key in mine:
                torch.testing.assert_close(mine[key], other[key], rtol=1e-6, atol=1e-6)
        if config.base != "all_reduce":  # DDP's bytes are its own
            assert sent == right_sent
            assert max(sent) > 0


PULLS = torch.linspace(-1, 1, 16).double()


def _pull(config, rank, workers, steps, lr=0.1):
    """A quadratic per worker in one number; every worker pulls to a place of its own."""
    weight = torch.nn.Parameter(torch.full((1,), 2.0, dtype=torch.float64))
    optimizer = SlowMoOptimizer(torch.optim.SGD([weight], lr=lr), config)
    after = []
    for _ in range(steps):
        weight.grad = weight.detach() - PULLS[rank]
        optimizer.step()
        after.append(weight.detach().clone())
    return torch.stack(after)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_sixteen_workers_by_hand():
    """
    Local SGD with slow momentum on 16 quadratics: after a round all hold anchor - v, v = beta v + mean displacement
    (PAPER form).
    """
    tau, beta, lr = 4, 0.5, 0.1
    runs = run_in_process(lambda rank: _pull(SlowMoConfig(sync_every=tau, outer_momentum=beta), rank, 16, 12, lr), 16)
    anchor, velocity = 2.0, 0.0
    for t in range(3):
        ends = []
        for pull in PULLS.tolist():
            x = anchor
            for _ in range(tau):
                x -= lr * (x - pull)
            ends.append(x)
        velocity = beta * velocity + anchor - sum(ends) / 16
        anchor -= velocity
        for run in runs:
            assert run[tau * (t + 1) - 1].item() == pytest.approx(anchor, abs=1e-12)


SIXTEEN = [
    SlowMoConfig(sync_every=4, outer_lr=0.8, outer_momentum=0.6),
    SlowMoConfig.local_sgd(3, inner_state="average"),
    SlowMoConfig(base="sgp", sync_every=4, outer_momentum=0.6, inner_state="maintain"),
    SlowMoConfig(base="sgp", sync_every=5, exact_average=False, inner_state="maintain"),
    SlowMoConfig(base="osgp", sync_every=6, staleness=2, inner_state="maintain"),
    SlowMoConfig(base="dpsgd", sync_every=5, inner_state="reset"),
]


def _noisy(rank):
    """(parameters, optimizer, backward, schedule) of a noisy quadratic; momentum, and a learning rate that falls."""
    weights = [
        torch.nn.Parameter(torch.full((3,), 2.0, dtype=torch.float64)),
        torch.nn.Parameter(torch.ones(2, 2, dtype=torch.float64)),
    ]
    optimizer = torch.optim.SGD(weights, lr=0.1, momentum=0.9)

    def backward(step):
        noise = torch.Generator().manual_seed(100 * rank + step)
        for weight in weights:
            weight.grad = (
                weight.detach() - PULLS[rank] + torch.randn(weight.shape, generator=noise, dtype=torch.float64)
            )

    return weights, optimizer, backward, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9).step


def _ends_of_sixteen(config, rank):
    weights, inner, backward, schedule = _noisy(rank)
    optimizer = SlowMoOptimizer(inner, config)
    for step in range(14):
        backward(step)
        optimizer.step()
        schedule()
    return [weight.detach().clone() for weight in weights]


@pytest.mark.slow
@pytest.mark.parametrize("config", SIXTEEN, ids=lambda config: f"{config.base} {config.sync_every}")
def test_sixteen_workers_against_the_paper(config):
    ends = run_in_process(lambda rank: _ends_of_sixteen(config, rank), 16)
    policy = config.inner_state if config.inner_state != "auto" else "reset"
    run = (_noisy, 16, 14, config.sync_every, config.outer_lr, config.outer_momentum, policy)
    if config.base in GOSSIP_BASES:
        mixing, staleness = make_topology(config, 16).mixing_matrix, config.staleness if config.base == "osgp" else 0
        workers = gossip_reference(*run, mixing=mixing, staleness=staleness, exact_average=config.exact_average)
        right = [worker.z for worker in workers]
    else:
        right = slowmo_reference(*run)
    for mine, other in zip(ends, right, strict=True):
        for weight, reference in zip(mine, other, strict=True):
            torch.testing.assert_close(weight, reference, rtol=0, atol=1e-12)


def test_a_closure_s_gradients_are_averaged():
    """Gradients 0, 1, 2 are made inside step: every worker takes their mean, twice."""

    def work(rank):
        weight = torch.nn.Parameter(torch.zeros(1))
        optimizer = SlowMoOptimizer(torch.optim.SGD([weight], lr=1.0), SlowMoConfig(base="all_reduce", sync_every=4))

        def closure():
            weight.grad = torch.full((1,), float(rank))
            return 7.0 + rank

        return [optimizer.step(closure) for _ in range(2)], weight.item()

    assert run_in_process(work, 3) == [([7.0 + rank] * 2, -2.0) for rank in range(3)]


def _dropped(rank):
    model = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Dropout(0.5), torch.nn.Linear(6, 1))
    optimizer = SlowMoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), SlowMoConfig(base="sgp", sync_every=3))
    torch.manual_seed(rank)
    drawn = []
    for _ in range(7):
        model(torch.ones(2, 6)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        drawn.append((torch.rand(1).item(), random.random(), np.random.rand()))
    return values(model), drawn


def test_runs_repeat_and_generators_are_each_workers_own():
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    before = torch.get_rng_state()
    first = run_in_process(_dropped, 3)
    assert torch.equal(torch.get_rng_state(), before), "the caller's are left alone"
    second = run_in_process(_dropped, 3)
    alone = run_in_process(_dropped, 1)
    for (mine, drawn), (other, again) in zip(first, second, strict=True):
        assert drawn == again
        assert all(torch.equal(mine[name], other[name]) for name in mine)
    assert first[0][1] == alone[0][1], "what others draw does not matter"
    assert first[0][1] != first[1][1]


SAVED_AT, LAST = 5, 9  # steps: inside a round of 4, and the run's end


def _saved_and_gone_on_with(config, rank, folder, begin):
    torch.manual_seed(7 if begin else 3)  # others than the run that is gone on with had
    model = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Dropout(0.5), torch.nn.Linear(6, 1))
    optimizer = SlowMoOptimizer(torch.optim.AdamW(model.parameters(), lr=0.1), config)
    accelerator = Accelerator(cpu=True)
    accelerator.register_for_checkpointing(model)
    slowmo_hf.register_for_checkpointing(accelerator, optimizer)
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(100 * begin + rank)
    if begin:
        accelerator.load_state(folder)
    drawn = []
    for step in range(begin, LAST):
        rows = torch.full((2, 6), float(rank + step))
        model(rows + torch.rand(1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        drawn.append((torch.rand(1).item(), random.random(), np.random.rand()))
        if step + 1 == SAVED_AT:
            accelerator.save_state(folder)
    return values(model), drawn


@pytest.mark.parametrize("case", ["local adam", "sgp", "sgp, no average", "all_reduce", "all_reduce alone"])
def test_a_state_saved_by_workers_here_goes_on_bit_for_bit(case, tmp_path):
    """Each with its own weights, inner optimizer and dropout; plain all-reduce too, which Accelerate has not taken."""
    config = CASES[case][0]
    whole = run_in_process(lambda rank: _saved_and_gone_on_with(config, rank, str(tmp_path), 0), 3)
    again = run_in_process(lambda rank: _saved_and_gone_on_with(config, rank, str(tmp_path), SAVED_AT), 3)
    for (mine, drawn), (other, then) in zip(whole, again, strict=True):
        assert then == drawn[SAVED_AT:]
        for name in mine:
            assert torch.equal(mine[name], other[name]), name
    slowmo_hf.verify_checkpoint(tmp_path)


def test_a_forged_state_of_generators_is_refused(tmp_path):
    config, name = CASES["all_reduce alone"][0], tmp_path / "slowmo" / "generators_1.pt"
    run_in_process(lambda rank: _saved_and_gone_on_with(config, rank, str(tmp_path), 0), 2)
    torch.save({**torch.load(name, weights_only=True), "cpu": torch.zeros(3)}, name)
    with pytest.raises(ValueError, match=r"generators_1.pt holds no state of random generators .*Resume from another"):
        run_in_process(lambda rank: _saved_and_gone_on_with(config, rank, str(tmp_path), SAVED_AT), 2)


def _fails(rank):
    if rank == 2:
        raise ValueError("bad batch")
    _pull(SlowMoConfig(sync_every=2), rank, 4, 6)


def _returns_early(rank):
    _pull(SlowMoConfig(sync_every=2), rank, 4, 2 if rank == 1 else 6)


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
    run_in_process(lambda rank: _pull(SlowMoConfig(sync_every=2), rank, 3, 2), 3)
    assert caplog.text.count("3 workers, in this process:") == 1


def test_what_is_refused():
    with pytest.raises(ValueError, match="workers must be >= 1, got 0"):
        run_in_process(lambda rank: None, 0)
    with pytest.raises(RuntimeError, match="called by one of its own workers"):
        run_in_process(lambda rank: run_in_process(lambda inner: None, 2), 2)
    with pytest.raises(RuntimeError, match="processes_per_worker must be 1 inside run_in_process"):
        run_in_process(lambda rank: _pull(SlowMoConfig(processes_per_worker="2"), rank, 4, 2), 4)


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
