"""
Runs of Trainer with SlowMoCallback. `Recorder` stands before it and keeps each worker's own weights; the tests average
them and compare with what evaluation, the saved files and the end of training hold.
"""

from __future__ import annotations

import time

from transformers import Trainer

from harness import patience
from slowmo_hf import SlowMoCallback, SlowMoConfig
from tiny import (
    Recorder,
    arguments,
    bert,
    recorded,
    sentences,
)

STEPS, TAU = 10, 4
CONFIG = SlowMoConfig(sync_every=TAU, outer_momentum=0.5, timeout_seconds=patience(30))


def bert_trainer(folder, config=CONFIG, before=(), after=(), model=None, **settings):
    """A PreTrainedModel with dropout on shuffled data."""
    settings = {"max_steps": STEPS, "learning_rate": 1e-2, **settings}
    return Trainer(
        model=model or bert(dropout=0.1),
        args=arguments(folder, **settings),
        train_dataset=sentences(),
        eval_dataset=sentences(8),
        callbacks=[*before, SlowMoCallback(config), *after],
    )


def run(folder, config=CONFIG, before=(), after=(), **settings):
    recorder = Recorder()
    trainer = bert_trainer(folder, config, [recorder, *before], after, **settings)
    trainer.train()
    return {
        **recorded(trainer, recorder),
        "log_history": trainer.state.log_history,
        "global_step": trainer.state.global_step,
    }


def error_of(call, *args, **kwargs):
    """(`Type: message` of what the call raises or "", seconds)."""
    start = time.perf_counter()
    try:
        call(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}", time.perf_counter() - start
    return "", time.perf_counter() - start
