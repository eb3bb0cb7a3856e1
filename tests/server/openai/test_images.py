"""Pictures through the official client: made, edited, streamed with previews, refused and given up."""

import base64
import io
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import starlette.responses
from PIL import Image
from serving import Caller, engine, idle, served, settled

from triptych.engine.local import LocalEngine
from triptych.errors import ParameterError
from triptych.server.limits import Limits
from triptych.server.openai import form
from triptych.server.openai.form import Fields, _add, settle
from triptych.server.submission import Submission

Float = np.ndarray[Any, np.dtype[np.float64]]


def client_of(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def client(caller: Caller) -> openai.OpenAI:
    return client_of(caller.url)


@pytest.fixture(scope="module")
def editor(tiny_repo: Callable[..., Path]) -> Iterator[openai.OpenAI]:
    """The client of a server whose family edits pictures."""
    devices: dict[str, Any] = dict.fromkeys(("encoder", "denoiser", "decoder"), "cpu")
    with LocalEngine(tiny_repo("flux2_klein"), **devices, warm_up=False) as made, served(serves=made) as caller:
        yield client_of(caller.url)


@pytest.fixture(scope="module")
def layers(tiny_repo: Callable[..., Path]) -> Iterator[openai.OpenAI]:
    """The client of a server whose family takes pictures apart into layers."""
    devices: dict[str, Any] = dict.fromkeys(("encoder", "denoiser", "decoder"), "cpu")
    with LocalEngine(tiny_repo("qwen_image_layered"), **devices, warm_up=False) as made, served(serves=made) as caller:
        yield client_of(caller.url)


def opened(b64: str | None) -> Image.Image:
    assert b64
    image = Image.open(io.BytesIO(base64.b64decode(b64)))
    image.load()
    return image


def picture(colour: str = "gray", size: tuple[int, int] = (64, 64)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def pixels(image: Image.Image) -> Float:
    return np.asarray(image.convert("RGB").resize((16, 16), Image.Resampling.BOX), np.float64)


def test_a_picture_is_made_and_the_answer_tells_of_it(client: openai.OpenAI) -> None:
    answer = client.images.generate(prompt="a red heart", extra_body={"seed": 7, "num_inference_steps": 2})
    assert answer.data is not None and answer.usage is not None and answer.usage.output_tokens_details is not None
    assert opened(answer.data[0].b64_json).size == (64, 64)
    assert (answer.size, answer.output_format, answer.background, answer.quality) == (
        "64x64",
        "png",
        "opaque",
        "medium",
    )
    assert abs(answer.created - time.time()) < 60
    assert answer.usage.output_tokens_details.image_tokens == 16
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    assert answer.model_extra == {"seed": 7}


def test_the_same_seed_makes_the_picture_that_the_engine_makes(client: openai.OpenAI) -> None:
    parameters: dict[str, Any] = {"seed": 11, "num_inference_steps": 2, "exact": True}
    answer = client.images.generate(prompt="a cat", extra_body=parameters)
    expected = engine().generate(prompt="a cat", **parameters).images
    assert answer.data is not None and expected is not None
    assert np.array_equal(np.asarray(opened(answer.data[0].b64_json)), np.asarray(expected[0]))


@pytest.mark.parametrize(("format", "told"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_n_pictures_come_in_the_format_and_size_that_is_asked_for(
    client: openai.OpenAI, format: Any, told: str
) -> None:
    answer = client.images.generate(
        prompt="a dog", n=2, size="64x32", output_format=format, extra_body={"num_inference_steps": 1}
    )
    assert answer.data is not None and len(answer.data) == 2
    images = [opened(each.b64_json) for each in answer.data]
    assert [(each.size, each.format) for each in images] == [((64, 32), told)] * 2
    assert (answer.size, answer.output_format) == ("64x32", format)


def test_more_compression_makes_smaller_files(client: openai.OpenAI) -> None:
    sizes = []
    for compression in (10, 95):
        answer = client.images.generate(
            prompt="a dog", output_format="jpeg", output_compression=compression, extra_body={"seed": 1}, quality="low"
        )
        assert answer.data is not None and answer.data[0].b64_json is not None
        sizes.append(len(answer.data[0].b64_json))
    assert sizes[0] < sizes[1] * 0.6


def test_quality_decides_over_the_steps(caller: Caller, client: openai.OpenAI) -> None:
    steps = {}
    for quality in ("low", "medium"):
        client.images.generate(prompt="a dog", quality=quality)  # type: ignore[arg-type]
        record = caller.service.records.all()[-1]
        steps[quality] = record.last("step")["steps"]
    assert steps == {"low": 8, "medium": 16}


def test_an_address_serves_the_picture_without_a_key_and_only_that(client: openai.OpenAI) -> None:
    answer = client.images.generate(
        prompt="a dog", n=2, response_format="url", output_format="webp", extra_body={"num_inference_steps": 1}
    )
    assert answer.data is not None and all(each.b64_json is None for each in answer.data)
    urls = [each.url for each in answer.data]
    for url in urls:
        assert url is not None
        response = httpx.get(url)
        assert (response.status_code, response.headers["content-type"]) == (200, "image/webp")
        assert httpx.head(url).headers["content-length"] == str(len(response.content))
        assert Image.open(io.BytesIO(response.content)).size == (64, 64)
    assert urls[0] is not None
    for other in ("/2.webp", "/0.png", "/x", "/", f"/{'9' * 5000}.webp"):
        assert httpx.get(urls[0].removesuffix("/0.webp") + other).status_code == 404


def test_the_result_of_a_picture_with_an_address_is_the_file_that_is_kept(
    caller: Caller, client: openai.OpenAI
) -> None:
    answer = client.images.generate(
        prompt="a dog", response_format="url", output_format="jpeg", extra_body={"num_inference_steps": 1}
    )
    assert answer.data is not None and answer.data[0].url is not None
    result = f"/v1/requests/{answer.data[0].url.split('/')[-2]}/result"
    for sent in ({}, {"params": {"format": "jpg"}}, {"headers": {"Accept": "image/webp,*/*;q=0.8"}}):
        response = caller.get(result, **sent)  # type: ignore[arg-type]
        assert (response.status_code, response.content) == (200, httpx.get(answer.data[0].url).content), sent
    other = caller.get(result, params={"format": "png"})
    assert other.status_code == 400 and "this result can be had as jpeg" in other.json()["error"]["message"]
    assert caller.get(result, headers={"Accept": "image/png"}).status_code == 406


def test_addresses_expire_with_what_is_kept(serve: Callable[..., Caller]) -> None:
    client = client_of(serve(Limits(kept=1)).url)
    urls = []
    for _ in range(2):
        answer = client.images.generate(prompt="a dog", response_format="url", extra_body={"num_inference_steps": 1})
        assert answer.data is not None and answer.data[0].url is not None
        urls.append(answer.data[0].url)
    assert [httpx.get(url).status_code for url in urls] == [404, 200]


def test_a_stream_brings_previews_that_look_like_the_picture(client: openai.OpenAI) -> None:
    events: list[Any] = list(
        client.images.generate(prompt="a red heart", stream=True, partial_images=2, extra_body={"seed": 7})
    )
    assert [each.type for each in events] == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [each.partial_image_index for each in events[:2]] == [0, 1]
    assert [each.size for each in events] == ["64x64"] * 3
    *previews, final = (opened(each.b64_json) for each in events)
    for preview in previews:
        assert preview.size == final.size and pixels(preview).std() > 20, "a preview shows something"
    alike = np.corrcoef(pixels(previews[-1]).ravel(), pixels(final).ravel())[0, 1]
    assert alike > 0.65
    others = [pixels(opened(made.b64_json)) for made in _pictures(client)]
    assert all(np.corrcoef(pixels(previews[-1]).ravel(), other.ravel())[0, 1] < alike - 0.1 for other in others)
    assert events[-1].usage.total_tokens > 0


def _pictures(client: openai.OpenAI) -> list[Any]:
    prompts = ("a dog", "a blue car")
    made = [client.images.generate(prompt=each, quality="low", extra_body={"seed": 3}).data for each in prompts]
    return [each[0] for each in made if each]


def test_a_stream_comes_in_the_format_that_is_asked_for(client: openai.OpenAI) -> None:
    events: list[Any] = list(
        client.images.generate(prompt="a dog", stream=True, partial_images=1, output_format="jpeg", quality="low")
    )
    assert [opened(each.b64_json).format for each in events] == ["JPEG", "JPEG"]
    assert [each.output_format for each in events] == ["jpeg", "jpeg"]


def test_what_fails_in_a_stream_is_an_error_of_the_client(
    client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("no ink")

    (replica,) = engine().router.replicas
    monkeypatch.setattr(replica.model.components["vae"], "decode", fail)  # type: ignore[attr-defined]
    with pytest.raises(openai.APIError, match="no ink"):
        list(client.images.generate(prompt="a dog", stream=True, extra_body={"num_inference_steps": 1}))
    with pytest.raises(openai.InternalServerError, match="no ink"):
        client.images.generate(prompt="a dog", extra_body={"num_inference_steps": 1})


@pytest.mark.parametrize("stream", [False, True])
def test_a_caller_that_leaves_stops_its_request_within_a_step(caller: Caller, stream: bool) -> None:
    body = {"prompt": "a dog", "num_inference_steps": 900, "stream": stream}
    with httpx.Client(base_url=caller.url) as leaving:
        try:
            with leaving.stream("POST", "/v1/images/generations", json=body, timeout=1.0) as response:
                time.sleep(1.0)
                assert response.status_code == 200
        except httpx.ReadTimeout:
            assert not stream
    left = time.monotonic()
    assert idle()
    assert time.monotonic() - left < 5, "it would have taken a minute"
    assert settled(caller.service)


def nested(depth: int) -> Any:
    """Lists in lists in lists."""
    return json.loads("[" * depth + "]" * depth)


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"promt": "a fox"}, "promt", "prompt"),
    ({"prompt": "a fox", "num_inference_step": 3}, "num_inference_step", "num_inference_steps"),
    ({}, "prompt", "missing"),
    ({"prompt": "a fox", "n": 0}, "n", "from 1 to 10"),
    ({"prompt": "a fox", "n": True}, "n", "from 1 to 10"),
    ({"prompt": "a fox", "size": "64"}, "size", "WIDTHxHEIGHT"),
    ({"prompt": "a fox", "size": "64x64", "width": 64}, "size", "width is given too"),
    ({"prompt": "a fox", "size": "60x64"}, "width", "multiple"),
    ({"prompt": "a fox", "size": "99999x99999"}, "size", "pixels"),
    ({"prompt": "a fox", "quality": "superb"}, "quality", "medium"),
    ({"prompt": "a fox", "output_format": "gif"}, "output_format", "webp"),
    ({"prompt": "a fox", "output_compression": 50}, "output_compression", "lossless"),
    ({"prompt": "a fox", "background": "transparent"}, "background", "opaque"),
    ({"prompt": "a fox", "partial_images": 2}, "partial_images", "stream"),
    ({"prompt": "a fox", "stream": True, "partial_images": 4}, "partial_images", "0 to 3"),
    ({"prompt": "a fox", "stream": True, "n": 2}, "n", "one picture"),
    ({"prompt": "a fox", "stream": "yes"}, "stream", "true or false"),
    ({"prompt": "a fox", "response_format": "path"}, "response_format", "b64_json"),
    ({"prompt": "a fox", "num_inference_steps": 10**6}, "num_inference_steps", "at most"),
    ({"prompt": "a fox", "guidance_scale": "much"}, "guidance_scale", "number"),
    ({"prompt": "a fox", "latents": [1]}, "latents", "no parameter"),
    ({"prompt": "a fox", "seed": "auto"}, "seed", "whole number"),
    ({"prompt": "a fox", "image": 5}, "image", "a file"),
    ({"prompt": "a fox", "sigmas": [[1]]}, "sigmas", "finite numbers"),
    ({"prompt": "a fox", "sigmas": "a"}, "sigmas", "finite numbers"),
    ({"prompt": "a fox", "seed": nested(300)}, "parameters.seed.", "depth"),
    ({"prompt": "a fox", "seed": nested(900)}, "parameters.seed.", "depth"),
    ({"prompt": "a fox", "seed": nested(100)}, "seed", "a list of them is accepted"),
    ({"prompt": "a fox", "lora": [{"path": nested(900)}]}, "parameters.lora.", "depth"),
]


@pytest.mark.parametrize(("body", "param", "hint"), REFUSED, ids=[f"{each[1]}-{k}" for k, each in enumerate(REFUSED)])
def test_what_is_not_accepted_is_refused_by_name_in_the_clients_form(
    caller: Caller, body: dict[str, Any], param: str, hint: str
) -> None:
    response = caller.post("/v1/images/generations", json=body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"].startswith(param) and hint in error["message"]
    assert (error["param"] == param) is not param.endswith(".")
    assert isinstance(error["type"], str) and isinstance(error["code"], str)


@pytest.mark.parametrize("field", ["prompt", "user", "safety_identifier"])
def test_half_a_character_is_refused_by_name(caller: Caller, field: str) -> None:
    body = json.dumps({"prompt": "a fox", "num_inference_steps": 1, field: "a \ud800"}).encode()
    response = caller.post("/v1/images/generations", content=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, field), response.text


def test_another_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="emoji-64"):
        client.images.generate(prompt="a fox", model="gpt-image-1")


def test_models_are_listed_and_found_by_name(client: openai.OpenAI) -> None:
    (model,) = client.models.list()
    assert (model.id, model.object, model.owned_by) == ("emoji-64", "model", "triptych")
    assert client.models.retrieve("emoji-64").id == "emoji-64"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("black-forest-labs/other")
    answer = client.images.generate(model=model.id, prompt="a fox", extra_body={"num_inference_steps": 1})
    assert answer.data


LAYERS = {"num_inference_steps": 2, "seed": 5}
SMALL = {"num_inference_steps": 2, "max_sequence_length": 24, "seed": 5}


def test_a_picture_is_edited(editor: openai.OpenAI) -> None:
    made = []
    for colour in ("red", "blue"):
        answer = editor.images.edit(image=picture(colour), prompt="make it round", size="64x48", extra_body=SMALL)
        assert answer.data is not None and answer.usage is not None
        made.append(opened(answer.data[0].b64_json))
        assert answer.usage.input_tokens_details.image_tokens == 16
    assert made[0].size == (64, 48)
    assert not np.array_equal(np.asarray(made[0]), np.asarray(made[1])), "what is edited matters"


def test_several_pictures_are_edited_into_one_as_a_stream(editor: openai.OpenAI) -> None:
    images = [("one.png", picture("red")), ("two.png", picture("blue"))]
    events: list[Any] = list(
        editor.images.edit(
            image=images, prompt="join them", size="64x48", stream=True, partial_images=2,
            extra_body={**SMALL, "num_inference_steps": 4},
        )
    )  # fmt: skip
    assert [each.type for each in events] == ["image_edit.partial_image"] * 2 + ["image_edit.completed"]
    assert events[-1].usage.input_tokens_details.image_tokens == 32
    assert {opened(each.b64_json).size for each in events} == {(64, 48)}


def test_a_form_carries_loras_as_the_client_sends_them(editor: openai.OpenAI) -> None:
    loras = [{"path": "none.safetensors", "scale": 0.5}, {"path": "7"}]
    with pytest.raises(openai.BadRequestError) as caught:
        editor.images.edit(image=picture(), prompt="a fox", extra_body={**SMALL, "lora": loras})
    assert (caught.value.param, caught.value.code) == ("lora", "bad_parameter"), "it is understood, and not there"
    fields = Fields()
    for name, value in (("path", "7"), ("scale", "0.5"), ("path", "b")):
        _add(fields, f"lora[][{name}]", value)
    fields.texts = True
    assert settle(fields, {"lora": "loras"}) == {"lora": [{"path": "7", "scale": 0.5}, {"path": "b"}]}
    for name in ("lora[]", "lora[path]", "lora"):
        with pytest.raises(ParameterError, match="given twice"):
            _add(fields, name, "c")
    with pytest.raises(ParameterError, match="given twice"):
        _add(Fields(lora=["a"]), "lora[][path]", "c")


def test_a_mask_is_refused_where_the_family_has_none(editor: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="Flux2KleinPipeline edits whole pictures") as caught:
        editor.images.edit(image=picture(), mask=picture(), prompt="a fox", extra_body=SMALL)
    assert caught.value.param == "mask"


def test_an_edit_without_a_readable_picture_is_refused(editor: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="cannot be read"):
        editor.images.edit(image=picture()[:60], prompt="a fox", extra_body=SMALL)
    with pytest.raises(openai.BadRequestError, match="at most 16"):
        editor.images.edit(image=[picture()] * 17, prompt="a fox", extra_body=SMALL)
    response = httpx.post(f"{editor.base_url}images/edits", data={"prompt": "a fox"}, files={"x": b"1"})
    assert response.status_code == 400 and response.json()["error"]["param"] == "x"


def test_no_pictures_at_all_are_refused_by_name(editor: openai.OpenAI) -> None:
    body = {"prompt": "a fox", "image": [], **SMALL}
    for path in ("generations", "edits"):
        response = httpx.post(f"{editor.base_url}images/{path}", json=body, timeout=30)
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, "image"), error
        assert "one picture or several are accepted" in error["message"]


@pytest.mark.parametrize(
    ("asked", "format", "told"),
    [(None, "png", "transparent"), ("transparent", "webp", "transparent"), ("opaque", "jpeg", "opaque")],
)
def test_layers_are_told_to_be_transparent(layers: openai.OpenAI, asked: Any, format: Any, told: str) -> None:
    answer = layers.images.edit(
        image=picture(), prompt="a fox", background=asked or openai.omit, output_format=format, extra_body=LAYERS
    )
    assert answer.data is not None and answer.background == told
    assert opened(answer.data[0].b64_json).mode == ("RGBA" if told == "transparent" else "RGB")


def test_layers_are_of_what_is_transparent(layers: openai.OpenAI) -> None:
    made = []
    for mode in ("RGBA", "RGB"):
        file = io.BytesIO()
        Image.new("RGBA", (64, 64), (200, 30, 60, 90)).convert(mode).save(file, "PNG")
        answer = layers.images.edit(image=file.getvalue(), prompt="a fox", extra_body=LAYERS)
        assert answer.data is not None
        made.append(answer.data[0].b64_json)
    assert made[0] != made[1]


def test_layers_cannot_be_opaque(layers: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="makes layers, which are transparent: ask for jpeg") as caught:
        layers.images.edit(image=picture(), prompt="a fox", background="opaque", extra_body=LAYERS)
    assert caught.value.param == "background"


def test_whoever_asked_is_told_back_in_a_stream_too(client: openai.OpenAI) -> None:
    events: list[Any] = list(
        client.images.generate(
            prompt="a fox", stream=True, extra_body={"num_inference_steps": 1, "safety_identifier": "one"}
        )
    )
    assert events[-1].safety_identifier == "one"


def test_the_kind_of_a_picture_with_an_address_is_told_where_the_system_knows_none(
    client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = client.images.generate(
        prompt="a fox", response_format="url", output_format="webp", extra_body={"num_inference_steps": 1}
    )
    monkeypatch.setattr(starlette.responses, "guess_type", lambda *_, **__: (None, None))
    assert answer.data is not None
    assert httpx.get(str(answer.data[0].url)).headers["content-type"] == "image/webp"


@pytest.mark.parametrize(("path", "name"), [("images/generations", "seed"), ("requests", "parameters")])
def test_a_body_of_very_many_values_is_refused_unread(
    caller: Caller, monkeypatch: pytest.MonkeyPatch, path: str, name: str
) -> None:
    def unread(*_: Any) -> None:
        raise AssertionError("it was read")

    monkeypatch.setattr(form, "json", SimpleNamespace(loads=unread))
    monkeypatch.setattr(Submission, "model_validate_json", unread)
    body = f'{{"prompt": "a", "{name}": [{",".join(["[]"] * 300_000)}]}}'
    response = caller.post(f"/v1/{path}", content=body.encode())
    assert (response.status_code, "500000 values" in response.text) == (400, True), response.text


def test_requests_without_previews_are_told_of_none(caller: Caller, client: openai.OpenAI) -> None:
    client.images.generate(prompt="a dog", extra_body={"num_inference_steps": 4})
    assert not caller.service.records.all()[-1].last("preview")
