"""Sentence pairs for `translation.py`: three sets of them, their columns, lines and languages."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc

from records import DataError
from translation.sources import WMT, Languages, from_hub, load_splits

SHIPPED_NAME = "en_de_help (shipped; BLEU on it is not comparable with WMT's)"
# WMT's English-German test sets on the Hub: set, split, rows. sacrebleu calls 2014's `wmt14/full`; its `wmt14` has
# 2,737 rows.
NEWSTESTS = {
    "newstest2013": ("wmt/wmt14", "validation", 3000),
    "newstest2014": ("wmt/wmt14", "test", 3003),
    "newstest2015": ("wmt/wmt16", "validation", 2169),
    "newstest2016": ("wmt/wmt16", "test", 2999),
}
FILTERED = {"newstest2014": 2737}
TEST2016_ROWS = 1000  # of Multi30k, under either of its names
PROTOCOL_ROWS = {
    **{name: rows for name, (_, _, rows) in NEWSTESTS.items()},
    **dict.fromkeys(("test2016", "test_2016_flickr"), TEST2016_ROWS),
}
# Frequent words of one language alone, to find languages that are swapped. `die`, `in` and `was` are of both.
WORDS = {
    "en": frozenset(["the", "of", "and", "to", "is", "for", "with", "that", "you", "are"]),
    "de": frozenset(["der", "das", "und", "ist", "nicht", "ein", "eine", "mit", "von", "zu"]),
}
LOOKED_AT, LEAST_WORDS = 1000, 50


@dataclass
class Corpus:
    """Sentence pairs. Each set has the text columns `source` and `target`; none of its lines is empty."""

    name: str
    train: datasets.Dataset
    validation: datasets.Dataset
    test: datasets.Dataset
    validation_set: str
    test_set: str
    source_lang: str
    target_lang: str
    empty_train_rows: int

    @property
    def shipped(self) -> bool:
        """Whether this is the help text, whose BLEU is not comparable with WMT's."""
        return self.name == SHIPPED_NAME

    def sha256(self) -> dict[str, str]:
        """
        By split, of the sentences that are used, all sources and then all targets. Where none was left out, that is
        `cat train.en train.de | head -c -1 | sha256sum` of text files.
        """
        sets = {"validation": self.validation, "test": self.test}
        evaluated = {name: sha256_of(_column(rows, "source", "target")) for name, rows in sets.items()}
        return {"train": self.train_sha256, **evaluated}

    @functools.cached_property
    def train_sha256(self) -> str:
        """As `sha256`, of the training sentences alone: millions are read once."""
        return sha256_of(_column(self.train, "source", "target"))


def sha256_of(sentences: Iterable[str]) -> str:
    """Of the sentences in UTF-8, with line feeds between."""
    digest, between = hashlib.sha256(), ""
    for sentence in sentences:
        digest.update((between + sentence).encode())
        between = "\n"
    return digest.hexdigest()


def _column(rows: datasets.Dataset, *columns: str) -> Iterator[str]:
    """Sentences of one column after the other."""
    for column in columns:
        for batch in rows.select_columns([column]).iter(10_000):
            yield from batch[column]


def load_corpus(
    dataset_name: str | None = None,
    dataset_config: str | None = None,
    *,
    source_lang: str = "en",
    target_lang: str = "de",
    translation_column: str = "translation",
    train_split: str = "train",
    validation_set: str | None = None,
    test_set: str | None = None,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
) -> Corpus:
    """
    Load sentence pairs to train on, to validate and to test with.

    Args:
        dataset_name (`str`, *optional*): A name on the Hub, or a folder: a saved DatasetDict; Parquet or JSON-lines
            files whose names start with their split's; or one text file per language, `<split>.<language>`, line by
            line. None: the shipped help text.
        dataset_config (`str`, *optional*): Configuration on the Hub, such as `de-en`; for `wmt/*` the pair's own.
        source_lang (`str`), target_lang (`str`): Keys in the translation column, or columns, or ends of the text
            files' names.
        translation_column (`str`, *optional*, defaults to `"translation"`): Column of `{language: sentence}`; where
            there is none, columns named after the languages are taken.
        train_split (`str`, *optional*, defaults to `"train"`): Split to train on.
        validation_set (`str`, *optional*), test_set (`str`, *optional*): A split of the same set, or one of
            `NEWSTESTS`. None: newstest2013 and newstest2014 for English-German from `wmt/*` (Ott et al., 2018), else
            the splits validation and test.
        max_train_samples (`int`, *optional*), max_eval_samples (`int`, *optional*): Only the first rows.

    Raises:
        DataError: No such set, no Hub, terms not accepted, or a split, column or language that is not there; lines
            that are empty, or not as many in both languages; languages that are swapped, or one of them twice; a test
            set that is not whole. Lines that do not translate each other are not found.
    """
    if source_lang == target_lang:
        raise DataError(
            f"source_lang and target_lang must differ, got {source_lang!r} for both. Set --source_lang or "
            "--target_lang."
        )
    languages = Languages(source_lang, target_lang, translation_column)
    protocol = dataset_name in WMT and {source_lang, target_lang} == {"en", "de"}
    validation_set = validation_set or ("newstest2013" if protocol else "validation")
    test_set = test_set or ("newstest2014" if protocol else "test")
    splits = load_splits(dataset_name, dataset_config, languages)
    train, empty = _train_rows(_pick(splits, train_split, "train_split"), languages, train_split, max_train_samples)
    return Corpus(
        name=SHIPPED_NAME if dataset_name is None else dataset_name,
        train=train,
        validation=_eval_rows(splits, validation_set, "validation_set", languages, max_eval_samples),
        test=_eval_rows(splits, test_set, "test_set", languages, max_eval_samples),
        validation_set=validation_set,
        test_set=test_set,
        source_lang=source_lang,
        target_lang=target_lang,
        empty_train_rows=empty,
    )


# ---- the three sets ----


def _train_rows(
    rows: datasets.Dataset, languages: Languages, split: str, limit: int | None
) -> tuple[datasets.Dataset, int]:
    """Pairs without an empty side, and how many had one."""
    rows = _first(_pairs(rows, languages, "train_split"), limit, "max_train_samples")
    empty = _empty(rows)
    if empty.all():
        raise DataError(
            f"train_split must hold sentence pairs, got {split!r}, whose {len(rows)} rows are all empty. Set "
            "--train_split."
        )
    _check_languages(rows, languages, "train_split", split)
    return (rows.select(np.flatnonzero(~empty)) if empty.any() else rows), int(empty.sum())


def _eval_rows(
    splits: Mapping[str, Any], name: str, flag: str, languages: Languages, limit: int | None
) -> datasets.Dataset:
    """A split of the training set, or a test set of WMT; every row counts in BLEU, so none is left out."""
    own = name in splits or name not in NEWSTESTS
    rows = _pairs(_pick(splits, name, flag) if own else _load_newstest(name, flag, languages), languages, flag)
    _check_length(rows, name, flag, languages)
    rows = _first(rows, limit, "max_eval_samples")
    empty = np.flatnonzero(_empty(rows))
    if len(empty) or not len(rows):
        first = f"{len(empty)} empty lines, the first in row {empty[0]}" if len(empty) else "no rows"
        raise DataError(f"{flag} must hold sentence pairs, got {name!r} with {first}. Mend it, or set --{flag}.")
    _check_languages(rows, languages, flag, name)
    return rows


def _check_length(rows: datasets.Dataset, name: str, flag: str, languages: Languages) -> None:
    """What has a published set's name, here or on the Hub, must be all of it."""
    expected = PROTOCOL_ROWS.get(name)
    if name in NEWSTESTS and {languages.source, languages.target} != {"en", "de"}:
        return
    if expected not in (None, len(rows)):
        filtered = " (its filtered version, sacrebleu's wmt14)" if FILTERED.get(name) == len(rows) else ""
        raise DataError(
            f"{flag} {name} must have {expected:,} rows, got {len(rows):,}{filtered}: BLEU would not be comparable. "
            f"Set --{flag} to the whole set, or rename this one and set --{flag} to its name."
        )


def _load_newstest(name: str, flag: str, languages: Languages) -> datasets.Dataset:
    if {languages.source, languages.target} != {"en", "de"}:
        raise DataError(
            f"{flag}={name} is English and German, got {languages.source} and {languages.target}. Set --{flag} to a "
            "split of your data."
        )
    hub_name, split, _ = NEWSTESTS[name]
    rows: datasets.Dataset = from_hub(hub_name, "de-en", flag, split=split)
    return rows


def _pick(splits: Mapping[str, Any], name: str, flag: str) -> datasets.Dataset:
    if name not in splits:
        others = "" if flag == "train_split" else f", or of {list(NEWSTESTS)}"
        raise DataError(f"{flag} must be one of the splits {list(splits)}{others}, got {name!r}. Set --{flag}.")
    found = splits[name]
    return found(flag) if callable(found) else found


def _first(rows: datasets.Dataset, limit: int | None, flag: str) -> datasets.Dataset:
    if limit is not None and limit < 1:
        raise DataError(f"{flag} must be >= 1 row, got {limit}. Leave --{flag} out to use all.")
    return rows if limit is None else rows.select(range(min(limit, len(rows))))


# ---- columns, lines, languages ----


def _pairs(rows: datasets.Dataset, languages: Languages, flag: str) -> datasets.Dataset:
    """Only the columns `source` and `target`."""
    prefix = f"{languages.column}." if languages.column in rows.column_names else ""
    if not prefix and not {languages.source, languages.target} <= set(rows.column_names):
        raise DataError(
            f"translation_column must be one of the columns {rows.column_names} of --{flag}, got "
            f"{languages.column!r}, and there are no columns {languages.source!r} and {languages.target!r} either. "
            "Set --translation_column, or --source_lang and --target_lang."
        )
    kind = rows.features[languages.column] if prefix else None
    if prefix and not isinstance(kind, dict | datasets.Translation):
        raise DataError(f"translation_column must hold {{language: sentence}}, got {kind}. Set --translation_column.")
    rows = rows.flatten()
    there = sorted(name.removeprefix(prefix) for name in rows.column_names if name.startswith(prefix))
    for setting, language, column in (
        ("source_lang", languages.source, "source"),
        ("target_lang", languages.target, "target"),
    ):
        if language not in there:
            raise DataError(f"{setting} must be one of the languages {there}, got {language!r}. Set --{setting}.")
        kind = rows.features[prefix + language]
        if getattr(kind, "dtype", None) not in ("string", "large_string"):
            raise DataError(f"{setting} must name text, got {language!r} of type {kind}. Set --{setting}.")
        rows = rows.rename_column(prefix + language, column)
    return rows.select_columns(["source", "target"])


def _empty(rows: datasets.Dataset) -> np.ndarray:
    """Per row, whether a side is missing or white space only."""
    found = [np.zeros(0, dtype=bool)]
    for table in _parts(rows):
        sides = [pc.equal(pc.utf8_trim_whitespace(pc.fill_null(side, "")), "") for side in table.columns]
        found.append(pc.or_(*sides).to_numpy())
    return np.concatenate(found)


def _parts(rows: datasets.Dataset) -> Iterator[Any]:
    """Tables of `source` and `target`: not all at once, for every process of a machine looks through them."""
    return rows.select_columns(["source", "target"]).with_format("arrow").iter(100_000)


def _check_languages(rows: datasets.Dataset, languages: Languages, flag: str, split: str) -> None:
    """
    A column that was copied, or a text that was never translated, trains nothing. Swapped languages train the other
    direction, or test it: of English and German they are seen by frequent words, of others they are not.
    """
    same = sum(pc.sum(pc.fill_null(pc.equal(*table.columns), False)).as_py() for table in _parts(rows))
    kind = "training rows" if flag == "train_split" else f"rows of {flag} {split}"
    if same > len(rows) / 2:
        raise DataError(
            f"{languages.source} and {languages.target} must be different languages, got the same sentence on both "
            f"sides in {same} of {len(rows)} {kind}. Set --source_lang and --target_lang, or mend the data."
        )
    if {languages.source, languages.target} != set(WORDS):
        return
    first = rows.select(range(min(LOOKED_AT, len(rows))))
    sides = {languages.source: first["source"][:], languages.target: first["target"][:]}
    right = sum(_count_words(sides[language], language) for language in WORDS)
    swapped = _count_words(sides["en"], "de") + _count_words(sides["de"], "en")
    if swapped >= max(LEAST_WORDS, 5 * right):
        raise DataError(
            f"source_lang={languages.source} and target_lang={languages.target} must name the languages of the "
            f"{kind}, got the other way round: of their frequent words {swapped:,} are in the other's sentences, "
            f"{right:,} in their own, in the first {len(first):,} rows. Exchange the names of its files or columns, "
            f"or set --{flag} or --dataset_name."
        )


def _count_words(sentences: Iterable[str | None], language: str) -> int:
    return sum(word in WORDS[language] for sentence in sentences for word in (sentence or "").lower().split())
