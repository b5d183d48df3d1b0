"""Buffers: which are averaged, which are each worker's own, and what is an error that names them."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn

import slowmo_hf
from harness import patience, run_workers
from slowmo_hf import SlowMoConfig, SlowMoOptimizer, run_in_process
from slowmo_hf.checkpoints.files import read_part, write_part
from slowmo_hf.checkpoints.state import check_snapshot, write_snapshot
from slowmo_hf.contents import CheckpointError
from slowmo_hf.upstream import non_persistent_buffers
from tiny import error_of

SYNC_EVERY = 2
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


class Loop:
    """One worker's training; `lengths` are of its batches, in turn."""

    def __init__(self, rank, model, **settings):
        self.model = model
        config = SlowMoConfig(**{"sync_every": SYNC_EVERY, "timeout_seconds": patience(20)} | settings)
        self.optimizer = SlowMoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), config)
        self.draw = torch.Generator().manual_seed(rank)

    def step(self, length=5):
        self.model(torch.randn(length, 4, generator=self.draw)).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def test_which_buffers_are_not_persistent():
    model = nn.ModuleDict({"a": Growing(), "b": Growing(persistent=True), "norm": nn.BatchNorm1d(2)})
    assert non_persistent_buffers(model) == {"a.cos"}
    assert {name for name, _ in model.named_buffers()} - model.state_dict().keys() == {"a.cos"}
    model["b"].register_buffer("cos", torch.ones(9), persistent=False)
    model["a"].register_buffer("cos", torch.ones(9), persistent=True)
    assert non_persistent_buffers(model) == {"b.cos"}
    assert non_persistent_buffers(Growing()) == {"cos"}


# ---- a buffer that is not persistent is each worker's own ----


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


# ---- a persistent one that differs in form ----


def forms(rank, persistent, policy, look, kind):
    """The error of a worker whose buffer differs; what its weights are then, and were."""
    loop = Loop(rank, nn.BatchNorm1d(4), sync_every=4, model_buffers=policy)
    made = {
        "shape": torch.zeros(6 + 2 * rank),
        "dtype": torch.zeros(6, dtype=(torch.float32, torch.float64)[rank]),
        "strides": (torch.zeros(2, 3), torch.zeros(3, 2).t())[rank],
    }
    loop.step()
    loop.model.register_buffer("cos", made[kind], persistent=persistent)
    if look:
        words = error_of(lambda: slowmo_hf.consensus(loop.optimizer).__enter__())
    else:
        words = error_of(lambda: [loop.step() for _ in range(3)])
    return words, loop.model.running_mean.clone(), loop.model.cos.clone()


@pytest.mark.parametrize("kind", ["shape", "dtype", "strides"])
@pytest.mark.parametrize("look", [False, True], ids=["round", "view"])
def test_a_persistent_buffer_of_another_form_is_an_error_on_all(look, kind):
    said = {
        "shape": "has shape [6] on rank 0, [8] on rank 1",
        "dtype": "has dtype torch.float32 on rank 0, torch.float64 on rank 1",
        "strides": "has strides [3, 1] on rank 0, [1, 2] on rank 1",
    }[kind]

    def work(rank):
        return forms(rank, True, "average", look, kind)

    (first, mean, _), (other, other_mean, _) = run_in_process(work, 2)
    assert first == other
    assert first.startswith(f"ValueError: step {1 if look else 4}: buffer 'cos' {said}; "), first
    assert "persistent=False" in first
    assert not torch.equal(mean, other_mean), "nothing is mixed"


def test_over_gloo_too():
    for words, *_ in run_workers(over_gloo, 2):
        assert "buffer 'cos' has shape [6] on rank 0, [8] on rank 1" in words


def over_gloo():
    return forms(dist.get_rank(), True, "average", False, "shape")


@pytest.mark.parametrize("look", [False, True], ids=["round", "view"])
@pytest.mark.parametrize(("persistent", "policy"), [(False, "average"), (True, "local")])
def test_where_it_is_the_workers_own_nothing_is_said(persistent, policy, look):
    def work(rank):
        return forms(rank, persistent, policy, look, "shape")

    for rank, (words, _, cos) in enumerate(run_in_process(work, 2)):
        assert words == ""
        assert len(cos) == 6 + 2 * rank


def test_a_persistent_one_that_grows_alike_everywhere_is_averaged():
    def work(rank):
        model = nn.BatchNorm1d(4)
        model.register_buffer("seen", torch.zeros(1))
        loop = Loop(rank, model)
        for _ in range(6):
            model.register_buffer("seen", torch.cat([model.seen, torch.full((1,), 2.0 * rank)]))
            loop.step()
        return model.seen.tolist()

    assert run_in_process(work, 2) == [[0.0, 0.0] + [1.0] * 5] * 2  # the first two are the start's: rank 0's


def test_one_that_is_on_one_rank_alone_is_named():
    def work(rank):
        loop = Loop(rank, nn.BatchNorm1d(4))
        loop.step()
        if rank:
            loop.model.register_buffer("late", torch.zeros(2))
        return error_of(loop.step)

    for words in run_in_process(work, 2):
        assert "buffer 'late' is on rank 1, and not on rank 0" in words


# ---- not finite ----


class Net(nn.Module):
    """BatchNorm; a mask that means infinity; a level that the test moves."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.register_buffer("mask", torch.full((4,), float("-inf")))
        self.register_buffer("level", torch.zeros(4))

    def forward(self, x):
        return self.norm(self.linear(x))


def lost(rank, look, settings, at, name="norm.running_mean", value=float("inf")):
    loop = Loop(rank, Net(), **{"sync_every": 4} | settings)
    for step in range(1, 3 if look else 13):
        if (rank, step) == (1, at):
            loop.model.get_buffer(name)[0] = value
        words = error_of(loop.step)
        if words:
            return words, step, loop.model.norm.running_mean.clone()
    if look:
        words = error_of(lambda: slowmo_hf.consensus(loop.optimizer).__enter__())
    return words, loop.optimizer.outer_loop.attempted_steps, loop.model.norm.running_mean.clone()


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("settings", [{}, {"base": "sgp"}, {"overlap_steps": 2}], ids=str)
@pytest.mark.parametrize("look", [False, True], ids=["round", "view"])
def test_a_buffer_that_is_not_finite_is_an_error_on_all(look, settings, value):
    """Before rank 0 has anything of it."""

    def work(rank):
        return lost(rank, look, settings, 2, value=value)

    (first, step, mean), (other, _, _) = run_in_process(work, 2)
    assert first == other
    at = 2 if look else 4
    assert re.match(
        rf"ValueError: rank 1 on \S+, step {at}: buffer 'norm.running_mean' is not finite \(NaN or infinity\)", first
    ), first
    assert step == at
    assert bool(torch.isfinite(mean).all())


def test_what_is_lost_behind_a_round_that_went_ahead_is_told_too():
    """
    The round of step 8 sets out before anybody has heard of the others, and while it travels a buffer changes for the
    first time: it is compared again before it is averaged.
    """

    def work(rank):
        model = Net()
        model.norm.track_running_stats = False
        loop = Loop(rank, model, sync_every=4, overlap_steps=2)
        for step in range(1, 15):
            if step == 8:
                loop.model.level += 1 + rank
            if (rank, step) == (1, 9):
                loop.model.level[0] = float("nan")
            words = error_of(loop.step)
            if words:
                return words, step, loop.model.level.clone()
        return words, step, loop.model.level

    (first, step, level), (other, _, _) = run_in_process(work, 2)
    assert first == other
    assert "rank 1 on" in first
    assert "buffer 'level' is not finite" in first
    assert step == 10
    assert level.tolist() == [1.0] * 4


def test_an_infinity_of_a_worker_that_has_not_changed_it_is_told():
    """The mask means infinity; one worker writes numbers into it: the average would be infinite for all."""

    def work(rank):
        loop = Loop(rank, Net())
        loop.step()
        if rank:
            loop.model.mask.zero_()
        return error_of(loop.step)

    first, other = run_in_process(work, 2)
    assert first == other
    assert re.match(r"ValueError: rank 0 on \S+, step 2: buffer 'mask' is not finite", first), first


@pytest.mark.parametrize("look", [False, True], ids=["round", "view"])
def test_local_buffers_are_told_where_a_view_would_average_them(look):
    """Rounds keep them apart, and nothing is said."""

    def work(rank):
        return lost(rank, look, {"model_buffers": "local"}, 2)

    first, other = run_in_process(work, 2)
    assert first[0] == other[0]
    assert first[0] == "" or re.match(r"ValueError: rank 1 on \S+, step 2: buffer .* is not finite", first[0])
    assert bool(first[0]) == look


def test_large_numbers_whose_sum_overflows_are_finite():
    def work(rank):
        loop = Loop(rank, Net(), sync_every=2)
        loop.step()
        loop.model.level.fill_(torch.finfo(torch.float32).max / 2)
        loop.step()
        return loop.model.level

    for level in run_in_process(work, 2):
        assert torch.equal(level, torch.full((4,), torch.finfo(torch.float32).max / 2))


# ---- odd ones ----


def averaged(made, change, **settings):
    """What two workers have of a persistent buffer after a round; `change` moves it by hand."""

    def work(rank):
        model = nn.Linear(4, 2)
        model.register_buffer("odd", made)
        loop = Loop(rank, model, **settings)
        loop.step()
        change(model, rank)
        loop.step()
        with slowmo_hf.consensus(loop.optimizer):
            pass
        return model.odd

    return run_in_process(work, 2)


warnings.filterwarnings("ignore", message=".*quint8.*")  # torch's, of quantised tensors that go
warnings.filterwarnings("ignore", message=".*Sparse CSR.*")  # torch's, of a beta
CONSTANTS = {
    "sparse": torch.eye(3).to_sparse(),
    "compressed": torch.eye(3).to_sparse_csr(),
    "meta": torch.ones(3, device="meta"),
    "complex": torch.ones(3, dtype=torch.complex64),
    "none": torch.zeros(0, 3),
    "one": torch.tensor(3.0),
    "bool": torch.tensor([True, False]),
    "NaN": torch.tensor([float("nan"), float("inf")]),
    "expanded": torch.arange(3.0).expand(2, 3),
    "quantised": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8),
    "float8": torch.ones(3).to(torch.float8_e4m3fn),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_a_constant_of_any_kind_stays(name):
    made = CONSTANTS[name]
    for odd in averaged(made.clone() if name != "expanded" else made, lambda model, rank: None):
        assert (odd.layout, odd.dtype, odd.shape, odd.device) == (made.layout, made.dtype, made.shape, made.device)
        if not odd.is_meta:
            found, right = (t.dequantize() if t.is_quantized else t.to_dense() for t in (odd, made))
            assert (
                torch.equal(found.float().nan_to_num(7), right.float().nan_to_num(7))
                if not odd.is_complex()
                else (torch.equal(found, right))
            )


def moved(value):
    def change(model, rank):
        model.odd = value(rank)

    return change


MOVED = {
    "complex64": (lambda r: torch.full((3,), 1 + 2j * r), torch.full((3,), 1 + 1j)),
    "complex128": (
        lambda r: torch.full((3,), 1 + 2j * r, dtype=torch.complex128),
        torch.full((3,), 1 + 1j, dtype=torch.complex128),
    ),
    "none": (lambda r: torch.zeros(0, 4), torch.zeros(0, 4)),
    "one": (lambda r: torch.tensor(2.0 * r), torch.tensor(1.0)),
    "bool": (lambda r: torch.tensor([r == 1, False]), torch.tensor([True, False])),
    "int8": (lambda r: torch.tensor([r, 5 - r], dtype=torch.int8), torch.tensor([1, 5], dtype=torch.int8)),
    "bfloat16": (lambda r: torch.full((3,), 2.0 * r).bfloat16(), torch.ones(3).bfloat16()),
    "float8": (lambda r: torch.full((3,), 2.0 * r).to(torch.float8_e4m3fn), torch.ones(3).to(torch.float8_e4m3fn)),
    "permuted": (lambda r: torch.full((2, 3), 2.0 * r).t(), torch.ones(3, 2)),
}


@pytest.mark.parametrize("name", MOVED)
def test_one_that_changes_is_averaged(name):
    value, right = MOVED[name]
    for odd in averaged(torch.zeros_like(right), moved(value)):
        assert odd.dtype == right.dtype
        assert torch.equal(odd.float(), right.float()) if not right.is_complex() else torch.equal(odd, right)


REFUSED = {
    "sparse": (lambda r: (torch.eye(3) * (r + 1)).to_sparse(), "layout torch.sparse_coo"),
    "compressed": (lambda r: (torch.eye(3) * (r + 1)).to_sparse_csr(), "layout torch.sparse_csr"),
    "expanded": (lambda r: torch.full((1, 3), float(r + 1)).expand(2, 3), r"strides \(0, 1\)"),
    "with holes": (lambda r: torch.full((2, 6), float(r))[:, ::2], r"strides \(6, 2\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_one_that_changes_and_has_no_average_is_named(name):
    value, form = REFUSED[name]
    with pytest.raises(RuntimeError) as error:
        averaged(value(-1) if name != "with holes" else torch.zeros(2, 3), moved(value))
    assert re.search(rf"buffer 'odd' changes in training, and has {form}", str(error.value.__cause__)), error.value


def test_one_made_in_inference_mode_is_named():
    def change(model, rank):
        with torch.inference_mode():
            model.odd = torch.full((2,), float(rank))

    with pytest.raises(RuntimeError) as error:
        averaged(torch.zeros(2), change)
    assert "buffer 'odd' changes in training, and was made inside torch.inference_mode()" in str(error.value.__cause__)


def as_bytes(tensor):
    return tensor.contiguous().view(torch.uint8).tolist()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.bool], ids=str)
def test_odd_ones_are_saved_and_restored(tmp_path, dtype):
    """Each worker's own, inside a round; and what the last round has averaged."""

    def work(rank):
        model = nn.Linear(4, 2)
        model.register_buffer("odd", torch.zeros(3, 2).t().to(dtype))
        loop = Loop(rank, model)
        for step in range(3):
            loop.model.odd.copy_((torch.arange(6).view(2, 3) * (rank + step)).to(dtype))
            loop.step()
        before = as_bytes(loop.model.odd)
        write_snapshot(str(tmp_path), loop.optimizer.outer_loop, shared=rank == 0, objects={})
        loop.optimizer.outer_loop.workers.world.gather_objects(None)
        loop.model.odd.zero_()
        check_snapshot(str(tmp_path), loop.optimizer.outer_loop)()
        after = as_bytes(loop.model.odd)
        return before, after

    for before, after in run_in_process(work, 2):
        assert before == after
