"""Phases: where the time of a request that has ended went, told from its events and the seconds of its stages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from triptych.engine.job import ENDED, Event


@dataclass(frozen=True)
class Phase:
    """A stretch of a request's time: waiting for a role (and getting there), or one attempt at a segment of it.

    Attributes:
        role: the role's name.
        waiting: whether it waited for the role.
        start, end: seconds since the epoch.
        replica: what ran it.
        lost: why the attempt was lost, where it was.
    """

    role: str
    waiting: bool
    start: float
    end: float
    replica: str | None = None
    lost: str | None = None

    @property
    def name(self) -> str:
        """What it is called: `queue`, or the role."""
        return "queue" if self.waiting else self.role

    @property
    def seconds(self) -> float:
        return max(0.0, self.end - self.start)


def phases(events: Iterable[Event], timings: Mapping[str, float], roles: Mapping[str, str]) -> list[Phase]:
    """Return the phases of a request in order.

    Args:
        timings: seconds of its stages in the order in which they ran; empty where it has no result.
        roles: the role of every stage.
    """
    told = _Teller([sum(seconds for _, seconds in run) for _, run in _runs(timings, roles)], _order(timings, roles))
    for event in events:
        told.hear(event)
    return told.phases


def _runs(timings: Mapping[str, float], roles: Mapping[str, str]) -> list[tuple[str, list[tuple[str, float]]]]:
    runs = groupby(timings.items(), key=lambda each: roles.get(each[0], ""))
    return [(role, list(run)) for role, run in runs]


def _order(timings: Mapping[str, float], roles: Mapping[str, str]) -> list[str]:
    return [role for role, _ in _runs(timings, roles)]


class _Teller:
    """Follows the events of one request."""

    def __init__(self, seconds: Sequence[float], order: Sequence[str]) -> None:
        self.phases: list[Phase] = []
        self._seconds, self._order = seconds, order
        self._segment = 0  # counts the segments that were finished
        self._since: float | None = None  # when it began to wait
        self._attempt: Event | None = None  # the newest `started`

    def hear(self, event: Event) -> None:
        if event.kind == "queued":
            self._since = event.time
        elif event.kind == "started":
            self._finish(event.time)
            self._step_back(str(event.details["role"]))
            self._wait(str(event.details["role"]), event.time)
            self._attempt = event
        elif event.kind == "retried":
            self._add(event.time, lost=str(event.details.get("reason")))
            self._since = event.time
        elif event.kind == "done":
            self._finish(event.time)
        elif event.kind in ENDED:
            self._add(event.time)

    def _finish(self, latest: float) -> None:
        """End the attempt that is on its way, by what its stages took."""
        if self._attempt is not None:
            known = self._segment < len(self._seconds)
            end = self._attempt.time + self._seconds[self._segment] if known else latest
            self._add(min(end, latest))
            self._segment += 1
            self._since = self.phases[-1].end

    def _step_back(self, role: str) -> None:
        """See whether the segment before is done once more, because its hand-over was damaged."""
        at = self._segment
        if 0 < at <= len(self._order) and self._order[at - 1] == role and self._order[at : at + 1] != [role]:
            self._segment -= 1

    def _wait(self, role: str, end: float) -> None:
        self.phases.append(Phase(role, True, end if self._since is None else self._since, end))

    def _add(self, end: float, lost: str | None = None) -> None:
        attempt, self._attempt = self._attempt, None
        if attempt is not None:
            role, replica = str(attempt.details["role"]), str(attempt.details.get("replica"))
            self.phases.append(Phase(role, False, attempt.time, end, replica, lost))
