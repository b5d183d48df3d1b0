"""Data sets of the Hub and of a folder as every recipe reads them: what goes wrong ends in one line with a way out."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets

from records import DataError

# What is behind a split's name in that of a shard: its number, and of how many; older sets have a digest behind.
SHARD = re.compile(r"[.-](\d+)(?:-of-(\d+)(?:-[0-9a-f]+)?)?")


def check_one_split(folder: Path, names: Sequence[str], flag: str) -> None:
    """
    A split is one file, or numbered shards: `train-00000-of-00002.parquet` and its like, or `train-0.jsonl` and on.
    `train.parquet` and `train-small.parquet` are two sets, and nobody would see that they were joined.

    Args:
        folder (`Path`): The value of --dataset_name.
        names (`Sequence[str]`): Of its files, those whose names begin with the split's, up to the first `.` or `-`.
        flag (`str`): What asked for the split, for the error.

    Raises:
        DataError: Of several files some are no shards, or not of one set.
    """
    shards = [SHARD.fullmatch(re.sub("^[^.-]*", "", Path(name).stem)) for name in names]
    numbers = sorted(int(shard[1]) for shard in shards if shard)
    first, last = (numbers[0], numbers[-1]) if numbers else (0, 0)
    in_turn = first <= 1 and numbers == list(range(first, last + 1))
    of_one = {shard[2] for shard in shards if shard}
    if len(names) > 1 and (None in shards or len(of_one) > 1 or (None in of_one and not in_turn)):
        raise DataError(
            f"{flag} must be one file, or shards such as train-00000-of-00002, got {', '.join(sorted(names)[:4])} in "
            f"{str(folder)!r}: nothing says that these are one set. Move the others away or rename them, or set "
            f"--{flag}."
        )


def from_folder(folder: Path, load: Callable[[], Any], files: str = "") -> Any:
    """
    What `load` reads.

    Args:
        folder (`Path`): The value of --dataset_name.
        load (`Callable`): Reads it.
        files (`str`, *optional*, defaults to `""`): Which of its files, for the error.

    Raises:
        DataError: It failed.
    """
    try:
        return load()
    except Exception as error:  # datasets lets through errors of many libraries; what went wrong is often in the cause
        cause = error.__cause__ or error
        raise DataError(
            f"dataset_name={str(folder)!r}{files} cannot be read: {type(cause).__name__}: {cause}. Mend its files, or "
            "set --dataset_name."
        ) from error


def from_hub(name: str, config: str | None, flag: str, *, offline: str, otherwise: str, **settings: Any) -> Any:
    """
    A set of the Hub.

    Args:
        name (`str`): Its name there.
        config (`str`, *optional*): Its configuration.
        flag (`str`): What asked for it, for the error.
        offline (`str`): The way out where the Hub is not reachable.
        otherwise (`str`): The way out of other errors.
        settings: Further arguments of `datasets.load_dataset`.

    Raises:
        DataError: It is gated, the Hub is not reachable, or loading failed.
    """
    try:
        return datasets.load_dataset(name, config, **settings)
    except Exception as error:  # as of a folder
        what = f"{flag} needs {name!r}{f' ({config})' if config else ''}, which cannot be loaded: "
        causes = (error, error.__cause__, error.__context__)
        if "gated" in str(error):
            said = (
                f"it is gated. Accept its terms at https://huggingface.co/datasets/{name}, then set HF_TOKEN or run "
                f"`hf auth login`; or set --{flag}."
            )
        elif any(isinstance(cause, ConnectionError | TimeoutError) for cause in causes):
            said = f"the Hub is not reachable ({type(error).__name__}: {error}). {offline}"
        else:
            said = f"{type(error).__name__}: {str(error).rstrip('.')}. {otherwise}"
        raise DataError(what + said) from error
