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
# Names that differ between known sets: (image column, label column, test split).
_KNOWN_COLUMNS = {
    "uoft-cs/cifar10": ("img", "label", "test"),
    "ILSVRC/imagenet-1k": ("image", "label", "validation"),
    "zalando-datasets/fashion_mnist": ("image", "label", "test"),
}
SMALL_IMAGE = 64  # pixels; larger images are cropped to 224, the ImageNet way


class DataError(ValueError):
    """The data cannot be used; the message says which flag mends it."""


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
        dataset_name (`str`, *optional*): A Hub name, or a folder with `train*.parquet` and `test*.parquet`; the shipped set where None.

    Raises:
        DataError: No such set, no Hub, terms not accepted, or a column or split that is not there.
    """
    known = _KNOWN_COLUMNS.get(dataset_name or "", ("image", "label", "test"))
    image_column, label_column, test_split = image_column or known[0], label_column or known[1], test_split or known[2]
    sets = _load(dataset_name, train_split, test_split)
    train, test = _split(sets, train_split, "train_split"), _split(sets, test_split, "test_split")
    for flag, column in (("image_column", image_column), ("label_column", label_column)):
        if column not in train.column_names:
            raise DataError(
                f"{flag} must name a column of {dataset_name or 'the shipped set'}, got {column!r}. Set --{flag} to one of {train.column_names}."
            )
    train = train.select(range(min(len(train), max_train_samples))) if max_train_samples else train
    test = test.select(range(min(len(test), max_eval_samples))) if max_eval_samples else test
    label = train.features[label_column]
    if not isinstance(label, datasets.ClassLabel):
        raise DataError(f"label_column must hold class labels, got {label_column!r} of type {label}. Set --label_column.")
    first = train[0][image_column]
    small = max(first.size) <= SMALL_IMAGE
    return ImageSets(
        name=dataset_name or "zalando-datasets/fashion_mnist (shipped subset)",
        train=train,
        test=test,
        image_column=image_column,
        label_column=label_column,
        label_names=list(label.names),
        image_size=max(first.size) if small else 224,
        channels=1 if first.mode == "L" else 3,
    )


def _load(dataset_name: str | None, train_split: str, test_split: str) -> Any:
    folder = SHIPPED if dataset_name is None else Path(dataset_name)
    try:
        if folder.is_dir():
            found = {split: sorted(map(str, folder.glob(f"{split}*.parquet"))) for split in (train_split, test_split)}
            missing = [split for split, paths in found.items() if not paths]
            if missing:
                raise DataError(
                    f"dataset_name is the folder {str(folder)!r}, which has no {missing[0]}*.parquet. Name the files so, or set --train_split and --test_split."
                )
            return datasets.load_dataset("parquet", data_files=found)
        return datasets.load_dataset(str(dataset_name))
    except datasets.exceptions.DatasetNotFoundError as error:
        gated = "gated" in str(error)
        way_out = "accept its terms on the Hub and set HF_TOKEN" if gated else "check --dataset_name, or give a folder of Parquet files"
        raise DataError(f"dataset_name {dataset_name!r} cannot be loaded: {error} To mend it, {way_out}.") from error
    except OSError as error:  # ConnectionError and the Hub's offline errors are OSErrors
        raise DataError(
            f"dataset_name {dataset_name!r} cannot be loaded: the Hub is not reachable ({type(error).__name__}). Leave --dataset_name out "
            "for the shipped images, or give a folder with train*.parquet and test*.parquet."
        ) from error


def _split(sets: Any, split: str, flag: str) -> datasets.Dataset:
    if split not in sets:
        raise DataError(f"{flag} must be one of {list(sets)}, got {split!r}. Set --{flag}.")
    return sets[split]


class SmallImages(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Small images, decoded once: uint8, shape (rows, channels, size, size)."""

    def __init__(self, rows: datasets.Dataset, sets: ImageSets) -> None:
        size = (sets.image_size, sets.image_size)
        mode = "L" if sets.channels == 1 else "RGB"
        arrays = [np.asarray(image.convert(mode).resize(size)) for image in rows[sets.image_column]]
        self.images = torch.from_numpy(np.stack(arrays)).view(len(arrays), *size, -1).permute(0, 3, 1, 2).contiguous()
        self.labels = torch.tensor(rows[sets.label_column])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"image": self.images[index], "label": self.labels[index]}


class LargeImages(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Large images, decoded when asked for: a random resized crop in training, the centre of the image resized to 256 otherwise."""

    def __init__(self, rows: datasets.Dataset, sets: ImageSets, train: bool) -> None:
        self.rows, self.sets, self.train = rows, sets, train

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.rows[index]
        image = row[self.sets.image_column].convert("RGB")
        box = random_resized_box(*image.size) if self.train else centre_box(*image.size)
        pixels = np.asarray(image.resize((224, 224), Image.Resampling.BILINEAR, box=box)).copy()
        return {"image": torch.from_numpy(pixels).permute(2, 0, 1), "label": torch.tensor(row[self.sets.label_column])}


def random_resized_box(width: int, height: int) -> tuple[float, float, float, float]:
    """A box of 8 % to 100 % of the image's area and an aspect ratio of 3/4 to 4/3, in pixels."""
    area, log_ratio = float(torch.empty(1).uniform_(0.08, 1)) * width * height, float(torch.empty(1).uniform_(-0.2877, 0.2877))
    w = min(width, (area * np.exp(log_ratio)) ** 0.5)
    h = min(height, (area / np.exp(log_ratio)) ** 0.5)
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

    Args:
        mean (`float`), std (`float`): Of the training pixels, as fractions of full scale.
        crop_padding (`int`): In training, images are padded by this many pixels of zero, cropped back at random and flipped.
    """

    mean: float
    std: float
    crop_padding: int = 0
    flip: bool = False

    def __call__(self, rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        images = torch.stack([row["image"] for row in rows]).float().div_(255).sub_(self.mean).div_(self.std)
        if self.crop_padding:
            images = random_crop(images, self.crop_padding, fill=-self.mean / self.std)
        if self.flip:
            images = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(-1), images)
        return {"pixel_values": images, "labels": torch.stack([row["label"] for row in rows])}


def random_crop(images: torch.Tensor, padding: int, fill: float) -> torch.Tensor:
    """Shift every image by up to `padding` pixels in both directions; what comes in from outside is `fill`."""
    size = images.shape[-1]
    padded = torch.nn.functional.pad(images, (padding,) * 4, value=fill)
    offsets = torch.randint(0, 2 * padding + 1, (2, len(images))).tolist()
    return torch.stack([image[:, y : y + size, x : x + size] for image, y, x in zip(padded, *offsets, strict=True)])


def make_dataset(rows: datasets.Dataset, sets: ImageSets, *, train: bool) -> torch.utils.data.Dataset[dict[str, torch.Tensor]]:
    """Rows as tensors, kept in memory where they are small."""
    return SmallImages(rows, sets) if sets.image_size <= SMALL_IMAGE else LargeImages(rows, sets, train)


def mean_and_std(dataset: torch.utils.data.Dataset[dict[str, torch.Tensor]]) -> tuple[float, float]:
    """Of all pixels of small images; ImageNet's averages over channels for large ones."""
    if isinstance(dataset, SmallImages):
        pixels = dataset.images.float() / 255
        return float(pixels.mean()), float(pixels.std())
    return 0.449, 0.226
