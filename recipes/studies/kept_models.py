"""The averages at the ends of a run's epochs: the best, the last, and the mean of the last five."""

from __future__ import annotations

import re
from pathlib import Path

import torch

MEAN_OF = 5
KINDS = ("best", "last", f"mean_of_{MEAN_OF}")


class KeptModels:
    """
    Files in a folder, so that a run that is gone on with has them too.

    Args:
        folder (`Path`): Made if need be.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)

    def keep(self, epoch: int, nll: float, model: torch.nn.Module) -> None:
        """The average of this epoch's end, judged by its validation NLL; what is neither best nor late goes."""
        self._forget_after(epoch)
        values = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
        path = self.folder / f"average{epoch}_{nll!r}.pt"
        beside = path.with_suffix(".part")
        torch.save(values, beside)
        beside.replace(path)
        wanted = {self._best, *self._paths[-MEAN_OF:]}
        for other in set(self._paths) - wanted:
            other.unlink()

    def models(self) -> dict[str, dict[str, torch.Tensor]]:
        """State dictionaries by `KINDS`; early in a run the mean is of fewer."""
        late = [self._load(path) for path in self._paths[-MEAN_OF:]]
        mean = {
            name: torch.stack([state[name].double() for state in late]).mean(0).to(value.dtype)
            for name, value in late[-1].items()
        }
        return dict(zip(KINDS, (self._load(self._best), late[-1], mean), strict=True))

    def epochs(self) -> dict[str, list[int]]:
        """Whose averages `models` are made of."""
        late = [_epoch(path) for path in self._paths[-MEAN_OF:]]
        return dict(zip(KINDS, ([_epoch(self._best)], late[-1:], late), strict=True))

    @property
    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("average*.pt"), key=_epoch)

    @property
    def _best(self) -> Path:
        return min(self._paths, key=_nll)

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
