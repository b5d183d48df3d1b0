"""What callbacks do to the model before training, in any order: it trains from that, as a stock run does."""

from __future__ import annotations

import pytest
import torch
from transformers import Trainer, TrainerCallback

from harness import run_workers
from slowmo_hf import SlowMoCallback
from tiny import Regression, Rows, arguments, equal, values

SETTINGS = {"sync_every": 2, "outer_momentum": 0.5}


class Loads(TrainerCallback):
    """Other weights, as a program that starts from its own file has them."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.copy_(parameter + 3)


class Freezes(TrainerCallback):
    """The body, from the start."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        model.body.requires_grad_(False)


def trained(folder, callbacks, steps=6, **settings):
    settings = {
        "learning_rate": 0.05,
        "optim": "sgd",
        "save_strategy": "steps",
        "save_steps": 3,
        "lr_scheduler_type": "constant",
        **settings,
    }
    args = arguments(folder, max_steps=steps, **settings)
    trainer = Trainer(Regression(), args, train_dataset=Rows(128), callbacks=callbacks)
    trainer.train(resume_from_checkpoint=settings.get("resume_from_checkpoint"))
    return values(trainer.model)


@pytest.mark.parametrize("does", [Loads, Freezes])
def test_the_order_of_callbacks_makes_no_difference(does, tmp_path):
    """Behind or before ours; with a learning rate of nothing the weights are those that were loaded."""
    orders = {
        "behind": lambda: [SlowMoCallback(**SETTINGS), does()],
        "before": lambda: [does(), SlowMoCallback(**SETTINGS)],
    }
    ends = {name: trained(tmp_path / name, made()) for name, made in orders.items()}
    assert equal(ends["behind"], ends["before"])
    stays = trained(tmp_path / "stays", orders["behind"](), learning_rate=0.0)
    assert equal(stays, trained(tmp_path / "stock", [does()], learning_rate=0.0))
    if does is Freezes:
        assert torch.equal(ends["behind"]["body.weight"], Regression().body.weight)
        assert not torch.equal(ends["behind"]["head.weight"], Regression().head.weight)


def resumed(folder):
    """Six steps in one go, and three and three more, of workers that freeze a part behind ours."""

    def callbacks():
        return [SlowMoCallback(**SETTINGS), Freezes()]

    whole = trained(f"{folder}/whole", callbacks())
    trained(f"{folder}/parts", callbacks(), steps=3)
    return equal(whole, trained(f"{folder}/parts", callbacks(), resume_from_checkpoint=f"{folder}/parts/checkpoint-3"))


def test_a_run_that_freezes_goes_on(tmp_path):
    assert run_workers(resumed, 2, str(tmp_path)) == [True, True]
