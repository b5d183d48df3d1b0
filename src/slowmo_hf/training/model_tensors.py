"""Which tensors of a model take part: one canonical list of parameters, and what may change in it."""

from __future__ import annotations

import hashlib

import torch

from ..algorithm.layout import memory_order
from ..dtensors import is_sharded, shard_mates, sharded_modules
from ..upstream import fsdp_reshard
from .other_tensors import OtherTensors, is_dense, words


class ModelTensors:
    """
    The tensors of one worker, in the optimizer's order: parameters with `requires_grad` at the start, tied ones once.

    Args:
        optimizer (`torch.optim.Optimizer`): Its parameter groups.
        model (`torch.nn.Module`, *optional*): For names, frozen parameters and buffers.
        local_buffers (`bool`, *optional*, defaults to `False`): As `OtherTensors`' `are_local`.

    Attributes:
        others (`OtherTensors`): What the optimizer does not hold.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, model: torch.nn.Module | None, *, local_buffers: bool = False
    ) -> None:
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
        self.initial_lrs = inner_lrs(optimizer)
        self._signature = self._now()
        fixed = bool(self._gathering)
        self.others = OtherTensors(model, self.trainable, are_local=local_buffers, is_fixed=fixed)
        # `trainable` as a round left it, beside anchors of a part alone.
        self.last_round: list[torch.Tensor] = []

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

    def values(self, *, include_frozen: bool) -> list[torch.Tensor]:
        """
        All tensors whose values must be equal at the start; those whose memory is not dense are constants and left
        out, and so are buffers that are each worker's own.
        """
        parameters, shared = self.others.parameters(), self.others.shared()
        buffers = [t for name, t in shared.items() if name not in parameters]
        return [*self.trainable, *filter(is_dense, parameters.values() if include_frozen else ()), *buffers]

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
            if not is_dense(param):
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
        parameters, shared = self.others.parameters(), self.others.described()
        lines += [f"frozen {index}: {words(p)} frozen" for index, p in enumerate(parameters.values())]
        return lines + [f"buffer {name}: {shape}" for name, shape in shared.items() if name not in parameters]

    def problem(self) -> str:
        """What has changed in the parameter set since the start; empty where nothing has."""
        now = self._now()
        if now in (self._signature, []):  # a network that is frozen as a whole is frozen in turn, while another trains
            return self.others.problem()
        return (
            "the parameter set changed after the start (a parameter was added, removed, frozen, unfrozen, resized, "
            "moved, cast or laid out anew, as channels_last does). Local training needs one fixed set: change it "
            "before the first step, or start a new run."
        )

    def _now(self) -> list[tuple[object, ...]]:
        groups = _trainable_groups(self.optimizer)
        return [(id(p), p.shape, p.dtype, p.device, memory_order(p)) for group in groups for p in group]


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


def _mates(param: torch.Tensor) -> tuple[int, ...]:
    return shard_mates(param) if is_sharded(param) else ()


def _trainable_groups(optimizer: torch.optim.Optimizer) -> list[list[torch.Tensor]]:
    seen: set[int] = set()
    groups: list[list[torch.Tensor]] = []
    for group in optimizer.param_groups:
        groups.append([p for p in group["params"] if p.requires_grad and not (id(p) in seen or seen.add(id(p)))])  # type: ignore[func-returns-value]
    return groups
