"""Images for `image_classification.py`: loading from the Hub or local files, and batches with the usual augmentation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image

SHIPPED = Path(__file__).parent / "data" / "fashion_mnist"
# Names that differ between known sets: image column, label column, test split (ImageNet's own test labels are hidden).
_KNOWN_COLUMNS = {
    "uoft-cs/cifar10": ("img", "label", "test"),
    "ILSVRC/imagenet-1k": ("image", "label", "validation"),
    "zalando-datasets/fashion_mnist": ("image", "label", "test"),
}
SMALL_IMAGE = 64  # pixels; larger images are cropped to 224, the ImageNet way
LOCAL_FOLDER = "a folder that holds train*.parquet and test*.parquet"


class DataError(ValueError):
    """The data cannot be used; the message names the setting, its value, the rule and the flag that mends it."""


@dataclass
class ImageSets:
    """Training and test rows, and what the model needs to know of them."""

    name: str
    train: datasets.Dataset
    test: datasets.Dataset
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
        dataset_name (`str`, *optional*): A name on the Hub, or a folder with `train*.parquet` and `test*.parquet`; None: the shipped set.
        image_column (`str`, *optional*), label_column (`str`, *optional*): `image` and `label`, or what the known set calls them.
        train_split (`str`, *optional*, defaults to `"train"`), test_split (`str`, *optional*): Also the start of local files' names.
        max_train_samples (`int`, *optional*), max_eval_samples (`int`, *optional*): Only the first rows.

    Raises:
        DataError: No such set, no Hub, terms not accepted, or a column, split or label that is not there.
    """
    known = _KNOWN_COLUMNS.get(dataset_name or "", ("image", "label", "test"))
    image_column, label_column, test_split = image_column or known[0], label_column or known[1], test_split or known[2]
    sets = _load(dataset_name, train_split, test_split)
    train = _first_rows(_split(sets, train_split, "train_split"), max_train_samples, "max_train_samples")
    test = _first_rows(_split(sets, test_split, "test_split"), max_eval_samples, "max_eval_samples")
    _check_columns(train, image_column, label_column)
    _check_columns(test, image_column, label_column)
    label_names = _label_names(train, label_column)
    _check_labels(test, test_split, label_column, len(label_names))
    first = train[0][image_column]
    small = max(first.size) <= SMALL_IMAGE
    return ImageSets(
        name=dataset_name or "zalando-datasets/fashion_mnist (shipped subset)",
        train=train,
        test=test,
        image_column=image_column,
        label_column=label_column,
        label_names=label_names,
        image_size=max(first.size) if small else 224,
        channels=1 if small and first.mode == "L" else 3,
    )


def _load(dataset_name: str | None, train_split: str, test_split: str) -> Any:
    folder = SHIPPED if dataset_name is None else Path(dataset_name)
    if folder.is_dir():
        return _load_folder(folder, train_split, test_split)
    if folder.is_file() or folder.is_absolute() or str(dataset_name).startswith("."):
        raise DataError(
            f"dataset_name must be a name on the Hub or {LOCAL_FOLDER}, got {dataset_name!r}, which is no folder. Set --dataset_name."
        )
    try:
        return datasets.load_dataset(str(dataset_name))
    except Exception as error:  # datasets lets through errors of many libraries; each ends here with a word on what to do
        raise DataError(_hub_message(str(dataset_name), error)) from error


def _load_folder(folder: Path, train_split: str, test_split: str) -> Any:
    found = {split: sorted(map(str, folder.glob(f"{split}*.parquet"))) for split in (train_split, test_split)}
    for split, paths in found.items():
        if not paths:
            raise DataError(
                f"dataset_name must be {LOCAL_FOLDER}, got {str(folder)!r}, which has no {split}*.parquet. "
                "Rename the files, or say how their names start with --train_split and --test_split."
            )
    return datasets.load_dataset("parquet", data_files=found)


def _hub_message(name: str, error: Exception) -> str:
    """What went wrong with the Hub, and the way out."""
    what = f"dataset_name={name!r} cannot be loaded: "
    causes = [error, error.__cause__, error.__context__]
    if "gated" in str(error):
        page = f"https://huggingface.co/datasets/{name}"
        return f"{what}it is gated. Accept its terms at {page}, then set HF_TOKEN or run `hf auth login`; or leave --dataset_name out."
    if any(isinstance(cause, ConnectionError | TimeoutError) for cause in causes):
        return (
            f"{what}the Hub is not reachable ({type(error).__name__}: {error}). Leave --dataset_name out for the shipped images, "
            f"or set --dataset_name to {LOCAL_FOLDER}."
        )
    return f"{what}{type(error).__name__}: {error} Set --dataset_name to a set on the Hub, such as uoft-cs/cifar10, or to {LOCAL_FOLDER}."


def _split(sets: Any, split: str, flag: str) -> datasets.Dataset:
    if split not in sets:
        raise DataError(f"{flag} must be one of {list(sets)}, got {split!r}. Set --{flag}.")
    return sets[split]


def _first_rows(rows: datasets.Dataset, limit: int | None, flag: str) -> datasets.Dataset:
    if limit is None:
        return rows
    if limit < 1:
        raise DataError(f"{flag} must be >= 1 row, got {limit}. Leave --{flag} out to use all.")
    return rows.select(range(min(len(rows), limit)))


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
        return [str(number) for number in range(max(rows[label_column]) + 1)]
    raise DataError(f"label_column must hold class labels or integers, got {label_column!r} of type {kind}. Set --label_column.")


def _check_labels(test: datasets.Dataset, test_split: str, label_column: str, classes: int) -> None:
    lowest, highest = min(test[label_column]), max(test[label_column])
    if lowest < 0 or highest >= classes:
        raise DataError(
            f"labels of test_split must be in 0..{classes - 1}, got {lowest}..{highest} in {test_split!r} (-1 marks hidden labels). "
            "Set --test_split to a split with labels, such as validation."
        )


class SmallImages(torch.utils.data.Dataset[dict[str, Any]]):
    """Small images, decoded once: uint8, shape (rows, channels, size, size)."""

    def __init__(self, rows: datasets.Dataset, sets: ImageSets, augment: bool) -> None:
        size = (sets.image_size, sets.image_size)
        mode = "L" if sets.channels == 1 else "RGB"
        arrays = [np.asarray(image.convert(mode).resize(size)) for image in rows[sets.image_column]]
        self.images = torch.from_numpy(np.stack(arrays)).view(len(arrays), *size, -1).permute(0, 3, 1, 2).contiguous()
        self.labels = torch.tensor(rows[sets.label_column])
        self.augment = augment

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.images[index], "label": self.labels[index], "augment": self.augment}


class LargeImages(torch.utils.data.Dataset[dict[str, Any]]):
    """Large images, decoded when asked for: a random resized crop in training, the centre of the image resized to 256 otherwise."""

    def __init__(self, rows: datasets.Dataset, sets: ImageSets, augment: bool) -> None:
        self.rows, self.sets, self.augment = rows, sets, augment

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        image = row[self.sets.image_column].convert("RGB")
        box = random_resized_box(*image.size) if self.augment else centre_box(*image.size)
        pixels = np.asarray(image.resize((224, 224), Image.Resampling.BILINEAR, box=box)).copy()
        return {
            "image": torch.from_numpy(pixels).permute(2, 0, 1),
            "label": torch.tensor(row[self.sets.label_column]),
            "augment": self.augment,
        }


def random_resized_box(width: int, height: int) -> tuple[float, float, float, float]:
    """A box of 8 % to 100 % of the image's area and an aspect ratio of 3/4 to 4/3 (as far as it fits), in pixels."""
    area = float(torch.empty(1).uniform_(0.08, 1)) * width * height
    ratio = float(torch.empty(1).uniform_(np.log(3 / 4), np.log(4 / 3)).exp())
    w, h = min(width, (area * ratio) ** 0.5), min(height, (area / ratio) ** 0.5)
    left, top = float(torch.rand(1)) * (width - w), float(torch.rand(1)) * (height - h)
    return left, top, left + w, top + h


def centre_box(width: int, height: int) -> tuple[float, float, float, float]:
    """The central 224/256 of the shorter side, square, in pixels."""
    side = min(width, height) * 224 / 256
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


@dataclass
class Batch:
    """
    Collates rows into `pixel_values` (float32, shape (batch, channels, size, size), zero mean and unit deviation) and `labels`.
    Rows that say `augment` are cropped and flipped at random.

    Args:
        mean (`float`), std (`float`): Of the training pixels, as fractions of full scale.
        crop_padding (`int`, *optional*, defaults to `0`): Augmented images are padded by this many black pixels, then cropped back.
        flip (`bool`, *optional*, defaults to `False`): Augmented images are mirrored left to right, every second one on average.
    """

    mean: float
    std: float
    crop_padding: int = 0
    flip: bool = False

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        images = torch.stack([row["image"] for row in rows])
        if rows[0]["augment"]:
            images = random_flip(images) if self.flip else images
            images = random_crop(images, self.crop_padding) if self.crop_padding else images
        pixels = images.float().div_(255).sub_(self.mean).div_(self.std)
        return {"pixel_values": pixels, "labels": torch.stack([row["label"] for row in rows])}


def crop_padding(image_size: int) -> int:
    """Pixels of black around small images before a crop: 4 as usual for the 32 of CIFAR, 2 below; none around large images."""
    return 0 if image_size > SMALL_IMAGE else 4 if image_size >= 32 else 2


def random_crop(images: torch.Tensor, padding: int) -> torch.Tensor:
    """Shift every image by up to `padding` pixels in both directions; what comes in from outside is black (0)."""
    size = images.shape[-1]
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    offsets = torch.randint(0, 2 * padding + 1, (2, len(images))).tolist()
    return torch.stack([image[:, y : y + size, x : x + size] for image, y, x in zip(padded, *offsets, strict=True)])


def random_flip(images: torch.Tensor) -> torch.Tensor:
    """Mirror every second image on average, left to right."""
    return torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(-1), images)


def make_dataset(rows: datasets.Dataset, sets: ImageSets, *, augment: bool) -> SmallImages | LargeImages:
    """Rows as tensors, kept in memory where they are small."""
    return SmallImages(rows, sets, augment) if sets.image_size <= SMALL_IMAGE else LargeImages(rows, sets, augment)


def mean_and_std(dataset: SmallImages | LargeImages) -> tuple[float, float]:
    """Of all pixels of small images; ImageNet's, averaged over colours, for large ones."""
    if isinstance(dataset, LargeImages):
        return 0.449, 0.226
    pixels = dataset.images.float() / 255
    return float(pixels.mean()), float(pixels.std())
