"""
Weights that are written where a round has just made workers equal: by the program, which makes them differ, and by an
evaluation's own passes, which leave no trace. Of two workers under Trainer.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback

from harness import patience, run_workers
from slowmo_hf import SlowMoCallback, SlowMoConfig
from slowmo_hf.training.status import Purpose, StatusExchange
from tiny import Recorder, Regression, Rows, arguments, equal, mean, values

TAU, STEPS = 3, 6  # the last step ends a round
KINDS = {"local sgd": {}, "sharded": {"shard_slow_state": True}, "SGP": {"base": "sgp"}}
EVALUATES = {"eval_strategy": "steps", "eval_steps": 1}


def trained(folder, *callbacks, kind=Trainer, model=None, resume=None, slowmo=None, first=True, **settings):
    """A Trainer that has trained, with ours as the last callback or the first one."""
    config = SlowMoConfig(sync_every=TAU, outer_momentum=0.5, timeout_seconds=patience(20), **slowmo or {})
    ours = SlowMoCallback(config)
    trainer = kind(
        model or Regression(torch.float32),
        arguments(folder, **{"max_steps": STEPS, "learning_rate": 0.1, **settings}),
        train_dataset=Rows(64, torch.float32),
        eval_dataset=Rows(8, torch.float32),
    )
    for callback in (*callbacks, ours) if first else (ours, *callbacks):
        callback.trainer = trainer
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


# ---- nobody writes ----


class SavesAlone(TrainerCallback):
    """Rank 0 alone, where a round has just made all equal."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == TAU:
            self.seen = values(model)
            if dist.get_rank() == 0:
                self.trainer.save_model(f"{args.output_dir}/alone")


def saves_alone(folder):
    callback = SavesAlone()
    trained(folder, callback)
    saved = load_file(folder / "alone/model.safetensors")
    return [torch.equal(saved[name], callback.seen[name]) for name in saved]


def test_one_rank_may_look_behind_a_round_where_nobody_has_written(tmp_path):
    for same in run_workers(saves_alone, 2, tmp_path):
        assert same
        assert all(same)


# ---- the program's writes ----


class Swaps(TrainerCallback):
    """An average of its weights over time is in the model while it is evaluated."""

    def __init__(self, event="on_step_end"):
        self.average, self.shown, self.swapped_in = {}, {}, {}
        setattr(self, event, self.swap)

    def swap(self, args, state, control, model=None, **kwargs):
        now = values(model)
        self.average = {name: (now[name] + self.average.get(name, now[name])) / 2 for name in now}
        if control.should_evaluate:
            self.own, self.swapped_in[state.global_step] = now, self.average
            model.load_state_dict(self.average)

    def on_evaluate(self, args, state, control, model=None, metrics=None, **kwargs):
        self.shown[state.global_step] = values(model)
        model.load_state_dict(self.own)


def swapped_in(folder):
    """Both orders of callbacks, and a twin that swaps nothing; what ranks met for, behind the round of step 3."""
    met, start = [], StatusExchange.start

    def counted(self, purpose, *args, **kwargs):
        met.append((self._clock.attempted_steps, purpose))
        return start(self, purpose, *args, **kwargs)

    StatusExchange.start = counted
    out = {}
    for name, callbacks in {"before": [Swaps()], "behind": [Swaps()], "twin": []}.items():
        recorder, _ = Recorder(), met.clear()
        trained(folder, recorder, *callbacks, first=name != "behind", **EVALUATES)
        seen = (callbacks[0].shown, callbacks[0].swapped_in) if callbacks else None
        out[name] = seen, recorder.after, [purpose for step, purpose in met if step == TAU]
    return out


def test_an_average_over_time_is_averaged_over_workers_behind_a_round_too(tmp_path):
    """As at other steps. Training goes on as if it had not been; nothing more is sent where nobody writes."""
    ranks = run_workers(swapped_in, 2, str(tmp_path))
    for name in ("before", "behind"):
        (shown, mine), (other_shown, others) = (rank[name][0] for rank in ranks)
        assert list(shown) == list(range(1, STEPS + 1))
        for step in shown:
            assert equal(shown[step], other_shown[step]), (name, step)
            assert not equal(mine[step], others[step])
            for key, value in shown[step].items():
                torch.testing.assert_close(value, mean([mine[step], others[step]], key).float())
        for rank in ranks:
            assert all(equal(*both) for both in zip(rank[name][1], rank["twin"][1], strict=True))
            assert rank[name][2] == [Purpose.ROUND, Purpose.GATHER, Purpose.LOOK]
            assert rank["twin"][2] == [Purpose.ROUND, Purpose.GATHER]


def swapped_in_at_a_passes_end(folder):
    swaps = Swaps("on_epoch_end")
    slowmo = {"sync_every": 4}
    config = SlowMoConfig(**slowmo, outer_momentum=0.0, timeout_seconds=patience(20))
    trainer = Trainer(
        Regression(torch.float32),
        arguments(folder, max_steps=20, learning_rate=0.1, eval_strategy="epoch"),
        train_dataset=Rows(64, torch.float32),
        eval_dataset=Rows(8, torch.float32),
        callbacks=[Parts(), swaps, SlowMoCallback(config)],
    )
    trainer.train()
    return swaps.shown, swaps.swapped_in


class Parts(TrainerCallback):
    """At each pass's end every rank makes a layer its own."""

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            model.head.weight.add_(0.5 + dist.get_rank())


def test_a_write_at_a_passes_end_is_averaged(tmp_path):
    """Passes of 8 steps, two rounds each."""
    (shown, mine), (other_shown, others) = run_workers(swapped_in_at_a_passes_end, 2, str(tmp_path))
    for step in (8, 16):
        assert equal(shown[step], other_shown[step]), step
        for key, value in shown[step].items():
            torch.testing.assert_close(value, mean([mine[step], others[step]], key).float())


class Writes(TrainerCallback):
    """Each rank writes a value of its own behind the round of one step, by way of `.data`."""

    def __init__(self, step, then=None, least=1):
        self.step, self.then, self.least, self.wrote, self.seen = step, then, least, {}, {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            model.head.weight.data = model.head.weight.data + self.least + dist.get_rank()
            self.wrote = values(model)
            if self.then:
                self.then(self.trainer)
                assert equal(values(model), self.wrote)

    def on_prediction_step(self, args, state, control, model=None, **kwargs):
        self.seen = values(model)


def written_at_the_end(folder):
    out = {}
    for name, slowmo in KINDS.items():
        for logs in ("no", "steps"):
            writes = Writes(STEPS)
            trainer = trained(folder, writes, slowmo=slowmo, logging_strategy=logs, logging_steps=STEPS)
            out[name, logs] = values(trainer.model), writes.wrote
    return out


def test_the_end_is_the_average_also_behind_a_write(tmp_path):
    """No evaluation or save; with a log before the end and without."""
    ranks = run_workers(written_at_the_end, 2, str(tmp_path))
    for run in ranks[0]:
        (final, wrote), (others, their) = (rank[run] for rank in ranks)
        assert equal(final, others), run
        assert torch.equal(wrote["head.weight"] + 1, their["head.weight"])
        for key, value in final.items():
            torch.testing.assert_close(value, mean([wrote, their], key).float())


def asked_for(folder):
    writes = Writes(TAU, lambda trainer: trainer.evaluate())
    trained(folder, writes)
    one = Writes(TAU, lambda trainer: trainer.evaluate(), least=0)  # rank 0 writes what was there
    trained(folder, one)
    saves = Writes(TAU, lambda trainer: trainer.save_model(f"{folder}/asked"))
    trained(folder, saves)
    return writes.seen, writes.wrote, one.seen


def test_what_a_callback_asks_for_behind_a_write_sees_the_average(tmp_path):
    (seen, wrote, less), (others, their, others_less) = run_workers(asked_for, 2, str(tmp_path))
    assert equal(seen, others)
    saved = load_file(tmp_path / "asked" / "model.safetensors")
    for key, value in seen.items():
        torch.testing.assert_close(value, mean([wrote, their], key).float())
        assert torch.equal(saved[key], value), key
        assert torch.equal(less[key], others_less[key]), key
        torch.testing.assert_close(less[key] + (key == "head.weight"), value)


def saved_behind_a_write(folder):
    whole, writes = Recorder(), Writes(TAU)
    trained(folder, whole, writes, save_strategy="steps", save_steps=TAU)
    resumed = Recorder()
    trained(folder, resumed, resume=f"{folder}/checkpoint-{TAU}")
    return writes.wrote, whole.stepped[TAU:], resumed.stepped


def test_a_save_behind_a_write_holds_the_average_and_every_ranks_own(tmp_path):
    ranks = run_workers(saved_behind_a_write, 2, str(tmp_path))
    saved = load_file(tmp_path / f"checkpoint-{TAU}" / "model.safetensors")
    for key, value in saved.items():
        torch.testing.assert_close(value, mean([rank[0] for rank in ranks], key).float())
    for _, whole, resumed in ranks:
        assert [equal(*both) for both in zip(whole, resumed, strict=True)] == [True] * (STEPS - TAU)


# ---- passes' own writes ----


class Bounds(Regression):
    """Every pass bounds the norms of a layer's weights, and makes another's smaller: a second pass moves it again."""

    def __init__(self):
        super().__init__(torch.float32)

    def forward(self, x, labels):
        self.body.weight.data = torch.renorm(self.body.weight.data, p=2, dim=0, maxnorm=0.5)
        with torch.no_grad():
            self.head.weight.mul_(0.9)
        return super().forward(x, labels)


class Evaluates(TrainerCallback):
    """Predicts, and evaluates twice, at steps where Trainer evaluates too."""

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.predict(Rows(8, torch.float32))
        self.trainer.evaluate({"one": Rows(8, torch.float32), "two": Rows(4, torch.float32)})


def bounded(folder):
    out = {}
    for name, slowmo in KINDS.items():
        runs = []
        for callbacks, settings in (((), {}), ((), EVALUATES), ((Evaluates(),), EVALUATES)):
            recorder = Recorder()
            trainer = trained(folder, recorder, *callbacks, model=Bounds(), slowmo=slowmo, max_steps=7, **settings)
            runs.append(([*recorder.stepped, values(trainer.model)], recorder.evaluated))
        out[name] = runs
    return out


@pytest.fixture(scope="module")
def bounded_runs(tmp_path_factory):
    return run_workers(bounded, 2, str(tmp_path_factory.mktemp("bounded")))


@pytest.mark.parametrize("kind", KINDS)
def test_evaluations_of_a_layer_that_bounds_itself_leave_no_trace(bounded_runs, kind):
    """Every step and the end are those of a run that never evaluates, bit for bit, on every rank."""
    for rank in bounded_runs:
        (alone, _), *others = rank[kind]
        for steps, evaluated in others:
            assert [equal(*both) for both in zip(steps, alone, strict=True)] == [True] * 8
            assert list(evaluated) == list(range(1, 8))
    mine, others = (rank[kind][0][0] for rank in bounded_runs)
    assert not equal(mine[1], others[1]), "workers train alone"
    assert equal(mine[-1], others[-1])


class EvaluatesInItsOwnWay(Trainer):
    """Twice the average is evaluated, and what was there comes back, as `way` says."""

    way: tuple[str, ...] = ()

    def evaluate(self, *args, **kwargs):
        kept = values(self.model)
        if "swaps" in self.way:
            self.model.load_state_dict({name: value * 2 for name, value in kept.items()})
        metrics = super().evaluate(*args, **kwargs)
        if "puts back" in self.way:
            self.model.load_state_dict(kept)
        return metrics


WAYS = [(), ("puts back",), ("swaps", "puts back"), ("swaps",)]


def swapped_around(folder):
    out = {}
    for way in (None, *WAYS):
        recorder = Recorder()
        settings = {} if way is None else {"eval_strategy": "steps", "eval_steps": 2}
        kind = type("Its", (EvaluatesInItsOwnWay,), {"way": way or ()})
        trained(folder, recorder, kind=kind, model=Bounds(), **settings)
        del recorder.trainer
        out[way] = recorder
    return out


def test_a_swap_around_an_evaluation_is_the_programs_own(tmp_path):
    """What it brings back leaves no trace, whatever passes have written; what it leaves there stays."""
    for rank in run_workers(swapped_around, 2, str(tmp_path)):
        alone, plain, swapped, left = rank[None], rank[()], rank["swaps", "puts back"], rank[("swaps",)]
        for way in WAYS[:3]:
            steps = zip(rank[way].stepped, alone.stepped, strict=True)
            assert [equal(*both) for both in steps] == [True] * STEPS, way
        for recorder in (swapped, left):  # on_evaluate comes before what puts back
            once, twice = (one.evaluated[2]["head.weight"] for one in (plain, recorder))
            torch.testing.assert_close(twice, 2 * once)
        assert equal(left.after[1], alone.after[1])
        assert not equal(left.stepped[2], alone.stepped[2]), "the next step goes on from what was left"


# ---- and a resume ----


class Looks(TrainerCallback):
    """Evaluates before the first step."""

    seen = None

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if self.seen is None:
            self.own = values(model)
            self.trainer.evaluate()

    def on_prediction_step(self, args, state, control, model=None, **kwargs):
        self.seen = values(model)


def looked(folder):
    trained(folder, Writes(TAU), save_strategy="steps", save_steps=TAU)
    looks = Looks()
    trained(folder, looks, first=False, resume=f"{folder}/checkpoint-{TAU}")
    return looks.seen, looks.own


def test_a_look_behind_a_resume_of_a_write_shows_the_average(tmp_path):
    """Saved behind the write, at a round's end where workers are unlike."""
    ranks = run_workers(looked, 2, str(tmp_path))
    saved = load_file(tmp_path / f"checkpoint-{TAU}" / "model.safetensors")
    assert not torch.equal(ranks[0][1]["head.weight"], ranks[1][1]["head.weight"])
    for seen, _ in ranks:
        for name, average in saved.items():
            torch.testing.assert_close(seen[name], average)
