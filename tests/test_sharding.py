"""
Sharded slow state: the plain run bit for bit, 1/m of the memory, a round's bytes, checkpoints that either kind of run
takes up.
"""

from __future__ import annotations

import logging
import math

import pytest
import torch
import torch.distributed as dist

import slowmo_hf
from harness import patience, run_workers
from slowmo_hf import SlowMoConfig, SlowMoOptimizer, run_in_process
from slowmo_hf.checkpoints.files import read_part
from slowmo_hf.checkpoints.state import check_snapshot, write_snapshot
from slowmo_hf.checkpoints.together import together
from slowmo_hf.contents import CheckpointError
from slowmo_hf.training.outer_loop import OuterLoop
from tiny import Heard, Regression, Rows, message_memory, train_node_workers, two_groups, values

STEPS = 9
CONFIGS = {
    "slow momentum": ({"sync_every": 3, "outer_momentum": 0.6, "outer_lr": 0.8}, "sgd"),
    "no momentum": ({"sync_every": 3, "outer_momentum": 0.0}, "sgd"),
    "small buckets": ({"sync_every": 3, "outer_momentum": 0.6, "bucket_bytes": 1024}, "sgd"),
    "adam, state averaged": ({"sync_every": 2, "inner_state": "average"}, "adamw"),
    "on the cpu": ({"sync_every": 3, "outer_momentum": 0.6, "slow_state_device": "cpu"}, "sgd"),
    "overlapped": ({"sync_every": 3, "outer_momentum": 0.6, "outer_lr": 0.8, "overlap_steps": 1}, "sgd"),
    "overlapped by two": ({"sync_every": 3, "outer_momentum": 0.6, "overlap_steps": 2, "bucket_bytes": 1024}, "sgd"),
    "overlapped by three": (
        {"sync_every": 4, "outer_momentum": 0.6, "overlap_steps": 3, "slow_state_device": "cpu"},
        "adamw",
    ),
}


class Mixed(Regression):
    """
    fp64 with an fp32 layer of 400 elements and a bf16 one of 7: two anchors and, with small buckets, several buckets.
    """

    def __init__(self):
        super().__init__()
        self.extra = torch.nn.Linear(20, 20, bias=False)
        self.coarse = torch.nn.Parameter(torch.linspace(-1, 1, 7).bfloat16())
        self.norm = torch.nn.BatchNorm1d(4)

    def forward(self, x, labels):
        loss = super().forward(x, labels)["loss"] + self.norm(x.float()).abs().mean()
        return {
            "loss": loss
            + self.extra(x.float().repeat(1, 5)).square().mean()
            + (self.coarse.float() - x.float().mean()).square().sum()
        }


def make_config(settings, shard):
    if not shard:
        settings = {name: value for name, value in settings.items() if name != "slow_state_device"}
    return SlowMoConfig(**settings, shard_slow_state=shard, timeout_seconds=patience(30))


def begin(config, rank, inner="sgd"):
    model, rows = Mixed(), Rows(STEPS * 32)
    optimizer = two_groups(model, inner, 0.05)
    optimizer.add_param_group({"params": [model.extra.weight, model.coarse, *model.norm.parameters()], "lr": 0.02})
    optimizer = SlowMoOptimizer(optimizer, config)

    def step_once(step):
        # Another ratio of learning rates per group.
        for group, factor in zip(optimizer.param_groups, (1, 2, 3), strict=True):
            group["lr"] *= 1 - 0.03 * factor
        start = 32 * step + 4 * rank
        model(rows.x[start : start + 4], rows.y[start : start + 4])["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, optimizer, step_once


def state_of(model):
    return {**values(model), **{name: buffer.clone() for name, buffer in model.named_buffers()}}


def train(config, rank, inner):
    """All values after every step, what looks showed, and every round's report."""
    model, optimizer, step_once = begin(config, rank, inner)
    after, shown, reports = [], [], []
    for step in range(STEPS):
        step_once(step)
        after.append(state_of(model))
        if step in (3, 4):  # inside a round, in all cases one of the two
            with slowmo_hf.consensus(optimizer):
                shown.append(state_of(model))
            assert all(torch.equal(value, after[-1][name]) for name, value in state_of(model).items())
        report = slowmo_hf.last_round(optimizer)
        if report and (not reports or report.round > reports[-1].round):
            reports.append(report)
    return after, shown, reports


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def assert_same_runs(plain, sharded):
    for (after, shown, reports), (other_after, other_shown, other_reports) in zip(plain, sharded, strict=True):
        assert all(same(a, b) for a, b in zip(after + shown, other_after + other_shown, strict=True))
        for mine, other in zip(reports, other_reports, strict=True):
            for name in ("consensus_distance", "pseudo_grad_norm", "velocity_norm"):
                one, another = getattr(mine, name), getattr(other, name)
                # A small difference of squares; without slow momentum there is no velocity.
                assert another == (one if one is None else pytest.approx(one, rel=1e-5, abs=1e-7)), name


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 3, 5])
@pytest.mark.parametrize("case", CONFIGS)
def test_the_run_is_the_plain_one_bit_for_bit(case, workers):
    """In one process sums are taken in the order of workers either way."""
    settings, inner = CONFIGS[case]
    runs = [
        run_in_process(lambda rank, shard=shard: train(make_config(settings, shard), rank, inner), workers)
        for shard in (False, True)
    ]
    assert_same_runs(*runs)
    assert len(runs[0][0][2]) == (STEPS - settings.get("overlap_steps", 0)) // settings["sync_every"]
    assert not same(runs[0][0][0][0], runs[0][0][0][-1])


def over_gloo():
    settings, inner = CONFIGS["small buckets"]
    return [train(make_config(settings, shard), dist.get_rank(), inner) for shard in (False, True)]


def test_over_gloo():
    """
    A ring sums in another order: fp64 to 1e-12, fp32 to 1e-6, bf16 to its last bit. All workers are equal at every
    round's end.
    """
    found = run_workers(over_gloo, 3)
    limits = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.int64: 0}
    for plain, sharded in found:
        for mine, other in zip(plain[0] + plain[1], sharded[0] + sharded[1], strict=True):
            for name, value in mine.items():
                assert (value - other[name]).abs().max() <= limits[value.dtype], name
        for step in (2, 5, 8):
            assert same(sharded[0][step], found[0][1][0][step])


def one_round(config, elements):
    param = torch.nn.Parameter(torch.zeros(elements))
    optimizer = SlowMoOptimizer(torch.optim.SGD([param], lr=0.1), config)
    param.grad = torch.ones(elements)
    optimizer.step()
    loop = optimizer.outer_loop
    state = sum(t.numel() for t in [item.flat for item in loop.parts.slow.anchors] + loop.parts.slow.update.velocities)
    messages = sum(t.nbytes for t in message_memory(loop))
    return slowmo_hf.last_round(optimizer).bytes_sent, state, messages, len(loop.parts.slow.buckets)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 4, 7])
@pytest.mark.parametrize("bucket_bytes", [2**22, 2**14])
def test_bytes_and_memory(workers, bucket_bytes):
    """
    Theory: 2 (m-1)/m 4P bytes, and anchors and velocity of 2P/m elements, each rounded up per bucket; messages in
    `bucket_bytes`.
    """
    elements = 100_003
    settings = {"sync_every": 1, "outer_momentum": 0.5, "bucket_bytes": bucket_bytes}
    plain, sharded = (
        run_in_process(
            lambda _, shard=shard: one_round(SlowMoConfig(**settings, shard_slow_state=shard), elements), workers
        )
        for shard in (False, True)
    )
    for (plain_bytes, plain_state, *_), (sent, state, messages, buckets) in zip(plain, sharded, strict=True):
        theory = 2 * (workers - 1) / workers * 4 * elements
        assert theory <= sent <= 1.005 * theory + 1000  # the meeting's header and the norms
        assert sent == pytest.approx(plain_bytes, rel=0.005)
        assert plain_state == 2 * elements
        assert 2 * elements / workers <= state <= 2 * (elements / workers + buckets)
        assert buckets == math.ceil(4 * elements / (min(bucket_bytes, 4 * elements) // 5 // 4 * 4))
        # Rounded up; a fifth of room for gloo's own copy.
        assert messages <= 0.8 * min(bucket_bytes, 4 * elements) + 4 * workers * 4


@pytest.mark.parametrize("workers", [2, 5])
def test_bytes_and_memory_overlapped(workers):
    """
    The same bytes; messages for all parameters, both ways, and one copy of them beside 2/m of slow state.
    """
    elements = 10_007

    def train(rank):
        param = torch.nn.Parameter(torch.zeros(elements))
        config = SlowMoConfig(sync_every=3, overlap_steps=2, shard_slow_state=True)
        optimizer = SlowMoOptimizer(torch.optim.SGD([param], lr=0.1), config)
        for _ in range(8):
            param.grad = torch.ones(elements)
            optimizer.step()
        loop = optimizer.outer_loop
        kept = sum(t.nbytes for t in [*message_memory(loop), *loop.base.departed.values()])
        slow = [item.flat for item in loop.parts.slow.anchors] + loop.parts.slow.update.velocities
        return slowmo_hf.last_round(optimizer).bytes_sent, kept, sum(t.numel() for t in slow)

    for sent, kept, slow in run_in_process(train, workers):
        theory = 2 * (workers - 1) / workers * 4 * elements
        assert theory <= sent <= 1.005 * theory + 1000
        assert 12 * elements <= kept <= 12 * elements + 2 * 4 * workers
        assert 2 * elements / workers <= slow <= 2 * (elements / workers + 1)


def uneven():
    """Rank 1 ends three steps before the others."""
    config = CONFIGS["slow momentum"][0]
    ends, reports = [], []
    for shard in (False, True):
        model, optimizer, step_once = begin(make_config(config, shard), dist.get_rank())
        with slowmo_hf.join(optimizer):
            for step in range(STEPS - 3 * (dist.get_rank() == 1) - 1):
                step_once(step)
        with slowmo_hf.consensus(optimizer):
            ends.append(state_of(model))
        reports.append(slowmo_hf.last_round(optimizer).consensus_distance)
    return [*ends, reports]


def test_workers_count_by_their_steps():
    """The mean of a round is weighted alike, 1e-12 in fp64, and so is the distance of the workers."""
    for plain, sharded, distances in run_workers(uneven, 3):
        assert distances[1] == pytest.approx(distances[0], rel=1e-6), "of fp32 tensors too"
        for name in ("body.weight", "head.bias"):
            torch.testing.assert_close(sharded[name], plain[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("at_a_look", [False, True])
def test_nan_is_named(at_a_look):
    """Of a worker whose shard is another's, in a bucket that is not the first."""

    def work(rank):
        param = torch.nn.Parameter(torch.zeros(2000))
        config = SlowMoConfig(sync_every=4 if at_a_look else 2, shard_slow_state=True, bucket_bytes=4096)
        optimizer = SlowMoOptimizer(torch.optim.SGD([param], lr=0.1), config)
        for step in range(3):
            param.grad = torch.ones(2000)
            if (rank, step) == (1, 1):
                param.grad[1999] = float("nan")
            optimizer.step()
        with slowmo_hf.consensus(optimizer):
            pass

    with pytest.raises(RuntimeError) as raised:
        run_in_process(work, 3)
    words = str(raised.value)
    assert "rank 1 on" in words
    assert f"step {3 if at_a_look else 2}: its parameters are not finite (NaN or infinity)" in words
    assert "rank 0 on" not in words


def each_its_part(overlap_steps):
    """Two workers of two processes; the average at their end."""
    model, optimizer = train_node_workers(shard_slow_state=True, overlap_steps=overlap_steps)
    optimizer.eval()
    return values(model), [item.flat.numel() for item in optimizer.outer_loop.parts.slow.anchors]


@pytest.mark.parametrize("overlap_steps", [0, 1])
def test_each_process_of_a_worker_shards_its_part(overlap_steps):
    found = run_workers(each_its_part, 4, overlap_steps)
    for weights, sizes in found:
        assert same(weights, found[0][0])
        assert sizes == [8]  # of 16 and 15 parameters


# ---- checkpoints ----


SAVED = {"sync_every": 3, "outer_momentum": 0.6, "bucket_bytes": 1024}
IN_FLIGHT = {"overlap_steps": 2}  # launched at 6, updated at 7, due at 8
RESUMED = {  # sharded when saved and when resumed, other settings, workers
    "sharded": (True, True, {}, 3),
    "sharded, other buckets": (True, True, {"bucket_bytes": 2**20}, 3),
    "sharded, then plain": (True, False, {}, 3),
    "plain, then sharded": (False, True, {}, 3),
    "sharded, two workers": (True, True, {}, 2),
    "sharded, then plain, five workers": (True, False, {}, 5),
    "in flight": (True, True, IN_FLIGHT, 3),
    "in flight, other buckets": (True, True, IN_FLIGHT | {"bucket_bytes": 2**20}, 3),
    "in flight, sharded, then plain": (True, False, IN_FLIGHT, 3),
    "in flight, plain, then sharded": (False, True, IN_FLIGHT, 3),
    "in flight, two workers": (True, True, IN_FLIGHT, 2),
}


def saver(folder, shard, rank, overlap_steps=0):
    """Saved at the end of a round, after 6 of 9 steps, and inside the next, after 7."""
    model, optimizer, step_once = begin(make_config(SAVED | {"overlap_steps": overlap_steps}, shard), rank)
    for step in range(STEPS):
        step_once(step)
        if step in (5, 6):
            write_snapshot(f"{folder}/{step}", optimizer.outer_loop, shared=rank == 0, objects={})
            torch.save(state_of(model), f"{folder}/{step}/model_{rank}.pt")
    return state_of(model)


def resumer(folder, step, config, rank):
    """Into an outer loop that has had a round."""
    model, optimizer, step_once = begin(config, rank)
    for before in range(4):
        step_once(before)
    lrs = [0.05, 0.025, 0.02]
    for _ in range(step + 1):
        lrs = [lr * (1 - 0.03 * factor) for lr, factor in zip(lrs, (1, 2, 3), strict=True)]
    model.load_state_dict(torch.load(f"{folder}/5/model_0.pt"))  # Trainer and Accelerate have loaded the average
    check_snapshot(f"{folder}/{step}", optimizer.outer_loop)()
    for group, lr in zip(optimizer.param_groups, lrs, strict=True):
        group["lr"] = lr
    for later in range(step + 1, STEPS):
        step_once(later)
    return state_of(model)


@pytest.mark.slow
@pytest.mark.parametrize("case", RESUMED)
def test_resume(tmp_path, case):
    """
    With the same number of workers it ends as the run that was never stopped, of either kind; with another, as the
    plain one.
    """
    saved_sharded, resumed_sharded, settings, workers = RESUMED[case]
    overlap = settings.get("overlap_steps", 0)
    saved = run_in_process(lambda rank: saver(tmp_path, saved_sharded, rank, overlap), 3)
    for step in (5, 6):
        config = make_config(SAVED | settings, resumed_sharded)
        found = run_in_process(lambda rank, step=step, config=config: resumer(tmp_path, step, config, rank), workers)
        plain = make_config(SAVED | settings, False)
        right = run_in_process(lambda rank, step=step, config=plain: resumer(tmp_path, step, config, rank), workers)
        for rank, end in enumerate(found):
            assert same(end, right[rank])
            if workers == 3:
                assert same(end, saved[rank])


def test_the_files_are_those_of_a_plain_run(tmp_path):
    for shard in (False, True):
        (tmp_path / str(shard)).mkdir()
        run_in_process(lambda rank, shard=shard: saver(tmp_path / str(shard), shard, rank), 3)
    for step in (5, 6):
        plain, sharded = (
            read_part(str(tmp_path / str(shard) / str(step)), "shared").tensors for shard in (False, True)
        )
        slow = {"anchor.0", "anchor.1", "velocity.0", "velocity.1"}
        assert set(plain) == set(sharded)
        assert {name for name in plain if not name.startswith("averaged_buffer.")} == slow
        assert same(plain, sharded)
        assert plain["velocity.1"].any()


def no_room(folder, processes):
    """Rank 0, which writes the shared part, finds no memory for it; what all are told."""
    config = SlowMoConfig(
        sync_every=2, processes_per_worker=processes, shard_slow_state=True, timeout_seconds=patience(30)
    )
    param = torch.nn.Parameter(torch.zeros(501))
    model = torch.nn.ParameterList([param])
    optimizer = SlowMoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), config)
    loop = OuterLoop(optimizer.inner_optimizer, config, model)
    loop.start()
    real = torch.empty

    def empty(*size, dtype=None, **rest):
        if dtype == torch.float32:
            raise RuntimeError("no memory")
        return real(*size, dtype=dtype, **rest)

    torch.empty = empty if dist.get_rank() == 0 else real
    try:
        together(
            loop,
            "cannot be written",
            lambda: write_snapshot(str(folder), loop, shared=dist.get_rank() == 0, objects={}),
        )
    except CheckpointError as error:
        return str(error)
    finally:
        torch.empty = real


@pytest.mark.parametrize("processes", [1, 2])
def test_a_rank_without_room_for_the_whole_is_told_on_all(tmp_path, processes):
    for words in run_workers(no_room, 2 * processes, tmp_path, processes):
        assert words.startswith("cannot be written. rank 0 on ")
        assert words.endswith(": RuntimeError: no memory")


def test_no_report_counts_what_a_checkpoint_sends(tmp_path):
    def work(rank):
        _, optimizer, step_once = begin(make_config(SAVED, True), rank)
        for step in range(6):
            step_once(step)
            if step == 2:
                first = slowmo_hf.last_round(optimizer).bytes_sent
                write_snapshot(str(tmp_path), optimizer.outer_loop, shared=rank == 0, objects={})
        return first, slowmo_hf.last_round(optimizer).bytes_sent

    for first, second in run_in_process(work, 3):
        assert second == first


@pytest.mark.slow
def test_a_state_dict_of_a_plain_run_is_taken_up_and_none_is_given():
    def work(rank):
        model, optimizer, step_once = begin(make_config(SAVED, False), rank)
        for step in range(6):
            step_once(step)
        saved = optimizer.state_dict()
        ends = []
        for shard in (False, True):
            model, optimizer, step_once = begin(make_config(SAVED, shard), rank)
            step_once(0)
            optimizer.load_state_dict(saved)
            start = state_of(model)
            for step in range(6, STEPS):
                step_once(step)
            ends.append((start, state_of(model)))
        with pytest.raises(
            RuntimeError, match=r"shard_slow_state=True: each has a part of it. Use accelerator.save_state"
        ):
            optimizer.state_dict()
        return ends

    for (plain_start, plain_end), (start, end) in run_in_process(work, 3):
        parameters = [name for name in start if not name.startswith("norm.running") and "tracked" not in name]
        for name in parameters:
            assert torch.equal(start[name], plain_start[name])
            assert torch.equal(end[name], plain_end[name])


def test_the_log_says_that_the_state_is_cut_otherwise(tmp_path):
    run_in_process(lambda rank: saver(tmp_path, True, rank), 2)
    logging.getLogger("slowmo_hf").setLevel(logging.INFO)
    with Heard() as said:
        run_in_process(lambda rank: resumer(tmp_path, 5, make_config(SAVED, False), rank), 2)
    assert said.about("shard_slow_state True -> False")


# ---- settings ----


@pytest.mark.parametrize("base", ["sgp", "osgp", "dpsgd", "all_reduce"])
def test_other_bases_refuse_it(base):
    with pytest.raises(ValueError, match=rf"shard_slow_state=True needs base='local_sgd', got base='{base}'"):
        SlowMoConfig(base=base, shard_slow_state=True)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"compression": "int8"}, "needs compression='none', got compression='int8'"),
        (
            {"outer_optimizer": "torch.optim.SGD"},
            "needs outer_optimizer='slow_momentum', got outer_optimizer='torch.optim.SGD'",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        SlowMoConfig(shard_slow_state=True, **settings)


def test_the_device_alone_is_refused():
    with pytest.raises(
        ValueError, match="slow_state_device='cpu' needs shard_slow_state=True, got shard_slow_state=False"
    ):
        SlowMoConfig(slow_state_device="cpu")
    with pytest.raises(ValueError, match="slow_state_device must be one of same, cpu, got 'disk'"):
        SlowMoConfig(shard_slow_state=True, slow_state_device="disk")
    with pytest.raises(ValueError, match="shard_slow_state must be True or False, got 'yes'"):
        SlowMoConfig(shard_slow_state="yes")
