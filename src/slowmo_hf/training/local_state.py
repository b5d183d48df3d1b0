"""What a worker has alone: its weights and buffers; and what the last round has made of the buffers."""

from __future__ import annotations

from ..contents import Contents, Restored, Saved
from ..dtensors import local
from .clock import Clock
from .consensus_view import ConsensusView
from .model_tensors import ModelTensors


class LocalTensors:
    """
    Local weights, where workers differ, and the buffers that have changed; shared by all, those that the last round
    has averaged.

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
        averaged = tensors.averaged_buffers()
        shared = Contents({"averaged_buffers": sorted(averaged)} if averaged else {})
        shared.tensors.update({f"averaged_buffer.{name}": value for name, value in averaged.items()})
        return Saved(shared, own)

    def restore(self, saved: Saved, *, same_number: bool) -> Restored:
        """As `Part.restore`: the model holds the average already; it stays where a worker has nothing of its own."""
        tensors, own, shared = self._tensors, saved.own, saved.shared
        buffers = tensors.buffers()
        # An older checkpoint has none, and neither has one before the first round.
        has_any = any(name.startswith("averaged_buffer") for name in (*shared.settings, *shared.tensors))
        names = shared.names("averaged_buffers") if has_any else []
        shared.refuse_unknown("averaged_buffers", names, buffers)
        averaged = {name: shared.tensor(f"averaged_buffer.{name}", buffers[name], finite=False) for name in names}
        if not same_number:
            return lambda: tensors.take_averaged(averaged)
        changed = own.names("changed_buffers")
        own.refuse_unknown("changed_buffers", changed, buffers)
        # A buffer may hold infinities that mean something.
        values = [(buffers[name], own.tensor(f"buffer.{name}", buffers[name], finite=False)) for name in changed]
        if not self._clock.agree_at(saved.shared.count("attempted_steps")):
            for name, param in zip(tensors.names, tensors.trainable, strict=True):
                values.append((param, own.tensor(f"parameter.{name}", local(param))))

        def take_up() -> None:
            for target, value in values:
                local(target).copy_(value)
            tensors.rewritten()
            tensors.mark_changed(changed)
            tensors.take_averaged(averaged)

        return take_up
