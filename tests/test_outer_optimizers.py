"""Outer optimizers of torch: any does what it does on the pseudo-gradient, or is told at the start."""

from __future__ import annotations

import re

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from harness import patience, run_workers
from slowmo_hf import SlowMoConfig, SlowMoOptimizer, last_round, run_in_process
from tiny import Regression, Rows, WholeAdam, equal, error_of, values

SGD = torch.optim.SGD

OUTER = {
    "torch.optim.LBFGS": "TypeError: .*closure",
    "torch.optim.SparseAdam": "RuntimeError: SparseAdam does not support dense gradients",
    **({"torch.optim.Muon": "ValueError: Muon only supports 2D parameters"} if hasattr(torch.optim, "Muon") else {}),
    "schedulefree.AdamWScheduleFree": "Exception: Optimizer was not in train mode when step is called",
    "torch.distributed.optim.ZeroRedundancyOptimizer": "TypeError",
}


def outer_on_ranks():
    """Every rank's word, before the first step."""
    accelerator, rows, found = Accelerator(cpu=True), Rows(8), {}
    for outer in OUTER:
        bare = Regression()
        before = values(bare)
        config = SlowMoConfig(sync_every=2, outer_optimizer=outer, timeout_seconds=patience(20))
        model, _ = accelerator.prepare(bare, SlowMoOptimizer(SGD(bare.parameters(), lr=0.1), config))
        found[outer] = error_of(model, rows.x, rows.y)
        assert equal(values(bare), before)
    return found


def test_an_outer_optimizer_that_cannot_work_is_told_at_the_start():
    first, second = run_workers(outer_on_ranks, 2)
    assert first == second
    for outer, why in OUTER.items():
        assert f"outer_optimizer='{outer}' cannot do the outer update with outer_lr=1.0" in first[outer], first[outer]
        assert first[outer].startswith("ValueError: ")
        assert re.search(why, first[outer]), first[outer]
        assert "Use 'slow_momentum', or 'torch.optim.SGD'" in first[outer]


class Noisy(WholeAdam):
    """Draws from the generator at every step."""

    def step(self, closure=None):
        with torch.no_grad():
            self.param_groups[0]["params"][0].grad.add_(torch.randn(()))
        return super().step(closure)


WORKS = ["SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "RMSprop", "Adagrad", "Adadelta", "Rprop", "ASGD"]
WORKS += ["Adafactor"]


@pytest.mark.parametrize("outer", [*(f"torch.optim.{name}" for name in WORKS), "test_outer_optimizers.Noisy"])
def test_any_other_outer_optimizer_does_what_it_does_on_the_pseudo_gradient(outer):
    """
    One round of one worker: the optimizer's own step from the start, on what two steps have moved. It is its first
    one: the trial at the start has left no trace, in its state and in the generators.
    """
    model, rows = Regression(), Rows(8)
    start = values(model)
    plain = Regression()
    torch.manual_seed(5)
    optimizer = SlowMoOptimizer(
        SGD(model.parameters(), lr=0.1), SlowMoConfig(sync_every=2, outer_optimizer=outer, outer_lr=0.3)
    )
    for _ in range(2):
        model(rows.x, rows.y)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    drawn = torch.randn(3)
    inner = SGD(plain.parameters(), lr=0.1)
    for _ in range(2):
        inner.zero_grad()
        plain(rows.x, rows.y)["loss"].backward()
        inner.step()
    moved = values(plain)
    anchors = [nn.Parameter(start[name].clone()) for name in start]
    for anchor, name in zip(anchors, start, strict=True):
        anchor.grad = start[name] - moved[name]
    torch.manual_seed(5)
    cls = getattr(torch.optim, outer.rpartition(".")[2], Noisy)
    cls(anchors, lr=0.3).step()
    assert torch.equal(drawn, torch.randn(3))
    for anchor, name in zip(anchors, start, strict=True):
        torch.testing.assert_close(values(model)[name], anchor.detach(), rtol=0, atol=1e-12)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon is of torch 2.9")
def test_muon_outside_takes_a_model_of_matrices():
    """Two rounds: no refusal where all trained tensors have two dimensions."""
    model, rows = nn.Linear(4, 3, bias=False).double(), Rows(8)
    start = model.weight.detach().clone()
    config = SlowMoConfig(sync_every=1, outer_optimizer="torch.optim.Muon", outer_lr=0.1)
    optimizer = SlowMoOptimizer(SGD(model.parameters(), lr=0.1), config)
    plain = nn.Parameter(start.clone())
    muon = torch.optim.Muon([plain], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        at = model.weight.detach().clone()
        model(rows.x).square().mean().backward()
        plain.grad = 0.1 * model.weight.grad.clone()
        assert torch.equal(at, plain.detach())
        optimizer.step()
        muon.step()
        torch.testing.assert_close(model.weight.detach(), plain.detach(), rtol=0, atol=1e-12)
    assert not torch.equal(start, plain.detach())


class OfGroups(torch.optim.SGD):
    """Takes groups alone, and divides by a parameter's norm, as layer-wise rates do."""

    def __init__(self, params, lr=1.0):
        params = list(params)
        assert all(isinstance(group, dict) for group in params)
        super().__init__(params, lr=lr)

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                assert p.norm() > 0
                p.data.sub_(p.grad, alpha=group["lr"])


def test_the_trial_is_like_the_update():
    """Of groups, with the anchors' own values: with lr 1 the anchor becomes the average."""

    def work(rank):
        weight = torch.nn.Parameter(torch.full((3,), 2.0))
        config = SlowMoConfig(sync_every=1, outer_optimizer=OfGroups)
        optimizer = SlowMoOptimizer(torch.optim.SGD([weight], lr=1.0), config)
        weight.grad = torch.full((3,), float(rank))
        optimizer.step()
        return weight.tolist()

    assert run_in_process(work, 2) == [[1.5] * 3] * 2


def test_a_state_goes_on_with_the_settings_of_now():
    """
    Displacement 1 in each round, from 0. DiLoCo's first, with rate 0.5 and momentum 0.5: v = 1, a = -0.5 (1 + 0.5).
    Its second with 0.25 and 0.75: v = 0.75 + 1, a = -0.75 - 0.25 (1 + 0.75 * 1.75). Then without momentum: -0.25.
    """
    ends, saved = [], None
    for lr, momentum in ((0.5, 0.5), (0.25, 0.75), (0.25, None)):
        weight = nn.Parameter(ends[-1].clone() if ends else torch.zeros(1))
        config = SlowMoConfig.diloco(sync_every=1, outer_lr=lr, nesterov_momentum=momentum or 0.9)
        if momentum is None:
            config = SlowMoConfig(sync_every=1, outer_lr=lr, outer_optimizer=SGD)
        optimizer = SlowMoOptimizer(SGD([weight], lr=1.0), config)
        if saved is not None:
            optimizer.load_state_dict(saved)
        weight.grad = torch.ones(1)
        optimizer.step()
        ends.append(weight.detach().clone())
        saved = optimizer.state_dict()
    second = -0.75 - 0.25 * (1 + 0.75 * 1.75)
    assert ends == [torch.tensor([-0.75]), torch.tensor([second]), torch.tensor([second - 0.25])]


def test_the_distance_is_told_and_no_gradient_is_kept():
    """Displacements 0 and 1 of three elements: a variance of 1/4 each."""

    def work(rank):
        weight = torch.nn.Parameter(torch.full((3,), 2.0))
        config = SlowMoConfig(sync_every=1, outer_optimizer="torch.optim.SGD")
        optimizer = SlowMoOptimizer(SGD([weight], lr=1.0), config)
        weight.grad = torch.full((3,), float(rank))
        optimizer.step()
        outer = optimizer.outer_loop.parts.slow.update.optimizer
        kept = [param for group in outer.param_groups for param in group["params"] if param.grad is not None]
        return last_round(optimizer).consensus_distance, len(kept)

    assert run_in_process(work, 2) == [(0.75, 0)] * 2
