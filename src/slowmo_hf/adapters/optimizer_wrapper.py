"""What torch asks of an optimizer that wraps another: its face, the hooks of its state, GradScaler's step."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch


def with_own_hooks(step: Callable[..., Any]) -> Callable[..., Any]:
    """
    `step` with the wrapper's own step hooks, as torch calls them. Those of all optimizers
    (`register_optimizer_step_post_hook`) fire in the inner optimizer's step: once for a step, as without a wrapper.
    Under a GradScaler they see unscaled gradients, and no step that the scaler skips.
    """

    @functools.wraps(step)
    def hooked(self: Any, *given: Any, **kwargs: Any) -> Any:
        args: tuple[Any, ...] = (self, *given)
        if not self._unscale():
            return step(*args, **kwargs)
        for pre_hook in tuple(self._optimizer_step_pre_hooks.values()):
            args, kwargs = pre_hook(self, args, kwargs) or (args, kwargs)
        result = step(*args, **kwargs)
        for post_hook in tuple(self._optimizer_step_post_hooks.values()):
            post_hook(self, args, kwargs)
        return result

    hooked.hooked = True  # type: ignore[attr-defined]  # else torch hooks it once more, all optimizers' included
    return hooked


class OptimizerWrapper(torch.optim.Optimizer):
    """
    An optimizer with the face of the one inside it: state, groups and defaults are read through, never cached
    (`load_state_dict` replaces `param_groups`).
    """

    # GradScaler then calls our step() for every attempt, also one with an infinite gradient, and sets found_inf and
    # grad_scale.
    _step_supports_amp_scaling = True

    inner_optimizer: torch.optim.Optimizer
    _takes_step = True  # this one, by the GradScaler's finding

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
        """The inner optimizer's defaults; some that are made by hand have none."""
        return getattr(self.inner_optimizer, "defaults", {})

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.inner_optimizer.defaults = defaults

    def zero_grad(self, set_to_none: bool = True) -> None:
        """
        Reset the gradients. Passed on without the flag to one whose `zero_grad` takes none, as Accelerate does.

        Raises:
            ValueError: It takes none, and `set_to_none` is False.
        """
        parameters = inspect.signature(self.inner_optimizer.zero_grad).parameters
        if "set_to_none" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            self.inner_optimizer.zero_grad(set_to_none=set_to_none)
        elif set_to_none:
            self.inner_optimizer.zero_grad()
        else:
            name = type(self.inner_optimizer).__name__
            raise ValueError(f"set_to_none=False cannot be used with {name}, whose zero_grad takes no such argument.")

    def _tell_inner(self, mode: str) -> None:
        """Call its `train()` or `eval()`, if it has them: what it keeps beside the parameters is its own affair."""
        tell = getattr(self.inner_optimizer, mode, None)
        if callable(tell):
            tell()

    # ---- the hooks of its state fire as torch's do ----

    def _before_saving(self) -> None:
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)

    def _after_saving(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        for hook in self._optimizer_state_dict_post_hooks.values():
            replaced = hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        return state_dict

    def _before_loading(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        state_dict = state_dict.copy()  # hooks may change theirs; the caller's is left alone
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        return state_dict

    def _after_loading(self) -> None:
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    # ---- the step ----

    def _inner_step(self, closure: Callable[[], float] | None) -> float | None:
        found_inf = getattr(self, "found_inf", None)
        if found_inf is None:
            return self.inner_optimizer.step(closure) if closure is not None else self.inner_optimizer.step()
        if self._inner_unscales:
            return self._fused_inner_step(found_inf, getattr(self, "grad_scale", None))
        return self.inner_optimizer.step() if self._takes_step else None

    @property
    def _inner_unscales(self) -> bool:
        """Whether a GradScaler would leave unscaling to it."""
        # An older contract hands the scaler to `step(grad_scaler=...)`, which then reads no attributes.
        hands_scaler = "grad_scaler" in inspect.signature(self.inner_optimizer.step).parameters
        return getattr(self.inner_optimizer, "_step_supports_amp_scaling", False) and not hands_scaler

    def _unscale(self) -> bool:
        """What a GradScaler does before a step that cannot do it. Whether the step is to be taken."""
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        self._takes_step = True
        if found_inf is None or self._inner_unscales:
            return True
        if not isinstance(found_inf, torch.Tensor):  # no gradient was seen: the scaler's own words
            raise AssertionError("No inf checks were recorded for this optimizer.")
        self._takes_step = not found_inf.item()
        if not self._takes_step or grad_scale is None:
            return self._takes_step
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    if param.grad.dtype is torch.float16:  # as GradScaler: they would be flushed to zero
                        raise ValueError("Attempting to unscale FP16 gradients.")
                    param.grad.div_(grad_scale.to(param.grad.device))
        return True

    def _fused_inner_step(self, found_inf: torch.Tensor, grad_scale: torch.Tensor | None) -> float | None:
        inner: Any = self.inner_optimizer
        inner.found_inf, inner.grad_scale = found_inf, grad_scale
        try:
            return inner.step()  # type: ignore[no-any-return]
        finally:
            del inner.found_inf, inner.grad_scale
