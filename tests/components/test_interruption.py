"""An autoencoder can be stopped between two tiles of a picture, or two pieces of a video, and used again."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLQwenImage, AutoencoderKLWan

import triptych
from triptych.components.acceleration import Acceleration
from triptych.components.interruption import interruptible, watch
from triptych.errors import Cancelled
from triptych.runtime.decoder_lane import DecoderLane
from triptych.runtime.lanes import Lane, Work
from triptych.runtime.model import Model
from triptych.runtime.segment import finish

PICTURE: dict[str, Any] = {"height": 128, "width": 160, "num_inference_steps": 1, "max_sequence_length": 24}
VIDEO: dict[str, Any] = {
    "height": 32,
    "width": 48,
    "num_frames": 9,
    "num_inference_steps": 1,
    "max_sequence_length": 24,
}


@pytest.fixture(scope="module", params=["tiles", "pieces"])
def model(request: pytest.FixtureRequest, tiny_repo: Callable[..., Path]) -> Model:
    if request.param == "pieces":
        return triptych.load(tiny_repo("wan"), device="cpu")
    tiles = {"decoder": Acceleration(tiling=True)}
    return triptych.load(tiny_repo("flux2_klein"), device="cpu", acceleration=tiles)


def denoised(model: Model) -> triptych.State:
    ask = VIDEO if "num_frames" in model.family.parameters else PICTURE
    state = model.admit(triptych.Request(prompt="a red fox", seed=7, output_type="pt", **ask))
    for _ in range(2):
        finish(model.segment(state))
    return state


def outputs(state: triptych.State) -> torch.Tensor:
    result = state.result
    found: torch.Tensor = result.images if result.images is not None else result.frames
    return found


def test_a_cancel_takes_effect_before_the_next_part_and_the_autoencoder_is_as_before(model: Model) -> None:
    state = denoised(model)
    whole = state.copy()
    parts: list[int] = []
    finish(model.segment(whole, check=lambda: parts.append(1)))
    assert len(parts) > 2
    lane = DecoderLane(model, "test", threads=1)
    ended, outcomes, seen = threading.Event(), [], []
    work = Work(state.copy(), lambda outcome: (outcomes.append(outcome), ended.set())[1])

    def count(*_: object) -> None:
        seen.append(1)
        if len(seen) == 2:
            work.cancel()

    hook = model.components["vae"].decoder.register_forward_hook(count)
    lane.put(work)
    assert ended.wait(20)
    lane.close()
    hook.remove()
    assert isinstance(outcomes[0], Cancelled)
    assert len(seen) == 2 < len(parts)
    finish(model.segment(state))
    assert torch.equal(outputs(state), outputs(whole))


def test_outside_of_a_request_nothing_is_asked(model: Model) -> None:
    with interruptible(lambda: pytest.fail("asked")), interruptible(None):
        finish(model.segment(denoised(model)))


@pytest.mark.parametrize("family", ["wan", "qwen_image"])
@pytest.mark.parametrize("method", ["encode", "decode"])
@pytest.mark.parametrize("cause", ["a cancel", "an error"])
def test_an_autoencoder_that_was_stopped_or_failed_keeps_no_features(
    family: str, method: str, cause: str, tiny_repo: Callable[..., Path]
) -> None:
    vae: Any = {"wan": AutoencoderKLWan, "qwen_image": AutoencoderKLQwenImage}[family].from_pretrained(
        tiny_repo(family), subfolder="vae"
    )
    watch(vae)
    video = torch.randn(1, 3, 9, 16, 16) if method == "encode" else torch.randn(1, vae.config.z_dim, 3, 4, 4)
    kept: list[int] = []

    def features() -> int:
        return sum(isinstance(each, torch.Tensor) for each in (*vae._feat_map, *vae._enc_feat_map))

    def stop(*_: object) -> None:
        kept.append(features())
        if len(kept) == 2:
            raise Cancelled("nobody wants it any more")

    if cause == "an error":
        getattr(vae, f"{method[:-1]}er").conv_out.register_forward_pre_hook(stop)
    with torch.no_grad(), interruptible(stop if cause == "a cancel" else None), pytest.raises(Cancelled):
        getattr(vae, method)(video)
    assert kept[-1] > 0, "it was in the midst of it"
    assert features() == 0


def test_a_cancel_takes_effect_before_the_next_token(tiny_repo: Callable[..., Path]) -> None:
    model = triptych.load(tiny_repo("glm_image"), device="cpu", role="encoder")
    ask = {"prompt": "a red fox", "seed": 7, "height": 64, "width": 64, "num_inference_steps": 1}
    ended, outcomes, seen = threading.Event(), [], []
    work = Work(model.admit(triptych.Request(**ask)), lambda outcome: (outcomes.append(outcome), ended.set())[1])

    def count(*_: object) -> None:
        seen.append(1)
        if len(seen) == 3:
            work.cancel()

    hook = model.components["vision_language_encoder"].register_forward_hook(count)
    lane = Lane(model, "test", threads=1)
    lane.put(work)
    assert ended.wait(60)
    lane.close()
    hook.remove()
    assert isinstance(outcomes[0], Cancelled)
    assert len(seen) == 3
