"""Adding one replica from this machine to a service that runs, for as long as this process lives."""

from __future__ import annotations

import logging
import math
import os
import secrets
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from triptych.components.acceleration import parse_acceleration
from triptych.engine.local import PROMPT_CACHE
from triptych.engine.ranks import check_machine, placed
from triptych.engine.ray_cluster import connect, start_replica
from triptych.engine.ray_register import JOINED, find_register
from triptych.engine.ray_replica import SILENCE_LOADING
from triptych.errors import ModelError, ReplicaRefusedError
from triptych.roles import RoleType

if TYPE_CHECKING:
    from triptych.components.acceleration import AccelerationSpec
    from triptych.components.dtypes import DtypeSpec

log = logging.getLogger(__name__)

LOOK = 0.5
"""Seconds between two looks at whether the replica has been drained, or has finished."""
QUIET = 3
"""Looks in a row without work after which it has finished: by then every router knows that it is drained, and Ray has
stored its last result."""
FORGOTTEN = 20
"""Looks in a row after which a replica that the register does not name leaves: one that was started anew learns the names
again."""
DRAIN = 60.0
"""Seconds that a replica gets to finish what it has when it is interrupted; one that is drained gets all it needs."""


def join(
    source: str | Path,
    role: RoleType | str,
    address: str,
    *,
    dtype: DtypeSpec = "auto",
    tasks: str | Iterable[str] | None = None,
    revision: str | None = None,
    variant: str | None = None,
    acceleration: AccelerationSpec = None,
    threads: int | None = None,
    gpus: float | None = None,
    prompt_cache: int = PROMPT_CACHE,
    batching: bool = True,
    on_ready: Callable[[dict[str, Any]], None] | None = None,
) -> None:
    """Run one replica of a role on this machine, in the service at `address`, until interrupted or drained.

    On KeyboardInterrupt or SystemExit it is given nothing more, has a minute to finish what it has, and goes.

    Args:
        on_ready: told what the replica says of itself once routers may use it.

    Raises:
        UsageError: there is no cluster or no service at that address, or this machine has too few GPUs.
        ReplicaRefusedError: the service runs another version or another model; the message says which.
        ModelError: the replica could not load, or hangs while it does.
    """
    connect(address)
    register = find_register()
    options: dict[str, Any] = {"dtype": dtype, "tasks": tasks, "revision": revision, "variant": variant}
    options["acceleration"] = parse_acceleration(acceleration)
    role = RoleType(role)
    name = f"{JOINED}{role.value}-{secrets.token_hex(3)}"
    reserved, options = placed({role}, {} if gpus is None else {role: gpus}, options)
    check_machine(reserved)
    expected = ray.get(register.identity.remote())
    actor = start_replica(
        name,
        str(source),
        role.value,
        options,
        threads=threads or max(1, (os.cpu_count() or 1) // 2),
        gpus=reserved,
        here=True,
        expected=expected,
        budget=None if batching else 0,
        prompt_cache=prompt_cache,
    )
    told = _wait_until_loaded(actor)
    if ray.get(register.identity.remote()) != expected:
        ray.kill(actor)
        raise ReplicaRefusedError("this replica cannot join: the service ended while it loaded, or is another one now")
    ray.get(register.add.remote(name, role.value, joined=True))
    if on_ready is not None:
        on_ready(told)
    try:
        if _stay(register, actor, name):
            _finish(actor, name, math.inf)
    finally:
        _leave(register, actor, name)


def _wait_until_loaded(actor: Any) -> dict[str, Any]:
    """Wait until a replica has loaded, as long as it shows that it is alive; returns what it says of itself."""
    loaded = actor.describe.remote()
    try:
        while not ray.wait([loaded], timeout=LOOK)[0]:
            ray.get(actor.beat.remote(), timeout=SILENCE_LOADING)
        told: dict[str, Any] = ray.get(loaded)
        return told
    except RayTaskError as error:
        if isinstance(error.cause, ReplicaRefusedError):
            raise error.cause from None
        raise ModelError(f"the replica could not start: {error.cause}") from error
    except GetTimeoutError as error:
        ray.kill(actor)
        silence = f"it has given no sign of life for {SILENCE_LOADING:.0f} s"
        raise ModelError(f"the replica could not start: {silence}") from error
    except RayActorError as error:
        raise ModelError(f"the replica could not start: {error}") from error


def _stay(register: Any, actor: Any, name: str) -> bool:
    """Wait until somebody drains the replica, or the service is gone; returns whether it was drained."""
    unnamed = 0
    while unnamed < FORGOTTEN:
        time.sleep(LOOK)
        member = ray.get(register.members.remote()).get(name)
        unnamed = unnamed + 1 if member is None else 0
        if member is not None and member["draining"]:
            return True
    return False


def _finish(actor: Any, name: str, patience: float) -> None:
    """Wait until the replica has nothing left, at most `patience` seconds."""
    quiet, deadline = 0, time.monotonic() + patience
    try:
        while quiet < QUIET and time.monotonic() < deadline:
            time.sleep(LOOK)
            quiet = 0 if ray.get(actor.busy.remote(), timeout=DRAIN) else quiet + 1
    except (RayActorError, GetTimeoutError) as error:
        log.warning("%s could not be drained: %s", name, error)


def _leave(register: Any, actor: Any, name: str) -> None:
    """Let the replica finish what it has, strike it out of the service and end it."""
    try:
        register.drain.remote(name)
        _finish(actor, name, DRAIN)
    finally:
        register.remove.remote(name)
        ray.kill(actor)
