"""
The complete state of an outer loop at one optimizer step, for a checkpoint: what all workers share, and what each has
alone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .checkpoint import CheckpointError, Contents, read_part, write_part
from .compression import CompressedAverager
from .config import SlowMoConfig
from .gossip import GossipBase
from .job import host_name
from .log import logger
from .outer_loop import OuterLoop
from .overlap import TrainingOn
from .processes import Transfer
from .round import Round
from .round_report import Norms

SHARED = "shared"

# Settings that give the saved state its meaning; with another value it cannot be taken up. The others may change, and
# that is said.
_FIXED = (
    *(
        "base",
        "sync_every",
        "outer_optimizer",
        "exact_average",
        "inner_state",
        "model_buffers",
        "topology",
        "peers",
        "staleness",
    ),
    "overlap_steps",
)


def keeps_files(outer_loop: OuterLoop, folder: Path, local_rank: int) -> bool:
    """
    Whether this process writes what all workers share: rank 0, and the first process of a machine that does not see
    its files.
    """
    world = outer_loop.workers.world
    token = folder / f".{outer_loop.run_id}"

    def leave_token() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if world.rank == 0:
            token.touch()

    together(outer_loop, f"{folder} cannot be written", leave_token)
    sees_it = token.exists()
    world.gather_objects(None)  # all have looked
    if world.rank == 0:
        token.unlink()
    return world.rank == 0 if sees_it else local_rank == 0


def together(outer_loop: OuterLoop, words: str, act: Callable[[], None]) -> None:
    """
    Do it on every rank. Collective.

    Raises:
        CheckpointError: It failed on some; the same words on all, with rank, host and reason.
    """
    failure = ""
    try:
        act()
    except Exception as error:  # safetensors and torch.save raise their own; one rank alone must never leave
        failure = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    failures = outer_loop.workers.world.gather_objects((host_name(), failure))
    told = [f"rank {rank} on {host}: {failure}" for rank, (host, failure) in enumerate(failures) if failure]
    if told:
        raise CheckpointError(f"{words}. {'; '.join(told)}")


def finish_together(outer_loop: OuterLoop, folder: Path, act: Callable[[], None]) -> None:
    """Act on a checkpoint once the files of every rank are there. Collective; raises as `together`."""
    outer_loop.workers.world.gather_objects(None)
    together(outer_loop, f"checkpoint {folder} cannot be finished", act)


def write_snapshot(folder: str, outer_loop: OuterLoop, *, shared: bool, objects: dict[str, Any]) -> None:
    """
    Write this process's part of a checkpoint; every process calls it at the same step. Nothing that may fail on one
    alone comes first: with `shard_slow_state` workers meet at its beginning, and bring the slow state together.

    Args:
        folder (`str`): The checkpoint's.
        outer_loop (`OuterLoop`): The average may be shown: the local weights are taken from where they are put by.
        shared (`bool`): Whether this process also writes what all workers share: one on every file system.
        objects (`dict`): State dictionaries of each worker's own: scheduler, scaler.

    Raises:
        CheckpointError: A worker spans machines that do not share the folder.
    """
    workers = outer_loop.workers
    outer_loop.settle()
    slow = _slow_state(outer_loop, keep=shared or not outer_loop.config.exact_average)
    clock = {
        "run": outer_loop.run_id,
        "attempted_steps": outer_loop.attempted_steps,
        "rounds": outer_loop.rounds,
        "parameters_alone": outer_loop.status.parameters_alone,
        "workers": workers.count,
        "processes": workers.world.world_size,
        "config": outer_loop.config.to_dict(),
        "parameters": outer_loop.tensors.fingerprint(),
    }
    if shared and not workers.leads:
        raise CheckpointError(
            f"processes_per_worker must be at most a machine's processes where machines do not share {folder}, got "
            f"{workers.size}: worker {workers.index} spans machines, and its state would be on another one's disk "
            "than this process reads. Put the folder on a shared file system, or set processes_per_worker='node'."
        )
    if shared:
        common = slow if outer_loop.config.exact_average else Contents()
        write_part(folder, SHARED, Contents({**clock, **common.settings}, common.tensors, common.objects))
    if workers.leads:
        own = _worker_state(outer_loop)
        if not outer_loop.config.exact_average:
            own.settings.update(slow.settings)
            own.tensors.update(slow.tensors)
            own.objects.update(slow.objects)
        own.objects.update({"inner_optimizer": outer_loop.inner_optimizer.state_dict(), **objects})
        own.settings.update(
            {key: clock[key] for key in ("run", "attempted_steps", "workers")},
            local_steps=outer_loop.clock.local_steps,
        )
        write_part(folder, f"worker_{workers.index}", own)


def _slow_state(outer_loop: OuterLoop, *, keep: bool) -> Contents:
    anchors, velocities = outer_loop.whole_slow_state(keep=keep)
    state = outer_loop.update.saved()
    state.tensors.update({f"anchor.{index}": anchor for index, anchor in enumerate(anchors)})
    state.tensors.update({f"velocity.{index}": velocity for index, velocity in enumerate(velocities)})
    return state


def _worker_state(outer_loop: OuterLoop) -> Contents:
    tensors = outer_loop.tensors
    changed = tensors.changed_buffers()
    state = Contents(settings={"changed_buffers": changed})
    if not outer_loop.clock.workers_agree:
        for name, param in zip(tensors.names, tensors.trainable, strict=True):
            state.tensors[f"parameter.{name}"] = outer_loop.view.local_value(param)
    buffers = tensors.buffers()
    for name in changed:
        state.tensors[f"buffer.{name}"] = outer_loop.view.local_value(buffers[name])
    if isinstance(outer_loop.averager, CompressedAverager):
        state.settings["bucket_elements"], residuals = outer_loop.averager.residuals()
        state.tensors.update(residuals)
    base = outer_loop.base
    if isinstance(base, GossipBase) and not outer_loop.clock.workers_agree:
        base.wait_for_messages()
        state.settings["weight"] = base.weight
        state.settings["in_flight"] = [
            [float(w) for w in e.weight.received] if e.weight else [] for e in base.in_flight
        ]
        for index, item in enumerate(outer_loop.anchors):
            state.tensors[f"numerator.{index}"] = base.numerators[item]
            for number, exchange in enumerate(base.in_flight):
                for source, received in enumerate(exchange.received):
                    state.tensors[f"message.{number}.{source}.{index}"] = received[item]
    in_flight = outer_loop.in_flight
    if isinstance(base, TrainingOn) and in_flight is not None and in_flight.norms is not None:
        state.settings["departed"] = {"due_step": in_flight.due_step, "norms": in_flight.norms.squares}
        for index, item in enumerate(outer_loop.anchors):
            state.tensors[f"departed.{index}"] = base.departed[item]
    return state


@torch.no_grad()
def read_snapshot(folder: str, outer_loop: OuterLoop) -> dict[str, Any]:
    """
    Take up a checkpoint's state, in place, after `OuterLoop.start`. Every process calls it; nothing is sent.

    On another number of workers all start from the average, which is in the model already, with the shared anchors,
    velocity and clock; worker i takes the inner optimizer of worker i modulo the old number. Local weights, messages
    in flight and what compression has held back are dropped.

    Returns:
        `dict`: The `objects` that `write_snapshot` was given.

    Raises:
        CheckpointError: The checkpoint is damaged or of another run, model or setting; nothing has been changed.
    """
    shared = read_part(folder, SHARED)
    _check(folder, shared, outer_loop)
    same_number = shared.settings["workers"] == outer_loop.workers.count
    own = read_part(folder, f"worker_{outer_loop.workers.index % shared.settings['workers']}")
    for key in ("run", "attempted_steps", "workers"):
        if own.settings.get(key) != shared.settings[key]:
            raise CheckpointError(
                f"{folder}: worker {outer_loop.workers.index}'s file has {key} {own.settings.get(key)!r}, the shared "
                f"one has {shared.settings[key]!r}: they are of different saves. Resume from another checkpoint."
            )
    if "inner_optimizer" not in own.objects:
        name = f"worker_{outer_loop.workers.index % shared.settings['workers']}.pt"
        raise CheckpointError(
            f"{folder}: {name} is missing or holds no inner optimizer. Resume from another checkpoint."
        )
    if not same_number:
        if not outer_loop.config.exact_average:
            raise CheckpointError(
                f"{folder} was saved by {shared.settings['workers']} workers with exact_average=False, where anchors "
                f"and velocities are each worker's own; this run has {outer_loop.workers.count}. Start as many, or "
                "begin a new run from its model."
            )
        logger.warning(
            "resumed with %d workers in place of %d: all start from the average with the shared velocity; local "
            "weights and messages in flight are dropped, inner optimizer states are dealt out in turn",
            outer_loop.workers.count,
            shared.settings["workers"],
        )
    outer_loop.forget_round()
    outer_loop.run_id = shared.settings["run"]
    clock = outer_loop.clock
    clock.attempted_steps, clock.rounds = shared.settings["attempted_steps"], shared.settings["rounds"]
    outer_loop.status.parameters_alone = shared.settings.get("parameters_alone", False)
    if outer_loop.workers.leads:
        _put_slow_state(shared if outer_loop.config.exact_average else own, outer_loop)
    outer_loop.inner_optimizer.load_state_dict(own.objects.pop("inner_optimizer"))
    clock.local_steps = own.settings["local_steps"] if same_number else 0
    _put_residuals(own, same_number, outer_loop)
    if same_number:
        _put_worker_state(own, outer_loop)
    else:
        if "departed" in own.settings:
            outer_loop.inner_state.reset()  # all start from an average that has taken it in
        if isinstance(outer_loop.base, GossipBase):
            outer_loop.base.start_from_parameters()
    return own.objects


def _check(folder: str, shared: Contents, outer_loop: OuterLoop) -> None:
    # An older one lacks later settings.
    saved, now = (
        SlowMoConfig().to_dict() | shared.settings["config"],
        outer_loop.config.to_dict(),
    )
    for name in _FIXED:
        if saved.get(name) != now[name]:
            raise CheckpointError(
                f"{name} is {now[name]!r}, but {folder} was saved with {saved.get(name)!r}, which gives its state its "
                f"meaning. Set {name}={saved.get(name)!r} to resume; or load its model and begin a new run."
            )
    changed = {
        name: (saved.get(name), value)
        for name, value in now.items()
        if name not in _FIXED and saved.get(name) != value
    }
    if changed:
        logger.info(
            "resumed with other settings: %s",
            ", ".join(f"{name} {old!r} -> {new!r}" for name, (old, new) in changed.items()),
        )
    then, here = shared.settings["parameters"], outer_loop.tensors.fingerprint()
    if then != here:
        odd = [line for line in (*then, *here) if (line in then) != (line in here)]
        raise CheckpointError(
            f"{folder} is of another model or parameter set: {odd[:3] or 'another order'} differ. Train the same "
            "parameters to resume; or load its model and begin a new run."
        )
    for index, layout in enumerate(outer_loop.layouts if outer_loop.config.exact_average else []):
        tensor = shared.tensors.get(f"anchor.{index}")
        if tensor is None or tensor.shape != layout.flat.shape or tensor.dtype != layout.flat.dtype:
            raise CheckpointError(
                f"{folder}: anchor {index} does not fit: {None if tensor is None else tuple(tensor.shape)}."
            )


def _put_slow_state(state: Contents, outer_loop: OuterLoop) -> None:
    averager, anchors, velocities = outer_loop.averager, outer_loop.anchors, outer_loop.velocities
    averager.take_own_(
        [item.flat for item in anchors], [state.tensors[f"anchor.{index}"] for index in range(len(anchors))]
    )
    # A run that had no momentum has no velocity: it starts at 0.
    saved = [
        state.tensors.get(f"velocity.{index}", torch.zeros(()).expand(layout.flat.shape))
        for index, layout in enumerate(outer_loop.layouts)
    ]
    averager.take_own_(velocities, saved[: len(velocities)])
    outer_loop.update.restore(state)


def _put_residuals(own: Contents, same_number: bool, outer_loop: OuterLoop) -> None:
    averager, sizes = outer_loop.averager, own.settings.get("bucket_elements")
    averager.drop_residuals()
    if sizes is None or not outer_loop.workers.leads:
        return
    dropped = ""
    if not same_number:
        dropped = "it was saved by another number of workers"
    elif not isinstance(averager, CompressedAverager):
        dropped = "compression is off"
    elif not averager.put_residuals(sizes, own.tensors):
        dropped = "bucket_bytes now cuts other shards, of whose sums it is"
    if dropped:
        logger.warning("what compression has held back is dropped: %s", dropped)


def _put_worker_state(own: Contents, outer_loop: OuterLoop) -> None:
    tensors = outer_loop.tensors
    if not outer_loop.clock.workers_agree:
        for name, param in zip(tensors.names, tensors.trainable, strict=True):
            param.copy_(own.tensors[f"parameter.{name}"])
    buffers = tensors.buffers()
    for name in own.settings["changed_buffers"]:
        buffers[name].copy_(own.tensors[f"buffer.{name}"])
    tensors.mark_changed(own.settings["changed_buffers"])
    base = outer_loop.base
    if isinstance(base, TrainingOn) and "departed" in own.settings:
        due_step, squares = own.settings["departed"]["due_step"], own.settings["departed"]["norms"]
        outer_loop.in_flight = Round(outer_loop.parts, due_step, Norms.of(squares))
        for index, item in enumerate(outer_loop.anchors):
            base.departed[item].copy_(own.tensors[f"departed.{index}"])
        base.away = True
    if not isinstance(base, GossipBase):
        return
    base.wait_for_messages()
    base.end_average()  # what was in flight belongs to the run that is left
    if "weight" not in own.settings:
        base.start_from_anchors()
        return
    base.weight = own.settings["weight"]
    for index, item in enumerate(outer_loop.anchors):
        base.numerators[item].copy_(own.tensors[f"numerator.{index}"])
    for number, weights in enumerate(own.settings["in_flight"]):
        exchange = base.new_exchange(len(weights))
        for index, item in enumerate(outer_loop.anchors):
            for source, received in enumerate(exchange.received):
                received[item].copy_(own.tensors[f"message.{number}.{source}.{index}"])
        exchange.weight = _arrived([torch.tensor([weight], dtype=torch.float64) for weight in weights])
        exchange.buckets = [_arrived([]) for _ in range(base.messages_per_exchange)]
        base.in_flight.append(exchange)


def _arrived(received: list[torch.Tensor]) -> Transfer:
    return Transfer([], torch.empty(0), received, "a message of a checkpoint", done=True)
