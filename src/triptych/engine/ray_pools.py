"""The pools of a service on Ray: which replicas there are, whether they live, and that there are enough of them."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterable
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError

from triptych.engine.inbox import Order
from triptych.engine.pools import Pool
from triptych.engine.ranks import gpus_of
from triptych.engine.ray_cluster import start_replica
from triptych.engine.ray_register import NAMESPACE, open_register
from triptych.engine.ray_replica import RayReplica
from triptych.engine.replica import Ticket
from triptych.engine.router import Router
from triptych.roles import RoleType, parse_roles

log = logging.getLogger(__name__)

SCALE_AFTER = 3.0
"""Seconds of waiting work for each replica of a pool, beyond which it gets another, if it may."""
IDLE = 60.0
"""Seconds without work after which a pool gives a replica back, if it may."""
_PATIENCE = 10.0
"""Seconds that the register may take to answer."""


class PoolKeeper:
    """Knows the service's replicas through the register, and where this router is the first of them, keeps the pools.

    Attributes:
        replicas: all that are known, whether ready or not, by name.
        pools: how many replicas each is to have, as `Register.declare` takes it.
    """

    def __init__(
        self, router: Router, identity: dict[str, str], expect: Callable[[Ticket], Order], later: Callable[..., None]
    ) -> None:
        self.replicas: dict[str, RayReplica] = {}
        self.pools: dict[str, dict[str, Any]] = {}
        self._name = f"router-{secrets.token_hex(4)}"
        self._router, self._identity, self._expect, self._later = router, identity, expect, later
        self._members: dict[str, dict[str, Any]] = {}
        self._epoch: str | None = None
        self._register = open_register(self._name, identity)

    def declare(self, pools: Iterable[Pool], gpus: dict[RoleType, float], **arguments: Any) -> None:
        """Say which pools the service is to have, and with what arguments `start_replica` starts their replicas."""
        declared = {}
        for pool in pools:
            reserved = {**arguments, "gpus": gpus_of(pool.roles, gpus, arguments["options"]["acceleration"])}
            declared[pool.name] = {
                "least": pool.least, "most": pool.most, "target": pool.least, "arguments": reserved,
            }  # fmt: skip
        ray.get(self._register.declare.remote(declared))

    def scale(self, pool: str, target: int) -> None:
        """Set how many replicas a pool is to have, for good."""
        ray.get(self._register.scale.remote(pool, target))

    def drain(self, name: str) -> None:
        """Have a replica given nothing more by any router, and ended when it has finished; its pool shrinks by it."""
        replica = self.replicas[name]
        if not replica.joined and replica.pool in self.pools:
            self.scale(replica.pool, max(0, self.pools[replica.pool]["target"] - 1))
        ray.get(self._register.drain.remote(name))
        replica.draining = True

    def leave(self) -> None:
        """Take this router out of the service; the last one takes the replicas with it."""
        try:
            last = ray.get(self._register.leave.remote(self._name), timeout=_PATIENCE)
        except (RayActorError, GetTimeoutError) as error:
            log.warning("the register does not answer (%s): the replicas are ended", error)
            last = True
        for replica in self.replicas.values():
            self._router.remove(replica, "the engine was closed")
            if last and not replica.joined:
                replica.close()

    def pulse(self) -> None:
        """Hear what has changed, ask every replica for a sign of life, and keep the pools.

        Raises:
            RayError: the cluster does not answer.
        """
        told = ray.get(self._register.pulse.remote(self._name), timeout=_PATIENCE)
        if self._epoch not in (None, told["epoch"]):
            log.warning("the register was started anew: it learns again what this router knows")
            ray.get(self._register.restore.remote(self._identity, self._members, self.pools), timeout=_PATIENCE)
            told = ray.get(self._register.pulse.remote(self._name), timeout=_PATIENCE)
        self._epoch, self._members, self.pools = told["epoch"], told["members"], told["pools"]
        self._meet()
        keeping = told["keeper"] == self._name
        for replica in list(self.replicas.values()):
            self._look_after(replica, keeping=keeping)
        if keeping:
            self._autoscale()
            self._fill()

    def _meet(self) -> None:
        """Take note of replicas that have been added to the service, or removed from it."""
        for name, member in self._members.items():
            if name not in self.replicas:
                try:
                    actor = ray.get_actor(name, namespace=NAMESPACE)
                except ValueError:  # it is gone before we met
                    continue
                self.replicas[name] = self._replica(name, member["pool"], actor, joined=member["joined"])
            self.replicas[name].draining |= member["draining"]
        for name in [name for name in self.replicas if name not in self._members]:
            replica = self.replicas.pop(name)
            self._router.remove(replica, f"{name} left")
            replica.state = "closed"

    def _look_after(self, replica: RayReplica, *, keeping: bool) -> None:
        if replica.tickets:
            replica.busy = time.monotonic()
        if replica.state == "ready" and replica.is_gone():
            replica.lose(self._router, f"{replica.name} died")
        if replica.asked is None and replica.failure is None:
            replica.ask()
        elif replica.hangs():
            silent = replica.silent
            replica.kill()
            replica.lose(self._router, f"{replica.name} gave no sign of life for {silent:.1f} s")
        if keeping and replica.drained and not replica.joined:
            self._register.remove.remote(replica.name)
            self._members.pop(replica.name, None)
            self.replicas.pop(replica.name)
            self._router.remove(replica, "it was drained")
            replica.close()

    def _fill(self) -> None:
        """Start the replicas that a pool lacks, and drain those it has too many."""
        for name, pool in self.pools.items():
            mine = self._of(name)
            for _ in range(pool["target"] - len(mine)):
                replica = f"{name}-{secrets.token_hex(3)}"
                actor = start_replica(replica, roles=name, **pool["arguments"])
                self.replicas[replica] = self._replica(replica, name, actor)
                ray.get(self._register.add.remote(replica, name))
            for surplus in sorted(mine, key=lambda each: each.backlog)[: max(0, len(mine) - pool["target"])]:
                surplus.draining = True
                self._register.drain.remote(surplus.name)

    def _autoscale(self) -> None:
        """Grow pools whose requests wait long, and shrink those that have been idle."""
        now = time.monotonic()
        for name, pool in self.pools.items():
            mine = self._of(name)
            roles = parse_roles(name)
            waiting = sum(ticket.predicted for role in roles for ticket in self._router.waiting(role))
            work = waiting + sum(each.backlog for each in mine)
            ready = all(each.state == "ready" for each in mine)
            if ready and len(mine) < pool["most"] and work > SCALE_AFTER * max(1, len(mine)):
                target = len(mine) + 1
            elif len(mine) > pool["least"] and all(now - each.busy > IDLE for each in mine):
                target = len(mine) - 1
            else:
                continue
            pool["target"] = target
            self._register.scale.remote(name, target, fixed=False)

    def _replica(self, name: str, pool: str, actor: Any, *, joined: bool = False) -> RayReplica:
        return RayReplica(name, pool, actor, self._expect, self._later, joined=joined)

    def _of(self, pool: str) -> list[RayReplica]:
        """Return a pool's own replicas that are to stay."""
        return [each for each in self.replicas.values() if each.pool == pool and not each.draining and not each.joined]
