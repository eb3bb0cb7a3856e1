"""Serving from start to stop: the front first, the engine behind it, and an end that loses nothing it can help."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

from triptych.engine.base import Engine
from triptych.errors import TriptychError
from triptych.server.app import create_app
from triptych.server.front import Front, Tls
from triptych.server.guard import Access
from triptych.server.jobs import JobStore
from triptych.server.limits import Limits
from triptych.server.service import Service

log = logging.getLogger(__name__)


class Stop:
    """What the signals to stop have said so far: once is a wish, twice an order."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, _number: int, _frame: FrameType | None) -> None:
        self.asked += 1


def serve(
    build: Callable[[], Engine],
    announce: Callable[[Engine, str], None],
    *,
    host: str,
    port: int,
    limits: Limits | None = None,
    patience: float = 30.0,
    store: JobStore | None = None,
    access: Access | None = None,
    tls: Tls | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM, which lets running requests finish; a second one does not. For the main thread.

    Args:
        build: makes the engine; until it returns, the server is alive and not ready.
        announce: told of the engine and the URL once it is ready.
        patience: seconds that running requests are given at the end.
        store: keeps requests and results beyond this process; closed at the end.
        access: who may ask; everybody, where left out.
        tls: what to encrypt with; None for plain HTTP.

    Raises:
        TriptychError: the engine cannot be made, or the address is taken.
    """
    service = Service(limits, store=store)
    with ExitStack() as outermost:  # its end comes last: from `_signals` on, no signal breaks the closing off
        try:
            access = (access or Access()).listening_on(host)
            with Front(create_app(service, access), host, port, tls) as front:
                engine = build()
                try:
                    stop = outermost.enter_context(_signals())
                    service.engine = engine
                    announce(engine, front.url)
                    while not stop.asked and front.alive:
                        time.sleep(0.1)
                    if not front.alive:
                        raise TriptychError("the HTTP server ended by itself")
                    drain(service, patience, stop)
                finally:
                    _leave(service, engine)
        finally:
            service.records.spool.close()
            if store is not None:
                store.close(unused=service.engine is None)  # then the server could not start


def _leave(service: Service, engine: Engine) -> None:
    """Let go of what has not finished, and of the engine."""
    service.draining = True
    if (store := service.records.store) is not None:
        store.close()  # from here on nothing is noted: what has not ended is left to the next server
    kept = sum(record.lasting for record in service.records.unfinished())
    cancelled = service.cancel_all() - kept
    if kept:
        log.warning("%d requests had not finished: the next server of this model runs them", kept)
    if cancelled:
        log.warning("%d requests had not finished: they are cancelled", cancelled)
    engine.close(timeout=0)


def drain(service: Service, patience: float, stop: Stop) -> None:
    """Take nothing new on, and wait until running requests have ended and their results are fetched."""
    service.draining = True
    if waiting := len(service.records.unfinished()):
        log.warning("finishing %d requests, for %g s at most; a second signal stops at once", waiting, patience)
    end = time.monotonic() + patience
    while stop.asked < 2 and time.monotonic() < end and service.records.unsettled():
        time.sleep(0.05)


@contextmanager
def _signals() -> Iterator[Stop]:
    """Let SIGINT, SIGTERM and a terminal that goes away ask for a stop instead of raising."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as `nohup` leaves it
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
