"""Uploads: bodies that come too slowly, too many at once or never end, and connections that say nothing."""

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx
import pytest
from serving import QUICK, Caller

from triptych.server import front
from triptych.server.limits import Limits
from triptych.server.uploads import SMALL


@contextmanager
def connection(caller: Caller, *headers: str, path: str = "/v1/requests") -> Iterator[socket.socket]:
    """A request whose head has been sent and whose body has not."""
    address = httpx.URL(caller.url)
    with socket.create_connection((address.host, address.port or 0), timeout=10) as opened:
        head = "\r\n".join((f"POST {path} HTTP/1.1", f"Host: {address.host}", *headers, "", ""))
        opened.sendall(head.encode())
        yield opened


def answer(opened: socket.socket) -> str:
    """What comes until the other side closes."""
    got = b""
    while piece := opened.recv(65536):
        got += piece
    return got.decode()


def test_a_body_that_pauses_is_408(serve: Callable[..., Caller]) -> None:
    caller = serve(Limits(upload_silence=0.3))
    with connection(caller, "Content-Length: 1000") as opened:
        opened.sendall(b"{")
        began = time.monotonic()
        told = answer(opened)
    assert told.startswith("HTTP/1.1 408 ")
    assert '"code":"upload_timeout"' in told
    assert 0.2 < time.monotonic() - began < 5


def test_a_body_that_trickles_is_408(serve: Callable[..., Caller]) -> None:
    caller = serve(Limits(upload_seconds=0.6))
    with connection(caller, "Transfer-Encoding: chunked") as opened:
        opened.settimeout(0.1)
        began = time.monotonic()
        told = b""
        while not told and time.monotonic() - began < 10:
            opened.sendall(b"1\r\n{\r\n")
            try:
                told = opened.recv(65536)
            except TimeoutError:
                pass
    assert told.startswith(b"HTTP/1.1 408 ")
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("path", ["/v1/requests", "/v1/images/generations"])
def test_a_caller_that_goes_away_while_it_uploads_is_no_failure_of_the_server(
    caller: Caller, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    def counted(status: str) -> str:
        return next((line for line in caller.get("/metrics").text.splitlines() if f'status="{status}"' in line), "0")

    gone, failed = counted("499"), counted("500")
    with connection(caller, "Content-Length: 1000", path=path) as opened:
        opened.sendall(b"{")
        time.sleep(0.1)
    end = time.monotonic() + 10
    while counted("499") == gone:
        assert time.monotonic() < end
        time.sleep(0.02)
    assert counted("500") == failed
    assert caplog.records == []


def test_large_uploads_are_bounded_and_small_ones_go_on(serve: Callable[..., Caller]) -> None:
    caller = serve(Limits(uploads=1))
    with connection(caller, f"Content-Length: {SMALL + 1}") as opened:
        opened.sendall(b"{")
        end = time.monotonic() + 10
        while (response := caller.post("/v1/requests", content=b" " * (SMALL + 1))).status_code != 503:
            assert time.monotonic() < end, response.text
        assert response.json()["error"]["code"] == "too_many_uploads"
        assert "Retry-After" in response.headers
        assert caller.post("/v1/requests", json={"parameters": QUICK}).status_code == 202
    while caller.post("/v1/requests", content=b" " * (SMALL + 1)).status_code == 503:  # the slot comes back
        assert time.monotonic() < end


def test_every_path_has_the_bound_of_a_body(serve: Callable[..., Caller]) -> None:
    caller = serve(Limits(body=1000))
    for content in (b"x" * 2000, iter([b"x" * 500] * 4)):
        response = caller.post("/v1/pools/denoiser", content=content)
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "too_large"


def test_a_connection_that_says_nothing_is_let_go(
    serve: Callable[..., Caller], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(front, "HEAD", 0.3)
    caller = serve()
    address = httpx.URL(caller.url)
    for head in (b"", b"GET /health HTTP/1.1\r\nHost:"):
        with socket.create_connection((address.host, address.port or 0), timeout=10) as opened:
            opened.sendall(head)
            began = time.monotonic()
            assert opened.recv(10) == b""
            assert time.monotonic() - began < 5


def test_more_steps_than_the_bound_are_refused(serve: Callable[..., Caller]) -> None:
    caller = serve(Limits(steps=5))
    response = caller.post("/v1/requests", json={"parameters": {**QUICK, "num_inference_steps": 6}})
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "num_inference_steps=6: at most 5 steps are accepted"


def test_the_events_of_finished_requests_are_bounded(serve: Callable[..., Caller]) -> None:
    caller = serve(Limits(kept_events=15))
    requests = [caller.submit({**QUICK, "num_inference_steps": 3}) for _ in range(3)]  # 8 events each
    end = time.monotonic() + 20
    while caller.get(requests[1]["links"]["self"]).status_code != 404:
        caller.service.records.trim()
        assert time.monotonic() < end
        time.sleep(0.05)
    assert caller.wait(requests[2])["status"] == "done"
