"""A program that catches an error in its forward pass, an out-of-memory batch say, and goes on without the batch."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

import fsdp
from harness import patience, run_workers
from slowmo_hf import SlowMoConfig, SlowMoOptimizer, consensus
from tiny import equal

pytestmark = fsdp.NEEDED

STEPS, TAU = 8, 3
SETTINGS = {"plain": {}, "overlapped": {"overlap_steps": 1}, "sgp": {"base": "sgp"}}


class OutOfMemory(RuntimeError):
    pass


def give_up(*args):
    raise OutOfMemory


class Program:
    def __init__(self, more, *, fails, steps_without_batch=False):
        self.bare = fsdp.Awkward()
        self.model = fsdp.by_hand(self.bare, fsdp.hsdp_mesh(2, 2))
        config = SlowMoConfig(sync_every=TAU, processes_per_worker=2, timeout_seconds=patience(20), **more)
        self.optimizer = SlowMoOptimizer(torch.optim.SGD(self.bare.parameters(), lr=0.1, momentum=0.9), config)
        self.fails, self.steps_without_batch = fails, steps_without_batch

    def step(self, number):
        """A batch is tried twice, and given up where the next round ends: no gradient is there in its step."""
        rows = fsdp.Tokens(400).batch(4 * (4 * number + dist.get_rank()))
        if self.fails:
            self.fail(rows)
        if number == 0 or (number + 1) % TAU or not self.steps_without_batch:
            self.model(**rows)["loss"].backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def fail(self, rows):
        """All processes of a worker meet the same error: at a worker's first block, in the middle, at its end."""
        for module in (self.bare.blocks[0].up, self.bare.blocks[1].down, self.bare.norm):
            hook = module.register_forward_pre_hook(give_up)
            level = self.bare.level.clone()
            with pytest.raises(OutOfMemory):
                self.model(**rows)
            self.bare.level.copy_(level)
            hook.remove()

    def look(self):
        self.model.train()
        with torch.no_grad():
            if self.fails:
                self.fail(fsdp.Tokens(400).batch(0))
            with consensus(self.optimizer):
                shown = float(self.model.eval()(**fsdp.Tokens(400).batch(0, 12))["loss"])
            local = float(self.model(**fsdp.Tokens(400).batch(0, 12))["loss"])
        self.model.train()
        return shown, local


def compared(more, steps_without_batch):
    dist.barrier()
    quiet, failing = (Program(more, fails=fails, steps_without_batch=steps_without_batch) for fails in (False, True))
    for number in range(STEPS):
        for program in (quiet, failing):
            program.step(number)
        looks = [program.look() for program in (quiet, failing)]
        assert looks[0] == looks[1], (number, looks)
        assert equal(fsdp.local_values(quiet.bare), fsdp.local_values(failing.bare)), number


def _all(by_torch):
    if not by_torch:
        del FSDPModule.reset_iter_state
    for more in SETTINGS.values():
        for steps_without_batch in (False, True):
            compared(more, steps_without_batch)


@pytest.mark.slow
@pytest.mark.parametrize("by_torch", [True, False], ids=["torch resets", "an older torch"])
def test_a_pass_that_failed_leaves_no_trace(by_torch):
    run_workers(_all, 4, by_torch)
