"""Gossip again and again, interrupted and resumed."""

from __future__ import annotations

import copy
import time

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

from gossip_runs import (
    BASES,
    STEPS,
    TAU,
    THREE,
    Held,
    Numbers,
    average_of_held,
    close,
    follow_gossip,
    gossip,
    rank,
    run,
    some_rows,
)
from harness import run_workers
from slowmo_hf import SlowMoCallback, SlowMoOptimizer
from tiny import (
    OutOfMemoryOnce,
    Recorder,
    Regression,
    Rows,
    arguments,
    bert,
    equal,
    recorded,
    sentences,
    two_groups,
    values,
)


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


def saved_at_once():
    """Three steps of OSGP, of which rank 1 makes the last half a second late; what a save holds, and what comes."""
    torch.manual_seed(0)
    model = Regression()
    optimizer = SlowMoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), gossip("osgp", sync_every=9, staleness=2))
    for step in range(3):
        model(**some_rows(3)(step))["loss"].backward()
        if step == 2 and rank() == 1:
            time.sleep(0.5)
        optimizer.step()
    base = optimizer.outer_loop.base
    held = copy.deepcopy(base.saved(agree=False, keep=True).own)
    base.settle()
    flying = [tensor.clone() for exchange in base.in_flight for of in exchange.received for tensor in of.values()]
    return [tensor for name, tensor in held.tensors.items() if name.startswith("message.")], flying


def test_a_save_waits_for_the_messages_in_flight():
    """A message that has not come yet is in the checkpoint, as it will be taken in."""
    for held, flying in run_workers(saved_at_once, 2):
        assert len(flying) == 2
        for saved, came in zip(held, flying, strict=True):
            assert torch.equal(saved, came)


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
