"""Memory that requests have freed is kept for the next ones, and goes back to the system when there is nothing to do.

By itself glibc's allocator fetches a large tensor's memory from the system each time, and gives it back when that is
freed: every page then costs a fault, and threads that compute beside each other wait for one another at that. What is kept
would stay for as long as the process lives, so it is given back when nothing runs, within some milliseconds; under load the
process stays as large as it was at its largest.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import threading
import time

EVERY = 30.0
"""Seconds from one time to the next."""

_MMAP_MAX, _TRIM_THRESHOLD = -4, -1  # of `mallopt`, from glibc's malloc.h
_MOST = 2**31 - 1
_giving = threading.Lock()
_next = 0.0


def keep() -> None:
    """Have this process keep the memory that it frees, until `give_back`."""
    if (glibc := _glibc()) is not None:
        glibc.mallopt(_MMAP_MAX, 0)
        glibc.mallopt(_TRIM_THRESHOLD, _MOST)


def give_back() -> bool:
    """Give the memory back that this process has freed; returns False where it did so lately, or another thread is at it."""
    global _next
    if time.monotonic() < _next or not _giving.acquire(blocking=False):
        return False
    try:
        if (glibc := _glibc()) is not None:
            glibc.malloc_trim(0)
        _next = time.monotonic() + EVERY
    finally:
        _giving.release()
    return True


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    """Return the C library of this process; None where it is another one, which is not asked."""
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
