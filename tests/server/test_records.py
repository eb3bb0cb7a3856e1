"""Records: every request's end is told, whatever the disk does."""

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from filming import Client
from serving import LONG, QUICK, engine

from triptych.server.jobs import JobStore
from triptych.server.limits import Limits


@contextmanager
def locked(store: JobStore) -> Iterator[None]:
    """Have another process be in the middle of a change to the table, so that nothing can be noted."""
    store._database.execute("PRAGMA busy_timeout = 1")  # milliseconds
    with closing(sqlite3.connect(store.folder / "jobs.sqlite3", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield


def submit(client: Client, parameters: dict[str, Any]) -> str:
    response = httpx.post(f"{client.root}/v1/requests", json={"parameters": parameters}, timeout=30)
    assert response.status_code == 202, response.text
    return f"{client.root}/v1/requests/{response.json()['id']}"


def ended(address: str) -> dict[str, Any]:
    end = time.monotonic() + 30
    while (status := httpx.get(address).json())["status"] in ("queued", "running"):
        assert time.monotonic() < end, status
        time.sleep(0.02)
    return status


FEW = {**QUICK, "num_inference_steps": 12}
"""So many that the table is locked before they are done."""


def test_a_result_whose_end_cannot_be_noted_is_there_and_is_made_anew_by_the_next_server(
    film: Callable[..., Client], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = JobStore(tmp_path)
    client = film(engine(), None, store)
    address = submit(client, FEW)
    with locked(store):
        assert ended(address)["status"] == "done"
        assert httpx.get(f"{address}/result").content.startswith(b"\x89PNG")
        assert "the job store cannot note that it is done: database is locked" in caplog.text
    store.close()
    store = JobStore(tmp_path)
    assert [job.status for job in store.all()] == ["queued"]
    store.close()


def test_a_result_that_cannot_be_kept_fails_though_that_cannot_be_noted_either(
    film: Callable[..., Client], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = JobStore(tmp_path)
    client = film(engine(), Limits(kept_bytes=1000), store)
    address = submit(client, FEW)
    with locked(store):
        status = ended(address)
        assert (status["status"], "larger than the 1000 kept" in status["error"]["message"]) == ("failed", True)
        assert "the job store cannot note that it is failed: database is locked" in caplog.text


def test_a_request_that_ends_without_a_result_says_so_though_that_cannot_be_noted(
    film: Callable[..., Client], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = JobStore(tmp_path)
    client = film(engine(), None, store)
    address = submit(client, LONG)
    with locked(store):
        httpx.post(f"{address}/cancel")
        assert ended(address)["status"] == "cancelled"
        end = time.monotonic() + 10
        while "the job store cannot note that it is cancelled" not in caplog.text:
            assert time.monotonic() < end
            time.sleep(0.02)
