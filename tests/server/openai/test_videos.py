"""`/v1/videos`, as the official client uses it."""

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import httpx
import openai
import pytest
from filming import Client, loaded, serving
from PIL import Image
from serving import engine as embedded_engine

import triptych
from triptych.engine.base import Engine
from triptych.server.limits import Limits

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API")

QUICK: dict[str, Any] = {"num_inference_steps": 2, "seed": 7, "guidance_scale": 1.0, "num_frames": 5}
SMALL = "48x32"
LONG = {**QUICK, "num_inference_steps": 700}


def frames(data: bytes) -> tuple[int, float, tuple[int, int]]:
    """How many frames an MP4 has, at what rate, of what size."""
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        return sum(1 for _ in container.decode(stream)), float(stream.average_rate or 0), (stream.width, stream.height)


def post(filmer: Client, **fields: Any) -> httpx.Response:
    return httpx.post(f"{filmer.root}/v1/videos", json={"prompt": "a fox", "size": SMALL, **fields}, timeout=30)


def until(filmer: Client, name: str, holds: Callable[[Any], bool]) -> Any:
    end = time.monotonic() + 30
    while not holds(video := filmer.videos.retrieve(name)):
        assert time.monotonic() < end, video
        time.sleep(0.02)
    return video


def test_the_official_client_makes_a_video_and_downloads_it(filmer: Client, tiny_repo: Any, tmp_path: Path) -> None:
    name = tiny_repo("wan").name
    parameters = {**QUICK, "exact": True}
    video = filmer.videos.create_and_poll(prompt="a fox", size=SMALL, extra_body=parameters)  # type: ignore[arg-type]
    assert (video.status, video.progress, video.object, video.model) == ("completed", 100, "video", name)
    assert (video.size, video.seconds, video.prompt) == (SMALL, "0.3125", "a fox")
    assert video.error is None and video.created_at <= video.completed_at < video.expires_at
    data = filmer.videos.download_content(video.id).content
    assert frames(data) == (5, 16.0, (48, 32))
    model = triptych.load(tiny_repo("wan"), device="cpu")
    (path,) = model.generate(prompt="a fox", width=48, height=32, **parameters).save(tmp_path / "fox.mp4")
    assert data == path.read_bytes()
    thumbnail = filmer.videos.download_content(video.id, variant="thumbnail")
    assert thumbnail.response.headers["content-type"] == "image/webp"
    with Image.open(io.BytesIO(thumbnail.content)) as image:
        assert (image.format, image.size) == ("WEBP", (48, 32))


def test_a_video_goes_through_its_statuses(filmer: Client) -> None:
    response = filmer.videos.with_raw_response.create(prompt="a fox", size=SMALL, extra_body=LONG)  # type: ignore[arg-type]
    video = response.parse()
    assert video.status in ("queued", "in_progress") and video.progress < 50
    assert 250 <= int(response.headers["openai-poll-after-ms"]) <= 5000
    running = until(filmer, video.id, lambda video: video.progress > 5)
    assert (running.status, running.completed_at, running.error) == ("in_progress", None, None)
    with pytest.raises(openai.ConflictError) as error:
        filmer.videos.download_content(video.id)
    assert error.value.code == "not_done"
    gone = filmer.videos.delete(video.id)
    assert (gone.id, gone.deleted, gone.object) == (video.id, True, "video.deleted")
    with pytest.raises(openai.NotFoundError):
        filmer.videos.retrieve(video.id)
    store = filmer.service.records.store
    assert store is not None and video.id not in {job.id for job in store.all()}
    assert not list(store.folder.glob(f"*/{video.id}*"))


def test_a_video_of_a_cancelled_request_has_failed(filmer: Client) -> None:
    video = post(filmer, **LONG).json()
    cancelled = httpx.post(f"{filmer.root}/v1/requests/{video['id']}/cancel").json()
    assert cancelled["id"] == video["id"]
    failed = until(filmer, video["id"], lambda video: video.status == "failed")
    assert failed.error.code == "cancelled" and failed.error.message
    with pytest.raises(openai.APIStatusError) as error:
        filmer.videos.download_content(video["id"])
    assert error.value.status_code == 410


def test_events_of_a_video_come_from_the_requests(filmer: Client) -> None:
    video = post(filmer, **QUICK).json()
    text = httpx.get(f"{filmer.root}/v1/requests/{video['id']}/events", timeout=30).text
    kinds = [line.removeprefix("event: ") for line in text.splitlines() if line.startswith("event: ")]
    assert kinds[0] == "queued" and kinds[-1] == "done" and kinds.count("step") >= 2
    mine = httpx.get(f"{filmer.root}/v1/requests/{video['id']}/result")
    assert mine.content == filmer.videos.download_content(video["id"]).content
    assert mine.headers["content-type"] == "video/mp4"


def test_the_list_is_paged_in_both_orders(film: Callable[..., Client], wan: Engine) -> None:
    client = film(wan)
    assert list(client.videos.list()) == []
    made = [post(client, **QUICK).json()["id"] for _ in range(5)]
    assert [video.id for video in client.videos.list()] == made[::-1]
    assert [video.id for video in client.videos.list(limit=2, order="asc")] == made  # the client turns the pages
    page = client.videos.list(limit=2, after=made[3])
    assert ([video.id for video in page.data], page.has_more, page.last_id) == (made[2:0:-1], True, made[1])
    with pytest.raises(openai.NotFoundError):
        client.videos.list(after="video_0")
    for query in ({"limit": 0}, {"limit": 101}, {"order": "up"}):
        assert httpx.get(f"{client.root}/v1/videos", params=query).status_code == 400


@pytest.mark.parametrize(
    ("fields", "made", "rate", "adjusted"),
    [
        ({"seconds": "1"}, 17, 16.0, "1 seconds at 16 frames a second are 16 frames; the model makes 17"),
        ({"seconds": "0.3125"}, 5, 16.0, None),
        ({"seconds": 1, "fps": 8}, 9, 8.0, "1 seconds at 8 frames a second are 8 frames; the model makes 9"),
        ({"num_frames": 9, "fps": 24}, 9, 24.0, None),
    ],
)
def test_seconds_become_frames_that_the_model_takes(
    filmer: Client, fields: dict[str, Any], made: int, rate: float, adjusted: str | None
) -> None:
    quick = {name: value for name, value in QUICK.items() if name != "num_frames"}
    video = post(filmer, **{**quick, "num_inference_steps": 1}, **fields).json()
    assert (video["num_frames"], video["fps"], video["adjusted"]) == (made, rate, adjusted)
    assert video["seconds"] == f"{made / rate:.4g}"
    until(filmer, video["id"], lambda video: video.status == "completed")
    assert frames(filmer.videos.download_content(video["id"]).content) == (made, rate, (48, 32))


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"sed": 1}, "sed", "did you mean 'seed'?"),
        ({"secnds": "1"}, "secnds", "did you mean 'seconds'?"),
        ({"prompt": None}, "prompt", "it is missing"),
        ({"prompt": ["a", "b"]}, "prompt", "a text is accepted"),
        ({"prompt": "a" * 32_001}, "prompt", "at most 32000 characters"),
        ({"negative_prompt": "a" * 32_001}, "negative_prompt", "at most 32000 characters"),
        ({"size": "wide"}, "size", "832x480"),
        ({"size": "50x32"}, "width", "the nearest: 48 or 64"),
        ({"size": SMALL, "width": 48}, "size", "width is given too"),
        ({"size": "32768x32768"}, "size", "at most 2000000000 pixels"),
        ({"seconds": "long"}, "seconds", "a number above 0"),
        ({"seconds": "1e9"}, "seconds", "up to 600"),
        ({"seconds": "1", "num_frames": 5}, "seconds", "num_frames is given too"),
        ({"num_frames": 4}, "num_frames", "the nearest: 3 or 5"),
        ({"fps": 0}, "fps", "a number from 0.01"),
        ({"fps": True}, "fps", "a number from 0.01"),
        ({"fps": 0.0001}, "fps", "a number from 0.01"),
        ({"input_reference": "AAAA"}, "input_reference", "from text only"),
        ({"num_videos_per_prompt": 2}, "num_videos_per_prompt", "has no parameter"),
        ({"latents": [1.0]}, "latents", "has no parameter"),
        ({"output_type": "latent"}, "output_type", "has no parameter"),
    ],
)
def test_what_cannot_be_is_refused_by_name(filmer: Client, fields: dict[str, Any], param: str, message: str) -> None:
    response = post(filmer, **fields)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    assert message in error["message"]
    assert error["type"] and error["code"]


@pytest.fixture(scope="module")
def sounding(tiny_repo: Callable[..., Path]) -> Iterator[Client]:
    """A client of a server whose family has a frame rate of its own."""
    with contextmanager(loaded)(tiny_repo("ltx2", version="2.0")) as engine, serving(engine) as client:
        yield client


@pytest.mark.parametrize(
    "rate", [pytest.param(10**400, id="10**400"), 1e308, float("inf"), float("nan"), 0, 0.0001, True, "fast"]
)
def test_a_frame_rate_of_the_family_s_own_is_bounded_as_fps_is(sounding: Client, rate: Any) -> None:
    for more in ({}, {"seconds": "1"}):
        body = json.dumps({"prompt": "a fox", "size": "64x64", "frame_rate": rate, **more})  # httpx refuses NaN
        response = httpx.post(f"{sounding.root}/v1/videos", content=body, timeout=30)
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, "frame_rate"), error
        assert "a number from 0.01 and up to 240 is accepted" in error["message"]


def test_a_frame_rate_of_the_family_s_own_decides_over_the_length(sounding: Client) -> None:
    fields = {"size": "64x64", "num_inference_steps": 2, "frame_rate": "12", "seconds": "1"}  # a text, as fps may be
    video = post(sounding, **fields).json()
    assert (video["fps"], video["num_frames"], video["seconds"]) == (12, 13, "1.083")


def test_another_model_is_not_there(filmer: Client, tiny_repo: Any) -> None:
    name = tiny_repo("wan").name
    with pytest.raises(openai.NotFoundError, match=f"there is no model 'sora-2' here, only '{name}'") as error:
        filmer.videos.create(prompt="a fox", model="sora-2")
    assert error.value.code == "model_not_found"
    assert post(filmer, model=name, **QUICK).status_code == 200


def test_a_model_of_images_refuses_videos(film: Callable[..., Client]) -> None:
    with pytest.raises(openai.BadRequestError, match="makes images: ask for them at /v1/images/generations"):
        film(embedded_engine()).videos.create(prompt="a fox")


def test_forms_and_json_mean_the_same(filmer: Client) -> None:
    fields = {**QUICK, "prompt": "7", "size": SMALL, "exact": True, "negative_prompt": "null"}
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in fields.items()}
    form = httpx.post(f"{filmer.root}/v1/videos", files={name: (None, text) for name, text in texts.items()})
    plain = httpx.post(f"{filmer.root}/v1/videos", json=fields)
    made = []
    for response in (form, plain):
        assert response.status_code == 200, response.text
        assert response.json()["prompt"] == "7"
        until(filmer, response.json()["id"], lambda video: video.status == "completed")
        made.append(filmer.videos.download_content(response.json()["id"]).content)
    assert made[0] == made[1]


FORM = b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na fox\r\n--x--\r\n'


@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        ({"content-type": "application/json"}, b"{", 400),
        ({"content-type": "application/json"}, b"[1]", 400),
        ({"content-type": "application/json"}, b'{"prompt": "\xff"}', 400),
        ({"content-type": "application/json"}, b"[" * 100_000, 400),
        ({"content-type": "text/plain"}, b"a fox", 415),
        ({"content-type": "multipart/form-data"}, b"--x--", 400),
        ({"content-type": "multipart/form-data; boundary=x"}, b"not a form", 400),
        ({"content-type": "multipart/form-data; boundary=x"}, b"--x\r\nContent-Disposition: form-data\r\n\r\n", 400),
        ({"content-type": "multipart/form-data; boundary=x; charset=undefined"}, FORM, 400),
        ({"content-type": "application/json"}, b'{"prompt": "a", "seed": ' + b"[" * 900 + b"]" * 900 + b"}", 400),
    ],
)
def test_bodies_that_are_none_are_refused(filmer: Client, headers: dict[str, str], body: bytes, status: int) -> None:
    response = httpx.post(f"{filmer.root}/v1/videos", content=body, headers=headers)
    assert response.status_code == status, response.text
    assert response.json()["error"]["message"]


HALF = "\ud800"
"""Of a surrogate pair."""
TOLD = r"\ud800"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": f"a {HALF} fox"}, "prompt"),
        ({"user": HALF}, "user"),
        ({"lora": [{"path": HALF}]}, "lora"),
    ],
    ids=["text", "own", "nested"],
)
def test_text_that_no_answer_could_repeat_is_refused_by_name(
    filmer: Client, fields: dict[str, Any], param: str
) -> None:
    body = json.dumps({"prompt": "a fox", "size": SMALL, **QUICK, **fields})
    refused_for_half(filmer, param, content=body.encode())


def test_a_name_that_no_answer_could_repeat_is_unknown(filmer: Client) -> None:
    response = httpx.post(f"{filmer.root}/v1/videos", content=json.dumps({"prompt": "a fox", HALF: 1}).encode())
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, TOLD, "unknown_parameter"), error


def form(**fields: Any) -> bytes:
    """The body of a form."""
    parts = [f'--x\r\nContent-Disposition: form-data; name="{each}"\r\n\r\n{fields[each]}\r\n' for each in fields]
    return "".join([*parts, "--x--\r\n"]).encode()


def test_a_form_cannot_bring_it_either(filmer: Client) -> None:
    kind = {"content-type": "multipart/form-data; charset=utf-7; boundary=x"}  # of which halves could be made
    fields = {"prompt": "a fox", "size": SMALL, **QUICK}
    refused_for_half(filmer, "lora", content=form(**fields, lora='["\\ud800"]'), headers=kind)
    content = form(**{**fields, "prompt": "a +2AA- fox"})
    assert httpx.post(f"{filmer.root}/v1/videos", content=content, headers=kind).json()["prompt"] == "a +2AA- fox"


@pytest.mark.parametrize("missing", ["--\r\n", "x--\r\n", "\r\n--x--\r\n"])
def test_a_form_that_ends_too_early_is_refused(filmer: Client, missing: str) -> None:
    content = form(prompt="a fox", size=SMALL, **QUICK).removesuffix(missing.encode())
    kind = {"content-type": "multipart/form-data; boundary=x"}
    response = httpx.post(f"{filmer.root}/v1/videos", content=content, headers=kind)
    assert response.status_code == 400, response.text
    assert "it ends before its last boundary" in response.json()["error"]["message"]


@pytest.mark.parametrize("charset", ["", "; charset=latin-1"])
def test_a_text_of_a_form_that_is_no_utf_8_is_refused_by_name(filmer: Client, charset: str) -> None:
    content = form(size=SMALL, **QUICK, prompt="a fox").replace(b"a fox", "ein Fuchs, schön".encode("latin-1"))
    kind = {"content-type": f"multipart/form-data; boundary=x{charset}"}
    response = httpx.post(f"{filmer.root}/v1/videos", content=content, headers=kind)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["value"]) == (400, "prompt", "f6 6e"), error
    assert "text in UTF-8 is accepted" in error["message"]


def refused_for_half(filmer: Client, param: str, **sent: Any) -> None:
    response = httpx.post(f"{filmer.root}/v1/videos", **sent)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["value"]) == (400, param, TOLD), error
    assert "whole characters are accepted" in error["message"]
    assert httpx.get(f"{filmer.root}/v1/videos").status_code == 200


def test_bodies_are_bounded(film: Callable[..., Client], wan: Engine) -> None:
    client = film(wan, Limits(body=10_000))
    assert post(client, negative_prompt="a" * 20_000).status_code == 413
    picture = {"input_reference": ("a.png", b"a" * 20_000)}
    assert httpx.post(f"{client.root}/v1/videos", data={"prompt": "a"}, files=picture).status_code == 413


def picture(colour: str, size: tuple[int, int] = (48, 32)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def test_the_first_frame_is_a_file_or_an_address_of_data(
    film: Callable[..., Client], wan_i2v: Engine, tiny_repo: Any, tmp_path: Path
) -> None:
    client = film(wan_i2v)
    parameters = {**QUICK, "num_frames": 5, "exact": True}
    model = triptych.load(tiny_repo("wan_i2v"), device="cpu")
    expected = {}
    for colour in ("red", "blue"):
        image = Image.new("RGB", (48, 32), colour)
        result = model.generate(prompt="a fox", image=image, width=48, height=32, **parameters)
        expected[colour] = result.save(tmp_path / f"{colour}.mp4")[0].read_bytes()
    assert expected["red"] != expected["blue"]
    url = f"data:image/png;base64,{base64.b64encode(picture('blue')).decode()}"
    red, told = ("a.png", picture("red")), {"image_url": url}
    made = client.videos.create(prompt="a fox", size=SMALL, input_reference=red, extra_body=parameters)  # type: ignore[arg-type]
    form = {"prompt": "a fox", "size": SMALL, "input_reference[image_url]": url, **parameters}
    texts = {name: (None, value if isinstance(value, str) else json.dumps(value)) for name, value in form.items()}
    blue = post(client, input_reference=told, **parameters), httpx.post(f"{client.root}/v1/videos", files=texts)
    for colour, name in (("red", made.id), *(("blue", each.json()["id"]) for each in blue)):
        assert until(client, name, lambda video: video.status in ("completed", "failed")).status == "completed"
        assert client.videos.download_content(name).content == expected[colour]
    for reference in ({"file_id": "file_1"}, url[:60], {"image_url": "http://127.0.0.1/a.png"}, 7):
        response = post(client, input_reference=reference, **parameters)
        assert response.status_code == 400, response.text
    assert "image" in post(client, **parameters).json()["error"]["message"]


def test_a_form_carries_a_photo_as_an_address_of_data(film: Callable[..., Client], wan_i2v: Engine) -> None:
    photo = io.BytesIO()
    Image.new("RGB", (800, 600), "blue").save(photo, "BMP")
    url = f"data:image/bmp;base64,{base64.b64encode(photo.getvalue()).decode()}"
    assert len(url) > 1.5 * 2**20, "more than parts of forms may usually have"
    fields = {"prompt": "a fox", "size": SMALL, **QUICK, "input_reference[image_url]": url}
    kind = {"content-type": "multipart/form-data; boundary=x"}
    response = httpx.post(f"{film(wan_i2v).root}/v1/videos", content=form(**fields), headers=kind, timeout=30)
    assert response.status_code == 200, response.text


def test_the_result_of_a_video_is_the_mp4_that_is_kept(filmer: Client) -> None:
    video = post(filmer, **QUICK).json()["id"]
    until(filmer, video, lambda video: video.status == "completed")
    address = f"{filmer.root}/v1/requests/{video}/result"
    mp4 = filmer.videos.download_content(video).content
    for accept in ("text/html,image/webp,*/*;q=0.8", "image/webp,*/*;q=0.8", "video/mp4"):
        response = httpx.get(address, headers={"Accept": accept})
        assert (response.status_code, response.content) == (200, mp4), accept
    assert httpx.get(address, params={"format": "mp4"}).content == mp4
    other = httpx.get(address, params={"format": "gif"})
    assert (other.status_code, other.json()["error"]["field"]) == (400, "format")
    assert "this result can be had as mp4" in other.json()["error"]["message"]
    assert httpx.get(address, headers={"Accept": "image/webp"}).status_code == 406


def test_ranges_of_a_video_are_served(filmer: Client) -> None:
    video = post(filmer, **QUICK).json()["id"]
    until(filmer, video, lambda video: video.status == "completed")
    address = f"{filmer.root}/v1/videos/{video}/content"
    whole = httpx.get(address)
    assert (whole.headers["content-type"], whole.headers["accept-ranges"]) == ("video/mp4", "bytes")
    part = httpx.get(address, headers={"Range": "bytes=100-199"})
    assert (part.status_code, part.content) == (206, whole.content[100:200])
    assert part.headers["content-range"] == f"bytes 100-199/{len(whole.content)}"
    assert httpx.get(address, headers={"Range": "bytes=9999999-"}).status_code == 416
    for ignored in ("frames=0-3", "bytes=7-2", "bytes", "bytes=", "bytes=a-b"):  # RFC 9110, 14.2
        response = httpx.get(address, headers={"Range": ignored})
        assert (response.status_code, response.content) == (200, whole.content), ignored
    head = httpx.head(address)
    assert (head.status_code, head.headers["content-length"]) == (200, str(len(whole.content)))
    assert httpx.get(address, params={"variant": "spritesheet"}).status_code == 400


def test_a_synchronous_video_is_the_answer_itself(filmer: Client) -> None:
    body = {"prompt": "a fox", "size": SMALL, **QUICK, "exact": True}
    response = httpx.post(f"{filmer.root}/v1/videos/sync", json=body, timeout=30)
    assert (response.status_code, response.headers["content-type"]) == (200, "video/mp4")
    assert frames(response.content) == (5, 16.0, (48, 32))
    assert response.headers["triptych-seed"] == "7"
    asynchronous = filmer.videos.create_and_poll(prompt="a fox", size=SMALL, extra_body={**QUICK, "exact": True})  # type: ignore[arg-type]
    assert filmer.videos.download_content(asynchronous.id).content == response.content


def test_a_caller_of_a_synchronous_video_that_goes_away_stops_it(filmer: Client, wan: Engine) -> None:
    def call() -> None:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{filmer.root}/v1/videos/sync", json={"prompt": "a", "size": SMALL, **LONG}, timeout=1.0)

    caller = threading.Thread(target=call)
    caller.start()
    end = time.monotonic() + 30
    while not len(wan.router):
        assert time.monotonic() < end
        time.sleep(0.01)
    caller.join()
    # The server's loop hears of the end a moment after the router.
    while len(wan.router) or not all(record.ended is not None for record in filmer.service.records.all()):
        assert time.monotonic() < end, "it goes on"
        time.sleep(0.01)
