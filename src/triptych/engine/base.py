"""What every engine does: check requests, route them, and tell how things stand."""

from __future__ import annotations

import logging
import math
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from triptych.engine.job import ENDED, Job
from triptych.engine.replica import Handover
from triptych.engine.router import Router
from triptych.engine.warm_up import warm_up_request
from triptych.errors import Cancelled, UsageError
from triptych.request import Request
from triptych.result import Result
from triptych.roles import RoleType
from triptych.runtime.model import Model
from triptych.runtime.preview import Projection
from triptych.state import State

log = logging.getLogger(__name__)

_PATIENCE = 20.0
"""Seconds that the first request with previews waits for what they are made with."""
_SHARE = 0.1
"""Of its deadline that a request waits for them at most."""
_ANSWER = 2.0
"""Seconds that decoders are given to tell what they have already."""
_FRESH = 5.0
"""Seconds that what previews are made with is used until the decoders are asked for better."""
_FIXED = "this service runs in one process, whose replicas are settled at its start; serve with --pools to change them"
_CHECK = 0.1
"""Seconds between two looks at the deadlines."""


class Engine(ABC):
    """Takes requests and sees them through the roles; made by `LocalEngine(...)` or `RayEngine(...)`.

    Attributes:
        front: the model loaded for no role: it checks requests.
        router: decides what runs where.
    """

    front: Model
    router: Router
    _projection: Projection | None = None
    _projection_sought = False
    _projection_stale = 0.0  # when to look for a better one

    def submit(
        self,
        request: Request,
        *,
        deadline: float | None = None,
        previews: int = 0,
        name: str | None = None,
        admitted: bool = False,
        check: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> Job:
        """Take a request on; returns at once.

        Args:
            deadline: seconds from now after which it is given up.
            previews: pictures on the way that are to be told as events; the first request with any may wait here, for
                a tenth of its deadline at most.
            name: the job's id; drawn where left out.
            admitted: it was taken on before, and is not turned away however many are on their way.
            check: is told of the parameters as the model has settled them; what it raises is raised here.

        Raises:
            UsageError: the request is not acceptable.
            OverloadedError: too many requests are on their way.
        """
        state = self.front.admit(request)
        if check is not None:
            check(state.fields)
        job = Job(deadline=None if deadline is None else time.monotonic() + deadline)
        job.id = name or job.id
        patience = None if deadline is None else deadline * _SHARE
        if previews > 0 and (projection := self.projection(patience)) is not None:
            job.previews = previews, projection
        self.router.submit(job, self.hand_in(state), state.fields, admitted=admitted)
        return job

    def generate(self, *, deadline: float | None = None, **parameters: Any) -> Result:
        """Submit one request and wait for its result.

        Raises:
            TriptychError: as `submit` and `Job.result` do.
        """
        return self.submit(Request(**{"exact": False, **parameters}), deadline=deadline).result()

    def warm_up(self, timeout: float | None = None) -> None:
        """Run one small request through the roles, so that the first user does not wait for what happens only once.

        Raises:
            TimeoutError: it took longer than `timeout` seconds, and was cancelled.
            ModelError: a role cannot be loaded.
        """
        request = warm_up_request(self.front)
        if request is None:
            log.warning("no small request fits this model: the first one will be slower")
            return
        state = self.front.admit(request)
        job = Job()
        self.router.submit(job, self.hand_in(state), state.fields)
        until = math.inf if timeout is None else time.monotonic() + timeout
        try:
            while job.status not in ENDED and time.monotonic() < until:
                self.check_replicas()
                with suppress(TimeoutError):
                    job.result(min(_CHECK, until - time.monotonic()))
            job.result(0)
        finally:
            job.cancel()
        left = min(_ANSWER, max(0.0, until - time.monotonic()))
        try:  # the decoders begin to look for it, when they have nothing else to do
            self.find_projection(left, wait=False)
        except Exception as error:  # noqa: BLE001 (requests come without previews then)
            log.warning("looking for what previews are made with: %s", error)

    def projection(self, timeout: float | None = None) -> Projection | None:
        """Return what previews are made with; decoders learn it, and ever better, from what they decode.

        None where they cannot, or where that would take longer than `timeout` seconds.
        """
        now = time.monotonic()
        if now > self._projection_stale:
            self._projection_stale = now + _FRESH
            first, self._projection_sought = not self._projection_sought, True
            until = now + min(_PATIENCE if first else _ANSWER, math.inf if timeout is None else timeout)

            def left() -> float:
                return max(0.0, until - time.monotonic())

            try:
                found = self.find_projection(left(), wait=first)
                if found is None and first and left() > 0:  # perhaps nothing has been decoded yet
                    self.warm_up(left())
                    found = self.find_projection(left())
                self._projection = found or self._projection
            except Exception as error:  # noqa: BLE001 (a request must not fail for want of previews)
                log.warning("looking for what previews are made with: %s", error)
        return self._projection

    def check_replicas(self) -> None:
        """Check that no replica has failed for good.

        Raises:
            ModelError: one could not be loaded.
        """

    @abstractmethod
    def find_projection(self, timeout: float, *, wait: bool = True) -> Projection | None:
        """Ask the decoders for what previews are made with; all of them together take `timeout` seconds at most.

        None where none can tell by then.

        Args:
            wait: whether they take that long to learn it, or tell only what they know.
        """

    @abstractmethod
    def hand_in(self, state: State) -> Handover:
        """Bring an admitted request into the form that this engine's replicas take."""

    @abstractmethod
    def close(self, timeout: float | None = None) -> None:
        """Finish the requests that were taken on, for `timeout` seconds at most, and let go of everything.

        What is not finished then is cancelled.
        """

    def scale(self, pool: str, replicas: int) -> None:
        """Set how many replicas a pool has.

        Raises:
            UsageError: there is no such pool, the number is not accepted, or this engine's replicas are fixed.
        """
        raise UsageError(f"pool={pool!r} cannot be scaled: {_FIXED}")

    def drain(self, name: str) -> None:
        """Give a replica nothing more, and end it when it has finished what it has.

        Raises:
            UsageError: there is none of that name, or this engine's replicas are fixed.
        """
        raise UsageError(f"replica={name!r} cannot be drained: {_FIXED}")

    def ready(self) -> bool:
        """Return whether every role has a replica."""
        return {role for role, _ in self.front.route()} <= self.served()

    def served(self) -> set[RoleType]:
        """Return the roles that have a replica."""
        return {role for each in self.router.replicas if not each.draining for role in each.roles}

    def snapshot(self) -> dict[str, Any]:
        """Return how things stand, as plain values: pools, replicas, queues, requests."""
        router = self.router
        return {
            "model": self.front.family.repository.name,
            "family": self.front.family.repository.family,
            "ready": self.ready(),
            "requests": len(router),
            "waiting": {role.value: len(router.waiting(role)) for role in RoleType if router.waiting(role)},
            "replicas": [each.describe() for each in list(router.replicas)],
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(None if kind is None else 0)

    def _drain(self, timeout: float | None) -> None:
        """Wait for the requests that are on their way, cancel those that take too long, and take none on any more."""
        if not self.router.drained(timeout):
            log.warning("closing: %d requests are cancelled", len(self.router))
        self.router.refuse_all(Cancelled("the engine was closed"))

    def _watch(self) -> None:
        """Look after deadlines, in a thread of its own, until the engine is closed."""
        self._closed = threading.Event()

        def look() -> None:
            while not self._closed.wait(_CHECK):
                try:
                    self.router.check_deadlines()
                except Exception:  # without this thread no deadline would be kept
                    log.exception("the deadlines could not be looked after")

        threading.Thread(target=look, name="deadlines", daemon=True).start()
