"""Buffers: which are averaged, and which are each worker's own."""

from __future__ import annotations

import math
import re

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn

import slowmo_hf
from buffered import Loop
from harness import patience, run_workers
from slowmo_hf import SlowMoConfig, SlowMoOptimizer, run_in_process
from slowmo_hf.checkpoints.files import read_part, write_part
from slowmo_hf.checkpoints.state import check_snapshot, write_snapshot
from slowmo_hf.contents import CheckpointError, Contents
from slowmo_hf.training.local_state import _taken
from slowmo_hf.upstream import non_persistent_buffers
from tiny import error_of

BASES = {
    "local SGD": {},
    "SGP": {"base": "sgp"},
    "overlapped": {"sync_every": 4, "overlap_steps": 2},
    "no average": {"base": "sgp", "exact_average": False},
}


class Growing(nn.Module):
    """A buffer as long as the last batch; `persistent` says whether it is in the state dictionary."""

    def __init__(self, persistent=False, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.persistent, self.dtype = persistent, dtype
        self.register_buffer("cos", torch.ones(4, dtype=dtype), persistent=persistent)

    def forward(self, x):
        if self.training:
            self.register_buffer("cos", torch.arange(len(x)).to(self.dtype), persistent=self.persistent)
        return self.norm(self.linear(x))


def test_which_buffers_are_not_persistent():
    model = nn.ModuleDict({"a": Growing(), "b": Growing(persistent=True), "norm": nn.BatchNorm1d(2)})
    assert non_persistent_buffers(model) == {"a.cos"}
    assert {name for name, _ in model.named_buffers()} - model.state_dict().keys() == {"a.cos"}
    model["b"].register_buffer("cos", torch.ones(9), persistent=False)
    model["a"].register_buffer("cos", torch.ones(9), persistent=True)
    assert non_persistent_buffers(model) == {"b.cos"}
    assert non_persistent_buffers(Growing()) == {"cos"}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64], ids=str)
def test_it_grows_and_shrinks_on_each_worker_by_itself(base, dtype):
    """Through rounds, views and the end; what is persistent beside it is averaged as ever."""

    def work(rank):
        loop = Loop(rank, Growing(dtype=dtype), **BASES[base])
        for step in range(9):
            length = 3 + (step * (rank + 1)) % 5
            loop.step(length)
            assert torch.equal(loop.model.cos, torch.arange(length).to(dtype))
            if step == 4:
                with slowmo_hf.consensus(loop.optimizer):
                    assert torch.equal(loop.model.cos, torch.arange(length).to(dtype))
                    shown = loop.model.norm.running_mean.clone()
                if "exact_average" not in BASES[base]:  # there it is refused
                    loop.model.eval()
                    assert torch.equal(loop.model.cos, torch.arange(length).to(dtype))
                    loop.model.train()
        slowmo_hf.finish(loop.optimizer)
        return shown, loop.model.norm.running_mean, loop.model.cos

    first, other = run_in_process(work, 2)
    assert torch.equal(first[0], other[0])
    assert torch.equal(first[1], other[1])
    assert (len(first[2]), len(other[2])) == (6, 4)


def test_it_may_differ_at_the_start():
    """A pass before training has made it longer on one rank; equal ones are rank 0's, as DDP makes them."""

    def work(rank, longer):
        model = Growing()
        model.register_buffer("cos", torch.full((4 + longer * rank,), float(rank)), persistent=False)
        model.eval()
        loop = Loop(rank, model)
        for _ in range(3):
            loop.step()
        return model.cos.tolist()

    assert run_in_process(lambda rank: work(rank, 1), 2) == [[0.0] * 4, [1.0] * 5]
    assert run_in_process(lambda rank: work(rank, 0), 2) == [[0.0] * 4, [0.0] * 4]


class Lazy(Growing):
    """Its buffer is registered as None, and made by the first pass."""

    def __init__(self):
        super().__init__()
        self.register_buffer("cos", None, persistent=False)


class Accelerated:
    """Under Accelerate, over gloo: batches of other lengths on each rank."""

    def __init__(self, make, policy, folder=None):
        self.accelerator, self.bare, self.rank = Accelerator(cpu=True), make(), dist.get_rank()
        config = SlowMoConfig(sync_every=4, model_buffers=policy, timeout_seconds=patience(30))
        inner = torch.optim.SGD(self.bare.parameters(), lr=0.1, momentum=0.9)
        self.model, self.optimizer = self.accelerator.prepare(self.bare, SlowMoOptimizer(inner, config))
        if folder is not None:
            self.accelerator.load_state(folder)

    def train(self, steps):
        for step in steps:
            draw = torch.Generator().manual_seed(100 * step + self.rank)
            x = torch.randn(3 + (step * (self.rank + 1)) % 5, 4, generator=draw)
            self.accelerator.backward(self.model(x).square().mean())
            self.optimizer.step()
            self.optimizer.zero_grad()

    def state(self):
        return {n: t.detach().clone() for n, t in (*self.bare.named_parameters(), *self.bare.named_buffers())}


def resumed(folder, make, policy):
    """State of a run that saves after 6 steps, at its save and at its end; and of one that goes on from there."""
    whole = Accelerated(make, policy)
    whole.train(range(6))
    whole.accelerator.save_state(folder)
    saved = whole.state()
    whole.train(range(6, 9))
    again = Accelerated(make, policy, folder)
    again.optimizer.optimizer.begun()
    taken_up = again.state()
    again.train(range(6, 9))
    return saved, taken_up, whole.state(), again.state()


@pytest.mark.parametrize("make", [Growing, Lazy])
@pytest.mark.parametrize("policy", ["average", "local"])
def test_it_is_restored_with_its_saved_shape(tmp_path, make, policy):
    """In the middle of a round, bit for bit, on each rank its own: also where the fresh model has none yet."""
    found = run_workers(resumed, 2, str(tmp_path / "saved"), make, policy)
    for saved, taken_up, end, again in found:
        assert saved.keys() == taken_up.keys()
        assert all(torch.equal(saved[name], taken_up[name]) for name in saved)
        assert all(torch.equal(end[name], again[name]) for name in end)
    assert [len(saved["cos"]) for saved, *_ in found] == [3, 3]
    assert not torch.equal(found[0][0]["norm.running_mean"], found[1][0]["norm.running_mean"])


def persistent_and_local(folder):
    whole = Accelerated(lambda: Growing(persistent=True), "local")
    whole.train(range(5))
    with slowmo_hf.consensus(whole.optimizer):
        write_snapshot(folder, whole.optimizer.optimizer.outer_loop, shared=dist.get_rank() == 0, objects={})
    dist.barrier()
    saved = whole.state()
    again = Accelerated(lambda: Growing(persistent=True), "local")
    check_snapshot(folder, again.optimizer.optimizer.begun())()
    return saved, again.state()


def test_a_persistent_one_that_is_local_is_restored_with_its_saved_shape(tmp_path):
    found = run_workers(persistent_and_local, 2, str(tmp_path))
    assert [len(saved["cos"]) for saved, _ in found] == [7, 6]
    for saved, again in found:
        assert all(torch.equal(saved[name], again[name]) for name in saved)


def test_a_form_that_cannot_be_made_is_told(tmp_path):
    """Of a forged file: shape, dtype, module and place of a buffer that is made anew."""

    def work(rank):
        loop = Loop(rank, Growing())
        for _ in range(3):
            loop.step(5)
        write_snapshot(str(tmp_path), loop.optimizer.outer_loop, shared=True, objects={})
        part, words = read_part(str(tmp_path), "worker_0"), []
        wrong = [
            ["x"],
            [[-1], "float32", False],
            [[5], "nonsense", False],
            [[5], "float32", "no"],
            [[4], "float32", False],
        ]
        forms = [{"cos": form} for form in wrong]
        forms += [{"linear.weight": [[5], "float32", False]}, {"gone.cos": [[5], "float32", False]}, 3]
        for form in forms:
            part.settings["remade_buffers"] = form
            write_part(str(tmp_path), "worker_0", part)
            with pytest.raises(CheckpointError) as error:
                check_snapshot(str(tmp_path), loop.optimizer.outer_loop)
            words.append(str(error.value))
        return words

    [words] = run_in_process(work, 1)
    assert all(re.search(r"worker_0\.(json|safetensors): (remade_buffers|buffer\.cos) ", told) for told in words), (
        words
    )


def test_an_older_checkpoint_compared_it_too(tmp_path):
    """Its list of tensors has the shapes of all buffers: those of what is each worker's own do not count."""

    def work(rank):
        loop = Loop(rank, Growing())
        for _ in range(3):
            loop.step(5)
        loop_of_it = loop.optimizer.outer_loop
        write_snapshot(str(tmp_path), loop_of_it, shared=True, objects={})
        part = read_part(str(tmp_path), "shared")
        lines = part.settings["parameters"]
        assert not any("cos" in line for line in lines)
        part.settings["parameters"] = [*lines[:4], "buffer cos: [4] torch.float32", *lines[4:]]
        write_part(str(tmp_path), "shared", part)
        check_snapshot(str(tmp_path), loop_of_it)()
        part.settings["parameters"] = [*lines, "buffer gone: [4] torch.float32"]
        write_part(str(tmp_path), "shared", part)
        return error_of(lambda: check_snapshot(str(tmp_path), loop_of_it))

    [words] = run_in_process(work, 1)
    assert "is of another model or parameter set: ['buffer gone'] differ" in words


def test_infinities_of_a_buffer_are_restored():
    """Of a causal mask that has grown in training."""
    mask = torch.full((3,), -math.inf)
    assert torch.equal(_taken(Contents(tensors={"buffer.mask": mask}), "buffer.mask", mask), mask)
