"""Checkpoints of workers whose processes hold shards (FSDP2), or whole models: saved and gone on with bit for bit."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import fsdp
from harness import patience, run_workers
from slowmo_hf import SlowMoCallback, SlowMoConfig, SlowMoOptimizer, consensus, verify_checkpoint
from slowmo_hf.checkpoints.files import FOLDER
from slowmo_hf.checkpoints.manifest import seal
from slowmo_hf.contents import CheckpointError
from tiny import Regression, Rows, equal, two_groups, values

pytestmark = fsdp.NEEDED

TAU, STEPS = 3, 7  # two rounds, and a step behind them


def config(**more):
    return SlowMoConfig(**{"sync_every": TAU, "timeout_seconds": patience(30), **more})


def shared_folder():
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    return Path(folder[0])


def adamw(params):
    return torch.optim.AdamW(params, lr=0.05, weight_decay=0.1)


# ---- stock Trainer ----

KINDS = ("FULL_STATE_DICT", "SHARDED_STATE_DICT")


def trained(folder, settings, kind, resume=None, **arguments):
    """This process's parameters and buffers after every step, by Trainer's clock, and at the end."""
    from transformers import TrainerCallback

    after = {}

    class Record(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            after[state.global_step] = fsdp.local_values(model)

    trainer = fsdp.fsdp_trainer(
        folder,
        2,
        2,
        callbacks=[SlowMoCallback(settings), Record()],
        fsdp={"state_dict_type": kind},
        max_steps=STEPS,
        per_device_train_batch_size=2,
        optim="adamw_torch",
        weight_decay=0.1,
        **{"save_strategy": "no", **arguments},
    )
    trainer.train(resume_from_checkpoint=resume)
    return {**after, "end": fsdp.local_values(trainer.model)}


def trainers(kind, more):
    """A run that never saves, one that saves at every step, and one from each of its checkpoints."""
    folder, settings = shared_folder(), config(**more)
    quiet = trained(folder / "quiet", settings, kind)
    saving = trained(folder / "saving", settings, kind, save_strategy="steps", save_steps=1)
    found = {"saving": [equal(quiet[at], saving[at]) for at in quiet]}
    for step in range(1, STEPS):
        resumed = trained(folder / "saving", settings, kind, str(folder / f"saving/checkpoint-{step}"))
        assert list(resumed) == [*range(step, STEPS), "end"]
        found[step] = [equal(quiet[at], resumed[at]) for at in resumed]
    inside = folder / f"saving/checkpoint-{TAU + 1}"
    found["files"] = sorted(path.name for path in (inside / FOLDER).iterdir())
    found["local"] = {name: value for name, value in quiet[TAU + 1].items() if name != "level"}
    if kind == "FULL_STATE_DICT":
        found["model"] = load_file(inside / "model.safetensors")
    return found


def all_trainers():
    cases = itertools.chain(
        [(kind, {"inner_state": "reset"}) for kind in KINDS],
        [(KINDS[1], {"overlap_steps": 2, "compression": "int8"}), (KINDS[0], {"base": "osgp"})],
    )
    return [trainers(kind, more) for kind, more in cases]


@pytest.fixture(scope="module")
def by_trainer():
    return run_workers(all_trainers, 4, time_limit_seconds=360)  # 70 s of a slow machine's, alone


@pytest.mark.slow
@pytest.mark.timeout(500)
@pytest.mark.parametrize("case", range(4))
def test_trainer_goes_on_bit_for_bit_from_every_step(by_trainer, case):
    """Adam's state is empty behind a round (reset): what a save makes up is empty again."""
    for rank, result in enumerate(by_trainer):
        for at in ("saving", *range(1, STEPS)):
            assert all(result[case][at]), (rank, at, result[case][at])


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_every_process_has_its_own_files_and_the_model_is_the_average(by_trainer):
    places = [f"{name}_shard_{place}" for name in ("shared", "worker_0", "worker_1") for place in (0, 1)]
    expected = {f"{name}.{ending}" for name in places for ending in ("json", "safetensors")}
    expected |= {f"{name}.pt" for name in places if name.startswith("worker")} | {"manifest.json"}
    for result in by_trainer:
        assert set(result[0]["files"]) == expected
        first, second = (
            {name: torch.cat([shard[0]["local"][name] for shard in worker]) for name in result[0]["local"]}
            for worker in (by_trainer[:2], by_trainer[2:])
        )
        mean = {name: (first[name] + second[name]) / 2 for name in first}
        saved = result[0]["model"]
        for name, right in mean.items():
            if name in saved:  # a tied one is there once
                assert (saved[name] - right).abs().max() <= 1e-12, name
        assert len(saved.keys() & mean.keys()) >= len(mean) - 1


# ---- stock Accelerate ----


def program(settings, shards=2, replicas=2, make=adamw, **more):
    """As a new process would."""
    AcceleratorState._reset_state()
    return fsdp.prepared(shards, replicas, make=lambda params: SlowMoOptimizer(make(params), settings), **more)


def step_of(run, step):
    data = fsdp.Tokens(400).batch(3 * (4 * step + dist.get_rank()), 3)
    with run.accelerator.accumulate(run.model):
        run.accelerator.backward(run.loss(data))
        run.accelerator.clip_grad_norm_(run.model.parameters(), 1.0)
        run.optimizer.step()
        run.optimizer.zero_grad()


def path_from(run, first, save_to=None):
    after = []
    for step in range(first, STEPS):
        step_of(run, step)
        after.append(fsdp.local_values(run.model))
        if save_to is not None:
            run.accelerator.save_state(save_to / str(step + 1))
    return after


def programs(kind, more):
    folder, settings = shared_folder(), config(**more)
    quiet = path_from(program(settings, state_dict_type=kind), 0)
    saving = path_from(program(settings, state_dict_type=kind), 0, folder)
    found = {"saving": [equal(*pair) for pair in zip(quiet, saving, strict=True)]}
    for step in range(1, STEPS):
        run = program(settings, state_dict_type=kind)
        if step % 2:  # a run that has begun takes it up too
            step_of(run, 50)
        run.accelerator.load_state(folder / str(step))
        found[step] = [equal(*pair) for pair in zip(quiet[step:], path_from(run, step), strict=True)]
    return found


def all_programs():
    return [
        programs(KINDS[0], {"inner_state": "reset"}),
        programs(KINDS[1], {"inner_state": "average"}),
        programs(KINDS[1], {"outer_optimizer": "torch.optim.Adam", "outer_lr": 0.01}),
        programs(KINDS[0], {"shard_slow_state": True, "overlap_steps": 2}),
    ]


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_accelerate_goes_on_bit_for_bit_from_every_step():
    for rank, result in enumerate(run_workers(all_programs, 4, time_limit_seconds=240)):
        for case, found in enumerate(result):
            for at in ("saving", *range(1, STEPS)):
                assert all(found[at]), (rank, case, at, found[at])


# ---- other numbers ----


def slow_state(loop):
    return [
        flat.clone() for flat in [*(item.flat for item in loop.parts.slow.anchors), *loop.parts.slow.update.velocities]
    ]


def saved_by_two_workers(folder, kind=KINDS[0]):
    run = program(config(), state_dict_type=kind)
    for step in range(5):
        step_of(run, step)
    run.accelerator.save_state(folder)
    with consensus(run.optimizer):
        average = fsdp.full_values(run.model)
    return average, slow_state(run.optimizer.optimizer.outer_loop)


def resumed_by_others(folder, workers, shards, kind=KINDS[0]):
    """The slow state and the parameters with which the first step begins; or the error."""
    try:
        run = program(config(), shards, workers, state_dict_type=kind)
        run.accelerator.load_state(folder)
        loop = run.optimizer.optimizer.begun()
    except CheckpointError as error:
        return str(error)
    found = fsdp.full_values(run.model), slow_state(loop), loop.attempted_steps
    for step in range(5, 7):
        step_of(run, step)
    return *found, loop.rounds


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_another_number_of_workers_with_as_many_shards(tmp_path, kind):
    """From the average, which is the model in both kinds of files."""
    before = run_workers(saved_by_two_workers, 4, tmp_path, kind)
    for workers in (1, 3):
        for rank, found in enumerate(run_workers(resumed_by_others, 2 * workers, tmp_path, workers, 2, kind)):
            assert not isinstance(found, str), found
            start, slow, step, rounds = found
            average = before[0][0]
            assert all(torch.equal(start[name], average[name]) for name in average)
            assert all(torch.equal(*pair) for pair in zip(slow, before[rank % 2][1], strict=True))
            assert (step, rounds) == (5, 2)


def on_own_disks(folder):
    """Two machines of two processes that share no disk: the errors, then values behind a save and behind a resume."""
    mine = folder / f"machine-{dist.get_rank() // 2}"
    launched = {"LOCAL_RANK": str(dist.get_rank() % 2), "LOCAL_WORLD_SIZE": "2"}
    os.environ.update(launched, MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    errors = []
    for kind in KINDS:
        with pytest.raises(CheckpointError) as error:
            trained(mine / "trainer", config(), kind, save_strategy="steps", save_steps=1)
        errors.append(str(error.value))
    for kind in reversed(KINDS):
        run = program(config(), state_dict_type=kind)
        for step in range(5):
            step_of(run, step)
        if kind == "SHARDED_STATE_DICT":
            with pytest.raises(CheckpointError) as error:
                run.accelerator.save_state(str(mine / kind))
            errors.append(str(error.value))
    run.accelerator.save_state(str(mine / "whole"))
    verify_checkpoint(mine / "whole")
    again = program(config(), state_dict_type=KINDS[0])
    again.accelerator.load_state(str(mine / "whole"))
    for one in (run, again):
        for step in range(5, 7):
            step_of(one, step)
    return errors, equal(fsdp.full_values(run.model), fsdp.full_values(again.model))


@pytest.mark.slow
def test_shards_on_machines_with_disks_of_their_own(tmp_path):
    """
    Trainer saves the whole on rank 0's machine at most, Accelerate's sharded files lie in parts: both were sealed, and
    nobody could resume from them. Accelerate's whole state dictionaries go on bit for bit.
    """
    for errors, same in run_workers(on_own_disks, 4, tmp_path):
        assert len(errors) == 3
        for error in errors:
            assert "machines do not share" in error
            assert "the model is sharded: its parts would lie on several disks" in error
            assert "Put the folder on a shared file system, or save nothing while it trains" in error
        assert same


@pytest.mark.slow
def test_another_number_of_shards_is_refused_by_name(tmp_path):
    run_workers(saved_by_two_workers, 4, tmp_path)
    for found in run_workers(resumed_by_others, 3, tmp_path, 1, 3):
        assert (
            "workers whose processes hold 2 shards; here they hold 3 shards. Resume with the same dp_shard_size"
            in found
        )


def node_workers(folder, size, more, resume):
    """Local weights and the slow state behind four steps, or behind a resume; and three steps later."""
    from accelerate import Accelerator

    accelerator, bare, rows = Accelerator(cpu=True), Regression(), Rows(300)
    settings = config(processes_per_worker=size, inner_state="maintain", **more)
    model, optimizer = accelerator.prepare(bare, SlowMoOptimizer(two_groups(bare, "adamw", 0.05), settings))
    worker = dist.get_rank() // size

    def train(first, last):
        for step in range(first, last):
            rows_of = slice(4 * (2 * step + worker), 4 * (2 * step + worker) + 4)  # a worker's processes see the same
            accelerator.backward(model(rows.x[rows_of], rows.y[rows_of])["loss"])
            optimizer.step()
            optimizer.zero_grad()

    if resume:
        accelerator.load_state(folder)
        optimizer.optimizer.begun()
    else:
        train(0, 4)
        accelerator.save_state(folder)
    found = values(bare), slow_state(optimizer.optimizer.outer_loop)
    train(4, 5)
    next_step = values(bare)
    train(5, 7)
    return *found, next_step, values(bare)


NODES = {
    "slow momentum": {},
    "int8": {"compression": "int8"},
    "osgp": {"base": "osgp"},
    "overlapped": {"overlap_steps": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 2), (2, 1)], ids=str)
@pytest.mark.parametrize("case", NODES)
def test_node_workers_of_another_size_go_on(tmp_path, sizes, case):
    """
    Two workers, whose processes all have whole models: parts are joined and cut anew. What int8's owners of shards
    have held back belongs to other shards, and is dropped with a warning: it is the same up to the next round.
    """
    before, after = sizes
    saved = run_workers(node_workers, 2 * before, tmp_path, before, NODES[case], False)
    taken = run_workers(node_workers, 2 * after, tmp_path, after, NODES[case], True)

    def whole(results, size, worker):
        of_worker = [result[1] for result in results[worker * size : (worker + 1) * size]]
        return [torch.cat(flats) for flats in zip(*of_worker, strict=True)]

    for worker in range(2):
        for result in taken[worker * after : (worker + 1) * after]:
            right = saved[worker * before]
            assert equal(result[0], right[0])
            for mine, its in zip(result[2:], right[2:], strict=True):
                assert all((mine[name] - its[name]).abs().max() <= 1e-12 for name in its) or (
                    case == "int8" and mine is result[3]
                )
        for mine, right in zip(whole(taken, after, worker), whole(saved, before, worker), strict=True):
            assert torch.equal(mine, right)


@pytest.mark.slow
def test_a_torch_outer_optimizer_keeps_its_processes_per_worker(tmp_path):
    more = {"outer_optimizer": "torch.optim.Adam", "outer_lr": 0.01}
    run_workers(node_workers, 4, tmp_path, 2, more, False)
    for words in run_workers(failing, 2, node_workers, tmp_path, 1, more, True):
        assert "the state of the outer optimizer is of 2 processes per worker, this run has 1" in words
        assert "Set processes_per_worker=2" in words


def failing(work, *given):
    with pytest.raises(CheckpointError) as error:
        work(*given)
    return str(error.value)


# ---- damaged ----


def spoiled(folder):
    """What each of these says, the same on every rank."""
    told = {}
    for name, spoil in SPOILED.items():
        dist.barrier()
        copy = Path(f"{folder}-{re.sub('[^a-z]', '-', name)}")
        if dist.get_rank() == 0:
            shutil.copytree(folder, copy)
            spoil(copy / FOLDER)
            manifest = json.loads((copy / FOLDER / "manifest.json").read_text())
            if "sealed" not in name:
                seal(copy, {key: manifest[key] for key in ("run", "save", "step")})
        dist.barrier()
        run = program(config(), state_dict_type=KINDS[0])
        told[name] = "accepted"
        try:
            run.accelerator.load_state(copy)
            run.optimizer.optimizer.begun()
        except CheckpointError as error:
            told[name] = str(error)
    return told


def cut(path):
    path.write_bytes(path.read_bytes()[:-3])


def set_in(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def swap_places(folder):
    for ending in ("json", "safetensors"):
        first, second = (folder / f"shared_shard_{place}.{ending}" for place in (0, 1))
        aside = folder / f"aside.{ending}.tmp"
        first.rename(aside)
        second.rename(first)
        aside.rename(second)


def with_shards(folder, change):
    path = folder / "worker_1_shard_0.pt"
    objects = torch.load(path, weights_only=True)
    change(objects["inner_optimizer_shards"])
    torch.save(objects, path)


def an_entry(shards):
    key = next(key for key in shards if shards[key])
    return shards[key], next(iter(shards[key]))


def reshape(shards):
    of_one, name = an_entry(shards)
    of_one[name][0] = [9, *of_one[name][0][1:]]


def rename(shards):
    of_one, name = an_entry(shards)
    of_one[name][2] = "somewhere"


def leave_out(shards):
    shards.pop(next(iter(shards)))


SPOILED = {
    "one process's file is gone": lambda folder: (folder / "worker_1_shard_1.json").unlink(),
    "one process's file is cut, sealed before": lambda folder: cut(folder / "shared_shard_1.safetensors"),
    "another save's": lambda folder: set_in(folder / "shared_shard_1.json", save="another-5"),
    "another save's worker": lambda folder: set_in(folder / "worker_0_shard_1.json", save="another-5"),
    "of another number": lambda folder: set_in(folder / "shared_shard_0.json", processes_per_worker=3),
    "of whole models": lambda folder: set_in(folder / "shared_shard_1.json", sharded=False),
    "swapped": swap_places,
    "a shard of another shape": lambda folder: with_shards(folder, reshape),
    "a placement that is none": lambda folder: with_shards(folder, rename),
    "no description": lambda folder: with_shards(folder, leave_out),
}


@pytest.mark.slow
def test_damaged_files_of_one_process_are_an_error_on_all(tmp_path):
    folder = tmp_path / "state"
    run_workers(saved_by_two_workers, 4, folder)
    results = run_workers(spoiled, 4, folder)
    for name in SPOILED:
        words = {result[name] for result in results}
        assert len(words) == 1, name
        assert "cannot be resumed" in words.pop(), name
