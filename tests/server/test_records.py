"""Records: every request's end is told, whatever the disk does."""

import asyncio
import errno
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from filming import Client
from serving import LONG, QUICK, engine, idle

from triptych.engine.job import Job
from triptych.errors import Cancelled
from triptych.server.jobs import JobStore, StoredJob
from triptych.server.limits import Limits
from triptych.server.problems import problem_of
from triptych.server.records import Record, Records


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


def test_on_a_full_disk_what_is_deleted_makes_room_for_itself(
    film: Callable[..., Client], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = JobStore(tmp_path)
    client = film(engine(), None, store)
    words = "SELECT RAISE(ABORT, 'database or disk is full')"
    store._database.create_function("is_full", 0, lambda: False)
    store._database.execute(f"CREATE TEMP TRIGGER full BEFORE DELETE ON jobs WHEN is_full() BEGIN {words}; END")
    for name in ("deleted", "trimmed"):
        address = submit(client, QUICK)
        ended(address)
        folder = store.results / address.rpartition("/")[2]
        store._database.create_function("is_full", 0, folder.exists)
        if name == "deleted":
            assert httpx.delete(address).status_code == 204
        else:
            client.service.records.limits = Limits(kept=0)
            httpx.get(f"{address}/result")
        assert httpx.get(address).status_code == 404
        end = time.monotonic() + 10
        while folder.exists() or store.all():
            assert time.monotonic() < end
            time.sleep(0.02)
    assert caplog.text.count("its files are removed before its row: database or disk is full") == 2
    assert client.service.records.spool.nbytes == 0


def test_a_request_whose_row_cannot_be_removed_is_still_there_to_be_deleted(
    film: Callable[..., Client], tmp_path: Path
) -> None:
    store = JobStore(tmp_path)
    client = film(engine(), None, store)
    address = submit(client, QUICK)
    ended(address)
    with locked(store):
        assert httpx.delete(address).status_code == 500
        assert list(store.results.iterdir()) == []
    assert httpx.delete(address).status_code == 204
    assert store.all() == []


def test_a_request_that_is_cancelled_before_the_engine_has_it_is_not_left_to_the_next_server(tmp_path: Path) -> None:
    store = JobStore(tmp_path)
    records, job = Records(Limits(), store), Job()
    record = Record(job.id, None, 7, "images", time.time())

    async def cancel_early() -> None:
        records.add(record)
        records.give_up(record, "cancelled")
        store.add(StoredJob(record.id, "fingerprint", "images", 7, record.created), b"{}")
        record.lasting, record.job = True, job
        records.listen(record, job, asyncio.get_running_loop())
        job.tell("queued", position=0)
        job.end(Cancelled("the request was cancelled"))
        end = time.monotonic() + 10
        while store.all()[0].status != "cancelled":
            assert time.monotonic() < end
            await asyncio.sleep(0.01)

    asyncio.run(cancel_early())
    assert ([event.kind for event in record.events], record.job) == (["cancelled"], None)
    assert store.all()[0].error is not None
    store.close()
    records.spool.close()


@pytest.mark.parametrize("late", ["job", "row"])
def test_a_request_that_is_deleted_before_it_has_its_job_or_its_row_is_not_left_to_the_next_server(
    film: Callable[..., Client], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: str
) -> None:
    store = JobStore(tmp_path)
    client = film(engine(), None, store)
    reached, deleted = threading.Event(), threading.Event()
    owner, name = (engine(), "submit") if late == "job" else (store, "add")
    admit = getattr(owner, name)

    def slowly(*args: Any, **options: Any) -> Any:
        reached.set()
        assert deleted.wait(30)
        return admit(*args, **options)

    monkeypatch.setattr(owner, name, slowly)
    with ThreadPoolExecutor(1) as thread:
        submitted = thread.submit(submit, client, LONG)
        assert reached.wait(30)
        (record,) = client.service.records.all()
        assert httpx.delete(f"{client.root}/v1/requests/{record.id}").status_code == 204
        deleted.set()
        assert httpx.get(submitted.result()).status_code == 404
    assert store.all() == []
    assert list((tmp_path / "inputs").iterdir()) == []
    assert idle()


@pytest.mark.parametrize("late", ["row", "job"])
def test_a_request_that_comes_too_late_to_be_kept_is_refused_and_stopped(
    film: Callable[..., Client], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: str
) -> None:
    store = JobStore(tmp_path)
    client = film(engine(), None, store)
    owner, name = (store, "add") if late == "row" else (engine(), "submit")
    admit = getattr(owner, name)

    def leave(*args: Any, **options: Any) -> Any:
        client.service.draining = True
        store.close()
        if late == "job":  # the engine was closed, too
            raise Cancelled("the engine was closed")
        return admit(*args, **options)

    monkeypatch.setattr(owner, name, leave)
    response = httpx.post(f"{client.root}/v1/requests", json={"parameters": LONG}, timeout=30)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "not_ready")
    assert response.json()["error"]["message"] == "the server is shutting down"
    assert "Retry-After" in response.headers
    assert client.service.records.all() == []
    assert list((tmp_path / "inputs").iterdir()) == []
    assert idle()
    store = JobStore(tmp_path)
    assert store.all() == []
    store.close()


def test_pictures_whose_addresses_come_too_late_to_be_kept_are_refused(
    film: Callable[..., Client], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = JobStore(tmp_path)
    client = film(engine(), None, store)
    add = store.add

    def leave(*args: Any) -> None:
        store.close()
        add(*args)

    monkeypatch.setattr(store, "add", leave)
    body = {"prompt": "a dog", "num_inference_steps": 1, "response_format": "url"}
    response = httpx.post(f"{client.root}/v1/images/generations", json=body, timeout=30)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "not_ready")
    assert list(store.results.iterdir()) == []


def test_pictures_whose_row_cannot_be_written_leave_no_files_and_take_no_space(
    film: Callable[..., Client], tmp_path: Path
) -> None:
    store = JobStore(tmp_path)
    client = film(engine(), None, store)
    words = "SELECT RAISE(ABORT, 'database or disk is full')"
    store._database.execute(f"CREATE TEMP TRIGGER full BEFORE INSERT ON jobs BEGIN {words}; END")
    body = {"prompt": "a dog", "num_inference_steps": 1, "response_format": "url"}
    response = httpx.post(f"{client.root}/v1/images/generations", json=body, timeout=30)
    assert response.status_code == 500 and "database or disk is full" in response.text
    assert (list(store.results.iterdir()), client.service.records.spool.nbytes) == ([], 0)


def test_a_full_disk_is_507() -> None:
    with closing(sqlite3.connect(":memory:")) as database, pytest.raises(sqlite3.Error) as caught:
        database.execute("PRAGMA max_page_count = 1")
        database.execute("CREATE TABLE jobs (id)")
    for error in (caught.value, OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EDQUOT, "quota")):
        problem = problem_of(error)
        assert (problem.status, problem.code) == (507, "no_space")
    for error in (sqlite3.OperationalError("database is locked"), OSError(errno.EIO, "Input/output error")):
        assert problem_of(error).status == 500


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
