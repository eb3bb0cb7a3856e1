"""A replica in a process of its own: what Ray's actor does, and what it tells of itself."""

from __future__ import annotations

import os
import random
import socket
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any

import triptych
from triptych.errors import Cancelled, ReplicaRefusedError, to_text
from triptych.roles import RoleType

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


_UNWANTED = 256
"""Tickets that were taken back before they came, of which a replica remembers the newest."""


class ReplicaActor:
    """Holds a model for some roles, and runs segments of states that come and go as bytes in the wire form.

    Args:
        source, roles, options: what `triptych.load` is to load.
        faults: for tests of recovery; see `RayEngine`.
        expected: version and fingerprint that this replica must have; None for any.
        threads: CPU threads of each lane; None for PyTorch's default.
    """

    def __init__(
        self,
        name: str,
        source: str,
        roles: str,
        options: dict[str, Any],
        *,
        expected: dict[str, str] | None = None,
        threads: int | None = None,
        budget: int | None = None,
        prompt_cache: int = 0,
        slots: dict[str, int] | None = None,
        faults: dict[str, float] | None = None,
    ) -> None:
        if threads is not None:
            os.environ["OMP_NUM_THREADS"] = str(threads)  # read once, when torch is imported
        import torch

        from triptych.engine.local import LanesReplica
        from triptych.engine.ranks import with_ranks
        from triptych.runtime.model import load

        if threads is not None:
            torch.set_num_threads(threads)
        ranks, options = with_ranks(source, roles, options, threads)
        model = load(source, role=roles, **options)
        mine = {"version": triptych.__version__, "fingerprint": model.fingerprint, **model.accelerated.identity}
        if expected is not None and mine != expected:
            raise ReplicaRefusedError(difference(mine, expected))
        if ranks is not None:
            ranks.attach(model)
            budget = 0 if ranks.apart else budget
        shares = None if threads is None else {role: threads for role in model.roles}
        given = {RoleType(role): count for role, count in (slots or {}).items()}
        self._replica = LanesReplica(name, model, threads=shares, budget=budget, prompt_cache=prompt_cache, slots=given)
        self._identity = mine
        self._faults = faults or {}
        self._hops = {"count": 0, "bytes": 0, "seconds": 0.0}
        self._works: dict[str, Any] = {}
        self._progress: dict[str, tuple[str, int, int]] = {}
        self._previews: dict[str, list[tuple[int, int, bytes]]] = {}
        self._unwanted: deque[str] = deque(maxlen=_UNWANTED)

    def describe(self) -> dict[str, Any]:
        """Return who and where it is, as plain values."""
        import ray

        return {
            **self._replica.describe(),
            **self._identity,
            "hops": dict(self._hops),
            "pid": os.getpid(),
            "node": ray.get_runtime_context().get_node_id(),
            "host": socket.gethostname(),
        }

    def run(
        self,
        ticket: str,
        data: npt.NDArray[np.uint8],
        seconds_left: float | None,
        previews: tuple[int, npt.NDArray[np.float32]] | None = None,
    ) -> tuple[dict[str, Any], npt.NDArray[np.uint8]]:
        """Run the next segment of the state in `data`.

        Args:
            previews: how many are wanted, and the projection to make them with.

        Returns what became of it, and the state after it in its wire form (empty where it failed): two Ray objects, so
        that the router reads the first and passes the second on without reading it.
        """
        import numpy as np

        from triptych.state import State

        outcome: dict[str, Any] = {}
        after = np.empty(0, np.uint8)
        try:
            if ticket in self._unwanted or not len(data):  # nothing: what it was to come from failed
                raise Cancelled("the segment was taken back before it began")
            began = time.perf_counter()
            state = State.from_bytes(data.data)
            self._hop(len(data), time.perf_counter() - began)
            self._replica.model.check_turn(state)
            finished, seconds = self._compute(ticket, state, seconds_left, previews)
            began = time.perf_counter()
            after = np.frombuffer(finished.to_bytes(), np.uint8)
            self._hop(len(after), time.perf_counter() - began)
            if random.random() < self._faults.get("corrupt", 0):
                after[random.randrange(len(after))] ^= 1
            turns = [role.value for role in finished.route[finished.position :]]
            outcome = {"turns": turns, "seconds": seconds}
        except Exception as error:  # noqa: BLE001 (told to the router, which knows whose fault it is)
            outcome = {"error": to_text(error)}
        finally:
            self._works.pop(ticket, None)
            self._progress.pop(ticket, None)
            if ticket in self._previews:
                outcome["previews"] = self._previews.pop(ticket)
        return outcome, after

    def _compute(
        self, ticket: str, state: Any, seconds_left: float | None, previews: tuple[int, Any] | None
    ) -> tuple[Any, float]:
        import torch

        from triptych.runtime.lanes import Work
        from triptych.runtime.preview import Previews, Projection
        from triptych.runtime.step_lane import StepLane

        ended = threading.Event()
        outcomes: list[Any] = []

        def done(outcome: Any) -> None:
            outcomes.append(outcome)
            ended.set()

        def report(stage: str, step: int, steps: int) -> None:
            self._progress[ticket] = stage, step, steps

        deadline = None if seconds_left is None else time.monotonic() + seconds_left
        wanted = None
        if previews is not None:
            made = self._previews[ticket] = []
            projection = Projection(torch.tensor(previews[1]))
            wanted = Previews(previews[0], projection, lambda *preview: made.append(preview))
        work = Work(state, done, report, deadline, wanted)
        self._works[ticket] = work
        lane = self._replica.lanes[state.next_role]
        if isinstance(lane, StepLane):
            lane.put(work)
            ended.wait()
        else:
            lane.run_here(work)
        if isinstance(outcomes[0], Exception):
            raise outcomes[0]
        return outcomes[0], work.seconds

    def _hop(self, nbytes: int, seconds: float) -> None:
        """Count a state that came or went."""
        for name, value in (("count", 1), ("bytes", nbytes), ("seconds", seconds)):
            self._hops[name] += value

    def cancel(self, ticket: str) -> None:
        """Stop a ticket before its next step, or before it begins."""
        if (work := self._works.get(ticket)) is not None:
            work.cancel()
        else:
            self._unwanted.append(ticket)

    def busy(self) -> int:
        """Return how many segments it has."""
        return len(self._works)

    def beat(self) -> dict[str, Any]:
        """Show that it is alive, and how far its tickets are."""
        previews = {ticket: list(made) for ticket, made in list(self._previews.items()) if made}
        return {
            "progress": dict(self._progress),
            "previews": previews,
            "replica": {**self._replica.describe(), "hops": dict(self._hops), "busy": self.busy()},
        }

    def projection(self, timeout: float) -> npt.NDArray[np.float32] | None:
        """Return the matrix that previews are made with, if its decoder can tell within `timeout` seconds."""
        found = self._replica.projection(timeout)
        return None if found is None else found.weight.numpy()


def difference(mine: dict[str, str], expected: dict[str, str]) -> str:
    """Say in what a replica differs from the service it wants to join."""
    parts = [
        f"its {name} is {mine.get(name, 'none')!r}, the service's {expected.get(name, 'none')!r}"
        for name in {**expected, **mine}
        if mine.get(name) != expected.get(name)
    ]
    return f"this replica cannot join: {'; '.join(parts)}"
