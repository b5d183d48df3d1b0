"""What a round did, for logs and for people."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..log import logger


@dataclass(frozen=True)
class RoundReport:
    """
    What one round did, and the exchanges since the round before it.

    Args:
        round (`int`): Rounds done so far, this one included.
        consensus_distance (`float`, *optional*): Mean over workers of ||x_i - mean x||^2 before the average, of a
            gossip base's numerators with the messages in flight to them; None where a round takes no average
            (`exact_average=False`): it would cost a message. With `compression` it is off by what quantisation changes
            in ||anchor - average||^2.
        pseudo_grad_norm (`float`): ||anchor - average||.
        velocity_norm (`float`): ||velocity|| after the outer step; 0 where the outer optimizer keeps none of ours.
        bytes_sent (`int`): Payload this worker sent in the round, counted as a ring all-reduce (2 (m-1)/m of each
            message; with `compression` what its two stages send), and in the exchanges of a gossip base since the last
            round.
        seconds (`float`): Wall time of the same, waiting included.
        utilisation (`float`): Time outside of these over all time, since the last round; looks do not count.
    """

    round: int
    consensus_distance: float | None
    pseudo_grad_norm: float
    velocity_norm: float
    bytes_sent: int
    seconds: float
    utilisation: float

    def to_logs(self) -> dict[str, float]:
        """
        The report under the keys `slowmo/...`, for `accelerator.log` and trackers; what was not measured is left out.
        """
        return {f"slowmo/{name}": value for name, value in vars(self).items() if value is not None}


def log_costs(report: RoundReport, sync_every: int, compute_seconds: float, exchange_seconds: float | None) -> None:
    """
    One line: what a step and a round cost here; where nothing is sent between rounds, also which `sync_every` would
    give 90 % and 95 % utilisation.

    Args:
        compute_seconds (`float`): Since the last round, outside of communication.
        exchange_seconds (`float`, *optional*): In a gossip base's exchanges since the last round; None for another
            base.
    """
    per_step = max(compute_seconds / sync_every, 1e-9)
    round_seconds = report.seconds - (exchange_seconds or 0.0)
    words = [f"costs: {1e3 * per_step:.2f} ms computation per step, {1e3 * round_seconds:.1f} ms per round"]
    if exchange_seconds is not None:
        words.append(f"{1e3 * exchange_seconds / sync_every:.1f} ms waiting for the exchange per step")
    words.append(f"utilisation {100 * compute_seconds / (compute_seconds + report.seconds):.1f} %")
    advice = ""
    if exchange_seconds is None:
        least = [max(1, math.ceil(u / (1 - u) * round_seconds / per_step - 1e-9)) for u in (0.9, 0.95)]
        advice = f" sync_every >= {least[0]} would give 90 %, >= {least[1]} would give 95 %."
    logger.info("%s, %s bytes sent per round and worker.%s", ", ".join(words), f"{report.bytes_sent:,}", advice)
