"""
BLEU as `evaluate.Metric` classes over sacrebleu; `evaluate.load` would fetch its own from the Hub.

`SacreBleu` is the figure to report: detokenised text, and a signature that says how it was scored. `CompoundSplitBleu`
is the older habit of splitting German compounds at their hyphens (Vaswani et al., Ott et al.), which scores higher:
compare it with nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import datasets
import evaluate
from sacrebleu.metrics import BLEU
from sacremoses import MosesTokenizer


class _TextMetric(evaluate.Metric):
    """One hypothesis and one reference per sentence, as text."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(keep_in_memory=True, **settings)  # else every rank would want the same lock file

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})
        return evaluate.MetricInfo(
            description=self.__doc__ or "", citation="https://aclanthology.org/W18-6319", features=features
        )


class SacreBleu(_TextMetric):
    """
    Corpus BLEU in percent, as `sacrebleu REFERENCES -i PREDICTIONS` prints it (Post, 2018), and its signature.

    `compute(predictions=[...], references=[...])` returns `{"score": float, "signature": str}`.
    """

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, Any]:
        metric = BLEU()
        score = metric.corpus_score(predictions, [references]).score
        return {"score": score, "signature": str(metric.get_signature())}


class CompoundSplitBleu(_TextMetric):
    """
    Corpus BLEU in percent on Moses tokens with hyphenated compounds split, unsmoothed: fairseq's
    compound_split_bleu.sh, with both sides tokenised here.

    `compute(predictions=[...], references=[...], language="de")` returns `{"score": float}`.
    """

    def _compute(self, predictions: list[str], references: list[str], language: str = "de") -> dict[str, Any]:
        hypotheses, truths = (split_compounds(sentences, language) for sentences in (predictions, references))
        return {
            "score": BLEU(tokenize="none", smooth_method="none", force=True).corpus_score(hypotheses, [truths]).score
        }


def split_compounds(sentences: Sequence[str], language: str) -> list[str]:
    """Moses tokens with spaces between; a hyphen inside a word becomes a token of its own, `##AT##-##AT##`."""
    return [re.sub(r"(\S)-(\S)", r"\1 ##AT##-##AT## \2", tokens) for tokens in moses_tokens(sentences, language)]


def moses_tokens(sentences: Sequence[str], language: str) -> list[str]:
    """With spaces between. The language is a code such as `fr`, or begins with one, as `fr_FR` and `fr-CA` do."""
    return list(_moses_tokens(tuple(sentences), language))


@lru_cache(maxsize=4)  # every habit wants the same tokens, and every validation those of the same references
def _moses_tokens(sentences: tuple[str, ...], language: str) -> tuple[str, ...]:
    moses = MosesTokenizer(lang=re.split("[_-]", language)[0].lower())
    return tuple(moses.tokenize(sentence, return_str=True, escape=False) for sentence in sentences)


def tokenised_bleu(
    predictions: Sequence[str], references: Sequence[str], language: str = "de", *, lowercase: bool = False
) -> float:
    """
    Corpus BLEU in percent on Moses tokens, unsmoothed: what papers call tokenised BLEU (multi-bleu.perl), with both
    sides tokenised here. Multi30k's are of lower-cased text.
    """
    metric = BLEU(tokenize="none", smooth_method="none", force=True, lowercase=lowercase)
    hypotheses, truths = (moses_tokens(sentences, language) for sentences in (predictions, references))
    return float(metric.corpus_score(hypotheses, [truths]).score)


def bleu(predictions: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """`SacreBleu` in one call: `{"score": float, "signature": str}`."""
    return SacreBleu().compute(predictions=list(predictions), references=list(references))


def bleu_signature() -> str:
    """How `bleu` scores."""
    return str(bleu(["a"], ["a"])["signature"])


def compound_split_bleu(predictions: Sequence[str], references: Sequence[str], language: str = "de") -> float:
    """`CompoundSplitBleu` in one call, in percent."""
    return CompoundSplitBleu().compute(predictions=list(predictions), references=list(references), language=language)[
        "score"
    ]
