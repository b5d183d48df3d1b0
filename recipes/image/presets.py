"""
The paper's image rows as presets of `image_classification.py`, and what they need: step decay, ResNet-18, last
BatchNorms at 0.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

# Section 5 of the paper and, where it is silent, the large-batch recipe it refers to (0.1 per 256 images, weight decay
# 1e-4). Slow momentum was tuned per row, "typically 0.4 to 0.8", and no more is known here. Rows differ in --base and
# --outer_momentum (0: without) only. Batches are per process: 32 workers of one GPU on CIFAR-10 (4,096 in all), 32
# machines of 8 GPUs on ImageNet (8,192 in all).
PRESETS: dict[str, dict[str, Any]] = {
    "cifar10": {
        "dataset_name": "uoft-cs/cifar10",
        "architecture": "resnet18",
        "per_device_train_batch_size": 128,
        "num_train_epochs": 200,
        "warmup_epochs": 5.0,
        "decay_epochs": [100, 150, 175],
        "learning_rate": 1.6,
        "weight_decay": 1e-4,
        "inner_momentum": 0.9,
        "outer_momentum": 0.6,
        "processes_per_worker": "1",  # a worker is a GPU
    },
    "imagenet": {
        "dataset_name": "ILSVRC/imagenet-1k",
        "architecture": "resnet50",
        "zero_init_residual": True,
        "per_device_train_batch_size": 32,
        "num_train_epochs": 90,
        "warmup_epochs": 5.0,
        "decay_epochs": [30, 60, 80],
        "learning_rate": 3.2,
        "weight_decay": 1e-4,
        "inner_momentum": 0.9,
        "outer_momentum": 0.6,
        "processes_per_worker": "node",
        "dataloader_num_workers": 4,
    },
}


def decay_factor(step: int, warmup_steps: float, decay_steps: Iterable[float]) -> float:
    """
    Of the learning rate at a step, counted from 0: linear warm-up (the first step has a part of the rate), a tenth at
    each decay.
    """
    warm = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    return warm * 0.1 ** sum(step >= decay for decay in decay_steps)


def step_decay(
    optimizer: torch.optim.Optimizer, steps_per_epoch: int, warmup_epochs: float, decay_epochs: list[int]
) -> Any:
    """Linear warm-up, then a tenth at each of `decay_epochs`."""
    decays = [decay * steps_per_epoch for decay in decay_epochs]
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: decay_factor(step, warmup_epochs * steps_per_epoch, decays)
    )


@torch.no_grad()
def zero_last_norms(model: torch.nn.Module) -> int:
    """Every residual branch starts at 0: the scale of its last BatchNorm. Returns the number of branches."""
    branches = [
        module for module in model.modules() if type(module).__name__ in ("ResNetBasicLayer", "ResNetBottleNeckLayer")
    ]
    for branch in branches:
        branch.layer[-1].normalization.weight.zero_()
    return len(branches)
