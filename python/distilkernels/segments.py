"""Reductions over ragged spans of tokens: the steps of a trace, the answer, one tool call. Plain PyTorch.

Spans are given by an id for each token: ``values`` [..., L] and ``span_ids`` int [..., L] with ids in [0, num_spans) and a
negative id for tokens of no span; the tokens of a span need not be neighbours. Results are [..., num_spans], one entry for
each span of each row. All are differentiable, and deterministic on every device: tokens are brought into the order of their
spans, no atomics add them. bfloat16 and float16 are reduced in float32, and results have the dtype of the values. A NaN makes
its span NaN. Other ids than these are undefined on a GPU and a ValueError on a CPU.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .primitives.head import checked_number

__all__ = ["from_delimiters", "from_lengths", "logsumexp", "maximum", "mean", "minimum", "quantile", "suffix_min", "sum"]


def from_lengths(lengths: Tensor, total: int) -> Tensor:
    """Span ids int64 [..., total] of consecutive spans of `lengths` [..., S] tokens; −1 behind the last."""
    if not isinstance(lengths, Tensor) or lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise TypeError(f"lengths must be an integer tensor; got {getattr(lengths, 'dtype', type(lengths).__name__)}")
    if total < 0:
        raise ValueError(f"total must not be negative; got {total}")
    stops = lengths.cumsum(-1)
    at = torch.arange(total, device=lengths.device).expand(*lengths.shape[:-1], total).contiguous()
    ids = torch.searchsorted(stops.contiguous(), at, right=True)
    return ids.masked_fill(ids >= lengths.shape[-1], -1)


def from_delimiters(delimiter: Tensor, mask: Tensor | None = None) -> Tensor:
    """Span ids int64 [..., L] of steps that each end with a delimiter token (`delimiter` [..., L] is nonzero there), −1 outside the mask."""
    ends = delimiter != 0 if mask is None else (delimiter != 0) & (mask != 0)
    ids = ends.long().cumsum(-1) - ends.long()
    return ids if mask is None else ids.masked_fill(mask == 0, -1)


class _Sorted(NamedTuple):
    """Tokens of all rows in the order of their spans, those of no span last."""

    values: Tensor  # [N·L]
    span: Tensor  # [N·L], flat
    lengths: Tensor  # [N·S + 1], the last of no span
    shape: tuple[int, ...]
    dtype: torch.dtype  # of the results

    def result(self, found: Tensor) -> Tensor:
        return found.view(self.shape).to(self.dtype)


def _checked(values: Tensor, span_ids: Tensor, num_spans: int) -> None:
    if not isinstance(values, Tensor) or not values.is_floating_point():
        raise TypeError(f"values must be a floating-point tensor; got {getattr(values, 'dtype', type(values).__name__)}")
    if not isinstance(span_ids, Tensor) or span_ids.is_floating_point() or span_ids.dtype == torch.bool:
        raise TypeError(f"span_ids must be an integer tensor; got {getattr(span_ids, 'dtype', type(span_ids).__name__)}")
    if values.dim() == 0 or span_ids.shape != values.shape:
        raise ValueError(f"span_ids must have the shape of values, [..., L] = {tuple(values.shape)}; got {tuple(span_ids.shape)}")
    if isinstance(num_spans, bool) or not isinstance(num_spans, int):
        raise TypeError(f"num_spans must be an int; got {type(num_spans).__name__}")
    if num_spans < 0:
        raise ValueError(f"num_spans must not be negative; got {num_spans}")
    if span_ids.device.type == "cpu" and span_ids.numel() and not torch.compiler.is_compiling() and int(span_ids.max()) >= num_spans:
        raise ValueError(f"span_ids must be below num_spans={num_spans}; got {int(span_ids.max())}")


def _in_order(values: Tensor, span_ids: Tensor, num_spans: int, by_value: bool = False) -> _Sorted:
    _checked(values, span_ids, num_spans)
    lead, length = values.shape[:-1], values.shape[-1]
    rows = math.prod(lead)
    flat, none = (values if values.dtype == torch.float64 else values.float()).reshape(-1), rows * num_spans
    first = torch.arange(rows, device=values.device).view(-1, 1) * num_spans
    ids = span_ids.reshape(rows, length).long()
    span = torch.where(ids < 0, none, ids + first).reshape(-1)
    if by_value:
        order = flat.detach().argsort(stable=True)
        order = order[span[order].argsort(stable=True)]
    else:
        order = span.argsort(stable=True)
    lengths = torch.zeros(none + 1, dtype=torch.int64, device=values.device).scatter_add_(0, span, torch.ones_like(span))
    return _Sorted(flat[order], span[order], lengths, (*lead, num_spans), values.dtype)


def _reduced(tokens: _Sorted, values: Tensor, how: str, empty: float) -> Tensor:
    found = torch.segment_reduce(values, how, lengths=tokens.lengths, unsafe=True, initial=None if how == "mean" else empty)
    return found[:-1].masked_fill(tokens.lengths[:-1] == 0, empty)


def sum(values: Tensor, span_ids: Tensor, num_spans: int) -> Tensor:
    """Σ over each span; 0 for a span without tokens."""
    tokens = _in_order(values, span_ids, num_spans)
    return tokens.result(_reduced(tokens, tokens.values, "sum", 0.0))


def mean(values: Tensor, span_ids: Tensor, num_spans: int) -> Tensor:
    """The mean of each span; NaN for a span without tokens."""
    tokens = _in_order(values, span_ids, num_spans)
    count = tokens.lengths[:-1]
    return tokens.result((_reduced(tokens, tokens.values, "sum", 0.0) / count.clamp(min=1)).masked_fill(count == 0, math.nan))


def minimum(values: Tensor, span_ids: Tensor, num_spans: int) -> Tensor:
    """The least of each span; +inf for a span without tokens. Equal ones share the gradient."""
    tokens = _in_order(values, span_ids, num_spans)
    return tokens.result(_reduced(tokens, tokens.values, "min", math.inf))


def maximum(values: Tensor, span_ids: Tensor, num_spans: int) -> Tensor:
    """The greatest of each span; −inf for a span without tokens. Equal ones share the gradient."""
    tokens = _in_order(values, span_ids, num_spans)
    return tokens.result(_reduced(tokens, tokens.values, "max", -math.inf))


def logsumexp(values: Tensor, span_ids: Tensor, num_spans: int) -> Tensor:
    """log Σ exp over each span; −inf for a span without tokens."""
    tokens = _in_order(values, span_ids, num_spans)
    with torch.no_grad():
        top = torch.segment_reduce(tokens.values, "max", lengths=tokens.lengths, unsafe=True, initial=-math.inf)
        top = top.masked_fill(~top.isfinite(), 0)
    total = _reduced(tokens, (tokens.values - top[tokens.span]).exp(), "sum", 0.0)
    nothing = total == 0
    return tokens.result((total.masked_fill(nothing, 1).log() + top[:-1]).masked_fill(nothing, -math.inf))


def quantile(values: Tensor, span_ids: Tensor, num_spans: int, q: float) -> Tensor:
    """The q-quantile of each span, q in [0, 1], linear between neighbours (0.5: the median); NaN for a span without tokens."""
    if not 0 <= checked_number("q", q) <= 1:
        raise ValueError(f"q must be in [0, 1]; got {q}")
    tokens = _in_order(values, span_ids, num_spans, by_value=True)
    lengths = tokens.lengths[:-1]
    if tokens.values.numel() == 0:
        return values.new_full(tokens.shape, math.nan)
    place = q * (lengths - 1).clamp(min=0).double()
    low = place.floor().long()
    first = lengths.cumsum(0) - lengths
    last = (first + (lengths - 1).clamp(min=0)).clamp(max=tokens.values.numel() - 1)
    below, above = tokens.values[torch.minimum(first + low, last)], tokens.values[torch.minimum(first + low + 1, last)]
    share = (place - low).to(tokens.values.dtype)
    between = torch.where(share == 0, below, (1 - share) * below + share * above.masked_fill(share == 0, 0))
    # NaN comes last in the order
    return tokens.result(between.masked_fill((lengths == 0) | tokens.values[last].isnan(), math.nan))


def suffix_min(values: Tensor, span_ids: Tensor, num_spans: int) -> Tensor:
    """For each token the least value from it to the end of its span, [..., L] (PURE's min-form credit, arXiv 2504.15275).

    Tokens of no span give +inf. Ties pass their gradient to the first. O(L log L) by doubling.
    """
    _checked(values, span_ids, num_spans)
    length = values.shape[-1]
    # within a row, tokens of one span are brought together; their order stays
    order = span_ids.long().argsort(dim=-1, stable=True)
    best, span = values.gather(-1, order), span_ids.gather(-1, order)
    step = 1
    while step < length:
        ahead = torch.where(span[..., :-step] == span[..., step:], best[..., step:], math.inf)
        best = torch.cat([torch.where((ahead < best[..., :-step]) | ahead.isnan(), ahead, best[..., :-step]), best[..., -step:]], -1)
        step *= 2
    best = best.masked_fill(span < 0, math.inf)
    return best.gather(-1, order.argsort(dim=-1))
