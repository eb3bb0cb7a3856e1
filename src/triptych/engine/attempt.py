"""Tickets in the process of their replica."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeAlias

from triptych.engine.inbox import Order
from triptych.errors import Cancelled, WireError, to_text

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from triptych.engine.direct import Placed
    from triptych.runtime.lanes import Lane, Work
    from triptych.state import State

Ended: TypeAlias = "tuple[dict[str, Any], npt.NDArray[np.uint8] | Placed]"

REMEMBERED = 256
"""How many tickets that are done, or taken back, a replica remembers."""
FORGOTTEN = 60.0
"""Seconds that a ticket waits for its state, or for being asked, without a word from its router, which says every half
second what it wants."""


class Attempt:
    """A ticket that is begun by whatever brings its state first.

    Attributes:
        order: what is to be done with its state, once that has come.
        ended: what became of it, and the state after it in its wire form, or where it lies; empty where it failed.
        asked: whether the router has asked for that through Ray.
        progress: the stage, the step and the steps in all; None before the first.
        previews: the pictures on the way that were made so far: step, steps, PNG.
        wanted: when its router last said that it wants it.
    """

    order: Order

    def __init__(self) -> None:
        self.ended: Future[Ended] = Future()
        self.asked = False
        self.wanted = time.monotonic()
        self.progress: tuple[str, int, int] | None = None
        self.previews: list[tuple[int, int, bytes]] = []
        self._lock = threading.Lock()
        self._begun = self._cancelled = False
        self._deadline: float | None = None
        self._work: Work | None = None

    def begin(self, order: Order) -> bool:
        """Claim it; returns False where it was begun before, or taken back."""
        with self._lock:
            if self._begun or self._cancelled:
                return False
            self._begun, self.order = True, order
            if order.seconds_left is not None:
                self._deadline = time.monotonic() + order.seconds_left
            return True

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the request's deadline; None where it has none."""
        return None if self._deadline is None else self._deadline - time.monotonic()

    def wait(self) -> Ended:
        """Return what became of it. Where it has not begun and its router is silent, its state is taken not to come."""
        while not self._begun:
            with suppress(TimeoutError):
                return self.ended.result(max(0.0, self.wanted + FORGOTTEN - time.monotonic()))
            self._give_up()
        return self.ended.result()

    def _give_up(self) -> None:
        with self._lock:
            forgotten = time.monotonic() - self.wanted > FORGOTTEN
            if forgotten and not self._begun and not self._cancelled:
                self.ended.set_result(failure(WireError("the state did not come, and its router has fallen silent")))
                self._cancelled = True

    def cancel(self) -> None:
        """Stop it before its next step, or before it begins."""
        with self._lock:
            if not self._begun and not self._cancelled:
                self.ended.set_result(failure(_taken_back()))
            self._cancelled = True
            if self._work is not None:
                self._work.cancel()

    def compute(self, state: State, lane: Lane, ended: Callable[[State | Exception, float], None]) -> None:
        """Have the state's next segment run; returns at once.

        Args:
            ended: told once, in the lane's thread, of the state after it or of what it failed with, and of its seconds.

        Raises:
            Cancelled: it was taken back.
        """
        import torch
        from torch.utils._pytree import tree_leaves

        from triptych.runtime.lanes import Work
        from triptych.runtime.preview import Previews, Projection

        # A card may still read what a stage has dropped; and where that came from another process's card, the next to come is
        # written in its place without waiting for that.
        arrived = [each for each in tree_leaves(state.fields) if isinstance(each, torch.Tensor) and each.is_cuda]

        def done(outcome: State | Exception) -> None:
            with self._lock:  # it knows this function: in a circle its state would stay until Python looks for those
                work, self._work = self._work, None
            assert work is not None
            arrived.clear()
            ended(outcome, work.seconds)

        def report(stage: str, step: int, steps: int) -> None:
            self.progress = stage, step, steps

        wanted = None
        if self.order.previews is not None:
            count, matrix = self.order.previews
            wanted = Previews(count, Projection(torch.tensor(matrix)), lambda *preview: self.previews.append(preview))
        with self._lock:
            if self._cancelled:
                raise _taken_back()
            self._work = work = Work(state, done, report, self._deadline, wanted)
        lane.put(work)


class Attempts:
    """The attempts of a process, by ticket. Each is there from whatever comes first until its router knows its end, or has
    not named it for long."""

    def __init__(self) -> None:
        self._all: dict[str, Attempt] = {}
        self._unwanted: deque[str] = deque(maxlen=REMEMBERED)
        self._lock = threading.Lock()

    def all(self) -> list[tuple[str, Attempt]]:
        """Return all there are, with their tickets."""
        with self._lock:
            return list(self._all.items())

    def open(self, ticket: str) -> Attempt:
        """Return the attempt at a ticket, which whoever comes first opens."""
        with self._lock:
            if (attempt := self._all.get(ticket)) is None:
                attempt = Attempt()
                if ticket in self._unwanted:
                    attempt.cancel()
                    return attempt
                self._all[ticket] = attempt
            return attempt

    def close(self, ticket: str) -> None:
        """Forget an attempt that is answered, and refuse its state, by whatever way it may still come."""
        with self._lock:
            self._all.pop(ticket, None)
            self._unwanted.append(ticket)

    def want(self, tickets: Iterable[str]) -> None:
        """Take note that a router still wants these tickets, and forget what ended and nobody wants: its router is gone."""
        now = time.monotonic()
        with self._lock:
            for ticket in tickets:
                if (attempt := self._all.get(ticket)) is not None:
                    attempt.wanted = now
            for ticket, attempt in list(self._all.items()):
                if attempt.ended.done() and not attempt.asked and now - attempt.wanted > FORGOTTEN:
                    del self._all[ticket]

    def cancel(self, ticket: str) -> None:
        """Stop a ticket before its next step, or before it begins."""
        with self._lock:
            if (attempt := self._all.get(ticket)) is None:
                self._unwanted.append(ticket)
            else:
                attempt.cancel()


def failure(error: Exception) -> Ended:
    """Return the end that an error is."""
    import numpy as np

    return {"error": to_text(error)}, np.empty(0, np.uint8)


def _taken_back() -> Cancelled:
    return Cancelled("the segment was taken back before it began")
