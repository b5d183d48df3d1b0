"""
A Trainer that trains, asked by the user's own callbacks or by its own subclass: who is refused, what they see of the
average, that training goes on as if nobody had asked, and what their logs hold.
"""

from __future__ import annotations

from transformers import Trainer, TrainerCallback

from harness import patience, run_workers
from slowmo_hf import SlowMoCallback, SlowMoConfig
from tiny import Regression, Rows, arguments, equal, values

TAU = 4
CONFIG = SlowMoConfig(sync_every=TAU, outer_momentum=0.5, timeout_seconds=patience(30))


def error_of(call, *args, **kwargs):
    """`Type: message` of what the call raises, or ""."""
    try:
        call(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


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
