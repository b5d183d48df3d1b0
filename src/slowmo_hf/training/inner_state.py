"""Line 2 of Algorithm 1: the inner optimizer's state at a round's end, reset, maintained or averaged."""

from __future__ import annotations

import torch

from ..algorithm.starts import IN_FLIGHT
from ..config import SlowMoConfig
from ..contents import Contents, Restored, Saved
from ..wire.averages import Averages
from .model_tensors import ModelTensors, hash48

OBJECT = "inner_optimizer"  # in a checkpoint


class InnerState:
    """
    The base optimizer's buffers at a round's end.

    Args:
        config (`SlowMoConfig`): Its `inner_state`; `"auto"` is reset for SGD with momentum and maintain for everything
            else.
        tensors (`ModelTensors`): The parameters and their optimizer.

    Raises:
        ValueError: This optimizer's state cannot be reset.
    """

    def __init__(self, config: SlowMoConfig, tensors: ModelTensors) -> None:
        self.optimizer = tensors.optimizer
        self.tensors = tensors
        self.policy = config.inner_state
        if self.policy == "auto":
            has_momentum = any(group.get("momentum", 0) for group in self.optimizer.param_groups)
            self.policy = "reset" if has_momentum and config.has_outer_update else "maintain"
        if self.policy == "reset" and isinstance(self.optimizer, torch.optim.Adagrad):
            raise ValueError(
                "inner_state='reset' cannot be used with Adagrad, whose state is made at construction and cannot be "
                "made again. Use inner_state='maintain' or 'average'."
            )

    def reset(self) -> None:
        """Forget it, if that is the policy. Every process does."""
        if self.policy == "reset":
            for param in self.tensors.trainable:
                self.optimizer.state.pop(param, None)

    def average(self, averages: Averages) -> None:
        """
        Average it over workers, if that is the policy. Every leader does.

        Raises:
            ValueError: Workers have state for different parameters; the same on every worker.
        """
        if self.policy != "average":
            return
        names = [name for name, _ in self.named_tensors()]
        hashes = averages.communicator.gather_header([hash48(names)])
        if (hashes != hashes[0]).any():
            everywhere = averages.communicator.gather_objects(names)
            odd = sorted(set().union(*everywhere) - set(everywhere[0]).intersection(*everywhere))
            raise ValueError(
                f"inner_state='average' needs the same optimizer state on all workers; only some have {odd[:5]}. A "
                "parameter was unused there: use inner_state='maintain' or 'reset'."
            )
        averages.mean_([tensor for _, tensor in self.named_tensors()])

    def named_tensors(self) -> list[tuple[str, torch.Tensor]]:
        """Every floating-point state tensor; a 0-dim one such as `step` is a count, not a direction, and left out."""
        found = []
        for name, param in zip(self.tensors.names, self.tensors.trainable, strict=True):
            for key, value in sorted(self.optimizer.state.get(param, {}).items()):
                if isinstance(value, torch.Tensor) and value.is_floating_point() and key != "step" and value.dim() > 0:
                    found.append((f"{name}.{key}{list(value.shape)}", value))
        return found

    # ---- state ----

    def saved(self, *, agree: bool, keep: bool) -> Saved:
        """As `Part.saved`, in torch's own form."""
        return Saved(own=Contents(objects={OBJECT: self.optimizer.state_dict()}))

    def restore(self, saved: Saved, *, same_number: bool) -> Restored:
        """As `Part.restore`: with another number of workers they are dealt out in turn."""
        state = saved.own.optimizer(OBJECT, self.optimizer)
        # Then all start from an average that has taken in what was in flight.
        round_ends = IN_FLIGHT in saved.own.settings and not same_number

        def take_up() -> None:
            self.optimizer.load_state_dict(state)
            if round_ends:
                self.reset()

        return take_up
