"""
What people do with Trainer, under SlowMoCallback. Every run is followed by hand (`follow`): local steps, rounds, the
final average.
"""

from __future__ import annotations

import gc

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback

from followed import CONFIG, STEPS, TAU, assert_mean, follow_float32
from harness import run_workers
from slowmo_hf import SlowMoCallback, SlowMoConfig
from tiny import (
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
