"""Generation in evaluation, adapters (PEFT) and TRL's trainers, under SlowMoCallback."""

from __future__ import annotations

import string

import pytest
import torch
from transformers import Trainer, TrainerCallback

from followed import CONFIG, STEPS, TAU, assert_mean, follow_float32
from harness import run_workers
from llama import letter_tokenizer, tiny_llama
from slowmo_hf import SlowMoCallback
from tiny import (
    QUIET,
    Recorder,
    arguments,
    bert,
    equal,
    recorded,
    sentences,
)

# ---- generation in evaluation ----


def tiny_t5():
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(4)
    config = T5Config(
        vocab_size=32,
        d_model=16,
        d_kv=8,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
        dropout_rate=0.1,
    )
    return T5ForConditionalGeneration(config)


def pairs(count=64):
    generator = torch.Generator().manual_seed(6)
    ids = torch.randint(2, 32, (count, 5), generator=generator)
    return [{"input_ids": row, "labels": row.flip(0)} for row in ids]


def check_generation(folder):
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

    recorder, predicted = Recorder(), []

    def keep(prediction):
        predicted.append(torch.as_tensor(prediction.predictions))
        return {}

    settings = {"eval_strategy": "steps", "eval_steps": 4, "max_steps": STEPS, "learning_rate": 3e-2}
    trainer = Seq2SeqTrainer(
        model=tiny_t5(),
        args=Seq2SeqTrainingArguments(
            folder, predict_with_generate=True, generation_max_length=6, **{**QUIET, **settings}
        ),
        train_dataset=pairs(),
        eval_dataset=pairs(16),
        compute_metrics=keep,
        callbacks=[recorder, SlowMoCallback(CONFIG)],
    )
    trainer.train()
    ids = torch.stack([pair["input_ids"] for pair in pairs(16)])
    again = []
    for step in (4, 8):
        model = tiny_t5().eval()
        model.load_state_dict(recorder.evaluated[step])
        with torch.no_grad():
            again.append(model.generate(ids, max_length=6))
    return recorded(trainer, recorder), predicted, again


def test_seq2seq_generates_with_the_average(tmp_path):
    ranks = run_workers(check_generation, 2, str(tmp_path))
    runs = [recording for recording, _, _ in ranks]
    assert follow_float32(runs) == STEPS // TAU
    for step in (4, 8):
        for name, value in runs[0]["evaluated"][step].items():
            assert_mean(value, [r["after"][step - 1] for r in runs], name)
        assert equal(runs[0]["evaluated"][step], runs[1]["evaluated"][step])
    for _, predicted, again in ranks:
        assert len(predicted) == 2
        for mine, expected in zip(predicted, again, strict=True):
            assert torch.equal(mine[:, : expected.shape[1]], expected)
        assert not torch.equal(again[0], again[1])


# ---- PEFT ----


def lora():
    from peft import LoraConfig, TaskType, get_peft_model

    torch.manual_seed(8)
    return get_peft_model(
        bert(), LoraConfig(task_type=TaskType.SEQ_CLS, r=2, lora_alpha=4, target_modules=["query", "value"])
    )


class RoundBytes(TrainerCallback):
    """Bytes of each round; after SlowMoCallback."""

    def __init__(self, ours):
        self.ours, self.sent = ours, []

    def on_optimizer_step(self, args, state, control, **kwargs):
        if (state.global_step + 1) % TAU == 0:
            self.sent.append(self.ours.last_round.bytes_sent)


def check_lora(folder):
    model, recorder, ours = lora(), Recorder(), SlowMoCallback(CONFIG)
    watch = RoundBytes(ours)
    trainer = Trainer(
        model=model,
        args=arguments(folder, max_steps=STEPS, learning_rate=3e-2, save_strategy="steps", save_steps=4),
        train_dataset=sentences(),
        callbacks=[recorder, ours, watch],
    )
    trainer.train()
    everything, adapters = (
        sum(p.numel() for p in model.parameters() if p.requires_grad or every) for every in (True, False)
    )
    return recorded(trainer, recorder), watch.sent, everything, adapters, len(trainer.optimizer.param_groups)


def test_lora_sends_adapters_only(tmp_path):
    from peft import PeftModel

    ranks = run_workers(check_lora, 2, str(tmp_path))
    runs = [result[0] for result in ranks]
    assert follow_float32(runs) == STEPS // TAU
    for recording, sent, everything, adapters, groups in ranks:
        assert adapters < everything / 10
        # A ring of two sends each message once.
        assert sent == [4 * (adapters + 1) + 8 * (10 + groups)] * (STEPS // TAU)
        frozen = [name for name in recording["start"] if name not in recording["trained"]]
        assert frozen
        for name in frozen:
            assert torch.equal(recording["start"][name], recording["final"][name])
    for step in (4, 8):
        loaded = PeftModel.from_pretrained(bert(), f"{tmp_path}/checkpoint-{step}").state_dict()
        for name in runs[0]["trained"]:
            assert_mean(loaded[name], [r["after"][step - 1] for r in runs], name)


# ---- TRL ----


def check_sft(folder):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    letters = string.ascii_lowercase
    data = Dataset.from_dict({"text": [" ".join(letters[i % 20 : i % 20 + 6]) for i in range(64)]})
    recorder = Recorder()
    settings = {
        "logging_strategy": "steps",
        "logging_steps": TAU,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "bf16": False,
    }
    trainer = SFTTrainer(
        model=tiny_llama(),
        args=SFTConfig(folder, max_length=8, max_steps=STEPS, learning_rate=3e-2, **{**QUIET, **settings}),
        train_dataset=data,
        eval_dataset=data.select(range(8)),
        processing_class=letter_tokenizer(),
        callbacks=[recorder, SlowMoCallback(CONFIG)],
    )
    trainer.train()
    return recorded(trainer, recorder), trainer.state.log_history


@pytest.mark.slow
def test_trl_sft_trainer(tmp_path):
    pytest.importorskip("trl", reason="trl's releases want newer libraries than the oldest ones")
    ranks = run_workers(check_sft, 2, str(tmp_path))
    runs = [recording for recording, _ in ranks]
    assert follow_float32(runs) == STEPS // TAU
    assert equal(runs[0]["evaluated"][4], runs[1]["evaluated"][4])
    for name in runs[0]["trained"]:
        assert_mean(runs[0]["evaluated"][4][name], [r["after"][3] for r in runs], name)
    history = ranks[0][1]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert len(losses) == STEPS // TAU
    for entry in history:  # TRL's own metrics of the steps since the last entry
        if "loss" in entry:
            assert {"mean_token_accuracy", "entropy", "num_tokens", "slowmo/round"} <= entry.keys()
    assert losses[-1] < losses[0]
    assert [entry["slowmo/round"] for entry in history if "slowmo/round" in entry] == [1, 2]
