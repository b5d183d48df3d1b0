"""
MuLoCo (https://huggingface.co/papers/2505.23725): DiLoCo with Muon inside. Two workers in float64 against the rules
written out here: Muon as its authors give it (https://kellerjordan.github.io/posts/muon/, whose Newton-Schulz
iteration runs in bfloat16), AdamW for what is no matrix, and Nesterov SGD outside on the pseudo-gradient.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from transformers import Trainer

from harness import patience, run_workers
from slowmo_hf import SlowMoCallback, SlowMoConfig, SlowMoOptimizer, run_in_process
from tiny import Recorder, Regression, Rows, arguments, recorded, values

WORKERS, TAU, STEPS = 2, 3, 8
MUON_LR, MUON_DECAY, MUON_MOMENTUM = 0.02, 0.1, 0.95
ADAM_LR, ADAM_DECAY, BETAS, EPS = 3e-3, 0.01, (0.9, 0.999), 1e-8
OUTER_LR, OUTER_MOMENTUM = 0.7, 0.9
DOCS = Path(__file__).parents[1] / "docs" / "algorithms.md"


def orthogonal(momentum):
    """Newton-Schulz, five times X <- a X + (b A + c A A) X with A = X Xᵀ, the wider way round."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = momentum.bfloat16()
    x = x.T if x.shape[0] > x.shape[1] else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.T if momentum.shape[0] > momentum.shape[1] else x).double()


def muon_step(weight, gradient, state):
    """Nesterov momentum, made orthogonal; decoupled weight decay; sqrt(max(1, rows / columns)) for the shape."""
    buffer = state["m"] = MUON_MOMENTUM * state.get("m", 0.0) + (1 - MUON_MOMENTUM) * gradient
    update = orthogonal((1 - MUON_MOMENTUM) * gradient + MUON_MOMENTUM * buffer)
    scale = max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5
    return weight * (1 - MUON_LR * MUON_DECAY) - MUON_LR * scale * update


def adamw_step(weight, gradient, state):
    state["t"] = state.get("t", 0) + 1
    state["m"] = BETAS[0] * state.get("m", 0.0) + (1 - BETAS[0]) * gradient
    state["v"] = BETAS[1] * state.get("v", 0.0) + (1 - BETAS[1]) * gradient**2
    mean, square = state["m"] / (1 - BETAS[0] ** state["t"]), state["v"] / (1 - BETAS[1] ** state["t"])
    return weight * (1 - ADAM_LR * ADAM_DECAY) - ADAM_LR * mean / (square.sqrt() + EPS)


def apart(worker, steps):
    """(x, labels) of every step; workers have rows of their own."""
    rows = Rows(8 * WORKERS * steps)
    for step in range(steps):
        start = 8 * (WORKERS * step + worker)  # as accelerate deals batches out
        yield rows.x[start : start + 8], rows.y[start : start + 8]


def gradients(weights, batch):
    at = {name: value.clone().requires_grad_() for name, value in weights.items()}
    loss = torch.func.functional_call(Regression(), at, batch)["loss"]
    return dict(zip(at, torch.autograd.grad(loss, list(at.values())), strict=True))


def nesterov(anchor, velocity, locals_, name):
    """DiLoCo's outer step on one tensor."""
    pseudo_grad = anchor[name] - sum(one[name] for one in locals_) / len(locals_)
    velocity[name] = OUTER_MOMENTUM * velocity[name] + pseudo_grad
    anchor[name] = anchor[name] - OUTER_LR * (pseudo_grad + OUTER_MOMENTUM * velocity[name])


def muloco(steps, tau, matrices):
    """Both workers' local weights at the end."""
    anchor = values(Regression())
    velocity = {name: torch.zeros_like(value) for name, value in anchor.items()}
    locals_ = [dict(anchor) for _ in range(WORKERS)]
    states = [{name: {} for name in anchor} for _ in range(WORKERS)]
    data = [list(apart(worker, steps)) for worker in range(WORKERS)]
    for step in range(steps):
        for worker, local in enumerate(locals_):
            for name, gradient in gradients(local, data[worker][step]).items():
                rule = muon_step if name in matrices else adamw_step
                local[name] = rule(local[name], gradient, states[worker][name])
        if (step + 1) % tau == 0:
            for name in anchor:
                nesterov(anchor, velocity, locals_, name)
            locals_ = [dict(anchor) for _ in range(WORKERS)]
    return locals_


def close(found, expected, tolerance=1e-12):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance)


class MuonWithAdamW(torch.optim.Optimizer):
    """Both rules in one optimizer, by a flag of the group: what people write for a Trainer, which takes one."""

    def __init__(self, params):
        params = list(params)
        groups = [[p for p in params if p.ndim == 2], [p for p in params if p.ndim != 2]]
        flags = ({"use_muon": True, "momentum": MUON_MOMENTUM, "lr": MUON_LR}, {"use_muon": False, "lr": ADAM_LR})
        super().__init__([{"params": own, **flag} for own, flag in zip(groups, flags, strict=True)], {})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            rule = muon_step if group["use_muon"] else adamw_step
            for p in group["params"]:
                p.copy_(rule(p, p.grad, self.state[p]))


def test_the_reference_makes_matrices_orthogonal():
    """Its singular values are about 1, as the post says of these coefficients (0.5 to 1.5), on both sides."""
    for shape in ((5, 4), (3, 7)):
        torch.manual_seed(0)
        found = torch.linalg.svdvals(orthogonal(torch.randn(shape, dtype=torch.float64)))
        assert found.min() > 0.5
        assert found.max() < 1.5


TWO = ("torch's Muon and AdamW, two optimizers", "both in one optimizer")
MATRICES = ("body.weight", "head.weight")


@pytest.mark.parametrize("how", TWO if hasattr(torch.optim, "Muon") else TWO[1:])  # of torch 2.9
def test_muloco_is_dilocos_outer_step_around_muon(how):
    """Two rounds and two local steps behind them."""
    config = SlowMoConfig.diloco(sync_every=TAU, outer_lr=OUTER_LR, nesterov_momentum=OUTER_MOMENTUM)

    def work(worker):
        model = Regression()
        if how == TWO[0]:
            params = list(model.parameters())
            of_matrices, of_others = ([p for p in params if (p.ndim == 2) == is_matrix] for is_matrix in (True, False))
            inner = [
                torch.optim.Muon(of_matrices, lr=MUON_LR, weight_decay=MUON_DECAY, momentum=MUON_MOMENTUM),
                torch.optim.AdamW(of_others, lr=ADAM_LR, weight_decay=ADAM_DECAY),
            ]
        else:
            inner = [MuonWithAdamW(model.parameters())]
        optimizers = [SlowMoOptimizer(one, config) for one in inner]
        for x, labels in apart(worker, STEPS):
            model(x, labels)["loss"].backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        return values(model)

    for found, expected in zip(run_in_process(work, WORKERS), muloco(STEPS, TAU, MATRICES), strict=True):
        close(found, expected)


# ---- as the docs say it ----


def snippet():
    """The code block of the section, as a reader would copy it."""
    section = DOCS.read_text().split("## MuLoCo")[1].split("\n## ")[0]
    [code] = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    return code


def run_snippet(steps):
    accelerator, model = Accelerator(cpu=True), Regression()
    loader = torch.utils.data.DataLoader(Rows(8 * WORKERS * steps), batch_size=8)
    bare = model
    exec(snippet(), {"accelerator": accelerator, "model": model, "loader": loader})
    return values(bare)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon is of torch 2.9")
def test_the_docs_snippet_is_muloco():
    """Its round of 30 steps, three local steps, and the average that `finish` leaves."""
    first, second = run_workers(run_snippet, WORKERS, 33)
    close(first, second, 0.0)
    mine, others = muloco(33, 30, ("body.weight",))
    close(first, {name: (mine[name] + others[name]) / 2 for name in mine})


def in_a_trainer(folder):
    recorder, model = Recorder(), Regression(torch.float32)
    optimizer = MuonWithAdamW(model.parameters())
    trainer = Trainer(
        model,
        arguments(tempfile.mkdtemp(dir=folder), max_steps=2 * TAU + 1),
        train_dataset=Rows(128, torch.float32),
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)),
        callbacks=[recorder, SlowMoCallback(SlowMoConfig.diloco(sync_every=TAU, timeout_seconds=patience(30)))],
    )
    trainer.train()
    return recorded(trainer, recorder)


def test_muloco_in_a_trainer(tmp_path):
    """What both workers' steps have left, and DiLoCo's outer step on it by hand, at both rounds."""
    runs = run_workers(in_a_trainer, WORKERS, str(tmp_path))
    anchor = {name: value.double() for name, value in runs[0]["start"].items()}
    velocity = {name: torch.zeros_like(value) for name, value in anchor.items()}
    for at in (TAU - 1, 2 * TAU - 1):
        stepped = [{name: value.double() for name, value in run["stepped"][at].items()} for run in runs]
        for name in anchor:
            nesterov(anchor, velocity, stepped, name)
        for run in runs:
            close({name: value.double() for name, value in run["after"][at].items()}, anchor, 1e-6)
        assert max((stepped[0][name] - stepped[1][name]).abs().max() for name in anchor) > 1e-3
