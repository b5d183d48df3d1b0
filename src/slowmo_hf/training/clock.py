"""The clock: a worker's optimizer steps, and what is due at them."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..config import SlowMoConfig
from ..contents import Contents, Restored, Saved


@dataclass
class Rates:
    """
    The inner learning rates of a worker's attempted steps since a round's launch, per parameter group: gamma of the
    round is their mean. Kept as the first one and what the others are above it, so that equal rates have that mean to
    the last bit.

    Args:
        first (`list[float]`): Those of the first step; empty before it.
        above (`list[float]`): Sums of what later ones are above those.
        steps (`int`): Counted.
    """

    first: list[float] = field(default_factory=list)
    above: list[float] = field(default_factory=list)
    steps: int = 0

    def count(self, inner_lrs: list[float]) -> None:
        """One step more."""
        if not self.steps:
            self.first, self.above = list(inner_lrs), [0.0] * len(inner_lrs)
        else:  # another number of groups is told at the status exchange
            self.above = [a + (lr - f) for a, lr, f in zip(self.above, inner_lrs, self.first, strict=False)]
        self.steps += 1

    def and_then(self, later: Rates) -> Rates:
        """Of these steps and those after them."""
        if not self.steps or not later.steps:
            return self if self.steps else later
        groups = zip(self.first, self.above, later.first, later.above, strict=False)
        above = [mine + (first - base) * later.steps + its for base, mine, first, its in groups]
        return Rates(self.first, above, self.steps + later.steps)

    @property
    def mean(self) -> list[float]:
        """Of the steps, per group; empty without any."""
        return [first + above / self.steps for first, above in zip(self.first, self.above, strict=False)]


@dataclass
class Clock:
    """
    Where one worker is. Attempted optimizer steps are counted: not micro-batches, not applied steps. With fp16, rank 0
    may apply step 3 while rank 1 skips it (an infinite gradient); a counter of applied steps would leave rank 1 behind
    for good, and a round entered by one rank alone never returns.

    Args:
        config (`SlowMoConfig`): Says what is due when.
        attempted_steps (`int`): Since the start of training, idle ones included.
        local_steps (`int`): Of these, since the last round.
        idle_steps (`int`): Of these, after this worker's end, in the others' exchanges.
        rounds (`int`): Begun so far.
        rates (`Rates`): Of this worker's own steps since the last round.
        begun_at (`int`): The attempted steps where this process began, or took up a checkpoint.
        parted_at (`int`): The last step at which a rank's program is known to have written into its parameters behind
            the round, or in a view; the same on all ranks.
        max_steps (`int`, *optional*): Where training ends, if that is known; for what is said alone.
        is_over (`bool`): Training has ended on the average, and no step, nor another state, has come after it: what
            its optimizer held is anybody's.
        stop_agreed (`bool`): All know that a rank was asked to stop.
    """

    config: SlowMoConfig
    attempted_steps: int = 0
    local_steps: int = 0
    idle_steps: int = 0
    rounds: int = 0
    rates: Rates = field(default_factory=Rates)
    begun_at: int = 0
    parted_at: int = -1
    max_steps: int | None = None
    is_over: bool = False
    stop_agreed: bool = False

    def __post_init__(self) -> None:
        # Asked at every step.
        self._has_rounds, self._gossips = self.config.has_rounds, self.config.gossips

    def step(self, inner_lrs: list[float]) -> None:
        """One attempted inner step, with the learning rates that were in force."""
        self.attempted_steps += 1
        self.local_steps += 1
        self.rates.count(inner_lrs)

    def idle(self) -> None:
        """One step of the others, which this worker takes part in without training."""
        self.attempted_steps += 1
        self.idle_steps += 1

    @property
    def trained_steps(self) -> int:
        """Attempted steps without idle ones."""
        return self.attempted_steps - self.idle_steps

    def begin_round(self) -> None:
        """A round begins."""
        self.rounds += 1
        self.local_steps, self.rates = 0, Rates()

    def drop_round(self, local_steps: int, rates: Rates) -> None:
        """There was no round: what `begin_round` has done is undone."""
        self.rounds -= 1
        self.local_steps += local_steps
        self.rates = rates.and_then(self.rates)

    # ---- what is due ----

    @property
    def round_is_due(self) -> bool:
        """A round begins at this step."""
        return self._has_rounds and self.attempted_steps % self.config.sync_every == 0

    @property
    def exchange_is_due(self) -> bool:
        """A gossip base exchanges at every step, but at an exact round, which contains every exchange of its step."""
        return self._gossips and not (self.round_is_due and self.config.exact_average)

    @property
    def exchange_number(self) -> int:
        """Counts the exchanges before this step's: with exact rounds all steps but the rounds'."""
        rounds_before = self.attempted_steps // self.config.sync_every if self.config.exact_average else 0
        return self.attempted_steps - 1 - rounds_before

    @property
    def workers_agree(self) -> bool:
        """
        Parameters are equal on all workers: a round has just ended, nothing has begun, or gradients are averaged.
        """
        return self.parted_at != self.attempted_steps and self.agree_at(self.attempted_steps)

    def agree_at(self, step: int) -> bool:
        """The same after another step."""
        if self.config.base == "all_reduce" or step == 0:
            return True
        return self.config.exact_average and not self.config.overlap_steps and step % self.config.sync_every == 0

    # ---- state ----

    def saved(self, *, agree: bool, keep: bool) -> Saved:
        """As `Part.saved`."""
        everybodys = {"attempted_steps": self.attempted_steps, "rounds": self.rounds}
        if self.parted_at == self.attempted_steps:
            everybodys["parted"] = True
        own = {"local_steps": self.local_steps, "rates": dict(vars(self.rates))}
        return Saved(Contents(everybodys), Contents(own))

    def restore(self, saved: Saved, *, same_number: bool) -> Restored:
        """As `Part.restore`: after an average nobody has made a step."""
        attempted_steps = saved.shared.count("attempted_steps")
        rounds = saved.shared.count("rounds", most=attempted_steps)
        local_steps = saved.own.count("local_steps", most=attempted_steps) if same_number else 0
        rates = Rates()
        if "rates" in saved.own.settings:  # an older checkpoint has none: the round's mean is then of later steps
            found = saved.own.part("rates")
            first = found.numbers("first")
            above = found.numbers("above", len(first))
            rates = Rates(first, above, found.count("steps", least=bool(first), most=attempted_steps if first else 0))

        parted = saved.shared.flag("parted") and same_number

        def take_up() -> None:
            self.parted_at = attempted_steps if parted else -1
            self.attempted_steps, self.rounds, self.local_steps = attempted_steps, rounds, local_steps
            self.rates, self.begun_at = rates, attempted_steps

        return take_up
