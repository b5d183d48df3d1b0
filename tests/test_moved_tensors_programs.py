"""The same under Trainer and Accelerate, resumed, and with several optimizers."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from transformers import Trainer, TrainerCallback

import fsdp
import slowmo_hf
from harness import patience, run_workers
from slowmo_hf import SlowMoCallback, SlowMoConfig, SlowMoOptimizer, run_in_process
from teachers import SYNC_EVERY, Taught, in_place, mean, state_of
from tiny import Rows, arguments, equal

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

    def __init__(self, folder=None, bare=None, **settings):
        self.accelerator, self.bare = Accelerator(cpu=True), bare or Taught()
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


class Cast(nn.Module):
    """As bitsandbytes' 4-bit layers do: a frozen bias is cast in the first pass, without loss or with it."""

    def __init__(self, bias):
        super().__init__()
        torch.manual_seed(0)
        self.out = nn.Linear(4, 3, dtype=torch.float64)
        self.bias = nn.Parameter(torch.full((3,), bias), requires_grad=False)

    def forward(self, x):
        self.bias.data = self.bias.data.to(torch.bfloat16)
        return {"loss": (self.out(x) + self.bias).square().mean()}


def cast_and_resumed(folder, bias):
    whole = Accelerated(bare=Cast(bias))
    whole.train(range(SYNC_EVERY + 1))
    whole.accelerator.save_state(folder)
    whole.train(range(SYNC_EVERY + 1, 9))
    again = Accelerated(folder, bare=Cast(bias))
    again.train(range(SYNC_EVERY + 1, 9))
    moved = again.optimizer.optimizer.outer_loop.tensors.others.changed()
    return state_of(whole.bare), state_of(again.bare), moved, slowmo_hf.last_round(again.optimizer).bytes_sent


@pytest.mark.parametrize(("bias", "moved"), [(0.5, []), (0.1, ["bias"])])
def test_a_frozen_bias_that_is_cast_is_no_other_model(tmp_path, bias, moved):
    """What keeps its values is not sent. 0.1 is rounded: that travels with rounds, and is saved and taken up."""
    for whole, again, found, sent in run_workers(cast_and_resumed, 2, str(tmp_path / "saved"), bias):
        assert equal(whole, again)
        assert again["bias"].dtype == torch.bfloat16
        assert found == moved
        # Parameters and their squared norm, a status with one learning rate, and the bias in fp32.
        assert sent == 8 * (15 + 1) + 8 * (10 + 1) + bool(moved) * 4 * 3


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
