"""
What of a model no optimizer holds: buffers, and frozen parameters, which `forward` or a callback may write (the
teacher of BYOL, MoCo, a mean teacher). Those that have changed since the start follow `model_buffers`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..algorithm.layout import has_dense_memory, strides
from ..dtensors import is_sharded, local
from ..finite import all_finite
from ..upstream import non_persistent_buffers
from ..wire.communicator import Communicator
from ..wire.job import host_name, said_by_ranks
from ..wire.workers import Workers
from .clock import Clock
from .digests import digests, digests_of, parts_of

_FINITE = (
    "is not finite (NaN or infinity), and an average would give that to all workers. Skip such batches before the "
    "forward pass, and go on from the last checkpoint. A buffer that need not be shared is one with persistent=False."
)
_SHAPES = (
    "model_buffers='average' averages it. Register a buffer that follows the data with persistent=False: each worker "
    "keeps its own; or set model_buffers='local' in a new run."
)


@dataclass(frozen=True)
class First:
    """
    What a tensor was at the start, without a copy of it.

    Args:
        shape (`torch.Size`), dtype (`torch.dtype`): Its form.
        stride (`tuple[int, ...]`): The order in which its bytes were digested.
        digests (`list[int]`): Of its bytes.
    """

    shape: torch.Size
    dtype: torch.dtype
    stride: tuple[int, ...]
    digests: list[int]


@dataclass(frozen=True)
class Changed:
    """
    What a rank tells all others of its own.

    Args:
        names (`list[str]`): What has changed here and is averaged with others', sorted.
        lines (`list[str]`): The same with shapes, dtypes and strides.
        problem (`str`): Why one of them cannot be; empty where all can.
        agree (`Callable`): Where ranks differ in these lines: `OtherTensors.agree`.
    """

    names: list[str]
    lines: list[str]
    problem: str
    agree: Callable[[Communicator, int, bool], list[str]]


class OtherTensors:
    """
    Buffers and frozen parameters of one worker, by name: asked for at each use, for modules may replace them.

    A checksum of each, taken at the start and again at rounds and views, tells what has changed: no copy is kept. A
    version counter or an address would not do: what is written through `.data` moves neither.

    A non-persistent buffer (a cache) is always the worker's own: it is never averaged, and may have any shape.

    Args:
        model (`torch.nn.Module`, *optional*): Whose. None: there are none.
        held (`list[torch.Tensor]`): The parameters that the optimizer holds.
        rewritten (`Callable`): As `ModelTensors.rewritten`: a parameter that FSDP has gathered is another tensor.
    """

    def __init__(self, model: torch.nn.Module | None, held: list[torch.Tensor], rewritten: Callable[[], None]) -> None:
        self.model, self._rewritten = model, rewritten
        self.held = {id(p) for p in held}
        self._policy = "average"
        self._first: dict[str, First] = {}
        self._changed: set[str] = set()
        self._of_others: set[str] = set()  # parameters that another optimizer of the program holds
        self._optimizers: list[Any] = []  # of the program: (workers, other tensors) of each, weakly
        self._told: list[str] = []  # by the last look
        self._averaged: dict[str, torch.Tensor] = {}
        self.frozen_are_said = False  # that rounds average some
        self._clock: Clock | None = None  # of its optimizer, from the start on
        self.keeps_last_round = False  # for `Consensus.show_last_round`: what rounds have averaged

    # ---- which there are ----

    def buffers(self) -> dict[str, torch.Tensor]:
        """All buffers now."""
        return dict(self.model.named_buffers()) if self.model is not None else {}

    def frozen(self) -> dict[str, torch.Tensor]:
        """The parameters that no optimizer of ours trains, tied ones once."""
        if self.model is None:
            return {}
        self._rewritten()
        self._note_others()
        named = self.model.named_parameters()
        return {name: p for name, p in named if id(p) not in self.held and name not in self._of_others}

    def now(self) -> dict[str, torch.Tensor]:
        """Both."""
        return {**self.frozen(), **self.buffers()}

    def own(self) -> set[str]:
        """Names of the buffers that are always the worker's own: not persistent."""
        return non_persistent_buffers(self.model) if self.model is not None else set()

    def _note_others(self) -> None:
        """Another optimizer averages what it trains; that stays so when it is gone."""
        held: set[int] = set()
        for those, its in self._optimizers:
            workers, other = those(), its()
            if other is None or other is self or (other._clock is not None and other._clock.is_over):
                continue
            if workers is not None and not workers.roll_call.has_left:
                held |= other.held
        if held - self.held and self.model is not None:
            named = self.model.named_parameters()
            self._of_others |= {name for name, p in named if id(p) in held and id(p) not in self.held}

    # ---- which have changed ----

    def begin(self, workers: Workers, clock: Clock) -> None:
        """Training starts: take what "changed" is measured from, and be known to the program's other optimizers."""
        self._policy, self._clock = workers.config.model_buffers, clock
        self._optimizers = workers.world.notes("tensors of optimizers")
        self._optimizers[:] = [pair for pair in self._optimizers if pair[1]() is not None]
        self._optimizers.append((weakref.ref(workers), weakref.ref(self)))
        for _, its in self._optimizers:
            if (other := its()) is not None:
                other._note_others()
        now = {name: tensor for name, tensor in self.now().items() if _is_watched(tensor)}
        firsts = digests_of(now.values())
        self._first = {
            name: First(tensor.shape, tensor.dtype, _stride(tensor), first)
            for (name, tensor), first in zip(now.items(), firsts, strict=True)
        }
        self._changed = set()

    def changed(self) -> list[str]:
        """Names of those that are there, and have ever differed from what they were at the start."""
        now, asked = self.now(), {}
        for name, tensor in now.items():
            first = self._first.get(name)
            if name in self._changed or not _is_watched(tensor):
                continue
            if first is None or first.shape != tensor.shape or not _is_cast(first.dtype, tensor.dtype):
                self._changed.add(name)
            else:  # a bias that 4-bit layers cast in their first pass has the values that it had
                asked[name] = parts_of(tensor.to(first.dtype), first.stride)
        for name, found in zip(asked, digests(list(asked.values())), strict=True):
            if found != self._first[name].digests:
                self._changed.add(name)
        return sorted(self._changed & now.keys())

    def mark_changed(self, names: list[str]) -> None:
        """Count these as changed: they had been, before a checkpoint, and all had been told."""
        self._changed |= set(names)
        self._told = [name for name in names if name in self._may_average()]

    def remade(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether it has another shape or dtype than at the start, or was not there."""
        first = self._first.get(name)
        return first is None or (first.shape, first.dtype) != (tensor.shape, tensor.dtype)

    def may_hold(self, name: str) -> bool:
        """Whether the model has this buffer or whole frozen parameter, or could have such a buffer."""
        path, _, leaf = name.rpartition(".")
        try:
            module = self.model.get_submodule(path) if self.model is not None else None
        except AttributeError:
            return False
        frozen = self.frozen().get(name)
        is_there = name in self.buffers() or (frozen is not None and not is_sharded(frozen))
        is_free = module is not None and (is_there or getattr(module, leaf, None) is None)
        return is_free and bool(leaf)

    def put(self, name: str, value: torch.Tensor, *, persistent: bool) -> None:
        """Make a buffer of the value's shape and dtype, or give a frozen parameter that form."""
        assert self.model is not None
        path, _, leaf = name.rpartition(".")
        if (frozen := self.frozen().get(name)) is not None:
            frozen.data = value.to(frozen.device, copy=True)
            return
        now = self.buffers().get(name)
        device = now.device if now is not None else next(iter(self.model.parameters())).device
        module = self.model.get_submodule(path)
        if hasattr(module, leaf) and leaf not in dict(module.named_buffers(recurse=False)):
            delattr(module, leaf)  # it is None
        module.register_buffer(leaf, value.to(device, copy=True), persistent=persistent)

    # ---- what is averaged ----

    def look(self, *, in_view: bool = False) -> Changed:
        """What has changed here; its problem is told before anything is averaged, at a round or in a view."""
        averages, changed = self._may_average(), self.changed()
        self._told = names = [name for name in changed if name in averages]
        problems = [self._problem(name, averages[name]) for name in names]
        reads = self._policy == "average" or in_view  # those too that "local" keeps apart at rounds
        if reads and not any(problems) and not _are_finite([averages[name] for name in names]):
            problems = [self._problem(name, averages[name], reads=True) for name in names]
        lines = [f"{name} {_form(averages[name])}" for name in names]
        return Changed(names, lines, next((words for words in problems if words), ""), partial(self.agree, names))

    def known(self) -> Changed:
        """What the last look has found, where nothing is about to be averaged."""
        return Changed(self._told, self._told, "", partial(self.agree, self._told))

    def _may_average(self) -> dict[str, torch.Tensor]:
        """What a round or a view may average."""
        now, own = self.now(), self.own()
        local_alone = self._policy == "local"
        return {name: t for name, t in now.items() if name not in own and not (local_alone and _is_packed(t))}

    def agree(self, names: list[str], world: Communicator, step: int, compare: bool = True) -> list[str]:
        """
        All that has changed anywhere, where ranks differ in it. Collective over the job.

        Args:
            names (`list[str]`): What has changed here.
            step (`int`): For errors.
            compare (`bool`, *optional*, defaults to `True`): Whether it is about to be averaged.

        Raises:
            ValueError: A tensor is of another shape, dtype or memory order somewhere, or not finite on a rank where it
                has not changed; the same words on every rank.
        """
        everywhere = sorted(set().union(*world.gather_objects(names)))
        if not compare:
            return everywhere
        averages = self._may_average()
        here = [name for name in everywhere if name in averages]
        reads = self._policy == "average"
        mine = {name: (_form(averages[name]), self._problem(name, averages[name], reads=reads)) for name in here}
        told = world.gather_objects((host_name(), mine))
        agreed = []
        for name in everywhere:
            forms = [its[name][0] if name in its else {} for _, its in told]
            if any(form != forms[0] for form in forms):
                if self._policy == "average":
                    raise ValueError(f"step {step}: {self._difference(name, forms)}")
                continue  # each worker keeps its own
            problems = said_by_ranks([(host, its[name][1]) for host, its in told], f", step {step}: ")
            if problems:
                raise ValueError(problems)
            agreed.append(name)
        return agreed

    def _problem(self, name: str, tensor: torch.Tensor, *, reads: bool = False) -> str:
        """Why it cannot be averaged: by its form, and where it is read, by its values."""
        words = f"{_kind(tensor)} {name!r} changes in training, and "
        if _is_packed(tensor):
            return (
                f"{words}of {tensor.dtype} there is no average. Set model_buffers='local' to keep each worker's own."
            )
        if tensor.layout != torch.strided or tensor.is_conj() or not has_dense_memory(tensor):
            is_strided = tensor.layout == torch.strided
            form = f"strides {tensor.stride()}" if is_strided else f"layout {tensor.layout}"
            ways = ".contiguous(), .to_dense() or .resolve_conj()"
            return f"{words}has {form}, in which it cannot be averaged. Keep a dense one: {ways}."
        if tensor.is_inference():
            return f"{words}was made inside torch.inference_mode(), so that nothing can be written to it. Clone it."
        if reads and not _are_finite([tensor]):
            return f"{_kind(tensor)} {name!r} {_FINITE}"
        return ""

    def _difference(self, name: str, forms: list[dict[str, Any]]) -> str:
        first = forms[0]
        rank, other = next((rank, form) for rank, form in enumerate(forms) if form != first)
        kind = (first or other)["kind"]
        if not (first and other):
            there, gone = (0, rank) if first else (rank, 0)
            return f"{kind} {name!r} is on rank {there}, and not on rank {gone}; {_SHAPES}"
        key = next(key for key in first if first[key] != other[key])
        return f"{kind} {name!r} has {key} {first[key]} on rank 0, {other[key]} on rank {rank}; {_SHAPES}"

    def to_average(self, names: list[str]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """(floating-point and complex, integer) ones of these names."""
        now = self.now()
        chosen = [now[name] for name in names if name in now]
        return [t for t in chosen if not _is_integer(t)], [t for t in chosen if _is_integer(t)]

    # ---- what the last round has made of them ----

    def keep_averaged(self, names: list[str]) -> None:
        """Remember what a round has just made equal of these, if that is wanted."""
        if not self.keeps_last_round:
            return
        now = self.now()
        for name in names:
            if name in now and (self._policy == "average" or _is_integer(now[name])):
                self._averaged[name] = local(now[name]).detach().clone()

    def take_averaged(self, values: dict[str, torch.Tensor]) -> None:
        """Remember these in place of all: they are of a checkpoint."""
        now = self.now()
        self._averaged = {name: value.to(now[name].device, copy=True) for name, value in values.items()}

    def averaged(self) -> dict[str, torch.Tensor]:
        """What the last round has made of those that are still there in that shape."""
        now = self.now()
        return {name: b for name, b in self._averaged.items() if name in now and local(now[name]).shape == b.shape}


def news_of_frozen(others: OtherTensors, names: list[str]) -> str:
    """A line, once, where a round averages frozen parameters among these; they travel with it from there on."""
    if others.frozen_are_said or not names:
        return ""
    frozen = others.frozen()
    moved = [name for name in names if name in frozen]
    if not moved:
        return ""
    others.frozen_are_said = True
    count = sum(local(frozen[name]).numel() for name in moved)
    return (
        f"frozen parameters have changed in training, {moved[0]} and {len(moved) - 1} more, {count:,} elements: "
        "rounds average and send them too (a moving teacher). Where that is not meant, put them back bit for bit, "
        "or set model_buffers='local' in a new run"
    )


def _form(tensor: torch.Tensor) -> dict[str, Any]:
    order = list(strides(tensor)) if tensor.layout == torch.strided else []
    return {"kind": _kind(tensor), "shape": list(tensor.shape), "dtype": str(tensor.dtype), "strides": order}


def _kind(tensor: torch.Tensor) -> str:
    return "frozen parameter" if isinstance(tensor, torch.nn.Parameter) else "buffer"


def _stride(tensor: torch.Tensor) -> tuple[int, ...]:
    """Of this process's own elements; none of sparse ones."""
    return local(tensor).stride() if tensor.layout == torch.strided else ()


def _is_cast(before: torch.dtype, now: torch.dtype) -> bool:
    """Whether values may still be what they were: they are, or floating-point ones of another width."""
    return before == now or (before.is_floating_point and now.is_floating_point)


def _is_packed(tensor: torch.Tensor) -> bool:
    """Frozen weights of few bits, which have no average. Integer buffers are counts: they have a maximum."""
    return isinstance(tensor, torch.nn.Parameter) and _is_integer(tensor)


def _is_integer(tensor: torch.Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex())


def _is_watched(tensor: torch.Tensor) -> bool:
    """Whether its bytes can be told; what has none here (meta), or hides them, is a constant."""
    return not tensor.is_meta and bool(parts_of(tensor))


def _are_finite(tensors: list[torch.Tensor]) -> bool:
    own = [local(tensor).detach() for tensor in tensors if not _is_integer(tensor)]
    return all_finite([torch.view_as_real(one.resolve_conj()) if one.is_complex() else one for one in own])
