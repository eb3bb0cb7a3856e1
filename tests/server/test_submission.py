"""Submissions: what a model is not asked to make, because it would be too large."""

import base64
import io
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from weakref import WeakSet

import httpx
import pytest
from filming import Client, loaded
from PIL import Image

import triptych
from triptych.engine.base import Engine
from triptych.errors import ParameterError
from triptych.request import Request
from triptych.server.limits import Limits
from triptych.server.problems import Refusal
from triptych.server.submission import Pictures, Submission, check_outputs, request_of

from .openai.test_videos import picture

LAYERED = ("qwen_image_layered", {}, {"image": Image.new("RGB", (64, 48)), "num_inference_steps": 2})
HUNYUAN = ("hunyuan_video15", {"task": "i2v"}, {"image": Image.new("RGB", (64, 48)), "num_inference_steps": 1})
LTX = ("ltx2", {"version": "2.5"}, {"num_inference_steps": 2, "width": 64, "height": 64, "num_frames": None})
HELIOS = ("helios", {}, {"num_inference_steps": 1, "width": 64, "height": 64, "num_frames": 9})
Model = tuple[str, dict[str, Any], dict[str, Any]]


def check(tiny_repo: Callable[..., Path], model: Model, limits: Limits | None = None, **parameters: Any) -> None:
    """Check what a model makes of a request's parameters, before anything is computed."""
    family, variant, given = model
    server = triptych.load(tiny_repo(family, **variant), role="server", device="cpu")
    settled = server.admit(Request(prompt="a fox", exact=False, **{**given, **parameters})).fields
    check_outputs(settled, limits or Limits(), server.family)


@pytest.mark.parametrize(
    ("model", "parameters", "field", "words"),
    [
        (LAYERED, {"layers": 1_000_000}, "layers", "layers=1000000, num_images_per_prompt=1, each of some 1048576"),
        (HUNYUAN, {"num_frames": 144_001}, "num_frames", "num_frames=144001, num_videos_per_prompt=1, each of some"),
        (LTX, {"min_seconds": 1e5, "max_seconds": 2e7}, "max_seconds", "width=64, height=64, num_videos_per_prompt=1"),
        (LTX, {"frame_rate": 1e3, "max_seconds": 900.0}, "frame_rate", "max_seconds=900.0, frame_rate=1000.0"),
    ],
    ids=["layers", "frames-of-a-picture", "seconds", "rate"],
)
def test_what_has_no_size_or_no_number_of_frames_is_bounded_too(
    tiny_repo: Callable[..., Path], model: Model, parameters: dict[str, Any], field: str, words: str
) -> None:
    with pytest.raises(ParameterError, match="0 pixels in all are accepted") as caught:
        check(tiny_repo, model, **parameters)
    assert caught.value.field == field
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        (LAYERED, {"layers": 8, "num_images_per_prompt": 4}),
        (HUNYUAN, {"num_frames": 601}),
        (LTX, {"max_seconds": 60.0}),
        (LTX, {"num_frames": 9, "frame_rate": 0.01}),
        (HELIOS, {"num_frames": 990}),
    ],
    ids=["layers", "frames-of-a-picture", "seconds", "slow", "chunks"],
)
def test_what_models_are_made_for_is_within_the_bounds(
    tiny_repo: Callable[..., Path], model: Model, parameters: dict[str, Any]
) -> None:
    check(tiny_repo, model, **parameters)


@pytest.mark.parametrize(
    ("model", "parameters", "field", "words"),
    [
        (HELIOS, {"num_latent_frames_per_chunk": 10**9, "num_frames": 1}, "width", "times that in all: at most"),
        (HELIOS, {"history_sizes": [10**9, 2, 1]}, "width", "times that in all: at most"),
        (HELIOS, {"num_latent_frames_per_chunk": 1, "num_frames": 5000}, "num_frames", "of 5000 chunks: at most 1000"),
        (LTX, {"num_frames": 9001, "frame_rate": 1.0}, "frame_rate", "9001 frames at 1 a second: at most 3600 seconds"),
        (LTX, {"max_seconds": 4000.0, "frame_rate": 1.0}, "max_seconds", "at most 3600 seconds are accepted"),
    ],
    ids=["chunk", "history", "chunks", "slow", "long"],
)
def test_what_takes_more_than_its_pixels_tell_is_bounded_too(
    tiny_repo: Callable[..., Path], model: Model, parameters: dict[str, Any], field: str, words: str
) -> None:
    with pytest.raises(ParameterError, match=words) as caught:
        check(tiny_repo, model, **parameters)
    assert caught.value.field == field


def test_the_second_stage_of_a_video_counts(tiny_repo: Callable[..., Path]) -> None:
    limits = Limits(video_pixels=64 * 64 * 9)
    model = (
        "ltx2",
        {"version": "2.3", "upsampler": True},
        {"num_inference_steps": 2, "width": 64, "height": 64, "num_frames": 9},
    )
    check(tiny_repo, model, limits)
    with pytest.raises(ParameterError, match="4 times that in all: at most 36864 pixels"):
        check(tiny_repo, model, limits, two_stage=True)


def test_a_flag_whose_name_speaks_of_latents_can_be_sent() -> None:
    sent = {"add_noise_to_image_latents": False, "add_noise_to_video_latents": True}
    request = request_of(Submission(parameters=sent), Limits())  # type: ignore[arg-type]
    assert request.parameters.items() >= sent.items()
    with pytest.raises(ParameterError, match="tensors and videos cannot be sent"):
        request_of(Submission(parameters={"image_latents": [1.0]}), Limits())


def test_the_steps_of_all_levels_of_a_pyramid_are_bounded_together() -> None:
    name = "pyramid_num_inference_steps_list"
    request_of(Submission(parameters={name: [500, 500]}), Limits())
    for levels in ([500, 501], [10**9], [1, 10**9]):
        with pytest.raises(ParameterError, match="at most 1000 steps are accepted") as caught:
            request_of(Submission(parameters={name: levels}), Limits())  # type: ignore[dict-item]
        assert caught.value.field == name


def test_a_picture_whose_exif_data_cannot_be_read_is_refused_by_name() -> None:
    # Turned by 90 degrees, and with a unit of resolution (296) that is larger than such a unit can be.
    fields = struct.pack("<IHHHIIHHIII", 8, 2, 274, 3, 1, 6, 296, 4, 1, 70_000, 0)
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG", exif=b"Exif\0\0II*\0" + fields)
    sent = base64.b64encode(file.getvalue()).decode()
    with pytest.raises(ParameterError, match="this picture cannot be read") as caught:
        request_of(Submission(parameters={"image": sent}), Limits())
    assert caught.value.field == "image"


def in_base64(side: int, format: str = "PNG", mode: str = "RGB") -> str:
    file = io.BytesIO()
    Image.new(mode, (side, side)).save(file, format)
    return base64.b64encode(file.getvalue()).decode()


def test_a_format_whose_tiles_are_larger_than_its_pictures_is_not_read() -> None:
    with pytest.raises(ParameterError, match="one of PNG, JPEG, WEBP, BMP, GIF"):
        request_of(Submission(parameters={"image": in_base64(8, "TIFF")}), Limits())


def test_the_pictures_of_all_requests_that_have_not_ended_are_bounded_before_they_are_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Pictures, "_all", WeakSet())  # those of other tests may be there still
    limits = Limits(waiting_pixels=3 * 64**2)
    sent = Submission(parameters={"image": in_base64(64)})
    two = [request_of(sent, limits) for _ in range(2)]
    decoded: list[str] = []
    monkeypatch.setattr(Image.Image, "convert", lambda *_: decoded.append("one"))
    with pytest.raises(Refusal, match="fill the memory") as caught:
        request_of(Submission(parameters={"image": [in_base64(64)] * 2}), limits)
    assert (caught.value.problem.status, caught.value.problem.headers["Retry-After"]) == (429, "10")
    assert decoded == ["one"], "the second would be too much"
    request_of(sent, limits)  # though the refusal, and what it came from, are still there
    for each in two:
        assert each.release is not None
        each.release()
    request_of(Submission(parameters={"image": [in_base64(64)] * 3}), limits)
    with pytest.raises(ParameterError, match="at most 64 pixels"):
        request_of(sent, Limits(pixels=64))


def test_transparency_is_kept_for_those_that_see_it() -> None:
    for mode, seen in (("RGBA", "RGBA"), ("LA", "RGBA"), ("RGB", "RGB"), ("L", "RGB")):
        sent = Submission(parameters={"image": in_base64(8, mode=mode)})
        for transparency, expected in ((True, seen), (False, "RGB")):
            opened: Any = request_of(sent, Limits(), transparency=transparency).parameters["image"]
            assert opened.mode == expected, mode


def test_one_request_alone_is_never_refused_for_want_of_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pictures, "_all", WeakSet())
    request_of(Submission(parameters={"image": in_base64(64)}), Limits(waiting_pixels=1))


@pytest.fixture(scope="module")
def hunyuan(tiny_repo: Callable[..., Path]) -> Iterator[Engine]:
    family, variant, _ = HUNYUAN
    yield from loaded(tiny_repo(family, **variant))


def test_a_video_that_is_too_long_is_refused_by_the_field_that_asks_for_it(
    film: Callable[..., Client], hunyuan: Engine
) -> None:
    client = film(hunyuan)
    for fields, param in (({"seconds": "600", "fps": "240"}, "seconds"), ({"num_frames": "144001"}, "num_frames")):
        response = httpx.post(
            f"{client.root}/v1/videos", data={"prompt": "a fox", **fields}, files={"input_reference": picture("red")}
        )
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, param), error
        assert "at most 2000000000 pixels in all" in error["message"]
