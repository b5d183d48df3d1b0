"""Images for `image_classification.py`: training and test rows, their columns, labels and sizes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import datasets
import numpy as np
from PIL import Image

from image.sources import load_splits
from records import DataError

# Names that differ between known sets: image column, label column, test split (ImageNet's own test labels are hidden).
_KNOWN_COLUMNS: dict[str, tuple[str, str, str | None]] = {
    "uoft-cs/cifar10": ("img", "label", "test"),
    "ILSVRC/imagenet-1k": ("image", "label", "validation"),
    "zalando-datasets/fashion_mnist": ("image", "label", "test"),
}
SMALL_IMAGE = 64  # pixels; larger images are cropped to 224, the ImageNet way


@dataclass
class ImageSets:
    """Training and test rows, and what the model needs to know of them."""

    name: str
    train: datasets.Dataset
    test: datasets.Dataset
    test_split: str
    image_column: str
    label_column: str
    label_names: list[str]
    image_size: int
    channels: int


def load_images(
    dataset_name: str | None,
    image_column: str | None = None,
    label_column: str | None = None,
    train_split: str = "train",
    test_split: str | None = None,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
) -> ImageSets:
    """
    Load a labelled image set.

    Args:
        dataset_name (`str`, *optional*): A name on the Hub, or a folder of one of three kinds, told apart by what it
            holds: `dataset_dict.json` (written by `DatasetDict.save_to_disk`), Parquet files, or images as
            `<split>/<class>/<file>`, whose classes are named after their folders. None: the shipped set.
        image_column (`str`, *optional*), label_column (`str`, *optional*): What the known set calls them, `image` and
            `label`, or the only column of images and of class labels.
        train_split (`str`, *optional*, defaults to `"train"`): Name of the split or its folder. Of Parquet files,
            `<split>.parquet` and `<split>-*.parquet`; where there are none, those whose names start with it.
        test_split (`str`, *optional*): As `train_split`. None: what the known set calls it, or `test`, or, where there
            is none, `validation` or `val`, whichever there is. Never `train_split`.
        max_train_samples (`int`, *optional*), max_eval_samples (`int`, *optional*): Only the first rows; where rows
            are sorted by class, as in class folders, evenly spread ones.

    Raises:
        DataError: No such set, no Hub, terms not accepted, or a folder, column, split or label that is not there.
    """
    known = _KNOWN_COLUMNS.get(dataset_name or "", ("image", "label", None))
    train, test, test_split = load_splits(dataset_name, train_split, test_split or known[2])
    image_column = image_column or _column(train, known[0], "image_column", datasets.Image)
    label_column = label_column or _column(train, known[1], "label_column", datasets.ClassLabel)
    for rows, split, flag in ((train, train_split, "train_split"), (test, test_split, "test_split")):
        if not len(rows):
            raise DataError(f"{flag} must hold images, got {split!r}, which has no rows. Set --{flag}.")
        _check_columns(rows, image_column, label_column)
    label_names = _label_names(train, label_column)
    _check_same_names(train, test, test_split, label_column)
    _check_labels(train, train_split, "train_split", label_column, len(label_names))
    _check_labels(test, test_split, "test_split", label_column, len(label_names))
    train = _fewer_rows(train, label_column, max_train_samples, "max_train_samples")
    _check_classes(train, train_split, label_column, label_names)
    test = _fewer_rows(test, label_column, max_eval_samples, "max_eval_samples")
    side, modes = _side_and_modes(train, image_column)
    small = side <= SMALL_IMAGE
    return ImageSets(
        name=dataset_name or "zalando-datasets/fashion_mnist (shipped subset)",
        train=train,
        test=test,
        test_split=test_split,
        image_column=image_column,
        label_column=label_column,
        label_names=label_names,
        image_size=side if small else 224,
        channels=1 if small and all(mode == "L" or mode.startswith("I;16") for mode in modes) else 3,
    )


def _fewer_rows(rows: datasets.Dataset, label_column: str, limit: int | None, flag: str) -> datasets.Dataset:
    """The first ones, or `spread` ones."""
    if limit is None:
        return rows
    if limit < 1:
        raise DataError(f"{flag} must be >= 1 row, got {limit}. Leave --{flag} out to use all.")
    if limit >= len(rows):
        return rows
    return rows.select(spread(_labels(rows, label_column), range(limit)))


def spread(labels: np.ndarray, places: range) -> Sequence[int]:
    """These places; of rows sorted by class they would be one class, so as many evenly spread ones."""
    if (np.diff(labels) >= 0).all():
        return [int(place) for place in np.linspace(0, len(labels) - 1, len(places))]
    return places


def _side_and_modes(rows: datasets.Dataset, image_column: str) -> tuple[int, set[str]]:
    """
    The longest side in pixels and the colour modes: of all images if they are small, of the first large one otherwise.
    """
    side, modes = 0, set()
    try:
        for row in rows.select_columns(image_column):
            side, modes = max(side, *row[image_column].size), modes | {row[image_column].mode}
            if side > SMALL_IMAGE:
                break
    except Exception as error:  # of Pillow's many readers
        raise unreadable(rows, image_column, error) from error
    return side, modes


def eight_bit(image: Image.Image, mode: str) -> Image.Image:
    """
    As `mode`, L or RGB. 16 bits are scaled to 8, which Pillow's own conversion cuts off at 255.

    Raises:
        ValueError: Numbers whose full scale the image does not say.
    """
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode!r}, 32 bits of unknown full scale; save it with 8 or 16 bits")
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert(mode)


def unreadable(
    rows: datasets.Dataset, image_column: str, error: Exception, indices: Collection[int] | None = None
) -> DataError:
    """Which image cannot be decoded: the first of these rows, of all by default."""
    for index in range(len(rows)) if indices is None else indices:
        try:
            eight_bit(rows[index][image_column], "RGB")
        except Exception as of_row:
            error = of_row
            break
    raw = rows.select_columns(image_column).cast_column(image_column, datasets.Image(decode=False))[index]
    path = (raw[image_column] or {}).get("path")
    why = "it is missing" if raw[image_column] is None else f"{type(error).__name__}: {error}"
    return DataError(
        f"image_column must hold images that can be decoded, got row {index} of {image_column!r}"
        f"{f', {path!r}' if path else ''}: {why}. Mend or remove that image, or set --image_column or --dataset_name."
    )


def _column(rows: datasets.Dataset, usual: str, flag: str, kind: type[Any]) -> str:
    """The column of the usual name or, where that is none of this kind, the only one that is."""
    found = rows.features.get(usual)
    if isinstance(found, kind) or (kind is datasets.ClassLabel and "int" in str(getattr(found, "dtype", ""))):
        return usual
    fitting = [name for name, feature in rows.features.items() if isinstance(feature, kind)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting or usual not in rows.features:
        raise DataError(
            f"{flag} must be one of the columns {rows.column_names}, got {usual!r}, the usual name, and "
            f"{len(fitting)} columns of type {kind.__name__} {fitting}. Set --{flag}."
        )
    return usual  # of another type, and the caller says so


def _check_columns(rows: datasets.Dataset, image_column: str, label_column: str) -> None:
    for flag, column in (("image_column", image_column), ("label_column", label_column)):
        if column not in rows.column_names:
            raise DataError(f"{flag} must be one of the columns {rows.column_names}, got {column!r}. Set --{flag}.")
    kind = rows.features[image_column]
    if not isinstance(kind, datasets.Image):
        raise DataError(f"image_column must hold images, got {image_column!r} of type {kind}. Set --image_column.")


def _label_names(rows: datasets.Dataset, label_column: str) -> list[str]:
    """Of a class label; of plain integers, the numbers from 0 to the largest."""
    kind = rows.features[label_column]
    if isinstance(kind, datasets.ClassLabel):
        return list(kind.names)
    if isinstance(kind, datasets.Value) and "int" in kind.dtype:
        return [str(number) for number in range(_labels(rows, label_column).max() + 1)]
    raise DataError(
        f"label_column must hold class labels or integers, got {label_column!r} of type {kind}. Set --label_column."
    )


def _labels(rows: datasets.Dataset, label_column: str) -> np.ndarray:
    """As integers; where there is none, -1."""
    return np.array([-1 if label is None else label for label in rows[label_column][:]])


def _check_same_names(train: datasets.Dataset, test: datasets.Dataset, test_split: str, label_column: str) -> None:
    """Label 3 must mean the same class in both."""
    _label_names(test, label_column)  # its type is checked
    ours, theirs = train.features[label_column], test.features[label_column]
    if (
        isinstance(ours, datasets.ClassLabel)
        and isinstance(theirs, datasets.ClassLabel)
        and ours.names != theirs.names
    ):
        at, pair = next(
            (at, pair) for at, pair in enumerate(zip_longest(ours.names, theirs.names)) if pair[0] != pair[1]
        )
        raise DataError(
            f"label names of test_split must be training's, got {test_split!r}, where label {at} is {pair[1]!r} and "
            f"not {pair[0]!r}. Set --test_split, or give both splits the same ClassLabel."
        )


def _check_labels(rows: datasets.Dataset, split: str, flag: str, label_column: str, classes: int) -> None:
    labels = _labels(rows, label_column)
    lowest, highest = labels.min(), labels.max()
    if lowest < 0 or highest >= classes:
        raise DataError(
            f"labels of {flag} must be in 0..{classes - 1}, got {lowest}..{highest} in {split!r} (-1 marks hidden "
            f"labels). Set --{flag} to a split with labels numbered from 0."
        )


def _check_classes(rows: datasets.Dataset, split: str, label_column: str, names: list[str]) -> None:
    """With one class there is nothing to learn, and every accuracy is 1."""
    there = np.unique(_labels(rows, label_column))
    if len(there) < 2:
        raise DataError(
            f"label_column must hold two classes or more, got {label_column!r} of {split!r} with {names[there[0]]!r} "
            "alone. Set --label_column, --train_split, --max_train_samples or --dataset_name."
        )
