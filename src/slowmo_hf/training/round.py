"""
One round: launched at a multiple of sync_every, applied there or `overlap_steps` later. Without overlap it is the same
round with a delay of 0.

    launch    step k: what workers bring is sent; without overlap bucket by bucket, while the round is settled
    hear      what all ranks say of it, where it was launched before they had
    settle    sums arrive (line 6), and the outer update is done (lines 7, 8): once, by whoever needs it first
    apply     step k + delay: every worker goes on from them
    drop      there was no round after all
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress

from torch.profiler import record_function

from ..algorithm.layout import Piece
from ..algorithm.norms import Norms
from ..algorithm.outer_update import Sum
from ..algorithm.starts import Nothing, TrainingOn
from ..wire.reduction import Launch, own_displacements
from .clock import Rates
from .parts import Parts
from .report import RoundReport
from .status import Agreement


class Round:
    """
    What one round knows of itself.

    Args:
        parts (`Parts`): What it works on.
        due_step (`int`, *optional*): When it is applied; `overlap_steps` from now where it is None.
        norms (`Norms`, *optional*): Of its outer update, of a round that is restored after it was done.
    """

    def __init__(self, parts: Parts, due_step: int | None = None, norms: Norms | None = None) -> None:
        self.parts = parts
        delay = parts.config.overlap_steps
        self.travels = delay > 0
        self.due_step = parts.clock.attempted_steps + delay if due_step is None else due_step
        self.begun_at = self.due_step - delay
        self.local_steps, self.rates = 0, Rates()  # this worker's before it, since the last round
        self.agreement: Agreement | None = None
        self.messages: Launch | None = None
        self.norms = norms
        self.is_counted = self.is_dropped = False  # by the clock; as if it had not been launched
        self.was_settled_on_the_way = norms is not None  # on time; a view may have needed it before
        self._summands = 1.0  # total weight of the workers' displacements
        self._hear: Callable[[], Agreement] | None = None

    # ---- step k ----

    def launch(self, hear: Callable[[], Agreement] | None = None) -> None:
        """
        Displacements are sent. With `hear` that is before anybody has heard of the others: it waits for what all
        say.
        """
        self._hear = hear
        self.local_steps, self.rates = self.parts.clock.local_steps, self.parts.clock.rates
        if self.travels:
            with record_function("slowmo::launch"):
                self._send()
        self.parts.clock.begin_round()
        self.is_counted = True

    def _send(self) -> None:
        base, slow = self.parts.base, self.parts.slow
        assert isinstance(base, TrainingOn)
        self.messages = Launch(slow.reduction, ahead=self.local_steps / self.parts.config.sync_every)
        if self.parts.tensors.problem():  # which is said at the status exchange
            self.messages.send(Nothing())
            return
        self.messages.send(base)
        base.depart_(slow.whole_pieces)

    def note(self, agreement: Agreement) -> None:
        """All ranks have said that they take part."""
        self.agreement = agreement
        if self.travels:
            ranks = self.parts.workers.between.ranks
            weights = [agreement.local_steps[rank] / self.parts.config.sync_every for rank in ranks]
            self._summands = sum(weights)
            if self.messages is not None:
                self.messages.weights = weights

    def average_beside(self, agreement: Agreement) -> None:
        """What an overlapped round averages beside the parameters, at once."""
        changed = agreement.changed_buffers
        if changed and agreement.ahead:  # it has trained on since they were compared: once, behind it none goes ahead
            changed = self.parts.tensors.others.agree(changed, self.parts.workers.world, self.begun_at)
        if changed:
            self.parts.average_others(changed)

    # ---- until step k + delay ----

    def hear(self) -> None:
        """
        What all have said of a round that went ahead, if that is not known yet. Collective over the job.

        Raises:
            ValueError, RuntimeError: As at a status exchange (`Header.say`); there was no round then.
        """
        if self._hear is None:
            return
        try:
            agreement = self._hear()
        except Exception as error:
            if isinstance(error, ValueError):  # all were there, and have sent; or one has ended, which ends it for all
                with suppress(RuntimeError):
                    self.drain()
            self.drop()
            raise
        self._hear = None
        self.parts.workers.roll_call.at(self.parts.clock.attempted_steps, "training")
        self.note(agreement)
        self.average_beside(agreement)

    @property
    def settles_now(self) -> bool:
        """
        Whether the outer update is due on the way: where it stands in the middle of the messages' way, half of the
        steps are for each half. Elsewhere it is done when the round is applied.
        """
        half = self.parts.config.overlap_steps // 2
        is_due = self.parts.clock.attempted_steps >= self.due_step - half
        return self.parts.slow.reduction.updates_at_owners and is_due and not self.was_settled_on_the_way

    def settle_on_the_way(self) -> None:
        """If it is due there, on every process together."""
        if self.settles_now:
            self.settle()
            self.was_settled_on_the_way = True

    def settle(self) -> None:
        """
        Wait for the messages, and do the outer update; what all say has been heard. The round stays due when it was.
        """
        if self.norms is not None:
            return
        parts, clock = self.parts, self.parts.clock
        if self.travels:
            parts.workers.roll_call.at(clock.attempted_steps, f"the round of step {self.begun_at}")
        assert self.agreement is not None
        slow = parts.slow
        sums = self._sums()
        # A round may change nothing.
        hand_back_ = parts.base.hand_back_ if parts.config.has_outer_update else _leave
        norms = slow.update.update_(sums, self.agreement.inner_lrs, self._summands, hand_back_)
        own = Norms.of(slow.reduction.summed(norms.squares))  # of this process's part of the model
        self.norms = Norms.of(parts.summed(own.squares))
        if self.travels:
            parts.share_last_round()
        if not parts.config.exact_average:
            own_is_finite = math.isfinite(own.pseudo_grad_square)
            parts.refuse_non_finite(self.norms.pseudo_grad_square, own_is_finite, all_are_here=False)
            return
        assert self.messages is not None
        parts.refuse_non_finite(
            self.norms.drift_square, own_is_finite=self.messages.own_is_finite, all_are_here=not self.travels
        )

    def _sums(self) -> Iterator[Sum]:
        parts = self.parts
        if not self.travels:
            parts.base.settle()
        if not parts.config.exact_average:
            return own_displacements(parts.slow.averages, parts.slow.buckets, parts.base)
        if self.messages is None:  # without overlap messages are sent one by one, as they are wanted
            self.messages = Launch(parts.slow.reduction)
            self._summands = parts.slow.averages.total_weight
            self.messages.send(parts.base)
        return self.messages.sums()

    # ---- step k + delay ----

    def apply(self) -> RoundReport:
        """Every worker goes on from the new anchor, with the progress that it has made meanwhile."""
        with record_function("slowmo::apply"):
            report = self._apply()
        # Else the next status exchange says whose are not, before all else.
        self.parts.status.parameters_alone &= math.isfinite(report.pseudo_grad_norm)
        return report

    def _apply(self) -> RoundReport:
        parts, base, slow = self.parts, self.parts.base, self.parts.slow
        self.settle()
        assert self.norms is not None
        if self.travels:
            assert isinstance(base, TrainingOn)
            anchors = slow.reduction.new_anchors(self.messages)
            if parts.tensors.problem():  # said at the next status exchange: what has come cannot be written
                deque(anchors, maxlen=0)
                base.stay()
            else:
                base.take_in_(anchors)
        elif parts.config.averages_at_rounds:
            base.end_average()
            parts.average_others(self.agreement.changed_buffers if self.agreement else [])
        parts.inner_state.reset()
        parts.hand_out()
        parts.copy_last_round()
        return parts.report(self.norms, self.agreement)

    # ---- no round after all ----

    def drop(self) -> None:
        """Workers go on as if it had not been launched."""
        if self.travels:
            self.parts.slow.reduction.forget()  # what they held back has gone with it
            self.parts.base.stay()
        if self.is_counted:
            self.parts.clock.drop_round(self.local_steps, self.rates)
        self.is_counted, self.is_dropped = False, True

    def drain(self) -> None:
        """Wait for the messages, and leave what they bring."""
        if self.messages is not None:
            self.messages.drain()


def _leave(piece: Piece) -> None:
    """The parameter stays as it is."""
