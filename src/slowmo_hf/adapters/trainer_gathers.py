"""What a Trainer's training steps gather from all ranks: kept inside the worker where that is known to be right."""

from __future__ import annotations

import functools
import weakref
from contextlib import ExitStack
from typing import Any

import torch
from accelerate.utils.operations import recursively_apply
from transformers import Trainer

from .. import upstream
from ..log import logger
from ..training.outer_loop import OuterLoop
from .isolation import gather_inside
from .trainer_methods import Method, replace_method

# Of TRL: what they gather in a training step is for their logs alone, and all of it is averaged or counted there.
FOR_LOGS_ALONE = ("SFTTrainer", "DPOTrainer", "RewardTrainer")
_COUNTERS = ("num_tokens",)
_KEPT = (
    "%s gathers metrics at every step: between rounds each worker gathers its own, and they are averaged over workers "
    "(tokens: summed) where they are logged"
)
_LEFT = (
    "%s gathers over all ranks in its training steps: each step waits for the slowest rank, and counts that as "
    "communication. Rounds then save bytes, and no waiting"
)


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
        # Trainer keeps what an evaluation gathered with, and with it this object, also when training has ended.
        self._trainer: Trainer = weakref.proxy(trainer)
        self._outer_loop: OuterLoop = weakref.proxy(outer_loop)
        self._is_stepping = self._is_in_loss = self._is_inside = False
        self._said: set[str] = set()
        self._are_for_logs = _loss_of_trl(trainer) in FOR_LOGS_ALONE
        if not outer_loop.parts.trains_alone:
            return
        for name in ("gather", "gather_for_metrics", "reduce"):
            replace_method(trainer.accelerator, name, functools.partial(self._watched, name), given_back)
        replace_method(trainer, "training_step", functools.partial(self._noting, "_is_stepping", True), given_back)
        replace_method(trainer, "compute_loss", functools.partial(self._noting, "_is_in_loss", True), given_back)
        if callable(getattr(trainer, "compute_loss_func", None)):  # the user's own, which the loss calls
            its_own = functools.partial(self._noting, "_is_in_loss", False)
            replace_method(trainer, "compute_loss_func", its_own, given_back)
        replace_method(trainer, "log", self._in_summaries, given_back)

    def _noting(self, flag: str, inside: bool, method: Method) -> Method:
        @functools.wraps(method)
        def noted(*args: Any, **kwargs: Any) -> Any:
            before = getattr(self, flag)
            setattr(self, flag, inside)
            try:
                return method(*args, **kwargs)
            finally:
                setattr(self, flag, before)

        return noted

    def _watched(self, name: str, gather: Method) -> Method:
        @functools.wraps(gather)
        def watched(*args: Any, **kwargs: Any) -> Any:
            # An evaluation that a callback asks for in here is none of training.
            if self._is_inside or not (self._is_stepping and self._is_training):
                return gather(*args, **kwargs)
            if self._are_for_logs and self._is_in_loss and name != "reduce":
                self._say(_KEPT)
                return self._inside_the_worker(*args, **kwargs)
            self._say(_LEFT)
            self._outer_loop.parts.own_collectives.is_said = True
            self._is_inside = True  # one calls another
            try:
                with self._outer_loop.account.communicating():
                    return gather(*args, **kwargs)
            finally:
                self._is_inside = False

        return watched

    @property
    def _is_training(self) -> bool:
        return self._trainer.model is not None and self._trainer.model.training

    def _inside_the_worker(self, data: Any, *args: Any, **kwargs: Any) -> Any:
        group = self._outer_loop.workers.gradients.group
        return recursively_apply(lambda t: gather_inside(t, group), data)  # type: ignore[no-untyped-call]

    def _say(self, words: str) -> None:
        if words not in self._said:
            logger.warning(words, self._trainer.__class__.__name__)
        self._said.add(words)

    def _in_summaries(self, log: Method) -> Method:
        @functools.wraps(log)
        def tell(logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
            # Trainer's own speed, of an evaluation or the run, on all ranks.
            if any(name.endswith("_runtime") and f"{name[:-8]}_steps_per_second" in logs for name in logs):
                self.bring_together()
            log(logs, *args, **kwargs)

        return tell

    def bring_together(self) -> None:
        """Metrics of all workers, where all ranks are about to log. Collective."""
        metrics = upstream.trl_metrics(self._trainer)
        if not self._are_for_logs or metrics is None or _KEPT not in self._said:
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


def _loss_of_trl(trainer: Trainer) -> str:
    """The class of TRL whose loss it trains with; empty where a subclass has a loss, or a part of it, of its own."""
    cls = type(trainer)
    names = [name for name in ("compute_loss", "_compute_loss") if hasattr(cls, name)]
    owners = [next(one for one in cls.__mro__ if name in vars(one)) for name in names]
    return owners[0].__name__ if all(one.__module__.split(".")[0] == "trl" for one in owners) else ""


def average_tokens_inside(trainer: Trainer, group: Any, given_back: ExitStack) -> None:
    """
    Trainer would gather the token count of all ranks at every step, and scale the loss for gradients averaged over
    them. Gradients are averaged inside the worker alone: so are the counts of its processes, and a loss that is a sum
    over tokens divided by the mean count is averaged to the sum over the worker's tokens by their number.

    Args:
        group (`dist.ProcessGroup`, *optional*): The worker's processes; None where it has one.
        given_back (`ExitStack`): What gives the argument back.
    """
    args = trainer.args
    if args.average_tokens_across_devices and group is not None:
        replace_method(
            trainer, "get_batch_samples", functools.partial(_counting_inside, group, args.device), given_back
        )
        logger.info("average_tokens_across_devices averages inside each worker in training steps")
    elif args.average_tokens_across_devices and args.world_size > 1:
        logger.info("average_tokens_across_devices is switched off in training steps, where it gathers at each")
    given_back.callback(setattr, args, "average_tokens_across_devices", args.average_tokens_across_devices)
    args.average_tokens_across_devices = False


def _counting_inside(group: Any, device: torch.device, get_batch_samples: Method) -> Method:
    @functools.wraps(get_batch_samples)
    def counting_inside(*args: Any, **kwargs: Any) -> Any:
        samples, count = get_batch_samples(*args, **kwargs)
        if count is not None:
            count = gather_inside(torch.as_tensor(count, device=device), group).float().mean()
        return samples, count

    return counting_inside
