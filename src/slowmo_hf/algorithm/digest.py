"""
A digest of a tensor's bytes: whether two tensors are equal, or one has changed, without a copy.

    words    = the memory as int32, in blocks; the tail is filled up with zeros
    S_b      = sum_i weight_i word_{b,i}                            modulo 2^64, odd weights
    digest   = bytes + sum_b mixed(S_b + b GOLDEN) + S_tail         modulo 2^64

A word of 32 bits times a weight of 64: the highest bit of a word, a float's sign, still moves 33 bits of the sum. Two
tensors that differ in one word have different digests; others that differ have the same one with a probability of
2^-32 at most, by the weights. `mixed` is the finalizer of SplitMix64 (Steele et al. 2014, https://doi.org/10.1145/2660193.2660195).
"""

from __future__ import annotations

import functools

import torch

from .layout import flat_view

BLOCK = 2**10  # words under one table of weights
# Blocks that are worked on at a time, by device type: on a CPU they and their products stay in its cache. Elsewhere
# each operation is a kernel launch. The digest is the same with any number.
BLOCKS_AT_A_TIME = {"cpu": 2**7}
_ELSEWHERE = 2**12

_BLOCK_BYTES = 4 * BLOCK
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # as int64 has it
_MIX = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64), (31, 1))


def digest(tensor: torch.Tensor) -> torch.Tensor:
    """
    Of a dense tensor's bytes, in memory order: 0.0 and -0.0 differ, and so do two NaNs. Computed on its device, by
    integers alone; the same on every device.

    Returns:
        `torch.Tensor`: int64, 0-dim, on the tensor's device.
    """
    data = flat_view(tensor).resolve_conj().resolve_neg().view(torch.uint8)
    weights = _weights(data.device)
    whole, tail_bytes = divmod(data.numel(), _BLOCK_BYTES)
    total = weights.new_full((), data.numel())
    if whole:
        total += _mixed_(_sums(data[: whole * _BLOCK_BYTES], weights)).sum()
    if tail_bytes:
        tail = data.new_zeros(_BLOCK_BYTES)
        tail[:tail_bytes] = data[whole * _BLOCK_BYTES :]
        total += _sum_(tail.view(torch.int32).to(torch.int64), weights)
    return total


def _sums(data: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Of whole blocks, and b GOLDEN."""
    sums = torch.arange(data.numel() // _BLOCK_BYTES, device=data.device) * _GOLDEN
    at_a_time = BLOCKS_AT_A_TIME.get(data.device.type, _ELSEWHERE)
    wide = weights.new_empty(min(len(sums), at_a_time), BLOCK)
    chunks = torch.split(data, at_a_time * _BLOCK_BYTES)
    for chunk, some in zip(chunks, torch.split(sums, at_a_time), strict=True):
        some += _sum_(wide[: len(some)].copy_(_words(chunk)), weights)
    return sums


def _words(data: torch.Tensor) -> torch.Tensor:
    """Block by block, as int32; a copy where they begin at an odd address, as a view into another tensor may."""
    return (data.clone() if data.storage_offset() % 4 else data).view(torch.int32).view(-1, BLOCK)


def _sum_(wide: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """sum_i weight_i word_i, of each block; `wide` is lost."""
    if wide.device.type in BLOCKS_AT_A_TIME:
        return wide @ weights
    return wide.mul_(weights).sum(-1)  # CUDA multiplies no matrices of integers


@functools.cache
def _weights(device: torch.device) -> torch.Tensor:
    return _mixed_(_GOLDEN * torch.arange(1, BLOCK + 1, device=device)) | 1


def _mixed_(words: torch.Tensor) -> torch.Tensor:
    """One-to-one on int64, in place; every bit of the result depends on all."""
    for shift, factor in _MIX:
        words ^= (words >> shift) & (2 ** (64 - shift) - 1)
        words *= factor
    return words
