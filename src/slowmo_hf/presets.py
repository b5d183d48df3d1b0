"""Settings under the name of a method or a paper, in one call each."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal

from .hints import as_settings, unknown_settings
from .names import Base
from .rules import GOSSIP_BASES
from .values import number

if TYPE_CHECKING:
    from typing_extensions import Self

# The paper's base-optimizer state and period, by task (PAPER: 48 inner steps for gossip bases, 12 for Local SGD).
_PAPER_TASKS = {"cifar10": "reset", "imagenet": "reset", "wmt16": "maintain"}


class Presets:
    """
    Makes a `SlowMoConfig` of a known method: `SlowMoConfig.diloco(sync_every=100)`. Where a preset takes `settings`,
    those are fields of `SlowMoConfig`.
    """

    if TYPE_CHECKING:  # `dataclass` makes the subclass's own

        def __init__(self, **settings: Any) -> None: ...

    def __new__(cls, *unnamed: Any, **settings: Any) -> Self:
        """Python's own words for a wrong name do not say which is right."""
        owner = next(kind for kind in cls.__mro__ if "__init__" in vars(kind))
        if "__dataclass_params__" not in vars(owner):  # a subclass's own: what it takes is its own
            return super().__new__(cls)
        if unnamed:
            ways = " or ".join(as_settings(unnamed[0]))
            raise TypeError(f"SlowMoConfig takes its settings by name, got {unnamed[0]!r}. Write {ways}.")
        unknown = unknown_settings(settings, getattr(cls, "__dataclass_fields__", settings))
        if unknown:
            raise TypeError(unknown)
        return super().__new__(cls)

    @classmethod
    def paper(
        cls, task: Literal["cifar10", "imagenet", "wmt16"], base: Base = "local_sgd", *, outer_momentum: float
    ) -> Self:
        """
        The paper's setting for a task (section 5): tau 12 for Local SGD and 48 for gossip (12 on CIFAR-10), alpha 1,
        inner state reset for the image tasks and maintained for WMT'16. beta is required: it was tuned per row,
        "typically 0.4 to 0.8", and each row's is not known here.
        """
        if task not in _PAPER_TASKS:
            raise ValueError(f"task must be one of {', '.join(_PAPER_TASKS)}, got {task!r}.")
        sync_every = 48 if base in GOSSIP_BASES and task != "cifar10" else 12
        # AR-SGD has no rounds.
        inner_state = "auto" if base == "all_reduce" and outer_momentum == 0 else _PAPER_TASKS[task]
        return cls(base=base, sync_every=sync_every, outer_momentum=outer_momentum, inner_state=inner_state)

    @classmethod
    def local_sgd(cls, sync_every: int = 12, **settings: Any) -> Self:
        """Local SGD: periodic parameter averaging, alpha 1, beta 0."""
        _refuse_twice("local_sgd", settings, outer_lr="", outer_momentum="")
        return cls(sync_every=sync_every, outer_lr=1.0, outer_momentum=0.0, **settings)

    @classmethod
    def bmuf(cls, *, block_momentum: float, block_lr: float = 1.0, nesterov: bool = False, **settings: Any) -> Self:
        """BMUF: `v <- block_momentum v + block_lr Delta; x <- x - v`, no lr ratio; NBM with `nesterov=True`."""
        block_momentum = number("block_momentum", float, block_momentum)
        _refuse_twice(
            "bmuf",
            settings,
            outer_lr="block_lr",
            outer_momentum="block_momentum",
            outer_optimizer="",
            outer_optimizer_kwargs="block_momentum and nesterov",
        )
        kwargs = json.dumps({"momentum": block_momentum, "nesterov": nesterov})
        return cls(outer_optimizer="torch.optim.SGD", outer_optimizer_kwargs=kwargs, outer_lr=block_lr, **settings)

    @classmethod
    def diloco(
        cls, *, sync_every: int = 500, outer_lr: float = 0.7, nesterov_momentum: float = 0.9, **settings: Any
    ) -> Self:
        """DiLoCo (https://huggingface.co/papers/2311.08105): outer Nesterov SGD, inner state kept by each worker."""
        _refuse_twice(
            "diloco",
            settings,
            outer_momentum="nesterov_momentum",
            outer_optimizer="",
            outer_optimizer_kwargs="nesterov_momentum",
        )
        nesterov_momentum = number("nesterov_momentum", float, nesterov_momentum)
        kwargs = json.dumps({"momentum": nesterov_momentum, "nesterov": True})
        settings = {"inner_state": "maintain", **settings}
        return cls(
            sync_every=sync_every,
            outer_optimizer="torch.optim.SGD",
            outer_optimizer_kwargs=kwargs,
            outer_lr=outer_lr,
            **settings,
        )

    @classmethod
    def lookahead(cls, *, sync_every: int = 5, outer_lr: float = 0.5, **settings: Any) -> Self:
        """Lookahead (https://huggingface.co/papers/1907.08610) at one worker: alpha < 1, beta 0, inner state kept."""
        _refuse_twice("lookahead", settings, outer_momentum="")
        settings = {"inner_state": "maintain", **settings}
        return cls(sync_every=sync_every, outer_lr=outer_lr, outer_momentum=0.0, **settings)


def _refuse_twice(preset: str, settings: dict[str, Any], **its_own: str) -> None:
    """A preset sets these itself; beside each the argument of the preset that says it, where there is one."""
    for name in settings:
        if name in its_own:
            instead = f"write {its_own[name]} in its place" if its_own[name] else "leave it out"
            raise ValueError(
                f"SlowMoConfig.{preset} sets {name} itself, got {name}={settings[name]!r}: {instead}, or write "
                f"SlowMoConfig({name}=...) without the preset."
            )
