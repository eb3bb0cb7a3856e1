"""FLUX.1: text to image; guidance embedded where the transformer has a place for it, and true guidance beside it.

Oracle: `diffusers.FluxPipeline`, without IP adapters. Of one prompt it draws several pictures; of given embeddings only
as many as there are. Here given embeddings are repeated for `num_images_per_prompt` as those of a prompt are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from triptych.components.need import Need
from triptych.errors import ParameterError
from triptych.pipelines.base import Family, check_inputs, check_latents, check_multiple, check_tensors
from triptych.roles import RoleType
from triptych.stages.base import Stage
from triptych.stages.denoising import Denoising, Forward
from triptych.stages.guidance import true_guidance, warn_of_guidance
from triptych.stages.noise_levels import begin_at_first, even_sigmas, resolution_shift
from triptych.state import View

if TYPE_CHECKING:
    import torch


EMBEDDINGS = {
    "prompt_embeds": (None, None, None), "pooled_prompt_embeds": (None, None),
    "negative_prompt_embeds": (None, None, None), "negative_pooled_prompt_embeds": (None, None),
}  # fmt: skip
"""Dimensions of the embeddings that a request may give."""


class TextEncoding(Stage):
    """Turn the prompt, and for guidance the negative prompt, into token and pooled embeddings.

    CLIP gives the pooled one, (1, width); T5 those of the tokens, (1, tokens, width).
    """

    role = RoleType.ENCODER
    row_wise = {"text_encoder", "text_encoder_2"}
    needs = {
        "text_encoder": Need.FULL, "tokenizer": Need.FULL, "text_encoder_2": Need.FULL, "tokenizer_2": Need.FULL,
    }  # fmt: skip
    writes = {
        "prompt_embeds", "pooled_prompt_embeds", "text_ids",
        "negative_prompt_embeds", "negative_pooled_prompt_embeds", "negative_text_ids",
    }  # fmt: skip
    reads = {
        "prompt", "prompt_2", "negative_prompt", "negative_prompt_2", "true_cfg_scale", "max_sequence_length",
        "prompt_embeds", "pooled_prompt_embeds", "negative_prompt_embeds", "negative_pooled_prompt_embeds",
    }  # fmt: skip

    def run(self, state: View) -> None:
        given = state.prompt_embeds, state.pooled_prompt_embeds
        texts = self.embed(state, state.prompt, state.prompt_2, *given)
        state.prompt_embeds, state.pooled_prompt_embeds, state.text_ids = texts
        given = state.negative_prompt_embeds, state.negative_pooled_prompt_embeds
        negative = state.negative_prompt, state.negative_prompt_2
        guided = true_guidance(state.true_cfg_scale, negative[0], given[0])
        texts = self.embed(state, *negative, *given) if guided else (None, None, None)
        state.negative_prompt_embeds, state.negative_pooled_prompt_embeds, state.negative_text_ids = texts

    def embed(
        self,
        state: View,
        prompt: str | None,
        prompt_2: str | None,
        embeds: torch.Tensor | None,
        pooled: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, ...]:
        encoded: tuple[torch.Tensor, ...] = self.helpers.encode_prompt(
            prompt=prompt,
            prompt_2=prompt_2,
            prompt_embeds=embeds,
            pooled_prompt_embeds=pooled,
            device=self.device,
            max_sequence_length=state.max_sequence_length,
        )
        return encoded


class FluxDenoising(Denoising):
    """Denoise the packed latents, of shape (rows, tokens, channels)."""

    needs = {"transformer": Need.FULL, "scheduler": Need.FULL}
    reads = {
        "prompt_embeds", "pooled_prompt_embeds", "text_ids", "negative_prompt_embeds", "negative_pooled_prompt_embeds",
        "negative_text_ids", "generator", "latents", "height", "width", "num_images_per_prompt", "num_inference_steps",
        "sigmas", "true_cfg_scale", "guidance_scale", "exact",
    }  # fmt: skip
    writes = {"latents", "conditioning", "scheduler", "timesteps"}
    shared = frozenset(("txt_ids", "img_ids"))

    def begin(self, state: View) -> None:
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps

        outputs, steps = state.num_images_per_prompt, state.num_inference_steps
        text = {"cond": (state.prompt_embeds, state.pooled_prompt_embeds, state.text_ids)}
        if state.negative_prompt_embeds is not None:
            negative = state.negative_prompt_embeds, state.negative_pooled_prompt_embeds, state.negative_text_ids
            text["uncond"] = negative
        rows = len(state.prompt_embeds) * outputs
        state.latents, positions = self.noise(state, rows)
        state.conditioning = {
            "text": {
                branch: {
                    "encoder_hidden_states": embeds.repeat_interleave(outputs, dim=0),
                    "pooled_projections": pooled.repeat_interleave(outputs, dim=0),
                    "txt_ids": ids,
                }
                for branch, (embeds, pooled, ids) in text.items()
            },
            "common": {"guidance": self.guidance(state.guidance_scale, rows), "img_ids": positions},
        }
        state.scheduler = self.new_scheduler()
        mu = resolution_shift(calculate_shift, state.scheduler.config, state.latents.shape[1])
        sigmas = self.sigmas(state, steps)
        state.timesteps, _ = retrieve_timesteps(state.scheduler, steps, self.device, sigmas=sigmas, mu=mu)
        begin_at_first(state.scheduler)

    def noise(self, state: View, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw the packed latents, or take those that are given; returns them and the positions of all tokens."""
        channels = self.transformer.config.in_channels // 4
        size, dtype = (state.height, state.width), state.prompt_embeds.dtype
        drawn: tuple[torch.Tensor, torch.Tensor] = self.helpers.prepare_latents(
            rows, channels, *size, dtype, self.device, state.generator, state.latents
        )
        return drawn

    def sigmas(self, state: View, steps: int) -> Any:
        """Return the noise levels that the scheduler is given; None where it has its own."""
        if state.scheduler.config.get("use_flow_sigmas"):
            return None
        return even_sigmas(steps) if state.sigmas is None else state.sigmas

    def guidance(self, scale: float, rows: int) -> torch.Tensor | None:
        """Return the scale as an input of a guidance-distilled transformer (dev); None for any other (schnell)."""
        import torch

        if not self.transformer.config.guidance_embeds:
            return None
        return torch.full([1], scale, device=self.device, dtype=torch.float32).expand(rows)

    def model_inputs(self, state: View, i: int) -> list[Forward]:
        latents = state.latents
        timestep = state.timesteps[i].expand(latents.shape[0]).to(latents.dtype)
        common = {"hidden_states": self.tokens(state), "timestep": timestep / 1000, **state.conditioning["common"]}
        text = state.conditioning["text"]
        return [Forward("transformer", branch, {**common, **inputs}) for branch, inputs in text.items()]

    def tokens(self, state: View) -> torch.Tensor:
        """Return the tokens that the transformer is given."""
        latents: torch.Tensor = state.latents
        return latents

    def advance(self, state: View, i: int, prediction: Sequence[torch.Tensor]) -> None:
        # Of what the transformer predicts, the tokens of a picture that was given are nobody's.
        noise, *rest = (each[:, : state.latents.shape[1]] for each in prediction)
        for unconditional in rest:
            noise = unconditional + state.true_cfg_scale * (noise - unconditional)
        state.latents = self.take_step(state, i, noise)


class Decoding(Stage):
    """Undo the latents' packing and normalisation and decode them to images."""

    role = RoleType.DECODER
    row_wise = {"vae"}
    needs = {"vae": Need.DECODE}
    reads = {"latents", "height", "width", "output_type"}
    writes = {"images"}

    def run(self, state: View) -> None:
        if state.output_type == "latent":
            state.images = state.latents
            return
        factor, config = self.helpers.vae_scale_factor, self.vae.config
        latents = self.helpers._unpack_latents(state.latents, state.height, state.width, factor)
        latents = (latents / config.scaling_factor) + config.shift_factor
        image = self.vae.decode(latents, return_dict=False)[0]
        state.images = self.helpers.image_processor.postprocess(image, output_type=state.output_type)


class Flux(Family):
    """FLUX.1. True guidance is on where a negative prompt is given, even an empty one, and `true_cfg_scale` > 1."""

    pipelines = ("FluxPipeline",)
    tasks = {"text-to-image": "a picture from a prompt"}
    # The pipeline's constructor asks the tokenizer for its longest text, in every role.
    geometry = {"vae": Need.CONFIG, "tokenizer": Need.CONFIG}
    refused = {
        "joint_attention_kwargs", "ip_adapter_image", "ip_adapter_image_embeds", "negative_ip_adapter_image",
        "negative_ip_adapter_image_embeds",
    }  # fmt: skip

    def compose(self) -> None:
        self.add_stage(TextEncoding)
        self.add_stage(FluxDenoising)
        self.add_stage(Decoding)

    def admit(self, parameters: dict[str, Any], helpers: Any) -> None:
        for name in ("height", "width"):
            parameters[name] = parameters[name] or helpers.default_sample_size * helpers.vae_scale_factor
        check_multiple(parameters, ("height", "width"), helpers.vae_scale_factor * 2)
        check_text(parameters, helpers)


def check_text(parameters: Mapping[str, Any], helpers: Any) -> None:
    """Check the prompts, the embeddings and latents that are given, and what guidance needs; the size is settled.

    Raises:
        UsageError: something is missing, given twice or of another shape.
    """
    check_tensors(parameters, EMBEDDINGS)
    check_inputs(helpers, parameters)
    patch = helpers.vae_scale_factor * 2
    tokens = (parameters["height"] // patch) * (parameters["width"] // patch)
    check_latents(parameters, (tokens, helpers.vae.config.latent_channels * 4))
    embeds, negative_embeds = parameters["prompt_embeds"], parameters["negative_prompt_embeds"]
    guided = true_guidance(parameters["true_cfg_scale"], parameters["negative_prompt"], negative_embeds)
    if guided and embeds is not None and negative_embeds is not None and embeds.shape != negative_embeds.shape:
        shapes = f"{tuple(negative_embeds.shape)} is not {tuple(embeds.shape)}"
        raise ParameterError("negative_prompt_embeds", shapes, "the shape of `prompt_embeds` is accepted")
    warn_of_guidance(parameters)
