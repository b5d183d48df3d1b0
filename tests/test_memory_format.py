"""A parameter whose memory takes another order after the start is an error on all ranks, before anything is mixed."""

from __future__ import annotations

import contextlib
import re

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import fsdp
import slowmo_hf
from harness import patience, run_workers
from slowmo_hf import SlowMoConfig, SlowMoOptimizer, run_in_process
from slowmo_hf.checkpoints.state import check_snapshot, write_snapshot
from slowmo_hf.checkpoints.together import keeps_files
from slowmo_hf.contents import CheckpointError
from tiny import error_of

WORDS = r"rank 0 on \S+, step (\d+): the parameter set changed after the start \(.*or given other strides"
OF_ALL = WORDS.replace(r"\S+,", r"\S+ and all others,")
KINDS = {
    "local SGD": {},
    "no outer update": {"outer_momentum": 0.0},
    "SGP": {"base": "sgp"},
    "OSGP": {"base": "osgp", "staleness": 2},
    "D-PSGD": {"base": "dpsgd"},
    "no average": {"base": "sgp", "exact_average": False},
    "overlapped": {"overlap_steps": 2},
    "overlapped, sharded": {"overlap_steps": 3, "shard_slow_state": True},
    "overlapped, int8": {"overlap_steps": 3, "compression": "int8"},
    "sharded": {"shard_slow_state": True},
    "int8": {"compression": "int8"},
    "all-reduce": {"base": "all_reduce"},
}


class Loop:
    """One worker's training of a convolution."""

    def __init__(self, rank, kernel=3, channels=3, **settings):
        torch.manual_seed(0)
        self.model, self.channels = nn.Conv2d(channels, 4, kernel, dtype=torch.float64), channels
        config = SlowMoConfig(**{"sync_every": 4, "timeout_seconds": patience(20)} | settings)
        self.optimizer = SlowMoOptimizer(torch.optim.SGD(self.model.parameters(), lr=0.1), config)
        self.draw = torch.Generator().manual_seed(rank)

    def step(self):
        x = torch.randn(2, self.channels, 6, 6, generator=self.draw, dtype=torch.float64)
        self.model(x).square().mean().backward()
        self.stepped = self.weight() - 0.1 * self.model.weight.grad  # what SGD alone makes of it
        self.optimizer.step()
        self.optimizer.zero_grad()

    def weight(self):
        return self.model.weight.detach().clone(memory_format=torch.contiguous_format)

    def convert(self):
        self.model.to(memory_format=torch.channels_last)


def trained(rank, converts, at, settings, steps=14):
    """
    Weights after every step, and as SGD alone would have left them, until an error ends it; `converts` are the ranks
    that do at step `at`.
    """
    loop, seen, words = Loop(rank, **settings), [], ""
    for step in range(1, steps + 1):
        if step == at and rank in converts:
            loop.convert()
        words = error_of(loop.step)
        if words:
            break
        seen.append((loop.weight(), loop.stepped))
    return seen, words


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "all-reduce"])
@pytest.mark.parametrize("converts", [(0,), (0, 1)], ids=["one rank", "all ranks"])
@pytest.mark.parametrize("at", [2, 6])
def test_it_is_an_error_on_all_ranks_at_the_next_round(kind, converts, at):
    """
    Also behind a round that is in flight; one that sets out unheard is heard of where it is due. Until then a rank
    that has converted trains as if it were alone.
    """
    settings = KINDS[kind]
    found = run_in_process(lambda rank: trained(rank, converts, at, settings), 2)
    alone = run_in_process(lambda rank: trained(rank, (), 99, settings), 2)
    words = found[0][1]
    assert words == found[1][1]
    told = re.match(f"ValueError: {OF_ALL if len(converts) > 1 else WORDS}", words)
    assert told, words
    assert int(told[1]) == (4 if at < 4 else 8)
    due = int(told[1]) + (settings.get("overlap_steps", 0) if at > 4 else 0)
    for rank, (seen, _) in enumerate(found):
        assert int(told[1]) <= len(seen) + 1 <= due
        for step, ((after, stepped), (right, _)) in enumerate(zip(seen, alone[rank][0], strict=False), start=1):
            if step < at:
                assert torch.equal(after, right), step
            elif rank in converts:
                assert torch.allclose(after, stepped, rtol=0, atol=1e-15), step


def test_gradients_of_another_order_are_not_averaged():
    """Of `base="all_reduce"` in one process: at once, on the rank that has converted; the job ends with it."""

    def work(rank):
        loop = Loop(rank, base="all_reduce")
        loop.step()
        loop.convert()
        loop.step()

    with pytest.raises(RuntimeError, match="the parameter set changed after the start"):
        run_in_process(work, 2)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "all-reduce"])
def test_a_view_is_an_error_too(kind):
    """Also the end of training, `state_dict`, and `model.eval()`, which is told on the rank that calls it."""

    def work(rank):
        loop = Loop(rank, **KINDS[kind])
        for _ in range(5):
            loop.step()
        loop.convert()
        before = loop.weight()
        words = [
            error_of(lambda: slowmo_hf.consensus(loop.optimizer).__enter__()),
            error_of(lambda: slowmo_hf.finish(loop.optimizer)),
            error_of(loop.optimizer.state_dict),
            error_of(loop.model.eval),
        ]
        return words, torch.equal(before, loop.weight())

    for words, same in run_in_process(work, 2):
        assert same
        assert all("the parameter set changed after the start" in told for told in words), words


def test_where_workers_agree_a_save_and_a_load_are_errors(tmp_path):
    """At a round's end a view writes nothing; but the slow state would be saved in one order, and read in another."""

    def work(rank):
        loop = Loop(rank)
        for _ in range(4):
            loop.step()
        state = loop.optimizer.state_dict()
        loop.convert()
        outer_loop = loop.optimizer.outer_loop
        return [
            error_of(lambda: keeps_files(outer_loop, tmp_path / "new", whole_on_each=True)),
            error_of(loop.optimizer.state_dict),
            error_of(lambda: loop.optimizer.load_state_dict(state)),
        ]

    for words in run_in_process(work, 2):
        assert all("the parameter set changed after the start" in told for told in words), words


def test_a_checkpoint_is_not_taken_up(tmp_path):
    def work(rank):
        loop = Loop(rank)
        for _ in range(5):
            loop.step()
        outer_loop = loop.optimizer.outer_loop
        write_snapshot(str(tmp_path), outer_loop, shared=rank == 0, objects={})
        outer_loop.workers.world.gather_objects(None)
        loop.convert()
        with pytest.raises(CheckpointError, match="the parameter set changed after the start"):
            check_snapshot(str(tmp_path), outer_loop)
        loop.model.to(memory_format=torch.contiguous_format)
        check_snapshot(str(tmp_path), outer_loop)()
        [loop.step() for _ in range(5)]  # it is as it was: no error
        return loop.weight()

    assert len(run_in_process(work, 2)) == 2


def over_gloo(kind):
    return trained(dist.get_rank(), (1,), 2, KINDS[kind])[1]


@pytest.mark.parametrize("kind", ["local SGD", "OSGP", "overlapped"])
def test_over_gloo(kind):
    first, other = run_workers(over_gloo, 2, kind)
    assert first == other
    assert re.match(rf"ValueError: {WORDS}".replace("rank 0", "rank 1"), first), first


@pytest.mark.parametrize("base", ["local_sgd", "sgp"])
@pytest.mark.parametrize(("kernel", "channels"), [(1, 3), (3, 1)])
def test_other_strides_of_the_same_order_are_none(base, kernel, channels):
    """Of 1 x 1 kernels and of one channel, memory in channels-last order is the same: results bit for bit."""

    def work(rank, converts):
        loop = Loop(rank, kernel, channels, base=base)
        for step in range(9):
            if step == 5 and converts:
                stride = loop.model.weight.stride()
                loop.convert()
                assert loop.model.weight.stride() != stride
            loop.step()
        with slowmo_hf.consensus(loop.optimizer):
            return loop.weight()

    one, other = (run_in_process(lambda rank, c=c: work(rank, c), 2)[0] for c in (True, False))
    assert torch.allclose(one, other, atol=1e-12)


def test_a_network_that_is_frozen_in_turn_is_compared_too():
    def work(rank):
        loop = Loop(rank)
        loop.step()
        loop.model.requires_grad_(False)
        assert error_of(lambda: slowmo_hf.consensus(loop.optimizer).__enter__()) == ""
        loop.optimizer.outer_loop.consensus.restore()
        loop.convert()
        return error_of(lambda: slowmo_hf.consensus(loop.optimizer).__enter__())

    for words in run_in_process(work, 2):
        assert re.match(f"ValueError: {OF_ALL}", words), words


def test_a_moved_convolution_in_another_order_on_one_rank_is_named():
    """Of what no optimizer holds, too: a teacher that has moved has one order everywhere."""

    def work(rank, converts):
        loop = Loop(rank)
        teacher = nn.Conv2d(3, 4, 3, dtype=torch.float64).requires_grad_(False)
        loop.model.add_module("teacher", teacher)
        for step in range(4):
            if step == 2 and rank in converts:
                teacher.to(memory_format=torch.channels_last)
            teacher.weight += 0.5 * rank
            words = error_of(loop.step)
        return words, teacher.weight.detach().clone(memory_format=torch.contiguous_format)

    for words, _ in run_in_process(lambda rank: work(rank, (1,)), 2):
        assert (
            "frozen parameter 'teacher.weight' has strides [27, 9, 3, 1] on rank 0, [27, 1, 9, 3] on rank 1" in words
        )
    both = run_in_process(lambda rank: work(rank, (0, 1)), 2)
    none = run_in_process(lambda rank: work(rank, ()), 2)
    for (words, weight), (_, right) in zip(both, none, strict=True):
        assert words == ""
        assert torch.equal(weight, right)


def shards_convert():
    """Two workers of two shards, of which one worker's take another order: what the step of each says, until then."""
    torch.manual_seed(0)
    bare = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 1))
    model = fully_shard(bare, mesh=fsdp.machine_mesh(2))
    config = SlowMoConfig(sync_every=2, processes_per_worker=2, timeout_seconds=patience(30))
    optimizer, words = SlowMoOptimizer(fsdp.sgd(model.parameters()), config), []
    for step in range(4):
        if step == 2 and dist.get_rank() in (0, 1):
            with contextlib.suppress(RuntimeError):  # torch cannot, and leaves the shards in the new order
                model.to(memory_format=torch.channels_last)
            assert model[0].weight.to_local().stride() == (27, 1, 9, 3)
        model(torch.randn(2, 3, 6, 6)).square().mean().backward()
        words.append(error_of(optimizer.step))
        optimizer.zero_grad()
    return words


@fsdp.NEEDED
def test_shards_in_another_order_are_an_error_on_all_ranks():
    for words in run_workers(shards_convert, 4):
        assert words[:3] == [""] * 3
        both = WORDS.replace(r"rank 0 on \S+", r"rank 0 on \S+, rank 1 on \S+")
        assert re.match(f"ValueError: {both}", words[3]), words[3]
