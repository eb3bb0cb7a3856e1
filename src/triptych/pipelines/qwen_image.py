"""Qwen-Image: text to image, with true classifier-free guidance where a negative prompt is given.

Oracle: `diffusers.QwenImagePipeline`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
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

# The editing families take `warn_of_guidance` from here.
__all__ = ["Decoding", "QwenDenoising", "QwenImage", "TextEncoding", "warn_of_guidance"]

log = logging.getLogger(__name__)


class TextEncoding(Stage):
    """Turn the prompt, and for guidance the negative prompt, into embeddings and their masks."""

    role = RoleType.ENCODER
    row_wise = {"text_encoder"}
    needs = {"text_encoder": Need.hidden(-1), "tokenizer": Need.FULL}
    writes = {"prompt_embeds", "prompt_embeds_mask", "negative_prompt_embeds", "negative_prompt_embeds_mask"}
    reads = {"prompt", "negative_prompt", "true_cfg_scale", "max_sequence_length", *writes}

    def run(self, state: View) -> None:
        negative = state.negative_prompt, state.negative_prompt_embeds, state.negative_prompt_embeds_mask
        positive = state.prompt, state.prompt_embeds, state.prompt_embeds_mask
        state.prompt_embeds, state.prompt_embeds_mask = self.embed(state, *positive)
        guided = true_guidance(state.true_cfg_scale, *negative[:2])
        embedded = self.embed(state, *negative) if guided else (None, None)
        state.negative_prompt_embeds, state.negative_prompt_embeds_mask = embedded

    def embed(
        self, state: View, prompt: str | None, embeds: torch.Tensor | None, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        encoded: tuple[torch.Tensor, torch.Tensor | None] = self.helpers.encode_prompt(
            prompt=prompt,
            prompt_embeds=embeds,
            prompt_embeds_mask=mask,
            device=self.device,
            max_sequence_length=state.max_sequence_length,
        )
        return encoded


class QwenDenoising(Denoising):
    """Denoise the packed latents; guidance keeps the norm of the conditional prediction."""

    needs = {"transformer": Need.FULL, "scheduler": Need.FULL}
    reads = {
        "prompt_embeds", "prompt_embeds_mask", "negative_prompt_embeds", "negative_prompt_embeds_mask", "generator",
        "latents", "height", "width", "num_images_per_prompt", "num_inference_steps", "sigmas", "true_cfg_scale",
        "guidance_scale", "exact",
    }  # fmt: skip
    writes = {"latents", "conditioning", "scheduler", "timesteps"}
    ragged = frozenset(("encoder_hidden_states", "encoder_hidden_states_mask"))
    layered = False  # whether each of the pictures has a position of its own before the text's

    def begin(self, state: View) -> None:
        from diffusers.pipelines.qwenimage.pipeline_qwenimage import retrieve_timesteps

        text = {"cond": self.repeat(state, state.prompt_embeds, state.prompt_embeds_mask)}
        if state.negative_prompt_embeds is not None:
            text["uncond"] = self.repeat(state, state.negative_prompt_embeds, state.negative_prompt_embeds_mask)
        embeds = text["cond"]["encoder_hidden_states"]
        state.latents = self.noise(state, len(embeds), embeds.dtype)
        state.conditioning = {"text": text, "common": self.common(state, len(embeds))}
        self.check_positions(text, state.conditioning["common"]["img_shapes"][0])
        steps = state.num_inference_steps
        state.scheduler = self.new_scheduler()
        sigmas = self.sigmas(steps) if state.sigmas is None else state.sigmas
        mu = self.shift(state)
        state.timesteps, _ = retrieve_timesteps(state.scheduler, steps, self.device, sigmas=sigmas, mu=mu)
        begin_at_first(state.scheduler)

    def noise(self, state: View, rows: int, dtype: torch.dtype) -> torch.Tensor:
        """Draw the packed latents, or bring those that are given to the stage's dtype and device."""
        channels = self.transformer.config.in_channels // 4
        latents: torch.Tensor = self.helpers.prepare_latents(
            rows, channels, state.height, state.width, dtype, self.device, state.generator, state.latents
        )
        return latents

    def common(self, state: View, rows: int) -> dict[str, Any]:
        """Return the inputs that all steps and branches share."""
        return {"guidance": self.guidance(state.guidance_scale, rows), "img_shapes": [self.shapes(state)] * rows}

    def shapes(self, state: View) -> list[tuple[int, int, int]]:
        """Return frames, rows and columns of each picture among one row's tokens."""
        patch = self.helpers.vae_scale_factor * 2
        return [(1, state.height // patch, state.width // patch)]

    def check_positions(self, text: Mapping[str, Mapping[str, Any]], shapes: Sequence[Sequence[int]]) -> None:
        """Check that the transformer has a position for every token of the texts; they come after those of the pictures.

        Raises:
            ParameterError: a text is too long.
        """
        embedding = self.transformer.pos_embed
        side = max(max(shape[1:]) for shape in shapes)
        before = side // 2 if embedding.scale_rope else side
        longest = len(embedding.pos_freqs) - (max(before, len(shapes) - 1) if self.layered else before)
        for name, branch in (("prompt", "cond"), ("negative_prompt", "uncond")):
            tokens = text[branch]["encoder_hidden_states"].shape[1] if branch in text else 0
            if tokens > longest:
                accepted = f"at most {longest} tokens are accepted beside these pictures, and these are {tokens}"
                raise ParameterError(name, f"<{tokens} tokens>", accepted)

    def sigmas(self, steps: int) -> Any:
        """Return the noise levels that the oracle starts from."""
        return even_sigmas(steps)

    def shift(self, state: View) -> float:
        """Return how far the scheduler shifts the noise levels."""
        from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift

        return resolution_shift(calculate_shift, state.scheduler.config, state.latents.shape[1])

    def repeat(self, state: View, embeds: torch.Tensor, mask: torch.Tensor | None) -> dict[str, Any]:
        """Repeat one prompt's embeddings and mask for each output."""
        embeds, mask = self.helpers.encode_prompt(
            prompt=None,
            prompt_embeds=embeds,
            prompt_embeds_mask=mask,
            num_images_per_prompt=state.num_images_per_prompt,
            device=self.device,
        )
        return {"encoder_hidden_states": embeds, "encoder_hidden_states_mask": mask}

    def guidance(self, scale: float | None, rows: int) -> torch.Tensor | None:
        """Return the scale as the input of a guidance-distilled transformer; None for any other.

        Raises:
            ParameterError: the transformer needs one and none is given.
        """
        import torch

        if self.transformer.config.guidance_embeds:
            if scale is None:
                raise ParameterError("guidance_scale", scale, "this model is guidance-distilled and needs a number")
            return torch.full([1], scale, device=self.device, dtype=torch.float32).expand(rows)
        if scale is not None:
            log.warning("guidance_scale=%s is ignored: the model is not guidance-distilled", scale)
        return None

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

    def align(self, inputs: Sequence[Forward]) -> Sequence[Forward]:
        """Pad the text to the longest, and mask the padding where there is any."""
        from torch.nn.functional import pad

        texts = [each.inputs["encoder_hidden_states"] for each in inputs]
        masks = [each.inputs["encoder_hidden_states_mask"] for each in inputs]
        longest = max(text.shape[1] for text in texts)
        if all(mask is None and text.shape[1] == longest for text, mask in zip(texts, masks)):
            return inputs
        aligned = []
        for each, text, mask in zip(inputs, texts, masks):
            missing = longest - text.shape[1]
            valid = text.new_ones(text.shape[:2], dtype=bool) if mask is None else mask.bool()
            padded = {
                "encoder_hidden_states": pad(text, (0, 0, 0, missing)),
                "encoder_hidden_states_mask": pad(valid, (0, missing)),
            }
            aligned.append(replace(each, inputs={**each.inputs, **padded}))
        return aligned

    def advance(self, state: View, i: int, prediction: Sequence[torch.Tensor]) -> None:
        # Of what the transformer predicts, the tokens of the pictures that were given are nobody's.
        noise, *rest = (each[:, : state.latents.shape[1]] for each in prediction)
        for unconditional in rest:
            noise = self.guide(state, noise, unconditional + state.true_cfg_scale * (noise - unconditional))
        state.latents = self.take_step(state, i, noise)

    def guide(self, state: View, conditional: torch.Tensor, combined: torch.Tensor) -> torch.Tensor:
        """Give the guided prediction the norm of the conditional one, token by token."""
        import torch

        norm, guided_norm = (torch.norm(each, dim=-1, keepdim=True) for each in (conditional, combined))
        normed: torch.Tensor = combined * (norm / guided_norm)
        return normed


class Decoding(Stage):
    """Undo the latents' packing and normalisation and decode them to images."""

    role = RoleType.DECODER
    row_wise = {"vae"}
    # An image is a video of one frame, and resampling in time begins with the second.
    needs = {"vae": Need.without("encoder", "quant_conv", "*.time_conv")}
    reads = {"latents", "height", "width", "output_type"}
    writes = {"images"}

    def run(self, state: View) -> None:
        if state.output_type == "latent":
            state.images = state.latents
            return
        factor = self.helpers.vae_scale_factor
        latents = self.helpers._unpack_latents(state.latents, state.height, state.width, factor)
        image = self.vae.decode(self.denormalise(latents), return_dict=False)[0][:, :, 0]
        state.images = self.helpers.image_processor.postprocess(image, output_type=state.output_type)

    def denormalise(self, latents: torch.Tensor) -> torch.Tensor:
        """Bring latents of shape (rows, channels, frames, height, width) to the autoencoder's scale and dtype."""
        import torch

        config, latents = self.vae.config, latents.to(self.vae.dtype)
        mean, std = (
            torch.tensor(each).view(1, config.z_dim, 1, 1, 1).to(latents.device, latents.dtype)
            for each in (config.latents_mean, config.latents_std)
        )
        return latents / (1.0 / std) + mean


class QwenImage(Family):
    """Qwen-Image. Guidance is on where a negative prompt is given, even an empty one, and `true_cfg_scale` > 1."""

    pipelines = ("QwenImagePipeline",)
    tasks = {"text-to-image": "a picture from a prompt"}
    geometry = {"vae": Need.CONFIG}
    refused = {"attention_kwargs"}

    def compose(self) -> None:
        self.add_stage(TextEncoding)
        self.add_stage(QwenDenoising)
        self.add_stage(Decoding)

    def admit(self, parameters: dict[str, Any], helpers: Any) -> None:
        for name in ("height", "width"):
            parameters[name] = parameters[name] or helpers.default_sample_size * helpers.vae_scale_factor
        check_multiple(parameters, ("height", "width"), helpers.vae_scale_factor * 2)
        check_given(parameters, helpers, parameters["height"], parameters["width"])
        warn_of_guidance(parameters)


def check_given(parameters: Mapping[str, Any], helpers: Any, height: int, width: int, pictures: int = 1) -> None:
    """Check prompts, embeddings and latents.

    Args:
        height: pixels of each picture.
        width: pixels of each picture.
        pictures: how many there are in one row of latents.

    Raises:
        UsageError: something is missing, given twice, or of another kind or shape.
    """
    check_tensors(parameters, dict.fromkeys(("prompt_embeds", "negative_prompt_embeds"), (None, None, None)))
    check_inputs(helpers, {**parameters, "height": height, "width": width})
    patch = helpers.vae_scale_factor * 2
    tokens = (height // patch) * (width // patch) * pictures
    check_latents(parameters, (tokens, helpers.vae.config.z_dim * 4))
