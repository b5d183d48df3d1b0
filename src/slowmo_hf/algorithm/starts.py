"""What a worker brings to an average, x_i, and how it takes up a new start: Local SGD, with and without overlap."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..contents import Contents, Restored, Saved
from .layout import FlatAnchor, Piece, rounded

IN_FLIGHT = "departed"  # a setting of a checkpoint that was saved while a round was in flight


class Base:
    """
    What a worker brings to an average, x_i, and takes from it. As it stands it is Local SGD: x_i is the parameters.

    Displacements are measured from an origin that is the same on every worker: here the anchor as it was handed back,
    rounded to the parameter's dtype.

    Attributes:
        away (`bool`): Whether an average travels to which this worker has brought its part.
    """

    away = False

    def origin(self, piece: Piece) -> torch.Tensor:
        """What displacements are measured from."""
        return rounded(piece.anchor, piece.param.dtype)

    def shown_from(self, piece: Piece) -> torch.Tensor:
        """What the mean displacement is taken from where the average is shown."""
        return self.origin(piece)

    def displacement_(self, piece: Piece, out: torch.Tensor) -> None:
        """Write origin - x_i into `out`."""
        torch.sub(self.origin(piece), piece.values(), out=out)

    def brought_(self, piece: Piece, out: torch.Tensor) -> None:
        """Write x_i itself, for a shard's owner, who alone has the anchor."""
        out.copy_(piece.values())

    def own_displacement_(self, piece: Piece, out: torch.Tensor) -> None:
        """Write this worker's own pseudo-gradient into `out`, for rounds without an average."""
        self.displacement_(piece, out)

    def hand_back_(self, piece: Piece) -> None:
        """Start anew from the anchor: x_i, and the parameter."""
        piece.values().copy_(piece.anchor)

    def settle(self) -> None:
        """Wait for what is under way, and leave it due when it was."""

    def end_average(self) -> None:
        """What was under way is in the average."""

    def stay(self) -> None:
        """There was no round after all: what was launched is not waited for any more."""

    def begin_anew(self) -> None:
        """x_i is what the parameters are now, and nothing is under way."""

    # ---- state ----

    def saved(self, *, agree: bool, keep: bool) -> Saved:
        """As `Part.saved`."""
        return Saved()

    def restore(self, saved: Saved, *, same_number: bool) -> Restored:
        """As `Part.restore`: after the parameters."""
        return lambda: None


class TrainingOn(Base):
    """
    x_i of workers that go on training while the average of step k travels, and take it in at step k + n:

        x_i  <-  anchor_{t+1}  +  (x_i at step k + n  -  x_i at step k)

    The progress made meanwhile is kept, and counts in the next round's pseudo-gradient. With beta 0 and alpha 1 this
    is CoCoD-SGD (https://huggingface.co/papers/1906.12043, Algorithm 1); with slow momentum, line 8 gives
    `anchor_{t+1}` from the average of step k.

    Args:
        layouts (`list[FlatAnchor]`): The parameters', whole. One copy of them is kept for x_i at step k.
    """

    def __init__(self, layouts: list[FlatAnchor]) -> None:
        self.departed = {item: torch.empty_like(item.flat, device=item.device) for item in layouts}

    def depart_(self, pieces: list[Piece]) -> None:
        """The displacements are on their way: remember x_i at step k."""
        for piece in pieces:
            piece.of(self.departed[piece.item]).copy_(piece.values())
        self.away = True

    def origin(self, piece: Piece) -> torch.Tensor:
        """x_i at step k from then on: what a look measures is the progress made since."""
        return piece.of(self.departed[piece.item]) if self.away else super().origin(piece)

    def brought_(self, piece: Piece, out: torch.Tensor) -> None:
        """The progress made since step k, while the average is away."""
        super().brought_(piece, out)
        if self.away:
            out.sub_(piece.of(self.departed[piece.item]))

    def shown_from(self, piece: Piece) -> torch.Tensor:
        """The new anchor: a look counts what is in flight."""
        return super().origin(piece)

    def hand_back_(self, piece: Piece) -> None:
        """Not while the average is away: `take_in_` is due later."""
        if not self.away:
            super().hand_back_(piece)

    def stay(self) -> None:
        """Progress is measured from the anchors again."""
        self.away = False

    def begin_anew(self) -> None:
        """As `Base.begin_anew`."""
        self.away = False

    def take_in_(self, anchors: Iterable[tuple[Piece, torch.Tensor]]) -> None:
        """
        Step k + n: the new anchor and the progress made since step k.

        Args:
            anchors (`Iterable`): Every piece of the parameters with its new anchor.
        """
        for piece, anchor in anchors:
            x = piece.of(self.departed[piece.item])
            torch.sub(piece.values(), x, out=x)
            piece.values().copy_(x.add_(rounded(anchor, piece.param.dtype)))
        self.away = False

    # ---- state ----

    def saved(self, *, agree: bool, keep: bool) -> Saved:
        """As `Part.saved`: x_i at step k of a round in flight."""
        flat = enumerate(self.departed.values() if self.away else ())
        return Saved(own=Contents(tensors={f"departed.{index}": departed for index, departed in flat}))

    def restore(self, saved: Saved, *, same_number: bool) -> Restored:
        """As `Part.restore`."""
        if IN_FLIGHT not in saved.own.settings or not same_number:
            return self.stay
        flat = {item: item.of_checkpoint(saved.own, f"departed.{i}") for i, item in enumerate(self.departed)}

        def take_up() -> None:
            for item, departed in flat.items():
                self.departed[item].copy_(departed)
            self.away = True

        return take_up


class Nothing(Base):
    """What a worker brings that cannot take part, and says so: its message is waited for."""

    def displacement_(self, piece: Piece, out: torch.Tensor) -> None:
        """Write 0."""
        out.zero_()

    def brought_(self, piece: Piece, out: torch.Tensor) -> None:
        """The same: there will be no round."""
        out.zero_()
