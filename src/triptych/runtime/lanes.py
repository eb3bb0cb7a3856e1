"""Lanes: queues of the segments of many requests, run on one model."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch

from triptych.errors import Cancelled, DeadlineExceeded, MemoryShortageError, TriptychError
from triptych.runtime import streams
from triptych.runtime.crew import Crew
from triptych.runtime.guest import as_exception
from triptych.runtime.meeting import KINDS, Meeting
from triptych.runtime.model import Model
from triptych.runtime.pace import Appetite
from triptych.runtime.preview import Previews
from triptych.runtime.segment import OnStep, finish, run_together
from triptych.runtime.turns import Turns
from triptych.stages.graph import route_of
from triptych.state import State

log = logging.getLogger(__name__)

OFTEN = 8
"""How often a kind of segment is met before its calls are tried out, even if no two of it ever waited together."""


@dataclass(eq=False)
class Work:
    """A state whose next segment is to be run.

    Attributes:
        state: changed in place; whoever gives it away keeps a copy, or the bytes it came from.
        done: told once, in the thread that drives the lane, of the state after the segment, or of what went wrong.
        on_step: told of every denoising step.
        deadline: when it must have ended, on `time.monotonic`'s clock.
        previews: the pictures on the way that somebody wants to see.
        seconds: what the lane spent on it; its share of forwards that it shared.
    """

    state: State
    done: Callable[[State | Exception], None]
    on_step: OnStep | None = None
    deadline: float | None = None
    previews: Previews | None = None
    seconds: float = field(default=0.0, init=False)
    _cancelled: bool = field(default=False, init=False)

    def cancel(self) -> None:
        """Stop it before its next step, or before it begins; `done` is then told of `Cancelled`."""
        self._cancelled = True

    def check(self) -> None:
        """Raise if it is not to go on.

        Raises:
            Cancelled, DeadlineExceeded: nobody wants the result any more, or not so late.
        """
        if self._cancelled:
            raise Cancelled("the request was cancelled")
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise DeadlineExceeded("the request's deadline passed before it was done")

    def report(self, stage: str, step: int, steps: int) -> None:
        """Pass a step on to who asked, and see whether there is to be another."""
        if self.on_step is not None:
            self.on_step(stage, step, steps)
        if step < steps:
            self.check()


class Lane:
    """Runs one segment after another; those that wait together, as one, where that was found worth it.

    Args:
        threads: CPU threads that it computes with; None for PyTorch's own number.
        rows: how many a call that segments share may have; None to learn what is worth it, 0 to run them apart.
        turns: what the lanes of this process agree by when each computes.
        crew: the threads that drive it, which compute with as many CPU threads; None for one of its own.

    Attributes:
        exclusive: held while a segment runs: lanes that use the same autoencoder share a lock, because it keeps the
            features of a call on itself.
        batches: how often how many segments were run together.
        stream: on which it computes on a GPU; None elsewhere, and where a crew of others drives it.
    """

    def __init__(
        self,
        model: Model,
        name: str,
        *,
        threads: int | None = None,
        exclusive: AbstractContextManager[object] | None = None,
        rows: int | None = None,
        turns: Turns | None = None,
        crew: Crew | None = None,
    ) -> None:
        self.model = model
        self.name = name
        self.exclusive = exclusive or nullcontext()
        # Elsewhere than on a CPU a lane waits for its device, and others are not to wait for that.
        self._turn = (turns or Turns()).turn if model.device.type == "cpu" else nullcontext
        self.batches: Counter[int] = Counter()
        self._waiting: deque[Work] = deque()
        self._taken: set[Work] = set()  # what does not wait any more, and has not been told of its end
        self._arriving = threading.RLock()  # held while segments arrive, or are taken
        self._closing = False
        self._meeting = None if rows == 0 else Meeting(model.device, rows)
        self._appetites: dict[object, Appetite] = {}
        self._own_crew = crew is None
        self.stream = None if crew else streams.open_stream(model.device)
        self._crew = crew or Crew(1, name, partial(prepare, threads, self.stream))

    @property
    def appetite(self) -> int:
        """How many segments the lane would like to have at a time: what it may run together, and at least two."""
        return max([2, *(each.size for each in list(self._appetites.values()))])

    def put(self, work: Work) -> None:
        """Give the lane a segment to run."""
        with self._arriving:
            self._waiting.append(work)
        self._crew.wake(self)

    def close(self) -> None:
        """Finish what was given to the lane."""
        self._closing = True
        self._crew.rest(self)
        if self._own_crew:
            self._crew.close()
        if self._meeting is not None:
            self._meeting.close()

    @property
    def has_work(self) -> bool:
        """Whether there is something to do: for a request, or to learn what its calls may share."""
        return bool(self._waiting) or (self._meeting is not None and self._meeting.eager and not self._closing)

    def work(self) -> None:
        """Run a segment, or those that may go with it; or make a trial call where there is none."""
        try:
            self._work()
        except BaseException as error:  # a defect of ours, or a library's panic; whoever drives the lane is to drive on
            log.exception("%s: an error outside any request", self.name)
            self._recover(as_exception(error))

    def _recover(self, error: Exception) -> None:
        """Let go of the requests that an error may have to do with; those that wait are still to come."""
        for work in list(self._taken):
            try:
                self._settle(work, error)
            except Exception:  # the others are still to be told
                log.exception("%s: an error after the end of a request", self.name)

    @contextmanager
    def _exclusively(self) -> Iterator[None]:
        """Let no other lane use what they share, until the device has done what is asked of it meanwhile."""
        with self.exclusive, self._turn():
            try:
                yield
            finally:
                streams.wait(self.model.device)

    def _work(self) -> None:
        meeting = self._meeting
        if meeting is not None and not self._closing and (meeting.overdue or (meeting.eager and not self._waiting)):
            self._rehearse(meeting)
        with self._arriving:
            if not self._waiting:
                return
            works, meet = self._claim()
        if meet:
            self._run_together(works)
        else:
            self._run(works.pop())  # without a name here, which would keep the state until the next comes
        self._taken.clear()

    def _rehearse(self, meeting: Meeting) -> None:
        """Make a trial call between two requests; where it fails, the requests themselves are the trials."""
        try:
            with self._exclusively():
                meeting.rehearse()
        except Exception as error:  # noqa: BLE001 (no request asked for it: none is to be lost to it)
            log.warning("%s: a trial of shared calls failed: %s", self.name, error)
            meeting.forget_trials()

    def _claim(self) -> tuple[list[Work], bool]:
        """Take the segments that are to be run next, under the lock: the first, and those that may go with it.

        Returns them and whether they are to meet: one alone does once its kind is met often, so that the trials begin.
        """
        works = [self._waiting.popleft()]
        self._taken.update(works)
        if self._meeting is None or (kind := self._kind(works[0])) is None:
            return works, False
        appetite = self._appetites.setdefault(kind, Appetite())
        appetite.met += 1
        if len(self._appetites) > KINDS:
            self._appetites.pop(next(iter(self._appetites)))
        for other in list(self._waiting):
            if len(works) >= appetite.size:
                break
            if self._kind(other) == kind:
                works.append(other)
                self._waiting.remove(other)
                self._taken.add(other)
        return works, len(works) > 1 or appetite.met == OFTEN

    def _kind(self, work: Work) -> object | None:
        """Return something that equals for segments that may be run together; None for one that may not.

        Every stage has to be row-wise: a request is not to wait while another does what they cannot share.
        """
        state = work.state
        if state.fields.get("exact", True) or state.next_role is None:
            return None
        _, names = route_of(self.model.family.recipe, state.task)[state.position]
        stages = [stage for stage in self.model.stages if stage.name in names]
        if not all(stage.row_wise for stage in stages):
            return None
        read = sorted({name for stage in stages for name in stage.reads})
        shapes = [(name, value.shape[1:]) for name in read if isinstance(value := state.fields.get(name), torch.Tensor)]
        return state.task, state.position, repr(state.fields.get("lora")), *shapes

    def _run_together(self, works: list[Work]) -> None:
        """Run segments of one kind as one; a single one too, if the others are not to go on."""
        assert self._meeting is not None
        going: list[Work] = []
        for work in works:
            try:
                work.check()
                going.append(work)
            except TriptychError as error:
                self._settle(work, error)
        if not going:
            return
        kind, states = self._kind(going[0]), [work.state for work in going]
        errors: Sequence[Exception | None]
        before = [sum(state.timings.values()) for state in states]
        self._meeting.recount()
        try:
            with self._exclusively():
                checks = [work.check for work in going]
                errors = run_together(
                    self.model.family.recipe, self.model.stages, states, self.model.device, checks, self._meeting
                )
        except Exception as error:  # noqa: BLE001 (it is the requests' end, not the lane's)
            errors = [error] * len(going)
        for work, earlier in zip(going, before):
            work.seconds = sum(work.state.timings.values()) - earlier
        if (worth := self._meeting.worth) is not None:
            longest = max(work.seconds for work in going)
            self._appetites.setdefault(kind, Appetite()).note(worth, longest)
        self.batches[len(going)] += 1
        for work, failure in zip(going, errors):
            self._settle(work, failure or work.state)

    def _run(self, work: Work) -> None:
        outcome: State | Exception
        try:
            work.check()
            with self._exclusively():
                began = time.perf_counter()
                finish(self.model.segment(work.state, work.report, work.check))
            work.seconds = time.perf_counter() - began
            outcome = work.state
        except Exception as error:  # noqa: BLE001 (it is the request's end, not the lane's)
            outcome = error
        self._settle(work, outcome)

    def _settle(self, work: Work, outcome: State | Exception) -> None:
        """Tell of a work's end, once the device has done what was asked of it."""
        try:
            streams.wait(self.model.device)
            self._account()
        except Exception as error:  # noqa: BLE001 (mostly something that the device was asked for before)
            outcome = error
        if isinstance(outcome, State) and outcome.next_role is None:
            streams.release(outcome.fields, self.model.device)
        if isinstance(outcome, Exception):
            if not isinstance(outcome, TriptychError):
                log.error("%s: a request failed", self.name, exc_info=outcome)
            _forget_frames(outcome)
            if streams.lacks_memory(outcome):
                outcome = MemoryShortageError(f"there was not enough memory for it at {self.name}: {outcome}")
        self._taken.discard(work)
        try:
            work.done(outcome)
        except Exception:  # the others that ended with it are still to be told
            log.exception("%s: the end of a request could not be told", self.name)

    def _account(self) -> None:
        """Take note of the seconds of what the device has done, where they were not known when it was asked."""


def prepare(threads: int | None, stream: torch.cuda.Stream | None = None) -> None:
    """Let this thread compute as a lane does: with so many CPU threads, and on its stream."""
    if threads is not None:
        streams.use_threads(threads)
    streams.enter(stream)


def _forget_frames(error: BaseException | None) -> None:
    """Drop the frames of an error, and of those that it came from: they would keep the request's tensors."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
