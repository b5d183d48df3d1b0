"""
WMT'16 at its size without its data and without its GPUs: what the translation recipe's preprocessing takes of 4.5
million made-up pairs, whether batches after a resume are those that would have come, one optimizer step of the big
Transformer on two processes, with the preset's accumulation, and what the paper's run comes to in hours, bytes and
disk.

    nice python recipes/studies/dry_run.py --record recipes/records/translation/dry_run.json

The functions that run are those of `translation/train.py --preset wmt16`; flags that this program does not know go
there, and win. Parts that are left out of `--parts` stay as the record has them; each names its command, its commit
and its machine. A step of more micro-batches stands beside the preset's. Nothing here says how good a model is.
Seconds are of the machine that it ran on: where others compute on it too, look at CPU seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import tokenizers
import torch
from accelerate import skip_first_batches
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).parents[1]))  # recipes/, whose folders share modules

from records import environment, write_record
from studies.dry_run_tables import step_name, tables
from studies.made_up_pairs import write_pairs
from studies.paper_arithmetic import NODES, PROCESSES, all_rows
from studies.stages import apart, cpu_seconds, measured, together
from translation.data import Corpus, load_corpus
from translation.model import make_transformer
from translation.tokens import (
    TokenBatches,
    TokenSets,
    encode_corpus,
    load_tokenizer,
    save_tokenizer,
    sentences_of,
    token_counts,
    tokenizer_name,
    train_tokenizer,
)
from translation.train import make_sets, make_trainer, parse

PARTS = ("preprocessing", "step", "arithmetic")
EPOCH = 1  # that is resumed in its middle: the second, whose order is not the first's
RANKS = (0, 31, 63)  # of 64, whose order is compared


def main() -> None:
    """Run the parts, each in processes of its own, and write down after each what came out."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--pairs", type=int, default=4_500_000, help="made-up training pairs")
    parser.add_argument(
        "--text_pairs", type=int, help="train the BPE on the first ones and encode these; the rest get their lengths"
    )
    parser.add_argument("--folder", type=Path, help="for pairs and caches; kept. A temporary one by default")
    parser.add_argument("--record", type=Path, help="a JSON file to write to, part by part")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--processes", type=int, default=2, help="of the step")
    asked, flags = parser.parse_known_args()
    folder = asked.folder or Path(tempfile.mkdtemp())
    record = json.loads(asked.record.read_text()) if asked.record and asked.record.exists() else {}
    if "arithmetic" in asked.parts and "preprocessing" not in {*asked.parts, *record}:
        parser.error("parts must have preprocessing before arithmetic, or --record a file that has it")
    record |= {"study": "dry_run", "task": "translation"}
    command = shlex.join(["python", "recipes/studies/dry_run.py", *sys.argv[1:]])
    origin = {"command": command, **environment([datasets, tokenizers])}
    try:
        if not (folder / "pairs").is_dir():
            apart(write_pairs, folder / "pairs", asked.pairs)
        for part in asked.parts:
            if part == "preprocessing":
                found = apart(preprocess, folder, flags, asked.text_pairs)
                found["second_process"] = apart(found_again, folder, flags, asked.text_pairs)
                record[part] = found | origin
            elif part == "step":
                taken = step(folder, flags, asked.processes)
                record.setdefault("steps", {})[step_name(taken["ranks"])] = taken | origin
            else:
                record[part] = arithmetic(record, flags) | origin
            if asked.record:
                write_record(record, asked.record)
    finally:
        if asked.folder is None:
            shutil.rmtree(folder)
    print(tables(record))


def settings(folder: Path, flags: list[str], *more: str) -> Any:
    """The recipe's own, with the pairs in place of WMT's; what the data library keeps lies in the folder too."""
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    given = ["--preset", "wmt16", "--dataset_name", str(folder / "pairs"), "--output_dir", str(folder / "out")]
    given += ["--validation_set", "validation", "--test_set", "test", "--tokenizer_dir", str(folder / "tokenizers")]
    given += ["--disable_tqdm", "1", *more, *flags]
    return parse(given)


def bytes_of(folder: Path) -> int:
    """Of all files in it."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# ---- preprocessing ----


def preprocess(folder: Path, flags: list[str], text_pairs: int | None) -> dict[str, Any]:
    """
    `train.py`'s own steps up to the first batch, one by one; batches of 64 processes, and those after a resume.
    """
    script, _, args = settings(folder, flags)
    stages: dict[str, dict[str, float]] = {}
    with measured(stages, "load"):
        corpus = load_corpus(script.dataset_name)
    some = _first(corpus, text_pairs)
    with measured(stages, "train the BPE"):
        name = tokenizer_name(some, script.vocab_size)
        path = Path(script.tokenizer_dir) / name
        if not path.is_dir():
            save_tokenizer(train_tokenizer(sentences_of(some.train), script.vocab_size), path)
        tokenizer = load_tokenizer(path)
    with measured(stages, "encode"):
        sets = encode_corpus(some, tokenizer, script.max_length)
    with measured(stages, "count tokens"):
        lengths = token_counts(sets.train)
    counted = len(lengths)
    if len(some.train) < len(corpus.train):
        rows = round(counted / len(some.train) * len(corpus.train))
        lengths = lengths[np.random.default_rng(0).integers(counted, size=rows)]
    with measured(stages, "batches of an epoch"):
        sampler = TokenBatches(lengths, script.max_tokens, seed=args.seed, world_size=PROCESSES)
    held = sampler.tokens_per_update(args.gradient_accumulation_steps)
    return {
        "pairs": len(corpus.train) + corpus.empty_train_rows,
        "empty_pairs": corpus.empty_train_rows,
        "text_pairs": len(some.train),
        "longer_pairs": len(some.train) - counted,
        "max_length": script.max_length,
        "max_tokens": script.max_tokens,
        "vocabulary": len(tokenizer),
        "mean_tokens": {"source": float(lengths[:, 0].mean()), "target": float(lengths[:, 1].mean())},
        "stages": stages,
        "disk_bytes": {
            "parquet": bytes_of(folder / "pairs"),
            "caches": bytes_of(folder / "cache"),
            "tokenizer": bytes_of(path),
        },
        "batched_pairs": len(lengths),
        "batches": sampler.in_all,
        "processes": PROCESSES,
        "micro_batches": args.gradient_accumulation_steps,
        "batches_per_process_and_epoch": len(sampler),
        "updates_per_epoch": -(-len(sampler) // args.gradient_accumulation_steps),
        "padding": sampler.padding(),
        "tokens_per_update": held,
        "resume": resumed(lengths, sets, script, args),
    }


def _first(corpus: Corpus, pairs: int | None) -> Corpus:
    if pairs is None or pairs >= len(corpus.train):
        return corpus
    return Corpus(**{**vars(corpus), "train": corpus.train.select(range(pairs))})


def found_again(folder: Path, flags: list[str], text_pairs: int | None) -> dict[str, Any]:
    """What every other process of a machine does: all is there, and nothing is made again."""
    script, _, _ = settings(folder, flags)
    before = bytes_of(folder / "cache")
    stages: dict[str, dict[str, float]] = {}
    with measured(stages, "second process"):
        corpus = _first(load_corpus(script.dataset_name), text_pairs)
        path = Path(script.tokenizer_dir) / tokenizer_name(corpus, script.vocab_size)
        sets = encode_corpus(corpus, load_tokenizer(path), script.max_length)
        token_counts(sets.train)
    return {**stages["second process"], "bytes_written": bytes_of(folder / "cache") - before}


def resumed(lengths: np.ndarray, sets: TokenSets, script: Any, args: Any) -> dict[str, Any]:
    """
    The middle of an epoch, gone on with as Trainer does. Rows, of three ranks of 64; and of one the tensors, of the
    pairs that were encoded.
    """
    script.model_size = "mini"  # nothing is trained
    trainer = make_trainer(script, parse(["--use_cpu", "1"])[1], args, sets)
    out: dict[str, Any] = {"epoch": EPOCH, "ranks": []}
    for rank in RANKS:
        trainer.token_batches = TokenBatches(
            lengths, script.max_tokens, seed=args.seed, rank=rank, world_size=PROCESSES
        )
        loader = trainer.get_train_dataloader()
        loader.set_epoch(EPOCH)
        start = time.perf_counter()
        whole = list(loader.batch_sampler)
        uninterrupted = time.perf_counter() - start
        skipping = after_a_skip(loader, len(whole) // 2)
        start = time.perf_counter()
        rest = list(skipping.batch_sampler)
        out["ranks"].append(
            {
                "rank": rank,
                "batches": len(whole),
                "skipped": len(whole) - len(rest),
                "same_order": rest == whole[len(whole) // 2 :],
                "seconds_of_the_order": uninterrupted,
                "seconds_of_the_order_after_the_skip": time.perf_counter() - start,
            }
        )
    trainer.token_batches = TokenBatches(
        token_counts(sets.train), script.max_tokens, seed=args.seed, world_size=PROCESSES
    )
    return out | same_tensors(trainer.get_train_dataloader())


def after_a_skip(loader: Any, batches: int) -> Any:
    """
    As Trainer goes on in a new process, which knows no epoch yet. It sets the epoch behind the skip, and behind
    Accelerate's loader, which does not hand it on, in the sampler itself.
    """
    loader.set_epoch(0)
    skipping = skip_first_batches(loader, batches)
    skipping.set_epoch(EPOCH)
    skipping.batch_sampler.batch_sampler.set_epoch(EPOCH)
    return skipping


def same_tensors(loader: Any) -> dict[str, Any]:
    """Whether what is loaded is the same too, and when the first batch is there."""
    loader.set_epoch(EPOCH)
    whole = [(batch["input_ids"], batch["labels"]) for batch in loader]
    skipping = after_a_skip(loader, len(whole) // 2)
    start, rest, first = time.perf_counter(), [], 0.0
    for batch in skipping:
        first = first or time.perf_counter() - start
        rest.append((batch["input_ids"], batch["labels"]))
    right = whole[len(whole) // 2 :]
    same = len(rest) == len(right) and all(map(torch.equal, sum(rest, ()), sum(right, ())))
    return {"loaded_batches": len(rest), "same_tensors": same, "seconds_to_the_first_batch": first}


# ---- a step ----


class Times(TrainerCallback):
    """When a step began, had its gradients, and had its inner update; the round comes behind."""

    def __init__(self) -> None:
        self.at: dict[str, tuple[float, float]] = {}

    def _note(self, name: str) -> None:
        self.at[name] = (time.perf_counter(), cpu_seconds())

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._note("begin")

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._note("gradients")

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._note("update")

    def seconds(self, first: str, last: str) -> dict[str, float]:
        return {name: self.at[last][i] - self.at[first][i] for i, name in enumerate(("seconds", "cpu_seconds"))}


def step(folder: Path, flags: list[str], processes: int) -> dict[str, Any]:
    """
    One optimizer step, of as many micro-batches as the preset has, and one round on gloo processes of this machine,
    with a checkpoint behind it.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    ranks = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    return {"ranks": together([(train_a_step, (folder, flags), rank) for rank in ranks])}


def train_a_step(folder: Path, flags: list[str]) -> dict[str, Any]:
    """What `train.py` does until it has trained: its own settings, data, Trainer and callback."""
    torch.set_num_threads(1)
    out = folder / "out_step"
    if os.environ["RANK"] == "0":
        shutil.rmtree(out, ignore_errors=True)
    more = "--use_cpu 1 --max_steps 1 --sync_every 1 --logging_steps 1 --eval_strategy no --average_checkpoints 1"
    more += " --save_strategy steps --save_steps 1 --dataloader_num_workers 0 --max_train_samples 20000"
    script, config, args = settings(folder, [*flags], *more.split(), "--output_dir", str(out))
    stages: dict[str, dict[str, float]] = {}
    with measured(stages, "data and model"):
        sets = make_sets(script, args)
        trainer = make_trainer(script, config, args, sets)
    times = Times()
    trainer.add_callback(times)
    with measured(stages, "train"):
        trainer.train()
    (logged,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    saved = {
        path.relative_to(out).as_posix(): path.stat().st_size
        for path in sorted(out.glob("checkpoint-*/**/*"))
        if path.is_file()
    }
    return {
        "model_size": script.model_size,
        "parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "max_tokens": script.max_tokens,
        "micro_batches": args.gradient_accumulation_steps,
        "sync_every": config.sync_every,
        "base": config.base,
        "loss": logged["loss"],
        "forward_and_backward": times.seconds("begin", "gradients"),
        "inner_update": times.seconds("gradients", "update"),
        "round_seconds": logged.get("slowmo/seconds"),
        "bytes_sent": logged.get("slowmo/bytes_sent"),
        "stages": stages,
        "checkpoint_bytes": saved,
    }


# ---- arithmetic ----


def arithmetic(record: dict[str, Any], flags: list[str]) -> dict[str, Any]:
    """From the preset and the size of an epoch that was found; nothing is measured."""
    script, config, args = parse(["--preset", "wmt16", *flags])
    found = record["preprocessing"]
    with torch.device("meta"):
        model = make_transformer(script.model_size, found["vocabulary"])
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "is": "arithmetic, not measured",
        "nodes": NODES,
        "processes": PROCESSES,
        "parameters": parameters,
        "updates_per_epoch": found["updates_per_epoch"],
        "target_tokens_per_update": found["tokens_per_update"]["target"],
        "checkpoints_kept": args.save_total_limit,
        "rows": all_rows(parameters, found["updates_per_epoch"], args.save_total_limit, config.outer_momentum),
    }


if __name__ == "__main__":
    main()
