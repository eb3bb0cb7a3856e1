"""Records: what the server remembers of its requests, while they run and for some time after."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from anyio import to_thread

from triptych.engine.job import ENDED, Event, Job, Status
from triptych.errors import Cancelled
from triptych.result import Result
from triptych.server.jobs import JobStore
from triptych.server.limits import Limits
from triptych.server.problems import Problem, Refusal, problem_of
from triptych.server.spool import Spool

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Record:
    """One request as its caller sees it. It lags behind its job: it is done once its result is on disk.

    Attributes:
        job: None once the request has ended.
        seed: drawn or given.
        makes: `images` or `videos`.
        events: what happened so far.
        status: as of the last event.
        outputs: how many results there are to fetch.
        timings: seconds of each stage, when it is done.
        error: why there is no result.
        lost: why each lost attempt was lost.
        ended: when that was, on `time.monotonic`'s clock.
        fetched: whether a result was asked for.
        told: what the interface that took it on remembers of it; `object` is `video` for a video of `/v1/videos`.
        lasting: whether the job store has it too.
        left: whether it is left to the next server, which will run it again: this one tells no more of it.
        keep: what is done with the result, in a thread, instead of keeping it on disk for whoever asks.
        release: lets go of what is counted for the pictures that it came with; None once it has ended.
        observers: who is told, once, when it has ended.
        first: the number of its first event; of a request of the server before, one that no server has told yet.
    """

    id: str
    job: Job | None
    seed: int
    makes: str
    created: float
    events: list[Event] = field(default_factory=list)
    status: Status = "queued"
    outputs: int = 0
    timings: dict[str, float] = field(default_factory=dict)
    error: Problem | None = None
    lost: list[str] = field(default_factory=list)
    ended: float | None = None
    fetched: bool = False
    told: Mapping[str, Any] = field(default_factory=dict)
    lasting: bool = False
    left: bool = False
    keep: Callable[[Result], None] | None = None
    release: Callable[[], None] | None = None
    observers: list[Callable[[Record], None]] = field(default_factory=list)
    first: int = 0
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def last(self, kind: str) -> dict[str, Any]:
        """Return the details of the newest event of a kind, or nothing."""
        return next((event.details for event in reversed(self.events) if event.kind == kind), {})

    async def follow(self, start: int, patience: float) -> AsyncIterator[Event | None]:
        """Yield all events but the first `start`, as they come, to the last; None after `patience` silent seconds."""
        while True:
            changed = self._changed
            while start < len(self.events):
                start += 1
                yield self.events[start - 1]
            if self.ended is not None or self.left:
                return
            try:
                await asyncio.wait_for(changed.wait(), patience)
            except TimeoutError:
                yield None

    def leave(self) -> None:
        """Let go of whoever follows, without an end."""
        self.left = True
        self._changed.set()

    def publish(self, event: Event) -> None:
        """Add an event, and wake whoever follows."""
        self.events.append(replace(event, number=self.first + len(self.events)))
        if event.kind == "started":
            self.status = "running"
        elif event.kind in ENDED:
            self.status = event.kind  # type: ignore[assignment]
            self.lost += [] if self.job is None else self.job.lost
            self.ended = time.monotonic()
            self.let_go()
            self.events = [_without_picture(each) for each in self.events]
        self._changed.set()
        self._changed = asyncio.Event()
        if self.ended is not None:
            observers, self.observers = self.observers, []
            for observe in observers:
                try:
                    observe(self)
                except Exception:  # it is the observer's own: its caller is told of its end all the same
                    log.exception("%s: an observer failed", self.id)

    def let_go(self) -> None:
        """Hold nothing any more of what the request is made with."""
        release, self.job, self.keep, self.release = self.release, None, None, None
        if release is not None:
            release()


def _without_picture(event: Event) -> Event:
    """Return an event as it is remembered: previews have no meaning once the result is there, and are large."""
    if event.kind != "preview":
        return event
    return replace(event, details={name: value for name, value in event.details.items() if name != "png"})


class Records:
    """The requests of a server by their ids. Only `listen` may be used outside the event loop's thread."""

    def __init__(self, limits: Limits, store: JobStore | None = None) -> None:
        self.limits = limits
        self.store = store
        self.spool = Spool(limits.kept_bytes, None if store is None else store.results)
        # Asked for every request, where it comes from, who is to be told of its record's end.
        self.observers: list[Callable[[], Callable[[Record], None]]] = []
        self.fetches = 0  # results that are on their way out, or being made into what was asked for
        self._records: dict[str, Record] = {}  # in the order of arrival
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, record: Record) -> bool:
        return record.id in self._records

    def get(self, name: str) -> Record:
        """Return a record.

        Raises:
            Refusal: there is none (any more).
        """
        try:
            return self._records[name]
        except KeyError:
            kept = f"finished ones are kept for {self.limits.kept_seconds:g} s at most"
            raise Refusal(404, "not_found", f"there is no request {name!r}; {kept}") from None

    def all(self) -> list[Record]:
        """Return all records in the order of their arrival."""
        return list(self._records.values())

    def lifetime(self, record: Record) -> float:
        """Return how many seconds a record is kept after its end, at most."""
        lasts = record.lasting and record.makes == "videos"
        return self.limits.video_seconds if lasts else self.limits.kept_seconds

    def add(self, record: Record) -> None:
        """Remember a record."""
        record.observers = [observe() for observe in self.observers]
        self._records[record.id] = record

    def listen(self, record: Record, job: Job, loop: asyncio.AbstractEventLoop) -> None:
        """Have a record follow its job."""

        def hear(event: Event) -> None:
            try:
                loop.call_soon_threadsafe(self._receive, record, event)
            except RuntimeError:
                pass  # the loop is closed: the server has gone before the request ended

        job.listen(hear)

    def position(self, record: Record) -> int:
        """Return how many requests came before this one and have not been started either."""
        count = 0
        for other in self._records.values():
            if other is record:
                break
            count += other.status == "queued"
        return count

    def remove(self, record: Record) -> None:
        """Forget a record and its result."""
        if self._records.pop(record.id, None) is not None and (record.outputs or record.lasting):
            self._drop(record)

    def trim(self) -> None:
        """Forget the finished requests that are too old or too many, and the results that are too large, oldest first."""
        ended = sorted(
            (record for record in self._records.values() if record.ended is not None),
            key=lambda each: each.ended or 0.0,
        )
        now = time.monotonic()
        surplus = len(ended) - self.limits.kept
        events = sum(len(record.events) for record in ended)
        for k, record in enumerate(ended):
            too_large = record.outputs > 0 and self.spool.nbytes > self.limits.kept_bytes
            too_many = k < surplus or events > self.limits.kept_events
            if too_many or (record.ended or 0.0) < now - self.lifetime(record) or too_large:
                events -= len(record.events)
                self.remove(record)

    def unfinished(self) -> list[Record]:
        """Return the records whose requests have not ended; in any thread."""
        return [record for record in list(self._records.values()) if record.ended is None]

    def unsettled(self) -> bool:
        """Return whether a request has not ended, or a result is being fetched, or may soon be: it has just come."""
        recent = time.monotonic() - self.limits.linger
        return self.fetches > 0 or any(
            record.ended is None or (record.status == "done" and not record.fetched and record.ended > recent)
            for record in list(self._records.values())
        )

    # What follows runs in the event loop's thread.

    def _receive(self, record: Record, event: Event) -> None:
        job = record.job
        if record.ended is not None:  # it was cancelled before it had its job, which is being stopped
            if event.kind in ENDED:
                record.let_go()
                if record.lasting:  # the job store may have got it after its end
                    self._start(self._note(record, record.events[-1], record.error))
            return
        if event.kind in ENDED and record.lasting and self.store is not None and self.store.closed:
            record.leave()
            return
        if event.kind == "done" and job is not None:
            self._start(self._keep(record, job, event))
            return
        if event.kind in ("failed", "cancelled") and job is not None and job.error is not None:
            record.error = problem_of(job.error)
        if record.lasting and event.kind in ("started", "failed", "cancelled"):
            self._start(self._note(record, event, record.error))
        record.publish(event)

    def give_up(self, record: Record, kind: str, problem: Problem | None = None) -> None:
        """End a record that has no job: `failed` with a problem, or `cancelled`."""
        if record.ended is None:
            record.error = problem or problem_of(Cancelled("the request was cancelled"))
            details = {"reason": record.error.message} if kind == "failed" else {}
            event = Event(len(record.events), kind, time.time(), details)
            if record.lasting:
                self._start(self._note(record, event, record.error))
            record.publish(event)

    async def _note(self, record: Record, event: Event, problem: Problem | None = None) -> None:
        """Have the job store know. Where it cannot, its caller is told all the same, and the next server starts over."""
        if self.store is None:
            return
        note = partial(self.store.started, record.id)
        if event.kind != "started":
            error = None if problem is None else asdict(problem)
            precious = record.makes == "videos"
            note = partial(self.store.ended, record.id, event.kind, when=event.time, error=error, precious=precious)
            note = partial(note, outputs=record.outputs, timings=record.timings)
        try:
            await to_thread.run_sync(note)
        except (OSError, sqlite3.Error) as failure:
            log.error("%s: the job store cannot note that it is %s: %s", record.id, event.kind, failure)

    async def _keep(self, record: Record, job: Job, event: Event) -> None:
        """Bring a result to the disk, then let its caller know."""
        try:
            result = job.result()
            if record.keep is not None:
                await to_thread.run_sync(record.keep, result)
            elif record.told.get("object") == "video":
                result.fps = record.told["fps"]
                await to_thread.run_sync(partial(self.spool.put_video, record.id, result, lasting=record.lasting))
            else:
                await to_thread.run_sync(partial(self.spool.put, record.id, result, lasting=record.lasting))
        except Exception as error:  # whatever it is, the caller has to be told
            log.error("%s: its result cannot be kept", record.id, exc_info=error)
            record.error = problem_of(error)
            event = replace(event, kind="failed", details={"reason": record.error.message})
            if record.lasting:
                await self._note(record, event, record.error)
            record.publish(event)
            return
        record.outputs, record.timings = result.count, result.timings
        if record.lasting:
            await self._note(record, event)
        record.publish(replace(event, details={**event.details, "outputs": result.count}))
        if record.id not in self._records:  # it was removed in the meantime
            self._drop(record)
        self.trim()

    async def erase(self, record: Record) -> None:
        """Remove a record's row and its files; the files first where the disk is too full to change the table.

        Raises:
            OSError, sqlite3.Error: the row cannot be removed all the same.
        """
        self.spool.release(record.id)
        store = self.store if record.lasting else None
        if store is not None:
            try:
                await to_thread.run_sync(store.forget, record.id)
            except (OSError, sqlite3.Error) as failure:
                log.warning("%s: its files are removed before its row: %s", record.id, failure)
                await to_thread.run_sync(self.spool.erase, record.id)
                await to_thread.run_sync(store.forget, record.id)
        await to_thread.run_sync(self.spool.erase, record.id)

    def _drop(self, record: Record) -> None:
        self.spool.release(record.id)
        self._start(self._erase(record))

    async def _erase(self, record: Record) -> None:
        try:
            await self.erase(record)
        except (OSError, sqlite3.Error) as failure:
            log.error("%s: the job store cannot forget it: %s", record.id, failure)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
