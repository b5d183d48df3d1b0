"""How far rounds step beside the learning rate: the table says the factor, and too far is a warning."""

from __future__ import annotations

import pytest
import torch

from slowmo_hf import SlowMoConfig, SlowMoOptimizer, run_in_process
from slowmo_hf.training.start_table import _effective_step
from tiny import Heard


@pytest.mark.parametrize(
    ("settings", "policy", "said"),
    [
        ({}, "maintain", 2),
        ({}, "average", 2),
        ({}, "reset", 1),
        ({"outer_momentum": 0.0}, "maintain", 1),
        ({"outer_momentum": 0.7, "outer_lr": 0.3}, "maintain", 1),
        ({"outer_momentum": 0.3, "outer_lr": 0.3}, "maintain", 3 / 7),
        ({"outer_optimizer": "torch.optim.SGD", "outer_lr": 0.7}, "maintain", 1),
    ],
)
def test_the_effective_step(settings, policy, said):
    assert _effective_step(SlowMoConfig(**settings), policy) == pytest.approx(said, abs=1e-12)


@pytest.mark.parametrize(
    ("workers", "settings", "warned"),
    [
        (1, {}, ""),
        (2, {}, "with 2 workers: the inner optimizer's state is kept, so rounds step 2 times as far"),
        (7, {"base": "sgp"}, "with 7 workers"),
        (8, {}, ""),
        (8, {"outer_momentum": 0.7}, "so rounds step 3.33 times as far as the learning rate says. With Adam and as"),
        (2, {"outer_momentum": 0.2}, "as many workers set outer_momentum to 0 at most (docs/from_ddp.md)"),
        (4, {"outer_momentum": 0.2}, ""),
        (4, {"outer_momentum": 0.4}, "as many workers set outer_momentum to 0.2 at most (docs/from_ddp.md)"),
        (2, {"outer_momentum": 0.0, "outer_lr": 1.2}, "outer_momentum=0 with 2 workers"),
        (2, {"outer_momentum": 0.0, "outer_lr": 1.2}, "as many workers set outer_lr to 1 at most (docs/from_ddp.md)"),
        (2, {"outer_momentum": 0.0, "outer_lr": 1.0}, ""),
        (4, {"outer_momentum": 0.1, "outer_lr": 1.5}, "as many workers set outer_lr to 1.12"),  # 0.9 / 0.8
        (2, {"inner_state": "reset"}, ""),
        (2, {"outer_momentum": 0.7, "outer_lr": 0.3}, ""),  # 0.3 / 0.3, but for rounding
    ],
)
def test_workers_whose_rounds_step_far_are_warned(workers, settings, warned):
    """The table says the factor, with 8 workers too."""

    def work(rank):
        weight = torch.nn.Parameter(torch.ones(1))
        weight.grad = torch.ones(1)
        SlowMoOptimizer(torch.optim.AdamW([weight], lr=0.1), SlowMoConfig(**settings)).step()

    with Heard() as heard:
        run_in_process(work, workers)
    found = heard.about("the inner optimizer's state is kept", "WARNING")
    assert len(found) == bool(warned)
    assert all(warned in line for line in found)
    far = settings.get("inner_state") != "reset" and settings.get("outer_lr", 2) > 1
    assert bool(heard.about("  effective step: ", "INFO")) == far


@pytest.mark.parametrize(("momentum", "warned"), [(0.9, False), (0.0, True)])
def test_of_sgd_it_is_the_momentum_that_matters(momentum, warned):
    """Four workers that keep it did better with 0.5 than with 0 (benchmarks/records/peers_same_seconds.json)."""

    def work(rank):
        weight = torch.nn.Parameter(torch.ones(1))
        weight.grad = torch.ones(1)
        inner = torch.optim.SGD([weight], lr=0.1, momentum=momentum)
        SlowMoOptimizer(inner, SlowMoConfig(inner_state="maintain")).step()

    with Heard() as heard:
        run_in_process(work, 4)
    assert bool(heard.about("outer_momentum=", "WARNING")) == warned
