"""Z-Image: text to image, with classifier-free guidance, both branches in one forward as the oracle runs them.

Oracle: `diffusers.ZImagePipeline`. Its guidance scale is one less than the usual convention: 0 is no guidance, and any
scale above it gives `positive + scale x (positive - negative)`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from triptych.components.need import Need
from triptych.errors import ParameterError, UsageError
from triptych.pipelines.base import Family, check_multiple, check_tensors
from triptych.roles import RoleType
from triptych.stages.base import Stage
from triptych.stages.denoising import Denoising, Forward
from triptych.stages.noise_levels import begin_at_first, resolution_shift
from triptych.state import View

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

DEFAULT_SIZE = 1024
"""Pixels a side where a request gives no size. The oracle has it in its call, not as an attribute."""

PATCH = 2
"""Latents a side of what the transformer takes for one token: the oracle runs it at no other size."""


class TextEncoding(Stage):
    """Turn the prompt, and for guidance the negative prompt, into embeddings: lists of one (tokens, width) tensor.

    Padding is left out, so every prompt has its own length.
    """

    role = RoleType.ENCODER
    row_wise = {"text_encoder"}
    needs = {"text_encoder": Need.hidden(-2), "tokenizer": Need.FULL, "transformer": Need.CONFIG}
    writes = {"prompt_embeds", "negative_prompt_embeds"}
    reads = {"prompt", "negative_prompt", "guidance_scale", "max_sequence_length", *writes}

    def run(self, state: View) -> None:
        if state.prompt is None:
            return  # embeddings take the place of both prompts
        state.prompt_embeds = self.embed(state, "prompt", state.prompt, state.prompt_embeds)
        if state.guidance_scale > 0:
            negative, given = state.negative_prompt or "", state.negative_prompt_embeds
            state.negative_prompt_embeds = self.embed(state, "negative_prompt", negative, given)
        else:
            state.negative_prompt_embeds = []

    def embed(self, state: View, name: str, prompt: str, embeds: list[torch.Tensor] | None) -> list[torch.Tensor]:
        """Encode one text by itself, so that one which comes again can be remembered.

        Raises:
            ParameterError: it has more tokens than the transformer has positions.
        """
        encoded: list[torch.Tensor] = self.helpers.encode_prompt(
            prompt=prompt,
            do_classifier_free_guidance=False,
            prompt_embeds=embeds,
            device=self.device,
            max_sequence_length=state.max_sequence_length,
        )[0]
        check_length(name, prompt, encoded, self.transformer.config)
        return encoded


class ZImageDenoising(Denoising):
    """Denoise the latents, which stay float32 between steps.

    A step is one forward: all positive rows, then where guidance is on all negative ones. `cfg_truncation` switches
    guidance off for the rest of the way; `cfg_normalization` limits how far it may lengthen a prediction.
    """

    needs = {"transformer": Need.FULL, "scheduler": Need.FULL}
    reads = {
        "prompt_embeds", "negative_prompt_embeds", "generator", "latents", "height", "width", "num_images_per_prompt",
        "num_inference_steps", "sigmas", "guidance_scale", "cfg_normalization", "cfg_truncation", "exact",
    }  # fmt: skip
    writes = {"latents", "conditioning", "scheduler", "timesteps"}

    def begin(self, state: View) -> None:
        import torch
        from diffusers.pipelines.z_image.pipeline_z_image import (
            calculate_shift,
            get_default_z_image_sigmas,
            retrieve_timesteps,
        )

        outputs, steps = state.num_images_per_prompt, state.num_inference_steps
        text = {"cond": state.prompt_embeds}
        if state.guidance_scale > 0:
            text["uncond"] = state.negative_prompt_embeds
        state.conditioning = {
            branch: [each for each in embeds for _ in range(outputs)] for branch, embeds in text.items()
        }
        state.latents = self.helpers.prepare_latents(
            len(state.conditioning["cond"]),
            self.transformer.config.in_channels,
            state.height,
            state.width,
            torch.float32,
            self.device,
            state.generator,
            state.latents,
        )
        state.scheduler = self.new_scheduler()
        rows, columns = state.latents.shape[2] // PATCH, state.latents.shape[3] // PATCH
        mu = resolution_shift(calculate_shift, state.scheduler.config, rows * columns)
        sigmas = get_default_z_image_sigmas(steps) if state.sigmas is None else state.sigmas
        state.timesteps, _ = retrieve_timesteps(state.scheduler, steps, self.device, sigmas=sigmas, mu=mu)
        begin_at_first(state.scheduler)

    def scale(self, state: View, i: int) -> float:
        """Return the guidance scale of step i: 0 where there is none, and beyond the truncation."""
        scale: float = max(state.guidance_scale, 0.0)
        # As in the oracle, a truncation of 1 or more is none: no step lies beyond. To read a timestep is to wait for the device.
        if not scale or float(state.cfg_truncation) >= 1:
            return scale
        travelled = ((1000 - state.timesteps[i].float()) / 1000).item()
        return 0.0 if travelled > state.cfg_truncation else scale

    def model_inputs(self, state: View, i: int) -> list[Forward]:
        text = state.conditioning
        latents = state.latents.to(self.transformer_dtype)
        timestep = (1000 - state.timesteps[i].expand(latents.shape[0])) / 1000
        embeds = text["cond"]
        if self.scale(state, i) > 0:
            latents, timestep, embeds = latents.repeat(2, 1, 1, 1), timestep.repeat(2), embeds + text["uncond"]
        # The third dimension is time: a picture is one frame.
        return [Forward("transformer", "cond", {"x": latents.unsqueeze(2), "t": timestep, "cap_feats": embeds})]

    def call(self, forward: Forward) -> torch.Tensor:
        """Run the transformer, which takes and gives lists of latents, on one tensor with a row for each."""
        import torch

        inputs = {**forward.inputs, "x": list(forward.inputs["x"].unbind())}
        return torch.stack(list(super().call(replace(forward, inputs=inputs))))

    def advance(self, state: View, i: int, prediction: Sequence[torch.Tensor]) -> None:
        import torch

        scale, rows = self.scale(state, i), len(state.latents)
        noise = prediction[0].float()
        if scale > 0:
            positive, negative = noise[:rows], noise[rows:]
            noise = positive + scale * (positive - negative)
            if (limit := float(state.cfg_normalization)) > 0:
                noise = torch.stack([shorten(*each, limit) for each in zip(noise, positive)])
        noise = -noise.squeeze(2)
        state.latents = self.take_step(state, i, noise)


class Decoding(Stage):
    """Undo the latents' normalisation and decode them to images."""

    role = RoleType.DECODER
    row_wise = {"vae"}
    needs = {"vae": Need.DECODE}
    reads = {"latents", "output_type"}
    writes = {"images"}

    def run(self, state: View) -> None:
        if state.output_type == "latent":
            state.images = state.latents
            return
        config = self.vae.config
        latents = (state.latents.to(self.vae.dtype) / config.scaling_factor) + config.shift_factor
        image = self.vae.decode(latents, return_dict=False)[0]
        state.images = self.helpers.image_processor.postprocess(image, output_type=state.output_type)


class ZImage(Family):
    """Z-Image, Turbo (without guidance, scale 0) and base. The negative prompt is empty where none is given."""

    pipelines = ("ZImagePipeline",)
    tasks = {"text-to-image": "a picture from a prompt"}
    geometry = {"vae": Need.CONFIG}
    admission = {"transformer": Need.CONFIG}
    refused = {"joint_attention_kwargs"}

    def lone_forward(self) -> str | None:
        return "both guidance branches are rows of one forward, as in the oracle"

    def compose(self) -> None:
        self.add_stage(TextEncoding)
        self.add_stage(ZImageDenoising)
        self.add_stage(Decoding)

    def admit(self, parameters: dict[str, Any], helpers: Any) -> None:
        for name in ("height", "width"):
            parameters[name] = parameters[name] or DEFAULT_SIZE
        check_multiple(parameters, ("height", "width"), helpers.vae_scale_factor * PATCH)
        check_largest(parameters, helpers)
        check_text(parameters, helpers)
        check_latents(parameters, helpers)


def check_largest(parameters: Mapping[str, Any], helpers: Any) -> None:
    """Check that the transformer has a position for every part of the picture.

    Raises:
        ParameterError: the picture is too large.
    """
    _, rows, columns = helpers.transformer.config.axes_lens
    for name, tokens in (("height", rows), ("width", columns)):
        largest = tokens * PATCH * helpers.vae_scale_factor
        if parameters[name] > largest:
            reason = f"at most {largest} is accepted: the model knows no positions beyond"
            raise ParameterError(name, parameters[name], reason)


def check_length(name: str, value: object, embeds: Sequence[torch.Tensor], config: Any) -> None:
    """Check that the transformer has a position for every token of the texts of one parameter.

    Raises:
        ParameterError: one is too long.
    """
    from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF

    # Positions count from 0, which is that of padding; the picture has the one after the text, itself padded.
    longest = (config.axes_lens[0] - 2) // SEQ_MULTI_OF * SEQ_MULTI_OF
    for each in embeds:
        if len(each) > longest:
            reason = (
                f"at most {longest} tokens are accepted, the model knows no positions beyond; these are {len(each)}"
            )
            raise ParameterError(name, value, reason)


def check_text(parameters: Mapping[str, Any], helpers: Any) -> None:
    """Check that there is a prompt, or embeddings for every branch.

    Raises:
        UsageError: something is missing, or embeddings are no list of tensors, or too long.
    """
    prompt, embeds = parameters["prompt"], parameters["prompt_embeds"]
    negative, guided = parameters["negative_prompt_embeds"], parameters["guidance_scale"] > 0
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        given = [] if parameters[name] is None else parameters[name]
        if not isinstance(given, (list, tuple)) or any(each is None for each in given):
            raise ParameterError(name, given, "a list of tensors is accepted, one (tokens, width) a prompt")
        for position, each in enumerate(given):
            entry = f"{name}[{position}]"
            check_tensors({entry: each}, {entry: (None, None)})
            check_length(entry, f"of shape {tuple(each.shape)}", [each], helpers.transformer.config)
    if prompt is None and embeds is None:
        raise UsageError("give `prompt` or `prompt_embeds`")
    if prompt is None and guided and negative is None:
        raise UsageError("guidance with `prompt_embeds` needs `negative_prompt_embeds`: give them, or guidance_scale=0")
    count = len(embeds) if prompt is None else 1
    if not count:
        raise ParameterError("prompt_embeds", embeds, "give one or more tensors, or a prompt in their place")
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        if parameters[name] is not None and len(parameters[name]) != count:
            raise ParameterError(name, parameters[name], f"{count} are expected, one a prompt")
    if not guided and any(parameters[name] is not None for name in ("negative_prompt", "negative_prompt_embeds")):
        log.warning("the negative prompt has no effect: guidance needs guidance_scale > 0")


def check_latents(parameters: Mapping[str, Any], helpers: Any) -> None:
    """Let the pipeline compare given latents with the size of the picture.

    Raises:
        ParameterError: they do not fit it.
    """
    latents = parameters["latents"]
    if latents is None:
        return
    prompts = len(parameters["prompt_embeds"]) if parameters["prompt"] is None else 1
    rows, channels = prompts * parameters["num_images_per_prompt"], helpers.transformer.config.in_channels
    size = parameters["height"], parameters["width"]
    try:
        helpers.prepare_latents(rows, channels, *size, latents.dtype, latents.device, None, latents)
    except (ValueError, AttributeError) as error:
        raise ParameterError("latents", f"of shape {getattr(latents, 'shape', None)}", str(error)) from error


def shorten(noise: torch.Tensor, positive: torch.Tensor, limit: float) -> torch.Tensor:
    """Return one row's guided prediction, at most `limit` times as long as the unguided one."""
    import torch

    length, longest = torch.linalg.vector_norm(noise), torch.linalg.vector_norm(positive) * limit
    return noise * (longest / length) if length > longest else noise
