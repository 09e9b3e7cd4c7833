"""The backward of ``vocab_stats`` in Triton: d logits from six numbers a row and K entries, in one read and one write."""

from __future__ import annotations

import math
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from ..primitives.head import Head
from .head import _SOFTCAP, Launch, exp, head_arguments, on_device_of, row_offset, row_strides, tempered, untempered


@dataclass(frozen=True)
class Config:
    """Launch configuration; the reasons are for an H200 and hold on other recent devices."""

    # 32 bytes a thread in about 32 registers: 16 CTAs an SM, 64 KB in flight where 26 KB cover the latency of the memory;
    # twice as much a thread makes ptxas spill the softcap variant
    num_warps: int = 4
    tile_bytes: int = 1 << 12
    # a span is one program's: long enough to hide its start, and to pay for the reading of the row's ids
    span_bytes: int = 1 << 15
    # entries stored at once: two a thread
    stored: int = 256


CONFIG = Config()
_INF = tl.constexpr(math.inf)


@triton.jit
def _backward_kernel(
    logits, ids, entries, coef, out,
    vocab, columns, inner_rows, stride_o, stride_i, out_stride_o, out_stride_i, n_spans, k, scale, cap, inv_t, t, slope,
    HEAD: tl.constexpr, MASKED: tl.constexpr, LINEAR: tl.constexpr, CONSTANT: tl.constexpr, T1: tl.constexpr,
    TILE: tl.constexpr, SPAN: tl.constexpr, STORED: tl.constexpr,
):  # fmt: skip
    """One span of a row: the dense formula, then over it the entries whose ids fall in the span."""
    program = tl.program_id(0)
    span = program % n_spans
    row = (program // n_spans).to(tl.int64)
    line = logits + row_offset(row, inner_rows, stride_o, stride_i)
    grads = out + row_offset(row, inner_rows, out_stride_o, out_stride_i)
    coef += row * 6
    ref, a, b = tl.load(coef), tl.load(coef + 1), tl.load(coef + 2)
    c, d, lse_t1 = tl.load(coef + 3), tl.load(coef + 4), tl.load(coef + 5)
    live = (a != 0) | (b != 0) | (c != 0) | (d != 0)
    # a row that nothing is asked of is read as zeros about a reference of zero: its own may be NaN
    ref = tl.where(live, ref, 0.0)
    lse_t1 = tl.where(live, lse_t1, 0.0)
    # a reference point in two floats keeps d_v to the last bit: (z − hi) is exact near the maximum
    hi = ref.to(tl.float32)
    lo = (ref - hi).to(tl.float32)
    hi_t1 = lse_t1.to(tl.float32)
    lo_t1 = (lse_t1 - hi_t1).to(tl.float32)
    a, b, c, d = a.to(tl.float32), b.to(tl.float32), c.to(tl.float32), d.to(tl.float32)

    readable = tl.where(live, vocab, 0)
    start = span * SPAN
    stop = tl.minimum(start + SPAN, vocab)
    for base in range(start, stop, TILE):
        offs = tl.multiple_of(base, TILE) + tl.arange(0, TILE)
        inside = offs < vocab
        z1 = untempered(tl.load(line + offs, mask=offs < readable, other=0.0), scale, cap, HEAD)
        z = tempered(z1, inv_t, HEAD)
        distance = (z - hi) - lo
        weight = exp(distance)
        if LINEAR:
            grad = weight * (a + b * tl.where(distance == -_INF, 0.0, distance))
        else:
            grad = weight * a
        if CONSTANT:
            grad += tl.where((z > -_INF) & (z < _INF), c, 0.0)
        if T1:
            grad += d * exp((z1 - hi_t1) - lo_t1)
        if HEAD == _SOFTCAP:
            share = z1 / cap
            grad *= slope * (1.0 - share * share)
        else:
            grad *= slope
        if MASKED:
            grad = tl.where(offs < columns, grad, 0.0)
        tl.store(grads + offs, grad.to(out.dtype.element_ty), mask=inside)

    if ids is not None:
        # the span is this program's alone, so a barrier among its threads is enough for the entries to be the last written
        tl.debug_barrier()
        ids += row * k
        entries += row * k
        for first in range(0, k, STORED):
            slot = first + tl.arange(0, STORED)
            id = tl.load(ids + slot, mask=slot < k, other=-1)
            here = (id >= start) & (id < stop)
            value = tl.load(entries + slot, mask=here, other=0.0)
            tl.store(grads + id, value.to(out.dtype.element_ty), mask=here)


def backward_launch(
    logits: Tensor, ids: Tensor | None, entries: Tensor | None, coef: Tensor, terms: tuple[str, ...], head: Head, out: Tensor,
    config: Config = CONFIG,
) -> Launch:  # fmt: skip
    """The launch that writes d logits; the arguments are those of ``primitives.vocab_stats.reference_backward``."""
    vocab, itemsize = logits.shape[2], logits.element_size()
    k = 0 if ids is None else ids.shape[1]
    n_spans = triton.cdiv(vocab * itemsize, config.span_bytes)
    stride_o, stride_i = row_strides(logits)
    out_stride_o, out_stride_i = row_strides(out)
    arguments = {
        "logits": logits, "ids": ids if k else None, "entries": entries.contiguous() if k else None,
        "coef": coef.contiguous(), "out": out, "vocab": vocab, "inner_rows": logits.shape[1],
        "stride_o": stride_o, "stride_i": stride_i, "out_stride_o": out_stride_o, "out_stride_i": out_stride_i,
        "n_spans": n_spans, "k": k, "slope": head.logit_scale / head.temperature,
        "LINEAR": "linear" in terms, "CONSTANT": "constant" in terms, "T1": "t1" in terms,
        "TILE": config.tile_bytes // itemsize, "SPAN": config.span_bytes // itemsize,
        "STORED": min(triton.next_power_of_2(max(k, 1)), config.stored),
    }  # fmt: skip
    programs = logits.shape[0] * logits.shape[1] * n_spans
    return Launch(_backward_kernel, programs, arguments | head_arguments(head, vocab), config.num_warps)


def vocab_stats_backward(
    logits: Tensor, ids: Tensor | None, entries: Tensor | None, coef: Tensor, terms: tuple[str, ...], head: Head, out: Tensor
) -> None:
    """As ``primitives.vocab_stats.reference_backward``; `out` may be `logits`."""
    with on_device_of(logits):
        backward_launch(logits, ids, entries, coef, terms, head, out).run()
