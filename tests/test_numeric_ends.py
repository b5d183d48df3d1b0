"""Where numbers and memory end: one memory in two forms, rates of almost 0, sums that overflow, hidden weights."""

from __future__ import annotations

import pytest
import torch
from torch.optim import SGD

import slowmo_hf
from slowmo_hf import SlowMoConfig, SlowMoOptimizer
from tiny import Heard

# ---- one memory ----


def autoencoder(rank, settings, tied):
    """The decoder's weight is the encoder's, transposed: a parameter of its own, or computed at every pass."""
    torch.manual_seed(0)
    encoder, decoder = (torch.nn.Linear(n, m, dtype=torch.float64) for n, m in ((40, 20), (20, 40)))
    params = [encoder.weight, encoder.bias, decoder.bias]
    if not tied:
        decoder.weight = torch.nn.Parameter(encoder.weight.detach().t())
        params.insert(2, decoder.weight)
    optimizer = SlowMoOptimizer(SGD(params, lr=0.1), SlowMoConfig(sync_every=3, **settings))
    for step in range(11):
        rows = torch.randn(4, 40, generator=torch.Generator().manual_seed(10 * step + rank), dtype=torch.float64)
        back = encoder.weight.t() if tied else decoder.weight
        (torch.nn.functional.linear(encoder(rows), back, decoder.bias) - rows).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    slowmo_hf.finish(optimizer)
    return encoder.weight.detach().clone()


@pytest.mark.parametrize(
    "settings",
    [
        {"overlap_steps": 1},
        {"overlap_steps": 1, "outer_momentum": 0.0},
        {"bucket_bytes": 1024},
        {"bucket_bytes": 1024, "outer_lr": 0.7, "outer_momentum": 0.0},
        {"bucket_bytes": 1024, "base": "sgp"},
        {"bucket_bytes": 1024, "base": "osgp"},
    ],
    ids=str,
)
def test_a_transposed_tie_is_averaged_once(settings):
    """As one parameter: SGD without momentum adds both gradients to it there too."""
    found, right = (
        slowmo_hf.run_in_process(lambda rank, tied=tied: autoencoder(rank, settings, tied), 2)
        for tied in (False, True)
    )
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_memories_that_overlap_in_part_are_refused_by_name():
    memory = torch.zeros(10)
    model = torch.nn.ParameterDict({"head": torch.nn.Parameter(memory[:6]), "tail": torch.nn.Parameter(memory[4:])})
    optimizer = SlowMoOptimizer(SGD(model.parameters(), lr=0.1), SlowMoConfig())
    with pytest.raises(ValueError, match=r"parameters '.*' and '.*' have a part of their memory in common"):
        optimizer.step(lambda: sum(p.square().sum() for p in model.values()))


def test_parts_of_one_memory_that_touch_are_trained():
    """As in a flat buffer of all parameters."""
    memory = torch.ones(10)
    params = [torch.nn.Parameter(memory[:6]), torch.nn.Parameter(memory[6:])]
    optimizer = SlowMoOptimizer(SGD(params, lr=0.1), SlowMoConfig(sync_every=1, outer_momentum=0.0))
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.allclose(memory, torch.full((10,), 0.9))


class Quantised(torch.Tensor):
    """Shows floats that it makes up from codes, at every look."""

    @staticmethod
    def __new__(cls, codes):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes):
        self.codes = codes

    def __tensor_flatten__(self):
        return ["codes"], None

    @staticmethod
    def __tensor_unflatten__(inner, meta, size, stride):
        return Quantised(inner["codes"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return Quantised(args[0].codes)
        shown = [one.codes.float() if isinstance(one, Quantised) else one for one in args]
        return func(*shown, **(kwargs or {}))


def test_weights_that_show_a_copy_are_refused_by_name():
    param = torch.nn.Parameter(Quantised(torch.ones(3, dtype=torch.int8)))
    optimizer = SlowMoOptimizer(SGD([param], lr=0.1), SlowMoConfig())
    with pytest.raises(ValueError, match=r"parameter 'parameter 0' is a Quantised, which shows a copy"):
        optimizer.step(lambda: torch.zeros(()))


# ---- rates ----


def after_a_restart(rate, **settings):
    """How far from the optimum of a quadratic, behind a round at this rate and a restart."""

    def work(rank):
        param = torch.nn.Parameter(torch.ones(40) + rank)
        optimizer = SlowMoOptimizer(SGD([param], lr=0.1), SlowMoConfig(sync_every=12, **settings))
        for step in range(60):
            optimizer.param_groups[0]["lr"] = rate if 12 <= step < 24 else 1e-3
            optimizer.zero_grad()
            (0.5 * (param - rank - torch.linspace(0, 1, 40)).square().sum()).backward()
            optimizer.step()
        slowmo_hf.finish(optimizer)
        return float((param.detach() - 0.5).abs().max())

    return max(slowmo_hf.run_in_process(work, 2))


@pytest.mark.parametrize("settings", [{}, {"compression": "int8"}, {"base": "osgp"}], ids=str)
@pytest.mark.parametrize("rate", [4.55e-20, 1e-320])
def test_a_rate_that_was_zero_but_for_rounding_is_taken_as_zero(rate, settings):
    """Its round leaves rounding behind, which the ratio to the next rate would make 1e16 times as large."""
    assert after_a_restart(rate, **settings) == pytest.approx(after_a_restart(0.0, **settings), abs=1e-6)


def test_a_slow_fall_and_a_restart_begin_with_fresh_momentum():
    """A tenth per round down to 1e-12, then 1: beside its steps what is kept would be 1e12 times its rounding."""
    anchor = torch.zeros(1)
    update = slowmo_hf.algorithm.slow_momentum.SlowMomentum([anchor], outer_momentum=0.5)
    for exponent in range(13):
        update.param_groups[0]["inner_lr"] = 10.0**-exponent
        update.update_(anchor, torch.tensor([10.0**-exponent + 1e-8]), 0)  # a step, and rounding
        update.end_round()
    update.param_groups[0]["inner_lr"] = 1.0
    assert float(update.update_(anchor, torch.tensor([0.25]), 0)) == 0.25


@pytest.mark.parametrize("has_rounds", [True, False])
def test_stock_training_takes_a_head_that_is_a_part_of_the_embedding(has_rounds):
    """Nothing is averaged there."""
    table = torch.nn.Parameter(torch.ones(4, 2))
    head = torch.nn.Parameter(table.detach()[:2])
    config = SlowMoConfig(base="all_reduce", outer_momentum=0.5 if has_rounds else 0.0)
    optimizer = SlowMoOptimizer(SGD([table, head], lr=0.1), config)
    table.grad, head.grad = torch.ones_like(table), torch.ones_like(head)
    if has_rounds:
        with pytest.raises(ValueError, match=r"compute the part in forward \(weight\[:n\]\)"):
            optimizer.step()
    else:
        optimizer.step()
        assert table[0].tolist() == pytest.approx([0.8] * 2)


class Mu(torch.optim.Optimizer):
    """Momentum under a name that is a count's elsewhere; and a mean that is a number for some parameters."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            state["mu"] = state.get("mu", 0) + p.grad
            state["vmean"] = p.grad.mean() if p.numel() == 2 else p.grad.mean(0)
            p.data.sub_(state["mu"], alpha=0.1)


def test_states_are_told_from_counts_by_what_they_are():
    def work(rank):
        params = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3, 2))]
        inner = Mu(params)
        optimizer = SlowMoOptimizer(inner, SlowMoConfig(sync_every=1, inner_state="average"))
        for param in params:
            param.grad = torch.full_like(param, 1.0 + 2 * rank)
        optimizer.step()
        return [inner.state[p]["mu"].unique().tolist() for p in params], inner.state[params[1]]["vmean"].tolist()

    assert slowmo_hf.run_in_process(work, 2) == [([[2.0], [2.0]], [2.0, 2.0])] * 2


def test_a_rise_that_a_warm_up_may_make_keeps_its_momentum():
    """Of 1e-3 to 1e3, all of the paper's form."""
    anchor, velocity = torch.zeros(1, dtype=torch.float64), 0.0
    update = slowmo_hf.algorithm.slow_momentum.SlowMomentum([anchor], outer_momentum=0.5)
    x, u = 0.0, 0.0
    for lr, delta in ((1e-3, 2e-3), (1e3, 4e3), (1e3, -1e3)):
        update.param_groups[0]["inner_lr"] = lr
        velocity = update.update_(anchor, torch.tensor([delta], dtype=torch.float64), 0)
        update.end_round()
        u = 0.5 * u + delta / lr
        x -= lr * u
    assert float(anchor) == pytest.approx(x, rel=1e-12)
    assert float(velocity) == pytest.approx(1e3 * u, rel=1e-12)


def osgp_with(staleness, topology):
    def work(rank):
        param = torch.nn.Parameter(torch.ones(3))
        config = SlowMoConfig(base="osgp", staleness=staleness, topology=topology, sync_every=48)
        optimizer = SlowMoOptimizer(SGD([param], lr=0.1), config)
        least = 1.0
        for _ in range(2 * staleness + 2):
            param.grad = torch.ones(3)
            optimizer.step()
            least = min(least, optimizer.outer_loop.base.weight)
        return least

    with Heard() as heard:
        least = slowmo_hf.run_in_process(work, 4)
    return min(least), heard.about("push-sum weight falls to", "WARNING")


@pytest.mark.parametrize(
    ("staleness", "topology", "said"),
    [(1, "complete", 0), (2, "exponential", 0), (3, "exponential", 0), (4, "exponential", 1), (2, "complete", 1)],
)
def test_a_weight_that_falls_far_is_told_with_its_true_size(staleness, topology, said):
    least, lines = osgp_with(staleness, topology)
    assert len(lines) == said
    for line in lines:
        assert f"falls to 1/{round(1 / least)}, " in line


# ---- averages ----


@pytest.mark.parametrize("workers", [2, 3])
def test_a_mean_is_finite_where_the_sum_is_not(workers):
    """A mask of the dtype's least value that a pass has filled."""

    def work(rank):
        model = torch.nn.Linear(2, 1)
        model.register_buffer("mask", torch.zeros(3))
        optimizer = SlowMoOptimizer(SGD(model.parameters(), lr=0.1), SlowMoConfig(sync_every=1))
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        model.mask.copy_(torch.tensor([0.9 * torch.finfo(torch.float32).min, 3.0, 1e-30 * (rank + 1)]))
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        return model.mask.tolist()

    for low, three, small in slowmo_hf.run_in_process(work, workers):
        assert low == pytest.approx(0.9 * torch.finfo(torch.float32).min, rel=1e-6)
        assert three == 3
        assert small == pytest.approx(1e-30 * (workers + 1) / 2, rel=1e-6)


@pytest.mark.parametrize("alone", [False, True])
def test_the_state_of_a_parameter_without_dimensions_is_averaged(alone):
    """CLIP's temperature. `step`, a number for every parameter, is a count."""

    def work(rank):
        scale, weight = torch.nn.Parameter(torch.tensor(1.0)), torch.nn.Parameter(torch.ones(2))
        params = [scale] if alone else [scale, weight]
        inner = torch.optim.NAdam(params, lr=0.1)
        optimizer = SlowMoOptimizer(inner, SlowMoConfig(sync_every=2, inner_state="average"))
        for _ in range(2):
            for param in params:
                param.grad = torch.full_like(param, 1.0 + rank)
            optimizer.step()
        state = inner.state[scale]
        return [float(state[key]) for key in ("exp_avg", "exp_avg_sq", "step", "mu_product")]

    (first, second, steps, product), other = slowmo_hf.run_in_process(work, 2)
    assert (first, second) == pytest.approx((1.5 * (1 - 0.9**2), (1 + 4) / 2 * (1 - 0.999**2)), rel=1e-4)
    assert steps == 2
    assert other == [first, second, steps, product]


# ---- resumes ----


@pytest.mark.parametrize("rates", [(0.09, 0.081), (-1e-18, -1e-18)])
def test_rates_that_have_parted_or_ran_below_zero_are_gone_on_with(rates):
    """A OneCycleLR that a skipped step has held back on one rank, its momentum too; a LambdaLR past its end."""

    def made(rank):
        param = torch.nn.Parameter(torch.ones(3))
        inner = SGD([param], lr=0.1, momentum=0.9)
        return param, inner, SlowMoOptimizer(inner, SlowMoConfig(sync_every=2))

    def step(param, optimizer, rate):
        optimizer.param_groups[0]["lr"] = rate
        param.grad = param.detach().clone()
        optimizer.step()

    def work(rank):
        param, _, optimizer = made(rank)
        step(param, optimizer, 0.1)
        for _ in range(3):
            optimizer.param_groups[0]["momentum"] = 0.9 - rates[rank]
            step(param, optimizer, rates[rank])
        kept, values = optimizer.state_dict(), param.detach().clone()
        step(param, optimizer, rates[rank])
        again, _, resumed = made(rank)
        with torch.no_grad():
            again.copy_(values)
        resumed.load_state_dict(kept)
        assert resumed.param_groups[0]["lr"] == rates[rank]
        step(again, resumed, rates[rank])
        return torch.equal(again, param)

    assert slowmo_hf.run_in_process(work, 2) == [True, True]
