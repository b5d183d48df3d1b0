"""SlowMoOptimizer under Accelerate: two workers, fp16's skipped steps, models of other shapes (tests/tracker.py)."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch
import torch.distributed as dist
from accelerate.optimizer import AcceleratedOptimizer
from torch.optim import SGD, Adam, lr_scheduler

import slowmo_hf
from harness import run_workers
from slowmo_hf import SlowMoConfig, SlowMoOptimizer
from tiny import error_of
from tracker import (
    NEVER,
    START,
    Tracker,
    bitwise,
    close,
    new_accelerator,
    prepared,
    pull,
    rank,
    simulate,
    target,
    tau,
    train,
    weights,
)


def clipped_pull(x, rank, step):
    gradient = pull(x, rank, step)
    return gradient * min(1.0, 1.0 / (float(gradient.norm()) + 1e-6))


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
