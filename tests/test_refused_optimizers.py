"""What rounds cannot work with is refused at the start, on every rank, by name and with the way out."""

from __future__ import annotations

import re
import tempfile
import time

import pytest
import schedulefree
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.distributed.optim import ZeroRedundancyOptimizer, _apply_optimizer_in_backward
from transformers import Trainer
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

import slowmo_hf
from harness import patience, run_workers
from slowmo_hf import SlowMoCallback, SlowMoConfig, SlowMoOptimizer, run_in_process
from slowmo_hf.adapters.isolation import refuse_unsupported
from tiny import Regression, Rows, WholeAdam, arguments, equal, error_of, values

CONFIG = SlowMoConfig(sync_every=2, timeout_seconds=patience(60))
SGD = torch.optim.SGD


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


class Around(torch.optim.Optimizer):
    """Another package's wrapper, which keeps what it wraps in an attribute of its own."""

    def __init__(self, inner):
        super().__init__([p for group in inner.param_groups for p in group["params"]], {"lr": 0.1})
        self.parts = [inner]


SCHEDULE_FREE = {
    "AdamWScheduleFree": lambda p: schedulefree.AdamWScheduleFree(p, lr=0.1),
    "SGDScheduleFree": lambda p: schedulefree.SGDScheduleFree(p, lr=0.1),
    "RAdamScheduleFree": lambda p: schedulefree.RAdamScheduleFree(p, lr=0.1),
    "ScheduleFreeWrapper": lambda p: schedulefree.ScheduleFreeWrapper(SGD(p, lr=0.1), momentum=0.9),
    "AdamWScheduleFreeClosure": lambda p: schedulefree.AdamWScheduleFreeClosure(p, lr=0.1),
}


class OfAnotherPackage(SGD):
    """Schedule-free by what it does: `train()` and `eval()`, and what it is in now."""

    def __init__(self, params):
        super().__init__(params, lr=0.1)
        for group in self.param_groups:
            group["train_mode"] = True

    def train(self): ...

    def eval(self): ...


class ShadowWeights(SGD):
    """`eval()` shows twice the weights, `train()` gives back what it has doubled; no schedule-free mode."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr=lr)
        self.is_shown = False

    def scale(self, factor):
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.mul_(factor)

    def train(self):
        if self.is_shown:
            self.scale(0.5)
        self.is_shown = False

    def eval(self):
        self.scale(2.0)
        self.is_shown = True


def layerwise(params):
    """As Trainer makes it for `optim="galore_adamw_layerwise"`."""
    return LayerWiseDummyOptimizer(optimizer_dict={p: SGD([p], lr=0.1) for p in params}, lr=0.1)


REFUSED = {
    **{name: (make, f"{name} is schedule-free: .* Use AdamW with") for name, make in SCHEDULE_FREE.items()},
    "by what it does": (OfAnotherPackage, "OfAnotherPackage is schedule-free"),
    "inside another": (lambda p: Around(OfAnotherPackage(p)), "inner optimizer OfAnotherPackage is schedule-free"),
    "inside two": (lambda p: Around(Around(OfAnotherPackage(p))), "inner optimizer OfAnotherPackage is sched"),
    "layerwise": (layerwise, "LayerWiseDummyOptimizer steps layer by layer in backward hooks.*optim='galore_adamw'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_one_process_of_a_loop_is_told_before_its_first_step(case):
    make, words = REFUSED[case]
    model, rows = Regression(), Rows(8)
    before = values(model)

    def loop():
        optimizer = SlowMoOptimizer(make(list(model.parameters())), CONFIG)
        optimizer.train()
        model(rows.x, rows.y)["loss"].backward()
        optimizer.step()

    with pytest.raises(ValueError, match=f"^the inner optimizer .*{words}|^the {words}"):
        loop()
    assert equal(values(model), before)


@pytest.mark.parametrize("case", REFUSED)
def test_a_trainer_is_told_before_its_first_step(case):
    make, words = REFUSED[case]
    model = Regression(torch.float32)
    before = values(model)
    optimizer = make(list(model.parameters()))
    schedule = torch.optim.lr_scheduler.LambdaLR(SGD(model.parameters(), lr=0.1), lambda step: 1.0)
    trainer = Trainer(
        model,
        arguments(tempfile.mkdtemp(), max_steps=4),
        train_dataset=Rows(16, torch.float32),
        optimizers=(optimizer, schedule),
        callbacks=[SlowMoCallback(CONFIG)],
    )
    with pytest.raises(ValueError, match=words):
        trainer.train()
    assert equal(values(model), before)


def test_optim_schedule_free_of_trainer_is_refused():
    trainer = Trainer(
        Regression(torch.float32),
        arguments(tempfile.mkdtemp(), max_steps=4, optim="schedule_free_adamw", lr_scheduler_type="constant"),
        train_dataset=Rows(16, torch.float32),
        callbacks=[SlowMoCallback(CONFIG)],
    )
    with pytest.raises(ValueError, match="AdamWScheduleFree is schedule-free: the parameters are one of its two"):
        trainer.train()


def started_on_ranks():
    """Every rank's errors, and the seconds of it all."""
    began, found = time.monotonic(), {}
    accelerator, rows, bare = Accelerator(cpu=True), Rows(8), Regression()
    inner = schedulefree.AdamWScheduleFree(bare.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(bare, SlowMoOptimizer(inner, CONFIG))
    optimizer.train()
    found["loop"] = error_of(model, rows.x, rows.y)
    trainer = Trainer(
        Regression(torch.float32),
        arguments(tempfile.mkdtemp(), max_steps=4, optim="schedule_free_adamw", lr_scheduler_type="constant"),
        train_dataset=Rows(16, torch.float32),
        callbacks=[SlowMoCallback(CONFIG)],
    )
    found["Trainer"] = error_of(trainer.train)
    zero = ZeroRedundancyOptimizer(bare.parameters(), torch.optim.AdamW, lr=0.1)
    found["ZeRO"] = error_of(SlowMoOptimizer, zero, CONFIG)
    found["ZeRO, in a Trainer"] = error_of(refuse_unsupported, [bare], zero)
    return found, time.monotonic() - began


def test_every_rank_is_told_and_none_waits():
    (first, seconds), (second, _) = run_workers(started_on_ranks, 2)
    assert first == second
    assert first["ZeRO"] == first["ZeRO, in a Trainer"]
    assert first["ZeRO"].startswith("ValueError: the inner optimizer ZeroRedundancyOptimizer shares its state with")
    assert "SlowMoConfig(shard_slow_state=True), or shard the model by FSDP2" in first["ZeRO"]
    assert first["loop"] == first["Trainer"]
    assert first["loop"].startswith("ValueError: the inner optimizer AdamWScheduleFree is schedule-free")
    assert seconds < patience(50)


STOCK = SlowMoConfig(base="all_reduce", outer_momentum=0.0)


@pytest.mark.parametrize("name", ["AdamWScheduleFree", "SGDScheduleFree", "RAdamScheduleFree", "backward"])
def test_stock_training_takes_any(name):
    """Without rounds: what the optimizer does by itself, bit for bit, an evaluation in between included."""

    def weights(wrap):
        model, rows = Regression(), Rows(8)
        if name == "backward":
            _apply_optimizer_in_backward(SGD, list(model.head.parameters()), {"lr": 0.1})
        held = model.body.parameters() if name == "backward" else model.parameters()
        optimizer = wrap(SCHEDULE_FREE.get(name, ShadowWeights)(held))
        optimizer.train()
        seen = []
        for step in range(6):
            model(rows.x, rows.y)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == 3:
                optimizer.eval()
                seen.append(values(model))
                optimizer.train()
        return [*seen, values(model)]

    stock, ours = weights(lambda inner: inner), weights(lambda inner: SlowMoOptimizer(inner, STOCK))
    assert all(equal(mine, right) for mine, right in zip(ours, stock, strict=True))


def trained_schedule_free(slow):
    trainer = Trainer(
        Regression(torch.float32),
        arguments(
            tempfile.mkdtemp(),
            max_steps=6,
            optim="schedule_free_adamw",
            lr_scheduler_type="constant",
            eval_strategy="steps",
            eval_steps=2,
        ),
        train_dataset=Rows(32, torch.float32),
        eval_dataset=Rows(8, torch.float32),
        callbacks=[SlowMoCallback(STOCK)] if slow else [],
    )
    trainer.train()
    return values(trainer.model)


def test_stock_training_of_a_trainer_takes_schedule_free_optimizers():
    assert equal(trained_schedule_free(True), trained_schedule_free(False))


@pytest.mark.parametrize("whole", [True, False])
def test_what_steps_in_the_backward_pass_is_refused(whole):
    """Also where the optimizer of ours holds other parameters of the model."""
    model, rows = Regression(), Rows(8)
    _apply_optimizer_in_backward(SGD, list(model.head.parameters()), {"lr": 0.1})
    held = model.parameters() if whole else model.body.parameters()
    optimizer = SlowMoOptimizer(SGD(held, lr=0.1), CONFIG)
    with pytest.raises(ValueError, match=r"a parameter of shape \[1, 5\] is stepped by SGD in the backward pass"):
        model(rows.x, rows.y)
    assert optimizer.outer_loop is None


# ---- torch's Join ----


def joined(case):
    """What Join says, how long it took, and the sums of two workers' weights where it says nothing."""
    accelerator, bare, rows = Accelerator(cpu=True), Regression(), Rows(64)
    base = "all_reduce" if case in ("stock", "momentum") else "sgp" if case == "gossip" else "local_sgd"
    config = SlowMoConfig(
        base=base, sync_every=4, outer_momentum=0.0 if case == "stock" else 0.5, timeout_seconds=patience(20)
    )
    model, optimizer = accelerator.prepare(bare, SlowMoOptimizer(SGD(bare.parameters(), lr=0.1), config))

    def step(number):
        accelerator.backward(model(rows.x[number : number + 4], rows.y[number : number + 4])["loss"])
        optimizer.step()
        optimizer.zero_grad()

    def uneven(enable=True):
        with model.join() if case == "DDP's own" else Join([model], enable=enable):
            for number in range(6 if rank() == 0 or not enable else 0 if case == "no rows here" else 3):
                step(number + 8 * rank())

    if case in ("after the start", "DDP's own", "momentum", "finished"):
        step(0)
    if case == "closed":
        with Join([model]), torch.no_grad():
            model(rows.x, rows.y)
    if case == "finished":
        slowmo_hf.finish(optimizer)
        with Join([model]), torch.no_grad():
            for _ in range(3 + rank()):
                model(rows.x, rows.y)
        said = []
        for number in range(6 + rank()):  # the Join that was left sends no more: workers may be uneven
            step(number)
        said.append(error_of(uneven))
        with slowmo_hf.join(optimizer):
            pass
        said.append(accelerator.gather(torch.tensor([rank() + 1.0])).tolist())
        return said, values(bare)
    began = time.monotonic()
    error = error_of(uneven, enable=False) if case == "switched off" else "" if case == "closed" else error_of(uneven)
    if case == "closed":
        with slowmo_hf.join(optimizer):
            for number in range(5 + 2 * rank()):
                step(number)
        error = accelerator.gather(torch.tensor([rank() + 1.0])).tolist()
    return error, time.monotonic() - began, values(bare)


@pytest.mark.parametrize("case", ["before the start", "after the start", "DDP's own", "gossip", "momentum"])
def test_join_is_refused_on_every_rank(case):
    (first, seconds, _), (second, _, _) = run_workers(joined, 2, case)
    assert first == second
    base = {"gossip": "sgp", "momentum": "all_reduce"}.get(case, "local_sgd")
    assert first.startswith(
        f"ValueError: torch's Join (accelerator.join_uneven_inputs) cannot be used with base='{base}'"
    )
    way_out = "Use `with slowmo_hf.join(optimizer):`" if base == "local_sgd" else "equally many batches"
    assert way_out in first
    assert seconds < patience(5)


def test_a_rank_without_rows_in_join_makes_nobody_wait():
    with pytest.raises(AssertionError, match=r"rank 0:[\s\S]*torch's Join"):
        run_workers(joined_and_raised, 2, time_limit_seconds=15)


def joined_and_raised():
    error = joined("no rows here")[0]
    if error:
        raise RuntimeError(error)


@pytest.mark.parametrize("case", ["stock", "switched off"])
def test_join_that_couples_nothing_of_ours_works(case):
    """Plain all-reduce is stock training; `enable=False` (accelerate's with even batches) does nothing."""
    (first, _, mine), (second, _, others) = run_workers(joined, 2, case)
    assert (first, second) == ("", "")
    assert equal(mine, others) == (case == "stock")


def test_a_join_that_was_left_couples_nobody():
    """What it sends at every forward pass, more on the worker with more rows, would be in the way of a gather."""
    (gathered, _, mine), (gathered_there, _, others) = run_workers(joined, 2, "closed")
    assert gathered == gathered_there == [1.0, 2.0]
    assert not equal(mine, others)
    (said, mine), (said_there, others) = run_workers(joined, 2, "finished")
    assert said == said_there
    assert "slowmo_hf.join" in said[0]
    assert said[1] == [1.0, 2.0]


def trained_twice():
    """A Trainer's wrapper is given back, so Join works behind it: two passes here, three there."""
    trainer = Trainer(
        Regression(torch.float32),
        arguments(tempfile.mkdtemp(), max_steps=4),
        train_dataset=Rows(32, torch.float32),
        callbacks=[SlowMoCallback(CONFIG)],
    )
    trainer.train()
    rows, model, passes = Rows(4, torch.float32), trainer.model_wrapped, 0
    with Join([model]):
        for _ in range(2 + rank()):
            model(rows.x, rows.y)["loss"].backward()
            passes += 1
    return passes


def test_join_works_behind_a_trainers_end():
    assert run_workers(trained_twice, 2) == [2, 3]


# ---- passed on ----


def take_steps(model, optimizer, rows, steps=3):
    for _ in range(steps):
        model(rows.x, rows.y)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()


def test_train_and_eval_reach_an_optimizer_that_has_them():
    """Twice the weights while it evaluates, also before the start; then training goes on from where it was."""
    model, rows = Regression(), Rows(8)
    optimizer = SlowMoOptimizer(ShadowWeights(model.parameters(), lr=0.1), SlowMoConfig(sync_every=2))
    start = values(model)
    optimizer.eval()
    assert equal(values(model), {name: 2 * value for name, value in start.items()})
    optimizer.train()
    assert equal(values(model), start)
    take_steps(model, optimizer, rows)
    before = values(model)
    optimizer.eval()
    assert equal(values(model), {name: 2 * value for name, value in before.items()})
    optimizer.train()
    assert equal(values(model), before)
    plain = SlowMoOptimizer(SGD(Regression().parameters(), lr=0.1), SlowMoConfig(sync_every=2))
    plain.eval()
    plain.train()


def evaluated(worker):
    """Of two workers: its own weights, and what `eval()` shows."""
    model, rows = Regression(), Rows(8, seed=worker)
    optimizer = SlowMoOptimizer(ShadowWeights(model.parameters(), lr=0.1), SlowMoConfig(sync_every=2))
    take_steps(model, optimizer, rows)
    own = values(model)
    optimizer.eval()
    shown = values(model)
    optimizer.train()
    return own, shown, values(model)


def test_eval_of_two_workers_is_the_optimizers_own_view_of_the_average():
    (first, shown, after), (second, also_shown, _) = run_in_process(evaluated, 2)
    assert equal(shown, also_shown)
    assert equal(after, first)
    for name in first:
        torch.testing.assert_close(shown[name], first[name] + second[name], rtol=0, atol=1e-12)


# ---- outer optimizers ----

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


@pytest.mark.parametrize("outer", [*(f"torch.optim.{name}" for name in WORKS), "test_refused_optimizers.Noisy"])
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
