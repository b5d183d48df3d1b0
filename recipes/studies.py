"""What `reproduce.py` runs: the rows of the paper's Table 1, the grids they were tuned on, and the sweeps, as plain data."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from slowmo_hf import SlowMoConfig

BASES = ("all_reduce", "local_sgd", "sgp", "osgp")
LRS = (0.05, 0.1, 0.2)  # of the inner optimizer; each base takes the best on the validation split, without slow momentum
MOMENTA = (0.3, 0.5, 0.7)  # of slow momentum, at that learning rate
SYNC_EVERY = {"all_reduce": 12, "local_sgd": 12, "sgp": 12, "osgp": 12}  # the paper's for CIFAR-10
# What tuning on seed 0 chose (recipes/records, study "tuning"); None until it has been run.
TUNED_LR: dict[str, float | None] = dict.fromkeys(BASES)
TUNED_MOMENTUM: dict[str, float | None] = dict.fromkeys(BASES)


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
    sync_every: int = 12
    workers: int = 8
    inner_state: str = "auto"
    exact_average: bool = True
    epochs: int = 12
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


def tuning(task: str) -> list[Run]:
    """Learning rates without slow momentum, for every base; then, where they have been chosen, the momenta."""
    runs = []
    for base in BASES:
        runs += [Run("tuning", task, base, 0.0, lr, seed=0) for lr in LRS]
        lr = TUNED_LR[base]
        if lr is not None and base != "all_reduce":
            runs += [Run("tuning", task, base, momentum, lr, seed=0) for momentum in MOMENTA]
    return runs


def table1(task: str, seeds: int) -> list[Run]:
    """Every base with and without slow momentum; the seeds of a pair side by side, so that an interrupted table has pairs."""
    runs = []
    for base in ("local_sgd", "all_reduce", "sgp", "osgp"):
        lr, momentum = TUNED_LR[base], TUNED_MOMENTUM[base]
        if lr is None or (momentum is None and base != "all_reduce"):
            continue
        # Seed 0 chose the settings, and is left out.
        for seed in range(1, 1 + (max(8, seeds) if base == "local_sgd" else seeds)):
            runs.append(Run("table1", task, base, 0.0, lr, seed))
            if momentum is not None:
                runs.append(Run("table1", task, base, momentum, lr, seed))
    return runs


def sweeps(task: str) -> list[Run]:
    """One setting at a time, around the Local SGD row: the period, slow momentum, the inner state, the averages."""
    lr, momentum = TUNED_LR["local_sgd"], TUNED_MOMENTUM["local_sgd"]
    if lr is None or momentum is None:
        return []
    middle = Run("sweep", task, "local_sgd", momentum, lr, seed=1)
    runs = [replace(middle, sync_every=tau) for tau in (3, 6, 12, 24, 48)]
    runs += [replace(middle, sync_every=tau, outer_momentum=0.0) for tau in (3, 6, 12, 24, 48)]
    runs += [replace(middle, outer_momentum=beta) for beta in (0.0, 0.2, 0.4, 0.6, 0.8)]
    runs += [replace(middle, inner_state=state) for state in ("reset", "maintain", "average")]
    runs += [replace(middle, outer_momentum=0.0, inner_state="average")]  # double averaging
    if TUNED_LR["sgp"] and TUNED_MOMENTUM["sgp"]:
        runs += [Run("sweep", task, "sgp", TUNED_MOMENTUM["sgp"], TUNED_LR["sgp"], seed=1, exact_average=exact) for exact in (True, False)]
    return list(dict.fromkeys(runs))
