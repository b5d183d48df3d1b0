"""
Buffers that are not alike: caches that grow, shapes that part, infinities, layouts; and parameters that are laid out
anew.
"""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn

import slowmo_hf
from harness import patience, run_workers
from slowmo_hf import SlowMoConfig, SlowMoOptimizer, run_in_process
from slowmo_hf.upstream import non_persistent_buffers


class Rotary(nn.Module):
    """A cache as long as the longest batch yet, and a statistic."""

    def __init__(self, persistent=False):
        super().__init__()
        torch.manual_seed(0)
        self.persistent = persistent
        self.l = nn.Linear(4, 4)
        self.register_buffer("cos", torch.ones(4), persistent=persistent)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        if len(x) > len(self.cos):
            self.register_buffer("cos", torch.arange(len(x)) * 1.0, persistent=self.persistent)
        self.mean.lerp_(x.mean(0), 0.5)
        return self.l(x)


def optimizer_of(model, **settings):
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    return SlowMoOptimizer(inner, SlowMoConfig(**{"sync_every": 2, "timeout_seconds": 60} | settings))


def step(model, optimizer, x):
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_which_buffers_are_not_persistent():
    model = nn.ModuleDict({"a": Rotary(), "b": Rotary(persistent=True), "norm": nn.BatchNorm1d(2)})
    assert non_persistent_buffers(model) == {"a.cos"}
    assert {name for name, _ in model.named_buffers()} - model.state_dict().keys() == {"a.cos"}


@pytest.mark.parametrize("settings", [{}, {"overlap_steps": 1}, {"base": "sgp"}, {"model_buffers": "local"}])
def test_buffers_that_are_not_saved_are_each_workers_own(settings):
    """Longer caches on some ranks; the statistic beside them is averaged where it should be."""

    def work(rank):
        model = Rotary()
        optimizer = optimizer_of(model, **settings)
        for k in range(4):
            step(model, optimizer, torch.full((6 + 2 * rank, 4), float(rank + k)))
        cos = model.cos.tolist()
        with slowmo_hf.consensus(optimizer):
            shown, statistic = model.cos.tolist(), model.mean.clone()
        return cos, shown, statistic

    told = run_in_process(work, 3)
    for rank, (cos, shown, statistic) in enumerate(told):
        assert cos == shown == [float(i) for i in range(6 + 2 * rank)]
        assert torch.equal(statistic, told[0][2])
    assert told[0][2].abs().max() > 0


SHAPES = r"buffer 'cos' has shape \[6\] torch.float32 on rank 0, \[8\] torch.float32 on rank 1.*persistent=False"


@pytest.mark.parametrize("settings", [{}, {"overlap_steps": 1}, {"base": "sgp"}])
def test_saved_buffers_of_two_shapes_are_told(settings):
    def work(rank):
        model = Rotary(persistent=True)
        optimizer = optimizer_of(model, **settings)
        for _ in range(5):
            step(model, optimizer, torch.ones(6 + 2 * rank, 4))

    with pytest.raises(RuntimeError, match=SHAPES):
        run_in_process(work, 2)


def one_is_longer():
    """The other rank's has not changed at all. Words of every rank."""
    accelerator = Accelerator(cpu=True)
    model = Rotary(persistent=True)
    net, optimizer = accelerator.prepare(model, optimizer_of(model, timeout_seconds=patience(20)))
    try:
        for _ in range(2):
            accelerator.backward(net(torch.ones(3 + 5 * dist.get_rank(), 4)).square().mean())
            optimizer.step()
    except ValueError as error:
        return str(error)
    return "nothing"


def test_the_words_are_the_same_on_every_rank():
    first, second = run_workers(one_is_longer, 2)
    assert first == second
    assert "buffer 'cos' has shape [4] torch.float32 on rank 0, [8] torch.float32 on rank 1" in first


def test_saved_buffers_of_two_shapes_may_be_local():
    def work(rank):
        model = Rotary(persistent=True)
        optimizer = optimizer_of(model, model_buffers="local")
        for _ in range(5):
            step(model, optimizer, torch.ones(6 + 2 * rank, 4))
        with slowmo_hf.consensus(optimizer):
            return len(model.cos), model.l.weight.detach().clone()

    (short, first), (long, second) = run_in_process(work, 2)
    assert (short, long) == (6, 8)
    assert torch.equal(first, second)


def grown(folder):
    """Saved inside a round, gone on with by new objects: every rank's cache and statistic after it."""
    rank = dist.get_rank()

    def run(resume):
        accelerator = Accelerator(cpu=True)
        model = Rotary()
        net, optimizer = accelerator.prepare(model, optimizer_of(model, sync_every=4))
        slowmo_hf.register_for_checkpointing(accelerator, optimizer)
        if resume:
            accelerator.load_state(str(folder / "saved"))
        found = {}
        for k in range(7 if resume else 1, 10):
            length = 6 + 2 * rank if k < 4 else 3  # the cache has grown before the save, and is not asked to later
            accelerator.backward(net(torch.full((length, 4), k / 10 + rank)).square().mean())
            optimizer.step()
            optimizer.zero_grad()
            if k == 6 and not resume:
                accelerator.save_state(str(folder / "saved"))
            found[k] = [t.detach().clone() for t in (model.cos, model.mean, model.l.weight)]
        return found

    return run(False), run(True)


def test_a_cache_comes_back_as_long_as_it_was(tmp_path):
    for rank, (whole, again) in enumerate(run_workers(grown, 2, tmp_path)):
        assert sorted(again) == [7, 8, 9]
        assert len(again[7][0]) == 6 + 2 * rank
        for k, values in again.items():
            assert all(torch.equal(a, b) for a, b in zip(values, whole[k], strict=True)), k


# ---- infinities ----


def one_bad_batch(rank, settings, at, value=float("inf"), steps=4):
    """A batch with infinity on one worker, whose step is skipped, as a gradient scaler skips it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    optimizer = optimizer_of(model, **settings)
    draw = torch.Generator().manual_seed(rank)
    for k in range(steps):
        x = torch.randn(4, 4, generator=draw)
        if (rank, k) == at:
            x[0, 0] = value
        model(x).square().mean().backward()
        if (rank, k) == at:
            for p in model.parameters():
                p.grad.zero_()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


INFINITE = r"rank 1 on \S+, step {}: buffer '1.running_mean', buffer '1.running_var' holds NaN or infinity"


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("settings", [{}, {"overlap_steps": 1}, {"compression": "int8"}, {"base": "sgp"}])
def test_statistics_that_are_not_finite_are_told(settings, value):
    with pytest.raises(RuntimeError, match=INFINITE.format(2)):
        run_in_process(lambda rank: one_bad_batch(rank, settings, (1, 0), value), 2)


def told_by_processes():
    """Two workers of two processes: what each says."""
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    config = {"processes_per_worker": "2", "timeout_seconds": patience(20)}
    net, optimizer = accelerator.prepare(model, optimizer_of(model, **config))
    try:
        for _ in range(2):
            net(torch.ones(4, 4)).sum().backward()
            model[1].running_mean.fill_(float("inf") if dist.get_rank() == 2 else 1.0)
            optimizer.step()
    except ValueError as error:
        return str(error), bool(model[1].running_mean.isfinite().all())
    return "nothing", True


@pytest.mark.slow
def test_every_process_of_every_worker_says_the_same():
    """Rank 2 is the first process of the second worker, whose buffers count there."""
    told = run_workers(told_by_processes, 4)
    assert len({words for words, _ in told}) == 1
    assert "rank 2 on" in told[0][0]
    assert "buffer '1.running_mean' holds NaN or infinity" in told[0][0]
    assert [is_finite for _, is_finite in told][:2] == [True, True]


def test_the_others_statistics_stay_finite():
    kept = {}

    def work(rank):
        made = []

        def norm(size):
            made.append(torch.nn.modules.batchnorm.BatchNorm1d(size))
            return made[-1]

        model = nn.Sequential(nn.Linear(4, 4), norm(4), nn.Linear(4, 1))
        optimizer = optimizer_of(model)
        try:
            for k in range(2):
                x = torch.ones(4, 4)
                x[0, 0] = float("inf") if (rank, k) == (1, 0) else 0
                model(x).sum()
                for p in model.parameters():
                    p.grad = torch.zeros_like(p)
                optimizer.step()
        finally:
            kept[rank] = made[0].running_mean.clone()

    with pytest.raises(RuntimeError, match="holds NaN or infinity"):
        run_in_process(work, 2)
    assert torch.isfinite(kept[0]).all()
    assert not torch.isfinite(kept[1]).all()


def test_a_view_tells_them_too():
    """The bad batch comes behind the last round."""

    def work(rank):
        _, optimizer = one_bad_batch(rank, {}, (1, 2), steps=3)
        with slowmo_hf.consensus(optimizer):
            pass

    with pytest.raises(RuntimeError, match=INFINITE.format(3)):
        run_in_process(work, 2)


def test_constants_and_local_buffers_may_be_infinite():
    """A mask of infinities that never changes; statistics that are each worker's own."""

    def work(rank):
        model, _ = one_bad_batch(rank, {"model_buffers": "local"}, (1, 0))
        masked = nn.Linear(4, 1)
        masked.register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1))
        optimizer = optimizer_of(masked)
        for _ in range(4):
            step(masked, optimizer, torch.ones(2, 4))
        return model[1].running_mean.isfinite().all().item(), masked.mask.isinf().sum().item()

    assert run_in_process(work, 2) == [(True, 3), (False, 3)]


# ---- layouts ----


def with_buffer(make, change=lambda buffer: None):
    def work(rank):
        model = nn.Linear(3, 1)
        model.register_buffer("b", make())
        optimizer = optimizer_of(model)
        for _ in range(4):
            change(model.b)
            step(model, optimizer, torch.ones(2, 3))
        return model.b

    return run_in_process(work, 2)


def compressed_rows():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.eye(3).to_sparse_csr()


KINDS = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "compressed rows": compressed_rows,
    "meta": lambda: torch.ones(3, device="meta"),
    "complex": lambda: torch.ones(3, dtype=torch.complex64),
    "empty": lambda: torch.ones(0, 3),
    "a number": lambda: torch.tensor(3),
    "bool": lambda: torch.tensor([True, False]),
    "expanded": lambda: torch.ones(1).expand(4),
}


@pytest.mark.parametrize("kind", KINDS)
def test_constant_buffers_of_every_kind(kind):
    for found in with_buffer(KINDS[kind]):
        if not found.is_meta:
            assert torch.equal(found.to_dense(), KINDS[kind]().to_dense())


def test_complex_buffers_are_averaged():
    """Worker i adds (i + 1) (1 + 10j) at each step. All start, after that of step 1, with worker 0's 1 + 10j."""

    def work(rank):
        model = nn.Linear(3, 1)
        model.register_buffer("b", torch.zeros(2, dtype=torch.complex64))
        optimizer = optimizer_of(model)
        for _ in range(4):
            model.b += (rank + 1) * (1 + 10j)
            step(model, optimizer, torch.ones(2, 3))
        return model.b.tolist()

    assert run_in_process(work, 2) == [[5.5 + 55j] * 2] * 2


def test_a_sparse_buffer_that_changes_is_told():
    with pytest.raises(RuntimeError, match=r"buffer 'b' is sparse .* and has changed.*only dense"):
        with_buffer(KINDS["sparse"], lambda b: b.values().mul_(2))


# ---- parameters laid out anew ----


def converted(rank, who, at, settings, look=False):
    torch.manual_seed(0)
    model = nn.Conv2d(3, 4, 3)
    optimizer = optimizer_of(model, **settings)
    draw = torch.Generator().manual_seed(rank)
    for k in range(1, 9):
        if k == at and rank in who:
            model.to(memory_format=torch.channels_last)
        step(model, optimizer, torch.randn(2, 3, 6, 6, generator=draw))
        if look and k == at:
            with slowmo_hf.consensus(optimizer):
                pass


@pytest.mark.parametrize("who", [(0, 1), (1,)])
@pytest.mark.parametrize(
    ("settings", "at"), [({}, 4), ({"sync_every": 4, "overlap_steps": 2}, 5), ({"sync_every": 4, "base": "sgp"}, 6)]
)
def test_channels_last_after_the_start_is_told(settings, at, who):
    """Before a round; while one travels; before an exchange. Weights would meet other elements' anchors."""
    with pytest.raises(RuntimeError, match=r"laid out anew"):
        run_in_process(lambda rank: converted(rank, who, at, settings), 2)


def test_a_view_tells_it_too():
    with pytest.raises(RuntimeError, match=r"laid out anew"):
        run_in_process(lambda rank: converted(rank, (0, 1), 5, {"sync_every": 4}, look=True), 2)


def test_channels_last_before_the_start_is_fine_and_a_pointwise_convolution_has_one_order():
    def work(rank):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last), nn.Conv2d(4, 2, 1))
        optimizer = optimizer_of(model)
        draw = torch.Generator().manual_seed(rank)
        for k in range(4):
            if k == 1:
                model[1].to(memory_format=torch.channels_last)
            step(model, optimizer, torch.randn(2, 3, 6, 6, generator=draw))
        return [p.detach().contiguous() for p in model.parameters()]

    def plain():
        models, draws = [], [torch.Generator().manual_seed(rank) for rank in range(2)]
        for _ in range(2):
            torch.manual_seed(0)
            models.append(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)))
        # beta 0.5: v = 0.5 v + (anchor - mean); x = anchor - v
        anchors = [p.detach().clone() for p in models[0].parameters()]
        velocities = [torch.zeros_like(a) for a in anchors]
        for k in range(4):
            for model, draw in zip(models, draws, strict=True):
                model.zero_grad()
                model(torch.randn(2, 3, 6, 6, generator=draw)).square().mean().backward()
                with torch.no_grad():
                    for p in model.parameters():
                        p -= 0.1 * p.grad
            if k % 2:
                for i, (a, v) in enumerate(zip(anchors, velocities, strict=True)):
                    own = [list(model.parameters())[i] for model in models]
                    v.mul_(0.5).add_(a - torch.stack([p.detach() for p in own]).mean(0))
                    a.sub_(v)
                    for p in own:
                        p.data.copy_(a)
        return anchors

    expected = plain()
    for found in run_in_process(work, 2):
        for p, q in zip(found, expected, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
