"""What the value of a setting must be by itself: its kind, its range, its choices. One rule for all settings."""

from __future__ import annotations

import functools
import inspect
import json
import math
import numbers
from collections.abc import Callable
from dataclasses import fields
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import torch

from .hints import did_you_mean
from .names import CODES, OUTER_UPDATES, TOPOLOGIES, find, path_of

# Choices that have a table: what a program adds to it counts.
_TABLES = {"topology": TOPOLOGIES, "compression": CODES}


class Range(NamedTuple):
    """Which numbers a setting takes: in words, as a condition, and the way out."""

    words: str
    holds: Callable[[Any], bool]
    way_out: str = ""


# Below 2^53 a whole number is the same in JSON and in fp64.
_MOST = 2**53
# torch and gloo count a time-out in milliseconds, and its end in nanoseconds since the machine's start, in 64 bits:
# after 9.2e9 seconds that number turns negative, and nobody waits at all.
_LONGEST = 1e9
_RANGES = {
    "sync_every": Range(">= 1 optimizer step", lambda n: n >= 1, "Use 1 to average after every step."),
    "peers": Range(">= 1", lambda n: n >= 1),
    "staleness": Range(">= 0 steps", lambda n: n >= 0),
    "overlap_steps": Range("in [0, sync_every)", lambda n: n >= 0, "Use 0 to wait for every round."),
    "bucket_bytes": Range(">= 1024 bytes", lambda n: n >= 1024, "26214400 (25 MiB) is lean."),
    "outer_lr": Range(
        "> 0 (in fp32: 1e-38 to 1e38)", lambda x: 1e-38 <= x <= 1e38, "Use 1.0 for the paper's setting."
    ),
    "outer_momentum": Range("in [0, 1)", lambda x: 0 <= x < 1, "Use 0 to switch slow momentum off."),
    "block_momentum": Range("in [0, 1)", lambda x: 0 <= x < 1),  # of a preset, as the next
    "nesterov_momentum": Range(
        "in (0, 1)", lambda x: 0 < x < 1, "For none write SlowMoConfig(outer_optimizer=torch.optim.SGD, ...)."
    ),
    "timeout_seconds": Range(
        "> 0 seconds (0.001 to 1e9)", lambda x: 0.001 <= x <= _LONGEST, "86400 is a day, 1e9 are 31 years."
    ),
}


def settle(config: Any) -> None:
    """
    Bring every value of a new configuration to the kind of its field, and check it.

    Raises:
        ValueError: A value is of another kind, out of range, or none of the choices.
    """
    kinds = _kinds(config.__class__)
    for name in (f.name for f in fields(config) if "help" in f.metadata):  # a subclass's own fields are its own
        object.__setattr__(config, name, _settled(name, kinds[name], getattr(config, name)))
    if config.overlap_steps >= config.sync_every:
        raise ValueError(
            f"overlap_steps must be in [0, sync_every), got {config.overlap_steps} with "
            f"sync_every={config.sync_every}: a round ends before the next one begins. Lower overlap_steps or raise "
            "sync_every."
        )


@functools.cache
def _kinds(config: type[Any]) -> dict[str, Any]:
    return get_type_hints(config)


def choices(name: str, kind: Any) -> tuple[str, ...]:
    """The values of a field that is a `Literal`, and what the program has added to its table."""
    return tuple(dict.fromkeys((*get_args(kind), *_TABLES.get(name, ()))))


def _settled(name: str, kind: Any, value: Any) -> Any:
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()  # a number of numpy's or torch's
    if name in _OWN:
        return _OWN[name](value)
    if get_origin(kind) is Literal:
        allowed = choices(name, kind)
        if value not in allowed:
            raise ValueError(
                f"{name} must be one of {', '.join(allowed)}, got {value!r}.{did_you_mean(value, allowed)}"
            )
        return value
    if kind is bool:
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {value!r}.")
        return value
    return number(name, kind, value)


def number(name: str, kind: type[Any], value: Any) -> Any:
    """
    The number of a setting, as its `kind`: `int` or `float`.

    Raises:
        ValueError: It is no number, not finite, or out of the setting's range. True is no number, nor is a text.
    """
    wanted: Any
    wanted, words = (numbers.Integral, "an integer") if kind is int else (numbers.Real, "a finite number")
    if isinstance(value, bool) or not isinstance(value, wanted):
        raise ValueError(f"{name} must be {words}, got {value!r}.{_written(name, kind, value)}")
    within = _RANGES[name]
    if not within.holds(value):
        words = within.words if value == value and abs(value) < math.inf else words
        raise ValueError(f"{name} must be {words}, got {value!r}. {within.way_out}".rstrip())
    if kind is int and value >= _MOST:
        raise ValueError(f"{name} must be {within.words} and below 2**53, got {value!r}.")
    return kind(value)


def _written(name: str, kind: type[Any], value: Any) -> str:
    """The number that a text or a float holds, as it should be written."""
    try:
        number = kind(value)
        same = not isinstance(value, bool) and math.isfinite(number) and float(value) == number
    except (TypeError, ValueError, OverflowError):
        return ""
    return f" Write {name}={number}." if same else ""


# ---- settings that have a rule of their own ----


def _processes_per_worker(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if value not in ("auto", "node") and not (isinstance(value, str) and value.isdecimal() and int(value) > 0):
        raise ValueError(
            f"processes_per_worker must be 'auto', 'node' or a number >= 1, got {value!r}."
            f"{did_you_mean(value, ('auto', 'node'))}"
        )
    return str(value)


def _outer_optimizer(value: Any) -> str:
    if isinstance(value, type):
        return path_of(value)
    if not isinstance(value, str):
        raise ValueError(f"outer_optimizer must be a name or a class, got {_shortly(value)}.{_its_class(value)}")
    return value


def _shortly(value: Any) -> str:
    """An optimizer's `repr` has many lines."""
    return f"an object of class {type(value).__name__}" if isinstance(value, torch.optim.Optimizer) else repr(value)


def _its_class(value: Any) -> str:
    made = type(value) if isinstance(value, torch.optim.Optimizer) else getattr(value, "func", None)
    if not isinstance(made, type):
        return " Write outer_optimizer=torch.optim.SGD."
    return (
        f" It is made of the anchors when training starts: write outer_optimizer={path_of(made)}, outer_lr=... and "
        "outer_optimizer_kwargs={...}."
    )


def _outer_optimizer_kwargs(value: Any) -> str | None:
    if not isinstance(value, dict):
        return value  # type: ignore[no-any-return]  # text, which is read where it is used
    try:
        return json.dumps(value, sort_keys=True)
    except TypeError as error:
        raise ValueError(
            f"outer_optimizer_kwargs must hold JSON values (numbers, texts, lists, True, None), got {value!r} "
            f"({error})."
        ) from error


_OWN: dict[str, Callable[[Any], Any]] = {
    "processes_per_worker": _processes_per_worker,
    "outer_optimizer": _outer_optimizer,
    "outer_optimizer_kwargs": _outer_optimizer_kwargs,
}


# ---- an outer optimizer by its path ----


def class_at(path: str) -> type[Any]:
    """The class that a dotted-path `outer_optimizer` names; `ValueError` where there is none."""
    try:
        found = find(path)
    except (ImportError, AttributeError, ValueError) as error:
        known = [name for name in vars(torch.optim) if name[:1].isupper() and name != "Optimizer"]
        known = [*OUTER_UPDATES, *(f"torch.optim.{name}" for name in known)]
        short = {name.rpartition(".")[2].lower(): name for name in known}.get(path.rpartition(".")[2].lower())
        raise ValueError(
            "outer_optimizer must be 'slow_momentum' or the dotted path of a torch optimizer such as "
            f"'torch.optim.SGD', got {path!r} ({error}).{did_you_mean(short or path, known)}"
        ) from error
    if not callable(getattr(found, "step", None)):
        raise ValueError(f"outer_optimizer must name a torch optimizer, got {path!r}, a {found!r}.")
    return found  # type: ignore[no-any-return]


def arguments_of(text: str | None) -> dict[str, Any]:
    """`outer_optimizer_kwargs` as a dictionary; `ValueError` where it is no JSON object."""
    try:
        arguments = json.loads(text or "{}")
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"outer_optimizer_kwargs must be JSON, got {text!r} ({error}).") from error
    if not isinstance(arguments, dict):
        raise ValueError(f"outer_optimizer_kwargs must be a JSON object, got {text!r}.")
    return arguments


def check_arguments(path: str, made: type[Any], arguments: dict[str, Any]) -> None:
    """
    Refuse an argument that the outer optimizer does not have, as far as its signature tells, and a second learning
    rate.
    """
    if "lr" in arguments:
        raise ValueError(
            f"outer_optimizer_kwargs must not hold 'lr', got {arguments['lr']!r}. Set outer_lr, the outer "
            "optimizer's lr."
        )
    try:
        parameters = inspect.signature(made).parameters
    except (TypeError, ValueError):  # of a class that tells none
        return
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    known = [name for name in parameters if name not in ("params", "lr")]
    for name in arguments:
        if name not in known:
            raise ValueError(
                f"outer_optimizer_kwargs must be arguments of {path} ({', '.join(known)}), got {name!r}."
                f"{did_you_mean(name, known)}"
            )
