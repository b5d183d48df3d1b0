"""
That a folder of `multi30k_oracle.py` holds one run: what was left of another is not taken for it. Both of its halves
import this file; fairseq's has nothing of the project beside it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


class OtherRunError(ValueError):
    """A file is of another run; the message names the folder, both runs and the way out."""


def identity(given: dict[str, Any]) -> dict[str, Any]:
    """Of what fairseq is given: the run's settings, and the digest of them and all tokens, batches and rates."""
    return {"run": given["run"], "sha256": hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()}


OTHER_FOLDER = "Take another folder as OUT, or ask for the run that this one holds."


def check_same_run(
    held: dict[str, Any] | None, asked: dict[str, Any], file: Path, way_out: str = OTHER_FOLDER
) -> None:
    """
    Raise `OtherRunError` where a file is of another run.

    Args:
        held (`dict`, *optional*): Identity that the file has; None of one that was written before files had any.
        asked (`dict`): Identity of the run that is asked for.
        file (`Path`): Where it lies.
        way_out (`str`, *optional*): How the error ends.
    """
    if held == asked:
        return
    run, wanted = (held or {"run": {}})["run"], asked["run"]
    differing = [name for name in wanted if run.get(name) != wanted[name]] if held else []
    words = _words(run, differing) or ("the same settings with other data or batches" if held else "an unknown run")
    told = _words(wanted, differing or ["base", "inner_lr", "seed"])
    raise OtherRunError(
        f"{str(file.parent)!r} must hold one run, got {file.name} of {words}, where {told} is asked for. {way_out}"
    )


def _words(run: dict[str, Any], names: list[str]) -> str:
    return ", ".join(f"{name}={run.get(name)!r}" for name in names)
