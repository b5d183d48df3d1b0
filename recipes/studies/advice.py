"""Errors of the recipes' data, with one flag of the program that runs in the place of the recipe's flags."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from records import DataError

# The last sentence of a recipe's error: its flags, which the program may lack, behind what mends the data itself.
_LAST = re.compile(
    r"(?P<said>.*)\. "
    r"(?:(?P<mend>(?:Accept|Add|Exchange|Fill|Mend|Move|Put|Rename|Sort) .*?)[,;] or (?:set|say)|Set|Leave) .*",
    re.DOTALL,
)


@contextmanager
def advised(advice: str) -> Iterator[None]:
    """
    Args:
        advice (`str`): To what the program's flag is to be set, such as "--dataset_name to a folder with ...".

    Raises:
        DataError: As the recipe says it; what mends the data stays, and `advice` comes behind.
    """
    try:
        yield
    except DataError as error:
        found = _LAST.fullmatch(str(error))
        said, mend = (found["said"], found["mend"]) if found else (str(error).removesuffix("."), None)
        raise DataError(f"{said}. {f'{mend}, or set' if mend else 'Set'} {advice}") from error
