"""SlowMoConfig: every setting of a run, checked when it is made."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from .names import CODES, OUTER_UPDATES, TOPOLOGIES, find, may_be_read, name_by_the_program
from .presets import Presets
from .rules import GOSSIP_BASES as GOSSIP_BASES
from .rules import SLOW_MOMENTUM as SLOW_MOMENTUM
from .rules import check

_BASES = ("local_sgd", *GOSSIP_BASES, "all_reduce")
_CHOICES = {
    "base": _BASES,
    "inner_state": ("auto", "reset", "maintain", "average"),
    "model_buffers": ("average", "local"),
    "slow_state_device": ("same", "cpu"),
    "stash_device": ("same", "cpu"),
}


def _help(text: str, default: Any) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class SlowMoConfig(Presets):
    """
    Settings of local training with periodic averaging and slow momentum (SlowMo,
    https://huggingface.co/papers/1910.00643, Algorithm 1). `HfArgumentParser` turns every field into a flag.

    Args:
        base (`str`, *optional*, defaults to `"local_sgd"`): What workers do at every step. `"local_sgd"`: nothing;
            they meet at rounds only. `"sgp"`: stochastic gradient push, one push-sum exchange per step. `"osgp"`: the
            same behind the next steps' computation. `"dpsgd"`: one symmetric exchange per step. `"all_reduce"`:
            gradients averaged by DDP over all processes, the baseline; without an outer update (momentum 0, `outer_lr`
            1) it is stock training.
        sync_every (`int`, *optional*, defaults to `12`):
            Inner steps per round, the paper's tau, in optimizer steps (not micro-batches).
        outer_optimizer (`str`, *optional*, defaults to `"slow_momentum"`): The update of the anchors.
            `"slow_momentum"` is lines 7 and 8 of Algorithm 1; anything else is the dotted path of a
            `torch.optim.Optimizer`, fed with the pseudo-gradient.
        outer_optimizer_kwargs (`str`, *optional*): JSON object (or a `dict`) of arguments for a dotted-path
            `outer_optimizer`, for example `{"momentum": 0.9}`. Its learning rate is `outer_lr`.
        outer_lr (`float`, *optional*, defaults to `1.0`):
            The paper's alpha, > 0.
        outer_momentum (`float`, *optional*, defaults to `0.5`):
            The paper's beta, in [0, 1). 0 is Local SGD (with `outer_lr=1`). Used by `"slow_momentum"` only.
        inner_state (`str`, *optional*, defaults to `"auto"`): The inner optimizer's state at a round's end (line 2):
            `"reset"`, `"maintain"` or `"average"` (double averaging). `"auto"`: reset for SGD with momentum, maintain
            for everything else, as in the paper.
        exact_average (`bool`, *optional*, defaults to `True`): Line 6. `False`, for gossip bases only, is the paper's
            no-average variant: each worker does the outer update on its own de-biased parameters, and they stay
            different.
        model_buffers (`str`, *optional*, defaults to `"average"`): What changes in training and no optimizer holds:
            floating-point buffers (BatchNorm statistics) and frozen parameters (a teacher inside the model).
            `"average"` at every round that averages parameters, or `"local"`. Integer buffers take the maximum there
            in both. What stays constant is left alone, and so are buffers with `persistent=False`.
        processes_per_worker (`str`, *optional*, defaults to `"auto"`): Processes that form one worker: neighbouring
            ranks, whose gradients DDP averages at every step. `"node"`: a machine's. A number (an `int` is taken too).
            `"auto"`: a machine's where the job spans several machines with several processes each, else 1.
        topology (`str`, *optional*, defaults to `"auto"`):
            Who sends to whom (`slowmo_hf.algorithm.topology.Topology`): `"exponential"`, `"bipartite_exponential"`,
            `"ring"` or `"complete"`; gossip bases only. `"auto"`: bipartite_exponential for dpsgd, exponential for the
            others.
        peers (`int`, *optional*, defaults to `1`):
            Workers each sends to per exchange; gossip bases only.
        staleness (`int`, *optional*, defaults to `1`):
            Optimizer steps that a message is in flight, exactly; `base="osgp"` only. With 0 it is SGP.
        overlap_steps (`int`, *optional*, defaults to `0`): Steps that workers train on while the average of a round
            travels: fewer than `sync_every`; `base="local_sgd"` only. It is then taken in with the progress made
            meanwhile (docs/wire.md). A copy of the parameters more, and messages for all of them. With `compression` a
            round has two stages, the second of which sets out at the step that finds the first one here: 2 hide both.
        compression (`str`, *optional*, defaults to `"none"`): What a round's average travels in; `base="local_sgd"`
            only. `"bf16"`: half the bytes of fp32. `"int8"`: a quarter, and 1.6 % of that for scales. What rounding
            holds back is added to the next round's message (error feedback). Memory: 4 bytes per trainable parameter
            more and 4/m with m workers (8 for fp64), and 2 (int8) or 4 (bf16) for messages. Looks, buffers and inner
            states travel as ever.
        shard_slow_state (`bool`, *optional*, defaults to `False`): Each of m workers keeps 1/m of the anchors and the
            velocity and does the outer update there; the result and the bytes of a round are the same (docs/wire.md).
            For `base="local_sgd"` with `"slow_momentum"`. With `overlap_steps` 2 or more both of its halves travel
            behind the computation.
        slow_state_device (`str`, *optional*, defaults to `"same"`): Where that shard lies and is updated: the
            parameters' device (`"same"`) or `"cpu"`; with `shard_slow_state` only.
        stash_device (`str`, *optional*, defaults to `"same"`):
            Where local weights wait while the average is looked at: `"same"` device or `"cpu"`.
        bucket_bytes (`int`, *optional*, defaults to 256 MiB): What the messages of a round take in memory, in bytes,
            at most. Two take turns, each an eighth of what travels and 16 MiB at least; less memory makes more of
            them. Messages behind the computation (`overlap_steps`, `osgp`) have this size each.
        timeout_seconds (`float`, *optional*, defaults to `1800.0`):
            How long a round waits for a worker before it fails.

    Raises:
        ValueError: A setting is out of range, or two settings contradict each other.
    """

    base: str = _help("What workers do at every step: local_sgd, sgp, osgp, dpsgd or all_reduce.", "local_sgd")
    sync_every: int = _help("Inner optimizer steps per round (tau).", 12)
    outer_optimizer: str = _help("slow_momentum, or the dotted path of a torch optimizer.", SLOW_MOMENTUM)
    outer_optimizer_kwargs: str | None = _help("JSON object of arguments for a dotted-path outer_optimizer.", None)
    outer_lr: float = _help("Slow learning rate (alpha).", 1.0)
    outer_momentum: float = _help("Slow momentum (beta); 0 is Local SGD.", 0.5)
    inner_state: str = _help("Inner optimizer state at a round: auto, reset, maintain or average.", "auto")
    exact_average: bool = _help("Exact average at a round (line 6); False is for gossip bases only.", True)
    model_buffers: str = _help("Changing floating-point buffers at a round: average or local.", "average")
    processes_per_worker: str = _help("auto, node or a number of processes.", "auto")
    topology: str = _help(f"Who sends to whom: {', '.join(['auto', *TOPOLOGIES])}; gossip bases only.", "auto")
    peers: int = _help("Peers per exchange; gossip bases only.", 1)
    staleness: int = _help("Optimizer steps that a message is in flight; base osgp only.", 1)
    overlap_steps: int = _help("Steps of training while the average of a round travels; base local_sgd.", 0)
    compression: str = _help(
        f"What a round's average travels in: {', '.join(['none', *CODES])}, with error feedback; base local_sgd only.",
        "none",
    )
    shard_slow_state: bool = _help(
        "Keep 1/m of anchors and velocity on each of m workers; base local_sgd only.", False
    )
    slow_state_device: str = _help("Where a sharded slow state lies: same or cpu.", "same")
    stash_device: str = _help("Where local weights wait while the average is shown: same or cpu.", "same")
    bucket_bytes: int = _help("Bytes that the messages of a round take, at most.", 256 * 2**20)
    timeout_seconds: float = _help("How long a round waits for a worker, in seconds.", 1800.0)

    def __post_init__(self) -> None:
        if isinstance(self.outer_optimizer_kwargs, dict):
            object.__setattr__(self, "outer_optimizer_kwargs", json.dumps(self.outer_optimizer_kwargs, sort_keys=True))
        if isinstance(self.processes_per_worker, int) and not isinstance(self.processes_per_worker, bool):
            object.__setattr__(self, "processes_per_worker", str(self.processes_per_worker))
        self._check_types()
        self._check_ranges()
        self._check_outer_optimizer()
        self._check_processes_per_worker()
        check(self)

    def _check_types(self) -> None:
        tables = {"topology": ("auto", *TOPOLOGIES), "compression": ("none", *CODES)}
        for name, choices in (_CHOICES | tables).items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}.")
        for name in ("sync_every", "peers", "staleness", "overlap_steps", "bucket_bytes"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"{name} must be an integer, got {value!r}.")
        for name in ("outer_lr", "outer_momentum", "timeout_seconds"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {value!r}.")
            object.__setattr__(self, name, float(value))
        for name in ("exact_average", "shard_slow_state"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}.")

    def _check_ranges(self) -> None:
        if self.sync_every < 1:
            raise ValueError(
                f"sync_every must be >= 1 optimizer step, got {self.sync_every}. Use 1 to average after every step."
            )
        if not 0 <= self.outer_momentum < 1:
            raise ValueError(
                f"outer_momentum must be in [0, 1), got {self.outer_momentum}. Use 0 to switch slow momentum off."
            )
        if self.outer_lr <= 0:
            raise ValueError(f"outer_lr must be > 0, got {self.outer_lr}. Use 1.0 for the paper's setting.")
        if self.timeout_seconds <= 0:
            raise ValueError(f"timeout_seconds must be > 0 seconds, got {self.timeout_seconds}.")
        if self.bucket_bytes < 1024:
            raise ValueError(
                f"bucket_bytes must be >= 1024 bytes, got {self.bucket_bytes}. 26214400 (25 MiB) is lean."
            )
        if self.peers < 1:
            raise ValueError(f"peers must be >= 1, got {self.peers}.")
        if self.staleness < 0:
            raise ValueError(f"staleness must be >= 0 steps, got {self.staleness}.")
        if not 0 <= self.overlap_steps < self.sync_every:
            raise ValueError(
                f"overlap_steps must be in [0, sync_every), got {self.overlap_steps} with "
                f"sync_every={self.sync_every}: a round ends before the next one begins. Lower overlap_steps or raise "
                "sync_every."
            )

    def _check_outer_optimizer(self) -> None:
        if not isinstance(self.outer_optimizer, str):
            raise ValueError(f"outer_optimizer must be a name, got {self.outer_optimizer!r}.")
        if self.outer_optimizer in OUTER_UPDATES:
            if self.outer_optimizer_kwargs is not None:
                raise ValueError(
                    "outer_optimizer_kwargs is for a dotted-path outer_optimizer, got "
                    f"{self.outer_optimizer_kwargs!r} with outer_optimizer={self.outer_optimizer!r}. Set outer_lr and "
                    "outer_momentum instead."
                )
            return
        self.outer_optimizer_class()
        name_by_the_program(self.outer_optimizer)
        kwargs = self.outer_optimizer_arguments()
        if "lr" in kwargs:
            raise ValueError(
                f"outer_optimizer_kwargs must not hold 'lr', got {kwargs['lr']!r}. Set outer_lr, the outer "
                "optimizer's lr."
            )

    def _check_processes_per_worker(self) -> None:
        value = self.processes_per_worker
        if value not in ("auto", "node") and not (isinstance(value, str) and value.isdecimal() and int(value) > 0):
            raise ValueError(f"processes_per_worker must be 'auto', 'node' or a number >= 1, got {value!r}.")

    @property
    def averages_at_rounds(self) -> bool:
        """
        False where a round sends no parameters: workers are equal anyway, or stay different (`exact_average=False`).
        """
        return self.exact_average and self.base != "all_reduce"

    @property
    def has_outer_update(self) -> bool:
        """False where a round would leave every worker's parameters as they are."""
        plain = self.outer_optimizer == SLOW_MOMENTUM and self.outer_momentum == 0 and self.outer_lr == 1
        return self.averages_at_rounds or not plain

    @property
    def has_rounds(self) -> bool:
        """
        False for plain all-reduce, which is left exactly as stock. Gossip without an outer update has rounds to
        report.
        """
        return self.has_outer_update or self.base != "all_reduce"

    def outer_optimizer_class(self) -> type[Any]:
        """The class that a dotted-path `outer_optimizer` names; `ValueError` where there is none."""
        try:
            found = find(self.outer_optimizer)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(
                "outer_optimizer must be 'slow_momentum' or the dotted path of a torch optimizer such as "
                f"'torch.optim.SGD', got {self.outer_optimizer!r} ({error})."
            ) from error
        if not callable(getattr(found, "step", None)):
            raise ValueError(
                f"outer_optimizer must name a torch optimizer, got {self.outer_optimizer!r}, a {found!r}."
            )
        return found  # type: ignore[no-any-return]

    def outer_optimizer_arguments(self) -> dict[str, Any]:
        """`outer_optimizer_kwargs` as a dictionary; `ValueError` where it is no JSON object."""
        try:
            arguments = json.loads(self.outer_optimizer_kwargs or "{}")
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(
                f"outer_optimizer_kwargs must be JSON, got {self.outer_optimizer_kwargs!r} ({error})."
            ) from error
        if not isinstance(arguments, dict):
            raise ValueError(f"outer_optimizer_kwargs must be a JSON object, got {self.outer_optimizer_kwargs!r}.")
        return arguments

    def to_dict(self) -> dict[str, Any]:
        """All settings as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> SlowMoConfig:
        """
        The inverse of `to_dict`. A dictionary may come from a checkpoint, which must import nothing: its
        `outer_optimizer` is of `torch.optim`, or one that this program has named in a `SlowMoConfig` of its own.

        Raises:
            ValueError: A setting does not exist, or is none that a dictionary may have.
        """
        _refuse_unknown(settings, {f.name for f in fields(cls)})
        named = settings.get("outer_optimizer", SLOW_MOMENTUM)
        if not may_be_read(named):
            raise ValueError(
                "outer_optimizer of a dictionary (a checkpoint's settings, SlowMoConfig.from_dict) must be "
                f"'slow_momentum', a class of torch.optim, or one that this program names itself, got {named!r}: "
                f"nothing is imported because a file names it. Write SlowMoConfig(outer_optimizer={named!r}) first."
            )
        return cls(**settings)


def _refuse_unknown(settings: Any, known: set[str]) -> None:
    if not isinstance(settings, dict):
        raise ValueError(f"settings must be a SlowMoConfig or a dictionary of its fields, got {settings!r}.")
    unknown = sorted(map(str, set(settings) - known))
    if unknown:
        raise ValueError(f"unknown settings {unknown}; SlowMoConfig has {sorted(known)}.")
