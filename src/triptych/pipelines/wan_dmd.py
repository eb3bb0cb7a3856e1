"""FastWan: Wan 2.1 and TI2V-5B distilled to a few steps by DMD; text to video, and image to video.

Oracle: the loop of FastVideo's `DmdDenoisingStage` (github.com/hao-ai-lab/FastVideo, pipelines/stages/denoising.py),
after Distribution Matching Distillation (arxiv.org/abs/2405.14867, section 4.5): predict the clean latents, noise them
anew to the next step's level, and so on; no guidance. diffusers has no such pipeline: the helpers are those of
`WanPipeline` and `WanImageToVideoPipeline`, and so are text and image conditioning and decoding. FastVideo's ImageVAE
stage samples the frame's latents; here they are the distribution's mode, as in diffusers and in FastVideo's training.

For several outputs FastVideo's own batch does not work; here every draw is made for all of them at once, from the
request's one generator.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

from triptych.components.need import Need
from triptych.errors import ModelError, ParameterError
from triptych.pipelines.wan import Decoding, Wan
from triptych.pipelines.wan_i2v import FrameEncoding, ImageEmbedding, WanImageToVideo
from triptych.roles import RoleType
from triptych.stages.base import Stage
from triptych.stages.denoising import Denoising, Forward
from triptych.state import View

if TYPE_CHECKING:
    import torch

TIMESTEPS = (1000, 757, 522)
"""The steps that the published FastWan models were distilled for (FastVideo, configs/pipelines/wan.py)."""

TRAIN_TIMESTEPS = 1000
SHIFT = 8.0
"""Of the noise levels that FastVideo looks a step up in, whatever scheduler the repository has."""


class PromptEncoding(Stage):
    """Turn the prompt into embeddings."""

    role = RoleType.ENCODER
    row_wise = {"text_encoder"}
    needs = {"text_encoder": Need.FULL, "tokenizer": Need.FULL}
    reads = {"prompt", "prompt_embeds", "max_sequence_length"}
    writes = {"prompt_embeds"}

    def run(self, state: View) -> None:
        state.prompt_embeds, _ = self.helpers.encode_prompt(
            prompt=state.prompt,
            do_classifier_free_guidance=False,
            prompt_embeds=state.prompt_embeds,
            max_sequence_length=state.max_sequence_length,
            device=self.device,
        )


class DMDDenoising(Denoising):
    """Predict the clean latents and noise them anew, for each of a few steps."""

    needs = {"transformer": Need.FULL}
    reads = {
        "prompt_embeds", "generator", "latents", "height", "width", "num_frames", "num_videos_per_prompt", "timesteps",
        "exact",
    }  # fmt: skip
    writes = {"latents", "conditioning", "timesteps", "sigmas"}

    def begin(self, state: View) -> None:
        import torch
        from diffusers import FlowMatchEulerDiscreteScheduler

        embeds = state.prompt_embeds.repeat_interleave(state.num_videos_per_prompt, dim=0)
        state.conditioning = {"cond": embeds.to(self.transformer_dtype)}
        levels = FlowMatchEulerDiscreteScheduler(num_train_timesteps=TRAIN_TIMESTEPS, shift=SHIFT)
        state.timesteps = torch.tensor(state.timesteps, dtype=torch.long, device=self.device)
        # A step has the level of the nearest timestep that the shift leaves.
        distances = (levels.timesteps.to(self.device)[None] - state.timesteps[:, None]).abs()
        state.sigmas = levels.sigmas.to(self.device)[distances.argmin(dim=1)]
        if state.latents is None:
            state.latents = self.draw(state, self.shape(state, len(embeds)), embeds.dtype)
        else:
            state.latents = state.latents.to(self.device)

    def shape(self, state: View, videos: int) -> Sequence[int]:
        """Return the shape of the latents: [videos, channels, frames, height, width]."""
        import torch

        empty = self.helpers.prepare_latents(
            batch_size=videos,
            num_channels_latents=self.transformer.config.in_channels,
            height=state.height,
            width=state.width,
            num_frames=state.num_frames,
            device=torch.device("meta"),
        )
        shape: Sequence[int] = empty.shape
        return shape

    def draw(self, state: View, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Draw noise of a shape, in FastVideo's order: a frame's channels one after another."""
        from diffusers.utils.torch_utils import randn_tensor

        videos, channels, frames, height, width = shape
        frames_first = (videos, frames, channels, height, width)
        noise: torch.Tensor = randn_tensor(frames_first, generator=state.generator, device=self.device, dtype=dtype)
        return noise.transpose(1, 2)

    def model_inputs(self, state: View, i: int) -> list[Forward]:
        inputs = {
            "hidden_states": state.latents.to(self.transformer_dtype),
            "timestep": state.timesteps[i].repeat(len(state.latents)),
            "encoder_hidden_states": state.conditioning["cond"],
        }
        return [Forward("transformer", "cond", inputs)]

    def advance(self, state: View, i: int, prediction: Sequence[torch.Tensor]) -> None:
        (flow,) = prediction
        sigma = state.sigmas[i]
        clean = (state.latents.double() - sigma.double() * flow.double()).to(flow.dtype)
        if i + 1 == len(state.timesteps):
            state.latents = clean
            return
        noise = self.draw(state, clean.shape, clean.dtype)
        # One number with dimensions, so that narrower latents are mixed in float32.
        sigma = state.sigmas[i + 1].view(1, 1, 1, 1, 1)
        state.latents = ((1 - sigma) * clean + sigma * noise).to(noise.dtype)


class I2VDMDDenoising(DMDDenoising):
    """Predict the clean latents beside the given frame's and noise them anew, for each of a few steps."""

    reads = {*DMDDenoising.reads, "image_embeds", "image_condition"}

    def shape(self, state: View, videos: int) -> Sequence[int]:
        return (videos, self.helpers.vae.config.z_dim, *state.image_condition.shape[2:])

    def model_inputs(self, state: View, i: int) -> list[Forward]:
        import torch

        (forward,) = super().model_inputs(state, i)
        latents, videos = forward.inputs["hidden_states"], len(state.latents)
        frames = state.image_condition.repeat(videos, 1, 1, 1, 1)
        embeds = state.image_embeds
        if embeds is not None:
            embeds = embeds.repeat(videos, 1, 1).to(latents.dtype)
        beside = {
            "hidden_states": torch.cat([latents, frames], dim=1).to(latents.dtype),
            "encoder_hidden_states_image": embeds,
        }
        return [Forward(forward.component, forward.branch, {**forward.inputs, **beside})]


class WanDMD(Wan):
    """FastWan, text to video.

    Attributes:
        helpers_of: the diffusers pipeline class that gives the helpers.
    """

    pipelines = ("WanDMDPipeline",)
    refused = {*Wan.refused, "negative_prompt", "negative_prompt_embeds", "guidance_scale_2"}
    helpers_of: ClassVar[str] = "WanPipeline"

    def lone_forward(self) -> str | None:
        return "the model is distilled and takes no guidance"

    def compose(self) -> None:
        self.add_stage(PromptEncoding, "text_encoding")
        self.add_stage(DMDDenoising)
        self.add_stage(Decoding)

    @cached_property
    def oracle(self) -> type[Any]:
        """The diffusers pipeline class that gives the helpers; FastVideo's own is not in diffusers."""
        import diffusers

        cls: type[Any] = getattr(diffusers, self.helpers_of)
        return cls

    @cached_property
    def parameters(self) -> dict[str, object]:
        own = {"timesteps": list(TIMESTEPS), "num_inference_steps": None, "guidance_scale": 1.0}
        return {**super().parameters, **own}

    def check(self) -> None:
        super().check()
        if self.repository.options.get("boundary_ratio"):
            raise ModelError(f"{self.repository.name} has a second transformer (`boundary_ratio`); FastWan has one")

    def admit(self, parameters: dict[str, Any], helpers: Any) -> None:
        timesteps = check_timesteps(parameters["timesteps"])
        steps, scale = parameters["num_inference_steps"], parameters["guidance_scale"]
        if steps not in (None, len(timesteps)):
            raise ParameterError("num_inference_steps", steps, f"`timesteps` says the steps: {len(timesteps)}")
        if scale > 1:
            raise ParameterError("guidance_scale", scale, "the model is distilled: it takes no guidance")
        parameters.update(timesteps=timesteps, num_inference_steps=len(timesteps))
        super().admit(parameters, helpers)


class WanImageToVideoDMD(WanDMD, WanImageToVideo):
    """FastWan, image to video."""

    pipelines = ("WanImageToVideoDmdPipeline",)
    refused = {*WanDMD.refused, *WanImageToVideo.refused}
    helpers_of = "WanImageToVideoPipeline"

    def compose(self) -> None:
        self.add_stage(PromptEncoding, "text_encoding")
        self.add_stage(ImageEmbedding)
        self.add_stage(FrameEncoding)
        self.add_stage(I2VDMDDenoising, "dmd_denoising")
        self.add_stage(Decoding)

    def check(self) -> None:
        super().check()
        if self.repository.options.get("expand_timesteps"):
            raise ModelError(
                f"{self.repository.name} has `expand_timesteps`: FastVideo has no image to video for TI2V-5B"
            )


def check_timesteps(given: Any) -> list[int]:
    """Return the timesteps as a list.

    Raises:
        ParameterError: they are no falling whole numbers between the last training timestep and 1.
    """
    timesteps = given.tolist() if hasattr(given, "tolist") else given
    accepted = f"falling whole numbers between {TRAIN_TIMESTEPS} and 1 are accepted, such as {list(TIMESTEPS)}"
    if not isinstance(timesteps, (list, tuple)) or not timesteps:
        raise ParameterError("timesteps", given, accepted)
    if any(isinstance(t, bool) or not isinstance(t, int) or not 1 <= t <= TRAIN_TIMESTEPS for t in timesteps):
        raise ParameterError("timesteps", given, accepted)
    if any(t <= later for t, later in pairwise(timesteps)):
        raise ParameterError("timesteps", given, accepted)
    return list(timesteps)
