"""The only file that talks to other processes: sums in flat buffers, headers, objects; bytes and seconds counted."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# `new_group` is collective and leaks: once per process, default group and time-out.
_groups: dict[tuple[int, float], dist.ProcessGroup] = {}


def _own_group(timeout_seconds: float) -> dist.ProcessGroup:
    key = (id(dist.group.WORLD), timeout_seconds)
    if key not in _groups:
        # `ddp_timeout` is ignored on CPU; a group of our own fails in our time.
        group = dist.new_group(timeout=timedelta(seconds=timeout_seconds))
        assert group is not None
        _groups[key] = group
    return _groups[key]


class Communicator:
    """
    The workers of one job. In a world of one, or without `torch.distributed`, nothing is sent.

    Args:
        timeout_seconds (`float`): A collective that takes longer raises.
        device (`torch.device`): Where the parameters are; small messages travel there too, unless the backend takes the CPU.
    """

    def __init__(self, timeout_seconds: float, device: torch.device) -> None:
        self.bytes_sent = 0
        self.seconds = 0.0
        self.group: dist.ProcessGroup | None = None
        self.rank, self.world_size = 0, 1
        self.backend = "none"
        if processes_in_job() > 1:
            self.group = _own_group(timeout_seconds)
            self.rank, self.world_size = dist.get_rank(self.group), dist.get_world_size(self.group)
            self.backend = dist.get_backend(self.group)
        self._small_device = torch.device("cpu") if "gloo" in self.backend or self.backend == "none" else device

    @contextmanager
    def _counted(self, payload_bytes: float) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start
        self.bytes_sent += round(payload_bytes)

    def mean_(self, flat: torch.Tensor) -> None:
        """Replace `flat` by its mean over workers, in place. Counts a ring's 2 (m-1)/m of its bytes.

        Args:
            flat (`torch.Tensor`): Contiguous and our own: gloo is silently wrong on views that are not dense.
        """
        if self.world_size == 1 or flat.numel() == 0:
            return
        assert flat.is_contiguous()
        with self._counted(self._ring_bytes(flat)):
            dist.all_reduce(flat, group=self.group)
            if flat.is_cuda:
                torch.cuda.synchronize(flat.device)
        flat.div_(self.world_size)

    def max_(self, flat: torch.Tensor) -> None:
        """Replace `flat` by its maximum over workers, in place."""
        if self.world_size == 1 or flat.numel() == 0:
            return
        with self._counted(self._ring_bytes(flat)):
            dist.all_reduce(flat, op=dist.ReduceOp.MAX, group=self.group)

    def gather_header(self, header: list[float]) -> torch.Tensor:
        """Every worker's header: float64, shape (world_size, len(header)), on the CPU."""
        mine = torch.tensor(header, dtype=torch.float64, device=self._small_device)
        if self.world_size == 1:
            return mine[None].cpu()
        rows = [torch.empty_like(mine) for _ in range(self.world_size)]
        with self._counted((self.world_size - 1) * mine.nbytes):
            dist.all_gather(rows, mine, group=self.group)
        return torch.stack(rows).cpu()

    def gather_objects(self, value: Any) -> list[Any]:
        """Every worker's `value`, by rank. For the start and for errors: objects are pickled."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def broadcast_(self, flat: torch.Tensor) -> None:
        """Replace `flat` by rank 0's, in place."""
        if self.world_size > 1 and flat.numel():
            dist.broadcast(flat.view(torch.uint8), src=0, group=self.group)  # bytes: every dtype travels

    def _ring_bytes(self, flat: torch.Tensor) -> float:
        return 2 * (self.world_size - 1) / self.world_size * flat.nbytes


def processes_in_job() -> int:
    """The size of `torch.distributed`'s world; 1 where it is not initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def machines_in_job(world_size: int) -> int:
    """Number of machines, from LOCAL_WORLD_SIZE and never from host names (containers share them); 1 where it is not set."""
    return max(1, world_size // int(os.environ.get("LOCAL_WORLD_SIZE", world_size)))


def host_and_address() -> tuple[str, str]:
    """This machine's name and the address that its name resolves to ("unresolved" where it does not)."""
    host = socket.gethostname()
    try:
        return host, socket.gethostbyname(host)
    except OSError:
        return host, "unresolved"
