"""What users hand to `SlowMoCallback` and `SlowMoOptimizer` as settings: one rule for both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from ..config import SlowMoConfig
from ..hints import as_settings

Settings: TypeAlias = SlowMoConfig | dict[str, Any] | None  # None: the defaults


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
