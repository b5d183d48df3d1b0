"""What the outer loop of one process is made of."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch.profiler import record_function

from ..algorithm.layout import flat_layouts
from ..algorithm.norms import Norms
from ..algorithm.outer_update import works_elementwise
from ..algorithm.starts import Base, TrainingOn
from ..config import SlowMoConfig
from ..finite import all_finite
from ..names import ELEMENTWISE
from ..upstream import collectives_of_job
from ..wire.averages import Averages
from ..wire.gossip import GossipBase, make_topology
from ..wire.inside import Inside, ShardedInside, WholeInside
from ..wire.job import backends, host_name, is_in_process, said_by_ranks
from ..wire.workers import Workers
from .account import Account, mean_utilisation
from .clock import Clock
from .consensus_view import ConsensusView
from .costs import Costs
from .inner_state import InnerState
from .model_tensors import ModelTensors, copy_tensors_
from .other_tensors import news_of_frozen
from .own_collectives import OwnCollectives
from .report import MovedAlike, RoundReport
from .slow_state import SlowState
from .status import Agreement, Speaker, StatusExchange

_NOT_FINITE = (
    "its parameters are not finite (NaN or infinity). Clip gradients (max_grad_norm) and go on from the last "
    "checkpoint, or begin a new run from its model with a lower learning rate."
)


@dataclass(frozen=True)
class Parts:
    """
    The parts of one process, and what several rooms do with them. In a worker of several processes each has the slow
    state of its own part of the model, and talks to its counterparts in other workers; `inside` brings a worker's
    processes together.
    """

    config: SlowMoConfig
    workers: Workers
    tensors: ModelTensors
    inner_state: InnerState
    clock: Clock
    account: Account
    own_collectives: OwnCollectives
    costs: Costs
    alike: MovedAlike
    status: StatusExchange
    view: ConsensusView
    slow: SlowState
    base: Base
    inside: Inside

    @classmethod
    def make(
        cls, config: SlowMoConfig, workers: Workers, tensors: ModelTensors, inner_state: InnerState, clock: Clock
    ) -> Parts:
        """After the groups are made; anchors begin with the parameters' values."""
        speaker = Speaker(workers, tensors)  # first: on all ranks alike, also where one of them cannot make the rest
        inside = _make_inside(config, workers, tensors)
        layouts = [inside.part(layout) for layout in flat_layouts(tensors.groups)] if config.has_rounds else []
        account = Account(lambda: workers.bytes_sent, collectives_of_job)
        slow = SlowState(config, workers, layouts, len(tensors.groups), account)
        weigh = partial(_weigh, config, workers, slow.averages)
        parts = cls(
            config=config,
            workers=workers,
            tensors=tensors,
            inner_state=inner_state,
            clock=clock,
            account=account,
            own_collectives=OwnCollectives(workers, clock, account),
            costs=Costs(config, workers),
            alike=MovedAlike(is_measured=_measures_distances(config, workers)),
            status=StatusExchange(workers, inner_state, clock, account, weigh, speaker),
            view=ConsensusView(account, config.stash_device, tensors.swapping),
            slow=slow,
            base=_make_base(config, workers, slow, tensors),
            inside=inside,
        )
        if parts.trains_alone and workers.size == 1:
            parts.own_collectives.refuse_sending_step(tensors.optimizer)
        return parts

    @property
    def meets_others(self) -> bool:
        """False where ranks go in step anyway, by their gradients."""
        return self.config.has_rounds and self.config.base != "all_reduce"

    @property
    def trains_alone(self) -> bool:
        """Whether this worker's weights part from others' between rounds."""
        return self.meets_others and self.workers.count > 1

    @property
    def holds_all_anchors(self) -> bool:
        """Whether what a round leaves in this process's parameters is in its anchors, too."""
        return self.inside.has_all and not self.config.shard_slow_state

    # ---- inside a worker ----

    def hand_out(self) -> None:
        """
        What each process has written into its part of the parameters is in all of a worker's. Collective there.

        Raises:
            ValueError: What would be overwritten is not finite: this process has computed something else than its
                worker's others.
        """
        if not self.inside.has_all and not all_finite(self.inside.overwritten(self.tensors.trainable)):
            raise _lost(self.workers, self.workers.world.rank, self.clock.attempted_steps)
        self.hand_out_unchecked()

    def hand_out_unchecked(self) -> None:
        """The same of values that are known to be right, whatever they replace. Collective there."""
        self.inside.hand_out_(self.tensors.trainable)
        self.tensors.rewritten()

    def summed(self, values: list[float]) -> list[float]:
        """Of a worker's whole model, from those of its processes' parts. Collective there."""
        return self.workers.inside.gather_header(values).sum(0).tolist()

    @property
    def keeps_a_copy(self) -> bool:
        """Whether this process holds the last round's model beside its anchors, which are of a part alone."""
        config = self.config
        return (
            self.tensors.others.keeps_last_round
            and not self.inside.has_all
            and config.averages_at_rounds
            and not config.shard_slow_state
        )

    def copy_last_round(self) -> None:
        """Where a round has just ended without a delay: its model is in the parameters."""
        if self.keeps_a_copy and not self.config.overlap_steps:
            self.tensors.make_copy()
            copy_tensors_(self.tensors.last_round, self.tensors.trainable)

    @torch.no_grad()
    def share_last_round(self) -> None:
        """Every process's anchors, as they are handed back, reach the worker's others. Collective there."""
        if not self.keeps_a_copy:
            return
        self.tensors.make_copy()
        for layout, item in zip(flat_layouts([self.tensors.last_round]), self.slow.anchors, strict=True):
            for span, run in self.inside.part(layout).runs(item.flat):
                span.values().copy_(run)
        self.inside.hand_out_(self.tensors.last_round)

    def back_to_anchors(self) -> None:
        """
        Start from the anchors, as after a round; messages in flight are waited for, and belong to what is left.
        Collective inside the worker.
        """
        self.base.settle()
        self.base.end_average()
        for piece in self.slow.pieces:
            self.base.hand_back_(piece)
        self.hand_out()

    # ---- between workers ----

    def exchange(self) -> None:
        """One gossip exchange (line 4)."""
        self.workers.roll_call.at(self.clock.attempted_steps, "the exchange")
        number = self.clock.exchange_number
        with self.account.communicating(), record_function("slowmo::exchange"):
            self._mix(number)
            self.hand_out_unchecked()

    def _mix(self, number: int) -> None:
        assert isinstance(self.base, GossipBase)
        try:
            self.base.is_apart = self.tensors.is_laid_out_anew  # which ends the run at the next status exchange
            self.base.mix_(number, self.clock.attempted_steps)
        except RuntimeError as error:
            raise RuntimeError(f"optimizer step {self.clock.attempted_steps}: {error}") from error
        self.base.is_apart = False

    def average_others(self, changed: list[str]) -> None:
        """
        What else a round makes equal: buffers and frozen parameters that have changed, and the inner state where it is
        to be averaged. Collective.
        """
        floating, integer = self.tensors.others.to_average(changed)
        self.slow.reduction.start_second_stages(wait=True)  # first: all workers' collectives have one order
        if self.config.model_buffers == "local":
            floating = []
        elif news := news_of_frozen(self.tensors.others, changed):
            self.workers.logger.info("%s", news)
        self.inside.average_others_(self.slow.averages, floating, integer)
        if self.inner_state.policy == "average":
            self.inside.mean_(self.slow.averages, self.inner_state.tensors_to_average(self.slow.averages))
        self.tensors.others.keep_averaged(changed)

    # ---- what a round tells ----

    def report(self, norms: Norms, agreement: Agreement | None) -> RoundReport:
        """
        Of a round that ends now; a line says what steps and rounds cost here, when that is news. Collective inside the
        worker.

        Args:
            agreement (`Agreement`, *optional*): What all have said of it; None of one that a checkpoint has brought.
        """
        # Where DDP couples ranks at every step, they wait in what would count as computation.
        told = agreement.spent if agreement is not None and self.meets_others else []
        report = self.account.report(
            self.clock.rounds,
            norms,
            self.summed,
            consensus_is_known=self.config.exact_average,
            has_velocity=self.config.has_velocity,
            utilisation=mean_utilisation(told),
        )
        if self.costs.hear(report.round - 1, told) and self.workers.count > 1:
            line = self.costs.news(report.bytes_sent, are_coupled=self.own_collectives.is_said)
            if line:
                self.workers.logger.info("%s", line)
        alike = self.alike.hear(norms, agreement.local_steps if agreement is not None else [])
        if alike:
            self.workers.logger.warning("%s", alike)
        return report

    def refuse_non_finite(self, square: float, own_is_finite: bool, *, all_are_here: bool = True) -> None:
        """
        NaN and infinity of one worker are everybody's after an average; the square rode in its messages, so all know
        it together. Where not all are here the next status exchange says whose they are.

        Args:
            square (`float`): Of a worker's whole model.
            own_is_finite (`bool`): Whether this process's part was.
        """
        if math.isfinite(square) or self.workers.between.world_size == 1:
            return
        if not all_are_here:
            self.status.lost_finiteness = "" if own_is_finite else _NOT_FINITE
            return
        told = self.workers.world.gather_objects((host_name(), own_is_finite))
        step = self.clock.attempted_steps
        where = [(host, "" if is_finite else _NOT_FINITE) for host, is_finite in told]
        raise ValueError(
            said_by_ranks(where, f", step {step}: ")
            or f"step {step}: the workers' average is not finite, though each one's part is."
        )


def refusal(workers: Workers, inner_state: InnerState, refused: str | None = None) -> str | None:
    """Why this rank cannot start, or None; what has been found before comes first."""
    config, tensors = inner_state.config, inner_state.tensors
    words = (
        refused
        or tensors.refusal(has_rounds=config.has_rounds)
        or inner_state.refusal()
        or inner_state.problem()
        or workers.refusal()
        or _refuse_device(config, workers, tensors)
        or _refuse_outer_optimizer(config, tensors)
    )
    if words is None and config.gossips:
        try:
            make_topology(config, workers.count)
        except ValueError as error:
            return str(error)
    return words


def _refuse_device(config: SlowMoConfig, workers: Workers, tensors: ModelTensors) -> str | None:
    """On Apple's GPUs a round fails; and, of several processes, where the job's backend carries nothing from."""
    named = list(zip(tensors.names, tensors.trainable, strict=True))
    on_mps = next((name for name, p in named if p.device.type == "mps"), "") if config.has_rounds else ""
    if on_mps:
        return (
            f"parameter {on_mps!r} lies on device 'mps', which has no double precision: norms are summed in it. Train "
            "on the CPU (TrainingArguments(use_cpu=True), Accelerator(cpu=True))."
        )
    if workers.world.world_size == 1 or is_in_process():
        return None
    carriers = backends()
    name, device = next(((name, p.device.type) for name, p in named if p.device.type not in carriers), ("", ""))
    if not name:
        return None
    given = ",".join(f"{of}:{backend}" for of, backend in carriers.items())
    return (
        f"parameter {name!r} lies on device {device!r}, from which the job's backend ({given}) carries nothing. With "
        'parameters in main memory (CPUOffloadPolicy), start by init_process_group(backend="cpu:gloo,cuda:nccl"). '
        "Under accelerate: fsdp_offload_params: true in its configuration, or "
        'InitProcessGroupKwargs(backend="cpu:gloo,cuda:nccl").'
    )


def _measures_distances(config: SlowMoConfig, workers: Workers) -> bool:
    """With `compression` the distance is off by what quantisation changes; with all-reduce there is none."""
    is_exact = config.exact_average and config.compression == "none"
    return is_exact and config.base != "all_reduce" and workers.count > 1


def _refuse_outer_optimizer(config: SlowMoConfig, tensors: ModelTensors) -> str | None:
    if not tensors.mates or works_elementwise(config):
        return None
    return (
        f"outer_optimizer={config.outer_optimizer!r} may need whole tensors, and the model is sharded: no process has "
        f"one. Use 'slow_momentum' or one of torch.optim's that works element by element: {', '.join(ELEMENTWISE)}."
    )


def _make_inside(config: SlowMoConfig, workers: Workers, tensors: ModelTensors) -> Inside:
    longest = config.bucket_bytes // 2
    if tensors.mates:
        return ShardedInside(workers, longest)
    return WholeInside(workers, longest, cut=works_elementwise(config))


def _make_base(config: SlowMoConfig, workers: Workers, slow: SlowState, tensors: ModelTensors) -> Base:
    if config.gossips:

        def lost(worker: int, step: int) -> Exception:
            return _lost(workers, workers.gossip.ranks[worker], step)

        return GossipBase(config, workers.gossip, slow.anchors, tensors.trainable, lost)
    return TrainingOn(slow.items) if config.overlap_steps else Base()


def _lost(workers: Workers, rank: int, step: int) -> ValueError:
    """Parameters of a rank that were not finite at a step: all are told, the same words."""
    roll_call = workers.roll_call
    return ValueError(roll_call.tell(f"rank {rank} on {roll_call.host_of(rank)}, step {step}: {_NOT_FINITE}"))


def _weigh(config: SlowMoConfig, workers: Workers, averages: Averages, local_steps: list[int]) -> None:
    """Workers count by their steps since the last round (gossip: alike, by their mass)."""
    if not config.gossips:
        averages.weigh([local_steps[rank] for rank in workers.between.ranks])
