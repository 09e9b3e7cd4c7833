"""What every kernel on logits shares: the head from x to z, row addresses, and a launch as a value."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..primitives.head import Head

# what z is of x: x itself; x·logit_scale/T; cap·tanh(x·logit_scale/cap)/T
_PLAIN, _SCALED, _SOFTCAP = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp(x):
    """e^x of fp32. tl.exp keeps results below 2⁻¹²⁶ at three more instructions a lane, a fifth of the forward pass; these are 0."""
    return tl.exp2(x * _LOG2E)


@triton.jit
def _tanh(u):
    """To 2 ulp. (1 − e)/(1 + e) cancels near zero, where the series takes over.

    Every multiplication that feeds an addition is an explicit fma, so that two kernels get the same bits: rank compares them.
    """
    a = tl.abs(u)
    e = exp(-2.0 * a)
    s = a * a
    series = tl.fma(s, tl.full(s.shape, 62 / 2835, tl.float32), tl.full(s.shape, -17 / 315, tl.float32))
    series = tl.fma(s, series, tl.full(s.shape, 2 / 15, tl.float32))
    series = tl.fma(s, series, tl.full(s.shape, -1 / 3, tl.float32))
    series = tl.fma(s * a, series, a)
    t = tl.where(a < 0.25, series, (1.0 - e) / (1.0 + e))
    return tl.where(u < 0, -t, t)


@triton.jit
def untempered(x, scale, cap, HEAD: tl.constexpr):
    """T·z in fp32; `scale` is logit_scale, over the cap where there is one."""
    x = x.to(tl.float32)
    if HEAD == _SCALED:
        x = x * scale
    elif HEAD == _SOFTCAP:
        x = cap * _tanh(x * scale)
    return x


@triton.jit
def tempered(x, inv_t, HEAD: tl.constexpr):
    if HEAD != _PLAIN:
        x = x * inv_t
    return x


@triton.jit
def row_offset(row, inner_rows, stride_o, stride_i):
    row = row.to(tl.int64)
    return (row // inner_rows) * stride_o + (row % inner_rows) * stride_i


def head_arguments(head: Head, vocab: int) -> dict[str, object]:
    """The kernels' arguments for `head`: scale, cap, inv_t, t, columns and the constants HEAD and MASKED."""
    softcap = head.softcap is not None
    scaled = head.logit_scale != 1.0 or head.temperature != 1.0
    return {
        "columns": head.columns(vocab),
        "scale": head.logit_scale / head.softcap if softcap else head.logit_scale,
        "cap": head.softcap if softcap else 1.0,
        "inv_t": 1.0 / head.temperature,
        "t": head.temperature,
        "HEAD": (_SOFTCAP if softcap else _SCALED if scaled else _PLAIN).value,
        # lanes beyond the row are loaded as −inf, which softcap and a scale ≤ 0 turn into something else
        "MASKED": head.valid_vocab is not None or softcap or head.logit_scale <= 0,
    }


def row_strides(rows: Tensor) -> tuple[int, int]:
    """Strides of the two row axes of [O, I, V].

    An axis of length 1 gets V: what is known of the strides' divisibility decides the order of summation, and one row
    must have the bits that it has among many.
    """
    return tuple(rows.stride(axis) if rows.shape[axis] > 1 else rows.shape[2] for axis in (0, 1))


class Launch(NamedTuple):
    """One kernel launch as a value: run by the launchers, compiled ahead of time by the tests.

    ``max_registers``: of a thread. ptxas takes what a kernel needs up to there; unasked, it prefers spilling a few registers to
    one program less on a multiprocessor.
    """

    kernel: object
    programs: int
    arguments: dict[str, object]
    num_warps: int
    max_registers: int | None = None

    @property
    def options(self) -> dict[str, object]:
        """The compiler's: fp fusion is named because its default differs between triton's releases."""
        options = {"num_warps": self.num_warps, "enable_fp_fusion": True}
        return options if self.max_registers is None else options | {"maxnreg": self.max_registers}

    def run(self) -> None:
        self.kernel[(self.programs,)](**self.arguments, **self.options)


def on_device_of(tensor: Tensor):
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
