"""Resuming: the requests of the process before this one, from the job store."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from anyio import to_thread

from triptych.engine.base import Engine
from triptych.engine.job import Event, Job
from triptych.errors import DeadlineExceeded
from triptych.server.jobs import JobStore, StoredJob
from triptych.server.problems import Problem, Refusal, problem_of
from triptych.server.records import Record
from triptych.server.submission import Submission, parse, request_of

if TYPE_CHECKING:
    from triptych.server.service import Service

log = logging.getLogger(__name__)

INTERRUPTIONS = 3
"""Times that a server may die while it runs a request before the request is given up: it may be what kills it."""
_FULL = 0.5
"""Seconds from one try to the next to make room for a request's pictures."""
_LOOK = 0.05
"""Seconds between two looks whether the engine has loaded, and whether a request is overdue."""


Waiting = list[tuple[Record, StoredJob]]
"""What has not ended, in the order of its arrival."""


async def restore(service: Service, store: JobStore) -> Waiting:
    """Bring back what the store has, before anybody asks for it; returns what is to be run."""
    waiting: Waiting = []
    for stored in await to_thread.run_sync(store.all):
        record = restored(stored)
        service.records.add(record)
        if stored.ended is None:
            waiting.append((record, stored))
    service.records.trim()
    if waiting:
        log.warning("%d requests of the server before this one go on", len(waiting))
    for record, stored in waiting:
        if stored.status == "running":
            await _count_interruption(service, store, record)
    return waiting


async def resume(service: Service, store: JobStore, waiting: Waiting) -> None:
    """Once the engine is there, run what has not ended; until then, deadlines hold."""

    async def run_all() -> None:
        while waiting and service.engine is None:
            await asyncio.sleep(_LOOK)
        left = list(waiting)
        while left:  # those for whose pictures there is no room are asked again when the others have had their turn
            left = [each for each in left if not await _run_again(service, store, *each)]
            await asyncio.sleep(_FULL if left else 0)

    await asyncio.gather(run_all(), _give_up_overdue(service, store, waiting))


async def _give_up_overdue(service: Service, store: JobStore, waiting: Waiting) -> None:
    """Give up the requests whose deadlines pass while they have no job: an engine looks after those of its jobs only."""

    def deadline(record: Record, stored: StoredJob) -> float:
        return _deadline(service, stored, _submitted(service, store, record))

    deadlines: dict[Record, float] = {}
    for record, stored in waiting:
        with suppress(Exception):  # whatever is wrong with it is told when it is to be run
            deadlines[record] = await to_thread.run_sync(deadline, record, stored)
    while deadlines := {each: when for each, when in deadlines.items() if each.ended is None and each.job is None}:
        for record, when in deadlines.items():
            if time.time() > when:
                service.records.give_up(record, "failed", problem_of(_overdue()))
        await asyncio.sleep(_LOOK)


def _submitted(service: Service, store: JobStore, record: Record) -> Submission:
    return parse(store.submission(record.id), service.limits)


def _deadline(service: Service, stored: StoredJob, submission: Submission) -> float:
    """Return when a request must have ended, in seconds since the epoch."""
    return stored.created + (submission.deadline or service.limits.deadline)


def _overdue() -> DeadlineExceeded:
    return DeadlineExceeded("the request's deadline passed before a server could run it again")


async def _count_interruption(service: Service, store: JobStore, record: Record) -> None:
    try:
        count = await to_thread.run_sync(store.interrupted, record.id)
    except (OSError, sqlite3.Error) as failure:  # whatever the disk is like, the server starts
        log.error("%s: the job store cannot note that the server's process died while it ran: %s", record.id, failure)
        return
    record.lost = [f"the server's process died while it ran this, for the {count}. time"]
    if count >= INTERRUPTIONS:
        reason = f"the server's process died {count} times while it ran this: it is not tried again"
        service.records.give_up(record, "failed", Problem(500, "lost", reason))


async def _run_again(service: Service, store: JobStore, record: Record, stored: StoredJob) -> bool:
    """Have a request run, or tell its caller why not; returns False where there is no room for its pictures now."""
    engine, loop = service.engine, asyncio.get_running_loop()
    assert engine is not None
    if stored.model != engine.front.fingerprint:
        reason = "it was asked of another model than the one that is served now"
        service.records.give_up(record, "failed", Problem(409, "other_model", reason))

    def admit(engine: Engine) -> Job:
        submission = _submitted(service, store, record)
        submission.parameters["seed"] = stored.seed
        left = _deadline(service, stored, submission) - time.time()
        if left <= 0:
            raise _overdue()
        request = request_of(submission, service.limits, transparency=engine.front.family.transparency)
        record.release = request.release
        job = service.run(engine, record, request, left, submission.previews, admitted=True)
        service.records.listen(record, job, loop)
        return job

    if record.ended is not None or service.draining:
        return True
    try:
        job = await to_thread.run_sync(admit, engine)
    except Refusal:
        return False
    except Exception as error:  # whatever it is, the caller has to be told
        if record.ended is not None or store.closed:  # its submission went with it, or both are the next server's
            return True
        if not isinstance(error, DeadlineExceeded):
            log.error("%s cannot be run again", record.id, exc_info=error)
        service.records.give_up(record, "failed", problem_of(error))
        return True
    if record.ended is not None:  # cancelled or removed in the meantime, or overdue
        await to_thread.run_sync(job.cancel)
    return True


def restored(stored: StoredJob) -> Record:
    """Return the record of a stored job; one that has not ended is queued, and has no job yet."""
    # Its events are counted from the milliseconds of now on: those who heard of it from servers before hear all anew.
    first = int(time.time() * 1000)
    told = dict(stored.told)
    record = Record(stored.id, None, stored.seed, stored.makes, stored.created, told=told, lasting=True, first=first)
    if stored.ended is None:
        return record
    record.outputs, record.timings = stored.outputs, dict(stored.timings)
    record.error = None if stored.error is None else _problem(stored.error)
    details: dict[str, Any] = {"seconds": stored.ended - stored.created, "outputs": stored.outputs}
    if stored.status != "done":
        details = {} if record.error is None or stored.status == "cancelled" else {"reason": record.error.message}
    record.publish(Event(0, stored.status, stored.ended, details))
    record.ended = time.monotonic() - max(0.0, time.time() - stored.ended)
    return record


def _problem(told: Mapping[str, Any]) -> Problem:
    code = str(told.get("code", "unknown"))
    return Problem(int(told["status"]), code, str(told["message"]), dict(told.get("details", {})))
