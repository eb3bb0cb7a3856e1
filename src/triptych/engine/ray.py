"""The engine over Ray: each replica a process, on this machine or on others."""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import torch
from ray.exceptions import ObjectLostError, OwnerDiedError, RayActorError, RayError

import triptych
from triptych.components.acceleration import parse_acceleration
from triptych.components.dtypes import parse_dtype
from triptych.engine.base import Engine
from triptych.engine.choice import Policy
from triptych.engine.inbox import MODEST, Answer, Inbox
from triptych.engine.job import ENDED
from triptych.engine.local import PROMPT_CACHE
from triptych.engine.pools import Pool, parse_pools
from triptych.engine.ranks import check_place, check_room, ranks_of
from triptych.engine.ray_cluster import connect
from triptych.engine.ray_pools import PoolKeeper
from triptych.engine.ray_replica import RayReplica
from triptych.engine.replica import Handover, Ticket
from triptych.engine.router import Router
from triptych.errors import (
    ModelError,
    RemoteError,
    ReplicaLost,
    ReplicaRefusedError,
    UsageError,
    WireError,
    from_text,
)
from triptych.pipelines.registry import find_family
from triptych.roles import WORKERS, RoleType, parse_roles
from triptych.runtime.model import Model, identity_of
from triptych.runtime.preview import Projection
from triptych.state import State

if TYPE_CHECKING:
    from triptych.components.acceleration import AccelerationSpec
    from triptych.components.dtypes import DtypeSpec

log = logging.getLogger(__name__)

TRANSPORTS = ("host", "nixl")
PULSE = 0.5
"""Seconds between two looks at every replica."""
FETCHERS = 8
"""Results that may be fetched at a time, of those that do not come straight."""


class RayEngine(Engine):
    """Pools of replicas on a Ray cluster. States go from replica to replica; this process sees only their references.

    Args:
        source: a folder in diffusers' layout, which every machine has under the same path, or a hub id.
        pools: as in `encoder=1,denoiser=1..4,decoder=1`; None to start no replica and use those that are there.
        address: of a Ray cluster; None to start one on this machine, which ends with the engine.
        connecting: what `begin_connecting` returned, where it was called before.
        threads: CPU threads of each replica; by default the machine's, divided among the replicas.
        gpus: to reserve for each replica, by role; by default one, or one for each of its ranks, where the cluster has
            any.
        transport: how states that are too large to be sent at once go from replica to replica: through the `host`'s memory
            and Ray's object store, or from card to card by `nixl`, which every machine needs then.
        faults: for tests of recovery: `corrupt`, the share of hand-overs in which a bit is flipped.

    The others are `LocalEngine`'s.
    """

    def __init__(
        self,
        source: str | Path,
        *,
        pools: str | None = "encoder=1,denoiser=1,decoder=1",
        address: str | None = None,
        connecting: Future[bool] | None = None,
        dtype: DtypeSpec = "auto",
        tasks: str | Iterable[str] | None = None,
        revision: str | None = None,
        variant: str | None = None,
        acceleration: AccelerationSpec = None,
        threads: int | None = None,
        gpus: dict[RoleType, float] | None = None,
        transport: str = "host",
        policy: Policy = "predicted",
        max_waiting: int = 256,
        prompt_cache: int = PROMPT_CACHE,
        batching: bool = True,
        warm_up: bool = True,
        faults: dict[str, float] | None = None,
    ) -> None:
        wanted = [] if pools is None else parse_pools(pools)
        options: dict[str, Any] = {"dtype": dtype, "tasks": tasks, "revision": revision, "variant": variant}
        options["acceleration"] = parse_acceleration(acceleration)
        self.router = Router(lambda handover: handover.payload.result, policy=policy, max_waiting=max_waiting)
        family = find_family(source, revision=revision, variant=variant)
        chosen = family.select_tasks(tasks)
        _check_pools(wanted, {stage.role for _, stage in family.stages_of(WORKERS, chosen)})
        if transport not in TRANSPORTS:
            raise UsageError(f"transport={transport!r}: {' or '.join(TRANSPORTS)} is accepted")
        dtypes = parse_dtype(dtype, family.repository)
        identity = {
            "version": triptych.__version__,
            "transport": transport,
            **identity_of(family.repository, dtypes, chosen, options["acceleration"]),
        }
        everywhere = sum(pool.most * ranks_of(pool.roles, options["acceleration"]) for pool in wanted)
        arguments = {
            "source": str(source),
            "options": options,
            "threads": threads or max(1, (os.cpu_count() or 1) // max(1, everywhere)),
            "expected": identity,
            "budget": None if batching else 0,
            "prompt_cache": prompt_cache,
            "faults": faults,
        }

        def prove() -> Model:
            family.check()
            return Model(family, frozenset(), torch.device("cpu"), dtype, chosen, options["acceleration"])

        # To prove the graph takes seconds of importing. The replicas begin with theirs meanwhile, and prove it as this does;
        # but an acceleration may be impossible, and nothing is to be started for one that is.
        front = prove() if options["acceleration"] else None
        started = connect(address) if connecting is None else connecting.result()
        with ExitStack() as undo:
            if started:
                undo.callback(ray.shutdown)
            self._watch()
            undo.callback(self._closed.set)
            if any(RoleType.DENOISER in pool.roles for pool in wanted):
                check_place(family, chosen, gpus or {}, options["acceleration"])
            check_room(wanted, gpus or {}, options["acceleration"], growing=not started)
            self._start(undo, wanted, gpus or {}, identity, arguments)
            self.front = front or prove()
            self._wait_until_ready()
            if warm_up:
                self.warm_up()
            self._undo = undo.pop_all()

    def _start(
        self,
        undo: ExitStack,
        pools: list[Pool],
        gpus: dict[RoleType, float],
        identity: dict[str, str],
        arguments: dict[str, Any],
    ) -> None:
        """Take part in the service: start the replicas that it lacks, and hear what becomes of them."""
        self._happened: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self._inbox = Inbox(Answer, self._receive)
        undo.callback(self._inbox.close)
        self._keeper = PoolKeeper(
            self.router, identity, self._inbox.address, lambda *happened: self._happened.put(happened)
        )
        undo.callback(self._keeper.leave)
        self._keeper.declare(pools, gpus, **arguments)
        self._keeper.pulse()
        self._fetchers = ThreadPoolExecutor(FETCHERS, "fetcher")
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._handle, self._pulse)]
        undo.callback(self._stop)
        for thread in self._threads:
            thread.start()

    def _stop(self) -> None:
        """End this engine's threads."""
        self._closed.set()
        self._fetchers.shutdown(wait=False, cancel_futures=True)
        self._happened.put(())
        for thread in self._threads:
            if thread.is_alive():
                thread.join()

    def hand_in(self, state: State) -> Handover:
        data = np.frombuffer(state.to_bytes(), np.uint8)
        then = state.route[state.position + 1 :]
        return Handover(state.next_role, data if data.nbytes <= MODEST else ray.put(data), then=then)

    def find_projection(self, timeout: float) -> Projection | None:
        decoders = [each for each in self.replicas if RoleType.DECODER in each.roles and each.state == "ready"]
        for replica in decoders:
            weight = ray.get(replica.actor.projection.remote(timeout), timeout=timeout + 2)
            if weight is not None:
                return Projection(torch.tensor(weight))
        return None

    def served(self) -> set[RoleType]:
        """Return the roles that have a replica, or a pool that has none until there is work."""
        asleep = [name for name, pool in self._keeper.pools.items() if pool["target"] == 0 < pool["most"]]
        return super().served().union(*(parse_roles(name) for name in asleep))

    @property
    def replicas(self) -> list[RayReplica]:
        """All replicas that are known, whether ready or not."""
        return list(self._keeper.replicas.values())

    def objects(self) -> int:
        """Return how many objects this process refers to in Ray's store, or holds for others."""
        worker: Any = ray._private.worker.global_worker
        return len(worker.core_worker.get_all_reference_counts())

    def scale(self, pool: str, replicas: int) -> None:
        """Set how many replicas a pool has; those that are too many finish what they have.

        Raises:
            UsageError: there is no such pool, or the number is negative.
        """
        if pool not in self._keeper.pools:
            raise UsageError(f"pool={pool!r}: there are {', '.join(self._keeper.pools)}")
        if replicas < 0:
            raise UsageError(f"replicas={replicas}: 0 or more is accepted")
        self._keeper.scale(pool, replicas)

    def drain(self, name: str) -> None:
        """Give a replica nothing more, and end it when it has finished what it has; its pool shrinks by it.

        Raises:
            UsageError: there is none of that name.
        """
        if name not in self._keeper.replicas:
            raise UsageError(f"replica={name!r}: there are {', '.join(self._keeper.replicas)}")
        self._keeper.drain(name)

    def close(self, timeout: float | None = None) -> None:
        self._drain(timeout)
        self._undo.close()

    def _wait_until_ready(self) -> None:
        while not self.ready():
            self.check_replicas()
            time.sleep(0.02)

    def check_replicas(self) -> None:
        failed = next((each for each in self.replicas if each.failure is not None), None)
        if failed is not None:
            raise ModelError(f"replica {failed.name} could not start: {failed.failure}")

    def _receive(self, answer: Answer, data: memoryview) -> Callable[[], None]:
        """Take what a replica tells straight. Of a ticket that was given up it is nothing, and yet taken: it is told."""
        ticket = self.router.find(answer.ticket)
        if ticket is None:
            return lambda: None
        if answer.turns is None:
            return partial(self._ask_for, ticket)
        ticket.answered = True  # before the replica knows that, and forgets the ticket
        return partial(self._take, ticket, answer, data)

    def _ask_for(self, ticket: Ticket) -> None:
        if isinstance(ticket.replica, RayReplica):
            ticket.replica.ask_for(ticket)

    def _take(self, ticket: Ticket, answer: Answer, data: memoryview) -> None:
        """End a ticket with what its replica has told straight."""
        if isinstance(ticket.replica, RayReplica):
            ticket.replica.busy = time.monotonic()
        # A copy: memory that was passed on would hold a descriptor as long as the result lives.
        self._end(ticket, lambda: _handover(answer.turns or (), answer.seconds, np.array(data), handed=answer.handed))

    def _end(self, ticket: Ticket, read: Callable[[], Handover]) -> None:
        """End a ticket with what its replica has left."""
        outcome: Handover | Exception
        try:
            outcome = read()
        except Exception as error:  # noqa: BLE001 (whatever it is, its role makes it once more)
            outcome = ReplicaLost(f"what it left was lost: {error}")
        ticket.done(ticket, outcome)

    # What happened, one after another in a thread of its own.

    def _handle(self) -> None:
        while not self._closed.is_set():
            happened = self._happened.get()
            if not happened:
                return
            what, replica, future, *details = happened
            try:
                if what == "finished":
                    self._finished(replica, future, *details)
                elif what == "handed":
                    self._handed(replica, future, *details)
                else:
                    replica.hear(self.router, future, *details)
            except Exception:  # one replica's answer must not end the thread that hears them all
                log.exception("%s: what it told could not be handled", replica.name)

    def _finished(self, replica: RayReplica, future: Future[Any], ticket: Ticket, data: Any) -> None:
        replica.busy = time.monotonic()
        # Not `result()`: an error raised here would hold this frame, and so the ticket, until it is garbage-collected.
        error = future.exception()
        if ticket.answered or ticket not in replica.tickets:
            return  # told straight, or taken back
        if error is not None:
            self._failed(replica, ticket, error)
            return
        told = future.result()
        for preview in told.get("previews", ()):  # those that no heartbeat has told of
            ticket.show(*preview)
        if told.get("turns") == () and ticket.job.status not in ENDED:
            # It may take long, and others are to be heard.
            self._fetchers.submit(self._end, ticket, lambda: _handover((), told["seconds"], np.array(ray.get(data))))
        else:
            ticket.done(ticket, self._outcome(told, data))

    def _handed(self, replica: RayReplica, future: Future[Any], ticket: Ticket) -> None:
        """End a ticket whose state could not be brought: its replica would wait for it for ever."""
        error = future.exception()
        if error is not None and ticket in replica.tickets:
            replica.cancel(ticket)
            self._failed(replica, ticket, error)

    def _failed(self, replica: RayReplica, ticket: Ticket, error: BaseException) -> None:
        """Take note of Ray's error in place of an answer."""
        if isinstance(error, RayActorError):
            replica.lose(self.router, f"{replica.name} died ({type(error).__name__})")
        elif isinstance(error, (ObjectLostError, OwnerDiedError)):
            ticket.done(ticket, WireError(f"the hand-over was lost: {error}"))
        else:
            ticket.done(ticket, RemoteError(str(error)))

    def _outcome(self, told: dict[str, Any], data: Any) -> Handover | Exception:
        """Return what a replica's answer means."""
        if "error" in told:
            return from_text(*told["error"])
        if not told["turns"]:  # nobody wants it any more
            return Handover(None, None, told["seconds"])
        return _handover(told["turns"], told["seconds"], data, handed=told["handed"])

    def _pulse(self) -> None:
        while not self._closed.wait(PULSE):
            try:
                self._keeper.pulse()
            except RayError as error:
                log.warning("the cluster does not answer: %s", error)
            except ReplicaRefusedError as error:
                log.warning("this router has no part in the cluster's service: %s", error)
            except Exception:  # without this thread nobody would hear whether replicas live
                log.exception("the pools could not be looked after")


def _handover(turns: Iterable[str], seconds: float, data: Any, *, handed: bool = False) -> Handover:
    """Return a request after a segment.

    Args:
        data: its state in the wire form, or a reference to it; the bytes themselves where it is the result.

    Raises:
        WireError: the result is damaged.
    """
    left = tuple(RoleType(role) for role in turns)
    if not left:
        return Handover(None, State.from_bytes(data.data), seconds)
    return Handover(left[0], data, seconds, then=left[1:], handed=handed)


def _check_pools(pools: list[Pool], roles: set[RoleType]) -> None:
    missing = roles - {role for pool in pools for role in pool.roles}
    if pools and missing:
        names = ", ".join(sorted(role.value for role in missing))
        raise UsageError(f"pools: no replica runs the role {names}; add {names}=1")
