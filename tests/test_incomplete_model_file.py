"""A model file that lacks trained parameters, as PEFT's and a subclass's may: a resume is exact all the same."""

from __future__ import annotations

import functools

import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from transformers import Trainer

import slowmo_hf
from harness import patience, run_workers
from slowmo_hf import SlowMoCallback, SlowMoConfig, SlowMoOptimizer
from tiny import Regression, Rows, arguments, equal, values


class Forgets(Trainer):
    """Its files have no head, and the body in bf16."""

    def _save(self, output_dir=None, state_dict=None):
        state = {name: value.bfloat16() for name, value in self.model.state_dict().items() if name.startswith("body")}
        super()._save(output_dir, state_dict=state)


def train(folder, settings, resumed, dtype, kind=Forgets):
    """Ten steps, a checkpoint at the sixth; or on from there: a model of other values is what a new program has."""
    model = Regression(dtype)
    model._keys_to_ignore_on_save = None  # which Trainer asks for where a file lacks something
    if resumed:
        with torch.no_grad():
            for param in model.parameters():
                param.fill_(0.5)
    config = SlowMoConfig(sync_every=3, timeout_seconds=patience(30), **settings)
    args = arguments(folder, max_steps=10, learning_rate=0.05, save_strategy="steps", save_steps=6)
    trainer = kind(model=model, args=args, train_dataset=Rows(256, dtype), callbacks=[SlowMoCallback(config)])
    trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-6" if resumed else None)
    return values(model)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "settings", "dtype"),
    [
        (2, {}, torch.float32),
        (2, {}, torch.float64),
        (2, {}, torch.bfloat16),
        (2, {"outer_momentum": 0.0, "base": "sgp"}, torch.float32),
        (2, {"shard_slow_state": True}, torch.float32),
        (2, {"base": "all_reduce"}, torch.float32),
        (4, {"processes_per_worker": 2}, torch.float32),
        (4, {"processes_per_worker": 2, "shard_slow_state": True}, torch.float32),
    ],
)
def test_a_resume_at_a_rounds_end_needs_no_whole_model_file(tmp_path, processes, settings, dtype):
    whole = run_workers(train, processes, str(tmp_path), settings, False, dtype)
    with safe_open(tmp_path / "checkpoint-6/model.safetensors", "pt") as file:
        assert sorted(file.keys()) == ["body.bias", "body.weight"]
    resumed = run_workers(train, processes, str(tmp_path), settings, True, dtype)
    for rank in range(processes):
        assert equal(resumed[rank], whole[0]), rank


def leave_the_head_out(models, weights, folder):
    """As examples do that save adapters alone: `register_save_state_pre_hook`."""
    weights[:] = [{name: value for name, value in one.items() if "body" in name} for one in weights]


def load_what_is_there(models, folder):
    """The other half; accelerate would want all names."""
    with safe_open(f"{folder}/model.safetensors", "pt") as file:
        models.pop().load_state_dict({name: file.get_tensor(name) for name in file.keys()}, strict=False)  # noqa: SIM118


MOVED = {  # by name: which parameter, and how many of its rows; each is in the part of one process of two
    "": ("head.weight", 0),
    "head": ("head.weight", 1),
    "body": ("body.weight", 1),
}


def loop(folder, settings, moves, resumed):
    """The same in a custom loop, whose program may move weights behind the round, all ranks alike."""
    accelerator, model = Accelerator(cpu=True), Regression(torch.float32)
    (name, rows), whole_file = MOVED[moves], bool(moves)
    if resumed:
        model.head.weight.data.fill_(0.5)
    moved = dict(model.named_parameters())[name]
    config = SlowMoConfig(sync_every=3, timeout_seconds=patience(30), **settings)
    inner = torch.optim.AdamW(model.parameters(), lr=0.05)
    model, optimizer = accelerator.prepare(model, SlowMoOptimizer(inner, config))
    if not whole_file:
        accelerator.register_save_state_pre_hook(leave_the_head_out)
        accelerator.register_load_state_pre_hook(load_what_is_there)
    if resumed:
        accelerator.load_state(folder)
    for step in range(7 if resumed else 1, 11):
        generator = torch.Generator().manual_seed(10 * step + accelerator.process_index)
        inputs = torch.randn(4, 4, generator=generator)
        accelerator.backward(model(inputs, inputs[:, :1])["loss"])
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            moved[:rows].clamp_(-0.1, 0.1)
        if step == 6:
            accelerator.save_state(folder)
    slowmo_hf.finish(optimizer)
    return values(accelerator.unwrap_model(model))


@pytest.mark.parametrize("moves", MOVED)
@pytest.mark.parametrize("size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_custom_loop_resumes_exactly(tmp_path, size, moves):
    given = str(tmp_path / "state"), {"processes_per_worker": size}, moves
    whole, resumed = (run_workers(loop, 2 * size, *given, again) for again in (False, True))
    for one in resumed:
        assert equal(one, whole[0])


@pytest.mark.slow
def test_another_number_of_workers_starts_from_the_whole_average(tmp_path):
    runs = {}
    for name, kind in (("forgets", Forgets), ("whole", Trainer)):
        folder = str(tmp_path / name)
        run_workers(functools.partial(train, kind=kind), 4, folder, {}, False, torch.float32)
        runs[name] = run_workers(functools.partial(train, kind=kind), 2, folder, {}, True, torch.float32)
    assert equal(runs["forgets"][0], runs["whole"][0])
    assert equal(runs["forgets"][1], runs["whole"][0])
