"""
What people do with Trainer, under SlowMoCallback. Every run is followed by hand (`follow`): local steps, rounds, the
final average.
"""

from __future__ import annotations

import gc
import string

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback

from harness import patience, run_workers
from slowmo_hf import SlowMoCallback, SlowMoConfig
from tiny import (
    QUIET,
    OutOfMemoryOnce,
    Recorder,
    Regression,
    Rows,
    SmallNorm,
    arguments,
    bert,
    equal,
    follow,
    mean,
    recorded,
    sentences,
    values,
)

TAU, STEPS = 3, 8
CONFIG = SlowMoConfig(sync_every=TAU, outer_momentum=0.5, timeout_seconds=patience(30))
EPS = 2.0**-23  # float32: twice what one rounding does, so enough for a mean, and for the anchors of two rounds


def assert_mean(value, results, name):
    """
    The workers' average, to float32's last digit: beside it, a displacement from the anchor is small, and so is its
    rounding.
    """
    torch.testing.assert_close(value.double(), mean(results, name), rtol=EPS, atol=EPS / 16)


def follow_float32(runs, config=CONFIG):
    """
    Rounds done. An anchor is rounded once per round, by EPS / 2, and the reference in float64 is not: the difference
    may add up.
    """
    rounds = len(runs[0]["after"]) // config.sync_every
    assert follow(runs, config, tolerance=max(2, rounds) * EPS / 2) == rounds
    return rounds


def run(folder, model, data, config=CONFIG, watchers=(), recorder=None, model_init=None, **settings):
    """Train; returns (the recording, the trainer)."""
    recorder = recorder or Recorder()
    trainer = Trainer(
        model=model,
        model_init=model_init,
        args=arguments(folder, **{"max_steps": STEPS, "learning_rate": 1e-2, **settings}),
        train_dataset=data,
        callbacks=[recorder, *watchers, SlowMoCallback(config)],
    )
    trainer.train()
    return recorded(trainer, recorder), trainer


# ---- the loop's own settings ----


class Gradients(TrainerCallback):
    """Norms of the clipped gradients."""

    def __init__(self):
        self.norms = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        self.norms.append(float(torch.stack([g.float().norm() for g in gradients]).norm()))


class Precise(Regression):
    """Notes the dtype in which its layers compute."""

    def __init__(self, dtype=torch.float32):
        super().__init__(dtype)
        self.computed = set()
        self.body.register_forward_hook(lambda module, inputs, output: self.computed.add(output.dtype))


def check_loop_settings(folder, names):
    rows = Rows(128, torch.float32)
    clipped, autocast = Gradients(), Precise()
    cases = {
        "accumulation": {"gradient_accumulation_steps": 3},
        "clipping": {"watchers": [clipped], "max_grad_norm": 1e-2},
        "bf16 parameters": {"model": Precise(torch.bfloat16), "data": Rows(128, torch.bfloat16)},
        "checkpointing": {"model": bert(), "data": sentences(), "gradient_checkpointing": True},
        "no checkpointing": {"model": bert(), "data": sentences()},
        "one step": {"max_steps": 1},
        "every step": {"config": SlowMoConfig(sync_every=1)},
        "long round": {"config": SlowMoConfig(sync_every=100)},
        "one step, one round": {"config": SlowMoConfig(sync_every=1), "max_steps": 1},
        "schedule": {"lr_scheduler_type": "cosine", "warmup_steps": 3, "learning_rate": 3e-2},
        "autocast": {"model": autocast, "bf16": True},  # last: transformers 4.57 leaves it in the environment
    }
    out = {}
    for name in names or cases:
        case = {"model": Regression(torch.float32), "data": rows, **cases[name]}
        out[name], trainer = run(folder, case.pop("model"), case.pop("data"), **case)
        assert getattr(trainer.model, "is_gradient_checkpointing", False) == (name == "checkpointing")
    return out, clipped.norms, autocast.computed


def follow_bf16(runs):
    """
    bf16 has 8 bits: what is shown is up to 2⁻⁸ |x| from the anchor, which is 2⁻⁹ (1 + |x|) at most where |x| <= 1.
    Where nothing has been added up yet it is the rounded average, bit for bit: after the first round (anchor - Δ =
    average) and at the end.
    """
    for name in runs[0]["trained"]:
        assert max(float(run_["after"][k][name].abs().max()) for run_ in runs for k in range(STEPS)) <= 1
        average = mean([run_["stepped"][TAU - 1] for run_ in runs], name)
        assert torch.equal(runs[0]["after"][TAU - 1][name], average.bfloat16())
        assert torch.equal(runs[0]["final"][name], mean([run_["after"][-1] for run_ in runs], name).bfloat16())
    return follow(runs, CONFIG, tolerance=2.0**-9)


def follow_loop_settings(ranks):
    taus = {"every step": 1, "long round": 100, "one step, one round": 1}
    steps = {"one step": 1, "one step, one round": 1}
    for name in ranks[0][0]:
        runs = [out[name] for out, _, _ in ranks]
        config = SlowMoConfig(sync_every=taus[name]) if name in taus else CONFIG
        rounds = follow_bf16(runs) if name == "bf16 parameters" else follow_float32(runs, config)
        assert len(runs[0]["after"]) == steps.get(name, STEPS), name
        assert rounds == steps.get(name, STEPS) // taus.get(name, TAU), name
        assert not equal(runs[0]["start"], runs[0]["final"]), name


def test_loop_settings(tmp_path):
    ranks = run_workers(check_loop_settings, 2, str(tmp_path), None)
    follow_loop_settings(ranks)
    for _, norms, computed in ranks:
        # torch divides by the norm + 1e-6, and norms here are above ¼.
        assert norms == pytest.approx([1e-2] * STEPS, rel=5e-6)
        assert computed == {torch.bfloat16}
    assert ranks[0][0]["bf16 parameters"]["final"]["body.weight"].dtype == torch.bfloat16
    for out, _, _ in ranks:  # checkpointing computes the same gradients again
        assert equal(out["checkpointing"]["final"], out["no checkpointing"]["final"])
    lrs = ranks[0][0]["schedule"]["lrs"]
    assert lrs[0] == 0
    assert lrs[TAU - 1] not in (lrs[2 * TAU - 1], 0)


def test_an_odd_number_of_workers(tmp_path):
    follow_loop_settings(
        run_workers(check_loop_settings, 3, str(tmp_path), ["accumulation", "every step", "long round", "schedule"])
    )


# ---- BatchNorm ----


class SmallConv(nn.Module):
    """A channels-last CNN with BatchNorm."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.conv = nn.Conv2d(1, 3, 2)
        self.norm = nn.BatchNorm2d(3)
        self.head = nn.Linear(3, 1)
        self.register_buffer("floor", torch.full((2,), torch.finfo(torch.float32).min))
        self.to(memory_format=torch.channels_last)

    def forward(self, x, labels):
        hidden = torch.relu(self.norm(self.conv(x.view(-1, 1, 2, 2)))).flatten(1)
        return {"loss": (self.head(hidden) - labels).square().mean()}


def check_batch_norm(folder):
    rows, out = Rows(128, torch.float32), {}
    for name, model, config in (
        ("conv", SmallConv(), CONFIG),
        ("local", SmallNorm(), SlowMoConfig(sync_every=TAU, model_buffers="local")),
    ):
        out[name], _ = run(f"{folder}/{name}", model, rows, config, save_strategy="steps", save_steps=4)
    return out


def test_batch_norm_is_averaged_saved_and_strictly_loaded(tmp_path):
    ranks = run_workers(check_batch_norm, 2, str(tmp_path))
    for name, model in (("conv", SmallConv()), ("local", SmallNorm())):
        runs = [out[name] for out in ranks]
        assert follow_float32(runs) == STEPS // TAU
        for step in (4, 8):
            saved = load_file(f"{tmp_path}/{name}/checkpoint-{step}/model.safetensors")
            model.load_state_dict(saved, strict=True)
            locals_ = [run_["after"][step - 1] for run_ in runs]
            for statistic in ("norm.running_mean", "norm.running_var"):
                assert not torch.equal(locals_[0][statistic], locals_[1][statistic])
                assert_mean(saved[statistic], locals_, statistic)
            assert saved["norm.num_batches_tracked"] == step
            assert torch.equal(saved["floor"], torch.full((2,), torch.finfo(torch.float32).min))
        before, after = [run_["stepped"][TAU - 1] for run_ in runs], [run_["after"][TAU - 1] for run_ in runs]
        for statistic in ("norm.running_mean", "norm.running_var"):
            for mine_before, mine_after in zip(before, after, strict=True):
                if name == "local":
                    assert torch.equal(mine_after[statistic], mine_before[statistic])
                else:
                    assert_mean(mine_after[statistic], before, statistic)
        assert equal(runs[0]["final"], runs[1]["final"])


# ---- where data and models come from ----


class Stream(IterableDataset):
    def __iter__(self):
        rows = Rows(200, torch.float32)
        return iter([rows[index] for index in range(len(rows))])


def check_sources(folder):
    out = {}
    for name, dispatch in (("stream", False), ("dispatched stream", True)):
        model = Regression(torch.float32)
        settings = {"accelerator_config": {"dispatch_batches": dispatch}}
        out[name] = (run(folder, model, Stream(), **settings)[0], [x for x, _ in model.seen])
    model = OutOfMemoryOnce(5)
    recording, trainer = run(folder, model, Rows(256, torch.float32), auto_find_batch_size=True)
    sizes = [len(x) for x, _ in model.seen]
    wrappers = [o for o in gc.get_objects() if type(o) is DistributedDataParallel]
    flags = [(ddp.require_backward_grad_sync, ddp.require_forward_param_sync) for ddp in wrappers]
    out["out of memory"] = (recording, sizes, trainer.args.average_tokens_across_devices, flags)
    made, recorder = [], Recorder()

    def model_init():
        made.append(Regression(torch.float32))
        return made[-1]

    recording, trainer = run(folder, None, Rows(128, torch.float32), recorder=recorder, model_init=model_init)
    out["model_init"] = (recording, trainer.model is made[-1], values(made[-1]))
    first = recording["start"]
    trainer.train()
    out["model_init again"] = (recorded(trainer, recorder), equal(first, recorder.start))
    return out


def test_sources_of_data_and_models(tmp_path):
    ranks = run_workers(check_sources, 2, str(tmp_path))
    for name in ranks[0]:
        runs = [out[name][0] for out in ranks]
        assert len(runs[0]["after"]) == STEPS
        assert follow_float32(runs) == STEPS // TAU, name
    rows = Rows(200, torch.float32).x
    for name in ("stream", "dispatched stream"):
        seen = [torch.cat(out[name][1]) for out in ranks]
        assert len(seen[0]) == len(seen[1]) == STEPS * 4
        both = torch.cat(seen)
        assert {tuple(row.tolist()) for row in both} == {tuple(row.tolist()) for row in rows[: len(both)]}
    for out in ranks:
        _, sizes, tokens, flags = out["out of memory"]
        assert sizes == [4] * 4 + [sizes[-1]] * STEPS, "four steps, then again with a smaller batch"
        assert sizes[-1] in (2, 3)  # accelerate 1.3 takes a half, 1.15 nine tenths
        assert tokens is True
        assert flags
        assert set(flags) == {(True, True)}
        assert out["model_init"][1]
        assert equal(out["model_init"][0]["final"], out["model_init"][2])
        assert out["model_init again"][1]


# ---- torch.compile ----


def check_compile(folder):
    out = {}
    for name, compiled in (("compiled", True), ("plain", False)):
        settings = {"torch_compile": True, "torch_compile_backend": "aot_eager"} if compiled else {}
        out[name], trainer = run(folder, Regression(torch.float32), Rows(128, torch.float32), **settings)
        if compiled:
            inner = getattr(trainer.model_wrapped, "module", trainer.model_wrapped)
            assert any(type(m).__name__ == "OptimizedModule" for m in (trainer.model_wrapped, inner))
    return out


@pytest.mark.slow
def test_torch_compile(tmp_path):
    ranks = run_workers(check_compile, 2, str(tmp_path))
    for name in ("compiled", "plain"):
        assert follow_float32([out[name] for out in ranks]) == STEPS // TAU
    for out in ranks:
        # aot_eager runs the same kernels in the same order.
        assert equal(out["compiled"]["final"], out["plain"]["final"])


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


def tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<pad>", "<eos>", *string.ascii_lowercase]
    inner = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>")


def tiny_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(9)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=1,
        eos_token_id=2,
        bos_token_id=2,
        max_position_embeddings=32,
    )
    return LlamaForCausalLM(config)


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
        processing_class=tokenizer(),
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
