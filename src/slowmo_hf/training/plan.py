"""What a run is going to send, and what DDP would: from the sizes of its messages, before the first step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..wire.gossip import GossipBase
from .parts import Parts

_ROUNDS_FOR_A_TENTH = 10  # at beta = 0


@dataclass(frozen=True)
class Plan:
    """
    What is known before the first step of what a run will send.

    Args:
        bytes_per_round (`float`): A worker's payload in a round and the exchanges before it, its status exchange
            included; buffers that change and averaged inner states come on top. A mean, where exchanges differ.
        bytes_per_exchange (`float`): Of gossip, its mean; 0 without.
        ddp_bytes_per_step (`float`): What a ring all-reduce of its gradients sends: 2 (m-1)/m of their bytes.
        steps (`int`, *optional*), rounds (`int`, *optional*): Ahead; None where nobody knows.
    """

    bytes_per_round: float
    bytes_per_exchange: float
    ddp_bytes_per_step: float
    steps: int | None
    rounds: int | None

    @classmethod
    def of(cls, parts: Parts) -> Plan:
        """From the clock's step on. Collective inside the worker."""
        config, workers, clock = parts.config, parts.workers, parts.clock
        header = (workers.world.world_size - 1) * parts.status.speaker.header_bytes if config.has_rounds else 0
        sent = parts.slow.reduction.payload_bytes if config.averages_at_rounds else 0.0
        exchange = _of_an_exchange(parts.base) if isinstance(parts.base, GossipBase) else 0.0
        sent += (config.sync_every - 1 if config.exact_average else config.sync_every) * exchange
        gradients: float = sum(
            span.elements * span.param.element_size() for layout in parts.slow.layouts for span in layout.spans
        )
        sent, exchange, gradients = parts.summed([header + sent, exchange, gradients])
        steps = rounds = None
        if clock.max_steps is not None:
            steps = max(0, clock.max_steps - clock.attempted_steps)
            rounds = max(0, clock.max_steps // config.sync_every - clock.attempted_steps // config.sync_every)
        return cls(sent, exchange, 2 * (workers.count - 1) / workers.count * gradients, steps, rounds)

    def words(self, sync_every: int) -> str:
        """One line."""
        of_round = f"{in_bytes(self.bytes_per_round)} per worker and round of {sync_every} steps"
        if self.steps is None or self.rounds is None:
            of_ddp = in_bytes(sync_every * self.ddp_bytes_per_step)
            return f"{of_round} (DDP: {of_ddp}); the number of steps is not known here"
        behind = (self.steps - self.rounds * sync_every) * self.bytes_per_exchange  # the last round
        total, ddp = self.rounds * self.bytes_per_round + behind, self.steps * self.ddp_bytes_per_step
        return (
            f"{self.steps} steps and {self.rounds} rounds ahead, {of_round}, {in_bytes(total)} in all "
            f"(DDP: {in_bytes(ddp)})"
        )


def _of_an_exchange(base: GossipBase) -> float:
    """What this process sends, the mean over the schedule's cycle."""
    me, cycle = base.communicator.rank, base.topology.cycle_length
    message = sum(flat.nbytes for flat in base.numerators.values()) + (8 if base.staleness else 0)
    return message * sum(len(base.topology.targets(me, number)) for number in range(cycle)) / cycle


def enough_rounds(outer_momentum: float) -> int:
    """
    Rounds behind which slow momentum has done what it can. Of a round's pseudo-gradient the velocity makes
    1 + beta + beta^2 + ... = 1/(1-beta) in the rounds that follow, and what would come after the last round is lost:
    over T rounds of equal pseudo-gradients the share beta (1 - beta^T) / (T (1-beta)), below a tenth of beta from
    10/(1-beta) rounds on.
    """
    return math.ceil(_ROUNDS_FOR_A_TENTH / (1 - outer_momentum) - 1e-9)


def in_bytes(number: float) -> str:
    """With a unit: 1 kB is 1000 bytes, as links count."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if abs(number) < 1000:
            return f"{number:.0f} bytes" if unit == "bytes" else f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:,.0f} TB"
