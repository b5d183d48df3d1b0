"""What a worker has alone: its weights and buffers."""

from __future__ import annotations

from ..contents import Contents, Restored, Saved
from .clock import Clock
from .consensus_view import ConsensusView
from .model_tensors import ModelTensors


class LocalTensors:
    """
    Local weights, where workers differ, and the buffers that have changed.

    Args:
        tensors (`ModelTensors`): Where they are.
        view (`ConsensusView`): Where they are while the average is shown.
        clock (`Clock`): Says when workers differ.
    """

    def __init__(self, tensors: ModelTensors, view: ConsensusView, clock: Clock) -> None:
        self._tensors, self._view, self._clock = tensors, view, clock

    def saved(self, *, agree: bool, keep: bool) -> Saved:
        """As `Part.saved`."""
        tensors, local_value = self._tensors, self._view.local_value
        changed, buffers = tensors.changed_buffers(), tensors.buffers()
        own = Contents({"changed_buffers": changed})
        own.tensors.update({f"buffer.{name}": local_value(buffers[name]) for name in changed})
        if not agree:
            named = zip(tensors.names, tensors.trainable, strict=True)
            own.tensors.update({f"parameter.{name}": local_value(param) for name, param in named})
        return Saved(own=own)

    def restore(self, saved: Saved, *, same_number: bool) -> Restored:
        """As `Part.restore`: the model holds the average already; it stays where a worker has nothing of its own."""
        if not same_number:
            return lambda: None
        tensors, own = self._tensors, saved.own
        changed = own.names("changed_buffers")
        buffers = tensors.buffers()
        own.refuse_unknown("changed_buffers", changed, buffers)
        # A buffer may hold infinities that mean something.
        values = [(buffers[name], own.tensor(f"buffer.{name}", buffers[name], finite=False)) for name in changed]
        if not self._clock.agree_at(saved.shared.count("attempted_steps")):
            for name, param in zip(tensors.names, tensors.trainable, strict=True):
                values.append((param, own.tensor(f"parameter.{name}", param)))

        def take_up() -> None:
            for target, value in values:
                target.copy_(value)
            tensors.mark_changed(changed)

        return take_up
