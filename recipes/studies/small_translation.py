"""
One run of `reproduce.py` on translation: several workers in this process, a small Transformer, batches of tokens, BLEU
at the end.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import sacrebleu
import tokenizers
import torch
from transformers import MarianMTModel, PreTrainedTokenizerFast

from records import DataError
from studies.advice import advised
from studies.graphed import GraphedGradients
from studies.kept import Keeper
from studies.kept_models import KeptModels
from studies.plan import Run
from studies.small_runs import Job, train_workers
from translation.bleu import bleu_signature
from translation.data import load_corpus, sha256_of
from translation.judged import MEAN_OF, all_scores, judge, named, with_bits
from translation.model import PUBLISHED_SIZES, make_transformer, smoothed_loss, translate
from translation.tokens import TokenBatches, collate, encode_corpus, sentences_of, token_counts, train_tokenizer

LIBRARIES = [datasets, tokenizers, sacrebleu]  # whose versions matter here
TOLD_ROWS = 800  # of the training rows, for the training loss of the average
LABEL_SMOOTHING = 0.1
BETAS = (0.9, 0.98)  # of the inner Adam
SENTENCES_AT_ONCE = 250  # in a beam search
GRAPHED = ("cuda",)  # devices on which launching a pass takes longer than the pass


@dataclass(frozen=True)
class Judging:
    """
    How the models of a run are judged, beside the best and the last.

    Args:
        num_beams (`int`), length_penalty (`float`): Of the beam search.
        means (`tuple[int, ...]`): Of how many last epochs' averages there is a mean.
    """

    num_beams: int = 4
    length_penalty: float = 0.6
    means: tuple[int, ...] = (MEAN_OF,)


# Wu et al. (2021): beam 5, fairseq's own penalty, the mean of the last ten checkpoints. Their code, at
# https://github.com/LividWo/Revisit-MMT, is made from fairseq 0.9.0.
PUBLISHED = Judging(num_beams=5, length_penalty=1.0, means=(MEAN_OF, 10))
PUBLISHED_START = 2020  # see `draw_weights`


def judging_of(run: Run) -> Judging:
    """As where its figure was published; else as ours are."""
    return PUBLISHED if run.study == "published" else Judging()


@dataclass(frozen=True)
class Size:
    """
    What is learned.

    Args:
        model (`str`): One of `MODEL_SIZES`.
        vocab_size (`int`): Tokens of the joint BPE.
        max_length (`int`): Tokens: a pair with a longer side is left out, of validation and test too.
    """

    model: str
    vocab_size: int
    max_length: int


HELP_TEXT = Size("mini", 1000, 32)
HELP_TEXT_ADVICE = "--dataset_name to other English-German pairs, or leave it out for the shipped help text."


@dataclass
class Part:
    """Pairs of one split: encoded (`input_ids`, `labels`), and as text."""

    rows: list[dict[str, list[int]]]
    sources: list[str]
    targets: list[str]


@dataclass
class Translations:
    """All that the runs share, read only."""

    name: str
    size: Size
    sha256: str  # of all sentences that are used
    tokenizer: PreTrainedTokenizerFast
    train: Part
    lengths: np.ndarray  # tokens of source and target of the training pairs, shape (rows, 2)
    told: Part
    validation: Part
    test: Part


def load(dataset_name: str | None, size: Size = HELP_TEXT, advice: str = HELP_TEXT_ADVICE) -> Translations:
    """
    English-German pairs, the shipped help text by default; raises `DataError` where they cannot be used. `advice` is
    the task's own: to what its `--dataset_name` is to be set.
    """
    with advised(advice):
        corpus = load_corpus(dataset_name)
        tokenizer = train_tokenizer(sentences_of(corpus.train), size.vocab_size)
        sets = encode_corpus(corpus, tokenizer, size.max_length)
        train, validation, test = (_part(rows, size.max_length) for rows in (sets.train, sets.validation, sets.test))
        if not validation.rows or not test.rows:
            raise DataError(
                f"validation and test must hold pairs of at most {size.max_length} tokens a side, got none."
            )
    told = slice(0, None, -(-len(train.rows) // TOLD_ROWS))
    return Translations(
        name=corpus.name if dataset_name is None or not Path(dataset_name).is_dir() else Path(dataset_name).name,
        size=size,
        sha256=sha256_of(s for part in (train, validation, test) for s in part.sources + part.targets),
        tokenizer=tokenizer,
        train=train,
        lengths=token_counts(sets.train),
        told=Part(train.rows[told], train.sources[told], train.targets[told]),
        validation=validation,
        test=test,
    )


def _part(rows: datasets.Dataset, max_length: int) -> Part:
    """Pairs that fit, as lists: a table's rows are slow to take one by one."""
    rows = rows.select(np.flatnonzero((token_counts(rows) <= max_length).all(axis=1)))
    encoded = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows]
    return Part(encoded, rows["source"][:], rows["target"][:])


def learning_rate_factor(step: int, warm_up: float) -> float:
    """Linear from 0 for so many steps, then 1/sqrt(step); `step` counts from 0."""
    done = (step + 1) / max(1, round(warm_up))
    return min(done, done**-0.5)


def train(run: Run, data: Translations, keeper: Keeper | None = None, device: str = "cpu") -> dict[str, Any] | None:
    """All workers of one run; the part of its record that they know. None where its state was left for later."""
    judging = judging_of(run)
    with tempfile.TemporaryDirectory() as beside:
        models = KeptModels(keeper.folder / "averages" if keeper else Path(beside), judging.means)
        told = train_workers(run, lambda rank: _make_job(run, data, rank, models, device), keeper)
        judged = {} if told is None else _judge(told["curve"], models, data, judging, device)
    if told is None:
        return None
    return {**told, **judged, **facts_of(run, data), "start": start_of(run, data)}


def start_of(run: Run, data: Translations) -> int | None:
    """The year of fairseq as which the weights start (`draw_weights`); None where they start as the recipe's own."""
    own = PUBLISHED_SIZES.get(data.size.model)
    return PUBLISHED_START if own and run.study == "published" else own


def facts_of(run: Run, data: Translations) -> dict[str, Any]:
    """What a record says of data, batches and search, whoever trains on them."""
    judging = judging_of(run)
    sampler = TokenBatches(data.lengths, run.batch_size, world_size=run.workers)
    return {
        "tokens_per_update": {
            **{name: round(count, 1) for name, count in sampler.tokens_per_update().items()},
            "at_most": run.batch_size * run.workers,  # a side's, padding included
        },
        "dataset": data.name,
        "dataset_sha256": data.sha256,
        "train_rows": len(data.train.rows),
        "validation_rows": len(data.validation.rows),
        "test_rows": len(data.test.rows),
        "model_size": data.size.model,
        "vocab_size": len(data.tokenizer),
        "max_length": data.size.max_length,
        "num_beams": judging.num_beams,
        "length_penalty": judging.length_penalty,
    }


def _make_job(run: Run, data: Translations, rank: int, models: KeptModels, device: str) -> Job:
    torch.manual_seed(run.seed)
    model = make_transformer(data.size.model, len(data.tokenizer), year=start_of(run, data)).to(device)
    torch.manual_seed(1000 * run.seed + rank)  # each worker its own dropout, where the size has any
    sampler = TokenBatches(data.lengths, run.batch_size, seed=run.seed, rank=rank, world_size=run.workers)

    warm_up = run.warmup_epochs * len(sampler)  # steps

    def batches(epoch: int) -> TokenBatches:
        sampler.set_epoch(epoch)
        return sampler

    def loss(model: MarianMTModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return _losses(model, batch, LABEL_SMOOTHING)[0]

    def alone(rows: Sequence[dict[str, Any]]) -> None:
        loss(model, _batch_of(rows, model)).backward()

    learn = GraphedGradients(model, loss, run.batch_size) if device in GRAPHED else alone
    return Job(
        model=model,
        inner=torch.optim.Adam(model.parameters(), lr=run.inner_lr, betas=BETAS, fused=True),
        learning_rate_factor=lambda step: learning_rate_factor(step, warm_up),
        batches=batches,
        learn=lambda rows: learn([data.train.rows[row] for row in rows]),
        look=lambda epoch, is_last: _look(model, data, models, epoch),
    )


def _batch_of(rows: Sequence[dict[str, Any]], model: MarianMTModel) -> dict[str, torch.Tensor]:
    """On the model's device."""
    return {name: value.to(model.device) for name, value in collate(rows).items()}


def _losses(model: MarianMTModel, batch: dict[str, torch.Tensor], *smoothings: float) -> list[torch.Tensor]:
    """Mean cross entropy per token, `</s>` included, in nats: one for each label smoothing."""
    labels = batch["labels"]
    outputs = model(**{name: value for name, value in batch.items() if name != "labels"}, use_cache=False)
    return [smoothed_loss(outputs, labels, label_smoothing=smoothing) for smoothing in smoothings]


@torch.no_grad()
def _evaluate(model: MarianMTModel, part: Part) -> tuple[float, float]:
    """(mean label-smoothed cross entropy, mean NLL) per token of the model as it is, in evaluation mode."""
    model.eval()
    total, tokens = torch.zeros(2, dtype=torch.float64), 0
    for start in range(0, len(part.rows), 100):
        rows = part.rows[start : start + 100]
        count = sum(len(row["labels"]) for row in rows)
        total += count * torch.stack(_losses(model, _batch_of(rows, model), LABEL_SMOOTHING, 0.0)).cpu()
        tokens += count
    model.train()
    smoothed, nll = (total / tokens).tolist()
    return smoothed, nll


def _look(model: MarianMTModel, data: Translations, models: KeptModels, epoch: int) -> dict[str, float]:
    smoothed, nll = _evaluate(model, data.told)
    validation_nll = _evaluate(model, data.validation)[1]
    models.keep(epoch, validation_nll, model)
    return with_bits({"validation_nll": validation_nll, "training_loss": smoothed, "training_nll": nll})


def _judge(
    curve: list[dict[str, float]], models: KeptModels, data: Translations, judging: Judging, device: str
) -> dict[str, Any]:
    """
    Every score of the best, the last and the mean models, and which epochs' averages these are; `metrics` are the last
    look's, with the scores of the last model under their own names, and of the others with theirs behind.
    """
    model = make_transformer(data.size.model, len(data.tokenizer)).to(device)
    metrics = {**curve[-1], **with_bits({"best_validation_nll": min(look["validation_nll"] for look in curve)})}

    def score(epochs: list[int]) -> dict[str, float]:
        model.load_state_dict(models.mean(epochs))
        return _scores(model, data, judging)

    chosen = models.epochs()
    return {
        "metrics": {**metrics, **named(judge(chosen, score), "last")},
        "bleu_signature": bleu_signature(),
        "epochs_of_models": chosen,
    }


def _scores(model: MarianMTModel, data: Translations, judging: Judging) -> dict[str, float]:
    """`all_scores` of the translations by beam search, of validation and test."""
    scores = {}
    for name, part in (("validation", data.validation), ("test", data.test)):
        hypotheses = translate(
            model,
            data.tokenizer,
            part.sources,
            num_beams=judging.num_beams,
            length_penalty=judging.length_penalty,
            batch_size=SENTENCES_AT_ONCE,
        )
        own = all_scores(hypotheses, part.targets, _evaluate(model, part)[1])
        scores |= {f"{name}_{score}": value for score, value in own.items()}
    return scores
