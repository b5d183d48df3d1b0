"""What a newcomer probably meant: the nearest name, and ours for other libraries' settings."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, get_args

from .names import Base

# Settings of accelerate's and torchft's LocalSGD and DiLoCo, of torch's and fairscale's SlowMo, and of the
# papers: what ours is called.
_ELSEWHERE = {
    "sync_every": "H local_sgd_steps local_steps tau slowmo_freq slowmo_frequency localsgd_frequency period "
    "communication_period averaging_period average_every avg_freq inner_steps num_inner_steps sync_steps sync_freq "
    "sync_frequency sync_interval steps_per_round",
    "outer_momentum": "beta slow_momentum slowmo_factor slowmo_momentum slowmo_beta block_momentum server_momentum "
    "momentum nesterov_momentum",
    "outer_lr": "alpha slowmo_lr slow_lr slowmo_alpha server_lr block_lr outer_learning_rate",
    "base": "base_algorithm slowmo_base_algorithm algorithm method inner_method",
    "outer_optimizer": "outer_optim server_optimizer",
    "processes_per_worker": "nprocs_per_node workers_per_node gpus_per_worker gpus_per_node",
    "overlap_steps": "fragment_sync_delay delay sync_delay",
    "compression": "should_quantize quantize quantization codec",
    "topology": "graph graph_type",
    "peers": "peers_per_itr num_peers neighbors",
    "bucket_bytes": "bucket_cap_mb bucket_size buffer_size",
    "timeout_seconds": "timeout ddp_timeout",
    "shard_slow_state": "shard zero slowmo_zero",
    "model_buffers": "buffers batch_norm",
}
OTHER_NAMES = {theirs: ours for ours, names in _ELSEWHERE.items() for theirs in names.split()}

# How a preset is called, where a name alone was given.
PRESETS = {
    "paper": 'SlowMoConfig.paper("cifar10", outer_momentum=0.6)',
    "local_sgd": "SlowMoConfig.local_sgd()",
    "bmuf": "SlowMoConfig.bmuf(block_momentum=0.9)",
    "diloco": "SlowMoConfig.diloco()",
    "lookahead": "SlowMoConfig.lookahead()",
}


def nearest(wrong: Any, known: Iterable[str]) -> str | None:
    """Of the known names the one that was probably meant, whatever its case, dashes and underscores; None if none."""
    plain = {_bare(name): name for name in known}
    found = difflib.get_close_matches(_bare(str(wrong)), plain, n=1, cutoff=0.7)
    return plain[found[0]] if found else None


def _bare(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def did_you_mean(wrong: Any, known: Iterable[str]) -> str:
    """The words, with the space before them; nothing where no name is near."""
    found = nearest(wrong, known)
    return f" Did you mean {found!r}?" if found else ""


def unknown_settings(given: Iterable[Any], known: Iterable[str]) -> str:
    """What to say of names that are no settings; nothing where all are."""
    known = sorted(known)
    unknown = sorted(str(name) for name in given if name not in known)
    meant = {name: OTHER_NAMES.get(name) or nearest(name, known) for name in unknown}
    words = " and ".join(f"{ours} in place of {name}" for name, ours in meant.items() if ours)
    words = f" Did you mean {words}?" if words else ""
    return f"unknown settings {unknown}.{words} SlowMoConfig has {', '.join(known)}." if unknown else ""


def as_settings(value: Any) -> list[str]:
    """
    How to write as a `SlowMoConfig` what was given in place of one: `24`, `"sgp"`, the class itself. Two ways
    for `"local_sgd"`: the base has slow momentum, the preset has none.
    """
    if isinstance(value, str):
        base, preset = nearest(value, get_args(Base)), nearest(value, PRESETS)
        ways = [*([f"SlowMoConfig(base={base!r})"] if base else []), *([PRESETS[preset]] if preset else [])]
        return ways or ["SlowMoConfig()"]
    if isinstance(value, Mapping):
        return ["SlowMoConfig(**settings)"]
    if getattr(value, "__name__", None) in PRESETS:  # the method, not called
        return [PRESETS[value.__name__]]
    if isinstance(value, type):
        return ["SlowMoConfig()"]
    steps = value if isinstance(value, int) and not isinstance(value, bool) else 24
    return [f"SlowMoConfig(sync_every={steps})"]
