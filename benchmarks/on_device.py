"""
What a round costs on a device: its arithmetic against the bytes that it must move, and a step with an overlapped round
against the step alone. Parts of `round_cost.py`; they run on the CPU too, where their targets are not meant.

Lines 7 and 8 of Algorithm 1, per fp32 element:

    velocity <- beta r velocity + pseudo_grad     read velocity, pseudo_grad; write velocity
    anchor   <- anchor - alpha velocity           read anchor (velocity is at hand); write anchor

Five fp32 numbers must move: `ARITHMETIC_BYTES` = 20. Two kernels, which read velocity once more, move 24. In a whole
round without a message nine must: `ROUND_BYTES` = 36.

    message     <- anchor - x_i                   read anchor, x_i; write message
    lines 7, 8                                    read message, velocity, anchor; write velocity, anchor
    x_i         <- anchor                         write x_i (anchor is at hand)

A card's bandwidth is what a plain copy from device memory to device memory reaches in the same repetition; a copy of n
bytes moves 2 n.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from measuring import interleaved, milliseconds, quantile, ratio
from round_parts import BETA, BenchmarkArguments, local_training, outer_step_of, round_model, step_model, step_of
from slowmo_hf import SlowMoConfig, SlowMoOptimizer

ARITHMETIC_BYTES = 5 * 4
ROUND_BYTES = 9 * 4


class FlatUpdate:
    """Lines 7 and 8 on one flat tensor, two kernels: what the package's per-tensor form is held against."""

    def __init__(self, elements: int, device: str) -> None:
        self.anchor, self.velocity = torch.zeros(2, elements, device=device).unbind()
        self.pseudo_grad = torch.full((elements,), 1e-3, device=device)

    def __call__(self) -> None:
        torch.add(self.pseudo_grad, self.velocity, alpha=BETA, out=self.velocity)
        self.anchor.sub_(self.velocity)


class Copy:
    """A copy from device memory to device memory."""

    def __init__(self, nbytes: int, device: str) -> None:
        self.source, self.target = torch.zeros(2, nbytes, dtype=torch.uint8, device=device).unbind()

    def __call__(self) -> None:
        self.target.copy_(self.source)


def measure_arithmetic(args: BenchmarkArguments) -> dict[str, Any]:
    """Lines 7 and 8, and a whole round of a worker alone, against their bytes at the measured bandwidth."""
    model = round_model(args).to(args.device)
    optimizer = local_training(model, sync_every=1)
    elements = sum(p.numel() for p in model.parameters())
    calls: dict[str, Callable[[], Any]] = {
        "copy": Copy(args.copy_bytes, args.device),
        "outer step": outer_step_of(optimizer),
        "one flat update": FlatUpdate(elements, args.device),
        "round without a message": optimizer.step,
    }
    seconds = interleaved(calls, args.repeats, device=args.device)
    bandwidths = [2 * args.copy_bytes / value for value in seconds["copy"]]
    lines = [elements * ARITHMETIC_BYTES / bandwidth for bandwidth in bandwidths]
    whole = [elements * ROUND_BYTES / bandwidth for bandwidth in bandwidths]
    return {
        "parameters": elements,
        "tensors": len(list(model.parameters())),
        "bytes_per_element": {"lines 7 and 8": ARITHMETIC_BYTES, "round without a message": ROUND_BYTES},
        "copy_bytes": args.copy_bytes,
        "bandwidth_gb_per_s": round(quantile(bandwidths, 0.5) / 1e9, 1),
        **{name: milliseconds(values) for name, values in seconds.items()},
        "lines 7 and 8 at the bandwidth": milliseconds(lines),
        "outer step / its bytes": ratio(seconds["outer step"], lines, at_most=1.5),
        "one flat update / its bytes": ratio(seconds["one flat update"], lines),
        "round without a message / its bytes": ratio(seconds["round without a message"], whole),
    }


def measure_overlap(args: BenchmarkArguments) -> dict[str, Any]:
    """
    Mean step of `sync_every` steps: alone, with a round that travels behind `overlap_steps` of them, with one that is
    waited for. All of an overlapped round lies inside one timing: it sets out at the second step and is taken in
    before the last.
    """
    if args.overlap_steps > args.sync_every - 3:
        raise ValueError(
            f"overlap_steps must be at most sync_every - 3 = {args.sync_every - 3}, got {args.overlap_steps}: a round "
            "begins and ends inside what is timed. Raise --sync_every."
        )
    bare = step_model(args).to(args.device)
    tokens = torch.randint(1024, (max(1, args.step_tokens // 64), 64), device=args.device)
    settings = {"round overlapped": {"overlap_steps": args.overlap_steps}, "round waited for": {}}
    models = {name: copy.deepcopy(bare) for name in settings}
    steps = {"alone": step_of(bare, torch.optim.AdamW(bare.parameters(), lr=1e-4), tokens)}
    for name, own in settings.items():
        inner = torch.optim.AdamW(models[name].parameters(), lr=1e-4)
        config = SlowMoConfig(sync_every=args.sync_every, outer_momentum=BETA, inner_state="maintain", **own)
        steps[name] = step_of(models[name], SlowMoOptimizer(inner, config), tokens)
    for step in steps.values():
        for _ in range(args.sync_every - 2):
            step()
    cycles = {name: repeated(step, args.sync_every) for name, step in steps.items()}
    seconds = interleaved(cycles, args.repeats, device=args.device)
    per_step = {name: [value / args.sync_every for value in values] for name, values in seconds.items()}
    return {
        "parameters": sum(p.numel() for p in bare.parameters()),
        "tokens": tokens.numel(),
        "sync_every": args.sync_every,
        "overlap_steps": args.overlap_steps,
        "processes": args.processes,
        **{f"step, {name}": milliseconds(values) for name, values in per_step.items()},
        "overlapped / alone": ratio(per_step["round overlapped"], per_step["alone"], at_most=1.01),
        "waited for / alone": ratio(per_step["round waited for"], per_step["alone"]),
    }


def repeated(step: Callable[[], None], times: int) -> Callable[[], None]:
    """That many steps as one call."""

    def steps() -> None:
        for _ in range(times):
            step()

    return steps
