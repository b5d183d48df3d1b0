"""What another SlowMoOptimizer of the program, or a new DDP wrapper, may do with parameters that train already."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Container
from logging import Logger, LoggerAdapter
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from ..config import SlowMoConfig
from ..rules import SLOW_MOMENTUM
from ..training.optimizers_inside import all_inside, parameters_of
from .alive import after_collection, alive
from .held_apart import NOT_AVERAGED, Averaging, not_averaged

_started: list[weakref.ref[Any]] = []  # all that train, or have trained


def note_start(optimizer: Any, *, goes_on: bool) -> None:
    """
    This SlowMoOptimizer trains from now on. Where it does not go on from a checkpoint, its start has given all workers
    rank 0's weights: warn of each that trains some of them, and is between rounds.
    """
    own = {id(p) for p in parameters_of(optimizer)}
    for other in [] if goes_on else _training(own):
        loop = other.outer_loop
        if loop.parts.trains_alone and not loop.clock.workers_agree and not loop.consensus.shows_average:
            optimizer.outer_loop.workers.logger.warning(
                "another SlowMoOptimizer has trained %d of these parameters for %d steps since its last round, each "
                "worker on its own: this start has given all workers rank 0's, and what the others learned is lost. "
                "Call slowmo_hf.finish on the earlier one before.",
                sum(id(p) in own for p in parameters_of(other)),
                loop.attempted_steps - loop.consensus.last_round_step,
            )
    _started.append(weakref.ref(optimizer, _started.remove))


def beside_another(optimizer: Any, wrappers: list[DistributedDataParallel]) -> str | None:
    """
    Why this one cannot start beside another that trains. Base all_reduce would have no average of gradients. With slow
    momentum in both, each one's round would take the other's for progress of its own, and a shared parameter moves
    further from round to round, without bound.
    """
    if optimizer.config.base == "all_reduce" and not_averaged(wrappers):
        return NOT_AVERAGED
    if not _outer_momentum(optimizer.config):
        return None
    own = {id(p): (g, i) for g, group in enumerate(optimizer.param_groups) for i, p in enumerate(group["params"])}
    others = [one for one in _training(own) if _outer_momentum(one.config) and one.outer_loop.attempted_steps]
    shared = [own[id(p)] for other in others for p in parameters_of(other) if id(p) in own]
    if not shared:
        return None
    group, index = min(shared)
    return (
        f"parameter {index} of group {group} ({len(set(shared))} in all) is in another SlowMoOptimizer too, whose "
        "training has not ended, and both have slow momentum: each would take the other's for progress. Call "
        "slowmo_hf.finish on the earlier one if it is done; else use outer_momentum=0 in one of them (of an "
        "outer_optimizer: a momentum of 0), or one optimizer."
    )


def tell_of_others(
    wrappers: list[DistributedDataParallel], optimizer: Any, log: LoggerAdapter[Logger] | Logger
) -> None:
    """
    Warn of each optimizer that is in none of ours, and trains parameters of these wrappers that `optimizer` does not;
    of those that are made before it starts.
    """
    own = {id(p) for p in parameters_of(optimizer)}
    left = {id(p) for ddp in wrappers for p in ddp.parameters() if p.requires_grad} - own
    if not left:
        return
    every = alive(torch.optim.Optimizer)
    ours = {id(part) for one in every if isinstance(one, type(optimizer)) for part in all_inside(one)}
    for one in every:
        count = sum(id(p) in left for p in parameters_of(one))
        if count and len(all_inside(one)) == 1 and id(one) not in ours:  # what wraps it (Accelerate's) is not told too
            log.warning(
                "%s trains %d parameters of a model that exchanges no gradients now: nobody averages theirs, rounds "
                "average their values, and a checkpoint has rank 0's state of it alone. Wrap it too: "
                "SlowMoOptimizer(optimizer).",
                type(one).__name__,
                count,
            )


def _outer_momentum(config: SlowMoConfig) -> float:
    """Of slow momentum, or of another outer optimizer that has one by this name."""
    if config.outer_optimizer == SLOW_MOMENTUM:
        return config.outer_momentum
    return float(config.outer_optimizer_arguments().get("momentum", 0))


def _training(params: Container[int]) -> list[Any]:
    """Those that have begun, and not ended, with one of these parameters by identity."""

    def found() -> list[Any]:
        return [
            one
            for reference in tuple(_started)
            if (one := reference()) is not None
            and one.outer_loop is not None
            and not one.outer_loop.in_flight.is_over
            and any(id(p) in params for p in parameters_of(one))
        ]

    return after_collection(found)


def _and_keep_apart(wrap: Callable[..., None]) -> Callable[..., None]:
    """
    `DistributedDataParallel.__init__` of a model that trains already. Before the first step (a pass that only looks at
    shapes has begun it) the wrapper is held apart like others. Later it would give all workers rank 0's weights.
    """

    @functools.wraps(wrap)
    def wrap_and_keep_apart(self: DistributedDataParallel, module: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        training = [
            one for one in _training({id(p) for p in module.parameters()}) if not isinstance(one.isolation, Averaging)
        ]
        step = max((one.outer_loop.attempted_steps for one in training), default=0)
        if step:
            raise RuntimeError(
                f"this model has trained for {step} steps, each worker on its own: a new DistributedDataParallel "
                "would give all of them rank 0's weights. Keep the one that accelerator.prepare returned; or call "
                "slowmo_hf.finish(optimizer) first."
            )
        wrap(self, module, *args, **kwargs)
        for one in training:
            one.isolation.take([self])

    return wrap_and_keep_apart


DistributedDataParallel.__init__ = _and_keep_apart(DistributedDataParallel.__init__)  # type: ignore[method-assign]
