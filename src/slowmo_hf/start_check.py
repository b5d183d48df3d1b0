"""The start of a run: every rank shows what it has, a difference is an error on all of them, and one table says what runs."""

from __future__ import annotations

import hashlib
import os

import accelerate
import torch

from .communicator import Communicator, host_and_address
from .config import SlowMoConfig
from .log import logger
from .model_tensors import ModelTensors


def check_same_everywhere(communicator: Communicator, config: SlowMoConfig, tensors: ModelTensors) -> None:
    """
    Compare settings, parameters, initial learning rates and versions of all ranks, before any value is exchanged.

    Raises:
        ValueError: They differ, or a rank has a parameter that cannot be averaged; the same words on every rank.
    """
    lines = [
        *(f"SlowMoConfig.{name} = {value!r}" for name, value in config.to_dict().items()),
        *(f"inner learning rate of group {index} = {lr!r}" for index, lr in enumerate(tensors.initial_lrs)),
        f"torch {torch.__version__}",
        f"accelerate {accelerate.__version__}",
        *tensors.fingerprint(),
    ]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    everywhere = communicator.gather_objects((digest, tensors.refusal()))
    refusals = [f"rank {rank}: {refusal}" for rank, (_, refusal) in enumerate(everywhere) if refusal]
    if refusals:
        raise ValueError("; ".join(refusals))
    if any(other != digest for other, _ in everywhere) or len({d for d, _ in everywhere}) > 1:
        raise ValueError(_difference(communicator.gather_objects(lines)))


def _difference(everywhere: list[list[str]]) -> str:
    for rank, lines in enumerate(everywhere):
        only_there = [line for line in lines if line not in set(everywhere[0])]
        only_here = [line for line in everywhere[0] if line not in set(lines)]
        if only_there or only_here or lines != everywhere[0]:
            return (
                f"ranks differ: rank 0 has {only_here[:3] or 'another order'}, rank {rank} has {only_there[:3] or 'another order'}. "
                "All ranks must start with the same settings, model, learning rates and library versions."
            )
    raise AssertionError("no difference found")


def log_start(communicator: Communicator, config: SlowMoConfig, inner_state: str, machines: int) -> None:
    """One table on rank 0: every rank's host, address, backend and worker, and the whole effective configuration."""
    host, address = host_and_address()
    rows = communicator.gather_objects((host, address, communicator.backend, communicator.rank))
    if communicator.rank:
        return
    lines = [f"{communicator.world_size} workers, one process each, on {machines} machine(s):"]
    lines += [f"{'rank':>6}  {'worker':>6}  {'backend':<12} {'address':<16} host"]
    lines += [f"{r:>6}  {w:>6}  {backend:<12} {address:<16} {host}" for r, (host, address, backend, w) in enumerate(rows)]
    lines += [f"  {name} = {value}" for name, value in config.to_dict().items()]
    lines += [f"  inner_state in effect = {inner_state}"]
    logger.info("%s", "\n".join(lines))
    loopback = [f"{name} (rank {r}) resolves to {address}" for r, (name, address, _, _) in enumerate(rows) if address.startswith("127.")]
    if machines > 1 and loopback and "gloo" in communicator.backend and not _interface_is_set():
        logger.warning(
            "the host name %s, a loopback address, in a job of %d machines: set GLOO_SOCKET_IFNAME to the interface that reaches the "
            "others (docs/launch.md).",
            "; ".join(loopback),
            machines,
        )
    if communicator.world_size == 1:
        logger.warning(
            "one worker: nothing is averaged. If you meant several, note that `accelerate launch --cpu --num_processes 2` starts "
            "one process; see docs/launch.md."
        )
    if config.outer_optimizer == "slow_momentum" and config.outer_momentum == 0:
        logger.info("slow momentum is off: this is Local SGD")


def _interface_is_set() -> bool:
    return bool(os.environ.get("GLOO_SOCKET_IFNAME"))
