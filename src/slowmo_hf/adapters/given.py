"""What users hand to `SlowMoCallback` and `SlowMoOptimizer` as settings: one rule for both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias, overload

from ..config import SlowMoConfig
from ..hints import as_settings

Settings: TypeAlias = SlowMoConfig | dict[str, Any] | None  # None: the defaults


class ConfigInUse:
    """
    The attribute `config`: it may be set until training starts; the callback's again when that has ended.

    Args:
        training (`str`): The attribute that is true while its owner trains.
    """

    def __init__(self, training: str) -> None:
        self._training = training

    @overload
    def __get__(self, owner: None, kind: type[Any]) -> ConfigInUse: ...
    @overload
    def __get__(self, owner: object, kind: type[Any]) -> SlowMoConfig: ...
    def __get__(self, owner: object | None, kind: type[Any]) -> ConfigInUse | SlowMoConfig:
        if owner is None:
            return self
        if "config" not in vars(owner):
            raise AttributeError("config")  # of a copy that is being made
        config: SlowMoConfig = vars(owner)["config"]
        return config

    def __set__(self, owner: object, config: SlowMoConfig) -> None:
        other = _difference(vars(owner)["config"], config) if vars(owner).get(self._training) else ""
        if other:
            raise ValueError(
                f"config cannot change while training, got {other}: the rounds have what they began with, on all "
                "ranks. End this training, and begin another with other settings."
            )
        vars(owner)["config"] = config


def _difference(has: SlowMoConfig, given: Any) -> str:
    """The first setting that is another, with its values; empty where none is."""
    if not isinstance(given, SlowMoConfig):
        return what_is(given)
    now, then = given.to_dict(), has.to_dict()
    return next((f"{name}={now[name]!r} in place of {then[name]!r}" for name in now if now[name] != then[name]), "")


def config_of(config: Any, settings: dict[str, Any], write: str) -> SlowMoConfig:
    """
    The settings that a user means.

    Args:
        config (`SlowMoConfig` or `dict`, *optional*): As it was given.
        settings (`dict[str, Any]`): Fields of `SlowMoConfig` that were given by name, in place of `config`.
        write (`str`): The call, with `{}` where the settings belong: the way out.

    Raises:
        ValueError: Something else was given, or both.
        TypeError: `settings` holds no field of `SlowMoConfig`.
    """
    if settings:
        if config is not None:
            got = ", ".join(f"{name}={value!r}" for name, value in settings.items())
            raise ValueError(f"config must hold all settings, got others beside it: {got}. Put them into config.")
        return SlowMoConfig(**settings)
    if config is None:
        return SlowMoConfig()
    if isinstance(config, SlowMoConfig):
        return config
    if isinstance(config, Mapping):
        return SlowMoConfig.from_dict(dict(config))
    ways = " or ".join(write.format(way) for way in as_settings(config))
    raise ValueError(
        f"config must be a SlowMoConfig, or a dictionary of its fields, got {what_is(config)}. Write {ways}."
    )


def what_is(value: Any) -> str:
    """The value in short; what belongs elsewhere is named with its place."""
    kinds = {kind.__name__ for kind in type(value).__mro__}
    for kind, place in {
        "TrainingArguments": "which is for Trainer(args=...)",
        "Trainer": "which takes the callback: trainer.add_callback(...)",
        "Module": "which is for the Trainer, or for accelerator.prepare",
        "Optimizer": "which is for SlowMoOptimizer",
        "Accelerator": "whose prepare takes the SlowMoOptimizer",
        "SlowMoCallback": "which is made already",
        "SlowMoConfig": "which is the second argument",
    }.items():
        if kind in kinds:
            return f"a {type(value).__name__}, {place}"
    return " ".join(repr(value).split())[:80]
