"""A replica in a process of its own: what Ray's actor does, and what it tells of itself."""

from __future__ import annotations

import os
import random
import socket
import threading
from typing import TYPE_CHECKING, Any

import triptych
from triptych.errors import ReplicaRefusedError, to_text
from triptych.roles import RoleType

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


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
        import torch

        from triptych.engine.local import LanesReplica
        from triptych.runtime.model import load

        if threads is not None:
            torch.set_num_threads(threads)
        model = load(source, role=roles, **options)
        mine = {"version": triptych.__version__, "fingerprint": model.fingerprint}
        if expected is not None and mine != expected:
            raise ReplicaRefusedError(difference(mine, expected))
        shares = None if threads is None else {role: threads for role in model.roles}
        given = {RoleType(role): count for role, count in (slots or {}).items()}
        self._replica = LanesReplica(name, model, threads=shares, budget=budget, prompt_cache=prompt_cache, slots=given)
        self._identity = mine
        self._faults = faults or {}
        self._works: dict[str, Any] = {}
        self._progress: dict[str, tuple[str, int, int]] = {}

    def describe(self) -> dict[str, Any]:
        """Return who and where it is, as plain values."""
        return {
            **self._replica.describe(),
            **self._identity,
            "pid": os.getpid(),
            "host": socket.gethostname(),
        }

    def run(
        self, ticket: str, data: npt.NDArray[np.uint8], seconds_left: float | None
    ) -> tuple[dict[str, Any], npt.NDArray[np.uint8]]:
        """Run the next segment of the state in `data`.

        Returns what became of it, and the state after it in its wire form (empty where it failed): two Ray objects, so
        that the router reads the first and passes the second on without reading it.
        """
        import numpy as np

        from triptych.state import State

        outcome: dict[str, Any] = {}
        after = np.empty(0, np.uint8)
        try:
            state = State.from_bytes(data.data)
            self._replica.model.check_turn(state)
            finished, seconds = self._compute(ticket, state, seconds_left)
            after = np.frombuffer(finished.to_bytes(), np.uint8)
            if random.random() < self._faults.get("corrupt", 0):
                after[random.randrange(len(after))] ^= 1
            following = None if finished.next_role is None else finished.next_role.value
            outcome = {"next": following, "seconds": seconds}
        except Exception as error:  # noqa: BLE001 (told to the router, which knows whose fault it is)
            outcome = {"error": to_text(error)}
        finally:
            self._works.pop(ticket, None)
            self._progress.pop(ticket, None)
        return outcome, after

    def _compute(self, ticket: str, state: Any, seconds_left: float | None) -> tuple[Any, float]:
        import time

        from triptych.runtime.lanes import Work

        ended = threading.Event()
        outcomes: list[Any] = []

        def done(outcome: Any) -> None:
            outcomes.append(outcome)
            ended.set()

        def report(stage: str, step: int, steps: int) -> None:
            self._progress[ticket] = stage, step, steps

        deadline = None if seconds_left is None else time.monotonic() + seconds_left
        work = Work(state, done, report, deadline)
        self._works[ticket] = work
        self._replica.lanes[state.next_role].put(work)
        ended.wait()
        if isinstance(outcomes[0], Exception):
            raise outcomes[0]
        return outcomes[0], work.seconds

    def cancel(self, ticket: str) -> None:
        """Stop a ticket before its next step."""
        if (work := self._works.get(ticket)) is not None:
            work.cancel()

    def busy(self) -> int:
        """Return how many segments it has."""
        return len(self._works)

    def beat(self) -> dict[str, Any]:
        """Show that it is alive, and how far its tickets are."""
        return {"progress": dict(self._progress), "replica": self._replica.describe()}


def difference(mine: dict[str, str], expected: dict[str, str]) -> str:
    """Say in what a replica differs from the service it wants to join."""
    parts = [
        f"its {name} is {mine[name]!r}, the service's {expected[name]!r}"
        for name in mine
        if mine[name] != expected[name]
    ]
    return f"this replica cannot join: {'; '.join(parts)}"
