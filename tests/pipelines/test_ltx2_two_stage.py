"""LTX-2 in two stages gives what diffusers' three pipelines give one after another, whole and split."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LTX2ImageToVideoPipeline, LTX2LatentUpsamplePipeline
from diffusers.pipelines.ltx2.latent_upsampler import LTX2LatentUpsamplerModel
from diffusers.pipelines.ltx2.utils import STAGE_2_DISTILLED_SIGMA_VALUES
from diffusers.utils import logging as diffusers_logging
from PIL import Image

import triptych
from triptych.errors import ParameterError

from . import parity
from .parity import Parity, assert_same, differ

TinyRepo = Callable[..., Path]
Pair = list[Any]

FIRST = Image.linear_gradient("L").resize((80, 64)).convert("RGB")
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
UNUSUAL: dict[str, Any] = {
    "seed": 2**40 + 1,
    "height": 96,
    "width": 32,
    "num_frames": 9,
    "frame_rate": 17.0,
    "motion_speed": 0.7,
    "num_videos_per_prompt": 2,
}
TEXT, IMAGE = "text-to-video-two-stage", "image-to-video-two-stage"
# What the documentation's second call repeats of its first.
REPEATED = ("prompt", "negative_prompt", "max_sequence_length", "frame_rate", "motion_speed", "num_videos_per_prompt")


def pair(result: triptych.Result) -> Pair:
    """A result's frames and sound."""
    return [result.frames, result.audio]


class TwoStages(Parity):
    """A version, loaded four ways; diffusers' way is the documentation's: generate, upsample, generate again."""

    def __init__(self, repo: Path, dtype: str = "float32") -> None:
        super().__init__(repo, dtype)
        folder = {"subfolder": "latent_upsampler", "dtype": getattr(torch, dtype)}
        upsampler = LTX2LatentUpsamplerModel.from_pretrained(repo, **folder)
        self.upsample = LTX2LatentUpsamplePipeline(vae=self.pipeline.vae, latent_upsampler=upsampler)
        parts = {name: part for name, part in self.pipeline.components.items() if part is not None}
        as_they_are = FlowMatchEulerDiscreteScheduler.from_config(
            self.pipeline.scheduler.config, use_dynamic_shifting=False, shift_terminal=None
        )
        kinds = {"text": type(self.pipeline), "image": LTX2ImageToVideoPipeline}
        self.first = {name: kind(**parts) for name, kind in kinds.items()}
        self.second = {name: kind(**{**parts, "scheduler": as_they_are}) for name, kind in kinds.items()}
        for each in (*self.first.values(), *self.second.values()):
            each.set_progress_bar_config(disable=True)

    def diffusers(
        self,
        *,
        seed: int = 7,
        output_type: str = "pt",
        two_stage: bool = True,
        stage_2_sigmas: Any = None,
        adain_factor: float = 0.0,
        tone_map_compression_ratio: float = 0.0,
        stage_2_lora: str = "",
        stage_2_lora_scale: float = 1.0,
        **call: Any,
    ) -> Pair:
        assert two_stage
        kind = "image" if "image" in call else "text"
        generator = torch.Generator("cpu").manual_seed(seed)
        small, sound = self.first[kind](**call, generator=generator, output_type="latent", return_dict=False)
        (large,) = self.upsample(
            latents=small,
            adain_factor=adain_factor,
            tone_map_compression_ratio=tone_map_compression_ratio,
            output_type="latent",
            return_dict=False,
        )
        sigmas = stage_2_sigmas or STAGE_2_DISTILLED_SIGMA_VALUES
        again = {name: call[name] for name in (*REPEATED, "image") if name in call}
        second = self.second[kind]
        if stage_2_lora:
            second.load_lora_weights(str(self.repo), weight_name=stage_2_lora, adapter_name="stage_2_distilled")
            second.set_adapters("stage_2_distilled", stage_2_lora_scale)
        refined = second(
            **again,
            **PLAIN,
            latents=large,
            audio_latents=sound,
            noise_scale=sigmas[0],
            num_inference_steps=len(sigmas),
            sigmas=sigmas,
            generator=generator,
            output_type=output_type,
            return_dict=False,
        )
        if stage_2_lora:
            second.unload_lora_weights()
        return list(refined)

    def of(self, **changes: Any) -> Pair:
        """Prove that all agree on the request with these changes; returns the video and its sound."""
        both: Pair = self.check(**{**CALL, "two_stage": True, **changes})
        return both


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
        ("2.3", "bfloat16"),
        *(
            pytest.param(each, marks=pytest.mark.slow)
            for each in [("2.0", "bfloat16"), ("2.3", "float32"), ("2.5", "float32"), ("2.5", "bfloat16")]
        ),
    ],
    ids=lambda param: "-".join(param),
)
def either(request: pytest.FixtureRequest, tiny_repo: TinyRepo) -> TwoStages:
    version, dtype = request.param
    return TwoStages(tiny_repo("ltx2", version=version, upsampler=True), dtype)


@pytest.fixture(scope="module")
def stages(tiny_repo: TinyRepo) -> TwoStages:
    return TwoStages(tiny_repo("ltx2", version="2.0", upsampler=True))


@pytest.fixture(params=[{}, {"image": FIRST}], ids=["text", "image"])
def given(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What a task is given beside the prompt."""
    return dict(request.param)


@pytest.mark.parametrize("call", [{}, UNUSUAL, PLAIN], ids=["usual", "unusual", "without guidance"])
def test_refined_videos_are_those_of_diffusers_chain(
    either: TwoStages, given: dict[str, Any], call: dict[str, Any]
) -> None:
    size = {"num_videos_per_prompt": 1, **CALL, **call}
    frames, audio = either.of(**call, **given)
    assert frames.shape == (
        size["num_videos_per_prompt"], size["num_frames"], 3, 2 * size["height"], 2 * size["width"],
    )  # fmt: skip
    assert len(audio) == size["num_videos_per_prompt"]


def test_latents_are_those_of_diffusers_chain(stages: TwoStages, given: dict[str, Any]) -> None:
    stages.of(output_types=["latent"], **given)


def test_what_the_second_stage_is_told_changes_the_video(stages: TwoStages) -> None:
    frames, _ = stages.of()
    for changes in (
        {"stage_2_sigmas": [0.7, 0.3]},
        {"adain_factor": 0.6},
        {"tone_map_compression_ratio": 0.5},
        {"seed": 8},
        {"num_inference_steps": 3},
    ):
        assert differ(stages.of(**changes)[0], frames), changes
    single = stages.model.generate(**CALL, seed=7, output_type="pt").frames
    assert differ(frames[..., ::2, ::2], single)


def test_a_repository_with_an_upsampler_makes_one_stage_too(stages: TwoStages, tiny_repo: TinyRepo) -> None:
    without = triptych.load(tiny_repo("ltx2", version="2.0"), device="cpu")
    assert list(without.family.tasks) == ["text-to-video", "image-to-video"]
    plain = [pair(model.generate(**CALL, seed=7, output_type="pt")) for model in (without, stages.model)]
    assert_same(plain[1], plain[0], "one stage")


def test_the_upsampler_may_lie_beside_the_index_as_published(stages: TwoStages, tiny_repo: TinyRepo) -> None:
    published = triptych.load(tiny_repo("ltx2", version="2.0", upsampler="folder"), device="cpu")
    assert_same(pair(published.generate(**CALL, two_stage=True, seed=7, output_type="pt")), stages.of(), "published")


def test_upsampler_and_refinement_are_one_turn_of_the_denoiser(stages: TwoStages, given: dict[str, Any]) -> None:
    state = stages.model.run(triptych.Request(**CALL, **given, two_stage=True, seed=7))
    assert state.task == (IMAGE if given else TEXT)
    assert [role.value for role in state.route] == ["encoder", "denoiser", "decoder"]
    first, refinement = ("i2v_denoising", "i2v_refinement") if given else ("ltx2_denoising", "ltx2_refinement")
    encoding = ["frame_encoding"] if given else []
    assert list(state.timings) == [
        "text_encoding", "two_stage_text_connecting", *encoding, first, "latent_upsampling", refinement, "decoding",
    ]  # fmt: skip


def test_only_the_denoiser_of_two_stages_loads_the_upsampler(stages: TwoStages) -> None:
    assert [role for role, model in stages.roles.items() if "latent_upsampler" in model.components] == ["denoiser"]
    single = triptych.load(stages.repo, role="denoiser", device="cpu", tasks=["text-to-video", "image-to-video"])
    assert "latent_upsampler" not in single.components


def test_the_second_stage_has_text_of_its_own_where_rounding_makes_it_differ(
    stages: TwoStages, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = stages.roles["encoder"].run(triptych.Request(**CALL, two_stage=True))
    assert state.fields.get("refinement_conditioning") is None
    for connectors in (stages.pipeline.connectors, stages.model.components["connectors"]):
        forward = connectors.forward

        def by_rows(*args: Any, run: Callable[..., Any] = forward, **kwargs: Any) -> Any:
            video, audio, mask = run(*args, **kwargs)
            return video * len(video), audio, mask  # as on a machine where the number of rows decides the rounding

        monkeypatch.setattr(connectors, "forward", by_rows)
    call = {**CALL, "two_stage": True, "output_type": "pt"}
    assert_same(stages.whole(**call), stages.diffusers(**call), "rounded by the number of rows")


def test_what_is_not_exact_stays_within_the_tolerance(stages: TwoStages) -> None:
    call = {**CALL, "two_stage": True, "num_videos_per_prompt": 2, "output_type": "pt"}
    for one, other in zip(stages.whole(**call, exact=False), stages.whole(**call)):
        torch.testing.assert_close(one, other, rtol=0, atol=parity.PIXEL_TOLERANCE)


@pytest.mark.slow
def test_processes_that_hand_over_files_give_the_same(
    tiny_repo: TinyRepo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "Parity", TwoStages)
    two = TwoStages(tiny_repo("ltx2", version="2.3", upsampler=True))
    two.check_in_processes(tmp_path, {**CALL, "two_stage": True}, ("float32", "bfloat16"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage_2_sigmas": [0.4, 0.7]}, "stage_2_sigmas=.*falling noise levels between 1 and 0"),
        ({"stage_2_sigmas": [1.5, 0.7]}, "stage_2_sigmas=.*falling noise levels"),
        ({"stage_2_sigmas": [0.9, 0.0]}, "stage_2_sigmas=.*falling noise levels"),
        ({"stage_2_sigmas": []}, "stage_2_sigmas=.*falling noise levels"),
        ({"stage_2_sigmas": "0.9"}, "stage_2_sigmas=.*falling noise levels"),
        ({"tone_map_compression_ratio": 1.1}, "tone_map_compression_ratio=1.1: a number between 0 and 1"),
        ({"adain_factor": -1}, "adain_factor=-1: a number between 0 and 10"),
        ({"two_stage": "yes"}, "two_stage='yes': True or False"),
        ({"height": 40}, "height=40: a multiple of 32 .* 32 or 64"),
    ],
)
def test_what_cannot_be_done_is_refused_with_a_reason(stages: TwoStages, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        stages.model.admit(triptych.Request(**{**CALL, "two_stage": True, **changes}))
