"""An optimizer that trains from a later step on (a discriminator behind `disc_start`): saved, resumed and finished."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

import slowmo_hf
from harness import patience, run_workers
from slowmo_hf import SlowMoConfig, SlowMoOptimizer, run_in_process
from tiny import Heard, equal, values

LATE = 5  # the second network's first step


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 1, dtype=torch.float64)
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        self.seen += x.abs().mean() * self.training
        return self.linear(x).square().mean()


def program(folder, first, last, saves=(), resume=None):
    """Both networks' weights at the end; the second trains from step 5 on, and both go on from a checkpoint."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    bare = [Network(), Network()]
    config = SlowMoConfig(sync_every=3, timeout_seconds=patience(20))
    inner = [torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.5) for network in bare]
    prepared = accelerator.prepare(*bare, *(SlowMoOptimizer(one, config) for one in inner))
    networks, optimizers = prepared[:2], prepared[2:]
    if resume is not None:
        accelerator.load_state(f"{folder}/{resume}")
    if first == last:
        accelerator.save_state(f"{folder}/again")
        return []
    for step in range(first, last):
        draw = torch.Generator().manual_seed(100 * step + dist.get_rank())
        for network, optimizer in zip(networks[: 1 + (step >= LATE)], optimizers, strict=False):
            accelerator.backward(network(torch.randn(4, 3, generator=draw, dtype=torch.float64)))
            optimizer.step()
            optimizer.zero_grad()
        if step + 1 in saves:
            accelerator.save_state(f"{folder}/{step + 1}")
    local = [values(network) for network in bare]
    for optimizer in optimizers:
        slowmo_hf.finish(optimizer)
    return [*local, *(values(network) for network in bare)]


def in_parts(folder):
    """In one go; saved at step 2, resumed and saved at 4, where the second still waits, and resumed again."""
    whole = program(folder, 0, 9)
    program(f"{folder}/parts", 0, 2, saves=[2])
    program(f"{folder}/parts", 2, 4, saves=[4], resume=2)
    return whole, program(f"{folder}/parts", 4, 9, resume=4)


def test_one_that_waits_is_saved(tmp_path):
    for whole, resumed in run_workers(in_parts, 2, str(tmp_path)):
        for right, found in zip(whole, resumed, strict=True):
            assert equal(right, found), "local weights, and the average"


def at_once(folder):
    """Saved again before any pass: the checkpoint is the one that was loaded."""
    whole = program(folder, 0, 9)
    program(f"{folder}/parts", 0, 7, saves=[7])
    program(f"{folder}/parts", 7, 7, resume=7)
    return whole, program(f"{folder}/parts", 7, 9, resume="again")


def test_what_is_loaded_is_saved_again_before_a_step(tmp_path):
    for whole, resumed in run_workers(at_once, 2, str(tmp_path)):
        for right, found in zip(whole, resumed, strict=True):
            assert equal(right, found)


def end_training(accelerator):
    """Without its last line, which destroys the process group of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "destroy_process_group", lambda *args: None)
        accelerator.end_training()


def frozen_for_good(kind):
    """The second network is frozen, and never called with gradients."""
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(dist.get_rank())  # the start would make the weights equal
    network = Network()
    inner = torch.optim.SGD(network.parameters(), lr=0.1)
    network, optimizer = accelerator.prepare(network, SlowMoOptimizer(inner, SlowMoConfig(sync_every=3)))
    network.requires_grad_(False)
    if kind == "end_training":
        end_training(accelerator)
    else:
        slowmo_hf.finish(optimizer)
    return [p.requires_grad for p in network.parameters()]


@pytest.mark.parametrize("kind", ["end_training", "finish"])
def test_one_that_never_trained_is_finished(kind):
    for kept in run_workers(frozen_for_good, 2, kind):
        assert not any(kept)


def second_try():
    """The first attempt has failed; the second trains, and ends, while its error is still handled."""
    try:
        raise RuntimeError("out of memory")
    except RuntimeError:
        AcceleratorState._reset_state(True)
        accelerator = Accelerator(cpu=True)
        torch.manual_seed(0)
        bare = Network()
        config = SlowMoConfig(sync_every=4, timeout_seconds=patience(20))
        model, optimizer = accelerator.prepare(
            bare, SlowMoOptimizer(torch.optim.SGD(bare.parameters(), lr=0.1), config)
        )
        for step in range(6):
            accelerator.backward(model(torch.full((2, 3), 1.0 + step + dist.get_rank(), dtype=torch.float64)))
            optimizer.step()
            optimizer.zero_grad()
        local = values(bare)
        end_training(accelerator)
        return local, values(bare)


def test_a_second_try_inside_an_except_block_ends_on_the_average():
    (first, end), (second, other) = run_workers(second_try, 2)
    assert equal(end, other)
    assert not equal(first, second)


def dropped(finish):
    def work(rank):
        model = Network()
        optimizer = SlowMoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), SlowMoConfig(sync_every=3))
        for step in range(4):
            model(torch.full((2, 3), 1.0 + step + rank, dtype=torch.float64)).backward()
            optimizer.step()
        if finish:
            slowmo_hf.finish(optimizer)

    with Heard() as heard:
        run_in_process(work, 2)
    return heard.about("training ended at step 4, 1 steps after the last round", "WARNING")


@pytest.mark.parametrize("finish", [False, True])
def test_one_that_goes_inside_a_round_is_told_once(finish):
    """A program in a function: its optimizer is gone before its process ends, and so are the workers' own weights."""
    assert len(dropped(finish)) == (0 if finish else 1)


class Tuned(torch.optim.SGD):
    """As Prodigy: a number in its groups follows the worker's gradients."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["d"] = group.get("d", 1.0) + sum(p.grad.abs().sum().item() for p in group["params"])
        return super().step(closure)


def test_numbers_that_an_optimizer_tunes_may_differ_at_a_second_stage():
    def work(rank):
        torch.manual_seed(0)
        model, ds = Network(), []
        inner = Tuned(model.parameters(), lr=0.1)
        for _ in range(2):
            optimizer = SlowMoOptimizer(inner, SlowMoConfig(sync_every=2, timeout_seconds=patience(20)))
            for step in range(3):
                model(torch.full((2, 3), 1.0 + step + rank, dtype=torch.float64)).backward()
                optimizer.step()
                optimizer.zero_grad()
            slowmo_hf.finish(optimizer)
            ds.append(inner.param_groups[0]["d"])
        return ds, values(model)

    (first, model), (second, other) = run_in_process(work, 2)
    assert first[0] != second[0], "each worker has its own"
    assert equal(model, other)
