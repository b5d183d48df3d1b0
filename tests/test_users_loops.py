"""Loops that users write, beside what stock training does with them: flags, evaluations, two optimizers, errors."""

from __future__ import annotations

import copy
import gc
import tempfile
import time

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

import slowmo_hf
from harness import run_workers
from slowmo_hf import SlowMoCallback, SlowMoConfig, SlowMoOptimizer, run_in_process
from tiny import Heard, Regression, Rows, SmallNorm, arguments, equal, error_of, values

TAU = 4
CONFIG = SlowMoConfig(sync_every=TAU, outer_momentum=0.0)


def are_own(model, batches):
    """Of every gradient, whether it is that of this process's batches alone."""
    twin = copy.deepcopy(model)
    twin.zero_grad()
    for x in batches:
        twin(x).square().mean().backward()
    pairs = zip(model.parameters(), twin.parameters(), strict=True)
    return [torch.allclose(p.grad, own.grad, atol=1e-14) for p, own in pairs]


def prepared():
    """A linear model, bare and under Accelerate's DDP, and its optimizer."""
    accelerator, bare = Accelerator(cpu=True), torch.nn.Linear(4, 2).double()
    optimizer = SlowMoOptimizer(torch.optim.SGD(bare.parameters(), lr=0.1), CONFIG)
    return accelerator, bare, *accelerator.prepare(bare, optimizer)


def train(accelerator, model, optimizer, steps):
    for step in steps:
        accelerator.backward(model(batch(step)).square().mean())
        optimizer.step()
        optimizer.zero_grad()


def batch(step):
    return Rows(3, seed=10 * step + dist.get_rank()).x


# ---- who averages gradients ----


def flags_by_hand(base):
    """nanoGPT's loop: of two micro-batches the second one is to be averaged."""
    model = torch.nn.Linear(4, 2).double()
    ddp = DistributedDataParallel(model)
    optimizer = SlowMoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), SlowMoConfig(base=base, sync_every=TAU))
    found = []
    for step in range(3):
        batches = [batch(2 * step), batch(2 * step + 1)]
        for micro, x in enumerate(batches):
            ddp.require_backward_grad_sync = micro == 1
            ddp(x).square().mean().backward()
        found += are_own(model, batches)
        optimizer.step()
        optimizer.zero_grad()
    return found


def triggered():
    """Accelerate's own way to have a late backward pass averaged."""
    accelerator, bare, model, optimizer = prepared()
    found = []
    for step in range(3):
        batches = [batch(2 * step), batch(2 * step + 1)]
        with accelerator.no_sync(model):
            losses = [model(x).square().mean() for x in batches]
        accelerator.backward(losses[0])
        with accelerator.trigger_sync_in_backward(model):
            accelerator.backward(losses[1])
        found += are_own(bare, batches)
        optimizer.step()
        optimizer.zero_grad()
    return found


def averaged_by_stock():
    """The control: DDP by itself."""
    model = torch.nn.Linear(4, 2).double()
    ddp = DistributedDataParallel(model)
    ddp(batch(0)).square().mean().backward()
    return are_own(model, [batch(0)])


def all_flags():
    return {"local_sgd": flags_by_hand("local_sgd"), "sgp": flags_by_hand("sgp"), "trigger": triggered()}


def test_a_program_that_sets_ddps_flags_averages_no_gradients():
    for found in run_workers(all_flags, 2):
        assert found == {name: [True] * 6 for name in found}
    assert run_workers(averaged_by_stock, 2) == [[False, False]] * 2


def let_go():
    """Stock training of a model whose optimizer of ours has ended and is gone: are gradients averaged again?"""
    accelerator, bare, model, optimizer = prepared()
    train(accelerator, model, optimizer, range(TAU + 1))
    slowmo_hf.finish(optimizer)
    accelerator.free_memory()
    del optimizer
    gc.collect()
    train(accelerator, model, torch.optim.SGD(bare.parameters(), lr=0.1), range(3))
    return values(bare)


def test_ddp_averages_again_when_the_optimizer_is_gone():
    assert equal(*run_workers(let_go, 2))


def refused():
    """A start that refuses the slow state which it was given: its errors, and what it leaves of DDP."""
    model = torch.nn.Linear(4, 2).double()
    ddp = DistributedDataParallel(model)
    optimizer = SlowMoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), CONFIG)
    optimizer.load_state_dict({**optimizer.state_dict(), "slowmo": {"version": 1}})
    said = [error_of(ddp, batch(0)) for _ in range(2)]
    return said, ddp.require_backward_grad_sync, "join_hook" in vars(ddp)


def test_a_start_that_fails_leaves_ddp_as_it_was():
    for said, averages, refuses_join in run_workers(refused, 2):
        assert said[0]
        assert said[0] == said[1]
        assert (averages, refuses_join) == (True, False)


def wrapped_late():
    """A look at shapes begins training; then DDP wraps the model. Later, inside a round, it may not."""
    model = torch.nn.Linear(4, 2).double()
    optimizer = SlowMoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), CONFIG)
    model(batch(0))
    ddp = DistributedDataParallel(model)
    found = []
    for step in range(3):
        ddp(batch(step)).square().mean().backward()
        found += are_own(model, [batch(step)])
        optimizer.step()
        optimizer.zero_grad()
    said = error_of(DistributedDataParallel, model)
    slowmo_hf.finish(optimizer)
    return found, said, error_of(DistributedDataParallel, model)


def test_a_wrapper_that_comes_late_is_kept_apart_or_refused():
    for found, inside, after in run_workers(wrapped_late, 2):
        assert found == [True] * 6
        assert inside.startswith("RuntimeError: this model has trained for 3 steps, each worker on its own")
        assert after == ""


# ---- random generators ----


def draws(wrap):
    """Roll-outs in evaluation mode, an update in training mode: PPO's shape. What each roll-out drew."""
    torch.manual_seed(3)
    model, drawn = torch.nn.Linear(4, 1), []
    optimizer = wrap(torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(3 * TAU):
        model.eval()
        with torch.no_grad():
            drawn.append(model(torch.randn(2, 4)).sum().item())
        drawn.append(torch.rand(()).item())
        model.train()
        model(torch.ones(2, 4)).sum().mul(0).backward()  # no update: only what is drawn may differ
        optimizer.step()
        optimizer.zero_grad()
    return drawn


def test_an_evaluation_draws_on_as_with_a_stock_optimizer():
    right = draws(lambda inner: inner)
    assert len(set(right)) == len(right)
    assert run_workers(draws_of_ours, 2) == [right, right]


def draws_of_ours():
    return draws(lambda inner: SlowMoOptimizer(inner, CONFIG))


def order_of_rows(wrap, seedable):
    """Trainer's, over five epochs with an evaluation at each one's end."""
    model, rows = Regression(torch.float32), Rows(8, torch.float32)
    optimizer = wrap(torch.optim.SGD(model.parameters(), lr=0.01))
    args = arguments(
        tempfile.mkdtemp(),
        max_steps=-1,
        num_train_epochs=5,
        eval_strategy="epoch",
        accelerator_config={"use_seedable_sampler": seedable},
    )
    Trainer(model, args, train_dataset=rows, eval_dataset=rows, optimizers=(optimizer, None)).train()
    return torch.cat([x for x, _ in model.seen])


@pytest.mark.parametrize("seedable", [True, False])
def test_trainers_epochs_are_shuffled_as_with_a_stock_optimizer(seedable):
    right = order_of_rows(lambda inner: inner, seedable)
    assert not torch.equal(right[:8], right[8:16])
    assert torch.equal(order_of_rows(lambda inner: SlowMoOptimizer(inner, CONFIG), seedable), right)


# ---- weights that a program loads ----


def swapped():
    """An EMA is evaluated, put in behind `model.eval()` or before it, and taken out: the ends with and without."""
    ends = []
    for swaps in ("", "behind", "before"):
        accelerator, bare = Accelerator(cpu=True), torch.nn.Linear(4, 2).double()
        torch.nn.init.ones_(bare.weight)
        torch.nn.init.zeros_(bare.bias)
        optimizer = SlowMoOptimizer(torch.optim.SGD(bare.parameters(), lr=0.05), CONFIG)
        model, optimizer = accelerator.prepare(bare, optimizer)
        for step in range(2 * TAU + 2):
            accelerator.backward(model(batch(step)).square().mean())
            optimizer.step()
            optimizer.zero_grad()
            if swaps == "behind" and step % 3 == 0:
                model.eval()
                shown = copy.deepcopy(bare.state_dict())
                bare.load_state_dict({name: 0 * value for name, value in shown.items()})
                assert not bare.weight.any()
                bare.load_state_dict(shown)
                model.train()
            if swaps == "before" and step % 3 == 0:
                own = values(bare)
                for param in bare.parameters():
                    param.data.zero_()
                model.eval()
                for name, param in bare.named_parameters():
                    param.data.copy_(own[name])
                model.train()
        ends.append(values(bare))
    return ends


def test_an_ema_swap_leaves_no_trace():
    (first, *swaps), (other, *_) = run_workers(swapped, 2)
    assert all(equal(first, one) for one in swaps)
    assert not equal(first, other), "inside a round"


# ---- two optimizers of one model ----


class TwoHeads(torch.nn.Module):
    """An encoder with BatchNorm that both losses train, a head of each, and a teacher that follows one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6)).double()
        self.heads = torch.nn.ModuleList(torch.nn.Linear(6, 1) for _ in range(2)).double()
        self.teacher = copy.deepcopy(self.heads[0]).requires_grad_(False)

    def forward(self, x, head):
        hidden = torch.tanh(self.encoder(x))
        with torch.no_grad():
            self.teacher.weight.lerp_(self.heads[0].weight, 0.1)
            taught = self.teacher(hidden)
        return (self.heads[head](hidden) - taught).square().mean()


def both(shared):
    """Prepared: the second optimizer has the encoder too where it is shared."""
    accelerator, bare = Accelerator(cpu=True), TwoHeads()
    encoder = list(bare.encoder.parameters())
    parts = [[*encoder, *bare.heads[0].parameters()], [*(encoder if shared else []), *bare.heads[1].parameters()]]
    made = [SlowMoOptimizer(torch.optim.SGD(part, lr=0.05), CONFIG) for part in parts]
    return accelerator, bare, *accelerator.prepare(bare, *made)


def train_both(made, steps, evaluates=False):
    accelerator, _, model, *optimizers = made
    for step in steps:
        for head, optimizer in enumerate(optimizers):
            accelerator.backward(model(batch(2 * step + head), head))
            optimizer.step()
            for one in optimizers:
                one.zero_grad()
        if evaluates and step % 3 == 2:
            model.eval()
            model.train()
    return values(made[1])


def evaluated_and_resumed(folder, shared):
    """A run in one go, one that evaluates, and one that is saved inside a round and resumed."""
    first = both(shared)
    train_both(first, range(6))
    first[0].save_state(folder)
    in_one_go = train_both(first, range(6, 11))
    evaluated = train_both(both(shared), range(11), evaluates=True)
    again = both(shared)
    again[0].load_state(folder)
    return in_one_go, evaluated, train_both(again, range(6, 11))


@pytest.mark.parametrize("shared", [False, True])
def test_two_optimizers_of_one_model_evaluate_and_resume_without_a_trace(tmp_path, shared):
    for in_one_go, evaluated, resumed in run_workers(evaluated_and_resumed, 2, str(tmp_path), shared):
        assert equal(evaluated, in_one_go)
        assert equal(resumed, in_one_go)


def shared_momentum():
    """Two optimizers of one weight with slow momentum: the second one's start; behind the first's end; with β = 0."""
    told = []
    for finishes, beta in ((False, 0.5), (True, 0.5), (False, 0.0)):
        weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
        first, second = (
            SlowMoOptimizer(torch.optim.SGD([weight], lr=0.1), SlowMoConfig(sync_every=TAU, outer_momentum=momentum))
            for momentum in (0.5, beta)
        )
        weight.grad = torch.ones_like(weight)
        first.step()
        if finishes:
            slowmo_hf.finish(first)
        told.append(error_of(second.step))
    return told


def test_slow_momentum_of_two_optimizers_over_one_parameter_is_refused():
    for refused, after_the_end, without in run_workers(shared_momentum, 2):
        assert "ValueError: " in refused
        assert "parameter 0 of group 0 (1 in all) is in another SlowMoOptimizer too" in refused
        assert (after_the_end, without) == ("", "")


# ---- a model that was not prepared ----


def unprepared():
    """An Accelerator is in use, and its model has layers of its own: BatchNorm's statistics behind a round."""
    Accelerator(cpu=True)
    model, heard = SmallNorm(), Heard()
    optimizer = SlowMoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), CONFIG)
    with heard:
        for step in range(TAU):
            rows = Rows(8, torch.float32, seed=10 * step + dist.get_rank())
            model(rows.x, rows.y)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
    return values(model), heard.about("no module with all of the optimizer's parameters")


def test_the_module_that_holds_all_is_the_model():
    (first, warned), (second, _) = run_workers(unprepared, 2)
    assert equal(first, second)
    assert not warned


# ---- an error that passes `end_training` ----


def raised_in_time():
    """Rank 1 fails at its third step, with `end_training` in a `finally`. What each rank raises, and when."""
    accelerator, bare = Accelerator(cpu=True), torch.nn.Linear(4, 1).double()
    model, optimizer = accelerator.prepare(bare, SlowMoOptimizer(torch.optim.SGD(bare.parameters(), lr=0.1), CONFIG))
    accelerator.state.destroy_process_group = lambda: None  # the test's own
    began = time.monotonic()

    def train():
        try:
            for step in range(30):
                accelerator.backward(model(batch(step)).square().mean())
                if step == 2 and dist.get_rank() == 1:
                    raise ValueError("a fault of the program's own")
                time.sleep(0.5)
                optimizer.step()
                optimizer.zero_grad()
        finally:
            accelerator.end_training()

    said = error_of(train)
    return said, time.monotonic() - began


def test_end_training_in_a_finally_holds_no_error_back():
    (_, _), (said, seconds) = run_workers(raised_in_time, 2)
    assert said == "ValueError: a fault of the program's own"
    assert seconds < 8, "30 steps of the other take 15 s"


def test_the_end_is_the_average_where_no_error_passes():
    def train(rank):
        accelerator, model = Accelerator(cpu=True), torch.nn.Linear(4, 1).double()
        optimizer = accelerator.prepare(SlowMoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), CONFIG))
        for _ in range(3):
            (model(torch.full((2, 4), rank + 1.0).double()) - 1).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        accelerator.end_training()
        return values(model)

    assert equal(*run_in_process(train, 2))


# ---- a Trainer that fails ----


class Fails(Trainer):
    """At its third step, once."""

    has_failed = False

    def training_step(self, *args, **kwargs):
        if self.state.global_step == 2 and not Fails.has_failed:
            Fails.has_failed = True
            raise RuntimeError("a fault of the program's own")
        return super().training_step(*args, **kwargs)


def given(args):
    return args.save_total_limit, args.hub_strategy, args.average_tokens_across_devices


def fails_and_goes_on(folder):
    """Two Trainers with the same arguments: what is left of these, and of the second one's checkpoints."""
    args = arguments(
        folder,
        max_steps=6,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=1,
        average_tokens_across_devices=True,
    )
    before, seen = given(args), []
    for _ in range(2):
        trainer = Fails(
            Regression(torch.float32), args, train_dataset=Rows(24, torch.float32), callbacks=[SlowMoCallback(CONFIG)]
        )
        said = error_of(trainer.train)
        seen.append((said, given(args) == before))
    dist.barrier()
    return seen, sorted(path.name for path in folder.glob("checkpoint-*"))


def test_a_trainer_that_fails_gives_its_arguments_back(tmp_path):
    for seen, left in run_workers(fails_and_goes_on, 2, tmp_path):
        assert seen == [("RuntimeError: a fault of the program's own", True), ("", True)]
        assert left == ["checkpoint-6"]


class OwnLoop(Trainer):
    """A training loop of its own, without `on_optimizer_step`."""

    def _inner_training_loop(self, *args, **kwargs):
        self.create_optimizer_and_scheduler(num_training_steps=4)
        self.state.max_steps = 4
        handler = self.callback_handler
        handler.model, handler.optimizer, handler.lr_scheduler = self.model, self.optimizer, self.lr_scheduler
        handler.train_dataloader = self.get_train_dataloader()
        self.control = handler.on_train_begin(self.args, self.state, self.control)
        for inputs in handler.train_dataloader:
            self.control = handler.on_step_begin(self.args, self.state, self.control)
            self.model(**inputs)["loss"].backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.state.global_step += 1
            self.control = handler.on_step_end(self.args, self.state, self.control)


def test_a_trainers_own_loop_that_counts_no_steps_is_refused(tmp_path):
    trainer = OwnLoop(
        Regression(torch.float32),
        arguments(tmp_path),
        train_dataset=Rows(16, torch.float32),
        callbacks=[SlowMoCallback(CONFIG)],
    )
    with pytest.raises(RuntimeError, match="came to the end of step 1 without on_optimizer_step"):
        trainer.train()
