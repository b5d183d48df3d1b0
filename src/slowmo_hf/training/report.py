"""What a round did, for logs and for people."""

from __future__ import annotations

from dataclasses import dataclass


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
        seconds (`float`): Wall time of the same on this rank, waiting included.
        utilisation (`float`, *optional*): Of the round before this one, whose seconds ride in this round's status
            exchange: on each rank the time outside of rounds and exchanges over all time since the round before that
            (views do not count), and of these the mean over ranks, the same on all. None where a rank has no round
            before: at the first one of a process.
    """

    round: int
    consensus_distance: float | None
    pseudo_grad_norm: float
    velocity_norm: float
    bytes_sent: int
    seconds: float
    utilisation: float | None

    def to_logs(self) -> dict[str, float]:
        """
        The report under the keys `slowmo/...`, for `accelerator.log` and trackers; what was not measured is left out.
        """
        return {f"slowmo/{name}": value for name, value in vars(self).items() if value is not None}
