"""A Trainer that evaluates or predicts before it trains: training is as without, where a stock one's ranks part."""

import tempfile

import pytest
import torch
from transformers import Trainer

from harness import run_workers
from slowmo_hf import SlowMoCallback, SlowMoConfig
from tiny import arguments, bert, equal, sentences, values

DATA = sentences(64)
FIRST = {
    "evaluate": lambda trainer: trainer.evaluate(),
    "predict": lambda trainer: trainer.predict(DATA[:8]),
    "evaluate, evaluate": lambda trainer: (trainer.evaluate(), trainer.evaluate(DATA[:4])),
    "another Trainer": lambda trainer: Trainer(trainer.model, trainer.args, eval_dataset=DATA[:8]).evaluate(),
}
LOGS = {"logging_strategy": "steps", "logging_steps": 1}
SETTINGS = {
    "local_sgd": ({}, {}),
    "sgp": ({"base": "sgp"}, {}),
    "all_reduce": ({"base": "all_reduce", "outer_momentum": 0.0}, {}),
    "bf16": ({}, {"bf16": True}),
    "compiled": ({}, {"torch_compile": True, "torch_compile_backend": "eager"}),
}


def trained(first, config, settings):
    """The weights, every step's loss, and an evaluation's behind it."""
    torch.compiler.reset()
    args = arguments(tempfile.mkdtemp(), max_steps=5, learning_rate=0.1, optim="sgd", **LOGS, **settings)
    callback = SlowMoCallback(SlowMoConfig(**{"sync_every": 2, **config}))
    trainer = Trainer(bert(), args, train_dataset=DATA, eval_dataset=DATA[:8], callbacks=[callback])
    if first is not None:
        FIRST[first](trainer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 5
    return values(trainer.model), losses, trainer.evaluate()["eval_loss"]


def both():
    found = {}
    for setting, (config, settings) in SETTINGS.items():
        right = trained(None, config, settings)
        for first in FIRST if setting == "local_sgd" else ["evaluate"]:
            weights, losses, loss = trained(first, config, settings)
            found[setting, first] = equal(weights, right[0]), (losses, loss) == right[1:], weights
    return found


@pytest.fixture(scope="module")
def ranks():
    return run_workers(both, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [("local_sgd", first) for first in FIRST] + [(setting, "evaluate") for setting in SETTINGS][1:], ids=str
)
def test_training_behind_an_evaluation_is_as_without(ranks, case):
    for same_weights, same_losses, weights in (rank[case] for rank in ranks):
        assert same_weights
        assert same_losses
        assert equal(weights, ranks[0][case][2]), "one model at the end"
