"""SlowMoOptimizer: local training with rounds, for custom loops under Accelerate."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from . import upstream
from .communicator import is_in_process, processes_in_job
from .config import SlowMoConfig
from .isolation import Isolation, ddp_wrappers, refuse_unsupported
from .log import logger
from .model_tensors import inner_lrs
from .outer_loop import OuterLoop
from .round_report import RoundReport
from .stop_signals import StopSignals

_SLOW_STATE = "slowmo"
_BESIDE = "beside"


class SlowMoOptimizer(torch.optim.Optimizer):
    """
    Wraps an optimizer so that every worker trains alone for `sync_every` steps and then takes part in a round (SlowMo,
    https://huggingface.co/papers/1910.00643, Algorithm 1).

        model, optimizer, loader = accelerator.prepare(model, SlowMoOptimizer(optimizer, config), loader)

    is all there is to write. At the first forward pass of a module with its parameters it compares all ranks,
    broadcasts rank 0's values, takes the anchors and isolates the DDP wrapper. What else is wanted are module
    functions that take the prepared or the bare optimizer: `consensus`, `last_round`, `register_for_checkpointing`.

    Args:
        inner_optimizer (`torch.optim.Optimizer`): The base optimizer, over this worker's parameters.
        config (`SlowMoConfig`, *optional*): The settings; the defaults where it is None.

    Raises:
        TypeError: `inner_optimizer` is no torch optimizer.
    """

    # GradScaler then calls our step() for every attempt, also one with an infinite gradient, and sets found_inf and
    # grad_scale.
    _step_supports_amp_scaling = True

    inner_optimizer: torch.optim.Optimizer
    config: SlowMoConfig
    _pending: dict[str, Any] | None

    def __init__(self, inner_optimizer: torch.optim.Optimizer, config: SlowMoConfig | None = None) -> None:
        if not isinstance(inner_optimizer, torch.optim.Optimizer):
            raise TypeError(f"inner_optimizer must be a torch.optim.Optimizer, got {type(inner_optimizer).__name__}.")
        if isinstance(inner_optimizer, SlowMoOptimizer):
            raise TypeError("inner_optimizer is a SlowMoOptimizer already; wrap an optimizer once.")
        if type(inner_optimizer).__name__ == "AcceleratedOptimizer":
            raise TypeError(
                "inner_optimizer was prepared already: wrap first, accelerator.prepare(SlowMoOptimizer(optimizer))."
            )
        if config is not None and not isinstance(config, SlowMoConfig):
            raise TypeError(
                f"config must be a SlowMoConfig, got {type(config).__name__}. Use SlowMoConfig(sync_every=...)."
            )
        # Optimizer.__init__ would take the parameter groups for its own. Its __setstate__ gives hooks and profiling
        # alone.
        self.__setstate__({"inner_optimizer": inner_optimizer, "config": config or SlowMoConfig(), "_pending": None})

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.outer_loop: OuterLoop | None = None
        self.isolation: Isolation | None = None
        self.saved_beside = False
        self._before_training: Callable[[OuterLoop], None] | None = None
        self._stop_signals: StopSignals | None = None
        self._stop_asked = False
        super().__setstate__(state)
        self._stop_listening = _listen_for_the_first_forward(self)

    def __getstate__(self) -> dict[str, Any]:
        return {
            "inner_optimizer": self.inner_optimizer,
            "config": self.config,
            "_pending": self.outer_loop.state_dict() if self.outer_loop else self._pending,
        }

    # ---- the wrapped optimizer's face: read through, never cached (load_state_dict replaces param_groups) ----

    @property
    def state(self) -> Any:
        """The inner optimizer's state."""
        return self.inner_optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.inner_optimizer.state = state

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimizer's parameter groups."""
        return self.inner_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, param_groups: list[dict[str, Any]]) -> None:
        self.inner_optimizer.param_groups = param_groups

    @property
    def defaults(self) -> dict[str, Any]:
        """The inner optimizer's defaults."""
        return self.inner_optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.inner_optimizer.defaults = defaults

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients."""
        self.inner_optimizer.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, before training starts.

        Raises:
            ValueError: Training has started: the anchors are taken.
        """
        if self.outer_loop is not None:
            raise ValueError(
                "the parameter set cannot change after the start: add parameter groups before the first forward pass."
            )
        self.inner_optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """
        The inner optimizer's state, and the slow state under `"slowmo"` once training has started; hooks fire as
        torch's do.

        Raises:
            RuntimeError: Training is inside a round.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict: dict[str, Any] = self.inner_optimizer.state_dict()
        slow = self._slow_state()
        if slow is not None:
            state_dict = {**state_dict, _SLOW_STATE: slow}
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            replaced = post_hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        return state_dict

    def _slow_state(self) -> dict[str, Any] | None:
        if self.outer_loop is None:
            return self._pending
        if self.outer_loop.config.has_rounds and upstream.is_called_by("save_accelerator_state", "accelerate"):
            if self.saved_beside:
                return {_BESIDE: True}
            if self.outer_loop.workers.world.world_size > 1:
                raise RuntimeError(
                    "accelerator.save_state saves rank 0's optimizer alone, and workers differ. Add one line after "
                    "accelerator.prepare: slowmo_hf.register_for_checkpointing(accelerator, optimizer)."
                )
        return self.outer_loop.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """
        Load `state_dict()`'s result. A stock optimizer's has no slow state: before the start that begins fresh, later
        it goes on.
        """
        state_dict = state_dict.copy()  # hooks may change theirs; the caller's is left alone
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        slow = state_dict.get(_SLOW_STATE)
        if slow is not None and _BESIDE in slow:
            if not self.saved_beside:
                raise RuntimeError(
                    "every worker's own state lies beside this one. Call "
                    "slowmo_hf.register_for_checkpointing(accelerator, optimizer) before accelerator.load_state."
                )
            slow = None
        if self.outer_loop is None:
            self._pending = slow
        elif slow is not None:
            self.outer_loop.load_state_dict(slow)  # first: it may refuse
        self.inner_optimizer.load_state_dict({k: v for k, v in state_dict.items() if k != _SLOW_STATE})
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def train(self) -> None:
        """Local weights in the parameters (the schedule-free protocol, which Trainer follows before each step)."""
        if self.outer_loop is not None:
            self.outer_loop.consensus.restore()

    def eval(self) -> None:
        """The average in the parameters (Trainer calls it before each evaluation). Collective."""
        if self.outer_loop is not None:
            self._go_on(self.outer_loop)
            self.outer_loop.consensus.show()

    # ---- the start ----

    def _on_forward(self, module: torch.nn.Module, args: Any) -> None:
        if not torch.is_grad_enabled():
            return  # an evaluation before training, perhaps on one rank alone: the start is collective
        own = {id(p) for group in self.param_groups for p in group["params"]}
        held = own & {id(p) for p in module.parameters()}
        if not held:
            return
        if self.outer_loop is not None:
            self._go_on(self.outer_loop)
            return
        wrappers = ddp_wrappers((p for group in self.param_groups for p in group["params"]), within=module)
        if wrappers:
            self._start([ddp.module for ddp in wrappers], wrappers)
        elif held == own:
            self._start([module], [])

    def _start(self, models: list[torch.nn.Module], wrappers: list[Any]) -> None:
        self._stop_listening()  # the start's own work must not start it again
        model = models[0] if len(models) == 1 else torch.nn.ModuleList(models) if models else None
        try:
            refuse_unsupported()
            outer_loop = OuterLoop(self.inner_optimizer, self.config, model)
            outer_loop.start(broadcast_frozen=not wrappers)
            if (
                not wrappers
                and not is_in_process()
                and processes_in_job() > 1
                and (outer_loop.workers.size > 1 or self.config.base == "all_reduce")
            ):
                raise RuntimeError(
                    f"base={self.config.base!r} with {outer_loop.workers.size} processes per worker needs a "
                    "DistributedDataParallel wrapper that averages gradients, and none of the model was found. Train "
                    "the model that accelerator.prepare returned, or use processes_per_worker=1 and another base."
                )
        except BaseException:
            self._stop_listening = _listen_for_the_first_forward(self)
            raise
        if self.config.base != "all_reduce":
            self.isolation = Isolation(wrappers, outer_loop.workers.gradients.group)
        if self._pending is not None:
            outer_loop.load_state_dict(self._pending)
            self._pending = None
        outer_loop.status.stop_asked = self._stop_asked
        self.outer_loop = outer_loop
        self._go_on(outer_loop)

    def before_training(self, act: Callable[[OuterLoop], None]) -> None:
        """
        Call `act` before training starts or goes on, at the next forward pass, step or look: a checkpoint is taken up
        there.
        """
        self._before_training = act
        if self.outer_loop is not None:
            self.outer_loop.consensus.restore()  # what is loaded now would be undone by the end of a look
            self._stop_listening = _listen_for_the_first_forward(self)

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
        logger.warning("%s: stop_requested is True on all ranks when they next take in a round", name)
        self._stop_asked = True
        if self.outer_loop is not None:
            self.outer_loop.status.stop_asked = True

    def end(self) -> None:
        """Take part in the others' rounds until all have ended. Collective."""
        if self.outer_loop is None:  # this worker had no data at all, but the others wait for it
            wrappers = ddp_wrappers(p for group in self.param_groups for p in group["params"])
            self._start([ddp.module for ddp in wrappers], wrappers)
        assert self.outer_loop is not None
        self._go_on(self.outer_loop)
        self.outer_loop.end()
        self.outer_loop.consensus.restore()

    def _go_on(self, outer_loop: OuterLoop) -> None:
        act, self._before_training = self._before_training, None
        if act is not None:
            self._stop_listening()
            act(outer_loop)

    def _started(self) -> OuterLoop:
        if self.outer_loop is None:
            if ddp_wrappers(p for group in self.param_groups for p in group["params"]):
                raise RuntimeError(
                    "optimizer.step() was called before a forward pass of the wrapped model was seen, so DDP still "
                    "averages gradients. Call the model that accelerator.prepare returned."
                )
            logger.warning(
                "no module with all of the optimizer's parameters was called: buffers, if any, are not averaged"
            )
            self._start([], [])
        assert self.outer_loop is not None
        self._go_on(self.outer_loop)
        return self.outer_loop

    # ---- the step ----

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """
        One attempted inner step, and a round if `sync_every` of them are done. Collective only then.

        Args:
            closure (`Callable`, *optional*): Handed to the inner optimizer.

        Returns:
            The closure's loss, if any.
        """
        if _is_dummy_step():
            return self._inner_step(closure)
        outer_loop = self._started()
        outer_loop.refuse_while_shown()
        if self.isolation is not None:
            self.isolation.settle()
        if self.config.base == "all_reduce" and is_in_process():
            closure = outer_loop.averaging(closure)
        loss = self._inner_step(closure)
        outer_loop.step(inner_lrs(self.inner_optimizer))
        return loss

    def _inner_step(self, closure: Callable[[], float] | None) -> float | None:
        found_inf = getattr(self, "found_inf", None)
        grad_scale = getattr(self, "grad_scale", None)
        if found_inf is None:
            return self.inner_optimizer.step(closure) if closure is not None else self.inner_optimizer.step()
        if getattr(self.inner_optimizer, "_step_supports_amp_scaling", False):
            return self._fused_inner_step(found_inf, grad_scale)
        if found_inf.item():
            return None
        if grad_scale is not None:
            for group in self.param_groups:
                for param in group["params"]:
                    if param.grad is not None:
                        param.grad.div_(grad_scale.to(param.grad.device))
        return self.inner_optimizer.step()

    def _fused_inner_step(self, found_inf: torch.Tensor, grad_scale: torch.Tensor | None) -> float | None:
        inner: Any = self.inner_optimizer
        inner.found_inf, inner.grad_scale = found_inf, grad_scale
        try:
            return inner.step()  # type: ignore[no-any-return]
        finally:
            del inner.found_inf, inner.grad_scale


def _listen_for_the_first_forward(optimizer: SlowMoOptimizer) -> Callable[[], Any]:
    """
    Have every module's forward pass shown to `optimizer`; call the result to end that. torch's table of global hooks
    lives as long as the process, so it holds the optimizer weakly, and its entry goes with the optimizer: one that
    never trains (a sweep that failed, the original of a copy) keeps neither its parameters nor a hook on every module.
    """
    alive = weakref.ref(optimizer)

    def on_forward(module: torch.nn.Module, args: Any) -> None:
        listener = alive()
        if listener is not None:
            listener._on_forward(module, args)

    return weakref.finalize(optimizer, register_module_forward_pre_hook(on_forward).remove)


def _is_dummy_step() -> bool:
    """
    torch.distributed.checkpoint makes a fresh optimizer's state by a step with learning rates and gradients of zero,
    which must not count. It is known by its caller, never by those zeros: a rank whose batch gives no gradient while
    the schedule is at 0 would stop its own clock, meet the others one step late at every round, and nothing would
    tell.
    """
    return upstream.is_called_by("_init_optim_state", "distributed.checkpoint")


def unwrap(optimizer: torch.optim.Optimizer) -> SlowMoOptimizer:
    """The SlowMoOptimizer behind what `accelerator.prepare` returned; `TypeError` where there is none."""
    found: Any = optimizer
    while not isinstance(found, SlowMoOptimizer):
        if not hasattr(found, "optimizer"):
            raise TypeError(
                f"expected a SlowMoOptimizer, prepared or bare, got {type(optimizer).__name__}. Wrap the optimizer "
                "first: SlowMoOptimizer(optimizer, config)."
            )
        found = found.optimizer
    return found


@contextmanager
def consensus(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """
    Inside, the workers' average is in the model, on every rank; afterwards the local weights are back, bit for bit,
    and so are the random generators. Collective: every rank enters it at the same step. Plain `base="all_reduce"` has
    nothing to show: it is stock.

        with slowmo_hf.consensus(optimizer):
            evaluate(model)

    Args:
        optimizer (`torch.optim.Optimizer`): A `SlowMoOptimizer`, bare or as `accelerator.prepare` returned it.
    """
    bare = unwrap(optimizer)
    outer_loop = bare.outer_loop
    if outer_loop is None or outer_loop.view.is_shown:
        yield
        return
    bare._go_on(outer_loop)
    outer_loop.consensus.show()
    try:
        yield
    finally:
        outer_loop.consensus.restore()


@contextmanager
def join(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """
    For uneven data: a worker that leaves the block takes part in the others' rounds until all have left it.

        with slowmo_hf.join(optimizer):
            for batch in loader:  # six batches here, four there
                ...

    In each round workers count by their local steps since the one before, so one that did none moves with the others
    and adds nothing. Evaluate and save outside of the block: inside, one that has left takes part in rounds alone.
    Each worker's own weights are in the model afterwards, and every worker has the furthest one's clock.

    Args:
        optimizer (`torch.optim.Optimizer`): A `SlowMoOptimizer`, bare or as `accelerator.prepare` returned it.

    Raises:
        ValueError: `base` is not local_sgd: others exchange at every step, and cannot go on without a worker.
    """
    bare = unwrap(optimizer)
    if bare.config.base != "local_sgd":
        raise ValueError(
            f"join needs base='local_sgd', got {bare.config.base!r}, whose workers exchange at every step: give all "
            "workers equally many batches."
        )
    yield
    bare.end()


def stop_requested(optimizer: torch.optim.Optimizer) -> bool:
    """
    Whether a rank was sent SIGTERM or SIGUSR1; True on all ranks from the same step on, where a round is taken in.
    Call it after every step, from the first one on:

        if slowmo_hf.stop_requested(optimizer):
            accelerator.save_state(folder)
            sys.exit(slowmo_hf.REQUEUE_EXIT_CODE)

    Args:
        optimizer (`torch.optim.Optimizer`): A `SlowMoOptimizer`, bare or as `accelerator.prepare` returned it.

    Raises:
        ValueError: Plain `base="all_reduce"` has no rounds.
    """
    bare = unwrap(optimizer)
    bare.listen_for_stop()
    return bare.outer_loop is not None and bare.outer_loop.status.stop_agreed


def last_round(optimizer: torch.optim.Optimizer) -> RoundReport | None:
    """
    The report of the last round, or None before the first. `accelerator.log(last_round(optimizer).to_logs())` logs it.
    """
    outer_loop = unwrap(optimizer).outer_loop
    return outer_loop.last_round if outer_loop else None
