"""What `reproduce.py` runs: the rows of the paper's Table 1, the grids they were tuned on, and the sweeps, as plain data."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from slowmo_hf import SlowMoConfig

BASES = ("all_reduce", "local_sgd", "sgp", "osgp")
LRS = (0.05, 0.1, 0.2)  # of the inner optimizer; each base takes the best on the validation split, without slow momentum
MOMENTA = (0.3, 0.5, 0.7)  # of slow momentum, at that learning rate


@dataclass(frozen=True)
class Tuned:
    """What tuning on seed 0 has chosen for a base; None where its runs are not all there yet."""

    inner_lr: float | None = None
    outer_momentum: float | None = None


@dataclass(frozen=True)
class Run:
    """
    One training run of several workers in one process.

    Args:
        study (`str`): table1, sweep or tuning.
        task (`str`): image_classification or translation.
        inner_lr (`float`): Peak learning rate of the inner optimizer.
        epochs (`int`): Passes over the training data, all workers together.
        batch_size (`int`): Rows per worker and step.
    """

    study: str
    task: str
    base: str
    outer_momentum: float
    inner_lr: float
    seed: int
    sync_every: int = 12  # the paper's for every base on CIFAR-10
    workers: int = 8
    inner_state: str = "auto"
    exact_average: bool = True
    epochs: int = 8
    batch_size: int = 16

    @property
    def config(self) -> SlowMoConfig:
        """The package's settings."""
        return SlowMoConfig(
            base=self.base,
            sync_every=self.sync_every,
            outer_momentum=self.outer_momentum,
            inner_state=self.inner_state,
            exact_average=self.exact_average,
        )

    @property
    def slowmo(self) -> bool:
        """Whether slow momentum is on."""
        return self.outer_momentum > 0

    @property
    def name(self) -> str:
        """Of its record: every setting that is not the default."""
        words = [self.study, self.task, self.base]
        words += [
            f"{key}-{value}" for key, value in asdict(self).items() if key not in ("study", "task", "base", "seed") and self._told(key)
        ]
        return "_".join([*words, f"seed-{self.seed}"])

    def _told(self, key: str) -> bool:
        return key in ("outer_momentum", "inner_lr") or getattr(self, key) != getattr(type(self), key)

    def matches(self, record: dict[str, Any]) -> bool:
        """Whether a record is of this very run."""
        return json.loads(json.dumps(asdict(self))) == record.get("run")


def tuning(task: str, tuned: dict[str, Tuned]) -> list[Run]:
    """Learning rates without slow momentum, for every base; then, where one has been chosen, momenta."""
    runs = []
    for base in BASES:
        runs += [Run("tuning", task, base, 0.0, lr, seed=0) for lr in LRS]
        lr = tuned[base].inner_lr
        if lr is not None and base != "all_reduce":
            runs += [Run("tuning", task, base, momentum, lr, seed=0) for momentum in MOMENTA]
    return runs


def choose(records: list[dict[str, Any]], metric: str) -> dict[str, Tuned]:
    """By the tuning records of one task: the best learning rate, then the best momentum at it; the larger value of `metric` is better."""
    chosen = {}
    for base in BASES:
        own = [record for record in records if record["study"] == "tuning" and record["base"] == base]
        plain = {record["inner_lr"]: record["metrics"][metric] for record in own if not record["slowmo"]}
        lr = max(plain, key=lambda key: plain[key]) if set(plain) >= set(LRS) else None
        slow = {record["outer_momentum"]: record["metrics"][metric] for record in own if record["slowmo"] and record["inner_lr"] == lr}
        chosen[base] = Tuned(lr, max(slow, key=lambda key: slow[key]) if set(slow) >= set(MOMENTA) else None)
    return chosen


def table1(task: str, tuned: dict[str, Tuned], seeds: int) -> list[Run]:
    """Every base with and without slow momentum; the seeds of a pair side by side, so that an interrupted table has pairs."""
    runs = []
    for base in ("local_sgd", "all_reduce", "sgp", "osgp"):
        lr, momentum = tuned[base].inner_lr, tuned[base].outer_momentum
        if lr is None or (momentum is None and base != "all_reduce"):
            continue
        # Seed 0 chose the settings, and is left out.
        for seed in range(1, 1 + (max(8, seeds) if base == "local_sgd" else seeds)):
            runs.append(Run("table1", task, base, 0.0, lr, seed))
            if momentum is not None:
                runs.append(Run("table1", task, base, momentum, lr, seed))
    return runs


def sweeps(task: str, tuned: dict[str, Tuned]) -> list[Run]:
    """One setting at a time, around the Local SGD row: the period, slow momentum, the inner state, the averages."""
    lr, momentum = tuned["local_sgd"].inner_lr, tuned["local_sgd"].outer_momentum
    if lr is None or momentum is None:
        return []
    middle = Run("sweep", task, "local_sgd", momentum, lr, seed=1)
    runs = [replace(middle, sync_every=tau, outer_momentum=beta) for beta in (momentum, 0.0) for tau in (3, 6, 12, 24, 48)]
    runs += [replace(middle, outer_momentum=beta) for beta in (0.0, 0.2, 0.4, 0.6, 0.8)]
    runs += [replace(middle, inner_state=state) for state in ("reset", "maintain", "average")]
    runs += [replace(middle, outer_momentum=0.0, inner_state="average")]  # double averaging
    lr, momentum = tuned["sgp"].inner_lr, tuned["sgp"].outer_momentum
    if lr is not None and momentum is not None:
        runs += [Run("sweep", task, "sgp", momentum, lr, seed=1, exact_average=exact) for exact in (True, False)]
    return list(dict.fromkeys(runs))
