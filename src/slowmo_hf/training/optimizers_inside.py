"""Optimizers that are made of others."""

from __future__ import annotations

from typing import Any


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
