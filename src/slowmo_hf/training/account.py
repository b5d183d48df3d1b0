"""The account: seconds and bytes since the last round, for its report."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ..algorithm.norms import Norms
from .report import RoundReport


@dataclass(frozen=True)
class Spent:
    """
    A rank's seconds between two reports.

    Args:
        computed (`float`): Outside of communication.
        communicated (`float`): In exchanges and rounds, waiting included.
        exchanged (`float`): Of these, before the round's own.
    """

    computed: float = 0.0
    communicated: float = 0.0
    exchanged: float = 0.0

    @property
    def utilisation(self) -> float:
        """Computed seconds over all."""
        return self.computed / max(self.computed + self.communicated, 1e-9)


def mean_utilisation(everywhere: list[Spent]) -> float | None:
    """Mean over ranks; None where a rank has measured nothing yet."""
    if not everywhere or any(one == Spent() for one in everywhere):
        return None
    return sum(one.utilisation for one in everywhere) / len(everywhere)


class Account:
    """
    What a round's report says of time and traffic. Every second is one of three: of computation, of communication
    (`communicating`), or of neither (`paused`, which wins). What is sent `apart` is in no report.

    Args:
        bytes_sent (`Callable`): Payload that this process has sent so far, in bytes.
        collectives (`Callable`, *optional*): How many the job's default group has begun so far; ours have groups of
            their own.

    Attributes:
        spent (`Spent`): Of the last report; zeros before the first one.
        rounds (`int`), bytes_sent (`int`): Of all reports since this process began, or took up a checkpoint.
    """

    def __init__(self, bytes_sent: Callable[[], int], collectives: Callable[[], int] = lambda: 0) -> None:
        self._bytes_sent, self._collectives = bytes_sent, collectives
        self._collectives_of_training, self._begun = 0, collectives()
        self.begin()
        self._paused = self._communicating = False
        self.close()

    def begin(self) -> None:
        """Nothing was reported yet."""
        self.spent, self.rounds, self.bytes_sent = Spent(), 0, 0

    def close(self) -> None:
        """A report was made, or training begins: count anew."""
        self._last = time.perf_counter()
        self.computed_seconds = self._communicated = 0.0
        self.communicated_before = 0.0  # seconds since the last round, without the communication under way now
        self._bytes = self._bytes_sent()

    def skip(self) -> None:
        """The first step begins: seconds until now, of reading a checkpoint and making loaders, were of none."""
        self._mark()
        self.computed_seconds = self._communicated = self.communicated_before = 0.0

    def _mark(self) -> None:
        """The seconds until now were of the kind in force, and so were the program's collectives."""
        now, begun = time.perf_counter(), self._collectives()
        if self._communicating and not self._paused:
            self._communicated += now - self._last
        elif not self._paused:
            self.computed_seconds += now - self._last
            self._collectives_of_training += begun - self._begun
        self._last, self._begun = now, begun

    def collectives_of_training(self) -> int:
        """Those that the program has begun so far in seconds of computation."""
        self._mark()
        return self._collectives_of_training

    @property
    def unreported_bytes(self) -> int:
        """What this process has sent since the last report: exchanges behind the last round, a round in flight."""
        return self._bytes_sent() - self._bytes

    @contextmanager
    def apart(self) -> Iterator[None]:
        """The bytes that are sent in here do not count: for a look, a save, the status before one."""
        before = self._bytes_sent()
        try:
            yield
        finally:
            self._bytes += self._bytes_sent() - before

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The seconds in here do not count: an evaluation. A pause in a pause changes nothing."""
        before = self._paused
        self._mark()
        self._paused = True
        try:
            yield
        finally:
            self._mark()
            self._paused = before

    @contextmanager
    def communicating(self) -> Iterator[None]:
        """Exchanges and rounds, waiting included; within one, another changes nothing."""
        before = self._communicating
        self._mark()
        if not before:
            self.communicated_before = self._communicated
        self._communicating = True
        try:
            yield
        finally:
            self._mark()
            self._communicating = before

    def report(
        self,
        number: int,
        norms: Norms,
        summed: Callable[[list[float]], list[float]],
        *,
        consensus_is_known: bool,
        has_velocity: bool,
        utilisation: float | None = None,
    ) -> RoundReport:
        """
        Of a round that ends now.

        Args:
            summed (`Callable`): Sums over the worker's processes, each of which counts what it has sent.
            utilisation (`float`, *optional*): As of `RoundReport`.
        """
        [bytes_sent] = summed([self.unreported_bytes])
        self._mark()
        self.spent = Spent(self.computed_seconds, self._communicated, self.communicated_before)
        self.rounds, self.bytes_sent = self.rounds + 1, self.bytes_sent + round(bytes_sent)
        return RoundReport(
            round=number,
            consensus_distance=norms.consensus_distance if consensus_is_known else None,
            pseudo_grad_norm=math.sqrt(norms.pseudo_grad_square),
            velocity_norm=math.sqrt(norms.velocity_square) if has_velocity else None,
            bytes_sent=round(bytes_sent),
            seconds=self._communicated,
            utilisation=utilisation,
        )
