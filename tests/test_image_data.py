"""The image recipe's data, and what is wrong with it."""

from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from image import data as image_data
from image import pixels
from image.data import load_images
from images import write_images
from records import DataError

# ---- data, and what is wrong with it ----


def write_set(folder: Path, labels: dict[str, list], size: int = 32, mode: str = "RGB", label_type=None) -> str:
    """A folder with one Parquet file per split."""
    features = datasets.Features({"picture": datasets.Image(), "kind": label_type or datasets.Value("int64")})
    for split, values in labels.items():
        rows = {"picture": [Image.new(mode, (size, size)) for _ in values], "kind": values}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / f"{split}.parquet"))
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


def write_deep(folder: Path, kind: type, suffix: str, size: int = 32) -> str:
    """One image of every class and split, whose pixels climb from 0 in steps of 61."""
    ramp = (np.arange(size * size).reshape(size, size) * 61).astype(kind)
    for place in ("train/a", "train/b", "test/a", "test/b"):
        (folder / place).mkdir(parents=True)
        Image.fromarray(ramp).save(folder / place / f"0.{suffix}")
    return str(folder)


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bits_are_scaled_to_eight(tmp_path, suffix):
    """Pillow's own conversion would make everything above 255 white."""
    sets = load_images(write_deep(tmp_path / "small", np.uint16, suffix))
    assert sets.channels == 1
    right = np.arange(32 * 32).reshape(1, 32, 32) * 61 // 256
    assert pixels.make_dataset(sets.train, sets)[0]["image"].tolist() == right.tolist()
    large = load_images(write_deep(tmp_path / "large", np.uint16, suffix, size=256))
    image = pixels.make_dataset(large.train, large)[0]["image"]
    assert image.shape == (3, 224, 224)
    assert image.float().std() > 60, "half of the images' pixels are white where 16 bits are cut off"


@pytest.mark.parametrize(("kind", "size"), [(np.int32, 32), (np.float32, 32), (np.float32, 80)])
def test_pixels_of_unknown_scale_are_refused(tmp_path, kind, size):
    sets = load_images(write_deep(tmp_path, kind, "tiff", size))
    with pytest.raises(DataError, match=r"got row 0 of 'image', '.*0\.tiff': ValueError: mode '[IF]', 32 bits of"):
        pixels.make_dataset(sets.train, sets)[0]


def test_images_of_one_colour_cannot_be_normalised(tmp_path):
    sets = load_images(write_images(tmp_path, {"train/a": ["L"], "train/b": ["L"], "test/a": ["L"]}))
    with pytest.raises(DataError, match=r"must hold images that differ, got 2 whose pixels are all 1\d\d"):
        pixels.mean_and_std(pixels.make_dataset(sets.train, sets))


def test_small_only_if_all_are_small(tmp_path):
    write_images(tmp_path, {"train/a": 1, "train/z": 1, "test/a": 1}, size=20)
    assert load_images(str(tmp_path)).image_size == 20
    write_images(tmp_path, {"train/b": 1}, size=64)
    assert load_images(str(tmp_path)).image_size == 64
    write_images(tmp_path, {"train/c": 1}, size=65)
    assert load_images(str(tmp_path)).image_size == 224


# ---- saved sets, and the Hub ----


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

    def rows(**splits):
        sets = load_images(str(tmp_path), **splits)
        return len(sets.train), len(sets.test)

    assert rows() == (3, 4)
    assert rows(train_split="train_small", test_split="test_small") == (2, 1)
    for name in ("train-00001-of-00002", "train-small"):
        dictionary({"train": [1, 1]})["train"].to_parquet(tmp_path / f"{name}.parquet")
        with pytest.raises(
            DataError, match=rf"train_split must be one file, or shards .* got {name}\.parquet, train\."
        ):
            rows()
        (tmp_path / f"{name}.parquet").unlink()
    for shard, labels in ((0, [0, 1, 1]), (1, [1, 1])):
        dictionary({"train": labels})["train"].to_parquet(tmp_path / f"train-0000{shard}-of-00002.parquet")
    (tmp_path / "train.parquet").unlink()
    assert rows() == (5, 4), "two shards"
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
        DataError,
        match=r"'nobody/no-such-set', which cannot be loaded: the Hub is not reachable .* Leave --dataset_name out",
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
    def refuse(name, config):
        raise datasets.exceptions.DatasetNotFoundError(said)

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match=way_out):
        load_images("ILSVRC/imagenet-1k")


def test_known_sets_need_no_column_flags(monkeypatch):
    """CIFAR-10 on the Hub calls its columns img and label, ImageNet's labelled test images are in validation."""
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = datasets.Dataset.from_dict({"img": [Image.new("RGB", (32, 32))] * 2, "label": [0, 1]}, features=features)
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, config: datasets.DatasetDict(train=rows, test=rows, validation=rows)
    )
    assert load_images("uoft-cs/cifar10").label_names == ["cat", "dog"]
    with pytest.raises(
        DataError, match=r"test_split must be one of \['train', 'test', 'validation'\], got 'dev'. Set --test_split."
    ):
        load_images("uoft-cs/cifar10", test_split="dev")
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, config: datasets.DatasetDict(train=rows, test=rows.select([]))
    )
    with pytest.raises(
        DataError, match=r"test_split must hold images, got 'test', which has no rows. Set --test_split."
    ):
        load_images("uoft-cs/cifar10")
    assert image_data._KNOWN_COLUMNS["ILSVRC/imagenet-1k"] == ("image", "label", "validation")
