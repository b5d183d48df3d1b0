"""The pass with which training begins: the first one with gradients through what an optimizer of ours holds."""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate.state import GradientState
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from .. import upstream
from ..config import SlowMoConfig
from ..dtensors import sharded_modules
from ..log import logger
from ..training.optimizers_inside import parameters_of
from ..training.program import Program
from ..wire.job import is_in_process, processes_in_job
from .alive import after_collection, alive
from .fully_sharded import all_parameters, sharded_roots
from .held_apart import is_apart

T = TypeVar("T")


def never_compiled(*methods: str) -> Callable[[type[T]], type[T]]:
    """
    These methods of a class run as written where a compiled function calls them: what they begin or show is for now,
    no part of a graph, and torch.compile cannot trace messages between ranks.
    """

    def mark(kind: type[T]) -> type[T]:
        for name in methods:
            setattr(kind, name, upstream.run_as_written(getattr(kind, name)))
        return kind

    return mark


def listen(listener: Any) -> Callable[[], Any]:
    """
    Have every module's forward pass shown to `listener.on_forward(module)`; call the result to end that. torch's table
    of global hooks lives as long as the process, so the listener is held weakly, and its entry goes with it: an
    optimizer that never trains (a sweep that failed, the original of a copy) keeps neither its parameters nor a hook
    on every module.

    One hook serves all, and comes back as the same entry of that table: torch.compile looks at the table, and compiled
    again at every `model.eval()`, until it gave up, when each time had a hook of its own.
    """
    reference = weakref.ref(listener)
    with _changing:
        _listening.append(reference)
        if _entry:
            upstream.put_hook_back(_entry[0], _show)
        else:
            _entry.append(register_module_forward_pre_hook(_show))
    return weakref.finalize(listener, _end, reference)


def _end(listener: weakref.ref[Any]) -> None:
    with _changing:
        _listening.remove(listener)
        if not _listening:
            _entry[0].remove()


def _show(module: torch.nn.Module, args: Any) -> None:
    for listener in tuple(_listening):
        present = listener()
        if present is not None:
            present.on_forward(module)


_listening: list[weakref.ref[Any]] = []
_changing = threading.RLock()  # workers of one process are threads, and the garbage collector ends entries anywhere
_entry: list[RemovableHandle] = []  # of `_show`, once there was one


def trains(optimizer: Any, module: torch.nn.Module) -> bool:
    """
    Whether a pass through `module` is one of training. An evaluation, perhaps on one rank alone, is not: the start is
    collective. Neither is a pass through a network that is frozen while another one trains; but with a checkpoint to
    be taken up it is, for the other one learns from what it was.

    Args:
        optimizer (`SlowMoOptimizer`): Whose training.
    """
    if not torch.is_grad_enabled():
        return False
    own = _parameters(optimizer)
    holds_some = any(id(p) in own for p in all_parameters(module))
    return holds_some and (optimizer.awaits_a_checkpoint or any(p.requires_grad for p in own.values()))


def is_recorded() -> bool:
    """Whether this pass is made to record the model (`torch.jit.trace`, TensorBoard's `add_graph`): it has no step."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined,no-untyped-call]


@contextmanager
def unfrozen(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """A network that is frozen as a whole, in turn, starts with all its parameters."""
    own = _parameters(optimizer).values()
    frozen = [] if any(p.requires_grad for p in own) else list(own)
    try:
        for param in frozen:
            param.requires_grad_(True)
        yield
    finally:
        for param in frozen:
            param.requires_grad_(False)


def is_before_prepare(optimizer: Any, module: torch.nn.Module) -> bool:
    """
    Whether this is a pass before `accelerator.prepare` (a summary, a check of shapes, perhaps on one rank alone),
    which is none of training. Behind `accelerator.load_state` it is: its gradients are of the weights that were saved.

    Args:
        optimizer (`SlowMoOptimizer`): Not started.
    """
    if is_in_process() or optimizer.is_prepared or optimizer.awaits_a_checkpoint:
        return False
    if not upstream.accelerate_is_in_use():
        return False
    return not (sharded_modules([module]) or any(isinstance(one, DistributedDataParallel) for one in module.modules()))


def whole_model(
    optimizer: torch.optim.Optimizer, module: torch.nn.Module | None, *, tell: bool = False
) -> list[torch.nn.Module]:
    """This module, if it holds all of the optimizer's parameters; nothing, and with `tell` a warning, if not."""
    if module is not None and _parameters(optimizer).keys() <= {id(p) for p in all_parameters(module)}:
        return [module]
    if tell:
        logger.warning(
            "no module with all of the optimizer's parameters was called: buffers, if any, are not averaged, and "
            "model.eval() shows this rank's own weights (slowmo_hf.consensus shows the average)"
        )
    return []


def trained_models(
    optimizer: torch.optim.Optimizer, wrappers: list[Any], among: Iterable[torch.nn.Module]
) -> tuple[list[torch.nn.Module], list[Any]]:
    """
    Where no pass has said it: the wrapped ones, or those in shards, or the first of `among` that holds all; and the
    wrappers.
    """
    models = [ddp.module for ddp in wrappers] or sharded_roots(optimizer)
    return models or next(filter(None, (whole_model(optimizer, module) for module in among)), []), wrappers


def program_in_use() -> Program:
    """What all ranks compare of Accelerate's settings; the batch size is that of the data loader which is iterated."""
    if is_in_process() or not upstream.accelerate_is_in_use():
        return Program()
    state: Any = GradientState()
    loader = state.active_dataloader
    sampler = getattr(loader, "batch_sampler", None)  # of a stream it has no length: it is neither true nor false
    batches = loader if sampler is None else sampler
    size = getattr(batches, "batch_size", None)
    return Program(
        accumulation=state.num_steps,
        batch_size=size if isinstance(size, int) else None,
        accumulation_name="accelerator.gradient_accumulation_steps",
        batch_size_name="the DataLoader's batch size",
    )


def _parameters(optimizer: torch.optim.Optimizer) -> dict[int, torch.Tensor]:
    return {id(p): p for p in parameters_of(optimizer)}


def refuse_separate_gradients(config: SlowMoConfig, worker_size: int, models: Iterable[torch.nn.Module] = ()) -> None:
    """Without DDP's wrapper or FSDP2 nobody averages the gradients of a worker's processes."""
    if is_in_process() or processes_in_job() == 1 or (worker_size == 1 and config.base != "all_reduce"):
        return
    if sharded_modules(models):
        return
    other = "another base" if config.base == "all_reduce" else "processes_per_worker=1"
    raise RuntimeError(
        f"base={config.base!r} with {worker_size} processes per worker needs a DistributedDataParallel wrapper that "
        "averages gradients, or FSDP2, and none of the model was found. Train the model that accelerator.prepare "
        f"returned, or use {other}."
    )


def trains_a_copy(optimizer: Any) -> str | None:
    """
    Why an optimizer without a model cannot start: a model exchanges gradients that no optimizer holds, and has
    parameters of the same shapes. With one of these signs alone it is a warning: who trains that model is not known.

    Args:
        optimizer (`SlowMoOptimizer`): Not started. No module that was called and no DDP wrapper has its parameters.
    """
    if is_in_process() or optimizer.config.base == "all_reduce" or processes_in_job() == 1:
        return None
    own, left = list(parameters_of(optimizer)), _left_to_nobody()
    if not left or not own:
        return None
    words = (
        f"the inner optimizer {type(optimizer.inner_optimizer).__name__} holds {len(own)} parameters that are no "
        "parameters of a model that was called, and no optimizer holds those of a model in DistributedDataParallel: "
        "DDP would average its gradients at every step, so workers would not train alone. If they are copies (fp32 "
        "master weights), give the optimizer the model's own parameters: keep these in fp32 and train in bf16 by "
        "autocast (mixed_precision='bf16')."
    )
    signs = [(_are_copies(own, params), any(p.grad is not None for p in params)) for params in left]
    if any(all(both) for both in signs):
        return words
    if any(any(either) for either in signs):
        logger.warning(words)
    return None


def _left_to_nobody() -> list[list[torch.Tensor]]:
    """Of each DDP wrapper that exchanges gradients over the job, and that no optimizer trains: what has gradients."""

    def found() -> list[list[torch.Tensor]]:
        held = {id(p) for one in alive(torch.optim.Optimizer) for p in parameters_of(one)}
        wrappers = [ddp for ddp in alive(DistributedDataParallel) if not is_apart(ddp)]
        whole = [ddp for ddp in wrappers if ddp.process_group.size() == processes_in_job()]
        trained = [[p for p in ddp.parameters() if p.requires_grad] for ddp in whole]
        return [params for params in trained if params and not any(id(p) in held for p in params)]

    return after_collection(found)


def _are_copies(own: list[torch.Tensor], params: list[torch.Tensor]) -> bool:
    """Whether some of `params` have these shapes, or all have this length together: flat. One number tells nothing."""
    length, of_all = (sum(p.numel() for p in of) for of in (own, params))
    have_shapes = Counter(p.shape for p in own) <= Counter(p.shape for p in params)
    return length > 1 and (have_shapes or length == of_all)
