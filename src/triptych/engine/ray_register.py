"""The register: what all routers of a service on a Ray cluster share."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from triptych.engine.ray_actor import difference
from triptych.errors import ReplicaRefusedError, UsageError

log = logging.getLogger(__name__)

NAMESPACE = "triptych"
REGISTER = "register"
JOINED = "joined-"
"""What the names of replicas begin with that end with the process that added them."""
SILENT = 5.0
"""Seconds after which a router that was not heard is taken to be gone."""
_STARTING = 60.0
"""Seconds that it may take to start, and to answer for the first time."""
ORPHANED = 60.0
"""Seconds after the last router's last word, after which the replicas are ended. One that is back by then finds them."""


class Register:
    """Knows the replicas, how many of them each pool is to have, and the routers. Runs as an actor of its own.

    The first of the routers that are alive keeps the pools: it starts and drains replicas.

    Args:
        orphaned: seconds without a router after which the replicas are ended.
    """

    def __init__(self, orphaned: float = ORPHANED) -> None:
        self._identity: dict[str, str] | None = None
        self._epoch = secrets.token_hex(4)  # another one after Ray had to start this actor anew
        self._members: dict[str, dict[str, Any]] = {}
        self._pools: dict[str, dict[str, Any]] = {}
        self._routers: dict[str, int] = {}  # each with when it was last heard
        self._work: dict[str, dict[str, tuple[int, float]]] = {}  # what each router last told of it
        # Seconds that this process has run, not those that have passed: while it is stopped it could hear nobody.
        self._now = self._heard = 0
        self._orphaned = orphaned
        self._swept = False  # whether all replicas were ended for want of a router
        threading.Thread(target=self._watch, daemon=True).start()

    def identity(self) -> dict[str, str] | None:
        """Return the version and the fingerprint that every replica must have; None where nothing is served."""
        return self._identity

    def enter(self, router: str, identity: dict[str, str]) -> dict[str, str]:
        """Let a router take part; returns the service's identity, which is the first router's."""
        if self._identity is None or (not self._alive() and not self._members):
            self._identity, self._pools = identity, {}  # those of a service that had no replica left when it ended
        if identity == self._identity:
            self._hear(router)
        return self._identity

    def pulse(self, router: str, work: dict[str, tuple[int, float]]) -> dict[str, Any] | None:
        """Take note that a router is alive, and of the work that it has for each pool: how many requests, of what seconds.

        Returns all there is to know, or None where it has to enter (again): it was silent for too long, or Ray had to
        start this actor anew.
        """
        if router not in self._alive():
            return None
        self._hear(router)
        self._work[router] = work
        alive = self._alive()
        self._work = {name: self._work[name] for name in alive if name in self._work}
        return {
            "epoch": self._epoch,
            "routers": alive,  # the first of them keeps the pools
            "members": self._members,
            "pools": self._pools,
            "work": {pool: self._work_for(pool) for pool in self._pools},
        }

    def restore(self, members: dict[str, dict[str, Any]], pools: dict[str, dict[str, Any]]) -> None:
        """Learn again from a router what was known before, and is not any more."""
        self._members = {**members, **self._members}
        self._pools = {**pools, **self._pools}

    def leave(self, router: str) -> bool:
        """Strike a router out; the last one's end is the service's, and its replicas'. Returns whether it was the last."""
        self._routers.pop(router, None)
        if self._alive():
            return False
        self._end()
        return True

    def declare(self, pools: dict[str, dict[str, Any]]) -> None:
        """Enter pools: `least`, `most` and `target` replicas, and the `arguments` to start one with.

        One that is known keeps its target, as far as the bounds allow: another router has it by now, with its work.
        """
        for name, pool in pools.items():
            target = self._pools.get(name, pool)["target"]
            self._pools[name] = {**pool, "target": min(max(target, pool["least"]), pool["most"])}

    def scale(self, pool: str, target: int, *, fixed: bool = True) -> None:
        """Set how many replicas a pool is to have; where that is `fixed`, for good, and else within its bounds."""
        mine = self._pools[pool]
        if fixed:
            mine.update(least=target, most=target)
        mine["target"] = min(max(target, mine["least"]), mine["most"])

    def add(self, name: str, pool: str, *, joined: bool = False) -> None:
        """Enter a replica under the name of its actor; one that `joined` counts to no pool's number."""
        self._members[name] = {"pool": pool, "joined": joined, "draining": False}

    def drain(self, name: str, *, shrink: bool = False) -> None:
        """Ask that a replica be given nothing more; where its pool is to `shrink` by it, that is done in the same breath.

        Does nothing where it is drained already, or gone.
        """
        member = self._members.get(name)
        if member is None or member["draining"]:
            return
        member["draining"] = True
        pool = self._pools.get(member["pool"])
        if shrink and pool is not None and not member["joined"]:
            fixed = pool["least"] == pool["most"]
            pool["target"] = max(0, pool["target"] - 1)
            pool["least"] = min(pool["least"], pool["target"])
            if fixed:  # else it may grow again by its work
                pool["most"] = pool["target"]

    def remove(self, name: str) -> None:
        """Strike a replica out."""
        self._members.pop(name, None)

    def members(self) -> dict[str, dict[str, Any]]:
        """Return all replicas, by name: `pool`, whether it `joined` from outside, whether it is `draining`."""
        return self._members

    def _hear(self, router: str) -> None:
        self._heard = self._routers[router] = self._now  # one that is known keeps its place
        self._swept = False

    def _alive(self) -> list[str]:
        self._routers = {name: heard for name, heard in self._routers.items() if self._now - heard < SILENT}
        return list(self._routers)

    def _work_for(self, pool: str) -> tuple[int, float]:
        """Return the requests and the seconds of all routers together."""
        told = [work[pool] for work in self._work.values() if pool in work]
        return sum(requests for requests, _ in told), sum(seconds for _, seconds in told)

    def _end(self) -> None:
        """End the service and all its replicas, even those that the last router has not met."""
        members = self._members
        self._members, self._pools, self._identity = {}, {}, None
        for name, member in members.items():
            if not member["joined"]:  # those that joined see that they are struck out, and leave
                end(name)

    def _watch(self) -> None:
        """End the replicas that no router is left for."""
        while True:
            time.sleep(1)
            self._now += 1
            if not self._swept and self._now - self._heard > self._orphaned:
                self._swept = True
                try:
                    self._end()
                    sweep()
                except Exception:  # without this thread no router would ever be taken to be gone
                    log.exception("replicas without a router could not be ended")


def end(name: str) -> None:
    """End a replica's process for good, if it is there."""
    try:
        ray.kill(ray.get_actor(name, namespace=NAMESPACE))
    except (ValueError, RayError) as error:
        log.info("%s is gone already: %s", name, error)


def sweep() -> None:
    """End all replicas but those that joined, even such as a register that was started anew has never heard of."""
    for each in ray.util.list_named_actors(all_namespaces=True):
        name = each["name"]
        if each["namespace"] == NAMESPACE and name != REGISTER and not name.startswith(JOINED):
            end(name)


def open_register(router: str, identity: dict[str, str], *, orphaned: float = ORPHANED) -> Any:
    """Return the cluster's register, made if there is none yet, with a router entered.

    Raises:
        ReplicaRefusedError: the cluster serves another model, or with another version.
        UsageError: the register does not answer.
    """
    remote: Any = ray.remote  # typed for functions of fixed arity only
    actor = remote(num_cpus=0, max_restarts=-1, max_task_retries=3)(Register)
    register = actor.options(name=REGISTER, namespace=NAMESPACE, lifetime="detached", get_if_exists=True).remote(
        orphaned
    )
    try:
        enter(register, router, identity, timeout=_STARTING)
    except GetTimeoutError as error:
        raise UsageError(f"this Ray cluster's register has not answered for {_STARTING:.0f} s") from error
    return register


def enter(register: Any, router: str, identity: dict[str, str], timeout: float | None = None) -> None:
    """Let a router take part in the cluster's service.

    Raises:
        ReplicaRefusedError: the cluster serves another model, or with another version.
    """
    theirs = ray.get(register.enter.remote(router, identity), timeout=timeout)
    if theirs != identity:
        raise ReplicaRefusedError(f"this router cannot join: {difference(identity, theirs)}")


def find_register() -> Any:
    """Return the register of the service that this cluster runs.

    Raises:
        UsageError: it runs none.
    """
    identity: dict[str, str] | None = None
    try:
        register = ray.get_actor(REGISTER, namespace=NAMESPACE)
        asked: Any = register.identity.remote()
        identity = ray.get(asked, timeout=10)
    except (ValueError, GetTimeoutError) as error:
        log.info("no register: %s", error)
    if identity is None:
        raise UsageError("this Ray cluster runs no Triptych service yet: start one with `triptych serve`")
    return register
