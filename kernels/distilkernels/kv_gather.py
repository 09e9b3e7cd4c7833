"""``kv_gather`` in Triton: keys and values of all heads in one launch, the keys turned on the way where a rotation is given.

A program copies chunks of slots of one head's keys, or of its values. Out of place each chunk has its own program. In place one
program walks the chunks of a head in order, and reads each whole before it writes it: with indices[m] ≥ m no later chunk reads
what an earlier one wrote.

Bytes: B·H·M·(D + Dv)·itemsize read and written: at B = 8, H = 8, T = 8,192, D = 128 in 16 bits and a quarter kept 134 MB, 31 µs
at 4.3 TB/s. In place only 2·B·H programs load at once: 2 MB in flight of the 3.4 MB that the memory's latency asks for.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from ..primitives.kv_gather import Rotation
from .head import Launch, on_device_of


@dataclass(frozen=True)
class Config:
    """Launch configuration; the reasons are for an H200 and hold on other recent devices."""

    # 64 bytes in flight a thread: out of place in many small programs, in place in few that should hold much
    chunk_bytes: int = 1 << 13
    num_warps: int = 4
    inplace_chunk_bytes: int = 1 << 14
    inplace_num_warps: int = 8

    def slots(self, slots: int, row_bytes: int, inplace: bool) -> int:
        """Slots a chunk: a power of two."""
        size = self.inplace_chunk_bytes if inplace else self.chunk_bytes
        return min(max(size // row_bytes, 1), triton.next_power_of_2(slots))


CONFIG = Config()


@triton.jit
def _angles(cos, sin, source, target, at, valid, rows, lanes, HALF: tl.constexpr):
    """cos, sin [SLOTS, lanes] of the angle from source to target, and whether both have one in the table."""
    lane = (lanes < HALF)[None, :]
    place = tl.load(source + at, mask=valid, other=0)
    known = (place >= 0) & (place < rows)
    some = (valid & known)[:, None] & lane
    entry = place.to(tl.int64)[:, None] * HALF + lanes[None, :]
    c, s = tl.load(cos + entry, mask=some, other=0.0), -tl.load(sin + entry, mask=some, other=0.0)
    if target is not None:
        place = tl.load(target + at, mask=valid, other=0)
        known = known & (place >= 0) & (place < rows)
        some = (valid & known)[:, None] & lane
        entry = place.to(tl.int64)[:, None] * HALF + lanes[None, :]
        c_to, s_to = tl.load(cos + entry, mask=some, other=0.0), tl.load(sin + entry, mask=some, other=0.0)
        c, s = c_to * c - s_to * s, s_to * c + c_to * s
    return c, s, known


@triton.jit
def _gather_kernel(
    keys, values, indices, cos, sin, source, target, out_keys, out_values, heads, t, slots, chunks, parts, rows, d, dv,
    stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt, stride_xb, stride_xh, stride_xm, stride_yb, stride_yh, stride_ym,
    HALF: tl.constexpr, INTERLEAVED: tl.constexpr, HALF_TILE: tl.constexpr, KEY_TILE: tl.constexpr, VALUE_TILE: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Chunks part, part + parts, … of one head's keys (x) or values (y). Program = (head, keys or values, part)."""
    program = tl.program_id(0)
    head = program // parts // 2
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    keys += b * stride_kb + h * stride_kh
    values += b * stride_vb + h * stride_vh
    out_keys += b * stride_xb + h * stride_xh
    out_values += b * stride_yb + h * stride_yh
    for chunk in range(program % parts, chunks, parts):
        slot = chunk * SLOTS + tl.arange(0, SLOTS)
        inside = slot < slots
        at = head.to(tl.int64) * slots + slot
        index = tl.load(indices + at, mask=inside, other=-1)
        valid = (index >= 0) & (index < t)
        index, slot = index.to(tl.int64)[:, None], slot.to(tl.int64)[:, None]
        if program // parts % 2 == 0:
            # what is behind the turned features, or all of them
            feature = 2 * HALF + tl.arange(0, KEY_TILE)
            if HALF > 0:
                lanes = tl.arange(0, HALF_TILE)
                c, s, known = _angles(cos, sin, source, target, at, valid, rows, lanes, HALF)
                valid = valid & known
                first = 2 * lanes if INTERLEAVED else lanes
                second = first + (1 if INTERLEAVED else HALF)
                some = valid[:, None] & (lanes < HALF)[None, :]
                x = tl.load(keys + index * stride_kt + first[None, :], mask=some, other=0.0).to(tl.float32)
                y = tl.load(keys + index * stride_kt + second[None, :], mask=some, other=0.0).to(tl.float32)
                rest = tl.load(keys + index * stride_kt + feature[None, :], mask=valid[:, None] & (feature < d)[None, :], other=0.0)
                tl.debug_barrier()
                some = inside[:, None] & (lanes < HALF)[None, :]
                kind = out_keys.dtype.element_ty
                tl.store(out_keys + slot * stride_xm + first[None, :], (x * c - y * s).to(kind), mask=some)
                tl.store(out_keys + slot * stride_xm + second[None, :], (x * s + y * c).to(kind), mask=some)
            else:
                rest = tl.load(keys + index * stride_kt + feature[None, :], mask=valid[:, None] & (feature < d)[None, :], other=0.0)
                tl.debug_barrier()
            tl.store(out_keys + slot * stride_xm + feature[None, :], rest, mask=inside[:, None] & (feature < d)[None, :])
        else:
            column = tl.arange(0, VALUE_TILE)
            row = tl.load(values + index * stride_vt + column[None, :], mask=valid[:, None] & (column < dv)[None, :], other=0.0)
            tl.debug_barrier()
            tl.store(out_values + slot * stride_ym + column[None, :], row, mask=inside[:, None] & (column < dv)[None, :])


def launch(
    keys: Tensor, values: Tensor, indices: Tensor, rotation: Rotation | None, out_keys: Tensor, out_values: Tensor, inplace: bool,
    config: Config = CONFIG,
) -> Launch:  # fmt: skip
    (b, heads, slots), d, dv = indices.shape, keys.shape[3], values.shape[3]
    half = 0 if rotation is None else rotation.cos.shape[1]
    key_tile, value_tile = (triton.next_power_of_2(max(x, 1)) for x in (d - 2 * half, dv))
    row = max(triton.next_power_of_2(max(d, 1)) * keys.element_size(), value_tile * values.element_size())
    size = config.slots(slots, row, inplace)
    chunks = triton.cdiv(slots, size)
    parts = 1 if inplace else chunks
    cos, sin, source, target = (None,) * 4 if rotation is None else rotation[:4]
    letters = [f"stride_{side}{axis}" for side, axes in (("k", "bht"), ("v", "bht"), ("x", "bhm"), ("y", "bhm")) for axis in axes]
    strides = [s for x in (keys, values, out_keys, out_values) for s in x.stride()[:3]]
    arguments = {
        "keys": keys, "values": values, "indices": indices, "cos": cos, "sin": sin, "source": source, "target": target,
        "out_keys": out_keys, "out_values": out_values, "heads": heads, "t": keys.shape[2], "slots": slots, "chunks": chunks, "parts": parts,
        "rows": 0 if rotation is None else rotation.cos.shape[0], "d": d, "dv": dv, "HALF": half,
        "INTERLEAVED": rotation is not None and rotation.interleaved, "HALF_TILE": triton.next_power_of_2(max(half, 1)),
        "KEY_TILE": key_tile, "VALUE_TILE": value_tile, "SLOTS": size,
    }  # fmt: skip
    return Launch(_gather_kernel, b * heads * 2 * parts, arguments | dict(zip(letters, strides)), config.inplace_num_warps if inplace else config.num_warps)


def kv_gather(
    keys: Tensor, values: Tensor, indices: Tensor, rotation: Rotation | None, out_keys: Tensor, out_values: Tensor, inplace: bool = False
) -> None:  # fmt: skip
    """As ``primitives.kv_gather.reference``."""
    with on_device_of(keys):
        launch(keys, values, indices, rotation, out_keys, out_values, inplace).run()
