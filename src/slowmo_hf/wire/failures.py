"""What the error of a collective says, and who knows more of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch.distributed as dist

SLICE_SECONDS = 0.5  # between looks whether another rank has given up or left


class Witness(Protocol):
    """Who knows of the other ranks when a collective fails."""

    def somebody_is_gone(self) -> bool:
        """Whether a rank has given up or left, so that a collective waits in vain."""

    def explain(self, error: Exception | None, ranks: Iterable[int]) -> Exception:
        """The failure in the words of the rank that caused it; a `ValueError` where that has told it."""


def is_collective_failure(error: BaseException) -> bool:
    """Whether it was raised by a collective of anybody's: torch's own types (NCCL), or gloo's words."""
    words = str(error)
    return isinstance(error, RuntimeError) and (
        isinstance(error, dist.DistError) or "/gloo/" in words or "pair closure" in words
    )


def is_timeout(error: BaseException) -> bool:
    """
    Whether a collective was given up for its time. Only the first that waits on a connection of gloo's says that it
    "timed out"; the connection is closed with it, and those after it say "Application timeout caused pair closure".
    """
    words = str(error).lower()
    return "timed out" in words or "timeout" in words


def first_line(error: BaseException) -> str:
    """What an error says, without its stack; its type where it says nothing."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
