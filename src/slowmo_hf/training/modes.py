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


def _has_weights(module: Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None


@contextmanager
def as_in_training(model: Module | None) -> Iterator[None]:
    """
    Around an exchange of weights: inside, layers in evaluation mode that do something of their own in `train()` are in
    training mode. loralib's would else subtract other adapters from a weight than they have added.
    """
    modules = model.modules() if model is not None and not is_swapping() else ()
    own = [m for m in modules if not m.training and type(m).train is not Module.train and _has_weights(m)]
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
        for part, mode in modes:
            part.training = mode
        _here.is_swapping = False
