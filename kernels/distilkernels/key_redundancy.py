"""``key_redundancy`` in Triton: the sum of unit keys, a dot with it, and R-KV's last neighbours by a scan that stops early.

    _unit_kernel        chunk of keys → 1/(|k| + ε) of each, and its part of ŝ = Σ k̂
    _similarity_kernel  k̂·ŝ − |k̂|², with ŝ the parts added in one order; programs run from the last chunk, which L2 may still hold
    _neighbour_kernel   some rows against tiles of keys from the end, until each row has its last neighbour

Bytes at B = 8, H = 8, T = 8,192, D = 128 in 16 bits: 134 MB twice, 31 µs each at 4.3 TB/s, the second less by what L2 holds (30 to
40 MB of them): 55 µs for "kava". The scan's products are of the keys as they are, exact in 16 bits, and scaled afterwards. Where
every row meets a neighbour in its first tile it costs 64·T·D·2 FLOPs a head, 9 GFLOP in all; where none does, T/64 times as many.
Rows that do not fit the registers (float32, and D > 256) come again for each tile, a few features at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..primitives.key_redundancy import NORM_EPSILON, Redundancy
from .head import Launch, on_device_of
from .linear_vocab_stats import _dot

_EPSILON = tl.constexpr(NORM_EPSILON)


@dataclass(frozen=True)
class Config:
    """Launch configuration; the reasons are for an H200 and hold on other recent devices."""

    num_warps: int = 4
    # 32 elements a thread: 64 bytes in flight in 16 bits, 32 registers of sums
    tile: int = 4096
    # a chunk's part of ŝ is written once and read by every chunk of the head: 512 keys to one row of them
    chunk: int = 512
    # the scan: a warpgroup's 64 rows and 32 registers a thread of cosines; 128 columns spill on older devices
    rows: int = 64
    columns: int = 64
    # 256 features of 64 rows and 64 columns spill on 4 warps and, with mma.sync, on 8
    wide_columns: int = 32
    # wider rows would fill the registers: both sides come again, 64 KB from L2 for 64·64 cosines of 256 features instead of 32
    widest: int = 256
    wide_step: int = 128
    # rows of no alignment are read two bytes at a time, with an address for each
    odd_step: int = 32
    # float32 goes without tensor cores: the operands of 8 features are 64 registers a thread of 4 warps, beside 16 cosines; 16
    # features or 64 columns spill where rows have no alignment
    float_columns: int = 32
    float_step: int = 8
    registers: int = 255

    def scan(self, dtype: torch.dtype, width: int, aligned: bool) -> tuple[int, int, int, int | None]:
        """Columns of a tile, features of a step, warps and the most registers of a thread."""
        if dtype == torch.float32:
            return self.float_columns, self.float_step, self.num_warps, self.registers
        if not aligned:
            return self.columns, min(self.odd_step, width), self.num_warps, self.registers
        if width <= 128:
            return self.columns, width, self.num_warps, None
        if width <= self.widest:
            return self.wide_columns, width, 2 * self.num_warps, None
        return self.columns, self.wide_step, self.num_warps, None


CONFIG = Config()


@triton.jit
def counted_keys(start, stop, mask, b, place, t):
    """Which keys of request b count: inside the span, and real."""
    inside = (place >= tl.load(start + b)) & (place < tl.load(stop + b))
    if mask is not None:
        inside = inside & (tl.load(mask + b.to(tl.int64) * t + place, mask=inside, other=0) != 0)
    return inside


@triton.jit
def key_tile(line, place, some, d, stride_t, WIDTH: tl.constexpr, first=0):
    """Rows of keys from feature `first`, 0 where `some` is false and behind the last feature."""
    feature = first + tl.arange(0, WIDTH)
    at = place.to(tl.int64)[:, None] * stride_t + feature[None, :]
    return tl.load(line + at, mask=some[:, None] & (feature < d)[None, :], other=0.0)


@triton.jit
def unit_scale(k, counted):
    """1/(|k| + ε) of rows of keys, 0 for those that do not count."""
    return tl.where(counted, 1 / (tl.sqrt(tl.sum(k * k, 1)) + _EPSILON), 0.0)


@triton.jit
def summed_parts(parts, chunks, WIDTH: tl.constexpr):
    """ŝ: the parts [chunks, WIDTH] of a head, added in one order."""
    total = tl.zeros([8, WIDTH], tl.float32)
    for first in range(0, chunks, 8):
        chunk = first + tl.arange(0, 8)
        at = chunk[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        total += tl.load(parts + at, mask=(chunk < chunks)[:, None], other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _unit_kernel(
    keys, start, stop, mask, scales, parts, heads, t, d, chunks, stride_b, stride_h, stride_t,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """scales [B·H, T] and parts [B·H, chunks, WIDTH]. Program = (head, chunk)."""
    program = tl.program_id(0)
    head = (program // chunks).to(tl.int64)
    b, h = head // heads, head % heads
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for first in range(0, CHUNK, ROWS):
        place = program % chunks * CHUNK + first + tl.arange(0, ROWS)
        counted = counted_keys(start, stop, mask, b, place, t)
        k = key_tile(keys + b * stride_b + h * stride_h, place, counted, d, stride_t, WIDTH).to(tl.float32)
        scale = unit_scale(k, counted)
        total += k * scale[:, None]
        tl.store(scales + head * t + place, scale, mask=place < t)
    tl.store(parts + program.to(tl.int64) * WIDTH + tl.arange(0, WIDTH), tl.sum(total, 0))


@triton.jit
def _similarity_kernel(
    keys, scales, parts, similarity, heads, t, d, chunks, programs, stride_b, stride_h, stride_t,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    program = programs - 1 - tl.program_id(0)
    head = (program // chunks).to(tl.int64)
    line = keys + head // heads * stride_b + head % heads * stride_h
    total = summed_parts(parts + head * chunks * WIDTH, chunks, WIDTH)
    for first in range(0, CHUNK, ROWS):
        place = program % chunks * CHUNK + first + tl.arange(0, ROWS)
        scale = tl.load(scales + head * t + place, mask=place < t, other=0.0)
        unit = key_tile(line, place, scale != 0, d, stride_t, WIDTH).to(tl.float32) * scale[:, None]
        tl.store(similarity + head * t + place, tl.sum(unit * total[None, :], 1) - tl.sum(unit * unit, 1), mask=place < t)


@triton.jit
def _first_counted(start, mask, b, t, TILE: tl.constexpr):
    """The first key of request b that counts, which has one."""
    first = tl.load(start + b)
    if mask is not None:
        missing = True
        while missing:
            place = first + tl.arange(0, TILE)
            real = tl.load(mask + b * t + place, mask=place < t, other=1) != 0
            found = tl.min(tl.where(real, place, first + TILE), 0)
            missing = found == first + TILE
            first = found
    return first


@triton.jit
def _neighbour_kernel(
    keys, start, stop, mask, scales, last, cosine, threshold, heads, t, d, blocks, stride_b, stride_h, stride_t,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Program = (head, block of ROWS). Rows stay where they are if a step is the whole width; else both sides come STEP features at a time."""
    program = tl.program_id(0)
    head = (program // blocks).to(tl.int64)
    b = head // heads
    line = keys + b * stride_b + head % heads * stride_h
    scales += head * t
    row = program % blocks * ROWS + tl.arange(0, ROWS)
    counted = counted_keys(start, stop, mask, b, row, t)
    if STEP == WIDTH:
        k = key_tile(line, row, counted, d, stride_t, WIDTH)
    scale = tl.load(scales + row, mask=row < t, other=0.0)
    neighbour, value = tl.full([ROWS], -1, tl.int32), tl.zeros([ROWS], tl.float32)
    lowest = tl.load(start + b) - COLUMNS
    left = (tl.load(stop + b) - 1) // COLUMNS * COLUMNS
    open = tl.max(counted.to(tl.int32), 0)
    while (left > lowest) & (open > 0):
        column = left + tl.arange(0, COLUMNS)
        # a key that does not count has cosine 0 with all, and no threshold is below that
        other_scale = tl.load(scales + column, mask=column < t, other=0.0)
        c = tl.zeros([ROWS, COLUMNS], tl.float32)
        if STEP == WIDTH:
            c = _dot(k, tl.trans(key_tile(line, column, other_scale != 0, d, stride_t, WIDTH)), c)
        else:
            for feature in range(0, d, STEP):
                part = key_tile(line, row, counted, d, stride_t, STEP, feature)
                c = _dot(part, tl.trans(key_tile(line, column, other_scale != 0, d, stride_t, STEP, feature)), c)
        c = c * scale[:, None] * other_scale[None, :]
        near = (c > threshold) & (row[:, None] != column[None, :])
        hit = tl.max(tl.where(near, column[None, :], -1), 1)
        taken = (neighbour < 0) & (hit >= 0)
        value = tl.where(taken, tl.sum(tl.where(column[None, :] == hit[:, None], c, 0.0), 1), value)
        neighbour = tl.where(taken, hit, neighbour)
        open = tl.max((counted & (neighbour < 0)).to(tl.int32), 0)
        left -= COLUMNS
    if open > 0:
        first = _first_counted(start, mask, b, t, COLUMNS)
        c = tl.zeros([ROWS], tl.float32)
        for begin in range(0, d, STEP):
            feature = begin + tl.arange(0, STEP)
            lone = tl.load(line + first.to(tl.int64) * stride_t + feature, mask=feature < d, other=0.0).to(tl.float32)
            c += tl.sum(key_tile(line, row, counted, d, stride_t, STEP, begin).to(tl.float32) * lone[None, :], 1)
        c = c * scale * tl.load(scales + first)
        alone = neighbour < 0
        value = tl.where(alone, tl.where(row == first, 0.0, c), value)
        neighbour = tl.where(alone, first, neighbour)
    tl.store(last + head * t + row, tl.where(counted, neighbour, -1), mask=row < t)
    tl.store(cosine + head * t + row, tl.where(counted, value, 0.0), mask=row < t)


# ------------------------------------------------------------------------------------------------ host


def aligned(rows: Tensor) -> bool:
    """Whether the compiler will know that each row starts at 16 bytes and ends at 16 elements, and read it by as many."""
    return rows.data_ptr() % 16 == 0 and not any(size % 16 for size in (rows.shape[-1], *rows.stride()[:-1]))


def launches(
    keys: Tensor, start: Tensor, stop: Tensor, mask: Tensor | None, threshold: float, out: Redundancy, config: Config = CONFIG
) -> list[Launch]:  # fmt: skip
    """The launches that write the fields of `out` that are not None; the arguments are those of ``primitives.key_redundancy.reference``."""
    b, heads, t, d = keys.shape
    width = max(triton.next_power_of_2(d), 16)
    chunks = triton.cdiv(t, config.chunk)
    scales = torch.empty((b * heads, t), dtype=torch.float32, device=keys.device)
    parts = torch.empty((b * heads, chunks, width), dtype=torch.float32, device=keys.device)
    strides = dict(zip(("stride_b", "stride_h", "stride_t"), keys.stride()))
    shared = {"keys": keys, "scales": scales, "heads": heads, "t": t, "d": d, "WIDTH": width} | strides
    tiled = shared | {"parts": parts, "chunks": chunks, "CHUNK": config.chunk, "ROWS": config.tile // width}
    span = {"start": start, "stop": stop, "mask": mask}
    programs = b * heads * chunks
    found = [Launch(_unit_kernel, programs, tiled | span, config.num_warps)]
    if out.similarity is not None:
        found.append(Launch(_similarity_kernel, programs, tiled | {"similarity": out.similarity, "programs": programs}, config.num_warps))
    if out.last is not None:
        columns, step, num_warps, registers = config.scan(keys.dtype, width, aligned(keys))
        blocks = triton.cdiv(t, config.rows)
        scan = {"last": out.last, "cosine": out.cosine, "threshold": threshold, "blocks": blocks, "ROWS": config.rows, "COLUMNS": columns, "STEP": step}
        found.append(Launch(_neighbour_kernel, b * heads * blocks, shared | span | scan, num_warps, registers))
    return found


def key_redundancy(keys: Tensor, start: Tensor, stop: Tensor, mask: Tensor | None, threshold: float, out: Redundancy) -> None:
    """As ``primitives.key_redundancy.reference``."""
    with on_device_of(keys):
        for launch in launches(keys, start, stop, mask, threshold, out):
            launch.run()
