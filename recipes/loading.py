"""Data sets of the Hub and of a folder as every recipe reads them: what goes wrong ends in one line with a way out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets

from records import DataError


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
