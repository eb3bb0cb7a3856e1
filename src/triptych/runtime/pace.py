"""What sharing a call brings: seconds a row at each number of rows, learned from the calls of requests themselves."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

GAIN = 1.1
"""What doubling a call's rows must bring in throughput: requests that run together end together, the first ones later."""
LONGEST = 0.5
"""Seconds: what takes longer is bound by computing, not by overhead. It is not made larger, nor its memory risked."""
MOST_ROWS = 16
TRIALS = 3
"""Calls with a number of rows before it is judged, by the fastest: the first one warms up."""
PATIENCE = 30.0
"""Seconds that a lane waits to be idle before it tries out, between its requests, how much may be shared."""
RECHECK = 60.0
"""Seconds after which the next larger number of rows is tried again: the last trials may have met a busy device."""


@dataclass
class Pace:
    """What is known about one kind of call: the model, and the shape of a row.

    Attributes:
        fixed: the rows to aim for, where that is not to be learned.
        limit: rows that are not exceeded, because more failed.
        bytes: memory that a row takes while it is computed, where that is known.
        tried: whether its trials wait to be made, or are over.
    """

    fixed: int | None = None
    limit: int = MOST_ROWS
    bytes: float = 0.0
    tried: bool = False
    clock: Callable[[], float] = time.monotonic
    _seconds: dict[int, deque[float]] = field(default_factory=dict)  # a row's, by rows rounded down to a power of two
    _since: float = field(default=0.0, init=False)  # what is known has not been doubted

    def __post_init__(self) -> None:
        self._since = self.clock()

    @property
    def aim(self) -> int:
        """The rows that the next call should have: the number that is tried next, or the one found best."""
        return self._search()[0]

    @property
    def settled(self) -> bool:
        """Whether `aim` was found best."""
        return self._search()[1]

    @property
    def most(self) -> int:
        """The rows that a call may ever have, by the least that a row took: what would take too long is never tried."""
        fastest = min((min(each) for each in self._seconds.values() if each), default=LONGEST)
        rows = 1
        while 2 * rows <= self.limit and rows * fastest <= LONGEST:
            rows *= 2
        return rows

    @property
    def worth(self) -> int:
        """The rows to wait together: `aim`, and as long as nothing is known enough to try one more row than one."""
        aim, settled = self._search()
        return aim if settled else max(aim, 2 * min(self._seconds, default=1))

    def note(self, rows: int, seconds: float) -> None:
        """Take note of a call that took `seconds`."""
        level = _level(rows)
        self._seconds.setdefault(level, deque(maxlen=TRIALS)).append(seconds / rows)
        if self.clock() - self._since > RECHECK:
            self._since = self.clock()
            self.bytes = 0.0  # what another lane took meanwhile may have been counted
            best, _ = self._search()
            self._seconds.pop(2 * best, None)
            self.limit = min(MOST_ROWS, 2 * self.limit)

    def _search(self) -> tuple[int, bool]:
        """Return the rows to aim for, and whether they were found best."""
        if self.fixed is not None:
            return self.fixed, True
        level = min(self._seconds, default=1)
        while True:
            known, larger = self._seconds.get(level, ()), self._seconds.get(2 * level, ())
            if known and min(known) * level > LONGEST:  # before all else: what takes so long is not repeated as a trial
                return level, True
            if len(known) < TRIALS:
                return level, False
            if 2 * level > self.limit:
                return level, True
            if len(larger) < TRIALS:
                return 2 * level, False
            if min(larger) * GAIN > min(known):
                return level, True
            level *= 2


@dataclass
class Appetite:
    """How many segments of one kind are to run together; two until more, or fewer, are found to be worth it.

    Attributes:
        met: how often a lane has taken one up, with others or alone.
    """

    found: int = 2
    met: int = field(default=0, init=False)
    clock: Callable[[], float] = time.monotonic
    _again: float = field(default=0.0, init=False)

    @property
    def size(self) -> int:
        """The number; of a kind that gained nothing two again after a while, because that may have changed."""
        return 2 if self.found < 2 and self.clock() > self._again else self.found

    def note(self, found: int, seconds: float) -> None:
        """Take note of the number that the last run's calls were found worth, and of the seconds that one took.

        The longer that was, the longer it is left alone: a trial lets a request wait for another.
        """
        self.found, self._again = max(1, found), self.clock() + RECHECK * max(1.0, seconds / LONGEST)


def _level(rows: int) -> int:
    """Return a number of rows rounded down to a power of two."""
    return 1 << (rows.bit_length() - 1)
