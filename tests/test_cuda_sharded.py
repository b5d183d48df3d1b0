"""A loop of one's own over shards on a CUDA device; parameters in main memory; the start (tests/cuda_shards.py)."""

from __future__ import annotations

import itertools
import types

import pytest
import torch
import torch.distributed as dist
from torch import nn

from cuda_shards import (
    CASES,
    STEPS,
    TAU,
    Run,
    alone,
    batch_of,
    config,
    furthest,
    join,
    on_cpu,
    on_each,
    over_each_backend,
)
from harness import run_workers
from slowmo_hf import SlowMoOptimizer, last_round
from slowmo_hf.dtensors import as_described, described, is_sharded, let_reads_end, local
from slowmo_hf.training import parts
from tiny import equal, error_of

IN_BOTH = ("slow momentum", "overlapped")
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5}  # absolute: parameters are of size 1


# ---- a loop of one's own ----


def apart(first, second):
    """How far two runs part at the worst, and how far the model has come."""
    assert first.optimizer.outer_loop is None
    start, paths = on_cpu(second.bare), [first.path(), second.path()]
    rounds = [last_round(run.optimizer).round for run in (first, second)]
    assert rounds[0] == rounds[1] == STEPS // TAU, rounds
    return max(itertools.starmap(furthest, zip(*paths, strict=True))), furthest(paths[0][-1], start)


def check_rounds(folder, device, backend):
    join(folder, device, backend)
    found = {}
    for name, more in CASES.items():
        for dtype in TOLERANCES if name in IN_BOTH else (torch.float64,):
            pair = [Run(device, config(**more), dtype=dtype, sharded=sharded) for sharded in (True, False)]
            found[name, dtype] = apart(*pair)
        found[name] = pair[0].places()
    steps = {"clip": 0.05, "accumulation": 2}
    found["clipped", torch.float64] = apart(
        *[Run(device, config(), sharded=sharded, **steps) for sharded in (True, False)]
    )
    dist.destroy_process_group()
    return found


@pytest.mark.slow
@over_each_backend
def test_rounds_of_shards_are_those_of_the_plain_model(tmp_path, device, backend):
    found = alone(check_rounds, tmp_path, device, backend, time_limit_seconds=170)
    for key, result in found.items():
        if isinstance(key, tuple):
            parted, moved = result
            assert parted <= TOLERANCES[key[1]], (key, parted)
            assert moved > 0.01, "it trains"
        else:
            in_main_memory = CASES[key].get("slow_state_device") == "cpu" or device == "cpu"
            assert result == {("cpu", device == "cuda") if in_main_memory else ("cuda", False)}, key


def check_bf16(folder, device):
    from torch.distributed.fsdp import MixedPrecisionPolicy

    join(folder, device)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    slow, wide = config(), {"dtype": torch.float32}
    sharded = Run(device, slow, sharded=True, mp_policy=policy, **wide)
    found = apart(sharded, Run(device, slow, in_bf16=True, **wide))
    state = sharded.optimizer.inner_optimizer.state
    dtypes = {value.dtype for of_one in state.values() for key, value in of_one.items() if key != "step"}
    dist.destroy_process_group()
    return found, dtypes


@on_each
def test_mixed_precision_in_bf16_is_that_of_the_plain_model(tmp_path, device):
    """Parameters, their optimizer's state and rounds in fp32, forward and backward passes in bf16."""
    (parted, moved), dtypes = alone(check_bf16, tmp_path, device)
    assert parted <= 1e-4
    assert moved > 0.01
    assert dtypes == {torch.float32}


# ---- parameters in main memory ----


def offload(device):
    from torch.distributed.fsdp import CPUOffloadPolicy

    return {"offload_policy": CPUOffloadPolicy(pin_memory=device == "cuda")}  # torch pins beside a card alone


def check_offload(folder, device, backend):
    join(folder, device, backend)
    found = {}
    for name, more in CASES.items():
        run = Run(device, config(**more), sharded=True, **offload(device))
        found[name] = apart(run, Run(device, config(**more)))
        assert {p.device.type for p in run.bare.parameters()} == {"cpu"}
        assert {place for place, _ in run.places()} == {"cpu"}
        assert run.bare.level.device.type == device
    if backend != "nccl":  # the norm of gradients in main memory
        pair = [Run(device, config(), clip=0.05), Run(device, config(), clip=0.05, sharded=True, **offload(device))]
        found["clipped"] = apart(*pair)
    found["evaluated"] = max(evaluated_late(device, offload(device)))
    found["kept"] = kept_shards(device)
    dist.destroy_process_group()
    return found


def evaluated_late(device, settings):
    """
    An evaluation of the last round's model is left before the card has begun with it: how far its loss is off, and
    the local weights behind it.
    """
    runs = [Run(device, config(), dtype=torch.float64), Run(device, config(), sharded=True, **settings)]
    for run in runs:
        for _ in range(TAU + 1):
            run.step()
    before, losses = [on_cpu(run.bare) for run in runs], []
    for run in runs:
        batch = batch_of(0, device)
        run.model.eval()
        with torch.no_grad():
            if device == "cuda":
                torch.cuda._sleep(2 * 10**9)  # cycles: a second
            losses.append(run.model(**batch)["loss"])
        run.model.train()
    assert equal(before[1], on_cpu(runs[1].bare))
    return float((losses[0] - losses[1]).abs()), furthest(*[on_cpu(run.bare) for run in runs])


def kept_shards(device):
    """A shard that is taken up from a file lies where its parameter does; whether all values are the same."""
    run = Run(device, config(), sharded=True, **offload(device))
    same = []
    for p in run.bare.parameters():
        own = torch.randn_like(local(p).detach()).cpu()
        again = as_described(own, described(p.detach(), p), p)
        same.append(is_sharded(again) and again.device == p.device and torch.equal(local(again), own))
    return same


@pytest.mark.slow
@over_each_backend
def test_parameters_in_main_memory(tmp_path, device, backend):
    """In a world of one nothing of ours is sent, so NCCL alone will do there."""
    found = alone(check_offload, tmp_path, device, backend, time_limit_seconds=170)
    assert all(found.pop("kept"))
    assert found.pop("evaluated") <= 1e-12
    for name, (parted, moved) in found.items():
        assert parted <= 1e-12, name
        assert moved > 0.01, name


def in_main_memory_beside_a_card(folder, device):
    join(folder, device)
    run = Run("cpu", config(), sharded=True)
    shards = [p.detach() for p in run.bare.parameters()]
    for shard in shards:
        shard.device_mesh._device_type = "cuda"  # as under CPUOffloadPolicy; its values would be brought there
    own = [torch.randn_like(local(shard)) for shard in shards]
    again = [as_described(mine, described(shard, shard), shard) for mine, shard in zip(own, shards, strict=True)]
    same = [torch.equal(local(shard), mine) for mine, shard in zip(own, again, strict=True)]
    return same, [shard.requires_grad for shard in again], [not is_sharded(shard) for shard in again]


def test_a_shard_in_main_memory_is_taken_up_there(tmp_path):
    same, *others = alone(in_main_memory_beside_a_card, tmp_path, "cpu")
    assert all(same)
    assert not any(map(any, others))


def refused_backend(carriers):
    parts.backends = lambda: carriers
    optimizer = SlowMoOptimizer(torch.optim.SGD([nn.Parameter(torch.zeros(3))], lr=0.1), config())
    return error_of(optimizer.begun)


def test_a_backend_that_reaches_cards_alone_is_refused_on_every_rank():
    refused = run_workers(refused_backend, 2, {"cuda": "nccl"})
    assert refused[0] == refused[1]
    assert "'cpu', from which the job's backend (cuda:nccl) carries nothing" in refused[0]
    assert 'init_process_group(backend="cpu:gloo,cuda:nccl")' in refused[0]
    assert run_workers(refused_backend, 2, {"cpu": "gloo", "cuda": "nccl"}) == ["", ""]


def test_a_view_waits_for_copies_of_main_memory_alone(monkeypatch):
    waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(1))

    def shard(place, mesh):
        return types.SimpleNamespace(
            to_local=None, device=torch.device(place), device_mesh=types.SimpleNamespace(device_type=mesh)
        )

    let_reads_end([torch.zeros(2), shard("cpu", "cpu"), shard("meta", "cuda")])
    assert not waits
    let_reads_end([torch.zeros(2), shard("cpu", "cuda"), shard("cpu", "cuda")])
    assert waits == [1]


# ---- the start ----


def check_digest(folder, device):
    from slowmo_hf.algorithm.digest import digest

    join(folder, device)
    found = []
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        run = Run(device, config(), dtype=dtype, sharded=True)
        for p in run.bare.parameters():
            found.append((int(digest(p)), int(digest(local(p).detach().cpu()))))
    dist.destroy_process_group()
    return found


@on_each
def test_digests_of_shards_are_those_of_the_cpu(tmp_path, device):
    found = alone(check_digest, tmp_path, device)
    assert found
    assert len({mine for mine, _ in found}) > len(found) // 2
    for mine, right in found:
        assert mine == right
