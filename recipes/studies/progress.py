"""What of a study is done, what runs, and how long the rest may take: lines, which logs keep."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import fmean


@dataclass
class Progress:
    """
    Counts the runs of one call.

    Args:
        runs (`int`): To do.
        jobs (`int`, *optional*, defaults to `1`): At a time.
    """

    runs: int
    jobs: int = 1
    seconds: list[float] = field(default_factory=list)  # of each finished run

    @property
    def done(self) -> int:
        """Finished runs."""
        return len(self.seconds)

    def count(self, seconds: float) -> None:
        """One more is finished."""
        self.seconds.append(seconds)

    def seconds_left(self) -> float | None:
        """The mean of the finished runs times the runs that each job has left; None before one is finished."""
        rounds = -(-(self.runs - self.done) // self.jobs)
        return rounds * fmean(self.seconds) if self.seconds else None

    def line(self, waiting: list[str]) -> str:
        """Done of all, the runs that are under way, the first `jobs` of those that wait, and the time that is left."""
        left = self.seconds_left()
        time = "time left: known after the first" if left is None else f"about {_readable(left)} left"
        now = f", now {', '.join(waiting[: self.jobs])}" if waiting else ""
        return f"{self.done} of {self.runs} runs done, {time if waiting else 'none left'}{now}"


def _readable(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
