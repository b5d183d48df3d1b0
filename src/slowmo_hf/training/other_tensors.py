"""
What training changes and no optimizer of ours holds: buffers (BatchNorm's statistics), and parameters that a forward
pass or a callback moves (the teacher of a mean-teacher model, a momentum encoder), also by `.data`.

    persistent buffers, moved parameters    rounds make them equal, as `model_buffers` says
    other buffers (rotary frequencies)      each worker's own; a checkpoint has them where they have changed

They are found by what their bytes were at the start: nothing is copied. A frozen base that does not move is neither
sent nor saved.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias

import torch

from ..algorithm.digest import digest
from ..algorithm.layout import flat_view
from ..dtensors import local
from ..upstream import non_persistent_buffers

Seen: TypeAlias = tuple[torch.Size, torch.dtype, int]

_trained: weakref.WeakKeyDictionary[object, set[int]] = (
    weakref.WeakKeyDictionary()
)  # by optimizer of ours, in programs


class OtherTensors:
    """
    Those of one model.

    Args:
        model (`torch.nn.Module`, *optional*): Unwrapped.
        trainable (`Iterable[torch.Tensor]`): What the optimizer holds, and rounds average.
        are_local (`bool`): Whether floating-point ones are each worker's own between views: `model_buffers="local"`.
        is_fixed (`bool`): Whether the model's parameters must be asked for now and not later: what FSDP2 has gathered
            of them for a pass are others.
    """

    def __init__(
        self,
        model: torch.nn.Module | None,
        trainable: Iterable[torch.Tensor],
        *,
        are_local: bool = False,
        is_fixed: bool = False,
    ) -> None:
        self.model, self.are_local = model, are_local
        self._own = {id(p) for p in trainable}
        _trained[self] = self._own
        self._fixed = dict(model.named_parameters()) if model is not None and is_fixed else None
        self._first: dict[str, Seen] = {}
        self._changed: set[str] = set()
        self._averaged: dict[str, torch.Tensor] = {}
        self.keeps_last_round = False  # for `Consensus.show_last_round`

    # ---- what there is ----

    def buffers(self) -> dict[str, torch.Tensor]:
        """The model's buffers now, by name: modules may replace them."""
        return dict(self.model.named_buffers()) if self.model is not None else {}

    def parameters(self) -> dict[str, torch.Tensor]:
        """Those that the optimizer does not hold, by name."""
        if self.model is None:
            return {}
        named = self._fixed if self._fixed is not None else dict(self.model.named_parameters())
        return {name: p for name, p in named.items() if id(p) not in self._own}

    def frozen(self) -> dict[str, torch.Tensor]:
        """Of these the ones that no other optimizer of ours in the program holds: its rounds are theirs."""
        held = set().union(*_trained.values())
        return {name: p for name, p in self.parameters().items() if id(p) not in held}

    def now(self) -> dict[str, torch.Tensor]:
        """All of them, by name."""
        return {**self.frozen(), **self.buffers()}

    def shared(self) -> dict[str, torch.Tensor]:
        """Those that rounds may make equal: constants of sparse or lazy layouts, and own buffers, are left out."""
        there = {name: t for name, t in self.now().items() if is_dense(t)}
        own = set(self.own(there))
        return {name: t for name, t in there.items() if name not in own}

    def own(self, names: Iterable[str]) -> list[str]:
        """Of these the buffers that are each worker's own: the model's state dictionary does not have them."""
        own = non_persistent_buffers(self.model) if self.model is not None else set()
        return [name for name in names if name in own]

    def comparable(self, lines: list[str]) -> list[str]:
        """A fingerprint without what may differ between a checkpoint and now: own buffers, and a buffer's shape."""
        named = [(line.startswith("buffer "), line.rpartition(": ")[0]) for line in lines]
        own = {f"buffer {name}" for name in self.own(name.removeprefix("buffer ") for is_one, name in named if is_one)}
        return [name if is_one else line for line, (is_one, name) in zip(lines, named, strict=True) if name not in own]

    # ---- what has changed ----

    def remember(self) -> None:
        """What is there now is what "changed" is measured from."""
        self._changed, self._first = set(), _seen(self.now())

    def changed(self, *, frozen_too: bool = True) -> list[str]:
        """
        Names of all that have ever differed from what they were at the start.

        Args:
            frozen_too (`bool`): Look at the bytes of frozen parameters, which takes a pass over their memory.
        """
        there = self.now() if frozen_too else self.buffers()
        seen = _seen({name: t for name, t in there.items() if name not in self._changed})
        self._changed |= {name for name, value in seen.items() if self._first.get(name) != value}
        return sorted(self._changed)

    def changed_shared(self, *, frozen_too: bool = True) -> dict[str, str]:
        """Of these the ones that rounds may make equal, with shape and dtype in words."""
        there = self.shared()
        return {name: words(there[name]) for name in self.changed(frozen_too=frozen_too) if name in there}

    def described(self) -> dict[str, str]:
        """Shape and dtype of all that rounds may make equal."""
        return {name: words(t) for name, t in self.shared().items()}

    def mark_changed(self, names: list[str]) -> None:
        """They have differed from their first value before a checkpoint."""
        self._changed |= set(names)

    def problem(self) -> str:
        """Which of those that have changed cannot be averaged; empty where none."""
        frozen, there = self.frozen(), self.now()
        own = set(self.own(there))
        for name in self._changed & there.keys() - own:
            tensor, kind = there[name], "parameter" if name in frozen else "buffer"
            if not is_dense(tensor):
                is_sparse = tensor.layout != torch.strided
                how = f"sparse ({tensor.layout})" if is_sparse else f"not dense (strides {tensor.stride()})"
                return (
                    f"{kind} {name!r} is {how} and has changed since the start; only dense tensors can be averaged. "
                    "Keep it constant, or register it with persistent=False: then it is each worker's own."
                )
            if name in frozen and not tensor.is_floating_point() and not tensor.is_complex():
                return (
                    f"parameter {name!r} of dtype {tensor.dtype} has changed, and no optimizer holds it: integers "
                    "cannot be averaged. Keep it constant."
                )
        return ""

    def named(self, names: Iterable[str]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """(Floating-point, integer) tensors of these names; of complex ones their real views."""
        there = self.now()
        chosen = [there[name].detach() for name in names if name in there]
        chosen = [torch.view_as_real(t) if t.is_complex() else t for t in chosen]
        return [t for t in chosen if t.is_floating_point()], [t for t in chosen if not t.is_floating_point()]

    def not_finite(self, names: Iterable[str]) -> list[str]:
        """Of these, in words, those that hold NaN or infinity."""
        there, frozen = self.now(), self.frozen()
        return [
            f"{'parameter' if name in frozen else 'buffer'} {name!r}"
            for name in names
            if name in there and not bool(torch.isfinite(local(there[name])).all())
        ]

    # ---- what the last round made of them ----

    def keep_averaged(self, names: list[str]) -> None:
        """Remember these as they are now, if that is wanted: a round has just made them equal."""
        if self.keeps_last_round:
            there = self.now()
            self._averaged.update({name: there[name].detach().clone() for name in names if name in there})

    def take_averaged(self, values: Mapping[str, torch.Tensor]) -> None:
        """Remember these in place of all: they are of a checkpoint."""
        there = self.now()
        self._averaged = {name: value.to(there[name].device, copy=True) for name, value in values.items()}

    def averaged(self) -> dict[str, torch.Tensor]:
        """Of those that are still there in that shape, by name."""
        there = self.now()
        return {name: t for name, t in self._averaged.items() if name in there and there[name].shape == t.shape}

    # ---- from a checkpoint ----

    def reshaped(self, names: Iterable[str]) -> list[str]:
        """Of these the buffers that have another shape than at the start, or were not there."""
        there = self.now()
        seen = [name for name in names if self._first.get(name, (None,))[0] != there[name].shape]
        return sorted(self.may_be_reshaped(seen))

    def may_be_reshaped(self, names: Iterable[str]) -> set[str]:
        """Of these the buffers that are each worker's own, also where a first pass has yet to make them."""
        if self.model is None:
            return set()
        modules, there, parameters = dict(self.model.named_modules()), self.now(), self.parameters()
        own = {*self.own(there)}
        return {
            name
            for name in names
            if name in own
            or (name not in there and name.rpartition(".")[0] in modules)
            or (self.are_local and name not in parameters and there[name].is_floating_point())
        }

    def put(self, name: str, value: torch.Tensor) -> Callable[[], None]:
        """What gives a tensor this value; a buffer of another shape, or one that is not there, is made."""
        there = self.now().get(name)
        if there is not None and local(there).shape == value.shape:
            return lambda: copy_tensors_([there], [value])
        assert self.model is not None
        path, _, leaf = name.rpartition(".")
        module, persistent = self.model.get_submodule(path), there is not None and not self.own([name])
        device = there.device if there is not None else next((p.device for p in module.parameters()), value.device)
        return lambda: module.register_buffer(leaf, value.to(device, copy=True), persistent=persistent)


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether its memory can be read and written as a whole."""
    if tensor.layout != torch.strided or tensor.is_meta:
        return False
    try:
        flat_view(tensor)
    except ValueError:
        return False
    return True


def words(tensor: torch.Tensor) -> str:
    """Shape and dtype."""
    return f"{list(tensor.shape)} {tensor.dtype}"


def _seen(named: Mapping[str, torch.Tensor]) -> dict[str, Seen]:
    """What their bytes are; those on the meta device have none."""
    by_device: dict[torch.device, list[str]] = {}
    for name, tensor in named.items():
        if not tensor.is_meta:
            by_device.setdefault(tensor.device, []).append(name)
    found: dict[str, Seen] = {}
    for names in by_device.values():
        digests = torch.stack([_digest(named[name].detach()) for name in names]).tolist()
        found.update({name: (named[name].shape, named[name].dtype, d) for name, d in zip(names, digests, strict=True)})
    return found


def _digest(tensor: torch.Tensor) -> torch.Tensor:
    """Of a tensor of any layout."""
    if tensor.layout != torch.strided:
        entries = tensor.to_sparse().coalesce()
        return 3 * digest(entries.indices()) + digest(entries.values())
    return digest(tensor if is_dense(tensor) else tensor.contiguous())


def copy_tensors_(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """Copy one by one, across devices and dtypes."""
    for target, source in zip(targets, sources, strict=True):
        local(target).copy_(source)
