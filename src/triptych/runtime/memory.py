"""What this process does with its memory: it keeps what requests have freed, and has it lie in huge pages.

By itself glibc's allocator fetches a large tensor's memory from the system each time, and gives it back when that is
freed: every page then costs a fault, and threads that compute beside each other wait for one another at that. What is kept
would stay for as long as the process lives, so it is given back when nothing runs, within some milliseconds; under load the
process stays as large as it was at its largest.

What Python and the libraries hold after loading lies in thousands of small pages, on a machine that has run for long all
over its memory. A processor remembers where some of them are, and a role that has slept finds these forgotten: looking them
up again takes a tenth of the time of a small model's request, and more (`bench/huge_pages.py`). One huge page takes the
place of 512 of them.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import platform
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

EVERY = 30.0
"""Seconds from one time to the next."""

LONGEST = 2.0
"""Seconds that gathering may take: it is for what is used all over, not for gigabytes of weights, read one after another."""

_MMAP_MAX, _TRIM_THRESHOLD = -4, -1  # of `mallopt`, from glibc's malloc.h
_MOST = 2**31 - 1
_COLLAPSE = 25  # MADV_COLLAPSE, from Linux's mman.h; there since 6.1
_SLICE = 32 * 2**20  # bytes that are gathered at a time, between two looks at the clock
_giving = threading.Lock()
_gathering = threading.Lock()  # taken for good by whoever gathers first
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
        _give_back_cards()
    finally:
        _next = time.monotonic() + EVERY
        _giving.release()
    return True


def gather() -> None:
    """Have what this process holds lie in huge pages, once in its life; takes some tenths of a second.

    What the system cannot do, for lack of huge pages or because it is too old, is left as it was.
    """
    glibc, size = _glibc(), _huge_page()
    if glibc is None or size is None or not _gathering.acquire(blocking=False):
        return
    began, gathered = time.monotonic(), 0
    for begin, end in sorted(_own(), key=lambda piece: piece[1] - piece[0]):
        begin = -(-begin // size) * size
        while begin + size <= end and time.monotonic() < began + LONGEST:
            nbytes = min(end - begin, _SLICE) // size * size
            if glibc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(nbytes), _COLLAPSE) == 0:
                gathered += nbytes
            begin += nbytes
    if gathered:
        log.info("%.0f MB lie in huge pages now, after %.2f s", gathered / 1e6, time.monotonic() - began)


def _give_back_cards() -> None:
    """Let other processes have what PyTorch keeps of the cards' memory: a role that is idle may share one with a busy one."""
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        try:
            torch.cuda.empty_cache()
        except RuntimeError as error:  # one of something before, mostly: whoever computes next is told, not who is idle
            log.warning("a card's memory could not be given back: %s", error)


def _own() -> Iterator[tuple[int, int]]:
    """Yield where memory lies that this process alone uses, and no file is behind: from which address to which."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, rights, _, _, _, *name = line.split(maxsplit=5)
        if rights == "rw-p" and (not name or name[0] == "[heap]"):
            begin, end = addresses.split("-")
            yield int(begin, 16), int(end, 16)


def _huge_page() -> int | None:
    """Return the bytes of a huge page; None where the system has none, or such large ones that most of one were empty."""
    try:
        size = int(Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size").read_text())
    except OSError:
        return None
    return size if size <= _SLICE else None  # 512 MiB on machines with pages of 64 KiB


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    """Return the C library of this process; None where it is another one, which is not asked."""
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
