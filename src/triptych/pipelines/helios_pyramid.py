"""Helios in a pyramid: each chunk is denoised small first, then enlarged, noised anew and denoised on.

Oracle: `diffusers.HeliosPyramidPipeline`, which never reads `sigmas` and `latents`. The pyramid is that of Pyramidal
Flow Matching (arxiv.org/abs/2410.05954), the guidance of the undistilled model CFG-Zero* (arxiv.org/abs/2503.18886).
The oracle says that it ignores the guidance of a distilled model and does not: nor is it ignored here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from triptych.components.need import Need
from triptych.errors import ModelError, ParameterError
from triptych.pipelines.helios import FrameEncoding, Helios, HeliosDecoding, HeliosDenoising, Pass, check_whole
from triptych.pipelines.wan import TextEncoding
from triptych.state import View

if TYPE_CHECKING:
    import torch


class PyramidDenoising(HeliosDenoising):
    """Denoise a video's chunks one after another, each from its smallest size to its largest; all steps are one loop.

    `started_from` is what the pass being run started from, which a distilled model's scheduler takes for its noise.
    """

    reads = {
        *(HeliosDenoising.reads - {"num_inference_steps", "sigmas"}),
        "pyramid_num_inference_steps_list", "use_zero_init", "zero_steps", "is_amplify_first_chunk",
    }  # fmt: skip
    writes = {*HeliosDenoising.writes, "started_from"}

    def settings(self, state: View, chunk: int) -> list[dict[str, Any]]:
        steps = state.pyramid_num_inference_steps_list
        height, width = self.size(state)
        # A level is shifted by the number of tokens that it has before it is enlarged.
        halvings = [len(steps) - max(level, 1) for level in range(len(steps))]
        return [
            {
                "num_inference_steps": count,
                "stage_index": level,
                "device": self.device,
                "mu": self.shift(state, height >> halved, width >> halved),
                "is_amplify_first_chunk": state.is_amplify_first_chunk and chunk == 0,
            }
            for level, (count, halved) in enumerate(zip(steps, halvings))
        ]

    def begin_pass(self, state: View, each: Pass) -> None:
        super().begin_pass(state, each)
        state.started_from = state.latents

    def start(self, state: View, each: Pass, latents: torch.Tensor | None) -> torch.Tensor:
        if latents is None:
            return self.shrunk(self.noise(state), len(state.pyramid_num_inference_steps_list) - 1)
        return self.renoised(state, each.level, self.enlarged(latents))

    def shrunk(self, noise: torch.Tensor, times: int) -> torch.Tensor:
        """Halve the noise's sides so many times, keeping its deviation: a mean of four has half of it."""
        from torch.nn.functional import interpolate

        batch, _, _, height, width = noise.shape
        pictures = noise.transpose(1, 2).flatten(0, 1)
        for _ in range(times):
            height, width = height // 2, width // 2
            pictures = interpolate(pictures, size=(height, width), mode="bilinear") * 2
        return videos(pictures, batch)

    def enlarged(self, latents: torch.Tensor) -> torch.Tensor:
        """Double the latents' sides."""
        from torch.nn.functional import interpolate

        batch, _, _, height, width = latents.shape
        pictures = latents.transpose(1, 2).flatten(0, 1)
        pictures = interpolate(pictures, size=(height * 2, width * 2), mode="nearest")
        return videos(pictures, batch)

    def renoised(self, state: View, level: int, latents: torch.Tensor) -> torch.Tensor:
        """Bring enlarged latents to the level's noise: noise that is correlated within a patch undoes their blocks."""
        scheduler = state.schedulers[0]
        signal, gamma = 1 - scheduler.ori_start_sigmas[level], scheduler.config.gamma
        alpha = 1 / (math.sqrt(1 + (1 / gamma)) * (1 - signal) + signal)
        beta = alpha * (1 - signal) / math.sqrt(gamma)
        patch = self.transformer.config.patch_size
        noise = self.helpers.sample_block_noise(*latents.shape, patch, self.device, state.generator)
        renoised: torch.Tensor = alpha * latents + beta * noise.to(device=self.device, dtype=self.transformer_dtype)
        return renoised

    def timestep(self, state: View, i: int) -> torch.Tensor:
        """Return step i's timestep as the transformer gets it: cut to a whole number."""
        import torch

        return super().timestep(state, i).to(torch.int64)

    def guide(self, state: View, i: int, conditional: torch.Tensor, unconditional: torch.Tensor) -> torch.Tensor:
        from diffusers.pipelines.helios.pipeline_helios_pyramid import optimized_scale

        if not self.helpers.config.is_cfg_zero_star:
            return super().guide(state, i, conditional, unconditional)
        this = state.passes[i]
        if state.use_zero_init and this.level == 0 and i - this.first <= state.zero_steps:
            return conditional * 0.0
        scale = optimized_scale(conditional.flatten(1), unconditional.flatten(1))
        scaled = unconditional * scale.view(-1, *[1] * (conditional.ndim - 1)).to(conditional.dtype)
        guided: torch.Tensor = scaled + state.guidance_scale * (conditional - scaled)
        return guided

    def step(self, state: View, i: int, number: int, noise: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        if not self.helpers.config.is_distilled:
            return super().step(state, i, number, noise, latents)
        scheduler = state.schedulers[number]
        stepped: torch.Tensor = scheduler.step(
            noise,
            state.timesteps[i],
            latents,
            generator=state.generator,
            return_dict=False,
            cur_sampling_step=i - state.passes[i].first,
            dmd_noisy_tensor=state.started_from.split(state.videos_per_batch)[number],
            dmd_sigmas=scheduler.sigmas,
            dmd_timesteps=scheduler.timesteps,
            all_timesteps=scheduler.timesteps,
        )[0]
        return stepped


class HeliosPyramid(Helios):
    """Helios in a pyramid, undistilled and distilled."""

    pipelines = ("HeliosPyramidPipeline",)
    admission = {**Helios.admission, "scheduler": Need.FULL}
    optional = {"use_zero_init"}
    refused = {*Helios.refused, "sigmas"}

    def compose(self) -> None:
        self.add_stage(TextEncoding)
        self.add_stage(FrameEncoding)
        self.add_stage(PyramidDenoising)
        self.add_stage(HeliosDecoding, "decoding")

    def check_scheduler(self) -> None:
        distilled = bool(self.repository.options.get("is_distilled"))
        wanted, found = "HeliosDMDScheduler" if distilled else "HeliosScheduler", self.repository.entry("scheduler")
        if found.class_name != wanted:
            raise ModelError(
                f"{self.repository.name} has is_distilled={distilled} and a {found.class_name}; it needs a {wanted}"
            )

    def shrinks(self, parameters: Mapping[str, Any]) -> int:
        return 1 << (len(parameters["pyramid_num_inference_steps_list"]) - 1)

    def admit(self, parameters: dict[str, Any], helpers: Any) -> None:
        name = "pyramid_num_inference_steps_list"
        levels, most = check_levels(parameters[name]), helpers.scheduler.config.stages
        if len(levels) > most:
            raise ParameterError(name, levels, f"the model's pyramid has {most} levels; no more are accepted")
        check_whole("zero_steps", parameters["zero_steps"], 0)
        super().admit(parameters, helpers)


def videos(pictures: torch.Tensor, count: int) -> torch.Tensor:
    """Return the pictures of so many videos, one after another, as [videos, channels, frames, height, width]."""
    return pictures.reshape(count, -1, *pictures.shape[1:]).transpose(1, 2)


def check_levels(steps: Any) -> list[int]:
    """Return the numbers of steps of a pyramid's levels, the smallest level's first.

    Raises:
        ParameterError: they are no whole numbers of at least 1.
    """
    name = "pyramid_num_inference_steps_list"
    if not isinstance(steps, (list, tuple)) or not steps:
        raise ParameterError(name, steps, "a list of whole numbers is accepted, one for each level of the pyramid")
    for count in steps:
        check_whole(name, count, 1)
    return list(steps)
