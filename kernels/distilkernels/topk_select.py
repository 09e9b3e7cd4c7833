"""``topk_select`` in Triton: one read of the logits, then K tiles of every row again. Two launches, no wait, no loop that
depends on what a row holds.

    _tiles_kernel    (tiles.py) row → first entry and sum of each tile: the only read of the whole row;
    _select_kernel   row → K tiles, K pieces of those, K entries of those; sorted; the rest of every level into the tail.
Each level keeps the K pieces whose first entries come first in the order, which hold the row's first K entries (see
primitives/topk_select.py), and adds the sums of the others to the tail: no entry is summed twice and nothing is subtracted.

Bytes at V = 151,936, K = 64 in 16 bits, of the row's: read 1.000, records written 0.031 and read 0.031, tiles again 0.054,
results 0.002: 1.12 of the floor. K = 256: 1.23, K = 1,024: 1.47; in float32 1.08, 1.14 and 1.34.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..primitives.head import Head
from ..primitives.topk_select import TopK
from . import tiles
from .head import Launch, exp, on_device_of, row_offset
from .tiles import fall_to, finite_or_0, in_order, joined, loaded, mass, row_arguments, shifted, tiles_launch, z_of
from .vocab_stats import _INF, _NAN, _z

# the low bits that are zero in every float32 made of a 16-bit number (or follow from its sign): a threshold is found without them
_EMPTY_BITS = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 12}


@dataclass(frozen=True)
class Config:
    """Launch configuration of _select_kernel."""

    # reread logits (or records) a thread: 32 packed registers in 16 bits, as many again for their exponentials
    per_warp: int = 2048
    most_warps: int = 16


CONFIG = Config()


@triton.jit
def _keys(order):
    """uint32 in the order of fp32, −0 with +0; never 0 but for a NaN."""
    bits = order.to(tl.uint32, bitcast=True)
    bits = tl.where(bits == 0x80000000, 0, bits)
    return tl.where(bits >= 0x80000000, ~bits, bits | 0x80000000)


@triton.jit
def _order_of(keys):
    """What _keys was given."""
    return tl.where(keys >= 0x80000000, keys & 0x7FFFFFFF, ~keys).to(tl.float32, bitcast=True)


@triton.jit
def _first_k(keys, k, BITS: tl.constexpr):
    """(chosen, place): the k largest of at least k keys below 2^BITS, equal ones from the left; the chosen's places from the left.

    The k-th largest key, two bits a round: three counts in one reduction.
    """
    floor = tl.zeros([], tl.uint32)
    for round in range(0, BITS // 2):
        step = tl.full([], 1, tl.uint32) << (BITS - 2 - 2 * round)
        second = (keys >= floor + 2 * step).to(tl.int64) << 21
        third = (keys >= floor + 3 * step).to(tl.int64) << 42
        counts = tl.sum((keys >= floor + step).to(tl.int64) + second + third, 0)
        digit = ((counts & 0x1FFFFF) >= k).to(tl.uint32) + (((counts >> 21) & 0x1FFFFF) >= k).to(tl.uint32) + ((counts >> 42) >= k).to(tl.uint32)
        floor += digit * step
    above = keys > floor
    equal = keys == floor
    missing = k - tl.sum(above.to(tl.int32), 0)
    # two scans in one: there are at most 2^15 keys
    ranks = tl.cumsum(above.to(tl.int32) + (equal.to(tl.int32) << 16), 0)
    n_equal = ranks >> 16
    return above | (equal & (n_equal <= missing)), (ranks & 0xFFFF) + tl.minimum(n_equal, missing) - 1


@triton.jit
def _has_bit(BIT: tl.constexpr, LOG: tl.constexpr):
    """Whether a position of the [2]·LOG hypercube has that bit; the last axis is bit 0."""
    return tl.reshape(tl.arange(0, 2), [1] * (LOG - 1 - BIT) + [2] + [1] * BIT) == 1


@triton.jit
def _exchanged(h, BIT: tl.constexpr, SIZE: tl.constexpr, LOG: tl.constexpr):
    """Each pair of positions that differ in BIT, the larger first; where they have the bit SIZE, last."""
    # an axis of length 2: the partner is its sum less the entry itself, whatever overflows
    partner = tl.sum(h, LOG - 1 - BIT, keep_dims=True) - h
    smaller = _has_bit(BIT, LOG)
    if SIZE < LOG:
        smaller = smaller ^ _has_bit(SIZE, LOG)
    return tl.where((h > partner) == smaller, partner, h)


@triton.jit
def _descending(x, LOG: tl.constexpr):
    """Bitonic sort of 2^LOG int64."""
    h = tl.reshape(x, [2] * LOG)
    for size in tl.static_range(1, LOG + 1):
        for step in tl.static_range(0, size):
            h = _exchanged(h, size - 1 - step, size, LOG)
    return tl.reshape(h, [2**LOG])


@triton.jit
def _select_kernel(
    logits, records, values, ids, lse, tail_lse,
    columns, inner_rows, stride_o, stride_i, n_tiles, k, scale, cap, inv_t,
    HEAD: tl.constexpr, ORDER: tl.constexpr, EMPTY: tl.constexpr, RECORDS: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
    PIECE: tl.constexpr, SLOTS: tl.constexpr, PICK_TILES: tl.constexpr, PICK_PIECES: tl.constexpr, LOG_K: tl.constexpr,
):  # fmt: skip
    """The row's first k entries. `ids` and `values` hold what is chosen on the way, so stores and loads of them are kept
    apart by barriers."""
    row = tl.program_id(0).to(tl.int64)
    line = logits + row_offset(row, inner_rows, stride_o, stride_i)
    records += row * 2 * n_tiles
    ids += row * k
    values += row * k
    BITS: tl.constexpr = 32 - EMPTY
    EACH: tl.constexpr = TILE // PIECE

    tail_top, tail_sum = tl.full([], -_INF, tl.float32), tl.zeros([], tl.float64)
    if PICK_TILES:
        tile = tl.arange(0, RECORDS)
        live = tile < n_tiles
        first = tl.load(records + tile, mask=live, other=-_INF)
        chosen, place = _first_k(tl.where(live, _keys(first) >> EMPTY, 0), k, BITS)
        tl.store(ids + place, tile, mask=chosen)
        rest = live & ~chosen
        sums = tl.load(records + n_tiles + tile, mask=rest, other=0.0)
        tail_top, tail_sum = mass(tl.where(rest, z_of(first, scale, cap, inv_t, HEAD, ORDER), -_INF), sums)
        tl.debug_barrier()

    # columns ascend on every level, so that of equal keys those from the left are taken
    entry = tl.arange(0, SLOTS * PIECE)
    column = entry
    if PICK_PIECES:
        piece = tl.arange(0, TILES * EACH)
        tile = piece // EACH
        if PICK_TILES:
            tile = tl.load(ids + tile, mask=tile < k, other=n_tiles)
        start = tl.multiple_of(tile * TILE + piece % EACH * PIECE, PIECE)
        x, inside = loaded(line, start[:, None] + tl.arange(0, PIECE)[None, :], columns, ORDER)
        first = tl.max(in_order(x, inside, ORDER), 1)
        z = z_of(first, scale, cap, inv_t, HEAD, ORDER)
        sums = tl.sum(exp(shifted(x, inside, finite_or_0(z)[:, None], scale, cap, inv_t, HEAD, ORDER)), 1)
        chosen, place = _first_k(tl.where(start < columns, _keys(first) >> EMPTY, 0), k, BITS)
        top, total = mass(tl.where(chosen, -_INF, z), tl.where(chosen, 0.0, sums))
        tail_top, tail_sum = joined(tail_top, tail_sum, top, total)
        tl.debug_barrier()
        tl.store(ids + place, start, mask=chosen)
        tl.debug_barrier()
        column = tl.load(ids + entry // PIECE, mask=entry // PIECE < k, other=columns) + entry % PIECE

    x, inside = loaded(line, column, columns, ORDER)
    order = in_order(x, inside, ORDER)
    chosen, place = _first_k(tl.where(inside, _keys(order) >> EMPTY, 0), k, BITS)
    z = tl.where(inside & ~chosen, _z(x, scale, cap, inv_t, HEAD), -_INF)
    top, total = mass(z, exp(z - finite_or_0(z)))
    tail_top, tail_sum = joined(tail_top, tail_sum, top, total)
    nan = tl.max((inside & (x != x)).to(tl.int32), 0) > 0
    tl.debug_barrier()
    tl.store(ids + place, column, mask=chosen)
    tl.store(values + place, order, mask=chosen)
    tl.debug_barrier()

    # sorted by (key, then lower column first)
    slot = tl.arange(0, 2**LOG_K)
    taken = slot < k
    column = tl.load(ids + slot, mask=taken, other=0)
    keys = tl.where(taken, _keys(tl.load(values + slot, mask=taken, other=0.0)), 0)
    packed = _descending((keys.to(tl.int64) << 31) | (0x7FFFFFFF - column).to(tl.int64), LOG_K)
    column = 0x7FFFFFFF - (packed & 0x7FFFFFFF).to(tl.int32)
    z = z_of(_order_of((packed >> 31).to(tl.uint32)), scale, cap, inv_t, HEAD, ORDER)
    z = tl.where(taken, z, -_INF)
    top = tl.max(z, 0)
    total = tl.sum(exp(z - finite_or_0(z)).to(tl.float64) * tl.exp(fall_to(z, top).to(tl.float64)), 0)
    top, total = joined(tail_top, tail_sum, top, total)

    bad = nan | (total != total)
    tl.debug_barrier()
    tl.store(ids + slot, tl.where(bad, slot, column), mask=taken)
    tl.store(values + slot, tl.where(bad, _NAN, z), mask=taken)
    tl.store(lse + row, tl.where(bad, _NAN, finite_or_0(top) + tl.log(total)))
    tl.store(tail_lse + row, tl.where(bad, _NAN, finite_or_0(tail_top) + tl.log(tail_sum)))


def launches(logits: Tensor, head: Head, out: TopK, tiles_config: tiles.Config = tiles.CONFIG, config: Config = CONFIG) -> list[Launch]:
    """The two launches that write `out`; the arguments are those of ``primitives.topk_select.reference``."""
    k, columns, itemsize = out.ids.shape[1], head.columns(logits.shape[2]), logits.element_size()
    tile = tiles_config.tile(columns, k, itemsize)
    records, first = tiles_launch(logits, head, tile, config=tiles_config)
    n_tiles = records.shape[2]
    # about as many pieces in K tiles as entries in K pieces
    piece = 2 ** ((tile.bit_length()) // 2)
    kept = triton.next_power_of_2(min(k, n_tiles))
    pick_pieces = kept * (tile // piece) > k
    sizes = {
        "RECORDS": triton.next_power_of_2(n_tiles), "TILE": tile, "TILES": kept, "PIECE": piece,
        "SLOTS": triton.next_power_of_2(k) if pick_pieces else kept * (tile // piece),
        "PICK_TILES": n_tiles > k, "PICK_PIECES": pick_pieces, "LOG_K": max((k - 1).bit_length(), 1),
    }  # fmt: skip
    most = max(sizes["RECORDS"], kept * tile, sizes["SLOTS"] * piece)
    warps = min(max(most // config.per_warp, 1), config.most_warps)
    arguments = row_arguments(logits, head) | sizes | {
        "records": records, "values": out.values, "ids": out.ids, "lse": out.lse, "tail_lse": out.tail_lse,
        "n_tiles": n_tiles, "k": k, "EMPTY": _EMPTY_BITS[logits.dtype],
    }  # fmt: skip
    return [first, Launch(_select_kernel, out.ids.shape[0], arguments, warps)]


def topk_select(logits: Tensor, head: Head, out: TopK) -> None:
    """As ``primitives.topk_select.reference``."""
    with on_device_of(logits):
        for launch in launches(logits, head, out):
            launch.run()
