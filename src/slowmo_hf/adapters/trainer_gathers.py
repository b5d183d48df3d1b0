"""What a Trainer's training steps gather from all ranks: kept inside the worker where that is known to be right."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from accelerate.utils.operations import recursively_apply
from transformers import Trainer

from .. import upstream
from ..log import logger
from ..training.outer_loop import OuterLoop
from .trainer_methods import replace_method

# Of TRL: what they gather in a training step is for their logs alone, and all of it is averaged or counted there.
FOR_LOGS_ALONE = ("SFTTrainer", "DPOTrainer", "RewardTrainer")
_COUNTERS = ("num_tokens",)


class TrainerGathers:
    """
    The gathers of training steps, from the start of training to its end. A collective of all ranks at every step makes
    each wait for the slowest. TRL's trainers of `FOR_LOGS_ALONE` gather inside the worker, and their metrics are
    brought together where all ranks log; what others gather stays as it is, is said once, and counts as communication.

    Args:
        trainer (`Trainer`): That trains.
        outer_loop (`OuterLoop`): Started.
        given_back (`ExitStack`): What gives the accelerator back as it was.
    """

    def __init__(self, trainer: Trainer, outer_loop: OuterLoop, given_back: ExitStack) -> None:
        self._trainer, self._outer_loop = trainer, outer_loop
        self._is_stepping = self._is_inside = self._is_said = False
        self._are_for_logs = _defines_its_loss(trainer) in FOR_LOGS_ALONE
        if outer_loop.workers.count == 1 or not outer_loop.parts.meets_others:
            return
        for name in ("gather", "gather_for_metrics", "reduce"):
            replace_method(trainer.accelerator, name, functools.partial(self._watched, name), given_back)
        replace_method(trainer, "log", self._at_the_end, given_back)

    def step_begins(self) -> None:
        """Forward and backward passes follow."""
        self._is_stepping = True

    def step_ends(self) -> None:
        """They are done; evaluations and logs gather as ever."""
        self._is_stepping = False

    def _watched(self, name: str, gather: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(gather)
        def watched(*args: Any, **kwargs: Any) -> Any:
            # An evaluation that a callback asks for in here is none of training.
            model = self._trainer.model
            if self._is_inside or not (self._is_stepping and model is not None and model.training):
                return gather(*args, **kwargs)
            if self._are_for_logs and name != "reduce":
                self._say(
                    "%s gathers metrics at every step: between rounds each worker gathers its own, and they are "
                    "averaged over workers (tokens: summed) where they are logged"
                )
                return self._inside_the_worker(*args, **kwargs)
            self._say(
                "%s gathers over all ranks in its training steps: each step waits for the slowest rank, and counts "
                "that as communication. Rounds then save bytes, and no waiting"
            )
            self._is_inside = True  # one calls another
            try:
                with self._outer_loop.account.communicating():
                    return gather(*args, **kwargs)
            finally:
                self._is_inside = False

        return watched

    def _inside_the_worker(self, data: Any, use_gather_object: bool = False) -> Any:
        """As Accelerate gathers over the processes of a worker; one process has it already."""
        inside = self._outer_loop.workers.inside
        if inside.world_size == 1:
            return data
        if use_gather_object:
            return [one for its in inside.gather_objects(data) for one in its]

        def gather(tensor: torch.Tensor) -> torch.Tensor:
            mine = tensor.detach() if tensor.dim() else tensor.detach()[None]
            return torch.cat([its.to(tensor.device) for its in inside.gather_objects(mine.cpu())])

        return recursively_apply(gather, data)  # type: ignore[no-untyped-call]

    def _say(self, words: str) -> None:
        if not self._is_said and self._outer_loop.workers.world.rank == 0:
            logger.warning(words, type(self._trainer).__name__)
        self._is_said = True

    def _at_the_end(self, log: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(log)
        def at_the_end(logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
            if "train_runtime" in logs:  # the run's summary, with what is left since the last log
                self.bring_together()
            log(logs, *args, **kwargs)

        return at_the_end

    def bring_together(self) -> None:
        """Metrics of all workers, where all ranks are about to log. Collective."""
        metrics = upstream.metrics_in_training(self._trainer)
        if not self._are_for_logs or metrics is None or not self._is_said:
            return
        with self._outer_loop.account.paused(), self._outer_loop.account.apart():
            everywhere = self._outer_loop.workers.world.gather_objects(
                {name: (sum(values) / len(values), len(values)) for name, values in metrics.items() if values}
            )
        size = self._outer_loop.workers.size
        for name in sorted(set().union(*everywhere)):
            found = [its[name] for its in everywhere if name in its]
            if name in _COUNTERS:
                metrics[name] = [sum(value for value, _ in found) / size]
            else:
                metrics[name] = [sum(value * n for value, n in found) / sum(n for _, n in found)]


def _defines_its_loss(trainer: Trainer) -> str:
    """The class of TRL whose loss it trains with; empty where a subclass has a loss of its own."""
    cls = next(one for one in type(trainer).__mro__ if "compute_loss" in vars(one))
    return cls.__name__ if cls.__module__.split(".")[0] == "trl" else ""
