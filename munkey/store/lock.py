"""Lock of a store, which a forked process does not inherit from a thread that the process lacks."""

from __future__ import annotations

import os
import threading
import weakref

import torch

__all__ = ["Lock"]


class Lock:
    """A re-entrant lock, which is held in a forked process only if the forking thread held it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        _locks.add(self)

    def after_fork(self) -> None:
        """Free the lock if it is held by a thread that the new process does not have."""
        if self._lock.acquire(blocking=False):
            self._lock.release()
        else:
            self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


_locks: weakref.WeakSet[Lock] = weakref.WeakSet()


def _after_fork() -> None:
    for lock in list(_locks):
        lock.after_fork()
    if _locks:  # threads of OpenMP do not survive a fork, and a search that waits for such threads would hang
        torch.set_num_threads(1)


os.register_at_fork(after_in_child=_after_fork)
