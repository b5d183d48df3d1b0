"""An error of a recipe's data in another program names a flag that this program has."""

from __future__ import annotations

import re
import shutil

import datasets
import pytest
from PIL import Image

import peers
from image.sources import SHIPPED
from images import write_images
from records import DataError
from studies import cifar10, small_images
from studies.advice import advised

PEERS = "--dataset to a folder with Fashion-MNIST or MNIST: train*.parquet and test*.parquet."


def copies(folder, *names):
    """The shipped images under other names."""
    folder.mkdir()
    for name in names:
        shutil.copy(SHIPPED / "test_small.parquet", folder / name)
    return str(folder)


@pytest.mark.parametrize(
    ("load", "advice"),
    [
        (small_images.load, small_images.ADVICE),
        (lambda name: cifar10.load(name, "cpu"), cifar10.ADVICE),
        (lambda name: peers.decode(name, None), PEERS),
    ],
    ids=["fashion_mnist", "cifar10", "peers"],
)
@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["train.parquet", "validation.parquet", "val.parquet"], r"but both of \['validation', 'val'\]\. Set "),
        (["rows.parquet", "test.parquet"], r"which has no train\*\.parquet\. Rename the files, or set "),
        ([], r"the Hub is not reachable \(.*\)\. Set "),
    ],
    ids=["two test splits", "no training split", "no Hub"],
)
def test_a_folder_that_cannot_be_used(tmp_path, load, advice, names, said):
    """Tests run with HF_HUB_OFFLINE=1, so that nobody is asked."""
    name = copies(tmp_path / "images", *names) if names else "nobody/no-such-set"
    with pytest.raises(DataError, match=rf"{said}{re.escape(advice)}$") as error:
        load(name)
    assert set(re.findall(r"--\w+", str(error.value))) == {advice.split()[0]}


def test_columns_of_another_set():
    """The shipped images are no CIFAR-10: the columns have other names, and no flag names others."""
    with pytest.raises(DataError, match=rf"^image_column must be .*, got 'img'\. Set {re.escape(cifar10.ADVICE)}$"):
        cifar10.load(str(SHIPPED), "cpu")


@pytest.mark.parametrize(("modes", "size"), [(["RGB"], 32), (["L"], 80)], ids=["colour", "large"])
def test_images_of_another_kind(tmp_path, modes, size):
    folder = write_images(tmp_path / "own", dict.fromkeys(["train/a", "train/b", "test/a", "test/b"], modes), size)
    said = r"^dataset_name must hold grey images of at most 64 pixels, got '.*own' with others\. Set "
    with pytest.raises(DataError, match=f"{said}{re.escape(small_images.ADVICE)}$"):
        small_images.load(folder)


def test_images_of_cifar_10_s_kind(tmp_path):
    images = datasets.Dataset.from_dict(
        {"img": [Image.new("L", (32, 32), shade) for shade in (9, 200)], "label": [0, 1]}
    )
    for split in ("train", "test"):
        images.cast_column("img", datasets.Image()).to_parquet(str(tmp_path / f"{split}.parquet"))
    with pytest.raises(DataError, match=r"^dataset_name must hold colour images of at most 64 pixels"):
        cifar10.load(str(tmp_path), "cpu")


def test_a_set_is_named_after_what_it_holds(tmp_path):
    """Not after its number of rows, which MNIST shares with Fashion-MNIST; only the pixels tell."""
    shutil.copytree(SHIPPED, tmp_path / "own")
    assert small_images.load(str(tmp_path / "own")).name == "own"


@pytest.mark.parametrize(
    ("classes", "name"),
    [(cifar10.CLASSES, "CIFAR-10, 4 and 4 rows"), ([str(digit) for digit in range(10)], "own, 4 and 4 rows")],
)
def test_cifar_10_is_known_by_its_classes(tmp_path, classes, name):
    (tmp_path / "own").mkdir()
    images = [Image.new("RGB", (32, 32), (shade, 0, 0)) for shade in (9, 60, 110, 200)]
    kinds = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=classes)})
    for split in ("train", "test"):
        rows = datasets.Dataset.from_dict({"img": images, "label": [0, 1, 2, 9]}, features=kinds)
        rows.to_parquet(str(tmp_path / "own" / f"{split}.parquet"))
    assert cifar10.load(str(tmp_path / "own"), "cpu").name == name


@pytest.mark.parametrize(
    ("error", "told"),
    [
        ("x is empty. Fill it, or set --x.", "x is empty. Fill it, or set --y to z."),
        ("got b. Sort its images by class, or set --x to c.", "got b. Sort its images by class, or set --y to z."),
        ("x must be > 0.", "x must be > 0. Set --y to z."),
        ("no flag at all", "no flag at all. Set --y to z."),
    ],
)
def test_what_mends_the_data_stays(error, told):
    with pytest.raises(DataError, match=f"^{re.escape(told)}$"), advised("--y to z."):
        raise DataError(error)
