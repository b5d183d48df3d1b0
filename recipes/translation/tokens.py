"""
Tokens for `translation.py`: one BPE for both languages, and batches of equal numbers of tokens. Nothing here needs a
Trainer.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
from accelerate.utils import gather_object
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast

from records import DataError, SettingError
from translation.data import Corpus

PAD, EOS = 0, 1  # ids of <pad>, which also starts every translation (Marian's habit), and </s>
NO_LABEL = -100  # where there is nothing to predict
POSITIONS = 1024  # longest sentence in tokens
PART = 100_000  # rows that are looked through at once


# ---- tokens ----


def train_tokenizer(sentences: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """
    One byte-level BPE for both languages (Sennrich et al., 2016): no unknown tokens, and decoding gives the text back.
    The same sentences give the same tokenizer, whatever the machine and the number of its threads.

    Args:
        vocab_size (`int`): Tokens, with `<pad>`, `</s>` and 256 bytes; fewer where the text has no more pairs to
            merge.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", EOS)])
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        add_prefix_space=True,  # transformers 4 would switch the pre-tokenizer's off
    )


def sentences_of(rows: datasets.Dataset) -> Iterator[str]:
    """Both sides of every pair."""
    for batch in rows.iter(1000):
        yield from batch["source"]
        yield from batch["target"]


def tokenizer_name(corpus: Corpus, vocab_size: int) -> str:
    """
    A folder's name that says what the tokenizer was trained on, to digits of its SHA-256: text that was mended in
    place has other tokens. Reads all training sentences.
    """
    text = f"{len(corpus.train)} {corpus.train_sha256[:12]}"
    name = f"{corpus.name} {corpus.source_lang} {corpus.target_lang} {text} {vocab_size}"
    return re.sub("[^A-Za-z0-9]+", "-", name).strip("-")[-120:]


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """What `save_tokenizer` wrote; raises `SettingError` where it cannot be read."""
    try:
        tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(folder)
        return tokenizer
    except Exception as error:  # of several libraries
        raise SettingError(
            f"tokenizer_dir must hold tokenizers that can be read, got {str(folder)!r} ({type(error).__name__}: "
            f"{error}). Remove that folder, and it is trained again; or set --tokenizer_dir."
        ) from error


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Whole or not at all; on a shared disk several machines do it at once, and the first one's stays."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = tempfile.mkdtemp(dir=folder.parent)
    tokenizer.save_pretrained(beside)
    try:
        Path(beside).rename(folder)
    except OSError:
        shutil.rmtree(beside)


def check_same_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """
    Training it is deterministic, so machines without a shared disk agree; data or versions may differ, and nobody
    would notice.
    """
    if len(set(gather_object([tokens_sha256(tokenizer.backend_tokenizer)]))) > 1:
        raise SettingError(
            f"tokenizer_dir must hold the same tokenizer on all machines, got different ones in {str(folder)!r}. Copy "
            "rank 0's there, or set --tokenizer_dir to a folder that all share."
        )


def check_resumed_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path, checkpoint: str | None) -> None:
    """
    A checkpoint holds the tokenizer that its model learned with. With other tokens, be they as many, the model would
    go on with each embedding for another token. All ranks decide alike, also where one has no checkpoint of its own.
    """
    ours = tokens_sha256(tokenizer.backend_tokenizer)
    told = gather_object([_tokens_of(Path(checkpoint)) if checkpoint else None])
    for size, digest in filter(None, told):
        if size is None:
            raise SettingError(
                f"resume_from_checkpoint must hold a tokenizer that can be read, got {checkpoint!r} ({digest}). Set "
                "--resume_from_checkpoint to another checkpoint, or start anew in another --output_dir, without it."
            )
        if digest != ours:
            raise SettingError(
                f"resume_from_checkpoint must be of a run with the same tokens, got {checkpoint!r} with {size:,} "
                f"(SHA-256 {digest[:12]}), and now {len(tokenizer):,} ({ours[:12]}) of {str(folder)!r}. Set "
                "--tokenizer_dir and --vocab_size to that run's, with its data; or start anew in "
                "another --output_dir, without --resume_from_checkpoint."
            )


def _tokens_of(checkpoint: Path) -> tuple[int | None, str] | None:
    """How many, and their digest; or why its file cannot be read. None where it has none."""
    file = checkpoint / "tokenizer.json"
    if not file.is_file():
        return None
    try:
        before = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises no other type
        return None, f"tokenizer.json: {error}"
    return before.get_vocab_size(), tokens_sha256(before)


def tokens_sha256(tokenizer: Tokenizer) -> str:
    """Of tokens, their ids and merges: not of how a call has it cut and pad, which it writes down beside them."""
    return hashlib.sha256(json.dumps(json.loads(tokenizer.to_str())["model"], sort_keys=True).encode()).hexdigest()


# ---- rows ----


@dataclass
class TokenSets:
    """The corpus in tokens: training rows that fit, validation and test rows sorted by length."""

    corpus: Corpus
    tokenizer: PreTrainedTokenizerFast
    train: datasets.Dataset
    validation: datasets.Dataset
    test: datasets.Dataset


def encode_corpus(corpus: Corpus, tokenizer: PreTrainedTokenizerFast, max_length: int) -> TokenSets:
    """
    Leaves training pairs out whose source or target is longer than `max_length` tokens; raises `DataError` where all
    are.
    """
    train, validation, test = (encode(rows, tokenizer) for rows in (corpus.train, corpus.validation, corpus.test))
    fits = np.flatnonzero((token_counts(train) <= max_length).all(axis=1))
    if not len(fits):
        raise DataError(
            f"max_length must leave training pairs, got {max_length} tokens, and all are longer. Set --max_length."
        )
    train = train.select(fits) if len(fits) < len(train) else train
    return TokenSets(corpus, tokenizer, train, sort_by_length(validation), sort_by_length(test))


def encode(rows: datasets.Dataset, tokenizer: PreTrainedTokenizerFast) -> datasets.Dataset:
    """
    Adds `input_ids` and `labels`, each ending with `</s>` and cut at `POSITIONS`, and `row`, the place in the set.
    """
    return rows.map(_encode, batched=True, with_indices=True, fn_kwargs={"tokenizer": tokenizer})


def _encode(
    batch: dict[str, list[str]], places: list[int], tokenizer: PreTrainedTokenizerFast
) -> dict[str, list[Any]]:
    source, target = (ids_of(batch[side], tokenizer) for side in ("source", "target"))
    return {"input_ids": source, "labels": target, "row": places}


def ids_of(sentences: list[str], tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """With `</s>` behind each. One in a text (HTML's strike-through), or `<pad>`, is text like any other."""
    return list(tokenizer(sentences, truncation=True, max_length=POSITIONS, split_special_tokens=True)["input_ids"])


def sort_by_length(rows: datasets.Dataset) -> datasets.Dataset:
    """Encoded rows by source tokens, so that a beam search seldom waits for one long sentence."""
    return rows.select(np.argsort(token_counts(rows)[:, 0], kind="stable"))


def token_counts(rows: datasets.Dataset) -> np.ndarray:
    """Of source and target, shape (rows, 2)."""
    counts = [np.zeros((0, 2), dtype=np.int32)]
    # In parts: all tokens of rows that were selected would be copied, in every process of a machine.
    for table in rows.select_columns(["input_ids", "labels"]).with_format("arrow").iter(PART):
        counts.append(np.stack([pc.list_value_length(column).to_numpy() for column in table.columns], axis=1))
    return np.concatenate(counts)


# ---- batches ----


def make_batches(lengths: np.ndarray, max_tokens: int, seed: int = 0, epoch: int = 0) -> list[list[int]]:
    """
    Rows of similar length together, in batches of at most `max_tokens` tokens, in random order. Tokens are counted as
    fairseq counts them: rows times the longest source or target, padding included.

    Rows are sorted by target and source length, equal ones in the epoch's own order; so every epoch has equally many
    batches, of the same sizes, with other rows in them.

    Args:
        lengths (`np.ndarray`): Tokens of source and target, shape (rows, 2).
        max_tokens (`int`): A row longer than this is a batch of its own.
        seed (`int`), epoch (`int`): The same pair gives the same batches.
    """
    return [batch.tolist() for batch in batch_arrays(lengths, max_tokens, seed, epoch)]


def batch_arrays(lengths: np.ndarray, max_tokens: int, seed: int = 0, epoch: int = 0) -> list[np.ndarray]:
    """As `make_batches`, in arrays: a list of 4.5 million rows takes five times the memory, for an epoch's length."""
    generator = np.random.default_rng([seed, epoch])
    shuffled = generator.permutation(len(lengths))
    order = shuffled[np.lexsort(lengths[shuffled].T)]
    longer_side = lengths.max(axis=1)[order]
    batches: list[np.ndarray] = []
    start = 0
    while start < len(order):
        at_most = max(1, max_tokens // int(longer_side[start]))
        longest = np.maximum.accumulate(longer_side[start : start + at_most])
        fitting = np.count_nonzero(longest * np.arange(1, len(longest) + 1) <= max_tokens)  # the first ones: it grows
        end = start + max(1, int(fitting))
        batches.append(order[start:end])
        start = end
    return [batches[index] for index in generator.permutation(len(batches))]


class TokenBatches(torch.utils.data.Sampler[list[int]]):
    """
    A batch sampler over `make_batches` for one of several ranks: rank r takes batches r, r + world_size, ... All ranks
    have equally many; where the last ones lack some, these are the epoch's first.

    It does the sharding itself, so `accelerator.prepare` must not: Accelerate's `BatchSamplerShard` hides `set_epoch`
    from a loader that skips batches after a resume, which would skip in another epoch's order.
    """

    def __init__(
        self, lengths: np.ndarray, max_tokens: int, *, seed: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        self.lengths, self.max_tokens, self.seed = lengths, max_tokens, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        batches = batch_arrays(lengths, max_tokens, seed)
        self.in_all = len(batches)
        # Of an epoch's batches, of source and target: tokens and padding.
        self.positions = np.sum([len(batch) * lengths[batch].max(axis=0) for batch in batches], axis=0, dtype=np.int64)

    def set_epoch(self, epoch: int) -> None:
        """Epoch whose order the next iteration has."""
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(self.in_all / self.world_size)

    def __iter__(self) -> Iterator[list[int]]:
        batches = batch_arrays(self.lengths, self.max_tokens, self.seed, self.epoch)
        for step in range(len(self)):
            yield batches[(step * self.world_size + self.rank) % len(batches)].tolist()

    def padding(self) -> float:
        """Share of all positions, source and target, that hold padding."""
        return float(1 - self.lengths.sum() / self.positions.sum())

    def tokens_per_update(self, micro_batches: int = 1) -> dict[str, float]:
        """
        What an optimizer step sees on average, over all ranks and `micro_batches` of each, or an epoch's where it has
        fewer: `source` and `target` tokens, and `source_padded` and `target_padded` with the padding of their batches.
        """
        share = self.world_size * min(micro_batches, len(self)) / self.in_all
        source, target = (share * self.lengths.sum(axis=0)).tolist()
        source_padded, target_padded = (share * self.positions).tolist()
        return {
            "source": source,
            "target": target,
            "source_padded": source_padded,
            "target_padded": target_padded,
        }


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """
    Encoded rows as padded int64 tensors of shape (rows, longest): `input_ids`, `attention_mask`, `labels`, and
    `decoder_input_ids`, which are the labels one place later.
    """
    return as_batch(padded([row["input_ids"] for row in rows], PAD), padded([row["labels"] for row in rows], NO_LABEL))


def as_batch(input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """What `collate` gives, of its first and its third tensor, on their device."""
    before = torch.cat([torch.full_like(labels[:, :1], PAD), labels[:, :-1]], dim=1)
    return {
        "input_ids": input_ids,
        "attention_mask": input_ids.ne(PAD).long(),
        "labels": labels,
        "decoder_input_ids": before.masked_fill(before == NO_LABEL, PAD),
    }


def padded(sequences: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """Sequences of ids as one int64 tensor, filled up on the right."""
    return pad_sequence([torch.as_tensor(sequence) for sequence in sequences], batch_first=True, padding_value=value)
