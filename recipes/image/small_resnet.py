"""A ResNet for small images: transformers' ResNet with a 3x3 stem in place of 7x7, stride 2 and pooling."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification


class SmallResNetConfig(ResNetConfig):
    """`ResNetConfig` under a name of its own, so that nobody loads the weights into a 7x7 stem."""

    model_type = "small_resnet"


class SmallResNetForImageClassification(ResNetForImageClassification):
    """
    `save_pretrained`, `from_pretrained` and, once this file is imported, `AutoModelForImageClassification` work as
    usual.
    """

    config_class = SmallResNetConfig

    def __init__(self, config: SmallResNetConfig) -> None:
        super().__init__(config)
        stem = self.resnet.embedder
        stem.embedder.convolution = torch.nn.Conv2d(
            config.num_channels, config.embedding_size, kernel_size=3, padding=1, bias=False
        )
        stem.pooler = torch.nn.Identity()
        self.post_init()


AutoConfig.register(SmallResNetConfig.model_type, SmallResNetConfig, exist_ok=True)
AutoModelForImageClassification.register(SmallResNetConfig, SmallResNetForImageClassification, exist_ok=True)


ARCHITECTURES = ("small", "resnet18", "resnet50")


def make_model(
    image_size: int, channels: int, label_names: list[str], width: int = 32, architecture: str = "auto"
) -> ResNetForImageClassification:
    """
    A small ResNet for small images (three stages of one basic block each, from half the image's resolution down),
    ResNet-50 for others.

    Args:
        image_size (`int`): Side in pixels; above 64 it is ResNet-50.
        channels (`int`): 1 for grey images, 3 for colour.
        label_names (`list[str]`): One per class, kept in the model's config.
        width (`int`, *optional*, defaults to `32`): Channels of the small ResNet's stem and first stage; 2 and 4 times
            as many in the next.
        architecture (`str`, *optional*, defaults to `"auto"`): `small`, `resnet18` (CIFAR's: the small stem, four
            stages of two basic blocks, from the image's own resolution down), `resnet50`.
    """
    labels = {"id2label": dict(enumerate(label_names)), "label2id": {name: i for i, name in enumerate(label_names)}}
    if architecture == "auto":
        architecture = "resnet50" if image_size > 64 else "small"
    if architecture == "resnet18":
        stages = {"hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "layer_type": "basic"}
        return SmallResNetForImageClassification(
            SmallResNetConfig(num_channels=channels, embedding_size=64, **stages, **labels)
        )
    if architecture == "resnet50":
        return ResNetForImageClassification(ResNetConfig(num_channels=channels, **labels))
    config = SmallResNetConfig(
        num_channels=channels,
        embedding_size=width,
        hidden_sizes=[width, 2 * width, 4 * width],
        depths=[1, 1, 1],
        layer_type="basic",
        downsample_in_first_stage=True,
        **labels,
    )
    return SmallResNetForImageClassification(config)
