"""Which models of a run are judged, the best, the last and the mean of five, and all scores of one on one set."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from translation.bleu import bleu, compound_split_bleu, tokenised_bleu

MEAN_OF = 5
KINDS = ("best", "last", f"mean_of_{MEAN_OF}")


def choose(nll: Mapping[int, float | None], means: Sequence[int] = (MEAN_OF,)) -> dict[str, list[int]]:
    """
    By `KINDS`, what each model is made of; early in a run the mean is of fewer.

    Args:
        nll (`Mapping[int, float | None]`): Of each model that is there, by step or epoch, on the validation set. None:
            not known. Without any that is known the last counts as the best.
        means (`Sequence[int]`, *optional*, defaults to `(5,)`): Of how many last models there is a mean.
    """
    late = sorted(nll)
    # A NaN is smaller than nothing: as it stands `min` would keep it.
    worth = {at: math.inf if value is None or math.isnan(value) else value for at, value in sorted(nll.items())}
    best = min(worth, key=worth.__getitem__)
    chosen = {"best": [best if math.isfinite(worth[best]) else late[-1]], "last": late[-1:]}
    return {**chosen, **{f"mean_of_{count}": late[-count:] for count in means}}


def judge(
    chosen: Mapping[str, list[int]], score: Callable[[list[int]], dict[str, float]]
) -> dict[str, dict[str, float]]:
    """Scores by kind of model. One that is of two kinds, as where the last is the best, is scored once."""
    known: dict[tuple[int, ...], dict[str, float]] = {}
    for made_of in chosen.values():
        if tuple(made_of) not in known:
            known[tuple(made_of)] = score(made_of)
    return {kind: known[tuple(made_of)] for kind, made_of in chosen.items()}


def all_scores(
    hypotheses: Sequence[str], references: Sequence[str], nll: float, language: str = "de"
) -> dict[str, float]:
    """
    Of one model on one set: BLEU in percent in every habit, and NLL per token, `</s>` included, in nats and in bits.

    Args:
        hypotheses (`Sequence[str]`): The model's translations.
        nll (`float`): In nats.
        language (`str`, *optional*, defaults to `"de"`): Of the translations, for Moses' tokens.
    """
    scores = {
        "bleu": bleu(hypotheses, references)["score"],
        "bleu_tokenised": tokenised_bleu(hypotheses, references, language),
        "bleu_tokenised_lowercase": tokenised_bleu(hypotheses, references, language, lowercase=True),
        "bleu_compound_split": compound_split_bleu(hypotheses, references, language),
        "nll": nll,
    }
    return with_bits(scores)


def with_bits(figures: Mapping[str, float]) -> dict[str, float]:
    """Beside each loss and NLL, which are in nats per token, the same in bits: fairseq's unit."""
    bits = {f"{name}_bits": value / math.log(2) for name, value in figures.items() if name.endswith(("loss", "nll"))}
    return {**figures, **bits}


def named(scores: Mapping[str, Mapping[str, float]], plain: str) -> dict[str, float]:
    """Scores of several kinds of models in one: those of the kind `plain` as they are, others' with `_kind` behind."""
    return {
        name if kind == plain else f"{name}_{kind}": value
        for kind, own in scores.items()
        for name, value in own.items()
    }
