"""
Noisy and noiseless quadratics through the package, against what theory says before they are run: variance, step,
border.
"""

import math

import pytest
import torch
import torch.distributed as dist

from harness import run_workers
from slowmo_hf import SlowMoConfig, SlowMoOptimizer, consensus

GAMMA = 0.1


def _worker(config, start, inner_lr=GAMMA):
    """A weight in float64 and plain SGD inside."""
    weight = torch.nn.Parameter(start.double().clone())
    return weight, SlowMoOptimizer(torch.optim.SGD([weight], lr=inner_lr), config)


def _train(weight, optimizer, gradient, steps):
    for _ in range(steps):
        weight.grad = gradient(weight.detach())
        optimizer.step()
    return weight.detach().clone()


def _rounds(config, gradient, start, rounds, inner_lr=GAMMA):
    """The weights after every round, shape (rounds, elements)."""
    weight, optimizer = _worker(config, start, inner_lr)
    return torch.stack([_train(weight, optimizer, gradient, config.sync_every) for _ in range(rounds)])


# ---- (a) linear speed-up ----

ELEMENTS, TAU, CURVATURE, NOISE, ROUNDS = 20_000, 4, 2.0, 3.0, 20
DECAY = 1 - GAMMA * CURVATURE  # of x per inner step: 0.8
OUTER = [(1.0, 0.0), (0.7, 0.5)]  # (alpha, beta)


def _mean_square(weight):
    return float(weight.detach().square().mean())


def _noise_floor():
    """
    For every (alpha, beta): the mean square of the anchor after ROUNDS rounds; two steps on, of the average and of
    this worker.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    noise = torch.Generator().manual_seed(1000 * world + rank)

    def gradient(x):
        return CURVATURE * x + NOISE * torch.randn(ELEMENTS, generator=noise, dtype=torch.float64)

    found = []
    for alpha, beta in OUTER:
        config = SlowMoConfig(sync_every=TAU, outer_lr=alpha, outer_momentum=beta)
        weight, optimizer = _worker(config, torch.zeros(ELEMENTS))
        _train(weight, optimizer, gradient, ROUNDS * TAU)
        anchor = _mean_square(weight)
        _train(weight, optimizer, gradient, TAU // 2)
        with consensus(optimizer):
            average = _mean_square(weight)
        found.append([anchor, average, _mean_square(weight)])
    return found


def _predicted_floor(workers, alpha, beta):
    """The derivation is in the test's docstring."""
    eta = 1 - DECAY**TAU
    of_steps = [(GAMMA * NOISE) ** 2 * sum(DECAY ** (2 * j) for j in range(steps)) for steps in (TAU, TAU // 2)]
    anchor = alpha * (1 + beta) / ((1 - beta) * eta * (2 * (1 + beta) - alpha * eta)) * of_steps[0] / workers
    shrunk = DECAY**TAU * anchor  # half a round is TAU/2 steps, its square TAU
    return [anchor, shrunk + of_steps[1] / workers, shrunk + of_steps[1]]


@pytest.mark.slow
def test_the_noise_floor_falls_as_one_over_the_number_of_workers():
    """
    Every worker's gradient is h x + σ ξ, ξ independent normal. One inner step of the mean over m workers is
    x <- d x - γ σ ξ/√m with d = 1 - γ h, so the pseudo-gradient is Δ = η A + n with anchor A,
    η = 1 - d^τ, var n = s² = γ²σ²/m (1 + d² + ... + d^{2(τ-1)}), and

        A_{t+1} = A_t - α v_t,  v_t = β v_{t-1} + η A_t + n_t,
        that is A_{t+1} = (1 + β - αη) A_t - β A_{t-1} - α n_t,

    an AR(2) process with φ₁ = 1 + β - αη, φ₂ = -β, whose stationary variance (1 - φ₂) α²s² /
    ((1 + φ₂)((1 - φ₂)² - φ₁²)) is

        var A = α (1 + β) s² / ((1 - β) η (2 (1 + β) - αη)):    1/m of one worker's.

    Two steps into the next round the mean has d⁴ var A + γ²σ²/m (1 + d²), while a single worker's own noise has no
    1/m.

    The mean square of N = 20 000 independent normal samples has a relative standard deviation of √(2/N) = 1 %; five of
    them are allowed. What the start left out is far below: the slowest mode is √β < 0.71 a round, 10⁻⁶ of the variance
    after 20 rounds.
    """
    tolerance = 5 * math.sqrt(2 / ELEMENTS)
    floors = {}
    for workers in (1, 2, 4):
        for rank, found in enumerate(run_workers(_noise_floor, workers) if workers > 1 else [_noise_floor()]):
            for (alpha, beta), measured in zip(OUTER, found, strict=True):
                assert measured == pytest.approx(_predicted_floor(workers, alpha, beta), rel=tolerance), (
                    workers,
                    rank,
                    alpha,
                    beta,
                )
                floors[workers, beta] = measured
    for _, beta in OUTER:
        for workers in (2, 4):
            (anchor_of_one, mean_of_one, own_of_one), (anchor, mean, own) = floors[1, beta], floors[workers, beta]
            assert anchor_of_one / anchor == pytest.approx(workers, rel=2 * tolerance)
            assert mean_of_one / mean == pytest.approx(workers, rel=2 * tolerance)
            assert own_of_one / own < 0.8 * workers, (
                "a worker between rounds has its own noise: only the average gains in full"
            )


# ---- (b) the effective step ----

PUSH = torch.tensor([3.0, -0.5], dtype=torch.float64)


def test_the_effective_step_is_exact_in_binary_fractions():
    """
    Linear loss: Δ = τ γ g every round, v_t = Δ (1 + β + ... + β^{t-1}) -> Δ/(1 - β), so the anchor's step tends to α τ
    γ g / (1 - β). τ = 4, γ = ¼, g = 3 and -½, α = 2, β = ½ are binary fractions: round t moves by -α τ γ g · 2 (1 -
    2⁻ᵗ), to the last bit.
    """
    path = _rounds(
        SlowMoConfig(sync_every=4, outer_lr=2.0, outer_momentum=0.5), lambda x: PUSH, torch.zeros(2), 30, inner_lr=0.25
    )
    for t, (before, after) in enumerate(zip([torch.zeros(2), *path], path, strict=False), start=1):
        assert torch.equal(after - before, -2 * 4 * 0.25 * PUSH * 2 * (1 - 2.0**-t))


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.0), (1.0, 0.6), (0.7, 0.8), (2.0, 0.4)])
@pytest.mark.parametrize("tau", [1, 12])
def test_the_effective_step(tau, alpha, beta):
    """
    The same for other settings, after 120 rounds: β^120 < 10⁻¹¹. Without the 1/(1 - β) it would be 1.7 to 5 times
    smaller.
    """
    path = _rounds(
        SlowMoConfig(sync_every=tau, outer_lr=alpha, outer_momentum=beta), lambda x: PUSH, torch.zeros(2), 120
    )
    plain = -alpha * tau * GAMMA * PUSH
    step = path[-1] - path[-2]
    assert torch.allclose(step, plain / (1 - beta), rtol=1e-10, atol=0)
    assert beta == 0 or not torch.allclose(step, plain, rtol=0.5, atol=0)


def _two_pushes():
    push = torch.tensor([[3.0, 0.0], [-1.0, 1.0]], dtype=torch.float64)[dist.get_rank()]
    path = _rounds(SlowMoConfig(sync_every=4, outer_lr=1.0, outer_momentum=0.6), lambda x: push, torch.zeros(2), 60)
    return path[-1] - path[-2]


def test_the_effective_step_takes_the_mean_gradient():
    """Workers pushed by (3, 0) and (-1, 1) move together by α τ γ/(1 - β) times (1, ½); 0.6^60 < 10⁻¹³."""
    for step in run_workers(_two_pushes, 2):
        assert step.tolist() == pytest.approx([-4 * GAMMA * 1.0 / 0.4, -4 * GAMMA * 0.5 / 0.4], rel=1e-11)


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.0), (1.0, 0.5), (0.5, 0.7), (1.0, 0.8)])
def test_a_slow_direction_shrinks_by_the_dominant_eigenvalue(alpha, beta):
    """
    Curvature h, no noise: Δ = η A, η = 1 - (1 - γh)^τ, and a round is linear in (A, v):

        v' = β v + η A            M = [[1 - αη, -αβ],        trace = 1 + β - αη,  determinant = β
        A' = A - α v'                  [η,        β ]]

    λ = ((1 + β - αη) + √((1 + β - αη)² - 4β)) / 2, real where η is small: the distance shrinks by λ a round. To first
    order 1 - λ = αη/(1 - β), the effective step again, short by αηβ/(1 - β)² of itself (2 % at most here); 1 - λ = αη
    is wrong by 1/(1 - β).
    """
    tau, curvature = 5, 0.002
    eta = 1 - (1 - GAMMA * curvature) ** tau
    config = SlowMoConfig(sync_every=tau, outer_lr=alpha, outer_momentum=beta)
    path = _rounds(config, lambda x: curvature * x, torch.tensor([1.0, -3.0]), 200)
    trace = 1 + beta - alpha * eta
    dominant = (trace + math.sqrt(trace**2 - 4 * beta)) / 2
    matrix = torch.tensor([[1 - alpha * eta, -alpha * beta], [eta, beta]], dtype=torch.float64)
    assert torch.linalg.eigvals(matrix).abs().max().item() == pytest.approx(dominant, abs=1e-14)
    ratio = path[-1] / path[-2]
    assert ratio.tolist() == pytest.approx([dominant] * 2, abs=1e-12)
    second_order = alpha * eta * beta / (1 - beta) ** 2
    assert (1 - ratio).tolist() == pytest.approx([alpha * eta / (1 - beta)] * 2, rel=1.1 * second_order + 1e-9)


# ---- (c) the border of stability ----

BORDER = torch.tensor([-0.02, 0.02, 0.5, 0.98, 1.02], dtype=torch.float64)  # alpha (1 - a) / (2 (1 + beta))
STABLE = [False, True, True, True, False]


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.6, 0.9])
@pytest.mark.parametrize(("tau", "alpha"), [(3, 1.0), (4, 5.0), (1, 0.5)])
def test_the_stable_range(tau, alpha, beta):
    """
    A round of inner SGD is x -> a x, a = (1 - γh)^τ, so Δ = (1 - a) A and slow momentum is heavy ball on the anchor:
    λ² - (1 + β - α(1 - a)) λ + β = 0. Both roots lie inside the unit circle iff β < 1 and |1 + β - α(1 - a)| < 1 + β,
    that is

        0 < α (1 - a) < 2 (1 + β).

    One element per curvature: c = α(1 - a)/(2(1 + β)) just outside 0, just inside, in the middle, just inside 1, just
    outside. Near c = 1 the root is -1 - 2 (c - 1)(1 + β)/(1 - β), so that 2 % from the border changes the distance by
    4 % a round or more, e^12 in 300 rounds. A border at 2, plain descent's, is passed by c = 0.98 for every β > 0,
    which converges nevertheless; with τ = 3 and α = 1 inner SGD alone diverges there (a < -1).
    """
    a = 1 - BORDER * 2 * (1 + beta) / alpha
    curvature = (1 - a.sign() * a.abs() ** (1 / tau)) / GAMMA
    assert torch.allclose((1 - GAMMA * curvature) ** tau, a, rtol=0, atol=1e-14)
    path = _rounds(
        SlowMoConfig(sync_every=tau, outer_lr=alpha, outer_momentum=beta), lambda x: curvature * x, torch.ones(5), 300
    )
    end = path[-10:].abs().amax(dim=0)  # roots may be complex: the largest of ten rounds
    assert [bool(distance < 1e-4) for distance in end] == STABLE, end
    assert [bool(distance > 1e4) for distance in end] == [not stable for stable in STABLE], end
    if tau == 3 and alpha == 1.0 and beta > 0:
        assert a[3] < -1
