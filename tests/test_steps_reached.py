"""A rank that is missed between two rounds is named with the step that it had reached, and the age of that."""

from __future__ import annotations

import json
import os
import re
import signal
import time

import pytest
import torch

from apart import HOST, TIMEOUT_SECONDS
from harness import launcher_store
from slowmo_hf import SlowMoConfig, SlowMoOptimizer
from slowmo_hf.wire import roll_call
from slowmo_hf.wire.job_store import JobStore
from slowmo_hf.wire.register import Register
from tiny import Regression, Rows

PERIOD = TIMEOUT_SECONDS / 10  # between two notes here
AT, LAST_ROUND = 11, 8  # rank 1 stops before its step 12


def hangs():
    time.sleep(TIMEOUT_SECONDS + 30)


def is_killed():
    time.sleep(4 * PERIOD)
    os.kill(os.getpid(), signal.SIGKILL)


def is_killed_at_once():
    os.kill(os.getpid(), signal.SIGKILL)


def freezes():
    time.sleep(4 * PERIOD)
    os.kill(os.getpid(), signal.SIGSTOP)


def is_slow():
    """From here on a step takes longer than all the others' waiting."""
    for _ in range(3):
        time.sleep(TIMEOUT_SECONDS)


def train(rank, act):
    roll_call._NOTE_SECONDS = PERIOD
    model, rows = Regression(torch.float32), Rows(4, torch.float32)
    config = SlowMoConfig(sync_every=8, timeout_seconds=TIMEOUT_SECONDS)
    optimizer = SlowMoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), config)
    for step in range(1, 17):
        if rank == 1 and step == AT + 1:
            act()
        model(rows.x, rows.y)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()


WHERE = f"on {re.escape(HOST)}"
NOTED = r"at least at step (\d+) (\d+) s ago, when it had been there for (\d+) s"
SEEN = rf"last seen at step {LAST_ROUND}, the round; {NOTED}"
LATE = rf"rank 1 {WHERE} did not come to step 16, the round, within timeout_seconds={TIMEOUT_SECONDS:g}: .*; {SEEN}\."
GONE = rf"rank 1 {WHERE} left without a word after step {AT}; {SEEN}\."
# Words; seconds since the last note and seconds at that step then, at least and at most.
TABLE = {
    "hangs": (hangs, LATE, (0, 4 * PERIOD), (TIMEOUT_SECONDS - 4 * PERIOD, TIMEOUT_SECONDS + 10)),
    "is slow": (is_slow, LATE, (0, 4 * PERIOD), (TIMEOUT_SECONDS - 4 * PERIOD, TIMEOUT_SECONDS + 10)),
    "is killed": (is_killed, GONE, (0, TIMEOUT_SECONDS), (2 * PERIOD, 4 * PERIOD)),
    "freezes": (freezes, LATE, (TIMEOUT_SECONDS - 4 * PERIOD, TIMEOUT_SECONDS + 10), (2 * PERIOD, 4 * PERIOD)),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "ago", "there_for"),
    [
        pytest.param(words, ago, there_for, id=name, marks=pytest.mark.apart(train, act))
        for name, (act, words, ago, there_for) in TABLE.items()
    ],
)
def test_a_missed_rank_is_named_with_the_step_that_it_had_reached(apart, words, ago, there_for):
    (told,), _ = apart
    found = re.match(f"RuntimeError: {words}", told)
    assert found, told
    step, seconds_ago, seconds_there = map(int, found.groups())
    assert step == AT
    assert ago[0] - 1 <= seconds_ago <= ago[1] + 1
    assert there_for[0] - 1 <= seconds_there <= there_for[1] + 1


@pytest.mark.slow
@pytest.mark.apart(train, is_killed_at_once)
def test_without_a_note_the_last_meeting_is_what_is_known(apart):
    """Eleven steps take less time than there is between two notes; where they take more, the note is a lower bound."""
    (told,), _ = apart
    known = re.match(rf"RuntimeError: rank 1 {WHERE} left without a word after step (\d+); last seen at step 8", told)
    assert known, told
    assert LAST_ROUND <= int(known[1]) <= AT


class Frozen:
    """A store whose host has frozen: a call never returns. Counts them."""

    def __init__(self):
        self.calls = 0

    def set(self, key, value):
        self.calls += 1
        time.sleep(60)


def test_a_store_that_has_frozen_holds_up_no_step(monkeypatch):
    """The thread that leaves notes waits for it, alone; a step notes where it is and sends nothing."""
    frozen = Frozen()
    register = Register(JobStore(frozen, 60), "run", 0)
    noting = roll_call.threading.Thread(target=register.note, daemon=True)
    noting.start()
    began = time.monotonic()
    for step in range(100_000):
        register.at(step, "training")
    assert time.monotonic() - began < 5
    assert noting.is_alive()
    assert frozen.calls == 1


def test_a_note_is_one_key_with_the_step_and_its_age():
    store = launcher_store(1)
    left, read = Register(JobStore(store, 5), "run", 0), Register(JobStore(store, 5), "run", 1)
    left.at(11, "training")
    left.reached_at -= 40
    keys = store.num_keys()
    for _ in range(3):
        left.note()
    assert store.num_keys() == keys + 1
    note = json.loads(store.get("run/note/0"))
    assert note["step"] == 11
    assert 40 <= note["there_for"] < 45
    assert read.noted(0, after=8) == (11, "; at least at step 11 0 s ago, when it had been there for 40 s")
    assert read.noted(0, after=11) == (11, "")
    assert read.noted(5, after=8) == (8, "")
