"""FLUX.2: text to image and editing with reference images, with guidance as an input of the transformer.

Oracle: `diffusers.Flux2Pipeline`. What it shares with FLUX.2-klein is taken from there: reference images, their
positions, the sizes of pictures, and the latents' normalisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from triptych.components.need import Need
from triptych.pipelines import flux2_klein
from triptych.pipelines.flux2_klein import ImageEncoding
from triptych.roles import RoleType
from triptych.stages.base import Stage
from triptych.stages.denoising import Denoising, Forward
from triptych.stages.noise_levels import begin_at_first, even_sigmas
from triptych.state import View

if TYPE_CHECKING:
    import torch


class TextEncoding(Stage):
    """Turn the prompt, under the pipeline's own system message, into embeddings of shape (1, tokens, 3 x width)."""

    role = RoleType.ENCODER
    row_wise = {"text_encoder"}
    # Three entries of 41; the model is a vision-language one, and the reference images do not pass through it.
    needs = {"text_encoder": Need.hidden(10, 20, 30), "tokenizer": Need.FULL}
    reads = {"prompt", "prompt_embeds", "max_sequence_length"}
    writes = {"prompt_embeds"}

    def run(self, state: View) -> None:
        state.prompt_embeds, _ = self.helpers.encode_prompt(
            prompt=state.prompt,
            prompt_embeds=state.prompt_embeds,
            device=self.device,
            max_sequence_length=state.max_sequence_length,
        )


class Flux2Denoising(Denoising):
    """Denoise the packed latents, reference tokens appended; the guidance scale is embedded like a timestep."""

    needs = {"transformer": Need.FULL, "scheduler": Need.FULL}
    reads = {
        "prompt_embeds", "image_latents", "image_latent_ids", "generator", "latents", "height", "width",
        "num_images_per_prompt", "num_inference_steps", "sigmas", "guidance_scale", "output_type", "exact",
    }  # fmt: skip
    writes = {"latents", "conditioning", "scheduler", "timesteps"}
    shared = frozenset(("txt_ids", "img_ids"))

    def begin(self, state: View) -> None:
        import torch
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu, retrieve_timesteps

        embeds, text_ids = self.helpers.encode_prompt(
            prompt=None,
            prompt_embeds=state.prompt_embeds,
            num_images_per_prompt=state.num_images_per_prompt,
            device=self.device,
        )
        rows = len(embeds)
        latents, latent_ids = self.helpers.prepare_latents(
            batch_size=rows,
            num_latents_channels=self.transformer.config.in_channels // 4,
            height=state.height,
            width=state.width,
            dtype=embeds.dtype,
            device=self.device,
            generator=state.generator,
            latents=state.latents,
        )
        state.latents = latents
        guidance = torch.full([1], state.guidance_scale, device=self.device, dtype=torch.float32).expand(rows)
        inputs = {
            "img_ids": flux2_klein.positions(state, latent_ids),
            "encoder_hidden_states": embeds,
            "txt_ids": text_ids,
            "guidance": guidance,
        }
        state.conditioning = {"inputs": inputs, "latent_ids": latent_ids}
        steps = state.num_inference_steps
        state.scheduler = self.new_scheduler()
        sigmas = even_sigmas(steps) if state.sigmas is None else state.sigmas
        if state.scheduler.config.get("use_flow_sigmas"):
            sigmas = None
        mu = compute_empirical_mu(image_seq_len=latents.shape[1], num_steps=steps)
        state.timesteps, _ = retrieve_timesteps(state.scheduler, steps, self.device, sigmas=sigmas, mu=mu)
        begin_at_first(state.scheduler)

    def model_inputs(self, state: View, i: int) -> list[Forward]:
        import torch

        latents = state.latents
        rows = latents.shape[0]
        timestep = state.timesteps[i].expand(rows).to(latents.dtype)
        hidden = latents
        if state.image_latents is not None:
            hidden = torch.cat([latents, state.image_latents.repeat(rows, 1, 1)], dim=1)
        inputs = {
            "hidden_states": hidden.to(self.transformer_dtype),
            "timestep": timestep / 1000,
            **state.conditioning["inputs"],
        }
        return [Forward("transformer", "cond", inputs)]

    def advance(self, state: View, i: int, prediction: Sequence[torch.Tensor]) -> None:
        noise = prediction[0][:, : state.latents.shape[1]]
        state.latents = self.take_step(state, i, noise)

    def finish(self, state: View) -> None:
        # Latents that are the result stay packed, as the oracle gives them out.
        if state.output_type != "latent":
            state.latents = self.helpers._unpack_latents_with_ids(state.latents, state.conditioning["latent_ids"])


class Decoding(flux2_klein.Decoding):
    """Undo the latents' normalisation and decode them to images; latents that were asked for are handed out packed."""

    def run(self, state: View) -> None:
        if state.output_type == "latent":
            state.images = state.latents
        else:
            super().run(state)


class Flux2(flux2_klein.Flux2Klein):
    """FLUX.2. Guidance is distilled: one forward a step whatever its scale, and no negative prompt."""

    pipelines = ("Flux2Pipeline",)
    # Other hidden states would need other layers than those that are loaded, and rewriting the prompt all of them, the
    # vision tower and the head.
    refused = {"attention_kwargs", "text_encoder_out_layers", "caption_upsample_temperature"}

    def lone_forward(self) -> str | None:
        return "guidance is distilled into the model"

    def compose(self) -> None:
        self.add_stage(TextEncoding)
        self.add_stage(ImageEncoding)
        self.add_stage(Flux2Denoising)
        self.add_stage(Decoding)
