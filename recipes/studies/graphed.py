"""Gradients of batches of tokens on a GPU: batches are filled up to few shapes, with a CUDA graph for each."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from studies.batched import Captured
from translation.tokens import EOS, NO_LABEL, PAD, as_batch, collate

LENGTHS = (8, 10, 12, 14, 16, 18, 20, 24, 28, 32, 40, 48, 64, 96, 128)


class GraphedGradients:
    """
    Called with the rows of a batch it leaves the gradients of their mean loss in the model's parameters, as
    `loss(model, batch).backward()` does, until the next call. Dropout draws from the GPU's generator.

    Args:
        model (`torch.nn.Module`): Its parameters stay where they are in memory.
        loss (`Callable`): Of the model and a batch as `collate` makes it, to be differentiated; it must not wait for
            the GPU.
        max_tokens (`int`): Of the batches (`make_batches`).
    """

    def __init__(
        self,
        model: torch.nn.Module,
        loss: Callable[[torch.nn.Module, dict[str, torch.Tensor]], torch.Tensor],
        max_tokens: int,
    ) -> None:
        self.model, self.loss, self.max_tokens = model, loss, max_tokens
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.graphs: dict[torch.Size, Captured] = {}

    def __call__(self, rows: Sequence[dict[str, Any]]) -> None:
        both = filled_up(rows, self.max_tokens).to(self.parameters[0].device)
        if both.shape not in self.graphs:
            self.graphs[both.shape] = Captured(self.gradients, changes=[], memory=_memory())
        for parameter, gradient in zip(self.parameters, self.graphs[both.shape](both), strict=True):
            parameter.grad = gradient

    def gradients(self, both: torch.Tensor) -> list[torch.Tensor]:
        """Of the loss of what `filled_up` made, in the order of the parameters."""
        return list(torch.autograd.grad(self.loss(self.model, as_batch(*both)), self.parameters))


@functools.cache
def _memory() -> Any:
    """What all graphs of this process share, of all workers: one runs at a time."""
    return torch.cuda.graph_pool_handle()


def filled_up(rows: Sequence[dict[str, Any]], max_tokens: int) -> torch.Tensor:
    """
    Source and labels of a batch, int64 of shape (2, rows, length), with the length raised to one of `LENGTHS` and as
    many rows as a batch of such lengths can have. Rows that fill up have no label, and nothing to learn.
    """
    batch = collate(rows)
    longest = max(batch["input_ids"].shape[1], batch["labels"].shape[1])
    place = next((i for i, length in enumerate(LENGTHS) if length >= longest), len(LENGTHS))
    length = LENGTHS[place] if place < len(LENGTHS) else longest
    shortest = LENGTHS[place - 1] + 1 if place else length
    both = torch.empty(2, max(len(rows), max_tokens // shortest), length, dtype=torch.int64)
    for whole, name, value in zip(both, ("input_ids", "labels"), (PAD, NO_LABEL), strict=True):
        whole.fill_(value)
        whole[: len(rows), : batch[name].shape[1]] = batch[name]
    both[0, len(rows) :, 0] = EOS  # attention to nothing would be NaN
    return both
