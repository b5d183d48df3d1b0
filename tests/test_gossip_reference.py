"""
The gossip reference against hand traces and against what it becomes in the limits: the ruler is measured before it
measures.
"""

import pytest
import torch

from reference import gossip_reference, slowmo_reference

HALF = [[0.5, 0.5], [0.5, 0.5]]
ALONE = [[1.0, 0.0], [0.0, 1.0]]
NEVER = 10**9  # a tau beyond every run: gossip alone


def _pushed(*pushes, start=8.0, lr=1.0):
    """Worker i starts at 8 and has the constant gradient pushes[i]; plain SGD with learning rate 1."""

    def make_worker(i):
        weight = torch.nn.Parameter(torch.tensor([start], dtype=torch.float64))

        def backward(k):
            weight.grad = torch.full_like(weight, pushes[i])

        return [weight], torch.optim.SGD([weight], lr=lr), backward, lambda: None

    return make_worker


def _numbers(crew):
    """(x, w, z) of every worker as floats."""
    return [(own.x[0].item(), own.w, own.z[0].item()) for own in crew]


def _flying(crew):
    return [[(x[0].item(), w) for x, w in own.arriving] for own in crew]


def _fits(worker, seed, momentum=0.0, weight_decay=0.0, mean_of=None):
    """
    A noisy quadratic in two groups of unlike curvature, learning rate falling by a tenth per step. `mean_of=m`: one
    worker with the mean of the gradients that workers 0 to m - 1 would have.
    """
    weights = [
        torch.nn.Parameter(torch.ones(3, dtype=torch.float64)),
        torch.nn.Parameter(torch.full((2, 2), -2.0, dtype=torch.float64)),
    ]
    groups = [{"params": weights[:1], "lr": 0.2}, {"params": weights[1:], "lr": 0.1}]
    optimizer = torch.optim.SGD(groups, momentum=momentum, weight_decay=weight_decay)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

    def gradient(i, k, j):
        noise = torch.Generator().manual_seed(1000 * seed + 100 * i + k + 50 * j)
        return (j + 1) * weights[j].detach() + torch.randn(weights[j].shape, generator=noise, dtype=torch.float64)

    def backward(k):
        for j, weight in enumerate(weights):
            crew = [worker] if mean_of is None else range(mean_of)
            weight.grad = sum(gradient(i, k, j) for i in crew) / len(crew)

    return weights, optimizer, backward, scheduler.step


def _random_mixing(workers, seed):
    """Column-stochastic, another matrix at every exchange, about half of the links absent."""

    def mixing(exchange):
        generator = torch.Generator().manual_seed(seed * 1000 + exchange)
        shares = torch.rand(workers, workers, generator=generator, dtype=torch.float64)
        shares *= (torch.rand(workers, workers, generator=generator) < 0.5) | torch.eye(workers, dtype=torch.bool)
        shares += 0.1 * torch.eye(workers, dtype=torch.float64)
        return (shares / shares.sum(dim=0)).tolist()

    return mixing


def test_one_exchange_by_hand():
    """x = 8, 8; gradients 2, 4. Worker 0 keeps 3/4 and sends 1/4, worker 1 keeps and sends 1/2.
    step:     x = 6, 4
    exchange: x_0 = ¾·6 + ½·4 = 6.5, w_0 = ¾ + ½ = 1.25, z_0 = 5.2
              x_1 = ¼·6 + ½·4 = 3.5, w_1 = ¼ + ½ = 0.75, z_1 = 14/3
    step:     the whole gradient goes to the numerator: x = 6.5 - 2, 3.5 - 4
    exchange: x_0 = ¾·4.5 - ½·½ = 3.125,  w_0 = ¾·1.25 + ½·.75 = 1.3125
              x_1 = ¼·4.5 - ½·½ = 0.875,  w_1 = ¼·1.25 + ½·.75 = 0.6875;  sum of x = 16 - 2·6 = 4
    """
    run = {"tau": NEVER, "alpha": 1.0, "beta": 0.0, "mixing": lambda e: [[0.75, 0.5], [0.25, 0.5]]}
    once, twice = (gossip_reference(_pushed(2.0, 4.0), 2, steps, **run) for steps in (1, 2))
    assert _numbers(once) == [(6.5, 1.25, 5.2), (3.5, 0.75, pytest.approx(14 / 3, abs=1e-15))]
    assert [(x, w) for x, w, _ in _numbers(twice)] == [(3.125, 1.3125), (0.875, 0.6875)]
    assert twice[0].average[0].item() == 2.0
    assert _flying(twice) == [[], []]


STALE = {"alpha": 0.5, "beta": 0.5, "mixing": lambda e: HALF, "staleness": 1}


def test_staleness_one_by_hand():
    """
    x = 8, 8; gradients 4, 0; half is kept, half arrives one step later.
    k=1: x = 4, 8;  kept 2, 4;     in flight to 0: (4, ½), to 1: (2, ½). w = ½: z = 4, 8
    k=2: x = -2, 4; kept -1, 2; ¼; landed + (4, ½), (2, ½): x = 3, 4.    w = ¾: z = 4, 16/3.  In flight (2, ¼), (-1, ¼)
    k=3: x = -1, 4; kept -½, 2; ⅜; landed + (2, ¼), (-1, ¼): x = 1.5, 1. w = ⅝: z = 2.4, 1.6. In flight (2, ⅜), (-½, ⅜)
    sum of x and in flight: 12, 8, 4 = 16 - 4k. Sum of w and in flight: 2.
    """
    runs = [gossip_reference(_pushed(4.0, 0.0), 2, steps, NEVER, **STALE) for steps in (1, 2, 3)]
    assert _numbers(runs[0]) == [(2, 0.5, 4), (4, 0.5, 8)]
    assert _numbers(runs[1]) == [(3, 0.75, 4), (4, 0.75, 16 / 3)]
    assert _numbers(runs[2]) == [(1.5, 0.625, 2.4), (1, 0.625, 1.6)]
    assert [_flying(run) for run in runs] == [
        [[(4, 0.5)], [(2, 0.5)]],
        [[(2, 0.25)], [(-1, 0.25)]],
        [[(2, 0.375)], [(-0.5, 0.375)]],
    ]
    assert [run[0].average[0].item() for run in runs] == [6, 4, 2]


def test_a_round_with_messages_in_flight_by_hand():
    """The trace above, tau = 3, α = β = ½.
    k=3: x = -1, 4; no exchange; (2, ¼) and (-1, ¼) are taken in: x = 1, 3, w = 1, 1. a = 4/2 = 2
         u = (8 - 2)/1 = 6, x = z = 8 - ½·6 = 5, w = 1. Nothing in flight
    k=4: x = 1, 5; kept ½, 2.5. The exchanges were numbers 0, 1 and 2: none was counted at k=3
    k=6: u = ½·6 + (5 - a): the workers' mean falls by 2 a step, a = 5 - 6 = -1: u = 9, x = 5 - 4.5 = ½
    """
    asked = []
    mixing = {"mixing": lambda e: asked.append(e) or HALF}
    third, fourth, sixth = (
        gossip_reference(_pushed(4.0, 0.0), 2, steps, 3, **(STALE | mixing)) for steps in (3, 4, 6)
    )
    assert asked == [0, 1, 0, 1, 2, 0, 1, 2, 3]
    assert _numbers(third) == [(5, 1, 5)] * 2
    assert _flying(third) == [[], []]
    assert _numbers(fourth) == [(0.5, 0.5, 1), (2.5, 0.5, 5)]
    assert _numbers(sixth) == [(0.5, 1, 0.5)] * 2


def test_no_average_by_hand():
    """
    The same trace, tau = 2, no exact average: the exchange is made, then each worker goes its own way from 8.
    k=2: z = 4, 16/3, w = ¾, in flight (2, ¼), (-1, ¼), which stay there
         u = 4, 8/3; anchor = z = 8 - 2, 8 - 4/3 = 6, 20/3; x = ¾ z = 4.5, 5. average = (9.5 + 1)/2 = 5.25
    k=3: x = ½, 5; kept ¼, 2.5; ⅜; landed: x = 2.25, 1.5, w = ⅝, z = 3.6, 2.4. In flight (2.5, ⅜), (¼, ⅜)
    k=4: x = -1.75, 1.5; kept -.875, .75; 5/16; landed: x = 1.625, 1, w = 11/16, z = 26/11, 16/11
         u = ½·4 + (6 - 26/11) = 62/11, ½·8/3 + (20/3 - 16/11) = 72/11; anchor = 6 - 31/11, 20/3 - 36/11 = 35/11,
         112/33
    """
    second, fourth = (
        gossip_reference(_pushed(4.0, 0.0), 2, steps, 2, exact_average=False, **STALE) for steps in (2, 4)
    )
    assert _flying(second) == [[(2, 0.25)], [(-1, 0.25)]]
    for own, right in zip(_numbers(second), [(4.5, 0.75, 6), (5, 0.75, 20 / 3)], strict=True):
        assert own == pytest.approx(right, abs=1e-14)
    assert second[1].average[0].item() == pytest.approx(5.25, abs=1e-14)
    for (x, w, z), right in zip(_numbers(fourth), [35 / 11, 112 / 33], strict=True):
        assert (x, w, z) == pytest.approx((right * 11 / 16, 11 / 16, right), abs=1e-14)


@pytest.mark.parametrize("staleness", [0, 1, 2, 5])
@pytest.mark.parametrize("workers", [2, 3, 5])
def test_mass_is_conserved_counting_what_is_in_flight(workers, staleness):
    """
    Sum of w = m; sum of x = its start minus lr times all gradients that were taken. Without what is in flight both
    would be short.
    """
    gradients = []

    def make_worker(i):
        weight = torch.nn.Parameter(torch.full((4,), 3.0, dtype=torch.float64))

        def backward(k):
            weight.grad = (weight.detach() - i) ** 2 - k
            gradients.append(weight.grad.clone())

        return [weight], torch.optim.SGD([weight], lr=0.01), backward, lambda: None

    crew = gossip_reference(
        make_worker, workers, 9, NEVER, 1.0, 0.0, mixing=_random_mixing(workers, 7), staleness=staleness
    )
    flying = [message for own in crew for message in own.arriving]
    held = sum(own.w for own in crew)
    assert held + sum(w for _, w in flying) == pytest.approx(workers, abs=1e-13)
    assert (held < workers - 0.01) == (staleness > 0)
    mass = sum(own.x[0] for own in crew) + sum(x[0] for x, _ in flying)
    assert torch.allclose(mass, 3.0 * workers - 0.01 * sum(gradients), rtol=0, atol=1e-13)
    assert torch.allclose(crew[0].average[0], mass / workers, rtol=0, atol=1e-13)
    for own in crew:
        assert torch.allclose(own.z[0], own.x[0] / own.w, rtol=0, atol=1e-14)


def test_without_staleness_it_is_matrix_algebra():
    """X <- P_k (X - lr (X/w - targets)), w <- P_k w, with another P at every step."""
    targets = torch.tensor([[1.0], [-2.0], [5.0], [0.5]], dtype=torch.float64)

    def make_worker(i):
        weight = torch.nn.Parameter(torch.tensor([2.0], dtype=torch.float64))

        def backward(k):
            weight.grad = weight.detach() - targets[i]

        return [weight], torch.optim.SGD([weight], lr=0.3), backward, lambda: None

    mixing = _random_mixing(4, 3)
    crew = gossip_reference(make_worker, 4, 7, NEVER, 1.0, 0.0, mixing=mixing)
    x, w = torch.full((4, 1), 2.0, dtype=torch.float64), torch.ones(4, 1, dtype=torch.float64)
    for k in range(7):
        shares = torch.tensor(mixing(k), dtype=torch.float64)
        x, w = shares @ (x - 0.3 * (x / w - targets)), shares @ w
    assert (w - 1).abs().max() > 0.1, "the weights must matter"
    for i, own in enumerate(crew):
        assert own.w == pytest.approx(w[i].item(), abs=1e-14)
        assert torch.allclose(own.z[0], x[i] / w[i], rtol=0, atol=1e-13)


@pytest.mark.parametrize("tau", [NEVER, 3])
@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.0, 0.0), (0.9, 0.1)])
def test_complete_mixing_is_one_worker_with_the_mean_gradient(tau, momentum, weight_decay):
    """
    SGD is linear in its gradients, momentum included, so P = 1/m after every step is all-reduce SGD; rounds then find
    agreement.
    """
    kw = {"seed": 1, "momentum": momentum, "weight_decay": weight_decay}
    mixing = [[0.25] * 4] * 4
    crew = gossip_reference(lambda i: _fits(i, **kw), 4, 10, tau, 0.8, 0.5, mixing=lambda e: mixing)
    (right,) = slowmo_reference(lambda i: _fits(i, mean_of=4, **kw), 1, 10, tau, 0.8, 0.5)
    for own in crew:
        assert all(torch.allclose(z, r, rtol=0, atol=1e-13) for z, r in zip(own.z, right, strict=True))


@pytest.mark.parametrize("buffers", ["maintain", "reset"])
def test_no_average_and_no_mixing_is_each_worker_alone(buffers):
    """P = 1: every worker is a one-worker SlowMo of its own."""
    kw = {"seed": 2, "momentum": 0.9}
    crew = gossip_reference(
        lambda i: _fits(i, **kw), 2, 10, 3, 0.8, 0.5, buffers, mixing=lambda e: ALONE, exact_average=False
    )
    for i, own in enumerate(crew):
        (right,) = slowmo_reference(lambda _, i=i: _fits(i, **kw), 1, 10, 3, 0.8, 0.5, buffers)
        assert all(torch.allclose(z, r, rtol=0, atol=1e-13) for z, r in zip(own.z, right, strict=True))
    assert not torch.allclose(crew[0].z[0], crew[1].z[0], atol=1e-3)


@pytest.mark.parametrize("buffers", ["maintain", "reset", "average"])
@pytest.mark.parametrize("staleness", [0, 2])
def test_exact_average_and_no_mixing_is_local_sgd_with_slow_momentum(buffers, staleness):
    kw = {"seed": 3, "momentum": 0.9, "weight_decay": 0.1}
    crew = gossip_reference(
        lambda i: _fits(i, **kw), 2, 10, 3, 0.8, 0.5, buffers, mixing=lambda e: ALONE, staleness=staleness
    )
    right = slowmo_reference(lambda i: _fits(i, **kw), 2, 10, 3, 0.8, 0.5, buffers)
    for own, weights in zip(crew, right, strict=True):
        assert all(torch.allclose(z, r, rtol=0, atol=1e-13) for z, r in zip(own.z, weights, strict=True))


def test_a_learning_rate_of_zero_moves_nothing_and_lets_momentum_decay():
    """tau = 1, α = 1, β = ½, gradient 2, learning rate 1, 0, 1.
    t=1: u = 2, x = 8 - 2 = 6
    t=2: nothing moves; u = ½·2
    t=3: u = ½·1 + 2 = 2.5, x = 6 - 2.5 = 3.5
    """

    def make_worker(i):
        weights, optimizer, backward, _ = _pushed(2.0, 2.0)(i)
        return weights, optimizer, backward, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: float(k != 1)).step

    assert _numbers(gossip_reference(make_worker, 2, 3, 1, 1.0, 0.5, mixing=lambda e: HALF)) == [(3.5, 1, 3.5)] * 2


def test_a_matrix_that_loses_mass_is_refused():
    with pytest.raises(AssertionError, match="worker 1's mass is not conserved"):
        gossip_reference(_pushed(0.0, 0.0), 2, 1, NEVER, 1.0, 0.0, mixing=lambda e: [[0.5, 0.6], [0.5, 0.5]])
