"""Crews: the threads that drive lanes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Protocol

from triptych.runtime import memory

QUIET = 5.0
"""Seconds without anything to do after which a thread sees to it that free memory goes back to the system."""


class Driven(Protocol):
    """What a crew drives: a lane."""

    @property
    def has_work(self) -> bool:
        """Whether there is something to do. Asked while the crew is locked."""

    def work(self) -> None:
        """Do one piece of it; raises nothing."""


class Crew:
    """Threads that drive lanes, each lane by one of them at a time.

    A lane that is handed something by one that has nothing left is driven by the same thread: what its core has at hand,
    Python and the libraries and what was computed last, is of use to the next segment too. In all other cases another
    thread takes it up at once, the one that was busy last.

    Args:
        size: how many threads: as many as lanes, so that none has to wait for another.
        name: of the threads.
        prepare: called by each thread before anything else.
    """

    def __init__(self, size: int, name: str, prepare: Callable[[], None]) -> None:
        memory.keep()
        self._lock = threading.Lock()
        self._rested = threading.Condition(self._lock)
        self._taken: set[Driven] = set()  # the lanes that a thread drives, or was offered
        self._threads = [_Driver(self, f"{name}-{k}" if size > 1 else name, prepare) for k in range(size)]
        self._idle = list(self._threads)
        for each in self._threads:
            each.start()

    def wake(self, lane: Driven) -> None:
        """Have a lane driven that has something to do."""
        with self._lock:
            if lane in self._taken:  # whoever drives it looks again before he leaves it
                return
            self._taken.add(lane)
            me = threading.current_thread()
            if not (isinstance(me, _Driver) and me.crew is self and me.offer(lane)):
                self._idle.pop().begin(lane)

    def go_on(self, driver: _Driver, lane: Driven, offered: Driven | None) -> Driven | None:
        """Return what a thread is to drive after a piece of a lane's work: the same lane, what it was offered, or nothing."""
        with self._lock:
            if lane.has_work:
                if offered is not None:
                    self._idle.pop().begin(offered)
                return lane
            self._taken.discard(lane)
            self._rested.notify_all()
            if offered is None:
                self._idle.append(driver)
            return offered

    def rest(self, lane: Driven) -> None:
        """Wait until a lane has nothing left to do, and nobody drives it."""
        with self._lock:
            self._rested.wait_for(lambda: lane not in self._taken)

    def close(self) -> None:
        """End the threads. No lane may have anything left to do."""
        for each in self._threads:
            each.begin(None)
        for each in self._threads:
            each.join()


class _Driver(threading.Thread):
    def __init__(self, crew: Crew, name: str, prepare: Callable[[], None]) -> None:
        super().__init__(name=name, daemon=True)
        self.crew = crew
        self._prepare = prepare
        self._next: SimpleQueue[Driven | None] = SimpleQueue()
        self._lane: Driven | None = None
        self._offered: Driven | None = None

    def begin(self, lane: Driven | None) -> None:
        """Drive a lane; None to end."""
        self._next.put(lane)

    def offer(self, lane: Driven) -> bool:
        """Return whether this thread, which calls it, takes a lane up as soon as it has ended what it is at."""
        if self._offered is not None or self._lane is None or self._lane.has_work:
            return False
        self._offered = lane
        return True

    def run(self) -> None:
        self._prepare()
        while (lane := self._wait()) is not None:
            while lane is not None:
                self._lane = lane
                lane.work()
                offered, self._offered = self._offered, None
                lane = self.crew.go_on(self, lane, offered)
            self._lane = None

    def _wait(self) -> Driven | None:
        """Return what is to be driven next. Where that does not come for long, free memory goes back to the system."""
        while True:
            with suppress(Empty):
                return self._next.get(timeout=QUIET)
            if memory.give_back():
                return self._next.get()
