"""Philox4x32-10: counter-based random numbers, the same on every backend (Salmon et al., SC 2011).

A draw is a function of its request's 64-bit seed (the key) and of four 32-bit counter words that say what the draw is
for, so nothing depends on batch order, padding, chunking or which backend ran. The C++, CUDA and Triton kernels hold
the same generator; this is the one they are tested against, itself held to the published known answers.
"""

from __future__ import annotations

import numbers
from enum import IntEnum

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


class Stream(IntEnum):
    """The last counter word: what a number is for, so that no two uses share noise."""

    DRAFT = 0
    ACCEPTANCE = 1
    RETRY_COIN = 2
    RETRY_DRAW = 3
    FALLBACK = 4  # also residual and bonus draws
    GATE = 5
    CAPTURE = 6


def philox(seeds: Tensor, counter: tuple[Tensor | int, Tensor | int, Tensor | int, Tensor | int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words in [0, 2³²) as int64, of int64 `seeds` and four counter words, broadcast together."""
    key = [seeds & _LOW, (seeds >> 32) & _LOW]
    # a number is written by a kernel: copied from the host, it would wait for the device
    words = (c if isinstance(c, Tensor) else torch.full((), c, dtype=torch.int64, device=seeds.device) for c in counter)
    c0, c1, c2, c3 = torch.broadcast_tensors(*(c & _LOW for c in words))
    for _ in range(10):
        # int64 products wrap modulo 2⁶⁴; the mask undoes the sign of the shift
        low = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        high = [(p >> 32) & _LOW for p in low]
        c0, c1, c2, c3 = high[1] ^ c1 ^ key[0], low[1] & _LOW, high[0] ^ c3 ^ key[1], low[0] & _LOW
        key = [(k + w) & _LOW for k, w in zip(key, _WEYL)]
    return c0, c1, c2, c3


def uniform53(high: Tensor, low: Tensor) -> Tensor:
    """(⌊(2³²·high + low)/2¹¹⌋ + ½)·2⁻⁵³, float64: exact for an inverse CDF, where 2⁻³² would skew flat rows; never 0, at most 1 − 2⁻⁵³."""
    bits = (high << 21) | (low >> 11)
    return ((bits.double() + 0.5) * 2.0**-53).clamp_(max=1 - 2.0**-53)


def checked_per_row(name: str, value, lead: tuple[int, ...], device: torch.device) -> Tensor:
    """An int or an int64 tensor [...] as a contiguous int64 [N]; errors name the argument."""
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        if not -(2**63) <= value < 2**64:
            raise ValueError(f"{name} must fit 64 bits; got {value}")
        value = int(value)
        value = torch.full((), value - 2**64 if value >= 2**63 else value, dtype=torch.int64, device=device).expand(lead)
    if not isinstance(value, Tensor) or value.dtype != torch.int64:
        raise TypeError(f"{name} must be an int or an int64 tensor; got {value.dtype if isinstance(value, Tensor) else type(value).__name__}")
    if tuple(value.shape) != tuple(lead):
        raise ValueError(f"{name} must have the token shape {tuple(lead)}; got {tuple(value.shape)}")
    if value.device != device:
        raise ValueError(f"{name} must be on {device}, where the logits are; got {value.device}")
    return value.reshape(-1).contiguous()
