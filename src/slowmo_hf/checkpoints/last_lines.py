"""
The last lines of a process whose training fails: the last whole checkpoint of its run, and what goes on from it. They
come below the traceback, also behind Ctrl-C, and never where a process exits on purpose (`SystemExit`).
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from types import TracebackType

from ..wire.failures import is_collective_failure
from ..wire.job import host_name, in_each_child, rank_in_job
from .manifest import is_whole

_PACKAGE = Path(__file__).parents[1]
_SECRET = re.compile(r"(token|(key|passw(or)?d|pwd|secret|credential)s?)$", re.IGNORECASE)  # of a flag's name
_LOGIN = re.compile(r"(?<=://)[^/@\s]+@")  # of an address
_runs: list[Saves] = []  # those that train, the newest last
in_each_child(_runs.clear)


class Saves:
    """
    The checkpoints of one training run of this process, from `begin` to `end`.

    Args:
        go_on (`str`): The call that goes on from one, with `{}` for its folder in quotes.
        is_over (`Callable`, *optional*): Whether training has ended well without an `end`.
        raised_in (`str`, *optional*): A part of the name of a file that an error of this run passes through; another
            error has come behind it.
    """

    def __init__(self, go_on: str, is_over: Callable[[], bool] = lambda: False, raised_in: str = "") -> None:
        self._go_on, self.is_over, self._raised_in = go_on, is_over, raised_in
        self._folders: list[str] = []

    def begin(self) -> None:
        """From now on an error that nobody catches ends this run."""
        _listen()
        if self not in _runs:
            _runs.append(self)

    def end(self) -> None:
        """Training has ended."""
        if self in _runs:
            _runs.remove(self)

    def is_failing(self, trace: TracebackType | None) -> bool:
        """Whether it is this run's error that nobody has caught."""
        files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(trace)]
        return not self.is_over() and any(self._raised_in in file for file in files)

    def add(self, folder: str | os.PathLike[str]) -> None:
        """This one has been saved, or training goes on from it."""
        self._folders.append(os.path.abspath(folder))

    def words(self) -> str:
        """What is left of them. Reads what makes a checkpoint whole, and none of its tensors."""
        if not self._folders:
            return "no checkpoint to go on from has been saved yet."
        whole = next((folder for folder in reversed(self._folders) if is_whole(folder)), None)
        if whole is None:
            return "no checkpoint of this run is there any more."
        return (
            f"the last whole checkpoint is {whole}. Go on with {self._go_on.format(json.dumps(whole))}\n{_command()}"
        )


def _command() -> str:
    """What has started this process; what a launcher was given, it alone knows."""
    words, is_secret = [], False
    for word in sys.orig_argv:
        name, equals, _ = word.partition("=")
        names_secret = bool(_SECRET.search(name))
        is_secret = is_secret and not word.startswith("--")
        words.append("***" if is_secret else _LOGIN.sub("***@", f"{name}=***" if names_secret and equals else word))
        is_secret = names_secret and not equals and word.startswith("-") and not is_secret
    command = shlex.join(words)
    if "LOCAL_RANK" in os.environ:
        return f"in the script that the job's launch command starts again. This process of it: {command}"
    return f"in the script that was started by: {command}"


@lru_cache
def _listen() -> None:
    """Once per process, behind who listens already."""
    earlier = sys.excepthook

    def on_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        earlier(kind, error, trace)
        with suppress(Exception):
            going = [run for run in _runs if run.is_failing(trace)]
            if going and not issubclass(kind, SystemExit) and _is_one_to_say_it(error, trace):
                for line in going[-1].words().splitlines():
                    print(f"[slowmo_hf] rank {rank_in_job()} on {host_name()}: {line}", file=sys.stderr, flush=True)

    sys.excepthook = on_uncaught


def _is_one_to_say_it(error: BaseException, trace: TracebackType | None) -> bool:
    """The first process of each machine; and of the others the one that has failed, not those that have missed it."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        return True
    if isinstance(error, KeyboardInterrupt) or is_collective_failure(error):
        return False
    raised_in = [Path(frame.filename) for frame in traceback.extract_tb(trace)[-1:]]
    return f"rank {rank_in_job()} on " in str(error)[:20] or not any(p.is_relative_to(_PACKAGE) for p in raised_in)
