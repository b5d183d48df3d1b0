"""
Who is where: before ranks meet, each leaves its step in the job's key-value store; who goes leaves a word, and the
others say it.
"""

from __future__ import annotations

import atexit
import itertools
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from functools import lru_cache
from types import TracebackType
from typing import Any

from .failures import SLICE_SECONDS, first_line, is_collective_failure, is_timeout
from .job import in_each_child, job_store, leave_job, processes_in_job, rank_in_job
from .job_store import JobStore, StoreError
from .register import ANY, Register

OF_THE_JOB = " (in a collective of torch's own group: ddp_timeout)"
_ROLL_SECONDS = 3.0  # for the survivors of a failure to say that they live, and for the store to answer then
_SECOND_SECONDS = 0.5  # longer for who fails behind another, whose words it hears
_LAST_SECONDS = 1.0  # for a process that lets everything go because it ends to say that
_NOTE_SECONDS = 5.0  # between two notes of where a rank is
_COUNT = "count"
_GIVEN_UP = 8  # that an error names
_runs = itertools.count()  # runs of this process; every rank of a job starts as many
_begun: list[int] = []  # of them
_spent = threading.Event()  # a run has failed in this process's groups: they are not used again
_going: list[
    RollCall
] = []  # the newest last; held until a last word is left: at a process's end its objects may be gone already


class RollCall:
    """
    The ranks of one training run, on gloo and NCCL alike: in a world of one it does nothing.

    A meeting is a place where every rank waits for all others. Its keys are `run/meeting/rank`, their values host,
    step and place; `run/meeting/count` counts them, and who counts last writes `run/meeting/any`, for which the others
    wait. Two meetings' are kept. `run/left/rank` holds a last word, `run/failed/rank` that a rank lives and has seen a
    failure; `run/left/any` and `run/failed/any` say that there is one. `run/missed/rank` has the words of one that has
    waited for this rank in vain, `run/found/any` the cause of a failure in the words of whoever found one first, and
    `run/told/any` those of an error that is everybody's. A thread leaves
    `run/note/rank` every `_NOTE_SECONDS`: the step that this rank has reached. It sends to the store alone and holds
    nobody up, also where the store is slow or gone.

    Args:
        timeout_seconds (`float`): A rank that comes later than this is missed.
    """

    def __init__(self, timeout_seconds: float) -> None:
        self.timeout_seconds = timeout_seconds
        self.rank, self.has_left = rank_in_job(), False
        self.world_size = processes_in_job()
        store = job_store() if self.world_size > 1 else None
        self.store = JobStore(store, timeout_seconds) if store is not None else None
        run = f"slowmo/{next(_runs)}" if self.store is not None else ""
        self.order = len(_begun)  # among the runs of this process
        self.register = Register(self.store, run, self.rank)
        self.coupled: Sequence[int] = ()  # ranks that now meet in collectives which are not ours
        self.coupled_limit = ""  # another one than `timeout_seconds` that theirs may have, in words
        self.has_explained = False
        self._meeting = 0
        if self.store is not None:
            _listen()
            _begun.append(self.order)
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
            self.store.set_soon(self.register.key(self._meeting, self.rank), self.register.entry())
            # Behind it, in order: whoever is killed from here on was seen here.
            is_last = self.store.count(self.register.key(self._meeting, _COUNT)) == self.world_size
            if is_last:
                self.store.set(self._everybody, "")
            if self._meeting > 2:  # all have passed the meeting after it
                for whose in (self.rank, *((ANY, _COUNT) if is_last else ())):
                    self.store.delete_soon(self.register.key(self._meeting - 2, whose))
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
        came = time.monotonic()
        until = came + self.timeout_seconds
        try:
            while not self._all_come(self.store, came, min(SLICE_SECONDS, max(0.01, until - time.monotonic()))):
                if time.monotonic() >= until or self.somebody_is_gone():
                    raise self.explain(None, everybody)
        except StoreError as error:
            raise self._lost(error) from error
        if self.register.has("failed", ANY):
            raise self.explain(None, everybody)

    def at(self, step: int, place: str) -> None:
        """Note where this rank is, for its last word and for what it says of others; nothing is sent."""
        self.register.at(step, place)

    def _all_come(self, store: JobStore, came: float, seconds: float) -> bool:
        until = time.monotonic() + seconds
        while not store.check([self._everybody]):  # its own wait would print two warnings whenever it is in vain
            now = time.monotonic()
            if now >= until:
                return False
            # The longer the wait the fewer questions: all ranks but one may ask the same store.
            waited = now - came
            time.sleep(min(max(0.001, waited / 10), max(0.01, waited / 100), until - now))
        return True

    def somebody_is_gone(self) -> bool:
        """
        Whether a rank has given up, or has left and will not come to this meeting; or the store is silent, and nobody
        can tell.
        """
        if self.store is None:
            return False
        if self.register.has("failed", ANY) or self.store.silent:
            return True
        try:
            if self.store.check([self._everybody]):
                return False
        except StoreError:
            return True
        return self.register.has("left", ANY) and any(
            self.register.has("left", rank) and not self.register.has(self._meeting, rank)
            for rank in range(self.world_size)
        )

    def leave(self, cause: str) -> None:
        """Leave a last word for ranks that will miss this one; never raises."""
        self.has_left = True
        if self in _going:
            _going.remove(self)
            self._hurry()
            for whose in (self.rank, ANY):
                self.register.try_to_say("left", whose, cause)
            if self.store is not None:
                self.store.close()

    def leave_later(self, cause: str) -> None:
        """The same by a thread of its own, which waits: whoever collects garbage must not, and a process may end."""
        if self in _going:
            later = threading.Timer(_LAST_SECONDS, self.leave, (cause,))
            later.daemon, later.name = True, "slowmo_hf leave"
            later.start()

    def tell(self, words: str) -> str:
        """
        Found between two meetings, and everybody's: whoever waits now, or waits next, fails with these words. The same
        are returned on every rank; of several ranks that find something, the first one's.
        """
        if self.store is None:
            return words
        self._hurry()
        self.has_explained = True
        _spent.set()
        words = self.register.say_first("told", words)
        for whose in (self.rank, ANY):
            self.register.try_to_say("failed", whose)
        return words

    def host_of(self, rank: int) -> str:
        """Where it was at the last meeting."""
        seen = self._seen(rank) if rank != self.rank else None
        return seen["host"] if seen else self.register.host

    def explain(self, error: BaseException | None, ranks: Iterable[int], limit: str = "") -> Exception:
        """
        A failure in the words of the rank that caused it; a `ValueError` where it has told them (`tell`). Takes
        `_ROLL_SECONDS` and a little: the others' words may be on their way.

        Args:
            error (`BaseException`, *optional*): What a collective raised here; None where somebody was missed.
            ranks (`Iterable[int]`): Who took part.
            limit (`str`, *optional*): Another one than `timeout_seconds` that a rank may not have kept, in words.
        """
        if self.store is None:
            return RuntimeError(str(error))
        limit = f", within timeout_seconds={self.timeout_seconds:g}{limit}"
        self._hurry()
        self.has_explained = True
        others = [rank for rank in ranks if rank != self.rank]
        too_late = error is None or is_timeout(error)
        until = time.monotonic() + _ROLL_SECONDS + _SECOND_SECONDS * self.register.has("failed", ANY)
        _spent.set()
        for whose in (self.rank, ANY):
            self.register.try_to_say("failed", whose)
        absent = self.register.absent(others, until)
        told = self.register.get("told", ANY)
        if told:
            return ValueError(told["cause"])
        if self.store.silent:
            return self._lost(error or StoreError("no answer"))
        causes = [self._words(rank, too_late, limit) for rank in absent]
        here = f"It was missed at step {self.register.where}, by rank {self.rank} on {self.register.host}"
        if causes:
            self.register.say_first("found", "; ".join(causes))
        else:  # all who took part live: one of them, or another rank, has missed somebody elsewhere
            causes = self.register.found_by_another(time.monotonic() + _ROLL_SECONDS + 1)
        if not causes:
            also = [(rank, said) for rank in others[:_GIVEN_UP] if (said := self.register.get("failed", rank))]
            causes = [
                f"rank {rank} on {said['host']} gave up at step {said['step']}, {said['place']}" for rank, said in also
            ]
            here = f"So did rank {self.rank} on {self.register.host} at step {self.register.where}"
        detail = f" ({first_line(error)})" if error is not None else ""
        return RuntimeError(
            f"{'; '.join(causes)}. {here}{detail}. Look at that rank's own log; the last whole checkpoint is "
            "untouched."
        )

    def _words(self, rank: int, too_late: bool, limit: str) -> str:
        """What is known of a rank that is not here."""
        left = self.register.get("left", rank)
        if left:
            return f"rank {rank} on {left['host']} left at step {left['step']}: {left['cause']}"
        seen = self._seen(rank)
        if seen is None:
            never = f"rank {rank} (its host is unknown) has not come to {self.register.place}"
            return never + limit.removeprefix(",")
        reached, noted = self.register.noted(rank, after=seen["step"])
        last = f"last seen at step {seen['step']}, {seen['place']}{noted}"
        if too_late:
            words = (
                f"rank {rank} on {seen['host']} did not come to step {self.register.where}{limit}: it is "
                f"slower than that, or left without a word; {last}"
            )
            self.register.try_to_say("missed", rank, words)
            return words
        missed = self.register.get("missed", rank)
        if missed:  # who has seen but its connections closed cannot tell one that hangs from one that is gone
            return str(missed["cause"])
        return f"rank {rank} on {seen['host']} left without a word after step {reached}; {last}"

    def _seen(self, rank: int) -> dict[str, Any] | None:
        """At the last meeting that it came to."""
        return next((said for n in (1, 0, -1) if (said := self.register.get(self._meeting + n, rank))), None)

    # ---- the store ----

    def _hurry(self) -> None:
        """From now on the store must answer soon: there is but a last word to say, or to hear."""
        if self.store is not None:
            self.store.limit_seconds = min(self.store.limit_seconds, _ROLL_SECONDS)

    @property
    def _everybody(self) -> str:
        """The key that says that all have come to this meeting."""
        return self.register.key(self._meeting, ANY)

    def _lost(self, error: BaseException) -> RuntimeError:
        return RuntimeError(
            "rank 0, or the launcher that keeps the job's key-value store, hangs or left without a word: the store "
            f"does not answer ({first_line(error)}). It was missed at step {self.register.where}, by rank "
            f"{self.rank} on {self.register.host}."
        )


def meet_at_the_start(roll_call: RollCall) -> bool:
    """
    The first meeting of a run.

    Returns:
        `bool`: Whether groups are to be made anew: on some rank an earlier run has failed, and what it or another rank
        has launched may be left in them.

    Raises:
        RuntimeError: As `RollCall.enter`.
    """
    if _spent.is_set():
        roll_call.register.try_to_say("spent", ANY)
    roll_call.enter(0, "the start")
    _spent.clear()
    return roll_call.register.has("spent", ANY)


def begun() -> int:
    """How many runs this process has begun."""
    return len(_begun)


def told_of(error: BaseException, since: int, timeout_seconds: float) -> BaseException:
    """
    An error ends this rank's part of a run, and may be caught: the others are told now.

    Args:
        since (`int`): `begun()` before the run. Where the error came before it began, the others may wait for its
            start, or in torch's own collectives before it.
        timeout_seconds (`float`): As for `RollCall`.

    Returns:
        `BaseException`: To be raised: where it is that of a collective, in the words of the rank that caused it.
    """
    if begun() == since:
        run = RollCall(timeout_seconds)
        run.coupled, run.coupled_limit = range(run.world_size), OF_THE_JOB
    return _last_words(error, [run for run in _going if run.order >= since])


def _last_words(error: BaseException, runs: list[RollCall]) -> BaseException:
    newest = runs[-1] if runs else None
    if newest and len(newest.coupled) > 1 and is_collective_failure(error) and not newest.has_explained:
        named = newest.explain(error, newest.coupled, newest.coupled_limit)
        named.__cause__, error = error, named
    if runs:
        _spent.set()  # what this rank has launched may still be in them
    for run in runs:
        run.leave(f"{type(error).__name__}: {first_line(error)}")
    return error


@lru_cache
def _listen() -> None:
    """
    Once per process: an exception that nobody catches, and the process's end, are told to the others. Where the
    exception is that of a collective that is not ours, DDP's among a worker's processes, it is told here too in the
    words of the rank that caused it.
    """
    earlier = sys.excepthook

    def on_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        named = _last_words(error, list(_going))
        earlier(type(named), named, trace)

    sys.excepthook = on_uncaught
    threading.Thread(target=_leave_notes, daemon=True, name="slowmo_hf notes").start()
    atexit.register(_at_exit)


_ended = threading.Event()  # this process does


def _leave_notes() -> None:
    while not _ended.wait(_NOTE_SECONDS):
        for roll_call in list(_going):
            roll_call.register.note()


def _forget_in_child() -> None:
    """A child of fork is no process of the job: its end is not this rank's."""
    _going.clear()
    atexit.unregister(_at_exit)
    _listen.cache_clear()


in_each_child(_forget_in_child)


def _at_exit() -> None:
    _ended.set()
    for roll_call in list(_going):
        roll_call.leave("its process ended")
    leave_job()
