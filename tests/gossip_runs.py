"""
Gossip under Trainer and in a custom loop, followed by hand (`follow_gossip`): from what each rank held before and
after every exchange, with mixing matrices in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.optim import SGD
from transformers import Trainer, TrainerCallback

from harness import patience
from mixing import mixing_matrix
from slowmo_hf import SlowMoCallback, SlowMoConfig, SlowMoOptimizer, consensus, last_round
from slowmo_hf.wire.gossip import GossipBase, make_topology
from tiny import (
    Recorder,
    Rows,
    arguments,
    equal,
    recorded,
    values,
)

STEPS, TAU, NEVER = 10, 4, 10**6
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2.0**-8}


def gossip(base, sync_every=TAU, **settings):
    return SlowMoConfig(base=base, sync_every=sync_every, timeout_seconds=patience(30), **settings)


BASES = {
    "sgp": gossip("sgp"),
    "osgp": gossip("osgp"),
    "osgp 2": gossip("osgp", staleness=2),
    "dpsgd": gossip("dpsgd"),
    "osgp, no average": gossip("osgp", exact_average=False),
}
THREE = ("sgp", "osgp 2", "dpsgd")


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def follow_gossip(
    runs: list[dict[str, Any]], config: SlowMoConfig, first_exchange: int = 0
) -> list[dict[str, torch.Tensor]]:
    """
    Push-sum and the outer loop on what the ranks recorded: x <- x + (z' - z), the exchange by its mixing matrix,
    messages exactly as late as told, lines 6 to 8. Compares parameters, numerators and weights where they were kept,
    and the end. Returns the average after every step, messages in flight included.
    """
    workers, names = range(len(runs)), runs[0]["trained"]
    mixing = partial(mixing_matrix, make_topology(config, len(runs)))
    staleness = config.staleness if config.base == "osgp" else 0
    z = [{name: run["start"][name].double() for name in names} for run in runs]
    assert names
    assert all(torch.equal(z[i][name], z[0][name]) for i in workers for name in names), "workers differ at the start"
    x, w, flying = [dict(own) for own in z], [1.0 for _ in workers], []
    anchors, velocities, last_lr = (
        [dict(own) for own in z],
        [{name: torch.zeros_like(own[name]) for name in names} for own in z],
        0.0,
    )
    averages, exchange = [], first_exchange

    def average():
        assert sum(w) + sum(flown for *_, flown in flying) == pytest.approx(len(runs), abs=1e-9)
        return {
            name: sum(own[name] for own in [*x, *(flown for _, _, flown, _ in flying)]) / len(runs) for name in names
        }

    for k in range(len(runs[0]["after"])):
        for i in workers:
            x[i] = {name: x[i][name] + runs[i]["stepped"][k][name].double() - z[i][name] for name in names}
        is_round = (k + 1) % config.sync_every == 0
        if not (is_round and config.exact_average):
            shares = mixing(exchange)
            exchange += 1
            for j in workers:
                for i in workers:
                    if i != j and shares[i][j]:
                        flying.append(
                            (
                                k + staleness,
                                i,
                                {name: shares[i][j] * x[j][name] for name in names},
                                shares[i][j] * w[j],
                            )
                        )
            x, w = (
                [{name: shares[i][i] * x[i][name] for name in names} for i in workers],
                [shares[i][i] * w[i] for i in workers],
            )
            for due, i, flown, weight in flying:
                if due <= k:
                    x[i], w[i] = {name: x[i][name] + flown[name] for name in names}, w[i] + weight
            flying = [message for message in flying if message[0] > k]
        if is_round:
            lr, agreed = sum(runs[0]["lrs"][k + 1 - config.sync_every : k + 1]) / config.sync_every, average()
            ratio = lr / last_lr if last_lr else 1.0
            last_lr = lr
            for i in workers:
                for name in names:
                    reached = agreed[name] if config.exact_average else x[i][name] / w[i]
                    velocities[i][name] = (
                        config.outer_momentum * ratio * velocities[i][name] + anchors[i][name] - reached
                    )
                    anchors[i][name] = anchors[i][name] - config.outer_lr * velocities[i][name]
            if config.exact_average:
                w, flying = [1.0 for _ in workers], []
            x = [{name: w[i] * anchors[i][name] for name in names} for i in workers]
        averages.append(average())
        for i in workers:
            after = runs[i]["after"][k]
            for name in names:
                close(after[name], x[i][name] / w[i], f"worker {i}, step {k + 1}, {name}")
            z[i] = {name: after[name].double() for name in names}
            if runs[i].get("held"):
                compare_held(runs[i]["held"][k], x[i], w[i], f"worker {i}, step {k + 1}")
        if is_round and config.exact_average:
            assert all(equal_parameters(run["after"][k], runs[0]["after"][k], names) for run in runs)
    for run in runs:
        assert equal(run["final"], runs[0]["final"]), "ranks differ at the end"
        for name in names:
            close(run["final"][name], averages[-1][name], f"the end is no average: {name}")
    return averages


def close(found, right, words):
    tolerance = TOLERANCE[found.dtype]
    assert torch.allclose(found.double(), right.double(), rtol=tolerance, atol=tolerance), (words, found, right)


def equal_parameters(left, right, names):
    return all(torch.equal(left[name], right[name]) for name in names)


def compare_held(held, x, w, words):
    assert held["w"] == pytest.approx(w, abs=1e-12), words
    for name, own in held["x"].items():
        assert own.dtype == (torch.float64 if own.dtype == torch.float64 else torch.float32)
        close(own, x[name], f"{words}: the numerator of {name}")


def held_now(outer_loop):
    """This worker's numerators and weight, alone (x, w) and with the messages in flight to it (mass, mass_w)."""
    base, tensors = outer_loop.base, outer_loop.tensors
    assert isinstance(base, GossipBase)
    base.settle()
    names = {id(p): name for name, p in zip(tensors.names, tensors.trainable, strict=True)}
    x, mass = {}, {}
    for item, flat in base.numerators.items():
        parts = [item.views(part) for part in [flat, *(m[item] for e in base.in_flight for m in e.received)]]
        for span, own, *flying in zip(item.spans, *parts, strict=True):
            x[names[id(span.param)]] = own.clone()
            mass[names[id(span.param)]] = sum((part.double() for part in flying), own.double().clone())
    weights = [float(weight) for e in base.in_flight if e.weight for weight in e.weight.received]
    return {
        "x": x,
        "w": base.weight,
        "mass": mass,
        "mass_w": base.weight + sum(weights),
        "in_flight": len(base.in_flight),
    }


def average_of_held(runs, step):
    """What a look at a step has to show, from every worker's numerators and messages."""
    states = [run["held"][step - 1] for run in runs]
    assert sum(state["mass_w"] for state in states) == pytest.approx(len(runs), abs=1e-12)
    return {name: sum(state["mass"][name] for state in states) / len(runs) for name in states[0]["mass"]}


class Held(TrainerCallback):
    """
    Keeps numerators and weights after every exchange, and the bytes that exchanges have sent. Stands before
    SlowMoCallback.
    """

    def __init__(self, ours):
        self.ours, self.held, self.exchanged, self.before = ours, [], [], None

    def on_train_begin(self, args, state, control, **kwargs):
        self.held, self.exchanged, self.before = [], [], None

    def on_step_begin(self, args, state, control, **kwargs):
        if self.before is None:
            self.before = self.ours.outer_loop.workers.gossip.bytes_sent

    def on_step_end(self, args, state, control, **kwargs):
        self.held.append(held_now(self.ours.outer_loop))
        self.exchanged.append(self.ours.outer_loop.workers.gossip.bytes_sent - self.before)


def run(
    folder, config, model, data, *, held=False, watchers=(), optimizer=None, prepare=None, resume=None, **settings
):
    """A stock Trainer; returns what it recorded."""
    recorder, ours = Recorder(), SlowMoCallback(config)
    keeper = Held(ours)
    trainer = Trainer(
        model=model,
        args=arguments(folder, **{"max_steps": STEPS, "learning_rate": 1e-2, **settings}),
        train_dataset=data,
        eval_dataset=[data[index] for index in range(8)],
        optimizers=(optimizer(model.parameters()) if optimizer else None, None),
        callbacks=[recorder, *([keeper] if held else []), *watchers, ours],
    )
    if prepare:
        prepare(trainer)
    trainer.train(resume_from_checkpoint=resume)
    assert ours.outer_loop.attempted_steps == trainer.state.global_step
    kept = {
        "held": keeper.held,
        "exchanged": keeper.exchanged,
        "history": trainer.state.log_history,
        "seen": getattr(model, "seen", None),
    }
    return {**recorded(trainer, recorder), **kept}


def loop(
    config: SlowMoConfig,
    bare: nn.Module,
    batch: Callable[[int], dict[str, torch.Tensor]],
    *,
    optimizer=lambda parameters: SGD(parameters, lr=0.1),
    steps: int = STEPS,
    accumulation: int = 1,
    clip: float | None = None,
    scaler: Any = None,
    look: bool = False,
    held: bool = False,
):
    """
    A custom loop under Accelerate; `batch(n)` is this rank's n-th. `look`: enter consensus after every step and draw
    there.
    """
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    accelerator.scaler = scaler
    inner = optimizer(bare.parameters())
    model, optimizer = accelerator.prepare(bare, SlowMoOptimizer(inner, config))
    stepped, done = [], []
    inner.register_step_post_hook(lambda *_: done.append(values(bare)))
    out: dict[str, Any] = {
        "start": values(bare),
        "stepped": stepped,
        "after": [],
        "lrs": [],
        "evaluated": {},
        "held": [],
        "exchanged": [],
    }
    torch.manual_seed(rank())
    for micro in range(steps * accumulation):
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch(micro))["loss"])
            if clip and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            outer_loop, before = optimizer.optimizer.outer_loop, values(bare)
            if held and micro == 0:
                sent = outer_loop.workers.gossip.bytes_sent
            optimizer.step()
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue
        stepped.append(done.pop() if done else before)  # a scaler that skips does not call the inner optimizer
        out["after"].append(values(bare))
        out["lrs"].append(inner.param_groups[0]["lr"])
        if held:
            out["held"].append(held_now(outer_loop))
            out["exchanged"].append(outer_loop.workers.gossip.bytes_sent - sent)
        if look:
            with consensus(optimizer):
                out["evaluated"][len(stepped)] = values(bare)
                model.eval()
                with torch.no_grad():
                    model(**batch(micro))
                model.train()
                torch.rand(3)
            assert equal(values(bare), out["after"][-1]), "the local weights are back"
    with consensus(optimizer):
        out["final"] = values(bare)
    assert outer_loop.attempted_steps == steps
    trained = [name for name, p in bare.named_parameters() if p.requires_grad]
    return {**out, "trained": trained, "seen": getattr(bare, "seen", None), "report": last_round(optimizer)}


def some_rows(count, dtype=torch.float64):
    """This rank's batches of `count` rows."""
    rows, world = Rows(400, dtype), dist.get_world_size() if dist.is_initialized() else 1

    def batch(micro):
        start = (micro * world + rank()) * count % 390
        return {"x": rows.x[start : start + count], "labels": rows.y[start : start + count]}

    return batch


CLIP, LR = 1.0, 0.1


class Numbers:
    """The numbers of this process's exchanges."""

    def __enter__(self):
        self.seen, self.mix_ = [], GossipBase.mix_

        def mix_(base, number, step):
            self.seen.append(number)
            self.mix_(base, number, step)

        GossipBase.mix_ = mix_
        return self

    def __exit__(self, *_):
        GossipBase.mix_ = self.mix_
