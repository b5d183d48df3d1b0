"""Rows of the paper's Table 1 as flags: `--preset` names the task, `--base` and `--outer_momentum` the row."""

from __future__ import annotations

from typing import Any

from transformers import HfArgumentParser

from slowmo_hf import SlowMoConfig


def set_preset(
    parser: HfArgumentParser, flags: list[str], presets: dict[str, dict[str, Any]], paper_task: str | None = None
) -> None:
    """
    Make `--preset` the defaults of a parser, which other flags override. Period, inner state and exact average follow
    the base, as in the paper, where gossip without slow momentum never averages exactly.

    Args:
        presets (`dict`): Defaults by the preset's name.
        paper_task (`str`, *optional*): As `SlowMoConfig.paper` names it; the preset's own name where it is None.
    """
    preset = parser.parse_known_args(flags)[0].preset
    if preset is None:
        return
    parser.set_defaults(**presets[preset])
    asked = parser.parse_known_args(flags)[0]
    config = SlowMoConfig.paper(paper_task or preset, asked.base, outer_momentum=asked.outer_momentum)
    gossip_alone = config.gossips and not asked.outer_momentum
    parser.set_defaults(
        output_dir=f"outputs/{preset}_{asked.base}{'_slowmo' if asked.outer_momentum else ''}",
        sync_every=config.sync_every,
        # Nothing resets without an outer update.
        inner_state="auto" if gossip_alone and config.inner_state == "reset" else config.inner_state,
        exact_average=not gossip_alone,
    )
    if asked.base == "all_reduce":
        # Has no workers of several processes.
        parser.set_defaults(processes_per_worker=SlowMoConfig.processes_per_worker)
