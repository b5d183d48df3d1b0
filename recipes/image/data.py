"""
Images for `image_classification.py`: loading from the Hub or local files, and batches with the usual augmentation.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from pyarrow import parquet

SHIPPED = Path(__file__).parents[1] / "data" / "fashion_mnist"
# Names that differ between known sets: image column, label column, test split (ImageNet's own test labels are hidden).
_KNOWN_COLUMNS: dict[str, tuple[str, str, str | None]] = {
    "uoft-cs/cifar10": ("img", "label", "test"),
    "ILSVRC/imagenet-1k": ("image", "label", "validation"),
    "zalando-datasets/fashion_mnist": ("image", "label", "test"),
}
SMALL_IMAGE = 64  # pixels; larger images are cropped to 224, the ImageNet way
LOCAL_FOLDER = (
    "a folder that holds train*.parquet and test*.parquet, images as train/<class>/* and test/<class>/*, "
    "or a saved DatasetDict"
)


class DataError(ValueError):
    """The data cannot be used; the message names the setting, its value, the rule and the flag that mends it."""


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
    train, test, test_split = _load(dataset_name, train_split, test_split or known[2])
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
    _check_classes(train, train_split, label_column, label_names)
    train = _fewer_rows(train, label_column, max_train_samples, "max_train_samples")
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
        channels=1 if small and modes == {"L"} else 3,
    )


# Rows to train on, rows to test on, the name of the split these are.
Loaded = tuple[datasets.Dataset, datasets.Dataset, str]


def _load(dataset_name: str | None, train_split: str, test_split: str | None) -> Loaded:
    folder = SHIPPED if dataset_name is None else Path(dataset_name)
    if folder.is_dir():
        return _load_folder(folder, train_split, test_split)
    if folder.is_file() or folder.is_absolute() or str(dataset_name).startswith("."):
        raise DataError(
            f"dataset_name must be a name on the Hub or {LOCAL_FOLDER}, got {dataset_name!r}, which is no folder. "
            "Set --dataset_name."
        )
    try:
        sets = datasets.load_dataset(str(dataset_name))
    except (
        Exception
    ) as error:  # datasets lets through errors of many libraries; each ends here with a word on what to do
        raise DataError(_hub_message(str(dataset_name), error)) from error
    return _pick(sets, train_split, test_split)


def _load_folder(folder: Path, train_split: str, test_split: str | None) -> Loaded:
    """One of the three kinds of folder."""
    if (folder / "dataset_dict.json").is_file():
        return _pick(_read(folder, lambda: datasets.load_from_disk(str(folder))), train_split, test_split)
    if any(folder.glob("*.parquet")):
        return _load_parquet(folder, train_split, test_split)
    if _folders_in(folder):
        return _load_class_folders(folder, train_split, test_split)
    what = "is one saved Dataset, without splits" if (folder / "state.json").is_file() else "holds none of these"
    what = what if any(folder.iterdir()) else "is empty"
    raise DataError(f"dataset_name must be {LOCAL_FOLDER}, got {str(folder)!r}, which {what}. Set --dataset_name.")


def _pick(sets: datasets.DatasetDict, train_split: str, test_split: str | None) -> Loaded:
    """The two splits of sets that are loaded."""
    test_split = _test_split(test_split, train_split, sets)
    for split, flag in ((train_split, "train_split"), (test_split, "test_split")):
        if split not in sets:
            raise DataError(f"{flag} must be one of {list(sets)}, got {split!r}. Set --{flag}.")
    return sets[train_split], sets[test_split], test_split


def _load_parquet(folder: Path, train_split: str, test_split: str | None) -> Loaded:
    """Files named after the splits, as `_files_of` says. Read apart, so that each split keeps its own label names."""
    names = [path.name for path in folder.glob("*.parquet")]
    words = {match.group() for match in (re.match("[A-Za-z]+", name) for name in names) if match}
    found = words | {"test" for word in words if word.startswith("test")}
    test_split = _test_split(test_split, train_split, sorted(found))
    files = {split: _files_of(split, names) for split in (train_split, test_split)}
    for split, paths in files.items():
        if not paths:
            raise DataError(
                f"dataset_name must be {LOCAL_FOLDER}, got {str(folder)!r}, which has no {split}*.parquet. "
                "Rename the files, or say how their names start with --train_split and --test_split."
            )
    both = set(files[train_split]).intersection(files[test_split])
    if both:
        raise DataError(
            f"train_split and test_split must name different files, got {train_split!r} and {test_split!r}, and both "
            f"mean {sorted(both)}. Set --train_split and --test_split."
        )
    train, test = (
        _read_parquet(folder, files[split], flag)
        for split, flag in ((train_split, "train_split"), (test_split, "test_split"))
    )
    return train, test, test_split


def _read_parquet(folder: Path, names: list[str], flag: str) -> datasets.Dataset:
    """One split's files. datasets tells neither which one is broken nor that all are without rows."""
    rows = 0
    for name in names:
        try:
            rows += parquet.read_metadata(folder / name).num_rows
        except Exception as error:
            raise DataError(
                f"dataset_name must hold Parquet files, got {str(folder / name)!r}, which is none ({error}). Mend or "
                f"remove it, or set --{flag} or --dataset_name."
            ) from error
    if not rows:
        raise DataError(
            f"{flag} must hold images, got {str(folder / names[0])!r}, which has no rows. Fill it, or set --{flag} or "
            "--dataset_name."
        )
    paths = [glob.escape(str(folder / name)) for name in names]
    return _read(folder, lambda: datasets.load_dataset("parquet", data_files={"train": paths}, split="train"))


def _files_of(split: str, names: list[str]) -> list[str]:
    """
    `<split>.parquet` and its shards `<split>-*`, as on the Hub; where there are none, whatever starts with the split's
    name. So a `train_small.parquet` beside `train.parquet` is not trained on as well.
    """
    own = [name for name in names if re.split("[.-]", name)[0] == split]
    return sorted(own or [name for name in names if name.startswith(split)])


def _load_class_folders(folder: Path, train_split: str, test_split: str | None) -> Loaded:
    """Images as `<split>/<class>/<file>`; what lies elsewhere in a split's folder has no class, and is left out."""
    found = _folders_in(folder)
    test_split = _test_split(test_split, train_split, found)
    classes = {}
    for split, flag in ((train_split, "train_split"), (test_split, "test_split")):
        if split not in found:
            raise DataError(
                f"{flag} must be one of the folders {found[:10]} in {str(folder)!r}, which should hold "
                f"<class>/<image>, got {split!r}. Set --{flag} or --dataset_name."
            )
        classes[split] = _class_folders(folder / split, flag)
    unknown = sorted(set(classes[test_split]).difference(classes[train_split]))
    if unknown:
        raise DataError(
            f"test_split must have no class that training lacks, got {test_split!r} with {len(unknown)} class "
            f"folder(s) that are not in {train_split!r}, such as {unknown[:5]}. Set --test_split, or mend the folders."
        )
    # The splits are train and test here whatever their folders are called: datasets allows fewer names than a file
    # system.
    files = {
        name: f"{glob.escape(str(folder / split))}/*/*"
        for name, split in (("train", train_split), ("test", test_split))
    }
    sets = _read(
        folder, lambda: datasets.load_dataset("imagefolder", data_files=files, drop_labels=False, drop_metadata=True)
    )
    for name, split in (("train", train_split), ("test", test_split)):
        _check_class_folders(sets[name], folder / split, classes[split])
    return sets["train"], sets["test"], test_split


def _folders_in(folder: Path) -> list[str]:
    """Names of the folders that datasets looks into: not hidden ones, nor `__pycache__` and its like."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if not entry.name.startswith((".", "__")) and entry.is_dir())


def _class_folders(split_folder: Path, flag: str) -> list[str]:
    classes = _folders_in(split_folder)
    if not classes:
        raise DataError(
            f"{flag} must hold class folders with images, got {str(split_folder)!r}, which has no folders. Sort its "
            f"images by class, or set --{flag} to a split with labels."
        )
    for name in classes:
        nested = _folders_in(split_folder / name)
        if nested:
            raise DataError(
                f"images must lie in <split>/<class>/, got {str(split_folder / name)!r} with the folder {nested[0]!r} "
                f"inside. Mend the folders, or set --{flag} or --dataset_name."
            )
    kinds = Image.registered_extensions()
    if not any(path.suffix.lower() in kinds for name in classes for path in (split_folder / name).iterdir()):
        raise DataError(
            f"{flag} must hold class folders with images, got {str(split_folder)!r}, whose folders {classes[:5]} hold "
            f"none. Put images there, or set --{flag} or --dataset_name."
        )
    return classes


def _check_class_folders(rows: datasets.Dataset, split_folder: Path, classes: list[str]) -> None:
    """Nothing was left out in silence: every class folder gave at least one row."""
    if "label" not in rows.column_names:
        raise DataError(
            f"class folders must hold images only, got {str(split_folder)!r} with a metadata file in one of them. "
            "Move metadata.csv, metadata.jsonl or metadata.parquet elsewhere, or set --dataset_name."
        )
    names = rows.features["label"].names
    empty = sorted(set(classes).difference(names[label] for label in rows.unique("label")))
    if empty:
        raise DataError(
            f"every class folder must hold images, got {str(split_folder)!r} with {len(empty)} that hold none, such "
            f"as {empty[:5]} (links to folders are not followed). Fill or remove them, or set --dataset_name."
        )


def _test_split(asked: str | None, train_split: str, found: Collection[str]) -> str:
    """What the user names; otherwise test, or validation or val where exactly one of them stands in for it."""
    if asked is not None:
        if asked == train_split:
            raise DataError(
                f"test_split must not be train_split, got {asked!r} for both. Set --test_split or --train_split."
            )
        return asked
    stand_ins = [split for split in ("test", "validation", "val") if split in found and split != train_split]
    if "test" in stand_ins or len(stand_ins) == 1:
        return stand_ins[0]
    if stand_ins:
        raise DataError(
            f"test_split must be named: there is no split test, but both of {stand_ins}. Set --test_split."
        )
    if train_split == "test":
        raise DataError(
            "test_split must be named: train_split is 'test', and there is no validation or val. Set --test_split."
        )
    return "test"  # which is not there, and the caller says so


def _read(folder: Path, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except Exception as error:  # as from the Hub: errors of many libraries, and what went wrong is often in the cause
        cause = error.__cause__ or error
        raise DataError(
            f"dataset_name={str(folder)!r} cannot be read: {type(cause).__name__}: {cause}. Mend its files, or set "
            "--dataset_name."
        ) from error


def _hub_message(name: str, error: Exception) -> str:
    """What went wrong with the Hub, and the way out."""
    what = f"dataset_name={name!r} cannot be loaded: "
    causes = [error, error.__cause__, error.__context__]
    if "gated" in str(error):
        page = f"https://huggingface.co/datasets/{name}"
        return (
            f"{what}it is gated. Accept its terms at {page}, then set HF_TOKEN or run `hf auth login`; or leave "
            "--dataset_name out."
        )
    if any(isinstance(cause, ConnectionError | TimeoutError) for cause in causes):
        return (
            f"{what}the Hub is not reachable ({type(error).__name__}: {error}). Leave --dataset_name out for the "
            f"shipped images, or set --dataset_name to {LOCAL_FOLDER}."
        )
    return (
        f"{what}{type(error).__name__}: {error} Set --dataset_name to a set on the Hub, such as uoft-cs/cifar10, "
        f"or to {LOCAL_FOLDER}."
    )


def _fewer_rows(rows: datasets.Dataset, label_column: str, limit: int | None, flag: str) -> datasets.Dataset:
    """The first ones; of rows sorted by class these would be one class, so evenly spread ones."""
    if limit is None:
        return rows
    if limit < 1:
        raise DataError(f"{flag} must be >= 1 row, got {limit}. Leave --{flag} out to use all.")
    if limit >= len(rows):
        return rows
    if (np.diff(_labels(rows, label_column)) >= 0).all():
        return rows.select(np.linspace(0, len(rows) - 1, limit).astype(int))
    return rows.select(range(limit))


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


def unreadable(
    rows: datasets.Dataset, image_column: str, error: Exception, indices: Collection[int] | None = None
) -> DataError:
    """Which image cannot be decoded: the first of these rows, of all by default."""
    for index in range(len(rows)) if indices is None else indices:
        try:
            rows[index][image_column].load()
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
            f"labels). Set --{flag} to a split with labels."
        )


def _check_classes(rows: datasets.Dataset, split: str, label_column: str, names: list[str]) -> None:
    """With one class there is nothing to learn, and every accuracy is 1."""
    there = np.unique(_labels(rows, label_column))
    if len(there) < 2:
        raise DataError(
            f"label_column must hold two classes or more, got {label_column!r} of {split!r} with {names[there[0]]!r} "
            "alone. Set --label_column, --train_split or --dataset_name."
        )


class _Images(torch.utils.data.Dataset[dict[str, Any]]):
    """
    Rows as `{"image", "label", "draws"}`: `draws` names the row's random numbers (seed, pass, row), None where it is
    not augmented.

    Args:
        seed (`int`, *optional*): Of crops and flips. None: no row is augmented.
    """

    def __init__(self, seed: int | None) -> None:
        self.seed = seed
        self._epoch = torch.zeros(
            (), dtype=torch.int64
        ).share_memory_()  # also seen by DataLoader workers that outlive a pass

    def set_epoch(self, epoch: int) -> None:
        """From now on rows are of this pass, counted from 0: each has other crops and flips in it."""
        self._epoch.fill_(epoch)

    def _draws(self, index: int) -> tuple[int, int, int] | None:
        return None if self.seed is None else (self.seed % 2**64, int(self._epoch), index)


class SmallImages(_Images):
    """Small images, decoded once: uint8, shape (rows, channels, size, size)."""

    def __init__(self, rows: datasets.Dataset, sets: ImageSets, seed: int | None) -> None:
        super().__init__(seed)
        size = (sets.image_size, sets.image_size)
        mode = "L" if sets.channels == 1 else "RGB"
        try:
            arrays = [np.asarray(image.convert(mode).resize(size)) for image in rows[sets.image_column]]
        except Exception as error:  # of Pillow's many readers
            raise unreadable(rows, sets.image_column, error) from error
        self.images = torch.from_numpy(np.stack(arrays)).view(len(arrays), *size, -1).permute(0, 3, 1, 2).contiguous()
        self.labels = torch.tensor(rows[sets.label_column])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.images[index], "label": self.labels[index], "draws": self._draws(index)}


class LargeImages(_Images):
    """
    Large images, decoded when asked for: a random resized crop in training, the centre of the image resized to 256
    otherwise.
    """

    def __init__(self, rows: datasets.Dataset, sets: ImageSets, seed: int | None) -> None:
        super().__init__(seed)
        self.rows, self.sets = rows, sets

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        draws = self._draws(index)
        try:
            row = self.rows[index]
            image = row[self.sets.image_column].convert("RGB")
        except Exception as error:
            raise unreadable(self.rows, self.sets.image_column, error, [index]) from error
        box = random_resized_box(*image.size, generator_of(draws)) if draws else centre_box(*image.size)
        pixels = np.asarray(image.resize((224, 224), Image.Resampling.BILINEAR, box=box)).copy()
        return {
            "image": torch.from_numpy(pixels).permute(2, 0, 1),
            "label": torch.tensor(row[self.sets.label_column]),
            "draws": draws,
        }


def generator_of(draws: tuple[int, ...]) -> torch.Generator:
    """
    Random numbers of one seed, pass and row. They leave the global generator alone and depend on nothing else, so that
    a batch that is made again, ahead of time or elsewhere is the same batch: without that a run resumed inside a pass
    sees other crops.
    """
    return torch.Generator().manual_seed(int(np.random.SeedSequence(draws).generate_state(1, np.uint64)[0]))


def random_resized_box(
    width: int, height: int, generator: torch.Generator | None = None
) -> tuple[float, float, float, float]:
    """A box of 8 % to 100 % of the image's area and an aspect ratio of 3/4 to 4/3 (as far as it fits), in pixels."""
    a, r, x, y = torch.rand(4, generator=generator).tolist()
    area, ratio = (0.08 + 0.92 * a) * width * height, (3 / 4) ** (1 - 2 * r)
    w, h = min(width, (area * ratio) ** 0.5), min(height, (area / ratio) ** 0.5)
    left, top = x * (width - w), y * (height - h)
    return left, top, left + w, top + h


def centre_box(width: int, height: int) -> tuple[float, float, float, float]:
    """The central 224/256 of the shorter side, square, in pixels."""
    side = min(width, height) * 224 / 256
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


@dataclass
class Batch:
    """
    Collates rows into `pixel_values` (float32, shape (batch, channels, size, size), zero mean and unit deviation) and
    `labels`. Rows with `draws` are cropped and flipped at random, a batch by those of its first row.

    Args:
        mean (`float`), std (`float`): Of the training pixels, as fractions of full scale.
        crop_padding (`int`, *optional*, defaults to `0`): Augmented images are padded by this many black pixels, then
            cropped back.
        flip (`bool`, *optional*, defaults to `False`): Augmented images are mirrored left to right, every second one
            on average.
    """

    mean: float
    std: float
    crop_padding: int = 0
    flip: bool = False

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        images = torch.stack([row["image"] for row in rows])
        if rows[0]["draws"]:
            generator = generator_of((*rows[0]["draws"], len(rows)))  # others than the row's own
            images = random_flip(images, generator) if self.flip else images
            images = random_crop(images, self.crop_padding, generator) if self.crop_padding else images
        return {
            "pixel_values": normalised(images, self.mean, self.std),
            "labels": torch.stack([row["label"] for row in rows]),
        }


def normalised(images: torch.Tensor, mean: float, std: float) -> torch.Tensor:
    """uint8 pixels as float32 with zero mean and unit deviation."""
    return images.float().div_(255).sub_(mean).div_(std)


def crop_padding(image_size: int) -> int:
    """
    Pixels of black around small images before a crop: 4 as usual for the 32 of CIFAR, 2 below; none around large
    images.
    """
    return 0 if image_size > SMALL_IMAGE else 4 if image_size >= 32 else 2


def random_crop(images: torch.Tensor, padding: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """Shift every image by up to `padding` pixels in both directions; what comes in from outside is black (0)."""
    size = images.shape[-1]
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    offsets = torch.randint(0, 2 * padding + 1, (2, len(images)), generator=generator).tolist()
    return torch.stack([image[:, y : y + size, x : x + size] for image, y, x in zip(padded, *offsets, strict=True)])


def random_flip(images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Mirror every second image on average, left to right."""
    return torch.where(torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5, images.flip(-1), images)


def make_dataset(rows: datasets.Dataset, sets: ImageSets, *, seed: int | None = None) -> SmallImages | LargeImages:
    """Rows as tensors, kept in memory where they are small; with a seed they are augmented in batches."""
    return (SmallImages if sets.image_size <= SMALL_IMAGE else LargeImages)(rows, sets, seed)


def mean_and_std(dataset: SmallImages | LargeImages) -> tuple[float, float]:
    """Of all pixels of small images; ImageNet's, averaged over colours, for large ones."""
    if isinstance(dataset, LargeImages):
        return 0.449, 0.226
    pixels = dataset.images.float() / 255
    return float(pixels.mean()), float(pixels.std())
