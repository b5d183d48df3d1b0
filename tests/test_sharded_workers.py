"""
Workers whose processes hold shards (FSDP2): the same as node workers on the same data, whose processes hold whole
models, and as the paper's form in float64.
"""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import fsdp
from harness import patience, run_workers
from mixing import mixing_matrix
from reference import gossip_reference, slowmo_reference
from slowmo_hf import SlowMoConfig, SlowMoOptimizer, consensus
from slowmo_hf.algorithm.codec import BLOCK
from slowmo_hf.dtensors import local
from slowmo_hf.rules import GOSSIP_BASES
from slowmo_hf.wire.gossip import make_topology
from tiny import equal, error_of

pytestmark = fsdp.NEEDED

STEPS, ROWS, LR, TAU = 8, 3, 0.1, 3
MESSAGES = {
    "plain": {},
    "overlapped": {"overlap_steps": 2},
    "sharded slow state": {"shard_slow_state": True},
    "sharded slow state, overlapped": {"shard_slow_state": True, "overlap_steps": 2},
    "bf16": {"compression": "bf16"},
    "bf16, overlapped": {"compression": "bf16", "overlap_steps": 2},
    "small messages": {"bucket_bytes": 1024},
}
NESTEROV = {"outer_optimizer": "torch.optim.SGD", "outer_optimizer_kwargs": '{"momentum": 0.9, "nesterov": true}'}


def settings():
    """Every base, inner state and message that go together."""
    for state in ("reset", "maintain", "average"):
        for message, more in MESSAGES.items():
            if state != "average" or "overlap_steps" not in more:
                yield f"local_sgd, {state}, {message}", {"inner_state": state, **more}
        for base in GOSSIP_BASES:
            yield f"{base}, {state}", {"base": base, "inner_state": state}
    yield "Nesterov", {"outer_lr": 0.5, **NESTEROV}
    yield "Nesterov, overlapped", {"outer_lr": 0.5, "overlap_steps": 1, **NESTEROV}
    yield "Adam", {"outer_lr": 0.01, "outer_optimizer": "torch.optim.Adam"}
    yield "sgp, no average", {"base": "sgp", "exact_average": False, "inner_state": "maintain"}
    yield "all_reduce", {"base": "all_reduce", "inner_state": "maintain"}
    yield "Local SGD, local buffers", {"outer_momentum": 0.0, "inner_state": "maintain", "model_buffers": "local"}


CASES = dict(settings())
# Two shards of a bucket, each of two blocks.
INT8 = {"compression": "int8", "inner_state": "maintain", "outer_momentum": 0.6}
INT8_BLOCKS, INT8_STEPS = 48, 6


def made(more, size):
    by_ddp = {} if more.get("base") == "all_reduce" else {"processes_per_worker": size}
    return SlowMoConfig(sync_every=TAU, timeout_seconds=patience(20), **{**by_ddp, **more})


def inner(model):
    """Two groups of different learning rates; momentum that a reset forgets."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() < 2]
    return torch.optim.SGD(
        [{"params": matrices, "lr": LR}, {"params": others, "lr": LR / 2}], momentum=0.9, nesterov=True
    )


def schedule(optimizer, step):
    for group, lr in zip(optimizer.param_groups, (LR, LR / 2), strict=True):
        group["lr"] = lr * (1 - step / 20)


def batch_of(rank, step, world):
    return fsdp.Tokens(400).batch(ROWS * (step * world + rank), ROWS)


class Run:
    """One training run of this process's worker, on models sharded by hand or whole under DDP."""

    def __init__(self, kind, config, size, blocks=1):
        self.bare = fsdp.Awkward(blocks=blocks)
        world = dist.get_world_size()
        if kind == "sharded":
            self.model = fsdp.by_hand(self.bare, fsdp.hsdp_mesh(size, world // size))
        else:
            self.model = DistributedDataParallel(self.bare)
        self.optimizer = SlowMoOptimizer(inner(self.bare), config)
        self.step_number = 0

    def step(self):
        schedule(self.optimizer, self.step_number)
        loss = self.model(**batch_of(dist.get_rank(), self.step_number, dist.get_world_size()))["loss"]
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step_number += 1
        return float(loss.detach())

    @property
    def loop(self):
        return self.optimizer.outer_loop

    def parameters(self):
        """Whole, by name. Collective inside a worker."""
        return {name: value for name, value in fsdp.full_values(self.bare).items() if name != "level"}

    def shards(self, size):
        """What this process holds of them, or would hold where they are whole: its rows, of `size` processes."""
        found = {}
        for name, p in self.bare.named_parameters():
            rows = local(p).detach()
            if not isinstance(p, DTensor):
                each = -(-len(rows) // size)
                rows = rows[dist.get_rank() % size * each :][:each]
            found[name] = rows.clone()
        return found


def furthest(found, right):
    assert found.keys() == right.keys()
    return max(float((found[name] - right[name]).abs().max()) for name in right if right[name].numel())


def both(case, size, steps):
    """How far the two kinds part, at the worst; the last parameters, and bytes sent to other workers."""
    runs = [Run(kind, made(case, size), size) for kind in ("sharded", "node")]
    parted = 0.0
    for _ in range(steps):
        for run in runs:
            run.step()
        parted = max(parted, furthest(*[run.shards(size) for run in runs]))
    with consensus(runs[0].optimizer), consensus(runs[1].optimizer):
        parted = max(parted, furthest(*[run.shards(size) for run in runs]))
    return parted, runs[0].parameters()


def levels_of_a_round(policy, size):
    """The buffer before the round of step 3 and behind it."""
    run = Run("sharded", made({"model_buffers": policy, "inner_state": "maintain"}, size), size)
    for step in range(TAU):
        run.model(**batch_of(dist.get_rank(), step, dist.get_world_size()))["loss"].backward()
        before = run.bare.level.clone()
        run.optimizer.step()
        run.optimizer.zero_grad()
    return before, run.bare.level.clone()


# ---- what an evaluation sees, and leaves ----


def looked_at(case, size):
    """
    A run that is looked at after every step, by `consensus` and by `model.eval()`, each after a pass that leaves the
    root gathered, and one that is not.
    """
    quiet, watched = (Run("sharded", made(case, size), size) for _ in range(2))
    data, found, rounds = fsdp.Tokens(400).batch(0, 12), [], [None]
    for _ in range(STEPS):
        losses = [run.step() for run in (quiet, watched)]
        local = watched.parameters()
        with torch.no_grad():
            watched.model(**data)  # gathers
            with consensus(watched.optimizer):
                average = watched.parameters()
                shown = float(watched.model.eval()(**data)["loss"])
            behind = watched.parameters()
            watched.model.train()
            watched.model(**data)
            assert equal(watched.parameters(), local), "local weights return bit for bit"
            at_eval = None
            if not case.get("shard_slow_state"):
                watched.model.eval()
                at_eval = watched.parameters(), float(watched.model(**data)["loss"])
                assert equal(behind, at_eval[0]), "an eval() inside the block holds on behind it"
                watched.model.train()
                assert equal(watched.parameters(), local)
        found.append((local, average, shown, at_eval))
        rounds.append(watched.loop.rounds)
        assert losses[0] == losses[1], "an evaluation leaves no trace"
        assert equal(quiet.parameters(), watched.parameters())
    return found


def whole_loss(values, data):
    model = fsdp.Awkward(blocks=1).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(values[name])
        return float(model(**data)["loss"])


def sent_in_a_round(size):
    """(bytes to the counterparts in the round of step 3, elements of this process's shards)."""
    run = Run("sharded", made({"inner_state": "maintain"}, size), size)
    before = 0
    for _ in range(TAU):
        if run.loop is not None:
            before = run.loop.workers.between.bytes_sent
        run.step()
    return run.loop.workers.between.bytes_sent - before, sum(local(p).numel() for p in run.bare.parameters())


def refused_meshes():
    """Shards that are no neighbours, that span workers, and that are a part of one; and who needs whole tensors."""
    told = {}
    far = DeviceMesh("cpu", [[0, 2], [1, 3]], mesh_dim_names=("replicate", "shard"))
    for name, mesh, more in (
        ("far", far, {}),
        ("spans", init_device_mesh("cpu", (4,)), {"processes_per_worker": 2}),
        ("part", fsdp.hsdp_mesh(2, 2), {"processes_per_worker": 4}),
        ("Muon", fsdp.hsdp_mesh(2, 2), {"outer_optimizer": "torch.optim.Muon", "outer_momentum": 0.5}),
    ):
        model = fsdp.by_hand(fsdp.Awkward(), mesh)
        optimizer = SlowMoOptimizer(inner(model), SlowMoConfig(timeout_seconds=patience(20), **more))
        told[name] = error_of(lambda model, optimizer: optimizer.begun(), model, optimizer)
    return told


# ---- the paper, and int8's own ----


def member(worker, size, world, blocks=1):
    model = fsdp.Awkward(blocks=blocks)
    optimizer = inner(model)
    schedule(optimizer, 0)

    def backward(step):
        optimizer.zero_grad()
        for rank in range(worker * size, (worker + 1) * size):
            (model(**batch_of(rank, step, world))["loss"] / size).backward()

    return model, optimizer, backward


def by_paper(case, size, world):
    """Every worker's parameters after `STEPS` steps, by name."""
    config, count = made(case, size), world // size

    def make_worker(worker):
        _, optimizer, backward = member(worker, size, world)
        steps = itertools.count(1)
        params = [p for group in optimizer.param_groups for p in group["params"]]
        return params, optimizer, backward, lambda: schedule(optimizer, next(steps))

    run = (make_worker, count, STEPS, TAU, config.outer_lr, config.outer_momentum, config.inner_state)
    if config.base == "local_sgd":
        return slowmo_reference(*run)
    staleness = config.staleness if config.base == "osgp" else 0
    mixing = partial(mixing_matrix, make_topology(config, count))
    ends = gossip_reference(*run, mixing=mixing, staleness=staleness, exact_average=config.exact_average)
    return [end.z for end in ends]


def rounded_by_int8(values):
    blocks = values.view(-1, BLOCK)
    scales = (blocks.abs().amax(1) / 127).clamp_(min=torch.finfo(values.dtype).tiny)[:, None]
    return ((blocks / scales).round() * scales).view(-1)


def by_int8(size, world, steps):
    """
    A worker of `size` shards is `size` jobs of one process: every place's shards, one after the other, are quantised
    with error feedback at both ends (docs/wire.md), on their own.
    """
    count, beta = world // size, INT8["outer_momentum"]
    crew = [member(worker, size, world, INT8_BLOCKS) for worker in range(count)]

    def column(model, place):
        params = [p for group in inner(model).param_groups for p in group["params"]]
        parts = [p.detach().chunk(size) for p in params]
        return torch.cat([part[place].flatten() for part in parts if place < len(part)])

    def fill(model, place, flat):
        params, at = [p for group in inner(model).param_groups for p in group["params"]], 0
        for p in params:
            parts = p.data.chunk(size)
            if place < len(parts):
                parts[place].copy_(flat[at : at + parts[place].numel()].view_as(parts[place]))
                at += parts[place].numel()

    places = []
    for place in range(size):
        anchor = column(crew[0][0], place)
        shard = -(-anchor.numel() // (count * BLOCK)) * BLOCK
        places.append([anchor, torch.zeros_like(anchor), torch.zeros(count, count * shard).double(),
                       torch.zeros(count * shard).double()])  # fmt: skip
    before = None
    for step in range(steps):
        for _, optimizer, backward in crew:
            schedule(optimizer, step)
            backward(step)
            optimizer.step()
        if (step + 1) % TAU:
            continue
        gamma = 1 - (step - 1) / 20
        for place, (anchor, velocity, held, owned) in enumerate(places):
            total = owned.clone()
            for worker, (model, _, _) in enumerate(crew):
                message = held[worker].clone()
                message[: anchor.numel()] += anchor - column(model, place)
                held[worker] = message - rounded_by_int8(message)
                total += rounded_by_int8(message)
            owned.copy_(total - rounded_by_int8(total))
            velocity.mul_(beta * (gamma / before if before else 1.0))
            velocity.add_(rounded_by_int8(total)[: anchor.numel()] / count)
            anchor.sub_(velocity)
            for model, _, _ in crew:
                fill(model, place, anchor)
        before = gamma
    return {name: p.detach() for name, p in crew[0][0].named_parameters()}, places[0][0].numel()


# ---- one launch ----


def compared(size, cases):
    dist.barrier()
    return {name: both(CASES[name], size, STEPS) for name in cases}


def looked_and_refused():
    found = {name: looked_at(CASES[name], 2) for name in LOOKED_AT}
    found["refused"] = refused_meshes()
    run = Run("sharded", made(INT8, 2), 2, INT8_BLOCKS)
    for _ in range(INT8_STEPS):
        run.step()
    found["int8"], found["sent"] = run.parameters(), sent_in_a_round(2)
    return found | {policy: levels_of_a_round(policy, 2) for policy in ("average", "local")}


LOOKED_AT = (
    "local_sgd, reset, plain",
    "local_sgd, maintain, overlapped",
    "local_sgd, maintain, sharded slow state",
    "local_sgd, maintain, bf16",
    "sgp, maintain",
    "osgp, maintain",
)
UNEVEN = tuple(name for name in CASES if "maintain" in name or name in ("Nesterov", "Adam"))

IN_THE_PAPER = [
    (name, size)
    for size, names in ((2, CASES), (3, UNEVEN))
    for name in names
    if name.endswith("plain") or name.split(",")[0] in GOSSIP_BASES
]


@pytest.fixture(scope="module")
def two_by_two():
    """In two launches, each of which ends in time on a busy machine too."""
    names = tuple(CASES)
    halves = [run_workers(compared, 4, 2, half) for half in (names[::2], names[1::2])]
    return [first | second for first, second in zip(*halves, strict=True)]


@pytest.fixture(scope="module")
def looks():
    return run_workers(looked_and_refused, 4)


@pytest.fixture(scope="module")
def two_by_three():
    return run_workers(compared, 6, 3, UNEVEN)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_shards_are_node_workers(two_by_two, case):
    for rank, found in enumerate(two_by_two):
        parted, values = found[case]
        assert parted <= 1e-12, (rank, parted)
        first = {name: p.detach() for name, p in fsdp.Awkward(blocks=1).named_parameters()}
        assert furthest(values, first) > 0.01, "it trains"


@pytest.mark.slow
@pytest.mark.parametrize("case", UNEVEN)
def test_three_uneven_shards_are_node_workers(two_by_three, case):
    for rank, found in enumerate(two_by_three):
        assert found[case][0] <= 1e-12, (rank, found[case][0])


@pytest.mark.slow
@pytest.mark.parametrize(("case", "size"), IN_THE_PAPER)
def test_shards_are_the_papers_form(two_by_two, two_by_three, case, size):
    world, results = 2 * size, (two_by_two, two_by_three)[size - 2]
    names = [name for name, p in fsdp.Awkward(blocks=1).named_parameters() if p.dim() > 1]
    names += [name for name, p in fsdp.Awkward(blocks=1).named_parameters() if p.dim() < 2]
    workers = by_paper(CASES[case], size, world)
    for rank, found in enumerate(results):
        for name, right in zip(names, workers[rank // size], strict=True):
            assert (found[case][1][name] - right).abs().max() <= 1e-9, (rank, name)


@pytest.mark.slow
def test_int8_quantises_every_process_s_shards_on_their_own(looks):
    right, elements = by_int8(2, 4, INT8_STEPS)
    assert elements > 2 * BLOCK, "more than one block for each owner"
    for found in looks:
        assert furthest(found["int8"], right) <= 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("case", LOOKED_AT)
def test_an_evaluation_sees_the_average_and_leaves_no_trace(looks, case):
    """By `consensus` the mean of the workers; by `model.eval()` the last round's model: what the round has left."""
    data = fsdp.Tokens(400).batch(0, 12)
    runs = [found[case] for found in looks]
    delay = CASES[case].get("overlap_steps", 0)
    for step in range(STEPS):
        local = [run[step][0] for run in runs]
        for run in runs:
            _, average, shown, at_eval = run[step]
            assert equal(average, runs[0][step][1])
            assert abs(shown - whole_loss(average, data)) <= 1e-12
            if delay == 0 and case.startswith("local_sgd"):
                mean = {name: (local[0][name] + local[2][name]) / 2 for name in average}
                assert furthest(average, mean) <= 1e-12
            if at_eval is None:
                continue
            assert abs(at_eval[1] - whole_loss(at_eval[0], data)) <= 1e-12
            after_round = (step + 1) // TAU * TAU
            if after_round and not delay:
                assert equal(at_eval[0], run[after_round - 1][0])
            assert not after_round or equal(at_eval[0], runs[0][step][3][0])


@pytest.mark.slow
def test_a_mesh_that_is_no_worker_is_refused_with_the_settings_that_mend_it(looks):
    words = [found["refused"] for found in looks]
    assert all(told == words[0] for told in words), "the same on every rank"
    assert "the model's shards lie on ranks [0, 2]; a worker is 2 neighbouring ranks, here 0 to 1" in words[0]["far"]
    assert "sharded over 4 processes, which must be one worker, got processes_per_worker='2'" in words[0]["spans"]
    assert "Set dp_shard_size=2 and dp_replicate_size=2" in words[0]["spans"]
    assert "got processes_per_worker='4'" in words[0]["part"]
    assert "or processes_per_worker=2" in words[0]["part"]
    assert "outer_optimizer='torch.optim.Muon' may need whole tensors, and the model is sharded" in words[0]["Muon"]
    assert "Use 'slow_momentum' or one of torch.optim's that works element by element: SGD, Adam" in words[0]["Muon"]


@pytest.mark.slow
def test_each_process_sends_its_own_share(looks):
    """Two workers: 2 (2-1)/2 = 1 time 8 bytes of each own element, and one number beside them; the model is split."""
    whole = sum(p.numel() for p in fsdp.Awkward(blocks=1).parameters())
    for found in looks:
        sent, elements = found["sent"]
        assert sent == 8 * (elements + 1) + 8 * fsdp.WIDTH  # the buffer
    assert [sum(found["sent"][1] for found in looks[i : i + 2]) for i in (0, 2)] == [whole, whole]


@pytest.mark.slow
def test_buffers_are_averaged_over_all_processes(looks):
    """Each has seen its own data."""
    before, after = zip(*[found["average"] for found in looks], strict=True)
    assert len({tuple(level.tolist()) for level in before}) == 4
    for level in after:
        assert (level - sum(before) / 4).abs().max() <= 1e-15
    for found in looks:
        assert torch.equal(*found["local"])
