"""SlowMoCallback in a stock Trainer: looks, the end, resumes (tests/trainer_runs.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from harness import patience, run_workers
from slowmo_hf import SlowMoCallback, SlowMoConfig, SlowMoOptimizer
from tiny import (
    Recorder,
    Regression,
    Rows,
    arguments,
    bert,
    equal,
    follow,
    mean,
    recorded,
    sentences,
    values,
)
from trainer_runs import CONFIG, STEPS, TAU, bert_trainer, error_of, run


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def is_mean_of(shown, locals_, tolerance=1e-6):
    for name in shown:
        if shown[name].is_floating_point():
            torch.testing.assert_close(shown[name].double(), mean(locals_, name), rtol=tolerance, atol=tolerance)


# ---- looks ----


def check_looks(folder):
    """The same run thrice: never looked at, looked at after every step, looked at and saved at every fifth."""
    runs = {
        "alone": run(f"{folder}/alone"),
        "watched": run(f"{folder}/watched", eval_strategy="steps", eval_steps=1),
        "saved": run(f"{folder}/saved", eval_strategy="steps", eval_steps=5, save_strategy="steps", save_steps=5),
        "epochs": run(
            f"{folder}/epochs", max_steps=-1, num_train_epochs=2, eval_strategy="epoch", save_strategy="epoch"
        ),
        "epochs alone": run(f"{folder}/epochs_alone", max_steps=-1, num_train_epochs=2),
        "cpu stash": run(
            f"{folder}/stash", SlowMoConfig(sync_every=TAU, stash_device="cpu"), eval_strategy="steps", eval_steps=1
        ),
    }
    return runs


@pytest.mark.slow
def test_looks_see_the_average_and_leave_no_trace(tmp_path):
    ranks = run_workers(check_looks, 2, str(tmp_path))
    for name in ranks[0]:
        runs = [rank[name] for rank in ranks]
        assert follow(runs, CONFIG) == len(runs[0]["after"]) // TAU, name
    looked = {
        "watched": range(1, STEPS + 1),
        "saved": (5, STEPS),
        "epochs": (8, 16),
        "cpu stash": range(1, STEPS + 1),
    }
    for name, steps in looked.items():
        runs = [rank[name] for rank in ranks]
        assert set(runs[0]["evaluated"]) == set(steps), name
        for step in steps:
            locals_ = [run["after"][step - 1] for run in runs]
            for run_ in runs:
                assert equal(run_["evaluated"][step], runs[0]["evaluated"][step]), (name, step)
            is_mean_of(runs[0]["evaluated"][step], locals_)
            assert not (step % TAU) or not equal(runs[0]["evaluated"][step], locals_[0])
    for one, other in (("alone", "watched"), ("alone", "cpu stash"), ("epochs alone", "epochs")):
        for rank_, runs in enumerate(ranks):
            for step, (left, right) in enumerate(zip(runs[one]["after"], runs[other]["after"], strict=False), start=1):
                assert equal(left, right), f"{other}, rank {rank_}: a look changed step {step}"
    assert not equal(ranks[0]["alone"]["after"][0], ranks[0]["epochs"]["after"][3])
    for name in ("saved", "epochs"):
        runs = [rank[name] for rank in ranks]
        assert set(runs[0]["saved"]) == set(looked[name])
        for step in looked[name]:
            weights = load_file(f"{tmp_path}/{name}/checkpoint-{step}/model.safetensors")
            bert().load_state_dict(weights, strict=True)
            is_mean_of(weights, [run["after"][step - 1] for run in runs])
            assert equal(weights, runs[0]["evaluated"][step])


def check_eval_on_start(folder):
    return [
        run(f"{folder}/{first}", max_steps=2, eval_strategy="steps", eval_steps=2, eval_on_start=first)
        for first in (False, True)
    ]


def test_eval_on_start_leaves_no_trace(tmp_path):
    for without, first in run_workers(check_eval_on_start, 2, str(tmp_path)):
        assert equal(first["evaluated"][0], first["start"])
        for left, right in zip(without["after"], first["after"], strict=True):
            assert equal(left, right), "dropout differs: the evaluation moved the random generators"


# ---- the end ----


def check_best_model(folder):
    """The loss of evaluation is worst at the end by construction: learning goes uphill after step 4."""
    recorder = Recorder()

    class Uphill(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
            if state.global_step >= 4:
                for group in optimizer.param_groups:
                    group["lr"] = -abs(group["lr"])

    trainer = bert_trainer(
        folder,
        before=[recorder, Uphill()],
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        save_total_limit=2,
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint).name
    return recorded(trainer, recorder), best, load_file(f"{folder}/{best}/model.safetensors")


def check_early_stop(folder):
    return run(
        folder,
        before=[EarlyStoppingCallback(early_stopping_patience=1)],
        max_steps=40,
        eval_strategy="steps",
        eval_steps=3,
        metric_for_best_model="eval_loss",
        # The loss falls, so the second evaluation is no better: stop at step 6, inside a round.
        greater_is_better=True,
    )


class StopAtEpoch(TrainerCallback):
    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_training_stop = True


def check_restored(folder):
    """Twice with the same Trainer, evaluated and predicted with afterwards."""
    recorder = Recorder()
    trainer = bert_trainer(folder, before=[recorder], max_steps=6)
    stock = trainer.args.average_tokens_across_devices
    runs, flags, rounds = [], [], []
    for _ in range(2):
        trainer.train()
        runs.append(recorded(trainer, recorder))
        ddp = trainer.model_wrapped
        assert isinstance(ddp, DistributedDataParallel)
        flags.append(
            (
                ddp.require_backward_grad_sync,
                ddp.require_forward_param_sync,
                trainer.args.average_tokens_across_devices,
            )
        )
        rounds.append(
            next(c for c in trainer.callback_handler.callbacks if isinstance(c, SlowMoCallback)).last_round.round
        )
    before = values(trainer.model)
    first, second = trainer.evaluate()["eval_loss"], trainer.predict(sentences(8)).metrics["test_loss"]
    assert first == second
    assert equal(before, values(trainer.model))
    ddp.zero_grad()
    ddp(**{k: v[None] for k, v in sentences(8)[rank()].items()})["loss"].backward()
    gradient = next(p.grad.clone() for p in ddp.parameters() if p.grad is not None and p.grad.abs().sum() > 0)
    return stock, runs, flags, rounds, gradient


def check_ends(folder):
    return {
        "best": check_best_model(f"{folder}/best"),
        "early": check_early_stop(f"{folder}/early"),
        "epoch": run(f"{folder}/epoch", SlowMoConfig(sync_every=5), before=[StopAtEpoch()], max_steps=40),
        "restored": check_restored(f"{folder}/restored"),
    }


@pytest.mark.slow
def test_the_end(tmp_path):
    ranks = run_workers(check_ends, 2, str(tmp_path))
    for best_run, name, weights in (rank["best"] for rank in ranks):
        assert name == "checkpoint-4"
        assert equal(best_run["final"], weights)
        assert not equal(best_run["final"], best_run["after"][-1])
    early = [rank["early"] for rank in ranks]
    assert [run["global_step"] for run in early] == [6, 6]
    assert follow(early, CONFIG) == 1
    epoch = [rank["epoch"] for rank in ranks]
    assert [run["global_step"] for run in epoch] == [8, 8]
    assert follow(epoch, SlowMoConfig(sync_every=5)) == 1
    for number in range(2):
        runs = [rank["restored"][1][number] for rank in ranks]
        assert len(runs[0]["after"]) == 6
        assert follow(runs, CONFIG) == 1
    for stock, runs, flags, rounds, gradient in (rank["restored"] for rank in ranks):
        assert stock is True
        assert flags == [(True, True, True)] * 2
        assert rounds == [1, 1]
        assert equal(runs[0]["final"], runs[1]["start"])
        assert torch.equal(gradient, ranks[0]["restored"][4]), "DDP averages gradients again"


# ---- resume ----


def check_asked_late(folder):
    """Another callback asks for an evaluation, or a save, after ours has looked."""

    class Asks(TrainerCallback):
        def __init__(self, what, step):
            self.what, self.step = what, step

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == self.step:
                setattr(control, self.what, True)

    late = run(f"{folder}/late", after=[Asks("should_evaluate", 3), Asks("should_save", 6)])
    resumed = bert_trainer(f"{folder}/late")
    resumed.train(resume_from_checkpoint=f"{folder}/late/checkpoint-6")
    return late, values(resumed.model), run(f"{folder}/alone")


def test_what_a_later_callback_asks_for_is_done(tmp_path):
    """The evaluation and the checkpoint are the average's, nothing else changes, and the checkpoint is whole."""
    ranks = run_workers(check_asked_late, 2, str(tmp_path))
    runs = [late for late, _, _ in ranks]
    saved = load_file(f"{tmp_path}/late/checkpoint-6/model.safetensors")
    is_mean_of(saved, [run_["after"][5] for run_ in runs])
    for late, resumed, alone in ranks:
        assert equal(late["evaluated"][3], runs[0]["evaluated"][3])
        is_mean_of(late["evaluated"][3], [run_["after"][2] for run_ in runs])
        assert len(late["after"]) == len(alone["after"]) == STEPS
        assert all(equal(*steps) for steps in zip(late["after"], alone["after"], strict=True))
        assert equal(resumed, alone["final"])


def check_different(folder):
    """A difference between ranks: the same error everywhere, before training."""

    class Renamed(Regression):
        def __init__(self, dtype=torch.float64):
            super().__init__(dtype)
            if rank():  # the same shapes in the same order, which DDP does not mind
                body, head = self.body, self.head
                del self.body, self.head
                self.trunk, self.head = body, head

    def train(config=CONFIG, model=None, **settings):
        model = model or Regression()
        arguments_ = arguments(folder, max_steps=4, **settings)
        Trainer(model=model, args=arguments_, train_dataset=Rows(32), callbacks=[SlowMoCallback(config)]).train()

    return {
        "SlowMoConfig.sync_every": error_of(train, SlowMoConfig(sync_every=3 + rank())),
        "SlowMoConfig.outer_momentum": error_of(train, SlowMoConfig(outer_momentum=0.5 if rank() else 0.4)),
        "learning rate": error_of(train, learning_rate=1e-3 * (1 + rank())),
        "trunk.weight": error_of(train, model=Renamed()),
        "nothing": error_of(train),
    }


def check_both_surfaces(folder):
    model = Regression()
    optimizer = SlowMoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), CONFIG)
    trainer = Trainer(
        model=model,
        args=arguments(folder, max_steps=4),
        train_dataset=Rows(32),
        optimizers=(optimizer, None),
        callbacks=[SlowMoCallback(CONFIG)],
    )
    return error_of(trainer.train)


def check_refusals(folder):
    return {
        "different": check_different(folder),
        "both": check_both_surfaces(folder),
    }


def test_refusals_are_the_same_on_every_rank(tmp_path):
    ranks = run_workers(check_refusals, 2, str(tmp_path))
    for result in ranks:
        for name, (error, seconds) in result["different"].items():
            assert error == ranks[0]["different"][name][0], name
            assert seconds < patience(10)
            if name == "nothing":
                assert error == ""
            else:
                assert error.startswith("ValueError: ranks differ"), (name, error)
                assert name in error
        assert (
            result["both"][0]
            == "ValueError: the Trainer's optimizer is a SlowMoOptimizer: use it or SlowMoCallback, not both."
        )
