"""Where images come from: the Hub, or a folder of Parquet files or class folders, and its faults."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Collection
from pathlib import Path

import datasets
from PIL import Image
from pyarrow import parquet

import loading
from records import DataError

SHIPPED = Path(__file__).parents[1] / "data" / "fashion_mnist"
LOCAL_FOLDER = (
    "a folder that holds train*.parquet and test*.parquet, images as train/<class>/* and test/<class>/*, "
    "or a saved DatasetDict"
)


# Rows to train on, rows to test on, the name of the split these are.
Loaded = tuple[datasets.Dataset, datasets.Dataset, str]


def load_splits(dataset_name: str | None, train_split: str, test_split: str | None) -> Loaded:
    """The rows of both splits; the test split is found where none is asked for."""
    folder = SHIPPED if dataset_name is None else Path(dataset_name)
    if folder.is_dir():
        return _load_folder(folder, train_split, test_split)
    if folder.is_file() or folder.is_absolute() or str(dataset_name).startswith("."):
        raise DataError(
            f"dataset_name must be a name on the Hub or {LOCAL_FOLDER}, got {dataset_name!r}, which is no folder. "
            "Set --dataset_name."
        )
    offline = f"Leave --dataset_name out for the shipped images, or set it to {LOCAL_FOLDER}."
    otherwise = f"Set --dataset_name to a set on the Hub, such as uoft-cs/cifar10, or to {LOCAL_FOLDER}."
    sets = loading.from_hub(str(dataset_name), None, "dataset_name", offline=offline, otherwise=otherwise)
    return _pick(sets, train_split, test_split)


def _load_folder(folder: Path, train_split: str, test_split: str | None) -> Loaded:
    """One of the three kinds of folder."""
    if (folder / "dataset_dict.json").is_file():
        return _pick(
            loading.from_folder(folder, lambda: datasets.load_from_disk(str(folder))), train_split, test_split
        )
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
    files = {}
    for split, flag in ((train_split, "train_split"), (test_split, "test_split")):
        paths = files[split] = _files_of(folder, split, names, flag)
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
    return loading.from_folder(
        folder, lambda: datasets.load_dataset("parquet", data_files={"train": paths}, split="train")
    )


def _files_of(folder: Path, split: str, names: list[str], flag: str) -> list[str]:
    """
    `<split>.parquet` or its shards `<split>-*`, as on the Hub; where there are none, whatever starts with the split's
    name. So a `train_small.parquet` beside `train.parquet` is not trained on as well.
    """
    own = [name for name in names if re.split("[.-]", name)[0] == split]
    loading.check_one_split(folder, own, flag)
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
    sets = loading.from_folder(
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
