"""The rounds in flight, in the order in which they were launched; without overlap each is applied at once."""

from __future__ import annotations

from contextlib import suppress

from torch.profiler import record_function

from ..algorithm.norms import Norms
from ..algorithm.starts import IN_FLIGHT
from ..contents import Restored, Saved
from .parts import Parts
from .report import RoundReport
from .round import Round
from .status import Agreement, Purpose


class InFlight:
    """
    Launches and applies them.

    Args:
        parts (`Parts`): What they work on.
    """

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.rounds: list[Round] = []
        self.last: RoundReport | None = None
        self.moves = 0  # steps, and states taken up: the clock may come to one step twice

    @property
    def is_over(self) -> bool:
        """As the clock's."""
        return self.parts.clock.is_over

    def goes_on(self) -> None:
        """A step or another state has come."""
        self.moves += 1
        self.parts.clock.is_over = False
        self.parts.tensors.stop_watching()

    # ---- what is due ----

    def advance(self) -> RoundReport | None:
        """Apply what is due at this step, do what is due on the way; the report of the last one applied."""
        report = self.apply_due()
        if any(one.settles_now for one in self.rounds):
            self.hear()
            for one in self.rounds:
                one.settle_on_the_way()
        if self.rounds:
            self.parts.slow.reduction.start_second_stages(wait=False)
        return report

    def apply_due(self) -> RoundReport | None:
        """Apply what is due at this step, or was before."""
        report = None
        while self.rounds and self.rounds[0].due_step <= self.parts.clock.attempted_steps:
            report = self.apply()
        return report

    def launch(self, inner_lrs: list[float]) -> RoundReport | None:
        """The round of this step; its report, if it is applied at once."""
        if not self._goes_ahead:
            try:
                agreement = self.meet(Purpose.ROUND, inner_lrs)
            except Exception:  # on all ranks: there is no round, and workers are not what one makes of them
                if self.parts.meets_others:
                    self.parts.clock.parted_at = self.parts.clock.attempted_steps
                raise
            return self.launch_agreed(agreement)
        with record_function("slowmo::round"):
            hear = self.parts.status.start(Purpose.ROUND, inner_lrs, ahead=True)
            self.rounds.append(Round(self.parts))
            self.rounds[-1].launch(hear)
        return None

    @property
    def _goes_ahead(self) -> bool:
        """Whether a round's messages are sent before anybody has heard of the others; the same on all."""
        parts = self.parts
        return bool(parts.config.overlap_steps) and parts.status.parameters_alone and parts.workers.world.fails_cleanly

    def launch_agreed(self, agreement: Agreement) -> RoundReport | None:
        """Of this step, where all have come: applied at once, or launched and left to travel."""
        while self.rounds:  # on a rank that has ended the clock jumps from round to round
            self.apply()
        launched = Round(self.parts)
        self.rounds.append(launched)
        with record_function("slowmo::round"):
            if launched.travels:
                self._launch_beside(launched, agreement)
                return None
            try:
                launched.launch()
                launched.note(agreement)
                return self.apply()
            except BaseException:
                launched.drop()
                self.rounds.remove(launched)
                raise

    def _launch_beside(self, launched: Round, agreement: Agreement) -> None:
        if not agreement.ahead:
            launched.average_beside(agreement)  # first: on one connection messages queue
        launched.launch()
        launched.note(agreement)
        if agreement.ahead:
            launched.average_beside(agreement)

    def apply(self) -> RoundReport:
        """The first one in flight."""
        self.hear()
        self.parts.tensors.stop_watching()
        self.last = self.rounds[0].apply()
        del self.rounds[0]
        self.parts.account.close()
        return self.last

    def watch(self) -> None:
        """
        A round has been applied, and code of others comes before the next step: what it writes into the parameters
        before they are looked at is heard of at the next status exchange. Where workers train on apart that is no
        news.
        """
        if self.parts.trains_alone and self.parts.clock.workers_agree:
            with self.parts.account.paused():
                self.parts.tensors.watch(self.parts.slow.pieces if self.parts.holds_all_anchors else [])

    # ---- what all have said ----

    def meet(self, purpose: Purpose, inner_lrs: list[float] | None = None) -> Agreement:
        """Wait for all ranks, and compare. Collective."""
        self.start_what_others_wait_for()
        return self.parts.status.exchange(purpose, inner_lrs)

    def hear(self) -> None:
        """What all have said of rounds that went ahead, if that is not known yet: `Round.hear`."""
        try:
            for one in self.rounds:
                one.hear()
        finally:
            self.rounds = [one for one in self.rounds if not one.is_dropped]

    def settle(self) -> None:
        """Do the outer updates of rounds in flight. They stay due when they were."""
        self.hear()
        for one in self.rounds:
            one.settle()

    def start_what_others_wait_for(self) -> None:
        """
        Before all meet: a rank that has ended comes here from another place, and has no later step to start it at.
        """
        self.hear()  # first: an error is told in collectives that come before the others' messages
        if self.rounds:
            reduction = self.parts.slow.reduction
            reduction.start_second_stages(wait=True)
            if reduction.updates_at_owners:
                self.settle()

    def forget(self) -> None:
        """
        Another state is taken up: what is under way belongs to the run that is left, with what was wrong there, and is
        waited for.
        """
        self.goes_on()
        with suppress(ValueError):
            self.hear()
        for one in self.rounds:
            one.drain()
        self.rounds = []
        self.parts.base.stay()
        self.parts.status.forget()
        self.parts.account.begin()
        self.parts.account.close()
        self.parts.costs.begin()

    def finish(self) -> None:
        """Training has ended on an average that contains what is in flight."""
        for one in self.rounds:
            one.drain()
        self.rounds = []
        self.parts.base.begin_anew()
        self.parts.clock.is_over = True

    # ---- state ----

    def saved(self, *, agree: bool, keep: bool) -> Saved:
        """As `Part.saved`: those in flight have been settled."""
        saved = Saved()
        for one in self.rounds:  # at most one: overlap_steps < sync_every
            if one.norms is not None:
                saved.own.settings[IN_FLIGHT] = {"due_step": one.due_step, "norms": one.norms.squares}
        return saved

    def restore(self, saved: Saved, *, same_number: bool) -> Restored:
        """As `Part.restore`; first, for it waits for what is under way."""
        parts = self.parts
        if IN_FLIGHT not in saved.own.settings or not same_number or not parts.config.overlap_steps:
            return self.forget
        step, departed = saved.shared.count("attempted_steps"), saved.own.part(IN_FLIGHT)
        due_step = departed.count("due_step", least=step, most=step + parts.config.overlap_steps)
        norms = Norms.of(departed.numbers("norms", 3, least=0))

        def take_up() -> None:
            self.forget()
            one = Round(parts, due_step, norms)
            one.messages = parts.slow.reduction.landed(parts.slow.whole_anchors(saved.shared))
            self.rounds.append(one)

        return take_up
