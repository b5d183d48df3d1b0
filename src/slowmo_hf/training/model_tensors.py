"""Which tensors of a model take part: one canonical list of parameters and buffers, and what may change in it."""

from __future__ import annotations

import hashlib

import torch

from ..algorithm.layout import flat_view
from ..dtensors import is_sharded, local, shard_mates, sharded_modules
from ..upstream import fsdp_reshard


class ModelTensors:
    """
    The tensors of one worker, in the optimizer's order: parameters with `requires_grad` at the start, tied ones once.

    Args:
        optimizer (`torch.optim.Optimizer`): Its parameter groups.
        model (`torch.nn.Module`, *optional*): For names, frozen parameters and buffers.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, model: torch.nn.Module | None) -> None:
        self.optimizer = optimizer
        self.model = model
        self._gathering = sharded_modules([model] if model is not None else [])
        self.rewritten()  # a gathered parameter has another identity
        named = {id(p): name for name, p in model.named_parameters()} if model is not None else {}
        self.groups = _trainable_groups(optimizer)
        self.trainable = [p for group in self.groups for p in group]
        # The ranks that hold the shards of these parameters together; empty where every process has them whole.
        self.mates = _mates(self.trainable[0]) if self.trainable else ()
        self.names = [named.get(id(p), f"parameter {index}") for index, p in enumerate(self.trainable)]
        own = {id(p) for p in self.trainable}
        self.frozen = [p for p in model.parameters() if id(p) not in own] if model is not None else []
        self.initial_lrs = inner_lrs(optimizer)
        self._signature = self._now()
        self._initial_buffers: dict[str, torch.Tensor] = {}
        self._changed: set[str] = set()
        self._averaged: dict[str, torch.Tensor] = {}
        self.keeps_last_round = False  # for `Consensus.show_last_round`: averaged buffers, and where it needs it, this
        self.last_round: list[torch.Tensor] = []  # `trainable` as a round left it, beside anchors of a part alone

    @property
    def words(self) -> str:
        """Which these are."""
        return f"{self.names[0]}{f' and {len(self.names) - 1} more' if self.names[1:] else ''}"

    def rewritten(self) -> None:
        """
        Parameters have been written: what FSDP has gathered of them before is let go. Behind a pass without a backward
        its root and a tied embedding would be shown as they were.
        """
        fsdp_reshard(self._gathering)

    def make_copy(self) -> None:
        """Have memory for `last_round`."""
        self.last_round = self.last_round or [torch.empty_like(p) for p in self.trainable]

    @property
    def device(self) -> torch.device:
        """Where the first parameter is."""
        return self.trainable[0].device if self.trainable else torch.device("cpu")

    def buffers(self) -> dict[str, torch.Tensor]:
        """The model's buffers now, by name: modules may replace them."""
        return dict(self.model.named_buffers()) if self.model is not None else {}

    def values(self, *, include_frozen: bool) -> list[torch.Tensor]:
        """
        All tensors whose values must be equal at the start; those whose memory is not dense are constants and left
        out.
        """
        tensors = [*self.trainable, *(self.frozen if include_frozen else []), *self.buffers().values()]
        return [t for t in tensors if _is_dense(t)]

    def refusal(self) -> str | None:
        """Why these parameters cannot be averaged, or None."""
        if not self.trainable:
            return "the optimizer holds no parameter with requires_grad=True: there is nothing to train."
        for name, param in zip(self.names, self.trainable, strict=True):
            if param.is_complex():
                return (
                    f"parameter {name!r} is complex ({param.dtype}), which is not supported. Keep its real view "
                    "instead."
                )
            if param.layout != torch.strided:
                return f"parameter {name!r} has layout {param.layout}; only strided (dense) parameters are supported."
            if not param.is_floating_point():
                return f"parameter {name!r} has dtype {param.dtype}; only floating-point parameters can be trained."
            if _mates(param) != self.mates:
                shards = [list(ranks) or "none: it is whole" for ranks in (_mates(param), self.mates)]
                return (
                    f"parameter {name!r} has its shards on ranks {shards[0]}, {self.names[0]!r} on {shards[1]}: "
                    "nobody averages such gradients inside a worker. Shard all of an optimizer over one mesh."
                )
            if not _is_dense(param):
                return (
                    f"parameter {name!r} has strides {param.stride()} with holes or overlaps; call .contiguous() "
                    "first."
                )
        return None

    def fingerprint(self) -> list[str]:
        """One line per tensor: name, shape, strides, dtype, requires_grad. Not values."""
        lines = [
            f"{name}: {list(p.shape)} strides {list(p.stride())} {p.dtype} trainable{' sharded' * is_sharded(p)}"
            for name, p in zip(self.names, self.trainable, strict=True)
        ]
        lines += [f"frozen {index}: {list(p.shape)} {p.dtype} frozen" for index, p in enumerate(self.frozen)]
        return lines + [f"buffer {name}: {list(b.shape)} {b.dtype}" for name, b in self.buffers().items()]

    def problem(self) -> str:
        """What has changed in the parameter set since the start; empty where nothing has."""
        now = self._now()
        if now in (self._signature, []):
            return ""  # a network that is frozen as a whole is frozen in turn, while another one trains
        return (
            "the parameter set changed after the start (a parameter was added, removed, frozen, unfrozen, resized, "
            "moved or cast). Local training needs one fixed set: change it before the first step, or start a new run."
        )

    def _now(self) -> list[tuple[object, ...]]:
        groups = _trainable_groups(self.optimizer)
        return [(id(p), p.shape, p.dtype, p.device) for group in groups for p in group]

    def remember_buffers(self) -> None:
        """Take the values that "changed" is measured from."""
        self._initial_buffers = {name: b.detach().clone() for name, b in self.buffers().items()}
        self._changed = set()

    def changed_buffers(self) -> list[str]:
        """Names of the buffers that have ever differed from their first value."""
        for name, buffer in self.buffers().items():
            first = self._initial_buffers.get(name)
            if name not in self._changed and (first is None or not _same(first, buffer)):
                self._changed.add(name)
        return sorted(self._changed)

    def mark_changed(self, names: list[str]) -> None:
        """Count these buffers as changed: they have differed from their first value before a checkpoint."""
        self._changed |= set(names)

    def keep_averaged(self, names: list[str]) -> None:
        """Remember these buffers as they are now, if that is wanted: a round has just made them equal."""
        if not self.keeps_last_round:
            return
        buffers = self.buffers()
        self._averaged.update({name: buffers[name].detach().clone() for name in names if name in buffers})

    def take_averaged(self, values: dict[str, torch.Tensor]) -> None:
        """Remember these in place of all: they are of a checkpoint."""
        buffers = self.buffers()
        self._averaged = {name: value.to(buffers[name].device, copy=True) for name, value in values.items()}

    def averaged_buffers(self) -> dict[str, torch.Tensor]:
        """What the last round has made of those that are still there in that shape, by name."""
        now = self.buffers()
        return {name: b for name, b in self._averaged.items() if name in now and now[name].shape == b.shape}

    def buffers_named(self, names: list[str]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """(floating-point, integer) buffers of these names."""
        buffers = self.buffers()
        chosen = [buffers[name] for name in names if name in buffers]
        floating = [b for b in chosen if b.is_floating_point()]
        return floating, [b for b in chosen if not b.is_floating_point() and not b.is_complex()]


def inner_lrs(optimizer: torch.optim.Optimizer) -> list[float]:
    """
    The learning rate of every parameter group, read now (groups may be replaced, so nothing is cached). A group that
    has none, such as Adafactor's with `relative_step`, counts as one that never changes: r = 1.
    """
    lrs = [group.get("lr") for group in optimizer.param_groups]
    return [1.0 if lr is None else float(lr) for lr in lrs]


def hash48(names: list[str]) -> float:
    """48 bits of a SHA-256: exact in a float64."""
    return float(int.from_bytes(hashlib.sha256("\n".join(names).encode()).digest()[:6], "big"))


def copy_tensors_(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """Copy one by one, across devices and dtypes."""
    for target, source in zip(targets, sources, strict=True):
        local(target).copy_(source)


def _mates(param: torch.Tensor) -> tuple[int, ...]:
    return shard_mates(param) if is_sharded(param) else ()


def _trainable_groups(optimizer: torch.optim.Optimizer) -> list[list[torch.Tensor]]:
    seen: set[int] = set()
    groups: list[list[torch.Tensor]] = []
    for group in optimizer.param_groups:
        groups.append([p for p in group["params"] if p.requires_grad and not (id(p) in seen or seen.add(id(p)))])  # type: ignore[func-returns-value]
    return groups


def _is_dense(tensor: torch.Tensor) -> bool:
    if tensor.layout != torch.strided:
        return False
    try:
        flat_view(tensor)
    except ValueError:
        return False
    return True


def _same(first: torch.Tensor, now: torch.Tensor) -> bool:
    return first.shape == now.shape and first.dtype == now.dtype and torch.equal(first.to(now.device), now)
