"""
Inner optimizers: which state "auto" resets, every optimizer of torch with every inner state against a simulation in
plain PyTorch, states of codes, and Trainer's names for `optim`.
"""

from __future__ import annotations

import re
import tempfile
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import Adafactor, Trainer

from harness import patience, run_workers
from slowmo_hf import SlowMoCallback, SlowMoConfig, SlowMoOptimizer, run_in_process
from slowmo_hf.training.inner_state import InnerState
from slowmo_hf.training.model_tensors import ModelTensors
from tiny import Recorder, Regression, Rows, SeveralInOne, arguments, equal, error_of, follow, recorded, values

WORKERS, TAU, STEPS = 2, 3, 8
POLICIES = ("reset", "maintain", "average")


class Matrices(nn.Module):
    """Two matrices: Muon takes no vector."""

    def __init__(self, size=4):
        super().__init__()
        torch.manual_seed(2)
        self.body = nn.Linear(size, size + 1, bias=False).double()
        self.head = nn.Linear(size + 1, 1, bias=False).double()

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


def rows(worker, step, size=4):
    generator = torch.Generator().manual_seed(100 * worker + step)
    return torch.randn(6, size, generator=generator).double(), torch.randn(6, 1, generator=generator).double()


def step_once(model, optimizer, worker, step):
    x, y = rows(worker, step)
    optimizer.zero_grad()
    (model(x) - y).square().mean().backward()
    optimizer.step()


class MuonAndAdam(torch.optim.Optimizer):
    """
    The combined optimizer that people write: matrices of groups with `use_muon` by an orthogonal momentum, others by
    Adam's rule. Its groups have a "momentum", as SGD's have.
    """

    def __init__(self, params, lr):
        params = list(params)
        groups = [{"params": params[:1], "use_muon": True}, {"params": params[1:], "use_muon": False}]
        super().__init__(groups, {"lr": lr, "momentum": 0.95})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum_buffer"], state["square"] = torch.zeros_like(p), torch.zeros_like(p)
                state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                state["square"].lerp_(p.grad.square(), 0.1)
                if group["use_muon"]:
                    left, _, right = torch.linalg.svd(state["momentum_buffer"], full_matrices=False)
                    p.sub_(left @ right, alpha=group["lr"])
                else:
                    p.addcdiv_(state["momentum_buffer"], state["square"].sqrt() + 1e-8, value=-group["lr"])


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05),
    "SGD, momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.05),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    **({"Muon": lambda p: torch.optim.Muon(p, lr=0.02)} if hasattr(torch.optim, "Muon") else {}),  # torch >= 2.9
    "Adafactor of transformers": lambda p: Adafactor(p, lr=0.01, relative_step=False, beta1=0.9),
    "Adafactor of transformers, lr=None": lambda p: Adafactor(p, lr=None, relative_step=True, warmup_init=True),
    "Muon and Adam in one": lambda p: MuonAndAdam(p, lr=0.01),
    "several in one": SeveralInOne,
}
NO_RESET = {"Adagrad": "Adagrad, whose state is made at construction", "several in one": "SeveralInOne, whose `state`"}


def trained(worker, make, config):
    model = Matrices()
    optimizer = SlowMoOptimizer(make(model.parameters()), config)
    for step in range(STEPS):
        step_once(model, optimizer, worker, step)
    return values(model)


def simulated(make, policy, config=None):
    """
    Local training and a mean of the weights every TAU steps, with torch alone. The slow momentum of `config` (beta,
    with a constant learning rate) is two lines more.
    """
    beta = 0.0 if config is None else config.outer_momentum
    models = [Matrices() for _ in range(WORKERS)]
    optimizers = [make(model.parameters()) for model in models]
    anchors = [p.detach().clone() for p in models[0].parameters()]
    velocities = [torch.zeros_like(p) for p in anchors]
    for step in range(STEPS):
        for worker in range(WORKERS):
            step_once(models[worker], optimizers[worker], worker, step)
        if (step + 1) % TAU:
            continue
        for anchor, velocity, *own in zip(anchors, velocities, *(m.parameters() for m in models), strict=True):
            mean = sum(p.detach() for p in own) / WORKERS
            velocity.mul_(beta).add_(anchor - mean)
            anchor.sub_(velocity)
            for p in own:
                p.data.copy_(anchor)
        if policy == "reset":
            for optimizer in optimizers:
                optimizer.state.clear()
        if policy == "average":
            for states in zip(*(o.state.values() for o in optimizers), strict=True):
                for key, value in states[0].items():
                    if isinstance(value, torch.Tensor) and value.dim() and key != "step":
                        mean = sum(state[key] for state in states) / WORKERS
                        for state in states:
                            state[key].copy_(mean)
    return [values(model) for model in models]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_with_every_inner_state(name, policy):
    make = OPTIMIZERS[name]
    config = SlowMoConfig.local_sgd(TAU, inner_state=policy)
    if name in NO_RESET and policy == "reset":
        with pytest.raises(ValueError, match=f"inner_state='reset' cannot be used with {NO_RESET[name]}"):
            trained(0, make, config)
        return
    ours = run_in_process(lambda worker: trained(worker, make, config), WORKERS)
    for mine, right in zip(ours, simulated(make, policy), strict=True):
        for key, value in right.items():
            torch.testing.assert_close(mine[key], value, rtol=0, atol=1e-12)


KEPT = ("RMSprop", "Muon", "AdamW", "Adafactor", "Muon and Adam in one")
STATEFUL = ["SGD, momentum", *(name for name in KEPT if name in OPTIMIZERS)]


@pytest.mark.parametrize("name", STATEFUL)
def test_inner_states_differ_where_there_is_something_to_tell(name):
    """Else the test above could not fail."""
    results = [simulated(OPTIMIZERS[name], policy)[0] for policy in POLICIES]
    assert not any(equal(results[i], results[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


# ---- auto ----


class SGDOfMine(torch.optim.SGD):
    """A subclass."""


AUTO = {
    "SGD, momentum": "reset",
    "SGD": "maintain",
    **dict.fromkeys(STATEFUL[1:], "maintain"),
}


@pytest.mark.parametrize("name", [*AUTO, "a subclass"])
def test_auto_resets_torchs_sgd_with_momentum_alone(name):
    """With slow momentum, against the simulation with the policy that is meant."""
    make = OPTIMIZERS.get(name, lambda p: SGDOfMine(p, lr=0.05, momentum=0.9))
    policy = AUTO.get(name, "reset")
    config = SlowMoConfig(sync_every=TAU, outer_momentum=0.5)
    ours = run_in_process(lambda worker: trained(worker, make, config), WORKERS)
    for mine, right in zip(ours, simulated(make, policy, config), strict=True):
        for key, value in right.items():
            torch.testing.assert_close(mine[key], value, rtol=0, atol=1e-12)


def test_auto_keeps_sgd_where_a_round_changes_nothing():
    """As ever: gossip without an exact average or slow momentum."""
    model = Matrices()
    tensors = ModelTensors(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model)
    plain = SlowMoConfig(base="sgp", exact_average=False, outer_momentum=0.0)
    assert [InnerState(config, tensors).policy for config in (plain, SlowMoConfig())] == ["maintain", "reset"]


# ---- states of codes ----


class Codes(torch.optim.Optimizer):
    """
    8-bit momentum as bitsandbytes has it: codes of one byte and their scale. Every matrix of `least` elements or more
    is coded.
    """

    least = 1

    def __init__(self, params, lr=0.05, dtype=torch.uint8):
        super().__init__(params, {"lr": lr})
        self.dtype = dtype

    def kept(self, momentum):
        scale = momentum.abs().amax().clamp(min=1e-12)[None]
        return {"codes": (momentum / scale * 127 + 128).round().to(self.dtype), "scale": scale}

    def momentum(self, state):
        return (state["codes"].to(torch.float64) - 128) / 127 * state["scale"]

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                momentum = 0.9 * self.momentum(state) + p.grad if state else p.grad.clone()
                state.update(self.kept(momentum))
                p.sub_(momentum, alpha=group["lr"])


class Coded(torch.Tensor):
    """A tensor subclass, as torchao's: it says float, and holds codes."""


class Subclass(Codes):
    def kept(self, momentum):
        return {"codes": (momentum * 0 + 128).as_subclass(Coded), "scale": momentum.abs().amax()[None]}


class Nested(Codes):
    def kept(self, momentum):
        return {"codes": [momentum * 0 + 128], "scale": momentum.abs().amax()[None]}

    def momentum(self, state):
        return state["codes"][0] * state["scale"]


class Projected(Codes):
    """As GaLore's: an object has a basis of the worker's own, in which the momentum beside it is meant."""

    def kept(self, momentum):
        projector = SimpleNamespace(basis=torch.linalg.qr(momentum)[0])
        return {"projector": projector, "inside": projector.basis.T @ momentum}

    def momentum(self, state):
        return state["projector"].basis @ state["inside"]


CODED = {
    "uint8": (Codes, "its state 'body.weight.codes' has dtype torch.uint8"),
    "int16": (lambda p: Codes(p, dtype=torch.int16), "its state 'body.weight.codes' has dtype torch.int16"),
    "float8": (
        lambda p: Codes(p, dtype=torch.float8_e4m3fn),
        "its state 'body.weight.codes' has dtype torch.float8_e4m3fn",
    ),
    "a subclass": (Subclass, "its state 'body.weight.codes' is a Coded, which may hold codes"),
    "a list": (Nested, "its state 'body.weight.codes' is a list of tensors"),
    "an object": (
        Projected,
        "its state 'body.weight.projector' is a SimpleNamespace, by which the others may be meant",
    ),
}


@pytest.mark.parametrize("kind", CODED)
def test_an_average_of_codes_is_refused_before_anything_is_mixed(kind):
    """Both workers are told, and keep what their own steps have left: the round has not begun."""
    make, words = CODED[kind]
    config = SlowMoConfig.local_sgd(TAU, inner_state="average")

    def work(worker):
        model, alone = Matrices(), Matrices()
        optimizer, plain = SlowMoOptimizer(make(model.parameters()), config), make(alone.parameters())
        for step in range(TAU - 1):
            step_once(model, optimizer, worker, step)
        said = error_of(step_once, model, optimizer, worker, TAU - 1)
        for step in range(TAU):
            step_once(alone, plain, worker, step)
        return said, values(model), values(alone)

    (first, mine, alone), (second, others, also_alone) = run_in_process(work, WORKERS)
    assert first == second
    name = {"a subclass": "Subclass", "a list": "Nested", "an object": "Projected"}.get(kind, "Codes")
    assert first.startswith("ValueError: rank 0 on ")
    assert f"step {TAU}: inner_state='average' cannot average the state of {name}: {words}. Use inner_state=" in first
    assert equal(mine, alone)
    assert equal(others, also_alone)
    assert not equal(mine, others)


@pytest.mark.parametrize("policy", ["reset", "maintain"])
def test_codes_are_kept_and_reset(policy):
    config = SlowMoConfig.local_sgd(TAU, inner_state=policy)
    ours = run_in_process(lambda worker: trained(worker, Codes, config), WORKERS)
    for mine, right in zip(ours, simulated(Codes, policy), strict=True):
        for key, value in right.items():
            torch.testing.assert_close(mine[key], value, rtol=0, atol=1e-12)


def test_a_state_that_is_there_at_the_start_is_told_there():
    """As after a checkpoint."""
    model = Matrices()
    inner = Codes(model.parameters())
    step_once(model, inner, 0, 0)
    before = values(model)
    optimizer = SlowMoOptimizer(inner, SlowMoConfig.local_sgd(TAU, inner_state="average"))
    with pytest.raises(ValueError, match=r"cannot average the state of Codes: its state 'body\.weight\.codes'"):
        step_once(model, optimizer, 0, 1)
    assert equal(values(model), before)


class Large(nn.Module):
    """A matrix of 4096 elements is the smallest that bitsandbytes codes; the other one stays fp32."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.body = nn.Linear(64, 64, bias=False)
        self.head = nn.Linear(64, 1, bias=False)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x.float())))


BITSANDBYTES = {
    "AdamW8bit": lambda b, p: b.AdamW8bit(p, lr=1e-2),
    "PagedAdamW8bit": lambda b, p: b.PagedAdamW8bit(p, lr=1e-2),
    "SGD8bit": lambda b, p: b.SGD8bit(p, lr=1e-2, momentum=0.9),
    "Lion8bit": lambda b, p: b.Lion8bit(p, lr=1e-3),
    "RMSprop8bit": lambda b, p: b.RMSprop8bit(p, lr=1e-3, momentum=0.9),
}


@pytest.fixture
def optim():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own: paged states need a GPU, and kernels of another package
        found = pytest.importorskip("bitsandbytes").optim
        yield found


def bnb_step(model, optimizer, worker, step):
    x, y = rows(worker, step, size=64)
    optimizer.zero_grad()
    (model(x) - y.float()).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("policy", ["auto", "maintain", "reset"])
@pytest.mark.parametrize("name", BITSANDBYTES)
def test_bitsandbytes_states_are_kept_and_reset(optim, name, policy):
    """Against two plain loops and a mean; "auto" keeps them, SGD8bit's momentum too."""

    def make(params):
        return BITSANDBYTES[name](optim, list(params))

    def work(worker):
        model = Large()
        config = SlowMoConfig.local_sgd(TAU, inner_state=policy)
        optimizer = SlowMoOptimizer(make(model.parameters()), config)
        for step in range(STEPS):
            bnb_step(model, optimizer, worker, step)
        return values(model), optimizer.inner_optimizer.state[model.body.weight]["state1"].dtype

    ours = run_in_process(work, WORKERS)
    kept, anew = plain_loops(make, reset=False), plain_loops(make, reset=True)
    for (mine, dtype), right in zip(ours, anew if policy == "reset" else kept, strict=True):
        assert dtype == torch.uint8
        for key, value in right.items():
            # fp32, and codes of what it has rounded; by processor one or two are the next code, up to 7e-7 away.
            torch.testing.assert_close(mine[key], value, rtol=0, atol=2e-6)
            assert ((mine[key] - value).abs() > 2e-7).sum() <= 2, key
    assert (kept[0]["body.weight"] - anew[0]["body.weight"]).abs().max() > 1e-4


def plain_loops(make, *, reset):
    models = [Large() for _ in range(WORKERS)]
    optimizers = [make(model.parameters()) for model in models]
    for step in range(STEPS):
        for worker in range(WORKERS):
            bnb_step(models[worker], optimizers[worker], worker, step)
        if (step + 1) % TAU:
            continue
        for own in zip(*(m.parameters() for m in models), strict=True):
            mean = sum(p.detach().double() for p in own) / WORKERS
            for p in own:
                p.data.copy_(mean)
        if reset:
            optimizers = [make(model.parameters()) for model in models]
    return [values(model) for model in models]


def test_bitsandbytes_average_is_refused_at_the_start(optim):
    """Where it codes nothing (few elements, or 32 bits), it is averaged as any other."""
    config = SlowMoConfig.local_sgd(TAU, inner_state="average")

    def work(worker):
        model = Large()
        before = values(model)
        optimizer = SlowMoOptimizer(optim.AdamW8bit(model.parameters(), lr=1e-3), config)
        said = error_of(bnb_step, model, optimizer, worker, 0)
        assert equal(values(model), before)
        return said

    first, second = run_in_process(work, WORKERS)
    assert first == second
    assert (
        "cannot average the state of AdamW8bit: it keeps torch.uint8 codes (optim_bits=8) of parameters with 4096"
        in first
    )

    def averaged(worker):
        model = Large()
        optimizer = SlowMoOptimizer(optim.AdamW(model.parameters(), lr=1e-3), config)
        for step in range(TAU):
            bnb_step(model, optimizer, worker, step)
        return optimizer.inner_optimizer.state[model.body.weight]["state1"].clone()

    mine, others = run_in_process(averaged, WORKERS)
    assert torch.equal(mine, others)
    assert mine.abs().sum() > 0


def test_a_reset_of_paged_states_is_refused_where_they_are_paged():
    class Paged(torch.optim.AdamW):
        is_paged = True

    there, here = nn.Linear(2, 2, device="meta"), nn.Linear(2, 2)
    config = SlowMoConfig(inner_state="reset")
    assert InnerState(config, ModelTensors(Paged(here.parameters()), here)).policy == "reset"
    with pytest.raises(ValueError, match="inner_state='reset' cannot be used with Paged: bitsandbytes never frees"):
        InnerState(config, ModelTensors(Paged(there.parameters()), there))


# ---- Trainer's names ----

OPTIM = {
    **dict.fromkeys(["adamw_torch", "adamw_torch_fused", "sgd", "rmsprop", "adagrad", "adafactor"], ""),
    **dict.fromkeys(
        ["adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "lion_8bit", "rmsprop_bnb", "ademamix"], ""
    ),
    **dict.fromkeys(["schedule_free_adamw", "schedule_free_sgd", "schedule_free_radam"], "is schedule-free"),
}


def by_name(folder):
    """Of every name: what was said, or the run's recording."""
    warnings.simplefilter("ignore")  # bitsandbytes' own
    found = {}
    for name in OPTIM:
        recorder = Recorder()
        trainer = Trainer(
            model=Regression(torch.float32),
            args=arguments(
                tempfile.mkdtemp(dir=folder),
                max_steps=2 * TAU + 1,
                optim=name,
                learning_rate=1e-2,
                lr_scheduler_type="constant",
            ),
            train_dataset=Rows(64, torch.float32),
            callbacks=[recorder, SlowMoCallback(SlowMoConfig(sync_every=TAU, timeout_seconds=patience(30)))],
        )
        said = error_of(trainer.train)
        found[name] = said or recorded(trainer, recorder)
    return found


@pytest.mark.slow
def test_trainers_optimizers_train_two_rounds_or_are_refused_by_name(tmp_path, subtests):
    """Each with slow momentum on two workers, followed by hand; Trainer's own learning rates and groups."""
    pytest.importorskip("bitsandbytes")
    both = run_workers(by_name, 2, str(tmp_path))
    config = SlowMoConfig(sync_every=TAU)
    for name, refused in OPTIM.items():
        with subtests.test(name):
            runs = [one[name] for one in both]
            if refused:
                assert runs[0] == runs[1]
                assert re.match(f"ValueError: the inner optimizer .* {refused}", runs[0])
            else:
                assert not isinstance(runs[0], str), runs[0]
                assert follow(runs, config) == 2
