"""
One run of `reproduce.py --scale gpu`: CIFAR-10 at the paper's size, ResNet-18, 32 workers in one process.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch

import slowmo_hf
from image.data import ImageSets
from image.pixels import crop_padding, generator_of, mean_and_std, normalised
from image.presets import PRESETS
from image.small_resnet import make_model
from studies.advice import advised
from studies.batched import BatchedGradients
from studies.kept import Keeper
from studies.plan import PaperRun
from studies.small_images import Part, digest, learning_rate_factor, load_small, rows_of, steps_per_epoch
from studies.small_runs import Job, train_workers

LIBRARIES = [datasets]  # whose versions matter here
PRESET = PRESETS["cifar10"]
SMALL_WIDTH = 8  # channels of the stem, in a dry run's small ResNet
TOLD_ROWS = 5_000  # of the training rows, for the training loss of the average
ROWS_AT_ONCE = 1_000  # in evaluations
ADVICE = "--dataset_name to a folder with CIFAR-10: train*.parquet and test*.parquet with the columns img and label."
WHOLE = (50_000, 10_000)  # rows of CIFAR-10
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
GRADIENTS = ("batched", "in_turn", "alone")


@dataclass(frozen=True)
class Machine:
    """
    How a run is computed. It changes what comes out by rounding alone.

    Args:
        device (`str`): cpu or cuda.
        gradients (`str`): `batched` and `in_turn`: all workers' in one call (`BatchedGradients`); `alone`: each
            worker's own forward and backward pass.
    """

    device: str
    gradients: str = "batched"

    @property
    def channels_last(self) -> bool:
        """How the images of a batched pass lie in memory: on a GPU as tensor cores want them."""
        return self.device == "cuda"

    @property
    def name(self) -> str:
        """For the record."""
        return torch.cuda.get_device_name() if self.device == "cuda" else f"cpu, {torch.get_num_threads()} threads"


@dataclass
class Images:
    """All that the runs share, on the device, read only. The images of every part are uint8 (rows, 3, size, size)."""

    name: str
    sha256: str  # of the training split's pixels and labels
    padded: torch.Tensor  # training images with black around them, uint8
    train: Part
    told: Part
    test: Part
    label_names: list[str]
    mean: float
    std: float


def load(dataset_name: str | None, device: str, max_train_samples: int | None = None) -> Images:
    """CIFAR-10, from the Hub or a folder of Parquet files with the Hub's columns; all of its training split trains."""
    name = dataset_name or PRESET["dataset_name"]
    with advised(ADVICE):
        sets, train, test = load_small(name, 3, "img", "label", max_rows=max_train_samples)
        mean, std = mean_and_std(train)
    images, labels = train.images.to(device), train.labels.to(device)
    return Images(
        name=_name_of(sets),
        sha256=digest(train),
        padded=torch.nn.functional.pad(images, (crop_padding(images.shape[-1]),) * 4),
        train=Part(images, labels),
        told=Part(images[:TOLD_ROWS], labels[:TOLD_ROWS]),
        test=Part(test.images.to(device), test.labels.to(device)),
        label_names=sets.label_names,
        mean=mean,
        std=std,
    )


def _name_of(sets: ImageSets) -> str:
    """What has CIFAR-10's classes is named after it; pixels that went through JPEG are not the original's."""
    name = "CIFAR-10" if sets.label_names == CLASSES else Path(sets.name).name
    name = f"JPEG-coded {name}" if sets.train[0]["img"].format == "JPEG" else name
    rows = len(sets.train), len(sets.test)
    return name if rows == WHOLE else f"{name}, {rows[0]} and {rows[1]} rows"


def draws_of(epoch: int, rank: int, run: PaperRun, data: Images) -> torch.Tensor:
    """
    What a worker's epoch is made of, int64 (steps, 4, batch): the row of each image, whether it is mirrored, and where
    its crop begins, down and across. They depend on seed, epoch and rank alone.
    """
    rows = rows_of(epoch, rank, run, len(data.train.labels))
    generator = generator_of((run.seed, epoch, rank))
    places = data.padded.shape[-1] - data.train.images.shape[-1] + 1
    mirrored = torch.randint(2, (len(rows), 1, run.batch_size), generator=generator)
    offsets = torch.randint(places, (len(rows), 2, run.batch_size), generator=generator)
    return torch.cat([rows[:, None], mirrored, offsets], dim=1).to(data.padded.device)


def examples(draws: torch.Tensor, data: Images) -> tuple[torch.Tensor, torch.Tensor]:
    """Images float32 (..., batch, 3, size, size) and labels (..., batch) of draws (..., 4, batch)."""
    row, mirrored, down, across = draws.unbind(-2)
    size = data.train.images.shape[-1]
    place = torch.arange(size, device=draws.device)
    columns = across[..., None] + torch.where(mirrored[..., None] > 0, size - 1 - place, place)
    lines = down[..., None] + place
    pixels = data.padded[row[..., None, None], :, lines[..., None], columns[..., None, :]]  # channels are last
    return normalised(pixels.movedim(-1, -3), data.mean, data.std), data.train.labels[row]


def cross_entropy(model: Any, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean over the batch."""
    return torch.nn.functional.cross_entropy(model(images).logits, labels)


class GradientsTogether(torch.nn.Module):
    """One worker's model, whose call leaves its gradients, computed with all other workers' in one pass."""

    def __init__(self, model: torch.nn.Module, all_gradients: BatchedGradients) -> None:
        super().__init__()
        self.model, self.all_gradients = model, all_gradients

    def forward(self, draws: torch.Tensor) -> None:
        gradients = slowmo_hf.together(self.all_gradients, draws)
        for parameter, gradient in zip(self.model.parameters(), gradients, strict=True):
            parameter.grad = gradient


def train(run: PaperRun, data: Images, machine: Machine, keeper: Keeper | None = None) -> dict[str, Any] | None:
    """All workers of one run; the part of its record that they know. None where its state was left for later."""
    steps_per_epoch(run, len(data.train.labels))  # too few rows are told here, not by each worker
    told = train_workers(run, lambda rank: make_job(run, data, machine, rank), keeper)
    if told is None:
        return None
    curve = told["curve"]
    best = max(look["test_accuracy"] for look in curve)
    return {
        **told,
        "metrics": {**curve[-1], "best_test_accuracy": best},
        "dataset": data.name,
        "dataset_sha256": data.sha256,
        "train_rows": len(data.train.labels),
        "test_rows": len(data.test.labels),
        "device": machine.name,
        "gradients": machine.gradients,
        "tf32": machine.device == "cuda" and torch.backends.cudnn.allow_tf32,
    }


def make_job(run: PaperRun, data: Images, machine: Machine, rank: int) -> Job:
    """One worker's; all workers make theirs together."""
    torch.manual_seed(run.seed)
    size = data.train.images.shape[-1]
    model = make_model(size, 3, data.label_names, SMALL_WIDTH, run.architecture).to(machine.device)
    steps = run.epochs * steps_per_epoch(run, len(data.train.labels))
    learn = _learning(model, data, machine)
    return Job(
        model=model,
        inner=torch.optim.SGD(
            model.parameters(),
            lr=run.inner_lr,
            momentum=PRESET["inner_momentum"],
            nesterov=True,
            weight_decay=PRESET["weight_decay"],
        ),
        learning_rate_factor=lambda step: learning_rate_factor(step, steps),
        batches=lambda epoch: draws_of(epoch, rank, run, data),
        learn=learn,
        look=lambda epoch, is_last: _look(model, data),
        look_every=run.look_every,
    )


def _learning(model: torch.nn.Module, data: Images, machine: Machine) -> Any:
    """What leaves the gradients of a batch in the model's parameters."""

    def alone(draws: torch.Tensor) -> None:
        cross_entropy(model, *examples(draws, data)).backward()

    if machine.gradients == "alone":
        return alone

    def join(models: list[torch.nn.Module]) -> list[BatchedGradients]:
        gradients = BatchedGradients(
            models,
            lambda draws: examples(draws, data),
            cross_entropy,
            way=machine.gradients,
            channels_last=machine.channels_last,
        )
        return [gradients] * len(models)

    return GradientsTogether(model, slowmo_hf.together(join, model))


@torch.no_grad()
def _evaluate(model: torch.nn.Module, part: Part, data: Images) -> tuple[float, float]:
    """(accuracy, mean cross entropy) of the model as it is, in evaluation mode."""
    model.eval()
    batches = part.images.split(ROWS_AT_ONCE)
    logits = torch.cat([model(normalised(images, data.mean, data.std)).logits for images in batches])
    model.train()
    loss = torch.nn.functional.cross_entropy(logits, part.labels)
    return float((logits.argmax(1) == part.labels).float().mean()), float(loss)


def _look(model: torch.nn.Module, data: Images) -> dict[str, float]:
    accuracy, nll = _evaluate(model, data.test, data)
    return {"test_accuracy": accuracy, "test_nll": nll, "training_loss": _evaluate(model, data.told, data)[1]}
