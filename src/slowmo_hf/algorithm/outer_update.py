"""
The outer update: lines 6 to 8 of Algorithm 1 on the anchors, piece by piece as messages arrive, or on whole tensors
when all are here.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch

from .. import upstream
from ..config import SlowMoConfig
from ..contents import Contents, Restored
from ..names import ELEMENTWISE, OUTER_UPDATES, find
from ..random_state import RandomState
from .layout import Bucket, FlatAnchor, Piece
from .norms import Norms
from .slow_momentum import SlowMomentum

# What one bucket's messages bring: the weighted sums over workers of the displacements, in a reused buffer, and of
# their squared norms.
Sum = tuple[Bucket, torch.Tensor, float]


class OuterUpdate(Protocol):
    """
    What a round does with the average.

    Attributes:
        velocities (`list[torch.Tensor]`): Flat, laid out like the anchors; empty where the optimizer keeps its own.
    """

    velocities: list[torch.Tensor]

    def update_(
        self,
        displacements: Iterator[Sum],
        inner_lrs: list[float],
        summands: float,
        hand_back_: Callable[[Piece], None],
    ) -> Norms:
        """
        One round: the pseudo-gradient is the sum of displacements over `summands`, the anchors are updated, and every
        piece of them is handed back.

        Args:
            displacements (`Iterator[Sum]`): Of every bucket, each in memory that the next one may use.
            inner_lrs (`list[float]`): Of the round, per inner parameter group.
        """

    def saved(self) -> Contents:
        """
        What a checkpoint needs beside anchors and velocities, the same on all workers: settings, or the state of an
        optimizer under `"outer_optimizer"`.
        """

    def restore(self, contents: Contents) -> Restored:
        """Check what `saved` gave; the result takes it up, copied."""


def works_elementwise(config: SlowMoConfig) -> bool:
    """Whether the update treats every element by itself, so that a part of a tensor is enough for it."""
    if config.outer_optimizer in OUTER_UPDATES:
        return True
    return config.outer_optimizer_class() in [getattr(torch.optim, name) for name in ELEMENTWISE]


def make_outer_update(
    config: SlowMoConfig, anchors: list[FlatAnchor], pieces: list[Piece], groups: int
) -> OuterUpdate:
    """The update that `config` names, with one parameter group per inner one, of which there are `groups`."""
    named = OUTER_UPDATES.get(config.outer_optimizer)
    make: Callable[..., OuterUpdate] = find(named) if named else WholeUpdate
    return make(config, anchors, pieces, groups)


class PiecewiseUpdate:
    """Slow momentum: each piece goes through lines 6 to 8 and back to its parameter while it is in the cache."""

    def __init__(self, config: SlowMoConfig, anchors: list[FlatAnchor], pieces: list[Piece], groups: int) -> None:
        of_group: list[list[torch.Tensor]] = [[] for _ in range(groups)]
        for piece in pieces:
            of_group[piece.group].append(piece.anchor)
        self.optimizer = SlowMomentum(
            [{"params": own} for own in of_group], outer_lr=config.outer_lr, outer_momentum=config.outer_momentum
        )
        self.velocities: list[torch.Tensor] = []
        if config.outer_momentum > 0:
            flat = {item: torch.zeros_like(item.flat, pin_memory=item.flat.is_pinned()) for item in anchors}
            for piece in pieces:
                self.optimizer.state[piece.anchor]["velocity"] = piece.of(flat[piece.item])
            self.velocities = list(flat.values())

    def update_(
        self,
        displacements: Iterator[Sum],
        inner_lrs: list[float],
        summands: float,
        hand_back_: Callable[[Piece], None],
    ) -> Norms:
        """As `OuterUpdate.update_`."""
        for group, inner_lr in zip(self.optimizer.param_groups, inner_lrs, strict=True):
            group["inner_lr"] = inner_lr
        norms = Norms()
        for bucket, total, square_sum in displacements:
            norms.drift_square += square_sum / summands
            for piece, pseudo_grad in bucket.runs(total):
                pseudo_grad.div_(summands)  # line 6
                velocity = self.optimizer.update_(piece.anchor, pseudo_grad, piece.group)  # lines 7 and 8
                norms.add(pseudo_grad, velocity)
                hand_back_(piece)
        self.optimizer.end_round()
        return norms

    def saved(self) -> Contents:
        """As `OuterUpdate.saved`."""
        return Contents(
            settings={"previous_inner_lrs": [group["previous_inner_lr"] for group in self.optimizer.param_groups]}
        )

    def restore(self, contents: Contents) -> Restored:
        """As `OuterUpdate.restore`."""
        lrs = contents.numbers("previous_inner_lrs", len(self.optimizer.param_groups))

        def take_up() -> None:
            for group, previous in zip(self.optimizer.param_groups, lrs, strict=True):
                group["previous_inner_lr"] = previous

        return take_up


class WholeUpdate:
    """
    Any torch optimizer, which may need whole tensors: the pseudo-gradient is one copy of the parameters more
    meanwhile.
    """

    def __init__(self, config: SlowMoConfig, anchors: list[FlatAnchor], pieces: list[Piece], groups: int) -> None:
        of_group: list[list[torch.Tensor]] = [[] for _ in range(groups)]
        for item in anchors:
            for span, anchor in zip(item.spans, item.anchors(), strict=True):
                of_group[span.group].append(anchor)
        self.optimizer = _made(config, of_group)
        arguments = {*inspect.signature(type(self.optimizer)).parameters, *_arguments(config)} - {"params"}
        self._given = [{k: v for k, v in group.items() if k in arguments} for group in self.optimizer.param_groups]
        self.velocities: list[torch.Tensor] = []
        self._anchors, self._pieces = anchors, pieces

    def update_(
        self,
        displacements: Iterator[Sum],
        inner_lrs: list[float],
        summands: float,
        hand_back_: Callable[[Piece], None],
    ) -> Norms:
        """As `OuterUpdate.update_`; the optimizer has a learning rate of its own, `outer_lr`."""
        norms = Norms()
        pseudo_grads = {item: torch.empty_like(item.flat) for item in self._anchors}
        for bucket, total, square_sum in displacements:
            norms.drift_square += square_sum / summands
            for piece, run in bucket.runs(total):
                norms.add(torch.div(run, summands, out=piece.of(pseudo_grads[piece.item])), None)  # line 6
        self._set_gradients(pseudo_grads)
        _step(self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)
        for piece in self._pieces:
            hand_back_(piece)
        return norms

    def _set_gradients(self, pseudo_grads: dict[FlatAnchor, torch.Tensor]) -> None:
        gradients: list[list[torch.Tensor]] = [[] for _ in self.optimizer.param_groups]
        for item, flat in pseudo_grads.items():
            for span, gradient in zip(item.spans, item.views(flat), strict=True):
                gradients[span.group].append(gradient)
        for param_group, own in zip(self.optimizer.param_groups, gradients, strict=True):
            for anchor, gradient in zip(param_group["params"], own, strict=True):
                anchor.grad = gradient

    def saved(self) -> Contents:
        """As `OuterUpdate.saved`."""
        return Contents(objects={"outer_optimizer": self.optimizer.state_dict()})

    def restore(self, contents: Contents) -> Restored:
        """As `OuterUpdate.restore`; what `config` gives the optimizer is as it is now, and not as it was saved."""
        state = contents.optimizer("outer_optimizer", self.optimizer)

        def take_up() -> None:
            self.optimizer.load_state_dict(copy.deepcopy(state))  # torch keeps the tensors that it is given
            for param_group, given in zip(self.optimizer.param_groups, self._given, strict=True):
                param_group.update(given)

        return take_up


def _arguments(config: SlowMoConfig) -> dict[str, Any]:
    return {"lr": config.outer_lr, **config.outer_optimizer_arguments()}


def _made(config: SlowMoConfig, of_group: list[list[torch.Tensor]]) -> torch.optim.Optimizer:
    """
    The optimizer that `config` names, over these tensors, when one of its kind has taken a step on made-up ones: what
    it cannot do is told at the start, and not at the first round.
    """
    kwargs = _arguments(config)
    make: Callable[..., torch.optim.Optimizer] = config.outer_optimizer_class()
    before = RandomState.take()
    try:
        made = make([{"params": own} for own in of_group], **kwargs)
        trial = [tensor.clone() for tensor in _one_of_a_kind(of_group)]
        for tensor in trial:
            tensor.grad = torch.ones_like(tensor)
        if trial:
            _step(make([{"params": trial}], **kwargs))
    except Exception as error:  # whatever it is: the other ranks wait for this one's word
        raise ValueError(
            f"outer_optimizer={config.outer_optimizer!r} cannot do the outer update with outer_lr={config.outer_lr} "
            f"and outer_optimizer_kwargs={config.outer_optimizer_kwargs!r}: {type(error).__name__}: {error}. It must "
            "take every trained tensor, or the flat parts of it that are updated here, and step() on a dense gradient "
            "without a closure. Use 'slow_momentum', or 'torch.optim.SGD' or 'torch.optim.AdamW'."
        ) from error
    before.give_back()
    return made


def _step(optimizer: torch.optim.Optimizer) -> None:
    """
    Without the hooks that a program has registered for all optimizers: they are of its own training's. One that has
    hooks or a step of its own, or a step that calls another class's, is called as it is.
    """
    step: Any = type(optimizer).step
    its_own = "step" in vars(optimizer) or upstream.has_step_hooks(optimizer)
    if its_own or not getattr(step, "hooked", False):
        optimizer.step()
    else:
        step.__wrapped__(optimizer)


def _one_of_a_kind(of_group: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    """The smallest of every dtype, device and number of dimensions: a shape of the model's own suits its optimizer."""
    smallest: dict[tuple[object, ...], torch.Tensor] = {}
    for tensor in sorted((t for own in of_group for t in own if t.numel()), key=torch.numel):
        smallest.setdefault((tensor.dtype, tensor.device, tensor.dim()), tensor)
    return list(smallest.values())
