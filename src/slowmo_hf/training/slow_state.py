"""The slow state: anchors, velocities, and what else the outer update remembers from round to round."""

from __future__ import annotations

import torch

from ..algorithm.codec import Code
from ..algorithm.layout import Bucket, FlatAnchor, Piece, flat_anchors
from ..algorithm.outer_update import OuterUpdate, make_outer_update
from ..config import SlowMoConfig
from ..contents import Contents, Restored, Saved
from ..names import CODES, find
from ..wire.averages import Averages
from ..wire.error_feedback import ErrorFeedback
from ..wire.reduction import AllReduce, Reduction, bytes_per_message
from ..wire.sharding import MESSAGES_AT_ONCE, Shards
from ..wire.two_stage import TwoStage, TwoStageAtOwners
from ..wire.workers import Workers
from .account import Account


class SlowState:
    """
    What one process has of it, and how rounds and views reach it: of the part of the model that it speaks for.

    Args:
        config (`SlowMoConfig`): The settings.
        workers (`Workers`): Who is there.
        layouts (`list[FlatAnchor]`): That part's, whole.
        groups (`int`): Inner parameter groups.
        account (`Account`): Of the rounds.

    Attributes:
        averages (`Averages`): Between workers.
        anchors (`list[FlatAnchor]`): This worker's, whole or its shards.
        buckets (`list[Bucket]`): What it updates; `pieces` are theirs, `whole_pieces` are all parameters'.
        exact (`Reduction`): For views; `reduction` for rounds.
        update (`OuterUpdate`): Lines 7 and 8.
    """

    def __init__(
        self, config: SlowMoConfig, workers: Workers, layouts: list[FlatAnchor], groups: int, account: Account
    ) -> None:
        self.layouts = layouts
        self._account, self._is_shared = account, config.exact_average
        share = MESSAGES_AT_ONCE if config.shard_slow_state else 2
        self.averages = Averages(workers.between, config.bucket_bytes // share)
        self._shards: Shards | None = None
        self.anchors, self.buckets, self.exact, self.reduction = self._make(config)
        buffers = self.averages.pool.take()  # now, so that a round allocates nothing
        for made in (self.exact, self.reduction):
            made.reserve(buffers)
        self.averages.pool.give(buffers)
        self.pieces = _pieces(self.buckets)
        self.whole_pieces = _pieces(self._shards.buckets) if self._shards else self.pieces
        self.update: OuterUpdate = make_outer_update(config, self.anchors, self.pieces, groups)

    def _make(self, config: SlowMoConfig) -> tuple[list[FlatAnchor], list[Bucket], Reduction, Reduction]:
        averages, ahead = self.averages, bool(config.overlap_steps)
        if config.shard_slow_state:
            self._shards = Shards(averages, self.layouts, config.bucket_bytes, config.slow_state_device, ahead=ahead)
            over_owners = TwoStageAtOwners(averages, self._shards, ahead=ahead)
            return self._shards.anchors, self._shards.own_buckets, over_owners, over_owners
        anchors = flat_anchors(self.layouts)
        buckets = [
            bucket
            for item in anchors
            for bucket in item.buckets(bytes_per_message(item, config.bucket_bytes, ahead=ahead))
        ]
        # Alone, a worker sends nothing and quantises nothing.
        if config.compression == "none" or averages.communicator.world_size == 1:
            exact = AllReduce(averages, buckets, own_memory=ahead)
            return anchors, buckets, exact, exact
        code: Code = find(CODES[config.compression])()
        in_few_bytes = TwoStage(averages, ErrorFeedback(averages, buckets, code), ahead=ahead)
        return anchors, buckets, AllReduce(averages, buckets, own_memory=False), in_few_bytes

    @property
    def items(self) -> list[FlatAnchor]:
        """What `whole_pieces` lie in."""
        return self.layouts if self._shards else self.anchors

    # ---- state ----

    def saved(self, *, agree: bool, keep: bool) -> Saved:
        """As `Part.saved`, whole. Collective in a column with `shard_slow_state`; no report counts it."""
        keep = keep or not self._is_shared
        states = [*(item.flat for item in self.anchors), *self.update.velocities]
        if self._shards:
            with self._account.apart():
                states = self._shards.gather(states, keep=keep)
        names = [f"{kind}.{index}" for kind in ("anchor", "velocity") for index in range(len(self.anchors))]
        whole = Contents(tensors=dict(zip(names, states, strict=False)))  # without momentum there are no velocities
        whole.add(self.update.saved())
        return Saved(whole) if self._is_shared else Saved(own=whole)

    def restore(self, saved: Saved, *, same_number: bool) -> Restored:
        """As `Part.restore`: of the whole this worker's part."""
        contents = saved.shared if self._is_shared else saved.own
        anchors = [layout.of_checkpoint(contents, f"anchor.{index}") for index, layout in enumerate(self.layouts)]
        # A run that had no momentum may have no velocity: it starts at 0.
        had_momentum = saved.shared.settings.get("config", {}).get("outer_momentum") != 0
        starts_at_0 = "velocity.0" not in contents.tensors and not had_momentum
        velocities = [
            torch.zeros((), dtype=layout.flat.dtype).expand(layout.flat.shape)
            if starts_at_0
            else layout.of_checkpoint(contents, f"velocity.{index}")
            for index, layout in enumerate(self.layouts[: len(self.update.velocities)])
        ]
        take_up_update = self.update.restore(contents)

        def take_up() -> None:
            self._take_own_([item.flat for item in self.anchors], anchors)
            self._take_own_(self.update.velocities, velocities)
            take_up_update()

        return take_up

    def whole_anchors(self, contents: Contents) -> dict[FlatAnchor, torch.Tensor]:
        """Those of a checkpoint that `restore` has checked, by layout."""
        return {layout: layout.of_checkpoint(contents, f"anchor.{index}") for index, layout in enumerate(self.layouts)}

    def are_parameters(self, contents: Contents) -> bool:
        """Whether this process's part of the model is what is about to be saved, as a round leaves it."""
        anchors = [contents.tensors[f"anchor.{index}"] for index in range(len(self.layouts))]
        runs = (run for layout, whole in zip(self.layouts, anchors, strict=True) for run in layout.runs(whole))
        return all(torch.equal(span.values(), run.to(span.values())) for span, run in runs)

    def give_parameters_(self, contents: Contents) -> None:
        """Start from a checkpoint's anchors, each process with its part: the model's own file may lack some."""
        for layout, whole in self.whole_anchors(contents).items():
            for span, run in layout.runs(whole):
                span.values().copy_(run)

    def _take_own_(self, states: list[torch.Tensor], wholes: list[torch.Tensor]) -> None:
        if self._shards:
            self._shards.take_own_(states, wholes)
            return
        for state, whole in zip(states, wholes, strict=True):
            state.copy_(whole)


def _pieces(buckets: list[Bucket]) -> list[Piece]:
    return [piece for bucket in buckets for piece in bucket.pieces]
