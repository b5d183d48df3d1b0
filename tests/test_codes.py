"""Codes of compressed messages: their numbers, nothing is lost, what may not be touched."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import slowmo_hf
from harness import run_workers
from slowmo_hf import SlowMoConfig, SlowMoOptimizer, run_in_process
from slowmo_hf.algorithm.codec import BLOCK, BFloat16, Int8
from slowmo_hf.algorithm.layout import flat_anchors, flat_layouts
from slowmo_hf.algorithm.starts import Base
from slowmo_hf.names import CODES, find
from slowmo_hf.wire.averages import Averages
from slowmo_hf.wire.communicator import Communicator
from slowmo_hf.wire.error_feedback import ErrorFeedback, shard_elements
from slowmo_hf.wire.reduction import Launch, bytes_per_message
from slowmo_hf.wire.two_stage import TwoStage
from tiny import held_back, train_node_workers, values

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
WIDE = (torch.float32, torch.float64)


# ---- numbers ----


def block(*first, dtype=torch.float32):
    """A block that begins with these and is 0 elsewhere."""
    return torch.tensor([*first, *[0.0] * (BLOCK - len(first))], dtype=dtype)


@pytest.mark.parametrize("dtype", WIDE)
def test_int8_by_hand(dtype):
    """
    max |x| = 127, so the scale is 1 and codes are the values to the nearest, ties to even. The second block has a
    scale of its own.
    """
    codes, scales = Int8().quantise(
        torch.cat([block(127, 2.5, 3.5, -2.5, 0.4, -127, dtype=dtype), block(-254, 3, 1, dtype=dtype)])
    )
    assert codes[:7].tolist() == [127, 2, 4, -2, 0, -127, 0]
    assert codes[BLOCK : BLOCK + 4].tolist() == [-127, 2, 0, 0]  # -127, 1.5 and 0.5 steps of 2
    assert scales.tolist() == [1, 2]
    assert Int8().dequantise(codes, scales)[[0, 1, BLOCK, BLOCK + 1]].tolist() == [127, 2, -254, 4]
    assert Int8().dequantise(codes, scales).dtype == scales.dtype == dtype


def test_bf16_by_hand():
    """Numbers from 1 on are 1/128 apart; what lies half-way goes to the even one."""
    given, right = [1 + 1 / 256, 1 + 3 / 256, 1 + 1 / 128, -0.0, 1e30], [1, 1 + 1 / 64, 1 + 1 / 128, 0]
    codes, scales = BFloat16().quantise(torch.tensor(given, dtype=torch.float64))
    assert BFloat16().dequantise(codes, scales)[:4].tolist() == right
    assert abs(float(BFloat16().dequantise(codes, scales)[4]) / 1e30 - 1) <= 2**-8


def hard_values(dtype):
    """By name: what rounding may trip over."""
    torch.manual_seed(0)
    info = torch.finfo(dtype)
    normal = torch.randn(4 * BLOCK, dtype=dtype)
    return {
        "normal": normal,
        "every size": normal * 10.0 ** torch.randint(-30, 30, (4 * BLOCK,)),
        "zeros": torch.zeros(2 * BLOCK, dtype=dtype),
        "one huge": torch.cat([block(info.max / 2, 1, -1, dtype=dtype), normal]),
        "denormals": normal * info.tiny / 4,
        "between": normal * info.tiny * 40,  # less than 127 of the smallest scale
        "smallest": block(info.smallest_normal, info.tiny * 2**-20, -info.tiny * 200, dtype=dtype),
    }


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("name", hard_values(torch.float32))
def test_int8_is_off_by_half_a_scale_at_most(dtype, name):
    given = hard_values(dtype)[name]
    codes, scales = Int8().quantise(given)
    error = (given - Int8().dequantise(codes, scales)).view(-1, BLOCK).abs()
    assert (error <= scales[:, None] * (0.5 + 1e-4)).all()
    assert (codes.abs() <= 127).all()
    assert (scales > 0).all()
    huge = given.view(-1, BLOCK).abs().amax(1)
    assert (scales <= torch.maximum(huge / 127 * (1 + 1e-6), torch.tensor(torch.finfo(dtype).tiny, dtype=dtype))).all()


@pytest.mark.parametrize("code", [find(path)() for path in CODES.values()], ids=CODES)
@pytest.mark.parametrize("dtype", WIDE)
def test_what_a_message_says_and_what_stays_are_the_value(dtype, code):
    """Longer than a processor's cache, so in several runs; bit for bit the quantisation of the whole."""
    torch.manual_seed(0)
    given = torch.randn(2**18 + 3 * BLOCK, dtype=dtype)
    message, left, read = (
        torch.empty(code.message_bytes(len(given), dtype), dtype=torch.uint8),
        given.clone(),
        torch.empty_like(given),
    )
    code.encode_(left, message)
    code.decode_(message, read)
    assert torch.equal(read, code.dequantise(*code.quantise(given)))
    assert torch.equal(left, given - read)
    code.decode_(message, read, add=True)
    assert torch.equal(read, 2 * code.dequantise(*code.quantise(given)))


def test_sizes_by_hand():
    """
    int8: 256 codes of a byte and a scale of 4 or 8; 3 blocks have 12 bytes of scales, 780 in all, and 784 is a
    multiple of 8.
    """
    assert Int8().message_bytes(512, torch.float32) == 512 + 8
    assert Int8().message_bytes(768, torch.float32) == 784
    assert Int8().message_bytes(256, torch.float64) == 264
    assert BFloat16().message_bytes(256, torch.float64) == 512
    assert [shard_elements(n, 4) for n in (1, 3, 1024, 1025, 4097)] == [256, 256, 256, 512, 1280]


@pytest.mark.parametrize("code", [find(path)() for path in CODES.values()], ids=CODES)
@pytest.mark.parametrize("dtype", WIDE)
def test_a_message_of_zero_bytes_says_0(dtype, code):
    """What `ErrorFeedback.pack_` sends for a worker that brings nothing."""
    out = torch.ones(2 * BLOCK, dtype=dtype)
    code.decode_(torch.zeros(code.message_bytes(len(out), dtype), dtype=torch.uint8), out)
    assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize("name", CODES)
def test_every_code_is_told_of(name):
    for told in (SlowMoConfig.__doc__, (ROOT / "docs/wire.md").read_text()):
        assert f'"{name}"' in told


@pytest.mark.cuda
@pytest.mark.parametrize("code", [find(path)() for path in CODES.values()], ids=CODES)
@pytest.mark.parametrize("dtype", WIDE)
def test_cuda_rounds_as_the_cpu(dtype, code):
    for name, given in hard_values(dtype).items():
        codes, scales = code.quantise(given)
        on_gpu = [part.cpu() for part in code.quantise(given.cuda())]
        assert torch.equal(on_gpu[0], codes), name
        assert torch.equal(on_gpu[1], scales), name
        assert torch.equal(code.dequantise(codes.cuda(), scales.cuda()).cpu(), code.dequantise(codes, scales)), name


# ---- nothing is lost ----


ROUNDS, WEIGHTS = 12, [[4, 4, 4], [4, 1, 3], [2, 0, 5]]  # steps of three workers since the last round, in turn


def telescope(rank, name, elements, bucket_bytes):
    """Rounds of random displacements in float64: what was applied, what is held back, and what was true."""
    param = torch.nn.Parameter(torch.zeros(elements, dtype=torch.float64))
    anchors = flat_anchors(flat_layouts([[param]]))
    averages = Averages(Communicator(20.0, CPU), bucket_bytes // 2)
    longest = [bytes_per_message(item, bucket_bytes, ahead=False) for item in anchors]
    buckets = [bucket for item, most in zip(anchors, longest, strict=True) for bucket in item.buckets(most)]
    feedback = ErrorFeedback(averages, buckets, find(CODES[name])())
    reduction = TwoStage(averages, feedback, ahead=False)
    draw = torch.Generator().manual_seed(rank)
    applied, true, squares = torch.zeros(elements).double(), torch.zeros(elements).double(), []
    for number in range(ROUNDS):
        weights = WEIGHTS[number % len(WEIGHTS)]
        averages.weigh(weights)
        # The anchor is 0.
        param.data = torch.randn(elements, generator=draw, dtype=torch.float64) * 10.0 ** (number % 5 - 2)
        true -= param.data * averages.weight / averages.total_weight
        square = 0.0
        launch = Launch(reduction)
        launch.send(Base())
        for bucket, total, square_sum in launch.sums():
            bucket.of(applied).add_(total / averages.total_weight)
            square += square_sum / averages.total_weight
        squares.append((square, averages.weight / averages.total_weight * float(param.data.square().sum())))
    owned = {held.bucket.offset: held.owned for held in feedback.residuals}
    return (
        applied,
        true,
        squares,
        reduction.saved(agree=False, keep=True).own.tensors["residual.0"],
        owned,
        [(b.offset, b.elements) for b in buckets],
    )


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize(("elements", "bucket_bytes"), [(2, 2**20), (1000, 2**20), (5000, 2**14), (1023, 1024)])
def test_what_is_applied_and_what_is_held_back_is_what_was_true(name, elements, bucket_bytes):
    """
    sum over rounds of the pseudo-gradients + (e_1 + ... + e_m + E) / m = sum over rounds of the weighted mean
    displacements.
    """
    workers = run_in_process(lambda rank: telescope(rank, name, elements, bucket_bytes), 3)
    right = sum(true for _, true, *_ in workers)
    held = sum(own for _, _, _, own, _, _ in workers)
    for rank, (_, _, _, _, owned, buckets) in enumerate(workers):
        for offset, size in buckets:
            first = rank * len(owned[offset])
            # The rest of the last shards is filling, and holds nothing.
            mine = max(0, min(size - first, len(owned[offset])))
            held[offset + first : offset + first + mine] += owned[offset][:mine]
            assert not owned[offset][mine:].any()
    assert held.abs().max() > 0
    for applied, _, squares, *_ in workers:
        assert torch.equal(applied, workers[0][0]), "all have applied the same"
        torch.testing.assert_close(applied + held / 3, right, rtol=0, atol=1e-9)  # displacements are up to 1e3
        for number, (square, _) in enumerate(squares):  # the squared norm is exact, not a quantised one
            assert square == pytest.approx(sum(w[2][number][1] for w in workers), rel=1e-12)
    assert (workers[0][0] - right).abs().max() > 1e-4, "something is held back"


def ends_alone(rank, compression, overlap_steps):
    """
    Fifteen of sixteen workers end after the first round; the other's later displacements are twenty times smaller.
    """
    param = torch.nn.Parameter(torch.zeros(4096))
    config = SlowMoConfig.local_sgd(4, overlap_steps=overlap_steps, compression=compression)
    optimizer = SlowMoOptimizer(torch.optim.SGD([param], lr=1.0), config)
    draw = torch.Generator().manual_seed(rank)
    with slowmo_hf.join(optimizer):
        for step in range(12 if rank == 0 else 4):
            param.grad = torch.randn(4096, generator=draw) * (1.0 if step < 4 else 0.05)
            optimizer.step()
    return param.detach().clone()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "overlap_steps", "most"), [("int8", 0, 0.003), ("bf16", 0, 0.001), ("int8", 2, 0.04), ("bf16", 2, 0.01)]
)
def test_what_is_held_back_is_not_applied_many_times_where_one_worker_is_left(name, overlap_steps, most):
    """
    The end's distance to the uncompressed run's, over its length. W is 1 of m = 16: all residuals times m / W would
    come to 0.14 and 0.034. Behind the computation the one that is left applies its own so, which rounding of its first
    message alone would do (0.038, 0.009).
    """
    exact, found = (
        run_in_process(lambda rank, c=c: ends_alone(rank, c, overlap_steps), 16)[0] for c in ("none", name)
    )
    assert 0 < (found - exact).norm() / exact.norm() < most


# ---- what may not be touched ----


@pytest.mark.parametrize("name", CODES)
def test_a_look_is_exact_and_leaves_the_residuals(name):
    def work(rank):
        param = torch.nn.Parameter(torch.zeros(700, dtype=torch.float64))
        optimizer = SlowMoOptimizer(torch.optim.SGD([param], lr=0.1), SlowMoConfig(sync_every=2, compression=name))
        draw = torch.Generator().manual_seed(rank)
        for _ in range(5):
            param.grad = torch.randn(700, generator=draw, dtype=torch.float64)
            optimizer.step()
        local = param.detach().clone()
        before = held_back(optimizer)
        with slowmo_hf.consensus(optimizer):
            shown = param.detach().clone()
        after = held_back(optimizer)
        assert torch.equal(param, local)
        assert all(before[key].any() and torch.equal(before[key], after[key]) for key in before)
        return local, shown

    found = run_in_process(work, 3)
    right = sum(local for local, _ in found) / 3
    for _, shown in found:
        torch.testing.assert_close(shown, right, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_are_named(name, bad):
    def work(rank):
        param = torch.nn.Parameter(torch.zeros(2000))
        optimizer = SlowMoOptimizer(
            torch.optim.SGD([param], lr=0.1), SlowMoConfig(sync_every=2, compression=name, bucket_bytes=4096)
        )
        for step in range(4):
            param.grad = torch.ones(2000)
            if (rank, step) == (1, 2):
                param.grad[1234] = bad
            optimizer.step()

    with pytest.raises(RuntimeError) as raised:
        run_in_process(work, 3)
    words = str(raised.value)
    assert "rank 1 on" in words
    assert "step 4: its parameters are not finite (NaN or infinity)" in words
    assert "rank 0 on" not in words


def each_its_part():
    """Two workers of two processes."""
    model, optimizer = train_node_workers(compression="int8")
    return values(model), held_back(optimizer)


def test_each_process_of_a_worker_holds_the_residuals_of_its_part():
    found = run_workers(each_its_part, 4)
    for rank, (weights, held) in enumerate(found):
        assert all(torch.equal(weights[key], found[0][0][key]) for key in weights)
        assert set(held) == {"residual.0", "shard_residual.0"}
        assert held["residual.0"].numel() == (16, 15)[rank % 2]  # of 31 parameters
        assert held["residual.0"].any()
