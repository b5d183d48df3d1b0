"""
Real jobs, killed with SIGKILL at random moments and started again by their launcher, end with the weights of the run
never killed, bit for bit; and the switch that kills them. `benchmarks/kill.py` is the long version.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from pathlib import Path

import pytest
import torch

import kill
import kill_jobs
import kill_runs
import kill_switch
from kill_runs import Kill
from launcher import launch
from slowmo_hf.wire.communicator import Communicator

# ---- jobs ----


KILLS = {
    "Trainer, local_sgd": ("our files", "the resume", "deletion of an old checkpoint"),
    "Trainer, osgp": ("evaluation", "in a message"),
    "Trainer, dpsgd": ("before the first save", "the library's files"),
    "Accelerate, sgp": ("the seal", "any instant"),
    "Accelerate, all_reduce": ("the library's files", "the resume"),
    "Accelerate, no average": ("in a step", "our files"),
}
REALLY_LAUNCHED = ("Accelerate, sgp",)  # by `accelerate launch`; the others by launcher.py
RESUME_MOMENTS = 12  # a resume of these jobs has more of them


@pytest.mark.slow
@pytest.mark.timeout(360)
@pytest.mark.parametrize("name", KILLS)
def test_a_killed_job_goes_on_by_itself_and_ends_the_same(tmp_path, name):
    """Two kills, or three, each in an attempt of its own; the last attempt goes to the end."""
    job, launcher = kill_jobs.JOBS[name], kill_runs.accelerate_launch if name in REALLY_LAUNCHED else launch
    reference = kill_runs.launch(job, tmp_path / "never killed", launcher=launch)
    assert reference.exit_code == 0, reference.said[-4000:]
    assert [len(set(weights)) for weights in reference.weights(0)] == [16, 16]
    kills = kill.draw_many(KILLS[name], reference, [RESUME_MOMENTS] * job.processes, random.Random(name))
    run = kill_runs.launch(job, tmp_path / "killed", kills, launcher)
    assert kill_runs.differences(reference, run, kills) == [], f"{kills}\n{run.said[-4000:]}"
    assert min(kill.resume_moments(run)) >= RESUME_MOMENTS


@pytest.mark.slow
@pytest.mark.timeout(480)
@pytest.mark.parametrize(
    "name", ["local_sgd, 2 x 2 processes", "overlapped, 2 x 2 processes", "overlapped, 2 x 2 shards"]
)
def test_any_process_of_a_worker_of_two_may_die(tmp_path, name):
    """
    In a message each of the four dies once, a first and a second process of both workers, after the save of step 2:
    between rounds, which come every 3 steps, or with one under way.
    """
    short = (kill_jobs.NODE_JOBS | kill_jobs.SHARD_JOBS)[f"Accelerate, {name}"]
    job = kill_runs.Job(f"{short.command} --steps 16", short.processes)
    reference = kill_runs.launch(job, tmp_path / "never killed", launcher=launch)
    assert reference.exit_code == 0, reference.said[-4000:]
    weights = reference.weights(0)
    assert [len(set(own)) for own in weights] == [16] * 4
    if "shards" in name:
        assert len({own[5] for own in weights}) == 4, "the digest is of a process's own shards"
    else:
        assert weights[0] == weights[1] != weights[2] == weights[3]
    chance = random.Random(name)
    kills = []
    for attempt, rank in enumerate(chance.sample(range(4), 4)):
        found = kill.moments(reference, rank)
        midway = found[found.index(("forward", 2)) : found.index(("forward", 4))]
        kills.append(Kill(attempt, rank, *chance.choice([moment for moment in midway if moment[0] == "message"])))
    run = kill_runs.launch(job, tmp_path / "killed", tuple(kills), launch)
    assert kill_runs.differences(reference, run, tuple(kills)) == [], f"{kills}\n{run.said[-4000:]}"
    assert any(start % 3 for starts in kill_runs.first_steps(reference, run) for start in starts if start)


@pytest.mark.slow
@pytest.mark.timeout(360)
def test_a_sharded_trainer_goes_on_by_itself_and_ends_the_same(tmp_path):
    """Killed in a sharded save's own files, and in ours."""
    job = kill_jobs.SHARD_JOBS["Trainer, sgp, 2 x 2 shards"]
    assert "--state_dict_type SHARDED_STATE_DICT" in job.command
    reference = kill_runs.launch(job, tmp_path / "never killed", launcher=launch)
    assert reference.exit_code == 0, reference.said[-4000:]
    assert [len(set(own)) for own in reference.weights(0)] == [8] * 4
    written = [note[2] for note in reference.notes[0, 3] if note[0] == "moment" and note[1] == "their file"]
    assert any("half of" in words and words.endswith(".distcp") for words in written)
    found = kill_runs.end_state(reference)
    assert "checkpoint-8/pytorch_model_fsdp_0" in found
    assert "checkpoint-8/optimizer_0" not in found
    kills = kill.draw_many(("the library's files", "our files"), reference, [], random.Random(1))
    run = kill_runs.launch(job, tmp_path / "killed", kills, launch)
    assert kill_runs.differences(reference, run, kills) == [], f"{kills}\n{run.said[-4000:]}"


def test_every_surface_and_base_is_killed():
    assert sum(map(len, KILLS.values())) >= 12
    assert {name.partition(", ")[0] for name in KILLS} == {"Trainer", "Accelerate"}
    assert {name.partition(", ")[2] for name in KILLS} == set(kill_jobs.BASES)
    assert {stratum for strata in KILLS.values() for stratum in strata} == set(kill.STRATA) - {
        "the start",
        "after the last step",
    }


# ---- the switch ----


@pytest.fixture
def switch(tmp_path, monkeypatch):
    """Rank 1 of the second attempt, with plans for others; `killed` gets the signals that it would have sent."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    killed = []
    monkeypatch.setattr(os, "kill", lambda *signal: killed.append(signal))
    plan = [
        {"attempt": 0, "rank": 1, "kind": "seal", "nth": 0, "delay_ms": None},
        {"attempt": 1, "rank": 0, "kind": "seal", "nth": 0, "delay_ms": None},
        {"attempt": 1, "rank": 1, "kind": "our file", "nth": 1, "delay_ms": None},
    ]
    (tmp_path / "out").mkdir()
    switch = kill_switch.Switch(tmp_path, tmp_path / "out", plan)
    switch.killed, switch.notes = killed, tmp_path / "attempt_1_rank_1.jsonl"
    return switch


def test_a_process_dies_at_its_own_moment_only(switch):
    switch.moment("our file", "while it resumes")
    switch.model = torch.nn.Linear(1, 1)
    for kind in ("seal", "our file"):
        switch.moment(kind, "first")
    assert switch.killed == []
    switch.moment("our file", "second")
    assert switch.killed == [(os.getpid(), 9)]
    kinds = [json.loads(line)[:2] for line in switch.notes.read_text().splitlines()]
    assert kinds == [["moment", "resume"], ["moment", "seal"], ["moment", "our file"], ["kill", "our file"]]


def test_who_dies_in_a_write_leaves_half_of_the_file(switch, tmp_path):
    switch.model = torch.nn.Linear(1, 1)
    path = tmp_path / "out" / "checkpoint-2" / "slowmo" / "worker_1.pt"
    path.parent.mkdir(parents=True)
    switch.around_write(lambda what, path: Path(path).write_bytes(what))(b"x" * 100, path)
    assert path.stat().st_size == 50
    assert switch.killed == [(os.getpid(), 9)]


@pytest.mark.parametrize(
    ("event", "name", "kind"),
    [
        ("os.mkdir", "checkpoint-2", "their file"),
        ("open", "checkpoint-2/optimizer.pt", "their file"),
        ("os.rename", "checkpoint-2/slowmo/worker_0.pt.tmp", "our file"),
        ("os.rename", "checkpoint-2/slowmo/manifest.json.tmp", "seal"),
        ("os.rename", "checkpoint-2", "rotation"),
        ("shutil.rmtree", "checkpoint-2", "rotation"),
        ("open", "model.safetensors", "end"),
        ("os.mkdir", "", "end"),
    ],
)
def test_files_have_their_kinds(switch, event, name, kind):
    switch.model = torch.nn.Linear(1, 1)
    switch.file_event(event, (str(switch.watched / name), -1))
    assert [json.loads(line)[1] for line in switch.notes.read_text().splitlines()] == [kind]


def test_files_of_others_and_other_events_are_no_moments(switch, tmp_path):
    switch.file_event("open", (str(tmp_path / "elsewhere"), "w", 0))
    switch.file_event("open", (7, "w", 0))
    switch.file_event("os.listdir", (str(switch.watched),))
    assert switch.notes.read_text() == ""


def test_a_tree_that_is_deleted_is_seen_file_by_file(switch):
    """As `shutil.rmtree` does it here, with descriptors or with paths."""
    (switch.watched / "checkpoint-2" / "slowmo").mkdir(parents=True)
    (switch.watched / "checkpoint-2" / "slowmo" / "manifest.json").touch()
    switch.model = torch.nn.Linear(1, 1)
    sys.addaudithook(lambda event, args: switch.file_event(event, args) if listening else None)
    listening = [True]
    shutil.rmtree(switch.watched / "checkpoint-2")
    listening.clear()
    told = [json.loads(line)[1:] for line in switch.notes.read_text().splitlines()]
    deletions = [words for kind, words in told if kind == "rotation" and words.startswith(("os.remove", "os.rmdir"))]
    assert deletions == [
        "os.remove checkpoint-2/slowmo/manifest.json",
        "os.rmdir checkpoint-2/slowmo",
        "os.rmdir checkpoint-2",
    ]


def test_all_that_workers_send_is_a_moment():
    """Whatever a communicator can do is watched; nothing that is named may be missing."""
    found = kill_switch.messages_of(Communicator)
    assert set(found) >= set(kill_switch.LASTING)
    assert len(found) == len(set(found))
    own = {name for name in vars(Communicator) if not name.startswith("_")}
    assert own == set(found) - {"exchange", "finish"}


def test_a_message_that_is_gone_is_an_error():
    class Less:
        def start_sum_(self, flat):
            """All that it can."""

    with pytest.raises(AttributeError, match="names gather_header, gather_objects, exchange, finish, which Less no"):
        kill_switch.messages_of(Less)


def test_weights_are_parameters_and_buffers_bit_for_bit():
    model = torch.nn.BatchNorm1d(3)
    before = kill_switch._digest(model)
    assert kill_switch._digest(torch.nn.BatchNorm1d(3)) == before
    for tensor in (model.weight.data, model.running_mean):
        old = tensor.clone()
        tensor[1] += 1e-7
        assert kill_switch._digest(model) != before
        tensor.copy_(old)
    assert kill_switch._digest(model) == before
