"""A code, a topology and an outer update that are made up here: one file and one row of `names.py` each."""

from __future__ import annotations

import pytest
import torch

import slowmo_hf
from slowmo_hf import SlowMoConfig, SlowMoOptimizer, names, run_in_process
from slowmo_hf.algorithm.codec import BLOCK
from slowmo_hf.checkpoints.state import check_snapshot, write_snapshot
from slowmo_hf.wire.gossip import make_topology

CODE = '''
import torch
from slowmo_hf.algorithm.codec import Code

class Halves(Code):
    """To the nearest multiple of 1/2, in a byte."""

    dtype, has_scales = torch.int8, False

    def quantise(self, values):
        return (2 * values).round().clamp(-127, 127).to(torch.int8), values.new_empty(0)

    def dequantise(self, codes, scales):
        return codes.to(scales.dtype) / 2
'''

TOPOLOGY = '''
class Second:
    """Everybody sends to the second next."""

    cycle_length = 1

    def __init__(self, name, workers, peers, symmetric):
        self.workers = workers

    def targets(self, worker, exchange):
        return [(worker + 2) % self.workers]

    def sources(self, worker, exchange):
        return [(worker - 2) % self.workers]

    def weight(self, worker, exchange):
        return 0.5
'''

OUTER_UPDATE = '''
import torch
from slowmo_hf.contents import Contents
from slowmo_hf.algorithm.norms import Norms

class Signs:
    """One outer_lr along the signs of the pseudo-gradient; counts its rounds, and has the sum of all."""

    def __init__(self, config, anchors, pieces, groups):
        self.lr, self.rounds = config.outer_lr, 0
        self.sums = {anchor: torch.zeros_like(anchor.flat) for anchor in anchors}
        self.velocities = list(self.sums.values())

    def update_(self, displacements, inner_lrs, summands, hand_back_):
        norms = Norms()
        for bucket, total, square in displacements:
            norms.drift_square += square / summands
            for piece, run in bucket.runs(total):
                norms.add(run.div_(summands), None)
                piece.of(self.sums[piece.item]).add_(run)
                piece.anchor.sub_(run.sign(), alpha=self.lr)
                hand_back_(piece)
        self.rounds += 1
        return norms

    def saved(self):
        return Contents({"signed_rounds": self.rounds})

    def restore(self, contents):
        rounds = contents.count("signed_rounds")
        return lambda: setattr(self, "rounds", rounds)
'''


@pytest.fixture
def add(tmp_path, monkeypatch):
    """Writes the file, and adds the row."""

    def add(table, name, source, made):
        (tmp_path / f"made_up_{name}.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setitem(getattr(names, table), name, f"made_up_{name}.{made}")

    return add


def one_round(rank, config, displacements, wraps=lambda optimizer: None):
    """From 0, by a displacement per worker; the weights after the step."""
    weight = torch.nn.Parameter(torch.zeros(len(displacements[rank])))
    optimizer = SlowMoOptimizer(torch.optim.SGD([weight], lr=1.0), config)
    weight.grad = torch.tensor(displacements[rank])
    optimizer.step()
    return weight.detach().tolist(), optimizer


def test_a_code(add):
    """
    x_i = -d_i. Two workers round theirs to 1/2, and the sum of both again: 0.7 + 0.7 is 0.5 + 0.5, and (1.2 + 3.1) is
    1 + 3. Bytes: a block each way, and 8 of a rider.
    """
    add("CODES", "halves", CODE, "Halves")
    config = SlowMoConfig.local_sgd(1, compression="halves")
    for weight, optimizer in run_in_process(lambda rank: one_round(rank, config, [[0.7, 1.2], [0.7, 3.1]]), 2):
        assert weight == [-0.5, -2.0]
        header = 8 * 11  # of the status exchange
        assert slowmo_hf.last_round(optimizer).bytes_sent == 2 * (BLOCK + 8) + header
    with pytest.raises(ValueError, match="compression must be one of none, bf16, int8, halves, got 'thirds'"):
        SlowMoConfig(compression="thirds")


def test_a_topology(add):
    """Five workers at -0, ..., -4: each has the mean of its own and the second last one's."""
    add("TOPOLOGIES", "second", TOPOLOGY, "Second")
    config = SlowMoConfig(base="sgp", topology="second", sync_every=9)
    found = run_in_process(lambda rank: one_round(rank, config, [[float(worker)] for worker in range(5)])[0], 5)
    assert found == [[-(worker + (worker - 2) % 5) / 2] for worker in range(5)]
    with pytest.raises(ValueError, match="topology='second' needs base='sgp' or base='osgp' or base='dpsgd'"):
        SlowMoConfig(topology="second")


@pytest.mark.parametrize(
    ("name", "line", "other", "words"),
    [
        (
            "to_one",
            "return [(worker + 2) % self.workers]",
            "return [0] if worker else [1]",
            r"exchange 0: worker 0 has targets \[1\] and sources \[3\], and those who send to it are \[1, 2, 3, 4\]",
        ),
        (
            "beyond",
            "return [(worker + 2) % self.workers]",
            "return [worker + 2]",
            r"exchange 0: worker 0 has targets \[2\] and sources \[3\], and those who send to it are \[\]",
        ),
        ("light", "return 0.5", "return 0.25", r"worker 0 has 1 targets and weight 0\.25, which loses .* = 0\.5\."),
        (
            "twice",
            "return [(worker + 2) % self.workers]",
            "return 2 * [(worker + 2) % self.workers]",
            r"exchange 0: worker 0 has targets \[2, 2\] and sources \[3\], and those who send to it are \[3\]",
        ),
        (
            "itself",
            "2) % self.workers",
            "0) % self.workers",
            r"exchange 0: worker 0 has targets \[0\] and sources \[0\], and those who send to it are \[0\]",
        ),
    ],
    ids=["messages", "none there", "mass", "twice", "itself"],
)
def test_a_topology_that_loses_messages_or_mass_is_refused(add, name, line, other, words):
    add("TOPOLOGIES", name, TOPOLOGY.replace(line, other), "Second")
    with pytest.raises(ValueError, match=words):
        make_topology(SlowMoConfig(base="sgp", topology=name), 5)


def test_a_topology_of_unequal_degrees_needs_weights_that_travel(add):
    """Everybody but 0 sends to 0, which sends to 1: weights are 1/2 + 2/2 and 1/2 + 1/2 and 1/2 after one exchange."""
    star = TOPOLOGY.replace("return [(worker + 2) % self.workers]", "return [0] if worker else [1]")
    star = star.replace("return [(worker - 2) % self.workers]", "return [[1, 2], [0], []][worker]")
    add("TOPOLOGIES", "star", star, "Second")
    with pytest.raises(ValueError, match=r"worker 0 has 2 sources, and 1\.5 of the mass of one .* use base='osgp'"):
        make_topology(SlowMoConfig(base="sgp", topology="star"), 3)
    assert make_topology(SlowMoConfig(base="osgp", topology="star"), 3).workers == 3


@pytest.mark.parametrize(("shard", "outer_momentum"), [(False, 0.5), (False, 0.0), (True, 0.5)])
def test_an_outer_update(add, shard, outer_momentum, tmp_path):
    """The mean displacements are 2, -1 and 0: the weights go by 0.25 against their signs, then go on after a load."""
    add("OUTER_UPDATES", "signs", OUTER_UPDATE, "Signs")
    slow = {"outer_optimizer": "signs", "outer_lr": 0.25, "outer_momentum": outer_momentum}
    config = SlowMoConfig(sync_every=1, shard_slow_state=shard, **slow)

    def work(rank):
        weight, optimizer = one_round(rank, config, [[3.0, 1.0, -1.0], [1.0, -3.0, 1.0]])
        if shard:
            return weight, None, slowmo_hf.last_round(optimizer).pseudo_grad_norm
        updates = [other.outer_loop.parts.slow.update for other in loaded(config, optimizer, rank, tmp_path)]
        taken_up = [(update.rounds, [sums.tolist() for sums in update.velocities]) for update in updates]
        return weight, taken_up, slowmo_hf.last_round(optimizer).pseudo_grad_norm

    for weight, taken_up, norm in run_in_process(work, 2):
        assert weight == [-0.25, 0.25, 0.0]
        assert taken_up == (None if shard else 2 * [(1, [[2.0, -1.0, 0.0]])])
        assert norm == pytest.approx(5**0.5)


def loaded(config, optimizer, rank, folder):
    """Two others that have taken up this one's state: a `state_dict`, and a checkpoint."""
    weights = [torch.nn.Parameter(torch.zeros(3)) for _ in range(2)]
    by_dict, by_folder = (SlowMoOptimizer(torch.optim.SGD([weight], lr=1.0), config) for weight in weights)
    by_dict.load_state_dict(optimizer.state_dict())
    write_snapshot(folder, optimizer.outer_loop, shared=rank == 0, objects={})
    for weight, other in zip(weights, (by_dict, by_folder), strict=True):
        weight.grad = torch.zeros(3)
        other._started()
    check_snapshot(folder, by_folder.outer_loop).take_up()
    return by_dict, by_folder
