"""The Ray cluster under a service: connecting to it, and starting a replica on it."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from triptych.engine.ray_actor import ReplicaActor
from triptych.engine.ray_register import NAMESPACE
from triptych.errors import UsageError

log = logging.getLogger(__name__)

RUNS = 256
"""Segments that a replica takes or waits for at a time, of all routers: each holds one of its threads."""
GROUPS = {"signs": 8, "states": 16}
"""Threads of their own, so that however many segments there are it shows that it is alive, and their states come."""


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


def begin_connecting(address: str | None) -> Future[bool]:
    """Begin to `connect` in another thread, while this one imports the libraries that an engine needs."""
    connecting: Future[bool] = Future()

    def run() -> None:
        try:
            connecting.set_result(connect(address))
        except Exception as error:  # noqa: BLE001 (for whoever waits for the result)
            connecting.set_exception(error)
        threading.Event().wait()  # Ray's processes end with the thread that started them

    threading.Thread(target=run, name="connecting", daemon=True).start()
    return connecting


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
        os.environ.setdefault("RAY_worker_niceness", "0")  # else replicas get next to nothing of a core that others use
        try:
            # "local", or Ray would join whatever cluster it finds on this machine, or in RAY_ADDRESS.
            ray.init(address="local", include_dashboard=False, _node_ip_address="127.0.0.1", **options)
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
        here: whether it is to run on this machine, and to end with this process.
    """
    remote: Any = ray.remote
    limits: dict[str, Any] = {
        "max_restarts": -1, "max_task_retries": 0, "max_concurrency": RUNS, "concurrency_groups": {**GROUPS},
    }  # fmt: skip
    if (arguments.get("expected") or {}).get("transport") == "nixl":
        from triptych.engine import direct  # it imports PyTorch, and this module is to be there before that

        limits |= {"enable_tensor_transport": True, "runtime_env": {"env_vars": direct.ENVIRONMENT}}
    where: Any = "DEFAULT"
    if not gpus:
        where = "SPREAD"  # else Ray would put all on one machine
        # A byte, so that machines take turns: where nothing is reserved, a random one chooses by a count of its own, and
        # two replicas often lie on one. Else all are placed by the machine of whoever starts them.
        limits["memory"] = 1
    actor = remote(num_cpus=0, num_gpus=gpus, **limits)(ReplicaActor)
    if here:
        where = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return actor.options(
        name=name,
        namespace=NAMESPACE,
        scheduling_strategy=where,
        lifetime=None if here else "detached",  # it outlives the router that started it: there may be others
    ).remote(name, source, roles, options, threads=threads, **arguments)
