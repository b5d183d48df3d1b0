"""The start of a run: a difference between ranks is one error on all of them, and rank 0's values are everyone's."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import re
import socket
import time

import accelerate
import pytest
import torch
import torch.distributed as dist

import slowmo_hf
from harness import patience, run_workers
from slowmo_hf import SlowMoConfig, SlowMoOptimizer
from slowmo_hf.training.outer_loop import OuterLoop
from slowmo_hf.wire import job


class Net(torch.nn.Module):
    """Two parameters of one shape, one frozen, buffers of three dtypes; every value is `fill`."""

    def __init__(self, fill=0.0, *, width=2, dtype=torch.float32, second="second", train_frozen=False):
        super().__init__()
        self.first = torch.nn.Parameter(torch.full((width, 2), fill, dtype=dtype))
        self.register_parameter(second, torch.nn.Parameter(torch.full((2, 2), fill)))
        self.frozen = torch.nn.Parameter(torch.full((3,), fill), requires_grad=train_frozen)
        self.register_buffer("running", torch.full((2,), fill))
        self.register_buffer("count", torch.full((), int(fill), dtype=torch.int64))
        self.register_buffer("flag", torch.full((2,), bool(fill)))

    def forward(self):
        return sum(p.float().sum() for p in self.parameters() if p.requires_grad)


def rank():
    return dist.get_rank()


def by_rank(zero, one):
    return one if rank() == 1 else zero


def values(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


class Listener(logging.Handler):
    def __init__(self):
        super().__init__()
        self.records = []
        self.logger = logging.getLogger("slowmo_hf")

    def emit(self, record):
        self.records.append(record)

    def text(self, level):
        return "\n".join(r.getMessage() for r in self.records if r.levelno == level)

    def __enter__(self):
        self.logger.addHandler(self)
        return self

    def __exit__(self, *_):
        self.logger.removeHandler(self)


# ---- differences ----


def _settings():
    return Net(1.0 + rank()), {"sync_every": by_rank(4, 5)}


def _momentum():
    return Net(1.0 + rank()), {"outer_momentum": by_rank(0.5, 0.6)}


def _lr():
    return Net(1.0 + rank()), {}, by_rank(0.1, 0.2)


def _shape():
    return Net(1.0 + rank(), width=by_rank(2, 3)), {}


def _dtype():
    return Net(1.0 + rank(), dtype=by_rank(torch.float32, torch.bfloat16)), {}


def _requires_grad():
    return Net(1.0 + rank(), train_frozen=by_rank(False, True)), {}


def _name():
    return Net(1.0 + rank(), second=by_rank("second", "other")), {}


def _buffer():
    model = Net(1.0 + rank())
    if rank() == 1:
        model.register_buffer("extra", torch.zeros(7))
    return model, {}


def _missing():
    model = Net(1.0 + rank())
    return model, {}, 0.1, [model.first] if rank() == 1 else [model.first, model.second]


def _order():
    model = Net(1.0 + rank())
    params = [model.first, model.second]
    # Same names, other places.
    model.second, model.first = by_rank((model.second, model.first), (model.first, model.second))
    return model, {}, 0.1, params


PATCH = pytest.MonkeyPatch()  # undone after each case
TORCH = torch.__version__.partition("+")[0]  # without its build


def _library(owner, name, value):
    if rank() == 1:
        PATCH.setattr(owner, name, value)
    return Net(1.0 + rank()), {}


def _slowmo_hf_version():
    return _library(slowmo_hf, "__version__", "0.0.1")


def _torch_version():
    return _library(torch, "__version__", "0.0.1")


def _accelerate_version():
    return _library(accelerate, "__version__", "0.0.1")


def _transformers_version():
    """Of the installed package, whether or not a rank has imported it."""
    return _library(importlib.metadata, "version", {"transformers": "0.0.1"}.__getitem__)


def _not_installed(name):
    raise importlib.metadata.PackageNotFoundError(name)


def _no_transformers():
    return _library(importlib.metadata, "version", _not_installed)


class SGD2(torch.optim.SGD):
    """Another class with the same hyper-parameters: it may step otherwise."""


def _inner(make):
    model = Net(1.0 + rank())
    return model, {}, 0.1, [model.first, model.second], make


def _inner_class():
    return _inner(by_rank(torch.optim.SGD, SGD2))


def _inner_number():
    return _inner(lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=by_rank(0.9, 0.8)))


def _inner_flag():
    return _inner(lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9, nesterov=by_rank(False, True)))


def _inner_none():
    return _inner(lambda params, lr: torch.optim.SGD(params, lr=lr, foreach=by_rank(None, False)))


def _inner_tuple():
    return _inner(lambda params, lr: torch.optim.Adam(params, lr=lr, betas=by_rank((0.9, 0.98), (0.9, 0.999))))


def _inner_group():
    """The second group alone."""
    return _inner(
        lambda params, lr: torch.optim.SGD(
            [{"params": params[:1]}, {"params": params[1:], "weight_decay": by_rank(0.0, 0.01)}], lr=lr
        )
    )


def _complex():
    model = Net(1.0 + rank())
    if rank() == 1:
        model.first = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))
    return model, {}


# Each: what to build, and the words that must name the difference.
DIFFERENCES = {
    "settings": (_settings, ("SlowMoConfig.sync_every = 4", "SlowMoConfig.sync_every = 5")),
    "momentum": (_momentum, ("SlowMoConfig.outer_momentum = 0.5", "SlowMoConfig.outer_momentum = 0.6")),
    "lr": (_lr, ("inner learning rate of group 0 = 0.1", "inner learning rate of group 0 = 0.2")),
    "shape": (_shape, ("first: [2, 2]", "first: [3, 2]")),
    "dtype": (_dtype, ("torch.float32 trainable", "torch.bfloat16 trainable")),
    "requires_grad": (_requires_grad, ("[3] torch.float32 frozen", "frozen: [3] strides [1] torch.float32 trainable")),
    "name": (_name, ("second: [2, 2]", "other: [2, 2]")),
    "buffer": (_buffer, ("buffer extra: [7]",)),
    "missing": (_missing, ("second: [2, 2]",)),
    "order": (_order, ("another order",)),
    "inner class": (_inner_class, ("inner optimizer torch.optim.sgd.SGD", f"inner optimizer {__name__}.SGD2")),
    "inner number": (_inner_number, ("group 0: momentum = 0.9", "group 0: momentum = 0.8")),
    "inner flag": (_inner_flag, ("group 0: nesterov = False", "group 0: nesterov = True")),
    "inner none": (_inner_none, ("group 0: foreach = None", "group 0: foreach = False")),
    "inner tuple": (_inner_tuple, ("group 0: betas = (0.9, 0.98)", "group 0: betas = (0.9, 0.999)")),
    "inner group": (
        _inner_group,
        ("['inner optimizer group 1: weight_decay = 0.0']", "['inner optimizer group 1: weight_decay = 0.01']"),
    ),
    "slowmo_hf version": (_slowmo_hf_version, (f"slowmo_hf {slowmo_hf.__version__}", "slowmo_hf 0.0.1")),
    "torch version": (_torch_version, (f"torch {TORCH}", "torch 0.0.1")),
    "accelerate version": (_accelerate_version, (f"accelerate {accelerate.__version__}", "accelerate 0.0.1")),
    "transformers version": (
        _transformers_version,
        (f"transformers {importlib.metadata.version('transformers')}", "transformers 0.0.1"),
    ),
    "no transformers": (
        _no_transformers,
        (f"transformers {importlib.metadata.version('transformers')}", "transformers not installed"),
    ),
    "complex": (_complex, ("parameter 'first' is complex",)),
}


def check_differences():
    """Through the public surface: the first forward pass starts. Returns (words, seconds, unchanged?) by name."""
    found = {}
    for name, (build, _) in DIFFERENCES.items():
        model, settings, *rest = build()
        lr = rest[0] if rest else 0.1
        params = rest[1] if len(rest) > 1 else [p for p in model.parameters() if p.requires_grad]
        make = rest[2] if len(rest) > 2 else torch.optim.SGD
        optimizer = SlowMoOptimizer(make(params, lr=lr), SlowMoConfig(timeout_seconds=patience(20), **settings))
        before, start = values(model), time.monotonic()
        words = ""
        try:
            model()
        except ValueError as error:
            words = str(error)
        unchanged = all(torch.equal(before[key], value) for key, value in values(model).items())
        found[name] = (words, time.monotonic() - start, unchanged and optimizer.outer_loop is None)
        PATCH.undo()
    return found


@pytest.fixture(scope="module")
def differences():
    return run_workers(check_differences, 2)


@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_difference_is_the_same_error_on_every_rank(differences, name):
    """It names what differs, in seconds, before any value is exchanged: rank 1 still holds its own values."""
    (first, first_seconds, first_unchanged), (second, second_seconds, second_unchanged) = (
        found[name] for found in differences
    )
    assert first == second
    for word in DIFFERENCES[name][1]:
        assert word in first
    if name != "complex":
        assert re.match(r"ranks differ at the start: rank 0 on \S+ has .*, rank 1 on \S+ has ", first), first
    assert max(first_seconds, second_seconds) < 10
    assert first_unchanged
    assert second_unchanged


def check_a_rank_of_its_own_is_no_difference():
    """
    What a group holds beside plain numbers may name the rank: a tensor its device, a string a path, a function its
    address. The order of the keys is nobody's business either, nor for which card torch was built.
    """
    model = Net(1.0)
    inner = torch.optim.SGD([model.first, model.second], lr=0.1)
    inner.param_groups[0].update(
        scale=torch.tensor(1.0 + rank()),
        scales=(1.0, torch.tensor(1.0 + rank())),
        folder=f"/rank{rank()}",
        clip=lambda: None,
    )
    if rank() == 1:
        inner.param_groups[0] = dict(reversed(inner.param_groups[0].items()))
    PATCH.setattr(torch, "__version__", f"{TORCH}+{by_rank('cu126', 'rocm7.0')}")
    optimizer = SlowMoOptimizer(inner, SlowMoConfig(timeout_seconds=patience(20)))
    model()
    assert optimizer.outer_loop is not None


def test_who_says_the_same_says_it_once():
    told = [("a", "no room"), ("a", ""), ("b", "no room"), ("b", "no rights")]
    assert job.said_by_ranks(told) == "rank 0 on a, rank 2 on b: no room; rank 3 on b: no rights"
    assert job.said_by_ranks([(f"node-{rank // 8}", "no room") for rank in range(64)]) == (
        "rank 0 on node-0 and all others: no room"
    )
    assert job.said_by_ranks([("a", "no room")]) == "rank 0 on a: no room"
    assert job.said_by_ranks([("a", ""), ("b", "")]) == ""


def test_a_rank_of_its_own_is_no_difference():
    run_workers(check_a_rank_of_its_own_is_no_difference, 2)


# ---- rank 0's values win ----


def check_values():
    """No DDP: parameters, the frozen one and buffers of every dtype. A bf16 parameter travels bit for bit."""
    model = Net(float(rank()))
    model.narrow = torch.nn.Parameter(torch.full((3,), 1.001 + rank()).to(torch.bfloat16))
    optimizer = SlowMoOptimizer(
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1), SlowMoConfig(sync_every=2)
    )
    model()
    anchors = [item.flat.clone() for item in optimizer.outer_loop.parts.slow.anchors]
    return values(model), anchors


def test_rank_0s_values_win_at_the_start():
    workers = run_workers(check_values, 3)
    expected = {**Net(0.0).state_dict(), "narrow": torch.full((3,), 1.001).to(torch.bfloat16)}
    for found, anchors in workers:
        assert set(found) == set(expected)
        for name, value in expected.items():
            assert found[name].dtype == value.dtype
            assert torch.equal(found[name], value), name
        assert sorted(torch.cat(anchors).tolist()) == sorted([0.0] * 8 + expected["narrow"].double().tolist())


# ---- what is said ----


def check_words(address_by_rank, local_world_size, interface):
    """The warnings and the table of each rank, and the table again after four steps."""
    os.environ["LOCAL_WORLD_SIZE"] = local_world_size
    os.environ.pop("GLOO_SOCKET_IFNAME", None)
    job.address_of_host = lambda host: address_by_rank[rank()]
    job.address_of_interface = lambda name: {"eth0": "10.0.0.9", "lo": "127.0.0.1"}[name]
    with Listener() as heard:
        model = Net(1.0)
        config = SlowMoConfig(sync_every=2, outer_momentum=0.0)
        optimizer = SlowMoOptimizer(torch.optim.SGD([model.first, model.second], lr=0.1, momentum=0.9), config)
        if interface:
            os.environ["GLOO_SOCKET_IFNAME"] = interface
        for _ in range(4):
            model().backward()
            optimizer.step()
    return heard.text(logging.WARNING), heard.text(logging.INFO)


def test_the_table_has_what_is_no_default_on_rank_0():
    (warnings, table), (_, other) = run_workers(check_words, 2, ["10.0.0.7", "10.0.0.8"], "1", None)
    lines = [line.strip() for line in table.splitlines()]
    assert lines.count("settings: sync_every=2, outer_momentum=0.0") == 1
    assert other == ""
    assert lines.count("inner_state in effect: reset") == 1
    assert "effective step" not in table
    assert "2 workers, one process each, on 2 machine(s):" in table
    rows = [line.split() for line in lines if socket.gethostname() in line]
    assert [row[:2] for row in rows] == [["0", "0"], ["1", "1"]]
    assert [row[-2] for row in rows] == ["10.0.0.7", "10.0.0.8"]
    assert all("gloo" in row[2] for row in rows)
    assert lines.count("slow momentum is off: this is Local SGD") == 1
    assert warnings == ""


@pytest.mark.parametrize(
    ("addresses", "local_world_size", "interface", "warned"),
    [
        (["127.0.1.1", "127.0.1.1"], "1", None, True),
        (["10.0.0.7", "127.0.1.1"], "1", None, True),  # a second machine's /etc/hosts is as bad as the first's
        (["127.0.1.1", "127.0.1.1"], "1", "eth0", False),
        (["10.0.0.7", "10.0.0.8"], "1", "lo", True),  # what is bound counts, not the host's name
        (["127.0.1.1", "127.0.1.1"], "2", None, False),  # one machine
    ],
)
def test_a_loopback_address_in_a_job_of_several_machines_is_said(addresses, local_world_size, interface, warned):
    (warnings, _), (other, _) = run_workers(check_words, 2, addresses, local_world_size, interface)
    assert (".1, a loopback address, in a job of 2 machines: set GLOO_SOCKET_IFNAME" in warnings) == warned
    assert ("a loopback address" in warnings) == warned
    assert "loopback" not in other


def test_one_worker_is_told_that_nothing_is_averaged():
    with Listener() as heard:
        model = Net(1.0)
        optimizer = SlowMoOptimizer(torch.optim.SGD([model.first, model.second], lr=0.1), SlowMoConfig(sync_every=2))
        model()
    assert optimizer.outer_loop is not None
    assert "one worker: nothing is averaged" in heard.text(logging.WARNING)
    assert "`accelerate launch --cpu --num_processes 2` starts one process" in heard.text(logging.WARNING)


# ---- clocks that have parted ----


def check_parted_clocks():
    """Rank 1 has, by a fault, counted four steps more: with tau 4 both come to a round, at steps 4 and 8."""
    model = Net(1.0)
    optimizer = torch.optim.SGD([model.first, model.second], lr=0.1)
    loop = OuterLoop(optimizer, SlowMoConfig(sync_every=4, timeout_seconds=patience(20)), model)
    loop.start()
    loop.clock.attempted_steps += by_rank(0, 4)
    with torch.no_grad():
        model.first.add_(rank())
    before = values(model)
    for _ in range(3):
        assert loop.step([0.1]) is None
    with pytest.raises(RuntimeError) as raised:
        loop.step([0.1])
    assert all(torch.equal(before[key], value) for key, value in values(model).items()), "nothing may be mixed"
    assert loop.rounds == 0
    return str(raised.value)


def test_workers_at_different_steps_are_named_on_every_rank():
    first, second = run_workers(check_parted_clocks, 2)
    assert first == second
    assert re.match(
        r"ranks met at different places: rank 0 on \S+ at step 4, the round; rank 1 on \S+ at step 8, the round\.",
        first,
    )


def check_learning_rates_that_part():
    """
    Later learning rates may part (a step skipped on one rank): the largest is used everywhere, and it is said.

    By hand, tau 1, alpha 1, beta ½, one worker moves by -1 and the other by -3, so that the mean is -2 in each round:
    round 1: gamma 4 (4 and 2), v = 2, anchor = 1 - 2 = -1; round 2: gamma 8 (3 and 8), v = ½·8/4·2 + 2 = 4, anchor =
    -5.
    """
    model = Net(1.0)
    optimizer = torch.optim.SGD([model.first, model.second], lr=0.1)
    loop = OuterLoop(optimizer, SlowMoConfig(sync_every=1), model)
    loop.start()
    with Listener() as heard:
        for lrs in ((4.0, 2.0), (3.0, 8.0)):
            with torch.no_grad():
                model.first.sub_(1 + 2 * rank())
            loop.step([lrs[rank()]])
    return model.first.detach().clone(), heard.text(logging.WARNING)


def test_learning_rates_that_part_are_made_one():
    (found, words), (other, nothing) = run_workers(check_learning_rates_that_part, 2)
    assert nothing == "", "once per job"
    for one in (found, other):
        assert torch.equal(one, torch.full((2, 2), -5.0))
        assert "step 1: inner learning rates differ between workers" in words
