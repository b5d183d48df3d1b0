"""What tests of workers of two processes share."""

import torch.distributed as dist

from slowmo_hf import SlowMoConfig
from tiny import (
    Recorder,
    Regression,
    values,
)

STEPS, ACCUMULATION, BATCH, LOOK = 10, 2, 3, 7
LR = 0.05


def pairs(**settings):
    return SlowMoConfig(processes_per_worker=2, **settings)


class Gradients(Recorder):
    """The parameters before each inner step, and the gradient that it takes."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.before, self.gradients = [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.before.append(values(model))
        self.gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})


def mean_gradient(weights, batches):
    model = Regression(batches[0][0].dtype)
    model.load_state_dict(weights)
    for x, y in batches:
        (model(x, y)["loss"] / len(batches)).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def backward(accelerator, model, rows, step):
    start = (step * dist.get_world_size() + dist.get_rank()) * BATCH
    accelerator.backward(model(rows.x[start : start + BATCH], rows.y[start : start + BATCH])["loss"])
