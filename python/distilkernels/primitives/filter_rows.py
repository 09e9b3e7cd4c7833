"""``filter_rows``: what temperature, top-k, top-p and min-p leave of a row, as a handful of numbers.

Every one of these filters keeps an upper set of the row: with boundary ties kept, the columns whose raw logit x is at
least some bar. So a filtered softmax is known by four numbers, whatever was asked for:

    Q_v = exp(x_v/T − lse)·[x_v ≥ bar],        T = 0: Q_v = [v = argmax]

and nothing is sorted or stored per column. The filters apply in the order temperature, top_k, top_p (of what top_k left,
renormalised), min_p:

    top_k:  #{w : x_w > x_v} < k              top_p:  Q_k(w : x_w > x_v) < p (the argmax stays where p = 0)
    min_p:  x_v/T ≥ x_max/T + log(min_p)
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import resolve
from .vocab_stats import row_dtype


class Filters(NamedTuple):
    """Per row [N], contiguous: ``temperature`` float64 (0 = argmax), ``top_k`` int64 (0 = off), ``top_p`` float64 (≥ 1 = off),
    ``min_p`` float64 (0 = off)."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor


class Filtered(NamedTuple):
    """A filtered softmax per row [N]: ``temperature`` float64; ``bar`` float32 (float64 for float64 logits), −inf where nothing
    is filtered; ``lse`` float64, log Σ_{kept} e^{x/T}; ``lse_all`` float64, the same over all columns; ``expected`` float64, Σ Q·x/T, so
    that H(Q) = lse − expected; ``argmax`` int64, the lowest id of the largest x.

    At T = 0: bar is the largest x, lse, lse_all and expected are 0. A row with a NaN, a +inf or nothing but −inf has NaN
    numbers and argmax −1.
    """

    temperature: Tensor
    bar: Tensor
    lse: Tensor
    lse_all: Tensor
    expected: Tensor
    argmax: Tensor

    @property
    def entropy(self) -> Tensor:
        """H(Q) in nats."""
        return (self.lse - self.expected).clamp(min=0)

    def logprob(self, x: Tensor, ids: Tensor) -> Tensor:
        """log Q at `ids`, whose raw logits are `x`, float64: both of the fields' shape, or [..., K] beside it; −inf where filtered."""
        if x.dim() > self.bar.dim():
            return Filtered(*(t[..., None] for t in self)).logprob(x, ids)
        cold = self.temperature == 0
        warm = (x / self.temperature.masked_fill(cold, 1) - self.lse).masked_fill(cold, 0)
        kept = torch.where(cold, ids == self.argmax, x >= self.bar) & (ids >= 0)
        return warm.masked_fill(~kept, -math.inf).masked_fill(self.lse.isnan(), math.nan)

    def bar_of(self, probability: Tensor | float) -> Tensor:
        """The raw logit from which Q_v ≥ probability, in the fields' shape and `bar`'s dtype: T·(log probability + lse), rounded up.

        −inf for probability 0. At T = 0 the largest logit: where several are equal, all of them pass.
        """
        wanted = torch.as_tensor(probability, dtype=self.lse.dtype, device=self.lse.device).log()
        cold = self.temperature == 0
        exact = torch.where(cold, 0.0, self.temperature) * (torch.where(cold, 0.0, wanted) + self.lse)
        bar = exact.to(self.bar.dtype)
        bar = torch.where(bar < exact, torch.nextafter(bar, torch.full_like(bar, math.inf)), bar)
        bar = torch.where(cold, self.bar, torch.maximum(bar, self.bar))
        return torch.where((wanted == -math.inf) & ~self.bar.isnan(), -math.inf, bar)

    def at(self, index: Tensor) -> Filtered:
        """The laws of some rows: flat indices, fields of their shape."""
        return type(self)(*(t.take(index) for t in self))

    def first(self, rows: int) -> Filtered:
        """The first `rows` of fields [B, R]."""
        return self if self.lse.shape[1] == rows else type(self)(*(t[:, :rows] for t in self))

    def view(self, *shape: int) -> Filtered:
        return type(self)(*(t.view(*shape) for t in self))


class Plain(Filtered):
    """The same of rows that nothing filters, at T = 1: temperature is 1, bar −inf and lse_all is lse."""

    def logprob(self, x: Tensor, ids: Tensor) -> Tensor:
        lse = self.lse if x.dim() == self.lse.dim() else self.lse[..., None]
        return (x - lse).masked_fill(ids < 0, -math.inf)

    def bar_of(self, probability: Tensor | float) -> Tensor:
        exact = self.lse + torch.as_tensor(probability, dtype=self.lse.dtype, device=self.lse.device).log()
        bar = exact.to(self.bar.dtype)
        return torch.where(bar < exact, torch.nextafter(bar, bar.new_full((), math.inf)), bar)


def allocate(logits: Tensor, rows: Tensor | None = None) -> dict[str, Tensor]:
    n = logits.shape[0] * logits.shape[1] if rows is None else rows.shape[0]
    device, double = logits.device, row_dtype(logits.device)
    out = {name: torch.empty(n, dtype=double, device=device) for name in ("lse", "lse_all", "expected")}
    out["bar"] = torch.empty(n, dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32, device=device)
    out["argmax"] = torch.empty(n, dtype=torch.int64, device=device)
    return out


def reference(logits: Tensor, columns: int, filters: Filters, out: dict[str, Tensor], rows: Tensor | None = None) -> None:
    """Writes `out` for the first `columns` of logits [O, I, V] with last stride 1. The definition, by a sort, in float64.

    `rows` int64 [N]: which rows, of O·I; `filters` and `out` are then theirs."""
    x = logits[..., :columns].reshape(-1, columns)
    x = (x if rows is None else x[rows]).double()
    n = x.shape[0]
    top = x.amax(-1)
    bad = ~top.isfinite() | x.isnan().any(-1)
    cold = filters.temperature == 0
    t = torch.where(cold, 1.0, filters.temperature)[:, None]
    ordered = x.sort(dim=-1, descending=True).values
    p = ((ordered - top[:, None]) / t).exp()
    # of an entry, what lies strictly above it: the sums before the first of its equals
    falling = -ordered.nan_to_num(-math.inf).contiguous()
    first = torch.searchsorted(falling, falling)
    kept_k = (filters.top_k <= 0)[:, None] | (first < filters.top_k[:, None])
    p_k = torch.where(kept_k, p, 0.0)
    above = torch.nn.functional.pad(p_k.cumsum(-1), (1, 0)).gather(-1, first)
    kept_p = (filters.top_p >= 1)[:, None] | (above < filters.top_p[:, None] * p_k.sum(-1, keepdim=True)) | (first == 0)
    kept = kept_k & kept_p & (p >= filters.min_p[:, None])
    limited = (filters.top_k > 0) | (filters.top_p < 1) | (filters.min_p > 0)
    bar = torch.where(kept, ordered, math.inf).amin(-1)
    z = ordered / t
    lse = z.masked_fill(~kept, -math.inf).logsumexp(-1)
    q = torch.where(kept, (z - lse[:, None]).exp(), 0.0)
    values = {
        "bar": torch.where(cold, top, torch.where(limited, bar, -math.inf)),
        "lse": lse.masked_fill(cold, 0.0),
        "lse_all": z.logsumexp(-1).masked_fill(cold, 0.0),
        "expected": (q * z.masked_fill(q == 0, 0)).sum(-1).masked_fill(cold, 0.0),
    }
    for name, value in values.items():
        out[name].copy_(value.masked_fill(bad, math.nan))
    out["argmax"].copy_((x == top[:, None]).int().argmax(-1).masked_fill(bad, -1) if n else out["argmax"])


def filtered(logits: Tensor, columns: int, filters: Filters, backend: str | None = None, rows: Tensor | None = None) -> Filtered:
    """The filters' outcome for the first `columns` of logits [O, I, V] with last stride 1, or of `rows` int64 [N] of the O·I."""
    launch = resolve("filter_rows", logits, backend=backend)
    out = allocate(logits, rows)
    if logits.numel():
        launch(logits, columns, filters, out, *(() if rows is None else (rows,)))
    return Filtered(filters.temperature, **out)
