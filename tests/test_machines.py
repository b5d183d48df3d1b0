"""How many machines there are, where the launcher does not say."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist

from harness import run_workers
from slowmo_hf import SlowMoConfig, SlowMoOptimizer
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
