"""What Trainer's log tells of rounds and workers: it goes into the entries of Trainer's own loss."""

from __future__ import annotations

import functools
import math
import weakref
from contextlib import ExitStack
from typing import Any

import torch

from ..training.outer_loop import OuterLoop
from ..training.report import RoundReport
from .trainer_methods import Method, replace_method

MOST_WORKERS = 16  # that have a loss of their own in an entry


class RoundLogs:
    """
    What rounds report goes into the entries of Trainer's own loss, and what is left into that of the run's end. An
    entry apart would empty what a subclass gathers for the loss's (`mean_token_accuracy` and others of TRL). Beside
    it, where workers train alone, every worker's own mean loss since the last entry.
    """

    def __init__(self) -> None:
        self.rounds: list[RoundReport] = []  # since the last entry

    def begin(self, trainer: Any, outer_loop: OuterLoop, given_back: ExitStack) -> None:
        """From here to the end `trainer.log` tells them."""
        self.rounds = []
        self._losses = WorkerLosses(trainer, outer_loop, given_back) if outer_loop.parts.trains_alone else None
        replace_method(trainer, "log", self._telling, given_back)

    def _telling(self, log: Method) -> Method:
        @functools.wraps(log)
        def call(logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
            ours = self._take() if "loss" in logs or "train_runtime" in logs else {}
            is_trainers = "loss" in logs and "learning_rate" in logs  # a program may log losses of its own
            if is_trainers and self._losses is not None:
                ours |= self._losses.take()
            if "train_runtime" not in logs:
                for name in [name for name in logs if name.startswith("slowmo/")]:
                    del logs[name]  # of a dict that the program logs again
                logs.update(ours)  # and they stay: callbacks may keep what they are given
                log(logs, *args, **kwargs)
                return
            entry = {**logs, **ours}
            log(entry, *args, **kwargs)
            logs.clear()  # `train` returns what Trainer and its callbacks have made of it
            logs.update({name: value for name, value in entry.items() if name not in ours})

        return call

    def _take(self) -> dict[str, float]:
        """Sums of bytes and seconds, the last round's norms; empty without a round."""
        rounds, self.rounds = self.rounds, []
        if not rounds:
            return {}
        logs = rounds[-1].to_logs()
        logs["slowmo/bytes_sent"] = sum(r.bytes_sent for r in rounds)
        logs["slowmo/seconds"] = sum(r.seconds for r in rounds)
        measured = [r.utilisation for r in rounds if r.utilisation is not None]
        if measured:
            logs["slowmo/utilisation"] = sum(measured) / len(measured)
        return logs


class WorkerLosses:
    """
    Every worker's mean loss since the last entry of Trainer's log. It rides in the status exchange with which all
    ranks meet before they gather for that entry.

    Args:
        trainer (`Trainer`): That trains.
        outer_loop (`OuterLoop`): Started.
        given_back (`ExitStack`): What gives `training_step` back as it was.
    """

    def __init__(self, trainer: Any, outer_loop: OuterLoop, given_back: ExitStack) -> None:
        self._trainer, self._outer_loop = weakref.proxy(trainer), outer_loop  # the callback is its own
        self._sum: torch.Tensor | float = 0.0
        self._logged_at = trainer.state.global_step
        replace_method(trainer, "training_step", self._adding, given_back)
        outer_loop.status.own_loss = self._mean
        given_back.callback(setattr, outer_loop.status, "own_loss", lambda: math.nan)

    def _adding(self, training_step: Method) -> Method:
        @functools.wraps(training_step)
        def step(*args: Any, **kwargs: Any) -> Any:
            loss = training_step(*args, **kwargs)
            self._add(loss.detach())
            return loss

        return step

    def _add(self, loss: torch.Tensor) -> None:
        """
        As Trainer adds it up, in fp32: with `logging_nan_inf_filter` one that is not finite counts as the mean so far.
        """
        loss = loss.float()
        if self._trainer.args.logging_nan_inf_filter:
            so_far = self._sum / (1 + self._trainer.state.global_step - self._logged_at)
            loss = torch.where(torch.isfinite(loss), loss, so_far)
        self._sum = self._sum + loss

    def _mean(self) -> float:
        # In the event of a step that ends Trainer has not counted it, and the clock has.
        steps = self._outer_loop.attempted_steps - self._logged_at
        return float(self._sum) / steps if steps else math.nan

    def take(self) -> dict[str, float]:
        """For an entry; empty where the last exchange was of another step, or ranks have taken unequally many."""
        status = self._outer_loop.status
        step, by_rank = status.losses
        self._sum, self._logged_at = 0.0, self._trainer.state.global_step
        if step != self._logged_at or status.somebody_ended_early:
            return {}
        size = self._outer_loop.workers.size
        losses = [sum(by_rank[first : first + size]) / size for first in range(0, len(by_rank), size)]
        if len(losses) <= MOST_WORKERS:
            return {f"slowmo/loss_worker_{worker}": loss for worker, loss in enumerate(losses)}
        least, most = min(losses), max(losses)
        return {
            "slowmo/loss_mean": sum(losses) / len(losses),
            **{"slowmo/loss_min": least, "slowmo/loss_min_worker": losses.index(least)},
            **{"slowmo/loss_max": most, "slowmo/loss_max_worker": losses.index(most)},
        }
