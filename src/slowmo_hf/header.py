"""The header of a round: a small message that finds a difference between workers before anything is mixed."""

from __future__ import annotations

from dataclasses import dataclass

from .communicator import Communicator
from .log import logger
from .model_tensors import hash48


@dataclass(frozen=True)
class Header:
    """
    What a worker says before a round, in fp64: [step, problem?, changed buffers, *inner_lrs].

    Args:
        attempted_steps (`int`): Its clock.
        inner_lrs (`list[float]`): The learning rate in force at its last inner step, per parameter group.
        changed_buffers (`list[str]`): Names of the buffers that have changed here since the start.
        problem (`str`): Why it cannot take part; empty where it can.
    """

    attempted_steps: int
    inner_lrs: list[float]
    changed_buffers: list[str]
    problem: str

    def agree(self, between: Communicator) -> tuple[list[float], list[str]]:
        """
        Exchange headers.

        Returns:
            `tuple[list[float], list[str]]`: The learning rates and the changed buffers that all workers go on with: the largest, all.

        Raises:
            ValueError: A worker has a problem.
            RuntimeError: The clocks differ. Both are the same on every worker.
        """
        mine = [float(self.attempted_steps), float(bool(self.problem)), hash48(self.changed_buffers)]
        rows = between.gather_header([*mine, *self.inner_lrs])
        steps, problems, buffers, lrs = rows[:, 0], rows[:, 1], rows[:, 2], rows[:, 3:]
        if problems.any():
            words = between.gather_objects(self.problem)
            raise ValueError("; ".join(f"worker {worker}: {word}" for worker, word in enumerate(words) if word))
        if (steps != steps[0]).any():
            at = ", ".join(f"rank {rank} at step {int(step)}" for rank, step in zip(between.ranks, steps, strict=True))
            raise RuntimeError(
                f"workers met for a round at different optimizer steps: {at}. Every rank must take the same number of steps: "
                "give all ranks equally many batches (even_batches=True)."
            )
        if (lrs != lrs[0]).any():
            logger.warning(
                "step %d: inner learning rates differ between workers (%s); the largest is used. A step skipped on one rank does this.",
                self.attempted_steps,
                lrs.tolist(),
            )
        changed = self.changed_buffers
        if (buffers != buffers[0]).any():
            changed = sorted(set().union(*between.gather_objects(changed)))
        agreed: list[float] = lrs.amax(dim=0).tolist()
        return agreed, changed
