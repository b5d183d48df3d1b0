"""What a round did, for logs and for people."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .log import logger


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


class Norms:
    """
    Squared norms of a round, summed as its pieces pass: ||pseudo_grad||^2, ||velocity||^2, mean ||x_i - anchor||^2.
    """

    def __init__(self) -> None:
        self.drift_square = 0.0
        self._squares: list[tuple[torch.Tensor, torch.Tensor | None]] = []

    @classmethod
    def of(cls, squares: list[float]) -> Norms:
        """The inverse of `squares`."""
        norms = cls()
        norms.drift_square, pseudo_grad, velocity = squares
        norms._squares = [
            (torch.tensor(pseudo_grad, dtype=torch.float64), torch.tensor(velocity, dtype=torch.float64))
        ]
        return norms

    @property
    def squares(self) -> list[float]:
        """All three."""
        return [self.drift_square, self.pseudo_grad_square, self.velocity_square]

    def add(self, pseudo_grad: torch.Tensor, velocity: torch.Tensor | None) -> None:
        """Count one piece. Nothing waits for the device here."""
        self._squares.append((squared_norm(pseudo_grad), None if velocity is None else squared_norm(velocity)))

    @property
    def consensus_distance(self) -> float:
        """
        mean ||x_i - anchor||^2 - ||pseudo_grad||^2; a NaN stays one. Not below 0: by rounding; and with compression
        the first term is exact while pseudo_grad is the mean plus what the round before held back, less what this one
        does, and may be the longer of the two.
        """
        distance = self.drift_square - self.pseudo_grad_square
        return distance if math.isnan(distance) else max(0.0, distance)

    @property
    def pseudo_grad_square(self) -> float:
        """||pseudo_grad||^2."""
        return sum(float(square) for square, _ in self._squares)

    @property
    def velocity_square(self) -> float:
        """||velocity||^2; 0 where the outer optimizer keeps none of ours."""
        return sum(float(square) for _, square in self._squares if square is not None)


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


def squared_norm(flat: torch.Tensor) -> torch.Tensor:
    """
    The squared 2-norm, 0-dim, in fp64. Rows of 4096 are summed in the tensor's dtype: one fp32 sum over millions is
    percents low.
    """
    rows = flat.numel() // 4096
    tail = flat[rows * 4096 :]
    square = torch.dot(tail, tail).double()
    if rows:
        square = square + torch.linalg.vector_norm(flat[: rows * 4096].view(rows, 4096), dim=1).double().square().sum()
    return square
