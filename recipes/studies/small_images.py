"""
One run of `reproduce.py` on images: several workers in this process, a small ResNet, the paper's schedule in small.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch

from image.data import SMALL_IMAGE, ImageSets, load_images, spread
from image.pixels import (
    SmallImages,
    crop_padding,
    make_dataset,
    mean_and_std,
    normalised,
    random_crop,
    random_flip,
)
from image.presets import decay_factor
from image.small_resnet import make_model
from records import DataError
from studies.advice import advised
from studies.plan import Run
from studies.small_runs import Job, train_workers

LIBRARIES = [datasets]  # whose versions matter here
HUB_NAME = "zalando-datasets/fashion_mnist"
HUB_SHA256 = "1f243a60b4b748a44c48b9a6f6907be2a08bee3e4e226f0e86fbde8e147b745a"  # of its training split, as below
ADVICE = (
    "--dataset_name to a folder with all of Fashion-MNIST: train*.parquet and test*.parquet with the columns image "
    "and label."
)
WIDTH = 8  # channels of the stem
VALIDATION_ROWS = 10_000  # the last ones of the training split, which comes shuffled
TOLD_ROWS = 5_000  # of the training rows, for the training loss of the average
DECAYS = (0.5, 0.75, 0.875)  # of the run: the learning rate falls to a tenth, as at epochs 100, 150 and 175 of 200
WARMUP = 0.025  # of the run, linear from 0: 5 epochs of 200
MOMENTUM, WEIGHT_DECAY = 0.9, 1e-4  # of the inner Nesterov SGD


@dataclass
class Part:
    """Images of one split, (rows, channels, size, size), and their labels."""

    images: torch.Tensor
    labels: torch.Tensor


@dataclass
class Images:
    """
    All that the runs share, read only. Images have one channel: uint8 for training, else float32 with zero mean and
    unit deviation.
    """

    name: str
    sha256: str  # of the training split's pixels and labels
    train: Part
    told: Part
    validation: Part
    test: Part
    label_names: list[str]
    mean: float
    std: float


def load_small(
    dataset_name: str, channels: int, *columns: str, max_rows: int | None = None
) -> tuple[ImageSets, SmallImages, SmallImages]:
    """
    Images that are small and of this many channels: training rows and test rows, decoded.

    Raises:
        DataError: They are others, or cannot be read.
    """
    sets = load_images(dataset_name, *columns, max_train_samples=max_rows, max_eval_samples=max_rows)
    train, test = make_dataset(sets.train, sets), make_dataset(sets.test, sets)
    if sets.channels == channels and isinstance(train, SmallImages) and isinstance(test, SmallImages):
        return sets, train, test
    kind = "grey" if channels == 1 else "colour"
    raise DataError(
        f"dataset_name must hold {kind} images of at most {SMALL_IMAGE} pixels, got {dataset_name!r} with others. "
        "Set --dataset_name."
    )


def load(dataset_name: str | None) -> Images:
    """
    Fashion-MNIST, from the Hub or a folder; the last rows of its training split validate, or `spread` ones.
    """
    with advised(ADVICE):
        sets, train, test = load_small(dataset_name or HUB_NAME, 1)
        mean, std = mean_and_std(train)
    held_out = torch.zeros(len(train), dtype=torch.bool)
    last = range(len(train) - min(VALIDATION_ROWS, len(train) // 6), len(train))
    held_out[torch.tensor(spread(train.labels.numpy(), last), dtype=torch.long)] = True
    first = Part(train.images[~held_out], train.labels[~held_out])
    sha256 = digest(train)

    def part(images: torch.Tensor, labels: torch.Tensor) -> Part:
        return Part(normalised(images, mean, std), labels)

    return Images(
        # A local copy is named by what it is a copy of.
        name=HUB_NAME if (sha256, len(test)) == (HUB_SHA256, 10_000) else Path(sets.name).name,
        sha256=sha256,
        train=first,
        told=part(first.images[:TOLD_ROWS], first.labels[:TOLD_ROWS]),
        validation=part(train.images[held_out], train.labels[held_out]),
        test=part(test.images, test.labels),
        label_names=sets.label_names,
        mean=mean,
        std=std,
    )


def digest(train: SmallImages) -> str:
    """SHA-256 of the training split's pixels and labels."""
    return hashlib.sha256(train.images.numpy().tobytes() + train.labels.numpy().tobytes()).hexdigest()


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up, then a tenth at every decay; `step` counts from 0."""
    return decay_factor(step, max(1, round(WARMUP * steps)), [decay * steps for decay in DECAYS])


def steps_per_epoch(run: Run, rows: int) -> int:
    """
    Whole steps of all workers together.

    Raises:
        DataError: There is none.
    """
    if rows < run.workers * run.batch_size:
        raise DataError(
            f"dataset_name must have >= {run.workers * run.batch_size} rows to train on, a batch of {run.batch_size} "
            f"for each of {run.workers} workers, got {rows}. Set --dataset_name."
        )
    return rows // (run.workers * run.batch_size)


def rows_of(epoch: int, rank: int, run: Run, rows: int) -> torch.Tensor:
    """
    This worker's rows of an epoch, shape (steps, batch_size): every row once over all workers, the rest of a last step
    left out.
    """
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(10_000 * run.seed + epoch))
    steps = steps_per_epoch(run, rows)
    return order[: steps * run.workers * run.batch_size].view(steps, run.workers, run.batch_size)[:, rank]


def train(run: Run, data: Images) -> dict[str, Any]:
    """All workers of one run; the part of its record that they know."""
    steps_per_epoch(run, len(data.train.labels))  # too few rows are told here, not by each worker
    told = train_workers(run, lambda rank: _make_job(run, data, rank))
    assert told is not None
    return {**told, "metrics": _metrics(told["curve"]), "dataset": data.name, "dataset_sha256": data.sha256}


def _make_job(run: Run, data: Images, rank: int) -> Job:
    torch.manual_seed(run.seed)
    model = make_model(data.train.images.shape[-1], 1, data.label_names, WIDTH)
    torch.manual_seed(1000 * run.seed + rank)  # each worker its own crops and flips
    rows = len(data.train.labels)
    steps = run.epochs * steps_per_epoch(run, rows)
    return Job(
        model=model,
        inner=torch.optim.SGD(
            model.parameters(), lr=run.inner_lr, momentum=MOMENTUM, nesterov=True, weight_decay=WEIGHT_DECAY
        ),
        learning_rate_factor=lambda step: learning_rate_factor(step, steps),
        batches=lambda epoch: rows_of(epoch, rank, run, rows),
        learn=lambda batch: _loss(model, data, batch).backward(),
        look=lambda epoch, is_last: {
            **_look(model, data),
            **({"test_accuracy": _evaluate(model, data.test)[0]} if is_last else {}),
        },
    )


def _loss(model: torch.nn.Module, data: Images, rows: torch.Tensor) -> torch.Tensor:
    images = random_crop(random_flip(data.train.images[rows]), crop_padding(data.train.images.shape[-1]))
    return model(pixel_values=normalised(images, data.mean, data.std), labels=data.train.labels[rows]).loss


@torch.no_grad()
def _evaluate(model: torch.nn.Module, part: Part) -> tuple[float, float]:
    """(accuracy, mean cross entropy) of the model as it is, in evaluation mode."""
    model.eval()
    logits = torch.cat([model(pixel_values=images).logits for images in part.images.split(500)])
    model.train()
    return float((logits.argmax(1) == part.labels).float().mean()), float(
        torch.nn.functional.cross_entropy(logits, part.labels)
    )


def _look(model: torch.nn.Module, data: Images) -> dict[str, float]:
    accuracy, nll = _evaluate(model, data.validation)
    return {"validation_accuracy": accuracy, "validation_nll": nll, "training_loss": _evaluate(model, data.told)[1]}


def _metrics(curve: list[dict[str, float]]) -> dict[str, float]:
    """The paper's columns (best validation, training loss) and the honest one (final test)."""
    return {**curve[-1], "best_validation_accuracy": max(look["validation_accuracy"] for look in curve)}
