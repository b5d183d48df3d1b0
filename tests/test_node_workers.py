"""
Workers of several processes: gradients are averaged inside at every step, and each process talks to its counterparts
in other workers about its own part of the model.
"""

import inspect
import logging
import os
import re
import socket
import tempfile
import time

import pytest
import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from harness import patience, run_workers
from reference import gossip_reference, slowmo_reference
from slowmo_hf import SlowMoCallback, SlowMoConfig, SlowMoOptimizer, consensus, register_for_checkpointing
from slowmo_hf.adapters.isolation import ddp_wrappers
from slowmo_hf.config import GOSSIP_BASES
from slowmo_hf.training.outer_loop import OuterLoop
from slowmo_hf.wire.gossip import make_topology
from tiny import (
    Recorder,
    Regression,
    Rows,
    SmallNorm,
    arguments,
    bert,
    equal,
    follow,
    recorded,
    sentences,
    two_groups,
    values,
    warmup_and_decay,
)

# ---- 2 workers of 2 processes are 2 workers, each with both processes' batches ----

STEPS, ACCUMULATION, BATCH, LOOK = 10, 2, 3, 7
LR = 0.05


def _pairs(**settings):
    return SlowMoConfig(processes_per_worker=2, **settings)


CASES = [  # (inner optimizer, settings)
    ("sgd", _pairs(sync_every=4, inner_state="reset")),
    ("adamw", _pairs(sync_every=4, inner_state="maintain")),
    ("sgd", _pairs(sync_every=3, outer_momentum=0, inner_state="average")),
    ("sgd", _pairs(sync_every=5, base="sgp")),
    ("adamw", _pairs(sync_every=4, base="osgp", staleness=1)),
    ("sgd", _pairs(sync_every=5, base="sgp", exact_average=False, inner_state="maintain")),
    # One worker: nothing between, the outer update still acts.
    (
        "sgd",
        SlowMoConfig(processes_per_worker=4, sync_every=4),
    ),
]


def _accelerate(case):
    """
    (batches seen, parameters after every step, the average looked at after step LOOK and at the end) of this process.
    """
    from accelerate import Accelerator

    name, config = case
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATION)
    bare, rows = Regression(), Rows(300)
    optimizer = two_groups(bare, name, LR)
    model, optimizer = accelerator.prepare(bare, SlowMoOptimizer(optimizer, config))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer.optimizer.inner_optimizer, warmup_and_decay)
    after, looks = [], {}
    for micro in range(STEPS * ACCUMULATION):
        start = (micro * dist.get_world_size() + dist.get_rank()) * BATCH
        with accelerator.accumulate(model):
            accelerator.backward(model(rows.x[start : start + BATCH], rows.y[start : start + BATCH])["loss"])
            optimizer.step()
            if accelerator.sync_gradients:
                scheduler.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            after.append(values(bare))
        if len(after) in (LOOK, STEPS) and len(after) not in looks:
            with consensus(optimizer):
                looks[len(after)] = values(bare)
            assert equal(after[-1], values(bare)), "local weights return bit for bit"
    return {"seen": bare.seen, "after": after, "looks": looks}


def _trainer(case):
    """The same of a stock Trainer, which trains a second time; afterwards its DDP wrappers are as stock made them."""
    from transformers import Trainer

    name, config = case
    model, recorder = Regression(), Recorder()
    optimizer = two_groups(model, name, LR)
    args = arguments(
        tempfile.mkdtemp(),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=ACCUMULATION,
        max_grad_norm=0,
        eval_strategy="steps",
        eval_steps=LOOK,
    )
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=Rows(300),
        eval_dataset=Rows(8),
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_and_decay)),
        callbacks=[recorder, SlowMoCallback(config)],
    )
    trainer.train()
    run = recorded(trainer, recorder)
    return {"seen": model.seen, "after": run["after"], "looks": {**run["evaluated"], STEPS: run["final"]}}


def _expected(case, seen, steps):
    """
    (each worker's parameters, the average) by the reference. A worker's gradient is the mean of its processes'
    gradients.
    """
    name, config = case
    size = int(config.processes_per_worker)
    count = len(seen) // size

    def make_worker(worker):
        model = Regression()
        optimizer = two_groups(model, name, LR)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_and_decay)

        def backward(step):
            optimizer.zero_grad()
            for batches in seen[worker * size : (worker + 1) * size]:
                for x, y in batches[step * ACCUMULATION : (step + 1) * ACCUMULATION]:
                    (model(x, y)["loss"] / ACCUMULATION / size).backward()

        return list(model.parameters()), optimizer, backward, scheduler.step

    policy = config.inner_state
    if policy == "auto":
        policy = "reset" if name == "sgd" else "maintain"
    run = (make_worker, count, steps, config.sync_every, config.outer_lr, config.outer_momentum, policy)
    if config.base not in GOSSIP_BASES:
        workers = slowmo_reference(*run)
        return workers, [sum(tensors) / count for tensors in zip(*workers, strict=True)]
    staleness = config.staleness if config.base == "osgp" else 0
    mixing = make_topology(config, count).mixing_matrix
    ends = gossip_reference(*run, mixing=mixing, staleness=staleness, exact_average=config.exact_average)
    return [end.z for end in ends], ends[0].average


def _compare(case, runs):
    size = int(case[1].processes_per_worker)
    seen = [run["seen"] for run in runs]
    first_batches = [batches[0][0] for batches in seen]
    assert all(not torch.equal(first_batches[0], other) for other in first_batches[1:]), (
        "every process must train on data of its own"
    )
    for step in range(STEPS):
        for rank, run in enumerate(runs):
            leader = runs[rank - rank % size]
            assert equal(run["after"][step], leader["after"][step]), (
                f"{case}: step {step + 1} parts rank {rank} from its leader"
            )
    for steps in (LOOK, STEPS):
        workers, average = _expected(case, seen, steps)
        for rank, run in enumerate(runs):
            assert equal(run["looks"][steps], runs[0]["looks"][steps]), (
                f"{case}: rank {rank} looks at another average than rank 0"
            )
            for name, mine, right in zip(run["looks"][steps], run["looks"][steps].values(), average, strict=True):
                assert (mine - right).abs().max() <= 1e-9, (case, rank, steps, name)
            for mine, right in zip(run["after"][steps - 1].values(), workers[rank // size], strict=True):
                assert (mine - right).abs().max() <= 1e-9, (case, rank, steps)


def _both_surfaces():
    return [(_accelerate(case), _trainer(case)) for case in CASES]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")
def test_workers_of_two_processes_match_the_paper():
    results = run_workers(_both_surfaces, 4)
    for index, case in enumerate(CASES):
        for surface in (0, 1):
            _compare(case, [result[index][surface] for result in results])


class Gradients(Recorder):
    """The parameters before each inner step, and the gradient that it takes."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.before, self.gradients = [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.before.append(values(model))
        self.gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})


def _gradients_of_stock_ddp(model, size):
    """
    What every wrapper that Trainer has left gives for batches that differ between ranks, and the mean over `size`
    neighbours.
    """
    first = dist.get_rank() // size * size
    parts = [Rows(2, seed=rank) for rank in range(first, first + size)]
    model.zero_grad()
    for part in parts:
        (model(part.x, part.y)["loss"] / size).backward()
    right, found = [p.grad.clone() for p in model.parameters()], []
    own = Rows(2, seed=dist.get_rank())
    for ddp in ddp_wrappers(model.parameters()):
        for _ in range(3):  # the buckets are rebuilt at the second
            model.zero_grad()
            ddp(own.x, own.y)["loss"].backward()
            found.append([p.grad.clone() for p in model.parameters()])
    return found, right


def _train_again_and_again():
    from transformers import Trainer

    model, recorder, callback = Regression(), Gradients(), SlowMoCallback(_pairs(sync_every=3))
    args = arguments(tempfile.mkdtemp(), max_steps=6, max_grad_norm=0, lr_scheduler_type="constant")
    # The last round resets its momentum, so stock training is stock.
    sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    trainer = Trainer(
        model=model, args=args, train_dataset=Rows(200), optimizers=(sgd, None), callbacks=[recorder, callback]
    )
    runs, after = [], []
    for _ in range(2):
        model.seen.clear()
        trainer.train()
        runs.append({**recorded(trainer, recorder), "seen": list(model.seen)})
        after.append(_gradients_of_stock_ddp(model, 4))
    trainer.remove_callback(callback)
    model.seen.clear()
    trainer.train()
    runs.append({**recorded(trainer, recorder), "seen": list(model.seen)})
    return runs, after, dist.get_world_size(trainer.model_wrapped.process_group)


def test_training_again_and_stock_training_afterwards():
    results = run_workers(_train_again_and_again, 4)
    for number, size in enumerate((2, 2, 4)):
        runs = [result[0][number] for result in results]
        for rank, run in enumerate(runs):
            mates = runs[rank // size * size :][:size]
            for step, (before, gradients) in enumerate(zip(run["before"], run["gradients"], strict=True)):
                for name, right in _mean_gradient(before, [mate["seen"][step] for mate in mates]).items():
                    assert (gradients[name] - right).abs().max() <= 1e-12, (
                        f"train() {number + 1}, step {step + 1}, rank {rank}: {name}"
                    )
                assert all(equal(run["after"][step], mate["after"][step]) for mate in mates)
        if size == 2:
            assert follow(runs[::2], _pairs(sync_every=3), tolerance=1e-12) == 2
    for _, after, world in results:
        assert world == 4
        for wrappers, right in after:
            assert wrappers
            for found in wrappers:
                for mine, theirs in zip(found, right, strict=True):
                    assert (mine - theirs).abs().max() <= 1e-12, (
                        "DDP no longer averages over all processes after training"
                    )


def _mean_gradient(weights, batches):
    model = Regression(batches[0][0].dtype)
    model.load_state_dict(weights)
    for x, y in batches:
        (model(x, y)["loss"] / len(batches)).backward()
    return {name: p.grad for name, p in model.named_parameters()}


# ---- which processes form a worker ----

STARTS = [  # (processes_per_worker, LOCAL_WORLD_SIZE of every rank, processes per worker, the table's first line)
    ("auto", "2222", 2, "2 workers, 2 processes each, on 2 machine(s):"),
    ("auto", "4444", 1, "4 workers, one process each, on 1 machine(s):"),
    ("auto", "1111", 1, "4 workers, one process each, on 4 machine(s):"),
    ("node", "2222", 2, "2 workers, 2 processes each, on 2 machine(s):"),
    ("node", "4444", 4, "1 worker, 4 processes each, on 1 machine(s):"),
    (2, "4444", 2, "2 workers, 2 processes each, on 1 machine(s):"),
    (4, "2222", 4, "1 worker, 4 processes each, on 2 machine(s):"),
]
REFUSED = [  # (settings, LOCAL_WORLD_SIZE of every rank, words)
    (
        {"processes_per_worker": 3},
        "4444",
        "processes_per_worker must divide the number of processes, got 3 (here 3) with 4 processes. Start a multiple "
        "of it, or set processes_per_worker=1.",
    ),
    (
        {"processes_per_worker": "node"},
        "3333",
        "processes_per_worker must divide the number of processes, got node (here 3) with 4 processes.",
    ),
    (
        {"processes_per_worker": 8},
        "4444",
        "processes_per_worker must divide the number of processes, got 8 (here 8) with 4 processes.",
    ),
    (
        {"processes_per_worker": "node"},
        "2244",
        "ranks differ at the start: rank 0 has ['processes per worker = 2'], rank 2 has ['processes per worker = 4'].",
    ),
    (
        {"processes_per_worker": "auto"},
        "2224",
        "ranks differ at the start: rank 0 has ['processes per worker = 2'], rank 3 has ['processes per worker = 1'].",
    ),
    (
        {"processes_per_worker": 2, "base": "sgp", "peers": 2},
        "4444",
        "peers must be <= workers - 1, got 2 with workers=2",
    ),
]


class Listener(logging.Handler):
    """What the package says, whole."""

    def __init__(self):
        super().__init__()
        self.words = []

    def emit(self, record):
        self.words.append(record.getMessage())


def _start(local_world_sizes, settings):
    os.environ["LOCAL_WORLD_SIZE"] = local_world_sizes[dist.get_rank()]
    loop = OuterLoop(
        torch.optim.SGD([torch.nn.Parameter(torch.ones(3))], lr=0.1),
        SlowMoConfig(timeout_seconds=patience(20), **settings),
    )
    loop.start()
    return loop.workers


def _starts():
    listener, found, refusals = Listener(), [], []
    logging.getLogger("slowmo_hf").addHandler(listener)
    for value, local_world_sizes, _, _ in STARTS:
        listener.words.clear()
        workers = _start(local_world_sizes, {"processes_per_worker": value})
        table = next((words for words in listener.words if " each, on " in words), "")
        found.append(
            (
                workers.size,
                workers.count,
                workers.index,
                workers.place,
                workers.inside.ranks,
                workers.between.ranks,
                table,
            )
        )
    for refused, local_world_sizes, _ in REFUSED:
        with pytest.raises(ValueError) as error:
            _start(local_world_sizes, refused)
        refusals.append(str(error.value))
    return found, refusals


def test_which_processes_form_a_worker():
    results = run_workers(_starts, 4)
    for index, (_, _, size, first_line) in enumerate(STARTS):
        for rank, (found, _) in enumerate(results):
            first = rank // size * size
            column = list(range(rank % size, 4, size))
            assert found[index][:4] == (size, 4 // size, rank // size, rank % size), (STARTS[index], rank)
            assert found[index][4:6] == (list(range(first, first + size)), column), (STARTS[index], rank)
        assert [result[0][index][6] == "" for result in results] == [False, True, True, True], (
            "rank 0 alone shows the table"
        )
        table = results[0][0][index][6].splitlines()
        assert table[0].endswith(first_line)  # behind which optimizer it is: the earlier ones live
        assert [line.split()[:2] for line in table[2:6]] == [[str(rank), str(rank // size)] for rank in range(4)]
        [settings] = [line for line in table if line.startswith("  settings:")]
        given = STARTS[index][0]
        assert (f"processes_per_worker={str(given)!r}" in settings) == (given != "auto")
    for index, (_, _, words) in enumerate(REFUSED):
        first, *others = [refusals[index] for _, refusals in results]
        assert words in first.replace(f" on {socket.gethostname()}", "")
        assert others == [first] * 3, "the same words on every rank"


# ---- the wire: each talks to its mates inside, and to its counterparts outside ----

WIRE_STEPS, TAU, BUCKET_BYTES = 10, 4, 16384
CALLS = (
    "all_reduce",
    "broadcast",
    "all_gather",
    "all_gather_into_tensor",
    "all_to_all",
    "reduce",
    "reduce_scatter",
    "gather",
    "scatter",
)
CALLS += ("barrier", "monitored_barrier", "send", "recv", "batch_isend_irecv", "_broadcast_coalesced")


class Wiretap:
    """Who takes part in every collective that Python starts, and its bytes: (step, name, ranks, bytes)."""

    def __init__(self):
        self.heard, self.step = [], 0

    def __enter__(self):
        self._originals = [
            (module, name, getattr(module, name)) for name in CALLS for module in (dist, c10d) if hasattr(module, name)
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

    model, callback = bert(), SlowMoCallback(_pairs(base=base, sync_every=TAU, bucket_bytes=BUCKET_BYTES))
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
        model=model, args=args, train_dataset=data, callbacks=[SlowMoCallback(_pairs(sync_every=6)), recorder]
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
        bare, SlowMoOptimizer(torch.optim.SGD(bare.parameters(), lr=0.1), _pairs(sync_every=9))
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
        model, _ = accelerator.prepare(bare, SlowMoOptimizer(two_groups(bare, "sgd", LR), _pairs(sync_every=9)))
        found[option] = []
        for _ in range(3):
            model.zero_grad()
            accelerator.backward(model(own.x, own.y)["loss"])
            found[option].append({name: p.grad.clone() for name, p in bare.named_parameters()})
    return found, _mean_gradient(values(bare), [(part.x, part.y) for part in parts])


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
    return found, _mean_gradient(values(bare), [(own.x, own.y)])


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


# ---- faults: an error on one process is an error on all, in time ----


def _net(config, dtype=torch.float32, name="sgd"):
    """(accelerator, the bare model, the prepared one, the prepared optimizer)."""
    from accelerate import Accelerator

    accelerator, bare = Accelerator(cpu=True), Regression(dtype)
    model, optimizer = accelerator.prepare(bare, SlowMoOptimizer(two_groups(bare, name, LR), config))
    return accelerator, bare, model, optimizer


def _backward(accelerator, model, rows, step):
    start = (step * dist.get_world_size() + dist.get_rank()) * BATCH
    accelerator.backward(model(rows.x[start : start + BATCH], rows.y[start : start + BATCH])["loss"])


def _fault(spoil, step_of_fault, base):
    """(step, error, seconds it took) where `spoil(rank, bare model, outer loop)` acts before a step; tau is 3."""
    accelerator, bare, model, optimizer = _net(_pairs(base=base, sync_every=3, timeout_seconds=5))
    rows = Rows(300, torch.float32)
    for step in range(1, 7):
        _backward(accelerator, model, rows, step)
        if step == step_of_fault:
            spoil(dist.get_rank(), bare, optimizer.optimizer.outer_loop)
        start = time.perf_counter()
        try:
            optimizer.step()
            optimizer.zero_grad()
        except (ValueError, RuntimeError) as error:
            return step, f"{type(error).__name__}: {error}", time.perf_counter() - start
    return None


def _add_a_group_on_a_follower(rank, bare, loop):
    if rank == 3:
        loop.inner_optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "lr": LR})


def _freeze_on_the_first_follower(rank, bare, loop):
    if rank == 1:
        bare.head.bias.requires_grad_(False)


def _count_more_in_one_worker(rank, bare, loop):
    loop.clock.attempted_steps += 3 * (rank >= 2)


def _count_more_on_a_follower(rank, bare, loop):
    loop.clock.attempted_steps += 3 * (rank == 3)


class Boom:
    """A reduction that fails in whatever it is asked to do at a round."""

    def __getattr__(self, name):
        raise RuntimeError("boom")


def _boom_on_one(rank, bare, loop):
    """Where a script that fails has its last word: nobody else is told of an error that is caught."""
    if rank == 2:
        loop.parts.slow.reduction = Boom()
        loop.workers.roll_call.leave("RuntimeError: boom")


def _without_ddp():
    """
    A model that was not prepared: nobody averages its gradients inside the worker. By the first forward pass, and
    without one.
    """
    found = []
    for called in (True, False):
        model, rows = Regression(torch.float32), Rows(8, torch.float32)
        optimizer = SlowMoOptimizer(two_groups(model, "sgd", LR), _pairs(timeout_seconds=5))
        try:
            if called:
                model(rows.x, rows.y)["loss"].backward()
            optimizer.step()
            found.append("no error")
        except RuntimeError as error:
            found.append(str(error))
    return found


def _faults():
    changed = [
        _fault(spoil, 6, base)
        for spoil in (_add_a_group_on_a_follower, _freeze_on_the_first_follower)
        for base in ("local_sgd", "sgp")
    ]
    counted = _fault(_count_more_in_one_worker, 2, "local_sgd")
    follower_counted = _fault(_count_more_on_a_follower, 2, "local_sgd")
    return changed, counted, follower_counted, _without_ddp(), _fault(_boom_on_one, 6, "local_sgd")


@pytest.fixture(scope="module")
def faults():
    return run_workers(_faults, 4)


@pytest.mark.slow
def test_a_parameter_set_changed_on_a_follower_is_an_error_on_every_rank(faults):
    for case in range(4):
        follower = 3 - case // 2 * 2
        for changed, *_ in faults:
            step, words, seconds = changed[case]
            assert (step, seconds < patience(5)) == (6, True), "at the round, in time"
            assert re.match(
                rf"ValueError: rank {follower} on \S+, step 6: the parameter set changed after the start", words
            ), words
            assert words == faults[0][0][case][1]


@pytest.mark.slow
def test_different_steps_are_an_error_on_every_rank(faults):
    for _, (step, words, seconds), *_ in faults:
        assert (step, seconds < patience(5)) == (3, True)
        assert words.startswith("RuntimeError: ranks met at different places: rank 0 on ")
        assert re.search(r"rank 0 on \S+ at step 3, the round; .*rank 2 on \S+ at step 6, the round", words)


@pytest.mark.slow
def test_different_steps_inside_a_worker_are_an_error_on_every_rank(faults):
    for _, _, fault, *_ in faults:
        assert fault is not None, "nobody noticed"
        step, words, seconds = fault
        assert (step, seconds < patience(5)) == (3, True)
        assert re.search(r"ranks met at different places: .*rank 3 on \S+ at step 6, the round", words)


@pytest.mark.slow
def test_a_worker_of_several_processes_needs_ddp(faults):
    for *_, words, _ in faults:
        assert all("needs a DistributedDataParallel wrapper that averages gradients" in word for word in words), words


@pytest.mark.slow
def test_an_error_of_one_process_reaches_all(faults):
    """
    Rank 2 fails in the second round: its counterpart misses it, its mate and the other worker's second process hear
    who it was.
    """
    assert faults[2][-1][:2] == (6, "RuntimeError: boom")
    for fault in (faults[0], faults[1], faults[3]):
        step, words, seconds = fault[-1]
        assert step == 6
        assert re.match(r"RuntimeError: rank 2 on \S+ left at step 5: RuntimeError: boom\. ", words), words
        assert seconds < patience(9)


# ---- state: each its own ----

STATES = [  # (inner optimizer, settings); what SGD forgets at a round's end need not be saved for every worker
    ("sgd", _pairs(sync_every=3)),
    ("sgd", _pairs(sync_every=3, outer_optimizer="torch.optim.Adam", outer_lr=0.1, inner_state="reset")),
    ("sgd", _pairs(sync_every=3, base="osgp")),
    ("adamw", _pairs(sync_every=3)),
    ("sgd", _pairs(sync_every=3, outer_optimizer="tiny.WholeAdam", outer_lr=0.1, inner_state="reset")),
]


def _resumed(case):
    """
    The weights after each of 4 further steps: of the run itself, and of runs that take its state up at step 3 in
    several ways.
    """
    name, config = case
    rows, ways = Rows(300), {}

    def train(run, first, last):
        accelerator, bare, model, optimizer = run
        path = []
        for step in range(first, last):
            _backward(accelerator, model, rows, step)
            optimizer.step()
            optimizer.zero_grad()
            path.append(values(bare))
        return path

    original = _net(config, torch.float64, name)
    train(original, 0, 3)
    accelerator, _, _, optimizer = original
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    register_for_checkpointing(accelerator, optimizer)
    accelerator.save_state(folder[0])
    with pytest.raises(RuntimeError, match="2 processes per worker: each has a part of it"):
        optimizer.state_dict()
    slow = optimizer.optimizer.outer_loop.parts.slow
    slow_elements = sum(flat.numel() for flat in [*(item.flat for item in slow.anchors), *slow.update.velocities])
    ways["itself"] = train(original, 3, 7)
    for started in (False, True):
        run = _net(config, torch.float64, name)
        register_for_checkpointing(run[0], run[3])
        if started:
            train(run, 20, 22)
        run[0].load_state(folder[0])
        ways["started" if started else "new"] = train(run, 3, 7)
    return ways, slow_elements


def _all_resumed():
    return [_resumed(case) for case in STATES]


@pytest.fixture(scope="module")
def resumed():
    return run_workers(_all_resumed, 4)


@pytest.mark.slow
def test_each_process_holds_its_part_of_the_slow_state(resumed):
    trainable = sum(p.numel() for p in Regression().parameters())
    for index, (_, config) in enumerate(STATES):
        copies = 2 if config.outer_optimizer == "slow_momentum" else 1  # anchors and velocities
        halves = [copies * -(-trainable // 2), copies * (trainable // 2)]
        if config.outer_optimizer == "tiny.WholeAdam":  # of which nobody knows that a part of a tensor is enough
            halves = [trainable, 0]
        assert [result[index][1] for result in resumed] == [*halves, *halves]


@pytest.mark.slow
def test_an_outer_optimizer_on_parts_is_that_on_whole_tensors(resumed):
    """Adam, cut; and a class of one's own, the same, that keeps tensors whole."""
    for result in resumed:
        for cut, whole in zip(result[1][0]["itself"], result[4][0]["itself"], strict=True):
            assert all((cut[name] - whole[name]).abs().max() <= 1e-12 for name in cut)


EVERY_WAY = [
    pytest.param(way, index, id=f"{name}, {config.base}, {config.outer_optimizer}: {way}")
    for way in ("new", "started")
    for index, (name, config) in enumerate(STATES)
]


@pytest.mark.slow
@pytest.mark.parametrize(("way", "index"), EVERY_WAY)
def test_a_run_goes_on_bit_for_bit_from_its_state(resumed, way, index):
    for rank, result in enumerate(resumed):
        ways, mates = result[index][0], resumed[rank // 2 * 2][index][0]
        for step, weights in enumerate(ways[way]):
            assert equal(weights, mates[way][step]), f"rank {rank} parted from its worker's first"
            assert equal(weights, ways["itself"][step]), (rank, step + 4)
