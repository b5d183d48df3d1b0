"""Many workers in one process: the same numbers as in as many processes, bit for bit from run to run."""

from __future__ import annotations

import random
from functools import partial

import numpy as np
import pytest
import torch
from accelerate import Accelerator

import slowmo_hf
from harness import run_workers
from mixing import mixing_matrix
from pulls import PULLS, pulled
from reference import gossip_reference, slowmo_reference
from slowmo_hf import SlowMoConfig, SlowMoOptimizer, run_in_process
from slowmo_hf.rules import GOSSIP_BASES
from slowmo_hf.wire.gossip import make_topology
from slowmo_hf.wire.job import rank_in_job
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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_sixteen_workers_by_hand():
    """
    Local SGD with slow momentum on 16 quadratics: after a round all hold anchor - v, v = beta v + mean displacement
    (PAPER form).
    """
    tau, beta, lr = 4, 0.5, 0.1
    runs = run_in_process(lambda rank: pulled(SlowMoConfig(sync_every=tau, outer_momentum=beta), rank, 16, 12, lr), 16)
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
        mixing, staleness = (
            partial(mixing_matrix, make_topology(config, 16)),
            config.staleness if config.base == "osgp" else 0,
        )
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
