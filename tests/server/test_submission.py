"""Submissions: what a model is not asked to make, because it would be too large."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from filming import Client, loaded
from PIL import Image

import triptych
from triptych.engine.base import Engine
from triptych.errors import ParameterError
from triptych.request import Request
from triptych.server.limits import Limits
from triptych.server.submission import Submission, check_outputs, request_of

from .openai.test_videos import picture

LAYERED = ("qwen_image_layered", {}, {"image": Image.new("RGB", (64, 48)), "num_inference_steps": 1})
HUNYUAN = ("hunyuan_video15", {"task": "i2v"}, {"image": Image.new("RGB", (64, 48)), "num_inference_steps": 1})
LTX = ("ltx2", {"version": "2.5"}, {"num_inference_steps": 1, "width": 64, "height": 64, "num_frames": None})
Model = tuple[str, dict[str, Any], dict[str, Any]]


def settled(tiny_repo: Callable[..., Path], model: Model, **parameters: Any) -> dict[str, Any]:
    """What a model makes of a request's parameters before anything is computed."""
    family, variant, given = model
    server = triptych.load(tiny_repo(family, **variant), role="server", device="cpu")
    return server.admit(Request(prompt="a fox", exact=False, **{**given, **parameters})).fields


@pytest.mark.parametrize(
    ("model", "parameters", "field", "words"),
    [
        (LAYERED, {"layers": 1_000_000}, "layers", "layers=1000000, num_images_per_prompt=1, each of some 1048576"),
        (HUNYUAN, {"num_frames": 144_001}, "num_frames", "num_frames=144001, num_videos_per_prompt=1, each of some"),
        (LTX, {"min_seconds": 1e5, "max_seconds": 2e7}, "max_seconds", "width=64, height=64, num_videos_per_prompt=1"),
        (LTX, {"frame_rate": 1e9}, "frame_rate", "max_seconds=20.0, frame_rate=1000000000.0"),
    ],
    ids=["layers", "frames-of-a-picture", "seconds", "rate"],
)
def test_what_has_no_size_or_no_number_of_frames_is_bounded_too(
    tiny_repo: Callable[..., Path], model: Model, parameters: dict[str, Any], field: str, words: str
) -> None:
    with pytest.raises(ParameterError, match="0 pixels in all are accepted") as caught:
        check_outputs(settled(tiny_repo, model, **parameters), Limits())
    assert caught.value.field == field
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        (LAYERED, {"layers": 8, "num_images_per_prompt": 4}),
        (HUNYUAN, {"num_frames": 601}),
        (LTX, {"max_seconds": 60.0}),
    ],
    ids=["layers", "frames-of-a-picture", "seconds"],
)
def test_what_models_are_made_for_is_within_the_bounds(
    tiny_repo: Callable[..., Path], model: Model, parameters: dict[str, Any]
) -> None:
    check_outputs(settled(tiny_repo, model, **parameters), Limits())


def test_the_steps_of_all_levels_of_a_pyramid_are_bounded_together() -> None:
    name = "pyramid_num_inference_steps_list"
    request_of(Submission(parameters={name: [500, 500]}), Limits())
    for levels in ([500, 501], [10**9], [1, 10**9]):
        with pytest.raises(ParameterError, match="at most 1000 steps are accepted") as caught:
            request_of(Submission(parameters={name: levels}), Limits())  # type: ignore[dict-item]
        assert caught.value.field == name


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
