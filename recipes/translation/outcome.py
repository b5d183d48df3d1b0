"""What a run of `train.py` leaves behind: translations, a record and a table."""

from __future__ import annotations

import math
import re
import statistics
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import sacrebleu
import tokenizers
from transformers import TrainerState

from one_run import OneRun
from records import describe_run
from slowmo_hf import SlowMoConfig
from translation.bleu import bleu_signature
from translation.judged import KINDS
from translation.settings import ScriptArguments
from translation.tokens import TokenSets, tokens_sha256
from translation.trainer import TranslationTrainer

CURVE = ("bleu", "nll", "nll_bits")  # what a record keeps of every validation


def write_translations(sets: TokenSets, translations: list[str], folder: Path) -> None:
    """
    `test.<source>`, `test.<target>` and `test.hyp.<target>`, in the test set's order, for `sacrebleu test.<target> -i
    test.hyp.<target>`.
    """
    order = np.argsort(sets.test["row"][:])
    source, target = sets.corpus.source_lang, sets.corpus.target_lang
    texts = {
        f"test.{source}": sets.test["source"][:],
        f"test.{target}": sets.test["target"][:],
        f"test.hyp.{target}": translations,
    }
    for name, sentences in texts.items():
        lines = [re.sub(r"[\r\n]+", " ", sentences[place]) for place in order]
        (folder / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def make_record(
    script: ScriptArguments,
    config: SlowMoConfig,
    trainer: TranslationTrainer,
    sets: TokenSets,
    results: dict[str, Any],
    run: OneRun,
) -> dict[str, Any]:
    """
    Everything that a reader needs to judge the run, and to run it again. Metrics with a plain name are of the saved
    model; those of the best by validation NLL, the last and the mean of the last five have `_best`, `_last` and
    `_mean_of_5` behind. `steps_of_models` says of which checkpoints each is. `training_loss` is what the log has of
    the last pass: the workers' own, label-smoothed and with dropout, as fairseq logs it (in bits: `_bits`).
    """
    curve = [entry for entry in trainer.state.log_history if "eval_bleu" in entry]
    return {
        "study": "single",
        "task": "translation",
        "preset": script.preset,
        "dataset": sets.corpus.name,
        "languages": f"{sets.corpus.source_lang}-{sets.corpus.target_lang}",
        "corpus_sha256": sets.corpus.sha256(),
        "tokenizer_sha256": tokens_sha256(sets.tokenizer.backend_tokenizer),
        "train_rows": len(sets.train),
        "validation_set": sets.corpus.validation_set,
        "validation_rows": len(sets.validation),
        "test_set": sets.corpus.test_set,
        "test_rows": len(sets.test),
        "model_size": script.model_size,
        "vocab_size": len(sets.tokenizer),
        "max_tokens": script.max_tokens,
        "tokens_per_update": trainer.token_batches.tokens_per_update(trainer.args.gradient_accumulation_steps),
        "num_beams": script.num_beams,
        "length_penalty": script.length_penalty,
        "averaged_checkpoints": len(results["steps_of_models"]["saved"]),
        **results,
        "metrics": {**_training_loss(trainer.state), **results["metrics"]},
        "bleu_signature": bleu_signature(),
        "curve": [
            {"step": entry["step"], **{f"validation_{name}": entry[f"eval_{name}"] for name in CURVE}}
            for entry in curve
        ],
        "curve_num_beams": trainer.args.generation_num_beams,
        **describe_run(config, trainer, run, [datasets, tokenizers, sacrebleu]),
    }


def _training_loss(state: TrainerState) -> dict[str, float]:
    """Mean of the last pass's entries, in nats and bits; nothing where there are none."""
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry and entry["epoch"] > state.epoch - 1]
    loss = statistics.mean(losses) if losses else None
    return {} if loss is None else {"training_loss": loss, "training_loss_bits": loss / math.log(2)}


def table_of(record: dict[str, Any], sets: TokenSets) -> dict[str, str]:
    """The task's own lines of the table."""
    metrics, held = record["metrics"], record["tokens_per_update"]
    place = f"{record['test_set']}, {record['test_rows']:,} rows"
    return {
        "BLEU of the average": f"{metrics['test_bleu']:.2f} "
        f"({place}{'; not comparable with WMT' if sets.corpus.shipped else ''})",
        "signature": record["bleu_signature"],
        "tokenised BLEU": f"{metrics['test_bleu_tokenised']:.2f} (Moses tokens)",
        "compound-split BLEU": f"{metrics['test_bleu_compound_split']:.2f} (Moses tokens)",
        **{
            f"{name} NLL": f"{metrics[f'{name}_nll']:.3f} nats per token, {metrics[f'{name}_nll_bits']:.3f} bits"
            for name in ("validation", "test")
        },
        **{
            _words(kind): _line(metrics, kind, steps)
            for kind, steps in record["steps_of_models"].items()
            if kind in KINDS
        },
        "target tokens per update": f"{held['target']:,.0f}, {held['target_padded']:,.0f} with padding",
    }


def _words(kind: str) -> str:
    return f"test, {kind.replace('_', ' ')}"


def _line(metrics: dict[str, float], kind: str, steps: list[int]) -> str:
    bleu, tokenised, split, nll, bits = (
        metrics[f"test_{name}_{kind}"] for name in ("bleu", "bleu_tokenised", "bleu_compound_split", "nll", "nll_bits")
    )
    return (
        f"BLEU {bleu:.2f}, tokenised {tokenised:.2f}, compound-split {split:.2f}, NLL {nll:.3f} nats, "
        f"{bits:.3f} bits ({in_words(steps)})"
    )


def in_words(steps: list[int]) -> str:
    """Of checkpoints."""
    return f"step{'s' if len(steps) > 1 else ''} {', '.join(f'{step:,}' for step in steps)}"
