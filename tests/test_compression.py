"""
Compressed rounds: numbers by hand, nothing lost over rounds, all workers equal bit for bit, bytes as stated, resume,
refusals.
"""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import slowmo_hf
from harness import patience, run_workers
from slowmo_hf import SlowMoConfig, SlowMoOptimizer, run_in_process
from slowmo_hf.algorithm.codec import BLOCK, BFloat16, Int8
from slowmo_hf.algorithm.layout import flat_anchors, flat_layouts
from slowmo_hf.algorithm.starts import Base
from slowmo_hf.checkpoints.state import check_snapshot, write_snapshot
from slowmo_hf.names import CODES, find
from slowmo_hf.wire.averages import Averages
from slowmo_hf.wire.communicator import Communicator
from slowmo_hf.wire.error_feedback import ErrorFeedback, shard_elements
from slowmo_hf.wire.reduction import AllReduce, Launch, bytes_per_message
from slowmo_hf.wire.two_stage import TwoStage
from tiny import Heard, Regression, Rows, train_node_workers, two_groups, values

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


# ---- whole runs ----


STEPS = 9
CONFIGS = {
    "int8": SlowMoConfig(sync_every=3, compression="int8", outer_momentum=0.6, timeout_seconds=patience(30)),
    "int8, buckets": SlowMoConfig(sync_every=3, compression="int8", bucket_bytes=1024, timeout_seconds=patience(30)),
    "int8, buckets, overlapped": SlowMoConfig(
        sync_every=4, overlap_steps=2, compression="int8", bucket_bytes=1024, timeout_seconds=patience(30)
    ),
    "bf16, diloco": SlowMoConfig.diloco(sync_every=4, compression="bf16", timeout_seconds=patience(30)),
    "bf16, state averaged": SlowMoConfig.local_sgd(
        3, compression="bf16", inner_state="average", timeout_seconds=patience(30)
    ),
}


class Wide(Regression):
    """
    With a layer of 400 elements more in fp32, so that there are two anchors and, with small buckets, several buckets.
    """

    def __init__(self):
        super().__init__()
        self.extra = torch.nn.Linear(20, 20, bias=False)

    def forward(self, x, labels):
        found = super().forward(x, labels)
        return {"loss": found["loss"] + self.extra(x.float().repeat(1, 5)).square().mean()}


def begin(config, rank):
    model, rows = Wide(), Rows(STEPS * 16)
    inner = two_groups(model, "sgd", 0.05)
    inner.add_param_group({"params": model.extra.parameters(), "lr": 0.02})
    optimizer = SlowMoOptimizer(inner, config)

    def step_once(step):
        start = 16 * step + 4 * rank
        model(rows.x[start : start + 4], rows.y[start : start + 4])["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, optimizer, step_once


def train(config, rank):
    """Parameters after every step, bytes of every round, what is held back at the end."""
    model, optimizer, step_once = begin(config, rank)
    after, sent = [], []
    for step in range(STEPS):
        step_once(step)
        after.append(values(model))
        report = slowmo_hf.last_round(optimizer)
        sent.append(report.bytes_sent if report else 0)
    optimizer.outer_loop.in_flight.settle()
    return after, sent, held_back(optimizer)


def held_back(optimizer):
    """Copies of the residuals, by name."""
    held = optimizer.outer_loop.parts.slow.reduction.saved(agree=False, keep=True).own.tensors
    return {key: part.clone() for key, part in held.items()}


def every_config():
    return {name: train(config, dist.get_rank()) for name, config in CONFIGS.items()}


def expected_bytes(elements_of_buckets, workers, code):
    """(m-1) shards to their owners and (m-1) copies of the owned one; behind each 8 bytes, weight or squared norm."""
    sizes = [code.message_bytes(shard_elements(n, workers), wide) for n, wide in elements_of_buckets]
    return (workers - 1) * sum(2 * (size + 8) for size in sizes)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 3, 4])
def test_processes_and_threads_agree_bit_for_bit(workers):
    """
    All workers among themselves at a round's end; gloo and one process with one another throughout, where no exact
    average of three or more comes in, whose order of summation is another. Bytes by the formula.
    """
    processes = run_workers(every_config, workers)
    for name, config in CONFIGS.items():
        threads = run_in_process(lambda rank, config=config: train(config, rank), workers)
        for (after, sent, held), found in zip(threads, processes, strict=True):
            right, right_sent, right_held = found[name]
            alike = workers == 2 or config.inner_state != "average"
            for step in range(STEPS):
                assert not alike or all(torch.equal(after[step][key], right[step][key]) for key in after[step]), (
                    name,
                    step,
                )
                if (step + 1) % config.sync_every == 0 and not config.overlap_steps:
                    assert all(torch.equal(after[step][key], threads[0][0][step][key]) for key in after[step]), (
                        name,
                        step,
                    )
                    assert all(
                        torch.equal(right[step][key], processes[0][name][0][step][key]) for key in right[step]
                    ), (name, step)
            assert held.keys() == right_held.keys() != set()
            assert not alike or all(torch.equal(held[key], right_held[key]) for key in held)
            assert sent == right_sent
            header = 13 * 8 * (workers - 1)
            wide, narrow = (31, torch.float64), (400, torch.float32)
            if name == "int8":
                assert sent[2] == expected_bytes([wide, narrow], workers, Int8()) + header
            if name == "int8, buckets, overlapped":  # taken in at step 6; each message has 1024 bytes
                narrows = [(256, torch.float32), (144, torch.float32)]
                assert sent[5] == expected_bytes([wide, *narrows], workers, Int8()) + header
            if name == "int8, buckets":  # halves of 1024 bytes: 128 elements
                narrows = [(128, torch.float32)] * 3 + [(16, torch.float32)]
                assert sent[2] == expected_bytes([wide, *narrows], workers, Int8()) + header
            if name == "bf16, diloco":
                assert sent[3] == expected_bytes([wide, narrow], workers, BFloat16()) + header


def one_round(config, rank):
    """A round of 100,000 parameters."""
    param = torch.nn.Parameter(torch.zeros(100_000))
    optimizer = SlowMoOptimizer(torch.optim.SGD([param], lr=1.0), config)
    param.grad = torch.randn(100_000, generator=torch.Generator().manual_seed(rank))
    optimizer.step()
    return slowmo_hf.last_round(optimizer), param.detach().clone()


@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize(("name", "most"), [("int8", 0.27), ("bf16", 0.51)])
def test_bytes_against_the_uncompressed_ring(workers, name, most):
    """All that the round has sent, header and scales included, against 2 (m-1)/m 4P."""
    runs = run_in_process(lambda rank: one_round(SlowMoConfig.local_sgd(1, compression=name), rank), workers)
    exact = run_in_process(lambda rank: one_round(SlowMoConfig.local_sgd(1), rank), workers)
    ring = 2 * (workers - 1) / workers * 4 * 100_000
    for (report, param), (exact_report, exact_param) in zip(runs, exact, strict=True):
        assert report.bytes_sent <= most * ring
        assert exact_report.bytes_sent >= ring
        assert torch.equal(param, runs[0][1])
        assert (
            param - exact_param
        ).abs().max() < 0.05  # the largest of 100,000 normal numbers is 4.5, and 4.5/127 = 0.035
        assert report.consensus_distance == pytest.approx(exact_report.consensus_distance, rel=1e-2)


def test_without_compression_nothing_is_new():
    for config in (SlowMoConfig(), SlowMoConfig(compression="int8")):  # alone, a worker quantises nothing either
        _, optimizer, step_once = begin(config, 0)
        step_once(0)
        assert type(optimizer.outer_loop.parts.slow.reduction) is AllReduce
    alone = [train(SlowMoConfig(sync_every=3, compression=name), 0)[0][-1] for name in ("none", "int8")]
    assert all(torch.equal(alone[0][key], alone[1][key]) for key in alone[0])


# ---- a convex problem ----

PULL = 1000.0


def convex(rank, name, feedback):
    """
    Worker i pulls element 0 to +-PULL, where the workers' forces cancel, and all others to 1. A round's displacement
    of element 0 makes the scale 8 times the largest displacement of the others, whose codes are 0: without feedback
    they never move.
    """
    target = torch.ones(64, dtype=torch.float64)
    target[0] = PULL if rank == 0 else -PULL
    param = torch.nn.Parameter(torch.zeros(64, dtype=torch.float64))
    inner = torch.optim.SGD([param], lr=0.05)
    optimizer = SlowMoOptimizer(inner, SlowMoConfig.local_sgd(2, compression=name))
    for step in range(400):
        inner.param_groups[0]["lr"] = 0.05 * (1 - step / 400)
        param.grad = param.detach() - target
        optimizer.step()
        if not feedback:
            optimizer.outer_loop.parts.slow.reduction.forget()
    return float((param.detach()[1:] - 1).square().mean() / 2), float(param.detach()[0])


@pytest.mark.slow
def test_feedback_reaches_the_uncompressed_loss_and_without_it_training_stands_still():
    """The loss starts at 0.5. Tolerance: 1e-3 of that."""
    exact = run_in_process(lambda rank: convex(rank, "none", True), 2)[0][0]
    assert exact < 1e-3 * 0.5
    for name in CODES:
        loss, middle = run_in_process(lambda rank, name=name: convex(rank, name, True), 2)[0]
        assert loss == pytest.approx(exact, abs=1e-3 * 0.5), name
        assert abs(middle) < 1e-3 * PULL, "the forces cancel"
    blind, _ = run_in_process(lambda rank: convex(rank, "int8", False), 2)[0]
    assert blind == 0.5


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


# ---- checkpoints ----


def other(config, **settings):
    return SlowMoConfig.from_dict({**config.to_dict(), **settings})


SAVED = SlowMoConfig(sync_every=3, compression="int8", bucket_bytes=1024)
# Saved while the round of 6 is under way.
BEHIND = SlowMoConfig(sync_every=3, overlap_steps=2, compression="int8", bucket_bytes=1024)
RESUMED = {  # settings, workers: bit for bit, own and shard residuals kept, what the log says
    "same": ({}, 2, True, (True, True), ""),
    "same, overlapped": ({}, 2, True, (True, True), ""),
    "bf16": ({"compression": "bf16"}, 2, False, (True, True), "compression 'int8' -> 'bf16'"),
    "other buckets": (
        {"bucket_bytes": 2048},
        2,
        False,
        (True, False),
        "held back is dropped: bucket_bytes now cuts other shards",
    ),
    "off": ({"compression": "none"}, 2, False, (False, False), "held back is dropped: compression is off"),
    "three workers": ({}, 3, False, (False, False), "held back is dropped: it was saved by another number of workers"),
}


def saver(folder, config, rank):
    """Saved at the end of a round, after 6 of 9 steps, and inside the next, after 7."""
    model, optimizer, step_once = begin(config, rank)
    held = {}
    for step in range(STEPS):
        step_once(step)
        if step in (5, 6):
            write_snapshot(f"{folder}/{step}", optimizer.outer_loop, shared=rank == 0, objects={})
            held[step] = held_back(optimizer)
    return values(model), held


def resumer(folder, step, config, rank, trained_before):
    """
    Into an outer loop that has begun, or has had a round and holds something back; its weights and what is held back
    then.
    """
    model, optimizer, step_once = begin(config, rank)
    for before in range(4 if trained_before else 1):
        step_once(before)
    check_snapshot(f"{folder}/{step}", optimizer.outer_loop)()
    # At a round's end the file holds no weights: Trainer and Accelerate have loaded the anchors.
    if step == 5 and not config.overlap_steps:
        for piece in optimizer.outer_loop.parts.slow.pieces:
            optimizer.outer_loop.base.hand_back_(piece)
    held = held_back(optimizer)
    for later in range(step + 1, STEPS):
        step_once(later)
    return values(model), held


@pytest.mark.slow
@pytest.mark.parametrize("case", RESUMED)
def test_resume(tmp_path, case):
    settings, workers, is_same, kept, words = RESUMED[case]
    config = BEHIND if "overlapped" in case else SAVED
    saved = run_in_process(lambda rank: saver(tmp_path, config, rank), 2)
    for step in (5, 6):
        logging.getLogger("slowmo_hf").setLevel(logging.INFO)
        with Heard() as said:
            found = run_in_process(
                lambda rank, step=step: resumer(
                    tmp_path, step, other(config, **settings), rank, trained_before=step == 6
                ),
                workers,
            )
        assert len(said.about("held back")) == ("held back" in words), "once per job"
        assert bool(said.about(words))
        for rank, (weights, held) in enumerate(found):
            if is_same:
                assert all(torch.equal(weights[key], saved[rank][0][key]) for key in weights)
            for key, part in held.items():
                if kept[key.startswith("shard")]:
                    assert torch.equal(part, saved[rank][1][step][key]), (key, step)
                    assert part.any() or key.startswith("shard")
                else:
                    assert not part.any(), key


# ---- settings ----


@pytest.mark.parametrize("base", ["sgp", "osgp", "dpsgd", "all_reduce"])
@pytest.mark.parametrize("name", CODES)
def test_other_bases_refuse_it(base, name):
    with pytest.raises(
        ValueError,
        match=rf"compression='{name}' needs base='local_sgd', got base='{base}': .*Leave compression at 'none'",
    ):
        SlowMoConfig(base=base, compression=name)


def test_an_unknown_compression_is_refused():
    with pytest.raises(ValueError, match=r"compression must be one of none, bf16, int8, got 'morse'"):
        SlowMoConfig(compression="morse")
