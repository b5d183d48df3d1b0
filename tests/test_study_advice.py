"""An error of a recipe's data in another program names a flag that this program has."""

from __future__ import annotations

import re
import shutil

import pytest

import peers
from image.sources import SHIPPED
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
