"""
What a CUDA device computes is what the CPU computes: codes, digests and messages bit for bit, rounds of every kind on
exact numbers; a compiled model; and a run that is resumed, bit for bit.
"""

from __future__ import annotations

import os
import shutil
import warnings

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import Trainer

from devices import BACKENDS, on_each_device, rank, take
from harness import patience, run_workers
from slowmo_hf import SlowMoCallback, SlowMoConfig, SlowMoOptimizer, consensus, register_for_checkpointing
from slowmo_hf.algorithm.codec import BLOCK
from slowmo_hf.names import CODES, find
from test_start_values import digests_on
from tiny import Recorder, Rows, arguments, bert, equal, sentences, values

# ---- codes ----


def blocks(dtype):
    """Ordinary numbers, an outlier, zeros, ties of the rounding, numbers too small for a scale, both signs."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(64, BLOCK, generator=generator, dtype=torch.float64).to(dtype)
    rows[1, 7] = 1e6
    rows[2] = 0
    rows[3] = torch.arange(BLOCK) - 127.5
    rows[3, 0] = 127
    rows[4] *= torch.finfo(dtype).tiny
    rows[5] *= 1e30
    return rows.view(-1)


def codes(device, code, dtype):
    """Codes and scales, a message and what it leaves over, and the message read, on the CPU."""
    held = blocks(dtype).to(device)
    made = code.quantise(held)
    message = torch.zeros(code.message_bytes(held.numel(), dtype), dtype=torch.uint8, device=device)
    code.encode_(held, message)
    read = torch.ones_like(held)
    code.decode_(message, read, add=True)
    return [tensor.cpu() for tensor in (*made, message, held, read)]


@on_each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CODES)
def test_codes_are_those_of_the_cpu_bit_for_bit(name, dtype, device):
    mine, right = (codes(where, find(CODES[name])(), dtype) for where in (device, "cpu"))
    for index, (own, other) in enumerate(zip(mine, right, strict=True)):
        assert own.dtype == other.dtype
        assert torch.equal(own.view(torch.uint8), other.view(torch.uint8)), index


@on_each_device
def test_digests_are_those_of_the_cpu(device):
    [(mine, right)] = run_workers(digests_on, 1, device, backend=BACKENDS[device])
    assert mine == right


# ---- rounds ----

ROUNDS = {
    "plain": {},
    "sharded": {"shard_slow_state": True},
    "sharded, on the cpu": {"shard_slow_state": True, "slow_state_device": "cpu"},
    "overlapped": {"overlap_steps": 1},
    "int8": {"compression": "int8"},
    "bf16": {"compression": "bf16"},
    "overlapped int8": {"compression": "int8", "overlap_steps": 2},
}


def check_rounds(device):
    """
    Eleven steps, with a look inside a round. Learning rate, momentum and gradients are such that fp32 holds every
    number without rounding but for quantisation's, which is the same operations everywhere.
    """
    take(device)
    results, places = {}, {}
    for name, settings in ROUNDS.items():
        weight = nn.Parameter(torch.arange(1501.0, device=device))
        config = SlowMoConfig(
            sync_every=4, outer_momentum=0.5, bucket_bytes=4096, timeout_seconds=patience(60), **settings
        )
        optimizer = SlowMoOptimizer(torch.optim.SGD([weight], lr=0.5), config)
        for step in range(11):
            weight.grad = weight.detach() - (rank() + 1) * (step + 1)
            optimizer.step()
        local = weight.detach().cpu().clone()
        with consensus(optimizer):
            results[name] = weight.detach().cpu().clone()
        assert torch.equal(weight.detach().cpu(), local)
        places[name] = {item.flat.device.type for item in optimizer.outer_loop.parts.slow.anchors}
    return results, places


@on_each_device
def test_rounds_of_two_ranks_are_those_of_the_cpu(device):
    mine = run_workers(check_rounds, 2, device, backend=BACKENDS[device])
    right = mine if device == "cpu" else run_workers(check_rounds, 2, "cpu")
    for (results, places), (others, _) in zip(mine, right, strict=True):
        assert equal(results, others)
        for name in ("sharded", "sharded, on the cpu"):
            assert torch.equal(results[name], results["plain"]), name
        assert places == {name: {"cpu" if name == "sharded, on the cpu" else device} for name in ROUNDS}
    assert equal(mine[0][0], mine[1][0])


# ---- a compiled model ----


def check_compiled(device, backend):
    take(device)
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # a worker of these tests may have no processes of its own
    warnings.simplefilter("default")  # the compiler's hints on speed are not ours
    rows, results = Rows(64, torch.float32), []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).to(device)
        called = torch.compile(model, backend=backend) if compiled else model
        config = SlowMoConfig(sync_every=3, outer_momentum=0.5)
        optimizer = SlowMoOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), config)
        for step in range(8):
            batch = slice(8 * step, 8 * step + 8)
            (called(rows.x[batch].to(device)) - rows.y[batch].to(device)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert optimizer.outer_loop.rounds == 2
        results.append({name: value.cpu() for name, value in values(model).items()})
    return results


@pytest.mark.parametrize(
    ("device", "backend"),
    [
        ("cpu", "aot_eager"),
        pytest.param("cuda", "aot_eager", marks=pytest.mark.cuda),
        pytest.param("cuda", "inductor", marks=pytest.mark.cuda),
    ],
)
def test_a_compiled_model_trains_as_the_eager_one(device, backend):
    if backend == "inductor" and not any(map(shutil.which, ("cc", "gcc", "clang"))):
        pytest.skip("torch.compile needs a C compiler")
    [(eager, compiled)] = run_workers(
        check_compiled, 1, device, backend, backend=BACKENDS[device], time_limit_seconds=170
    )
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-4, atol=1e-5)


# ---- resume ----

RESUMED = {
    "plain": SlowMoConfig(sync_every=4, outer_momentum=0.5, timeout_seconds=patience(60)),
    "sharded, on the cpu": SlowMoConfig(
        sync_every=4, outer_momentum=0.5, timeout_seconds=patience(60), shard_slow_state=True, slow_state_device="cpu"
    ),
    "overlapped int8": SlowMoConfig(
        sync_every=4, outer_momentum=0.5, timeout_seconds=patience(60), overlap_steps=2, compression="int8"
    ),
}
SAVED, LAST = 5, 8  # an overlapped round of step 4 is on its way at step 5


def under_trainer(folder, config, device, resume=None):
    model = bert(dropout=0.1)
    model.set_attn_implementation("eager")  # plain matrix products, which deterministic mode knows
    settings = {"max_steps": LAST, "learning_rate": 0.02, "save_strategy": "steps", "save_steps": SAVED, "seed": 5}
    data, recorder = sentences(64), Recorder()
    trainer = Trainer(
        model=model,
        args=arguments(folder, use_cpu=device == "cpu", per_device_train_batch_size=2, **settings),
        train_dataset=data,
        callbacks=[recorder, SlowMoCallback(config)],
    )
    trainer.train(resume_from_checkpoint=resume)
    assert len(recorder.after) == (LAST - SAVED if resume else LAST)
    return values(trainer.accelerator.unwrap_model(trainer.model))


def under_accelerate(folder, config, device, resume=None):
    accelerator, rows = Accelerator(cpu=device == "cpu"), Rows(128, torch.float32)
    torch.manual_seed(rank())
    bare = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.2), nn.Linear(16, 1))
    optimizer = SlowMoOptimizer(torch.optim.AdamW(bare.parameters(), lr=1e-2), config)
    model, optimizer = accelerator.prepare(bare, optimizer)
    register_for_checkpointing(accelerator, optimizer)
    if resume:
        accelerator.load_state(resume)
    for step in range(SAVED if resume else 0, LAST):
        start = 16 * step + 4 * rank()
        x, y = rows.x[start : start + 4].to(device), rows.y[start : start + 4].to(device)
        accelerator.backward((model(x) - y).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        if step + 1 == SAVED and not resume:
            accelerator.save_state(f"{folder}/checkpoint-{SAVED}")
    with consensus(optimizer):
        return values(bare)


def check_resume(folder, run, device):
    take(device)
    torch.use_deterministic_algorithms(True)
    same = {}
    for name, config in RESUMED.items():
        whole = run(f"{folder}/{name}", config, device)
        resumed = run(f"{folder}/{name} again", config, device, f"{folder}/{name}/checkpoint-{SAVED}")
        assert next(iter(whole.values())).device.type == device
        same[name] = equal(whole, resumed)
    return same


@on_each_device
@pytest.mark.parametrize("run", [under_trainer, under_accelerate])
def test_a_resumed_run_of_two_ranks_ends_the_same_bit_for_bit(tmp_path, run, device):
    for same in run_workers(check_resume, 2, str(tmp_path), run, device, backend=BACKENDS[device]):
        assert same == dict.fromkeys(RESUMED, True)
