"""Scores of cached keys: how much recent queries attend to each (importance), how much it repeats others (redundancy)."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..primitives.boundary import plain_eager
from ..primitives.key_redundancy import column_means, redundancy
from ..primitives.window_importance import GROUP_REDUCE, WINDOW_REDUCE, Scoring, importance

MODES = ("kava", "rkv")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

Span = tuple[int | Tensor, int | Tensor]


@torch.no_grad()
def window_importance(
    queries: Tensor, keys: Tensor, *, span: Span | None = None, mask: Tensor | None = None, query_mask: Tensor | None = None,
    scale: float | None = None, group_reduce: str = "max_logits", window_reduce: str = "mean", pool: tuple[str, int] | None = None,
    causal_window: bool = False, lse: Tensor | None = None, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """How much attention W queries give to each key, without the [W, T] probabilities of the heads in memory.

    Logits are scale·q·k. Published methods differ in everything after that, and keep different keys for it, so each choice
    is an argument. Not differentiable.

    Args:
        queries: [B, Hq, W, D]; keys: [B, Hkv, T, D], one dtype (float32, bfloat16, float16, float64). Hkv divides Hq: query
            head h reads KV head h div (Hq/Hkv), and no key is repeated for it.
        span: (start, stop), ints or int tensors [B]: the softmax runs over the keys in it alone, and others score 0 (R-KV:
            all but the window; KaVa: the chain of thought). None: all keys.
        mask: bool [B, T], True = a real token. Others take no part and score 0; they may hold anything.
        query_mask: bool [B, W]; a False query counts nowhere. A request without queries scores 0.
        scale: default 1/√D.
        group_reduce: over the Hq/Hkv query heads of a KV head: "max_logits" before the softmax (R-KV), "max_probs" after it (KaVa),
            "mean_probs" (kvpress), or "none": one score a query head (SnapKV).
        window_reduce: over the valid queries: "mean", "sum" or "max".
        pool: ("max", 7) or ("avg", 5): an odd window along T, inside the span: padding and other keys are left out of a maximum
            and count as 0 in an average, as zero padding does.
        causal_window: the queries are those of the span's last W positions (without a span: of the last W up to the last real
            token), and query w sees keys up to its own position only (SnapKV). Pooling then stays before the window.
        lse: [B, Hq, W], log Σ exp of the logits over every key each query saw, as FlashAttention returns it: one pass over
            K in place of two. It serves "max_probs", "mean_probs" and "none" over all keys.
        backend: "cuda", "triton", "cpp" or "reference"; None takes the first that serves the tensors.

    Returns:
        [B, Hkv, T], or [B, Hq, T] for group_reduce="none"; float32 (float64 for float64).

    Raises:
        ValueError, TypeError: naming the argument; also for `lse` with "max_logits" or a span, which it cannot serve.
        BackendError: `backend` cannot serve these tensors.
    """
    scores, _ = scored(
        queries, keys, span=span, mask=mask, query_mask=query_mask, scale=scale, group_reduce=group_reduce, window_reduce=window_reduce,
        pool=pool, causal_window=causal_window, lse=lse, similarity_span=None, backend=backend,
    )  # fmt: skip
    return scores


def scored(
    queries: Tensor, keys: Tensor, *, span, mask, query_mask, scale, group_reduce, window_reduce, pool, causal_window, lse,
    similarity_span: tuple[Tensor, Tensor] | None, backend,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """:func:`window_importance`, and the cosine sums over `similarity_span` from the same reads where that is given."""
    checked_keys("keys", keys)
    check_queries(queries, keys)
    b, heads, width, dim = queries.shape
    mask = checked_mask("mask", mask, (b, keys.shape[2]), keys.device)
    query_mask = checked_mask("query_mask", query_mask, (b, width), keys.device)
    _one_of("group_reduce", group_reduce, GROUP_REDUCE)
    _one_of("window_reduce", window_reduce, WINDOW_REDUCE)
    pool = _checked_pool(pool)
    if lse is not None:
        if group_reduce == "max_logits":
            raise ValueError("lse cannot serve group_reduce='max_logits': that softmax is over the group's largest logits, not a head's own; leave lse out")
        check_lse(lse, (b, heads, width), span, keys)
        lse = lse.to(torch.float64 if keys.dtype == torch.float64 else torch.float32).contiguous()
    start, stop = checked_span(span, keys, mask if causal_window else None)
    scale = dim**-0.5 if scale is None else float(scale)
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite; got {scale}")
    how = Scoring(scale, group_reduce, window_reduce, bool(causal_window))
    scores, sums = importance(_rows(queries), _rows(keys), start, stop, mask, query_mask, how, lse, similarity_span, backend)
    if pool is not None:
        before = stop - width if causal_window else stop
        scores = _pooled(scores, counted(keys, (start, before), mask), *pool)
    return scores, sums


@torch.no_grad()
def key_redundancy(
    keys: Tensor, *, mode: str = "kava", span: Span | None = None, mask: Tensor | None = None, threshold: float = 0.5,
    pad_in_softmax: bool = False, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """How much each key resembles the others of its head, from cosines C = k̂k̂ᵀ with a zero diagonal, without [T, T] in memory.

    The two published scores have opposite signs, kept as published:

    * "kava" (arXiv 2510.02312), high = unique: softmax over i of −Σ_j C[j, i]/n, n keys that count. O(T·D).
    * "rkv" (R-KV), high = redundant: of each row i the last column with C[i, j] > threshold, else the first valid column, is zeroed;
      then softmax over j of the mean over i of C[i, j]. O(T·D) plus a scan for those neighbours, O(T) memory
      (the reference, which serves float64, takes [T, T] for it).

    Args:
        keys: [B, H, T, D] float32, bfloat16, float16 or float64. Norms and cosines are float32 at least.
        mode: "kava" or "rkv".
        span: (start, stop), ints or int tensors [B]: only these keys count. None: all.
        mask: bool [B, T], True = a real token. Others do not count, score 0, and may hold anything.
        threshold: "rkv": the cosine above which a key is a neighbour, ≥ 0. No cosine is above 1: then there are no neighbours, duplicates included.
        pad_in_softmax: "kava": masked keys of the span enter the softmax's denominator as exp(0), as in the published listing.
        backend: see :func:`window_importance`.

    Returns:
        [B, H, T] float32 (float64 for float64); 0 for keys that do not count. Not differentiable.

    Raises:
        ValueError, TypeError: naming the argument. BackendError: `backend` cannot serve these tensors.
    """
    checked_keys("keys", keys)
    _one_of("mode", mode, MODES)
    mask = checked_mask("mask", mask, (keys.shape[0], keys.shape[2]), keys.device)
    span = checked_span(span, keys, None)
    if pad_in_softmax and mode != "kava":
        raise ValueError("pad_in_softmax=True belongs to mode='kava'; got mode='rkv'")
    check_threshold(threshold)
    found = redundancy(_rows(keys), *span, mask, threshold=float(threshold), neighbours=mode == "rkv", backend=backend)
    inside = counted(keys, span, mask)
    if mode == "rkv":
        return softmax_over(column_means(found, inside.sum(-1)), inside)
    return unique_scores(found.similarity, inside, counted(keys, span, None) if pad_in_softmax else None)


def unique_scores(similarity: Tensor, inside: Tensor, denominator: Tensor | None) -> Tensor:
    """KaVa's R from the cosine sums; `denominator` bool [B, T] or None: keys that enter the softmax, masked ones as exp(0)."""
    r = -similarity / inside.sum(-1).clamp(min=1)[:, None, None]
    if denominator is None:
        return softmax_over(r, inside)
    return softmax_over(r.masked_fill(~inside[:, None], 0), denominator).masked_fill(~inside[:, None], 0)


def softmax_over(x: Tensor, inside: Tensor) -> Tensor:
    """Softmax of [B, H, T] over the keys inside (bool [B, T]), 0 elsewhere and where there are none."""
    outside = ~inside[:, None]
    return x.masked_fill(outside, -math.inf).softmax(-1).masked_fill(outside, 0)


def _pooled(scores: Tensor, inside: Tensor, kind: str, size: int) -> Tensor:
    """Scores pooled along T among the keys inside (bool [B, T]); the others as they were."""
    if scores.numel() == 0:
        return scores
    inside = inside[:, None].expand(scores.shape)
    if kind == "max":
        x = F.max_pool1d(scores.masked_fill(~inside, -math.inf), size, stride=1, padding=size // 2)
    else:
        x = F.avg_pool1d(scores.masked_fill(~inside, 0), size, stride=1, padding=size // 2)
    return torch.where(inside, x, scores)


def counted(keys: Tensor, span: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
    """bool [B, T]: in the span and not masked."""
    position = torch.arange(keys.shape[2], device=keys.device)
    inside = (position >= span[0][:, None]) & (position < span[1][:, None])
    return inside if mask is None else inside & mask


def are_keys(keys: object) -> bool:
    """A tensor [B, H, T, D] of a dtype that is served."""
    return isinstance(keys, Tensor) and keys.dtype in _DTYPES and keys.dim() == 4 and keys.shape[3] > 0


def checked_keys(name: str, keys: Tensor) -> None:
    if are_keys(keys):
        return
    if not isinstance(keys, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(keys).__name__}")
    if keys.dtype not in _DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64; got {keys.dtype}")
    raise ValueError(f"{name} must have shape [B, H, T, D] with D ≥ 1; got {tuple(keys.shape)}")


def check_threshold(threshold: float) -> None:
    if not threshold >= 0:
        raise ValueError(f"threshold must be at least 0, the cosine that a key has with itself here; got {threshold}")


def check_queries(queries: Tensor, keys: Tensor) -> None:
    checked_keys("queries", queries)
    (b, heads, _, dim), kv_heads = queries.shape, keys.shape[1]
    if (keys.shape[0], keys.shape[3]) != (b, dim) or heads == 0 or kv_heads == 0 or heads % kv_heads:
        shapes = f"{tuple(queries.shape)} and {tuple(keys.shape)}"
        raise ValueError(f"queries [B, Hq, W, D] and keys [B, Hkv, T, D] must share B and D, and Hkv must divide Hq; got {shapes}")
    if (queries.dtype, queries.device) != (keys.dtype, keys.device):
        raise ValueError(f"queries must have the keys' dtype and device, {keys.dtype} on {keys.device}; got {queries.dtype} on {queries.device}")


def checked_mask(name: str, mask: Tensor | None, shape: tuple[int, ...], device: torch.device) -> Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"{name} must be a bool tensor, True = real; got {mask.dtype if isinstance(mask, Tensor) else type(mask).__name__}")
    if tuple(mask.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}; got {tuple(mask.shape)}")
    if mask.device != device:
        raise ValueError(f"{name} must be on {device}, where the keys are; got {mask.device}")
    return mask.contiguous()


def checked_span(span: Span | None, keys: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
    """start and stop as int32 [B]; without a span 0 and T, or one past the last real token of `real` [B, T]."""
    b, t, device = keys.shape[0], keys.shape[2], keys.device
    if span is None:
        stop = torch.full((b,), t, dtype=torch.int32, device=device)
        if real is not None:
            stop = torch.where(real, torch.arange(1, t + 1, device=device), 0).amax(-1).int() if t else stop
        return torch.zeros(b, dtype=torch.int32, device=device), stop
    if not isinstance(span, Sequence) or len(span) != 2:
        raise TypeError(f"span must be (start, stop), ints or int tensors [B]; got {span!r}")
    complaint = f"span must have 0 ≤ start ≤ stop ≤ T = {t}; got ({{}}, {{}})"
    if all(isinstance(value, numbers.Integral) for value in span) and not 0 <= span[0] <= span[1] <= t:
        raise ValueError(complaint.format(*span))
    start, stop = (_per_request(f"span's {name}", value, b, device) for name, value in zip(("start", "stop"), span))
    if device.type == "cpu" and plain_eager(start, stop):
        bad = (start < 0) | (stop < start) | (stop > t)
        if bad.any():
            row = int(bad.nonzero()[0])
            raise ValueError(complaint.format(int(start[row]), int(stop[row])) + f" for request {row}")
    start = start.clamp(0, t).int()
    return start, torch.maximum(stop.clamp(0, t).int(), start)


def _per_request(name: str, value: int | Tensor, b: int, device: torch.device) -> Tensor:
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return torch.full((b,), int(value), dtype=torch.int64, device=device)
    if not isinstance(value, Tensor) or value.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be an int or an int tensor [B]; got {value.dtype if isinstance(value, Tensor) else type(value).__name__}")
    if tuple(value.shape) != (b,) or value.device != device:
        raise ValueError(f"{name} must have shape ({b},) on {device}; got {tuple(value.shape)} on {value.device}")
    return value.contiguous()


def check_lse(lse: Tensor, shape: tuple[int, ...], span: Span | None, keys: Tensor) -> None:
    if span is not None:
        raise ValueError("lse cannot serve a span: it is over every key that the query saw; leave one of them out")
    if not isinstance(lse, Tensor) or not lse.is_floating_point():
        raise TypeError(f"lse must be a floating point tensor; got {lse.dtype if isinstance(lse, Tensor) else type(lse).__name__}")
    if tuple(lse.shape) != shape or lse.device != keys.device:
        raise ValueError(f"lse must have shape [B, Hq, W] = {shape} on {keys.device}; got {tuple(lse.shape)} on {lse.device}")


def _checked_pool(pool) -> tuple[str, int] | None:
    if pool is None:
        return None
    if not isinstance(pool, Sequence) or len(pool) != 2 or pool[0] not in ("max", "avg"):
        raise ValueError(f"pool must be None, ('max', size) or ('avg', size); got {pool!r}")
    size = pool[1]
    if isinstance(size, bool) or not isinstance(size, numbers.Integral) or size < 1 or size % 2 == 0:
        raise ValueError(f"pool's size must be an odd int, so that it has a middle; got {size!r}")
    return pool[0], int(size)


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}")


def _rows(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()
