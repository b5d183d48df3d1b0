"""What a program sets on the optimizer where a resumed Trainer run begins stays, as in a stock run."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainerCallback

from harness import patience, run_workers
from slowmo_hf import SlowMoCallback, SlowMoConfig
from slowmo_hf.adapters.trainer_saves import TrainerSaves
from slowmo_hf.training.model_tensors import ModelTensors
from slowmo_hf.training.written import LoadedSettings
from tiny import Heard, Regression, Rows, arguments, values

SET = [0.3, (0.5, 0.9), "kept"]


def set_options(optimizer):
    for group in optimizer.param_groups:  # with weight decay and without
        group.update(weight_decay=0.3, betas=(0.5, 0.9), of_my_own="kept")


def set_numpy(optimizer):
    for group in optimizer.param_groups:
        group.update(weight_decay=np.float64(0.3), betas=tuple(np.array([0.5, 0.9])))


def set_flag(optimizer):
    for group in optimizer.param_groups:
        group["maximize"] = True


def set_tensor(optimizer):
    for group in optimizer.param_groups:
        group["weight_decay"] = torch.tensor(0.3, dtype=torch.float64)


def forget(optimizer):
    optimizer.state.clear()


class Sets(TrainerCallback):
    """Acts on the optimizer where training begins, and notes the options of its first step."""

    def __init__(self, act=None):
        self.act, self.seen = act, None

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        if self.act is not None:
            self.act(optimizer)

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        if self.seen is None:
            options = ("lr", "weight_decay", "betas", "of_my_own")
            steps = {int(entry["step"]) for entry in optimizer.state.values()}
            self.seen = [[group.get(name) for name in options] for group in optimizer.param_groups], steps


class Loads(Trainer):
    """A Trainer of one's own, that acts behind the load."""

    act = None

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.act is not None:
            self.act(self.optimizer)


class LoadsNothing(Loads):
    """Begins with a new optimizer."""

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(None)


class LoadsItself(Loads):
    """Loads the optimizer's file in its own way, and acts."""

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is not None:
            self.optimizer.load_state_dict(torch.load(f"{checkpoint}/optimizer.pt"))
            self.lr_scheduler.load_state_dict(torch.load(f"{checkpoint}/scheduler.pt"))
        if self.act is not None:
            self.act(self.optimizer)


KINDS = {"trainer": Loads, "nothing": LoadsNothing, "itself": LoadsItself}


def resumed(folder, config, act, where):
    """Three steps, a save, and two more, before which the program acts."""
    saves = {"save_strategy": "steps", "save_steps": 3, "learning_rate": 0.05}

    def trainer_of(steps, act):
        sets = Sets(act if where == "callback" else None)
        trainer = KINDS.get(where, Loads)(
            model=Regression(),
            args=arguments(folder, max_steps=steps, **saves),
            train_dataset=Rows(128),
            callbacks=[sets, *([SlowMoCallback(config)] if config else [])],
        )
        trainer.act = act if where in ("trainer", "itself") else None
        return trainer, sets

    trainer_of(3, None)[0].train()
    trainer, sets = trainer_of(5, act)
    with Heard() as heard:
        trainer.train(resume_from_checkpoint=True)
    assert heard.about("is undone", "WARNING") == []
    return values(trainer.model), sets.seen


@pytest.mark.parametrize("where", ["callback", "trainer", "itself"])
@pytest.mark.parametrize("act", [set_options, forget, set_numpy, set_tensor, set_flag])
def test_what_a_program_sets_where_a_resumed_run_begins_stays(tmp_path, act, where):
    """One worker whose rounds change nothing: as stock, to float64's rounding."""
    config = SlowMoConfig(sync_every=2, outer_momentum=0)
    stock, of_stock = resumed(tmp_path / "stock", None, act, where)
    ours, of_ours = resumed(tmp_path / "ours", config, act, where)
    left_alone, _ = resumed(tmp_path / "alone", config, None, where)
    assert of_ours == of_stock
    torch.testing.assert_close(ours, stock, rtol=0, atol=1e-14)
    assert (ours["body.weight"] - left_alone["body.weight"]).abs().max() > 1e-5, "what is set tells"
    if act is forget:
        assert of_ours[1] == {1}
    elif act is set_options:
        assert [options[1:] for options in of_ours[0]] == [SET, SET]


def test_an_optimizer_that_a_subclass_does_not_load_begins_anew(tmp_path):
    config = SlowMoConfig(sync_every=2, outer_momentum=0)
    stock, of_stock = resumed(tmp_path / "stock", None, None, "nothing")
    ours, of_ours = resumed(tmp_path / "ours", config, None, "nothing")
    assert of_ours == of_stock
    assert of_ours[1] == {1}
    torch.testing.assert_close(ours, stock, rtol=0, atol=1e-14)


def test_a_scaler_goes_on_and_the_scheduler_that_it_held_back_keeps_what_is_set():
    """Of float16, which the CPU does not train: the parts of a resume, with a scheduler of torch's."""
    model, scaler = Regression(), SimpleNamespace(load_state_dict=lambda state: scaled.update(state))
    optimizer, scaled = torch.optim.SGD(model.parameters(), lr=0.1), {}
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.5, total_iters=10)
    scheduler.load_state_dict({**scheduler.state_dict(), "last_epoch": 3, "_step_count": 4})  # rank 0's
    loaded = LoadedSettings([optimizer], {"scheduler": scheduler})
    scheduler.total_iters = 20  # by the program
    saves = object.__new__(TrainerSaves)
    own = {"scaler": {"scale": 2.0}, "scheduler": {**scheduler.state_dict(), "last_epoch": 2, "total_iters": 10}}
    saves._checkpoints = SimpleNamespace(resume=lambda state, folder: own)
    saves._saves = SimpleNamespace(add=lambda folder: None)
    tensors = ModelTensors(optimizer, model)
    saves.outer_loop = SimpleNamespace(inner_state=SimpleNamespace(optimizer=optimizer), tensors=tensors)
    saves.resume(SimpleNamespace(accelerator=SimpleNamespace(scaler=scaler)), None, loaded)
    assert scaled == {"scale": 2.0}
    assert (scheduler.last_epoch, scheduler.total_iters) == (2, 20)


def check_workers(folder, where):
    config = SlowMoConfig(sync_every=4, timeout_seconds=patience(60))  # saved inside a round
    return resumed(folder, config, set_options, where)[1]


@pytest.mark.parametrize("where", ["callback", "trainer"])
def test_it_stays_on_every_worker_that_goes_on_from_its_own_state(tmp_path, where):
    for groups, steps in run_workers(check_workers, 2, str(tmp_path), where):
        assert [options[1:] for options in groups] == [SET, SET]
        assert steps == {4}, "Adam goes on"
