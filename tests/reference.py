"""
The paper's Algorithm 1 in its u-form: all workers in one process, float64, plain lists of tensors. Written from the paper alone; it
shares no line with the package.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


def slowmo_reference(
    make_worker: Callable[[int], tuple[list[torch.Tensor], torch.optim.Optimizer, Callable[[int], None], Callable[[], None]]],
    workers: int,
    steps: int,
    tau: int,
    alpha: float,
    beta: float,
    buffers: str = "maintain",
) -> list[list[torch.Tensor]]:
    """
    Run `steps` inner steps on `workers` workers and return each worker's parameters.

    `make_worker(i)` gives (parameters, base optimizer, backward(k), schedule()): `backward(k)` leaves the gradient of step k in the
    parameters, `schedule()` moves the learning rate on. One learning rate per parameter group; line 7 divides by it, so it must not
    be 0 at a round's last step unless nothing has moved.
    """
    crew = [make_worker(i) for i in range(workers)]
    start = [p.detach().clone() for p in crew[0][0]]
    for parameters, _, _, _ in crew:
        for p, s in zip(parameters, start, strict=True):
            p.data.copy_(s)
    x0 = [s.clone() for s in start]
    u = [torch.zeros_like(s) for s in start]
    for k in range(steps):
        for _, optimizer, backward, _ in crew:
            backward(k)
            optimizer.step()
        if (k + 1) % tau == 0:
            gammas = _gamma_per_parameter(crew[0][0], crew[0][1])
            for j, gamma in enumerate(gammas):
                average = sum(parameters[j].detach() for parameters, _, _, _ in crew) / workers
                if gamma == 0:
                    assert torch.equal(average, x0[j]), "line 7 divides by the learning rate"
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
