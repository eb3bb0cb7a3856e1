"""FLUX.2-klein: text to image and editing with reference images; distilled, and base with guidance.

Oracle: `diffusers.Flux2KleinPipeline`.
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
from triptych.stages.noise_levels import begin_at_first, even_sigmas
from triptych.state import View

if TYPE_CHECKING:
    import torch

PIXELS_OF_A_REFERENCE = 1024 * 1024
"""The oracle shrinks larger reference images to this area."""


class TextEncoding(Stage):
    """Turn the prompt, and for guidance the empty prompt, into embeddings."""

    role = RoleType.ENCODER
    row_wise = {"text_encoder"}
    needs = {"text_encoder": Need.hidden(9, 18, 27), "tokenizer": Need.FULL}
    reads = {"prompt", "prompt_embeds", "negative_prompt_embeds", "guidance_scale", "max_sequence_length"}
    writes = {"prompt_embeds", "negative_prompt_embeds"}

    def run(self, state: View) -> None:
        state.prompt_embeds = self.embed(state, state.prompt, state.prompt_embeds)
        if guided(state, self.helpers):
            state.negative_prompt_embeds = self.embed(state, "", state.negative_prompt_embeds)
        else:
            state.negative_prompt_embeds = None

    def embed(self, state: View, prompt: str | None, embeds: torch.Tensor | None) -> torch.Tensor:
        encoded: torch.Tensor = self.helpers.encode_prompt(
            prompt=prompt, prompt_embeds=embeds, device=self.device, max_sequence_length=state.max_sequence_length
        )[0]
        return encoded


class ImageEncoding(Stage):
    """Turn the reference images into packed latents with their positions."""

    role = RoleType.ENCODER
    tasks = {"edit"}
    needs = {"vae": Need.ENCODE}
    reads = {"image"}
    writes = {"image_latents", "image_latent_ids"}

    def run(self, state: View) -> None:
        images = []
        for image in state.image:
            image, width, height = fit(self.helpers, image)
            preprocess = self.helpers.image_processor.preprocess
            images.append(preprocess(image, height=height, width=width, resize_mode="crop"))
        state.image_latents, state.image_latent_ids = self.helpers.prepare_image_latents(
            images=images, batch_size=1, generator=None, device=self.device, dtype=self.vae.dtype
        )


class Flux2Denoising(Denoising):
    """Denoise the packed latents, reference tokens appended."""

    needs = {"transformer": Need.FULL, "scheduler": Need.FULL}
    reads = {
        "prompt_embeds", "negative_prompt_embeds", "image_latents", "image_latent_ids", "generator", "latents", "height",
        "width", "num_images_per_prompt", "num_inference_steps", "sigmas", "guidance_scale", "exact",
    }  # fmt: skip
    writes = {"latents", "conditioning", "scheduler", "timesteps"}
    shared = frozenset(("txt_ids", "img_ids"))

    def begin(self, state: View) -> None:
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu, retrieve_timesteps

        outputs = state.num_images_per_prompt
        branches = {"cond": state.prompt_embeds}
        if guided(state, self.helpers):
            branches["uncond"] = state.negative_prompt_embeds
        text = {branch: self.repeat(embeds, outputs) for branch, embeds in branches.items()}
        latents, latent_ids = self.helpers.prepare_latents(
            batch_size=len(text["cond"][0]),
            num_latents_channels=self.transformer.config.in_channels // 4,
            height=state.height,
            width=state.width,
            dtype=text["cond"][0].dtype,
            device=self.device,
            generator=state.generator,
            latents=state.latents,
        )
        state.latents = latents
        state.conditioning = {"text": text, "latent_ids": latent_ids, "img_ids": positions(state, latent_ids)}
        steps = state.num_inference_steps
        state.scheduler = self.new_scheduler()
        sigmas = even_sigmas(steps) if state.sigmas is None else state.sigmas
        if state.scheduler.config.get("use_flow_sigmas"):
            sigmas = None
        mu = compute_empirical_mu(image_seq_len=latents.shape[1], num_steps=steps)
        state.timesteps, _ = retrieve_timesteps(state.scheduler, steps, self.device, sigmas=sigmas, mu=mu)
        begin_at_first(state.scheduler)

    def repeat(self, embeds: torch.Tensor, outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Repeat one prompt's embeddings for each output; returns them and their positions."""
        repeated: tuple[torch.Tensor, torch.Tensor] = self.helpers.encode_prompt(
            prompt=None, prompt_embeds=embeds, num_images_per_prompt=outputs, device=self.device
        )
        return repeated

    def model_inputs(self, state: View, i: int) -> list[Forward]:
        import torch

        latents, ids = state.latents, state.conditioning["img_ids"]
        timestep = state.timesteps[i].expand(latents.shape[0]).to(latents.dtype)
        hidden = latents.to(self.transformer_dtype)
        if state.image_latents is not None:
            rows = latents.shape[0]
            hidden = torch.cat([latents, state.image_latents.repeat(rows, 1, 1)], dim=1).to(self.transformer_dtype)
        common = {"hidden_states": hidden, "timestep": timestep / 1000, "guidance": None, "img_ids": ids}
        return [
            Forward("transformer", branch, {**common, "encoder_hidden_states": embeds, "txt_ids": text_ids})
            for branch, (embeds, text_ids) in state.conditioning["text"].items()
        ]

    def advance(self, state: View, i: int, prediction: Sequence[torch.Tensor]) -> None:
        noise, *rest = (each[:, : state.latents.shape[1]] for each in prediction)
        for unconditional in rest:
            noise = unconditional + state.guidance_scale * (noise - unconditional)
        state.latents = self.take_step(state, i, noise)

    def finish(self, state: View) -> None:
        patch = self.helpers.vae_scale_factor * 2
        ids = state.conditioning["latent_ids"]
        rows, columns = state.height // patch, state.width // patch
        state.latents = self.helpers._unpack_latents_with_ids(state.latents, ids, rows, columns)


class Decoding(Stage):
    """Undo the latents' normalisation and decode them to images."""

    role = RoleType.DECODER
    row_wise = {"vae"}
    needs = {"vae": Need.DECODE}
    reads = {"latents", "output_type"}
    writes = {"images"}

    def run(self, state: View) -> None:
        import torch

        latents, bn = state.latents, self.vae.bn
        mean = bn.running_mean.view(1, -1, 1, 1).to(latents.device, latents.dtype)
        std = torch.sqrt(bn.running_var.view(1, -1, 1, 1) + self.vae.config.batch_norm_eps)
        latents = latents * std.to(latents.device, latents.dtype) + mean
        latents = self.helpers._unpatchify_latents(latents)
        if state.output_type == "latent":
            state.images = latents
        else:
            image = self.vae.decode(latents, return_dict=False)[0]
            state.images = self.helpers.image_processor.postprocess(image, output_type=state.output_type)


class Flux2Klein(Family):
    """FLUX.2-klein. A distilled model takes no guidance."""

    pipelines = ("Flux2KleinPipeline",)
    tasks = {"text-to-image": "a picture from a prompt", "edit": "a picture from a prompt and reference images"}
    geometry = {"vae": Need.CONFIG}
    # Other hidden states would need other layers than those that are loaded.
    refused = {"attention_kwargs", "text_encoder_out_layers"}

    def compose(self) -> None:
        self.add_stage(TextEncoding)
        self.add_stage(ImageEncoding)
        self.add_stage(Flux2Denoising)
        self.add_stage(Decoding)

    def lone_forward(self) -> str | None:
        return "the model is distilled and takes no guidance" if self.repository.options.get("is_distilled") else None

    def task_of(self, parameters: Mapping[str, Any]) -> str:
        return "edit" if parameters["image"] is not None else "text-to-image"

    def admit(self, parameters: dict[str, Any], helpers: Any) -> None:
        check_tensors(parameters, dict.fromkeys(("prompt_embeds", "negative_prompt_embeds"), (None, None, None)))
        check_inputs(helpers, parameters)
        if parameters["image"] is not None:
            images = parameters["image"] if isinstance(parameters["image"], (list, tuple)) else [parameters["image"]]
            if not images:
                raise ParameterError("image", parameters["image"], "give one or more reference images, or leave it out")
            fitted = [fit(helpers, image) for image in images]
            # Not every mode travels. The oracle shrinks first, which in a palette is to leave pixels out.
            parameters["image"] = [
                image if image.mode == "RGB" else shrunk.convert("RGB") for image, (shrunk, _, _) in zip(images, fitted)
            ]
            _, width, height = fitted[0]
            parameters["width"] = parameters["width"] or width
            parameters["height"] = parameters["height"] or height
        for name in ("height", "width"):
            parameters[name] = parameters[name] or helpers.default_sample_size * helpers.vae_scale_factor
        patch = helpers.vae_scale_factor * 2
        check_multiple(parameters, ("height", "width"), patch)
        rows, columns = parameters["height"] // patch, parameters["width"] // patch
        check_latents(parameters, (helpers.vae.config.latent_channels * 4, rows, columns))


def positions(state: View, latent_ids: torch.Tensor) -> torch.Tensor:
    """Return the positions of the latents' tokens, and of the reference images' after them."""
    import torch

    if state.image_latents is None:
        return latent_ids
    return torch.cat([latent_ids, state.image_latent_ids.repeat(len(latent_ids), 1, 1)], dim=1)


def guided(state: View, helpers: Any) -> bool:
    """Return whether classifier-free guidance is on: asked for, and the model not distilled."""
    return state.guidance_scale > 1 and not helpers.config.is_distilled


def fit(helpers: Any, image: Any) -> tuple[Any, int, int]:
    """Shrink a reference image to the area the oracle allows; returns it with the width and height to encode it at.

    Raises:
        ParameterError: it is no image, or too small or too narrow for the model.
    """
    processor = helpers.image_processor
    try:
        processor.check_image_input(image)
    except (ValueError, TypeError) as error:
        raise ParameterError("image", image, str(error)) from error
    if image.width * image.height > PIXELS_OF_A_REFERENCE:
        image = processor._resize_to_target_area(image, PIXELS_OF_A_REFERENCE)
    multiple = helpers.vae_scale_factor * 2
    return image, image.width // multiple * multiple, image.height // multiple * multiple
