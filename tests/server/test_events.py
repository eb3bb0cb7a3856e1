"""Events: a stream that follows a request, can be taken up again, and costs nothing when its reader leaves."""

import base64
import io
import json
import socket
import time
from collections.abc import Callable
from typing import Any

import httpx
from PIL import Image
from serving import LONG, PROMPT, QUICK, Caller, idle, running

from triptych.server.limits import Limits


def read(response: httpx.Response, most: int = 10**6) -> list[tuple[int, str, dict[str, Any]]]:
    """The next events of a stream, at most so many: number, kind, data."""
    events: list[tuple[int, str, dict[str, Any]]] = []
    fields: dict[str, str] = {}
    for line in response.iter_lines():
        name, _, value = line.partition(": ")
        if line:
            fields[name] = value
        elif "data" in fields:
            events.append((int(fields["id"]), fields["event"], json.loads(fields["data"])))
            fields = {}
            if len(events) == most:
                break
    return events


def follow(caller: Caller, request: dict[str, Any], **headers: str) -> list[tuple[int, str, dict[str, Any]]]:
    with caller.stream("GET", request["links"]["events"], headers=headers) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        return read(response)


def test_every_event_comes_in_order_and_the_last_says_how_it_ended(caller: Caller) -> None:
    request = caller.submit({**QUICK, "num_inference_steps": 3})
    events = follow(caller, request)
    assert [number for number, _, _ in events] == list(range(len(events)))
    kinds = [kind for _, kind, _ in events]
    assert kinds == ["queued", "started", "started", "step", "step", "step", "started", "done"]
    assert [data["role"] for _, kind, data in events if kind == "started"] == ["encoder", "denoiser", "decoder"]
    steps = [(data["stage"], data["step"], data["steps"]) for _, kind, data in events if kind == "step"]
    assert steps == [("flux2_denoising", k, 3) for k in (1, 2, 3)]
    assert events[-1][2]["outputs"] == 1
    assert all(data["request"] == request["id"] and data["time"] > 0 for _, _, data in events)


def test_previews_are_among_the_events_where_they_are_asked_for_and_forgotten_with_the_end(caller: Caller) -> None:
    request = caller.submit({**PROMPT, "num_inference_steps": 9}, previews=2)
    events = [(kind, data) for _, kind, data in follow(caller, request)]
    shown = [data for kind, data in events if kind == "preview"]
    assert [(data["step"], data["steps"]) for data in shown] == [(3, 9), (6, 9)]
    for data in shown:
        assert Image.open(io.BytesIO(base64.b64decode(data["png"]))).size == (64, 64)
    again = [data for _, kind, data in follow(caller, request, **{"Last-Event-ID": "0"}) if kind == "preview"]
    assert [sorted(data) for data in again] == [["request", "step", "steps", "time"]] * 2


def test_when_the_event_done_is_there_so_is_the_result(caller: Caller) -> None:
    request = caller.submit(QUICK)
    assert follow(caller, request)[-1][1] == "done"
    assert caller.get(request["links"]["result"]).status_code == 200


def test_events_come_while_the_request_runs(caller: Caller) -> None:
    request = caller.submit(LONG)
    with caller.stream("GET", request["links"]["events"]) as response:
        kinds = [kind for _, kind, _ in read(response, 5)]
        assert kinds.count("step") >= 2
        assert caller.status(request)["status"] == "running"
        caller.post(request["links"]["cancel"])
    assert follow(caller, request)[-1][1] == "cancelled"


def test_a_stream_is_taken_up_after_the_last_event_that_was_seen(caller: Caller) -> None:
    request = caller.submit({**QUICK, "num_inference_steps": 3})
    with caller.stream("GET", request["links"]["events"]) as response:
        seen = read(response, 4)
    rest = follow(caller, request, **{"Last-Event-ID": str(seen[-1][0])})
    assert [number for number, _, _ in seen + rest] == list(range(8))
    assert rest[-1][1] == "done"


def test_a_reader_who_has_seen_the_end_is_told_to_stop_asking(caller: Caller) -> None:
    request = caller.submit(QUICK)
    last = follow(caller, request)[-1][0]
    response = caller.get(request["links"]["events"], headers={"Last-Event-ID": str(last)})
    assert (response.status_code, response.content) == (204, b"")


def test_an_id_that_is_no_number_starts_from_the_beginning(caller: Caller) -> None:
    request = caller.submit(QUICK)
    assert follow(caller, request, **{"Last-Event-ID": "1x"})[0][0] == 0
    assert follow(caller, request)[0][0] == 0


def test_several_readers_see_the_same(caller: Caller) -> None:
    request = caller.submit({**QUICK, "num_inference_steps": 2})
    with (
        caller.stream("GET", request["links"]["events"]) as one,
        caller.stream("GET", request["links"]["events"]) as two,
    ):
        assert read(one) == read(two)


def test_silence_is_filled_with_comments(serve: Callable[..., Caller], monkeypatch: Any) -> None:
    from serving import engine

    caller = serve(Limits(keep_alive=0.05))
    (replica,) = engine().router.replicas
    monkeypatch.setattr(replica, "slots", dict.fromkeys(replica.slots, 0))
    request = caller.submit(QUICK)
    with caller.stream("GET", request["links"]["events"]) as response:
        lines = response.iter_lines()
        assert sum(next(lines).startswith(":") for _ in range(12)) >= 2
    caller.delete(request["links"]["self"])


def test_a_reader_that_goes_away_harms_nothing(caller: Caller) -> None:
    request = caller.submit({**QUICK, "num_inference_steps": 6})
    host, port = caller.url.removeprefix("http://").split(":")
    for _ in range(10):
        reader = socket.create_connection((host, int(port)))
        reader.sendall(f"GET {request['links']['events']} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert reader.recv(100).startswith(b"HTTP/1.1 200")
        reader.close()
    assert caller.wait(request)["status"] == "done"
    assert caller.get(request["links"]["result"]).status_code == 200
    assert idle()


def test_a_reader_of_a_request_that_is_deleted_learns_its_end(caller: Caller) -> None:
    request = caller.submit(LONG)
    caller.until(request, running)
    with caller.stream("GET", request["links"]["events"]) as response:
        read(response, 3)
        caller.delete(request["links"]["self"])
        began = time.monotonic()
        assert caller.get(request["links"]["events"]).status_code == 404
    assert time.monotonic() - began < 5
