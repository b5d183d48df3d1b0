"""Sharded models on gloo: stock Accelerate and Trainer with FSDP2 on CPU, and a model with all that is awkward."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from packaging.version import Version
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import Dataset

from tiny import arguments

WORDS, WIDTH = 5, 4

NEEDED = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.7"),
    reason="FSDP2 runs on CPU from torch 2.7 on: torch.cpu.Stream has no record_event before",
)


class Block(nn.Module):
    """Three rows over two shards are uneven; the bias of one element leaves a shard empty."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 3)
        self.gate = nn.Linear(3, 1)
        self.down = nn.Linear(3, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.up(x))
        return x + self.down(hidden * self.gate(hidden))


class Awkward(nn.Module):
    """
    Uneven and empty shards, a tied embedding (5 rows), a bias of one element, a parameter of the root's own, and a
    buffer that every rank moves its own way. `loss` is a mean over rows, so that means over ranks are means over rows.
    """

    _no_split_modules = ("Block",)

    def __init__(self, dtype: torch.dtype = torch.float64, blocks: int = 2) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.shift = nn.Parameter(torch.full((1,), 0.1))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("level", torch.zeros(WIDTH))
        self.to(dtype)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.embed(x)
        for block in self.blocks:
            hidden = block(hidden)
        if self.training:
            with torch.no_grad():
                self.level.mul_(0.5).add_(hidden.detach().mean(dim=0), alpha=0.5)
        logits = self.head(self.norm(hidden) + self.shift)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Tokens(Dataset):
    """Rows for `Awkward`, the same on every rank."""

    def __init__(self, rows: int = 64, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randint(0, WORDS, (rows,), generator=generator)
        self.labels = (self.x * 2 + torch.randint(0, 2, (rows,), generator=generator)) % WORDS

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": self.x[index], "labels": self.labels[index]}

    def batch(self, first: int, rows: int = 4) -> dict[str, torch.Tensor]:
        return {"x": self.x[first : first + rows], "labels": self.labels[first : first + rows]}


def let_cpu_shard() -> None:
    """accelerate's `state.py` shards on GPUs alone; call it before each `Accelerator(...)`."""
    from accelerate import PartialState
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    AcceleratorState._reset_state()  # of an Accelerator that this process has had
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def plugin(**settings: Any) -> Any:
    """FSDP version 2 that gives each block a group of its own."""
    from accelerate.utils import FullyShardedDataParallelPlugin

    defaults = {
        "fsdp_version": 2,
        "auto_wrap_policy": "transformer_based_wrap",
        "transformer_cls_names_to_wrap": ["Block"],
        "reshard_after_forward": True,
    }
    return FullyShardedDataParallelPlugin(**{**defaults, **settings})


@functools.cache  # each would make its groups anew, whose threads stay
def parallelism(shards: int, replicas: int) -> Any:
    """Accelerate's words for `shards` processes of a machine and `replicas` machines."""
    from accelerate import ParallelismConfig

    return ParallelismConfig(dp_shard_size=shards, dp_replicate_size=replicas)


class Prepared(NamedTuple):
    """What `accelerator.prepare` has given back."""

    accelerator: Any
    model: nn.Module
    optimizer: Any
    loader: Any

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.model(**batch)["loss"]


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def prepared(
    shards: int,
    replicas: int,
    *,
    make: Callable[[Any], torch.optim.Optimizer] = sgd,
    model: nn.Module | None = None,
    accumulation: int = 1,
    rows: int = 64,
    **settings: Any,
) -> Prepared:
    """
    A stock Accelerate program with FSDP2 (`replicas=1`) or HSDP, up to and with `prepare`.

    Args:
        make (`Callable`): The optimizer, of the model's parameters: `lambda p: SlowMoOptimizer(sgd(p), config)`.
        model (`nn.Module`, *optional*): `Awkward()` where it is None.
        accumulation (`int`): Micro-batches per step.
        rows (`int`): Of the loader, four to a batch and rank, not shuffled.
        settings: Of `plugin`.
    """
    from accelerate import Accelerator

    let_cpu_shard()
    accelerator = Accelerator(
        fsdp_plugin=plugin(**settings),
        parallelism_config=parallelism(shards, replicas),
        gradient_accumulation_steps=accumulation,
    )
    bare = Awkward() if model is None else model
    loader = torch.utils.data.DataLoader(Tokens(rows), batch_size=4)
    return Prepared(accelerator, *accelerator.prepare(bare, make(bare.parameters()), loader))


def fsdp_trainer(
    folder: str | Path,
    shards: int,
    replicas: int,
    *,
    callbacks: Any = (),
    model: nn.Module | None = None,
    kind: type | None = None,
    fsdp: dict[str, Any] | None = None,
    rows: int = 64,
    data: Dataset | None = None,
    others: dict[str, Any] | None = None,
    **settings: Any,
) -> Any:
    """
    A stock Trainer with FSDP2 (`replicas=1`) or HSDP, on `Tokens`.

    Args:
        callbacks (`list`): Its callbacks.
        model (`nn.Module`, *optional*): `Awkward()` where it is None.
        kind (`type`, *optional*): Another class than `Trainer`.
        fsdp (`dict`, *optional*): More of `TrainingArguments.fsdp_config`.
        data (`Dataset`, *optional*): To train on; `Tokens(rows)` where it is None.
        others (`dict`, *optional*): More arguments of the Trainer.
        settings: Of `TrainingArguments`.
    """
    from accelerate import PartialState
    from accelerate.utils import DistributedType
    from transformers import Trainer

    config = {"version": 2, "transformer_layer_cls_to_wrap": ["Block"], **(fsdp or {})}
    args = arguments(
        folder,
        fsdp=True,
        fsdp_config=config,
        parallelism_config=parallelism(shards, replicas),
        **{"max_steps": 4, "learning_rate": 0.05, **settings},
    )
    assert args.device.type == "cpu"  # asking makes the state
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return (kind or Trainer)(
        model=Awkward() if model is None else model,
        args=args,
        train_dataset=Tokens(rows) if data is None else data,
        callbacks=list(callbacks),
        **(others or {}),
    )


def by_hand(model: nn.Module, mesh: Any, **settings: Any) -> nn.Module:
    """`fully_shard` over a mesh of one's own: blocks, the tied ends together, the root."""
    from torch.distributed.fsdp import fully_shard

    for block in model.blocks:
        fully_shard(block, mesh=mesh, **settings)
    fully_shard([model.norm, model.embed, model.head], mesh=mesh, **{**settings, "reshard_after_forward": False})
    return fully_shard(model, mesh=mesh, **settings)


@functools.cache
def hsdp_mesh(shards: int, replicas: int) -> Any:
    """A 2-D mesh with names, as HSDP wants it."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (replicas, shards), mesh_dim_names=("replicate", "shard"))


def machine_mesh(shards: int) -> Any:
    """The 1-D mesh of this process's own machine, of `shards` neighbouring ranks. Collective."""
    from torch.distributed.device_mesh import DeviceMesh

    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    groups = [torch.distributed.new_group(list(range(i, i + shards))) for i in range(0, world, shards)]
    return DeviceMesh.from_group(groups[rank // shards], "cpu")


def small_llama(folder: str | Path, dtype: torch.dtype = torch.float64, *, tied: bool = True) -> str:
    """Weights of a Llama of 3 k parameters in a folder, for `sharded_at_load`; call it on one process."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=15,
        hidden_size=8,
        intermediate_size=11,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
        tie_word_embeddings=tied,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    return str(folder)


SHARDS_AT_LOAD = Version(version("transformers")) >= Version("5.23")  # over replicas


def sharded_at_load(folder: str, shards: int, replicas: int, dtype: torch.dtype = torch.float64) -> Any:
    """transformers' own FSDP2: `from_pretrained(distributed_config=...)`, which CPUs may do as they are."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    config = DistributedConfig(fsdp_size=shards, dp_replicate_size=replicas)
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=config, dtype=dtype)


def texts(rows: int = 64) -> list[dict[str, torch.Tensor]]:
    """Rows for `small_llama`."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 15, (rows, 6), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


def full_values(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all parameters and buffers, by name, gathered. Collective inside a worker."""
    found = {}
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        whole = value.detach().full_tensor() if hasattr(value, "full_tensor") else value.detach()
        found[name] = whole.clone()
    return found


def local_values(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of what this process holds of all parameters and buffers, by name. Nothing is sent."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {
        name: (value.to_local() if hasattr(value, "to_local") else value).detach().clone() for name, value in tensors
    }


def full_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """The gradients, by name, gathered. Collective inside a worker."""
    return {
        name: (p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad).clone()
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def whole_gradients(batches: list[dict[str, torch.Tensor]], model: nn.Module | None = None) -> dict[str, torch.Tensor]:
    """One process's gradients of the mean loss over these batches: what a worker's must be."""
    whole = Awkward() if model is None else model
    for batch in batches:
        (whole(**batch)["loss"] / len(batches)).backward()
    return {name: p.grad.clone() for name, p in whole.named_parameters() if p.grad is not None}


def norm_of(gradients: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))


class Coupled(TorchDispatchMode):
    """Counts collectives on every route, c10d's and the functional ones: all, and those that two workers are in."""

    def __init__(self, shards: int = 2) -> None:
        super().__init__()
        self.shards, self.all, self.between = shards, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        from torch.distributed.tensor import DTensor

        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # what it does to local tensors comes here
        if func.namespace in ("c10d", "_c10d_functional", "_c10d_functional_autograd"):
            groups = [group for arg in (*args, *(kwargs or {}).values()) if (group := _group(arg)) is not None]
            ranks = {rank for group in groups for rank in dist.get_process_group_ranks(group)}
            self.all += bool(groups)
            self.between += len({rank // self.shards for rank in ranks}) > 1
        return func(*args, **(kwargs or {}))


def _group(arg: Any) -> Any:
    if isinstance(arg, str):
        try:
            return dist.distributed_c10d._resolve_process_group(arg)
        except (RuntimeError, ValueError):
            return None  # the name of a reduction
    if isinstance(arg, torch.ScriptObject):
        try:
            return dist.ProcessGroup.unbox(arg)
        except (RuntimeError, ValueError):
            return None  # how to reduce
    return None
