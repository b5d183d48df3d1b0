"""Codes: what the numbers of a round travel in. One is a class, here or elsewhere, and a row of `names.CODES`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import repeat

import torch

from .layout import CACHED_ELEMENTS

# Elements with one scale. An outlier makes its own block coarse, so a small one is finer; a scale in 256 costs 1.6 %
# of an int8 message.
BLOCK = 256
_MOST_TEMPORARY = 2**24  # elements that quantisation works on at a time where memory has no cache to fit


class Code(ABC):
    """
    One way to round. A message is scales, if the code has them, then codes, in bytes. One of zero bytes must say 0.

    Attributes:
        dtype (`torch.dtype`): Of a code, one for each element.
        has_scales (`bool`): Whether every block of `BLOCK` elements has a scale, in the dtype of the values.
    """

    dtype: torch.dtype
    has_scales: bool

    @abstractmethod
    def quantise(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Round to codes and scales.

        Args:
            values (`torch.Tensor`): Flat, fp32 or fp64, a multiple of `BLOCK`.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: Codes, and scales in the dtype of `values` (none: an empty tensor).
        """

    @abstractmethod
    def dequantise(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """The values that codes stand for, in the dtype of `scales`."""

    def message_bytes(self, elements: int, wide: torch.dtype) -> int:
        """Size of the message of a shard, a multiple of 8 so that the next one is aligned too."""
        return -(-(self._scale_bytes(elements, wide) + elements * self.dtype.itemsize) // 8) * 8

    def encode_(self, values: torch.Tensor, message: torch.Tensor) -> None:
        """Quantise into `message`; in `values` stays the error, what the message does not say."""
        for part, codes, scales in self._parts(values, message):
            new_codes, new_scales = self.quantise(part)
            codes.copy_(new_codes)
            scales.copy_(new_scales)
            part.sub_(self.dequantise(new_codes, new_scales))

    def decode_(self, message: torch.Tensor, out: torch.Tensor, *, add: bool = False) -> None:
        """Write what `message` says into `out`, or add it there."""
        for part, codes, scales in self._parts(out, message):
            values = self.dequantise(codes, scales)
            part.add_(values) if add else part.copy_(values)

    def _scale_bytes(self, elements: int, wide: torch.dtype) -> int:
        return elements // BLOCK * wide.itemsize if self.has_scales else 0

    def _parts(
        self, values: torch.Tensor, message: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Values with the views of their codes and scales, in runs that stay in a processor's cache."""
        end = self._scale_bytes(values.numel(), values.dtype)
        scales = message[:end].view(values.dtype)
        codes = message[end : end + values.numel() * self.dtype.itemsize].view(self.dtype)
        step = CACHED_ELEMENTS.get(values.device.type, _MOST_TEMPORARY)
        of_blocks = torch.split(scales, step // BLOCK) if self.has_scales else repeat(scales)
        return zip(torch.split(values, step), torch.split(codes, step), of_blocks, strict=False)


class Int8(Code):
    """
    Per block scale = max |x| / 127 and code = x / scale, to the nearest, ties to even: |x - code scale| <= scale / 2.
    """

    dtype, has_scales = torch.int8, True

    def quantise(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Code.quantise`."""
        blocks = values.view(-1, BLOCK)
        # A product, not a quotient by a number, which CUDA rounds otherwise than a CPU. The smallest normal number
        # stands in for 0 and for denormals, which are too coarse for a scale: what is below half of it becomes 0.
        scales = blocks.abs().amax(1).mul_(1 / 127).clamp_(min=torch.finfo(values.dtype).tiny)
        return (blocks / scales[:, None]).round_().clamp_(-127, 127).to(self.dtype).view(-1), scales

    def dequantise(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """As `Code.dequantise`."""
        return codes.to(scales.dtype).view(-1, BLOCK).mul_(scales[:, None]).view(-1)


class BFloat16(Code):
    """To the nearest, ties to even; no scales."""

    dtype, has_scales = torch.bfloat16, False

    def quantise(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Code.quantise`."""
        return values.to(self.dtype), values.new_empty(0)

    def dequantise(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """As `Code.dequantise`."""
        return codes.to(scales.dtype)
