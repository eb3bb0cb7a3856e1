"""A replica on Ray as a router sees it."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayTaskError

from triptych.engine.inbox import Order, begin_sending
from triptych.engine.local import SLOTS
from triptych.engine.ray_actor import LOOK
from triptych.engine.ray_register import NAMESPACE
from triptych.engine.replica import Replica, Ticket
from triptych.engine.router import Router
from triptych.roles import RoleType, parse_roles

log = logging.getLogger(__name__)

SILENCE = 3.0
"""Seconds without a sign of life after which a replica is taken to hang, and is killed."""
SILENCE_LOADING = 60.0
"""The same while it loads, when a single library or file can keep its process from answering."""
GIVE_UP = 3
"""Processes that may die while they load, where none has loaded before: such a model would never be ready."""
LATE = 5.0
"""Seconds after which a ticket that was given straight is asked for through Ray, too: its state, or its answer, may be lost."""
_QUIET = 3
"""Signs of life without work after which a draining replica is done: by then every router knows that it is draining."""


class RayReplica(Replica):
    """An actor as the router sees it.

    Attributes:
        actor: Ray's handle.
        state: `starting` until it has loaded, `ready`, or `closed`.
        told: what it last told of itself.
        joined: whether a process of its own added it, and ends it when it is drained.
    """

    def __init__(
        self,
        name: str,
        pool: str,
        actor: Any,
        reply: str | None,
        later: Callable[..., None],
        *,
        joined: bool = False,
    ) -> None:
        super().__init__(name, parse_roles(pool), dict(SLOTS))
        self.pool = pool
        self.joined = joined
        self.actor = actor
        self.state = "starting"
        self.told: dict[str, Any] = {}
        self.asked: float | None = None  # when it was asked for a sign of life that has not been heard yet
        self._come: float | None = None  # when it was asked for the last one that came, whether heard or not
        self.busy = time.monotonic()  # when it last had work
        self.failure: BaseException | None = None  # why it will never be ready, where that is known here
        self.failed: float | None = None  # since when it is known that it will never be
        self.losses = 0  # times it died or hung
        self._loading = False  # whether the process that it has now has given a sign of life, but has not loaded
        self._left: list[str] = []  # tickets that it had when it was taken to be lost
        self._quiet = 0  # signs of life since it was to be given nothing more, in which it had nothing
        self._reply = reply  # where this router hears what is told straight
        self._later = later
        self._asking = threading.Lock()

    def start(self, ticket: Ticket, payload: Any) -> None:
        if ticket.asked:  # it waits there already
            self._when_there(self.actor.hand.remote(self._order(ticket), payload).future(), "handed", ticket)
        elif not (self._hears and (payload is None or self._give(ticket, payload))):
            self.ask_for(ticket, payload)

    def _give(self, ticket: Ticket, payload: Any) -> bool:
        """Give the process a ticket and its state straight; returns False where that cannot be."""
        if not isinstance(payload, np.ndarray):
            return False
        sent = begin_sending(self._order(ticket), payload.data, 0)
        if sent is not None:
            sent.close()  # whether it was taken shows: it is asked for if nothing comes
        return sent is not None

    def ask_for(self, ticket: Ticket, payload: Any = None) -> None:
        """Ask through Ray, once, what becomes of a ticket, and bring its state if it should not have that yet."""
        with self._asking:  # who asks again is told that there is no such ticket
            if ticket.asked:
                return
            ticket.asked = True
        try:
            order = Order(ticket.name) if payload is None else self._order(ticket)  # else its state brings the order
            outcome, data = self.actor.run.options(num_returns=2).remote(order, payload)
        except BaseException:
            ticket.asked = False
            raise
        self._when_there(outcome.future(), "finished", ticket, data)

    @property
    def _hears(self) -> bool:
        """Whether what it tells comes straight to this router, and the other way round."""
        return self._is_here and self._reply is not None and self.told.get("inbox") is not None

    def _order(self, ticket: Ticket) -> Order:
        """Return what this process is to do for a ticket, and what those after it that it can reach."""
        job, then, previews = ticket.job, None, None
        ahead = ticket.ahead  # read once: it may be taken back meanwhile
        if ahead is not None and isinstance(ahead.replica, RayReplica) and ahead.replica.node == self.node:
            then = ahead.replica._order(ahead)
        left = None if job.deadline is None else job.deadline - time.monotonic()
        if job.previews is not None and ticket.role is RoleType.DENOISER:
            count, projection = job.previews
            previews = count, projection.weight.tolist()
        return Order(ticket.name, left, previews, self.told.get("inbox"), then, self._reply if self._hears else None)

    def cancel(self, ticket: Ticket) -> None:
        self.actor.cancel.remote(ticket.name)
        if ticket in self.tickets:  # one that has not begun there tells nothing of itself
            self.ask_for(ticket)

    def ask(self) -> None:
        """Ask for a sign of life, say which tickets are still wanted, and ask for those that may be lost."""
        self.asked = asked = time.monotonic()

        def take_note(_: Future[Any]) -> None:
            self._come = asked  # at once: who hears it may be busy, which is no fault of the replica's

        beat = self.actor.beat.remote({ticket.name: ticket.previews for ticket in self.tickets}, LOOK).future()
        beat.add_done_callback(take_note)
        self._when_there(beat, "told", asked)
        for ticket in list(self.tickets):
            if ticket.after is None and asked - ticket.since > LATE:
                self.ask_for(ticket, ticket.handover.payload)

    def hear(self, router: Router, future: Future[Any], asked: float) -> None:
        """Take note of the sign of life that was asked for then, or of Ray's error in its place."""
        if asked != self.asked:
            return  # an answer of the process that has died since, or of its death
        try:
            self._hear(router, future)
        finally:  # only now: what is asked next says how many previews have come
            if self.asked == asked:
                self.asked = None

    def _hear(self, router: Router, future: Future[Any]) -> None:
        error = future.exception()
        if error is not None:
            self._hear_error(router, error)
            return
        beat = future.result()
        if beat["replica"] is None:
            if self._loading and self.told["pid"] != beat["process"]["pid"]:
                self._lose_loading()
            self.told.update(beat["process"])
            self._loading = True
            return
        self._note(beat)
        if self.state == "starting" and self.asked is not None:  # else it was lost meanwhile
            self._let_in(router)

    def _hear_error(self, router: Router, error: BaseException) -> None:
        if self.state == "ready":
            self.lose(router, f"{self.name} died ({type(error).__name__})")
        elif self.state == "starting" and (isinstance(error, RayTaskError) or "creation task" in str(error)):
            self._give_up(getattr(error, "cause", error))
        elif self._loading:
            self._lose_loading()
        elif self.state == "starting":
            try:
                ray.get_actor(self.name, namespace=NAMESPACE)
            except ValueError:  # Ray starts it no more: another router has given it up, or the keeper has ended it
                self.failed = time.monotonic()

    def _lose_loading(self) -> None:
        """Take note that its process died before it had loaded; Ray starts another one."""
        self._loading = False
        self.losses += 1
        log.warning("%s died or hung while it loaded, and is started anew", self.name)
        if self.losses >= GIVE_UP and "loaded_bytes" not in self.told:
            problem = f"{self.losses} processes died or hung while they loaded: is there memory enough for it?"
            self._give_up(RuntimeError(problem))

    def _give_up(self, error: BaseException) -> None:
        """Take note that it will never be ready; whoever keeps the pools replaces it."""
        self.failure, self.failed = error, time.monotonic()
        log.error("replica %s cannot start: %s", self.name, error)
        ray.kill(self.actor, no_restart=True)

    def _note(self, beat: dict[str, Any]) -> None:
        """Take note of how far its tickets are, and how many it takes at a time."""
        self.told.update(beat["replica"])
        self.slots.update({RoleType(role): many for role, many in beat["replica"]["slots"].items()})
        if beat["replica"]["busy"]:  # with work of any router
            self.busy = time.monotonic()
        self._quiet = self._quiet + 1 if self.draining and not beat["replica"]["busy"] else 0
        for ticket in [each for each in self.tickets if each.after is None]:
            step = beat["progress"].get(ticket.name)
            if step is not None and ticket.progress != step[1] / step[2]:
                ticket.report(*step)
            for preview in beat["previews"].get(ticket.name, ()):
                ticket.show(*preview)

    def _let_in(self, router: Router) -> None:
        """Give it its share of the work, now that it has loaded."""
        self.state, self._loading = "ready", False
        log.info("replica %s is ready: %.1f MB on %s", self.name, self.told["loaded_bytes"] / 1e6, self.told["device"])
        if self.told["niceness"] > 0:
            log.warning(
                "replica %s gets only what the rest of its machine leaves it (niceness %d): start Ray there with "
                "RAY_worker_niceness=0",
                self.name,
                self.told["niceness"],
            )
        # Ray may have told of a death where only the network failed: then it computes them still.
        for ticket in self._left:
            self.actor.cancel.remote(ticket)
        self._left = []
        router.add(self)
        if self.state != "ready":  # it was lost meanwhile, in another thread
            router.remove(self, f"{self.name} died")

    @property
    def silent(self) -> float:
        """Seconds since it was asked for a sign of life that has not come yet."""
        asked = self.asked  # read once: the answer may come meanwhile, in another thread
        return 0.0 if asked is None or asked == self._come else time.monotonic() - asked

    def hangs(self) -> bool:
        """Return whether its process has given no sign of life for too long."""
        if self.state == "ready":
            return self.silent > SILENCE
        return self._loading and (self.silent > SILENCE_LOADING or (self.silent > SILENCE and self._is_stopped()))

    @property
    def drained(self) -> bool:
        """Whether it was to be given nothing more, and has nothing left, of this router or of another."""
        return self.draining and not self.tickets and (self.state != "ready" or self._quiet >= _QUIET)

    def kill(self) -> None:
        """End the process at once, even one that is stopped; Ray starts it anew."""
        if self._is_here:
            with suppress(ProcessLookupError):
                os.kill(self.told["pid"], signal.SIGKILL)
        else:
            ray.kill(self.actor, no_restart=False)

    def is_gone(self) -> bool:
        """Return whether its process has ended, where that can be seen from here: sooner than Ray tells."""
        if self._is_here:
            try:
                os.kill(self.told["pid"], 0)
            except ProcessLookupError:
                return True
        return False

    def _is_stopped(self) -> bool:
        """Return whether somebody has stopped its process, where that can be seen from here."""
        if not self._is_here:
            return False
        try:
            told = Path(f"/proc/{self.told['pid']}/stat").read_text()
        except OSError:  # it is gone
            return False
        return told.rpartition(")")[2].split()[0] == "T"  # after its name, which may hold anything

    @cached_property
    def _home(self) -> str:
        """Ray's name of this router's machine."""
        mine: str = ray.get_runtime_context().get_node_id()
        return mine

    @property
    def _is_here(self) -> bool:
        return self.node == self._home and self.told.get("user") == os.getuid()

    @property
    def node(self) -> str | None:
        """Ray's name of the machine it is on."""
        return self.told.get("node")

    def lose(self, router: Router, reason: str) -> None:
        """Take note that the process has died or was killed; its tickets go elsewhere, and Ray starts it anew."""
        if self._loading:
            self.asked = None
            self._lose_loading()
        elif self.state != "closed":
            self.state, self.asked = "starting", None
            self.losses += 1
            self._left = [ticket.name for ticket in self.tickets]
            log.warning("%s; its requests go elsewhere, and it is started anew", reason)
            router.remove(self, reason)

    def close(self) -> None:
        self.state = "closed"
        ray.kill(self.actor, no_restart=True)

    def describe(self) -> dict[str, Any]:
        told = {name: value for name, value in self.told.items() if name not in ("inbox", "user")}
        return {**told, **super().describe(), "state": self.state}

    def _when_there(self, future: Future[Any], what: str, *details: Any) -> None:
        # In a thread of Ray's, which must not wait.
        future.add_done_callback(lambda there: self._later(what, self, there, *details))
