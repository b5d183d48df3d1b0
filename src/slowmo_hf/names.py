"""
The names that settings may have, and what they stand for: a class each, found where it is wanted. A new one is a file
and a row here, and its name in the `Literal` above the table.
"""

from __future__ import annotations

import importlib
from typing import Any, Literal

import torch

Base = Literal["local_sgd", "sgp", "osgp", "dpsgd", "all_reduce"]
InnerState = Literal["auto", "reset", "maintain", "average"]
ModelBuffers = Literal["average", "local"]
Place = Literal["same", "cpu"]

# Codes that a round's average travels in (`compression`): `codec.Code`.
Compression = Literal["none", "bf16", "int8"]
CODES = {"bf16": "slowmo_hf.algorithm.codec.BFloat16", "int8": "slowmo_hf.algorithm.codec.Int8"}

# Who sends to whom (`topology`): `topology.Schedule`.
TopologyName = Literal["auto", "exponential", "bipartite_exponential", "ring", "complete"]
TOPOLOGIES = {
    "exponential": "slowmo_hf.algorithm.topology.Topology",
    "bipartite_exponential": "slowmo_hf.algorithm.topology.Topology",
    "ring": "slowmo_hf.algorithm.topology.Topology",
    "complete": "slowmo_hf.algorithm.topology.Topology",
}

# Updates of the anchors that have a name (`outer_optimizer`): `outer_update.OuterUpdate`. Any torch optimizer works by
# its dotted path.
OUTER_UPDATES = {"slow_momentum": "slowmo_hf.algorithm.outer_update.PiecewiseUpdate"}

# Of torch.optim, those that treat every element by itself: they work on any part of a tensor.
ELEMENTWISE = (
    "SGD",
    "Adam",
    "AdamW",
    "NAdam",
    "RAdam",
    "Adamax",
    "RMSprop",
    "Adagrad",
    "Adadelta",
    "Rprop",
    "ASGD",
)


def find(path: str) -> Any:
    """What a dotted path leads to; `ImportError` or `AttributeError` where that is nothing."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def path_of(optimizer: type[Any]) -> str:
    """
    The dotted path of a class, by which other processes and a checkpoint find it.

    Raises:
        ValueError: It cannot be found by a path, such as a class that is defined in a function.
    """
    name = optimizer.__qualname__
    path = f"{optimizer.__module__}.{name}"
    if getattr(torch.optim, name, None) is optimizer:
        return f"torch.optim.{name}"  # as users write it
    try:
        found = find(path)
    except (ImportError, AttributeError, ValueError):
        found = None
    if found is not optimizer:
        raise ValueError(
            f"outer_optimizer must be a class that its dotted path leads to, got {optimizer!r}, which is not at "
            f"{path!r}. Define it at the top of a module."
        )
    return path


_named_by_the_program: set[str] = set()


def name_by_the_program(path: str) -> None:
    """A setting that was written in the program itself, by `SlowMoConfig(outer_optimizer=...)`, has this value."""
    _named_by_the_program.add(path)


def may_be_read(path: Any) -> bool:
    """
    Whether `outer_optimizer` of a dictionary, such as a checkpoint's, may be looked up: a name of ours, a class of
    `torch.optim`, or what the program itself names. Nothing is imported. A class is the program's own: no file holds
    one.
    """
    if isinstance(path, type):
        return True
    if not isinstance(path, str):
        return False
    if path in OUTER_UPDATES or path in _named_by_the_program:
        return True
    if not path.startswith("torch.optim."):
        return False
    found: Any = torch
    for name in path.split(".")[1:]:
        found = getattr(found, name, None)
    return isinstance(found, type) and issubclass(found, torch.optim.Optimizer)
