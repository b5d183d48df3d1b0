"""Tiny models and data that tests share."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset


class Rows(Dataset):
    """Regression rows, the same on every rank."""

    def __init__(self, rows: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(rows, 4, generator=generator).to(dtype)  # the same values in every dtype
        self.y = torch.randn(rows, 1, generator=generator).to(dtype)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": self.x[index], "labels": self.y[index]}


class Regression(nn.Module):
    """Two layers; the second is a parameter group of its own. Keeps the batches it has seen in training."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.body = nn.Linear(4, 5).to(dtype)
        self.head = nn.Linear(5, 1).to(dtype)
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.training:
            self.seen.append((x.clone(), labels.clone()))
        return {"loss": (self.head(torch.tanh(self.body(x))) - labels).square().mean()}


def two_groups(model: Regression, name: str, lr: float) -> torch.optim.Optimizer:
    """An optimizer with a learning rate per layer."""
    groups: list[dict[str, Any]] = [
        {"params": list(model.body.parameters()), "lr": lr},
        {"params": list(model.head.parameters()), "lr": lr / 2},
    ]
    if name == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01)


def warmup_and_decay(step: int) -> float:
    """0, 1/4, ..., 1, then a linear decay: the first step of a run has learning rate 0."""
    return step / 4 if step < 4 else max(0.1, 1 - (step - 4) / 20)


def bert(dropout: float = 0.0) -> nn.Module:
    """A PreTrainedModel of 10 k parameters with an unused pooler output and tied nothing."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(3)
    config = BertConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        vocab_size=32,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return BertForSequenceClassification(config)


def sentences(rows: int = 64) -> list[dict[str, torch.Tensor]]:
    """Token ids with a label that can be learned."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 32, (rows, 6), generator=generator)
    return [{"input_ids": row, "labels": (row[0] % 2)} for row in ids]


class SmallNorm(nn.Module):
    """A linear layer, BatchNorm and a constant buffer that overflows when it is averaged."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.body = nn.Linear(4, 5)
        self.norm = nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 1)
        self.register_buffer("floor", torch.full((2,), torch.finfo(torch.float32).min))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.head(self.norm(self.body(x.float()))) - labels.float()).square().mean()}
