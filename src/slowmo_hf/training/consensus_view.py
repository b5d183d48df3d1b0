"""The consensus view: one model of all workers in the parameters, and the local weights back, bit for bit."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch

from ..dtensors import let_reads_end, local
from ..random_state import RandomState
from .account import Account
from .digests import digests_of
from .model_tensors import copy_tensors_


class ConsensusView:
    """
    Parameters and buffers that show the average, or the last round's model, for a while. There is no outer update in
    it: local weights come back as they were, random generators too where it shows the average, and no report counts
    its seconds.

    Args:
        account (`Account`): Of the rounds.
        stash_device (`str`): Where local values wait: `"same"` as they are on, or `"cpu"`.
        swapping (`Callable`): `ModelTensors.swapping`: around writes of other values into the parameters.
    """

    def __init__(
        self, account: Account, stash_device: str, swapping: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self._account, self._swapping = account, swapping
        self._device = torch.device("cpu") if stash_device == "cpu" else None
        self._shown: list[torch.Tensor] = []
        self._stash: list[torch.Tensor] | None = None
        self._random_state: RandomState | None = None
        self._noted: weakref.ref[ConsensusView] | None = None
        self._paused = ExitStack()
        self._watched: list[torch.Tensor] = []
        # Of these, where the program may write into them: each one's that it has not written.
        self._digests: list[list[list[int]]] | None = None
        self._written_by_passes: set[int] = set()  # by identity: no write of the program's
        self.is_of_last_round = False  # `model.eval()` has asked for it; anything else that wants a view ends it
        self.writes_kept = 0  # parameters that the program wrote into the last view, and that stayed

    @property
    def is_shown(self) -> bool:
        """True while one model of all is in the parameters and the local weights are put by."""
        return self._stash is not None

    def begin(self) -> None:
        """From here to `restore` or `keep` no report counts the seconds, the wait for all ranks among them."""
        self._paused.enter_context(self._account.paused())

    def show(
        self, tensors: list[torch.Tensor], write_: Callable[[], None], *, keeps_random_state: bool = True
    ) -> None:
        """
        Put the local values by, and have others written in their place. Of what another view shows meanwhile (two
        optimizers of one model share its buffers) the local value is the one that the other has put by: views may end
        in any order.

        Args:
            tensors (`list[torch.Tensor]`): What differs between workers: parameters and buffers.
            write_ (`Callable`): Writes what all have into them. If it fails, `restore` is the caller's.
            keeps_random_state (`bool`): Whether the random generators are put by too.
        """
        self._random_state = RandomState.take() if keeps_random_state else None
        with self._swapping() if tensors else nullcontext():
            self._put_others(tensors, write_)

    def _put_others(self, tensors: list[torch.Tensor], write_: Callable[[], None]) -> None:
        put_by = {id(t): stashed for view in _open_views() for t, stashed in view._unwritten()}
        own = [put_by[id(t)] if id(t) in put_by else local(t).detach() for t in tensors]
        self._stash = [t.to(self._device, copy=True) if self._device else t.clone() for t in own]
        self._shown = tensors
        self._noted = weakref.ref(self, _open.remove)
        _open.append(self._noted)
        if tensors:
            let_reads_end(tensors)
            write_()

    def restore(self, *, give_back_random_state: bool = True) -> None:
        """
        End the view: local values return, but for what `keep_writes` says; and the random generators if they have not
        yet.
        """
        if self._stash is not None:
            let_reads_end(self._shown)
            with self._swapping() if self._shown else nullcontext():
                unwritten = self._unwritten()
                returns = [shown for shown, _ in unwritten]
                self.writes_kept = sum(t.requires_grad for t in self._shown) - sum(t.requires_grad for t in returns)
                copy_tensors_(returns, [stashed for _, stashed in unwritten])
            self._end()
            if give_back_random_state:
                self.give_back_random_state()
        self._paused.close()

    def keep(self) -> None:
        """End the view; what is shown stays."""
        self._end()
        self.give_back_random_state()
        self._paused.close()

    def keep_writes(self, by_passes: Iterable[torch.Tensor], others: Sequence[torch.Tensor] = ()) -> None:
        """
        From here on a tensor of the view that the program writes into stays as written when the view ends.

        Args:
            by_passes (`Iterable[torch.Tensor]`): What forward passes write too: where nothing else is written, local
                values return there.
            others (`Sequence[torch.Tensor]`): No part of the view, but looked at for `changes`.
        """
        if self._digests is None:
            self._written_by_passes = {id(tensor) for tensor in by_passes}
            self._watched = [*self._shown, *others]
            self._digests = [[digest] for digest in digests_of(self._watched)]

    def passes(self) -> Callable[[], list[torch.Tensor]]:
        """
        Evaluation passes begin. What they write (a layer that bounds its own weights) is no write of the program's,
        but for tensors that it has written already.

        Returns:
            `Callable`: Called where they end: the tensors that they have written.
        """
        watched, known = self._watched, self._digests
        if known is None:
            return list
        before = digests_of(self._watched)

        def end() -> list[torch.Tensor]:
            if self._digests is not known:  # the view has ended in them
                return []
            written = []
            for tensor, unwritten, was, now in zip(watched, known, before, digests_of(self._watched), strict=True):
                if was != now and was in unwritten:
                    unwritten.append(now)
                    written.append(tensor)
            return written

        return end

    @property
    def keeps_writes(self) -> bool:
        """Whether it does."""
        return self._digests is not None

    def changes(self) -> tuple[bool, bool]:
        """
        Whether the program has written into what is shown, or the others, and not put it back; and whether anything is
        another than when `keep_writes` was called, also by passes. Reads all of it.
        """
        if self._digests is None:
            return False, False
        now = digests_of(self._watched)
        return any(self._writes(now)), any(was[0] != digest for was, digest in zip(self._digests, now, strict=True))

    def written(self, among: Sequence[torch.Tensor]) -> list[int]:
        """Places of those that are shown and that the program has written into. Reads all that is watched."""
        if self._digests is None:
            return []
        writes = zip(self._watched, self._writes(digests_of(self._watched)), strict=True)
        found = {id(tensor) for tensor, is_written in writes if is_written}
        return [place for place, tensor in enumerate(among) if id(tensor) in found]

    def _writes(self, now: list[list[int]]) -> list[bool]:
        """
        Whether the program has written into each of the watched, by their digests. What passes write too counts where
        it has written into something else as well.
        """
        changed = [digest not in known for known, digest in zip(self._digests or [], now, strict=True)]
        by_passes = [id(tensor) in self._written_by_passes for tensor in self._watched]
        is_written = any(is_so and not excused for is_so, excused in zip(changed, by_passes, strict=True))
        return [is_so and is_written for is_so in changed]

    def give_back_random_state(self) -> None:
        """Set every random generator as it was before the view: an evaluation draws from them."""
        if self._random_state is not None:
            self._random_state.give_back()

    def local_values(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """What this process has of a parameter, or a buffer, also while the average is shown in its place."""
        stash = {id(shown): stashed for shown, stashed in self._unwritten()}
        return lambda tensor: stash[id(tensor)] if id(tensor) in stash else local(tensor)

    def _unwritten(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """What is shown, and its local values, but for what the program has written and keeps."""
        if self._digests is None:
            return self._put_by()
        writes = self._writes(digests_of(self._watched))
        return [pair for pair, written in zip(self._put_by(), writes, strict=False) if not written]

    def _put_by(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return list(zip(self._shown, self._stash or [], strict=False))

    def _end(self) -> None:
        self._stash, self._shown, self._watched, self._digests = None, [], [], None
        self.is_of_last_round = False
        if self._noted is not None:
            _open.remove(self._noted)
            self._noted = None


_open: list[weakref.ref[ConsensusView]] = []


def _open_views() -> list[ConsensusView]:
    """All that are shown now, of all optimizers of this process."""
    return [view for reference in tuple(_open) if (view := reference()) is not None]
