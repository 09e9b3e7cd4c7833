"""``gather_dot`` in Triton: h · W[id] for the K ids of a row, and the two gradients. Bound by the rows of W that are read.

Products and sums are in float32 and in a fixed order: no atomics. Rows of W are rounded to the operands' dtype on the way.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .head import Launch, on_device_of


@dataclass(frozen=True)
class Config:
    """Launch configuration; the reasons are for an H200 and hold on other recent devices."""

    num_warps: int = 4
    # [8, 512] entries are 32 a thread: four 16-byte loads of bf16 in flight, 32 registers of sums
    rows: int = 8
    width: int = 512
    # a segment's program walks [8, 1024]: every pair position has its programs, most of which end at once, so they are wide
    segment_rows: int = 8
    segment_width: int = 1024

    def of(self, h: int, width: int) -> int:
        return min(width, max(16, triton.next_power_of_2(h)))


CONFIG = Config()
_OPERANDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _weight_tile(weight, ids, some, columns, h, stride_w, OPERAND: tl.constexpr):
    """Rows of W at `ids` in `columns`, float32; 0 where `some` is false."""
    at = ids.to(tl.int64)[:, None] * stride_w + columns[None, :]
    tile = tl.load(weight + at, mask=some[:, None] & (columns < h)[None, :], other=0.0)
    return tile.to(OPERAND).to(tl.float32)


@triton.jit
def _dot_kernel(hidden, weight, ids, out, h, k, chunks, stride_h, stride_w, OPERAND: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """ROWS slots of a token."""
    program = tl.program_id(0)
    row = (program // chunks).to(tl.int64)
    slot = program % chunks * ROWS + tl.arange(0, ROWS)
    id = tl.load(ids + row * k + slot, mask=slot < k, other=-1)
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for first in range(0, h, WIDTH):
        columns = first + tl.arange(0, WIDTH)
        x = tl.load(hidden + row * stride_h + columns, mask=columns < h, other=0.0).to(tl.float32)
        total += _weight_tile(weight, id, id >= 0, columns, h, stride_w, OPERAND) * x[None, :]
    # an empty slot is 0 whatever the token holds
    tl.store(out + row * k + slot, tl.where(id >= 0, tl.sum(total, 1), 0.0), mask=slot < k)


@triton.jit
def _hidden_grad_kernel(grad, weight, ids, out, h, k, blocks, stride_w, stride_out, OPERAND: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """WIDTH columns of a token's gradient."""
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    columns = program % blocks * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for first in range(0, k, ROWS):
        slot = first + tl.arange(0, ROWS)
        id = tl.load(ids + row * k + slot, mask=slot < k, other=-1)
        g = tl.load(grad + row * k + slot, mask=id >= 0, other=0.0)
        total += _weight_tile(weight, id, id >= 0, columns, h, stride_w, OPERAND) * g[:, None]
    tl.store(out + row * stride_out + columns, tl.sum(total, 0).to(out.dtype.element_ty), mask=columns < h)


@triton.jit
def _weight_grad_kernel(grad, hidden, order, targets, out, pairs, h, k, blocks, stride_h, stride_out, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """WIDTH columns of the row of `out` whose pairs begin at this position, if any do."""
    program = tl.program_id(0)
    at = (program // blocks).to(tl.int64)
    columns = program % blocks * WIDTH + tl.arange(0, WIDTH)
    target = tl.load(targets + at)
    before = tl.load(targets + at - 1, mask=at > 0, other=-1)
    if (target >= 0) & (target != before):
        total = tl.zeros([ROWS, WIDTH], tl.float32)
        more = True
        while more:
            place = at + tl.arange(0, ROWS)
            ours = tl.load(targets + place, mask=place < pairs, other=-1) == target
            pair = tl.load(order + place, mask=ours, other=0)
            g = tl.load(grad + pair, mask=ours, other=0.0)
            x = tl.load(hidden + (pair // k)[:, None] * stride_h + columns[None, :], mask=ours[:, None] & (columns < h)[None, :], other=0.0)
            total += x.to(tl.float32) * g[:, None]
            at += ROWS
            more = tl.load(targets + at, mask=at < pairs, other=-1) == target
        tl.store(out + target.to(tl.int64) * stride_out + columns, tl.sum(total, 0).to(out.dtype.element_ty), mask=columns < h)


# ------------------------------------------------------------------------------------------------ host


def dot_launch(hidden: Tensor, weight: Tensor, ids: Tensor, out: Tensor, config: Config = CONFIG) -> Launch:
    (n, k), h = ids.shape, hidden.shape[1]
    chunks = triton.cdiv(k, config.rows)
    arguments = {
        "hidden": hidden, "weight": weight, "ids": ids, "out": out, "h": h, "k": k, "chunks": chunks,
        "stride_h": hidden.stride(0), "stride_w": weight.stride(0), "OPERAND": _OPERANDS[hidden.dtype],
        "ROWS": config.rows, "WIDTH": config.of(h, config.width),
    }  # fmt: skip
    return Launch(_dot_kernel, n * chunks, arguments, config.num_warps)


def hidden_grad_launch(grad: Tensor, weight: Tensor, ids: Tensor, dtype: torch.dtype, out: Tensor, config: Config = CONFIG) -> Launch:
    (n, k), h = ids.shape, weight.shape[1]
    width = config.of(h, config.width)
    blocks = triton.cdiv(h, width)
    arguments = {
        "grad": grad, "weight": weight, "ids": ids, "out": out, "h": h, "k": k, "blocks": blocks,
        "stride_w": weight.stride(0), "stride_out": out.stride(0), "OPERAND": _OPERANDS[dtype],
        "ROWS": config.rows, "WIDTH": width,
    }  # fmt: skip
    return Launch(_hidden_grad_kernel, n * blocks, arguments, config.num_warps)


def weight_grad_launch(grad: Tensor, hidden: Tensor, order: Tensor, targets: Tensor, out: Tensor, config: Config = CONFIG) -> Launch:
    h, k, pairs = hidden.shape[1], grad.shape[1], order.numel()
    width = config.of(h, config.segment_width)
    blocks = triton.cdiv(h, width)
    arguments = {
        "grad": grad, "hidden": hidden, "order": order, "targets": targets, "out": out, "pairs": pairs, "h": h, "k": k,
        "blocks": blocks, "stride_h": hidden.stride(0), "stride_out": out.stride(0),
        "ROWS": config.segment_rows, "WIDTH": width,
    }  # fmt: skip
    return Launch(_weight_grad_kernel, pairs * blocks, arguments, config.num_warps)


def gather_dot(hidden: Tensor, weight: Tensor, ids: Tensor, out: Tensor) -> None:
    """As ``primitives.gather_dot.reference``."""
    if out.numel():
        with on_device_of(out):
            dot_launch(hidden, weight, ids, out).run()


def gather_dot_hidden_grad(grad: Tensor, weight: Tensor, ids: Tensor, dtype: torch.dtype, out: Tensor) -> None:
    """As ``primitives.gather_dot.reference_hidden_grad``."""
    if out.numel():
        with on_device_of(out):
            hidden_grad_launch(grad, weight, ids, dtype, out).run()


def gather_dot_weight_grad(grad: Tensor, hidden: Tensor, order: Tensor, targets: Tensor, out: Tensor) -> None:
    """As ``primitives.gather_dot.reference_weight_grad``: one program a pair position, and it sums the segment that begins there."""
    if order.numel() and out.numel():
        with on_device_of(out):
            weight_grad_launch(grad, hidden, order, targets, out).run()
