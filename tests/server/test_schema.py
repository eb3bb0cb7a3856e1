"""The generated OpenAPI schema: whatever fits it, and whatever does not, is answered as it says."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from filming import Client, loaded, serving
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis.checks import CHECKS
from serving import engine as embedded_engine

from triptych.server.jobs import JobStore
from triptych.server.limits import Limits

pytestmark = pytest.mark.slow

EXAMPLES = 12
"""Of each operation and kind."""
SMALL = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 1, "guidance_scale": 1.0}
NAMES = ("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance")
IDS = ("name", "video_id")


@pytest.fixture(scope="module", params=["images", "videos"])
def server(request: pytest.FixtureRequest, tiny_repo: Callable[..., Path], tmp_path_factory: Any) -> Iterator[Client]:
    """A server of a model that makes images or videos, small ones unless asked otherwise."""
    limits = Limits(body=200_000, video_pixels=100_000)
    if request.param == "images":
        with serving(embedded_engine(), limits, JobStore(tmp_path_factory.mktemp("state"))) as client:
            yield client
        return
    folder = tmp_path_factory.mktemp("model") / "wan"
    shutil.copytree(tiny_repo("wan"), folder)
    (folder / "triptych.json").write_text(json.dumps({"defaults": SMALL}))
    for engine in loaded(folder):
        with serving(engine, limits, JobStore(tmp_path_factory.mktemp("state"))) as client:
            yield client


@pytest.mark.parametrize("mode", [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE])
def test_every_answer_is_one_that_the_schema_names(server: Client, mode: Any) -> None:
    schema = schemathesis.openapi.from_url(f"{server.root}/openapi.json")
    checks = [CHECKS.get_one(name) for name in NAMES]
    there = [*_made(server)]
    problems: dict[str, str] = {}
    for result in schema.get_all_operations():
        operation = result.ok()

        @seed(7)
        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            derandomize=False,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode), known=st.booleans(), which=st.integers(0, 99))
        def ask(case: Any, known: bool, which: int) -> None:
            for each in IDS:
                if known and each in (case.path_parameters or {}):
                    case.path_parameters[each] = there[which % len(there)]
            case.call_and_validate(base_url=server.root, checks=checks, timeout=30)

        try:
            ask()
        except Exception as error:  # noqa: BLE001 (all operations are looked at before any is complained of)
            server.service.cancel_all()
            if "Unsatisfiable" not in type(error).__name__:
                problems[operation.label] = f"{type(error).__name__}: {error}"[:1500]
    server.service.cancel_all()
    assert not problems, "\n\n".join(f"{label}\n{text}" for label, text in problems.items())


def _made(server: Client) -> Iterator[str]:
    """Make some requests, and videos where the model makes those; yields their ids."""
    quick = {"prompt": "a fox", "num_inference_steps": 1}
    for _ in range(3):
        answer = httpx.post(f"{server.root}/v1/requests", json={"parameters": quick})
        yield answer.json()["id"]
        video = httpx.post(f"{server.root}/v1/videos", json=quick)
        if video.status_code == 200:
            yield video.json()["id"]
