"""
Sharded models (FSDP2) on a CUDA device, in a world of one over NCCL: the same as the plain model with the same
optimizer on the same data, by a loop of one's own, by Accelerate and by Trainer; precision, main memory, evaluations,
resume, `torch.compile`, memory. What can run on the CPU, over gloo, runs there too.
"""

from __future__ import annotations

import itertools
import os
import shutil
import types
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fsdp
from devices import CUDA, join_alone, take
from harness import patience, rank_environment, run_workers
from memory import allocated, taken
from slowmo_hf import SlowMoCallback, SlowMoConfig, SlowMoOptimizer, consensus, last_round, register_for_checkpointing
from slowmo_hf.dtensors import as_described, described, is_sharded, let_reads_end, local
from slowmo_hf.training import parts
from tiny import arguments, equal, error_of

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
IN_BOTH = ("slow momentum", "overlapped")
KINDS = ("FULL_STATE_DICT", "SHARDED_STATE_DICT")
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5}  # absolute: parameters are of size 1

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


# ---- a loop of one's own ----


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
