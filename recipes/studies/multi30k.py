"""
One run of `reproduce.py --task multi30k`: English-German image captions, a task with published BLEU.

The data (29,000 / 1,014 / 1,000 pairs, Elliott et al., 2016, https://aclanthology.org/W16-3210) are not shipped: their
licence is unclear.
"""

from __future__ import annotations

from records import DataError
from studies import small_translation
from studies.small_translation import Size, Translations
from translation.data import TEST2016_ROWS

LIBRARIES = small_translation.LIBRARIES
SIZE = Size("small", 8000, 128)  # no pair is longer
ADVICE = "--dataset_name to another folder with all of Multi30k, its splits named train, validation and test."
SHA256 = "fb4d09956996f8fc8d4e04db8bb7a41f87e69c7a35b7a3879559c22b619e8573"  # of the text that the records are of
ROWS = {"train": 29_000, "validation": 1_014, "test": TEST2016_ROWS}

train = small_translation.train


def load(dataset_name: str | None) -> Translations:
    """
    From a folder; raises `DataError` where it is not all of Multi30k: figures would not be comparable. A printed line
    says where its text is not that of the records: test2017, say, has as many pairs.
    """
    if dataset_name is None:
        raise DataError(
            "dataset_name must be a folder with Multi30k's train, validation and test pairs (Parquet, or text files "
            "such as train.en and train.de), got None: it is not shipped. Set --dataset_name."
        )
    data = small_translation.load(dataset_name, SIZE, ADVICE)
    for name, rows in ROWS.items():
        found = len(getattr(data, name).rows)
        if found != rows:
            raise DataError(
                f"dataset_name must be all of Multi30k (test2016), {rows:,} pairs in {name} of at most "
                f"{SIZE.max_length} tokens a side, got {found:,} in {dataset_name!r}: BLEU would not be comparable. "
                "Set --dataset_name."
            )
    if data.sha256 != SHA256:
        print(
            f"{dataset_name}: its text has SHA-256 {data.sha256[:12]}, that of the records here {SHA256[:12]}. Where "
            "its test set is not the raw text of test2016, its BLEU is not comparable with theirs."
        )
    return data
