"""Layers that write their weights where the mode changes, as loralib's: merged in `eval()`, unmerged in `train()`."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers import Trainer, TrainerCallback

import slowmo_hf
from harness import IS_TRANSFORMERS_4, run_workers
from slowmo_hf import SlowMoCallback, SlowMoConfig, SlowMoOptimizer
from tiny import Rows, arguments

TAU = 4
STEPS = 11  # the last two follow the last round


class Merging(nn.Module):
    """A frozen weight with a product of two small ones, which `eval()` adds to it and `train()` takes away."""

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(3)
        self.weight = nn.Parameter(torch.randn(5, 4, dtype=dtype), requires_grad=False)
        self.down = nn.Parameter(torch.randn(2, 4, dtype=dtype))
        self.up = nn.Parameter(torch.zeros(5, 2, dtype=dtype))
        self.is_merged = False

    def train(self, mode=True):
        super().train(mode)
        if mode == self.is_merged:
            self.weight.data += (-1 if mode else 1) * (self.up @ self.down).detach()
            self.is_merged = not mode
        return self

    def forward(self, x):
        weight = self.weight if self.is_merged else self.weight + self.up @ self.down
        return x @ weight.T


class Model(nn.Module):
    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.body, self.head = Merging(dtype), nn.Linear(5, 1, dtype=dtype).requires_grad_(False)
        self.free = nn.Dropout(0.0)  # stays in the mode that a program gives it

    def forward(self, x, labels=None):
        return {"loss": (self.head(self.free(torch.tanh(self.body(x)))) - labels).square().mean()}


def mean_of_ranks(value):
    value = value.detach().clone()
    dist.all_reduce(value)
    return value / dist.get_world_size()


def average_loss(model, rows):
    """The loss of the average, from each rank's own adapters in training mode."""
    model = copy.deepcopy(model).requires_grad_(False)
    up, down = mean_of_ranks(model.body.up), mean_of_ranks(model.body.down)
    return float((model.head(torch.tanh(rows.x @ (model.body.weight + up @ down).T)) - rows.y).square().mean())


def by_hand(way):
    model, rows = Model(), Rows(128)
    base, found = model.body.weight.detach().clone(), []
    optimizer = SlowMoOptimizer(
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1),
        SlowMoConfig(sync_every=TAU, outer_momentum=0),
    )
    of_round = None
    for step in range(STEPS):
        at = 8 * step + 4 * dist.get_rank()
        model(rows.x[at : at + 4], rows.y[at : at + 4])["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % TAU == 0:
            of_round = average_loss(model, rows)
        if step % 3 != 2:
            continue
        before = [p.detach().clone() for p in model.parameters()]
        expected = average_loss(model, rows) if "consensus" in way else of_round
        with torch.no_grad():
            if way == "consensus":
                with slowmo_hf.consensus(optimizer):
                    model.eval()
                    model.free.train()
                    found.append((float(model(rows.x, rows.y)["loss"]), expected))
            else:
                model.eval()
                model.free.train()
                if way == "eval, then consensus":
                    with slowmo_hf.consensus(optimizer):
                        found.append((float(model(rows.x, rows.y)["loss"]), expected))
                elif of_round is not None:
                    found.append((float(model(rows.x, rows.y)["loss"]), expected))
        assert model.free.training
        assert not model.body.training
        model.train()
        for was, now in zip(before, model.parameters(), strict=True):
            torch.testing.assert_close(now, was, rtol=0, atol=1e-12)
    slowmo_hf.finish(optimizer)
    body = model.body.requires_grad_(False)
    return found, float((body.weight - base).abs().max()), float((body.up @ body.down).abs().max())


@pytest.mark.parametrize("way", ["consensus", "eval", "eval, then consensus"])
def test_what_is_merged_is_what_is_shown(way):
    """In a view of the average and in `model.eval()`; and what is taken away is what was added."""
    first, second = run_workers(by_hand, 2, way)
    for found, moved, adapters in (first, second):
        assert len(found) >= 2
        for loss, expected in found:
            assert loss == pytest.approx(expected, abs=1e-12)
        assert moved < 1e-12
        assert adapters > 0.01
    assert [loss for loss, _ in first[0]] == pytest.approx([loss for loss, _ in second[0]], abs=1e-12)


class Means(TrainerCallback):
    """The loss of the average of local weights at each evaluation, before it is shown."""

    def __init__(self):
        self.found = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if control.should_evaluate:
            self.found.append(average_loss(model, Rows(16, seed=1)))


def by_trainer(folder):
    model, means = Model(), Means()
    base = model.body.weight.detach().clone()
    args = arguments(folder, max_steps=STEPS, learning_rate=0.1, optim="sgd", eval_strategy="steps")
    args.eval_steps, args.label_names, args.prediction_loss_only = 3, ["labels"], True
    config = SlowMoConfig(sync_every=TAU, outer_momentum=0)
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=Rows(128),
        eval_dataset=Rows(16, seed=1),
        callbacks=[means, SlowMoCallback(config)],
    )
    trainer.train()
    model.train()
    shown = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    return shown, means.found, float((model.body.weight - base).abs().max())


def test_trainers_evaluations_leave_the_base_as_it_was(tmp_path):
    for shown, expected, moved in run_workers(by_trainer, 2, str(tmp_path)):
        assert len(shown) == len(expected) == (3 if IS_TRANSFORMERS_4 else 4), "5 evaluates at the end too"
        assert shown == pytest.approx(expected, abs=1e-6)
        assert moved < 1e-12


def with_a_trained_base(folder, way):
    """A merged weight that is trained too, in single precision: how far an evaluation moves it on this rank."""
    model, moved = Model(torch.float32), []
    model.body.weight.requires_grad_(True)
    rows = Rows(128, torch.float32)
    if way == "Trainer":

        class Compare(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                self.before = model.body.weight.detach().clone()

            def on_step_begin(self, args, state, control, **kwargs):
                if state.global_step == 3:
                    model.train()
                    moved.append(float((model.body.weight.detach() - self.before).abs().max()))

        args = arguments(folder, max_steps=4, learning_rate=0.1, optim="sgd", eval_strategy="steps")
        args.eval_steps, args.label_names, args.prediction_loss_only = 3, ["labels"], True
        config = SlowMoConfig(sync_every=2, outer_momentum=0)
        Trainer(
            model=model,
            args=args,
            train_dataset=rows,
            eval_dataset=Rows(16, torch.float32, seed=1),
            callbacks=[SlowMoCallback(config), Compare()],
        ).train()
        return moved
    optimizer = SlowMoOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), SlowMoConfig(sync_every=TAU, outer_momentum=0)
    )
    for step in range(TAU + 2):
        at = 8 * step + 4 * dist.get_rank()
        model(rows.x[at : at + 4], rows.y[at : at + 4])["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    before = model.body.weight.detach().clone()
    model.eval()
    model.train()
    return [float((model.body.weight.detach() - before).abs().max())]


@pytest.mark.parametrize("way", ["eval", "Trainer"])
def test_a_merged_weight_that_is_trained_keeps_the_workers_own_steps(tmp_path, way):
    """What the merge writes into it is no write of the program's."""
    for moved in run_workers(with_a_trained_base, 2, str(tmp_path), way):
        assert len(moved) == 1
        assert moved[0] < 1e-5


class Outer(nn.Module):
    """Weights and a `train` of its own around a layer that merges."""

    def __init__(self):
        super().__init__()
        self.scale, self.inner = nn.Parameter(torch.ones(1, dtype=torch.float64)), Merging(torch.float64)

    def train(self, mode=True):
        return super().train(mode)

    def forward(self, x):
        return self.scale * self.inner(x)


def test_a_layer_in_another_mode_than_its_parent_is_as_it_was():
    """`model.eval(); model.inner.train()`: the adapters of the inner one are trained."""

    def work(rank):
        model = Outer()
        nn.init.ones_(model.inner.up)
        weight = model.inner.weight.detach().clone()
        optimizer = SlowMoOptimizer(torch.optim.SGD(model.parameters(), lr=0.01), SlowMoConfig(sync_every=4))
        for _ in range(2):
            model(torch.ones(1, 4, dtype=torch.float64) + rank).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
        model.inner.train()
        with slowmo_hf.consensus(optimizer):
            pass
        torch.testing.assert_close(model.inner.weight.detach(), weight, rtol=0, atol=1e-12)
        return model.training, model.inner.training, model.inner.is_merged

    assert slowmo_hf.run_in_process(work, 2) == [(False, True, False)] * 2
