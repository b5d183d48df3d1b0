"""DDP wrappers that exchange nothing, or inside a worker alone: who holds each one, and what it was before."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from logging import Logger, LoggerAdapter
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from .. import upstream
from .fully_sharded import alive


class Held:
    """
    One wrapper, from its first holder to its last, which gives it back as it was.

    Args:
        ddp (`DistributedDataParallel`): Not held yet.
    """

    def __init__(self, ddp: DistributedDataParallel) -> None:
        self._group = ddp.process_group
        self._norms = [(m, m.process_group) for m in ddp.modules() if isinstance(m, torch.nn.SyncBatchNorm)]
        self._hook = ddp.register_forward_pre_hook(_before_pass)  # no method: a copy of the wrapper has it too
        self._holders: list[weakref.ref[Any]] = []
        self._has_other_group = self.exchanges_nothing = False

    def take(self, ddp: DistributedDataParallel, holder: Any, groups: tuple[Any, Any]) -> None:
        """
        Hold it, for `holder` too.

        Args:
            groups (`tuple`): Of its exchanges, None for none at all; and of SyncBatchNorm.
        """
        self._holders.append(weakref.ref(holder))
        self.exchanges_nothing = groups[0] is None
        if groups[0] is None:
            switch_off(ddp)
        else:
            upstream.set_process_group(ddp, groups[0])
            self._has_other_group = True
        for norm, _ in self._norms:
            norm.process_group = groups[1]

    def let_go(self, ddp: DistributedDataParallel, holder: Any) -> None:
        """This one holds it no more."""
        self._holders = [one for one in self._holders if one() not in (None, holder)]
        if self._holders:
            return
        self._hook.remove()
        del _held[ddp]
        if self._has_other_group:
            upstream.set_process_group(ddp, self._group)
        for norm, group in self._norms:
            norm.process_group = group
        ddp.require_backward_grad_sync = ddp.require_forward_param_sync = True

    def holders(self) -> list[Any]:
        """Those that are alive."""
        return [holder for one in self._holders if (holder := one()) is not None]


_held: weakref.WeakKeyDictionary[DistributedDataParallel, Held] = weakref.WeakKeyDictionary()


def take(ddp: DistributedDataParallel, holder: Any, groups: tuple[Any, Any]) -> None:
    """Hold a wrapper apart until `let_go` (`Held.take`)."""
    if ddp not in _held:
        _held[ddp] = Held(ddp)
    _held[ddp].take(ddp, holder, groups)


def let_go(ddp: DistributedDataParallel, holder: Any) -> None:
    """End that; the wrapper is as it was where nobody else holds it."""
    if ddp in _held:
        _held[ddp].let_go(ddp, holder)


def is_apart(model: torch.nn.Module) -> bool:
    """Whether it is a wrapper that exchanges nothing."""
    return isinstance(model, DistributedDataParallel) and model in _held and _held[model].exchanges_nothing


NOT_AVERAGED = (
    "base='all_reduce' needs DDP's average of gradients, and another SlowMoOptimizer, whose training has not ended, "
    "has switched it off for this model. Call slowmo_hf.finish on the earlier one if it is done; else give both the "
    "same base, or each a model of its own."
)


def not_averaged(wrappers: Iterable[DistributedDataParallel]) -> bool:
    """Whether one of these is held for a training that is not over."""
    return any(not holder.is_over for ddp in wrappers if ddp in _held for holder in _held[ddp].holders())


class Averaging:
    """
    In the place of an `Isolation`, for base all_reduce: DDP averages.

    Args:
        wrappers (`list`): The model's.
    """

    is_apart = False

    def __init__(self, wrappers: list[DistributedDataParallel]) -> None:
        self._wrappers = wrappers

    def go_on(self) -> None:
        """Call at an optimizer step.

        Raises:
            RuntimeError: Another optimizer has begun, and has switched the average off.
        """
        if not_averaged(self._wrappers):
            raise RuntimeError(NOT_AVERAGED)

    def end(self) -> None:
        """Nothing to give back."""


def switch_off(ddp: Any) -> None:
    """These cost nothing; `no_sync()`, and loops that accumulate by hand, set them too."""
    ddp.require_backward_grad_sync = ddp.require_forward_param_sync = False


def _before_pass(ddp: Any, inputs: Any = None) -> None:
    """Behind `finish` the model may be another's to train: it is stock again, before the pass."""
    held = _held.get(ddp)
    if held is None:
        return
    holders = held.holders()
    is_over = torch.is_grad_enabled() and all(holder.is_over for holder in holders)
    if is_over and _is_anothers(ddp, {id(one) for holder in holders for one in inside(holder.optimizer())}):
        for holder in holders:
            holder.let_go()
        return
    if held.exchanges_nothing:
        switch_off(ddp)


def tell_of_others_beside(
    wrappers: Iterable[DistributedDataParallel], optimizer: Any, log: LoggerAdapter[Logger] | Logger
) -> None:
    """Warn of each optimizer that is in none of ours, and trains parameters of these that `optimizer` does not."""
    left = {id(p) for ddp in wrappers for p in ddp.parameters() if p.requires_grad} - held_by(optimizer)
    if not left:
        return
    every = alive(torch.optim.Optimizer)
    ours = {id(one) for each in every if isinstance(each, type(optimizer)) for one in inside(each)}
    for one in every:
        count = len(left & held_by(one))
        if count and inside(one) == [one] and id(one) not in ours:  # what wraps it (Accelerate's) is not told too
            log.warning(
                "%s trains %d parameters of a model that exchanges no gradients now: nobody averages theirs, rounds "
                "average their values, and a checkpoint has rank 0's state of it alone. Wrap it too: "
                "SlowMoOptimizer(optimizer).",
                type(one).__name__,
                count,
            )


def _is_anothers(ddp: Any, own: set[int]) -> bool:
    """Whether an optimizer has parameters of the wrapper that is none of `own`, by identity, and wraps none."""
    params = {id(p) for p in ddp.parameters() if p.requires_grad}
    return any(
        params & held_by(one) and not any(id(within) in own for within in inside(one))
        for one in alive(torch.optim.Optimizer)
    )


def held_by(optimizer: Any) -> set[int]:
    """Its parameters, by identity; of one that is not made yet none."""
    return {id(p) for group in getattr(optimizer, "param_groups", ()) for p in group["params"]}


def inside(optimizer: Any) -> list[Any]:
    """An optimizer, and those that it wraps."""
    found: list[Any] = []
    ahead = [optimizer]
    while ahead:
        one = ahead.pop()
        if isinstance(one, (list, tuple)):
            ahead += one
        elif isinstance(one, torch.optim.Optimizer) and not any(one is other for other in found):
            found.append(one)
            ahead += vars(one).values()
    return found
