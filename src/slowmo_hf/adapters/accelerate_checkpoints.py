"""`accelerator.save_state` and `load_state` with every worker's own state."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import upstream
from ..checkpoints.files import FOLDER, verify_checkpoint
from ..checkpoints.state import (
    check_snapshot,
    finish_together,
    keeps_files,
    read_together,
    seal_snapshot,
    together,
    write_snapshot,
)
from ..contents import CheckpointError
from ..log import logger
from ..training.outer_loop import OuterLoop
from ..wire.job import is_in_process
from .functions import consensus, unwrap

if TYPE_CHECKING:
    from accelerate.accelerator import Accelerator


def register_for_checkpointing(accelerator: Accelerator, optimizer: torch.optim.Optimizer) -> None:
    """
    Make `accelerator.save_state` and `load_state` complete, at any step: the folder gets the average where Accelerate
    puts the model, and beside it every worker's own weights, inner optimizer and messages, which a load takes up
    before training goes on.

        accelerator = Accelerator(); model, optimizer, loader = accelerator.prepare(...)
        slowmo_hf.register_for_checkpointing(accelerator, optimizer)

    Save into a new folder each time (`ProjectConfiguration(automatic_checkpoint_naming=True)`): a save over an old
    folder that is killed half-way would mix the two. No hook of Accelerate's follows its own files, so
    `accelerator.save_state` itself is wrapped: the manifest comes after them, and a save that was killed anywhere
    before has none.

    Args:
        accelerator (`accelerate.Accelerator`): The one that prepared the optimizer.
        optimizer (`torch.optim.Optimizer`): A `SlowMoOptimizer`, bare or prepared.
    """
    bare = unwrap(optimizer)
    bare.saved_beside = True
    to_seal: list[Callable[[], None]] = []

    def save(models: list[Any], weights: list[Any], output_dir: str) -> None:
        outer_loop = bare.outer_loop
        if outer_loop is None and bare.awaits_a_checkpoint:
            raise RuntimeError("what load_state loaded has not been taken up yet: save after the first forward pass.")
        if outer_loop is None or not outer_loop.config.has_rounds:
            return  # not started, or stock training
        folder = Path(output_dir)
        keeper = keeps_files(outer_loop, folder, accelerator.local_process_index)
        with consensus(bare):
            _let_go(weights)
            words = f"checkpoint {folder} cannot be written"
            objects: dict[str, Any] = {}  # made before `write_snapshot` begins, where workers may meet
            together(outer_loop, words, lambda: objects.update(_own_objects(accelerator)))
            together(
                outer_loop, words, lambda: write_snapshot(str(folder), outer_loop, shared=keeper, objects=objects)
            )

        def finish() -> None:
            if keeper:
                seal_snapshot(folder, outer_loop)

        to_seal.append(lambda: finish_together(outer_loop, folder, finish))

    def load(models: list[Any], input_dir: str) -> None:
        # Accelerate loads model, optimizer and scaler after this hook, rank 0's on every rank: ours must come later.
        bare.before_training(lambda outer_loop: _take_up(accelerator, outer_loop, Path(input_dir)))

    save_state = accelerator.save_state

    @functools.wraps(save_state)
    def save_and_seal(*args: Any, **kwargs: Any) -> Any:
        to_seal.clear()  # of a save that failed
        saved_to = save_state(*args, **kwargs)
        for seal_it in to_seal:
            seal_it()
        return saved_to

    accelerator.save_state = save_and_seal  # type: ignore[method-assign]
    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def _let_go(weights: list[Any]) -> None:
    """
    The state dictionaries alias the parameters, and the local weights return before Accelerate writes: give them the
    average's copy.
    """
    copies: dict[tuple[Any, ...], torch.Tensor] = {}
    for state_dict in weights:
        for name, value in state_dict.items():
            if isinstance(value, torch.Tensor):
                key = (value.data_ptr(), value.shape, value.stride(), value.dtype)  # tied weights stay tied
                state_dict[name] = copies.setdefault(key, value.detach().clone())


def _own_objects(accelerator: Accelerator) -> dict[str, Any]:
    """A scaler that skipped a step on one rank alone, and the schedulers that it held back."""
    if accelerator.scaler is None:
        return {}
    schedulers = {
        f"scheduler.{index}": scheduler.state_dict()
        for index, scheduler in enumerate(upstream.prepared_schedulers(accelerator))
    }
    return {"scaler": accelerator.scaler.state_dict(), **schedulers}


def _take_up(accelerator: Accelerator, outer_loop: OuterLoop, folder: Path) -> None:
    if not any(outer_loop.workers.world.gather_objects((folder / FOLDER).is_dir())):
        if outer_loop.attempted_steps:
            raise CheckpointError(
                f"{folder} has no state of local training, and this run has begun: load it before the first step."
            )
        logger.warning(
            "%s has no state of local training: weights and optimizer are taken, slow momentum starts fresh", folder
        )
        return
    with suppress(ValueError):
        # Here, where no rank has failed yet; what was wrong there belongs to the run that is left.
        outer_loop.in_flight.start_what_others_wait_for()

    def check() -> Callable[[], dict[str, Any]]:
        if not is_in_process() or outer_loop.workers.world.rank == 0:  # there all workers read the same disk
            verify_checkpoint(folder)
        return check_snapshot(str(folder), outer_loop)

    objects = read_together(outer_loop, f"checkpoint {folder} cannot be resumed", check)
    if accelerator.scaler is not None and "scaler" in objects:
        accelerator.scaler.load_state_dict(objects["scaler"])
        for index, scheduler in enumerate(upstream.prepared_schedulers(accelerator)):
            scheduler.load_state_dict(objects[f"scheduler.{index}"])
