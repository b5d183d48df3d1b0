"""FSDP2 and HSDP: gradients stay inside a worker, on every route."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fsdp
from harness import patience, run_workers
from slowmo_hf import SlowMoConfig, SlowMoOptimizer
from slowmo_hf.adapters.first_pass import is_before_prepare, refuse_separate_gradients, trains, whole_model
from slowmo_hf.adapters.fully_sharded import ShardedIsolation, sharded_roots
from slowmo_hf.adapters.isolation import Isolation, refusal
from slowmo_hf.adapters.trainer_start import refuse_wrong_launch
from slowmo_hf.dtensors import sharded_modules
from slowmo_hf.upstream import fsdp_parameter_groups, fsdp_reshard
from tiny import error_of

pytestmark = fsdp.NEEDED
SHARDS = 2


class Route:
    """A sharded model, how its loss is computed, and one process's model for the right values."""

    def __init__(self, model: nn.Module, whole: Any = fsdp.Awkward, rows: Any = None, backward: Any = None) -> None:
        self.model, self.whole = model, whole
        self.rows = rows or fsdp.Tokens().batch
        self.backward = backward or (lambda loss: loss.backward())
        self.rank, self.world = dist.get_rank(), dist.get_world_size()

    def passes(self, batches: list[int]) -> dict[str, torch.Tensor]:
        self.model.zero_grad()
        for place in batches:
            loss = self.model(**self.rows(4 * (self.world * place + self.rank)))["loss"]
            self.backward(loss / len(batches))
        return fsdp.full_gradients(self.model)

    def right(self, ranks: Any, batches: list[int]) -> dict[str, torch.Tensor]:
        return fsdp.whole_gradients(
            [self.rows(4 * (self.world * b + r)) for b in batches for r in ranks], self.whole()
        )

    def error(self, of: str, gradients: dict[str, torch.Tensor], batches: Any = (0,), shards: int = SHARDS) -> float:
        """The largest difference from the mean over a worker's rows, or the world's; infinite where one is None."""
        first = self.rank // shards * shards
        right = self.right(range(first, first + shards) if of == "worker" else range(self.world), batches)
        if gradients.keys() != right.keys():
            return float("inf")
        return max(float((gradients[name] - right[name]).abs().max()) for name in right)


def measured(route: Route, *, early: bool, shards: int = SHARDS) -> dict[str, float]:
    """
    What a route gives stock, isolated and released; `early` isolates before the first forward pass. Differences are
    from the mean that is right there.
    """
    found: dict[str, float] = {}
    modules = sharded_modules([route.model])
    couples = fsdp_parameter_groups(modules[0])[0].mesh_info.replicate_mesh_dim is not None
    stock = "world" if couples else "worker"
    if not early:
        with fsdp.Coupled(shards) as seen:
            found["stock"] = route.error(stock, route.passes([0]), shards=shards)
        found["stock sends"] = seen.between
    isolation = ShardedIsolation(modules)
    with fsdp.Coupled(shards) as seen:
        first = route.passes([0])
        found["isolated"] = route.error("worker", first, shards=shards)
        found["of the world"] = route.error("world", first, shards=shards)
        found["accumulated"] = route.error("worker", accumulated(route), (0, 1), shards)
        norm = torch.nn.utils.clip_grad_norm_(route.model.parameters(), 1e-3)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        clipped = fsdp.norm_of(fsdp.full_gradients(route.model))
    first_rank = route.rank // shards * shards
    right = fsdp.norm_of(route.right(range(first_rank, first_rank + shards), [0, 1]))
    found["norm"] = abs(float(norm) / right - 1)
    found["clipped"] = abs(clipped / (1e-3 * right / (right + 1e-6)) - 1)  # torch's 1e-6
    found["isolated sends"], found["collectives"] = seen.between, seen.all
    isolation.release()
    found["released"] = route.error(stock, route.passes([0]), shards=shards)
    again = ShardedIsolation(sharded_modules([route.model]))
    found["again"] = route.error("worker", route.passes([0]), shards=shards)
    again.release()
    return found


def accumulated(route: Route) -> dict[str, torch.Tensor]:
    """Two micro-batches, the first one without gradient sync, as `no_sync` does it for FSDP2."""
    route.model.zero_grad()
    for place, syncs in ((0, False), (1, True)):
        for module in sharded_modules([route.model]):
            module.set_requires_gradient_sync(syncs)
        loss = route.model(**route.rows(4 * (route.world * place + route.rank)))["loss"]
        route.backward(loss / 2)
    return fsdp.full_gradients(route.model)


def with_checkpointing(model: nn.Module) -> nn.Module:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, fsdp.Block))
    return model


def on_every_route(folder: str) -> dict[str, dict[str, float]]:
    hsdp, machine = fsdp.hsdp_mesh(2, 2), fsdp.machine_mesh(2)
    found = {}
    for reshards in (True, False):
        for early in (True, False):
            route = Route(fsdp.by_hand(fsdp.Awkward(), hsdp, reshard_after_forward=reshards))
            found[f"by hand, reshard={reshards}, early={early}"] = measured(route, early=early)
    found["automatic"] = measured(Route(fsdp.by_hand(fsdp.Awkward(), hsdp)), early=True)
    found["machine's own mesh"] = measured(Route(fsdp.by_hand(fsdp.Awkward(), machine)), early=False)
    model = fsdp.by_hand(with_checkpointing(fsdp.Awkward()), hsdp)
    route = Route(model, whole=lambda: with_checkpointing(fsdp.Awkward()))
    found["checkpointing"] = measured(route, early=False)
    model = fsdp.Awkward()
    for block in model.blocks:
        block.compile(backend="aot_eager")
    found["compiled"] = measured(Route(fsdp.by_hand(model, hsdp)), early=True)
    rows = fsdp.texts()

    def batch(first: int) -> dict[str, torch.Tensor]:
        ids = torch.stack([row["input_ids"] for row in rows[first : first + 4]])
        return {"input_ids": ids, "labels": ids}

    def whole() -> nn.Module:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).train()

    for early in (True, False) if fsdp.SHARDS_AT_LOAD else ():
        model = fsdp.sharded_at_load(folder, 2, 2).train()
        found[f"at load, early={early}"] = measured(Route(model, whole, batch), early=early)
    for early in (True, False):
        accelerate = fsdp.prepared(2, 2, accumulation=2)
        found[f"accelerate, early={early}"] = measured(Route(accelerate.model), early=early)
    found["accelerate's own"] = accelerates_own(accelerate)
    return found


def accelerates_own(accelerate: fsdp.Prepared) -> dict[str, float]:
    """`accumulate`, `backward` and `clip_grad_norm_` of accelerate, isolated."""
    accelerator, model = accelerate.accelerator, accelerate.model
    isolation, route = ShardedIsolation(sharded_modules([model])), Route(model)
    model.zero_grad()
    with fsdp.Coupled() as seen:
        for place in (0, 1):
            with accelerator.accumulate(model):
                accelerator.backward(accelerate.loss(route.rows(4 * (4 * place + route.rank))))
        error = route.error("worker", fsdp.full_gradients(model), (0, 1))
        norm = accelerator.clip_grad_norm_(model.parameters(), 1e-3)
    isolation.release()
    first = route.rank // 2 * 2
    right = fsdp.norm_of(route.right(range(first, first + 2), [0, 1]))
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return {"isolated": error, "norm": abs(float(norm) / right - 1), "isolated sends": seen.between}


@pytest.fixture(scope="module")
def routes(tmp_path_factory):
    folder = fsdp.small_llama(tmp_path_factory.mktemp("llama"))
    return run_workers(on_every_route, 4, folder, time_limit_seconds=150)


def test_gradients_are_the_workers_own_mean(routes, subtests):
    exact = ("stock", "isolated", "accumulated", "clipped", "norm", "released", "again")
    for rank, found in enumerate(routes):
        for name, values in found.items():
            with subtests.test(f"{name}, rank {rank}"):
                wrong = {what: values[what] for what in exact if values.get(what, 0) > 1e-12}
                assert not wrong, values
                assert values.get("of the world", 1) > 1e-3, "the test could not tell"


def test_a_local_step_sends_nothing_to_another_worker(routes, subtests):
    """And the stock one does, on every route whose mesh has replicas."""
    for rank, found in enumerate(routes):
        for name, values in found.items():
            with subtests.test(f"{name}, rank {rank}"):
                assert values["isolated sends"] == 0
                assert values.get("collectives", 1) > 0
                assert bool(values.get("stock sends", "machine" not in name)) == ("machine" not in name)


# ---- eight processes: shards of four, gathered again from two ----


def over_four():
    mesh, found = fsdp.hsdp_mesh(4, 2), {}
    for early in (True, False):
        model = fsdp.by_hand(fsdp.Awkward(), mesh, reshard_after_forward=2)
        found[f"early={early}"] = measured(Route(model), early=early, shards=4)
    return found, [p.to_local().numel() for p in model.parameters()]


def test_reshard_after_forward_to_fewer_processes(subtests):
    """`post_forward_mesh_info` is another object there, over neighbours among the shards: it stays."""
    results = run_workers(over_four, 8)
    assert any(0 in sizes for _, sizes in results), "no shard is empty"
    for rank, (found, _) in enumerate(results):
        for name, values in found.items():
            with subtests.test(f"{name}, rank {rank}"):
                exact = ("stock", "isolated", "accumulated", "clipped", "norm", "released", "again")
                assert not {what: values[what] for what in exact if values.get(what, 0) > 1e-12}
                assert values["isolated sends"] == 0
                assert values.get("stock sends", 1) > 0


# ---- one launch for what is not a gradient ----


def in_one_launch():
    mesh, machine, rank = fsdp.hsdp_mesh(2, 2), fsdp.machine_mesh(2), dist.get_rank()
    return {
        "stale": stale_copies(mesh),
        "bf16": in_bf16(mesh, machine),
        "known": known_after_an_evaluation(mesh),
        "other torch": on_another_torch(mesh),
        "hook": with_a_hook(mesh),
        "norms": with_batch_norms(mesh),
        "alone": one_worker_goes_on(mesh, rank),
    }


def stale_copies(mesh):
    """A write of zeros into shards after a forward pass without a backward: losses without and with `reshard`."""
    model = fsdp.by_hand(fsdp.Awkward(), mesh)
    isolation = ShardedIsolation(sharded_modules([model]))
    rows = fsdp.Tokens().batch(0)
    zeros = fsdp.Awkward()
    for p in zeros.parameters():
        p.data.zero_()
    with torch.no_grad():
        model(**rows)
        held = [p for module in sharded_modules([model]) for p in _sharded(module)]
        for p in held:
            p.to_local().zero_()
        without = float(model(**rows)["loss"])
        fsdp_reshard(sharded_modules([model]))
        names = {name for name, p in model.named_parameters() if hasattr(p, "device_mesh")}
        with_it = float(model(**rows)["loss"])
        right = float(zeros(**rows)["loss"])
    isolation.release()
    return without, with_it, right, names == {name for name, _ in zeros.named_parameters()}


def _sharded(module):
    return [one.sharded_param for group in fsdp_parameter_groups(module) for one in group.fsdp_params]


def in_bf16(mesh, machine):
    """Bit for bit the gradients of the machine's own mesh, which stock FSDP2 averages inside."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    found = []
    for over in (mesh, machine):
        model = fsdp.by_hand(fsdp.Awkward(torch.float32), over, mp_policy=policy)
        isolation = ShardedIsolation(sharded_modules([model]))
        found.append(Route(model).passes([0]))
        isolation.release()
    stock = Route(fsdp.by_hand(fsdp.Awkward(torch.float32), mesh, mp_policy=policy)).passes([0])
    return (
        all(torch.equal(found[0][name], found[1][name]) for name in found[1]),
        any(not torch.equal(stock[name], found[1][name]) for name in stock),
    )


def known_after_an_evaluation(mesh):
    """A gathered model has other parameters than its optimizer; it is known all the same, as is one not yet called."""
    model = fsdp.by_hand(fsdp.Awkward(), mesh, reshard_after_forward=False)
    optimizer = SlowMoOptimizer(fsdp.sgd(model.parameters()))
    other = fsdp.by_hand(fsdp.Awkward(), mesh)
    with torch.no_grad():
        model(**fsdp.Tokens().batch(0))
    gathered = {id(p) for p in model.parameters()}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    args = SimpleNamespace(world_size=4)
    return {
        "gathered": not any(id(p) in gathered for p in held),
        "trains": trains(optimizer, model),
        "other trains": trains(optimizer, other),
        "whole": whole_model(optimizer, model) == [model],
        "roots": [one is model for one in sharded_roots(optimizer)],
        "before prepare": is_before_prepare(optimizer, model),
        "launch": error_of(refuse_wrong_launch, args, sharded_modules([model])),
        "launch without": error_of(refuse_wrong_launch, args, []),
        "gradients": error_of(refuse_separate_gradients, SlowMoConfig(), 2, [model]),
        "gradients without": error_of(refuse_separate_gradients, SlowMoConfig(), 2, [fsdp.Awkward()]),
        "refused": refusal([model], optimizer.inner_optimizer) or "",
        "resharded": {id(p) for p in model.parameters()} == {id(p) for p in held},
    }


def on_another_torch(mesh):
    """One that knows of replicas in another place too: refused, and everything is as it was."""
    model = fsdp.by_hand(fsdp.Awkward(), mesh)
    groups = [group for module in sharded_modules([model]) for group in fsdp_parameter_groups(module)]
    before = [(group.mesh_info, group.post_forward_mesh_info) for group in groups]
    groups[0].reduces_over = groups[0].mesh_info
    error = error_of(ShardedIsolation, sharded_modules([model]))
    after = [(group.mesh_info, group.post_forward_mesh_info) for group in groups]
    return error, all(a is b for x, y in zip(before, after, strict=True) for a, b in zip(x, y, strict=True))


def with_a_hook(mesh):
    model = fsdp.by_hand(fsdp.Awkward(), mesh)

    def averages_over_all(gradient):
        dist.all_reduce(gradient)

    sharded_modules([model])[0].set_all_reduce_hook(averages_over_all)
    return error_of(ShardedIsolation, sharded_modules([model]))


def with_batch_norms(mesh):
    """SyncBatchNorm's group: the worker's, while it is isolated."""
    model = fsdp.Awkward()
    model.blocks[0].batch = nn.SyncBatchNorm(3, dtype=torch.float64)
    fsdp.by_hand(model, mesh)
    norm = model.blocks[0].batch
    isolation = ShardedIsolation(sharded_modules([model]))
    during = dist.get_process_group_ranks(norm.process_group)
    isolation.release()
    own = dist.new_group(list(range(4)))
    given = ShardedIsolation(sharded_modules([model]), own)
    taken = norm.process_group is own
    given.release()
    return during, taken, norm.process_group is None


def one_worker_goes_on(mesh, rank):
    """Seconds of three clipped steps of worker 0, while worker 1 sleeps for longer before its own."""
    model = fsdp.by_hand(fsdp.Awkward(), mesh)
    optimizer = fsdp.sgd(model.parameters())
    isolation = Isolation([], None, sharded_modules([model]))
    dist.barrier()
    began = time.monotonic()
    if rank >= 2:
        time.sleep(1.5 * patience(2))
    for step in range(3):
        model(**fsdp.Tokens().batch(4 * (4 * step + rank)))["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.monotonic() - began
    dist.barrier()
    weights = fsdp.full_values(model)
    isolation.release()
    return seconds, {name: weights[name] for name, _ in model.named_parameters()}


@pytest.fixture(scope="module")
def launch():
    return run_workers(in_one_launch, 4)


def test_a_write_into_shards_is_seen_after_reshard(launch):
    for found in launch:
        without, with_it, right, names = found["stale"]
        assert with_it == right
        assert abs(without - right) > 1e-2, "nothing was stale"
        assert names


def test_mixed_precision_is_the_machines_own(launch):
    assert [found["bf16"] for found in launch] == [(True, True)] * 4


def test_a_model_that_was_evaluated_first_is_known(launch):
    for found in launch:
        known = found["known"]
        assert known["gathered"], "the test needs a gathered model"
        assert known["trains"]
        assert not known["other trains"]
        assert known["whole"]
        assert known["roots"] == [True]
        assert not known["before prepare"]
        assert known["launch"] == known["gradients"] == known["refused"] == ""
        assert "no DistributedDataParallel wrapper" in known["launch without"]
        assert (
            "needs a DistributedDataParallel wrapper that averages gradients, or FSDP2" in known["gradients without"]
        )
        assert known["resharded"]


def test_a_torch_that_would_couple_workers_is_refused(launch):
    for found in launch:
        error, as_it_was = found["other torch"]
        assert error.startswith(f"RuntimeError: torch {torch.__version__} keeps FSDP2's replicas in reduces_over too")
        assert as_it_was


def test_what_would_couple_workers_is_refused(launch):
    for found in launch:
        assert found["hook"].startswith("ValueError: set_all_reduce_hook (with_a_hook.<locals>.averages_over_all)")


def test_synchronised_batch_norm_meets_the_worker(launch):
    for rank, found in enumerate(launch):
        first = rank // 2 * 2
        assert found["norms"] == ([first, first + 1], True, True)


def test_a_worker_waits_for_nobody(launch):
    seconds = [found["alone"][0] for found in launch]
    assert max(seconds[:2]) < patience(2) < min(seconds[2:])
    weights = [found["alone"][1] for found in launch]
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name])
        assert torch.equal(weights[2][name], weights[3][name])
    assert any(not torch.equal(value, weights[2][name]) for name, value in weights[0].items())
