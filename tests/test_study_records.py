"""The reproduction: the committed records, and the commands for a cluster."""

from __future__ import annotations

import itertools
import json
import math
import re
import string
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from transformers import HfArgumentParser

from studies import multi30k, reproduce, showing, small_translation
from studies import plan as studies
from studies.kept import Progress
from studies.run_records import command_of
from studies.small_runs import is_over
from translation import data as translation_data

# ---- the cluster's commands ----


def test_the_clusters_commands_are_the_papers_rows():
    """Three inner methods of CIFAR-10 and of ImageNet and two of WMT'16, each without and with; all-reduce once."""
    images, translations = (reproduce.paper_commands(task) for task in ("image_classification", "translation"))
    assert len(images) == 2 * (3 * 2 + 1)
    assert images[1].endswith("recipes/image/train.py --preset cifar10 --base local_sgd")
    assert images[2].endswith("--preset cifar10 --base sgp --outer_momentum 0")
    assert [command.partition(" --preset wmt16 ")[2] for command in translations] == [
        "--base local_sgd --outer_momentum 0",
        "--base local_sgd",
        "--base sgp --outer_momentum 0",
        "--base sgp",
        "--base all_reduce --outer_momentum 0",
    ]


MACHINES = {"cifar10": 4, "imagenet": 32, "wmt16": 8}  # of eight GPUs


@pytest.mark.parametrize("task", ["image_classification", "translation"])
def test_a_clusters_command_is_complete(monkeypatch, capsys, task):
    """As printed, on machine 2: accelerate's own parser knows machines, processes and address without a file."""
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "--scale", "paper", "--task", task])
    reproduce.main()
    monkeypatch.setattr("accelerate.commands.launch.default_config_file", "/nowhere")
    variables, *commands = capsys.readouterr().out.splitlines()
    values = dict(pair.split("=") for pair in variables.partition("#")[0].split())
    assert values.keys() == {"RANK", "MAIN", "PORT"}
    for command in commands:
        words = string.Template(command).substitute(values, RANK="2").split()
        assert words[:2] == ["accelerate", "launch"]
        parsed = launch_command_parser().parse_args(words[2:])
        assert parsed.config_file is None
        preset = parsed.training_script_args[parsed.training_script_args.index("--preset") + 1]
        assert (parsed.num_machines, parsed.num_processes) == (MACHINES[preset], 8 * MACHINES[preset])
        environment = prepare_multi_gpu_env(_validate_launch_command(parsed)[0])
        assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
        assert (parsed.nnodes, parsed.nproc_per_node, parsed.node_rank) == (str(MACHINES[preset]), "8", 2)
        assert parsed.rdzv_endpoint == f"{values['MAIN']}:{values['PORT']}"
        assert (reproduce.RECORDS.parents[1] / parsed.training_script).is_file()


# ---- commands ----


@pytest.mark.parametrize(
    "flags",
    [
        {"study": "tuning"},
        {"study": "tuning", "epochs": 3},
        {"study": "table1", "inner_lr": 0.3, "outer_momentum": 0.4},
        {"study": "table1", "inner_lr": 0.3, "outer_momentum": 0.4, "seeds": 11, "epochs": 2},
        {"study": "sweep", "inner_lr": 0.3, "outer_momentum": 0.4},
        {"study": "published", "epochs": 7},
    ],
    ids=str,
)
@pytest.mark.parametrize("task", reproduce.MODULES)
def test_the_command_of_a_record_runs_it_again(tmp_path, task, flags):
    """
    Of every run of a study: where there are no records, its command gives it. A row of the table without slow momentum
    is asked for with its pair's momentum.
    """
    flags = dict(flags)
    if flags["study"] == "sweep" and task == "multi30k":
        del flags["outer_momentum"]
    if flags["study"] == "published":
        task = "multi30k"
    runs = reproduce.study_runs(reproduce.Arguments(task=task, **flags), tmp_path)
    assert runs
    for run in runs:
        program, *words = command_of(run, "/own/set").removeprefix("python ").split()
        assert (reproduce.RECORDS.parents[1] / program).is_file()
        if run.base != "all_reduce" and not run.slowmo and "outer_momentum" in flags:
            words += ["--outer_momentum", str(flags["outer_momentum"])]
        (asked,) = HfArgumentParser(reproduce.Arguments).parse_args_into_dataclasses(words)
        assert run in reproduce.study_runs(asked, tmp_path)
        assert asked.dataset_name == "FOLDER", "a record names no place of one's machine"
        assert asked.bases == [run.base], "and no other row is run"


def test_a_command_without_a_folder_of_one_s_own():
    run = studies.published("multi30k")[0]
    assert command_of(run, None).endswith("reproduce.py --study published --task multi30k --bases all_reduce")


# ---- the committed records ----


COMMITTED = [json.loads(path.read_text()) for path in sorted(reproduce.RECORDS.glob("*/*/*.json"))]
FIELDS = """
study task dataset model base slowmo workers sync_every outer_lr outer_momentum inner_lr inner_state seed metrics
curve bytes_sent_per_worker seconds command versions commit hardware
"""
BEST = {
    "image_classification": ("validation_accuracy", max, "test_accuracy"),
    **dict.fromkeys(("translation", "multi30k"), ("validation_nll", min, "test_bleu")),
    "cifar10": ("test_accuracy", max, "test_accuracy"),
}
PARAMETERS = {
    "image_classification": 19_890,
    "translation": 180_736,
    "multi30k": 2_349_056,
    "cifar10": 11_173_962,
}
WORKERS = {"multi30k": 2}  # at least; 8 of other tasks
# 8 passes over 50,000 rows, 128 a step; over the help text; 200 passes, 4,096 a step. Digests of the training rows,
# and of all sentences.
STEPS = {"image_classification": 8 * (50_000 // 128), "translation": 7_436, "cifar10": 200 * (50_000 // 4_096)}
# Steps of a pass, by workers and tokens.
PASSES = {("multi30k", 4, 512): 242, ("multi30k", 2, 1024): 243, ("multi30k", 4, 2048): 62}
DATA = {
    "image_classification": ("zalando-datasets/fashion_mnist", "1f243a60"),
    "translation": (translation_data.SHIPPED_NAME, "79fe11f3"),
    "multi30k": ("multi30k", multi30k.SHA256[:8]),
    "cifar10": ("JPEG-coded CIFAR-10", "bd98cdb3"),
}


def test_committed_records_are_whole(subtests):
    for record in COMMITTED:
        with subtests.test(record["name"]):
            check_record(record)


def check_record(record):
    run = studies.run_of(record["run"])
    assert record["name"] == run.name
    assert run.matches(record)
    assert set(record) >= set(FIELDS.split())
    assert record["workers"] >= WORKERS.get(run.task, 8)
    steps_of_a_pass = PASSES.get((run.task, run.workers, run.batch_size))
    epochs = len(record["curve"]) if run.patience else run.epochs
    assert record["steps"] == (epochs * steps_of_a_pass if steps_of_a_pass else STEPS[run.task])
    assert (record["dataset"], record["dataset_sha256"][:8]) == DATA[record["task"]], (
        "runs on other data are not compared"
    )
    rounds = record["steps"] // record["sync_every"]
    assert rounds >= (60 if run.sync_every > 12 else 150) or (run.study == "sweep" and run.sync_every > 12)
    if run.task in ("multi30k", "translation"):
        means = small_translation.judging_of(run).means
        check_scores(record, ["", "_best", *(f"_mean_of_{mean}" for mean in means)])
    metric, best, test = BEST[record["task"]]
    columns = {column.removesuffix("_bits") for column in showing.SHOWN[record["task"]].columns}
    assert {test, f"best_{metric}", *columns} <= set(record["metrics"])
    assert record["metrics"][f"best_{metric}"] == best(look[metric] for look in record["curve"])
    assert len(record["curve"]) == epochs // getattr(run, "look_every", 1)
    assert not run.patience or is_over(run, Progress(epochs, curve=record["curve"]))
    if record["base"] == "local_sgd" and record["inner_state"] != "average":
        # A round's ring all-reduce of parameters and averaged buffers, fp32, and headers
        theory = 2 * (1 - 1 / run.workers) * 4 * PARAMETERS[record["task"]] * rounds
        assert theory <= record["bytes_sent_per_worker"] <= 1.05 * theory


def check_scores(record, models):
    """Of the last, the best and the mean model, on both sets: every kind of BLEU, and NLL in nats and bits."""
    bleus = ("bleu", "bleu_tokenised", "bleu_tokenised_lowercase", "bleu_compound_split")
    metrics = record["metrics"]
    for part, model in itertools.product(("validation", "test"), models):
        assert {f"{part}_{kind}{model}" for kind in bleus} <= set(metrics)
        assert metrics[f"{part}_nll_bits{model}"] == pytest.approx(metrics[f"{part}_nll{model}"] / math.log(2))
    assert "version:" in record["bleu_signature"]
    assert 0 < record["tokens_per_update"]["target"] <= record["tokens_per_update"]["target_padded"]
    assert len(record["dataset_sha256"]) == 64
    assert {"versions", "commit"} <= set(record)


def test_fairseqs_records_have_every_score():
    paths = sorted((reproduce.RECORDS / "multi30k").glob("fairseq_*.json"))
    assert len(paths) >= 3
    for path in paths:
        record = json.loads(path.read_text())
        check_scores(record, ["", "_best", "_mean_of_5"])
        assert record["run"]["seed"] <= 3 or {"command", "hardware"} <= set(record), "the first three have neither"


def test_the_tables_of_the_results_pages_are_those_of_the_records(subtests):
    docs = Path(__file__).parents[1] / "docs"
    page = "".join((docs / name).read_text() for name in ("results.md", "multi30k.md"))
    for study, task in sorted({(record["study"], record["task"]) for record in COMMITTED}):
        own = [record for record in COMMITTED if (record["study"], record["task"]) == (study, task)]
        for line in reproduce.table(own, task).splitlines()[2:]:
            with subtests.test(study=study, task=task):
                assert line in page


def test_the_figures_of_the_readme_are_those_of_the_records():
    own = [
        r for r in COMMITTED if (r["study"], r["task"], r["base"]) == ("table1", "image_classification", "local_sgd")
    ]
    rows = [line.split(" | ") for line in reproduce.table(own, "image_classification").splitlines()[2:]]
    without, with_it = (row[5].rpartition(" (")[0] for row in rows)
    gain, low, high = re.search(r"(\S+) \[(\S+), (\S+)\]", rows[1][6]).groups()
    page = " ".join((Path(__file__).parents[1] / "README.md").read_text().split())
    assert f"takes Local SGD from {without} to {with_it} (8 seeds; paired gain {gain}" in page
    assert f"95 % interval {low} to {high})" in page
    assert {row["seed"] for row in own} == set(range(1, 9))
