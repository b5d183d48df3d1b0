"""Buffers that differ in form, that are not finite, or odd: what is an error names them."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn

import slowmo_hf
from buffered import Loop
from harness import run_workers
from slowmo_hf import run_in_process
from slowmo_hf.checkpoints.state import check_snapshot, write_snapshot
from tiny import error_of

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
