"""DDP wrappers that exchange nothing, or inside a worker alone: who holds each one, and what it was before."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from .. import upstream
from ..training.optimizers_inside import all_inside, parameters_of
from .alive import after_collection, alive


class Held:
    """
    One wrapper, from its first holder to its last.

    Args:
        ddp (`DistributedDataParallel`): Not held yet.
    """

    def __init__(self, ddp: DistributedDataParallel) -> None:
        self._group = ddp.process_group
        self._norms = [(m, m.process_group) for m in ddp.modules() if isinstance(m, torch.nn.SyncBatchNorm)]
        # No methods: a copy of the wrapper has them too.
        self._hooks = [ddp.register_forward_pre_hook(_before_pass), ddp.register_forward_hook(_behind_pass)]
        self._holders: list[weakref.ref[Any]] = []
        self._has_other_group = self.exchanges_nothing = False

    @property
    def holders(self) -> list[Any]:
        """Those that are alive."""
        return [holder for one in self._holders if (holder := one()) is not None]

    def take(self, ddp: DistributedDataParallel, holder: Any, groups: tuple[Any, Any]) -> None:
        """
        Hold it, for `holder` too.

        Args:
            groups (`tuple`): Of its exchanges, None for none at all; and of SyncBatchNorm.
        """
        self._holders.append(weakref.ref(holder))
        self.exchanges_nothing = groups[0] is None
        if groups[0] is None:
            _switch(ddp, on=False)
        else:
            upstream.set_process_group(ddp, groups[0])
            self._has_other_group = True
        for norm, _ in self._norms:
            norm.process_group = groups[1]

    def drop(self, holder: Any) -> bool:
        """This one holds it no more; whether another one does."""
        self._holders = [one for one in self._holders if one() not in (None, holder)]
        return bool(self._holders)

    def give_back(self, ddp: DistributedDataParallel) -> None:
        """
        As it was, but for its flags: this may be inside `no_sync()`, which sets them back when it closes.
        """
        for hook in self._hooks:
            hook.remove()
        del _held[ddp]
        for holder in self.holders:
            holder.has_lost(ddp)
        if self._has_other_group:
            upstream.set_process_group(ddp, self._group)
        for norm, group in self._norms:
            norm.process_group = group


_held: weakref.WeakKeyDictionary[DistributedDataParallel, Held] = weakref.WeakKeyDictionary()


def take(ddp: DistributedDataParallel, holder: Any, groups: tuple[Any, Any]) -> None:
    """Hold a wrapper apart until `let_go` (`Held.take`); those whose training is over hold it no more."""
    held = _held.get(ddp)
    if held is not None and not _is_in_use(ddp):
        held.give_back(ddp)
    if ddp not in _held:
        _held[ddp] = Held(ddp)
    _held[ddp].take(ddp, holder, groups)


def let_go(ddp: DistributedDataParallel, holder: Any) -> None:
    """End that, outside `no_sync()`; the wrapper is as it was where nobody else holds it."""
    held = _held.get(ddp)
    if held is not None and not held.drop(holder):
        held.give_back(ddp)
        _switch(ddp, on=True)


def may_exchange(ddp: DistributedDataParallel) -> None:
    """
    A holder's training is over: from the next pass on the wrapper may be another's (`_before_pass`). Its flag is set
    now, outside `no_sync()`, which keeps what it finds. A pass for nobody's training exchanges nothing anyway.
    """
    held = _held.get(ddp)
    if held is not None and held.exchanges_nothing and not _is_in_use(ddp):
        ddp.require_backward_grad_sync = True


def is_apart(model: torch.nn.Module) -> bool:
    """Whether it is a wrapper that exchanges nothing."""
    return isinstance(model, DistributedDataParallel) and model in _held and _held[model].exchanges_nothing


NOT_AVERAGED = (
    "base='all_reduce' needs DDP's average of gradients, and another SlowMoOptimizer, whose training has not ended, "
    "has switched it off for this model. Call slowmo_hf.finish on the earlier one if it is done; else give both the "
    "same base, or each a model of its own."
)


def not_averaged(wrappers: list[DistributedDataParallel]) -> bool:
    """Whether one of these is held for a training that is not over, by an optimizer that is still there."""
    return after_collection(lambda: any(map(_is_in_use, wrappers)))


def _is_in_use(ddp: DistributedDataParallel) -> bool:
    """Whether it is held for a training that is not over."""
    return ddp in _held and not all(holder.is_over for holder in _held[ddp].holders)


class Averaging:
    """
    In the place of an `Isolation`, for base all_reduce: DDP averages.

    Args:
        wrappers (`list`): The model's.
    """

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


def _switch(ddp: Any, *, on: bool) -> None:
    """These cost nothing; `no_sync()`, and loops that accumulate by hand, set them too."""
    ddp.require_backward_grad_sync = ddp.require_forward_param_sync = on


def _before_pass(ddp: Any, inputs: Any) -> None:
    """Behind `finish` the model may be another's to train: it is stock again, before the pass."""
    held = _held.get(ddp)
    if held is None:
        return
    if torch.is_grad_enabled() and not _is_in_use(ddp) and _is_anothers(ddp, held):
        held.give_back(ddp)
    elif held.exchanges_nothing:
        _switch(ddp, on=False)


def _behind_pass(ddp: Any, inputs: Any, outputs: Any) -> None:
    """An evaluation behind `finish` has exchanged nothing; the flag is set for who trains next."""
    if not torch.is_grad_enabled():
        may_exchange(ddp)


def _is_anothers(ddp: Any, held: Held) -> bool:
    """Whether an optimizer trains parameters of the wrapper that has nothing to do with those of the holders."""
    params = {id(p) for p in ddp.parameters() if p.requires_grad}

    def found() -> bool:
        own = {id(one) for holder in held.holders for one in all_inside(holder.optimizer())}
        return any(
            any(id(p) in params for p in parameters_of(one)) and not any(id(part) in own for part in all_inside(one))
            for one in alive(torch.optim.Optimizer)
        )

    return after_collection(found)
