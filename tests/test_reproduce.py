"""
The reproduction: which rows a worker sees, the schedule, the grids, records that are resumed and never corrupted, the
statistics.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow.parquet
import pytest
import torch

from studies import plan as studies
from studies import reproduce, showing, small_images
from studies.plan import Run

RECIPES = Path(__file__).parents[1] / "recipes"
RUN = Run("table1", "image_classification", "local_sgd", 0.5, 0.1, seed=3, workers=4, batch_size=5)


def test_an_epoch_gives_every_row_once():
    """103 rows, 4 workers of 5: 5 steps, 3 rows left out, others every epoch."""
    parts = [small_images.rows_of(2, rank, RUN, 103) for rank in range(4)]
    assert [part.shape for part in parts] == [(5, 5)] * 4
    seen = torch.cat([part.flatten() for part in parts])
    assert len(seen.unique()) == 100
    assert not torch.equal(parts[0], small_images.rows_of(3, 0, RUN, 103))
    assert torch.equal(parts[0], small_images.rows_of(2, 0, replace(RUN, base="sgp", outer_momentum=0.0), 103)), (
        "a pair sees the same rows"
    )


def test_the_schedule_in_numbers():
    """200 steps: warm-up over 5, a tenth at 100, 150 and 175."""
    factor = [small_images.learning_rate_factor(step, 200) for step in range(200)]
    assert factor[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factor[99] == 1.0
    assert [factor[step] for step in (100, 149, 150, 174, 175, 199)] == pytest.approx(
        [0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
    )


def test_names_and_settings_of_image_runs_stay():
    """Records that are there are found by both."""
    settings = {
        **{
            "study": "table1",
            "task": "image_classification",
            "base": "sgp",
            "outer_momentum": 0.5,
            "inner_lr": 0.1,
            "seed": 1,
        },
        **{
            "sync_every": 12,
            "workers": 8,
            "inner_state": "auto",
            "exact_average": True,
            "epochs": 8,
            "batch_size": 16,
        },
    }
    (run,) = (run for run in studies.table1("image_classification", TUNED, 1) if run.base == "sgp" and run.slowmo)
    assert run.name == "image_classification/table1/sgp_beta0.5_lr0.1_seed1"
    assert list(asdict(run).items()) == list(settings.items())
    assert run.matches({"run": settings})


TUNED = {
    base: studies.Tuned(0.1, None if base == "all_reduce" else 0.5)
    for base in ("all_reduce", "local_sgd", "sgp", "osgp")
}


def tried(task):
    """Tuning records without slow momentum: the middle of the grid is best for every base."""
    grid = studies.TASKS[task]
    own = [grid.learning_rates[i] for i in (1, 0, 2)] if grid.learning_rates else []
    results = sorted((0.1, 0.2, 0.3), reverse=not grid.smaller_is_better)
    return [
        {**tuning_record(base, lr, 0.0, 0.0), "metrics": {grid.metric: result}}
        for base in grid.bases
        for lr, result in zip(own, results, strict=bool(own))
    ]


def test_the_table_has_the_papers_rows():
    runs = studies.table1("image_classification", TUNED, 5)
    counts = {}
    for run in runs:
        counts[run.base, run.slowmo] = counts.get((run.base, run.slowmo), 0) + 1
    assert counts == {
        **{("local_sgd", slowmo): 8 for slowmo in (False, True)},
        **{(base, slowmo): 5 for base in ("sgp", "osgp") for slowmo in (False, True)},
        ("all_reduce", False): 5,
    }
    assert runs == studies.table1("image_classification", TUNED), "5 seeds are the task's own"
    assert len({run.name for run in runs}) == len(runs)
    assert 0 not in {run.seed for run in runs}, "seed 0 chose the settings"
    assert {run.workers for run in runs} == {8}
    tuning = studies.tuning("image_classification", tried("image_classification"))
    for study in (tuning, studies.sweeps("image_classification", TUNED)):
        assert len({run.name for run in study}) == len(study)


def test_gossip_without_slow_momentum_is_as_published():
    """No exact average there, and that is what the gain of its partner is measured against."""
    for task in studies.TASKS:
        for run in (*studies.table1(task, TUNED), *studies.tuning(task, tried(task))):
            assert (
                run.config.exact_average
                == run.exact_average
                == (run.slowmo or run.base in ("local_sgd", "all_reduce"))
            ), run
            partner = studies.without_slowmo(asdict(run))
            assert (partner["outer_momentum"], partner["exact_average"]) == (
                0.0,
                run.base in ("local_sgd", "all_reduce"),
            )
            assert {key for key, value in asdict(run).items() if partner[key] != value} <= {
                "outer_momentum",
                "exact_average",
            }


def test_the_tables_rows_of_translation():
    """
    3 seeds of 3 bases with the paper's periods; AR-Adam has no slow momentum. At most 3 x 3 settings of a base are
    tuned.
    """
    runs = studies.table1("translation", TUNED)
    counts = Counter((run.base, run.slowmo, run.sync_every) for run in runs)
    periods = {"local_sgd": 12, "sgp": 48, "all_reduce": 12}
    assert counts == {
        (b, slow, tau): 3 for b, tau in periods.items() for slow in (False, True) if not slow or b != "all_reduce"
    }
    assert {run.seed for run in runs} == {1, 2, 3}
    tuning = Counter(run.base for run in studies.tuning("translation", tried("translation")))
    assert tuning == {"local_sgd": 6, "sgp": 6, "all_reduce": 3}


def tuning_record(base, lr, momentum, accuracy):
    settings = {"study": "tuning", "base": base, "slowmo": momentum > 0, "inner_lr": lr, "outer_momentum": momentum}
    return {**settings, "metrics": {"validation_accuracy": accuracy}}


def test_tuning_chooses_when_all_its_runs_are_there():
    """
    0.2, 0.4, 0.8 give 0.5, 0.8, 0.7: 0.4 is chosen; there momenta 0.3, 0.5, 0.7 give 0.6, 0.7, 0.9; 0.8's momentum
    does not count.
    """
    rates = [tuning_record("sgp", lr, 0.0, accuracy) for lr, accuracy in ((0.2, 0.5), (0.4, 0.8), (0.8, 0.7))]
    momenta = [tuning_record("sgp", 0.4, beta, accuracy) for beta, accuracy in ((0.3, 0.6), (0.5, 0.7), (0.7, 0.9))]
    foreign = [tuning_record("sgp", 0.8, 0.3, 1.0), tuning_record("osgp", 0.8, 0.0, 1.0)]

    def chosen(records):
        return studies.choose([*records, *foreign], "image_classification")["sgp"]

    assert chosen(rates[:2]) == studies.Tuned(None, None)
    assert chosen(rates) == studies.Tuned(0.4, None)
    assert chosen([*rates, *momenta[:2]]) == studies.Tuned(0.4, None)
    assert chosen([*rates, *momenta]) == studies.Tuned(0.4, 0.7)


def test_tuning_takes_the_smaller_nll_of_translation():
    """Rates 0.002, 0.004, 0.008 give 2.2, 2.1, 2.3; there momenta 0.3, 0.5, 0.7 give 2.0, 2.1, 2.2."""

    def told(lr, momentum, nll):
        record = tuning_record("sgp", lr, momentum, 0.0)
        return {**record, "metrics": {"validation_nll": nll}}

    rates = [told(lr, 0.0, nll) for lr, nll in ((0.002, 2.2), (0.004, 2.1), (0.008, 2.3))]
    momenta = [told(0.004, beta, nll) for beta, nll in ((0.3, 2.0), (0.5, 2.1), (0.7, 2.2))]
    assert studies.choose([*rates, *momenta], "translation")["sgp"] == studies.Tuned(0.004, 0.3)


def test_a_grid_widens_until_its_best_rate_is_inside():
    """
    From 0.0025, 0.005, 0.01: the NLL is least at the upper edge, so 0.02 is tried; now it is inside. A run that
    diverged to NaN is the worst, wherever it stands. Downwards alike.
    """

    def found(results):
        records = [
            {**tuning_record("sgp", lr, 0.0, 0.0), "metrics": {"validation_nll": nll}} for lr, nll in results.items()
        ]
        planned = {run.inner_lr for run in studies.tuning("multi30k", records) if run.base == "sgp" and not run.slowmo}
        return sorted(planned), studies.choose(records, "multi30k")["sgp"].inner_lr

    start = [0.0025, 0.005, 0.01]
    assert found({}) == found({0.0025: 3.0, 0.01: 2.0}) == (start, None)
    assert found({0.0025: 3.0, 0.005: 2.0, 0.01: 2.5}) == (start, 0.005)
    upper = {0.0025: 3.0, 0.005: 2.5, 0.01: 2.0}
    assert found(upper) == ([*start, 0.02], None)
    assert found({**upper, 0.02: 2.1}) == ([*start, 0.02], 0.01)
    assert found({**upper, 0.02: math.nan}) == ([*start, 0.02], 0.01)
    assert found({0.0025: math.nan, 0.005: 2.0, 0.01: math.nan}) == (start, 0.005)
    assert found({0.0025: 2.0, 0.005: 2.5, 0.01: math.nan}) == ([0.00125, *start], None)


def test_slow_momentum_at_half_the_rate_is_tried_and_chooses_nothing():
    """0.005 is best, and there β = 0.1; β = 0.5 is also tried at 0.0025, and would win if it were asked."""

    def told(lr, momentum, nll):
        return {**tuning_record("local_sgd", lr, momentum, 0.0), "metrics": {"validation_nll": nll}}

    rates = [told(lr, 0.0, nll) for lr, nll in ((0.0025, 2.4), (0.005, 2.2), (0.01, 3.4))]
    planned = [(run.inner_lr, run.outer_momentum) for run in studies.tuning("multi30k", rates) if run.slowmo]
    assert planned == [(0.005, 0.1), (0.005, 0.2), (0.005, 0.4), (0.0025, 0.5)]
    momenta = [told(0.005, beta, nll) for beta, nll in ((0.1, 2.2), (0.2, 2.3), (0.4, 3.3))]
    chosen = studies.choose([*rates, *momenta, told(0.0025, 0.5, 2.0)], "multi30k")
    assert chosen["local_sgd"] == studies.Tuned(0.005, 0.1)


def test_a_damaged_or_foreign_record_is_run_again(tmp_path):
    path = tmp_path / f"{RUN.name}.json"
    assert path.name == "local_sgd_beta0.5_lr0.1_workers4_batch5_seed3.json"
    assert reproduce.find_record(RUN, tmp_path) is None
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"run": asdict(RUN), "metrics": {}}))
    assert reproduce.find_record(RUN, tmp_path) is not None
    path.write_text(path.read_text()[:-5])
    assert reproduce.find_record(RUN, tmp_path) is None, "half a record"
    path.write_text(json.dumps({"run": asdict(replace(RUN, epochs=99)), "metrics": {}}))
    assert reproduce.find_record(RUN, tmp_path) is None, "another run's"


COLUMNS = showing.SHOWN["image_classification"].columns


def record(momentum, seed, accuracy):
    run = replace(RUN, outer_momentum=momentum, seed=seed)
    return {"run": asdict(run), "slowmo": run.slowmo, "seed": seed, "metrics": dict.fromkeys(COLUMNS, accuracy)}


def test_the_paired_gain_by_hand():
    """
    Differences 0.1, 0.2, 0.3: mean 0.2, sd 0.1, t(2) = 4.303: half-width 4.303 * 0.1 / sqrt(3) = 0.2484. Seed 9 has no
    partner.
    """
    plain = [record(0.0, seed, value) for seed, value in ((1, 0.5), (2, 0.5), (3, 0.5))]
    slow = [record(0.5, seed, value) for seed, value in ((1, 0.6), (2, 0.7), (3, 0.8), (9, 0.0))]
    assert showing.paired_gain(slow, plain, "test_accuracy") == "+0.2000 [-0.0484, +0.4484] (3)"
    rows = reproduce.table([*plain, *slow], "image_classification").splitlines()
    assert len(rows) == 4
    assert "0.5000 ± 0.0000 (3)" in rows[2]
    assert rows[3].endswith("| +0.2000 [-0.0484, +0.4484] (3) |")


def test_a_sweep_is_drawn_over_what_varies_alone(tmp_path):
    """Over tau at beta 0.5 three runs; beta 0 has one, which is no line. The file is a picture."""
    runs = [
        replace(RUN, outer_momentum=beta, sync_every=tau) for beta, tau in ((0.5, 24), (0.5, 3), (0.5, 12), (0.0, 6))
    ]
    runs.append(replace(RUN, outer_momentum=0.5, inner_state="average"))
    records = [
        {"run": asdict(run), "slowmo": run.slowmo, "seed": 1, "metrics": {"test_accuracy": 0.8 + run.sync_every / 100}}
        for run in runs
    ]
    (line,) = showing.swept_runs(records, "sync_every").values()
    assert [x for x, _ in line] == [3, 12, 24]
    assert [own for _, own in line] == [[records[1]], [records[2]], [records[0]]]
    other_seed = {**records[0], "run": {**records[0]["run"], "seed": 2}, "seed": 2, "metrics": {"test_accuracy": 1.10}}
    (line,) = showing.swept_runs([*records, other_seed], "sync_every").values()
    assert line[2] == (24, [records[0], other_seed]), "one point of both seeds"
    reproduce.plot_sweep(records, "image_classification", tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").read_bytes()[:4] == b"\x89PNG"


@pytest.fixture(scope="module")
def images():
    return small_images.load(str(RECIPES / "data" / "fashion_mnist"))


@pytest.mark.slow
@pytest.mark.parametrize("base", ["local_sgd", "osgp", "all_reduce"])
def test_a_run_writes_a_record_and_is_not_run_again(tmp_path, monkeypatch, images, base):
    small = replace(images, train=small_images.Part(images.train.images[:240], images.train.labels[:240]))
    monkeypatch.setattr(reproduce, "_load", lambda task, dataset_name: small)
    run = replace(RUN, base=base, outer_momentum=0.0 if base == "all_reduce" else 0.5, epochs=1, sync_every=3)
    written = reproduce.run_one(run, None, str(tmp_path))
    found = reproduce.find_record(run, tmp_path)
    assert found == json.loads(json.dumps(written))
    assert found["steps"] == 12
    assert found["rounds"] == (0 if base == "all_reduce" else 4)
    assert (found["bytes_sent_per_worker"] or 0) > 0 or base == "all_reduce"
    assert 0 < found["metrics"]["test_accuracy"] < 1
    assert {
        "study",
        "task",
        "dataset",
        "model",
        "workers",
        "outer_lr",
        "inner_lr",
        "seed",
        "curve",
        "versions",
        "commit",
        "hardware",
    } <= set(found)
    again = small_images.train(run, small)
    assert again["metrics"] == found["metrics"], "the same run, bit for bit"


def few_images(folder, rows, *, sort=False):
    for split in ("train", "test"):
        whole = pyarrow.parquet.read_table(RECIPES / "data" / "fashion_mnist" / f"{split}_small.parquet")
        part = whole.slice(0, rows)
        pyarrow.parquet.write_table(part.sort_by("label") if sort else part, folder / f"{split}.parquet")


@pytest.mark.parametrize("sort", [False, True])
def test_validation_has_all_classes_and_its_rows_train_nothing(tmp_path, sort):
    """Of 120 rows the last 20; of sorted ones, of which these would be one class, every sixth or so."""
    few_images(tmp_path, 120, sort=sort)
    found = small_images.load(str(tmp_path))
    assert (len(found.train.labels), len(found.validation.labels)) == (100, 20)
    assert len(found.validation.labels.unique()) >= 8
    assert torch.equal(found.told.labels, found.train.labels)
    trained = {image.numpy().tobytes() for image in small_images.normalised(found.train.images, found.mean, found.std)}
    assert not trained & {image.numpy().tobytes() for image in found.validation.images}


def test_fewer_rows_than_a_step_takes_are_refused(tmp_path):
    few_images(tmp_path, 120)
    run = replace(RUN, batch_size=32, epochs=1)
    said = r"^dataset_name must have >= 128 rows to train on, a batch of 32 for each of 4 workers, got 100"
    with pytest.raises(reproduce.DataError, match=said):
        reproduce.run_one(run, str(tmp_path), str(tmp_path / "records"))
    assert not (tmp_path / "records").exists()


@pytest.mark.slow
def test_a_run_has_the_threads_that_are_asked_for(tmp_path, monkeypatch, capsys):
    """In a process of its own, on few rows of one's own; the record says so. `--epochs` cuts the run."""
    few_images(tmp_path, 160)
    words = ["--study", "tuning", "--bases", "all_reduce", "--epochs", "1", "--max_runs", "1", "--jobs", "1"]
    images = ["--threads", "2", "--dataset_name", str(tmp_path), "--records", str(tmp_path / "records")]
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *words, *images])
    reproduce.main()
    assert "1 of 1 runs done, none left" in capsys.readouterr().out
    (path,) = (tmp_path / "records").rglob("*.json")
    assert ", 2 cores per run, " in json.loads(path.read_text())["hardware"]


@pytest.mark.slow
def test_runs_on_other_data_than_the_records_are_refused(tmp_path, monkeypatch, images):
    """Nothing is trained, written or removed; a damaged record says nothing, nor does one of another task."""
    others = {"image_classification": ("other", "c0ffee" * 9), "translation": ("x", "y")}
    for task, (name, digest) in others.items():
        for study, told in (("tuning", json.dumps({"dataset": name, "dataset_sha256": digest})), ("sweep", "{")):
            path = tmp_path / task / study / "sgp_seed0.json"
            path.parent.mkdir(parents=True)
            path.write_text(told)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(reproduce, "_load", lambda task, dataset_name: images)
    monkeypatch.setattr(small_images, "train", lambda *_: pytest.fail("trained"))
    with pytest.raises(
        reproduce.SettingError,
        match=r"^dataset_name must be .* 'other' with SHA-256 c0ffeec0ffee as in .*tuning/sgp.*got 'mine'.* Set --",
    ):
        reproduce.run_one(RUN, "mine", str(tmp_path))
    assert sorted(tmp_path.rglob("*")) == before
    same = {"dataset": images.name, "dataset_sha256": images.sha256}
    (tmp_path / "image_classification" / "tuning" / "sgp_seed0.json").write_text(json.dumps(same))
    monkeypatch.setattr(small_images, "train", lambda *_: same)
    assert reproduce.run_one(RUN, "mine", str(tmp_path))["dataset"] == images.name
    left = tmp_path / "image_classification" / "sweep" / "sgp_seed0.state" / "epoch2" / "progress.json"
    left.parent.mkdir(parents=True)
    left.write_text(json.dumps({"run": {"dataset_sha256": "facade" * 9}}))
    with pytest.raises(
        reproduce.SettingError, match=r"are of, SHA-256 facadefacade as in .*state/epoch2/progress\.json,"
    ):
        reproduce.run_one(RUN, "mine", str(tmp_path))
    assert left.exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            "--task translation --bases osgp",
            r"bases must be some of local_sgd, all_reduce, sgp, got 'osgp'. Set --bases.",
        ),
        ("--study published", "study published is of task multi30k, got task 'image_classification'. Set --task"),
        (
            "--scale paper --task multi30k",
            "task must be image_classification or translation with --scale paper, got 'multi30k'. Set --task.",
        ),
        ("--threads 0", "threads must be >= 1, got 0. Set --threads."),
        ("--seeds 0", "seeds must be >= 1, got 0. Set --seeds."),
        ("--study table1 --inner_lr 0", "inner_lr must be > 0 and < inf, got 0.0. Set --inner_lr."),
        ("--study table1 --outer_momentum 1", "outer_momentum must be > 0 and < 1, got 1.0. Set --outer_momentum."),
        ("--inner_lr 0.1", "inner_lr is of --study table1 and sweep at --scale small, got 0.1 with --study tuning"),
        (
            "--study table1 --scale gpu --outer_momentum 0.5",
            "outer_momentum is of --study table1 and sweep at --scale small, got 0.5 with --study table1 --scale gpu",
        ),
        ("--seeds 2", "seeds is of --study table1, got 2 with --study tuning. Leave it out."),
        (
            "--task multi30k --study sweep --outer_momentum 0.3",
            "outer_momentum must be left out with --study sweep of task multi30k, which runs 0.0, 0.2, 0.5, got 0.3.",
        ),
        ("--task speech", "argument --task: invalid choice: 'speech'"),
        ("--task translation --dataset_name /nowhere", r"dataset_name must be .*'/nowhere'.* Set --dataset_name"),
    ],
)
def test_bad_input_ends_with_one_line_that_names_the_flag(monkeypatch, tmp_path, flags, said):
    monkeypatch.setattr(
        reproduce,
        "run_all",
        lambda runs, asked, *where: reproduce.run_one(runs[0], asked.dataset_name, *map(str, where)),
    )
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "--study", "tuning", "--records", str(tmp_path), *flags.split()])
    with pytest.raises(SystemExit, match=f"^reproduce.py: {said}") as end:
        reproduce.main()
    assert "\n" not in str(end.value)


@pytest.mark.parametrize("study", ["table1", "sweep"])
def test_a_study_that_waits_for_tuning_says_so(monkeypatch, tmp_path, capsys, study):
    monkeypatch.setattr(
        sys, "argv", ["reproduce.py", "--task", "multi30k", "--study", study, "--records", str(tmp_path)]
    )
    reproduce.main()
    told = capsys.readouterr().out
    assert f"{study} waits for what tuning chooses" in told
    also = " and --outer_momentum" if study == "table1" else ""
    assert told.splitlines()[0].endswith(f"Run --study tuning first; or set --inner_lr{also}.")


@pytest.mark.parametrize("words", ["--study sweep --inner_lr 0.4", "--study table1 --bases local_sgd --inner_lr 0.4"])
def test_what_slow_momentum_needs_is_said(monkeypatch, tmp_path, capsys, words):
    """A rate alone is enough for all-reduce, whose runs are not asked for here."""
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *words.split(), "--records", str(tmp_path)])
    reproduce.main()
    told = capsys.readouterr().out.splitlines()[0]
    assert told.startswith(f"{words.split()[1]} waits for what tuning chooses")
    assert told.endswith("or set --inner_lr and --outer_momentum.")


def test_a_study_without_runs_of_a_base_says_so(monkeypatch, tmp_path, capsys):
    words = ["--task", "multi30k", "--study", "published", "--bases", "sgp", "--records", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *words])
    reproduce.main()
    assert capsys.readouterr().out.startswith("published of multi30k has no runs of sgp.")


def test_settings_that_are_given_need_no_tuning(tmp_path):
    """A rate alone gives the rows without slow momentum that are whole with it; both give all."""
    asked = reproduce.Arguments(study="table1", task="multi30k", inner_lr=0.005)
    assert [run.name for run in reproduce.study_runs(asked, tmp_path)] == [
        f"multi30k/table1/all_reduce_beta0.0_lr0.005_seed{seed}" for seed in (1, 2, 3)
    ]
    asked = reproduce.Arguments(study="table1", task="multi30k", inner_lr=0.005, outer_momentum=0.2, seeds=1)
    assert {(run.base, run.outer_momentum, run.inner_lr) for run in reproduce.study_runs(asked, tmp_path)} == {
        *(("all_reduce", 0.0, 0.005), ("local_sgd", 0.0, 0.005), ("local_sgd", 0.2, 0.005)),
        *(("sgp", 0.0, 0.005), ("sgp", 0.2, 0.005)),
    }
    for study in ("table1", "sweep"):
        assert reproduce.study_runs(reproduce.Arguments(study=study, task="multi30k"), tmp_path) == []
    two = reproduce.study_runs(reproduce.Arguments(study="sweep", task="multi30k", inner_lr=0.005), tmp_path)
    assert [(run.outer_momentum, run.seed) for run in two] == [(beta, s) for s in (1, 2, 3) for beta in (0, 0.2, 0.5)]
    assert {(run.base, run.workers, run.batch_size) for run in two} == {("local_sgd", 2, 1024)}
