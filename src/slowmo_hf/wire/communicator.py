"""Collectives of some processes of the job: sums in flat buffers, headers, objects; bytes counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .job import wire
from .processes import Processes


@dataclass(eq=False)
class Arrival:
    """A collective under way: `is_here` tells whether there is nothing to wait for."""

    wait: Callable[[], None]
    is_here: Callable[[], bool]

    def __call__(self) -> None:
        """Wait."""
        self.wait()


class Communicator(Processes):
    """
    Some processes of the job, all of them by default. In a world of one, or without `torch.distributed`, nothing is
    sent.

    Making one is collective over the whole job, also for processes that are not in `ranks` (their `member` is False).

    Args:
        timeout_seconds (`float`): A collective or message that takes longer raises.
        device (`torch.device`): Where the parameters are. Headers travel from there unless the CPU has a backend;
            peer-to-peer messages from `wire_device`, which is the CPU where the device's backend is gloo.
        ranks (`Sequence[int]`, *optional*): Ranks in the job, ascending; all where it is None.
        purpose (`str`, *optional*): Communicators of different purposes have process groups, and so wires, of their
            own.
        witness (`Witness`, *optional*): Says which rank a failure comes from; without one it is torch's own error.
        patience_seconds (`float`, *optional*, defaults to `0`): How long a collective still waits where somebody is
            known to be gone: for the word of a rank that knows more.
    """

    def start_sum_(self, flat: torch.Tensor) -> Callable[[], None]:
        """
        Start to replace `flat` by its sum over workers, in place; the result waits for it. Counts a ring's 2 (m-1)/m
        of its bytes.

        Args:
            flat (`torch.Tensor`): Contiguous and our own: gloo is silently wrong on views that are not dense.
        """
        if self.world_size == 1 or flat.numel() == 0:
            return lambda: None
        assert flat.is_contiguous()
        with self._counted(self._ring_bytes(flat)):
            work = wire().all_reduce(flat, group=self.group, async_op=True)
        return self._arrival(work, flat)

    def start_all_to_all(self, outgoing: torch.Tensor, incoming: torch.Tensor) -> Arrival:
        """
        Start to send part i of `outgoing` to worker i, its own to itself, and to put what worker i sends into part i
        of `incoming`; the result waits for it. Counts (m-1)/m of the bytes.

        Args:
            outgoing (`torch.Tensor`), incoming (`torch.Tensor`): Contiguous bytes (`torch.uint8`), m equal parts, of
                one size everywhere.
        """
        assert outgoing.numel() % self.world_size == 0
        if self.world_size == 1:
            incoming.copy_(outgoing)
            return Arrival(lambda: None, lambda: True)
        with self._counted((self.world_size - 1) / self.world_size * outgoing.nbytes):
            work = wire().all_to_all_single(incoming, outgoing, group=self.group, async_op=True)
        return self._arrival(work, incoming)

    def start_all_gather(self, rows: torch.Tensor, mine: torch.Tensor) -> Callable[[], None]:
        """
        Start to put every worker's `mine` into its row of `rows`; the result waits for it. Counts (m-1) times the
        bytes of one.

        Args:
            rows (`torch.Tensor`): Contiguous bytes (`torch.uint8`), shape (m, len(mine)); not in the memory of `mine`.
            mine (`torch.Tensor`): Contiguous bytes.
        """
        if self.world_size == 1:
            rows.copy_(mine)
            return lambda: None
        with self._counted((self.world_size - 1) * mine.nbytes):
            work = wire().all_gather(list(rows), mine, group=self.group, async_op=True)
        return self._arrival(work, rows)

    def _arrival(self, work: Any, into: torch.Tensor) -> Arrival:
        def wait() -> None:
            with self._counted():
                self._wait(work, into.device)
                if into.is_cuda:
                    torch.cuda.current_stream(into.device).synchronize()  # not for the message behind it

        return Arrival(wait, work.is_completed)

    def max_(self, flat: torch.Tensor) -> None:
        """Replace `flat` by its maximum over workers, in place."""
        if self.world_size == 1 or flat.numel() == 0:
            return
        with self._counted(self._ring_bytes(flat)):
            self._wait(wire().all_reduce(flat, op=wire().ReduceOp.MAX, group=self.group, async_op=True), flat.device)

    def gather_header(self, header: list[float]) -> torch.Tensor:
        """Every worker's header: float64, shape (world_size, len(header)), on the CPU."""
        return self.start_gather_header(header)()

    def start_gather_header(self, header: list[float]) -> Callable[[], torch.Tensor]:
        """Start to send `header` to all; the result waits for theirs, and returns what `gather_header` does."""
        mine = torch.tensor(header, dtype=torch.float64, device=self._small_device)
        if self.world_size == 1:
            return lambda: mine[None].cpu()
        rows = [torch.empty_like(mine) for _ in range(self.world_size)]
        with self._counted((self.world_size - 1) * mine.nbytes):
            work = wire().all_gather(rows, mine, group=self.group, async_op=True)

        def wait() -> torch.Tensor:
            with self._counted():
                self._wait(work, self._small_device)
            return torch.stack(rows).cpu()

        return wait

    def gather_objects(self, value: Any) -> list[Any]:
        """Every worker's `value`, by rank. For the start and for errors: objects are pickled."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        with self._counted():
            wire().all_gather_object(values, value, group=self.group)
        return values

    def broadcast_(self, flat: torch.Tensor, source: int = 0) -> None:
        """Replace `flat` by that of the process with this rank here, in place."""
        if self.world_size > 1 and flat.numel():
            with self._counted():  # bytes: every dtype travels
                work = wire().broadcast(
                    flat.view(torch.uint8), src=self.ranks[source], group=self.group, async_op=True
                )
                self._wait(work, flat.device)

    def _ring_bytes(self, flat: torch.Tensor) -> float:
        return 2 * (self.world_size - 1) / self.world_size * flat.nbytes
