"""What is said when training begins: the table, with the plan, and warnings."""

from __future__ import annotations

from ..config import SlowMoConfig
from ..rules import SLOW_MOMENTUM
from ..wire.gossip import GossipBase
from ..wire.job import host_and_address, is_in_process, launcher_tells_machines, machines_in_job, most_on_a_host
from .parts import Parts
from .plan import Plan, enough_rounds

# Fewest workers, and the largest outer momentum that fairscale advises for them, tuned on WMT'16 with Adam. Our own
# runs with Adam at the rate that is best without agree (docs/from_ddp.md): 0.5 ruined 2 workers and 0.4 ruined 4, 0.2
# was worse with 2; with 8 workers 0.5 did well, and 0.7 did not.
ADVISED = ((16, 0.6), (8, 0.5), (4, 0.2), (2, 0.0))
_FAR = 8.0  # times the learning rate that a worker may move before it is said

_Row = tuple[str, str, str, int, bool]  # host, address, backend, worker, whether its launcher tells machines


def log_start(parts: Parts) -> None:
    """
    One table: every rank's host, address, backend and worker; what is trained; the settings that are no defaults; the
    plan. Collective.
    """
    config, workers = parts.config, parts.workers
    communicator = workers.world
    plan = Plan.of(parts)
    # Which gloo or NCCL: what the parameters travel with.
    host, address = host_and_address(communicator.backend)
    own: _Row = (host, address, communicator.backend, workers.index, launcher_tells_machines())
    rows = communicator.gather_objects(own)
    parts.costs.hosts = [host for host, *_ in rows]
    all_tell = all(tells for *_, tells in rows)
    machines = machines_in_job(communicator.world_size) if all_tell else len(set(parts.costs.hosts))
    each = "one process each" if workers.size == 1 else f"{workers.size} processes each"
    where = "in this process" if is_in_process() else f"{each}, on {machines} machine(s)"
    lines = [f"{workers.count} worker{'s' if workers.count > 1 else ''}, {where}:"]
    lines += [f"{'rank':>6}  {'worker':>6}  {'backend':<12} {'address':<16} host"]
    lines += [
        f"{r:>6}  {w:>6}  {backend:<12} {address:<16} {host}" for r, (host, address, backend, w, _) in enumerate(rows)
    ]
    elements = sum(p.numel() for p in parts.tensors.trainable)
    lines += [f"  trains: {parts.tensors.words}, {elements:,} parameters"]
    lines += [f"  settings: {_settings(config)}", f"  inner_state in effect: {parts.inner_state.policy}"]
    factor = f"{_effective_step(config, parts.inner_state.policy):.3g}"
    if factor != "1":
        lines += [f"  effective step: {factor} times the learning rate, outer_lr / (1 - outer_momentum)"]
    if parts.meets_others and workers.count > 1:
        lines += [f"  plan: {plan.words(config.sync_every)}"]
    workers.logger.info("%s", "\n".join(lines))
    _warn(parts, plan, machines, rows)


def _effective_step(config: SlowMoConfig, policy: str) -> float:
    """
    alpha / (1-beta): rounds that point one way move so many times as far. A reset cancels it in part: 1, as without
    slow momentum.
    """
    if config.outer_optimizer != SLOW_MOMENTUM or policy == "reset":
        return 1.0
    return config.outer_lr / (1 - config.outer_momentum)


def _settings(config: SlowMoConfig) -> str:
    defaults = SlowMoConfig().to_dict()
    own = config.to_dict().items()
    changed = [f"{name}={value!r}" for name, value in own if name not in defaults or value != defaults[name]]
    return ", ".join(changed) or "all defaults"


def _warn(parts: Parts, plan: Plan, machines: int, rows: list[_Row]) -> None:
    """What the table shows and a reader may overlook."""
    config, workers = parts.config, parts.workers
    logger = workers.logger
    loopback = [
        f"rank {r} on {name} to {address}" for r, (name, address, *_) in enumerate(rows) if address.startswith("127.")
    ]
    if machines > 1 and loopback and "gloo" in workers.world.backend:
        logger.warning(
            "gloo binds %s, a loopback address, in a job of %d machines: set GLOO_SOCKET_IFNAME to the interface "
            "that reaches the others (docs/launch.md).",
            "; ".join(loopback),
            machines,
        )
    if workers.world.world_size == 1:
        logger.warning(
            "one worker: nothing is averaged. If you meant several, note that `accelerate launch --cpu "
            "--num_processes 2` starts one process; see docs/launch.md."
        )
    elif workers.count == 1 and config.base != "all_reduce":
        fewer = "shard over fewer processes (dp_shard_size in accelerate's configuration)"
        logger.warning(
            "one worker of %d processes: nothing is averaged between workers. For several workers, %s.",
            workers.size,
            fewer if workers.holds_shards else "set processes_per_worker=1",
        )
    if config.keeps_the_average:
        name = {"local_sgd": "Local SGD", "all_reduce": "all-reduce"}.get(config.base, config.base.upper())
        logger.info("slow momentum is off: this is %s", name)
    _warn_of_adalora(parts)
    _warn_of_far_steps(parts)
    _warn_of_small_weights(parts)
    _warn_of_machines(parts, rows)
    begins = not parts.clock.attempted_steps  # else few are left, and `sync_every` is the run's
    if begins and parts.trains_alone and not config.gossips and plan.steps and plan.rounds == 0:
        logger.warning(
            "no round is ahead: %d steps, and sync_every is %d. Workers train alone, and are averaged once, at the "
            "end. Lower sync_every, or train for more steps.",
            plan.steps,
            config.sync_every,
        )
    elif begins and config.outer_optimizer == SLOW_MOMENTUM and config.outer_momentum and plan.rounds is not None:
        least = enough_rounds(config.outer_momentum)
        more = f"train for more steps ({plan.steps})"
        if 0 < plan.rounds < least:
            logger.warning(
                "few rounds: %d ahead, and slow momentum with outer_momentum=%g needs some %d to do its work. %s.",
                plan.rounds,
                config.outer_momentum,
                least,
                f"Lower sync_every ({config.sync_every}), or {more}" if config.sync_every > 1 else more.capitalize(),
            )


def _warn_of_machines(parts: Parts, rows: list[_Row]) -> None:
    """Of a launcher that starts several processes on each of several machines, and does not say how many."""
    config, workers = parts.config, parts.workers
    hosts, machines = len(set(parts.costs.hosts)), machines_in_job(workers.world.world_size)
    _, most = most_on_a_host((host, tells) for host, *_, tells in rows)
    matters = config.base != "all_reduce" and config.processes_per_worker in ("auto", "node")
    if hosts > 1 and most > 1 and matters and not workers.holds_shards:
        workers.logger.warning(
            "LOCAL_WORLD_SIZE is %s, so these %d hosts count as %s, and processes_per_worker=%r makes %d worker(s) of "
            "%d process(es). Export it (srun: LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE), or set processes_per_worker "
            "to a number.",
            "not set" if machines == 1 else "1, as accelerate sets it where no launcher does",
            hosts,
            "one machine" if machines == 1 else f"{machines} machines",
            config.processes_per_worker,
            workers.count,
            workers.size,
        )


def _warn_of_adalora(parts: Parts) -> None:
    """By what PEFT puts on its model."""
    model = parts.tensors.others.model
    if parts.trains_alone and model is not None and any(hasattr(one, "rankallocator") for one in model.modules()):
        parts.workers.logger.warning(
            "AdaLoRA's update_and_allocate prunes by a worker's own gradients: workers prune different ranks, and the "
            "saved adapter has those alone that rank 0 keeps. Use LoRA, or base='all_reduce' (docs/lora_and_trl.md)."
        )


def _warn_of_small_weights(parts: Parts) -> None:
    """Of messages that come late: until the first ones, a worker has sent its weight away and got none."""
    config, base = parts.config, parts.base
    if config.base != "osgp" or not isinstance(base, GossipBase) or config.staleness < 2:
        return
    factor = base.topology.weight(0, 0) ** -min(config.staleness, config.sync_every - 1)
    if factor > _FAR:
        parts.workers.logger.warning(
            "staleness=%d: until the first messages come a worker's push-sum weight falls to 1/%.0f, and its inner "
            "steps then reach %.0f times as far, behind each round anew. Lower staleness, or the learning rate "
            "(docs/bases.md).",
            config.staleness,
            factor,
            factor,
        )


def _warn_of_far_steps(parts: Parts) -> None:
    """
    Of an inner state that is kept where it has no momentum of SGD: 4 workers that kept that did better with 0.5 than
    with 0 (docs/benchmarks.md).
    """
    config, workers = parts.config, parts.workers
    factor = _effective_step(config, parts.inner_state.policy)
    momentum = next((momentum for fewest, momentum in ADVISED if workers.count >= fewest), None)
    if momentum is None or parts.inner_state.is_momentum_of_sgd or factor < (1 + 1e-6) / (1 - momentum):
        return
    name, most = "outer_momentum", momentum
    if config.outer_momentum <= momentum:  # it is `outer_lr` then
        name, most = "outer_lr", (1 - config.outer_momentum) / (1 - momentum)
    workers.logger.warning(
        "outer_momentum=%g with %d workers: the inner optimizer's state is kept, so rounds step %.3g times as far as "
        "the learning rate says. With Adam and as many workers set %s to %g at most (docs/from_ddp.md): runs whose "
        "rounds stepped further were worse, or ruined.",
        config.outer_momentum,
        workers.count,
        factor,
        name,
        most,
    )
