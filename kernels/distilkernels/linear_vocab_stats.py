"""``linear_vocab_stats`` in Triton: the statistics of hidden Wᵀ + bias from tiles of logits that exist in registers only.

Forward, 2·N·V·H FLOPs in two launches (and one for the ids, see ids.py):
    _span_kernel    a block of rows × a span of columns → maximum and sums over v ∉ S, and z at the ids in the span;
    _merge_kernel   the spans of a row and its K entries → the statistics, in double.
Memory: 4 bytes a span of 1,024 columns and statistic, and 4 an id, for each row. A row's bits depend on V, H, the dtype
and the device's configuration, not on N or its neighbours. The backward is in linear_vocab_stats_backward.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..primitives.head import Head
from .head import Launch, exp, head_arguments, on_device_of
from .ids import _NO_ID, ordered_ids
from .vocab_stats import _FAR, _INF, _NAN, _finite, _finite_sum, _weighted, _z

_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@dataclass(frozen=True)
class Config:
    """Tiles of the GEMMs. The reasons are for 16-bit operands on an H200 (228 KB of shared memory, 790 TFLOP/s)."""

    # a step of [128, 256] × 64 takes 0.7 µs of a multiprocessor's tensor cores and 48 KB from the L2: 9 TB/s over the device, where
    # [128, 128] would ask for 12. Its sums are 128 registers on 8 warps and leave as many for the statistics of the tile
    block_m: int = 128
    block_n: int = 256
    block_h: int = 64
    # 3 × 48 KB in flight; a fourth would leave no room for the reductions' scratch
    stages: int = 3
    num_warps: int = 8
    # programs that run at once share 16 row blocks (16 MB of hidden at H = 4,096) and about 8 spans: W is read N/2,048 times
    group: int = 16
    # 4 tiles: the statistics of a row are 8 bytes per 1,024 columns; 128 rows of 151,936 columns are still 149 programs
    span: int = 1024
    # columns whose d logits exist at once in the backward: 8 KB a token in 16 bits, as much as a hidden state of 4,096; d hidden
    # (float32) is read and written once a panel, 3 ms of 4.3 TB/s at N = 8,192 beside 60 ms
    panel: int = 4096
    # entries of a row handled at once in _merge_kernel, as in vocab_stats
    entries: int = 32


# wgmma: 255 registers hold a tile and the usual statistics of it
WIDE = Config()
# what needs more of them (see `heavy`), and tcgen05, whose sums come out of their own memory all at once
NARROW = Config(block_n=128)
# mma.sync, whose fragments share the registers with the sums; 48 KB of shared memory suit the smaller devices too
SHALLOW = Config(block_n=128, block_h=32, stages=4)
SMALL = Config(block_m=64, block_n=128, block_h=32, stages=4)
# float32 operands have no tensor cores at full precision: outer products in registers
FLOAT32 = Config(block_m=64, block_n=64, block_h=16, stages=3, num_warps=4)


def config_for(dtype: torch.dtype, major: int, heavy: bool) -> Config:
    """For operands of `dtype` on compute capability `major`; the choices are those that compile without spilling."""
    if dtype == torch.float32:
        return FLOAT32
    if major == 9:
        return NARROW if heavy else WIDE
    if major >= 10:
        return NARROW
    return SMALL if heavy else SHALLOW


def major_of(hidden: Tensor) -> int:
    """The compute capability's first number; consumer devices from 10 on are as small as those before 9."""
    if not hidden.is_cuda:
        return 0
    major, _ = torch.cuda.get_device_capability(hidden.device)
    return major if major in (9, 10) else 8


def heavy(names: Iterable[str], head: Head) -> bool:
    """Whether these statistics need more registers beside a tile than those of the losses and the entropy without softcap."""
    return head.softcap is not None or not {"argmax", "logit_sum", "lse_t1"}.isdisjoint(names)


# ---------------------------------------------------------------------------------------------- device


@triton.jit
def _dot(a, b, sums):
    """sums + a·b. NumPy has no bfloat16; in float32, products of 16-bit numbers are as exact as on a device."""
    if _INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision="ieee")


@triton.jit
def _grouped(program, row_blocks, others, GROUP: tl.constexpr):
    """(row block, other index): programs that follow each other share up to GROUP row blocks."""
    first = program // (GROUP * others) * GROUP
    size = tl.minimum(row_blocks - first, GROUP)
    within = program % (GROUP * others)
    return first + within % size, within // size


@triton.jit
def _logits_tile(
    hidden, weight, bias, row, n, column, columns, h, stride_h, stride_w,
    EVEN_H: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The logits of rows from `row` and columns from `column` on, float32; beyond the last, it is repeated.

    Addresses are a scalar and 32-bit offsets in the tile, which spare 24 registers. The backward runs the same, for the same bits.
    """
    lanes = tl.arange(0, BLOCK_H)
    lines = tl.minimum(tl.arange(0, BLOCK_M), n - 1 - row)
    across = tl.minimum(tl.arange(0, BLOCK_N), columns - 1 - column)
    left = lines[:, None] * stride_h + lanes[None, :]
    right = across[None, :] * stride_w + lanes[:, None]
    hidden += tl.cast(row, tl.int64) * stride_h
    weight += tl.cast(column, tl.int64) * stride_w
    x = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in tl.range(0, h, BLOCK_H, num_stages=STAGES):
        if EVEN_H:
            x = _dot(tl.load(hidden + left), tl.load(weight + right), x)
        else:
            inside = first + lanes < h
            x = _dot(tl.load(hidden + left, mask=inside[None, :], other=0.0), tl.load(weight + right, mask=inside[:, None], other=0.0), x)
        hidden += BLOCK_H
        weight += BLOCK_H
    if bias is not None:
        x += tl.load(bias + column + across).to(tl.float32)[None, :]
    return x


@triton.jit
def _first_at(order, here, start, k, STEP: tl.constexpr):
    """How many ids of each row are below `start`; `here` is where a row's ascending ids begin."""
    at = tl.zeros(here.shape, tl.int32)
    for first in range(0, k, STEP):
        slot = first + tl.arange(0, STEP)
        ids = tl.load(order + here[:, None] + slot[None, :], mask=(slot < k)[None, :], other=_NO_ID)
        at += tl.sum((ids < start).to(tl.int32), 1)
    return at


@triton.jit
def _hits(following, base, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """[BLOCK_M, BLOCK_N]: whether a column, counted from `base`, is the row's next id.

    Column 8j + r of a tile of sums lies in register j of a thread that knows its r, so each comparison is with a constant;
    comparing columns as such keeps 64 of them in registers, which spill.
    """
    ahead = following - base
    lanes = tl.arange(0, 8)
    aim = tl.where((ahead % 8)[:, None, None] == lanes[None, None, :], (ahead // 8)[:, None, None], -1)
    return tl.reshape(aim == tl.arange(0, BLOCK_N // 8)[None, :, None], [BLOCK_M, BLOCK_N])


@triton.jit
def _span_kernel(
    hidden, weight, bias, order, entries, tops, sums, sums_weighted, sums_t1, sums_logits, finites, best,
    n, h, columns, stride_h, stride_w, row_blocks, n_spans, k, scale, cap, inv_t, t,
    HEAD: tl.constexpr, EVEN_H: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
    SPAN: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sums over a span of columns without the ids in `order`, each row's relative to its maximum there.

    The rows of a tile hold their ids at different columns: each row takes its next id out at the same time, so a tile
    costs as many sweeps over its registers as its fullest row has ids, mostly one or two, and not one an id.
    """
    block, span = _grouped(tl.program_id(0), row_blocks, n_spans, GROUP)
    lines = block * BLOCK_M + tl.arange(0, BLOCK_M)
    # rows beyond the last repeat it and are not stored
    rows = tl.minimum(lines, n - 1).to(tl.int64)
    start = span * SPAN
    if order is not None:
        here = rows * k
        at = _first_at(order, here, start, k, 16)
        following = tl.load(order + here + at, mask=at < k, other=_NO_ID)

    top = tl.full([BLOCK_M], -_INF, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if sums_weighted is not None:
        weighted = tl.zeros([BLOCK_M], tl.float32)
    if sums_t1 is not None:
        total_t1 = tl.zeros([BLOCK_M], tl.float32)
    if sums_logits is not None:
        logit_sum = tl.zeros([BLOCK_M], tl.float32)
        finite = tl.zeros([BLOCK_M], tl.int32)
    if best is not None:
        column = tl.full([BLOCK_M], _NO_ID, tl.int32)

    for base in range(start, tl.minimum(start + SPAN, columns), BLOCK_N):
        offs = base + tl.arange(0, BLOCK_N)
        x = _logits_tile(hidden, weight, bias, block * BLOCK_M, n, base, columns, h, stride_h, stride_w, EVEN_H, BLOCK_M, BLOCK_N, BLOCK_H, STAGES)
        z = tl.where((offs < columns)[None, :], _z(x, scale, cap, inv_t, HEAD), -_INF)
        if order is not None:
            while tl.min(following, 0) < base + BLOCK_N:
                hit = _hits(following, base, BLOCK_M, BLOCK_N)
                inside = following < base + BLOCK_N
                tl.store(entries + here + at, tl.sum(tl.where(hit, z, 0.0), 1), mask=inside & (lines < n))
                z = tl.where(hit, -_INF, z)
                at += inside.to(tl.int32)
                following = tl.load(order + here + at, mask=at < k, other=_NO_ID)

        highest = tl.max(z, 1)
        if best is not None:
            lowest = tl.min(tl.where(z == highest[:, None], offs[None, :], _NO_ID), 1)
            column = tl.where(highest > top, lowest, column)
        higher = tl.maximum(top, highest)
        shift = tl.where(higher == -_INF, 0.0, higher)
        fall = tl.maximum(top - shift, _FAR)
        decay = exp(fall)
        top = higher
        d = z - shift[:, None]
        w = exp(d)
        if sums_weighted is not None:
            weighted = (weighted + fall * total) * decay + tl.sum(_weighted(w, d), 1)
        total = total * decay + tl.sum(w, 1)
        if sums_t1 is not None:
            total_t1 = total_t1 * exp(t * fall) + tl.sum(exp(t * d), 1)
        if sums_logits is not None:
            logit_sum += tl.sum(_finite_sum(z), 1)
            finite += tl.sum(_finite(z).to(tl.int32), 1)

    place = rows * n_spans + span
    stored = lines < n
    tl.store(tops + place, top, mask=stored)
    tl.store(sums + place, total, mask=stored)
    if sums_weighted is not None:
        tl.store(sums_weighted + place, weighted, mask=stored)
    if sums_t1 is not None:
        tl.store(sums_t1 + place, total_t1, mask=stored)
    if sums_logits is not None:
        tl.store(sums_logits + place, logit_sum, mask=stored)
        tl.store(finites + place, finite, mask=stored)
    if best is not None:
        tl.store(best + place, column, mask=stored)


@triton.jit
def _entries_of(order, entries, slot, k, columns):
    """(ids, z) at some places of a row's ascending ids; a repetition is _NO_ID, and z is −inf there and at masked columns."""
    ids = tl.load(order + slot, mask=slot < k, other=_NO_ID)
    before = tl.load(order + slot - 1, mask=(slot > 0) & (slot <= k), other=-1)
    ids = tl.where(ids == before, _NO_ID, ids)
    return ids, tl.load(entries + slot, mask=ids < columns, other=-_INF).to(tl.float64)


@triton.jit
def _merge_kernel(
    order, distinct, entries, tops, sums, sums_weighted, sums_t1, sums_logits, finites, best,
    lse, gathered, tail_lse, expected_logit, logit_sum, finite_count, lse_t1, maximum, argmax,
    columns, n_spans, k, t, SPANS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The statistics of one row in double, relative to its maximum over spans and entries."""
    row = tl.program_id(0).to(tl.int64)
    span = tl.arange(0, SPANS)
    live = span < n_spans
    place = row * n_spans + span
    peaks = tl.load(tops + place, mask=live, other=-_INF).to(tl.float64)
    parts = tl.load(sums + place, mask=live, other=0.0).to(tl.float64)
    top = tl.max(peaks, 0)
    tail_shift = tl.where(top == -_INF, 0.0, top)
    tail = tail_shift + tl.log(tl.sum(parts * tl.exp(tl.maximum(peaks - tail_shift, _FAR)), 0))
    if order is not None:
        order += row * k
        entries += row * k
        for first in range(0, k, WIDTH):
            _, z = _entries_of(order, entries, first + tl.arange(0, WIDTH), k, columns)
            top = tl.maximum(top, tl.max(z, 0))

    shift = tl.where(top == -_INF, 0.0, top)
    falls = tl.maximum(peaks - shift, _FAR)
    decays = tl.exp(falls)
    total = tl.sum(parts * decays, 0)
    if expected_logit is not None:
        weighted = tl.sum((tl.load(sums_weighted + place, mask=live, other=0.0) + falls * parts) * decays, 0)
    if lse_t1 is not None:
        total_t1 = tl.sum(tl.load(sums_t1 + place, mask=live, other=0.0) * tl.exp(t * falls), 0)
    if logit_sum is not None:
        sum_z = tl.sum(tl.load(sums_logits + place, mask=live, other=0.0).to(tl.float64), 0)
        finite = tl.sum(tl.load(finites + place, mask=live, other=0), 0)
    if argmax is not None:
        column = tl.load(best + place, mask=live, other=_NO_ID)
        column = tl.min(tl.where(peaks == top, column, _NO_ID), 0)
    if order is not None:
        for first in range(0, k, WIDTH):
            ids, z = _entries_of(order, entries, first + tl.arange(0, WIDTH), k, columns)
            d = z - shift
            w = tl.exp(d)
            total += tl.sum(w, 0)
            if expected_logit is not None:
                weighted += tl.sum(_weighted(w, d), 0)
            if lse_t1 is not None:
                total_t1 += tl.sum(tl.exp(t * d), 0)
            if logit_sum is not None:
                sum_z += tl.sum(_finite_sum(z), 0)
                finite += tl.sum(_finite(z).to(tl.int32), 0)
            if argmax is not None:
                column = tl.minimum(column, tl.min(tl.where((ids < columns) & (z == top), ids, _NO_ID), 0))

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
        tl.store(finite_count + row, finite.to(tl.int64))
    if maximum is not None:
        tl.store(maximum + row, tl.where(bad, _NAN, top))
    if argmax is not None:
        tl.store(argmax + row, tl.where(bad, -1, column).to(tl.int64))
    if gathered is not None:
        distinct += row * k
        for first in range(0, k, WIDTH):
            slot = first + tl.arange(0, WIDTH)
            id = tl.load(distinct + slot, mask=slot < k, other=-1)
            value = tl.zeros([WIDTH], tl.float64)
            for sorted in range(0, k, WIDTH):
                ids, z = _entries_of(order, entries, sorted + tl.arange(0, WIDTH), k, columns)
                value += tl.sum(tl.where(id[:, None] == ids[None, :], z[None, :], 0.0), 1)
            value = tl.where(id < 0, -_INF, tl.where(bad, _NAN, value))
            tl.store(gathered + row * k + slot, value.to(tl.float32), mask=slot < k)


# ------------------------------------------------------------------------------------------------ host


def tiles(hidden: Tensor, config: Config) -> dict[str, object]:
    """The arguments of :func:`_logits_tile` and of the order of programs."""
    n, h = hidden.shape
    return {
        "hidden": hidden, "n": n, "h": h, "stride_h": hidden.stride(0), "row_blocks": triton.cdiv(n, config.block_m),
        "EVEN_H": h % config.block_h == 0, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_H": config.block_h,
        "GROUP": config.group, "STAGES": config.stages,
    }  # fmt: skip


def forward_launches(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor | None, head: Head, out: dict[str, Tensor],
    config: Config | None = None,
) -> list[Launch]:  # fmt: skip
    """The launches of :func:`linear_vocab_stats`."""
    config = config or config_for(hidden.dtype, major_of(hidden), heavy(out, head))
    n, vocab = hidden.shape[0], weight.shape[0]
    k = ids.shape[1] if ids is not None and ("gathered" in out or "tail_lse" in out) else 0
    distinct, order, launches = ordered_ids(ids, vocab, True) if k else (None, None, [])
    heads = head_arguments(head, vocab)
    columns, t = heads["columns"], heads["t"]
    n_spans = triton.cdiv(columns, config.span)

    def partial(name: str, dtype: torch.dtype = torch.float32) -> Tensor | None:
        return torch.empty((n, n_spans), dtype=dtype, device=hidden.device) if name in out else None

    shared = {
        "order": order, "entries": torch.empty((n, k), device=hidden.device) if k else None,
        "tops": torch.empty((n, n_spans), device=hidden.device), "sums": torch.empty((n, n_spans), device=hidden.device),
        "sums_weighted": partial("expected_logit"), "sums_t1": partial("lse_t1"), "sums_logits": partial("logit_sum"),
        "finites": partial("logit_sum", torch.int32), "best": partial("argmax", torch.int32), "n_spans": n_spans, "k": k,
    }  # fmt: skip
    tile = tiles(hidden, config)
    del heads["MASKED"]
    arguments = {"weight": weight, "bias": bias, "stride_w": weight.stride(0), "SPAN": config.span}
    launches.append(Launch(_span_kernel, tile["row_blocks"] * n_spans, shared | tile | heads | arguments, config.num_warps))
    names = ("lse", "gathered", "tail_lse", "expected_logit", "logit_sum", "finite_count", "lse_t1", "argmax")
    written = {name: out.get(name) for name in names} | {"maximum": out.get("max"), "gathered": out.get("gathered") if k else None}
    sizes = {"distinct": distinct, "columns": columns, "t": t, "SPANS": triton.next_power_of_2(n_spans), "WIDTH": config.entries}
    launches.append(Launch(_merge_kernel, n, shared | written | sizes, 2))
    return launches


def linear_vocab_stats(hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor | None, head: Head, out: dict[str, Tensor]) -> None:
    """Writes the statistics named by `out`'s keys (not rank nor mass_above) of hidden Wᵀ + bias.

    hidden [N, H] and weight [V, H] of one dtype, both with last stride 1; bias [V] of any; ids [N, K] contiguous. The outputs
    are those of ``primitives.vocab_stats.reference``: N doubles each, gathered [N, K] float32.
    """
    if hidden.shape[0]:
        with on_device_of(hidden):
            for launch in forward_launches(hidden, weight, bias, ids, head, out):
                launch.run()
