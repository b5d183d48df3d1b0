"""
The heart: the clock drives rounds (Algorithm 1 of SlowMo, https://huggingface.co/papers/1910.00643).

    for every optimizer step k = 1, 2, ...                    OuterLoop.step
        the inner optimizer has stepped, gossip mixes         line 4                        OuterLoop._exchange
        if k is a multiple of sync_every:                                                   OuterLoop._round
            pseudo_grad = mean_i(anchor - x_i)                line 6, x_{t,0} - x_{t,tau}   Round.launch
            velocity    = beta r velocity + pseudo_grad       line 7, v = gamma u           Round.settle
            anchor      = anchor - alpha velocity             line 8
            x_i         = anchor                              the next round's start        Round.apply
            inner state: reset, maintain or average           line 2

r = gamma_t / gamma_{t-1}. The arithmetic is in `outer_update.py`, one round in `round.py`, what is due in `clock.py`.

Decisions taken once:
(a) The inner learning rate of a round is the one in force at its last inner step, per parameter group. It travels in
    the round's header in fp64 and all ranks use the maximum, so that a step skipped on one rank cannot part them.
(b) Displacement form: r = 1 where no earlier non-zero learning rate exists; a zero leaves the remembered one in place.
(c) Anchors, velocity and reductions are fp32 at least, and the pseudo-gradient is measured from what was handed back:
    the anchor rounded to the parameters' dtype. Rounding never enters the velocity.
(d) Parameters: those with `requires_grad` at the start, tied ones once, in the optimizer's order, compared on all
    ranks.
(e) Floating-point buffers that have changed since the start follow `model_buffers`, integer ones take the maximum.
(f) The clock counts attempted optimizer steps: not micro-batches, not applied steps (`Clock` says why).
(g) No outer update outside a round: the consensus view shows the average, then gives weights, messages in flight and
    random generators back as they were.
(h) The consensus distance, mean ||x_i - mean x||^2 = mean ||x_i - anchor||^2 - ||pseudo_grad||^2, costs no message:
    the first term rides in the last element of each bucket.
(i) The exact average contains every exchange of its step, so a round with one sends no gossip: the exchange is left
    out, and the schedule of exchanges does not move.
(j) Before a round, before a consensus view that sends, before Trainer gathers and at the end all ranks exchange their
    status: a small header finds what differs. A rank that ends first takes part in the others' rounds, and workers
    count by their steps since the last round (gossip: alike, by their mass).
(k) With `overlap_steps=n` a round of step k is launched there (buffers are averaged at once) and applied at step
    k + n. Lines 7 and 8 are the same whenever they are done: a view in between does them, and leaves the rest due when
    it was. The status exchange of step k travels too, where nothing but the parameters is averaged: what all have said
    is heard when the round is applied, or at the next exchange, so nobody waits for a worker that is less than n steps
    late. A worker counts by its share of sync_every steps, which it knows without the others.
(l) In a worker of several processes the leader alone holds anchors and talks outside; what it learns, or what failed,
    reaches the worker's other processes at once.
(m) Compression is the averager's, and a round's alone: views, buffers and inner states are averaged exactly. It takes
    two stages: of a round in flight the second is started at the step that finds the first one here, and at the latest
    where the round is applied.
(n) With `shard_slow_state` the averager hands this worker the sums of its own shard; lines 7 and 8 are done there
    alone, and the new anchors are handed out to all behind them. A checkpoint holds the whole slow state: the two
    kinds of run resume each other.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch.profiler import record_function

from .account import Account
from .averager import Base, ExactAverager, flat_layouts, views_like
from .checkpoint import Contents
from .clock import Clock
from .compression import CODES, CompressedAverager
from .config import GOSSIP_BASES, SlowMoConfig
from .consensus_view import ConsensusView
from .gossip import GossipBase, make_topology
from .inner_state import InnerState
from .log import make_heard
from .model_tensors import ModelTensors, copy_tensors_
from .outer_update import make_outer_update
from .overlap import TrainingOn
from .round import Parts, Round
from .round_report import RoundReport
from .sharding import ShardedAverager
from .start_check import check_same_everywhere, log_start
from .status import Agreement, Purpose, StatusExchange
from .workers import Workers

STATE_VERSION = 1


class OuterLoop:
    """
    Local training of one worker, and its rounds with the others.

    Args:
        inner_optimizer (`torch.optim.Optimizer`): Holds the parameters. Only its state is touched, at a round's end.
        config (`SlowMoConfig`): The settings.
        model (`torch.nn.Module`, *optional*): Gives parameters their names, and buffers. Unwrapped.
    """

    def __init__(
        self, inner_optimizer: torch.optim.Optimizer, config: SlowMoConfig, model: torch.nn.Module | None = None
    ) -> None:
        self.config = config
        self.inner_optimizer = inner_optimizer
        self.tensors = ModelTensors(inner_optimizer, model)
        self.inner_state = InnerState(config, self.tensors)
        self.clock = Clock(config)
        self.last_round: RoundReport | None = None
        self.in_flight: Round | None = None  # launched, and not applied yet

    @property
    def attempted_steps(self) -> int:
        """The clock, in optimizer steps."""
        return self.clock.attempted_steps

    @property
    def rounds(self) -> int:
        """Begun so far."""
        return self.clock.rounds

    @property
    def outer_optimizer(self) -> torch.optim.Optimizer:
        """Of the anchors."""
        return self.update.optimizer

    @property
    def velocities(self) -> list[torch.Tensor]:
        """Laid out like the anchors; empty where the outer optimizer keeps its own."""
        return self.update.velocities

    # ---- the start ----

    def start(self, *, attempted_steps: int = 0, broadcast_frozen: bool = True) -> None:
        """
        Compare all ranks, broadcast rank 0's values, take the anchors. Collective: every rank calls it, before the
        first step.

        Args:
            attempted_steps (`int`, *optional*, defaults to `0`): Where the clock starts.
            broadcast_frozen (`bool`, *optional*, defaults to `True`): False where DDP's constructor has done it.

        Raises:
            ValueError: Ranks differ, a parameter cannot be averaged, or the settings do not fit the number of
                processes; the same on every rank.
        """
        make_heard()
        self.workers = Workers(self.config, self.tensors.device)
        check_same_everywhere(self.workers, self.config, self.tensors, self._refusal())
        ExactAverager(self.workers.world, self.config.bucket_bytes).broadcast_(
            self.tensors.values(include_frozen=broadcast_frozen)
        )
        self.workers.form()
        self.run_id: str = self.workers.world.gather_objects(uuid.uuid4().hex)[0]
        self.averager = self._make_averager()
        self.inside = ExactAverager(self.workers.inside, self.config.bucket_bytes)
        self.tensors.remember_buffers()
        self.clock.attempted_steps = attempted_steps
        # Only a leader holds slow state: elsewhere these lists are empty, and so are the loops over them.
        self.layouts = flat_layouts(self.tensors.groups) if self.workers.leads and self.config.has_rounds else []
        self.anchors, self._buckets = self.averager.take_anchors(self.layouts)
        self.base = self._make_base()
        self.averager.reserve(self._buckets)
        pieces = [piece for bucket in self._buckets for piece in bucket.pieces]
        self.update = make_outer_update(self.config, self.anchors, pieces, len(self.tensors.groups))
        log_start(self.workers, self.config, self.inner_state.policy)
        workers = self.workers  # no part refers to this loop: it goes when it is let go
        self.account = Account(lambda: workers.bytes_sent)
        self.view = ConsensusView(self.account, self.config.stash_device)
        weigh = partial(_weigh, self.config, workers, self.averager)
        self.status = StatusExchange(workers, self.tensors, self.clock, self.account, weigh)
        self.parts = Parts(
            config=self.config,
            workers=workers,
            tensors=self.tensors,
            inner_state=self.inner_state,
            averager=self.averager,
            inside=self.inside,
            base=self.base,
            update=self.update,
            buckets=self._buckets,
            pieces=pieces,
            clock=self.clock,
            status=self.status,
            account=self.account,
        )

    def _make_averager(self) -> ExactAverager:
        communicator, config = self.workers.between, self.config
        if config.shard_slow_state:
            return ShardedAverager(communicator, config.bucket_bytes, config.slow_state_device)
        # Alone, a worker sends nothing and quantises nothing.
        if config.compression == "none" or communicator.world_size == 1:
            return ExactAverager(communicator, config.bucket_bytes, at_once=bool(config.overlap_steps))
        return CompressedAverager(
            communicator, config.bucket_bytes, CODES[config.compression], at_once=bool(config.overlap_steps)
        )

    def _make_base(self) -> Base:
        if self.config.base in GOSSIP_BASES and self.workers.leads:
            return GossipBase(self.config, self.workers.gossip, self.anchors)
        return TrainingOn(self.anchors) if self.config.overlap_steps else Base()

    def _refusal(self) -> str | None:
        """Why this rank cannot start, or None."""
        refusal = self.tensors.refusal() or self.workers.refusal()
        if refusal is None and self.config.base in GOSSIP_BASES:
            try:
                make_topology(self.config, self.workers.count)
            except ValueError as error:
                return str(error)
        return refusal

    # ---- the clock ----

    @torch.no_grad()
    def step(self, inner_lrs: list[float]) -> RoundReport | None:
        """
        Count one attempted inner step; mix and do a round if they are due. Call it after the inner optimizer, before
        the scheduler.

        Args:
            inner_lrs (`list[float]`): The learning rate in force, per parameter group.

        Returns:
            `RoundReport` of a round, or None between rounds; of an overlapped one when it is taken in.
        """
        self.refuse_while_shown()
        self.clock.step()
        self.workers.roll_call.at(self.attempted_steps, "training")
        if self.clock.exchange_is_due:
            with self.account.communicating():
                self._exchange()
        if self.in_flight is None and not self.clock.round_is_due:
            return None
        with self.account.communicating():
            report = self._apply_if_due()
            if self.in_flight is not None:
                self.averager.start_second_stages(wait=False)
            if not self.clock.round_is_due:
                return report
            if not self._goes_ahead:
                return self._round(self._meet(Purpose.ROUND, inner_lrs))
            self._round_ahead(inner_lrs)
            return None

    @torch.no_grad()
    def average_gradients(self) -> None:
        """
        What DDP does at every step, for `base="all_reduce"` where there is none: in a worker of `run_in_process`.
        """
        trainable = self.tensors.trainable
        gradients = [p.grad for p in trainable if p.grad is not None]
        # Another worker may lack others, of the same sizes, and nothing would tell.
        if len(gradients) < len(trainable):
            raise RuntimeError(
                "base='all_reduce' inside run_in_process averages the gradients of all trainable parameters, as DDP "
                f"does, and {len(trainable) - len(gradients)} of {len(trainable)} have none. Freeze those that are "
                "not used."
            )
        ExactAverager(self.workers.world, self.config.bucket_bytes).mean_(gradients)

    def averaging(self, closure: Callable[[], float] | None) -> Callable[[], float] | None:
        """Average the gradients now; or, where a closure makes them, at each of its calls."""
        if closure is None:
            self.average_gradients()
            return None

        def averaged() -> float:
            loss = closure()
            self.average_gradients()
            return loss

        return averaged

    def refuse_while_shown(self) -> None:
        """
        Raise if the average is in the parameters: a step taken there would be lost when the local weights return.
        """
        if self.view.is_shown:
            raise RuntimeError(
                "a training step was taken while the average is shown: leave consensus() before you train on."
            )

    def _exchange(self) -> None:
        """One gossip exchange."""
        self.workers.roll_call.at(self.attempted_steps, "the exchange")
        number = self.clock.exchange_number
        with record_function("slowmo::exchange"):
            self.workers.inside.broadcast_outcome(lambda: self._mix(number))
            self.inside.broadcast_(self.tensors.trainable)

    def _mix(self, number: int) -> None:
        assert isinstance(self.base, GossipBase)
        try:
            self.base.mix_(number)
        except RuntimeError as error:
            raise RuntimeError(f"optimizer step {self.attempted_steps}: {error}") from error

    # ---- meetings ----

    def _meet(self, purpose: Purpose, inner_lrs: list[float] | None = None) -> Agreement:
        """Wait for all ranks, and compare. Collective over the job."""
        self.hear()
        return self.status.exchange(purpose, inner_lrs)

    @property
    def _meets_others(self) -> bool:
        """False where ranks go in step anyway, by their gradients."""
        return self.config.has_rounds and self.config.base != "all_reduce"

    def meet_before_gathering(self) -> bool:
        """
        Whether all ranks go into a collective of others together: False where one has ended its training, and will not
        come. Collective.
        """
        if self._meets_others and self.workers.world.world_size > 1:
            with self.account.communicating():
                return not self._meet(Purpose.GATHER).somebody_ended
        return True

    @torch.no_grad()
    def end(self, *, all_meet_here: bool = True, others_meet_at: Callable[[int], bool] = lambda step: False) -> None:
        """
        End training together, with the average shown. Collective: a rank that ends first takes part in the others'
        rounds until all have ended, and then has the furthest one's clock. With `base="all_reduce"` ranks go in step
        anyway.

        Args:
            all_meet_here (`bool`, *optional*, defaults to `True`): False where others may train on from this step:
                with a gossip base this rank then takes part in their exchanges until all next meet.
            others_meet_at (`Callable`, *optional*): Whether they meet at a later step that is no round. A meeting that
                it does not know of is missed, and told after `timeout_seconds`.
        """
        if not self._meets_others:
            self.show_average()
            return
        passes_on = self.config.base in GOSSIP_BASES and not all_meet_here
        with self.account.communicating():
            if passes_on:
                self._pass_on(others_meet_at)
            while (agreement := self._meet_at_end()).purpose is not Purpose.END:
                if agreement.purpose is Purpose.ROUND:
                    self.show_local(give_back_random_state=False)
                    self.clock.attempted_steps = agreement.attempted_steps
                    self._round(agreement)
            if not agreement.same_step:  # an average that is shown is an old one
                self.show_local(give_back_random_state=False)
            self.clock.attempted_steps, self.clock.idle_steps = agreement.trained_steps, 0
            # Nobody has trained since a round: its anchor is the average, and what was mixed since is not.
            if passes_on and self.clock.workers_agree:
                self.workers.inside.broadcast_outcome(self._back_to_anchors)
                self.inside.broadcast_(self.tensors.trainable)
            if not self.view.is_shown:
                self._apply_if_due()  # the others may have gone on to where it is
        if not self.view.is_shown:
            self._show([] if self._nothing_to_average else agreement.changed_buffers)

    def _meet_at_end(self) -> Agreement:
        self.hear()  # first: an error is told in collectives that come before the others' messages
        # Others may wait for them, and here comes no later step to start them at.
        self.averager.start_second_stages(wait=True)
        return self._meet(Purpose.END)

    def _back_to_anchors(self) -> None:
        """
        On the leader: start from the anchors, as after a round; messages in flight are waited for, and belong to what
        is left.
        """
        self.base.settle()
        self.base.end_average()
        for piece in self.parts.pieces:
            self.base.hand_back_(piece)

    def _pass_on(self, others_meet_at: Callable[[int], bool]) -> None:
        """
        Out of data: exchange without training, until the others hear of it where all meet. The average does not
        change.
        """
        self.show_local(give_back_random_state=False)
        meet = False
        while not meet:
            self.clock.idle()
            if self.clock.exchange_is_due:
                self._exchange()
            meet = self.clock.round_is_due or others_meet_at(self.attempted_steps)

    # ---- the round ----

    def _round(self, agreement: Agreement) -> RoundReport | None:
        """Of step k, where all have come: applied at once, or launched and left to travel."""
        if self.in_flight is not None:  # on a rank that has ended the clock jumps from round to round
            self._apply()
        launched = self.in_flight = Round(self.parts)
        with record_function("slowmo::round"):
            if launched.travels:
                self._launch(launched, agreement)
                return None
            try:
                launched.launch()
                launched.note(agreement)
                return self._apply()
            except BaseException:
                launched.drop()
                self.in_flight = None
                raise

    def _launch(self, launched: Round, agreement: Agreement) -> None:
        if not agreement.ahead:
            launched.average_beside(agreement)  # first: on one connection messages queue
        launched.launch()
        launched.note(agreement)
        if agreement.ahead:
            launched.average_beside(agreement)

    def _round_ahead(self, inner_lrs: list[float]) -> None:
        """Of step k, launched before anybody has heard of the others."""
        with record_function("slowmo::round"):
            hear = self.status.start(Purpose.ROUND, inner_lrs, ahead=True)
            self.in_flight = Round(self.parts)
            self.in_flight.launch(hear)

    def _apply_if_due(self) -> RoundReport | None:
        is_due = self.in_flight is not None and self.in_flight.due_step <= self.attempted_steps
        return self._apply() if is_due else None

    def _apply(self) -> RoundReport:
        self.hear()
        assert self.in_flight is not None
        self.last_round = self.in_flight.apply()
        self.in_flight = None
        self.account.close()
        return self.last_round

    @property
    def _goes_ahead(self) -> bool:
        """Whether a round's messages set out before anybody has heard of the others; the same on all."""
        return bool(self.config.overlap_steps) and self.status.parameters_alone and self.workers.world.fails_cleanly

    def hear(self) -> None:
        """What all have said of a round that went ahead, if that is not known yet: `Round.hear`."""
        if self.in_flight is not None:
            try:
                self.in_flight.hear()
            finally:
                if self.in_flight.is_dropped:
                    self.in_flight = None

    def settle(self) -> None:
        """Do the outer update of a round in flight, on the leader. It stays due when it was."""
        self.hear()
        if self.in_flight is not None:
            self.in_flight.settle()

    def forget_round(self) -> None:
        """
        Another state is taken up: what is under way belongs to the run that is left, with what was wrong there, and is
        waited for.
        """
        with suppress(ValueError):
            self.hear()
        if self.in_flight is not None:
            self.in_flight.drain()
        self.in_flight = None
        self.base.stay()
        self.status.forget()

    # ---- looking at the average ----

    @torch.no_grad()
    def show_average(self) -> None:
        """Put the average into parameters and buffers of every rank. Collective, unless the workers agree anyway."""
        if self.view.is_shown or not self.config.has_rounds:
            return
        self.view.begin()
        try:
            self._show([] if self._nothing_to_average else self._meet(Purpose.LOOK).changed_buffers)
        except BaseException:
            self.show_local()
            raise

    @property
    def _nothing_to_average(self) -> bool:
        return self.clock.workers_agree and (self.config.model_buffers == "average" or self.attempted_steps == 0)

    def _show(self, changed_buffers: list[str]) -> None:
        floating, integer = self.tensors.buffers_named(changed_buffers)
        params = [] if self.clock.workers_agree else self.tensors.trainable
        shown = [*params, *floating, *integer]

        def average_() -> None:
            with record_function("slowmo::consensus"):
                self.workers.inside.broadcast_outcome(lambda: self._lead_look(bool(params), floating, integer))
                self.inside.broadcast_(shown)

        self.view.begin()
        try:
            self.view.show(shown, average_)
        except BaseException:
            self.show_local()
            raise

    def _lead_look(self, params: bool, floating: list[torch.Tensor], integer: list[torch.Tensor]) -> None:
        if params:
            self.settle()
            self.base.settle()
        with self.account.apart():
            if params:
                self.parts.refuse_non_finite(self.averager.show_mean_(self._buckets, self.base))
            self.averager.mean_(floating)
            self.averager.max_(integer)

    @torch.no_grad()
    def show_local(self, *, give_back_random_state: bool = True) -> None:
        """End a look: local weights and buffers return, bit for bit, and random generators if they have not yet."""
        self.workers.only_gradients_meet()
        self.view.restore(give_back_random_state=give_back_random_state)

    def keep_average(self) -> None:
        """End training on the average: what is shown stays."""
        self.show_average()
        self.view.keep()

    # ---- state ----

    def state_dict(self) -> dict[str, Any]:
        """
        Clock, anchors and outer optimizer: all that is equal on every worker at a round's end.

        Raises:
            RuntimeError: Inside a round, where workers differ and one state cannot speak for all; or where this worker
                has but a shard.
        """
        self._refuse_inside_round(self.attempted_steps, "saved")
        if self.config.shard_slow_state and self.workers.count > 1:
            raise RuntimeError(
                "slow state cannot be saved by one worker with shard_slow_state=True: each has a shard of it. Use "
                "accelerator.save_state with register_for_checkpointing, which brings them together, or "
                "shard_slow_state=False."
            )
        return {
            "version": STATE_VERSION,
            "sync_every": self.config.sync_every,
            "attempted_steps": self.attempted_steps,
            "rounds": self.rounds,
            "anchors": [item.flat for item in self.anchors],
            "velocities": self.update.velocities,
            "outer_optimizer": self._outer_state(),
        }

    def whole_slow_state(self, *, keep: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """
        Anchors and velocities over all workers, for a checkpoint. Collective over leaders with `shard_slow_state`; no
        report counts it.

        Args:
            keep (`bool`): False where this process does not write them: what it gets is of no use.
        """
        with self.account.apart():
            whole = self.averager.gather_states([*(item.flat for item in self.anchors), *self.velocities], keep=keep)
        return whole[: len(self.anchors)], whole[len(self.anchors) :]

    def _outer_state(self) -> dict[str, Any]:
        saved = self.update.saved()
        if saved.objects:
            return saved.objects["outer_optimizer"]  # type: ignore[no-any-return]
        return {"previous_inner_lr": saved.settings["previous_inner_lrs"]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """
        Take up a state of `state_dict()`; copied in place. Collective among the processes of a worker.

        Raises:
            ValueError: The state does not fit: version, sizes, or a clock inside a round.
        """
        if state_dict.get("version") != STATE_VERSION:
            raise ValueError(
                f"slow state has version {state_dict.get('version')!r}; this package reads {STATE_VERSION}."
            )
        self._refuse_inside_round(state_dict["attempted_steps"], "resumed")
        self.show_local()  # the state replaces what a look would give back
        self.forget_round()
        # The leader's part, or its refusal.
        self.workers.inside.broadcast_outcome(lambda: self._load_slow_state(state_dict))
        self.inside.broadcast_(self.tensors.trainable)  # the leader has taken its weights from the anchors
        self.clock.attempted_steps, self.clock.rounds = state_dict["attempted_steps"], state_dict["rounds"]
        self.clock.local_steps = 0

    def _load_slow_state(self, state_dict: dict[str, Any]) -> None:
        for name, own in (("anchors", [item.flat for item in self.anchors]), ("velocities", self.update.velocities)):
            sizes, expected = (
                [t.numel() for t in state_dict[name]],
                [layout.flat.numel() for layout in self.layouts[: len(own)]],
            )
            if sizes != expected:
                raise ValueError(f"slow state does not fit: {name} have sizes {sizes}, this run has {expected}.")
            self.averager.take_own_(own, state_dict[name])
        outer = state_dict["outer_optimizer"]
        lrs = {"previous_inner_lrs": outer["previous_inner_lr"]} if "previous_inner_lr" in outer else {}
        self.update.restore(Contents(settings=lrs, objects={} if lrs else {"outer_optimizer": outer}))
        self.averager.drop_residuals()  # each worker's own, which this state does not hold
        # Inside a round there is all_reduce alone, whose parameters stay.
        if state_dict["attempted_steps"] % self.config.sync_every == 0:
            for layout, whole in zip(self.layouts, state_dict["anchors"], strict=True):
                copy_tensors_(layout.params, views_like(whole, layout.params))
            self._back_to_anchors()

    def _refuse_inside_round(self, attempted_steps: int, verb: str) -> None:
        if attempted_steps and not self.config.exact_average:
            raise RuntimeError(
                f"training cannot be {verb} with exact_average=False: the workers stay different, and their own "
                "weights are not in this state. Use exact_average=True."
            )
        if attempted_steps and self.config.overlap_steps:
            raise RuntimeError(
                f"training cannot be {verb} with overlap_steps={self.config.overlap_steps}: workers are never all the "
                "same, and their own weights are not in this state. Use accelerator.save_state with "
                "register_for_checkpointing, or overlap_steps=0."
            )
        if attempted_steps % self.config.sync_every and self.config.has_rounds and self.config.base != "all_reduce":
            raise RuntimeError(
                f"training cannot be {verb} inside a round: step {attempted_steps} is no multiple of sync_every="
                f"{self.config.sync_every}, and the workers' own weights are not in this state. Save at a multiple "
                "of sync_every."
            )


def _weigh(config: SlowMoConfig, workers: Workers, averager: ExactAverager, local_steps: list[int]) -> None:
    """Workers count by their steps since the last round (gossip: alike, by their mass)."""
    if config.base not in GOSSIP_BASES and workers.leads:
        averager.weigh([local_steps[rank] for rank in workers.between.ranks])
