"""``recurrence_update`` in Triton: some columns of a head's state a program, the steps and the query group inside it. One launch.

Bytes at B = 8, Hq = 32, Hkv = 8, T = 8,192, one step of float32 attention: 8.4 MB read, 4.2 MB of state read and written: 4 µs of
traffic at 4.3 TB/s, about what a launch costs.
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
    """Launch configuration."""

    # 16 bytes of float32 attention and of each integer a thread
    tile: int = 512
    num_warps: int = 4


CONFIG = Config()


# a step more is not another kernel
@triton.jit(do_not_specialize=["step"])
def _recurrence_kernel(
    attention, last_seen, max_interval, step, alpha, heads, groups, width, t, blocks,
    stride_ab, stride_ah, stride_aw, stride_lb, stride_lh, stride_mb, stride_mh, TILE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    head = program // blocks
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    column = program % blocks * TILE + tl.arange(0, TILE)
    inside = column < t
    attention += b * stride_ab + h * groups * stride_ah
    last_seen += b * stride_lb + h * stride_lh
    max_interval += b * stride_mb + h * stride_mh
    last = tl.load(last_seen + column, mask=inside, other=0)
    interval = tl.load(max_interval + column, mask=inside, other=0)
    for w in range(width):
        line = attention + tl.cast(w, tl.int64) * stride_aw
        seen = tl.zeros([TILE], tl.int1)
        for g in range(groups):
            seen = seen | (tl.load(line + tl.cast(g, tl.int64) * stride_ah + column, mask=inside, other=0.0).to(tl.float32) > alpha)
        interval = tl.where(seen, tl.maximum(interval, step + w - last), interval)
        last = tl.where(seen, step + w, last)
    tl.store(last_seen + column, last, mask=inside)
    tl.store(max_interval + column, interval, mask=inside)


def launch(attention: Tensor, last_seen: Tensor, max_interval: Tensor, step: int, alpha: float, config: Config = CONFIG) -> Launch:
    b, query_heads, width, t = attention.shape
    heads, blocks = last_seen.shape[1], triton.cdiv(t, config.tile)
    names = [f"stride_{letter}" for letter in ("ab", "ah", "aw", "lb", "lh", "mb", "mh")]
    strides = (*attention.stride()[:3], *last_seen.stride()[:2], *max_interval.stride()[:2])
    arguments = {
        "attention": attention, "last_seen": last_seen, "max_interval": max_interval, "step": step,
        # PyTorch compares with the number of the attention's own dtype that is nearest to alpha
        "alpha": torch.tensor(alpha, dtype=attention.dtype).item(),
        "heads": heads, "groups": query_heads // heads, "width": width, "t": t, "blocks": blocks, "TILE": config.tile,
    }  # fmt: skip
    return Launch(_recurrence_kernel, b * heads * blocks, arguments | dict(zip(names, strides)), config.num_warps)


def recurrence_update(attention: Tensor, last_seen: Tensor, max_interval: Tensor, step: int, alpha: float) -> None:
    """As ``primitives.recurrence_update.reference``."""
    with on_device_of(attention):
        launch(attention, last_seen, max_interval, step, alpha).run()
