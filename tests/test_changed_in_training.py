"""What a program changes in the middle of training, or between a load and the first pass: kept, or told in words."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from transformers import Trainer, TrainerCallback

import slowmo_hf
from harness import patience, run_workers
from slowmo_hf import SlowMoCallback, SlowMoConfig, SlowMoOptimizer
from tiny import Heard, Regression, Rows, arguments, equal, values

CONFIG = SlowMoConfig(sync_every=2, timeout_seconds=patience(60))


def of_all(value):
    """Every rank's, on every rank."""
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def trainer_of(folder, *callbacks, cls=Trainer, ours=True, **settings):
    return cls(
        model=Regression(),
        args=arguments(folder, **{"max_steps": 8, "learning_rate": 0.05, **settings}),
        train_dataset=Rows(128),
        eval_dataset=Rows(8, seed=1),
        callbacks=[*callbacks, *([SlowMoCallback(CONFIG)] if ours else [])],
    )


def words_of(trainer, error):
    with pytest.raises(error) as caught:
        trainer.train()
    return str(caught.value)


# ---- Trainer ----


class At(TrainerCallback):
    """Acts behind a step."""

    def __init__(self, step, act):
        self.step, self.act, self.trainer = step, act, None

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.act(self.trainer)


def remove(trainer):
    trainer.remove_callback(SlowMoCallback)


def pop(trainer):
    trainer.pop_callback(SlowMoCallback)


def add(trainer):
    trainer.add_callback(SlowMoCallback(CONFIG))


def replace_optimizer(trainer):
    trainer.optimizer = trainer.accelerator.prepare(torch.optim.SGD(trainer.model.parameters(), lr=0.1))


def check_another_loop(folder):
    told = {}
    for act in (remove, pop, add, replace_optimizer):
        at = At(3, act)
        trainer = at.trainer = trainer_of(folder, at, ours=act is not add)
        told[act.__name__] = words_of(trainer, RuntimeError)
        if act in (remove, pop):
            trainer.remove_callback(At)
            assert any(isinstance(one, SlowMoCallback) for one in trainer.callback_handler.callbacks)
            trainer.remove_callback(SlowMoCallback)  # when training has ended it may go
    return told


def test_a_callback_comes_and_goes_outside_of_training_alone(tmp_path):
    for told in run_workers(check_another_loop, 2, str(tmp_path)):
        for name in ("remove", "pop"):
            assert told[name].startswith("SlowMoCallback cannot be removed while its Trainer trains: ")
        assert told["add"].startswith("a SlowMoCallback came to a Trainer that trains already: ")
        assert told["replace_optimizer"].startswith("the Trainer's optimizer was replaced in training (by SGD): ")


class FailsOnce(Trainer):
    """In its first evaluation, of a metric."""

    failed = False

    def evaluation_loop(self, *args, **kwargs):
        output = super().evaluation_loop(*args, **kwargs)
        if not self.failed:
            self.failed = True
            raise KeyError("a metric")
        return output


class Watches(TrainerCallback):
    """Local weights behind the third step, and before the fourth."""

    def __init__(self):
        self.seen = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 3:
            self.seen["behind"] = values(model)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 3:
            self.seen["before"] = values(model)


def check_a_failed_evaluation(folder):
    """Off a round's end. The exception lives on, as in a notebook, and what it holds with it."""
    watches = Watches()
    trainer = trainer_of(folder, watches, cls=FailsOnce, eval_strategy="steps", eval_steps=3)
    try:
        trainer.train()
    except KeyError:
        own = values(trainer.model)
        assert equal(own, watches.seen.pop("behind")), "this worker's own, as a stock Trainer's"
        everybodys = of_all(own)
        assert not equal(everybodys[0], everybodys[1])
        trainer.train()
    assert equal(watches.seen["behind"], watches.seen["before"])
    assert not equal(watches.seen["behind"], own)


def test_an_evaluation_that_failed_leaves_no_trace_in_the_next_run(tmp_path):
    run_workers(check_a_failed_evaluation, 2, str(tmp_path))


class NewBody(TrainerCallback):
    """Written whenever training begins, a resumed one too; and what the first step begins with."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        torch.nn.init.constant_(model.body.weight, 5.0)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.begun = getattr(self, "begun", None) or copy.deepcopy(model.state_dict())


UNDONE = "since the checkpoint was loaded is undone"


def check_a_resumed_start(folder):
    watches, saves = Watches(), {"save_strategy": "steps", "save_steps": 3}
    trainer_of(folder, watches, max_steps=3, **saves).train()
    body = NewBody()
    with Heard() as heard:
        trainer_of(folder, body, max_steps=6, **saves).train(resume_from_checkpoint=True)
    own = watches.seen["behind"]
    assert equal(body.begun, own), "of this worker"
    everybodys = of_all(own)
    assert not equal(everybodys[0], everybodys[1])
    with Heard() as quiet:
        trainer_of(folder, max_steps=7, **saves).train(resume_from_checkpoint=True)
    return heard.about(UNDONE, "WARNING"), quiet.about(UNDONE, "WARNING")


def test_what_a_callback_writes_where_a_resumed_run_begins_is_undone_and_told(tmp_path):
    (told, quiet), (others, silent) = run_workers(check_a_resumed_start, 2, str(tmp_path))
    assert len(told) == 1
    assert "written into body.weight and 0 more since" in told[0]
    assert quiet == others == silent == []


class FailsBehindTheEnd(TrainerCallback):
    """As an upload may."""

    def on_train_end(self, args, state, control, **kwargs):
        raise OSError("no network")


def check_a_failure_behind_the_end(folder):
    trainer = trainer_of(folder, FailsBehindTheEnd(), max_steps=3)
    with pytest.raises(OSError, match="no network"):
        trainer.train()
    everybodys = of_all(values(trainer.model))
    assert equal(everybodys[0], everybodys[1])


def test_a_failure_behind_the_end_leaves_the_average(tmp_path):
    run_workers(check_a_failure_behind_the_end, 2, str(tmp_path))


class Wrapper:
    """A user's own, of the optimizer that trains."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def __getattr__(self, name):
        return getattr(self.optimizer, name)


class Wraps(TrainerCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.optimizer = Wrapper(self.trainer.optimizer)


def test_a_wrapper_of_the_same_optimizer_is_no_other(tmp_path):
    wraps = Wraps()
    trainer = wraps.trainer = trainer_of(str(tmp_path), wraps)
    trainer.train()
    assert isinstance(trainer.optimizer, Wrapper)
    assert trainer.state.global_step == 8


def test_a_callback_that_has_trained_is_not_added_in_training(tmp_path):
    trainer = trainer_of(str(tmp_path))
    trainer.train()
    used = trainer.pop_callback(SlowMoCallback)
    at = At(3, lambda trainer: trainer.add_callback(used))
    at.trainer = trainer
    trainer.add_callback(at)
    assert words_of(trainer, RuntimeError).startswith("a SlowMoCallback came to a Trainer that trains already: ")


# ---- custom loops ----


def steps(accelerator, model, optimizer, count):
    for _ in range(count):
        x = torch.full((4, 4), 1.0 + accelerator.process_index, dtype=torch.float64)
        accelerator.backward(model(x, torch.ones(4, 1, dtype=torch.float64))["loss"])
        optimizer.step()
        optimizer.zero_grad()


def note(seen, module):
    """What the first pass is made with."""
    seen.setdefault("weights", values(module))


def begun():
    accelerator = Accelerator(cpu=True)
    model = Regression()
    inner = torch.optim.Adam(model.parameters(), lr=0.05)
    return accelerator, *accelerator.prepare(model, SlowMoOptimizer(inner, CONFIG))


def check_a_load(folder):
    accelerator, model, optimizer = begun()
    steps(accelerator, model, optimizer, 3)  # inside a round
    accelerator.save_state(folder)
    own = values(accelerator.unwrap_model(model))
    accelerator, model, optimizer = begun()
    accelerator.load_state(folder)
    bare = accelerator.unwrap_model(model)
    torch.nn.init.zeros_(bare.head.weight)
    inner = optimizer.optimizer.inner_optimizer
    inner.state.clear()
    seen = {}
    bare.register_forward_hook(lambda module, *_: note(seen, module))
    with Heard() as heard:
        steps(accelerator, model, optimizer, 1)
    assert equal(seen["weights"], own), "of this worker"
    assert {int(entry["step"]) for entry in inner.state.values()} == {1}, "Adam began anew"
    assert optimizer.optimizer.outer_loop.attempted_steps == 4, "the clock goes on"
    accelerator, model, optimizer = begun()
    accelerator.load_state(folder)
    with Heard() as quiet:
        steps(accelerator, model, optimizer, 1)
    return heard.about(UNDONE, "WARNING"), quiet.about(UNDONE, "WARNING")


def test_what_a_program_writes_behind_a_load_is_undone_and_told(tmp_path):
    """An emptied optimizer state stays."""
    (told, quiet), (others, silent) = run_workers(check_a_load, 2, str(tmp_path))
    assert len(told) == 1
    assert "written into head.weight and 0 more since" in told[0]
    assert quiet == others == silent == []


def check_stages(folder):
    """The head alone, then all: as docs/compatibility.md says, with a save in the second stage."""
    accelerator, model = Accelerator(cpu=True), Regression()
    model.body.requires_grad_(False)
    model, first = accelerator.prepare(model, SlowMoOptimizer(torch.optim.Adam(model.parameters(), lr=0.05), CONFIG))
    steps(accelerator, model, first, 3)
    slowmo_hf.finish(first)
    bare = accelerator.unwrap_model(model)
    bare.requires_grad_(True)
    second = accelerator.prepare(SlowMoOptimizer(torch.optim.Adam(bare.parameters(), lr=0.05), CONFIG))
    steps(accelerator, bare, second, 3)
    own = values(bare)
    accelerator.save_state(folder)
    steps(accelerator, bare, second, 2)
    accelerator.load_state(folder)
    seen = {}
    bare.register_forward_hook(lambda module, *_: note(seen, module))
    steps(accelerator, bare, second, 1)
    assert equal(seen["weights"], own)


def test_a_second_stage_is_saved(tmp_path):
    run_workers(check_stages, 2, str(tmp_path))


def check_a_refused_round():
    weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    other = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = SlowMoOptimizer(torch.optim.SGD([weight, other], lr=1.0), CONFIG)

    def step():
        weight.grad = torch.full((2,), -1.0 - dist.get_rank(), dtype=torch.float64)
        optimizer.step()

    step()
    other.requires_grad_(False)
    with pytest.raises(ValueError, match="the parameter set changed after the start"):
        step()
    other.requires_grad_(True)
    slowmo_hf.finish(optimizer)
    return weight.tolist()


def test_what_a_refused_round_leaves_is_averaged_at_the_end():
    """Two steps of 1 and of 2: 2 and 4, whose mean is 3."""
    assert run_workers(check_a_refused_round, 2) == [[3.0, 3.0]] * 2


def test_a_parameter_in_another_group_is_told():
    """In the order of before: its rate would be another's."""
    params = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    inner = torch.optim.SGD([{"params": params[:2]}, {"params": params[2:]}], lr=0.1)
    optimizer = SlowMoOptimizer(inner, SlowMoConfig(sync_every=2))
    for param in params:
        param.grad = torch.ones(2)
    optimizer.step()
    first, second = inner.param_groups
    second["params"].insert(0, first["params"].pop())
    with pytest.raises(ValueError, match="frozen, unfrozen, resized, moved, cast, put into another group"):
        optimizer.step()


@pytest.mark.parametrize(("weights", "lines"), [("the save's", 0), ("others", 1)])
def test_other_weights_than_the_states_are_told(weights, lines):
    """They are not taken, and rank 0 says so; at a round's end the model's file and the state have the same."""

    def work(rank):
        model = Regression()
        optimizer = SlowMoOptimizer(torch.optim.SGD(model.parameters(), lr=0.05), SlowMoConfig(sync_every=2))
        for _ in range(2):
            model(torch.full((4, 4), rank + 1.0).double(), torch.ones(4, 1).double())["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
        saved, state = values(model), copy.deepcopy(optimizer.state_dict())
        again = Regression()
        resumed = SlowMoOptimizer(torch.optim.SGD(again.parameters(), lr=0.05), SlowMoConfig(sync_every=2))
        again.load_state_dict({name: value + lines for name, value in saved.items()})
        resumed.load_state_dict(state)
        again(torch.ones(4, 4).double(), torch.ones(4, 1).double())["loss"].backward()
        assert equal(values(again), saved)

    with Heard() as heard:
        slowmo_hf.run_in_process(work, 2)
    assert len(heard.about("the optimizer's state has other weights than the model", "WARNING")) == lines


# ---- weights over a view ----


class PutsIn(TrainerCallback):
    """Weights of its own, where training has ended."""

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.own = {name: value + 1 + dist.get_rank() for name, value in values(model).items()}
        model.load_state_dict(self.own)


MESSAGES_IN_FLIGHT = {"overlap": {"overlap_steps": 1}, "osgp": {"base": "osgp"}, "sgp": {"base": "sgp"}}


def check_an_end(folder, settings):
    puts_in = PutsIn()
    config = SlowMoConfig(sync_every=2, timeout_seconds=patience(60), **settings)
    trainer = Trainer(
        Regression(),
        arguments(folder, max_steps=8, learning_rate=0.05),
        train_dataset=Rows(128),
        callbacks=[puts_in, SlowMoCallback(config)],
    )
    trainer.train()
    return values(trainer.model), puts_in.own


@pytest.mark.parametrize("kind", MESSAGES_IN_FLIGHT)
def test_what_is_put_in_at_the_end_is_averaged_as_it_is(tmp_path, kind):
    """Messages on their way belong to what it replaces."""
    (end, own), (others_end, others) = run_workers(check_an_end, 2, str(tmp_path), MESSAGES_IN_FLIGHT[kind])
    assert equal(end, others_end)
    for name, value in end.items():
        torch.testing.assert_close(value, (own[name] + others[name]) / 2, rtol=0, atol=1e-12)


def nudge_and_back(model):
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.01)
        for param in model.parameters():
            param.sub_(0.01)


def copy_and_back(model):
    own = values(model)
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(2)
    model.load_state_dict(own)


def load_others(model):
    model.load_state_dict({name: value + 1 for name, value in values(model).items()})


@pytest.mark.parametrize(("does", "lines"), [(nudge_and_back, 1), (copy_and_back, 0), (load_others, 0)])
def test_weights_written_in_an_evaluation_and_kept_are_told(does, lines):
    """Once, by rank 0; in an evaluation by the last round's model, inside a round."""

    def work(rank):
        torch.manual_seed(rank)
        model = Regression()
        optimizer = SlowMoOptimizer(torch.optim.SGD(model.parameters(), lr=0.05), SlowMoConfig(sync_every=4))
        for step in range(7):
            model(torch.randn(4, 4).double(), torch.ones(4, 1).double())["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            if step in (4, 5):
                own = values(model)
                model.eval()
                does(model)
                model.train()
                assert equal(own, values(model)) == (does is copy_and_back)

    with Heard() as heard:
        slowmo_hf.run_in_process(work, 2)
    assert len(heard.about("has not put them back bit for bit", "WARNING")) == lines


# ---- settings ----


def check_settings_cannot_change(folder):
    ours, words, other = SlowMoCallback(sync_every=4), [], SlowMoConfig(sync_every=4, outer_momentum=0.2)
    ours.config = CONFIG  # not yet in training

    def change(trainer):
        for given in () if words else (other, {"sync_every": 4}):  # in the first training
            with pytest.raises(ValueError, match="config cannot change while training") as caught:
                ours.config = given
            words.append(str(caught.value))
        ours.config = SlowMoConfig(**ours.config.to_dict())  # the same settings

    trainer = trainer_of(folder, At(3, change), ours, ours=False)
    trainer.train()
    reports = [ours.last_round.round]
    ours.config = other
    trainer.train()
    inner = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    optimizer = SlowMoOptimizer(inner, CONFIG)
    optimizer.config = other
    return words, [*reports, ours.last_round.round], optimizer.config == other


def test_settings_cannot_change_in_training(tmp_path):
    """8 steps in rounds of 2, and then, in another training, of 4."""
    for words, reports, is_other in run_workers(check_settings_cannot_change, 2, tmp_path):
        assert "got sync_every=4 in place of 2: the rounds have what they began with, on all ranks" in words[0]
        assert "got {'sync_every': 4}:" in words[1]
        assert reports == [4, 2]
        assert is_other
