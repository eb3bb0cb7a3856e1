"""Stable Diffusion 3 and 3.5: text to image by three text encoders, with classifier-free and skip-layer guidance.

Oracle: `diffusers.StableDiffusion3Pipeline`, without IP adapters. It draws several pictures of one prompt; of given
embeddings only as many as there are. Here given embeddings are repeated for `num_images_per_prompt` as those of a
prompt are. The third text encoder, T5, may be left out of a checkpoint: zeros take the place of its embeddings.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from triptych.components.need import Need
from triptych.errors import ParameterError
from triptych.pipelines.base import Family, check_inputs, check_latents, check_multiple, check_tensors
from triptych.pipelines.flux import EMBEDDINGS
from triptych.roles import RoleType
from triptych.stages.base import Stage
from triptych.stages.denoising import Denoising, Forward
from triptych.stages.noise_levels import begin_at_first, resolution_shift
from triptych.state import View

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)


class TextEncoding(Stage):
    """Turn the prompt, and for guidance the negative prompt, into token and pooled embeddings.

    The tokens of both CLIPs, side by side and filled up to T5's width, then those of T5: (1, tokens, width); and the
    projected poolers of both CLIPs side by side: (1, pooled width).
    """

    role = RoleType.ENCODER
    row_wise = {"text_encoder", "text_encoder_2", "text_encoder_3"}
    # CLIP's tokens are read below its last layer, `clip_skip` layers further down where that is asked for; its pooler is
    # read behind the last one, so no layer is idle.
    needs = {
        "text_encoder": Need.FULL, "tokenizer": Need.FULL, "text_encoder_2": Need.FULL, "tokenizer_2": Need.FULL,
        "text_encoder_3": Need.FULL.optional(), "tokenizer_3": Need.FULL.optional(),
    }  # fmt: skip
    writes = {"prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"}
    reads = {
        "prompt", "prompt_2", "prompt_3", "negative_prompt", "negative_prompt_2", "negative_prompt_3", "guidance_scale",
        "clip_skip", "max_sequence_length", *writes,
    }  # fmt: skip

    def run(self, state: View) -> None:
        guided = state.guidance_scale > 1
        embeds, negative, pooled, negative_pooled = self.helpers.encode_prompt(
            prompt=state.prompt,
            prompt_2=state.prompt_2,
            prompt_3=state.prompt_3,
            negative_prompt=state.negative_prompt,
            negative_prompt_2=state.negative_prompt_2,
            negative_prompt_3=state.negative_prompt_3,
            do_classifier_free_guidance=guided,
            prompt_embeds=state.prompt_embeds,
            negative_prompt_embeds=state.negative_prompt_embeds,
            pooled_prompt_embeds=state.pooled_prompt_embeds,
            negative_pooled_prompt_embeds=state.negative_pooled_prompt_embeds,
            device=self.device,
            clip_skip=state.clip_skip,
            max_sequence_length=state.max_sequence_length,
        )
        state.prompt_embeds, state.pooled_prompt_embeds = embeds, pooled
        state.negative_prompt_embeds = negative if guided else None
        state.negative_pooled_prompt_embeds = negative_pooled if guided else None


class SD3Denoising(Denoising):
    """Denoise the latents, of shape (rows, channels, height, width).

    A step is one forward: where guidance is on all negative rows, then all positive ones. Skip-layer guidance adds, in
    the steps between `skip_layer_guidance_start` and `skip_layer_guidance_stop` (shares of all steps), a forward of the
    positive rows through fewer layers, and moves the prediction away from what that gives.
    """

    needs = {"transformer": Need.FULL, "scheduler": Need.FULL}
    reads = {
        "prompt_embeds", "pooled_prompt_embeds", "negative_prompt_embeds", "negative_pooled_prompt_embeds", "generator",
        "latents", "height", "width", "num_images_per_prompt", "num_inference_steps", "sigmas", "mu", "guidance_scale",
        "skip_guidance_layers", "skip_layer_guidance_scale", "skip_layer_guidance_start", "skip_layer_guidance_stop",
        "exact",
    }  # fmt: skip
    writes = {"latents", "conditioning", "scheduler", "timesteps"}

    def begin(self, state: View) -> None:
        import torch
        from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import retrieve_timesteps

        outputs = state.num_images_per_prompt
        text = [(state.prompt_embeds, state.pooled_prompt_embeds)]
        if state.negative_prompt_embeds is not None:
            text.insert(0, (state.negative_prompt_embeds, state.negative_pooled_prompt_embeds))
        embeds, pooled = (
            torch.cat([each.repeat_interleave(outputs, dim=0) for each in branches]) for branches in zip(*text)
        )
        state.latents = self.helpers.prepare_latents(
            len(state.prompt_embeds) * outputs,
            self.transformer.config.in_channels,
            state.height,
            state.width,
            embeds.dtype,
            self.device,
            state.generator,
            state.latents,
        )
        state.scheduler = self.new_scheduler()
        mu = self.shift(state)
        state.timesteps, steps = retrieve_timesteps(
            state.scheduler,
            state.num_inference_steps,
            self.device,
            sigmas=state.sigmas,
            **({} if mu is None else {"mu": mu}),
        )
        begin_at_first(state.scheduler)
        text_inputs = {"encoder_hidden_states": embeds, "pooled_projections": pooled}
        state.conditioning = {"text": text_inputs, "skipping": self.skipping(state, steps)}

    def shift(self, state: View) -> float | None:
        """Return how far the scheduler shifts the noise levels; None where it does so by its own configuration."""
        from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

        config, patch = state.scheduler.config, self.transformer.config.patch_size
        if state.mu is not None or not config.get("use_dynamic_shifting"):
            mu: float | None = state.mu
            return mu
        rows, columns = (size // patch for size in state.latents.shape[2:])
        return resolution_shift(calculate_shift, config, rows * columns, max_shift=1.16)

    def skipping(self, state: View, steps: int) -> range:
        """Return the steps that have skip-layer guidance: those strictly between the two shares of all."""
        if state.skip_guidance_layers is None or state.negative_prompt_embeds is None:
            return range(0)
        start, stop = steps * state.skip_layer_guidance_start, steps * state.skip_layer_guidance_stop
        inside = [i for i in range(len(state.timesteps)) if start < i < stop]
        return range(inside[0], inside[-1] + 1) if inside else range(0)

    def model_inputs(self, state: View, i: int) -> list[Forward]:
        import torch

        latents, text = state.latents, state.conditioning["text"]
        rows, guided = len(latents), state.negative_prompt_embeds is not None
        hidden = torch.cat([latents] * 2) if guided else latents
        timestep = state.timesteps[i]
        both = {"hidden_states": hidden, "timestep": timestep.expand(len(hidden)), **text}
        forwards = [Forward("transformer", "cond", both)]
        if i in state.conditioning["skipping"]:
            positive = {name: each[rows:] for name, each in text.items()}
            skipped = {"hidden_states": latents, "timestep": timestep.expand(rows), **positive}
            # A list would have one entry for each row.
            skipped["skip_layers"] = tuple(state.skip_guidance_layers)
            forwards.append(Forward("transformer", "skip", skipped))
        return forwards

    def advance(self, state: View, i: int, prediction: Sequence[torch.Tensor]) -> None:
        noise, *skipped = prediction
        if state.negative_prompt_embeds is not None:
            negative, positive = noise.chunk(2)
            noise = negative + state.guidance_scale * (positive - negative)
            for each in skipped:
                noise = noise + (positive - each) * state.skip_layer_guidance_scale
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
        latents = (state.latents / config.scaling_factor) + config.shift_factor
        image = self.vae.decode(latents, return_dict=False)[0]
        state.images = self.helpers.image_processor.postprocess(image, output_type=state.output_type)


class StableDiffusion3(Family):
    """Stable Diffusion 3 and 3.5. Guidance is on where `guidance_scale` > 1; the negative prompt is empty by default."""

    pipelines = ("StableDiffusion3Pipeline",)
    tasks = {"text-to-image": "a picture from a prompt"}
    # The pipeline's constructor asks the tokenizer for its longest text and the transformer for sizes, in every role.
    geometry = {"vae": Need.CONFIG, "tokenizer": Need.CONFIG, "transformer": Need.CONFIG}
    admission = {"text_encoder": Need.CONFIG, "text_encoder_2": Need.CONFIG}
    refused = {"joint_attention_kwargs", "ip_adapter_image", "ip_adapter_image_embeds"}

    def lone_forward(self) -> str | None:
        return "both guidance branches are rows of one forward, as in the oracle"

    def compose(self) -> None:
        self.add_stage(TextEncoding)
        self.add_stage(SD3Denoising)
        self.add_stage(Decoding)

    def admit(self, parameters: dict[str, Any], helpers: Any) -> None:
        for name in ("height", "width"):
            parameters[name] = parameters[name] or helpers.default_sample_size * helpers.vae_scale_factor
        check_multiple(parameters, ("height", "width"), helpers.vae_scale_factor * helpers.patch_size)
        check_largest(parameters, helpers)
        check_tensors(parameters, EMBEDDINGS)
        check_inputs(helpers, parameters)
        sides = [parameters[name] // helpers.vae_scale_factor for name in ("height", "width")]
        check_latents(parameters, (helpers.transformer.config.in_channels, *sides))
        check_layers(parameters, helpers)
        if parameters["guidance_scale"] <= 1:
            for name in ("negative_prompt", "negative_prompt_embeds", "skip_guidance_layers"):
                if parameters[name] is not None:
                    log.warning("%s has no effect: guidance needs guidance_scale > 1", name)


def check_largest(parameters: Mapping[str, Any], helpers: Any) -> None:
    """Check that the transformer has a position for every part of the picture.

    Raises:
        ParameterError: the picture is too large.
    """
    largest = helpers.transformer.config.pos_embed_max_size * helpers.patch_size * helpers.vae_scale_factor
    for name in ("height", "width"):
        if parameters[name] > largest:
            reason = f"at most {largest} is accepted: the model knows no positions beyond"
            raise ParameterError(name, parameters[name], reason)


def check_layers(parameters: Mapping[str, Any], helpers: Any) -> None:
    """Check the parameters that count layers, and those of skip-layer guidance.

    Raises:
        ParameterError: there is no such layer.
    """
    layers = min(encoder.config.num_hidden_layers for encoder in (helpers.text_encoder, helpers.text_encoder_2))
    skip = parameters["clip_skip"]
    if skip is not None and skip not in range(layers):
        raise ParameterError("clip_skip", skip, f"a whole number from 0 to {layers - 1} is accepted")
    skipped, blocks = parameters["skip_guidance_layers"], helpers.transformer.config.num_layers
    if skipped is not None and (
        not isinstance(skipped, (list, tuple)) or not all(layer in range(blocks) for layer in skipped)
    ):
        raise ParameterError("skip_guidance_layers", skipped, f"a list of layers from 0 to {blocks - 1} is accepted")
