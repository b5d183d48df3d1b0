"""Gossip beside clipping, accumulation, autocast, bf16 parameters, checkpointing and fp16's skipped steps."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import SGD

import slowmo_hf
from gossip_runs import (
    BASES,
    CLIP,
    LR,
    NEVER,
    STEPS,
    TAU,
    THREE,
    Numbers,
    follow_gossip,
    gossip,
    loop,
    rank,
    run,
    some_rows,
)
from harness import run_workers
from mixing import mixing_matrix
from reference import gossip_reference
from slowmo_hf import SlowMoConfig, SlowMoOptimizer, run_in_process
from slowmo_hf.wire.gossip import make_topology
from tiny import (
    Regression,
    Rows,
    bert,
    equal,
    sentences,
)

EPS = 2.0**-23


# ---- 2. clipping, accumulation, autocast, bf16 parameters, checkpointing ----


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
        partial(mixing_matrix, make_topology(config, len(seen))),
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


@pytest.mark.parametrize("staleness", [1, 2])
def test_a_view_of_osgp_leaves_training_as_it_was_where_a_program_writes_weights(staleness):
    """Weights are clamped behind each step, workers have weights other than 1, and all go on as without views."""

    def work(rank, *, views):
        weight = nn.Parameter(torch.tensor([2.0, -1.5], dtype=torch.float64))
        config = SlowMoConfig(base="osgp", staleness=staleness, sync_every=50, outer_momentum=0)
        optimizer = SlowMoOptimizer(SGD([weight], lr=0.1), config)
        weights, shown = [], []
        for step in range(8):
            weight.grad = torch.tensor([rank + 1.0, 0.5 * step], dtype=torch.float64)
            optimizer.step()
            with torch.no_grad():
                weight.clamp_(-1.6, 1.2)
            weights.append(optimizer.outer_loop.base.weight)
            if views:
                with slowmo_hf.consensus(optimizer):
                    shown.append(weight.detach().clone())
        return weight.detach().clone(), weights, shown

    without = run_in_process(lambda rank: work(rank, views=False), 3)
    with_views = run_in_process(lambda rank: work(rank, views=True), 3)
    assert any(one != 1 for _, weights, _ in without for one in weights)
    for (end, _, _), (other, _, shown) in zip(without, with_views, strict=True):
        assert torch.equal(end, other)
        assert all(torch.equal(*pair) for pair in zip(shown, with_views[0][2], strict=True))
