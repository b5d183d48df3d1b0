"""Every wrapper that couples workers is found: where objects are frozen, and where a stale one is left behind."""

from __future__ import annotations

import gc
import tempfile

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback

from harness import run_workers
from slowmo_hf import SlowMoCallback, SlowMoConfig, SlowMoOptimizer
from slowmo_hf.adapters.isolation import Isolation, ddp_wrappers
from tiny import Recorder, Regression, Rows, arguments, equal, follow, recorded, values

CONFIG = SlowMoConfig(sync_every=3, outer_momentum=0.5)


class Freezes(TrainerCallback):
    """As programs do that fork workers of their own: what is frozen is in no walk over the collector's objects."""

    def on_train_begin(self, args, state, control, **kwargs):
        gc.freeze()


def trained_by_trainer():
    recorder = Recorder()
    trainer = Trainer(
        model=Regression(torch.float32),
        args=arguments(tempfile.mkdtemp(), max_steps=7, learning_rate=0.05),
        train_dataset=Rows(64, torch.float32),
        callbacks=[Freezes(), recorder, SlowMoCallback(CONFIG)],
    )
    trainer.train()
    seen = ddp_wrappers(trainer.model.parameters()), ddp_wrappers(trainer.model.parameters(), trainer.model_wrapped)
    return recorded(trainer, recorder), [len(found) for found in seen]


def test_trainers_wrapper_is_found_in_a_frozen_heap():
    (first, found), (second, _) = run_workers(trained_by_trainer, 2)
    assert found == [0, 1], "the walk alone does not see it"
    assert follow([first, second], CONFIG) == 2


def trained_by_loop(case):
    """Weights after two local steps, and how many wrappers there were."""
    accelerator, bare, rows = Accelerator(cpu=True), Regression(torch.float32), Rows(64, torch.float32)
    stale = accelerator.prepare_model(bare) if case == "stale" else None
    model, optimizer = accelerator.prepare(bare, SlowMoOptimizer(torch.optim.SGD(bare.parameters(), lr=0.1), CONFIG))
    assert (stale is None) == (case != "stale")
    if case == "frozen":
        gc.freeze()
    for step in range(2):
        start = 8 * step + 4 * accelerator.process_index
        accelerator.backward(model(rows.x[start : start + 4], rows.y[start : start + 4])["loss"])
        optimizer.step()
        optimizer.zero_grad()
    return values(bare), len(ddp_wrappers(bare.parameters(), model))


@pytest.mark.parametrize(("case", "wrappers"), [("plain", 1), ("frozen", 1), ("stale", 2)])
def test_workers_of_a_custom_loop_train_alone(case, wrappers):
    """The other worker's rows would be seen in the gradients of every wrapper that is left as it was."""
    (first, found), (second, _) = run_workers(trained_by_loop, 2, case)
    assert found == wrappers
    assert not equal(first, second)
    alone = run_workers(on_own_rows, 2)
    for mine, right in zip((first, second), alone, strict=True):
        for name, value in right.items():
            torch.testing.assert_close(mine[name], value, rtol=0, atol=1e-7)


def on_own_rows():
    """The same two steps without wrapper or package."""
    import torch.distributed as dist

    model, rows = Regression(torch.float32), Rows(64, torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(2):
        start = 8 * step + 4 * dist.get_rank()
        optimizer.zero_grad()
        model(rows.x[start : start + 4], rows.y[start : start + 4])["loss"].backward()
        optimizer.step()
    return values(model)


def two_networks_alone(folder):
    """One process with a group; both networks are one optimizer's, and the second has a buffer."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    nets = [torch.nn.Linear(2, 2), torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))]
    first, second = (torch.nn.parallel.DistributedDataParallel(net) for net in nets)
    optimizer = SlowMoOptimizer(torch.optim.SGD([p for net in nets for p in net.parameters()], lr=0.1), CONFIG)
    second(first(torch.randn(4, 2))).sum().backward()
    optimizer.step()
    found = optimizer.outer_loop.tensors
    dist.destroy_process_group()
    return found.names, sorted(found.others.buffers())


def test_both_networks_of_one_optimizer_are_found_in_a_world_of_one(tmp_path):
    [(names, buffers)] = run_workers(two_networks_alone, 1, str(tmp_path))
    assert len(names) == 6
    assert all(name.endswith(("weight", "bias")) for name in names)
    assert len(buffers) == 3


def groups_of_norms():
    ddp = DistributedDataParallel(torch.nn.Linear(2, 1))
    ddp.module.norm = torch.nn.SyncBatchNorm(3)  # after the constructor, which refuses it on CPUs
    given = ddp.module.norm.process_group = dist.new_group([0, 1])
    isolation = Isolation([ddp])
    inside = dist.get_process_group_ranks(ddp.module.norm.process_group)
    isolation.release()
    return inside, ddp.module.norm.process_group is given


def test_synchronised_batch_norm_meets_the_worker_alone():
    assert run_workers(groups_of_norms, 2) == [([0], True), ([1], True)]
