"""A ResNet for small images: transformers' ResNet with the 3x3 stem of the CIFAR papers in place of 7x7, stride 2 and pooling."""

from __future__ import annotations

import torch
from transformers import ResNetConfig, ResNetForImageClassification


class SmallResNetForImageClassification(ResNetForImageClassification):
    """`save_pretrained` and `from_pretrained` work as usual, with this class."""

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__(config)
        embedder = self.resnet.embedder
        embedder.embedder.convolution = torch.nn.Conv2d(
            config.num_channels, config.embedding_size, kernel_size=3, stride=1, padding=1, bias=False
        )
        embedder.pooler = torch.nn.Identity()
        self.post_init()


def make_model(image_size: int, channels: int, label_names: list[str], width: int = 16) -> ResNetForImageClassification:
    """A small ResNet (3 stages of basic blocks from `width` channels on) for small images, ResNet-50 for large ones."""
    labels = {"id2label": dict(enumerate(label_names)), "label2id": {name: i for i, name in enumerate(label_names)}}
    if image_size > 64:
        return ResNetForImageClassification(ResNetConfig(num_channels=channels, **labels))
    config = ResNetConfig(
        num_channels=channels,
        embedding_size=width,
        hidden_sizes=[width, 2 * width, 4 * width],
        depths=[1, 1, 1],
        layer_type="basic",
        **labels,
    )
    return SmallResNetForImageClassification(config)
