"""
The heart: anchors, the clock, one round (Algorithm 1 of SlowMo, https://huggingface.co/papers/1910.00643).

    for every optimizer step k = 1, 2, ...                    OuterLoop.step
        the inner optimizer has stepped                       line 4
        if k is a multiple of sync_every:                     OuterLoop._round
            pseudo_grad = mean_i(anchor - x_i)                line 6, x_{t,0} - x_{t,tau}
            velocity    = beta r velocity + pseudo_grad       line 7, v = gamma u, r = gamma_t / gamma_{t-1}
            anchor      = anchor - alpha velocity             line 8
            x_i         = anchor                              the next round's start
            inner state: reset, maintain or average           line 2

Decisions taken once:
(a) The inner learning rate of a round is the one in force at its last inner step, per parameter group. It travels in the round's
    header in fp64 and all ranks use the maximum, so that a step skipped on one rank cannot part them.
(b) Displacement form: r = 1 where no earlier non-zero learning rate exists; a zero leaves the remembered one in place.
(c) Anchors, velocity and reductions are fp32 at least, and the pseudo-gradient is measured from what was handed back: the anchor
    rounded to the parameters' dtype. Rounding never enters the velocity.
(d) Parameters: those with `requires_grad` at the start, tied ones once, in the optimizer's order, compared on all ranks.
(e) Floating-point buffers that have changed since the start follow `model_buffers`, integer ones take the maximum.
(f) The clock counts attempted optimizer steps: not micro-batches, not applied steps. With fp16, rank 0 may apply step 3 while
    rank 1 skips it (an infinite gradient); a counter of applied steps would leave rank 1 behind for good, and a round entered by
    one rank alone never returns.
(g) No outer update outside a round: a look shows the average, then gives weights and random generators back as they were.
(h) The consensus distance, mean ||x_i - mean x||^2 = mean ||x_i - anchor||^2 - ||pseudo_grad||^2, costs no message: the first term
    rides in the last element of each bucket.
"""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import dataclass
from typing import Any

import torch

from .averager import Bucket, ExactAverager, FlatAnchor, flat_anchors, squared_norm, views_like
from .communicator import Communicator, machines_in_job
from .config import SLOW_MOMENTUM, SlowMoConfig
from .log import logger, make_heard
from .model_tensors import ModelTensors, copy_tensors_
from .outer_optimizer import SlowMomentum, make_outer_optimizer
from .random_state import RandomState
from .start_check import check_same_everywhere, log_start

STATE_VERSION = 1


@dataclass(frozen=True)
class RoundReport:
    """
    What one round did.

    Args:
        round (`int`): Rounds done so far, this one included.
        consensus_distance (`float`): Mean over workers of ||x_i - mean x||^2 before the average.
        pseudo_grad_norm (`float`): ||anchor - average||.
        velocity_norm (`float`): ||velocity|| after the outer step; 0 where the outer optimizer keeps none of ours.
        bytes_sent (`int`): Payload this worker sent, counted as a ring all-reduce: 2 (m-1)/m of each message.
        seconds (`float`): Wall time of the round, waiting included.
        utilisation (`float`): Time outside rounds over all time, since the last round; looks do not count.
    """

    round: int
    consensus_distance: float
    pseudo_grad_norm: float
    velocity_norm: float
    bytes_sent: int
    seconds: float
    utilisation: float

    def to_logs(self) -> dict[str, float]:
        """The report under the keys `slowmo/...`, for `accelerator.log` and trackers."""
        return {f"slowmo/{name}": value for name, value in vars(self).items()}


class OuterLoop:
    """
    Local training of one worker, and its rounds with the others.

    Args:
        inner_optimizer (`torch.optim.Optimizer`): Holds the parameters. Only its state is touched, at a round's end.
        config (`SlowMoConfig`): The settings.
        model (`torch.nn.Module`, *optional*): Gives parameters their names, and buffers. Unwrapped.
    """

    def __init__(self, inner_optimizer: torch.optim.Optimizer, config: SlowMoConfig, model: torch.nn.Module | None = None) -> None:
        self.config = config
        self.inner_optimizer = inner_optimizer
        self.tensors = ModelTensors(inner_optimizer, model)
        self.inner_state = _inner_state_policy(config, inner_optimizer)
        self.attempted_steps = 0
        self.rounds = 0
        self.last_round: RoundReport | None = None
        self._stash: list[torch.Tensor] | None = None
        self._random_state: RandomState | None = None
        self._clock_start = self._look_start = time.perf_counter()

    # ---- the start ----

    def start(self, *, attempted_steps: int = 0, broadcast_frozen: bool = True) -> None:
        """
        Compare all ranks, broadcast rank 0's values, take the anchors. Collective: every rank calls it, before the first step.

        Args:
            attempted_steps (`int`, *optional*, defaults to `0`): Where the clock starts.
            broadcast_frozen (`bool`, *optional*, defaults to `True`): False where DDP's constructor has done it.

        Raises:
            ValueError: Ranks differ, or a parameter cannot be averaged; the same on every rank.
        """
        make_heard()
        self.communicator = Communicator(self.config.timeout_seconds, self.tensors.device)
        self.averager = ExactAverager(self.communicator, self.config.bucket_bytes)
        check_same_everywhere(self.communicator, self.config, self.tensors)
        self.averager.broadcast_(self.tensors.values(include_frozen=broadcast_frozen))
        self.tensors.remember_buffers()
        self.attempted_steps = attempted_steps
        self.anchors = flat_anchors(self.tensors.groups)
        self._buckets = [item.buckets(self.config.bucket_bytes) for item in self.anchors]
        self.averager.reserve(self.anchors)
        self._make_outer_optimizer()
        log_start(self.communicator, self.config, self.inner_state, machines_in_job(self.communicator.world_size))
        self._clock_start = time.perf_counter()

    def _make_outer_optimizer(self) -> None:
        """Slow momentum works on buckets, as they arrive; another optimizer on anchors in the parameters' shapes, at the end."""
        groups: list[list[torch.Tensor]] = [[] for _ in self.tensors.groups]
        if self.config.outer_optimizer == SLOW_MOMENTUM:
            for group, part in self._parts(self.anchors):
                groups[group].append(part)
        else:
            for item in self.anchors:
                for group, anchor in zip(item.groups, item.anchors(), strict=True):
                    groups[group].append(anchor)
        self.outer_optimizer = make_outer_optimizer(self.config, groups)
        self.velocities = []
        if isinstance(self.outer_optimizer, SlowMomentum) and self.config.outer_momentum > 0:
            velocities = [FlatAnchor(torch.zeros_like(item.flat), item.params, item.groups) for item in self.anchors]
            for (_, anchor), (_, velocity) in zip(self._parts(self.anchors), self._parts(velocities), strict=True):
                self.outer_optimizer.state[anchor]["velocity"] = velocity
            self.velocities = [item.flat for item in velocities]

    def _parts(self, items: list[FlatAnchor]) -> list[tuple[int, torch.Tensor]]:
        """(group, run) of every part of every bucket; for the anchors, the very tensors that the rounds update."""
        buckets = self._buckets if items is self.anchors else [item.buckets(self.config.bucket_bytes) for item in items]
        return [part for of_item in buckets for bucket in of_item for part in bucket.parts]

    # ---- the clock and the round ----

    @torch.no_grad()
    def step(self, inner_lrs: list[float]) -> RoundReport | None:
        """
        Count one attempted inner step; do a round if one is due. Call it after the inner optimizer, before the scheduler.

        Args:
            inner_lrs (`list[float]`): The learning rate in force, per parameter group.

        Returns:
            `RoundReport` of a round, or None between rounds, where nothing is sent.
        """
        self.refuse_while_shown()
        self.attempted_steps += 1
        return self._round(inner_lrs) if self.workers_agree else None

    def refuse_while_shown(self) -> None:
        """Raise if the average is in the parameters: a step taken there would be lost when the local weights return."""
        if self.showing_average:
            raise RuntimeError("a training step was taken while the average is shown: leave consensus() before you train on.")

    @property
    def workers_agree(self) -> bool:
        """True where a round has just ended (or nothing has begun): parameters are equal on all workers."""
        return self.attempted_steps % self.config.sync_every == 0

    def _round(self, inner_lrs: list[float]) -> RoundReport:
        start, bytes_before = time.perf_counter(), self.communicator.bytes_sent
        inner_lrs = self._agree(inner_lrs)
        pseudo_grad_square, drift_square = self._outer_step(inner_lrs)
        self._hand_back()
        self._average_buffers()
        self._treat_inner_state()
        self.rounds += 1
        end = time.perf_counter()
        self.last_round = RoundReport(
            round=self.rounds,
            consensus_distance=max(0.0, drift_square - pseudo_grad_square),
            pseudo_grad_norm=math.sqrt(pseudo_grad_square),
            velocity_norm=self._velocity_norm(),
            bytes_sent=self.communicator.bytes_sent - bytes_before,
            seconds=end - start,
            utilisation=(start - self._clock_start) / max(end - self._clock_start, 1e-9),
        )
        if self.rounds == 2:
            self._log_costs(start - self._clock_start, end - start)
        self._clock_start = end
        return self.last_round

    def _agree(self, inner_lrs: list[float]) -> list[float]:
        """Exchange the header, [step, problem?, changed buffers, *inner_lrs]: a difference is found before anything is mixed."""
        problem = self.tensors.problem()
        changed = self.tensors.changed_buffers()
        header = [float(self.attempted_steps), float(bool(problem)), _hash48(changed), *inner_lrs]
        rows = self.communicator.gather_header(header[: 3 + len(self.tensors.groups)])
        steps, problems, buffers, lrs = rows[:, 0], rows[:, 1], rows[:, 2], rows[:, 3:]
        if problems.any():
            words = self.communicator.gather_objects(problem)
            raise ValueError("; ".join(f"rank {rank}: {word}" for rank, word in enumerate(words) if word))
        if (steps != steps[0]).any():
            at = ", ".join(f"rank {rank} at step {int(step)}" for rank, step in enumerate(steps))
            raise RuntimeError(
                f"workers met for a round at different optimizer steps: {at}. Every rank must take the same number of steps: "
                "give all ranks equally many batches (even_batches=True)."
            )
        if (buffers != buffers[0]).any():
            changed = sorted(set().union(*self.communicator.gather_objects(changed)))
        self._changed_buffers = changed
        agreed: list[float] = lrs.amax(dim=0).tolist()
        if (lrs != lrs[0]).any():
            logger.warning(
                "round %d: inner learning rates differ between ranks (%s); the largest is used. A step skipped on one rank does this.",
                self.rounds + 1,
                lrs.tolist(),
            )
        return agreed

    def _outer_step(self, inner_lrs: list[float]) -> tuple[float, float]:
        """Lines 6 to 8. Returns (||pseudo_grad||^2, mean ||x_i - anchor||^2)."""
        pseudo_grad_square = drift_square = 0.0
        if not isinstance(self.outer_optimizer, SlowMomentum):
            return self._outer_step_at_once()
        for group, inner_lr in zip(self.outer_optimizer.param_groups, inner_lrs, strict=True):
            group["inner_lr"] = inner_lr
        for buckets in self._buckets:
            for bucket in buckets:
                pseudo_grad, drift = self.averager.mean_displacement(bucket)  # line 6
                pseudo_grad_square += squared_norm(pseudo_grad)
                drift_square += drift
                self._update_parts(self.outer_optimizer, bucket, pseudo_grad)  # lines 7 and 8
        self.outer_optimizer.end_round()
        return pseudo_grad_square, drift_square

    def _update_parts(self, outer_optimizer: SlowMomentum, bucket: Bucket, pseudo_grad: torch.Tensor) -> None:
        offset = 0
        for _, anchor in bucket.parts:
            anchor.grad = pseudo_grad[offset : offset + anchor.numel()]
            offset += anchor.numel()
        outer_optimizer.step()
        for _, anchor in bucket.parts:
            anchor.grad = None

    def _outer_step_at_once(self) -> tuple[float, float]:
        """The same for another outer optimizer, which may need whole tensors: the pseudo-gradient is one copy more meanwhile."""
        pseudo_grad_square = drift_square = 0.0
        gradients: list[list[torch.Tensor]] = [[] for _ in self.tensors.groups]
        for item, buckets in zip(self.anchors, self._buckets, strict=True):
            flat, offset = torch.empty_like(item.flat), 0
            for bucket in buckets:
                pseudo_grad, drift = self.averager.mean_displacement(bucket)
                pseudo_grad_square += squared_norm(pseudo_grad)
                drift_square += drift
                flat[offset : offset + pseudo_grad.numel()].copy_(pseudo_grad)
                offset += pseudo_grad.numel()
            for group, gradient in zip(item.groups, views_like(flat, item.params), strict=True):
                gradients[group].append(gradient)
        for param_group, own in zip(self.outer_optimizer.param_groups, gradients, strict=True):
            for anchor, gradient in zip(param_group["params"], own, strict=True):
                anchor.grad = gradient
        self.outer_optimizer.step()
        self.outer_optimizer.zero_grad(set_to_none=True)
        return pseudo_grad_square, drift_square

    def _hand_back(self) -> None:
        for item in self.anchors:
            for param, anchor in zip(item.params, item.anchors(), strict=True):
                param.copy_(anchor)

    def _average_buffers(self) -> None:
        floating, integer = self.tensors.buffers_named(self._changed_buffers)
        if self.config.model_buffers == "average":
            self.averager.mean_(floating)
        self.averager.max_(integer)

    def _treat_inner_state(self) -> None:
        """Line 2 of Algorithm 1, for the next round."""
        if self.inner_state == "reset":
            for param in self.tensors.trainable:
                self.inner_optimizer.state.pop(param, None)
        elif self.inner_state == "average":
            self._average_inner_state()

    def _average_inner_state(self) -> None:
        """Average every state tensor that has its parameter's shape; a 0-dim `step` is no such tensor."""
        names, tensors = [], []
        for index, param in enumerate(self.tensors.trainable):
            for key, value in sorted(self.inner_optimizer.state.get(param, {}).items()):
                if isinstance(value, torch.Tensor) and value.is_floating_point() and key != "step" and value.dim() > 0:
                    names.append(f"{self.tensors.names[index]}.{key}{list(value.shape)}")
                    tensors.append(value)
        hashes = self.communicator.gather_header([_hash48(names)])
        if (hashes != hashes[0]).any():
            everywhere = self.communicator.gather_objects(names)
            odd = sorted(set().union(*everywhere) - set(everywhere[0]).intersection(*everywhere))
            raise ValueError(
                f"inner_state='average' needs the same optimizer state on all workers; only some have {odd[:5]}. A parameter was "
                "unused there: use inner_state='maintain' or 'reset'."
            )
        self.averager.mean_(tensors)

    def _velocity_norm(self) -> float:
        if not isinstance(self.outer_optimizer, SlowMomentum):
            return 0.0
        return math.sqrt(sum(squared_norm(v) for v in self.outer_optimizer.velocities()))

    def _log_costs(self, compute_seconds: float, round_seconds: float) -> None:
        if self.communicator.rank or self.communicator.world_size == 1:
            return
        per_step = max(compute_seconds / self.config.sync_every, 1e-9)
        least = {u: max(1, math.ceil(u / (1 - u) * round_seconds / per_step - 1e-9)) for u in (0.9, 0.95)}
        logger.info(
            "costs: %.1f ms computation per step, %.1f ms per round, utilisation %.1f %%, %s bytes sent per round and worker. "
            "sync_every >= %d would give 90 %%, >= %d would give 95 %%.",
            1e3 * per_step,
            1e3 * round_seconds,
            100 * compute_seconds / (compute_seconds + round_seconds),
            f"{self.last_round.bytes_sent:,}" if self.last_round else "0",
            least[0.9],
            least[0.95],
        )

    # ---- looking at the average ----

    @property
    def showing_average(self) -> bool:
        """True while the average is in the parameters and the local weights are put by."""
        return self._stash is not None

    @torch.no_grad()
    def show_average(self) -> None:
        """Put the average into parameters and buffers of every rank. Collective, unless the workers agree anyway."""
        if self.showing_average:
            return
        self._look_start = time.perf_counter()
        self._random_state = RandomState.take()
        buffers = self._buffers_to_average()
        params = [] if self.workers_agree else self.tensors.trainable
        device = torch.device("cpu") if self.config.stash_device == "cpu" else None
        stashed = params + buffers[0] + buffers[1]
        self._stash = [t.detach().to(device, copy=True) if device else t.detach().clone() for t in stashed]
        self._shown = stashed
        if params:
            for bucket in self._all_buckets():
                self.averager.show_mean_(bucket)
        self.averager.mean_(buffers[0])
        self.averager.max_(buffers[1])

    def _buffers_to_average(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """(floating, integer) buffers that may differ between workers now."""
        if self.workers_agree and (self.config.model_buffers == "average" or self.attempted_steps == 0):
            return [], []
        names = sorted(set().union(*self.communicator.gather_objects(self.tensors.changed_buffers())))
        return self.tensors.buffers_named(names)

    @torch.no_grad()
    def show_local(self, *, give_back_random_state: bool = True) -> None:
        """End a look: local weights and buffers return, bit for bit, and the random generators if they have not yet."""
        if self._stash is None:
            return
        copy_tensors_(self._shown, self._stash)
        self._end_look()
        if give_back_random_state:
            self.give_back_random_state()
        self._clock_start += time.perf_counter() - self._look_start

    def give_back_random_state(self) -> None:
        """Set every random generator as it was before the look: an evaluation draws from them."""
        if self._random_state is not None:
            self._random_state.give_back()

    def keep_average(self) -> None:
        """End training on the average: what is shown stays."""
        self.show_average()
        self._end_look()
        self.give_back_random_state()

    def _end_look(self) -> None:
        self._stash, self._shown = None, []

    def _all_buckets(self) -> list[Bucket]:
        return [bucket for buckets in self._buckets for bucket in buckets]

    # ---- state ----

    def state_dict(self) -> dict[str, Any]:
        """
        Clock, anchors and outer optimizer: all that is equal on every worker at a round's end.

        Raises:
            RuntimeError: Inside a round, where workers differ and one state cannot speak for all.
        """
        self._refuse_inside_round(self.attempted_steps, "saved")
        return {
            "version": STATE_VERSION,
            "sync_every": self.config.sync_every,
            "attempted_steps": self.attempted_steps,
            "rounds": self.rounds,
            "anchors": [item.flat for item in self.anchors],
            "velocities": self.velocities,
            "outer_optimizer": self._outer_state(),
        }

    def _outer_state(self) -> dict[str, Any]:
        if isinstance(self.outer_optimizer, SlowMomentum):
            return {"previous_inner_lr": [g["previous_inner_lr"] for g in self.outer_optimizer.param_groups]}
        return self.outer_optimizer.state_dict()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """
        Take up a state of `state_dict()`; copied in place.

        Raises:
            ValueError: The state does not fit: version, sizes, or a clock inside a round.
        """
        if state_dict.get("version") != STATE_VERSION:
            raise ValueError(f"slow state has version {state_dict.get('version')!r}; this package reads {STATE_VERSION}.")
        self._refuse_inside_round(state_dict["attempted_steps"], "resumed")
        for name, own in (("anchors", [item.flat for item in self.anchors]), ("velocities", self.velocities)):
            sizes, expected = [t.numel() for t in state_dict[name]], [t.numel() for t in own]
            if sizes != expected:
                raise ValueError(f"slow state does not fit: {name} have sizes {sizes}, this run has {expected}.")
            copy_tensors_(own, state_dict[name])
        if isinstance(self.outer_optimizer, SlowMomentum):
            lrs = state_dict["outer_optimizer"]["previous_inner_lr"]
            for group, previous in zip(self.outer_optimizer.param_groups, lrs, strict=True):
                group["previous_inner_lr"] = previous
        else:
            self.outer_optimizer.load_state_dict(state_dict["outer_optimizer"])
        self.attempted_steps, self.rounds = state_dict["attempted_steps"], state_dict["rounds"]
        self._hand_back()

    def _refuse_inside_round(self, attempted_steps: int, verb: str) -> None:
        if attempted_steps % self.config.sync_every:
            raise RuntimeError(
                f"training cannot be {verb} inside a round: step {attempted_steps} is no multiple of sync_every="
                f"{self.config.sync_every}, and the workers' own weights are not in this state. Save at a multiple of sync_every."
            )


def _inner_state_policy(config: SlowMoConfig, optimizer: torch.optim.Optimizer) -> str:
    if config.inner_state == "auto":
        return "reset" if any(group.get("momentum", 0) for group in optimizer.param_groups) else "maintain"
    if config.inner_state == "reset" and isinstance(optimizer, torch.optim.Adagrad):
        raise ValueError(
            "inner_state='reset' cannot be used with Adagrad, whose state is made at construction and cannot be made again. "
            "Use inner_state='maintain' or 'average'."
        )
    return config.inner_state


def _hash48(names: list[str]) -> float:
    """48 bits of a SHA-256: exact in a float64."""
    return float(int.from_bytes(hashlib.sha256("\n".join(names).encode()).digest()[:6], "big"))
