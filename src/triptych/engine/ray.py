"""The engine over Ray: each replica a process, on this machine or on others."""

from __future__ import annotations

import logging
import os
import queue
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import torch
from ray.exceptions import ObjectLostError, OwnerDiedError, RayActorError, RayError

import triptych
from triptych.engine.base import Engine
from triptych.engine.local import PROMPT_CACHE, SLOTS
from triptych.engine.pools import Pool, parse_pools
from triptych.engine.ray_cluster import NAMESPACE, connect, open_register, start_replica
from triptych.engine.replica import Handover, Replica, Ticket
from triptych.engine.router import Policy, Router
from triptych.errors import ModelError, RemoteError, ReplicaLost, UsageError, WireError, from_text
from triptych.roles import RoleType, parse_roles
from triptych.runtime.model import load
from triptych.runtime.preview import Projection
from triptych.state import State

if TYPE_CHECKING:
    from triptych.components.dtypes import DtypeSpec

log = logging.getLogger(__name__)

PULSE = 0.5
"""Seconds between two looks at every replica."""
SILENCE = 3.0
"""Seconds without a sign of life after which a replica is taken to hang, and is killed."""
INLINE = 65_536
"""Bytes up to which a state goes along with the call; larger ones lie in the object store."""
SCALE_AFTER = 3.0
"""Seconds of waiting work for each replica of a pool, beyond which it gets another, if it may."""
IDLE = 60.0
"""Seconds without work after which a pool gives a replica back, if it may."""


class RayReplica(Replica):
    """An actor as the router sees it.

    Attributes:
        actor: Ray's handle.
        state: `starting` until it has loaded, `ready`, or `closed`.
        told: what it last told of itself.
    """

    def __init__(self, name: str, pool: str, actor: Any, later: Callable[..., None]) -> None:
        super().__init__(name, parse_roles(pool), dict(SLOTS))
        self.pool = pool
        self.actor = actor
        self.state = "starting"
        self.told: dict[str, Any] = {}
        self.asked: float | None = None  # when it was asked for a sign of life that has not come yet
        self.busy = time.monotonic()  # when it last had work
        self.failure: BaseException | None = None
        self.losses = 0  # times it died or hung
        self._later = later
        self._names: dict[Ticket, str] = {}

    def start(self, ticket: Ticket) -> None:
        self.follow(ticket, ticket.handover.payload)

    def follow(self, ticket: Ticket, promise: Any) -> None:
        name = self._names[ticket] = f"{ticket.job.id}-{secrets.token_hex(4)}"
        left = None if ticket.job.deadline is None else ticket.job.deadline - time.monotonic()
        previews = None
        if ticket.job.previews is not None and ticket.role is RoleType.DENOISER:
            count, projection = ticket.job.previews
            previews = count, projection.weight.numpy()
        outcome, data = self.actor.run.options(num_returns=2).remote(name, promise, left, previews)
        ticket.promise = data
        self._when_there(outcome, "finished", ticket, data)

    def cancel(self, ticket: Ticket) -> None:
        if (name := self._names.get(ticket)) is not None:
            self.actor.cancel.remote(name)

    def ask(self) -> None:
        """Ask for a sign of life; a starting replica answers when it has loaded."""
        self.asked = time.monotonic()
        method = self.actor.describe if self.state == "starting" else self.actor.beat
        self._when_there(method.remote(), "told")

    def hear(self, beat: dict[str, Any]) -> None:
        """Take note of a sign of life: how far its tickets are."""
        self.told.update(beat["replica"])
        for ticket, name in list(self._names.items()):
            step = beat["progress"].get(name)
            if step is not None and ticket.progress != step[1] / step[2]:
                ticket.report(*step)
            for preview in beat["previews"].get(name, ()):
                ticket.show(*preview)

    def forget(self, ticket: Ticket) -> None:
        """Take note that a ticket has been answered."""
        self._names.pop(ticket, None)

    def kill(self) -> None:
        """End the process at once, even one that is stopped; Ray starts it anew."""
        if self.told.get("host") == socket.gethostname():
            try:
                os.kill(self.told["pid"], signal.SIGKILL)
                return
            except ProcessLookupError:
                return
        ray.kill(self.actor, no_restart=False)

    def close(self) -> None:
        self.state = "closed"
        ray.kill(self.actor, no_restart=True)

    def describe(self) -> dict[str, Any]:
        return {**self.told, **super().describe(), "state": self.state}

    def _when_there(self, reference: Any, what: str, *details: Any) -> None:
        def hand_on(future: Future[Any]) -> None:  # in a thread of Ray's, which must not wait
            self._later(what, self, future, *details)

        reference.future().add_done_callback(hand_on)


class RayEngine(Engine):
    """Pools of replicas on a Ray cluster. States go from replica to replica; this process sees only their references.

    Args:
        source: a folder in diffusers' layout, which every machine has under the same path, or a hub id.
        pools: as in `encoder=1,denoiser=1..4,decoder=1`; None to start no replica and use those that are there.
        address: of a Ray cluster; None to start one on this machine, which ends with the engine.
        threads: CPU threads of each replica; by default the machine's, divided among the replicas.
        gpus: to reserve for each replica, by role; by default one where the cluster has any.
        faults: for tests of recovery: `corrupt`, the share of hand-overs in which a bit is flipped.

    The others are `LocalEngine`'s.
    """

    def __init__(
        self,
        source: str | Path,
        *,
        pools: str | None = "encoder=1,denoiser=1,decoder=1",
        address: str | None = None,
        dtype: DtypeSpec = "auto",
        tasks: str | Iterable[str] | None = None,
        revision: str | None = None,
        variant: str | None = None,
        threads: int | None = None,
        gpus: dict[RoleType, float] | None = None,
        policy: Policy = "predicted",
        max_waiting: int = 256,
        prompt_cache: int = PROMPT_CACHE,
        batching: bool = True,
        warm_up: bool = True,
        faults: dict[str, float] | None = None,
    ) -> None:
        self._pools = {pool.name: pool for pool in parse_pools(pools)} if pools else {}
        options: dict[str, Any] = {"dtype": dtype, "tasks": tasks, "revision": revision, "variant": variant}
        self.router = Router(lambda handover: handover.payload.result, policy=policy, max_waiting=max_waiting)
        self.front = load(source, role=RoleType.SERVER, device="cpu", **options)
        self._check_pools()
        self._started_ray = connect(address)
        self._identity = {"version": triptych.__version__, "fingerprint": self.front.fingerprint}
        self._register = open_register(self._identity)
        everywhere = sum(pool.most for pool in self._pools.values())
        self._arguments: dict[str, Any] = {
            "threads": threads or max(1, (os.cpu_count() or 1) // max(1, everywhere)),
            "expected": self._identity,
            "budget": None if batching else 0,
            "prompt_cache": prompt_cache,
            "faults": faults,
        }
        self._gpus, self._source, self._options = gpus or {}, str(source), options
        self._targets = {name: pool.least for name, pool in self._pools.items()}
        self._replicas: dict[str, RayReplica] = {}
        self._happened: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self._watch()
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._handle, self._pulse)]
        self._fill_pools()
        for thread in self._threads:
            thread.start()
        self._wait_until_ready()
        if warm_up:
            self.warm_up()

    def hand_in(self, state: State) -> Handover:
        data = np.frombuffer(state.to_bytes(), np.uint8)
        then = state.route[state.position + 1 :]
        return Handover(state.next_role, data if data.nbytes < INLINE else ray.put(data), then=then)

    def find_projection(self, timeout: float) -> Projection | None:
        decoders = [each for each in self.replicas if RoleType.DECODER in each.roles and each.state == "ready"]
        for replica in decoders:
            weight = ray.get(replica.actor.projection.remote(timeout), timeout=timeout + 2)
            if weight is not None:
                return Projection(torch.tensor(weight))
        return None

    @property
    def replicas(self) -> list[RayReplica]:
        """All replicas that are known, whether ready or not."""
        return list(self._replicas.values())

    def objects(self) -> int:
        """Return how many objects this process refers to in Ray's store, or holds for others."""
        worker: Any = ray._private.worker.global_worker
        return len(worker.core_worker.get_all_reference_counts())

    def scale(self, pool: str, replicas: int) -> None:
        """Set how many replicas a pool has; those that are too many finish what they have.

        Raises:
            UsageError: there is no such pool, or the number is negative.
        """
        if pool not in self._targets:
            raise UsageError(f"pool={pool!r}: there are {', '.join(self._targets)}")
        if replicas < 0:
            raise UsageError(f"replicas={replicas}: 0 or more is accepted")
        self._targets[pool] = replicas
        self._pools[pool] = Pool(self._pools[pool].roles, replicas, replicas)

    def drain(self, name: str) -> None:
        """Give a replica nothing more, and end it when it has finished what it has; its pool shrinks by it.

        Raises:
            UsageError: there is none of that name.
        """
        if name not in self._replicas:
            raise UsageError(f"replica={name!r}: there are {', '.join(self._replicas)}")
        pool = self._replicas[name].pool
        if pool in self._targets:
            self.scale(pool, max(0, self._targets[pool] - 1))
        ray.get(self._register.drain.remote(name))
        self._replicas[name].draining = True

    def close(self, timeout: float | None = None) -> None:
        self._drain(timeout)
        self._closed.set()
        self._happened.put(())
        for thread in self._threads:
            thread.join()
        for replica in self._replicas.values():
            self.router.remove(replica, "the engine was closed")
            if replica.pool in self._pools:
                replica.close()
                self._register.remove.remote(replica.name)
        if self._started_ray:
            ray.shutdown()

    def _check_pools(self) -> None:
        served = {role for pool in self._pools.values() for role in pool.roles}
        missing = {role for role, _ in self.front.route()} - served
        if self._pools and missing:
            names = ", ".join(sorted(role.value for role in missing))
            raise UsageError(f"pools: no replica runs the role {names}; add {names}=1")

    def _wait_until_ready(self) -> None:
        while not self.ready():
            failed = next((each for each in self._replicas.values() if each.failure is not None), None)
            if failed is not None:
                self._closed.set()
                self.router.max_waiting = 0
                raise ModelError(f"replica {failed.name} could not start: {failed.failure}")
            time.sleep(0.02)

    # What happened, one after another in a thread of its own.

    def _later(self, *happened: Any) -> None:
        self._happened.put(happened)

    def _handle(self) -> None:
        while not self._closed.is_set():
            happened = self._happened.get()
            if not happened:
                return
            what, replica, future, *details = happened
            try:
                if what == "finished":
                    self._finished(replica, future, *details)
                else:
                    self._told(replica, future)
            except Exception:  # one replica's answer must not end the thread that hears them all
                log.exception("%s: what it told could not be handled", replica.name)

    def _finished(self, replica: RayReplica, future: Future[Any], ticket: Ticket, data: Any) -> None:
        replica.forget(ticket)
        replica.busy = time.monotonic()
        # Not `result()`: an error raised here would hold this frame, and so the ticket, until it is garbage-collected.
        error = future.exception()
        if ticket not in replica.tickets:
            return  # taken back; what it says may be of the replica it waited for
        if isinstance(error, RayActorError) and ticket.after is None:
            self._lost(replica, f"{replica.name} died ({type(error).__name__})")
        elif isinstance(error, RayActorError):  # this one, or the one it waited for
            ticket.done(ticket, ReplicaLost(f"a replica died ({type(error).__name__})"))
        elif isinstance(error, (ObjectLostError, OwnerDiedError)):
            ticket.done(ticket, WireError(f"the hand-over was lost: {error}"))
        elif error is not None:
            ticket.done(ticket, RemoteError(str(error)))
        else:
            told = future.result()
            for preview in told.get("previews", ()):  # those that no heartbeat has told of
                ticket.show(*preview)
            ticket.done(ticket, self._outcome(told, data))

    def _outcome(self, told: dict[str, Any], data: Any) -> Handover | Exception:
        """Return what a replica's answer means."""
        if "error" in told:
            return from_text(*told["error"])
        if told["turns"]:
            role, *then = (RoleType(role) for role in told["turns"])
            return Handover(role, data, told["seconds"], then=tuple(then))
        try:
            return Handover(None, State.from_bytes(np.array(ray.get(data)).data), told["seconds"])
        except (ObjectLostError, OwnerDiedError, WireError) as error:
            return WireError(f"the result was lost: {error}")

    def _told(self, replica: RayReplica, future: Future[Any]) -> None:
        replica.asked = None
        error = future.exception()
        if error is not None:
            if replica.state == "ready":
                self._lost(replica, f"{replica.name} died ({type(error).__name__})")
            elif "creation task" in str(error):
                replica.failure = error
            return
        told = future.result()
        if replica.state == "starting":
            replica.told = told
            replica.state = "ready"
            log.info("replica %s is ready: %.1f MB on %s", replica.name, told["loaded_bytes"] / 1e6, told["device"])
            self.router.add(replica)
        elif replica.state == "ready":
            replica.hear(told)

    def _lost(self, replica: RayReplica, reason: str) -> None:
        if replica.state == "ready":
            replica.state, replica.asked = "starting", None
            replica.losses += 1
            log.warning("%s; its requests go elsewhere, and it is started anew", reason)
            self.router.remove(replica, reason)

    # Twice a second.

    def _pulse(self) -> None:
        while not self._closed.wait(PULSE):
            try:
                self._meet()
                for replica in list(self._replicas.values()):
                    self._look_after(replica)
                self._autoscale()
                self._fill_pools()
            except RayError as error:
                log.warning("the cluster does not answer: %s", error)

    def _look_after(self, replica: RayReplica) -> None:
        if replica.tickets:
            replica.busy = time.monotonic()
        if replica.asked is None:
            replica.ask()
        elif replica.state == "ready" and time.monotonic() - replica.asked > SILENCE:
            replica.kill()
            self._lost(replica, f"{replica.name} gave no sign of life for {SILENCE:.0f} s")
        if replica.draining and not replica.tickets and replica.pool in self._pools:
            self._replicas.pop(replica.name)
            self.router.remove(replica, "it was drained")
            replica.close()
            self._register.remove.remote(replica.name)

    def _meet(self) -> None:
        """Take note of replicas that others added to the service, or removed from it."""
        members = ray.get(self._register.members.remote(), timeout=10)
        for name, member in members.items():
            if name not in self._replicas:
                try:
                    actor = ray.get_actor(name, namespace=NAMESPACE)
                except ValueError:  # it is gone before we met
                    continue
                self._replicas[name] = RayReplica(name, member["pool"], actor, self._later)
            self._replicas[name].draining |= member["draining"]
        for name in [name for name in self._replicas if name not in members]:
            replica = self._replicas.pop(name)
            self.router.remove(replica, f"{name} left")
            replica.state = "closed"

    def _fill_pools(self) -> None:
        """Start the replicas that a pool lacks, and drain those it has too many."""
        for pool, target in self._targets.items():
            mine = [each for each in self._replicas.values() if each.pool == pool and not each.draining]
            for _ in range(target - len(mine)):
                name = f"{pool}-{secrets.token_hex(3)}"
                actor = start_replica(
                    name, self._source, pool, self._options, gpus=self._gpus_of(pool), **self._arguments
                )
                self._replicas[name] = RayReplica(name, pool, actor, self._later)
                ray.get(self._register.add.remote(name, pool))
            for replica in sorted(mine, key=lambda each: each.backlog)[: max(0, len(mine) - target)]:
                replica.draining = True
                self._register.drain.remote(replica.name)

    def _gpus_of(self, pool: str) -> float:
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        wanted = [self._gpus[role] for role in self._pools[pool].roles if role in self._gpus]
        return max(wanted, default=1.0 if resources.get("GPU") else 0.0)

    def _autoscale(self) -> None:
        """Grow pools whose requests wait long, and shrink those that have been idle."""
        now = time.monotonic()
        for name, pool in self._pools.items():
            mine = [each for each in self._replicas.values() if each.pool == name and not each.draining]
            waiting = sum(ticket.predicted for role in pool.roles for ticket in self.router.waiting(role))
            work = waiting + sum(each.backlog for each in mine)
            ready = all(each.state == "ready" for each in mine)
            if ready and len(mine) < pool.most and work > SCALE_AFTER * max(1, len(mine)):
                self._targets[name] = len(mine) + 1
            elif len(mine) > pool.least and all(now - each.busy > IDLE for each in mine):
                self._targets[name] = len(mine) - 1
