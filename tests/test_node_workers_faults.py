"""Faults and state of workers of two processes."""

import re
import tempfile
import time

import pytest
import torch
import torch.distributed as dist

from harness import patience, run_workers
from node_worker import LR, backward, pairs
from slowmo_hf import SlowMoOptimizer, register_for_checkpointing
from tiny import (
    Regression,
    Rows,
    equal,
    two_groups,
    values,
)

# ---- faults: an error on one process is an error on all, in time ----


def net(config, dtype=torch.float32, name="sgd"):
    """(accelerator, the bare model, the prepared one, the prepared optimizer)."""
    from accelerate import Accelerator

    accelerator, bare = Accelerator(cpu=True), Regression(dtype)
    model, optimizer = accelerator.prepare(bare, SlowMoOptimizer(two_groups(bare, name, LR), config))
    return accelerator, bare, model, optimizer


def _fault(spoil, step_of_fault, base):
    """(step, error, seconds it took) where `spoil(rank, bare model, outer loop)` acts before a step; tau is 3."""
    accelerator, bare, model, optimizer = net(pairs(base=base, sync_every=3, timeout_seconds=5))
    rows = Rows(300, torch.float32)
    for step in range(1, 7):
        backward(accelerator, model, rows, step)
        if step == step_of_fault:
            spoil(dist.get_rank(), bare, optimizer.optimizer.outer_loop)
        start = time.perf_counter()
        try:
            optimizer.step()
            optimizer.zero_grad()
        except (ValueError, RuntimeError) as error:
            return step, f"{type(error).__name__}: {error}", time.perf_counter() - start
    return None


def _add_a_group_on_a_follower(rank, bare, loop):
    if rank == 3:
        loop.inner_optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "lr": LR})


def _freeze_on_the_first_follower(rank, bare, loop):
    if rank == 1:
        bare.head.bias.requires_grad_(False)


def _count_more_in_one_worker(rank, bare, loop):
    loop.clock.attempted_steps += 3 * (rank >= 2)


def _count_more_on_a_follower(rank, bare, loop):
    loop.clock.attempted_steps += 3 * (rank == 3)


class Boom:
    """A reduction that fails in whatever it is asked to do at a round."""

    def __getattr__(self, name):
        raise RuntimeError("boom")


def _boom_on_one(rank, bare, loop):
    """Where a script that fails has its last word: nobody else is told of an error that is caught."""
    if rank == 2:
        loop.parts.slow.reduction = Boom()
        loop.workers.roll_call.leave("RuntimeError: boom")


def _without_ddp():
    """
    A model that was not prepared: nobody averages its gradients inside the worker. By the first forward pass, and
    without one.
    """
    found = []
    for called in (True, False):
        model, rows = Regression(torch.float32), Rows(8, torch.float32)
        optimizer = SlowMoOptimizer(two_groups(model, "sgd", LR), pairs(timeout_seconds=5))
        try:
            if called:
                model(rows.x, rows.y)["loss"].backward()
            optimizer.step()
            found.append("no error")
        except RuntimeError as error:
            found.append(str(error))
    return found


def _faults():
    changed = [
        _fault(spoil, 6, base)
        for spoil in (_add_a_group_on_a_follower, _freeze_on_the_first_follower)
        for base in ("local_sgd", "sgp")
    ]
    counted = _fault(_count_more_in_one_worker, 2, "local_sgd")
    follower_counted = _fault(_count_more_on_a_follower, 2, "local_sgd")
    return changed, counted, follower_counted, _without_ddp(), _fault(_boom_on_one, 6, "local_sgd")


@pytest.fixture(scope="module")
def faults():
    return run_workers(_faults, 4)


@pytest.mark.slow
def test_a_parameter_set_changed_on_a_follower_is_an_error_on_every_rank(faults):
    for case in range(4):
        follower = 3 - case // 2 * 2
        for changed, *_ in faults:
            step, words, seconds = changed[case]
            assert (step, seconds < patience(5)) == (6, True), "at the round, in time"
            assert re.match(
                rf"ValueError: rank {follower} on \S+, step 6: the parameter set changed after the start", words
            ), words
            assert words == faults[0][0][case][1]


@pytest.mark.slow
def test_different_steps_are_an_error_on_every_rank(faults):
    where = r"rank 0 on \S+, rank 1 on \S+ at step 3, the round; rank 2 on \S+, rank 3 on \S+ at step 6, the round"
    for _, (step, words, seconds), *_ in faults:
        assert (step, seconds < patience(5)) == (3, True)
        assert re.match(f"RuntimeError: ranks met at different places: {where}", words)


@pytest.mark.slow
def test_different_steps_inside_a_worker_are_an_error_on_every_rank(faults):
    for _, _, fault, *_ in faults:
        assert fault is not None, "nobody noticed"
        step, words, seconds = fault
        assert (step, seconds < patience(5)) == (3, True)
        assert re.search(r"ranks met at different places: .*rank 3 on \S+ at step 6, the round", words)


@pytest.mark.slow
def test_a_worker_of_several_processes_needs_ddp(faults):
    for *_, words, _ in faults:
        assert all("needs a DistributedDataParallel wrapper that averages gradients" in word for word in words), words


@pytest.mark.slow
def test_an_error_of_one_process_reaches_all(faults):
    """
    Rank 2 fails in the second round: its counterpart misses it, its mate and the other worker's second process hear
    who it was.
    """
    assert faults[2][-1][:2] == (6, "RuntimeError: boom")
    for fault in (faults[0], faults[1], faults[3]):
        step, words, seconds = fault[-1]
        assert step == 6
        assert re.match(r"RuntimeError: rank 2 on \S+ left at step 5: RuntimeError: boom\. ", words), words
        assert seconds < patience(9)


# ---- state: each its own ----


STATES = [  # (inner optimizer, settings); what SGD forgets at a round's end need not be saved for every worker
    ("sgd", pairs(sync_every=3)),
    ("sgd", pairs(sync_every=3, outer_optimizer="torch.optim.Adam", outer_lr=0.1, inner_state="reset")),
    ("sgd", pairs(sync_every=3, base="osgp")),
    ("adamw", pairs(sync_every=3)),
    ("sgd", pairs(sync_every=3, outer_optimizer="tiny.WholeAdam", outer_lr=0.1, inner_state="reset")),
]


def _resumed(case):
    """
    The weights after each of 4 further steps: of the run itself, and of runs that take its state up at step 3 in
    several ways.
    """
    name, config = case
    rows, ways = Rows(300), {}

    def train(run, first, last):
        accelerator, bare, model, optimizer = run
        path = []
        for step in range(first, last):
            backward(accelerator, model, rows, step)
            optimizer.step()
            optimizer.zero_grad()
            path.append(values(bare))
        return path

    original = net(config, torch.float64, name)
    train(original, 0, 3)
    accelerator, _, _, optimizer = original
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    register_for_checkpointing(accelerator, optimizer)
    accelerator.save_state(folder[0])
    with pytest.raises(RuntimeError, match="2 processes per worker: each has a part of it"):
        optimizer.state_dict()
    slow = optimizer.optimizer.outer_loop.parts.slow
    slow_elements = sum(flat.numel() for flat in [*(item.flat for item in slow.anchors), *slow.update.velocities])
    ways["itself"] = train(original, 3, 7)
    for started in (False, True):
        run = net(config, torch.float64, name)
        register_for_checkpointing(run[0], run[3])
        if started:
            train(run, 20, 22)
        run[0].load_state(folder[0])
        ways["started" if started else "new"] = train(run, 3, 7)
    return ways, slow_elements


def _all_resumed():
    return [_resumed(case) for case in STATES]


@pytest.fixture(scope="module")
def resumed():
    return run_workers(_all_resumed, 4)


@pytest.mark.slow
def test_each_process_holds_its_part_of_the_slow_state(resumed):
    trainable = sum(p.numel() for p in Regression().parameters())
    for index, (_, config) in enumerate(STATES):
        copies = 2 if config.outer_optimizer == "slow_momentum" else 1  # anchors and velocities
        halves = [copies * -(-trainable // 2), copies * (trainable // 2)]
        if config.outer_optimizer == "tiny.WholeAdam":  # of which nobody knows that a part of a tensor is enough
            halves = [trainable, 0]
        assert [result[index][1] for result in resumed] == [*halves, *halves]


@pytest.mark.slow
def test_an_outer_optimizer_on_parts_is_that_on_whole_tensors(resumed):
    """Adam, cut; and a class of one's own, the same, that keeps tensors whole."""
    for result in resumed:
        for cut, whole in zip(result[1][0]["itself"], result[4][0]["itself"], strict=True):
            assert all((cut[name] - whole[name]).abs().max() <= 1e-12 for name in cut)


EVERY_WAY = [
    pytest.param(way, index, id=f"{name}, {config.base}, {config.outer_optimizer}: {way}")
    for way in ("new", "started")
    for index, (name, config) in enumerate(STATES)
]


@pytest.mark.slow
@pytest.mark.parametrize(("way", "index"), EVERY_WAY)
def test_a_run_goes_on_bit_for_bit_from_its_state(resumed, way, index):
    for rank, result in enumerate(resumed):
        ways, mates = result[index][0], resumed[rank // 2 * 2][index][0]
        for step, weights in enumerate(ways[way]):
            assert equal(weights, mates[way][step]), f"rank {rank} parted from its worker's first"
            assert equal(weights, ways["itself"][step]), (rank, step + 4)
