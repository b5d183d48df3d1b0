"""Loops in the shapes in which users write them under Accelerate, with the diff of quickstart_accelerate.md alone."""

from __future__ import annotations

import functools
import itertools
import os
import time
from pathlib import Path

import accelerate
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Sampler, TensorDataset

import slowmo_hf
from accelerate_loops import linear, on_all_ranks, settings, weights
from harness import run_workers
from slowmo_hf import SlowMoOptimizer
from tiny import Heard

# ---- several networks and optimizers ----


class Gan:
    """A maker and a judge, which is frozen while the maker learns; or two equal networks."""

    def __init__(self, config, *, equal=False):
        torch.manual_seed(0)
        self.accelerator = Accelerator(cpu=True)
        maker = nn.Linear(3, 3, dtype=torch.float64)
        judge = nn.Linear(3, 3 if equal else 1, dtype=torch.float64)
        make = functools.partial(torch.optim.Adam, lr=0.03, betas=(0.5, 0.9))
        prepared = self.accelerator.prepare(
            maker,
            judge,
            SlowMoOptimizer(make(maker.parameters()), config),
            SlowMoOptimizer(make(judge.parameters()), config),
        )
        self.maker, self.judge, self.maker_optimizer, self.judge_optimizer = prepared

    def train(self, steps):
        for step in steps:
            torch.manual_seed(1000 * step + dist.get_rank())
            noise, real = torch.randn(2, 6, 3, dtype=torch.float64)
            self.judge.requires_grad_(False)
            self.accelerator.backward(-self.judge(self.maker(noise)).mean() + self.maker(noise).square().mean())
            self.maker_optimizer.step()
            self.maker_optimizer.zero_grad()
            self.judge.requires_grad_(True)
            judged = self.judge(self.maker(noise).detach()) - self.judge(real)
            self.accelerator.backward(judged.mean() + self.judge(real).square().mean())
            self.judge_optimizer.step()
            self.judge_optimizer.zero_grad()

    def weights(self):
        return torch.cat([weights(self.maker), weights(self.judge)])


def train_in_turn(folder, equal, frozen_at_the_save):
    config = settings()
    whole = Gan(config, equal=equal)
    whole.train(range(11))
    gan = Gan(config, equal=equal)
    gan.train(range(6))
    gan.judge.requires_grad_(not frozen_at_the_save)
    gan.accelerator.save_state(f"{folder}/saved")
    gan.judge.requires_grad_(True)
    gan.train(range(6, 11))
    assert torch.equal(gan.weights(), whole.weights())
    again = Gan(config, equal=equal)
    again.accelerator.load_state(f"{folder}/saved")
    again.train(range(6, 11))
    assert torch.equal(again.weights(), whole.weights())
    own = on_all_ranks(whole.weights())
    for optimizer in (gan.maker_optimizer, gan.judge_optimizer):
        slowmo_hf.finish(optimizer)
    torch.testing.assert_close(gan.weights(), sum(own) / len(own), rtol=0, atol=1e-12)
    return not torch.equal(*own)


@pytest.mark.parametrize("frozen_at_the_save", [False, True], ids=["free", "frozen"])
@pytest.mark.parametrize("equal", [False, True], ids=["gan", "equal networks"])
def test_networks_in_turn_are_saved_and_gone_on_with(tmp_path, equal, frozen_at_the_save):
    """Each optimizer's state is in a folder of its own; the run goes on bit for bit, and ends on both averages."""
    assert run_workers(train_in_turn, 2, str(tmp_path), equal, frozen_at_the_save) == [True, True]
    assert (tmp_path / "saved/slowmo/shared.json").exists()
    assert (tmp_path / "saved/slowmo/optimizer_1/worker_1.json").exists()
    slowmo_hf.verify_checkpoint(tmp_path / "saved")


# ---- other shapes of loops ----


def make(config, networks=1):
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    models = [nn.Linear(4, 4, dtype=torch.float64) for _ in range(networks)]
    inner = torch.optim.SGD([p for model in models for p in model.parameters()], lr=0.1)
    *models, optimizer = accelerator.prepare(*models, SlowMoOptimizer(inner, config))
    return accelerator, models, optimizer


def micro_batch(accelerator, models, optimizer, number, clip=None):
    torch.manual_seed(1000 * number + accelerator.process_index)
    out = torch.randn(6, 4, dtype=torch.float64)
    with accelerator.accumulate(*models):
        for model in models:
            out = model(out)
        accelerator.backward(out.square().mean())
        if clip and accelerator.sync_gradients:
            accelerator.clip_grad_norm_(models[0].parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()


def shown_in_evaluation(models):
    for model in models:
        model.eval()
    shown = torch.cat([weights(model) for model in models])
    assert torch.equal(*on_all_ranks(shown)), "ranks evaluate different models"
    for model in models:
        model.train()
    return shown


def accumulate():
    """Micro-batches are no steps: the round comes after eight of them."""
    accelerator, models, optimizer = make(settings())
    for number in range(12):
        micro_batch(accelerator, models, optimizer, number, clip=0.5)
        if number == 7:
            at_the_round = weights(models[0]).clone()
    return torch.equal(shown_in_evaluation(models), at_the_round) and slowmo_hf.last_round(optimizer).round == 1


def two_models_of_one_optimizer():
    """Either one in eval mode shows both."""
    accelerator, models, optimizer = make(settings(), networks=2)
    for number in range(12):
        micro_batch(accelerator, models, optimizer, number)
    local = torch.cat([weights(model) for model in models])
    shown = shown_in_evaluation(models)
    return torch.equal(local, torch.cat([weights(model) for model in models])) and not torch.equal(shown, local)


def stop_early_with_the_best():
    """Metrics of one model lead all ranks to one decision; the best weights, loaded again, are what is tested."""
    accelerator, models, optimizer = make(settings())
    best, best_loss, steps = None, float("inf"), 0
    for number in range(80):
        micro_batch(accelerator, models, optimizer, number)
        if number % 10 == 9:
            shown_in_evaluation(models)
            models[0].eval()
            with torch.no_grad():
                loss = (models[0](torch.eye(4, dtype=torch.float64)) - 0.3).square().mean().item()
            if loss < best_loss:
                best, best_loss = {k: v.clone() for k, v in models[0].state_dict().items()}, loss
            else:
                accelerator.set_trigger()
            models[0].train()
            if accelerator.check_trigger():
                break
        steps += 1
    models[0].load_state_dict(best)
    models[0].eval()
    tested = models[0].state_dict()
    return steps < 80 and all(torch.equal(tested[name], best[name]) for name in best)


def cross_validate():
    """A model, an optimizer and a run per fold, each finished on its own average, as it is alone."""
    ends = []
    for fold in (0, 1, 0):
        accelerator, models, optimizer = make(settings())
        for number in range(14 + 2 * fold):
            micro_batch(accelerator, models, optimizer, 100 * fold + number)
        local = on_all_ranks(weights(models[0]))
        slowmo_hf.finish(optimizer)
        end = shown_in_evaluation(models)
        torch.testing.assert_close(end, sum(local) / 2, rtol=0, atol=1e-12)
        ends.append(end)
    return torch.equal(ends[0], ends[2]) and not torch.equal(ends[0], ends[1])


def main_process_generates():
    """Rank 0 alone evaluates for a while, all wait for it, and training goes on as if it had not."""
    ends = []
    for evaluates in (True, False):
        accelerator, models, optimizer = make(settings())
        for number in range(24):
            micro_batch(accelerator, models, optimizer, number)
            if number % 6 == 5 and evaluates:
                if accelerator.is_main_process:
                    models[0].eval()
                    with torch.inference_mode():
                        accelerator.unwrap_model(models[0])(torch.randn(2, 4, dtype=torch.float64))
                    models[0].train()
                accelerator.wait_for_everyone()
        ends.append(weights(models[0]))
    return torch.equal(*ends)


@pytest.mark.parametrize(
    "loop",
    [accumulate, two_models_of_one_optimizer, stop_early_with_the_best, cross_validate, main_process_generates],
    ids=lambda loop: loop.__name__,
)
def test_a_loop_of_this_shape(loop):
    assert run_workers(loop, 2) == [True, True]


def jobs_in_a_row():
    """As in a notebook, or in a search over settings: each job has a default group of its own."""
    store, ends = slowmo_hf.upstream.default_store(), []
    for number in range(25):
        time.sleep(0.1 if dist.get_rank() == number % 2 else 0)
        dist.destroy_process_group()
        AcceleratorState._reset_state(True)
        rank = int(os.environ["RANK"])
        dist.init_process_group("gloo", store=dist.PrefixStore(str(number), store), rank=rank, world_size=2)
        accelerator, models, optimizer = make(settings())
        for batch in range(4):
            micro_batch(accelerator, models, optimizer, batch)
        slowmo_hf.finish(optimizer)
        ends.append(weights(models[0]).clone())
        del accelerator, models, optimizer
    return torch.stack(ends)


@pytest.mark.slow
def test_a_job_after_another_in_one_process():
    first, second = run_workers(jobs_in_a_row, 2)
    assert torch.equal(first, second)
    assert torch.equal(first, first[:1].expand_as(first))


# ---- the page's loop ----


def lines_of(page, number):
    """A diff of the page as a program: its new lines and the ones that stay."""
    diff = (Path(__file__).parents[1] / page).read_text().split("```diff\n")[number].split("```")[0].splitlines()
    return "\n".join(line[2:] for line in diff if not line.startswith("-"))


def run_the_page(folder, resume):
    accelerate.utils.set_seed(1)
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True))
    rows = torch.randn(128, 4, dtype=torch.float64)
    loader = DataLoader(TensorDataset(rows, rows.sum(1, keepdim=True)), batch_size=4, shuffle=True)
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.2), nn.Linear(4, 1)).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    seen = []
    names = {
        **{"accelerator": accelerator, "model": model, "optimizer": optimizer, "loader": loader},
        **{
            "folder": folder,
            "checkpoint": f"{folder}/0",
            "resume": resume,
            "first_epoch": 1 if resume else 0,
            "epochs": 1 if resume == "" else 2,
        },
        **{"skip": 0, "loss_of": nn.functional.mse_loss, "evaluate": lambda model: seen.append(weights(model))},
    }
    exec(lines_of("docs/quickstart_accelerate.md", 1), names)
    return [*seen, weights(names["model"])]


def train_the_pages_loop(folder):
    whole = run_the_page(f"{folder}/whole", False)
    half = run_the_page(f"{folder}/half", "")
    rest = run_the_page(f"{folder}/half", True)
    return whole, half, rest


def test_the_pages_loop_trains_evaluates_saves_and_goes_on(tmp_path):
    """16 steps an epoch, 12 a round: one model is evaluated, the average saved; epoch 2, resumed, is the same."""
    (whole, half, rest), (other, _, other_rest) = run_workers(train_the_pages_loop, 2, str(tmp_path))
    for mine, others in zip(whole, other, strict=True):
        assert torch.equal(mine, others)
    assert torch.equal(half[0], whole[0])
    for mine, others in ((rest, whole), (other_rest, other)):
        assert all(torch.equal(a, b) for a, b in zip(mine, others[1:], strict=True))
    saved = load_file(tmp_path / "whole/model.safetensors")
    assert torch.equal(torch.cat([saved[name].flatten() for name in saved]).sort().values, whole[-1].sort().values)


def run_the_readme():
    """The lines of README's second diff, with a loop where it has dots."""
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(1)
    rows = torch.randn(80, 4, dtype=torch.float64)
    names = {
        "accelerator": accelerator,
        "loader": DataLoader(TensorDataset(rows, rows.sum(1, keepdim=True)), batch_size=4),
        "model": nn.Linear(4, 1).double(),
    }
    names["optimizer"] = torch.optim.AdamW(names["model"].parameters(), lr=0.05)
    before, dots, after = lines_of("README.md", 2).partition("...")
    assert dots
    exec(before, names)
    for inputs, labels in names["loader"]:
        accelerator.backward(nn.functional.mse_loss(names["model"](inputs), labels))
        names["optimizer"].step()
        names["optimizer"].zero_grad()
    own = weights(names["model"])
    exec(after.partition("\n")[2], names)
    return own, weights(names["model"])


def test_the_readmes_loop_ends_on_the_average(tmp_path, monkeypatch):
    """10 steps on each worker, and no round yet: the mean of both is what they end on, and what is saved."""
    monkeypatch.chdir(tmp_path)
    (own, final), (other, others_final) = run_workers(run_the_readme, 2)
    assert torch.equal(final, others_final)
    assert not torch.equal(own, other)
    assert torch.allclose(final, (own + other) / 2, rtol=0, atol=1e-7)  # averages are in fp32
    saved = load_file(tmp_path / "trained/model.safetensors")
    assert torch.equal(torch.cat([saved[name].flatten() for name in saved]).sort().values, final.sort().values)


def gather_the_loss():
    """As examples do for their logs, at every step; rank 1 is slower."""
    accelerator, models, optimizer = make(settings())
    with Heard() as heard:
        for number in range(24):
            if accelerator.process_index == 1:
                time.sleep(0.02)
            micro_batch(accelerator, models, optimizer, number)
            accelerator.gather(torch.ones(1))
    told = heard.about("accelerator.gather over all ranks at steps")
    return told, optimizer.optimizer.outer_loop.account.spent.utilisation


def test_a_gather_at_every_step_is_told_and_no_computation():
    (told, utilisation), (nothing, _) = run_workers(gather_the_loss, 2)
    assert len(told) == 1
    assert "at steps 0 and 1" in told[0] or "at steps 1 and 2" in told[0]
    assert not nothing
    assert utilisation < 0.5


def gather_in_evaluations():
    accelerator, models, optimizer = make(settings())
    with Heard() as heard:
        for number in range(24):
            micro_batch(accelerator, models, optimizer, number)
            if number % 3 == 2:
                models[0].eval()
                accelerator.gather_for_metrics(torch.ones(1))
                models[0].train()
    return heard.about("over all ranks")


def test_an_evaluation_may_gather():
    assert run_workers(gather_in_evaluations, 2) == [[], []]


# ---- data without a length ----


class Stream(IterableDataset):
    """Ninety-six rows, whose number nobody is told."""

    def __iter__(self):
        generator = torch.Generator().manual_seed(1)
        yield from torch.randn(96, 4, generator=generator)


class Forever(Sampler):
    """Rows of a data set with a length, in an order without one."""

    def __iter__(self):
        yield from itertools.cycle(range(24))


def on_streams(kind):
    """By a stream or an endless sampler: weights of a stock run, and with SlowMoOptimizer inside its first round."""
    trained = []
    for ours in (False, True):
        accelerator, model, optimizer = linear(ours=ours, sync_every=50)
        rows = torch.randn(24, 4, generator=torch.Generator().manual_seed(2))
        loader = DataLoader(Stream(), batch_size=8) if kind == "stream" else DataLoader(rows, 8, sampler=Forever())
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        seen = 0
        for batch in itertools.islice(loader, 6):
            alone = model if ours else getattr(model, "module", model)  # without the average of gradients
            accelerator.backward(alone(batch).square().mean())
            optimizer.step()
            optimizer.zero_grad()
            seen += len(batch)
        trained.append((seen, weights(model)))
    return trained


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("kind", ["stream", "sampler"])
def test_data_without_a_length_are_trained_on(kind, processes):
    """Its batch sampler is neither true nor false. Inside the first round a worker is a stock run on its own share."""
    for (stock_rows, stock), (rows, ours) in run_workers(on_streams, processes, kind):
        assert rows == stock_rows > 0
        torch.testing.assert_close(ours, stock, rtol=0, atol=0)


# ---- two optimizers of one encoder ----


def evaluated_between(order):
    """The encoder is in both; what `model.eval()` shows of it, and each optimizer's last round."""
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("encoder", "first", "second")}).double()
    heads = {
        name: SlowMoOptimizer(
            torch.optim.SGD([*model["encoder"].parameters(), *model[name].parameters()], lr=0.1),
            settings(sync_every={"first": 2, "second": 3}[name], outer_momentum=0.0),
        )
        for name in order
    }

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = model

        def forward(self, x, name):
            return self.parts[name](torch.tanh(self.parts["encoder"](x))).square().mean()

    model_of_both, *prepared = accelerator.prepare(Both(), *(heads[name] for name in order))
    by_name = dict(zip(order, prepared, strict=True))
    for step in range(7):
        for name in order:
            torch.manual_seed(100 * step + accelerator.process_index)
            accelerator.backward(model_of_both(torch.randn(8, 4).double(), name))
            by_name[name].step()
            for one in prepared:
                one.zero_grad()
    last = {name: heads[name].outer_loop.parts.slow.anchors[0].flat[:16].clone() for name in order}
    model_of_both.eval()
    return model["encoder"].weight.detach().flatten().clone(), last[order[0]], last[order[1]]


@pytest.mark.parametrize("order", [("first", "second"), ("second", "first")])
def test_of_two_optimizers_that_share_an_encoder_the_later_ones_round_is_shown(order):
    """On all ranks, whatever the addresses of objects."""
    (shown, first, last), (theirs, _, _) = run_workers(evaluated_between, 2, order)
    assert torch.equal(shown, theirs)
    assert torch.equal(shown, last)
    assert not torch.equal(shown, first)
