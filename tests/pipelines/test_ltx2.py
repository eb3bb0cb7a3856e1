"""LTX-2 gives what diffusers gives, video and sound, whole and split, and refuses what it cannot do."""

from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    LTX2ImageToVideoPipeline,
    LTX2VideoDiffusionDecodePipeline,
    LTX2VideoDiffusionDecoderModel,
)
from diffusers.utils import logging as diffusers_logging
from PIL import Image

import triptych
from triptych.errors import ParameterError, UnknownParameterError, UsageError
from triptych.request import pipeline_parameters
from triptych.runtime.lanes import Lane, Work

from . import parity
from .parity import ROLES, Forwards, Parity, assert_same, differ
from .tracing import Case, trace

VERSIONS = ("2.0", "2.3", "2.5")
TinyRepo = Callable[..., Path]
Pair = list[Any]

CALL: dict[str, Any] = {
    "prompt": "a red fox",
    "negative_prompt": "ugly, blurred colours",
    "height": 32,
    "width": 64,
    "num_frames": 5,
    "num_inference_steps": 2,
    "max_sequence_length": 24,
    "spatio_temporal_guidance_blocks": [1],
}
PLAIN: dict[str, Any] = {
    **{f"{of}guidance_scale": 1.0 for of in ("", "audio_")},
    **{f"{of}stg_scale": 0.0 for of in ("", "audio_")},
    **{f"{of}modality_scale": 1.0 for of in ("", "audio_")},
    **{f"{of}guidance_rescale": 0.0 for of in ("", "audio_")},
}


def picture(shade: int, size: tuple[int, int] = (80, 64)) -> Image.Image:
    """A frame: two gradients, and one channel that is `shade` everywhere."""
    down, right = Image.linear_gradient("L").resize(size), Image.linear_gradient("L").rotate(90).resize(size)
    return Image.merge("RGB", (down, right, Image.new("L", size, shade)))


FIRST, OTHER = picture(30), picture(200)


def pair(result: triptych.Result) -> Pair:
    """A result's frames and sound."""
    return [result.frames, result.audio]


class Video(Parity):
    """A version, loaded four ways: with an image, diffusers' pipeline for images is the oracle."""

    def __init__(self, repo: Path, dtype: str = "float32", **options: Any) -> None:
        super().__init__(repo, dtype, **options)
        parts = {name: part for name, part in self.pipeline.components.items() if part is not None}
        self.with_image = LTX2ImageToVideoPipeline(**parts)
        self.with_image.set_progress_bar_config(disable=True)

    def diffusers(self, *, seed: int = 7, **call: Any) -> Pair:
        pipeline = self.with_image if "image" in call else self.pipeline
        return list(pipeline(generator=torch.Generator("cpu").manual_seed(seed), return_dict=False, **call))

    def of(self, **changes: Any) -> Pair:
        """Prove that all agree on the request with these changes; returns the video and its sound."""
        both: Pair = self.check(**{**CALL, **changes})
        return both

    def ours(self, **changes: Any) -> Pair:
        """What the whole model gives for the request with these changes."""
        both: Pair = self.whole(**{**CALL, "output_type": "pt", **changes})
        return both

    @cached_property
    def base(self) -> Pair:
        """The request as it is, on which all agree."""
        return self.of()


@pytest.fixture(autouse=True, scope="module")
def videos_with_sound() -> Iterator[None]:
    """Let the comparison look at both. diffusers warns of every entry of the index that it has no use for."""
    verbosity = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parity, "output", pair)
        yield
    diffusers_logging.set_verbosity(verbosity)


@pytest.fixture(
    scope="module",
    params=[
        ("2.0", "float32"),
        pytest.param(("2.0", "bfloat16"), marks=pytest.mark.slow),
        ("2.3", "float32"),
        ("2.3", "bfloat16"),
        ("2.5", "float32"),
        pytest.param(("2.5", "bfloat16"), marks=pytest.mark.slow),
    ],
    ids=lambda param: "-".join(param),
)
def either(request: pytest.FixtureRequest, tiny_repo: TinyRepo) -> Video:
    """Every version in both dtypes. The bfloat16 oracle is `from_pretrained(dtype=torch.bfloat16)`."""
    version, dtype = request.param
    return Video(tiny_repo("ltx2", version=version), dtype)


@pytest.fixture(scope="module", params=["2.0", "2.3", pytest.param("2.5", marks=pytest.mark.slow)])
def video(request: pytest.FixtureRequest, tiny_repo: TinyRepo) -> Video:
    return Video(tiny_repo("ltx2", version=request.param))


@pytest.fixture(scope="module")
def first(tiny_repo: TinyRepo) -> Video:
    return Video(tiny_repo("ltx2", version="2.0"))


@pytest.fixture(scope="module")
def server(tiny_repo: TinyRepo) -> triptych.Model:
    """What admits requests, without weights."""
    return triptych.load(tiny_repo("ltx2", version="2.0"), role="server", device="cpu")


@pytest.fixture(params=[{}, {"image": FIRST}], ids=["text", "image"])
def given(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What a task is given beside the prompt."""
    return dict(request.param)


UNUSUAL: dict[str, Any] = {
    "seed": 2**40 + 1,
    "height": 96,
    "width": 32,
    "num_frames": 9,
    "num_inference_steps": 3,
    "frame_rate": 17.0,
    "motion_speed": 0.7,
    "num_videos_per_prompt": 2,
}


@pytest.mark.parametrize("call", [{}, UNUSUAL], ids=["usual", "unusual"])
def test_guided_videos_are_those_of_diffusers(either: Video, given: dict[str, Any], call: dict[str, Any]) -> None:
    size = {"num_videos_per_prompt": 1, **CALL, **call}
    frames, audio = either.of(**call, **given)
    videos = size["num_videos_per_prompt"]
    assert frames.shape == (videos, size["num_frames"], 3, size["height"], size["width"])
    assert audio.shape[:2] == (videos, 2)
    # Several are one batch.
    assert videos == 1 or (differ(frames[0], frames[1]) and differ(audio[0], audio[1]))


def test_videos_without_guidance_are_those_of_diffusers(either: Video, given: dict[str, Any]) -> None:
    either.of(**PLAIN, **given)


def test_each_guidance_may_be_on_without_the_others(either: Video) -> None:
    for scales in ({"audio_guidance_scale": 3.0}, {"stg_scale": 1.0}, {"modality_scale": 2.0, "guidance_rescale": 0.3}):
        either.of(**{**PLAIN, **scales}, image=FIRST)


def test_the_sounds_guidance_follows_the_videos_where_it_is_none(first: Video) -> None:
    none = {f"audio_{name}": None for name in ("guidance_scale", "stg_scale", "modality_scale", "guidance_rescale")}
    assert differ(first.of(**none, guidance_scale=2.0)[1], first.ours(guidance_scale=2.0)[1])


def test_all_output_types_are_those_of_diffusers(first: Video, given: dict[str, Any]) -> None:
    first.check(**CALL, **given, output_types=("pil", "np", "latent"))


@pytest.mark.parametrize("version", [pytest.param("2.0", marks=pytest.mark.slow), "2.3"])
def test_each_of_seed_prompts_scales_and_image_changes_video_or_sound(tiny_repo: TinyRepo, version: str) -> None:
    video = Video(tiny_repo("ltx2", version=version))
    frames, audio = video.ours(image=FIRST)
    of_both = {"seed": 8, "prompt": "a blue cat", "negative_prompt": "a", "num_inference_steps": 3, "frame_rate": 20.0}
    of_video = {"guidance_scale": 8.0, "modality_scale": 9.0, "guidance_rescale": 0.1, "image": OTHER, "image_crf": 50}
    of_audio = {"audio_guidance_scale": 1.5, "audio_modality_scale": 9.0, "audio_guidance_rescale": 0.1}
    if version == "2.3":  # blocks that are not built for it cannot be perturbed
        of_video["stg_scale"], of_audio["audio_stg_scale"] = 3.0, 4.0
    for name, value in {**of_both, **of_video, **of_audio, "motion_speed": 0.5, "use_cross_timestep": False}.items():
        changed, heard = video.ours(**{"image": FIRST, name: value})
        assert name in of_audio or differ(changed, frames), name
        shorter = min(heard.shape[-1], audio.shape[-1])
        assert name not in {**of_both, **of_audio} or differ(heard[..., :shorter], audio[..., :shorter]), name


def test_scales_of_the_sound_that_are_zero_are_those_of_the_video(first: Video) -> None:
    scales = {name: 2.5 for name in ("guidance_scale", "stg_scale", "modality_scale")}
    zero = {f"audio_{name}": 0.0 for name in (*scales, "guidance_rescale")}
    same = {f"audio_{name}": value for name, value in {**scales, "guidance_rescale": 0.7}.items()}
    assert_same(first.of(**scales, **zero), first.ours(**scales, **same), "the video's")


def test_both_pipelines_take_the_same_parameters_but_the_image(first: Video) -> None:
    text, image = (pipeline_parameters(type(each).__call__) for each in (first.pipeline, first.with_image))
    assert image == {**text, "image": None, "image_crf": None}


def test_a_repository_of_the_pipeline_for_images_makes_the_same(tiny_repo: TinyRepo, first: Video) -> None:
    repo = tiny_repo("ltx2", version="2.0", image=True)
    model = triptych.load(repo, device="cpu")
    assert list(model.family.tasks) == ["image-to-video"]
    assert_same(pair(model.generate(**CALL, image=FIRST, seed=7, output_type="pt")), first.of(image=FIRST), "image")
    with pytest.raises(ParameterError, match="image=None: the video's first frame is missing"):
        model.admit(triptych.Request(**CALL))


def test_an_image_that_is_not_compressed_may_be_a_tensor(first: Video) -> None:
    pixels = torch.rand(1, 3, 40, 56, generator=torch.Generator().manual_seed(1))
    frames, _ = first.of(image=pixels, image_crf=0)
    assert differ(frames, first.ours(image=[FIRST])[0])
    assert differ(first.of(image=FIRST, image_crf=0)[0], first.of(image=FIRST)[0])


def test_a_picture_of_another_mode_is_taken_for_what_it_shows_in_colour(first: Video) -> None:
    expected = first.ours(image=FIRST, image_crf=0)
    for got, wanted in zip(first.ours(image=FIRST.convert("RGBA"), image_crf=0), expected):
        assert_same(got, wanted, "RGBA")


def test_given_latents_take_the_place_of_the_noise(first: Video, given: dict[str, Any]) -> None:
    draw = torch.Generator().manual_seed(1)
    latents = {"latents": torch.randn(1, 6, 3, 4, 8, generator=draw)}
    latents["audio_latents"] = torch.randn(1, 3, 4, 5, generator=draw)
    for name, each in latents.items():
        assert differ(first.of(**{name: each}, **given)[0], first.ours(**given)[0])
    noised = first.of(**latents, **given, noise_scale=0.6)
    assert differ(noised[0], first.ours(**latents, **given, noise_scale=0.2)[0])


def test_packed_latents_are_taken_as_diffusers_takes_them(first: Video) -> None:
    draw = torch.Generator().manual_seed(1)
    first.of(latents=torch.randn(1, 96, 6, generator=draw), audio_latents=torch.randn(1, 4, 15, generator=draw))


def test_tensors_that_are_repeated_or_laid_out_otherwise_are_taken_as_diffusers_takes_them(first: Video) -> None:
    draw = torch.Generator().manual_seed(1)
    first.of(latents=torch.randn(1, 1, 4, 5, 7, generator=draw))
    first.of(audio_latents=torch.randn(1, 5, 6, 3, generator=draw))
    with torch.no_grad():
        embeds, mask, negative, negative_mask = first.pipeline.encode_prompt(
            CALL["prompt"], CALL["negative_prompt"], max_sequence_length=24
        )
    masks = {"prompt_attention_mask": mask, "negative_prompt_attention_mask": negative_mask}
    layers = {
        "prompt_embeds": embeds.unflatten(2, (4, -1)),
        "negative_prompt_embeds": negative.unflatten(2, (4, -1)),
    }
    first.of(prompt=None, negative_prompt=None, **layers, **masks)


def test_given_embeddings_take_the_place_of_the_prompts(video: Video) -> None:
    with torch.no_grad():
        found = video.pipeline.encode_prompt(CALL["prompt"], CALL["negative_prompt"], max_sequence_length=24)
    names = "prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask"
    embeds = dict(zip(names, found))
    without = {"prompt": None, "negative_prompt": None}
    assert_same(video.ours(**without, **embeds), video.base, "given")
    # Of several, diffusers makes one batch.
    several = {name: torch.cat([value, value.roll(1, 1)]) for name, value in embeds.items()}
    assert len(video.of(**without, **several)[0]) == 2
    with pytest.raises(ParameterError, match="one row of `prompt_embeds` for each video"):
        video.model.admit(triptych.Request(**{**CALL, **without, **embeds, "num_videos_per_prompt": 2}))


def test_the_first_noise_levels_may_be_equal(first: Video) -> None:
    first.of(sigmas=[0.7, 0.7, 0.2])
    ours = first.ours(image=FIRST, sigmas=[0.7, 0.7, 0.2])
    assert differ(ours[0], first.ours(image=FIRST, sigmas=[0.7, 0.5, 0.2])[0])


def test_noise_levels_may_be_given(video: Video) -> None:
    assert differ(video.of(sigmas=[1.0, 0.8, 0.3])[0], video.base[0])


def test_the_length_is_predicted_where_none_is_given(tiny_repo: TinyRepo) -> None:
    video = Video(tiny_repo("ltx2", version="2.5"))
    for call, frames in (
        ({"min_seconds": 0.1, "max_seconds": 0.3}, 7),
        ({"frame_rate": 9.0, "max_seconds": 3.0}, 9),
        ({"frame_rate": 9.0, "max_seconds": 3.0, **PLAIN, "num_videos_per_prompt": 2}, 9),
    ):
        made, _ = video.of(num_frames=None, **call)
        assert made.shape[1] == frames


def test_a_predicted_length_is_told_once_it_is_known(tiny_repo: TinyRepo) -> None:
    model = triptych.load(tiny_repo("ltx2", version="2.5"), device="cpu")
    call = {**CALL, "num_frames": None, "min_seconds": 0.1, "max_seconds": 0.3}
    state = model.admit(triptych.Request(**call))
    assert "num_frames" not in state.parameters
    assert model.run(state).result.parameters["num_frames"] == 7


def test_without_a_length_and_what_predicts_it_diffusers_own_is_taken(first: Video) -> None:
    state = first.model.admit(triptych.Request(**{**CALL, "num_frames": None}))
    assert state.fields["num_frames"] == 121


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_diffusion_decoder_draws_its_noise_where_the_request_stopped(tiny_repo: TinyRepo, dtype: str) -> None:
    video = Video(tiny_repo("ltx2", version="2.5", diffusion=True), dtype)
    options = {"subfolder": "diffusion_decoder", "dtype": getattr(torch, dtype)}
    decoder = LTX2VideoDiffusionDecoderModel.from_pretrained(video.repo, **options)
    decode = LTX2VideoDiffusionDecodePipeline(decoder, video.pipeline.scheduler, video.pipeline.vae)
    call = {**CALL, "num_videos_per_prompt": 2}
    generator = torch.Generator().manual_seed(7)
    latents, audio = video.pipeline(**call, generator=generator, output_type="latent", return_dict=False)
    frames = decode(latents, generator=generator, output_type="pt", denormalize=False).frames
    with torch.no_grad():
        spectrograms = video.pipeline.audio_vae.decode(audio.to(decoder.dtype), return_dict=False)[0]
        expected = [frames, video.pipeline.vocoder(spectrograms)]
    assert_same(video.whole(**call, output_type="pt"), expected, "whole")
    assert_same(video.split(**call, output_type="pt"), expected, "split")
    assert video.roles["decoder"].loaded_bytes["vae"] == 2 * 6 * decoder.dtype.itemsize


@pytest.mark.parametrize("diffusion", [True, False])
def test_nobody_waits_for_another_s_video_that_a_diffusion_decoder_makes(tiny_repo: TinyRepo, diffusion: bool) -> None:
    model = triptych.load(tiny_repo("ltx2", version="2.5", diffusion=diffusion), device="cpu")
    state = model.admit(triptych.Request(**CALL, exact=False))
    state.position = len(state.route) - 1  # as if it waited to be decoded
    lane = Lane(model, "test", threads=1)
    try:
        assert (lane._kind(Work(state, lambda _: None)) is None) == diffusion
    finally:
        lane.close()


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_an_autoencoder_that_is_told_a_timestep_gets_the_noise_of_diffusers(tiny_repo: TinyRepo, dtype: str) -> None:
    video = Video(tiny_repo("ltx2", version="2.0", conditioned=True), dtype)
    frames, _ = video.of(decode_timestep=0.3)
    assert differ(video.of(decode_timestep=[0.3], decode_noise_scale=[0.9])[0], frames)
    assert len(video.ours(decode_timestep=0.3, num_videos_per_prompt=2)[0]) == 2


def test_roles_load_what_they_use(video: Video) -> None:
    held = {role: {name for name, size in model.loaded_bytes.items() if size} for role, model in video.roles.items()}
    head = {"duration_head"} if "duration_head" in video.model.family.repository.components else set()
    assert held == {
        "encoder": {"text_encoder", "connectors", "vae"} | head,
        "denoiser": {"transformer", "vae", "audio_vae"},  # of both, two vectors
        "decoder": {"vae", "audio_vae", "vocoder"},
    }
    denoiser = video.roles["denoiser"].loaded_bytes
    assert (denoiser["vae"], denoiser["audio_vae"]) == (4 * 2 * 6, 4 * 2 * 15)
    vae, audio_vae = video.pipeline.vae, video.pipeline.audio_vae
    statistics = denoiser["vae"]
    halves = [video.roles[role].loaded_bytes["vae"] - statistics for role in ("encoder", "decoder")]
    assert halves == [sum(each.nbytes for each in half.parameters()) for half in (vae.encoder, vae.decoder)]
    of_audio = sum(each.nbytes for each in audio_vae.decoder.parameters()) + denoiser["audio_vae"]
    assert video.roles["decoder"].loaded_bytes["audio_vae"] == of_audio


def test_gemma_is_held_without_what_sees_hears_and_speaks(video: Video) -> None:
    encoder = video.roles["encoder"].components["text_encoder"]
    held = {name for name, tensor in encoder.named_parameters() if not tensor.is_meta}
    whole = {name for name, _ in video.pipeline.text_encoder.named_parameters()}
    assert held == {name for name in whole if name.startswith("model.language_model.")} < whole


def test_a_role_for_text_alone_has_no_autoencoder_to_encode_with(first: Video) -> None:
    encoder = triptych.load(first.repo, role="encoder", device="cpu", tasks="text-to-video")
    assert encoder.is_hollow("vae")
    with pytest.raises(UsageError, match="'image-to-video', but the model was loaded for text-to-video"):
        encoder.run(triptych.Request(**CALL, image=FIRST))


# What is held and never read, and why: see the report of this family's cases in `tracing`.
IDLE = {
    "text_encoder.model.language_model.rotary_emb.full_attention_original_inv_freq",
    "text_encoder.model.language_model.rotary_emb.sliding_attention_original_inv_freq",
    "vocoder.mel_stft.stft_fn.inverse_basis",
    "transformer.keyframes_abs_pos_embedding",
}
TRACED = {**CALL, "num_inference_steps": 2}


@pytest.mark.slow  # the proof for every family has it too
@pytest.mark.parametrize("version", VERSIONS)
def test_every_role_uses_every_byte_it_holds(tiny_repo: TinyRepo, version: str) -> None:
    latents = {"latents": torch.randn(1, 6, 3, 4, 8), "audio_latents": torch.randn(1, 3, 4, 5)}
    requests: list[dict[str, Any]] = [TRACED, {**TRACED, **latents}]
    if version == "2.5":
        requests.append({**TRACED, "num_frames": None, "max_seconds": 1.2, "frame_rate": 6.0})
    tasks = {
        "text-to-video": tuple(requests),
        "image-to-video": tuple({**each, "image": FIRST} for each in requests),
    }
    case = Case("ltx2", {"version": version}, tasks)
    for each in trace(case, tiny_repo("ltx2", version=version)):
        assert set(each.unread) <= IDLE, each.role
        # A length is a number: no tensor of what predicts it is part of the state.
        unused = {name for name in each.unused if not name.startswith("duration_head.")}
        assert unused == set(each.unread), each.role


def test_one_copy_crosses_the_wire_and_no_noise(video: Video) -> None:
    state = video.roles["encoder"].run(triptych.Request(**CALL, image=FIRST, num_videos_per_prompt=3))
    shapes = {name: tuple(value.shape) for name, value in state.fields.items() if isinstance(value, torch.Tensor)}
    text = {name: shape[:2] for name, shape in shapes.items() if name != "image_latents"}
    assert text == dict.fromkeys(
        ("connector_prompt_embeds", "connector_audio_prompt_embeds", "connector_attention_mask"), (2, 24)
    )
    assert shapes["image_latents"] == (1, 6, 1, 4, 8)
    state = video.roles["denoiser"].run(state)
    shapes = {name: tuple(value.shape) for name, value in state.fields.items() if isinstance(value, torch.Tensor)}
    assert shapes == {"latents": (3, 6, 3, 4, 8), "audio_latents": (3, 4, 15)}


def test_copies_that_rounding_made_different_all_cross(first: Video, monkeypatch: pytest.MonkeyPatch) -> None:
    for connectors in (first.pipeline.connectors, first.model.components["connectors"]):
        forward = connectors.forward

        def by_place(*args: Any, run: Callable[..., Any] = forward, **kwargs: Any) -> Any:
            video, audio, mask = run(*args, **kwargs)
            video[-1] *= 1.5  # as on a machine where a row's place decides how it is rounded
            return video, audio, mask

        monkeypatch.setattr(connectors, "forward", by_place)
    call = {**CALL, "num_videos_per_prompt": 2, "output_type": "pt"}
    assert_same(first.whole(**call), first.diffusers(**call), "rounded by its place")


def test_what_is_not_exact_stays_within_the_tolerance(video: Video, given: dict[str, Any]) -> None:
    for scales in ({}, {**PLAIN, "stg_scale": 1.0, "modality_scale": 2.0}):
        exact, other = (video.ours(**scales, **given, num_videos_per_prompt=2, exact=exact) for exact in (True, False))
        for one, another in zip(exact, other):
            torch.testing.assert_close(another, one, rtol=0, atol=parity.PIXEL_TOLERANCE)


def test_a_step_has_the_forwards_of_diffusers(video: Video, monkeypatch: pytest.MonkeyPatch) -> None:
    def contexts(transformer: Any, run: Callable[..., Any], **changes: Any) -> list[str]:
        told: list[str] = []
        cached = type(transformer).cache_context

        def record(self: Any, name: str) -> Any:
            told.append(name)
            return cached(self, name)

        with monkeypatch.context() as patch:
            patch.setattr(type(transformer), "cache_context", record)
            run(**{**CALL, **changes}, output_type="latent")
        return told

    for changes in ({}, {"image": FIRST}, PLAIN, {**PLAIN, "audio_stg_scale": 1.0}):
        ours = contexts(video.model.components["transformer"], video.whole, **changes)
        assert ours == contexts(video.pipeline.transformer, video.diffusers, **changes)
    forwards = Forwards(video.model, "ltx2_denoising", monkeypatch)
    video.ours()
    count, (prediction, *_) = forwards.take()
    forwards.close()
    assert count == 3 * CALL["num_inference_steps"]
    assert prediction.shape == (2, 96 * 6 + 4 * 15)  # both modalities side by side, the negative prompt's row first


@pytest.mark.slow
def test_components_may_have_dtypes_of_their_own(tiny_repo: TinyRepo) -> None:
    dtypes = {"default": torch.bfloat16, "vae": torch.float32, "audio_vae": torch.float32, "vocoder": torch.float32}
    repo = tiny_repo("ltx2", version="2.3")
    oracle = type(Video(repo).pipeline).from_pretrained(repo, dtype=dtypes)
    oracle.set_progress_bar_config(disable=True)
    expected = oracle(**CALL, generator=torch.Generator().manual_seed(7), output_type="pt", return_dict=False)
    model = triptych.load(repo, device="cpu", dtype=dtypes)
    assert_same(pair(model.generate(**CALL, seed=7, output_type="pt")), list(expected), "the decoders in float32")


def test_a_result_tells_its_rates(first: Video) -> None:
    result = first.model.generate(**CALL, seed=7, frame_rate=17.0)
    assert (result.fps, result.sample_rate) == (17.0, 12000)
    assert first.model.generate(**CALL, seed=7, output_type="latent").sample_rate is None


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_processes_that_hand_over_files_give_the_same(
    tiny_repo: TinyRepo, version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "Parity", Video)
    video = Video(tiny_repo("ltx2", version=version))
    for name, call in {"text": CALL, "image": {**CALL, "image": FIRST}}.items():
        (tmp_path / name).mkdir()
        video.check_in_processes(tmp_path / name, call, ("float32", "bfloat16"))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"height": 40}, ParameterError, "height=40: a multiple of 32 is accepted; the nearest: 32 or 64"),
        ({"width": 5}, ParameterError, "width=5: .* 32$"),
        ({"num_frames": 4}, ParameterError, "num_frames=4: a multiple of 2, plus 1, .* 3 or 5"),
        ({"num_frames": 1, "frame_rate": 90.0}, ParameterError, "num_frames=1: .*too short for any sound"),
        ({"max_sequence_length": 20}, ParameterError, "max_sequence_length=20: a multiple of 8 .* 16 or 24"),
        ({"frame_rate": 0}, ParameterError, "frame_rate=0: a number of at least 0.01"),
        ({"frame_rate": 2000.0}, ParameterError, "frame_rate=2000.0: .* at most 1000 is accepted"),
        ({"frame_rate": "fast"}, ParameterError, "frame_rate='fast': a finite number"),
        ({"motion_speed": True}, ParameterError, "motion_speed=True: a finite number"),
        ({"motion_speed": -1.0}, ParameterError, "motion_speed=-1.0: a number above 0"),
        ({"modality_scale": "3"}, ParameterError, "modality_scale='3': a finite number is accepted"),
        ({"audio_stg_scale": float("inf")}, ParameterError, "audio_stg_scale=inf: a finite number"),
        ({"prompt": None}, UsageError, "`prompt` or `prompt_embeds`"),
        ({"spatio_temporal_guidance_blocks": []}, UsageError, "no STG blocks are supplied"),
        ({"min_seconds": 3.0, "max_seconds": 2.0}, UsageError, "`min_seconds`"),
        ({"prompt_embeds": torch.zeros(1, 24, 80), "prompt": None}, UsageError, "`prompt_attention_mask`"),
        ({"prompt_embeds": 3, "prompt": None}, ParameterError, "prompt_embeds=3: a tensor"),
        ({"prompt_embeds": torch.zeros(24, 80), "prompt": None}, ParameterError, r"\(any, any, any\)"),
        ({"negative_prompt_embeds": "ugly"}, ParameterError, "negative_prompt_embeds='ugly': a tensor"),
        ({"latents": 3}, ParameterError, "^latents=3: a tensor"),
        ({"latents": 3, "image": FIRST}, ParameterError, "^latents=3: a tensor"),
        ({"latents": torch.zeros(6, 3, 4, 8)}, ParameterError, r"latents=.*\(1, 6, any, any, any\)"),
        ({"latents": torch.zeros(1, 7, 3, 4, 8)}, ParameterError, r"latents=.*\(1, 6, any, any, any\)"),
        ({"latents": torch.zeros(1, 96, 7)}, ParameterError, r"latents=.*\(1, any, 6\)"),
        ({"latents": torch.zeros(2, 6, 3, 4, 8)}, ParameterError, r"latents=.*\(1, 6, any, any, any\)"),
        ({"audio_latents": 3}, ParameterError, "audio_latents=3: a tensor"),
        ({"audio_latents": torch.zeros(3)}, ParameterError, r"audio_latents=.*\(1, any, any, any\)"),
        ({"audio_latents": torch.zeros(2, 3, 4, 5)}, ParameterError, r"audio_latents=.*\(1, any, any, any\)"),
        ({"audio_latents": torch.zeros(2, 4, 15)}, ParameterError, r"audio_latents=.*\(1, any, any\)"),
        ({"image": []}, ParameterError, "one image is accepted, not 0"),
        ({"image": [FIRST, OTHER]}, ParameterError, "one image is accepted, not 2"),
        ({"image": torch.zeros(2, 3, 32, 64), "image_crf": 0}, ParameterError, "one image is accepted, not 2"),
        ({"image": "fox.png"}, ParameterError, "a PIL image or a tensor is accepted, not str"),
        ({"image": torch.zeros(3, 32, 64)}, UsageError, "requires a `PIL.Image.Image`"),
        ({"image": FIRST, "latents": torch.zeros(1, 96, 6)}, UsageError, "Only unpacked"),
        ({"image_crf": 10}, ParameterError, "image_crf=10: it needs an image"),
        ({"image": FIRST, "image_crf": 60}, ParameterError, "image_crf=60: a whole number from 0 to 51"),
        ({"image": FIRST, "image_crf": "a"}, ParameterError, "image_crf='a': a whole number"),
        ({"image": FIRST.resize((1, 32))}, ParameterError, "image='1x32': at least 2x2 pixels"),
        ({"num_inference_steps": 1}, ParameterError, "num_inference_steps=1: at least 2 are accepted"),
        ({"sigmas": [0.5, 1.0]}, ParameterError, "sigmas=.*a last noise level below 1"),
        ({"spatio_temporal_guidance_blocks": 5}, ParameterError, "whole numbers from 0 to 1 is accepted"),
        ({"spatio_temporal_guidance_blocks": ["a"]}, ParameterError, "whole numbers from 0 to 1 is accepted"),
        ({"spatio_temporal_guidance_blocks": [2]}, ParameterError, "whole numbers from 0 to 1 is accepted"),
        ({"use_cross_timestep": "no"}, ParameterError, "use_cross_timestep='no': True or False"),
        ({"noise_scale": "a"}, ParameterError, "noise_scale='a': a finite number"),
        ({"timesteps": [1000, 500]}, UnknownParameterError, "no parameter 'timesteps'"),
        ({"enable_prompt_enhancement": True}, UnknownParameterError, "no parameter 'enable_prompt_enhancement'"),
        ({"two_stage": True}, UnknownParameterError, "no parameter 'two_stage'"),
        ({"frame_rat": 17.0}, UnknownParameterError, "did you mean 'frame_rate'"),
    ],
)
def test_what_cannot_be_done_is_refused_with_a_reason(
    server: triptych.Model, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        server.admit(triptych.Request(**{**CALL, **changes}))


def test_every_role_has_its_turn_once(video: Video, given: dict[str, Any]) -> None:
    state = video.model.admit(triptych.Request(**CALL, **given))
    assert tuple(role.value for role in state.route) == ROLES
