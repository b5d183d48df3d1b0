"""The end of training: all ranks end together, on the average; and three lines say what it was."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .account import mean_utilisation
from .consensus import Consensus
from .in_flight import InFlight
from .parts import Parts
from .plan import Plan, in_bytes
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
        others_meet_at (`Callable`): Whether they meet at a later step that is no round. A status exchange that it
            does not know of is missed, and told after `timeout_seconds`.
    """
    if not parts.meets_others:
        consensus.show()
        return
    clock, passes_on = parts.clock, parts.config.gossips and not all_meet_here
    with parts.account.communicating():
        if passes_on:
            consensus.restore(give_back_random_state=False)
            _pass_on(parts, others_meet_at)
        while (agreement := in_flight.meet(Purpose.END)).purpose is not Purpose.END:
            if agreement.purpose is Purpose.ROUND:
                consensus.restore(give_back_random_state=False)
                clock.attempted_steps = agreement.attempted_steps
                in_flight.launch_agreed(agreement)
        if in_flight.last is not None:
            parts.costs.hear(in_flight.last.round, agreement.spent)
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


def log_end(parts: Parts, in_flight: InFlight, model: str = "") -> None:
    """
    Three lines, where training has ended: of the steps since this process began, or took up a checkpoint. Collective
    inside the worker.

    Args:
        in_flight (`InFlight`): Rounds that the average contains, and no step applies any more.
        model (`str`, *optional*): What the model now is; what local training leaves where it is empty.
    """
    clock, account, workers = parts.clock, parts.account, parts.workers
    steps = clock.attempted_steps - clock.begun_at
    since = f" since step {clock.begun_at}" if clock.begun_at else ""
    ddp = Plan.of(parts).ddp_bytes_per_step
    [behind] = parts.summed([account.unreported_bytes])
    bytes_sent = in_bytes(account.bytes_sent + behind)
    log = workers.logger
    rounds = account.rounds + len(in_flight.rounds)
    log.info("training ended at step %d: %d steps and %d rounds%s", clock.attempted_steps, steps, rounds, since)
    if parts.config.base == "all_reduce":
        sent = f"{bytes_sent} sent per worker beside DDP's gradients"
    else:
        sent = f"{bytes_sent} sent per worker in rounds and exchanges{since}"
        sent += f" (DDP: {in_bytes(steps * ddp)})"
    totals = parts.costs.totals
    computed = sum(one.computed for one in totals) / len(totals)
    communicated = sum(one.communicated for one in totals) / len(totals)
    mean = mean_utilisation(totals)
    if mean is not None:
        waited = f"; {communicated:.3g} s communicated or waited and {computed:.3g} s computed, the mean over ranks"
        sent += f"{waited}: utilisation {100 * mean:.1f} %"
    log.info("%s", sent)
    log.info("the model is %s", model or _model(parts))


def _model(parts: Parts) -> str:
    step, workers = parts.clock.attempted_steps, parts.workers
    if parts.config.base == "all_reduce":
        return f"that of all {workers.count} workers at step {step}, whose gradients were averaged"
    if workers.count == 1:
        return f"the one worker's own at step {step}: there was nothing to average"
    return f"the average of {workers.count} workers at step {step}"
