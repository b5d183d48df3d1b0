"""The paper's image rows as presets of `image_classification.py`, and what they need: step decay, ResNet-18, last BatchNorms at 0."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from slowmo_hf import SlowMoConfig

# Section 5 of the paper and, where it is silent, the large-batch recipe it refers to (0.1 per 256 images, weight decay 1e-4).
# Batches are per process: 32 workers of one GPU on CIFAR-10 (4,096 in all), 32 machines of 8 GPUs on ImageNet (8,192 in all).
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
        "processes_per_worker": "1",
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
        "processes_per_worker": "node",
        "dataloader_num_workers": 4,
    },
}


def preset_defaults(flags: list[str]) -> dict[str, Any]:
    """
    What `--preset` sets, for `parser.set_defaults`: explicit flags win. The period and the inner state follow `--base`, as in the paper;
    slow momentum is the caller's, for it was tuned per row and not published.
    """
    reader = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    reader.add_argument("--preset", choices=list(PRESETS))
    reader.add_argument("--base", default="local_sgd")
    reader.add_argument("--outer_momentum", type=float, default=SlowMoConfig.outer_momentum)
    asked, _ = reader.parse_known_args(flags)
    if asked.preset is None:
        return {}
    config = SlowMoConfig.paper(asked.preset, asked.base, outer_momentum=asked.outer_momentum)
    values = {**PRESETS[asked.preset], "sync_every": config.sync_every, "inner_state": config.inner_state}
    if asked.base == "all_reduce":
        values.pop("processes_per_worker")
    return values


def step_decay(optimizer: torch.optim.Optimizer, steps_per_epoch: int, warmup_epochs: float, decay_epochs: list[int]) -> Any:
    """Linear warm-up from 0 (the first step has a part of the rate already), then a tenth at each of `decay_epochs`."""

    def factor(step: int) -> float:
        epoch = step / steps_per_epoch
        warm = 1.0 if not warmup_epochs else min(1.0, (step + 1) / (warmup_epochs * steps_per_epoch))
        return warm * 0.1 ** sum(epoch >= decay for decay in decay_epochs)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


@torch.no_grad()
def zero_last_norms(model: torch.nn.Module) -> int:
    """Every residual branch starts at 0: the scale of its last BatchNorm. Returns the number of branches."""
    branches = [module for module in model.modules() if type(module).__name__ in ("ResNetBasicLayer", "ResNetBottleNeckLayer")]
    for branch in branches:
        branch.layer[-1].normalization.weight.zero_()
    return len(branches)
