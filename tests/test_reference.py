"""
Both surfaces, every base, against the paper's u-form in float64, over a schedule with warm-up from 0, two groups,
accumulation 2.
"""

import tempfile
from functools import partial

import pytest
import torch
import torch.distributed as dist

from harness import run_workers
from mixing import mixing_matrix
from reference import gossip_reference, slowmo_reference
from slowmo_hf import SlowMoCallback, SlowMoConfig, SlowMoOptimizer, consensus
from slowmo_hf.rules import GOSSIP_BASES
from slowmo_hf.wire.gossip import make_topology
from tiny import Regression, Rows, accumulated, two_groups, warmup_and_decay

STEPS, ACCUMULATION, BATCH = 12, 2, 3
LR = 0.05
CASES = [  # (inner optimizer, settings)
    ("sgd", SlowMoConfig(sync_every=4, outer_momentum=0.6, inner_state="reset")),
    ("sgd", SlowMoConfig(sync_every=3, outer_lr=0.8, inner_state="maintain")),
    ("sgd", SlowMoConfig.local_sgd(4, inner_state="average")),
    ("adamw", SlowMoConfig(sync_every=5, outer_momentum=0.4)),
]
GOSSIP_CASES = [
    ("sgd", SlowMoConfig(base="sgp", sync_every=4, outer_momentum=0.6)),
    ("adamw", SlowMoConfig(base="sgp", sync_every=5, outer_momentum=0.4, topology="ring")),
    ("sgd", SlowMoConfig(base="sgp", sync_every=5, outer_momentum=0.4, exact_average=False, inner_state="maintain")),
    ("adamw", SlowMoConfig(base="sgp", sync_every=4, outer_momentum=0, exact_average=False)),  # SGP alone
    ("sgd", SlowMoConfig(base="dpsgd", sync_every=5, inner_state="average")),
    ("adamw", SlowMoConfig(base="osgp", sync_every=5, outer_momentum=0.6)),
    ("sgd", SlowMoConfig(base="osgp", sync_every=12, staleness=2, topology="complete")),
    ("adamw", SlowMoConfig(base="osgp", sync_every=7, exact_average=False)),  # a round with messages in flight
    # 3 workers: uneven weights.
    (
        "sgd",
        SlowMoConfig(base="osgp", sync_every=9, topology="bipartite_exponential", outer_lr=0.9),
    ),
]


def _accelerate(case, dtype):
    from accelerate import Accelerator

    name, config = case
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATION)
    assert accelerator.num_processes == dist.get_world_size()
    bare, rows = Regression(dtype), Rows(200, dtype)
    optimizer = two_groups(bare, name, LR)
    model, optimizer = accelerator.prepare(bare, SlowMoOptimizer(optimizer, config))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer.optimizer.inner_optimizer, warmup_and_decay)
    for _ in accumulated(accelerator, model, optimizer, scheduler, rows, STEPS * ACCUMULATION, BATCH, wrap=180):
        pass
    local = [p.detach().clone() for p in bare.parameters()]
    with consensus(optimizer):
        average = [p.detach().clone() for p in bare.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(local, bare.parameters(), strict=True))
    return bare.seen, local, average


def _trainer(case, dtype):
    from transformers import Trainer, TrainingArguments

    name, config = case
    model = Regression(dtype)
    optimizer = two_groups(model, name, LR)
    args = TrainingArguments(
        tempfile.mkdtemp(),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=ACCUMULATION,
        max_grad_norm=0,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_and_decay)
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=Rows(400, dtype),  # more than 24 batches: no partial accumulation
        optimizers=(optimizer, scheduler),
        callbacks=[SlowMoCallback(config)],
    )
    trainer.train()
    return model.seen, None, [p.detach().clone() for p in model.parameters()]


def _expected(case, seen):
    """(each worker's parameters, the average) by the reference, on the batches that the workers saw."""
    name, config = case

    def make_worker(worker):
        model = Regression(torch.float64)
        optimizer = two_groups(model, name, LR)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_and_decay)

        def backward(step):
            optimizer.zero_grad()
            for x, y in seen[worker][step * ACCUMULATION : (step + 1) * ACCUMULATION]:
                (model(x.double(), y.double())["loss"] / ACCUMULATION).backward()

        return list(model.parameters()), optimizer, backward, scheduler.step

    policy = config.inner_state
    if policy == "auto":
        policy = "reset" if name == "sgd" else "maintain"
    arguments = (make_worker, len(seen), STEPS, config.sync_every, config.outer_lr, config.outer_momentum, policy)
    if config.base not in GOSSIP_BASES:
        workers = slowmo_reference(*arguments)
        return workers, [sum(tensors) / len(seen) for tensors in zip(*workers, strict=True)]
    staleness = config.staleness if config.base == "osgp" else 0
    mixing = partial(mixing_matrix, make_topology(config, len(seen)))
    ends = gossip_reference(*arguments, mixing=mixing, staleness=staleness, exact_average=config.exact_average)
    return [end.z for end in ends], ends[0].average


def _all_cases(surface, cases, dtype):
    return [surface(case, dtype) for case in cases]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")
@pytest.mark.parametrize("surface", [_accelerate, _trainer])
@pytest.mark.parametrize("workers", [2, 3, 4])
@pytest.mark.parametrize("cases", [CASES, GOSSIP_CASES], ids=["local", "gossip"])
def test_matches_the_paper(surface, workers, cases):
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-6)):
        results = run_workers(_all_cases, workers, surface, cases, dtype)
        for index, case in enumerate(cases):
            seen = [result[index][0] for result in results]
            assert not torch.equal(seen[0][0][0], seen[1][0][0]), "workers must train on different data"
            expected, average = _expected(case, seen)
            for rank, result in enumerate(results):
                _, local, shown = result[index]
                for mine, right in zip(shown, average, strict=True):
                    assert (mine.double() - right).abs().max() <= tolerance, (case, rank)
                for mine, right in zip(local or [], expected[rank], strict=False):
                    assert (mine.double() - right).abs().max() <= tolerance, (case, rank)
