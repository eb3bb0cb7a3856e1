"""A replica in a process of its own: what Ray's actor does, and what it tells of itself."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from functools import cached_property, partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import ray

import triptych
from triptych.errors import ReplicaRefusedError, from_text, to_text
from triptych.roles import RoleType
from triptych.runtime import memory
from triptych.runtime.collection import collection_paused

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from triptych.engine.attempt import Attempt
    from triptych.engine.direct import Placed
    from triptych.engine.inbox import Order
    from triptych.engine.local import LanesReplica

log = logging.getLogger(__name__)


LOOK = 1.5
"""Seconds that a sign of life may wait for the end of loading, so that it tells of that at once."""


class ReplicaActor:
    """Holds a model for some roles, and runs segments of states that come and go as bytes in the wire form.

    Args:
        source, roles, options: what `triptych.load` is to load.
        faults: for tests of recovery; see `RayEngine`.
        expected: version, fingerprint and the like that this replica must have, and the service's `transport`; None for
            any.
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
        from triptych.engine.attempt import Attempts
        from triptych.engine.couriers import Couriers
        from triptych.engine.inbox import Inbox, Order

        if threads is not None:
            os.environ["OMP_NUM_THREADS"] = str(threads)  # read once, when torch is imported
        self._nixl = (expected or {}).get("transport") == "nixl"
        self._attempts = Attempts()
        self._couriers = Couriers(self._attempts, nixl=self._nixl, faults=faults or {}, on_error=self._end_if_broken)
        self._inbox = Inbox(Order, self._receive)
        self._identity: dict[str, str] = {}
        self._loaded: Future[LanesReplica] = Future()

        def load() -> None:
            try:
                replica = self._load(
                    name,
                    source,
                    roles,
                    options,
                    expected,
                    threads=threads,
                    budget=budget,
                    prompt_cache=prompt_cache,
                    slots=slots,
                )
            except Exception as error:
                log.exception("%s could not be loaded", name)
                refused = isinstance(error, ReplicaRefusedError)
                # As it is told between processes: many errors, of ours and of libraries, cannot be unpickled.
                self._loaded.set_exception(error if refused else from_text(*to_text(error)))
            else:
                self._loaded.set_result(replica)
                memory.gather()

        # In a thread of its own, so that this process can tell meanwhile that it is alive.
        threading.Thread(target=load, name="loading", daemon=True).start()

    @collection_paused()
    def _load(
        self,
        name: str,
        source: str,
        roles: str,
        options: dict[str, Any],
        expected: dict[str, str] | None,
        *,
        threads: int | None,
        budget: int | None,
        prompt_cache: int,
        slots: dict[str, int] | None,
    ) -> LanesReplica:
        """Load the model, and open its lanes."""
        import torch

        from triptych.engine.direct import check_nixl
        from triptych.engine.local import LanesReplica
        from triptych.engine.ranks import with_ranks
        from triptych.runtime.model import load

        if threads is not None:
            torch.set_num_threads(threads)
        ranks, options = with_ranks(source, roles, options, threads)
        model = load(source, role=roles, **options)
        self._identity = {
            "version": triptych.__version__,
            "transport": "nixl" if self._nixl else "host",
            **model.identity,
        }
        if expected is not None and self._identity != expected:
            raise ReplicaRefusedError(f"this replica cannot join: {difference(self._identity, expected)}")
        if self._nixl:
            check_nixl()
        if ranks is not None:
            ranks.attach(model)
            budget = 0 if ranks.apart else budget
        shares = {role: torch.get_num_threads() for role in model.roles}  # this thread's: see `couriers.copy_alone`
        given = {RoleType(role): count for role, count in (slots or {}).items()}
        return LanesReplica(name, model, threads=shares, budget=budget, prompt_cache=prompt_cache, slots=given)

    @property
    def _replica(self) -> LanesReplica:
        return self._loaded.result()

    @ray.method(concurrency_group="signs")
    def describe(self) -> dict[str, Any]:
        """Return who and where it is, as plain values, once it has loaded.

        Raises:
            Exception: what loading failed with.
        """
        return {**self._replica.describe(), **self._identity, **self._process, "hops": dict(self._couriers.hops)}

    @cached_property
    def _process(self) -> dict[str, Any]:
        return {
            "pid": os.getpid(),
            "niceness": os.getpriority(os.PRIO_PROCESS, 0),
            "node": ray.get_runtime_context().get_node_id(),
            "host": socket.gethostname(),
            "user": os.getuid(),
            "inbox": self._inbox.address,
        }

    def run(
        self, order: Order, data: npt.NDArray[np.uint8] | Placed | None
    ) -> tuple[dict[str, Any], npt.NDArray[np.uint8] | Placed]:
        """Run the next segment of the state in `data`, unless that was begun; None to wait until the state comes.

        Returns what became of it, and the state after it in its wire form (empty where it failed), or where it lies: two
        Ray objects, so that the router reads the first and passes the second on without reading it.
        """
        attempt = self._attempts.open(order.ticket)
        attempt.asked = True
        try:
            if data is not None and attempt.begin(order):
                self._begin(attempt, data)
            return attempt.wait()
        finally:
            self._attempts.close(order.ticket)

    @ray.method(concurrency_group="states")
    def hand(self, order: Order, data: npt.NDArray[np.uint8] | Placed) -> None:
        """Give a ticket that waits for its state what could not come straight from another process."""
        attempt = self._attempts.open(order.ticket)
        if attempt.begin(order):
            self._begin(attempt, data)

    def _receive(self, order: Order, data: memoryview) -> Callable[[], None] | None:
        """Take a state that comes straight from another process."""
        attempt = self._attempts.open(order.ticket)
        return partial(self._begin, attempt, data) if attempt.begin(order) else None

    def _begin(self, attempt: Attempt, data: memoryview | npt.NDArray[np.uint8] | Placed) -> None:
        """Begin the segment of a state that has come."""
        try:
            state = self._couriers.read(data)
            self._replica.model.check_turn(state)
            assert state.next_role is not None
            lane = self._replica.lanes[state.next_role]
            attempt.compute(state, lane, partial(self._couriers.hand_on, attempt, lane.model.device))
        except Exception as error:  # noqa: BLE001 (told to the router, which knows whose fault it is)
            self._couriers.fail(attempt, error)

    def _end_if_broken(self, error: Exception) -> None:
        """End this process where its device has failed it: nothing works there any more, and Ray starts another one.

        Its requests go elsewhere as those of any process that dies.
        """
        from triptych.runtime.streams import is_broken

        loaded = self._loaded.done() and self._loaded.exception() is None
        if loaded and is_broken(error, self._replica.model.device):
            log.critical("this replica ends, because its device has failed: %s", error)
            os._exit(1)

    @ray.method(concurrency_group="signs")
    def cancel(self, ticket: str) -> None:
        """Stop a ticket before its next step, or before it begins."""
        self._attempts.cancel(ticket)

    @ray.method(concurrency_group="signs")
    def busy(self) -> int:
        """Return how many segments it has, or waits for."""
        return sum(not each.ended.done() for _, each in self._attempts.all())

    @ray.method(concurrency_group="signs")
    def beat(self, wanted: Mapping[str, int] = MappingProxyType({}), look: float = LOOK) -> dict[str, Any]:
        """Show that it is alive, and how far the wanted tickets are; `replica` is None while it loads.

        Args:
            wanted: the tickets of whoever asks, and how many previews of each have come there.
            look: seconds to wait for the end of loading.

        Raises:
            Exception: what loading failed with.
        """
        self._attempts.want(wanted)
        wait([self._loaded], look)
        loaded = self._loaded.done()
        attempts = [(ticket, each) for ticket, each in self._attempts.all() if ticket in wanted]
        return {
            "progress": {ticket: each.progress for ticket, each in attempts if each.progress is not None},
            "previews": {ticket: each.previews[wanted[ticket] :] for ticket, each in attempts},
            "process": self._process,
            "replica": {**self.describe(), "busy": self.busy()} if loaded else None,  # type: ignore[operator]
        }

    def projection(self, timeout: float) -> npt.NDArray[np.float32] | None:
        """Return the matrix that previews are made with, if its decoder can tell within `timeout` seconds."""
        found = self._replica.projection(timeout)
        return None if found is None else found.weight.numpy()


def difference(mine: dict[str, str], expected: dict[str, str]) -> str:
    """Say in what a replica or a router differs from the service it wants to join."""
    parts = [
        f"its {name} is {mine.get(name, 'none')!r}, the service's {expected.get(name, 'none')!r}"
        for name in {**expected, **mine}
        if mine.get(name) != expected.get(name)
    ]
    return "; ".join(parts)
