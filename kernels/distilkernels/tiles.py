"""A row cut into tiles: the largest logit and the sum of exponentials of each, from one read of the logits.

``topk_select`` and ``draw_rows`` start here; both then know which few tiles they must look at again. Written beside the
read: one float32 a tile and field. The narrower the tiles, the less is read again and the more is written, see Config.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..primitives.head import Head
from .head import _SOFTCAP, Launch, exp, head_arguments, row_offset, row_strides
from .vocab_stats import _FAR, _INF, _z


@dataclass(frozen=True)
class Config:
    """Launch configuration; the reasons are for an H200 (132 SMs, 4.3 TB/s) and hold on other recent devices."""

    num_warps: int = 4
    # a step of the pass: 64 bytes in flight a thread on 4 warps, as in vocab_stats, and in its spans
    step_bytes: int = 1 << 13
    span_bytes: int = 1 << 16
    # written and read again: a maximum and a sum of a tile
    record_bytes: int = 16
    # a warp's 32 lanes reduce a row of a step without the others; below 32 columns the records outweigh what they save
    narrowest: int = 32
    widest: int = 512
    # more tiles than this a row do not fit one program's registers; their ranks are counted in 16 bits
    most: int = 1 << 14

    def tile(self, columns: int, again: int, itemsize: int) -> int:
        """Columns of a tile, of which `again` are read twice: records and reread bytes together are least where they are equal.

        At V = 151,936 in 16 bits: 128 for 64 tiles (5.4% of the row read again, 6.2% of records), 32 for 1,024 (22 + 25%).
        """
        best = math.sqrt(self.record_bytes * columns / (again * itemsize))
        width = min(max(2 ** round(math.log2(best)), self.narrowest), self.widest)
        return max(width, triton.next_power_of_2(triton.cdiv(columns, self.most)))


CONFIG = Config()


@triton.jit
def finite_or_0(z):
    """A shift that keeps e^(z − shift) meaningful for infinities: e^−∞ = 0, e^∞ = ∞, NaN stays."""
    return tl.where((z > -_INF) & (z < _INF), z, 0.0)


@triton.jit
def in_order(x, inside, ORDER: tl.constexpr):
    """fp32 that is larger where x comes earlier: x, −x (logit_scale < 0) or 0 (logit_scale = 0); −inf outside the row."""
    if ORDER < 0:
        x = -x
    elif ORDER == 0:
        x = tl.where(inside, 0.0, -_INF)
    return x


@triton.jit
def z_of(order, scale, cap, inv_t, HEAD: tl.constexpr, ORDER: tl.constexpr):
    """z of what in_order made of a logit."""
    x = order
    if ORDER < 0:
        x = -order
    elif ORDER == 0:
        x = tl.zeros_like(order)
    return _z(x, scale, cap, inv_t, HEAD)


@triton.jit
def loaded(line, columns_at, columns, ORDER: tl.constexpr):
    """(fp32 x, inside) at some columns; outside the row the x that comes last."""
    inside = columns_at < columns
    x = tl.load(line + columns_at, mask=inside, other=_INF if ORDER < 0 else -_INF)
    if x.dtype == tl.bfloat16:
        # what a device does; the interpreter's own conversion changes subnormals, and with them the order
        x = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32), inside


@triton.jit
def shifted(x, inside, shift, scale, cap, inv_t, HEAD: tl.constexpr, ORDER: tl.constexpr):
    """z − shift; −inf outside the row."""
    d = _z(x, scale, cap, inv_t, HEAD) - shift
    # what `loaded` puts outside is z = −inf already, unless the cap or a scale of 0 makes it finite or NaN
    if HEAD == _SOFTCAP or ORDER == 0:
        d = tl.where(inside, d, -_INF)
    return d


@triton.jit
def fall_to(z, top):
    """z − top where top is their maximum, infinities of either as finite_or_0 has them: in [−1e30, 0], −1e30 for −inf."""
    return tl.minimum(tl.maximum(z - finite_or_0(top), _FAR), 0.0)


@triton.jit
def mass(z, sums):
    """(m, s), s in double, with s·e^m = Σ sums·e^z, infinite exponents taken as 0: the sums say how those count."""
    top = tl.max(z, 0)
    return top, tl.sum((sums * exp(fall_to(z, top))).to(tl.float64), 0)


@triton.jit
def joined(top, total, other_top, other_total):
    """Two results of `mass` as one."""
    higher = tl.maximum(top, other_top)
    ours, theirs = fall_to(top.to(tl.float64), higher.to(tl.float64)), fall_to(other_top.to(tl.float64), higher.to(tl.float64))
    return higher, total * tl.exp(ours) + other_total * tl.exp(theirs)


@triton.jit
def _tiles_kernel(
    logits, records,
    columns, inner_rows, stride_o, stride_i, n_spans, n_tiles, field, scale, cap, inv_t, tau,
    HEAD: tl.constexpr, ORDER: tl.constexpr, TAU: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """records [N, fields, field ≥ n_tiles]: of each tile the first entry as in_order makes it, Σ e^(z−m) and with TAU Σ e^(τ(z−m)),
    m its z. Program = (row, span)."""
    program = tl.program_id(0)
    span = program % n_spans
    row = program // n_spans
    line = logits + row_offset(row, inner_rows, stride_o, stride_i)
    records += row.to(tl.int64) * (3 if TAU else 2) * field
    lanes = tl.arange(0, ROWS)[:, None] * TILE + tl.arange(0, TILE)[None, :]
    start = span * SPAN
    for base in range(start, tl.minimum(start + SPAN, columns), ROWS * TILE):
        base = tl.multiple_of(base, ROWS * TILE)
        x, inside = loaded(line, base + lanes, columns, ORDER)
        first = tl.max(in_order(x, inside, ORDER), 1)
        m = finite_or_0(z_of(first, scale, cap, inv_t, HEAD, ORDER))
        d = shifted(x, inside, m[:, None], scale, cap, inv_t, HEAD, ORDER)
        tile = base // TILE + tl.arange(0, ROWS)
        tl.store(records + tile, first, mask=tile < n_tiles)
        tl.store(records + field + tile, tl.sum(exp(d), 1), mask=tile < n_tiles)
        if TAU:
            tl.store(records + 2 * field + tile, tl.sum(exp(tau * d), 1), mask=tile < n_tiles)


def row_arguments(logits: Tensor, head: Head) -> dict[str, object]:
    """What every kernel on tiles takes: the logits, their addresses, the head and the order that its logit_scale gives."""
    stride_o, stride_i = row_strides(logits)
    heads = head_arguments(head, logits.shape[2])
    # loads are masked by the valid columns, and `shifted` knows when that is not enough
    del heads["MASKED"], heads["t"]
    order = (head.logit_scale > 0) - (head.logit_scale < 0)
    return heads | {"logits": logits, "inner_rows": logits.shape[1], "stride_o": stride_o, "stride_i": stride_i, "ORDER": order}


def aligned(logits: Tensor) -> bool:
    """Whether the compiler may load 16 bytes at a time: it knows of addresses and strides if they are multiples of 16."""
    return logits.data_ptr() % 16 == 0 and all(stride % 16 == 0 for stride in row_strides(logits))


def tiles_launch(logits: Tensor, head: Head, tile: int, tau: float | None = None, config: Config = CONFIG) -> tuple[dict[str, object], Launch]:
    """The arguments by which other kernels know the tiles, and the launch that fills their ``records``; `tau` asks for a third field."""
    n, columns, itemsize = logits.shape[0] * logits.shape[1], head.columns(logits.shape[2]), logits.element_size()
    rows, span = max(config.step_bytes // itemsize // tile, 1), config.span_bytes // itemsize
    n_tiles, n_spans = triton.cdiv(columns, tile), triton.cdiv(columns, span)
    # whole vectors, so that fields are read 16 bytes at a time
    field = triton.cdiv(n_tiles, 16) * 16
    records = torch.empty((n, 2 if tau is None else 3, field), dtype=torch.float32, device=logits.device)
    shared = row_arguments(logits, head) | {"records": records, "n_tiles": n_tiles, "field": field, "TILE": tile}
    sizes = {"n_spans": n_spans, "tau": 1.0 if tau is None else tau, "TAU": tau is not None, "ROWS": rows, "SPAN": max(span, rows * tile)}
    return shared, Launch(_tiles_kernel, n * n_spans, shared | sizes, config.num_warps)
