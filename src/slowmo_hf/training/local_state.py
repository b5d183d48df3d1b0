"""
What a worker has alone: its weights, buffers and frozen parameters that training has changed; and what the last round
has made of these.
"""

from __future__ import annotations

from typing import Any

import torch

from ..contents import Contents, Restored, Saved
from ..dtensors import local
from .clock import Clock
from .consensus_view import ConsensusView
from .model_tensors import ModelTensors


class LocalTensors:
    """
    Local weights, where workers differ, and the buffers and frozen parameters that have changed; shared by all, those
    that the last round has averaged.

    Args:
        tensors (`ModelTensors`): Where they are.
        view (`ConsensusView`): Where they are while the average is shown.
        clock (`Clock`): Says when workers differ.
    """

    def __init__(self, tensors: ModelTensors, view: ConsensusView, clock: Clock) -> None:
        self._tensors, self._view, self._clock = tensors, view, clock

    def saved(self, *, agree: bool, keep: bool) -> Saved:
        """As `Part.saved`."""
        tensors, others, local_value = self._tensors, self._tensors.others, self._view.local_values()
        changed, now = others.changed(), others.now()
        own_alone = others.own()
        own = Contents({"changed_buffers": changed})
        remade = {n: _form(now[n], n not in own_alone) for n in changed if n in own_alone or others.remade(n, now[n])}
        if remade:
            own.settings["remade_buffers"] = remade
        own.tensors.update({f"buffer.{name}": _as_saved(local_value(now[name])) for name in changed})
        if not agree:
            named = zip(tensors.names, tensors.trainable, strict=True)
            own.tensors.update({f"parameter.{name}": local_value(param) for name, param in named})
        averaged = others.averaged()
        shared = Contents({"averaged_buffers": sorted(averaged)} if averaged else {})
        shared.tensors.update({f"averaged_buffer.{name}": _as_saved(value) for name, value in averaged.items()})
        return Saved(shared, own)

    def restore(self, saved: Saved, *, same_number: bool) -> Restored:
        """As `Part.restore`: the model holds the average already; it stays where a worker has nothing of its own."""
        tensors, own, shared = self._tensors, saved.own, saved.shared
        now = tensors.others.now()
        # An older checkpoint has none, and neither has one before the first round.
        has_any = any(name.startswith("averaged_buffer") for name in (*shared.settings, *shared.tensors))
        names = shared.names("averaged_buffers") if has_any else []
        shared.refuse_unknown("averaged_buffers", names, now)
        remade = self._remade(own)
        forms = {name: remade[name][0] if name in remade else local(now[name]) for name in names}
        averaged = {name: _taken(shared, f"averaged_buffer.{name}", form) for name, form in forms.items()}
        if not same_number:
            return lambda: tensors.others.take_averaged(averaged)
        changed = own.names("changed_buffers")
        own.refuse_unknown("changed_buffers", changed, {**now, **remade})
        own.refuse_unknown("remade_buffers", list(remade), changed)
        here = [name for name in changed if name not in remade]
        values = [(now[name], _taken(own, f"buffer.{name}", local(now[name]))) for name in here]
        made = [(name, _taken(own, f"buffer.{name}", like), kept) for name, (like, kept) in remade.items()]
        parted = shared.flag("parted")
        if parted or not self._clock.agree_at(shared.count("attempted_steps")):
            for name, param in zip(tensors.names, tensors.trainable, strict=True):
                values.append((param, own.tensor(f"parameter.{name}", local(param))))

        def take_up() -> None:
            for target, value in values:
                local(target).copy_(value)
            for name, value, persistent in made:
                tensors.others.put(name, value, persistent=persistent)
            tensors.rewritten()
            tensors.others.mark_changed(changed)
            tensors.others.take_averaged(averaged)

        return take_up

    def _remade(self, own: Contents) -> dict[str, tuple[torch.Tensor, bool]]:
        """What was made anew in training, or cast: what each was like, and whether it is a persistent buffer."""
        if "remade_buffers" not in own.settings:
            return {}
        found = {}
        for name, form in own.part("remade_buffers").settings.items():
            match form:
                case [list() as shape, str() as dtype, bool() as persistent] if self._tensors.others.may_hold(name):
                    like = _like(shape, dtype)
                case _:
                    like = None
            if like is None:
                own.refuse("remade_buffers", f"has {form!r} for {name!r}, which this run cannot make")
            found[name] = (like, persistent)
        return found


def _form(buffer: torch.Tensor, persistent: bool) -> list[Any]:
    return [list(buffer.shape), str(buffer.dtype).removeprefix("torch."), persistent]


def _like(shape: list[Any], dtype: str) -> torch.Tensor | None:
    """A tensor of that form, without memory; None where there is none."""
    of = getattr(torch, dtype, None)
    if not isinstance(of, torch.dtype) or not all(type(n) is int and n >= 0 for n in shape):
        return None
    return torch.empty(shape, dtype=of, device="meta")


def _as_saved(value: torch.Tensor) -> torch.Tensor:
    """Files hold no complex128."""
    return torch.view_as_real(value.detach().resolve_conj()) if value.dtype == torch.complex128 else value


def _taken(contents: Contents, name: str, like: torch.Tensor) -> torch.Tensor:
    """One of a file; it may hold infinities that mean something."""
    if like.dtype != torch.complex128:
        return contents.tensor(name, like, finite=False)
    pairs = contents.tensor(name, torch.view_as_real(like), finite=False)
    # A file's tensors lie at multiples of 8 bytes, and torch 2.6 crashes where it copies complex128 from one of 8.
    return torch.view_as_complex(pairs.clone())
