"""Previews: what the latents in the middle of denoising will look like, cheaply and without ever failing a request."""

import io
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from PIL import Image

import triptych
from triptych import embedded
from triptych.runtime import palette, preview
from triptych.runtime.decoder_lane import DecoderLane
from triptych.runtime.lanes import Work
from triptych.runtime.model import Model
from triptych.runtime.palette import Palette
from triptych.runtime.preview import Previews, Projection
from triptych.runtime.segment import finish
from triptych.runtime.step_lane import StepLane
from triptych.state import State

ASK: dict[str, Any] = {"prompt": "a dog", "seed": 7, "output_type": "pt", "exact": False}


@pytest.fixture(scope="module")
def model() -> Model:
    return triptych.load(embedded.path(), device="cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRIPTYCH_CACHE", str(tmp_path))
    return tmp_path


def handed(model: Model, segments: int, **changes: Any) -> State:
    """A state after so many segments."""
    state = model.admit(triptych.Request(**{**ASK, **changes}))
    for _ in range(segments):
        finish(model.segment(state))
    return state


@pytest.fixture(scope="module")
def projection(model: Model) -> Projection:
    return drawn(model, handed(model, 2, num_inference_steps=1))


def drawn(model: Model, sample: State) -> Projection:
    """The map that is fitted to random latents like a sample's."""
    made = Palette("no model of this name")
    for _ in made.draw(sample, lambda state: finish(model.segment(state))):
        pass
    assert made.projection is not None
    return made.projection


class Denoised:
    """A request on a lane of its own, and what it was told."""

    def __init__(self, model: Model, previews: Previews | None, steps: int = 8, **changes: Any) -> None:
        lane = StepLane(model, "test", threads=1, budget=0)
        ended = threading.Event()
        self.outcome: Any = None

        def done(outcome: Any) -> None:
            self.outcome = outcome
            ended.set()

        lane.put(Work(handed(model, 1, num_inference_steps=steps, **changes), done, previews=previews))
        assert ended.wait(60)
        lane.close()


def wanted(projection: Projection, count: int) -> tuple[Previews, list[tuple[int, int, bytes]]]:
    told: list[tuple[int, int, bytes]] = []
    return Previews(count, projection, lambda *each: told.append(each)), told


def alike(one: torch.Tensor, other: torch.Tensor) -> float:
    small = [torch.nn.functional.adaptive_avg_pool2d(each, 16).flatten() for each in (one, other)]
    return float(torch.corrcoef(torch.stack(small))[0, 1])


def opened(png: bytes) -> torch.Tensor:
    with Image.open(io.BytesIO(png)) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).movedim(2, 0) / 255


@pytest.mark.parametrize("prompt", ["a dog", "green apple", "a red heart"])
def test_the_last_preview_looks_like_the_picture_and_like_no_other(
    model: Model, projection: Projection, prompt: str
) -> None:
    previews, told = wanted(projection, 3)
    state = Denoised(model, previews, prompt=prompt).outcome
    assert [(step, steps) for step, steps, _ in told] == [(2, 8), (4, 8), (6, 8)]
    picture = model.run(state).result.images[0].float()
    other = model.generate(**{**ASK, "prompt": "a blue car", "num_inference_steps": 4}).images[0].float()
    shown = opened(told[-1][2])
    assert shown.shape == (3, 64, 64)
    assert shown.std() > 0.1, "an empty preview shows nothing"
    assert alike(shown, picture) > 0.65
    assert alike(shown, picture) > alike(shown, other) + 0.1


def test_previews_do_not_change_the_picture(model: Model, projection: Projection) -> None:
    previews, told = wanted(projection, 3)
    watched, unwatched = Denoised(model, previews).outcome, Denoised(model, None).outcome
    assert len(told) == 3
    assert torch.equal(watched.fields["latents"], unwatched.fields["latents"])


def test_fewer_steps_than_previews_give_fewer_previews(model: Model, projection: Projection) -> None:
    for steps, expected in ((1, []), (2, [1]), (3, [1, 2])):
        previews, told = wanted(projection, 3)
        Denoised(model, previews, steps=steps)
        assert [step for step, _, _ in told] == expected


def test_a_preview_that_fails_is_logged_and_the_request_goes_on(
    model: Model, projection: Projection, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise OSError("nobody listens")

    with caplog.at_level(logging.WARNING, "triptych.runtime.preview"):
        state = Denoised(model, Previews(1, projection, fail)).outcome
        assert isinstance(state, State)
        state = Denoised(model, wanted(Projection(torch.zeros(15, 48)), 1)[0]).outcome
        assert isinstance(state, State)
    assert "nobody listens" in caplog.text and "7 channels" in caplog.text


@pytest.mark.parametrize("index", [1, 3])
def test_the_estimate_is_exact_for_euler_steps(index: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(5)
    clean, noise = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    x = before = noise
    for timestep in scheduler.timesteps[:index]:
        before, x = x, scheduler.step(noise - clean, timestep, x, return_dict=False)[0]
    assert torch.allclose(preview.estimate(scheduler, before, x), clean, atol=1e-5)


def test_a_scheduler_of_higher_order_gives_an_estimate_near_it() -> None:
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    scheduler.set_timesteps(8)
    clean, noise = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    x = before = noise
    for timestep in scheduler.timesteps[:4]:
        before, x = x, scheduler.step(noise - clean, timestep, x, return_dict=False)[0]
    estimated = preview.estimate(scheduler, before, x)
    assert (estimated - clean).abs().mean() < 0.05 * (x - clean).abs().mean()


def test_without_noise_levels_the_latents_are_shown_as_they_are() -> None:
    latents = torch.randn(1, 4, 8, 8)
    assert preview.estimate(object(), torch.randn(1, 4, 8, 8), latents) is latents
    assert preview.estimate(None, None, latents) is latents  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shape", "aspect", "grid"),
    [
        ((2, 5, 6, 8), 1.0, (2, 5, 6, 8)),
        ((2, 5, 3, 6, 8), 1.0, (2, 5, 6, 8)),
        ((2, 48, 5), 8 / 6, (2, 5, 6, 8)),
        ((2, 48, 5), 3.0, (2, 5, 4, 12)),
        ((1, 48, 5), 0.33, (1, 5, 12, 4)),
    ],
)
def test_latents_of_every_form_become_a_grid(shape: tuple[int, ...], aspect: float, grid: tuple[int, ...]) -> None:
    latents = torch.arange(int(np.prod(shape)), dtype=torch.float32).reshape(shape)
    found = preview.grid_of(latents, aspect)
    assert tuple(found.shape) == grid
    if len(shape) == 3:
        assert torch.equal(found[0, :, 0, 1], latents[0, 1]), "tokens go row by row"
    if len(shape) == 5:
        assert torch.equal(found, latents[:, :, 1]), "the frame in the middle"


@pytest.mark.parametrize("shape", [(1, 4, 16, 16), (1, 4, 5, 16, 16), (1, 256, 4)])
def test_random_latents_have_the_form_and_the_means_of_real_ones(shape: tuple[int, ...]) -> None:
    real = torch.randn(shape) * 0.5
    axis = 2 if len(shape) == 3 else 1
    real = real.movedim(axis, -1).add(torch.tensor([0.0, 5.0, -5.0, 2.0])).movedim(-1, axis)
    drawn = palette.similar(real, 1.0, torch.Generator().manual_seed(0))
    assert drawn.shape == real.shape
    rest = [each for each in range(len(shape)) if each != axis]
    assert torch.allclose(drawn.mean(rest), real.mean(rest), atol=0.2)


@pytest.fixture
def decoder(model: Model) -> Iterator[DecoderLane]:
    lane = DecoderLane(model, "test", threads=1)
    yield lane
    lane.close()


def decode(lane: DecoderLane, state: State) -> Any:
    ended, outcomes = threading.Event(), []

    def done(outcome: Any) -> None:
        outcomes.append(outcome)
        ended.set()

    lane.put(Work(state, done))
    assert ended.wait(60)
    return outcomes[0]


def test_a_decoder_fits_the_map_once_and_finds_it_on_disk_after(
    model: Model, decoder: DecoderLane, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert decoder.projection(5) is None, "nothing was decoded yet"
    decode(decoder, handed(model, 2, num_inference_steps=1))
    fitted = decoder.projection(60)
    assert fitted is not None
    assert [path.suffix for path in (cache / "previews").iterdir()] == [".safetensors"]
    monkeypatch.setattr(Palette, "draw", lambda *_: pytest.fail("it was fitted again"))
    again = DecoderLane(model, "again", threads=1)
    found = again.projection(5)
    again.close()
    assert found is not None and torch.equal(found.weight, fitted.weight)


def test_a_damaged_file_is_fitted_again(model: Model, cache: Path) -> None:
    path = cache / "previews" / f"{model.fingerprint}.safetensors"
    path.parent.mkdir()
    path.write_bytes(b"nothing of use")
    lane = DecoderLane(model, "test", threads=1)
    decode(lane, handed(model, 2, num_inference_steps=1))
    assert lane.projection(60) is not None
    lane.close()
    assert palette.recall(model.fingerprint)[0] is not None


def test_requests_are_decoded_while_a_map_is_fitted(model: Model, decoder: DecoderLane) -> None:
    state = handed(model, 2, num_inference_steps=1)
    expected = model.run(state).result.images
    decode(decoder, state.copy())
    fitting = threading.Thread(target=decoder.projection, args=(60,))
    fitting.start()
    decoded = decode(decoder, state.copy())
    fitting.join()
    assert torch.equal(decoded.result.images, expected)


def test_a_model_that_cannot_be_fitted_has_no_previews_and_is_asked_once(
    model: Model, decoder: DecoderLane, caplog: pytest.LogCaptureFixture
) -> None:
    state = handed(model, 2, num_inference_steps=1)
    state.fields["latents"] = state.fields["latents"].to(torch.int32)
    decoder._sample = state
    with caplog.at_level(logging.WARNING, "triptych.runtime.decoder_lane"):
        assert decoder.projection(20) is None
        assert decoder.projection(20) is None
    assert caplog.text.count("there are no previews of this model") == 1


def test_a_lack_of_memory_while_it_is_fitted_is_not_the_end_of_previews(
    model: Model, decoder: DecoderLane, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise torch.OutOfMemoryError("others are loading")
        yield

    decode(decoder, handed(model, 2, num_inference_steps=1))
    with monkeypatch.context() as patch:
        patch.setattr(Palette, "draw", fail)
        assert decoder.projection(20) is None
    assert decoder.projection(60) is not None


def test_a_state_that_cannot_be_kept_for_previews_is_decoded_all_the_same(
    model: Model, decoder: DecoderLane, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> bytes:
        raise MemoryError

    state = handed(model, 2, num_inference_steps=1)
    monkeypatch.setattr(State, "to_bytes", fail)
    assert isinstance(decode(decoder, state), State)
    assert decoder._sample is None


def test_a_lane_is_closed_while_it_fits(model: Model) -> None:
    lane = DecoderLane(model, "test", threads=1)
    decode(lane, handed(model, 2, num_inference_steps=1))
    threading.Thread(target=lane.projection, args=(30,), daemon=True).start()
    lane.close()


@pytest.mark.parametrize(
    "family",
    ["flux", "wan", *(pytest.param(each, marks=pytest.mark.slow) for each in ("qwen_image", "z_image", "ltx2"))],
)
def test_latents_of_every_family_s_form_are_shown(tiny_repo: Callable[..., Path], family: str) -> None:
    model = triptych.load(tiny_repo(family), device="cpu")
    ask = {"prompt": "a fox", "num_inference_steps": 2, "seed": 0, "height": 64, "width": 96, "num_frames": 9}
    request = triptych.Request(**{name: value for name, value in ask.items() if name in model.family.parameters})
    sample = model.admit(request)
    while sample.position < len(sample.route) - 1:
        finish(model.segment(sample))
    previews, told = wanted(drawn(model, sample), 1)
    lane, ended = StepLane(model, "test", threads=1, budget=0), threading.Event()
    state = model.admit(request)
    finish(model.segment(state))
    lane.put(Work(state, lambda _: ended.set(), previews=previews))
    assert ended.wait(60)
    lane.close()
    ((step, steps, png),) = told
    assert (step, steps) == (1, 2)
    shown = opened(png)
    assert tuple(shown.shape) == (3, 64, 96) and shown.std() > 0.005


def test_who_cannot_wait_for_the_fitting_finds_the_map_later(model: Model, decoder: DecoderLane) -> None:
    decode(decoder, handed(model, 2, num_inference_steps=1))
    assert decoder.projection(0) is None
    assert decoder.projection(60) is not None
