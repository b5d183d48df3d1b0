"""What `dry_run.py` has found, as the two tables of docs/launch.md."""

from __future__ import annotations

from typing import Any

NAMES = {"local_sgd": "Local Adam", "sgp": "SGP", "all_reduce": "AR-Adam"}


def tables(record: dict[str, Any]) -> str:
    """What was measured, then what was worked out; a part that has not run yet is left out."""
    found = [
        text
        for name, text in (("preprocessing", _found), ("arithmetic", _worked_out))
        if name in record
        for text in [text(record)]
    ]
    return "\n\n".join(found)


def _found(record: dict[str, Any]) -> str:
    found, stages = record["preprocessing"], record["preprocessing"]["stages"]
    second, resume, disk = found["second_process"], found["resume"], found["disk_bytes"]
    held = found["tokens_per_update"]
    per_million = stages["encode"]["cpu_seconds"] / found["text_pairs"] * 1e6
    orders = [rank["seconds_of_the_order_after_the_skip"] for rank in resume["ranks"]]
    exact = all(rank["same_order"] for rank in resume["ranks"]) and resume["same_tensors"]
    bpe = f"train the BPE, {found['vocabulary']:,} tokens, {found['text_pairs']:,} pairs"
    rows = {
        "training pairs": f"{found['pairs']:,}, of them {found['empty_pairs']:,} with an empty line",
        "tokens of a pair, mean": f"{found['mean_tokens']['source']:.1f} source, "
        f"{found['mean_tokens']['target']:.1f} target",
        "read and check": _cost(stages["load"]),
        bpe: _cost(stages["train the BPE"]),
        f"encode, {found['text_pairs']:,} pairs": f"{_cost(stages['encode'])}; {per_million:,.0f} s a million",
        "the same again, from the cache": f"{_cost(second)}",
        "batches of an epoch": f"{_cost(stages['batches of an epoch'])}",
        "Parquet; caches": f"{_gb(disk['parquet'])}; {_gb(disk['caches'])}",
        "updates of an epoch, 64 processes": f"{found['updates_per_epoch']:,}",
        "target tokens of an update": f"{held['target']:,.0f}; {held['target_padded']:,.0f} with padding",
        "padding": f"{found['padding']:.1%} of all positions",
        "resumed in the middle of an epoch": f"{'the same batches' if exact else 'OTHER BATCHES'}, "
        f"{max(orders):.1f} s on the clock for their order",
    }
    for step in record.get("steps", {}).values():
        rows |= _step(step["ranks"])
    return _table(("measured", "figure"), rows)


def step_name(ranks: list[dict[str, Any]]) -> str:
    """Of its processes, and of its micro-batches where they are more than one."""
    count = ranks[0]["micro_batches"]
    processes = "one process" if len(ranks) == 1 else f"{len(ranks)} processes"
    return processes + (f", {count} micro-batches" if count > 1 else "")


def _step(ranks: list[dict[str, Any]]) -> dict[str, str]:
    first = ranks[0]
    who = f"`{first['model_size']}`, {step_name(ranks)}"
    passes, update = (
        max(rank[key]["cpu_seconds"] for rank in ranks) for key in ("forward_and_backward", "inner_update")
    )
    peak = max(rank["stages"]["train"]["peak_bytes"] for rank in ranks)
    count = first["micro_batches"]
    work = f"{count} micro-batch{'es' if count > 1 else ''} of {first['max_tokens']:,} positions"
    rows = {
        f"{who}: forward and backward": f"{work}, {passes:,.1f} CPU s",
        f"{who}: Adam": f"{update:,.1f} CPU s",
        f"{who}: peak of memory": f"{_gb(peak)} a process",
        f"{who}: the checkpoint": _gb(sum(first["checkpoint_bytes"].values())),
    }
    if len(ranks) > 1:
        rows[f"{who}: the round"] = f"{first['bytes_sent']:,} bytes sent by each"
    return rows


def _worked_out(record: dict[str, Any]) -> str:
    lines = ["| row | hours | updates | rounds | bytes a node sends | checkpoints, all; a machine |", "|" + "---|" * 6]
    for row in record["arithmetic"]["rows"]:
        name = NAMES[row["base"]] + (" + SlowMo" if row["outer_momentum"] else "")
        lines.append(
            f"| {name} | {row['hours']:.1f} | {row['updates']:,} | {row['rounds']:,} | {_gb(row['bytes_per_node'])} "
            f"| {_gb(row['disk_bytes_shared_by_all'])}; {_gb(row['disk_bytes_of_each_machine'])} |"
        )
    return "\n".join(lines)


def _table(head: tuple[str, str], rows: dict[str, str]) -> str:
    return "\n".join(
        [f"| {head[0]} | {head[1]} |", "|---|---|", *(f"| {name} | {said} |" for name, said in rows.items())]
    )


def _cost(stage: dict[str, float]) -> str:
    return f"{stage['cpu_seconds']:,.1f} CPU s, {_gb(stage['peak_bytes'])}, {_gb(stage['peak_private_bytes'])} private"


def _gb(number: float) -> str:
    return f"{number / 1e9:,.2f} GB" if number < 1e12 else f"{number / 1e12:,.2f} TB"
