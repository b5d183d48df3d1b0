"""Line 2 of Algorithm 1: the inner optimizer's state at a round's end, reset, maintained or averaged."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from ..algorithm.layout import has_dense_memory
from ..algorithm.starts import IN_FLIGHT
from ..config import SlowMoConfig
from ..contents import CheckpointError, Contents, Restored, Saved
from ..dtensors import as_described, described, is_sharded, local
from ..wire.averages import Averages
from .model_tensors import ModelTensors, hash48
from .optimizers_inside import all_inside, parameters_of

OBJECT = "inner_optimizer"  # in a checkpoint
SHARDS = "inner_optimizer_shards"  # there, what its DTensors were
# Optimizers that write `x0 - sums` over the parameters, whatever these are by then; and whether a reset reaches all of
# it: D-Adaptation keeps a part in its groups.
_OWN_STARTS = {"MirrorMADGRAD": True, "MADGRAD": True, "DAdaptSGD": False, "DAdaptAdaGrad": False}
_COUNTS = ("mu_product", "eta", "mu")  # of torch's optimizers, where every parameter is a number


class InnerState:
    """
    The base optimizer's buffers at a round's end.

    Args:
        config (`SlowMoConfig`): Its `inner_state`; `"auto"` is reset for torch's SGD with momentum and its subclasses,
            and maintain for everything else: a momentum beside second moments is not the paper's.
        tensors (`ModelTensors`): The parameters and their optimizer.

    Raises:
        ValueError: This optimizer's state cannot be reset.
    """

    def __init__(self, config: SlowMoConfig, tensors: ModelTensors) -> None:
        self.config = config
        self.optimizer = tensors.optimizer
        self.tensors = tensors
        self._was_empty = False  # while a view is shown
        self.policy = config.inner_state
        if self.policy == "auto":
            self.policy = "reset" if self.is_momentum_of_sgd and config.has_outer_update else "maintain"
        if self.policy == "reset" and isinstance(self.optimizer, torch.optim.Adagrad):
            raise ValueError(
                "inner_state='reset' cannot be used with Adagrad, whose state is made at construction and cannot be "
                "made again. Use inner_state='maintain' or 'average'."
            )
        if self.policy == "reset" and self.optimizer.state is not self.optimizer.state:
            raise ValueError(
                f"inner_state='reset' cannot be used with {type(self.optimizer).__name__}, whose `state` is a copy "
                "for whoever asks: a reset would change nothing. Use inner_state='maintain' or 'average', or a "
                "SlowMoOptimizer for each optimizer in it."
            )
        if self.policy == "reset" and getattr(self.optimizer, "is_paged", False) and tensors.device.type != "cpu":
            raise ValueError(
                f"inner_state='reset' cannot be used with {type(self.optimizer).__name__}: bitsandbytes never frees "
                "paged memory, and every round would take it once more. Use inner_state='maintain', or the same "
                "optimizer without paging."
            )

    @property
    def is_momentum_of_sgd(self) -> bool:
        """Whether it is that of torch's SGD with momentum, or of a subclass."""
        is_sgd = isinstance(self.optimizer, torch.optim.SGD)
        return is_sgd and any(group["momentum"] for group in self.optimizer.param_groups)

    def reset(self) -> None:
        """
        Forget it, if that is the policy. Every process does.

        Raises:
            ValueError: It lies elsewhere than under the parameters.
        """
        if self.policy == "reset":
            where = self._elsewhere()
            if where:
                name = type(self.optimizer).__name__
                raise ValueError(
                    f"inner_state='reset' cannot be used with {name}: it has state {where}, where a reset does not "
                    "reach. Use inner_state='maintain'."
                )
            for param in self.tensors.held:
                self.optimizer.state.pop(param, None)

    def refusal(self) -> str:
        """Why this optimizer cannot start; empty where it can."""
        own = next(filter(None, map(_own_start, all_inside(self.optimizer))), "")
        may_be_reset = _OWN_STARTS.get(own, True)
        if not (own and self.config.has_rounds) or (may_be_reset and self.policy == "reset"):
            return ""
        reset = "Set inner_state='reset', or use another optimizer; MADGRAD also works with momentum=0."
        return (
            f"the inner optimizer {type(self.optimizer).__name__} computes the weights from its own start and sums at "
            "every step: what a round hands back would be lost. "
            f"{reset if may_be_reset else 'Use another optimizer.'}"
        )

    def problem(self) -> str:
        """
        Why this state cannot be averaged; empty where it can, or need not be. An average of codes is not the code of
        the average, and their scales alone would be averaged beside them.
        """
        if self.policy != "average":
            return ""
        elsewhere = self._elsewhere()
        what = f"it has state {elsewhere}" if elsewhere else self._codes_to_come()
        what = what or next(filter(None, map(_not_a_direction, self._entries())), "")
        if not what:
            return ""
        may_reset = not elsewhere and not getattr(self.optimizer, "is_paged", False)
        policies = "'maintain' or 'reset'" if may_reset else "'maintain'"
        return (
            f"inner_state='average' cannot average the state of {type(self.optimizer).__name__}: {what}. Use "
            f"inner_state={policies}, or an optimizer whose state is plain floating-point tensors."
        )

    def _elsewhere(self) -> str:
        """Where state lies that is not under the parameters; empty where all is."""
        state = self.optimizer.state
        for key, entry in state.items():
            if not isinstance(key, torch.Tensor) and isinstance(entry, dict) and _has_tensors(entry):
                return f"under {key!r}"
        for one in all_inside(self.optimizer):
            for param, entry in getattr(one, "state", {}).items():
                if isinstance(entry, dict) and not entry.keys() <= state.get(param, {}).keys():
                    return f"in the {type(one).__name__} inside it"
        return ""

    def _codes_to_come(self) -> str:
        """Before the first step: bitsandbytes' classes say what they will keep."""
        arguments = getattr(self.optimizer, "args", None)
        least = getattr(arguments, "min_8bit_size", 0)
        if getattr(arguments, "optim_bits", 32) != 8 or all(p.numel() < least for p in self.tensors.trainable):
            return ""
        return f"it keeps torch.uint8 codes (optim_bits=8) of parameters with {least} elements or more"

    def _entries(self) -> Iterator[tuple[str, Any]]:
        """By name; without counts such as `step`, which are a number for a parameter of any shape."""
        states = [(p, self.optimizer.state.get(p, {})) for p in self.tensors.held]
        counts = {key for p, state in states if p.dim() for key, value in state.items() if _is_a_number(value)}
        counts.update(_COUNTS)
        for name, (_, state) in zip(self.tensors.names_of_held, states, strict=True):
            for key, value in sorted(state.items()):
                if key != "step" and not (_is_a_number(value) and key in counts):
                    yield f"{name}.{key}", value

    def remember_emptiness(self) -> None:
        """The average is about to be shown, and perhaps saved."""
        self._was_empty = not self.optimizer.state

    def empty_again(self) -> None:
        """
        Local weights are back: what was empty is. torch.distributed.checkpoint, by which FSDP's optimizers are saved,
        makes an empty state up by a step with a learning rate of 0, and Adam would have counted it.
        """
        if self._was_empty:
            self.optimizer.state.clear()
        self._was_empty = False

    def keep_what_is_there(self) -> None:
        """The program has loaded a state, perhaps inside a view: it stays."""
        self._was_empty = False

    def tensors_to_average(self, averages: Averages) -> list[torch.Tensor]:
        """
        What the policy "average" makes equal, the same on all workers. Collective between them.

        Raises:
            ValueError: Workers have state for different parameters; the same on every worker.
        """
        names = [name for name, _ in self.named_tensors()]
        hashes = averages.communicator.gather_header([hash48(names)])
        if (hashes != hashes[0]).any():
            everywhere = averages.communicator.gather_objects(names)
            odd = sorted(set().union(*everywhere) - set(everywhere[0]).intersection(*everywhere))
            raise ValueError(
                f"inner_state='average' needs the same optimizer state on all workers; only some have {odd[:5]}. A "
                "parameter was unused there: use inner_state='maintain' or 'reset' in a new run."
            )
        return [tensor for _, tensor in self.named_tensors()]

    def named_tensors(self) -> list[tuple[str, torch.Tensor]]:
        """Every floating-point state tensor that is no count."""
        return [(f"{name}{list(value.shape)}", value) for name, value in self._entries() if torch.is_tensor(value)]

    # ---- state ----

    def saved(self, *, agree: bool, keep: bool) -> Saved:
        """As `Part.saved`, in torch's own form; of a sharded state this process's shards, and what they were."""
        state, params = _without_numpy(self.optimizer.state_dict()), list(parameters_of(self.optimizer))
        if not self.tensors.mates:
            return Saved(own=Contents(objects={OBJECT: state}))
        shards = {
            number: {key: described(value, params[number]) for key, value in of_one.items() if is_sharded(value)}
            for number, of_one in state["state"].items()
        }
        own = {
            number: {key: local(value) if is_sharded(value) else value for key, value in of_one.items()}
            for number, of_one in state["state"].items()
        }
        return Saved(own=Contents(objects={OBJECT: {**state, "state": own}, SHARDS: shards}))

    def restore(self, saved: Saved, *, same_number: bool) -> Restored:
        """As `Part.restore`: with another number of workers they are dealt out in turn."""
        state = saved.own.optimizer(OBJECT, self.optimizer)
        if self.tensors.mates:
            state = {**state, "state": self._sharded_again(state["state"], saved.own)}
        # Then all start from an average that has taken in what was in flight.
        round_ends = IN_FLIGHT in saved.own.settings and not same_number

        def take_up() -> None:
            if type(self.optimizer).load_state_dict is torch.optim.Optimizer.load_state_dict:
                self.optimizer.state.clear()  # else the device holds what is left beside what comes
            # torch keeps tensors that lie where their parameter does, and these are a file's.
            is_kept = any(param.device.type == "cpu" for param in parameters_of(self.optimizer))
            self.optimizer.load_state_dict(copy.deepcopy(state) if is_kept else state)
            if round_ends:
                self.reset()

        return take_up

    def _sharded_again(self, state: dict[Any, Any], own: Contents) -> dict[Any, Any]:
        """The state of every parameter, whose shards are DTensors as they were."""
        shards = own.objects.get(SHARDS)
        params, found = list(parameters_of(self.optimizer)), {}
        for number, of_one in state.items():
            found[number] = dict(of_one)
            try:
                for key, description in shards[number].items():  # type: ignore[index]
                    found[number][key] = as_described(of_one[key], description, params[number])
            except (TypeError, KeyError, AttributeError, IndexError, ValueError) as error:
                raise CheckpointError(
                    f"{own.source}.pt: {SHARDS} of parameter {number} does not fit ({type(error).__name__}: {error}). "
                    "Resume from another checkpoint."
                ) from error
        return found


def _without_numpy(value: Any) -> Any:
    """NumPy's numbers, which schedules written by hand put into groups, as Python's: `torch.load` refuses theirs."""
    if isinstance(value, dict):
        return {key: _without_numpy(one) for key, one in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_without_numpy, value))
    return value.item() if isinstance(value, np.generic) else value


def _has_tensors(entry: dict[Any, Any]) -> bool:
    return any(isinstance(value, torch.Tensor) for value in entry.values())


def _is_a_number(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() == 0


def _own_start(optimizer: Any) -> str:
    """Which of `_OWN_STARTS` it is; empty where it is none. MADGRAD without momentum starts from the parameters."""
    name = next((of.__name__ for of in type(optimizer).__mro__ if of.__name__ in _OWN_STARTS), "")
    starts_there = name == "MADGRAD" and not any(group.get("momentum") for group in optimizer.param_groups)
    return "" if starts_there else name


def _not_a_direction(entry: tuple[str, Any]) -> str:
    """Which state this is, if an average of its elements would not be its average; empty elsewhere."""
    name, value = entry
    if isinstance(value, (list, tuple, dict)):
        inside = value.values() if isinstance(value, dict) else value
        tensors = [one for one in inside if isinstance(one, torch.Tensor) and not _is_a_number(one)]
        return f"its state {name!r} is a {type(value).__name__} of tensors" if tensors else ""
    if value is None or isinstance(value, (bool, int, float, complex, str, np.generic)):
        return ""
    if not isinstance(value, torch.Tensor):  # GaLore's projector: what is beside it lies in each worker's own basis
        return f"its state {name!r} is a {type(value).__name__}, by which the others may be meant"
    own = local(value)
    if type(own) not in (torch.Tensor, torch.nn.Parameter):
        return f"its state {name!r} is a {type(own).__name__}, which may hold codes"
    if own.layout != torch.strided or not has_dense_memory(own):
        return f"its state {name!r} is sparse, or has strides with holes or overlaps"
    is_number = value.is_floating_point() and value.element_size() > 1
    return "" if is_number else f"its state {name!r} has dtype {value.dtype}"
