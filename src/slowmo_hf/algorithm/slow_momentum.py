"""Slow momentum on the anchors: the update rule (lines 7 and 8)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

# A ratio of learning rates above which the smaller one is zero but for rounding, as at the end of a `LinearLR` to 0:
# of what its round leaves fp32 would keep no digit beside the other's steps.
_MOST = 2.0**24


@torch.no_grad()
def slow_momentum_update_(
    anchor: torch.Tensor,
    pseudo_grad: torch.Tensor,
    velocity: torch.Tensor,
    *,
    outer_lr: float,
    outer_momentum: float,
    lr_ratio: float = 1.0,
) -> None:
    r"""Lines 7 and 8 of Algorithm 1 in displacement form, in place: two passes over memory, no temporary.

    Args:
        anchor (`torch.Tensor`): $x_{t,0}$; becomes $x_{t+1,0}$.
        pseudo_grad (`torch.Tensor`): $\Delta_t = x_{t,0} - x_{t,\tau}$, same shape.
        velocity (`torch.Tensor`): $v = \gamma u$, same shape; updated.
        outer_lr (`float`): $\alpha$.
        outer_momentum (`float`): $\beta$.
        lr_ratio (`float`, *optional*, defaults to `1.0`): $\gamma_t / \gamma_{t-1}$.
    """
    torch.add(pseudo_grad, velocity, alpha=outer_momentum * lr_ratio, out=velocity)  # v_t = γ_t u_{t+1}
    anchor.sub_(velocity, alpha=outer_lr)  # x_{t+1,0}


class SlowMomentum(torch.optim.Optimizer):
    r"""
    Slow momentum on the anchors (SlowMo, https://huggingface.co/papers/1910.00643, Algorithm 1).

        v_t          = beta * (gamma_t / gamma_{t-1}) * v_{t-1} + Delta_t
        anchor_{t+1} = anchor_t - alpha * v_t

    beta is `outer_momentum`, alpha is `outer_lr`, gamma is the inner learning rate, Delta_t is the pseudo-gradient
    (anchor minus average), and v = gamma * u with u the paper's slow momentum: nothing is divided by the gamma of this
    round. Where gamma_t = 0 the paper's u has no value for Delta_t: momentum moves nothing (alpha
    gamma_t u = 0), the average is kept (anchor - alpha Delta_t), u decays by beta, and the next ratio is taken to the
    last gamma that was not 0. A gamma that has fallen below 2^-24 of that one counts as 0. Where it has risen by more
    than 2^24, after a slow fall, momentum begins afresh: v_{t-1} is rounding.

    Args:
        anchors (`Iterable[torch.Tensor]` or parameter groups): fp32 or fp64 tensors. Updated in place. A group per
            inner parameter group: its entry `inner_lr` is set before a round's calls of `update_`, one for each
            anchor; `end_round` comes behind them.
        outer_lr (`float`, *optional*, defaults to `1.0`): Step along `v`. 1.0 with `outer_momentum=0` is Local SGD.
        outer_momentum (`float`, *optional*, defaults to `0.5`): Slow momentum, in [0, 1). With 0 no velocity is kept.
    """

    def __init__(
        self,
        anchors: Iterable[torch.Tensor] | Iterable[dict[str, Any]],
        outer_lr: float = 1.0,
        outer_momentum: float = 0.5,
    ) -> None:
        defaults = {"lr": outer_lr, "outer_momentum": outer_momentum, "inner_lr": 1.0, "previous_inner_lr": 0.0}
        super().__init__(anchors, defaults)

    @torch.no_grad()
    def update_(self, anchor: torch.Tensor, pseudo_grad: torch.Tensor, group_index: int) -> torch.Tensor | None:
        """One anchor's outer step, of the group with this index. Returns its velocity, if it has one."""
        group = self.param_groups[group_index]
        outer_lr, outer_momentum = group["lr"], group["outer_momentum"]
        if outer_momentum == 0:
            anchor.sub_(pseudo_grad, alpha=outer_lr)
            return None
        if "velocity" not in self.state[anchor]:
            self.state[anchor]["velocity"] = torch.zeros_like(anchor)
        velocity: torch.Tensor = self.state[anchor]["velocity"]
        if _is_zero(group):
            velocity.mul_(outer_momentum)
            anchor.sub_(pseudo_grad, alpha=outer_lr)
            return velocity
        lr_ratio = group["inner_lr"] / group["previous_inner_lr"] if group["previous_inner_lr"] else 1.0
        if abs(lr_ratio) > _MOST:
            lr_ratio = 0.0
        slow_momentum_update_(
            anchor, pseudo_grad, velocity, outer_lr=outer_lr, outer_momentum=outer_momentum, lr_ratio=lr_ratio
        )
        return velocity

    def end_round(self) -> None:
        """
        Remember each group's inner learning rate for the next round's ratio; a zero leaves the last one in place.
        """
        for group in self.param_groups:
            if not _is_zero(group):
                group["previous_inner_lr"] = group["inner_lr"]


def _is_zero(group: dict[str, Any]) -> bool:
    return bool(abs(group["inner_lr"]) <= abs(group["previous_inner_lr"]) / _MOST)
