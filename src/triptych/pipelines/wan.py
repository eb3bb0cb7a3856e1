"""Wan: text to video; 2.1, 2.2 with a second transformer for the late steps, and 2.2 TI2V-5B.

Oracle: `diffusers.WanPipeline`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from triptych.components.need import Need
from triptych.errors import ModelError, ParameterError
from triptych.pipelines.base import Family, check_inputs, check_multiple, check_tensors
from triptych.roles import RoleType
from triptych.stages.base import Stage
from triptych.stages.denoising import Denoising, Forward
from triptych.stages.noise_levels import begin_at_first
from triptych.state import View

if TYPE_CHECKING:
    import torch

SIZE_MULTIPLE = 16
"""The oracle accepts only multiples of this many pixels, whatever the model."""

EMBEDDINGS = dict.fromkeys(("prompt_embeds", "negative_prompt_embeds"), (None, None, None))
"""Dimensions of the embeddings that a request may give."""


def has_late_steps(options: Mapping[str, object]) -> bool:
    """Return whether the second transformer has steps to run: those below `boundary_ratio` of the training timesteps."""
    return bool(options.get("boundary_ratio"))


class TextEncoding(Stage):
    """Turn the prompt, and for guidance the negative prompt, into embeddings."""

    role = RoleType.ENCODER
    row_wise = {"text_encoder"}
    needs = {"text_encoder": Need.FULL, "tokenizer": Need.FULL}
    writes = {"prompt_embeds", "negative_prompt_embeds"}
    reads = {"prompt", "negative_prompt", "guidance_scale", "max_sequence_length", *writes}

    def run(self, state: View) -> None:
        state.prompt_embeds = self.embed(state, state.prompt, state.prompt_embeds)
        if state.guidance_scale > 1:
            negative, given = state.negative_prompt or "", state.negative_prompt_embeds
            rows = len(state.prompt_embeds)  # of given ones there may be several
            text = [negative] * rows if rows > 1 else negative
            state.negative_prompt_embeds = self.embed(state, text if given is None else None, given)
        else:
            state.negative_prompt_embeds = None

    def embed(self, state: View, prompt: str | list[str] | None, embeds: torch.Tensor | None) -> torch.Tensor:
        """Encode the texts of one branch by themselves, so that those which come again can be remembered."""
        encoded: torch.Tensor = self.helpers.encode_prompt(
            prompt=prompt,
            do_classifier_free_guidance=False,
            prompt_embeds=embeds,
            max_sequence_length=state.max_sequence_length,
            device=self.device,
        )[0]
        return encoded


class WanDenoising(Denoising):
    """Denoise the video latents, in float32 between the steps."""

    needs = {
        "transformer": Need.FULL,
        "transformer_2": Need.FULL.optional(when=has_late_steps),
        "scheduler": Need.FULL,
    }
    reads = {
        "prompt_embeds", "negative_prompt_embeds", "generator", "latents", "height", "width", "num_frames",
        "num_videos_per_prompt", "num_inference_steps", "guidance_scale", "guidance_scale_2", "exact",
    }  # fmt: skip
    writes = {"latents", "conditioning", "scheduler", "timesteps", "late_steps"}

    def begin(self, state: View) -> None:
        branches = {"cond": state.prompt_embeds, "uncond": state.negative_prompt_embeds}
        state.conditioning = {
            branch: embeds.to(self.transformer_dtype).repeat_interleave(state.num_videos_per_prompt, dim=0)
            for branch, embeds in branches.items()
            if embeds is not None
        }
        state.scheduler = self.new_scheduler()
        state.scheduler.set_timesteps(state.num_inference_steps, device=self.device)
        begin_at_first(state.scheduler)
        state.timesteps = state.scheduler.timesteps
        state.late_steps = self.late_steps(state)
        state.latents = self.noise(state, len(state.conditioning["cond"]))

    def noise(self, state: View, videos: int) -> torch.Tensor:
        """Draw the latents to start from, or take those given: float32 [videos, channels, frames, height, width]."""
        import torch

        latents: torch.Tensor = self.helpers.prepare_latents(
            batch_size=videos,
            num_channels_latents=self.transformer.config.in_channels,
            height=state.height,
            width=state.width,
            num_frames=state.num_frames,
            dtype=torch.float32,
            device=self.device,
            generator=state.generator,
            latents=state.latents,
        )
        return latents

    def model_inputs(self, state: View, i: int) -> list[Forward]:
        common = {"hidden_states": state.latents.to(self.transformer_dtype), "timestep": self.timestep(state, i)}
        model = "transformer_2" if state.late_steps[i] else "transformer"
        cache = {
            "step_index": i,
            "sigma": float(state.scheduler.sigmas[i]),
            "num_inference_steps": len(state.timesteps),
        }
        return [
            Forward(model, branch, {**common, "encoder_hidden_states": embeds}, cache)
            for branch, embeds in state.conditioning.items()
        ]

    def timestep(self, state: View, i: int) -> torch.Tensor:
        """Return step i's timestep: one for each video, or where the model wants it, one for each of its tokens."""
        import torch

        t, (videos, _, *shape) = state.timesteps[i], state.latents.shape
        if not self.helpers.config.expand_timesteps:
            one: torch.Tensor = t.expand(videos)
            return one
        # The oracle takes every second row and column, whatever the transformer's patch size.
        ones = torch.ones(shape, dtype=torch.float32, device=self.device)
        each: torch.Tensor = (ones[:, ::2, ::2] * t).flatten().unsqueeze(0).expand(videos, -1)
        return each

    def late_steps(self, state: View) -> list[bool]:
        """Return which steps are the second transformer's: all at once, because to ask is to wait for the device."""
        ratio = self.helpers.config.boundary_ratio
        if ratio is None:
            return [False] * len(state.timesteps)
        late: list[bool] = (state.timesteps < ratio * state.scheduler.config.num_train_timesteps).tolist()
        return late

    def advance(self, state: View, i: int, prediction: Sequence[torch.Tensor]) -> None:
        scale = state.guidance_scale
        if state.late_steps[i] and state.guidance_scale_2 is not None:
            scale = state.guidance_scale_2
        noise, *rest = prediction
        for unconditional in rest:
            noise = unconditional + scale * (noise - unconditional)
        state.latents = self.take_step(state, i, noise)


class Decoding(Stage):
    """Undo the latents' normalisation and decode them to frames."""

    role = RoleType.DECODER
    row_wise = {"vae"}
    needs = {"vae": Need.DECODE}
    reads = {"latents", "output_type"}
    writes = {"frames", "fps"}

    def run(self, state: View) -> None:
        state.fps = Wan.fps_per_token if self.helpers.config.expand_timesteps else Wan.fps
        if state.output_type == "latent":
            state.frames = state.latents
        else:
            video = self.video(state)
            state.frames = self.helpers.video_processor.postprocess_video(video, output_type=state.output_type)

    def video(self, state: View) -> torch.Tensor:
        """Return the pixels, between -1 and 1: [videos, 3, frames, height, width]."""
        return self.decode(state.latents)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        import torch

        config = self.vae.config
        latents = latents.to(self.device, self.vae.dtype)
        mean = torch.tensor(config.latents_mean).view(1, config.z_dim, 1, 1, 1).to(latents.device, latents.dtype)
        # The oracle rounds the deviations before it inverts them, and divides by that.
        std = torch.tensor(config.latents_std).view(1, config.z_dim, 1, 1, 1).to(latents.device, latents.dtype)
        latents = latents / (1.0 / std) + mean
        video: torch.Tensor = self.vae.decode(latents, return_dict=False)[0]
        return video


class Wan(Family):
    """Wan 2.1 and 2.2, text to video.

    Attributes:
        fps_per_token: frames per second of the models with a timestep for each token (2.2 TI2V-5B).
    """

    pipelines = ("WanPipeline",)
    tasks = {"text-to-video": "a video from a prompt"}
    geometry = {"vae": Need.CONFIG}
    admission = {"transformer": Need.CONFIG}
    refused = {"attention_kwargs"}
    fps = 16
    fps_per_token = 24

    def compose(self) -> None:
        self.add_stage(TextEncoding)
        self.add_stage(WanDenoising)
        self.add_stage(Decoding)

    def frame_rate(self, parameters: Mapping[str, Any]) -> float:
        return self.fps_per_token if self.repository.options.get("expand_timesteps") else self.fps

    def check(self) -> None:
        super().check()
        name, options, components = self.repository.name, self.repository.options, self.repository.components
        if has_late_steps(options) and "transformer_2" not in components:
            ratio = options["boundary_ratio"]
            raise ModelError(
                f"{name} has boundary_ratio={ratio!r}, but no component 'transformer_2' for the steps below it"
            )

    def admit(self, parameters: dict[str, Any], helpers: Any) -> None:
        patch = helpers.transformer.config.patch_size[1:]
        for name, pixels in zip(("height", "width"), patch):
            multiple = math.lcm(SIZE_MULTIPLE, helpers.vae_scale_factor_spatial * pixels)
            check_multiple(parameters, (name,), multiple)
        check_tensors(parameters, EMBEDDINGS)
        check_inputs(helpers, parameters)
        check_frames(parameters["num_frames"], helpers.vae_scale_factor_temporal)
        check_tensors(parameters, {"latents": self.shape_of_latents(parameters, helpers)})

    def shape_of_latents(self, parameters: Mapping[str, Any], helpers: Any) -> tuple[int | None, ...]:
        """Return the shape of latents that are accepted; None where they decide themselves."""
        videos = count_videos(parameters)
        # As in the oracle, they decide the video's size, and one prompt may be that of several.
        return (None if videos == 1 else videos, helpers.transformer.config.in_channels, None, None, None)


def count_videos(parameters: Mapping[str, Any]) -> int:
    """Return how many videos a request's prompt or given embeddings make."""
    embeds = parameters["prompt_embeds"]
    videos: int = parameters["num_videos_per_prompt"] * (1 if embeds is None else len(embeds))
    return videos


def check_frames(frames: int, multiple: int) -> None:
    """Check that a video's frames, but for the first, are a multiple of what the autoencoder works in.

    Raises:
        ParameterError: they are not; the message gives the nearest numbers that are.
    """
    if (frames - 1) % multiple:
        below = (frames - 1) // multiple * multiple + 1
        accepted = f"a multiple of {multiple}, plus 1, is accepted; the nearest: {below} or {below + multiple}"
        raise ParameterError("num_frames", frames, accepted)
