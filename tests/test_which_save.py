"""Which save a folder holds, and which one a resume takes up: one, the same on all machines, and nothing else."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from transformers import TrainerCallback

import slowmo_hf.adapters.trainer_checkpoints as trainer_checkpoints
from accelerate_loops import linear, settings, train_on, weights
from harness import patience, run_workers
from saved_runs import MIDDLE, STEPS, checkpoints, contents, rank0, same_end, train, whole
from slowmo_hf import CheckpointError, SlowMoConfig, SlowMoOptimizer, verify_checkpoint
from slowmo_hf.adapters.accelerate_checkpoints import _rotate
from slowmo_hf.checkpoints.files import LOCK
from slowmo_hf.checkpoints.manifest import file_digests, is_whole, stamps
from slowmo_hf.checkpoints.together import Keeping, finish_together
from slowmo_hf.wire.communicator import Communicator

# ---- machines with disks of their own ----


def own_disk(folder):
    """Each process as a machine of its own."""
    os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    return folder / f"machine-{dist.get_rank()}", SlowMoConfig(sync_every=4, timeout_seconds=patience(20))


def resumed_from_another_run(folder):
    mine, config = own_disk(folder)
    train(mine / "run", config)
    if dist.get_rank() == 1:
        shutil.copytree(mine / "run", mine / "kept")
    train(mine / "run", config)  # once more from the beginning: the same steps
    if dist.get_rank() == 1:
        shutil.rmtree(mine / "run")
        shutil.move(mine / "kept", mine / "run")
    shutil.copytree(mine / "run" / f"checkpoint-{MIDDLE}", mine / "again" / f"checkpoint-{MIDDLE}")
    with pytest.raises(CheckpointError) as error:
        train(mine / "again", config, resume=True)
    return str(error.value)


def test_a_resume_from_different_saves_is_refused(tmp_path):
    """One machine has an old disk. Each folder is whole, and the ranks would train from different anchors."""
    words, others = run_workers(resumed_from_another_run, 2, tmp_path)
    assert words == others
    assert "All ranks must have the same save, got rank 0 on " in words
    assert "Delete the later ones, and resume from the newest that all machines have (docs/checkpoints.md)." in words


def resumed_at_different_steps(folder):
    """One step further on machine 0; then not at all on machine 1."""
    mine, config = own_disk(folder)
    train(mine / "run", config)
    said = []
    for case, step in (("later", MIDDLE + (dist.get_rank() == 0)), ("gone", 0 if dist.get_rank() else MIDDLE)):
        if step:
            shutil.copytree(mine / "run" / f"checkpoint-{step}", mine / case / f"checkpoint-{step}")
        with pytest.raises(ValueError, match="ranks differ at the start") as error:
            train(mine / case, config, resume=bool(step))
        said.append(str(error.value))
    return said


def test_a_resume_at_different_steps_is_told_before_learning_rates(tmp_path):
    """Machine 1 was killed before it sealed step 6, or its disk was replaced; the learning rate falls linearly."""
    said, others = run_workers(resumed_at_different_steps, 2, tmp_path)
    assert said == others
    later, gone = said
    assert f" begins from a checkpoint of step {MIDDLE + 1}, rank 1 on " in later
    assert f" from a checkpoint of step {MIDDLE}. Load the same checkpoint on every rank" in later
    assert f" begins from a checkpoint of step {MIDDLE}, rank 1 on " in gone
    assert " fresh. Load the same checkpoint on every rank: each one takes up a part of its own." in gone


def cards_of_a_machine(folder):
    """Rank 0 on a machine of its own, two more on another, each told LOCAL_RANK=0."""
    _, config = own_disk(folder)
    mine = folder / f"machine-{min(dist.get_rank(), 1)}"
    known, seal = {}, trainer_checkpoints.seal_snapshot

    def record(folder, outer_loop, digests):
        seal(folder, outer_loop, digests)
        known[folder.name] = digests.keys() == contents(folder).keys() - {"slowmo/manifest.json", LOCK}

    trainer_checkpoints.seal_snapshot = record
    first = train(mine / "run", config)
    dist.barrier()
    verify_checkpoint(mine / "run" / f"checkpoint-{MIDDLE}")
    resumed = train(mine / "run", config, resume=str(mine / "run" / f"checkpoint-{MIDDLE}"))
    same_end(first, resumed, STEPS - MIDDLE)
    return known


def test_who_writes_is_by_what_each_process_sees(tmp_path):
    """
    Two processes wrote each other's temporary files. Each machine has read all of its files before any is sealed:
    then manifests come at nearly one time, and a kill leaves machines with the same newest save.
    """
    alone, first, second = run_workers(cards_of_a_machine, 3, tmp_path)
    assert alone == first == {f"checkpoint-{step}": True for step in range(1, STEPS + 1)}
    assert second == {}, "it seals nothing"


def one_cannot_seal(folder):
    mine, config = own_disk(folder)
    seal = trainer_checkpoints.seal_snapshot

    def fails_on_one(folder, outer_loop, *others):
        if dist.get_rank() == 1 and outer_loop.attempted_steps > MIDDLE:
            raise OSError(28, "No space left on device")
        seal(folder, outer_loop, *others)

    trainer_checkpoints.seal_snapshot = fails_on_one
    with pytest.raises(CheckpointError, match=r"rank 1 on .* No space left"):
        train(mine, config, save_total_limit=1)
    return whole(mine)


def test_old_checkpoints_go_when_every_machine_has_sealed(tmp_path):
    """With `save_total_limit=1` the last checkpoint that all have stays until there is another one."""
    ours, theirs = run_workers(one_cannot_seal, 2, tmp_path)
    assert f"checkpoint-{MIDDLE}" in ours & theirs


def accelerate_on_own_disks(folder):
    mine, _ = own_disk(folder)
    first = prepared()
    train_on(*first, range(5))
    project = first[0].project_configuration
    first[0].save_state(str(mine))
    assert project.save_on_each_node is False
    verify_checkpoint(mine)
    in_one_go = train_on(*first, range(5, 10))
    again = prepared()
    again[0].load_state(str(mine))
    return in_one_go, train_on(*again, range(5, 10)), {path.name for path in mine.iterdir()}


def test_accelerate_saves_a_whole_state_on_every_machine(tmp_path):
    """Of two machines without a shared disk the second one had our part alone, sealed, and no model."""
    for in_one_go, resumed, names in run_workers(accelerate_on_own_disks, 2, tmp_path):
        assert torch.equal(in_one_go, resumed)
        assert {"model.safetensors", "optimizer.bin", "slowmo"} <= names


def accelerate_with_a_limit(folder, own_disks, limit):
    """The checkpoints that are left, and those that are whole: after each save, and after one that has failed."""
    mine = own_disk(folder)[0] if own_disks else folder
    run = prepared()
    project = run[0].project_configuration
    project.set_directories(str(mine))
    project.automatic_checkpoint_naming, project.total_limit = True, limit
    left = []
    for save in range(4):
        train_on(*run, range(3 * save, 3 * save + 3))
        if save == 3:
            run[0].register_save_state_pre_hook(fill_the_disk)
        try:
            run[0].save_state()
        except OSError:
            assert save == 3
        dist.barrier()
        paths = sorted((mine / "checkpoints").iterdir())
        left.append([path.name[-1] for path in paths if (path / "slowmo/manifest.json").exists()])
        assert project.total_limit == limit
        dist.barrier()
    return left


def fill_the_disk(*given):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("own_disks", [False, True])
@pytest.mark.parametrize(("limit", "left"), [(1, ["0", "1", "2", "2"]), (2, ["0", "01", "12", "12"])])
def test_accelerates_limit_holds_on_every_machine_and_keeps_the_last_whole_one(tmp_path, own_disks, limit, left):
    """It deleted on machine 0 alone, and before the new one was begun: with a limit of 1 a full disk lost all."""
    for found in run_workers(accelerate_with_a_limit, 2, tmp_path, own_disks, limit):
        assert ["".join(names) for names in found] == left


def goes_on_alone(folder, resume):
    mine, config = (folder, SlowMoConfig(sync_every=4, timeout_seconds=patience(20)))
    found = train(mine, config, resume=str(resume), save_steps=3)
    return found["said"], len(found["after"])


def trained_on_own_disks(folder):
    mine, config = own_disk(folder)
    train(mine, config)


def test_a_lost_disk_is_replaced_by_a_save_of_machine_0_alone(tmp_path):
    """The way out of docs/checkpoints.md: another number of workers starts from the average."""
    run_workers(trained_on_own_disks, 2, tmp_path)
    kept = tmp_path / f"machine-0/checkpoint-{MIDDLE}"
    ((said, steps),) = run_workers(goes_on_alone, 1, tmp_path / "alone", kept)
    assert any("resumed with 1 workers in place of 2" in line for line in said)
    assert steps == STEPS - MIDDLE
    for said, steps in run_workers(goes_on_alone, 2, tmp_path / "again", tmp_path / "alone/checkpoint-6"):
        assert any("resumed with 2 workers in place of 1" in line for line in said)
        assert steps == STEPS - 6


def folder_that_one_cannot_make(folder):
    mine, config = own_disk(folder)
    if dist.get_rank():
        folder.mkdir(exist_ok=True)
        mine.write_text("a file")
    with pytest.raises(CheckpointError, match=r"rank 1 on .*FileExistsError") as error:
        train(mine, config)
    return str(error.value).partition(" ")[2], sorted(path.name for path in mine.glob(".*"))


def test_a_folder_that_one_rank_cannot_make_is_told_and_left_clean(tmp_path):
    (words, left), (others, _) = run_workers(folder_that_one_cannot_make, 2, tmp_path)
    assert words == others
    assert left == []


# ---- a full disk ----


def no_room_for_a_lock(folder):
    class Full(trainer_checkpoints.Claim):
        def __init__(self, checkpoint, patience_seconds):
            self._descriptor = None
            raise OSError(28, "No space left on device")

    trainer_checkpoints.Claim = Full  # rank 0 alone takes it
    config = SlowMoConfig(sync_every=4, shard_slow_state=True, timeout_seconds=patience(60))
    with pytest.raises(CheckpointError) as error:
        train(folder, config)
    return str(error.value)


@pytest.mark.timeout(50)
def test_a_full_disk_of_rank_0_is_told_at_once_with_a_sharded_slow_state(tmp_path):
    """The others would be on their way to bring the slow state together, and wait for rank 0."""
    words, others = run_workers(no_room_for_a_lock, 2, tmp_path)
    assert words == others
    assert "rank 0 on " in words
    assert "No space left on device" in words


# ---- what lay there before ----


def saved_over_an_older_one(folder):
    stale = folder / f"checkpoint-{MIDDLE}" / "slowmo"

    def leave():
        (stale / "optimizer_1").mkdir()
        for name in ("shared_shard_0.json", "worker_7.pt", "worker_0_shard_1.pt", "optimizer_1/shared.json"):
            (stale / name).write_text("{}")

    train(folder)
    rank0(leave)
    train(folder)  # from the beginning, to the same steps
    dist.barrier()
    assert whole(folder) == checkpoints(folder)
    verify_checkpoint(stale.parent)
    train(folder / "again", resume=str(stale.parent))
    return sorted(str(path.relative_to(stale)) for path in stale.rglob("*"))


def test_files_of_an_older_save_are_not_sealed_with_the_new_one(tmp_path):
    """Of a run with other workers, whose folder of the same step is written over."""
    ours, theirs = run_workers(saved_over_an_older_one, 2, tmp_path)
    assert ours == theirs
    assert {"shared.json", "worker_0.json", "worker_1.json", "manifest.json"} <= set(ours)
    assert not {"shared_shard_0.json", "worker_7.pt", "worker_0_shard_1.pt", "optimizer_1"} & set(ours)


def prepared():
    accelerator, model, optimizer = linear()
    return accelerator, *accelerator.prepare(model, optimizer)


def saved_among_other_files(folder):
    """Into a folder with logs and earlier states, twice; logs grow in it and later, an earlier state is deleted."""
    first = prepared()
    log = Path(folder) / "logs" / "events.out"

    def leave(text):
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(log.read_text() + text if log.exists() else text)

    rank0(lambda: leave("begun"))
    train_on(*first, range(2))
    first[0].save_state(f"{folder}/epoch_0")
    train_on(*first, range(2, 4))
    first[0].save_state(str(folder))
    train_on(*first, range(4, 6))
    hook = first[0].register_save_state_pre_hook(lambda *of_save: leave("saving") if dist.get_rank() == 0 else None)
    first[0].save_state(str(folder))
    hook.remove()
    in_one_go = train_on(*first, range(6, 11))
    rank0(lambda: leave("ended"))
    rank0(lambda: shutil.rmtree(f"{folder}/epoch_0"))
    verify_checkpoint(folder)
    again = prepared()
    again[0].load_state(str(folder))
    return in_one_go, train_on(*again, range(6, 11))


def test_what_lay_in_the_folder_before_is_no_part_of_a_state(tmp_path):
    """Stock Accelerate loads such a folder. What the save has written is checked as before."""
    for in_one_go, resumed in run_workers(saved_among_other_files, 2, tmp_path):
        assert torch.equal(in_one_go, resumed)
    model = tmp_path / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not what was written"):
        verify_checkpoint(tmp_path)


# ---- two optimizers ----


def workers_of_two_sizes(folder, order):
    """Four processes: one optimizer's workers are processes, the other's are pairs of them."""
    configs = {
        "alone": settings(sync_every=4, processes_per_worker=1),
        "pairs": settings(sync_every=4, processes_per_worker=2),
    }
    ends = []
    for resumed in (False, True):
        accelerator = Accelerator(cpu=True)
        torch.manual_seed(0)
        models = [torch.nn.Linear(4, 1) for _ in order]
        made = [
            SlowMoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), configs[name])
            for name, model in zip(order, models, strict=True)
        ]
        prepared = accelerator.prepare(*models, *made)
        models, optimizers = prepared[:2], prepared[2:]
        if resumed:
            accelerator.load_state(str(folder))
        for step in range(5 if resumed else 0, 9):
            if step == 5 and not resumed:
                accelerator.save_state(str(folder))
            for model, optimizer in zip(models, optimizers, strict=True):
                torch.manual_seed(100 * step + accelerator.process_index)
                accelerator.backward(model(torch.randn(8, 4)).square().mean())
                optimizer.step()
                optimizer.zero_grad()
        ends.append([weights(model) for model in models])
    return ends


@pytest.mark.parametrize("order", [("alone", "pairs"), ("pairs", "alone")])
def test_optimizers_whose_workers_differ_in_size_are_saved_whole(tmp_path, order):
    for in_one_go, resumed in run_workers(workers_of_two_sizes, 4, tmp_path, order):
        for mine, other in zip(in_one_go, resumed, strict=True):
            assert torch.equal(mine, other)


def test_a_file_that_is_written_anew_is_sealed_and_a_log_that_grows_is_not(tmp_path):
    """Each is written in place, so it has one inode: another head, another tail, or more at the end."""
    (tmp_path / "slowmo").mkdir()
    for name, was in {"log": b"a" * 9000, "longer": b"h" * 5000 + b"old", "head": b"old" + b"t" * 5000}.items():
        (tmp_path / name).write_bytes(was)
        os.utime(tmp_path / name, ns=(1, 1))
    before = stamps(tmp_path)
    with (tmp_path / "log").open("ab") as log:
        log.write(b"more")
    (tmp_path / "longer").write_bytes(b"h" * 5000 + b"new, and longer")
    (tmp_path / "head").write_bytes(b"new" + b"t" * 5000)
    assert set(file_digests(tmp_path, before=before)) == {"longer", "head"}


def test_the_oldest_goes_by_number(tmp_path):
    for number in (9, 10, 11):
        (tmp_path / f"checkpoint_{number}").mkdir()
    _rotate(tmp_path / "checkpoint_11", 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint_10", "checkpoint_11"]


def digests_of_slow_files(folder):
    rank, found, world = dist.get_rank(), {}, Communicator(patience(30), torch.device("cpu"))
    loop = SimpleNamespace(workers=SimpleNamespace(world=world, index=rank, place=0, size=1))
    (folder / "slowmo").mkdir(exist_ok=True)
    if rank:
        time.sleep(1.0)
        (folder / "optimizer.bin").write_text("late")
        (folder / "model.bin").write_text("late too")
    finish_together(loop, folder, Keeping(rank, (0, 1), True), found.update)
    return set(found)


def test_who_seals_waits_for_who_writes(tmp_path):
    assert run_workers(digests_of_slow_files, 2, tmp_path) == [{"optimizer.bin", "model.bin"}] * 2


class Unmounted(TrainerCallback):
    """Behind a step the shared folder of one rank is another one."""

    def __init__(self, mount, step):
        self.mount, self.step = mount, step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.mount.unlink()
            self.mount.mkdir()


def saved_over_a_lost_mount(folder):
    rank = dist.get_rank()
    mount, other = folder / f"mount_{rank}", folder / "a mount of nobody"
    (folder / "shared").mkdir(exist_ok=True)
    mount.symlink_to(folder / "shared")
    if not rank:
        other.touch()
    config = SlowMoConfig(sync_every=4, timeout_seconds=patience(20))
    lost = Unmounted(mount if rank else other, MIDDLE)
    with pytest.raises(CheckpointError) as caught:
        train(mount, config, watchers=[lost], save_steps=2, save_total_limit=1)
    verify_checkpoint(folder / "shared" / "checkpoint-4")
    return str(caught.value), is_whole(folder / "shared" / "checkpoint-6")


def test_a_save_over_a_lost_mount_is_refused_and_the_last_one_stays(tmp_path):
    """Rank 1's part of it is on another disk."""
    (words, is_sealed), (others, _) = run_workers(saved_over_a_lost_mount, 2, tmp_path)
    assert words == others.replace("mount_1", "mount_0", 1)
    missing = tmp_path / "mount_0" / "checkpoint-6" / "slowmo" / "worker_1.json"
    assert "cannot be finished. rank 0 on " in words
    assert f"{missing} is missing here, and rank 1 has written it: it no longer sees the same files." in words
    assert not is_sealed
