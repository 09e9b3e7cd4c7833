"""``kv_align`` in Triton: the pairs of all layers in one launch, through a table of their addresses and strides on the device.

    _terms_kernel      some tiles of a pair → partial Σ of the distance, and the gradient of those tiles
    _sum_kernel        pair → its partial sums, added in one order
    _moments_kernel    some tiles of a pair → count, mean and Σ (x − mean)², for a std; _std_kernel joins those of a pair
"layer_std" needs the moments first; "inputs" also Σ f′(u)·s before any gradient, so there the terms are visited twice.
Pairs of another dtype are another launch.

The table is built on the host and copied from pinned memory without waiting for the device; the caller keeps the tensors alive
as for any launch. Bytes at 32 layers, B = 8, H = 8, M = 24, D = 128 in 16 bits: student, teacher and gradient 75 MB, 18 µs at
4.3 TB/s, and two launches; "layer_std" reads the teacher again (25 MB, from L2 for the most part), "inputs" both twice more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..primitives.kv_align import NORM_FLOOR, STD_FLOOR, Distance
from .head import Launch, on_device_of

_STD_FLOOR, _NORM_FLOOR = tl.constexpr(STD_FLOOR), tl.constexpr(NORM_FLOOR)
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# of a pair: addresses of student, teacher, mask, gradient (0: none); its place among coef and sums; heads, slots, features,
# rows; three strides each of student, teacher and mask
_FIELDS = tl.constexpr(18)
# count, mean and Σ (x − mean)² of the student, the same of the teacher; later means and stds
_MOMENTS = tl.constexpr(6)


@dataclass(frozen=True)
class Config:
    """Launch configuration; the reasons are for an H200 and hold on other recent devices."""

    # 32 elements a thread of each side: 64 bytes in flight of each in 16 bits
    tile: int = 4096
    widest: int = 512
    num_warps: int = 4
    # enough to fill the device several times over; a pair's partial sums are as many as its programs
    programs: int = 4096
    most_blocks: int = 1024


CONFIG = Config()


@triton.jit
def _pair(table, S: tl.constexpr, T: tl.constexpr, ALIGNED: tl.constexpr):
    """The addresses of student, teacher, mask and gradient, and the rows and features of a pair."""
    student, teacher = tl.load(table).to(tl.pointer_type(S)), tl.load(table + 1).to(tl.pointer_type(T))
    mask, grad = tl.load(table + 2).to(tl.pointer_type(tl.int8)), tl.load(table + 3).to(tl.pointer_type(S))
    rows, d = tl.load(table + 8), tl.load(table + 7)
    if ALIGNED:
        student, teacher, grad = tl.multiple_of(student, 16), tl.multiple_of(teacher, 16), tl.multiple_of(grad, 16)
        d = tl.multiple_of(d, 16)
    return student, teacher, mask, grad, rows, d


@triton.jit
def _offsets(table, row, FIRST: tl.constexpr, ALIGNED: tl.constexpr):
    """Offsets of rows [B, H, M] under the three strides that begin at a field."""
    heads, slots = tl.load(table + 5), tl.load(table + 6)
    b, h, m = tl.load(table + FIRST), tl.load(table + FIRST + 1), tl.load(table + FIRST + 2)
    if ALIGNED:
        b, h, m = tl.multiple_of(b, 16), tl.multiple_of(h, 16), tl.multiple_of(m, 16)
    return row // slots // heads * b + row // slots % heads * h + row % slots * m


@triton.jit
def _real(table, mask, row, rows):
    """Which rows are real slots."""
    masked = (tl.load(table + 2) + row * 0) != 0
    inside = row < rows
    read = tl.load(mask + _offsets(table, row, 15, False), mask=inside & masked, other=1)
    return inside & (read != 0)


@triton.jit
def _joined(n, mean, squares, x, real, more):
    """(mean, Σ (x − mean)²) of n elements joined with the `more` real ones of a tile, in double."""
    middle = tl.sum(tl.sum(x, 1), 0) / tl.maximum(more, 1.0).to(tl.float32)
    away = tl.where(real, x - middle, 0.0)
    apart = middle.to(tl.float64) - mean
    total = tl.maximum(n + more, 1.0)
    squares += tl.sum(tl.sum(away * away, 1), 0).to(tl.float64) + apart * apart * n * more / total
    return mean + apart * more / total, squares


@triton.jit
def _moments_kernel(
    table, partial, blocks, S: tl.constexpr, T: tl.constexpr, ALIGNED: tl.constexpr, BOTH: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """partial [pairs, 6, blocks]: the moments of a pair's tiles block, block + blocks, …; the student's are 0 unless BOTH."""
    program = tl.program_id(0)
    block = program % blocks
    pair = (program // blocks).to(tl.int64)
    table += pair * _FIELDS
    student, teacher, mask, _, rows, d = _pair(table, S, T, ALIGNED)
    n = tl.full([], 0.0, tl.float64)
    mean_s, squares_s, mean_t, squares_t = n, n, n, n
    for tile in range(block, tl.cdiv(rows, ROWS), blocks):
        row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        slot = _real(table, mask, row, rows)
        slots = tl.sum(slot.to(tl.int32), 0)
        at_s, at_t = _offsets(table, row, 9, ALIGNED), _offsets(table, row, 12, ALIGNED)
        for first in range(0, d, WIDTH):
            column = first + tl.arange(0, WIDTH)
            real = slot[:, None] & (column < d)[None, :]
            more = (slots * tl.minimum(d - first, WIDTH)).to(tl.float64)
            t = tl.load(teacher + at_t[:, None] + column[None, :], mask=real, other=0.0).to(tl.float32)
            mean_t, squares_t = _joined(n, mean_t, squares_t, t, real, more)
            if BOTH:
                s = tl.load(student + at_s[:, None] + column[None, :], mask=real, other=0.0).to(tl.float32)
                mean_s, squares_s = _joined(n, mean_s, squares_s, s, real, more)
            n += more
    partial += pair * _MOMENTS * blocks + block
    tl.store(partial, n)
    tl.store(partial + blocks, mean_s)
    tl.store(partial + 2 * blocks, squares_s)
    tl.store(partial + 3 * blocks, n)
    tl.store(partial + 4 * blocks, mean_t)
    tl.store(partial + 5 * blocks, squares_t)


@triton.jit
def _std_kernel(partial, moments, blocks, BLOCKS: tl.constexpr):
    """moments [pairs, 6]: count, mean and clamped unbiased std of a pair's student, then of its teacher. Program = (pair, side)."""
    side = tl.program_id(0).to(tl.int64) * 3
    block = tl.arange(0, BLOCKS)
    partial += side * blocks + block
    inside = block < blocks
    n, mean = tl.load(partial, mask=inside, other=0.0), tl.load(partial + blocks, mask=inside, other=0.0)
    total = tl.sum(n, 0)
    middle = tl.sum(n * mean, 0) / tl.maximum(total, 1.0)
    away = mean - middle
    squares = tl.sum(tl.load(partial + 2 * blocks, mask=inside, other=0.0) + n * away * away, 0)
    std = tl.sqrt(squares / tl.maximum(total - 1, 1.0))
    tl.store(moments + side, total)
    tl.store(moments + side + 1, middle)
    tl.store(moments + side + 2, tl.maximum(std, _STD_FLOOR))


@triton.jit
def _sum_kernel(table, partial, sums, through, blocks, BLOCKS: tl.constexpr):
    """sums [N] at the pairs' own places, and through [pairs]. Program = pair; partial [pairs, 2, blocks]."""
    pair = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCKS)
    partial += pair * 2 * blocks + block
    tl.store(sums + tl.load(table + pair * _FIELDS + 4), tl.sum(tl.load(partial, mask=block < blocks, other=0.0), 0))
    if through is not None:
        tl.store(through + pair, tl.sum(tl.load(partial + blocks, mask=block < blocks, other=0.0), 0))


@triton.jit
def _distance(d, beta, LOSS: tl.constexpr):
    """f(d) and f′(d)."""
    size = tl.abs(d)
    # a NaN stays one
    sign = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, d))
    if LOSS == "mse":
        value, slope = d * d, 2 * d
    elif LOSS == "l1":
        value, slope = size, sign
    else:
        near = size < beta
        value, slope = tl.where(near, d * d / (2 * beta), size - beta / 2), tl.where(near, d / beta, sign)
    return value, slope


@triton.jit
def _terms_kernel(
    table, coef, moments, through, partial, blocks, beta, S: tl.constexpr, T: tl.constexpr, ALIGNED: tl.constexpr, LOSS: tl.constexpr,
    NORMALIZE: tl.constexpr, SUMS: tl.constexpr, GRADS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """partial [pairs, 2, blocks]: Σ f and, for "inputs", Σ f′·s; and the gradient, of a pair's tiles block, block + blocks, …

    The gradient of "inputs" needs `through` [pairs], the sum of the second: a visit with SUMS, then one with GRADS.
    """
    program = tl.program_id(0)
    block = program % blocks
    pair = (program // blocks).to(tl.int64)
    table += pair * _FIELDS
    student, teacher, mask, grad, rows, d = _pair(table, S, T, ALIGNED)
    weight = tl.load(coef + tl.load(table + 4))
    inv_s, inv_t, scale, middle, back = 1.0, 1.0, tl.full([], 1.0, tl.float64), 0.0, 0.0
    if NORMALIZE != "none":
        moments += pair * _MOMENTS
        n, mean, std_s, std_t = tl.load(moments), tl.load(moments + 1), tl.load(moments + 2), tl.load(moments + 5)
        if NORMALIZE == "inputs":
            inv_s, inv_t, scale, middle = (1 / std_s).to(tl.float32), (1 / std_t).to(tl.float32), 1 / std_s, mean.to(tl.float32)
            if GRADS:
                curve = tl.load(through + pair) / (tl.maximum(n - 1, 1.0) * std_s * std_s * std_s)
                back = tl.where(std_s > _STD_FLOOR, curve * weight, 0.0).to(tl.float32)
        else:
            scale = 1 / (std_t * std_t if LOSS == "mse" else std_t)
    factor = (weight * scale).to(tl.float32)
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    along = tl.zeros([ROWS, WIDTH], tl.float32)
    kept = tl.zeros([ROWS], tl.float32)
    for tile in range(block, tl.cdiv(rows, ROWS), blocks):
        row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        slot = _real(table, mask, row, rows)
        inside = row < rows
        at_s, at_t = _offsets(table, row, 9, ALIGNED), _offsets(table, row, 12, ALIGNED)
        if LOSS == "cosine":
            ss, tt, st = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
            for first in range(0, d, WIDTH):
                column = first + tl.arange(0, WIDTH)
                real = slot[:, None] & (column < d)[None, :]
                s = tl.load(student + at_s[:, None] + column[None, :], mask=real, other=0.0).to(tl.float32)
                t = tl.load(teacher + at_t[:, None] + column[None, :], mask=real, other=0.0).to(tl.float32)
                ss += tl.sum(s * s, 1)
                tt += tl.sum(t * t, 1)
                st += tl.sum(s * t, 1)
            long = tl.maximum(tl.sqrt(ss), _NORM_FLOOR)
            inv = 1 / (long * tl.maximum(tl.sqrt(tt), _NORM_FLOOR))
            kept += tl.where(slot, 1 - st * inv, 0.0)
            pull = tl.where(tl.sqrt(ss) > _NORM_FLOOR, st * inv / long / long, 0.0)
        if LOSS != "cosine" or GRADS:
            for first in range(0, d, WIDTH):
                column = first + tl.arange(0, WIDTH)
                real = slot[:, None] & (column < d)[None, :]
                s = tl.load(student + at_s[:, None] + column[None, :], mask=real, other=0.0).to(tl.float32)
                t = tl.load(teacher + at_t[:, None] + column[None, :], mask=real, other=0.0).to(tl.float32)
                if LOSS == "cosine":
                    slope = pull[:, None] * s - inv[:, None] * t
                else:
                    value, slope = _distance(s * inv_s - t * inv_t, beta, LOSS)
                    if SUMS:
                        total += tl.where(real, value, 0.0)
                        if NORMALIZE == "inputs":
                            along += tl.where(real, slope * s, 0.0)
                if GRADS:
                    ds = slope * factor
                    if NORMALIZE == "inputs":
                        ds -= (s - middle) * back
                    ds = tl.where(real, tl.where(weight != 0, ds, 0.0), 0.0).to(S)
                    tl.store(grad + row[:, None] * d + column[None, :], ds, mask=inside[:, None] & (column < d)[None, :])
    if SUMS:
        partial += pair * 2 * blocks + block
        result = tl.sum(kept, 0) if LOSS == "cosine" else tl.sum(tl.sum(total, 1), 0)
        # 1/σ is inside u for "inputs"
        result = result.to(tl.float64)
        if NORMALIZE == "layer_std":
            result *= scale
        tl.store(partial, result)
        if NORMALIZE == "inputs":
            tl.store(partial + blocks, tl.sum(tl.sum(along, 1), 0).to(tl.float64))


# ------------------------------------------------------------------------------------------------ host


def _fields(i: int, student: Tensor, teacher: Tensor, mask: Tensor | None, grad: Tensor | None) -> list[int]:
    b, heads, slots, d = student.shape
    addresses = [0 if x is None else x.data_ptr() for x in (student, teacher, mask, grad)]
    strides = [*student.stride()[:3], *teacher.stride()[:3], *((0, 0, 0) if mask is None else mask.stride())]
    return [*addresses, i, heads, slots, d, b * heads * slots, *strides]


def _aligned(fields: Sequence[int]) -> bool:
    """Whether 16 bytes may be loaded at a time: as the compiler would know it of arguments."""
    return all(x % 16 == 0 for x in (fields[0], fields[1], fields[3], fields[7], *fields[9:15]))


def launches(
    student: Sequence[Tensor], teacher: Sequence[Tensor], masks: Sequence[Tensor | None], how: Distance, coef: Tensor, sums: Tensor,
    grads: Sequence[Tensor] | None, config: Config = CONFIG,
) -> list[Launch]:  # fmt: skip
    """The launches that write `sums` and `grads`; the arguments are those of ``primitives.kv_align.reference``."""
    groups: dict[tuple[torch.dtype, torch.dtype], list[int]] = {}
    for i, (s, t) in enumerate(zip(student, teacher)):
        groups.setdefault((s.dtype, t.dtype), []).append(i)
    normalize = "none" if how.normalize is None or how.loss == "cosine" else how.normalize
    found = []
    for types, members in groups.items():
        rows = [_fields(i, student[i], teacher[i], masks[i], None if grads is None else grads[i]) for i in members]
        table = torch.tensor(rows, dtype=torch.int64, pin_memory=coef.is_cuda).to(coef.device, non_blocking=True)
        width = min(max(triton.next_power_of_2(max(f[7] for f in rows)), 16), config.widest)
        height = config.tile // width
        tiles = triton.cdiv(max(f[8] for f in rows), height)
        blocks = max(min(tiles, triton.cdiv(config.programs, len(members)), config.most_blocks), 1)
        make = lambda *shape: torch.empty(shape, dtype=torch.float64, device=coef.device)
        tiled = {
            "table": table, "blocks": blocks, "S": _TYPES[types[0]], "T": _TYPES[types[1]], "ALIGNED": all(map(_aligned, rows)),
            "ROWS": height, "WIDTH": width,
        }  # fmt: skip
        moments = through = None
        if normalize != "none":
            partial, moments = make(len(members), 6, blocks), make(len(members), 6)
            found.append(Launch(_moments_kernel, len(members) * blocks, tiled | {"partial": partial, "BOTH": normalize == "inputs"}, config.num_warps))
            joined = {"partial": partial, "moments": moments, "blocks": blocks, "BLOCKS": triton.next_power_of_2(blocks)}
            found.append(Launch(_std_kernel, 2 * len(members), joined, config.num_warps))
        partial = make(len(members), 2, blocks)
        if normalize == "inputs" and grads is not None:
            through = make(len(members))
        terms = tiled | {
            "coef": coef, "moments": moments, "through": through, "partial": partial, "beta": how.beta, "LOSS": how.loss, "NORMALIZE": normalize,
        }  # fmt: skip
        once = grads is not None and through is None
        found.append(Launch(_terms_kernel, len(members) * blocks, terms | {"SUMS": True, "GRADS": once}, config.num_warps))
        added = {"table": table, "partial": partial, "sums": sums, "through": through, "blocks": blocks, "BLOCKS": triton.next_power_of_2(blocks)}
        found.append(Launch(_sum_kernel, len(members), added, config.num_warps))
        if through is not None:
            found.append(Launch(_terms_kernel, len(members) * blocks, terms | {"SUMS": False, "GRADS": True}, config.num_warps))
    return found


def kv_align(
    student: Sequence[Tensor], teacher: Sequence[Tensor], masks: Sequence[Tensor | None], how: Distance, coef: Tensor, sums: Tensor,
    grads: Sequence[Tensor] | None,
) -> None:  # fmt: skip
    """As ``primitives.kv_align.reference``."""
    with on_device_of(coef):
        for launch in launches(student, teacher, masks, how, coef, sums, grads):
            launch.run()
