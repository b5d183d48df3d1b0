"""
On a CUDA device: Trainer with a real GradScaler and with bf16, two gloo ranks on one card, gossip, NCCL with one rank.
What can run on the CPU runs there too.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers import Trainer, TrainerCallback

from devices import BACKENDS, join_alone, on_each_device, rank, take
from harness import patience, run_workers
from slowmo_hf import SlowMoCallback, SlowMoConfig, SlowMoOptimizer, consensus, last_round
from tiny import Recorder, Regression, Rows, arguments, equal, follow, mean, recorded

TAU, STEPS = 3, 8
CONFIG = SlowMoConfig(sync_every=TAU, outer_momentum=0.5, timeout_seconds=patience(60))
PRECISIONS = {"cpu": ["bf16"], "cuda": ["fp16", "bf16"]}  # accelerate refuses fp16 on a CPU
FIRST_SCALE = 2.0**8  # the default of 65536 overflows by itself here

# ---- Trainer ----


def on_cpu(recording):
    """The recording with its tensors on the CPU, for the test's own process."""
    move = lambda item: {name: value.cpu() for name, value in item.items()}  # noqa: E731
    moved = {key: move(recording[key]) for key in ("start", "final")}
    moved |= {key: [move(item) for item in recording[key]] for key in ("stepped", "after")}
    return {**recording, **moved, "evaluated": {step: move(item) for step, item in recording["evaluated"].items()}}


class Overflow(TrainerCallback):
    """An infinite gradient on the last rank at step 2, as backward leaves it, and what the scaler made of it."""

    def __init__(self):
        self.skipped, self.before, self.step = [], None, 0

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        last = (dist.get_world_size() if dist.is_initialized() else 1) - 1

        def overflow(parameter):
            if self.step == 1 and rank() == last:
                parameter.grad.fill_(float("inf"))

        # In backward: Trainer unscales before on_pre_optimizer_step, and the scaler would not see it there.
        next(model.parameters()).register_post_accumulate_grad_hook(overflow)

    def on_step_begin(self, args, state, control, **kwargs):
        self.step = state.global_step

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.before = [p.detach().clone() for p in model.parameters()]

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.skipped.append(all(torch.equal(a, b) for a, b in zip(self.before, model.parameters(), strict=True)))


def check_trainer(folder, precision, device):
    recorder, overflow = Recorder(), Overflow()
    trainer = Trainer(
        model=Regression(torch.float32),
        args=arguments(
            folder,
            max_steps=STEPS,
            learning_rate=1e-2,
            use_cpu=device == "cpu",
            eval_strategy="steps",
            eval_steps=4,
            **{precision: True},
        ),
        train_dataset=Rows(128, torch.float32),
        eval_dataset=Rows(16, torch.float32),
        callbacks=[recorder, *([overflow] if precision == "fp16" else []), SlowMoCallback(CONFIG)],
    )
    scaler = trainer.accelerator.scaler
    if precision == "fp16":
        scaler.load_state_dict({**scaler.state_dict(), "scale": FIRST_SCALE})
    trainer.train()
    assert next(trainer.model.parameters()).device.type == device
    return on_cpu(recorded(trainer, recorder)), overflow.skipped, scaler is not None and scaler.get_scale()


def check_precisions(folder, device):
    take(device)
    return {precision: check_trainer(f"{folder}/{precision}", precision, device) for precision in PRECISIONS[device]}


def follow_all(ranks, device):
    for precision in PRECISIONS[device]:
        runs = [result[precision][0] for result in ranks]
        assert follow(runs, CONFIG, tolerance=1e-5) == STEPS // TAU
        for step in (4, 8):
            for name in runs[0]["trained"]:
                average = mean([run["after"][step - 1] for run in runs], name)
                torch.testing.assert_close(runs[0]["evaluated"][step][name].double(), average, rtol=1e-5, atol=1e-5)
    for number, result in enumerate(ranks):
        assert result["bf16"][2] is False
        if device == "cuda":
            _, skipped, scale = result["fp16"]
            assert skipped == [step == 1 and number == len(ranks) - 1 for step in range(STEPS)], (
                "where the infinity was"
            )
            assert scale == FIRST_SCALE / (2 if number == len(ranks) - 1 else 1)


@on_each_device
def test_one_process_under_trainer(tmp_path, device):
    follow_all(run_workers(check_precisions, 1, str(tmp_path), device, backend=BACKENDS[device]), device)


@on_each_device
def test_two_ranks_under_trainer(tmp_path, device):
    ranks = run_workers(check_precisions, 2, str(tmp_path), device, backend=BACKENDS[device])
    follow_all(ranks, device)
    assert equal(ranks[0]["bf16"][0]["final"], ranks[1]["bf16"][0]["final"])


# ---- a world of one: NCCL ----

ALONE = {
    "plain": {},
    "overlapped": {"overlap_steps": 1},
    "int8": {"compression": "int8"},
    "sharded": {"shard_slow_state": True},
    "sharded, on the cpu": {"shard_slow_state": True, "slow_state_device": "cpu"},
}


def check_alone(folder, device):
    take(device)
    join_alone(device, folder)
    rows, results, rounds = Rows(64, torch.float32), {}, {}
    for name, settings in {"stock": None, **ALONE}.items():
        model = Regression(torch.float32).to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ddp = nn.parallel.DistributedDataParallel(model, device_ids=[0] if device == "cuda" else None)
        if settings is not None:
            optimizer = SlowMoOptimizer(optimizer, SlowMoConfig.local_sgd(sync_every=2, **settings))
        for step in range(6):
            optimizer.zero_grad()
            batch = slice(8 * step, 8 * step + 8)
            ddp(rows.x[batch].to(device), rows.y[batch].to(device))["loss"].backward()
            optimizer.step()
        if settings is not None:
            rounds[name] = last_round(optimizer).round
        results[name] = {key: value.cpu() for key, value in model.state_dict().items()}
    dist.destroy_process_group()
    return results, rounds


@on_each_device
def test_one_rank_alone_is_stock_training(tmp_path, device):
    """β = 0: the average of one worker is itself. The last overlapped round is still due at the end."""
    [(results, rounds)] = run_workers(check_alone, 1, str(tmp_path), device, backend=BACKENDS[device])
    assert rounds == {name: 2 if name == "overlapped" else 3 for name in ALONE}
    for name in ALONE:
        for key, value in results["stock"].items():
            torch.testing.assert_close(results[name][key], value, rtol=1e-5, atol=1e-6, msg=f"{name}, {key}")


def check_collectives(folder, device):
    """Every collective of the package with the dtypes that it sends, on a group of one."""
    take(device)
    join_alone(device, folder)
    for dtype in (torch.float32, torch.float64):
        flat = torch.arange(5, dtype=dtype, device=device)
        dist.all_reduce(flat, async_op=True).wait()
        assert flat.tolist() == [0, 1, 2, 3, 4]
    whole = torch.tensor([3, -4], device=device)
    dist.all_reduce(whole, op=dist.ReduceOp.MAX, async_op=True).wait()
    assert whole.tolist() == [3, -4]
    header = torch.tensor([1.0, 2.5], dtype=torch.float64, device=device)
    rows = [torch.empty_like(header)]
    dist.all_gather(rows, header, async_op=True).wait()
    assert torch.equal(rows[0], header)
    sent, received = (
        torch.arange(16, dtype=torch.uint8, device=device),
        torch.zeros(16, dtype=torch.uint8, device=device),
    )
    dist.all_to_all_single(received, sent, async_op=True).wait()
    assert torch.equal(received, sent)
    gathered = torch.zeros(1, 16, dtype=torch.uint8, device=device)
    dist.all_gather(list(gathered), sent, async_op=True).wait()
    assert torch.equal(gathered[0], sent)
    dist.broadcast(sent, src=0, async_op=True).wait()
    told = [None]
    dist.all_gather_object(told, "word")
    assert told == ["word"]
    dist.destroy_process_group()


@on_each_device
def test_the_backend_takes_what_the_package_sends(tmp_path, device):
    run_workers(check_collectives, 1, str(tmp_path), device, backend=BACKENDS[device])


# ---- gossip ----


def check_gossip(device):
    """Six steps of every gossip base; two ranks may share a GPU, and gloo's messages go through main memory."""
    take(device)
    results = {}
    for base in ("sgp", "osgp", "dpsgd"):
        weight = nn.Parameter(torch.arange(5.0, device=device))
        optimizer = SlowMoOptimizer(
            torch.optim.SGD([weight], lr=0.1), SlowMoConfig(base=base, sync_every=4, timeout_seconds=patience(60))
        )
        for step in range(6):
            weight.grad = weight.detach() - (rank() + 1) * (step + 1)
            optimizer.step()
        with consensus(optimizer):
            results[base] = weight.detach().cpu().clone()
    return results


@pytest.mark.cuda
def test_gossip_of_two_gloo_ranks_on_one_gpu_is_that_on_the_cpu():
    on_gpu = run_workers(check_gossip, 2, "cuda", backend=BACKENDS["cuda"])
    for mine, right in zip(on_gpu, run_workers(check_gossip, 2, "cpu"), strict=True):
        for base, weight in right.items():
            torch.testing.assert_close(mine[base], weight, rtol=1e-5, atol=1e-6)
