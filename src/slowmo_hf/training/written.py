"""What a program writes into a model between a load and the first pass: it stays, though workers' own come later."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from ..dtensors import local
from ..upstream import non_persistent_buffers
from .digests import digests, parts_of


class WrittenSince:
    """
    Knows, from now on, what has been written. Reads all of it, now and when it is asked.

    Args:
        models (`Iterable[torch.nn.Module]`): Their parameters, and the buffers that a load brings: persistent ones.
        params (`Iterable[torch.Tensor]`): Others'.
    """

    def __init__(self, models: Iterable[torch.nn.Module], params: Iterable[torch.Tensor] = ()) -> None:
        tensors = [*params]
        for model in models:
            own = non_persistent_buffers(model)
            tensors += [*model.parameters(), *(buffer for name, buffer in model.named_buffers() if name not in own)]
        self._tensors = list({id(tensor): tensor for tensor in tensors}.values())
        self._forms = [_form(tensor) for tensor in self._tensors]
        self._digests = self._now()

    def _now(self) -> list[list[int]]:
        return digests([parts_of(tensor) for tensor in self._tensors])

    def keep(self) -> Callable[[], bool]:
        """
        To be called where all ranks have rank 0's values, before each one's own are loaded.

        Returns:
            `Callable`: To be called behind that: gives back what had been written, and says whether there was any.
        """
        found = zip(self._tensors, self._forms, self._digests, self._now(), strict=True)
        # Of another form: the program has made it anew, and what is loaded must fit it.
        written = [tensor for tensor, form, was, now in found if was != now and form == _form(tensor)]
        values = [local(tensor).detach().clone() for tensor in written]

        @torch.no_grad()
        def give_back() -> bool:
            for tensor, value in zip(written, values, strict=True):
                local(tensor).copy_(value)
            return bool(written)

        return give_back


def _form(tensor: torch.Tensor) -> tuple[object, ...]:
    own = local(tensor)
    return own.shape, own.dtype, own.device
