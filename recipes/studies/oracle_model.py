"""Rows of `oracle.py` on the model: its shape, logits, losses, gradients, positions and first values."""

from __future__ import annotations

import math
from statistics import fmean
from typing import Any

import torch
from transformers import MarianMTModel

from studies.oracle_results import TINY, Fairseq, digits, row
from translation.model import MODEL_SIZES, make_transformer, smoothed_loss

EPSILON = 0.1  # label smoothing


def shapes(fairseq: Fairseq) -> list[dict[str, Any]]:
    """What the registered architectures say against `MODEL_SIZES`."""
    made = []
    for size in TINY:
        ours, theirs = MODEL_SIZES[size], fairseq.numbers[size]
        shape = {
            "embed_dim": ours["d_model"],
            "ffn_embed_dim": ours["ffn"],
            "attention_heads": ours["heads"],
            "layers": ours["layers"],
            "normalize_before": False,
            "learned_pos": False,
        }
        dropouts = {"dropout": ours["dropout"], "attention_dropout": 0.0, "activation_dropout": 0.0}
        config = make_transformer("mini", 300).config
        assert (config.attention_dropout, config.activation_dropout) == (0.0, 0.0)
        assert theirs["activation"] == config.activation_function
        same = theirs["shape"] == {name: [value] * 2 for name, value in shape.items()}
        same = same and theirs["dropouts"] == dropouts
        words = f"{ours['layers']} layers, {ours['d_model']} wide, {ours['ffn']} inside, {ours['heads']} heads"
        made.append(row(f"{size}: {words}, dropout {ours['dropout']}", different="" if same else str(theirs)))
    return made


def forward(fairseq: Fairseq) -> list[dict[str, Any]]:
    """Logits, losses and gradients of eight pairs."""
    made = []
    vocabulary = fairseq.numbers["vocabulary"]
    for size in TINY:
        theirs, told = fairseq.tensors[size], fairseq.numbers[size]
        model = fairseq.model(size, theirs["weights"])
        batch = fairseq.batch(fairseq.pairs[:8])
        labels = batch.pop("labels")
        outputs = model(**batch, use_cache=False)
        held = labels >= 0
        same = digits(outputs.logits[held], theirs["logits"][..., fairseq.order][held])
        made.append(row(f"{size}: logits", digits=same))
        # fairseq spreads epsilon over the V - 1 other tokens, torch over all V.
        loss = smoothed_loss(outputs, labels, label_smoothing=EPSILON * vocabulary / (vocabulary - 1))
        loss.backward()
        nll = smoothed_loss(outputs, labels, label_smoothing=0.0).item()
        assert told["tokens"] == int(held.sum())
        made.append(
            row(
                f"{size}: NLL per target token, in bits",
                digits=digits(nll / math.log(2), told["shown"]["nll_loss"]),
                note=" (nats over log 2)",
            )
        )
        assert math.isclose(told["perplexity"], 2 ** told["shown"]["nll_loss"], rel_tol=1e-5)
        made.append(
            row(
                f"{size}: label-smoothed loss per target token",
                different="ε over V tokens as in 0.9.0, there over V - 1",
                digits=digits(loss.detach(), told["loss"] / told["tokens"]),
                note=" with ε V / (V - 1)",
            )
        )
        made.append(row(f"{size}: gradient of every parameter", digits=gradients(fairseq, model, theirs, told)))
    return made


def gradients(fairseq: Fairseq, model: MarianMTModel, theirs: dict[str, Any], told: dict[str, Any]) -> int:
    """
    Digits of the worst parameter. A key's bias moves no softmax: its gradient is rounding on both sides, and only
    has to be small.
    """
    expected = fairseq.state(theirs["gradients"])
    largest = max(value.abs().max() for value in expected.values())
    worst = 15
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        gradient = parameter.grad * told["tokens"]
        if name.endswith("k_proj.bias"):
            assert max(gradient.abs().max(), expected[name].abs().max()) < 1e-6 * largest, name
        else:
            worst = min(worst, digits(gradient, expected[name]))
    return worst


def positions(fairseq: Fairseq) -> dict[str, Any]:
    """Sines and cosines."""
    d = TINY["big"]["d_model"]
    theirs = fairseq.tensors["big"]["positions"]
    place = torch.arange(len(theirs), dtype=torch.float64)[:, None]
    angles = place * 10_000.0 ** (-torch.arange(d // 2, dtype=torch.float64) / (d // 2 - 1))
    expected = torch.cat([angles.sin(), angles.cos()], dim=1)
    expected[fairseq.numbers["ids"]["pad"]] = 0
    assert digits(expected, theirs) >= 5
    return row(
        "sinusoidal positions",
        different="10,000^(-2i/d) from 0 (Vaswani et al.), there 10,000^(-i/(d/2 - 1)) from 2",
    )


def initial(fairseq: Fairseq) -> list[dict[str, Any]]:
    """Standard deviations at the real sizes."""
    return [row for size in TINY for row in initial_of(fairseq, size)]


def initial_of(fairseq: Fairseq, size: str) -> list[dict[str, Any]]:
    """Those of one size."""
    torch.manual_seed(0)
    model = make_transformer(size, 1000)
    drawn = fairseq.numbers["initial"][size]
    kinds: dict[str, list[torch.Tensor]] = {}
    for name, value in model.named_parameters():
        if value.requires_grad:
            kinds.setdefault(".".join(name.split(".")[-2:]), []).append(value.detach())
    made = []
    for kind, their_kind, words in (
        ("shared.weight", "embed_tokens.weight", "embeddings"),
        ("q_proj.weight", "q_proj.weight", "queries"),
        ("k_proj.weight", "k_proj.weight", "keys"),
        ("v_proj.weight", "v_proj.weight", "values"),
        ("out_proj.weight", "out_proj.weight", "attention's output"),
        ("fc1.weight", "fc1.weight", "first of the feed-forward layer"),
        ("fc2.weight", "fc2.weight", "second of the feed-forward layer"),
    ):
        values = [value[1:] if kind == "shared.weight" else value for value in kinds[kind]]
        theirs = fmean(drawn[their_kind])
        ours = max((value.std().item() for value in values), key=lambda own: abs(own / theirs - 1))  # the furthest
        same = abs(ours / theirs - 1) < 0.02
        why = "" if same else f"{ours:.4f}, Glorot's as in fairseq 0.9.0; there {theirs:.4f}, torch's own"
        note = f" within sampling: {ours:.4f} and {theirs:.4f}" if same else ""
        made.append(row(f"{size}: initial sd of {words}", different=why, note=note, ours=ours, theirs=theirs))
    biases = [values for kind, values in kinds.items() if kind.endswith("bias")]
    assert all(not value.any() for values in biases for value in values)
    for words, their_kinds, why in (
        ("queries, keys and values", ("q_proj", "k_proj", "v_proj"), "0, as in fairseq 0.8.0; in 0.9.0 and there"),
        ("the feed-forward layer", ("fc1", "fc2"), "0, as in fairseq 0.9.0; there"),
    ):
        theirs = fmean(value for kind in their_kinds for value in drawn[f"{kind}.bias"])
        made.append(row(f"{size}: initial biases of {words}", different=f"{why} torch's own, sd {theirs:.4f}"))
    assert not any(drawn["out_proj.bias"])
    return made
