"""What a router hears of its replicas: the ends of tickets, straight or through Ray, and signs of life."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import ray
from ray.exceptions import ObjectLostError, OwnerDiedError, RayActorError

from triptych.engine.inbox import Answer, Inbox
from triptych.engine.job import ENDED
from triptych.engine.ray_replica import RayReplica
from triptych.engine.replica import Handover, Ticket
from triptych.engine.router import Router
from triptych.errors import RemoteError, ReplicaLost, WireError, from_text
from triptych.roles import RoleType
from triptych.state import State

log = logging.getLogger(__name__)

FETCHERS = 8
"""Results that may be fetched at a time, of those that do not come straight."""


class Hearing:
    """Ends the tickets of a router with what its replicas tell, whichever way that comes.

    Attributes:
        inbox: what comes straight from replicas on this machine, heard in the inbox's threads.
    """

    def __init__(self, router: Router) -> None:
        self._router = router
        self.inbox = Inbox(Answer, self._receive)
        self._happened: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self._fetchers = ThreadPoolExecutor(FETCHERS, "fetcher")
        self._thread = threading.Thread(target=self._hear, name="hearing", daemon=True)

    def start(self) -> None:
        """Begin to hear what comes through Ray."""
        self._thread.start()

    def stop(self) -> None:
        """Hear nothing of that any more."""
        self._fetchers.shutdown(wait=False, cancel_futures=True)
        self._happened.put(())
        if self._thread.is_alive():
            self._thread.join()

    def later(self, *happened: Any) -> None:
        """Take note of what came through Ray: what it is, of which replica, the future that holds it, and details."""
        self._happened.put(happened)

    # What comes straight.

    def _receive(self, answer: Answer, data: memoryview) -> Callable[[], None]:
        """Take what a replica tells straight. Of a ticket that was given up it is nothing, and yet taken: it is told."""
        ticket = self._router.find(answer.ticket)
        if ticket is None:
            return lambda: None
        assert isinstance(ticket.replica, RayReplica)
        ticket.replica.busy = time.monotonic()
        if answer.turns is None:
            # With its state: a replica that did not hear of this router for long has forgotten the ticket.
            return partial(ticket.replica.ask_for, ticket, ticket.handover.payload if ticket.after is None else None)
        ticket.answered = True  # before the replica knows that, and forgets the ticket
        return partial(self._take, ticket, answer, data)

    def _take(self, ticket: Ticket, answer: Answer, data: memoryview) -> None:
        """End a ticket with what its replica has told straight."""
        # A copy: memory that was passed on would hold a descriptor as long as the result lives.
        self._end(ticket, lambda: _handover(answer.turns or (), answer.seconds, np.array(data), handed=answer.handed))

    def _end(self, ticket: Ticket, read: Callable[[], Handover]) -> None:
        """End a ticket with what its replica has left."""
        outcome: Handover | Exception
        try:
            outcome = read()
        except Exception as error:  # noqa: BLE001 (whatever it is, its role makes it once more)
            outcome = ReplicaLost(f"what it left was lost: {error}")
        ticket.done(ticket, outcome)

    # What comes through Ray, one after another in a thread of its own.

    def _hear(self) -> None:
        while happened := self._happened.get():
            what, replica, future, *details = happened
            try:
                if what == "finished":
                    self._finished(replica, future, *details)
                elif what == "handed":
                    self._handed(replica, future, *details)
                else:
                    replica.hear(self._router, future, *details)
            except Exception:  # one replica's answer must not end the thread that hears them all
                log.exception("%s: what it told could not be handled", replica.name)

    def _finished(self, replica: RayReplica, future: Future[Any], ticket: Ticket, data: Any) -> None:
        replica.busy = time.monotonic()
        # Not `result()`: an error raised here would hold this frame, and so the ticket, until it is garbage-collected.
        error = future.exception()
        if ticket.answered or ticket not in replica.tickets:
            return  # told straight, or taken back
        if error is not None:
            self._failed(replica, ticket, error)
            return
        told = future.result()
        for preview in told.get("previews", ())[ticket.previews :]:  # those that no heartbeat has told of
            ticket.show(*preview)
        if told.get("turns") == () and ticket.job.status not in ENDED:
            # It may take long, and others are to be heard.
            self._fetchers.submit(self._end, ticket, lambda: _handover((), told["seconds"], np.array(ray.get(data))))
        else:
            ticket.done(ticket, self._outcome(told, data))

    def _handed(self, replica: RayReplica, future: Future[Any], ticket: Ticket) -> None:
        """End a ticket whose state could not be brought: its replica would wait for it for ever."""
        error = future.exception()
        if error is not None and ticket in replica.tickets:
            replica.cancel(ticket)
            self._failed(replica, ticket, error)

    def _failed(self, replica: RayReplica, ticket: Ticket, error: BaseException) -> None:
        """Take note of Ray's error in place of an answer."""
        if isinstance(error, RayActorError):
            replica.lose(self._router, f"{replica.name} died ({type(error).__name__})")
        elif isinstance(error, (ObjectLostError, OwnerDiedError)):
            ticket.done(ticket, WireError(f"the hand-over was lost: {error}"))
        else:
            ticket.done(ticket, RemoteError(str(error)))

    def _outcome(self, told: dict[str, Any], data: Any) -> Handover | Exception:
        """Return what a replica's answer means."""
        if "error" in told:
            return from_text(*told["error"])
        if not told["turns"]:  # nobody wants it any more
            return Handover(None, None, told["seconds"])
        return _handover(told["turns"], told["seconds"], data, handed=told["handed"])


def _handover(turns: Iterable[str], seconds: float, data: Any, *, handed: bool = False) -> Handover:
    """Return a request after a segment.

    Args:
        data: its state in the wire form, or a reference to it; the bytes themselves where it is the result.

    Raises:
        WireError: the result is damaged.
    """
    left = tuple(RoleType(role) for role in turns)
    if not left:
        return Handover(None, State.from_bytes(data.data), seconds)
    return Handover(left[0], data, seconds, then=left[1:], handed=handed)
