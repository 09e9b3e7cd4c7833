"""CUDA C++ on NVIDIA devices: ``csrc/cuda``, compiled at first use by :mod:`.nvrtc`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..primitives.head import Head
from ..primitives.topk_select import TopK
from . import nvrtc

_LOGIT = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_SERVED = ("topk_select",)

# Three blocks of 12 warps a multiprocessor: 56 registers a thread without spilling, 72 KiB of loads in flight, and two rows
# that stream while the third selects. Shared memory, 41 KiB a block, stays under the 48 that need no opting in.
_THREADS, _BLOCKS = 384, 3

# (largest entry, sum) of every tile must fit into shared memory; a warp's 256 columns are the widest tile
_TILES, _WIDEST = 4800, 256


def why_not(primitive: str, *tensors: Tensor) -> str | None:
    if primitive not in _SERVED:
        return f"there is no CUDA C++ kernel for {primitive}: triton serves it on a GPU"
    logits = tensors[0]
    if logits.device.type != "cuda":
        return f"the CUDA kernels run on CUDA tensors; got a {logits.device.type} tensor"
    if logits.dtype not in _LOGIT:
        return f"the CUDA kernels take float32, bfloat16 or float16 logits; got {logits.dtype}"
    if logits.shape[-1] > _TILES * _WIDEST:
        return f"the CUDA kernel takes rows of up to {_TILES * _WIDEST:,} logits; got {logits.shape[-1]:,}"
    if torch.version.hip is not None:
        return "the CUDA kernels are written for NVIDIA devices; this is a ROCm build of torch"
    major, minor = torch.cuda.get_device_capability(logits.device)
    if major < 8:
        return f"the CUDA kernels need compute capability 8.0 or newer; {logits.device} has {major}.{minor}"
    return nvrtc.why_not()


class Launch(NamedTuple):
    """What one launch runs: the kernel's compile-time parameters, its blocks and threads, and its arguments."""

    name: str
    defines: tuple[tuple[str, int], ...]
    grid: int
    block: int
    arguments: tuple[int | float, ...]

    def run(self, device: torch.device) -> None:
        major, minor = torch.cuda.get_device_capability(device)
        nvrtc.launch(nvrtc.kernel(self.name, f"sm_{major}{minor}", self.defines), device, self.grid, self.block, *self.arguments)


def topk_select(logits: Tensor, head: Head, out: TopK) -> None:
    topk_select_launch(logits, head, out).run(logits.device)


def topk_select_launch(logits: Tensor, head: Head, out: TopK, threads: int = _THREADS, tiles: int = _TILES) -> Launch:
    outer, inner, vocab = logits.shape
    columns = head.columns(vocab)
    sign = (head.logit_scale > 0) - (head.logit_scale < 0)
    capped = head.softcap is not None
    defines = {
        "LOGIT": _LOGIT[logits.dtype],
        "ORDER": sign,
        "SOFTCAP": int(capped),
        "ALIGNED": int(_aligned(logits)),
        "LANES": _lanes(columns, tiles),
        "THREADS": threads,
        "BLOCKS": _BLOCKS,
        "TILES": tiles,
    }
    # z = cap·tanh(slope·y) or slope·y, of y = sign·x; where every y is 0, any slope will do
    slope = abs(head.logit_scale) / (head.softcap if capped else head.temperature) or 1.0
    cap = head.softcap / head.temperature if capped else 0.0
    arguments = (
        logits.data_ptr(), inner, *logits.stride()[:2], columns, out.ids.shape[1], slope, cap,
        out.values.data_ptr(), out.ids.data_ptr(), out.lse.data_ptr(), out.tail_lse.data_ptr(),
    )  # fmt: skip
    return Launch("topk_select", tuple(defines.items()), outer * inner, threads, arguments)


def _aligned(logits: Tensor) -> bool:
    """Whether every row starts on 16 bytes."""
    strides = [stride for size, stride in zip(logits.shape[:2], logits.stride()[:2]) if size > 1]
    return logits.data_ptr() % 16 == 0 and all(stride * logits.element_size() % 16 == 0 for stride in strides)


def _lanes(columns: int, tiles: int) -> int:
    """Lanes of a warp, eight columns each, that make a tile: the fewest that leave no more than `tiles` of them."""
    lanes = 1
    while -(-columns // (8 * lanes)) > tiles:
        lanes *= 2
    return lanes
