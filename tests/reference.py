"""
The paper's Algorithm 1 in its u-form, over Local SGD and over gossip: all workers in one process, float64, plain lists
of tensors. Written from the paper alone; it shares no line with the package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


def slowmo_reference(
    make_worker: Callable[
        [int], tuple[list[torch.Tensor], torch.optim.Optimizer, Callable[[int], None], Callable[[], None]]
    ],
    workers: int,
    steps: int,
    tau: int,
    alpha: float,
    beta: float,
    buffers: str = "maintain",
) -> list[list[torch.Tensor]]:
    """
    Run `steps` inner steps on `workers` workers and return each worker's parameters.

    `make_worker(i)` gives (parameters, base optimizer, backward(k), schedule()): `backward(k)` leaves the gradient of
    step k in the parameters, `schedule()` moves the learning rate on. gamma of a round is the mean of its steps'
    learning rates, per parameter group; line 7 divides by it, so it must not be 0 unless nothing has moved.
    """
    crew = [make_worker(i) for i in range(workers)]
    start = [p.detach().clone() for p in crew[0][0]]
    for parameters, _, _, _ in crew:
        for p, s in zip(parameters, start, strict=True):
            p.data.copy_(s)
    x0 = [s.clone() for s in start]
    u = [torch.zeros_like(s) for s in start]
    in_force = []
    for k in range(steps):
        in_force.append(_gamma_per_parameter(crew[0][0], crew[0][1]))
        for _, optimizer, backward, _ in crew:
            backward(k)
            optimizer.step()
        if (k + 1) % tau == 0:
            gammas, in_force = [sum(of_one) / tau for of_one in zip(*in_force, strict=True)], []
            for j, gamma in enumerate(gammas):
                average = sum(parameters[j].detach() for parameters, _, _, _ in crew) / workers
                if gamma == 0:
                    assert torch.equal(average, x0[j]), "line 7 divides by the learning rate"
                    u[j] = beta * u[j]
                    continue
                u[j] = beta * u[j] + (x0[j] - average) / gamma
                x0[j] = x0[j] - alpha * gamma * u[j]
            for parameters, optimizer, _, _ in crew:
                for p, s in zip(parameters, x0, strict=True):
                    p.data.copy_(s)
                if buffers == "reset":
                    optimizer.state.clear()
            if buffers == "average":
                _average_buffers(crew)
        for _, _, _, schedule in crew:
            schedule()
    return [[p.detach().clone() for p in parameters] for parameters, _, _, _ in crew]


def _gamma_per_parameter(parameters, optimizer):
    of = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    return [of[id(p)] for p in parameters]


def _average_buffers(crew):
    for j in range(len(crew[0][0])):
        states = [optimizer.state[parameters[j]] for parameters, optimizer, _, _ in crew]
        for key, value in states[0].items():
            if torch.is_tensor(value) and value.dim() > 0:
                mean = sum(state[key] for state in states) / len(states)
                for state in states:
                    state[key].copy_(mean)


@dataclass
class GossipWorker:
    """
    One worker as a run of `gossip_reference` leaves it.

    `z` is what its parameters hold, x / w; `x` the numerator; `w` the push-sum weight; `arriving` the (x, w) still on
    their way to it; `average` everybody's sum of x over sum of w, messages in flight included.
    """

    z: list[torch.Tensor]
    x: list[torch.Tensor]
    w: float
    arriving: list[tuple[list[torch.Tensor], float]]
    average: list[torch.Tensor]


def gossip_reference(
    make_worker: Callable[
        [int], tuple[list[torch.Tensor], torch.optim.Optimizer, Callable[[int], None], Callable[[], None]]
    ],
    workers: int,
    steps: int,
    tau: int,
    alpha: float,
    beta: float,
    buffers: str = "maintain",
    *,
    mixing: Callable[[int], list[list[float]]],
    staleness: int = 0,
    exact_average: bool = True,
) -> list[GossipWorker]:
    """
    SGP (`staleness=0`) and OSGP under slow momentum; `make_worker` as in `slowmo_reference`. A `tau` beyond `steps` is
    gossip alone.

        z' = base step from z = x / w, its gradient taken at z        x_i <- x_i + (z' - z)
        exchange e, after every step k but those of an exact average, P = mixing(e):
            x_i, w_i <- P[i][i] (x_i, w_i)                            and P[i][j] (x_j, w_j) goes out from j to i,
            then what was sent after step k - staleness is added      (staleness 0: at once)
        round, after every tau steps:
            exact_average: no exchange; messages in flight are taken in; a = sum x / sum w.
            Otherwise: the exchange; a_i = z_i
            u <- beta u + (x_{t,0} - a) / gamma;  x_{t+1,0} = x_{t,0} - alpha gamma u
            exact_average: x_i = x_{t+1,0}, w_i = 1.
            Otherwise: z_i = x_{t+1,0}, x_i = w_i z_i; what is in flight stays there

    `mixing(e)[i][j]` is the share of j's mass that i gets, `[j][j]` what j keeps: every column sums to 1. Without the
    exact average nothing is averaged, so `buffers="average"` has no meaning there.
    """
    assert exact_average or buffers != "average", "who leaves line 6 out averages nothing"
    members = [make_worker(i) for i in range(workers)]
    first = [p.detach().clone() for p in members[0][0]]
    crew = [_PushSum(member, first) for member in members]
    exchanges = 0
    for k in range(steps):
        round_is_due = (k + 1) % tau == 0
        for own in crew:
            own.base_step(k)
        if not (round_is_due and exact_average):
            _exchange(crew, mixing(exchanges), k, staleness)
            exchanges += 1
        if round_is_due:
            _slow_round(crew, alpha, beta, exact_average)
            if buffers == "average":
                _average_buffers(members)
            elif buffers == "reset":
                for own in crew:
                    own.optimizer.state.clear()
        for own in crew:
            own.schedule()
    average = _average_with_flight(crew)
    return [
        GossipWorker([p.detach().clone() for p in own.z], own.x, own.w, [m[1:] for m in own.arriving], average)
        for own in crew
    ]


class _PushSum:
    """A worker of `gossip_reference`; `arriving` holds (the step after which it is added, x, w)."""

    def __init__(self, member, first):
        self.z, self.optimizer, self._backward, self.schedule = member
        self.w, self.arriving, self.in_force = 1.0, [], []
        self.start_round_at(first)
        self.u = [torch.zeros_like(s) for s in first]

    def start_round_at(self, point):
        self.x0 = [s.clone() for s in point]
        self.x = [self.w * s for s in point]
        for p, s in zip(self.z, point, strict=True):
            p.data.copy_(s)

    def base_step(self, k):
        before = [p.detach().clone() for p in self.z]
        self.in_force.append(_gamma_per_parameter(self.z, self.optimizer))
        self._backward(k)
        self.optimizer.step()
        self.x = [x + (p.detach() - z) for x, p, z in zip(self.x, self.z, before, strict=True)]

    def take_in(self, until):
        for _, x, w in (message for message in self.arriving if message[0] <= until):
            self.x, self.w = [a + b for a, b in zip(self.x, x, strict=True)], self.w + w
        self.arriving = [message for message in self.arriving if message[0] > until]

    def slow_step(self, reached, alpha, beta):
        following, steps = [], len(self.in_force)
        gammas, self.in_force = [sum(of_one) / steps for of_one in zip(*self.in_force, strict=True)], []
        for j, gamma in enumerate(gammas):
            if gamma == 0:
                assert torch.allclose(reached[j], self.x0[j], rtol=0, atol=1e-12), (
                    "line 7 divides by the learning rate"
                )
                self.u[j] = beta * self.u[j]
            else:
                self.u[j] = beta * self.u[j] + (self.x0[j] - reached[j]) / gamma
            following.append(self.x0[j] - alpha * gamma * self.u[j])
        self.start_round_at(following)


def _exchange(crew, shares, k, staleness):
    for j in range(len(crew)):
        column = [row[j] for row in shares]
        assert min(column) >= 0, f"worker {j} would send a negative share: {column}"
        assert abs(sum(column) - 1) < 1e-12, f"worker {j}'s mass is not conserved: {column}"
    had = [(own.x, own.w) for own in crew]
    for i, own in enumerate(crew):
        for j, (x, w) in enumerate(had):
            part = ([shares[i][j] * a for a in x], shares[i][j] * w)
            if j == i:
                own.x, own.w = part
            elif shares[i][j] > 0:
                own.arriving.append((k + staleness, *part))
    for own in crew:
        own.take_in(until=k)
        for p, x in zip(own.z, own.x, strict=True):
            p.data.copy_(x / own.w)


def _slow_round(crew, alpha, beta, exact_average):
    if exact_average:
        average = _average_with_flight(crew)
        for own in crew:
            own.w, own.arriving = 1.0, []
    for own in crew:
        own.slow_step(average if exact_average else [p.detach().clone() for p in own.z], alpha, beta)


def _average_with_flight(crew):
    held = [(own.x, own.w) for own in crew] + [message[1:] for own in crew for message in own.arriving]
    mass = sum(w for _, w in held)
    return [sum(x[j] for x, _ in held) / mass for j in range(len(crew[0].z))]
