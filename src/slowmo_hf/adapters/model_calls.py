"""
What a program asks of its model while an optimizer of ours trains it. `model.eval()` shows the last round's model,
without a message; `model.train()`, or a pass with gradients, gives the local weights back; a state dictionary that is
taken inside a round, in training mode, is one worker's own, which is said.

torch has no hook for `eval`, and a method of the model's own would be in its copies and pickles: `Module.train`,
`state_dict` and `load_state_dict` are wrapped, once per process, at the first start.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import Module

from .. import upstream
from ..training.modes import is_swapping
from ..training.outer_loop import OuterLoop
from .first_pass import is_recorded, listen, never_compiled


@never_compiled("_on_training_pass", "on_train", "on_eval", "on_state_dict", "on_load_state_dict", "say_once")
class ModelCalls:
    """
    Listens to the models of one optimizer, from its start on.

    Args:
        optimizer (`SlowMoOptimizer`): Started. It holds this listener, and is not held by it.
        models (`list[torch.nn.Module]`): Its models, without wrappers. What wraps them reaches them; their submodules
            alone change nothing.
    """

    def __init__(self, optimizer: Any, models: list[Module]) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._outer_loop: OuterLoop = optimizer.outer_loop
        self._models = [weakref.ref(_innermost(model)) for model in models]
        for key, listeners in list(_listening.items()):
            _listening[key] = [one for one in listeners if one() is not None]
            if not _listening[key]:
                del _listening[key]
        for model in self._models:
            _listening.setdefault(id(model()), []).append(weakref.ref(self))
        self._loaded_at: int | None = None  # the move at which the program loaded weights of its own choice
        self._stop_listening: Callable[[], object] = _nothing
        self._was_training = False  # before the last `model.eval()`
        self._evaluated = (0, 0)  # at which step, and how many steps in a row
        self._without_last_round = ""  # why it is not shown behind a view that had a `model.eval()` inside
        self._said: set[str] = set()
        _wrap_once()

    def holds(self, module: Module) -> bool:
        """Whether it is one of the models."""
        return any(model() is module for model in self._models)

    # ---- evaluation ----

    def on_eval(self, *, was_training: bool) -> None:
        """
        Show the last round's model, where workers may differ; inside a `consensus` block, behind it. Trainer shows the
        average, by `optimizer.eval()`.
        """
        consensus = self._outer_loop.consensus
        if upstream.is_called_by("evaluation_loop", "transformers.trainer"):
            return
        if consensus.then is not None:
            consensus.then = self._show_behind_view
            self._was_training |= was_training
        elif self._holds_local_weights:
            self._show_last_round()
            self._was_training = was_training

    def _show_behind_view(self) -> None:
        """Where that is an error, `model.eval()` was right inside the view: the next evaluation is told."""
        if not self._holds_local_weights:
            return
        try:
            self._show_last_round()
        except RuntimeError as error:
            self._without_last_round = str(error)
            self._listen()

    def _show_last_round(self) -> None:
        loop, clock = self._outer_loop, self._outer_loop.clock
        loop.consensus.show_last_round()
        self._listen()
        self._tell_rollouts(clock.attempted_steps)
        step = loop.consensus.last_round_step
        if not step and not clock.workers_agree:
            self.say_once(
                logging.WARNING,
                "model.eval() before the first round (sync_every=%d): every rank sees its own weights of step %d. "
                "`with slowmo_hf.consensus(optimizer):` shows the average of all.",
                loop.config.sync_every,
                clock.attempted_steps,
            )
            return
        self.say_once(
            logging.INFO,
            "model.eval() shows the model of the round of step %d (%d steps came after it), the same on all ranks; "
            "model.train() gives this worker's own weights back. `with slowmo_hf.consensus(optimizer):` shows the "
            "average of now.",
            step,
            clock.attempted_steps - step,
        )

    def _tell_rollouts(self, now: int) -> None:
        """An evaluation at every step may be none: what it makes is trained on."""
        at, in_a_row = self._evaluated
        if now != at:
            self._evaluated = now, in_a_row + 1 if now == at + 1 else 1
        if self._evaluated[1] == 3:
            self.say_once(
                logging.WARNING,
                "model.eval() at every step shows the last round's model. What training uses of its passes (rollouts, "
                "pseudo-labels, features) is that old: make it in training mode, or with the submodules alone in "
                "evaluation mode (for child in model.children(): child.eval(), of the model without wrappers).",
            )

    def on_train(self) -> None:
        """Local weights are back."""
        self._stop_listening()
        self._stop_listening, self._was_training, self._without_last_round = _nothing, False, ""
        consensus, view = self._outer_loop.consensus, self._outer_loop.view
        showed = view.is_of_last_round
        consensus.end_last_round()
        if showed and view.writes_kept and self._loaded_at != self._outer_loop.in_flight.moves:
            self.say_once(
                logging.WARNING,
                "between model.eval() and model.train() the program has written weights without load_state_dict, and "
                "has not put them back bit for bit: they stay, and what this worker has learned since the last round "
                "is lost, unless the program has a copy and puts it back now. To change weights for a while, put a "
                "copy back before model.train(), or do it inside `with slowmo_hf.consensus(optimizer):`.",
            )
        if consensus.then is not None:
            consensus.then = _nothing

    def on_forward(self, module: Module) -> None:
        """A pass behind `model.eval()`: with gradients it is one of training, and of the local weights."""
        # torch.compile compiles again when a value that is read here changes: evaluations read as few as can be.
        if not torch.is_grad_enabled():
            if self._without_last_round and self._counts(module):
                self.say_once(
                    logging.WARNING,
                    "model.eval() was called inside a consensus block, and this pass comes after it: every rank "
                    "evaluates its own weights. %s",
                    self._without_last_round,
                )
        elif self._counts(module):
            self._on_training_pass()

    def _on_training_pass(self) -> None:
        if not is_recorded():
            was_training = self._was_training
            self.on_train()
            if was_training:
                self.say_once(
                    logging.WARNING,
                    "a pass with gradients after model.eval(): it is made with this worker's own weights, as "
                    "training is. An evaluation belongs under torch.no_grad().",
                )

    def _listen(self) -> None:
        self._stop_listening()
        self._stop_listening = listen(self)

    def _counts(self, module: Module) -> bool:
        """Whether a pass through it is one of what is trained, and not of the average that is shown."""
        if self._outer_loop.consensus.shows_average:
            return False
        own = {id(param) for param in self._outer_loop.tensors.trainable}
        return any(id(param) in own for param in module.parameters())

    # ---- its state ----

    def on_state_dict(self) -> None:
        """Say, once, that this is one worker's own model, if it is."""
        loop = self._outer_loop
        if self._holds_local_weights and not loop.clock.workers_agree:
            self.say_once(
                logging.WARNING,
                "the model's state was taken in training mode at step %d, %d steps after the last round: it is rank "
                "%d's own, not the average. Save inside `with slowmo_hf.consensus(optimizer):`, or after "
                "slowmo_hf.finish(optimizer); after model.eval() it is the last round's.",
                loop.attempted_steps,
                loop.clock.local_steps,
                loop.workers.world.rank,
            )

    def on_load_state_dict(self) -> None:
        """What the program loads stays, until training goes on."""
        optimizer = self._optimizer()
        if optimizer is None or optimizer.awaits_a_checkpoint:
            return  # `accelerator.load_state`: every worker's own follow
        view = self._outer_loop.view
        if self._outer_loop.consensus.shows_average and not view.keeps_writes:
            return  # it goes with the view
        is_back = view.is_of_last_round and not view.changes()[0]
        self._loaded_at = None if is_back else self._outer_loop.in_flight.moves

    @property
    def _holds_local_weights(self) -> bool:
        """
        Whether the parameters are this worker's own, of several: not a view's, not the average at the end, and not
        what the program or `accelerator.load_state` has loaded.
        """
        loop, optimizer = self._outer_loop, self._optimizer()
        if optimizer is None or not loop.parts.trains_alone or loop.view.is_shown or optimizer.awaits_a_checkpoint:
            return False
        return not loop.in_flight.is_over and self._loaded_at != loop.in_flight.moves

    def say_once(self, level: int, words: str, *values: object) -> None:
        """In the life of this listener."""
        if words not in self._said:
            self._said.add(words)
            self._outer_loop.workers.logger.log(level, words, *values)


def _nothing() -> None:
    """Nobody listens."""


def _innermost(model: Any) -> Module:
    """Behind torch.compile."""
    inner = upstream.compiled_module(model)
    return model if inner is None else _innermost(inner)


# By the identity of their models: every submodule's `train` asks. In the order of their starts, which all ranks have:
# of two optimizers that share parameters the later one's last round is shown.
_listening: dict[int, list[weakref.ref[ModelCalls]]] = {}


def _listeners(module: Module) -> list[ModelCalls]:
    present = [listener() for listener in _listening.get(id(module), ()) if not is_swapping()]
    return [one for one in present if one is not None and one.holds(module)]


@functools.cache
def _wrap_once() -> None:
    train, state_dict, load_state_dict = Module.train, Module.state_dict, Module.load_state_dict

    @functools.wraps(train)
    def train_and_tell(self: Module, mode: bool = True) -> Module:
        listeners, was_training = _listeners(self), self.training
        if mode:
            for listener in listeners:
                listener.on_train()
        result = train(self, mode)
        if not mode:
            for listener in listeners:
                listener.on_eval(was_training=was_training)
        return result

    @functools.wraps(state_dict)
    def state_dict_and_tell(self: Module, *args: Any, **kwargs: Any) -> Any:
        for listener in _listeners(self):
            listener.on_state_dict()
        return state_dict(self, *args, **kwargs)

    @functools.wraps(load_state_dict)
    def load_and_tell(self: Module, *args: Any, **kwargs: Any) -> Any:
        listeners = [listener for module in self.modules() for listener in _listeners(module)]
        result = load_state_dict(self, *args, **kwargs)
        for listener in listeners:
            listener.on_load_state_dict()
        return result

    Module.train = train_and_tell  # type: ignore[method-assign,assignment]
    Module.state_dict = state_dict_and_tell  # type: ignore[method-assign]
    Module.load_state_dict = load_and_tell  # type: ignore[method-assign]
