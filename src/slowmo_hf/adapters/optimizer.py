"""SlowMoOptimizer: local training with rounds, for custom loops under Accelerate."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch

from .. import upstream
from ..config import SlowMoConfig
from ..dtensors import sharded_modules
from ..log import of_this_rank
from ..training.model_tensors import inner_lrs
from ..training.optimizers_inside import parameters_of
from ..training.outer_loop import OuterLoop
from ..training.program import compare_programs
from ..wire.job import is_in_process
from .exit_notice import tell_at_exit
from .first_pass import (
    is_before_prepare,
    is_recorded,
    listen,
    never_compiled,
    program_in_use,
    refuse_separate_gradients,
    trained_models,
    trains,
    trains_a_copy,
    unfrozen,
    whole_model,
)
from .fully_sharded import sharded_roots
from .given import ConfigInUse, Settings, config_of, what_is
from .held_apart import Averaging
from .isolation import Isolation, ddp_wrappers, refusal
from .model_calls import ModelCalls
from .optimizer_wrapper import OptimizerWrapper, with_own_hooks
from .other_optimizers import beside_another, note_start, tell_of_others
from .refusals import JoinRefusal, refuse_schedule_free, refuse_shared_state
from .stop_signals import StopSignals

_SLOW_STATE = "slowmo"
_BESIDE = "beside"
_DROPPED = (
    "torch.distributed.checkpoint keeps 'state' and 'param_groups' of an optimizer alone: the slow state (anchors, "
    "slow momentum) and the clock are not saved, and a run that loads this begins them anew. Use "
    "accelerator.save_state."
)


@never_compiled("_on_pass", "_start", "_go_on", "step", "train", "eval", "state_dict", "load_state_dict")
class SlowMoOptimizer(OptimizerWrapper):
    """
    Wraps an optimizer so that every worker trains alone for `sync_every` steps and then takes part in a round (SlowMo,
    https://huggingface.co/papers/1910.00643, Algorithm 1).

        model, optimizer, loader = accelerator.prepare(model, SlowMoOptimizer(optimizer, config), loader)

    and `slowmo_hf.finish(optimizer)` behind the loop is all there is to write. The first forward pass of a module with
    its parameters compares all ranks, gives them rank 0's values, takes the anchors and isolates the DDP wrapper.

    Args:
        inner_optimizer (`torch.optim.Optimizer`): The base optimizer, over this worker's parameters.
        config (`SlowMoConfig` or `dict`, *optional*): The settings, or fields of it by name: `sync_every=24`.

    Raises:
        TypeError, ValueError: The optimizer cannot be wrapped (docs/compatibility.md), or a setting is wrong.
    """

    config = ConfigInUse("outer_loop")
    _pending: dict[str, Any] | None

    def __init__(self, inner_optimizer: torch.optim.Optimizer, config: Settings = None, **settings: Any) -> None:
        config = _checked(inner_optimizer, config, settings)
        # Optimizer.__init__ would take the parameter groups; its __setstate__ gives hooks and profiling alone.
        self.__setstate__({"inner_optimizer": inner_optimizer, "config": config, "_pending": None})

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.outer_loop: OuterLoop | None = None
        self.isolation: Isolation | Averaging = Averaging([])
        self.is_prepared = False  # by Accelerate, with its model
        self.state_is_beside = False  # while `accelerator.save_state` or `load_state` is under way
        self._model_calls: ModelCalls | None = None
        self._before_training: Callable[[OuterLoop], None] | None = None
        self._stop_signals: StopSignals | None = None
        self._stop_asked = self._state_is_made_up = False
        self._passed: Callable[[], torch.nn.Module | None] = lambda: None  # the module that was called
        super().__setstate__(state)
        self._stop_listening = listen(self)

    def __getstate__(self) -> dict[str, Any]:
        return {
            "inner_optimizer": self.inner_optimizer,
            "config": self.config,
            "_pending": self.outer_loop.state_dict() if self.outer_loop else self._pending,
        }

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, before training starts. Raises `ValueError` after that: the anchors are taken."""
        if self.outer_loop is not None:
            raise ValueError(
                "the parameter set cannot change after the start: add parameter groups before the first forward pass, "
                "or end this stage with slowmo_hf.finish(optimizer) and train on with a new SlowMoOptimizer."
            )
        self.inner_optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """
        The inner optimizer's state, and the slow state under `"slowmo"` once training has started; hooks fire as
        torch's do.

        Raises:
            RuntimeError: Training is inside a round, or not all of it is here: `save_state` has it all.
        """
        self._before_saving()
        state_dict: dict[str, Any] = self.inner_optimizer.state_dict()
        if self._state_is_made_up:
            self.inner_optimizer.state.clear()  # the dictionary has it; training goes on from none, as it would have
            self._state_is_made_up = False
        slow = self._slow_state()
        if slow is not None:
            state_dict = {**state_dict, _SLOW_STATE: slow}
        return self._after_saving(state_dict)

    def _slow_state(self) -> dict[str, Any] | None:
        if self.outer_loop is None:
            return self._pending
        if self.state_is_beside:
            return {_BESIDE: True}
        slow = self.outer_loop.state_dict()
        if self._model_calls is not None and self.outer_loop.attempted_steps and _is_dropped():
            self._model_calls.say_once(logging.WARNING, _DROPPED)
        return slow

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """
        Load `state_dict()`'s result, or raise `ValueError` or `RuntimeError`. A stock optimizer's has no slow state:
        before the start that begins fresh, later it goes on.
        """
        state_dict = self._before_loading(state_dict)
        slow = state_dict.get(_SLOW_STATE)
        if slow is not None and _BESIDE in slow:
            if not (self.awaits_a_checkpoint or self.state_is_beside) and self.config.has_rounds:
                raise RuntimeError(
                    "every worker's own state lies beside this one: load the checkpoint with accelerator.load_state, "
                    "after accelerator.prepare has taken the optimizer."
                )
            slow = None
        if self.outer_loop is None:
            self._pending = slow
        elif slow is not None:
            self.outer_loop.load_state_dict(slow)  # first: it may refuse
        if slow is not None:
            self._before_training = None  # it is here: nothing lies beside
        self.inner_optimizer.load_state_dict({k: v for k, v in state_dict.items() if k != _SLOW_STATE})
        if self.outer_loop is not None:
            self.outer_loop.inner_state.keep_what_is_there()
        self._after_loading()

    def train(self) -> None:
        """Local weights in the parameters (Trainer calls it before each step). Passed on, to one that has `train`."""
        self._tell_inner("train")
        if self.outer_loop is not None:
            self.outer_loop.consensus.restore(give_back_random_state=False)

    def eval(self) -> None:
        """The average in the parameters (Trainer calls it before each evaluation). Collective. Passed on, likewise."""
        if self.outer_loop is not None:
            self._go_on(self.outer_loop)
            # One that swaps weights itself may bring back other last digits.
            self.outer_loop.consensus.show(keep_writes=not hasattr(self.inner_optimizer, "eval"))
        self._tell_inner("eval")

    # ---- the start ----

    def on_forward(self, module: torch.nn.Module) -> None:
        """A pass that `first_pass.listen` has heard: training begins with the first one of its own, and goes on."""
        if trains(self, module):  # outside what is never compiled: other networks' passes stay in one piece
            self._on_pass(module)

    def _on_pass(self, module: torch.nn.Module) -> None:
        if is_recorded():
            return
        if self.outer_loop is not None:
            self._go_on(self.outer_loop)
            return
        if not whole_model(self, self._passed()):  # submodules come behind the one that holds all
            self._passed = weakref.ref(module)
        if is_before_prepare(self, module):
            return
        wrappers = self._wrappers(within=module)
        models = [ddp.module for ddp in wrappers] or whole_model(self, module)
        if models:
            with unfrozen(self):
                self._start(models, wrappers)

    def _wrappers(self, within: torch.nn.Module | None = None) -> list[Any]:
        return ddp_wrappers(parameters_of(self), within)

    def _start(self, models: list[torch.nn.Module], wrappers: list[Any]) -> None:
        joins = JoinRefusal(wrappers, self.config)
        self._stop_listening()  # the start's own work must not start it again
        model = models[0] if len(models) == 1 else torch.nn.ModuleList(models) if models else None
        try:
            refused = refusal(models, self.inner_optimizer, has_rounds=self.config.has_rounds)
            refused = beside_another(self, wrappers) or (None if models else trains_a_copy(self)) or refused
            outer_loop = OuterLoop(self.inner_optimizer, self.config, model)
            outer_loop.tensors.others.keeps_last_round = True  # for model.eval()
            has_loaded = self.awaits_a_checkpoint or self._pending is not None
            outer_loop.start(attempted_steps=None if has_loaded else 0, broadcast_frozen=not wrappers, refused=refused)
            compare_programs(outer_loop.workers.world, program_in_use())
            if not wrappers:
                refuse_separate_gradients(self.config, outer_loop.workers.size, models)
            if self._pending is not None:
                outer_loop.load_state_dict(self._pending)  # it may refuse
            self.isolation = _isolation(self, outer_loop, models, wrappers, joins)
        except BaseException:
            joins.release()
            self._stop_listening = listen(self)
            raise
        self._pending = None
        outer_loop.status.stop_asked = self._stop_asked
        self.outer_loop = outer_loop
        note_start(self, goes_on=has_loaded)
        self._model_calls = ModelCalls(self, models)
        tell_at_exit(self)
        self._go_on(outer_loop)

    def before_training(self, act: Callable[[OuterLoop], None]) -> None:
        """Call `act`, which takes a checkpoint up, at the next forward pass, step or view: before training goes on."""
        self._before_training = act
        if self.outer_loop is not None:
            self.outer_loop.consensus.restore()  # what is loaded now would be undone by the end of a view
            self._stop_listening()
            self._stop_listening = listen(self)

    @property
    def awaits_a_checkpoint(self) -> bool:
        """Whether one was loaded that has not been taken up."""
        return self._before_training is not None

    def listen_for_stop(self) -> None:
        """From now on SIGTERM and SIGUSR1 are a wish to save and stop."""
        if self._stop_signals is None:
            if not self.config.has_rounds:
                raise ValueError(
                    "base='all_reduce' without an outer update has no rounds at which ranks could agree to stop."
                )
            self._stop_signals = StopSignals(self._on_signal)

    def _on_signal(self, name: str) -> None:
        of_this_rank.warning("%s: stop_requested is True on all ranks when the next round is applied", name)
        self._stop_asked = True
        if self.outer_loop is not None:
            self.outer_loop.status.stop_asked = True

    def begun(self, among: Iterable[torch.nn.Module] = ()) -> OuterLoop:
        """The outer loop, also of a worker without data: the others wait for it. Collective. `among`: its models."""
        if self.outer_loop is None:
            with unfrozen(self):
                self._start(*trained_models(self, self._wrappers(), among))
        assert self.outer_loop is not None
        self._go_on(self.outer_loop)
        return self.outer_loop

    def _go_on(self, outer_loop: OuterLoop) -> None:
        self._stop_listening()
        act, self._before_training = self._before_training, None
        if act is not None:
            act(outer_loop)

    def _started(self) -> OuterLoop:
        if self.outer_loop is None:
            _refuse_unseen(self._wrappers() or sharded_roots(self))
            self._start(whole_model(self, self._passed(), tell=True), [])
        return self.begun()

    # ---- the step ----

    @with_own_hooks
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """
        One attempted inner step, and a round if `sync_every` of them are done. Collective only then.

        Args:
            closure (`Callable`, *optional*): Handed to the inner optimizer.

        Returns:
            The closure's loss, if any.
        """
        if _is_dummy_step():
            self._state_is_made_up = upstream.is_called_by("_get_optim_state_dict", "distributed.checkpoint")
            return self._inner_step(closure)
        outer_loop = self._started()
        outer_loop.refuse_while_shown()
        self.isolation.go_on()
        if self.config.base == "all_reduce" and is_in_process():
            closure = outer_loop.averaging(closure)
        loss = self._inner_step(closure)
        outer_loop.step(inner_lrs(self.inner_optimizer))
        return loss


def _isolation(
    optimizer: SlowMoOptimizer, outer_loop: OuterLoop, models: list[Any], wrappers: list[Any], joins: JoinRefusal
) -> Isolation | Averaging:
    """From here until the optimizer is let go its wrappers are apart, where the base wants it."""
    if optimizer.config.base == "all_reduce":
        return Averaging(wrappers)
    group, timeout = outer_loop.workers.gradients.group, optimizer.config.timeout_seconds
    sharded, log = sharded_modules(models), outer_loop.workers.logger
    made = Isolation(
        wrappers, group, sharded, timeout_seconds=timeout, joins=joins, log=log, optimizer=weakref.ref(optimizer)
    )
    # `finish` lets training go on; a program that drops the optimizer has stock DDP again.
    weakref.finalize(optimizer, made.optimizer_is_gone).atexit = False
    tell_of_others(wrappers, optimizer, log)
    return made


def _refuse_unseen(models: list[Any]) -> None:
    """At a step of an optimizer that has not started, and these hold its parameters."""
    if models:
        raise RuntimeError(
            "optimizer.step() was called before a forward pass of the wrapped model was seen, so DDP or FSDP2 "
            "still averages gradients over all workers. Call the model that accelerator.prepare returned."
        )


def _checked(inner_optimizer: Any, config: Any, settings: dict[str, Any]) -> SlowMoConfig:
    """The settings, where the optimizer may be wrapped."""
    if isinstance(inner_optimizer, SlowMoOptimizer):
        raise TypeError("inner_optimizer is a SlowMoOptimizer already; wrap an optimizer once.")
    if type(inner_optimizer).__name__ == "AcceleratedOptimizer":
        raise TypeError(
            "inner_optimizer was prepared already: wrap first, accelerator.prepare(SlowMoOptimizer(optimizer))."
        )
    if not isinstance(inner_optimizer, torch.optim.Optimizer):
        refuse_schedule_free(inner_optimizer)
        raise TypeError(
            f"inner_optimizer must be a torch.optim.Optimizer, got {what_is(inner_optimizer)}. Write "
            "SlowMoOptimizer(torch.optim.AdamW(model.parameters(), lr=...), SlowMoConfig())."
        )
    checked = config_of(config, settings, write="SlowMoOptimizer(optimizer, {})")
    if checked.has_rounds:
        refuse_shared_state(inner_optimizer)
    return checked


def _is_dropped() -> bool:
    """torch.distributed.checkpoint takes two entries of a state, and no other, for a save. A load asks too."""
    is_asking, is_loading = (
        upstream.is_called_by(f"_{verb}_optim_state_dict", "distributed.checkpoint") for verb in ("get", "load")
    )
    return is_asking and not is_loading


def _is_dummy_step() -> bool:
    """
    torch.distributed.checkpoint makes a fresh optimizer's state by a step with learning rates and gradients of zero,
    which must not count. It is known by its caller, never by those zeros: a rank whose batch gives no gradient while
    the schedule is at 0 would stop its own clock, meet the others one step late at every round, and nothing would
    tell.
    """
    return upstream.is_called_by("_init_optim_state", "distributed.checkpoint")
