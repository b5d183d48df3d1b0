"""Which tensors of a model take part: one canonical list of parameters and buffers, and what may change in it."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from ..algorithm.layout import Piece, flat_view, has_dense_memory, strides
from ..dtensors import is_sharded, local, shard_mates, sharded_modules
from ..upstream import fsdp_reshard
from .digests import digests_of
from .modes import as_in_training, writing_modules
from .optimizers_inside import parameters_of
from .other_tensors import OtherTensors


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
        # No method: who holds it holds no cycle.
        self.rewritten = partial(_rewritten, sharded_modules([model] if model is not None else []))
        self.rewritten()  # a gathered parameter has another identity
        named = {id(p): name for name, p in model.named_parameters()} if model is not None else {}
        # All that the optimizer trains; `trainable` has those of one memory (`a.data = b.data`) once.
        self.held = [p for p in parameters_of(optimizer) if p.requires_grad]
        self.groups = _trainable_groups(optimizer)
        self.trainable = [p for group in self.groups for p in group]
        # The ranks that hold the shards of these parameters together; empty where every process has them whole.
        self.mates = _mates(self.trainable[0]) if self.trainable else ()
        self.names, self.names_of_held = (
            [named.get(id(p), f"parameter {index}") for index, p in enumerate(params)]
            for params in (self.trainable, self.held)
        )
        own = {id(p) for p in self.held}
        self.frozen = [p for p in model.parameters() if id(p) not in own] if model is not None else []
        self.initial_lrs = inner_lrs(optimizer)
        self.others = OtherTensors(model, self.held, self.rewritten)
        self._signature = self._now()
        self._strides = [p.stride() for p in self.trainable]
        self.last_round: list[torch.Tensor] = []  # `trainable` as a round left it, beside anchors of a part alone
        self._written: Callable[[], Iterator[torch.Tensor]] | None = None  # of `trainable`, since this step's round

    @property
    def words(self) -> str:
        """Which these are."""
        return f"{self.names[0]}{f' and {len(self.names) - 1} more' if self.names[1:] else ''}"

    @contextmanager
    def swapping(self) -> Iterator[None]:
        """Around an exchange of local weights and others, that of a view."""
        with as_in_training(self.model):
            yield
            self.rewritten()

    def make_copy(self) -> None:
        """Have memory for `last_round`."""
        self.last_round = self.last_round or [torch.empty_like(p) for p in self.trainable]

    def written_by_passes(self) -> list[torch.Tensor]:
        """
        Parameters that a forward pass writes, an evaluation's too (`max_norm` of embeddings renormalises rows), or a
        change of the mode (merged adapters).
        """
        tables = (torch.nn.Embedding, torch.nn.EmbeddingBag)
        modules = self.model.modules() if self.model is not None else ()
        bounded = [m.weight for m in modules if isinstance(m, tables) and m.max_norm is not None]
        return bounded + [p for module in writing_modules(self.model) for p in module.parameters(recurse=False)]

    # ---- what is written behind a round ----

    def watch(self, pieces: Sequence[Piece]) -> None:
        """
        A round has just made workers equal: from here on `is_written` knows.

        Args:
            pieces (`Sequence[Piece]`): Of all parameters, with the anchors that the round has put into them: nothing
                is read before it is asked for. Where there are none, digests are taken now.
        """
        params = self.trainable
        self._written = partial(_unlike_anchors, pieces) if pieces else partial(_unlike, params, digests_of(params))

    def stop_watching(self) -> None:
        """A step has come, another round, or another state."""
        self._written = None

    @property
    def is_watched(self) -> bool:
        """Whether it is known how the round of this step left the parameters."""
        return self._written is not None

    def is_written(self) -> bool:
        """
        Whether the program has written into the parameters behind the round of this step: reads all of them. As in a
        view, what passes write too does not count alone.
        """
        if self._written is None or self.problem():  # which all hear of
            return False
        by_passes = {id(tensor) for tensor in self.written_by_passes()}
        return any(id(param) not in by_passes for param in self._written())

    @property
    def device(self) -> torch.device:
        """Where the first parameter is."""
        return self.trainable[0].device if self.trainable else torch.device("cpu")

    def values(self, *, include_frozen: bool, include_own: bool) -> list[torch.Tensor]:
        """
        All tensors whose values must be equal at the start; those whose memory is not dense are constants and left
        out.

        Args:
            include_own (`bool`): Whether non-persistent buffers have the same shapes everywhere.
        """
        own = set() if include_own else self.others.own()
        buffers = [buffer for name, buffer in self.others.buffers().items() if name not in own]
        tensors = [*self.trainable, *(self.frozen if include_frozen else []), *buffers]
        return [t for t in tensors if is_plain(t)]

    def refusal(self, *, has_rounds: bool = True) -> str | None:
        """
        Why these parameters cannot be trained, or None.

        Args:
            has_rounds (`bool`, *optional*, defaults to `True`): Whether any write into them.
        """
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
            if not has_dense_memory(param):
                return (
                    f"parameter {name!r} has strides {param.stride()} with holes or overlaps; call .contiguous() "
                    "first."
                )
            if has_rounds and not _is_in_sight(param):
                return (
                    f"parameter {name!r} is a {type(local(param)).__name__}, which shows a copy of what it holds: "
                    "averages cannot be written into it. Train plain weights, or freeze it and train an adapter."
                )
        if has_rounds and (pair := _overlap(self.trainable)):
            return (
                f"parameters {self.names[pair[0]]!r} and {self.names[pair[1]]!r} have a part of their memory in "
                "common, and would be averaged twice there. Tie them whole, compute the part in forward "
                "(weight[:n]), or give each its own (.clone())."
            )
        return None

    def fingerprint(self) -> list[str]:
        """
        One line per tensor: name, shape, strides, dtype, requires_grad. Not values, and no non-persistent buffers,
        which are each worker's own.
        """
        lines = [
            f"{name}: {list(p.shape)} strides {list(p.stride())} {p.dtype} trainable{' sharded' * is_sharded(p)}"
            for name, p in zip(self.names, self.trainable, strict=True)
        ]
        lines += [f"frozen {index}: {list(p.shape)} {p.dtype} frozen" for index, p in enumerate(self.frozen)]
        own = self.others.own()
        return lines + [_line(name, b) for name, b in self.others.buffers().items() if name not in own]

    def own_lines(self) -> list[str]:
        """The same of what each worker has alone."""
        own = self.others.own()
        return [_line(name, b) for name, b in self.others.buffers().items() if name in own]

    def problem(self) -> str:
        """What has changed in the parameter set since the start; empty where nothing has."""
        now = self._now()
        if now == self._signature or (not now and _forms(self.groups) == self._signature):
            return ""  # a network that is frozen as a whole is frozen in turn, while another one trains
        return (
            "the parameter set changed after the start (a parameter was added, removed, frozen, unfrozen, resized, "
            "moved, cast, put into another group, or given other strides, as by memory_format=torch.channels_last). "
            "Local training needs one fixed set: change it before training (a Trainer's callback: in on_train_begin); "
            "or end this stage with slowmo_hf.finish(optimizer), change it, and train on with a new SlowMoOptimizer."
        )

    @property
    def is_laid_out_anew(self) -> bool:
        """Whether a parameter's memory has another order than at the start. Asked at every exchange of gossip."""
        return [p.stride() for p in self.trainable] != self._strides and bool(self.problem())

    def _now(self) -> list[tuple[object, ...]]:
        return _forms(_trainable_groups(self.optimizer))


def _rewritten(gathering: list[Any]) -> None:
    """
    Parameters have been written. What FSDP has gathered of them before is let go: behind a pass without a backward its
    root and a tied embedding would be shown as they were. So are casts that an open autocast region keeps.
    """
    fsdp_reshard(gathering)
    torch.clear_autocast_cache()


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


def _unlike_anchors(pieces: Sequence[Piece]) -> Iterator[torch.Tensor]:
    """Parameters that are not what these anchors are there, in their dtype."""
    for piece in pieces:
        values = piece.values()
        if not torch.equal(values, piece.anchor.to(values)):
            yield piece.param


def _unlike(params: list[torch.Tensor], left: list[list[int]]) -> Iterator[torch.Tensor]:
    """Those with other digests."""
    return (param for param, was, now in zip(params, left, digests_of(params), strict=True) if was != now)


def _mates(param: torch.Tensor) -> tuple[int, ...]:
    return shard_mates(param) if is_sharded(param) else ()


def _forms(groups: list[list[torch.Tensor]]) -> list[tuple[object, ...]]:
    return [
        (index, id(p), p.shape, p.dtype, p.device, strides(local(p)))
        for index, group in enumerate(groups)
        for p in group
    ]


def _trainable_groups(optimizer: torch.optim.Optimizer) -> list[list[torch.Tensor]]:
    seen: set[object] = set()
    groups: list[list[torch.Tensor]] = []
    for group in optimizer.param_groups:
        trained = [(p, _memory(p)) for p in group["params"] if p.requires_grad]
        groups.append([p for p, memory in trained if not (memory in seen or seen.add(memory))])  # type: ignore[func-returns-value]
    return groups


def _memory(param: torch.Tensor) -> object:
    """The same for two parameters that are one memory, of any shape: dense ones that begin and end together."""
    own = local(param)
    if not is_plain(own) or own.layout != torch.strided or not own.data_ptr():
        return id(param)
    return own.device, own.dtype, own.data_ptr(), own.numel()


def _overlap(params: list[torch.Tensor]) -> tuple[int, int] | None:
    """Two of different memories that have bytes in common."""
    spans = []
    for index, own in enumerate(map(local, params)):
        if is_plain(own) and own.data_ptr():
            start = own.storage_offset() * own.element_size()
            spans.append((own.untyped_storage().data_ptr(), start, start + own.numel() * own.element_size(), index))
    for (storage, _, end, index), (other_storage, start, _, other) in itertools.pairwise(sorted(spans)):
        if storage == other_storage and start < end:
            return min(index, other), max(index, other)
    return None


def _is_in_sight(param: torch.Tensor) -> bool:
    """Whether a round that writes a view of it writes it: a subclass may make up what it shows (quantised weights)."""
    own = local(param)
    flat = flat_view(own)
    if not hasattr(own, "__tensor_flatten__") or hasattr(flat, "__tensor_flatten__"):
        return True
    held = [getattr(own, name) for name in own.__tensor_flatten__()[0]]
    return flat.untyped_storage().data_ptr() in [one.untyped_storage().data_ptr() for one in held if is_plain(one)]


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether all of its bytes are here, dense and in sight."""
    is_wrapper = hasattr(tensor, "__tensor_flatten__") and not is_sharded(tensor)
    return not (tensor.is_meta or tensor.is_quantized or is_wrapper) and has_dense_memory(tensor)


def _line(name: str, buffer: torch.Tensor) -> str:
    return f"buffer {name}: {list(buffer.shape)} {buffer.dtype}"
