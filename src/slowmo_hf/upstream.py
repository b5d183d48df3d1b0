"""
Every private name of torch, transformers and accelerate that the package leans on, each in one function: since which
version, why no public name will do, and the test that fails when the name goes.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState

from .frames import callers, callers_of

# What `SlowMoOptimizer` has to be called as torch calls it, on itself (torch >= 2.0): `_step_supports_amp_scaling`,
# which GradScaler asks for (tests/test_optimizer_accelerate.py::test_fp16_step_skipped_on_one_rank), and the tables of
# hooks, `_optimizer_state_dict_pre_hooks`, `_optimizer_step_pre_hooks` and their like
# (tests/test_optimizer.py::test_state_dict_hooks_fire_as_torchs_do), with the mark `hooked` of its `step`
# (tests/test_inner_contracts.py::test_hooks_of_all_optimizers_fire_once_for_a_step). They are its own attributes: no
# functions here.


def copy_each_(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """
    `torch._foreach_copy_`, torch >= 2.1: many small copies, of any dtypes, in few launches. Nothing public copies into
    tensors that exist (tests/test_core.py::test_buckets_hold_every_element_once).
    """
    torch._foreach_copy_(targets, sources)


def collectives_of_job() -> int:
    """
    `ProcessGroup._get_sequence_number_for_group`, torch >= 1.9: how many collectives the job's default group has begun
    so far, by whatever call; 0 where the backend does not count. Nothing public tells, and a wrapper around each of
    torch's functions would miss those that a program has imported by name
    (tests/test_own_collectives.py::test_a_loss_that_gathers_is_told).
    """
    if not dist.is_available() or not dist.is_initialized() or dist.group.WORLD is None:
        return 0
    try:
        return int(dist.group.WORLD._get_sequence_number_for_group())  # type: ignore[attr-defined]
    except (RuntimeError, NotImplementedError):
        return 0


def put_hook_back(handle: Any, hook: Any) -> None:
    """
    `RemovableHandle.hooks_dict_ref` and `.id`, torch >= 2.0: a hook that was removed, as the same entry of its table.
    Registered once more it would be another one, and torch.compile would compile again
    (tests/test_evaluation_passes.py::test_evaluations_of_a_compiled_model_are_compiled_once).
    """
    handle.hooks_dict_ref()[handle.id] = hook


def has_step_hooks(optimizer: Any) -> bool:
    """
    `Optimizer._optimizer_step_pre_hooks` and `_optimizer_step_post_hooks`, torch >= 2.0: whether it has some of its
    own, as nothing public tells (tests/test_inner_contracts.py::test_an_outer_optimizer_keeps_hooks_of_its_own).
    """
    return bool(optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)


def set_process_group(ddp: Any, group: dist.ProcessGroup) -> None:
    """
    `DistributedDataParallel._update_process_group`, torch >= 2.6. Nothing public keeps gradients, unused-parameter
    bitmaps and buffers inside a group after the constructor
    (tests/test_node_workers_wire.py::test_processes_of_a_worker_share_gradients_and_buffers).
    """
    ddp._update_process_group(group)


def communication_hook(ddp: Any) -> str:
    """
    `DistributedDataParallel._get_ddp_logging_data`, torch >= 1.8: the name of a registered hook, built-in ones too,
    which DDP lists nowhere else; empty without one
    (tests/test_node_workers_wire.py::test_a_communication_hook_that_would_couple_workers_is_refused).
    """
    return str(ddp._get_ddp_logging_data().get("comm_hook") or "")


def join_is_on(ddp: Any) -> bool:
    """
    `Joinable._join_config`, torch >= 1.10: whether a `Join` was entered with this wrapper. It stays so when that is
    left, and nothing public tells (tests/test_torch_join.py::test_join_is_refused_on_every_rank).
    """
    return bool(ddp._join_config.enable)


def switch_join_off(ddp: Any) -> None:
    """
    The same, torch >= 1.10: a forward pass gathers no more. `Join` itself sets it anew when it is entered
    (tests/test_torch_join.py::test_a_join_that_was_left_couples_nobody).
    """
    ddp._join_config = ddp._join_config._replace(enable=False)


def joined_models(join: Any) -> list[Any]:
    """
    `Join._joinables`, torch >= 1.10: what a `Join` is of
    (tests/test_torch_join.py::test_join_is_refused_on_every_rank).
    """
    return list(join._joinables)


def in_backward_optimizers(param: Any) -> list[Any]:
    """
    `_in_backward_optimizers` of a parameter, torch >= 2.0: what `torch.distributed.optim._apply_optimizer_in_backward`
    has put there, to step in the backward pass
    (tests/test_refused_optimizers.py::test_what_steps_in_the_backward_pass_is_refused).
    """
    return list(getattr(param, "_in_backward_optimizers", []))


def fsdp_parameter_groups(module: Any) -> list[Any]:
    """
    `FSDPModule._get_fsdp_state` and its `_fsdp_param_groups` (torch >= 2.13; one `_fsdp_param_group` in torch >= 2.6):
    what FSDP2 gathers and reduces together, over the processes of its `mesh_info`. No public name tells or sets these
    processes after `fully_shard` (tests/test_fully_sharded.py::test_gradients_are_the_workers_own_mean).
    """
    state = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


def fsdp_parameters(module: Any) -> list[Any]:
    """
    `FSDPParam.sharded_param` and `FSDPParam._module_info`, torch >= 2.6: what an optimizer holds of a module. While it
    is gathered, the module's own `parameters()` are others; where a model was loaded into its shards (`assign=True`)
    and not called yet, `sharded_param` is another one
    (tests/test_fully_sharded.py::test_a_model_that_was_evaluated_first_is_known,
    tests/test_fully_sharded_refusals.py::test_what_is_not_supported_is_refused_by_name).
    """
    groups = fsdp_parameter_groups(module)
    held = [(one, group.is_sharded) for group in groups for one in group.fsdp_params]
    return [
        getattr(one._module_info.module, one._module_info.param_name) if is_sharded else one.sharded_param
        for one, is_sharded in held
    ]


def fsdp_reshard(modules: list[Any]) -> None:
    """
    `FSDPModule.reshard` of all; before it, where a `_training_state` (torch >= 2.6) is not IDLE, the root's
    `reset_iter_state` (torch >= 2.13; `FSDPState._is_root` tells the root). A forward pass that has raised leaves it
    so, and `reshard` then keeps gathered what stays so after a forward pass. Where no module can be reset, the same by
    hand, with `FSDPState._state_ctx` (tests/test_skipped_batches.py::test_a_pass_that_failed_leaves_no_trace).
    """
    if not modules:
        return
    from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

    idle = TrainingState.IDLE
    states = [(module._get_fsdp_state(), fsdp_parameter_groups(module)) for module in modules]
    if any(one._training_state is not idle for state, groups in states for one in (state, *groups)):
        roots = [m for m in modules if hasattr(m, "reset_iter_state") and m._get_fsdp_state()._is_root]
        for root in roots:
            root.reset_iter_state()
        for state, groups in [] if roots else states:
            state._training_state, state._state_ctx.iter_forward_root = idle, None
            for group in groups:
                group.wait_for_unshard()  # what was fetched ahead is of before, too
                group._training_state = idle
    for module in modules:
        module.reshard()


def fsdp_over_shards_alone(mesh_info: Any) -> Any:
    """
    `FSDPMeshInfo` of `torch.distributed.fsdp._fully_shard._fsdp_common`, torch >= 2.6: the same mesh as HSDP's,
    without replicas; None where it has no shards. The public `set_requires_all_reduce(False)` leaves every gradient
    None (tests/test_fully_sharded.py::test_gradients_are_the_workers_own_mean).
    """
    from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo

    if not isinstance(mesh_info, FSDPMeshInfo):
        return None
    taken = [one.name for one in dataclasses.fields(FSDPMeshInfo) if one.init and one.name != "replicate_mesh_dim"]
    alone = FSDPMeshInfo(**{name: getattr(mesh_info, name) for name in taken})
    if hasattr(mesh_info, "reduce_scatter_process_group"):  # FSDPModule.set_separate_reduce_scatter_group
        alone.reduce_scatter_process_group = mesh_info.reduce_scatter_process_group
    return alone


def fsdp_replicas(group: Any) -> list[str]:
    """
    `DDPMeshInfo` of `torch.distributed.fsdp._fully_shard._fsdp_common`, torch >= 2.6: what a parameter group knows
    of replicas, over which it averages. `post_forward_mesh_info` is of those who gather again in a backward pass
    (tests/test_fully_sharded.py::test_a_torch_that_would_couple_workers_is_refused).
    """
    from torch.distributed.fsdp._fully_shard._fsdp_common import DDPMeshInfo

    known = {"mesh_info": group.mesh_info, **vars(group)}
    return [k for k, v in known.items() if isinstance(v, DDPMeshInfo) and k != "post_forward_mesh_info"]


def fsdp_all_reduce_hook(group: Any) -> Any:
    """
    `FSDPParamGroup._all_reduce_hook`, torch >= 2.7 (none before): what `FSDPModule.set_all_reduce_hook` has set, which
    nothing public tells (tests/test_fully_sharded.py::test_what_would_couple_workers_is_refused).
    """
    return getattr(group, "_all_reduce_hook", None)


def set_group_timeout(group: dist.ProcessGroup, timeout: timedelta) -> timedelta | None:
    """
    `torch.distributed.set_timeout`, torch >= 2.15; `torch.distributed.distributed_c10d._set_pg_timeout` before: how
    long collectives of a group wait from now on; what it was before, None where that is not known
    (tests/test_fully_sharded_refusals.py::test_a_frozen_mate_is_told_in_time).
    """
    before = None
    for device in group._device_types:
        options = getattr(group._get_backend(device), "options", None)
        before = getattr(options, "_timeout", before)
    if before is not None:
        set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
        set_timeout(timeout, group)
    return before


def compiled_module(model: Any) -> Any:
    """
    `OptimizedModule._orig_mod`, torch >= 2.0: what `torch.compile` has wrapped; None elsewhere. Accelerate's own
    `extract_model_from_parallel` takes the same one (tests/test_evaluation.py::test_a_compiled_model_is_shown_too).
    """
    return getattr(model, "_orig_mod", None)


def non_persistent_buffers(model: Any) -> set[str]:
    """
    `Module._non_persistent_buffers_set`, torch >= 1.6: full names of the buffers that `state_dict` leaves out. A state
    dictionary would tell them too, but hooks of the user's change what is in it
    (tests/test_buffers.py::test_which_buffers_are_not_persistent).
    """
    return {
        f"{name}.{buffer}" if name else buffer
        for name, module in model.named_modules()
        for buffer in module._non_persistent_buffers_set
    }


def default_store() -> Any:
    """
    `torch.distributed.distributed_c10d._get_default_store`, torch >= 1.8: the job's key-value store, for which there
    is no public getter (tests/test_faults.py::test_a_fault_on_one_rank_is_an_error_on_the_other).
    """
    return dist.distributed_c10d._get_default_store()


def accelerate_is_in_use() -> bool:
    """
    `AcceleratorState._shared_state`, accelerate >= 1.3: whether an Accelerator was made. The public constructor would
    make the state (tests/test_callback_logs.py::test_unsupported_engines_are_refused_by_name).
    """
    return bool(AcceleratorState._shared_state)


def held_by(accelerator: Any) -> tuple[list[Any], list[Any], list[Any], list[Any]]:
    """
    `Accelerator._optimizers`, `_schedulers`, `_custom_objects` and `_models`, accelerate >= 1.3: what `prepare` and
    `register_for_checkpointing` took (tests/test_finish.py::test_end_training_finishes,
    tests/test_accelerate_resume.py::test_what_is_registered_goes_on_as_each_workers_own).
    """
    held = (accelerator._optimizers, accelerator._schedulers, accelerator._custom_objects, accelerator._models)
    return tuple(map(list, held))  # type: ignore[return-value]


def forget_evaluation(trainer: Any) -> None:
    """
    `_is_accelerate_prepared` of a model, accelerate >= 1.3. An evaluation before training sets it, and `Trainer.train`
    then wraps no DDP around the model: a stock Trainer's ranks train apart without a word
    (tests/test_evaluated_first.py::test_training_behind_an_evaluation_is_as_without).
    """
    if getattr(trainer.model, "_is_accelerate_prepared", False):
        trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)  # the forward pass under autocast
        trainer.model._is_accelerate_prepared = False
        trainer.model_wrapped = trainer.model


def output_folder(trainer: Any) -> str:
    """
    `Trainer._get_output_dir` and `Trainer._trial`, transformers >= 4.57: where checkpoints of this run go. A
    hyperparameter search gives every trial a folder, which no test holds
    (tests/test_checkpoint_folders.py::test_saves_at_epochs_and_of_the_best_are_whole).
    """
    return str(trainer._get_output_dir(trial=getattr(trainer, "_trial", None)))


# Trainer's own method that writes a checkpoint, of all ranks, transformers >= 4.57. No event comes before it, and
# save_strategy="best" decides behind the evaluation
# (tests/test_checkpoint_folders.py::test_saves_at_epochs_and_of_the_best_are_whole).
SAVE_CHECKPOINT = "_save_checkpoint"

# Training, transformers >= 4.57: `train` may run it again, with a smaller batch
# (tests/test_retries.py::test_runs_that_trainer_begins_anew_stay_in_step).
RUN = "_inner_training_loop"

# What loads the optimizer where a run is resumed, behind the weights, transformers >= 4.57. A subclass may set options
# behind it (tests/test_set_on_resume.py::test_what_a_program_sets_where_a_resumed_run_begins_stays).
LOAD_OPTIMIZER = "_load_optimizer_and_scheduler"


def trl_metrics(trainer: Any) -> dict[str, list[float]] | None:
    """
    `_metrics` of TRL's trainers, trl >= 1.0: by name, what goes into the log's next entry, of training or evaluation,
    and nobody is handed before; None elsewhere (tests/test_trl.py::test_training_steps_gather_nothing).
    """
    metrics, mode = getattr(trainer, "_metrics", None), "train" if trainer.model.training else "eval"
    return metrics[mode] if isinstance(metrics, dict) and mode in metrics else None


def push_checkpoint(trainer: Any, folder: str) -> None:
    """
    `Trainer._push_from_checkpoint`, transformers >= 4.57: the push of `hub_strategy`, made when the checkpoint is
    whole (tests/test_checkpoint_folders.py::test_a_checkpoint_from_the_hub_goes_on).
    """
    trainer._push_from_checkpoint(folder)


# ---- who is calling: what no argument tells ----


def run_as_written(function: Callable[..., Any]) -> Callable[..., Any]:
    """
    `torch._disable_dynamo`, torch >= 2.1: also where torch.compile traces the caller. `torch.compiler.disable` would
    import the compiler with the package (tests/test_compiled_loops.py::test_the_package_imports_no_compiler).
    """
    return torch._disable_dynamo(function)  # type: ignore[attr-defined]


def is_called_by(function: str, module: str) -> bool:
    """
    Whether a function of that name, in a module whose name holds `module`, is a few calls above: torch's hooks and
    AcceleratedOptimizer lie between. `_init_optim_state` of torch.distributed.checkpoint (torch >= 2.3) makes a fresh
    optimizer's state by a step that must not count, and `_get_optim_state_dict` there asks for it in a save;
    `evaluation_loop` of transformers' Trainer (>= 4.57) calls `model.eval()` first
    (tests/test_optimizer_state.py::test_distributed_checkpoints_dummy_step_does_not_count,
    tests/test_optimizer_state.py::test_save_state_says_what_is_wrong,
    tests/test_evaluation.py::test_trainer_evaluates_the_average_of_a_wrapped_optimizer).
    """
    return any(
        frame.f_code.co_name == function and module in frame.f_globals.get("__name__", "") for frame in callers(11)
    )


def is_entering_join() -> bool:
    """
    `enable` of the `Join` that is being made above: with False it does nothing, and `join_hook` is not told
    (torch >= 1.10; tests/test_torch_join.py::test_join_is_refused_on_every_rank).
    """
    return any(
        frame.f_code.co_name == "__init__"
        and frame.f_globals.get("__name__", "").endswith("distributed.algorithms.join")
        and bool(frame.f_locals.get("enable"))
        for frame in callers(4)
    )


def is_telling(handler: Any, event: str) -> bool:
    """
    Whether this `CallbackHandler` is telling its callbacks of that event, transformers >= 4.57: of a step that others
    hear of before us nothing else says whether it is counted
    (tests/test_trainer_asked.py::test_asked_at_any_event_training_goes_on_as_if_not).
    """
    return any(
        frame.f_code.co_name == event and frame.f_locals.get("self") is handler
        for frame in callers(sys.getrecursionlimit())
    )


def calling_objects(kind: type) -> list[Any]:
    """
    The objects of that class whose methods are above this call, the nearest first. A callback's events are given
    neither Trainer nor Accelerator, and Trainers train one inside the other (transformers >= 4.57;
    tests/test_callback_logs.py::test_one_callback_serves_the_trainer_that_trains,
    tests/test_trainer_asked.py::test_one_callback_in_two_trainers_at_once_is_refused).
    """
    found = {id(one): one for one in (frame.f_locals.get("self") for frame in callers_of(kind))}
    return [one for one in found.values() if isinstance(one, kind)]


def loaded_checkpoint(trainer: Any) -> str | None:
    """
    `resume_from_checkpoint` of `Trainer._inner_training_loop` or `train`, as a call above has it: the folder that the
    Trainer has loaded, which no event is given (transformers >= 4.57;
    tests/test_checkpoint_folders.py::test_a_checkpoint_is_found_where_it_is).
    """
    for frame in callers_of(type(trainer)):
        folder = frame.f_locals.get("resume_from_checkpoint")
        if frame.f_locals.get("self") is trainer and isinstance(folder, str | os.PathLike):
            return os.fspath(folder)
    return None
