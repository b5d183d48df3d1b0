"""The moments at which `benchmarks/kill.py` kills, its comparison with the run never killed, and its records."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch

import kill
import kill_jobs
import kill_runs
from kill_runs import Kill, Run
from slowmo_hf.checkpoints.files import write_part
from slowmo_hf.checkpoints.manifest import seal
from slowmo_hf.contents import Contents

# ---- the moments ----


STEP = ["forward", "backward", "backward", "inner step", "inner step"]
SAVE = ["our file", "our file", "their file", "seal"]


def run_of(folder, *attempts):
    """A run by hand: by attempt and rank its notes in short, "w3" for the weights of step 3, "!seal" for a kill."""
    notes = {}
    for attempt, ranks in enumerate(attempts):
        for rank, words in enumerate(ranks):
            note = {
                "w": lambda word, rank=rank: ["weights", f"rank {rank} step {word[1:]}"],
                "!": lambda word: ["kill", word[1:], "here"],
            }
            notes[attempt, rank] = [note.get(word[0], lambda word: ["moment", word, ""])(word) for word in words]
    return Run(folder, 0, 1.0, "", notes)


@pytest.fixture
def reference(tmp_path):
    """Six steps, a save after every second one, which rank 1 has no seal of."""
    by_rank = []
    for rank in range(2):
        words = ["start", "start"]
        for step in range(6):
            words += [f"w{step}", *STEP]
            words += SAVE[: 4 - rank] if step % 2 else ["message"]
        by_rank.append([*words, "end"])
    checkpoint(tmp_path, 6)
    return run_of(tmp_path, by_rank)


def checkpoint(folder, step, value=1.0):
    """One that is whole, and the model beside."""
    place = folder / "out" / f"checkpoint-{step}"
    place.mkdir(parents=True)
    torch.save({"state": {"momentum": torch.tensor([value, 2.0])}, "steps": step}, place / "optimizer.pt")
    write_part(place, "worker_0", Contents(tensors={"p": torch.ones(2)}))
    seal(place, {"run": "r", "step": step})


def test_moments_are_counted_by_kind(reference):
    """Rank 0: 2 start, 30 in steps, 3 messages, 12 in saves, 1 end."""
    found = kill.moments(reference, 0)
    assert len(found) == 48
    assert found[:4] == [("start", 0), ("start", 1), ("forward", 0), ("backward", 0)]
    assert Counter(kind for kind, _ in found)["our file"] == 6
    assert found[-2:] == [("seal", 2), ("end", 0)]


@pytest.mark.parametrize(
    "stratum", [name for name in kill.STRATA if name not in ("evaluation", "deletion of an old checkpoint")]
)
def test_drawn_kills_are_of_their_stratum(reference, stratum):
    """
    Forty draws: every one is a moment that the rank had, of a kind of the stratum; before the first save there are
    steps 0 and 1.
    """
    drawn = [kill.draw(stratum, reference, [3, 5], random.Random(seed)) for seed in range(40)]
    for first, *rest in drawn:
        assert (first.kind, first.nth) in kill.moments(reference, first.rank)
        assert first.kind in kill.STRATA[stratum]
        assert (first.delay_ms is not None) == (stratum == "any instant")
        assert len(rest) == (stratum == "the resume")
        for again in rest:
            assert (again.attempt, again.kind) == (1, "resume")
            assert 0 <= again.nth < [3, 5][again.rank]
    if stratum == "before the first save":
        assert all(
            first.nth < 2 or (first.kind in ("backward", "inner step") and first.nth < 4) for first, *_ in drawn
        )
    if stratum == "the seal":
        assert {first.rank for first, *_ in drawn} == {0}, "rank 1 has no such moment"
    assert len(set(drawn)) >= 3 or stratum in ("the start", "after the last step")


def test_many_kills_come_within_four_steps_each(reference):
    kills = kill.draw_many(("in a step", "the resume", "our files") * 5, reference, [3, 3], random.Random(1))
    assert [found.attempt for found in kills] == list(range(15))
    assert [found.kind for found in kills[1::3]] == ["resume"] * 5
    assert all(found.nth < 8 for found in kills), "four steps have eight of the most frequent kinds"


def test_a_plan_mixes_all_pairs_and_keeps_resumes_for_the_end():
    pairs = kill.plan(200, seed=0)
    assert len(pairs) == 200
    assert len(set(pairs)) == len(kill_jobs.JOBS) * len(kill.STRATA) == 168
    places = [index for index, (_, stratum) in enumerate(pairs) if stratum == "the resume"]
    assert places == list(range(200 - len(places), 200))
    assert kill.plan(200, seed=0) == pairs != kill.plan(200, seed=1)


def test_node_workers_have_a_plan_of_their_own():
    """Jobs of four processes for all strata; the plan of workers of one is what it was."""
    args = kill.KillArguments(processes_per_worker=2)
    assert {job.processes for job in args.jobs.values()} == {4}
    assert all("--processes_per_worker 2" in job.command for job in args.jobs.values())
    pairs = kill.plan(200, 0, args.jobs)
    assert len(set(pairs)) == len(args.jobs) * len(kill.STRATA) == 168
    assert {name for name, _ in pairs} == set(kill_jobs.NODE_JOBS)
    with pytest.raises(ValueError, match="processes_per_worker must be 1 or 2, got 3"):
        kill.KillArguments(processes_per_worker=3)


def test_both_kinds_of_workers_of_two_are_killed_into_one_record():
    """Each kind has half of the points or so, of all strata, and each base both kinds of save."""
    args = kill.KillArguments(processes_per_worker=2, shards=2)
    assert args.jobs == kill_jobs.NODE_JOBS | kill_jobs.SHARD_JOBS
    pairs = kill.plan(120, 0, args.jobs)
    kinds = Counter(kill.kind_of(name) for name, _ in pairs)
    assert set(kinds) == {"2 x 2 processes", "2 x 2 shards"}
    assert min(kinds.values()) >= 48
    for kind in kinds:
        assert {stratum for name, stratum in pairs if kill.kind_of(name) == kind} == set(kill.STRATA)
    for base in kill_jobs.SHARD_BASES:
        names = [f"{surface}, {base}, 2 x 2 shards" for surface in kill_jobs.SHARD_LOOPS]
        commands = [kill_jobs.SHARD_JOBS[name].command for name in names]
        assert sorted("SHARDED_STATE_DICT" in command for command in commands) == [False, True]


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("Trainer, local_sgd", "--num_train_epochs 6"),
        ("Trainer, local_sgd, 2 x 2 processes", "--num_train_epochs 12"),
        ("Accelerate, sgp, 2 x 2 processes", "--steps 48"),
        ("Trainer, sgp, 2 x 2 shards", "--max_steps 48"),
    ],
)
def test_ten_kills_have_48_steps_to_come_in(name, flags):
    """Of 64 images, 4 for each process and step: 8 steps an epoch with two processes, 4 with four."""
    job = (kill_jobs.JOBS | kill_jobs.NODE_JOBS | kill_jobs.SHARD_JOBS)[name]
    assert kill_jobs.longer(name, job) == kill_runs.Job(f"{job.command} {flags}", job.processes)


def test_a_record_of_other_jobs_is_refused(tmp_path):
    path = tmp_path / "kills.json"
    path.write_text(json.dumps({"seed": 0, "points": [], "jobs": {"a job": {}}}))
    with pytest.raises(ValueError, match="whose jobs are others, got 2 and 1"):
        kill.Record(kill.KillArguments(output=str(path), processes_per_worker=2))


def test_the_table_counts_points():
    values = {
        "points": [
            {"job": "a job", "stratum": "the seal", "differences": told} for told in ([], ["weights differ"], [])
        ],
        "ten_kills": [{"job": "a job, longer", "differences": []}],
    }
    rows = [line.split() for line in kill.table(values).splitlines()]
    assert rows == [
        ["points", "same"],
        ["the", "seal", "3", "2"],
        ["ten", "kills", "in", "one", "job", "1", "1"],
        ["all", "4", "3"],
    ]
    values["points"][1]["job"] = "Trainer, sgp, 2 x 2 shards"
    rows = [line.split() for line in kill.table(values).splitlines()]
    assert rows[1] == ["2", "x", "2", "shards,", "the", "seal", "1", "0"]
    assert rows[2:4] == [
        ["workers", "of", "one,", "ten", "kills", "in", "one", "job", "1", "1"],
        ["workers", "of", "one,", "the", "seal", "2", "2"],
    ]


RECORDS = Path(__file__).parents[1] / "benchmarks/records"
RECORD = RECORDS / "kills.json"


def test_the_record_of_workers_of_two_is_of_the_plan_and_has_no_difference():
    values = json.loads((RECORDS / "kills_node_workers.json").read_text())
    points, jobs = values["points"], kill.KillArguments(processes_per_worker=2, shards=2).jobs
    assert len(points) >= 100
    assert [(point["job"], point["stratum"]) for point in points] == kill.plan(len(points), values["seed"], jobs)
    for point in points:
        assert point["differences"] == []
        assert all(one["met"] for one in point["kills"])
    kinds = Counter(kill.kind_of(point["job"]) for point in points)
    words = " ".join((RECORDS.parents[1] / "docs" / "benchmarks.md").read_text().split())
    first, second = kinds["2 x 2 processes"], kinds["2 x 2 shards"]
    assert f"{len(points)} points, {first} of the first kind and {second} of the second" in words


def test_the_committed_record_is_of_the_plan_and_has_no_difference():
    """
    Its points are those of the plan, in order; every kill was met; no attempt lost more than what followed the last
    save.
    """
    values = json.loads(RECORD.read_text())
    points, longer = values["points"], values["ten_kills"]
    assert len(points) >= 200
    assert [(point["job"], point["stratum"]) for point in points] == kill.plan(len(points), values["seed"])
    assert {point["stratum"] for point in points} == set(kill.STRATA)
    assert {point["job"] for point in points} == set(values["jobs"]) == set(kill_jobs.JOBS)
    assert len(longer) >= 2
    assert all(len(point["kills"]) == 10 for point in longer)
    for point in [*points, *longer]:
        assert point["differences"] == []
        assert all(one["met"] for one in point["kills"])
        assert len(point["first_steps"]) == len(point["kills"]) + 1
        begun = [
            max(steps) for attempt in point["first_steps"] if (steps := [step for step in attempt if step is not None])
        ]
        assert begun == sorted(begun), "an attempt begins at the last save or after it"
        if point in points:
            assert all(one["kind"] in (*kill.STRATA[point["stratum"]], "resume") for one in point["kills"])
    assert kill.table(values).splitlines()[-1].split() == ["all", *[str(len(points) + len(longer))] * 2]


# ---- the comparison ----


def resumed(folder, *, second, end=1.0, kill_word="!backward"):
    """Killed in step 3, after the save of step 2; `second` are the steps of the second attempt."""
    first = [[*(f"w{step}" for step in range(4)), kill_word], [f"w{step}" for step in range(4)]]
    checkpoint(folder, 6, end)
    return run_of(folder, first, [second, second])


KILLED = (Kill(0, 0, "backward", 6),)


def test_a_run_that_went_on_from_its_last_save_is_the_same(reference, tmp_path):
    run = resumed(tmp_path / "b", second=["w2", "w3", "w4", "w5"])
    assert kill_runs.first_steps(reference, run) == [[0, 0], [2, 2]]
    assert kill_runs.differences(reference, run, KILLED) == []


@pytest.mark.parametrize(
    ("second", "end", "kill_word", "told"),
    [
        (
            ["w2", "w3", "wrong", "w5"],
            1.0,
            "!backward",
            "attempt 1, rank 1: weights differ after it had begun at step 2",
        ),
        (["wrong", "w3", "w4", "w5"], 1.0, "!backward", "attempt 1 begins at step [-1], step 3 had been reached"),
        (
            ["w0", "w1", "w2", "w3", "w4", "w5"],
            1.0,
            "!backward",
            "attempt 1 begins at step [0], step 3 had been reached",
        ),
        (["w2", "w3", "w4"], 1.0, "!backward", "the last step begun is 4 of 5"),
        (["w2", "w3", "w4", "w5"], 1.0000001, "!backward", "checkpoint-6/optimizer.pt differs at the end"),
        (["w2", "w3", "w4", "w5"], 1.0, "backward", f"{KILLED[0]} was never reached"),
    ],
)
def test_every_difference_is_told(reference, tmp_path, second, end, kill_word, told):
    run = resumed(tmp_path / "b", second=second, end=end, kill_word=kill_word)
    assert told in kill_runs.differences(reference, run, KILLED)


def test_a_failed_launch_and_a_missing_attempt_are_told(reference, tmp_path):
    run = resumed(tmp_path / "b", second=["w2", "w3", "w4", "w5"])
    run.exit_code = 1
    assert kill_runs.differences(reference, run, KILLED) == ["exit code 1 after 2 attempts, 1 kills were planned"]
    assert kill_runs.differences(reference, reference, KILLED) == [
        "exit code 0 after 1 attempts, 1 kills were planned"
    ]


def test_a_checkpoint_that_is_not_whole_or_not_there_is_told(reference, tmp_path):
    run = resumed(tmp_path / "b", second=["w2", "w3", "w4", "w5"])
    (tmp_path / "b/out/checkpoint-6/slowmo/manifest.json").unlink()
    assert any("manifest" in told for told in kill_runs.differences(reference, run, KILLED))
    (tmp_path / "b/out/checkpoint-6").rename(tmp_path / "b/out/checkpoint-4")
    assert "checkpoints at the end: ['checkpoint-4']" in kill_runs.differences(reference, run, KILLED)


def test_an_old_checkpoint_may_stay_where_nothing_was_left_to_save(reference, tmp_path):
    """
    Killed before its deletion: the second attempt has no step to take, and deletes nothing. With a step it would have.
    """
    folder = tmp_path / "b"
    checkpoint(folder, 4)
    checkpoint(folder, 6)
    first = [[*(f"w{step}" for step in range(6)), "!rotation"], [f"w{step}" for step in range(6)]]
    kills = (Kill(0, 0, "rotation", 3),)
    assert kill_runs.differences(reference, run_of(folder, first, [[], []]), kills) == []
    told = kill_runs.differences(reference, run_of(folder, first, [["w5"], ["w5"]]), kills)
    assert told == ["checkpoints at the end: ['checkpoint-4', 'checkpoint-6']"]
    shutil.rmtree(folder / "out/checkpoint-6")
    assert "checkpoints at the end: ['checkpoint-4']" in kill_runs.differences(
        reference, run_of(folder, first, [[], []]), kills
    )


def test_a_moment_that_never_came_is_no_point(reference, tmp_path, monkeypatch):
    whole = run_of(tmp_path, [[f"w{step}" for step in range(6)]] * 2)
    monkeypatch.setattr(kill, "launch", lambda job, folder, kills=(), launcher=None: reference if not kills else whole)
    record = kill.Record(kill.KillArguments(output=str(tmp_path / "kills.json"), folder=str(tmp_path / "runs")))
    kills = (Kill(0, 1, "end", 7),)
    assert record.add("points", "a job", kill_runs.Job("script"), kills) is False
    assert (record.values["points"], record.values["never_reached"]) == ([], 1)
    whole.notes[0, 1][3] = ["weights", "others"]
    (tmp_path / "runs").mkdir()
    assert record.add("points", "a job", kill_runs.Job("script"), kills) is True
    assert record.values["points"][0]["differences"] == [
        "attempt 0, rank 1: weights differ after it had begun at step 0"
    ]
