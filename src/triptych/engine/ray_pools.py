"""The pools of a service on Ray: which replicas there are, whether they live, and that there are enough of them."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from triptych.engine.pools import Pool
from triptych.engine.ranks import placed
from triptych.engine.ray_cluster import start_replica
from triptych.engine.ray_register import NAMESPACE, enter, open_register
from triptych.engine.ray_replica import RayReplica
from triptych.engine.router import Router
from triptych.roles import RoleType, parse_roles

log = logging.getLogger(__name__)

SCALE_AFTER = 3.0
"""Seconds of work for each replica of a pool, beyond which it gets another, if it may and has more requests than replicas;
without any, any work is."""
IDLE = 60.0
"""Seconds without work after which a pool gives a replica back, if it may."""
REPLACE = 10.0
"""Seconds after which a replica that cannot start is replaced, doubled for each in a row that could not."""
_REPLACE_MOST = 600.0
"""Seconds that it takes at most."""
_PATIENCE = 10.0
"""Seconds that the register may take to answer."""
_BRIEF = 2.0
"""The same at a pulse: the replicas are to be looked after meanwhile."""


class PoolKeeper:
    """Knows the service's replicas through the register, and where this router is the first of them, keeps the pools.

    Attributes:
        replicas: all that are known, whether ready or not, by name.
        pools: how many replicas each is to have, as `Register.declare` takes it.
    """

    def __init__(self, router: Router, identity: dict[str, str], reply: str | None, later: Callable[..., None]) -> None:
        self.replicas: dict[str, RayReplica] = {}
        self.pools: dict[str, dict[str, Any]] = {}
        self._name = f"router-{secrets.token_hex(4)}"
        self._router, self._identity, self._reply, self._later = router, identity, reply, later
        self._members: dict[str, dict[str, Any]] = {}
        self._epoch: str | None = None
        self._asked: Any = None  # a pulse that the register has not answered yet
        self._alone = True  # whether no other router was alive when the register last told
        self._work: dict[str, tuple[int, float]] = {}  # requests and seconds of all routers together, by pool
        self._failures: Counter[str] = Counter()  # replicas in a row that could not start, by pool
        self._lock = threading.Lock()  # so that nothing is drained while the pools are looked after
        self._register = open_register(self._name, identity)

    def declare(self, pools: Iterable[Pool], gpus: dict[RoleType, float], **arguments: Any) -> None:
        """Say which pools the service is to have, and with what arguments `start_replica` starts their replicas."""
        declared = {}
        for pool in pools:
            reserved, options = placed(pool.roles, gpus, arguments["options"])
            declared[pool.name] = {
                "least": pool.least, "most": pool.most, "target": pool.least,
                "arguments": {**arguments, "options": options, "gpus": reserved},
            }  # fmt: skip
        ray.get(self._register.declare.remote(declared), timeout=_PATIENCE)

    def scale(self, pool: str, target: int) -> None:
        """Set how many replicas a pool is to have, for good."""
        ray.get(self._register.scale.remote(pool, target), timeout=_PATIENCE)

    def drain(self, name: str) -> None:
        """Have a replica given nothing more by any router, and ended when it has finished; its pool shrinks by it."""
        with self._lock:
            ray.get(self._register.drain.remote(name, shrink=True), timeout=_PATIENCE)
            if name in self.replicas:
                self.replicas[name].draining = True

    def leave(self) -> None:
        """Take this router out of the service; the last one takes the replicas with it."""
        try:
            last = ray.get(self._register.leave.remote(self._name), timeout=_PATIENCE)
        except (RayActorError, GetTimeoutError) as error:
            last = self._alone
            log.warning(
                "the register does not answer (%s): the replicas are %s", error, "ended" if last else "left alone"
            )
        for replica in self.replicas.values():
            self._router.remove(replica, "the engine was closed")
            if last and not replica.joined:
                replica.close()

    def pulse(self) -> None:
        """Hear what has changed, ask every replica for a sign of life, and keep the pools.

        Raises:
            RayError: the cluster does not answer.
            ReplicaRefusedError: this router had fallen silent, and another model is served by now.
        """
        with self._lock:
            self._pulse()

    def _pulse(self) -> None:
        try:
            told = self._tell()
        except RayError:  # requests are on their way all the same
            self._look_after_all(keeping=False)
            raise
        anew = self._epoch not in (None, told["epoch"])
        if anew or (self.pools and not told["pools"]):
            log.warning("the register was started anew, or its service ended: it learns again what this router knows")
            # The replicas of a service that ended have ended, too.
            ray.get(self._register.restore.remote(self._members if anew else {}, self.pools), timeout=_PATIENCE)
            told = self._tell()
        self._epoch, self._members, self.pools = told["epoch"], told["members"], told["pools"]
        self._work = told["work"]
        self._meet()
        self._alone = told["routers"] == [self._name]
        keeping = told["routers"][0] == self._name
        self._look_after_all(keeping=keeping)
        if keeping:
            self._autoscale()
            self._fill()

    def _tell(self) -> dict[str, Any]:
        """Show the register that this router is alive, and what work it has; returns all that the register knows."""
        work = {}
        for pool in self.pools:
            waiting = [ticket for role in parse_roles(pool) for ticket in self._router.waiting(role)]
            mine = self._of(pool)
            # Not their tickets: a request may have several, of which one runs.
            requests = {ticket.job for ticket in waiting}.union(ticket.job for each in mine for ticket in each.tickets)
            seconds = sum(ticket.predicted for ticket in waiting) + sum(each.backlog for each in mine)
            work[pool] = len(requests), seconds
        while (told := self._answer(work)) is None:
            log.warning("the register does not know this router any more: it enters again")
            enter(self._register, self._name, self._identity, timeout=_PATIENCE)
        return told

    def _answer(self, work: dict[str, tuple[int, float]]) -> dict[str, Any] | None:
        self._asked = self._asked or self._register.pulse.remote(self._name, work)
        if not ray.wait([self._asked], timeout=_BRIEF)[0]:
            raise GetTimeoutError("the register is silent")  # what it says late is heard at the next pulse
        asked, self._asked = self._asked, None
        told: dict[str, Any] | None = ray.get(asked)
        return told

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
        # One that was struck out while another thread heard that it is ready was let in after that.
        for ghost in [each for each in self._router.replicas if each not in self.replicas.values()]:
            self._router.remove(ghost, f"{ghost.name} left")

    def _look_after_all(self, *, keeping: bool) -> None:
        for replica in list(self.replicas.values()):
            try:
                self._look_after(replica, keeping=keeping)
            except Exception:  # the others are to be looked after all the same
                log.exception("%s could not be looked after", replica.name)

    def _look_after(self, replica: RayReplica, *, keeping: bool) -> None:
        if replica.tickets:
            replica.busy = time.monotonic()
        if replica.state == "ready" and replica.is_gone():
            replica.lose(self._router, f"{replica.name} died")
        if replica.asked is None and replica.failed is None:
            replica.ask()
        elif replica.hangs():
            silent = replica.silent
            replica.kill()
            replica.lose(self._router, f"{replica.name} gave no sign of life for {silent:.1f} s")
        if keeping and replica.drained and not replica.joined:
            self._strike_out(replica, "it was drained")
        elif keeping and replica.failed is not None:
            patience = min(REPLACE * 2 ** self._failures[replica.pool], _REPLACE_MOST)
            if replica.joined:
                log.warning("%s, which had joined, is gone", replica.name)
                self._strike_out(replica, "it is gone")  # its process sees it, where that is left, and ends
            elif time.monotonic() - replica.failed > patience:
                log.warning("%s could not start %.0f s ago, and is replaced", replica.name, patience)
                self._failures[replica.pool] += 1
                self._strike_out(replica, "it could not start")

    def _strike_out(self, replica: RayReplica, reason: str) -> None:
        """End a replica for good; where its pool lacks one then, another is started."""
        self._register.remove.remote(replica.name)
        self._members.pop(replica.name, None)
        self.replicas.pop(replica.name)
        self._router.remove(replica, reason)
        replica.close()

    def _fill(self) -> None:
        """Start the replicas that a pool lacks, and drain those it has too many.

        Those that reserve most GPUs come first: shares that lie on every card would leave none free for a larger one.
        """
        for name, pool in sorted(self.pools.items(), key=lambda each: each[1]["arguments"]["gpus"], reverse=True):
            mine = self._of(name)
            for _ in range(pool["target"] - len(mine)):
                replica = f"{name}-{secrets.token_hex(3)}"
                try:  # first, so that it is found by others, and ended, though this router should die now
                    ray.get(self._register.add.remote(replica, name), timeout=_BRIEF)
                    actor = start_replica(replica, roles=name, **pool["arguments"])
                except BaseException:
                    self._register.remove.remote(replica)
                    raise
                self.replicas[replica] = self._replica(replica, name, actor)
                # Known here, too: a register that is started anew learns of it from us.
                self._members[replica] = {"pool": name, "joined": False, "draining": False}
            for surplus in sorted(mine, key=_use)[: max(0, len(mine) - pool["target"])]:
                surplus.draining = True
                self._register.drain.remote(surplus.name)

    def _autoscale(self) -> None:
        """Grow pools that have requests for another replica, and shrink those that have been idle."""
        now = time.monotonic()
        for name, pool in self.pools.items():
            mine = self._of(name)
            requests, seconds = self._work.get(name, (0, 0.0))
            ready = all(each.state == "ready" for each in mine)
            if mine and ready and len(mine) >= pool["target"]:
                self._failures.pop(name, None)
            much = not mine or seconds > SCALE_AFTER * len(mine)
            if ready and much and len(mine) < min(pool["most"], requests):
                target = len(mine) + 1
            elif not requests and len(mine) > pool["least"] and all(now - each.busy > IDLE for each in mine):
                target = len(mine) - 1
            else:
                continue
            pool["target"] = target
            self._register.scale.remote(name, target, fixed=False)

    def _replica(self, name: str, pool: str, actor: Any, *, joined: bool = False) -> RayReplica:
        return RayReplica(name, pool, actor, self._reply, self._later, joined=joined)

    def _of(self, pool: str) -> list[RayReplica]:
        """Return a pool's own replicas that are to stay."""
        return [each for each in self.replicas.values() if each.pool == pool and not each.draining and not each.joined]


def _use(replica: RayReplica) -> tuple[bool, bool, float]:
    """Return what orders replicas by how much they are missed: least those that failed, then those that still load."""
    return replica.failed is None, replica.state == "ready", replica.backlog
