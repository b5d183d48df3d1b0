"""
Frozen parameters that training moves (the teacher of BYOL, MoCo, a mean teacher) follow `model_buffers`; a base that
stays (LoRA) costs a checksum; what another optimizer holds is that one's; a copy beside the model is a worker's own.
"""

from __future__ import annotations

import copy
import re

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import Trainer, TrainerCallback

import fsdp
import slowmo_hf
from harness import patience, run_workers
from slowmo_hf import SlowMoCallback, SlowMoConfig, SlowMoOptimizer, run_in_process
from tiny import Rows, arguments, equal

SYNC_EVERY = 4


def in_place(teacher, student):
    with torch.no_grad():
        for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
            slow.lerp_(fast, 0.25)


def by_data(teacher, student):
    for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
        slow.data.lerp_(fast.data, 0.25)


def by_load(teacher, student):
    own, its = teacher.state_dict(), student.state_dict()
    teacher.load_state_dict({name: own[name].lerp(its[name], 0.25) for name in own})


def by_other_memory(teacher, student):
    for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
        slow.data = slow.data.lerp(fast.data, 0.25)


def by_another_parameter(teacher, student):
    mean = teacher.weight.detach().lerp(student.weight.detach(), 0.25)
    teacher.weight = nn.Parameter(mean, requires_grad=False)


WAYS = {
    "in place": in_place,
    "by .data": by_data,
    "by load_state_dict": by_load,
    "to other memory": by_other_memory,
    "to another parameter": by_another_parameter,
}


class Taught(nn.Module):
    """A student with BatchNorm, and a teacher that every training pass moves from `first` on."""

    def __init__(self, way="in place", first=1, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.student, self.norm = nn.Linear(4, 4, dtype=dtype), nn.BatchNorm1d(4, dtype=dtype)
        self.teacher = nn.Linear(4, 4, dtype=dtype).requires_grad_(False)
        self.teacher.load_state_dict(self.student.state_dict())
        self.way, self.first, self.passes = WAYS[way], first, 0

    def forward(self, x, labels=None):
        self.passes += self.training
        if self.training and self.passes >= self.first:
            self.way(self.teacher, self.student)
        out = self.norm(self.student(x))
        return {"loss": (out - self.teacher(x)).square().mean() + (out.sum(1, keepdim=True) - 1).square().mean()}


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


def state_of(model):
    return {n: t.detach().clone() for n, t in (*model.named_parameters(), *model.named_buffers())}


def mean(values):
    return sum(values) / len(values)


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


# ---- under Trainer and Accelerate; a run that is resumed ----


class MoveInACallback(TrainerCallback):
    """The usual place of a mean teacher under Trainer."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        in_place(model.teacher, model.student)


class Kept(TrainerCallback):
    """The state after every step, and what evaluations see."""

    def __init__(self):
        self.after, self.seen = [], []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.after.append(state_of(model))

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        self.seen.append(state_of(model))


def by_trainer(folder, policy, in_callback, resume=None):
    kept = Kept()
    config = SlowMoConfig(sync_every=SYNC_EVERY, model_buffers=policy, timeout_seconds=patience(30))
    args = arguments(
        folder, max_steps=9, learning_rate=0.1, optim="sgd", save_strategy="steps", save_steps=3, eval_strategy="steps"
    )
    args.eval_steps = 6
    movers = [MoveInACallback()] if in_callback else []
    data = Rows(64)
    trainer = Trainer(
        Taught(first=100 if in_callback else 1),
        args,
        train_dataset=data,
        eval_dataset=data,
        callbacks=[*movers, kept, SlowMoCallback(config)],
    )
    trainer.train(resume_from_checkpoint=resume)
    model = trainer.accelerator.unwrap_model(trainer.model)
    return kept.after, kept.seen, state_of(model)


def trainer_and_resume(folder, policy, in_callback):
    whole = by_trainer(folder, policy, in_callback)
    dist.barrier()
    return whole, by_trainer(folder, policy, in_callback, resume=f"{folder}/checkpoint-6")


@pytest.mark.parametrize("in_callback", [False, True], ids=["forward", "callback"])
@pytest.mark.parametrize("policy", ["average", "local"])
def test_trainer_shows_the_average_teacher_and_resumes_bit_for_bit(tmp_path, policy, in_callback):
    """Saved at step 6, between rounds; evaluated there; the end is the average."""
    found = run_workers(trainer_and_resume, 2, str(tmp_path), policy, in_callback)
    (first, _), (other, _) = found
    assert not torch.equal(first[0][5]["teacher.weight"], other[0][5]["teacher.weight"])
    for whole, again in found:
        assert torch.equal(whole[1][0]["teacher.weight"], mean([its[0][5]["teacher.weight"] for its, _ in found]))
        assert len(again[0]) == 3
        for one, two in zip(whole[0][6:], again[0], strict=True):
            assert equal(one, two)
        assert equal(whole[2], again[2])
        assert torch.equal(whole[2]["teacher.weight"], mean([its[0][8]["teacher.weight"] for its, _ in found]))


class Accelerated:
    """Under Accelerate."""

    def __init__(self, folder=None, **settings):
        self.accelerator, self.bare = Accelerator(cpu=True), Taught()
        config = SlowMoConfig(**{"sync_every": SYNC_EVERY, "timeout_seconds": patience(30)} | settings)
        inner = torch.optim.SGD([p for p in self.bare.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
        self.model, self.optimizer = self.accelerator.prepare(self.bare, SlowMoOptimizer(inner, config))
        if folder is not None:
            self.accelerator.load_state(folder)

    def train(self, steps):
        for step in steps:
            draw = torch.Generator().manual_seed(100 * step + dist.get_rank())
            x = torch.randn(8, 4, generator=draw, dtype=torch.float64)
            self.accelerator.backward(self.model(x)["loss"])
            self.optimizer.step()
            self.optimizer.zero_grad()


def accelerate_and_resume(folder, settings):
    whole = Accelerated(**settings)
    whole.train(range(6))
    saved = state_of(whole.bare)
    with slowmo_hf.consensus(whole.optimizer):
        shown = state_of(whole.bare)
    whole.accelerator.save_state(folder)
    assert equal(saved, state_of(whole.bare))
    whole.train(range(6, 9))
    end = state_of(whole.bare)
    again = Accelerated(folder, **settings)
    again.optimizer.optimizer.begun()
    taken_up = state_of(again.bare)
    again.train(range(6, 9))
    resumed = state_of(again.bare)
    slowmo_hf.finish(again.optimizer)
    return saved, shown, taken_up, end, resumed, state_of(again.bare)


@pytest.mark.parametrize(
    ("settings", "processes"),
    [
        ({}, 2),
        ({"model_buffers": "local"}, 2),
        ({"overlap_steps": 3}, 2),
        ({"base": "osgp"}, 2),
        ({"processes_per_worker": 2}, 4),
    ],
    ids=str,
)
def test_accelerate_resumes_bit_for_bit(tmp_path, settings, processes):
    """In the middle of a round. Processes of one worker have one teacher, for they have one student."""
    found = run_workers(accelerate_and_resume, processes, str(tmp_path / "saved"), settings)
    size = settings.get("processes_per_worker", 1)
    workers = found[::size]
    assert not torch.equal(workers[0][0]["teacher.weight"], workers[1][0]["teacher.weight"])
    for rank, (saved, shown, taken_up, end, resumed, finished) in enumerate(found):
        assert torch.equal(saved["teacher.weight"], workers[rank // size][0]["teacher.weight"])
        assert torch.equal(shown["teacher.weight"], mean([its[0]["teacher.weight"] for its in workers]))
        if rank % size:  # at a pass DDP gives it the buffers of its worker's first process
            saved = {name: value for name, value in saved.items() if "norm.r" not in name}
        assert all(torch.equal(saved[name], taken_up[name]) for name in saved)
        assert equal(end, resumed)
        assert torch.equal(finished["teacher.weight"], mean([its[3]["teacher.weight"] for its in workers]))


class TaughtShards(fsdp.Awkward):
    """A teacher of one block, sharded with the rest: FSDP2 gathers it for the forward pass."""

    def __init__(self):
        super().__init__()
        self.teacher = copy.deepcopy(self.blocks[0]).requires_grad_(False)

    def forward(self, x, labels):
        out = super().forward(x, labels)
        hidden = self.embed(x)
        return {"loss": out["loss"] + (self.teacher(hidden) - self.blocks[0](hidden)).square().mean()}


def shards_move(folder):
    """Four processes, two workers of two: the teacher's shards before and after each step; a view; a resume."""
    config = SlowMoConfig(sync_every=SYNC_EVERY, timeout_seconds=patience(60))

    def make():
        model = TaughtShards()

        def made(params):
            return SlowMoOptimizer(fsdp.sgd([p for p in params if p.requires_grad]), config)

        return fsdp.prepared(2, 2, make=made, model=model)

    def train(program, steps):
        seen, teacher = [], program.model.teacher
        for step in steps:
            batch = fsdp.Tokens().batch((8 * step + 4 * (dist.get_rank() // 2)) % 60)
            program.accelerator.backward(program.model(**batch)["loss"])
            in_place(teacher, program.model.blocks[0])
            before = shards_of(teacher)
            program.optimizer.step()
            program.optimizer.zero_grad()
            seen.append((before, shards_of(teacher)))
        return seen

    whole = make()
    seen = train(whole, range(6))
    with slowmo_hf.consensus(whole.optimizer):
        shown = shards_of(whole.model.teacher)
    whole.accelerator.save_state(folder)
    seen += train(whole, range(6, 9))
    again = make()
    again.accelerator.load_state(folder)
    return seen, shown, train(again, range(6, 9))


def shards_of(module):
    return {name: param.to_local().clone() for name, param in module.named_parameters()}


@fsdp.NEEDED
def test_shards_of_a_teacher_are_averaged_with_their_counterparts(tmp_path):
    found = run_workers(shards_move, 4, str(tmp_path / "saved"), time_limit_seconds=patience(240))
    for rank, (seen, shown, again) in enumerate(found):
        mates = [found[rank % 2], found[rank % 2 + 2]]
        for step, (before, after) in enumerate(seen, start=1):
            means = {n: mean([its[0][step - 1][0][n] for its in mates]) for n in before}
            assert equal(after, means if step % SYNC_EVERY == 0 else before), step
        assert equal(shown, {n: mean([its[0][5][1][n] for its in mates]) for n in shown})
        for (_, one), (_, two) in zip(seen[6:], again, strict=True):
            assert equal(one, two)
    assert not torch.equal(found[0][0][5][1]["down.weight"], found[2][0][5][1]["down.weight"])


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


# ---- several optimizers of one program ----


class Two(nn.Module):
    """A maker and a judge in one module, as one wrapper may hold them; a teacher of the maker's."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.maker, self.judge = (nn.Linear(4, 4, dtype=torch.float64) for _ in range(2))
        self.teacher = copy.deepcopy(self.maker).requires_grad_(False)

    def forward(self, x, part):
        if part == "maker":
            in_place(self.teacher, self.maker)
            return self.judge(self.maker(x)).square().mean()
        return (self.judge(x) - 1).square().mean() - self.judge(self.teacher(x)).mean()


def in_turn(rank, starts_late):
    """What each optimizer's step changes of the other one's network, and rounds at other steps than its own."""
    model, draw = Two(), torch.Generator().manual_seed(rank)
    parts = {"maker": model.maker, "judge": model.judge}
    optimizers = {
        part: SlowMoOptimizer(
            torch.optim.Adam(parts[part].parameters(), lr=0.05),
            SlowMoConfig(sync_every=every, timeout_seconds=patience(20)),
        )
        for part, every in (("maker", 2), ("judge", 3))
    }
    touched = []
    for step in range(12):
        for part, optimizer in optimizers.items():
            if starts_late and part == "judge" and step < 3:
                continue
            model(torch.randn(8, 4, generator=draw, dtype=torch.float64), part).backward()
            other = model.judge if part == "maker" else model.maker
            before = state_of(other)
            optimizer.step()
            model.zero_grad()
            touched.append(equal(before, state_of(other)))
    with slowmo_hf.consensus(optimizers["maker"]):
        touched.append(equal(before, state_of(model.maker)))  # `before` is the maker's: what is shown is another one
        shown = state_of(model)
    return touched, shown, state_of(model)


@pytest.mark.parametrize("starts_late", [False, True])
def test_what_another_optimizer_holds_is_that_ones(starts_late):
    """A network that its own optimizer moves is no teacher of the other one; the maker's teacher is averaged."""
    found = run_in_process(lambda rank: in_turn(rank, starts_late), 2)
    for touched, shown, ended in found:
        assert all(touched[:-1])
        assert equal(
            {n: t for n, t in shown.items() if "judge" in n}, {n: t for n, t in ended.items() if "judge" in n}
        )
        assert torch.equal(shown["teacher.weight"], mean([its[2]["teacher.weight"] for its in found]))


def test_what_an_optimizer_held_that_is_gone_is_no_teacher():
    """Trained first, then left alone: its last average stays, on each worker bit for bit."""

    def work(rank):
        model, draw = Two(), torch.Generator().manual_seed(rank)
        config = SlowMoConfig(sync_every=2, timeout_seconds=patience(20))
        judge = SlowMoOptimizer(torch.optim.Adam(model.judge.parameters(), lr=0.05), config)
        maker = SlowMoOptimizer(torch.optim.Adam(model.maker.parameters(), lr=0.05), config)
        for step in range(8):
            for part, optimizer in (("judge", judge), ("maker", maker)):
                if part == "judge" and step > 2:
                    judge = optimizer = None
                    continue
                model(torch.randn(8, 4, generator=draw, dtype=torch.float64), part).backward()
                optimizer.step()
                model.zero_grad()
            if step == 2:
                left = state_of(model.judge)
        assert equal(left, state_of(model.judge))
        return left["weight"]

    first, other = run_in_process(work, 2)
    assert not torch.equal(first, other)


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
