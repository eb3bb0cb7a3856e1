"""Turns: lanes of one process compute side by side, or one after another where side by side is slower.

Threads of one process run Python one at a time. PyTorch lets the others go on while it computes; where it computes for
microseconds, as small models do on a CPU, two lanes pass Python's lock to and fro at every operation, and both together do
less than each by itself would (`bench/turns.py`). Two figures tell: how much of two cores they use, and how often they wait.
"""

from __future__ import annotations

import logging
import resource
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)

USED = 1.4
"""Cores that lanes side by side must use, or else they are suspected of waiting for each other."""
WAITS = 3000.0
"""Waits a second from which on they do: with operations worth the name there are some hundreds."""
WINDOW = 1.0
"""Seconds side by side after which they are judged."""
RECHECK = 60.0
"""Seconds of turns after which side by side is tried again: the requests may be others."""


class Turns:
    """What the lanes of one process agree by.

    Attributes:
        one_by_one: whether only one may compute at a time.
    """

    def __init__(self, usage: Callable[[], tuple[float, float, float]] | None = None) -> None:
        self.one_by_one = False
        self._usage = usage or _usage
        self._lock = threading.Lock()
        self._computing = 0
        self._waiting: deque[threading.Lock] = deque()
        self._spent = [0.0, 0.0, 0.0]  # while two or more computed: seconds, CPU seconds, waits
        self._then = 0.0, 0.0, 0.0  # what had been used at the last look; there is none while one computes by itself
        self._until = 0.0  # when turns end
        self._told = False

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Compute when it is this thread's turn: at once, unless lanes are to go one by one and another one does."""
        with self._lock:
            gate = self._enter()
        if gate is not None:
            gate.acquire()  # until `_leave` opens it
        try:
            yield
        finally:
            with self._lock:
                self._leave()

    def _enter(self) -> threading.Lock | None:
        """Begin to compute, or return what is opened when that may begin."""
        self._judge()
        if self.one_by_one and self._computing:
            gate = threading.Lock()
            gate.acquire()
            self._waiting.append(gate)
            return gate
        self._begin()
        return None

    def _begin(self) -> None:
        self._computing += 1
        if self._computing == 2:  # asked only then: a process has to add up all its threads for it
            self._then = self._usage()

    def _leave(self) -> None:
        self._judge()
        self._computing -= 1
        while self._waiting and not (self.one_by_one and self._computing):
            self._begin()
            self._waiting.popleft().release()

    def _judge(self) -> None:
        """Take note of what has been used since the last look, and decide how to go on."""
        if self.one_by_one:
            self.one_by_one = self._usage()[0] < self._until
        elif self._computing > 1:
            now = self._usage()
            self._spent = [total + new - old for total, new, old in zip(self._spent, now, self._then)]
            seconds, cpu, waits = self._spent
            if seconds > WINDOW:
                self.one_by_one = cpu < USED * seconds and waits > WAITS * seconds
                self._until, self._spent = now[0] + RECHECK, [0.0, 0.0, 0.0]
                if self.one_by_one and not self._told:
                    self._told = True
                    log.info(
                        "roles hold each other up at Python's lock and take turns: in processes of their own they overlap, "
                        "and in a Python without it (3.14t, PYTHON_GIL=0)"
                    )
            self._then = now


def _usage() -> tuple[float, float, float]:
    """Return the time, and this process's CPU seconds and waits so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return time.monotonic(), used.ru_utime + used.ru_stime, float(used.ru_nvcsw)
