"""The paper's image rows as presets of `image_classification.py`, and what they need: step decay, ResNet-18, last BatchNorms at 0."""

from __future__ import annotations

from typing import Any

import torch

from slowmo_hf import SlowMoConfig

# Section 5 of the paper and, where it is silent, the large-batch recipe it refers to (0.1 per 256 images, weight decay 1e-4).
# Slow momentum was tuned per row, "typically 0.4 to 0.8", and not published. Rows differ in --base and --outer_momentum (0: without) only.
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
        "outer_momentum": 0.6,
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
        "dataloader_num_workers": 4,
    },
}


def row_defaults(preset: str, base: str, outer_momentum: float) -> dict[str, Any]:
    """What follows the base in a row of Table 1. Without slow momentum gossip is as it was published: no exact average."""
    config = SlowMoConfig.paper(preset, base, outer_momentum=outer_momentum)
    gossip_alone = base in ("sgp", "osgp", "dpsgd") and not outer_momentum
    return {
        "output_dir": f"outputs/{preset}_{base}{'_slowmo' if outer_momentum else ''}",
        "sync_every": config.sync_every,
        "inner_state": "auto" if gossip_alone else config.inner_state,
        "exact_average": not gossip_alone,
        # A worker is a machine on ImageNet, a GPU on CIFAR-10.
        "processes_per_worker": "auto" if base == "all_reduce" else "node" if preset == "imagenet" else "1",
    }


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
