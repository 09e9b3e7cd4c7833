"""``window_importance`` in Triton: two passes over the keys, or one with a given lse, and the cosine sums from the same tiles.

    _lse_kernel      chunk of keys × block of queries → maximum and Σ 2^(x − max) of each softmax row over the chunk
    _scores_kernel   chunk of keys → their scores: joins the chunks' sums in one order, then every query of the window
A tile of queries holds a few window positions with the whole query group side by side, so the group is reduced inside a thread
or between four, and a key is read once for all heads that share it. Logits are in units of log 2.

At B = 8, Hkv = 8, Hq = 32, T = 8,192, D = 128, W = 32 in 16 bits: 134 MB a pass, 31 µs at 4.3 TB/s, and 17 GFLOP a pass, 22 µs
at 790 TFLOP/s: 63 µs in two passes, 32 with a given lse. The cosine sums add no bytes in two passes. In float32 the products are
fused multiplications and additions, 0.26 ms a pass at 67 TFLOP/s: both sides come a few features at a time, from the L1 after the
first block of queries, and the keys' norms from a second look at them there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..primitives.key_redundancy import Redundancy
from ..primitives.window_importance import Scoring, Similarity
from . import key_redundancy
from .head import Launch, on_device_of
from .key_redundancy import counted_keys, key_tile, summed_parts, unit_scale
from .linear_vocab_stats import _dot
from .vocab_stats import _INF

_LOG2E = math.log2(math.e)
_OF_LOGITS = tl.constexpr(_LOG2E)


@dataclass(frozen=True)
class Config:
    """Launch configuration; the reasons are for an H200 and hold on other recent devices."""

    # 64 keys by 128 queries are 32 registers a thread of 8 warps, and the keys in float32 as many; 128 keys spill. Keys wider than 128
    # come in halves, for shared memory
    num_warps: int = 8
    keys: int = 64
    queries: int = 128
    # a softmax row each where heads have no group: the maxima, sums and causal ends of 128 rows spill with tcgen05
    positions: int = 64
    wide: int = 128
    # a head wider than this passes through the registers in steps
    widest: int = 256
    wide_step: int = 128
    # rows of no alignment are read an element at a time, with an address for each: fewer features at once, and half the keys
    odd_step: int = 32
    # float32 goes without tensor cores: 16 sums a thread, and the (4 + 4)·8 operands of a step, 4 KB for 33k multiplications; all
    # features at once would be 1,000 registers, and 16 still spill
    float_tile: int = 64
    float_step: int = 8
    # one program a multiprocessor may have all the registers: its two key tiles under way are 4 MB over the device, more than
    # 4.3 TB/s · 0.7 µs. With 128 some spill
    registers: int = 255
    # eight programs a head at T = 8,192: four for each multiprocessor at 64 heads; a program reads its queries once for them
    chunk: int = 1024

    def tile(self, dtype: torch.dtype, width: int, window: int, group: int, aligned: bool) -> tuple[int, int, int]:
        """Keys, window positions of a padded group, and features of a step."""
        keys, queries, step = self.keys, self.queries, width if width <= self.widest else self.wide_step
        if dtype == torch.float32:
            keys, queries, step = self.float_tile, self.float_tile, self.float_step
        elif not aligned:
            step = min(self.odd_step, width)
        elif width > self.wide:
            keys, queries = keys // 2, queries // 2
        if not aligned:
            keys //= 2
        return keys, max(min(triton.next_power_of_2(window), queries // group, self.positions), 16 // group, 1), step


CONFIG = Config()


@triton.jit
def _heard(query_mask, b, w, window):
    """Which window positions count."""
    heard = w < window
    if query_mask is not None:
        heard = heard & (tl.load(query_mask + b * window + w, mask=heard, other=0) != 0)
    return heard


@triton.jit
def _query_tile(queries, heard, w, g, groups, d, stride_h, stride_w, WIDTH: tl.constexpr, first=0):
    """Queries [N, WIDTH] at (w, g) from feature `first`, 0 for those that do not count."""
    feature = first + tl.arange(0, WIDTH)
    at = g.to(tl.int64)[:, None] * stride_h + w.to(tl.int64)[:, None] * stride_w + feature[None, :]
    return tl.load(queries + at, mask=(heard & (g < groups))[:, None] & (feature < d)[None, :], other=0.0)


@triton.jit
def _stepped_products(
    queries, line, heard, w, g, groups, place, read, d, stride_h, stride_w, stride_t, KEYS: tl.constexpr, N: tl.constexpr, STEP: tl.constexpr
):  # fmt: skip
    """k·q [KEYS, N], with STEP features of both sides in registers at a time."""
    sums = tl.zeros([KEYS, N], tl.float32)
    for first in range(0, d, STEP):
        k = key_tile(line, place, read, d, stride_t, STEP, first)
        sums = _dot(k, tl.trans(_query_tile(queries, heard, w, g, groups, d, stride_h, stride_w, STEP, first)), sums)
    return sums


@triton.jit
def _logits(products, g, groups, scale, KEYS: tl.constexpr, WINDOW: tl.constexpr, GROUP: tl.constexpr, MAX_LOGITS: tl.constexpr):
    """x [KEYS, N] in units of log 2, or their maximum over the group [KEYS, WINDOW]."""
    x = products * scale
    if MAX_LOGITS and GROUP > 1:
        x = tl.max(tl.reshape(tl.where((g < groups)[None, :], x, -_INF), [KEYS, WINDOW, GROUP]), 2)
    return x


@triton.jit
def _lse_kernel(
    queries, keys, start, stop, mask, query_mask, maxima, sums, parts, near_start, near_stop, heads, groups, window, t, d, chunks, blocks, scale,
    stride_qb, stride_qh, stride_qw, stride_kb, stride_kh, stride_kt,
    CAUSAL: tl.constexpr, MAX_LOGITS: tl.constexpr, CHUNK: tl.constexpr, KEYS: tl.constexpr, WINDOW: tl.constexpr, GROUP: tl.constexpr,
    WIDTH: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """maxima, sums [B·Hkv, chunks, softmax rows], and with `parts` [B·Hkv, chunks, WIDTH] Σ k̂. Program = (head, chunk, block)."""
    ROWS: tl.constexpr = WINDOW if MAX_LOGITS else WINDOW * GROUP
    program = tl.program_id(0)
    block, chunk = program % blocks, program // blocks % chunks
    head = (program // blocks // chunks).to(tl.int64)
    b, h = head // heads, head % heads
    n = tl.arange(0, WINDOW * GROUP)
    w, g = block * WINDOW + n // GROUP, n % GROUP
    queries += b * stride_qb + h * groups * stride_qh
    heard = _heard(query_mask, b, w, window)
    if STEP == WIDTH:
        q = _query_tile(queries, heard, w, g, groups, d, stride_qh, stride_qw, WIDTH)
    line = keys + b * stride_kb + h * stride_kh
    row = tl.arange(0, ROWS)
    last = tl.load(stop + b) - window + block * WINDOW + (row if MAX_LOGITS else row // GROUP)
    top, total = tl.full([ROWS], -_INF, tl.float32), tl.zeros([ROWS], tl.float32)
    unit = tl.zeros([WIDTH], tl.float32)
    for first in range(0, CHUNK, KEYS):
        place = chunk * CHUNK + first + tl.arange(0, KEYS)
        seen = counted_keys(start, stop, mask, b, place, t)
        read = seen
        if parts is not None:
            near = counted_keys(near_start, near_stop, mask, b, place, t)
            read = seen | near
        if STEP == WIDTH:
            k = key_tile(line, place, read, d, stride_kt, WIDTH)
            products = _dot(k, tl.trans(q), tl.zeros([KEYS, WINDOW * GROUP], tl.float32))
        else:
            products = _stepped_products(
                queries, line, heard, w, g, groups, place, read, d, stride_qh, stride_qw, stride_kt, KEYS, WINDOW * GROUP, STEP
            )
        visible = seen[:, None]
        if CAUSAL:
            visible = visible & (place[:, None] <= last[None, :])
        x = tl.where(visible, _logits(products, g, groups, scale, KEYS, WINDOW, GROUP, MAX_LOGITS), -_INF)
        higher = tl.maximum(top, tl.max(x, 0))
        shift = tl.where(higher == -_INF, 0.0, higher)
        total = total * tl.exp2(top - shift) + tl.sum(tl.exp2(x - shift[None, :]), 0)
        top = higher
        if parts is not None:
            if STEP != WIDTH:
                k = key_tile(line, place, near, d, stride_kt, WIDTH)
            k = k.to(tl.float32)
            unit += tl.sum(tl.where(near[:, None], k * unit_scale(k, near)[:, None], 0.0), 0)
    at = ((head * chunks + chunk) * blocks + block) * ROWS + row
    tl.store(maxima + at, top)
    tl.store(sums + at, total)
    if parts is not None:
        if block == 0:
            tl.store(parts + (head * chunks + chunk) * WIDTH + tl.arange(0, WIDTH), unit)


@triton.jit
def _joined_lse(maxima, sums, chunks, stride, ROWS: tl.constexpr):
    """log2 Σ 2^x of softmax rows over all chunks, −inf where a row has no key."""
    row = tl.arange(0, ROWS)
    top, total = tl.full([ROWS], -_INF, tl.float32), tl.zeros([ROWS], tl.float32)
    for chunk in range(0, chunks):
        at = chunk * stride + row
        other = tl.load(maxima + at)
        higher = tl.maximum(top, other)
        shift = tl.where(higher == -_INF, 0.0, higher)
        total = total * tl.exp2(top - shift) + tl.load(sums + at) * tl.exp2(other - shift)
        top = higher
    return tl.where(total > 0, top + tl.log2(tl.where(total > 0, total, 1.0)), -_INF)


@triton.jit
def _softmax_rows(
    heard, w, g, query_mask, lse, maxima, sums, b, block, groups, window, chunks, blocks,
    MAX_LOGITS: tl.constexpr, WINDOW: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Of each softmax row of a block of queries the lse in units of log 2, and whether it has probabilities at all."""
    if MAX_LOGITS:
        heard = _heard(query_mask, b, block * WINDOW + tl.arange(0, WINDOW), window)
        rows = _joined_lse(maxima + block * WINDOW, sums + block * WINDOW, chunks, blocks * WINDOW, WINDOW)
    else:
        heard = heard & (g < groups)
        if lse is not None:
            rows = tl.load(lse + g * window + w, mask=heard, other=0.0) * _OF_LOGITS
        else:
            rows = _joined_lse(maxima + block * WINDOW * GROUP, sums + block * WINDOW * GROUP, chunks, blocks * WINDOW * GROUP, WINDOW * GROUP)
    return rows, heard & (rows != -_INF)


@triton.jit
def _scores_kernel(
    queries, keys, start, stop, mask, query_mask, lse, maxima, sums, out, parts, near_start, near_stop, similarity,
    heads, groups, window, t, d, chunks, blocks, scale, stride_qb, stride_qh, stride_qw, stride_kb, stride_kh, stride_kt,
    CAUSAL: tl.constexpr, GROUP_REDUCE: tl.constexpr, WINDOW_REDUCE: tl.constexpr, ONE: tl.constexpr, CHUNK: tl.constexpr,
    KEYS: tl.constexpr, WINDOW: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """out [B, Hkv or Hq, T], and with `parts` the cosine sums [B, Hkv, T]. Program = (head, chunk); ONE: a single block of queries."""
    MAX_LOGITS: tl.constexpr = GROUP_REDUCE == "max_logits"
    program = tl.program_id(0)
    chunk = program % chunks
    head = (program // chunks).to(tl.int64)
    b, h = head // heads, head % heads
    queries += b * stride_qb + h * groups * stride_qh
    line = keys + b * stride_kb + h * stride_kh
    if lse is not None:
        lse += head * groups * window
    else:
        rows_a_chunk = blocks * (WINDOW if MAX_LOGITS else WINDOW * GROUP)
        maxima += head * chunks * rows_a_chunk
        sums += head * chunks * rows_a_chunk
    n = tl.arange(0, WINDOW * GROUP)
    w, g = n // GROUP, n % GROUP
    last = tl.load(stop + b) - window + (tl.arange(0, WINDOW) if MAX_LOGITS else w)
    count = 0
    for block in range(0, blocks):
        count += tl.sum(_heard(query_mask, b, block * WINDOW + tl.arange(0, WINDOW), window).to(tl.int32), 0)
    share = 1.0 / tl.maximum(count, 1).to(tl.float32) if WINDOW_REDUCE == "mean" else 1.0
    if ONE:
        heard = _heard(query_mask, b, w, window)
        rows, sure = _softmax_rows(heard, w, g, query_mask, lse, maxima, sums, b, 0, groups, window, chunks, blocks, MAX_LOGITS, WINDOW, GROUP)
        if STEP == WIDTH:
            q = _query_tile(queries, heard, w, g, groups, d, stride_qh, stride_qw, WIDTH)
    if parts is not None:
        unit_sum = summed_parts(parts + head * chunks * WIDTH, chunks, WIDTH)
    for first in range(0, CHUNK, KEYS):
        place = chunk * CHUNK + first + tl.arange(0, KEYS)
        seen = counted_keys(start, stop, mask, b, place, t)
        read = seen
        if parts is not None:
            near = counted_keys(near_start, near_stop, mask, b, place, t)
            read = seen | near
        if STEP == WIDTH:
            k = key_tile(line, place, read, d, stride_kt, WIDTH)
        # of one query head each, or of the group
        score = tl.zeros([KEYS, GROUP if GROUP_REDUCE == "none" else 1], tl.float32)
        for block in range(0, blocks):
            position = block * WINDOW + w
            if not ONE:
                heard = _heard(query_mask, b, position, window)
                rows, sure = _softmax_rows(
                    heard, position, g, query_mask, lse, maxima, sums, b, block, groups, window, chunks, blocks, MAX_LOGITS, WINDOW, GROUP
                )
                if STEP == WIDTH:
                    q = _query_tile(queries, heard, position, g, groups, d, stride_qh, stride_qw, WIDTH)
            if STEP == WIDTH:
                products = _dot(k, tl.trans(q), tl.zeros([KEYS, WINDOW * GROUP], tl.float32))
            else:
                products = _stepped_products(
                    queries, line, heard, position, g, groups, place, read, d, stride_qh, stride_qw, stride_kt, KEYS, WINDOW * GROUP, STEP
                )
            visible = seen[:, None] & sure[None, :]
            if CAUSAL:
                visible = visible & (place[:, None] <= (last + block * WINDOW)[None, :])
            x = _logits(products, g, groups, scale, KEYS, WINDOW, GROUP, MAX_LOGITS)
            p = tl.where(visible, tl.exp2(x - rows[None, :]), 0.0)
            if GROUP_REDUCE == "none":
                p = tl.reshape(p, [KEYS, WINDOW, GROUP])
            else:
                if GROUP_REDUCE == "max_probs":
                    p = tl.max(tl.reshape(p, [KEYS, WINDOW, GROUP]), 2)
                elif GROUP_REDUCE == "mean_probs":
                    p = tl.sum(tl.reshape(p, [KEYS, WINDOW, GROUP]), 2) / groups
                p = tl.reshape(p, [KEYS, WINDOW, 1])
            if WINDOW_REDUCE == "max":
                score = tl.maximum(score, tl.max(p, 1))
            else:
                score += tl.sum(p, 1)
        if GROUP_REDUCE == "none":
            lane = tl.arange(0, GROUP)
            at = (head * groups + lane)[None, :] * t + place[:, None]
            tl.store(out + at, score * share, mask=(place < t)[:, None] & (lane < groups)[None, :])
        else:
            tl.store(out + head * t + place, tl.sum(score, 1) * share, mask=place < t)
        if parts is not None:
            if STEP != WIDTH:
                k = key_tile(line, place, near, d, stride_kt, WIDTH)
            k = k.to(tl.float32)
            unit = tl.where(near[:, None], k * unit_scale(k, near)[:, None], 0.0)
            tl.store(similarity + head * t + place, tl.sum(unit * unit_sum[None, :], 1) - tl.sum(unit * unit, 1), mask=place < t)


# ------------------------------------------------------------------------------------------------ host


def launches(
    queries: Tensor, keys: Tensor, start: Tensor, stop: Tensor, mask: Tensor | None, query_mask: Tensor | None, how: Scoring,
    lse: Tensor | None, out: Tensor, similarity: Similarity | None = None, config: Config = CONFIG,
) -> list[Launch]:  # fmt: skip
    """The launches that write `out` and `similarity`; the arguments are those of ``primitives.window_importance.reference``."""
    (b, heads, t, d), (query_heads, window) = keys.shape, queries.shape[1:3]
    groups, width = query_heads // heads, max(triton.next_power_of_2(d), 16)
    group = triton.next_power_of_2(groups)
    aligned = key_redundancy.aligned(keys) and key_redundancy.aligned(queries)
    tile, positions, step = config.tile(keys.dtype, width, max(window, 1), group, aligned)
    chunks, blocks = triton.cdiv(t, config.chunk), triton.cdiv(window, positions)
    names = [f"stride_{side}" for side in ("qb", "qh", "qw", "kb", "kh", "kt")]
    max_logits = how.group_reduce == "max_logits"
    shared = {
        "queries": queries, "keys": keys, "start": start, "stop": stop, "mask": mask, "query_mask": query_mask, "heads": heads,
        "groups": groups, "window": window, "t": t, "d": d, "chunks": chunks, "blocks": blocks, "scale": how.scale * _LOG2E,
        "CAUSAL": how.causal, "CHUNK": config.chunk, "KEYS": tile, "WINDOW": positions, "GROUP": group, "WIDTH": width, "STEP": step,
    } | dict(zip(names, (*queries.stride()[:3], *keys.stride()[:3])))  # fmt: skip
    found, maxima, sums, parts, span = [], None, None, None, (None, None)
    make = lambda *shape: torch.empty(shape, dtype=torch.float32, device=keys.device)
    if similarity is not None:
        if lse is not None or window == 0 or width > config.widest:
            # one pass alone does not know ŝ yet
            found += key_redundancy.launches(keys, similarity.start, similarity.stop, mask, 0.0, Redundancy(similarity.out))
        else:
            parts, span = make(b * heads, chunks, width), similarity[:2]
    sums_of_keys = {"parts": parts, "near_start": span[0], "near_stop": span[1]}
    if lse is None:
        rows = blocks * positions * (1 if max_logits else group)
        maxima, sums = make(b * heads, chunks, rows), make(b * heads, chunks, rows)
        first = shared | sums_of_keys | {"maxima": maxima, "sums": sums, "MAX_LOGITS": max_logits}
        if blocks:
            found.append(Launch(_lse_kernel, b * heads * chunks * blocks, first, config.num_warps, config.registers))
    second = shared | sums_of_keys | {
        "lse": lse, "maxima": maxima, "sums": sums, "out": out, "similarity": similarity.out if parts is not None else None,
        "GROUP_REDUCE": how.group_reduce, "WINDOW_REDUCE": how.window_reduce, "ONE": blocks == 1,
    }  # fmt: skip
    found.append(Launch(_scores_kernel, b * heads * chunks, second, config.num_warps, config.registers))
    return found


def window_importance(
    queries: Tensor, keys: Tensor, start: Tensor, stop: Tensor, mask: Tensor | None, query_mask: Tensor | None, how: Scoring,
    lse: Tensor | None, out: Tensor, similarity: Similarity | None = None,
) -> None:  # fmt: skip
    """As ``primitives.window_importance.reference``."""
    with on_device_of(keys):
        for launch in launches(queries, keys, start, stop, mask, query_mask, how, lse, out, similarity):
            launch.run()
