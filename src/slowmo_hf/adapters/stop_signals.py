"""SIGTERM and SIGUSR1, by which clusters announce that a job will be ended, as a wish to save and stop."""

from __future__ import annotations

import os
import signal
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from ..log import logger

REQUEUE_EXIT_CODE = 75  # sysexits.h: EX_TEMPFAIL, "try again later"
PASSED_ON_SECONDS = 10.0
_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]
_REPLACED = "transformers.trainer_jit_checkpoint"  # which would save at a step of one rank's own


class StopSignals:
    """
    Listens until `release`; all that listen are told. A handler of the user's own is left in place. A signal repeated
    after `PASSED_ON_SECONDS` does what it did before; sooner, it is the same one: schedulers signal every process of a
    job, and launchers pass on what they get.

    Args:
        on_signal (`Callable`): A bound method, held weakly; called once, with the signal's name, in the main thread.
    """

    def __init__(self, on_signal: Callable[[str], None]) -> None:
        self._on_signal = weakref.WeakMethod(on_signal)
        self._process = os.getpid()
        self.heard_at: float | None = None
        if threading.current_thread() is not threading.main_thread():
            logger.info("training runs outside the main thread: SIGTERM and SIGUSR1 are left alone")
            return
        _listening.append(self)
        _take_signals()

    @property
    def lives(self) -> bool:
        """Whether there is somebody to tell: not in a forked child, which a pool ends by SIGTERM."""
        return self._process == os.getpid() and self._on_signal() is not None

    def hear(self, name: str) -> None:
        """Tell it, once."""
        on_signal = self._on_signal()
        if self.heard_at is None and on_signal is not None:
            self.heard_at = time.monotonic()
            on_signal(name)

    def release(self) -> None:
        """Listen no more; who is the last gives the signals back."""
        if self in _listening:
            _listening.remove(self)
        if not _living():
            _give_back()


_listening: list[StopSignals] = []
_earlier: dict[int, Any] = {}  # whose handlers ours has replaced


def _living() -> list[StopSignals]:
    _listening[:] = [one for one in _listening if one.lives]
    return _listening


def _take_signals() -> None:
    for number in _SIGNALS:
        earlier = signal.getsignal(number)
        if earlier is _handle:
            continue
        is_default = earlier in (signal.SIG_DFL, signal.SIG_IGN) and not _is_caught_in_c(number)
        if is_default or getattr(earlier, "__module__", None) == _REPLACED:
            _earlier[number] = signal.signal(number, _handle)
        else:
            logger.info("%s has a handler already, which stays", signal.Signals(number).name)


def _is_caught_in_c(number: int) -> bool:
    """By a handler that is not Python's (`faulthandler.register`), which `signal.getsignal` shows as the default."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:  # no Linux
        return False
    caught = next((int(line.split()[1], 16) for line in lines if line.startswith("SigCgt:")), 0)
    return bool(caught >> (number - 1) & 1)


def _give_back() -> None:
    for number, earlier in _earlier.items():
        if signal.getsignal(number) is _handle:  # else somebody has put another in its place since, which stays
            signal.signal(number, earlier)
    _earlier.clear()


def _handle(number: int, frame: FrameType | None) -> None:
    living = _living()
    heard = [one.heard_at for one in living if one.heard_at is not None]
    if len(heard) < len(living) or (heard and time.monotonic() - max(heard) <= PASSED_ON_SECONDS):
        for one in tuple(living):
            one.hear(signal.Signals(number).name)
    else:  # nobody listens, or all have heard before
        _give_back()
        if signal.getsignal(number) is _handle:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
