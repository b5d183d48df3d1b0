"""The average shown: consensus, eval and train; and SlowMoOptimizer given to Trainer (tests/tracker.py)."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.optim import SGD
from torch.profiler import ProfilerActivity, profile

import slowmo_hf
from harness import run_workers
from slowmo_hf import SlowMoConfig, SlowMoOptimizer, run_in_process
from tiny import error_of
from tracker import (
    START,
    Tracker,
    bitwise,
    close,
    mean_over_ranks,
    prepared,
    pull,
    rank,
    simulate,
    target,
    tau,
    train,
    weights,
)

# ---- the average: consensus, eval and train ----


def check_consensus(prepare):
    if prepare:
        _, model, optimizer = prepared(tau(4), make=lambda p: SGD(p, lr=0.1, momentum=0.9))
    else:
        model = Tracker()
        optimizer = SlowMoOptimizer(SGD(model.parameters(), lr=0.1, momentum=0.9), tau(4))
    with slowmo_hf.consensus(optimizer):  # before the start: nothing to do
        bitwise(weights(model), torch.tensor(START, dtype=torch.float64))
    assert slowmo_hf.last_round(optimizer) is None
    train(model, optimizer, 3)
    local = weights(model)
    mean = mean_over_ranks(local)
    assert not torch.allclose(local, mean)
    random = torch.get_rng_state()
    with slowmo_hf.consensus(optimizer):
        close(weights(model), mean)
        with slowmo_hf.consensus(optimizer):
            close(weights(model), mean)
        close(weights(model), mean)
        torch.rand(3)
    bitwise(weights(model), local)
    assert torch.equal(torch.get_rng_state(), random)

    def fail():
        with slowmo_hf.consensus(optimizer):
            close(weights(model), mean)
            raise KeyError("from inside")

    assert error_of(fail) == "KeyError: 'from inside'"
    bitwise(weights(model), local)

    momentum = next(iter(optimizer.state.values()))["momentum_buffer"].clone()

    def step_inside():
        with slowmo_hf.consensus(optimizer):
            train(model, optimizer, 1, first=3)

    assert "RuntimeError: a training step was taken while the average is shown" in error_of(step_inside)
    bitwise(weights(model), local)
    bitwise(next(iter(optimizer.state.values()))["momentum_buffer"], momentum)

    optimizer.eval()
    close(weights(model), mean)
    optimizer.eval()
    optimizer.train()
    bitwise(weights(model), local)
    optimizer.train()
    bitwise(weights(model), local)


def check_last_round():
    """
    tau 2, beta ½, by hand: Δ = anchor - mean; the consensus distance is the mean of ||x_i - mean||²; one bucket of 3 +
    1 doubles and a header of 7 doubles travel.
    """
    _, model, optimizer = prepared(tau(2))
    train(model, optimizer, 1)
    assert slowmo_hf.last_round(optimizer) is None
    train(model, optimizer, 3, first=1)
    anchor = simulate(2)[0]
    local = [x - 0.1 * pull(x, r, 3) for r, x in enumerate(simulate(3))]
    mean = sum(local) / 2
    report = slowmo_hf.last_round(optimizer)
    assert report is slowmo_hf.last_round(optimizer.optimizer)
    assert report.round == 2
    assert report.pseudo_grad_norm == pytest.approx(float((anchor - mean).norm()))
    assert report.consensus_distance == pytest.approx(float(sum((x - mean).norm() ** 2 for x in local) / 2))
    assert report.velocity_norm == pytest.approx(float((anchor - simulate(4)[0]).norm()))
    assert report.bytes_sent == (3 + 1) * 8 + (10 + 1) * 8
    assert report.to_logs()["slowmo/round"] == 2


def check_an_evaluation_before_training_does_not_start():
    """Rank 0 alone evaluates first; the start is collective and must wait for the first training pass."""
    _, model, optimizer = prepared(tau(2))
    if rank() == 0:
        with torch.no_grad():
            model.module(target(0, 0))
    assert optimizer.optimizer.outer_loop is None
    train(model, optimizer, 3)
    close(weights(model), simulate(3)[rank()])


def check_all_looks():
    check_consensus(prepare=True)
    check_consensus(prepare=False)
    check_last_round()
    check_an_evaluation_before_training_does_not_start()


def test_consensus_and_last_round():
    run_workers(check_all_looks, 2)


# ---- Trainer(optimizers=(SlowMoOptimizer, None)) ----


class TrainerModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(START, dtype=torch.float32))
        self.targets = []

    def forward(self, labels):
        if self.training:
            self.targets.append(labels[0].double())
        loss = 0.5 * ((self.w - labels) ** 2).sum()
        return {"loss": loss, "logits": self.w.detach().expand(len(labels), 3)}


def check_trainer(folder):
    from transformers import Trainer, TrainerCallback, TrainingArguments

    model = TrainerModel()
    optimizer = SlowMoOptimizer(SGD(model.parameters(), lr=0.1), tau(2))
    seen, locals_ = [], []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            locals_.append(model.w.detach().clone())

        def on_prediction_step(self, args, state, control, **kwargs):
            seen.append((state.global_step, model.w.detach().clone()))

    data = [{"labels": target(index % 5, index).float()} for index in range(12)]
    arguments = TrainingArguments(
        folder,
        use_cpu=True,
        max_steps=6,
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        max_grad_norm=0,
        lr_scheduler_type="constant",
    )
    trainer = Trainer(
        model, arguments, train_dataset=data, eval_dataset=data[:2], callbacks=[Watch()], optimizers=(optimizer, None)
    )
    trainer.train()

    everyone = [None, None]
    dist.all_gather_object(everyone, model.targets)
    assert [len(targets) for targets in everyone] == [6, 6]
    assert not torch.equal(torch.as_tensor(everyone[0][0]), torch.as_tensor(everyone[1][0]))
    runs = [simulate(step + 1, gradient=lambda x, r, k: x - everyone[r][k])[rank()] for step in range(6)]
    for step, local in enumerate(locals_):
        close(local, runs[step], 1e-5)
    steps = {step for step, _ in seen}
    assert steps == {3, 6}
    inside = mean_over_ranks(locals_[2])
    assert not torch.allclose(inside, locals_[2], rtol=1e-3)
    for step, shown in seen:
        close(shown, inside if step == 3 else runs[5], 1e-5)


def test_trainer_takes_it_and_evaluates_the_average(tmp_path):
    run_workers(check_trainer, 2, str(tmp_path))


def test_a_start_that_was_refused_is_refused_again():
    """
    A caller that catches the error must not go on untrained: the next forward pass starts again, and says the same.
    """
    model = torch.nn.Linear(2, 1)
    optimizer = SlowMoOptimizer(torch.optim.Adagrad(model.parameters()), SlowMoConfig(inner_state="reset"))
    for _ in range(2):
        with pytest.raises(ValueError, match="inner_state='reset' cannot be used with Adagrad"):
            model(torch.ones(1, 2))
    assert optimizer.outer_loop is None


def test_a_state_is_copied_once():
    """Anchor and velocity into place, and the parameter from its anchor: three copies, and no memory beside."""

    def work(rank):
        weight = torch.nn.Parameter(torch.randn(7, 149))
        optimizer = SlowMoOptimizer(torch.optim.SGD([weight], lr=0.1), SlowMoConfig(sync_every=1))
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        state = optimizer.state_dict()
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
            optimizer.load_state_dict(state)
        names = ("aten::copy_", "aten::clone", "aten::empty_like")
        large = [event.name for event in seen.events() if [7 * 149] in event.input_shapes[:1]]
        return [name for name in large if name in names]

    assert run_in_process(work, 1) == [["aten::copy_"] * 3]


def in_open_autocast(rank):
    """What a view and `model.eval()` give inside one autocast region, which keeps casts of weights; and outside."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    optimizer = SlowMoOptimizer(SGD(model.parameters(), lr=0.5), tau(4))
    rows = torch.randn(7, 3, 4, generator=torch.Generator().manual_seed(rank))
    for row in rows:
        model(row).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    x, found = torch.ones(2, 4), []

    def look():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return model(x)[0].item()

    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            model(x).sum()
            with slowmo_hf.consensus(optimizer):
                found.append(look())
            model.eval()
            found.append(look())
            model.train()
            found.append(model(x)[0].item())
    with slowmo_hf.consensus(optimizer):
        outside = [look()]
    model.eval()
    outside.append(look())
    model.train()
    return found, [*outside, look()]


def test_an_open_autocast_region_has_no_casts_of_other_weights():
    first, second = run_in_process(in_open_autocast, 2)
    for found, outside in (first, second):
        assert found == 2 * outside
        assert len(set(outside)) == 3
    assert first[1][:2] == second[1][:2]


# ---- what a program samples for its training ----


@pytest.mark.parametrize("how", ["whole", "children"])
def test_rollouts_of_every_step_are_told_and_children_make_them_right(how, caplog):
    """What is sampled behind `model.eval()` is of the last round; with the children in `eval()` of the weights now."""

    def work(worker):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
        optimizer = SlowMoOptimizer(SGD(model.parameters(), lr=0.1), tau(4))
        is_fresh = []
        for _ in range(7):
            model(torch.full((3,), 1.0 + worker)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            own = model[2].weight.detach().clone()
            switched = [model] if how == "whole" else list(model.children())
            for module in switched:
                module.eval()
            is_fresh.append(torch.equal(model[2].weight, own))
            for module in switched:
                module.train()
        return is_fresh

    with caplog.at_level("INFO", logger="slowmo_hf"):
        told = run_in_process(work, 2)
    # Before the first round there is no other model, and at a round it is the same.
    assert told == [[True] * 4 + [False] * 3 if how == "whole" else [True] * 7] * 2
    lines = [record.getMessage() for record in caplog.records]
    assert sum("model.eval() at every step shows the last round's model." in line for line in lines) == (
        how == "whole"
    )


def test_evaluations_at_every_other_step_are_no_rollouts(caplog):
    def work(rank):
        model = torch.nn.Linear(3, 1)
        optimizer = SlowMoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), SlowMoConfig(sync_every=4))
        for step in range(12):
            model(torch.ones(3)).sum().backward()
            optimizer.step()
            if step % 2:
                model.eval()
                model.train()

    run_in_process(work, 2)
    assert not [line for line in caplog.messages if "model.eval() at every step" in line]
