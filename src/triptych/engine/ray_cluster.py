"""The Ray cluster under a service: connecting to it, the register of its replicas, and starting one."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from triptych.engine.ray_actor import ReplicaActor, difference
from triptych.errors import ReplicaRefusedError, UsageError

log = logging.getLogger(__name__)

NAMESPACE = "triptych"
REGISTER = "register"


def connect(address: str | None) -> bool:
    """Join the cluster at an address, or start one on this machine; returns whether it was started.

    Raises:
        UsageError: Ray's authentication is switched off, or there is no cluster at that address.
    """
    mode = os.environ.get("RAY_AUTH_MODE")
    if mode != "token":
        raise UsageError(
            f"RAY_AUTH_MODE={mode!r}: Ray listens on all interfaces and runs what it is sent, so only 'token' is accepted"
        )
    if ray.is_initialized():
        return False
    with _own_signals():
        return _start(address)


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep this process's way of leaving: Ray's handler ends it with an abort."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


def _start(address: str | None) -> bool:
    options: dict[str, Any] = {
        "namespace": NAMESPACE,
        "logging_level": logging.ERROR,
        "log_to_driver": log.isEnabledFor(logging.DEBUG),
    }
    if address is None:
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else a replica without GPUs sees none
        try:
            ray.init(include_dashboard=False, _node_ip_address="127.0.0.1", **options)
        except RuntimeError as error:
            if "InvalidAuthToken" not in str(error):
                raise
            raise UsageError("Ray was imported before triptych.engine: set RAY_AUTH_MODE=token before that") from error
        return True
    try:
        ray.init(address=address, **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UsageError(f"address={address!r}: there is no Ray cluster that lets us in ({error})") from error
    return False


class Register:
    """The one list of a service's replicas, that every router reads. Runs as an actor of its own.

    Args:
        identity: version and model fingerprint, which every replica must have.
    """

    def __init__(self, identity: dict[str, str]) -> None:
        self._identity = identity
        self._members: dict[str, dict[str, Any]] = {}

    def identity(self) -> dict[str, str]:
        """Return the version and the model's fingerprint."""
        return self._identity

    def add(self, name: str, pool: str) -> None:
        """Enter a replica under the name of its actor."""
        self._members[name] = {"pool": pool, "draining": False}

    def drain(self, name: str) -> bool:
        """Ask that a replica be given nothing more; returns False where there is none of that name."""
        if name in self._members:
            self._members[name]["draining"] = True
        return name in self._members

    def remove(self, name: str) -> None:
        """Strike a replica out."""
        self._members.pop(name, None)

    def members(self) -> dict[str, dict[str, Any]]:
        """Return all replicas: pool and whether it is draining, by name."""
        return self._members


def open_register(identity: dict[str, str]) -> Any:
    """Return the service's register, made if there is none yet.

    Raises:
        ReplicaRefusedError: the cluster serves another model, or with another version.
    """
    remote: Any = ray.remote  # typed for functions of fixed arity only
    actor = remote(num_cpus=0, max_restarts=-1)(Register)
    register = actor.options(name=REGISTER, namespace=NAMESPACE, lifetime="detached", get_if_exists=True).remote(
        identity
    )
    theirs = ray.get(register.identity.remote())
    if theirs != identity:
        raise ReplicaRefusedError(difference(identity, theirs))
    return register


def find_register() -> Any:
    """Return the register of the service that this cluster runs.

    Raises:
        UsageError: it runs none.
    """
    try:
        register = ray.get_actor(REGISTER, namespace=NAMESPACE)
        ray.get(register.identity.remote(), timeout=10)
    except (ValueError, GetTimeoutError) as error:
        raise UsageError("this Ray cluster runs no Triptych service yet: start one with `triptych serve`") from error
    return register


def start_replica(
    name: str,
    source: str,
    roles: str,
    options: dict[str, Any],
    *,
    threads: int | None,
    gpus: float,
    here: bool = False,
    **arguments: Any,
) -> Any:
    """Start a replica's actor; returns its handle at once, long before it has loaded.

    Args:
        gpus: to reserve for it.
        here: whether it must run on this machine.
    """
    environment = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    remote: Any = ray.remote
    actor = remote(num_cpus=0, num_gpus=gpus, max_restarts=-1, max_task_retries=0, max_concurrency=64)(ReplicaActor)
    where = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False) if here else "DEFAULT"
    return actor.options(
        name=name,
        namespace=NAMESPACE,
        scheduling_strategy=where,
        runtime_env={"env_vars": environment},
    ).remote(name, source, roles, options, threads=threads, **arguments)
