"""Overlapped rounds: the average travels while workers train on, and what it brings is what the equation says."""

from __future__ import annotations

import dataclasses
import re
import time

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator

import slowmo_hf
from harness import patience, run_workers
from slowmo_hf import SlowMoConfig, SlowMoOptimizer, run_in_process
from slowmo_hf.algorithm.codec import BLOCK
from slowmo_hf.checkpoints.state import check_snapshot, write_snapshot
from slowmo_hf.names import CODES, find
from slowmo_hf.wire.communicator import Arrival, Communicator
from tiny import Regression, Rows, equal, message_memory, two_groups, values, warmup_and_decay

STEPS = 14
LR = 0.05
HOW = {"plain": {}, "int8": {"compression": "int8"}, "sharded": {"shard_slow_state": True}}
CASES = {  # sync_every 5: rounds at 5 and 10
    "local sgd": (SlowMoConfig.local_sgd(5, overlap_steps=2), "sgd"),
    "slow momentum, reset": (SlowMoConfig(sync_every=5, outer_momentum=0.6, overlap_steps=3), "sgd"),
    "alpha, adam": (SlowMoConfig(sync_every=5, outer_momentum=0.4, outer_lr=0.8, overlap_steps=4), "adamw"),
    "int8": (SlowMoConfig(sync_every=5, outer_momentum=0.6, overlap_steps=3, compression="int8"), "sgd"),
    "bf16, to the last step": (
        SlowMoConfig(sync_every=7, outer_momentum=0.6, overlap_steps=6, compression="bf16"),
        "sgd",
    ),
    "diloco": (SlowMoConfig.diloco(sync_every=5, overlap_steps=1), "adamw"),
    # 14 is a round: in flight at the end.
    "to the last step": (
        SlowMoConfig(sync_every=7, outer_momentum=0.6, overlap_steps=6),
        "sgd",
    ),
}


def _batch(step, rank):
    start = 16 * step + 4 * rank
    return slice(start, start + 4)


def _train(config, name, rank):
    """Parameters after every step, and what a look shows after every second one."""
    model, rows = Regression(), Rows(STEPS * 16)
    optimizer = SlowMoOptimizer(two_groups(model, name, LR), config)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer.inner_optimizer, warmup_and_decay)
    after, shown, reports = [], {}, []
    for step in range(STEPS):
        batch = _batch(step, rank)
        model(rows.x[batch], rows.y[batch])["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        after.append(values(model))
        if step % 2:
            with slowmo_hf.consensus(optimizer):
                shown[step] = values(model)
        reports.append(slowmo_hf.last_round(optimizer))
    return after, shown, reports


class Feedback:
    """
    The mean of displacements as it travels in codes: Q(s) / m, s = sum of Q(d_i + e_i) + E; e and E are what Q has
    left.
    """

    def __init__(self, code, workers, elements):
        self.code, self.workers = code, workers
        self.own, self.owned = torch.zeros(workers, elements).double(), torch.zeros(elements).double()

    def rounded(self, values):
        blocks = torch.nn.functional.pad(values, (0, -len(values) % BLOCK))
        return self.code.dequantise(*self.code.quantise(blocks)).double()[: len(values)]

    def mean(self, displacements):
        said = []
        for own, displacement in zip(self.own, displacements, strict=True):
            whole = displacement + own
            said.append(self.rounded(whole))
            own.copy_(whole - said[-1])
        total = sum(said) + self.owned
        applied = self.rounded(total)
        self.owned = total - applied
        return applied / self.workers


def by_hand(config, name, workers):
    """
    All workers in one place, from the equations alone. At k: Delta = anchor - mean x_k, v = beta r v + Delta, anchor =
    anchor - alpha v (or torch's SGD on the anchor); a compressed Delta is `Feedback`'s. At k + n: x_i = anchor + (x_i
    - x_i at k). A look shows the mean of the x_i as if all were taken in now.
    """
    crew = []
    for _ in range(workers):
        model = Regression()
        optimizer = two_groups(model, name, LR)
        crew.append((model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_and_decay)))
    rows = Rows(STEPS * 16)
    anchor = [p.detach().clone().requires_grad_() for p in crew[0][0].parameters()]
    velocity, previous_lrs, departed, due = [torch.zeros_like(a) for a in anchor], None, None, 0
    outer = None
    if config.outer_optimizer != "slow_momentum":
        outer = torch.optim.SGD(anchor, lr=config.outer_lr, momentum=0.9, nesterov=True)
    groups = [0, 0, 1, 1]  # body, head
    sizes = [a.numel() for a in anchor]
    feedback = (
        Feedback(find(CODES[config.compression])(), workers, sum(sizes)) if config.compression != "none" else None
    )
    after, shown, in_force = [], {}, []
    with torch.no_grad():
        for step in range(STEPS):
            in_force.append([group["lr"] for group in crew[0][1].param_groups])
            for rank, (model, optimizer, _) in enumerate(crew):
                batch = _batch(step, rank)
                with torch.enable_grad():
                    model(rows.x[batch], rows.y[batch])["loss"].backward()
                optimizer.step()
                optimizer.zero_grad()
            if departed is not None and step + 1 == due:
                for (model, optimizer, _), then in zip(crew, departed, strict=True):
                    for p, a, x in zip(model.parameters(), anchor, then, strict=True):
                        p.copy_(a + (p - x))
                    if config.inner_state == "auto" and name == "sgd":
                        optimizer.state.clear()
                departed = None
            if (step + 1) % config.sync_every == 0:
                departed = [[p.detach().clone() for p in model.parameters()] for model, _, _ in crew]
                due = step + 1 + config.overlap_steps
                lrs, in_force = [sum(of_one) / config.sync_every for of_one in zip(*in_force, strict=True)], []
                displacements = [
                    torch.cat([(a - x).flatten() for a, x in zip(anchor, then, strict=True)]) for then in departed
                ]
                mean = feedback.mean(displacements) if feedback else sum(displacements) / workers
                for j, (a, run) in enumerate(zip(anchor, mean.split(sizes), strict=True)):
                    pseudo_grad = run.view_as(a)
                    if outer is not None:
                        a.grad = pseudo_grad
                        continue
                    ratio = lrs[groups[j]] / previous_lrs[groups[j]] if previous_lrs else 1.0
                    velocity[j] = config.outer_momentum * ratio * velocity[j] + pseudo_grad
                    a.sub_(config.outer_lr * velocity[j])
                if outer is not None:
                    outer.step()
                previous_lrs = lrs
            after.append([values(model) for model, _, _ in crew])
            names = [key for key, _ in crew[0][0].named_parameters()]
            wholes = []
            for i, (model, _, _) in enumerate(crew):
                xs = list(model.parameters())
                wholes.append(
                    [a + (p - x) for a, p, x in zip(anchor, xs, departed[i], strict=True)] if departed else xs
                )
            shown[step] = {key: sum(whole[j].detach() for whole in wholes) / workers for j, key in enumerate(names)}
            for _, _, schedule in crew:
                schedule.step()
    return after, shown


def _close(mine, other):
    for name, value in other.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("case", CASES)
def test_parameters_and_looks_are_those_of_the_equation(case):
    """Float64, four workers, every step."""
    config, name = CASES[case]
    after, shown = by_hand(config, name, 4)
    for rank, (mine, looks, _) in enumerate(run_in_process(lambda rank: _train(config, name, rank), 4)):
        for step in range(STEPS):
            _close(mine[step], after[step][rank])
        for step, look in looks.items():
            _close(look, shown[step])


def _train_here(config, name):
    return _train(config, name, dist.get_rank())


@pytest.mark.parametrize("case", ["slow momentum, reset", "int8"])
def test_processes_do_the_same(case):
    config, name = CASES[case]
    together = run_in_process(lambda rank: _train(config, name, rank), 2)
    for (mine, looks, reports), (after, shown, told) in zip(
        run_workers(_train_here, 2, config, name), together, strict=True
    ):
        for step in range(STEPS):
            _close(mine[step], after[step])
        for step, look in looks.items():
            _close(look, shown[step])
        assert [r and r.round for r in reports] == [r and r.round for r in told] == [None] * 7 + [1] * 5 + [2] * 2
        payload = 8 * (31 + 1)  # the consensus distance rides along
        if config.compression == "int8":  # twice a block of 256, its scale and a weight or norm
            payload = 2 * (256 + 8 + 8)
        header = 8 * (10 + 2)
        assert [r.bytes_sent for r in reports if r] == [payload + header] * 7
        for r, t in zip(reports[7:], told[7:], strict=True):
            assert r.consensus_distance == pytest.approx(t.consensus_distance, rel=1e-9)
            assert r.pseudo_grad_norm == pytest.approx(t.pseudo_grad_norm, rel=1e-9)


# ---- the wire ----


def _order(config):
    """What happens on the wire, in order, with the steps between."""
    events = []
    start_sum = Communicator.start_sum_

    def noted(self, flat):
        wait = start_sum(self, flat)
        if self.world_size == 1 or flat.numel() < 20:
            return wait
        events.append("sent")
        return lambda: (events.append("waits"), wait())[1]

    Communicator.start_sum_ = noted
    model, rows = Regression(), Rows(STEPS * 16)
    optimizer = SlowMoOptimizer(two_groups(model, "sgd", LR), config)
    for step in range(8):
        batch = _batch(step, dist.get_rank())
        model(rows.x[batch], rows.y[batch])["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        events.append(step + 1)
    return events


def _two_stages(config):
    """The same of a compressed round; a step takes longer than a stage."""
    events = []

    def noted(name, start):
        def started(self, *tensors):
            events.append(name)
            arrival = start(self, *tensors)
            return (
                Arrival(lambda: (events.append("waits"), arrival())[1], arrival.is_here)
                if name == "to all"
                else arrival
            )

        return started

    Communicator.start_all_to_all = noted("to owners", Communicator.start_all_to_all)
    Communicator.start_all_gather = noted("to all", Communicator.start_all_gather)
    model, rows = Regression(), Rows(STEPS * 16)
    optimizer = SlowMoOptimizer(two_groups(model, "sgd", LR), config)
    for step in range(10):
        batch = _batch(step, dist.get_rank())
        model(rows.x[batch], rows.y[batch])["loss"].backward()
        time.sleep(0.2)
        optimizer.step()
        optimizer.zero_grad()
        events.append(step + 1)
    return events


@pytest.mark.slow
def test_the_second_stage_of_a_compressed_round_travels_too():
    """
    It sets out at the first step that finds the first one here; with one step of overlap it has to be waited for.
    """
    for events in run_workers(_two_stages, 2, SlowMoConfig.local_sgd(5, overlap_steps=3, compression="int8")):
        assert events == [1, 2, 3, 4, "to owners", 5, "to all", 6, 7, "waits", 8, 9, "to owners", 10]
    for events in run_workers(_two_stages, 2, SlowMoConfig.local_sgd(5, overlap_steps=1, compression="int8")):
        assert events == [1, 2, 3, 4, "to owners", 5, "to all", "waits", 6, 7, 8, 9, "to owners", 10]


def test_nobody_waits_before_the_average_is_due():
    config = SlowMoConfig.local_sgd(3, overlap_steps=2)
    for events in run_workers(_order, 2, config):
        assert events == [1, 2, "sent", 3, 4, "waits", 5, "sent", 6, 7, "waits", 8]
    for events in run_workers(_order, 2, SlowMoConfig.local_sgd(3)):
        assert events == [1, 2, "sent", "waits", 3, 4, 5, "sent", "waits", 6, 7, 8]


def _small_buckets(rank, bucket_bytes):
    config = SlowMoConfig(sync_every=3, overlap_steps=1, bucket_bytes=bucket_bytes)
    torch.manual_seed(0)
    model = torch.nn.Linear(40, 40).double()
    optimizer = SlowMoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), config)
    for step in range(7):
        inputs = torch.randn(4, 40, generator=torch.Generator().manual_seed(10 * step + rank), dtype=torch.float64)
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return values(model), len(optimizer.outer_loop.parts.slow.buckets)


def test_many_buckets_travel_together():
    one, many = (run_in_process(lambda rank, size=size: _small_buckets(rank, size), 2) for size in (2**20, 2048))
    assert (one[0][1], many[0][1]) == (1, 7)
    for (mine, _), (other, _) in zip(one, many, strict=True):
        _close(mine, other)


# ---- the meeting travels too ----

# Rounds at 6, 12 and 18; from 12 on ahead.
AHEAD = SlowMoConfig(sync_every=6, outer_momentum=0.5, overlap_steps=3, timeout_seconds=patience(20))


class Still(torch.nn.Module):
    """One weight, and a buffer that is changed from outside."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((4,), 8.0, dtype=torch.float64))
        self.register_buffer("seen", torch.zeros(1, dtype=torch.float64))
        self.register_buffer("count", torch.zeros(1, dtype=torch.int64))

    def forward(self, target):
        return (self.weight - target).square().sum() / 2


def _ahead(config, steps, events):
    """
    Events by (rank, step) happen before the inner step. (seconds, weight, buffer, stop requested) of every step, or
    the error's.
    """
    model = Still()
    optimizer = SlowMoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), config)
    accelerator = Accelerator(cpu=True)
    called, prepared = accelerator.prepare(model, optimizer)
    rank, told = dist.get_rank(), []
    for step in range(1, steps + 1):
        try:
            events.get((rank, step), lambda model, optimizer: None)(model, optimizer)
            accelerator.backward(called(torch.tensor(float(rank))))
            start = time.monotonic()
            prepared.step()
        except (ValueError, RuntimeError) as error:
            return step, str(error)
        prepared.zero_grad()
        buffers = (model.seen.item(), model.count.item())
        told.append((time.monotonic() - start, model.weight[0].item(), buffers, slowmo_hf.stop_requested(optimizer)))
    return told


def sleeps(model, optimizer):
    time.sleep(1)


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
def test_nobody_waits_for_a_worker_that_is_less_than_n_steps_behind(how):
    """
    Rank 1 is a second late for step 12. Rank 0 waits at 15, where the round is taken in; at 14 where the update stands
    half-way; without overlap at 12. Values do not change.
    """
    late = {(1, 12): sleeps}
    for base, waits_at in (
        (AHEAD, 14 if how == "sharded" else 15),
        (SlowMoConfig(sync_every=6, outer_momentum=0.5), 12),
    ):
        config = dataclasses.replace(base, **HOW[how])
        first, second = run_workers(_ahead, 2, config, 19, late)
        for rank, told in enumerate(run_workers(_ahead, 2, config, 19, {})):
            assert [values for _, *values in told] == [values for _, *values in (first, second)[rank]]
        assert [step for step, (seconds, *_) in enumerate(first, start=1) if seconds > 0.5] == [waits_at]


def changes_buffers(model, optimizer):
    model.seen += 1 + 2 * dist.get_rank()
    model.count += 5 + dist.get_rank()


def test_a_buffer_that_changes_behind_the_meeting_is_averaged_when_it_is_heard_of():
    """
    At step 10 on both: round 12 has gone ahead, and is heard of at 15. From then on all meet at the round, and average
    there.
    """
    events = {(rank, step): changes_buffers for rank in (0, 1) for step in (10, 17)}
    for rank, told in enumerate(run_workers(_ahead, 2, AHEAD, 19, events)):
        buffers = [values[1] for _, *values in told]
        own = (1.0 + 2 * rank, 5 + rank)
        assert buffers == [(0.0, 0)] * 9 + [own] * 5 + [(2.0, 6)] * 2 + [(2.0 + own[0], 6 + own[1])] + [(4.0, 12)] * 2


def test_a_buffer_that_changes_on_one_rank_alone():
    events = {(1, 10): changes_buffers}
    for rank, told in enumerate(run_workers(_ahead, 2, AHEAD, 16, events)):
        buffers = [values[1] for _, *values in told]
        assert buffers == [(0.0, 0)] * 9 + [(3.0, 6) if rank else (0.0, 0)] * 5 + [(1.5, 6)] * 2


def adds_a_parameter(model, optimizer):
    optimizer.param_groups[0]["params"].append(torch.nn.Parameter(torch.zeros(3)))


def looks(model, optimizer):
    with slowmo_hf.consensus(optimizer):
        pass


def asks_for_a_stop(model, optimizer):
    optimizer.outer_loop.status.stop_asked = True


def test_what_differs_is_told_on_all_when_it_is_heard_of():
    """
    Another parameter set on rank 1: there at once, on rank 0 when it takes in. A look where the other has a round:
    alike.
    """
    (first, words), (second, same) = run_workers(_ahead, 2, AHEAD, 19, {(1, 11): adds_a_parameter})
    assert (first, second) == (15, 15)
    assert words == same
    assert re.match(r"rank 1 on \S+, step 12: the parameter set changed after the start", words)
    (first, words), (second, same) = run_workers(_ahead, 2, AHEAD, 19, {(1, 12): looks})
    assert (first, second) == (15, 12)
    assert words == same
    assert re.match(
        r"ranks met at different places: rank 0 on \S+ at step 12, the round; rank 1 on \S+ at step 11, a view", words
    )


def _refused_after_an_end(config):
    """Rank 1 has ended after step 10; the parameter set of rank 0 changes at 11."""
    model, rank = Still(), dist.get_rank()
    optimizer = SlowMoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), config)
    try:
        with slowmo_hf.join(optimizer):
            for step in range(1, (18, 10)[rank] + 1):
                if step == 11:
                    adds_a_parameter(model, optimizer)
                model.weight.grad = model.weight.detach() - rank
                optimizer.step()
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
def test_a_refusal_keeps_its_cause_where_a_rank_has_ended(how):
    config = dataclasses.replace(AHEAD, **HOW[how], timeout_seconds=6)
    for words in run_workers(_refused_after_an_end, 2, config):
        assert re.match(r"rank 0 on \S+, step 12: the parameter set changed after the start", words), words


def _mends(config, processes):
    """
    The last rank has another parameter set from step 11 on, which is told at 15 (sharded at 14), and then the old one
    again. A look, and their mean.
    """
    model, rank, ranks = Still(), dist.get_rank(), dist.get_world_size()
    optimizer = SlowMoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), config)
    called = torch.nn.parallel.DistributedDataParallel(model)
    for step in range(1, 19):
        if (rank, step) == (ranks - 1, 11):
            adds_a_parameter(model, optimizer)
        optimizer.zero_grad()
        called(torch.tensor(float(rank // processes))).backward()
        try:
            optimizer.step()
        except ValueError:
            assert step == 15 - config.shard_slow_state
            if rank == ranks - 1:
                del optimizer.param_groups[0]["params"][-1]
            mean = model.weight.detach().clone()
            dist.all_reduce(mean)
            with slowmo_hf.consensus(optimizer):
                shown = model.weight.detach().clone()
            told = (
                shown.tolist(),
                (mean / ranks).tolist(),
                optimizer.outer_loop.rounds,
                optimizer.outer_loop.clock.local_steps,
            )
    return told, slowmo_hf.last_round(optimizer).round, optimizer.outer_loop.rounds


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("how", HOW)
def test_a_round_that_was_refused_never_was(processes, how):
    """
    Rounds at 6 and 18 are left; the look behind the error is the mean of what the workers have. With two processes a
    worker it is one that does not lead, whose leader has sent its part.
    """
    config = dataclasses.replace(AHEAD, processes_per_worker=processes, **HOW[how])
    for (shown, mean, rounds, local_steps), last, rounds_at_18 in run_workers(
        _mends, 2 * processes, config, processes
    ):
        assert shown == pytest.approx(mean, abs=1e-12)
        assert (rounds, local_steps) == (1, 9 - config.shard_slow_state)
        assert (last, rounds_at_18) == (1, 2)


def _logs(config):
    """Rank 1 is late for step 12, where all then gather for a log. (seconds, utilisation) of the round of step 12."""
    model, rank = Still(), dist.get_rank()
    optimizer = SlowMoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), config)
    for step in range(1, 16):
        if (rank, step) == (1, 12):
            time.sleep(1)
        model.weight.grad = model.weight.detach() - rank
        optimizer.step()
        if step == 12:
            optimizer.outer_loop.meet_before_gathering()
    report = slowmo_hf.last_round(optimizer)
    return report.round, report.seconds, optimizer.outer_loop.account.spent.utilisation


def test_a_wait_for_a_round_at_a_log_is_in_its_report():
    (number, seconds, utilisation), _ = run_workers(_logs, 2, AHEAD)
    assert number == 2
    assert seconds > 0.9
    assert utilisation < 0.2


def test_all_hear_of_a_stop_at_the_same_step():
    for told in run_workers(_ahead, 2, AHEAD, 19, {(1, 11): asks_for_a_stop}):
        assert [stop for *_, stop in told] == [False] * 14 + [True] * 5


# ---- buffers, bf16, the end ----


class Normed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.norm = torch.nn.BatchNorm1d(4)
        self.head = torch.nn.Linear(4, 1)

    def forward(self, x):
        return self.head(self.norm(x)).square().mean()


def _normed(config):
    accelerator = Accelerator(cpu=True)
    bare = Normed()
    model, optimizer = accelerator.prepare(bare, SlowMoOptimizer(torch.optim.SGD(bare.parameters(), lr=0.1), config))
    seen = []
    for step in range(5):
        inputs = (
            torch.randn(6, 4, generator=torch.Generator().manual_seed(10 * step + dist.get_rank())) + dist.get_rank()
        )
        accelerator.backward(model(inputs))
        optimizer.step()
        optimizer.zero_grad()
        seen.append(values(bare))
    return seen


def test_buffers_meet_at_once_and_parameters_later():
    first, second = run_workers(_normed, 2, SlowMoConfig.local_sgd(3, overlap_steps=1))
    means = [[seen["norm.running_mean"] for seen in one] for one in (first, second)]
    assert not torch.equal(means[0][1], means[1][1])
    assert torch.equal(means[0][2], means[1][2])
    assert not torch.equal(first[2]["head.weight"], second[2]["head.weight"])
    assert not torch.equal(first[3]["head.weight"], second[3]["head.weight"]), "each keeps its own progress"


def test_bf16_without_progress_is_the_rounded_anchor():
    """Learning rate 0 in the overlapped step: what is taken in is what a plain round hands back, bit for bit."""

    def train(rank, overlap_steps):
        torch.manual_seed(1)
        p = torch.nn.Parameter(torch.randn(50).bfloat16())
        inner = torch.optim.SGD([p], lr=0.1)
        optimizer = SlowMoOptimizer(inner, SlowMoConfig(sync_every=3, outer_momentum=0.5, overlap_steps=overlap_steps))
        for step in range(8):
            inner.param_groups[0]["lr"] = 0.0 if step % 3 == 0 else 0.1
            p.grad = torch.randn(50, generator=torch.Generator().manual_seed(10 * step + rank)).bfloat16()
            optimizer.step()
        return p.detach().clone()

    plain, overlapped = (run_in_process(lambda rank, n=n: train(rank, n), 3) for n in (0, 1))
    for mine, other in zip(plain, overlapped, strict=True):
        assert torch.equal(mine, other)


def _leaves_early(config, batches):
    """Rank 1 has fewer batches; the end of both is the average that counts what was in flight."""
    rank = dist.get_rank()
    model = torch.nn.Linear(1, 1, bias=False).double()
    torch.nn.init.constant_(model.weight, 8.0)
    optimizer = SlowMoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), config)
    with slowmo_hf.join(optimizer):
        for _ in range(batches[rank]):
            ((model(torch.ones(1, 1).double()) - rank) ** 2 / 2).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    with slowmo_hf.consensus(optimizer):
        return model.weight.item(), optimizer.outer_loop.rounds


@pytest.mark.parametrize("how", HOW)  # one number alone in its block is exact
def test_a_worker_that_leaves_early_takes_part_and_the_end_takes_in_what_travels(how):
    """
    sync_every 2, n 1, weights by steps since the round before: rounds at 2, 4 and 6, the last one in flight at the
    end.
    """
    x, anchor, velocity, then, steps = [8.0, 8.0], 8.0, 0.0, None, [0, 0]
    for step in range(1, 7):
        for rank in (0, 1):
            if step <= (6, 3)[rank]:
                x[rank] -= 0.1 * (x[rank] - rank)
                steps[rank] += 1
        if step % 2 == 1 and then is not None:
            x, then = [anchor + (x[i] - then[i]) for i in (0, 1)], None
        if step % 2 == 0:
            average = sum(steps[i] * x[i] for i in (0, 1)) / sum(steps)
            velocity = 0.5 * velocity + (anchor - average)
            anchor, then, steps = anchor - velocity, list(x), [0, 0]
    config = SlowMoConfig(sync_every=2, overlap_steps=1, **HOW[how], timeout_seconds=patience(20))
    for end, rounds in run_workers(_leaves_early, 2, config, (6, 3)):
        assert end == pytest.approx(anchor, abs=1e-12)
        assert rounds == 3


def _ends_before_a_buffer_changes(config):
    """
    Rank 0 has 6 batches, rank 1 12. Its buffer changes at step 9, the round of 12 goes ahead, and at the end all
    compare buffers.
    """
    rank = dist.get_rank()
    model = Still()
    optimizer = SlowMoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), config)
    called, prepared = Accelerator(cpu=True).prepare(model, optimizer)
    with slowmo_hf.join(optimizer):
        for step in range(1, (6, 12)[rank] + 1):
            if step == 9:
                model.seen += 3
            called(torch.tensor(float(rank))).backward()
            prepared.step()
            prepared.zero_grad()
    with slowmo_hf.consensus(optimizer):
        return model.weight[0].item(), model.seen.item()


@pytest.mark.parametrize("how", HOW)
def test_an_end_hears_of_a_round_before_it_waits_for_its_messages(how):
    """
    At 6 both count, and it is taken in at 7; from there on rank 1 alone trains, and alone counts: its 3 in the buffer
    is all's.
    """
    config = SlowMoConfig.local_sgd(6, overlap_steps=1, **HOW[how], timeout_seconds=patience(20))
    at_6 = 1 + 7 * 0.9**6
    at_7 = (8 * 0.9**6 + at_6) / 2 + (1 + 7 * 0.9**7 - at_6)
    for end, seen in run_workers(_ends_before_a_buffer_changes, 2, config):
        assert end == pytest.approx(1 + (at_7 - 1) * 0.9**5, abs=1e-12)
        assert seen == 3


def _drops_a_run_in_flight(config):
    """
    Three runs in turn, left while a round travels, one rank slower: whether its second stage has set out by then
    differs by rank.
    """
    ends = []
    for _ in range(3):
        model = Still()
        optimizer = SlowMoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), config)
        for _ in range(9):
            time.sleep(0.03 * (1 - dist.get_rank()))
            model.weight.grad = model.weight.detach() - dist.get_rank()
            optimizer.step()
        ends.append(model.weight[0].item())
    return ends


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
def test_runs_in_turn_are_the_same_whatever_is_left_in_flight(how):
    config = SlowMoConfig.local_sgd(4, overlap_steps=3, **HOW[how], timeout_seconds=patience(20))
    for ends in run_workers(_drops_a_run_in_flight, 2, config):
        assert ends == [ends[0]] * 3


def _meets_nan(config):
    model, rows = Regression(), Rows(STEPS * 16)
    optimizer = SlowMoOptimizer(two_groups(model, "sgd", LR), config)
    for step in range(8):
        batch = _batch(step, dist.get_rank())
        model(rows.x[batch], rows.y[batch])["loss"].backward()
        if step == 2 and dist.get_rank() == 1:
            model.head.weight.grad.fill_(float("nan"))
        try:
            optimizer.step()
        except ValueError as error:
            return step + 1, str(error)
        optimizer.zero_grad()
    return None


@pytest.mark.parametrize("how", HOW)
def test_nan_on_one_rank_is_told_at_the_next_meeting(how):
    config = SlowMoConfig.local_sgd(3, overlap_steps=1, **HOW[how], timeout_seconds=patience(20))
    first, second = run_workers(_meets_nan, 2, config)
    assert first == second
    step, words = first
    assert step == 6
    assert re.match(r"rank 1 on \S+, step 6: its parameters are not finite", words)
    assert "rank 0" not in words


def _loads_after_nan(folder, how):
    config = SlowMoConfig.local_sgd(3, overlap_steps=1, **HOW[how], timeout_seconds=patience(20))
    accelerator = Accelerator(cpu=True)
    bare, rows = Regression(), Rows(STEPS * 16)
    model, optimizer = accelerator.prepare(bare, SlowMoOptimizer(two_groups(bare, "sgd", LR), config))
    slowmo_hf.register_for_checkpointing(accelerator, optimizer)

    def step(number, spoil=False):
        batch = _batch(number, dist.get_rank())
        accelerator.backward(model(rows.x[batch], rows.y[batch])["loss"])
        if spoil and dist.get_rank() == 1:
            bare.head.weight.grad.fill_(float("nan"))
        optimizer.step()
        optimizer.zero_grad()

    step(0)
    step(1)
    accelerator.save_state(folder)
    for number in range(2, 8):
        step(number)
    good = values(bare)
    accelerator.wait_for_everyone()
    accelerator.load_state(folder)
    step(2, spoil=True)
    step(3)
    accelerator.load_state(folder)
    for number in range(2, 8):
        step(number)
    return equal(values(bare), good)


@pytest.mark.parametrize("how", HOW)
def test_a_good_checkpoint_is_gone_on_with_after_nan(tmp_path, how):
    assert run_workers(_loads_after_nan, 2, str(tmp_path / "saved"), how) == [True, True]


def _leaves_before_the_due_step(config):
    """Pass by pass: rank 1 leaves the second block at step 5, before what set out at 4 is due at 6; rank 0 at 7."""
    rank = dist.get_rank()
    model = torch.nn.Linear(1, 1, bias=False).double()
    torch.nn.init.constant_(model.weight, 8.0)
    optimizer = SlowMoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), config)
    with slowmo_hf.join(optimizer):
        for _ in range((7, 5)[rank]):
            ((model(torch.ones(1, 1).double()) - rank) ** 2 / 2).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.weight.item(), not optimizer.outer_loop.in_flight.rounds


@pytest.mark.parametrize("how", HOW)
def test_a_worker_that_left_before_takes_in_what_the_others_have(how):
    x = [8.0, 8.0]
    then = []
    for step in range(1, 8):
        for rank in (0, 1):
            if step <= (7, 5)[rank]:
                x[rank] -= 0.1 * (x[rank] - rank)
        if step == 4:
            then, anchor = list(x), sum(x) / 2
        if step == 6:
            x[0] = anchor + (x[0] - then[0])
    x[1] = anchor + (x[1] - then[1])
    config = SlowMoConfig.local_sgd(4, overlap_steps=2, **HOW[how], timeout_seconds=patience(20))
    results = run_workers(_leaves_before_the_due_step, 2, config)
    assert [taken for _, taken in results] == [True, True]
    assert [weight for weight, _ in results] == pytest.approx(x, abs=1e-12)


# ---- settings ----


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"sync_every": 4, "overlap_steps": 4},
            r"overlap_steps must be in \[0, sync_every\), got 4 with sync_every=4",
        ),
        ({"overlap_steps": -1}, r"overlap_steps must be in \[0, sync_every\), got -1"),
        ({"overlap_steps": 1.5}, "overlap_steps must be an integer, got 1.5"),
        (
            {"overlap_steps": 2, "base": "sgp"},
            "overlap_steps=2 needs base='local_sgd', got base='sgp'",
        ),
        ({"overlap_steps": 2, "base": "all_reduce"}, "overlap_steps=2 needs base='local_sgd'"),
        (
            {"overlap_steps": 2, "inner_state": "average"},
            "overlap_steps=2 needs inner_state='auto' or .*, got inner_state='average': .* averaged at once",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        SlowMoConfig(**settings)


def test_one_state_cannot_speak_for_workers_that_are_never_the_same():
    def save(rank):
        optimizer = SlowMoOptimizer(two_groups(Regression(), "sgd", LR), SlowMoConfig(sync_every=2, overlap_steps=1))
        rows = Rows(4)
        for _ in range(2):
            Regression()(rows.x, rows.y)
            optimizer.step()
        return optimizer.outer_loop.state_dict()

    with pytest.raises(RuntimeError) as failed:
        run_in_process(save, 2)
    assert "training cannot be saved with overlap_steps=1" in str(failed.value.__cause__ or failed.value)


def test_memory_is_one_copy_more_and_messages_for_all():
    def count(rank, overlap_steps, bucket_bytes):
        model = torch.nn.Linear(64, 64)
        config = SlowMoConfig(overlap_steps=overlap_steps, bucket_bytes=bucket_bytes)
        optimizer = SlowMoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), config)
        for _ in range(13):
            model(torch.ones(1, 64)).sum().backward()
            optimizer.step()
        with slowmo_hf.consensus(optimizer):
            pass
        loop = optimizer.outer_loop
        kept = [*message_memory(loop), *getattr(loop.base, "departed", {}).values()]
        return sum(t.nbytes for t in kept), sum(p.nbytes for p in model.parameters())

    # Messages kept: two of 2048 bytes, or all, of 4096.
    for bucket_bytes, plain, overlapped in (
        (2**20, 1, 1),
        (4096, 2, 5),
    ):
        for overlap_steps, messages in ((0, plain), (2, overlapped)):
            (kept, size), _ = run_in_process(lambda rank, n=overlap_steps, size=bucket_bytes: count(rank, n, size), 2)
            payload = size if messages != 2 else 4096
            assert kept == payload + 4 * messages + (size if overlap_steps else 0)


def test_equal_is_not_vacuous():
    first, second = (
        run_in_process(lambda rank, n=n: _train(SlowMoConfig(sync_every=5, overlap_steps=n), "sgd", rank), 2)
        for n in (0, 2)
    )
    assert equal(first[0][0][3], second[0][0][3])
    assert not equal(first[0][0][5], second[0][0][5])


# ---- ranks that end, resume or load while a round is in flight ----


def some_steps(rank, config, steps):
    """An optimizer that has made them, on gradients of its own."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(300))
    optimizer = SlowMoOptimizer(torch.optim.SGD([weight], lr=0.1, momentum=0.9), config)
    draw = torch.Generator().manual_seed(rank)
    for _ in range(steps):
        weight.grad = torch.randn(300, generator=draw)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(("ends_at", "logs_at"), [(4, 4), (5, 5), (4, 5), (8, 9)])
def test_a_rank_that_has_ended_meets_one_that_gathers_before_the_update(how, ends_at, logs_at):
    """Neither waits for the other crosswise: the one that gathers is told that somebody has ended."""
    config = SlowMoConfig(sync_every=4, overlap_steps=3, **HOW[how])

    def work(rank):
        loop = some_steps(rank, config, ends_at if rank == 0 else logs_at).outer_loop
        all_go = loop.meet_before_gathering() if rank else None
        loop.end()
        loop.consensus.restore()
        return all_go, loop.attempted_steps

    assert run_in_process(work, 2) == [(None, logs_at), (False, logs_at)]


@pytest.mark.parametrize("how", HOW)
def test_on_another_number_of_workers_a_round_in_flight_has_reset_the_inner_state(tmp_path, how):
    config = SlowMoConfig(sync_every=4, overlap_steps=2, **HOW[how])

    def save(rank):
        loop = some_steps(rank, config, 5).outer_loop
        write_snapshot(str(tmp_path), loop, shared=rank == 0, objects={})

    def resume(rank):
        optimizer = some_steps(rank, config, 1)
        check_snapshot(str(tmp_path), optimizer.outer_loop)()
        return len(optimizer.state)

    run_in_process(save, 2)
    assert run_in_process(resume, 2) == [1, 1]
    assert run_in_process(resume, 3) == [0, 0, 0]


def test_a_view_in_flight_keeps_no_memory():
    """Its messages are beside those of a sharded round, and go."""

    def work(rank):
        config = SlowMoConfig(sync_every=4, overlap_steps=3, shard_slow_state=True, bucket_bytes=1024)
        optimizer = some_steps(rank, config, 8)
        loop = optimizer.outer_loop
        with slowmo_hf.consensus(optimizer):
            pass
        loop.in_flight.apply()
        return sum(memory.nbytes for memory in message_memory(loop))

    # To and from all, for 300 elements in two messages, each filled up to a multiple of two.
    assert run_in_process(work, 2) == [2 * 4 * 300] * 2
