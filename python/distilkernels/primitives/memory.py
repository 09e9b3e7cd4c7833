"""CPU memory for large results. A fresh page costs more than the number written to it: 3 GB/s against 12."""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import sys
import threading
from collections.abc import Sequence

import numpy as np
import torch

_HUGE_PAGE = 2**21

# below this the allocator itself keeps pages warm
_RECYCLE_FROM = 2**23

# the reference count tells who holds a buffer only where a lock keeps it exact
_COUNTED = getattr(sys, "_is_gil_enabled", lambda: True)()

_lock = threading.Lock()
_kept: dict[str, np.ndarray] = {}


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros of which only the pages that are written come to exist, for gradients that touch few rows of a large weight."""
    nbytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or nbytes < _RECYCLE_FROM:
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(_pages(nbytes, huge=False)[:nbytes]).view(dtype).view(shape)


def recycled_empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """``torch.empty`` that reuses the last large CPU buffer once nothing refers to it any more.

    One buffer is kept, the last one made: a training loop frees the gradient of step t before step t + 1 makes its own,
    and then meets warm, huge pages. Anything that still holds the tensor or a view of it, a ``.grad`` say, keeps the
    buffer from being given out again. :func:`release` gives it back to the system. Its storage cannot be resized.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or nbytes < _RECYCLE_FROM or not _COUNTED:
        return torch.empty(shape, dtype=dtype, device=device)
    return _recycled("one", nbytes)[:nbytes].view(dtype).view(shape)


def recycled_empties(like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """A contiguous ``torch.empty_like`` of each, side by side in a buffer that is recycled as that of :func:`recycled_empty` is.

    They share a storage, so the buffer waits for the last of them, but are no views: each has its own version.
    """
    line = 64
    alike: dict[tuple, list[int]] = {}
    for i, t in enumerate(like):
        alike.setdefault((t.shape, t.dtype), []).append(i)
    rooms = [-(-math.prod(shape) * dtype.itemsize // line) * line for shape, dtype in alike]
    nbytes = sum(room * len(places) for room, places in zip(rooms, alike.values()))
    if not like or like[0].device.type != "cpu" or nbytes < _RECYCLE_FROM or not _COUNTED:
        return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in like]
    # few operations, since none of their code is in a cache behind a kernel
    buffer, start, made = _recycled("many", nbytes), 0, [None] * len(like)
    for ((shape, dtype), places), room in zip(alike.items(), rooms):
        size, strides = dtype.itemsize, [math.prod(shape[d + 1 :]) for d in range(len(shape))]
        each = buffer.view(dtype).as_strided((len(places), *shape), (room // size, *strides), start // size).unbind()
        for i, x in zip(places, each):
            made[i] = x.data  # no longer a view
        start += room * len(places)
    return made


def release() -> None:
    """Forgets the buffers kept for reuse; their memory returns to the system when nothing else holds it."""
    with _lock:
        _kept.clear()


def _recycled(use: str, nbytes: int) -> torch.Tensor:
    """The bytes of the buffer last made for this use, or of a new one: `nbytes` or more."""
    with _lock:
        kept = _kept.pop(use, None)
        # two references are ours: the name and getrefcount's argument; a tensor made of the buffer is a third
        if kept is None or not nbytes <= kept.nbytes <= 4 * nbytes or sys.getrefcount(kept) > 2:
            kept = _pages(nbytes, huge=True)
        _kept[use] = kept
        return torch.from_numpy(kept)


def _pages(nbytes: int, huge: bool) -> np.ndarray:
    """Fresh private pages, zero when first touched; huge ones start on their own boundary."""
    # Python's default is a mapping that a forked child would share
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    area = mmap.mmap(-1, nbytes + _HUGE_PAGE, **private)
    advice = getattr(mmap, "MADV_HUGEPAGE" if huge else "MADV_NOHUGEPAGE", None)
    if advice is not None:
        with contextlib.suppress(OSError):  # a kernel without huge pages
            area.madvise(advice)
    whole = np.frombuffer(area, np.int8)
    start = -whole.ctypes.data % _HUGE_PAGE
    return whole[start : start + nbytes]


def _after_fork() -> None:
    global _lock, _kept
    _lock, _kept = threading.Lock(), {}


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
