"""
A Trainer program that shards its model (FSDP2) and goes on by itself where a killed run of the same command stopped;
`benchmarks/kill.py` kills it.

    torchrun --nproc_per_node 4 benchmarks/kill_trainer.py --output_dir outputs/killed --use_cpu true --max_steps 16

Every two processes are a worker. The network of `kill_accelerate.py`, with AdamW and a schedule.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import HfArgumentParser, PretrainedConfig, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from kill_accelerate import CLASSES, ROWS, SmallNet, let_cpu_shard, replicas
from slowmo_hf import SlowMoCallback, SlowMoConfig


@dataclass
class ShardedArguments(TrainingArguments):
    """TrainingArguments that shard."""

    shards: int = field(default=2, metadata={"help": "Processes that a worker's model is sharded over."})
    state_dict_type: str = field(
        default="FULL_STATE_DICT", metadata={"help": "What the model is saved as; or SHARDED_STATE_DICT."}
    )

    def __post_init__(self) -> None:
        self.fsdp, self.parallelism_config = True, replicas(self.shards)
        self.fsdp_config = {
            "version": 2,
            "transformer_layer_cls_to_wrap": ["Linear"],
            "reshard_after_forward": True,
            "state_dict_type": self.state_dict_type,
        }
        super().__post_init__()


class Classifier(SmallNet):
    """With its loss, as Trainer wants it."""

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """The mean loss, and logits."""
        logits = super().forward(images)
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def main() -> None:
    """Parse, and train to the end, from the newest whole checkpoint if there is one."""
    config, args = HfArgumentParser((SlowMoConfig, ShardedArguments)).parse_args_into_dataclasses()
    let_cpu_shard()
    set_seed(args.seed)
    model = Classifier(PretrainedConfig())
    rows = [{"images": torch.randn(1, 8, 8), "labels": torch.randint(CLASSES, ())} for _ in range(ROWS)]
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=rows,
        eval_dataset=rows[:32],
        callbacks=[SlowMoCallback(config)],
    )
    out = Path(args.output_dir)
    trainer.train(resume_from_checkpoint=out.is_dir() and get_last_checkpoint(str(out)) is not None)
    # What a sharded save leaves out: the model in one file.
    trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model()


if __name__ == "__main__":
    main()
