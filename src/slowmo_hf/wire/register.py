"""
What ranks leave for each other in the job's key-value store: where each is, in a few words under a key of its own.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from .job import host_name
from .job_store import JobStore, StoreError

ANY = "any"
_ASKED_TOGETHER = 64  # ranks in one question: its cost grows with them


@dataclass
class Register:
    """
    One rank's entries in it, and a look at the others'. Entries are `run/what/rank`, their values host, step, place
    and cause.

    Args:
        store (`JobStore`, *optional*): None where nobody can be missed.
        run (`str`): This run's name, the same on every rank.
        rank (`int`): This one's, in the job.
    """

    store: JobStore | None
    run: str
    rank: int
    host: str = field(default_factory=host_name)
    step: int = 0
    place: str = "the start"
    reached_at: float = field(default_factory=time.time)  # when it came to this step

    def at(self, step: int, place: str) -> None:
        """Note where this rank is; nothing is sent."""
        if step != self.step:
            self.reached_at = time.time()
        self.step, self.place = step, place

    @property
    def where(self) -> str:
        """For errors, after "step "."""
        return f"{self.step}, {self.place}"

    def key(self, what: str | int, rank: int | str) -> str:
        """Of an entry."""
        return f"{self.run}/{what}/{rank}"

    def entry(self, cause: str = "") -> str:
        """Where this rank is now."""
        return json.dumps({"host": self.host, "step": self.step, "place": self.place, "cause": cause})

    def try_to_say(self, what: str, rank: int | str, cause: str = "") -> None:
        """Write an entry; the store may have gone with its rank."""
        if self.store is not None:
            with suppress(StoreError):
                self.store.set(self.key(what, rank), self.entry(cause))

    def say_first(self, what: str, cause: str) -> str:
        """Write an entry that one rank writes; the cause of whoever was first."""
        if self.store is not None:
            with suppress(StoreError):
                cause = json.loads(self.store.set_first(self.key(what, ANY), self.entry(cause)))["cause"]
        return cause

    def has(self, what: str | int, *ranks: int | str) -> bool:
        """Whether there is such an entry of each, as far as the store says."""
        try:
            return self.store is not None and self.store.check([self.key(what, rank) for rank in ranks])
        except StoreError:
            return False

    def get(self, what: str | int, rank: int | str) -> dict[str, Any] | None:
        """The entry, if there is one."""
        try:
            return json.loads(self.store.get(self.key(what, rank))) if self.store and self.has(what, rank) else None
        except StoreError:
            return None

    # ---- behind a failure ----

    def absent(self, ranks: list[int], until: float) -> list[int]:
        """
        Those who have not failed, as soon as the others have and they have left, or it is late; or an error that is
        everybody's has been told. Waits.
        """
        absent, waiting = [], [ranks[n : n + _ASKED_TOGETHER] for n in range(0, len(ranks), _ASKED_TOGETHER)]
        while waiting:
            if self.has("failed", *waiting[0]):  # of almost all: one question
                waiting[0] = []
            waiting[0] = [rank for rank in waiting[0] if not self.has("failed", rank)]
            have_left = all(self.has("left", rank) for rank in waiting[0])
            if have_left or time.monotonic() >= until or self.has("told", ANY):
                absent += waiting.pop(0)
            else:
                time.sleep(0.05)
        return absent

    def found_by_another(self, until: float) -> list[str]:
        """Whom another rank that has failed has found missing; nothing where none says so in time. Waits."""
        while time.monotonic() < until:
            said = self.get("found", ANY)
            if said:
                return [said["cause"]]
            time.sleep(0.05)
        return []

    # ---- between meetings ----

    def note(self) -> None:
        """
        Write where this rank is, for whoever misses it. Called by a thread of its own, in which alone it may wait; it
        goes past the calls that are made in order, so that those do not stand behind it.
        """
        if self.store is not None:
            now = time.time()
            entry = {"step": self.step, "noted_at": now, "there_for": now - self.reached_at}
            self.store.set_aside(self.key("note", self.rank), json.dumps(entry))

    def noted(self, rank: int, after: int) -> tuple[int, str]:
        """
        The step that a rank had reached at least, and words for it; empty where it has left no note of a later step
        than `after`. How old a note is goes by two machines' clocks.
        """
        note = self.get("note", rank)
        if note is None or note["step"] <= after:
            return after, ""
        age = max(0.0, time.time() - note["noted_at"])
        return note["step"], (
            f"; at least at step {note['step']} {age:.0f} s ago, when it had been there for {note['there_for']:.0f} s"
        )
