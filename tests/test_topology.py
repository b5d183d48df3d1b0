"""
Topologies: small worlds traced by hand, the promises of every exchange in worlds of 1 to 9, and how fast news travels
in up to 33.
"""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixing import connected_within, mixing_matrix
from slowmo_hf.algorithm.topology import Topology

NAMES = ("exponential", "bipartite_exponential", "ring", "complete")


def _allowed(name, workers, peers, symmetric):
    """The rule in words, apart from the code: who may be asked for."""
    if name == "exponential" and symmetric:
        return False
    if workers == 1:
        return peers == 1
    return (
        peers
        in {
            "exponential": range(1, workers),
            "bipartite_exponential": range(1, workers // 2 + 1),
            "ring": range(1, min(2, workers - 1) + 1),
            "complete": {1, workers - 1},
        }[name]
    )


def _worlds(sizes):
    every = [
        (name, n, peers, symmetric)
        for n in sizes
        for name in NAMES
        for peers in range(1, n + 1)
        for symmetric in (False, True)
    ]
    return [Topology(*world) for world in every if _allowed(*world)]


WORLDS = _worlds(range(1, 10))
worlds = st.sampled_from(WORLDS)
exchanges = st.integers(0, 50)


def _table(topology, exchange):
    return [topology.targets(worker, exchange) for worker in range(topology.workers)]


def _pairs(topology, exchange):
    """Pairs of a matching, and who idles."""
    table = _table(topology, exchange)
    assert all(table[other] == [worker] for worker, targets in enumerate(table) for other in targets)
    return {(w, targets[0]) for w, targets in enumerate(table) if targets and w < targets[0]}, [
        w for w, t in enumerate(table) if not t
    ]


# ---- traced by hand ----


def test_exponential_world_of_four():
    """floor(log2(3)) + 1 = 2 hops: 1, 2.
    k=0: 0→1 1→2 2→3 3→0
    k=1: 0→2 1→3 2→0 3→1
    k=2: as k=0
    """
    topology = Topology("exponential", 4)
    assert [_table(topology, k) for k in range(3)] == [
        [[1], [2], [3], [0]],
        [[2], [3], [0], [1]],
        [[1], [2], [3], [0]],
    ]
    assert (topology.cycle_length, connected_within(topology)) == (2, 2)


def test_exponential_world_of_five():
    """floor(log2(4)) + 1 = 3 hops: 1, 2, 4.
    k=0: 0→1 1→2 2→3 3→4 4→0
    k=1: 0→2 1→3 2→4 3→0 4→1
    k=2: 0→4 1→0 2→1 3→2 4→3
    """
    topology = Topology("exponential", 5)
    assert _table(topology, 0) == [[1], [2], [3], [4], [0]]
    assert _table(topology, 1) == [[2], [3], [4], [0], [1]]
    assert _table(topology, 2) == [[4], [0], [1], [2], [3]]
    assert _table(topology, 3) == _table(topology, 0)
    assert [topology.sources(0, k) for k in range(3)] == [[4], [3], [1]]


def test_exponential_with_more_peers():
    """
    n=6, hops 1, 2, 4, two at a time: (1, 2), (4, 1), (2, 4), and again. n=8 with 5 peers: 1, 2, 4, then 3, 5, every
    time.
    """
    two = Topology("exponential", 6, peers=2)
    assert [two.targets(0, k) for k in range(4)] == [[1, 2], [4, 1], [2, 4], [1, 2]]
    assert two.targets(5, 1) == [3, 0]
    assert two.cycle_length == 3
    five = Topology("exponential", 8, peers=5)
    assert [five.targets(0, k) for k in range(2)] == [[1, 2, 4, 3, 5]] * 2
    assert five.cycle_length == 1


def test_bipartite_worlds_of_four_and_six():
    """n=4, distances 1, 3.       n=6, distances 1, 3, 5.
    k=0: 0-1 2-3                  k=0: 0-1 2-3 4-5
    k=1: 0-3 2-1 (2+3 = 5 = 1)    k=1: 0-3 2-5 4-1
                                  k=2: 0-5 2-1 4-3
    """
    four, six = Topology("bipartite_exponential", 4), Topology("bipartite_exponential", 6)
    assert [_pairs(four, k) for k in range(2)] == [({(0, 1), (2, 3)}, []), ({(0, 3), (1, 2)}, [])]
    assert [_pairs(six, k)[0] for k in range(3)] == [
        {(0, 1), (2, 3), (4, 5)},
        {(0, 3), (2, 5), (1, 4)},
        {(0, 5), (1, 2), (3, 4)},
    ]
    assert (four.cycle_length, six.cycle_length) == (2, 3)


def test_bipartite_world_of_ten_with_more_peers():
    """Below 10: 1, 3, 5, 9, then 7. Worker 0 looks forwards, worker 1 back; 4 peers leave out 7, 5 take all."""
    four, five = Topology("bipartite_exponential", 10, peers=4), Topology("bipartite_exponential", 10, peers=5)
    assert four.targets(0, 0) == [1, 3, 5, 9]
    assert four.targets(1, 0) == [0, 8, 6, 2]
    assert five.targets(0, 7) == [1, 3, 5, 9, 7]


def test_bipartite_world_of_five_idles_in_turn():
    """The four others take seats 0 to 3; distances 1, 3 between seats.
    k=0: 0 idles, seats 1 2 3 4, d=1: 1-2 3-4
    k=1: 1 idles, seats 0 2 3 4, d=3: 0-4 3-2
    k=2: 2 idles, seats 0 1 3 4, d=1: 0-1 3-4
    k=3: 3 idles, seats 0 1 2 4, d=3: 0-4 2-1
    k=4: 4 idles, seats 0 1 2 3, d=1: 0-1 2-3
    k=5: 0 idles, seats 1 2 3 4, d=3: 1-4 3-2
    """
    topology = Topology("bipartite_exponential", 5)
    assert [_pairs(topology, k) for k in range(6)] == [
        ({(1, 2), (3, 4)}, [0]),
        ({(0, 4), (2, 3)}, [1]),
        ({(0, 1), (3, 4)}, [2]),
        ({(0, 4), (1, 2)}, [3]),
        ({(0, 1), (2, 3)}, [4]),
        ({(1, 4), (2, 3)}, [0]),
    ]
    assert topology.cycle_length == 10  # 5 idlers, 2 distances


def test_ring_matchings():
    """n=5: k=0: 0-1 2-3, 4 idles; k=1: 1-2 3-4, 0 idles; k=2: 2-3 4-0, 1 idles. n=4: 0-1 2-3, then 1-2 3-0."""
    five, four = Topology("ring", 5, symmetric=True), Topology("ring", 4, symmetric=True)
    assert [_pairs(five, k) for k in range(3)] == [
        ({(0, 1), (2, 3)}, [4]),
        ({(1, 2), (3, 4)}, [0]),
        ({(2, 3), (0, 4)}, [1]),
    ]
    assert [_pairs(four, k) for k in range(3)] == [
        ({(0, 1), (2, 3)}, []),
        ({(1, 2), (0, 3)}, []),
        ({(0, 1), (2, 3)}, []),
    ]
    assert (five.cycle_length, four.cycle_length) == (5, 2)


def test_directed_ring_and_complete():
    assert _table(Topology("ring", 4), 7) == [[1], [2], [3], [0]]
    assert _table(Topology("ring", 4, peers=2), 7) == [[1, 3], [2, 0], [3, 1], [0, 2]]
    assert (
        _table(Topology("complete", 3), 7) == _table(Topology("complete", 3, peers=2), 7) == [[1, 2], [2, 0], [0, 1]]
    )


def test_mixing_matrices_by_hand():
    """
    Column j is what becomes of worker j's mass. Directed ring of 3: half stays, half goes on. Matching of 3: 2 idles
    and keeps all.
    """
    assert mixing_matrix(Topology("ring", 3), 0) == [[0.5, 0, 0.5], [0.5, 0.5, 0], [0, 0.5, 0.5]]
    assert mixing_matrix(Topology("ring", 3, symmetric=True), 0) == [[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]]
    assert mixing_matrix(Topology("complete", 4), 0) == [[0.25] * 4] * 4


@pytest.mark.parametrize("name", NAMES)
def test_a_world_of_one_exchanges_nothing(name):
    topology = Topology(name, 1)
    assert topology.targets(0, 3) == topology.sources(0, 3) == []
    assert (topology.weight(0, 3), mixing_matrix(topology, 3)) == (1.0, [[1.0]])
    assert (topology.cycle_length, connected_within(topology)) == (1, 0)


# ---- the promises of every exchange ----


@given(worlds, exchanges)
def test_sources_are_the_inverse_of_targets(topology, exchange):
    workers = range(topology.workers)
    sent = sorted((w, other) for w in workers for other in topology.targets(w, exchange))
    received = sorted((other, w) for w in workers for other in topology.sources(w, exchange))
    assert sent == received
    assert len(set(sent)) == len(sent)
    assert all(sender != receiver for sender, receiver in sent)
    if topology.symmetric:
        assert all(topology.targets(w, exchange) == topology.sources(w, exchange) for w in workers)


@given(worlds, exchanges)
def test_everybody_has_its_peers_or_idles(topology, exchange):
    peers = topology.workers - 1 if topology.name == "complete" else min(topology.peers, topology.workers - 1)
    degrees = [len(targets) for targets in _table(topology, exchange)]
    matching = topology.name == "bipartite_exponential" or (
        topology.name == "ring" and topology.symmetric and topology.peers == 1
    )
    idlers = 1 if matching and topology.workers % 2 else 0
    assert sorted(degrees) == [0] * idlers + [peers] * (topology.workers - idlers)
    assert [topology.weight(w, exchange) for w in range(topology.workers)] == [1 / (1 + degree) for degree in degrees]


@given(worlds, exchanges)
def test_mass_is_conserved(topology, exchange):
    """Rows sum to 1 even where messages go one way: synchronous push-sum weights stay 1."""
    matrix = np.array(mixing_matrix(topology, exchange))
    assert (matrix >= 0).all()
    assert np.allclose(matrix.sum(axis=0), 1, rtol=0, atol=1e-15)
    assert np.allclose(matrix.sum(axis=1), 1, rtol=0, atol=1e-15)
    if topology.symmetric:
        assert (matrix == matrix.T).all()
    for sender in range(topology.workers):
        receivers = {sender, *topology.targets(sender, exchange)}
        assert set(np.flatnonzero(matrix[:, sender])) == receivers
        assert set(matrix[list(receivers), sender]) == {topology.weight(sender, exchange)}


@given(worlds, exchanges)
def test_the_schedule_repeats(topology, exchange):
    assert _table(topology, exchange + topology.cycle_length) == _table(topology, exchange)


def test_the_cycle_is_the_shortest():
    for topology in WORLDS:
        cycle = [_table(topology, k) for k in range(topology.cycle_length)]
        assert all(cycle[shift:] + cycle[:shift] != cycle for shift in range(1, len(cycle))), topology


def test_idling_goes_round():
    """In any n exchanges in a row everybody idles once, so never twice in a row."""
    for topology in (t for t in WORLDS if t.workers > 1 and any(not targets for targets in _table(t, 0))):
        idlers = [_table(topology, k).index([]) for k in range(50)]
        for start in range(50 - topology.workers):
            assert sorted(idlers[start : start + topology.workers]) == list(range(topology.workers)), topology


# ---- how fast news and averages travel ----


def _until_all_heard(cycle, start):
    """
    Exchanges from `start` on until everybody has heard of everybody; news goes along, one link per exchange. Bit i:
    heard of i.
    """
    everybody = (1 << len(cycle[0])) - 1
    heard, exchange = [1 << worker for worker in range(len(cycle[0]))], start
    while any(bits != everybody for bits in heard):
        known = list(heard)
        for sender, targets in enumerate(cycle[exchange % len(cycle)]):
            for receiver in targets:
                heard[receiver] |= known[sender]
        exchange += 1
        assert exchange - start < 10 * len(cycle[0]), "some worker is never heard of"
    return exchange - start


def _slowest(topology):
    cycle = [_table(topology, k) for k in range(topology.cycle_length)]
    return max(_until_all_heard(cycle, start) for start in range(len(cycle)))


@settings(deadline=None)
@given(worlds, exchanges)
def test_everybody_hears_of_everybody_from_any_exchange_on(topology, exchange):
    connected = np.eye(topology.workers)
    for k in range(exchange, exchange + connected_within(topology)):
        connected = np.array(mixing_matrix(topology, k)) @ connected
    assert (connected > 0).all()


def test_connected_within_is_kept_and_tight():
    """At most twice the truth in worlds of 1 to 9."""
    for topology in WORLDS:
        assert _slowest(topology) <= connected_within(topology) <= 2 * _slowest(topology), topology


@pytest.mark.parametrize("name", NAMES)
def test_connected_within_holds_in_larger_worlds(name):
    """In rings, complete graphs and the one-peer exponential graph it is the truth."""
    for topology in (
        t for t in _worlds(range(10, 34)) if t.name == name and (t.symmetric or name in ("exponential", "ring"))
    ):
        slowest = _slowest(topology)
        assert slowest <= connected_within(topology), topology
        if name in ("ring", "complete") or (name == "exponential" and topology.peers == 1):
            assert slowest == connected_within(topology), topology


def test_one_cycle_contracts_what_workers_disagree_about():
    """The cycle's product of mixing matrices, less the average 11ᵀ/n, has 2-norm < 1: gossip over cycles converges."""
    for topology in WORLDS:
        product = np.eye(topology.workers)
        for k in range(topology.cycle_length):
            product = np.array(mixing_matrix(topology, k)) @ product
        contraction = np.linalg.norm(product - np.full_like(product, 1 / topology.workers), 2)
        assert contraction < 1 - 1e-3, (topology, contraction)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_a_power_of_two_is_averaged_exactly_in_one_cycle(bits):
    """
    Hops 1, 2, 4, ...: each exchange averages over one binary digit of the distance, so 2^L workers agree after L
    exchanges.
    """
    topology = Topology("exponential", 2**bits)
    for start in range(3):
        values = np.arange(2.0**bits) ** 2
        for k in range(start, start + connected_within(topology)):
            values = np.array(mixing_matrix(topology, k)) @ values
        assert np.allclose(values, np.mean(np.arange(2.0**bits) ** 2), rtol=1e-14, atol=0)


# ---- refusals ----


def test_exactly_the_allowed_settings_are_taken():
    for name in NAMES:
        for workers in range(1, 10):
            for peers in range(-1, 12):
                for symmetric in (False, True):
                    if _allowed(name, workers, peers, symmetric):
                        Topology(name, workers, peers, symmetric)
                    else:
                        with pytest.raises(ValueError):
                            Topology(name, workers, peers, symmetric)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (("star", 4), "topology must be one of exponential, bipartite_exponential, ring, complete, got 'star'"),
        (("ring", 0), "workers must be >= 1, got 0. Use 1"),
        (
            ("exponential", 4, 1, True),
            "topology must be two-sided for base='dpsgd', got 'exponential', .* Use 'bipartite_exponential'",
        ),
        (("exponential", 4, 0), "peers must be >= 1, got 0. Use base='local_sgd'"),
        (
            ("exponential", 4, 4),
            "peers must be <= workers - 1, got 4 with workers=4 and topology='exponential'. Use peers=3",
        ),
        (("exponential", 1, 2), "peers must be <= workers - 1, got 2 with workers=1 .* Use peers=1"),
        (("ring", 2, 2), "peers must be <= workers - 1, got 2 with workers=2 .* Use peers=1"),
        (("ring", 5, 3), "peers must be <= 2 in a ring, a neighbour on each side, got 3 .* Use peers=2"),
        (
            ("bipartite_exponential", 7, 4),
            "peers must be <= workers // 2 in a bipartite graph, .* got 4 with workers=7 .* Use peers=3",
        ),
        (("complete", 5, 2), "peers does not apply to topology='complete', .* all 4 others, got 2. Leave peers at 1"),
    ],
)
def test_refusals_name_the_setting_and_the_way_out(bad, words):
    with pytest.raises(ValueError, match=words):
        Topology(*bad)


def test_a_topology_is_fixed_and_knows_its_workers():
    topology = Topology("ring", 3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        topology.peers = 2
    with pytest.raises(AssertionError):
        topology.targets(3, 0)
    assert topology == Topology(name="ring", workers=3, peers=1, symmetric=False)
