"""Inner optimizers with a start of their own, parameters of one memory, and states that have no average."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch.optim import SGD

import slowmo_hf
from slowmo_hf import SlowMoConfig, SlowMoOptimizer
from slowmo_hf.training import parts


class MADGRAD(torch.optim.Optimizer):
    """As published (Defazio and Jelassi, 2021): the weights are a mean of themselves and x0 - s / root of squares."""

    def __init__(self, params, lr=0.02, momentum=0.9):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                if not state:
                    state.update(step=0, x0=param.clone(), s=torch.zeros_like(param), squares=torch.zeros_like(param))
                lamb = group["lr"] * math.sqrt(state["step"] + 1)
                state["step"] += 1
                state["s"].add_(param.grad, alpha=lamb)
                state["squares"].addcmul_(param.grad, param.grad, value=lamb)
                goal = state["x0"] - state["s"] / (state["squares"].pow(1 / 3) + 1e-6)
                param.mul_(group["momentum"]).add_(goal, alpha=1 - group["momentum"])


class MirrorMADGRAD(MADGRAD):
    pass


class DAdaptSGD(MADGRAD):
    """Its groups keep what belongs to the sums: a reset would leave that."""


def gaps(make, **settings):
    """Between two workers: at the first round, and 11 steps later, whose gradients are 0."""

    def work(rank):
        weight = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
        config = SlowMoConfig(sync_every=12, outer_momentum=0, **settings)
        optimizer, found = SlowMoOptimizer(make([weight]), config), []
        for step in range(23):
            weight.grad = torch.full_like(weight, (1.0 - 1.5 * rank) * (step < 12))
            optimizer.step()
            found.append(weight[0].item())
        return found[11], found[22]

    (first, later), (other, then) = slowmo_hf.run_in_process(work, 2)
    return first - other, later - then


@pytest.mark.parametrize("make", [MADGRAD, MirrorMADGRAD])
def test_one_that_starts_from_weights_of_its_own_is_refused_but_with_a_reset(make):
    """With its x0 kept the workers would part again behind the round, without a gradient."""
    with pytest.raises(ValueError, match=rf"{make.__name__} computes the weights from its own start") as error:
        gaps(make)
    assert "Set inner_state='reset'" in str(error.value)
    assert gaps(make, inner_state="reset") == (0, 0)
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    SlowMoOptimizer(make([weight]), SlowMoConfig(base="all_reduce", outer_momentum=0)).step()


@pytest.mark.parametrize("inner_state", ["auto", "reset"])
def test_one_with_sums_in_its_groups_is_refused_with_a_reset_too(inner_state):
    with pytest.raises(ValueError, match=r"DAdaptSGD computes the weights .* be lost. Use another optimizer"):
        gaps(DAdaptSGD, inner_state=inner_state)


def two_of_one_memory(rank, settings, tied):
    """`a.weight.data = b.weight.data` after the optimizer was made, or one parameter at both places."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(40, 40, dtype=torch.float64) for _ in range(4)))
    if tied:
        model[2].weight = model[0].weight
    else:
        model[2].weight.data = model[0].weight.data
    params = [p for layer in model for p in (layer.weight, layer.bias)]
    params = [p for i, p in enumerate(params) if all(p is not q for q in params[:i])]
    optimizer = SlowMoOptimizer(SGD(params, lr=0.1), SlowMoConfig(sync_every=3, **settings))
    for step in range(11):
        rows = torch.randn(4, 40, generator=torch.Generator().manual_seed(10 * step + rank), dtype=torch.float64)
        model(rows).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    slowmo_hf.finish(optimizer)
    return [p.detach().clone() for p in (model[0].weight, model[2].weight, model[1].weight)], optimizer.outer_loop


@pytest.mark.parametrize(
    "settings", [{"bucket_bytes": 1024}, {"bucket_bytes": 1024, "overlap_steps": 1}, {"base": "sgp"}], ids=str
)
def test_two_parameters_of_one_memory_are_averaged_once(settings):
    """As one parameter that is tied: SGD without momentum adds both gradients to it there too."""
    found, tied = (
        slowmo_hf.run_in_process(lambda rank, tied=tied: two_of_one_memory(rank, settings, tied), 2)
        for tied in (False, True)
    )
    for (weights_, loop), (expected, _) in zip(found, tied, strict=True):
        for one, other in zip(weights_, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
        assert loop.tensors.others.changed() == []
        assert weights_[0].data_ptr() != weights_[2].data_ptr()


def momenta_of_one_memory(rank):
    first, second = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    second.data = first.data
    optimizer = SlowMoOptimizer(
        SGD([first, second], lr=0.1, momentum=0.9), SlowMoConfig(sync_every=2, inner_state="average")
    )
    for _ in range(2):
        first.grad, second.grad = torch.full((3,), 1.0 + rank), torch.full((3,), 4.0 - rank)
        optimizer.step()
    return [optimizer.state[param]["momentum_buffer"].tolist() for param in (first, second)]


def test_the_states_of_both_are_averaged():
    """1.9 times the gradients' means, 1.5 and 3.5."""
    for first, second in slowmo_hf.run_in_process(momenta_of_one_memory, 2):
        assert first == pytest.approx([1.9 * 1.5] * 3)
        assert second == pytest.approx([1.9 * 3.5] * 3)


def sparse_momentum(rank):
    table = torch.nn.Embedding(7, 3, sparse=True)
    optimizer = SlowMoOptimizer(
        SGD(table.parameters(), lr=0.1, momentum=0.9), SlowMoConfig(sync_every=2, inner_state="average")
    )
    for _ in range(2):
        table(torch.tensor([rank, 3])).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_sparse_momentum_has_no_average_and_is_named():
    with pytest.raises(RuntimeError) as error:
        slowmo_hf.run_in_process(sparse_momentum, 2)
    words = str(error.value.__cause__ or error.value)
    assert "cannot average the state of SGD: its state 'weight.momentum_buffer' is sparse" in words
    assert "Use inner_state='maintain' or 'reset'" in words


def test_an_apple_gpu_is_refused_at_the_start():
    """It has no double precision, and a round would fail there, of one worker too."""
    tensors = SimpleNamespace(names=["w"], trainable=[SimpleNamespace(device=torch.device("mps"))])
    words = parts._refuse_device(SlowMoConfig(), SimpleNamespace(), tensors)
    assert words.startswith("parameter 'w' lies on device 'mps', which has no double precision")
    assert "use_cpu=True" in words
