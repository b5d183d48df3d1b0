"""A run of Trainer followed by hand in fp32: local steps, rounds, the final average."""

from __future__ import annotations

import torch

from harness import patience
from slowmo_hf import SlowMoConfig
from tiny import (
    follow,
    mean,
)

TAU, STEPS = 3, 8
CONFIG = SlowMoConfig(sync_every=TAU, outer_momentum=0.5, timeout_seconds=patience(30))
EPS = 2.0**-23  # float32: twice what one rounding does, so enough for a mean, and for the anchors of two rounds


def assert_mean(value, results, name):
    """
    The workers' average, to float32's last digit: beside it, a displacement from the anchor is small, and so is its
    rounding.
    """
    torch.testing.assert_close(value.double(), mean(results, name), rtol=EPS, atol=EPS / 16)


def follow_float32(runs, config=CONFIG):
    """
    Rounds done. An anchor is rounded once per round, by EPS / 2, and the reference in float64 is not: the difference
    may add up.
    """
    rounds = len(runs[0]["after"]) // config.sync_every
    assert follow(runs, config, tolerance=max(2, rounds) * EPS / 2) == rounds
    return rounds
