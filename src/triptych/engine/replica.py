"""A replica as the router sees it, and what passes between the two."""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from triptych.engine.job import Job
from triptych.roles import RoleType


@dataclass(eq=False)
class Handover:
    """A request between two segments.

    Attributes:
        next_role: whose turn it is; None when the result is there.
        payload: the state, or a reference to it, in whatever form the engine's replicas understand. It is not changed
            by running it, so it can be run again.
        seconds: what the segment before took.
        before: what that segment started from, until the next one has read this.
        then: whose turns come after that, where a replica may be told before the state is there.
        handed: whether the replica that was told has the state already.
    """

    next_role: RoleType | None
    payload: Any
    seconds: float = 0.0
    before: Handover | None = None
    then: tuple[RoleType, ...] = ()
    handed: bool = False


@dataclass(eq=False)
class Ticket:
    """One attempt at one segment of one request.

    Attributes:
        job: the request.
        role: the segment's.
        handover: what the segment starts from.
        work: its size, as `work_of` measures it.
        predicted: seconds it is expected to take.
        alone: whether nothing else may run beside it, because it may have killed replicas, or lacked memory.
        done: called once with what the segment left, or what went wrong.
        progress: the share of it that is done.
        computing: whether it is known to have begun.
        previews: how many pictures on the way it has shown.
        ahead: the job's next ticket, where a replica has been given that already.
        after: the ticket whose end this one waits for, where it was given ahead.
        asked: whether its replica was asked to tell its end, where it does not of itself.
        early: how this one ended, where that was told before the end of the one it waited for.
        answered: whether its replica has told its end straight, which need not be asked for any more.
        name: names it between processes.
    """

    job: Job
    role: RoleType
    handover: Handover
    work: float
    predicted: float
    alone: bool
    done: Callable[[Ticket, Handover | Exception], None]
    replica: Replica | None = None
    since: float = 0.0
    progress: float = 0.0
    computing: bool = False
    previews: int = 0
    ahead: Ticket | None = None
    after: Ticket | None = None
    asked: bool = False
    answered: bool = False
    early: Handover | Exception | None = None
    name: str = field(init=False)

    def __post_init__(self) -> None:
        self.name = f"{self.job.id}-{secrets.token_hex(8)}"

    def report(self, stage: str, step: int, steps: int) -> None:
        """Take note of a step, and tell the job."""
        self.progress, self.computing = step / steps, True
        self.job.tell("step", role=self.role.value, stage=stage, step=step, steps=steps)

    def show(self, step: int, steps: int, png: bytes) -> None:
        """Tell the job of a preview, unless it has been told: an earlier attempt may have shown as many."""
        self.previews += 1
        if self.previews > self.job.shown:
            self.job.shown = self.previews
            self.job.tell("preview", step=step, steps=steps, png=png)


@dataclass(eq=False)
class Replica(ABC):
    """A process, or a part of this one, that runs segments of some roles.

    Attributes:
        name: names it in logs, metrics and events.
        roles: the roles whose segments it runs.
        slots: how many segments it takes at a time, by role.
        draining: whether it is to be given nothing more.
        tickets: what it has been given and not answered yet.
    """

    name: str
    roles: frozenset[RoleType]
    slots: dict[RoleType, int]
    draining: bool = field(default=False, init=False)
    tickets: list[Ticket] = field(default_factory=list, init=False)

    @abstractmethod
    def start(self, ticket: Ticket, payload: Any) -> None:
        """Begin a ticket's segment; returns at once. `ticket.done` is called later, from any thread.

        Args:
            payload: what it starts from. None where that is to come: from the replica that has the ticket before
                (`Ticket.after`), or else in a second call.
        """

    @abstractmethod
    def cancel(self, ticket: Ticket) -> None:
        """Stop a ticket before its next step; `ticket.done` is still called. Returns at once."""

    @abstractmethod
    def close(self) -> None:
        """Let go of everything the replica holds. What it runs is finished or lost."""

    def has_room(self, ticket: Ticket) -> bool:
        """Return whether a ticket can be given to the replica now."""
        if self.draining or ticket.role not in self.roles or any(other.alone for other in self.tickets):
            return False
        if ticket.alone:
            return not self.tickets
        return self.running(ticket.role) < self.slots[ticket.role]

    def running(self, role: RoleType) -> int:
        """Return how many segments of a role it holds."""
        return sum(ticket.role is role for ticket in self.tickets)

    def describe(self) -> dict[str, Any]:
        """Return how things stand, as plain values."""
        roles = sorted(role.value for role in self.roles)
        return {
            "name": self.name,
            "roles": roles,
            "draining": self.draining,
            "slots": {role: self.slots[RoleType(role)] for role in roles},
            "running": {role: self.running(RoleType(role)) for role in roles},
            "backlog": self.backlog,
        }

    @property
    def backlog(self) -> float:
        """Predicted seconds of work that it holds."""
        return sum(ticket.predicted * (1 - ticket.progress) for ticket in self.tickets)
