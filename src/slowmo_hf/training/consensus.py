"""One model of all workers, shown while training goes on: the exact average of now, or the last round's model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch
from torch.profiler import record_function

from ..config import SlowMoConfig
from ..dtensors import local
from ..wire.reduction import show_mean_
from .in_flight import InFlight
from .model_tensors import copy_tensors_
from .parts import Parts
from .status import Purpose

_Result = TypeVar("_Result")
_Given = ParamSpec("_Given")


def _as_in_training(act: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
    """Without gradients; and what is made inside a user's `torch.inference_mode()` can be written to in training."""

    @functools.wraps(act)
    def as_in_training(*args: _Given.args, **kwargs: _Given.kwargs) -> _Result:
        with torch.inference_mode(False), torch.no_grad():
            return act(*args, **kwargs)

    return as_in_training


def _nothing() -> None:
    """Local weights stay."""


class Consensus:
    """
    Shows it: there is no outer update in it.

    Args:
        parts (`Parts`): Whose average.
        in_flight (`InFlight`): Those in flight are counted in it.
    """

    def __init__(self, parts: Parts, in_flight: InFlight) -> None:
        self.parts, self.in_flight = parts, in_flight
        # Inside `shown`: what follows it, for a `model.eval()` holds until `model.train()`. None outside.
        self.then: Callable[[], None] | None = None

    @_as_in_training
    def show(self, *, keep_writes: bool = False) -> None:
        """
        Put the average into parameters and buffers of every rank. Collective, unless there is `nothing_to_average`.

        Args:
            keep_writes (`bool`): As `ConsensusView.keep_writes`: for a view that the program has not asked for.
        """
        self.end_last_round()
        view = self.parts.view
        if not view.is_shown and self.parts.config.has_rounds:
            view.begin()
            try:
                if self.nothing_to_average:  # a training pass inside writes into buffers all the same
                    others = self.parts.tensors.others
                    floating, integer = others.to_average(others.known().names)
                    self._show([*floating, *integer], _nothing)
                else:
                    self.show_buffers_of(self.in_flight.meet(Purpose.LOOK).changed_buffers)
            except BaseException:
                self.restore()
                raise
        if keep_writes and view.is_shown:
            tensors = self.parts.tensors
            view.keep_writes(tensors.written_by_passes(), tensors.trainable if self.parts.clock.workers_agree else ())

    @contextmanager
    def shown(self, *, keep_writes: bool = False) -> Iterator[None]:
        """
        Inside, the average is shown; afterwards the model is as it was, be it a view or local weights, or as the
        program has asked for it inside (`then`).
        """
        if self.shows_average:
            yield
            return
        was_of_last_round = self.parts.view.is_of_last_round
        self.show(keep_writes=keep_writes)
        around, self.then = self.then, self.show_last_round if was_of_last_round else _nothing
        try:
            yield
        finally:
            then, self.then = self.then, around
            self.restore()
            then()

    def meet(self) -> None:
        """
        Before a save, where the view sends nothing: tell ranks that came for something else. Collective.

        Raises:
            RuntimeError: Some did.
        """
        view = self.parts.view  # of the last round's model each rank has its own, or none
        if self.parts.meets_others and self.nothing_to_average and (view.is_of_last_round or not view.is_shown):
            with self.parts.account.paused():
                self.in_flight.meet(Purpose.LOOK)

    @property
    def nothing_to_average(self) -> bool:
        """Whether all workers have it already."""
        clock, config = self.parts.clock, self.parts.config
        return clock.workers_agree and (config.model_buffers == "average" or clock.attempted_steps == 0)

    def hear_of_earlier_writes(self, *, all_come: bool) -> None:
        """
        Before a view at a step that has no status exchange behind its round: whether a rank's program has written into
        its parameters since. Collective there.

        Args:
            all_come (`bool`): Whether all ranks must come anyway. Else one may come alone, where nobody has written.
        """
        parts = self.parts
        watches = parts.tensors.is_watched and parts.clock.workers_agree and not self.shows_average
        if watches and (all_come or parts.tensors.is_written()):
            with parts.account.paused():
                self.in_flight.meet(Purpose.LOOK)

    @contextmanager
    def passes(self) -> Iterator[None]:
        """Inside, evaluation passes: what they write into their own weights goes with the view, if there is one."""
        end = self._begin_passes()
        try:
            yield
        finally:
            end()

    @_as_in_training
    def _begin_passes(self) -> Callable[[], None]:
        end, as_the_round_left = self.parts.view.passes(), _as_the_round_left(self.parts)

        @_as_in_training
        def end_passes() -> None:
            as_the_round_left({id(tensor) for tensor in end()})

        return end_passes

    def show_buffers_of(self, changed_buffers: list[str]) -> None:
        """As `show`, where all have met: with the average of these buffers."""
        parts = self.parts
        floating, integer = parts.tensors.others.to_average(changed_buffers)
        params = [] if parts.clock.workers_agree else parts.tensors.trainable

        def average_() -> None:
            with record_function("slowmo::consensus"):
                self._average(bool(params), floating, integer)

        self._show([*params, *floating, *integer], average_)

    def _show(self, tensors: list[torch.Tensor], write_: Callable[[], None]) -> None:
        self.parts.view.begin()
        self.parts.inner_state.remember_emptiness()
        try:
            self.parts.view.show(tensors, write_)
        except BaseException:
            self.restore()
            raise

    def _average(self, params: bool, floating: list[torch.Tensor], integer: list[torch.Tensor]) -> None:
        parts = self.parts
        if params:
            self.in_flight.settle()
            parts.base.settle()
        with parts.account.apart():
            if params:
                square, own_is_finite = show_mean_(parts.slow.exact, parts.base)
                parts.refuse_non_finite(parts.summed([square])[0], own_is_finite)
                parts.hand_out()
            parts.inside.average_others_(parts.slow.averages, floating, integer)

    # ---- the last round's model ----

    @_as_in_training
    def show_last_round(self) -> None:
        """
        Put the last round's model, the anchors as they are handed back, into the parameters, and into buffers what
        they were averaged to; before the first round own values stay. Nothing is sent, and nothing need be in step.

        Raises:
            RuntimeError: This process does not hold it, or has other parameters than at the start.
        """
        parts, view = self.parts, self.parts.view
        if view.is_shown:
            return
        agree = parts.clock.workers_agree
        refusal = "" if agree else parts.tensors.problem() or _without_anchors(parts.config)
        if refusal:
            raise RuntimeError(refusal)
        stays = agree or not self.last_round_step
        averaged = {} if stays else parts.tensors.others.averaged()
        params = [] if stays else parts.tensors.trainable

        def write_() -> None:
            for piece in parts.slow.pieces if params and not parts.keeps_a_copy else ():
                piece.values().copy_(piece.anchor)
            if params and parts.keeps_a_copy:
                copy_tensors_(params, parts.tensors.last_round)
            copy_tensors_([now[name] for name in averaged], list(averaged.values()))

        now = parts.tensors.others.now() if averaged else {}
        view.begin()
        parts.inner_state.remember_emptiness()
        # `model.eval()` has no end that a program sets, and draws are the program's own until then.
        view.show([*params, *(now[name] for name in averaged)], write_, keeps_random_state=False)
        view.is_of_last_round = True
        # An EMA that was swapped in is swapped out; or other weights are loaded.
        view.keep_writes(parts.tensors.written_by_passes())

    @property
    def shows_average(self) -> bool:
        """Whether the average is in the model, or what all have, and not the last round's model."""
        return self.parts.view.is_shown and not self.parts.view.is_of_last_round

    def end_last_round(self) -> None:
        """As `restore`, if the last round's model is shown."""
        if self.parts.view.is_of_last_round:
            self.restore()

    @property
    def last_round_step(self) -> int:
        """Where the last round that the anchors have was launched; 0 before the first."""
        clock = self.parts.clock
        under_way = sum(one.norms is None for one in self.in_flight.rounds)
        return max(0, clock.attempted_steps // self.parts.config.sync_every - under_way) * self.parts.config.sync_every

    @_as_in_training
    def restore(self, *, give_back_random_state: bool = True) -> None:
        """End a view: local weights and buffers return, bit for bit, and random generators if they have not yet."""
        self.parts.workers.only_gradients_meet()
        self.parts.view.restore(give_back_random_state=give_back_random_state)
        self.parts.inner_state.empty_again()

    def keep(self, *, loaded: bool = False) -> None:
        """
        End training on the average: it stays. Collective. What the program has written over it (`keep_writes`) is each
        worker's own: that is averaged. What passes have written over it goes.

        Args:
            loaded (`bool`): All have loaded one model over it, which stays.
        """
        self.show()
        if not loaded and self.hear_of_writes():
            written = _written_anywhere(self.parts)
            self.restore(give_back_random_state=False)
            own = [local(tensor).detach().clone() for tensor in written]
            self.show()
            _put_mean_of(self.parts, own, written)
        self.parts.view.keep()
        self.parts.inner_state.empty_again()

    def hear_of_writes(self) -> bool:
        """
        Whether a rank's model is another than was shown. Where the program has written into it, workers then differ,
        also behind a round. Collective, where the view keeps that.
        """
        parts = self.parts
        if not parts.view.keeps_writes:
            return False
        with parts.account.apart():
            of_each = parts.workers.world.gather_objects(parts.view.changes())
        if parts.meets_others and any(is_written for is_written, _ in of_each):
            parts.clock.parted_at = parts.clock.attempted_steps
        return any(is_changed for _, is_changed in of_each)


def _without_anchors(config: SlowMoConfig) -> str:
    """Why this process does not hold the last round's model; empty where it does. The same on all ranks."""
    settings = {"shard_slow_state=True": config.shard_slow_state, "exact_average=False": not config.exact_average}
    for setting, is_so in settings.items():
        if is_so:
            return (
                f"model.eval() shows the last round's model, which not every process holds with {setting}. "
                "Evaluate inside `with slowmo_hf.consensus(optimizer):` on all ranks, model.eval() included."
            )
    return ""


def _as_the_round_left(parts: Parts) -> Callable[[set[int]], None]:
    """
    What gives parameters, by identity, the values back that a round of this step has left: a view behind it has
    none put by. They are in the anchors; where this process has not all of these, copies are made.
    """
    if not (parts.view.keeps_writes and parts.tensors.is_watched and parts.clock.workers_agree):
        return lambda chosen: None
    params, copies = parts.tensors.trainable, list[torch.Tensor]()
    if not parts.holds_all_anchors:
        device = "cpu" if parts.config.stash_device == "cpu" else None
        copies = [local(param).detach().to(device, copy=True) for param in params]

    def put_back(chosen: set[int]) -> None:
        for param, copied in zip(params, copies, strict=False):
            if id(param) in chosen:
                local(param).copy_(copied)
        for piece in parts.slow.pieces if not copies else ():
            if id(piece.param) in chosen:
                piece.values().copy_(piece.anchor)
        if chosen:
            parts.tensors.rewritten()

    return put_back


def _written_anywhere(parts: Parts) -> list[torch.Tensor]:
    """
    Parameters that a rank's program has written into a view, where messages may be in flight: these belong to what was
    there before, and the mean of what is written is all there is of it. Collective there.
    """
    if not (parts.config.overlap_steps or parts.config.gossips):
        return []
    with parts.account.apart():
        of_each = parts.workers.world.gather_objects(parts.view.written(parts.tensors.trainable))
    return [parts.tensors.trainable[place] for place in sorted(set().union(*of_each))]


@torch.no_grad()
def _put_mean_of(parts: Parts, own: list[torch.Tensor], shown: list[torch.Tensor]) -> None:
    """Into what is shown. Collective, where there is any."""
    if shown:
        with parts.account.apart(), parts.tensors.swapping():
            parts.inside.mean_(parts.slow.averages, own)
            copy_tensors_(shown, own)
