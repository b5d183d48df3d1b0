"""
What the package says to its user: one logger, heard by default. Every rank says the same words in the same place, so
rank 0 alone is heard; what is of one rank is said by `of_this_rank`, with rank and host in the line.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

logger = logging.getLogger("slowmo_hf")

_OF_ONE_RANK = "slowmo_of_one_rank"
_who: list[Callable[[], tuple[int, int, str]]] = [lambda: (0, 1, "")]  # the last one is asked


def spoken_by(who: Callable[[], tuple[int, int, str]]) -> None:
    """From now on `who` tells the speaker: rank, processes of the job, host."""
    _who.append(who)


class _OncePerJob(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return getattr(record, _OF_ONE_RANK, False) or _who[-1]()[0] == 0


logger.addFilter(_OncePerJob())


if TYPE_CHECKING:
    _Adapter = logging.LoggerAdapter[logging.Logger]
else:
    _Adapter = logging.LoggerAdapter  # Python 3.10's takes no type argument


class Prefixed(_Adapter):
    """
    The logger, with words in front of each line.

    Args:
        prefix (`Callable`): Gives them, with a colon; empty where there is nothing to tell apart.
        of_one_rank (`bool`, *optional*, defaults to `False`): Whether any rank is heard.
    """

    def __init__(self, prefix: Callable[[], str], *, of_one_rank: bool = False) -> None:
        super().__init__(logger, {_OF_ONE_RANK: of_one_rank})
        self._prefix = prefix

    def process(self, msg: Any, kwargs: Any) -> tuple[Any, Any]:
        """As `LoggerAdapter.process`."""
        extra: Mapping[str, object] = {**(self.extra or {}), **(kwargs.get("extra") or {})}
        return f"{self._prefix()}{msg}", {**kwargs, "extra": extra}


def _rank_and_host() -> str:
    rank, processes, host = _who[-1]()
    return f"rank {rank} on {host}: " if processes > 1 else ""


of_this_rank = Prefixed(_rank_and_host, of_one_rank=True)


class _LastResort(logging.StreamHandler):  # type: ignore[type-arg]
    """Heard above progress bars, and where nobody else hears a record: a program may add handlers at any time."""

    def emit(self, record: logging.LogRecord) -> None:
        others = [*logger.handlers, *(logging.getLogger().handlers if logger.propagate else [])]
        hear = [one for one in others if not isinstance(one, logging.NullHandler) and record.levelno >= one.level]
        if hear == [self]:
            try:
                with tqdm.external_write_mode(file=self.stream, nolock=True):
                    super().emit(record)
            except Exception:  # of a bar, on a stream that is gone
                self.handleError(record)


def make_heard() -> None:
    """Show INFO lines even where nobody configured logging; a user's handlers, and its level of this logger, stay."""
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    if not logger.hasHandlers():
        handler = _LastResort()
        handler.setFormatter(logging.Formatter("[slowmo_hf] %(message)s"))
        logger.addHandler(handler)
