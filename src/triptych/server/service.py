"""The service: an engine, once it is there, and the requests it was given over HTTP."""

from __future__ import annotations

import asyncio
import math
from typing import Any

from anyio import to_thread

import triptych
from triptych.engine.base import Engine
from triptych.server.jobs import JobStore
from triptych.server.limits import Limits
from triptych.server.problems import Refusal
from triptych.server.records import Record, Records
from triptych.server.schema import status_of
from triptych.server.submission import parse, request_of
from triptych.stages.graph import makes

_SOON = {"Retry-After": "5"}
_CURRENT = {"id", "status", "created", "progress", "lost"}
_SHOWN = 64
"""Requests on their way, the oldest first, that a snapshot tells of."""


class Service:
    """What the HTTP front stands on.

    Attributes:
        engine: None until it has loaded.
        draining: whether nothing new is taken on, because the server is to stop.
    """

    def __init__(
        self, limits: Limits | None = None, engine: Engine | None = None, store: JobStore | None = None
    ) -> None:
        self.limits = limits or Limits()
        self.records = Records(self.limits, store)
        self.engine = engine
        self.draining = False

    def why_not_ready(self) -> str | None:
        """Return why no request can be served now; None where one can."""
        if self.draining:
            return "the server is shutting down"
        if self.engine is None:
            return "the model is being loaded"
        return None if self.engine.ready() else "a role has no replica"

    def open_engine(self) -> Engine:
        """Return the engine that a new request may be given to.

        Raises:
            Refusal: there is none.
        """
        if self.engine is None or self.draining:
            raise Refusal(503, "not_ready", self.why_not_ready() or "not ready", _SOON)
        return self.engine

    async def submit(self, body: bytes) -> Record:
        """Take a request on.

        Raises:
            Refusal, UsageError, OverloadedError: it cannot be.
        """
        loop = asyncio.get_running_loop()
        engine = self.open_engine()

        def admit() -> Record:
            submission = parse(body, self.limits)
            request = request_of(submission, self.limits)
            job = engine.submit(request, deadline=submission.deadline, previews=submission.previews)
            seed, kind = int(str(request.parameters["seed"])), makes(engine.front.family.recipe)
            record = Record(job.id, job, seed, kind or "images", job.created)
            self.records.listen(record, job, loop)
            return record

        record = await to_thread.run_sync(admit)
        self.records.add(record)
        return record

    async def cancel(self, record: Record) -> None:
        """Stop a request, if it has not ended."""
        if (job := record.job) is not None:
            await to_thread.run_sync(job.cancel)
        else:
            self.records.give_up(record, "cancelled")  # one of the server before, which has not been run again yet

    def snapshot(self) -> dict[str, Any]:
        """Return how things stand, as JSON values; asks the engine, so not for the event loop's thread."""
        loading: dict[str, Any] = {"model": None, "family": None, "requests": 0, "waiting": {}, "replicas": []}
        told = loading if self.engine is None else self.engine.snapshot()
        current = [status_of(each, 0).model_dump(include=_CURRENT) for each in self.records.unfinished()[:_SHOWN]]
        kept = {"requests": len(self.records), "result_bytes": self.records.spool.nbytes}
        ready = {"ready": self.why_not_ready() is None, "version": triptych.__version__}
        snapshot: dict[str, Any] = _finite({**told, **ready, "current": current, "kept": kept})
        return snapshot

    def cancel_all(self) -> int:
        """Stop every request that has not ended; returns how many. In any thread but the event loop's."""
        jobs = [record.job for record in self.records.unfinished()]
        for job in jobs:
            if job is not None:
                job.cancel()
        return len(jobs)


def _finite(value: Any) -> Any:
    """Return JSON values without NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {str(name): _finite(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
