"""The account: seconds and bytes since the last round, for its report."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .round_report import Norms, RoundReport


class Account:
    """
    What a round's report says of time and traffic. What happens `apart` is in no report; what happens while
    `communicating` is not computation.

    Args:
        bytes_sent (`Callable`): Payload that this worker has sent so far, in bytes.
    """

    def __init__(self, bytes_sent: Callable[[], int]) -> None:
        self._bytes_sent = bytes_sent
        self._paused = self._communicating = False
        self.close()

    def close(self) -> None:
        """A report was made, or training begins: count anew."""
        self._since = self._communicating_since = time.perf_counter()
        self._communicated = 0.0
        self._bytes = self._bytes_sent()

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Neither the bytes nor the seconds in here count: what is sent for a look or a save."""
        before = self._bytes_sent()
        try:
            with self.paused():
                yield
        finally:
            self._bytes += self._bytes_sent() - before

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The seconds in here do not count: an evaluation, in which a round's own messages may still be sent."""
        if self._paused:
            yield
            return
        self._paused, start = True, time.perf_counter()
        try:
            yield
        finally:
            self._paused = False
            self._since += time.perf_counter() - start

    @contextmanager
    def communicating(self) -> Iterator[None]:
        """Exchanges and rounds, waiting included."""
        if self._communicating:
            yield
            return
        self._communicating, self._communicating_since = True, time.perf_counter()
        try:
            yield
        finally:
            self._communicating = False
            self._communicated += time.perf_counter() - self._communicating_since

    @property
    def communicated_before(self) -> float:
        """Seconds of communication since the last round, without what is under way now."""
        return self._communicated

    def report(self, number: int, norms: Norms, *, consensus_is_known: bool) -> RoundReport:
        """Of a round that ends now, while `communicating`."""
        now = time.perf_counter()
        seconds = self._communicated + now - self._communicating_since
        return RoundReport(
            round=number,
            consensus_distance=norms.consensus_distance if consensus_is_known else None,
            pseudo_grad_norm=math.sqrt(norms.pseudo_grad_square),
            velocity_norm=math.sqrt(norms.velocity_square),
            bytes_sent=self._bytes_sent() - self._bytes,
            seconds=seconds,
            utilisation=(now - self._since - seconds) / max(now - self._since, 1e-9),
        )

    @property
    def computed_seconds(self) -> float:
        """Since the last round, outside of communication; asked while `communicating`."""
        return self._communicating_since - self._since - self._communicated
