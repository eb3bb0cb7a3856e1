"""HunyuanVideo 1.5: text to video; guided by the model's own guider, or distilled.

Oracle: `diffusers.HunyuanVideo15Pipeline`. It fails for several outputs of one prompt (the transformer gets the empty
image once, and the autoencoder cannot decode two videos at once): there output k is its single run, with the k-th draw
of the same generator for its noise, so every forward and every decoding is that of one video.

Whether and how a request is guided is said by the component `guider`, not by the request. Text has two encoders: a
language model reads the prompt, and ByT5 the letters of what stands in quotation marks there.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from triptych.components.need import Need
from triptych.errors import ModelError, ParameterError
from triptych.pipelines.base import Family, check_inputs, check_multiple, check_tensors
from triptych.pipelines.wan import check_frames
from triptych.roles import RoleType
from triptych.stages.base import Stage
from triptych.stages.denoising import Denoising, Forward
from triptych.stages.noise_levels import begin_at_first
from triptych.state import View

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

TEXT = {
    "prompt_embeds": "encoder_hidden_states",
    "prompt_embeds_mask": "encoder_attention_mask",
    "prompt_embeds_2": "encoder_hidden_states_2",
    "prompt_embeds_mask_2": "encoder_attention_mask_2",
}
"""What the prompt becomes, and the transformer's names for it. Of the two encoders, in order: the embeddings, [1,
tokens, width], and their mask, [1, tokens], padded to one length for all prompts, in the transformer's dtype."""

NEGATIVE = {name: f"negative_{name}" for name in TEXT}
"""The same of the negative prompt."""


class TextEncoding(Stage):
    """Turn the prompt, and where the guider asks for it the negative prompt, into embeddings of both text encoders."""

    role = RoleType.ENCODER
    row_wise = {"text_encoder", "text_encoder_2"}
    needs = {
        "text_encoder": Need.hidden(-3),
        "tokenizer": Need.FULL,
        "text_encoder_2": Need.FULL,
        "tokenizer_2": Need.FULL,
        "guider": Need.FULL,
    }
    writes = {*TEXT, *NEGATIVE.values()}
    reads = {"prompt", "negative_prompt", *writes}

    def run(self, state: View) -> None:
        self.encode(state, state.prompt, {name: name for name in TEXT})
        if is_guided(self.guider):
            self.encode(state, state.negative_prompt, NEGATIVE)
        else:
            for name in NEGATIVE.values():
                setattr(state, name, None)

    def encode(self, state: View, prompt: str | None, fields: Mapping[str, str]) -> None:
        """Write a prompt's embeddings and masks to `fields`, by what they are; those given there stay."""
        encoded = self.helpers.encode_prompt(
            prompt=prompt,
            device=self.device,
            dtype=self.helpers.transformer.dtype,
            **{name: getattr(state, given) for name, given in fields.items()},
        )
        for name, value in zip(fields.values(), encoded):
            setattr(state, name, value)


class HunyuanDenoising(Denoising):
    """Denoise the video latents, in the transformer's dtype, as the guider combines its predictions."""

    needs = {"transformer": Need.FULL, "scheduler": Need.FULL, "guider": Need.FULL}
    reads = {
        *TEXT, *NEGATIVE.values(), "generator", "latents", "height", "width", "num_frames", "num_videos_per_prompt",
        "num_inference_steps", "sigmas", "exact",
    }  # fmt: skip
    writes = {"latents", "conditioning", "guider", "scheduler", "timesteps"}

    def begin(self, state: View) -> None:
        import numpy as np
        import torch
        from diffusers.pipelines.hunyuan_video1_5.pipeline_hunyuan_video1_5 import retrieve_timesteps

        steps, videos = state.num_inference_steps, state.num_videos_per_prompt
        state.guider, state.scheduler = deepcopy(self.guider), self.new_scheduler()
        sigmas = np.linspace(1.0, 0.0, steps + 1)[:-1] if state.sigmas is None else state.sigmas
        state.timesteps, _ = retrieve_timesteps(state.scheduler, steps, self.device, sigmas=sigmas)
        begin_at_first(state.scheduler)
        rows = self.rows(state)
        given = [None] * (videos // rows) if state.latents is None else state.latents.split(rows)
        state.latents = torch.cat([self.noise(state, rows, latents) for latents in given])

        def repeated(field: str) -> torch.Tensor | None:
            value = getattr(state, field)
            return None if value is None else value.repeat_interleave(videos, dim=0)

        text = {target: (repeated(name), repeated(NEGATIVE[name])) for name, target in TEXT.items()}
        state.conditioning = {"text": text, "image_embeds": self.image_embeds(state), "frames": self.frames(state)}

    def rows(self, state: View) -> int:
        """Return of how many videos a forward is: of one, because the oracle makes no more."""
        return 1

    def noise(self, state: View, videos: int, latents: torch.Tensor | None) -> torch.Tensor:
        """Draw the latents to start from, or take those given: [videos, channels, frames, height, width]."""
        prepared: torch.Tensor = self.helpers.prepare_latents(
            batch_size=videos,
            num_channels_latents=self.helpers.num_channels_latents,
            height=state.height,
            width=state.width,
            num_frames=state.num_frames,
            dtype=self.transformer_dtype,
            device=self.device,
            generator=state.generator,
            latents=latents,
        )
        return prepared

    def image_embeds(self, state: View) -> torch.Tensor:
        """Return the embeddings of the first frame, [videos, tokens, width]; zeros stand for none."""
        tokens, width = self.helpers.vision_num_semantic_tokens, self.helpers.vision_states_dim
        zeros: torch.Tensor = state.latents.new_zeros(len(state.latents), tokens, width)
        return zeros

    def frames(self, state: View) -> torch.Tensor:
        """Return the latents of the frames given, and after them the channel that tells which those are."""
        import torch

        return torch.cat(
            self.helpers.prepare_cond_latents_and_mask(state.latents, state.latents.dtype, self.device), dim=1
        )

    def branches(self, state: View, i: int) -> list[Any]:
        """Return what the guider wants predicted at step i, as the library's block states."""
        state.guider.set_state(step=i, num_inference_steps=len(state.timesteps), timestep=state.timesteps[i])
        wanted: list[Any] = state.guider.prepare_inputs(state.conditioning["text"])
        return wanted

    def model_inputs(self, state: View, i: int) -> list[Forward]:
        import torch

        hidden = torch.cat([state.latents, state.conditioning["frames"]], dim=1)
        videos, rows = len(hidden), self.rows(state)
        common = {"hidden_states": hidden, "image_embeds": state.conditioning["image_embeds"]}
        common |= {name: t.expand(videos).to(hidden.dtype) for name, t in self.times(state, i).items()}
        return [
            Forward(
                "transformer",
                f"{branch}_{first}" if first else branch,
                {name: value[first : first + rows] for name, value in (common | text).items()},
            )
            for branch, text in (
                (getattr(each, state.guider._identifier_key), {name: getattr(each, name) for name in TEXT.values()})
                for each in self.branches(state, i)
            )
            for first in range(0, videos, rows)
        ]

    def times(self, state: View, i: int) -> dict[str, torch.Tensor]:
        """Return step i's timestep, under the transformer's name for it."""
        return {"timestep": state.timesteps[i]}

    def advance(self, state: View, i: int, prediction: Sequence[torch.Tensor]) -> None:
        import torch

        branches = self.branches(state, i)
        each = len(prediction) // len(branches)
        for number, branch in enumerate(branches):
            branch.noise_pred = torch.cat(list(prediction[number * each : (number + 1) * each]))
        noise = state.guider(branches)[0]
        state.latents = self.take_step(state, i, noise)


class Decoding(Stage):
    """Undo the latents' scaling and decode them to frames, one video at a time."""

    role = RoleType.DECODER
    needs = {"vae": Need.DECODE}
    reads = {"latents", "output_type"}
    writes = {"frames", "fps"}

    def run(self, state: View) -> None:
        import torch

        state.fps = HunyuanVideo15.fps
        if state.output_type == "latent":
            state.frames = state.latents
            return
        latents = state.latents.to(self.vae.dtype) / self.vae.config.scaling_factor
        video = torch.cat([self.vae.decode(each, return_dict=False)[0] for each in latents.split(1)])
        state.frames = self.helpers.video_processor.postprocess_video(video, output_type=state.output_type)


class HunyuanVideo15(Family):
    """HunyuanVideo 1.5, text to video."""

    pipelines = ("HunyuanVideo15Pipeline",)
    tasks = {"text-to-video": "a video from a prompt"}
    geometry = {"vae": Need.CONFIG, "transformer": Need.CONFIG}
    admission = {"guider": Need.FULL}
    refused = {"attention_kwargs"}
    fps = 24

    def compose(self) -> None:
        self.add_stage(TextEncoding)
        self.add_stage(HunyuanDenoising)
        self.add_stage(Decoding)

    def check(self) -> None:
        from diffusers.guiders.guider_utils import BaseGuidance

        from triptych.components.blueprint import component_class

        super().check()
        guider = component_class(self.repository, "guider")
        if getattr(guider, "prepare_models", None) is not BaseGuidance.prepare_models:
            raise ModelError(
                f"component 'guider' of {self.repository.name} is a {guider.__name__}, which changes the transformer "
                "from forward to forward; guiders that only combine its predictions are served"
            )

    def admit(self, parameters: dict[str, Any], helpers: Any) -> None:
        check_inputs(helpers, parameters)
        self.check_size(parameters, helpers)
        check_frames(parameters["num_frames"], helpers.vae_scale_factor_temporal)
        check_embeddings(parameters)
        shape = parameters["num_videos_per_prompt"], helpers.num_channels_latents, None
        check_tensors(parameters, {"latents": (*shape, *self.sides_of_latents(parameters, helpers))})
        if parameters["negative_prompt"] and not is_guided(helpers.guider):
            log.warning("negative_prompt has no effect: this model's guider is switched off, or has a scale of 1")

    def sides_of_latents(self, parameters: Mapping[str, Any], helpers: Any) -> tuple[int | None, int | None]:
        """Return the height and width of latents that are accepted; None where they decide the video's size."""
        return None, None

    def check_size(self, parameters: dict[str, Any], helpers: Any) -> None:
        """Settle the video's size, and check that the model can make it."""
        if parameters["height"] is None:
            width, height = helpers.default_aspect_ratio
            parameters["height"], parameters["width"] = helpers.video_processor.calculate_default_height_width(
                height, width, helpers.target_size
            )
        check_multiple(parameters, ("height", "width"), multiple_of(helpers))


def is_guided(guider: Any) -> bool:
    """Return whether a guider that has not begun wants predictions for a negative prompt too, at any step."""
    return bool(guider._enabled and guider.num_conditions > 1)


def multiple_of(helpers: Any) -> int:
    """Return what sizes are multiples of: pixels a token has on each side."""
    pixels: int = helpers.vae_scale_factor_spatial * helpers.transformer.config.patch_size
    return pixels


def check_embeddings(parameters: Mapping[str, Any]) -> None:
    """Check that embeddings and masks that are given are those of one prompt.

    Raises:
        ParameterError: they are not, or no tensors.
    """
    names = (*TEXT, *NEGATIVE.values())
    check_tensors(parameters, {name: (None, None, None) for name in names if "mask" not in name})
    for name in names:
        value = parameters[name]
        shape = tuple(getattr(value, "shape", ()))
        if value is not None and shape[:1] != (1,):
            told = shape or value
            raise ParameterError(name, told, "those of one prompt are accepted; ask for each by itself")
