"""Accelerate, Trainer and `torch.compile` over shards on a CUDA device, and memory (tests/cuda_shards.py)."""

from __future__ import annotations

import itertools
import os
import shutil
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fsdp
from cuda_shards import (
    CASES,
    STEPS,
    Run,
    adamw,
    alone,
    batch_of,
    config,
    furthest,
    join,
    mesh_of_one,
    on_cpu,
    on_each,
    over_each_backend,
)
from memory import allocated, taken
from slowmo_hf import SlowMoCallback, SlowMoOptimizer, consensus, last_round, register_for_checkpointing
from slowmo_hf.dtensors import is_sharded, local
from tiny import arguments, equal

KINDS = ("FULL_STATE_DICT", "SHARDED_STATE_DICT")


# ---- stock Accelerate and Trainer ----


def accelerated(folder, device, slow, steps, *, resume=None, save_at=(), look=False, **settings):
    """Stock Accelerate with FSDP2: accumulation of two, clipping. The values after every step from `resume` on."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # as a new process would
    if device == "cpu":
        fsdp.let_cpu_shard()
    accelerator = Accelerator(fsdp_plugin=fsdp.plugin(**settings), gradient_accumulation_steps=2)
    bare = fsdp.Awkward()
    model, optimizer = accelerator.prepare(bare, SlowMoOptimizer(adamw(bare.parameters()), slow))
    register_for_checkpointing(accelerator, optimizer)
    if resume:
        accelerator.load_state(f"{folder}/{resume}")
    found = {}
    for step in range(resume or 0, steps):
        for micro in (0, 1):
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch_of(2 * step + micro, device))["loss"])
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.05)
                optimizer.step()
                optimizer.zero_grad()
        found[step + 1] = on_cpu(bare)
        if look:
            looked_at(model, optimizer, device)
        if step + 1 in save_at:
            accelerator.save_state(f"{folder}/{step + 1}")
    assert any(is_sharded(p) for p in bare.parameters())
    assert {p.device.type for p in bare.parameters()} == {device}
    return found


def looked_at(model, optimizer, device):
    """By `consensus` and by `model.eval()`, each with a pass that leaves the root gathered."""
    data = batch_of(0, device, 12)
    with torch.no_grad():
        with consensus(optimizer):
            model.eval()(**data)
        model.train()
        model.eval()(**data)
        model.train()


def check_accelerate(folder, device, backend):
    join(folder, device, backend, launched=True)
    worst = 0.0
    for more in CASES.values():
        plain, path = Run(device, config(**more), clip=0.05, accumulation=2), []
        for _ in range(STEPS):
            plain.step()
            path.append(on_cpu(plain.bare))
        found = accelerated(folder, device, config(**more), STEPS)
        worst = max(worst, *itertools.starmap(furthest, zip(found.values(), path, strict=True)))
    dist.destroy_process_group()
    return worst


@pytest.mark.slow
@over_each_backend
def test_stock_accelerate_is_the_plain_model(tmp_path, device, backend):
    assert alone(check_accelerate, tmp_path, device, backend, time_limit_seconds=170) <= 1e-12


SAVED = (2, 4, 7)  # inside a round, in flight or behind it, and inside another one
RESUMED = {
    "reset": {"inner_state": "reset"},
    "overlapped": {"overlap_steps": 2},
    "slow state on the cpu": {"shard_slow_state": True, "slow_state_device": "cpu"},
}


def check_resumed(folder, device, kind):
    join(folder, device, launched=True)
    torch.use_deterministic_algorithms(True)
    found = {}
    for name, more in RESUMED.items():
        given = f"{folder}/{name}", device, config(**more), STEPS
        quiet = accelerated(*given, state_dict_type=kind)
        look = not more.get("shard_slow_state")  # model.eval() needs whole anchors
        watched = accelerated(*given, state_dict_type=kind, save_at=SAVED, look=look)
        found[name, "watched"] = all(equal(quiet[step], watched[step]) for step in quiet)
        for step in SAVED:
            resumed = accelerated(*given, state_dict_type=kind, resume=step)
            assert list(resumed) == list(range(step + 1, STEPS + 1))
            found[name, step] = all(equal(quiet[at], resumed[at]) for at in resumed)
    dist.destroy_process_group()
    return found


@pytest.mark.slow
@on_each
@pytest.mark.parametrize("kind", KINDS)
def test_evaluations_and_saves_leave_no_trace_and_a_resumed_run_ends_the_same(tmp_path, device, kind):
    """Bit for bit, under Accelerate."""
    for at, same in alone(check_resumed, tmp_path, device, kind, time_limit_seconds=170).items():
        assert same, at


def trained(folder, device, slow, kind=None, resume=None, **settings):
    """The end of a stock Trainer's run, by FSDP2 or on the plain model."""
    from accelerate import PartialState
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType
    from transformers import Trainer

    AcceleratorState._reset_state()
    sharding = {"version": 2, "transformer_layer_cls_to_wrap": ["Block"], "state_dict_type": kind}
    args = arguments(
        folder,
        **({"fsdp": True, "fsdp_config": sharding} if kind else {}),
        **{"max_steps": STEPS, "learning_rate": 0.05, "use_cpu": device == "cpu", "optim": "adamw_torch", **settings},
    )
    assert args.device.type == device  # asking makes the state
    if device == "cpu" and kind:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    model = fsdp.Awkward()
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())  # where there is one shard, Trainer's own
    # save of a model that is no PreTrainedModel refuses tied ones
    data, callbacks = fsdp.Tokens(64), [SlowMoCallback(slow)]
    trainer = Trainer(model=model, args=args, train_dataset=data, eval_dataset=data, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    assert last_round(trainer).round >= 1
    assert all(is_sharded(p) for p in model.parameters()) is bool(kind)
    return on_cpu(model)


TRAINED = {name: CASES[name] for name in ("slow momentum", "Nesterov", "overlapped", "slow state on the cpu")}


def check_trainer(folder, device, kind):
    join(folder, device, launched=True)
    torch.use_deterministic_algorithms(True)
    ends = {name: trained(folder, device, config(**more), kind) for name, more in TRAINED.items()}
    if kind:
        saving = {"save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 2}
        for name, more in TRAINED.items():
            there = f"{folder}/{name}"
            ends[name, "saving"] = trained(there, device, config(**more), kind, **saving)
            ends[name, "resumed"] = trained(there, device, config(**more), kind, f"{there}/checkpoint-4")
    dist.destroy_process_group()
    return ends


@pytest.mark.slow
@on_each
def test_a_stock_trainer_is_the_plain_model_and_goes_on_bit_for_bit(tmp_path, device):
    plain = alone(check_trainer, _folder(tmp_path, "plain"), device, None)
    for kind in KINDS:
        found = alone(check_trainer, _folder(tmp_path, kind), device, kind, time_limit_seconds=170)
        for name in TRAINED:
            assert furthest(found[name], plain[name]) <= 1e-12, (kind, name)
            assert equal(found[name], found[name, "saving"]), (kind, name)
            assert equal(found[name], found[name, "resumed"]), (kind, name)


def _folder(parent, name):
    (parent / name).mkdir()
    return parent / name


# ---- torch.compile ----


def check_compiled(folder, device, backend):
    join(folder, device)
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # a worker of these tests may have no processes of its own
    warnings.simplefilter("default")  # the compiler's hints on speed are not ours
    paths = []
    for compiled in (False, True):
        run = Run(device, config(), dtype=torch.float32, sharded=True)
        if compiled:
            for block in run.model.blocks:
                block.compile(backend=backend)
        paths.append(run.path())
    dist.destroy_process_group()
    return max(itertools.starmap(furthest, zip(*paths, strict=True)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "backend"),
    [
        ("cpu", "aot_eager"),
        pytest.param("cuda", "aot_eager", marks=pytest.mark.cuda),
        pytest.param("cuda", "inductor", marks=pytest.mark.cuda),
    ],
)
def test_compiled_blocks_train_as_the_eager_ones(tmp_path, device, backend):
    if backend == "inductor" and not any(map(shutil.which, ("cc", "gcc", "clang"))):
        pytest.skip("torch.compile needs a C compiler")
    assert alone(check_compiled, tmp_path, device, backend, time_limit_seconds=170) <= 1e-3


# ---- memory ----


WIDTHS, BUCKET_BYTES = {"cpu": 128, "cuda": 1024}, {"cpu": 2**16, "cuda": 2**20}
# What lies on the device between rounds, in copies of the fp32 parameters, as in tests/test_cuda_memory.py.
COPIES = {
    "plain": ({}, 2),
    "overlapped": ({"overlap_steps": 1}, 2 + 1 + 1),
    "stash on the cpu": ({"stash_device": "cpu"}, 2),
    "slow state on the cpu": ({"shard_slow_state": True, "slow_state_device": "cpu"}, 0),
}


def check_memory(folder, device, settings):
    from torch.distributed.fsdp import fully_shard

    join(folder, device)
    width = WIDTHS[device]
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(8))).to(device)
    for layer in model:
        fully_shard(layer, mesh=mesh_of_one(device))
    fully_shard(model, mesh=mesh_of_one(device))
    batch = torch.randn(4, width, device=device)

    def backward():
        model(batch).square().mean().backward()

    backward()  # gradients and cuBLAS's own workspaces are there from here on
    backward()
    before = allocated(device)
    slow = config(sync_every=2, bucket_bytes=BUCKET_BYTES[device], **settings)
    optimizer = SlowMoOptimizer(torch.optim.SGD(model.parameters(), lr=1e-3), slow)
    found = taken(device, before, backward, optimizer)
    payload = sum(local(p).nbytes for p in model.parameters())
    dist.destroy_process_group()
    return {**found, "payload": payload}


@on_each
@pytest.mark.parametrize("name", COPIES)
def test_memory_of_shards_is_as_documented(tmp_path, device, name):
    settings, copies = COPIES[name]
    if device == "cpu" and settings.get("slow_state_device") == "cpu":
        copies = 2  # one place
    slack = 4 * BUCKET_BYTES[device] + 2**16 + (2**20 if device == "cuda" else 0)
    sizes = alone(check_memory, tmp_path, device, settings)
    payload = sizes["payload"]
    assert copies * payload <= sizes["kept"] <= copies * payload + slack, sizes
    if device == "cuda":
        stash = payload if settings.get("stash_device") != "cpu" else 0
        assert sizes["round"] <= slack, sizes
        assert stash <= sizes["look"] <= stash + slack, sizes
