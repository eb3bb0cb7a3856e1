"""The service: an engine, once it is there, and the requests it was given over HTTP."""

from __future__ import annotations

import asyncio
import math
import secrets
import sqlite3
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from anyio import to_thread

import triptych
from triptych.engine.base import Engine
from triptych.engine.job import Job
from triptych.errors import Cancelled
from triptych.request import Request
from triptych.server.jobs import JobStore, StoreClosedError, StoredJob
from triptych.server.limits import Limits
from triptych.server.problems import Refusal, sendable
from triptych.server.records import Record, Records
from triptych.server.schema import status_of
from triptych.server.submission import Submission, check_outputs, parse, request_of
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

        def read() -> tuple[Submission, Request]:
            submission = parse(body, self.limits)
            return submission, request_of(submission, self.limits, transparency=family.transparency)

        family = self.open_engine().front.family
        kind = makes(family.recipe) or "images"
        submission, request = await to_thread.run_sync(read)
        record = Record(f"req_{secrets.token_hex(12)}", None, 0, kind, time.time())
        await self.take_on(
            record, request, submission=lambda: body, deadline=submission.deadline, previews=submission.previews
        )
        return record

    async def take_on(
        self,
        record: Record,
        request: Request,
        *,
        submission: Callable[[], bytes] | None = None,
        deadline: float | None = None,
        previews: int = 0,
    ) -> None:
        """Have the engine run a request, and its record follow it.

        Args:
            submission: makes the JSON from which the request could be made again; with it, the request is in the job
                store, if there is one, before this returns.

        Raises:
            Refusal, UsageError, OverloadedError: it cannot be taken on.
        """
        loop, engine, store = asyncio.get_running_loop(), self.open_engine(), self.records.store

        def admit() -> Job:
            data = None if submission is None or store is None else submission()
            if store is not None and data and store.submitted_bytes() + len(data) > self.limits.kept_bytes:
                words = "the requests that wait already fill the space that there is for them"
                raise Refusal(429, "overloaded", words, {"Retry-After": "30"})
            job = self.run(engine, record, request, deadline, previews)
            if store is not None and data is not None:
                told = (record.id, engine.front.fingerprint, record.makes, record.seed, record.created, record.told)
                try:
                    store.add(StoredJob(*told), data)
                except StoreClosedError:
                    job.cancel()
                    raise
                except (OSError, sqlite3.Error) as error:
                    job.cancel()
                    raise Refusal(507, "no_space", f"the request cannot be kept: {error}") from error
                record.lasting = True
            self.records.listen(record, job, loop)  # from here on the store is told how it goes
            return job

        record.release = request.release
        self.records.add(record)
        try:
            job = await to_thread.run_sync(admit)
        except BaseException as error:
            record.leave()  # who found it in the meantime
            record.let_go()
            self.records.remove(record)
            if isinstance(error, (StoreClosedError, Cancelled)):  # the server has begun to stop in the meantime
                raise Refusal(503, "not_ready", self.why_not_ready() or str(error), _SOON) from error
            raise
        if record.ended is not None:  # cancelled before the engine had it, or done
            await to_thread.run_sync(job.cancel)
        if record.lasting and record not in self.records:  # deleted before the store had it: there was nothing to erase
            await self.records.erase(record)

    def run(
        self,
        engine: Engine,
        record: Record,
        request: Request,
        deadline: float | None,
        previews: int,
        *,
        admitted: bool = False,
    ) -> Job:
        """Submit a request to an engine, within the limits, as the job of a record.

        Args:
            admitted: the server before had taken it on: there is room for it.

        Raises:
            UsageError, OverloadedError: the engine does not take it.
        """
        job = engine.submit(
            request,
            deadline=self.limits.deadline if deadline is None else deadline,
            previews=previews,
            name=record.id,
            admitted=admitted,
            check=partial(check_outputs, limits=self.limits, family=engine.front.family),
        )
        record.job, record.seed = job, int(str(request.parameters["seed"]))  # the engine has checked it
        return job

    async def forget(self, record: Record) -> None:
        """Stop a request, and forget it and its result; the next server will not know it either.

        Raises:
            OSError, sqlite3.Error: the job store cannot forget it.
        """
        await self.cancel(record)
        if record.lasting:
            await self.records.erase(record)  # before the answer says so
        self.records.remove(record)

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
        snapshot: dict[str, Any] = _plain({**told, **ready, "current": current, "kept": kept})
        return snapshot

    def cancel_all(self) -> int:
        """Stop every request that has not ended; returns how many. In any thread but the event loop's."""
        jobs = [record.job for record in self.records.unfinished()]
        for job in jobs:
            if job is not None:
                job.cancel()
        return len(jobs)


def _plain(value: Any) -> Any:
    """Return JSON values without NaN and infinities, which JSON does not have, and with texts that UTF-8 has."""
    if isinstance(value, dict):
        return {sendable(str(name)): _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, str):
        return sendable(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
