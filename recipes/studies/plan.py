"""
What `reproduce.py` runs: the rows of the paper's Table 1, the grids they were tuned on, and the sweeps, as plain data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from image.presets import PRESETS
from slowmo_hf import SlowMoConfig


@dataclass(frozen=True)
class Tuned:
    """What tuning on seed 0 has chosen for a base; None where its runs are not all there yet."""

    inner_lr: float | None = None
    outer_momentum: float | None = None


@dataclass(frozen=True)
class Task:
    """
    What differs between the tasks.

    Args:
        bases (`tuple[str, ...]`): The rows of the paper's Table 1, in the order in which the table is filled.
        learning_rates (`tuple[float, ...]`): Of the inner optimizer; each base takes the best without slow momentum.
        widens (`bool`): Whether the grid of learning rates grows where the best is at its edge.
        momenta (`tuple[float, ...]`): Of slow momentum, at that learning rate.
        at_half_rate (`tuple[float, ...]`): Of Local SGD's slow momentum at half that learning rate; nothing is chosen
            by these runs (docs/from_ddp.md has a rule for Adam).
        metric (`str`): The final validation metric by which tuning chooses.
        smaller_is_better (`bool`): Of that metric.
        seeds (`int`), pair_seeds (`int`): Per row of the table; of the Local SGD pair, at least.
        sizes (`dict[str, Any]`): Fields of `Run` with other values than its own.
        sync_every (`dict[str, int]`): Bases with another period than `Run`'s own.
        tuning_epochs (`int`, *optional*): Of the runs that choose, where they are shorter than the others.
        two_workers (`tuple[float, ...]`): Momenta of Local SGD by two workers, of as many tokens together; the
            task's sweep.
        published (`dict[str, Any]`): Settings of `make_run` with which all-reduce's figure was published; nothing is
            tuned for these runs.
        given (`Tuned`, *optional*): The paper's own size, with these settings for every base; nothing is tuned.
    """

    bases: tuple[str, ...]
    learning_rates: tuple[float, ...]
    momenta: tuple[float, ...]
    metric: str
    smaller_is_better: bool
    seeds: int
    pair_seeds: int
    sizes: dict[str, Any] = field(default_factory=dict)
    sync_every: dict[str, int] = field(default_factory=dict)
    tuning_epochs: int | None = None
    at_half_rate: tuple[float, ...] = ()
    two_workers: tuple[float, ...] = ()
    published: dict[str, Any] = field(default_factory=dict)
    given: Tuned | None = None
    widens: bool = False

    def best(self, results: dict[float, float]) -> float:
        """The setting with the best result; a run that diverged to NaN has the worst."""
        sign = -1 if self.smaller_is_better else 1
        return max(results, key=lambda setting: -math.inf if math.isnan(results[setting]) else sign * results[setting])

    def rates(self, results: dict[float, float]) -> tuple[float, ...]:
        """
        Learning rates to try, ascending. Where the grid `widens` and the best of it is at its edge by these results,
        the next one belongs to it too, half or twice as large.
        """
        rates = self.learning_rates
        while self.widens and set(results) >= set(rates):
            best = self.best({rate: results[rate] for rate in rates})
            if best not in (rates[0], rates[-1]):
                break
            rates = (best / 2, *rates) if best == rates[0] else (*rates, 2 * best)
        return rates


_CIFAR10 = PRESETS["cifar10"]
TASKS = {
    "image_classification": Task(
        bases=("local_sgd", "all_reduce", "sgp", "osgp"),
        learning_rates=(0.2, 0.4, 0.8),
        momenta=(0.3, 0.5, 0.7),
        metric="validation_accuracy",
        smaller_is_better=False,
        seeds=5,
        pair_seeds=8,
    ),
    "translation": Task(
        bases=("local_sgd", "all_reduce", "sgp"),
        learning_rates=(0.002, 0.004, 0.008),  # Vaswani et al. give 0.0046 for this width and warm-up
        momenta=(0.3, 0.5, 0.7),
        metric="validation_nll",
        smaller_is_better=True,
        seeds=3,
        pair_seeds=3,
        sizes={"epochs": 22, "batch_size": 128},  # 7,436 steps: 154 rounds of 48
        sync_every={"sgp": 48},  # as in the paper
    ),
    "multi30k": Task(
        bases=("local_sgd", "all_reduce", "sgp"),
        learning_rates=(0.0025, 0.005, 0.01),  # Wu et al. (2021) give 0.005
        widens=True,
        momenta=(0.1, 0.2, 0.4),
        at_half_rate=(0.5,),
        metric="validation_nll",
        smaller_is_better=True,
        seeds=3,
        pair_seeds=3,
        sizes={"workers": 4, "epochs": 24, "batch_size": 512},  # 5,808 steps; fewer, larger batches learn too little
        sync_every={"sgp": 48},
        tuning_epochs=12,
        two_workers=(0.0, 0.2, 0.5),
        published={"inner_lr": 0.005, "batch_size": 2048, "epochs": 129},  # 7,998 steps of 8,192 tokens: Wu et al.
    ),
    "cifar10": Task(
        bases=("local_sgd", "sgp"),
        learning_rates=(),
        momenta=(),
        metric="test_accuracy",
        smaller_is_better=False,
        seeds=3,
        pair_seeds=1,
        sizes={
            "workers": 32,
            "epochs": _CIFAR10["num_train_epochs"],
            "batch_size": _CIFAR10["per_device_train_batch_size"],
        },
        given=Tuned(_CIFAR10["learning_rate"], _CIFAR10["outer_momentum"]),
    ),
}


# What a record's name says of a setting that is not the task's own.
SHORT: dict[str, Callable[[Any], str]] = {
    "sync_every": lambda value: f"tau{value}",
    "workers": lambda value: f"workers{value}",
    "inner_state": str,
    "exact_average": lambda value: "average" if value else "no-average",
    "epochs": lambda value: f"epochs{value}",
    "batch_size": lambda value: f"batch{value}",
    "architecture": str,
    "max_train_samples": lambda value: f"rows{value}",
    "look_every": lambda value: f"look{value}",
}


@dataclass(frozen=True)
class Run:
    """
    One training run of several workers in one process.

    Args:
        study (`str`): table1, sweep, tuning or published.
        task (`str`): image_classification, translation, multi30k or cifar10.
        inner_lr (`float`): Peak learning rate of the inner optimizer.
        epochs (`int`): Passes over the training data, all workers together.
        batch_size (`int`): Per worker and step: images; tokens of translation, padding included (`make_batches`).
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
    def warmup_epochs(self) -> float:
        """
        Of translation: a tenth of the run; of one that tunes, of the runs that it tunes for; of published ones a
        quarter, 2,000 updates of 8,000.
        """
        whole = int(TASKS[self.task].sizes.get("epochs", 0)) if self.study == "tuning" else 0
        return (0.25 if self.study == "published" else 0.1) * max(self.epochs, whole)

    @property
    def patience(self) -> int:
        """Looks without a lower validation NLL after which a run ends, as in Wu et al. (2021); 0: it does not."""
        return 10 if self.study == "published" else 0

    @property
    def slowmo(self) -> bool:
        """Whether slow momentum is on."""
        return self.outer_momentum > 0

    @property
    def name(self) -> str:
        """Of its record, below the folder of records: every setting that is not the task's own."""
        own = make_run(self.study, self.task, self.base, self.outer_momentum, self.inner_lr, self.seed)
        mine, others = vars(self), vars(own)
        told = [word(mine[key]) for key, word in SHORT.items() if mine.get(key) != others.get(key)]
        words = [self.base, f"beta{self.outer_momentum}", f"lr{self.inner_lr}", *told, f"seed{self.seed}"]
        return f"{self.task}/{self.study}/{'_'.join(words)}"

    def matches(self, record: dict[str, Any]) -> bool:
        """Whether a record is of this very run."""
        return json.loads(json.dumps(asdict(self))) == record.get("run")


@dataclass(frozen=True)
class PaperRun(Run):
    """
    A run of the paper's own size, which a dry run makes smaller.

    Args:
        architecture (`str`): As `image.small_resnet.make_model` takes it.
        max_train_samples (`int`, *optional*): The first training images alone, and as many test images.
        look_every (`int`): Epochs between two looks at the average; there is one after the last epoch too.
    """

    architecture: str = _CIFAR10["architecture"]
    max_train_samples: int | None = None
    look_every: int = 10


def make_run(
    study: str, task: str, base: str, outer_momentum: float, inner_lr: float, seed: int, **others: Any
) -> Run:
    """
    A run of the task's own size and period. Gossip without slow momentum never averages exactly, as in the paper.
    """
    sizes = {**TASKS[task].sizes, "exact_average": outer_momentum > 0 or base not in ("sgp", "osgp")}
    if base in TASKS[task].sync_every:
        sizes["sync_every"] = TASKS[task].sync_every[base]
    settings = {"study": study, "task": task, "base": base, "outer_momentum": outer_momentum, "inner_lr": inner_lr}
    return run_of({**settings, "seed": seed, **sizes, **others})


def run_of(settings: dict[str, Any]) -> Run:
    """The run of these settings, such as a record's."""
    return (PaperRun if TASKS[settings["task"]].given else Run)(**settings)


def without_slowmo(run: dict[str, Any]) -> dict[str, Any]:
    """The settings of the run that another's gain is measured against."""
    return {**run, "outer_momentum": 0.0, "exact_average": run["base"] not in ("sgp", "osgp")}


def tuning(task: str, records: Sequence[dict[str, Any]] = ()) -> list[Run]:
    """
    Learning rates without slow momentum, for every base; then, where one has been chosen, momenta. `records` are those
    that are there: by them the grid widens, and the rate is chosen.
    """
    runs, grid, tuned = [], TASKS[task], choose(records, task)
    sizes = {"epochs": grid.tuning_epochs} if grid.tuning_epochs else {}
    for base in grid.bases:
        rates = grid.rates(_plain_results(_tried(records, base), grid))
        runs += [make_run("tuning", task, base, 0.0, lr, seed=0, **sizes) for lr in rates]
        lr = tuned[base].inner_lr
        if lr is not None and base != "all_reduce":
            runs += [make_run("tuning", task, base, momentum, lr, seed=0, **sizes) for momentum in grid.momenta]
        if lr is not None and base == "local_sgd":
            runs += [make_run("tuning", task, base, beta, lr / 2, seed=0, **sizes) for beta in grid.at_half_rate]
    return runs


def choose(records: Sequence[dict[str, Any]], task: str) -> dict[str, Tuned]:
    """By the tuning records of one task: the best learning rate, then the best momentum at it."""
    grid, chosen = TASKS[task], {}
    for base in grid.bases:
        own = _tried(records, base)
        plain = _plain_results(own, grid)
        lr = grid.best(plain) if plain and set(plain) >= set(grid.rates(plain)) else None
        slow = {
            record["outer_momentum"]: record["metrics"][grid.metric]
            for record in own
            if record["slowmo"] and record["inner_lr"] == lr
        }
        chosen[base] = Tuned(lr, grid.best(slow) if slow and set(slow) >= set(grid.momenta) else None)
    return chosen


def _tried(records: Sequence[dict[str, Any]], base: str) -> list[dict[str, Any]]:
    """The tuning records of a base."""
    return [record for record in records if record["study"] == "tuning" and record["base"] == base]


def _plain_results(tried: list[dict[str, Any]], grid: Task) -> dict[float, float]:
    """What tuning chooses by, of each learning rate without slow momentum."""
    return {record["inner_lr"]: record["metrics"][grid.metric] for record in tried if not record["slowmo"]}


def table1(task: str, tuned: dict[str, Tuned], seeds: int | None = None) -> list[Run]:
    """
    Every base with and without slow momentum; the seeds of a pair side by side, so that an interrupted table has
    pairs. `seeds` instead of the task's own, but the Local SGD pair has the task's at least.
    """
    runs, least = [], TASKS[task].pair_seeds
    seeds = TASKS[task].seeds if seeds is None else seeds
    for base in TASKS[task].bases:
        lr, momentum = tuned[base].inner_lr, tuned[base].outer_momentum
        if lr is None or (momentum is None and base != "all_reduce"):
            continue
        # Seed 0 chose the settings, and is left out.
        for seed in range(1, 1 + (max(least, seeds) if base == "local_sgd" else seeds)):
            runs.append(make_run("table1", task, base, 0.0, lr, seed))
            if momentum is not None:
                runs.append(make_run("table1", task, base, momentum, lr, seed))
    return runs


def published(task: str) -> list[Run]:
    """The size at which a figure of all-reduce was published."""
    settings = TASKS[task].published
    seeds = range(1, 1 + TASKS[task].seeds) if settings else ()
    return [make_run("published", task, "all_reduce", 0.0, seed=seed, **settings) for seed in seeds]


def sweeps(task: str, tuned: dict[str, Tuned]) -> list[Run]:
    """
    One setting at a time, around the Local SGD row: the inner state (first, and with the pair's seeds, for the table's
    Local SGD rows both reset it, and other packages' Local SGD maintains it), the period, slow momentum, the averages.
    """
    lr, momentum = tuned["local_sgd"].inner_lr, tuned["local_sgd"].outer_momentum
    if lr is None:
        return []
    if TASKS[task].two_workers:
        together = TASKS[task].sizes
        sizes = {"workers": 2, "batch_size": together["batch_size"] * together["workers"] // 2}
        return [
            make_run("sweep", task, "local_sgd", beta, lr, seed, **sizes)
            for seed in range(1, 1 + TASKS[task].pair_seeds)
            for beta in TASKS[task].two_workers
        ]
    if momentum is None:
        return []
    middle = make_run("sweep", task, "local_sgd", momentum, lr, seed=1)
    seeds = range(1, 1 + TASKS[task].pair_seeds)
    runs = [
        replace(middle, inner_state="maintain", outer_momentum=beta, seed=seed)
        for seed in seeds
        for beta in (0.0, momentum)
    ]
    runs += [
        replace(middle, sync_every=tau, outer_momentum=beta) for beta in (momentum, 0.0) for tau in (3, 6, 12, 24, 48)
    ]
    runs += [replace(middle, outer_momentum=beta) for beta in (0.0, 0.2, 0.4, 0.6, 0.8)]
    runs += [replace(middle, inner_state=state) for state in ("reset", "maintain", "average")]
    runs += [replace(middle, outer_momentum=0.0, inner_state="average")]  # double averaging
    lr, momentum = tuned["sgp"].inner_lr, tuned["sgp"].outer_momentum
    if lr is not None and momentum is not None:
        gossip = make_run("sweep", task, "sgp", momentum, lr, seed=1)
        runs += [gossip, replace(gossip, exact_average=False), replace(gossip, inner_state="maintain")]
    return list(dict.fromkeys(runs))
