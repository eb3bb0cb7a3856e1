"""Callers that leave: whoever waits for an answer and goes stops the request before its next step but one."""

import socket
import time
from typing import Any

import httpx
import pytest
from filming import Client
from serving import Caller, engine, idle, settled

from triptych.engine.base import Engine
from triptych.engine.job import Job

PICTURE = {"prompt": "a dog", "num_inference_steps": 400, "size": "256x256"}
"""Of steps that take a while, so that they can be told apart."""
VIDEO = {"prompt": "a", "num_inference_steps": 700, "num_frames": 5, "size": "96x64", "guidance_scale": 1.0}


def steps(job: Job) -> int:
    return sum(event.kind == "step" for event in list(job._events))


def leave_within(url: str, path: str, body: dict[str, Any], service: Any) -> Job:
    """Ask for something, wait until it is being denoised, and hang up; returns the job, which must have been stopped.

    The step that was on its way may end, and another may have begun before the server learns of it.
    """
    address, known = httpx.URL(url), {record.id for record in service.records.all()}
    content = httpx.Request("POST", url, json=body)
    head = f"POST {path} HTTP/1.1\r\nHost: {address.host}\r\nContent-Type: application/json\r\n"
    end = time.monotonic() + 60
    with socket.create_connection((address.host, address.port or 0), timeout=30) as caller:
        caller.sendall(f"{head}Content-Length: {len(content.content)}\r\n\r\n".encode() + content.content)
        job: Job | None = None
        while job is None or steps(job) < 2:
            assert time.monotonic() < end
            job = job or next((each.job for each in service.records.all() if each.id not in known), None)
            time.sleep(0.001)
        before = steps(job)
    while job.status not in ("done", "failed", "cancelled"):
        assert time.monotonic() < end, "it goes on"
        time.sleep(0.001)
    assert job.status == "cancelled"
    assert steps(job) <= before + 2, "it went on for a while"
    return job


@pytest.mark.parametrize("more", [{}, {"stream": True}, {"stream": True, "partial_images": 3}, {"n": 2}], ids=str)
def test_pictures_that_nobody_waits_for_are_stopped(caller: Caller, more: dict[str, Any]) -> None:
    leave_within(caller.url, "/v1/images/generations", {**PICTURE, **more}, caller.service)
    assert idle()
    assert not engine().router.replicas[0].tickets
    assert settled(caller.service)


def test_videos_that_nobody_waits_for_are_stopped(filmer: Client, wan: Engine) -> None:
    leave_within(filmer.root, "/v1/videos/sync", VIDEO, filmer.service)
    end = time.monotonic() + 10
    while len(wan.router):
        assert time.monotonic() < end
        time.sleep(0.01)
    assert settled(filmer.service)


def test_a_picture_that_waits_for_its_turn_is_taken_out_of_the_queue(
    caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    (replica,) = engine().router.replicas
    monkeypatch.setattr(replica, "slots", dict.fromkeys(replica.slots, 0))  # nothing is started
    with pytest.raises(httpx.ReadTimeout):
        caller.post("/v1/images/generations", json=PICTURE, timeout=0.5)
    end = time.monotonic() + 10
    while len(engine().router):
        assert time.monotonic() < end, "it still waits"
        time.sleep(0.01)
