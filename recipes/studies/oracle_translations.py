"""Rows of `oracle.py` on translations: beam search, and the mean of checkpoints."""

from __future__ import annotations

import tempfile
from typing import Any

import torch

from studies.oracle_results import Fairseq, digits, row
from translation.model import average_checkpoints, beam_settings, generate
from translation.tokens import EOS


@torch.no_grad()
def beams(fairseq: Fairseq) -> list[dict[str, Any]]:
    """Sentences in batches of twenty, all four translations of each."""
    model = fairseq.model("big", fairseq.tensors["learned"]).eval()
    model.generation_config.decoder_start_token_id = EOS
    ours, scores = [], []
    for start in range(0, len(fairseq.pairs), 20):
        source = fairseq.batch(fairseq.pairs[start : start + 20])
        inputs = {name: source[name] for name in ("input_ids", "attention_mask")}
        made = model.generate(
            **inputs,
            **beam_settings(),
            max_length=source["input_ids"].shape[1] + 50,
            num_return_sequences=4,
            return_dict_in_generate=True,
            output_scores=True,
        )
        found = [tokens[: tokens.index(EOS) + 1] for tokens in made.sequences[:, 1:].tolist()]
        best = generate(model, **inputs)[:, 1:].tolist()
        assert [tokens[: tokens.index(EOS) + 1] for tokens in best] == found[::4]
        ours += found
        scores += made.sequences_scores.tolist()
    theirs = [beam for found in fairseq.numbers["beams"] for beam in found]
    expected = [fairseq.ours_of[beam["tokens"]].tolist() for beam in theirs]
    same = [mine == other for mine, other in zip(ours, expected, strict=True)]
    count, lengths = len(fairseq.pairs), [len(tokens) for tokens in ours[::4]]
    assert all(same[::4]), "the best one differs"
    # Those of ours alone ended in the last step, where better ones take the place of some that had ended before.
    behind = 0
    for first in range(0, len(same), 4):
        mine, others = ours[first : first + 4], expected[first : first + 4]
        alone = [tokens for tokens in mine if tokens not in others]
        behind += len(alone)
        assert all(len(tokens) == max(map(len, others)) for tokens in alone)
    search = fairseq.numbers["search"]
    assert (search["min_len"], search["unk_penalty"], search["max_len_a"]) == (1, 0, 0)
    return [
        row(
            f"{count} translations, beam 4, length penalty 0.6",
            digits=digits(torch.tensor(scores[::4]), torch.tensor([beam["score"] for beam in theirs[::4]])),
            note=f" in scores, and in every token; {min(lengths)} to {max(lengths)} tokens long",
        ),
        row(
            f"the {3 * count} beams behind the best",
            different=f"{behind} are others: the best four of all that ended, there the first four",
        ),
        row(
            "longest translation",
            different=f"50 more than the longest source (Vaswani et al.), there {search['max_len_b']} by default",
        ),
    ]


def average(fairseq: Fairseq) -> dict[str, Any]:
    """The mean of five checkpoints."""
    states = [fairseq.state(state) for state in fairseq.tensors["average"]]
    model = fairseq.model("big", fairseq.tensors["average"][0]).float()
    with tempfile.TemporaryDirectory() as folder:
        for number, state in enumerate(states):
            model.load_state_dict(state, strict=False)
            model.save_pretrained(f"{folder}/{number}")
        ours = average_checkpoints([f"{folder}/{number}" for number in range(len(states))])
    worst = 15
    for name in states[0]:
        # What its scripts/average_checkpoints.py does: a sum in float32, then a division.
        total = torch.zeros_like(states[0][name], dtype=torch.float32)
        for state in states:
            total += state[name].float()
        worst = min(worst, digits(ours[name], total / len(states)) if total.any() else 15)
    return row(
        "mean of 5 checkpoints",
        digits=worst,
        note="; its script is not in the package: it was read, not run",
    )
