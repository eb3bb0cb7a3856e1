"""Lanes: threads that run the segments of many requests on one model."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch

from triptych.components.step_cache import is_cached
from triptych.errors import Cancelled, DeadlineExceeded, TriptychError
from triptych.runtime import budget
from triptych.runtime.meeting import KINDS, Meeting
from triptych.runtime.model import Model
from triptych.runtime.pace import Appetite
from triptych.runtime.preview import Previews
from triptych.runtime.segment import OnStep, Segment, Turn, finish, run_together, running
from triptych.stages.denoising import Denoising, Forward
from triptych.stages.graph import route_of
from triptych.state import State

log = logging.getLogger(__name__)

AGEING = 0.5
"""Seconds of predicted work that a second of waiting is worth, so that a long request is not passed for ever."""


@dataclass(eq=False)
class Work:
    """A state whose next segment is to be run.

    Attributes:
        state: changed in place; whoever gives it away keeps a copy, or the bytes it came from.
        done: told once, in the lane's thread, of the state after the segment, or of what went wrong.
        on_step: told of every denoising step.
        deadline: when it must have ended, on `time.monotonic`'s clock.
        previews: the pictures on the way that somebody wants to see.
        seconds: what the lane spent on it; its share of forwards that it shared.
        settled: whether `done` has been told.
    """

    state: State
    done: Callable[[State | Exception], None]
    on_step: OnStep | None = None
    deadline: float | None = None
    previews: Previews | None = None
    seconds: float = field(default=0.0, init=False)
    settled: bool = field(default=False, init=False)
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
    """A thread that runs one segment after another; those that wait together, as one, where that was found worth it.

    Args:
        rows: how many a call that segments share may have; None to learn what is worth it, 0 to run them apart.

    Attributes:
        exclusive: held while a segment runs: lanes that use the same autoencoder share a lock, because it keeps the
            features of a call on itself.
        batches: how often how many segments were run together.
    """

    def __init__(
        self,
        model: Model,
        name: str,
        *,
        threads: int | None = None,
        exclusive: AbstractContextManager[object] | None = None,
        rows: int | None = None,
    ) -> None:
        self.model = model
        self.name = name
        self.exclusive = exclusive or nullcontext()
        self.batches: Counter[int] = Counter()
        self._threads = threads
        self._waiting: deque[Work] = deque()
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)  # the lane's thread has something to do
        self._free = threading.Condition(self._lock)  # nobody runs a segment
        self._busy = False
        self._callers = 0  # that wait for `_free`
        self._closing = False
        self._meeting = None if rows == 0 else Meeting(model.device, rows)
        self._appetites: dict[object, Appetite] = {}
        self._thread = threading.Thread(target=self._live, name=name, daemon=True)
        self._thread.start()

    @property
    def appetite(self) -> int:
        """How many segments the lane would like to have at a time: what it may run together, and at least two."""
        return max([2, *(each.size for each in list(self._appetites.values()))])

    def put(self, work: Work) -> None:
        """Give the lane a segment to run."""
        with self._lock:
            self._waiting.append(work)
            self._wake.notify()

    def run_here(self, work: Work) -> None:
        """Run a segment in the caller's thread, when nobody else is at work: two changes of threads less.

        It may run others that wait with it, or be run by another caller with its own.
        """
        with self._lock:
            self._waiting.append(work)
        while True:
            with self._lock:
                self._callers += 1
                self._free.wait_for(lambda: work.settled or not self._busy)
                self._callers -= 1
                if work.settled:
                    self._call_next()
                    return
                works = self._claim()
            self._run_claimed(works)

    def close(self) -> None:
        """Finish what was given to the lane, and end its thread."""
        with self._lock:
            self._closing = True
            self._wake.notify()
        self._thread.join()
        if self._meeting is not None:
            self._meeting.close()

    def _live(self) -> None:
        if self._threads is not None:
            torch.set_num_threads(self._threads)  # of this thread: OpenMP counts by the thread that starts a region
        self._loop()

    def _take(self, wait: bool) -> deque[Work] | None:
        """Return what has arrived, waiting for it if need be; None when the lane is closed and nothing is left."""
        with self._wake:
            while wait and not self._waiting and not self._closing:
                self._wake.wait()
            arrived, self._waiting = self._waiting, deque()
            return arrived if arrived or not (wait and self._closing) else None

    def _loop(self) -> None:
        while True:
            with self._lock:
                self._wake.wait_for(lambda: not self._busy and (self._waiting or self._closing))
                if not self._waiting:
                    return
                works = self._claim()
            self._run_claimed(works)

    def _claim(self) -> list[Work]:
        """Take the segments that are to be run next, under the lock: the first, and those that may go with it."""
        self._busy = True
        works = [self._waiting.popleft()]
        if not self._waiting or self._meeting is None or (kind := self._kind(works[0])) is None:
            return works
        appetite = self._appetites.setdefault(kind, Appetite())
        if len(self._appetites) > KINDS:
            self._appetites.pop(next(iter(self._appetites)))
        for other in list(self._waiting):
            if len(works) >= appetite.size:
                break
            if self._kind(other) == kind:
                works.append(other)
                self._waiting.remove(other)
        return works

    def _run_claimed(self, works: list[Work]) -> None:
        try:
            if len(works) == 1:
                self._run(works.pop())  # without a name here, which would keep the state until the next comes
            else:
                self._run_together(works)
                works.clear()
        finally:
            with self._lock:
                self._busy = False
                self._free.notify_all()
                self._call_next()

    def _call_next(self) -> None:
        """Wake the lane's thread, under the lock, if something is left to do and no caller there to do it."""
        if (self._waiting or self._closing) and not self._busy and not self._callers:
            self._wake.notify()

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
        """Run segments of one kind as one."""
        assert self._meeting is not None
        going: list[Work] = []
        for work in works:
            try:
                work.check()
                going.append(work)
            except TriptychError as error:
                self._settle(work, error)
        if len(going) < 2:
            for work in going:
                self._run(work)
            return
        kind, states = self._kind(going[0]), [work.state for work in going]
        errors: Sequence[Exception | None]
        before = [sum(state.timings.values()) for state in states]
        self._meeting.worth = None
        try:
            with self.exclusive:
                checks = [work.check for work in going]
                errors = run_together(
                    self.model.family.recipe, self.model.stages, states, self.model.device, checks, self._meeting
                )
        except Exception as error:  # noqa: BLE001 (it is the requests' end, not the lane's)
            errors = [error] * len(going)
        for work, earlier in zip(going, before):
            work.seconds = sum(work.state.timings.values()) - earlier
        if self._meeting.worth is not None:
            longest = max(work.seconds for work in going)
            self._appetites.setdefault(kind, Appetite()).note(self._meeting.worth, longest)
        self.batches[len(going)] += 1
        for work, failure in zip(going, errors):
            self._settle(work, failure or work.state)

    def _run(self, work: Work) -> None:
        outcome: State | Exception
        began = time.perf_counter()
        try:
            work.check()
            with self.exclusive:
                finish(self.model.segment(work.state, work.report, work.check))
            outcome = work.state
        except Exception as error:  # noqa: BLE001 (it is the request's end, not the lane's)
            outcome = error
        work.seconds = time.perf_counter() - began
        self._settle(work, outcome)

    def _settle(self, work: Work, outcome: State | Exception) -> None:
        """Tell of a work's end, once the device has done what was asked of it."""
        if self.model.device.type != "cpu":
            torch.accelerator.synchronize(self.model.device)
        if isinstance(outcome, Exception):
            if not isinstance(outcome, TriptychError):
                log.error("%s: a request failed", self.name, exc_info=outcome)
            outcome = outcome.with_traceback(None)  # its frames would keep the request's tensors
        try:
            work.done(outcome)
        finally:
            work.settled = True


@dataclass(eq=False)
class _Runner:
    """A request in its denoising loop."""

    work: Work
    segment: Segment
    turn: Turn
    joined: float = field(default_factory=time.monotonic)

    @property
    def size(self) -> int:
        return sum(forward.size for forward in self.turn.forwards)


class StepLane(Lane):
    """A lane whose requests join and leave at every denoising step, and share forwards where they may.

    The request with the least predicted work left goes first, the longer it waited the sooner; others that can be rows
    of the same forward go with it, up to the budget.

    Attributes:
        budget: the size (`Forward.size`) beyond which a forward gains nothing from more rows; 0 keeps requests apart.
            None until it is known: it is measured when the lane is idle for the first time after a request, or recalled
            from an earlier start. Until then requests are kept apart.
        forwards: how many forwards were shared by how many requests.
    """

    def __init__(self, model: Model, name: str, *, threads: int | None = None, budget: int | None = None) -> None:
        cached = any(is_cached(each) for each in model.components.values())
        self.budget = 0 if cached else budget  # forwards of a model with a step cache cannot be shared
        self.forwards: Counter[int] = Counter()
        self._active: list[_Runner] = []
        self._seconds_each = 0.0  # predicted seconds of one element of a forward
        self._sample: tuple[Denoising, Forward] | None = None
        super().__init__(model, name, threads=threads, rows=0)

    def _loop(self) -> None:
        while True:
            if self.budget is None and self._sample is not None and not self._active:
                self._measure(*self._sample)
            arrived = self._take(wait=not self._active)
            if arrived is None:
                return
            while arrived:
                self._join(arrived.popleft())
            self._dismiss()
            if self._active:
                self._step(self._choose())

    def _measure(self, stage: Denoising, sample: Forward) -> None:
        dtype = next(value.dtype for value in sample.inputs.values() if isinstance(value, torch.Tensor))
        model = "/".join((self.model.fingerprint, *self.model.accelerated.identity.values()))
        key = budget.key(model, self.model.device, dtype, torch.get_num_threads())
        if (known := budget.recall(key)) is not None:
            with running(stage.name):
                self.budget, self._sample = budget.rehearse(stage, sample, known), None
            return
        with running(stage.name):
            measured = budget.measure(stage, sample, lambda: bool(self._waiting) or self._closing)
        if measured is not None:
            self.budget, self._sample = measured, None
            budget.remember(key, measured)
            log.info("%s: forwards gain from sharing up to %d times one request's", self.name, measured // sample.size)

    def _join(self, work: Work) -> None:
        try:
            work.check()
            segment = self.model.segment(work.state, work.report, work.check)
            runner = _Runner(work, segment, next(segment))
            self._active.append(runner)
            if self.budget is None and self._sample is None:
                self._sample = runner.turn.stage, runner.turn.forwards[0]
        except StopIteration:  # a segment without a denoising loop
            self._settle(work, work.state)
        except Exception as error:  # noqa: BLE001 (it is the request's end, not the lane's)
            self._settle(work, error)

    def _dismiss(self) -> None:
        """Let go of the requests that are not to go on, even those whose turn would be far off."""
        for runner in list(self._active):
            try:
                runner.work.check()
            except TriptychError as error:
                self._leave(runner, error)

    def _urgency(self, runner: _Runner, now: float) -> float:
        """Return where a request stands in the queue: the seconds it still needs, less what its waiting is worth."""
        left = runner.turn.left * runner.size * self._seconds_each
        late = runner.work.deadline is not None and now + left * 1.2 > runner.work.deadline
        return -1e9 + left if late else left - AGEING * (now - runner.joined)

    def _choose(self) -> list[_Runner]:
        """Return the requests of the next forward, the most urgent first."""
        now = time.monotonic()
        first, *others = sorted(self._active, key=lambda runner: self._urgency(runner, now))
        chosen, size = [first], first.size
        if first.turn.exact or not self.budget:
            return chosen
        for other in others:
            fits = size + other.size <= self.budget
            if fits and not other.turn.exact and other.turn.stage is first.turn.stage and _can_join(first, other):
                chosen.append(other)
                size += other.size
        return chosen

    def _step(self, chosen: list[_Runner]) -> None:
        """Run one turn of the chosen requests."""
        began = time.perf_counter()
        try:
            predictions = self._predict(chosen)
        except Exception as error:  # noqa: BLE001 (a request must not fail because of those beside it)
            if len(chosen) == 1:
                self._leave(chosen[0], error)
            else:
                log.warning(
                    "%s: a shared forward failed (%s); its %d requests run apart", self.name, error, len(chosen)
                )
                for runner in chosen:
                    self._step([runner])
            return
        seconds, size = time.perf_counter() - began, sum(runner.size for runner in chosen)
        self.forwards[len(chosen)] += 1
        self._seconds_each += (seconds / size - self._seconds_each) * (0.2 if self._seconds_each else 1.0)
        for runner, prediction in zip(chosen, predictions):
            runner.work.seconds += seconds * runner.size / size
            self._advance(runner, prediction)

    def _predict(self, chosen: list[_Runner]) -> list[list[torch.Tensor]]:
        turn = chosen[0].turn
        forwards = [forward for runner in chosen for forward in runner.turn.forwards]
        with running(turn.stage.name):
            flat = iter(turn.stage.predict(forwards, exact=turn.exact, budget=self.budget or None))
        return [[next(flat) for _ in runner.turn.forwards] for runner in chosen]

    def _advance(self, runner: _Runner, prediction: list[torch.Tensor]) -> None:
        previews = runner.work.previews
        show = None if previews is None else previews.prepare(runner.turn, runner.work.state)
        try:
            runner.turn = runner.segment.send(prediction)
            if show is not None:
                show()
        except StopIteration:
            self._leave(runner, runner.work.state)
        except Exception as error:  # noqa: BLE001 (it is the request's end, not the lane's)
            self._leave(runner, error)

    def _leave(self, runner: _Runner, outcome: State | Exception) -> None:
        self._active.remove(runner)
        runner.segment.close()
        self._settle(runner.work, outcome)


def _can_join(one: _Runner, other: _Runner) -> bool:
    """Return whether some forwards of two requests can be rows of one."""
    stage = one.turn.stage
    return any(stage.can_join(one.turn.forwards[0], forward) for forward in other.turn.forwards)
