"""Resuming: what a server finds of the one before it, however that one ended."""

import base64
import io
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakSet

import httpx
import pytest
from filming import Client, serving
from PIL import Image
from serving import engine as embedded_engine

import triptych
from triptych import embedded
from triptych.engine.base import Engine
from triptych.errors import Cancelled
from triptych.server import resume
from triptych.server.jobs import JobStore, StoredJob, is_ours
from triptych.server.limits import Limits
from triptych.server.openai.video_order import order_of
from triptych.server.submission import Pictures, request_of

QUICK: dict[str, Any] = {"prompt": "a fox", "size": "48x32", "num_inference_steps": 2, "seed": 7, "num_frames": 5}
QUICK |= {"exact": True}
LONG = {**QUICK, "num_inference_steps": 700}


@contextmanager
def process(model: Path, folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`triptych serve MODEL --state-dir FOLDER` on a free port, and its URL."""
    variables = {"PYTHONPATH": str(Path(triptych.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    devices = [f"--{role}=cpu" for role in ("encoder", "denoiser", "decoder")]
    started = subprocess.Popen(
        [sys.executable, "-m", "triptych", "serve", str(model), "--port", "0", *devices, "--no-warm-up"]
        + ["--state-dir", str(folder), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **variables, "TRIPTYCH_CACHE": str(folder.parent)},
    )
    try:
        assert started.stdout is not None and started.stderr is not None
        line = started.stdout.readline()
        found = re.search(r"http://[\d.:]+", line)
        assert found, (line, started.stderr.read())
        yield started, found[0]
    finally:
        started.kill()
        started.communicate()


def until(address: str, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    end = time.monotonic() + 60
    while not holds(video := httpx.get(address, timeout=30).json()):
        assert time.monotonic() < end, video
        time.sleep(0.01)
    return video


def is_done(video: dict[str, Any]) -> bool:
    return video["status"] in ("completed", "failed")


@pytest.mark.slow  # as the next, with videos
def test_nothing_is_lost_by_a_server_that_is_killed(tiny_repo: Any, tmp_path: Path) -> None:
    model, state = tiny_repo("wan"), tmp_path / "state"
    slow = {**QUICK, "num_inference_steps": 120, "num_frames": 9}
    with process(model, state, "--slots", "denoiser=1") as (server, url):
        finished = httpx.post(f"{url}/v1/videos", json=QUICK).json()["id"]
        until(f"{url}/v1/videos/{finished}", is_done)
        content = httpx.get(f"{url}/v1/videos/{finished}/content").content
        running = httpx.post(f"{url}/v1/videos", json=slow).json()["id"]
        queued = [httpx.post(f"{url}/v1/videos", json={**QUICK, "seed": seed}).json()["id"] for seed in (8, 9)]
        removed = httpx.post(f"{url}/v1/videos", json=QUICK).json()["id"]
        assert httpx.delete(f"{url}/v1/videos/{removed}").json()["deleted"]
        until(f"{url}/v1/videos/{running}", lambda video: video["progress"] > 5)
        server.send_signal(signal.SIGKILL)
        server.wait()
    with process(model, state, "--drain", "0") as (server, url):
        listed = httpx.get(f"{url}/v1/videos", params={"order": "asc"}).json()["data"]
        assert [video["id"] for video in listed] == [finished, running, *queued]
        assert listed[0]["status"] == "completed"
        assert httpx.get(f"{url}/v1/videos/{finished}/content").content == content
        assert httpx.get(f"{url}/v1/videos/{finished}/content?variant=thumbnail").content.startswith(b"RIFF")
        for name in (running, *queued):
            events = httpx.get(f"{url}/v1/requests/{name}/events", headers={"Last-Event-ID": "500"}, timeout=60).text
            assert "event: done" in events
            assert until(f"{url}/v1/videos/{name}", is_done)["status"] == "completed"
        same = httpx.post(f"{url}/v1/videos", json=slow).json()["id"]
        until(f"{url}/v1/videos/{same}", is_done)
        again = [httpx.get(f"{url}/v1/videos/{name}/content").content for name in (running, same)]
        assert again[0] == again[1]
        assert "died while it ran this" in httpx.get(f"{url}/v1/requests/{running}").text
        assert httpx.get(f"{url}/v1/videos/{removed}").status_code == 404
        assert list((state / "inputs").iterdir()) == []
        later = httpx.post(f"{url}/v1/videos", json={**slow, "num_inference_steps": 900}).json()["id"]
        until(f"{url}/v1/videos/{later}", lambda video: video["status"] == "in_progress")
        server.send_signal(signal.SIGTERM)
        assert server.wait(20) == 0
    store = JobStore(state)
    kept = {job.id: job for job in store.all()}
    assert (kept[later].status, kept[later].interruptions) == ("queued", 0)
    assert kept[running].interruptions == 1
    store.close()


def ended(status: dict[str, Any]) -> bool:
    return status["status"] in ("done", "failed", "cancelled")


def test_no_request_is_lost_by_a_server_that_is_killed(tmp_path: Path) -> None:
    def post(url: str, deadline: float | None = None, **parameters: Any) -> str:
        body = {"parameters": {"prompt": "a red heart", "exact": True, **parameters}, "deadline": deadline}
        response = httpx.post(f"{url}/v1/requests", json=body, timeout=30)
        assert response.status_code == 202, response.text
        return f"/v1/requests/{response.json()['id']}"

    model, state, slow = embedded.path(), tmp_path / "state", {"seed": 7, "num_inference_steps": 40}
    with process(model, state, "--slots", "denoiser=1") as (server, url):
        finished, late = post(url, num_inference_steps=1), post(url, 0.001, num_inference_steps=900)
        before = [until(url + each, ended) for each in (finished, late)]
        picture = httpx.get(f"{url}{finished}/result").content
        body = {"prompt": "a dog", "num_inference_steps": 1, "response_format": "url", "n": 2}
        answer = httpx.post(f"{url}/v1/images/generations", json=body, timeout=30).json()
        addresses = [each["url"].removeprefix(url) for each in answer["data"]]
        pictures = [httpx.get(url + each).content for each in addresses]
        running = post(url, **slow)
        queued = [post(url, num_inference_steps=2, num_images_per_prompt=2) for _ in range(2)]
        removed, cancelled, overdue = post(url), post(url), post(url, 2.0, num_inference_steps=900)
        assert httpx.delete(url + removed).status_code == 204
        httpx.post(f"{url}{cancelled}/cancel")
        until(url + running, lambda status: (status["progress"] or {}).get("step") is not None)
        server.send_signal(signal.SIGKILL)
        server.wait()
    time.sleep(2)  # the deadline of the one that is overdue then
    with process(model, state, "--drain", "0") as (server, url):
        after = [httpx.get(url + each).json() for each in (finished, late)]
        assert after[0].pop("seconds") == pytest.approx(before[0].pop("seconds"), abs=0.25)
        assert after == before
        assert before[1]["error"]["code"] == "deadline_exceeded"
        assert httpx.get(f"{url}{finished}/result").content == picture
        webp = httpx.get(f"{url}{finished}/result?format=webp")
        assert (webp.status_code, webp.headers["content-type"]) == (200, "image/webp"), "not fetched so before"
        assert [httpx.get(url + each).content for each in addresses] == pictures
        for each in (running, *queued):
            assert until(url + each, ended)["status"] == "done"
        assert "died while it ran this" in httpx.get(url + running).text
        assert httpx.get(f"{url}{queued[0]}/result?index=1").status_code == 200
        again = post(url, **slow)
        until(url + again, ended)
        assert httpx.get(f"{url}{again}/result").content == httpx.get(f"{url}{running}/result").content
        assert httpx.get(url + removed).status_code == 404
        assert until(url + cancelled, ended)["status"] == "cancelled"
        assert until(url + overdue, ended)["error"]["code"] == "deadline_exceeded"
        assert list((state / "inputs").iterdir()) == []
        left = post(url, num_inference_steps=900)
        server.send_signal(signal.SIGTERM)
        assert server.wait(20) == 0
    store = JobStore(state)
    assert {job.id: (job.status, job.interruptions) for job in store.all()}[left.rpartition("/")[2]] == ("queued", 0)
    store.close()


def test_addresses_of_pictures_expire_even_while_no_server_runs(tmp_path: Path) -> None:
    body = {"prompt": "a dog", "num_inference_steps": 1, "response_format": "url"}
    with serving(embedded_engine(), None, JobStore(tmp_path)) as client:
        answer = httpx.post(f"{client.root}/v1/images/generations", json=body, timeout=30).json()
        path = answer["data"][0]["url"].removeprefix(client.root)
    for limits, status in ((None, 200), (Limits(kept_seconds=1.0), 404)):
        time.sleep(0.6)
        with serving(embedded_engine(), limits, JobStore(tmp_path)) as client:
            assert httpx.get(client.root + path).status_code == status
            held = sum(each.stat().st_size for each in (tmp_path / "results").rglob("*.png"))
            assert (client.service.records.spool.nbytes, held > 0) == (held, status == 200)


@pytest.fixture
def stored(wan: Engine, tmp_path: Path) -> Callable[..., JobStore]:
    """`stored(status=..., **more) -> JobStore`: with one video of a server before."""

    def make(status: str = "queued", interruptions: int = 0, **more: Any) -> JobStore:
        store = JobStore(tmp_path / "state")
        order = order_of(order_fields(QUICK), wan, Limits())
        job = StoredJob("video_1", wan.front.fingerprint, "videos", 7, time.time() - 10, order.told, **more)
        store.add(job, order.submission.model_dump_json().encode())
        for _ in range(interruptions):
            store.interrupted("video_1")
        if status == "running":
            store.started("video_1")
        return store

    return make


def order_fields(values: dict[str, Any]) -> Any:
    from triptych.server.openai.form import Fields

    return Fields(values)


def wait(client: Client, holds: Callable[[Any], bool]) -> dict[str, Any]:
    return until(f"{client.root}/v1/videos/video_1", holds)


def test_a_request_that_three_servers_died_of_has_failed(wan: Engine, stored: Callable[..., JobStore]) -> None:
    with serving(wan, None, stored("running", interruptions=2)) as client:
        failed = wait(client, is_done)
    assert failed["status"] == "failed"
    assert "died 3 times while it ran this" in failed["error"]["message"]


def test_a_request_that_two_servers_died_of_is_run_again(wan: Engine, stored: Callable[..., JobStore]) -> None:
    with serving(wan, None, stored("running", interruptions=1)) as client:
        assert wait(client, is_done)["status"] == "completed"


def test_until_the_engine_is_there_requests_are_queued_and_can_be_cancelled(
    wan: Engine, stored: Callable[..., JobStore]
) -> None:
    store = stored()
    store.add(StoredJob("video_2", wan.front.fingerprint, "videos", 7, time.time(), store.all()[0].told), b"{}")
    with serving(None, None, store) as client:
        assert wait(client, lambda video: "status" in video)["status"] == "queued"
        httpx.post(f"{client.root}/v1/requests/video_2/cancel")
        assert until(f"{client.root}/v1/videos/video_2", is_done)["error"]["code"] == "cancelled"
        client.service.engine = wan
        assert wait(client, is_done)["status"] == "completed"
        assert until(f"{client.root}/v1/videos/video_2", is_done)["status"] == "failed"


def test_deadlines_hold_while_the_model_is_loaded(wan: Engine, stored: Callable[..., JobStore]) -> None:
    store = stored()
    told, body = store.all()[0].told, json.loads(store.submission("video_1"))
    soon = StoredJob("video_2", wan.front.fingerprint, "videos", 7, time.time(), told)
    store.add(soon, json.dumps({**body, "deadline": 1.0}).encode())
    with serving(None, None, store) as client:
        assert httpx.get(f"{client.root}/v1/videos/video_2").json()["status"] == "queued"
        time.sleep(2)
        failed = httpx.get(f"{client.root}/v1/videos/video_2").json()
        assert (failed["status"], failed["error"]["code"]) == ("failed", "deadline_exceeded")
        assert httpx.get(f"{client.root}/v1/videos/video_1").json()["status"] == "queued"
        end = time.monotonic() + 10
        while store.all()[1].status != "failed":  # so that the next server does not run it
            assert time.monotonic() < end
            time.sleep(0.01)
        client.service.engine = wan
        assert wait(client, is_done)["status"] == "completed"


def test_requests_of_before_are_run_though_others_have_taken_every_place(
    wan: Engine, stored: Callable[..., JobStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wan.router, "max_waiting", 1)
    with serving(None, None, stored()) as client:
        long = order_of(order_fields(LONG), wan, Limits())
        job = wan.submit(request_of(long.submission, Limits()))
        client.service.engine = wan
        end = time.monotonic() + 10
        while client.service.records.get("video_1").job is None:
            assert time.monotonic() < end, "it starves"
            time.sleep(0.01)
        assert httpx.post(f"{client.root}/v1/videos", json=QUICK).status_code == 429
        assert job.status not in ("done", "failed")
        job.cancel()
        assert wait(client, is_done)["status"] == "completed"


def stored_with_a_picture(engine: Engine, folder: Path) -> tuple[JobStore, dict[str, Any]]:
    """A job store with one video of a server before, which begins with a picture; and what it is told of."""
    file = io.BytesIO()
    Image.new("RGB", (48, 32)).save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    order = order_of(order_fields({**QUICK, "input_reference": {"image_url": url}}), engine, Limits())
    assert order.request.release is not None
    order.request.release()  # of the one that was looked at to write it down
    store = JobStore(folder)
    job = StoredJob("video_1", engine.front.fingerprint, "videos", 7, time.time(), order.told)
    store.add(job, order.submission.model_dump_json().encode())
    return store, dict(order.told)


def test_a_request_of_before_waits_until_there_is_room_for_its_pictures(
    wan_i2v: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pictures, "_all", WeakSet())
    store, told = stored_with_a_picture(wan_i2v, tmp_path / "state")
    job = StoredJob("video_2", wan_i2v.front.fingerprint, "videos", 7, time.time(), {**told, "fps": 8.0})
    store.add(job, b'{"parameters": {"prompt": "a fox"}}')
    others = Pictures(Limits())
    others.pixels = Limits().waiting_pixels
    with serving(wan_i2v, None, store) as client:
        until(f"{client.root}/v1/videos/video_2", is_done)  # it has no pictures, and its turn before those that wait
        time.sleep(1)
        assert wait(client, lambda video: "status" in video)["status"] == "queued"
        assert sum(each.pixels for each in Pictures._all) == others.pixels, "what was tried holds nothing"
        others.release()
        assert wait(client, is_done)["status"] == "completed"
    assert not Pictures._all


def test_a_request_of_before_that_is_cancelled_while_it_is_read_holds_no_room(
    wan_i2v: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, go_on, read = threading.Event(), threading.Event(), threading.Event()

    def slowly(*args: Any, **options: Any) -> Any:
        entered.set()
        assert go_on.wait(30)
        request = request_of(*args, **options)
        read.set()
        return request

    monkeypatch.setattr(Pictures, "_all", WeakSet())
    store, _ = stored_with_a_picture(wan_i2v, tmp_path / "state")
    monkeypatch.setattr(resume, "request_of", slowly)
    with serving(wan_i2v, None, store) as client:
        assert entered.wait(30)
        httpx.post(f"{client.root}/v1/requests/video_1/cancel")
        go_on.set()
        assert read.wait(30)
        end = time.monotonic() + 30
        while len(wan_i2v.router) or any(each.pixels for each in Pictures._all):
            assert time.monotonic() < end
            time.sleep(0.01)
        assert wait(client, is_done)["error"]["code"] == "cancelled"


def test_a_request_that_a_closing_engine_refuses_is_left_to_the_next_server(
    wan: Engine, stored: Callable[..., JobStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, refused = stored(), threading.Event()

    def refuse(*_: Any, **__: Any) -> None:
        store.close()
        refused.set()
        raise Cancelled("the engine was closed")

    monkeypatch.setattr(wan, "submit", refuse)
    with serving(wan, None, store) as client:
        assert refused.wait(30)
        time.sleep(0.3)
        assert wait(client, lambda video: True)["status"] == "queued"
    store = JobStore(store.folder)
    assert [each.status for each in store.all()] == ["queued"]
    store.close()


def test_a_request_for_another_model_fails_with_the_reason(wan_i2v: Engine, stored: Callable[..., JobStore]) -> None:
    with serving(wan_i2v, None, stored()) as client:
        failed = wait(client, is_done)
    assert "it was asked of another model" in failed["error"]["message"]


def test_a_submission_that_is_damaged_fails_with_the_reason(wan: Engine, stored: Callable[..., JobStore]) -> None:
    store = stored()
    (store.folder / "inputs" / "video_1.json").write_bytes(b"{")
    with serving(wan, None, store) as client:
        assert wait(client, is_done)["error"]["code"] == "bad_request"
    assert json.loads(store.folder.joinpath("lock").read_text() or "null") is None


def test_results_of_a_server_before_count_and_go_first(wan: Engine, tmp_path: Path) -> None:
    with serving(wan, None, JobStore(tmp_path)) as client:
        for _ in range(2):
            made = httpx.post(f"{client.root}/v1/videos", json=QUICK).json()["id"]
            until(f"{client.root}/v1/videos/{made}", is_done)
        held = client.service.records.spool.nbytes
    assert held == sum(path.stat().st_size for path in (tmp_path / "results").rglob("*") if path.is_file())
    with serving(wan, Limits(kept_bytes=held), JobStore(tmp_path)) as client:
        assert client.service.records.spool.nbytes == held
        newest = httpx.post(f"{client.root}/v1/videos", json=QUICK).json()["id"]
        until(f"{client.root}/v1/videos/{newest}", is_done)
        until(f"{client.root}/v1/videos", lambda page: len(page["data"]) == 2)
        kept = [video["id"] for video in httpx.get(f"{client.root}/v1/videos").json()["data"]]
        assert kept == [newest, made]
        end = time.monotonic() + 10
        while len(list((tmp_path / "results").iterdir())) > 2 and time.monotonic() < end:
            time.sleep(0.02)
        assert sorted(path.name for path in (tmp_path / "results").iterdir()) == sorted(kept)


def test_what_requests_leave_behind_is_known_for_ours(wan: Engine, tmp_path: Path) -> None:
    parameters = {"prompt": "a dog", "num_inference_steps": 1}
    with serving(embedded_engine(), None, JobStore(tmp_path)) as client:
        body = {**parameters, "response_format": "url"}
        assert httpx.post(f"{client.root}/v1/images/generations", json=body, timeout=30).status_code == 200
        made = httpx.post(f"{client.root}/v1/requests", json={"parameters": parameters}, timeout=30).json()["id"]
        until(f"{client.root}/v1/requests/{made}", ended)
    with serving(wan, None, JobStore(tmp_path)) as client:
        made = httpx.post(f"{client.root}/v1/videos", json=QUICK).json()["id"]
        until(f"{client.root}/v1/videos/{made}", is_done)
    left = [path.name for path in (tmp_path / "results").iterdir()]
    assert {name.partition("_")[0] for name in left} == {"image", "req", "video"}
    assert all(is_ours(name) for name in left)


def numbers(client: Client, name: str, last: int | str) -> list[int]:
    """The numbers of the events that a reader is told whose last one was this."""
    address = f"{client.root}/v1/requests/{name}/events"
    response = httpx.get(address, headers={"Last-Event-ID": str(last)}, timeout=60)
    assert (response.status_code, response.text) in ((200, response.text), (204, ""))
    return [int(each) for each in re.findall(r"^id: (\d+)$", response.text, flags=re.MULTILINE)]


def test_a_reader_of_a_server_before_learns_the_end_whatever_it_had_seen(tmp_path: Path) -> None:
    body = {"parameters": {"prompt": "a dog", "num_inference_steps": 1}}
    with serving(embedded_engine(), None, JobStore(tmp_path)) as client:
        name = httpx.post(f"{client.root}/v1/requests", json=body, timeout=30).json()["id"]
        seen = numbers(client, name, "")
    with serving(embedded_engine(), None, JobStore(tmp_path)) as client:
        (end,) = numbers(client, name, "")
        assert [numbers(client, name, last) for last in (*seen, 500)] == [[end]] * (len(seen) + 1)
        assert numbers(client, name, end) == []
    with serving(embedded_engine(), None, JobStore(tmp_path)) as client:
        assert len(numbers(client, name, 0)) == 1


def test_a_request_that_is_run_again_tells_all_anew(wan: Engine, stored: Callable[..., JobStore]) -> None:
    with serving(wan, None, stored()) as client:
        wait(client, is_done)
        told = numbers(client, "video_1", "")
        assert [numbers(client, "video_1", last) for last in range(len(told))] == [told] * len(told)
        assert numbers(client, "video_1", told[2]) == told[3:]


def test_a_full_disk_keeps_no_server_from_starting_and_stopping(
    wan: Engine, stored: Callable[..., JobStore], caplog: pytest.LogCaptureFixture
) -> None:
    store = stored("running")
    with closing(sqlite3.connect(store.folder / "jobs.sqlite3")) as database:
        words = "SELECT RAISE(ABORT, 'database or disk is full')"
        database.execute(f"CREATE TRIGGER full BEFORE UPDATE ON jobs BEGIN {words}; END")
    with serving(wan, None, store) as client:
        assert wait(client, is_done)["status"] == "completed"
    assert "cannot note that the server's process died while it ran: database or disk is full" in caplog.text
    assert store.closed
    JobStore(store.folder).close()


def test_a_request_that_is_cancelled_while_it_is_given_to_the_engine_has_one_end(
    wan: Engine, stored: Callable[..., JobStore], caplog: pytest.LogCaptureFixture
) -> None:
    store = stored()
    store.submission = partial(cancelled_meanwhile, store, store.submission)  # type: ignore[method-assign]
    with serving(None, None, store) as client:
        store.client = client  # type: ignore[attr-defined]
        client.service.engine = wan
        wait(client, is_done)
        end = time.monotonic() + 30
        while client.service.records.get("video_1").job is not None or len(wan.router):
            assert time.monotonic() < end
            time.sleep(0.01)
        assert [each.kind for each in client.service.records.get("video_1").events] == ["cancelled"]
    assert "cannot be run again" not in caplog.text


def cancelled_meanwhile(store: Any, submission: Callable[[str], bytes], name: str) -> bytes:
    """Read what was submitted, and have its caller cancel it before the engine gets it."""
    read = submission(name)
    httpx.post(f"{store.client.root}/v1/requests/{name}/cancel")
    return read


def test_videos_expire_even_while_no_server_runs(wan: Engine, tmp_path: Path) -> None:
    limits = Limits(video_seconds=0.5)
    with serving(wan, limits, JobStore(tmp_path)) as client:
        made = httpx.post(f"{client.root}/v1/videos", json=QUICK).json()["id"]
        video = until(f"{client.root}/v1/videos/{made}", is_done)
        assert video["expires_at"] - video["completed_at"] in (0, 1)
    time.sleep(0.6)
    with serving(wan, limits, JobStore(tmp_path)) as client:
        until(f"{client.root}/v1/videos", lambda page: page["data"] == [])
