"""DTensors, of which every process of a worker has a shard (FSDP2): nothing else knows them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


_WHOLE = frozenset((torch.Tensor, torch.nn.Parameter))  # an attribute that a tensor lacks is looked up slowly


def is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor."""
    return type(tensor) not in _WHOLE and hasattr(tensor, "to_local")


def sharded_modules(models: Iterable[torch.nn.Module]) -> list[FSDPModule]:
    """Every module of these models that `fully_shard` has been given (FSDP2), each once, in the models' order."""
    if not torch.distributed.is_available():
        return []
    from torch.distributed.fsdp import FSDPModule

    found = {id(module): module for model in models for module in model.modules() if isinstance(module, FSDPModule)}
    return list(found.values())


def local(tensor: torch.Tensor) -> torch.Tensor:
    """
    This process's own elements: the shard of a DTensor, else the tensor itself. Asked for at each use, and never kept:
    FSDP may replace a shard's memory. Sizes and strides of a DTensor are those of the whole.
    """
    if not is_sharded(tensor):
        return tensor
    sharded: Any = tensor
    with torch.no_grad():
        return sharded.to_local()  # type: ignore[no-any-return]


def shard_mates(tensor: torch.Tensor) -> tuple[int, ...]:
    """The ranks that hold one DTensor's shards together, this one among them, in the order of the shards."""
    sharded: Any = tensor
    mesh = sharded.device_mesh
    here = zip(sharded.placements, mesh.get_coordinate(), strict=True)
    row = mesh.mesh[tuple(slice(None) if placement.is_shard() else at for placement, at in here)]
    return tuple(row.flatten().tolist())


def let_reads_end(tensors: Iterable[torch.Tensor]) -> None:
    """
    Wait for what the card still reads of shards in main memory (FSDP2's `CPUOffloadPolicy`), before they are written:
    a forward pass returns while their copies to the card are to come. A backward pass waits for them itself; behind a
    pass without one, the evaluation would see a mixture.
    """
    for tensor in tensors:
        if is_sharded(tensor) and tensor.device.type == "cpu":
            sharded: Any = tensor
            if sharded.device_mesh.device_type == "cuda":
                torch.cuda.synchronize()
                return


def described(tensor: torch.Tensor, like: torch.Tensor) -> list[Any]:
    """
    What a shard in a file needs to be a DTensor again, as plain values: shape, strides, and how it lies over the
    processes that share `like`, a parameter. Replicas are alike.
    """
    sharded: Any = tensor
    placement = sharded.placements[_shard_dimension(like)]
    return [list(sharded.shape), list(sharded.stride()), _name(placement)]


def as_described(own: torch.Tensor, description: Any, like: torch.Tensor) -> torch.Tensor:
    """
    The inverse, over the mesh of a parameter.

    Raises:
        ValueError: The description is none, or does not fit the shard.
    """
    from torch.distributed.tensor import DTensor, Replicate  # here: what has no DTensor need not wait for the import

    match description:
        case [list() as shape, list() as stride, str() as name] if len(shape) == len(stride) == own.dim() and all(
            type(n) is int and n >= 0 for n in (*shape, *stride)
        ):
            placement = _placement(name, own.dim())
        case _:
            raise ValueError(f"the description of a shard is {description!r}")
    mesh: Any = like.device_mesh  # type: ignore[attr-defined]
    across = _shard_dimension(like)
    here = list(shape)
    if placement.is_shard():  # as torch.chunk cuts
        whole, length = shape[placement.dim], -(-shape[placement.dim] // mesh.shape[across])
        here[placement.dim] = max(0, min(length, whole - mesh.get_coordinate()[across] * length))
    if tuple(here) != own.shape:
        raise ValueError(f"a shard has shape {tuple(own.shape)}, and its description makes it {tuple(here)}")
    placements = [placement if dimension == across else Replicate() for dimension in range(mesh.ndim)]
    if like.device.type != mesh.device_type and tuple(shape) == like.shape and placement == like.placements[across]:  # type: ignore[attr-defined]
        # In main memory beside a mesh of cards (CPUOffloadPolicy). `from_local` would bring all of it to the card.
        made = torch.empty_like(like, dtype=own.dtype, requires_grad=False)
        local(made).copy_(own)
        return made
    return DTensor.from_local(own, mesh, placements, run_check=False, shape=torch.Size(shape), stride=tuple(stride))


def _shard_dimension(param: Any) -> int:
    """That of its mesh over which a parameter is sharded."""
    return next(dimension for dimension, placement in enumerate(param.placements) if placement.is_shard())


def _name(placement: Any) -> str:
    if placement.is_shard():
        return f"shard {placement.dim}"
    return "replicate" if placement.is_replicate() else f"partial {placement.reduce_op}"


def _placement(name: str, dims: int) -> Any:
    from torch.distributed.tensor import Partial, Replicate, Shard

    kind, _, which = name.partition(" ")
    if kind == "shard" and which.isdecimal() and int(which) < dims:
        return Shard(int(which))
    if kind == "partial" and which in ("sum", "avg", "min", "max", "product"):
        return Partial(which)
    if name == "replicate":
        return Replicate()
    raise ValueError(f"no placement is called {name!r}")
