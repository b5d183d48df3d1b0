"""
Supervised fine-tuning with TRL and LoRA on two workers: the adapters alone are averaged and sent.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 examples/sft_lora.py

Without flags it makes a small Llama of random weights and a tokenizer: a demonstration, of which no translations come.
`--model_name Qwen/Qwen3-0.6B --dataset_name trl-lib/Capybara` takes the Hub's. Every field of `SFTConfig` is a flag.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import load_dataset
from peft import LoraConfig
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from transformers import GPT2TokenizerFast, HfArgumentParser, LlamaConfig, LlamaForCausalLM, set_seed
from trl import SFTConfig, SFTTrainer

from slowmo_hf import SlowMoCallback, SlowMoConfig


@dataclass
class Arguments:
    model_name: str | None = None
    dataset_name: str | None = None


def as_prompt(row):
    """A prompt and its completion: one of the forms that TRL takes."""
    english, german = row["translation"]["en"], row["translation"]["de"]
    return {"prompt": f"English: {english}\nGerman:", "completion": f" {german}"}


def small_model(folder, data):
    """A folder like a model's on the Hub: random weights, and a tokenizer of the data."""
    set_seed(0)
    empty = GPT2TokenizerFast(tokenizer_object=Tokenizer.from_str(ByteLevelBPETokenizer().to_str()), pad_token="<pad>")
    tokenizer = empty.train_new_from_iterator(data["completion"], vocab_size=1000, show_progress=False)
    tokenizer.save_pretrained(folder)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.2, **ends, **size)
    LlamaForCausalLM(config).save_pretrained(folder)


parser = HfArgumentParser((Arguments, SlowMoConfig, SFTConfig))
parser.set_defaults(
    sync_every=4,  # adapters are small: they may be averaged often
    output_dir="outputs/sft_lora",
    max_steps=80,
    learning_rate=2e-2,
    per_device_train_batch_size=4,
    max_length=64,
    logging_steps=20,  # a multiple of sync_every: the log then waits for nobody
    save_strategy="no",
    report_to="none",
    use_cpu=not torch.cuda.is_available(),
    bf16=torch.cuda.is_available(),
)
arguments, config, training_args = parser.parse_args_into_dataclasses()
data = load_dataset(arguments.dataset_name or f"{Path(__file__).parents[1]}/recipes/data/en_de_help", split="train")
if not arguments.dataset_name:
    data = data.select(range(2000)).map(as_prompt, remove_columns="translation")
model_name = arguments.model_name or f"{training_args.output_dir}/small_model"
with training_args.main_process_first():
    if not arguments.model_name and training_args.local_process_index == 0:
        small_model(model_name, data)
set_seed(training_args.seed)  # the same first adapters on all ranks
trainer = SFTTrainer(
    model=model_name,
    args=training_args,
    train_dataset=data,
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    callbacks=[SlowMoCallback(config)],
)
trainer.train()
trainer.save_model()  # the average of the workers' adapters
