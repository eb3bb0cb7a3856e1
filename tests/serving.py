"""The embedded model behind a real HTTP server, for tests of the server and of the commands that talk to one."""

import atexit
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import pytest

from triptych import embedded
from triptych.engine.base import Engine
from triptych.engine.local import LocalEngine
from triptych.server.app import create_app
from triptych.server.front import Front
from triptych.server.limits import Limits
from triptych.server.service import Service

PROMPT = {"prompt": "a red heart", "seed": 7}
QUICK = {**PROMPT, "num_inference_steps": 1}
LONG = {**PROMPT, "num_inference_steps": 900}
"""Minutes of work: for what is to be cancelled."""
_cache = TemporaryDirectory(prefix="triptych-tests-")


@cache
def engine() -> Engine:
    """The engine that all tests share."""
    os.environ["TRIPTYCH_CACHE"] = _cache.name
    devices: dict[str, Any] = dict.fromkeys(("encoder", "denoiser", "decoder"), "cpu")
    made = LocalEngine(embedded.path(), **devices, warm_up=False)
    atexit.register(made.close, 0)  # threads in the middle of a forward would be the end of the interpreter
    return made


@cache
def operations() -> list[tuple[str, re.Pattern[str], set[str]]]:
    """Method, path and declared statuses of every operation of the schema."""
    service = Service()
    paths = create_app(service).openapi()["paths"]
    service.records.spool.close()
    patterns = {path: re.compile(re.sub(r"{[^}]*:path}|{[^}/]*}", "[^/]+", path)) for path in paths}
    return [
        (method.upper(), patterns[path], set(operation["responses"]))
        for path, methods in paths.items()
        for method, operation in methods.items()
    ]


def check_declared(response: httpx.Response) -> None:
    """Make sure that the schema has the status of an answer; called with every answer that a caller gets."""
    request, status = response.request, str(response.status_code)
    for method, path, statuses in operations():
        if method == request.method and path.fullmatch(request.url.path):
            assert status in statuses, f"{method} {request.url.path} answers {status}, which is not in its schema"
            return


class Caller(httpx.Client):
    """A caller of a server that runs in this process, and keeps to its schema.

    Attributes:
        service: the other side.
        url: where it listens.
    """

    def __init__(self, service: Service, url: str) -> None:
        super().__init__(base_url=url, timeout=60.0, event_hooks={"response": [check_declared]})
        self.service, self.url = service, url

    def submit(self, parameters: dict[str, Any], **more: Any) -> dict[str, Any]:
        response = self.post("/v1/requests", json={"parameters": parameters, **more})
        assert response.status_code == 202, response.text
        return response.json()

    def status(self, request: dict[str, Any]) -> dict[str, Any]:
        return self.get(request["links"]["self"]).json()

    def wait(self, request: dict[str, Any]) -> dict[str, Any]:
        """Wait until a request has ended; returns its status."""
        return self.until(request, lambda status: status["status"] in ("done", "failed", "cancelled"))

    def until(self, request: dict[str, Any], holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Poll until something holds of a request's status, which is returned."""
        end = time.monotonic() + 60
        while not holds(status := self.status(request)):
            assert time.monotonic() < end, status
            time.sleep(0.02)
        return status


def running(status: dict[str, Any]) -> bool:
    """Whether a request's denoising has begun."""
    return bool(status["progress"] and status["progress"]["step"])


def idle() -> bool:
    """Whether the shared engine has nothing to do, waiting a moment for it."""
    end = time.monotonic() + 30
    while len(engine().router) or any(each.tickets for each in engine().router.replicas):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def settled(service: Service) -> bool:
    """Whether every request of a server has ended, waiting a moment: its loop hears of an end after the engine."""
    end = time.monotonic() + 10
    while service.records.unfinished():
        if time.monotonic() > end:
            return False
        time.sleep(0.001)
    return True


@contextmanager
def served(limits: Limits | None = None, serves: Engine | None = None) -> Iterator[Caller]:
    """Serve for a while; what is still running at the end is cancelled."""
    service = Service(limits, serves or engine())
    with Front(create_app(service), "127.0.0.1", 0) as front, Caller(service, front.url) as caller:
        try:
            yield caller
        finally:
            service.cancel_all()
            caller.close()
    service.records.spool.close()
    idle()


@pytest.fixture(scope="module")
def caller() -> Iterator[Caller]:
    """A caller of a server with the usual limits."""
    with served() as caller:
        yield caller


@pytest.fixture
def serve() -> Iterator[Callable[..., Caller]]:
    """`serve(Limits(...)) -> Caller`: a server of the test's own."""
    with ExitStack() as stack:
        yield lambda *args, **options: stack.enter_context(served(*args, **options))


def level(folder: Path) -> set[str]:
    """The spools that there are in a folder for temporary files."""
    return {path.name for path in folder.glob("triptych-results-*")}
