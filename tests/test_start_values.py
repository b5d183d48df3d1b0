"""The start's values: a digest of bytes, and rank 0's values for all, of which only what differs travels."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from devices import take
from harness import patience, run_workers
from slowmo_hf import SlowMoConfig, SlowMoOptimizer, run_in_process
from slowmo_hf.algorithm import digest as digests
from slowmo_hf.algorithm.digest import BLOCK, digest
from slowmo_hf.training import start_values
from slowmo_hf.training.outer_loop import OuterLoop
from slowmo_hf.training.start_values import equalise_
from slowmo_hf.wire.communicator import Communicator

BLOCK_BYTES = 4 * BLOCK
DTYPES = [
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(getattr(torch, name) for name in ("float8_e4m3fn", "float8_e5m2") if hasattr(torch, name)),
]


def random_bytes(count, seed=0):
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def bytes_of(dtype, count):
    """Of `count` random elements."""
    data = random_bytes(count * torch.empty((), dtype=dtype).element_size())
    return data & 1 if dtype == torch.bool else data


def number(tensor):
    """The digest, as Python has it."""
    found = digest(tensor)
    assert found.dtype == torch.int64
    assert found.shape == ()
    assert found.device == tensor.device
    return found.item()


# ---- the digest against its definition ----


def by_definition(data):
    """The module's equations in Python's own integers."""
    golden = 0x9E3779B97F4A7C15

    def mixed(z):
        z %= 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    def weighted(block):
        block = block.ljust(BLOCK_BYTES, b"\0")
        words = [int.from_bytes(block[i : i + 4], "little", signed=True) for i in range(0, BLOCK_BYTES, 4)]
        return sum((mixed(golden * (i + 1)) | 1) * word for i, word in enumerate(words))

    whole = len(data) // BLOCK_BYTES
    blocks = [data[b * BLOCK_BYTES : (b + 1) * BLOCK_BYTES] for b in range(whole)]
    total = len(data) + sum(mixed(weighted(block) + golden * b) for b, block in enumerate(blocks))
    total += weighted(data[whole * BLOCK_BYTES :])
    return (total + 2**63) % 2**64 - 2**63


SIZES = [0, 1, 3, 4, 5, 8, 4095, 4096, 4097, 2 * BLOCK_BYTES, 5 * BLOCK_BYTES + 7]


@pytest.mark.parametrize("blocks", [1, 2, 3, None])
def test_the_digest_is_what_the_docstring_says(monkeypatch, blocks):
    """With other numbers of blocks at a time, and by the way of other devices (None), too: they agree."""
    if blocks is None:
        monkeypatch.delitem(digests.BLOCKS_AT_A_TIME, "cpu")
    else:
        monkeypatch.setitem(digests.BLOCKS_AT_A_TIME, "cpu", blocks)
    for size in SIZES:
        data = random_bytes(size, seed=size)
        assert number(data) == by_definition(data.numpy().tobytes()), size


@pytest.mark.parametrize("offset", range(1, 9))
def test_where_the_memory_begins_does_not_count(offset):
    data = random_bytes(3 * BLOCK_BYTES + 5)
    elsewhere = torch.cat([torch.zeros(offset, dtype=torch.uint8), data])[offset:]
    assert number(elsewhere) == number(data)


# ---- what changes it ----


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([1, 3, 4, 4096, 4099, 3 * BLOCK_BYTES + 6]), st.data())
def test_any_flipped_bit_changes_it(size, draw):
    data = random_bytes(size)
    changed = data.clone()
    changed[draw.draw(st.integers(0, size - 1))] ^= 1 << draw.draw(st.integers(0, 7))
    assert number(changed) != number(data)


def test_every_bit_at_the_borders_changes_it():
    size = 3 * BLOCK_BYTES + 6
    data = random_bytes(size)
    around = {b * BLOCK_BYTES + i for b in range(4) for i in (-5, -4, -1, 0, 1, 4)} | set(range(size - 7, size))
    seen = {number(data)}
    places = [(place, bit) for place in sorted(around) if 0 <= place < size for bit in range(8)]
    for place, bit in places:
        changed = data.clone()
        changed[place] ^= 1 << bit
        seen.add(number(changed))
    assert len(seen) == 1 + len(places)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_two_swapped_elements_change_it(draw):
    values = torch.randn(3 * BLOCK + 9, generator=torch.Generator().manual_seed(1))
    places = st.integers(0, len(values) - 1)
    i, j = draw.draw(st.lists(places, min_size=2, max_size=2, unique=True))
    changed = values.clone()
    changed[[i, j]] = values[[j, i]]
    assert number(changed) != number(values)


def test_signs_that_move_change_it():
    """The highest bit of every word: two that flip, or one that moves, at all pairs of places."""
    ones = torch.ones(64)
    seen = [number(ones)]
    for i, j in itertools.combinations(range(64), 2):
        changed = ones.clone()
        changed[[i, j]] = -1
        seen.append(number(changed))
    wide = torch.ones(64, dtype=torch.float64)
    for i, j in itertools.combinations(range(64), 2):
        changed = wide.clone()
        changed[[i, j]] = -1
        seen.append(number(changed))
    assert len(set(seen)) == len(seen)


def test_permuted_blocks_change_it():
    blocks = torch.randn(4, BLOCK, generator=torch.Generator().manual_seed(2))
    assert len({number(blocks[list(order)]) for order in itertools.permutations(range(4))}) == 24
    assert number(torch.zeros(2 * BLOCK)) != number(torch.zeros(3 * BLOCK))


def test_bytes_count_and_not_values():
    """-0.0 == 0.0, but their bytes differ; NaN != NaN, but its bytes are its own."""
    zero, nan = torch.zeros(5), torch.full((5,), float("nan"))
    payload = nan.view(torch.int32).add(1).view(torch.float32)
    assert number(zero) != number(-zero)
    assert number(nan) == number(nan.clone())
    assert payload.isnan().all()
    assert number(payload) != number(nan)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 7, 2 * BLOCK + 3])
def test_every_dtype(dtype, count):
    data = bytes_of(dtype, count)
    tensor = data.clone().view(dtype)
    before = number(tensor)
    assert before == number(data)  # its bytes
    changed = data.clone()
    changed[-1] ^= 1
    assert number(changed.view(dtype)) != before


def test_permuted_memory_is_read_as_it_lies():
    image = torch.randn(2, 3, 8, 9).to(memory_format=torch.channels_last)
    assert number(image) == number(image.permute(0, 2, 3, 1).reshape(-1))
    other = image.clone()
    other[1, 2, 7, 8] += 1
    assert number(other) != number(image)
    matrix = torch.randn(5, 7)
    assert number(matrix.t()) == number(matrix)


def test_scalars_empty_tensors_and_lazy_views():
    assert number(torch.tensor(1.0)) == number(torch.ones(1))
    assert number(torch.empty(0)) == number(torch.empty(3, 0)) == 0
    assert number(torch.nn.Parameter(torch.ones(3))) == number(torch.ones(3))
    lazy = torch.randn(3, dtype=torch.complex64).conj()
    assert number(lazy) == number(lazy.resolve_conj())


def test_inside_and_outside_inference_mode():
    digests._weights.cache_clear()
    value = torch.randn(2 * BLOCK + 1)
    with torch.inference_mode():
        first = number(value)
    assert number(value) == first


def digests_on(device):
    """Of every dtype, some sizes and permuted memory: the device's, and the CPU's (tests/test_cuda_values.py)."""
    take(device)
    tensors = [bytes_of(dtype, n).view(dtype) for dtype in DTYPES for n in (0, 1, 7, 2 * BLOCK + 3)]
    tensors += [random_bytes(5000 * BLOCK_BYTES + 1), torch.randn(2, 3, 80, 90).to(memory_format=torch.channels_last)]
    return [number(tensor.to(device)) for tensor in tensors], [number(tensor) for tensor in tensors]


# ---- between processes ----


class Wide(torch.nn.Module):
    """150 layers of a few elements, one of 3000, and buffers of three dtypes: 305 tensors."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(11)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(3, 5) for _ in range(150))
        self.large = torch.nn.Parameter(torch.randn(3000))
        self.narrow = torch.nn.Parameter(torch.randn(9).to(torch.bfloat16))
        self.register_buffer("running", torch.randn(6))
        self.register_buffer("count", torch.tensor(5))
        self.register_buffer("flags", torch.tensor([True, False]))

    def forward(self):
        return sum(p.float().sum() for p in self.parameters())


NAN = torch.tensor([0x7FC00001, -0x3FFFFF, 0x7F800001], dtype=torch.int32).view(torch.float32)  # three of its kinds


def _set(place, value):
    """On every rank but the first."""

    def change(model, rank):
        if rank:
            model.state_dict()[place].view(-1)[-1] = value

    return change


def _nan_everywhere(model, rank):
    model.large.data[:3] = NAN


def _nan_of_its_own(model, rank):
    model.large.data[7] = NAN[1 if rank else 0]


def _on_the_last_rank(model, rank):
    if rank == (dist.get_world_size() if dist.is_initialized() else 3) - 1:
        model.layers[70].weight.data[2, 1] += 1e-6


def _all_differ(model, rank):
    for p in model.parameters():
        p.data.add_(rank)


def _zero(model, rank):
    model.large.data[0] = -0.0 if rank else 0.0


# Each: what it does to a rank's model, and the bytes that have to travel; the parts are those of the tensors.
CASES = {
    "equal": (lambda model, rank: None, 0),
    "equal NaN": (_nan_everywhere, 0),
    "one of many": (_set("large", 3.0), 12000),
    "one on the last rank": (_on_the_last_rank, 60),
    "another NaN": (_nan_of_its_own, 12000),
    "the sign of zero": (_zero, 12000),
    "bf16": (_set("narrow", 3.0), 18),
    "float buffer": (_set("running", 3.0), 24),
    "integer buffer": (_set("count", 7), 8),
    "boolean buffer": (_set("flags", True), 2),
    "all parameters": (_all_differ, 150 * (60 + 20) + 12000 + 18),
}


def as_bytes(model):
    return {name: value.detach().reshape(-1).view(torch.uint8).tolist() for name, value in model.state_dict().items()}


@contextlib.contextmanager
def bytes_on_the_wire():
    """What this rank puts in, by collective: a header's or an object's own bytes, a broadcast's at its source."""
    sent = {"all_gather": 0, "broadcast": 0, "all_reduce": 0}
    patch = pytest.MonkeyPatch()

    def counted(name, call):
        def collective(*args, **kwargs):
            tensor = args[1] if name == "all_gather" else args[0]
            if name != "broadcast" or kwargs["src"] == dist.get_rank():
                sent[name] += tensor.nbytes
            return call(*args, **kwargs)

        return collective

    for name in sent:
        wrapped = counted(name, getattr(dist, name))
        patch.setattr(dist, name, wrapped)
        patch.setattr(dist.distributed_c10d, name, wrapped)  # for all_gather_object
    try:
        yield sent
    finally:
        patch.undo()


def check_starts():
    """By case: (bytes on the wire, what the model holds then); a loop of ours in turn, and the optimizer at last."""
    found, config = {}, SlowMoConfig(timeout_seconds=patience(30))
    for name, (change, _) in CASES.items():
        model = Wide()
        change(model, dist.get_rank())
        with bytes_on_the_wire() as sent:
            OuterLoop(torch.optim.SGD(model.parameters(), lr=0.1), config, model).start()
        found[name] = (sent, as_bytes(model))
    model = Wide()
    optimizer = SlowMoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), config)
    with bytes_on_the_wire() as sent:
        model()
    assert optimizer.outer_loop is not None
    found["optimizer"] = (sent, as_bytes(model))
    return found


@pytest.fixture(scope="module", params=[2, 3])
def starts(request):
    return run_workers(check_starts, request.param)


@pytest.mark.parametrize("name", CASES)
def test_rank_0s_bytes_are_everyones_and_only_what_differs_travels(starts, name):
    change, travels = CASES[name]
    expected = Wide()
    change(expected, 0)
    for rank, found in enumerate(starts):
        sent, held = found[name]
        assert held == as_bytes(expected)
        assert sent["broadcast"] == (travels if rank == 0 else 0)


@pytest.mark.parametrize("name", ["equal", "equal NaN", "optimizer"])
def test_equal_ranks_start_with_a_kibibyte_each(starts, name):
    """All that the start sends: settings compared, values, the run's name, the table, the wires in use."""
    for found in starts:
        sent, _ = found[name]
        assert 0 < sum(sent.values()) <= 1024
        assert sent["broadcast"] == sent["all_reduce"] == 0


def check_equalise(rank):
    """By case: (tensors sent, bytes that the communicator has counted, what is held then)."""
    found = {}
    for name, (change, _) in CASES.items():
        model, communicator = Wide(), Communicator(patience(30), torch.device("cpu"))
        change(model, rank)
        tensors = [*model.parameters(), *model.buffers()]
        sent = equalise_(communicator, tensors, 2**20)
        found[name] = (sent, communicator.bytes_sent, as_bytes(model))
    return found


def check_equalise_in_a_process():
    return check_equalise(dist.get_rank())


@pytest.mark.parametrize("where", ["processes", "one process"])
def test_equalise_tells_how_many_tensors_it_has_sent(where):
    workers = (
        run_workers(check_equalise_in_a_process, 2) if where == "processes" else run_in_process(check_equalise, 3)
    )
    counts = {"equal": 0, "equal NaN": 0, "all parameters": 302}
    for found in workers:
        for name, (change, _) in CASES.items():
            sent, counted, held = found[name]
            expected = Wide()
            change(expected, 0)
            assert sent == counts.get(name, 1)
            assert counted == 8 * (len(workers) - 1)
            assert held == as_bytes(expected)


def start_in_process(rank):
    model = Wide()
    _all_differ(model, rank)
    optimizer = SlowMoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), SlowMoConfig())
    model()
    assert optimizer.outer_loop is not None
    return as_bytes(model)


def test_a_start_in_process_gives_all_the_first_ones_values():
    assert run_in_process(start_in_process, 3) == [as_bytes(Wide())] * 3


def test_alone_nothing_is_done(monkeypatch):
    monkeypatch.setattr(start_values, "digest", lambda tensor: pytest.fail("a digest was computed"))
    assert equalise_(Communicator(5, torch.device("cpu")), [torch.zeros(3)], 2**20) == 0
