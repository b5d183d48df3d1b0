"""Squared norms of a round."""

from __future__ import annotations

import math

import torch


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
        return _sum_of([square for square, _ in self._squares])

    @property
    def velocity_square(self) -> float:
        """||velocity||^2; 0 where the outer optimizer keeps none of ours."""
        return _sum_of([square for _, square in self._squares if square is not None])


def _sum_of(squares: list[torch.Tensor]) -> float:
    """In their order. The device is waited for once, not at each."""
    if not squares:
        return 0.0
    return float(sum(torch.stack([square.to(squares[0].device) for square in squares]).tolist()))


def squared_norm(flat: torch.Tensor) -> torch.Tensor:
    """
    The squared 2-norm, 0-dim, in fp64. Rows of 4096 are summed in the tensor's dtype: one fp32 sum over millions is
    percents low.
    """
    rows, rest = divmod(flat.numel(), 4096)
    if not rows:
        short: torch.Tensor = torch.dot(flat, flat)
        return short.double()
    square: torch.Tensor = (
        torch.linalg.vector_norm(flat[: rows * 4096].view(rows, 4096), dim=1).double().square().sum()
    )
    if rest:
        tail = flat[rows * 4096 :]
        square = square + torch.dot(tail, tail).double()
    return square
