"""
What a worker has alone: its weights, buffers and moved parameters; and what the last round has made of the latter.
"""

from __future__ import annotations

from ..contents import Contents, Restored, Saved
from ..dtensors import local
from .clock import Clock
from .consensus_view import ConsensusView
from .model_tensors import ModelTensors
from .other_tensors import is_dense


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
        tensors, others, local_value = self._tensors, self._tensors.others, self._view.local_value
        changed, there = others.changed(), others.now()
        changed = [name for name in changed if name in there and is_dense(there[name])]
        own = Contents({"changed_buffers": changed})
        if others.reshaped(changed):
            own.settings["reshaped_buffers"] = others.reshaped(changed)
        own.tensors.update({f"buffer.{name}": local_value(there[name]) for name in changed})
        if not agree:
            named = zip(tensors.names, tensors.trainable, strict=True)
            own.tensors.update({f"parameter.{name}": local_value(param) for name, param in named})
        averaged = others.averaged()
        shared = Contents({"averaged_buffers": sorted(averaged)} if averaged else {})
        shared.tensors.update({f"averaged_buffer.{name}": value for name, value in averaged.items()})
        return Saved(shared, own)

    def restore(self, saved: Saved, *, same_number: bool) -> Restored:
        """As `Part.restore`: the model holds the average already; it stays where a worker has nothing of its own."""
        tensors, others, own, shared = self._tensors, self._tensors.others, saved.own, saved.shared
        there = others.now()
        # An older checkpoint has none, and neither has one before the first round.
        has_any = any(name.startswith("averaged_buffer") for name in (*shared.settings, *shared.tensors))
        names = shared.names("averaged_buffers") if has_any else []
        shared.refuse_unknown("averaged_buffers", names, there)
        averaged = {name: shared.tensor(f"averaged_buffer.{name}", there[name], finite=False) for name in names}
        if not same_number:
            return lambda: others.take_averaged(averaged)
        changed = own.names("changed_buffers")
        reshaped = own.names("reshaped_buffers") if "reshaped_buffers" in own.settings else []
        own.refuse_unknown("reshaped_buffers", reshaped, others.may_be_reshaped(reshaped))
        own.refuse_unknown("changed_buffers", changed, {*there, *reshaped})
        acts = []
        for name in changed:  # a buffer may hold infinities that mean something
            like = None if name in reshaped else local(there[name])
            acts.append(others.put(name, own.tensor(f"buffer.{name}", like, finite=False)))
        values = []
        if not self._clock.agree_at(saved.shared.count("attempted_steps")):
            for name, param in zip(tensors.names, tensors.trainable, strict=True):
                values.append((param, own.tensor(f"parameter.{name}", local(param))))

        def take_up() -> None:
            for act in acts:
                act()
            for target, value in values:
                local(target).copy_(value)
            tensors.rewritten()
            others.mark_changed(changed)
            others.take_averaged(averaged)

        return take_up
