"""
One system's training on one host of `benchmarks/peers.py`: the same model, images, batches and seeds whatever the
system.

Every system is a function from (model, SGD, accelerator, settings) to a `Job`. First the computation alone and one
all-reduce alone are measured, then steps without a look, then training to a validation loss.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs
from safetensors.torch import load_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import HfArgumentParser, get_scheduler

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

import slowmo_hf
from image.pixels import normalised
from slowmo_hf import SlowMoConfig, SlowMoOptimizer


@dataclass
class Training:
    """What the driver takes and passes on."""

    sync_every: int = field(default=12, metadata={"help": "Steps per round, of all that have rounds."})
    timed_rounds: int = field(default=8, metadata={"help": "Rounds that are timed; the first is left out."})
    look_every: int = field(
        default=24, metadata={"help": "Steps between looks at the validation loss, a multiple of sync_every."}
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


def _backward(loss: torch.Tensor) -> None:
    loss.backward()


def _stepping(optimizer: torch.optim.Optimizer, then: Callable[[], Any] = lambda: None) -> Callable[[], None]:
    def step() -> None:
        optimizer.step()
        then()
        optimizer.zero_grad()

    return step


def ddp(model: nn.Module, sgd: torch.optim.Optimizer, accelerator: Accelerator, settings: Settings) -> Job:
    """
    torch's DistributedDataParallel, with a bucket per layer, so that gradients travel while earlier layers compute.
    """
    return Job(DistributedDataParallel(model, bucket_cap_mb=BUCKET_MB), _stepping(sgd), _backward)


def ddp_bf16(model: nn.Module, sgd: torch.optim.Optimizer, accelerator: Accelerator, settings: Settings) -> Job:
    """
    The same with torch's hook that sends gradients in bf16: behind another name, for DDP refuses it on gloo, which
    can.
    """
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

    wrapped = DistributedDataParallel(model, bucket_cap_mb=BUCKET_MB)
    wrapped.register_comm_hook(None, lambda state, bucket: bf16_compress_hook(state, bucket))
    return Job(wrapped, _stepping(sgd), _backward)


def ddp_powersgd(model: nn.Module, sgd: torch.optim.Optimizer, accelerator: Accelerator, settings: Settings) -> Job:
    """
    torch's PowerSGD of rank 1, error feedback and warm start on, as its page proposes. In one bucket: with several,
    its collectives start from callbacks of gloo's threads, in another order on each rank, and fail.
    """
    from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

    wrapped = DistributedDataParallel(model, bucket_cap_mb=25)
    wrapped.register_comm_hook(PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=2), powerSGD_hook)
    return Job(wrapped, _stepping(sgd), _backward)


def accelerate_local_sgd(
    model: nn.Module, sgd: torch.optim.Optimizer, accelerator: Accelerator, settings: Settings
) -> Job:
    """accelerate's LocalSGD."""
    from accelerate.local_sgd import LocalSGD

    prepared, optimizer = accelerator.prepare(model, sgd)
    local = LocalSGD(accelerator=accelerator, model=prepared, local_sgd_steps=settings.sync_every, enabled=True)
    return Job(prepared, _stepping(optimizer, local.step), accelerator.backward, around=local)


def torch_averager(model: nn.Module, sgd: torch.optim.Optimizer, accelerator: Accelerator, settings: Settings) -> Job:
    """
    torch's PeriodicModelAverager. Its rounds follow steps 1, 1 + period, ...: the first is left out, so that looks are
    at rounds.
    """
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager

    averager = PeriodicModelAverager(period=settings.sync_every, warmup_steps=settings.sync_every)
    averager.step = 1
    return Job(model, _stepping(sgd, lambda: averager.average_parameters(model.parameters())), _backward)


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
    return Job(wrapped, _stepping(sgd, lambda: wrapped.perform_slowmo(sgd)), _backward)


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
            _stepping(sgd),
            _backward,
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
            _stepping(optimizer),
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


# ---- the job ----


class Batches:
    """Images of the training split, the same for every system: worker, step and seed say which."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.tensors = settings, load_file(settings.images)
        self.test_images, self.test_labels = _pixels(self.tensors["test_images"]), self.tensors["test_labels"]

    def __call__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = self.tensors["train_images"], self.tensors["train_labels"]
        generator = torch.Generator().manual_seed(1_000_003 * self.settings.seed + 1009 * step + dist.get_rank())
        rows = torch.randint(len(labels), (self.settings.batch_size,), generator=generator)
        return _pixels(images[rows]), labels[rows]


def _pixels(images: torch.Tensor) -> torch.Tensor:
    return normalised(images, 0.286, 0.353).flatten(1)  # Fashion-MNIST's


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, device: Device) -> torch.Tensor:
        ctx.device = device
        device.launch(device.layer_seconds)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        ctx.device.wait(2 * ctx.device.layer_seconds)
        return grads[0], None


class Device(nn.Module):
    """
    An accelerator's time, as its host sees it; put one behind every layer. Within a step the host runs ahead, and the
    device is never idle: forward the layers queue up, backward the host waits until a layer's gradients are there
    (twice a layer's forward), as a hook of DDP would. Meanwhile the cores are free for the network: four hosts that
    compute on two cores would measure the cores.

    Args:
        layer_seconds (`float`): Of a layer, forward.
    """

    def __init__(self, layer_seconds: float) -> None:
        super().__init__()
        self.layer_seconds = layer_seconds
        self._busy_until = 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x itself."""
        return _Layer.apply(x, self) if torch.is_grad_enabled() else x

    def start_step(self) -> None:
        """The host has waited for all that came before."""
        self._busy_until = max(self._busy_until, time.perf_counter())

    def launch(self, seconds: float) -> None:
        """Queue work."""
        self._busy_until += seconds

    def wait(self, seconds: float) -> None:
        """Queue work, and wait for it."""
        self.launch(seconds)
        time.sleep(max(0.0, self._busy_until - time.perf_counter()))


def make_model(settings: Settings) -> nn.Module:
    """Layers of one width, the device behind each; the same weights everywhere."""
    torch.manual_seed(settings.seed)
    widths = [784, *[settings.width] * settings.layers]
    device = Device(settings.device_ms / 1000 / 3 / settings.layers)
    layers = [[nn.Linear(before, after), nn.ReLU(), device] for before, after in pairwise(widths)]
    model = nn.Sequential(*[module for layer in layers for module in layer], nn.Linear(settings.width, 10))
    for linear in (module for module in model if isinstance(module, nn.Linear)):
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        nn.init.zeros_(linear.bias)
    model.register_forward_pre_hook(lambda module, inputs: device.start_step())
    return model


def train(job: Job, batches: Batches, first: int, steps: int, after_step: Callable[[], Any] = lambda: None) -> None:
    """Steps without a look."""
    for step in range(first, first + steps):
        images, labels = batches(step)
        job.backward(nn.functional.cross_entropy(job.called(images), labels))
        job.after_backward()
        after_step()


def timed(act: Callable[[], Any], times: int) -> float:
    """Median seconds, all hosts together, the first left out."""
    seconds = []
    for _ in range(times + 1):
        dist.barrier()
        start = time.perf_counter()
        act()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def make_job(settings: Settings, accelerator: Accelerator) -> tuple[Job, nn.Module, torch.optim.Optimizer]:
    """A fresh model under the system, and its SGD."""
    settings = replace(settings, sync_every=period(settings.system, settings.sync_every))
    model = make_model(settings)
    sgd = torch.optim.SGD(model.parameters(), lr=settings.learning_rate, momentum=0.9, nesterov=True)
    return SYSTEMS[settings.system](model, sgd, accelerator, settings), model, sgd


def main() -> None:
    """Measure, train, and write down what rank 0 saw."""
    (settings,) = HfArgumentParser(Settings).parse_args_into_dataclasses()
    torch.set_num_threads(1)
    buckets: Any = DistributedDataParallelKwargs(bucket_cap_mb=BUCKET_MB)  # typed int
    accelerator = Accelerator(cpu=True, kwargs_handlers=[buckets])
    batches = Batches(settings)
    alone = make_model(settings)
    plain = Job(alone, _stepping(torch.optim.SGD(alone.parameters(), lr=0.01, momentum=0.9, nesterov=True)), _backward)
    parameters = sum(p.numel() for p in alone.parameters())
    flat = torch.zeros(parameters)
    figures: dict[str, Any] = {
        "version": importlib.metadata.version(package(settings.system)),
        "parameters": parameters,
    }
    figures["compute_seconds_per_step"] = (
        timed(lambda: train(plain, batches, 0, settings.sync_every), 5) / settings.sync_every
    )
    figures["allreduce_seconds"] = timed(lambda: dist.all_reduce(flat), 5)
    figures |= _time_steps(settings, accelerator, batches, figures["allreduce_seconds"])
    steps = settings.steps or _steps_in(settings, statistics.median(figures["round_seconds_per_step"]))
    if steps:
        figures |= _train_to_the_end(settings, steps, accelerator, batches)
    if dist.get_rank() == 0 and settings.output:
        Path(settings.output).write_text(json.dumps(figures))
    dist.barrier()


def _time_steps(
    settings: Settings, accelerator: Accelerator, batches: Batches, allreduce_seconds: float
) -> dict[str, Any]:
    """Rounds one after the other, nothing between them; the first is left out, and so are its bytes."""
    job, _, _ = make_job(settings, accelerator)
    seconds = []
    with job.around:
        train(job, batches, 0, settings.sync_every)  # the first is left out: a system sets itself up there
        time.sleep(1 + 2 * allreduce_seconds)  # its messages have gone
        dist.barrier()
        sent = _bytes_sent()
        for number in range(1, settings.timed_rounds + 1):
            start = time.perf_counter()
            train(job, batches, number * settings.sync_every, settings.sync_every)
            seconds.append((time.perf_counter() - start) / settings.sync_every)
        time.sleep(1 + 2 * allreduce_seconds)  # what is under way arrives
        sent = _bytes_sent() - sent
        with job.look():  # nothing is under way where the next job begins
            pass
    return {
        "round_seconds_per_step": seconds,
        "interface_bytes_per_step": sent / (settings.timed_rounds * settings.sync_every),
    }


def _bytes_sent() -> int:
    """What this host's interface has sent; 0 where there is none of ours."""
    counter = Path("/sys/class/net/eth0/statistics/tx_bytes")
    return int(counter.read_text()) if counter.exists() else 0


def _steps_in(settings: Settings, seconds_per_step: float) -> int:
    """Whole looks that fit into `settings.seconds`, at least one; the same on all hosts."""
    looks = torch.tensor(settings.seconds / (seconds_per_step * settings.look_every))
    dist.broadcast(looks, src=0)
    return max(1, int(looks)) * settings.look_every if settings.seconds else 0


def look_steps(steps: int, look_every: int, look_after: int) -> list[int]:
    """At how many steps looks are taken: `look_after` steps behind every multiple of `look_every`, and at the end."""
    return [*range(look_every + look_after, steps, look_every), steps]


def _train_to_the_end(settings: Settings, steps: int, accelerator: Accelerator, batches: Batches) -> dict[str, Any]:
    """
    Validation loss of the average over the seconds of training. What sets a system up does not count: DDP's
    constructor and torchft's first quorum send before there is a clock, slowmo_hf compares all ranks at the first
    call. A look on the way does not count, and takes a copy alone: the losses are computed at the end, so that no link
    stands idle while they are. The last one counts: training ends with the average.
    """
    job, model, sgd = make_job(settings, accelerator)
    scheduler = get_scheduler(settings.lr_scheduler_type, sgd, num_warmup_steps=0, num_training_steps=steps)
    looks: list[tuple[int, float, dict[str, torch.Tensor]]] = []
    done, clock = 0, 0.0
    with job.around:
        with torch.no_grad():
            job.called(batches(0)[0])
        for step in look_steps(steps, settings.look_every, job.look_after):
            dist.barrier()
            start = time.perf_counter()
            train(job, batches, done, step - done, scheduler.step)
            seconds = time.perf_counter() - start
            with job.look():
                seconds = time.perf_counter() - start if step == steps else seconds
                done, clock = step, clock + seconds
                if dist.get_rank() == 0:
                    looks.append((step, clock, {name: p.detach().clone() for name, p in model.named_parameters()}))
    curve = [
        {"step": step, "seconds": seconds, "validation_loss": _loss(model, values, batches)}
        for step, seconds, values in looks
    ]
    return {"curve": curve, "final_validation_loss": curve[-1]["validation_loss"] if curve else None}


@torch.no_grad()
def _loss(model: nn.Module, values: dict[str, torch.Tensor], batches: Batches) -> float:
    return float(
        nn.functional.cross_entropy(
            torch.func.functional_call(model, values, (batches.test_images,)), batches.test_labels
        )
    )


if __name__ == "__main__":
    main()
