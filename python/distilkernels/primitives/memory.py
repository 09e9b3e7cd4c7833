"""CPU memory for large results. A fresh page costs more than the number written to it: 3 GB/s against 12."""

from __future__ import annotations

import math
import mmap
import sys
import threading

import numpy as np
import torch

_INTEGER = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
_HUGE_PAGE = 2**21

# below this the allocator itself keeps pages warm
_RECYCLE_FROM = 2**23

_lock = threading.Lock()
_kept: np.ndarray | None = None


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros whose pages exist only once they are written: calloc on a CPU, an ordinary fill elsewhere."""
    count = math.prod(shape)
    if device.type != "cpu" or count * dtype.itemsize < 16 * mmap.PAGESIZE:
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(count, _INTEGER[dtype.itemsize])).view(dtype).view(shape)


def recycled_empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """``torch.empty`` that reuses the last large CPU buffer once nothing refers to it any more.

    One buffer is kept, of the last size asked for: a training loop frees the gradient of step t before step t + 1 makes
    its own, and then meets warm, huge pages. Anything that still holds the tensor or a view of it, a ``.grad`` say,
    keeps the buffer from being given out again. :func:`release` gives it back to the system.
    """
    global _kept
    nbytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or nbytes < _RECYCLE_FROM:
        return torch.empty(shape, dtype=dtype, device=device)
    with _lock:
        # two references are ours: the name and getrefcount's argument; a tensor made of the buffer is a third
        if _kept is None or _kept.nbytes != nbytes or sys.getrefcount(_kept) > 2:
            _kept = _aligned(nbytes)
        return torch.from_numpy(_kept).view(dtype).view(shape)


def release() -> None:
    """Forgets the buffer kept for reuse; its memory returns to the system when nothing else holds it."""
    global _kept
    with _lock:
        _kept = None


def _aligned(nbytes: int) -> np.ndarray:
    """Bytes that start on a huge page and ask for huge pages, where the system has them."""
    area = mmap.mmap(-1, nbytes + _HUGE_PAGE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        area.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(area, np.int8)
    start = -whole.ctypes.data % _HUGE_PAGE
    return whole[start : start + nbytes]
