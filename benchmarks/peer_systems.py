"""
Ours and its peers, each as its page says. Every system is a function from (model, SGD, accelerator, settings) to a
`Job`, which imports its package when it is called.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import slowmo_hf
from slowmo_hf import SlowMoConfig, SlowMoOptimizer


@dataclass
class Training:
    """What the driver takes and passes on."""

    sync_every: int = field(default=12, metadata={"help": "Steps per round, of all that have rounds."})
    timed_rounds: int = field(default=8, metadata={"help": "Rounds that are timed; the first is left out."})
    look_every: int = field(
        default=24, metadata={"help": "Steps between looks at the test loss, a multiple of sync_every."}
    )
    width: int = field(default=256, metadata={"help": "Of the model's hidden layers."})
    batch_size: int = field(default=16, metadata={"help": "Images per step and host."})
    device_ms: float = field(
        default=50.0, metadata={"help": "Of a step on an accelerator that is waited for (Device); 0: none."}
    )
    learning_rate: float = field(default=0.02, metadata={"help": "Of SGD with Nesterov momentum 0.9."})
    lr_scheduler_type: str = field(
        default="linear", metadata={"help": "Of transformers' get_scheduler, over the steps with looks."}
    )


@dataclass
class Settings(Training):
    """What the driver asks for."""

    system: str = field(default="ddp", metadata={"help": "A name of SYSTEMS."})
    images: str = field(default="", metadata={"help": "What peers.py has written (decoded, safetensors)."})
    output: str = field(default="", metadata={"help": "Rank 0's figures go here."})
    steps: int = field(default=0, metadata={"help": "Steps of training with looks; 0: none."})
    seconds: float = field(
        default=0.0, metadata={"help": "In their place: as many steps as fit, by the step time just measured."}
    )
    layers: int = field(default=8, metadata={"help": "Hidden layers."})
    seed: int = field(default=0, metadata={"help": "Of the model and the batches."})


@dataclass
class Job:
    """
    How a system trains: what is called on images, what follows a backward pass, how its average is looked at, and how
    many steps after a round nothing is under way: a look there hides no message.
    """

    called: nn.Module
    after_backward: Callable[[], None]
    backward: Callable[[torch.Tensor], None]
    look: Callable[[], AbstractContextManager[Any]] = nullcontext
    around: AbstractContextManager[Any] = field(default_factory=nullcontext)
    look_after: int = 0


# ---- systems ----

# DDP's buckets, of 25 MB by default: a small model's gradients would all travel at the end of the backward pass.
BUCKET_MB = 0.2


def backward(loss: torch.Tensor) -> None:
    """Of a system that asks for nothing else."""
    loss.backward()


def stepping(optimizer: torch.optim.Optimizer, then: Callable[[], Any] = lambda: None) -> Callable[[], None]:
    """A step, what follows it, and gradients that begin anew."""

    def step() -> None:
        optimizer.step()
        then()
        optimizer.zero_grad()

    return step


def ddp(model: nn.Module, sgd: torch.optim.Optimizer, accelerator: Accelerator, settings: Settings) -> Job:
    """
    torch's DistributedDataParallel, with a bucket per layer, so that gradients travel while earlier layers compute.
    """
    return Job(DistributedDataParallel(model, bucket_cap_mb=BUCKET_MB), stepping(sgd), backward)


def ddp_bf16(model: nn.Module, sgd: torch.optim.Optimizer, accelerator: Accelerator, settings: Settings) -> Job:
    """
    The same with torch's hook that sends gradients in bf16: behind another name, for DDP refuses it on gloo, which
    can.
    """
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

    wrapped = DistributedDataParallel(model, bucket_cap_mb=BUCKET_MB)
    wrapped.register_comm_hook(None, lambda state, bucket: bf16_compress_hook(state, bucket))
    return Job(wrapped, stepping(sgd), backward)


def ddp_powersgd(model: nn.Module, sgd: torch.optim.Optimizer, accelerator: Accelerator, settings: Settings) -> Job:
    """
    torch's PowerSGD of rank 1, error feedback and warm start on, as its page proposes. In one bucket: with several,
    its collectives start from callbacks of gloo's threads, in another order on each rank, and fail.
    """
    from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

    wrapped = DistributedDataParallel(model, bucket_cap_mb=25)
    wrapped.register_comm_hook(PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=2), powerSGD_hook)
    return Job(wrapped, stepping(sgd), backward)


def accelerate_local_sgd(
    model: nn.Module, sgd: torch.optim.Optimizer, accelerator: Accelerator, settings: Settings
) -> Job:
    """accelerate's LocalSGD."""
    from accelerate.local_sgd import LocalSGD

    prepared, optimizer = accelerator.prepare(model, sgd)
    local = LocalSGD(accelerator=accelerator, model=prepared, local_sgd_steps=settings.sync_every, enabled=True)
    return Job(prepared, stepping(optimizer, local.step), accelerator.backward, around=local)


def torch_averager(model: nn.Module, sgd: torch.optim.Optimizer, accelerator: Accelerator, settings: Settings) -> Job:
    """
    torch's PeriodicModelAverager. Its rounds follow steps 1, 1 + period, ...: the first is left out, so that looks are
    at rounds.
    """
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager

    averager = PeriodicModelAverager(period=settings.sync_every, warmup_steps=settings.sync_every)
    averager.step = 1
    return Job(model, stepping(sgd, lambda: averager.average_parameters(model.parameters())), backward)


def fairscale_slowmo(
    model: nn.Module, sgd: torch.optim.Optimizer, accelerator: Accelerator, settings: Settings
) -> Job:
    """fairscale's SlowMoDistributedDataParallel over Local SGD; its call of CUDA does nothing here."""
    from fairscale.experimental.nn.data_parallel import SlowMoBaseAlgorithm, SlowMoDistributedDataParallel

    torch.cuda.synchronize = lambda device=None: None
    wrapped = SlowMoDistributedDataParallel(
        model,
        nprocs_per_node=1,
        slowmo_base_algorithm=SlowMoBaseAlgorithm.LOCALSGD,
        slowmo_momentum=0.5,
        slowmo_frequency=settings.sync_every,
        localsgd_frequency=settings.sync_every,
    )
    return Job(wrapped, stepping(sgd, lambda: wrapped.perform_slowmo(sgd)), backward)


def torchft_diloco(fragment_sync_delay: int = 0, fragment_update_alpha: float = 0.0) -> Callable[..., Job]:
    """
    torchft's DiLoCo with the outer optimizer of its paper, each host a replica of one process; rank 0 keeps its
    lighthouse. With a delay the round travels behind as many steps, and workers go on from a mixture that differs:
    they are averaged for a look.
    """

    def make(model: nn.Module, sgd: torch.optim.Optimizer, accelerator: Accelerator, settings: Settings) -> Job:
        from torchft.local_sgd import DiLoCo

        @contextmanager
        def around() -> Iterator[None]:
            outer = torch.optim.SGD(model.parameters(), lr=0.7, momentum=0.9, nesterov=True)
            delay = {"fragment_sync_delay": fragment_sync_delay, "fragment_update_alpha": fragment_update_alpha}
            with _torchft_manager() as manager, DiLoCo(manager, [model], sgd, outer, settings.sync_every, **delay):
                yield

        return Job(
            model,
            stepping(sgd),
            backward,
            look=(lambda: _averaged(model)) if fragment_update_alpha else nullcontext,
            around=around(),
        )

    return make


@contextmanager
def _torchft_manager() -> Iterator[Any]:
    from torchft import Manager, ProcessGroupGloo
    from torchft.coordination import LighthouseServer

    first_host = os.environ.get("MASTER_ADDR", "127.0.0.1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as towards:
        towards.connect((first_host, 9))  # sends nothing, and tells by which address others see this host
        here = towards.getsockname()[0]
    lighthouse = LighthouseServer(bind="[::]:0", min_replicas=dist.get_world_size()) if dist.get_rank() == 0 else None
    port = [urlsplit(lighthouse.address()).port if lighthouse else None]
    dist.broadcast_object_list(port)
    store = dist.TCPStore(here, 0, is_master=True, wait_for_workers=False)
    manager = Manager(
        ProcessGroupGloo(timeout=timedelta(seconds=300)),
        None,
        None,
        min_replica_size=dist.get_world_size(),
        use_async_quorum=False,
        rank=0,
        world_size=1,
        store_addr=here,
        store_port=store.port,
        lighthouse_addr=f"http://{first_host}:{port[0]}",
        replica_id=f"host_{dist.get_rank()}",
        hostname=here,
        init_sync=False,
    )
    yield manager
    dist.barrier()
    manager.shutdown()
    if lighthouse:
        lighthouse.shutdown()


@contextmanager
def _averaged(model: nn.Module) -> Iterator[None]:
    """The mean over hosts in the parameters, and then their own again."""
    own = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            dist.all_reduce(p)
            p.div_(dist.get_world_size())
        yield
        for p, value in zip(model.parameters(), own, strict=True):
            p.copy_(value)


def ours(**config: Any) -> Callable[..., Job]:
    """slowmo_hf with these settings, through Accelerate as in the README."""

    def make(model: nn.Module, sgd: torch.optim.Optimizer, accelerator: Accelerator, settings: Settings) -> Job:
        optimizer = SlowMoOptimizer(sgd, SlowMoConfig(sync_every=settings.sync_every, timeout_seconds=300, **config))
        prepared, optimizer = accelerator.prepare(model, optimizer)
        return Job(
            prepared,
            stepping(optimizer),
            accelerator.backward,
            look=lambda: slowmo_hf.consensus(optimizer),
            look_after=config.get("overlap_steps", 0),
        )

    return make


GOSSIP_ALONE = {"exact_average": False, "outer_momentum": 0.0}
SYSTEMS: dict[str, Callable[..., Job]] = {
    "ddp": ddp,
    "ddp bf16": ddp_bf16,
    "ddp powersgd": ddp_powersgd,
    "accelerate LocalSGD": accelerate_local_sgd,
    "torch PeriodicModelAverager": torch_averager,
    "fairscale SlowMo": fairscale_slowmo,
    "torchft DiLoCo": torchft_diloco(),
    "torchft DiLoCo, delayed": torchft_diloco(fragment_sync_delay=6, fragment_update_alpha=0.5),
    "torchft DiLoCo, every 6, delayed": torchft_diloco(fragment_sync_delay=4, fragment_update_alpha=0.5),
    "slowmo_hf all_reduce": ours(base="all_reduce", outer_momentum=0.0),
    "slowmo_hf all_reduce, slowmo": ours(base="all_reduce"),
    "slowmo_hf local_sgd": ours(outer_momentum=0.0),
    "slowmo_hf local_sgd, maintained": ours(outer_momentum=0.0, inner_state="maintain"),
    "slowmo_hf local_sgd, maintained, overlapped": ours(outer_momentum=0.0, inner_state="maintain", overlap_steps=6),
    "slowmo_hf local_sgd, maintained, int8": ours(outer_momentum=0.0, inner_state="maintain", compression="int8"),
    "slowmo_hf local_sgd, slowmo": ours(),
    "slowmo_hf local_sgd, slowmo, overlapped": ours(overlap_steps=6),
    "slowmo_hf local_sgd, slowmo, bf16": ours(compression="bf16"),
    "slowmo_hf local_sgd, slowmo, int8": ours(compression="int8"),
    "slowmo_hf local_sgd, slowmo, sharded": ours(shard_slow_state=True),
    "slowmo_hf local_sgd, slowmo, maintained": ours(inner_state="maintain"),
    "slowmo_hf local_sgd, slowmo, maintained, overlapped": ours(inner_state="maintain", overlap_steps=6),
    "slowmo_hf local_sgd, slowmo, maintained, int8": ours(inner_state="maintain", compression="int8"),
    "slowmo_hf local_sgd, slowmo, maintained, overlapped by 2, int8": ours(
        inner_state="maintain", overlap_steps=2, compression="int8"
    ),
    "slowmo_hf local_sgd, slowmo, maintained, overlapped by 4, int8": ours(
        inner_state="maintain", overlap_steps=4, compression="int8"
    ),
    "slowmo_hf local_sgd, slowmo 0.3, maintained, every 6, overlapped by 2, int8": ours(
        outer_momentum=0.3, inner_state="maintain", overlap_steps=2, compression="int8"
    ),
    "slowmo_hf local_sgd, slowmo 0.3, maintained, every 6, overlapped by 4, int8": ours(
        outer_momentum=0.3, inner_state="maintain", overlap_steps=4, compression="int8"
    ),
    "slowmo_hf local_sgd, double averaging": ours(outer_momentum=0.0, inner_state="average"),
    "slowmo_hf diloco": ours(
        outer_optimizer="torch.optim.SGD",
        outer_optimizer_kwargs='{"momentum": 0.9, "nesterov": true}',
        outer_lr=0.7,
        inner_state="maintain",
    ),
    "slowmo_hf sgp": ours(base="sgp", **GOSSIP_ALONE),
    "slowmo_hf sgp, slowmo": ours(base="sgp"),
    "slowmo_hf sgp, slowmo, no average": ours(base="sgp", exact_average=False),
    "slowmo_hf osgp": ours(base="osgp", **GOSSIP_ALONE),
    "slowmo_hf osgp, slowmo": ours(base="osgp"),
    "slowmo_hf dpsgd": ours(base="dpsgd", **GOSSIP_ALONE),
    "slowmo_hf dpsgd, slowmo": ours(base="dpsgd"),
}


def period(system: str, sync_every: int) -> int:
    """Steps per round of a system: what its name says, else `sync_every`."""
    said = re.search(r"every (\d+)", system)
    return int(said[1]) if said else sync_every


def package(system: str) -> str:
    """That a system comes from: its first word, and torch's DDP."""
    first = system.split()[0]
    return {"ddp": "torch"}.get(first, first)
