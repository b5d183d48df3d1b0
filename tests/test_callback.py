"""
SlowMoCallback in a stock Trainer: looks, logs, the end, what is restored, what is refused.

`Recorder` stands before SlowMoCallback and keeps each worker's own weights; the tests average them and compare with
what evaluation, the saved files and the end of training hold.
"""

from __future__ import annotations

import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from harness import patience, run_workers
from slowmo_hf import SlowMoCallback, SlowMoConfig, SlowMoOptimizer
from tiny import (
    Heard,
    LossKeeper,
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
    stand_in_for_the_hub,
    values,
)

STEPS, TAU = 10, 4
CONFIG = SlowMoConfig(sync_every=TAU, outer_momentum=0.5, timeout_seconds=patience(30))


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def bert_trainer(folder, config=CONFIG, before=(), after=(), model=None, **settings):
    """A PreTrainedModel with dropout on shuffled data."""
    settings = {"max_steps": STEPS, "learning_rate": 1e-2, **settings}
    return Trainer(
        model=model or bert(dropout=0.1),
        args=arguments(folder, **settings),
        train_dataset=sentences(),
        eval_dataset=sentences(8),
        callbacks=[*before, SlowMoCallback(config), *after],
    )


def run(folder, config=CONFIG, before=(), after=(), **settings):
    recorder = Recorder()
    trainer = bert_trainer(folder, config, [recorder, *before], after, **settings)
    trainer.train()
    return {
        **recorded(trainer, recorder),
        "log_history": trainer.state.log_history,
        "global_step": trainer.state.global_step,
    }


def error_of(call, *args, **kwargs):
    """(`Type: message` of what the call raises or "", seconds)."""
    start = time.perf_counter()
    try:
        call(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}", time.perf_counter() - start
    return "", time.perf_counter() - start


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


# ---- logs ----


class Watch(TrainerCallback):
    """Last of all: the report of every round, when each line was said, and Trainer's own losses."""

    def __init__(self, ours, heard):
        self.ours, self.heard, self.reports, self.heard_at = ours, heard, {}, {}

    def on_optimizer_step(self, args, state, control, **kwargs):
        step = state.global_step + 1
        self.heard_at[step] = len(self.heard.about("costs:"))
        if step % self.ours.config.sync_every == 0:
            self.reports[step] = self.ours.last_round


class StubReporter(TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def check_logs(folder, report_to, before=()):
    config = SlowMoConfig(sync_every=2, outer_momentum=0.6)
    ours, stub, model = SlowMoCallback(config), StubReporter(), LossKeeper()
    with Heard() as heard:
        watch = Watch(ours, heard)
        trainer = Trainer(
            model=model,
            args=arguments(folder, max_steps=15, logging_strategy="steps", logging_steps=6, report_to=report_to),
            train_dataset=Rows(128, torch.float32),
            callbacks=[*before, stub, ours, watch],
        )
        trainer.train()
    elements = sum(p.numel() for p in model.parameters())
    return {
        "history": trainer.state.log_history,
        "stub": stub.logs,
        "reports": watch.reports,
        "losses": model.losses,
        "elements": elements,
        "heard": heard.lines,
        "heard_at": watch.heard_at,
        "settings": config.to_dict(),
    }


def test_logs_reach_the_history_tensorboard_and_every_reporter(tmp_path):
    ranks = run_workers(check_logs, 2, str(tmp_path / "logs"), "tensorboard")
    _check_history(ranks)
    _check_event_file(ranks[0], tmp_path / "logs")
    _check_lines(ranks)


def _check_history(ranks):
    for result in ranks:
        slow = [entry for entry in result["history"] if "slowmo/round" in entry]
        assert [(e["step"], e["slowmo/round"]) for e in slow] == [(6, 3), (12, 6), (15, 7)]
        for entry, steps in zip(slow, [(2, 4, 6), (8, 10, 12), (14,)], strict=True):
            reports = [result["reports"][step] for step in steps]
            header, payload = 8 * (10 + 2), 4 * (result["elements"] + 1)
            # A ring of two sends each message once.
            assert entry["slowmo/bytes_sent"] == len(steps) * (header + payload)
            assert entry["slowmo/seconds"] == pytest.approx(sum(r.seconds for r in reports))
            told = [r.utilisation for r in reports if r.utilisation is not None]
            assert len(told) == len(reports) - (steps[0] == 2), "the first round has none before it"
            assert entry["slowmo/utilisation"] == pytest.approx(sum(told) / len(told))
            assert 0 < entry["slowmo/utilisation"] < 1
            for name in ("consensus_distance", "pseudo_grad_norm", "velocity_norm"):
                assert entry[f"slowmo/{name}"] == getattr(reports[-1], name)
                assert entry[f"slowmo/{name}"] > 0
        losses = {e["step"]: e["loss"] for e in result["history"] if "loss" in e}
        assert set(losses) == {6, 12}
        for last, loss in losses.items():
            expected = sum(sum(r["losses"][last - 6 : last]) / 6 for r in ranks) / len(ranks)
            assert loss == pytest.approx(expected, rel=1e-4)
        told = [logs for logs in result["stub"] if "slowmo/round" in logs]
        assert [{k: v for k, v in logs.items() if k.startswith("slowmo/")} for logs in told] == [
            {k: v for k, v in entry.items() if k.startswith("slowmo/")} for entry in slow
        ]
        assert sum("train_runtime" in entry for entry in result["history"]) == 1


def _check_event_file(result, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tensorboard's own imports
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    files = list(Path(folder).rglob("events.out.tfevents.*"))
    scalars = {}
    for file in files:
        events = EventAccumulator(str(file))
        events.Reload()
        for tag in events.Tags()["scalars"]:
            scalars.setdefault(tag, []).extend((e.step, e.value) for e in events.Scalars(tag))
    for name in (
        "round",
        "bytes_sent",
        "seconds",
        "utilisation",
        "consensus_distance",
        "pseudo_grad_norm",
        "velocity_norm",
    ):
        expected = [(e["step"], e[f"slowmo/{name}"]) for e in result["history"] if "slowmo/round" in e]
        found = scalars[f"train/slowmo/{name}"]
        assert [step for step, _ in found] == [step for step, _ in expected]
        assert [value for _, value in found] == pytest.approx([value for _, value in expected], rel=1e-5)
    assert [step for step, _ in scalars["train/loss"]] == [6, 12]


def _check_lines(ranks):
    table = [line for _, line in ranks[0]["heard"] if line.startswith("2 workers")]
    assert len(table) == 1
    assert "  settings: sync_every=2, outer_momentum=0.6\n" in table[0]
    assert "inner_state in effect: maintain" in table[0]
    rows = [line.split() for line in table[0].splitlines()[2:4]]
    assert [row[:3] for row in rows] == [["0", "0", "gloo"], ["1", "1", "gloo"]]
    costs = [line for _, line in ranks[0]["heard"] if line.startswith("costs:")]
    assert len(costs) == 1
    assert [ranks[0]["heard_at"][step] for step in (8, 10, 15)] == [0, 1, 1], "of rounds 2 to 4, heard in the fifth"
    assert f"{ranks[0]['reports'][10].bytes_sent:,} bytes sent per round and worker" in costs[0]
    assert ranks[1]["heard"] == []


def check_wandb(folder):
    import os

    os.environ.update(WANDB_MODE="disabled", WANDB_DIR=folder, WANDB_SILENT="true")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import wandb

        sent = []

        class Listen(TrainerCallback):
            def on_train_begin(self, args, state, control, **kwargs):  # after wandb.init, which sets wandb.log
                wandb.log = lambda logs, **kwargs: sent.append(dict(logs))

        result = check_logs(folder, "wandb", [Listen()])
    return result["history"], sent


def test_wandb_receives_the_keys(tmp_path):
    pytest.importorskip("wandb")
    [(history, sent)] = run_workers(check_wandb, 1, str(tmp_path))
    slow = [entry for entry in history if "slowmo/round" in entry]
    assert len(slow) == 3
    received = [logs for logs in sent if "train/slowmo/round" in logs]
    assert [(logs["train/global_step"], logs["train/slowmo/velocity_norm"]) for logs in received] == [
        (e["step"], e["slowmo/velocity_norm"]) for e in slow
    ]


def check_one_callback_two_trainers(folder):
    """Both alive: checkpoints and logs are those of the Trainer that trains."""
    ours = SlowMoCallback(CONFIG)
    trainers = []
    for name, steps in (("a", TAU), ("b", 2 * TAU)):
        settings = {
            "max_steps": steps,
            "save_strategy": "steps",
            "save_steps": steps,
            "logging_strategy": "steps",
            "logging_steps": TAU,
        }
        args = arguments(f"{folder}/{name}", **settings)
        trainers.append(Trainer(model=bert(), args=args, train_dataset=sentences(), callbacks=[ours]))
        trainers[-1].train()
    rounds = [sum("slowmo/round" in entry for entry in trainer.state.log_history) for trainer in trainers]
    return rounds, sorted(str(path.relative_to(folder)) for path in Path(folder).glob("*/checkpoint-*/slowmo"))


def test_one_callback_serves_the_trainer_that_trains(tmp_path):
    [(rounds, folders)] = run_workers(check_one_callback_two_trainers, 1, str(tmp_path))
    assert rounds == [1, 2]
    assert folders == [f"a/checkpoint-{TAU}/slowmo", f"b/checkpoint-{2 * TAU}/slowmo"]


# ---- one process ----


def check_one_process(folder):
    local_sgd = SlowMoConfig.local_sgd(sync_every=3)
    with Heard() as heard:
        ours = run(f"{folder}/ours", local_sgd)
    trainer = Trainer(
        model=bert(dropout=0.1),
        args=arguments(f"{folder}/stock", max_steps=STEPS, learning_rate=1e-2),
        train_dataset=sentences(),
    )
    torch.manual_seed(trainer.args.seed)
    trainer.train()
    slow = run(f"{folder}/slow")
    return ours, values(trainer.model), heard.about("one worker: nothing is averaged", "WARNING"), slow


def test_one_process_is_warned_and_trains(tmp_path):
    [(ours, stock, warned, slow)] = run_workers(check_one_process, 1, str(tmp_path))
    assert len(warned) == 1
    assert follow([ours], SlowMoConfig.local_sgd(sync_every=3)) == 3
    assert follow([slow], CONFIG) == 2
    for name, value in stock.items():  # Local SGD on one worker is the base optimizer
        torch.testing.assert_close(ours["final"][name], value, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(slow["final"]["classifier.weight"], stock["classifier.weight"], atol=1e-4)


# ---- what is not supported ----


def check_unsupported(folder):
    errors = {}
    for kind in (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM):

        class Pretend(TrainerCallback):
            def on_train_begin(self, args, state, control, kind=kind, **kwargs):
                AcceleratorState._shared_state["distributed_type"] = PartialState._shared_state["distributed_type"] = (
                    kind
                )

        model = Regression()
        trainer = Trainer(
            model=model,
            args=arguments(folder, max_steps=2),
            train_dataset=Rows(8),
            callbacks=[Pretend(), SlowMoCallback(CONFIG)],
        )
        before = values(model)
        errors[kind.value], _ = error_of(trainer.train)
        assert equal(before, values(model))
    return errors


def test_unsupported_engines_are_refused_by_name(tmp_path):
    [errors] = run_workers(check_unsupported, 1, str(tmp_path))
    assert set(errors) == {"DEEPSPEED", "FSDP", "MEGATRON_LM"}
    for kind, error in errors.items():
        assert error.startswith("ValueError: distributed_type must be"), error
        assert f"got {kind}," in error


def test_attach_adds_the_callback_once(tmp_path):
    trainer = Trainer(model=Regression(), args=arguments(tmp_path), train_dataset=Rows(8))
    ours = SlowMoCallback().attach(trainer)
    ours.attach(trainer)
    assert trainer.callback_handler.callbacks.count(ours) == 1
    assert ours._find_trainer() is trainer
    assert ours.last_round is None


# ---- the Hub ----


def check_push(folder):
    pushed = []

    def keep(uploaded, place):
        weights = load_file(uploaded / "model.safetensors")
        # The file is written again, and is mapped.
        pushed.append({name: value.clone() for name, value in weights.items()})

    stand_in_for_the_hub(keep)
    recorder = Recorder()
    args = arguments(
        folder,
        max_steps=6,
        save_strategy="steps",
        save_steps=3,
        push_to_hub=True,
        hub_strategy="every_save",
        hub_always_push=True,
    )
    model = bert(dropout=0.0)
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=sentences(48),
        callbacks=[recorder, SlowMoCallback(SlowMoConfig.local_sgd(4))],
    )
    trainer.train()
    return recorded(trainer, recorder), pushed


def test_what_is_pushed_to_the_hub_is_the_average(tmp_path):
    """At step 3, inside a round, at step 6, and at the end: the mean of the workers' own weights of that step."""
    (first, pushed), (second, none) = run_workers(check_push, 2, str(tmp_path))
    assert none == []
    assert len(pushed) >= 2
    for weights, step in zip(pushed[:2], (3, 6), strict=True):
        for name, value in weights.items():
            torch.testing.assert_close(value, (first["after"][step - 1][name] + second["after"][step - 1][name]) / 2)
