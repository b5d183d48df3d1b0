"""
A signal makes all ranks save at the next round and leave with the code that asks for a requeue; the run then goes on
bit for bit.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import threading

import pytest
import torch
import torch.distributed as dist
from transformers import Trainer, TrainerCallback

import slowmo_hf
from harness import patience, run_workers
from slowmo_hf import REQUEUE_EXIT_CODE, SlowMoCallback, SlowMoConfig, SlowMoOptimizer
from tiny import Heard, Regression, Rows, arguments, values

STEPS = 14


class SignalAt(TrainerCallback):
    """Sends a signal to one rank's own process at one step."""

    def __init__(self, rank, step, number):
        self.rank, self.step, self.number = rank, step, number

    def on_step_begin(self, args, state, control, **kwargs):
        if dist.get_rank() == self.rank and state.global_step == self.step:
            os.kill(os.getpid(), self.number)


class CallsOff(TrainerCallback):
    """No save, at a step's end or a pass's."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = False

    on_epoch_end = on_step_end


def _train(folder, base, callbacks, resume=None, after=(), more=(), **settings):
    defaults = {"max_steps": STEPS, "learning_rate": 0.05, "save_strategy": "steps", "save_steps": 100, "seed": 3}
    args = arguments(folder, **{**defaults, **dict(more)})
    trainer = Trainer(
        model=Regression(torch.float32),
        args=args,
        train_dataset=Rows(60, torch.float32),
        eval_dataset=Rows(8, torch.float32),
        callbacks=[
            *callbacks,
            SlowMoCallback(
                SlowMoConfig(base=base, sync_every=4, outer_momentum=0.5, timeout_seconds=patience(20), **settings)
            ),
            *after,
        ],
    )
    trainer.train(resume_from_checkpoint=resume)
    return values(trainer.accelerator.unwrap_model(trainer.model)), trainer.state.global_step


def _signalled(folder, base, number, settings, step):
    """(exit code, whether the end after a resume is that without a signal) on this rank; saved is at `step` alone."""
    whole, _ = _train(folder / "whole", base, [], **settings)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stopped, Heard() as heard:
        _train(folder / "cut", base, [SignalAt(1, 5, number)], **settings)
    assert signal.getsignal(number) is before
    assert len(heard.about(signal.Signals(number).name)) == (dist.get_rank() == 1)
    assert len(heard.about("asks for a requeue")) == (dist.get_rank() == 0)
    assert sorted(path.name for path in (folder / "cut").iterdir()) == [f"checkpoint-{step}"]
    slowmo_hf.verify_checkpoint(folder / "cut" / f"checkpoint-{step}")
    resumed, steps = _train(folder / "cut", base, [], resume=True, **settings)
    assert steps == STEPS
    return stopped.value.code, [torch.equal(whole[name], resumed[name]) for name in whole]


@pytest.mark.parametrize(
    ("base", "number", "settings", "step"),
    [
        ("local_sgd", signal.SIGTERM, {}, 8),
        ("osgp", signal.SIGUSR1, {}, 8),
        ("all_reduce", signal.SIGTERM, {}, 8),
        ("sgp", signal.SIGTERM, {"exact_average": False}, 8),
        # The round of 8 goes ahead, and is heard of where it is taken in.
        (
            "local_sgd",
            signal.SIGTERM,
            {"overlap_steps": 2},
            10,
        ),
    ],
)
def test_a_signal_to_one_rank_saves_and_stops_all_at_the_round(tmp_path, base, number, settings, step):
    for code, same in run_workers(_signalled, 2, tmp_path, base, number, settings, step):
        assert code == REQUEUE_EXIT_CODE == 75
        assert all(same)


class Worse(Trainer):
    """The longer it trains, the worse is its metric: the first evaluation is the best."""

    def evaluation_loop(self, *args, **kwargs):
        found = super().evaluation_loop(*args, **kwargs)
        found.metrics["eval_worse"] = float(self.state.global_step)
        return found


def _train_for_the_best(folder, callbacks, resume=None):
    args = arguments(
        folder,
        max_steps=STEPS,
        learning_rate=0.05,
        save_strategy="best",
        eval_strategy="steps",
        eval_steps=4,
        metric_for_best_model="worse",
        greater_is_better=False,
    )
    rows, ours = Rows(60, torch.float32), SlowMoCallback(SlowMoConfig(sync_every=4, timeout_seconds=patience(20)))
    trainer = Worse(
        Regression(torch.float32), args, train_dataset=rows, eval_dataset=rows, callbacks=[*callbacks, ours]
    )
    trainer.train(resume_from_checkpoint=resume)
    return values(trainer.accelerator.unwrap_model(trainer.model))


def _stopped_at_no_best(folder):
    whole = _train_for_the_best(folder / "whole", [])
    with pytest.raises(SystemExit) as stopped:
        _train_for_the_best(folder / "cut", [SignalAt(1, 5, signal.SIGTERM)])
    left = sorted(path.name for path in (folder / "cut").iterdir())
    slowmo_hf.verify_checkpoint(folder / "cut" / "checkpoint-8")
    resumed = _train_for_the_best(folder / "cut", [], resume=True)
    return stopped.value.code, left, [torch.equal(whole[name], resumed[name]) for name in whole]


def test_a_signal_saves_where_an_evaluation_finds_no_better_model(tmp_path):
    """At 8, the round, there is an evaluation too, after which Trainer wants no save."""
    for code, left, same in run_workers(_stopped_at_no_best, 2, tmp_path):
        assert code == REQUEUE_EXIT_CODE
        assert left == ["checkpoint-4", "checkpoint-8"]
        assert all(same)


def _with_the_best_alone(folder):
    """The best model is of step 4, and `save_total_limit=1` would leave it alone at the end."""
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "save_total_limit": 1}
    looks = {"save_steps": 4, "eval_strategy": "steps", "eval_steps": 4}
    with pytest.raises(SystemExit):
        _train(folder, "local_sgd", [GetsWorse(), SignalAt(0, 9, signal.SIGTERM)], more={**looks, **best})
    slowmo_hf.verify_checkpoint(folder / "checkpoint-12")
    dist.barrier()
    return sorted(path.name for path in folder.iterdir())


class GetsWorse(TrainerCallback):
    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        metrics["eval_loss"] = float(state.global_step)


def test_a_signals_save_stays_beside_the_best(tmp_path):
    for left in run_workers(_with_the_best_alone, 2, tmp_path):
        assert left == ["checkpoint-12", "checkpoint-4"]


def _called_off(folder):
    with pytest.raises(SystemExit) as stopped, Heard() as heard:
        _train(folder, "local_sgd", [SignalAt(0, 5, signal.SIGTERM)], after=[CallsOff()])
    slowmo_hf.verify_checkpoint(folder / "checkpoint-8")
    return stopped.value.code, heard.about("after a signal")


def test_a_signals_save_is_not_called_off(tmp_path):
    """By a callback behind ours that calls off every save."""
    (code, said), (other_code, _) = run_workers(_called_off, 2, tmp_path)
    assert code == other_code == REQUEUE_EXIT_CODE
    assert said == ["saved at step 8 after a signal: exit code 75 asks for a requeue"]


def _too_late(folder):
    """A signal after the last round: training ends by itself, and nothing asks for a requeue."""
    _, steps = _train(folder, "local_sgd", [SignalAt(0, 13, signal.SIGTERM)])
    return steps


def test_a_run_that_ends_by_itself_is_not_requeued(tmp_path):
    assert run_workers(_too_late, 2, tmp_path) == [STEPS, STEPS]


def _custom_loop(number):
    """The step at which each rank saw the wish; the loop goes on to a round's end after the signal, and no further."""
    model, rows = Regression(torch.float32), Rows(4, torch.float32)
    optimizer = SlowMoOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), SlowMoConfig(sync_every=4, timeout_seconds=patience(20))
    )
    early = number < 0
    assert not slowmo_hf.stop_requested(optimizer)
    if early and dist.get_rank() == 0:
        os.kill(os.getpid(), -number)
    for step in range(1, STEPS + 1):
        model(rows.x, rows.y)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        if slowmo_hf.stop_requested(optimizer):
            return step
        if dist.get_rank() == 0 and step == 6 and not early:
            os.kill(os.getpid(), number)
    return None


@pytest.mark.parametrize(("number", "step"), [(signal.SIGTERM, 8), (signal.SIGUSR1, 8), (-signal.SIGTERM, 4)])
def test_a_custom_loop_hears_it_at_the_same_step_on_all_ranks(number, step):
    """A negative number is sent before the first step: the first round tells."""
    assert run_workers(_custom_loop, 2, number) == [step, step]


class Ear:
    def __init__(self, heard):
        self.heard = heard

    def hear(self, name):
        self.heard.append(name)


def _how_a_fork_dies():
    """The signal that ends a forked child which was sent SIGTERM."""
    child = os.fork()
    if child == 0:
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def _handlers():
    """
    A handler of the user's own stays; all that listen are told, once; repeated later it does what it did; a thread
    hears none; a handler that somebody puts in our place stays.
    """
    heard = []
    own = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    gone, first, ear = Ear(["gone"]), Ear(heard), Ear(heard)
    left = slowmo_hf.adapters.stop_signals.StopSignals(gone.hear)
    earlier = slowmo_hf.adapters.stop_signals.StopSignals(first.hear)
    signals = slowmo_hf.adapters.stop_signals.StopSignals(ear.hear)
    del gone
    assert _how_a_fork_dies() == signal.SIGTERM, "a pool ends its workers so"
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    assert heard == [signal.SIGUSR1, "SIGTERM", "SIGTERM"], "two listen, and each is told once"
    slowmo_hf.adapters.stop_signals.PASSED_ON_SECONDS = -1.0
    assert _how_a_fork_dies() == signal.SIGTERM
    signals.release()
    assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL, "one still listens"
    earlier.release()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    left.release()
    newer = slowmo_hf.adapters.stop_signals.StopSignals(ear.hear)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    newer.release()
    assert signal.signal(signal.SIGTERM, signal.SIG_DFL) == signal.SIG_IGN, "the user's own, put there meanwhile"
    signal.signal(signal.SIGUSR1, own)
    thread = threading.Thread(target=lambda: slowmo_hf.adapters.stop_signals.StopSignals(ear.hear))
    thread.start()
    thread.join()
    return signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_whose_handlers_are_replaced():
    assert run_workers(_handlers, 1) == [True]


def test_plain_all_reduce_cannot_agree_to_stop():
    config = SlowMoConfig(base="all_reduce", outer_momentum=0)
    optimizer = SlowMoOptimizer(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1), config)
    with pytest.raises(ValueError, match="has no rounds at which ranks could agree to stop"):
        slowmo_hf.stop_requested(optimizer)


def asks_for_a_stack_dump(folder):
    """`faulthandler.register` is a handler in C, which Python shows as the default one."""
    with open(f"{folder}/{dist.get_rank()}", "w") as dumps:
        faulthandler.register(signal.SIGUSR1, file=dumps)
        model = Regression()
        optimizer = SlowMoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), SlowMoConfig(sync_every=2))
        asked = []
        for _ in range(3):
            model(**Rows(4)[:4])["loss"].backward()
            os.kill(os.getpid(), signal.SIGUSR1)
            optimizer.step()
            asked.append(slowmo_hf.stop_requested(optimizer))
        slowmo_hf.finish(optimizer)
        del optimizer
        os.kill(os.getpid(), signal.SIGUSR1)  # and behind the run, where it would kill
    return asked


def test_a_handler_in_c_stays(tmp_path):
    assert run_workers(asks_for_a_stack_dump, 2, str(tmp_path)) == [[False] * 3] * 2
    assert [(tmp_path / str(rank)).read_text().count("Current thread") for rank in (0, 1)] == [4, 4]
