"""
SlowMoOptimizer: a real torch.optim.Optimizer to everyone who asks, and the module functions beside it.

The problem everywhere is `Tracker`: loss ½ ||w - target||², so that the gradient is w - target and a run can be
followed by hand.
"""

from __future__ import annotations

import copy
import gc
import math
import pickle
import re
import weakref

import accelerate
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import SGD, Adam, lr_scheduler
from torch.profiler import ProfilerActivity, profile

import slowmo_hf
from harness import patience, run_workers
from slowmo_hf import SlowMoConfig, SlowMoOptimizer, run_in_process
from tiny import error_of

START = (1.0, -2.0, 3.0)
NEVER = 10**6


class Tracker(torch.nn.Module):
    def __init__(self, dtype=torch.float64, start=START):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(start, dtype=dtype))

    def forward(self, target):
        return 0.5 * ((self.w - target.to(self.w.dtype)) ** 2).sum()


def target(rank, step):
    return torch.tensor(
        [math.sin(3.0 * rank + step), math.cos(rank - 2.0 * step), rank + 0.1 * step], dtype=torch.float64
    )


def pull(x, rank, step):
    return x - target(rank, step)


def clipped_pull(x, rank, step):
    gradient = pull(x, rank, step)
    return gradient * min(1.0, 1.0 / (float(gradient.norm()) + 1e-6))


def simulate(steps, *, world=2, lr=0.1, tau=2, alpha=1.0, beta=0.5, gradient=pull, skipped=()):
    """
    Algorithm 1 by hand with SGD inside: x_r <- x_r - lr g_r; every tau steps v <- beta r v + (a - mean x), x_r = a <-
    a - alpha v. r is of the rounds' mean rates.
    """
    anchor, velocity, previous_lr = torch.tensor(START, dtype=torch.float64), 0.0, None
    x, of_round = [anchor] * world, []
    for step in range(steps):
        now = lr(step) if callable(lr) else lr
        of_round.append(now)
        x = [x[r] if (r, step) in skipped else x[r] - now * gradient(x[r], r, step) for r in range(world)]
        if (step + 1) % tau == 0:
            mean, of_round = sum(of_round) / tau, []
            velocity = beta * (mean / previous_lr if previous_lr else 1.0) * velocity + anchor - sum(x) / world
            anchor, previous_lr = anchor - alpha * velocity, mean
            x = [anchor] * world
    return x


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def new_accelerator(**settings):
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    return Accelerator(cpu=True, **settings)


def prepared(config, make=lambda params: SGD(params, lr=0.1), dtype=torch.float64, **settings):
    accelerator = new_accelerator(**settings)
    model = Tracker(dtype)
    model, optimizer = accelerator.prepare(model, SlowMoOptimizer(make(model.parameters()), config))
    return accelerator, model, optimizer


def weights(model):
    return getattr(model, "module", model).w.detach().clone()


def train(model, optimizer, steps, first=0, scheduler=None):
    for step in range(first, first + steps):
        optimizer.zero_grad()
        model(target(rank(), step)).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def tau(n, **settings):
    return SlowMoConfig(sync_every=n, timeout_seconds=patience(20), **settings)


def close(left, right, tolerance=1e-12):
    torch.testing.assert_close(left.double(), right.double(), rtol=tolerance, atol=tolerance)


def bitwise(left, right):
    torch.testing.assert_close(left, right, rtol=0, atol=0)


# ---- a real optimizer: one process ----


def test_it_is_a_torch_optimizer_and_reads_through():
    model = Tracker()
    inner = SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = SlowMoOptimizer(inner, tau(2))
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is inner.param_groups
    assert optimizer.state is inner.state
    assert optimizer.defaults is inner.defaults
    assert "momentum" in repr(optimizer)
    model(target(0, 0)).backward()
    optimizer.zero_grad()
    assert model.w.grad is None


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda k: 1 / (1 + k)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda k: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=6),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.2, step_size_up=2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.3, total_steps=8),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, total_iters=2), lr_scheduler.ExponentialLR(o, 0.5)], milestones=[2]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_drive_the_inner_learning_rate(name):
    """tau is beyond the run, so every step must be bitwise what the bare optimizer does under the same scheduler."""

    def run(wrap):
        model = Tracker()
        inner = SGD(model.parameters(), lr=0.1, momentum=0.9)
        optimizer = wrap(inner)
        scheduler = SCHEDULERS[name](optimizer)
        seen = []
        for step in range(6):
            optimizer.zero_grad()
            model(target(0, step)).backward()
            optimizer.step()
            scheduler.step(1.0) if name == "ReduceLROnPlateau" else scheduler.step()
            seen.append((inner.param_groups[0]["lr"], inner.param_groups[0]["momentum"], weights(model).tolist()))
        return seen

    bare = run(lambda inner: inner)
    assert run(lambda inner: SlowMoOptimizer(inner, tau(NEVER))) == bare
    assert len({lr for lr, _, _ in bare}) > 1, "the schedule must move"


def test_step_with_a_closure_returns_its_loss():
    def run(wrap, make):
        model = Tracker()
        optimizer = wrap(make(model.parameters()))
        losses = []
        for step in range(3):

            def closure(step=step):
                optimizer.zero_grad()
                loss = model(target(0, step))
                loss.backward()
                return loss

            losses.append(float(optimizer.step(closure).detach()))
        return losses, weights(model)

    for make in (lambda p: SGD(p, lr=0.1), lambda p: torch.optim.LBFGS(p, lr=0.3, max_iter=3)):
        losses, at = run(lambda inner: inner, make)
        ours, there = run(lambda inner: SlowMoOptimizer(inner, tau(NEVER)), make)
        assert ours == losses
        bitwise(there, at)


def test_step_hooks_fire_once_per_step():
    model = Tracker()
    optimizer = SlowMoOptimizer(SGD(model.parameters(), lr=0.1), tau(2))
    seen = []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append(("pre", o, weights(model).tolist())))
    handle = optimizer.register_step_post_hook(
        lambda o, args, kwargs: seen.append(("post", o, weights(model).tolist()))
    )
    train(model, optimizer, 2)
    assert [word for word, _, _ in seen] == ["pre", "post"] * 2
    assert all(o is optimizer for _, o, _ in seen)
    assert seen[0][2] == list(START)
    assert seen[3][2] == weights(model).tolist()  # after the round
    handle.remove()
    train(model, optimizer, 1)
    assert [word for word, _, _ in seen] == ["pre", "post"] * 2 + ["pre"]


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("before", [0, 4])
def test_copies_continue_as_the_original(copied, before):
    model = Tracker()
    optimizer = SlowMoOptimizer(SGD(model.parameters(), lr=0.1), tau(2, outer_lr=0.7))
    train(model, optimizer, before)
    twin_model, twin = copied((model, optimizer))
    assert twin.config == optimizer.config
    train(model, optimizer, 6, first=before)
    assert not torch.equal(weights(twin_model), weights(model)), "a copy has its own parameters"
    train(twin_model, twin, 6, first=before)
    bitwise(weights(twin_model), weights(model))
    close(weights(model), simulate(before + 6, world=1, alpha=0.7)[0])


def test_a_copy_inside_a_round_is_refused():
    model = Tracker()
    optimizer = SlowMoOptimizer(SGD(model.parameters(), lr=0.1), tau(2))
    train(model, optimizer, 3)
    with pytest.raises(RuntimeError, match="step 3 is no multiple of sync_every=2"):
        copy.deepcopy(optimizer)


def listeners():
    """The hooks that every module's forward pass runs through, after a collection."""
    gc.collect()
    return torch.nn.modules.module._global_forward_pre_hooks


@pytest.mark.parametrize("settings", [{}, {"base": "osgp"}, {"overlap_steps": 1}])
def test_slow_state_goes_with_its_optimizer(settings):
    """Anchors and velocity take as much memory as the model twice: they must not wait for the garbage collector."""
    weight = torch.nn.Parameter(torch.zeros(3))
    optimizer = SlowMoOptimizer(SGD([weight], lr=0.1), SlowMoConfig(sync_every=2, **settings))
    for _ in range(5):
        weight.grad = torch.ones(3)
        optimizer.step()
    with slowmo_hf.consensus(optimizer):
        pass
    loop = weakref.ref(optimizer.outer_loop)
    gc.disable()
    try:
        del optimizer
        assert loop() is None
    finally:
        gc.enable()


def test_an_optimizer_that_never_trained_is_collected_with_its_hook():
    """
    The original of a copy, a prepared run that was given up: neither parameters nor a hook on every forward pass may
    stay.
    """
    before = list(listeners())
    optimizer = SlowMoOptimizer(SGD(Tracker().parameters(), lr=0.1), tau(2))
    optimizer.scheduler = lr_scheduler.StepLR(optimizer, 2)  # a cycle, which only the collector can undo
    others = [
        copy.deepcopy(SlowMoOptimizer(SGD(Tracker().parameters(), lr=0.1), tau(2))),
        pickle.loads(pickle.dumps(optimizer)),
    ]
    assert len(listeners()) == len(before) + 3
    everyone = [optimizer, *others]
    left = [weakref.ref(o) for o in everyone] + [weakref.ref(o.param_groups[0]["params"][0]) for o in everyone]
    del optimizer, others, everyone
    assert list(listeners()) == before
    assert [ref() for ref in left] == [None] * 6


@pytest.mark.slow
def test_listeners_come_and_go_one_by_one():
    """
    Many in turn leave nothing; the one that is left still starts, and takes its hook away; a started one is collected
    too.
    """
    before = list(listeners())
    for _ in range(5):
        model = Tracker()
        other = SlowMoOptimizer(SGD(model.parameters(), lr=0.1), tau(2))
    assert len(listeners()) == len(before) + 1
    optimizer = SlowMoOptimizer(SGD(model.parameters(), lr=0.1), tau(2))
    del other
    train(model, optimizer, 3)
    assert list(listeners()) == before
    close(weights(model), simulate(3, world=1)[0])
    started = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert started() is None
    model(target(0, 0)).backward()


def test_param_groups_are_not_stale_after_loading():
    """
    Loading replaces the inner optimizer's groups; scheduler and lr must reach the new ones. By hand: lr 0.1, 0.05,
    0.025, ...
    """
    model = Tracker()
    inner = SGD(model.parameters(), lr=0.1)
    optimizer = SlowMoOptimizer(inner, tau(2))
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    train(model, optimizer, 2, scheduler=scheduler)
    optimizer.load_state_dict(state_dict=copy.deepcopy(optimizer.state_dict()))
    assert optimizer.param_groups is inner.param_groups
    train(model, optimizer, 4, first=2, scheduler=scheduler)
    assert inner.param_groups[0]["lr"] == 0.1 * 0.5**6
    close(weights(model), simulate(6, world=1, lr=lambda step: 0.1 * 0.5**step)[0])


def test_the_callers_state_is_left_alone():
    model = Tracker()
    optimizer = SlowMoOptimizer(SGD(model.parameters(), lr=0.1), tau(2))
    train(model, optimizer, 4)
    state = copy.deepcopy(optimizer.state_dict())
    before = copy.deepcopy(state)
    assert set(state) == {"state", "param_groups", "slowmo"}
    for steps_before in (0, 2):  # not started, and started
        model = Tracker()
        other = SlowMoOptimizer(SGD(model.parameters(), lr=0.1), tau(2))
        train(model, other, steps_before)
        other.load_state_dict(state)
        train(model, other, 4, first=4)
        assert set(state) == set(before)
        assert state["param_groups"] == before["param_groups"]
        assert state["slowmo"]["attempted_steps"] == 4
        for key in ("anchors", "velocities"):
            bitwise(state["slowmo"][key][0], before["slowmo"][key][0])
        close(weights(model), simulate(8, world=1)[0])


def state_hooks_seen(wrap):
    """
    Two hooks of each kind, the second one in front, and what each saw: its place, the lr then, the keys it was given.
    """
    model = Tracker()
    optimizer = wrap(SGD(model.parameters(), lr=0.1, momentum=0.9))
    saved = copy.deepcopy(optimizer.state_dict())
    seen, handles = [], []

    def hook(word, returned=None):
        def called(o, *given):
            assert o is optimizer
            seen.append((word, o.param_groups[0]["lr"], [sorted(g) for g in given]))
            return returned(*given) if returned else None

        return called

    def raised(state_dict):  # a new dictionary: what is returned takes the place of what was given
        return {
            **state_dict,
            "more": 1,
            "param_groups": [{**g, "lr": g["lr"] + 1} for g in state_dict["param_groups"]],
        }

    def marked(state_dict):  # in place: the caller must not see it
        state_dict["mark"] = 1

    for kind, returned in (("state_dict_pre", None), ("state_dict_post", raised), ("load_state_dict_pre", raised)):
        register = getattr(optimizer, f"register_{kind}_hook")
        handles.append(register(hook(f"{kind} 1", returned)))
        handles.append(register(hook(f"{kind} 0", returned and marked), prepend=True))
    handles.append(optimizer.register_load_state_dict_post_hook(hook("load_state_dict_post 1")))
    handles.append(optimizer.register_load_state_dict_post_hook(hook("load_state_dict_post 0"), prepend=True))
    optimizer.param_groups[0]["lr"] = 0.2
    first = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    assert set(saved) == {"state", "param_groups"}
    last = optimizer.param_groups[0]["lr"]
    for handle in handles:
        handle.remove()
    return seen, first, last, optimizer.state_dict()


def test_state_dict_hooks_fire_as_torchs_do():
    bare = state_hooks_seen(lambda inner: inner)
    assert [word for word, _, _ in bare[0]] == [
        f"{kind} {n}"
        for kind in ("state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post")
        for n in (0, 1)
    ]
    assert bare[2] == 1.1
    assert state_hooks_seen(lambda inner: SlowMoOptimizer(inner, tau(2))) == bare


def test_state_dict_hooks_see_the_slow_state():
    """
    What a hook returns is what is saved and loaded: here an eighth of the anchor is saved, and it comes back whole.
    """

    def scaled(state_dict, by):
        return {
            **state_dict,
            "slowmo": {**state_dict["slowmo"], "anchors": [a * by for a in state_dict["slowmo"]["anchors"]]},
        }

    model = Tracker()
    inner = SGD(model.parameters(), lr=0.1)
    optimizer = SlowMoOptimizer(inner, tau(2))
    of_inner, at_end = [], []
    inner.register_state_dict_post_hook(lambda o, state_dict: of_inner.append((o, set(state_dict))))
    train(model, optimizer, 4)
    optimizer.register_state_dict_post_hook(lambda o, state_dict: scaled(state_dict, 0.125))
    optimizer.register_load_state_dict_pre_hook(lambda o, state_dict: scaled(state_dict, 8.0))
    optimizer.register_load_state_dict_post_hook(lambda o: at_end.append((o, weights(model).tolist())))
    at = weights(model)
    saved = copy.deepcopy(optimizer.state_dict())
    bitwise(saved["slowmo"]["anchors"][0], at / 8)
    assert of_inner == [(inner, {"state", "param_groups"})]
    train(model, optimizer, 1, first=4)
    optimizer.load_state_dict(saved)
    bitwise(weights(model), at)
    assert at_end == [(optimizer, at.tolist())], "the post-hook comes when everything is loaded"
    bitwise(saved["slowmo"]["anchors"][0], at / 8)


def test_a_stock_state_loads_and_the_slow_state_starts_fresh():
    model = Tracker()
    stock = SGD(model.parameters(), lr=0.03, momentum=0.9)
    model(target(0, 0)).backward()
    stock.step()
    optimizer = SlowMoOptimizer(SGD(model.parameters(), lr=0.1, momentum=0.9), tau(2))
    optimizer.load_state_dict(stock.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.03
    bitwise(optimizer.state[model.w]["momentum_buffer"], stock.state[model.w]["momentum_buffer"])
    assert "slowmo" not in optimizer.state_dict()


def test_lookahead_in_one_process():
    """alpha ½, beta 0, tau 3: every third step goes half the way back to the anchor."""
    model = Tracker()
    optimizer = SlowMoOptimizer(SGD(model.parameters(), lr=0.1), SlowMoConfig.lookahead(sync_every=3))
    train(model, optimizer, 6)
    close(weights(model), simulate(6, world=1, tau=3, alpha=0.5, beta=0.0)[0])
    train(model, optimizer, 1, first=6)
    close(weights(model), simulate(7, world=1, tau=3, alpha=0.5, beta=0.0)[0])
    assert slowmo_hf.last_round(optimizer).bytes_sent == 0


def test_parameter_groups_are_added_before_the_start_only():
    first, second = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    optimizer = SlowMoOptimizer(SGD(first.parameters(), lr=0.1), SlowMoConfig.lookahead(sync_every=1, outer_lr=0.5))
    optimizer.add_param_group({"params": list(second.parameters()), "lr": 0.4})
    before = second.bias.item()
    (first(torch.ones(1, 2)) + second(torch.ones(1, 2))).sum().backward()
    optimizer.step()  # a gradient of 1, lr 0.4, then half the way back
    assert second.bias.item() == pytest.approx(before - 0.2)
    with pytest.raises(ValueError, match="before the first forward pass"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))]})
    assert len(optimizer.param_groups) == 2


def test_wrong_types_are_refused():
    inner = SGD(Tracker().parameters(), lr=0.1)
    for wrong in (None, torch.nn.Linear(1, 1), "sgd", SGD):
        with pytest.raises(TypeError, match=r"inner_optimizer must be a torch\.optim\.Optimizer"):
            SlowMoOptimizer(wrong)
    with pytest.raises(TypeError, match="wrap an optimizer once"):
        SlowMoOptimizer(SlowMoOptimizer(inner))
    with pytest.raises(ValueError, match="config must be a SlowMoConfig"):
        SlowMoOptimizer(inner, 12)
    for function in (slowmo_hf.last_round, lambda o: slowmo_hf.consensus(o).__enter__()):
        with pytest.raises(TypeError, match="expected a SlowMoOptimizer, prepared or bare, got SGD"):
            function(inner)


def check_a_prepared_optimizer_is_not_wrapped():
    accelerator = new_accelerator()
    inner = SGD(Tracker().parameters(), lr=0.1)
    words = [
        error_of(SlowMoOptimizer, accelerator.prepare(inner)),
        error_of(SlowMoOptimizer, accelerator.prepare(SlowMoOptimizer(inner))),
    ]
    assert all("TypeError" in word for word in words), words


def test_a_prepared_optimizer_is_not_wrapped():
    """AcceleratedOptimizer skips micro-batches: a wrapper around it would count them as steps."""
    run_workers(check_a_prepared_optimizer_is_not_wrapped, 1)


# ---- under Accelerate: two workers ----


def check_prepare_orders():
    for order in ("model, optimizer", "optimizer, model", "one by one"):
        accelerator = new_accelerator()
        model = Tracker()
        optimizer = SlowMoOptimizer(SGD(model.parameters(), lr=0.1), tau(2))
        if order == "model, optimizer":
            model, optimizer = accelerator.prepare(model, optimizer)
        elif order == "optimizer, model":
            optimizer, model = accelerator.prepare(optimizer, model)
        else:
            optimizer = accelerator.prepare(optimizer)
            model = accelerator.prepare(model)
        assert type(model).__name__ == "DistributedDataParallel"
        assert isinstance(optimizer, AcceleratedOptimizer)
        train(model, optimizer, 5)
        close(weights(model), simulate(5)[rank()])


def check_accelerated_scheduler():
    """
    AcceleratedScheduler steps num_processes = 2 times per optimizer step: the lr at optimizer step k is 0.1 / (1 + 2
    k).
    """
    accelerator = new_accelerator()
    model = Tracker()
    optimizer = SlowMoOptimizer(SGD(model.parameters(), lr=0.1), tau(2))
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda k: 1 / (1 + k))
    loader = torch.utils.data.DataLoader(list(range(8)), batch_size=1)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    for step, batch in enumerate(loader):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / (1 + 2 * step))
        assert int(batch) == 2 * step + rank()
        optimizer.zero_grad()
        accelerator.backward(model(target(rank(), step)))
        optimizer.step()
        scheduler.step()
    assert step == 3
    close(weights(model), simulate(4, lr=lambda k: 0.1 / (1 + 2 * k))[rank()])


def check_accumulation():
    """Eight micro-batches are four steps and two rounds; the first forward pass is inside no_sync."""

    def mean_pull(x, r, step):
        return (pull(x, r, 2 * step) + pull(x, r, 2 * step + 1)) / 2

    accelerator, model, optimizer = prepared(tau(2), gradient_accumulation_steps=2)
    for micro in range(8):
        with accelerator.accumulate(model):
            accelerator.backward(model(target(rank(), micro)))
            optimizer.step()
            optimizer.zero_grad()
        close(weights(model), simulate((micro + 1) // 2, gradient=mean_pull)[rank()])
    assert slowmo_hf.last_round(optimizer).round == 2


def check_clipping():
    accelerator, model, optimizer = prepared(tau(2))
    for step in range(6):
        optimizer.zero_grad()
        accelerator.backward(model(target(rank(), step)))
        norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
        assert float(norm) == pytest.approx(
            float(pull(simulate(step, gradient=clipped_pull)[rank()], rank(), step).norm())
        )
        optimizer.step()
    close(weights(model), simulate(6, gradient=clipped_pull)[rank()])
    assert not torch.allclose(weights(model), simulate(6)[rank()]), "clipping must have bitten"


def check_bf16_autocast():
    """
    The anchors see fp32 weights trained under autocast: a twin without the wrapper, averaged by hand (alpha 1, beta
    0).
    """
    accelerator = new_accelerator(mixed_precision="bf16")
    twin = torch.nn.Linear(4, 4)
    model = copy.deepcopy(twin)
    twin_optimizer = SGD(twin.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(
        model, SlowMoOptimizer(SGD(model.parameters(), lr=0.1), SlowMoConfig.local_sgd(3))
    )
    generator = torch.Generator().manual_seed(rank())
    for step in range(6):
        batch = torch.randn(8, 4, generator=generator)
        optimizer.zero_grad()
        accelerator.backward(model(batch).square().mean())
        optimizer.step()
        twin_optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out = twin(batch)
        assert out.dtype == torch.bfloat16
        out.float().square().mean().backward()
        twin_optimizer.step()
        if step % 3 == 2:
            for p in twin.parameters():
                dist.all_reduce(p.data)
                p.data.div_(2)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def check_hooks_and_closure_behind_accelerate():
    _, model, optimizer = prepared(tau(2))
    seen = []
    optimizer.optimizer.register_step_post_hook(lambda *_: seen.append(weights(model).tolist()))
    train(model, optimizer, 4)
    assert len(seen) == 4
    assert seen[3] == weights(model).tolist()


def check_all_accelerate():
    check_prepare_orders()
    check_accelerated_scheduler()
    check_accumulation()
    check_clipping()
    check_bf16_autocast()
    check_hooks_and_closure_behind_accelerate()


def test_under_accelerate():
    """prepare in any order, AcceleratedScheduler, accumulate, clip_grad_norm_, bf16 autocast, hooks."""
    run_workers(check_all_accelerate, 2)


# ---- fp16: a step skipped on one rank only ----

SKIP = (1, 2)  # rank 1's third step has an infinite gradient; tau is 2, so it lies inside a round


def scaled_target(step):
    return torch.full((3,), math.inf) if (rank(), step) == SKIP else target(rank(), step)


def assert_skipped_on_one_rank_alone(scaler):
    """GradScaler halves its scale after an infinite gradient, and only then."""
    assert scaler.get_scale() == (128.0 if rank() == SKIP[0] else 256.0)


def new_scaler():
    return torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=NEVER)


def run_scaled(make, steps=6, clip=False):
    """A bare loop with a GradScaler; fp32 weights."""
    model = Tracker(torch.float32)
    optimizer = SlowMoOptimizer(make(model.parameters()), tau(2, inner_state="maintain"))
    scaler, rounds = new_scaler(), []
    for step in range(steps):
        optimizer.zero_grad()
        scaler.scale(model(scaled_target(step))).backward()
        before = weights(model)
        if clip:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        assert optimizer.outer_loop.attempted_steps == step + 1
        rounds.append(optimizer.outer_loop.rounds)
        if (rank(), step) == SKIP:
            bitwise(weights(model), before)
    assert rounds == [0, 1, 1, 2, 2, 3]
    assert_skipped_on_one_rank_alone(scaler)
    return weights(model)


def check_scaler():
    close(run_scaled(lambda p: SGD(p, lr=0.1)), simulate(6, skipped=[SKIP])[rank()], 1e-6)
    assert not torch.allclose(simulate(6, skipped=[SKIP])[rank()], simulate(6)[rank()], rtol=1e-3), (
        "the skip must show"
    )
    clipped = simulate(6, skipped=[SKIP], gradient=clipped_pull)[rank()]
    close(run_scaled(lambda p: SGD(p, lr=0.1), clip=True), clipped, 1e-6)
    close(run_scaled(lambda p: SGD(p, lr=0.1, fused=True)), simulate(6, skipped=[SKIP])[rank()], 1e-6)
    close(run_scaled(lambda p: SGD(p, lr=0.1, fused=True), clip=True), clipped, 1e-6)
    for clip in (False, True):
        close(
            run_scaled(lambda p: Adam(p, lr=0.1, fused=True), clip=clip),
            run_scaled(lambda p: Adam(p, lr=0.1), clip=clip),
            1e-5,
        )


def check_scaler_behind_accelerate(clip):
    """
    Accelerator(cpu=True, mixed_precision="fp16") makes no scaler: put one in before prepare hands it to the optimizer.
    """
    accelerator = new_accelerator(mixed_precision="fp16")
    accelerator.scaler = new_scaler()
    model = Tracker(torch.float32)
    optimizer = SlowMoOptimizer(SGD(model.parameters(), lr=0.1), tau(2))
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda k: 1 / (1 + k))
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    assert optimizer.scaler is accelerator.scaler
    for step in range(6):
        optimizer.zero_grad()
        accelerator.backward(model(scaled_target(step)))
        if clip:
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        # Every attempt is a step to Accelerate: schedulers stay together too.
        assert not accelerator.optimizer_step_was_skipped
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / (3 + 2 * step))
        assert optimizer.optimizer.outer_loop.rounds == (step + 1) // 2
    assert_skipped_on_one_rank_alone(accelerator.scaler)
    gradient = clipped_pull if clip else pull
    close(weights(model), simulate(6, skipped=[SKIP], gradient=gradient, lr=lambda k: 0.1 / (1 + 2 * k))[rank()], 1e-6)


def check_scaler_behind_accelerated_optimizer():
    new_accelerator()
    model = Tracker(torch.float32)
    scaler = new_scaler()
    optimizer = AcceleratedOptimizer(SlowMoOptimizer(SGD(model.parameters(), lr=0.1), tau(2)), scaler=scaler)
    for step in range(6):
        optimizer.zero_grad()
        scaler.scale(model(scaled_target(step))).backward()
        optimizer.step()
    assert_skipped_on_one_rank_alone(scaler)
    close(weights(model), simulate(6, skipped=[SKIP])[rank()], 1e-6)


def check_all_scalers():
    check_scaler()
    check_scaler_behind_accelerate(clip=False)
    check_scaler_behind_accelerated_optimizer()


def test_fp16_step_skipped_on_one_rank():
    """
    Rank 1 alone skips step 3: clocks, rounds and schedulers stay together and the result is the hand simulation's.
    """
    run_workers(check_all_scalers, 2)


# ---- the average: consensus, eval and train ----


def mean_over_ranks(tensor):
    total = tensor.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def check_consensus(prepare):
    if prepare:
        _, model, optimizer = prepared(tau(4), make=lambda p: SGD(p, lr=0.1, momentum=0.9))
    else:
        model = Tracker()
        optimizer = SlowMoOptimizer(SGD(model.parameters(), lr=0.1, momentum=0.9), tau(4))
    with slowmo_hf.consensus(optimizer):  # before the start: nothing to do
        bitwise(weights(model), torch.tensor(START, dtype=torch.float64))
    assert slowmo_hf.last_round(optimizer) is None
    train(model, optimizer, 3)
    local = weights(model)
    mean = mean_over_ranks(local)
    assert not torch.allclose(local, mean)
    random = torch.get_rng_state()
    with slowmo_hf.consensus(optimizer):
        close(weights(model), mean)
        with slowmo_hf.consensus(optimizer):
            close(weights(model), mean)
        close(weights(model), mean)
        torch.rand(3)
    bitwise(weights(model), local)
    assert torch.equal(torch.get_rng_state(), random)

    def fail():
        with slowmo_hf.consensus(optimizer):
            close(weights(model), mean)
            raise KeyError("from inside")

    assert error_of(fail) == "KeyError: 'from inside'"
    bitwise(weights(model), local)

    momentum = next(iter(optimizer.state.values()))["momentum_buffer"].clone()

    def step_inside():
        with slowmo_hf.consensus(optimizer):
            train(model, optimizer, 1, first=3)

    assert "RuntimeError: a training step was taken while the average is shown" in error_of(step_inside)
    bitwise(weights(model), local)
    bitwise(next(iter(optimizer.state.values()))["momentum_buffer"], momentum)

    optimizer.eval()
    close(weights(model), mean)
    optimizer.eval()
    optimizer.train()
    bitwise(weights(model), local)
    optimizer.train()
    bitwise(weights(model), local)


def check_last_round():
    """
    tau 2, beta ½, by hand: Δ = anchor - mean; the consensus distance is the mean of ||x_i - mean||²; one bucket of 3 +
    1 doubles and a header of 7 doubles travel.
    """
    _, model, optimizer = prepared(tau(2))
    train(model, optimizer, 1)
    assert slowmo_hf.last_round(optimizer) is None
    train(model, optimizer, 3, first=1)
    anchor = simulate(2)[0]
    local = [x - 0.1 * pull(x, r, 3) for r, x in enumerate(simulate(3))]
    mean = sum(local) / 2
    report = slowmo_hf.last_round(optimizer)
    assert report is slowmo_hf.last_round(optimizer.optimizer)
    assert report.round == 2
    assert report.pseudo_grad_norm == pytest.approx(float((anchor - mean).norm()))
    assert report.consensus_distance == pytest.approx(float(sum((x - mean).norm() ** 2 for x in local) / 2))
    assert report.velocity_norm == pytest.approx(float((anchor - simulate(4)[0]).norm()))
    assert report.bytes_sent == (3 + 1) * 8 + (10 + 1) * 8
    assert report.to_logs()["slowmo/round"] == 2


def check_an_evaluation_before_training_does_not_start():
    """Rank 0 alone evaluates first; the start is collective and must wait for the first training pass."""
    _, model, optimizer = prepared(tau(2))
    if rank() == 0:
        with torch.no_grad():
            model.module(target(0, 0))
    assert optimizer.optimizer.outer_loop is None
    train(model, optimizer, 3)
    close(weights(model), simulate(3)[rank()])


def check_all_looks():
    check_consensus(prepare=True)
    check_consensus(prepare=False)
    check_last_round()
    check_an_evaluation_before_training_does_not_start()


def test_consensus_and_last_round():
    run_workers(check_all_looks, 2)


# ---- state ----


def check_round_trip(make, config):
    """Eight steps, against four, a save, and four more from the save in a fresh model: equal bit for bit."""

    def new(start=START):
        model = Tracker(start=start)
        return model, SlowMoOptimizer(make(model.parameters()), config)

    model, optimizer = new()
    train(model, optimizer, 3)
    assert "RuntimeError: training cannot be saved inside a round: step 3 is no multiple of" in error_of(
        optimizer.state_dict
    )
    train(model, optimizer, 1, first=3)
    state = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, 4, first=4)

    resumed_model, resumed = new(start=(7.0, 7.0, 7.0))  # the anchors hold the weights
    resumed.load_state_dict(state_dict=copy.deepcopy(state))  # torch's own loading aliases
    again = resumed.state_dict()["slowmo"]  # not started yet, as inside accelerator.prepare
    assert (again["attempted_steps"], again["rounds"]) == (4, 1 if config.sync_every == 4 else 2)
    train(resumed_model, resumed, 4, first=4)
    bitwise(weights(resumed_model), weights(model))
    assert resumed.outer_loop.rounds == optimizer.outer_loop.rounds

    optimizer.load_state_dict(copy.deepcopy(state))  # back in time, in a run that has started
    bitwise(weights(model), state["slowmo"]["anchors"][0])
    train(model, optimizer, 4, first=4)
    bitwise(weights(resumed_model), weights(model))

    state["slowmo"]["attempted_steps"] = 5
    assert "RuntimeError: training cannot be resumed inside a round: step 5" in error_of(
        optimizer.load_state_dict, state
    )
    state["slowmo"]["attempted_steps"], state["slowmo"]["version"] = 4, 99
    assert "ValueError: slow state has version 99" in error_of(optimizer.load_state_dict, state)


def check_all_round_trips():
    check_round_trip(lambda p: SGD(p, lr=0.1), tau(2))
    check_round_trip(lambda p: SGD(p, lr=0.1, momentum=0.9), tau(4, inner_state="maintain"))
    check_round_trip(lambda p: Adam(p, lr=0.1), tau(2))
    check_round_trip(lambda p: SGD(p, lr=0.1), SlowMoConfig.diloco(sync_every=2, timeout_seconds=patience(20)))


def test_state_dict_round_trip_continues_bitwise():
    run_workers(check_all_round_trips, 2)


MOMENTUM = [lambda p: SGD(p, lr=0.1, momentum=0.9), lambda p: Adam(p, lr=0.1)]
SAVED = [
    tau(4),
    SlowMoConfig(base="osgp", sync_every=4, timeout_seconds=patience(20)),
    SlowMoConfig(base="sgp", sync_every=3, exact_average=False),
]


def check_save_state(folder, makes, configs):
    """
    Saved after every step, which leaves no trace; loaded into a new process's objects, and into ones that have trained
    already.
    """
    for number, (make, config) in enumerate((make, config) for make in makes for config in configs):
        _, model, optimizer = prepared(config, make=make)
        through = []
        for step in range(8):
            train(model, optimizer, 1, first=step)
            through.append(weights(model))

        accelerator, model, optimizer = prepared(config, make=make)
        accelerator.save_state(f"{folder}/{number}/before")  # not started: as stock
        for step in range(8):
            train(model, optimizer, 1, first=step)
            accelerator.save_state(f"{folder}/{number}/{step}")
            if rank() == 0:  # who seals it
                slowmo_hf.verify_checkpoint(f"{folder}/{number}/{step}")
            bitwise(weights(model), through[step])
        accelerator.wait_for_everyone()

        for step in (1, 2, 3, 5):
            for started in (False, True):
                accelerator, model, optimizer = prepared(config, make=make)
                if started:
                    train(model, optimizer, 3, first=5)
                accelerator.load_state(f"{folder}/{number}/{step}")
                train(model, optimizer, 7 - step, first=step + 1)
                bitwise(weights(model), through[7])
                with slowmo_hf.consensus(optimizer):
                    shown = weights(model)
                    bitwise(shown, mean_over_ranks(shown))
        saved = load_file(f"{folder}/{number}/5/model.safetensors")
        accelerator, model, optimizer = prepared(config, make=make)
        train(model, optimizer, 6)
        with slowmo_hf.consensus(optimizer):
            (shown,) = saved.values()
            assert torch.allclose(shown, weights(model), rtol=0, atol=1e-12), "Accelerate's own file holds the average"


def check_a_save_that_failed(folder):
    """Accelerate's own part fails on every rank: no manifest, neither then nor with the next save."""
    accelerator, model, optimizer = prepared(tau(4))
    slowmo_hf.register_for_checkpointing(accelerator, optimizer)
    train(model, optimizer, 2)
    stock = accelerate.accelerator.save_accelerator_state

    def fail(*args, **kwargs):
        raise OSError("no space left")

    accelerate.accelerator.save_accelerator_state = fail
    assert "no space left" in error_of(accelerator.save_state, f"{folder}/failed")
    accelerate.accelerator.save_accelerator_state = stock
    accelerator.save_state(f"{folder}/next")
    return (
        [error_of(slowmo_hf.verify_checkpoint, f"{folder}/{name}") for name in ("failed", "next")]
        if rank() == 0
        else None
    )


def test_a_save_that_failed_is_never_sealed(tmp_path):
    (failed, following), _ = run_workers(check_a_save_that_failed, 2, str(tmp_path))
    assert "manifest.json is missing: the checkpoint was never finished" in failed
    assert following == ""


def check_every_save_state(folder):
    check_save_state(folder, MOMENTUM, SAVED)


def check_wire_save_state(folder):
    check_save_state(folder, MOMENTUM[:1], [tau(2, compression="int8"), tau(3, overlap_steps=2)])


def check_wrong_save_states(folder):
    accelerator, model, optimizer = prepared(SAVED[1], make=MOMENTUM[0])
    slowmo_hf.register_for_checkpointing(accelerator, optimizer)  # needless, and harmless
    train(model, optimizer, 6)
    with slowmo_hf.consensus(optimizer):
        average = weights(model)
    accelerator.save_state(f"{folder}/yes")
    train(model, optimizer, 3)
    accelerator.wait_for_everyone()
    accelerator.load_state(f"{folder}/yes")
    for show in (optimizer.optimizer.eval, model.eval):
        show()
        bitwise(weights(model), average)  # a look right after a load shows what was loaded
        optimizer.optimizer.train()
        model.train()
        accelerator.load_state(f"{folder}/yes")

    words = {}
    accelerator, model, optimizer = prepared(SAVED[1], make=MOMENTUM[0])
    beside = torch.load(f"{folder}/yes/optimizer.bin", weights_only=True)
    words["not by load_state"] = error_of(optimizer.load_state_dict, beside)
    accelerator.load_state(f"{folder}/yes")
    words["save at once"] = error_of(accelerator.save_state, f"{folder}/at_once")

    accelerator, model, optimizer = prepared(SAVED[1], make=MOMENTUM[0])
    accelerator.save_state(f"{folder}/stock")
    train(model, optimizer, 1)
    accelerator.wait_for_everyone()
    accelerator.load_state(f"{folder}/stock")
    words["stock"] = error_of(train, model, optimizer, 1)
    return words


@pytest.mark.slow
def test_save_state_goes_on_bit_for_bit(tmp_path):
    run_workers(check_every_save_state, 2, str(tmp_path))


@pytest.mark.slow
def test_save_state_of_compressed_rounds_goes_on_bit_for_bit(tmp_path):
    run_workers(check_wire_save_state, 2, str(tmp_path))


def test_save_state_says_what_is_wrong(tmp_path):
    for words in run_workers(check_wrong_save_states, 2, str(tmp_path)):
        assert "load the checkpoint with accelerator.load_state" in words["not by load_state"]
        assert "save after the first forward pass" in words["save at once"]
        assert "has no state of local training, and this run has begun" in words["stock"]


def check_distributed_checkpoint():
    """
    torch's get_optimizer_state_dict takes a dummy step (lr 0, gradients 0) where the state is empty. It must not
    count.
    """
    for make in (lambda p: SGD(p, lr=0.1), lambda p: Adam(p, lr=0.1)):
        _, plain_model, plain = prepared(tau(2), make=make)
        train(plain_model, plain, 3)

        _, model, optimizer = prepared(tau(2), make=make)
        bare = optimizer.optimizer
        get_optimizer_state_dict(model, bare)
        bitwise(weights(model), torch.tensor(START, dtype=torch.float64))
        assert not bare.state  # without us Adam would have counted it
        train(model, optimizer, 3)
        assert (bare.outer_loop.attempted_steps, bare.outer_loop.rounds) == (3, 1)
        bitwise(weights(model), weights(plain_model))


def check_distributed_checkpoint_at_a_round():
    """
    A state that is gone at a round's end (reset), so torch's dummy step comes in mid-training too: the save has what
    it made, and the run goes on as the one that was never saved.
    """
    makes = (
        lambda p: SGD(p, lr=0.1, momentum=0.9, dampening=0.5),
        lambda p: Adam(p, lr=0.1),
    )
    for make in makes:
        _, plain_model, plain = prepared(tau(2, inner_state="reset"), make=make)
        train(plain_model, plain, 2)
        train(plain_model, plain, 3)
        _, model, optimizer = prepared(tau(2, inner_state="reset"), make=make)
        bare = optimizer.optimizer
        train(model, optimizer, 2)
        at = weights(model)
        optimizer.zero_grad()
        assert not bare.state
        saved = get_optimizer_state_dict(model, bare)
        assert not bare.state
        assert all(state for state in saved["state"].values())
        bitwise(weights(model), at)
        assert (bare.outer_loop.attempted_steps, bare.outer_loop.rounds) == (2, 1)
        train(model, optimizer, 3)
        bitwise(weights(model), weights(plain_model))


def check_distributed_checkpoint_loads():
    _, model, optimizer = prepared(tau(2), make=lambda p: Adam(p, lr=0.1))
    train(model, optimizer, 4)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer.optimizer))
    _, other_model, other = prepared(tau(2), make=lambda p: Adam(p, lr=0.3))
    set_optimizer_state_dict(other_model, other.optimizer, optim_state_dict=saved)
    assert other.param_groups[0]["lr"] == 0.1
    bitwise(other.state[other_model.module.w]["exp_avg"], optimizer.state[model.module.w]["exp_avg"])
    train(other_model, other, 3)
    assert (other.optimizer.outer_loop.attempted_steps, other.optimizer.outer_loop.rounds) == (3, 1)


def check_a_step_that_moves_nothing_counts():
    """
    Warm-up from lr 0, and rank 1's batch gives no gradient (all labels masked): a real step, or the clocks part for
    good.
    """
    model = Tracker()
    optimizer = SlowMoOptimizer(SGD(model.parameters(), lr=0.0), tau(2))
    for step, lr in enumerate((0.0, 0.1, 0.0)):  # the third follows a round
        optimizer.zero_grad()
        optimizer.param_groups[0]["lr"] = lr
        model(weights(model) if rank() == 1 and lr == 0 else target(rank(), step)).backward()
        assert bool(model.w.grad.any()) == (rank() == 0 or lr > 0)
        optimizer.step()
        assert optimizer.outer_loop.attempted_steps == step + 1
    assert optimizer.outer_loop.rounds == 1


def check_all_distributed_checkpoints():
    check_distributed_checkpoint()
    check_distributed_checkpoint_at_a_round()
    check_distributed_checkpoint_loads()


def test_a_step_that_moves_nothing_counts_on_every_rank():
    run_workers(check_a_step_that_moves_nothing_counts, 2)


def test_distributed_checkpoints_dummy_step_does_not_count():
    run_workers(check_all_distributed_checkpoints, 2)


# ---- models of other shapes ----


def check_raw_parameters():
    """No module at all: the start is at the first step."""
    w = torch.nn.Parameter(torch.tensor(START, dtype=torch.float64))
    optimizer = SlowMoOptimizer(SGD([w], lr=0.1), tau(2))
    for step in range(5):
        optimizer.zero_grad()
        (0.5 * ((w - target(rank(), step)) ** 2).sum()).backward()
        optimizer.step()
    close(w.detach(), simulate(5)[rank()])


def check_one_optimizer_over_two_modules():
    accelerator = new_accelerator()
    first, second = Tracker(), Tracker()
    inner = SGD([*first.parameters(), *second.parameters()], lr=0.1)
    first, second, optimizer = accelerator.prepare(first, second, SlowMoOptimizer(inner, tau(2)))
    for step in range(5):
        optimizer.zero_grad()
        accelerator.backward(first(target(rank(), step)) + second(target(rank(), step)))
        optimizer.step()
    for model in (first, second):
        assert not model.require_backward_grad_sync
        close(weights(model), simulate(5)[rank()])


def check_generator_and_discriminator():
    """Two modules, two optimizers, two periods: each finds its own wrapper and keeps its own clock."""
    accelerator = new_accelerator()
    first, second = Tracker(), Tracker()
    own = [SlowMoOptimizer(SGD(m.parameters(), lr=0.1), tau(n)) for m, n in ((first, 2), (second, 3))]
    first, second, optimizer, other = accelerator.prepare(first, second, *own)
    for step in range(5):
        for model, one in ((first, optimizer), (second, other)):
            one.zero_grad()
            accelerator.backward(model(target(rank(), step)))
            one.step()
    close(weights(first), simulate(5)[rank()])
    close(weights(second), simulate(5, tau=3)[rank()])


def check_step_before_forward():
    _, model, optimizer = prepared(tau(2))
    model.module.w.grad = torch.ones(3, dtype=torch.float64)
    word = error_of(optimizer.step)
    assert "RuntimeError: optimizer.step() was called before a forward pass" in word
    bitwise(weights(model), torch.tensor(START, dtype=torch.float64))


def check_parameter_set_changes(kind):
    """On rank 1 alone, inside a round: the round fails with the same words on both ranks, and nothing is mixed."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    frozen = model[0].bias.requires_grad_(kind != "unfreeze")
    optimizer = SlowMoOptimizer(SGD(model.parameters(), lr=0.1), tau(2))

    def step():
        model(torch.full((1, 2), 1.0 + rank())).sum().backward()
        optimizer.step()

    step()
    if rank() == 1:
        if kind == "add":
            optimizer.inner_optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))]})
        else:
            frozen.requires_grad_(kind == "unfreeze")
    before = model[1].weight.detach().clone()
    word = error_of(step)
    gradient_step = before - 0.1 * model[1].weight.grad
    torch.testing.assert_close(model[1].weight.detach(), gradient_step)
    return word


def check_all_shapes():
    check_raw_parameters()
    check_one_optimizer_over_two_modules()
    check_generator_and_discriminator()
    check_step_before_forward()
    return {kind: check_parameter_set_changes(kind) for kind in ("freeze", "unfreeze", "add")}


def test_raw_parameters_several_modules_and_changed_parameters():
    first, second = run_workers(check_all_shapes, 2)
    assert first == second
    for word in first.values():
        assert re.match(r"ValueError: rank 1 on \S+, step \d+: the parameter set changed after the start", word), word


# ---- Trainer(optimizers=(SlowMoOptimizer, None)) ----


class TrainerModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(START, dtype=torch.float32))
        self.targets = []

    def forward(self, labels):
        if self.training:
            self.targets.append(labels[0].double())
        loss = 0.5 * ((self.w - labels) ** 2).sum()
        return {"loss": loss, "logits": self.w.detach().expand(len(labels), 3)}


def check_trainer(folder):
    from transformers import Trainer, TrainerCallback, TrainingArguments

    model = TrainerModel()
    optimizer = SlowMoOptimizer(SGD(model.parameters(), lr=0.1), tau(2))
    seen, locals_ = [], []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            locals_.append(model.w.detach().clone())

        def on_prediction_step(self, args, state, control, **kwargs):
            seen.append((state.global_step, model.w.detach().clone()))

    data = [{"labels": target(index % 5, index).float()} for index in range(12)]
    arguments = TrainingArguments(
        folder,
        use_cpu=True,
        max_steps=6,
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        max_grad_norm=0,
        lr_scheduler_type="constant",
    )
    trainer = Trainer(
        model, arguments, train_dataset=data, eval_dataset=data[:2], callbacks=[Watch()], optimizers=(optimizer, None)
    )
    trainer.train()

    everyone = [None, None]
    dist.all_gather_object(everyone, model.targets)
    assert [len(targets) for targets in everyone] == [6, 6]
    assert not torch.equal(torch.as_tensor(everyone[0][0]), torch.as_tensor(everyone[1][0]))
    runs = [simulate(step + 1, gradient=lambda x, r, k: x - everyone[r][k])[rank()] for step in range(6)]
    for step, local in enumerate(locals_):
        close(local, runs[step], 1e-5)
    steps = {step for step, _ in seen}
    assert steps == {3, 6}
    inside = mean_over_ranks(locals_[2])
    assert not torch.allclose(inside, locals_[2], rtol=1e-3)
    for step, shown in seen:
        close(shown, inside if step == 3 else runs[5], 1e-5)


def test_trainer_takes_it_and_evaluates_the_average(tmp_path):
    run_workers(check_trainer, 2, str(tmp_path))


def test_a_start_that_was_refused_is_refused_again():
    """
    A caller that catches the error must not go on untrained: the next forward pass starts again, and says the same.
    """
    model = torch.nn.Linear(2, 1)
    optimizer = SlowMoOptimizer(torch.optim.Adagrad(model.parameters()), SlowMoConfig(inner_state="reset"))
    for _ in range(2):
        with pytest.raises(ValueError, match="inner_state='reset' cannot be used with Adagrad"):
            model(torch.ones(1, 2))
    assert optimizer.outer_loop is None


def test_a_state_is_copied_once():
    """Anchor and velocity into place, and the parameter from its anchor: three copies, and no memory beside."""

    def work(rank):
        weight = torch.nn.Parameter(torch.randn(7, 149))
        optimizer = SlowMoOptimizer(torch.optim.SGD([weight], lr=0.1), SlowMoConfig(sync_every=1))
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        state = optimizer.state_dict()
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
            optimizer.load_state_dict(state)
        names = ("aten::copy_", "aten::clone", "aten::empty_like")
        large = [event.name for event in seen.events() if [7 * 149] in event.input_shapes[:1]]
        return [name for name in large if name in names]

    assert run_in_process(work, 1) == [["aten::copy_"] * 3]
