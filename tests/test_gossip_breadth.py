"""
What people do with Trainer and Accelerate, under the gossip bases. Every run is followed by hand (`follow_gossip`):
from what each rank held before and after every exchange, with mixing matrices in float64.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW
from transformers import Trainer, TrainerCallback

from harness import patience, run_workers
from reference import gossip_reference
from slowmo_hf import SlowMoCallback, SlowMoConfig, SlowMoOptimizer, consensus, last_round
from slowmo_hf.wire.gossip import GossipBase, make_topology
from tiny import (
    Heard,
    OutOfMemoryOnce,
    Recorder,
    Regression,
    Rows,
    SmallNorm,
    arguments,
    bert,
    equal,
    mean,
    recorded,
    sentences,
    two_groups,
    values,
)

STEPS, TAU, NEVER = 10, 4, 10**6
EPS = 2.0**-23
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


# ---- by hand ----


def follow_gossip(
    runs: list[dict[str, Any]], config: SlowMoConfig, first_exchange: int = 0
) -> list[dict[str, torch.Tensor]]:
    """
    Push-sum and the outer loop on what the ranks recorded: x <- x + (z' - z), the exchange by its mixing matrix,
    messages exactly as late as told, lines 6 to 8. Compares parameters, numerators and weights where they were kept,
    and the end. Returns the average after every step, messages in flight included.
    """
    workers, names = range(len(runs)), runs[0]["trained"]
    mixing = make_topology(config, len(runs)).mixing_matrix
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


# ---- the two surfaces ----


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


def some_sentences(count=4):
    data = sentences(64)

    def batch(micro):
        chosen = [data[(micro * dist.get_world_size() + rank()) * count % 60 + i] for i in range(count)]
        return {key: torch.stack([row[key] for row in chosen]) for key in chosen[0]}

    return batch


# ---- 1. looks ----


SAVES = {"osgp 2": 1}  # after every step there, after every third elsewhere


def check_trainer_looks(folder):
    out = {}
    for name, config in BASES.items():
        often = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": SAVES.get(name, 3)}
        alone = run(f"{folder}/alone", config, bert(dropout=0.1), sentences())
        out[name] = alone, run(f"{folder}/{name}", config, bert(dropout=0.1), sentences(), **often)
    return out


def check_accelerate_looks():
    out = {}
    for name, config in BASES.items():
        out[name] = [loop(config, bert(dropout=0.1), some_sentences(), look=look, held=look) for look in (False, True)]
    return out


def compare_looks(name, alone, watched, averages):
    for one, other in zip(alone, watched, strict=True):
        for step, (left, right) in enumerate(zip(one["after"], other["after"], strict=True), start=1):
            assert equal(left, right), f"{name}: a look changed step {step}"
        assert equal(one["final"], other["final"])
    for step in range(1, STEPS + 1):
        shown = watched[0]["evaluated"][step]
        for other in watched:
            assert equal(other["evaluated"][step], shown), f"{name}, step {step}: ranks were shown different averages"
        for parameter, right in averages[step - 1].items():
            close(shown[parameter], right, f"{name}, step {step}: what was shown")
        one = alone[0]["after"][step - 1]
        agree = step % TAU == 0 and name != "osgp, no average"
        assert equal_parameters(one, shown, watched[0]["trained"]) == agree, (
            f"{name}, step {step}: workers must differ for this to tell"
        )


@pytest.mark.slow
def test_trainers_looks_show_the_average_and_leave_no_trace(tmp_path):
    ranks = run_workers(check_trainer_looks, 3, str(tmp_path))
    model = bert()
    for name, config in BASES.items():
        alone, watched = ([out[name][which] for out in ranks] for which in (0, 1))
        compare_looks(name, alone, watched, follow_gossip(alone, config))
        assert watched[0]["saved"] == sorted({*range(SAVES.get(name, 3), STEPS, SAVES.get(name, 3)), STEPS})
        for step in watched[0]["saved"]:
            saved = load_file(f"{tmp_path}/{name}/checkpoint-{step}/model.safetensors")
            model.load_state_dict(saved, strict=True)
            assert equal(saved, watched[0]["evaluated"][step]), "what was saved is what was shown"


@pytest.mark.slow
def test_accelerates_looks_show_the_average_and_leave_no_trace():
    ranks = run_workers(check_accelerate_looks, 3)
    for name, config in BASES.items():
        alone, watched = ([out[name][which] for out in ranks] for which in (0, 1))
        compare_looks(name, alone, watched, follow_gossip(alone, config))
        follow_gossip(watched, config)
        compare_looks(name, alone, watched, [average_of_held(watched, step) for step in range(1, STEPS + 1)])
        most = {"sgp": 0, "osgp": 1, "osgp 2": 2, "dpsgd": 0, "osgp, no average": 1}[name]
        assert max(state["in_flight"] for state in watched[0]["held"]) == most


def check_statistics(folder):
    """BatchNorm: statistics are averaged at exact rounds and looks, and not by exchanges."""
    cases = {name: BASES[name] for name in ("osgp", "dpsgd", "osgp, no average")}
    settings = {"eval_strategy": "steps", "eval_steps": 1}
    return {
        name: run(folder, config, SmallNorm(), Rows(160, torch.float32), **settings) for name, config in cases.items()
    }


@pytest.mark.slow
def test_batch_norm_statistics_are_averaged_at_rounds_and_looks(tmp_path):
    ranks = run_workers(check_statistics, 3, str(tmp_path))
    for name in ranks[0]:
        runs = [out[name] for out in ranks]
        follow_gossip(runs, BASES[name])
        for step in range(1, STEPS + 1):
            for statistic in ("norm.running_mean", "norm.running_var"):
                before, after = ([run_[when][step - 1] for run_ in runs] for when in ("stepped", "after"))
                right = mean(before, statistic)
                for mine_before, mine_after, run_ in zip(before, after, runs, strict=True):
                    close(run_["evaluated"][step][statistic], right, f"{name}, step {step}: {statistic}")
                    if step % TAU == 0 and BASES[name].exact_average:
                        close(mine_after[statistic], right, f"{name}, round at step {step}: {statistic}")
                    else:
                        assert torch.equal(mine_after[statistic], mine_before[statistic])
        assert torch.equal(runs[0]["final"]["floor"], torch.full((2,), torch.finfo(torch.float32).min))


# ---- 2. clipping, accumulation, autocast, bf16 parameters, checkpointing ----

CLIP, LR = 1.0, 0.1


def check_clipped(folder):
    """Both surfaces, accumulation 2 and clipping, in float64."""
    out = {}
    for name, config in BASES.items():
        settings = {"gradient_accumulation_steps": 2, "max_grad_norm": CLIP, "lr_scheduler_type": "constant"}
        make = lambda parameters: SGD(parameters, lr=LR, momentum=0.9)  # noqa: E731
        out[name] = [
            run(folder, config, Regression(), Rows(400), optimizer=make, held=True, **settings),
            loop(config, Regression(), some_rows(4), optimizer=make, accumulation=2, clip=CLIP, held=True),
        ]
    return out


def by_reference(config, seen, *, accumulation=1, clip=None, skipped=(), momentum=0.0):
    """Every worker's end by the float64 reference, and the norms of its gradients before clipping."""
    norms = [[] for _ in seen]

    def make_worker(worker):
        model = Regression()
        optimizer = SGD(model.parameters(), lr=LR, momentum=momentum)

        def backward(step):
            optimizer.zero_grad()
            for x, y in seen[worker][step * accumulation : (step + 1) * accumulation]:
                (model(x.double(), y.double())["loss"] / accumulation).backward()
            if clip:
                norms[worker].append(float(nn.utils.clip_grad_norm_(model.parameters(), clip)))
            if (worker, step) in skipped:
                optimizer.zero_grad(set_to_none=False)

        return list(model.parameters()), optimizer, backward, lambda: None

    policy = "reset" if momentum and config.has_outer_update else "maintain"
    arguments_ = (make_worker, len(seen), STEPS, config.sync_every, config.outer_lr, config.outer_momentum, policy)
    mixing, staleness = (
        make_topology(config, len(seen)).mixing_matrix,
        config.staleness if config.base == "osgp" else 0,
    )
    return gossip_reference(*arguments_, mixing=mixing, staleness=staleness, exact_average=config.exact_average), norms


@pytest.mark.slow
def test_every_worker_clips_its_own_accumulated_gradient(tmp_path):
    ranks = run_workers(check_clipped, 3, str(tmp_path))
    for name, config in BASES.items():
        for surface in (0, 1):
            runs = [out[name][surface] for out in ranks]
            follow_gossip(runs, config)
            ends, norms = by_reference(
                config, [run_["seen"] for run_ in runs], accumulation=2, clip=CLIP, momentum=0.9
            )
            clipped = [[norm > CLIP for norm in own] for own in norms]
            assert any(len(set(step)) == 2 for step in zip(*clipped, strict=True)), (
                "one worker must clip where another does not"
            )
            for run_, end in zip(runs, ends, strict=True):
                for parameter, local, average in zip(run_["trained"], end.z, end.average, strict=True):
                    assert (run_["after"][-1][parameter] - local).abs().max() <= 1e-9, (name, surface)
                    assert (run_["final"][parameter] - average).abs().max() <= 1e-9, (name, surface)


class Precise(Regression):
    """Notes the dtype in which its layers compute. After `fades` forward passes the gradient is zero."""

    def __init__(self, dtype=torch.float32, fades=NEVER):
        super().__init__(dtype)
        self.computed, self.fades = set(), fades
        self.body.register_forward_hook(lambda module, inputs, output: self.computed.add(output.dtype))

    def forward(self, x, labels):
        loss = super().forward(x, labels)["loss"]
        return {"loss": loss * float(len(self.seen) <= self.fades)}


FADES = 4


def check_precisions(folder):
    autocast, out = {}, {}
    for name in THREE:
        config, autocast[name] = BASES[name], Precise()
        out[name, "autocast"] = run(folder, config, autocast[name], Rows(160, torch.float32), bf16=True, held=True)
        for kind, settings in (("bf16", {}), ("bf16 fading", {"fades": FADES})):
            model = Precise(torch.bfloat16, **settings)
            own = gossip(config.base, NEVER, staleness=config.staleness) if settings else config
            make = (lambda parameters: SGD(parameters, lr=LR)) if settings else None
            out[name, kind] = run(folder, own, model, Rows(160, torch.bfloat16), optimizer=make, held=True)
    for kind in ("checkpointing", "no checkpointing"):
        settings = {"gradient_checkpointing": kind == "checkpointing"}
        out["osgp", kind] = run(folder, BASES["osgp"], bert(), sentences(), **settings)
    return out, {name: model.computed for name, model in autocast.items()}


@pytest.mark.slow
def test_precisions_and_checkpointing(tmp_path):
    ranks = run_workers(check_precisions, 3, str(tmp_path))
    for name in THREE:
        config = BASES[name]
        runs = {kind: [out[name, kind] for out, _ in ranks] for kind in ("autocast", "bf16", "bf16 fading")}
        follow_gossip(runs["autocast"], config)
        follow_gossip(runs["bf16"], config)
        alone = gossip(config.base, NEVER, staleness=config.staleness)
        follow_gossip(runs["bf16 fading"], alone)
        only_mixed(runs["bf16 fading"], alone)
        for kind in ("bf16", "bf16 fading"):
            assert runs[kind][0]["final"]["body.weight"].dtype == torch.bfloat16
            assert {x.dtype for run_ in runs[kind] for state in run_["held"] for x in state["x"].values()} == {
                torch.float32
            }
        for run_ in runs["autocast"]:
            assert run_["final"]["body.weight"].dtype == torch.float32
        conserved(runs["bf16 fading"])
    for out, computed in ranks:
        assert all(dtypes == {torch.bfloat16} for dtypes in computed.values())
        assert equal(out["osgp", "checkpointing"]["final"], out["osgp", "no checkpointing"]["final"])
    follow_gossip([out["osgp", "checkpointing"] for out, _ in ranks], BASES["osgp"])


def only_mixed(runs, config):
    """
    No gradient: numerators are their halves and their source's halves, bit for bit in fp32, and parameters are x / w,
    rounded once.
    """
    topology, staleness = make_topology(config, len(runs)), config.staleness if config.base == "osgp" else 0
    for k in range(FADES + staleness, STEPS):
        for me, run_ in enumerate(runs):
            held, before, names = run_["held"][k], run_["held"][k - 1], run_["trained"]
            arrived = [
                (runs[source]["held"][k - staleness - 1], source) for source in topology.sources(me, k - staleness)
            ]
            for name in names:
                right = before["x"][name] * topology.weight(me, k)
                for theirs, source in arrived:
                    right = right + theirs["x"][name] * topology.weight(source, k - staleness)
                assert torch.equal(held["x"][name], right), (me, k, name)
                assert torch.equal(run_["stepped"][k][name], run_["after"][k - 1][name])
                assert torch.equal(run_["after"][k][name], (right / held["w"]).bfloat16()), (me, k, name)


def conserved(runs):
    """The sum of all numerators and messages moves with the displacements alone, to fp32's rounding."""
    for name in runs[0]["trained"]:
        total = sum(run_["start"][name].double() for run_ in runs)
        for k in range(STEPS):
            before = [run_["after"][k - 1] if k else run_["start"] for run_ in runs]
            total = total + sum(
                run_["stepped"][k][name].double() - z[name].double() for run_, z in zip(runs, before, strict=True)
            )
            mass = sum(run_["held"][k]["mass"][name] for run_ in runs)
            assert (mass - total).abs().max() <= (k + 1) * len(runs) * EPS, "bf16 sums alone would be off by 2**-8"


# ---- 3. fp16: a step skipped on one rank only ----

SKIP = (1, 5)  # rank 1's sixth step, inside a round of 4


class Overflowing(Regression):
    """An infinite loss in one training step of one rank."""

    def __init__(self):
        super().__init__(torch.float32)

    def forward(self, x, labels):
        loss = super().forward(x, labels)["loss"]
        return {"loss": loss * math.inf if (rank(), len(self.seen) - 1) == SKIP else loss}


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


def check_scalers(folder):
    out = {}
    for name, config in BASES.items():
        surfaces = []
        for surface in ("trainer", "accelerate"):
            scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=NEVER)
            with Numbers() as numbers:
                if surface == "trainer":
                    settings = {"max_grad_norm": 0, "lr_scheduler_type": "constant"}
                    make = lambda parameters: SGD(parameters, lr=LR)  # noqa: E731

                    def prepare(trainer, scaler=scaler):
                        trainer.accelerator.scaler = scaler

                    result = run(
                        folder,
                        config,
                        Overflowing(),
                        Rows(160, torch.float32),
                        optimizer=make,
                        prepare=prepare,
                        **settings,
                    )
                else:
                    result = loop(config, Overflowing(), some_rows(4, torch.float32), scaler=scaler)
            assert scaler.get_scale() == (128.0 if rank() == SKIP[0] else 256.0), (
                "the scale is halved where a step was skipped"
            )
            before = result["after"][SKIP[1] - 1]
            assert equal(result["stepped"][SKIP[1]], before) == (rank() == SKIP[0])
            surfaces.append((result, numbers.seen))
        out[name] = surfaces
    return out


@pytest.mark.slow
def test_a_step_skipped_on_one_rank(tmp_path):
    """It counts, the exchange happens, and the worker's progress is zero."""
    ranks = run_workers(check_scalers, 3, str(tmp_path))
    for name, config in BASES.items():
        exchanges = STEPS - STEPS // TAU if config.exact_average else STEPS
        for surface in (0, 1):
            runs = [out[name][surface][0] for out in ranks]
            assert [out[name][surface][1] for out in ranks] == [list(range(exchanges))] * 3
            follow_gossip(runs, config)
            seen = [run_["seen"] for run_ in runs]
            ends, _ = by_reference(config, seen, skipped=[SKIP])
            without, _ = by_reference(config, seen)
            assert (ends[0].average[0] - without[0].average[0]).abs().max() > 1e-3, "the skip must show"
            for run_, end in zip(runs, ends, strict=True):
                for parameter, local, average in zip(run_["trained"], end.z, end.average, strict=True):
                    assert (run_["after"][-1][parameter] - local).abs().max() <= 2e-6, (name, surface)
                    assert (run_["final"][parameter] - average).abs().max() <= 2e-6, (name, surface)


# ---- 4. parameters of every kind ----


class Zoo(nn.Module):
    """Frozen, tied, unused, rarely used, 0-dim, empty, channels-last, fp64; more than one message of 1024 bytes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(11)
        self.wide = nn.Linear(4, 90)
        self.conv = nn.Conv2d(2, 6, 2).to(memory_format=torch.channels_last)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.one, self.other = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.other.weight = self.one.weight
        self.unused = nn.Parameter(torch.randn(3))
        self.rare = nn.Parameter(torch.randn(2, 2))
        self.scalar = nn.Parameter(torch.tensor(0.5))
        self.empty, self.empty_double = (
            nn.Parameter(torch.empty(0, 3)),
            nn.Parameter(torch.empty(2, 0, dtype=torch.float64)),
        )
        self.precise = nn.Linear(4, 3).double()
        self.forwards = 0

    def forward(self, x, labels):
        self.forwards += 1
        h = self.other(torch.tanh(self.one(x + self.frozen(x))))
        out = (
            self.conv(self.wide(h)[:, :8].view(-1, 2, 2, 2)).flatten(1).mean(1, keepdim=True) * self.scalar
            + self.empty.sum()
        )
        if self.forwards % 3 == rank():  # on one rank at a time
            out = out + self.rare.sum()
        precise = self.precise(x.double()).square().mean() + self.empty_double.sum()
        return {"loss": (out - labels).square().mean() + precise + self.wide(x).square().mean()}


ZOO = {
    **{
        name: gossip(c.base, staleness=c.staleness, exact_average=c.exact_average, bucket_bytes=1024)
        for name, c in BASES.items()
    },
    "osgp, two peers": gossip("osgp", staleness=3, peers=2, bucket_bytes=1024, sync_every=6),
    "sgp, complete": gossip("sgp", topology="complete"),
}


def check_zoo(folder):
    out = {}
    for name, config in ZOO.items():
        model = Zoo()
        assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)
        assert not model.conv.weight.is_contiguous()
        adam = lambda parameters: AdamW([p for p in parameters if p.requires_grad], lr=0.05)  # noqa: E731
        by_loop = loop(config, model, some_rows(4, torch.float32), optimizer=adam, look=True, held=True)
        assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)
        settings = {"ddp_find_unused_parameters": True, "eval_strategy": "steps", "eval_steps": 3}
        out[name] = [by_loop]
        if name in THREE:
            out[name].append(run(folder, config, Zoo(), Rows(160, torch.float32), held=True, **settings))
    return out


@pytest.mark.slow
def test_parameters_of_every_kind_are_mixed_once(tmp_path):
    ranks = run_workers(check_zoo, 3, str(tmp_path))
    for name, config in ZOO.items():
        for runs in zip(*[out[name] for out in ranks], strict=True):
            averages = follow_gossip(runs, config)
            trained, start = runs[0]["trained"], runs[0]["start"]
            assert len(trained) == 12
            for step, shown in runs[0]["evaluated"].items():
                for parameter, right in average_of_held(runs, step).items():
                    close(shown[parameter], right, f"{name}, step {step}: {parameter}")
                    close(
                        averages[step - 1][parameter].to(start[parameter].dtype),
                        right,
                        f"{name}, step {step}: {parameter}",
                    )
            for run_ in runs:
                for after in [*run_["after"], run_["final"]]:
                    assert torch.equal(after["one.weight"], after["other.weight"])
                    for constant in ("frozen.weight", "frozen.bias"):
                        assert torch.equal(after[constant], start[constant])
                    assert after["empty"].shape == (0, 3)
                    assert after["empty_double"].shape == (2, 0)
                for changed in set(trained) - {"unused", "empty", "empty_double"}:
                    assert not torch.equal(run_["final"][changed], start[changed]), changed
                close(run_["final"]["unused"], start["unused"], "no gradient, no change")
            assert not torch.equal(runs[0]["stepped"][0]["rare"], runs[1]["stepped"][0]["rare"]), (
                "used on one rank alone"
            )
            payload = sum(start[parameter].numel() * start[parameter].element_size() for parameter in trained)
            one_exchange(runs, config, payload)


def one_exchange(runs, config, payload):
    """
    Every exchange sends the payload to each of this step's peers, and osgp its weight; an exact round sends none.
    """
    topology = make_topology(config, len(runs))
    message = payload + (8 if config.base == "osgp" else 0)
    for me, run_ in enumerate(runs):
        number, sent = 0, 0
        for step, total in enumerate(run_["exchanged"], start=1):
            if step % config.sync_every or not config.exact_average:
                sent += message * len(topology.targets(me, number))
                number += 1
            assert total == sent, (config.base, me, step)


# ---- 5. PEFT ----


def lora():
    from peft import LoraConfig, TaskType, get_peft_model

    torch.manual_seed(8)
    return get_peft_model(
        bert(), LoraConfig(task_type=TaskType.SEQ_CLS, r=2, lora_alpha=4, target_modules=["query", "value"])
    )


LORA = {**{name: BASES[name] for name in THREE}, "sgp, two peers": gossip("sgp", peers=2)}


def check_lora(folder):
    out = {}
    for name, config in LORA.items():
        model = lora()
        elements = [sum(p.numel() for p in model.parameters() if p.requires_grad or every) for every in (False, True)]
        settings = {"save_strategy": "steps", "save_steps": 3, "learning_rate": 3e-2}
        out[name] = run(f"{folder}/{name}", config, model, sentences(), held=True, **settings), *elements
    return out


@pytest.mark.slow
def test_lora_exchanges_adapters_only(tmp_path):
    from peft import PeftModel

    ranks = run_workers(check_lora, 3, str(tmp_path))
    for name, config in LORA.items():
        runs, (_, adapters, everything) = [out[name][0] for out in ranks], ranks[0][name]
        assert adapters < everything / 10
        averages = follow_gossip(runs, config)
        one_exchange(runs, config, 4 * adapters)
        for run_ in runs:
            assert all(
                torch.equal(run_["final"][key], run_["start"][key])
                for key in run_["start"]
                if key not in run_["trained"]
            )
        for step in (3, 6, 9):
            loaded = PeftModel.from_pretrained(bert(), f"{tmp_path}/{name}/checkpoint-{step}").state_dict()
            for parameter, right in averages[step - 1].items():
                close(loaded[parameter], right, f"{name}, checkpoint {step}: {parameter}")


# ---- 6. one process ----


def check_one_process(folder):
    """Plain SGD, every base without an outer update, every base with slow momentum, Local SGD with slow momentum."""
    make, out = (lambda parameters: SGD(parameters, lr=LR)), {}
    configs = {
        **BASES,
        "two-sided ring": gossip("dpsgd", topology="ring"),
        "complete": gossip("sgp", topology="complete"),
    }
    for name, config in {**configs, "local": SlowMoConfig(sync_every=TAU)}.items():
        for beta in (0.0, 0.5):
            settings = {**config.to_dict(), "outer_momentum": beta}
            own = SlowMoConfig.from_dict(settings)
            with Heard() as heard:
                runs = [
                    run(
                        folder,
                        own,
                        Regression(),
                        Rows(160),
                        optimizer=make,
                        lr_scheduler_type="constant",
                        eval_strategy="steps",
                        eval_steps=3,
                    ),
                    loop(own, Regression(), some_rows(4), optimizer=make, look=True),
                ]
            out[name, beta] = (
                [run_["final"] for run_ in runs],
                len(heard.about("one worker: nothing is averaged", "WARNING")),
            )
    model, batch, recorder = Regression(), some_rows(4), Recorder()
    optimizer = make(model.parameters())
    for micro in range(STEPS):
        optimizer.zero_grad()
        model(**batch(micro))["loss"].backward()
        optimizer.step()
    trainer = Trainer(
        model=Regression(),
        args=arguments(folder, max_steps=STEPS, lr_scheduler_type="constant"),
        train_dataset=Rows(160),
        callbacks=[recorder],
    )
    trainer.optimizer = make(trainer.model.parameters())
    trainer.train()
    return out, [recorded(trainer, recorder)["final"], values(model)]


def test_one_process_is_the_base_optimizer_and_is_warned(tmp_path):
    [(out, plain)] = run_workers(check_one_process, 1, str(tmp_path))
    for (name, beta), (finals, warned) in out.items():
        assert warned == 2, "once by each surface"
        for ours, stock, local in zip(finals, plain, out["local", beta][0], strict=True):
            for parameter in stock:
                close(ours[parameter], local[parameter], f"{name}, {beta}: {parameter}")
                if beta == 0:
                    close(ours[parameter], stock[parameter], f"{name}: {parameter}")
                else:
                    assert not torch.allclose(ours[parameter], stock[parameter], rtol=1e-3)


# ---- 7. worlds of 3 and 4 ----

TOPOLOGIES = {
    "sgp, exponential": gossip("sgp"),
    "sgp, bipartite": gossip("sgp", topology="bipartite_exponential"),
    "sgp, ring of two peers": gossip("sgp", topology="ring", peers=2, exact_average=False),
    "osgp, bipartite": gossip("osgp", 9, topology="bipartite_exponential", staleness=2),
    "osgp, complete": gossip("osgp", 9, topology="complete", staleness=3),
    "dpsgd, bipartite": gossip("dpsgd"),
    "dpsgd, ring": gossip("dpsgd", 9, topology="ring"),
}


def check_topologies():
    adam = lambda parameters: AdamW(parameters, lr=0.02)  # noqa: E731
    return {
        name: loop(config, Regression(), some_rows(3), optimizer=adam, steps=12, look=True, held=True)
        for name, config in TOPOLOGIES.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("workers", [3, 4])
def test_every_topology_in_small_worlds(workers):
    ranks = run_workers(check_topologies, workers)
    for name, config in TOPOLOGIES.items():
        runs = [out[name] for out in ranks]
        averages = follow_gossip(runs, config)
        topology = make_topology(config, workers)
        idles = any(not topology.targets(worker, number) for worker in range(workers) for number in range(12))
        assert idles == (workers == 3 and ("bipartite" in name or name == "dpsgd, ring")), name
        for step, shown in runs[0]["evaluated"].items():
            for parameter, right in averages[step - 1].items():
                close(shown[parameter], right, f"{name}, step {step}: {parameter}")
        weights = {round(state["w"], 9) for run_ in runs for state in run_["held"]}
        assert (weights == {1.0}) == (config.base != "osgp"), name


# ---- 8. again and again, interrupted, resumed ----


def check_again(folder):
    """train() twice, each time ending inside a round; then evaluated. And a first attempt that runs out of memory."""
    out = {}
    for name in THREE:
        config = BASES[name]
        model, recorder, ours, runs = bert(dropout=0.1), Recorder(), SlowMoCallback(config), []
        keeper = Held(ours)
        trainer = Trainer(
            model=model,
            args=arguments(folder, max_steps=6, learning_rate=1e-2),
            train_dataset=sentences(),
            eval_dataset=sentences(8),
            callbacks=[recorder, keeper, ours],
        )
        for _ in range(2):
            trainer.train()
            runs.append({**recorded(trainer, recorder), "held": keeper.held})
            ddp = trainer.model_wrapped
            assert isinstance(ddp, DistributedDataParallel)
            assert (ddp.require_backward_grad_sync, ddp.require_forward_param_sync) == (True, True)
            assert trainer.args.average_tokens_across_devices
        assert trainer.evaluate()["eval_loss"] == trainer.evaluate()["eval_loss"]
        assert equal(values(model), runs[-1]["final"])
        out[name, "twice"] = runs
        if name != "dpsgd":
            failing = OutOfMemoryOnce(6)
            out[name, "out of memory"] = run(
                folder, config, failing, Rows(256, torch.float32), auto_find_batch_size=True, held=True
            )
            assert [len(x) for x, _ in failing.seen] == [4] * 5 + [3] * STEPS
    return out


@pytest.mark.slow
def test_training_twice_and_after_a_failure(tmp_path):
    ranks = run_workers(check_again, 3, str(tmp_path))
    for (name, kind), first in ranks[0].items():
        config, runs = BASES[name], [out[name, kind] for out in ranks]
        if kind == "out of memory":
            assert len(first["after"]) == STEPS
            follow_gossip(runs, config)
            continue
        for number in (0, 1):
            own = [twice[number] for twice in runs]
            assert len(own[0]["after"]) == 6
            follow_gossip(own, config)
            for parameter, right in average_of_held(own, 6).items():
                close(own[0]["final"][parameter], right, f"{name}: the end, inside a round")
        assert all(equal(before["final"], after["start"]) for before, after in runs)


def check_resumes(folder):
    """Resumed at a round's end; without slow momentum, so that this can be followed from there."""
    out = {}
    for name in ("sgp", "osgp 2"):
        config = gossip(BASES[name].base, staleness=BASES[name].staleness, outer_momentum=0)
        where, settings = f"{folder}/{name}", {"save_strategy": "steps", "save_steps": 2 * TAU, "held": True}
        run(where, config, bert(dropout=0.1), sentences(), max_steps=2 * TAU, **settings)
        with Numbers() as numbers:
            resumed = run(
                where, config, bert(dropout=0.1), sentences(), resume=f"{where}/checkpoint-8", max_steps=14, **settings
            )
        out[name] = config, resumed, numbers.seen
    return out


@pytest.mark.slow
def test_a_resumed_run_goes_on_with_the_schedule(tmp_path):
    ranks = run_workers(check_resumes, 3, str(tmp_path))
    for name, (config, *_) in ranks[0].items():
        runs = [out[name][1] for out in ranks]
        assert len(runs[0]["after"]) == 6
        assert [out[name][2] for out in ranks] == [[6, 7, 8, 9, 10]] * 3, "of steps 9, 10, 11, 13 and 14"
        follow_gossip(runs, config, first_exchange=6)


def check_states():
    """
    A SlowMoOptimizer's state at step 8, loaded into a new one, and into the old one at step 10, with messages in
    flight.
    """
    out = {}
    for name, config in BASES.items():
        if not config.exact_average:
            continue

        def new(config=config):
            model = Regression()
            return model, SlowMoOptimizer(two_groups(model, "adamw", 0.05), config)

        def train(model, optimizer, first, last):
            path = []
            for step in range(first, last):
                optimizer.zero_grad()
                model(**some_rows(3)(step))["loss"].backward()
                optimizer.step()
                path.append(values(model))
            return path

        model, optimizer = new()
        train(model, optimizer, 0, 2 * TAU)
        state = copy.deepcopy(optimizer.state_dict())
        through = train(model, optimizer, 2 * TAU, 3 * TAU + 2)
        other_model, other = new()
        other.load_state_dict(copy.deepcopy(state))  # torch's own loading aliases
        resumed = train(other_model, other, 2 * TAU, 3 * TAU + 2)
        optimizer.load_state_dict(copy.deepcopy(state))
        back = train(model, optimizer, 2 * TAU, 3 * TAU + 2)
        out[name] = through, resumed, back
    return out


def test_a_state_at_a_round_continues_bit_for_bit():
    for out in run_workers(check_states, 3):
        for name, (through, resumed, back) in out.items():
            for step, (right, new, old) in enumerate(zip(through, resumed, back, strict=True), start=2 * TAU + 1):
                assert equal(right, new), f"{name}: loaded into a new optimizer, step {step} differs"
                assert equal(right, old), f"{name}: loaded into a running optimizer, step {step} differs"


# ---- 10. logs ----


class Reports(TrainerCallback):
    """The report of every round; after SlowMoCallback."""

    def __init__(self):
        self.ours, self.reports = None, []

    def on_optimizer_step(self, args, state, control, **kwargs):
        if (state.global_step + 1) % self.ours.config.sync_every == 0:
            self.reports.append(self.ours.last_round)


LOGS = {
    **BASES,
    "sgp, no average": gossip("sgp", exact_average=False),
    "sgp, two peers": gossip("sgp", peers=2),
    "sgp alone": gossip("sgp", exact_average=False, outer_momentum=0),
}


def check_logs(folder):
    out = {}
    for name, config in LOGS.items():
        ours, reports = SlowMoCallback(config), Reports()
        reports.ours = ours
        model = Regression(torch.float32)
        settings = {
            "logging_strategy": "steps",
            "logging_steps": 2 * TAU,
            "eval_strategy": "steps",
            "eval_steps": 3,
            "max_steps": 3 * TAU + 1,
        }
        trainer = Trainer(
            model=model,
            args=arguments(folder, learning_rate=1e-2, **settings),
            train_dataset=Rows(160, torch.float32),
            eval_dataset=Rows(8, torch.float32),
            callbacks=[ours, reports],
        )
        trainer.train()
        elements = sum(p.numel() for p in model.parameters())
        out[name] = trainer.state.log_history, reports.reports, elements, len(trainer.optimizer.param_groups)
    return out


@pytest.mark.slow
def test_logs_of_a_gossip_run(tmp_path):
    ranks = run_workers(check_logs, 3, str(tmp_path))
    for name, config in LOGS.items():
        topology = make_topology(config, 3)
        for me, (history, reports, elements, groups) in enumerate(out[name] for out in ranks):
            slow = [entry for entry in history if "slowmo/round" in entry]
            assert [(e["step"], e["slowmo/round"]) for e in slow] == [(8, 2), (13, 3)]
            number, right = 0, []
            for _ in range(3):
                exchanges = TAU - 1 if config.exact_average else TAU
                message = 4 * elements + (8 if config.base == "osgp" else 0)
                sent = sum(message * len(topology.targets(me, number + i)) for i in range(exchanges))
                number += exchanges
                ring = round(2 * 2 / 3 * 4 * (elements + 1)) if config.exact_average else 0
                right.append(sent + ring + 2 * 8 * (10 + groups))
            assert [report.bytes_sent for report in reports] == right, f"{name}, worker {me}: looks do not count"
            assert [entry["slowmo/bytes_sent"] for entry in slow] == [right[0] + right[1], right[2]]
            for entry, report in zip(slow, (reports[1], reports[2]), strict=True):
                assert ("slowmo/consensus_distance" in entry) == config.exact_average
                assert (report.consensus_distance is None) != config.exact_average
                numbers = {key: value for key, value in entry.items() if key.startswith("slowmo/")}
                assert all(math.isfinite(value) for value in numbers.values()), numbers
                for key in ("pseudo_grad_norm", *(["velocity_norm"] if config.outer_momentum else []), "seconds"):
                    assert numbers[f"slowmo/{key}"] > 0, (name, key)
                assert 0 < numbers["slowmo/utilisation"] < 1
                assert json.loads(json.dumps(entry, allow_nan=False)) == entry
            json.dumps(history, allow_nan=False)
