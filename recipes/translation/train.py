"""
Translation by workers that meet every few steps: a `Seq2SeqTrainer` with batches of tokens, and one `SlowMoCallback`.

    accelerate launch --config_file recipes/configs/cpu_two_processes.yaml recipes/translation/train.py

With no flags: two processes, the shipped English-German help text, a tiny Transformer, and Local Adam without slow
momentum, which with Adam is for more workers (docs/from_ddp.md). Help text repeats itself: its BLEU is not comparable
with WMT's. `--preset wmt16 --base sgp` takes the settings of a row of the paper's table, on WMT'16 English-German from
the Hub; flags beside it win. Every field of `SlowMoConfig` and of `Seq2SeqTrainingArguments` is a flag. At the end: a
table, a JSON record, the translations of the test set and, with `--plot`, a picture in `--output_dir`.
"""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import NoReturn

import datasets
import transformers
from transformers import HfArgumentParser

sys.path.insert(0, str(Path(__file__).parents[1]))  # recipes/, whose folders share modules

from one_run import OneRun, check_resumed_model, checkpoint_to_resume, settings_of
from paper_rows import set_preset
from records import SettingError, end_program, plot, print_table, write_record
from slowmo_hf import SlowMoCallback, SlowMoConfig
from translation.data import load_corpus
from translation.judged import judge, named
from translation.model import MODEL_SIZES, beam_settings, decode, make_transformer
from translation.outcome import in_words, make_record, table_of, write_translations
from translation.settings import PRESETS, TRAINED_BY, RecipeTrainingArguments, ScriptArguments, check_flags
from translation.sources import DataError
from translation.tokens import (
    POSITIONS,
    TokenBatches,
    TokenSets,
    check_resumed_tokenizer,
    check_same_tokenizer,
    encode_corpus,
    load_tokenizer,
    save_tokenizer,
    sentences_of,
    token_counts,
    tokenizer_name,
    train_tokenizer,
)
from translation.trainer import RunModels, TranslationTrainer, checkpoints_of_others

# Of a model's config.json, what a checkpoint's must be to fit, and what MODEL_SIZES calls it.
SHAPE = {
    "d_model": "d_model",
    "encoder_layers": "layers",
    "encoder_ffn_dim": "ffn",
    "encoder_attention_heads": "heads",
}


def main() -> None:
    """Parse, train, test, and write down what came out."""
    script, config, args = parse(sys.argv[1:])
    try:
        settings = settings_of(config, args, {name: getattr(script, name) for name in TRAINED_BY})
        resumed = checkpoint_to_resume(args, settings)
        shape = {field: MODEL_SIZES[script.model_size][name] for field, name in SHAPE.items()}
        check_resumed_model(resumed, shape, f"model_size={script.model_size}", "--model_size")
        sets = make_sets(script, args)
        check_resumed_tokenizer(sets.tokenizer, Path(sets.tokenizer.name_or_path), resumed)
        transformers.set_seed(args.seed)
        trainer = make_trainer(script, config, args, sets)
    except (DataError, SettingError) as error:
        end(error)
    run = OneRun(trainer, settings)
    if trainer.is_world_process_zero():
        print_choices(script, sets, trainer.token_batches, args.gradient_accumulation_steps)
    others = checkpoints_of_others(args.output_dir, resumed)
    trainer.train(resume_from_checkpoint=resumed)
    start = time.perf_counter()
    models = RunModels(trainer, script.average_checkpoints, others)
    metrics, translations = score(trainer, models, sets, script.num_beams)
    seconds_scoring = time.perf_counter() - start
    trainer.save_model()
    if trainer.is_world_process_zero():
        write_translations(sets, translations, Path(args.output_dir))
        results = {"metrics": metrics, "steps_of_models": models.chosen, "seconds_scoring": seconds_scoring}
        record = make_record(script, config, trainer, sets, results, run)
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
    parser.set_defaults(outer_momentum=0.0)  # with Adam and few workers (docs/from_ddp.md); presets have their own
    try:
        set_preset(parser, flags, PRESETS, "wmt16")
        script, config, args = parser.parse_args_into_dataclasses(flags)
        check_flags(script, args)
    except ValueError as error:
        end(error)
    return script, config, args


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
    tokenizers = Path(script.tokenizer_dir or Path(args.output_dir) / "tokenizers")
    folder = tokenizers / tokenizer_name(corpus, script.vocab_size)
    with args.main_process_first(desc="tokenizer"):
        if not folder.is_dir():
            save_tokenizer(train_tokenizer(sentences_of(corpus.train), script.vocab_size), folder)
    tokenizer = load_tokenizer(folder)
    check_same_tokenizer(tokenizer, folder)
    with args.main_process_first(desc="tokens"):
        return encode_corpus(corpus, tokenizer, script.max_length)


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
            print(f"scores of the model of {in_words(steps)}:", flush=True)
        metrics = trainer.evaluate(metric_key_prefix="validation", num_beams=num_beams)
        test = trainer.predict(sets.test, num_beams=num_beams)
        if steps == models.chosen["saved"]:
            translations[:] = decode(sets.tokenizer, test.predictions[0])
        found = {**metrics, **test.metrics}
        return {name: value for name, value in found.items() if re.match(r"(validation|test)_(bleu|nll)", name)}

    scores = judge(models.chosen, score_one)
    models.put(models.chosen["saved"])
    return named(scores, "saved"), translations


if __name__ == "__main__":
    main()
