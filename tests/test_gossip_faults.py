"""
NaN in one rank's parameters under gossip: every rank says whose, where and when, and no other rank's parameters have
taken it in. And what is overwritten inside a worker: a process that has computed something else is told.
"""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from apart import HOST, TIMEOUT_SECONDS
from harness import patience
from slowmo_hf import SlowMoConfig, SlowMoOptimizer, run_in_process
from slowmo_hf.algorithm.layout import flat_anchors, flat_layouts
from slowmo_hf.finite import finiteness
from slowmo_hf.wire.exchange import Exchange
from tiny import Regression, Rows

AT = 6  # the fault's step; exact rounds at 4, 8, 12
SICK = 1


class Wide(torch.nn.Module):
    """Five messages of 1 KiB; what is spoilt travels in the last one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(7)
        self.body, self.head = torch.nn.Linear(4, 200), torch.nn.Linear(200, 1)

    def forward(self, x, labels):
        return (self.head(torch.tanh(self.body(x))) - labels).square().mean()


def train(rank, settings, value="nan", steps=16):
    """
    After the inner step `AT` of the sick rank one weight is not finite, and all others are 1e6: large enough to be
    seen in whatever they are mixed into. Whoever is healthy must have small parameters when the error has come.
    """
    model = Wide()
    config = SlowMoConfig(**{"sync_every": 4, "timeout_seconds": TIMEOUT_SECONDS, "bucket_bytes": 1024, **settings})
    inner = torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer = SlowMoOptimizer(inner, config)
    taken = [0]

    def spoil(*_):
        taken[0] += 1
        if rank == SICK and taken[0] == AT:
            for param in model.parameters():
                param.data.fill_(1e6)
            model.head.weight.data[0, -1] = float(value)

    inner.register_step_post_hook(spoil)
    rows = Rows(200, torch.float32)
    try:
        for step in range(1, steps + 1):
            first = 4 * (step + 3 * rank)
            model(rows.x[first : first + 4], rows.y[first : first + 4]).backward()
            optimizer.step()
            optimizer.zero_grad()
    finally:
        largest = max(p.detach().abs().max().item() for p in model.parameters())
        if rank != SICK and not largest < 10:
            raise AssertionError(f"a healthy rank has a parameter of {largest}")


# settings, world size
TABLE = {
    "sgp": ({"base": "sgp"}, 2),
    "sgp, four": ({"base": "sgp"}, 4),
    "sgp, two peers": ({"base": "sgp", "peers": 2}, 4),
    "sgp, ring": ({"base": "sgp", "topology": "ring"}, 4),
    "sgp, complete": ({"base": "sgp", "topology": "complete", "peers": 3}, 4),
    "sgp, no average": ({"base": "sgp", "exact_average": False}, 4),
    "dpsgd": ({"base": "dpsgd"}, 4),
    "dpsgd, ring": ({"base": "dpsgd", "topology": "ring", "peers": 2}, 4),
    "dpsgd, no average": ({"base": "dpsgd", "exact_average": False}, 4),
    "osgp": ({"base": "osgp", "sync_every": 8}, 4),
    "osgp, stale, no average": ({"base": "osgp", "staleness": 3, "exact_average": False}, 4),
    "osgp, stale, round before": ({"base": "osgp", "staleness": 3, "sync_every": 8, "topology": "ring"}, 4),
}


def words(staleness=1):
    """
    What is told, as a pattern. The sick rank hears of itself `staleness` steps later: until then it sends, to several
    peers, and the one whose turn comes first may read the message of a later step.
    """
    step = rf"step [{AT}-{AT + staleness - 1}]"
    return rf"ValueError: rank {SICK} on {re.escape(HOST)}, {step}: its parameters are not finite"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "staleness"),
    [
        pytest.param(
            size,
            settings.get("staleness", 1),
            id=f"{name}, {value}",
            marks=pytest.mark.apart(train, settings, value, world_size=size, survivors=tuple(range(size))),
        )
        for value, (name, (settings, size)) in zip(
            itertools.cycle(("nan", "inf", "-inf")), TABLE.items(), strict=False
        )
    ],
)
def test_every_rank_names_the_sick_one_and_no_other_has_its_values(apart, world_size, staleness):
    told, seconds = apart
    for line in told:
        assert re.match(words(staleness), line), told
    assert len(set(told)) == 1, told
    assert seconds < TIMEOUT_SECONDS + patience(20), f"{seconds:.1f} s"


@pytest.mark.parametrize(
    "settings",
    [
        {"base": "sgp", "topology": "ring"},
        {"base": "dpsgd", "exact_average": False},
        {"base": "osgp", "staleness": 2, "sync_every": 8},
    ],
    ids=["sgp", "dpsgd, no average", "osgp, stale"],
)
def test_in_one_process_the_job_ends_in_the_same_words(settings):
    with pytest.raises(RuntimeError, match=rf"worker \d failed: {words(settings.get('staleness', 1))}") as failed:
        run_in_process(lambda rank: train(rank, settings), 4)
    assert isinstance(failed.value.__cause__, ValueError)


# ---- a worker of two processes ----


def train_node_worker(rank, settings, name, element, value="nan", at=AT):
    """
    Ranks 0 and 1 are a worker, 2 and 3 another. After the inner step `at` of rank 1 one element is lost there alone:
    the other process of its worker has it.
    """
    bare = Regression(torch.float32)
    config = SlowMoConfig(
        **{"sync_every": 4, "processes_per_worker": 2, "timeout_seconds": TIMEOUT_SECONDS, **settings}
    )
    inner, taken = torch.optim.SGD(bare.parameters(), lr=0.05), [0]
    optimizer = SlowMoOptimizer(inner, config)
    model = DistributedDataParallel(bare)

    def spoil(*_):
        taken[0] += 1
        if rank == SICK and taken[0] == at:
            dict(bare.named_parameters())[name].data.view(-1)[element] = float(value)

    inner.register_step_post_hook(spoil)
    rows = Rows(200, torch.float32)
    try:
        for step in range(1, 17):
            first = 4 * (step + 3 * rank)
            model(rows.x[first : first + 4], rows.y[first : first + 4])["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
    finally:
        # Without gossip, what a process speaks for is found when the round's sums have come: the average has it.
        is_mixed = config.base == "local_sgd" and (name, element) == SECOND_HALF
        if rank != SICK and not is_mixed and not all(p.isfinite().all() for p in bare.parameters()):
            raise AssertionError("a healthy rank has a parameter that is not finite")


# The second process speaks for the second half of 31 elements: the head's, and the end of the body's weights.
FIRST_HALF, SECOND_HALF = ("body.weight", 0), ("head.weight", 1)
NODE_TABLE = {
    "sgp, its own part": ({"base": "sgp"}, SECOND_HALF, 6),
    "sgp, a replica": ({"base": "sgp"}, FIRST_HALF, 6),
    "sgp, no average, a replica": ({"base": "sgp", "exact_average": False}, FIRST_HALF, 6),
    "osgp, a replica": ({"base": "osgp", "sync_every": 8}, FIRST_HALF, 6),
    "local_sgd, its own part": ({}, SECOND_HALF, 8),
    "local_sgd, a replica": ({}, FIRST_HALF, 8),
    "int8, a replica": ({"compression": "int8"}, FIRST_HALF, 8),
    "sharded slow state, a replica": ({"shard_slow_state": True}, FIRST_HALF, 8),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "step",
    [
        pytest.param(
            step,
            id=name,
            marks=pytest.mark.apart(
                train_node_worker, settings, *lost, "nan", step, world_size=4, survivors=(0, 1, 2, 3)
            ),
        )
        for name, (settings, lost, step) in NODE_TABLE.items()
    ],
)
def test_a_process_that_differs_inside_its_worker_is_told_before_it_is_overwritten(apart, step):
    told, seconds = apart
    for words in told:
        assert words.startswith(f"ValueError: rank {SICK} on {HOST}, step {step}: its parameters are not finite"), told
    assert len(set(told)) == 1, told
    assert seconds < TIMEOUT_SECONDS + patience(20), f"{seconds:.1f} s"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_finiteness_is_one_for_all_that_is_finite(dtype):
    """The largest values, whose sums are not finite, and a parameter without elements are."""
    largest = torch.full((3, 5), torch.finfo(dtype).max, dtype=dtype)
    finite = [largest, -largest, torch.empty(0, dtype=dtype), torch.tensor(-0.0, dtype=dtype)]
    assert finiteness(finite).item() == 1.0
    assert finiteness([]).item() == 1.0
    for value in (float("nan"), float("inf"), -float("inf")):
        lost = largest.clone()
        lost[2, 4] = value
        assert finiteness([*finite, lost]).isnan()


def test_a_mark_leaves_a_finite_message_as_it_is():
    """Bit for bit, also a zero below zero."""
    message = torch.tensor([-0.0, 1.0])
    (item,) = flat_anchors(flat_layouts([[message]]))
    (bucket,) = item.buckets(1024)
    exchange = Exchange({item: item.flat}, [])
    exchange.mark_(bucket, torch.ones((), dtype=torch.float64))
    assert torch.equal(item.flat.view(torch.int32), message.view(torch.int32))
    assert exchange.lost([bucket], here=3) is None
    exchange.mark_(bucket, torch.tensor(float("nan"), dtype=torch.float64))
    assert item.flat.isnan().tolist() == [True, False]
    assert exchange.lost([bucket], here=3) == 3


def survives_its_error(rank):
    """The sick rank's program catches the error and goes on to something else: its connections stay open."""
    try:
        train(rank, {"base": "sgp", "topology": "ring"})
    except ValueError as error:
        if rank == SICK:
            raise StopIteration from error
        raise


@pytest.mark.slow
@pytest.mark.apart(survives_its_error, world_size=4, survivors=(0, 2, 3))
def test_a_sick_rank_that_lives_on_is_named_all_the_same(apart):
    told, seconds = apart
    assert len(set(told)) == 1, told
    assert re.match(words(), told[0])
    assert seconds < TIMEOUT_SECONDS + patience(20), f"{seconds:.1f} s"
