"""LTX-2 in two stages: generate a small video, upsample its latents, refine them in a few steps without guidance.

Oracle: `diffusers.LTX2Pipeline` (or its sibling for images), `diffusers.LTX2LatentUpsamplePipeline` and the first again,
chained as diffusers' documentation does it (api/pipelines/ltx2), with one generator. The LoRA that it loads for the
second stage of a model that is not distilled is a request's `stage_2_lora`, see `ltx2_lora`.

A repository offers this by a component `latent_upsampler`: in its index, or as published beside it, in its folder. A
request asks for it by `two_stage=True`; height and width are then those of the small video.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from triptych.components.lora import LoraDesk, of_component, read
from triptych.components.need import Need
from triptych.errors import ParameterError
from triptych.pipelines import ltx2_lora
from triptych.pipelines.ltx2 import (
    STATISTICS,
    TWO_STAGES,
    Guidance,
    I2VDenoising,
    LTX2Denoising,
    TextConnecting,
    denormalised,
    guided,
    unpacked_audio,
)
from triptych.pipelines.ltx2_lora import of_second_stage
from triptych.roles import RoleType
from triptych.stages.base import Stage
from triptych.stages.denoising import Forward
from triptych.state import View

if TYPE_CHECKING:
    import torch


class TwoStageTextConnecting(TextConnecting):
    """Turn Gemma's hidden states into what each modality reads, in the first stage and in the second.

    The second has no negative prompt: `refinement_conditioning` is embeddings of video and sound and their mask where
    those of the prompt alone are not those made beside the negative prompt, to the bit, or where the second stage's
    LoRA changes the connectors; otherwise None.
    """

    tasks = frozenset(TWO_STAGES.values())
    reads = {*TextConnecting.reads, "lora", "stage_2_lora"}
    writes = {*TextConnecting.writes, "refinement_conditioning"}

    def run(self, state: View) -> None:
        import torch

        super().run(state)
        second = of_component("connectors", of_second_stage(state))
        if second:
            usual = read(state.lora)
            self.adapt((*usual, *second))
            state.refinement_conditioning = self.connect(state, with_negative=False)
            self.adapt(usual)
            return
        if not state.exact or not guided(state.guidance_scale, state.audio_guidance_scale):
            return
        alone = self.connect(state, with_negative=False)
        beside = beside_negative(state)
        if not all(one.shape == other.shape and torch.equal(one, other) for one, other in zip(alone, beside)):
            state.refinement_conditioning = alone


class LoraLoading(Stage):
    """Load what the second stage's LoRA changes in the transformer: before the first stage, so that no work is lost."""

    role = RoleType.DENOISER
    tasks = frozenset(TWO_STAGES.values())
    needs = {"transformer": Need.FULL}
    reads = {"stage_2_lora"}

    def run(self, state: View) -> None:
        if self.adapters is not None:
            self.adapters.load("transformer", of_second_stage(state))


class LatentUpsampling(Stage):
    """Upsample the video's latents.

    Afterwards the latents of video and sound are as their autoencoders make them, which is how the second stage takes
    them: [videos, channels, frames, height, width] and [videos, channels, latent frames, latent mel bins].
    """

    role = RoleType.DENOISER
    tasks = frozenset(TWO_STAGES.values())
    needs = {"latent_upsampler": Need.FULL, "vae": STATISTICS, "audio_vae": STATISTICS}
    reads = {"latents", "audio_latents", "adain_factor", "tone_map_compression_ratio"}
    writes = {"latents", "audio_latents"}

    def run(self, state: View) -> None:
        from diffusers import LTX2LatentUpsamplePipeline

        helpers = LTX2LatentUpsamplePipeline(vae=self.vae, latent_upsampler=self.latent_upsampler)
        small = denormalised(self.helpers, state.latents, self.vae).to(self.latent_upsampler.dtype)
        latents = self.latent_upsampler(small)
        if state.adain_factor > 0:
            latents = helpers.adain_filter_latent(latents, small, state.adain_factor)
        if state.tone_map_compression_ratio > 0:
            latents = helpers.tone_map_latents(latents, state.tone_map_compression_ratio)
        state.latents = latents
        state.audio_latents = unpacked_audio(self.helpers, state.audio_latents, self.audio_vae)


class LTX2Refinement(LTX2Denoising):
    """Add noise to the upsampled latents, and denoise them in the second stage's few steps, without guidance."""

    tasks = frozenset((TWO_STAGES["text-to-video"],))
    reads = {*LTX2Denoising.reads, "refinement_conditioning", "stage_2_sigmas", "stage_2_lora"}

    def new_scheduler(self) -> Any:
        from diffusers import FlowMatchEulerDiscreteScheduler

        # The second stage's noise levels are meant as they are.
        return FlowMatchEulerDiscreteScheduler.from_config(
            self.scheduler.config, use_dynamic_shifting=False, shift_terminal=None
        )

    def noise_scale(self, state: View) -> float:
        first: float = state.stage_2_sigmas[0]
        return first

    def sigmas(self, state: View) -> Any:
        return state.stage_2_sigmas

    def guidance(self, state: View) -> tuple[Guidance, Guidance]:
        return Guidance(), Guidance()

    def embeds(self, state: View) -> Any:
        if state.refinement_conditioning is not None:
            return state.refinement_conditioning
        if guided(state.guidance_scale, state.audio_guidance_scale):
            return beside_negative(state)
        return super().embeds(state)

    def forward(self, state: View, i: int, branch: str, copies: int, **changes: Any) -> Forward:
        forward = super().forward(state, i, branch, copies, **changes)
        return replace(forward, loras=of_component(forward.component, of_second_stage(state)))


class I2VRefinement(LTX2Refinement, I2VDenoising):
    """Add noise to the upsampled latents but for the first frame's, and denoise them in the second stage's few steps."""

    tasks = frozenset((TWO_STAGES["image-to-video"],))
    reads = {*LTX2Refinement.reads, *I2VDenoising.reads}


DENOISER_STAGES: tuple[type[Stage], ...] = (LatentUpsampling, LTX2Refinement, I2VRefinement)


def beside_negative(state: View) -> list[torch.Tensor]:
    """Return the prompt's rows of what each modality reads and of the mask, which follow the negative prompt's."""
    made = state.connector_prompt_embeds, state.connector_audio_prompt_embeds, state.connector_attention_mask
    return [each.chunk(2)[1] for each in made]


def parameters() -> dict[str, object]:
    """Return the request parameters of two stages and their defaults.

    `adain_factor` and `tone_map_compression_ratio` are those of `LTX2LatentUpsamplePipeline`.
    """
    from diffusers.pipelines.ltx2.utils import STAGE_2_DISTILLED_SIGMA_VALUES

    return {
        "two_stage": False,
        "stage_2_sigmas": list(STAGE_2_DISTILLED_SIGMA_VALUES),
        "adain_factor": 0.0,
        "tone_map_compression_ratio": 0.0,
        **ltx2_lora.parameters(),
    }


def settle(given: dict[str, Any], desk: LoraDesk) -> None:
    """Check the parameters of two stages, and settle the second stage's LoRA.

    Raises:
        ParameterError: one is not accepted.
        UsageError: the LoRA needs what is not installed.
    """
    if not isinstance(given["two_stage"], bool):
        raise ParameterError("two_stage", given["two_stage"], "True or False is accepted")
    sigmas = given["stage_2_sigmas"]
    listed = isinstance(sigmas, (list, tuple)) and bool(sigmas) and all(map(is_number, sigmas))
    if not listed or list(sigmas) != sorted(set(sigmas), reverse=True) or sigmas[0] > 1 or sigmas[-1] <= 0:
        raise ParameterError("stage_2_sigmas", sigmas, "falling noise levels between 1 and 0 are accepted")
    for name, most in (("tone_map_compression_ratio", 1), ("adain_factor", 10)):
        if not is_number(given[name]) or not 0 <= given[name] <= most:
            raise ParameterError(name, given[name], f"a number between 0 and {most} is accepted")
    ltx2_lora.settle(given, desk)


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
