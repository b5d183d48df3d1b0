"""SlowMoCallback in a stock Trainer: logs, one process, what is refused, the Hub (tests/trainer_runs.py)."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback

from harness import run_workers
from slowmo_hf import SlowMoCallback, SlowMoConfig
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
    recorded,
    sentences,
    stand_in_for_the_hub,
    values,
)
from trainer_runs import CONFIG, STEPS, TAU, error_of, run

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


def advice(folder):
    """What is said of each `logging_steps`, in 10 steps with rounds of 4."""
    said = {}
    for logging_steps, overlap_steps in ((3, 0), (0.3, 0), (4, 0), (0.4, 0), (0.3, 2)):
        trainer = Trainer(
            model=Regression(torch.float32),
            args=arguments(folder, max_steps=10, logging_strategy="steps", logging_steps=logging_steps),
            train_dataset=Rows(80, torch.float32),
            callbacks=[SlowMoCallback(SlowMoConfig(sync_every=4, overlap_steps=overlap_steps))],
        )
        with Heard() as heard:
            trainer.train()
        said[logging_steps, overlap_steps] = heard.about("logging_steps=")
    return said


def test_logs_between_rounds_are_told_also_where_they_are_a_part_of_the_run(tmp_path):
    gathers = "logging_steps=3: each log gathers the loss of all ranks"
    told = [f"{gathers}; a multiple of sync_every=4 would wait for nobody. No figure of 'costs' has these waits"]
    said, _ = run_workers(advice, 2, str(tmp_path))
    assert said == {
        (3, 0): told,
        (0.3, 0): told,
        (4, 0): [],
        (0.4, 0): [],
        (0.3, 2): [f"{gathers}, and waits for the slowest. Log less often; no figure of 'costs' has these waits"],
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
    assert "inner_state in effect: maintain\n  effective step: 2.5 times the learning rate, " in table[0]
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
