"""Published ways to keep few entries of a cache, each a few lines on the same parts: score, select, gather."""

from __future__ import annotations

import inspect
import numbers
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..primitives.key_redundancy import Redundancy, column_means, redundancy
from ..primitives.window_importance import score_dtype
from .lazy import RecurrenceTracker, check_h2
from .scores import (
    Span,
    check_lse,
    check_queries,
    check_threshold,
    checked_keys,
    checked_mask,
    checked_span,
    counted,
    key_redundancy,
    scored,
    softmax_over,
    unique_scores,
    window_importance,
)
from .select import KVSelection, Rope, gather, select


class Recent(NamedTuple):
    """Queries [B, Hq, W, D] of some last tokens, which of those are real (bool [B, W]), and their lse [B, Hq, W] or None."""

    queries: Tensor
    real: Tensor
    lse: Tensor | None


class Cached(NamedTuple):
    """What a method scores: `queries` [B, Hq, W, D] or None, `keys` [B, Hkv, T, D], which of those count, and options."""

    queries: Tensor | None
    keys: Tensor
    start: Tensor
    stop: Tensor
    mask: Tensor | None = None
    query_mask: Tensor | None = None
    scale: float | None = None
    lse: Tensor | None = None
    backend: str | None = None

    @property
    def span(self) -> tuple[Tensor, Tensor]:
        return self.start, self.stop

    @property
    def counted(self) -> Tensor:
        """bool [B, T]."""
        return counted(self.keys, self.span, self.mask)

    def recent(self, window: int) -> Recent:
        """What belongs to each request's last `window` tokens."""
        queries, length = _needed(self.queries), self.keys.shape[2]
        width = min(window, queries.shape[2])
        place = (self.stop - width)[:, None] + torch.arange(width, device=self.keys.device)
        real = place >= self.start[:, None]
        place = place.clamp(0, max(length - 1, 0)).long()
        if self.mask is not None and length:
            real = real & self.mask.gather(1, place)
        if queries.shape[2] != length:
            last = slice(queries.shape[2] - width, None)
            real = real if self.query_mask is None else real & self.query_mask[:, last]
            return Recent(queries[:, :, last], real, None if self.lse is None else self.lse[:, :, last])
        if self.query_mask is not None:
            real = real & self.query_mask.gather(1, place)
        place = place[:, None].expand(-1, queries.shape[1], -1)
        lse = None if self.lse is None else self.lse.gather(2, place)
        return Recent(queries.gather(2, place[..., None].expand(*place.shape, queries.shape[3])), real, lse)


def _needed(queries: Tensor | None) -> Tensor:
    if queries is None:
        raise ValueError("queries are needed by this method; got None")
    return queries


@dataclass(frozen=True)
class KaVa:
    """S = λ·I + (1 − λ)·R on the span, the chain of thought (arXiv 2510.02312).

    I is :func:`window_importance` of the answer's queries with the softmax over the span, R :func:`key_redundancy` "kava" there.
    While streaming in a cache the queries are the last `window` generated.
    """

    lam: float = 0.1
    group_reduce: str = "max_probs"
    pad_in_softmax: bool = False
    window: int = 8
    protected: ClassVar[int] = 0

    def __post_init__(self):
        _fraction("lam", self.lam)
        _window(self.window)

    def scores(self, cached: Cached) -> Tensor:
        if self.lam > 0:
            found, sums = scored(
                _needed(cached.queries), cached.keys, span=cached.span, mask=cached.mask, query_mask=cached.query_mask, scale=cached.scale,
                group_reduce=self.group_reduce, window_reduce="mean", pool=None, causal_window=False, lse=None,
                similarity_span=cached.span if self.lam < 1 else None, backend=cached.backend,
            )  # fmt: skip
            if self.lam == 1:
                return found
            denominator = counted(cached.keys, cached.span, None) if self.pad_in_softmax else None
            return self.lam * found + (1 - self.lam) * unique_scores(sums, cached.counted, denominator)
        return key_redundancy(cached.keys, span=cached.span, mask=cached.mask, pad_in_softmax=self.pad_in_softmax, backend=cached.backend)


@dataclass(frozen=True)
class CosineOnly(KaVa):
    """KaVa's ablation λ = 0: what is least like the rest. Needs no queries."""

    lam: float = 0.0


@dataclass(frozen=True)
class AttentionOnly(KaVa):
    """KaVa's ablation λ = 1: what the queries look at."""

    lam: float = 1.0


@dataclass(frozen=True)
class Crop:
    """KaVa's ablation: the first entries of the span, as they come."""

    protected: ClassVar[int] = 0
    window: ClassVar[int] = 0

    def scores(self, cached: Cached) -> Tensor:
        b, heads, length, _ = cached.keys.shape
        return -torch.arange(length, dtype=torch.float32, device=cached.keys.device).expand(b, heads, length)


@dataclass(frozen=True)
class RKV:
    """Z = λ·A − (1 − λ)·ρ, and the last W entries always (R-KV, its default λ 0.1, in places 0.07).

    A is the attention of the last W queries to what came before them, its softmax over that alone, max-pooled; ρ is
    :func:`key_redundancy` "rkv" of all entries.
    """

    lam: float = 0.1
    window: int = 8
    pool: int | None = 7
    group_reduce: str = "max_logits"
    threshold: float = 0.5

    def __post_init__(self):
        _fraction("lam", self.lam)
        _window(self.window)
        check_threshold(self.threshold)

    @property
    def protected(self) -> int:
        return self.window

    def scores(self, cached: Cached) -> Tensor:
        queries, real, _ = cached.recent(self.window)
        before = torch.maximum(cached.stop - self.window, cached.start)
        attention, sums = scored(
            queries, cached.keys, span=(cached.start, before), mask=cached.mask, query_mask=real, scale=cached.scale,
            group_reduce=self.group_reduce, window_reduce="mean", pool=None if self.pool is None else ("max", self.pool),
            causal_window=False, lse=None, similarity_span=cached.span, backend=cached.backend,
        )  # fmt: skip
        near = redundancy(cached.keys, *cached.span, cached.mask, threshold=self.threshold, sums=False, neighbours=True, backend=cached.backend)
        inside = cached.counted
        rho = softmax_over(column_means(Redundancy(sums, near.last, near.cosine), inside.sum(-1)), inside)
        return self.lam * attention - (1 - self.lam) * rho


@dataclass(frozen=True)
class SnapKV:
    """The attention of the last W queries, its causal softmax over all entries, average-pooled before the window; the last W always.

    group_reduce="mean_probs" is what kvpress does for grouped queries; the original has one cache a query head. Sums and
    means over the window keep the same entries.
    """

    window: int = 32
    pool: int | None = 5
    group_reduce: str = "mean_probs"

    def __post_init__(self):
        _window(self.window)

    @property
    def protected(self) -> int:
        return self.window

    def scores(self, cached: Cached) -> Tensor:
        recent = cached.recent(self.window)
        options = {
            "query_mask": recent.real, "scale": cached.scale, "group_reduce": self.group_reduce, "window_reduce": "sum",
            "pool": None if self.pool is None else ("avg", self.pool), "causal_window": True, "backend": cached.backend,
        }  # fmt: skip
        if recent.lse is not None:
            # the span is then everything up to the last real token; as a mask it says the same
            return window_importance(recent.queries, cached.keys, mask=cached.counted, lse=recent.lse, **options)
        return window_importance(recent.queries, cached.keys, span=cached.span, mask=cached.mask, **options)


@dataclass(frozen=True)
class LazyEviction:
    """Recurring attention (arXiv 2506.15969): :class:`RecurrenceTracker`'s score, and the last W entries always.

    On its own it replays the causal attention of the given queries step by step; a cache keeps a tracker and evicts every
    `window` steps.
    """

    alpha: float = 5e-4
    window: int = 32
    h2: str = "minus_one"

    def __post_init__(self):
        _window(self.window)
        check_h2(self.h2)

    @property
    def protected(self) -> int:
        return self.window

    def tracker(self, num_heads: int, backend: str | None = None) -> RecurrenceTracker:
        return RecurrenceTracker(alpha=self.alpha, num_heads=num_heads, h2=self.h2, backend=backend)

    def scores(self, cached: Cached) -> Tensor:
        keys, (b, heads, length, dim) = cached.keys, cached.keys.shape
        queries, real, _ = cached.recent(length)
        dtype = score_dtype(keys)
        tracker = self.tracker(heads, cached.backend)
        position = torch.arange(length, device=keys.device)
        # steps count back from each request's last token, so that all requests are at step T − 1 together
        tracker.append((position + (length - cached.stop)[:, None])[:, None].expand(b, heads, length))
        scale = dim**-0.5 if cached.scale is None else cached.scale
        width = queries.shape[2]
        for first in range(0, width, 32):  # rows of attention at a time: [B, Hq, 32, T] in memory
            rows = slice(first, min(first + 32, width))
            own = (cached.stop - width)[:, None] + torch.arange(rows.start, rows.stop, device=keys.device)
            seen = cached.counted[:, None] & (position <= own[..., None]) & real[:, rows, None]
            logits = (queries[:, :, rows].to(dtype).unflatten(1, (heads, -1)) @ keys.to(dtype).unsqueeze(2).mT * scale).flatten(1, 2)
            # a masked query looks at nothing
            attention = logits.masked_fill(~seen[:, None], -torch.inf).softmax(-1).nan_to_num(0)
            tracker.update(attention, length - width + rows.start)
        return tracker.scores(length - 1)


Method = KaVa | RKV | SnapKV | LazyEviction | Crop


class CompressedKV(NamedTuple):
    """Kept ``keys`` [B, H, M, D] and ``values`` [B, H, M, Dv], zeros in empty slots; the ``selection``; the ``scores`` [B, H, T] it is by."""

    keys: Tensor
    values: Tensor
    selection: KVSelection
    scores: Tensor


def compress(
    queries: Tensor | None, keys: Tensor, values: Tensor, budget, *, method: Method, mask: Tensor | None = None, span: Span | None = None,
    query_mask: Tensor | None = None, protect_first: int = 0, order: str = "time", scale: float | None = None, lse: Tensor | None = None,
    rotate: Rope | None = None, inplace: bool = False, backend: str | None = None,
) -> CompressedKV:  # fmt: skip
    """Score the cache by a published method, keep the best `budget` entries of each head, and gather them.

    Args:
        queries: [B, Hq, W, D]. KaVa: the answer's. RKV, SnapKV, LazyEviction: those of each request's last W tokens, or all [B, Hq,
            T, D], of which they take the ones they want. Crop and CosineOnly need none.
        keys: [B, Hkv, T, D]; values: [B, Hkv, T, Dv].
        budget: entries a head, those the method always keeps included; see :func:`select`.
        method: ``KaVa()``, ``RKV()``, ``SnapKV()``, ``LazyEviction()``, ``Crop()``, ``CosineOnly()``, ``AttentionOnly()``, or any object
            with ``scores(cached) -> [B, Hkv, T]`` and ``protected``, the number of last entries always kept.
        mask: bool [B, T], True = a real token; padding is never kept.
        span: (start, stop), ints or int tensors [B]: only these entries are scored and kept (KaVa: the chain of thought).
            Default: everything up to the last real token.
        query_mask: bool [B, W], False = no query.
        protect_first: so many first entries are always kept as well (attention sinks).
        order: of the slots, "time" or "score".
        scale: of the logits; default 1/√D.
        lse: [B, Hq, W] of the same queries, for SnapKV, and not with a span: see :func:`window_importance`.
        rotate, inplace: see :func:`gather`.
        backend: see :func:`window_importance`.

    Returns:
        :class:`CompressedKV`; its keys and values are differentiable, the choice is not.

    Raises:
        ValueError, TypeError: naming the argument. BackendError: `backend` cannot serve these tensors.
    """
    checked_keys("keys", keys)
    mask = checked_mask("mask", mask, (keys.shape[0], keys.shape[2]), keys.device)
    check_method(method)
    if queries is not None:
        check_queries(queries, keys)
        query_mask = checked_mask("query_mask", query_mask, (queries.shape[0], queries.shape[2]), keys.device)
        if lse is not None:
            check_lse(lse, tuple(queries.shape[:3]), span, keys)
        check_heads(method, queries.shape[1], keys.shape[1])
    start, stop = checked_span(span, keys, mask)
    cached = Cached(queries, keys, start, stop, mask, query_mask, scale, lse, backend)
    with torch.no_grad():
        scores = method.scores(cached)
        selection = select(
            scores, budget, protect_first=protect_first, protect_last=method.protected, mask=cached.counted, order=order, backend=backend
        )
    return CompressedKV(*gather(keys, values, selection, inplace=inplace, rotate=rotate, backend=backend), selection, scores)


def check_method(method: Method) -> None:
    if inspect.isclass(method) or not hasattr(method, "scores") or not hasattr(method, "protected"):
        raise TypeError(f"method must be an object such as KaVa() or RKV(); got {method!r}")


def check_heads(method: Method, query_heads: int, kv_heads: int) -> None:
    if getattr(method, "group_reduce", None) == "none" and query_heads != kv_heads:
        raise ValueError(f"method with group_reduce='none' scores {query_heads} query heads; the cache has {kv_heads} KV heads to keep entries of")


def _fraction(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1]; got {value}")


def _window(value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"window must be a positive int; got {value!r}")
