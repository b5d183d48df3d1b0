"""A program that catches what `trainer.train()` raises inside a round, and saves or trains on, is told what it has."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from transformers import Trainer, TrainerCallback

from harness import patience, run_workers
from slowmo_hf import SlowMoCallback, SlowMoConfig
from tiny import Heard, Regression, Rows, arguments


class Interrupt(TrainerCallback):
    """Ctrl-C, on all ranks at one step's end."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def interrupted(folder, step):
    ours = SlowMoCallback(SlowMoConfig(sync_every=3, timeout_seconds=patience(20)))
    args = arguments(folder, max_steps=9, save_strategy="no")
    trainer = Trainer(Regression(torch.float32), args, train_dataset=Rows(64, torch.float32), callbacks=[ours])
    trainer.add_callback(Interrupt(step))
    with Heard() as heard, pytest.raises(KeyboardInterrupt):
        trainer.train()
    weight = torch.nn.utils.parameters_to_vector(trainer.model.parameters()).detach()
    others = [torch.empty_like(weight) for _ in range(2)]
    dist.all_gather(others, weight)
    return torch.equal(*others), heard.about("training stopped at step", "WARNING")


@pytest.mark.parametrize("step", [5, 6])
def test_a_run_that_is_interrupted_inside_a_round_says_whose_weights_are_left(tmp_path, step):
    (are_equal, told), (_, of_another) = run_workers(interrupted, 2, tmp_path, step)
    assert are_equal == (step == 6)
    assert len(told) == (step == 5), "rank 0 speaks"
    assert all(line.startswith("training stopped at step 5, 2 steps after the last round:") for line in told)
    assert not of_another
