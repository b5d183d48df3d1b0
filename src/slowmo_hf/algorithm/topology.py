"""Who sends to whom at every exchange, and the mixing matrix: plain Python, the same on every rank."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Protocol

_NAMES = ("exponential", "bipartite_exponential", "ring", "complete")


class Schedule(Protocol):
    """
    What a gossip base needs of a topology: called with name, workers, peers and whether exchanges must be two-sided;
    the same on every rank.
    """

    @property
    def workers(self) -> int:
        """How many there are."""

    @property
    def cycle_length(self) -> int:
        """Exchanges until it repeats."""

    def targets(self, worker: int, exchange: int) -> list[int]:
        """Whom `worker` sends to at an exchange (0, 1, 2, ...)."""

    def sources(self, worker: int, exchange: int) -> list[int]:
        """Whom it receives from."""

    def weight(self, worker: int, exchange: int) -> float:
        """The share of its mass that it keeps, and that each of its messages carries."""


def check_schedule(schedule: Schedule, name: str, *, is_synchronous: bool) -> None:
    """
    Refuse exchanges that would lose a message or mass: for a topology that was added.

    Args:
        schedule (`Schedule`): Of `schedule.workers` workers.
        name (`str`): The setting `topology`.
        is_synchronous (`bool`): Messages are applied at once, and no push-sum weight travels with them.

    Raises:
        ValueError: The first rule that does not hold, with exchange and worker.
    """
    for exchange in range(schedule.cycle_length):
        targets = [schedule.targets(worker, exchange) for worker in range(schedule.workers)]
        shares = [schedule.weight(worker, exchange) for worker in range(schedule.workers)]
        for worker, share in enumerate(shares):
            where = f"topology={name!r}, exchange {exchange}: worker {worker}"
            its, sources = targets[worker], schedule.sources(worker, exchange)
            senders = [j for j, reached in enumerate(targets) if worker in reached]
            others = set(range(schedule.workers)) - {worker}
            if len(set(its)) < len(its) or not set(its) <= others or sorted(sources) != senders:
                raise ValueError(
                    f"{where} has targets {its} and sources {sources}, and those who send to it are {senders}. "
                    "Targets are other workers, each once; `sources` must list those who send."
                )
            if not math.isclose(share * (1 + len(its)), 1):
                raise ValueError(
                    f"{where} has {len(its)} targets and weight {share:g}, which loses mass. `weight` must be "
                    f"1 / (1 + targets) = {1 / (1 + len(its)):g}."
                )
            total = share + sum(shares[j] for j in senders)
            if is_synchronous and not math.isclose(total, 1):
                raise ValueError(
                    f"{where} has {len(senders)} sources, and {total:g} of the mass of one worker after it: without "
                    "staleness push-sum weights must stay 1. Give every worker as many sources as targets, or use "
                    "base='osgp' with staleness >= 1, whose messages carry their weight."
                )


@dataclass(frozen=True)
class Topology:
    r"""
    Who sends to whom at exchange k = 0, 1, 2, ..., and the mixing matrix of each exchange.

        P_k[i][j] = 1 / (1 + targets of j)    if i = j or i is a target of j at exchange k, else 0
        x_i       = sum over j of P_k[i][j] * x_j

    Uniform weights: a worker keeps the same share that it sends to each target. Columns sum to 1 (mass is conserved).
    As everybody gets as many messages as it sends, rows sum to 1 too, and the push-sum weights of a synchronous
    exchange stay 1.

    Workers take seats 0 to n-1, in order unless said otherwise. Each exchange uses the next `peers` entries of a
    cyclic list of distances d; seats are counted modulo their number.

    - `"exponential"`: seat s sends to s + d; d = 1, 2, 4, ..., 2^floor(log2(n-1)); where `peers` is larger than this
      list, 3, 5, 6, 7, ... follow until it is as long.
    - `"bipartite_exponential"`: even seat s and odd seat s + d exchange; d = 1, 3, 5, 9, 17, ... (1 + 2^j) below n;
      then 7, 11, 13, ... likewise. In an odd world worker k mod n idles, and the others close ranks.
    - `"ring"`: seat s sends to s + 1, with 2 peers to s - 1 too. `symmetric` with 1 peer: seats 0-1, 2-3, ...
      exchange; seat 0 is worker k mod n, and in an odd world the worker before it idles.
    - `"complete"`: everybody sends to everybody.

    Source: Stochastic Gradient Push (SGP, Assran et al. 2019, https://huggingface.co/papers/1811.10792): the directed
    exponential graph; for D-PSGD a bipartite exponential one, whose exchanges are two-sided.

    Args:
        name (`str`):
            `"exponential"`, `"bipartite_exponential"`, `"ring"` or `"complete"`: the setting `topology`.
        workers (`int`):
            Number of workers n, >= 1. A world of one exchanges nothing.
        peers (`int`, *optional*, defaults to `1`):
            Targets of a worker per exchange. At most workers - 1; in a ring 2; in a bipartite graph workers // 2.
            Does not apply to `"complete"`: leave it at 1 there, or give workers - 1.
        symmetric (`bool`, *optional*, defaults to `False`):
            Exchanges must be two-sided and P_k symmetric: D-PSGD. Refuses `"exponential"`.

    Raises:
        ValueError: A setting is out of range, or two settings contradict each other.
    """

    name: str
    workers: int
    peers: int = 1
    symmetric: bool = False

    def __post_init__(self) -> None:
        if self.name not in _NAMES:
            raise ValueError(f"topology must be one of {', '.join(_NAMES)}, got {self.name!r}.")
        if self.workers < 1:
            raise ValueError(f"workers must be >= 1, got {self.workers}. Use 1 for a world that exchanges nothing.")
        if self.symmetric and self.name == "exponential":
            raise ValueError(
                "topology must be two-sided for base='dpsgd', got 'exponential', which is directed. "
                "Use 'bipartite_exponential', 'ring' or 'complete', or base='sgp'."
            )
        self._check_peers()

    def _check_peers(self) -> None:
        if self.peers < 1:
            raise ValueError(
                f"peers must be >= 1, got {self.peers}. Use base='local_sgd' to exchange nothing between rounds."
            )
        limits = {"workers - 1": self.workers - 1}
        if self.name == "ring":
            limits["2 in a ring, a neighbour on each side"] = 2
        if self.name == "bipartite_exponential":
            limits["workers // 2 in a bipartite graph, the size of the other side"] = self.workers // 2
        for rule, most in limits.items():
            if self.peers > max(1, most):
                raise ValueError(
                    f"peers must be <= {rule}, got {self.peers} with workers={self.workers} and "
                    f"topology={self.name!r}. Use peers={max(1, most)}, or a topology with more links."
                )
        if self.name == "complete" and self.peers not in (1, self.workers - 1):
            raise ValueError(
                f"peers does not apply to topology='complete', where everybody sends to all {self.workers - 1} "
                f"others, got {self.peers}. Leave peers at 1."
            )

    def targets(self, worker: int, exchange: int) -> list[int]:
        """
        The workers that `worker` sends to at an exchange (0, 1, 2, ...), in the order of the distances; empty where it
        idles.
        """
        return self._reached(worker, exchange, 1)

    def sources(self, worker: int, exchange: int) -> list[int]:
        """
        The workers that `worker` receives from: entry i belongs to the distance of `targets`' entry i. The targets if
        `symmetric`.
        """
        return self._reached(worker, exchange, 1 if self.symmetric else -1)

    def weight(self, worker: int, exchange: int) -> float:
        """The share of its mass that `worker` keeps, and that each of its messages carries: 1 / (1 + targets)."""
        return 1 / (1 + len(self.targets(worker, exchange)))

    @property
    def cycle_length(self) -> int:
        """Exchanges until the schedule repeats."""
        if self.workers == 1:
            return 1
        length = len(self._distances)
        turns = length // math.gcd(length, self._degree)
        if self._paired and self.workers % 2:
            return math.lcm(turns, self.workers)
        return 2 if self._paired and self.name == "ring" and self.workers > 2 else turns

    @property
    def _degree(self) -> int:
        """Targets of a worker that does not idle."""
        return self.workers - 1 if self.name == "complete" else min(self.peers, self.workers - 1)

    @property
    def _paired(self) -> bool:
        """Whether even seats look forwards and odd ones back, so that they meet; else everybody looks forwards."""
        return self.name == "bipartite_exponential" or (self.name == "ring" and self.symmetric and self.peers == 1)

    @functools.cached_property
    def _distances(self) -> list[int]:
        """The cyclic list, in seats; distinct modulo the number of seats."""
        n = self.workers
        if self.name == "ring":
            return [1, -1][: self.peers]
        if self.name == "complete":
            return list(range(1, n))
        if self.name == "exponential":
            first, possible = [2**j for j in range((n - 1).bit_length())], range(1, n)
        else:
            first, possible = [1, *(1 + 2**j for j in range(1, (n - 2).bit_length()))], range(1, n, 2)
        return first + [d for d in possible if d not in first][: max(0, self.peers - len(first))]

    def _seats(self, exchange: int) -> list[int]:
        """The workers in the order of their seats; who is missing idles."""
        n = self.workers
        if not self._paired:
            return list(range(n))
        if self.name == "ring":
            return [(exchange + seat) % n for seat in range(n - n % 2)]
        return [worker for worker in range(n) if n % 2 == 0 or worker != exchange % n]

    def _reached(self, worker: int, exchange: int, way: int) -> list[int]:
        """
        The workers at this exchange's distances from `worker`, forwards (`way` 1) or back (-1); pairs know one way
        only.
        """
        assert 0 <= worker < self.workers, worker
        seats, distances = self._seats(exchange), self._distances
        if worker not in seats:
            return []
        seat = seats.index(worker)
        if self._paired:
            way = -1 if seat % 2 else 1
        chosen = [distances[(exchange * self._degree + i) % len(distances)] for i in range(self._degree)]
        return [seats[(seat + way * distance) % len(seats)] for distance in chosen]
