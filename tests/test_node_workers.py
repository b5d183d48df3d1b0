"""
Workers of several processes: gradients are averaged inside at every step, and each process talks to its counterparts
in other workers about its own part of the model.
"""

import logging
import os
import socket
import tempfile
from functools import partial

import pytest
import torch
import torch.distributed as dist

from harness import patience, run_workers
from mixing import mixing_matrix
from node_worker import ACCUMULATION, BATCH, LOOK, LR, STEPS, Gradients, mean_gradient, pairs
from reference import gossip_reference, slowmo_reference
from slowmo_hf import SlowMoCallback, SlowMoConfig, SlowMoOptimizer, consensus
from slowmo_hf.adapters.isolation import ddp_wrappers
from slowmo_hf.rules import GOSSIP_BASES
from slowmo_hf.training.outer_loop import OuterLoop
from slowmo_hf.wire.gossip import make_topology
from tiny import (
    Recorder,
    Regression,
    Rows,
    accumulated,
    arguments,
    equal,
    follow,
    recorded,
    two_groups,
    values,
    warmup_and_decay,
)

# ---- 2 workers of 2 processes are 2 workers, each with both processes' batches ----


CASES = [  # (inner optimizer, settings)
    ("sgd", pairs(sync_every=4, inner_state="reset")),
    ("adamw", pairs(sync_every=4, inner_state="maintain")),
    ("sgd", pairs(sync_every=3, outer_momentum=0, inner_state="average")),
    ("sgd", pairs(sync_every=5, base="sgp")),
    ("adamw", pairs(sync_every=4, base="osgp", staleness=1)),
    ("sgd", pairs(sync_every=5, base="sgp", exact_average=False, inner_state="maintain")),
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
    for _ in accumulated(accelerator, model, optimizer, scheduler, rows, STEPS * ACCUMULATION, BATCH):
        after.append(values(bare))
        if len(after) in (LOOK, STEPS):
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
    mixing = partial(mixing_matrix, make_topology(config, count))
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

    model, recorder, callback = Regression(), Gradients(), SlowMoCallback(pairs(sync_every=3))
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
                for name, right in mean_gradient(before, [mate["seen"][step] for mate in mates]).items():
                    assert (gradients[name] - right).abs().max() <= 1e-12, (
                        f"train() {number + 1}, step {step + 1}, rank {rank}: {name}"
                    )
                assert all(equal(run["after"][step], mate["after"][step]) for mate in mates)
        if size == 2:
            assert follow(runs[::2], pairs(sync_every=3), tolerance=1e-12) == 2
    for _, after, world in results:
        assert world == 4
        for wrappers, right in after:
            assert wrappers
            for found in wrappers:
                for mine, theirs in zip(found, right, strict=True):
                    assert (mine - theirs).abs().max() <= 1e-12, (
                        "DDP no longer averages over all processes after training"
                    )


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
        "makes workers of several sizes: rank 0 has processes per worker = 2, rank 2 has processes per worker = 4.",
    ),
    (
        {"processes_per_worker": "auto"},
        "2224",
        "makes workers of several sizes: rank 0 has processes per worker = 2, rank 3 has processes per worker = 1.",
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
