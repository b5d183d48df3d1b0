"""Layers whose weights depend on the mode: adapters that are merged in `eval()`, and unmerged in `train()`."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch.nn import Module

_here = threading.local()  # workers of `run_in_process` are threads


def is_swapping() -> bool:
    """Whether modules change their mode for `as_in_training`, and not because the program has asked."""
    return getattr(_here, "is_swapping", False)


def writing_modules(model: Module | None) -> list[Module]:
    """Those that hold weights and do something of their own in `train()`: it may write them. Outermost first."""
    modules = model.modules() if model is not None else ()
    return [m for m in modules if _has_own_train(m) and next(m.parameters(recurse=False), None) is not None]


def _has_own_train(module: Module) -> bool:
    return type(module).train is not Module.train


@contextmanager
def as_in_training(model: Module | None) -> Iterator[None]:
    """
    Around an exchange of weights: inside, layers in evaluation mode that do something of their own in `train()` are in
    training mode. loralib's would else subtract other adapters from a weight than they have added.
    """
    own = [] if is_swapping() else [module for module in writing_modules(model) if not module.training]
    modes = [(part, part.training) for module in own for part in module.modules()]
    if not own:
        yield
        return
    _here.is_swapping = True
    try:
        for module in own:
            module.train()
        yield
    finally:
        for module in own:
            module.eval()
        for part, mode in modes:  # what a program has put into another mode than its parent
            if part.training != mode and _has_own_train(part):
                part.train(mode)
            part.training = mode
        _here.is_swapping = False
