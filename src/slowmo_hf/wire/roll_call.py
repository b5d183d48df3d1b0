"""
Who is where: before ranks meet, each leaves its step in the job's key-value store; who goes leaves a word, and the
others say it.
"""

from __future__ import annotations

import atexit
import itertools
import json
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import lru_cache
from types import TracebackType
from typing import Any

from .failures import SLICE_SECONDS, first_line, is_collective_failure, is_timeout
from .job import host_name, job_store, leave_job, processes_in_job, rank_in_job
from .job_store import JobStore, StoreError

_ANY = "any"
_ROLL_SECONDS = 3.0  # for the survivors of a failure to say that they live, and for the store to answer then
_SECOND_SECONDS = 0.5  # longer for who fails behind another, whose words it hears
_runs = itertools.count()  # runs of this process; every rank of a job starts as many
_going: list[
    RollCall
] = []  # the newest last; held until a last word is left: at a process's end its objects may be gone already


class RollCall:
    """
    The ranks of one training run, on gloo and NCCL alike: in a world of one it does nothing.

    A meeting is a place where every rank waits for all others. Its keys are `run/meeting/rank`, their values host,
    step and place; two meetings' are kept. `run/left/rank` holds a last word, `run/failed/rank` that a rank lives and
    has seen a failure, `run/missed/rank` the words of one that has waited for this rank in vain.

    Args:
        timeout_seconds (`float`): A rank that comes later than this is missed.
    """

    def __init__(self, timeout_seconds: float) -> None:
        self.timeout_seconds = timeout_seconds
        self.rank, self.has_left = rank_in_job(), False
        self.world_size = processes_in_job()
        store = job_store() if self.world_size > 1 else None
        self.store = JobStore(store, timeout_seconds) if store is not None else None
        self.step = 0
        self.place = "the start"
        self._run = f"slowmo/{next(_runs)}" if self.store is not None else ""
        self.coupled: Sequence[int] = ()  # ranks that now meet in collectives which are not ours
        self.has_explained = False
        self._meeting = 0
        self._host = host_name()
        if self.store is not None:
            _listen()
            _going.append(self)

    def come(self, step: int, place: str) -> None:
        """
        Leave word that this rank has come to the next meeting, and do not wait.

        Args:
            step (`int`): This rank's optimizer step.
            place (`str`): What it comes for, such as "the round".

        Raises:
            RuntimeError: The store does not answer.
        """
        self.at(step, place)
        if self.store is None:
            return
        self._meeting += 1
        try:
            self._say(self.store, self._key(self._meeting, self.rank))
            if self._meeting > 2:
                self.store.delete_key(self._key(self._meeting - 2, self.rank))  # all have passed the meeting after it
        except StoreError as error:
            raise self._lost(error) from error

    def enter(self, step: int, place: str) -> None:
        """
        The same, and wait until every rank has come.

        Raises:
            RuntimeError: A rank has left, has failed, or does not come in time; its first line names rank, host, step
                and cause.
        """
        self.come(step, place)
        if self.store is None:
            return
        everybody = range(self.world_size)
        until = time.monotonic() + self.timeout_seconds
        try:
            while not self._all_come(self.store, min(SLICE_SECONDS, max(0.01, until - time.monotonic()))):
                if time.monotonic() >= until or self.somebody_is_gone():
                    raise self.explain(None, everybody)
        except StoreError as error:
            raise self._lost(error) from error
        if self._has("failed", _ANY):
            raise self.explain(None, everybody)

    def at(self, step: int, place: str) -> None:
        """Note where this rank is, for its last word and for what it says of others; nothing is sent."""
        self.step, self.place = step, place

    def _all_come(self, store: JobStore, seconds: float) -> bool:
        until, pause = time.monotonic() + seconds, 0.001
        while not store.check(self._keys()):  # its own wait would print two warnings whenever it is in vain
            if time.monotonic() >= until:
                return False
            time.sleep(pause)
            pause = min(0.01, 1.5 * pause)
        return True

    def somebody_is_gone(self) -> bool:
        """
        Whether a rank has given up, or has left and will not come to this meeting; or the store is silent, and nobody
        can tell.
        """
        if self.store is None:
            return False
        if self._has("failed", _ANY) or self.store.silent:
            return True
        try:
            if self.store.check(self._keys()):
                return False
        except StoreError:
            return True
        return any(self._has("left", rank) and not self._has(self._meeting, rank) for rank in range(self.world_size))

    def leave(self, cause: str) -> None:
        """Leave a last word for ranks that will miss this one; never raises."""
        self.has_left = True
        if self in _going:
            _going.remove(self)
            self._hurry()
            self._try_to_say(self._key("left", self.rank), cause)
            if self.store is not None:
                self.store.close()

    def explain(self, error: BaseException | None, ranks: Iterable[int]) -> RuntimeError:
        """
        A failure in the words of the rank that caused it. Takes `_ROLL_SECONDS` and a little: the others' words may be
        on their way.

        Args:
            error (`BaseException`, *optional*): What a collective raised here; None where somebody was missed.
            ranks (`Iterable[int]`): Who took part.
        """
        if self.store is None:
            return RuntimeError(str(error))
        self._hurry()
        self.has_explained = True
        others = [rank for rank in ranks if rank != self.rank]
        too_late = error is None or is_timeout(error)
        until = time.monotonic() + _ROLL_SECONDS + _SECOND_SECONDS * self._has("failed", _ANY)
        for whose in (self.rank, _ANY):
            self._try_to_say(self._key("failed", whose))
        while time.monotonic() < until and not all(
            self._has("failed", rank) or self._has("left", rank) for rank in others
        ):
            time.sleep(0.05)
        if self.store.silent:
            return self._lost(error or StoreError("no answer"))
        causes = [self._words(rank, too_late) for rank in others if not self._has("failed", rank)]
        here = f"It was missed at step {self.step}, {self.place}, by rank {self.rank} on {self._host}"
        if not causes:  # all who took part live: one of them, or another rank, has missed somebody elsewhere
            causes = self._told_by_another()
        self._try_to_say(self._key("failed", self.rank), "; ".join(causes))
        if not causes:
            told = [(rank, said) for rank in others if (said := self._get("failed", rank))]
            causes = [
                f"rank {rank} on {said['host']} gave up at step {said['step']}, {said['place']}" for rank, said in told
            ]
            here = f"So did rank {self.rank} on {self._host} at step {self.step}, {self.place}"
        detail = f" ({first_line(error)})" if error is not None else ""
        return RuntimeError(
            f"{'; '.join(causes)}. {here}{detail}. Look at that rank's own log; the last whole checkpoint is "
            "untouched."
        )

    def _told_by_another(self) -> list[str]:
        """Whom a rank that has failed before has found missing; nothing where none says so in time."""
        until = time.monotonic() + _ROLL_SECONDS + 1
        while time.monotonic() < until:
            for rank in range(self.world_size):
                said = self._get("failed", rank) if rank != self.rank else None
                if said and said["cause"]:
                    return [said["cause"]]
            time.sleep(0.05)
        return []

    def _words(self, rank: int, too_late: bool) -> str:
        """What is known of a rank that is not here."""
        left = self._get("left", rank)
        if left:
            return f"rank {rank} on {left['host']} left at step {left['step']}: {left['cause']}"
        seen = next((said for n in (1, 0, -1) if (said := self._get(self._meeting + n, rank))), None)
        if seen is None:
            return (
                f"rank {rank} (its host is unknown) has not come to {self.place} within "
                f"timeout_seconds={self.timeout_seconds:g}"
            )
        last = f"last seen at step {seen['step']}, {seen['place']}"
        if too_late:
            words = (
                f"rank {rank} on {seen['host']} did not come to step {self.step}, {self.place}, within "
                f"timeout_seconds={self.timeout_seconds:g}: it is slower than that, or left without a word; {last}"
            )
            self._try_to_say(self._key("missed", rank), words)
            return words
        missed = self._get("missed", rank)
        if missed:  # who has seen but its connections closed cannot tell one that hangs from one that is gone
            return str(missed["cause"])
        return f"rank {rank} on {seen['host']} left without a word after step {seen['step']}; {last}"

    # ---- the store ----

    def _hurry(self) -> None:
        """From now on the store must answer soon: there is but a last word to say, or to hear."""
        if self.store is not None:
            self.store.limit_seconds = min(self.store.limit_seconds, _ROLL_SECONDS)

    def _key(self, what: str | int, rank: int | str) -> str:
        return f"{self._run}/{what}/{rank}"

    def _keys(self) -> list[str]:
        """Of this meeting, all ranks'."""
        return [self._key(self._meeting, rank) for rank in range(self.world_size)]

    def _say(self, store: JobStore, key: str, cause: str = "") -> None:
        store.set(key, json.dumps({"host": self._host, "step": self.step, "place": self.place, "cause": cause}))

    def _try_to_say(self, key: str, cause: str = "") -> None:
        if self.store is not None:
            with suppress(StoreError):  # the store may have gone with its rank
                self._say(self.store, key, cause)

    def _has(self, what: str | int, rank: int | str) -> bool:
        try:
            return self.store is not None and self.store.check([self._key(what, rank)])
        except StoreError:
            return False

    def _get(self, what: str | int, rank: int) -> dict[str, Any] | None:
        try:
            return json.loads(self.store.get(self._key(what, rank))) if self.store and self._has(what, rank) else None
        except StoreError:
            return None

    def _lost(self, error: BaseException) -> RuntimeError:
        return RuntimeError(
            "rank 0, or the launcher that keeps the job's key-value store, hangs or left without a word: the store "
            f"does not answer ({first_line(error)}). It was missed at step {self.step}, {self.place}, by rank "
            f"{self.rank} on {self._host}."
        )


@lru_cache
def _listen() -> None:
    """
    Once per process: an exception that nobody catches, and the process's end, are told to the others. Where the
    exception is that of a collective that is not ours, DDP's among a worker's processes, it is told here too in the
    words of the rank that caused it.
    """
    earlier = sys.excepthook

    def on_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        newest = _going[-1] if _going else None
        if newest and len(newest.coupled) > 1 and is_collective_failure(error) and not newest.has_explained:
            named = newest.explain(error, newest.coupled)
            named.__cause__, kind, error = error, type(named), named
        for roll_call in list(_going):
            roll_call.leave(f"{kind.__name__}: {first_line(error)}")
        earlier(kind, error, trace)

    sys.excepthook = on_uncaught
    atexit.register(_at_exit)


def _at_exit() -> None:
    for roll_call in list(_going):
        roll_call.leave("its process ended")
    leave_job()
