"""
A Trainer that trains, asked by the user's own callbacks or by its own subclass: who is refused, what they see of the
average, that training goes on as if nobody had asked, and what their logs hold.
"""

from __future__ import annotations

import time

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback

import slowmo_hf
from harness import patience, run_workers
from slowmo_hf import SlowMoCallback, SlowMoConfig
from tiny import (
    Recorder,
    Regression,
    Rows,
    arguments,
    bert,
    equal,
    error_of,
    follow,
    mean,
    recorded,
    sentences,
    values,
)

TAU = 4
CONFIG = SlowMoConfig(sync_every=TAU, outer_momentum=0.5, timeout_seconds=patience(30))


# ---- one callback, one Trainer ----


class Ours(SlowMoCallback):
    """A user's subclass."""


def small_trainer(folder, callbacks, steps=TAU, **settings):
    model = Regression()
    args = arguments(folder, **{"max_steps": steps, "learning_rate": 0.1, **settings})
    return Trainer(model=model, args=args, train_dataset=Rows(64), eval_dataset=Rows(8), callbacks=callbacks)


def check_two_callbacks(folder):
    twice = SlowMoCallback(CONFIG)
    attached = small_trainer(folder, [SlowMoCallback(CONFIG)])
    SlowMoCallback(CONFIG).attach(attached)
    trainers = {
        "listed": small_trainer(folder, [SlowMoCallback(CONFIG), SlowMoCallback(CONFIG)]),
        "subclass": small_trainer(folder, [SlowMoCallback(CONFIG), Ours(CONFIG)]),
        "attached": attached,
        "the same": small_trainer(folder, [twice, twice]),
        "one": small_trainer(folder, [SlowMoCallback(CONFIG)]),
    }
    out = {}
    for name, trainer in trainers.items():
        before = values(trainer.model)
        out[name] = (error_of(trainer.train), equal(before, values(trainer.model)))
    attached.remove_callback(SlowMoCallback)
    return out, error_of(attached.train)


def test_two_callbacks_of_one_trainer_are_refused(tmp_path):
    [(out, taken_out)] = run_workers(check_two_callbacks, 1, str(tmp_path))
    assert out.pop("one") == ("", False)
    for name, (error, untouched) in out.items():
        other = "Ours" if name == "subclass" else "SlowMoCallback"
        assert error.startswith(f"ValueError: a Trainer takes one SlowMoCallback, got 2 (SlowMoCallback, {other})"), (
            name
        )
        assert "remove_callback" in error
        assert untouched, name
    assert taken_out == "", "one is left"


class TrainsInside(TrainerCallback):
    """Trains another Trainer in the middle of this one's training."""

    def __init__(self, inner):
        self.inner, self.error = inner, None

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.error = error_of(self.inner.train)


def check_two_trainers(folder):
    out = {}
    for name in ("alone", "shared", "own"):
        ours = SlowMoCallback(CONFIG)
        inner = small_trainer(
            f"{folder}/in", [ours if name == "shared" else SlowMoCallback(CONFIG)], max_grad_norm=0.5
        )
        inside = TrainsInside(inner)
        outer = small_trainer(f"{folder}/out", [ours] if name == "alone" else [ours, inside], steps=2 * TAU)
        before = values(inner.model)
        outer.train()
        out[name] = (inside.error, ours.last_round.round, equal(before, values(inner.model)), values(outer.model))
    again = error_of(inner.train), error_of(outer.train)  # its training has ended
    return out, again


def test_one_callback_in_two_trainers_at_once_is_refused(tmp_path):
    """The first goes on as if the second had not been."""
    [(out, again)] = run_workers(check_two_trainers, 1, str(tmp_path))
    error, rounds, untouched, final = out["shared"]
    assert error.startswith("ValueError: one SlowMoCallback was given to two Trainers that train at once")
    assert "a SlowMoCallback of its own" in error
    assert untouched
    assert rounds == 2
    assert equal(final, out["alone"][3])
    assert out["own"][:3] == ("", 2, False)
    assert again == ("", "")


# ---- one scale of eval_loss ----


class Gathers(TrainerCallback):
    """Token counts that Trainer gathers in training steps."""

    def __init__(self):
        self.count, self.trainer = 0, None

    def on_train_begin(self, args, state, control, **kwargs):
        gather = self.trainer.accelerator.gather

        def counted(tensor):
            self.count += self.trainer.model.training
            return gather(tensor)

        self.trainer.accelerator.gather = counted


def check_scale(folder):
    rows = sentences(16)

    def trainer(callbacks):
        settings = {"eval_strategy": "steps", "eval_steps": 3, "logging_strategy": "steps", "logging_steps": 6}
        args = arguments(folder, max_steps=6, learning_rate=1e-2, **settings)
        return Trainer(model=bert(), args=args, train_dataset=sentences(), eval_dataset=rows, callbacks=callbacks)

    gathers = Gathers()
    ours = gathers.trainer = trainer([gathers, SlowMoCallback(SlowMoConfig(sync_every=3))])
    switched = []

    class Notes(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            switched.append(args.average_tokens_across_devices)

    ours.add_callback(Notes())
    ours.train()
    stock = trainer([])
    stock.model.load_state_dict(ours.model.state_dict())
    inside = [entry["eval_loss"] for entry in ours.state.log_history if "eval_loss" in entry]
    losses = [entry["loss"] for entry in ours.state.log_history if "loss" in entry]
    after, predicted = ours.evaluate()["eval_loss"], ours.predict(rows).metrics["test_loss"]
    return inside, after, predicted, stock.evaluate()["eval_loss"], switched, gathers.count, losses


def test_eval_loss_has_stock_trainers_scale(tmp_path):
    """
    Inside training and after it; training steps gather no token count and scale no loss, also after an evaluation.
    """
    for inside, after, predicted, stock, switched, gathers, losses in run_workers(check_scale, 2, str(tmp_path)):
        assert inside[1:] == [after] == [predicted] == [stock]
        assert switched == [False] * 6
        assert gathers == 0
        assert 0.5 < losses[0] < 0.9, "ln 2 at the start: not twice of it"


# ---- looks at any moment ----

ASKED = (2, 3, 4, 5)  # of Trainer's clock: a step that is not counted yet may be the round's, or the first after it


class Asks(TrainerCallback):
    """Calls the Trainer's own methods at one event, and keeps what was local then and what they showed."""

    def __init__(self, event, folder):
        self.folder, self.trainer, self.local, self.shown, self.saved = folder, None, {}, {}, {}
        setattr(self, event, self.ask)

    def ask(self, args, state, control, model=None, **kwargs):
        if state.global_step not in ASKED or state.global_step in self.local:
            return
        self.local[state.global_step] = values(model)
        self.trainer.evaluate()
        self.trainer.predict(sentences(4))
        self.trainer.save_model(f"{self.folder}/{state.global_step}")

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        self.shown.setdefault(state.global_step, []).append(values(model))
        torch.rand(1)

    def on_predict(self, args, state, control, model=None, **kwargs):
        self.shown.setdefault(state.global_step, []).append(values(model))


class AsksInside(Trainer):
    """A subclass that asks in its own training step."""

    asks = None

    def training_step(self, model, inputs, *args, **kwargs):
        if self.asks is not None:
            self.asks.ask(self.args, self.state, self.control, model=self.model)
        return super().training_step(model, inputs, *args, **kwargs)


def asked_trainer(folder, callbacks, kind=Trainer, config=CONFIG, **settings):
    settings = {"max_steps": 2 * TAU, "learning_rate": 1e-2, "gradient_accumulation_steps": 2, **settings}
    return kind(
        model=bert(dropout=0.1),
        args=arguments(folder, **settings),
        train_dataset=sentences(),
        eval_dataset=sentences(8),
        callbacks=callbacks,
    )


def asked_run(folder, event, place, config=CONFIG):
    recorder, asks = Recorder(), Asks(event, folder)
    around = {"before": [asks, SlowMoCallback(config)], "after": [SlowMoCallback(config), asks]}
    kind = AsksInside if event == "training_step" else Trainer
    trainer = asked_trainer(folder, [recorder, *around[place]], kind)
    asks.trainer = trainer
    if kind is AsksInside:
        trainer.asks = asks
    trainer.train()
    return {**recorded(trainer, recorder), "local": asks.local, "shown": asks.shown}


MOMENTS = [
    *[
        (event, place)
        for event in ("on_step_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end")
        for place in ("before", "after")
    ],
    ("on_substep_end", "before"),
    ("training_step", "after"),
]


def check_asked(folder):
    runs = {moment: asked_run(f"{folder}/{'_'.join(moment)}", *moment) for moment in MOMENTS}
    runs["delayed"] = asked_run(
        f"{folder}/delayed", "on_optimizer_step", "before", SlowMoConfig(sync_every=TAU, overlap_steps=2)
    )
    runs["alone"] = asked_run(f"{folder}/alone", "nothing", "before")
    runs["delayed alone"] = asked_run(
        f"{folder}/alone", "nothing", "before", SlowMoConfig(sync_every=TAU, overlap_steps=2)
    )
    return runs


def assert_mean(shown, locals_):
    for name, value in shown.items():
        if value.is_floating_point():
            torch.testing.assert_close(value.double(), mean(locals_, name), rtol=1e-6, atol=1e-7)


def test_asked_at_any_event_training_goes_on_as_if_not(tmp_path):
    """What is evaluated, predicted with and saved is the workers' average; every step is that of the run not asked."""
    ranks = run_workers(check_asked, 2, str(tmp_path), time_limit_seconds=180)
    assert follow([runs["alone"] for runs in ranks], CONFIG) == 2
    for moment in [*MOMENTS, "delayed"]:
        folder = tmp_path / ("delayed" if moment == "delayed" else "_".join(moment))
        for step in ASKED:
            locals_ = [runs[moment]["local"][step] for runs in ranks]
            event, place = moment if moment in MOMENTS else (moment, "")
            agree = step == TAU and event not in ("on_optimizer_step", "delayed")
            assert equal(*locals_) == agree or step == TAU - 1, (moment, step)
            saved = load_file(folder / str(step) / "model.safetensors")
            for runs in ranks:
                evaluated, predicted = runs[moment]["shown"][step]
                assert equal(evaluated, predicted), (moment, step)
                assert equal(evaluated, ranks[0][moment]["shown"][step][0]), (moment, step)
                assert all(torch.equal(evaluated[name], value) for name, value in saved.items()), (moment, step)
            is_round = event == "on_optimizer_step" and step == TAU - 1  # what it gives is shown, with its momentum
            if moment != "delayed" and not (is_round and place == "before"):
                assert_mean(evaluated, locals_)
        for runs in ranks:
            alone = runs["delayed alone" if moment == "delayed" else "alone"]
            assert len(runs[moment]["after"]) == 2 * TAU
            for step, pair in enumerate(zip(runs[moment]["after"], alone["after"], strict=True), start=1):
                assert equal(*pair), f"{moment}: being asked changed step {step}"
            assert equal(runs[moment]["final"], alone["final"]), moment


class AsksWhileShown(TrainerCallback):
    """Inside Trainer's own looks."""

    def __init__(self, folder):
        self.folder, self.trainer, self.seen = folder, None, {}

    def on_evaluate(self, args, state, control, model=None, metrics=None, **kwargs):
        self.seen["evaluated"] = values(model)
        self.trainer.predict(sentences(4))
        self.trainer.save_model(f"{self.folder}/in_evaluate")

    def on_predict(self, args, state, control, model=None, **kwargs):
        self.seen["predicted"] = values(model)

    def on_save(self, args, state, control, model=None, **kwargs):
        self.trainer.save_model(f"{self.folder}/in_save")


def check_nested(folder):
    out = {}
    looks = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    for name, callbacks in {"asked": [AsksWhileShown(folder)], "alone": []}.items():
        recorder = Recorder()
        trainer = asked_trainer(
            f"{folder}/{name}", [recorder, *callbacks, SlowMoCallback(CONFIG)], max_steps=4, **looks
        )
        for callback in callbacks:
            callback.trainer = trainer
        trainer.train()
        out[name] = recorded(trainer, recorder), [callback.seen for callback in callbacks]
    trained = "save_model" in vars(trainer), "evaluate" in vars(trainer), "predict" in vars(trainer)
    if dist.get_rank() == 0:  # as stock: nobody else is needed
        trainer.save_model(f"{folder}/afterwards")
    return out, trained


def test_looks_inside_looks(tmp_path):
    ranks = run_workers(check_nested, 2, str(tmp_path))
    for out, trained in ranks:
        (asked, [seen]), (alone, _) = out["asked"], out["alone"]
        assert all(equal(*steps) for steps in zip(asked["after"], alone["after"], strict=True))
        assert equal(seen["evaluated"], seen["predicted"])
        assert trained == (False, False, False)
    final = ranks[0][0]["alone"][0]["final"]
    afterwards = load_file(tmp_path / "afterwards" / "model.safetensors")
    assert all(torch.equal(final[name], value) for name, value in afterwards.items())
    for name in ("in_evaluate", "in_save"):
        saved = load_file(tmp_path / name / "model.safetensors")
        checkpoint = load_file(tmp_path / "asked" / "checkpoint-4" / "model.safetensors")
        assert all(torch.equal(checkpoint[name], value) for name, value in saved.items()), "the last look's"


# ---- the public calls ----


class Shows(TrainerCallback):
    """`slowmo_hf.consensus` around what no method of Trainer does."""

    def __init__(self):
        self.subject, self.local, self.shown, self.back, self.drawn, self.rounds = None, {}, {}, {}, [], []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.local = values(model)
        before = torch.get_rng_state()
        with slowmo_hf.consensus(self.subject):
            self.shown = values(model)
            with slowmo_hf.consensus(self.subject):
                assert equal(self.shown, values(model))
            assert equal(self.shown, values(model))
            torch.rand(3)
        self.back = values(model)
        self.drawn.append(torch.equal(before, torch.get_rng_state()))
        report = slowmo_hf.last_round(self.subject)
        self.rounds.append(report and report.round)


def check_public(folder):
    out = {}
    for name in ("trainer", "callback"):
        shows, ours = Shows(), SlowMoCallback(CONFIG)
        trainer = asked_trainer(folder, [shows, ours], max_steps=TAU + 2)
        shows.subject = subject = trainer if name == "trainer" else ours
        calls = []
        for call in (lambda: None, trainer.train):
            call()
            untouched = values(trainer.model)
            with slowmo_hf.consensus(subject):
                calls.append(equal(untouched, values(trainer.model)))
            calls.append(slowmo_hf.last_round(subject))
        out[name] = shows.local, shows.shown, shows.back, shows.drawn, shows.rounds, calls
    stock = asked_trainer(folder, [])
    return out, error_of(slowmo_hf.last_round, stock), error_of(slowmo_hf.consensus(stock).__enter__)


def test_consensus_and_last_round_take_a_trainer_or_its_callback(tmp_path):
    ranks = run_workers(check_public, 2, str(tmp_path))
    for name in ("trainer", "callback"):
        locals_ = [out[name][0] for out, _, _ in ranks]
        assert not equal(*locals_)
        for out, _, _ in ranks:
            local, shown, back, drawn, rounds, calls = out[name]
            assert_mean(shown, locals_)
            assert equal(shown, ranks[0][0][name][1])
            assert equal(local, back)
            assert drawn == [True] * (TAU + 2)
            assert rounds == [None] * (TAU - 1) + [1] * 3
            assert (calls[0], calls[1], calls[2], calls[3].round) == (True, None, True, 1), "before and after training"
    for _, *errors in ranks:
        for error in errors:
            assert error.startswith("TypeError: expected a SlowMoOptimizer, prepared or bare, got Trainer")
            assert "a Trainer that has a SlowMoCallback" in error


class OneRankSaves(TrainerCallback):
    def __init__(self, folder, step):
        self.folder, self.step, self.trainer = folder, step, None

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step and dist.get_rank() == 0:
            self.trainer.save_model(f"{self.folder}/export")


def check_one_rank(folder):
    out = {}
    for name, settings in {"round": {}, "log": {"logging_strategy": "steps", "logging_steps": 3}}.items():
        saves = OneRankSaves(folder, 3)
        saves.trainer = asked_trainer(folder, [saves, SlowMoCallback(CONFIG)], **settings)
        start = time.perf_counter()
        out[name] = error_of(saves.trainer.train), time.perf_counter() - start
    return out


def test_one_rank_alone_is_told(tmp_path):
    for out in run_workers(check_one_rank, 2, str(tmp_path)):
        for name, place in {
            "round": "at step 4, the round",
            "log": "at step 3, a log, an evaluation or a save",
        }.items():
            error, seconds = out[name]
            assert error.startswith("RuntimeError: ranks met at different places: rank 0 on "), error
            assert "at step 3, a view of the average" in error
            assert place in error
            assert "(accelerator.save_state, slowmo_hf.consensus; evaluate, predict and save_model of a Tr" in error
            assert "is called by all ranks at the same step, not inside `if is_main_process`" in error
            assert seconds < 10 * patience(1)
    assert not (tmp_path / "export").exists()


# ---- logs ----


class Counts(Trainer):
    """Keeps a metric of its own until the next entry, as TRL's trainers do."""

    counted = 0

    def training_step(self, *args, **kwargs):
        self.counted += 1
        return super().training_step(*args, **kwargs)

    def log(self, logs, start_time=None):
        logs["counted"], self.counted = self.counted, 0
        super().log(logs, start_time)


def check_logs(folder):
    out = []
    for callbacks in ([SlowMoCallback(SlowMoConfig(sync_every=2))], []):
        model = Regression(torch.float32)
        args = arguments(folder, max_steps=14, logging_strategy="steps", logging_steps=6)
        trainer = Counts(model=model, args=args, train_dataset=Rows(128, torch.float32), callbacks=callbacks)
        out += [trainer.train().metrics, trainer.state.log_history]
    return out


def test_rounds_are_told_in_the_entry_of_the_loss(tmp_path):
    """A subclass's own metrics stay there; what is left is told at the run's end, and `train` does not return it."""
    for metrics, history, stock_metrics, stock_history in run_workers(check_logs, 2, str(tmp_path)):
        told = [(e["step"], "loss" in e, "train_runtime" in e, e["slowmo/round"], e["counted"]) for e in history]
        assert told == [(6, True, False, 3, 6), (12, True, False, 6, 6), (14, False, True, 7, 2)]
        assert metrics.keys() == stock_metrics.keys()
        for ours, stock in zip(history, stock_history, strict=True):
            assert {name for name in ours if not name.startswith("slowmo/")} == set(stock)
