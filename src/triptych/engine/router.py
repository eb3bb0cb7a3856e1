"""The router: when a segment runs, and what happens when its replica is lost."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable
from copy import copy
from typing import Any

from triptych.engine.choice import Choice, Policy
from triptych.engine.cost import Costs, work_of
from triptych.engine.job import ENDED, Job
from triptych.engine.replica import Handover, Replica, Ticket
from triptych.errors import (
    Cancelled,
    DeadlineExceeded,
    MemoryShortageError,
    OverloadedError,
    ReplicaLost,
    RequestLostError,
    WireError,
)
from triptych.result import Result
from triptych.roles import RoleType

log = logging.getLogger(__name__)

ATTEMPTS = 3
"""Lost attempts after which a request fails; the last of them is made alone."""
BESIDE = 3
"""Times that a request may be beside others which are blamed for a loss. Then it is made alone, too: one that kills in its
first step never shows that it computes."""


class Router:
    """Sees jobs through their segments. Segments wait here, not at replicas, until one has room.

    Attributes:
        costs: what predicts the seconds of a segment.
        max_waiting: jobs that may wait or run at a time; more are turned away.
    """

    def __init__(
        self,
        finish: Callable[[Handover], Result],
        *,
        policy: Policy = "predicted",
        max_waiting: int = 256,
    ) -> None:
        self._choice = Choice(policy)
        self.costs = Costs()
        self.max_waiting = max_waiting
        self.replicas: list[Replica] = []
        self._finish = finish
        self._jobs: dict[Job, dict[str, Any]] = {}  # with their requests' plain parameters
        self._waiting: list[Ticket] = []
        self._refusal: Exception | None = None
        self._lock = threading.RLock()
        self._idle = threading.Condition(self._lock)

    # Requests

    def submit(self, job: Job, handover: Handover, fields: dict[str, Any], *, admitted: bool = False) -> None:
        """Take a job on, or turn it away.

        Args:
            admitted: it was taken on before, and is not turned away however many are on their way.

        Raises:
            OverloadedError: too many are on their way.
            Exception: what `refuse_all` was told.
        """
        with self._lock:
            if self._refusal is not None:
                raise copy(self._refusal)  # each with a traceback of its own
            if not admitted and len(self._jobs) >= self.max_waiting:
                raise OverloadedError(len(self._jobs), self.retry_after())
            self._jobs[job] = {name: value for name, value in fields.items() if isinstance(value, (int, float, str))}
            job._cancel = lambda: self.cancel(job)
            job.tell("queued", position=len(self._waiting))
            self._proceed(job, handover)

    def cancel(self, job: Job, error: Exception | None = None) -> None:
        """End a job at once; what a replica computes for it keeps its place there until it has stopped."""
        error = error or Cancelled("the request was cancelled")
        with self._lock:
            if job not in self._jobs:
                return
            waiting = [ticket for ticket in self._waiting if ticket.job is job]
            for ticket in waiting:
                self._waiting.remove(ticket)
            for replica in self.replicas:
                for ticket in replica.tickets:
                    if ticket.job is job:
                        replica.cancel(ticket)
            self._end(job, error)
            if any(ticket.alone for ticket in waiting):  # a replica may have been kept for it
                self._dispatch()

    def cancel_all(self, error: Exception | None = None) -> None:
        """Stop every job."""
        with self._lock:
            for job in list(self._jobs):
                self.cancel(job, error)

    def refuse_all(self, error: Exception) -> None:
        """Stop every job with an error, and take none on from now on."""
        with self._lock:
            self._refusal = error
            self.cancel_all(error)

    def check_deadlines(self) -> None:
        """End the jobs whose deadline has passed."""
        now = time.monotonic()
        with self._lock:
            for job in [job for job in self._jobs if job.deadline is not None and now > job.deadline]:
                self.cancel(job, DeadlineExceeded("the request's deadline passed before it was done"))

    def retry_after(self) -> float:
        """Return the seconds after which there may be room again."""
        with self._lock:
            free = [replica for replica in self.replicas if not replica.draining]
            return min(600.0, max(1.0, min((replica.backlog for replica in free), default=5.0)))

    def drained(self, timeout: float | None = None) -> bool:
        """Wait until no job is left; returns False where some still are after `timeout` seconds."""
        with self._idle:
            return self._idle.wait_for(lambda: not self._jobs, timeout)

    def find(self, name: str) -> Ticket | None:
        """Return the ticket of that name which a replica has; None where it was done, or taken back."""
        with self._lock:
            return next((ticket for each in self.replicas for ticket in each.tickets if ticket.name == name), None)

    # Replicas

    def add(self, replica: Replica) -> None:
        """Let a replica take part."""
        with self._lock:
            if replica not in self.replicas:
                self.replicas.append(replica)
            self._dispatch()

    def remove(self, replica: Replica, reason: str) -> None:
        """Take a replica out; what it was running is run again elsewhere."""
        with self._lock:
            if replica not in self.replicas:
                return
            self.replicas.remove(replica)
            given, replica.tickets = replica.tickets, []
            tickets = [ticket for ticket in given if ticket.after is None]
            # Roles without steps do not tell that they compute: then it is the one that was given first.
            guilty = [each for each in tickets if each.computing] or sorted(tickets, key=lambda each: each.since)[:1]
            for ticket in given:
                self._withdraw(ticket)
                if ticket.after is not None:  # its turn has not come: somebody else gets it then
                    ticket.after.ahead, ticket.after = None, None
                    continue
                self._lose(ticket, reason, counts=ticket in guilty)
            self._dispatch()

    def __len__(self) -> int:
        return len(self._jobs)

    def waiting(self, role: RoleType) -> list[Ticket]:
        """Return the segments of a role that wait for a replica."""
        with self._lock:
            return [ticket for ticket in self._waiting if ticket.role is role]

    # What follows runs under the lock.

    def _proceed(self, job: Job, handover: Handover) -> None:
        role = handover.next_role
        if role is None:
            try:
                self._end(job, self._finish(handover))
            except Exception as error:  # noqa: BLE001 (it is the request's end, not the router's)
                self._end(job, error)
            return
        work = work_of(self._jobs[job], role)
        predicted = self.costs.predict(role, work)
        alone = job.cramped or len(job.lost) >= ATTEMPTS - 1 or job.beside >= BESIDE
        self._waiting.append(Ticket(job, role, handover, work, predicted, alone, self._done))
        self._dispatch()

    def _dispatch(self) -> None:
        """Give waiting segments to replicas that have room, in the order of arrival."""
        full: set[RoleType] = set()
        kept: set[Replica] = set()  # for those that are to be alone: nothing else goes there until they are empty
        failed: list[tuple[Ticket, str]] = []
        for ticket in list(self._waiting):
            if ticket.role in full and not ticket.alone:
                continue
            others = [each for each in self.replicas if each not in kept]
            replica = self._choice.pick(ticket, others, self._jobs[ticket.job])
            if replica is None and ticket.alone:
                able = [each for each in self.replicas if ticket.role in each.roles and not each.draining]
                if able and kept.isdisjoint(able):
                    best = min(able, key=lambda each: (each.backlog, each.name))
                    kept.add(best)
                    replica = best if self._free(best) else None
                if replica is None:
                    continue
            if replica is None:
                full.add(ticket.role)
                continue
            self._waiting.remove(ticket)
            replica.tickets.append(ticket)
            self._note_start(ticket, replica)
            reserved = self._look_ahead(ticket)
            try:
                replica.start(ticket, ticket.handover.payload)
                for ahead, other in reserved:
                    other.start(ahead, None)
            except Exception as error:  # whatever it was: nobody else would ever answer
                log.exception("%s: a segment could not be given to %s", ticket.job.id, replica.name)
                failed.append((ticket, str(error)))
        for ticket, problem in failed:
            self._fail_to_give(ticket, problem)

    def _free(self, replica: Replica) -> bool:
        """Take back what a replica was given ahead, which may be long in coming; returns whether it has nothing left."""
        for ahead in [each for each in replica.tickets if each.after is not None and each.early is None]:
            if ahead.after is not None:  # else it came after one of those that were taken back
                self._withdraw(ahead.after)
        return not replica.tickets

    def _fail_to_give(self, ticket: Ticket, problem: str) -> None:
        """Have a ticket run again that its replica could not be given."""
        if ticket.replica is not None and ticket in ticket.replica.tickets:
            self._take_back(ticket)
            self._lose(ticket, f"{ticket.replica.name} could not be given it ({problem})", counts=True)

    def _note_start(self, ticket: Ticket, replica: Replica) -> None:
        ticket.replica, ticket.since = replica, time.monotonic()
        ticket.job.tell("started", role=ticket.role.value, replica=replica.name)

    def _look_ahead(self, ticket: Ticket) -> list[tuple[Ticket, Replica]]:
        """Reserve replicas that have nothing to do for the job's next segments, so that its state goes straight there."""
        reserved: list[tuple[Ticket, Replica]] = []
        if ticket.alone or not self._choice.predicts:
            return reserved
        turns = ticket.handover.then
        for number, role in enumerate(turns, 1):
            idle = [each for each in self.replicas if role in each.roles and not each.draining and not each.tickets]
            if not idle or any(waiting.role is role for waiting in self._waiting):
                break
            job, replica = ticket.job, min(idle, key=lambda each: each.name)
            work = work_of(self._jobs[job], role)
            predicted = self.costs.predict(role, work)
            coming = Handover(role, None, then=turns[number:])
            ahead = Ticket(job, role, coming, work, predicted, False, self._done, replica)
            ahead.after, ticket.ahead = ticket, ahead
            replica.tickets.append(ahead)
            reserved.append((ahead, replica))
            ticket = ahead
        return reserved

    def _catch_up(self, ahead: Ticket, handover: Handover) -> None:
        """Let a ticket that was given ahead be the job's running one: the segment before it is done."""
        assert ahead.replica is not None
        ahead.after, ahead.handover = None, handover
        self._note_start(ahead, ahead.replica)
        if ahead.early is not None:
            self._done(ahead, ahead.early)
        elif not handover.handed:
            try:
                ahead.replica.start(ahead, handover.payload)
            except Exception as error:  # whatever it was: nobody else would ever answer
                log.exception("%s: a state could not be given to %s", ahead.job.id, ahead.replica.name)
                self._fail_to_give(ahead, str(error))

    def _withdraw(self, ticket: Ticket) -> None:
        """Take back what was given ahead of a ticket's end."""
        ahead, ticket.ahead = ticket.ahead, None
        if ahead is not None:
            self._take_back(ahead)
            ahead.after = None

    def _take_back(self, ticket: Ticket) -> None:
        """Take a ticket from its replica, and what was given ahead of its end."""
        self._withdraw(ticket)
        if ticket.replica is not None:
            ticket.replica.tickets.remove(ticket)
            ticket.replica.cancel(ticket)

    def _done(self, ticket: Ticket, outcome: Handover | Exception) -> None:
        with self._lock:
            replica, job = ticket.replica, ticket.job
            if ticket.after is not None:
                ticket.early = outcome
                return
            if replica is None or ticket not in replica.tickets:
                return  # it was given up before
            replica.tickets.remove(ticket)
            if job.status in ENDED or not isinstance(outcome, Handover):
                self._withdraw(ticket)
            ahead, ticket.ahead = ticket.ahead, None
            if isinstance(outcome, Handover):
                self.costs.learn(ticket.role, ticket.work, outcome.seconds)
                job.shown, job.cramped = 0, False
            if job.status in ENDED:
                self._forget(job)
            elif isinstance(outcome, Handover):
                outcome.before, ticket.handover.before = ticket.handover, None
                if ahead is None:
                    self._proceed(job, outcome)
                else:
                    self._catch_up(ahead, outcome)
            elif isinstance(outcome, WireError):  # what it was given is damaged or gone: made once more
                if ticket.handover.before is not None:
                    ticket.handover = ticket.handover.before
                    job.shown = sys.maxsize  # it has ended once, and shown all there is
                self._lose(ticket, str(outcome), counts=True)
            elif isinstance(outcome, ReplicaLost):
                self._lose(ticket, str(outcome), counts=True)
            elif isinstance(outcome, MemoryShortageError) and not ticket.alone:
                job.cramped = True  # what ran beside it may have taken the memory
                self._lose(ticket, str(outcome), counts=True)
            else:
                self._end(job, outcome)
            self._dispatch()

    def _lose(self, ticket: Ticket, reason: str, *, counts: bool) -> None:
        job = ticket.job
        if job.status in ENDED:
            self._forget(job)
            return
        if counts:
            job.lost.append(f"{ticket.role.value}: {reason}")
        else:
            job.beside += 1
        log.warning("%s: lost an attempt (%s); %d of %d", job.id, reason, len(job.lost), ATTEMPTS)
        if len(job.lost) >= ATTEMPTS:
            self._end(job, RequestLostError(job.lost))
            return
        job.tell("retried", role=ticket.role.value, reason=reason)
        self._proceed(job, ticket.handover)

    def _end(self, job: Job, outcome: Result | Exception) -> None:
        job.end(outcome)
        self._forget(job)

    def _forget(self, job: Job) -> None:
        self._jobs.pop(job, None)
        if not self._jobs:
            self._idle.notify_all()
