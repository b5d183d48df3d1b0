"""Gradients averaged over workers where no DDP does it: `base="all_reduce"` in a worker of `run_in_process`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..wire.averages import Averages
from .parts import Parts


@torch.no_grad()
def average_gradients(parts: Parts) -> None:
    """What DDP does at every step."""
    trainable = parts.tensors.trainable
    if parts.tensors.is_laid_out_anew:  # gradients follow: elements of another order would be averaged
        raise ValueError(parts.tensors.problem())
    gradients = [p.grad for p in trainable if p.grad is not None]
    # Another worker may lack others, of the same sizes, and nothing would tell.
    if len(gradients) < len(trainable):
        raise RuntimeError(
            "base='all_reduce' inside run_in_process averages the gradients of all trainable parameters, as DDP "
            f"does, and {len(trainable) - len(gradients)} of {len(trainable)} have none. Freeze those that are "
            "not used."
        )
    Averages(parts.workers.world, parts.config.bucket_bytes // 2).mean_(gradients)


def averaging(parts: Parts, closure: Callable[[], float] | None) -> Callable[[], float] | None:
    """Average the gradients now; or, where a closure makes them, at each of its calls."""
    if closure is None:
        average_gradients(parts)
        return None

    def averaged() -> float:
        loss = closure()
        average_gradients(parts)
        return loss

    return averaged
