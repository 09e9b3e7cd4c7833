"""One writer per store: an advisory lock that the kernel drops when its holder dies, so a lock is never stale."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import weakref
from pathlib import Path

from ..errors import StoreError

NAME = "writer.lock"
_held: weakref.WeakSet[WriterLock] = weakref.WeakSet()


class WriterLock:
    """flock on ``writer.lock`` from construction to :meth:`release`; StoreError naming the holder where it is taken.

    The file stays behind (removing it would let two writers lock two files of one name); its text is only for the message.
    """

    def __init__(self, folder: Path):
        path = folder / NAME
        try:
            self._descriptor: int | None = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as reason:
            raise StoreError(f"the lock file cannot be opened: {reason.strerror}", path) from reason
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        except OSError as reason:
            holder = os.pread(self._descriptor, 512, 0).decode(errors="replace")
            self.release()
            if reason.errno in (errno.EACCES, errno.EAGAIN):
                raise StoreError(f"another writer has the store open: {holder or 'a process that has not said who it is'}", path) from reason
            raise StoreError(f"cannot be locked: {reason.strerror}", path) from reason
        _held.add(self)

    def release(self) -> None:
        """Closes the descriptor; a second call does nothing."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _forget() -> None:
    # a forked data-loader worker must not keep the lock of a parent that was killed
    for lock in list(_held):
        lock.release()


os.register_at_fork(after_in_child=_forget)
