"""SlowMoConfig: every setting of a run, checked when it is made."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from . import values
from .hints import unknown_settings
from .names import (
    OUTER_UPDATES,
    Base,
    Compression,
    InnerState,
    ModelBuffers,
    Place,
    TopologyName,
    may_be_read,
    name_by_the_program,
)
from .presets import Presets
from .rules import GOSSIP_BASES, SLOW_MOMENTUM, check


def _help(text: str) -> dict[str, str]:
    return {"help": text}  # of the flag


@dataclass(frozen=True, kw_only=True)
class SlowMoConfig(Presets):
    """
    Settings of local training with periodic averaging and slow momentum (SlowMo,
    https://huggingface.co/papers/1910.00643, Algorithm 1). `HfArgumentParser` turns every field into a flag.

    Args:
        base (`str`, *optional*, defaults to `"local_sgd"`): What workers do at every step. `"local_sgd"`: nothing;
            they communicate at rounds only. `"sgp"`: stochastic gradient push, one push-sum exchange per step.
            `"osgp"`: the same while the next steps compute. `"dpsgd"`: one symmetric exchange per step.
            `"all_reduce"`: gradients averaged by DDP over all processes, the baseline; without an outer update
            (momentum 0, `outer_lr` 1) it is stock training.
        sync_every (`int`, *optional*, defaults to `12`):
            Inner steps per round, the paper's tau, in optimizer steps (not micro-batches), >= 1.
        outer_optimizer (`str`, *optional*, defaults to `"slow_momentum"`): The update of the anchors.
            `"slow_momentum"` is lines 7 and 8 of Algorithm 1; anything else is a `torch.optim.Optimizer`, the class or
            its dotted path, fed with the pseudo-gradient. It is kept as the path.
        outer_optimizer_kwargs (`str`, *optional*): JSON object (or a `dict`) of arguments for a dotted-path
            `outer_optimizer`, for example `{"momentum": 0.9}`. Its learning rate is `outer_lr`.
        outer_lr (`float`, *optional*, defaults to `1.0`):
            The paper's alpha, > 0.
        outer_momentum (`float`, *optional*, defaults to `0.5`):
            The paper's beta, in [0, 1). 0 is Local SGD (with `outer_lr=1`). Used by `"slow_momentum"` only. Rounds
            that agree move 1/(1-beta) times as far: with Adam and fewer than 8 workers set 0 (docs/from_ddp.md).
        inner_state (`str`, *optional*, defaults to `"auto"`): The inner optimizer's state at a round's end (line 2):
            `"reset"`, `"maintain"` or `"average"` (double averaging). `"auto"`: reset for `torch.optim.SGD` with
            momentum and its subclasses, maintain for everything else (RMSprop and Muon with momentum, classes of other
            packages), as in the paper.
        exact_average (`bool`, *optional*, defaults to `True`): Line 6. `False`, for gossip bases only, is the paper's
            no-average variant: each worker does the outer update on its own de-biased parameters, and they stay
            different.
        model_buffers (`str`, *optional*, defaults to `"average"`): What changes in training and no optimizer holds:
            floating-point buffers (BatchNorm statistics) and frozen parameters (a teacher inside the model).
            `"average"` at every round that averages parameters, or `"local"`. Integer buffers take the maximum there
            in both. What stays constant is left alone, and so are buffers with `persistent=False`.
        processes_per_worker (`str`, *optional*, defaults to `"auto"`): Processes that form one worker: neighbouring
            ranks, whose gradients DDP averages at every step. `"node"`: a machine's. A number (an `int` is taken too).
            `"auto"`: with FSDP2 those that share one model's shards; a machine's where the job spans several machines
            with several processes each; else 1.
        topology (`str`, *optional*, defaults to `"auto"`):
            Who sends to whom (`slowmo_hf.algorithm.topology.Topology`): `"exponential"`, `"bipartite_exponential"`,
            `"ring"` or `"complete"`; gossip bases only. `"auto"`: bipartite_exponential for dpsgd, exponential for the
            others.
        peers (`int`, *optional*, defaults to `1`):
            Workers each sends to per exchange, >= 1; gossip bases only.
        staleness (`int`, *optional*, defaults to `1`):
            Optimizer steps that a message is in flight, exactly, >= 0; `base="osgp"` only. With 0 it is SGP.
        overlap_steps (`int`, *optional*, defaults to `0`): Steps that workers train on while the average of a round
            travels: fewer than `sync_every`; `base="local_sgd"` only. It is then applied, and the progress made
            meanwhile is kept (docs/wire.md). A copy of the parameters more, and messages for all of them. With
            `compression` a round has two stages, and the second starts at the step that finds the first one here: 2
            hide both.
        compression (`str`, *optional*, defaults to `"none"`): What a round's average travels in; `base="local_sgd"`
            only. `"bf16"`: half the bytes of fp32. `"int8"`: a quarter, and 1.6 % of that for scales. What rounding
            holds back is added to the next round's message (error feedback). Memory: 4 bytes per trainable parameter
            more and 4/m with m workers (8 for fp64). Messages have 2 (int8) or 4 (bf16) bytes per element of two
            buckets, and 4 for sums; with `overlap_steps` of all parameters. Views, buffers and inner states travel as
            ever.
        shard_slow_state (`bool`, *optional*, defaults to `False`): Each of m workers keeps 1/m of the anchors and the
            velocity and does the outer update there; the result and the bytes of a round are the same (docs/wire.md).
            For `base="local_sgd"` with `"slow_momentum"`. With `overlap_steps` 2 or more both of its halves travel
            while the next steps compute.
        slow_state_device (`str`, *optional*, defaults to `"same"`): Where that shard lies and is updated: the
            parameters' device (`"same"`) or `"cpu"`; with `shard_slow_state` only.
        stash_device (`str`, *optional*, defaults to `"same"`):
            Where local weights wait while the average is shown: `"same"` device or `"cpu"`.
        bucket_bytes (`int`, *optional*, defaults to 256 MiB): What the messages of a round take in memory, in bytes,
            at most, >= 1024. Two take turns, each an eighth of what travels and 16 MiB at least; less memory makes
            more of them. Messages in flight over several steps (`overlap_steps`, `osgp`) have this size each.
        timeout_seconds (`float`, *optional*, defaults to `1800.0`):
            How long a round waits for a worker before it fails, 0.001 to 1e9.

    Raises:
        ValueError: A setting is out of range, or two settings contradict each other.
        TypeError: There is no such setting, or one is given without its name.
    """

    base: Base = field(default="local_sgd", metadata=_help("What workers do at every step."))
    sync_every: int = field(default=12, metadata=_help("Inner optimizer steps per round (tau)."))
    outer_optimizer: str = field(
        default=SLOW_MOMENTUM, metadata=_help("slow_momentum, or the dotted path of a torch optimizer.")
    )
    outer_optimizer_kwargs: str | None = field(
        default=None, metadata=_help("JSON object of arguments for a dotted-path outer_optimizer.")
    )
    outer_lr: float = field(default=1.0, metadata=_help("Slow learning rate (alpha)."))
    outer_momentum: float = field(default=0.5, metadata=_help("Slow momentum (beta); 0 is Local SGD."))
    inner_state: InnerState = field(default="auto", metadata=_help("Inner optimizer state at a round."))
    exact_average: bool = field(
        default=True, metadata=_help("Exact average at a round (line 6); False is for gossip bases only.")
    )
    model_buffers: ModelBuffers = field(
        default="average", metadata=_help("Changing floating-point buffers at a round.")
    )
    processes_per_worker: str = field(default="auto", metadata=_help("auto, node or a number of processes."))
    topology: TopologyName = field(default="auto", metadata=_help("Who sends to whom; gossip bases only."))
    peers: int = field(default=1, metadata=_help("Peers per exchange; gossip bases only."))
    staleness: int = field(default=1, metadata=_help("Optimizer steps that a message is in flight; base osgp only."))
    overlap_steps: int = field(
        default=0, metadata=_help("Steps of training while the average of a round travels; base local_sgd.")
    )
    compression: Compression = field(
        default="none",
        metadata=_help("What a round's average travels in, with error feedback; base local_sgd only."),
    )
    shard_slow_state: bool = field(
        default=False, metadata=_help("Keep 1/m of anchors and velocity on each of m workers; base local_sgd only.")
    )
    slow_state_device: Place = field(default="same", metadata=_help("Where a sharded slow state lies."))
    stash_device: Place = field(default="same", metadata=_help("Where local weights wait while the average is shown."))
    bucket_bytes: int = field(default=256 * 2**20, metadata=_help("Bytes that the messages of a round take, at most."))
    timeout_seconds: float = field(default=1800.0, metadata=_help("How long a round waits for a worker, in seconds."))

    def __post_init__(self) -> None:
        values.settle(self)
        self._check_outer_optimizer()
        check(self)

    def _check_outer_optimizer(self) -> None:
        if self.outer_optimizer in OUTER_UPDATES:
            if self.outer_optimizer_kwargs is not None:
                raise ValueError(
                    "outer_optimizer_kwargs is for a dotted-path outer_optimizer, got "
                    f"{self.outer_optimizer_kwargs!r} with outer_optimizer={self.outer_optimizer!r}. Set outer_lr and "
                    "outer_momentum instead."
                )
            return
        values.check_arguments(self.outer_optimizer, self.outer_optimizer_class(), self.outer_optimizer_arguments())
        name_by_the_program(self.outer_optimizer)

    @property
    def gossips(self) -> bool:
        """Whether workers exchange messages at every step."""
        return self.base in GOSSIP_BASES

    @property
    def averages_at_rounds(self) -> bool:
        """
        False where a round sends no parameters: workers are equal anyway, or stay different (`exact_average=False`).
        """
        return self.exact_average and self.base != "all_reduce"

    @property
    def has_outer_update(self) -> bool:
        """False where a round would leave every worker's parameters as they are."""
        return self.averages_at_rounds or not self.keeps_the_average

    @property
    def keeps_the_average(self) -> bool:
        """Whether the outer update leaves the average as it is: slow momentum is off."""
        return self.outer_optimizer == SLOW_MOMENTUM and self.outer_momentum == 0 and self.outer_lr == 1

    @property
    def has_velocity(self) -> bool:
        """Whether the outer update keeps slow momentum."""
        return self.outer_optimizer == SLOW_MOMENTUM and self.outer_momentum > 0

    @property
    def has_rounds(self) -> bool:
        """
        False for plain all-reduce, which is left exactly as stock. Gossip without an outer update has rounds to
        report.
        """
        return self.has_outer_update or self.base != "all_reduce"

    def outer_optimizer_class(self) -> type[Any]:
        """The class that a dotted-path `outer_optimizer` names; `ValueError` where there is none."""
        return values.class_at(self.outer_optimizer)

    def outer_optimizer_arguments(self) -> dict[str, Any]:
        """`outer_optimizer_kwargs` as a dictionary; `ValueError` where it is no JSON object."""
        return values.arguments_of(self.outer_optimizer_kwargs)

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
        if not isinstance(settings, dict):
            raise ValueError(f"settings must be a dictionary of SlowMoConfig's fields, got {settings!r}.")
        unknown = unknown_settings(settings, [f.name for f in fields(cls)])
        if unknown:
            raise ValueError(unknown)
        named = settings.get("outer_optimizer", SLOW_MOMENTUM)
        if not may_be_read(named):
            raise ValueError(
                "outer_optimizer of a dictionary (a checkpoint's settings, SlowMoConfig.from_dict) must be "
                f"'slow_momentum', a class of torch.optim, or one that this program names itself, got {named!r}: "
                f"nothing is imported because a file names it. Write SlowMoConfig(outer_optimizer={named!r}) first."
            )
        return cls(**settings)
