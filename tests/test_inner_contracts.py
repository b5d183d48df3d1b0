"""Inner optimizers that keep torch's contract in older or looser ways: each works as it does without us."""

from __future__ import annotations

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from slowmo_hf import SlowMoConfig, SlowMoOptimizer


@torch.no_grad()
def descend(groups):
    for group in groups:
        for param in group["params"]:
            if param.grad is not None:
                param.sub_(param.grad, alpha=group["lr"])


class Plain(torch.optim.Optimizer):
    """SGD."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.5})

    def step(self, closure=None):
        descend(self.param_groups)


class WithoutTheFlag(Plain):
    def zero_grad(self):
        for group in self.param_groups:
            for param in group["params"]:
                param.grad = None


class ByHand(WithoutTheFlag):
    """As one that never calls `Optimizer.__init__`."""

    def __init__(self, params):
        self.param_groups, self.state = [{"params": list(params), "lr": 0.5}], {}

    def step(self, closure=None):
        descend(self.param_groups)


class TakesTheScaler(Plain):
    """Would unscale by itself, with `step(grad_scaler=...)`."""

    _step_supports_amp_scaling = True

    def step(self, closure=None, grad_scaler=None):
        return super().step(closure)


def trained(make, scaler=None, dtype=torch.float32):
    """From 0 by gradients 1, infinity and 2."""
    weight = torch.nn.Parameter(torch.zeros(2, dtype=dtype))
    optimizer = SlowMoOptimizer(make([weight]), SlowMoConfig(sync_every=8))
    for factor in (1.0, float("inf") if scaler else 0.0, 2.0):
        loss = (weight * factor).sum()
        optimizer.zero_grad()
        if scaler:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        else:
            loss.backward()
            optimizer.step()
    return weight.detach(), optimizer


@pytest.mark.parametrize("make", [Plain, WithoutTheFlag, ByHand])
def test_one_that_leaves_something_out_works(make):
    weight, optimizer = trained(make)
    assert weight.tolist() == [-1.5, -1.5]
    assert optimizer.defaults.get("lr") == (None if make is ByHand else 0.5)


@pytest.mark.parametrize("make", [Plain, TakesTheScaler])
def test_gradients_are_unscaled_and_infinite_ones_skipped(make):
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    weight, _ = trained(make, scaler)
    assert weight.tolist() == [-1.5, -1.5]
    assert scaler.get_scale() == 32.0


def test_fp16_gradients_are_refused_as_by_the_scaler():
    """Divided by the scale small ones would be 0."""
    with pytest.raises(ValueError, match=r"Attempting to unscale FP16 gradients\."):
        trained(Plain, torch.amp.GradScaler("cpu", init_scale=64.0), torch.float16)


MARKS = {"param_groups_master": [], "master_weights": True, "param_d2h_map": {}}


@pytest.mark.parametrize("name", MARKS)
def test_one_that_writes_its_own_copy_over_the_parameters_is_refused(name):
    """By the attributes of apex, Transformer Engine and torchao: what a round hands back would last until the step."""
    weight = torch.nn.Parameter(torch.zeros(2))
    inner = Plain([weight])
    setattr(inner, name, MARKS[name])
    optimizer = SlowMoOptimizer(inner, SlowMoConfig())
    weight.grad = torch.ones(2)
    with pytest.raises(ValueError, match=rf"the inner optimizer Plain has a copy of the parameters \({name}\)"):
        optimizer.step()
    assert weight.tolist() == [0, 0]


def test_hooks_of_all_optimizers_fire_once_for_a_step():
    """For the inner optimizer, as without us; not for the outer one. Those of one optimizer for that one."""
    fired = []

    def note(kind):
        return lambda optimizer, args, kwargs: fired.append((kind, type(optimizer).__name__))

    weight = torch.nn.Parameter(torch.zeros(2))
    inner = torch.optim.SGD([weight], lr=0.1)
    config = SlowMoConfig(sync_every=2, outer_optimizer="torch.optim.AdamW", outer_lr=0.1)
    optimizer = SlowMoOptimizer(inner, config)
    optimizer.register_step_pre_hook(note("its own, before"))
    optimizer.register_step_post_hook(note("its own, after"))
    inner.register_step_post_hook(note("the inner one's"))
    handles = [register_optimizer_step_pre_hook(note("before")), register_optimizer_step_post_hook(note("after"))]
    try:
        for _ in range(2):
            weight.grad = torch.ones(2)
            optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    once = [
        ("its own, before", "SlowMoOptimizer"),
        ("before", "SGD"),
        ("the inner one's", "SGD"),
        ("after", "SGD"),
        ("its own, after", "SlowMoOptimizer"),
    ]
    assert fired == 2 * once


class Counting(torch.optim.SGD):
    """Has a hook of its own."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.steps = 0
        self.register_step_post_hook(lambda optimizer, args, kwargs: setattr(optimizer, "steps", optimizer.steps + 1))


def test_an_outer_optimizer_keeps_hooks_of_its_own():
    weight = torch.nn.Parameter(torch.zeros(2))
    config = SlowMoConfig(sync_every=1, outer_optimizer=Counting)
    optimizer = SlowMoOptimizer(torch.optim.SGD([weight], lr=0.1), config)
    for _ in range(3):
        weight.grad = torch.ones(2)
        optimizer.step()
    assert optimizer.outer_loop.parts.slow.update.optimizer.steps == 3


@pytest.mark.parametrize("make", [Plain, WithoutTheFlag])
def test_set_to_none_is_passed_on_or_refused(make):
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = SlowMoOptimizer(make([weight]), SlowMoConfig())
    weight.grad = torch.ones(2)
    if make is Plain:
        optimizer.zero_grad(set_to_none=False)
        assert weight.grad.tolist() == [0, 0]
    else:
        with pytest.raises(ValueError, match="set_to_none=False cannot be used with WithoutTheFlag"):
            optimizer.zero_grad(set_to_none=False)
