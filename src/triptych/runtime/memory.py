"""Memory that was freed goes back to the system.

glibc's allocator keeps much of what threads have freed for as long as the process lives: a lane's largest call would
leave its mark for good. Asked to, it gives that back within some milliseconds. What is given back has to be fetched again,
which costs milliseconds too, so it is asked when there is nothing to do; under load the process stays as large as it was
at its largest.
"""

from __future__ import annotations

import ctypes
import platform
import threading
import time

EVERY = 30.0
"""Seconds from one time to the next."""

_giving = threading.Lock()
_next = 0.0


def give_back() -> bool:
    """Give the memory back that this process has freed; returns False where it did so lately, or another thread is at it."""
    global _next
    if time.monotonic() < _next or not _giving.acquire(blocking=False):
        return False
    try:
        if platform.libc_ver()[0] == "glibc":
            ctypes.CDLL(None).malloc_trim(0)
        _next = time.monotonic() + EVERY
    finally:
        _giving.release()
    return True
