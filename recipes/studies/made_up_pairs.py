"""
As many sentence pairs as WMT'16 English-German has, without its data: for `dry_run.py`, which asks what a size costs
and never what is learned.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from translation.data import load_corpus

# Different words of a side; more of them make the training of a BPE slower and larger. German has more: compounds.
WORDS = {"en": 800_000, "de": 1_600_000}
MEAN_WORDS, SPREAD = 18.0, 0.6  # of a sentence's length: its mean, and the standard deviation of its logarithm
LONGEST = 400  # words
EMPTY_EVERY = 10_000  # training rows; WMT's have some too
PART = 100_000  # pairs that are made at once
EVAL_ROWS = 3000
FILES = 3  # of the training split, as WMT'16 has on the Hub


def write_pairs(folder: Path, pairs: int, seed: int = 0) -> None:
    """
    Parquet as the Hub has WMT's: a column `translation` of `{"de": ..., "en": ...}`, training rows in three files,
    and 3,000 rows each to validate and to test.

    Words are the shipped help text's and, behind them, ends of these joined to beginnings; the r-th is drawn with
    probability 1 / r (Zipf). Sentences have log-normal lengths, and both sides of a pair similar ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    corpus = load_corpus().train
    sides = {"de": "target", "en": "source"}
    words = {
        side: _vocabulary(corpus[column][:], min(WORDS[side], 50 * pairs), generator) for side, column in sides.items()
    }
    share = -(-pairs // FILES)
    for number in range(FILES):
        rows = min(share, pairs - number * share)
        _write(folder / f"train-0000{number}-of-0000{FILES}.parquet", rows, words, generator, EMPTY_EVERY)
    for split in ("validation", "test"):
        _write(folder / f"{split}.parquet", min(EVAL_ROWS, pairs), words, generator, None)


def _vocabulary(sentences: list[str], size: int, generator: np.random.Generator) -> pa.Array:
    """The text's own words, most frequent first, then made-up ones."""
    counts = pc.value_counts(pa.array(word for sentence in sentences for word in sentence.split()))
    order = pc.sort_indices(counts.field("counts"), [("", "descending")])
    own = counts.field("values").take(order).to_pylist()
    half = [word for word in own if word.isalpha() and len(word) > 3]
    starts, ends = [word[: len(word) // 2 + 1] for word in half], [word[len(word) // 2 :] for word in half]
    made = dict.fromkeys(own)
    while len(made) < size:
        picked = generator.integers(len(half), size=(2, size))
        made |= dict.fromkeys(starts[first] + ends[second] for first, second in picked.T.tolist())
    return pa.array(list(made)[:size])


def _write(
    path: Path, rows: int, words: dict[str, pa.Array], generator: np.random.Generator, empty_every: int | None
) -> None:
    names = list(words)
    schema = pa.schema({"translation": pa.struct({name: pa.string() for name in names})})
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, max(rows, 0), PART):
            count = min(PART, rows - start)
            longer = generator.lognormal(np.log(MEAN_WORDS) - SPREAD**2 / 2, SPREAD, count)
            sides = []
            for name in names:
                lengths = np.clip(longer * generator.lognormal(0, 0.15, count), 1, LONGEST).astype(np.int64)
                if empty_every and name == names[0]:
                    lengths[(np.arange(start, start + count) + 1) % empty_every == 0] = 0
                sides.append(_sentences(lengths, words[name], generator))
            writer.write_table(pa.table([pa.StructArray.from_arrays(sides, names)], schema))


def _sentences(lengths: np.ndarray, words: pa.Array, generator: np.random.Generator) -> pa.Array:
    """Of `lengths` words each, drawn by rank: n ** u has density 1 / rank."""
    ranks = (len(words) ** generator.random(int(lengths.sum()))).astype(np.int64) - 1
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    return pc.binary_join(pa.ListArray.from_arrays(offsets, words.take(pa.array(ranks))), " ")
