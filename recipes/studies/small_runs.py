"""
The part of a small run that every task has: its workers in one process, their training loop, and what they know of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

import slowmo_hf
from slowmo_hf import SlowMoOptimizer
from studies.plan import Run


@dataclass
class Job:
    """
    What one worker trains.

    Args:
        learning_rate_factor (`Callable`): Of the peak, by optimizer steps from 0.
        batches (`Callable`): This worker's batches of an epoch, which counts from 0; equally many on every worker.
        loss (`Callable`): Of one batch.
        look (`Callable`): Figures of the model as it is, which is then the workers' average; told whether training has
            ended.
    """

    model: torch.nn.Module
    inner: torch.optim.Optimizer
    learning_rate_factor: Callable[[int], float]
    batches: Callable[[int], Iterable[Any]]
    loss: Callable[[Any], torch.Tensor]
    look: Callable[[bool], dict[str, Any]]


def train_workers(run: Run, make_job: Callable[[int], Job]) -> dict[str, Any]:
    """
    All workers of one run, `make_job(rank)` each; the first one's part of the record, with a look after every epoch.
    """
    start = time.perf_counter()
    told = slowmo_hf.run_in_process(lambda rank: _work(run, make_job(rank), rank), run.workers)[0]
    return {**told, "seconds": time.perf_counter() - start}


def _work(run: Run, job: Job, rank: int) -> dict[str, Any]:
    optimizer = SlowMoOptimizer(job.inner, run.config)
    scheduler = torch.optim.lr_scheduler.LambdaLR(job.inner, job.learning_rate_factor)
    curve: list[dict[str, Any]] = []
    reports: list[slowmo_hf.RoundReport] = []
    steps = 0
    for epoch in range(run.epochs):
        for batch in job.batches(epoch):
            job.loss(batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            steps += 1
            report = slowmo_hf.last_round(optimizer)
            if report and report.round > len(reports):
                reports.append(report)
        with slowmo_hf.consensus(optimizer):
            if rank == 0:
                curve.append({"epoch": epoch + 1, **job.look(epoch + 1 == run.epochs)})
    trained = sum(parameter.numel() for parameter in job.model.parameters() if parameter.requires_grad)
    return {
        "model": f"{type(job.model).__name__}, {trained:,} parameters",
        "curve": curve,
        "steps": steps,
        "rounds": len(reports),
        "bytes_sent_per_worker": sum(report.bytes_sent for report in reports) if run.base != "all_reduce" else None,
    }
