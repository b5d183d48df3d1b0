"""What the package says to its user: one logger, heard by default."""

from __future__ import annotations

import logging

logger = logging.getLogger("slowmo_hf")


def make_heard() -> None:
    """Show INFO lines even where nobody configured logging; a user's own handlers and levels are left alone."""
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("[slowmo_hf] %(message)s"))
        logger.addHandler(handler)
