"""
Four processes as two workers of two; rank 1 dies, freezes, fails or has NaN: every survivor names it, its host and
step, also where FSDP's or DDP's own collective is the first to fail.
"""

from __future__ import annotations

import os
import re
import signal
import tempfile
import time

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

import fsdp
from apart import HOST, TIMEOUT_SECONDS, now
from harness import patience, run_workers
from slowmo_hf import SlowMoCallback, SlowMoConfig, SlowMoOptimizer, consensus
from slowmo_hf.wire.communicator import Communicator
from tiny import error_of

pytestmark = fsdp.NEEDED

SURVIVORS = (0, 2, 3)
WHERE = f"on {re.escape(HOST)}"
IN_TIME = f"within timeout_seconds={TIMEOUT_SECONDS:g}"


# ---- what happens to rank 1 ----


def dies():
    now()
    os.kill(os.getpid(), signal.SIGKILL)


def freezes():
    now()
    os.kill(os.getpid(), signal.SIGSTOP)


def raises():
    now()
    raise ValueError("bad batch\nwith a second line")


# ---- and where ----


def train(rank, kind, at=None, act=None, settings=None, steps=16):
    """
    Rounds every 4 steps, a look at step 6. What happens at step 6 lies between two passes, in the loss, or in an
    evaluation; what happens in a round, in that of step 8.
    """
    faults = {at: act} if rank == 1 else {}
    bare = fsdp.Awkward()
    model = fsdp.by_hand(bare, fsdp.hsdp_mesh(2, 2)) if kind == "sharded" else DistributedDataParallel(bare)
    config = SlowMoConfig(
        **{"sync_every": 4, "processes_per_worker": 2, "timeout_seconds": TIMEOUT_SECONDS, **(settings or {})}
    )
    optimizer = SlowMoOptimizer(fsdp.sgd(bare.parameters()), config)
    data = fsdp.Tokens(400)
    for step in range(1, steps + 1):
        loss = model(**data.batch(4 * (4 * step + rank)))["loss"]
        if step == 6 and "loss" in faults:
            faults["loss"]()
        loss.backward()
        if step == 6 and "step" in faults:
            faults["step"]()
        torch.nn.utils.clip_grad_norm_(bare.parameters(), 100.0)
        if step == 8 and "round" in faults:
            Communicator.start_sum_ = lambda self, flat: faults["round"]()
        if step == 8 and "values" in faults:
            faults["values"](bare)
        optimizer.step()
        optimizer.zero_grad()
        if step == 6:
            with consensus(optimizer), torch.no_grad():
                if "evaluation" in faults:
                    faults["evaluation"]()
                model(**data.batch(0))


class Fault(TrainerCallback):
    def __init__(self, act):
        self.act = act

    def on_step_begin(self, args, state, control, **kwargs):
        if dist.get_rank() == 1 and state.global_step == 5:
            self.act()


def train_by_trainer(rank, act):
    """Stock, FSDP2; between step 5 and the forward pass of step 6."""
    config = SlowMoConfig(sync_every=8, processes_per_worker=2, timeout_seconds=TIMEOUT_SECONDS)
    fsdp.fsdp_trainer(
        tempfile.mkdtemp(), 2, 2, max_steps=12, rows=400, callbacks=[SlowMoCallback(config), Fault(act)]
    ).train()


DIED = rf"rank 1 {WHERE} left without a word after step \d"
FROZE = rf"rank 1 {WHERE} did not come to step \d, [a-z ]+, {IN_TIME}"
FAILED = rf"rank 1 {WHERE} left at step \d: ValueError: bad batch\."
TABLE = {
    "dies at a step": ("step", dies, DIED),
    "dies in a pass": ("loss", dies, DIED),
    "dies in the round": ("round", dies, DIED),
    "dies in an evaluation": ("evaluation", dies, DIED),
    "freezes at a step": ("step", freezes, FROZE),
    "freezes in the round": ("round", freezes, FROZE),
    "freezes in an evaluation": ("evaluation", freezes, FROZE),
    "raises in a pass": ("loss", raises, FAILED),
    "raises at a step": ("step", raises, FAILED),
}


def all_name_it(told, seconds, words):
    for rank, said in zip(SURVIVORS, told, strict=True):
        first = said.splitlines()[0] if said else ""
        assert re.match(f"RuntimeError: {words}", first), (rank, told)
        for healthy in SURVIVORS:
            assert not re.match(f"RuntimeError: .*rank {healthy} {WHERE} (left|did not)", first), (rank, told)
    assert seconds < TIMEOUT_SECONDS + patience(20), f"{seconds:.1f} s"


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        pytest.param(
            words,
            id=f"{kind}, {name}",
            marks=pytest.mark.apart(train, kind, at, act, world_size=4, survivors=SURVIVORS),
        )
        for kind in ("sharded", "node")
        for name, (at, act, words) in TABLE.items()
    ],
)
def test_every_survivor_names_the_mate_that_failed(apart, words):
    all_name_it(*apart, words)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        pytest.param(words, id=name, marks=pytest.mark.apart(train_by_trainer, act, world_size=4, survivors=SURVIVORS))
        for name, act, words in (("dies", dies, DIED), ("freezes", freezes, FROZE), ("raises", raises, FAILED))
    ],
)
def test_every_survivor_names_the_mate_that_failed_under_trainer(apart, words):
    all_name_it(*apart, words)


# ---- not a number ----


def weight_is_lost(model):
    """In a shard of the last parameter that has one here; the next pass would spread it."""
    next(p for p in model.parameters() if p.to_local().numel()).detach().to_local().view(-1)[0] = float("nan")


def gradient_is_lost(model):
    next(p for p in model.parameters() if p.to_local().numel()).grad.to_local().view(-1)[0] = float("inf")


MESSAGES = {
    "local_sgd": ({}, 8),
    "overlapped": ({"overlap_steps": 2}, 12),
    "sgp": ({"base": "sgp"}, 8),
    "sharded slow state": ({"shard_slow_state": True}, 8),
    "int8": ({"compression": "int8"}, 8),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "step",
    [
        pytest.param(
            step,
            id=f"{name}, {act.__name__}",
            marks=pytest.mark.apart(train, "sharded", "values", act, more, world_size=4, survivors=(0, 1, 2, 3)),
        )
        for name, (more, step) in MESSAGES.items()
        for act in (weight_is_lost, gradient_is_lost)
    ],
)
def test_a_shard_that_is_not_finite_is_told_by_all_in_the_same_words(apart, step):
    told, seconds = apart
    first = told[0].splitlines()[0] if told[0] else ""
    assert first.startswith(f"ValueError: rank 1 on {HOST}, step {step}: its parameters are not finite"), told
    assert len(set(told)) == 1, told
    assert not re.search(rf"rank [023] {WHERE}", first), told
    assert seconds < TIMEOUT_SECONDS + patience(20), f"{seconds:.1f} s"


@pytest.mark.slow
@pytest.mark.apart(
    train,
    "sharded",
    "values",
    weight_is_lost,
    {"base": "sgp", "exact_average": False},
    world_size=4,
    survivors=(0, 1, 2, 3),
)
def test_without_an_average_it_is_told_at_its_exchange_before_its_column_has_mixed_it(apart):
    told, _ = apart
    assert told[0].startswith(f"ValueError: rank 1 on {HOST}, step 8: its parameters are not finite"), told
    assert len(set(told)) == 1, told
    assert not re.search(rf"rank [023] {WHERE}", told[0]), told


# ---- the start ----


def two_entries():
    """accelerate finds parameters by their address, which empty shards lack: a model that is sharded already."""
    config = SlowMoConfig(processes_per_worker=2, timeout_seconds=patience(20))
    made = fsdp.prepared(
        2,
        2,
        make=lambda parameters: SlowMoOptimizer(fsdp.sgd(parameters), config),
        model=fsdp.by_hand(fsdp.Awkward(), fsdp.hsdp_mesh(2, 2)),
        transformer_cls_names_to_wrap=["FSDPBlock"],
    )
    rows = [p for group in made.optimizer.param_groups for p in group["params"]]
    began = time.monotonic()
    return (
        len({id(p) for p in rows}) < len(rows),
        error_of(made.loss, fsdp.Tokens().batch(0)),
        time.monotonic() - began,
    )


@pytest.mark.slow
def test_two_entries_for_a_parameter_are_told_by_all_ranks_at_once():
    seen, errors, seconds = zip(*run_workers(two_entries, 4), strict=True)
    assert seen == (False, True, False, True), "where shards are empty"
    assert len(set(errors)) == 1, errors
    both = f"rank 1 on {HOST}, rank 3 on {HOST}"
    assert errors[0].startswith(f"ValueError: {both}: parameter 'blocks.1.gate.bias' is in the"), errors
    assert errors[0].count("blocks.1.gate.bias") == 1
    assert max(seconds) < patience(10)
