"""TRL's trainers gather metrics at every training step: under SlowMoCallback nothing couples the workers there."""

from __future__ import annotations

import time

import pytest
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from harness import patience, run_workers
from slowmo_hf import SlowMoCallback, SlowMoConfig
from test_trainer_breadth import tiny_llama, tokenizer
from tiny import QUIET, Heard

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


def make(kind, folder, callbacks):
    from datasets import Dataset
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
    if kind == "SFTTrainer":
        data = Dataset.from_dict({"text": [" ".join(letters[i % 12 : i % 12 + 6]) for i in range(64)]})
        return SFTTrainer(
            model=tiny_llama(),
            args=SFTConfig(folder, **settings),
            train_dataset=data,
            eval_dataset=data.select(range(8)),
            processing_class=tokenizer(),
            callbacks=callbacks,
        )
    rows = [{"prompt": letters[i % 9], "chosen": "a b c", "rejected": "d e f"} for i in range(64)]
    data = Dataset.from_list(rows)
    if kind == "RewardTrainer":
        config = tiny_llama().config
        config.num_labels = 1
        return RewardTrainer(
            model=LlamaForSequenceClassification(config),
            args=RewardConfig(folder, **settings),
            train_dataset=data,
            eval_dataset=data.select(range(8)),
            processing_class=tokenizer(),
            callbacks=callbacks,
        )
    return DPOTrainer(
        model=tiny_llama(),
        ref_model=tiny_llama(),
        args=DPOConfig(folder, **settings),
        train_dataset=data,
        eval_dataset=data.select(range(8)),
        processing_class=tokenizer(),
        callbacks=callbacks,
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


def train_own_loss(folder):
    """A subclass whose own loss gathers: what reaches the loss stays as it is. Rank 1 is slow."""
    from trl import SFTTrainer

    class Coupled(SFTTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            time.sleep(0.2 * self.args.process_index)
            loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
            self.seen = self.accelerator.gather(loss.detach())
            return loss

    collectives = Collectives()
    config = SlowMoConfig(sync_every=TAU, timeout_seconds=patience(30))
    callback = SlowMoCallback(config)
    trainer = make("SFTTrainer", folder, [collectives, callback])
    trainer.__class__ = Coupled
    with Heard() as heard:
        trainer.train()
    utilisation = callback.outer_loop.account.spent.utilisation  # this rank's
    return collectives.names, len(trainer.seen), heard.about("gathers over all ranks"), utilisation


def test_a_loss_that_gathers_is_left_alone_and_said(tmp_path):
    (names, seen, said, utilisation), (_, _, nothing, of_the_slow) = run_workers(train_own_loss, 2, str(tmp_path))
    assert len(names) >= 4
    assert utilisation < 0.6 < of_the_slow, "rank 0 waits at every step, and that is no computation"
    assert seen == 2
    assert len(said) == 1
    assert "Coupled gathers over all ranks in its training steps" in said[0]
    assert not nothing
