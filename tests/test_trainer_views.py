"""
Callbacks of the user's own around a Trainer's views, before SlowMoCallback and behind it: they read local weights,
what they write stays, as in a stock run, and a save that they make goes on.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from transformers import Trainer, TrainerCallback

import slowmo_hf
from harness import run_workers
from slowmo_hf import SlowMoCallback, SlowMoConfig, SlowMoOptimizer
from tiny import Regression, Rows, arguments, equal, values

TAU, STEPS = 3, 8  # which is a pass; it ends inside a round
CONFIG = SlowMoConfig(sync_every=TAU, outer_momentum=0.5)
LOOKS = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
PLACES = ("before", "behind")


def trained(folder, callback, place, resume=None, kind=Trainer, **settings):
    """A worker of two, whose Trainer has ended; with "optimizer" it is ours, and there is no SlowMoCallback."""
    model, ours = Regression(torch.float32), SlowMoCallback(CONFIG)
    inner = torch.optim.AdamW(model.parameters(), lr=0.1)
    around = {"before": [callback, ours], "behind": [ours, callback], "optimizer": [callback]}
    callback.trainer = kind(
        model,
        arguments(folder, **{"max_steps": STEPS, "learning_rate": 0.1, **settings}),
        train_dataset=Rows(8 * STEPS, torch.float32),
        eval_dataset=Rows(8, torch.float32),
        callbacks=around[place],
        optimizers=(SlowMoOptimizer(inner, CONFIG), None) if place == "optimizer" else (None, None),
    )
    callback.trainer.train(resume_from_checkpoint=resume)
    return values(callback.trainer.model)


# ---- what they read ----


class Reads(TrainerCallback):
    """What the model holds at the events around a view, by event and step."""

    def __init__(self):
        self.read = {}
        for event in ("on_step_begin", "on_step_end", "on_epoch_begin", "on_epoch_end", "on_evaluate"):
            setattr(self, event, self.reading(event))

    def reading(self, event):
        def read(args, state, control, model=None, **kwargs):
            self.read[event, state.global_step] = values(model)

        return read


def check_reads(folder):
    read = {}
    for place in PLACES:
        for strategy in ("steps", "epoch"):
            reads = Reads()
            settings = {"eval_strategy": strategy, "eval_steps": 2, "save_strategy": strategy, "save_steps": 2}
            trained(f"{folder}/{place}_{strategy}", reads, place, max_steps=2 * STEPS, **settings)
            read[place, strategy] = reads.read
    return read


def test_callbacks_read_local_weights_wherever_they_stand(tmp_path):
    ranks = run_workers(check_reads, 2, str(tmp_path))
    for run in ranks[0]:
        mine, others = (rank[run] for rank in ranks)
        look = 2 if "steps" in run else STEPS
        assert equal(mine["on_evaluate", look], others["on_evaluate", look])
        assert not equal(mine["on_step_end", look], others["on_step_end", look])
        for rank in (mine, others):
            for step in range(1, 2 * STEPS):
                assert equal(rank["on_step_end", step], rank["on_step_begin", step]), (run, step)
            assert equal(rank["on_step_end", STEPS], rank["on_epoch_begin", STEPS]), run
            before = "on_evaluate" if "steps" in run else "on_step_end"  # one view of step and pass
            assert equal(rank[before, STEPS], rank["on_epoch_end", STEPS]), run


# ---- what they write ----

LOOKED_AT = 2  # inside a round, with an evaluation and a save


class Writes(TrainerCallback):
    """At one event of step 2 each worker writes values of its own into one layer, and reads before and after."""

    def __init__(self, event):
        self.local, self.wrote, self.then = {}, {}, {}
        setattr(self, event, self.write)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == LOOKED_AT:
            self.local = values(model)

    def write(self, args, state, control, model=None, **kwargs):
        if state.global_step == LOOKED_AT:
            with torch.no_grad():
                model.head.weight.mul_(0.5 + dist.get_rank())
            model.head.bias.data.fill_(dist.get_rank())  # moves no version counter
            self.wrote = values(model)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == LOOKED_AT:
            self.then = values(model)


class WritesBehindItsPrediction(Writes):
    """The same behind a prediction that it has asked for."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        super().on_step_end(args, state, control, model=model)
        if state.global_step == LOOKED_AT:
            self.trainer.predict(Rows(8, torch.float32))


WRITES = {"on_evaluate": Writes, "on_save": Writes, "on_predict": WritesBehindItsPrediction}


def check_writes(folder):
    out = {}
    for event, kind in WRITES.items():
        for place in PLACES:
            writes = kind(event)
            trained(f"{folder}/{event}_{place}", writes, place, **LOOKS)
            out[event, place] = writes.local, writes.wrote, writes.then
    writes = Writes("on_evaluate")
    trained(f"{folder}/optimizer", writes, "optimizer", **{**LOOKS, "save_strategy": "no"})
    return out | {("on_evaluate", "optimizer"): (writes.local, writes.wrote, writes.then)}


def test_what_a_callback_writes_stays(tmp_path):
    """The next step is made with that layer as it was written; the other one is the worker's own again."""
    ranks = run_workers(check_writes, 2, str(tmp_path))
    for run in ranks[0]:
        for number, (local, wrote, then) in enumerate(rank[run] for rank in ranks):
            assert torch.equal(wrote["head.bias"], torch.tensor([float(number)]))
            for name, value in then.items():
                own = wrote if name.startswith("head") else local
                assert torch.equal(value, own[name]), (run, name)
            assert not torch.equal(wrote["body.weight"], local["body.weight"]), "the average was shown"


class Cuts(TrainerCallback):
    """Behind each evaluation a layer is made smaller, on rank 1 more."""

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            model.head.weight.mul_(0.5 / (1 + dist.get_rank()))


def check_resume(folder):
    """Step 6 ends a round, and so does 9, the last: nothing is averaged for these evaluations."""
    looks = {**LOOKS, "max_steps": 3 * TAU, "eval_steps": 1, "save_steps": 1}
    whole = trained(f"{folder}/whole", Cuts(), "before", **looks)
    return whole, [
        trained(f"{folder}/{step}", Cuts(), "before", resume=f"{folder}/whole/checkpoint-{step}", **looks)
        for step in (4, 5, 6, 7)
    ]


def test_a_save_holds_what_was_written_behind_its_evaluation(tmp_path):
    """On every rank; and at the end all have one model."""
    ranks = run_workers(check_resume, 2, str(tmp_path))
    for whole, resumed in ranks:
        assert [equal(whole, one) for one in resumed] == [True] * 4
        assert equal(whole, ranks[0][0])


class LoadsAtTheEnd(TrainerCallback):
    """An average over time, each rank's own, is put in when training has ended."""

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.loaded = {name: value + 1 + 2 * dist.get_rank() for name, value in values(model).items()}
        model.load_state_dict(self.loaded)


def check_loads_at_the_end(folder):
    out = {}
    for place in PLACES:
        for steps in (STEPS, 3 * TAU):
            for evaluates in ("no", "steps", "epoch"):
                loads = LoadsAtTheEnd()
                settings = {"max_steps": steps, "eval_strategy": evaluates, "eval_steps": steps}
                final = trained(f"{folder}/{place}_{steps}_{evaluates}", loads, place, **settings)
                out[place, steps, evaluates] = final, loads.loaded
    return out


def test_what_is_loaded_when_training_has_ended_is_averaged(tmp_path):
    """Inside a round and at its end, with an evaluation before and without."""
    ranks = run_workers(check_loads_at_the_end, 2, str(tmp_path))
    for run in ranks[0]:
        (final, loaded), (others, their) = (rank[run] for rank in ranks)
        assert equal(final, others), run
        for name, value in final.items():
            torch.testing.assert_close(value, (loaded[name] + their[name]) / 2, msg=f"{run}, {name}")


class SwapsAnAverageIn(TrainerCallback):
    """An average of its weights over time is what is evaluated."""

    def __init__(self, swaps):
        self.swaps, self.average, self.own, self.losses = swaps, None, None, []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        now = values(model)
        self.average = {name: (now[name] + old) / 2 for name, old in (self.average or now).items()}
        if self.swaps and control.should_evaluate:
            self.own = now
            model.load_state_dict(self.average)

    def on_evaluate(self, args, state, control, model=None, metrics=None, **kwargs):
        self.losses.append(metrics["eval_loss"])
        if self.swaps:
            model.load_state_dict(self.own)


def check_swap(folder):
    out = {}
    for place in PLACES:
        for swaps in (True, False):
            callback = SwapsAnAverageIn(swaps)
            settings = {"eval_strategy": "steps", "eval_steps": 2}
            out[place, swaps] = trained(f"{folder}/{place}_{swaps}", callback, place, **settings), callback.losses
    return out


def test_an_average_over_time_that_is_swapped_in_leaves_no_trace(tmp_path):
    for rank in run_workers(check_swap, 2, str(tmp_path)):
        for place in PLACES:
            (swapped, losses), (alone, own_losses) = rank[place, True], rank[place, False]
            assert equal(swapped, alone), place
            assert all(one != other for one, other in zip(losses, own_losses, strict=True))


# ---- what they save ----


class Saves(TrainerCallback):
    """Calls what Trainer itself calls."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 4:
            self.trainer._save_checkpoint(self.trainer.model_wrapped, trial=None)


class SavesNothing(Trainer):
    def _save_checkpoint(self, model, trial):
        pass


class SavesItsOwn(Trainer):
    def _save_checkpoint(self, model, trial):
        self.save_model(f"{self.args.output_dir}/checkpoint-{self.state.global_step}")


def check_own_saves(folder):
    for kind in (SavesNothing, SavesItsOwn):
        trained(f"{folder}/{kind.__name__}", TrainerCallback(), "before", kind=kind, **LOOKS)


def test_a_trainer_that_saves_no_checkpoint_leaves_none(tmp_path):
    """Our part alone would pass for one."""
    run_workers(check_own_saves, 2, str(tmp_path))
    assert not list((tmp_path / "SavesNothing").glob("checkpoint-*"))
    found = sorted(path.name for path in (tmp_path / "SavesItsOwn" / "checkpoint-4").iterdir())
    assert "slowmo" not in found
    assert "model.safetensors" in found


def check_saves(folder):
    out = {}
    for place in PLACES:
        whole = trained(f"{folder}/{place}", Saves(), place)
        slowmo_hf.verify_checkpoint(f"{folder}/{place}/checkpoint-4")
        resumed = trained(f"{folder}/{place}", Saves(), place, resume=f"{folder}/{place}/checkpoint-4")
        out[place] = whole, resumed
    return out


def test_a_save_of_a_callbacks_own_goes_on(tmp_path):
    for rank in run_workers(check_saves, 2, str(tmp_path)):
        for whole, resumed in rank.values():
            assert equal(whole, resumed)


class CallsOff(TrainerCallback):
    """Behind ours: saves of steps 4 and 6 are called off."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = control.should_save and state.global_step not in (4, 6)


def test_a_save_that_is_called_off_costs_no_whole_checkpoint(tmp_path):
    trained(tmp_path, CallsOff(), "behind", save_strategy="steps", save_steps=2, save_total_limit=2)
    for step in (2, 8):
        slowmo_hf.verify_checkpoint(tmp_path / f"checkpoint-{step}")
