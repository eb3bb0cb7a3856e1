"""How states come to the segments of a replica's process, and go on from there."""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from triptych.engine.attempt import Attempt, Attempts, failure
from triptych.engine.inbox import LARGEST, MODEST, PATIENCE, Answer, begin_sending, is_taken, send
from triptych.errors import RemoteError, WireError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from triptych.engine.direct import Placed
    from triptych.state import State

THREADS = 64
"""Threads that may send states, and wait until they were taken, at a time."""


class Couriers:
    """Read the states that come, hand on those that segments leave, and tell the router.

    The thread that drives a lane writes and sends a modest state itself, where that lies in the CPU's memory: it is quicker
    than to wake another one. What would keep it is left to threads of their own: larger states, other devices, and to wait for
    an answer.

    Args:
        attempts: those of this process; one is forgotten when its router knows its end.
        nixl: whether a state may stay on its device for the next process to fetch; else all go in their wire form.
        faults: for tests of recovery; see `RayEngine`.
        on_error: told of what a segment failed with, before the router is.

    Attributes:
        hops: how many states came or went, their bytes, and the seconds that reading and writing them took.
    """

    def __init__(
        self, attempts: Attempts, *, nixl: bool, faults: Mapping[str, float], on_error: Callable[[Exception], None]
    ) -> None:
        self.hops = {"count": 0, "bytes": 0, "seconds": 0.0}
        self._attempts = attempts
        self._nixl = nixl
        self._faults = faults
        self._on_error = on_error
        self._threads = ThreadPoolExecutor(THREADS, "courier", initializer=copy_alone)

    def read(self, data: memoryview | npt.NDArray[np.uint8] | Placed) -> State:
        """Return the state that has come.

        Raises:
            WireError: it is damaged, or gone.
        """
        from triptych.engine.direct import fetch
        from triptych.state import State

        copy_alone()
        began = time.perf_counter()
        if isinstance(data, list):
            state = fetch(data)
        else:
            state = State.from_bytes(data if isinstance(data, memoryview) else data.data)
        self._count(state.nbytes if isinstance(data, list) else len(data), began)
        return state

    def hand_on(self, attempt: Attempt, device: torch.device, outcome: State | Exception, seconds: float) -> None:
        """Send the state after a segment where it is waited for, or tell what the segment failed with.

        Args:
            device: on which the segment ran.
            seconds: that it took.
        """
        if isinstance(outcome, Exception):
            self.fail(attempt, outcome)
        elif outcome.nbytes <= MODEST and device.type == "cpu":
            self._send(attempt, device, outcome, seconds, patience=0)
        else:
            self._threads.submit(self._send, attempt, device, outcome, seconds, patience=2 * PATIENCE)

    def fail(self, attempt: Attempt, error: Exception) -> None:
        """Tell the router of an error, which knows whose fault it is."""
        self._threads.submit(self._fail, attempt, error)

    def _send(self, attempt: Attempt, device: torch.device, state: State, seconds: float, *, patience: float) -> None:
        order = attempt.order
        turns = tuple(role.value for role in state.route[state.position :])
        after: npt.NDArray[np.uint8] | Placed | None = None
        receiver = None
        try:
            if self._nixl and state.next_role is not None and (order.then is None or state.nbytes > LARGEST):
                after = self._placed(state, device)
            if after is None:
                after = self._written(state)
                if order.then is not None:
                    then = replace(order.then, seconds_left=attempt.seconds_left)
                    receiver = begin_sending(then, after.data, patience)
                elif not turns and order.reply is not None and not attempt.previews:
                    receiver = begin_sending(Answer(order.ticket, order.reply, turns, seconds), after.data, patience)
        except Exception as error:  # noqa: BLE001 (told to the router, which knows whose fault it is)
            self.fail(attempt, error)
            return
        self._threads.submit(self._end, attempt, {"turns": turns, "seconds": seconds}, after, receiver)

    def _placed(self, state: State, device: torch.device) -> Placed | None:
        """Leave a state that is to go on its device; None where nothing of it lies there."""
        from triptych.engine.direct import place

        began = time.perf_counter()
        placed = place(state, device)
        if placed is not None:
            self._count(state.nbytes, began)
        return placed

    def _written(self, state: State) -> npt.NDArray[np.uint8]:
        """Return the wire form of a state that is to go.

        Raises:
            RemoteError: a field cannot be carried.
        """
        import numpy as np

        began = time.perf_counter()
        try:
            data = np.frombuffer(state.to_bytes(), np.uint8)
        except WireError as error:  # as such it would tell of what had come
            raise RemoteError(f"the state after the segment cannot be carried: {error}") from error
        self._count(len(data), began)
        if random.random() < self._faults.get("corrupt", 0):
            data[random.randrange(len(data))] ^= 1
        return data

    def _end(
        self,
        attempt: Attempt,
        outcome: dict[str, Any],
        after: npt.NDArray[np.uint8] | Placed,
        receiver: socket.socket | None = None,
    ) -> None:
        """End an attempt, and tell the router: straight where it can hear that, else when it asks through Ray.

        Args:
            receiver: what the next replica, or the router, has been sent the state with.
        """
        went = receiver is not None and is_taken(receiver)
        is_result = outcome.get("turns") == ()
        outcome["handed"] = went and not is_result
        if attempt.previews:
            outcome["previews"] = attempt.previews
        attempt.ended.set_result((outcome, after))
        if (went and is_result) or self._tell(attempt, outcome, after):
            self._attempts.close(attempt.order.ticket)

    def _tell(self, attempt: Attempt, outcome: dict[str, Any], after: npt.NDArray[np.uint8] | Placed) -> bool:
        """Tell the router straight that an attempt has ended; returns whether it knows all then, and need not ask."""
        order = attempt.order
        if order.reply is None:
            return False
        if "error" in outcome or "previews" in outcome or isinstance(after, list) or len(after) > MODEST:
            send(Answer(order.ticket, order.reply), memoryview(b""))
            return False
        return send(Answer(order.ticket, order.reply, **outcome), after.data)

    def _fail(self, attempt: Attempt, error: Exception) -> None:
        try:
            self._on_error(error)
        finally:  # whatever that finds: nobody else would answer
            self._end(attempt, *failure(error))

    def _count(self, nbytes: int, began: float) -> None:
        for name, value in (("count", 1), ("bytes", nbytes), ("seconds", time.perf_counter() - began)):
            self.hops[name] += value


def copy_alone() -> None:
    """Let this thread copy with one CPU thread: there are hundreds, and each would keep those that it once copied with."""
    from triptych.runtime.streams import use_threads

    use_threads(1)
