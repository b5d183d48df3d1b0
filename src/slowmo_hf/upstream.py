"""
Every private name of torch, transformers and accelerate that the package leans on, each in one function: since which
version, why no public name will do, and the test that fails when the name goes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch.distributed as dist
from accelerate.state import AcceleratorState

# What `SlowMoOptimizer` has to be called as torch calls it, on itself: `_step_supports_amp_scaling`, which GradScaler
# asks for (torch >= 2.0; tests/test_optimizer.py::test_fp16_step_skipped_on_one_rank), and the tables of state hooks,
# `_optimizer_state_dict_pre_hooks` and its like (torch >= 2.0;
# tests/test_optimizer.py::test_state_dict_hooks_fire_as_torchs_do). They are its own attributes: no functions here.


def set_process_group(ddp: Any, group: dist.ProcessGroup) -> None:
    """
    `DistributedDataParallel._update_process_group`, torch >= 2.6. Nothing public keeps gradients, unused-parameter
    bitmaps and buffers inside a group after the constructor
    (tests/test_node_workers.py::test_processes_of_a_worker_share_gradients_and_buffers).
    """
    ddp._update_process_group(group)


def communication_hook(ddp: Any) -> str:
    """
    `DistributedDataParallel._get_ddp_logging_data`, torch >= 1.8: the name of a registered hook, built-in ones too,
    which DDP lists nowhere else; empty without one
    (tests/test_node_workers.py::test_a_communication_hook_that_would_couple_workers_is_refused).
    """
    return str(ddp._get_ddp_logging_data().get("comm_hook") or "")


def default_store() -> Any:
    """
    `torch.distributed.distributed_c10d._get_default_store`, torch >= 1.8: the job's key-value store, for which there
    is no public getter (tests/test_faults.py::test_a_fault_on_one_rank_is_an_error_on_the_other).
    """
    return dist.distributed_c10d._get_default_store()


def accelerate_is_in_use() -> bool:
    """
    `AcceleratorState._shared_state`, accelerate >= 1.1: whether an Accelerator was made. The public constructor would
    make the state (tests/test_callback.py::test_unsupported_engines_are_refused_by_name).
    """
    return bool(AcceleratorState._shared_state)


def prepared_optimizers(accelerator: Any) -> list[Any]:
    """
    `Accelerator._optimizers`, accelerate >= 1.1: those that `prepare` took
    (tests/test_finish.py::test_end_training_finishes).
    """
    return list(accelerator._optimizers)


def prepared_schedulers(accelerator: Any) -> list[Any]:
    """
    `Accelerator._schedulers`, accelerate >= 1.1: those that `prepare` took
    (tests/test_optimizer.py::test_save_state_goes_on_bit_for_bit).
    """
    return list(accelerator._schedulers)


def output_folder(trainer: Any) -> str:
    """
    `Trainer._get_output_dir` and `Trainer._trial`, transformers >= 4.57: where checkpoints of this run go. A
    hyperparameter search gives every trial a folder, which no test holds
    (tests/test_checkpoint.py::test_saves_at_epochs_and_of_the_best_are_whole).
    """
    return str(trainer._get_output_dir(trial=getattr(trainer, "_trial", None)))


def push_checkpoint(trainer: Any, folder: str) -> None:
    """
    `Trainer._push_from_checkpoint`, transformers >= 4.57: the push of `hub_strategy`, made when the checkpoint is
    whole (tests/test_checkpoint.py::test_a_checkpoint_from_the_hub_goes_on).
    """
    trainer._push_from_checkpoint(folder)


# ---- who is calling: what no argument tells ----


def _callers(depth: int) -> Iterator[FrameType]:
    """The frames above the caller of this function's caller, nearest first."""
    frame: FrameType | None = sys._getframe(3)
    while frame is not None and depth:
        yield frame
        frame, depth = frame.f_back, depth - 1


def is_called_by(function: str, module: str) -> bool:
    """
    Whether a function of that name, in a module whose name holds `module`, is a few calls above: torch's hooks and
    AcceleratedOptimizer lie between. `_init_optim_state` of torch.distributed.checkpoint (torch >= 2.3) makes a fresh
    optimizer's state by a step that must not count, and `_get_optim_state_dict` there asks for it in a save;
    `save_accelerator_state` of accelerate (>= 1.1) saves rank 0's optimizer alone
    (tests/test_optimizer.py::test_distributed_checkpoints_dummy_step_does_not_count,
    tests/test_optimizer.py::test_save_state_without_a_line_says_which).
    """
    return any(
        frame.f_code.co_name == function and module in frame.f_globals.get("__name__", "") for frame in _callers(9)
    )


def calling_object(kind: type) -> Any:
    """
    The nearest object of that class whose method is above this call; None where there is none. A callback's events
    are given neither Trainer nor Accelerator (transformers >= 4.57;
    tests/test_callback.py::test_one_callback_serves_the_trainer_that_trains).
    """
    for frame in _callers(40):
        found = frame.f_locals.get("self")
        if isinstance(found, kind):
            return found
    return None


def loaded_checkpoint(trainer: Any) -> str | None:
    """
    `resume_from_checkpoint` of `Trainer._inner_training_loop` or `train`, as a call above has it: the folder that the
    Trainer has loaded, which no event is given (transformers >= 4.57;
    tests/test_checkpoint.py::test_a_checkpoint_is_found_where_it_is).
    """
    for frame in _callers(40):
        folder = frame.f_locals.get("resume_from_checkpoint")
        if frame.f_locals.get("self") is trainer and isinstance(folder, str | os.PathLike):
            return os.fspath(folder)
    return None
