"""A short run of translation in small, and its text."""

from __future__ import annotations

from pathlib import Path

import datasets

from studies.plan import Run
from translation.sources import SHIPPED

RUN = Run("table1", "translation", "local_sgd", 0.5, 0.02, seed=3, sync_every=3, workers=2, epochs=3, batch_size=80)


TINY = {"d_model": 16, "ffn": 32, "heads": 2, "layers": 1, "dropout": 0.0}  # in the place of the run's model


def write_pairs(path: Path) -> Path:
    """A few short pairs of the shipped text, and one that is too long in every split."""
    for split, count in (("train", 60), ("validation", 7), ("test", 5)):
        rows = [
            row["translation"]
            for row in datasets.Dataset.from_parquet(str(SHIPPED / f"{split}.parquet"), keep_in_memory=True)
        ]
        short = [row for row in rows if max(len(text.encode()) for text in row.values()) <= 30][:count]
        long = {language: " ".join([text] * 30) for language, text in short[0].items()}
        datasets.Dataset.from_dict({"translation": [*short, long]}).to_parquet(str(path / f"{split}.parquet"))
    return path
