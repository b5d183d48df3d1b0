"""What a program of the user's makes of our lines and figures: its progress bars, handlers, callbacks and waits."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
import time

import pytest
import torch
from transformers import Trainer, TrainerCallback

import slowmo_hf
from harness import run_workers
from slowmo_hf import SlowMoCallback, SlowMoConfig, SlowMoOptimizer, run_in_process
from slowmo_hf.adapters.trainer_logs import RoundLogs
from slowmo_hf.training.account import Account, Spent
from slowmo_hf.training.costs import Costs
from slowmo_hf.training.report import RoundReport
from test_costs import TAU, Few
from tiny import Heard, Regression, Rows, arguments

BESIDE_A_BAR = """
import sys
from tqdm import tqdm
from slowmo_hf.log import logger, make_heard
make_heard()
bar = tqdm(total=40, file=sys.stderr, ascii=True, mininterval=0)
bar.update(20)
logger.info("2 workers:\\n  rank  worker")
bar.update(1)
bar.close()
"""


def test_a_line_begins_at_the_left_beside_a_progress_bar():
    """What a terminal shows: behind a carriage return a line is written anew."""
    done = subprocess.run([sys.executable, "-c", BESIDE_A_BAR], capture_output=True, check=True)
    shown = [line.rpartition("\r")[2] for line in done.stderr.decode().split("\n")]
    first = shown.index("[slowmo_hf] 2 workers:")
    assert shown[first + 1] == "  rank  worker"
    assert "21/40" in shown[first + 2]


HANDLERS = """
import logging, os, sys
from slowmo_hf.log import logger, make_heard
make_heard()
logger.info("first")
logging.getLogger().addHandler(logging.NullHandler())
errors = logging.StreamHandler()
errors.setLevel(logging.ERROR)
logging.getLogger().addHandler(errors)
logger.warning("heard by nobody else")
logging.getLogger().removeHandler(errors)
logging.getLogger().handlers.clear()
logging.basicConfig(format="mine: %(message)s")
make_heard()
logger.info("second")
logger.propagate = False
logger.info("third")
import multiprocessing
multiprocessing.set_start_method("spawn")  # nobody has chosen one
os.close(2)
logger.info("a pipe that nobody reads any more is no error")
"""


def test_every_line_comes_once_when_a_program_adds_handlers_later():
    done = subprocess.run([sys.executable, "-c", HANDLERS], capture_output=True, text=True, check=True)
    said = [line for line in done.stderr.splitlines() if line.startswith(("[slowmo_hf]", "mine:"))]
    assert said == [
        *("[slowmo_hf] first", "[slowmo_hf] heard by nobody else"),
        *("mine: second", "[slowmo_hf] third"),
    ]


class Keeps(TrainerCallback):
    """The usual history: what `on_log` is given, not copies."""

    def __init__(self):
        self.kept = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.kept.append(logs)


def kept_of(folder):
    keeps = Keeps()
    trainer = Trainer(
        model=Regression(torch.float32),
        args=arguments(folder, max_steps=6, logging_strategy="steps", logging_steps=2),
        train_dataset=Rows(64, torch.float32),
        callbacks=[SlowMoCallback(SlowMoConfig(sync_every=2)), keeps],
    )
    result = trainer.train()
    return keeps.kept, trainer.state.log_history, result.metrics


def test_callbacks_keep_our_figures_and_trains_metrics_have_none(tmp_path):
    for kept, history, metrics in run_workers(kept_of, 2, str(tmp_path)):
        assert [one.get("slowmo/round") for one in kept] == [1, 2, 3, None]
        for one, entry in zip(kept[:3], history, strict=False):
            assert {**one, "step": entry["step"]} == entry
        assert not [name for name in metrics if name.startswith("slowmo/")]
        assert {"train_runtime", "train_loss", "epoch"} <= metrics.keys()


@pytest.mark.parametrize(
    ("settings", "is_there"),
    [
        ({}, True),
        ({"outer_momentum": 0.0}, False),
        ({"outer_optimizer": "torch.optim.SGD", "outer_optimizer_kwargs": '{"momentum": 0.9}'}, False),
    ],
)
def test_the_velocity_of_who_keeps_none_is_left_out(settings, is_there):
    """DiLoCo's entries had 0, as if its outer update stood still."""

    def work(rank):
        param = torch.nn.Parameter(torch.ones(3))
        config = SlowMoConfig(sync_every=1, **settings)
        optimizer = SlowMoOptimizer(torch.optim.SGD([param], lr=0.1), config)
        param.grad = torch.full((3,), 1.0 + rank)
        optimizer.step()
        return slowmo_hf.last_round(optimizer)

    for report in run_in_process(work, 2):
        assert (report.velocity_norm is not None) == is_there
        assert ("slowmo/velocity_norm" in report.to_logs()) == is_there


# ---- costs ----


def lines_of(told, **more):
    costs = Costs(SlowMoConfig(sync_every=TAU), Few)
    costs.hosts = ["here", "there"]
    lines = []
    for number, one in enumerate(told):
        assert costs.hear(number, [Spent(*one)] * 2)
        lines.append(costs.news(10**7, **more))
    return lines


def test_a_program_that_gathers_between_rounds_gets_no_advice():
    told = [(0.04, 0.04)] * 4
    (alone,), (coupled,) = (
        [line for line in lines_of(told, are_coupled=are_coupled) if line] for are_coupled in (False, True)
    )
    assert "sync_every >=" in alone
    assert "would" not in coupled
    assert coupled.endswith("computation. The program's own collectives between rounds are in these figures.")


def test_costs_that_jitter_are_said_ever_more_rarely():
    """Rounds of 40 and of 80 ms in turn, three each: each is news. By hand: the pause doubles from 10 on."""
    told = [(0.04, 0.04 if number // 3 % 2 else 0.08) for number in range(400)]
    said = [number for number, line in enumerate(lines_of(told)) if line]
    pauses = [later - earlier for earlier, later in itertools.pairwise(said)]
    assert 4 <= len(pauses) <= 5
    assert all(10 * 2**number <= pause < 10 * 2**number + 6 for number, pause in enumerate(pauses))


def test_with_all_reduce_waits_inside_ddp_are_no_utilisation():
    """Ranks meet at every step: their computation would count all waiting."""

    def work(rank):
        param = torch.nn.Parameter(torch.ones(3))
        optimizer = SlowMoOptimizer(
            torch.optim.SGD([param], lr=0.1), SlowMoConfig(base="all_reduce", sync_every=2, outer_momentum=0.5)
        )
        for _ in range(12):
            param.grad = torch.ones(3)
            optimizer.step()
        slowmo_hf.finish(optimizer)
        return slowmo_hf.last_round(optimizer).utilisation

    with Heard() as heard:
        assert run_in_process(work, 2) == [None, None]
    assert heard.about("costs: ") == []
    assert heard.about("utilisation") == []
    assert heard.about("training ended at step 12: 12 steps and 6 rounds")


def test_a_start_is_no_computation(monkeypatch):
    seconds = iter(range(0, 100, 5))
    monkeypatch.setattr(time, "perf_counter", lambda: next(seconds))
    account = Account(lambda: 0)
    with account.communicating():
        pass
    account.skip()
    account._mark()
    assert (account.computed_seconds, account._communicated, account.communicated_before) == (5, 0, 0)


class SlowFirst(Rows):
    """A loader that takes its time before the first batch."""

    is_read = False

    def __getitem__(self, index):
        if not self.is_read:
            time.sleep(3)
        self.is_read = True
        return super().__getitem__(index)


def trained_with_overlap(folder):
    with Heard() as heard:
        Trainer(
            model=Regression(torch.float32),
            args=arguments(folder, max_steps=8),
            train_dataset=SlowFirst(64, torch.float32),
            callbacks=[SlowMoCallback(SlowMoConfig(sync_every=2, overlap_steps=1))],
        ).train()
    return heard.about("training ended at step"), heard.about(" s computed")


def test_the_end_counts_the_round_in_flight_and_not_the_start(tmp_path):
    """The last one was sent, and the average contains it, though no step has applied it."""
    (ended, spent), _ = run_workers(trained_with_overlap, 2, str(tmp_path))
    assert ended == ["training ended at step 8: 8 steps and 4 rounds"]
    computed = float(spent[0].split(" s computed")[0].rpartition(" ")[2])
    assert computed < 3, spent


def counted_tokens(folder):
    with Heard() as heard:
        Trainer(
            model=Regression(torch.float32),
            args=arguments(folder, max_steps=36, include_num_input_tokens_seen=True),
            train_dataset=Rows(288, torch.float32),
            callbacks=[SlowMoCallback(SlowMoConfig(sync_every=6))],
        ).train()
    return heard.lines


def test_counted_tokens_are_one_warning_and_no_advice(tmp_path):
    said, _ = run_workers(counted_tokens, 2, str(tmp_path))
    lines = [line for _, line in said]
    assert sum("gathers at every micro-batch" in line for line in lines) == 1
    assert not any("the program itself runs collectives" in line for line in lines)
    (costs,) = [line for line in lines if "costs: " in line]
    assert costs.endswith("The program's own collectives between rounds are in these figures.")


def test_a_dict_that_is_logged_again_has_no_figures_of_before():
    kept, told = RoundLogs(), []
    kept._losses = None
    log = kept._telling(lambda logs: told.append(dict(logs)))
    kept.rounds = [RoundReport(1, 0.0, 0.0, None, 10, 0.0, None)]
    entry = {"loss": 1.0}
    log(entry)
    log(entry)
    assert [one.get("slowmo/bytes_sent") for one in told] == [10, None]


def test_a_config_with_a_field_of_its_own_is_shown():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Noted(SlowMoConfig):
        note: str = "mine"

    param = torch.nn.Parameter(torch.ones(3))
    optimizer = SlowMoOptimizer(torch.optim.SGD([param], lr=0.1), Noted(sync_every=3))
    param.grad = torch.ones(3)
    with Heard() as heard:
        optimizer.step()
    assert heard.about("settings: sync_every=3, note='mine'")
