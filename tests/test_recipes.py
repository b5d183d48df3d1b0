"""The main job: run as a user runs it, on the shipped images, and its parts against stated values."""

import dataclasses
import json
import os
import pickle
import socket
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from accelerate.commands.config.config_args import ClusterConfig
from packaging.version import Version
from PIL import Image
from transformers import AutoModelForImageClassification, EvalPrediction

from harness import patience
from image import data as image_data
from image import pixels
from image import train as recipe
from image.data import load_images
from image.pixels import Batch
from image.small_resnet import SmallResNetForImageClassification, make_model
from launcher import ACCELERATE_LAUNCH, run_really, run_script
from records import DataError
from tiny import ends_with_one_line

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "recipes"

SHORT = (
    "--max_train_samples 768 --max_eval_samples 250 --per_device_eval_batch_size 125 --width 8 --logging_steps "
    "10 --disable_tqdm 1"
)
RECORD_KEYS = """
    study task dataset train_rows test_rows test_split model base slowmo exact_average workers processes
    sync_every outer_lr outer_momentum inner_optimizer inner_lr inner_state seed steps metrics curve rounds
    seconds bytes_sent_per_worker seconds_communicating command versions commit hardware
"""


# ---- the job, as a user starts it ----


def run_recipe(output_dir: Path, flags: str, launcher: str | None = None):
    """What the program said, and its record. Without a `launcher` the fork server starts its two processes."""
    command = ["recipes/image/train.py", "--output_dir", str(output_dir), *flags.split()]
    said = run_script(command, 2, output_dir) if launcher is None else run_really(command, launcher)
    return said, json.loads((output_dir / "record.json").read_text())


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """Two workers, 24 steps, sync_every 5: 4 rounds, and an end inside the fifth."""
    folder = tmp_path_factory.mktemp("recipe")
    said, record = run_recipe(
        folder, f"{SHORT} --num_train_epochs 2 --sync_every 5 --plot --report_to tensorboard", ACCELERATE_LAUNCH
    )
    return folder, said, record


@pytest.mark.slow
def test_record_is_complete_and_right(short_run):
    folder, _, record = short_run
    assert set(record) == set(RECORD_KEYS.split())
    assert not (folder / "record.tmp").exists()
    assert (record["workers"], record["base"], record["slowmo"], record["outer_momentum"]) == (
        2,
        "local_sgd",
        True,
        0.5,
    )
    assert (record["train_rows"], record["test_rows"], record["test_split"]) == (768, 250, "test")
    assert (record["inner_optimizer"], record["inner_lr"]) == ("SGD", 0.1)
    assert record["steps"] == 2 * 768 // (2 * 32) == 24
    assert record["rounds"] == record["steps"] // record["sync_every"] == 4
    assert [point["step"] for point in record["curve"]] == [12, 24]
    assert record["curve"][-1]["test_accuracy"] == record["metrics"]["test_accuracy"]
    assert 0 < record["seconds_communicating"] < record["seconds"]


@pytest.mark.slow
def test_record_counts_every_round_s_bytes(short_run):
    """
    Two workers in a ring send their payload once: fp32 parameters and BatchNorm statistics, and at most 1 KiB per
    round.
    """
    folder, _, record = short_run
    model = AutoModelForImageClassification.from_pretrained(folder)
    floats = [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]
    payload = 4 * sum(tensor.numel() for tensor in floats)
    assert record["rounds"] * payload <= record["bytes_sent_per_worker"] <= record["rounds"] * (payload + 1024)


@pytest.mark.slow
def test_saved_model_has_the_recorded_accuracy(short_run):
    folder, _, record = short_run
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    sets = load_images(None, max_train_samples=768, max_eval_samples=250)
    batch = Batch(*pixels.mean_and_std(pixels.make_dataset(sets.train, sets, seed=0)))
    rows = pixels.make_dataset(sets.test, sets)
    right = 0
    for start in (0, 125):
        inputs = batch([rows[index] for index in range(start, start + 125)])
        with torch.no_grad():
            right += int((model(inputs["pixel_values"]).logits.argmax(-1) == inputs["labels"]).sum())
    assert right / 250 == record["metrics"]["test_accuracy"]
    assert model.config.id2label[9] == "Ankle boot"


@pytest.mark.slow
def test_table_plot_and_tensorboard(short_run):
    folder, said, record = short_run
    assert f"accuracy of the average {record['metrics']['test_accuracy']:.4f}" in said
    assert f"bytes sent per worker   {record['bytes_sent_per_worker']:,}" in said
    assert "rounds                  4" in said
    assert "Warning" not in said, said
    with Image.open(folder / "training.png") as picture:
        assert picture.format == "PNG"
        assert np.asarray(picture.convert("L")).std() > 5, "an empty picture"
    events = list(folder.glob("runs/*/events.out.tfevents.*"))
    assert events
    assert all(path.stat().st_size > 0 for path in events)


@pytest.mark.slow
def test_the_baseline_is_one_flag_away(tmp_path):
    said, record = run_recipe(tmp_path, f"{SHORT} --max_steps 3 --base all_reduce --outer_momentum 0 --plot")
    assert "slow momentum is off: this is all-reduce" in said
    assert (record["workers"], record["base"], record["slowmo"], record["rounds"], record["steps"]) == (
        2,
        "all_reduce",
        False,
        0,
        3,
    )
    assert record["bytes_sent_per_worker"] is None
    assert (tmp_path / "training.png").exists()


@pytest.mark.slow
def test_one_process_says_that_nothing_is_averaged(tmp_path):
    said, record = run_recipe(tmp_path, f"{SHORT} --max_steps 3 --sync_every 2", launcher="")
    assert "one worker: nothing is averaged" in said
    assert (record["workers"], record["rounds"], record["bytes_sent_per_worker"]) == (1, 1, 0)


@pytest.mark.slow
def test_class_folders_and_another_optimizer(tmp_path):
    """
    An ImageNet-like folder of small images, tested on val, with Trainer's AdamW: said once for two workers, and
    recorded.
    """
    folder = write_images(tmp_path / "images", {"train/cat": 20, "train/dog": 20, "val/cat": 2, "val/dog": 2})
    flags = (
        f"--dataset_name {folder} --optim adamw_torch --learning_rate 1e-3 --width 8 --max_steps 3 --sync_every "
        "2 --disable_tqdm 1"
    )
    said, record = run_recipe(tmp_path / "out", f"{flags} --per_device_train_batch_size 8")
    assert said.count("test_split was not given: the test images are those of 'val'") == 1
    assert (record["dataset"], record["train_rows"], record["test_rows"], record["test_split"]) == (
        folder,
        40,
        4,
        "val",
    )
    assert (record["inner_optimizer"], record["inner_lr"], record["rounds"]) == ("AdamW", 1e-3, 1)
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "out").config.id2label == {0: "cat", 1: "dog"}


def test_flags_are_the_config_s_fields():
    flags = (
        "--sync_every 7 --outer_momentum 0.25 --outer_lr 0.5 --inner_state average --model_buffers local "
        "--learning_rate 0.3"
    )
    script, config, args = recipe.parse(flags.split())
    assert (config.sync_every, config.outer_momentum, config.outer_lr) == (7, 0.25, 0.5)
    assert (config.inner_state, config.model_buffers, args.learning_rate) == ("average", "local", 0.3)
    assert script.dataset_name is None


def test_defaults_meet_at_logs():
    """Logging gathers the loss of all ranks: by default only where they meet anyway. Slow momentum is on."""
    _, config, args = recipe.parse([])
    assert args.logging_steps % config.sync_every == 0
    assert config.outer_momentum == 0.5


def test_wrong_flag_ends_with_one_line():
    with pytest.raises(SystemExit, match=r"^train.py: sync_every must be >= 1 optimizer step, got 0"):
        recipe.parse(["--sync_every", "0"])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--optim adma", r"adma is not a valid OptimizerNames, please select one of \['adamw_torch', .*'sgd', "),
        (
            "--optim_args momentum=0.5",
            "optim_args is for other optimizers than sgd, got 'momentum=0.5'. Use --inner_momentum",
        ),
        (
            "--optim rmsprop --optim_args alpha",
            "optim_args must be name=value, several of them with commas between, got 'alpha'",
        ),
        (
            "--optim adamw_torch --inner_momentum 0.5",
            "inner_momentum is for --optim sgd, got 0.5 with --optim adamw_torch",
        ),
        ("--optim adamw_torch --adam_beta1 2", "Invalid beta parameter at index 0: 2.0"),
        ("--optim galore_adamw", "You need to install `galore_torch` in order to use GaLore"),
        ("--weight_decay -1", "Invalid weight_decay value: -1.0"),
        ("--report_to nonsense", "nonsense is not supported, only "),
        ("--width 0", "width must be >= 1 channel, got 0. Set --width."),
        ("--sync_every often", "argument --sync_every.*: invalid int value: 'often'"),
        ("--no_such_flag 1", r"Some specified arguments are not used .* \['--no_such_flag', '1'\]"),
        ("--dataset_name /no/such/folder", "dataset_name must be .* got '/no/such/folder', which is no folder"),
        ("--max_eval_samples 0", "max_eval_samples must be >= 1 row, got 0"),
    ],
)
def test_wrong_value_ends_with_one_line(tmp_path, monkeypatch, capfd, flags, said):
    """Nothing else is said, no traceback and no usage; Python's exit code for a text is 1."""
    shown = f"--output_dir {tmp_path} --use_cpu 1 --width 4 --max_train_samples 64 --max_eval_samples 8"
    ends_with_one_line(recipe, shown, flags, said, monkeypatch, capfd)


def test_an_error_of_many_lines_ends_as_one():
    with pytest.raises(SystemExit, match=r"^train.py: no such column: - image - label$"):
        recipe.end(ValueError("no such column:\n  - image\n  - label\n"))


# ---- the inner optimizer ----


def trainer_with(folder: Path, flags: str = ""):
    script, config, args = recipe.parse(
        f"--output_dir {folder} --use_cpu 1 --width 4 --max_train_samples 64 {flags}".split()
    )
    sets = load_images(None, max_train_samples=64, max_eval_samples=8)
    return recipe.make_trainer(script, config, args, sets)


def test_default_optimizer(tmp_path):
    """The SGD that the recorded runs used: one group with every parameter, Nesterov momentum, weight decay on all."""
    trainer = trainer_with(tmp_path)
    assert type(trainer.optimizer) is torch.optim.SGD
    (group,) = trainer.optimizer.param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in trainer.model.parameters()]
    settings = {name: value for name, value in group.items() if name != "params"}
    stock = torch.optim.SGD([torch.zeros(1)]).defaults
    assert settings == {**stock, "lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}


def test_sgd_flags(tmp_path):
    trainer = trainer_with(tmp_path, "--inner_momentum 0 --weight_decay 0.01 --learning_rate 0.3")
    (group,) = trainer.optimizer.param_groups
    assert (group["lr"], group["momentum"], group["nesterov"], group["weight_decay"]) == (0.3, 0, False, 0.01)


def test_named_optimizer_is_trainer_s_own(tmp_path):
    """Its class and settings from its own flags; no weight decay on biases."""
    flags = (
        "--optim adamw_torch --adam_beta1 0.8 --adam_beta2 0.95 --adam_epsilon 1e-7 --weight_decay 0.02 "
        "--learning_rate 2e-3"
    )
    trainer = trainer_with(tmp_path, flags)
    assert type(trainer.optimizer) is torch.optim.AdamW
    decayed, spared = trainer.optimizer.param_groups
    for group in (decayed, spared):
        assert (group["betas"], group["eps"], group["lr"]) == ((0.8, 0.95), 1e-7, 2e-3)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.02, 0.0)
    biases = {id(p) for name, p in trainer.model.named_parameters() if name.endswith("bias")}
    assert biases <= {id(p) for p in spared["params"]}
    assert len(decayed["params"]) + len(spared["params"]) == len(list(trainer.model.parameters()))


@pytest.mark.skipif(Version(version("transformers")) < Version("5"), reason="its Trainer gives RMSprop no arguments")
def test_optim_args_reach_the_named_optimizer(tmp_path):
    trainer = trainer_with(tmp_path, "--optim rmsprop --optim_args alpha=0.9,momentum=0.5 --learning_rate 1e-3")
    assert type(trainer.optimizer) is torch.optim.RMSprop
    assert (trainer.optimizer.param_groups[0]["alpha"], trainer.optimizer.param_groups[0]["momentum"]) == (0.9, 0.5)


def test_choices_are_said(tmp_path, capsys):
    """Where the recipe chose for the user; silent with the defaults."""
    sets = load_images(None, max_train_samples=8, max_eval_samples=8)
    script, _, args = recipe.parse(["--output_dir", str(tmp_path), "--use_cpu", "1"])
    recipe.print_choices(script, args, sets)
    assert capsys.readouterr().out == ""
    script, _, args = recipe.parse(["--output_dir", str(tmp_path), "--use_cpu", "1", "--optim", "adamw_torch"])
    recipe.print_choices(script, args, dataclasses.replace(sets, test_split="val"))
    assert capsys.readouterr().out.splitlines() == [
        "test_split was not given: the test images are those of 'val'",
        "learning_rate=0.1 was chosen for sgd, not for adamw_torch: set --learning_rate",
    ]


def test_accuracy():
    logits = np.array([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
    assert recipe.accuracy(EvalPrediction(logits, np.array([1, 0, 0, 0]))) == {"accuracy": 0.75}


def test_record_is_never_half_written(tmp_path, monkeypatch):
    path = tmp_path / "new" / "record.json"
    recipe.write_record({"study": "first"}, path)

    def torn(self, text):
        with self.open("w") as file:
            file.write(text[:5])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", torn)
    with pytest.raises(OSError, match="disk full"):
        recipe.write_record({"study": "second"}, path)
    assert json.loads(path.read_text()) == {"study": "first"}


# ---- data, and what is wrong with it ----


def write_set(folder: Path, labels: dict[str, list], size: int = 32, mode: str = "RGB", label_type=None) -> str:
    """A folder with one Parquet file per split."""
    features = datasets.Features({"picture": datasets.Image(), "kind": label_type or datasets.Value("int64")})
    for split, values in labels.items():
        rows = {"picture": [Image.new(mode, (size, size)) for _ in values], "kind": values}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / f"{split}.parquet"))
    return str(folder)


def write_images(folder: Path, files: dict[str, int | list[str]], size: int = 32) -> str:
    """
    Pictures per folder, as many as said (in colour) or one of each mode said; greenish in colour, of medium brightness
    in grey.
    """
    for place, modes in files.items():
        (folder / place).mkdir(parents=True)
        for index, mode in enumerate(["RGB"] * modes if isinstance(modes, int) else modes):
            Image.new("RGB", (size, size), (40, 180, 90)).convert(mode).save(folder / place / f"{index}.JPEG", "JPEG")
    return str(folder)


@pytest.mark.slow
def test_shipped_images():
    sets = load_images(None)
    assert (len(sets.train), len(sets.test), sets.image_size, sets.channels) == (10_000, 2_000, 28, 1)
    assert sets.label_names[0] == "T-shirt/top"
    assert np.bincount(sets.test["label"]).tolist() == [200] * 10
    mean, std = pixels.mean_and_std(pixels.make_dataset(sets.train, sets))
    assert mean == pytest.approx(0.2860, abs=2e-3)  # all 60,000: 0.2860 and 0.3530
    assert std == pytest.approx(0.3530, abs=2e-3)


def test_local_folder_with_integer_labels(tmp_path):
    folder = write_set(tmp_path, {"train": [0, 2, 1], "test": [1, 0]})
    sets = load_images(folder, "picture", "kind")
    assert (sets.label_names, sets.image_size, sets.channels) == (["0", "1", "2"], 32, 3)
    row = pixels.make_dataset(sets.train, sets, seed=0)[1]
    assert row["image"].shape == (3, 32, 32)
    assert row["label"] == 2


def test_large_grey_images_become_three_channels_of_224(tmp_path):
    folder = write_set(tmp_path, {"train": [0, 1], "test": [1]}, size=300, mode="L")
    sets = load_images(folder, "picture", "kind")
    assert (sets.image_size, sets.channels) == (224, 3)
    for seed in (0, None):
        rows = pixels.make_dataset(sets.train, sets, seed=seed)
        assert rows[0]["image"].shape == (3, 224, 224)


def test_missing_columns_name_the_flag():
    with pytest.raises(
        DataError,
        match=r"image_column must be one of the columns \['image', 'label'\], got 'img'. Set --image_column.",
    ):
        load_images(None, image_column="img")
    with pytest.raises(DataError, match=r"label_column must be one of .* got 'fine_label'. Set --label_column."):
        load_images(None, label_column="fine_label")
    with pytest.raises(DataError, match=r"image_column must hold images, got 'label' .* Set --image_column."):
        load_images(None, image_column="label")
    with pytest.raises(
        DataError, match=r"label_column must hold class labels or integers, got 'image' .* Set --label_column."
    ):
        load_images(None, label_column="image")


def test_missing_files_and_rows_name_the_flag(tmp_path):
    with pytest.raises(DataError, match=r"which has no validation\*.parquet. .* --test_split"):
        load_images(None, test_split="validation")
    with pytest.raises(DataError, match=r"which has no training\*.parquet"):
        load_images(None, train_split="training")
    with pytest.raises(
        DataError, match=r"dataset_name must be a folder that holds .* which is empty. Set --dataset_name."
    ):
        load_images(str(tmp_path))
    (tmp_path / "rows.csv").write_text("image,label")
    with pytest.raises(
        DataError, match=r"dataset_name must be a folder that holds .* which holds none of these. Set --dataset_name."
    ):
        load_images(str(tmp_path))
    with pytest.raises(DataError, match=r"got '/no/such/folder', which is no folder. Set --dataset_name."):
        load_images("/no/such/folder")
    with pytest.raises(DataError, match=r"max_train_samples must be >= 1 row, got 0."):
        load_images(None, max_train_samples=0)


def test_hidden_labels_name_the_split(tmp_path):
    folder = write_set(tmp_path, {"train": [0, 1], "test": [-1, -1]})
    with pytest.raises(
        DataError, match=r"labels of test_split must be in 0..1, got -1..-1 in 'test' .* Set --test_split"
    ):
        load_images(folder, "picture", "kind")


def test_image_net_s_folders(tmp_path):
    """
    train and val with a folder per class; grey and CMYK among the colours. Labels are the folders' names, in order.
    """
    modes = ["L", "RGB", "CMYK"]
    folder = write_images(
        tmp_path / "a [b]*", {"train/n02": modes, "train/n01": modes, "val/n02": modes, "val/n01": modes}, size=80
    )
    (tmp_path / "a [b]*" / "train" / "n01" / "notes.txt").write_text("no image")
    (tmp_path / "a [b]*" / "train" / "synsets.txt").write_text("no image")
    sets = load_images(folder)
    assert (sets.test_split, sets.label_names, sets.image_size, sets.channels) == ("val", ["n01", "n02"], 224, 3)
    assert (sets.train["label"][:], sets.test["label"][:]) == ([0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 1])
    assert {image.mode for image in sets.train["image"]} == set(modes)
    for seed in (0, None):
        rows = pixels.make_dataset(sets.train, sets, seed=seed)
        grey, colour, ink = (rows[index]["image"].float().mean((1, 2)).tolist() for index in range(3))
        assert grey == pytest.approx([128] * 3, abs=4)  # 0.299 * 40 + 0.587 * 180 + 0.114 * 90
        assert colour == pytest.approx([40, 180, 90], abs=4)
        assert ink == pytest.approx(colour, abs=8)


def test_splits_are_the_user_s_names(tmp_path):
    folder = write_images(tmp_path, {"my-train/a": 2, "my-train/b": 1, "val/a": 1, "validation/b": 3, "test/a": 1})
    assert load_images(folder, train_split="my-train").test_split == "test"
    sets = load_images(folder, train_split="my-train", test_split="validation")
    assert (sets.test_split, len(sets.train), sets.test["label"][:]) == ("validation", 3, [1, 1, 1])
    with pytest.raises(
        DataError,
        match=r"train_split must be one of the folders \['my-train', 'test', .* got 'train'. Set --train_split",
    ):
        load_images(folder)
    with pytest.raises(DataError, match=r"test_split must be one of the folders .* got 'dev'. Set --test_split"):
        load_images(folder, train_split="my-train", test_split="dev")


@pytest.mark.parametrize(
    ("folders", "said"),
    [
        ({"train/a": 1}, r"test_split must be one of the folders \['train'\] .* got 'test'. Set --test_split"),
        (
            {"train/a": 1, "val/a": 1, "validation/a": 1},
            r"no split test, but both of \['validation', 'val'\]. Set --test_split",
        ),
        (
            {"a": 1, "b": 1},
            r"train_split must be one of the folders \['a', 'b'\] .* which should hold <class>/<image>, got 'train'",
        ),
        (
            {"train/a": 1, "train/b": 1, "test": 2},
            "test_split must hold class folders .* set --test_split to a split",
        ),
        ({"train": 1, "test/a": 1}, "train_split must hold class folders with images"),
        (
            {"train/a": 1, "test/a": 1, "test/c": 1},
            r"no class that training lacks, got 'test' with 1 .* such as \['c'\]. Set --test_split",
        ),
        (
            {"train/a/images": 1, "test/a": 1},
            "images must lie in <split>/<class>/, got .*train/a' with the folder 'images' inside",
        ),
        (
            {"train/a": 1, "train/b": 0, "test/a": 1},
            r"every class folder must hold images, got .* 1 that hold none, such as \['b'\]",
        ),
        ({"train/a": 0, "test/a": 1}, r"train_split must hold class folders with images, .*\['a'\] hold none"),
    ],
)
def test_wrong_folders_name_the_flag(tmp_path, folders, said):
    with pytest.raises(DataError, match=said):
        load_images(write_images(tmp_path, folders))


def test_nothing_in_class_folders_is_left_out_in_silence(tmp_path):
    folder = write_images(tmp_path / "set", {"train/a": 1, "train/b": 1, "test/a": 1})
    elsewhere = write_images(tmp_path / "elsewhere", {"c": 1})
    (tmp_path / "set" / "train" / "c").symlink_to(Path(elsewhere) / "c")
    with pytest.raises(DataError, match=r"such as \['c'\] \(links to folders are not followed\)"):
        load_images(folder)
    (tmp_path / "set" / "train" / "c").unlink()
    (tmp_path / "set" / "train" / "a" / "metadata.csv").write_text("file_name,note\n0.JPEG,x\n")
    with pytest.raises(DataError, match=r"class folders must hold images only, got .* Move metadata.csv"):
        load_images(folder)


def test_broken_image_is_named(tmp_path):
    folder = write_images(tmp_path, {"train/a": 1, "train/b": 1, "test/a": 1})
    (tmp_path / "train" / "a" / "0.JPEG").write_text("no picture")
    with pytest.raises(DataError, match=r"train/a/0\.JPEG.*set --image_column or --dataset_name"):
        load_images(folder)


@pytest.mark.parametrize(
    ("modes", "channels"),
    [(["L", "L"], 1), (["L", "RGB"], 3), (["RGB", "L"], 3), (["CMYK", "L"], 3), (["L", "CMYK"], 3)],
)
def test_small_images_keep_their_colours_whichever_comes_first(tmp_path, modes, channels):
    sets = load_images(write_images(tmp_path, {"train/a": modes, "train/b": modes, "test/a": modes}))
    assert (sets.image_size, sets.channels) == (32, channels)
    rows = pixels.make_dataset(sets.train, sets, seed=0)
    assert rows[0]["image"].shape == (channels, 32, 32)
    for row, mode in zip(rows.images, modes, strict=False):
        assert row.float().mean((1, 2)).tolist() == pytest.approx(
            [128] * channels if mode == "L" else [40, 180, 90], abs=8
        )


def test_small_only_if_all_are_small(tmp_path):
    write_images(tmp_path, {"train/a": 1, "train/z": 1, "test/a": 1}, size=20)
    assert load_images(str(tmp_path)).image_size == 20
    write_images(tmp_path, {"train/b": 1}, size=64)
    assert load_images(str(tmp_path)).image_size == 64
    write_images(tmp_path, {"train/c": 1}, size=65)
    assert load_images(str(tmp_path)).image_size == 224


def dictionary(labels: dict[str, list[int]], names: dict[str, list[str]] | None = None) -> datasets.DatasetDict:
    """Splits of small images in memory; the classes are cat and dog unless a split has its own names."""
    names = names or {}
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_dict(
                {"image": [Image.new("L", (28, 28))] * len(values), "label": values},
                features=datasets.Features(
                    {"image": datasets.Image(), "label": datasets.ClassLabel(names=names.get(split, ["cat", "dog"]))}
                ),
            )
            for split, values in labels.items()
        }
    )


def test_saved_dictionary(tmp_path):
    dictionary({"train": [1, 0, 1], "validation": [0, 1]}).save_to_disk(tmp_path / "set")
    sets = load_images(str(tmp_path / "set"))
    assert (sets.test_split, sets.label_names, sets.image_size, sets.channels) == ("validation", ["cat", "dog"], 28, 1)
    assert (sets.train["label"][:], sets.test["label"][:]) == ([1, 0, 1], [0, 1])
    assert len(pixels.make_dataset(sets.train, sets, seed=0)) == 3
    with pytest.raises(
        DataError, match=r"test_split must be one of \['train', 'validation'\], got 'test'. Set --test_split."
    ):
        load_images(str(tmp_path / "set"), test_split="test")
    with pytest.raises(
        DataError, match=r"train_split must be one of \['train', 'validation'\], got 'training'. Set --train_split."
    ):
        load_images(str(tmp_path / "set"), train_split="training")


def test_wrong_saved_sets_name_the_flag(tmp_path):
    sets = dictionary({"train": [1, 0], "test": [0]}, {"test": ["dog", "cat"]})
    sets.save_to_disk(tmp_path / "set")
    sets["train"].save_to_disk(tmp_path / "one")
    with pytest.raises(
        DataError,
        match="label names of test_split must be training's, got 'test', where label 0 is 'dog' and not 'cat'",
    ):
        load_images(str(tmp_path / "set"))
    with pytest.raises(DataError, match=r"which is one saved Dataset, without splits. Set --dataset_name."):
        load_images(str(tmp_path / "one"))
    (tmp_path / "set" / "train" / "state.json").write_text("{")
    with pytest.raises(
        DataError, match=r"set' cannot be read: JSONDecodeError: .* Mend its files, or set --dataset_name."
    ):
        load_images(str(tmp_path / "set"))


def test_parquet_splits(tmp_path):
    """
    Names of files start with the split's; validation stands in for a test that is not there. Each split has its own
    label names.
    """
    sets = dictionary({"train": [1, 0], "validation": [0], "val": [1, 1]}, {"val": ["dog", "cat"]})
    sets["train"].to_parquet(tmp_path / "train-00000-of-00001.parquet")
    sets["validation"].to_parquet(tmp_path / "validation-00000-of-00001.parquet")
    assert load_images(str(tmp_path)).test_split == "validation"
    sets["val"].to_parquet(tmp_path / "val_0.parquet")
    with pytest.raises(DataError, match="no split test, but both of"):
        load_images(str(tmp_path))
    with pytest.raises(
        DataError, match="label names of test_split must be training's, got 'val_', where label 0 is 'dog'"
    ):
        load_images(str(tmp_path), test_split="val_")
    sets["validation"].to_parquet(tmp_path / "test.parquet")
    assert load_images(str(tmp_path)).test_split == "test"
    (tmp_path / "test.parquet").write_text("no rows")
    with pytest.raises(DataError, match=r"test\.parquet', which is none .* or set --test_split or --dataset_name"):
        load_images(str(tmp_path))


def test_a_smaller_set_beside_the_whole_one_is_left_alone(tmp_path):
    """
    train.parquet and train_small.parquet: the rows of the first; the second is a split of its own, and stands in where
    it is alone.
    """
    for name, labels in (("train", [0, 1, 1]), ("train_small", [0, 1]), ("test", [1, 0, 0, 0]), ("test_small", [0])):
        dictionary({"train": labels})["train"].to_parquet(tmp_path / f"{name}.parquet")
    dictionary({"train": [1, 1]})["train"].to_parquet(tmp_path / "train-00001-of-00002.parquet")

    def rows(**splits):
        sets = load_images(str(tmp_path), **splits)
        return len(sets.train), len(sets.test)

    assert rows() == (5, 4), "one file and a shard"
    assert rows(train_split="train_small", test_split="test_small") == (2, 1)
    for path in tmp_path.glob("*train[.-]*"):
        path.unlink()
    assert rows() == (2, 4)


def test_never_tested_on_training_rows(tmp_path):
    folder = write_set(tmp_path / "parquet", {"train": [0, 1], "validation": [1]})
    with pytest.raises(DataError, match=r"test_split must not be train_split, got 'train' for both. Set --test_split"):
        load_images(folder, "picture", "kind", test_split="train")
    with pytest.raises(
        DataError, match=r"must name different files, got 'train' and 't', and both mean \['train.parquet'\]"
    ):
        load_images(folder, "picture", "kind", test_split="t")
    with pytest.raises(DataError, match=r"which has no test\*.parquet"):
        load_images(folder, "picture", "kind", train_split="validation")
    dictionary({"test": [0, 1], "train": [1]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match="test_split must be named: train_split is 'test'"):
        load_images(str(tmp_path / "saved"), train_split="test")


def test_fewer_rows_have_all_classes(tmp_path):
    """
    Of rows sorted by class the first ones would be one class: evenly spread ones are taken; of shuffled rows the
    first.
    """
    sorted_rows = write_set(tmp_path / "sorted", {"train": [0] * 10 + [1] * 10 + [2] * 10, "test": [0, 0, 1, 1, 2, 2]})
    sets = load_images(sorted_rows, "picture", "kind", max_train_samples=6, max_eval_samples=3)
    assert (sets.train["kind"][:], sets.test["kind"][:]) == ([0, 0, 1, 1, 2, 2], [0, 1, 2])
    shuffled = write_set(tmp_path / "shuffled", {"train": [2, 0, 1, 0], "test": [1, 0]})
    assert load_images(shuffled, "picture", "kind", max_train_samples=3).train["kind"][:] == [2, 0, 1]


def test_hub_out_of_reach():
    """Tests run with HF_HUB_OFFLINE=1, so this asks nobody."""
    with pytest.raises(
        DataError, match=r"'nobody/no-such-set' cannot be loaded: the Hub is not reachable .* Leave --dataset_name out"
    ):
        load_images("nobody/no-such-set")


@pytest.mark.parametrize(
    ("said", "way_out"),
    [
        (
            "Dataset 'ILSVRC/imagenet-1k' is a gated dataset on the Hub. You must be authenticated to access it.",
            "set HF_TOKEN",
        ),
        (
            "Dataset 'ILSVRC/imagenet-1k' doesn't exist on the Hub or cannot be accessed.",
            "Set --dataset_name to a set on the Hub",
        ),
    ],
)
def test_hub_refuses(monkeypatch, said, way_out):
    def refuse(name):
        raise datasets.exceptions.DatasetNotFoundError(said)

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match=way_out):
        load_images("ILSVRC/imagenet-1k")


def test_known_sets_need_no_column_flags(monkeypatch):
    """CIFAR-10 on the Hub calls its columns img and label, ImageNet's labelled test images are in validation."""
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = datasets.Dataset.from_dict({"img": [Image.new("RGB", (32, 32))] * 2, "label": [0, 1]}, features=features)
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name: datasets.DatasetDict(train=rows, test=rows, validation=rows)
    )
    assert load_images("uoft-cs/cifar10").label_names == ["cat", "dog"]
    with pytest.raises(
        DataError, match=r"test_split must be one of \['train', 'test', 'validation'\], got 'dev'. Set --test_split."
    ):
        load_images("uoft-cs/cifar10", test_split="dev")
    monkeypatch.setattr(datasets, "load_dataset", lambda name: datasets.DatasetDict(train=rows, test=rows.select([])))
    with pytest.raises(
        DataError, match=r"test_split must hold images, got 'test', which has no rows. Set --test_split."
    ):
        load_images("uoft-cs/cifar10")
    assert image_data._KNOWN_COLUMNS["ILSVRC/imagenet-1k"] == ("image", "label", "validation")


# ---- batches ----


def rows_of(images: torch.Tensor, draws: tuple[int, int, int] | None) -> list[dict]:
    return [{"image": image, "label": torch.tensor(index), "draws": draws} for index, image in enumerate(images)]


def test_batch_by_hand():
    """A pixel of 51 is 0.2 of full scale; (0.2 - 0.1) / 0.2 = 0.5. Rows of a test are left where they are."""
    images = torch.full((2, 1, 4, 4), 51, dtype=torch.uint8)
    batch = pickle.loads(pickle.dumps(Batch(mean=0.1, std=0.2, crop_padding=2, flip=True)))
    made = batch(rows_of(images, None))
    torch.testing.assert_close(made["pixel_values"], torch.full((2, 1, 4, 4), 0.5))
    assert made["labels"].tolist() == [0, 1]


def test_augmentation_is_a_shift_of_the_image_or_its_mirror():
    """
    With padding 1 a 3x3 image has 9 places, mirrored 9 more: all 18 occur, nothing else, and black comes in from
    outside.
    """
    image = torch.arange(1, 10, dtype=torch.uint8).view(1, 3, 3)
    allowed = set()
    for picture in (image, image.flip(-1)):
        padded = torch.zeros(1, 5, 5, dtype=torch.uint8)
        padded[:, 1:4, 1:4] = picture
        allowed |= {tuple(padded[0, y : y + 3, x : x + 3].flatten().tolist()) for y in range(3) for x in range(3)}
    made = Batch(mean=0, std=1, crop_padding=1, flip=True)(rows_of(image.expand(500, 1, 3, 3), (0, 0, 0)))
    seen = {tuple((image * 255).round().int().flatten().tolist()) for image in made["pixel_values"]}
    assert seen == allowed
    assert len(seen) == 18


def test_a_batch_that_is_made_again_is_the_same_and_draws_from_no_global_generator():
    """By seed, pass and first row; a DataLoader worker that outlives a pass hears of the next one."""
    sets = load_images(None, max_train_samples=64, max_eval_samples=32)
    batch = Batch(mean=0, std=1, crop_padding=2, flip=True)

    def made(seed: int, epoch: int, first: int) -> torch.Tensor:
        rows = pixels.make_dataset(sets.train, sets, seed=seed)
        rows.set_epoch(epoch)
        return batch([rows[index] for index in (first, 7, 8, 9)])["pixel_values"][1:]

    before = torch.get_rng_state()
    first = made(1, 2, 3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(made(1, 2, 3), first)
    for others in ((0, 2, 3), (1, 1, 3), (1, 2, 4)):
        assert not torch.equal(made(*others), first)
    rows = pixels.make_dataset(sets.train, sets, seed=1)
    loader = torch.utils.data.DataLoader(rows, batch_size=64, collate_fn=batch, num_workers=1, persistent_workers=True)
    passes = []
    for epoch in (0, 1, 0):
        rows.set_epoch(epoch)
        passes.append(next(iter(loader))["pixel_values"])
    assert torch.equal(passes[0], passes[2])
    assert not torch.equal(passes[0], passes[1])


@pytest.mark.parametrize(
    ("step", "accumulation", "told"),
    [(0, 1, 0), (28, 1, 0), (29, 1, 1), (57, 1, 1), (14, 2, 0), (15, 2, 1), (30, 2, 2)],
)
def test_the_pass_is_counted_from_the_steps(step, accumulation, told):
    """29 batches: a pass is 29 steps, or 15 of two batches, of which the last has one."""
    seen: list[int] = []
    rows = SimpleNamespace(set_epoch=seen.append)
    args, state = SimpleNamespace(gradient_accumulation_steps=accumulation), SimpleNamespace(global_step=step)
    recipe.NewDraws(rows).on_epoch_begin(args, state, None, train_dataloader=range(29))
    assert seen == [told]


def test_large_images_have_boxes_of_their_own():
    slope = Image.linear_gradient("L").resize((300, 300)).convert("RGB")
    train = datasets.Dataset.from_dict(
        {"image": [slope], "label": [0]},
        features=datasets.Features(image=datasets.Image(), label=datasets.Value("int64")),
    )
    sets = SimpleNamespace(image_column="image", label_column="label", image_size=224)
    rows = pixels.make_dataset(train, sets, seed=0)
    first = rows[0]["image"]
    assert torch.equal(rows[0]["image"], first)
    assert torch.equal(pixels.make_dataset(train, sets, seed=-(2**64))[0]["image"], first), (
        "a negative seed is one too"
    )
    rows.set_epoch(1)
    assert not torch.equal(rows[0]["image"], first)


def test_every_image_has_its_own_shift():
    torch.manual_seed(0)
    image = torch.arange(784, dtype=torch.float32).view(1, 1, 28, 28)
    shifted = pixels.random_crop(image.expand(8, 1, 28, 28), padding=2)
    assert len({tuple(one.flatten().tolist()) for one in shifted}) > 1
    assert [pixels.crop_padding(size) for size in (28, 32, 224)] == [2, 4, 0]


def test_boxes():
    """The shorter side, 256, gives a square of 224 in the middle."""
    assert pixels.centre_box(256, 512) == (16.0, 144.0, 240.0, 368.0)
    torch.manual_seed(0)
    boxes = np.array([pixels.random_resized_box(300, 200) for _ in range(500)])
    left, top, right, bottom = boxes.T
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (right <= 300 + 1e-3).all()
    assert (bottom <= 200 + 1e-3).all()
    area = (right - left) * (bottom - top) / 60_000
    assert 0.079 < area.min() < 0.12
    assert 0.8 < area.max() <= 1.0 + 1e-6


# ---- models ----


def test_small_resnet_by_hand(tmp_path):
    """28x28 stays 28x28 through the stem, then 14, 7, 4. Saved and loaded, it is the same function."""
    torch.manual_seed(0)
    model = make_model(28, 1, ["a", "b"], width=8).eval()
    pixels = torch.randn(2, 1, 28, 28)
    states = model.resnet(pixels, output_hidden_states=True).hidden_states
    assert [tuple(state.shape[1:]) for state in states] == [(8, 28, 28), (8, 14, 14), (16, 7, 7), (32, 4, 4)]
    stem = model.resnet.embedder.embedder.convolution.weight
    assert stem.detach().std().item() == pytest.approx((2 / (8 * 9)) ** 0.5, rel=0.3)  # Kaiming, fan out
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert isinstance(loaded, SmallResNetForImageClassification)
    torch.testing.assert_close(loaded.eval()(pixels).logits, model(pixels).logits, rtol=0, atol=0)


def test_large_images_get_resnet_50():
    with torch.device("meta"):
        model = make_model(224, 3, [str(number) for number in range(1000)])
    assert sum(parameter.numel() for parameter in model.parameters()) == 25_557_032


# ---- launching ----


@pytest.mark.parametrize(
    ("name", "machines", "cpu"),
    [("cpu_two_processes", 1, True), ("one_machine_gpus", 1, False), ("several_machines", 2, False)],
)
def test_launch_configs(name, machines, cpu):
    config = ClusterConfig.from_yaml_file(yaml_file=str(RECIPES / "configs" / f"{name}.yaml"))
    assert config.distributed_type.value == "MULTI_GPU"
    assert (config.num_machines, config.use_cpu) == (machines, cpu)
    assert config.num_processes >= 2
    assert (config.main_process_ip is not None) == (machines > 1)


def test_the_launch_config_of_sharded_machines(monkeypatch):
    """What its processes read of it: FSDP of version 2, and shards that are a machine's processes."""
    ParallelismConfig = pytest.importorskip("accelerate.parallelism_config").ParallelismConfig
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.launch import prepare_multi_gpu_env

    monkeypatch.setattr("accelerate.utils.launch.is_port_in_use", lambda port: False)  # by a run beside the tests
    path = str(RECIPES / "configs" / "sharded_machines.yaml")
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", path, "script.py"]))
    monkeypatch.setattr(os, "environ", {**os.environ, **prepare_multi_gpu_env(args)})
    parallelism, plugin = ParallelismConfig(), FullyShardedDataParallelPlugin()
    assert (parallelism.dp_shard_size, parallelism.dp_replicate_size) == (8, 2)
    assert args.num_processes == 16 == parallelism.dp_shard_size * args.num_machines
    assert plugin.fsdp_version == 2
    assert "SHARDED" in str(plugin.state_dict_type)


# srun runs until its tasks are signalled, as they are by scancel; sent TERM itself it would kill them (seen with SLURM
# 22.05).
SLURM = {
    "srun": 'echo $$ > "$HERE/srun"; trap "echo srun ends >> $HERE/log; exit 75" USR2; while true; do sleep 0.1; done',
    "scancel": 'echo "scancel $*" >> "$HERE/log"; kill -USR2 "$(cat "$HERE/srun")"',
    "scontrol": 'echo "scontrol $*" >> "$HERE/log"; echo node-a',
}


@pytest.mark.parametrize("name", ["image_classification", "translation"])
def test_slurm_script_signals_its_tasks_waits_for_them_and_asks_for_a_requeue(tmp_path, name):
    """
    Five minutes before the end SLURM sends the script TERM: the tasks are told, save and end, and only then the job is
    requeued.
    """
    for program, script in SLURM.items():
        (tmp_path / program).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / program).chmod(0o755)
    environment = {**os.environ, "HERE": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node-[a-d]", "SLURM_NNODES": "4"}
    job = subprocess.Popen(["bash", str(RECIPES / "slurm" / f"{name}.sbatch")], env=environment)
    for _ in range(100):
        if (tmp_path / "srun").exists() and (tmp_path / "srun").read_text():
            break
        time.sleep(0.1)
    time.sleep(0.2)  # srun's trap is set
    job.terminate()
    assert job.wait(timeout=patience(20)) == 0
    assert (tmp_path / "log").read_text().splitlines()[1:] == [
        "scancel --signal=TERM 7.0",
        "srun ends",
        "scontrol requeue 7",
    ]


@pytest.mark.slow
def test_several_machines(tmp_path):
    """
    Two launchers with the shipped configuration, one per machine; here both are this machine, at its loopback address.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = f"--num_processes 2 --mixed_precision no --main_process_ip 127.0.0.1 --main_process_port {port}"
    commands = [
        f"{sys.executable} -m accelerate.commands.launch --config_file recipes/configs/several_machines.yaml "
        f"--machine_rank {rank} {flags} recipes/image/train.py {SHORT} --max_steps 4 --sync_every 2 "
        f"--output_dir {tmp_path}"
        for rank in (0, 1)
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "src")}
    launchers = [
        subprocess.Popen(
            command.split(), cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for command in commands
    ]
    try:
        said = [launcher.communicate(timeout=patience(150))[0] for launcher in launchers]
    finally:
        for launcher in launchers:
            launcher.kill()
    assert [launcher.returncode for launcher in launchers] == [0, 0], said[0][-3000:] + said[1][-3000:]
    record = json.loads((tmp_path / "record.json").read_text())
    assert (record["workers"], record["rounds"]) == (2, 2)
    assert "2 workers, one process each, on 2 machine(s)" in said[0]
    assert "accuracy of the average" not in said[1], "the second machine has no table of its own"
