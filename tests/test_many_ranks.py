"""What a job of many ranks asks of its store, its disks and its memory, and how short its errors are."""

from __future__ import annotations

import copy
import json
import os
import shutil
import threading
import time
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from harness import patience, run_workers
from slowmo_hf import SlowMoConfig, SlowMoOptimizer
from slowmo_hf.checkpoints import files, manifest
from slowmo_hf.checkpoints.places import read_for
from slowmo_hf.checkpoints.together import turn_at_reading
from slowmo_hf.contents import CheckpointError, Contents, Saved
from slowmo_hf.training.status import Header, Purpose
from slowmo_hf.wire import job, roll_call
from slowmo_hf.wire.communicator import Communicator
from slowmo_hf.wire.roll_call import RollCall

MANY = 1024


def roll_calls(world_size, store, ranks):
    """Of some ranks of a made-up job, and the calls of the store that they make."""
    asked, made = [], []
    roll_call.processes_in_job, roll_call.job_store = (lambda: world_size), (lambda: store)
    roll_call._runs = iter([0] * len(ranks))
    for rank in ranks:
        roll_call.rank_in_job = lambda rank=rank: rank
        one = RollCall(patience(30))
        start = one.store._start
        one.store._start = lambda call, *args, start=start: asked.append((call.__name__, *args)) or start(call, *args)
        made.append(one)
    return made, asked


def meet(ranks=64, meetings=6):
    store = dist.HashStore()
    made, asked = roll_calls(ranks, store, range(ranks))

    def enter_all(one):
        for step in range(meetings):
            one.enter(step, "the round")

    threads = [threading.Thread(target=enter_all, args=(one,)) for one in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(patience(60))
    words = [store.get(f"slowmo/0/{meetings}/{rank}").decode() for rank in range(ranks)]
    for one in made:
        one.store.check(["the calls before are done"])
    return [len(args[0]) for name, *args in asked if name == "check"], words, store.num_keys()


def test_who_waits_for_many_asks_for_one_key():
    """And two meetings' keys are kept: each rank's, how many have come, and that all have."""
    (keys_asked, words, kept), *_ = run_workers(meet, 1)
    assert set(keys_asked) == {1}
    assert all('"step": 5, "place": "the round"' in said for said in words)
    assert kept <= 2 * (64 + 2)


def explain_among_many():
    store = dist.HashStore()
    (here,), asked = roll_calls(MANY, store, [5])
    here.come(7, "the round")
    entry = here.register.entry
    for rank in range(MANY):
        if rank not in (5, 700):
            store.set(f"slowmo/0/failed/{rank}", entry())
    store.set("slowmo/0/left/700", entry("it was asked to"))
    store.set("slowmo/0/failed/any", entry())
    asked.clear()
    began = time.monotonic()
    error = str(here.explain(None, range(MANY)))
    took, calls = time.monotonic() - began, len(asked)
    first = here.register.get("found", roll_call.ANY)["cause"]
    gave_up = roll_calls(MANY, store, [6])[0][0].explain(None, [rank for rank in range(MANY) if rank != 700])
    return error, took, calls, first, str(gave_up)


def test_who_explains_a_failure_among_many_asks_for_little():
    """64 ranks in a question, and the one that left by itself; it was two questions for each rank in every 0.05 s."""
    (error, took, calls, first, gave_up), *_ = run_workers(explain_among_many, 1)
    left = f"rank 700 on {job.host_name()} left at step 7: it was asked to"
    assert error.startswith(f"{left}. It was missed at step 7, the round, by rank 5")
    assert took < patience(2)
    assert calls < MANY / 64 + 64 + 20
    assert first == left
    assert gave_up.startswith(f"{left}. It was missed"), "who has missed nobody has another's words"


def test_errors_of_many_ranks_name_the_odd_one_first():
    hosts = [f"node-{rank // 8}" for rank in range(MANY)]
    said = job.said_by_ranks([(host, "no room" if rank != 700 else "no rights") for rank, host in enumerate(hosts)])
    assert said.startswith("rank 700 on node-87: no rights; rank 0 on node-0, rank 1 on node-0, ")
    assert said.endswith("rank 7 on node-0 and 1,015 others: no room")
    world = SimpleNamespace(gather_objects=lambda own: hosts)
    purposes = [Purpose.ROUND] * MANY
    purposes[700] = Purpose.LOOK
    with pytest.raises(RuntimeError) as error:
        Header._compare_places(SimpleNamespace(), world, purposes, [12] * MANY)
    odd = "ranks met at different places: rank 700 on node-87 at step 12, a view of the average; rank 0 on node-0, "
    assert str(error.value).startswith(odd)
    assert len(str(error.value)) < 1500


def start_on_machines_of_several_sizes():
    os.environ["LOCAL_WORLD_SIZE"] = ("2", "2", "1", "1")[dist.get_rank()]
    model = torch.nn.Linear(2, 1)
    optimizer = SlowMoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), SlowMoConfig(timeout_seconds=30))
    with pytest.raises(ValueError, match="processes_per_worker") as error:
        model(torch.ones(2))
    del optimizer
    return str(error.value)


def test_machines_of_several_sizes_are_told_the_way_out():
    told = run_workers(start_on_machines_of_several_sizes, 4)
    host = job.host_name()
    assert set(told) == {
        f"processes_per_worker='auto' makes workers of several sizes: rank 0 on {host} has processes per worker = 2, "
        f"rank 2 on {host} has processes per worker = 1. All must have equally many: a machine's processes, as "
        "LOCAL_WORLD_SIZE says. Start as many on every machine, or set processes_per_worker=1."
    }


def take_turns(folder, copy_of):
    os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="2")  # whatever the launcher says
    outer_loop = SimpleNamespace(workers=SimpleNamespace(world=Communicator(patience(20), torch.device("cpu"))))
    own = copy_of if dist.get_rank() > 1 else folder
    return turn_at_reading(outer_loop, folder), turn_at_reading(outer_loop, own)


def test_machines_that_share_a_checkpoint_read_it_once_between_them(tmp_path):
    folder, copy_of = tmp_path / "shared", tmp_path / "own"
    files.write_part(folder, "shared", Contents({"run": "a", "attempted_steps": 3, "save": "b"}))
    manifest.seal(folder, {"run": "a", "step": 3, "save": "b"})
    shutil.copytree(folder, copy_of)
    shared, apart = zip(*run_workers(take_turns, 4, folder, copy_of), strict=True)
    assert shared == ((0, 4), (1, 4), (2, 4), (3, 4))
    assert apart == ((0, 2), (1, 2), (0, 2), (1, 2)), "machines with disks of their own read their own"
    (folder / "slowmo" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="the checkpoint was never finished"):
        manifest.verify_in_turns(folder, 3, 4)


def test_a_process_reads_no_tensors_of_others(tmp_path, monkeypatch):
    for place in range(4):
        settings = {"place": place, "processes_per_worker": 4, "sharded": True, "run": "a"}
        tensors, objects = {"anchor": torch.full((2,), float(place))}, {"own": torch.full((2,), float(place))}
        files.write_part(tmp_path, f"worker_0_shard_{place}", Contents(settings, tensors, objects))
    read = []

    def noting(real):
        return lambda path, *args, **kwargs: read.append(path.name) or real(path, *args, **kwargs)

    monkeypatch.setattr(files, "load_file", noting(files.load_file))
    monkeypatch.setattr(torch, "load", noting(torch.load))
    workers = SimpleNamespace(size=4, place=3, holds_shards=True)
    contents = read_for(workers, str(tmp_path), "worker_0")
    assert read == ["worker_0_shard_3.safetensors", "worker_0_shard_3.pt"]
    assert contents.objects["own"].tolist() == [3.0, 3.0]


class Largest(TorchDispatchMode):
    """The most elements that an operation has given."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = func(*args, **(kwargs or {}))
        made = given if isinstance(given, (tuple, list)) else [given]
        self.elements = max([self.elements, *(one.numel() for one in made if isinstance(one, torch.Tensor))])
        return given


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_read_is_checked_without_a_second_tensor(dtype):
    whole = torch.ones(1000, dtype=dtype)
    like = torch.empty_like(whole)
    with Largest() as largest:
        assert Contents(tensors={"anchor": whole}).tensor("anchor", like) is whole
    assert largest.elements <= 2
    for odd in (float("nan"), float("inf"), -float("inf")):
        whole[500] = odd
        with pytest.raises(CheckpointError, match="anchor is not finite"):
            Contents(tensors={"anchor": whole}).tensor("anchor", torch.empty_like(whole))
    none = torch.ones(0)
    assert Contents(tensors={"anchor": none}).tensor("anchor", torch.empty(0)) is none


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.float8_e4m3fn])
def test_float8_that_is_read_is_checked_too(dtype):
    whole = torch.ones(8).to(dtype)
    assert Contents(tensors={"scales": whole}).tensor("scales", torch.empty_like(whole)) is whole
    odd = torch.tensor([1.0, float("nan")]).to(dtype)
    with pytest.raises(CheckpointError, match="scales is not finite"):
        Contents(tensors={"scales": odd}).tensor("scales", torch.empty_like(odd))


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD])
def test_a_resume_lets_the_old_state_go_before_it_makes_the_new(kind, tmp_path, monkeypatch):
    """Both together would not fit a card that training fills; and nothing of the file is kept."""
    model = torch.nn.Linear(4, 2)
    inner = kind(model.parameters(), lr=0.1, **({"momentum": 0.9} if kind is torch.optim.SGD else {}))
    optimizer = SlowMoOptimizer(inner, SlowMoConfig(sync_every=8))
    for _ in range(2):
        model(torch.ones(4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    state = optimizer.outer_loop.inner_state
    files.write_part(tmp_path, "worker_0", state.saved(agree=True, keep=True).own)
    saved = copy.deepcopy(inner.state_dict()["state"])
    key = "exp_avg" if kind is torch.optim.Adam else "momentum_buffer"
    inner.state[model.weight][key].add_(1)
    old, had_gone = weakref.ref(inner.state[model.weight][key]), []
    take_up = state.restore(Saved(own=files.read_part(tmp_path, "worker_0")), same_number=True)
    make = torch.optim.Optimizer._process_value_according_to_param_policy

    def look_first(*args, **kwargs):
        had_gone.append(old() is None)
        return make(*args, **kwargs)

    monkeypatch.setattr(torch.optim.Optimizer, "_process_value_according_to_param_policy", staticmethod(look_first))
    take_up()
    assert had_gone
    assert all(had_gone)
    torch.testing.assert_close(inner.state_dict()["state"], saved, rtol=0, atol=0)
    with (tmp_path / "slowmo" / "worker_0.pt").open("r+b") as file:
        file.write(b"\0" * (tmp_path / "slowmo" / "worker_0.pt").stat().st_size)
    torch.testing.assert_close(inner.state_dict()["state"], saved, rtol=0, atol=0)


def test_another_ranks_host_is_named(monkeypatch):
    """On one machine all ranks have one name, so its own in place of another's would look right."""
    for name in ("processes_in_job", "job_store", "_runs", "rank_in_job"):  # `roll_calls` puts its own there
        monkeypatch.setattr(roll_call, name, getattr(roll_call, name))
    (here,), _ = roll_calls(4, store := dist.HashStore(), [0])
    there = {"step": 7, "place": "the round", "cause": "it was asked to"}
    for rank in (1, 2, 3):
        store.set(f"slowmo/0/1/{rank}", json.dumps({**there, "host": f"node-{rank}"}))
    store.set("slowmo/0/left/2", json.dumps({**there, "host": "node-2"}))
    here.come(7, "the round")
    assert [here.host_of(rank) for rank in range(4)] == [here.register.host, "node-1", "node-2", "node-3"]
    assert here._words(2, True, "").startswith("rank 2 on node-2 left at step 7: it was asked to")
    assert here._words(3, False, "").startswith("rank 3 on node-3 left without a word")
    assert here._words(1, True, "").startswith("rank 1 on node-1 did not come")
