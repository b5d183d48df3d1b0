"""Both surfaces against the paper's u-form in float64, over a schedule with warm-up from 0, two groups, accumulation 2."""

import tempfile

import pytest
import torch
import torch.distributed as dist
from harness import run_workers
from reference import slowmo_reference
from tiny import Regression, Rows, two_groups, warmup_and_decay

from slowmo_hf import SlowMoCallback, SlowMoConfig, SlowMoOptimizer, consensus

STEPS, ACCUMULATION, BATCH = 12, 2, 3
CASES = [  # (inner optimizer, its state at a round, tau, alpha, beta)
    ("sgd", "reset", 4, 1.0, 0.6),
    ("sgd", "maintain", 3, 0.8, 0.5),
    ("sgd", "average", 4, 1.0, 0.0),
    ("adamw", "maintain", 5, 1.0, 0.4),
]


def _settings(case, lr):
    name, state, tau, alpha, beta = case
    return name, lr, SlowMoConfig(sync_every=tau, outer_lr=alpha, outer_momentum=beta, inner_state=state)


def _accelerate(case, dtype):
    from accelerate import Accelerator

    name, lr, config = _settings(case, 0.05)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATION)
    assert accelerator.num_processes == dist.get_world_size()
    bare, rows = Regression(dtype), Rows(200, dtype)
    optimizer = two_groups(bare, name, lr)
    model, optimizer = accelerator.prepare(bare, SlowMoOptimizer(optimizer, config))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer.optimizer.inner_optimizer, warmup_and_decay)
    rank, world = dist.get_rank(), dist.get_world_size()
    for micro in range(STEPS * ACCUMULATION):
        start = (micro * world + rank) * BATCH % 180
        with accelerator.accumulate(model):
            accelerator.backward(model(rows.x[start : start + BATCH], rows.y[start : start + BATCH])["loss"])
            optimizer.step()
            if accelerator.sync_gradients:
                scheduler.step()
            optimizer.zero_grad()
    local = [p.detach().clone() for p in bare.parameters()]
    with consensus(optimizer):
        average = [p.detach().clone() for p in bare.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(local, bare.parameters(), strict=True))
    return bare.seen, local, average


def _trainer(case, dtype):
    from transformers import Trainer, TrainingArguments

    name, lr, config = _settings(case, 0.05)
    model = Regression(dtype)
    optimizer = two_groups(model, name, lr)
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
    """The reference on the batches that the workers saw."""
    name, lr, config = _settings(case, 0.05)

    def make_worker(worker):
        model = Regression(torch.float64)
        optimizer = two_groups(model, name, lr)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_and_decay)

        def backward(step):
            optimizer.zero_grad()
            for x, y in seen[worker][step * ACCUMULATION : (step + 1) * ACCUMULATION]:
                (model(x.double(), y.double())["loss"] / ACCUMULATION).backward()

        return list(model.parameters()), optimizer, backward, scheduler.step

    return slowmo_reference(make_worker, len(seen), STEPS, config.sync_every, config.outer_lr, config.outer_momentum, config.inner_state)


def _all_cases(surface, dtype):
    return [surface(case, dtype) for case in CASES]


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")
@pytest.mark.parametrize("surface", [_accelerate, _trainer])
@pytest.mark.parametrize("workers", [2, 3, 4])
def test_matches_the_paper(surface, workers):
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-6)):
        results = run_workers(_all_cases, workers, surface, dtype)
        for index, case in enumerate(CASES):
            seen = [result[index][0] for result in results]
            assert not torch.equal(seen[0][0][0], seen[1][0][0]), "workers must train on different data"
            expected = _expected(case, seen)
            average = [sum(tensors) / workers for tensors in zip(*expected, strict=True)]
            for rank, result in enumerate(results):
                _, local, shown = result[index]
                for mine, right in zip(shown, average, strict=True):
                    assert (mine.double() - right).abs().max() <= tolerance, (case, rank)
                for mine, right in zip(local or [], expected[rank], strict=False):
                    assert (mine.double() - right).abs().max() <= tolerance, (case, rank)
