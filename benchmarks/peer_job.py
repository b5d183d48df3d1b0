"""
One system's training on one host of `benchmarks/peers.py`: the same model, images, batches and seeds whatever the
system.

First the computation alone and one all-reduce alone are measured, then steps without a look, then training to a
validation loss.
"""

from __future__ import annotations

import importlib.metadata
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs
from safetensors.torch import load_file
from torch import nn
from transformers import HfArgumentParser, get_scheduler

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

from image.pixels import normalised
from peer_systems import BUCKET_MB, SYSTEMS, Job, Settings, backward, package, period, stepping


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
    plain = Job(alone, stepping(torch.optim.SGD(alone.parameters(), lr=0.01, momentum=0.9, nesterov=True)), backward)
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
