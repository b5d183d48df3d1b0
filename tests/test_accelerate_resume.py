"""Loops under Accelerate that are saved in several ways and gone on with in the middle of an epoch."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import accelerate
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, DataLoaderConfiguration
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler, TensorDataset

import slowmo_hf
from accelerate_loops import linear, on_all_ranks, settings, train_on, weights
from harness import run_workers
from slowmo_hf import SlowMoOptimizer
from slowmo_hf.adapters.accelerate_objects import held_beside
from slowmo_hf.training.model_tensors import ModelTensors
from slowmo_hf.training.written import LoadedSettings


def everything(model):
    return torch.cat([t.detach().flatten().double() for t in (*model.parameters(), *model.buffers())])


# ---- resume in the middle of an epoch, as Accelerate teaches it ----


class Stream(IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows[index] for index in range(len(self.rows)))


class Program:
    """A regression with BatchNorm and dropout over 14 batches a rank, two epochs."""

    def __init__(self, config, batches="sampled"):
        accelerate.utils.set_seed(3)
        # Without the sampler stock resumes with another order, too; a stream is cut into ranks' shares.
        loaders = DataLoaderConfiguration(use_seedable_sampler=batches == "sampled", dispatch_batches=False)
        self.accelerator = Accelerator(cpu=True, dataloader_config=loaders)
        torch.manual_seed(7)
        rows = torch.randn(112, 5)
        data = TensorDataset(rows, rows.sum(1, keepdim=True))
        if batches == "stream":
            data = DataLoader(Stream(data), batch_size=4)
        elif batches == "without a size":
            data = DataLoader(data, sampler=BatchSampler(SequentialSampler(data), 4, False), batch_size=None)
        else:
            data = DataLoader(data, batch_size=4, shuffle=True)
        model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))
        optimizer = SlowMoOptimizer(torch.optim.AdamW(model.parameters(), lr=0.02), config)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.2, 60)
        self.model, self.optimizer, self.data, self.scheduler = self.accelerator.prepare(
            model, optimizer, data, scheduler
        )

    def run(self, *, save_at=None, evaluate_before=False, folder=None, resume_at=None):
        """
        Save at `save_at` (epoch, batch), or at the end of an epoch (batch None); go on from there.

        Returns:
            `torch.Tensor`: All weights and buffers of this rank.
        """
        first_epoch, skip = 0, 0
        if resume_at is not None:
            self.accelerator.load_state(folder)
            first_epoch, skip = (resume_at[0], resume_at[1]) if resume_at[1] is not None else (resume_at[0] + 1, 0)
        for epoch in range(first_epoch, 2):
            self.model.train()
            self.data.set_epoch(epoch)
            data = self.accelerator.skip_first_batches(self.data, skip) if skip else self.data
            for number, (rows, labels) in enumerate(data, start=skip + 1):
                loss = nn.functional.mse_loss(self.model(rows), labels)
                self.accelerator.backward(loss)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
                if save_at == (epoch, number):
                    self.save(folder, evaluate_before)
            skip = 0
            if save_at == (epoch, None):
                self.save(folder, evaluate_before)
        return everything(self.model)

    def save(self, folder, evaluate_before):
        if evaluate_before:
            self.model.eval()
            with torch.no_grad():
                self.model(torch.ones(3, 5))
        self.accelerator.save_state(folder)
        self.model.train()


def resume_the_taught_way(folder, point, evaluate_before, fields, batches="sampled"):
    config = settings(sync_every=5, **fields)
    where = f"{folder}/saved"
    through = Program(config, batches).run()
    saved = Program(config, batches).run(save_at=point, evaluate_before=evaluate_before, folder=where)
    assert torch.equal(saved, through), "a save and an evaluation leave a trace"
    dist.barrier()
    resumed = Program(config, batches).run(folder=where, resume_at=point)
    return torch.equal(resumed, through), through


@pytest.mark.parametrize("fields", [{}, {"base": "osgp"}, {"overlap_steps": 2}], ids=["local", "osgp", "overlap"])
@pytest.mark.parametrize("evaluate_before", [False, True], ids=["training", "evaluated"])
@pytest.mark.parametrize("point", [(0, 6), (0, 8), (1, 3), (0, None)], ids=str)
def test_resume_in_the_middle_of_an_epoch_with_dropout(tmp_path, point, evaluate_before, fields):
    """`load_state`, then `skip_first_batches`: bit for bit the run that was never stopped, on every rank."""
    (first, a), (second, b) = run_workers(resume_the_taught_way, 2, str(tmp_path), point, evaluate_before, fields)
    assert first
    assert second
    assert not torch.equal(a, b)


@pytest.mark.parametrize("batches", ["stream", "without a size"])
def test_so_does_one_whose_loader_skips_in_another_way(tmp_path, batches):
    (first, a), (second, b) = run_workers(resume_the_taught_way, 2, str(tmp_path), (0, 6), False, {}, batches)
    assert first
    assert second
    assert not torch.equal(a, b)


def set_the_rate_behind_a_load(folder):
    """With momentum of each worker's own; the rate is cut where a run that goes through cuts it."""
    make = functools.partial(torch.optim.SGD, momentum=0.9)
    accelerator, model, optimizer = linear(make, sync_every=4)
    model, optimizer = accelerator.prepare(model, optimizer)
    train_on(accelerator, model, optimizer, range(6))
    accelerator.save_state(folder)
    ends = []
    for resumes in (False, True):
        if resumes:
            accelerator, model, optimizer = linear(make, sync_every=4)
            model, optimizer = accelerator.prepare(model, optimizer)
            accelerator.load_state(folder)
        optimizer.param_groups[0]["lr"] = 0.01
        ends.append(train_on(accelerator, model, optimizer, range(6, 11)).clone())
    return ends, optimizer.param_groups[0]["lr"], on_all_ranks(ends[0])


def test_a_learning_rate_that_is_set_behind_a_load_stays(tmp_path):
    for (through, resumed), lr, (first, second) in run_workers(set_the_rate_behind_a_load, 2, str(tmp_path)):
        assert torch.equal(through, resumed)
        assert lr == 0.01
        assert not torch.equal(first, second)


def go_on_by_all_reduce(folder):
    """Two steps of each worker's own, then stock training on all of them."""
    accelerator, model, optimizer = linear()
    model, optimizer = accelerator.prepare(model, optimizer)
    train_on(accelerator, model, optimizer, range(2))
    average = sum(on_all_ranks(weights(model))) / 2
    accelerator.save_state(folder)
    accelerator, model, optimizer = linear(base="all_reduce", outer_momentum=0.0)
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.load_state(folder)
    loaded = weights(model).clone()
    return average, loaded, on_all_ranks(train_on(accelerator, model, optimizer, range(2, 4)))


def test_plain_all_reduce_goes_on_from_the_average(tmp_path):
    for average, loaded, (first, second) in run_workers(go_on_by_all_reduce, 2, str(tmp_path)):
        torch.testing.assert_close(loaded, average, rtol=0, atol=1e-7)
        assert torch.equal(first, second)


# ---- a scheduler that each worker drives by its own loss ----


class Count:
    """Its state is no dictionary, which Accelerate takes."""

    def state_dict(self):
        return 3

    def load_state_dict(self, state):
        assert state == 3


def plateaus(folder, config, resume, registered):
    """Rank 1's loss stops to fall: its learning rate is cut, rank 0's is not. Of the last six steps of 12."""
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(7)
    model = nn.Linear(3, 1, dtype=torch.float64)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(inner, factor=0.5, patience=1)
    model, optimizer = accelerator.prepare(model, SlowMoOptimizer(inner, config))
    scheduler = plateau if registered else accelerator.prepare(plateau)
    if registered:
        accelerator.register_for_checkpointing(plateau, Count())
    if resume:
        accelerator.load_state(folder)
    found = []
    for step in range(7 if resume else 1, 13):
        torch.manual_seed(100 * step + accelerator.process_index)
        accelerator.backward(model(torch.randn(4, 3, dtype=torch.float64)).square().mean())
        optimizer.step()
        scheduler.step(1 / step if accelerator.process_index == 0 else 0.01)  # of rank 0 that would be better
        optimizer.zero_grad()
        found.append((everything(model), inner.param_groups[0]["lr"], scheduler.state_dict()["num_bad_epochs"]))
        if step == 6:
            accelerator.save_state(folder)
    return found[-6:]


def plateau_and_resume(folder, sync_every, registered):
    config = settings(sync_every=sync_every)
    through = plateaus(folder, config, False, registered)
    dist.barrier()
    return through, plateaus(folder, config, True, registered)


@pytest.mark.parametrize("sync_every", [4, 6], ids=["inside a round", "at a round"])
def test_a_scheduler_of_each_workers_own_goes_on(tmp_path, sync_every):
    goes_on(run_workers(plateau_and_resume, 2, str(tmp_path), sync_every, False))


def test_what_is_registered_goes_on_as_each_workers_own(tmp_path):
    goes_on(run_workers(plateau_and_resume, 2, str(tmp_path), 4, True))


def goes_on(ranks):
    for through, resumed in ranks:
        for (weights_, *rest), (its, *its_rest) in zip(through, resumed, strict=True):
            assert torch.equal(weights_, its)
            assert rest == its_rest
    assert [lr for _, lr, _ in ranks[0][0]] == [0.1] * 6
    assert ranks[1][0][-1][1] < 0.01


# ---- saves in four ways, with a hook of the user's own ----


def save_in_four_ways(folder):
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model = nn.Linear(4, 2, dtype=torch.float64)
    model, optimizer = accelerator.prepare(
        model, SlowMoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), settings())
    )
    for step in range(6):
        torch.manual_seed(100 * step + accelerator.process_index)
        accelerator.backward(model(torch.randn(8, 4, dtype=torch.float64)).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        if step == 3:
            last_round = weights(model).clone()
    bare = accelerator.unwrap_model(model)
    average = sum(on_all_ranks(weights(model))) / 2

    def own_hook(models, states, output_dir):  # as diffusers' scripts do
        if accelerator.is_main_process:
            torch.save(weights(models[0]), f"{folder}/hook.pt")
        states.clear()

    hook = accelerator.register_save_state_pre_hook(own_hook)
    accelerator.save_state(f"{folder}/hooked")
    hook.remove()
    accelerator.save_state(f"{folder}/state")
    model.eval()
    accelerator.save_model(model, f"{folder}/model")
    if accelerator.is_main_process:
        torch.save(bare.state_dict(), f"{folder}/plain.pt")
        accelerator.save(accelerator.get_state_dict(model), f"{folder}/got.pt")
    with slowmo_hf.consensus(optimizer):
        accelerator.save_model(model, f"{folder}/exact")
    accelerator.wait_for_everyone()
    return last_round, average


def test_what_is_saved_is_known_to_the_last_bit(tmp_path):
    """`save_state` the exact average, also by a user's own hook; after `model.eval()` the last round's model."""
    (last_round, average), (other, _) = run_workers(save_in_four_ways, 2, str(tmp_path))
    assert torch.equal(last_round, other)

    def of(state):
        return torch.cat([state["weight"].flatten(), state["bias"]])

    for name in ("plain.pt", "got.pt"):
        assert torch.equal(of(torch.load(tmp_path / name)), last_round)
    assert torch.equal(of(load_file(tmp_path / "model/model.safetensors")), last_round)
    for found in (
        of(load_file(tmp_path / "exact/model.safetensors")),
        of(load_file(tmp_path / "state/model.safetensors")),
        torch.load(tmp_path / "hook.pt"),
    ):
        torch.testing.assert_close(found, average, rtol=0, atol=1e-12)
        assert not torch.equal(found, last_round)


def pass_before_prepare():
    """All ranks, or rank 0 alone, look at the model's output before they prepare it."""
    apart = []
    for alone in (False, True):
        accelerator = Accelerator(cpu=True)
        torch.manual_seed(0)
        model = nn.Linear(4, 1)
        optimizer = SlowMoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), settings(sync_every=50))
        if not alone or accelerator.is_main_process:
            model(torch.zeros(2, 4))
        model, optimizer = accelerator.prepare(model, optimizer)
        for step in range(3):
            torch.manual_seed(100 * step + accelerator.process_index)
            accelerator.backward(model(torch.randn(8, 4)).square().mean())
            optimizer.step()
            optimizer.zero_grad()
        apart.append(not torch.equal(*on_all_ranks(weights(model))))
    return apart


def test_a_pass_before_prepare_does_not_hide_the_wrapper():
    assert run_workers(pass_before_prepare, 2) == [[True, True]] * 2


def look_before_prepare(steps):
    """One process, such as a program is tried in: a look at the output's shape, then another dtype, then training."""
    trained = []
    for ours in (False, True):
        accelerator, model, optimizer = linear(ours=ours, sync_every=50)
        model(torch.zeros(2, 4))
        model.double()  # as a move to another device is: the parameters are others than those that were looked at
        trained.append(train_on(accelerator, *accelerator.prepare(model, optimizer), range(steps)))
    return trained


def test_a_look_before_prepare_does_not_start_training_in_one_process():
    ((plain, ours),) = run_workers(look_before_prepare, 1, 5)
    assert torch.equal(plain, ours)


def never_prepared():
    """One process: an Accelerator that prepares nothing. Two rounds of 2 steps, and Lookahead by its formula."""
    _, *ours, steps = *linear(sync_every=2, outer_lr=0.5, outer_momentum=0.0), range(4)
    accelerator, model, plain = linear(ours=False)
    for first in (0, 2):
        anchor = weights(model)
        nearer = anchor + 0.5 * (train_on(accelerator, model, plain, steps[first : first + 2]) - anchor)
        nn.utils.vector_to_parameters(nearer, model.parameters())
    return weights(model), train_on(accelerator, *ours, steps)


def test_an_optimizer_that_is_never_prepared_has_its_rounds_in_one_process():
    ((formula, ours),) = run_workers(never_prepared, 1)
    assert torch.allclose(ours, formula, rtol=0, atol=1e-7)


def registered(folder, at_once):
    """Neither model nor optimizer is prepared: each process trains its own; saved inside a round, and gone on with."""

    def make():
        made = accelerator, model, optimizer = linear(torch.optim.Adam)
        slowmo_hf.register_for_checkpointing(accelerator, optimizer)
        accelerator.register_for_checkpointing(model)
        return made

    first = make()
    train_on(*first, range(6))
    first[0].save_state(folder)
    in_one_go = train_on(*first, range(6, 11))
    again = make()
    again[0].load_state(folder)
    if at_once:
        again[0].save_state(f"{folder}-again")
        again = make()
        again[0].load_state(f"{folder}-again")
    return in_one_go, train_on(*again, range(6, 11))


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("processes", [1, 2])
def test_what_accelerate_did_not_prepare_is_gone_on_with(tmp_path, processes, at_once):
    """
    From the first pass on: its gradient is that of the worker's own weights, not of the average. `at_once`: what is
    loaded is saved again before it.
    """
    for in_one_go, resumed in run_workers(registered, processes, str(tmp_path / "saved"), at_once):
        assert torch.equal(in_one_go, resumed)


class Counts:
    """Its state is its own dictionary."""

    def __init__(self):
        self.state = {"n": 0, "own": 0}

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = dict(state)


def test_what_a_program_writes_in_place_after_a_load_stays():
    counts = Counts()
    accelerator = SimpleNamespace(scaler=None, _optimizers=[], _schedulers=[], _custom_objects=[counts], _models=[])
    model = nn.Linear(1, 1)
    inner = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.1), momentum=0.5)
    (group,) = inner.param_groups
    loaded = LoadedSettings([inner], held_beside(accelerator))
    group["lr"].fill_(0.01)
    group["nesterov"] = True
    counts.state["n"] = 5
    give_back = loaded.changes(inner, ModelTensors(inner, model))
    group.update(lr=torch.tensor(0.2), nesterov=False)  # this worker's own, as they were saved
    give_back({"registered.0": {"n": 1, "own": 7}})
    assert group["lr"] == 0.01
    assert group["nesterov"] is True
    assert counts.state == {"n": 5, "own": 7}
