"""SlowMoOptimizer: a real torch.optim.Optimizer to everyone who asks, in one process (tests/tracker.py)."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch.optim import SGD, AdamW, lr_scheduler

import slowmo_hf
from harness import run_workers
from slowmo_hf import SlowMoConfig, SlowMoOptimizer
from slowmo_hf.adapters import first_pass
from tiny import error_of
from tracker import NEVER, START, Tracker, bitwise, close, new_accelerator, simulate, target, tau, train, weights


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
    """Who hears of every module's forward pass, after a collection; one hook serves all."""
    gc.collect()
    assert len(torch.nn.modules.module._global_forward_pre_hooks) == bool(first_pass._listening)
    return list(first_pass._listening)


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


@pytest.mark.parametrize("finished", [False, True])
def test_a_model_and_its_optimizer_go_when_they_are_let_go(finished):
    """As with a stock optimizer: a sweep has memory for one model and Adam's state, and not for a second one."""
    accelerator, tracker = new_accelerator(), Tracker()
    model, optimizer = accelerator.prepare(tracker, SlowMoOptimizer(AdamW(tracker.parameters()), tau(2)))
    for _ in range(5):
        accelerator.backward(model(target(0, 0)))
        optimizer.step()
        optimizer.zero_grad()
    if finished:
        slowmo_hf.finish(optimizer)
    inner = optimizer.optimizer.inner_optimizer
    left = [weakref.ref(x) for x in (tracker, inner, *next(iter(inner.state.values())).values())]
    gc.disable()
    try:
        accelerator.free_memory()
        del tracker, model, optimizer, inner
        assert [x() for x in left] == [None] * len(left)
    finally:
        gc.enable()


def test_an_optimizer_that_never_trained_is_collected_with_its_hook():
    """
    The original of a copy, a prepared run that was given up: neither parameters nor a hook on every forward pass may
    stay.
    """
    before = listeners()
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
    assert listeners() == before
    assert [ref() for ref in left] == [None] * 6


@pytest.mark.slow
def test_listeners_come_and_go_one_by_one():
    """
    Many in turn leave nothing; the one that is left still starts, and takes its hook away; a started one is collected
    too.
    """
    before = listeners()
    for _ in range(5):
        model = Tracker()
        other = SlowMoOptimizer(SGD(model.parameters(), lr=0.1), tau(2))
    assert len(listeners()) == len(before) + 1
    optimizer = SlowMoOptimizer(SGD(model.parameters(), lr=0.1), tau(2))
    del other
    train(model, optimizer, 3)
    assert listeners() == before
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
