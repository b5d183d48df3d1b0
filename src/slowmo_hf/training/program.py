"""
Settings of the training program that are none of ours, compared at the start.

    max_grad_norm                  must agree: like the learning rate it says what a step does to the model
    gradient_accumulation_steps    must agree, as a step is then other work on every rank; but not where batch size
                                   times accumulation is the same on all: a worker with less memory cuts the same rows
                                   into smaller batches
    batch size                     may differ, for machines that are not alike, and is said: a stock run takes it too
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..log import logger
from ..wire.communicator import Communicator
from ..wire.job import host_name


@dataclass(frozen=True)
class Program:
    """
    What the adapter of one rank knows of them; None where it does not. Names are for the user, who has set them.

    Args:
        accumulation (`int`, *optional*): Micro-batches to an optimizer step.
        batch_size (`int`, *optional*): Rows to a micro-batch.
        must_agree (`tuple`): Other settings, each with its name.
        accumulation_name (`str`), batch_size_name (`str`): What they are called there.
    """

    accumulation: int | None = None
    batch_size: int | None = None
    must_agree: tuple[tuple[str, Any], ...] = ()
    accumulation_name: str = "gradient_accumulation_steps"
    batch_size_name: str = "per_device_train_batch_size"


def compare_programs(world: Communicator, mine: Program) -> None:
    """
    Compare all ranks' at the start; one warning where batch sizes differ. Collective.

    Raises:
        ValueError: Others differ; the same words on every rank.
    """
    told: list[tuple[str, Program]] = world.gather_objects((host_name(), mine))
    hosts, programs = [host for host, _ in told], [program for _, program in told]
    for place, (name, _) in enumerate(mine.must_agree):
        values = [program.must_agree[place][1] if program.must_agree else None for program in programs]
        _refuse_difference(name, values, hosts, "All ranks must clip alike.")
    sizes = [program.batch_size for program in programs]
    steps = [program.accumulation for program in programs]
    rows = {size * count if size and count else None for size, count in zip(sizes, steps, strict=True)}
    if len(rows) > 1 or None in rows:
        way_out = (
            "A step would be other work on every rank. For machines that are not alike let "
            f"{mine.batch_size_name} differ, or keep batch size times accumulation the same on all ranks."
        )
        _refuse_difference(mine.accumulation_name, steps, hosts, way_out)
    known = [size for size in sizes if size is not None]
    if len(set(known)) > 1:
        logger.warning(
            "%s differs: %s. Every worker counts alike in a round, whatever its batches hold; and where Accelerate "
            "deals out the rows of one data set by batches, some go to several workers, and others to none.",
            mine.batch_size_name,
            ", ".join(f"{size} on rank {rank}" for rank, size in enumerate(sizes)),
        )


def _refuse_difference(name: str, values: list[Any], hosts: list[str], way_out: str) -> None:
    known = [(rank, value) for rank, value in enumerate(values) if value is not None]
    for rank, value in known:
        first, first_value = known[0]
        if value != first_value:
            raise ValueError(
                f"ranks differ at the start: rank {first} on {hosts[first]} has {name} = {first_value!r}, rank {rank} "
                f"on {hosts[rank]} has {name} = {value!r}. {way_out}"
            )
