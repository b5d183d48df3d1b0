"""sentence-transformers' Trainer, with one callback more: its losses are modules of their own, which may learn too."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.distributed as dist
from transformers import BertConfig, BertModel

pytest.importorskip("sentence_transformers", reason="its releases want newer libraries than the oldest ones")

from datasets import Dataset

from followed import follow_float32
from harness import patience, run_workers
from llama import letter_tokenizer
from slowmo_hf import SlowMoCallback, SlowMoConfig
from tiny import QUIET, Heard, Recorder, equal, recorded, values

TAU, STEPS = 3, 8
ROWS = [" ".join("abcdefghijklmnop"[i % 9 + k % (i % 5 + 1)] for k in range(6)) for i in range(64)]


@pytest.fixture
def folder(tmp_path):
    """With `model`, which users load from a folder too."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    tokenizer = letter_tokenizer()
    tokenizer.model_max_length = 16
    bert = BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=16, **sizes))
    bert.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path


def make(folder, loss_name, callbacks, **settings):
    warnings.simplefilter("ignore")  # the names of its modules change from version to version
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
        losses,
    )
    from sentence_transformers.evaluation import EmbeddingSimilarityEvaluator

    torch.manual_seed(0)  # a loss may make a layer
    model = SentenceTransformer(str(folder / "model"), device="cpu")
    columns = {"anchor": ROWS, "positive": [row[::-1] for row in ROWS]}
    if loss_name == "SoftmaxLoss":
        loss = losses.SoftmaxLoss(model, 16, num_labels=2)
        columns["label"] = [i % 2 for i in range(64)]
    else:
        loss = getattr(losses, loss_name)(model)
    args = SentenceTransformerTrainingArguments(
        str(folder / "out"), **{**QUIET, "max_steps": STEPS, "learning_rate": 3e-3, "bf16": False, **settings}
    )
    return SentenceTransformerTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_dict(columns),
        eval_dataset=Dataset.from_dict(columns).select(range(8)),
        loss=loss,
        evaluator=EmbeddingSimilarityEvaluator(ROWS[:8], ROWS[8:16], [i / 8 for i in range(8)]),
        callbacks=callbacks,
    )


def train(folder, loss_name, resumed):
    recorder, config = Recorder(), SlowMoConfig(sync_every=TAU, timeout_seconds=patience(30))
    often = {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": TAU}
    trainer = make(folder, loss_name, [recorder, SlowMoCallback(config)], **often)
    with Heard() as heard:
        trainer.train(resume_from_checkpoint=str(folder / f"out/checkpoint-{TAU}") if resumed else None)
    if dist.get_rank() == 0 and not resumed:
        trainer.save_model(str(folder / "final"))
    evaluations = [entry for entry in trainer.state.log_history if "eval_spearman_cosine" in entry]
    return recorded(trainer, recorder), values(trainer.loss), evaluations, heard.about("collectives")


@pytest.mark.slow
@pytest.mark.parametrize("loss_name", ["MultipleNegativesRankingLoss", "SoftmaxLoss"])
def test_each_worker_trains_alone_and_resumes_exactly(folder, loss_name):
    """
    Weights follow Algorithm 1; all ranks evaluate and save the average. `SoftmaxLoss` has trained weights of its own,
    which its Trainer leaves out of the model's file.
    """
    from sentence_transformers import SentenceTransformer

    ranks = run_workers(train, 2, folder, loss_name, False)
    assert follow_float32([rank[0] for rank in ranks]) == STEPS // TAU
    (_, learned, evaluations, said), (_, others, _, _) = ranks
    assert equal(learned, others)
    assert len(evaluations) == 2
    assert said == []
    saved = values(SentenceTransformer(str(folder / "final"), device="cpu"))
    assert equal(saved, ranks[0][0]["final"])
    for _, resumed, _, _ in run_workers(train, 2, folder, loss_name, True):
        assert equal(resumed, learned)


def gather(folder):
    callback = SlowMoCallback(SlowMoConfig(sync_every=TAU, timeout_seconds=patience(30)))
    trainer = make(folder, "MultipleNegativesRankingLoss", [callback])
    trainer.loss.gather_across_devices = True
    with Heard() as heard:
        trainer.train()
    return heard.about("runs collectives over all ranks at each step of 1 to 3")


@pytest.mark.slow
def test_a_loss_over_all_ranks_is_told(folder):
    told, nothing = run_workers(gather, 2, folder)
    assert len(told) == 1
    assert nothing == []
