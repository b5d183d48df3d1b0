"""Keeping gradients, unused-parameter bitmaps and buffers inside a worker: DDP without its collectives."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from torch.nn.parallel import DistributedDataParallel

from .. import upstream
from ..log import logger

_UNSUPPORTED = ("DEEPSPEED", "FSDP", "MEGATRON_LM", "XLA", "TP")


def refuse_unsupported() -> None:
    """
    Refuse what shards or replaces the parameters that rounds average.

    Raises:
        ValueError: The job runs under DeepSpeed, FSDP, Megatron-LM or XLA.
    """
    if not upstream.accelerate_is_in_use():
        return
    kind = AcceleratorState().distributed_type.name
    if kind in _UNSUPPORTED:
        raise ValueError(
            f"distributed_type must be NO, MULTI_CPU or MULTI_GPU for local training, got {kind}, which is not "
            "supported yet. Launch without it: every worker must hold whole parameters."
        )


def ddp_wrappers(
    parameters: Iterable[torch.Tensor], within: torch.nn.Module | None = None
) -> list[DistributedDataParallel]:
    """
    Every DistributedDataParallel that holds one of `parameters`, in the parameters' order, the same on every rank.

    Args:
        within (`torch.nn.Module`, *optional*): Where to look first: the module that is called, or Trainer's own.
            Others that are alive couple ranks too: those of other networks, and stale ones, which
            `auto_find_batch_size` and a second `prepare` leave behind. Only a walk over all objects finds them, some
            0.03 s once per start.
    """
    found = {id(m): m for m in (() if within is None else within.modules()) if isinstance(m, DistributedDataParallel)}
    if dist.is_available() and dist.is_initialized():  # no wrapper can be without a group
        kinds = _kinds(DistributedDataParallel)  # an object refers to its class; a walk in Python takes 0.1 s
        found |= {id(o): o for o in gc.get_referrers(*kinds) if type(o) in kinds}
    place = {id(p): index for index, p in enumerate(parameters)}
    first = [
        (min((place[id(p)] for p in ddp.parameters() if id(p) in place), default=-1), ddp) for ddp in found.values()
    ]
    return [ddp for at, ddp in sorted(first, key=lambda entry: entry[0]) if at >= 0]


def _kinds(kind: type[Any]) -> set[type[Any]]:
    """The class and all that inherit from it."""
    return {kind}.union(*(_kinds(child) for child in kind.__subclasses__()))


class Isolation:
    """
    Holds DDP wrappers apart from other workers, until `release`.

    In a worker of several processes the wrappers get the worker's process group: gradients, unused-parameter bitmaps
    and buffers stay inside. In a worker of one, the two `require_*_sync` flags cost nothing and are enough, with two
    exceptions. A `no_sync()` that is open puts them back when it closes, so they are set again at every forward pass
    until `settle` finds them set. `static_graph` asserts that gradients are reduced: there, the wrapper gets a process
    group of its own, this process alone. SyncBatchNorm, which would meet the whole job at every forward pass, meets
    the worker's processes.

    Args:
        wrappers (`list`): The model's.
        group (`dist.ProcessGroup`, *optional*): The worker's processes; None where it has one.

    Raises:
        ValueError: A wrapper that needs another process group has a communication hook.
    """

    def __init__(self, wrappers: list[DistributedDataParallel], group: dist.ProcessGroup | None = None) -> None:
        self._by_flags = [ddp for ddp in wrappers if group is None and not ddp.static_graph]
        self._by_group = [(ddp, ddp.process_group) for ddp in wrappers if group is not None or ddp.static_graph]
        _refuse_communication_hooks([ddp for ddp, _ in self._by_group])
        self._hooks = [
            ddp.register_forward_pre_hook(_switch_off) for ddp in self._by_flags if not ddp.require_backward_grad_sync
        ]
        for ddp in self._by_flags:
            _switch_off(ddp)
        for ddp, _ in self._by_group:
            upstream.set_process_group(ddp, group or _lonely_group())
        norms = [m for ddp in wrappers for m in ddp.modules() if isinstance(m, torch.nn.SyncBatchNorm)]
        self._norms = [(norm, norm.process_group) for norm in norms]
        for norm in norms:
            norm.process_group = group or _lonely_group()
        if wrappers and group is None:
            logger.info(
                "DDP's gradient, bitmap and buffer exchange is switched off: workers train alone between rounds"
            )
        elif wrappers:
            logger.info("DDP's gradient, bitmap and buffer exchange stays inside each worker's processes")

    def settle(self) -> None:
        """Call at an optimizer step: stop setting the flags at every forward pass once they stay."""
        if self._hooks and not any(ddp.require_backward_grad_sync for ddp in self._by_flags):
            self._remove_hooks()

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def release(self) -> None:
        """Give the wrappers back as they were."""
        self._remove_hooks()
        for ddp in self._by_flags:
            ddp.require_backward_grad_sync = ddp.require_forward_param_sync = True
        for ddp, group in self._by_group:
            upstream.set_process_group(ddp, group)
        for norm, norm_group in self._norms:
            norm.process_group = norm_group
        self._by_flags, self._by_group, self._norms = [], [], []


def _refuse_communication_hooks(wrappers: list[Any]) -> None:
    """
    A hook keeps the group that it was registered with: gradients would be averaged over the whole job, and nothing
    would tell.
    """
    for ddp in wrappers:
        hook = upstream.communication_hook(ddp)
        if hook:
            raise ValueError(
                f"a DDP communication hook ({hook}) averages gradients over all processes of the job and cannot be "
                "kept inside a worker. Register none, or use processes_per_worker=1 without static_graph, where DDP "
                "exchanges nothing."
            )


def _switch_off(ddp: Any, inputs: Any = None) -> None:
    ddp.require_backward_grad_sync = ddp.require_forward_param_sync = False


def gather_inside(tensor: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """
    As `accelerator.gather`, of the worker's processes alone: joined along the first dimension.

    Args:
        group (`dist.ProcessGroup`, *optional*): The worker's processes; None where it has one.
    """
    own = (tensor[None] if tensor.ndim == 0 else tensor).contiguous()
    if group is None:
        return own
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own, group=group)
    return torch.cat(parts)


_lonely: dict[int, dist.ProcessGroup] = {}


def _lonely_group() -> dist.ProcessGroup:
    """A group of this process alone; made without the others, once per default group."""
    key = id(dist.group.WORLD)
    if key not in _lonely:
        group = dist.new_group([dist.get_rank()], use_local_synchronization=True)
        assert group is not None
        _lonely[key] = group
    return _lonely[key]
