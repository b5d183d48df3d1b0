"""How a Trainer's run ends where not all goes by the book, and what it leaves behind for the next."""

from __future__ import annotations

import gc
import shutil
import signal
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from harness import IS_TRANSFORMERS_4, patience, run_workers
from slowmo_hf import SlowMoCallback, SlowMoConfig
from tiny import Regression, Rows, arguments, equal, values


def trainer_of(folder, callbacks=(), model=None, rows=32, config=None, **settings):
    """Four steps a pass with two ranks, and a round of each pass."""
    made = {"sync_every": 4, "timeout_seconds": patience(20), **(config or {})}
    return Trainer(
        model=model or Regression(torch.float32),
        args=arguments(folder, **{"learning_rate": 0.05, "num_train_epochs": 6, "seed": 3, **settings}),
        train_dataset=Rows(rows, torch.float32),
        eval_dataset=Rows(8, torch.float32),
        callbacks=[*callbacks, SlowMoCallback(SlowMoConfig(**made))],
    )


# ---- the best model, where an evaluation stops training ----


class Worse(TrainerCallback):
    """Each evaluation finds the model worse than the one before."""

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        metrics["eval_loss"] = float(state.global_step)


def stopped_by_an_evaluation(folder, base, strategy, steps):
    """The first evaluation stays the best, and the second one stops training."""
    trainer = trainer_of(
        folder,
        [Worse(), EarlyStoppingCallback(early_stopping_patience=1)],
        config={"base": base},
        eval_strategy=strategy,
        save_strategy=strategy,
        eval_steps=steps,
        save_steps=steps,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == f"checkpoint-{steps}"
    assert trainer.state.global_step == 2 * steps
    return values(trainer.model), load_file(best / "model.safetensors")


@pytest.mark.parametrize("base", ["local_sgd", "sgp", "osgp", "dpsgd"])
@pytest.mark.parametrize(("strategy", "steps"), [("epoch", 4), ("steps", 4), ("steps", 3)])
def test_the_best_model_stays_where_an_evaluation_stops_training(tmp_path, base, strategy, steps):
    """At a round's step and inside a round: what Trainer has loaded is what the model is, on all ranks."""
    for model, best in run_workers(stopped_by_an_evaluation, 2, str(tmp_path), base, strategy, steps):
        assert equal(model, best)


# ---- a step too many ----


class Lowers(TrainerCallback):
    """Takes `max_steps` back to a step that has been taken, as some stop training; records what Trainer does."""

    def __init__(self, at):
        self.at, self.done = at, []

    def on_step_end(self, args, state, control, **kwargs):
        self.done.append(("step", state.global_step))
        if state.global_step == self.at:
            state.max_steps = self.at

    def on_evaluate(self, args, state, control, **kwargs):
        self.done.append(("evaluation", state.global_step))

    def on_save(self, args, state, control, **kwargs):
        self.done.append(("save", state.global_step))


def done_by(folder, callbacks, at, resumed=None, **settings):
    """What a Trainer does with these callbacks, and its checkpoints; twelve steps are planned."""
    lowers = Lowers(at)
    steps = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 5, "save_steps": 5, "max_steps": 12}
    trainer = trainer_of(folder, [lowers], **{**steps, **settings})
    trainer.pop_callback(SlowMoCallback)
    for callback in callbacks:
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=resumed)
    return lowers.done, sorted(path.name for path in Path(folder).glob("checkpoint-*"))


def lowered(folder, at):
    config = SlowMoConfig(sync_every=4, timeout_seconds=patience(20))
    stock = done_by(f"{folder}/stock", [], at)
    return stock, done_by(f"{folder}/ours", [SlowMoCallback(config)], at)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("at", [1, 7])
def test_where_max_steps_is_lowered_training_ends_as_stock_trainers(tmp_path, at, processes):
    """One step behind it, with the end's evaluation and save; so too at the first step."""
    for stock, ours in run_workers(lowered, processes, str(tmp_path), at):
        assert ours == stock
        end = [("step", at + 1), ("evaluation", at + 1), ("save", at + 1)]
        if IS_TRANSFORMERS_4:  # it does not evaluate there
            end = [("step", at), end[0], end[2]]
        assert stock[0][-3:] == end
        assert stock[1] == sorted({f"checkpoint-{at + 1}", *(["checkpoint-5"] if at > 5 else [])})


def test_a_step_too_many_that_failed_takes_nothing_back_from_the_next_run(tmp_path):
    """A run resumed at its last step fails in the step too many; the same callback then trains anew, from step 0."""

    class Fails(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    # One process has eight steps in a pass: the sixth is inside it.
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 6}
    trainer_of(tmp_path, **settings).train()
    trainer = trainer_of(tmp_path, [Fails()], **settings)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 6
    trainer.remove_callback(Fails)
    trainer.args.max_steps = 9
    trainer.train()
    assert trainer.state.global_step == 9


# ---- checkpoints of another run ----


def test_checkpoints_of_another_run_are_left_alone(tmp_path):
    """
    `save_total_limit=1` with the best model of the run that this one was resumed from: that run's folder stays whole,
    and in this one's the last checkpoint goes, as with a stock Trainer.
    """
    kept = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 4, "eval_steps": 4}
    kept |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    left = {}
    for name, callbacks in (("stock", []), ("ours", [SlowMoCallback(sync_every=4)])):
        first, second = tmp_path / name / "first", tmp_path / name / "second"
        for folder, steps, limit, resumed in ((first, 12, 5, None), (second, 20, 1, str(first / "checkpoint-12"))):
            trainer = trainer_of(folder, [Worse()], max_steps=steps, save_total_limit=limit, **kept)
            trainer.callback_handler.callbacks = [
                one for one in trainer.callback_handler.callbacks if not isinstance(one, SlowMoCallback)
            ]
            for callback in callbacks:
                trainer.add_callback(callback)
            trainer.train(resume_from_checkpoint=resumed)
        left[name] = [sorted(path.name for path in folder.glob("checkpoint-*")) for folder in (first, second)]
        assert trainer.state.best_model_checkpoint == str(first / "checkpoint-4")
    assert left["stock"][0] == ["checkpoint-12", "checkpoint-4", "checkpoint-8"]
    assert left["ours"][0] == left["stock"][0]
    assert left["ours"][1] == left["stock"][1]


def test_where_the_best_is_gone_the_last_checkpoint_stays(tmp_path):
    """The folder of the run before was purged meanwhile: or nothing would be left."""

    class Purge(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            shutil.rmtree(tmp_path / "first")

    kept = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 4, "eval_steps": 4}
    kept |= {"metric_for_best_model": "eval_loss"}
    trainer_of(tmp_path / "first", [Worse()], max_steps=8, **kept).train()
    second = trainer_of(tmp_path / "second", [Worse(), Purge()], max_steps=16, save_total_limit=1, **kept)
    second.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-8"))
    assert not Path(second.state.best_model_checkpoint).exists()
    left = sorted(path.name for path in (tmp_path / "second").glob("checkpoint-*"))
    assert left == ["checkpoint-12", "checkpoint-16"], "with the best one that Trainer knows of, two are kept"


# ---- training that fails ----


class FailsAt(TrainerCallback):
    """Each rank at its own step."""

    def __init__(self, steps):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.steps[dist.get_rank()]:
            raise KeyboardInterrupt


def failed(folder):
    """Ranks 0 and 1 fail at steps 5 and 6; each saves what it has, and trains on without the callback."""
    before = signal.getsignal(signal.SIGTERM)
    trainer = trainer_of(folder, [FailsAt((5, 6))])
    tokens = trainer.args.average_tokens_across_devices
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    own = values(trainer.model)
    trainer.save_model(f"{folder}/{dist.get_rank()}")
    kept = equal(values(trainer.model), own)
    given_back = (signal.getsignal(signal.SIGTERM) is before, trainer.args.average_tokens_across_devices == tokens)
    trainer.remove_callback(SlowMoCallback)
    trainer.remove_callback(FailsAt)
    for parameter in trainer.model.parameters():
        dist.broadcast(parameter.data, 0)
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.args.max_steps = 3
    trainer.train()
    assert isinstance(trainer.model_wrapped, DistributedDataParallel)
    return own, kept, given_back, values(trainer.model)


def test_a_run_that_failed_leaves_the_trainer_as_it_was(tmp_path):
    """
    An emergency save needs nobody, wherever the other rank stands: rank 0 writes what it holds. Signals and arguments
    are the program's again; and training without the callback averages gradients, so that ranks stay equal.
    """
    ranks = run_workers(failed, 2, str(tmp_path))
    assert not equal(ranks[0][0], ranks[1][0]), "each its own weights"
    saved = load_file(tmp_path / "0" / "model.safetensors")
    assert equal({name: ranks[0][0][name] for name in saved}, saved)
    for _, kept, given_back, _ in ranks:
        assert (kept, given_back) == (True, (True, True))
    assert equal(ranks[0][3], ranks[1][3])


class FailsIn(TrainerCallback):
    """At a step, once: by an error, or out of memory."""

    def __init__(self, step, error):
        self.step, self.error = step, error

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step and self.error:
            error, self.error = self.error, None
            raise error


def what_is_given_back(trainer):
    """Arguments, replaced methods, and the handlers of signals."""
    names = ("save_total_limit", "hub_strategy", "save_on_each_node", "average_tokens_across_devices")
    methods = [
        name for owner in (trainer, trainer.callback_handler) for name, own in vars(owner).items() if callable(own)
    ]
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    return {name: getattr(trainer.args, name) for name in names}, sorted(methods), handlers


KEPT = {"max_steps": 12, "save_strategy": "steps", "save_steps": 3, "save_total_limit": 2}


@pytest.fixture(scope="module")
def six_steps(tmp_path_factory):
    """The checkpoint of the sixth step of twelve, in the middle of a pass; and how the twelve end."""
    folder = tmp_path_factory.mktemp("run")
    trainer = trainer_of(folder, **(KEPT | {"save_total_limit": 9}))
    trainer.train()
    return folder / "checkpoint-6", values(trainer.model)


def resumed_from(checkpoint, folder, callbacks=(), **settings):
    """A Trainer whose folder has a copy of this checkpoint."""
    shutil.copytree(checkpoint, Path(folder) / checkpoint.name)
    return trainer_of(folder, callbacks, **{**KEPT, **settings})


@pytest.mark.parametrize("restore", [False, True])
def test_a_resumed_run_that_failed_gives_the_trainer_back(six_steps, tmp_path, restore):
    """With `restore_callback_states_from_checkpoint` Trainer trains with a new callback, which nobody has given it."""
    checkpoint, end = six_steps
    fails = FailsIn(10, KeyboardInterrupt())
    settings = {"restore_callback_states_from_checkpoint": restore}
    trainer = resumed_from(checkpoint, tmp_path, [fails], **settings)
    before = what_is_given_back(trainer)
    assert before[0]["save_total_limit"] == 2
    with pytest.raises(KeyboardInterrupt):
        trainer.train(resume_from_checkpoint=True)
    assert what_is_given_back(trainer) == before
    trainer.train(resume_from_checkpoint=True)
    assert what_is_given_back(trainer) == before
    assert equal(values(trainer.model), end)


@pytest.mark.parametrize("restore", [False, True])
def test_a_resumed_run_ends_bit_for_bit_with_restored_callbacks_too(six_steps, tmp_path, restore):
    """Also where the first try is out of memory, and Trainer puts one more callback in its place."""
    checkpoint, end = six_steps
    settings = {"restore_callback_states_from_checkpoint": restore}
    trainer = resumed_from(checkpoint, tmp_path / "once", **settings)
    before = what_is_given_back(trainer)
    trainer.train(resume_from_checkpoint=True)
    assert equal(values(trainer.model), end)
    assert what_is_given_back(trainer) == before

    fails = FailsIn(8, RuntimeError("CUDA out of memory."))
    twice = resumed_from(checkpoint, tmp_path / "twice", [fails], auto_find_batch_size=True, **settings)
    twice.train(resume_from_checkpoint=True)
    assert fails.error is None
    assert what_is_given_back(twice) == before
    assert sorted(path.name for path in (tmp_path / "twice").iterdir()) == ["checkpoint-12", "checkpoint-9"]


class GivesItAway(TrainerCallback):
    """In a step it gives the outer Trainer's callback to another Trainer, and goes on where that is refused."""

    def __init__(self, folder):
        self.folder, self.ours, self.between = folder, None, []

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            other = trainer_of(self.folder, max_steps=1)
            other.pop_callback(SlowMoCallback)
            other.add_callback(self.ours)
            with pytest.raises(ValueError, match="two Trainers that train at once"):
                other.train()

    def on_step_end(self, args, state, control, model, **kwargs):
        self.between.append(values(model))


def trains_on_behind_a_refusal(folder):
    gives = GivesItAway(f"{folder}/other")
    trainer = trainer_of(folder, [gives], max_steps=6)
    gives.ours = next(one for one in trainer.callback_handler.callbacks if isinstance(one, SlowMoCallback))
    trainer.train()
    return gives.between[2], values(trainer.model)


def test_a_refusal_inside_leaves_the_outer_training_alone(tmp_path):
    """Its workers still train alone between rounds, and end equal."""
    (ours, end), (theirs, other_end) = run_workers(trains_on_behind_a_refusal, 2, str(tmp_path))
    assert not equal(ours, theirs)
    assert equal(end, other_end)


# ---- what a run leaves in memory ----


class Watch(TrainerCallback):
    """Whether the slow state of the run before is there still, when a run has begun."""

    def __init__(self):
        self.states, self.there = [], []

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            gc.collect()
            self.there.append([one() is not None for one in self.states])

    def on_train_end(self, args, state, control, **kwargs):
        callback = next(one for one in self.handler.callbacks if isinstance(one, SlowMoCallback))
        self.states.append(weakref.ref(callback.outer_loop))


def trained_again(folder):
    watch = Watch()
    trainer = trainer_of(folder, [watch], max_steps=6, eval_strategy="steps", eval_steps=3)
    watch.handler = trainer.callback_handler
    for _ in range(3):
        trainer.train()
    return watch.there


def test_the_slow_state_of_a_run_before_goes_also_behind_its_evaluations(tmp_path):
    """Trainer keeps the function that an evaluation gathered with."""
    assert run_workers(trained_again, 2, str(tmp_path)) == [[[], [False], [False, False]]] * 2


class Kept:
    """A method of the user's own, as a sweep has one."""

    def trains_in_a_method(self, folder, ours, resumes):
        steps = {"max_steps": 4, "eval_steps": 3, "save_steps": 2, "logging_steps": 2}
        trainer = trainer_of(folder, eval_strategy="steps", save_strategy="steps", **steps)
        if not ours:
            trainer.remove_callback(SlowMoCallback)
        trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-2" if resumes else None)
        left = [weakref.ref(trainer), weakref.ref(trainer.model)]
        if ours:
            callback = next(one for one in trainer.callback_handler.callbacks if isinstance(one, SlowMoCallback))
            left.append(weakref.ref(callback.outer_loop.parts.slow.anchors[0].flat))
            del callback
        del trainer
        return [one() is not None for one in left]


def what_a_method_keeps(folder):
    gc.disable()
    try:
        kept = Kept()
        given = ((False, False), (True, False), (True, True))
        return [kept.trains_in_a_method(f"{folder}/{ours}", ours, resumes) for ours, resumes in given]
    finally:
        gc.enable()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_trainer_goes_where_its_function_goes_on(tmp_path, ranks):
    """As a stock one's: before Python 3.13 a frame whose locals were read would hold them until it returns."""
    stock, *ours = run_workers(what_a_method_keeps, ranks, str(tmp_path))[0]
    assert ours == [[*stock, False]] * 2  # the last: the slow state
    assert stock == [False, False] or IS_TRANSFORMERS_4
