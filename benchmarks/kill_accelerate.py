"""
A custom loop under Accelerate that goes on by itself where a killed run of the same command stopped;
`benchmarks/kill.py` kills it.

    accelerate launch --config_file recipes/configs/cpu_two_processes.yaml benchmarks/kill_accelerate.py --output_dir
    outputs/killed

With `--shards 2` every two processes are one worker that shards the model (FSDP2; HSDP in Accelerate's words).

A small network on random images, with noise drawn at every step, BatchNorm, Nesterov momentum and a schedule: all that
a resume can lose.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedType,
    FullyShardedDataParallelPlugin,
    ParallelismConfig,
    set_seed,
)
from torch.utils.data import DataLoader, TensorDataset
from transformers import HfArgumentParser, PretrainedConfig, PreTrainedModel

from slowmo_hf import SlowMoConfig, SlowMoOptimizer, consensus, register_for_checkpointing, verify_checkpoint

ROWS, CLASSES = 64, 4


@dataclass
class LoopArguments:
    """How long, and what is kept."""

    output_dir: str = field(metadata={"help": "Checkpoints and the model go here."})
    steps: int = field(default=16, metadata={"help": "Optimizer steps."})
    save_steps: int = field(default=2, metadata={"help": "A checkpoint after every so many steps."})
    eval_steps: int = field(default=4, metadata={"help": "A test of the average after every so many steps."})
    save_total_limit: int = field(default=2, metadata={"help": "Checkpoints that are kept."})
    shards: int = field(default=1, metadata={"help": "Processes that a worker's model is sharded over; 1: none."})
    state_dict_type: str = field(
        default="FULL_STATE_DICT", metadata={"help": "What a sharded model is saved as; or SHARDED_STATE_DICT."}
    )


class SmallNet(PreTrainedModel):
    """A convolution, BatchNorm, a classifier."""

    config_class = PretrainedConfig

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        layers = (
            torch.nn.Conv2d(1, 4, 3),
            torch.nn.BatchNorm2d(4),
            torch.nn.ReLU(),
            torch.nn.Flatten(),
            torch.nn.Dropout(0.1),
        )
        self.layers = torch.nn.Sequential(*layers, torch.nn.Linear(144, CLASSES))
        self.post_init()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits, shape (images, 4)."""
        return self.layers(images)

    def get_input_embeddings(self) -> None:
        """None; accelerate asks where it shards."""

    def get_output_embeddings(self) -> None:
        """None."""


def let_cpu_shard() -> None:
    """
    accelerate shards on accelerators alone, and makes DDP of FSDP on CPUs without a word: gloo ranks have to call
    themselves what its launcher calls those of GPUs. Nothing else differs from a program for GPUs.
    """
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def replicas(shards: int) -> ParallelismConfig:
    """Workers of `shards` processes each."""
    return ParallelismConfig(dp_shard_size=shards, dp_replicate_size=int(os.environ["WORLD_SIZE"]) // shards)


def _sharding(args: LoopArguments) -> dict[str, Any]:
    """What makes an Accelerator shard: the classifier is a group of its own, the rest the root's."""
    let_cpu_shard()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Linear"],
        reshard_after_forward=True,
        state_dict_type=args.state_dict_type,
    )
    return {"fsdp_plugin": plugin, "parallelism_config": replicas(args.shards)}


class Training:
    """Everything that one process trains with."""

    def __init__(self, config: SlowMoConfig, args: LoopArguments) -> None:
        # An epoch's order depends on its number alone.
        order = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=42)
        self.args, self.step = args, 0
        self.accelerator = Accelerator(dataloader_config=order, **(_sharding(args) if args.shards > 1 else {}))
        set_seed(42)
        model = SmallNet(PretrainedConfig())
        rows = TensorDataset(torch.randn(ROWS, 1, 8, 8), torch.randint(CLASSES, (ROWS,)))
        optimizer = SlowMoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True), config)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps * self.accelerator.num_processes)
        # A generator of its own: every iterator draws a seed, from the global one by default, and a resume makes one
        # iterator more.
        loader = DataLoader(rows, batch_size=4, shuffle=True, generator=torch.Generator())
        self.model, self.optimizer, self.loader, self.scheduler = self.accelerator.prepare(
            model, optimizer, loader, scheduler
        )
        register_for_checkpointing(self.accelerator, self.optimizer)
        set_seed(42, device_specific=True)  # from here on every process draws its own noise

    def run(self) -> None:
        """To the end, from the newest whole checkpoint if there is one."""
        self.resume()
        while self.step < self.args.steps:
            epoch, done = divmod(self.step, len(self.loader))
            self.loader.set_epoch(epoch)
            for images, labels in self.accelerator.skip_first_batches(self.loader, done):
                self.train_on(images, labels)
                if self.step == self.args.steps:
                    break
        with consensus(self.optimizer):
            self.accelerator.save_model(self.model, self.args.output_dir)

    def train_on(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        """A step, and what is due after it."""
        self.model.train()
        loss = torch.nn.functional.cross_entropy(self.model(images + 0.1 * torch.randn_like(images)), labels)
        self.accelerator.backward(loss)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.step += 1
        if self.step % self.args.eval_steps == 0:
            self.evaluate(images)
        if self.step % self.args.save_steps == 0:
            self.save()

    @torch.no_grad()
    def evaluate(self, images: torch.Tensor) -> None:
        """The average's predictions, from all processes."""
        with consensus(self.optimizer):
            self.accelerator.unwrap_model(self.model).eval()
            self.accelerator.gather(self.accelerator.unwrap_model(self.model)(images))

    # ---- checkpoints ----

    def save(self) -> None:
        """Into a new folder; when it is whole the oldest go."""
        self.accelerator.save_state(str(self.folder / f"checkpoint-{self.step}"))
        if self.accelerator.is_main_process:
            for path in self.checkpoints()[: -self.args.save_total_limit]:
                shutil.rmtree(path)

    def resume(self) -> None:
        """From the newest whole checkpoint; what a killed run left half-written or half-deleted is removed."""
        if self.accelerator.is_main_process:
            for path in self.checkpoints():
                if not _is_whole(path):
                    shutil.rmtree(path)
        self.accelerator.wait_for_everyone()
        for path in self.checkpoints()[-1:]:
            self.accelerator.load_state(str(path))
            self.step = _step_of(path)

    @property
    def folder(self) -> Path:
        """Where checkpoints are."""
        return Path(self.args.output_dir)

    def checkpoints(self) -> list[Path]:
        """The oldest first."""
        return sorted(self.folder.glob("checkpoint-*"), key=_step_of)


def _is_whole(checkpoint: Path) -> bool:
    try:
        verify_checkpoint(checkpoint)
    except ValueError as error:
        print(error, flush=True)
        return False
    return True


def _step_of(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def main() -> None:
    """Parse and train."""
    config, args = HfArgumentParser((SlowMoConfig, LoopArguments)).parse_args_into_dataclasses()
    Training(config, args).run()


if __name__ == "__main__":
    main()
