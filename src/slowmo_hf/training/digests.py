"""Digests of many tensors at once, of any layout and on any device: whether one has changed, without a copy."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..algorithm.digest import digest
from ..algorithm.layout import has_dense_memory
from ..dtensors import local


def parts_of(tensor: torch.Tensor, stride: tuple[int, ...] = ()) -> list[torch.Tensor]:
    """Dense tensors that hold its bytes, in the order of memory that is asked for; none where they are hidden."""
    own = local(tensor).detach()
    if own.layout == torch.sparse_coo:
        own = own.coalesce()
        return [own.indices(), own.values()]
    if own.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [own.crow_indices(), own.col_indices(), own.values()]
    if own.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [own.ccol_indices(), own.row_indices(), own.values()]
    if own.layout != torch.strided or own.is_quantized or hasattr(own, "__tensor_flatten__"):
        return []
    if not has_dense_memory(own):
        return [own.contiguous()]
    if stride and own.stride() != stride:
        return [torch.empty_strided(own.shape, stride, dtype=own.dtype, device=own.device).copy_(own)]
    return [own]


def digests_of(tensors: Iterable[torch.Tensor]) -> list[list[int]]:
    """Of each one's bytes, as they lie."""
    return digests([parts_of(tensor) for tensor in tensors])


def digests(tensors: list[list[torch.Tensor]]) -> list[list[int]]:
    """Of each one's parts; a card is waited for once."""
    flat = [digest(part) for parts in tensors for part in parts]
    devices = {number.device for number in flat}
    numbers: dict[int, int] = {}
    for device in devices:
        here = [index for index, number in enumerate(flat) if number.device == device]
        numbers.update(zip(here, torch.stack([flat[index] for index in here]).tolist(), strict=True))
    found, at = [], 0
    for parts in tensors:
        found.append([numbers[index] for index in range(at, at + len(parts))])
        at += len(parts)
    return found
