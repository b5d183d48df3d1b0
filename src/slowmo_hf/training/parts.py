"""What the outer loop of one process is made of."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch.profiler import record_function

from ..algorithm.layout import flat_layouts
from ..algorithm.norms import Norms
from ..algorithm.starts import Base, TrainingOn
from ..config import GOSSIP_BASES, SlowMoConfig
from ..wire.averages import Averages
from ..wire.gossip import GossipBase, make_topology
from ..wire.job import host_name
from ..wire.workers import Workers
from .account import Account
from .clock import Clock
from .consensus_view import ConsensusView
from .inner_state import InnerState
from .model_tensors import ModelTensors, copy_tensors_
from .report import RoundReport, log_costs
from .slow_state import SlowState
from .status import StatusExchange

_NOT_FINITE = (
    "its parameters are not finite (NaN or infinity). Lower the learning rate or clip gradients (max_grad_norm), and "
    "go on from the last checkpoint."
)


@dataclass(frozen=True)
class Parts:
    """
    The parts of one process, and what several rooms do with them. In a worker of several processes the leader alone
    has slow state, and talks to other workers; what it gets reaches the worker's other processes by `inside`.
    """

    config: SlowMoConfig
    workers: Workers
    tensors: ModelTensors
    inner_state: InnerState
    clock: Clock
    account: Account
    status: StatusExchange
    view: ConsensusView
    slow: SlowState
    base: Base
    inside: Averages

    @classmethod
    def make(
        cls, config: SlowMoConfig, workers: Workers, tensors: ModelTensors, inner_state: InnerState, clock: Clock
    ) -> Parts:
        """After the groups are made; anchors begin with the parameters' values."""
        layouts = flat_layouts(tensors.groups) if workers.leads and config.has_rounds else []
        account = Account(lambda: workers.bytes_sent)
        slow = SlowState(config, workers, layouts, len(tensors.groups), account)
        weigh = partial(_weigh, config, workers, slow.averages)
        return cls(
            config=config,
            workers=workers,
            tensors=tensors,
            inner_state=inner_state,
            clock=clock,
            account=account,
            status=StatusExchange(workers, tensors, clock, account, weigh),
            view=ConsensusView(account, config.stash_device),
            slow=slow,
            base=_make_base(config, workers, slow),
            inside=Averages(workers.inside, config.bucket_bytes // 2),
        )

    @property
    def meets_others(self) -> bool:
        """False where ranks go in step anyway, by their gradients."""
        return self.config.has_rounds and self.config.base != "all_reduce"

    @property
    def trains_alone(self) -> bool:
        """Whether this worker's weights part from others' between rounds."""
        return self.meets_others and self.workers.count > 1

    # ---- inside a worker ----

    def on_leader(self, act: Callable[[], None]) -> None:
        """Done by the leader alone; its error is everybody's."""
        self.workers.inside.broadcast_outcome(act)

    def share(self, params: list[torch.Tensor], changed_buffers: list[str]) -> None:
        """What the leader has got reaches the worker's other processes."""
        floating, integer = self.tensors.buffers_named(changed_buffers)
        state = [t for _, t in self.inner_state.named_tensors()] if self.inner_state.policy == "average" else []
        self.inside.broadcast_([*params, *floating, *integer, *state])
        self.tensors.keep_averaged(self.averaged(changed_buffers))

    @property
    def followers_keep_last_round(self) -> bool:
        """Whether a worker's other processes hold the last round's model, which the leader has in its anchors."""
        config = self.config
        return (
            self.tensors.keeps_last_round
            and self.workers.size > 1
            and config.averages_at_rounds
            and not (config.overlap_steps or config.shard_slow_state)
        )

    def keep_last_round(self) -> None:
        """Where a round has just ended: its model is in the parameters."""
        if self.followers_keep_last_round and not self.workers.leads:
            self.tensors.last_round = self.tensors.last_round or [torch.empty_like(p) for p in self.tensors.trainable]
            copy_tensors_(self.tensors.last_round, self.tensors.trainable)

    @torch.no_grad()
    def share_last_round(self) -> None:
        """The leader's anchors, of a state that was taken up, reach the worker's other processes. Collective there."""
        if not self.followers_keep_last_round:
            return
        if self.workers.leads:
            of = {
                id(p): view for item in self.slow.anchors for view, p in zip(item.anchors(), item.params, strict=True)
            }
            self.inside.broadcast_([of[id(p)].to(p.dtype) for p in self.tensors.trainable])
        else:
            self.tensors.last_round = [torch.empty_like(p) for p in self.tensors.trainable]
            self.inside.broadcast_(self.tensors.last_round)

    def averaged(self, names: list[str]) -> list[str]:
        """Those of these buffers that a round makes equal."""
        if self.config.model_buffers == "average":
            return names
        buffers = self.tensors.buffers()
        return [name for name in names if name in buffers and not buffers[name].is_floating_point()]

    def back_to_anchors(self) -> None:
        """
        On the leader: start from the anchors, as after a round; messages in flight are waited for, and belong to what
        is left.
        """
        self.base.settle()
        self.base.end_average()
        for piece in self.slow.pieces:
            self.base.hand_back_(piece)

    # ---- between workers ----

    def exchange(self) -> None:
        """One gossip exchange (line 4)."""
        self.workers.roll_call.at(self.clock.attempted_steps, "the exchange")
        number = self.clock.exchange_number
        with record_function("slowmo::exchange"):
            self.on_leader(lambda: self._mix(number))
            self.inside.broadcast_(self.tensors.trainable)

    def _mix(self, number: int) -> None:
        assert isinstance(self.base, GossipBase)
        try:
            self.base.mix_(number)
        except RuntimeError as error:
            raise RuntimeError(f"optimizer step {self.clock.attempted_steps}: {error}") from error

    def average_others(self, changed_buffers: list[str]) -> None:
        """What else a round makes equal: buffers, and the inner state where it is to be averaged."""
        floating, integer = self.tensors.buffers_named(changed_buffers)
        self.slow.reduction.start_second_stages(wait=True)  # first: all workers' collectives have one order
        if self.config.model_buffers == "average":
            self.slow.averages.mean_(floating)
        self.slow.averages.max_(integer)
        self.inner_state.average(self.slow.averages)

    # ---- what a round tells ----

    def report(self, norms: Norms) -> RoundReport:
        """Of a round that ends now; after the second one a line says what a step and a round cost here."""
        config, workers, account = self.config, self.workers, self.account
        report = account.report(self.clock.rounds, norms, consensus_is_known=config.exact_average)
        if report.round == 2 and workers.index == 0 and workers.count > 1:
            exchange_seconds = account.communicated_before if config.base in GOSSIP_BASES else None
            log_costs(report, config.sync_every, account.computed_seconds, exchange_seconds)
        return report

    def refuse_non_finite(self, square: float, own_is_finite: bool, *, all_are_here: bool = True) -> None:
        """
        NaN and infinity of one worker are everybody's after an average; the square rode in its messages, so all know
        it together. Where not all are here the next status exchange says whose they are.
        """
        if math.isfinite(square) or self.workers.between.world_size == 1:
            return
        if not all_are_here:
            is_mine = not (self.config.exact_average and own_is_finite)
            self.status.lost_finiteness = _NOT_FINITE if is_mine else ""
            return
        host, step = host_name(), self.clock.attempted_steps
        told = self.workers.between.gather_objects((self.workers.world.rank, host, own_is_finite))
        where = [
            f"rank {rank} on {host}, step {step}: {_NOT_FINITE}" for rank, host, is_finite in told if not is_finite
        ]
        raise ValueError(
            "; ".join(where) or f"step {step}: the workers' average is not finite, though each one's part is."
        )


def refusal(config: SlowMoConfig, workers: Workers, tensors: ModelTensors) -> str | None:
    """Why this rank cannot start, or None."""
    words = tensors.refusal() or workers.refusal()
    if words is None and config.base in GOSSIP_BASES:
        try:
            make_topology(config, workers.count)
        except ValueError as error:
            return str(error)
    return words


def _make_base(config: SlowMoConfig, workers: Workers, slow: SlowState) -> Base:
    if config.base in GOSSIP_BASES and workers.leads:
        return GossipBase(config, workers.gossip, slow.anchors)
    return TrainingOn(slow.items) if config.overlap_steps else Base()


def _weigh(config: SlowMoConfig, workers: Workers, averages: Averages, local_steps: list[int]) -> None:
    """Workers count by their steps since the last round (gossip: alike, by their mass)."""
    if config.base not in GOSSIP_BASES and workers.leads:
        averages.weigh([local_steps[rank] for rank in workers.between.ranks])
