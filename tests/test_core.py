"""
The core by hand: the update, the clock, special cases, buckets, what a bf16 anchor hands back, and settings that
contradict.
"""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import HfArgumentParser, Seq2SeqTrainingArguments

from harness import patience, run_workers
from slowmo_hf import SlowMoConfig, SlowMoOptimizer, last_round, rules
from slowmo_hf.algorithm import layout
from slowmo_hf.algorithm.layout import flat_anchors, flat_layouts
from slowmo_hf.algorithm.norms import Norms, squared_norm
from slowmo_hf.algorithm.slow_momentum import SlowMomentum, slow_momentum_update_
from slowmo_hf.training.outer_loop import OuterLoop
from slowmo_hf.wire.reduction import bytes_per_message
from tiny import message_memory


def test_two_rounds_by_hand():
    """anchor 8, averages 4 then 2, α=1, β=½.
    round 1: Δ = 8-4 = 4, v = 4,         anchor = 4
    round 2: Δ = 4-2 = 2, v = ½·4+2 = 4, anchor = 0
    """
    anchor, velocity = torch.tensor([8.0]), torch.tensor([0.0])
    for average, right in ((4.0, 4.0), (2.0, 0.0)):
        slow_momentum_update_(anchor, anchor - average, velocity, outer_lr=1.0, outer_momentum=0.5)
        assert anchor.item() == right


def test_a_round_at_rate_0_goes_by_the_outer_rate():
    """Anchor 10, pseudo-gradient 4, α = ½: 8, and not 6."""
    anchor = torch.tensor([10.0])
    optimizer = SlowMomentum([anchor], outer_lr=0.5, outer_momentum=0.5)
    optimizer.param_groups[0]["inner_lr"] = 0.0
    optimizer.update_(anchor, torch.tensor([4.0]), 0)
    assert anchor.item() == 8.0


def test_a_distance_is_not_below_0():
    assert Norms.of([1.0, 2.0, 0.0]).consensus_distance == 0.0
    assert Norms.of([3.0, 2.0, 0.0]).consensus_distance == 1.0


def test_zero_learning_rate_keeps_the_average_and_the_ratio():
    """β=½, α=1, γ = 2, 0, 4; Δ = 1, 3, 1.
    round 1: v = 1,              anchor = 10-1 = 9
    round 2: γ=0: v = ½·1 = ½,   anchor = 9-3 = 6   (momentum moves nothing)
    round 3: r = 4/2, v = ½·2·½+1 = 1.5, anchor = 4.5
    """
    anchor = torch.tensor([10.0])
    optimizer = SlowMomentum([anchor], outer_momentum=0.5)
    for inner_lr, delta, right in ((2.0, 1.0, 9.0), (0.0, 3.0, 6.0), (4.0, 1.0, 4.5)):
        optimizer.param_groups[0]["inner_lr"] = inner_lr
        optimizer.update_(anchor, torch.tensor([delta]), 0)
        optimizer.end_round()
        assert anchor.item() == right


def test_constant_learning_rate_is_torch_sgd_with_momentum():
    torch.manual_seed(0)
    ours, theirs = torch.zeros(5, dtype=torch.float64), torch.nn.Parameter(torch.zeros(5, dtype=torch.float64))
    slow, sgd = SlowMomentum([ours], outer_lr=0.7, outer_momentum=0.6), torch.optim.SGD([theirs], lr=0.7, momentum=0.6)
    for _ in range(7):
        delta = torch.randn(5, dtype=torch.float64)
        theirs.grad = delta.clone()
        slow.update_(ours, delta, 0), slow.end_round(), sgd.step()
        assert torch.allclose(ours, theirs.detach(), rtol=0, atol=1e-14)


@pytest.mark.parametrize(("sync_every", "rounds"), [(1, [1, 2, 3, 4, 5, 6, 7, 8, 9]), (4, [4, 8]), (9, [9]), (10, [])])
def test_the_clock(sync_every, rounds):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = SlowMoOptimizer(torch.optim.SGD([weight], lr=0.1), SlowMoConfig(sync_every=sync_every))
    seen, done = [], 0
    for step in range(1, 10):
        weight.grad = torch.ones(3)
        optimizer.step()
        report = last_round(optimizer)
        if report is not None and report.round > done:
            done = report.round
            seen.append(step)
    assert seen == rounds


def _train(config, steps, make=lambda p: torch.optim.SGD(p, lr=0.1), dtype=torch.float64):
    """Worker r pulls towards its own target; returns the weights after every step."""
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=dtype))
    optimizer = make([weight])
    optimizer = SlowMoOptimizer(optimizer, config) if config else optimizer
    path = []
    for step in range(steps):
        weight.grad = (weight.detach() - (rank + 1) * (step + 1)).to(dtype)
        optimizer.step()
        path.append(weight.detach().clone())
    return torch.stack(path)


def _special_cases():
    kw = {"momentum": 0.9}
    return {
        "tau 1, beta 0": _train(SlowMoConfig.local_sgd(1), 8),
        "tau 1, beta .5": _train(SlowMoConfig(sync_every=1, outer_momentum=0.5), 8),
        "local": _train(SlowMoConfig.local_sgd(4), 8),
        "bmuf": _train(SlowMoConfig.bmuf(block_momentum=0.5, sync_every=4), 8),
        "slowmo": _train(SlowMoConfig(sync_every=4), 8),
        "diloco": _train(SlowMoConfig.diloco(sync_every=4), 8),
        "adam outside": _train(SlowMoConfig(sync_every=4, outer_optimizer="torch.optim.Adam", outer_lr=0.1), 8),
        "double averaging": _train(
            SlowMoConfig.local_sgd(4, inner_state="average"), 8, lambda p: torch.optim.SGD(p, lr=0.1, **kw)
        ),
    }


def _average_run(steps, tau, outer, momentum=0.0):
    """Two workers by hand; `outer(anchor, delta)` returns the new anchor. Momentum buffers are averaged at a round."""
    anchor = torch.tensor([1.0, -2.0], dtype=torch.float64)
    x, m = [anchor.clone(), anchor.clone()], [torch.zeros_like(anchor), torch.zeros_like(anchor)]
    path = []
    for step in range(steps):
        for r in (0, 1):
            m[r] = momentum * m[r] + x[r] - (r + 1) * (step + 1)
            x[r] = x[r] - 0.1 * m[r]
        if (step + 1) % tau == 0:
            anchor = outer(anchor, anchor - (x[0] + x[1]) / 2)
            x, m = [anchor.clone(), anchor.clone()], [(m[0] + m[1]) / 2] * 2
        path.append(x[0])
    return torch.stack(path)


class _Torch:
    """A torch optimizer as the outer one."""

    def __init__(self, make):
        self.weight = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
        self.optimizer = make([self.weight])

    def __call__(self, anchor, delta):
        self.weight.grad = delta
        self.optimizer.step()
        return self.weight.detach().clone()


def test_special_cases_of_the_paper():
    sgd, adam = torch.optim.SGD, torch.optim.Adam
    right = {
        "tau 1, beta 0": _average_run(8, 1, lambda a, d: a - d),
        "tau 1, beta .5": _average_run(8, 1, _Torch(lambda p: sgd(p, lr=1.0, momentum=0.5))),
        "local": _average_run(8, 4, lambda a, d: a - d),
        "bmuf": _average_run(8, 4, _Torch(lambda p: sgd(p, lr=1.0, momentum=0.5))),
        "slowmo": _average_run(8, 4, _Torch(lambda p: sgd(p, lr=1.0, momentum=0.5))),
        "diloco": _average_run(8, 4, _Torch(lambda p: sgd(p, lr=0.7, momentum=0.9, nesterov=True))),
        "adam outside": _average_run(8, 4, _Torch(lambda p: adam(p, lr=0.1))),
        "double averaging": _average_run(8, 4, lambda a, d: a - d, momentum=0.9),
    }
    mine, _ = run_workers(_special_cases, 2)
    for name, path in right.items():
        assert torch.allclose(mine[name], path, rtol=0, atol=1e-12), name


def test_lookahead_at_one_worker():
    """Every 2 steps: slow <- slow + ½ (fast - slow)."""
    path = _train(SlowMoConfig.lookahead(sync_every=2, outer_lr=0.5), 4)
    slow = fast = torch.tensor([1.0, -2.0], dtype=torch.float64)
    for step in range(4):
        fast = fast - 0.1 * (fast - (step + 1))
        if step % 2:
            slow = fast = slow + 0.5 * (fast - slow)
        assert torch.allclose(path[step], fast, rtol=0, atol=1e-14)


def test_rounding_to_bf16_never_enters_the_velocity():
    """
    Anchor 1 + 2⁻¹⁰, handed back as bf16 1; inner steps move nothing: Δ = 1 - 1 = 0, and the anchor keeps its last
    bits.
    """
    weight = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    loop = OuterLoop(torch.optim.SGD([weight], lr=0.1), SlowMoConfig(sync_every=1))
    loop.start()
    loop.parts.slow.anchors[0].flat.fill_(1 + 2**-10)
    report = loop.step([0.1])
    assert loop.parts.slow.anchors[0].flat.dtype == torch.float32
    assert (report.pseudo_grad_norm, report.velocity_norm) == (0.0, 0.0)
    assert loop.parts.slow.anchors[0].flat.tolist() == [1 + 2**-10] * 2
    assert weight.tolist() == [1.0, 1.0]


def check_chunks(bucket, message):
    """They are the bucket, one after the other, each of one dtype; what they pack is what its pieces hold."""
    chunks = bucket.chunks()
    assert [piece for chunk in chunks for piece in chunk.pieces] == bucket.pieces
    assert torch.equal(torch.cat([chunk.of(bucket.item.flat) for chunk in chunks]), message)
    for chunk in chunks:
        assert {piece.param.dtype for piece in chunk.pieces} == {chunk.dtype}
        packed = torch.full_like(chunk.of(bucket.item.flat), torch.nan)
        chunk.pack_(packed)
        assert torch.equal(packed, torch.cat([piece.values().to(packed.dtype) for piece in chunk.pieces]))
        chunk.unpack_(2 * packed)
        assert torch.equal(2 * packed, torch.cat([piece.values().to(packed.dtype) for piece in chunk.pieces]))
        chunk.unpack_(packed)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=6),
    st.integers(1, 90),
    st.lists(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), min_size=6, max_size=6),
)
def test_buckets_hold_every_element_once(shapes, bucket_elements, dtypes):
    params = [torch.rand(shape).to(dtype) for shape, dtype in zip(shapes, dtypes, strict=False)]
    for item in flat_anchors(flat_layouts([params[::2], params[1::2]])):
        counts = {id(span.param): torch.zeros(span.param.numel()) for span in item.spans}
        end = 0
        for bucket in item.buckets(bucket_elements * item.flat.element_size()):
            assert bucket.elements <= bucket_elements
            assert bucket.offset == end
            end += bucket.elements
            message = bucket.of(item.flat)
            assert sum(run.numel() for _, run in bucket.runs(message)) == bucket.elements
            for piece, run in bucket.runs(message):
                counts[id(piece.param)][piece.start : piece.stop] += 1
                assert piece.group == int(any(piece.param is p for p in params[1::2]))
                assert piece.anchor.data_ptr() == run.data_ptr() == piece.of(item.flat).data_ptr()
                assert torch.equal(run, piece.values().to(run.dtype))
            check_chunks(bucket, message)
        assert all((count == 1).all() for count in counts.values())
        for anchor, span in zip(item.anchors(), item.spans, strict=True):
            assert torch.equal(anchor, span.param.to(anchor.dtype))


MIB = 2**20


def test_chunks_end_where_a_dtype_does_and_fit_the_cache(monkeypatch):
    """Of 3, 3, 3, 9 and 1 elements, the second in bfloat16: at most 8 on a CPU, at most 12 elsewhere."""
    monkeypatch.setitem(layout.CACHED_ELEMENTS, "cpu", 8)
    params = [torch.rand(n).to(torch.bfloat16 if i == 1 else torch.float32) for i, n in enumerate((3, 3, 3, 9, 1))]
    (item,) = flat_anchors(flat_layouts([params]))
    (bucket,) = item.buckets(MIB)
    assert [[piece.elements for piece in chunk.pieces] for chunk in bucket.chunks()] == [[3], [3], [3], [8], [1, 1]]
    monkeypatch.delitem(layout.CACHED_ELEMENTS, "cpu")
    monkeypatch.setattr(layout, "CHUNK_ELEMENTS", 12)
    (bucket,) = item.buckets(MIB)
    assert [[piece.elements for piece in chunk.pieces] for chunk in bucket.chunks()] == [[3], [3], [3, 9], [1]]


@pytest.mark.parametrize(
    ("size", "bucket_bytes", "at_once", "expected"),
    [
        (10 * MIB, 256 * MIB, False, [10 * MIB]),
        (40 * MIB, 256 * MIB, False, [16 * MIB, 16 * MIB, 8 * MIB]),
        (512 * MIB, 256 * MIB, False, 8 * [64 * MIB]),
        (8192 * MIB, 256 * MIB, False, 64 * [128 * MIB]),
        (40 * MIB, 8 * MIB, False, 10 * [4 * MIB]),
        (1024 * MIB, 256 * MIB, True, 4 * [256 * MIB]),
    ],
)
def test_messages_that_are_waited_for_are_many(size, bucket_bytes, at_once, expected):
    """
    An eighth of what travels each, 16 MiB at least, half of `bucket_bytes` at most; behind the computation
    `bucket_bytes`.
    """
    [layout] = flat_layouts([[torch.nn.Parameter(torch.empty(size // 4, device="meta"))]])
    longest = bytes_per_message(layout, bucket_bytes, ahead=at_once)
    assert [4 * bucket.elements for bucket in layout.buckets(longest)] == expected


def _mixed_average():
    """
    Ragged, channels-last, bf16, fp64, 0-dim and empty parameters, in buckets smaller than the largest; the exact mean
    of r + 1.
    """
    rank = torch.distributed.get_rank()
    shapes = [(3, 4, 5, 6), (7,), (), (0, 3), (11, 13), (2, 2)]
    dtypes = [torch.float32, torch.bfloat16, torch.float32, torch.float32, torch.float64, torch.float64]
    params = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape, dtype in zip(shapes, dtypes, strict=True)]
    params[0] = torch.nn.Parameter(params[0].detach().to(memory_format=torch.channels_last))
    frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    tied = params[1]
    optimizer = torch.optim.SGD([{"params": [*params, frozen]}], lr=1.0)
    config = SlowMoConfig.local_sgd(1, bucket_bytes=1024)
    wrapped = SlowMoOptimizer(optimizer, config)
    for p in params:
        p.grad = -torch.arange(p.numel(), dtype=torch.float64).reshape(p.shape).to(p.dtype) * (rank + 1)
    wrapped.step()
    assert params[0].is_contiguous(memory_format=torch.channels_last)
    assert tied.dtype == torch.bfloat16
    return [p.detach().contiguous() for p in params], frozen.detach(), last_round(wrapped).consensus_distance


def test_every_shape_and_dtype_is_averaged_exactly():
    results = run_workers(_mixed_average, 3)
    for params, frozen, distance in results:
        squares = 0
        for p in params:
            steps = torch.arange(p.numel(), dtype=torch.float64).reshape(p.shape)
            assert torch.equal(p.double(), steps * 2)
            squares += float((steps**2).sum()) * 2 / 3  # the variance of 1, 2, 3
        assert distance == pytest.approx(squares, rel=1e-5)
        assert frozen.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"sync_every": 0}, "sync_every must be >= 1 optimizer step, got 0"),
        ({"sync_every": 1.5}, "sync_every must be an integer"),
        ({"outer_momentum": 1.5}, r"outer_momentum must be in \[0, 1\), got 1.5"),
        ({"outer_momentum": 1}, r"outer_momentum must be in \[0, 1\), got 1\."),
        ({"outer_momentum": float("nan")}, "outer_momentum must be a finite number"),
        ({"outer_lr": 0}, "outer_lr must be > 0"),
        ({"base": "sgd"}, "base must be one of"),
        (
            {"topology": "ring"},
            "topology='ring' needs base='sgp' or base='osgp' or base='dpsgd', got base='local_sgd'",
        ),
        ({"peers": 2}, "peers=2 needs base='sgp' or .*, got base='local_sgd'"),
        ({"staleness": 0}, "staleness=0 needs base='osgp'"),
        ({"base": "sgp", "staleness": 2}, "staleness=2 needs base='osgp', got base='sgp': .*Leave staleness at 1"),
        ({"base": "osgp", "staleness": -1}, "staleness must be >= 0 steps, got -1"),
        ({"base": "sgp", "topology": "star"}, "topology must be one of"),
        ({"base": "sgp", "peers": 0}, "peers must be >= 1"),
        (
            {"base": "dpsgd", "topology": "exponential"},
            "topology='exponential' needs base='sgp' or base='osgp', got base='dpsgd'",
        ),
        (
            {"base": "all_reduce", "processes_per_worker": 2},
            "processes_per_worker='2' needs base=.*, got base='all_reduce'",
        ),
        (
            {"base": "all_reduce", "outer_momentum": 0, "inner_state": "reset"},
            "inner_state='reset' needs a round that changes parameters, got base='all_reduce', outer_momentum=0",
        ),
        (
            {"base": "sgp", "exact_average": False, "inner_state": "average"},
            "inner_state='average' needs a round that averages parameters, got base='sgp', exact_average=False",
        ),
        ({"exact_average": False}, "exact_average=False needs base='sgp' or .*, got base='local_sgd'"),
        ({"inner_state": "keep"}, "inner_state must be one of"),
        ({"model_buffers": "mean"}, "model_buffers must be one of"),
        ({"processes_per_worker": 0}, "processes_per_worker must be 'auto', 'node' or a number >= 1, got '0'"),
        ({"processes_per_worker": "half"}, "processes_per_worker must be 'auto', 'node' or a number"),
        ({"outer_optimizer": "torch.optim.Nothing"}, "outer_optimizer must be 'slow_momentum' or the dotted path"),
        ({"outer_optimizer_kwargs": "{}"}, "outer_optimizer_kwargs is for a dotted-path outer_optimizer"),
        (
            {"outer_optimizer": "torch.optim.SGD", "outer_optimizer_kwargs": "[1"},
            "outer_optimizer_kwargs must be JSON",
        ),
        ({"outer_optimizer": "torch.optim.SGD", "outer_optimizer_kwargs": {"lr": 1}}, "must not hold 'lr'"),
        (
            {"outer_optimizer": "torch.optim.SGD", "outer_momentum": 0.9},
            "outer_momentum=0.9 needs outer_optimizer='slow_momentum', got outer_optimizer='torch.optim.SGD'",
        ),
        ({"bucket_bytes": 1}, "bucket_bytes must be >= 1024"),
        ({"timeout_seconds": 0}, "timeout_seconds must be > 0"),
    ],
)
def test_bad_settings_are_refused_at_birth(bad, words):
    with pytest.raises(ValueError, match=words):
        SlowMoConfig(**bad)


def test_every_rule_is_about_real_settings_and_the_docs_show_it(subtests):
    """Each rule is broken by some configuration and kept by the defaults; the page's table is the rules'."""
    page = (Path(__file__).parents[1] / "docs" / "compatibility.md").read_text()
    for line in rules.table().splitlines():
        with subtests.test(line):
            assert line in page
    for rule in rules.RULES:
        with subtests.test(rule.setting, needs=rule.needs):
            assert rule.broken_by(SlowMoConfig()) == ""
            assert hasattr(SlowMoConfig, rule.needs)
            assert not rule.values or getattr(SlowMoConfig, rule.setting) not in rule.values


def test_config_round_trips_and_parses_beside_trainers():
    config = SlowMoConfig.diloco(sync_every=30)
    assert SlowMoConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="unknown settings"):
        SlowMoConfig.from_dict({"sync_freq": 3})
    with pytest.raises(ValueError, match="task must be one of"):
        SlowMoConfig.paper("mnist", outer_momentum=0.5)
    assert SlowMoConfig.paper("wmt16", outer_momentum=0.6).inner_state == "maintain"
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.sync_every = 3
    parsed, args = HfArgumentParser((SlowMoConfig, Seq2SeqTrainingArguments)).parse_args_into_dataclasses(
        ["--sync_every", "7", "--outer_momentum", "0.25", "--output_dir", "x", "--report_to", "none"]
    )
    assert parsed == SlowMoConfig(sync_every=7, outer_momentum=0.25)
    assert args.output_dir == "x"


def _refused():
    words = []
    for dtype in (torch.complex64, torch.float32):
        weight = torch.nn.Parameter(torch.ones(2, dtype=dtype))
        rank = torch.distributed.get_rank()
        config = SlowMoConfig(sync_every=3 + rank, timeout_seconds=patience(20))
        optimizer = SlowMoOptimizer(torch.optim.SGD([weight], lr=0.1), config)
        weight.grad = torch.ones_like(weight)
        with pytest.raises(ValueError) as error:
            optimizer.step()
        words.append(str(error.value))
    return words


def test_refusals_and_differences_are_the_same_words_on_every_rank():
    first, second = run_workers(_refused, 2)
    assert first == second
    assert "parameter 'parameter 0' is complex" in first[0]
    assert "SlowMoConfig.sync_every = 3" in first[1]
    assert "has ['SlowMoConfig.sync_every = 4']" in first[1]


def test_norms_are_right_at_the_size_of_real_models():
    """2²⁵ elements that move by 10⁻³: the squared norm is 33.554432. One fp32 sum over all of them is percents low."""
    weight = torch.nn.Parameter(torch.zeros(2**25))
    loop = OuterLoop(torch.optim.SGD([weight], lr=0.1), SlowMoConfig(sync_every=1))
    loop.start()
    with torch.no_grad():
        weight.sub_(1e-3)
    report = loop.step([0.1])
    assert report.pseudo_grad_norm**2 == pytest.approx(2**25 * 1e-6, rel=1e-5)
    assert report.velocity_norm**2 == pytest.approx(2**25 * 1e-6, rel=1e-5)
    assert squared_norm(torch.empty(0)) == 0.0


def test_a_diverged_run_does_not_look_agreed():
    weight = torch.nn.Parameter(torch.zeros(3))
    loop = OuterLoop(torch.optim.SGD([weight], lr=0.1), SlowMoConfig(sync_every=1))
    loop.start()
    with torch.no_grad():
        weight.fill_(float("nan"))
    logs = loop.step([0.1]).to_logs()
    assert all(
        math.isnan(logs[f"slowmo/{name}"]) for name in ("consensus_distance", "pseudo_grad_norm", "velocity_norm")
    )


@pytest.mark.parametrize("task", ["cifar10", "imagenet", "wmt16"])
def test_every_row_of_the_paper_has_a_preset(task):
    for base in ("local_sgd", "sgp", "osgp", "all_reduce"):
        for outer_momentum in (0.0, 0.6):
            config = SlowMoConfig.paper(task, base, outer_momentum=outer_momentum)
            assert config.sync_every == (48 if base in ("sgp", "osgp") and task != "cifar10" else 12)
            plain = base == "all_reduce" and outer_momentum == 0
            assert config.inner_state == ("auto" if plain else "maintain" if task == "wmt16" else "reset")


def _buffers_of_two_dtypes():
    params = [torch.nn.Parameter(torch.zeros(1000, dtype=dtype)) for dtype in (torch.float32, torch.float64)]
    loop = OuterLoop(torch.optim.SGD(params, lr=0.1), SlowMoConfig(sync_every=1))
    loop.start()
    reserved = {memory.data_ptr() for memory in message_memory(loop)}
    loop.step([0.1])
    return reserved == {memory.data_ptr() for memory in message_memory(loop)}


def test_a_round_allocates_no_buffer():
    assert run_workers(_buffers_of_two_dtypes, 2) == [True, True]


def _buffers_kept(dtype):
    weight = torch.nn.Parameter(torch.full((1000,), torch.distributed.get_rank(), dtype=dtype))
    loop = OuterLoop(torch.optim.SGD([weight], lr=0.1), SlowMoConfig(sync_every=2))
    loop.start()
    return [(buffer.dtype, buffer.numel()) for buffer in message_memory(loop)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_buffer_is_kept_between_rounds(dtype):
    """
    What differs at the start travels in the parameters' dtype; its buffer does not stay. One element more: the
    consensus distance.
    """
    assert run_workers(_buffers_kept, 2, dtype) == [[(torch.float32, 1001)]] * 2
