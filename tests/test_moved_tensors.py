"""
Frozen parameters that training moves (the teacher of BYOL, MoCo, a mean teacher) follow `model_buffers`; a base that
stays (LoRA) costs a checksum; a copy beside the model is a worker's own.
"""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import slowmo_hf
from harness import patience
from slowmo_hf import SlowMoConfig, SlowMoOptimizer, run_in_process
from teachers import SYNC_EVERY, WAYS, Taught, mean, state_of
from tiny import equal


class Loop:
    """One worker's training in `run_in_process`."""

    def __init__(self, rank, model=None, params=None, **settings):
        self.model = Taught() if model is None else model
        config = SlowMoConfig(**{"sync_every": SYNC_EVERY, "timeout_seconds": patience(20)} | settings)
        own = [p for p in self.model.parameters() if p.requires_grad] if params is None else params
        self.optimizer = SlowMoOptimizer(torch.optim.SGD(own, lr=0.1, momentum=0.5), config)
        self.draw = torch.Generator().manual_seed(rank)

    def backward(self):
        x = torch.randn(8, 4, generator=self.draw, dtype=next(self.model.parameters()).dtype)
        self.model(x)["loss"].backward()

    def step(self):
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self):
        return state_of(self.model)


# ---- a teacher inside the model ----


def followed(rank, way, settings):
    """The teacher before and after every optimizer step, in a view at step 6, behind it, and at the end."""
    loop, seen = Loop(rank, Taught(way), **settings), []
    for step in range(1, 11):
        loop.backward()
        before = loop.model.teacher.weight.detach().clone()
        loop.optimizer.step()
        loop.optimizer.zero_grad()
        seen.append((before, loop.model.teacher.weight.detach().clone()))
        if step == 6:
            ended = loop.state()
            with slowmo_hf.consensus(loop.optimizer):
                shown = loop.state()
            assert equal(loop.state(), ended)
            loop.model.eval()
            last = loop.model.teacher.weight.detach().clone()
            loop.model.train()
            assert equal(loop.state(), ended)
    slowmo_hf.finish(loop.optimizer)
    return seen, ended, shown, last, loop.model.teacher.weight.detach().clone()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("policy", ["average", "local"])
def test_a_teacher_follows_model_buffers(way, policy):
    """However it is written. Averages of two numbers in fp64 are exact."""
    found = run_in_process(lambda rank: followed(rank, way, {"model_buffers": policy}), 2)
    for step, pairs in enumerate(zip(*(seen for seen, *_ in found), strict=True), start=1):
        before, after = [[pair[i] for pair in pairs] for i in (0, 1)]
        at_a_round = policy == "average" and step % SYNC_EVERY == 0
        for mine, now in zip(before, after, strict=True):
            assert torch.equal(now, mean(before) if at_a_round else mine), step
        assert step <= 1 or step % SYNC_EVERY == 1 or not torch.equal(before[0], before[1])
    for _, ended, shown, last, end in found:
        assert torch.equal(shown["teacher.weight"], mean([its[1]["teacher.weight"] for its in found]))
        assert torch.equal(last, found[0][0][3][1] if policy == "average" else ended["teacher.weight"])
        assert torch.equal(end, mean([its[0][9][1] for its in found]))


@pytest.mark.parametrize(
    "settings",
    [
        {"base": "sgp"},
        {"base": "osgp", "staleness": 2},
        {"base": "dpsgd"},
        {"overlap_steps": 2},
        {"compression": "int8"},
        {"shard_slow_state": True},
        {"shard_slow_state": True, "overlap_steps": 3},
        {"outer_optimizer": "torch.optim.SGD"},
        {"stash_device": "cpu"},
    ],
    ids=str,
)
def test_with_every_kind_of_round(settings):
    """At a round it is the mean of what all had there; with overlap where the round is launched."""

    def work(rank):
        loop, seen = Loop(rank, **settings), []
        for _ in range(9):
            loop.backward()
            before = loop.model.teacher.weight.clone()
            loop.optimizer.step()
            loop.optimizer.zero_grad()
            seen.append((before, loop.model.teacher.weight.clone()))
        ended = loop.state()
        with slowmo_hf.consensus(loop.optimizer):
            shown = loop.model.teacher.weight.clone()
        assert equal(loop.state(), ended)
        return seen, shown

    found = run_in_process(work, 2)
    for step, pairs in enumerate(zip(*(seen for seen, _ in found), strict=True), start=1):
        for before, after in pairs:
            assert torch.equal(after, before if step % SYNC_EVERY else mean([its for its, _ in pairs])), step
    for _, shown in found:
        assert torch.equal(shown, mean([seen[-1][1] for seen, _ in found]))


def test_one_that_moves_behind_a_round_that_went_ahead():
    """
    Nothing but parameters was averaged at step 4, so the round of step 8 sets out unheard; the teacher has moved since
    step 7, and is averaged where that round is heard of, at step 10.
    """

    def work(rank):
        model = Taught(first=7)
        model.norm = nn.Identity()
        loop, seen = Loop(rank, model, overlap_steps=2), []
        for _ in range(12):
            loop.backward()
            before = model.teacher.weight.clone()
            loop.optimizer.step()
            loop.optimizer.zero_grad()
            seen.append((before, model.teacher.weight.clone()))
        return seen

    found = run_in_process(work, 2)
    for step, pairs in enumerate(zip(*found, strict=True), start=1):
        for before, after in pairs:
            assert torch.equal(after, mean([its for its, _ in pairs]) if step in (10, 12) else before), step


def test_one_that_is_not_finite_is_an_error_that_names_it():
    def work(rank):
        loop = Loop(rank)
        [loop.step() for _ in range(3)]
        loop.backward()
        loop.model.teacher.bias.data[1] += float("inf") if rank else 0
        loop.optimizer.step()

    with pytest.raises(RuntimeError) as error:
        run_in_process(work, 2)
    cause = str(error.value.__cause__)
    assert re.match(r"rank 1 on \S+, step 4: frozen parameter 'teacher.bias' is not finite", cause), cause


def looked(inference):
    """A run that looks at the average before and behind its first round, in inference mode or not at all."""

    def work(rank):
        model = Taught()
        model.student.bias = model.teacher.bias = None  # BatchNorm takes it out: it would hardly move
        loop = Loop(rank, model)
        for step in range(10):
            loop.step()
            if step in (1, 6) and inference:
                with torch.inference_mode(), slowmo_hf.consensus(loop.optimizer):
                    loop.model(torch.randn(2, 4, dtype=torch.float64))
                with slowmo_hf.consensus(loop.optimizer), torch.inference_mode():
                    loop.model.eval()(torch.randn(2, 4, dtype=torch.float64))
                loop.model.train()
        return loop.state()

    return run_in_process(work, 2)


def test_a_view_in_inference_mode_leaves_nothing_behind():
    """Also one whose pass is one of training, and moves teacher and buffers: they are taken back."""
    for one, other in zip(looked(True), looked(False), strict=True):
        assert equal(one, other)


# ---- a base that stays ----


class LowRank(nn.Module):
    """A frozen base whose average would overflow, packed weights, and a small matrix that is trained."""

    def __init__(self, base):
        super().__init__()
        torch.manual_seed(0)
        self.down = nn.Parameter(torch.randn(4, 2))
        if base:
            large = torch.full((64, 3, 3, 3), torch.finfo(torch.float32).max)
            large[0, 0, 0] = float("inf")
            self.conv = nn.Parameter(large, requires_grad=False)
            self.rough = nn.Parameter(torch.randn(64, 4).bfloat16(), requires_grad=False)
            self.packed = nn.Parameter(torch.arange(200, dtype=torch.uint8), requires_grad=False)

    def forward(self, x):
        return {"loss": (x.float() @ self.down).square().mean()}


def low_rank(rank, base, change=lambda model: None):
    loop = Loop(rank, LowRank(base))
    for step in range(10):
        loop.step()
        if step == 4:
            change(loop.model)
            with slowmo_hf.consensus(loop.optimizer):
                pass
    return loop.optimizer.outer_loop.workers.bytes_sent, loop.state()


CHANGES = {
    "nothing": lambda model: None,
    "unfrozen and frozen": lambda model: model.conv.requires_grad_().requires_grad_(False),
    "other strides": lambda model: model.to(memory_format=torch.channels_last),
    "other memory": lambda model: setattr(model.rough, "data", model.rough.data.clone()),
    "rewritten": lambda model: model.load_state_dict(model.state_dict()),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_base_that_stays_is_not_sent_and_not_averaged(name):
    """Not a byte more than without a base; and it is what it was, though its average would be infinite."""
    alone = run_in_process(lambda rank: low_rank(rank, base=False), 2)
    beside = run_in_process(lambda rank: low_rank(rank, base=True, change=CHANGES[name]), 2)
    start = state_of(LowRank(base=True))
    for (bytes_alone, _), (bytes_sent, state) in zip(alone, beside, strict=True):
        assert bytes_sent == bytes_alone
        assert equal({n: t for n, t in state.items() if n != "down"}, {n: t for n, t in start.items() if n != "down"})


def test_no_copy_of_a_base_is_kept():
    """All tensors that the loop reaches beside the model's own are smaller than the base."""

    def work(rank):
        loop = Loop(rank, LowRank(base=True))
        [loop.step() for _ in range(5)]
        others = vars(loop.optimizer.outer_loop.tensors.others)
        reached = [value for of in others.values() if isinstance(of, dict) for value in of.values()]
        return sum(value.nbytes for value in reached if isinstance(value, torch.Tensor)), len(others["_first"])

    assert run_in_process(work, 2) == [(0, 3)] * 2


@pytest.mark.parametrize("policy", ["average", "local"])
def test_packed_weights_that_move_have_no_average(policy):
    """Averages of bytes that hold several numbers are nonsense: refused by name, or each worker's own."""

    def work(rank):
        loop = Loop(rank, LowRank(base=True), model_buffers=policy)
        for _ in range(5):
            loop.step()
            loop.model.packed.data += rank + 1
        with slowmo_hf.consensus(loop.optimizer):
            assert loop.model.packed[0] == 5 * (rank + 1)
        return int(loop.model.packed[0])

    if policy == "local":
        assert run_in_process(work, 2) == [5, 10]
        return
    with pytest.raises(RuntimeError) as error:
        run_in_process(work, 2)
    assert "frozen parameter 'packed' changes in training, and of torch.uint8 there is no average" in str(
        error.value.__cause__
    )


# ---- copies ----


def copies(rank, inside):
    """`AveragedModel` beside the model or in it, moved after each step; a view; and one that is fed with averages."""

    def make(model):
        return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.75))

    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Taught(first=100)
            if inside:
                self.ema = make(self.net.student)

        def forward(self, x):
            return self.net(x)

    model = Holder()
    loop = Loop(
        rank, model, params=[p for n, p in model.named_parameters() if not n.startswith(("ema", "net.teacher"))]
    )
    ema, of_all = model.ema if inside else make(model.net.student), make(model.net.student)
    right = copy.deepcopy(ema)
    for step in range(1, 11):
        loop.backward()
        before = state_of(ema)
        loop.optimizer.step()
        loop.optimizer.zero_grad()
        touched = not equal(before, state_of(ema))
        assert touched == (inside and step in (4, 8)), step
        ema.update_parameters(model.net.student)
        right.update_parameters(model.net.student)
        with slowmo_hf.consensus(loop.optimizer):
            of_all.update_parameters(model.net.student)
    with slowmo_hf.consensus(loop.optimizer):
        shown = state_of(ema)
    return state_of(ema), shown, state_of(right), state_of(of_all)


def test_a_copy_outside_the_model_is_the_workers_own():
    """The moving average of its local weights, which rounds and views leave alone; one fed in views is for all."""
    found = run_in_process(lambda rank: copies(rank, inside=False), 2)
    for ema, shown, right, _ in found:
        assert equal(ema, right)
        assert equal(shown, ema)
    assert not torch.equal(found[0][0]["module.weight"], found[1][0]["module.weight"])
    assert equal(found[0][3], found[1][3])


def test_a_copy_in_the_model_follows_model_buffers():
    """Averaged at rounds and shown as an average; its count of updates is the same everywhere."""
    found = run_in_process(lambda rank: copies(rank, inside=True), 2)
    for _, shown, _, _ in found:
        assert torch.equal(shown["module.weight"], mean([its[0]["module.weight"] for its in found]))
        assert shown["n_averaged"] == 10


@pytest.mark.parametrize("way", ["consensus", "finish"])
def test_a_teacher_that_is_not_finite_is_told_in_views_of_local_ones_too(way):
    """Rounds keep it apart, and a view would give it to all."""

    def work(rank):
        torch.manual_seed(0)
        model = nn.Linear(4, 1)
        model.teacher = nn.Parameter(torch.ones(2), requires_grad=False)
        config = SlowMoConfig(sync_every=2, model_buffers="local", timeout_seconds=patience(20))
        optimizer = SlowMoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), config)
        for _ in range(3):
            model(torch.ones(2, 4)).sum().backward()
            optimizer.step()
            model.teacher.data.fill_(float("nan") if rank else 2.0)
        if way == "finish":
            slowmo_hf.finish(optimizer)
        with slowmo_hf.consensus(optimizer):
            pass

    with pytest.raises(ValueError, match=r"rank 1 on \S+, step 3: frozen parameter 'teacher' is not finite"):
        run_in_process(work, 2)


class Stages(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(3, 1), nn.Linear(3, 1)

    def forward(self, x, stage):
        return getattr(self, stage)(x)


def test_what_a_finished_optimizer_held_may_be_a_teacher():
    """Stage 1 trains it, stage 2 moves it by the worker's number a step: by 0.5 a step, at every round's mean."""

    def work(rank):
        model, config, held = Stages(), SlowMoConfig(sync_every=2, timeout_seconds=patience(20)), []
        for stage in ("first", "second"):
            held.append(SlowMoOptimizer(torch.optim.SGD(getattr(model, stage).parameters(), lr=0.1), config))
            for _ in range(4):
                model(torch.ones(2, 3), stage).sum().backward()
                if stage == "second":
                    with torch.no_grad():
                        model.first.weight += rank
                held[-1].step()
                model.zero_grad()
            slowmo_hf.finish(held[-1])
            getattr(model, stage).requires_grad_(False)
            if stage == "first":
                left = model.first.weight.detach().clone()
        return model.first.weight - left

    for moved in run_in_process(work, 2):
        torch.testing.assert_close(moved, torch.full((1, 3), 2.0))
