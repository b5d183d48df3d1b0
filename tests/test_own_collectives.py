"""A program that meets all ranks at every step is told so, whatever call it uses; one that evaluates is not."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback

import slowmo_hf
from harness import patience, run_workers
from slowmo_hf import SlowMoCallback, SlowMoConfig, SlowMoOptimizer
from tiny import Heard, Regression, Rows, arguments

TOLD = "the program itself runs collectives over all ranks at each step of"


def loop(gathers, settings):
    """Twelve steps of a custom loop; `gathers(step, optimizer, output)` is called in each, behind the pass."""
    torch.manual_seed(dist.get_rank())
    model = torch.nn.Linear(3, 1)
    if settings.get("base") == "all_reduce" or "processes_per_worker" in settings:
        model = DistributedDataParallel(model)
    config = SlowMoConfig(**{"sync_every": 4, "timeout_seconds": patience(20), **settings})
    optimizer = SlowMoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), config)
    with Heard() as heard:
        for step in range(1, 13):
            output = model(torch.randn(5, 3))
            output = gathers(step, optimizer, output)
            mse_loss(output, torch.zeros_like(output)).backward()
            optimizer.step()
            optimizer.zero_grad()
        slowmo_hf.finish(optimizer)
    return heard.about(TOLD)


def gathered(own):
    """As of a contrastive loss: the other ranks' values beside this rank's own, which has gradients."""
    values = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(values, own.detach())
    values[dist.get_rank()] = own
    return values


def in_the_loss(step, optimizer, output):
    return torch.cat(gathered(output))


def behind_rounds(step, optimizer, output):
    if step % 4 == 1:  # the step behind a round: a metric at each
        dist.all_reduce(output.detach().clone())
    return output


def at_every_other_step(step, optimizer, output):
    if step % 2:
        dist.barrier()
    return output


def twice_on_end(step, optimizer, output):
    """Rare meetings that touch: a metric and a save."""
    if step % 4 in (2, 3):
        dist.barrier()
    return output


def in_a_view(step, optimizer, output):
    """An evaluation at each step, whose metric is over all ranks."""
    with slowmo_hf.consensus(optimizer):
        dist.all_reduce(output.detach().clone())
    return output


def nothing(step, optimizer, output):
    return output


def test_a_loss_that_gathers_is_told():
    (told,), others = run_workers(loop, 2, in_the_loss, {})
    assert told.startswith(f"{TOLD} 1 to 3, between rounds")
    assert "(step % 4 == 0)" in told
    assert others == []


@pytest.mark.parametrize(
    ("gathers", "settings"),
    [
        (nothing, {"processes_per_worker": 2}),
        (behind_rounds, {}),
        (at_every_other_step, {}),
        (twice_on_end, {}),
        (in_a_view, {}),
        (in_the_loss, {"sync_every": 1}),
        (in_the_loss, {"base": "all_reduce", "outer_momentum": 0.0}),
        (nothing, {"base": "sgp"}),
        (nothing, {"base": "osgp"}),
        (nothing, {"overlap_steps": 2}),
        (nothing, {"compression": "int8"}),
        (nothing, {"shard_slow_state": True}),
    ],
)
def test_what_waits_for_nobody_between_rounds_is_not_told(gathers, settings):
    processes = 2 * settings.get("processes_per_worker", 1)
    assert run_workers(loop, processes, gathers, settings) == [[]] * processes


class Contrastive(Trainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = model(**inputs)["loss"]
        return torch.stack(gathered(loss)).mean()


class Measures(TrainerCallback):
    """A metric of a callback's own over all ranks, behind every step."""

    def on_step_end(self, args, state, control, **kwargs):
        dist.barrier()


def train(folder, kind, settings):
    callbacks = [Measures(), SlowMoCallback(SlowMoConfig(sync_every=4, timeout_seconds=patience(20)))]
    args = arguments(folder, max_steps=8, **settings)
    trainer = kind(model=Regression(), args=args, train_dataset=Rows(64), eval_dataset=Rows(8), callbacks=callbacks)
    with Heard() as heard:
        trainer.train()
    return heard.about(TOLD)


def test_a_trainers_loss_that_gathers_is_told(tmp_path):
    (told,), others = run_workers(train, 2, str(tmp_path), Contrastive, {})
    assert told.startswith(f"{TOLD} 1 to 3, between rounds")
    assert others == []


def test_what_a_trainer_does_between_steps_is_not_told(tmp_path):
    """It logs and evaluates behind every step."""
    often = {"logging_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    assert run_workers(train, 2, str(tmp_path), Trainer, often) == [[], []]
