"""SIGTERM and SIGUSR1, by which clusters announce that a job will be ended, as a wish to save and stop."""

from __future__ import annotations

import os
import signal
import threading
import time
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

from ..log import logger

REQUEUE_EXIT_CODE = 75  # sysexits.h: EX_TEMPFAIL, "try again later"
PASSED_ON_SECONDS = 10.0
_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]
# transformers' own would save at a step of one rank's own; ours is an earlier run's, which may have failed.
_REPLACED = ("transformers.trainer_jit_checkpoint", __name__)


class StopSignals:
    """
    Listens until `release`. A handler of the user's own is left in place. A signal repeated after `PASSED_ON_SECONDS`
    does what it did before; sooner, it is the same one: schedulers signal every process of a job, and launchers pass
    on what they get.

    Args:
        on_signal (`Callable`): A bound method, held weakly; called once, with the signal's name, in the main thread.
    """

    def __init__(self, on_signal: Callable[[str], None]) -> None:
        self._on_signal = weakref.WeakMethod(on_signal)
        self._process = os.getpid()
        self._earlier: dict[int, Any] = {}
        self._heard_at: float | None = None
        if threading.current_thread() is not threading.main_thread():
            logger.info("training runs outside the main thread: SIGTERM and SIGUSR1 are left alone")
            return
        for number in _SIGNALS:
            earlier = signal.getsignal(number)
            if earlier in (signal.SIG_DFL, signal.SIG_IGN) or getattr(earlier, "__module__", None) in _REPLACED:
                self._earlier[number] = signal.signal(number, self._handle)
            else:
                logger.info("%s has a handler already, which stays", signal.Signals(number).name)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        on_signal = self._on_signal()
        if os.getpid() != self._process:  # a forked child, which a pool ends by SIGTERM
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif on_signal is None or (self._heard_at and time.monotonic() - self._heard_at > PASSED_ON_SECONDS):
            self.release()
            os.kill(os.getpid(), number)
        elif self._heard_at is None:
            self._heard_at = time.monotonic()
            on_signal(signal.Signals(number).name)

    def release(self) -> None:
        """Give the signals back."""
        for number, earlier in self._earlier.items():
            signal.signal(number, earlier)
        self._earlier = {}
