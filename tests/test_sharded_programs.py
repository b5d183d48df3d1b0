"""Stock programs whose workers are sharded by FSDP2: what node workers do on the same data, and what is sent when."""

from __future__ import annotations

import tempfile
import time
import warnings

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

import fsdp
from harness import patience, run_workers
from slowmo_hf import SlowMoCallback, SlowMoConfig, SlowMoOptimizer, consensus, finish
from tiny import arguments, equal, error_of

pytestmark = fsdp.NEEDED

TAU, STEPS = 3, 8


def config(**more):
    return SlowMoConfig(**{"sync_every": TAU, "timeout_seconds": patience(30), **more})


# ---- Trainer: clipped, accumulated, scheduled, evaluated ----

ARGUMENTS = {
    "max_steps": STEPS,
    "learning_rate": 0.05,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_grad_norm": 0.1,
    "lr_scheduler_type": "linear",
    "optim": "adamw_torch",
    "weight_decay": 0.1,
    "eval_strategy": "steps",
    "eval_steps": 4,
}


def watching(after, losses, sent, coupled):
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            after.append(fsdp.full_values(model))
            self.end_step()
            self.before = coupled.between

        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            sent.append(coupled.between - self.before)  # forward, backward and norm

        def end_step(self, *args, **kwargs):
            """With the evaluation or the end that follows it."""
            if sent:
                sent[-1] = sent[-1], coupled.between - self.before

        on_train_end = end_step

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            losses.append(metrics["eval_loss"])

    return Watch()


def by_trainer(sharded):
    """Parameters before every step and at the end, evaluation losses, and calls between workers in every step."""
    after, losses, sent, coupled = [], [], [], fsdp.Coupled()
    # Behind ours: what a round sends is in its step.
    callbacks = [SlowMoCallback(config(**({} if sharded else {"processes_per_worker": 2})))]
    callbacks.append(watching(after, losses, sent, coupled))
    others = {"eval_dataset": fsdp.Tokens(16, seed=3)}
    with coupled:
        if sharded:
            trainer = fsdp.fsdp_trainer(
                tempfile.mkdtemp(), 2, 2, callbacks=callbacks, others=others, rows=200, **ARGUMENTS
            )
        else:
            from transformers import Trainer

            args = arguments(tempfile.mkdtemp(), **ARGUMENTS)
            trainer = Trainer(fsdp.Awkward(), args, train_dataset=fsdp.Tokens(200), callbacks=callbacks, **others)
        trainer.train()
    after.append(fsdp.full_values(trainer.model))
    return after, losses, sent, trainer.evaluate()["eval_loss"]


def both_kinds():
    return by_trainer(False), by_trainer(True)


@pytest.mark.slow
def test_trainer_does_what_node_workers_do_and_sends_nothing_between_rounds():
    for node, sharded in run_workers(both_kinds, 4):
        for step, (mine, right) in enumerate(zip(sharded[0], node[0], strict=True)):
            for name, value in right.items():
                if name != "level":  # DDP has the first process's buffers, FSDP each its own
                    assert (mine[name] - value).abs().max() <= 1e-12, (step, name)
        assert sharded[1] == pytest.approx(node[1], abs=1e-12)
        assert sharded[3] == pytest.approx(node[3], abs=1e-12)
        assert len(sharded[2]) == STEPS
        for step, (in_passes, in_step) in enumerate(sharded[2], start=1):
            assert in_passes == 0, step
            meets = step % TAU == 0 or step % 4 == 0 or step == STEPS  # a round, an evaluation or the end
            assert (in_step > 0) == meets, (step, in_step)


# ---- Accelerate: what users set, and what stays quiet ----

OPTIONS = {
    "plain": {},
    "activation checkpointing": {"activation_checkpointing": True},
    "CPU offload": {"cpu_offload": CPUOffloadPolicy(pin_memory=False)},
    "gathered copies kept": {"reshard_after_forward": False},
}


def trained(options, *, compiled=False, asleep=False, more=None):
    """(parameters after every step, seconds of every step, the finished model) of a stock program."""
    settings = config(inner_state="maintain", **(more or {}))
    run = fsdp.prepared(2, 2, make=lambda params: SlowMoOptimizer(fsdp.sgd(params), settings), **options)
    if compiled:
        for block in run.model.blocks:
            block.compile(backend="aot_eager")
    path, seconds = [], []
    for step in range(STEPS):
        if asleep and step == TAU and dist.get_rank() >= 2:
            time.sleep(3)
        began = time.monotonic()
        run.accelerator.backward(run.loss(fsdp.Tokens(400).batch(3 * (4 * step + dist.get_rank()), 3)))
        run.accelerator.clip_grad_norm_(run.model.parameters(), 0.5)
        run.optimizer.step()
        run.optimizer.zero_grad()
        seconds.append(time.monotonic() - began)
        path.append(fsdp.full_values(run.model))
    finish(run.optimizer)
    return path, seconds, fsdp.full_values(run.model)


def with_options():
    runs = {name: trained(options) for name, options in OPTIONS.items()}
    with warnings.catch_warnings():  # dynamo looks at .grad of what FSDP has gathered
        warnings.simplefilter("ignore")
        runs["compiled"] = trained({}, compiled=True)
    runs["asleep"] = trained({}, asleep=True)
    return runs


@pytest.fixture(scope="module")
def programs():
    return run_workers(with_options, 4)


@pytest.mark.slow
@pytest.mark.parametrize("option", [*OPTIONS, "compiled", "asleep"])
def test_options_of_fsdp_change_nothing(programs, option):
    for rank, runs in enumerate(programs):
        for wrapped, right in zip(runs[option][0], runs["plain"][0], strict=True):
            mine = {name.replace("_checkpoint_wrapped_module.", ""): value for name, value in wrapped.items()}
            assert all((mine[name] - right[name]).abs().max() <= 1e-12 for name in right), rank
        assert equal(runs[option][2], programs[0][option][2]), "finish leaves one model"


@pytest.mark.slow
def test_a_worker_that_sleeps_delays_no_clipped_step_of_the_other(programs):
    for runs in programs[:2]:
        seconds = runs["asleep"][1]
        local = [second for step, second in enumerate(seconds, start=1) if step % TAU]
        assert max(local) < patience(1), seconds
        assert max(seconds) >= 1.5, "the next round waits"


def in_bf16():
    """Passes in bf16 over shards in fp32: what the rounds do is exact all the same."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    found = []
    for more in ({}, {"shard_slow_state": True}):
        options = {"mixed_precision_policy": policy, "model": fsdp.Awkward(torch.float32)}
        path, _, last = trained(options, more=more)
        found.append((path, last))
    return found


@pytest.mark.slow
def test_a_mixed_precision_policy():
    results = run_workers(in_bf16, 4)
    for rank, ((path, last), (again, _)) in enumerate(results):
        for step, values in enumerate(path, start=1):
            others = results[(rank + 2) % 4][0][0][step - 1]
            assert equal(values, others) == (step % TAU == 0), step
            for name, value in again[step - 1].items():
                assert (value - values[name]).abs().max() <= 1e-3, (step, name)
        assert all(value.isfinite().all() for value in last.values())


# ---- LoRA ----


def adapted(sharded):
    """A Llama with adapters in a stock Trainer: parameters at the end, and a round's bytes."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Trainer

    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    if dist.get_rank() == 0:
        fsdp.small_llama(folder[0])
    dist.barrier()
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder[0], dtype=torch.float64)
    lora = LoraConfig(target_modules=["q_proj", "down_proj"], r=2, init_lora_weights=False)
    model = get_peft_model(base, lora).to(torch.float64)
    callback = SlowMoCallback(config(**({} if sharded else {"processes_per_worker": 2})))
    settings = {**ARGUMENTS, "eval_strategy": "no"}
    if sharded:
        trainer = fsdp.fsdp_trainer(
            tempfile.mkdtemp(),
            2,
            2,
            model=model,
            data=fsdp.texts(200),
            callbacks=[callback],
            fsdp={"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
            **settings,
        )
    else:
        args = arguments(tempfile.mkdtemp(), **settings)
        trainer = Trainer(model, args, train_dataset=fsdp.texts(200), callbacks=[callback])
    trainer.train()
    adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return fsdp.full_values(model), callback.last_round.bytes_sent, adapters


def both_adapted():
    return adapted(False), adapted(True)


@pytest.mark.slow
def test_adapters_on_a_sharded_base_travel_alone():
    for (node, _, _), (sharded, sent, adapters) in run_workers(both_adapted, 4):
        moved = 0
        for name, value in node.items():
            assert (sharded[name] - value).abs().max() <= 1e-12, name
            moved += "lora_" in name
        assert moved == 8
        # 8 bytes an element, the norms' rider and the headers of two processes: (m-1)/m = 1/2, twice.
        assert 0 <= sent - 8 * adapters <= 2 * (8 + 3 * 8 * 12) + 8


def loaded(folder, out, kind):
    """Stock Trainer on a Llama that is whole, or sharded at load: the average at the end, and the last round."""
    from transformers import AutoModelForCausalLM, Trainer

    if kind == "sharded":
        model = fsdp.sharded_at_load(folder, 2, 2)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    callback = SlowMoCallback(config(**({} if kind == "sharded" else {"processes_per_worker": 2})))
    settings = {**ARGUMENTS, "eval_strategy": "no", "max_grad_norm": 0.0, "save_strategy": "no"}
    Trainer(model, arguments(out, **settings), train_dataset=fsdp.texts(200), callbacks=[callback]).train()
    return fsdp.full_values(model), callback.last_round.velocity_norm


def both_loaded(folder, out):
    return loaded(folder, out, "node"), loaded(folder, out, "sharded")


@pytest.mark.skipif(not fsdp.SHARDS_AT_LOAD, reason="this transformers cannot shard at load over replicas")
@pytest.mark.slow
def test_a_model_that_is_sharded_at_load_trains_as_node_workers_do(tmp_path):
    """
    transformers' `DistributedConfig`, Adam, slow momentum; two rounds and two steps more. The embedding is not tied:
    with a tied one a model that is sharded at load computes with its old weights from the second step on, in a plain
    loop of torch too (transformers 5.24, torch 2.13).
    """
    folder = fsdp.small_llama(tmp_path / "llama", tied=False)
    for (node, velocity), (sharded, same) in run_workers(both_loaded, 4, folder, str(tmp_path / "out")):
        assert velocity == pytest.approx(same, rel=1e-9)
        assert velocity > 0
        for name, value in node.items():
            assert (sharded[name] - value).abs().max() <= 1e-12, name


# ---- what a save by one's own means ----


def saved_by_hand():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    run = fsdp.prepared(2, 2, make=lambda params: SlowMoOptimizer(fsdp.sgd(params), config()))
    for step in range(TAU):
        run.accelerator.backward(run.loss(fsdp.Tokens(400).batch(3 * (4 * step + dist.get_rank()), 3)))
        run.optimizer.step()
        run.optimizer.zero_grad()
    with consensus(run.optimizer):
        return error_of(get_optimizer_state_dict, run.model, run.optimizer.optimizer)


@pytest.mark.slow
def test_a_state_that_would_lose_the_slow_state_is_refused():
    """torch's `get_optimizer_state_dict` drops keys that it does not know."""
    for words in run_workers(saved_by_hand, 4):
        assert "2 processes per worker: each has a part of it. Use accelerator.save_state" in words
