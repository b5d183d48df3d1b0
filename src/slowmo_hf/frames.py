"""The calls above this one: who is calling, which no argument tells."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import Any


def callers(depth: int) -> Iterator[FrameType]:
    """The frames above the caller of this function's caller, nearest first."""
    frame = inspect.currentframe()
    for number in range(depth + 3):
        if frame is None:
            return
        if number >= 3:
            yield frame
        frame = frame.f_back


def callers_of(kind: type[Any]) -> Iterator[FrameType]:
    """
    Those of them that run a method of the class, or of one that inherits from it: the locals of others are not to be
    read. Before Python 3.13 what a frame has once shown lives as long as it, and a user's `main` is a frame.
    """
    kinds = [kind]
    for one in kinds:
        kinds += one.__subclasses__()
    methods = (method for one in (*kinds, *kind.__mro__[1:-1]) for method in vars(one).values())
    codes = set[CodeType]().union(*map(_codes, methods))
    return (frame for frame in callers(sys.getrecursionlimit()) if frame.f_code in codes)


def _codes(method: Any) -> set[CodeType]:
    """Of a function, and of those that it wraps."""
    codes = set()
    while isinstance(code := getattr(method, "__code__", None), CodeType):
        codes.add(code)
        method = getattr(method, "__wrapped__", None)
    return codes
