"""`model.eval()` shows the last round's model, without a message; training goes on as if it had not been."""

from __future__ import annotations

import copy
import io
import logging
import pickle
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn

import slowmo_hf
from harness import patience, run_workers
from llama import tiny_llama
from slowmo_hf import SlowMoConfig, SlowMoOptimizer, run_in_process
from tiny import arguments, equal, values

SYNC_EVERY = 4
KINDS = {
    "local sgd": {},
    "no outer update": {"outer_momentum": 0.0},
    "lookahead": {"outer_lr": 0.5, "outer_momentum": 0.0},
    "diloco": {"outer_optimizer": "torch.optim.SGD", "outer_optimizer_kwargs": {"momentum": 0.9, "nesterov": True}},
    "int8": {"compression": "int8"},
    "local buffers": {"model_buffers": "local"},
    "SGP": {"base": "sgp"},
    "OSGP": {"base": "osgp", "staleness": 2},
    "D-PSGD": {"base": "dpsgd"},
    "overlapped": {"overlap_steps": 2},
    "all-reduce": {"base": "all_reduce"},
}


class Loop:
    """One worker's training of a small network with BatchNorm and dropout, each step on rows of its own."""

    def __init__(self, rank, dtype=torch.float64, compiled=False, **settings):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.25), nn.Linear(6, 1)).to(dtype)
        self.bare = self.model
        if compiled:
            self.model = torch.compile(self.bare, backend="eager")
        config = SlowMoConfig(**{"sync_every": SYNC_EVERY, **settings}, timeout_seconds=patience(20))
        inner = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.5)
        self.optimizer = SlowMoOptimizer(inner, config)
        self.draw = torch.Generator().manual_seed(100 + rank)
        self.dtype = dtype

    def step(self):
        rows = torch.randn(8, 4, generator=self.draw, dtype=self.dtype)
        self.optimizer.zero_grad()
        self.model(rows).square().mean().backward()
        self.optimizer.step()

    def state(self):
        named = (*self.model.named_parameters(), *self.model.named_buffers())
        return {name: value.detach().clone() for name, value in named}


def same(a, b, *, floating_buffers=True):
    left = [name for name in a if floating_buffers or "running" not in name]
    return all(torch.equal(a[name], b[name]) for name in left)


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_rounds_model_is_shown_and_training_goes_on(kind):
    """At every step of three rounds: what all had when the round ended; a twin that never evaluates is equal."""

    def work(rank):
        loop, twin = Loop(rank, **KINDS[kind]), Loop(rank, **KINDS[kind])
        seen = []
        for step in range(1, 14):
            for one in (twin, loop):
                torch.manual_seed(step)
                one.step()
            ended = loop.state()
            loop.model.eval()
            shown = loop.state()
            with torch.no_grad():
                loop.model(torch.randn(3, 4, dtype=torch.float64))
            generator = torch.get_rng_state()
            loop.model.train()
            assert same(loop.state(), ended)
            assert torch.equal(torch.get_rng_state(), generator), "draws are the program's own, as with stock"
            seen.append((step, shown, ended))
        assert same(loop.state(), twin.state())
        return seen

    workers = run_in_process(work, 2)
    settings = KINDS[kind]
    own_buffers = settings.get("model_buffers") == "local"
    last = None
    for (step, shown, ended), (_, other_shown, other_ended) in zip(*workers, strict=True):
        if settings.get("base") == "all_reduce":
            assert same(shown, ended)
            assert same(shown, other_shown, floating_buffers=False)
            continue
        if step < SYNC_EVERY + settings.get("overlap_steps", 0):
            assert same(shown, ended), step  # before the first round: own weights
            continue
        assert same(shown, other_shown, floating_buffers=not own_buffers), step
        if "overlap_steps" not in settings:
            if step % SYNC_EVERY == 0:
                last = ended
            assert same(shown, last, floating_buffers=not own_buffers), step
        assert (step % SYNC_EVERY == 0 and "overlap_steps" not in settings) or not same(ended, other_ended)


def test_a_parameter_of_few_bits_is_shown_as_it_was_handed_back():
    """bf16: the anchor has more bits than the parameter that the round left."""

    def work(rank):
        loop = Loop(rank, dtype=torch.bfloat16)
        for _ in range(SYNC_EVERY):
            loop.step()
        after_round = loop.state()
        loop.step()
        loop.model.eval()
        return after_round, loop.state()

    for after_round, shown in run_in_process(work, 2):
        assert same(shown, after_round)


def evaluate_compiled():
    warnings.filterwarnings("ignore", message=".*global hooks on modules.*")  # torch's, of the start's own hook
    loop = Loop(dist.get_rank(), compiled=True)
    for _ in range(SYNC_EVERY + 1):
        loop.step()
    ended = loop.bare[0].weight.detach().clone()
    loop.bare.eval()
    shown = loop.bare[0].weight.detach().clone()
    loop.bare.train()
    assert torch.equal(loop.bare[0].weight, ended)
    return shown, ended


def test_a_compiled_model_is_shown_too():
    """What is compiled before it is trained is found by its own module, as `unwrap_model` gives it."""
    (shown, ended), (other, other_ended) = run_workers(evaluate_compiled, 2)
    assert torch.equal(shown, other)
    assert not torch.equal(ended, other_ended)


@pytest.mark.parametrize("back", ["step", "pass", "train"])
def test_a_model_that_trains_in_eval_mode_trains_on(back):
    """Dropout off from the start; `model.eval()` at every step, also between backward and step, changes nothing."""

    def work(rank):
        loop, twin = Loop(rank), Loop(rank)
        for one in (loop, twin):
            one.model.eval()
        seen = []
        for _ in range(10):
            twin.step()
            rows = torch.randn(8, 4, generator=loop.draw, dtype=torch.float64)
            loop.optimizer.zero_grad()
            loop.model(rows).square().mean().backward()
            if back == "step":
                loop.model.eval()
            loop.optimizer.step()
            loop.model.eval()
            with torch.no_grad():
                seen.append(loop.model(torch.ones(1, 4, dtype=torch.float64)).item())
            if back == "train":
                loop.model.train()
                nn.Module.train(loop.model, False)
        loop.model.train()
        assert same(loop.state(), twin.state())
        return seen

    first, second = run_in_process(work, 2)
    assert first[SYNC_EVERY - 1 :] == second[SYNC_EVERY - 1 :]
    assert first[0] != second[0]
    assert len(set(first[SYNC_EVERY - 1 : 2 * SYNC_EVERY - 1])) == 1


def test_frozen_submodules_and_copies_change_nothing():
    """A submodule in eval mode is none of ours; a copy and a pickle of the model are not listened to."""

    def work(rank):
        loop = Loop(rank)
        for _ in range(6):
            loop.step()
        ended = loop.state()
        loop.model[1].eval()
        assert same(loop.state(), ended)
        for other in (copy.deepcopy(loop.model), pickle.loads(pickle.dumps(loop.model))):
            other.eval()
            other.train()
            assert same(dict(other.named_parameters()), ended)
        file = io.BytesIO()
        torch.save(loop.model, file)
        assert same(loop.state(), ended)
        assert "train" not in vars(loop.model)
        return True

    assert run_in_process(work, 2) == [True, True]


def test_what_the_program_loads_stays():
    """The best weights, loaded before `model.eval()` or in there, are evaluated; training goes on from them."""

    def work(rank):
        loop = Loop(rank)
        for _ in range(5):
            loop.step()
        best = {name: value * 0 + 0.5 for name, value in loop.state().items()}
        loop.model.load_state_dict(best)
        loop.model.eval()
        before = loop.state()
        loop.model.train()
        loop.step()
        after_step = loop.state()
        loop.model.eval()
        last_round = loop.state()
        loop.model.load_state_dict(best)
        inside = loop.state()
        loop.model.train()
        return before, after_step, last_round, inside, loop.state()

    for before, after_step, last_round, inside, after in run_in_process(work, 2):
        for kept in (before, inside, after):
            assert all(bool((value.double() == 0.5).all() or value.dtype == torch.int64) for value in kept.values())
        assert not same(after_step, before)
        assert not same(last_round, before)


@pytest.mark.parametrize("settings", [{"shard_slow_state": True}, {"base": "sgp", "exact_average": False}])
def test_where_a_worker_has_not_the_anchors_the_error_names_the_way_out(settings):
    """Inside a round; the average is shown as ever, `model.eval()` included, and at a round's end all agree."""

    def work(rank):
        loop = Loop(rank, **settings)
        for _ in range(5):
            loop.step()
        name = list(settings)[-1]
        ended = loop.state()
        with pytest.raises(RuntimeError, match=rf"{name}=.*slowmo_hf.consensus"):
            loop.model.eval()
        assert same(loop.state(), ended)
        loop.model.train()
        with slowmo_hf.consensus(loop.optimizer):
            loop.model.eval()
            shown = loop.state()
            loop.model.train()
        assert same(loop.state(), ended)
        loop.step()
        return shown

    first, second = run_in_process(work, 2)
    assert same(first, second)


def test_views_in_each_other_and_inference_mode():
    """The exact average inside an evaluation, and the last round's again behind it; both under inference_mode."""

    def work(rank):
        loop, twin = Loop(rank), Loop(rank)
        for step in range(10):
            for one in (twin, loop):
                torch.manual_seed(step)
                one.step()
            if step % 3:
                continue
            with torch.inference_mode():
                loop.model.eval()
                last_round = loop.state()
                with slowmo_hf.consensus(loop.optimizer):
                    average = loop.state()
                assert same(loop.state(), last_round)
                loop.model.train()
        assert same(loop.state(), twin.state())
        loop.model.eval()
        slowmo_hf.finish(loop.optimizer)
        finished = loop.state()
        loop.model.train()
        loop.model.eval()
        assert same(loop.state(), finished)
        return average, last_round, twin.state(), finished

    workers = run_in_process(work, 2)
    (average, last_round, _, finished), (_, _, _, other_finished) = workers
    assert not same(average, last_round)
    assert same(finished, other_finished)
    for name in ("0.weight", "3.bias"):
        mean = (workers[0][2][name] + workers[1][2][name]) / 2
        torch.testing.assert_close(finished[name], mean, rtol=0, atol=1e-12)


def test_each_line_is_said_once(caplog):
    """Own weights before the first round, which round is shown, a pass with gradients, a save in training mode."""

    def work(rank):
        loop = Loop(rank)
        for step in range(11):
            loop.step()
            loop.model.state_dict()  # in training mode
            loop.model.eval()
            loop.model.state_dict()
            if step % 2:
                loop.model.train()
        return True

    with caplog.at_level(logging.INFO, logger="slowmo_hf"):
        run_in_process(work, 2)
    told = [record.getMessage() for record in caplog.records]
    for words in (
        "model.eval() before the first round (sync_every=4): every rank sees its own weights of step 1.",
        "shows the model of the round of step 4 (0 steps came after it)",
        "a pass with gradients after model.eval()",
        "the model's state was taken in training mode at step 1, 1 steps after the last round: it is rank 0's own",
    ):
        assert sum(words in line for line in told) == 1, (words, told)


def evaluate_alone():
    """Rank 0 evaluates and saves at every step, by the prepared model and the bare one; rank 1 never does."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    config = SlowMoConfig(sync_every=SYNC_EVERY, timeout_seconds=patience(20))
    model, optimizer = accelerator.prepare(model, SlowMoOptimizer(inner, config))
    bare, rank = accelerator.unwrap_model(model), accelerator.process_index
    shown, rounds = [], []
    for step in range(10):
        torch.manual_seed(100 * step + rank)
        accelerator.backward(model(torch.randn(8, 4)).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % SYNC_EVERY == 0:
            rounds.append(bare.weight.detach().clone())
        if rank == 0 and step >= SYNC_EVERY:
            (model if step % 2 else bare).eval()
            shown.append(bare.weight.detach().clone())
            (model if step % 2 else bare).train()
    own = bare.weight.detach().clone()
    both = [torch.zeros_like(own) for _ in range(2)]
    dist.all_gather(both, own)
    return shown, rounds, not torch.equal(*both)


def test_a_rank_evaluates_alone_and_nobody_waits():
    """Under DDP: what rank 0 sees is the last round's, on its own, and the run goes on."""
    (shown, rounds, apart), (nothing, other_rounds, _) = run_workers(evaluate_alone, 2)
    assert apart
    assert not nothing
    assert all(torch.equal(a, b) for a, b in zip(rounds, other_rounds, strict=True))
    assert [torch.equal(weight, rounds[0]) for weight in shown] == [True] * 3 + [False] * 3
    assert all(torch.equal(weight, rounds[1]) for weight in shown[3:])


def evaluate_by_trainer(folder):
    """A sharded slow state, where `model.eval()` alone would be refused."""
    from transformers import Trainer

    torch.manual_seed(0)
    model = Line()
    draw = torch.Generator().manual_seed(1)
    rows = [{"x": torch.randn(4, generator=draw), "labels": torch.randn(1, generator=draw)} for _ in range(64)]
    args = arguments(folder, max_steps=6, eval_steps=6, eval_strategy="steps", logging_strategy="steps")
    config = SlowMoConfig(sync_every=SYNC_EVERY, shard_slow_state=True, timeout_seconds=patience(20))
    optimizer = SlowMoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), config)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    trainer = Trainer(model, args, train_dataset=rows, eval_dataset=rows, optimizers=(optimizer, scheduler))
    trainer.train()
    own = model.inner.weight.detach().clone()
    both = [torch.zeros_like(own) for _ in range(2)]
    dist.all_gather(both, own)
    biases = [torch.zeros(1) for _ in range(2)]
    dist.all_gather(biases, model.inner.bias.detach().clone())
    rows_x, labels = torch.stack([row["x"] for row in rows]), torch.stack([row["labels"] for row in rows])
    loss = (rows_x @ (sum(both) / 2).T + sum(biases) / 2 - labels).square().mean()
    return [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry], loss.item()


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 1)

    def forward(self, x, labels):
        return {"loss": (self.inner(x) - labels).square().mean()}


def test_trainer_evaluates_the_average_of_a_wrapped_optimizer(tmp_path):
    for (told,), loss in run_workers(evaluate_by_trainer, 2, str(tmp_path)):
        assert told == pytest.approx(loss, rel=1e-5)


def evaluate_node_workers(folder):
    """Two workers of two processes: inside a round, and after a resume there."""
    from accelerate import Accelerator

    def begin():
        accelerator = Accelerator(cpu=True)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
        config = SlowMoConfig(sync_every=SYNC_EVERY, processes_per_worker=2, timeout_seconds=patience(30))
        inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return accelerator, *accelerator.prepare(model, SlowMoOptimizer(inner, config))

    def step(number):
        torch.manual_seed(100 * number + accelerator.process_index)
        accelerator.backward(model(torch.randn(8, 4)).square().mean())
        optimizer.step()
        optimizer.zero_grad()

    def values():
        tensors = (*model.parameters(), *(b for b in model.buffers() if b.is_floating_point()))
        return torch.cat([t.detach().flatten() for t in tensors])

    accelerator, model, optimizer = begin()
    for number in range(6):
        step(number)
        if number + 1 == SYNC_EVERY:
            after_round = values()
    local = values()
    model.eval()
    shown = values()
    model.train()
    unchanged = torch.equal(values(), local)
    accelerator.save_state(folder)
    accelerator, model, optimizer = begin()
    accelerator.load_state(folder)
    torch.manual_seed(0)
    model(torch.randn(8, 4)).sum().backward()  # takes it up
    model.eval()
    return after_round, shown, values(), local, unchanged


def test_all_processes_of_a_worker_see_the_last_rounds_model(tmp_path):
    ranks = run_workers(evaluate_node_workers, 4, str(tmp_path / "saved"))
    after_round = ranks[0][0]
    for mine, shown, resumed, local, unchanged in ranks:
        assert torch.equal(mine, after_round)
        assert torch.equal(shown, after_round)
        assert torch.equal(resumed, after_round)
        assert unchanged
        assert not torch.equal(local, after_round)


def generate_alone():
    """A language model: rank 0 generates from the last round's weights, and from a copy that was loaded with them."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, copy_of_it = tiny_llama(), tiny_llama()
    config = SlowMoConfig(sync_every=SYNC_EVERY, timeout_seconds=patience(30))
    inner = torch.optim.SGD(model.parameters(), lr=5.0)
    model, optimizer = accelerator.prepare(model, SlowMoOptimizer(inner, config))
    bare = accelerator.unwrap_model(model)
    prompt = torch.tensor([[3, 7, 5]])
    for step in range(6):
        torch.manual_seed(100 * step + accelerator.process_index)
        tokens = torch.randint(3, 29, (4, 8))
        accelerator.backward(model(input_ids=tokens, labels=tokens).loss)
        optimizer.step()
        optimizer.zero_grad()
        if step + 1 == SYNC_EVERY:
            copy_of_it.load_state_dict(bare.state_dict())
    local = values(bare)
    if accelerator.is_main_process:
        bare.eval()
        copy_of_it.eval()
        with torch.no_grad():
            logits = [one(input_ids=prompt).logits for one in (bare, copy_of_it)]
        texts = [one.generate(prompt, max_new_tokens=6, do_sample=False) for one in (bare, copy_of_it)]
        bare.train()
        assert torch.equal(*logits)
        assert torch.equal(*texts)
    accelerator.wait_for_everyone()
    return equal(values(bare), local)


def test_one_rank_generates_from_the_last_rounds_model():
    assert run_workers(generate_alone, 2) == [True, True]
