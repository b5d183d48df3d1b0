"""The exact average of all workers, shown while training goes on, or kept at its end."""

from __future__ import annotations

import torch
from torch.profiler import record_function

from ..wire.reduction import show_mean_
from .in_flight import InFlight
from .parts import Parts
from .status import Purpose


class Consensus:
    """
    Shows it: there is no outer update in it.

    Args:
        parts (`Parts`): Whose average.
        in_flight (`InFlight`): Those in flight are counted in it.
    """

    def __init__(self, parts: Parts, in_flight: InFlight) -> None:
        self.parts, self.in_flight = parts, in_flight

    @torch.no_grad()
    def show(self) -> None:
        """Put the average into parameters and buffers of every rank. Collective, unless the workers agree anyway."""
        view = self.parts.view
        if view.is_shown or not self.parts.config.has_rounds:
            return
        view.begin()
        try:
            self.show_buffers_of([] if self.nothing_to_average else self.in_flight.meet(Purpose.LOOK).changed_buffers)
        except BaseException:
            self.restore()
            raise

    @property
    def nothing_to_average(self) -> bool:
        """Whether all workers have it already."""
        clock, config = self.parts.clock, self.parts.config
        return clock.workers_agree and (config.model_buffers == "average" or clock.attempted_steps == 0)

    def show_buffers_of(self, changed_buffers: list[str]) -> None:
        """The same where all have met: with the average of these buffers."""
        parts = self.parts
        floating, integer = parts.tensors.buffers_named(changed_buffers)
        params = [] if parts.clock.workers_agree else parts.tensors.trainable
        shown = [*params, *floating, *integer]

        def average_() -> None:
            with record_function("slowmo::consensus"):
                parts.on_leader(lambda: self._average_on_leader(bool(params), floating, integer))
                parts.inside.broadcast_(shown)

        parts.view.begin()
        try:
            parts.view.show(shown, average_)
        except BaseException:
            self.restore()
            raise

    def _average_on_leader(self, params: bool, floating: list[torch.Tensor], integer: list[torch.Tensor]) -> None:
        parts = self.parts
        if params:
            self.in_flight.settle()
            parts.base.settle()
        with parts.account.apart():
            if params:
                parts.refuse_non_finite(*show_mean_(parts.slow.exact, parts.base))
            parts.slow.averages.mean_(floating)
            parts.slow.averages.max_(integer)

    @torch.no_grad()
    def restore(self, *, give_back_random_state: bool = True) -> None:
        """End a view: local weights and buffers return, bit for bit, and random generators if they have not yet."""
        self.parts.workers.only_gradients_meet()
        self.parts.view.restore(give_back_random_state=give_back_random_state)

    def keep(self) -> None:
        """End training on the average: what is shown stays."""
        self.show()
        self.parts.view.keep()
