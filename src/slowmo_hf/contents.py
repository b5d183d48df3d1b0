"""What a checkpoint holds, the checks of what is taken from it, and the parts that save and restore themselves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

import torch

from .dtensors import local
from .finite import all_finite


class CheckpointError(ValueError):
    """
    A checkpoint cannot be used, or written: it is damaged, unfinished, of another run, or does not fit the settings.
    The message names the file and the reason. Where all ranks save or resume, all of them raise it.
    """


@dataclass
class Contents:
    """
    What one part of a checkpoint holds. What is taken from it is checked: an error names file, field, value and rule.

    Args:
        settings (`dict`): JSON values.
        tensors (`dict`): By name; any shapes and dtypes, no two of them in one memory.
        objects (`dict`): State dictionaries of optimizers and the like.
        source (`str`): Where it was read, for errors: the files' path without its ending.
        within (`str`): For errors: the object of the settings that these are in, and a dot.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    objects: dict[str, Any] = field(default_factory=dict)
    source: str = "this state"
    within: str = ""

    def add(self, other: Contents) -> None:
        """Hold what another holds, too."""
        for mine, its in zip(self.tables, other.tables, strict=True):
            twice = mine.keys() & its.keys()
            assert not twice, twice
            mine.update(its)

    @property
    def tables(self) -> tuple[dict[str, Any], ...]:
        """All three."""
        return self.settings, self.tensors, self.objects

    def tensor(self, name: str, like: torch.Tensor, *, finite: bool = True) -> torch.Tensor:
        """
        One with the shape and dtype of `like`.

        Args:
            finite (`bool`, *optional*, defaults to `True`): False where NaN and infinity have a meaning.
        """
        found = self.tensors.get(name)
        if found is None:
            self._refuse("safetensors", name, "is missing")
        if found.shape != like.shape or found.dtype != like.dtype:
            self._refuse(
                "safetensors",
                name,
                f"does not fit: it has shape {tuple(found.shape)} and {found.dtype}, this run {tuple(like.shape)} and "
                f"{like.dtype}",
            )
        if finite and found.is_floating_point() and not all_finite([found]):
            self._refuse("safetensors", name, "is not finite (NaN or infinity)")
        return found

    def count(self, name: str, *, least: int = 0, most: int | None = None) -> int:
        """A whole number from `least` to `most`."""
        value = self.settings.get(name)
        if (
            isinstance(value, bool)
            or not isinstance(value, int)
            or value < least
            or (most is not None and value > most)
        ):
            rule = f">= {least}" if most is None else f"from {least} to {most}"
            self._refuse("json", name, f"must be a whole number {rule}, got {value!r}")
        return value

    def fraction(self, name: str, *, most: int) -> float:
        """A number above 0, `most` or less: of a mass that workers share."""
        value = self._number(name, self.settings.get(name), 0)
        if not 0 < value <= most:
            self._refuse("json", name, f"must be above 0 and <= {most}, got {value!r}")
        return value

    def word(self, name: str) -> str:
        """A string."""
        value = self.settings.get(name)
        if not isinstance(value, str):
            self._refuse("json", name, f"must be a string, got {value!r}")
        return value

    def numbers(self, name: str, count: int | None = None, *, least: float = -math.inf) -> list[float]:
        """A list of them, of this length."""
        values = self.settings.get(name)
        if not isinstance(values, list) or (count is not None and len(values) != count):
            self._refuse(
                "json", name, f"must be a list{f' of {count} numbers' if count is not None else ''}, got {values!r}"
            )
        return [self._number(name, value, least) for value in values]

    def number_lists(self, name: str, *, most: int, least: float = -math.inf) -> list[list[float]]:
        """At most `most` lists of numbers."""
        lists = self.settings.get(name)
        if not isinstance(lists, list) or len(lists) > most or not all(isinstance(one, list) for one in lists):
            self._refuse("json", name, f"must be a list of {most} lists at most, got {lists!r}")
        return [[self._number(name, value, least) for value in one] for one in lists]

    def flag(self, name: str) -> bool:
        """True or false; false where it is not there."""
        value = self.settings.get(name, False)
        if not isinstance(value, bool):
            self._refuse("json", name, f"must be true or false, got {value!r}")
        return value

    def names(self, name: str) -> list[str]:
        """A list of words."""
        values = self.settings.get(name)
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            self._refuse("json", name, f"must be a list of names, got {values!r}")
        return values

    def refuse_unknown(self, name: str, given: list[str], known: Iterable[str]) -> None:
        """Names that this run does not have."""
        unknown = sorted(set(given) - set(known))
        if unknown:
            self._refuse("json", name, f"names {unknown[:3]}, which this run does not have")

    def optimizer(self, name: str, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """
        The state dictionary of an optimizer with as many groups and parameters as this one, and values like the ones
        it has.
        """
        if name not in self.objects:
            self._refuse("pt", name, "is missing")
        state = self.objects[name]
        try:
            saved = [list(group["params"]) for group in state["param_groups"]]
            is_state = isinstance(state["state"], dict)
        except (TypeError, KeyError):
            is_state = False
        if not is_state:
            self._refuse("pt", name, "is no state of an optimizer")
        own = [len(group["params"]) for group in optimizer.param_groups]
        if [len(numbers) for numbers in saved] != own:
            self._refuse(
                "pt", name, f"does not fit: its groups have {list(map(len, saved))} parameters, this run's have {own}"
            )
        odd = _odd_state(state, [number for numbers in saved for number in numbers], optimizer)
        if odd:
            self._refuse("pt", name, odd)
        return state  # type: ignore[no-any-return]

    def part(self, name: str) -> Contents:
        """The settings in an object of their own."""
        value = self.settings.get(name)
        if not isinstance(value, dict):
            self._refuse("json", name, f"must be an object, got {value!r}")
        return Contents(value, source=self.source, within=f"{name}.")

    def refuse(self, name: str, words: str) -> NoReturn:
        """Of a value in the settings."""
        self._refuse("json", name, words)

    def _number(self, name: str, value: Any, least: float) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < least:
            rule = "a finite number" if least == -math.inf else f"a finite number >= {least:g}"
            self._refuse("json", name, f"must be {rule}, got {value!r}")
        return float(value)

    def _refuse(self, ending: str, name: str, words: str) -> NoReturn:
        file = f"{self.source}.{ending}" if "/" in self.source else self.source
        raise CheckpointError(f"{file}: {self.within}{name} {words}. Resume from another checkpoint.")


def _odd_state(state: dict[str, Any], numbers: list[Any], optimizer: torch.optim.Optimizer) -> str:
    """What of an optimizer's saved state is unlike the state that it has now; empty where nothing is."""
    if not all(type(number) is int for number in numbers) or len(set(numbers)) != len(numbers):
        return "does not fit: a parameter is named twice, or by no number"
    for saved, own in zip(state["param_groups"], optimizer.param_groups, strict=True):
        odd = sorted(key for key in own if key != "params" and key in saved and not _is_like(saved[key], own[key]))
        if odd or ("lr" in own and "lr" not in saved):
            return f"does not fit: {odd or ['lr']} of a group is missing or another kind of value"
    unknown = [key for key in state["state"] if not isinstance(key, str) and key not in numbers]
    if unknown:
        return f"does not fit: it has a state for {unknown[:3]}, which is no parameter"
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for number, param in zip(numbers, params, strict=True):
        saved, own = state["state"].get(number, {}), optimizer.state.get(param, {})
        if not isinstance(saved, dict):
            return f"does not fit: the state of parameter {number} is {type(saved).__name__}, no dictionary"
        odd = sorted(str(key) for key in own if key in saved and not _is_like(saved[key], own[key], lists_grow=True))
        if odd:
            return f"does not fit: {odd} of parameter {number} has another shape, or is another kind of value"
    return ""


def _is_like(saved: Any, own: Any, *, lists_grow: bool = False) -> bool:
    """
    Whether one value may take the other's place: a tensor one of its shape, a number one as finite as it. With
    `lists_grow` a list may have another length: LBFGS's histories, which are each worker's own.
    """
    if isinstance(own, torch.Tensor) and own.dim() > 0:
        return isinstance(saved, torch.Tensor) and saved.shape == local(own).shape
    if isinstance(own, tuple | list):
        is_long = isinstance(saved, tuple | list) and (lists_grow or len(saved) == len(own))
        return is_long and all(map(_is_like, saved, own))
    if isinstance(own, torch.Tensor | int | float) and not isinstance(own, bool):
        if isinstance(saved, torch.Tensor):
            saved = saved.item() if saved.dim() == 0 and not saved.is_complex() else None
        is_number = isinstance(saved, int | float) and not isinstance(saved, bool)
        return is_number and (math.isfinite(saved) or not math.isfinite(own))
    return True


Restored = Callable[[], None]


@dataclass
class Saved:
    """
    The state of a training run, as one worker saves it.

    Args:
        shared (`Contents`): Equal on all workers.
        own (`Contents`): This worker's alone.
    """

    shared: Contents = field(default_factory=Contents)
    own: Contents = field(default_factory=Contents)


class Part(Protocol):
    """What has state that a checkpoint needs."""

    def saved(self, *, agree: bool, keep: bool) -> Saved:
        """
        The state now. May be collective over workers.

        Args:
            agree (`bool`): All workers' parameters are equal, and in the checkpoint's model.
            keep (`bool`): False where this process does not write what is shared.
        """

    def restore(self, saved: Saved, *, same_number: bool) -> Restored:
        """
        Check what `saved` gave; the result takes it up, in place. Nothing is changed before all parts have checked.

        Args:
            same_number (`bool`): False where another number of workers saved it: all start from the average.

        Raises:
            CheckpointError: A value is missing or cannot be; file and field are named.
        """


def save_all(parts: list[Part], *, agree: bool, keep: bool) -> Saved:
    """What all parts have, together."""
    saved = Saved()
    for part in parts:
        its = part.saved(agree=agree, keep=keep)
        saved.shared.add(its.shared)
        saved.own.add(its.own)
    return saved


def check_all(parts: list[Part], saved: Saved, *, same_number: bool) -> Restored:
    """All parts check theirs, `CheckpointError`; the result takes everything up, in their order."""
    acts = [part.restore(saved, same_number=same_number) for part in parts]

    def take_up() -> None:
        for act in acts:
            act()

    return take_up
