"""Several runs in one process, as in a sweep or a notebook: what one leaves behind does not reach the next."""

from __future__ import annotations

import gc
import threading
import time
from functools import partial

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.nn.modules import module as torch_modules

import slowmo_hf
from harness import patience, run_workers
from slowmo_hf import SlowMoConfig, SlowMoOptimizer, run_in_process
from slowmo_hf.training.slow_state import SlowState
from slowmo_hf.wire import roll_call
from tiny import Regression, Rows, equal, error_of, values

CONFIG = SlowMoConfig(sync_every=4, timeout_seconds=patience(20))


def begin(rank, **settings):
    """A model of one weight that each worker pulls elsewhere, in a module that `model.eval()` and DDP know."""
    model = torch.nn.Linear(1, 1, bias=False).double()
    torch.nn.init.constant_(model.weight, 1.0)
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=settings.pop("momentum", 0.0))
    optimizer = SlowMoOptimizer(inner, SlowMoConfig(**{"sync_every": 4, "timeout_seconds": patience(20), **settings}))

    def step():
        ((model(torch.ones(1, 1).double()) + 1 + rank) ** 2 / 2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, optimizer, step


def test_each_run_of_a_sweep_ends_on_the_average():
    """A state is loaded, six steps follow, and `finish`; twice, and both ends are the same step's average."""

    def work(rank):
        model, optimizer, step = begin(rank, base="local_sgd")
        for _ in range(4):
            step()
        state = optimizer.state_dict()
        ends = []
        for _ in range(2):
            optimizer.load_state_dict(state)
            for _ in range(2):
                step()
            local = model.weight.item()
            slowmo_hf.finish(optimizer)
            ends.append((local, model.weight.item()))
        return ends

    first, second = run_in_process(work, 2)
    for (local, end), (other, its_end) in zip(first, second, strict=True):
        assert local != other
        assert end == its_end == pytest.approx((local + other) / 2, abs=1e-15)
    assert first[0] == first[1]


def test_a_load_of_what_is_there_goes_on_from_the_end():
    """Behind `finish` nothing is over any more once another state is taken up: `model.eval()` shows the last round."""

    def work(rank):
        model, optimizer, step = begin(rank)
        for _ in range(4):
            step()
        state = optimizer.state_dict()
        step()
        slowmo_hf.finish(optimizer)
        over = [optimizer.outer_loop.in_flight.is_over]
        optimizer.load_state_dict(state)
        over.append(optimizer.outer_loop.in_flight.is_over)
        step()
        model.eval()
        shown = model.weight.item()
        model.train()
        return over, shown, optimizer.outer_loop.parts.slow.pieces[0].anchor.item()

    for over, shown, anchor in run_in_process(work, 2):
        assert over == [True, False]
        assert shown == anchor


# ---- views of one rank, and what a program loads in them ----


def save_with_one_rank_in_eval(folder):
    """At a round's step rank 0 alone evaluates the last round's model; then all save, and train on."""
    accelerator, rows, model = Accelerator(cpu=True), Rows(16), Regression()
    model, optimizer = accelerator.prepare(model, SlowMoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), CONFIG))
    for step in range(6):
        at = [2 * step + accelerator.process_index]
        accelerator.backward(model(rows.x[at], rows.y[at])["loss"])
        optimizer.step()
        optimizer.zero_grad()
        if step == 3:
            if accelerator.is_main_process:
                model.eval()
            accelerator.save_state(folder)
            model.train()
    slowmo_hf.finish(optimizer)
    return values(accelerator.unwrap_model(model))


def test_a_save_where_one_rank_evaluates_meets_all_ranks(tmp_path):
    first, second = run_workers(save_with_one_rank_in_eval, 2, tmp_path / "state")
    assert equal(first, second)
    slowmo_hf.verify_checkpoint(tmp_path / "state")


def test_weights_loaded_in_eval_stay_also_behind_a_consensus_block():
    """All workers go on from them; without the block as with it."""

    def work(rank, with_block):
        model, optimizer, step = begin(rank)
        for _ in range(6):
            step()
        model.eval()
        if with_block:
            with slowmo_hf.consensus(optimizer):
                pass
        model.load_state_dict({"weight": torch.full((1, 1), 7.0, dtype=torch.float64)})
        model.train()
        return model.weight.item()

    for with_block in (False, True):
        assert run_in_process(partial(work, with_block=with_block), 2) == [7.0, 7.0], with_block


def test_weights_loaded_at_a_step_of_an_earlier_run_do_not_hide_this_ones():
    """The clock comes to step 5 twice; the second time nothing was loaded, and `model.eval()` shows the last round."""

    def work(rank):
        model, optimizer, step = begin(rank)
        for _ in range(4):
            step()
        state = optimizer.state_dict()
        step()
        model.load_state_dict({"weight": torch.full((1, 1), 7.0, dtype=torch.float64)})
        model.eval()
        loaded = model.weight.item()
        model.train()
        optimizer.load_state_dict(state)
        step()
        model.eval()
        return loaded, model.weight.item(), optimizer.outer_loop.parts.slow.pieces[0].anchor.item()

    for loaded, shown, anchor in run_in_process(work, 2):
        assert loaded == 7.0
        assert shown == anchor


def test_an_optimizer_state_loaded_in_a_view_stays():
    """Before the first step it is empty, and the end of a view empties what a save has made up; not this."""

    def work(rank):
        model, optimizer, step = begin(rank, momentum=0.9, inner_state="maintain")
        step()
        optimizer.inner_optimizer.state.clear()  # as behind a reset
        model.eval()
        stock = torch.optim.SGD([torch.nn.Parameter(torch.ones(1, 1).double())], lr=0.1, momentum=0.9)
        stock.param_groups[0]["params"][0].grad = torch.full((1, 1), 5.0, dtype=torch.float64)
        stock.step()
        optimizer.load_state_dict(stock.state_dict())
        model.train()
        return optimizer.inner_optimizer.state[model.weight]["momentum_buffer"].item()

    assert run_in_process(work, 2) == [5.0, 5.0]


# ---- what is left in the process ----


def test_loading_several_checkpoints_leaves_one_listener():
    """Each is awaited by a hook on every forward pass; the step ends the last one's."""

    def work(rank):
        model, optimizer, step = begin(rank)
        step()
        hooks = len(torch_modules._global_forward_pre_hooks)
        taken = []
        for number in range(3):
            optimizer.before_training(lambda loop, number=number: taken.append(number))
            with torch.no_grad():
                model(torch.ones(1, 1).double())
        while_waiting = len(torch_modules._global_forward_pre_hooks)
        step()
        return while_waiting - hooks, len(torch_modules._global_forward_pre_hooks) - hooks, taken

    assert run_in_process(work, 1) == [(1, 0, [2])]


def let_go(refused):
    """Three optimizers that start, step and go, or are refused: how many roll calls and store threads are left."""
    before = len(roll_call._going)
    for _ in range(3):
        settings = {"outer_momentum": 0.1 * dist.get_rank()} if refused else {}
        model, optimizer, step = begin(dist.get_rank(), **settings)
        if refused:
            assert "outer_momentum" in error_of(step)
        else:
            for _ in range(4):
                step()
            slowmo_hf.finish(optimizer)
        del model, optimizer, step
        gc.collect()
    until = time.monotonic() + patience(10)
    while time.monotonic() < until and (
        len(roll_call._going) > before or any("leave" in thread.name for thread in threading.enumerate())
    ):
        time.sleep(0.02)
    dist.barrier()
    return len(roll_call._going) - before, sum("store" in thread.name for thread in threading.enumerate())


@pytest.mark.parametrize("refused", [False, True])
def test_an_optimizer_that_is_let_go_leaves_no_thread(refused):
    assert run_workers(let_go, 2, refused) == [(0, 0), (0, 0)]


def fail_once():
    """Rank 1 cannot make its slow state, all are told; and the next start in the process trains."""
    make = SlowState.__init__

    def too_large(self, *given):
        SlowState.__init__ = make
        if dist.get_rank() == 1:
            raise MemoryError("too large")
        make(self, *given)

    SlowState.__init__ = too_large
    _, _, step = begin(dist.get_rank())
    told = error_of(step)
    model, optimizer, step = begin(dist.get_rank())
    for _ in range(5):
        step()
    slowmo_hf.finish(optimizer)
    return told, model.weight.item()


def test_a_start_that_failed_on_one_rank_leaves_the_next_one_alone():
    (told, end), (told_too, end_too) = run_workers(fail_once, 2)
    assert told == told_too
    assert "MemoryError: too large" in told
    assert end == end_too


# ---- two that share a parameter ----


def test_an_outer_optimizer_without_momentum_may_share_a_parameter():
    """Two with `torch.optim.SGD` outside may; with a momentum there each would take the other's for progress."""

    def second_start(momentum):
        model, optimizer, step = begin(0, outer_optimizer=torch.optim.SGD, outer_optimizer_kwargs=momentum)
        for _ in range(4):
            step()
        other = SlowMoOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1),
            SlowMoConfig(sync_every=4, outer_optimizer=torch.optim.SGD, outer_optimizer_kwargs=momentum),
        )

        def train():
            model(torch.ones(1, 1).double()).sum().backward()
            other.step()

        words = error_of(train)
        assert optimizer.outer_loop.attempted_steps == 4
        return words

    assert run_in_process(lambda rank: second_start(None), 1) == [""]
    (told,) = run_in_process(lambda rank: second_start({"momentum": 0.9}), 1)
    assert "both have slow momentum" in told
    assert "a momentum of 0" in told
