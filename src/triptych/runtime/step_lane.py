"""The denoiser's lane: many requests in their loops, step by step, in shared forwards where they may."""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from dataclasses import dataclass, field

import torch

from triptych.components.step_cache import is_cached
from triptych.errors import TriptychError
from triptych.roles import RoleType
from triptych.runtime import budget, streams
from triptych.runtime.crew import Crew
from triptych.runtime.lanes import Lane, Work
from triptych.runtime.model import Model
from triptych.runtime.pace import PATIENCE
from triptych.runtime.segment import Segment, Turn, running
from triptych.runtime.turns import Turns
from triptych.stages.denoising import Denoising, Forward
from triptych.state import State

log = logging.getLogger(__name__)

AGEING = 0.5
"""Seconds of predicted work that a second of waiting is worth, so that a long request is not passed for ever."""
SHRUNK = 60.0
"""Seconds in which less is shared after memory did not suffice; then as much as before is tried again."""


@dataclass(eq=False)
class _Runner:
    """A request in its denoising loop."""

    work: Work
    segment: Segment
    turn: Turn = field(init=False)
    joined: float = field(default_factory=time.monotonic)
    served: float = 0.0  # seconds of the forwards that it was part of

    def __post_init__(self) -> None:
        self._take(next(self.segment))

    @property
    def size(self) -> int:
        return sum(forward.size for forward in self.turn.forwards)

    def send(self, prediction: list[torch.Tensor]) -> None:
        """Give it what its forwards predict, and go on to its next turn; ends as its segment does."""
        self._take(self.segment.send(prediction))

    def _take(self, turn: Turn) -> None:
        if not turn.exact:  # read here, so that inputs which cannot be are their own request's end
            for forward in turn.forwards:
                turn.stage.form(forward)
        self.turn = turn


class StepLane(Lane):
    """A lane whose requests join and leave at every denoising step, and share forwards where they may.

    The request with the least predicted work left goes first, the longer it waited the sooner; others that can be rows
    of the same forward go with it, up to the budget.

    Attributes:
        budget: the size (`Forward.size`) beyond which a forward gains nothing from more rows; 0 keeps requests apart.
            None until it is known, which keeps them apart too: it is recalled from an earlier start, or measured when the
            lane is idle for the first time after a request; in spite of others if that does not come for long.
        forwards: how many forwards were shared by how many requests.
    """

    def __init__(
        self,
        model: Model,
        name: str,
        *,
        threads: int | None = None,
        budget: int | None = None,
        turns: Turns | None = None,
        crew: Crew | None = None,
    ) -> None:
        cached = any(is_cached(each) for each in model.components.values())
        self.budget = 0 if cached else budget  # forwards of a model with a step cache cannot be shared
        self.forwards: Counter[int] = Counter()
        self._active: list[_Runner] = []
        self._seconds_each = 0.0  # predicted seconds of one element of a forward
        self._timed: deque[tuple[streams.Stopwatch, list[tuple[_Runner, int]]]] = deque()
        self._sample: tuple[Denoising, Forward] | None = None
        self._known: int | None = None  # the budget that an earlier start has measured
        self._patient_until = 0.0
        self._shrunk: tuple[int | None, float] | None = None  # the budget before memory was short, and until when
        super().__init__(model, name, threads=threads, rows=0, turns=turns, crew=crew)

    @property
    def has_work(self) -> bool:
        """Whether there is something to do: for a request, or to find the budget."""
        return bool(self._waiting or self._active) or (self._is_curious and not self._closing)

    def _work(self) -> None:
        if self._shrunk is not None and time.monotonic() > self._shrunk[1]:
            self.budget, self._shrunk = self._shrunk[0], None
        if self._is_curious and (self._impatient or not (self._waiting or self._active)):
            assert self._sample is not None
            with self._turn():
                self._try_out(*self._sample)
        with self._arriving:
            arrived, self._waiting = self._waiting, deque()
            self._taken.update(arrived)
        if not arrived and not self._active:
            return
        with self._turn():
            while arrived:
                self._join(arrived.popleft())
            self._dismiss()
            if self._active:
                self._step(self._choose())

    @property
    def _is_curious(self) -> bool:
        """Whether the budget is still to be found, with a forward that is there."""
        return self.budget is None and self._sample is not None

    @property
    def _impatient(self) -> bool:
        return time.monotonic() > self._patient_until

    def _try_out(self, stage: Denoising, sample: Forward) -> None:
        """Measure the budget while nothing else is to be done; where that fails, requests are kept apart."""
        try:
            self._measure(stage, sample)
        except Exception as error:  # noqa: BLE001 (no request asked for it: none is to be lost to it)
            log.warning("%s: forwards are not shared, because that could not be tried: %s", self.name, error)
            self.budget, self._sample = 0, None

    def _measure(self, stage: Denoising, sample: Forward) -> None:
        if self._known is not None:
            with running(stage.name):
                self.budget, self._sample = budget.rehearse(stage, sample, self._known), None
            return
        with running(stage.name):
            measured = budget.measure(
                stage, sample, lambda: self._closing or (bool(self._waiting) and not self._impatient)
            )
        if measured is not None:
            self.budget, self._sample = measured, None
            budget.remember(self._budget_key(sample), measured)
            log.info("%s: forwards gain from sharing up to %d times one request's", self.name, measured // sample.size)

    def _budget_key(self, sample: Forward) -> str:
        dtype = next(value.dtype for value in sample.inputs.values() if isinstance(value, torch.Tensor))
        identity = self.model.identity
        asked = self.model.accelerated.asked.get(RoleType.DENOISER)
        # All that was asked for: what changes no number, like offloading, changes what a forward costs.
        parts = (identity["fingerprint"], identity.get("acceleration"), None if asked is None else str(asked))
        model = "/".join(part for part in parts if part is not None)
        return budget.key(model, self.model.device, dtype, torch.get_num_threads())

    def _join(self, work: Work) -> None:
        try:
            work.check()
            segment = self.model.segment(work.state, work.report, work.check)
            runner = _Runner(work, segment)
            if self.budget is None and self._sample is None:
                sample = runner.turn.forwards[0]
                self._known = budget.recall(self._budget_key(sample))
                self._patient_until = time.monotonic() + (PATIENCE if self._known is None else 0.0)
                self._sample = runner.turn.stage, sample
            self._active.append(runner)
        except StopIteration:  # a segment without a denoising loop
            self._settle(work, work.state)
        except Exception as error:  # noqa: BLE001 (it is the request's end, not the lane's)
            self._settle(work, error)

    def _recover(self, error: Exception) -> None:
        for runner in list(self._active):
            try:
                self._leave(runner, error)
            except Exception:  # the others are still to be told
                log.exception("%s: an error after the end of a request", self.name)
        super()._recover(error)

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
        deadline = runner.work.deadline
        # One that cannot be in time any more would only keep others from being so.
        late = deadline is not None and now + left <= deadline < now + left * 1.2
        waited = max(0.0, now - runner.joined - runner.served)
        return -1e9 + left if late else left - AGEING * waited

    def _choose(self) -> list[_Runner]:
        """Return the requests of the next forward, the most urgent first."""
        now = time.monotonic()
        first, *others = sorted(self._active, key=lambda runner: self._urgency(runner, now))
        chosen, size = [first], first.size
        shared = self.budget if self._shrunk is None else self._shrunk[0]  # a lack of memory allows nothing more
        if first.turn.exact or not self.budget or not shared:
            return chosen
        stage, form = first.turn.stage, first.turn.stage.form(first.turn.forwards[0])
        for other in others:
            if size + other.size > self.budget or other.turn.exact or other.turn.stage is not stage:
                continue
            if any(stage.form(forward) == form for forward in other.turn.forwards):
                chosen.append(other)
                size += other.size
        return chosen

    def _step(self, chosen: list[_Runner]) -> None:
        """Run one turn of the chosen requests."""
        watch, predictions = streams.Stopwatch(self.model.device), None
        try:
            predictions = self._predict(chosen)
            watch.stop()
            self._timed.append((watch, [(runner, runner.size) for runner in chosen]))
            self._account()
        except Exception as error:  # noqa: BLE001 (a request must not fail because of those beside it)
            full = streams.lacks_memory(error)
            half, first = sum(runner.size for runner in chosen) // 2, chosen[0].turn
            joined = len(first.stage.groups(first.forwards, self.budget or None)) < len(first.forwards)
            branches = joined and not first.exact and (not self.budget or self.budget > half)
            if len(chosen) == 1 and not (full and branches):  # else its own branches run apart
                self._leave(chosen[0], error)
                return
            # As text: a record of the log may be kept, and the error would keep what the forward has computed.
            log.warning("%s: a shared forward failed (%s); its %d run apart", self.name, repr(error), len(chosen))
            predictions = None  # they may be there, and yet the device has failed at them
            if full:
                self._shrink(half)
        if predictions is None:  # not above, where the error still holds what the forward has computed
            for runner in chosen:
                self._step([runner])
            return
        self.forwards[len(chosen)] += 1
        for runner, prediction in zip(chosen, predictions):
            self._advance(runner, prediction)

    def _shrink(self, size: int) -> None:
        """Share less for a while: what took the memory, maybe in another lane, may be gone then."""
        before = self.budget if self._shrunk is None else self._shrunk[0]
        self.budget, self._shrunk = size, (before, time.monotonic() + SHRUNK)

    def _account(self) -> None:
        while self._timed and (seconds := self._timed[0][0].seconds) is not None:
            _, shares = self._timed.popleft()
            size = sum(share for _, share in shares)
            self._seconds_each += (seconds / size - self._seconds_each) * (0.2 if self._seconds_each else 1.0)
            for runner, share in shares:
                runner.served += seconds
                runner.work.seconds += seconds * share / size

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
            runner.send(prediction)
            if show is not None:
                show()
        except StopIteration:
            self._leave(runner, runner.work.state)
        except Exception as error:  # noqa: BLE001 (it is the request's end, not the lane's)
            self._leave(runner, error)

    def _leave(self, runner: _Runner, outcome: State | Exception) -> None:
        self._active.remove(runner)
        try:
            runner.segment.close()
        except Exception:  # it ends all the same, and those beside it go on
            log.exception("%s: a request that ended could not be closed", self.name)
        self._settle(runner.work, outcome)
