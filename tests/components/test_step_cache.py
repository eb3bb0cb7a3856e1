"""Requests that take turns on a model with a step cache: each gets the picture that it gets alone."""

import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FirstBlockCacheConfig, TaylorSeerCacheConfig
from diffusers.hooks.first_block_cache import FBCSharedBlockState
from diffusers.hooks.taylorseer_cache import TaylorSeerState

import triptych
from triptych.components.acceleration import Acceleration
from triptych.components.step_cache import Memory, is_cached, remembering
from triptych.errors import Cancelled, UsageError
from triptych.runtime.lanes import Work
from triptych.runtime.model import Model
from triptych.runtime.step_lane import StepLane
from triptych.state import State

ASK: dict[str, Any] = {
    "prompt": "a red fox", "negative_prompt": "a cat", "true_cfg_scale": 4.0, "height": 32, "width": 48,
    "max_sequence_length": 16, "output_type": "pt",
}  # fmt: skip
CACHES = {"first_block:0.9": FirstBlockCacheConfig(0.9), "taylorseer:3": TaylorSeerCacheConfig(cache_interval=3)}
# So different in length that the short one, which is more urgent, takes its turns between the long one's steps.
LONG, SHORT = {"num_inference_steps": 16, "seed": 7}, {"num_inference_steps": 4, "seed": 8}


@pytest.fixture(scope="module")
def repo(tiny_repo: Callable[..., Path]) -> Path:
    return tiny_repo("flux")


@pytest.fixture(scope="module", params=CACHES)
def model(request: pytest.FixtureRequest, repo: Path) -> Model:
    return triptych.load(repo, device="cpu", acceleration={"denoiser": Acceleration(cache=request.param)})


@pytest.fixture
def lane(model: Model) -> Iterator[StepLane]:
    lane = StepLane(model, "test", threads=1, budget=10**9)
    yield lane
    lane.close()


def diffusers_pictures(repo: Path, config: Any) -> torch.Tensor:
    """What diffusers' own pipeline makes, with a step cache or without."""
    pipeline = DiffusionPipeline.from_pretrained(repo, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if config is not None:
        pipeline.transformer.enable_cache(config)
    seed, steps = LONG["seed"], LONG["num_inference_steps"]
    result = pipeline(**ASK, num_inference_steps=steps, generator=torch.Generator("cpu").manual_seed(seed))
    pictures: torch.Tensor = result.images
    return pictures


def remembered() -> list[object]:
    """Everything that any step cache remembers in this process."""
    gc.collect()
    return [each for each in gc.get_objects() if type(each) in (FBCSharedBlockState, TaylorSeerState)]


def waiting(model: Model, **changes: Any) -> State:
    """A state that waits for the denoiser."""
    state = model.admit(triptych.Request(**{**ASK, "exact": False, **changes}))
    assert not list(model.segment(state))
    return state


def test_a_cached_picture_is_the_one_of_diffusers_with_the_same_cache_and_an_exact_one_passes_it_by(
    model: Model, repo: Path
) -> None:
    config = CACHES[model.accelerated.asked[triptych.RoleType.DENOISER].cache or ""]
    plain = diffusers_pictures(repo, None)
    cached = diffusers_pictures(repo, config)
    assert (cached - plain).abs().max() > 1e-3  # the cache leaves something out
    assert torch.equal(model.generate(**ASK, **LONG, exact=False).images, cached)
    assert torch.equal(model.generate(**ASK, **LONG, exact=True).images, plain)
    assert torch.equal(model.generate(**ASK, **LONG, exact=False).images, cached)


def take_turns(model: Model, lane: StepLane, first: dict[str, Any], second: dict[str, Any]) -> list[Any]:
    """Run two requests on a lane, the second from the middle of the first on; returns what became of both."""
    outcomes: dict[int, Any] = {}
    ended = threading.Semaphore(0)

    def work(number: int, state: State) -> Work:
        def done(outcome: State | Exception) -> None:
            outcomes[number] = outcome
            ended.release()

        return Work(state, done)

    works = [work(0, waiting(model, **first)), work(1, waiting(model, **second))]
    seeds: list[int] = []
    in_the_middle, go_on = threading.Event(), threading.Event()

    def watch(_: str, step: int, __: int) -> None:
        seeds.append(0)
        if step == 2:
            in_the_middle.set()
            assert go_on.wait(20)

    works[0].on_step = watch
    works[1].on_step = lambda *_: seeds.append(1)
    lane.put(works[0])
    assert in_the_middle.wait(20)
    lane.put(works[1])
    go_on.set()
    assert ended.acquire(timeout=20) and ended.acquire(timeout=20)
    turns = [seed for seed, before in zip(seeds, [None, *seeds]) if seed != before]
    assert turns == [0, 1, 0], "the second was to run between steps of the first"
    return [outcomes[0], outcomes[1]]


def test_requests_that_take_turns_get_the_pictures_that_they_get_alone_and_leave_nothing_behind(
    model: Model, lane: StepLane
) -> None:
    alone = [model.generate(**ASK, **each, exact=False).images for each in (LONG, SHORT)]
    states = take_turns(model, lane, LONG, SHORT)
    for state, expected in zip(states, alone):
        assert torch.equal(model.run(state).result.images, expected)
    assert lane.forwards.keys() == {1}  # none of them shared
    assert remembered() == []


def test_an_exact_request_between_the_steps_of_another_is_exact_and_leaves_it_its_memory(
    model: Model, lane: StepLane, repo: Path
) -> None:
    exact = {**SHORT, "exact": True}
    expected = triptych.load(repo, device="cpu").generate(**ASK, **exact).images
    states = take_turns(model, lane, LONG, exact)
    assert torch.equal(model.run(states[0]).result.images, model.generate(**ASK, **LONG, exact=False).images)
    assert torch.equal(model.run(states[1]).result.images, expected)


def test_a_cancelled_request_leaves_nothing_behind(model: Model, lane: StepLane) -> None:
    outcomes: list[Any] = []
    ended = threading.Event()
    work = Work(waiting(model, **LONG), lambda outcome: (outcomes.append(outcome), ended.set())[1])
    works = [work]
    work.on_step = lambda _, step, __: works[0].cancel() if step == 3 else None
    lane.put(work)
    assert ended.wait(20)
    assert isinstance(outcomes[0], Cancelled)
    del work, works[:]
    assert remembered() == []


def test_models_without_a_cache_are_left_alone(repo: Path) -> None:
    model = triptych.load(repo, device="cpu")
    with remembering(model.components["transformer"], Memory()), remembering(model.components["transformer"], None):
        assert not is_cached(model.components["transformer"])


def test_what_diffusers_cannot_cache_is_refused_before_weights_are_read(tiny_repo: Callable[..., Path]) -> None:
    for family, cache, message in (
        ("z_image", "taylorseer", "ZImageTransformer2DModel has no step caches in diffusers"),
        ("flux2_klein", "first_block", "its first block returns other things than its last"),
        ("hunyuan_video15", "first_block", "its blocks are none that diffusers knows"),
        ("wan", "taylorseer", "it finds nothing in it to remember"),
    ):
        with pytest.raises(UsageError, match=f"denoiser: cache='{cache}': transformer: .*{message}"):
            triptych.load(tiny_repo(family), role="server", acceleration={"denoiser": Acceleration(cache=cache)})
