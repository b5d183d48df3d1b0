"""Inner optimizers, and torch's Join, that local training cannot work with: told by name, with the way out."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch.distributed.algorithms.join import Join, JoinHook

from .. import upstream
from ..config import SlowMoConfig
from ..training.optimizers_inside import all_inside, parameters_of
from .alive import alive


def refuse_optimizer(models: Iterable[torch.nn.Module], optimizer: Any) -> None:
    """
    Refuse an inner optimizer whose parameters are not what a round averages. They are known by what they do, and found
    behind wrappers too.

    Args:
        models (`Iterable[torch.nn.Module]`): What is trained.
        optimizer (`torch.optim.Optimizer`): What trains it.

    Raises:
        ValueError: It is schedule-free, shares its state with other processes, writes a copy of its own over the
            parameters, averages or goes back to weights of its own, or steps in backward hooks.
    """
    for one in all_inside(optimizer):
        name = type(one).__name__
        refuse_schedule_free(one)
        refuse_shared_state(one)
        _refuse_own_copies(one)
        if any(isinstance(key, torch.Tensor) for key in getattr(one, "optimizer_dict", None) or ()):
            raise ValueError(
                f"the inner optimizer {name} steps layer by layer in backward hooks, and its own step() does nothing: "
                "no round would know of these steps. Use the same optimizer without layerwise (Trainer: "
                "optim='galore_adamw' in place of 'galore_adamw_layerwise')."
            )
        if any(of.__module__.partition(".")[0] == "lomo_optim" for of in type(one).__mro__):
            raise ValueError(
                f"the inner optimizer {name} (of lomo_optim) steps in the backward pass and not by its own step(): no "
                "round would know of these steps, and accelerate does not know it inside another optimizer. Use one "
                "that steps after the backward pass; of these Adafactor needs little memory (Trainer: "
                "optim='adafactor')."
            )
        if callable(getattr(getattr(one, "averager", None), "average_parameters", None)):
            raise ValueError(
                f"the inner optimizer {name} averages the parameters over all ranks itself, as torch's "
                "PostLocalSGDOptimizer does: that would be a round inside a round. Use the optimizer inside it; "
                "SlowMoConfig.local_sgd(sync_every=...) averages as its averager does."
            )
        if any(of.__name__ == "Lookahead" or of.__name__.startswith("Ranger") for of in type(one).__mro__):
            raise ValueError(
                f"the inner optimizer {name} keeps slow weights of its own, and goes back to them: that would undo a "
                "part of each round. Use the optimizer inside it; SlowMoConfig.lookahead() looks ahead with rounds."
            )
    for param in chain(*(model.parameters() for model in models), parameters_of(optimizer)):
        inside = upstream.in_backward_optimizers(param)
        if inside:
            raise ValueError(
                f"a parameter of shape {list(param.shape)} is stepped by {type(inside[0]).__name__} in the backward "
                "pass (_apply_optimizer_in_backward): no round would know of these steps. Give all parameters to one "
                "optimizer that steps after the backward pass."
            )


def refuse_schedule_free(optimizer: Any) -> None:
    """
    Refuse one whose `train()` and `eval()` exchange the parameters; or, in classes of that name, whose step does so
    around a closure.

    Raises:
        ValueError: It is one.
    """
    groups = getattr(optimizer, "param_groups", [])
    has_modes = hasattr(optimizer, "train_mode") or any("train_mode" in group for group in groups)
    exchanges = has_modes and all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))
    if exchanges or any("ScheduleFree" in of.__name__ for of in type(optimizer).__mro__):
        raise ValueError(
            f"the inner optimizer {type(optimizer).__name__} is schedule-free: the parameters are one of its two "
            "sequences, and an evaluation needs the other, so an average of one alone would be wrong. Use AdamW with "
            "a schedule of learning rates (Trainer: optim='adamw_torch', lr_scheduler_type='cosine')."
        )


def refuse_shared_state(optimizer: Any) -> None:
    """
    Refuse one that each process has a part of (`ZeroRedundancyOptimizer`). Accelerate cannot prepare it either.

    Raises:
        ValueError: It is one.
    """
    if callable(getattr(optimizer, "consolidate_state_dict", None)):
        raise ValueError(
            f"the inner optimizer {type(optimizer).__name__} shares its state with the other processes, and sends "
            "them parameters at every step: workers would not train alone. Use the optimizer inside it; to save "
            "memory, SlowMoConfig(shard_slow_state=True), or shard the model by FSDP2."
        )


def _refuse_own_copies(optimizer: Any) -> None:
    """As apex, Transformer Engine and torchao mark them: fp32 master weights, parameters in main memory."""
    marks = ("param_groups_master", "param_d2h_map", "master_weights")
    mark = next((name for name in marks if getattr(optimizer, name, False) not in (False, None)), "")
    if mark:
        raise ValueError(
            f"the inner optimizer {type(optimizer).__name__} has a copy of the parameters ({mark}) and writes it over "
            "them at every step: what a round hands back would be lost. Use it without (master_weights=False), or "
            "keep the parameters in fp32 and train in bf16 by autocast (mixed_precision='bf16')."
        )


class JoinRefusal:
    """
    Refuses torch's `Join` (accelerate's `join_uneven_inputs`) on DDP wrappers while there are rounds. It sends to all
    ranks at every forward pass; and a rank that has left it waits there for the others, while they wait for it in a
    round, until a time-out.

    Args:
        wrappers (`list`): The model's, of `DistributedDataParallel`.
        config (`SlowMoConfig`): Of the training. Plain `base="all_reduce"` is stock, and refuses nothing.

    Raises:
        ValueError: One is open. All ranks are inside it, so all are told here, and none waits for another.
    """

    def __init__(self, wrappers: list[Any], config: SlowMoConfig) -> None:
        self._wrappers = wrappers if config.has_rounds else []
        self._words = _join_words(config)
        self.set()

    def set(self) -> None:
        """
        From now on. One that was left before sends at every forward pass still, and uneven workers would then meet the
        job's other collectives out of step: that is switched off.
        """
        if all("join_hook" in vars(ddp) for ddp in self._wrappers):
            return
        if any(upstream.join_is_on(ddp) for ddp in self._wrappers):
            inside = {id(one) for join in alive(Join) for one in upstream.joined_models(join)}
            if any(id(ddp) in inside for ddp in self._wrappers):
                raise ValueError(self._words)
        for ddp in self._wrappers:
            upstream.switch_join_off(ddp)
            ddp.join_hook = partial(_refuse_join, self._words)  # which `Join` asks every model for, before all else

    def release(self) -> None:
        """`Join` works again."""
        allow_join(self._wrappers)


def allow_join(wrappers: list[Any]) -> None:
    """`Join` works again with these."""
    for ddp in wrappers:
        vars(ddp).pop("join_hook", None)


def _refuse_join(words: str, **settings: Any) -> Any:
    if upstream.is_entering_join():
        raise ValueError(words)
    return JoinHook()


def _join_words(config: SlowMoConfig) -> str:
    way_out = (
        "Use `with slowmo_hf.join(optimizer):` in its place; a Trainer needs neither."
        if config.base == "local_sgd"
        else "Give all ranks equally many batches (even_batches=True); slowmo_hf.join is for base='local_sgd'."
    )
    return (
        f"torch's Join (accelerator.join_uneven_inputs) cannot be used with base={config.base!r} and rounds: it "
        "sends to all ranks at every forward pass, and a rank that is out of data waits in it while the others wait "
        f"in a round. {way_out}"
    )
