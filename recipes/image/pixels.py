"""Images as tensors, and batches of them with the usual augmentation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image

from image.data import SMALL_IMAGE, ImageSets, eight_bit, unreadable
from records import DataError


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
            arrays = [np.asarray(eight_bit(image, mode).resize(size)) for image in rows[sets.image_column]]
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
            image = eight_bit(row[self.sets.image_column], "RGB")
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
    """
    Of all pixels of small images; ImageNet's, averaged over colours, for large ones.

    Raises:
        DataError: All pixels are the same.
    """
    if isinstance(dataset, LargeImages):
        return 0.449, 0.226
    if dataset.images.min() == dataset.images.max():
        raise DataError(
            f"image_column must hold images that differ, got {len(dataset)} whose pixels are all "
            f"{int(dataset.images.min())}. Set --image_column or --dataset_name."
        )
    pixels = dataset.images.float() / 255
    return float(pixels.mean()), float(pixels.std())
