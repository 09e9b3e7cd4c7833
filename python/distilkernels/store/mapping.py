"""Files in memory. :mod:`mmap` keeps a descriptor for every map (until Python 3.13 always), and a process may have 1,024 of those
by default: a store of more shards could not be read."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import numpy as np

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_FAILED = ctypes.c_void_p(-1).value


class _Map:
    """A map that lives as long as an array on it does."""

    def __init__(self, descriptor: int, size: int):
        # in here too: modules may be gone when the last map goes
        self._unmap, self._size = _libc.munmap, size
        self._address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
        if self._address == _FAILED:
            self._address = None
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        self.__array_interface__ = {"data": (self._address, True), "shape": (size,), "typestr": "|u1", "version": 3}

    def __del__(self):
        if self._address is not None:
            self._unmap(self._address, self._size)


def mapped(path: Path) -> np.ndarray:
    """The bytes of a file, read-only uint8 [size], without an open descriptor. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(descriptor).st_size
        return np.asarray(_Map(descriptor, size)) if size else np.zeros(0, np.uint8)
    finally:
        os.close(descriptor)
