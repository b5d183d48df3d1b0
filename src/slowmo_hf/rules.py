"""What settings need of each other: one table, which checks a configuration and prints the table of the docs."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from .names import OUTER_UPDATES

GOSSIP_BASES = ("sgp", "osgp", "dpsgd")
SLOW_MOMENTUM = "slow_momentum"


@dataclass(frozen=True)
class Rule:
    """
    One need.

    Args:
        setting (`str`): Whose.
        needs (`str`): The other setting, or a name of `MEANS`.
        allowed (`Collection`): The other's values that will do.
        because (`str`): Why.
        values (`tuple`, *optional*): The setting's values that have this need; all but its default where it is empty.
    """

    setting: str
    needs: str
    allowed: Collection[Any]
    because: str
    values: tuple[Any, ...] = ()

    def concerns(self, config: Any) -> bool:
        """Whether the setting has a value with this need."""
        value = getattr(config, self.setting)
        return value in self.values if self.values else value != getattr(type(config), self.setting)

    def broken_by(self, config: Any) -> str:
        """Setting, value, rule, reason and way out; empty where the rule holds."""
        if not self.concerns(config) or getattr(config, self.needs) in self.allowed:
            return ""
        value, default = getattr(config, self.setting), getattr(type(config), self.setting)
        words, names = MEANS.get(self.needs, (_either(self.needs, self.allowed), (self.needs,)))
        got = ", ".join(f"{name}={getattr(config, name)!r}" for name in names)
        return (
            f"{self.setting}={value!r} needs {words}, got {got}: {self.because}. Leave {self.setting} at {default!r}, "
            f"or change {' or '.join(names)}."
        )


def _either(name: str, allowed: Collection[Any]) -> str:
    return " or ".join(f"{name}={value!r}" for value in allowed)


# Needs that are no setting: properties of `SlowMoConfig`, in words, and the settings that make them.
MEANS = {
    "has_outer_update": ("a round that changes parameters", ("base", "outer_momentum", "outer_lr")),
    "averages_at_rounds": ("a round that averages parameters", ("base", "exact_average")),
}

RULES = (
    Rule("topology", "base", GOSSIP_BASES, "it says who sends to whom in gossip"),
    Rule("peers", "base", GOSSIP_BASES, "it says to how many workers each sends in gossip"),
    Rule("exact_average", "base", GOSSIP_BASES, "without gossip nothing else would bring workers together"),
    Rule("staleness", "base", ("osgp",), "its exchange alone travels while the next steps compute"),
    Rule(
        "topology",
        "base",
        ("sgp", "osgp"),
        "dpsgd's exchange is two-sided, and there who sends does not receive from the same worker",
        values=("exponential",),
    ),
    Rule("overlap_steps", "base", ("local_sgd",), "exchanges at every step would mix with a round in flight"),
    Rule("overlap_steps", "inner_state", ("auto", "reset", "maintain"), "inner states are averaged at once, and wait"),
    Rule("compression", "base", ("local_sgd",), "the average of a round alone can travel compressed"),
    Rule(
        "shard_slow_state",
        "base",
        ("local_sgd",),
        "gossip and all_reduce need the anchors, or their layout, at every step",
    ),
    Rule("shard_slow_state", "outer_optimizer", OUTER_UPDATES, "another optimizer may need whole tensors"),
    Rule("shard_slow_state", "compression", ("none",), "small codes need the origin, which a shard's owner alone has"),
    Rule("slow_state_device", "shard_slow_state", (True,), "a whole slow state lies where the parameters are"),
    Rule(
        "processes_per_worker",
        "base",
        ("local_sgd", *GOSSIP_BASES),
        "all_reduce averages gradients over all processes, and has no workers that train alone",
    ),
    Rule("outer_momentum", "outer_optimizer", OUTER_UPDATES, "another has its own, in outer_optimizer_kwargs"),
    Rule("inner_state", "has_outer_update", (True,), "elsewhere there is nothing to reset for", values=("reset",)),
    Rule("inner_state", "averages_at_rounds", (True,), "elsewhere no average is taken", values=("average",)),
)


def check(config: Any) -> None:
    """Raise `ValueError` for the first rule that a configuration breaks."""
    for rule in RULES:
        words = rule.broken_by(config)
        if words:
            raise ValueError(words)


def table() -> str:
    """All rules, for the docs."""
    lines = ["| setting | needs | because |", "|---|---|---|"]
    for rule in RULES:
        of = " or ".join(f"`{value!r}`" for value in rule.values)
        needs = MEANS[rule.needs][0] if rule.needs in MEANS else f"`{rule.needs}` "
        allowed = "" if rule.needs in MEANS else " or ".join(f"`{value!r}`" for value in rule.allowed)
        lines.append(f"| `{rule.setting}`{' ' + of if of else ''} | {needs}{allowed} | {rule.because} |")
    return "\n".join(lines)
