"""
What needs a CUDA device: a real GradScaler in Trainer, bf16, two gloo ranks on one GPU, NCCL, peak memory. Skipped
without one.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers import Trainer, TrainerCallback

from harness import patience, run_workers
from slowmo_hf import SlowMoCallback, SlowMoConfig, SlowMoOptimizer, consensus, last_round
from tiny import Recorder, Regression, Rows, arguments, equal, follow, mean, recorded

pytestmark = pytest.mark.cuda

TAU, STEPS = 3, 8
CONFIG = SlowMoConfig(sync_every=TAU, outer_momentum=0.5, timeout_seconds=patience(60))


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def on_cpu(recording):
    """The recording with its tensors on the CPU, for the test's own process."""
    move = lambda item: {name: value.cpu() for name, value in item.items()}  # noqa: E731
    moved = {key: move(recording[key]) for key in ("start", "final")}
    moved |= {key: [move(item) for item in recording[key]] for key in ("stepped", "after")}
    return {**recording, **moved, "evaluated": {step: move(item) for step, item in recording["evaluated"].items()}}


class Overflow(TrainerCallback):
    """An infinite gradient on the last rank at step 2, and what the scaler made of it."""

    def __init__(self):
        self.skipped, self.before = [], None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1 and rank() == (dist.get_world_size() if dist.is_initialized() else 1) - 1:
            next(p for p in model.parameters() if p.grad is not None).grad.fill_(float("inf"))
        self.before = [p.detach().clone() for p in model.parameters()]

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.skipped.append(all(torch.equal(a, b) for a, b in zip(self.before, model.parameters(), strict=True)))


def check_trainer(folder, precision):
    recorder, overflow = Recorder(), Overflow()
    # max_grad_norm=0: clipping would unscale before on_pre_optimizer_step, and the scaler would not see our infinity
    trainer = Trainer(
        model=Regression(torch.float32),
        args=arguments(
            folder,
            max_steps=STEPS,
            learning_rate=1e-2,
            use_cpu=False,
            max_grad_norm=0,
            eval_strategy="steps",
            eval_steps=4,
            **{precision: True},
        ),
        train_dataset=Rows(128, torch.float32),
        eval_dataset=Rows(16, torch.float32),
        callbacks=[recorder, *([overflow] if precision == "fp16" else []), SlowMoCallback(CONFIG)],
    )
    trainer.train()
    scaler = trainer.accelerator.scaler
    assert next(trainer.model.parameters()).is_cuda
    return on_cpu(recorded(trainer, recorder)), overflow.skipped, scaler is not None and scaler.get_scale()


def check_two_ranks_on_one_gpu(folder):
    torch.cuda.set_device(0)
    import os

    os.environ["LOCAL_RANK"] = "0"
    return {precision: check_trainer(f"{folder}/{precision}", precision) for precision in ("fp16", "bf16")}


def check_both_precisions(folder):
    return {precision: check_trainer(f"{folder}/{precision}", precision) for precision in ("fp16", "bf16")}


def follow_both(ranks):
    for precision in ("fp16", "bf16"):
        runs = [result[precision][0] for result in ranks]
        assert follow(runs, CONFIG, tolerance=1e-5) == STEPS // TAU
        for step in (4, 8):
            for name in runs[0]["trained"]:
                average = mean([run["after"][step - 1] for run in runs], name)
                torch.testing.assert_close(runs[0]["evaluated"][step][name].double(), average, rtol=1e-5, atol=1e-5)
    for number, result in enumerate(ranks):
        skipped = result["fp16"][1]
        assert len(skipped) == STEPS, "every attempt is counted"
        assert skipped[1] == (number == len(ranks) - 1), "the infinite gradient was skipped where it was"
        assert result["fp16"][2] > 0
        assert result["bf16"][2] is False


def test_one_gpu_alone(tmp_path):
    follow_both(run_workers(check_both_precisions, 1, str(tmp_path), backend="nccl"))


def test_two_gloo_ranks_on_one_gpu(tmp_path):
    ranks = run_workers(check_two_ranks_on_one_gpu, 2, str(tmp_path), backend="cpu:gloo,cuda:gloo")
    follow_both(ranks)
    assert equal(ranks[0]["bf16"][0]["final"], ranks[1]["bf16"][0]["final"])


def check_nccl(folder):
    """The harness makes no process group for one process: NCCL with one rank is made here."""
    torch.cuda.set_device(0)
    dist.init_process_group(
        "nccl", init_method=f"file://{folder}/store", rank=0, world_size=1, device_id=torch.device("cuda", 0)
    )
    rows, results = Rows(64, torch.float32), []
    for config in (None, SlowMoConfig.local_sgd(sync_every=2)):
        model = Regression(torch.float32).cuda()
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        ddp = nn.parallel.DistributedDataParallel(model, device_ids=[0])
        optimizer = SlowMoOptimizer(inner, config) if config else inner
        for step in range(6):
            optimizer.zero_grad()
            ddp(rows.x[8 * step : 8 * step + 8].cuda(), rows.y[8 * step : 8 * step + 8].cuda())["loss"].backward()
            optimizer.step()
        results.append({name: value.cpu() for name, value in model.state_dict().items()})
        rounds = last_round(optimizer).round if config else 0
    dist.destroy_process_group()
    return results, rounds


def test_nccl_with_one_rank(tmp_path):
    [((stock, ours), rounds)] = run_workers(check_nccl, 1, str(tmp_path), backend="nccl")
    assert rounds == 3
    for name, value in stock.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6)


BUCKET_BYTES = 2**20


def check_memory():
    torch.cuda.set_device(0)
    results = {}
    for stash in ("same", "cpu"):
        model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(8))).cuda()
        payload = sum(p.numel() * p.element_size() for p in model.parameters())
        config = SlowMoConfig(sync_every=2, outer_momentum=0.5, bucket_bytes=BUCKET_BYTES, stash_device=stash)
        optimizer = SlowMoOptimizer(torch.optim.SGD(model.parameters(), lr=1e-3), config)
        batch = torch.randn(4, 1024, device="cuda")

        def step(model=model, optimizer=optimizer, batch=batch):
            optimizer.zero_grad(set_to_none=False)
            model(batch).square().mean().backward()
            optimizer.step()

        model(batch).square().mean().backward()  # starts: anchors, velocity and bucket are there from here on
        base = torch.cuda.memory_allocated() - 2 * payload  # without parameters and gradients
        optimizer.step()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        optimizer.step()
        round_peak = torch.cuda.max_memory_allocated() - before
        assert last_round(optimizer).round == 1
        step()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with consensus(optimizer):
            pass
        look_peak = torch.cuda.max_memory_allocated() - before
        results[stash] = {"payload": payload, "kept": base, "round": round_peak, "look": look_peak}
        del model, optimizer, step
        torch.cuda.empty_cache()
    return results


def test_peak_memory_of_a_round_and_a_look():
    [results] = run_workers(check_memory, 1, backend="nccl")
    slack = 4 * BUCKET_BYTES + 2**20
    for stash, sizes in results.items():
        payload = sizes["payload"]
        assert sizes["kept"] <= (2 if stash == "same" else 4) * payload + slack, "anchors and velocity, and one bucket"
        assert sizes["round"] <= slack, "a round works bucket by bucket"
        assert sizes["look"] <= (payload if stash == "same" else 0) + slack
    assert results["same"]["look"] >= results["same"]["payload"]


def check_gossip(device):
    """Six steps of every gossip base; two ranks may share a GPU, and gloo's messages go through main memory."""
    if device == "cuda":
        torch.cuda.set_device(0)
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


def test_gossip_of_two_gloo_ranks_on_one_gpu_is_that_on_the_cpu():
    on_gpu = run_workers(check_gossip, 2, "cuda", backend="cpu:gloo,cuda:gloo")
    for mine, right in zip(on_gpu, run_workers(check_gossip, 2, "cpu"), strict=True):
        for base, weight in right.items():
            torch.testing.assert_close(mine[base], weight, rtol=1e-5, atol=1e-6)


def check_sharded(device):
    """
    Six steps, with a look inside a round: the plain run, the sharded one, and the one whose slow state lies in main
    memory.
    """
    if device == "cuda":
        torch.cuda.set_device(0)
    results, places = {}, {}
    for name, settings in SHARDED.items():
        weight = nn.Parameter(torch.arange(501.0, device=device))
        config = SlowMoConfig(
            sync_every=4, outer_momentum=0.5, bucket_bytes=1024, timeout_seconds=patience(60), **settings
        )
        optimizer = SlowMoOptimizer(torch.optim.SGD([weight], lr=0.1), config)
        for step in range(6):
            weight.grad = weight.detach() - (rank() + 1) * (step + 1)
            optimizer.step()
        with consensus(optimizer):
            results[name] = weight.detach().cpu().clone()
        places[name] = {item.flat.device.type for item in optimizer.outer_loop.anchors}
    return results, places


SHARDED = {
    "plain": {},
    "sharded": {"shard_slow_state": True},
    "on the cpu": {"shard_slow_state": True, "slow_state_device": "cpu"},
}


def test_sharded_slow_state_of_two_gloo_ranks_on_one_gpu_is_the_plain_one():
    for results, places in run_workers(check_sharded, 2, "cuda", backend="cpu:gloo,cuda:gloo"):
        for name in ("sharded", "on the cpu"):
            torch.testing.assert_close(results[name], results["plain"], rtol=1e-6, atol=1e-6)
        assert places == {"plain": {"cuda"}, "sharded": {"cuda"}, "on the cpu": {"cpu"}}
