"""``topk_select``: the K largest entries of every row, and the row's log-sum-exp and tail, from one read.

Bytes: N·V·itemsize read once; everything written is O(N·K). The order is total, so that backends agree to the bit:
larger raw logit first (smaller first where logit_scale is negative, which turns the order round), equal ones by ascending
id. It is taken on the raw logits x, not on z: softcap and temperature keep the order, and only their rounding would make
ties of what is none. logit_scale = 0 makes every column equal.

The K entries of that order lie in the K tiles (any fixed cut of the row) whose largest entries come first in it: an
entry of another tile has those K before it. So one maximum a tile is kept on the way through, and K tiles are looked at
again, whatever the row holds: equal entries by the thousand cost nothing.
"""

from __future__ import annotations

import math
import numbers
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import resolve
from .boundary import plain_eager, rows_of
from .head import Head
from .vocab_stats import row_dtype

MAX_K = 1024


class TopK(NamedTuple):
    """``values`` [N, K]: z at the ids, descending, float32 (float64 for float64 logits). ``ids`` [N, K] int32.
    ``lse``, ``tail_lse`` [N] float64: log Σ e^z over all columns, and over those that are not among the ids, summed directly
    (−inf where there are none).

    −inf columns are taken last, lowest ids first. A row with a NaN has ids 0…K − 1 and NaN for every number, so that a loss
    of it is NaN too.
    """

    values: Tensor
    ids: Tensor
    lse: Tensor
    tail_lse: Tensor


def allocate(logits: Tensor, k: int) -> TopK:
    n, device = logits.shape[0] * logits.shape[1], logits.device
    values = torch.empty((n, k), dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32, device=device)
    rows = [torch.empty(n, dtype=row_dtype(device), device=device) for _ in range(2)]
    return TopK(values, torch.empty((n, k), dtype=torch.int32, device=device), *rows)


def reference(logits: Tensor, head: Head, out: TopK) -> None:
    """Writes `out` for logits [O, I, V] with last stride 1; K is out.ids.shape[1]. The definition: a stable sort."""
    vocab, k = logits.shape[2], out.ids.shape[1]
    raw = logits.reshape(-1, vocab)[:, : head.columns(vocab)]
    raw = raw if raw.dtype == torch.float64 else raw.float()
    bad = raw.isnan().any(-1)
    # + 0 makes −0 into 0: they are equal, and a stable sort keeps their ids in order anyway
    order = torch.zeros_like(raw) if head.logit_scale == 0 else -raw if head.logit_scale < 0 else raw
    ids = order.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    z = head._replace(valid_vocab=None).apply(raw)
    out.values.copy_(z.gather(-1, ids).masked_fill(bad[:, None], math.nan))
    out.ids.copy_(torch.where(bad[:, None], torch.arange(k, device=ids.device), ids))
    out.lse.copy_(z.logsumexp(-1))
    out.tail_lse.copy_(z.scatter(-1, ids, -math.inf).logsumexp(-1).masked_fill(bad, math.nan))


def launched(logits: Tensor, k: int, head: Head, backend: str | None) -> TopK:
    """:func:`top_k` without checks and without the registered op."""
    launch = resolve("topk_select", logits, backend=backend)
    out = allocate(logits, k)
    if logits.numel():
        launch(logits, head, out)
    return out


@torch.library.custom_op("distilkernels::topk_select", mutates_args=())
def _op(
    logits: Tensor, k: int, temperature: float, logit_scale: float, softcap: float | None, valid_vocab: int | None, backend: str | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return tuple(launched(logits, k, Head(temperature, logit_scale, softcap, valid_vocab), backend))


@_op.register_fake
def _(logits, k, temperature, logit_scale, softcap, valid_vocab, backend):
    return tuple(allocate(logits, k))


def checked_k(k, columns: int) -> int:
    if isinstance(k, bool) or not isinstance(k, numbers.Integral):
        raise TypeError(f"k must be an int; got {type(k).__name__}")
    if not 0 < k <= min(columns, MAX_K):
        limit = f"[1, {columns}], the valid columns" if columns <= MAX_K else f"[1, {MAX_K}]"
        raise ValueError(f"k must be in {limit}; got {k}")
    return int(k)


def top_k(logits: Tensor, k: int, head: Head, backend: str | None = None) -> TopK:
    """The flat [N, K] and [N] selection of logits [..., V]; arguments are already checked. Outside any graph."""
    rows = rows_of(logits.detach())
    if plain_eager(logits):
        return launched(rows, k, head, backend)
    return TopK(*_op(rows, k, *head, backend))
