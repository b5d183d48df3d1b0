"""Facts of the job: its processes, their machines, and what carries their messages."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch.distributed as dist

from .. import upstream
from ..log import spoken_by
from . import in_process

_LET_GO_SECONDS = 0.1  # at a process's end
_NAMED = 8  # ranks that say the same
_LOCAL_SIZES_OF_MPI = ("MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE")
_SIOCGIFADDR = 0x8915  # Linux's number for "the address of this interface"


def in_each_child(act: Callable[[], object]) -> None:
    """Do it in every child of fork, which is no process of the job. Not where there is no fork."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=act)


def wire() -> Any:
    """torch.distributed; or, in a worker of `run_in_process`, what stands for it there."""
    return in_process.current() or dist


def backends() -> dict[str, str]:
    """The default group's backend by device type, for example {"cpu": "gloo", "cuda": "nccl"}."""
    return dict(pair.split(":") for pair in str(wire().get_backend_config()).split(",") if ":" in pair)


def job_store() -> Any:
    """
    The job's key-value store (`set`, `get`, `check`, `delete_key`), which lives in the launcher or with rank 0; None
    in a worker of `run_in_process`, where nobody can be missed.
    """
    return None if is_in_process() else upstream.default_store()


def leave_job() -> None:
    """
    End gloo's threads before the process ends: with torch 2.13 one process in seven that exits with a gloo group alive
    aborts ("terminate called without an active exception"), and a finished job counts as failed. A thread that is slow
    to let go of its last message still needs the interpreter, and gets a moment of it on both sides. Without the later
    one 2 of some 400 processes aborted on a busy machine. Without the earlier one, one in ten hung with torch 2.6 that
    left right after an all-gather: there the group's destructor keeps the interpreter while it waits for the thread.
    """
    if dist.is_available() and dist.is_initialized() and set(backends().values()) == {"gloo"}:
        time.sleep(_LET_GO_SECONDS)
        dist.destroy_process_group()
        time.sleep(_LET_GO_SECONDS)


def rank_in_job() -> int:
    """This process's rank in `torch.distributed`'s world; 0 where it is not initialised."""
    return int(wire().get_rank()) if _has_wire() else 0


def processes_in_job() -> int:
    """The size of `torch.distributed`'s world; 1 where it is not initialised."""
    return int(wire().get_world_size()) if _has_wire() else 1


def _has_wire() -> bool:
    return is_in_process() or (dist.is_available() and dist.is_initialized())


def is_in_process() -> bool:
    """Whether this is a worker of `run_in_process`: without DDP, launcher and time-outs."""
    return in_process.current() is not None


def processes_on_machine(world_size: int) -> int:
    """
    Processes of this job on this machine, from LOCAL_WORLD_SIZE and never from host names (containers share them).
    """
    return world_size if is_in_process() else int(os.environ.get("LOCAL_WORLD_SIZE", world_size))


def launcher_tells_machines() -> bool:
    """
    Whether LOCAL_WORLD_SIZE is the launcher's; without it all processes count as one machine's. A 1 may be
    accelerate's own: on CPUs `Accelerator()` writes it where no launcher has said anything, before we can look.
    """
    told = os.environ.get("LOCAL_WORLD_SIZE")
    if is_in_process() or told not in (None, "1"):
        return True
    by_mpi = any(name in os.environ for name in _LOCAL_SIZES_OF_MPI)
    return told == "1" and (by_mpi or (dist.is_available() and dist.is_torchelastic_launched()))


def most_on_a_host(told: Iterable[tuple[str, bool]]) -> tuple[str, int]:
    """
    The host with the most ranks among those whose launcher does not tell machines, and how many it has; ("", 0)
    without any.

    Args:
        told (`Iterable[tuple[str, bool]]`): Of each rank `host_name()` and `launcher_tells_machines()`.
    """
    untold = Counter(host for host, is_told in told if not is_told)
    return max(untold.items(), key=lambda item: item[1], default=("", 0))


def machines_in_job(world_size: int) -> int:
    """Number of machines; 1 where the launcher does not say."""
    return max(1, world_size // processes_on_machine(world_size))


def host_name() -> str:
    """This machine's name; nothing is looked up."""
    return socket.gethostname()


def said_by_ranks(told: list[tuple[str, str]], joint: str = ": ") -> str:
    """
    What ranks say, in one line, of host and words of each; no words where one says nothing. What several say is said
    once, behind their names; of many the first are named, behind the words of few.
    """
    at: dict[str, list[str]] = {}
    for rank, (host, words) in enumerate(told):
        if words:
            at.setdefault(words, []).append(f"rank {rank} on {host}")
    rare_first = sorted(at.items(), key=lambda item: len(item[1]) > _NAMED)
    return "; ".join(f"{_named(places, len(told))}{joint}{words}" for words, places in rare_first)


def _named(ranks: list[str], everyone: int) -> str:
    if 1 < len(ranks) == everyone:
        return f"{ranks[0]} and all others"
    more = len(ranks) - _NAMED
    return ", ".join(ranks[:_NAMED]) + (f" and {more:,} others" if more > 0 else "")


def host_and_address(backend: str) -> tuple[str, str]:
    """
    This machine's name, and the address that the backend binds here: of the interface that `GLOO_SOCKET_IFNAME` or
    `NCCL_SOCKET_IFNAME` names. Without, gloo takes the host name's address where it can be bound, else loopback, and
    NCCL decides by itself.
    """
    host = host_name()
    variable = "NCCL_SOCKET_IFNAME" if backend == "nccl" else "GLOO_SOCKET_IFNAME"
    # gloo takes a list of names; NCCL's may be a beginning, and `=` says that it is whole.
    interface = os.environ.get(variable, "").split(",")[0].removeprefix("=")
    if interface:
        return host, address_of_interface(interface)
    return host, "NCCL's choice" if backend == "nccl" else address_of_host(host)


def address_of_host(host: str) -> str:
    """
    The first of the name's addresses that can be bound on this machine; 127.0.0.1 without one, as gloo (torch 2.13,
    `ProcessGroupGloo::createDefaultDevice`).
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        found = []
    for family, kind, protocol, _, address in found:
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.bind(address)
            except OSError:
                continue
            return str(address[0])
    return "127.0.0.1"


def address_of_interface(name: str) -> str:
    """The IPv4 address of this machine's interface of that name; the name itself where that cannot be told."""
    try:
        import fcntl  # of Unix alone

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            request = struct.pack("256s", name.encode()[:15])
            return socket.inet_ntoa(fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)[20:24])
    except (ImportError, OSError):
        return name


spoken_by(lambda: (rank_in_job(), processes_in_job(), host_name()))
