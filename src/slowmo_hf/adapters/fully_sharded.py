"""Parameters sharded by FSDP2: which modules hold them, and their gradients kept inside a worker."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import timedelta
from logging import Logger, LoggerAdapter
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from .. import upstream
from ..dtensors import sharded_modules
from ..log import logger
from ..training.optimizers_inside import parameters_of
from .alive import alive

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


def sharded_roots(optimizer: torch.optim.Optimizer) -> list[Any]:
    """
    The outermost modules that hold an optimizer's sharded parameters, of all that are alive: where no pass has shown
    the model; nothing where no parameter is sharded.
    """
    own = {id(p) for p in parameters_of(optimizer) if hasattr(p, "device_mesh")}
    if not own:
        return []
    from torch.distributed.fsdp import FSDPModule

    found = alive(FSDPModule)
    inner = {id(m) for one in found for m in one.modules() if m is not one}
    outer = [one for one in found if id(one) not in inner]
    return [one for one in outer if any(id(p) in own for p in all_parameters(one))]


def all_parameters(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    """
    A module's parameters as its optimizer holds them: while FSDP2 has gathered some, `parameters()` has others in
    their place.
    """
    yield from module.parameters()
    for sharded in sharded_modules([module]):
        yield from upstream.fsdp_parameters(sharded)


class ShardedIsolation:
    """
    Holds sharded models apart from other workers, until `release`: FSDP2 gathers parameters and averages gradients
    over a worker's own shards.

    HSDP's mesh has two dimensions, replicas and shards, and every backward pass averages over both. Each parameter
    group gets the same mesh without the first: the divisor follows, `no_sync` and accumulation go on as they were, and
    a group that reshards after its forward pass does so as before. Where it reshards to fewer processes
    (`reshard_after_forward=2`), these are neighbours inside the shards already. A mesh of shards alone needs nothing.

    A frozen mate is an error after `timeout_seconds`, not after torch's 30 minutes: the mesh's own group gets that
    time-out. Norms (`clip_grad_norm_`) and `full_tensor` meet in the same group, by way of each parameter's mesh, so
    another group for FSDP alone would leave them with 30 minutes.

    SyncBatchNorm, which would meet the whole job at every forward pass, meets the worker's processes.

    Args:
        modules (`list`): What `sharded_modules` has found.
        group (`dist.ProcessGroup`, *optional*): The worker's processes; where it is None, those of the mesh's shards.
        timeout_seconds (`float`, *optional*): How long a collective inside the worker waits; as it was where it is
            None.
        log (`LoggerAdapter`, *optional*): As of `Isolation`.

    Raises:
        ValueError: A module averages over replicas without shards, or by a hook.
        RuntimeError: This version of torch keeps replicas where they are not known: gradients would couple workers.
    """

    def __init__(
        self,
        modules: Iterable[FSDPModule],
        group: dist.ProcessGroup | None = None,
        *,
        timeout_seconds: float | None = None,
        log: LoggerAdapter[Logger] | Logger = logger,
    ) -> None:
        modules = list(modules)
        groups = list({id(one): one for module in modules for one in upstream.fsdp_parameter_groups(module)}.values())
        _refuse_hooks(groups)
        self._exchanged: list[tuple[Any, Any, Any]] = []
        self._timeouts: list[tuple[dist.ProcessGroup, timedelta]] = []
        self._norms: list[tuple[torch.nn.SyncBatchNorm, Any]] = []
        try:
            self._exchange(groups)
        except BaseException:
            self.release()
            raise
        if not groups:
            return
        if timeout_seconds is not None:
            self._set_timeouts(groups, timedelta(seconds=timeout_seconds))
        self._keep_norms(modules, group or groups[0].mesh_info.shard_process_group)
        log.info("FSDP2 averages gradients over each worker's shards")

    def _exchange(self, groups: list[Any]) -> None:
        alone: dict[int, Any] = {}  # one for all groups that share a mesh, as it was
        for group in groups:
            before = group.mesh_info
            if not upstream.fsdp_replicas(group):
                continue
            after = alone.setdefault(id(before), upstream.fsdp_over_shards_alone(before))
            if after is None:
                raise ValueError(
                    "replicate() averages gradients over all its processes, and cannot be kept inside a worker. Use "
                    "fully_shard over a mesh of replicas and shards, or DistributedDataParallel."
                )
            self._exchanged.append((group, before, after))
            group.mesh_info = after
            if group.post_forward_mesh_info is before:  # another one gathers over neighbours among the shards
                group.post_forward_mesh_info = after
        left = sorted({name for group in groups for name in upstream.fsdp_replicas(group)})
        if left:
            raise RuntimeError(
                f"torch {torch.__version__} keeps FSDP2's replicas in {', '.join(left)} too, which slowmo_hf does not "
                "know: gradients would be averaged over all workers at every step. Use another version of torch (2.13 "
                "is tested), or fully_shard over a mesh of each machine's own processes."
            )

    def _set_timeouts(self, groups: list[Any], timeout: timedelta) -> None:
        infos = [info for one in groups for info in (one.mesh_info, one.post_forward_mesh_info) if info is not None]
        names = ("shard_process_group", "reduce_scatter_process_group")
        own = {id(g): g for info in infos for name in names if (g := getattr(info, name, None)) is not None}
        for group in own.values():
            if group is not dist.group.WORLD:  # the user's own collectives meet there
                before = upstream.set_group_timeout(group, timeout)
                self._timeouts += [] if before is None else [(group, before)]

    def _keep_norms(self, modules: list[FSDPModule], group: dist.ProcessGroup) -> None:
        within = {id(m): m for module in modules for m in module.modules()}  # type: ignore[attr-defined]
        for norm in within.values():
            if isinstance(norm, torch.nn.SyncBatchNorm):
                self._norms.append((norm, norm.process_group))
                norm.process_group = group

    def release(self) -> None:
        """Give the modules back as they were."""
        for group, before, after in self._exchanged:
            if group.mesh_info is after:
                group.mesh_info = before
            if group.post_forward_mesh_info is after:  # a first forward pass has taken it from the root meanwhile
                group.post_forward_mesh_info = before
        for process_group, timeout in self._timeouts:
            upstream.set_group_timeout(process_group, timeout)
        for norm, norm_group in self._norms:
            norm.process_group = norm_group
        self._exchanged, self._timeouts, self._norms = [], [], []


def _refuse_hooks(groups: list[Any]) -> None:
    """It is called after every reduction, and may average over anybody."""
    for group in groups:
        hook = upstream.fsdp_all_reduce_hook(group)
        if hook is not None:
            raise ValueError(
                f"set_all_reduce_hook ({getattr(hook, '__qualname__', hook)}) sees every gradient and cannot be kept "
                "inside a worker. Set none: the mesh of replicas and shards says who averages."
            )
