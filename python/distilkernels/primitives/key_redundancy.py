"""``key_redundancy``: how much each key resembles the others, without [T, T].

With k̂ = k/(|k| + 1e-8) in float32 and C = k̂k̂ᵀ with a zero diagonal over the keys that count, one column sum needs no pairs:

    Σ_i C[i, j] = k̂_j·ŝ − |k̂_j|²,   ŝ = Σ_i k̂_i                                  two passes over K, O(T·D)

R-KV also drops one entry a row i before it sums columns: the last column j with C[i, j] > threshold, or the first valid
column where there is none. Only which column that is needs pairs: a kernel scans keys from the end and stops at the first
hit. Keys that have a near neighbour somewhere late (those of real caches do) cost a few tiles each; keys without any cost
2·T²·D/2 FLOPs, and O(T) memory always. Bytes: B·H·T·D·itemsize read twice, written O(T).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import resolve
from .boundary import plain_eager

NORM_EPSILON = 1e-8


class Redundancy(NamedTuple):
    """What a kernel writes; a field that is not wanted is None. Keys that do not count have 0, and −1 for ``last``.

    ``similarity`` [B, H, T]: k̂_j·ŝ − |k̂_j|². ``last`` [B, H, T] int32: for key i, the last j ≠ i with C[i, j] > threshold, else
    the first key that counts. ``cosine`` [B, H, T]: C[i, last(i)], 0 where last(i) = i. Numbers are float32, float64 for float64.
    """

    similarity: Tensor | None = None
    last: Tensor | None = None
    cosine: Tensor | None = None


def unit_keys(keys: Tensor, counted: Tensor, dtype: torch.dtype) -> Tensor:
    """k̂, and zeros for keys that do not count, whatever those hold."""
    k = keys.to(dtype)
    return (k / (k.norm(dim=-1, keepdim=True) + NORM_EPSILON)).masked_fill(~counted[:, None, :, None], 0)


def cosine_sums(keys: Tensor, counted: Tensor, out: Tensor) -> None:
    """Writes Σ_i C[i, j] of keys [B, H, T, D] for the `counted` bool [B, T], and 0 elsewhere."""
    unit = unit_keys(keys, counted, out.dtype)
    out.copy_((unit * unit.sum(2, keepdim=True)).sum(-1) - unit.square().sum(-1))


def reference(keys: Tensor, start: Tensor, stop: Tensor, mask: Tensor | None, threshold: float, out: Redundancy) -> None:
    """Writes the fields of `out` that are not None; `last` and `cosine` come together. The pairs of it take [T, T] here.

    keys [B, H, T, D]: last stride 1, any other strides. start, stop int32 [B] contiguous, 0 ≤ start ≤ stop ≤ T; mask bool
    [B, T] contiguous or None: keys in [start, stop) with a True mask count, others may hold anything. threshold ≥ 0.
    Fields of `out` are contiguous.
    """
    position = torch.arange(keys.shape[2], device=keys.device)
    counted = (position >= start[:, None]) & (position < stop[:, None])
    counted = counted if mask is None else counted & mask
    if out.similarity is not None:
        cosine_sums(keys, counted, out.similarity)
    if out.last is None:
        return
    unit = unit_keys(keys, counted, out.cosine.dtype)
    pairs = unit @ unit.mT
    pairs.diagonal(dim1=-2, dim2=-1).zero_()
    near = (pairs > threshold) & counted[:, None, None, :]
    first = torch.where(counted, position, keys.shape[2]).amin(-1)[:, None, None]
    last = torch.where(near, position, -1).amax(-1)
    last = torch.where(last < 0, first, last).masked_fill(~counted[:, None, :], -1)
    out.last.copy_(last)
    out.cosine.copy_(pairs.gather(-1, last.clamp(min=0)[..., None])[..., 0].masked_fill(last < 0, 0))


def launched(keys: Tensor, start, stop, mask, threshold: float, sums: bool, neighbours: bool, backend: str | None) -> Redundancy:
    """:func:`redundancy` without the registered op."""
    launch = resolve("key_redundancy", keys, backend=backend)
    out = _allocate(keys, sums, neighbours)
    if keys.numel():
        launch(keys, start, stop, mask, threshold, out)
    return out


def _allocate(keys: Tensor, sums: bool, neighbours: bool) -> Redundancy:
    dtype = torch.float64 if keys.dtype == torch.float64 else torch.float32
    make = lambda dtype: torch.empty(keys.shape[:3], dtype=dtype, device=keys.device)
    return Redundancy(make(dtype) if sums else None, make(torch.int32) if neighbours else None, make(dtype) if neighbours else None)


@torch.library.custom_op("distilkernels::key_redundancy", mutates_args=())
def _op(
    keys: Tensor, start: Tensor, stop: Tensor, mask: Tensor | None, threshold: float, sums: bool, neighbours: bool, backend: str | None
) -> list[Tensor]:
    return [t for t in launched(keys, start, stop, mask, threshold, sums, neighbours, backend) if t is not None]


@_op.register_fake
def _(keys, start, stop, mask, threshold, sums, neighbours, backend):
    return [t for t in _allocate(keys, sums, neighbours) if t is not None]


def redundancy(
    keys: Tensor, start: Tensor, stop: Tensor, mask: Tensor | None, *, threshold: float = 0.5, sums: bool = True, neighbours: bool = False,
    backend: str | None = None,
) -> Redundancy:  # fmt: skip
    """The raw sums and last neighbours of keys [B, H, T, D]; arguments as in :func:`reference`, already checked. Outside any graph."""
    keys = keys.detach()
    # the cosine of two equal keys is 1 up to its rounding, which must not decide
    threshold = threshold if threshold < 1 else 2.0
    if plain_eager(keys):
        return launched(keys, start, stop, mask, threshold, sums, neighbours, backend)
    found = iter(_op(keys, start, stop, mask, threshold, sums, neighbours, backend))
    return Redundancy(next(found) if sums else None, *([next(found), next(found)] if neighbours else []))


def column_means(found: Redundancy, count: Tensor) -> Tensor:
    """R-KV's mean_i C[i, j] after the entry (i, last(i)) of each row is zeroed; `count` [B] keys count.

    Sums what is dropped in 64-bit fixed point (2⁻⁴⁰ a unit): an integer sum is the same in any order, a float one is not.
    """
    units = (found.cosine.double() * 2.0**40).round().long()
    dropped = torch.zeros_like(units).scatter_add_(-1, found.last.clamp(min=0).long(), units)
    sums = found.similarity.double() - dropped.double() * 2.0**-40
    return (sums / count.clamp(min=1)[:, None, None]).to(found.similarity.dtype)
