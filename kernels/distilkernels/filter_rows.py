"""``filter_rows`` in Triton: one read of the logits, then of every row that is filtered the tiles that can hold its bar. Two
launches and no wait for the device.

    _records_kernel  row → largest entry, Σ e^d and Σ d·e^d of each tile, d = (x − largest)/T: the only read of the whole row;
    _filter_kernel   row → lse and expected of all columns; where filters are on, the bar, and both sums above it.
The bar of top_k or top_p is the largest t for which the columns x ≥ t are k, or have the mass p: a search on the keys of float32,
three bars a round. What the records tell of a tile is a lower bound of its count and of its mass above t, so they alone bring the
search near the bar, and only tiles whose largest entry reaches it are read again, every round, from cache. 16-bit logits have 16
or 19 bits of key, at most 10 rounds; float32 at most 16; fewer where one entry is left between the bars sooner. min_p has its bar by a
formula.

Bytes at V = 151,936 in 16 bits, of the row's 303,872: read 1.000, records written 0.047 and read 0.047 (and 0.047 again from
cache a search); scratch 16 bytes a tile, 19,200 a row. A row without filters, or at T = 0, costs one tile more. With top_k = 50 at most
50 tiles, but for equal ones, are read again, 0.042 a round from cache; a row as flat as its own nucleus reads all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..primitives.filter_rows import Filters
from . import tiles
from .head import Launch, exp, on_device_of, row_offset, row_strides
from .tiles import finite_or_0, loaded
from .topk_select import _EMPTY_BITS, _keys, _order_of
from .vocab_stats import _FAR, _INF, _NAN

# inverse temperatures outside are these: 0·∞ in the exponents of finite logits would be NaN
_SMALLEST, _LARGEST = tl.constexpr(2.0**-126), tl.constexpr(2.0**127)


@dataclass(frozen=True)
class Config:
    """Launch configuration of _filter_kernel."""

    # the tiles of a row are as wide as if these many were read again: usual top_k, and the nuclei of likely tokens
    again: int = 64
    # records a warp: three fields of 8 a thread
    records: int = 256
    fewest_warps: int = 8
    most_warps: int = 16
    # logits a warp and step through the chosen tiles: 8 a thread, with their keys, exponentials and three sums; 16 spill, and a step
    # that depended on how a row lies in memory would change its bits
    step: int = 256
    # of a key range of 2^24 (all maxima positive) 2^12 are left: a 4096th of a binade, far closer than tiles tell
    rounds: int = 12


CONFIG = Config()


@triton.jit
def inverse_of(temperature):
    """fp32 1/T of a double; 1 for T = 0, whose sums no one looks at."""
    inverse = 1.0 / tl.where(temperature == 0.0, 1.0, temperature)
    return tl.minimum(tl.maximum(inverse, _SMALLEST), _LARGEST).to(tl.float32)


@triton.jit
def _fall(x, top, inv_t):
    """(x − top)/T where top is finite and not below: in [−1e30, 0]."""
    return tl.maximum((x - top) * inv_t, _FAR)


@triton.jit
def _records_kernel(
    logits, chosen_rows, temperature, records,
    columns, inner_rows, stride_o, stride_i, n_spans, n_tiles, field,
    TILE: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """records [N, 3, field ≥ n_tiles] as above. Program = (row, span)."""
    program = tl.program_id(0)
    span = program % n_spans
    row = (program // n_spans).to(tl.int64)
    line = logits + row_offset(row if chosen_rows is None else tl.load(chosen_rows + row), inner_rows, stride_o, stride_i)
    inv_t = inverse_of(tl.load(temperature + row))
    records += row * 3 * field
    lanes = tl.arange(0, ROWS)[:, None] * TILE + tl.arange(0, TILE)[None, :]
    start = span * SPAN
    for base in range(start, tl.minimum(start + SPAN, columns), ROWS * TILE):
        base = tl.multiple_of(base, ROWS * TILE)
        x, _ = loaded(line, base + lanes, columns, 1)
        first = tl.max(x, 1)
        d = _fall(x, finite_or_0(first)[:, None], inv_t)
        # the bound of _fall hides a NaN on some devices
        e = tl.where(x == x, exp(d), _NAN)
        tile = base // TILE + tl.arange(0, ROWS)
        tl.store(records + tile, first, mask=tile < n_tiles)
        tl.store(records + field + tile, tl.sum(e, 1), mask=tile < n_tiles)
        tl.store(records + 2 * field + tile, tl.sum(e * d, 1), mask=tile < n_tiles)


@triton.jit
def _value_of(key, EMPTY: tl.constexpr):
    """The fp32 with that shortened key: of 16-bit logits the low bits are zero, or ones under the complement of a negative key."""
    full = key.to(tl.uint32) << EMPTY
    return _order_of(tl.where(full >= 0x80000000, full, full | ((1 << EMPTY) - 1)))


@triton.jit
def _reaching(records, chosen, bar, n_tiles, RECORDS: tl.constexpr):
    """Writes the tiles whose largest entry is ≥ bar to `chosen`; their number."""
    tile = tl.arange(0, RECORDS)
    reaches = (tl.load(records + tile, mask=tile < n_tiles, other=-_INF) >= bar) & (tile < n_tiles)
    place = tl.cumsum(reaches.to(tl.int32), 0)
    # the list before may still be read
    tl.debug_barrier()
    tl.store(chosen + place - 1, tile, mask=reaches)
    tl.debug_barrier()
    return tl.max(place, 0)


@triton.jit
def _chosen_tiles(line, chosen, base, n_chosen, n_tiles, columns, TILE: tl.constexpr, ROWS: tl.constexpr):
    """The logits of some chosen tiles; −inf outside."""
    slot = base + tl.arange(0, ROWS)
    tile = tl.load(chosen + slot, mask=slot < n_chosen, other=n_tiles)
    column = tl.multiple_of(tile * TILE, TILE)[:, None] + tl.arange(0, TILE)[None, :]
    x, _ = loaded(line, column, columns, 1)
    return x


@triton.jit
def _near(records, target, low, high, n_tiles, field, top, inv_t,
          MASS: tl.constexpr, EMPTY: tl.constexpr, ROUNDS: tl.constexpr, TILE: tl.constexpr, RECORDS: tl.constexpr):  # fmt: skip
    """A key ≥ low with at least `target` columns, or their mass, at or above it, by the records alone.

    A tile that reaches t has one such column, and all its mass but what TILE columns below t can have.
    """
    tile = tl.arange(0, RECORDS)
    live = tile < n_tiles
    first = tl.load(records + tile, mask=live, other=-_INF)
    keys = _keys(first) >> EMPTY
    e = exp(_fall(first, top, inv_t))
    sums = e * tl.load(records + field + tile, mask=live, other=0.0)
    for _ in range(ROUNDS):
        middle = high - (high - low) // 2
        reaches = live & (keys >= middle.to(tl.uint32))
        if MASS:
            below = TILE * exp(_fall(_value_of(middle, EMPTY), top, inv_t))
            least = tl.sum(tl.where(reaches, tl.maximum(e, sums - below), 0.0).to(tl.float64), 0)
        else:
            least = tl.sum(reaches.to(tl.int32), 0).to(tl.float64)
        enough = (least >= target) & (low < high)
        high = tl.where(enough | (low >= high), high, middle - 1)
        low = tl.where(enough, middle, low)
    return low


@triton.jit
def _search(line, records, chosen, target, low, high, columns, n_tiles, field, top, inv_t,
            MASS: tl.constexpr, EMPTY: tl.constexpr, ROUNDS: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
            RECORDS: tl.constexpr):  # fmt: skip
    """A key with the columns at or above it that the largest key has of which `target` columns, or their mass, are at or above;
    `low` is one that has, `high` the row's largest."""
    low = _near(records, target, low, high, n_tiles, field, top, inv_t, MASS, EMPTY, ROUNDS, TILE, RECORDS)
    n_chosen = _reaching(records, chosen, _value_of(low, EMPTY), n_tiles, RECORDS)
    # columns at or above low, and above high
    upper, lower = tl.full([], columns, tl.int32), tl.full([], 0, tl.int32)
    while (low < high) & (upper - lower > 1):
        width = high - low
        t1, t2, t3 = low + (width + 3) // 4, low + (2 * width + 3) // 4, low + (3 * width + 3) // 4
        n1, n2, n3 = tl.zeros([ROWS], tl.int32), tl.zeros([ROWS], tl.int32), tl.zeros([ROWS], tl.int32)
        m1, m2, m3 = tl.zeros([ROWS], tl.float64), tl.zeros([ROWS], tl.float64), tl.zeros([ROWS], tl.float64)
        for base in range(0, n_chosen, ROWS):
            x = _chosen_tiles(line, chosen, base, n_chosen, n_tiles, columns, TILE, ROWS)
            keys = _keys(x) >> EMPTY
            # what is outside has the lowest key, and no threshold is that low
            above1, above2, above3 = keys >= t1.to(tl.uint32), keys >= t2.to(tl.uint32), keys >= t3.to(tl.uint32)
            n1 += tl.sum(above1.to(tl.int32), 1)
            n2 += tl.sum(above2.to(tl.int32), 1)
            n3 += tl.sum(above3.to(tl.int32), 1)
            if MASS:
                e = exp(_fall(x, top, inv_t))
                m1 += tl.sum(tl.where(above1, e, 0.0), 1).to(tl.float64)
                m2 += tl.sum(tl.where(above2, e, 0.0), 1).to(tl.float64)
                m3 += tl.sum(tl.where(above3, e, 0.0), 1).to(tl.float64)
        c1, c2, c3 = tl.sum(n1, 0), tl.sum(n2, 0), tl.sum(n3, 0)
        if MASS:
            ok1, ok2, ok3 = tl.sum(m1, 0) >= target, tl.sum(m2, 0) >= target, tl.sum(m3, 0) >= target
        else:
            ok1, ok2, ok3 = c1.to(tl.float64) >= target, c2.to(tl.float64) >= target, c3.to(tl.float64) >= target
        lower = tl.where(ok3, lower, tl.where(ok2, c3, tl.where(ok1, c2, c1)))
        high = tl.where(ok3, high, tl.where(ok2, t3, tl.where(ok1, t2, t1)) - 1)
        upper = tl.where(ok3, c3, tl.where(ok2, c2, tl.where(ok1, c1, upper)))
        low = tl.where(ok3, t3, tl.where(ok2, t2, tl.where(ok1, t1, low)))
    return low


@triton.jit
def _above(line, records, chosen, bar, columns, n_tiles, top, inv_t, TILE: tl.constexpr, ROWS: tl.constexpr, RECORDS: tl.constexpr):
    """Σ e^d and Σ d·e^d, d = (x − top)/T, over x ≥ bar, in double."""
    n_chosen = _reaching(records, chosen, bar, n_tiles, RECORDS)
    total, weighted = tl.zeros([ROWS], tl.float64), tl.zeros([ROWS], tl.float64)
    for base in range(0, n_chosen, ROWS):
        x = _chosen_tiles(line, chosen, base, n_chosen, n_tiles, columns, TILE, ROWS)
        d = _fall(x, top, inv_t)
        e = tl.where(x >= bar, exp(d), 0.0)
        total += tl.sum(e, 1).to(tl.float64)
        weighted += tl.sum(e * d, 1).to(tl.float64)
    return tl.sum(total, 0), tl.sum(weighted, 0)


@triton.jit
def _filter_kernel(
    logits, chosen_rows, records, chosen, temperature, top_k, top_p, min_p, bar, lse, lse_all, expected, argmax,
    columns, inner_rows, stride_o, stride_i, n_tiles, field,
    EMPTY: tl.constexpr, ROUNDS: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, RECORDS: tl.constexpr,
):  # fmt: skip
    """Program = row."""
    row = tl.program_id(0).to(tl.int64)
    line = logits + row_offset(row if chosen_rows is None else tl.load(chosen_rows + row), inner_rows, stride_o, stride_i)
    records += row * 3 * field
    chosen += row * field
    t = tl.load(temperature + row)
    cold = t == 0.0
    t = tl.where(cold, 1.0, t)
    inv_t = inverse_of(t)

    tile = tl.arange(0, RECORDS)
    live = tile < n_tiles
    first = tl.load(records + tile, mask=live, other=-_INF)
    top = tl.max(first, 0)
    fall = _fall(first, finite_or_0(top), inv_t)
    sums = tl.load(records + field + tile, mask=live, other=0.0)
    products = tl.load(records + 2 * field + tile, mask=live, other=0.0)
    e = exp(fall)
    total = tl.sum((e * sums).to(tl.float64), 0)
    weighted = tl.sum((e * (products + fall * sums)).to(tl.float64), 0)
    bad = ~((top > -_INF) & (top < _INF)) | (total != total)
    zero = top.to(tl.float64) / t
    tl.store(lse_all + row, tl.where(bad, _NAN, tl.where(cold, 0.0, zero + tl.log(total))))

    of_top = tl.min(tl.where(live & (first == top), tile, n_tiles), 0)
    column = of_top * TILE + tl.arange(0, TILE)
    x, inside = loaded(line, column, columns, 1)
    tl.store(argmax + row, tl.where(bad, -1, tl.min(tl.where(inside & (x == top), column, columns), 0)).to(tl.int64))

    k, p, least = tl.load(top_k + row), tl.load(top_p + row), tl.load(min_p + row)
    by_k, by_p, by_least = (k > 0) & (k < columns), p < 1.0, least > 0.0
    lowest = tl.full([], -_INF, tl.float32)
    if (by_k | by_p | by_least) & ~(bad | cold):
        low = (_keys(lowest) >> EMPTY).to(tl.int64)
        high = (_keys(top) >> EMPTY).to(tl.int64)
        if by_k:
            low = _search(line, records, chosen, k.to(tl.float64), low, high, columns, n_tiles, field, top, inv_t,
                          False, EMPTY, ROUNDS, TILE, ROWS, RECORDS)  # fmt: skip
            lowest = _value_of(low, EMPTY)
            if by_p:
                total, weighted = _above(line, records, chosen, lowest, columns, n_tiles, top, inv_t, TILE, ROWS, RECORDS)
        if by_p:
            low = _search(line, records, chosen, p * total, low, high, columns, n_tiles, field, top, inv_t,
                          True, EMPTY, ROUNDS, TILE, ROWS, RECORDS)  # fmt: skip
            lowest = _value_of(low, EMPTY)
        if by_least:
            # a probability is 1 in double to a 2⁻⁵⁴th of T below the largest logit
            fall_of_least = tl.log(tl.minimum(least, 1.0)) - 1.0 / 18014398509481984.0
            lowest = tl.maximum(lowest, (top.to(tl.float64) + t * fall_of_least).to(tl.float32))
        total, weighted = _above(line, records, chosen, lowest, columns, n_tiles, top, inv_t, TILE, ROWS, RECORDS)
    tl.store(bar + row, tl.where(bad, _NAN, tl.where(cold, top, lowest)))
    tl.store(lse + row, tl.where(bad, _NAN, tl.where(cold, 0.0, zero + tl.log(total))))
    tl.store(expected + row, tl.where(bad, _NAN, tl.where(cold, 0.0, zero + weighted / total)))


def launches(
    logits: Tensor, columns: int, filters: Filters, out: dict[str, Tensor], tiles_config: tiles.Config = tiles.CONFIG, config: Config = CONFIG,
    chosen_rows: Tensor | None = None,
) -> list[Launch]:  # fmt: skip
    """The two launches that write `out`; the arguments are those of ``primitives.filter_rows.reference``."""
    n, itemsize = out["lse"].shape[0], logits.element_size()
    tile = tiles_config.tile(columns, config.again, itemsize)
    rows, span = max(tiles_config.step_bytes // itemsize // tile, 1), tiles_config.span_bytes // itemsize
    n_tiles, n_spans = triton.cdiv(columns, tile), triton.cdiv(columns, span)
    # whole vectors, so that fields are read 16 bytes at a time
    field = triton.cdiv(n_tiles, 16) * 16
    stride_o, stride_i = row_strides(logits)
    shared = {
        "logits": logits, "chosen_rows": chosen_rows, "temperature": filters.temperature,
        "records": torch.empty((n, 3, field), dtype=torch.float32, device=logits.device),
        "columns": columns, "inner_rows": logits.shape[1], "stride_o": stride_o, "stride_i": stride_i, "n_tiles": n_tiles, "field": field,
        "TILE": tile,
    }  # fmt: skip
    first = Launch(_records_kernel, n * n_spans, shared | {"n_spans": n_spans, "ROWS": rows, "SPAN": max(span, rows * tile)}, tiles_config.num_warps)
    records = triton.next_power_of_2(n_tiles)
    warps = min(max(records // config.records, config.fewest_warps), config.most_warps)
    arguments = shared | {
        "chosen": torch.empty((n, field), dtype=torch.int32, device=logits.device), "top_k": filters.top_k, "top_p": filters.top_p,
        "min_p": filters.min_p, **out, "EMPTY": _EMPTY_BITS[logits.dtype], "ROUNDS": config.rounds,
        "ROWS": min(max(config.step * warps // tile, 1), records), "RECORDS": records,
    }  # fmt: skip
    return [first, Launch(_filter_kernel, n, arguments, warps)]


def filter_rows(logits: Tensor, columns: int, filters: Filters, out: dict[str, Tensor], rows: Tensor | None = None) -> None:
    """As ``primitives.filter_rows.reference``."""
    with on_device_of(logits):
        for launch in launches(logits, columns, filters, out, chosen_rows=rows):
            launch.run()
