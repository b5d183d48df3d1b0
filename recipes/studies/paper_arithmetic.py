"""What a run of the paper's WMT'16 rows comes to: arithmetic from the preset, nothing measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from slowmo_hf import SlowMoConfig

NODES, PROCESSES = 8, 64  # of the paper: 8 machines of 8 GPUs, a worker a machine
EPOCHS = 25
# Table 2 of the paper (https://huggingface.co/papers/1910.00643), V100s and 10 Gbit/s Ethernet: milliseconds per
# iteration. The second of a pair is with slow momentum.
PAPER_MILLISECONDS = {
    ("local_sgd", False): 503,
    ("local_sgd", True): 505,
    ("sgp", False): 1225,
    ("sgp", True): 1279,
    ("all_reduce", False): 1648,
}
ADAM_BYTES = 8  # per parameter: two moments in fp32


@dataclass(frozen=True)
class Checkpoints:
    """
    Bytes on disk of one save at an epoch's end, of a model of fp32 parameters: what all machines share, and what each
    worker adds. docs/checkpoints.md has the table behind it.
    """

    shared: int
    per_worker: int

    @classmethod
    def of(cls, parameters: int, config: SlowMoConfig) -> Checkpoints:
        """
        Shared are the model, Trainer's own file of rank 0's Adam, anchors, and the velocity where there is a momentum.
        A worker adds its Adam and, inside a round, its weights; a gossip base its numerators. Gossip without slow
        momentum is never averaged exactly, and anchors are each worker's own.
        """
        fp32 = 4
        stock = fp32 + ADAM_BYTES
        if config.base == "all_reduce":
            return cls(parameters * stock, 0)
        weights = fp32 if config.base == "local_sgd" else 2 * fp32
        if not averages(config):
            return cls(parameters * stock, parameters * (ADAM_BYTES + weights + fp32))
        slow = 2 * fp32 if config.outer_momentum else fp32
        return cls(parameters * (stock + slow), parameters * (ADAM_BYTES + weights))

    def most(self, workers: int, kept: int) -> int:
        """On a disk that so many workers share: `kept` saves, and the next until it is whole and the oldest goes."""
        return (kept + 1) * (self.shared + workers * self.per_worker)


def averages(config: SlowMoConfig) -> bool:
    """Whether there are rounds: gossip without slow momentum has none, in the paper and in the recipe's presets."""
    return config.base == "local_sgd" or (config.base != "all_reduce" and config.outer_momentum > 0)


def ring_bytes(payload: int, workers: int) -> float:
    """What a worker sends in a ring all-reduce: 2 (m-1)/m of the payload, as `slowmo/bytes_sent` counts."""
    return 2 * (workers - 1) / workers * payload


def row(
    base: str, outer_momentum: float, *, parameters: int, updates_per_epoch: int, kept: int, workers: int = NODES
) -> dict[str, Any]:
    """
    A row of the paper's Table 1: updates and rounds of 25 epochs, hours, bytes and disk.

    Args:
        parameters (`int`): Trainable ones, fp32.
        updates_per_epoch (`int`): Optimizer steps of a process.
        kept (`int`): Checkpoints that stay.
    """
    config = SlowMoConfig.paper("wmt16", base, outer_momentum=outer_momentum)
    updates = EPOCHS * updates_per_epoch
    payload = 4 * parameters
    rounds = updates // config.sync_every if averages(config) else 0
    exchanges = updates - rounds if base == "sgp" else 0
    steps = updates if base == "all_reduce" else 0
    sent = (rounds + steps) * ring_bytes(payload, workers) + exchanges * payload
    checkpoints = Checkpoints.of(parameters, config)
    milliseconds = PAPER_MILLISECONDS[base, outer_momentum > 0]
    return {
        "base": base,
        "outer_momentum": outer_momentum,
        "sync_every": config.sync_every if rounds else None,
        "updates": updates,
        "rounds": rounds,
        "milliseconds_per_update_of_the_paper": milliseconds,
        "hours": updates * milliseconds / 3_600_000,
        "bytes_per_round_and_node": ring_bytes(payload, workers),
        "bytes_per_node": sent,
        "checkpoint_bytes_shared": checkpoints.shared,
        "checkpoint_bytes_per_worker": checkpoints.per_worker,
        "disk_bytes_shared_by_all": checkpoints.most(workers, kept),
        "disk_bytes_of_each_machine": checkpoints.most(1, kept),  # without a disk that all share
    }


def all_rows(parameters: int, updates_per_epoch: int, kept: int, outer_momentum: float = 0.5) -> list[dict[str, Any]]:
    """The paper's rows for WMT'16."""
    return [
        row(
            base,
            outer_momentum if slowmo else 0.0,
            parameters=parameters,
            updates_per_epoch=updates_per_epoch,
            kept=kept,
        )
        for base, slowmo in PAPER_MILLISECONDS
    ]
