"""The engine over Ray: each replica a process, on this machine or on others."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import torch
from ray.exceptions import RayError

import triptych
from triptych.components.acceleration import parse_acceleration
from triptych.components.dtypes import parse_dtype
from triptych.engine.base import Engine
from triptych.engine.choice import Policy
from triptych.engine.inbox import MODEST
from triptych.engine.local import PROMPT_CACHE
from triptych.engine.pools import Pool, parse_pools
from triptych.engine.ranks import check_place, check_room, ranks_of
from triptych.engine.ray_cluster import connect
from triptych.engine.ray_hearing import Hearing
from triptych.engine.ray_pools import PoolKeeper
from triptych.engine.ray_replica import RayReplica
from triptych.engine.replica import Handover
from triptych.engine.router import Router
from triptych.errors import (
    ModelError,
    ReplicaLost,
    ReplicaRefusedError,
    UsageError,
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


class RayEngine(Engine):
    """Pools of replicas on a Ray cluster. States go from replica to replica; this process keeps what is needed to make a lost
    one again: small ones themselves, references to larger ones.

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
        self._hearing = Hearing(self.router)
        undo.callback(self._hearing.inbox.close)
        self._keeper = PoolKeeper(self.router, identity, self._hearing.inbox.address, self._hearing.later)
        undo.callback(self._keeper.leave)
        self._keeper.declare(pools, gpus, **arguments)
        self._keeper.pulse()
        self._pulses = threading.Thread(target=self._pulse, name="pulses", daemon=True)
        undo.callback(self._stop)
        self._hearing.start()
        self._pulses.start()

    def _stop(self) -> None:
        """End this engine's threads."""
        self._closed.set()
        self._hearing.stop()
        if self._pulses.is_alive():
            self._pulses.join()

    def hand_in(self, state: State) -> Handover:
        data = np.frombuffer(state.to_bytes(), np.uint8)
        then = state.route[state.position + 1 :]
        return Handover(state.next_role, data if data.nbytes <= MODEST else ray.put(data), then=then)

    def find_projection(self, timeout: float, *, wait: bool = True) -> Projection | None:
        until = time.monotonic() + timeout
        decoders = [each for each in self.replicas if RoleType.DECODER in each.roles and each.state == "ready"]
        asked = [each.actor.projection.remote(timeout if wait else 0.0) for each in decoders]
        while asked:
            told, asked = ray.wait(asked, timeout=max(0.0, until - time.monotonic()))
            if not told:
                return None
            try:
                weight = ray.get(told[0])
            except RayError as error:
                log.info("a decoder could not tell what previews are made with: %s", error)
                continue
            if weight is not None:
                return Projection(torch.tensor(weight))
        return None

    def served(self) -> set[RoleType]:
        """Return the roles that have a replica, or a pool that has none until there is work: it wakes when that comes.

        One whose replicas turn out not to start does not wake.
        """
        broken = {each.pool for each in self.replicas if each.failed is not None}
        sleepers = [name for name, pool in self._keeper.pools.items() if pool["least"] == 0 < pool["most"]]
        wakes = [name for name in sleepers if name not in broken]
        return super().served().union(*(parse_roles(name) for name in wakes))

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
        hopeful = {role for each in self.replicas if each.failure is None for role in each.roles}
        for failed in self.replicas:
            if failed.failure is not None and not failed.roles <= hopeful:
                raise ModelError(f"replica {failed.name} could not start: {failed.failure}")

    def _pulse(self) -> None:
        while not self._closed.wait(PULSE):
            try:
                self._keeper.pulse()
            except RayError as error:
                log.warning("the cluster does not answer: %s", error)
            except ReplicaRefusedError as error:
                log.warning("this router has no part in the cluster's service: %s", error)
                self.router.cancel_all(ReplicaLost(f"the service is another one now: {error}"))
            except Exception:  # without this thread nobody would hear whether replicas live
                log.exception("the pools could not be looked after")


def _check_pools(pools: list[Pool], roles: set[RoleType]) -> None:
    missing = roles - {role for pool in pools for role in pool.roles}
    if pools and missing:
        names = ", ".join(sorted(role.value for role in missing))
        raise UsageError(f"pools: no replica runs the role {names}; add {names}=1")
