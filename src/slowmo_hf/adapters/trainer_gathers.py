"""Training steps of TRL's trainers without their gathers: metrics stay in the worker until they are logged."""

from __future__ import annotations

import functools
from contextlib import ExitStack
from typing import Any

from accelerate.utils.operations import gather_object, recursively_apply

from .. import upstream
from ..log import logger
from ..wire.workers import Workers
from .isolation import gather_inside
from .trainer_methods import Method, replace_method

# Of TRL: those whose training steps gather for their metrics, and for nothing else.
GATHERING = ("SFTTrainer", "DPOTrainer", "RewardTrainer")


class LocalMetrics:
    """
    Keeps the gathers of a TRL trainer's training steps inside the worker. Where a loss is logged all ranks
    are there: what is logged is the mean of the workers' metrics, and the sum of their `num_tokens`.

    Args:
        trainer (`Trainer`): One of `GATHERING`, or a subclass of it; any other is left alone.
        workers (`Workers`): This worker's processes, and how many workers there are.
        given_back (`ExitStack`): What ends it.
    """

    def __init__(self, trainer: Any, workers: Workers, given_back: ExitStack) -> None:
        self._trainer, self._workers = trainer, workers
        self._in_step = False
        kinds = [kind.__name__ for kind in type(trainer).__mro__ if kind.__module__.split(".")[0] == "trl"]
        name = next((kind for kind in kinds if kind in GATHERING), None)
        if name is None or workers.count == 1:
            return
        logger.info(
            "%s gathers its metrics from all ranks at every step: they stay inside each worker until they are logged",
            name,
        )
        replace_method(trainer, "training_step", self._noting_the_step, given_back)
        for gather in ("gather", "gather_for_metrics"):
            replace_method(trainer.accelerator, gather, self._staying_inside, given_back)
        replace_method(trainer, "log", self._averaging, given_back)

    def _noting_the_step(self, training_step: Method) -> Method:
        @functools.wraps(training_step)
        def call(*args: Any, **kwargs: Any) -> Any:
            self._in_step = True
            try:
                return training_step(*args, **kwargs)
            finally:
                self._in_step = False

        return call

    def _staying_inside(self, gather: Method) -> Method:
        @functools.wraps(gather)
        def call(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            if not self._in_step or not self._trainer.model.training:  # an evaluation inside a step gathers
                return gather(tensor, *args, **kwargs)
            group = self._workers.gradients.group
            return recursively_apply(lambda t: gather_inside(t, group), tensor)  # type: ignore[no-untyped-call]

        return call

    def _averaging(self, log: Method) -> Method:
        @functools.wraps(log)
        def call(logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
            if any(name == "loss" or name.endswith("_runtime") for name in logs):  # Trainer's own, on all ranks
                self._average(upstream.trl_metrics(self._trainer))
            log(logs, *args, **kwargs)

        return call

    def _average(self, metrics: dict[str, list[float]]) -> None:
        """Collective over the job, beside Trainer's own gather of the loss."""
        own = {name: sum(values) / len(values) for name, values in metrics.items() if values}
        told: list[dict[str, float]] = gather_object([own])
        for name in own:
            values = [other[name] for other in told if name in other]
            mean = sum(values) / len(values)
            metrics[name] = [mean * self._workers.count if name == "num_tokens" else mean]
