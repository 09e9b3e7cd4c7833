"""``vocab_stats`` in Triton: one read of the logits forward, one read and one write backward.

Forward, three launches:
    _ids_kernel    ids [N, K] → distinct ids in their slots, and the ids in ascending order (ids.py);
    _pass_kernel   a span of a row → sums over v ∉ S, relative to the span's own maximum (the only read of the logits);
    _row_kernel    the spans of a row and its K entries → the statistics, in double.
Rows are cut into spans of a fixed number of bytes, so a row's bits depend on V and the dtype, not on N, and few rows
still fill the device. The extra traffic is 64 bytes a span and about 8 bytes an id.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..primitives.head import Head
from .head import Launch, exp, head_arguments, on_device_of, row_offset, row_strides, tempered, untempered
from .ids import _NO_ID, COUNTED, ordered_ids


@dataclass(frozen=True)
class Config:
    """Launch configuration; the reasons are for an H200 (132 SMs, 4.3 TB/s) and hold on other recent devices."""

    # 4 warps of 16-byte loads make a 2 KB tile; a CTA of this size leaves the scheduler 7 or 8 to overlap per SM
    num_warps: int = 4
    vector_bytes: int = 16
    # 14 µs of a CTA's share of the bandwidth: a start and an end of about 1 µs are hidden, and 512 rows of 151,936
    # 16-bit logits are 2,560 programs, over two waves
    span_bytes: int = 1 << 16
    # more ids a row than this are ordered by torch.sort
    counted_ids: int = COUNTED
    # thresholds per program of rank and mass_above: [slots, tile] predicates stay in registers
    slots: int = 8
    # entries of a row handled at once in _row_kernel: its [32, 32] doubles are 64 registers on one warp
    entries: int = 32

    def span(self, itemsize: int, aligned: bool = True) -> dict[str, int]:
        """VECTOR (neighbours in one thread's load), TILE and SPAN, in elements, for one dtype.

        Rows at odd addresses are loaded an element at a time, with at most 4 a thread and tile: 8 spill.
        """
        vector = self.vector_bytes // itemsize
        lanes = vector if aligned else min(vector, 4)
        return {"VECTOR": vector if aligned else 1, "TILE": 32 * self.num_warps * lanes, "SPAN": self.span_bytes // itemsize}


CONFIG = Config()

# fields of one span's record, in doubles
_FIELDS = tl.constexpr(8)
_MAX, _SUM, _WEIGHTED, _SUM_T1, _LOGITS, _FINITE, _COLUMN, _SECOND = (tl.constexpr(i) for i in range(8))
_INF = tl.constexpr(math.inf)
_NAN = tl.constexpr(math.nan)
# stands for −∞ where 0·(−∞) must be 0: its exponential is 0 and its product with a sum stays finite
_FAR = tl.constexpr(-1e30)


# ---------------------------------------------------------------------------------------------- device


@triton.jit
def _z(x, scale, cap, inv_t, HEAD: tl.constexpr):
    return tempered(untempered(x, scale, cap, HEAD), inv_t, HEAD)


@triton.jit
def _z_of_tile(x, offs, columns, scale, cap, inv_t, HEAD: tl.constexpr, MASKED: tl.constexpr):
    """z of a loaded tile whose lanes beyond the row hold −inf."""
    z = _z(x, scale, cap, inv_t, HEAD)
    if MASKED:
        z = tl.where(offs < columns, z, -_INF)
    return z


@triton.jit
def _without_ids(z, offs, stop, order, at, following, k):
    """The tile with −inf at the ids below `stop`. `following` is order[at], the lowest id not yet passed.

    Two instructions per lane and id: with 2 KB tiles and K = 64 that is a tenth of the pass's arithmetic.
    """
    while following < stop:
        z = tl.where(offs == following, -_INF, z)
        at += 1
        following = tl.load(order + at, mask=at < k, other=_NO_ID)
    return z, at, following


@triton.jit
def _ids_below(order, start, k):
    """(how many of a row's ascending ids are below `start`, the next one)."""
    at = 0
    for first in range(0, k, 128):
        some = first + tl.arange(0, 128)
        at += tl.sum((tl.load(order + some, mask=some < k, other=_NO_ID) < start).to(tl.int32), 0)
    return at, tl.load(order + at, mask=at < k, other=_NO_ID)


@triton.jit
def _above(z, w, bars):
    higher = z[None, :] > bars[:, None]
    return tl.sum(tl.where(higher, w[None, :], 0.0), 1), tl.sum(higher.to(tl.int32), 1)


@triton.jit
def _fold(v, VECTOR: tl.constexpr):
    """One number per 16-byte load: the lanes of a load sit in one thread, whose accumulator is then one register."""
    if VECTOR > 1:
        v = tl.sum(tl.reshape(v, [v.shape[0] // VECTOR, VECTOR]), 1)
    return v


@triton.jit
def _finite(z):
    return (z > -_INF) & (z < _INF)


@triton.jit
def _finite_sum(z):
    return tl.where(_finite(z), z, 0.0)


@triton.jit
def _weighted(w, d):
    return w * tl.maximum(d, _FAR)


@triton.jit
def _pass_kernel(
    logits, order, distinct, thresholds, spans, slots,
    vocab, columns, inner_rows, stride_o, stride_i, n_spans, k, scale, cap, inv_t, t,
    HEAD: tl.constexpr, MASKED: tl.constexpr, EXPECTED: tl.constexpr, LOGIT_SUM: tl.constexpr, T1: tl.constexpr,
    ARGMAX: tl.constexpr, SECOND: tl.constexpr, SLOTS: tl.constexpr, CHUNKS: tl.constexpr, TILE: tl.constexpr, VECTOR: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Sums over one span of a row, without the ids in `order`. Program = (row, span, chunk of SLOTS thresholds).

    rank and mass_above cost about five instructions per lane and threshold, on those quadruples of tiles whose maximum
    exceeds the lowest threshold of the chunk: nearly nothing for a likely token, 64 unlikely ones 20 times the plain pass.
    """
    STEP: tl.constexpr = 4 * TILE
    program = tl.program_id(0)
    chunk = program % CHUNKS
    span = program // CHUNKS % n_spans
    row = program // CHUNKS // n_spans
    line = logits + row_offset(row, inner_rows, stride_o, stride_i)
    lanes = tl.arange(0, TILE)
    start = span * SPAN
    stop = tl.minimum(start + SPAN, vocab)

    if order is not None:
        order += row.to(tl.int64) * k
        at, following = _ids_below(order, start, k)

    if SLOTS > 0:
        slot = chunk * SLOTS + tl.arange(0, SLOTS)
        ids = tl.load(distinct + row.to(tl.int64) * k + slot, mask=slot < k, other=-1)
        if thresholds is not None:
            bars = tl.load(thresholds + row.to(tl.int64) * k + slot, mask=ids >= 0, other=_INF)
        else:
            bars = _z(tl.load(line + ids, mask=ids >= 0, other=0.0), scale, cap, inv_t, HEAD)
            bars = tl.where(ids < columns, bars, -_INF)
        bars = tl.where(ids >= 0, bars, _INF)
        lowest = tl.min(bars, 0)
        mass = tl.zeros([SLOTS], tl.float32)
        count = tl.zeros([SLOTS], tl.int32)

    top = -_INF
    total = tl.zeros([TILE // VECTOR], tl.float32)
    if EXPECTED:
        weighted = tl.zeros([TILE // VECTOR], tl.float32)
    if T1:
        total_t1 = tl.zeros([TILE // VECTOR], tl.float32)
    if LOGIT_SUM:
        logit_sum = tl.zeros([TILE // VECTOR], tl.float32)
        finite = tl.zeros([TILE // VECTOR], tl.int32)
    if ARGMAX:
        best = start
    if SECOND:
        runner_up = -_INF

    for base in range(start, stop, STEP):
        base = tl.multiple_of(base, TILE)
        o0 = base + lanes
        o1, o2, o3 = o0 + TILE, o0 + 2 * TILE, o0 + 3 * TILE
        # four loads before anything waits for one: 64 bytes in flight a thread, where 26 would cover the memory's latency
        x0 = tl.load(line + o0, mask=o0 < vocab, other=-_INF)
        x1 = tl.load(line + o1, mask=o1 < vocab, other=-_INF)
        x2 = tl.load(line + o2, mask=o2 < vocab, other=-_INF)
        x3 = tl.load(line + o3, mask=o3 < vocab, other=-_INF)
        z0 = _z_of_tile(x0, o0, columns, scale, cap, inv_t, HEAD, MASKED)
        z1 = _z_of_tile(x1, o1, columns, scale, cap, inv_t, HEAD, MASKED)
        z2 = _z_of_tile(x2, o2, columns, scale, cap, inv_t, HEAD, MASKED)
        z3 = _z_of_tile(x3, o3, columns, scale, cap, inv_t, HEAD, MASKED)
        if order is not None:
            z0, at, following = _without_ids(z0, o0, base + TILE, order, at, following, k)
            z1, at, following = _without_ids(z1, o1, base + 2 * TILE, order, at, following, k)
            z2, at, following = _without_ids(z2, o2, base + 3 * TILE, order, at, following, k)
            z3, at, following = _without_ids(z3, o3, base + 4 * TILE, order, at, following, k)

        highest = tl.max(tl.maximum(tl.maximum(z0, z1), tl.maximum(z2, z3)), 0)
        if ARGMAX:
            best = tl.where(highest > top, base, best)
        if SECOND:
            runner_up = tl.maximum(runner_up, tl.minimum(top, highest))
        higher = tl.maximum(top, highest)
        shift = tl.where(higher == -_INF, 0.0, higher)
        fall = tl.maximum(top - shift, _FAR)
        top = higher
        decay = exp(fall)
        d0, d1, d2, d3 = z0 - shift, z1 - shift, z2 - shift, z3 - shift
        w0, w1, w2, w3 = exp(d0), exp(d1), exp(d2), exp(d3)
        if EXPECTED:
            weighted = (weighted + fall * total) * decay
            weighted += _fold((_weighted(w0, d0) + _weighted(w1, d1)) + (_weighted(w2, d2) + _weighted(w3, d3)), VECTOR)
        total = total * decay + _fold((w0 + w1) + (w2 + w3), VECTOR)
        if T1:
            e = (exp(t * d0) + exp(t * d1)) + (exp(t * d2) + exp(t * d3))
            total_t1 = total_t1 * exp(t * fall) + _fold(e, VECTOR)
        if LOGIT_SUM:
            logit_sum += _fold((_finite_sum(z0) + _finite_sum(z1)) + (_finite_sum(z2) + _finite_sum(z3)), VECTOR)
            here = (_finite(z0).to(tl.int32) + _finite(z1).to(tl.int32)) + (_finite(z2).to(tl.int32) + _finite(z3).to(tl.int32))
            finite += _fold(here, VECTOR)
        if SLOTS > 0:
            mass *= decay
            if highest > lowest:
                a0, c0 = _above(z0, w0, bars)
                a1, c1 = _above(z1, w1, bars)
                a2, c2 = _above(z2, w2, bars)
                a3, c3 = _above(z3, w3, bars)
                mass += (a0 + a1) + (a2 + a3)
                count += (c0 + c1) + (c2 + c3)

    unit = row.to(tl.int64) * n_spans + span
    if SLOTS > 0:
        place = slots + (unit * (CHUNKS * SLOTS) + slot) * 2
        tl.store(place, mass.to(tl.float64))
        tl.store(place + 1, count.to(tl.float64))
    if chunk == 0:
        spans += unit * _FIELDS
        tl.store(spans + _MAX, top.to(tl.float64))
        tl.store(spans + _SUM, tl.sum(total.to(tl.float64), 0))
        if EXPECTED:
            tl.store(spans + _WEIGHTED, tl.sum(weighted.to(tl.float64), 0))
        if T1:
            tl.store(spans + _SUM_T1, tl.sum(total_t1.to(tl.float64), 0))
        if LOGIT_SUM:
            tl.store(spans + _LOGITS, tl.sum(logit_sum.to(tl.float64), 0))
            tl.store(spans + _FINITE, tl.sum(finite, 0).to(tl.float64))
        if ARGMAX:
            # the ids are in this tile again; where one is above `top`, it is the row's maximum and the column is not used,
            # but none may be taken for the second
            offs = best + tl.arange(0, STEP)
            z = _z_of_tile(tl.load(line + offs, mask=offs < vocab, other=-_INF), offs, columns, scale, cap, inv_t, HEAD, MASKED)
            if SECOND and order is not None:
                at, following = _ids_below(order, best, k)
                z, at, following = _without_ids(z, offs, best + STEP, order, at, following, k)
            column = tl.min(tl.where(z == tl.max(z, 0), offs, _NO_ID), 0)
            tl.store(spans + _COLUMN, column.to(tl.float64))
            if SECOND:
                rest = tl.max(tl.where(offs == column, -_INF, z), 0)
                tl.store(spans + _SECOND, tl.maximum(runner_up, rest).to(tl.float64))


@triton.jit
def _entries(line, distinct, slot, k, columns, scale, cap, inv_t, HEAD: tl.constexpr):
    """(ids, z) of some slots of a row; z = −inf at empty slots and masked columns."""
    ids = tl.load(distinct + slot, mask=slot < k, other=-1)
    inside = (ids >= 0) & (ids < columns)
    z = _z(tl.load(line + ids, mask=inside, other=0.0), scale, cap, inv_t, HEAD)
    return ids, tl.where(inside, z, -_INF)


@triton.jit
def _row_kernel(
    logits, distinct, thresholds, spans, slots,
    lse, gathered, tail_lse, expected_logit, logit_sum, finite_count, lse_t1, maximum, argmax, second, rank, mass_above,
    columns, inner_rows, stride_o, stride_i, n_spans, k, scale, cap, inv_t, t,
    HEAD: tl.constexpr, SPANS: tl.constexpr, WIDTH: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """The statistics of one row in double: its spans, and where `tail_lse` is wanted the entries that they left out."""
    row = tl.program_id(0).to(tl.int64)
    line = logits + row_offset(row, inner_rows, stride_o, stride_i)
    span = tl.arange(0, SPANS)
    record = spans + (row * n_spans + span) * _FIELDS
    live = span < n_spans
    tops = tl.load(record + _MAX, mask=live, other=-_INF)
    sums = tl.load(record + _SUM, mask=live, other=0.0)
    top = tl.max(tops, 0)
    shift = tl.where(top == -_INF, 0.0, top)
    falls = tl.maximum(tops - shift, _FAR)
    decays = tl.exp(falls)
    total = tl.sum(sums * decays, 0)
    if expected_logit is not None:
        weighted = tl.sum((tl.load(record + _WEIGHTED, mask=live, other=0.0) + falls * sums) * decays, 0)
    if lse_t1 is not None:
        total_t1 = tl.sum(tl.load(record + _SUM_T1, mask=live, other=0.0) * tl.exp(t * falls), 0)
    if logit_sum is not None:
        sum_z = tl.sum(tl.load(record + _LOGITS, mask=live, other=0.0), 0)
        finite = tl.sum(tl.load(record + _FINITE, mask=live, other=0.0), 0)
    if argmax is not None:
        column = tl.load(record + _COLUMN, mask=live, other=_NO_ID)
        column = tl.min(tl.where(tops == top, column, _NO_ID), 0)
    if second is not None:
        runners = tl.load(record + _SECOND, mask=live, other=-_INF)
        runner_up = tl.max(tl.where(span == tl.min(tl.where(tops == top, span, SPANS), 0), runners, tops), 0)
    if distinct is not None:
        distinct += row * k

    if tail_lse is not None:
        tail = shift + tl.log(total)
        for first in range(0, k, WIDTH):
            slot = first + tl.arange(0, WIDTH)
            ids, z32 = _entries(line, distinct, slot, k, columns, scale, cap, inv_t, HEAD)
            z = z32.to(tl.float64)
            highest = tl.max(z, 0)
            if argmax is not None:
                lowest = tl.min(tl.where((ids >= 0) & (z == highest), ids, _NO_ID), 0).to(tl.float64)
                column = tl.where(highest > top, lowest, tl.where(highest == top, tl.minimum(column, lowest), column))
            if logit_sum is not None:
                sum_z += tl.sum(_finite_sum(z), 0)
                finite += tl.sum(_finite(z).to(tl.float64), 0)
            if second is not None:
                at = tl.min(tl.where(z == highest, slot, _NO_ID), 0)
                rest = tl.max(tl.where(slot == at, -_INF, z), 0)
                runner_up = tl.maximum(tl.maximum(runner_up, rest), tl.minimum(top, highest))
            higher = tl.maximum(top, highest)
            shift = tl.where(higher == -_INF, 0.0, higher)
            fall = tl.maximum(top - shift, _FAR)
            decay = tl.exp(fall)
            top = higher
            d = z - shift
            w = tl.exp(d)
            if expected_logit is not None:
                weighted = (weighted + fall * total) * decay + tl.sum(_weighted(w, d), 0)
            total = total * decay + tl.sum(w, 0)
            if lse_t1 is not None:
                total_t1 = total_t1 * tl.exp(t * fall) + tl.sum(tl.exp(t * d), 0)

    bad = total != total
    log_sum = shift + tl.log(total)
    if tail_lse is not None:
        tl.store(tail_lse + row, tl.where(bad, _NAN, tail))
    if lse is not None:
        tl.store(lse + row, log_sum)
    if expected_logit is not None:
        tl.store(expected_logit + row, shift + weighted / total)
    if lse_t1 is not None:
        tl.store(lse_t1 + row, tl.where(bad, _NAN, t * shift + tl.log(total_t1)))
    if logit_sum is not None:
        tl.store(logit_sum + row, tl.where(bad, _NAN, sum_z))
    if finite_count is not None:
        tl.store(finite_count + row, finite.to(tl.int64))
    if maximum is not None:
        tl.store(maximum + row, tl.where(bad, _NAN, top))
    if argmax is not None:
        tl.store(argmax + row, tl.where(bad, -1.0, column).to(tl.int64))
    if second is not None:
        tl.store(second + row, tl.where(bad, _NAN, runner_up))

    if distinct is not None:
        for first in range(0, k, WIDTH):
            slot = first + tl.arange(0, WIDTH)
            ids, bars = _entries(line, distinct, slot, k, columns, scale, cap, inv_t, HEAD)
            empty = ids < 0
            if gathered is not None:
                tl.store(gathered + row * k + slot, tl.where(bad, tl.where(empty, bars, _NAN), bars), mask=slot < k)
            if slots is not None:
                if thresholds is not None:
                    bars = tl.load(thresholds + row * k + slot, mask=slot < k, other=_INF)
                part = slots + ((row * n_spans + span)[:, None] * KEPT + slot[None, :]) * 2
                known = live[:, None] & (slot < KEPT)[None, :]
                above = tl.load(part, mask=known, other=0.0)
                scaled = tl.where(above == 0, 0.0, above * tl.exp(tops - log_sum)[:, None])
                mass = tl.sum(scaled, 0)
                count = tl.sum(tl.load(part + 1, mask=known, other=0.0), 0)
                if tail_lse is not None:
                    for left in range(0, k, WIDTH):
                        _, entry = _entries(line, distinct, left + tl.arange(0, WIDTH), k, columns, scale, cap, inv_t, HEAD)
                        over = entry[None, :] > bars[:, None]
                        q = tl.exp(entry.to(tl.float64) - log_sum)
                        mass += tl.sum(tl.where(over, q[None, :], 0.0), 1)
                        count += tl.sum(over.to(tl.float64), 1)
                if rank is not None:
                    tl.store(rank + row * k + slot, tl.where(bad, -1.0, tl.where(empty, -1.0, count)).to(tl.int64), mask=slot < k)
                if mass_above is not None:
                    tl.store(mass_above + row * k + slot, tl.where(bad, _NAN, tl.where(empty, _NAN, mass)), mask=slot < k)


# ------------------------------------------------------------------------------------------------ host


def forward_launches(
    logits: Tensor, ids: Tensor | None, thresholds: Tensor | None, head: Head, out: dict[str, Tensor], config: Config = CONFIG
) -> list[Launch]:
    """The launches that write the statistics named by `out`'s keys; the arguments are those of ``primitives.vocab_stats.reference``."""
    vocab = logits.shape[2]
    n = logits.shape[0] * logits.shape[1]
    k = 0 if ids is None else ids.shape[1]
    distinct, order, launches = ids, None, []
    if k:
        distinct, order, launches = ordered_ids(ids, vocab, "tail_lse" in out, config.counted_ids)
    per_slot = k > 0 and ("rank" in out or "mass_above" in out)
    chunk = min(triton.next_power_of_2(k), config.slots) if per_slot else 0
    chunks = triton.cdiv(k, chunk) if per_slot else 1
    stride_o, stride_i = row_strides(logits)
    itemsize = logits.element_size()
    aligned = all(offset * itemsize % config.vector_bytes == 0 for offset in (logits.storage_offset(), stride_o, stride_i))
    sizes = config.span(itemsize, aligned)
    n_spans = triton.cdiv(vocab, sizes["SPAN"])
    spans = torch.empty((n, n_spans, _FIELDS.value), dtype=torch.float64, device=logits.device)
    slots = torch.empty((n, n_spans, chunks * chunk, 2), dtype=torch.float64, device=logits.device) if per_slot else None
    if thresholds is not None:
        thresholds = thresholds.to(torch.float32).contiguous() if per_slot else None

    shared = {
        "logits": logits, "distinct": distinct, "thresholds": thresholds, "spans": spans, "slots": slots,
        "inner_rows": logits.shape[1], "stride_o": stride_o, "stride_i": stride_i, "n_spans": n_spans, "k": k,
    }  # fmt: skip
    heads = head_arguments(head, vocab)
    masked = heads.pop("MASKED")
    launches.append(
        Launch(
            _pass_kernel,
            n * n_spans * chunks,
            shared | heads | sizes | {
                "order": order, "vocab": vocab, "MASKED": masked, "EXPECTED": "expected_logit" in out,
                "LOGIT_SUM": "logit_sum" in out, "T1": "lse_t1" in out, "ARGMAX": "argmax" in out or "second" in out, "SECOND": "second" in out,
                "SLOTS": chunk, "CHUNKS": chunks,
            },
            config.num_warps,
        )
    )  # fmt: skip
    names = ("lse", "gathered", "tail_lse", "expected_logit", "logit_sum", "finite_count", "lse_t1", "argmax", "second", "rank", "mass_above")
    written = {name: out.get(name) for name in names} | {"maximum": out.get("max")}
    widths = {"SPANS": triton.next_power_of_2(n_spans), "WIDTH": config.entries, "KEPT": chunks * chunk}
    launches.append(Launch(_row_kernel, n, shared | heads | written | widths, 1))
    return launches


def vocab_stats(logits: Tensor, ids: Tensor | None, thresholds: Tensor | None, head: Head, out: dict[str, Tensor]) -> None:
    """As ``primitives.vocab_stats.reference``."""
    with on_device_of(logits):
        for launch in forward_launches(logits, ids, thresholds, head, out):
            launch.run()
