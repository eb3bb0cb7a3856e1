"""The official client against a model that is split over processes."""

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from serving import Caller, engine, served

import triptych
from triptych import embedded

from .test_images import client_of, opened, pixels

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Caller]:
    """A caller of a server whose roles are processes."""
    from triptych.engine.ray import RayEngine

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIPTYCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        root = str(Path(triptych.__file__).parents[1])
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))))
        with (
            RayEngine(embedded.path(), pools="encoder=1,denoiser=1,decoder=1", threads=1) as made,
            served(serves=made) as caller,
        ):
            yield caller


def test_a_stream_brings_previews_that_look_like_the_picture(split: Caller) -> None:
    client = client_of(split.url)
    events: list[Any] = list(
        client.images.generate(prompt="a red heart", stream=True, partial_images=2, extra_body={"seed": 7})
    )
    assert [each.type for each in events] == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    *previews, final = (opened(each.b64_json) for each in events)
    assert all(each.size == (64, 64) and pixels(each).std() > 20 for each in previews)
    assert np.corrcoef(pixels(previews[-1]).ravel(), pixels(final).ravel())[0, 1] > 0.65


def test_previews_of_a_long_request_come_while_it_runs(split: Caller) -> None:
    client = client_of(split.url)
    times = []
    body = {"seed": 7, "num_inference_steps": 300}
    for event in client.images.generate(prompt="a dog", stream=True, partial_images=3, extra_body=body):
        times.append((event.type, time.monotonic()))
    assert [kind for kind, _ in times] == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    first, last = times[0][1], times[-1][1]
    assert last - first > 0.5, "the first is there long before the picture"


def test_the_picture_is_the_one_of_the_whole_model(split: Caller) -> None:
    parameters: dict[str, Any] = {"seed": 11, "num_inference_steps": 2, "exact": True}
    answer = client_of(split.url).images.generate(prompt="a cat", extra_body=parameters)
    expected = engine().generate(prompt="a cat", **parameters).images
    assert answer.data is not None and expected is not None
    assert np.array_equal(np.asarray(opened(answer.data[0].b64_json)), np.asarray(expected[0]))


def test_a_caller_that_leaves_stops_its_request_in_the_other_process(split: Caller) -> None:
    body = {"prompt": "a dog", "num_inference_steps": 900}
    with httpx.Client(base_url=split.url) as leaving, pytest.raises(httpx.ReadTimeout):
        leaving.post("/v1/images/generations", json=body, timeout=1.5)
    router = split.service.open_engine().router
    quiet = threading.Event()
    end = time.monotonic() + 5
    while any(each.tickets for each in router.replicas) and time.monotonic() < end:
        quiet.wait(0.05)
    assert not any(each.tickets for each in router.replicas), "it would have taken a minute"


def test_models_are_listed(split: Caller) -> None:
    client: openai.OpenAI = client_of(split.url)
    assert [model.id for model in client.models.list()] == ["emoji-64"]
