"""How many machines there are, where the launcher does not say, and where accelerate says 1 in its place."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from harness import run_workers
from slowmo_hf import SlowMoConfig, SlowMoOptimizer
from slowmo_hf.training import start_check
from slowmo_hf.training.outer_loop import OuterLoop
from slowmo_hf.wire import job
from tiny import Heard


def start_on_hosts(hosts, local_world_size):
    os.environ.pop("LOCAL_WORLD_SIZE", None)
    if local_world_size:
        os.environ["LOCAL_WORLD_SIZE"] = local_world_size
    job.host_name = lambda: hosts[dist.get_rank()]
    weight = torch.nn.Parameter(torch.ones(1))
    weight.grad = torch.ones(1)
    with Heard() as heard:
        SlowMoOptimizer(torch.optim.SGD([weight], lr=0.1), SlowMoConfig(sync_every=2)).step()
    return heard.about("LOCAL_WORLD_SIZE is not set", "WARNING")


@pytest.mark.parametrize(
    ("hosts", "local_world_size", "warned"),
    [
        ("aabb", None, True),
        ("aabb", "4", False),
        ("abcd", None, False),
        ("aaaa", None, False),
    ],
)
def test_a_launcher_that_does_not_tell_machines_is_said(hosts, local_world_size, warned):
    """As srun with the variables of torch.distributed alone: each process is a worker of its own then."""
    first, *_ = run_workers(start_on_hosts, 4, hosts, local_world_size)
    assert len(first) == warned
    assert all("so these 2 hosts count as one machine, and processes_per_worker='auto' makes 4" in it for it in first)


NOTHING, TORCHRUN = {}, {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "1"}
MPI, MPI_ALONE = {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, {"MPI_LOCALNRANKS": "1"}
BY = "as accelerate sets it where no launcher does"
CASES = [  # (hosts, what the launcher sets, processes_per_worker, processes of a worker, machines, what is said)
    ("aaaa", NOTHING, "auto", 1, 1, ""),
    ("aabb", NOTHING, "auto", 1, 2, "2"),
    ("abbc", NOTHING, "auto", 1, 3, "3"),
    ("abcd", NOTHING, "auto", 1, 4, ""),
    ("aabb", NOTHING, 2, 2, 2, ""),
    ("aaaa", NOTHING, "node", 1, None, "a has 4 processes."),
    ("abbc", NOTHING, "node", 1, None, "b has 2 processes."),
    ("abcd", NOTHING, "node", 1, 4, ""),
    ("aabb", TORCHRUN, "auto", 1, 4, ""),  # containers of one name, for example
    ("aabb", TORCHRUN, "node", 1, 4, ""),
    ("aabb", MPI, "auto", 2, 2, ""),
    ("aabb", MPI, "node", 2, 2, ""),
    ("aaaa", MPI_ALONE, "node", 1, 4, ""),
]


def start_behind_accelerate():
    """What each case says and makes; `Accelerator` writes LOCAL_WORLD_SIZE, as it does before any start."""
    found = []
    for hosts, told, size, *_ in CASES:
        for name in ("LOCAL_WORLD_SIZE", *TORCHRUN, *MPI, *MPI_ALONE):
            os.environ.pop(name, None)
        os.environ.update(told, MASTER_ADDR="127.0.0.1")
        AcceleratorState._reset_state(reset_partial_state=True)
        Accelerator(cpu=True)
        assert os.environ["LOCAL_WORLD_SIZE"] == ("2" if told is MPI else "1")
        job.host_name = start_check.host_name = lambda hosts=hosts: hosts[dist.get_rank()]
        loop = OuterLoop(
            torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1), SlowMoConfig(processes_per_worker=size)
        )
        error = ""
        with Heard() as heard:
            try:
                loop.start()
            except ValueError as refusal:
                error = str(refusal)
        table = heard.about(" each, on ", "INFO")
        found.append((loop.workers.size, table, error, heard.about("LOCAL_WORLD_SIZE", "WARNING")))
    return found


def test_a_1_of_accelerates_own_is_no_launchers():
    """On CPUs it writes 1 where no launcher has written anything; hosts with several ranks deny it."""
    first, *others = run_workers(start_behind_accelerate, 4)
    for case, (size, table, error, warnings), *theirs in zip(CASES, first, *others, strict=True):
        *_, right_size, machines, said = case
        assert size == right_size, case
        assert [told for _, _, told, _ in theirs] == [error] * 3, "the same words on every rank"
        if machines is None:
            assert f"needs LOCAL_WORLD_SIZE from the launcher. It is 1, {BY}, and {said} Export it" in error, case
            continue
        assert not error, case
        assert f", on {machines} machine(s):" in table[0], case
        assert len(warnings) == (said != ""), case
        assert all(f"is 1, {BY}, so these {said} hosts count as 4 machines" in line for line in warnings), case
