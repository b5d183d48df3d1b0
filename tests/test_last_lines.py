"""Below the traceback of a training that fails: the last whole checkpoint of the run, and what goes on from it."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from transformers import Trainer, TrainerCallback

import slowmo_hf
from apart import HOST
from harness import patience, run_workers
from launcher import RECIPE_ENVIRONMENT, ROOT
from slowmo_hf import SlowMoCallback, SlowMoConfig, SlowMoOptimizer
from slowmo_hf.checkpoints import last_lines
from slowmo_hf.checkpoints.last_lines import Saves
from tiny import Regression, Rows, arguments, values

NONE_YET = "no checkpoint to go on from has been saved yet."


def ends(call):
    """What a process prints that `call` ends: the interpreter's hook, as for an error that nobody catches."""
    said = io.StringIO()
    try:
        call()
    except BaseException:
        with contextlib.redirect_stderr(said):
            sys.excepthook(*sys.exc_info())
    return said.getvalue()


def below_the_traceback(said):
    """Our lines at the very end, without their beginning."""
    own = []
    for line in reversed(said.rstrip().splitlines()):
        found = re.fullmatch(rf"\[slowmo_hf\] rank (\d) on {re.escape(HOST)}: (.*)", line)
        if not found:
            break
        own.insert(0, (int(found[1]), found[2]))
    return own


class Fails(TrainerCallback):
    """At the beginning of a step, on one rank."""

    def __init__(self, step, rank=1, error=None):
        self.step, self.rank, self.error = step, rank, error or ValueError("bad batch")

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step and (dist.get_rank() if dist.is_initialized() else 0) == self.rank:
            raise self.error


def trainer_of(folder, *callbacks, **settings):
    config = SlowMoConfig(sync_every=2, timeout_seconds=patience(8))
    return Trainer(
        model=Regression(torch.float32),
        args=arguments(
            folder, **{"max_steps": 12, "learning_rate": 0.05, "save_strategy": "steps", "save_steps": 4, **settings}
        ),
        train_dataset=Rows(200, torch.float32),
        callbacks=[*callbacks, SlowMoCallback(config)],
    )


def go_on(folder):
    return f'the last whole checkpoint is {folder}. Go on with trainer.train(resume_from_checkpoint="{folder}")'


# ---- Trainer ----


def fail_under_trainer(folder, step, damage):
    def train():
        trainer = trainer_of(folder, Fails(step))
        if damage:
            trainer.add_callback(Damage(folder))
        trainer.train()

    return below_the_traceback(ends(train))


class Damage(TrainerCallback):
    """The second checkpoint loses its manifest: a save that was killed before it was whole."""

    def __init__(self, folder):
        self.folder = folder

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 9 and dist.get_rank() == 0:
            (self.folder / "checkpoint-8" / "slowmo" / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("step", "damage", "checkpoint"),
    [(9, False, "checkpoint-8"), (10, True, "checkpoint-4"), (3, False, None)],
    ids=["the newest", "the newest whole one", "none yet"],
)
def test_the_last_lines_under_trainer_name_the_last_whole_checkpoint(tmp_path, step, damage, checkpoint):
    """On rank 1, which fails, and on rank 0, the first of its machine, which misses it."""
    for rank, lines in enumerate(run_workers(fail_under_trainer, 2, tmp_path, step, damage)):
        assert {said_by for said_by, _ in lines} == {rank}
        assert lines[0][1] == (go_on(tmp_path / checkpoint) if checkpoint else NONE_YET)
        assert len(lines) == (2 if checkpoint else 1)
        if checkpoint:
            assert lines[1][1].startswith("in the script that the job's launch command starts again. ")


def fail_and_go_on(folder):
    """What the last lines say is done; the weights at the end."""
    ((_, words), _) = below_the_traceback(ends(trainer_of(folder, Fails(9, rank=0)).train))
    call = re.search(r"Go on with (trainer\.train\(.*\))$", words)[1]
    trainer = trainer_of(folder)
    eval(call, {"trainer": trainer})
    return values(trainer.model)


def never_failed(folder):
    trainer = trainer_of(folder)
    trainer.train()
    return values(trainer.model)


def test_the_call_that_is_named_goes_on_to_the_same_end(tmp_path):
    (failed,) = run_workers(fail_and_go_on, 1, tmp_path / "failed")
    (whole,) = run_workers(never_failed, 1, tmp_path / "whole")
    assert all(torch.equal(failed[name], whole[name]) for name in whole)


def three_runs(folder):
    """One that ends well, and an error after it; one that is resumed, and fails before it has saved; Ctrl-C."""
    trainer_of(folder, max_steps=4).train()

    def after_the_end():
        raise ValueError("a plot")

    def resumed():
        trainer_of(folder, Fails(5, rank=0)).train(resume_from_checkpoint=True)

    def interrupted():
        trainer_of(folder / "other", Fails(5, rank=0, error=KeyboardInterrupt())).train()

    return [below_the_traceback(ends(call)) for call in (after_the_end, resumed, interrupted)]


def test_a_resumed_run_names_what_it_came_from_and_one_that_has_ended_nothing(tmp_path):
    ((after, resumed, interrupted),) = run_workers(three_runs, 1, tmp_path)
    assert after == []
    assert resumed[0][1] == go_on(tmp_path / "checkpoint-4")
    assert interrupted[0][1] == go_on(tmp_path / "other" / "checkpoint-4")


# ---- Accelerate ----


def fail_under_accelerate(folder, at):
    accelerator, bare, rows = Accelerator(cpu=True), Regression(torch.float32), Rows(100, torch.float32)
    config = SlowMoConfig(sync_every=2, timeout_seconds=patience(8))
    model, optimizer = accelerator.prepare(bare, SlowMoOptimizer(torch.optim.SGD(bare.parameters(), lr=0.05), config))

    def train():
        for step in range(1, 7):
            if step == at and accelerator.process_index == 1:
                raise ValueError("bad batch")
            accelerator.backward(model(rows.x[4 * step : 4 * step + 4], rows.y[4 * step : 4 * step + 4])["loss"])
            optimizer.step()
            optimizer.zero_grad()
            if step in (2, 4):
                accelerator.save_state(folder / f"step {step}")
        slowmo_hf.finish(optimizer)
        raise ValueError("a plot")

    return below_the_traceback(ends(train))


@pytest.mark.parametrize(("at", "saved"), [(6, "step 4"), (2, None), (7, "")], ids=["saved", "none yet", "finished"])
def test_the_last_lines_under_accelerate_name_the_last_save_state(tmp_path, at, saved):
    for lines in run_workers(fail_under_accelerate, 2, tmp_path, at):
        if saved == "":
            assert lines == []
        elif saved is None:
            assert [words for _, words in lines] == [NONE_YET]
        else:
            folder = tmp_path / saved
            call = f'the last whole checkpoint is {folder}. Go on with accelerator.load_state("{folder}")'
            assert lines[0][1] == call


# ---- who says it, how long it takes, what it never does ----


def fail_in_four(rank_that_fails, folder):
    return below_the_traceback(ends(trainer_of(folder, Fails(3, rank=rank_that_fails)).train))


def test_one_process_of_the_machine_says_it_and_the_one_that_failed(tmp_path):
    assert [len(lines) for lines in run_workers(fail_in_four, 3, 2, tmp_path)] == [1, 0, 1]


@pytest.fixture
def saves(tmp_path, monkeypatch):
    """Of a run under way whose one checkpoint has eight terabytes, of which none is on the disk."""
    monkeypatch.setattr(last_lines, "_runs", [])
    folder = tmp_path / "checkpoint-4"
    (folder / "slowmo").mkdir(parents=True)
    (folder / "slowmo" / "manifest.json").write_text("{}")
    with open(folder / "model.safetensors", "wb") as file:
        file.truncate(2**43)
    saves = Saves("load({})")
    saves.add(folder)
    saves.begin()
    return saves


def test_a_large_checkpoint_takes_no_time(saves, tmp_path):
    began = time.monotonic()
    assert saves.words().startswith(f"the last whole checkpoint is {tmp_path / 'checkpoint-4'}. Go on with load(")
    assert time.monotonic() - began < 1


def test_an_exit_on_purpose_is_silent_and_what_goes_wrong_is_left(saves, monkeypatch):
    def raises():
        raise ValueError("bad batch")

    assert len(below_the_traceback(ends(raises))) == 2
    assert below_the_traceback(ends(lambda: sys.exit(slowmo_hf.REQUEUE_EXIT_CODE))) == []
    monkeypatch.setattr(last_lines, "is_whole", lambda folder: 1 / 0)
    said = ends(raises)
    assert said.rstrip().endswith("ValueError: bad batch")
    assert "ZeroDivisionError" not in said


def test_the_command_is_shown_without_its_secrets(saves, monkeypatch):
    command = ["python", "train it.py", "--hub_token", "hf_1", "--api-key=2", "--lr", "0.1", "--push_token", "--fp16"]
    command += ["wandb.api_key=4", "--url", "https://me:5@host/x?auth_token=8", "--passwd", "-6", "--keys=7"]
    command += ["--max_tokens", "4096", "--keyboard", "3"]
    monkeypatch.setattr(sys, "orig_argv", command)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    words = saves.words().splitlines()[1]
    shown = "python 'train it.py' --hub_token '***' '--api-key=***' --lr 0.1 --push_token --fp16 'wandb.api_key=***'"
    shown += " --url 'https://***@host/x?auth_token=***' --passwd '***' '--keys=***' --max_tokens 4096 --keyboard 3"
    assert words == f"in the script that was started by: {shown}"


SCRIPT = """
import sys, torch
sys.path.insert(0, {tests!r})
from test_last_lines import Fails, trainer_of
trainer_of({folder!r}, Fails(5, rank=1)).train()
"""


@pytest.mark.slow
def test_under_torchrun_the_failing_rank_says_it_last(tmp_path):
    """As a user starts it, and reads it: rank 1's own output, in a file of its own."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(tests=str(ROOT / "tests"), folder=str(tmp_path / "out")))
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--redirects", "3", "--log-dir", "logs"]
    done = subprocess.run(
        [sys.executable, *torchrun, str(script)],
        cwd=tmp_path,
        env={**RECIPE_ENVIRONMENT, "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=patience(170),
    )
    assert done.returncode != 0
    (said,) = [path.read_text() for path in Path(tmp_path, "logs").rglob("1/stderr.log")]
    (first, words), (second, started) = below_the_traceback(said)
    assert (first, second) == (1, 1)
    assert words == go_on(tmp_path / "out" / "checkpoint-4")
    this_process = "in the script that the job's launch command starts again. This process of it: "
    assert started == f"{this_process}{sys.executable} -u {script}"
    assert os.path.isdir(tmp_path / "out" / "checkpoint-4")
