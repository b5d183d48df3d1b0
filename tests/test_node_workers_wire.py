"""Who talks to whom where workers have two processes, and who waits for whom."""

import inspect
import tempfile
import time

import pytest
import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from harness import run_workers
from node_worker import LR, Gradients, mean_gradient, pairs
from slowmo_hf import SlowMoCallback, SlowMoConfig, SlowMoOptimizer
from tiny import (
    Regression,
    Rows,
    SmallNorm,
    arguments,
    bert,
    equal,
    recorded,
    sentences,
    two_groups,
    values,
)

# ---- the wire: each talks to its mates inside, and to its counterparts outside ----


WIRE_STEPS, TAU, BUCKET_BYTES = 10, 4, 16384
CALLS = """
all_reduce broadcast all_gather all_gather_into_tensor all_to_all reduce reduce_scatter gather scatter barrier
monitored_barrier send recv batch_isend_irecv _broadcast_coalesced
"""


class Wiretap:
    """Who takes part in every collective that Python starts, and its bytes: (step, name, ranks, bytes)."""

    def __init__(self):
        self.heard, self.step = [], 0

    def __enter__(self):
        self._originals = [
            (module, name, getattr(module, name))
            for name in CALLS.split()
            for module in (dist, c10d)
            if hasattr(module, name)
        ]
        for module, name, original in self._originals:
            setattr(module, name, self._listening(name, original))
        return self

    def __exit__(self, *_):
        for module, name, original in self._originals:
            setattr(module, name, original)

    def _listening(self, name, original):
        signature = inspect.signature(original) if name != "_broadcast_coalesced" else None

        def call(*args, **kwargs):
            if signature is None:
                group, tensors = args[0], args[1]
            elif name == "batch_isend_irecv":
                group, tensors = args[0][0].group, [op.tensor for op in args[0] if op.op is dist.isend]
            else:
                given = signature.bind(*args, **kwargs).arguments
                group, tensors = (
                    given.get("group"),
                    [value for value in given.values() if isinstance(value, torch.Tensor)],
                )
            moved = sum(tensor.nbytes for tensor in tensors)
            self.heard.append((self.step, name, tuple(dist.get_process_group_ranks(group or dist.group.WORLD)), moved))
            return original(*args, **kwargs)

        call.__name__ = name
        return call


def _tapped(base):
    from transformers import Trainer, TrainerCallback

    reports, tap = [], Wiretap()

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            tap.step += 1

        def on_step_end(self, args, state, control, **kwargs):
            if callback.last_round and callback.last_round not in reports:
                reports.append(callback.last_round)

    model, callback = bert(), SlowMoCallback(pairs(base=base, sync_every=TAU, bucket_bytes=BUCKET_BYTES))
    args = arguments(tempfile.mkdtemp(), max_steps=WIRE_STEPS)
    trainer = Trainer(model=model, args=args, train_dataset=sentences(), callbacks=[callback, Watch()])
    with tap:
        trainer.train()
    workers = callback.outer_loop.workers
    sent = (
        workers.world.bytes_sent + workers.between.bytes_sent,
        workers.gossip.bytes_sent if base == "sgp" else 0,
        workers.bytes_sent,
    )
    return tap.heard, reports, sent, sum(p.numel() for p in model.parameters() if p.requires_grad)


def _both_tapped():
    return {base: _tapped(base) for base in ("local_sgd", "sgp")}


@pytest.fixture(scope="module")
def tapped():
    return run_workers(_both_tapped, 4)


@pytest.mark.slow
@pytest.mark.parametrize("base", ["local_sgd", "sgp"])
def test_each_process_talks_to_its_counterpart(tapped, base):
    for rank, result in enumerate(tapped):
        heard = result[base][0]
        own, column = ((0, 1), (2, 3))[rank // 2], (rank % 2, rank % 2 + 2)
        outside = {}
        for step, name, ranks, _ in heard:
            if (name, ranks, step % TAU) == ("all_gather", (0, 1, 2, 3), 0):
                continue  # a round's header, a few bytes of every process
            if 1 <= step < WIRE_STEPS and ranks != own:
                assert ranks == column, f"rank {rank}, step {step}: {name} over ranks {ranks}"
                outside.setdefault(step, set()).add(name)
        assert any(ranks == own for step, _, ranks, _ in heard if step == TAU), "a round reaches both processes"
        if base == "local_sgd":
            assert set(outside) == {TAU, 2 * TAU}, f"rank {rank}: {outside}"
        else:
            rounds = (TAU, 2 * TAU)
            assert {step: "batch_isend_irecv" in names for step, names in outside.items()} == {
                s: s not in rounds for s in range(1, 10)
            }


@pytest.mark.slow
@pytest.mark.parametrize("base", ["local_sgd", "sgp"])
def test_bytes_between_workers_are_what_theory_says(tapped, base):
    """
    A ring of 2 sends 2 (2-1)/2 = 1 time the payload, of which each process of a worker has half; the header is 6 fp64
    and a learning rate per group, to 3 others. A report is the worker's.
    """
    for rank, result in enumerate(tapped):
        heard, reports, (between, gossip, both), trainable = result[base]
        column = (rank % 2, rank % 2 + 2)
        calls = [name for step, name, ranks, _ in heard if (step, ranks) == (TAU, column)]
        messages, half = calls.count("all_reduce"), -(-trainable // 2) if rank % 2 == 0 else trainable // 2
        assert messages >= -(-4 * half // BUCKET_BYTES) > 1
        header = 3 * 8 * (10 + 2)
        a_round, exchanges = 4 * (half + messages), (TAU - 1) * 4 * half if base == "sgp" else 0
        of_worker = 4 * (trainable + 2 * messages) + 2 * header + (2 * exchanges if base == "sgp" else 0)
        assert [report.round for report in reports] == [1, 2]
        assert [abs(report.bytes_sent - of_worker) <= 4 * (TAU - 1) for report in reports] == [True, True]
        assert both == between + gossip
        assert between >= 2 * (a_round + header)  # and the look at the end
        for number in (1, 2):
            steps = range((number - 1) * TAU + 1, number * TAU + 1)
            assert sum(moved for step, _, ranks, moved in heard if step in steps and ranks == column) == (
                a_round + exchanges
            )


# ---- workers are not coupled, processes inside one are ----


def _asleep(kind):
    """
    When each step ended, with ranks 2 and 3 asleep at every step; gradients, and what every forward pass finds in
    BatchNorm.
    """
    from transformers import Trainer

    times, buffers = [], []

    class Sleep(Gradients):
        def on_train_begin(self, args, state, control, **kwargs):
            super().on_train_begin(args, state, control, **kwargs)
            times.append(time.perf_counter())

        def on_step_end(self, args, state, control, **kwargs):
            super().on_step_end(args, state, control, **kwargs)
            times.append(time.perf_counter())
            if dist.get_rank() >= 2:
                time.sleep(0.4)

    model, data = (bert(), sentences()) if kind == "bert" else (SmallNorm(), Rows(64, torch.float32))
    if kind == "norm":
        model.norm.register_forward_pre_hook(lambda norm, inputs: buffers.append(values(norm)))
    recorder = Sleep()
    args = arguments(tempfile.mkdtemp(), max_steps=6)
    trainer = Trainer(
        model=model, args=args, train_dataset=data, callbacks=[SlowMoCallback(pairs(sync_every=6)), recorder]
    )
    trainer.train()
    assert trainer.model_wrapped.find_unused_parameters, "Trainer's default"
    return {**recorded(trainer, recorder), "times": [t - times[0] for t in times[1:]], "buffers": buffers}


class TwoHeads(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.heads = torch.nn.ModuleList([torch.nn.Linear(4, 1), torch.nn.Linear(4, 1)])

    def forward(self, x, head):
        return self.heads[head](x).square().mean()


def _unused():
    """
    Rank 1 alone uses the second head. Gradients of the heads' weights, averaged inside the worker, and this process's
    own.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    accelerator = Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
    bare, x, head = TwoHeads(), Rows(3, torch.float32, seed=dist.get_rank()).x, int(dist.get_rank() == 1)
    model, _ = accelerator.prepare(
        bare, SlowMoOptimizer(torch.optim.SGD(bare.parameters(), lr=0.1), pairs(sync_every=9))
    )
    accelerator.backward(model(x, head))
    averaged = [None if h.weight.grad is None else h.weight.grad.clone() for h in bare.heads]
    bare.zero_grad()
    bare(x, head).backward()
    return averaged, bare.heads[head].weight.grad.clone()


def _variants():
    """Gradients of three steps under DDP's own options, and the mean of the worker's two processes."""
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    found, parts = {}, [Rows(3, torch.float32, seed=dist.get_rank() // 2 * 2 + mate) for mate in (0, 1)]
    own = parts[dist.get_rank() % 2]
    for option in ("static_graph", "gradient_as_bucket_view", "find_unused_parameters"):
        accelerator = Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(**{option: True})])
        bare = Regression(torch.float32)
        model, _ = accelerator.prepare(bare, SlowMoOptimizer(two_groups(bare, "sgd", LR), pairs(sync_every=9)))
        found[option] = []
        for _ in range(3):
            model.zero_grad()
            accelerator.backward(model(own.x, own.y)["loss"])
            found[option].append({name: p.grad.clone() for name, p in bare.named_parameters()})
    return found, mean_gradient(values(bare), [(part.x, part.y) for part in parts])


def _hooked():
    """What a DDP communication hook comes to: {case: error or gradient}."""
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    found, own = {}, Rows(3, torch.float32, seed=dist.get_rank())
    for size, static_graph, builtin in ((2, False, False), (2, False, True), (1, True, False), (1, False, False)):
        accelerator = Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(static_graph=static_graph)])
        bare, config = Regression(torch.float32), SlowMoConfig(sync_every=9, processes_per_worker=size)
        model, _ = accelerator.prepare(bare, SlowMoOptimizer(two_groups(bare, "sgd", LR), config))
        if builtin:
            model._register_builtin_comm_hook(dist.BuiltinCommHookType.ALLREDUCE)
        else:
            model.register_comm_hook(None, allreduce_hook)
        try:
            accelerator.backward(model(own.x, own.y)["loss"])
            found[size, static_graph, builtin] = {name: p.grad.clone() for name, p in bare.named_parameters()}
        except ValueError as error:
            found[size, static_graph, builtin] = str(error)
    return found, mean_gradient(values(bare), [(own.x, own.y)])


def _all_asleep():
    runs = {"bert": _asleep("bert"), "norm": _asleep("norm")}
    return {**runs, "unused": _unused(), "variants": _variants(), "hooked": _hooked()}


@pytest.fixture(scope="module")
def asleep():
    return run_workers(_all_asleep, 4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "norm"])
def test_workers_do_not_wait_for_each_other_between_rounds(asleep, kind):
    for rank in (0, 1):
        times = asleep[rank][kind]["times"]
        assert times[4] < 1.5, (rank, times)  # five local steps, while the others sleep 2 s
        assert times[5] > 1.8, (rank, times)  # the round, where it must wait


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "norm"])
def test_processes_of_a_worker_share_gradients_and_buffers(asleep, kind):
    runs = [result[kind] for result in asleep]
    trained = runs[0]["trained"]
    for step in range(6):
        for first in (0, 2):
            leader, follower = runs[first], runs[first + 1]
            assert equal(leader["gradients"][step], follower["gradients"][step]), (kind, step)
            for name in trained:
                assert torch.equal(leader["after"][step][name], follower["after"][step][name]), (kind, step, name)
        assert not equal(runs[0]["gradients"][step], runs[2]["gradients"][step]), "workers are coupled"
    for name in runs[0]["final"]:
        assert all(torch.equal(run["final"][name], runs[0]["final"][name]) for run in runs), name
    if kind == "norm":
        assert len(runs[0]["buffers"]) == 6
        for index in range(6):  # DDP hands out the leader's before every forward pass
            assert equal(runs[0]["buffers"][index], runs[1]["buffers"][index])
            assert equal(runs[2]["buffers"][index], runs[3]["buffers"][index])
            assert equal(runs[0]["buffers"][index], runs[2]["buffers"][index]) == (index == 0)
        assert not equal(runs[0]["stepped"][0], runs[1]["stepped"][0]), "their batches are the same"


@pytest.mark.slow
def test_who_uses_a_parameter_is_asked_inside_the_worker(asleep):
    averaged, own = zip(*[result["unused"] for result in asleep], strict=True)
    for rank in (0, 1):  # each head is used by one of two processes
        for head in (0, 1):
            torch.testing.assert_close(averaged[rank][head], own[head] / 2)
    for rank in (2, 3):
        torch.testing.assert_close(averaged[rank][0], (own[2] + own[3]) / 2)
        assert averaged[rank][1] is None, "the other worker's use of a parameter is nobody's business here"


@pytest.mark.slow
def test_gradients_are_the_workers_mean_under_ddps_options(asleep):
    for result in asleep:
        for option, steps in result["variants"][0].items():
            for gradients in steps:
                for name, right in result["variants"][1].items():
                    torch.testing.assert_close(gradients[name], right, msg=f"{option}: {name}")


@pytest.mark.slow
def test_a_communication_hook_that_would_couple_workers_is_refused(asleep):
    for result in asleep:
        found, own = result["hooked"]
        for case, name in (
            ((2, False, False), "allreduce_hook"),
            ((2, False, True), "ALLREDUCE"),
            ((1, True, False), "allreduce_hook"),
        ):
            assert (
                f"{name}) averages gradients over all processes of the job and cannot be kept inside a worker."
                in found[case]
            ), case
        for name, gradient in found[1, False, False].items():  # DDP exchanges nothing there
            assert torch.equal(gradient, own[name]), name
