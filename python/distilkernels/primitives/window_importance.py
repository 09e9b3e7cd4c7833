"""``window_importance``: how much attention W queries give to each of T keys, without [W, T] of probabilities in memory.

    l[h, w, t] = scale·q[h, w]·k[h div G, t]              G = Hq/Hkv query heads a KV head
    p = softmax over the keys that query w scores          two passes over K; one where the log-sum-exp is given
    out[t] = reduce over w of reduce over the group of p

``group_reduce`` "max_logits" takes the maximum of l over the group before the softmax (one softmax a KV head), "max_probs"
and "mean_probs" reduce p after it, "none" keeps every query head. Bytes: B·Hkv·T·D·itemsize read twice (once with `lse`);
FLOPs: 2·B·Hq·W·T·D a pass. The two passes are also the two that the cosine sums of :mod:`.key_redundancy` need, so a kernel
does both from the same reads where `similarity` asks for it. How many queries a kernel holds at once may depend on T, and with
it the last bits of a sum over more of them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import resolve
from .boundary import plain_eager
from .key_redundancy import cosine_sums

GROUP_REDUCE = ("max_logits", "max_probs", "mean_probs", "none")
WINDOW_REDUCE = ("mean", "sum", "max")


class Scoring(NamedTuple):
    """How probabilities become one score a key.

    ``causal``: the queries sit at the span's last W positions, and query w scores the keys before ``stop − W + w + 1`` only.
    """

    scale: float
    group_reduce: str = "max_logits"
    window_reduce: str = "mean"
    causal: bool = False


class Similarity(NamedTuple):
    """The cosine sums of :mod:`.key_redundancy` as a second result of the same reads: their own span, and where they go.

    ``start``, ``stop`` int32 [B]; ``out`` [B, Hkv, T], see :class:`.key_redundancy.Redundancy`.
    """

    start: Tensor
    stop: Tensor
    out: Tensor


def score_dtype(keys: Tensor) -> torch.dtype:
    return torch.float64 if keys.dtype == torch.float64 else torch.float32


def scored_keys(keys: Tensor, start: Tensor, stop: Tensor, mask: Tensor | None) -> Tensor:
    """bool [B, T]: inside the span, and a real token."""
    position = torch.arange(keys.shape[2], device=keys.device)
    inside = (position >= start[:, None]) & (position < stop[:, None])
    return inside if mask is None else inside & mask


def reference(
    queries: Tensor, keys: Tensor, start: Tensor, stop: Tensor, mask: Tensor | None, query_mask: Tensor | None, how: Scoring,
    lse: Tensor | None, out: Tensor, similarity: Similarity | None = None,
) -> None:  # fmt: skip
    """Writes all of `out`.

    Args:
        queries [B, Hq, W, D] and keys [B, Hkv, T, D]: one dtype, last stride 1, any other strides; Hkv divides Hq.
        start, stop: int32 [B] contiguous, 0 ≤ start ≤ stop ≤ T.
        mask: bool [B, T] contiguous or None, True = a real token. query_mask: bool [B, W] contiguous or None.
        lse: [B, Hq, W] contiguous in the dtype of `out`, log Σ exp l over every key the query saw, or None; never with "max_logits".
            −inf: the query has no keys.
        out: [B, Hkv, T], or [B, Hq, T] for "none", contiguous; float32, float64 for float64. 0 at keys that are not scored.
        similarity: also wanted from the same reads, or None; it looks at the same mask.

    A masked query counts nowhere, whatever it holds; "mean" divides by the number of those that count, and a request
    without any has zeros. A query without a key to score has probability 0 everywhere and still counts in the mean. Masked
    keys may hold anything.
    """
    b, heads, width, _ = queries.shape
    groups = heads // keys.shape[1]
    if query_mask is None:
        query_mask = torch.ones(b, width, dtype=torch.bool, device=keys.device)
    seen = scored_keys(keys, start, stop, mask)[:, None, :].expand(b, width, keys.shape[2])
    if how.causal:
        last = stop[:, None] - width + torch.arange(width, device=keys.device)
        seen = seen & (torch.arange(keys.shape[2], device=keys.device) <= last[:, :, None])
    seen = seen[:, None, None] & query_mask[:, None, None, :, None]
    q = queries.to(out.dtype).unflatten(1, (keys.shape[1], groups))
    logits = (q @ keys.to(out.dtype).unsqueeze(2).mT) * how.scale
    if how.group_reduce == "max_logits":
        logits = logits.amax(2, keepdim=True)
    logits = logits.masked_fill(~seen, -math.inf)
    lse = logits.logsumexp(-1) if lse is None else lse.unflatten(1, (keys.shape[1], groups))
    # a masked query may hold NaN, in its lse too
    p = (logits - lse.unsqueeze(-1)).exp().masked_fill(~seen | (lse == -math.inf).unsqueeze(-1), 0)
    if how.group_reduce == "none":
        p = p.flatten(1, 2).unsqueeze(2)
    p = p.mean(2) if how.group_reduce == "mean_probs" else p.amax(2)
    if how.window_reduce == "max":
        out.copy_(p.amax(2) if width else torch.zeros_like(out))
    else:
        count = query_mask.sum(-1).clamp(min=1)[:, None, None] if how.window_reduce == "mean" else 1
        out.copy_(p.sum(2) / count)
    if similarity is not None:
        cosine_sums(keys, scored_keys(keys, similarity.start, similarity.stop, mask), similarity.out)


def launched(queries, keys, start, stop, mask, query_mask, how: Scoring, lse, similarity_span, backend) -> tuple[Tensor, Tensor | None]:
    """:func:`importance` without the registered op."""
    launch = resolve("window_importance", keys, queries, backend=backend)
    heads = queries.shape[1] if how.group_reduce == "none" else keys.shape[1]
    out = torch.empty((keys.shape[0], heads, keys.shape[2]), dtype=score_dtype(keys), device=keys.device)
    similarity = None
    if similarity_span is not None:
        similarity = Similarity(*similarity_span, torch.empty(keys.shape[:3], dtype=out.dtype, device=keys.device))
    if keys.numel():
        launch(queries, keys, start, stop, mask, query_mask, how, lse, out, similarity)
    return out, None if similarity is None else similarity.out


@torch.library.custom_op("distilkernels::window_importance", mutates_args=())
def _op(
    queries: Tensor, keys: Tensor, start: Tensor, stop: Tensor, mask: Tensor | None, query_mask: Tensor | None, scale: float,
    group_reduce: str, window_reduce: str, causal: bool, lse: Tensor | None, similarity_start: Tensor | None,
    similarity_stop: Tensor | None, backend: str | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    span = None if similarity_start is None else (similarity_start, similarity_stop)
    how = Scoring(scale, group_reduce, window_reduce, causal)
    out, similarity = launched(queries, keys, start, stop, mask, query_mask, how, lse, span, backend)
    return out, out.new_empty(0) if similarity is None else similarity


@_op.register_fake
def _(queries, keys, start, stop, mask, query_mask, scale, group_reduce, window_reduce, causal, lse, similarity_start, similarity_stop, backend):
    heads = queries.shape[1] if group_reduce == "none" else keys.shape[1]
    out = keys.new_empty((keys.shape[0], heads, keys.shape[2]), dtype=score_dtype(keys))
    return out, out.new_empty(0) if similarity_start is None else out.new_empty(keys.shape[:3])


def importance(
    queries: Tensor, keys: Tensor, start: Tensor, stop: Tensor, mask: Tensor | None, query_mask: Tensor | None, how: Scoring,
    lse: Tensor | None = None, similarity_span: tuple[Tensor, Tensor] | None = None, backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Scores [B, Hkv or Hq, T], and the cosine sums [B, Hkv, T] where `similarity_span` (start, stop) asks for them.

    Arguments as in :func:`reference`, already checked. Outside any graph.
    """
    queries, keys = queries.detach(), keys.detach()
    if plain_eager(queries, keys):
        return launched(queries, keys, start, stop, mask, query_mask, how, lse, similarity_span, backend)
    begin, end = similarity_span or (None, None)
    out, similarity = _op(queries, keys, start, stop, mask, query_mask, *how, lse, begin, end, backend)
    return out, similarity if similarity_span is not None else None
