"""
Sharded models (FSDP2) on a CUDA device, in a world of one over NCCL: the same as the plain model with the same
optimizer on the same data. What can run on the CPU, over gloo, runs there too.
"""

from __future__ import annotations

import os
import warnings

import pytest
import torch
from torch import nn

import fsdp
from devices import CUDA, join_alone, take
from harness import patience, rank_environment, run_workers
from slowmo_hf import SlowMoConfig, SlowMoOptimizer, consensus
from slowmo_hf.dtensors import local

TAU, STEPS, ROWS = 3, 8, 4
MIXED = "cpu:gloo,cuda:nccl"
NESTEROV = {"outer_optimizer": "torch.optim.SGD", "outer_optimizer_kwargs": '{"momentum": 0.9, "nesterov": true}'}
CASES = {
    "slow momentum": {},
    "Nesterov": {"outer_lr": 0.5, **NESTEROV},
    "overlapped": {"overlap_steps": 2},
    "sharded slow state": {"shard_slow_state": True},
    "sharded slow state, overlapped": {"shard_slow_state": True, "overlap_steps": 2},
    "slow state on the cpu": {"shard_slow_state": True, "slow_state_device": "cpu"},
    "stash on the cpu": {"stash_device": "cpu"},
}
over_each_backend = pytest.mark.parametrize(
    ("device", "backend"),
    [
        pytest.param("cpu", "gloo", marks=fsdp.NEEDED),
        pytest.param("cuda", "nccl", marks=pytest.mark.cuda),
        pytest.param("cuda", MIXED, marks=pytest.mark.cuda),
    ],
)
on_each = pytest.mark.parametrize("device", [pytest.param("cpu", marks=fsdp.NEEDED), CUDA])


def join(folder, device, backend=None, *, launched=False):
    """A world of one, in a worker process; `launched` by torchrun, which accelerate shards under alone."""
    take(device)
    if launched:
        os.environ.update(rank_environment(0, 1))
    if device == "cuda":  # what torch says of itself there is not known yet, and a hint must not hide the values
        warnings.simplefilter("default")
    join_alone(device, folder, backend or {"cpu": "gloo", "cuda": MIXED}[device])


def alone(check, folder, device, *given, **settings):
    """What a worker process of its own returns."""
    started = {"cpu": "gloo", "cuda": MIXED}[device]  # forked, or anew; it joins a group by itself
    return run_workers(check, 1, str(folder), device, *given, backend=started, **settings)[0]


def config(**more):
    return SlowMoConfig(
        **{
            "sync_every": TAU,
            "outer_momentum": 0.5,
            "inner_state": "maintain",
            "timeout_seconds": patience(60),
            **more,
        }
    )


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.1)


def on(device, batch):
    return {name: value.to(device) for name, value in batch.items()}


def batch_of(step, device, rows=ROWS):
    return on(device, fsdp.Tokens(400).batch(rows * step, rows))


def on_cpu(model):
    """In a world of one a shard is all of it, and nothing is sent."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: local(value.detach()).to("cpu", copy=True) for name, value in named}


def furthest(found, right):
    assert found.keys() == right.keys()
    return max(float((found[name].double() - right[name].double()).abs().max()) for name in right)


def mesh_of_one(device):
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device, (1,))


class Run:
    """
    One training run of `Awkward`, sharded or plain.

    Args:
        clip (`float`, *optional*): The norm that gradients are clipped to.
        accumulation (`int`): Micro-batches per step.
        in_bf16 (`bool`): A plain model that computes in bf16, as FSDP2's mixed precision policy does it.
        settings: Of `fully_shard`.
    """

    def __init__(
        self, device, slow, *, dtype=torch.float64, sharded=False, clip=None, accumulation=1, in_bf16=False, **settings
    ):
        self.device, self.clip, self.accumulation, self.sharded = device, clip, accumulation, sharded
        self.in_bf16, self.number = in_bf16, 0
        self.bare = fsdp.Awkward(dtype).to(device)
        self.model = fsdp.by_hand(self.bare, mesh_of_one(device), **settings) if sharded else self.bare
        self.optimizer = SlowMoOptimizer(adamw(self.bare.parameters()), slow)

    def loss(self, batch):
        if not self.in_bf16:
            return self.model(**batch)["loss"]
        values = {name: p.to(torch.bfloat16) for name, p in self.bare.named_parameters()}
        self.optimizer.begun()  # training begins with a pass of the module itself, which this is not
        return torch.func.functional_call(self.bare, values, kwargs=batch)["loss"]

    def step(self):
        for micro in range(self.accumulation):
            if self.sharded:
                self.model.set_requires_gradient_sync(micro == self.accumulation - 1)
            batch = batch_of(self.number * self.accumulation + micro, self.device)
            (self.loss(batch) / self.accumulation).backward()
        if self.clip:
            nn.utils.clip_grad_norm_(self.bare.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.number += 1

    def path(self):
        """The values after every step, and those that an evaluation is shown after it."""
        found = []
        for _ in range(STEPS):
            self.step()
            found.append(on_cpu(self.bare))
            with consensus(self.optimizer):
                found.append(on_cpu(self.bare))
        return found

    def places(self):
        """Where the slow state lies, and whether that of main memory is pinned."""
        slow = self.optimizer.outer_loop.parts.slow
        flats = [*(item.flat for item in slow.anchors), *slow.update.velocities]
        return {(flat.device.type, flat.device.type == "cpu" and flat.is_pinned()) for flat in flats}
