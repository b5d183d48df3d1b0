"""
Parameters that training moves and no optimizer holds: teachers and momentum encoders. They follow `model_buffers`, and
a frozen base is neither sent, copied nor saved.
"""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from transformers import Trainer, TrainingArguments

import slowmo_hf
from harness import run_workers
from slowmo_hf import SlowMoConfig, SlowMoOptimizer, run_in_process

RATE = 0.1


class WithTeacher(nn.Module):
    """
    A student, and a teacher that every training pass moves towards it.

    Args:
        way (`str`): How it is moved.
    """

    def __init__(self, way: str = "in place", dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way = way
        self.student = nn.Linear(4, 1).to(dtype)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def move(self) -> None:
        with torch.no_grad():
            for slow, fast in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                if self.way == "in place":
                    slow.lerp_(fast, RATE)
                elif self.way == "by .data":
                    slow.data.lerp_(fast.data, RATE)
                elif self.way == "other .data":
                    slow.data = slow.data + RATE * (fast.data - slow.data)
            if self.way == "load_state_dict":
                mixed = {
                    k: v + RATE * (self.student.state_dict()[k] - v) for k, v in self.teacher.state_dict().items()
                }
                self.teacher.load_state_dict(mixed)
            if self.way == "assign":
                mixed = {
                    k: v + RATE * (self.student.state_dict()[k] - v) for k, v in self.teacher.state_dict().items()
                }
                self.teacher.load_state_dict(mixed, assign=True)
                self.teacher.requires_grad_(False)

    def forward(self, x, labels):
        if self.training:
            self.move()
        out = self.student(x)
        return {"loss": (out - labels).square().mean() + (out - self.teacher(x).detach()).square().mean()}


WAYS = ("in place", "by .data", "other .data", "load_state_dict", "assign")


def batch(rank, step):
    draw = torch.Generator().manual_seed(1000 * rank + step)
    return {name: torch.randn(3, size, generator=draw).double() for name, size in (("x", 4), ("labels", 1))}


def teachers_of(model):
    return torch.cat([p.detach().flatten() for p in model.teacher.parameters()])


def students_of(model):
    return torch.cat([p.detach().flatten() for p in model.student.parameters()])


def by_hand(workers, steps, sync_every, *, averaged=True):
    """Plain PyTorch: local steps, then the mean of students, and of teachers too if they are `averaged`."""
    models = [WithTeacher() for _ in range(workers)]
    optimizers = [torch.optim.SGD(model.student.parameters(), lr=0.05) for model in models]
    for step in range(1, steps + 1):
        for rank, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            model(**batch(rank, step))["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
        if step % sync_every == 0:
            parts = ("student", "teacher") if averaged else ("student",)
            for part in parts:
                own = [list(getattr(model, part).parameters()) for model in models]
                for tensors in zip(*own, strict=True):
                    mean = torch.stack([t.detach() for t in tensors]).mean(0)
                    for t in tensors:
                        t.data.copy_(mean)
    return models


def train_loop(rank, way="in place", steps=5, **settings):
    model = WithTeacher(way)
    inner = torch.optim.SGD(model.student.parameters(), lr=0.05)
    optimizer = SlowMoOptimizer(inner, SlowMoConfig(**{"sync_every": 2, "outer_momentum": 0.0} | settings))
    for step in range(1, steps + 1):
        model(**batch(rank, step))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


@pytest.mark.parametrize("way", WAYS)
def test_a_teacher_is_averaged_at_rounds_however_it_is_moved(way):
    """Three workers, five steps, rounds after 2 and 4: teachers and students as in plain PyTorch."""
    expected = by_hand(3, 5, 2)

    def work(rank):
        model, optimizer = train_loop(rank, way)
        own = teachers_of(model), students_of(model)
        with slowmo_hf.consensus(optimizer):
            shown = teachers_of(model)
        return *own, shown, teachers_of(model)

    for rank, (teacher, student, shown, after) in enumerate(run_in_process(work, 3)):
        torch.testing.assert_close(teacher, teachers_of(expected[rank]), rtol=0, atol=1e-14)
        torch.testing.assert_close(student, students_of(expected[rank]), rtol=0, atol=1e-14)
        mean = torch.stack([teachers_of(model) for model in expected]).mean(0)
        torch.testing.assert_close(shown, mean, rtol=0, atol=1e-14)
        assert torch.equal(after, teacher), "a view leaves no trace"


def test_a_teacher_of_each_workers_own():
    """`model_buffers="local"`: no round touches it; a view shows the mean, as of BatchNorm's statistics."""
    expected = by_hand(3, 5, 2, averaged=False)

    def work(rank):
        model, optimizer = train_loop(rank, model_buffers="local")
        with slowmo_hf.consensus(optimizer):
            shown = teachers_of(model)
        return teachers_of(model), shown

    mean = torch.stack([teachers_of(model) for model in expected]).mean(0)
    for rank, (teacher, shown) in enumerate(run_in_process(work, 3)):
        torch.testing.assert_close(teacher, teachers_of(expected[rank]), rtol=0, atol=1e-14)
        torch.testing.assert_close(shown, mean, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    "settings", [{"base": "sgp"}, {"base": "osgp"}, {"overlap_steps": 1}, {"compression": "int8"}]
)
def test_teachers_agree_after_rounds_of_every_kind(settings):
    """At a round's step; with overlap they are averaged where it sets out, and move on one step."""

    def work(rank):
        model, optimizer = train_loop(rank, steps=4, **settings)
        slowmo_hf.finish(optimizer)
        return teachers_of(model), students_of(model)

    first, *others = run_in_process(work, 3)
    for other in others:
        assert torch.equal(other[0], first[0])
        torch.testing.assert_close(other[1], first[1], rtol=0, atol=1e-12)
    assert (first[0] - teachers_of(WithTeacher())).abs().max() > 1e-3, "it has moved"


def test_last_rounds_model_has_the_last_rounds_teacher():
    """`model.eval()` one step behind a round."""
    expected = by_hand(2, 4, 2)

    def work(rank):
        model, _ = train_loop(rank, steps=5)
        own = teachers_of(model)
        model.eval()
        shown = teachers_of(model)
        model.train()
        return own, shown, teachers_of(model)

    for own, shown, after in run_in_process(work, 2):
        torch.testing.assert_close(shown, teachers_of(expected[0]), rtol=0, atol=1e-14)
        assert torch.equal(own, after)


# ---- what stays ----


def frozen_base():
    """A large base that nothing moves, and an adapter."""

    def work(rank):
        torch.manual_seed(0)
        base, adapter = nn.Linear(512, 512).requires_grad_(False), nn.Linear(512, 2)
        model = nn.Sequential(base, adapter)
        version = base.weight._version
        optimizer = SlowMoOptimizer(torch.optim.SGD(adapter.parameters(), lr=0.1), SlowMoConfig(sync_every=2))
        draw = torch.Generator().manual_seed(rank)
        for _ in range(4):
            model(torch.randn(2, 512, generator=draw)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        report = slowmo_hf.last_round(optimizer)
        held = {id(t) for t in optimizer.outer_loop.tensors.others.averaged().values()}
        return report.bytes_sent, base.weight._version - version, len(held)

    return run_in_process(work, 2)


def test_a_base_that_does_not_move_is_neither_sent_nor_written():
    """A round of the adapter alone: 4 bytes for each of its elements, and no more than small headers beside."""
    adapter = 4 * (512 * 2 + 2)
    for bytes_sent, writes, held in frozen_base():
        assert adapter <= bytes_sent <= adapter + 500
        assert (writes, held) == (0, 0)


def test_what_another_optimizer_holds_is_not_moved_here():
    """One module of two networks, one optimizer of ours for each: rounds of the one leave the other alone."""

    def work(rank):
        torch.manual_seed(0)
        model = nn.ModuleDict({"a": nn.Linear(3, 1), "b": nn.Linear(3, 1)})
        every = {"a": 2, "b": 1000}
        optimizers = {
            name: SlowMoOptimizer(
                torch.optim.SGD(model[name].parameters(), lr=0.1), SlowMoConfig(sync_every=n, outer_momentum=0.0)
            )
            for name, n in every.items()
        }
        draw = torch.Generator().manual_seed(rank)
        plain = copy.deepcopy(model["b"])
        for _ in range(6):
            x = torch.randn(2, 3, generator=draw)
            for network in (model["b"], plain):
                network.zero_grad()
                network(x).square().mean().backward()
            with torch.no_grad():
                for p in plain.parameters():
                    p -= 0.1 * p.grad
            model["a"](x).square().mean().backward()
            for name in ("b", "a"):
                optimizers[name].step()
                optimizers[name].zero_grad()
        return [p.detach().clone() for p in model["b"].parameters()], [p.detach() for p in plain.parameters()]

    for own, plain in run_in_process(work, 2):
        for p, q in zip(own, plain, strict=True):
            torch.testing.assert_close(p, q)


def test_a_copy_outside_the_model_is_each_workers_own():
    """torch's AveragedModel beside the model: rounds never touch it, it is the mean of local weights."""

    def work(rank):
        torch.manual_seed(0)
        model = nn.Linear(3, 1).double()
        optimizer = SlowMoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), SlowMoConfig(sync_every=2))
        beside = torch.optim.swa_utils.AveragedModel(model)
        draw, seen = torch.Generator().manual_seed(rank), []
        for _ in range(5):
            model(torch.randn(2, 3, generator=draw).double()).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            beside.update_parameters(model)
            seen.append(model.weight.detach().clone())
        with slowmo_hf.consensus(optimizer):
            torch.testing.assert_close(beside.module.weight, torch.stack(seen).mean(0))
        return beside.module.weight.detach().clone()

    first, second = run_in_process(work, 2)
    assert not torch.equal(first, second)


def test_integers_that_move_are_told():
    def work(rank):
        model = nn.Linear(3, 1)
        model.codes = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
        optimizer = SlowMoOptimizer(torch.optim.SGD([model.weight, model.bias], lr=0.1), SlowMoConfig(sync_every=2))
        for _ in range(2):
            model(torch.ones(2, 3)).sum().backward()
            model.codes.data.add_(1 + rank)
            optimizer.step()

    with pytest.raises(RuntimeError, match=r"parameter 'codes' of dtype torch.uint8 has changed"):
        run_in_process(work, 2)


# ---- Trainer, DDP, resume ----


def trained(folder, **settings):
    rows = [
        {"x": one["x"][0].float(), "labels": one["labels"][0].float()} for one in map(partial(batch, 0), range(64))
    ]
    args = TrainingArguments(
        str(folder / f"of_rank_{dist.get_rank()}"),
        max_steps=10,
        per_device_train_batch_size=4,
        learning_rate=0.1,
        optim="sgd",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        use_cpu=True,
    )
    model = WithTeacher(dtype=torch.float32)
    callback = slowmo_hf.SlowMoCallback(SlowMoConfig(sync_every=4, **settings))
    Trainer(model, args, train_dataset=rows, callbacks=[callback]).train()
    return teachers_of(model), students_of(model)


@pytest.mark.parametrize("settings", [{}, {"model_buffers": "local"}, {"processes_per_worker": "2"}])
def test_the_end_under_trainer_is_one_model(tmp_path, settings):
    """Two steps behind a round: the end is the average, of student and teacher, whatever rounds do with it."""
    ranks = 4 if "processes_per_worker" in settings else 2
    first, *others = run_workers(partial(trained, **settings), ranks, tmp_path)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert (first[0] - teachers_of(WithTeacher(dtype=torch.float32))).abs().max() > 1e-3


def accelerated(folder, save_at, steps, resume=None):
    """Everything that a step changes, after every step, from where it goes on."""
    accelerator = Accelerator(cpu=True)
    model = WithTeacher()
    inner = torch.optim.SGD(model.student.parameters(), lr=0.05, momentum=0.9)
    net, optimizer = accelerator.prepare(model, SlowMoOptimizer(inner, SlowMoConfig(sync_every=4)))
    slowmo_hf.register_for_checkpointing(accelerator, optimizer)
    if resume:
        accelerator.load_state(str(resume))
    found = {}
    for step in range((save_at + 1) if resume else 1, steps + 1):
        accelerator.backward(net(**batch(dist.get_rank(), step))["loss"])
        optimizer.step()
        optimizer.zero_grad()
        if step == save_at and not resume:
            accelerator.save_state(str(folder / "saved"))
        found[step] = (teachers_of(model), students_of(model))
    slowmo_hf.finish(optimizer)
    return found, teachers_of(model)


def resumed(folder):
    whole, end = accelerated(folder, 6, 11)
    again, same_end = accelerated(folder, 6, 11, folder / "saved")
    return whole, end, again, same_end


@pytest.mark.slow
def test_teachers_go_on_bit_for_bit_in_the_middle_of_a_round(tmp_path):
    """Saved at step 6 of rounds of 4, where teachers differ."""
    ranks = run_workers(resumed, 2, tmp_path)
    for whole, end, again, same_end in ranks:
        assert sorted(again) == [7, 8, 9, 10, 11]
        for step, values in again.items():
            assert all(torch.equal(a, b) for a, b in zip(values, whole[step], strict=True)), step
        assert torch.equal(end, same_end)
    assert not torch.equal(ranks[0][0][6][0], ranks[1][0][6][0]), "inside a round they differ"
    assert torch.equal(ranks[0][1], ranks[1][1])
