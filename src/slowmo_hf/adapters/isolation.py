"""Keeping gradients, unused-parameter bitmaps and buffers inside a worker: DDP without its collectives."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable
from logging import Logger, LoggerAdapter
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from torch.nn.parallel import DistributedDataParallel

from .. import upstream
from ..dtensors import sharded_modules
from ..log import logger
from ..training.optimizers_inside import parameters_of
from . import held_apart
from .alive import alive
from .fully_sharded import ShardedIsolation
from .refusals import JoinRefusal, refuse_optimizer

_ENGINES = "distributed_type must be NO, MULTI_CPU, MULTI_GPU or FSDP (version 2) for local training, got "
_UNSUPPORTED = ("DEEPSPEED", "MEGATRON_LM", "XLA", "TP")
_BY_ACCELERATE = (
    "let accelerator.prepare shard the model: fsdp_version: 2 in the accelerate configuration (Trainer: "
    "fsdp=True, fsdp_config={'version': 2})"
)


def refusal(
    models: Iterable[torch.nn.Module], optimizer: torch.optim.Optimizer | None, *, has_rounds: bool = True
) -> str | None:
    """
    Why there can be no rounds: something replaces the parameters that they average, or shards them in a way that
    leaves it unknown who averages gradients inside a worker. FSDP2 and HSDP are accepted.

    All ranks are about to meet: an engine, which is everybody's, is refused at once; what this rank finds in its model
    is returned in words, which `OuterLoop.start` tells all, or they would wait for this one until their time-out.

    Args:
        models (`Iterable[torch.nn.Module]`): What is trained, as it is called.
        optimizer (`torch.optim.Optimizer`, *optional*): What holds its parameters. With it, gathered copies of sharded
            ones are dropped: not to be called between a forward pass and its backward.
        has_rounds (`bool`, *optional*, defaults to `True`): Without rounds training is stock, and the optimizer any.

    Returns:
        `str`, *optional*: FSDP was asked for and is not there; an optimizer holds plain parameters beside sharded
            ones, or one parameter twice, or is none that rounds can work with (`refuse_optimizer`).

    Raises:
        ValueError: The job runs under DeepSpeed, Megatron-LM, XLA, FSDP of version 1, tensor, context, expert or
            pipeline parallelism.
    """
    models = list(models)
    sharded = sharded_modules(models)
    if upstream.accelerate_is_in_use():
        _refuse_engine(AcceleratorState(), bool(sharded))
    try:
        if optimizer is not None and has_rounds:
            refuse_optimizer(models, optimizer)
        _refuse_model(models, sharded, optimizer)
    except ValueError as error:
        return str(error)
    return None


def _refuse_model(models: list[Any], sharded: list[Any], optimizer: torch.optim.Optimizer | None) -> None:
    for model in models:
        _refuse_wrapped_or_planned(model)
    if optimizer is not None:
        upstream.fsdp_reshard(sharded)  # before names of parameters are taken
        _refuse_parameters(models, sharded, optimizer)


def _refuse_engine(state: Any, is_sharded: bool) -> None:
    kind = state.distributed_type.name
    if kind == "DEEPSPEED":
        raise ValueError(
            f"{_ENGINES}DEEPSPEED, which keeps parameters where rounds cannot reach them. To shard a model that does "
            f"not fit one process, {_BY_ACCELERATE}."
        )
    if kind in _UNSUPPORTED:
        raise ValueError(
            f"{_ENGINES}{kind}, which is not supported yet. Launch without it: every worker must hold whole "
            "parameters, or shards of FSDP version 2."
        )
    version = getattr(getattr(state, "fsdp_plugin", None), "fsdp_version", 1)
    if kind == "FSDP" and version != 2:
        raise ValueError(f"{_ENGINES}FSDP, and fsdp_version must be 2, got {version}: {_BY_ACCELERATE}.")
    parallelism = getattr(state, "parallelism_config", None)
    for name in ("tp_size", "cp_size", "sp_size"):
        _refuse_parallel(f"parallelism_config.{name}", getattr(parallelism, name, 1))
    if kind == "MULTI_CPU" and not is_sharded and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise ValueError(
            "FSDP was asked for (ACCELERATE_USE_FSDP=true or an fsdp_plugin), but accelerate shards on accelerators "
            f"alone: with distributed_type {kind} it has made every process hold the whole model. Launch on GPUs, "
            "leave FSDP out, or shard with transformers' DistributedConfig or torch's fully_shard."
        )


def _refuse_parallel(name: str, size: Any) -> None:
    if (size or 1) > 1:
        raise ValueError(
            f"{name} must be 1 for local training, got {size}: a worker is processes that see different rows, and "
            "these see the same ones. Shard with FSDP2 (dp_shard_size) in its place."
        )


def _refuse_wrapped_or_planned(model: torch.nn.Module) -> None:
    if dist.is_available():
        from torch.distributed.fsdp import FullyShardedDataParallel

        if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
            raise ValueError(
                "the model has FullyShardedDataParallel wrappers, which are FSDP version 1, and fsdp_version must be "
                f"2: {_BY_ACCELERATE}, or use torch's fully_shard."
            )
    for module in model.modules():
        plan = getattr(getattr(module, "config", None), "distributed_config", None)
        for name in ("tp_size", "ep_size", "pp_size"):
            _refuse_parallel(f"DistributedConfig.{name}", getattr(plan, name, 1))


def _refuse_parameters(models: list[torch.nn.Module], sharded: list[Any], optimizer: torch.optim.Optimizer) -> None:
    names = {id(p): name for model in models for name, p in model.named_parameters()}
    every: dict[int, torch.Tensor] = {id(p): p for model in models for p in model.parameters()}
    held = list(parameters_of(optimizer))
    every |= {id(p): p for p in held}
    managed = {id(p) for module in sharded for p in upstream.fsdp_parameters(module)}
    cut = {place: dimensions for place, p in every.items() if (dimensions := _cut_dimensions(p))}
    for place, dimensions in cut.items():
        if dimensions > 1 or place not in managed:
            raise ValueError(
                f"parameter {names.get(place, '')!r} is sharded "
                + (f"in {dimensions} dimensions of its mesh" if dimensions > 1 else "and no FSDP2 module manages it")
                + ": tensor and expert parallelism are not supported. Shard with FSDP2 alone (tp_size=1)."
            )
    if not cut:
        return
    plain = next((p for p in held if p.requires_grad and not hasattr(p, "device_mesh")), None)
    if plain is not None:
        raise ValueError(
            f"parameter {names.get(id(plain), '')!r} is trained and not sharded, beside {len(cut)} that are: nobody "
            "averages its gradient inside a worker. If it is an adapter, add it to the whole model first (PEFT), then "
            f"{_BY_ACCELERATE}. Otherwise freeze it, or take it out of ignored_modules."
        )
    _refuse_two_entries(names, held)


def _refuse_two_entries(names: dict[int, str], held: list[torch.Tensor]) -> None:
    """Ranks with no empty shard do not see it: the start tells them."""
    seen: set[int] = set()
    for p in held:
        if id(p) in seen:
            missing = next((name for place, name in names.items() if place not in {id(q) for q in held}), None)
            raise ValueError(
                f"parameter {names.get(id(p), '')!r} is in the optimizer twice"
                + (f", and {missing!r} is not: " if missing else ": ")
                + "accelerate finds parameters by their address, and empty shards have none. Hand "
                f"accelerator.prepare a whole model ({_BY_ACCELERATE}), or keep a model that is sharded already, and "
                "its optimizer, away from it."
            )
        seen.add(id(p))


def _cut_dimensions(param: Any) -> int:
    """In how many dimensions of its mesh a parameter is not whole; 0 of a plain one."""
    mesh = getattr(param, "device_mesh", None)
    if mesh is None:
        return 0
    return sum(not placement.is_replicate() and mesh.size(i) > 1 for i, placement in enumerate(param.placements))


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
        found |= {id(ddp): ddp for ddp in alive(DistributedDataParallel)}
    place = {id(p): index for index, p in enumerate(parameters)}
    first = [
        (min((place[id(p)] for p in ddp.parameters() if id(p) in place), default=-1), ddp) for ddp in found.values()
    ]
    return [ddp for at, ddp in sorted(first, key=lambda entry: entry[0]) if at >= 0]


class Isolation:
    """
    Holds DDP wrappers apart from other workers, until `release`, or until they are another's behind `end`.

    In a worker of several processes the wrappers get the worker's process group: gradients, unused-parameter bitmaps
    and buffers stay inside. In a worker of one, the two `require_*_sync` flags cost nothing and are enough. They are
    set again at every forward pass: `no_sync()` puts them back when it closes, and loops that accumulate by hand set
    them themselves. One exception: `static_graph` asserts that gradients are reduced. There, the wrapper gets a
    process group of its own, this process alone. SyncBatchNorm, which would meet the whole job at every forward pass,
    meets the worker's processes.

    Args:
        wrappers (`list`): The model's.
        group (`dist.ProcessGroup`, *optional*): The worker's processes; None where it has one.
        sharded (`list`, *optional*): The model's modules that FSDP2 shards, held by a `ShardedIsolation`.
        timeout_seconds (`float`, *optional*): How long their collectives wait.
        joins (`JoinRefusal`, *optional*): To be set again, where training goes on behind `finish`.
        log (`LoggerAdapter`, *optional*): Says which of a program's optimizers it is.
        optimizer (`Callable`, *optional*): Gives the one whose training this is, if it is still there.

    Raises:
        ValueError: A wrapper that needs another process group has a communication hook.
    """

    def __init__(
        self,
        wrappers: list[DistributedDataParallel],
        group: dist.ProcessGroup | None = None,
        sharded: Iterable[Any] = (),
        *,
        timeout_seconds: float | None = None,
        joins: JoinRefusal | None = None,
        log: LoggerAdapter[Logger] | Logger = logger,
        optimizer: Callable[[], Any] | None = None,
    ) -> None:
        self._joins, self._group, self._log = joins, group, log
        self._wrappers: list[DistributedDataParallel] = []
        self._given_away: list[DistributedDataParallel] = []
        self._optimizer = optimizer
        _refuse_communication_hooks([ddp for ddp in wrappers if group is not None or ddp.static_graph])
        self._sharded = ShardedIsolation(sharded, group, timeout_seconds=timeout_seconds, log=log)
        self.take(wrappers)

    def take(self, wrappers: list[DistributedDataParallel]) -> None:
        """Hold these apart too."""
        group = self._group
        for ddp in wrappers:
            has_norms = any(isinstance(m, torch.nn.SyncBatchNorm) for m in ddp.modules())
            inside = group or (_lonely_group() if ddp.static_graph or has_norms else None)
            held_apart.take(ddp, self, (inside if group is not None or ddp.static_graph else None, inside))
        self._wrappers += wrappers
        if wrappers and group is None:
            self._log.info(
                "DDP's gradient, bitmap and buffer exchange is switched off: workers train alone between rounds"
            )
        elif wrappers:
            self._log.info("DDP's gradient, bitmap and buffer exchange stays inside each worker's processes")

    def optimizer(self) -> Any:
        """Whose training this is, if it is still there."""
        return self._optimizer() if self._optimizer is not None else None

    @property
    def is_over(self) -> bool:
        """Whether the training has ended, or its optimizer is gone; a Trainer's ends with `release`."""
        if self._optimizer is None:
            return False
        loop = getattr(self._optimizer(), "outer_loop", None)
        return loop is None or bool(loop.in_flight.is_over)

    def end(self) -> None:
        """Training is over: the wrappers are stock again at the first pass for which another optimizer trains."""
        for ddp in self._wrappers:
            held_apart.may_exchange(ddp)

    def optimizer_is_gone(self) -> None:
        """Nobody has it any more, whether its training was over or not."""
        self.end()
        if self._joins is not None:
            self._joins.release()

    def has_lost(self, ddp: DistributedDataParallel) -> None:
        """It went to another optimizer."""
        self._wrappers.remove(ddp)
        self._given_away.append(ddp)

    def go_on(self) -> None:
        """Call at an optimizer step: training may go on behind `end`."""
        if self._joins is not None:
            self._joins.set()
        if self._given_away:
            self._log.warning(
                "this step's gradients were averaged over all workers: behind finish() another optimizer that holds "
                "the model's parameters had it. From here on workers train alone again"
            )
            wrappers, self._given_away = self._given_away, []
            self.take(wrappers)

    def release(self) -> None:
        """Give the wrappers back as they were, but those that another optimizer of ours holds too."""
        wrappers, self._wrappers = self._wrappers, []
        for ddp in wrappers:
            held_apart.let_go(ddp, self)
        if self._joins is not None:
            self._joins.release()
        self._sharded.release()


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


_lonely: dict[weakref.ref[dist.ProcessGroup], dist.ProcessGroup] = {}


def _lonely_group() -> dist.ProcessGroup:
    """A group of this process alone; made without the others, once per default group."""
    assert dist.group.WORLD is not None
    key = weakref.ref(dist.group.WORLD)  # a later job's may get its id
    if key not in _lonely:
        group = dist.new_group([dist.get_rank()], use_local_synchronization=True)
        assert group is not None
        _lonely[key] = group
    return _lonely[key]
