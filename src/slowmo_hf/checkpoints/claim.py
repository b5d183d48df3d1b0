"""
Who is writing a checkpoint: a lock on a file in its folder, held from the first file of a save to its seal.

The lock is the kernel's (`flock`) and goes with its process, so a killed run leaves none and its restart waits for
nobody. Where the file system has no locks, nothing is held and nobody is seen.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

try:
    import fcntl
except ModuleNotFoundError as error:
    raise ImportError("slowmo_hf saves checkpoints on Linux. On Windows train in WSL.") from error

from ..contents import CheckpointError
from ..wire.job import in_each_child
from .files import LOCK

_WAIT_SECONDS = 5.0  # for who looks, which takes a moment

_held: set[int] = set()  # descriptors


def _let_go_in_child() -> None:
    """A child of fork (a DataLoader's worker) must not keep a dead parent's lock."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


in_each_child(_let_go_in_child)


class Claim:
    """
    The lock on one checkpoint, held until `release` or the end of the process.

    Args:
        checkpoint (`Path`): Its folder; made where there is none.
        patience_seconds (`float`): How long another program may hold it.

    Raises:
        CheckpointError: Another program holds it.
    """

    def __init__(self, checkpoint: Path, patience_seconds: float = _WAIT_SECONDS) -> None:
        self._path = checkpoint / LOCK
        self._descriptor: int | None = None
        self._process = os.getpid()
        checkpoint.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        _held.add(descriptor)
        end = time.monotonic() + patience_seconds
        while time.monotonic() < end:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.05)
                continue
            except OSError:
                break  # a file system without locks
            self._descriptor = descriptor
            return
        _close(descriptor)
        if is_claimed(checkpoint):
            raise CheckpointError(
                f"{checkpoint} is being written by another program: two runs save into one folder. Stop the other one "
                "(it may be an old process of this job), or give this run an output folder of its own."
            )

    def release(self) -> None:
        """Let go, once; the file goes with it."""
        if self._descriptor is not None:
            if self._process == os.getpid():  # else the lock is a parent's
                with suppress(OSError):
                    self._path.unlink(missing_ok=True)
                _close(self._descriptor)
            self._descriptor = None

    def __del__(self) -> None:
        self.release()


def is_claimed(checkpoint: Path) -> bool:
    """Whether a living process is writing it."""
    try:
        descriptor = os.open(checkpoint / LOCK, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def _close(descriptor: int) -> None:
    _held.discard(descriptor)
    os.close(descriptor)
