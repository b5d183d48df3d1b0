"""The main job: run as a user runs it, on the shipped images, and its parts against stated values."""

import json
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate.commands.config.config_args import ClusterConfig
from PIL import Image
from transformers import AutoModelForImageClassification, EvalPrediction

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "recipes"
sys.path.insert(0, str(RECIPES))

import image_classification as recipe  # noqa: E402
import image_data  # noqa: E402
from image_data import Batch, DataError, load_images  # noqa: E402
from small_resnet import SmallResNetForImageClassification, make_model  # noqa: E402

LAUNCHER = "-m accelerate.commands.launch --config_file recipes/configs/cpu_two_processes.yaml"
SHORT = "--max_train_samples 768 --max_eval_samples 250 --per_device_eval_batch_size 125 --width 8 --logging_steps 10 --disable_tqdm 1"
RECORD_KEYS = {
    *("study", "task", "dataset", "train_rows", "test_rows", "model", "base", "slowmo", "workers", "sync_every", "outer_lr"),
    *("outer_momentum", "inner_lr", "inner_state", "seed", "steps", "metrics", "curve", "rounds", "bytes_sent_per_worker", "seconds"),
    *("seconds_communicating", "command", "versions", "commit", "hardware"),
}


# ---- the job, as a user starts it ----


def run_recipe(output_dir: Path, flags: str, launcher: str = LAUNCHER):
    """What the program said, and its record."""
    command = [sys.executable, *launcher.split(), "recipes/image_classification.py", "--output_dir", str(output_dir), *flags.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=150)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-4000:]
    return said, json.loads((output_dir / "record.json").read_text())


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """Two workers, 24 steps, sync_every 5: 4 rounds, and an end inside the fifth."""
    folder = tmp_path_factory.mktemp("recipe")
    said, record = run_recipe(folder, f"{SHORT} --num_train_epochs 2 --sync_every 5 --plot --report_to tensorboard")
    return folder, said, record


@pytest.mark.slow
def test_record_is_complete_and_right(short_run):
    folder, _, record = short_run
    assert set(record) == RECORD_KEYS
    assert not (folder / "record.tmp").exists()
    assert (record["workers"], record["base"], record["slowmo"], record["outer_momentum"]) == (2, "local_sgd", True, 0.5)
    assert (record["train_rows"], record["test_rows"]) == (768, 250)
    assert record["steps"] == 2 * 768 // (2 * 32) == 24
    assert record["rounds"] == record["steps"] // record["sync_every"] == 4
    assert [point["step"] for point in record["curve"]] == [12, 24]
    assert record["curve"][-1]["test_accuracy"] == record["metrics"]["test_accuracy"]
    assert 0 < record["seconds_communicating"] < record["seconds"]


@pytest.mark.slow
def test_record_counts_every_round_s_bytes(short_run):
    """Two workers in a ring send their payload once: fp32 parameters and BatchNorm statistics, and at most 1 KiB per round."""
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
    batch = Batch(*image_data.mean_and_std(image_data.make_dataset(sets.train, sets, augment=True)))
    rows = image_data.make_dataset(sets.test, sets, augment=False)
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
def test_plain_ddp_leaves_the_callback_out(tmp_path):
    said, record = run_recipe(tmp_path, f"{SHORT} --max_steps 3 --plain_ddp --plot")
    assert "slowmo" not in said.lower().replace("slowmo_hf/", "")
    assert (record["workers"], record["base"], record["slowmo"], record["rounds"], record["steps"]) == (2, "all_reduce", False, 0, 3)
    assert record["bytes_sent_per_worker"] is None
    assert (tmp_path / "training.png").exists()


@pytest.mark.slow
def test_one_process_says_that_nothing_is_averaged(tmp_path):
    said, record = run_recipe(tmp_path, f"{SHORT} --max_steps 3 --sync_every 2", launcher="")
    assert "one worker: nothing is averaged" in said
    assert (record["workers"], record["rounds"], record["bytes_sent_per_worker"]) == (1, 1, 0)


def test_flags_are_the_config_s_fields():
    flags = "--sync_every 7 --outer_momentum 0.25 --outer_lr 0.5 --inner_state average --model_buffers local --learning_rate 0.3"
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
    with pytest.raises(SystemExit, match=r"^image_classification.py: sync_every must be >= 1 optimizer step, got 0"):
        recipe.parse(["--sync_every", "0"])


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


def test_shipped_images():
    sets = load_images(None)
    assert (len(sets.train), len(sets.test), sets.image_size, sets.channels) == (10_000, 2_000, 28, 1)
    assert sets.label_names[0] == "T-shirt/top"
    assert np.bincount(sets.test["label"]).tolist() == [200] * 10
    mean, std = image_data.mean_and_std(image_data.make_dataset(sets.train, sets, augment=False))
    assert mean == pytest.approx(0.2860, abs=2e-3)  # all 60,000: 0.2860 and 0.3530
    assert std == pytest.approx(0.3530, abs=2e-3)


def test_local_folder_with_integer_labels(tmp_path):
    folder = write_set(tmp_path, {"train": [0, 2, 1], "test": [1, 0]})
    sets = load_images(folder, "picture", "kind")
    assert (sets.label_names, sets.image_size, sets.channels) == (["0", "1", "2"], 32, 3)
    row = image_data.make_dataset(sets.train, sets, augment=True)[1]
    assert row["image"].shape == (3, 32, 32)
    assert row["label"] == 2


def test_large_grey_images_become_three_channels_of_224(tmp_path):
    folder = write_set(tmp_path, {"train": [0, 1], "test": [1]}, size=300, mode="L")
    sets = load_images(folder, "picture", "kind")
    assert (sets.image_size, sets.channels) == (224, 3)
    for augment in (True, False):
        rows = image_data.make_dataset(sets.train, sets, augment=augment)
        assert rows[0]["image"].shape == (3, 224, 224)


def test_missing_columns_name_the_flag():
    with pytest.raises(DataError, match=r"image_column must be one of the columns \['image', 'label'\], got 'img'. Set --image_column."):
        load_images(None, image_column="img")
    with pytest.raises(DataError, match=r"label_column must be one of .* got 'fine_label'. Set --label_column."):
        load_images(None, label_column="fine_label")
    with pytest.raises(DataError, match=r"image_column must hold images, got 'label' .* Set --image_column."):
        load_images(None, image_column="label")
    with pytest.raises(DataError, match=r"label_column must hold class labels or integers, got 'image' .* Set --label_column."):
        load_images(None, label_column="image")


def test_missing_files_and_rows_name_the_flag(tmp_path):
    with pytest.raises(DataError, match=r"which has no validation\*.parquet. .* --test_split"):
        load_images(None, test_split="validation")
    with pytest.raises(DataError, match=r"which has no train\*.parquet"):
        load_images(str(tmp_path))
    with pytest.raises(DataError, match=r"got '/no/such/folder', which is no folder. Set --dataset_name."):
        load_images("/no/such/folder")
    with pytest.raises(DataError, match=r"max_train_samples must be >= 1 row, got 0."):
        load_images(None, max_train_samples=0)


def test_hidden_labels_name_the_split(tmp_path):
    folder = write_set(tmp_path, {"train": [0, 1], "test": [-1, -1]})
    with pytest.raises(DataError, match=r"labels of test_split must be in 0..1, got -1..-1 in 'test' .* Set --test_split"):
        load_images(folder, "picture", "kind")


def test_hub_out_of_reach():
    """Tests run with HF_HUB_OFFLINE=1, so this asks nobody."""
    with pytest.raises(DataError, match=r"'nobody/no-such-set' cannot be loaded: the Hub is not reachable .* Leave --dataset_name out"):
        load_images("nobody/no-such-set")


@pytest.mark.parametrize(
    ("said", "way_out"),
    [
        ("Dataset 'ILSVRC/imagenet-1k' is a gated dataset on the Hub. You must be authenticated to access it.", "set HF_TOKEN"),
        ("Dataset 'ILSVRC/imagenet-1k' doesn't exist on the Hub or cannot be accessed.", "Set --dataset_name to a set on the Hub"),
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
    monkeypatch.setattr(datasets, "load_dataset", lambda name: datasets.DatasetDict(train=rows, test=rows, validation=rows))
    assert load_images("uoft-cs/cifar10").label_names == ["cat", "dog"]
    with pytest.raises(DataError, match=r"test_split must be one of \['train', 'test', 'validation'\], got 'dev'. Set --test_split."):
        load_images("uoft-cs/cifar10", test_split="dev")
    assert image_data._KNOWN_COLUMNS["ILSVRC/imagenet-1k"] == ("image", "label", "validation")


# ---- batches ----


def rows_of(images: torch.Tensor, augment: bool) -> list[dict]:
    return [{"image": image, "label": torch.tensor(index), "augment": augment} for index, image in enumerate(images)]


def test_batch_by_hand():
    """A pixel of 51 is 0.2 of full scale; (0.2 - 0.1) / 0.2 = 0.5. Rows of a test are left where they are."""
    images = torch.full((2, 1, 4, 4), 51, dtype=torch.uint8)
    batch = pickle.loads(pickle.dumps(Batch(mean=0.1, std=0.2, crop_padding=2, flip=True)))
    made = batch(rows_of(images, augment=False))
    torch.testing.assert_close(made["pixel_values"], torch.full((2, 1, 4, 4), 0.5))
    assert made["labels"].tolist() == [0, 1]


def test_augmentation_is_a_shift_of_the_image_or_its_mirror():
    """With padding 1 a 3x3 image has 9 places, mirrored 9 more: all 18 occur, nothing else, and black comes in from outside."""
    image = torch.arange(1, 10, dtype=torch.uint8).view(1, 3, 3)
    allowed = set()
    for picture in (image, image.flip(-1)):
        padded = torch.zeros(1, 5, 5, dtype=torch.uint8)
        padded[:, 1:4, 1:4] = picture
        allowed |= {tuple(padded[0, y : y + 3, x : x + 3].flatten().tolist()) for y in range(3) for x in range(3)}
    torch.manual_seed(0)
    made = Batch(mean=0, std=1, crop_padding=1, flip=True)(rows_of(image.expand(500, 1, 3, 3), augment=True))
    seen = {tuple((pixels * 255).round().int().flatten().tolist()) for pixels in made["pixel_values"]}
    assert seen == allowed
    assert len(seen) == 18


def test_every_image_has_its_own_shift():
    torch.manual_seed(0)
    image = torch.arange(784, dtype=torch.float32).view(1, 1, 28, 28)
    shifted = image_data.random_crop(image.expand(8, 1, 28, 28), padding=2)
    assert len({tuple(one.flatten().tolist()) for one in shifted}) > 1
    assert [image_data.crop_padding(size) for size in (28, 32, 224)] == [2, 4, 0]


def test_boxes():
    """The shorter side, 256, gives a square of 224 in the middle."""
    assert image_data.centre_box(256, 512) == (16.0, 144.0, 240.0, 368.0)
    torch.manual_seed(0)
    boxes = np.array([image_data.random_resized_box(300, 200) for _ in range(500)])
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
    ("name", "machines", "cpu"), [("cpu_two_processes", 1, True), ("one_machine_gpus", 1, False), ("several_machines", 2, False)]
)
def test_launch_configs(name, machines, cpu):
    config = ClusterConfig.from_yaml_file(yaml_file=str(RECIPES / "configs" / f"{name}.yaml"))
    assert config.distributed_type.value == "MULTI_GPU"
    assert (config.num_machines, config.use_cpu) == (machines, cpu)
    assert config.num_processes >= 2
    assert (config.main_process_ip is not None) == (machines > 1)


def test_slurm_script_is_bash():
    for script in (RECIPES / "slurm").iterdir():
        subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.slow
def test_several_machines(tmp_path):
    """Two launchers with the shipped configuration, one per machine; here both are this machine, at its loopback address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = f"--num_processes 2 --mixed_precision no --main_process_ip 127.0.0.1 --main_process_port {port}"
    commands = [
        f"{sys.executable} -m accelerate.commands.launch --config_file recipes/configs/several_machines.yaml --machine_rank {rank} {flags} "
        f"recipes/image_classification.py {SHORT} --max_steps 4 --sync_every 2 --output_dir {tmp_path}"
        for rank in (0, 1)
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "src")}
    launchers = [
        subprocess.Popen(command.split(), cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for command in commands
    ]
    try:
        said = [launcher.communicate(timeout=150)[0] for launcher in launchers]
    finally:
        for launcher in launchers:
            launcher.kill()
    assert [launcher.returncode for launcher in launchers] == [0, 0], said[0][-3000:] + said[1][-3000:]
    record = json.loads((tmp_path / "record.json").read_text())
    assert (record["workers"], record["rounds"]) == (2, 2)
    assert "2 workers, one process each, on 2 machine(s)" in said[0]
    assert "accuracy of the average" not in said[1], "the second machine has no table of its own"
