"""The averages at the ends of a run's epochs: the best, the last, and the mean of the last ones."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch

from translation.judged import MEAN_OF, choose
from translation.model import mean_of_states


class KeptModels:
    """
    Files in a folder, so that a run that is gone on with has them too.

    Args:
        folder (`Path`): Made if need be.
        means (`Sequence[int]`, *optional*, defaults to `(5,)`): Of how many last averages there is a mean.
    """

    def __init__(self, folder: Path, means: Sequence[int] = (MEAN_OF,)) -> None:
        self.folder, self.means = folder, means
        self.folder.mkdir(parents=True, exist_ok=True)

    def keep(self, epoch: int, nll: float, model: torch.nn.Module) -> None:
        """The average of this epoch's end, judged by its validation NLL; what is neither best nor late goes."""
        self._forget_after(epoch)
        values = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
        path = self.folder / f"average{epoch}_{nll!r}.pt"
        beside = path.with_suffix(".part")
        torch.save(values, beside)
        beside.replace(path)
        wanted = {epoch for epochs in self.epochs().values() for epoch in epochs}
        for other in self._paths:
            if _epoch(other) not in wanted:
                other.unlink()

    def mean(self, epochs: list[int]) -> dict[str, torch.Tensor]:
        """State dictionary of the mean of these epochs' averages."""
        paths = {_epoch(path): path for path in self._paths}
        return mean_of_states(self._load(paths[epoch]) for epoch in epochs)

    def epochs(self) -> dict[str, list[int]]:
        """By kind of model, whose averages it is made of."""
        return choose({_epoch(path): _nll(path) for path in self._paths}, self.means)

    @property
    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("average*.pt"), key=_epoch)

    def _forget_after(self, epoch: int) -> None:
        """A run that went on from an earlier save comes to these epochs again."""
        for path in self._paths:
            if _epoch(path) >= epoch:
                path.unlink()

    @staticmethod
    def _load(path: Path) -> dict[str, torch.Tensor]:
        state: dict[str, torch.Tensor] = torch.load(path, weights_only=True)
        return state


def _epoch(path: Path) -> int:
    return int(_parts(path)[0])


def _nll(path: Path) -> float:
    return float(_parts(path)[1])


def _parts(path: Path) -> tuple[str, str]:
    found = re.fullmatch(r"average(\d+)_(.+)\.pt", path.name)
    assert found is not None
    return found[1], found[2]
