"""What steps and rounds cost here, from the seconds that all ranks tell each other, and what would cost less."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import replace
from statistics import median

from ..config import SlowMoConfig
from ..wire.workers import Workers
from .account import Spent, mean_utilisation

_WINDOW = 3  # rounds whose medians a line rests on
_PAUSE = 10  # rounds between two lines, at least; doubled with each, for times that jitter
_CHANGE = 0.2  # of a cost, which is worth a new line,
_MATTERS = 0.02  # where it is as large a part of the time as this
_ENOUGH = 0.95  # utilisation above which nothing is advised
_LONGEST = 1000  # optimizer steps: a longer period is not advised
# Where quantisation pays: on one core it handles some 500 MB/s, and three quarters of the bytes are saved; a link that
# carries more than this has nothing to gain. A message below `_WORTHWHILE` waits for latency, not for bytes.
_SLOW_LINK = 250e6  # bytes per second
_WORTHWHILE = 2**20  # bytes


class Costs:
    """
    Every rank's seconds, round by round: medians of the last `_WINDOW` rounds, without the first one, which warms up.
    The same on all ranks, but for what a rank sends.

    Args:
        config (`SlowMoConfig`): The settings.
        workers (`Workers`): Of the ranks.

    Attributes:
        hosts (`list[str]`): By rank.
        totals (`list[Spent]`): Of all rounds that were told, by rank.
    """

    def __init__(self, config: SlowMoConfig, workers: Workers) -> None:
        self.config, self.workers = config, workers
        self.hosts = [""] * workers.world.world_size
        self.begin()

    def begin(self) -> None:
        """Nothing was told yet, and what follows warms up."""
        self.totals = [Spent() for _ in self.hosts]
        self._newest = self._told = -1
        self._rounds = 0
        self._window: deque[list[Spent]] = deque(maxlen=_WINDOW)
        self._said: tuple[float, float] | None = None
        self._pause = _PAUSE

    def hear(self, number: int, everywhere: list[Spent]) -> bool:
        """All ranks' seconds of a round; False where they are not news, or nobody has measured."""
        if number <= self._newest or mean_utilisation(everywhere) is None:
            return False
        self._newest = number
        self._rounds += 1
        self.totals = [
            Spent(one.computed + new.computed, one.communicated + new.communicated, one.exchanged + new.exchanged)
            for one, new in zip(self.totals, everywhere, strict=True)
        ]
        if self._rounds > 1:
            self._window.append(everywhere)
        return True

    # ---- medians ----

    @property
    def computed(self) -> list[float]:
        """Seconds of a step's computation, by rank."""
        by_rank = zip(*self._window, strict=True)
        return [median(one.computed for one in rank) / self.config.sync_every for rank in by_rank]

    @property
    def exchanged(self) -> float:
        """Seconds of an exchange, the mean over ranks; 0 where there is none."""
        if not self.config.gossips:
            return 0.0
        means = [sum(one.exchanged for one in everywhere) / len(everywhere) for everywhere in self._window]
        return float(median(means)) / self.config.sync_every

    @property
    def round(self) -> float:
        """Seconds of a round itself: of the rank that waits least, for the others wait for it."""
        return median(
            min(one.communicated - (one.exchanged if self.config.gossips else 0.0) for one in everywhere)
            for everywhere in self._window
        )

    @property
    def utilisation(self) -> float:
        """Mean over ranks."""
        return median(mean_utilisation(everywhere) or 0.0 for everywhere in self._window)

    # ---- what is said ----

    def news(self, bytes_sent: int, *, are_coupled: bool = False) -> str:
        """
        The line, if it is time for one: at the first full window, and when a cost has changed since the last line.

        Args:
            bytes_sent (`int`): A worker's, of a round.
            are_coupled (`bool`): Whether collectives of the program's own wait for all ranks between rounds: what
                they take is in these figures, and no setting of ours helps.
        """
        if len(self._window) < _WINDOW or (self._said and self._newest < self._told + self._pause):
            return ""
        costs = self.config.sync_every * max(self.computed), self.round
        if self._said and not _has_changed(self._said, costs):
            return ""
        self._pause *= 2 if self._said else 1
        self._said, self._told = costs, self._newest
        words = " The program's own collectives between rounds are in these figures."
        return f"{self._words(bytes_sent)}.{words if are_coupled else self._advice(bytes_sent)}"

    def _words(self, bytes_sent: int) -> str:
        computed = self.computed
        mean, slowest = sum(computed) / len(computed), max(range(len(computed)), key=computed.__getitem__)
        words = [f"costs: {1e3 * mean:.2f} ms computation per step, {1e3 * self.round:.1f} ms per round"]
        if self.config.gossips:
            words.append(f"{1e3 * self.exchanged:.1f} ms waiting for the exchange per step")
        words += [
            f"utilisation {100 * self.utilisation:.1f} %",
            f"{bytes_sent:,} bytes sent per round and worker",
            f"slowest is worker {slowest // self.workers.size} (rank {slowest} on {self.hosts[slowest]}), "
            f"{computed[slowest] / max(mean, 1e-9):.2f} times the mean computation",
        ]
        return ", ".join(words)

    def _advice(self, bytes_sent: int) -> str:
        """Of settings that go together with the others; none for gossip, which waits at every step."""
        config, computed, spent = self.config, self.computed, self.round
        if config.gossips:
            return ""
        mean, most = sum(computed) / len(computed), max(computed)
        words = f" {enough_steps(mean, most, spent)}."
        step = max(most, 1e-9)
        if config.sync_every * step >= _ENOUGH * (config.sync_every * step + spent):
            return words
        # Each stage takes whole steps: the second one is launched at the step that finds the first one's sums.
        stages = 2 if config.compression != "none" or config.shard_slow_state else 1
        overlap = stages * math.ceil((config.overlap_steps + spent / step) / stages)
        if goes(config, overlap_steps=overlap):
            words += f" overlap_steps={overlap} would hide the round."
        is_slow = bytes_sent > _WORTHWHILE and bytes_sent < _SLOW_LINK * spent
        if is_slow and config.compression == "none" and goes(config, compression="int8"):
            words += ' compression="int8" would send a quarter of the bytes.'
        return words


def enough_steps(mean: float, most: float, spent: float) -> str:
    """
    Which `sync_every` would give 90 % and 95 % utilisation: in t steps a rank computes t `mean` seconds of the
    t `most` + `spent` that pass, for all wait for the slowest one. A t above `_LONGEST` is no advice.
    """
    found = []
    for share in (0.9, 0.95):
        left = mean - share * most
        if left <= 0:
            found.append(f"no sync_every gives {100 * share:.0f} %: the others wait for the slowest")
            break
        enough = max(1, math.ceil(share * spent / left - 1e-9))
        if enough > _LONGEST:
            found.append(f"no sync_every up to {_LONGEST:,} gives {100 * share:.0f} %")
            break
        found.append(f"sync_every >= {enough} would give {100 * share:.0f} %")
    return ", ".join(found)


def goes(config: SlowMoConfig, **changes: object) -> bool:
    """Whether the rules allow these settings beside the others."""
    try:
        replace(config, **changes)  # type: ignore[arg-type]
    except ValueError:
        return False
    return True


def _has_changed(before: tuple[float, float], now: tuple[float, float]) -> bool:
    least = _MATTERS * sum(now)
    return any(abs(b - a) >= max(_CHANGE * a, least) for a, b in zip(before, now, strict=True))
