"""Helios in a pyramid gives what diffusers gives, whole and split, undistilled and distilled."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import triptych
from triptych.errors import ModelError, ParameterError, UnknownParameterError

from .parity import differ, in_both_dtypes
from .test_helios import (
    CLIP,
    IMAGE,
    LATENTS,
    Video,
    call_of,
    check_chunks_as_they_finish,
    check_idle_bytes,
    check_interleaved,
    check_joined,
    check_kth_draws,
    check_one_copy_crosses,
    edited,
)

VERSIONS = ("mid", "distilled")
TinyRepo = Callable[..., Path]


@pytest.fixture(scope="module", params=in_both_dtypes(VERSIONS))
def either(request: pytest.FixtureRequest, tiny_repo: TinyRepo) -> Video:
    """Both versions in both dtypes. The bfloat16 oracle is `from_pretrained(dtype=torch.bfloat16)`."""
    version, dtype = request.param
    return Video(tiny_repo("helios", version=version), version, dtype)


@pytest.fixture(scope="module", params=VERSIONS)
def video(request: pytest.FixtureRequest, tiny_repo: TinyRepo) -> Video:
    return Video(tiny_repo("helios", version=request.param), request.param)


@pytest.fixture(scope="module")
def mid(tiny_repo: TinyRepo) -> Video:
    return Video(tiny_repo("helios", version="mid"), "mid")


@pytest.fixture(scope="module")
def distilled(tiny_repo: TinyRepo) -> Video:
    return Video(tiny_repo("helios", version="distilled"), "distilled")


def test_guided_videos_are_those_of_diffusers(either: Video) -> None:
    assert either.base.shape == (1, 9, 3, 16, 32)
    unusual = {"height": 80, "width": 48, "num_frames": 7, "pyramid_num_inference_steps_list": [1, 2]}
    assert either.of(seed=2**40 + 1, **unusual).shape == (1, 9, 3, 80, 48)


def test_videos_without_guidance_are_those_of_diffusers(either: Video) -> None:
    assert differ(either.of(guidance_scale=1.0, negative_prompt=None), either.base)


@pytest.mark.parametrize("given", [{"image": IMAGE}, {"video": CLIP}], ids=["image", "video"])
def test_images_and_videos_go_on_as_in_diffusers(either: Video, given: dict[str, Any]) -> None:
    # The encoder draws, and the denoiser after it: from the same generator, in the same order.
    assert differ(either.of(**given), either.base)


def test_several_videos_are_single_runs_with_their_draws(either: Video, monkeypatch: pytest.MonkeyPatch) -> None:
    check_kth_draws(either, monkeypatch, image=IMAGE)


def test_given_embeddings_of_several_prompts_are_one_batch(video: Video) -> None:
    with torch.no_grad():
        texts = (video.call["prompt"], video.call["negative_prompt"])
        embeds, negative = video.pipeline.encode_prompt(*texts, max_sequence_length=24)
    several = {name: torch.cat([each, each.flip(1)]) for name, each in (("", embeds), ("negative_", negative))}
    given = {f"{name}prompt_embeds": each for name, each in several.items()}
    assert len(video.of(prompt=None, negative_prompt=None, **given)) == 2


def test_a_pyramid_may_have_fewer_levels_than_the_model(video: Video) -> None:
    assert differ(video.of(pyramid_num_inference_steps_list=[3]), video.base)


def test_levels_are_those_of_the_scheduler(mid: Video, tmp_path: Path) -> None:
    three = {"stages": 3, "stage_range": [0, 0.3, 0.7, 1], "gamma": 0.2}
    parity = Video(edited(mid.repo, tmp_path / "repo", "scheduler/scheduler_config.json", **three), "mid")
    levels = {"pyramid_num_inference_steps_list": [2, 1, 2], "height": 32, "width": 64}
    assert differ(parity.of(**levels), parity.ours(**{**levels, "pyramid_num_inference_steps_list": [2, 2]}))


@pytest.mark.parametrize("sampling", [{"scheduler_type": "euler"}, {"gamma": 0.1}, {"use_dynamic_shifting": False}])
def test_the_scheduler_is_the_one_of_the_repository(mid: Video, sampling: dict[str, Any], tmp_path: Path) -> None:
    repo = edited(mid.repo, tmp_path / "repo", "scheduler/scheduler_config.json", **sampling)
    assert differ(Video(repo, "mid").of(use_zero_init=False), mid.ours(use_zero_init=False))


def test_an_euler_scheduler_that_steps_in_the_models_dtype_is_followed(mid: Video, tmp_path: Path) -> None:
    repo = edited(mid.repo, tmp_path / "repo", "scheduler/scheduler_config.json", scheduler_type="euler")
    Video(repo, "mid", "bfloat16").of(video=CLIP)


def test_guidance_starts_from_zero_and_is_scaled_as_in_diffusers(mid: Video, tmp_path: Path) -> None:
    for change in ({"use_zero_init": False}, {"use_zero_init": None}, {"zero_steps": 0}):
        assert differ(mid.of(**change), mid.base), change
    plain = Video(edited(mid.repo, tmp_path / "repo", "model_index.json", is_cfg_zero_star=False), "mid")
    assert differ(plain.of(), mid.ours(use_zero_init=False))


def test_a_distilled_models_first_chunk_may_have_twice_the_steps(distilled: Video) -> None:
    assert differ(distilled.of(is_amplify_first_chunk=True), distilled.base)
    reported: list[int] = []
    call = {**distilled.call, "is_amplify_first_chunk": True}
    distilled.model.generate(**call, on_step=lambda _, step, steps: reported.append(steps))
    assert reported == [10 + 5] * 15


def test_requests_take_turns_step_by_step(video: Video) -> None:
    check_interleaved(video)


def test_a_chunk_is_there_when_its_steps_are_done(video: Video) -> None:
    check_chunks_as_they_finish(video)


def test_the_levels_of_all_chunks_are_one_loop_of_whole_timesteps(video: Video) -> None:
    seen: list[tuple[tuple[int, ...], torch.Tensor]] = []
    transformer = video.model.components["transformer"]
    hook = transformer.register_forward_pre_hook(
        lambda _, __, inputs: seen.append((tuple(inputs["hidden_states"].shape[-2:]), inputs["timestep"])),
        with_kwargs=True,
    )
    video.model.generate(**{**video.call, "guidance_scale": 1.0}, seed=7)
    hook.remove()
    assert [size for size, _ in seen] == ([(2, 4)] * 3 + [(4, 8)] * 2) * 2
    assert {timestep.dtype for _, timestep in seen} == {torch.int64}


@pytest.mark.parametrize("outputs", [1, 2])
def test_joined_forwards_stay_within_the_tolerance(video: Video, outputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check_joined(video, "pyramid_denoising", monkeypatch, outputs, pyramid_num_inference_steps_list=[4, 4])


def test_one_copy_crosses_the_wire_and_no_noise(video: Video) -> None:
    check_one_copy_crosses(video)


def test_every_role_uses_every_byte_it_holds(tiny_repo: TinyRepo) -> None:
    check_idle_bytes(tiny_repo("helios", version="mid"), "mid")


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_processes_that_hand_over_files_give_the_same_frames(tiny_repo: TinyRepo, version: str, tmp_path: Path) -> None:
    parity = Video(tiny_repo("helios", version=version), version)
    parity.check_in_processes(tmp_path, {**parity.call, "image": [IMAGE]}, ("float32", "bfloat16"))


def test_the_defaults_are_those_of_diffusers(video: Video) -> None:
    fields = video.model.admit(triptych.Request(prompt="a red fox", pyramid_num_inference_steps_list=[2, 2])).fields
    names = ("height", "width", "num_frames", "guidance_scale", "use_zero_init", "zero_steps", "is_amplify_first_chunk")
    assert [fields[name] for name in names] == [384, 640, 132, 5.0, True, 1, False]
    with pytest.raises(ParameterError, match=r"\[10, 10, 10\]: the model's pyramid has 2 levels; no more are accepted"):
        video.model.admit(triptych.Request(prompt="a red fox"))


@pytest.mark.parametrize(("version", "wanted"), [("mid", "HeliosDMDScheduler"), ("distilled", "HeliosScheduler")])
def test_a_scheduler_that_does_not_suit_the_model_is_an_error_of_the_repository(
    tiny_repo: TinyRepo, version: str, wanted: str, tmp_path: Path
) -> None:
    source = tiny_repo("helios", version=version)
    repo = edited(source, tmp_path / "repo", "model_index.json", is_distilled=version == "mid")
    with pytest.raises(ModelError, match=f"is_distilled={version == 'mid'} and a Helios.*; it needs a {wanted}"):
        triptych.load(repo, role="server", device="cpu")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"height": 40}, ParameterError, "height=40: .* multiple of 16 .* 32 or 48"),
        ({"pyramid_num_inference_steps_list": []}, ParameterError, "one for each level of the pyramid"),
        ({"pyramid_num_inference_steps_list": 3}, ParameterError, "one for each level of the pyramid"),
        ({"pyramid_num_inference_steps_list": [1] * 5, "height": 32}, ParameterError, "pyramid has 2 levels"),
        ({"pyramid_num_inference_steps_list": [2, 0]}, ParameterError, "=0: a whole number of at least 1"),
        ({"zero_steps": -1}, ParameterError, "zero_steps=-1: a whole number of at least 0"),
        ({"video": CLIP[:4]}, ParameterError, "at least 5 frames .one chunk. is accepted, not of 4"),
        ({"num_inference_steps": 5}, UnknownParameterError, "did you mean 'pyramid_num_inference_steps_list'"),
        ({"sigmas": [0.5]}, UnknownParameterError, "no parameter 'sigmas'"),
        ({"latents": LATENTS}, UnknownParameterError, "no parameter 'latents'"),
    ],
)
def test_what_cannot_be_done_is_refused_with_a_reason(
    tiny_repo: TinyRepo, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    server = triptych.load(tiny_repo("helios", version="mid"), role="server", device="cpu")
    with pytest.raises(error, match=message):
        server.admit(triptych.Request(**call_of("mid", **changes)))


def test_sizes_can_be_halved_to_the_smallest_level(tiny_repo: TinyRepo, tmp_path: Path) -> None:
    # The autoencoder shrinks by 4 and patches are 2 wide: three levels want multiples of 32, two and one of 16.
    three = {"stages": 3, "stage_range": [0, 0.3, 0.7, 1]}
    source = tiny_repo("helios", version="mid")
    repo = edited(source, tmp_path / "repo", "scheduler/scheduler_config.json", **three)
    server = triptych.load(repo, role="server", device="cpu")
    for levels in ([2, 2], [2]):
        server.admit(triptych.Request(**call_of("mid", width=48, pyramid_num_inference_steps_list=levels)))
    with pytest.raises(ParameterError, match="width=48: a multiple of 32 is accepted; the nearest: 32 or 64"):
        request = call_of("mid", height=32, width=48, pyramid_num_inference_steps_list=[2, 2, 2])
        server.admit(triptych.Request(**request))
