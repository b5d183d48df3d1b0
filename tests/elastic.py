"""
What `tests/test_elastic.py` starts in a program's place: it runs the program, and notes the weights of each step.

    python tests/elastic.py train.py FOLDER 40

A process has a folder of its own in ELASTIC_NOTES: `pid`; `i.pt`, the parameters that step i (from 0) begins with;
`end.pt`, those that a program which came to its end leaves. Step i waits until the file `gate` there says more than i.
FOLDER is made late.
"""

from __future__ import annotations

import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

for name in ("bitsandbytes", "wandb", "peft", "datasets"):  # a second less for each process that starts
    sys.modules[name] = None  # type: ignore[assignment]


def main() -> None:
    """Note and run."""
    notes = Path(os.environ["ELASTIC_NOTES"], f"{time.time_ns()}_{os.environ['RANK']}_of_{os.environ['WORLD_SIZE']}")
    notes.mkdir(parents=True)
    (notes / "pid").write_text(str(os.getpid()))
    parameters: list[torch.Tensor] = []

    def before_step(optimizer: Any, args: Any, kwargs: Any) -> None:
        if type(optimizer) is not torch.optim.AdamW:  # what wraps it
            return
        parameters[:] = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        # Adam's own count of steps goes through checkpoints.
        step = int(optimizer.state.get(parameters[0], {}).get("step", 0))
        _note(notes, str(step), parameters)
        while step >= int((notes.parent / "gate").read_text()):
            time.sleep(0.02)

    register_optimizer_step_pre_hook(before_step)
    sys.argv = sys.argv[1:]
    if os.environ["RANK"] == "0":
        _make_late(sys.argv[1])
    runpy.run_path(sys.argv[0], run_name="__main__")
    _note(notes, "end", parameters)


def _make_late(folder: str) -> None:
    """The folder, which Trainer makes on rank 0: the others must not count on it."""
    make = os.makedirs

    def late(name: Any, *args: Any, **kwargs: Any) -> None:
        if name == folder and not os.path.isdir(name):
            time.sleep(1)
        make(name, *args, **kwargs)

    os.makedirs = late


def _note(notes: Path, name: str, parameters: list[torch.Tensor]) -> None:
    """Whole or absent."""
    torch.save([parameter.detach().clone() for parameter in parameters], notes / "half")
    (notes / "half").rename(notes / f"{name}.pt")


if __name__ == "__main__":
    main()
