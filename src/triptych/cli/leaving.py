"""How a signal ends a command: at once, or in order."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import NoReturn


def at_once() -> AbstractContextManager[None]:
    """Let a signal end the process where it stands. For a time in which there is no file and no process to clear away.

    While libraries are imported nothing may be raised: they take it for a failure of their own, lose it or abort.
    """
    return _handling(_end)


@contextmanager
def in_order() -> Iterator[list[int]]:
    """Let a signal raise, so that temporary files are removed and child processes ended; yields those that came."""
    came: list[int] = []

    def leave(number: int, _frame: FrameType | None) -> NoReturn:
        came.append(number)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + number)

    with _handling(leave):
        yield came


@contextmanager
def _handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Give a handler the signals that ask to leave; those that are ignored, as under `nohup`, stay so."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is not None and signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def _end(number: int, _frame: FrameType | None) -> NoReturn:
    if number == signal.SIGINT:
        os.write(2, b"interrupted\n")
    os._exit(128 + number)
