"""
The slow state as a dictionary, for `SlowMoOptimizer.state_dict`: what all workers share at a round's end. A checkpoint
(`checkpoints/state.py`) has the same in files, and every worker's own beside it.
"""

from __future__ import annotations

from typing import Any

import torch

from ..contents import Contents, Part, Saved, check_all
from ..log import of_this_rank
from .consensus import Consensus
from .digests import digests_of
from .parts import Parts

VERSION = 1
_OLD_NAMES = {"previous_inner_lrs": "previous_inner_lr"}  # of the outer update's settings, in a checkpoint and here
_CLOCK = ("attempted_steps", "rounds", "rates", "ended")  # of an older state the rates are not known
_LISTS = {"anchors": "anchor", "velocities": "velocity"}  # here and in a checkpoint
_WORKER, _WORKERS = "worker", "workers"  # whose inner state lies beside this, of how many; older ones do not say


def state_dict(parts: Parts) -> dict[str, Any]:
    """
    All that is equal on every worker at a round's end, and behind `finish` at any step; and which worker this is.

    Raises:
        RuntimeError: Inside a round, where workers differ and one state cannot speak for all; or where this worker has
            but a shard.
        ValueError: The parameter set has changed since the start.
    """
    config = parts.config
    _refuse_another_set(parts)
    step = parts.clock.attempted_steps
    ended = parts.clock.is_over and not parts.clock.agree_at(step)
    _refuse_inside_round(parts, step, "saved", ended=ended)
    _refuse_part(parts)
    saved = parts.slow.saved(agree=True, keep=True)
    slow = saved.shared if config.exact_average else saved.own  # each worker's own, but at the start
    lists = {
        name: [flat for key, flat in slow.tensors.items() if key.startswith(f"{kind}.")]
        for name, kind in _LISTS.items()
    }
    settings = {_OLD_NAMES.get(name, name): value for name, value in slow.settings.items()}
    outer = slow.objects.get("outer_optimizer", settings)
    clock = parts.clock.saved(agree=True, keep=True)
    steps = {**clock.shared.settings, "rates": clock.own.settings["rates"]}
    whose = {_WORKER: parts.workers.index, _WORKERS: parts.workers.count}
    told = {"version": VERSION, **whose, "sync_every": config.sync_every, **steps, **lists, "outer_optimizer": outer}
    return {**told, "ended": True} if ended else told


@torch.no_grad()
def load_state_dict(parts: Parts, saved_parts: list[Part], consensus: Consensus, state: dict[str, Any]) -> None:
    """
    Take up a state of `state_dict()`; copied in place. Collective among the processes of a worker.

    Raises:
        ValueError: The state does not fit: version, sizes, values. Nothing has been changed.
        RuntimeError: It is of a clock inside a round.
    """
    _refuse_another_set(parts)
    shared = _contents(state)
    step, ended = shared.count("attempted_steps"), shared.flag("ended")
    _refuse_inside_round(parts, step, "resumed", ended=ended, saved_with=state["sync_every"])
    if len(state["velocities"]) != len(parts.slow.update.velocities):
        raise ValueError(
            f"slow state does not fit: it has {len(state['velocities'])} velocities, this run "
            f"{len(parts.slow.update.velocities)}. Set outer_optimizer and outer_momentum as they were."
        )
    take_up = check_all(saved_parts, Saved(shared, shared), same_number=False)
    consensus.restore()  # the state replaces what a view would give back
    begins = parts.clock.attempted_steps == 0
    take_up()
    # Inside a round parameters stay: all_reduce's, and the average behind `finish`, which the program has loaded.
    if step % parts.config.sync_every == 0 and not ended:
        there = digests_of(parts.tensors.trainable) if begins and step else []
        if parts.config.shard_slow_state:  # others have the anchors of most of them
            parts.slow.give_parameters_(shared)
        parts.back_to_anchors()
        _tell_others(parts, there)
    parts.share_last_round()
    _tell_whose(parts, state)


def _tell_others(parts: Parts, there: list[list[int]]) -> None:
    """Warn where the program had other weights in the model than the state has: these are digests."""
    now = digests_of(parts.tensors.trainable) if there else []
    others = [name for name, one, other in zip(parts.tensors.names, there, now, strict=False) if one != other]
    if others:
        parts.workers.logger.warning(
            "the optimizer's state has other weights than the model: %s and %d more are the state's now. Where the "
            "model's own were meant (an EMA, another checkpoint), begin with a new optimizer, without that state.",
            others[0],
            len(others) - 1,
        )


def _tell_whose(parts: Parts, state: dict[str, Any]) -> None:
    """Warn where this worker had an inner state of its own, and goes on with another's."""
    worker, own = state.get(_WORKER), parts.workers.index
    is_anothers = worker not in (None, own) and own < state.get(_WORKERS, 0) and bool(state["attempted_steps"])
    inner = [one for one in parts.tensors.optimizer.state.values() if isinstance(one, dict)]
    has_some = any(isinstance(value, torch.Tensor) for one in inner for value in one.values())
    if is_anothers and has_some and parts.trains_alone and parts.inner_state.policy == "maintain":
        of_this_rank.warning(
            "the optimizer's state that worker %d loads is worker %d's: its own inner state (such as Adam's moments) "
            "is lost, and it goes on with that one's. Let every rank save and load a file of its own, or use "
            "accelerator.save_state.",
            own,
            worker,
        )


def _contents(state: dict[str, Any]) -> Contents:
    if state.get("version") != VERSION:
        raise ValueError(
            f"slow state has version {state.get('version')!r}; this package reads {VERSION}. Load it with the package "
            "that saved it."
        )
    tensors = {f"{kind}.{index}": flat for name, kind in _LISTS.items() for index, flat in enumerate(state[name])}
    settings = {name: value for name, value in state.items() if name in _CLOCK}
    outer = state["outer_optimizer"]
    if "param_groups" in outer:
        return Contents(settings, tensors, {"outer_optimizer": outer}, "slow state")
    new_names = {old: new for new, old in _OLD_NAMES.items()}
    settings.update({new_names.get(name, name): value for name, value in outer.items()})
    return Contents(settings, tensors, source="slow state")


def _refuse_another_set(parts: Parts) -> None:
    """The slow state lies as the parameters did at the start."""
    words = parts.tensors.problem()
    if words:
        raise ValueError(words)


def _refuse_part(parts: Parts) -> None:
    """Of a process that has but a part of the slow state."""
    settings = {
        f"{parts.workers.size} processes per worker": parts.workers.size > 1,
        "shard_slow_state=True": parts.config.shard_slow_state and parts.workers.count > 1,
    }
    for setting, is_so in settings.items():
        if is_so:
            raise RuntimeError(
                f"slow state cannot be saved by one process with {setting}: each has a part of it. Use "
                "accelerator.save_state, by which every process writes its own."
            )


def _refuse_inside_round(
    parts: Parts, attempted_steps: int, verb: str, *, ended: bool, saved_with: int | None = None
) -> None:
    config = parts.config
    if attempted_steps and not config.exact_average:
        raise RuntimeError(
            f"training cannot be {verb} with exact_average=False: the workers stay different, and their own "
            "weights are not in this state. Use exact_average=True, or accelerator.save_state, which has them."
        )
    if ended:  # on the average, with nothing in flight
        return
    if attempted_steps and config.overlap_steps:
        raise RuntimeError(
            f"training cannot be {verb} with overlap_steps={config.overlap_steps}: workers are never all the "
            "same, and their own weights are not in this state. Save after slowmo_hf.finish(optimizer), use "
            "accelerator.save_state, or overlap_steps=0."
        )
    if attempted_steps % config.sync_every and config.has_rounds and config.base != "all_reduce":
        way = (
            "Save at a multiple of sync_every, after slowmo_hf.finish(optimizer), or with accelerator.save_state at "
            "any step. Under Trainer, SlowMoCallback(config) in this optimizer's place saves at any step."
        )
        if saved_with not in (None, config.sync_every):
            way = f"Set sync_every={saved_with}, with which it was saved."
        raise RuntimeError(
            f"training cannot be {verb} inside a round: step {attempted_steps} is no multiple of sync_every="
            f"{config.sync_every}, and the workers' own weights are not in this state. {way}"
        )
