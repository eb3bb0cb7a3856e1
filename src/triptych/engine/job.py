"""The life of one request: what happened to it so far, and how it ends."""

from __future__ import annotations

import itertools
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from triptych.errors import Cancelled

if TYPE_CHECKING:
    from triptych.result import Result
    from triptych.runtime.preview import Projection

log = logging.getLogger(__name__)

Status = Literal["queued", "running", "done", "failed", "cancelled"]
ENDED = frozenset(("done", "failed", "cancelled"))


@dataclass(frozen=True)
class Event:
    """Something that happened to a request.

    Attributes:
        number: counts a request's events from 0.
        kind: `queued` (position), `started` (role, replica), `step` (stage, step, steps), `preview` (step, steps,
            png: bytes), `retried` (reason), and how
            it ended: `done`, `failed` (reason) or `cancelled`.
        time: seconds since the epoch.
        details: what the kind says.
    """

    number: int
    kind: str
    time: float
    details: dict[str, Any]


@dataclass(eq=False)
class Job:
    """A request that an engine has accepted.

    Attributes:
        id: names it, in every process.
        status: `queued` until a role begins, `running` between; then `done`, `failed` or `cancelled`.
        deadline: when it must have ended, on `time.monotonic`'s clock.
        lost: why each lost attempt was lost.
        beside: how often it was at a replica that was lost while others were known to compute there.
        cramped: whether its segment lacked memory: it is run alone then.
        error: why it failed.
        previews: how many previews are to be made on the way, and with what; None for none.
        shown: how many of them this segment has shown, in whatever attempt.
    """

    id: str = field(default_factory=lambda: f"req_{secrets.token_hex(12)}")
    deadline: float | None = None
    created: float = field(default_factory=time.time)
    status: Status = "queued"
    lost: list[str] = field(default_factory=list)
    beside: int = 0
    cramped: bool = False
    error: Exception | None = None
    previews: tuple[int, Projection] | None = None
    shown: int = 0
    _result: Result | None = None
    _events: list[Event] = field(default_factory=list)
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _ended: threading.Event = field(default_factory=threading.Event)  # so that no step wakes who waits for the result
    _cancel: Callable[[], None] | None = None
    _listeners: list[Callable[[Event], None]] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"Job({self.id}, {self.status})"

    def result(self, timeout: float | None = None) -> Result:
        """Wait for the result.

        Raises:
            TimeoutError: it is not there after `timeout` seconds; the job goes on.
            Exception: what the request failed with; `Cancelled` where it was cancelled.
        """
        if not self._ended.wait(timeout):
            raise TimeoutError(f"{self.id} is still {self.status} after {timeout} s")
        if self.error is not None:
            raise self.error
        assert self._result is not None
        return self._result

    def cancel(self) -> None:
        """Stop the request before its next step. Does nothing when it has ended."""
        cancel = self._cancel  # `end` may take it away
        if cancel is not None and self.status not in ENDED:
            cancel()

    def events(self, start: int = 0) -> Iterator[Event]:
        """Yield the request's events from number `start` on, as they come, to the last."""
        for number in itertools.count(start):
            with self._changed:
                self._changed.wait_for(lambda number=number: number < len(self._events) or self.status in ENDED)  # type: ignore[misc]
                if number >= len(self._events):
                    return
                event = self._events[number]
            yield event

    def listen(self, listener: Callable[[Event], None]) -> None:
        """Call `listener` with every event from the first on, in whatever thread it happens; it must not block.

        What it raises is logged, and it is told of the next event all the same.
        """
        with self._changed:
            for event in self._events:
                self._let_hear(listener, event)
            if self.status not in ENDED:
                self._listeners.append(listener)

    # What follows is the engine's side.

    def tell(self, kind: str, **details: Any) -> None:
        """Add an event, unless the request has ended."""
        with self._changed:
            if self.status not in ENDED:
                if kind == "started":
                    self.status = "running"
                self._add(kind, details)

    def end(self, outcome: Result | Exception) -> bool:
        """Settle how the request ended; returns False where that was settled before."""
        with self._changed:
            if self.status in ENDED:
                return False
            if isinstance(outcome, Cancelled):
                self.status, self.error = "cancelled", outcome
                self._add("cancelled", {})
            elif isinstance(outcome, Exception):
                self.status, self.error = "failed", outcome
                self._add("failed", {"reason": str(outcome) or type(outcome).__name__})
            else:
                self.status, self._result = "done", outcome
                self._add("done", {"seconds": time.time() - self.created})
            self._listeners.clear()  # they know the job: in a circle its result would stay until Python looks for those
            self._cancel = None
            self._ended.set()
            return True

    def _add(self, kind: str, details: dict[str, Any]) -> None:
        event = Event(len(self._events), kind, time.time(), details)
        self._events.append(event)
        for listener in self._listeners:
            self._let_hear(listener, event)
        self._changed.notify_all()

    def _let_hear(self, listener: Callable[[Event], None], event: Event) -> None:
        try:
            listener(event)
        except Exception:  # it is the listener's own: the job goes on, and others hear of it
            log.exception("%s: a listener failed at %r", self.id, event.kind)
