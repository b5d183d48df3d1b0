"""
The Transformer of Vaswani et al. for `translation.py`: its shape, its loss, its translations. Nothing here needs a
Trainer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSeq2SeqLM, MarianConfig, MarianMTModel, PreTrainedTokenizerFast

from translation.tokens import EOS, NO_LABEL, PAD, POSITIONS, ids_of, padded

EXTRA_TOKENS = 50  # a translation may be this much longer than the batch's longest source, as in Vaswani et al.
# Vaswani et al., table 3. `small` is what is used for Multi30k (Wu et al., 2021, https://aclanthology.org/2021.acl-long.480,
# as "Transformer-Tiny"); `tiny` is for the shipped help text on two CPU cores, `mini` for several workers on one.
MODEL_SIZES = {
    "mini": {"d_model": 64, "ffn": 256, "heads": 4, "layers": 1, "dropout": 0.0},
    "tiny": {"d_model": 128, "ffn": 512, "heads": 4, "layers": 2, "dropout": 0.1},
    "small": {"d_model": 128, "ffn": 256, "heads": 4, "layers": 4, "dropout": 0.3},
    "base": {"d_model": 512, "ffn": 2048, "heads": 8, "layers": 6, "dropout": 0.1},
    "big": {"d_model": 1024, "ffn": 4096, "heads": 16, "layers": 6, "dropout": 0.3},
}
# These start as in fairseq of that year: `base` and `big` as at the paper's time, `small` as in 0.12.2, with which it
# is compared. The recipe's own keep Marian's draw, variance 1 / d_model everywhere: they learn sooner with it, and the
# records of the studies have it.
PUBLISHED_SIZES = {"small": 2021, "base": 2017, "big": 2019}


def make_transformer(
    size: str, vocab_size: int, dropout: float | None = None, year: int | None = None
) -> MarianMTModel:
    """
    The Transformer of Vaswani et al. (2017) as Marian's: sinusoidal positions, layer norm after each residual sum,
    ReLU, and one matrix for both embeddings and the output. Embeddings are drawn with variance 1 / d_model and scaled
    by its root; the rest of `PUBLISHED_SIZES` as fairseq drew it then (`draw_weights`), of the others like embeddings.

    Args:
        size (`str`): One of `MODEL_SIZES`.
        vocab_size (`int`): `len(tokenizer)`.
        dropout (`float`, *optional*): Another than the size's own.
        year (`int`, *optional*): Of another fairseq than the size's own, if it has one.
    """
    shape = MODEL_SIZES[size]
    names = {"layers": "layers", "ffn_dim": "ffn", "attention_heads": "heads"}
    sides = {f"{side}_{name}": shape[ours] for side in ("encoder", "decoder") for name, ours in names.items()}
    config = MarianConfig(
        vocab_size=vocab_size,
        d_model=shape["d_model"],
        dropout=shape["dropout"] if dropout is None else dropout,
        init_std=shape["d_model"] ** -0.5,
        scale_embedding=True,
        activation_function="relu",
        max_position_embeddings=POSITIONS,
        pad_token_id=PAD,
        eos_token_id=EOS,
        decoder_start_token_id=PAD,
        **sides,
    )
    model = MarianMTModel(config)
    year = year or PUBLISHED_SIZES.get(size)
    if year is not None:
        draw_weights(model, year)
    model.generation_config.update(
        max_length=POSITIONS, suppress_tokens=[PAD], forced_eos_token_id=EOS, **beam_settings()
    )
    return model


@torch.no_grad()
def draw_weights(model: MarianMTModel, year: int) -> None:
    """
    Draw the layers of a new model as fairseq did in that year: until 2019 (0.8.0) all matrices by Glorot's uniform,
    with queries, keys and values as one, and biases 0. As torch draws them are the biases of queries, keys and values
    from 2020 on (0.9.0), and feed-forward layers from 2021 on (0.10).
    With Marian's own draw the feed-forward matrices of `big` start 1.6 times as large as in 2019, and queries and keys
    1.4 times; the second matrix of `small` starts twice as large by Glorot as by torch.
    """
    for name, module in model.model.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        of_three = name.endswith(("q_proj", "k_proj", "v_proj"))
        is_torchs = year >= 2021 and name.endswith(("fc1", "fc2"))
        if year >= 2020:
            module.reset_parameters()
        if not is_torchs:
            torch.nn.init.xavier_uniform_(module.weight, gain=0.5**0.5 if of_three else 1.0)
        if not (is_torchs or (year >= 2020 and of_three)):
            torch.nn.init.zeros_(module.bias)


def smoothed_loss(
    outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None, *, label_smoothing: float
) -> torch.Tensor:
    """
    Cross-entropy in nats with label smoothing, a sum over `num_items_in_batch`: Trainer's count of labels in all
    micro-batches of a step; where it is None, of these labels.
    """
    total = torch.nn.functional.cross_entropy(
        outputs.logits.flatten(0, 1).float(),
        labels.flatten(),
        ignore_index=NO_LABEL,
        label_smoothing=label_smoothing,
        reduction="sum",
    )
    return total / (labels.ne(NO_LABEL).sum() if num_items_in_batch is None else num_items_in_batch)


@torch.no_grad()
def sentence_nll(model: MarianMTModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Negative log-likelihood of each sentence's labels, in nats, shape (rows,)."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**inputs).logits.float()
    return torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), batch["labels"], ignore_index=NO_LABEL, reduction="none"
    ).sum(dim=1)


def beam_settings(num_beams: int = 4, length_penalty: float = 0.6) -> dict[str, Any]:
    """
    For `generate` and generation configs. Sums of log-probabilities are divided by length ** `length_penalty`, as in
    fairseq, the search stops with `num_beams` finished translations, and none is empty. With one beam it is greedy,
    and neither of the first two has a meaning.
    """
    search = num_beams > 1
    return {
        "num_beams": num_beams,
        "length_penalty": length_penalty if search else 1.0,
        "early_stopping": search,
        "min_new_tokens": 1,  # before the end
    }


@torch.no_grad()
def generate(
    model: MarianMTModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    num_beams: int = 4,
    length_penalty: float = 0.6,
) -> torch.Tensor:
    """
    Beam search by `beam_settings`, tokens of shape (rows, longest). It stops at the latest `EXTRA_TOKENS` after the
    length of the longest source.
    """
    longest = min(input_ids.shape[1] + EXTRA_TOKENS, POSITIONS)
    return model.generate(
        input_ids=input_ids,
        attention_mask=attention_mask,
        max_length=longest,
        do_sample=False,
        **beam_settings(num_beams, length_penalty),
    )


def decode(tokenizer: PreTrainedTokenizerFast, tokens: np.ndarray | torch.Tensor) -> list[str]:
    """Text of every row; negative ids are padding."""
    tokens = np.asarray(tokens)
    return tokenizer.batch_decode(np.where(tokens < 0, PAD, tokens), skip_special_tokens=True)


def translate(
    model: MarianMTModel,
    tokenizer: PreTrainedTokenizerFast,
    sentences: Sequence[str],
    *,
    num_beams: int = 4,
    length_penalty: float = 0.6,
    batch_size: int = 64,
) -> list[str]:
    """Translate sentences, in batches of similar length; the translations come in the sentences' order."""
    encoded = ids_of(list(sentences), tokenizer)
    order = sorted(range(len(encoded)), key=lambda row: len(encoded[row]))
    translations = [""] * len(encoded)
    was_training = model.training
    model.eval()
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        input_ids = padded([encoded[row] for row in rows], PAD).to(model.device)
        tokens = generate(model, input_ids, input_ids.ne(PAD).long(), num_beams, length_penalty)
        for row, text in zip(rows, decode(tokenizer, tokens.cpu()), strict=True):
            translations[row] = text
    model.train(was_training)
    return translations


def average_checkpoints(folders: Sequence[str | Path]) -> dict[str, torch.Tensor]:
    """Mean of the parameters that `save_pretrained` wrote into each folder."""
    return mean_of_states(map(load_state, folders))


def load_state(folder: str | Path) -> dict[str, torch.Tensor]:
    """What `save_pretrained` wrote."""
    state: dict[str, torch.Tensor] = AutoModelForSeq2SeqLM.from_pretrained(folder).state_dict()
    return state


def mean_of_states(states: Iterable[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Mean of every tensor, summed in float64 one state after the other, in its own dtype."""
    total: dict[str, torch.Tensor] = {}
    count = 0
    for state in states:
        count += 1
        dtypes = {name: value.dtype for name, value in state.items()}
        total = {name: total.get(name, 0) + value.double() for name, value in state.items()}
    return {name: (value / count).to(dtypes[name]) for name, value in total.items()}
