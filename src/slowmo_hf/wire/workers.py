"""Which processes form a worker, and over which groups they talk: all of the job, inside a worker, in a column."""

from __future__ import annotations

import itertools
import sys
import weakref
from collections.abc import Sequence
from typing import Any

import torch

from ..config import SlowMoConfig
from ..log import Prefixed
from .communicator import Communicator
from .failures import is_collective_failure
from .job import is_in_process, machines_in_job, processes_in_job, processes_on_machine
from .processes import forget_groups
from .roll_call import OF_THE_JOB, RollCall, meet_at_the_start

_WORD_SECONDS = 4.0  # for a process that has failed to find the cause and tell its worker's others


def worker_size(config: SlowMoConfig) -> int:
    """
    Processes per worker in this job, what `processes_per_worker` comes to. `"auto"` is a machine's where the job spans
    several machines with several processes each, else 1; it is 1 with `base="all_reduce"`, where gradients are
    averaged over all anyway.
    """
    world_size = processes_in_job()
    on_machine = processes_on_machine(world_size)
    if config.processes_per_worker == "auto":
        return on_machine if machines_in_job(world_size) > 1 and config.base != "all_reduce" else 1
    return on_machine if config.processes_per_worker == "node" else int(config.processes_per_worker)


class Workers:
    """
    The processes of the job, cut into workers of neighbouring ranks.

    `world` is every process. `inside` is this worker's own, and `gradients` the same for DDP or FSDP. Process j of a
    worker speaks for its part of the model with process j of every other one: its column (`between`, and `gossip`).
    With `base="all_reduce"` gradients keep all workers equal, so each process does the outer update for itself and
    talks to nobody.

    Args:
        config (`SlowMoConfig`): The settings.
        device (`torch.device`): Where the parameters are.
        mates (`Sequence[int]`, *optional*): The ranks that hold the model's shards together: a worker. None where
            every process has the whole model.
    """

    def __init__(self, config: SlowMoConfig, device: torch.device, mates: Sequence[int] | None = None) -> None:
        self.config, self.device, self._mates = config, device, mates
        self.speaks_for = ""  # which of a program's optimizers, in words
        self._begun_under = id(sys.exc_info()[1])
        self.roll_call = RollCall(config.timeout_seconds)
        weakref.finalize(self, self.roll_call.leave_later, "its optimizer was let go").atexit = False
        if meet_at_the_start(self.roll_call):
            forget_groups()
        self.world = Communicator(config.timeout_seconds, device, witness=self.roll_call)
        self.size = worker_size(config) if mates is None else len(mates)
        self.count = max(1, self.world.world_size // self.size)
        self.index, self.place = divmod(self.world.rank, self.size)

    @property
    def holds_shards(self) -> bool:
        """Whether the model is sharded inside a worker."""
        return self._mates is not None

    def refusal(self) -> str | None:
        """Why the job cannot be cut into such workers, or None."""
        words = self._refuse_mesh() if self._mates is not None else None
        if words is not None:
            return words
        if is_in_process() and self.size > 1:
            return (
                "processes_per_worker must be 1 inside run_in_process, where no DDP averages gradients, got "
                f"{self.size}."
            )
        if self.world.world_size % self.size == 0:
            return None
        return (
            f"processes_per_worker must divide the number of processes, got {self.config.processes_per_worker} (here "
            f"{self.size}) with {self.world.world_size} processes. Start a multiple of it, or set "
            "processes_per_worker=1."
        )

    def _refuse_mesh(self) -> str | None:
        mates, size, on_machine = list(self._mates or ()), self.size, processes_on_machine(self.world.world_size)
        first = self.index * size
        if mates != list(range(first, first + size)):
            return (
                f"the model's shards lie on ranks {mates}; a worker is {size} neighbouring ranks, here {first} to "
                f"{first + size - 1}. Make the sharded dimension of the device mesh the last one."
            )
        wanted, given = size, self.config.processes_per_worker
        if self.config.base != "all_reduce":
            if given != "auto":
                wanted = worker_size(self.config)
            elif machines_in_job(self.world.world_size) > 1:
                wanted = min(size, on_machine)
        if wanted == size:
            return None
        return (
            f"the model is sharded over {size} processes, which must be one worker, got processes_per_worker="
            f"{given!r} (here {wanted}): between rounds nothing may couple workers. Set "
            f"dp_shard_size={wanted} and dp_replicate_size={self.world.world_size // wanted} in accelerate's "
            f"configuration, or processes_per_worker={size}."
        )

    def form(self) -> None:
        """Make the groups. Collective, after all ranks have been found to agree on the settings."""
        timeout, world = self.config.timeout_seconds, range(self.world.world_size)
        cut = [list(world[first : first + self.size]) for first in world[:: self.size]]
        # A process waits for other machines in its column; its worker's others wait for it, and longer, so that they
        # hear its word.
        witness, longer, word = self.roll_call, 2 * timeout + 10, _WORD_SECONDS
        self.inside = _mine(
            [
                Communicator(longer, self.device, ranks, purpose="inside", witness=witness, patience_seconds=word)
                for ranks in cut
            ]
        )
        # DDP's or FSDP's.
        self.gradients = _mine([Communicator(timeout, self.device, ranks, purpose="gradients") for ranks in cut])
        self.only_gradients_meet()
        alone = self.config.base == "all_reduce"
        columns = (
            [[rank] for rank in world] if alone else [list(world[place :: self.size]) for place in range(self.size)]
        )
        # A header must not queue behind messages that travel for long.
        purpose, wire = "behind" if self.config.overlap_steps else "rounds", self._own_wire()

        def column(purpose: str) -> Communicator:
            return _mine(
                [Communicator(timeout, self.device, c, purpose=purpose + wire, witness=witness) for c in columns]
            )

        self.between = column(purpose)
        if self.config.gossips:
            self.gossip = column("gossip")
            # NCCL wants every rank in a group's first call; in an exchange some may idle.
            self.gossip.gather_header([0.0])

    def _own_wire(self) -> str:
        """
        Optimizers that live in one program have groups of their own: of those that travel, what sets out when depends
        on what has come, on each rank by itself. Whoever trains in turn uses the same ones again. Collective.
        """
        living = self._living()
        taken = set().union(*self.world.gather_objects({number for number, _ in living}))
        number = next(number for number in itertools.count() if number not in taken)
        living.append((number, weakref.ref(self)))
        return f" {number}" if number else ""

    def _living(self) -> list[Any]:
        """(number, who) of all that train in this program."""
        living = self.world.notes("wires")
        living[:] = [(number, those) for number, those in living if (it := those()) and not it.roll_call.has_left]
        return living

    @property
    def logger(self) -> Prefixed:
        """Says which optimizer a line is of, where several live in the program."""
        return Prefixed(lambda: f"{self.speaks_for}: " if self.speaks_for and len(self._living()) > 1 else "")

    def only_gradients_meet(self) -> None:
        """
        Training goes on: only a worker's own processes meet in collectives that are not ours. Not where the failure of
        another one is on its way: it will be told of those that met there.
        """
        error = self.error_on_its_way
        if error is None or not is_collective_failure(error):
            self.roll_call.coupled, self.roll_call.coupled_limit = self.gradients.ranks, ""

    @property
    def error_on_its_way(self) -> BaseException | None:
        """What is being handled now, and was not when the run began: a program may begin one behind an error."""
        error = sys.exc_info()[1]
        return None if id(error) == self._begun_under else error

    def all_may_meet(self) -> None:
        """After a meeting for a log, an evaluation or a save: Trainer gathers over the whole job."""
        self.roll_call.coupled, self.roll_call.coupled_limit = self.world.ranks, OF_THE_JOB

    @property
    def bytes_sent(self) -> int:
        """
        Payload that this process has sent to other workers, since the groups were made; status exchanges included.
        """
        return self.world.bytes_sent + self.between.bytes_sent + (self.gossip.bytes_sent if self.config.gossips else 0)


def _mine(communicators: list[Communicator]) -> Communicator:
    return next(communicator for communicator in communicators if communicator.member)
