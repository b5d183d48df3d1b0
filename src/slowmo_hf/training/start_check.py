"""The start of a run: every rank shows what it has, and a difference is an error on all of them."""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import accelerate
import torch

from ..config import SlowMoConfig
from ..wire.job import host_name, launcher_tells_machines, most_on_a_host, said_by_ranks
from ..wire.workers import Workers
from .model_tensors import ModelTensors

T = TypeVar("T")


def check_start(
    workers: Workers, config: SlowMoConfig, tensors: ModelTensors, refusal: str | None, begins_at: int | None = 0
) -> None:
    """
    Compare settings, parameters, the inner optimizer, learning rates and versions of all ranks, before any value is
    exchanged. Where a run goes on, what a schedule sets is not compared.

    Args:
        refusal (`str`, *optional*): Why this rank cannot start.
        begins_at (`int`, *optional*): The steps behind this run; None where a checkpoint that waits will say them.

    Raises:
        ValueError: They differ, a rank cannot start, or nobody says what a "node" is; the same words on every rank.
    """
    communicator = workers.world
    # In training a schedule's values may part (a scaler that skips on one rank holds it back), in a checkpoint too.
    is_fresh = begins_at == 0
    rates = [f"inner learning rate of group {index} = {lr!r}" for index, lr in enumerate(tensors.initial_lrs)]
    lines = [
        f"processes per worker = {workers.size}",
        *(f"SlowMoConfig.{name} = {value!r}" for name, value in config.to_dict().items()),
        *(rates if is_fresh else []),
        *_inner_optimizer(tensors.optimizer, [] if is_fresh else ["momentum", "betas"]),
        *_versions(),
        *tensors.fingerprint(),
    ]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    begins = {None: "from a checkpoint", 0: "fresh"}.get(begins_at, f"from a checkpoint of step {begins_at}")
    everywhere = communicator.gather_objects((digest, refusal, begins, host_name(), launcher_tells_machines()))
    hosts = [host for *_, host, _ in everywhere]
    _raise_told([(host, words or "") for _, words, _, host, _ in everywhere])
    _refuse_different_checkpoints([(host, begun) for *_, begun, host, _ in everywhere])
    if len({digest for digest, *_ in everywhere}) > 1:
        raise ValueError(_difference(communicator.gather_objects(lines), hosts, config))
    if config.processes_per_worker == "node" and config.base != "all_reduce" and not workers.holds_shards:
        _refuse_small_nodes(workers.size, *most_on_a_host((host, told) for *_, host, told in everywhere))


def _refuse_different_checkpoints(told: list[tuple[str, str]]) -> None:
    """Before learning rates, which differ with them."""
    (first_host, first), *others = told
    for rank, (host, begun) in enumerate(others, start=1):
        if begun != first:
            raise ValueError(
                f"ranks differ at the start: rank 0 on {first_host} begins {first}, rank {rank} on {host} {begun}. "
                "Load the same checkpoint on every rank: each one takes up a part of its own. Where machines have "
                "disks of their own it is the newest that all have (docs/checkpoints.md)."
            )


def _refuse_small_nodes(size: int, host: str, processes: int) -> None:
    if processes > size:
        raise ValueError(
            f"processes_per_worker='node' needs LOCAL_WORLD_SIZE from the launcher. It is {size}, as accelerate sets "
            f"it where no launcher does, and {host} has {processes} processes. Export it (srun: "
            f"LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE), or set processes_per_worker to a number."
        )


def made_everywhere(workers: Workers, make: Callable[[], T]) -> T:
    """
    What `make` returns. Collective.

    Raises:
        ValueError: It failed on some rank: an outer optimizer refuses the part of the model that lies there, or memory
            is short. The same words on every rank.
    """
    made: list[T] = []
    failure = ""
    try:
        made.append(make())
    except (ValueError, RuntimeError) as error:
        failure = str(error)
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"
    _raise_told(workers.world.gather_objects((host_name(), failure)))
    return made[0]


def _raise_told(told: list[tuple[str, str]]) -> None:
    """Raise `ValueError` for what ranks have told, host and words; what all say is said without ranks."""
    words = {said for _, said in told}
    if words != {""}:
        raise ValueError(said_by_ranks(told) if len(words) > 1 else words.pop())


def _inner_optimizer(optimizer: torch.optim.Optimizer, without: list[str]) -> list[str]:
    """
    Its class, and what its groups say of how it steps: numbers, flags and tuples of them that its constructor takes;
    others it tunes itself (Prodigy's `d`), each worker's its own. The learning rate has its own line.

    Args:
        without (`list[str]`): Names of what may differ.
    """
    taken = inspect.signature(type(optimizer).__init__).parameters
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in taken.values())
    return [f"inner optimizer {type(optimizer).__module__}.{type(optimizer).__qualname__}"] + [
        f"inner optimizer group {index}: {key} = {value!r}"
        for index, group in enumerate(optimizer.param_groups)
        for key, value in sorted(group.items())
        if key not in ("params", "lr", *without) and (takes_any or key in taken) and _is_plain(value)
    ]


def _is_plain(value: Any) -> bool:
    """No tensors: their words name the device, which is another on every rank."""
    if isinstance(value, (tuple, list)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float))


def _versions() -> list[str]:
    """
    Of the code that runs here, which may be newer than what an editable install remembers; of transformers, which a
    custom loop need not import, the installed one's. What follows a `+` is how a release was built, for which CUDA or
    ROCm: cards that are not alike may need others.
    """
    try:
        transformers = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:  # never an error on one rank: the others would wait for it
        transformers = "not installed"
    return [
        f"slowmo_hf {sys.modules['slowmo_hf'].__version__}",
        f"torch {torch.__version__.partition('+')[0]}",
        f"accelerate {accelerate.__version__}",
        f"transformers {transformers}",
    ]


def _difference(everywhere: list[list[str]], hosts: list[str], config: SlowMoConfig) -> str:
    for rank, lines in enumerate(everywhere):
        only_there = [line for line in lines if line not in set(everywhere[0])]
        only_here = [line for line in everywhere[0] if line not in set(lines)]
        if only_here == everywhere[0][:1]:  # processes per worker, of equal settings
            return (
                f"processes_per_worker={config.processes_per_worker!r} makes workers of several sizes: rank 0 on "
                f"{hosts[0]} has {only_here[0]}, rank {rank} on {hosts[rank]} has {only_there[0]}. All must have "
                "equally many: a machine's processes, as LOCAL_WORLD_SIZE says. Start as many on every machine, or "
                "set processes_per_worker=1."
            )
        if only_there or only_here or lines != everywhere[0]:
            return (
                f"ranks differ at the start: rank 0 on {hosts[0]} has {only_here[:3] or 'another order'}, rank {rank} "
                f"on {hosts[rank]} has {only_there[:3] or 'another order'}. All ranks must start with the same "
                "settings, model, learning rates and library versions."
            )
    raise AssertionError("no difference found")
