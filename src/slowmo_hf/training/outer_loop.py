"""
The heart: the clock drives rounds (Algorithm 1 of SlowMo, https://huggingface.co/papers/1910.00643).

    for every optimizer step k = 1, 2, ...                    OuterLoop.step
        the inner optimizer has stepped, gossip mixes         line 4                        Parts.exchange
        if k is a multiple of sync_every:                     Clock.round_is_due            InFlight.launch
            x_i is sent                                                                     Round.launch
            pseudo_grad = mean_i(anchor - x_i)                line 6, x_{t,0} - x_{t,tau}   Round.settle
            velocity    = beta r velocity + pseudo_grad       line 7, v = gamma u           slow_momentum_update_
            anchor      = anchor - alpha velocity             line 8
            x_i         = anchor                              the next round's start        Round.apply
            inner state: reset, maintain or average           line 2

r = gamma_t / gamma_{t-1}, and gamma of a round is the mean learning rate of its attempted steps. The arithmetic is in
`algorithm/slow_momentum.py`, one round in `round.py`, what is due in `clock.py`; why it is so, in docs/internals.md.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ..config import SlowMoConfig
from ..contents import Part
from ..log import make_heard
from ..wire.workers import Workers
from .clock import Clock
from .consensus import Consensus
from .ending import end_together, log_end
from .gradients import averaging
from .in_flight import InFlight
from .inner_state import InnerState
from .local_state import LocalTensors
from .model_tensors import ModelTensors
from .parts import Parts, refusal
from .report import RoundReport
from .slow_state_dict import load_state_dict, state_dict
from .start_check import check_start, made_everywhere
from .start_table import log_start
from .start_values import make_equal
from .status import Purpose


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
        self.config, self.inner_optimizer = config, inner_optimizer
        self.tensors = ModelTensors(inner_optimizer, model)
        self.inner_state = InnerState(config, self.tensors)
        self.clock = Clock(config)

    def start(
        self, *, attempted_steps: int | None = 0, broadcast_frozen: bool = True, refused: str | None = None
    ) -> None:
        """
        Compare all ranks, give all rank 0's values, take the anchors. Collective, before the first step.

        Args:
            attempted_steps (`int`, *optional*, defaults to `0`): Where the clock starts; None: a checkpoint will say.
            broadcast_frozen (`bool`, *optional*, defaults to `True`): False where DDP's constructor has done it.
            refused (`str`, *optional*): Why this rank cannot start, as its adapter has found; all are told.

        Raises:
            ValueError: Ranks differ, or the settings do not fit model or job; the same on every rank.
        """
        make_heard()
        self.workers = workers = Workers(self.config, self.tensors.device, self.tensors.mates or None)
        check_start(workers, self.config, self.tensors, refusal(workers, self.inner_state, refused), attempted_steps)
        workers.form()
        make_equal(workers, self.tensors, self.clock, include_frozen=broadcast_frozen)
        self.run_id: str = workers.world.gather_objects(uuid.uuid4().hex)[0]
        self._branch = self.run_id  # which a resumed run keeps; this one is the loop's alone
        self.clock.attempted_steps = self.clock.begun_at = attempted_steps or 0
        make = partial(Parts.make, self.config, workers, self.tensors, self.inner_state, self.clock)
        self.parts = parts = made_everywhere(workers, make)  # no part refers to this loop: it goes when it is let go
        self.account, self.status, self.view, self.base = parts.account, parts.status, parts.view, parts.base
        log_start(parts)
        self.in_flight = InFlight(parts)
        self.consensus = Consensus(parts, self.in_flight)

    # ---- the clock ----

    @torch.no_grad()
    def step(self, inner_lrs: list[float]) -> RoundReport | None:
        """
        Count one attempted inner step, mix and do a round if due: behind the inner optimizer, before the scheduler.

        Args:
            inner_lrs (`list[float]`): The learning rate in force, per parameter group.

        Returns:
            `RoundReport` of a round, or None between rounds; of an overlapped one when it is applied.
        """
        self.refuse_while_shown()
        self.in_flight.goes_on()
        if self.parts.trains_alone:
            self.parts.own_collectives.at_step()
        self.clock.step(inner_lrs)
        self.workers.roll_call.at(self.clock.attempted_steps, "training")
        if self.clock.exchange_is_due:
            self.parts.exchange()
        if not self.in_flight.rounds and not self.clock.round_is_due:
            return None
        with self.account.communicating():
            report = self.in_flight.advance()
            return self.in_flight.launch(self.clock.rates.mean) if self.clock.round_is_due else report

    @property
    def attempted_steps(self) -> int:
        """The clock, in optimizer steps."""
        return self.clock.attempted_steps

    @property
    def save_id(self) -> str:
        """Of a checkpoint that is saved now: no other branch of the run has it."""
        return f"{self._branch}-{self.attempted_steps}"

    @property
    def rounds(self) -> int:
        """Begun so far."""
        return self.clock.rounds

    @property
    def last_round(self) -> RoundReport | None:
        """The report of the last round that was applied."""
        return self.in_flight.last

    def averaging(self, closure: Callable[[], float] | None) -> Callable[[], float] | None:
        """As `gradients.averaging`."""
        return averaging(self.parts, closure)

    def refuse_while_shown(self) -> None:
        """Raise if the average is shown: a step taken there would be lost. The last round's model goes by itself."""
        self.consensus.end_last_round()
        if self.view.is_shown:
            raise RuntimeError(
                "a training step was taken while the average is shown: leave consensus() before you train on."
            )

    def meet_before_gathering(self) -> bool:
        """
        Whether all ranks go into a collective of others together: False where one has ended its training, and will not
        come. Collective.
        """
        if self.parts.meets_others and self.workers.world.world_size > 1:
            with self.account.communicating():
                self.in_flight.start_what_others_wait_for()
            with self.account.paused():  # for others' logs nobody computes, and no round communicates
                return not self.in_flight.meet(Purpose.GATHER).somebody_ended
        return True

    def end(self, *, all_meet_here: bool = True, others_meet_at: Callable[[int], bool] = lambda step: False) -> None:
        """As `ending.end_together`."""
        self.consensus.end_last_round()
        end_together(
            self.parts, self.in_flight, self.consensus, all_meet_here=all_meet_here, others_meet_at=others_meet_at
        )

    def finish(self) -> None:
        """End training together: the average stays, and all would go on from it. Collective."""
        self.end()
        self.consensus.keep()
        log_end(self.parts, self.in_flight)
        self.in_flight.finish()

    # ---- state ----

    @property
    def saved_parts(self) -> list[Part]:
        """What a checkpoint holds of it, in the order in which it is taken up."""
        local = LocalTensors(self.tensors, self.view, self.clock)
        return [self.in_flight, self.clock, self.status, local, *self.cut_parts]

    @property
    def cut_parts(self) -> list[Part]:
        """Those of them that are of the process's part of the model, also where the model is whole."""
        return [self.parts.slow, self.parts.slow.reduction, self.base]

    def state_dict(self) -> dict[str, Any]:
        """As `slow_state_dict.state_dict`."""
        return state_dict(self.parts)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As `slow_state_dict.load_state_dict`; copied in place. Collective among the processes of a worker."""
        load_state_dict(self.parts, self.saved_parts, self.consensus, state)
