"""The state of every random generator that an evaluation may draw from."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass
class RandomState:
    """Python, numpy, CPU and device generators at one moment."""

    python: Any
    numpy: Any
    cpu: torch.Tensor
    cuda: list[torch.Tensor]

    @classmethod
    def take(cls) -> RandomState:
        """The state now."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda)

    def to_dict(self) -> dict[str, Any]:
        """In tensors, lists and numbers, which `torch.load` reads with `weights_only`."""
        kind, words, *more = self.numpy
        numpy = [kind, torch.from_numpy(words.astype(np.int64)), *more]
        return {"python": self.python, "numpy": numpy, "cpu": self.cpu, "cuda": self.cuda}

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> RandomState:
        """The inverse."""
        kind, words, *more = saved["numpy"]
        return cls(saved["python"], (kind, words.numpy().astype(np.uint32), *more), saved["cpu"], saved["cuda"])

    def give_back(self) -> None:
        """Set every generator to this state."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)
