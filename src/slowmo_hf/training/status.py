"""The status exchange of all ranks: a small message that finds a difference between them before anything is mixed."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch.profiler import record_function

from ..contents import Contents, Restored, Saved
from ..wire.communicator import Communicator
from ..wire.job import host_name, said_by_ranks
from ..wire.roll_call import RollCall
from ..wire.workers import Workers
from .account import Account, Spent
from .clock import Clock
from .inner_state import InnerState
from .model_tensors import ModelTensors, hash48
from .other_tensors import Changed

_NUMBERS = 10  # of a header before its learning rates

_ONE_JOIN = (
    " A rank that has left `join`, or come to `finish`, takes part in the rounds of that one optimizer: with several, "
    "give all ranks equally many batches."
)


class Purpose(IntEnum):
    """What a rank comes to a status exchange for."""

    ROUND = 0
    LOOK = 1  # the average is evaluated or saved, and training goes on
    END = 2  # out of data, or asked to stop
    GATHER = 3  # Trainer's own collectives follow: a log, an evaluation, a save

    @property
    def words(self) -> str:
        """For errors."""
        return {
            Purpose.ROUND: "the round",
            Purpose.LOOK: "a view of the average",
            Purpose.END: "the end of its training",
            Purpose.GATHER: "a log, an evaluation or a save",
        }[self]


_BEFORE_LOGS = (Purpose.GATHER, Purpose.END)


@dataclass(frozen=True)
class Agreement:
    """
    What all ranks go on with, the same on all.

    Args:
        purpose (`Purpose`): That of the ranks that train on, where there are any.
        attempted_steps (`int`): The clock: the furthest one's, for ranks that have ended may be behind.
        trained_steps (`int`): The same without the steps of ranks that have ended and only pass messages on.
        same_step (`bool`): Whether all ranks' clocks agree.
        local_steps (`list[int]`): Every rank's steps since the last round.
        inner_lrs (`list[float]`): The round's, by parameter group: the largest of the workers' means.
        changed_buffers (`list[str]`): All buffers and frozen parameters that have changed anywhere.
        somebody_ended (`bool`): Whether a rank came for the end.
        stop (`bool`): Whether a rank was asked to save and stop.
        ahead (`bool`): Whether the round's messages were sent before this was heard.
        parted (`bool`): Whether a rank's program has written into the parameters behind the round of its step.
        spent (`list[Spent]`): Every rank's seconds of its last report.
        losses (`list[float]`): Every rank's mean loss since its last log; NaN where nobody knows it.
    """

    purpose: Purpose
    attempted_steps: int
    trained_steps: int
    same_step: bool
    local_steps: list[int]
    inner_lrs: list[float]
    changed_buffers: list[str]
    somebody_ended: bool
    stop: bool
    ahead: bool
    parted: bool
    spent: list[Spent]
    losses: list[float]


class Speaker:
    """
    One optimizer of a program among all that start there, which share one status exchange: its messages have one
    length, and say whose they are, so that two optimizers never wait for each other crosswise.

    Args:
        workers (`Workers`): All ranks.
        tensors (`ModelTensors`): Its parameters.
    """

    def __init__(self, workers: Workers, tensors: ModelTensors) -> None:
        # The same on all ranks: starts are collective.
        self._groups_of_all = workers.world.notes("groups of optimizers")
        self.number = len(self._groups_of_all)
        self._groups_of_all.append(len(tensors.groups))
        self._tensors = tensors
        self.has_told_rates = False  # that they differ
        workers.speaks_for = self.words
        self.logger = workers.logger

    @property
    def words(self) -> str:
        """For errors."""
        return f"optimizer {self.number} (of {self._tensors.words})"

    def padded(self, inner_lrs: list[float]) -> list[float]:
        """As many as the optimizer with the most groups has."""
        return inner_lrs + [0.0] * (max(self._groups_of_all) - len(inner_lrs))

    @property
    def header_bytes(self) -> int:
        """Of what a rank says."""
        return int(8 * (_NUMBERS + max(self._groups_of_all)))


@dataclass(frozen=True)
class Header:
    """
    What a rank says, in fp64: [purpose, step, trained steps, local steps, flags, changed buffers, *spent, loss,
    *inner_lrs]. The flags are 1 for a problem, 2 for a stop, 4 for messages that are ahead, 8 for a write
    behind the round, and 16 times the optimizer's number.

    Args:
        speaker (`Speaker`): The optimizer that it speaks for.
        purpose (`Purpose`): What it comes for.
        attempted_steps (`int`): Its clock.
        trained_steps (`int`): The same without steps that only passed messages on.
        local_steps (`int`): Its steps since the last round.
        inner_lrs (`list[float]`): The mean learning rate of its steps since the last round, per parameter group.
        changed (`Changed`): The buffers and frozen parameters that have changed here since the start.
        problem (`str`): Why it cannot take part; empty where it can, but for what `changed` says.
        stop (`bool`): Whether this process was asked to save and stop.
        ahead (`bool`): Whether the round's messages are sent with it.
        parted (`bool`): Whether this process's program has written behind the round of this step.
        spent (`Spent`): Its seconds of its last report.
        loss (`float`): Its mean loss since the last log.
    """

    speaker: Speaker
    purpose: Purpose
    attempted_steps: int
    trained_steps: int
    local_steps: int
    inner_lrs: list[float]
    changed: Changed
    problem: str
    stop: bool
    ahead: bool
    parted: bool
    spent: Spent
    loss: float

    def say(self, world: Communicator, roll_call: RollCall) -> Callable[[], Agreement]:
        """
        Start to exchange headers; the result waits for all, and says what all go on with. Collective over the job.

        Raises:
            ValueError: A rank has a problem.
            RuntimeError: Ranks met at different steps or places, or one is missing. Each is the same on every rank.
        """
        (roll_call.come if world.fails_cleanly else roll_call.enter)(self.attempted_steps, self.purpose.words)
        mine: list[float] = [self.purpose, self.attempted_steps, self.trained_steps, self.local_steps]
        flags = bool(self.problem or self.changed.problem) + 2 * self.stop + 4 * self.ahead + 8 * self.parted
        flags += 16 * self.speaker.number
        spent = self.spent
        mine += [flags, hash48(self.changed.lines), spent.computed, spent.communicated, spent.exchanged, self.loss]
        arrive = world.start_gather_header([*mine, *self.speaker.padded(self.inner_lrs)])

        def hear() -> Agreement:
            roll_call.at(self.attempted_steps, self.purpose.words)
            return self._agree(arrive(), world)

        return hear

    def _agree(self, rows: torch.Tensor, world: Communicator) -> Agreement:
        purposes = [Purpose(int(purpose)) for purpose in rows[:, 0]]
        steps = [int(step) for step in rows[:, 1]]
        flags = [int(flag) for flag in rows[:, 4]]
        if len({flag // 16 for flag in flags}) > 1:
            self._tell_speakers(world, steps, purposes)
        if any(flag & 1 for flag in flags):
            self._tell_problems(world, steps)
        rounds = [rank for rank, purpose in enumerate(purposes) if purpose is Purpose.ROUND]
        self._compare_places(world, purposes, steps)
        changed = self.changed.names
        if (rows[:, 5] != rows[0, 5]).any():
            changed = self.changed.agree(world, max(steps), Purpose.GATHER not in purposes)
        return Agreement(
            purpose=next((purpose for purpose in purposes if purpose is not Purpose.END), Purpose.END),
            attempted_steps=max(steps),
            trained_steps=int(rows[:, 2].max()),
            same_step=len(set(steps)) == 1,
            local_steps=[int(count) for count in rows[:, 3]],
            inner_lrs=self._agree_on_lrs(rows[rounds, _NUMBERS : _NUMBERS + len(self.inner_lrs)].tolist())
            if rounds
            else [],
            changed_buffers=changed,
            somebody_ended=Purpose.END in purposes,
            stop=any(flag & 2 for flag in flags),
            ahead=any(flag & 4 for flag in flags),
            parted=any(flag & 8 for flag in flags),
            spent=[Spent(*seconds) for seconds in rows[:, 6:9].tolist()],
            losses=rows[:, 9].tolist(),
        )

    def _tell_speakers(self, world: Communicator, steps: list[int], purposes: list[Purpose]) -> None:
        told = world.gather_objects((host_name(), self.speaker.words))
        at = [(host, f"at step {step} of {words}") for step, (host, words) in zip(steps, told, strict=True)]
        raise RuntimeError(
            f"ranks wait for each other with different optimizers: {said_by_ranks(at, ' ')}. Step, evaluate and save "
            "the optimizers of a program in the same order on every rank."
            + (_ONE_JOIN if Purpose.END in purposes else "")
        )

    def _tell_problems(self, world: Communicator, steps: list[int]) -> None:
        """Lost parameters make buffers not finite, also those of others: where there are any, they alone are told."""
        told = world.gather_objects((host_name(), self.problem, self.changed.problem))
        kind = 1 if any(problem for _, problem, _ in told) else 2
        at = [
            (its[0], f"step {step}: {its[kind]}" if its[kind] else "") for step, its in zip(steps, told, strict=True)
        ]
        raise ValueError(said_by_ranks(at, ", "))

    def _compare_places(self, world: Communicator, purposes: list[Purpose], steps: list[int]) -> None:
        """
        All at one place and step; but a rank that has ended takes part in the others' rounds, tells them before they
        gather anything, and may end at a step of its own.
        """
        going = {(purpose, step) for purpose, step in zip(purposes, steps, strict=True) if purpose is not Purpose.END}
        with_ended_ranks = {(purpose, max(steps)) for purpose in (Purpose.ROUND, Purpose.GATHER)}
        if not going or (len(going) == 1 and (Purpose.END not in purposes or going <= with_ended_ranks)):
            return
        hosts = world.gather_objects(host_name())
        at = [
            (host, f"at step {step}, {purpose.words}")
            for host, purpose, step in zip(hosts, purposes, steps, strict=True)
        ]
        views = (
            "What shows the average (accelerator.save_state, slowmo_hf.consensus; evaluate, predict and save_model "
            "of a Trainer that trains) is called by all ranks at the same step, not inside `if is_main_process`: each "
            "file has one writer anyway. "
        )
        raise RuntimeError(
            f"ranks met at different places: {said_by_ranks(at, ' ')}. {views if Purpose.LOOK in purposes else ''}"
            "Every rank must take the same number of steps and show the average at the same ones: give all ranks "
            "equally many batches (even_batches=True) and the same settings; or, in a custom loop with "
            "base='local_sgd', use slowmo_hf.join."
        )

    def _agree_on_lrs(self, lrs: list[list[float]]) -> list[float]:
        if any(row != lrs[0] for row in lrs) and not self.speaker.has_told_rates:
            self.speaker.has_told_rates = True
            self.speaker.logger.warning(
                "step %d: inner learning rates differ between workers (means of their rounds: %s); the largest is "
                "used, and in later rounds too. A step skipped on one rank does this, or a rate that comes from a "
                "worker's own weights (AdafactorSchedule). This is said once.",
                self.attempted_steps,
                sorted(map(list, {tuple(row) for row in lrs})),
            )
        return [max(column) for column in zip(*lrs, strict=True)]


class StatusExchange:
    """
    What this rank tells all others of itself, and what all know of each other since the last exchange.

    Before a round, before a view that sends, before Trainer gathers and at the end all ranks exchange their status. A
    rank that ends first takes part in the others' rounds.

    Args:
        workers (`Workers`): All ranks, and this worker's.
        inner_state (`InnerState`): Its problems and those of its tensors, and their changed buffers, are told.
        clock (`Clock`): Where this rank is.
        account (`Account`): Counts what is sent for a round; other exchanges are apart.
        weigh (`Callable`): Is given every rank's local steps, where workers count by them.
        speaker (`Speaker`): This optimizer, among all of the program.
    """

    def __init__(
        self,
        workers: Workers,
        inner_state: InnerState,
        clock: Clock,
        account: Account,
        weigh: Callable[[list[int]], None],
        speaker: Speaker,
    ) -> None:
        self._workers, self._inner_state, self._clock, self._account = workers, inner_state, clock, account
        self._tensors = inner_state.tensors
        self._weigh = weigh
        self.speaker = speaker
        self.stop_asked = False  # this process was: it says so at the next exchange
        self.lost_finiteness = ""  # what an overlapped round has found here, in words: said at the next exchange
        self.somebody_ended = False  # at the last exchange
        self.somebody_ended_early = False  # where others came for something else; all know it, who has ended too
        # At the last exchange nothing but the parameters was to be averaged; and nothing was lost since.
        self.parameters_alone = False
        self.own_loss: Callable[[], float] = lambda: math.nan  # of this rank, for its log
        # The step of the last exchange before a log or the end, -1 if not all were there; and every rank's.
        self.losses: tuple[int, list[float]] = (-1, [])

    def exchange(self, purpose: Purpose, inner_lrs: list[float] | None = None) -> Agreement:
        """Wait for all ranks, and compare. Collective over the job; raises as `Header.say`."""
        return self.start(purpose, inner_lrs)()

    def start(
        self, purpose: Purpose, inner_lrs: list[float] | None = None, *, ahead: bool = False
    ) -> Callable[[], Agreement]:
        """Tell all ranks where this one is; the result waits for theirs, and compares."""
        # Another number of groups is a problem, and must not change the message's length.
        count, others = len(self._tensors.groups), self._tensors.others
        in_view = purpose in (Purpose.LOOK, Purpose.END)
        changed = others.known() if purpose is Purpose.GATHER else others.look(in_view=in_view)
        header = Header(
            speaker=self.speaker,
            purpose=purpose,
            attempted_steps=self._clock.attempted_steps,
            trained_steps=self._clock.trained_steps,
            local_steps=self._clock.local_steps,
            inner_lrs=((inner_lrs or []) + [0.0] * count)[:count],
            changed=changed,
            problem=self._tensors.problem() or self._inner_state.problem() or self.lost_finiteness,
            stop=self.stop_asked,
            ahead=ahead,
            parted=purpose is not Purpose.ROUND and self._clock.workers_agree and self._tensors.is_written(),
            spent=self._account.spent,
            loss=self.own_loss() if purpose in _BEFORE_LOGS else math.nan,  # which waits for the device
        )
        with nullcontext() if purpose is Purpose.ROUND else self._account.apart():
            hear = header.say(self._workers.world, self._workers.roll_call)

        def heard() -> Agreement:
            with record_function("slowmo::status"):
                return self._heard(hear(), purpose)

        return heard

    def _heard(self, agreement: Agreement, purpose: Purpose) -> Agreement:
        self._clock.stop_agreed |= agreement.stop
        self.somebody_ended = agreement.somebody_ended
        self.somebody_ended_early |= agreement.somebody_ended and agreement.purpose is not Purpose.END
        self.parameters_alone = not agreement.changed_buffers
        if agreement.parted and agreement.purpose is not Purpose.ROUND:  # which makes workers equal again
            self._clock.parted_at = agreement.attempted_steps
        if purpose in _BEFORE_LOGS:
            self.losses = (agreement.attempted_steps if agreement.same_step else -1), agreement.losses
        if purpose in (Purpose.LOOK, Purpose.GATHER):
            self._workers.all_may_meet()
        self._weigh(agreement.local_steps)
        return agreement

    def saved(self, *, agree: bool, keep: bool) -> Saved:
        """As `Part.saved`."""
        return Saved(Contents({"parameters_alone": self.parameters_alone}))

    def restore(self, saved: Saved, *, same_number: bool) -> Restored:
        """As `Part.restore`."""
        parameters_alone = saved.shared.flag("parameters_alone")

        def take_up() -> None:
            self.parameters_alone = parameters_alone

        return take_up

    def forget(self) -> None:
        """Another state is taken up: what was wrong belongs to the run that is left."""
        self.lost_finiteness, self.parameters_alone = "", False
