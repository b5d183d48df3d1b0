"""What SlowMoOptimizer saves and takes up again (tests/tracker.py)."""

from __future__ import annotations

import copy

import accelerate
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import SGD, Adam

import slowmo_hf
from harness import patience, run_workers
from slowmo_hf import SlowMoConfig, SlowMoOptimizer
from tiny import error_of
from tracker import START, Tracker, bitwise, mean_over_ranks, prepared, rank, target, tau, train, weights


def check_round_trip(make, config):
    """Eight steps, against four, a save, and four more from the save in a fresh model: equal bit for bit."""

    def new(start=START):
        model = Tracker(start=start)
        return model, SlowMoOptimizer(make(model.parameters()), config)

    model, optimizer = new()
    train(model, optimizer, 3)
    assert "RuntimeError: training cannot be saved inside a round: step 3 is no multiple of" in error_of(
        optimizer.state_dict
    )
    train(model, optimizer, 1, first=3)
    state = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, 4, first=4)

    resumed_model, resumed = new(start=(7.0, 7.0, 7.0))  # the anchors hold the weights
    resumed.load_state_dict(state_dict=copy.deepcopy(state))  # torch's own loading aliases
    again = resumed.state_dict()["slowmo"]  # not started yet, as inside accelerator.prepare
    assert (again["attempted_steps"], again["rounds"]) == (4, 1 if config.sync_every == 4 else 2)
    train(resumed_model, resumed, 4, first=4)
    bitwise(weights(resumed_model), weights(model))
    assert resumed.outer_loop.rounds == optimizer.outer_loop.rounds

    optimizer.load_state_dict(copy.deepcopy(state))  # back in time, in a run that has started
    bitwise(weights(model), state["slowmo"]["anchors"][0])
    train(model, optimizer, 4, first=4)
    bitwise(weights(resumed_model), weights(model))

    state["slowmo"]["attempted_steps"] = 5
    assert "RuntimeError: training cannot be resumed inside a round: step 5" in error_of(
        optimizer.load_state_dict, state
    )
    state["slowmo"]["sync_every"] = 5
    assert "are not in this state. Set sync_every=5, with which it was saved." in error_of(
        optimizer.load_state_dict, state
    )
    state["slowmo"]["sync_every"] = config.sync_every
    state["slowmo"]["attempted_steps"], state["slowmo"]["version"] = 4, 99
    assert "ValueError: slow state has version 99" in error_of(optimizer.load_state_dict, state)


def check_all_round_trips():
    check_round_trip(lambda p: SGD(p, lr=0.1), tau(2))
    check_round_trip(lambda p: SGD(p, lr=0.1, momentum=0.9), tau(4, inner_state="maintain"))
    check_round_trip(lambda p: Adam(p, lr=0.1), tau(2))
    check_round_trip(lambda p: SGD(p, lr=0.1), SlowMoConfig.diloco(sync_every=2, timeout_seconds=patience(20)))


def test_state_dict_round_trip_continues_bitwise():
    run_workers(check_all_round_trips, 2)


def check_goes_on_behind_finish(make, config):
    """Ten steps and `finish`, at no round's end; six more, against six from a saved model and state: equal bits."""
    model = Tracker()
    optimizer = SlowMoOptimizer(make(model.parameters()), config)
    train(model, optimizer, 10)
    inside = error_of(optimizer.state_dict)
    assert inside.startswith("RuntimeError: training cannot be saved ")
    assert "slowmo_hf.finish(optimizer)" in inside
    slowmo_hf.finish(optimizer)
    average = weights(model)
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    train(model, optimizer, 6, first=10)

    resumed_model = Tracker(start=(7.0, 7.0, 7.0))
    resumed = SlowMoOptimizer(make(resumed_model.parameters()), config)
    resumed_model.load_state_dict(saved[0])
    resumed.load_state_dict(copy.deepcopy(saved[1]))
    train(resumed_model, resumed, 6, first=10)
    bitwise(weights(resumed_model), weights(model))
    assert (resumed.outer_loop.rounds, resumed.outer_loop.attempted_steps) == (optimizer.outer_loop.rounds, 16)

    model.load_state_dict(saved[0])  # back in time, in a run that has started
    optimizer.load_state_dict(copy.deepcopy(saved[1]))
    bitwise(weights(model), average)
    train(model, optimizer, 6, first=10)
    bitwise(weights(resumed_model), weights(model))


def check_all_behind_finish():
    check_goes_on_behind_finish(lambda p: SGD(p, lr=0.1), tau(4))
    check_goes_on_behind_finish(lambda p: SGD(p, lr=0.1, momentum=0.9), tau(4, inner_state="maintain"))
    check_goes_on_behind_finish(lambda p: Adam(p, lr=0.1), tau(8))
    check_goes_on_behind_finish(lambda p: Adam(p, lr=0.1), tau(4, overlap_steps=2))
    check_goes_on_behind_finish(lambda p: SGD(p, lr=0.1), tau(4, base="sgp"))


def test_a_state_behind_finish_goes_on_bitwise():
    run_workers(check_all_behind_finish, 2)


MOMENTUM = [lambda p: SGD(p, lr=0.1, momentum=0.9), lambda p: Adam(p, lr=0.1)]
SAVED = [
    tau(4),
    SlowMoConfig(base="osgp", sync_every=4, timeout_seconds=patience(20)),
    SlowMoConfig(base="sgp", sync_every=3, exact_average=False),
]


def check_save_state(folder, makes, configs):
    """
    Saved after every step, which leaves no trace; loaded into a new process's objects, and into ones that have trained
    already.
    """
    for number, (make, config) in enumerate((make, config) for make in makes for config in configs):
        _, model, optimizer = prepared(config, make=make)
        through = []
        for step in range(8):
            train(model, optimizer, 1, first=step)
            through.append(weights(model))

        accelerator, model, optimizer = prepared(config, make=make)
        accelerator.save_state(f"{folder}/{number}/before")  # not started: as stock
        for step in range(8):
            train(model, optimizer, 1, first=step)
            accelerator.save_state(f"{folder}/{number}/{step}")
            if rank() == 0:  # who seals it
                slowmo_hf.verify_checkpoint(f"{folder}/{number}/{step}")
            bitwise(weights(model), through[step])
        accelerator.wait_for_everyone()

        for step in (1, 2, 3, 5):
            for started in (False, True):
                accelerator, model, optimizer = prepared(config, make=make)
                if started:
                    train(model, optimizer, 3, first=5)
                accelerator.load_state(f"{folder}/{number}/{step}")
                train(model, optimizer, 7 - step, first=step + 1)
                bitwise(weights(model), through[7])
                with slowmo_hf.consensus(optimizer):
                    shown = weights(model)
                    bitwise(shown, mean_over_ranks(shown))
        saved = load_file(f"{folder}/{number}/5/model.safetensors")
        accelerator, model, optimizer = prepared(config, make=make)
        train(model, optimizer, 6)
        with slowmo_hf.consensus(optimizer):
            (shown,) = saved.values()
            assert torch.allclose(shown, weights(model), rtol=0, atol=1e-12), "Accelerate's own file holds the average"


def check_a_save_that_failed(folder):
    """Accelerate's own part fails on every rank: no manifest, neither then nor with the next save."""
    accelerator, model, optimizer = prepared(tau(4))
    slowmo_hf.register_for_checkpointing(accelerator, optimizer)
    train(model, optimizer, 2)
    stock = accelerate.accelerator.save_accelerator_state

    def fail(*args, **kwargs):
        raise OSError("no space left")

    accelerate.accelerator.save_accelerator_state = fail
    assert "no space left" in error_of(accelerator.save_state, f"{folder}/failed")
    accelerate.accelerator.save_accelerator_state = stock
    accelerator.save_state(f"{folder}/next")
    return (
        [error_of(slowmo_hf.verify_checkpoint, f"{folder}/{name}") for name in ("failed", "next")]
        if rank() == 0
        else None
    )


def test_a_save_that_failed_is_never_sealed(tmp_path):
    (failed, following), _ = run_workers(check_a_save_that_failed, 2, str(tmp_path))
    assert "manifest.json is missing: the checkpoint was never finished" in failed
    assert following == ""


def check_every_save_state(folder):
    check_save_state(folder, MOMENTUM, SAVED)


def check_wire_save_state(folder):
    check_save_state(folder, MOMENTUM[:1], [tau(2, compression="int8"), tau(3, overlap_steps=2)])


def check_wrong_save_states(folder):
    accelerator, model, optimizer = prepared(SAVED[1], make=MOMENTUM[0])
    slowmo_hf.register_for_checkpointing(accelerator, optimizer)  # needless, and harmless
    train(model, optimizer, 6)
    with slowmo_hf.consensus(optimizer):
        average = weights(model)
    accelerator.save_state(f"{folder}/yes")
    train(model, optimizer, 3)
    accelerator.wait_for_everyone()
    accelerator.load_state(f"{folder}/yes")
    for show in (optimizer.optimizer.eval, model.eval):
        show()
        bitwise(weights(model), average)  # a look right after a load shows what was loaded
        optimizer.optimizer.train()
        model.train()
        accelerator.load_state(f"{folder}/yes")

    words = {}
    accelerator, model, optimizer = prepared(SAVED[1], make=MOMENTUM[0])
    beside = torch.load(f"{folder}/yes/optimizer.bin", weights_only=True)
    words["not by load_state"] = error_of(optimizer.load_state_dict, beside)

    accelerator, model, optimizer = prepared(SAVED[1], make=MOMENTUM[0])
    accelerator.save_state(f"{folder}/stock")
    train(model, optimizer, 1)
    accelerator.wait_for_everyone()
    accelerator.load_state(f"{folder}/stock")
    words["stock"] = error_of(train, model, optimizer, 1)
    return words


@pytest.mark.slow
def test_save_state_goes_on_bit_for_bit(tmp_path):
    run_workers(check_every_save_state, 2, str(tmp_path))


@pytest.mark.slow
def test_save_state_of_compressed_rounds_goes_on_bit_for_bit(tmp_path):
    run_workers(check_wire_save_state, 2, str(tmp_path))


def test_save_state_says_what_is_wrong(tmp_path):
    for words in run_workers(check_wrong_save_states, 2, str(tmp_path)):
        assert "load the checkpoint with accelerator.load_state" in words["not by load_state"]
        assert "has no state of local training, and this run has begun" in words["stock"]


def check_distributed_checkpoint():
    """
    torch's get_optimizer_state_dict takes a dummy step (lr 0, gradients 0) where the state is empty. It must not
    count.
    """
    for make in (lambda p: SGD(p, lr=0.1), lambda p: Adam(p, lr=0.1)):
        _, plain_model, plain = prepared(tau(2), make=make)
        train(plain_model, plain, 3)

        _, model, optimizer = prepared(tau(2), make=make)
        bare = optimizer.optimizer
        get_optimizer_state_dict(model, bare)
        bitwise(weights(model), torch.tensor(START, dtype=torch.float64))
        assert not bare.state  # without us Adam would have counted it
        train(model, optimizer, 3)
        assert (bare.outer_loop.attempted_steps, bare.outer_loop.rounds) == (3, 1)
        bitwise(weights(model), weights(plain_model))


def check_distributed_checkpoint_at_a_round():
    """
    A state that is gone at a round's end (reset), so torch's dummy step comes in mid-training too: the save has what
    it made, and the run goes on as the one that was never saved.
    """
    makes = (
        lambda p: SGD(p, lr=0.1, momentum=0.9, dampening=0.5),
        lambda p: Adam(p, lr=0.1),
    )
    for make in makes:
        _, plain_model, plain = prepared(tau(2, inner_state="reset"), make=make)
        train(plain_model, plain, 2)
        train(plain_model, plain, 3)
        _, model, optimizer = prepared(tau(2, inner_state="reset"), make=make)
        bare = optimizer.optimizer
        train(model, optimizer, 2)
        at = weights(model)
        optimizer.zero_grad()
        assert not bare.state
        saved = get_optimizer_state_dict(model, bare)
        assert not bare.state
        assert all(state for state in saved["state"].values())
        bitwise(weights(model), at)
        assert (bare.outer_loop.attempted_steps, bare.outer_loop.rounds) == (2, 1)
        train(model, optimizer, 3)
        bitwise(weights(model), weights(plain_model))


def check_distributed_checkpoint_loads():
    _, model, optimizer = prepared(tau(2), make=lambda p: Adam(p, lr=0.1))
    train(model, optimizer, 4)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer.optimizer))
    _, other_model, other = prepared(tau(2), make=lambda p: Adam(p, lr=0.3))
    set_optimizer_state_dict(other_model, other.optimizer, optim_state_dict=saved)
    assert other.param_groups[0]["lr"] == 0.1
    bitwise(other.state[other_model.module.w]["exp_avg"], optimizer.state[model.module.w]["exp_avg"])
    train(other_model, other, 3)
    assert (other.optimizer.outer_loop.attempted_steps, other.optimizer.outer_loop.rounds) == (3, 1)


def check_a_step_that_moves_nothing_counts():
    """
    Warm-up from lr 0, and rank 1's batch gives no gradient (all labels masked): a real step, or the clocks part for
    good.
    """
    model = Tracker()
    optimizer = SlowMoOptimizer(SGD(model.parameters(), lr=0.0), tau(2))
    for step, lr in enumerate((0.0, 0.1, 0.0)):  # the third follows a round
        optimizer.zero_grad()
        optimizer.param_groups[0]["lr"] = lr
        model(weights(model) if rank() == 1 and lr == 0 else target(rank(), step)).backward()
        assert bool(model.w.grad.any()) == (rank() == 0 or lr > 0)
        optimizer.step()
        assert optimizer.outer_loop.attempted_steps == step + 1
    assert optimizer.outer_loop.rounds == 1


def check_all_distributed_checkpoints():
    check_distributed_checkpoint()
    check_distributed_checkpoint_at_a_round()
    check_distributed_checkpoint_loads()


def test_a_step_that_moves_nothing_counts_on_every_rank():
    run_workers(check_a_step_that_moves_nothing_counts, 2)


def test_distributed_checkpoints_dummy_step_does_not_count():
    run_workers(check_all_distributed_checkpoints, 2)


@pytest.mark.parametrize(("then", "now"), [(0.5, 0.0), (0.0, 0.5)])
def test_a_state_needs_the_momentum_that_it_has(then, now):
    def begun(momentum):
        weight = torch.nn.Parameter(torch.zeros(3))
        optimizer = SlowMoOptimizer(SGD([weight], lr=0.1), SlowMoConfig(sync_every=2, outer_momentum=momentum))
        for _ in range(2):
            weight.grad = torch.ones(3)
            optimizer.step()
        return optimizer

    with pytest.raises(ValueError, match=r"it has . velocities, this run .* Set outer_optimizer and outer_momentum"):
        begun(now).load_state_dict(begun(then).state_dict())
