"""
The gradients of many workers' models in one pass: their parameters and buffers are rows of stacked tensors, and on a
GPU the pass is one CUDA graph.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch.func import functional_call, vmap


class BatchedGradients:
    """
    Called with every worker's draws it returns every worker's gradients, in the order of its parameters.

    From then on each model's parameters and buffers are rows of `parameters` and `buffers`, tensors of shape
    (workers, *shape): what a worker's optimizer changes in place is what the next pass computes with, and BatchNorm's
    running statistics are each worker's own.

    Args:
        models (`list[torch.nn.Module]`): One per worker, of one architecture.
        examples (`Callable`): Makes (images, labels), shapes (workers, batch, ...), of draws, shape (workers, ...).
        loss (`Callable`): Of one worker: `loss(model, images, labels)`.
        way (`str`, *optional*, defaults to `"batched"`): One pass for all (a convolution has a group per worker); or
            `in_turn`, a pass per worker.
        channels_last (`bool`, *optional*, defaults to `False`): How the images of a batched pass lie in memory.
    """

    def __init__(
        self,
        models: list[torch.nn.Module],
        examples: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
        loss: Callable[[Callable[..., torch.Tensor], torch.Tensor, torch.Tensor], torch.Tensor],
        way: str = "batched",
        channels_last: bool = False,
    ) -> None:
        self.examples, self.loss, self.way, self.channels_last = examples, loss, way, channels_last
        self.parameters = _stack([dict(model.named_parameters()) for model in models])
        for whole in self.parameters.values():
            whole.requires_grad_()
        self.buffers = _stack([dict(model.named_buffers()) for model in models])
        self.template = _for_vmap(copy.deepcopy(models[0]).to("meta"))
        on_gpu = next(iter(self.parameters.values())).is_cuda
        self._run = Captured(self._gradients, changes=list(self.buffers.values())) if on_gpu else self._gradients

    def __call__(self, draws: list[torch.Tensor]) -> list[tuple[torch.Tensor, ...]]:
        """Gradients of worker i at place i; they are overwritten by the next call where a graph is used."""
        return self._run(torch.stack(draws))

    def _gradients(self, draws: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
        images, labels = self.examples(draws)
        if self.way == "in_turn":
            return [self._gradients_of(worker, images[worker], labels[worker]) for worker in range(len(draws))]
        if self.channels_last:  # of (batch, workers x channels, height, width), which a grouped convolution sees
            images = images.permute(1, 3, 4, 0, 2).contiguous().permute(0, 3, 4, 1, 2)
        else:
            images = images.transpose(0, 1)
        losses = vmap(self._loss, in_dims=(0, 0, 1, 0))(self.parameters, self.buffers, images, labels)
        # A worker's loss depends on its own rows alone, so the gradient of the sum holds each worker's gradient.
        # torch.func.grad would say the same, but keeps what second derivatives need.
        return list(zip(*torch.autograd.grad(losses.sum(), list(self.parameters.values())), strict=True))

    def _gradients_of(self, worker: int, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        parameters = {name: whole[worker] for name, whole in self.parameters.items()}
        buffers = {name: whole[worker] for name, whole in self.buffers.items()}
        return torch.autograd.grad(self._loss(parameters, buffers, images, labels), list(parameters.values()))

    def _loss(
        self,
        parameters: dict[str, torch.Tensor],
        buffers: dict[str, torch.Tensor],
        images: torch.Tensor,
        labels: torch.Tensor,
    ) -> torch.Tensor:
        return self.loss(lambda x: functional_call(self.template, (parameters, buffers), (x,)), images, labels)


def _stack(workers: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """By name a tensor of shape (workers, *shape), of which each worker's own tensor becomes a row."""
    stacked = {}
    for name in workers[0]:
        own = [tensors[name] for tensors in workers]
        stacked[name] = torch.stack([tensor.detach() for tensor in own])
        for tensor, row in zip(own, stacked[name].unbind(), strict=True):
            tensor.data = row
    return stacked


class _Mean(torch.nn.Module):
    """`AdaptiveAvgPool2d(1)` in operations that vmap batches; it has no rule for that one's own."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((-2, -1), keepdim=True)


class _BatchNorm(torch.nn.BatchNorm2d):
    """`BatchNorm2d` by torch's own kernel: for cuDNN's it asks for a layout, which vmap does not know."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        with torch.backends.cudnn.flags(enabled=False):
            return super().forward(images)


def _for_vmap(model: torch.nn.Module) -> torch.nn.Module:
    """The same model in operations that vmap batches."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, torch.nn.AdaptiveAvgPool2d):
                setattr(module, name, _Mean())
            elif isinstance(child, torch.nn.BatchNorm2d):
                child.__class__ = _BatchNorm
    return model


class Captured:
    """
    A function of one tensor on a GPU, recorded as a CUDA graph at the first call and replayed from then on: the host
    launches one graph in place of thousands of kernels. What it returned is overwritten by the next call.

    Args:
        function (`Callable`): Launches the same kernels on the same memory each time.
        changes (`list[torch.Tensor]`): What it changes in place. The passes that warm up leave no trace in these.
        memory (`Any`, *optional*): A handle of `torch.cuda.graph_pool_handle()`, shared with graphs that never run at
            the same time; memory of its own by default.
    """

    def __init__(
        self,
        function: Callable[[torch.Tensor], list[tuple[torch.Tensor, ...]]],
        changes: list[torch.Tensor],
        memory: Any = None,
    ) -> None:
        self.function, self.changes, self.memory = function, changes, memory
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, value: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
        if self.graph is None:
            self._capture(value)
        assert self.graph is not None
        self.value.copy_(value)
        self.graph.replay()
        return self.returned

    def _capture(self, value: torch.Tensor) -> None:
        self.value = value.clone()
        before = [tensor.clone() for tensor in self.changes]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries choose their algorithms, which must not be recorded
            for _ in range(3):
                self.function(self.value)
        torch.cuda.current_stream().wait_stream(side)
        for tensor, old in zip(self.changes, before, strict=True):
            tensor.copy_(old)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.memory):  # records, and computes nothing
            self.returned = self.function(self.value)
        self.graph = graph
