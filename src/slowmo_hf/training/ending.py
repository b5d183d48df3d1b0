"""The end of training: all ranks end together, on the average."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..config import GOSSIP_BASES
from .consensus import Consensus
from .in_flight import InFlight
from .parts import Parts
from .status import Purpose


@torch.no_grad()
def end_together(
    parts: Parts,
    in_flight: InFlight,
    consensus: Consensus,
    *,
    all_meet_here: bool,
    others_meet_at: Callable[[int], bool],
) -> None:
    """
    End training with the average shown. Collective: a rank that ends first takes part in the others' rounds until all
    have ended, and then has the furthest one's clock. With `base="all_reduce"` ranks go in step anyway.

    Args:
        all_meet_here (`bool`): False where others may train on from this step: with a
            gossip base this rank then takes part in their exchanges until all next meet.
        others_meet_at (`Callable`): Whether they meet at a later step that is no round. A meeting that it
            does not know of is missed, and told after `timeout_seconds`.
    """
    if not parts.meets_others:
        consensus.show()
        return
    clock, passes_on = parts.clock, parts.config.base in GOSSIP_BASES and not all_meet_here
    with parts.account.communicating():
        if passes_on:
            consensus.restore(give_back_random_state=False)
            _pass_on(parts, others_meet_at)
        while (agreement := in_flight.meet(Purpose.END)).purpose is not Purpose.END:
            if agreement.purpose is Purpose.ROUND:
                consensus.restore(give_back_random_state=False)
                clock.attempted_steps = agreement.attempted_steps
                in_flight.launch_agreed(agreement)
        if not agreement.same_step:  # an average that is shown is an old one
            consensus.restore(give_back_random_state=False)
        clock.attempted_steps, clock.idle_steps = agreement.trained_steps, 0
        # Nobody has trained since a round: its anchor is the average, and what was mixed since is not.
        if passes_on and clock.workers_agree:
            parts.back_to_anchors()
        if not parts.view.is_shown:
            in_flight.apply_due()  # the others may have gone on to where it is
    if not parts.view.is_shown:
        consensus.show_buffers_of([] if consensus.nothing_to_average else agreement.changed_buffers)


def _pass_on(parts: Parts, others_meet_at: Callable[[int], bool]) -> None:
    """
    Out of data: exchange without training, until the others hear of it where all meet. The average does not change.
    """
    meet = False
    while not meet:
        parts.clock.idle()
        if parts.clock.exchange_is_due:
            parts.exchange()
        meet = parts.clock.round_is_due or others_meet_at(parts.clock.attempted_steps)
