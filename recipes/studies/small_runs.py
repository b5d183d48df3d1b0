"""
What runs of every task have in common: workers in one process, their training loop, and what they know of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

import slowmo_hf
from slowmo_hf import SlowMoOptimizer
from studies.kept import Keeper, KeptWorker, Progress
from studies.plan import Run


@dataclass
class Job:
    """
    What one worker trains.

    Args:
        learning_rate_factor (`Callable`): Of the peak, by optimizer steps from 0.
        batches (`Callable`): This worker's batches of an epoch, which counts from 0; equally many on every worker.
        learn (`Callable`): Leaves the gradients of one batch in the model's parameters.
        look (`Callable`): Figures of the model as it is, which is then the workers' average; told how many epochs are
            done, and whether these are all.
        look_every (`int`, *optional*, defaults to `1`): Epochs between two looks; the last epoch has one.
    """

    model: torch.nn.Module
    inner: torch.optim.Optimizer
    learning_rate_factor: Callable[[int], float]
    batches: Callable[[int], Iterable[Any]]
    learn: Callable[[Any], Any]
    look: Callable[[int, bool], dict[str, Any]]
    look_every: int = 1


def train_workers(run: Run, make_job: Callable[[int], Job], keeper: Keeper | None = None) -> dict[str, Any] | None:
    """
    All workers of one run, `make_job(rank)` each; the first one's part of the record. None where the keeper has left
    the run for a later call.
    """
    start = time.perf_counter()
    return slowmo_hf.run_in_process(lambda rank: _work(run, make_job(rank), rank, keeper, start), run.workers)[0]


def is_over(run: Run, progress: Progress) -> bool:
    """Whether all epochs are done; or, where a run has patience, so many looks without a lower validation NLL."""
    nlls = [look["validation_nll"] for look in progress.curve] if run.patience else []
    is_stale = bool(nlls) and len(nlls) - 1 - nlls.index(min(nlls)) >= run.patience
    return is_stale or progress.epochs == run.epochs


def _work(run: Run, job: Job, rank: int, keeper: Keeper | None, start: float) -> dict[str, Any] | None:
    optimizer = SlowMoOptimizer(job.inner, run.config)
    scheduler = torch.optim.lr_scheduler.LambdaLR(job.inner, job.learning_rate_factor)
    kept = KeptWorker(keeper, rank, job.model, optimizer, scheduler) if keeper else None
    progress = kept.take_up() if kept else Progress()
    begun = progress.epochs
    while not is_over(run, progress):
        epoch, epoch_start = progress.epochs, time.perf_counter()
        for batch in job.batches(epoch):
            job.learn(batch)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            progress.count(slowmo_hf.last_round(optimizer))
        progress.training_seconds += time.perf_counter() - epoch_start
        progress.epochs += 1
        is_last = progress.epochs == run.epochs
        if progress.epochs % job.look_every == 0 or is_last:
            with slowmo_hf.consensus(optimizer):
                if rank == 0:
                    progress.curve.append({"epoch": progress.epochs, **job.look(progress.epochs, is_last)})
            progress.curve = slowmo_hf.together(lambda curves: [curves[0]] * len(curves), progress.curve)
        now = time.perf_counter()
        # The first epoch of a call starts the job, and on a GPU captures its graph: it counts until there is another.
        progress.longest_epoch = max(progress.longest_epoch if epoch > begun + 1 else 0.0, now - epoch_start)
        progress.seconds, start = progress.seconds + now - start, now
        if kept and kept.end_epoch(progress, run.epochs):
            return None
    trained = sum(parameter.numel() for parameter in job.model.parameters() if parameter.requires_grad)
    return {
        "model": f"{type(job.model).__name__}, {trained:,} parameters",
        "curve": progress.curve,
        "steps": progress.steps,
        "rounds": progress.rounds,
        "bytes_sent_per_worker": progress.bytes_sent if run.base != "all_reduce" else None,
        "seconds": progress.seconds,
        "seconds_per_epoch": progress.training_seconds / progress.epochs,
    }
