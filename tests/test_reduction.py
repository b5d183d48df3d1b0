"""Reductions by themselves: two launches of one travel at the same time, each in memory of its own."""

from __future__ import annotations

import pytest
import torch

from slowmo_hf import run_in_process
from slowmo_hf.algorithm.codec import BFloat16
from slowmo_hf.algorithm.layout import flat_anchors, flat_layouts
from slowmo_hf.algorithm.starts import Base
from slowmo_hf.wire.averages import Averages
from slowmo_hf.wire.communicator import Communicator
from slowmo_hf.wire.error_feedback import ErrorFeedback
from slowmo_hf.wire.reduction import AllReduce, Launch
from slowmo_hf.wire.sharding import Shards
from slowmo_hf.wire.two_stage import TwoStage, TwoStageAtOwners

WORKERS, ELEMENTS, BUCKET_BYTES = 3, 1000, 1024


def all_reduce(averages, layouts):
    buckets = [bucket for item in flat_anchors(layouts) for bucket in item.buckets(BUCKET_BYTES)]
    return AllReduce(averages, buckets, own_memory=True)


def in_bf16(averages, layouts):
    buckets = [bucket for item in flat_anchors(layouts) for bucket in item.buckets(BUCKET_BYTES)]
    return TwoStage(averages, ErrorFeedback(averages, buckets, BFloat16()), ahead=True)


def at_owners(averages, layouts):
    return TwoStageAtOwners(averages, Shards(averages, layouts, BUCKET_BYTES, "same", ahead=True), ahead=True)


def value(launch, rank):
    """What a worker brings: numbers that bf16 and their sums in it hold exactly."""
    return torch.arange(ELEMENTS).remainder(7) + 8.0 * launch + rank


def read(launch):
    """The sums of a launch that its worker gets, one after the other, and those of the squares."""
    found, squares = [], 0.0
    for bucket, total, square in launch.sums():
        held = sum(piece.stop - piece.start for piece in bucket.pieces)  # shards may be filled up
        found.append(total[:held].clone())
        squares += square
    return torch.cat(found), squares


@pytest.mark.parametrize("make", [all_reduce, in_bf16, at_owners])
@pytest.mark.parametrize("first", [0, 1])
def test_two_launches_travel_at_once(make, first):
    """Set out one after the other, read in either order. From an anchor of 0: the sums are those of -x_i."""

    def work(rank):
        param = torch.nn.Parameter(torch.zeros(ELEMENTS))
        averages = Averages(Communicator(20.0, torch.device("cpu")), BUCKET_BYTES)
        reduction = make(averages, flat_layouts([[param]]))
        launches = [Launch(reduction, ahead=1.0) for _ in range(2)]
        for number, launch in enumerate(launches):
            param.data = value(number, rank)
            launch.send(Base())
        reduction.start_second_stages(wait=True)  # in the order of launches, whatever is read first
        found = {number: read(launches[number]) for number in (first, 1 - first)}
        return found, all(launch.own_is_finite for launch in launches)

    workers = run_in_process(work, WORKERS)
    for number in (0, 1):
        right = -sum(value(number, rank) for rank in range(WORKERS))
        squares = sum(float(value(number, rank).square().sum()) for rank in range(WORKERS))
        found = [sums for sums, _ in workers]
        if make is at_owners:  # each has its shards alone: together they are all elements, bucket by bucket
            assert sum(len(one[number][0]) for one in found) == ELEMENTS
            assert sorted(torch.cat([one[number][0] for one in found]).tolist()) == sorted(right.tolist())
            assert sum(one[number][1] for one in found) == squares
        else:
            for one in found:
                assert torch.equal(one[number][0], right)
                assert one[number][1] == squares
    assert all(finite for _, finite in workers)


@pytest.mark.parametrize("make", [all_reduce, in_bf16, at_owners])
def test_a_worker_counts_by_its_weight(make):
    """Weights 3 and 1, x = 1 and 2 from an anchor of 0: sums of -(3 + 2), squares of 3 + 4."""

    def work(rank):
        param = torch.nn.Parameter(torch.zeros(4))
        averages = Averages(Communicator(20.0, torch.device("cpu")), BUCKET_BYTES)
        averages.weigh([3, 1])
        launch = Launch(make(averages, flat_layouts([[param]])))
        param.data = torch.full((4,), rank + 1.0)
        launch.send(Base())
        return [(total[0].item(), square) for _, total, square in launch.sums()]

    found = run_in_process(work, 2)
    if make is at_owners:  # each has its shard's alone
        assert [total for one in found for total, _ in one] == [-5.0, -5.0]
        assert sum(square for one in found for _, square in one) == 4 * 7.0
    else:
        assert found == [[(-5.0, 4 * 7.0)]] * 2
