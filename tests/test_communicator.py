"""The only room that talks to other processes: values, bytes, a world of one, and a worker that never comes."""

from __future__ import annotations

import socket
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from packaging.version import Version

from harness import patience, run_workers
from slowmo_hf import upstream
from slowmo_hf.wire.communicator import Communicator
from slowmo_hf.wire.job import host_and_address, leave_job, machines_in_job
from slowmo_hf.wire.roll_call import RollCall

CPU = torch.device("cpu")


def check_three():
    """Each message's result and its bytes, by name."""
    wire = Communicator(20.0, CPU)
    rank, found, sent = wire.rank, {}, {}

    def record(name, result):
        found[name], sent[name] = result, wire.bytes_sent - sum(sent.values())

    for dtype in (torch.float32, torch.float64):
        flat = torch.tensor([rank, 10.0 * rank, 1.0, 0.0], dtype=dtype)
        wire.start_sum_(flat)()
        record(f"sum {dtype}", flat)
    flat = torch.tensor([rank, -rank, 5], dtype=torch.int64)
    wire.max_(flat)
    record("max", flat)
    outgoing, incoming = torch.arange(6, dtype=torch.uint8) + 10 * rank, torch.empty(6, dtype=torch.uint8)
    wire.start_all_to_all(outgoing, incoming)()
    record("all to all", incoming)
    rows = torch.empty(3, 5, dtype=torch.uint8)
    wire.start_all_gather(rows, torch.full((5,), 7 + rank, dtype=torch.uint8))()
    record("all gather", rows)
    record("header", wire.gather_header([rank + 0.1, 2.0**48 - rank]))
    empty = torch.empty(0)
    wire.start_sum_(empty)(), wire.max_(empty), wire.broadcast_(empty)
    record("empty", empty)
    return found, sent, (wire.rank, wire.world_size, wire.backend)


def test_values_and_bytes_of_three_workers():
    """
    Bytes by hand, m = 3: a ring moves 2·(m-1)/m = 4/3 of a message; a header goes to two others, and so do 5 bytes; of
    6 bytes in three parts two parts go.
    """
    for rank, (found, sent, place) in enumerate(run_workers(check_three, 3)):
        for dtype in (torch.float32, torch.float64):
            assert torch.equal(found[f"sum {dtype}"], torch.tensor([3.0, 30.0, 3.0, 0.0], dtype=dtype))
        assert found["max"].tolist() == [2, 0, 5]
        assert found["all to all"].tolist() == [10 * r + 2 * rank + i for r in range(3) for i in range(2)]
        assert found["all gather"].tolist() == [[7 + r] * 5 for r in range(3)]
        assert found["header"].dtype == torch.float64
        assert found["header"].tolist() == [[r + 0.1, 2.0**48 - r] for r in range(3)]
        assert sent == {
            "sum torch.float32": 21,  # 4/3 · 4 · 4 bytes, to the nearest
            "sum torch.float64": 43,
            "max": 32,
            "all to all": 4,
            "all gather": 10,
            "header": 2 * 2 * 8,
            "empty": 0,
        }
        assert place == (rank, 3, "gloo")


def broadcast_values(rank):
    return [
        torch.tensor([1.5 + rank, float("nan"), float("-inf")], dtype=torch.float64),
        torch.tensor([1.001 + rank, -0.0], dtype=torch.bfloat16),
        torch.tensor([2.0**-24 + rank], dtype=torch.float16),
        torch.tensor([2**62 + rank, -1], dtype=torch.int64),
        torch.tensor([rank, 255], dtype=torch.uint8),
        torch.tensor([rank == 0, rank != 0]),
        torch.tensor([complex(rank, 1)]),
    ]


def check_broadcast_and_objects():
    wire = Communicator(20.0, CPU)
    tensors = broadcast_values(wire.rank)
    for flat in tensors:
        wire.broadcast_(flat)
    return tensors, wire.gather_objects({"rank": wire.rank, "words": ["a"] * wire.rank})


def test_broadcast_of_every_dtype_and_objects():
    for tensors, objects in run_workers(check_broadcast_and_objects, 3):
        for found, expected in zip(tensors, broadcast_values(0), strict=True):
            assert found.dtype == expected.dtype
            # Bit for bit, NaN and -0 too.
            assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8)), found.dtype
        assert objects == [{"rank": r, "words": ["a"] * r} for r in range(3)]


def check_one_group_per_timeout():
    first, same, other = Communicator(20.0, CPU), Communicator(20.0, CPU), Communicator(21.0, CPU)
    return first.group is same.group, first.group is other.group, first.group is dist.group.WORLD


def test_groups_are_made_once_per_timeout():
    """`new_group` leaks: a new outer loop (auto_find_batch_size, train() twice) must not make another."""
    assert run_workers(check_one_group_per_timeout, 2) == [(True, False, False)] * 2


def check_world_of_one():
    wire = Communicator(20.0, CPU)
    flat, whole = torch.tensor([1.5, -2.0]), torch.tensor([3, -4])
    wire.start_sum_(flat)(), wire.max_(whole), wire.broadcast_(flat)
    sent, into, rows = (
        torch.tensor([1, 2], dtype=torch.uint8),
        torch.zeros(2, dtype=torch.uint8),
        torch.zeros(1, 2, dtype=torch.uint8),
    )
    wire.start_all_to_all(sent, into)(), wire.start_all_gather(rows, sent)()
    assert (into.tolist(), rows.tolist()) == ([1, 2], [[1, 2]])
    assert flat.tolist() == [1.5, -2.0]
    assert whole.tolist() == [3, -4]
    assert wire.gather_header([7.0, 8.0]).tolist() == [[7.0, 8.0]]
    assert wire.gather_objects("mine") == ["mine"]
    assert (wire.bytes_sent, wire.group, wire.world_size, wire.rank, wire.backend) == (0, None, 1, 0, "none")


def check_initialised_world_of_one(folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/alone", rank=0, world_size=1)
    check_world_of_one()
    dist.destroy_process_group()


def test_a_world_of_one_sends_nothing(tmp_path):
    check_world_of_one()
    run_workers(check_initialised_world_of_one, 1, str(tmp_path))


TIMEOUT_SECONDS = 3.0


def _wait_for(path, seconds):
    end = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.05)


def check_absent_worker(folder, case):
    """Rank 0 waits for rank 1, which stays away, or dies. Returns what rank 0 got, and after how many seconds."""
    over = Path(folder) / "over"
    if dist.get_rank() == 1:
        if case != "never starts":
            Communicator(TIMEOUT_SECONDS, CPU)
        if case != "dies":
            _wait_for(over, 40)
        return None
    start = time.monotonic()
    try:
        wire = Communicator(TIMEOUT_SECONDS, CPU)
        wire.gather_header([1.0]) if case == "header" else wire.start_sum_(torch.ones(4))()
        word = ""
    except RuntimeError as error:
        word = str(error)
    seconds = time.monotonic() - start
    over.touch()
    return word, seconds


@pytest.mark.slow
@pytest.mark.parametrize("case", ["never comes", "header", "dies", "never starts"])
def test_a_worker_that_never_comes_is_an_error_in_time(tmp_path, case):
    word, seconds = run_workers(check_absent_worker, 2, str(tmp_path), case, time_limit_seconds=60)[0]
    assert word, "an average without the other worker"
    assert seconds < TIMEOUT_SECONDS + patience(10)
    if case in ("never comes", "header"):
        assert seconds > 0.8 * TIMEOUT_SECONDS


def test_machines_come_from_the_environment(monkeypatch):
    for local, world, machines in (("1", 4, 4), ("2", 4, 2), ("4", 4, 1), ("8", 4, 1), (None, 4, 1)):
        if local is None:
            monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
        else:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
        assert machines_in_job(world) == machines


def test_the_address_is_what_the_backend_binds(monkeypatch):
    """gloo takes the first address of the host's name that can be bound, else loopback; or a named interface's."""

    def none(host, *args, **kwargs):
        raise OSError("no such host")

    def found(host, *args, **kwargs):  # 192.0.2.1 is nobody's (RFC 5737)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (of, 0)) for of in ("192.0.2.1", "127.0.0.7")]

    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("socket.gethostname", lambda: "node7")
    monkeypatch.setattr("socket.getaddrinfo", none)
    assert host_and_address("gloo") == ("node7", "127.0.0.1")
    monkeypatch.setattr("socket.getaddrinfo", found)
    assert host_and_address("gloo") == ("node7", "127.0.0.7")
    assert host_and_address("nccl") == ("node7", "NCCL's choice")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo,eth1")
    assert host_and_address("gloo") == ("node7", "127.0.0.1")
    assert host_and_address("nccl") == ("node7", "NCCL's choice")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "=lo")
    assert host_and_address("nccl") == ("node7", "127.0.0.1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no such one")
    assert host_and_address("gloo") == ("node7", "no such one")


class Late:
    """Work that ends in the moment between the end of a slice and the look at whether it has ended; well, or not."""

    def __init__(self, failure):
        self.failure, self.ended = failure, False

    def is_completed(self):
        return self.ended

    def wait(self, timeout=None):
        if not self.ended:
            self.ended = True
            raise RuntimeError("Operation timed out!")
        if self.failure:
            raise RuntimeError(self.failure)


def leave_right_after_a_gather():
    store, rank = upstream.default_store(), dist.get_rank()
    for number in range(15):
        found = [torch.zeros(40, dtype=torch.float64) for _ in range(2)]
        dist.all_gather(found, torch.ones(40, dtype=torch.float64))
        del found  # gloo's thread has the last reference, and needs the interpreter to drop it
        leave_job()
        dist.init_process_group("gloo", store=dist.PrefixStore(str(number), store), rank=rank, world_size=2)
    dist.barrier()
    return number


@pytest.mark.skipif(Version(torch.__version__) >= Version("2.9"), reason="newer versions let the thread go")
def test_a_process_that_leaves_right_after_a_gather_ends():
    """With torch 2.6 a group that is dropped at that moment waits for its thread, and the thread for it."""
    assert run_workers(leave_right_after_a_gather, 2) == [14, 14]


def leave(backend):
    store, rank = upstream.default_store(), dist.get_rank()
    dist.destroy_process_group()
    dist.init_process_group(backend, store=dist.PrefixStore("again", store), rank=rank, world_size=2)
    dist.barrier()
    leave_job()
    ended = not dist.is_initialized()
    dist.init_process_group("gloo", store=dist.PrefixStore("end", store), rank=rank, world_size=2)
    return ended


@pytest.mark.parametrize("backend", ["gloo", "cpu:gloo", None])
def test_a_job_of_gloo_alone_is_left_however_it_is_named(backend):
    assert run_workers(leave, 2, backend) == [True, True]


def wait_among_many():
    """What rank 0 asks the store for while rank 1 is late, and when it has left; it takes itself for one of 256."""
    roll_call, asked = RollCall(30), []
    roll_call.enter(1, "the start")
    if dist.get_rank() == 1:
        time.sleep(4)
        roll_call.enter(2, "the round")
        roll_call.leave("it was asked to")
        return None
    ask = roll_call.store._ask
    roll_call.store._ask = lambda call, *args: asked.append(call.__name__) or ask(call, *args)
    roll_call.world_size, roll_call._meeting = 256, roll_call._meeting + 1
    is_gone, for_one_look = roll_call.somebody_is_gone(), len(asked)
    roll_call.world_size, roll_call._meeting = 2, roll_call._meeting - 1
    asked.clear()
    roll_call.enter(2, "the round")
    while_it_waits = len(asked)
    while not roll_call.register.has("left", 1):
        time.sleep(0.01)
    roll_call.come(3, "the next round")
    return is_gone, for_one_look, while_it_waits, roll_call.somebody_is_gone()


def test_who_waits_asks_the_store_for_little():
    """Not for every rank at each look, and less often the longer it waits: in 4 s some 260 times, and not 400."""
    (is_gone, for_one_look, while_it_waits, is_gone_at_last), _ = run_workers(wait_among_many, 2)
    assert not is_gone
    assert for_one_look <= 3
    assert 20 < while_it_waits < 330
    assert is_gone_at_last


class Nobody:
    """A witness that misses nobody."""

    def somebody_is_gone(self):
        return False


@pytest.mark.parametrize("failure", ["", "Connection closed by peer"])
def test_what_arrives_just_behind_a_slice_of_waiting_has_arrived(failure):
    communicator = object.__new__(Communicator)
    communicator._by_device = {}
    communicator.backend, communicator.witness, communicator.patience_seconds = "gloo", Nobody(), 0.0
    with pytest.raises(RuntimeError, match=failure) if failure else nullcontext():
        communicator._wait(Late(failure), torch.device("cpu"))
