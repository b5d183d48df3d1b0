"""The job's key-value store, asked with a time limit: torch's own client waits for ever for a host that has frozen."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NoAnswer
from contextlib import suppress
from typing import Any

_Calls = queue.SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None]


class StoreError(RuntimeError):
    """The store has not answered, or its connection is lost."""


class JobStore:
    """
    Every call is made in a thread of its own, in order. Once one has had no answer in time the store is silent, and
    calls raise at once.

    Args:
        store (`torch.distributed.Store`): The launcher's, or rank 0's.
        limit_seconds (`float`): Longest wait for an answer.

    Raises:
        StoreError: From every method.
    """

    def __init__(self, store: Any, limit_seconds: float) -> None:
        self._store = store
        self.limit_seconds = limit_seconds
        self.silent = False
        self._calls: _Calls = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def set(self, key: str, value: str) -> None:
        """Write; the value is a string."""
        self._ask(self._store.set, key, value)

    def set_soon(self, key: str, value: str) -> None:
        """Write behind the calls before, and do not wait for the answer."""
        self._start(self._store.set, key, value)

    def set_first(self, key: str, value: str) -> bytes:
        """Write a key that is not there; what is there then, of whoever was first."""
        try:
            value_there: bytes = self._ask(self._store.compare_set, key, "", value)
        except NotImplementedError:
            self.set(key, value)
            return value.encode()
        return value_there

    def set_aside(self, key: str, value: str) -> None:
        """Write in the caller's thread, for as long as that takes; what goes wrong is nobody's concern."""
        if not self.silent:
            with suppress(Exception):
                self._store.set(key, value)

    def get(self, key: str) -> bytes:
        """Read a key that is there."""
        value: bytes = self._ask(self._store.get, key)
        return value

    def check(self, keys: list[str]) -> bool:
        """Whether all of these are there."""
        return bool(self._ask(self._store.check, keys))

    def count(self, key: str) -> int:
        """How many have counted there, this time too."""
        counted: int = self._ask(self._store.add, key, 1)
        return counted

    def delete_soon(self, key: str) -> None:
        """Forget a key, without waiting for the answer; some stores keep every one."""
        self._start(self._store.delete_key, key)

    def close(self) -> None:
        """End the thread, which a later call would start again."""
        if self._thread is not None:
            self._calls.put(None)
            self._thread, self._calls = None, queue.SimpleQueue()

    def _start(self, call: Callable[..., Any], *args: Any) -> Future[Any]:
        if self.silent:
            raise StoreError("it has not answered before")
        if self._thread is None:
            self._thread = threading.Thread(target=_answer, args=(self._calls,), daemon=True, name="slowmo_hf store")
            self._thread.start()
        answer: Future[Any] = Future()
        self._calls.put((answer, call, args))
        return answer

    def _ask(self, call: Callable[..., Any], *args: Any) -> Any:
        try:
            return self._start(call, *args).result(self.limit_seconds)
        except NoAnswer:
            self.silent = True
            raise StoreError(f"no answer within {self.limit_seconds:g} s") from None
        except NotImplementedError:
            raise
        except (RuntimeError, OSError) as error:
            raise StoreError(str(error)) from error


def _answer(calls: _Calls) -> None:
    while (asked := calls.get()) is not None:
        answer, call, args = asked
        try:
            answer.set_result(call(*args))
        except BaseException as error:
            answer.set_exception(error)
        del asked, answer, call, args  # they hold the store
