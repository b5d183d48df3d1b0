"""
A causal language model, trained by Trainer on two workers that average their weights every 12 steps.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 examples/trainer_lm.py

Without flags a small Llama of random weights learns the bytes of the shipped help text. `--model_name Qwen/Qwen3-0.6B`
trains a model of the Hub or of a folder, `--dataset_name` takes a data set with a column "text". Every field of
`SlowMoConfig` and of `TrainingArguments` is a flag.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    HfArgumentParser,
    LlamaConfig,
    Trainer,
    TrainingArguments,
    set_seed,
)

from slowmo_hf import SlowMoCallback, SlowMoConfig

HELP_TEXT = Path(__file__).parents[1] / "recipes" / "data" / "en_de_help"
BLOCK = 64  # tokens per row


@dataclass
class Arguments:
    model_name: str | None = None
    dataset_name: str | None = None


parser = HfArgumentParser((Arguments, SlowMoConfig, TrainingArguments))
parser.set_defaults(
    output_dir="outputs/trainer_lm",
    max_steps=240,
    learning_rate=5e-3,
    per_device_train_batch_size=8,
    logging_steps=48,  # a multiple of sync_every: the log then waits for nobody
    save_strategy="no",
    report_to="none",
    use_cpu=not torch.cuda.is_available(),
)
arguments, config, training_args = parser.parse_args_into_dataclasses()
set_seed(training_args.seed)

if arguments.model_name:
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_name)
    model = AutoModelForCausalLM.from_pretrained(arguments.model_name)
else:
    tokenizer = ByT5Tokenizer()  # a token per byte
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=len(tokenizer), **ends, **size))

data = load_dataset(arguments.dataset_name or str(HELP_TEXT), split="train")
if not arguments.dataset_name:
    data = data.select(range(5000)).map(lambda row: {"text": row["translation"]["en"]})


def cut(rows):
    tokens = tokenizer("\n".join(rows["text"]), add_special_tokens=False)["input_ids"]
    blocks = [tokens[i : i + BLOCK] for i in range(0, len(tokens) - BLOCK + 1, BLOCK)]
    return {"input_ids": blocks, "labels": blocks}


data = data.map(cut, batched=True, remove_columns=data.column_names).train_test_split(test_size=256, seed=0)
sets = {"train_dataset": data["train"], "eval_dataset": data["test"], "processing_class": tokenizer}
trainer = Trainer(model, training_args, **sets, callbacks=[SlowMoCallback(config)])
trainer.train()
trainer.log_metrics("eval", trainer.evaluate())  # the average of all workers, as is what is saved
trainer.save_model()
