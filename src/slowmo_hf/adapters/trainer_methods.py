"""A Trainer's own methods while it trains: `evaluate`, `predict` and `save_model` see the average of all workers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from ..random_state import RandomState
from ..training.outer_loop import OuterLoop

Method = Callable[..., Any]


class Looks:
    """
    Looks at the average that the user's own callbacks, or a subclass of Trainer, ask for at any moment of training.
    Before training begins and after its end there is nothing to show.
    """

    def __init__(self) -> None:
        self._outer_loop: OuterLoop | None = None
        self._catch_up: Callable[[], None] = _nothing

    def begin(
        self,
        trainer: Any,
        outer_loop: OuterLoop,
        *,
        catch_up: Callable[[], None],
        average_tokens: bool,
        given_back: ExitStack,
    ) -> None:
        """
        From here to the end the Trainer's methods are looks.

        Args:
            catch_up (`Callable`): Counts a step that was taken and is not counted yet.
            average_tokens (`bool`): `average_tokens_across_devices` as the user has it. It is off in training steps;
                evaluations scale their loss as stock Trainer does.
            given_back (`ExitStack`): What ends it.
        """
        self._outer_loop, self._catch_up = outer_loop, catch_up
        given_back.callback(self._end)
        own = functools.partial(self.look, keep_writes=True)  # a stock Trainer's callbacks write into its model

        @contextmanager
        def evaluating() -> Iterator[None]:
            before = trainer.args.average_tokens_across_devices
            trainer.args.average_tokens_across_devices = average_tokens
            try:
                with own():
                    yield
            finally:
                trainer.args.average_tokens_across_devices = before

        saving = functools.partial(own, all_come=False)  # one rank may save what all have
        for name, inside in (("evaluate", evaluating), ("predict", evaluating), ("save_model", saving)):
            replace_method(trainer, name, functools.partial(_inside, inside), given_back)
        for name in ("evaluation_loop", "prediction_loop"):  # the second: use_legacy_prediction_loop of transformers 4
            if hasattr(trainer, name):
                replace_method(trainer, name, functools.partial(_inside, outer_loop.consensus.passes), given_back)

    def _end(self) -> None:
        self._outer_loop, self._catch_up = None, _nothing

    @contextmanager
    def look(self, *, keep_writes: bool = False, all_come: bool = True) -> Iterator[None]:
        """
        Inside, the average is in the model; afterwards weights and random generators are what they were. Collective,
        unless the average is shown anyway.

        Args:
            keep_writes (`bool`): As `ConsensusView.keep_writes`.
            all_come (`bool`): As `Consensus.hear_of_earlier_writes`.
        """
        outer_loop = self._outer_loop
        if outer_loop is None:
            yield
            return
        self._catch_up()
        outer_loop.consensus.hear_of_earlier_writes(all_come=all_come)
        random_state = RandomState.take()
        try:
            with outer_loop.consensus.shown(keep_writes=keep_writes):
                yield
        finally:
            random_state.give_back()


def _nothing() -> None:
    """No step is left to count."""


def callback_of(subject: Any) -> Any:
    """The SlowMoCallback that this is, or that this Trainer has; None for anything else."""
    callbacks = getattr(getattr(subject, "callback_handler", None), "callbacks", [subject])
    return next((found for found in callbacks if isinstance(getattr(found, "looks", None), Looks)), None)


def given_back_of(trainer: Any) -> ExitStack:
    """
    What gives back all that is another while this Trainer trains. The Trainer has it, not the callback: with
    `restore_callback_states_from_checkpoint` Trainer puts a new one in its place, at each try to train.
    """
    given_back: ExitStack = vars(trainer).setdefault("slowmo_given_back", ExitStack())
    return given_back


def replace_method(owner: Any, name: str, wrap: Callable[[Method], Method], given_back: ExitStack) -> None:
    """Put a wrapper of its own method on one Trainer or Accelerator, until the stack gives it back."""
    own = vars(owner).get(name)  # the user's own replacement
    replacement = wrap(getattr(owner, name))
    setattr(owner, name, replacement)

    def release() -> None:
        if vars(owner).get(name) is not replacement:
            return  # somebody has replaced it since, and keeps it
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)

    given_back.callback(release)


def and_then(behind: Callable[..., object], tell: Method) -> Method:
    """An event of a Trainer's callback handler, with something behind all callbacks; it is given their control."""

    @functools.wraps(tell)
    def tell_first(args: Any, state: Any, control: Any) -> Any:
        control = tell(args, state, control)
        behind(args, state, control)
        return control

    return tell_first


def _inside(context: Callable[[], AbstractContextManager[None]], method: Method) -> Method:
    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        with context():
            return method(*args, **kwargs)

    return call
