"""Docstrings in the Hugging Face grammar, for mkdocstrings: type and default come from the signature."""

from __future__ import annotations

import re
from typing import Any

import griffe

# name (`type`, *optional*, defaults to `x`): -> name:
ARGUMENT = re.compile(r"^(\s+\*{0,2}\w+) \((?:`|\*optional\*).*?\):(?=\s|$)", re.MULTILINE)


class HuggingFaceGrammar(griffe.Extension):
    """Leaves the name of an argument, which griffe then looks up in the signature."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Any object that has a docstring."""
        if obj.docstring is not None:
            obj.docstring.value = ARGUMENT.sub(r"\1:", obj.docstring.value)
