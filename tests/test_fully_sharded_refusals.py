"""FSDP2 and HSDP: a mate that stops answering, stock Trainer, and what would couple workers is refused by name."""

from __future__ import annotations

import os
import time
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from torch import nn
from transformers import Trainer, TrainerCallback

import fsdp
from harness import patience, run_workers
from slowmo_hf.adapters.fully_sharded import ShardedIsolation
from slowmo_hf.adapters.isolation import refusal
from slowmo_hf.adapters.trainer_start import refuse_resumable_saves
from slowmo_hf.dtensors import sharded_modules
from tiny import arguments, error_of

pytestmark = fsdp.NEEDED


# ---- a mate that stops answering ----


def with_a_frozen_mate(place):
    """Rank 1 stops before a forward pass, or before the norm: seconds until rank 0 hears of it, and its words."""
    rank, mesh = dist.get_rank(), fsdp.hsdp_mesh(2, 2)
    model = fsdp.by_hand(fsdp.Awkward(), mesh)
    isolation = ShardedIsolation(sharded_modules([model]), timeout_seconds=2)
    model(**fsdp.Tokens().batch(4 * rank))["loss"].backward()
    dist.barrier()
    began, error = time.monotonic(), ""
    if rank == 0 and place == "forward":
        error = error_of(model, **fsdp.Tokens().batch(0))
    elif rank == 0:
        error = error_of(torch.nn.utils.clip_grad_norm_, model.parameters(), 1.0)
    seconds = time.monotonic() - began
    dist.barrier()  # of the whole job, whose time-out is the user's
    isolation.release()
    return seconds, error, mesh.get_group(1)._get_backend(torch.device("cpu")).options._timeout.total_seconds()


@pytest.mark.parametrize("place", ["forward", "norm"])
def test_a_frozen_mate_is_told_in_time(place):
    results = run_workers(with_a_frozen_mate, 4, place)
    seconds, error, _ = results[0]
    assert 1.5 < seconds < patience(10)
    assert "Timed out waiting 2000ms" in error
    assert {after for _, _, after in results} == {1800}, "released: torch's own again"


# ---- stock Trainer ----


class Isolates(TrainerCallback):
    """Around a stock training; keeps the first step's gradients and what the model has seen for it."""

    def __init__(self) -> None:
        self.gradients: Any = None
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.isolation = ShardedIsolation(sharded_modules([model]))
        self.hook = model.register_forward_pre_hook(self._see, with_kwargs=True, prepend=True)

    def _see(self, module, args, kwargs):
        if self.gradients is None:
            self.seen.append({name: value.clone() for name, value in kwargs.items() if torch.is_tensor(value)})

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.gradients is None:
            self.gradients = fsdp.full_gradients(model)

    def on_train_end(self, args, state, control, **kwargs):
        self.isolation.release()
        self.hook.remove()


def by_trainer(folder, out):
    settings = {
        "max_steps": 2,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.0,
        "average_tokens_across_devices": False,
    }
    first, second = Isolates(), Isolates()
    model = fsdp.sharded_at_load(folder, 2, 2)
    trainer = Trainer(model, arguments(out, **settings), train_dataset=fsdp.texts(), callbacks=[second])
    trainer.train()
    fsdp.fsdp_trainer(out, 2, 2, callbacks=[first], **settings).train()
    return [(one.gradients, one.seen) for one in (first, second)]


@pytest.mark.skipif(not fsdp.SHARDS_AT_LOAD, reason="this transformers cannot shard at load over replicas")
def test_trainers_gradients_are_the_workers_own_mean(tmp_path, subtests):
    """Accelerate's HSDP and a model sharded at load, two micro-batches each."""
    from transformers import AutoModelForCausalLM

    folder = fsdp.small_llama(tmp_path / "llama")
    results = run_workers(by_trainer, 4, folder, str(tmp_path / "out"))
    wholes = (fsdp.Awkward, lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).train())
    for place, whole in enumerate(wholes):
        for worker in range(2):
            mates = [results[2 * worker + j][place] for j in range(2)]
            assert [len(seen) for _, seen in mates] == [2, 2]
            right = fsdp.whole_gradients([_inputs(batch) for _, seen in mates for batch in seen], whole())
            for gradients, _ in mates:
                with subtests.test(("accelerate", "at load")[place], worker=worker):
                    assert gradients.keys() == right.keys()
                    for name, value in right.items():
                        torch.testing.assert_close(gradients[name], value, rtol=0, atol=1e-12)


def _inputs(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in batch.items() if name in ("x", "labels", "input_ids")}


# ---- what is refused ----


def refused(models, optimizer=None):
    """What the start would say of them; the type comes first where it is raised at once, on every rank."""
    try:
        return refusal(models, optimizer) or ""
    except ValueError as error:
        return f"ValueError: {error}"


def refusals(folder):
    """{case: the error}, of stock programs and of states that accelerate would have."""
    from accelerate import Accelerator

    model, found = fsdp.Awkward(), {}
    Accelerator(cpu=True)
    with _environment("ACCELERATE_USE_FSDP", "true"):
        found["ignored on CPU"] = refused([model])
        found["ignored, but sharded"] = refused([fsdp.by_hand(fsdp.Awkward(), fsdp.hsdp_mesh(2, 2))])
    for name in ("tp_size", "cp_size", "sp_size"):
        AcceleratorState._shared_state["parallelism_config"] = SimpleNamespace(**{name: 2})
        found[name] = refused([model])
    AcceleratorState._shared_state["parallelism_config"] = None
    for name, size in (("tp_size", 2), ("ep_size", 4)):
        planned = fsdp.Awkward()
        planned.config = SimpleNamespace(distributed_config=SimpleNamespace(**{name: size}))
        found[f"planned {name}"] = refused([planned])
    found |= _refused_engines()
    found |= _refused_parameters(folder)
    accelerate = fsdp.prepared(2, 2)
    found["accelerate's FSDP2"] = refused([accelerate.model], accelerate.optimizer)
    accelerate = fsdp.prepared(
        2, 2, model=fsdp.by_hand(fsdp.Awkward(), fsdp.hsdp_mesh(2, 2)), transformer_cls_names_to_wrap=["FSDPBlock"]
    )
    found["two entries"] = refused([accelerate.model], accelerate.optimizer)
    return found


def _refused_parameters(folder):
    from peft import LoraConfig, get_peft_model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    found = {}
    loaded = fsdp.sharded_at_load(folder, 2, 2)
    found["at load"] = refused([loaded], fsdp.sgd(loaded.parameters()))
    lora = get_peft_model(loaded, LoraConfig(target_modules=["q_proj"], r=2))
    trained = fsdp.sgd([p for p in lora.parameters() if p.requires_grad])
    found["adapter"] = refused([lora], trained)
    for p in lora.parameters():
        p.requires_grad_(hasattr(p, "device_mesh"))
    found["frozen adapter"] = refused([lora], fsdp.sgd(lora.parameters()))
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tp"))
    parallel = parallelize_module(nn.Sequential(nn.Linear(4, 4)), mesh["tp"], {"0": ColwiseParallel()})
    found["tensor parallel"] = refused([parallel], fsdp.sgd(parallel.parameters()))
    fully_shard(parallel, mesh=mesh["shard"])
    found["in two dimensions"] = refused([parallel], fsdp.sgd(parallel.parameters()))
    old = object.__new__(FullyShardedDataParallel)  # its constructor wants a GPU
    nn.Module.__init__(old)
    found["FSDP1 wrapper"] = refused([nn.Sequential(old)])
    for name, changes in {
        "resumable": {},
        "model alone": {"save_only_model": True},
        "no saves": {"save_strategy": "no"},
    }.items():
        args = arguments(f"{folder}/{name}", **{"save_strategy": "steps", **changes})
        found[name] = error_of(refuse_resumable_saves, args, loaded)
    found["resumable, whole"] = error_of(
        refuse_resumable_saves, arguments(folder, save_strategy="steps"), fsdp.Awkward()
    )
    return found


def _refused_engines():
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    found = {}
    before = AcceleratorState().distributed_type
    for kind in (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM):
        AcceleratorState._shared_state["distributed_type"] = PartialState._shared_state["distributed_type"] = kind
        AcceleratorState._shared_state["fsdp_plugin"] = SimpleNamespace(fsdp_version=1)
        found[kind.value] = refused([])
    AcceleratorState._shared_state["distributed_type"] = PartialState._shared_state["distributed_type"] = before
    return found


@contextmanager
def _environment(name, value):
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


BY_ACCELERATE = "let accelerator.prepare shard the model: fsdp_version: 2"
REFUSED = {
    "ignored on CPU": ["FSDP was asked for (ACCELERATE_USE_FSDP=true", "MULTI_CPU", "DistributedConfig"],
    "tp_size": ["parallelism_config.tp_size must be 1 for local training, got 2", "Shard with FSDP2"],
    "cp_size": ["parallelism_config.cp_size must be 1 for local training, got 2", "Shard with FSDP2"],
    "sp_size": ["parallelism_config.sp_size must be 1 for local training, got 2", "Shard with FSDP2"],
    "planned tp_size": ["DistributedConfig.tp_size must be 1", "got 2"],
    "planned ep_size": ["DistributedConfig.ep_size must be 1", "got 4"],
    "adapter": ["q_proj.lora_A.default.weight' is trained and not sharded", "(PEFT)", BY_ACCELERATE],
    "tensor parallel": ["'0.weight' is sharded and no FSDP2 module manages it", "tp_size=1"],
    "in two dimensions": ["'0.weight' is sharded in 2 dimensions of its mesh", "tp_size=1"],
    "FSDP1 wrapper": ["FullyShardedDataParallel wrappers", BY_ACCELERATE],
    "two entries": ["is in the optimizer twice, and '", "empty shards have none", BY_ACCELERATE],
    "resumable": ["save_strategy='steps' with save_only_model=False", "save_strategy='no' or save_only_model=True"],
    "DEEPSPEED": ["distributed_type must be", "got DEEPSPEED,", BY_ACCELERATE],
    "FSDP": ["distributed_type must be", "got FSDP, and fsdp_version must be 2, got 1", BY_ACCELERATE],
    "MEGATRON_LM": ["distributed_type must be", "got MEGATRON_LM,"],
}
OF_THE_JOB = (  # all ranks find it: raised at once
    *("ignored on CPU", "tp_size", "cp_size", "sp_size", "resumable", "DEEPSPEED", "FSDP", "MEGATRON_LM"),
)
ACCEPTED = (
    *("ignored, but sharded", "accelerate's FSDP2", "at load", "frozen adapter"),
    *("model alone", "no saves", "resumable, whole"),
)


@pytest.mark.skipif(not fsdp.SHARDS_AT_LOAD, reason="this transformers cannot shard at load over replicas")
def test_what_is_not_supported_is_refused_by_name(tmp_path, subtests):
    results = run_workers(refusals, 4, fsdp.small_llama(tmp_path))
    assert set(results[0]) == {*REFUSED, *ACCEPTED}
    for rank, found in enumerate(results):
        for name, error in found.items():
            with subtests.test(name, rank=rank):
                if name in ACCEPTED or (name == "two entries" and rank % 2 == 0):  # no shard is empty there
                    assert error == ""
                else:
                    assert error.startswith("ValueError: ") == (name in OF_THE_JOB)
                    assert [words for words in REFUSED[name] if words not in error] == [], error
