"""
Loops under Accelerate whose pass or step is not a plain call: compiled from outside, recorded by torch.jit.trace; or
whose optimizer holds copies of the model's parameters.
"""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn

from harness import patience, run_workers
from slowmo_hf import SlowMoConfig, SlowMoOptimizer
from tiny import Heard, equal, error_of, values


def prepared(model, optimizer, **settings):
    """Both, from a new Accelerator, and that."""
    accelerator = Accelerator(cpu=True)
    config = SlowMoConfig(**{"sync_every": 2, "timeout_seconds": patience(20), **settings})
    return accelerator, *accelerator.prepare(model, SlowMoOptimizer(optimizer, config))


# ---- compiled from outside ----


def trained(how):
    """Weights after every step of five, and rounds; `how` names what is compiled, "" nothing."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    bare = nn.Linear(2, 1)
    accelerator, model, optimizer = prepared(bare, torch.optim.AdamW(bare.parameters(), lr=0.1))

    def loss_of(x):
        return model(x).square().mean()

    def step():
        return optimizer.step()

    def train_step(x):
        accelerator.backward(loss_of(x))
        step()
        optimizer.zero_grad()

    if how == "loss":
        loss_of = torch.compile(loss_of, backend="eager")
    elif how == "step":
        step = torch.compile(step, backend="eager")
    elif how == "train_step":
        train_step = torch.compile(train_step, backend="eager")
    elif how == "model":
        model.compile(backend="eager")
    seen = []
    for k in range(5):
        train_step(torch.full((1, 2), float(dist.get_rank() + k)))
        seen.append(values(bare))
        if k == 2:
            evaluations = evaluated(model, loss_of, bare)
    return seen, evaluations, optimizer.optimizer.outer_loop.rounds


def evaluated(model, loss_of, bare):
    """Inside a round: the loss of the last round's model, and of the local one by a pass with gradients."""
    local, row = values(bare), torch.ones(1, 2)
    model.eval()
    with torch.no_grad():
        shown = loss_of(row).item()
    model.eval()
    with_gradients = loss_of(row).item()
    model.train()
    assert equal(values(bare), local)
    return shown, with_gradients


def compiled_and_plain(how):
    warnings.filterwarnings("ignore", message=".*global hooks on modules.*")  # torch's, of the start's own hook
    return trained(how), trained("")


@pytest.mark.parametrize("how", ["loss", "step", "train_step", "model"])
def test_a_loop_that_is_compiled_trains_as_written(how):
    """Bit for bit, evaluations inside a round too; ranks are equal behind the rounds of steps 2 and 4 alone."""
    ranks = run_workers(compiled_and_plain, 2, how, time_limit_seconds=120)
    for (seen, evaluations, rounds), (plain, plain_evaluations, plain_rounds) in ranks:
        assert [equal(left, right) for left, right in zip(seen, plain, strict=True)] == [True] * 5
        assert evaluations == plain_evaluations
        assert rounds == plain_rounds == 2
    (first, (shown, local), _), (second, (other_shown, other_local), _) = (compiled for compiled, _ in ranks)
    assert [equal(left, right) for left, right in zip(first, second, strict=True)] == [False, True, False, True, False]
    assert shown == other_shown
    assert local != other_local


ALONE = """
import sys
import slowmo_hf
assert "torch._dynamo" not in sys.modules
import torch
weight = torch.nn.Parameter(torch.ones(2))
optimizer = slowmo_hf.SlowMoOptimizer(torch.optim.SGD([weight], lr=0.5), sync_every=2, outer_momentum=0.0)
step = torch.compile(lambda: optimizer.step(), backend="eager")
for _ in range(2):
    weight.grad = torch.ones(2)
    step()
print("weight", weight.tolist(), "rounds", optimizer.outer_loop.rounds)
"""


def test_the_package_imports_no_compiler():
    """It takes a second; a step that is compiled works all the same: 1 - 2 x 0.5."""
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, timeout=patience(60))
    assert done.returncode == 0, done.stderr
    assert "Dynamo does not know" not in done.stderr
    assert done.stdout.splitlines()[-1] == "weight [0.0, 0.0] rounds 1"


# ---- recorded ----


def recorded(model):
    """As TensorBoard's `add_graph` does it, with gradients on; what the graph gives for ones."""
    row = torch.ones(1, 2)
    graph = torch.jit.trace(model, row)
    with torch.no_grad():
        return graph(row).item()


def with_a_record(on_rank_0):
    """Rank 0 alone records its model before training, and inside a round, where the last round's model is shown."""
    torch.manual_seed(0)
    bare = nn.Linear(2, 1)
    accelerator, model, optimizer = prepared(bare, torch.optim.SGD(bare.parameters(), lr=0.1))
    records = on_rank_0 and accelerator.is_main_process
    if records:
        recorded(bare)
    started = [optimizer.optimizer.outer_loop is not None]
    for k in range(5):
        accelerator.backward(model(torch.full((1, 2), float(accelerator.process_index + k))).square().sum())
        optimizer.step()
        optimizer.zero_grad()
        started.append(optimizer.optimizer.outer_loop is not None)
        if k == 2:
            model.eval()
            shown = values(bare)
            if records:
                with torch.no_grad():
                    of_shown = bare(torch.ones(1, 2)).item()
                assert recorded(bare) == of_shown
                assert equal(values(bare), shown)
            model.train()
            assert not equal(values(bare), shown) or accelerator.num_processes == 1
    return values(bare), started, optimizer.optimizer.outer_loop.rounds


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_pass_that_is_recorded_starts_nothing(ranks):
    """Neither does it end the view of the last round's model."""
    recording, plain = (run_workers(with_a_record, ranks, on_rank_0) for on_rank_0 in (True, False))
    for (left, started, rounds), (right, *_) in zip(recording, plain, strict=True):
        assert equal(left, right)
        assert started == [False] + [True] * 5
        assert rounds == 2


# ---- copies of the parameters ----


class Descent:
    """Gradient descent that is no torch optimizer."""

    def __init__(self, params):
        self.params = list(params)

    def step(self):
        with torch.no_grad():
            for param in self.params:
                param -= 0.1 * param.grad

    def zero_grad(self):
        for param in self.params:
            param.grad = None


def model_in_bf16():
    torch.manual_seed(0)
    return nn.Linear(2, 1).bfloat16()


def step_of_copies(kind):
    """The first step of an optimizer over fp32 copies: what it raises, and what was said."""
    model = model_in_bf16()
    copies = [nn.Parameter(p.detach().float().clone()) for p in model.parameters()]
    if kind == "flat":
        copies = [nn.Parameter(torch.cat([p.detach().flatten() for p in copies]))]
    accelerator, model, optimizer = prepared(model, torch.optim.SGD(copies, lr=0.1))
    accelerator.backward(model(torch.ones(1, 2).bfloat16()).float().sum())
    gradients = [p.grad.float() for p in model.parameters()]
    gradients = [torch.cat([one.flatten() for one in gradients])] if kind == "flat" else gradients
    for copy, gradient in zip(copies, gradients, strict=True):
        copy.grad = gradient
    if kind == "let go":
        model.zero_grad()
    with Heard() as heard:
        error = error_of(optimizer.step)
    return error, heard.about("workers would not train alone", "WARNING")


@pytest.mark.parametrize("kind", ["each", "flat"])
def test_copies_of_a_models_parameters_are_refused(kind):
    """DDP would go on averaging the model's gradients at every step."""
    (error, warned), (other, other_warned) = run_workers(step_of_copies, 2, kind)
    assert error == other
    held = 1 if kind == "flat" else 2
    assert error.startswith(f"ValueError: the inner optimizer SGD holds {held} parameters that are no parameters of")
    assert "DDP would average its gradients at every step" in error
    assert "mixed_precision='bf16'" in error
    assert warned == other_warned == []


def test_copies_of_a_model_without_gradients_are_told():
    """It may be a teacher that nobody trains: a warning, of rank 0 alone as others."""
    (error, warned), (other, _) = run_workers(step_of_copies, 2, "let go")
    assert error == other == ""
    assert len(warned) == 1


def beside(kind):
    """A temperature of ours beside a model of another's; whether the workers' temperatures are equal, and warnings."""
    model = nn.Linear(2, 1)
    other = Descent(model.parameters()) if kind == "by hand" else torch.optim.SGD(model.parameters(), lr=0.1)
    temperature = nn.Parameter(torch.ones(1))
    accelerator, model, optimizer = prepared(model, torch.optim.SGD([temperature], lr=0.1))
    other = other if kind == "by hand" else accelerator.prepare(other)
    seen = []
    with Heard() as heard:
        for _ in range(2):
            accelerator.backward((model(torch.full((1, 2), 1.0 + dist.get_rank())) * temperature).sum())
            other.step()
            optimizer.step()
            other.zero_grad()
            optimizer.zero_grad()
            seen.append(temperature.item())
    return seen, values(model), heard.about("workers would not train alone", "WARNING")


def test_a_model_that_another_trains_is_left_alone():
    """No word where a torch optimizer has it; a warning where none has: who trains it is not known."""
    for kind, words in (("by torch", 0), ("by hand", 1)):
        (seen, model, warned), (other_seen, other_model, _) = run_workers(beside, 2, kind)
        assert seen[0] != other_seen[0]
        assert seen[1] == other_seen[1]
        assert equal(model, other_model)
        assert len(warned) == words
