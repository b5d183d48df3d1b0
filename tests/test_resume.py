"""A run stopped at any step and resumed is bit for bit the run that was never stopped, on every rank."""

import shutil

import pytest
import torch
import torch.distributed as dist
from transformers import Trainer, TrainerControl, TrainerState

from harness import run_workers
from slowmo_hf import SlowMoCallback, SlowMoConfig
from slowmo_hf.adapters.trainer_end import StepTooMany
from tiny import Recorder, arguments, bert, equal, recorded, sentences

STEPS = 9
CASES = {
    "local sgd": (SlowMoConfig(sync_every=4, outer_momentum=0.6), "sgd"),
    "local adam, buffers local": (SlowMoConfig(sync_every=4, model_buffers="local"), "adamw_torch"),
    "state averaged": (SlowMoConfig.local_sgd(3, inner_state="average"), "sgd"),
    "diloco": (SlowMoConfig.diloco(sync_every=4), "adamw_torch"),
    "int8": (SlowMoConfig(sync_every=4, outer_momentum=0.6, compression="int8"), "sgd"),
    "sharded": (SlowMoConfig(sync_every=4, outer_momentum=0.6, shard_slow_state=True), "sgd"),
    "sgp": (SlowMoConfig(base="sgp", sync_every=4), "adamw_torch"),
    "sgp, no average": (SlowMoConfig(base="sgp", sync_every=4, exact_average=False), "sgd"),
    "osgp": (SlowMoConfig(base="osgp", sync_every=5, staleness=2), "adamw_torch"),
    "osgp, no average": (SlowMoConfig(base="osgp", sync_every=4, exact_average=False), "adamw_torch"),
    "dpsgd": (SlowMoConfig(base="dpsgd", sync_every=4), "sgd"),
    "node workers": (SlowMoConfig(base="osgp", sync_every=4, processes_per_worker=2), "adamw_torch"),
    "all_reduce": (SlowMoConfig(base="all_reduce", sync_every=4), "sgd"),
    "overlapped": (SlowMoConfig(sync_every=4, outer_momentum=0.6, overlap_steps=2), "sgd"),
    "overlapped, sharded": (
        SlowMoConfig(sync_every=4, outer_momentum=0.6, overlap_steps=3, shard_slow_state=True),
        "sgd",
    ),
    "overlapped, node workers": (
        SlowMoConfig.diloco(sync_every=4, overlap_steps=3, processes_per_worker=2),
        "adamw_torch",
    ),
}


def _run(folder, case, resume=None, **settings):
    """9 steps of 6 to the epoch, shuffled, with dropout; a save after every step, an evaluation after every third."""
    config, optim = CASES[case]
    recorder = Recorder()
    args = arguments(
        folder,
        **{
            "max_steps": STEPS,
            "optim": optim,
            "optim_args": "momentum=0.9" if optim == "sgd" else None,
            "learning_rate": 0.02,
        }
        | {"save_strategy": "steps", "save_steps": 1, "logging_strategy": "steps", "logging_steps": 2, "seed": 5}
        | {"eval_strategy": "steps", "eval_steps": 3, "per_device_train_batch_size": 2}
        | settings,
    )
    data = sentences(24)
    callbacks = [recorder, SlowMoCallback(config)]
    trainer = Trainer(
        model=bert(dropout=0.1), args=args, train_dataset=data, eval_dataset=data[:8], callbacks=callbacks
    )
    trainer.train(resume_from_checkpoint=resume)
    state = trainer.optimizer.optimizer.state_dict()["state"]
    return {**recorded(trainer, recorder), "inner": state, "step": trainer.state.global_step}


def _same_end(first, resumed):
    """Weights after every step that both have taken, final weights, and the optimizer's state."""
    count = len(resumed["after"])
    for mine, other in zip(first["after"][-count:], resumed["after"], strict=True):
        assert equal(mine, other)
    assert equal(first["final"], resumed["final"])
    for index, state in first["inner"].items():
        for key, value in state.items():
            other = resumed["inner"][index][key]
            assert torch.equal(value, other) if torch.is_tensor(value) else value == other, key


def _check_case(folder, case):
    """One run that is never stopped; copies of its checkpoints stand for a kill after each save."""
    torch.use_deterministic_algorithms(True)
    whole = _run(folder / "whole", case)
    quiet = _run(folder / "quiet", case, save_strategy="no", eval_strategy="no")
    _same_end(quiet, whole)  # looking and saving leave no trace
    dist.barrier()
    for step in (1, 3, 4, 5, 7, 8):
        copied = folder / f"{step}"
        if dist.get_rank() == 0:
            shutil.copytree(folder / "whole" / f"checkpoint-{step}", copied / f"checkpoint-{step}")
        dist.barrier()
        resumed = _run(copied, case, resume=True, save_steps=STEPS)  # saving leaves no trace, as was seen
        assert len(resumed["after"]) == STEPS - step
        _same_end(whole, resumed)
        if dist.get_rank() == 0:
            shutil.rmtree(copied)
    if dist.get_rank() == 0:
        shutil.rmtree(folder / "whole")
    return True


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_resume_at_every_step_is_bit_for_bit(tmp_path, case):
    run_workers(
        _check_case,
        {"dpsgd": 3, "osgp": 3, "node workers": 4, "overlapped, node workers": 4}.get(case, 2),
        tmp_path,
        case,
        time_limit_seconds=170,
    )


def _resume_at_the_end(folder, case):
    """A checkpoint of the last step, in the middle of a pass: Trainer itself would take a tenth step."""
    constant = {"lr_scheduler_type": "constant"}
    whole = _run(folder, case, save_steps=STEPS, **constant)
    before = sorted(path.name for path in folder.iterdir())
    dist.barrier()
    resumed = _run(folder, case, resume=True, save_steps=STEPS, **constant)
    assert sorted(path.name for path in folder.iterdir()) == before == [f"checkpoint-{STEPS}"]
    assert equal(whole["final"], resumed["final"])
    return resumed["step"]


@pytest.mark.parametrize("case", ["local sgd", "osgp", "overlapped", "sgp, no average"])
def test_a_run_that_is_resumed_at_its_end_ends(tmp_path, case):
    assert run_workers(_resume_at_the_end, 2, tmp_path, case) == [STEPS, STEPS]


def test_a_step_too_many_is_undone_in_buffers_too():
    model, state = torch.nn.BatchNorm1d(3), TrainerState(global_step=4, epoch=0.5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    too_many = StepTooMany.of(model, state)
    model(torch.randn(8, 3))
    state.global_step = 5
    too_many.undo(state, TrainerControl())
    assert equal(before, model.state_dict())
    assert state.global_step == 4
