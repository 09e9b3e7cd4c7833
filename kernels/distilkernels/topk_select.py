"""``topk_select`` in Triton: one read of the logits, then K tiles of every row again. Two launches and no wait for the device; the
only loops whose length depends on what a row holds are bisections, of at most 32 rounds.

    _tiles_kernel    (tiles.py) row → first entry and sum of each tile: the only read of the whole row;
    _select_kernel   row → K tiles, K pieces of those, K entries of those; sorted; the rest of every level into the tail.
Each level keeps the K pieces whose first entries come first in the order, which hold the row's first K entries (see
primitives/topk_select.py), and adds the sums of the others to the tail: no entry is summed twice and nothing is subtracted.

Bytes at V = 151,936, K = 64 in 16 bits, of the row's 303,872: read 1.000, records of tiles written 0.032 and read 0.032, tiles
again 0.054, results 0.002: 1.12 of the floor; K = 256: 1.24, K = 1,024: 1.49 (in float32 1.09, 1.17 and 1.35). The pieces' records,
0.013 at K = 64, are read by the program that wrote them, from its cache.
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
from .tiles import aligned, fall_to, finite_or_0, in_order, joined, loaded, mass, shifted, tiles_launch, z_of
from .vocab_stats import _INF, _NAN

# the low bits that are zero in every float32 made of a 16-bit number (or follow from its sign): a threshold is found without them
_EMPTY_BITS = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}


@dataclass(frozen=True)
class Config:
    """Launch configuration of _select_kernel."""

    # keys a warp, 16 a thread: a round of the bisection is then as long as its reduction
    keys: int = 512
    # logits a warp and step through the chosen tiles, as in the pass; rows at odd addresses need an address for each logit, and a
    # softcap's tanh more registers than are left
    step: int = 1024
    short_step: int = 256
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
def _first_k(order, live, k, EMPTY: tl.constexpr):
    """(chosen, place): the k largest of at least k numbers, equal ones from the left, what is not live last; the places of the
    chosen, counted from the left. Their k-th largest by bisection, at most 32 − EMPTY rounds; fewer where k are apart sooner.
    """
    keys = tl.maximum(_keys(order) >> EMPTY, 1)
    low = tl.min(tl.where(live, keys, 0xFFFFFFFF), 0) - 1
    keys = tl.where(live, keys, low)
    high = tl.max(keys, 0)
    count = tl.full([], keys.shape[0], tl.int32)
    while (low < high) & (count != k):
        middle = high - (high - low) // 2
        above = tl.sum((keys >= middle).to(tl.int32), 0)
        enough = above >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
        count = tl.where(enough, above, count)
    above = keys > low
    equal = keys == low
    missing = k - tl.sum(above.to(tl.int32), 0)
    # two scans in one: there are fewer than 2^15 keys, see Config.most
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
def _start(piece, ids, k, n_tiles, TILE: tl.constexpr, PIECE: tl.constexpr, PICK_TILES: tl.constexpr):
    """First column of pieces of the chosen tiles; beyond the row for pieces of no tile."""
    tile = piece // (TILE // PIECE)
    if PICK_TILES:
        tile = tl.load(ids + tile, mask=tile < k, other=n_tiles)
    return tl.multiple_of(tile * TILE + piece % (TILE // PIECE) * PIECE, PIECE)


@triton.jit
def _cut(line, ids, pieces, columns, k, n_tiles, scale, cap, inv_t, HEAD: tl.constexpr, ORDER: tl.constexpr,
         TILE: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr, CHUNK: tl.constexpr, PICK_TILES: tl.constexpr):  # fmt: skip
    """`pieces` [2, PIECES]: first entry and Σ e^(z−m) of every piece of the chosen tiles, as _tiles_kernel has them."""
    for base in range(0, PIECES, CHUNK):
        piece = base + tl.arange(0, CHUNK)
        start = _start(piece, ids, k, n_tiles, TILE, PIECE, PICK_TILES)
        x, inside = loaded(line, start[:, None] + tl.arange(0, PIECE)[None, :], columns, ORDER)
        first = tl.max(in_order(x, inside, ORDER), 1)
        m = finite_or_0(z_of(first, scale, cap, inv_t, HEAD, ORDER))
        d = shifted(x, inside, m[:, None], scale, cap, inv_t, HEAD, ORDER)
        tl.store(pieces + piece, first)
        tl.store(pieces + PIECES + piece, tl.sum(exp(d), 1))


@triton.jit
def _kept(fields, stride, live, at, index, ids, k, scale, cap, inv_t, HEAD: tl.constexpr, ORDER: tl.constexpr, EMPTY: tl.constexpr):
    """Writes to `ids` the `index` of the k that come first and returns the mass of the others; `fields` [2, stride] as in _cut."""
    chosen, place = _first_k(tl.load(fields + at, mask=live, other=-_INF), live, k, EMPTY)
    tl.store(ids + place, index, mask=chosen)
    # loaded again: the bisection and the scan need the registers
    rest = live & ~chosen
    z = z_of(tl.load(fields + at, mask=rest, other=-_INF), scale, cap, inv_t, HEAD, ORDER)
    return mass(tl.where(rest, z, -_INF), tl.load(fields + stride + at, mask=rest, other=0.0))


@triton.jit
def _select_kernel(
    logits, records, pieces, values, ids, lse, tail_lse,
    columns, inner_rows, stride_o, stride_i, n_tiles, field, k, scale, cap, inv_t,
    HEAD: tl.constexpr, ORDER: tl.constexpr, EMPTY: tl.constexpr, RECORDS: tl.constexpr, TILE: tl.constexpr, PIECE: tl.constexpr,
    PIECES: tl.constexpr, CHUNK: tl.constexpr, SLOTS: tl.constexpr, PICK_TILES: tl.constexpr, PICK_PIECES: tl.constexpr, LOG_K: tl.constexpr,
):  # fmt: skip
    """The row's first k entries. `ids` holds what is chosen on the way: a barrier stands between a store and the loads of other
    threads, and between those and the next store."""
    row = tl.program_id(0).to(tl.int64)
    line = logits + row_offset(row, inner_rows, stride_o, stride_i)
    records += row * 2 * field
    pieces += row * 2 * PIECES
    ids += row * k
    values += row * k

    # columns ascend on every level, so that of equal keys those from the left are taken
    tail_top, tail_sum = tl.full([], -_INF, tl.float32), tl.zeros([], tl.float64)
    if PICK_TILES:
        tile = tl.arange(0, RECORDS)
        tail_top, tail_sum = _kept(records, field, tile < n_tiles, tile, tile, ids, k, scale, cap, inv_t, HEAD, ORDER, EMPTY)
        tl.debug_barrier()

    entry = tl.arange(0, SLOTS * PIECE)
    column = entry
    if PICK_PIECES:
        _cut(line, ids, pieces, columns, k, n_tiles, scale, cap, inv_t, HEAD, ORDER, TILE, PIECE, PIECES, CHUNK, PICK_TILES)
        piece = tl.arange(0, PIECES)
        start = _start(piece, ids, k, n_tiles, TILE, PIECE, PICK_TILES)
        tl.debug_barrier()
        top, total = _kept(pieces, PIECES, start < columns, piece, start, ids, k, scale, cap, inv_t, HEAD, ORDER, EMPTY)
        tail_top, tail_sum = joined(tail_top, tail_sum, top, total)
        tl.debug_barrier()
        column = tl.load(ids + entry // PIECE, mask=entry // PIECE < k, other=columns) + entry % PIECE

    inside = column < columns
    x, _ = loaded(line, column, columns, ORDER)
    chosen, place = _first_k(in_order(x, inside, ORDER), inside, k, EMPTY)
    tl.debug_barrier()
    tl.store(ids + place, column, mask=chosen)
    tl.debug_barrier()
    x, rest = loaded(line, tl.where(chosen, columns, column), columns, ORDER)
    z = shifted(x, rest, 0.0, scale, cap, inv_t, HEAD, ORDER)
    top, total = mass(z, exp(z - finite_or_0(z)))
    tail_top, tail_sum = joined(tail_top, tail_sum, top, total)

    slot = tl.arange(0, 2**LOG_K)
    column = tl.load(ids + slot, mask=slot < k, other=columns)
    x, taken = loaded(line, column, columns, ORDER)
    z = shifted(x, taken, 0.0, scale, cap, inv_t, HEAD, ORDER)
    top = tl.max(z, 0)
    total = tl.sum(exp(z - finite_or_0(z)).to(tl.float64) * tl.exp(fall_to(z, top).to(tl.float64)), 0)
    top, total = joined(tail_top, tail_sum, top, total)

    # by key, then the lower column first
    keys = tl.where(taken, _keys(in_order(x, taken, ORDER)), 0)
    packed = _descending((keys.to(tl.int64) << 31) | (0x7FFFFFFF - column).to(tl.int64), LOG_K)
    column = 0x7FFFFFFF - (packed & 0x7FFFFFFF).to(tl.int32)
    z = z_of(_order_of((packed >> 31).to(tl.uint32)), scale, cap, inv_t, HEAD, ORDER)

    bad = total != total
    tl.debug_barrier()
    tl.store(ids + slot, tl.where(bad, slot, column), mask=slot < k)
    tl.store(values + slot, tl.where(bad, _NAN, z), mask=slot < k)
    tl.store(lse + row, tl.where(bad, _NAN, finite_or_0(top) + tl.log(total)))
    tl.store(tail_lse + row, tl.where(bad, _NAN, finite_or_0(tail_top) + tl.log(tail_sum)))


def launches(logits: Tensor, head: Head, out: TopK, tiles_config: tiles.Config = tiles.CONFIG, config: Config = CONFIG) -> list[Launch]:
    """The two launches that write `out`; the arguments are those of ``primitives.topk_select.reference``."""
    k, columns, itemsize = out.ids.shape[1], head.columns(logits.shape[2]), logits.element_size()
    tile = tiles_config.tile(columns, k, itemsize)
    shared, first = tiles_launch(logits, head, tile, config=tiles_config)
    n_tiles = shared["n_tiles"]
    # about as many pieces in K tiles as entries in K pieces
    piece = 2 ** (tile.bit_length() // 2)
    kept = triton.next_power_of_2(min(k, n_tiles))
    step = config.step if aligned(logits) and head.softcap is None else config.short_step
    n_pieces = kept * (tile // piece)
    pick_pieces = n_pieces > k
    slots = triton.next_power_of_2(k) if pick_pieces else n_pieces
    records = triton.next_power_of_2(n_tiles)
    warps = min(max(max(records, n_pieces, slots * piece) // config.keys, 1), config.most_warps)
    pieces = torch.empty((out.ids.shape[0], 2, n_pieces if pick_pieces else 0), dtype=torch.float32, device=logits.device)
    arguments = shared | {
        "pieces": pieces, "values": out.values, "ids": out.ids, "lse": out.lse, "tail_lse": out.tail_lse, "k": k,
        "EMPTY": _EMPTY_BITS[logits.dtype], "RECORDS": records, "PIECE": piece, "PIECES": n_pieces,
        "CHUNK": min(max(step * warps // piece, 1), n_pieces), "SLOTS": slots, "PICK_TILES": n_tiles > k,
        "PICK_PIECES": pick_pieces, "LOG_K": max((k - 1).bit_length(), 1),
    }  # fmt: skip
    return [first, Launch(_select_kernel, out.ids.shape[0], arguments, warps)]


def topk_select(logits: Tensor, head: Head, out: TopK) -> None:
    """As ``primitives.topk_select.reference``."""
    with on_device_of(logits):
        for launch in launches(logits, head, out):
            launch.run()
