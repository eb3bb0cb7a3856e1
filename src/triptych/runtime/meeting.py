"""Where requests meet: their stages run side by side, and where they call the same model, one call serves them all.

Each request's stage runs as it would alone, in a thread of its own of which only one is awake at a time. At a call of a
model whose rows do not depend on each other it stops; when all have come that far, or ended, the calls that fit together
are made as one, and each goes on with its rows.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context
from dataclasses import replace

import torch

from triptych.components.switches import is_compiled
from triptych.runtime import streams
from triptych.runtime.guest import Guest, calls_stop
from triptych.runtime.pace import MOST_ROWS, PATIENCE, Pace
from triptych.runtime.rows import Call, answer_alone, answer_joined, pass_on

log = logging.getLogger(__name__)

KINDS = 256
"""Kinds of calls that are remembered; those met longest ago are forgotten first."""
_NEW = 16
"""Kinds of calls that wait for their trials; beyond that the requests themselves are the trials."""
ROOM = 0.5
"""The share of a device's free memory that a larger call may be expected to take."""


class Meeting:
    """Runs parts of several requests side by side, and learns which calls gain from being shared.

    One thread at a time may use it.

    Args:
        rows: how many a shared call may have; None to learn that.
    """

    def __init__(self, device: torch.device, rows: int | None = None) -> None:
        self.device = device
        self._rows = rows
        self._paces: OrderedDict[object, Pace] = OrderedDict()
        self._threads: ThreadPoolExecutor | None = None
        self._places = 0
        self._compiled: dict[int, bool] = {}
        self._took: dict[object, tuple[float, int]] = {}  # by kinds of calls, their seconds and how many it is worth
        self._new: deque[tuple[Pace, Call, float]] = deque(maxlen=_NEW)  # each with the time until when it may wait

    @property
    def worth(self) -> int | None:
        """How many parts it is worth to run together, by those calls since `recount` that took the most time.

        For the sake of the others none is to wait. None without any calls.
        """
        return max(self._took.values())[1] if self._took else None

    def recount(self) -> None:
        """Let `worth` be told by the calls from now on."""
        self._took.clear()

    @property
    def eager(self) -> bool:
        """Whether there are kinds of calls of which it is not known yet how many rows are worth it."""
        return bool(self._new)

    @property
    def overdue(self) -> bool:
        """Whether the trials of one of them are not to wait any longer until there is nothing else to do."""
        return self.eager and time.monotonic() > self._new[0][2]

    def rehearse(self) -> None:
        """Make one trial call of such a kind, with the rows of one repeated.

        So requests need not be the trials. The last is the largest that there may ever be, whether it will be worth it or
        not: memory is at its highest early on then, not from some busy hour on. One that fails is the last, too.
        """
        pace, call, _ = self._new[0]
        each, last = call.rows or 1, pace.settled
        copies = max(1, pace.most // each if last else -(-pace.aim // each))  # rounded up, or it may never get there
        rows = copies * each
        # A call of more rows than are to be tried tells nothing of those.
        fits = rows <= self._fitting(pace) and (last or rows < 2 * pace.aim)
        if fits and not (last and rows <= max(each, pace.aim)):
            with torch.no_grad():
                last |= not self._run_as_one(pace, [call] * copies, rows)
            call.answer = None
        if last or not fits:
            self._new.popleft()

    def forget_trials(self) -> None:
        """Make no trial of the kinds of calls that are known so far."""
        self._new.clear()

    def run(self, parts: Sequence[Callable[[], None]], modules: Iterable[torch.nn.Module]) -> list[Guest]:
        """Run parts to their ends, sharing their calls of `modules`; returns what became of each."""
        if self._threads is None or self._places < len(parts):
            self.close()
            self._places = max(len(parts), MOST_ROWS)  # a part without a thread would hold up all the others
            alike = streams.like_this_thread(self.device)
            self._threads = ThreadPoolExecutor(self._places, "meeting", initializer=alike)
        guests: list[Guest] = []
        with calls_stop([each for each in modules if not self._is_compiled(each)]):
            try:
                for part in parts:
                    guests.append(Guest(part, self._threads))
                awake = guests
                while awake:
                    for guest in awake:
                        guest.resume()
                    awake = [guest for guest in awake if not guest.ended]
                    calls = [guest.call for guest in awake if guest.call is not None]
                    with torch.no_grad():
                        self._answer(calls)
                    for guest, call in zip(awake, calls):
                        guest.seconds += call.seconds
            except BaseException as error:
                # First, so that no thread takes up a part that nobody would let go on: one that could not have its own.
                self._threads.shutdown(wait=False, cancel_futures=True)
                self._threads = None
                for guest in guests:
                    guest.dismiss(error)
                raise
        return guests

    def close(self) -> None:
        """End the threads."""
        if self._threads is not None:
            self._threads.shutdown()
            self._threads = None

    def _answer(self, calls: list[Call]) -> None:
        """Make the calls, those of one form together."""
        groups: dict[object, list[Call]] = {}
        for call in calls:
            groups.setdefault(id(call) if call.rows is None else call.form(), []).append(call)
        for form, group in groups.items():
            if group[0].rows is None:
                self._answer_alone(group[0])
            else:
                self._answer_group(form, group)

    def _answer_alone(self, call: Call) -> None:
        """Make a call that no other can be a row of."""
        began, _ = self._now()
        answer_alone(call)
        call.seconds = self._now()[0] - began
        self._count(call.target, call.seconds, 1)

    def _answer_group(self, form: object, group: list[Call]) -> None:
        pace = self._pace(form)
        same: dict[object, list[Call]] = {}
        for call in group:
            same.setdefault(call.content(), []).append(call)
        waiting, chunks = [calls[0] for calls in same.values()], 0
        while waiting:
            chunks += 1
            aim = min(pace.aim, self._fitting(pace))
            chunk = [waiting.pop(0)]
            rows = chunk[0].rows or 1
            while waiting and rows + (waiting[0].rows or 1) <= aim:
                chunk.append(waiting.pop(0))
                rows += chunk[-1].rows or 1
            self._run(pace, chunk, rows)
        for first, *others in same.values():
            if others:
                pass_on(first, others)
        worth = max(1, min(pace.worth, self._fitting(pace)) // min(call.rows or 1 for call in group))
        # As long as one request waits for its own: else a kind would weigh the more, the more requests met in it.
        self._count(form, sum(call.seconds for call in group) / chunks, worth)

    def _count(self, kind: object, seconds: float, worth: int) -> None:
        before, _ = self._took.get(kind, (0.0, worth))
        self._took[kind] = before + seconds, worth

    def _run(self, pace: Pace, calls: list[Call], rows: int) -> None:
        """Make calls of one form as one, or each by itself where that fails."""
        if not self._run_as_one(pace, calls, rows) and len(calls) > 1:
            for call in calls:
                self._run_as_one(pace, [call], call.rows or 1)

    def _run_as_one(self, pace: Pace, calls: list[Call], rows: int) -> bool:
        """Make calls of one form as one, and take note of what it took; returns whether it was made."""
        began = self._begin()
        made = answer_alone(calls[0]) if len(calls) == 1 else answer_joined(calls)
        if not made and len(calls) > 1:
            pace.limit = max(1, rows // 2)
        self._end(pace, calls, rows, began, made)
        return made

    def _begin(self) -> tuple[float, float]:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        return self._now()

    def _now(self) -> tuple[float, float]:
        """Return the time, and a time that others do not delay: on a CPU, whose cores lanes share, this thread's own."""
        if self.device.type == "cpu":
            return time.perf_counter(), time.thread_time()
        streams.wait(self.device)
        now = time.perf_counter()
        return now, now

    def _end(self, pace: Pace, calls: list[Call], rows: int, began: tuple[float, float], made: bool) -> None:
        """Take note of what a call took; one that failed tells nothing of its kind: it may have ended at once."""
        passed, computed = (now - then for now, then in zip(self._now(), began))
        for call in calls:
            call.seconds += passed * (call.rows or 1) / rows
        if not made:
            return
        pace.note(rows, computed)
        if self.device.type == "cuda":
            # Other lanes may have taken some of it, which is too much, or begun a call meanwhile, which is too little.
            peak = torch.cuda.max_memory_allocated(self.device) - torch.cuda.memory_allocated(self.device)
            pace.bytes = max(pace.bytes, peak / rows)
        if not (pace.tried or pace.settled):  # it is to be learned, and a call is there that can be repeated
            pace.tried = True
            # Not in its request's context, which may have been cancelled by then.
            sample = replace(calls[0], context=Context(), answer=None)
            self._new.append((pace, sample, time.monotonic() + PATIENCE))

    def _fitting(self, pace: Pace) -> int:
        """Return the rows of a call that memory has room for."""
        if self.device.type != "cuda" or not pace.bytes:
            return pace.limit
        held = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return int(ROOM * (torch.cuda.mem_get_info(self.device)[0] + held) / pace.bytes)

    def _is_compiled(self, module: torch.nn.Module) -> bool:
        """Return whether a module, or a part of it, would be compiled anew for every number of rows."""
        if id(module) not in self._compiled:
            self._compiled[id(module)] = is_compiled(module)
        return self._compiled[id(module)]

    def _pace(self, form: object) -> Pace:
        pace = self._paces.setdefault(form, Pace(self._rows))
        self._paces.move_to_end(form)
        if len(self._paces) > KINDS:
            self._paces.popitem(last=False)
        return pace
