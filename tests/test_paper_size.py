"""
CIFAR-10 at the paper's size, in small: batched gradients are each worker's own, a run that is left is gone on with bit
for bit, and the command does what it says.
"""

from __future__ import annotations

import gc
import io
import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from image.presets import PRESETS, decay_factor
from slowmo_hf import SlowMoOptimizer, run_in_process
from studies import cifar10, gpu, kept, reproduce
from studies.kept import Clock, Keeper
from studies.plan import PaperRun, make_run

RECIPES = Path(__file__).parents[1] / "recipes"

SIZES = {"workers": 4, "batch_size": 4, "architecture": "small", "look_every": 2}
CASES = {
    "local sgd": ("local_sgd", 0.0),
    "slow momentum": ("local_sgd", 0.6),
    "sgp": ("sgp", 0.0),
    "sgp, slow momentum": ("sgp", 0.6),
}


def small_run(case, **others):
    base, momentum = CASES[case]
    run = make_run("table1", "cifar10", base, momentum, 0.1, 1, **{**SIZES, "epochs": 3, **others})
    assert isinstance(run, PaperRun)
    return run


@pytest.fixture(scope="module", autouse=True)
def _few_objects_to_look_through():
    """Every worker looks for DDP wrappers among all objects at its start; these here are left out."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def images():
    """98 training images of 16 pixels a side: 6 steps of 4 workers an epoch."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (98, 3, 16, 16), generator=generator, dtype=torch.uint8)
    labels = torch.randint(10, (98,), generator=generator)
    part = cifar10.Part(pixels, labels)
    names = [str(label) for label in range(10)]
    padded = torch.nn.functional.pad(pixels, (2,) * 4)
    return cifar10.Images("noise", "c0ffee", padded, part, part, cifar10.Part(pixels[:9], labels[:9]), names, 0.5, 0.3)


# ---- gradients ----


def trained(run, data, machine):
    """Parameters and buffers of all workers after an epoch, inside a round or at its end."""

    def work(rank):
        job = cifar10.make_job(run, data, machine, rank)
        optimizer = SlowMoOptimizer(job.inner, run.config)
        for draws in job.batches(0):
            job.learn(draws)
            optimizer.step()
            optimizer.zero_grad()
        return {name: value.cpu().clone() for name, value in job.model.state_dict().items()}

    return run_in_process(work, run.workers)


def check_same(first, second, tolerance):
    for mine, other in zip(first, second, strict=True):
        assert list(mine) == list(other)
        for name, value in mine.items():
            torch.testing.assert_close(other[name], value, rtol=tolerance, atol=tolerance)


@pytest.fixture
def in_float64(monkeypatch):
    make_model, normalised = cifar10.make_model, cifar10.normalised
    monkeypatch.setattr(cifar10, "make_model", lambda *args: make_model(*args).double())
    monkeypatch.setattr(cifar10, "normalised", lambda *args: normalised(*args).double())


@pytest.mark.parametrize(("case", "way"), [*((case, "batched") for case in CASES), ("sgp", "in_turn")])
def test_one_pass_for_all_trains_what_a_pass_each_does(images, case, way):
    """After 6 steps, 2 rounds, every parameter and buffer of every worker is the same to float32 rounding."""
    run = small_run(case, sync_every=3)
    alone, joint = (trained(run, images, cifar10.Machine("cpu", gradients)) for gradients in ("alone", way))
    check_same(alone, joint, 1e-5)
    assert int(joint[0]["resnet.embedder.embedder.normalization.num_batches_tracked"]) == 6


@pytest.mark.parametrize("case", ["slow momentum", "sgp"])
@pytest.mark.usefixtures("in_float64")
def test_the_difference_is_rounding(images, case):
    """In float64 it is 1e-10 at most; and with sync_every=4 the 6 steps end inside a round, where workers differ."""
    run = small_run(case, sync_every=4)
    alone, batched = (trained(run, images, cifar10.Machine("cpu", gradients)) for gradients in ("alone", "batched"))
    check_same(alone, batched, 1e-10)
    weight = "classifier.1.weight"
    assert not torch.equal(batched[0][weight], batched[1][weight])


@pytest.mark.usefixtures("in_float64")
def test_the_layout_in_memory_changes_nothing(images, monkeypatch):
    run, machine = small_run("slow momentum", sync_every=3), cifar10.Machine("cpu")
    plain = trained(run, images, machine)
    monkeypatch.setattr(cifar10.Machine, "channels_last", True)
    check_same(plain, trained(run, images, machine), 1e-10)


@pytest.mark.cuda
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", cifar10.GRADIENTS)
def test_a_captured_pass_on_a_gpu_trains_what_the_cpu_does(images, monkeypatch, case, way):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    run = small_run(case, sync_every=3)
    parts = {name: cifar10.Part(part.images.cuda(), part.labels.cuda()) for name, part in (("train", images.train),)}
    on_gpu = replace(images, padded=images.padded.cuda(), **parts)
    cpu = trained(run, images, cifar10.Machine("cpu", "alone"))
    check_same(cpu, trained(run, on_gpu, cifar10.Machine("cuda", way)), 1e-3)


def test_examples_by_hand(images):
    """Each image mirrored or not, with 2 black pixels around it, and the 16 x 16 at the drawn place cut out."""
    run = small_run("local sgd")
    draws = cifar10.draws_of(0, 1, run, images)
    assert draws.shape == (6, 4, 4)
    got, labels = cifar10.examples(draws, images)
    assert got.shape == (6, 4, 3, 16, 16)
    for step in range(6):
        for place, (row, mirrored, down, across) in enumerate(draws[step].T.tolist()):
            image = images.train.images[row]
            black = torch.zeros(3, 20, 20, dtype=torch.uint8)
            black[:, 2:18, 2:18] = image
            cut = black[:, down : down + 16, across : across + 16]
            right = cifar10.normalised(cut.flip(-1) if mirrored else cut, 0.5, 0.3)
            torch.testing.assert_close(got[step, place], right)
            assert labels[step, place] == images.train.labels[row]
    assert set(draws[:, 1].flatten().tolist()) == {0, 1}
    assert set(draws[:, 2:].flatten().tolist()) == {0, 1, 2, 3, 4}
    assert torch.equal(draws, cifar10.draws_of(0, 1, run, images)), "they depend on seed, epoch and rank alone"
    for epoch, rank in ((1, 1), (0, 2)):
        assert not torch.equal(draws[:, 1:], cifar10.draws_of(epoch, rank, run, images)[:, 1:])


# ---- the plan ----


def test_the_rows_are_the_papers_most_telling_first():
    runs = gpu.gpu_runs(None, None, {})
    assert [(run.base, run.outer_momentum, run.seed) for run in runs] == [
        (base, momentum, seed) for base in ("local_sgd", "sgp") for seed in (1, 2, 3) for momentum in (0.0, 0.6)
    ]
    shared = {(run.workers, run.batch_size, run.epochs, run.sync_every, run.inner_lr) for run in runs}
    assert shared == {(32, 128, 200, 12, 1.6)}
    assert {run.architecture for run in runs} == {"resnet18"}
    assert runs[1].name == "cifar10/table1/local_sgd_beta0.6_lr1.6_seed1"
    assert Counter(run.exact_average for run in runs if run.base == "sgp") == {True: 3, False: 3}
    smaller = gpu.gpu_runs(1, ["sgp"], {**SIZES, "max_train_samples": 64, "epochs": 2})
    assert smaller[0].name == "cifar10/table1/sgp_beta0.0_lr1.6_workers4_epochs2_batch4_small_rows64_look2_seed1"


def test_the_schedule_is_the_presets():
    """12 steps an epoch: 50,000 rows, 4,096 a step."""
    preset = PRESETS["cifar10"]
    decays = [12 * epoch for epoch in preset["decay_epochs"]]
    for step in range(2400):
        right = decay_factor(step, 12 * preset["warmup_epochs"], decays)
        assert cifar10.learning_rate_factor(step, 2400) == pytest.approx(right)


# ---- a run that is left ----


class Script:
    """A clock that gives these answers, then time without end."""

    end = 0.0

    def __init__(self, answers):
        self.answers = iter(answers)

    def has(self, seconds):
        return next(self.answers, True)


def untimed(told):
    return {key: value for key, value in told.items() if "seconds" not in key}


@pytest.mark.parametrize(("case", "sync_every"), [("slow momentum", 12), ("sgp", 12), ("sgp, slow momentum", 6)])
def test_a_run_that_is_left_ends_as_one_that_is_not(images, tmp_path, monkeypatch, case, sync_every):
    """
    Left after 6 steps and after 12, inside a round of 12 and at its end, or at the ends of rounds of 6: the record and
    all workers' parameters and buffers are those of the whole run, bit for bit. Exchanges of a round in which gossip
    was left are in no round's report, and their bytes in no record.
    """
    run, models = small_run(case, sync_every=sync_every), []
    make_model = cifar10.make_model
    monkeypatch.setattr(cifar10, "make_model", lambda *args: models.append(make_model(*args)) or models[-1])
    machine = cifar10.Machine("cpu")
    whole = cifar10.train(run, images, machine)
    right = [model.state_dict() for model in models]
    for number in range(3):
        keeper = Keeper(tmp_path / "state", {"run": "this"}, 25, Script([False]), cpu=True)
        assert (keeper.newest and keeper.newest.name) == (None, "epoch1", "epoch2")[number]
        models.clear()
        told = cifar10.train(run, images, machine, keeper)
        assert (told is None) == (number < 2)
        assert len(list((tmp_path / "state").iterdir())) == 1, "older ones are removed"
    if run.base == "sgp" and sync_every == 12:
        assert told.pop("bytes_sent_per_worker") < whole.pop("bytes_sent_per_worker")
    assert untimed(told) == untimed(whole)
    assert [look["epoch"] for look in told["curve"]] == [2, 3]
    for model, state in zip(models, right, strict=True):
        for name, value in model.state_dict().items():
            assert torch.equal(value, state[name]), name
    keeper.forget()
    assert not (tmp_path / "state").exists()


def test_a_state_that_is_damaged_or_of_another_run_is_not_taken_up(images, tmp_path, capsys):
    run, machine = small_run("local sgd"), cifar10.Machine("cpu")
    keeper = Keeper(tmp_path, {"run": "this"}, 25, Script([False]), cpu=True)
    assert cifar10.train(run, images, machine, keeper) is None
    assert Keeper(tmp_path, {"run": "this"}, 25, Clock(None), cpu=True).newest == tmp_path / "epoch1"
    assert not capsys.readouterr().out
    assert Keeper(tmp_path, {"run": "other"}, 25, Clock(None), cpu=True).newest is None
    told = f"{tmp_path / 'epoch1'} is of {{'run': 'this'}}, not of {{'run': 'other'}}: the run begins anew"
    assert capsys.readouterr().out.startswith(told)
    part = tmp_path / "epoch1" / "slowmo" / "worker_2.safetensors"
    part.write_bytes(part.read_bytes()[:-1])
    assert Keeper(tmp_path, {"run": "this"}, 25, Clock(None), cpu=True).newest is None


def test_when_a_state_is_kept(tmp_path, monkeypatch):
    """Every 2 epochs; with a limit, after the first one too; never after the last. Time for two more is kept."""
    asked = []
    keeper = Keeper(tmp_path, {}, 2, Clock(None), cpu=True)
    progress = [kept.Progress(epochs=epoch, longest_epoch=10.0) for epoch in range(1, 7)]
    assert [keeper.decide([p, p], 6)[1] for p in progress] == [(p.epochs in (2, 4), False) for p in progress]
    limited = Keeper(tmp_path, {}, 100, Clock(1.0), cpu=True)
    monkeypatch.setattr(limited.clock, "has", lambda seconds: asked.append(seconds) or seconds < 21)
    assert limited.decide(progress[:1], 6) == [(True, False)]
    limited.longest_save = 1.0
    assert limited.decide(progress[1:2], 6) == [(True, True)]
    assert limited.decide(progress[5:], 6) == [(False, False)]
    assert asked == [20.0, 22.0]


# ---- the command ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """CIFAR-10's columns and format in small: 70 and 10 JPEG images of noise."""
    path, noise = tmp_path_factory.mktemp("cifar10"), np.random.default_rng(0)
    kinds = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=cifar10.CLASSES)})
    for split, rows in (("train", 70), ("test", 10)):
        coded = []
        for _ in range(rows):
            file = io.BytesIO()
            Image.fromarray(noise.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file, "JPEG")
            coded.append({"bytes": file.getvalue(), "path": None})
        labels = noise.integers(0, 10, rows).tolist()
        datasets.Dataset.from_dict({"img": coded, "label": labels}, kinds).to_parquet(path / f"{split}.parquet")
    return path


FLAGS = (
    "--scale gpu --device cpu --epochs 2 --seeds 1 --bases local_sgd --workers 4 --batch_size 4 --architecture small"
)


@pytest.mark.slow
def test_the_command_goes_on_with_what_was_left(folder, tmp_path, monkeypatch, capsys):
    """
    The first call leaves its first run after an epoch, the second ends it and starts no other, the third does the
    other, and the fourth finds all done. A call without a limit writes the same records.
    """
    main = f"reproduce.py {FLAGS} --architecture small --dataset_name {folder} --max_train_samples 64"
    answers = [[True, False], [True, False], [], []]
    said = []
    for script in answers:
        monkeypatch.setattr(gpu, "Clock", lambda minutes, script=script: Script(script))
        monkeypatch.setattr(sys, "argv", f"{main} --minutes 1 --records {tmp_path}/cut".split())
        reproduce.main()
        said.append(capsys.readouterr().out)
    assert "_seed1 is left in " in said[0]
    assert "no time is left for another run" in said[1]
    assert [text.splitlines()[0] for text in said] == [f"{count} runs to do" for count in (2, 2, 1, 0)]
    assert "Data: JPEG-coded CIFAR-10, 64 and 10 rows\n" in said[3]
    assert "| local_sgd, γ 1.6, τ 12, β 0.6 | 0." in said[3]
    monkeypatch.undo()
    monkeypatch.setattr(sys, "argv", f"{main} --records {tmp_path}/whole".split())
    reproduce.main()
    cut, whole = (sorted((tmp_path / name).rglob("*")) for name in ("cut", "whole"))
    assert [path.name for path in cut] == [path.name for path in whole], "no state is left"
    records = [[json.loads(path.read_text()) for path in paths if path.suffix == ".json"] for paths in (cut, whole)]
    assert len(records[0]) == 2
    for mine, other in zip(*records, strict=True):
        assert untimed(mine) == untimed(other)
        assert mine["dataset"] == "JPEG-coded CIFAR-10, 64 and 10 rows"
        assert mine["device"].startswith("cpu, ")
        assert mine["seconds_per_epoch"] > 0
        assert mine["steps"] == 2 * (64 // 16)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--scale gpu --task translation", "task must be left out with --scale gpu, got 'translation'"),
        ("--scale gpu --study sweep", "study must be left out with --scale gpu, got 'sweep'"),
        ("--scale gpu --bases osgp", "bases must be some of local_sgd, sgp, got 'osgp'. Set --bases."),
        ("--scale gpu --minutes -1", "minutes must be >= 0, got -1.0. Set --minutes."),
        ("--scale gpu --architecture vit", "architecture must be small or resnet18, got 'vit'. Set --architecture."),
        ("--workers 4", "workers is for --scale gpu, got 4 with --scale small and --task image_classification."),
        ("--device cpu", "device is for --scale gpu and --task multi30k, got 'cpu' with --scale small"),
        ("--scale gpu --dataset_name /nowhere", "dataset_name must be .*'/nowhere'.* Set --dataset_name"),
    ],
)
def test_bad_input_ends_with_one_line_that_names_the_flag(monkeypatch, tmp_path, flags, said):
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "--records", str(tmp_path), *flags.split()])
    with pytest.raises(SystemExit, match=f"^reproduce.py: {said}"):
        reproduce.main()
