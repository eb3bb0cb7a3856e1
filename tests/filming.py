"""Tiny Wan models behind a real HTTP server, for tests of videos."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from serving import _cache

from triptych.engine.base import Engine
from triptych.engine.local import LocalEngine
from triptych.server.app import create_app
from triptych.server.front import Front
from triptych.server.jobs import JobStore
from triptych.server.limits import Limits
from triptych.server.service import Service


class Client(openai.OpenAI):
    """The official client of a server that runs in this process.

    Attributes:
        service: the other side.
        root: where it listens.
    """

    service: Service
    root: str


@pytest.fixture(scope="session")
def wan(tiny_repo: Callable[..., Path]) -> Iterator[Engine]:
    """Text to video: 4 pixels a latent, 2 frames a latent, 16 frames a second."""
    yield from loaded(tiny_repo("wan"))


@pytest.fixture(scope="session")
def wan_i2v(tiny_repo: Callable[..., Path]) -> Iterator[Engine]:
    """Video from a first frame."""
    yield from loaded(tiny_repo("wan_i2v"))


def loaded(repository: Path) -> Iterator[Engine]:
    """Yield an engine for a repository, and close it."""
    os.environ["TRIPTYCH_CACHE"] = _cache.name
    devices: dict[str, Any] = dict.fromkeys(("encoder", "denoiser", "decoder"), "cpu")
    engine = LocalEngine(repository, **devices, warm_up=False)
    atexit.register(engine.close, 0)
    yield engine
    engine.close(0)


@contextmanager
def serving(engine: Engine | None, limits: Limits | None = None, store: JobStore | None = None) -> Iterator[Client]:
    """Serve for a while; at the end the store is closed first, as `triptych serve` does it."""
    service = Service(limits, engine, store)
    with Front(create_app(service), "127.0.0.1", 0) as front:
        client = Client(base_url=f"{front.url}/v1", api_key="none", max_retries=0)
        client.service, client.root = service, front.url
        try:
            yield client
        finally:
            if store is not None:
                store.close()
            service.draining = True
            service.cancel_all()
            client.close()
    service.records.spool.close()


@pytest.fixture
def film() -> Iterator[Callable[..., Client]]:
    """`film(engine, limits, store) -> Client`: a server of the test's own."""
    with ExitStack() as stack:
        yield lambda *args: stack.enter_context(serving(*args))


@pytest.fixture(scope="module")
def filmer(wan: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A client of a server of tiny Wan that keeps videos."""
    with serving(wan, None, JobStore(tmp_path_factory.mktemp("state"))) as client:
        yield client
