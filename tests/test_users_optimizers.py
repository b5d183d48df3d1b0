"""Optimizers and settings that users bring along: as stock, or refused by name, and never silently something else."""

from __future__ import annotations

import copy
import inspect

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate.checkpointing import load_accelerator_state
from transformers import Trainer, TrainerCallback

from accelerate_loops import linear, train_on, weights
from harness import patience, run_workers
from slowmo_hf import SlowMoCallback, SlowMoConfig, SlowMoOptimizer, run_in_process
from tiny import Heard, Regression, Rows, arguments, error_of

# accelerate 1.3 always loads an optimizer's own state without objects.
reads_objects = pytest.mark.skipif(
    "load_kwargs" not in inspect.signature(load_accelerator_state).parameters,
    reason="this accelerate reads no objects in an optimizer's state",
)

SGD = torch.optim.SGD

# ---- hooks under a GradScaler ----


def clipped(ours):
    """Norms that a hook sees, and the weights behind three attempts; the third one's gradient is infinite."""
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = SGD([weight], lr=1.0)
    if ours:
        optimizer = SlowMoOptimizer(optimizer, SlowMoConfig(sync_every=100))
    seen, behind = [], []
    optimizer.register_step_pre_hook(lambda *_: seen.append(torch.nn.utils.clip_grad_norm_([weight], 1.0).item()))
    optimizer.register_step_post_hook(lambda *_: behind.append(weight.tolist()))
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    for factor in (1.0, 2.0, float("inf")):
        optimizer.zero_grad()
        scaler.scale((weight * torch.tensor([3.0, 4.0]) * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    return seen, behind, weight.tolist(), optimizer


def test_step_hooks_see_unscaled_gradients_and_no_step_that_is_skipped():
    """They clipped gradients of 65536 times their size, which were divided by 65536 behind that."""
    *ours, optimizer = clipped(ours=True)
    *stock, _ = clipped(ours=False)
    assert ours == stock
    assert ours[0] == [5.0, 10.0]
    assert optimizer.outer_loop.attempted_steps == 3, "the clock counts attempts"


def test_a_scaler_that_has_seen_no_gradient_says_so_in_its_own_words():
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer, scaler = SlowMoOptimizer(SGD([weight], lr=1.0), SlowMoConfig()), torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones((), requires_grad=True)).backward()
    with pytest.raises(AssertionError, match=r"No inf checks were recorded for this optimizer\."):
        scaler.step(optimizer)


# ---- steps that send ----


class Measured(SGD):
    """With a hook of the program's own that reduces a norm for a log."""

    def __init__(self, params, lr):
        super().__init__(params, lr=lr)
        self.register_step_post_hook(lambda *_: dist.barrier())


class Shares(SGD):
    """Each rank steps for others too, as Muon's and Shampoo's distributed kinds do."""

    def step(self, closure=None):
        if closure is not None:
            with torch.enable_grad():
                closure()
        super().step()
        for group in self.param_groups:
            for param in group["params"]:
                dist.broadcast(param.data, src=0)


def step_that_sends(settings_, gives_closure=False, make=Shares):
    accelerator, model, optimizer = linear(make, **settings_)
    model, optimizer = accelerator.prepare(model, optimizer)
    errors = []
    for _ in range(2):
        model(torch.ones(2, 4)).sum().backward()
        closure = (lambda: dist.barrier()) if gives_closure else None
        errors.append(error_of(optimizer.step, closure) if gives_closure else error_of(optimizer.step))
        optimizer.zero_grad()
    return errors


def test_an_optimizer_that_sends_in_its_own_step_is_refused_in_the_first_one():
    for error, _ in run_workers(step_that_sends, 2, {}):
        assert error.startswith("ValueError: the inner optimizer Shares sends over all ranks in its own step")
        assert "Use one whose step is local (torch.optim.Muon), or base='all_reduce'." in error


def failed_steps():
    """A first step that fails behind its pre-hooks, and others' collectives before the second one."""
    accelerator, model, optimizer = linear()
    model, optimizer = accelerator.prepare(model, optimizer)
    inner, told = optimizer.optimizer.inner_optimizer, []
    model(torch.ones(2, 4)).sum().backward()  # training begins
    hook = inner.register_step_pre_hook(lambda *_: 1 / 0)
    told.append(error_of(optimizer.step))
    hook.remove()
    dist.barrier()
    told.append(error_of(optimizer.step))
    return told


def test_a_step_that_failed_says_nothing_of_the_next():
    assert run_workers(failed_steps, 2) == [["ZeroDivisionError: division by zero", ""]] * 2


@pytest.mark.parametrize(
    ("fields", "gives_closure", "make"),
    [
        ({}, False, SGD),
        ({}, True, SGD),
        ({}, False, Measured),
        ({"base": "all_reduce"}, False, Shares),
        ({"base": "osgp"}, False, SGD),
    ],
)
def test_other_steps_are_taken(fields, gives_closure, make):
    """A closure may send: it is the program's own."""
    assert run_workers(step_that_sends, 2, fields, gives_closure, make) == [["", ""]] * 2


# ---- state elsewhere than under the parameters ----


class ByName(SGD):
    """As PEFT's LoRA-FA: state under a name."""

    def step(self, closure=None):
        super().step(closure)
        self.state["lora"] = {"exp_avg": torch.ones(2)}


class Sharpness(SGD):
    """The common SAM class: its base optimizer has a state of its own, over the same groups."""

    def __init__(self, params, lr):
        super().__init__(params, lr=lr)
        self.base_optimizer = torch.optim.Adam(self.param_groups, lr=lr)

    def step(self, closure=None):
        self.base_optimizer.step()
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param]["old_p"] = param.detach().clone()


@pytest.mark.parametrize(
    ("make", "where"), [(ByName, "under 'lora'"), (Sharpness, "in the Adam inside it"), (torch.optim.Adam, "")]
)
@pytest.mark.parametrize("policy", ["reset", "average", "maintain"])
def test_a_policy_that_does_not_reach_the_state_is_refused(make, where, policy):
    """It did nothing, and nothing was said."""

    def work(rank):
        weight = torch.nn.Parameter(torch.ones(2))
        optimizer = SlowMoOptimizer(make([weight], lr=0.1), SlowMoConfig(inner_state=policy, sync_every=2))
        errors = []
        for _ in range(2):
            weight.grad = torch.ones(2)
            errors.append(error_of(optimizer.step))
        return errors

    for first, second in run_in_process(work, 2):
        assert first == ""
        if policy == "maintain" or not where:
            assert second == ""
        else:
            assert f"inner_state='{policy}' cannot" in second
            assert f"it has state {where}" in second
            assert "Use inner_state='maintain'" in second


# ---- a second model in the Trainer's optimizer ----


class WithHead(Trainer):
    """A layer of the program's own, prepared beside the model (an ArcFace head, weights of losses)."""

    def create_optimizer(self, model=None):
        torch.manual_seed(0)
        self.head = self.accelerator.prepare(torch.nn.Linear(1, 1, dtype=torch.float32))
        self.optimizer = SGD([*self.model.parameters(), *self.head.parameters()], lr=0.1)
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        found = self.head(model(**inputs)["loss"].reshape(1, 1)).square().mean()
        return (found, {"loss": found}) if return_outputs else found


class Heads(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append([weights(self.trainer.head), weights(self.trainer.model)])


def trained_with_head(folder):
    heads = Heads()
    slowmo = SlowMoCallback(SlowMoConfig(sync_every=2, timeout_seconds=patience(30)))
    heads.trainer = WithHead(
        Regression(torch.float32),
        arguments(folder, max_steps=4),
        train_dataset=Rows(64, torch.float32),
        callbacks=[heads, slowmo],
    )
    heads.trainer.train()
    return heads.seen


def test_a_prepared_head_beside_the_model_trains_alone_between_rounds(tmp_path):
    """Its own DDP averaged its gradients at every step, and coupled the workers."""
    first, second = run_workers(trained_with_head, 2, str(tmp_path))
    equal = [[torch.equal(*pair) for pair in zip(*both, strict=True)] for both in zip(first, second, strict=True)]
    assert equal == [[False, False], [True, True]] * 2


# ---- refused, and taken, by name ----


class Lookahead(SGD):
    """As the packages have it: every other step it goes half-way back to weights of its own."""


class RangerVA(SGD):
    pass


@pytest.mark.parametrize("make", [Lookahead, RangerVA])
def test_one_that_goes_back_to_weights_of_its_own_is_refused(make):
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    with pytest.raises(ValueError, match=rf"{make.__name__} keeps slow weights of its own") as error:
        SlowMoOptimizer(make([weight], lr=0.1), SlowMoConfig()).step()
    assert "SlowMoConfig.lookahead()" in str(error.value)
    assert weight.tolist() == [1.0, 1.0]


class Combined(torch.optim.Optimizer):
    """Several by name, each of which steps."""

    def __init__(self, optimizers):
        self.optimizer_dict = optimizers
        super().__init__([group for one in optimizers.values() for group in one.param_groups], {})

    def step(self, closure=None):
        for one in self.optimizer_dict.values():
            one.step()


def test_a_dictionary_of_optimizers_is_none_that_steps_in_hooks():
    weights_ = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    combined = Combined({"first": SGD(weights_[:1], lr=0.1), "second": SGD(weights_[1:], lr=0.2)})
    for weight in weights_:
        weight.grad = torch.ones(2)
    SlowMoOptimizer(combined, SlowMoConfig()).step()
    assert [weight.tolist() for weight in weights_] == [pytest.approx([0.9] * 2), pytest.approx([0.8] * 2)]


# ---- what checkpoints have to take ----


def lbfgs(folder):
    """Histories of different length on the two workers: rank 0 goes on learning, rank 1 has reached its goal."""

    def made():
        accelerator, model, optimizer = linear(lambda params, lr: torch.optim.LBFGS(params, lr=lr, max_iter=3))
        model, optimizer = accelerator.prepare(model, optimizer)
        model(torch.ones(1, 4)).sum().backward()  # LBFGS makes its first pass inside the step
        return accelerator, model, optimizer

    def train(accelerator, model, optimizer, steps):
        for step in steps:
            torch.manual_seed(10 * step)
            batch = torch.randn(8, 4)
            goal = model(batch).detach() if dist.get_rank() else torch.zeros(8, 1)

            def closure(batch=batch, goal=goal):
                optimizer.zero_grad()
                loss = (model(batch) - goal).square().mean()
                accelerator.backward(loss)
                return loss

            optimizer.step(closure)
        return weights(model)

    first = made()
    train(*first, range(3))
    inner = first[2].optimizer.inner_optimizer
    length = len(next(iter(inner.state.values())).get("old_dirs", []))
    first[0].save_state(folder)
    goes_on = train(*first, range(3, 6))
    again = made()
    again[0].load_state(folder)
    return length, goes_on, train(*again, range(3, 6))


def test_histories_of_lbfgs_differ_in_length_and_resume(tmp_path):
    """Accelerate loads rank 0's everywhere first, and a worker's own was compared with its length."""
    (one, *first), (other, *second) = run_workers(lbfgs, 2, str(tmp_path))
    assert one != other
    for goes_on, resumed in (first, second):
        assert torch.equal(goes_on, resumed)


@reads_objects
def test_numpys_learning_rates_resume(tmp_path):
    """MAE's and DINO's schedules write them into the groups. `torch.load` refuses their types in our files."""
    found = []
    for resumes in (False, True):
        accelerator, model, optimizer = linear()
        model, optimizer = accelerator.prepare(model, optimizer)
        if resumes:
            accelerator.load_state(str(tmp_path), load_kwargs={"weights_only": False})
        else:
            train_on(accelerator, model, optimizer, range(2))
            for group in optimizer.param_groups:
                group["lr"], group["betas"] = np.float64(0.05), (np.float32(0.5), 0.9)
            accelerator.save_state(str(tmp_path))
        found.append(train_on(accelerator, model, optimizer, range(2, 5)))
        assert optimizer.param_groups[0]["lr"] == 0.05
        assert optimizer.param_groups[0]["betas"] == (0.5, 0.9)
    assert torch.equal(*found)


class Scale:
    """As GaLore's projector: an object in an optimizer's state."""

    def __init__(self, value):
        self.value = value


class Scaled(SGD):
    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for param in group["params"]:
                scale = self.state[param].setdefault("scale", Scale(1.0))
                scale.value *= 0.5
                param.data.mul_(scale.value)


@reads_objects
def test_an_objects_class_is_read_when_it_is_named_and_not_before(tmp_path):
    """The error said that the file was damaged, and to take another checkpoint, which would have said the same."""

    def run(resumes):
        accelerator, model, optimizer = linear(Scaled)
        model, optimizer = accelerator.prepare(model, optimizer)
        if resumes:
            accelerator.load_state(str(tmp_path), load_kwargs={"weights_only": False})
        else:
            train_on(accelerator, model, optimizer, range(2))
            accelerator.save_state(str(tmp_path))
        return train_on(accelerator, model, optimizer, range(2, 5))

    right = run(resumes=False)
    said = error_of(run, resumes=True)
    assert said.startswith("CheckpointError: ")
    assert f"worker_0.pt holds an object of {__name__}.Scale, which is not read by default" in said
    assert "torch.serialization.add_safe_globals([...]) with that class" in said
    with torch.serialization.safe_globals([Scale]):
        assert torch.equal(run(resumes=True), right)


# ---- what is said ----


class OfAdapters(torch.nn.Linear):
    """What PEFT's AdaLoRA puts on its model."""

    rankallocator = None


@pytest.mark.parametrize(
    ("kind", "fields", "said"),
    [
        (OfAdapters, {}, 1),
        (OfAdapters, {"base": "all_reduce", "outer_momentum": 0.5}, 0),
        (torch.nn.Linear, {}, 0),
    ],
)
def test_adalora_prunes_by_each_workers_own_gradients(kind, fields, said):
    def work(rank):
        model = kind(2, 1)
        optimizer = SlowMoOptimizer(SGD(model.parameters(), lr=0.1), SlowMoConfig(**fields))
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()

    with Heard() as heard:
        run_in_process(work, 2)
    assert len(heard.about("AdaLoRA's update_and_allocate prunes by a worker's own gradients", "WARNING")) == said


@pytest.mark.parametrize(
    ("moves", "fields", "said"),
    [
        (True, {}, 1),
        (True, {"model_buffers": "local"}, 0),
        (False, {}, 0),
    ],
)
def test_frozen_parameters_that_rounds_begin_to_average_are_said_once(moves, fields, said):
    """PEFT's `merge_adapter` and `unmerge_adapter` leave the base with other last digits."""

    def work(rank):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
        model[0].requires_grad_(False)
        optimizer = SlowMoOptimizer(SGD(model[1].parameters(), lr=0.1), SlowMoConfig(sync_every=2, **fields))
        base, sent = copy.deepcopy(model[0]), []
        for step in range(6):
            model(torch.ones(1, 2)).sum().backward()
            with torch.no_grad():
                model[0].weight.add_(0.1)
                model[0].load_state_dict(base.state_dict())
                if moves and step > 1:
                    model[0].weight.add_(0.1)
            optimizer.step()
            sent.append(optimizer.outer_loop.last_round and optimizer.outer_loop.last_round.bytes_sent)
        return sent[-1] - sent[1]

    with Heard() as heard:
        more = run_in_process(work, 2)
    lines = heard.about("frozen parameters have changed in training", "INFO")
    assert len(lines) == said
    assert all("0.weight and 0 more, 6 elements: rounds average and send them too" in line for line in lines)
    assert more == [4 * 6 if said else 0] * 2, "bytes of the last round above those of the first"
