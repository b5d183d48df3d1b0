"""base="all_reduce" with slow momentum: one worker whose batch is everybody's, and its wire."""

from __future__ import annotations

import tempfile
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from transformers import Trainer, TrainerCallback

import test_wire
from equal_ranks import ACCUMULATION, BATCH, LR, PLAIN, STEPS
from harness import patience, run_workers
from reference import slowmo_reference
from slowmo_hf import (
    SlowMoCallback,
    SlowMoConfig,
    SlowMoOptimizer,
    consensus,
    last_round,
)
from tiny import (
    Recorder,
    Regression,
    Rows,
    SmallNorm,
    accumulated,
    arguments,
    equal,
    recorded,
    two_groups,
    values,
    warmup_and_decay,
)

SLOW = SlowMoConfig(base="all_reduce", outer_momentum=0.5, sync_every=4, timeout_seconds=patience(30))


# ---- the wire: no collective of ours but the header of an outer update's round ----


def check_wire():
    return {
        "bert": [test_wire._trainer_steps("bert", 2, config)[0] for config in (None, PLAIN, SLOW)],
        "accelerate, norm": [test_wire._accelerate_steps(config)[0] for config in (None, PLAIN, SLOW)],
    }


@pytest.mark.slow
def test_every_step_has_the_collectives_of_stock_training():
    for out in run_workers(check_wire, 2):
        for name, (stock, plain, slow) in out.items():
            assert len(stock) == STEPS
            assert all(calls for calls, _ in stock), "the counter must see something"
            assert plain[1:] == stock[1:], name
            for step, ((calls, elements), (stock_calls, stock_elements)) in enumerate(
                zip(slow, stock, strict=True), start=1
            ):
                if step > 1:
                    header = {"gloo:all_gather": 1} if step % SLOW.sync_every == 0 else {}
                    assert Counter(calls) == Counter(stock_calls) + Counter(header), (name, step)
                    assert 0 <= elements - stock_elements <= 12 * len(header), "10 fp64 and a learning rate per group"


# ---- slow momentum: one worker whose batch is everybody's ----


CASES = [  # (inner optimizer, settings)
    ("sgd", SLOW),
    ("adamw", SLOW),
    ("sgd", SlowMoConfig(base="all_reduce", outer_momentum=0, outer_lr=0.7, sync_every=4, inner_state="maintain")),
]


def _accelerate(case):
    """(batches seen, parameters after every step, what consensus showed there, its collectives, reports)."""
    name, config = case
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATION)
    bare, rows = Regression(), Rows(200)
    model, optimizer = accelerator.prepare(bare, SlowMoOptimizer(two_groups(bare, name, LR), config))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer.optimizer.inner_optimizer, warmup_and_decay)
    after, shown, reports, profiler = [], {}, [], test_wire._StepProfiler()
    for _ in accumulated(accelerator, model, optimizer, scheduler, rows, STEPS * ACCUMULATION, BATCH):
        after.append(values(bare))
        reports.append(last_round(optimizer))
        random = torch.get_rng_state()
        profiler.begin()
        with consensus(optimizer):
            shown[len(after)] = values(bare)
            torch.rand(3)
        profiler.end()
        assert torch.equal(torch.get_rng_state(), random)
        assert equal(values(bare), after[-1])
    assert all(calls == {} for calls, _ in profiler.steps)
    return bare.seen, after, shown, reports


class Reports(TrainerCallback):
    """Stands after SlowMoCallback."""

    def __init__(self, ours):
        self.ours, self.reports = ours, []

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.reports.append(self.ours.last_round)


def _trainer(case):
    name, config = case
    model, recorder, ours = Regression(), Recorder(), SlowMoCallback(config)
    optimizer, reports = two_groups(model, name, LR), Reports(ours)
    trainer = Trainer(
        model=model,
        args=arguments(
            tempfile.mkdtemp(),
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            gradient_accumulation_steps=ACCUMULATION,
            max_grad_norm=0,
            eval_strategy="steps",
            eval_steps=1,
            logging_strategy="steps",
            logging_steps=3,
        ),
        train_dataset=Rows(200),
        eval_dataset=Rows(8),
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_and_decay)),
        callbacks=[recorder, ours, reports],
    )
    trainer.train()
    slow = [entry for entry in trainer.state.log_history if "slowmo/round" in entry]
    header = (dist.get_world_size() - 1) * 8 * (10 + len(optimizer.param_groups))
    assert [(e["step"], e["slowmo/round"], e["slowmo/bytes_sent"]) for e in slow] == [(6, 1, header), (9, 2, header)]
    assert equal(values(model), recorder.after[-1]), "the end is no average either"
    return model.seen, recorder.after, recorder.evaluated, reports.reports


def _expected(case, seen):
    """One worker's parameters by the reference, on the union of what all processes saw."""
    name, config = case

    def make_worker(_):
        model = Regression()
        optimizer = two_groups(model, name, LR)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_and_decay)

        def backward(step):
            optimizer.zero_grad()
            for micro in range(step * ACCUMULATION, (step + 1) * ACCUMULATION):
                x, y = (torch.cat(parts) for parts in zip(*[own[micro] for own in seen], strict=True))
                (model(x, y)["loss"] / ACCUMULATION).backward()

        return list(model.parameters()), optimizer, backward, scheduler.step

    policy = {"auto": "reset" if name == "sgd" else "maintain"}.get(config.inner_state, config.inner_state)
    return slowmo_reference(make_worker, 1, STEPS, config.sync_every, config.outer_lr, config.outer_momentum, policy)[
        0
    ]


def both_surfaces():
    return [[surface(case) for case in CASES] for surface in (_accelerate, _trainer)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")
@pytest.mark.parametrize("processes", [2, 3])
def test_slow_momentum_is_that_of_one_worker_with_everybodys_batch(processes):
    ranks = run_workers(both_surfaces, processes)
    for surface in (0, 1):
        for index, case in enumerate(CASES):
            runs = [out[surface][index] for out in ranks]
            assert not torch.equal(runs[0][0][0][0], runs[1][0][0][0]), "processes must train on different data"
            expected = _expected(case, [seen for seen, *_ in runs])
            for _, after, shown, reports in runs:
                for mine, right in zip(after[-1].values(), expected, strict=True):
                    assert (mine - right).abs().max() <= 1e-9, case
                for step, state in enumerate(after, start=1):
                    assert equal(state, runs[0][1][step - 1]), f"step {step}: ranks differ"
                    assert equal(shown[step], state), f"step {step}: a look changed the parameters"
                assert [report and report.round for report in reports] == [None] * 3 + [1] * 4 + [2] * 3
                for report in reports[3:]:
                    assert report.bytes_sent == (len(ranks) - 1) * 8 * (10 + 2), "a header"
                    assert report.pseudo_grad_norm > 0
                    assert report.consensus_distance <= 1e-12 * report.pseudo_grad_norm**2


def check_statistics():
    """BatchNorm's statistics, each rank's own between DDP's broadcasts: no look and no round may average them."""
    out = []
    for where in ("average", "local"):
        config = SlowMoConfig(base="all_reduce", sync_every=4, model_buffers=where)
        recorder = Recorder()
        trainer = Trainer(
            model=SmallNorm(),
            args=arguments(tempfile.mkdtemp(), max_steps=6, eval_strategy="steps", eval_steps=1),
            train_dataset=Rows(64, torch.float32),
            eval_dataset=Rows(8, torch.float32),
            callbacks=[recorder, SlowMoCallback(config)],
        )
        trainer.train()
        out.append(recorded(trainer, recorder))
    return out


def test_buffers_are_never_averaged():
    ranks = run_workers(check_statistics, 2)
    for first, second in zip(*ranks, strict=True):
        for step in range(6):
            assert not torch.equal(
                first["stepped"][step]["norm.running_mean"], second["stepped"][step]["norm.running_mean"]
            )
            for run in (first, second):
                for name in ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked"):
                    assert torch.equal(run["after"][step][name], run["stepped"][step][name])
                assert all(
                    torch.equal(run["evaluated"][step + 1][name], run["after"][step][name]) for name in run["trained"]
                )
