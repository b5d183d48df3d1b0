"""Overlapped rounds: the average of a round travels while its workers train on (`overlap_steps`)."""

from __future__ import annotations

import torch

from .averager import Base, FlatAnchor, Piece, rounded


class TrainingOn(Base):
    """
    x_i of workers that go on training while the average of step k travels, and take it in at step k + n:

        x_i  <-  anchor_{t+1}  +  (x_i at step k + n  -  x_i at step k)

    The progress made meanwhile is kept, and counts in the next round's pseudo-gradient. With beta 0 and alpha 1 this
    is CoCoD-SGD (https://huggingface.co/papers/1906.12043, Algorithm 1); with slow momentum, line 8 gives
    `anchor_{t+1}` from the average of step k.

    Args:
        anchors (`list[FlatAnchor]`): The parameters' layout. One copy of them is kept for x_i at step k.
    """

    def __init__(self, anchors: list[FlatAnchor]) -> None:
        self.departed = {item: torch.empty_like(item.flat) for item in anchors}
        self.away = False

    def depart_(self, pieces: list[Piece]) -> None:
        """The displacements are on their way: remember x_i at step k."""
        for piece in pieces:
            piece.of(self.departed[piece.item]).copy_(piece.values())
        self.away = True

    def origin(self, piece: Piece) -> torch.Tensor:
        """x_i at step k from then on: what a look measures is the progress made since."""
        return piece.of(self.departed[piece.item]) if self.away else super().origin(piece)

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

    def take_in_(self, pieces: list[Piece]) -> None:
        """Step k + n: the anchor and the progress made since step k."""
        for piece in pieces:
            x = piece.of(self.departed[piece.item])
            torch.sub(piece.values(), x, out=x)
            piece.values().copy_(x.add_(rounded(piece.anchor, piece.param.dtype)))
        self.away = False


class Nothing(Base):
    """What a worker brings that cannot take part, and says so: its message is waited for."""

    def displacement_(self, piece: Piece, out: torch.Tensor) -> None:
        """Write 0."""
        out.zero_()
