"""
Push-sum gossip: mass is conserved, schedules contract, messages are in flight exactly as long as told, faults speak.
"""

import os
import re
import signal
import socket
import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import run_workers
from mixing import mixing_matrix
from slowmo_hf import SlowMoConfig, SlowMoOptimizer, consensus, last_round, run_in_process
from slowmo_hf.algorithm.layout import flat_anchors, flat_layouts
from slowmo_hf.algorithm.topology import Topology
from slowmo_hf.wire.communicator import Communicator
from slowmo_hf.wire.gossip import GossipBase, make_topology

# ---- many workers in one process ----


@dataclass
class Mixed:
    """
    One worker after one exchange, in fp64; `x` and `w` alone, `mass_x` and `mass_w` with the messages in flight to it.
    """

    z: torch.Tensor
    x: torch.Tensor
    w: float
    mass_x: torch.Tensor
    mass_w: float
    in_flight: int
    moved: torch.Tensor  # by the inner step before


def _base(config, params):
    return GossipBase(
        config,
        Communicator(20, torch.device("cpu"), purpose="gossip"),
        flat_anchors(flat_layouts([params])),
        params,
        lambda worker, step: ValueError(f"worker {worker}"),
    )


def _start(rank, dtype=torch.float64):
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(n, generator=generator, dtype=torch.float64).to(dtype) for n in (3, 5)]


def _mix(config, workers, steps, *, dtype=torch.float64, size=1.0, start=None):
    """
    What `Mixed` says, by step and worker, of a run from `start(rank, dtype)` whose inner steps are noise of this size.
    """

    def work(rank):
        params, noise = (start or _start)(rank, dtype), torch.Generator().manual_seed(1000 + rank)
        base, after = _base(config, params), []
        for number in range(steps):
            before = torch.cat(params).double()
            for param in params:
                param.add_(size * torch.randn(param.shape, generator=noise, dtype=torch.float64).to(dtype))
            moved = torch.cat(params).double() - before
            base.mix_(number)
            after.append(_look(base, params, moved))
        return after

    return list(zip(*run_in_process(work, workers), strict=True))


def _look(base, params, moved):
    base.settle()
    (x,) = (flat.double().clone() for flat in base.numerators.values())
    mass_x, mass_w = x.clone(), base.weight
    for exchange in base.in_flight:
        mass_x += sum(flat.double() for received in exchange.received for flat in received.values())
        mass_w += sum(float(received) for received in exchange.weight.received)
    return Mixed(torch.cat(params).double(), x, base.weight, mass_x, mass_w, len(base.in_flight), moved)


def _sum_at_start(workers, dtype=torch.float64):
    return sum(torch.cat(_start(rank, dtype)).double() for rank in range(workers))


@st.composite
def _gossip(draw, most_stale=3):
    """(settings, number of workers) that fit together."""
    workers = draw(st.integers(1, 9))
    base = draw(st.sampled_from(["sgp", "osgp", "dpsgd"]))
    topologies = ["bipartite_exponential", "ring", "complete"] + (["exponential"] if base != "dpsgd" else [])
    topology = draw(st.sampled_from(topologies))
    most = {"complete": 1, "ring": min(2, workers - 1), "bipartite_exponential": workers // 2}.get(
        topology, workers - 1
    )
    settings = {"base": base, "topology": topology, "peers": draw(st.integers(1, max(1, most)))}
    if base == "osgp":
        settings["staleness"] = draw(st.integers(0, most_stale))
    return SlowMoConfig(**settings), workers


@settings(max_examples=60, deadline=None)
@given(_gossip(), st.integers(1, 12))
def test_mass_is_conserved_in_flight_too(drawn, steps):
    config, workers = drawn
    total, in_flight = _sum_at_start(workers), config.staleness if config.base == "osgp" else 0
    for number, after in enumerate(_mix(config, workers, steps)):
        total += sum(own.moved for own in after)
        assert torch.allclose(sum(own.mass_x for own in after), total, rtol=0, atol=1e-11)
        assert sum(own.mass_w for own in after) == pytest.approx(workers, abs=1e-12)
        for own in after:
            assert torch.allclose(own.z, own.x / own.w, rtol=0, atol=1e-12)
            assert own.in_flight == min(number + 1, in_flight)
            if in_flight == 0:
                assert own.w == 1.0


@settings(max_examples=60, deadline=None)
@given(_gossip(most_stale=0))
def test_one_cycle_contracts_as_its_mixing_matrices_promise(drawn):
    """
    Without gradients x_k = P_k ... P_1 x_0; the distance from the mean falls at least by the product's norm off the
    mean.
    """
    config, workers = drawn
    topology = make_topology(config, workers)
    start = torch.stack([torch.cat(_start(rank)) for rank in range(workers)]).numpy()
    end = torch.stack([own.z for own in _mix(config, workers, topology.cycle_length, size=0.0)[-1]]).numpy()
    product = np.eye(workers)
    for number in range(topology.cycle_length):
        product = np.array(mixing_matrix(topology, number)) @ product
    np.testing.assert_allclose(end, product @ start, rtol=0, atol=1e-12)
    promised = np.linalg.norm(product - np.full((workers, workers), 1 / workers), 2)
    distance = [np.linalg.norm(values - values.mean(axis=0)) for values in (start, end)]
    assert distance[1] <= promised * distance[0] + 1e-12
    if workers > 1:
        assert promised < 1, topology


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_bf16_parameters_have_fp32_numerators_that_lose_nothing(staleness):
    config = SlowMoConfig(base="osgp", staleness=staleness)
    steps = _mix(config, 4, 20, dtype=torch.bfloat16, size=1e-2)
    total = _sum_at_start(4, torch.bfloat16) + sum(own.moved for after in steps for own in after)
    # bf16 sums alone would be off by 1e-2.
    assert torch.allclose(sum(own.mass_x for own in steps[-1]), total, rtol=0, atol=2e-5)
    (numerator,) = _base(SlowMoConfig(base="sgp"), _start(0, torch.bfloat16)).numerators.values()
    assert numerator.dtype == torch.float32


def test_a_message_is_applied_exactly_when_it_is_due():
    """
    Two workers, staleness 2, worker 0 at 8, worker 1 at 0, no gradients. (x, w) of both after each step:
    1: (4, ½), (0, ½)    2: (2, ¼), (0, ¼)
    3: the messages of step 1, (0, ½) and (4, ½), are due: (1, ⅛ + ½), (0 + 4, ⅛ + ½)
    """
    config = SlowMoConfig(base="osgp", staleness=2)
    steps = _mix(config, 2, 3, size=0.0, start=lambda rank, dtype: [torch.full((4,), 8.0 * (1 - rank), dtype=dtype)])
    seen = [[(own.x[0].item(), own.w) for own in after] for after in steps]
    assert seen == [[(4.0, 0.5), (0.0, 0.5)], [(2.0, 0.25), (0.0, 0.25)], [(1.0, 0.625), (4.0, 0.625)]]
    assert steps[-1][1].z[0].item() == 4 / 0.625


# ---- processes ----


def _pull(config, steps, *, before_step=None, params=1, dtype=torch.float64):
    """Worker r pulls towards r + 1; returns (path, times of each step's end, optimizer)."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    weights = [torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=dtype)) for _ in range(params)]
    optimizer = SlowMoOptimizer(torch.optim.SGD(weights, lr=0.1), config)
    path, times = [], [time.perf_counter()]
    for step in range(steps):
        for weight in weights:
            weight.grad = (weight.detach() - (rank + 1) * (step + 1)).to(dtype)
        if before_step:
            before_step(step)
        optimizer.step()
        path.append(weights[0].detach().clone())
        times.append(time.perf_counter())
    return torch.stack(path), [t - times[0] for t in times[1:]], optimizer


def _identities():
    never = 10**6
    sgp, *_ = _pull(SlowMoConfig(base="sgp", sync_every=5), 12)
    osgp, *_ = _pull(SlowMoConfig(base="osgp", staleness=0, sync_every=5), 12)
    complete, *_ = _pull(SlowMoConfig(base="sgp", topology="complete", sync_every=never), 8)
    local, *_ = _pull(SlowMoConfig.local_sgd(1), 8)
    _, _, optimizer = _pull(SlowMoConfig(base="osgp", sync_every=4), 8)
    base = optimizer.outer_loop.base
    at_round = (base.weight, len(base.in_flight), next(iter(base.numerators.values())).clone())
    _, _, optimizer = _pull(SlowMoConfig(base="osgp", sync_every=4), 7)
    local_weights = optimizer.param_groups[0]["params"][0].detach().clone()
    numerators = next(iter(optimizer.outer_loop.base.numerators.values())).clone()
    with consensus(optimizer):
        shown = optimizer.param_groups[0]["params"][0].detach().clone()
    same = torch.equal(local_weights, optimizer.param_groups[0]["params"][0])
    same &= torch.equal(numerators, next(iter(optimizer.outer_loop.base.numerators.values())))
    return {
        "sgp": sgp,
        "osgp 0": osgp,
        "complete": complete,
        "local": local,
        "at round": at_round,
        "weights at round": optimizer.outer_loop.parts.slow.anchors[0].flat.clone(),
        "look": (
            local_weights,
            shown,
            same,
            optimizer.outer_loop.base.weight,
            len(optimizer.outer_loop.base.in_flight),
        ),
    }


def test_identities():
    results = run_workers(_identities, 3)
    for result in results:
        assert torch.equal(result["sgp"], result["osgp 0"]), "OSGP with staleness 0 is SGP"
        assert torch.allclose(result["complete"], result["local"], rtol=0, atol=1e-14), (
            "a complete graph is all-reduce for SGD"
        )
        weight, in_flight, numerator = result["at round"]
        assert (weight, in_flight) == (1.0, 0)
        assert torch.equal(numerator, results[0]["at round"][2]), "after an exact round all workers are equal"
        local, shown, same, weight, in_flight = result["look"]
        assert same, "a look leaves parameters and numerators as they were"
        assert weight < 1, "a message in flight holds its part of the mass"
        assert in_flight == 1, "a look leaves it due when it was"
        assert torch.equal(shown, results[0]["look"][1])
        assert not torch.equal(shown, local)


class Throttle:
    """Every message takes `seconds` from its start to its arrival, however fast the machine is."""

    def __init__(self, seconds):
        self.seconds, self.exchange, self.finish = seconds, Communicator.exchange, Communicator.finish

    def __enter__(self):
        def exchange(communicator, *args):
            transfer = self.exchange(communicator, *args)
            transfer.arrives = time.perf_counter() + self.seconds
            return transfer

        def finish(communicator, transfer):
            self.finish(communicator, transfer)
            time.sleep(max(0.0, transfer.arrives - time.perf_counter()))

        Communicator.exchange, Communicator.finish = exchange, finish

    def __exit__(self, *_):
        Communicator.exchange, Communicator.finish = self.exchange, self.finish


def _step_seconds(base, compute, message):
    with Throttle(message):
        _, times, _ = _pull(
            SlowMoConfig(base=base, sync_every=10**6), 12, before_step=lambda step: time.sleep(compute)
        )
    return float(np.median(np.diff(times)))


def _overlap():
    pairs = [(0.06, 0.05), (0.04, 0.08)]
    return {(base, *pair): _step_seconds(base, *pair) for base in ("sgp", "osgp") for pair in pairs}


@pytest.mark.slow
def test_the_exchange_is_behind_the_computation():
    for seconds in run_workers(_overlap, 2):
        for (base, compute, message), measured in seconds.items():
            hidden = min(compute, message)
            if base == "osgp":  # half of it is left to a busy machine
                assert measured <= max(compute, message) + hidden / 2, seconds
            else:
                assert measured >= compute + message, "the control: without overlap a step is the sum"


def _straggler(base, staleness):
    """Worker 1 sleeps before its step 5 (counted from 1)."""

    def sleep(step):
        if step == 4 and dist.get_rank() == 1:
            time.sleep(1.2)

    settings = {"staleness": staleness} if base == "osgp" else {}
    dist.barrier()
    return _pull(SlowMoConfig(base=base, sync_every=10**6, **settings), 9, before_step=sleep)[1]


def _stragglers():
    return {staleness: _straggler("osgp" if staleness else "sgp", staleness) for staleness in (0, 1, 3)}


@pytest.mark.slow
def test_a_straggler_delays_others_by_no_more_than_the_staleness_allows():
    """Its message of step 5 is missed at step 5 + staleness, not before."""
    times, _ = run_workers(_stragglers, 2)
    for staleness, ends in times.items():
        ends = [end - ends[0] for end in ends]  # the start takes as long as the machine is busy
        assert ends[5 - 1 + staleness - 1] < 0.8, (staleness, ends)
        assert ends[5 - 1 + staleness] > 1.0, (staleness, ends)


def _fault(folder, kind):
    config = SlowMoConfig(base="osgp" if kind == "dies, osgp" else "sgp", sync_every=10**6, timeout_seconds=4)

    def fail(step):
        if step == 3 and dist.get_rank() == 1:
            if kind == "hangs":
                time.sleep(9)
            os.kill(os.getpid(), signal.SIGKILL)

    start = time.perf_counter()
    try:
        _pull(config, 20, before_step=fail)
    except RuntimeError as error:
        (folder / f"{dist.get_rank()}.txt").write_text(f"{time.perf_counter() - start:.1f}\n{error}")
        raise


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dies", "dies, osgp", "hangs"])
def test_a_peer_that_dies_or_hangs_is_named_in_time(tmp_path, kind):
    with pytest.raises(AssertionError):
        run_workers(_fault, 3, tmp_path, kind)
    seconds, words = (tmp_path / "0.txt").read_text().split("\n", 1)
    assert float(seconds) < 4 + 10
    how = "did not come to step" if kind == "hangs" else "left without a word after step 0"
    assert re.match(rf"optimizer step \d+: rank 1 on {re.escape(socket.gethostname())} {how}", words), words
    assert "exchange with worker" in words


def _no_messages():
    def refuse(ops):
        raise NotImplementedError("no send")

    dist.batch_isend_irecv = refuse
    with pytest.raises(RuntimeError) as error:
        _pull(SlowMoConfig(base="sgp"), 1)
    return str(error.value)


def test_a_backend_without_messages_is_named():
    for words in run_workers(_no_messages, 2):
        assert words.startswith(
            "optimizer step 1: base must be local_sgd or all_reduce on backend 'gloo', which has no peer-to-peer "
            "messages"
        )


def _refused(settings):
    with pytest.raises(ValueError) as error:
        _pull(SlowMoConfig(**settings), 1)
    return str(error.value)


def _all_refused():
    bad = [
        {"base": "sgp", "peers": 3},
        {"base": "dpsgd", "peers": 2},
        {"base": "sgp", "topology": "complete", "peers": 3},
    ]
    return [_refused(settings) for settings in bad]


def test_too_many_peers_are_refused_on_every_rank():
    words = run_workers(_all_refused, 3)
    assert words[0] == words[1] == words[2]
    assert "peers must be <= workers - 1, got 3 with workers=3" in words[0][0]
    assert "peers must be <= workers // 2" in words[0][1]
    assert "peers" in words[0][2]


def _equal_workers():
    """
    Three equal workers near 100 and no gradients: the idle place of an odd bipartite world makes their weights uneven
    meanwhile.
    """
    weight = torch.nn.Parameter(torch.full((3,), 100.0))
    config = SlowMoConfig(base="osgp", topology="bipartite_exponential", sync_every=4)
    optimizer = SlowMoOptimizer(torch.optim.SGD([weight], lr=0.1), config)
    weights = []
    for _ in range(4):
        weight.grad = torch.zeros(3)
        optimizer.step()
        weights.append(optimizer.outer_loop.base.weight)
    return weights, last_round(optimizer).consensus_distance, last_round(optimizer).pseudo_grad_norm


def test_uneven_weights_are_no_distance():
    results = run_workers(_equal_workers, 3)
    assert len({weights[2] for weights, *_ in results}) > 1, "the control: weights are uneven before the round"
    for weights, distance, norm in results:
        assert weights[3] == 1
        assert distance < 1e-6
        assert norm < 1e-3


def _bytes(settings):
    _, _, optimizer = _pull(SlowMoConfig(sync_every=4, **settings), 8, dtype=torch.float32)
    return last_round(optimizer).bytes_sent


def _all_bytes():
    return [_bytes(settings) for settings in BYTES]


BYTES = [{"base": "sgp"}, {"base": "osgp"}, {"base": "sgp", "peers": 2}, {"base": "sgp", "exact_average": False}]


def test_bytes_are_what_theory_says():
    """
    3 fp32 parameters, 3 workers: an exchange sends 12 bytes to each peer (20 with the weight), a round of 4 steps has
    3 of them and the ring's 2·⅔·16 with the consensus distance, and a header of 11 fp64 to 2 others; without the
    average 4 exchanges and a header.
    """
    header, ring = 2 * 11 * 8, round(2 * 2 / 3 * 16)
    right = [3 * 12 + ring + header, 3 * 20 + ring + header, 3 * 24 + ring + header, 4 * 12 + header]
    assert run_workers(_all_bytes, 3) == [right] * 3


def test_the_schedule_does_not_move_at_an_exact_round(monkeypatch):
    """
    Rounds of 3 steps: exchanges happen at steps 1, 2, 4, 5, 7 and are numbers 0 to 4; without the average at every
    step.
    """
    for exact, right in ((True, [0, 1, 2, 3, 4]), (False, [0, 1, 2, 3, 4, 5, 6])):
        numbers = []
        monkeypatch.setattr(GossipBase, "mix_", lambda base, number, step, numbers=numbers: numbers.append(number))
        _pull(SlowMoConfig(base="sgp", sync_every=3, exact_average=exact), 7)
        assert numbers == right


def test_auto_topology_is_the_base_s_own():
    assert [make_topology(SlowMoConfig(base=base), 4) for base in ("sgp", "osgp", "dpsgd")] == [
        Topology("exponential", 4),
        Topology("exponential", 4),
        Topology("bipartite_exponential", 4, symmetric=True),
    ]
