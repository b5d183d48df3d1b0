"""Ranks with unequal data in custom loops (`slowmo_hf.join`) and under gossip; looks on one rank alone."""

from __future__ import annotations

import contextlib
import tempfile

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from transformers import Trainer, TrainerCallback

import slowmo_hf
from apart import HOST, TIMEOUT_SECONDS
from faulty import BATCHES, LR, OnePass, eight_steps
from harness import patience, run_workers
from slowmo_hf import SlowMoCallback, SlowMoConfig, SlowMoOptimizer
from tiny import Regression, Rows, arguments, error_of, values


def _joined(config, momentum):
    """Quadratic per worker; the model is one number, so the round is done by hand below."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    model = torch.nn.Linear(1, 1, bias=False).double()
    torch.nn.init.constant_(model.weight, 8.0)
    optimizer = SlowMoOptimizer(torch.optim.SGD(model.parameters(), lr=LR), config)
    seen = []
    with slowmo_hf.join(optimizer):
        for _batch in range(BATCHES[rank]):
            ((model(torch.ones(1, 1).double()) - rank) ** 2 / 2).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append(model.weight.item())
    local = model.weight.item()
    with slowmo_hf.consensus(optimizer):
        shown = model.weight.item()
    return seen, local, shown, optimizer.outer_loop.attempted_steps


def _by_hand(sync_every, beta):
    """
    All workers in one process: rounds at multiples of sync_every, weighted by local steps; the end is the weighted
    average.
    """
    x, anchor, velocity, counts = {0: 8.0, 1: 8.0}, 8.0, 0.0, {0: 0, 1: 0}
    for step in range(1, 7):
        for rank in (0, 1):
            if step <= BATCHES[rank]:
                x[rank] -= LR * (x[rank] - rank)
                counts[rank] += 1
        if step % sync_every == 0:
            total = sum(counts.values())
            velocity = beta * velocity + sum(counts[rank] * (anchor - x[rank]) for rank in x) / total
            anchor -= velocity
            x, counts = {0: anchor, 1: anchor}, {0: 0, 1: 0}
    total = sum(counts.values())
    average = sum(counts[rank] * x[rank] for rank in x) / total if total else anchor
    return x, average


@pytest.mark.parametrize("sync_every", [2, 3, 4, 5, 7])
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_join_weighs_workers_by_their_local_steps(sync_every, beta):
    config = SlowMoConfig(sync_every=sync_every, outer_momentum=beta, timeout_seconds=patience(20))
    results = run_workers(_joined, 2, config, 0.0)
    x, average = _by_hand(sync_every, beta)
    for rank, (seen, local, shown, clock) in enumerate(results):
        assert len(seen) == BATCHES[rank]
        assert clock == 6
        assert local == pytest.approx(x[rank], abs=1e-12)
        assert shown == pytest.approx(average, abs=1e-12)


def _no_data_at_all(config):
    rank = dist.get_rank()
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = Regression(torch.float32)
    model, optimizer = accelerator.prepare(model, SlowMoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), config))
    rows = Rows(4, torch.float32)
    with slowmo_hf.join(optimizer):
        for _ in range(4 if rank == 0 else 0):
            accelerator.backward(model(rows.x, rows.y)["loss"])
            optimizer.step()
            optimizer.zero_grad()
    return values(accelerator.unwrap_model(model))


def test_join_with_a_worker_that_has_no_data():
    first, second = run_workers(_no_data_at_all, 2, SlowMoConfig.local_sgd(2, timeout_seconds=patience(20)))
    alone = Regression(torch.float32)
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
    rows = Rows(4, torch.float32)
    for _ in range(4):
        alone(rows.x, rows.y)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, value in values(alone).items():
        torch.testing.assert_close(first[name], value, rtol=1e-6, atol=1e-7)
        assert torch.equal(first[name], second[name])


@pytest.mark.parametrize("base", ["sgp", "osgp", "dpsgd", "all_reduce"])
def test_join_refuses_bases_that_exchange_at_every_step(base):
    optimizer = SlowMoOptimizer(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1), SlowMoConfig(base=base))
    with pytest.raises(ValueError, match=f"join needs base='local_sgd', got '{base}'"), slowmo_hf.join(optimizer):
        pass


def _different_looks(rank):
    for step, _, optimizer in eight_steps():
        if rank == 1 and step == 6:
            with slowmo_hf.consensus(optimizer):
                pass


@pytest.mark.slow
@pytest.mark.apart(_different_looks, survivors=(0, 1))
def test_a_look_on_one_rank_alone_is_told_on_both(apart):
    (first, second), seconds = apart
    places = f"rank 0 on {HOST} at step 8, the round; rank 1 on {HOST} at step 6, a view of the average"
    assert first == second
    assert first.startswith(f"RuntimeError: ranks met at different places: {places}"), first
    assert seconds < TIMEOUT_SECONDS


def _saves(rank, at):
    """By the main process alone, as some do with stock DDP."""
    accelerator = Accelerator(cpu=True)
    folder = tempfile.mkdtemp()
    for step, _, optimizer in eight_steps():
        slowmo_hf.register_for_checkpointing(accelerator, optimizer)
        if rank == 0 and step == at:
            accelerator.save_state(folder)


def _saves_inside_a_round(rank):
    _saves(rank, at=6)


def _saves_at_a_round(rank):
    """Where there is nothing to average."""
    _saves(rank, at=4)


def _told_of_a_save(apart, step):
    (first, second), seconds = apart
    places = f"rank 0 on {HOST} at step {step}, a view of the average; rank 1 on {HOST} at step 8, the round"
    assert first == second
    assert first.startswith(f"RuntimeError: ranks met at different places: {places}"), first
    assert seconds < TIMEOUT_SECONDS


@pytest.mark.slow
@pytest.mark.apart(_saves_inside_a_round, survivors=(0, 1))
def test_a_save_on_one_rank_alone_is_told_on_both(apart):
    _told_of_a_save(apart, 6)


@pytest.mark.slow
@pytest.mark.apart(_saves_at_a_round, survivors=(0, 1))
def test_so_is_one_at_a_round(apart):
    _told_of_a_save(apart, 4)


def _loads_on_one(folder):
    """What `load_state` by the main process alone says, or a state dictionary of its own."""
    accelerator, model = Accelerator(cpu=True), Regression(torch.float32)

    def optimizer_of(model):
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        return SlowMoOptimizer(inner, SlowMoConfig(sync_every=1, timeout_seconds=TIMEOUT_SECONDS))

    def step(model, optimizer):
        rows = Rows(4, torch.float32)
        model(rows.x, rows.y)["loss"].backward()
        optimizer.step()

    model, optimizer = accelerator.prepare(model, optimizer_of(model))
    step(model, optimizer)
    accelerator.save_state(folder)
    state, errors = optimizer.state_dict(), []
    for of_accelerate in (True, False):
        accelerator = Accelerator(cpu=True)
        model = Regression(torch.float32)
        model, optimizer = accelerator.prepare(model, optimizer_of(model))
        if dist.get_rank() == 0 and of_accelerate:
            accelerator.load_state(folder)
        elif dist.get_rank() == 0:
            optimizer.load_state_dict(state)
        errors.append(error_of(step, model, optimizer))
    return errors


def test_a_checkpoint_that_one_rank_loads_is_told_on_both_at_the_start(tmp_path):
    first, second = run_workers(_loads_on_one, 2, str(tmp_path))
    assert first == second
    for error in first:
        assert "rank 0 on" in error
        assert " begins from a checkpoint, rank 1 on " in error
        assert " fresh. Load the same checkpoint on every rank: each one takes up a part of its own." in error


class ManyPasses(OnePass):
    """A stream sharded by hand that can be read again."""

    def __init__(self):
        super().__init__()
        self.rows = list(self.rows)


def _evaluate_after_each_pass(rank):
    trainer = Trainer(
        model=Regression(torch.float32),
        args=arguments(
            tempfile.mkdtemp(),
            max_steps=12,
            learning_rate=0.05,
            eval_strategy="epoch",
            accelerator_config={"dispatch_batches": False},
        ),
        train_dataset=ManyPasses(),
        eval_dataset=Rows(8, torch.float32),
        callbacks=[SlowMoCallback(SlowMoConfig.local_sgd(4, timeout_seconds=TIMEOUT_SECONDS))],
    )
    trainer.train()


@pytest.mark.slow
@pytest.mark.apart(_evaluate_after_each_pass, survivors=(0, 1))
def test_passes_of_other_lengths_that_end_in_evaluations_are_told_on_both(apart):
    """Rank 1's pass ends at step 4, in a round that both did; nobody evaluates there while the other trains on."""
    (first, second), seconds = apart
    places = (
        f"rank 0 on {HOST} at step 6, a log, an evaluation or a save; rank 1 on {HOST} at step 4, a log, an "
        "evaluation or a save"
    )
    assert first == second
    assert first.startswith(f"RuntimeError: ranks met at different places: {places}"), first
    assert seconds < TIMEOUT_SECONDS + patience(13)


class Slope(torch.nn.Module):
    """Its gradient is 1 everywhere: the parameter tells how many steps were taken."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3))

    def forward(self, x, labels=None, **kwargs):
        return {"loss": self.weight.sum() + 0 * x.sum()}


class Ends(TrainerCallback):
    """Ends each rank's training at a step of its own."""

    def __init__(self, steps):
        self.step = steps[dist.get_rank()]

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_training_stop = True


def _gossip_that_ends(ends, settings, flags):
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=Slope(),
            args=arguments(
                folder,
                max_steps=12,
                learning_rate=1.0,
                lr_scheduler_type="constant",
                optim="sgd",
                max_grad_norm=0.0,
                **flags,
            ),
            train_dataset=Rows(rows := 24 * len(ends), torch.float32),  # 6 steps a pass
            eval_dataset=Rows(rows, torch.float32),
            callbacks=[
                Ends(ends),
                SlowMoCallback(
                    SlowMoConfig(sync_every=8, outer_momentum=0.0, timeout_seconds=patience(20), **settings)
                ),
            ],
        )
        trainer.train()
    weight = trainer.accelerator.unwrap_model(trainer.model).weight
    return trainer.state.global_step, (-weight).tolist()


ENDS = {
    "one rank": ((None, 5), 8, {}),
    "one rank, before a log": ((None, 5), 6, {"logging_strategy": "steps", "logging_steps": 6}),
    "one rank, at a round": ((None, 8), 12, {}),
    "one rank, at the end of a pass": ((None, 6), 6, {"eval_strategy": "epoch"}),
    "one rank, before the end of a pass": ((None, 5), 6, {"logging_strategy": "epoch"}),
    "all at a round": ((8, 8), 8, {}),
    "all at one step": ((5, 5), 5, {}),
    "all at steps of their own": ((6, 5), 6, {}),
    "two of three": ((None, 5, 6), 8, {}),
}
GOSSIP = {
    "sgp": {"base": "sgp"},
    "osgp": {"base": "osgp"},
    "dpsgd": {"base": "dpsgd"},
    "no average": {"base": "sgp", "exact_average": False},
}


@pytest.mark.parametrize("case", ENDS)
@pytest.mark.parametrize("base", GOSSIP)
def test_gossip_ranks_that_end_between_rounds_pass_messages_on_until_all_stop(case, base):
    """
    With slope 1 the average is the mean number of steps: a rank that has ended keeps its share, and takes no step.
    """
    ends, last, flags = ENDS[case]
    for step, weight in run_workers(_gossip_that_ends, len(ends), ends, GOSSIP[base], flags):
        assert step == last
        assert weight == pytest.approx([sum(end or last for end in ends) / len(ends)] * 3, rel=1e-6)


def _epochs_of_a_shuffled_loader():
    """Five batches an epoch on rank 0, four on rank 1; accelerate's plain sampler and its seedable one."""
    ends = []
    for around_all in (False, True):
        accelerator = Accelerator(
            cpu=True,
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=around_all, even_batches=False),
        )
        torch.manual_seed(0)
        rows = torch.utils.data.TensorDataset(torch.randn(18, 4))
        model = torch.nn.Linear(4, 1)
        config = SlowMoConfig(sync_every=2, timeout_seconds=patience(20))
        optimizer = SlowMoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), config)
        loader = torch.utils.data.DataLoader(rows, batch_size=2, shuffle=True)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        seen = []
        with slowmo_hf.join(optimizer) if around_all else contextlib.nullcontext():
            for _ in range(3):
                with contextlib.nullcontext() if around_all else slowmo_hf.join(optimizer):
                    for (batch,) in loader:
                        accelerator.backward(model(batch).square().mean())
                        optimizer.step()
                        optimizer.zero_grad()
                        seen += batch[:, 0].tolist()
        slowmo_hf.finish(optimizer)
        ends.append((seen, optimizer.optimizer.outer_loop.attempted_steps, model.module.weight.detach().clone()))
    return ends


def test_a_join_for_each_epoch_or_a_seedable_sampler():
    """As docs/quickstart_accelerate.md says; a plain sampler sends at each epoch's start. Each epoch has each row."""
    for mine, theirs in zip(*run_workers(_epochs_of_a_shuffled_loader, 2), strict=True):
        assert (len(mine[0]), len(theirs[0])) == (30, 24)
        assert mine[1] == theirs[1] == 15
        assert torch.equal(mine[2], theirs[2])
        for epoch in range(3):
            assert len({*mine[0][10 * epoch : 10 * epoch + 10], *theirs[0][8 * epoch : 8 * epoch + 8]}) == 18
