"""What a custom loop asks of its optimizer, prepared by Accelerate or bare: the average, the end, the last round."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..training.report import RoundReport
from .optimizer import SlowMoOptimizer


def unwrap(optimizer: torch.optim.Optimizer) -> SlowMoOptimizer:
    """The SlowMoOptimizer behind what `accelerator.prepare` returned; `TypeError` where there is none."""
    found: Any = optimizer
    while not isinstance(found, SlowMoOptimizer):
        if not hasattr(found, "optimizer"):
            raise TypeError(
                f"expected a SlowMoOptimizer, prepared or bare, got {type(optimizer).__name__}. Wrap the optimizer "
                "first: SlowMoOptimizer(optimizer, config)."
            )
        found = found.optimizer
    return found


@contextmanager
def consensus(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """
    Inside, the workers' average is in the model, on every rank; afterwards the local weights are back, bit for bit,
    and so are the random generators. Collective: every rank enters it at the same step. Plain `base="all_reduce"` has
    nothing to show: it is stock.

        with slowmo_hf.consensus(optimizer):
            evaluate(model)

    Args:
        optimizer (`torch.optim.Optimizer`): A `SlowMoOptimizer`, bare or as `accelerator.prepare` returned it.
    """
    bare = unwrap(optimizer)
    outer_loop = bare.outer_loop
    if outer_loop is None or outer_loop.view.is_shown:
        yield
        return
    bare.eval()
    try:
        yield
    finally:
        bare.train()


@contextmanager
def join(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """
    For uneven data: a worker that leaves the block takes part in the others' rounds until all have left it.

        with slowmo_hf.join(optimizer):
            for batch in loader:  # six batches here, four there
                ...

    In each round workers count by their local steps since the one before, so one that did none moves with the others
    and adds nothing. Evaluate and save outside of the block: inside, one that has left takes part in rounds alone.
    Each worker's own weights are in the model afterwards, and every worker has the furthest one's clock.

    Args:
        optimizer (`torch.optim.Optimizer`): A `SlowMoOptimizer`, bare or as `accelerator.prepare` returned it.

    Raises:
        ValueError: `base` is not local_sgd: others exchange at every step, and cannot go on without a worker.
    """
    bare = unwrap(optimizer)
    if bare.config.base != "local_sgd":
        raise ValueError(
            f"join needs base='local_sgd', got {bare.config.base!r}, whose workers exchange at every step: give all "
            "workers equally many batches."
        )
    yield
    bare.end()


def stop_requested(optimizer: torch.optim.Optimizer) -> bool:
    """
    Whether a rank was sent SIGTERM or SIGUSR1; True on all ranks from the same step on, where a round is taken in.
    Call it after every step, from the first one on:

        if slowmo_hf.stop_requested(optimizer):
            accelerator.save_state(folder)
            sys.exit(slowmo_hf.REQUEUE_EXIT_CODE)

    Args:
        optimizer (`torch.optim.Optimizer`): A `SlowMoOptimizer`, bare or as `accelerator.prepare` returned it.

    Raises:
        ValueError: Plain `base="all_reduce"` has no rounds.
    """
    bare = unwrap(optimizer)
    bare.listen_for_stop()
    return bare.outer_loop is not None and bare.outer_loop.status.stop_agreed


def last_round(optimizer: torch.optim.Optimizer) -> RoundReport | None:
    """
    The report of the last round, or None before the first. `accelerator.log(last_round(optimizer).to_logs())` logs it.
    """
    outer_loop = unwrap(optimizer).outer_loop
    return outer_loop.last_round if outer_loop else None
