"""What an optimizer is made of: others inside it, and parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


def all_inside(optimizer: Any) -> list[Any]:
    """All optimizers that this one is made of, the innermost first, so that an error names what the user chose."""
    found: dict[int, Any] = {}
    ahead = [optimizer]
    while ahead:
        one = ahead.pop()
        if id(one) in found:
            continue
        found[id(one)] = one
        for value in list(getattr(one, "__dict__", {}).values()):
            values = list(value.values()) if isinstance(value, dict) else value
            values = values if isinstance(values, (list, tuple)) else [value]
            ahead += [each for each in values if hasattr(each, "param_groups") and hasattr(each, "step")]
    return list(reversed(found.values()))


def parameters_of(optimizer: Any) -> Iterator[torch.Tensor]:
    """All that an optimizer holds, as a state dictionary numbers them; of one that is not made yet none."""
    return (param for group in getattr(optimizer, "param_groups", ()) for param in group["params"])
