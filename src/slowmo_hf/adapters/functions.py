"""What a custom loop asks of its optimizer, prepared by Accelerate or bare: the average, the end, the last round."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from accelerate.accelerator import Accelerator

from .. import upstream
from ..log import of_this_rank
from ..training.optimizers_inside import parameters_of
from ..training.report import RoundReport
from ..wire.failures import first_line
from .held_apart import is_apart
from .isolation import ddp_wrappers
from .optimizer import SlowMoOptimizer
from .refusals import allow_join
from .trainer_methods import callback_of


def unwrap(optimizer: torch.optim.Optimizer) -> SlowMoOptimizer:
    """The SlowMoOptimizer behind what `accelerator.prepare` returned; `TypeError` where there is none."""
    found: Any = optimizer
    while not isinstance(found, SlowMoOptimizer):
        if not hasattr(found, "optimizer"):
            raise TypeError(
                f"expected a SlowMoOptimizer, prepared or bare, got {type(optimizer).__name__}. Wrap the optimizer "
                "first: SlowMoOptimizer(optimizer, config). consensus and last_round take a Trainer that has a "
                "SlowMoCallback too, or the callback."
            )
        found = found.optimizer
    return found


def prepared_by(accelerator: Accelerator) -> dict[int, SlowMoOptimizer]:
    """Those of ours that it has prepared, by the place that each has among all of its optimizers."""
    prepared = [getattr(one, "optimizer", None) for one in upstream.held_by(accelerator)[0]]
    return {place: one for place, one in enumerate(prepared) if isinstance(one, SlowMoOptimizer)}


@contextmanager
def consensus(optimizer: Any) -> Iterator[None]:
    """
    Inside, the workers' average is in the model, on every rank; afterwards the local weights are back, bit for bit,
    and so are the random generators. If `model.eval()` is called inside, the last round's model is shown after the
    block. Collective: every rank enters it at the same step. Plain `base="all_reduce"` has nothing to show: it is
    stock.

        with slowmo_hf.consensus(optimizer):
            evaluate(model)

    Args:
        optimizer (`torch.optim.Optimizer` or `Trainer`): A `SlowMoOptimizer`, bare or as `accelerator.prepare`
            returned it; or a Trainer that has a `SlowMoCallback`, or the callback: while it trains there is something
            to show.

    Raises:
        TypeError: It is none of these.
    """
    callback = callback_of(optimizer)
    if callback is not None:
        with callback.looks.look():
            yield
        return
    bare = unwrap(optimizer)
    if bare.outer_loop is None:
        yield
        return
    with bare.begun().consensus.shown():
        yield


@contextmanager
def join(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """
    For uneven data: a worker that leaves the block takes part in the others' rounds until all have left it.

        with slowmo_hf.join(optimizer):
            for batch in loader:  # six batches here, four there
                ...

    In each round workers count by their local steps since the one before, so one that did none moves with the others
    and adds nothing. Evaluate and save outside of the block: inside, one that has left takes part in rounds alone.
    Each worker's own weights are in the model afterwards, and every worker has the furthest one's clock.

    Args:
        optimizer (`torch.optim.Optimizer`): A `SlowMoOptimizer`, bare or as `accelerator.prepare` returned it.

    Raises:
        TypeError: It is no `SlowMoOptimizer`.
        ValueError: `base` is not local_sgd: others exchange at every step, and cannot go on without a worker.
    """
    bare = unwrap(optimizer)
    if bare.config.base != "local_sgd":
        raise ValueError(
            f"join needs base='local_sgd', got {bare.config.base!r}, whose workers exchange at every step: give all "
            "workers equally many batches."
        )
    yield
    outer_loop = bare.begun()
    outer_loop.end()
    outer_loop.consensus.restore()


def finish(optimizer: torch.optim.Optimizer) -> None:
    """
    End training: the exact average of all workers' weights stays in the model, on every rank, also after a run that
    is shorter than `sync_every`. Evaluate and save after it:

        for batch in loader:
            ...
        slowmo_hf.finish(optimizer)
        evaluate(model)
        accelerator.save_model(model, folder)

    Collective: every rank calls it, with gossip bases after equally many steps; with `base="local_sgd"` a rank that
    comes first takes part in the others' rounds. Once more it changes nothing. `accelerator.end_training()` calls it.
    With `base="all_reduce"` and no outer update workers have one model anyway. In a `finally` that an error passes it
    warns: where one rank alone fails, its error waits for the others' end.

    Args:
        optimizer (`torch.optim.Optimizer`): A `SlowMoOptimizer`, bare or as `accelerator.prepare` returned it.

    Raises:
        TypeError: It is no `SlowMoOptimizer`.
    """
    bare = unwrap(optimizer)
    outer_loop = bare.begun()
    if not outer_loop.in_flight.is_over:
        error = outer_loop.workers.error_on_its_way
        if isinstance(error, Exception) and not isinstance(error, StopIteration) and outer_loop.workers.count > 1:
            of_this_rank.warning(
                "slowmo_hf.finish while %s is handled (%s): this rank takes part in the others' rounds until all come "
                "here, and the error goes on only then. accelerator.end_training() in its place waits for nobody.",
                type(error).__name__,
                first_line(error),
            )
        outer_loop.finish()
        allow_join(ddp_wrappers(parameters_of(bare)))
    bare.isolation.end()


def _finish_first(end_training: Callable[[Accelerator], None]) -> Callable[[Accelerator], None]:
    """
    `Accelerator.end_training` that first finishes what the accelerator has prepared; in a `finally` that an error
    passes, it does not take part in the others' rounds.
    """

    @functools.wraps(end_training)
    def finish_first(self: Accelerator) -> None:
        own = prepared_by(self).values()
        begun = [bare.outer_loop.workers for bare in own if bare.outer_loop is not None]
        errors = [workers.error_on_its_way for workers in begun] or [sys.exc_info()[1]]
        error = next((error for error in errors if error is not None), None)
        if error is None:
            for bare in own:
                finish(bare)
        elif begun:
            of_this_rank.warning(
                "accelerator.end_training() while %s is handled: the model is this worker's own, and the others are "
                "not waited for. Where all ranks come here, call slowmo_hf.finish(optimizer).",
                type(error).__name__,
            )
        end_training(self)

    return finish_first


def _note(prepare_optimizer: Callable[..., Any]) -> Callable[..., Any]:
    """`Accelerator.prepare_optimizer` that tells an optimizer of ours of it."""

    @functools.wraps(prepare_optimizer)
    def note(self: Accelerator, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(optimizer, SlowMoOptimizer):
            optimizer.is_prepared = True
        return prepare_optimizer(self, optimizer, *args, **kwargs)

    return note


def _watched(gather: Callable[..., Any]) -> Callable[..., Any]:
    """A collective of `Accelerator` that counts as communication; one that comes between rounds is told."""

    @functools.wraps(gather)
    def watched(self: Accelerator, *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as given_back:
            for loop in (bare.outer_loop for bare in prepared_by(self).values()):
                if loop is not None:
                    given_back.enter_context(loop.account.communicating())
                    if loop.parts.trains_alone and not loop.view.is_shown:
                        loop.parts.own_collectives.at_call(gather.__name__)
            return gather(self, *args, **kwargs)

    return watched


def _not_where_apart(trigger: Callable[..., Any]) -> Callable[..., Any]:
    """`Accelerator.trigger_sync_in_backward` that leaves a wrapper alone which exchanges nothing."""

    @functools.wraps(trigger)
    def not_where_apart(model: torch.nn.Module) -> Any:
        return nullcontext() if is_apart(model) else trigger(model)

    return not_where_apart


for _name in ("gather", "gather_for_metrics", "reduce"):
    setattr(Accelerator, _name, _watched(getattr(Accelerator, _name)))
Accelerator.trigger_sync_in_backward = staticmethod(  # type: ignore[method-assign]
    _not_where_apart(Accelerator.trigger_sync_in_backward)
)
Accelerator.end_training = _finish_first(Accelerator.end_training)  # type: ignore[method-assign]
Accelerator.prepare_optimizer = _note(Accelerator.prepare_optimizer)  # type: ignore[method-assign]


def stop_requested(optimizer: torch.optim.Optimizer) -> bool:
    """
    Whether a rank was sent SIGTERM or SIGUSR1; True on all ranks from the same step on, where a round is applied.
    Call it after every step, from the first one on:

        if slowmo_hf.stop_requested(optimizer):
            accelerator.save_state(folder)
            sys.exit(slowmo_hf.REQUEUE_EXIT_CODE)

    Args:
        optimizer (`torch.optim.Optimizer`): A `SlowMoOptimizer`, bare or as `accelerator.prepare` returned it.

    Raises:
        TypeError: It is no `SlowMoOptimizer`.
        ValueError: Plain `base="all_reduce"` has no rounds.
    """
    bare = unwrap(optimizer)
    bare.listen_for_stop()
    return bare.outer_loop is not None and bare.outer_loop.clock.stop_agreed


def last_round(optimizer: Any) -> RoundReport | None:
    """
    The report of the last round. `accelerator.log(last_round(optimizer).to_logs())` logs it.

    Args:
        optimizer (`torch.optim.Optimizer` or `Trainer`): As `consensus` takes it.

    Returns:
        `RoundReport`: None before the first round.

    Raises:
        TypeError: It is none of these.
    """
    callback = callback_of(optimizer)
    outer_loop = (callback or unwrap(optimizer)).outer_loop
    return outer_loop.last_round if outer_loop else None
