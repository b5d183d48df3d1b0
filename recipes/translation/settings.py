"""The flags of `train.py` beside `SlowMoConfig`'s, and the presets that change their defaults."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import Seq2SeqTrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from records import SettingError, divide_warm_up
from translation.data import NEWSTESTS
from translation.model import MODEL_SIZES
from translation.tokens import POSITIONS

# Ott et al. (2018), as fairseq publishes it: 8 GPUs with 16 micro-batches each, as 128 GPUs. The number of epochs is
# the SlowMo paper's.
_OTT: dict[str, Any] = {
    "dataset_name": "wmt/wmt16",
    # Also where --dataset_name is a copy on disk, whose own test set is another; of English-German alone.
    "validation_set": "newstest2013",
    "test_set": "newstest2014",
    "model_size": "big",
    "vocab_size": 32_000,
    "max_length": 256,
    "max_tokens": 3584,
    "gradient_accumulation_steps": 16,
    "base": "all_reduce",
    "outer_momentum": 0.0,
    "learning_rate": 1e-3,
    "warmup_steps": 4000,
    "num_train_epochs": 25,
    "logging_steps": 48,  # a multiple of 12; a pass of 667 updates has 13 entries, whose mean is its training loss
    "save_strategy": "epoch",
    "save_total_limit": 6,  # five for the mean, and the best
    "average_checkpoints": 5,
    "dataloader_num_workers": 2,
}
# The paper: 200,000 tokens per step on 8 machines of 8 GPUs, 25 epochs. fairseq counts target tokens without padding,
# and its batches are those of Ott et al.: 64 of at most 3,584 positions, 229,376 in all. The paper leaves the rest to
# Ott et al.; its learning rate, and beta, which it tuned per row, are not known here: these are of small batches, and
# 0.5, fairscale's at 8 nodes. Its rows differ in --base and --outer_momentum only.
_PAPER = {
    "gradient_accumulation_steps": 1,
    "base": "local_sgd",
    "outer_momentum": 0.5,
    "learning_rate": 5e-4,
}
PRESETS: dict[str, dict[str, Any]] = {"ott": _OTT, "wmt16": {**_OTT, **_PAPER}}


@dataclass
class ScriptArguments:
    """What is learned and how it is judged."""

    preset: str | None = field(
        default=None,
        metadata={"choices": list(PRESETS), "help": "Settings of a published run; other flags beside it win."},
    )
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Name on the Hub, or a folder: what DatasetDict.save_to_disk wrote, or train*, validation* and "
            "test* as .parquet or .jsonl, or text files such as train.en and train.de. The shipped help text "
            "by default."
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration on the Hub; for wmt/* that of the languages."}
    )
    source_lang: str = field(default="en", metadata={"help": "Language to translate from."})
    target_lang: str = field(default="de", metadata={"help": "Language to translate to."})
    translation_column: str = field(default="translation", metadata={"help": "Column of {language: sentence}."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    validation_set: str | None = field(
        default=None,
        metadata={"help": f"A split, or one of {', '.join(NEWSTESTS)}; newstest2013 for wmt/*, else validation."},
    )
    test_set: str | None = field(
        default=None, metadata={"help": "As --validation_set; newstest2014 for wmt/*, else test."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first pairs, for a dry run."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "The same for validation and test."})
    vocab_size: int = field(default=4000, metadata={"help": "Tokens of the joint BPE."})
    tokenizer_dir: str | None = field(
        default=None,
        metadata={"help": "Folder to keep tokenizers in, for several runs; <output_dir>/tokenizers by default."},
    )
    max_length: int = field(
        default=128, metadata={"help": "Training pairs with a longer side, in tokens, are left out."}
    )
    max_tokens: int = field(
        default=1024,
        metadata={"help": "Tokens per process and micro-batch: rows times the longest side, padding included."},
    )
    model_size: str = field(
        default="tiny", metadata={"choices": list(MODEL_SIZES), "help": "As in Vaswani et al., or a smaller one."}
    )
    dropout: float | None = field(default=None, metadata={"help": "Another than the size's own: 0.1, or 0.3 for big."})
    average_checkpoints: int = field(
        default=1,
        metadata={
            "help": "Save, and translate with, the mean of this many last checkpoints; 1: the end of training. Best, "
            "last and mean of five are scored too, as far as they were saved."
        },
    )
    num_beams: int = field(default=4, metadata={"help": "Beams at the end; --generation_num_beams while training."})
    length_penalty: float = field(
        default=0.6, metadata={"help": "Exponent of the length that a beam's log-probability is divided by."}
    )
    plot: bool = field(default=False, metadata={"help": "Write a PNG of loss, BLEU, drift, utilisation, bytes."})

    def __post_init__(self) -> None:
        if self.preset and {self.source_lang, self.target_lang} != {"en", "de"}:
            for name in ("validation_set", "test_set"):  # the preset's are of English and German
                if getattr(self, name) == PRESETS[self.preset][name]:
                    setattr(self, name, None)
        for name, least, unit in (
            ("vocab_size", 258, "tokens: 256 bytes, padding and end"),
            ("max_length", 2, "tokens"),
            ("average_checkpoints", 1, "checkpoint"),
            ("num_beams", 1, "beam"),
        ):
            if getattr(self, name) < least:
                raise SettingError(f"{name} must be >= {least} {unit}, got {getattr(self, name)}. Set --{name}.")
        if not self.max_length <= min(self.max_tokens, POSITIONS):
            raise SettingError(
                f"max_length must be <= max_tokens and <= {POSITIONS} tokens, the model's positions, got "
                f"{self.max_length} with max_tokens={self.max_tokens}. Set --max_length or --max_tokens."
            )
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise SettingError(f"dropout must be in [0, 1), got {self.dropout}. Set --dropout.")


# Of these, what a model was trained by; a run that goes on has them as they were (`one_run.py`).
TRAINED_BY = (
    *("dataset_name", "dataset_config", "source_lang", "target_lang", "translation_column", "train_split"),
    *("max_train_samples", "vocab_size", "max_length", "max_tokens", "model_size", "dropout"),
)


@dataclass
class RecipeTrainingArguments(Seq2SeqTrainingArguments):
    """Seq2SeqTrainingArguments with this recipe's defaults."""

    output_dir: str | None = field(
        default="outputs/translation", metadata={"help": "Model, record, translations and plot go here."}
    )
    num_train_epochs: float = field(default=5, metadata={"help": "Passes over the data."})
    per_device_eval_batch_size: int = field(
        default=100, metadata={"help": "Sentences per process, in validation and test."}
    )
    learning_rate: float = field(default=2e-3, metadata={"help": "Peak inner learning rate, at the end of warm-up."})
    optim: str = field(
        default="adamw_torch", metadata={"help": "Inner optimizer; without weight decay AdamW is Adam."}
    )
    adam_beta2: float = field(default=0.98, metadata={"help": "As in Vaswani et al.; beta1 is 0.9."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "0: gradients are not clipped."})
    lr_scheduler_type: str = field(default="inverse_sqrt", metadata={"help": "Linear warm-up, then 1/sqrt(step)."})
    warmup_steps: float = field(default=600, metadata={"help": "Warm-up: steps, or a fraction of all steps."})
    label_smoothing_factor: float = field(
        default=0.1, metadata={"help": "Share of the target that is spread over all tokens."}
    )
    logging_steps: float = field(
        default=60, metadata={"help": "A multiple of sync_every, so that logging waits for nobody."}
    )
    eval_strategy: str = field(default="epoch", metadata={"help": "When to validate the average."})
    save_strategy: str = field(default="no", metadata={"help": "When to save a checkpoint."})
    report_to: str = field(default="none", metadata={"help": "tensorboard, wandb, ..."})
    use_cpu: bool = field(
        default=not torch.cuda.is_available(), metadata={"help": "On by default where there is no GPU."}
    )
    generation_num_beams: int | None = field(
        default=1, metadata={"help": "Beams of the validations while training; 1 is greedy."}
    )
    predict_with_generate: bool = field(default=True, metadata={"help": "Always on: this is where BLEU comes from."})
    metric_for_best_model: str | None = field(
        default="nll",
        metadata={"help": "What the best checkpoint, which is kept, has the least of; or bleu, the most of."},
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "The texts are the references."})
    dataloader_pin_memory: bool = field(
        default=torch.cuda.is_available(), metadata={"help": "Page-locked batches, for GPUs."}
    )

    def __post_init__(self) -> None:
        # Trainer takes all but what ends with "loss" for the better the greater.
        if self.greater_is_better is None and (self.metric_for_best_model or "").endswith(("nll", "nll_bits")):
            self.greater_is_better = False
        divide_warm_up(self)
        super().__post_init__()


# Of TrainingArguments, and without effect here: said, not ignored.
_UNUSED = {
    "per_device_train_batch_size": "batches are counted in tokens: set --max_tokens",
    "auto_find_batch_size": "batches are counted in tokens: set --max_tokens",
    "train_sampling_strategy": "batches are counted in tokens, and hold sentences of like length already",
    "dataloader_drop_last": "batches are counted in tokens, and all ranks have equally many",
    "generation_max_length": "a translation ends 50 tokens after the length of its batch's longest source",
    "predict_with_generate": "validation translates; for less of it set --eval_strategy or --max_eval_samples",
    "prediction_loss_only": "validation translates; for less of it set --eval_strategy or --max_eval_samples",
}


def check_flags(script: ScriptArguments, args: RecipeTrainingArguments) -> None:
    """No flag is ignored in silence, and what is to be averaged must be there at the end."""
    for name, why in _UNUSED.items():
        if hasattr(type(args), name) and getattr(args, name) != getattr(type(args), name):
            raise SettingError(f"{name} has no effect here, got {getattr(args, name)!r}: {why}. Leave --{name} out.")
    if script.average_checkpoints == 1:
        return
    # Trainer keeps the best one among them, however old it is: the mean would be of it and of one late one less.
    keeps_best = args.metric_for_best_model is not None and args.eval_strategy != "no"
    least = script.average_checkpoints + keeps_best
    kept = args.save_total_limit or least
    if args.save_strategy == "no" or kept < least or args.load_best_model_at_end:
        raise SettingError(
            f"average_checkpoints={script.average_checkpoints} needs as many at the end, and the best beside them, "
            f"got save_strategy={args.save_strategy.value}, save_total_limit={args.save_total_limit}, "
            f"load_best_model_at_end={args.load_best_model_at_end}. Set --save_strategy epoch, leave "
            f"--load_best_model_at_end out, and --save_total_limit too or set it to {least} or more."
        )
    found = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
    if found and (args.resume_from_checkpoint or "false").lower() == "false":
        raise SettingError(
            f"output_dir must hold no other run's checkpoints with average_checkpoints={script.average_checkpoints}, "
            f"got {found!r}. Set --output_dir, or go on from there with --resume_from_checkpoint true."
        )
