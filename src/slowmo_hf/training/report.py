"""What a round did, for logs and for people, and whether workers have moved alike in some of them."""

from __future__ import annotations

from dataclasses import dataclass

from ..algorithm.norms import Norms

_ALIKE = 1e-6  # of workers' displacements, squared: more than fp32 leaves between equal ones
_TOLD = 3  # rounds on end


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
        velocity_norm (`float`, *optional*): ||velocity|| after the outer step; None without slow momentum.
        bytes_sent (`int`): Payload this worker sent in the round, counted as a ring all-reduce (2 (m-1)/m of each
            message; with `compression` what its two stages send), and in the exchanges of a gossip base since the last
            round.
        seconds (`float`): Wall time of the same on this rank, waiting included.
        utilisation (`float`, *optional*): Of the round before this one, whose seconds ride in this round's status
            exchange: on each rank the time outside of rounds and exchanges over all time since the round before that
            (views do not count), and of these the mean over ranks, the same on all. None where a rank has no round
            before: at the first one of a process; and with `base="all_reduce"`, whose ranks wait for each other inside
            DDP.
    """

    round: int
    consensus_distance: float | None
    pseudo_grad_norm: float
    velocity_norm: float | None
    bytes_sent: int
    seconds: float
    utilisation: float | None

    def to_logs(self) -> dict[str, float]:
        """
        The report under the keys `slowmo/...`, for `accelerator.log` and trackers; what was not measured is left out.
        """
        return {f"slowmo/{name}": value for name, value in vars(self).items() if value is not None}


class MovedAlike:
    """
    Counts rounds on end in which no worker has moved otherwise than their mean, though every one has trained.

    Args:
        is_measured (`bool`): Whether rounds know how far workers were apart, to the last digits.
    """

    def __init__(self, *, is_measured: bool) -> None:
        self._is_measured, self._rounds = is_measured, 0

    def hear(self, norms: Norms, local_steps: list[int]) -> str:
        """Words, where this round makes it worth a warning; "" else."""
        square = norms.drift_square
        is_alike = self._is_measured and bool(local_steps) and all(local_steps)
        is_alike = is_alike and square > 0 and norms.consensus_distance <= _ALIKE * square
        self._rounds = self._rounds + 1 if is_alike else 0
        if self._rounds != _TOLD:
            return ""
        return (
            f"all workers have moved alike in {_TOLD} rounds: they seem to train on the same data. Give each rank its "
            "own: the loader that accelerator.prepare returns, or a DistributedSampler."
        )
