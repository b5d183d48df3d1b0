"""
TRL's trainers gather at every training step: metrics, which SlowMoCallback keeps inside the worker, and GRPO's
rewards, which stay everybody's. And what TRL's users bring along: a reference model, a quantised base.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

pytest.importorskip("trl", reason="trl's releases want newer libraries than the oldest ones")

from followed import follow_float32
from harness import patience, run_workers
from llama import letter_tokenizer, tiny_llama
from slowmo_hf import SlowMoCallback, SlowMoConfig
from slowmo_hf.adapters import trainer_gathers
from tiny import QUIET, Heard, Recorder, arguments, equal, recorded, values

TAU, STEPS = 3, 7


class Collectives(TrainerCallback):
    """What is sent from the second step's begin until its optimizer has stepped, C++ included."""

    def __init__(self):
        self.names, self._profile = None, None

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self._profile = profile(activities=[ProfilerActivity.CPU])
            self._profile.__enter__()

    def on_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self._profile.__exit__(None, None, None)
            events = [event.name for event in self._profile.events()]
            assert any("aten::" in name for name in events)
            self.names = [name for name in events if "c10d" in name or "gloo" in name]


def make(kind, folder, callbacks, adapters=False):
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import LlamaForSequenceClassification
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

    settings = {
        **QUIET,
        "logging_strategy": "steps",
        "logging_steps": TAU,
        "eval_strategy": "steps",
        "eval_steps": TAU,
    }
    settings |= {"max_steps": STEPS, "learning_rate": 3e-2, "bf16": False, "max_length": 16}
    letters = "abcdefghijklmnopqrst"
    lora = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"]) if adapters else None
    if kind == "SFTTrainer":
        data = Dataset.from_dict({"text": [" ".join(letters[i % 12 : i % 12 + 6]) for i in range(64)]})
        return SFTTrainer(
            model=tiny_llama(),
            args=SFTConfig(folder, **settings),
            train_dataset=data,
            eval_dataset=data.select(range(8)),
            processing_class=letter_tokenizer(),
            callbacks=callbacks,
            peft_config=lora,
        )
    # The space keeps the prompt a word of its own: without it all rows have the same tokens, all workers one model.
    rows = [{"prompt": f"{letters[i % 9]} ", "chosen": "a b c", "rejected": "d e f"} for i in range(64)]
    data = Dataset.from_list(rows)
    if kind == "RewardTrainer":
        config = tiny_llama().config
        config.num_labels = 1
        return RewardTrainer(
            model=LlamaForSequenceClassification(config),
            args=RewardConfig(folder, **settings),
            train_dataset=data,
            eval_dataset=data.select(range(8)),
            processing_class=letter_tokenizer(),
            callbacks=callbacks,
        )
    return DPOTrainer(
        model=tiny_llama(),
        ref_model=None if adapters else tiny_llama(),
        args=DPOConfig(folder, **settings),
        train_dataset=data,
        eval_dataset=data.select(range(8)),
        processing_class=letter_tokenizer(),
        callbacks=callbacks,
        peft_config=lora,
    )


def check_gathers(folder, kind, processes_per_worker):
    import slowmo_hf.adapters.trainer_gathers as room

    out = {}
    config = SlowMoConfig(sync_every=TAU, processes_per_worker=processes_per_worker, timeout_seconds=patience(30))
    for name, listed in (("quiet", room.FOR_LOGS_ALONE), ("gathering", ())):
        room.FOR_LOGS_ALONE = listed
        collectives = Collectives()
        trainer = make(kind, folder, [collectives, SlowMoCallback(config)])
        with Heard() as heard:
            trainer.train()
        given_back = [
            vars(trainer).keys() & {"training_step", "log"},
            vars(trainer.accelerator).keys() & {"gather", "gather_for_metrics"},
        ]
        out[name] = collectives.names, trainer.state.log_history, heard.about("gathers metrics"), given_back
    return out


class LogsAlone(TrainerCallback):
    """A line of rank 0's own in the middle of training, with a name like those of Trainer's speed."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero and state.global_step == 2:
            self.trainer.log({"samples_runtime": 1.5})


def log_of_one(folder):
    callback = LogsAlone()
    callback.trainer = trainer = make("SFTTrainer", folder, [callback, SlowMoCallback(SlowMoConfig(sync_every=TAU))])
    trainer.train()
    return [entry for entry in trainer.state.log_history if "samples_runtime" in entry], trainer.state.global_step


def test_a_line_of_one_rank_is_no_summary_of_all(tmp_path):
    """Its metrics are brought together where Trainer tells its speed: here one rank alone would have gone there."""
    (said, steps), (others, theirs) = run_workers(log_of_one, 2, str(tmp_path))
    assert [entry["samples_runtime"] for entry in said] == [1.5]
    assert others == []
    assert steps == theirs == STEPS


def assert_same_entries(quiet, gathering):
    """The workers have equally many tokens, so a mean of their ratios is the ratio of all."""
    assert len(quiet) == len(gathering)
    for ours, reference in zip(quiet, gathering, strict=True):
        assert ours.keys() == reference.keys()
        for name, value in reference.items():
            if name in ("min_reward", "max_reward"):  # means of the workers' own, which are not those of all
                assert (ours[name] - value) * (1 if name == "min_reward" else -1) >= 0
            elif not name.startswith("slowmo/") and not name.endswith(("_runtime", "_per_second")):
                assert ours[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["SFTTrainer", "DPOTrainer", "RewardTrainer"])
def test_training_steps_gather_nothing(tmp_path, kind):
    """And the entries of the log, evaluations among them, are those of the run that gathers."""
    for rank, out in enumerate(run_workers(check_gathers, 2, str(tmp_path), kind, 1)):
        names, history, said, given_back = out["quiet"]
        assert names == []
        assert len(said) == (rank == 0)
        assert all(kind in line for line in said)
        assert given_back == [set(), set()]
        assert len(out["gathering"][0]) >= 4, "the profiler sees gathers where there are some"
        assert [entry["step"] for entry in history if "loss" in entry] == [3, 6]
        tokens = [entry["num_tokens"] for entry in history if "loss" in entry]
        assert 0 < tokens[0] < tokens[1]
        assert_same_entries(history, out["gathering"][1])


@pytest.mark.slow
def test_metrics_of_a_worker_of_several_processes(tmp_path):
    """Four processes, two workers: counters are summed over workers, once each."""
    for out in run_workers(check_gathers, 4, str(tmp_path), "SFTTrainer", 2):
        assert_same_entries(out["quiet"][1], out["gathering"][1])


def train_own_loss(folder, place):
    """The user's own code gathers in a training step: what reaches the loss stays as it is. Rank 1 is slow."""
    from trl import DPOTrainer, SFTTrainer

    class Slow:
        """Of a Trainer."""

        def gathers(self, found):
            time.sleep(0.2 * self.args.process_index)
            loss = found[0] if isinstance(found, tuple) else found
            self.seen = self.accelerator.gather(loss.detach())
            return found

    class InTheLoss(Slow, SFTTrainer):
        def compute_loss(self, *args, **kwargs):
            return self.gathers(super().compute_loss(*args, **kwargs))

    class InAPartOfTheLoss(Slow, DPOTrainer):
        def _compute_loss(self, *args, **kwargs):
            return self.gathers(super()._compute_loss(*args, **kwargs))

    class AroundTheLoss(Slow, SFTTrainer):
        def training_step(self, *args, **kwargs):
            return self.gathers(super().training_step(*args, **kwargs))

    class InItsFunction(Slow, SFTTrainer):
        def loss_function(self, outputs, labels, num_items_in_batch=None):
            return self.gathers(outputs.logits.float().square().mean())

    kinds = {"loss": InTheLoss, "part": InAPartOfTheLoss, "step": AroundTheLoss, "function": InItsFunction}
    collectives = Collectives()
    config = SlowMoConfig(sync_every=TAU, timeout_seconds=patience(30))
    callback = SlowMoCallback(config)
    trainer = make("DPOTrainer" if place == "part" else "SFTTrainer", folder, [collectives, callback])
    trainer.__class__ = kinds[place]
    if place == "function":
        trainer.compute_loss_func = trainer.loss_function
    with Heard() as heard:
        trainer.train()
    utilisation = callback.outer_loop.account.spent.utilisation  # this rank's
    return collectives.names, len(trainer.seen), heard.about("gathers over all ranks"), utilisation


@pytest.mark.parametrize(
    "place", ["loss", *(pytest.param(place, marks=pytest.mark.slow) for place in ("part", "step", "function"))]
)
def test_a_loss_that_gathers_is_left_alone_and_said(tmp_path, place):
    ranks = run_workers(train_own_loss, 2, str(tmp_path), place)
    (names, seen, said, utilisation), (_, _, nothing, of_the_slow) = ranks
    assert len(names) >= (4 if place == "loss" else 1)
    assert utilisation < 0.6 < of_the_slow, "rank 0 waits at every step, and that is no computation"
    assert seen == 2
    assert "gathers over all ranks in its training steps" in " ".join(said)
    assert not nothing


class AsksForALog(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_log = control.should_log or state.global_step == 2


def check_asked_late(folder):
    out = {}
    for place in ("before", "behind"):
        ours = SlowMoCallback(SlowMoConfig(sync_every=TAU, timeout_seconds=patience(30)))
        trainer = make("SFTTrainer", folder, [AsksForALog(), ours] if place == "before" else [ours, AsksForALog()])
        trainer.train()
        out[place] = [entry for entry in trainer.state.log_history if entry["step"] == 2]
    return out


def test_a_log_that_a_later_callback_asks_for_has_all_ranks_metrics(tmp_path):
    ranks = run_workers(check_asked_late, 2, str(tmp_path))
    for rank in ranks:
        (before,), (behind,) = rank["before"], rank["behind"]
        for name in ("loss", "entropy", "mean_token_accuracy", "num_tokens"):
            assert before[name] == behind[name] == ranks[0]["before"][0][name], name


# ---- GRPO ----


def letters_a(completions, **kwargs):
    """A reward per completion."""
    return [float(completion.split().count("a")) for completion in completions]


def train_grpo(folder, adapters, settings):
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    collectives, recorder = Collectives(), Recorder()
    shared = {**QUIET, "logging_strategy": "steps", "logging_steps": TAU, "max_steps": STEPS, "bf16": False}
    trainer = GRPOTrainer(
        model=tiny_llama(),
        reward_funcs=letters_a,
        args=GRPOConfig(
            folder, max_completion_length=8, learning_rate=3e-2, beta=0.1 if adapters else 0.0, **shared, **settings
        ),
        train_dataset=Dataset.from_list([{"prompt": "abcdefghij"[i % 10]} for i in range(64)]),
        processing_class=letter_tokenizer(),
        peft_config=LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"]) if adapters else None,
        callbacks=[collectives, recorder, SlowMoCallback(SlowMoConfig(sync_every=TAU, timeout_seconds=patience(30)))],
    )
    with Heard() as heard:
        trainer.train()
    return recorded(trainer, recorder), collectives.names, heard.about("over all ranks"), trainer.state


@pytest.mark.slow
@pytest.mark.parametrize(("adapters", "completions"), [(False, 2), (True, 2), (False, 8)])
def test_grpo_trains_each_worker_alone_and_gathers_its_rewards(tmp_path, adapters, completions):
    """
    Weights follow Algorithm 1 in every run, also where a group of completions lies on both ranks. TRL's own gathers
    are left alone, and said once.
    """
    ranks = run_workers(train_grpo, 2, str(tmp_path), adapters, {"num_generations": completions})
    assert follow_float32([rank[0] for rank in ranks]) == STEPS // TAU
    assert equal(ranks[0][0]["final"], ranks[1][0]["final"])
    for _, names, _, state in ranks:
        assert len(names) >= 10, "generation, rewards and metrics"
        assert all("broadcast" not in name for name in names)
        entries = [entry for entry in state.log_history if "loss" in entry]
        assert [entry["slowmo/round"] for entry in entries] == [1, 2]
        assert all(0 <= entry["reward"] <= 8 for entry in entries)
    (said,), nothing = ranks[0][2], ranks[1][2]
    assert said.startswith("GRPOTrainer gathers over all ranks in its training steps")
    assert nothing == []
    rewards = [[entry["reward"] for entry in rank[3].log_history if "reward" in entry] for rank in ranks]
    assert rewards[0] == rewards[1], "of all ranks' completions"


# ---- DPO's reference model ----


def train_dpo(folder):
    recorder = Recorder()
    callback = SlowMoCallback(SlowMoConfig(sync_every=TAU, timeout_seconds=patience(30)))
    trainer = make("DPOTrainer", folder, [recorder, callback])
    before = values(trainer.ref_model)
    trainer.train()
    trained = sum(p.numel() for p in trainer.model.parameters())
    after = values(trainer.accelerator.unwrap_model(trainer.ref_model))
    return recorded(trainer, recorder), before, after, callback.last_round.bytes_sent, trained


@pytest.mark.slow
def test_a_reference_model_is_neither_averaged_nor_sent(tmp_path):
    ranks = run_workers(train_dpo, 2, str(tmp_path))
    assert follow_float32([rank[0] for rank in ranks]) == STEPS // TAU
    for out, before, after, sent, trained in ranks:
        assert equal(before, after)
        assert not equal(out["start"], out["final"])
        assert sent == 4 * (trained + 1) + 8 * (10 + 2), "the policy alone, and a header"


# ---- LoRA ----


def train_adapters(folder, kind):
    recorder = Recorder()
    callback = SlowMoCallback(SlowMoConfig(sync_every=TAU, timeout_seconds=patience(30)))
    trainer = make(kind, folder, [recorder, callback], adapters=True)
    trainer.train()
    adapters = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    return recorded(trainer, recorder), callback.last_round.bytes_sent, adapters


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["SFTTrainer", "DPOTrainer"])
def test_adapters_alone_are_sent(tmp_path, kind):
    """DPO's reference is then the base without them, which nothing moves."""
    ranks = run_workers(train_adapters, 2, str(tmp_path), kind)
    assert follow_float32([rank[0] for rank in ranks]) == STEPS // TAU
    for out, sent, adapters in ranks:
        assert adapters == 128
        assert sent == 4 * (adapters + 1) + 8 * (10 + 2)
        frozen = {name: value for name, value in out["start"].items() if name not in out["trained"]}
        assert equal(frozen, {name: out["final"][name] for name in frozen})


# ---- LoRA on a quantised base ----


def quantised(folder, bits):
    """A tiny Llama whose linear layers are bitsandbytes' codes, and adapters."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    if dist.get_rank() == 0:
        tiny_llama().save_pretrained(f"{folder}/base")
    dist.barrier()
    codes = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_compute_dtype=torch.float32)
    base = LlamaForCausalLM.from_pretrained(f"{folder}/base", quantization_config=codes, device_map={"": "cpu"})
    base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    torch.manual_seed(3)
    return get_peft_model(base, LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"]))


def train_quantised(folder, bits):
    from transformers import Trainer

    model = quantised(folder, bits)
    ids = torch.randint(3, 29, (64, 8), generator=torch.Generator().manual_seed(1))
    recorder, callback = Recorder(), SlowMoCallback(SlowMoConfig(sync_every=TAU, timeout_seconds=patience(30)))
    trainer = Trainer(
        model=model,
        args=arguments(f"{folder}/out", max_steps=STEPS, learning_rate=3e-2),
        train_dataset=[{"input_ids": row, "labels": row} for row in ids],
        callbacks=[recorder, callback],
    )
    trainer.train()
    adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    codes = {p.dtype for p in model.parameters() if not p.is_floating_point()}
    return recorded(trainer, recorder), callback.last_round.bytes_sent, adapters, codes


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "dtype"), [(4, torch.uint8), (8, torch.int8)])
def test_adapters_of_a_quantised_base_alone_are_sent(tmp_path, bits, dtype):
    pytest.importorskip("bitsandbytes")
    ranks = run_workers(train_quantised, 2, str(tmp_path), bits)
    assert follow_float32([rank[0] for rank in ranks]) == STEPS // TAU
    for out, sent, adapters, codes in ranks:
        assert codes == {dtype}
        assert sent == 4 * (adapters + 1) + 8 * (10 + 2)
        frozen = {name: value for name, value in out["start"].items() if name not in out["trained"]}
        assert any(value.dtype == dtype for value in frozen.values())
        assert equal(frozen, {name: out["final"][name] for name in frozen})


@pytest.mark.parametrize(("size", "tokens"), [(1, 16.0), (2, 8.0)])
def test_metrics_are_means_over_what_each_rank_has_counted(size, tokens):
    """Two entropies here and one there; tokens of one worker's processes count once."""
    metrics, theirs = {"entropy": [1.0, 3.0], "num_tokens": [10.0]}, {"entropy": (8.0, 1), "num_tokens": (6.0, 1)}
    gathers = object.__new__(trainer_gathers.TrainerGathers)
    gathers._trainer = SimpleNamespace(_metrics={"train": metrics}, model=SimpleNamespace(training=True))
    gathers._are_for_logs, gathers._said = True, {trainer_gathers._KEPT}
    world = SimpleNamespace(gather_objects=lambda own: [own, theirs])
    gathers._outer_loop = SimpleNamespace(
        account=SimpleNamespace(paused=nullcontext, apart=nullcontext),
        workers=SimpleNamespace(world=world, size=size),
    )
    gathers.bring_together()
    assert metrics == {"entropy": [(1.0 + 3.0 + 8.0) / 3], "num_tokens": [tokens]}
