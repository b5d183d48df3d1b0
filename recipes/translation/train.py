"""
Translation by workers that meet every few steps: a `Seq2SeqTrainer` with batches of tokens, and one `SlowMoCallback`.

    accelerate launch --config_file recipes/configs/cpu_two_processes.yaml recipes/translation/train.py

With no flags: two processes, the shipped English-German help text, a tiny Transformer, slow momentum on. Help
text repeats itself: its BLEU is not comparable with WMT's. `--preset wmt16 --base sgp` takes the settings of a row of
the paper's table, on WMT'16 English-German from the Hub; flags beside it win. Every field of `SlowMoConfig` and of
`Seq2SeqTrainingArguments` is a flag. At the end: a table, a JSON record, the translations of the test set and, with
`--plot`, a picture in `--output_dir`.
"""

from __future__ import annotations

import json
import math
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import datasets
import numpy as np
import sacrebleu
import tokenizers
import torch
import transformers
from accelerate.utils import gather_object
from transformers import HfArgumentParser, PreTrainedTokenizerFast, Seq2SeqTrainingArguments
from transformers.trainer_utils import get_last_checkpoint

sys.path.insert(0, str(Path(__file__).parents[1]))  # recipes/, whose folders share modules

from paper_rows import set_preset
from records import SettingError, checkpoint_to_resume, describe_run, end_program, plot, print_table, write_record
from slowmo_hf import SlowMoCallback, SlowMoConfig
from translation.bleu import bleu_signature
from translation.data import NEWSTESTS, Corpus, DataError, load_corpus
from translation.judged import KINDS, judge, named
from translation.model import MODEL_SIZES, beam_settings, decode, make_transformer
from translation.tokens import (
    POSITIONS,
    TokenBatches,
    TokenSets,
    check_resumed_tokenizer,
    check_same_tokenizer,
    encode_corpus,
    save_tokenizer,
    sentences_of,
    token_counts,
    tokenizer_name,
    tokens_sha256,
    train_tokenizer,
)
from translation.trainer import RunModels, TranslationTrainer, checkpoints_of_others

# Ott et al. (2018), as fairseq publishes it: 8 GPUs with 16 micro-batches each, as 128 GPUs. The number of epochs is
# the SlowMo paper's.
_OTT: dict[str, Any] = {
    "dataset_name": "wmt/wmt16",
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
    "logging_steps": 480,  # a multiple of 12 and of 48
    "save_strategy": "epoch",
    "save_total_limit": 6,  # five for the mean, and the best
    "average_checkpoints": 5,
    "dataloader_num_workers": 2,
}
# The paper: 200,000 tokens per step on 8 machines of 8 GPUs, 25 epochs. fairseq counts target tokens without padding,
# and its batches are those of Ott et al.: 64 of at most 3,584 positions, 229,376 in all. The paper leaves the rest to
# Ott et al. and publishes neither learning rate nor beta, which it tuned per row: here those of small batches, and
# 0.5, fairscale's at 8 nodes. Its rows differ in --base and --outer_momentum only.
_PAPER = {
    "gradient_accumulation_steps": 1,
    "base": "local_sgd",
    "outer_momentum": 0.5,
    "learning_rate": 5e-4,
}
CURVE = ("bleu", "nll", "nll_bits")  # what a record keeps of every validation
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
        super().__post_init__()


# Of TrainingArguments, and without effect here: said, not ignored.
_UNUSED = {
    "per_device_train_batch_size": "batches are counted in tokens: set --max_tokens",
    "auto_find_batch_size": "batches are counted in tokens: set --max_tokens",
    "dataloader_drop_last": "batches are counted in tokens, and all ranks have equally many",
    "generation_max_length": "a translation ends 50 tokens after the length of its batch's longest source",
    "predict_with_generate": "validation translates; for less of it set --eval_strategy or --max_eval_samples",
    "prediction_loss_only": "validation translates; for less of it set --eval_strategy or --max_eval_samples",
}


def main() -> None:
    """Parse, train, test, and write down what came out."""
    script, config, args = parse(sys.argv[1:])
    try:
        resumed = checkpoint_to_resume(args)
        check_resumed_size(script.model_size, resumed)
        sets = make_sets(script, args)
        check_resumed_tokenizer(sets.tokenizer, tokenizer_folder(script, args, sets.corpus), resumed)
        transformers.set_seed(args.seed)
        trainer = make_trainer(script, config, args, sets)
    except (DataError, SettingError) as error:
        end(error)
    if trainer.is_world_process_zero():
        print_choices(script, sets, trainer.token_batches, args.gradient_accumulation_steps)
    others = checkpoints_of_others(args.output_dir, resumed)
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=resumed)
    seconds = time.perf_counter() - start
    models = RunModels(trainer, script.average_checkpoints, others)
    metrics, translations = score(trainer, models, sets, script.num_beams)
    seconds_scoring = time.perf_counter() - start - seconds
    trainer.save_model()
    if trainer.is_world_process_zero():
        write_translations(sets, translations, Path(args.output_dir))
        results = {"metrics": metrics, "steps_of_models": models.chosen, "seconds_scoring": seconds_scoring}
        record = make_record(script, config, trainer, sets, results, seconds)
        write_record(record, Path(args.output_dir) / "record.json")
        print_table(record, table_of(record, sets))
        if script.plot:
            picture = Path(args.output_dir) / "training.png"
            plot(trainer.state.log_history, picture, ("eval_bleu", "validation BLEU"), record)


def end(error: object) -> NoReturn:
    """End the program with one line."""
    end_program(__file__, error)


# ---- settings ----


def parse(flags: list[str]) -> tuple[ScriptArguments, SlowMoConfig, RecipeTrainingArguments]:
    """
    Every field of the three is a flag, `--preset` changes their defaults; a wrong value ends the program with one line
    that says what is allowed.
    """
    parser = HfArgumentParser((ScriptArguments, SlowMoConfig, RecipeTrainingArguments))
    parser.error = end  # argparse's own would print all flags first
    try:
        set_preset(parser, flags, PRESETS, "wmt16")
        script, config, args = parser.parse_args_into_dataclasses(flags)
        _check_flags(script, args)
    except ValueError as error:
        end(error)
    return script, config, args


def _check_flags(script: ScriptArguments, args: RecipeTrainingArguments) -> None:
    """No flag is ignored in silence, and what is to be averaged must be there at the end."""
    for name, why in _UNUSED.items():
        if getattr(args, name) != getattr(type(args), name):
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


def check_resumed_size(model_size: str, checkpoint: str | None) -> None:
    """
    A checkpoint must be there, and of a model of the same shape: with another number of heads its weights would fit
    and mean something else. All ranks decide alike.
    """
    if checkpoint is None:
        return
    file = Path(checkpoint) / "config.json"
    found = json.loads(file.read_text()) if file.is_file() else {}
    named = {
        "d_model": "d_model",
        "layers": "encoder_layers",
        "ffn": "encoder_ffn_dim",
        "heads": "encoder_attention_heads",
    }
    there = {ours: found[theirs] for ours, theirs in named.items() if theirs in found}
    told = gather_object([(file.parent.is_dir(), there)])
    if not any(is_there for is_there, _ in told):
        raise SettingError(
            f"resume_from_checkpoint must be true, false or a checkpoint's folder, got {checkpoint!r}, which is no "
            "folder. Set --resume_from_checkpoint."
        )
    asked = {name: MODEL_SIZES[model_size][name] for name in named}
    for _, shape in told:
        if any(asked[name] != value for name, value in shape.items()):
            raise SettingError(
                f"resume_from_checkpoint must be of a model of the same size, got {checkpoint!r} with {shape}, and "
                f"model_size={model_size} is {asked}. Set --model_size to that run's, or start anew with "
                "--resume_from_checkpoint false."
            )


# ---- data and Trainer ----


def make_sets(script: ScriptArguments, args: RecipeTrainingArguments) -> TokenSets:
    """Load and encode: on each machine one process first, the others find what it left in the cache."""
    if args.disable_tqdm:
        datasets.disable_progress_bars()
    with args.main_process_first(desc="data"):
        corpus = load_corpus(
            script.dataset_name,
            script.dataset_config,
            source_lang=script.source_lang,
            target_lang=script.target_lang,
            translation_column=script.translation_column,
            train_split=script.train_split,
            validation_set=script.validation_set,
            test_set=script.test_set,
            max_train_samples=script.max_train_samples,
            max_eval_samples=script.max_eval_samples,
        )
    folder = tokenizer_folder(script, args, corpus)
    with args.main_process_first(desc="tokenizer"):
        if not folder.is_dir():
            save_tokenizer(train_tokenizer(sentences_of(corpus.train), script.vocab_size), folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    check_same_tokenizer(tokenizer, folder)
    with args.main_process_first(desc="tokens"):
        return encode_corpus(corpus, tokenizer, script.max_length)


def tokenizer_folder(script: ScriptArguments, args: RecipeTrainingArguments, corpus: Corpus) -> Path:
    """Where the tokenizer of this text and size lies."""
    folder = Path(script.tokenizer_dir or Path(args.output_dir) / "tokenizers")
    return folder / tokenizer_name(corpus, script.vocab_size)


def print_choices(script: ScriptArguments, sets: TokenSets, batches: TokenBatches, micro_batches: int = 1) -> None:
    """What was left out or cut, and how many tokens batches and updates hold."""
    empty, rows = sets.corpus.empty_train_rows, len(sets.corpus.train)
    if empty or len(sets.train) < rows:
        print(
            f"of {rows + empty:,} training pairs {empty:,} with an empty line and {rows - len(sets.train):,} longer "
            f"than max_length={script.max_length} tokens are left out",
            flush=True,
        )
    for flag, set_ in (("validation_set", sets.validation), ("test_set", sets.test)):
        cut = int((token_counts(set_) >= POSITIONS).any(axis=1).sum())
        if cut:
            print(f"{flag}: {cut:,} sentences of {POSITIONS} tokens or more are cut there", flush=True)
    print(
        f"{len(batches):,} batches per epoch and process, each of at most {script.max_tokens:,} tokens, "
        f"{batches.padding():.1%} padding",
        flush=True,
    )
    held = batches.tokens_per_update(micro_batches)
    print(
        f"an update holds {held['target']:,.0f} target tokens on average, {held['target_padded']:,.0f} with padding: "
        f"{batches.world_size} processes, micro-batches of each {micro_batches}",
        flush=True,
    )


def make_trainer(
    script: ScriptArguments, config: SlowMoConfig, args: RecipeTrainingArguments, sets: TokenSets
) -> TranslationTrainer:
    """The callback is the one line that makes workers local."""
    model = make_transformer(script.model_size, len(sets.tokenizer), script.dropout)
    model.generation_config.update(**beam_settings(script.num_beams, script.length_penalty))
    try:
        trainer = TranslationTrainer(
            model=model,
            args=args,
            train_dataset=sets.train,
            eval_dataset=sets.validation,
            processing_class=sets.tokenizer,
            max_tokens=script.max_tokens,
            length_penalty=script.length_penalty,
            target_lang=sets.corpus.target_lang,
            callbacks=[SlowMoCallback(config)],
        )
        # Now, not in train(): a wrong setting or a package that is not installed is the user's to mend.
        trainer.create_optimizer()
    except (ImportError, RuntimeError, ValueError) as error:
        raise SettingError(error) from error
    return trainer


# ---- what is left behind ----


def score(
    trainer: TranslationTrainer, models: RunModels, sets: TokenSets, num_beams: int
) -> tuple[dict[str, float], list[str]]:
    """
    All scores of every model, those of the saved one under plain names, and its translations of the test set; it is in
    the Trainer then. All ranks at once.
    """
    translations: list[str] = []

    def score_one(steps: list[int]) -> dict[str, float]:
        models.put(steps)
        if trainer.is_world_process_zero():
            print(f"scores of the model of {_steps(steps)}:", flush=True)
        metrics = trainer.evaluate(metric_key_prefix="validation", num_beams=num_beams)
        test = trainer.predict(sets.test, num_beams=num_beams)
        if steps == models.chosen["saved"]:
            translations[:] = decode(sets.tokenizer, test.predictions[0])
        found = {**metrics, **test.metrics}
        return {name: value for name, value in found.items() if re.match(r"(validation|test)_(bleu|nll)", name)}

    scores = judge(models.chosen, score_one)
    models.put(models.chosen["saved"])
    return named(scores, "saved"), translations


def write_translations(sets: TokenSets, translations: list[str], folder: Path) -> None:
    """
    `test.<source>`, `test.<target>` and `test.hyp.<target>`, in the test set's order, for `sacrebleu test.<target> -i
    test.hyp.<target>`.
    """
    order = np.argsort(sets.test["row"][:])
    source, target = sets.corpus.source_lang, sets.corpus.target_lang
    texts = {
        f"test.{source}": sets.test["source"][:],
        f"test.{target}": sets.test["target"][:],
        f"test.hyp.{target}": translations,
    }
    for name, sentences in texts.items():
        lines = [re.sub(r"[\r\n]+", " ", sentences[place]) for place in order]
        (folder / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def make_record(
    script: ScriptArguments,
    config: SlowMoConfig,
    trainer: TranslationTrainer,
    sets: TokenSets,
    results: dict[str, Any],
    seconds: float,
) -> dict[str, Any]:
    """
    Everything that a reader needs to judge the run, and to run it again. Metrics with a plain name are of the saved
    model; those of the best by validation NLL, the last and the mean of the last five have `_best`, `_last` and
    `_mean_of_5` behind. `steps_of_models` says of which checkpoints each is.
    """
    curve = [entry for entry in trainer.state.log_history if "eval_bleu" in entry]
    return {
        "study": "single",
        "task": "translation",
        "preset": script.preset,
        "dataset": sets.corpus.name,
        "languages": f"{sets.corpus.source_lang}-{sets.corpus.target_lang}",
        "corpus_sha256": sets.corpus.sha256(),
        "tokenizer_sha256": tokens_sha256(sets.tokenizer.backend_tokenizer),
        "train_rows": len(sets.train),
        "validation_set": sets.corpus.validation_set,
        "validation_rows": len(sets.validation),
        "test_set": sets.corpus.test_set,
        "test_rows": len(sets.test),
        "model_size": script.model_size,
        "vocab_size": len(sets.tokenizer),
        "max_tokens": script.max_tokens,
        "tokens_per_update": trainer.token_batches.tokens_per_update(trainer.args.gradient_accumulation_steps),
        "num_beams": script.num_beams,
        "length_penalty": script.length_penalty,
        "averaged_checkpoints": len(results["steps_of_models"]["saved"]),
        **results,
        "bleu_signature": bleu_signature(),
        "curve": [
            {"step": entry["step"], **{f"validation_{name}": entry[f"eval_{name}"] for name in CURVE}}
            for entry in curve
        ],
        "curve_num_beams": trainer.args.generation_num_beams,
        **describe_run(config, trainer, seconds, [datasets, tokenizers, sacrebleu]),
    }


def table_of(record: dict[str, Any], sets: TokenSets) -> dict[str, str]:
    """The task's own lines of the table."""
    metrics, held = record["metrics"], record["tokens_per_update"]
    place = f"{record['test_set']}, {record['test_rows']:,} rows"
    return {
        "BLEU of the average": f"{metrics['test_bleu']:.2f} "
        f"({place}{'; not comparable with WMT' if sets.corpus.shipped else ''})",
        "signature": record["bleu_signature"],
        "tokenised BLEU": f"{metrics['test_bleu_tokenised']:.2f} (Moses tokens)",
        "compound-split BLEU": f"{metrics['test_bleu_compound_split']:.2f} (Moses tokens)",
        **{
            f"{name} NLL": f"{metrics[f'{name}_nll']:.3f} nats per token, {metrics[f'{name}_nll_bits']:.3f} bits"
            for name in ("validation", "test")
        },
        **{
            _words(kind): _line(metrics, kind, steps)
            for kind, steps in record["steps_of_models"].items()
            if kind in KINDS
        },
        "target tokens per update": f"{held['target']:,.0f}, {held['target_padded']:,.0f} with padding",
    }


def _words(kind: str) -> str:
    return f"test, {kind.replace('_', ' ')}"


def _line(metrics: dict[str, float], kind: str, steps: list[int]) -> str:
    bleu, tokenised, split, nll = (
        metrics[f"test_{name}_{kind}"] for name in ("bleu", "bleu_tokenised", "bleu_compound_split", "nll")
    )
    return (
        f"BLEU {bleu:.2f}, tokenised {tokenised:.2f}, compound-split {split:.2f}, NLL {nll:.3f} nats, "
        f"{nll / math.log(2):.3f} bits ({_steps(steps)})"
    )


def _steps(steps: list[int]) -> str:
    return f"step{'s' if len(steps) > 1 else ''} {', '.join(f'{step:,}' for step in steps)}"


if __name__ == "__main__":
    main()
