"""What rounds cannot work with is refused at the start, on every rank, by name and with the way out."""

from __future__ import annotations

import tempfile
import time
from types import SimpleNamespace

import pytest
import schedulefree
import torch
from accelerate import Accelerator
from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer, _apply_optimizer_in_backward
from transformers import Trainer
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

from harness import patience, run_workers
from slowmo_hf import SlowMoCallback, SlowMoConfig, SlowMoOptimizer, run_in_process
from slowmo_hf.adapters.isolation import refusal
from tiny import Regression, Rows, arguments, equal, error_of, values

CONFIG = SlowMoConfig(sync_every=2, timeout_seconds=patience(60))
SGD = torch.optim.SGD


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


def lomo(params, name="Lomo"):
    """A class of that package's name, which is made of a model and steps in its hooks: `step()` does nothing."""
    made = type(name, (SGD,), {"__module__": f"lomo_optim.{name.lower()}", "step": lambda self, closure=None: None})
    return made(params, lr=0.1)


def averaging(params):
    """torch's own, whose step averages the parameters of all ranks."""
    return PostLocalSGDOptimizer(SGD(params, lr=0.1), SimpleNamespace(step=0, average_parameters=print))


REFUSED = {
    **{name: (make, f"{name} is schedule-free: .* Use AdamW with") for name, make in SCHEDULE_FREE.items()},
    "by what it does": (OfAnotherPackage, "OfAnotherPackage is schedule-free"),
    "inside another": (lambda p: Around(OfAnotherPackage(p)), "inner optimizer OfAnotherPackage is schedule-free"),
    "inside two": (lambda p: Around(Around(OfAnotherPackage(p))), "inner optimizer OfAnotherPackage is sched"),
    "LOMO": (lomo, r"Lomo \(of lomo_optim\) steps in the backward pass .* Use one that steps after .*'adafactor'"),
    "AdaLomo, inside another": (lambda p: Around(lomo(p, "AdaLomo")), r"inner optimizer AdaLomo \(of lomo_optim\)"),
    "averaging": (averaging, "PostLocalSGDOptimizer averages the parameters over all ranks itself.*local_sgd\\(sync"),
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
    found["ZeRO, in a Trainer"] = f"ValueError: {refusal([bare], zero)}"
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
