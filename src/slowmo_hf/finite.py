"""Whether tensors hold neither NaN nor infinity: they are read once, and nothing is written."""

from __future__ import annotations

import math

import torch

from .dtensors import local


@torch.no_grad()
def finiteness(tensors: list[torch.Tensor]) -> torch.Tensor:
    """
    1 where all of this process's values are finite, else NaN: 0-dim, in fp64, on the first one's device. Reads all
    once and writes nothing; nothing waits for the device here.
    """
    alike: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for tensor in map(local, tensors):
        if tensor.numel():
            alike.setdefault((tensor.device, tensor.dtype), []).extend(torch.aminmax(tensor))
    if not alike:
        return torch.ones((), dtype=torch.float64)
    first = next(iter(alike))[0]
    ends = torch.cat([torch.stack(group).to(first, torch.float64) for group in alike.values()])
    return (ends - ends).sum() + 1


def all_finite(tensors: list[torch.Tensor]) -> bool:
    """The same, waited for; also of float8, which has no order, by a wider copy."""
    return math.isfinite(float(finiteness([t.float() if t.element_size() == 1 else t for t in tensors])))
