"""What fairseq computed, in this recipe's names and ids, and how a row of `oracle.py` tells what is equal."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import MarianMTModel

from translation.model import MODEL_SIZES, make_transformer
from translation.tokens import EOS, collate

TINY = {"big": {"d_model": 64, "ffn": 256}, "base": {"d_model": 32, "ffn": 128}}


def digits(ours: torch.Tensor | float, theirs: torch.Tensor | float) -> int:
    """In which two tensors agree: of the largest difference, over the largest value."""
    first, second = (torch.as_tensor(values, dtype=torch.float64) for values in (ours, theirs))
    difference = (first - second).abs().max() / second.abs().max()
    return 15 if difference == 0 else max(0, min(15, math.floor(-math.log10(difference.item()))))


def row(
    piece: str, *, digits: int | None = None, note: str = "", different: str = "", **figures: Any
) -> dict[str, Any]:
    """Of the table: a difference where there is one, how many digits are equal, and the figures behind both."""
    same = f"equal to {digits} digits" if digits is not None else "" if different else "equal"
    words = [f"different: {different}" if different else "", f"{same}{note}"]
    verdict = "; ".join(word for word in words if word)
    return {"piece": piece, "digits": digits, "different": bool(different), "verdict": verdict, **figures}


class Fairseq:
    """
    What fairseq computed, in this recipe's names and ids.

    Args:
        numbers (`dict`), tensors (`dict`): As `oracle_fairseq.py` wrote them.
    """

    def __init__(self, numbers: dict[str, Any], tensors: dict[str, Any]) -> None:
        self.numbers, self.tensors = numbers, tensors
        ids = numbers["ids"]
        # Whose place in fairseq's dictionary is where: ours has <pad> and </s> first.
        special = [ids["pad"], ids["eos"], ids["bos"], ids["unk"]]
        self.order = torch.tensor([*special, *range(len(special), numbers["vocabulary"])])
        self.ours_of = torch.argsort(self.order)
        self.pairs = [
            {"input_ids": self.ours_of[source].tolist(), "labels": self.ours_of[target].tolist()}
            for source, target in (map(torch.tensor, pair) for pair in tensors["pairs"])
        ]

    def model(self, size: str, weights: dict[str, torch.Tensor]) -> MarianMTModel:
        """A tiny one of the size's structure, with fairseq's weights and positions."""
        MODEL_SIZES["oracle"] = {**MODEL_SIZES[size], **TINY[size], "dropout": 0.0}
        model = make_transformer("oracle", self.numbers["vocabulary"]).double()
        del MODEL_SIZES["oracle"]
        state = self.state(weights)
        missing = {name for name, parameter in model.named_parameters() if parameter.requires_grad} - set(state)
        assert not missing, missing
        model.load_state_dict(state, strict=False)
        table = self.tensors[size]["positions"][self.numbers["ids"]["pad"] + 1 :]
        for side in (model.model.encoder, model.model.decoder):
            side.embed_positions.weight.data[: len(table)] = table
        return model

    def state(self, theirs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """
        fairseq's tensors by our names; its encoder layers hold a second, empty copy of each for inference, which is
        left out.
        """
        kinds = (
            "proj.weight",
            "proj.bias",
            "fc1.weight",
            "fc1.bias",
            "fc2.weight",
            "fc2.bias",
            "norm.weight",
            "norm.bias",
        )
        made = {f"model.{name}": value for name, value in theirs.items() if name.endswith(kinds)}
        return {**made, "model.shared.weight": theirs["encoder.embed_tokens.weight"][self.order]}

    @staticmethod
    def batch(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        """The recipe's, but that a translation starts with `</s>`."""
        made = collate(rows)
        made["decoder_input_ids"][:, 0] = EOS
        return made
