"""
One round: launched at a multiple of sync_every, applied there or `overlap_steps` later. Without overlap it is the same
round with a delay of 0.

    launch    step k: displacements set out (line 6)
    hear      what all ranks say of it, where it set out before they had
    settle    the outer update (lines 7 and 8), once, by whoever needs the new anchors first
    apply     step k + delay: every worker goes on from them
    drop      there was no round after all
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch.profiler import record_function

from .account import Account
from .averager import Base, Bucket, ExactAverager, Piece, Sum
from .clock import Clock
from .config import GOSSIP_BASES, SlowMoConfig
from .inner_state import InnerState
from .job import host_name
from .model_tensors import ModelTensors
from .outer_update import OuterUpdate
from .overlap import Nothing, TrainingOn
from .round_report import Norms, RoundReport, log_costs
from .status import Agreement, StatusExchange
from .workers import Workers

_NOT_FINITE = (
    "its parameters are not finite (NaN or infinity). Lower the learning rate or clip gradients (max_grad_norm), and "
    "go on from the last checkpoint."
)


@dataclass(frozen=True)
class Parts:
    """
    What the rounds of one process are made of. In a worker of several processes the leader alone has buckets, and
    talks to other workers; what it gets reaches the worker's other processes by `inside`.
    """

    config: SlowMoConfig
    workers: Workers
    tensors: ModelTensors
    inner_state: InnerState
    averager: ExactAverager
    inside: ExactAverager
    base: Base
    update: OuterUpdate
    buckets: list[Bucket]
    pieces: list[Piece]  # of all buckets
    clock: Clock
    status: StatusExchange
    account: Account

    def share(self, params: list[torch.Tensor], changed_buffers: list[str]) -> None:
        """What the leader has got reaches the worker's other processes."""
        floating, integer = self.tensors.buffers_named(changed_buffers)
        state = [t for _, t in self.inner_state.named_tensors()] if self.inner_state.policy == "average" else []
        self.inside.broadcast_([*params, *floating, *integer, *state])

    def average_others(self, changed_buffers: list[str]) -> None:
        """What else a round makes equal: buffers, and the inner state where it is to be averaged."""
        floating, integer = self.tensors.buffers_named(changed_buffers)
        self.averager.start_second_stages(wait=True)  # first: all workers' collectives have one order
        if self.config.model_buffers == "average":
            self.averager.mean_(floating)
        self.averager.max_(integer)
        self.inner_state.average(self.averager)

    def report(self, norms: Norms) -> RoundReport:
        """Of a round that ends now; after the second one a line says what a step and a round cost here."""
        config, workers, account = self.config, self.workers, self.account
        report = account.report(self.clock.rounds, norms, consensus_is_known=config.exact_average)
        if report.round == 2 and workers.index == 0 and workers.count > 1:
            exchange_seconds = account.communicated_before if config.base in GOSSIP_BASES else None
            log_costs(report, config.sync_every, account.computed_seconds, exchange_seconds)
        return report

    def refuse_non_finite(self, square: float, *, all_are_here: bool = True) -> None:
        """
        NaN and infinity of one worker are everybody's after an average; the square rode in its messages, so all know
        it together. Where not all are here the next status exchange says whose they are.
        """
        if math.isfinite(square) or self.workers.between.world_size == 1:
            return
        if not all_are_here:
            is_mine = not (self.config.exact_average and self.averager.own_is_finite)
            self.status.lost_finiteness = _NOT_FINITE if is_mine else ""
            return
        host, step = host_name(), self.clock.attempted_steps
        told = self.workers.between.gather_objects((self.workers.world.rank, host, self.averager.own_is_finite))
        where = [
            f"rank {rank} on {host}, step {step}: {_NOT_FINITE}" for rank, host, is_finite in told if not is_finite
        ]
        raise ValueError(
            "; ".join(where) or f"step {step}: the workers' average is not finite, though each one's part is."
        )


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
        self.local_steps = 0  # this worker's before it, since the last round
        self.agreement: Agreement | None = None
        self.arrivals: Iterator[Sum] | None = None  # the leader's messages, until the outer update is done
        self.norms = norms
        self.is_counted = self.is_dropped = False  # by the clock; as if it had not been launched
        self._summands = 1.0  # total weight of the workers' displacements
        self._hear: Callable[[], Agreement] | None = None

    # ---- step k ----

    def launch(self, hear: Callable[[], Agreement] | None = None) -> None:
        """
        Displacements set out. With `hear` they do so before anybody has heard of the others: it waits for what all
        say.
        """
        self._hear = hear
        self.local_steps = self.parts.clock.local_steps
        if self.travels:
            with record_function("slowmo::launch"):
                self.parts.workers.inside.broadcast_outcome(self._send_on_leader)
        self.parts.clock.launch()
        self.is_counted = True

    def _send_on_leader(self) -> None:
        averager, base, buckets = self.parts.averager, self.parts.base, self.parts.buckets
        assert isinstance(base, TrainingOn)
        weight = self.local_steps / self.parts.config.sync_every
        if self.parts.tensors.problem():  # which is said at the status exchange
            self.arrivals = averager.sums_at_once(buckets, Nothing(), weight)
            return
        self.arrivals = averager.sums_at_once(buckets, base, weight)
        base.depart_(self.parts.pieces)

    def _sums_on_leader(self) -> Iterator[Sum]:
        """Without overlap: messages are sent one by one, as they are wanted."""
        averager, base, buckets = self.parts.averager, self.parts.base, self.parts.buckets
        base.settle()
        if not self.parts.config.exact_average:
            return averager.own_displacements(buckets, base)
        self._summands = averager.total_weight
        return averager.sums(buckets, base)

    def note(self, agreement: Agreement) -> None:
        """All ranks have said that they take part."""
        self.agreement = agreement
        if self.travels:
            ranks = self.parts.workers.between.ranks
            self._summands = sum(agreement.local_steps[rank] for rank in ranks) / self.parts.config.sync_every

    def average_beside(self, agreement: Agreement) -> None:
        """What an overlapped round averages beside the parameters, at once."""
        if agreement.changed_buffers:
            others = agreement.changed_buffers
            self.parts.workers.inside.broadcast_outcome(lambda: self.parts.average_others(others))
            self.parts.share([], others)

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

    def settle(self) -> None:
        """
        Wait for the messages, and do the outer update on the leader; what all say has been heard. The round stays due
        when it was.
        """
        if self.arrivals is None:
            return
        parts, clock = self.parts, self.parts.clock
        if self.travels:
            parts.workers.roll_call.at(clock.attempted_steps, f"the round of step {self.begun_at}")
        assert self.agreement is not None
        norms = parts.update.update_(self.arrivals, self.agreement.inner_lrs, self._summands, self._hand_back_)
        self.norms, self.arrivals = parts.averager.over_workers(norms), None
        is_exact = parts.config.exact_average
        square = self.norms.drift_square if is_exact else self.norms.pseudo_grad_square
        parts.refuse_non_finite(square, all_are_here=is_exact and not self.travels)

    def _hand_back_(self, piece: Piece) -> None:
        if self.parts.config.has_outer_update:  # else a round changes nothing
            self.parts.base.hand_back_(piece)

    # ---- step k + delay ----

    def apply(self) -> RoundReport:
        """Every worker goes on from the new anchor, with the progress that it has made meanwhile."""
        with record_function("slowmo::apply"):
            report = self.parts.workers.inside.broadcast_outcome(self._apply_on_leader)
            self.parts.inner_state.reset()
            self.parts.share(self.parts.tensors.trainable, self._others)
        # Else the next status exchange says whose are not, before all else.
        self.parts.status.parameters_alone &= math.isfinite(report.pseudo_grad_norm)
        return report

    @property
    def _others(self) -> list[str]:
        """Buffers that are averaged with the parameters; where those travel, they were beside them."""
        return [] if self.travels or self.agreement is None else self.agreement.changed_buffers

    def _apply_on_leader(self) -> RoundReport:
        if not self.travels:
            self.arrivals = self._sums_on_leader()
        self.settle()
        assert self.norms is not None
        if self.travels:
            assert isinstance(self.parts.base, TrainingOn)
            self.parts.base.take_in_(self.parts.pieces)
        elif self.parts.config.averages_at_rounds:
            self.parts.base.end_average()
            self.parts.average_others(self._others)
        return self.parts.report(self.norms)

    # ---- no round after all ----

    def drop(self) -> None:
        """Workers go on as if it had not been launched."""
        if self.travels:
            self.parts.averager.drop_residuals()  # what they held back has gone with it
            self.parts.base.stay()
        if self.is_counted:
            self.parts.clock.drop(self.local_steps)
        self.is_counted, self.is_dropped = False, True

    def drain(self) -> None:
        """Wait for the messages, and leave what they bring."""
        for _ in self.arrivals or ():
            pass
        self.arrivals = None
