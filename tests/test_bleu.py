"""The translation recipe's BLEU: by hand, and that of sacreBLEU's command line."""

import math
import re

import evaluate
import pytest
import sacrebleu
from sacremoses import MosesTokenizer

from corpora import sacrebleu_command
from translation.bleu import CompoundSplitBleu, SacreBleu, bleu, compound_split_bleu, moses_tokens, split_compounds
from translation.data import load_corpus
from translation.judged import all_scores


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """References of the shipped test set, hypotheses with every seventh word left out, and both as files."""
    references = load_corpus().test["target"][:]
    hypotheses = [" ".join(word for at, word in enumerate(text.split()) if at % 7) for text in references]
    folder = tmp_path_factory.mktemp("scored")
    for name, lines in (("ref", references), ("hyp", hypotheses)):
        (folder / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return references, hypotheses, folder


def test_bleu_by_hand():
    """
    `the cat sat on the mat` for `the cat sat on a mat`: 5/6 words, 3/5 pairs, 2/4 triples, 1/3 quadruples, equally
    long.
    """
    expected = 100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** (1 / 4)
    assert bleu(["the cat sat on the mat"], ["the cat sat on a mat"])["score"] == pytest.approx(expected)
    assert compound_split_bleu(["the cat sat on the mat"], ["the cat sat on a mat"]) == pytest.approx(expected)
    assert bleu(["the cat sat on"], ["the cat sat on a mat"])["score"] == pytest.approx(100 * math.exp(1 - 6 / 4))


def test_bleu_equals_the_command_line(scored):
    references, hypotheses, folder = scored
    score, signature = sacrebleu_command(folder / "ref", folder / "hyp")
    assert 50 < score < 90
    assert bleu(hypotheses, references) == {"score": pytest.approx(score, abs=1e-9), "signature": signature}


def test_compound_split_bleu_equals_the_command_line(scored):
    """On files that are tokenised and split already."""
    references, hypotheses, folder = scored
    for name, lines in (("ref.atat", references), ("hyp.atat", hypotheses)):
        (folder / name).write_text("".join(f"{line}\n" for line in split_compounds(lines, "de")), encoding="utf-8")
    score, _ = sacrebleu_command(
        folder / "ref.atat", folder / "hyp.atat", "--tokenize", "none", "--smooth-method", "none", "--force"
    )
    assert compound_split_bleu(hypotheses, references) == pytest.approx(score, abs=1e-9)
    assert score != pytest.approx(bleu(hypotheses, references)["score"], abs=0.1)


@pytest.mark.parametrize("language", ["fr", "fr_FR", "fr-CA", "FR"])
def test_a_language_is_known_by_its_code(language):
    """French splits behind an apostrophe, others do not."""
    assert moses_tokens(["l'été"], language) == ["l' été"]
    assert moses_tokens(["l'été"], "de") != ["l' été"]


def test_compounds_by_hand():
    assert split_compounds(["Der E-Mail-Test (z.B. heute): 5 - drei."], "de") == [
        "Der E ##AT##-##AT## Mail ##AT##-##AT## Test ( z.B. heute ) : 5 - drei ."
    ]


@pytest.mark.parametrize("metric", [SacreBleu, CompoundSplitBleu])
def test_metrics_are_evaluate_s(metric):
    """Batches added one after the other are one corpus."""
    assert issubclass(metric, evaluate.Metric)
    whole, parts = metric(), metric()
    for word in ("eins zwei drei vier", "fünf sechs sieben acht neun"):
        parts.add_batch(predictions=[word], references=[f"{word} zehn"])
    both = ["eins zwei drei vier", "fünf sechs sieben acht neun"]
    assert parts.compute() == whole.compute(predictions=both, references=[f"{text} zehn" for text in both])
    with pytest.raises(ValueError, match="Mismatch"):
        metric().compute(predictions=["a"], references=["a", "b"])


def test_all_scores_are_sacrebleu_s(scored):
    """Every habit by a direct call; NLL in both units."""
    references, hypotheses, _ = scored
    references, hypotheses = references[:200], [hypotheses[0].lower(), *hypotheses[1:200]]
    plain = sacrebleu.metrics.BLEU(tokenize="none", smooth_method="none", force=True)
    lower = sacrebleu.metrics.BLEU(tokenize="none", smooth_method="none", force=True, lowercase=True)
    moses = MosesTokenizer(lang="de")
    words = [
        [moses.tokenize(text, return_str=True, escape=False) for text in side] for side in (hypotheses, references)
    ]
    split = [[re.sub(r"(\S)-(\S)", r"\1 ##AT##-##AT## \2", text) for text in side] for side in words]
    found = all_scores(hypotheses, references, 1.5)
    assert found == {
        "bleu": sacrebleu.metrics.BLEU().corpus_score(hypotheses, [references]).score,
        "bleu_tokenised": plain.corpus_score(words[0], [words[1]]).score,
        "bleu_tokenised_lowercase": lower.corpus_score(words[0], [words[1]]).score,
        "bleu_compound_split": plain.corpus_score(split[0], [split[1]]).score,
        "nll": 1.5,
        "nll_bits": 1.5 / math.log(2),
    }
    assert len({round(value, 6) for value in found.values()}) == 6, "no two are the same"
