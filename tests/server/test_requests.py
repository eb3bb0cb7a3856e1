"""Requests: what is taken on, what is refused and why, and what is told of them."""

import base64
import gc
import io
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from weakref import WeakSet

import pytest
from PIL import Image
from serving import LONG, QUICK, Caller, engine, idle, running, settled

from triptych.errors import OverloadedError
from triptych.server.limits import Limits
from triptych.server.service import Service
from triptych.server.submission import Pictures


def data_url(size: tuple[int, int] = (64, 64), format: str = "PNG", exif: Image.Exif | None = None) -> str:
    file = io.BytesIO()
    options: dict[str, Any] = {} if exif is None else {"exif": exif}
    Image.linear_gradient("L").resize(size).convert("RGB").save(file, format, **options)
    return f"data:image/{format.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def refused(caller: Caller, body: Any, status: int = 400) -> dict[str, Any]:
    """Post what is not accepted; returns the error."""
    how = {"content": body} if isinstance(body, (str, bytes)) else {"json": body}
    response = caller.post("/v1/requests", **how)
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    return response.json()["error"]


def test_a_request_is_taken_on_at_once_and_told_of_to_its_end(caller: Caller) -> None:
    response = caller.post("/v1/requests", json={"parameters": {**QUICK, "num_inference_steps": 2}})
    assert response.status_code == 202
    request = response.json()
    assert response.headers["Location"] == request["links"]["self"] == f"/v1/requests/{request['id']}"
    assert request["status"] in ("queued", "running")
    assert (request["seed"], request["makes"], request["lost"]) == (7, "images", [])
    assert request["timings"] is None
    done = caller.wait(request)
    assert done["status"] == "done"
    assert set(done["timings"]) == {"text_encoding", "flux2_denoising", "decoding"}
    assert 0 < sum(done["timings"].values()) and 0 < done["seconds"] < 60
    assert (done["outputs"], done["error"], done["progress"]) == (1, None, None)


def test_a_seed_that_was_not_given_is_drawn_and_told(caller: Caller) -> None:
    seeds = {caller.submit({"prompt": "a heart", "num_inference_steps": 1})["seed"] for _ in range(3)}
    assert len(seeds) == 3


def test_the_step_the_role_and_the_position_are_told(caller: Caller) -> None:
    first = caller.submit(LONG)
    status = caller.until(first, running)
    progress = status["progress"]
    assert status["status"] == "running"
    assert (progress["role"], progress["stage"], progress["steps"]) == ("denoiser", "flux2_denoising", 900)
    assert 1 <= progress["step"] < 900
    assert status["position"] is None
    caller.delete(first["links"]["self"])


def test_queued_requests_are_told_how_many_are_before_them(caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    (replica,) = engine().router.replicas
    monkeypatch.setattr(replica, "slots", dict.fromkeys(replica.slots, 0))  # nothing is started
    requests = [caller.submit(QUICK) for _ in range(3)]
    assert [caller.status(each)["position"] for each in requests] == [0, 1, 2]
    caller.post(requests[0]["links"]["cancel"])
    assert [caller.status(each)["position"] for each in requests[1:]] == [0, 1]
    for each in requests:
        caller.delete(each["links"]["self"])


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"promt": "a fox"}, {"code": "unknown_parameter", "field": "promt", "close_match": "prompt"}),
        ({"prompt": "a fox", "height": 17}, {"code": "bad_parameter", "field": "height", "value": 17}),
        ({"prompt": 3}, {"field": "prompt", "value": 3, "accepted": "a text is accepted, not int"}),
        ({"prompt": "a fox", "seed": -1}, {"field": "seed", "value": -1}),
        ({"prompt": "a fox", "exact": "yes"}, {"field": "exact", "value": "yes"}),
        ({"prompt": "a fox", "guidance_scale": {"a": 1}}, {"field": "guidance_scale"}),
        ({"prompt": "a fox", "guidance_scale": 10**400}, {"field": "guidance_scale"}),
        ({"prompt": "a fox", "output_type": "latent"}, {"field": "output_type", "value": "latent"}),
        ({"prompt": "a fox", "latents": [[0.0]]}, {"field": "latents"}),
        ({"prompt": "a fox", "prompt_embeds": [0.5]}, {"field": "prompt_embeds"}),
        ({"prompt": "a fox", "image": "https://example.org/fox.png"}, {"field": "image"}),
        ({"prompt": "a fox", "image": "no base64 at all"}, {"field": "image", "value": "no base64 at all"}),
        ({"prompt": "a fox", "image": "aGVsbG8="}, {"field": "image", "value": "aGVsbG8="}),
        ({"prompt": "a fox", "image": data_url()[:-60]}, {"field": "image"}),
        ({"prompt": "a fox", "image": 5}, {"field": "image", "value": 5}),
        ({"prompt": "a fox", "self": 1}, {"code": "unknown_parameter", "field": "self"}),
        ({"prompt": "a fox", "lora": 0}, {"field": "lora", "value": 0}),
        ({"prompt": "a fox", "lora": False}, {"field": "lora", "value": False}),
        ({"prompt": "a fox", "lora": ""}, {"field": "lora", "value": ""}),
        ({"prompt": "a fox", "lora": {}}, {"field": "lora", "value": "{}"}),
        ({"prompt": data_url(), "height": [data_url()] * 2}, {"field": "height"}),
    ],
)
def test_a_parameter_that_is_not_accepted_is_400_with_the_fields_of_its_error(
    caller: Caller, parameters: dict[str, Any], expected: dict[str, Any]
) -> None:
    error = refused(caller, {"parameters": parameters})
    assert {name: error[name] for name in expected} == expected
    assert error["accepted"]
    assert error["field"] in error["message"]
    assert len(error["message"]) < 2000


@pytest.mark.parametrize(
    ("body", "field", "words"),
    [
        ("{", None, "Invalid JSON"),
        ("[1]", None, "parameters"),
        ({}, "parameters", "missing"),
        ({"prompt": "a fox"}, "prompt", "go under 'parameters'"),
        ({"parameters": {}, "deadlin": 3}, "deadlin", "did you mean 'deadline'"),
        ({"parameters": {}, "deadline": 0}, "deadline", "more than 0"),
        ({"parameters": {}, "deadline": "soon"}, "deadline", "number"),
        ({"parameters": {}, "deadline": 1e9}, "deadline", "at most 86400 seconds"),
        ("[" * 100_000, None, "JSON"),
    ],
)
def test_a_body_of_another_form_is_400_and_says_what_is_accepted(
    caller: Caller, body: Any, field: str | None, words: str
) -> None:
    error = refused(caller, body)
    assert error.get("field") == field
    assert words in error["message"]


LONG_NAME = "prompt" * 100_000


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/requests", {"parameters": {LONG_NAME: 1}}),
        ("/v1/requests", {"parameters": {LONG_NAME: {"a": 1}}}),
        ("/v1/requests", {"parameters": {}, LONG_NAME: 1}),
        ("/v1/images/generations", {"prompt": "a fox", LONG_NAME: 1}),
    ],
    ids=["parameter", "value", "body", "openai"],
)
def test_a_long_name_is_neither_compared_nor_sent_back(
    caller: Caller, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    compared: list[str] = []
    monkeypatch.setattr("difflib.SequenceMatcher.set_seq2", lambda _, name: compared.append(name))
    response = caller.post(path, json=body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, f"{LONG_NAME[:200]}..."), error["message"]
    assert len(response.content) < 10_000
    assert compared == []


def test_what_is_sent_as_an_image_is_what_the_model_sees(caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    submit = engine().submit
    monkeypatch.setattr(engine(), "submit", lambda request, **more: seen.append(request) or submit(request, **more))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    turned = data_url((96, 64), "JPEG", exif)
    plain = data_url((64, 64)).partition(",")[2]  # base64 without the rest of the URL
    request = caller.submit({**QUICK, "image": [turned, plain]})
    caller.delete(request["links"]["self"])
    (parameters,) = [each.parameters for each in seen]
    assert [picture.size for picture in parameters["image"]] == [(64, 96), (64, 64)]
    assert all(picture.mode == "RGB" for picture in parameters["image"])
    expected = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    assert parameters["image"][1].tobytes() == expected.tobytes()


def test_serving_is_not_exact_unless_asked_for(caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    submit = engine().submit
    monkeypatch.setattr(engine(), "submit", lambda request, **more: seen.append(request) or submit(request, **more))
    for given in ({}, {"exact": None}, {"exact": True}):
        caller.delete(caller.submit({**QUICK, **given})["links"]["self"])
    assert [each.parameters["exact"] for each in seen] == [False, False, True]


def test_bytes_pictures_and_pixels_are_bounded(serve: Callable[..., Caller]) -> None:
    caller = serve(Limits(body=20_000, images=2, pixels=2 * 64 * 64))
    error = refused(caller, {"parameters": {"prompt": "x" * 30_000}}, 413)
    assert error["code"] == "too_large"
    chunks = iter([b'{"parameters": {"prompt": "'] + [b"x" * 1000] * 40)  # of a length that is not announced
    assert caller.post("/v1/requests", content=chunks).status_code == 413
    small = data_url((8, 8))
    assert "at most 2 pictures" in refused(caller, {"parameters": {**QUICK, "image": [small] * 3}})["message"]
    wide = data_url((512, 64))
    assert "at most 8192 pixels" in refused(caller, {"parameters": {**QUICK, "image": wide}})["message"]
    assert (
        "at most 8192 pixels"
        in refused(caller, {"parameters": {**QUICK, "image": [data_url(), data_url((65, 64))]}})["message"]
    )


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("/v1/requests", "prompt"),
        ("/v1/requests", "negative_prompt"),
        ("/v1/images/generations", "prompt"),
        ("/v1/images/edits", "prompt"),
    ],
)
def test_a_text_that_is_too_long_is_refused_before_it_is_tokenised(
    serve: Callable[..., Caller], monkeypatch: pytest.MonkeyPatch, path: str, field: str
) -> None:
    monkeypatch.setattr(engine(), "submit", lambda *_, **__: pytest.fail("it got as far as the engine"))
    caller = serve(Limits(prompt=100))
    given = {"prompt": "a fox", field: "x" * 101}
    if path.endswith("edits"):
        response = caller.post(path, data=given, files={"image": base64.b64decode(data_url().partition(",")[2])})
    else:
        response = caller.post(path, json={"parameters": given} if path == "/v1/requests" else given)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, field, "bad_parameter"), error
    assert error["accepted"] == "a text of at most 100 characters is accepted, and this one has 101"
    assert len(error["value"]) < 50, "it is not sent back in full"


def test_a_text_of_the_greatest_length_is_taken(serve: Callable[..., Caller]) -> None:
    caller = serve(Limits(prompt=100))
    assert caller.wait(caller.submit({**QUICK, "prompt": "x " * 50}))["status"] == "done"


@pytest.mark.parametrize(
    ("parameters", "field", "words"),
    [
        ({"width": 10_000, "height": 10_000}, "width", "at most 64000000 pixels in all are accepted"),
        ({"width": 4096, "height": 4096, "num_images_per_prompt": 4}, "width", "num_images_per_prompt=4"),
        ({"num_images_per_prompt": 17}, "num_images_per_prompt", "at most 16 pictures"),
        ({"num_images_per_prompt": 1e9}, "num_images_per_prompt", "at most 16 pictures"),
        ({"max_sequence_length": 10**9}, "max_sequence_length", "at most 4096 tokens"),
        ({"sigmas": [0.5] * 1001}, "sigmas", "at most 1000 values"),
    ],
)
def test_what_would_be_too_large_to_be_made_is_refused(
    caller: Caller, parameters: dict[str, Any], field: str, words: str
) -> None:
    error = refused(caller, {"parameters": {**QUICK, **parameters}})
    assert (error["param"], error["code"]) == (field, "bad_parameter")
    assert words in error["message"]


def test_a_request_that_names_no_deadline_has_the_server_s(serve: Callable[..., Caller]) -> None:
    caller = serve(Limits(deadline=0.5))
    assert caller.wait(caller.submit(LONG))["error"]["code"] == "deadline_exceeded"
    response = caller.post("/v1/images/generations", json=LONG)
    assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")


def test_a_picture_of_few_bytes_and_many_pixels_is_refused_before_it_is_decoded(caller: Caller) -> None:
    file = io.BytesIO()
    Image.new("1", (9000, 9000)).save(file, "PNG")
    assert len(file.getvalue()) < 50_000
    image = base64.b64encode(file.getvalue()).decode()
    error = refused(caller, {"parameters": {**QUICK, "image": image}})
    assert (error["field"], error["value"]) == ("image", "9000x9000")
    assert "64000000 pixels" in error["message"]


def test_more_requests_than_may_wait_are_429_with_retry_after(caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    assert idle()
    monkeypatch.setattr(engine().router, "max_waiting", 1)
    request = caller.submit(LONG)
    response = caller.post("/v1/requests", json={"parameters": QUICK})
    assert response.status_code == 429
    assert int(response.headers["Retry-After"]) >= 1
    error = response.json()["error"]
    assert (error["code"], error["waiting"]) == ("overloaded", 1)
    caller.delete(request["links"]["self"])
    caller.wait(caller.submit(QUICK))  # there is room again


def held() -> int:
    """The pixels of the pictures of all requests that have not ended."""
    return sum(each.pixels for each in Pictures._all)


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No pictures but a test's own, and nobody who forgot some looks for them."""
    monkeypatch.setattr(Pictures, "_all", WeakSet())
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("room")
def test_the_room_of_pictures_is_held_until_their_request_has_ended(serve: Callable[..., Caller]) -> None:
    caller = serve(Limits(waiting_pixels=100 * 64**2))
    request = caller.submit({**LONG, "image": [data_url()] * 2})
    assert held() == 2 * 64**2
    error = refused(caller, {"parameters": {**QUICK, "image": data_url((640, 640))}}, 429)
    assert error["code"] == "overloaded"
    assert held() == 2 * 64**2
    caller.delete(request["links"]["self"])
    assert settled(caller.service) and held() == 0
    caller.wait(caller.submit({**QUICK, "image": data_url((640, 640))}))
    assert held() == 0


@pytest.mark.usefixtures("room")
def test_what_is_refused_holds_no_room(caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ({"seed": "q"}, {"num_inference_steps": -1}, {"image": [data_url(), "data:,x"]}, {"layers": 2}):
        refused(caller, {"parameters": {**QUICK, "image": data_url(), **wrong}})
        form = {**QUICK, "image": [data_url()], **wrong}
        assert caller.post("/v1/images/edits", json=form).status_code == 400
    assert caller.post("/v1/images/edits", json={**QUICK, "image": [data_url()], "model": "x"}).status_code == 404
    monkeypatch.setattr(engine().router, "max_waiting", 0)
    refused(caller, {"parameters": {**QUICK, "image": data_url()}}, 429)
    assert held() == 0


@pytest.fixture
def slow_to_admit(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """The engine admits nothing until the second event is set; the first tells that it was asked to."""
    assert idle()
    entered, go_on = threading.Event(), threading.Event()
    submit = engine().submit

    def slow(request: Any, **more: Any) -> Any:
        entered.set()
        assert go_on.wait(30)
        return submit(request, **more)

    monkeypatch.setattr(engine(), "submit", slow)
    return entered, go_on


@pytest.mark.usefixtures("room")
def test_a_request_that_is_cancelled_while_it_is_admitted_holds_no_room_and_does_not_run(
    caller: Caller, slow_to_admit: tuple[threading.Event, threading.Event]
) -> None:
    entered, go_on = slow_to_admit
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(caller.submit, {**LONG, "image": data_url()})
        assert entered.wait(30)
        [record] = caller.service.records.unfinished()
        assert held() == 64**2
        assert caller.post(f"/v1/requests/{record.id}/cancel").json()["status"] == "cancelled"
        go_on.set()
        answer.result()
    assert idle() and held() == 0


def test_a_stream_of_a_request_that_is_turned_away_while_it_is_admitted_ends(
    caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def full(*_: Any, **__: Any) -> None:
        entered.set()
        assert go_on.wait(30)
        raise OverloadedError(1, 1.0)

    monkeypatch.setattr(engine(), "submit", full)
    with ThreadPoolExecutor(2) as threads:
        answer = threads.submit(caller.post, "/v1/requests", json={"parameters": QUICK})
        assert entered.wait(30)
        [record] = caller.service.records.unfinished()
        stream = threads.submit(caller.get, f"/v1/requests/{record.id}/events", timeout=20)
        time.sleep(0.3)
        go_on.set()
        assert answer.result().status_code == 429
        assert "event:" not in stream.result().text


def test_a_request_is_cancelled_within_a_step_and_others_are_not(caller: Caller) -> None:
    first, second = caller.submit(LONG), caller.submit({**QUICK, "num_inference_steps": 4})
    caller.until(first, running)
    began = time.monotonic()
    response = caller.post(first["links"]["cancel"])
    assert (response.status_code, response.json()["status"]) == (200, "cancelled")
    assert response.json()["error"]["code"] == "cancelled"
    assert time.monotonic() - began < 5
    assert caller.wait(second)["status"] == "done"
    assert idle()
    assert caller.post(second["links"]["cancel"]).json()["status"] == "done"  # too late


def test_a_deleted_request_is_stopped_and_forgotten(caller: Caller) -> None:
    request = caller.submit(LONG)
    response = caller.delete(request["links"]["self"])
    assert (response.status_code, response.content) == (204, b"")
    assert idle()
    assert caller.get(request["links"]["self"]).status_code == 404
    assert caller.delete(request["links"]["self"]).status_code == 404


def test_a_request_past_its_deadline_fails_and_says_so(caller: Caller) -> None:
    request = caller.submit(LONG, deadline=0.5)
    failed = caller.wait(request)
    assert (failed["status"], failed["error"]["code"]) == ("failed", "deadline_exceeded")
    response = caller.get(request["links"]["result"])
    assert (response.status_code, response.json()["error"]["code"]) == (410, "deadline_exceeded")


def test_health_answers_before_the_model_is_there_and_ready_does_not(serve: Callable[..., Caller]) -> None:
    caller = serve()
    model, caller.service.engine = caller.service.engine, None
    assert caller.get("/health").status_code == 200
    assert caller.get("/ready").status_code == 503
    error = refused(caller, {"parameters": QUICK}, 503)
    assert (error["code"], error["message"]) == ("not_ready", "the model is being loaded")
    assert caller.get("/v1/status").json()["ready"] is False
    caller.service.engine = model
    assert caller.get("/ready").status_code == 200


def test_a_server_without_a_replica_for_a_role_is_not_ready(caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine().router, "replicas", [])
    response = caller.get("/ready")
    assert (response.status_code, response.json()["error"]["message"]) == (503, "a role has no replica")


def test_the_status_tells_of_replicas_and_of_requests_on_their_way(caller: Caller) -> None:
    request = caller.submit(LONG)
    caller.until(request, running)
    told = caller.get("/v1/status").json()
    assert told["family"] == "Flux2KleinPipeline"
    assert told["replicas"][0]["running"]["denoiser"] == 1
    assert told["replicas"][0]["loaded_bytes"] > 10**7
    (current,) = told["current"]
    assert current["id"] == request["id"]
    assert current["progress"]["steps"] == 900
    caller.delete(request["links"]["self"])


def test_a_model_whose_path_is_not_utf_8_can_be_told_of(caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine().front.family.repository.files, "name", os.fsdecode(b"/models/caf\xe9"))
    name = r"caf\udce9"
    assert caller.get("/v1/status").json()["model"] == f"/models/{name}"
    assert caller.get("/v1/parameters").json()["model"] == f"/models/{name}"
    assert [each["id"] for each in caller.get("/v1/models").json()["data"]] == [name]
    answer = caller.post("/v1/images/generations", json={**QUICK, "model": name})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("method", "path", "status", "kind"),
    [
        ("GET", "/v1/requests/req_none", 404, "not_found"),
        ("GET", "/v1/requests/req_none/events", 404, "not_found"),
        ("GET", "/v1/requests/../../etc/passwd", 404, "not_found"),
        ("GET", "/nowhere", 404, "not_found"),
        ("PUT", "/v1/requests", 405, "method_not_allowed"),
    ],
)
def test_every_error_has_the_same_form(caller: Caller, method: str, path: str, status: int, kind: str) -> None:
    response = caller.request(method, path)
    assert (response.status_code, response.json()["error"]["code"]) == (status, kind)


def test_an_error_nobody_expected_is_500_in_the_same_form(caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise KeyError("on two")

    monkeypatch.setattr(engine(), "submit", fails)
    response = caller.post("/v1/requests", json={"parameters": QUICK})
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (500, "internal")
    assert "KeyError" in error["message"]
    assert response.headers["connection"] == "close"  # the server drops it: nobody may send the next request into it


def test_an_engine_that_is_slow_to_admit_holds_up_nobody_else(
    caller: Caller, slow_to_admit: tuple[threading.Event, threading.Event]
) -> None:
    entered, go_on = slow_to_admit
    poster = threading.Thread(target=caller.submit, args=(QUICK,))
    poster.start()
    assert entered.wait(30)
    assert caller.get("/health", timeout=5).status_code == 200
    go_on.set()
    poster.join()


def test_the_openapi_schema_names_the_paths_and_the_body(caller: Caller) -> None:
    schema = caller.get("/openapi.json").json()
    assert {"/v1/requests", "/v1/requests/{name}/events", "/v1/requests/{name}/result"} <= set(schema["paths"])
    body = schema["paths"]["/v1/requests"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert set(body["properties"]) == {"parameters", "previews", "deadline"}


def test_a_service_without_an_engine_has_nothing_to_cancel() -> None:
    service = Service()
    assert service.cancel_all() == 0
    service.records.spool.close()
