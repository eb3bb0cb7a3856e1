"""GLM-Image: text to image, and pictures after a prompt and other pictures.

Oracle: `diffusers.GlmImagePipeline`.

An autoregressive model writes the picture's tokens at half the transformer's resolution (the prior); the transformer
denoises latents after them and after the letters that stand in quotes in the prompt. The pictures that are given reach
the autoregressive model as tokens, and the transformer as keys and values that it computes of their latents once.

Random numbers: the oracle sets torch's global random state to its generator's seed before the tokens are drawn, and
leaves the generator as it is for the noise. So do we, but put the global state back. The autoregressive model keeps
the positions of the request it works on, so an encoder runs one request at a time.

Where the oracle cannot be followed:

- With transformers 5.23 it fails for every picture that is given: it reads the features of the vision tower in the
  shape that they had before. Given that shape, it makes what is made here.
- It fails for pictures whose size its two models round differently. They are scaled here to the nearest size that both
  take, and turned upright; it makes the same of the scaled picture.
- It fails without `height` and `width`. Here they are those of the first picture that is given, or else what its
  documentation says.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from triptych.components.need import VISION, Need
from triptych.errors import ModelError, ParameterError
from triptych.pipelines.base import (
    Family,
    check_inputs,
    check_latents,
    check_multiple,
    check_placeholders,
    check_tensors,
)
from triptych.roles import RoleType
from triptych.stages.base import Stage
from triptych.stages.denoising import Denoising, Forward
from triptych.stages.drawing import seeded
from triptych.stages.noise_levels import begin_at_first
from triptych.state import View

if TYPE_CHECKING:
    import torch

PRIOR = ("prior_token_ids", "prior_token_image_ids", "source_image_grid_thw")
"""What the autoregressive model gives: of the result, and of the pictures their tokens and (1, rows, columns) each."""

# The codebook is looked up, never decoded from.
UNUSED = "model.vqmodel.post_quant_conv"


class PriorGeneration(Stage):
    """Let the autoregressive model write the picture's tokens: `prior_token_ids` (1, tokens of the transformer)."""

    role = RoleType.ENCODER
    tasks = {"text-to-image"}
    needs = {"vision_language_encoder": Need.without(VISION, "model.vqmodel", UNUSED), "processor": Need.FULL}
    reads = {"prompt", "height", "width", "seed", "prior_token_ids"}
    writes = {"prior_token_ids"}

    def run(self, state: View) -> None:
        if state.prior_token_ids is None:
            state.prior_token_ids = self.write(state, self.tokens(state, []), given=0)

    def tokens(self, state: View, pictures: Sequence[Any]) -> dict[str, Any]:
        """Return the autoregressive model's inputs: the pictures, the prompt and the sizes of what it is to write."""
        content = [{"type": "image", "image": picture} for picture in pictures]
        message = {"role": "user", "content": [*content, {"type": "text", "text": state.prompt}]}
        options = {"target_h": state.height, "target_w": state.width, "padding": False}
        return dict(
            self.processor.apply_chat_template(
                [[message]], tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs=options
            ).to(self.device)
        )

    def write(self, state: View, inputs: dict[str, Any], given: int) -> torch.Tensor:
        """Draw the tokens of a picture, and of the preview that comes first where no pictures are given.

        Raises:
            ModelError: the model ended the picture too early, or wrote what is no part of one.
        """
        length, skipped, rows, columns = self.helpers._compute_generation_params(
            image_grid_thw=inputs["image_grid_thw"], is_text_to_image=not given
        )
        with seeded(state.seed, self.device):
            written = self.vision_language_encoder.generate(**inputs, max_new_tokens=length, do_sample=True)
        tokens = self.helpers._extract_large_image_tokens(
            written, inputs["input_ids"].shape[-1], skipped, rows * columns
        )
        if len(tokens) != rows * columns:
            raise ModelError(
                f"the autoregressive model ended the picture after {len(tokens)} of {rows * columns} tokens; "
                "another seed or prompt may do"
            )
        # The model knows more tokens than there are parts of pictures, and its settings may let it draw any.
        parts = self.transformer.config.prior_vq_quantizer_codebook_size
        if (strange := int(tokens.max())) >= parts:
            raise ModelError(
                f"the autoregressive model wrote token {strange}, where pictures are made of those below {parts}; "
                "another seed or prompt may do"
            )
        prior: torch.Tensor = self.helpers._upsample_token_ids(tokens, rows, columns)
        return prior


class ImagePriorGeneration(PriorGeneration):
    """Turn the given pictures into tokens and let the autoregressive model write those of the new one after them."""

    tasks = {"edit"}
    needs = {"vision_language_encoder": Need.without(UNUSED), "processor": Need.FULL}
    reads = PriorGeneration.reads | {"image", *PRIOR}
    writes = {*PRIOR}

    def run(self, state: View) -> None:
        import torch

        if state.prior_token_ids is not None:
            return
        inputs, given = self.tokens(state, state.image), len(state.image)
        grids, model = inputs["image_grid_thw"][:given], self.vision_language_encoder
        features = model.get_image_features(inputs.pop("pixel_values"), grids)
        found = model.get_image_tokens(features.pooler_output, grids).split(grids.prod(dim=-1).tolist())
        upsample = self.helpers._upsample_token_ids
        tokens = [upsample(each, *grid[1:].tolist()).squeeze(0) for each, grid in zip(found, grids)]
        state.prior_token_image_ids = [torch.cat(tokens)]
        state.source_image_grid_thw = [grids * grids.new_tensor([1, 2, 2])]
        # The features are what `generate` would compute of the pixels first.
        inputs["mm_encoder_outputs"] = {"image": features}
        state.prior_token_ids = self.write(state, inputs, given)


class GlyphEncoding(Stage):
    """Turn the letters in quotes of the prompt, and for guidance none, into embeddings: (1, letters, channels)."""

    role = RoleType.ENCODER
    needs = {"text_encoder": Need.FULL, "tokenizer": Need.FULL}
    writes = {"prompt_embeds", "negative_prompt_embeds"}
    reads = {"prompt", "guidance_scale", "max_sequence_length", *writes}

    def run(self, state: View) -> None:
        guided = state.guidance_scale > 1
        state.prompt_embeds, state.negative_prompt_embeds = self.helpers.encode_prompt(
            state.prompt,
            guided,
            prompt_embeds=state.prompt_embeds,
            negative_prompt_embeds=state.negative_prompt_embeds if guided else None,
            device=self.device,
            dtype=self.text_encoder.dtype,
            max_sequence_length=state.max_sequence_length,
        )


class ImageEncoding(Stage):
    """Turn each given picture into normalised latents (1, channels, height, width), and tell its size in pixels."""

    role = RoleType.ENCODER
    tasks = {"edit"}
    needs = {"vae": Need.ENCODE}
    reads = {"image"}
    writes = {"image_latents", "image_sizes"}

    def run(self, state: View) -> None:
        mean, std = statistics(self.vae, self.device)
        latents, sizes = [], []
        for picture in state.image:
            pixels = self.helpers.image_processor.preprocess(picture, height=picture.height, width=picture.width)
            encoded = self.vae.encode(pixels.to(device=self.device, dtype=self.vae.dtype)).latent_dist.mode()
            latents.append((encoded - mean) / std)
            sizes.append(list(pixels.shape[-2:]))
        state.image_latents, state.image_sizes = latents, sizes


class PictureCache:
    """Keys and values of the given pictures, layer by layer, as the transformer takes them: one request's own.

    Attributes:
        rows: how many rows of a batch see them.
    """

    def __init__(self, layers: Any, rows: int) -> None:
        self.layers = layers
        self.rows = rows

    def __getitem__(self, layer: int) -> Any:
        return self.layers[layer]

    @property
    def tokens(self) -> int:
        """How many tokens the pictures have between them."""
        return int(self.layers[0].k_caches[0].shape[1])

    @classmethod
    def join(cls, caches: Sequence[PictureCache]) -> PictureCache:
        """Return what lets each row of a joined batch see its own request's pictures."""
        from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache

        joined = GlmImageKVCache(caches[0].layers.num_layers)
        joined.set_mode("read")
        for layer in range(joined.num_layers):
            for cache in caches:
                joined[layer].k_caches += cache[layer].k_caches * cache.rows
                joined[layer].v_caches += cache[layer].v_caches * cache.rows
        return cls(joined, sum(cache.rows for cache in caches))


class GlmDenoising(Denoising):
    """Denoise the latents; only the conditional branch sees the prior and the pictures that are given."""

    needs = {"transformer": Need.FULL, "scheduler": Need.FULL}
    reads = {
        "prompt_embeds", "negative_prompt_embeds", *PRIOR, "image_latents", "image_sizes", "generator", "latents",
        "height", "width", "crops_coords_top_left", "num_images_per_prompt", "num_inference_steps", "timesteps",
        "sigmas", "guidance_scale", "exact",
    }  # fmt: skip
    writes = {"latents", "conditioning", "scheduler", "timesteps"}

    def begin(self, state: View) -> None:
        import torch

        def repeated(value: torch.Tensor) -> torch.Tensor:
            return value.repeat_interleave(state.num_images_per_prompt, dim=0)

        embeds = repeated(state.prompt_embeds)
        rows, size = len(embeds), (state.height, state.width)
        channels = self.transformer.config.in_channels
        state.latents = self.helpers.prepare_latents(
            rows, channels, *size, embeds.dtype, self.device, state.generator, state.latents
        )
        prior = repeated(state.prior_token_ids)
        target, crop = (
            torch.tensor([pair], dtype=embeds.dtype, device=self.device).repeat(rows, 1)
            for pair in (size, state.crops_coords_top_left)
        )
        kept = torch.zeros_like(prior, dtype=torch.bool)
        branches: dict[str, dict[str, Any]] = {"cond": {"encoder_hidden_states": embeds, "prior_token_drop": kept}}
        if state.negative_prompt_embeds is not None:
            negative = repeated(state.negative_prompt_embeds)
            branches["uncond"] = {"encoder_hidden_states": negative, "prior_token_drop": ~kept}
        if state.image_latents is not None:
            branches["cond"]["kv_caches"] = self.look(state, rows)
        common = {"prior_token_id": prior, "target_size": target, "crop_coords": crop}
        state.conditioning = {"branches": branches, "common": common}
        self.schedule(state)

    def look(self, state: View, rows: int) -> PictureCache:
        """Run the transformer over each given picture, clean and without text, and keep its keys and values."""
        import torch
        from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache

        (tokens,), (grids,) = state.prior_token_image_ids, state.source_image_grid_thw
        layers = GlmImageKVCache(num_layers=self.transformer.config.num_layers)
        layers.set_mode("write")
        per_picture = tokens.split(grids.prod(dim=-1).tolist())
        for latents, size, prior in zip(state.image_latents, state.image_sizes, per_picture, strict=True):
            self.transformer(
                hidden_states=latents,
                encoder_hidden_states=torch.zeros_like(state.prompt_embeds)[:1, :0],
                prior_token_id=prior,
                prior_token_drop=torch.zeros_like(prior, dtype=torch.bool),
                timestep=torch.zeros((1,), device=self.device),
                target_size=torch.tensor([size], device=self.device),
                crop_coords=torch.zeros((1, 2), device=self.device),
                kv_caches=layers,
            )
        layers.set_mode("read")
        return PictureCache(layers, rows)

    def schedule(self, state: View) -> None:
        """Make the scheduler and its timesteps."""
        import numpy as np
        from diffusers.pipelines.glm_image.pipeline_glm_image import calculate_shift, retrieve_timesteps

        state.scheduler = self.new_scheduler()
        config, steps = state.scheduler.config, state.num_inference_steps
        timesteps = state.timesteps
        if timesteps is None:
            timesteps = np.linspace(config.num_train_timesteps, 1.0, steps + 1)[:-1]
        timesteps = np.array(timesteps).astype(np.int64).astype(np.float32)
        sigmas = timesteps / config.num_train_timesteps if state.sigmas is None else state.sigmas
        mu = calculate_shift(
            state.prior_token_ids.shape[1],
            config.get("base_image_seq_len", 256),
            config.get("base_shift", 0.25),
            config.get("max_shift", 0.75),
        )
        state.timesteps, _ = retrieve_timesteps(state.scheduler, steps, self.device, timesteps, sigmas, mu=mu)
        begin_at_first(state.scheduler)

    def model_inputs(self, state: View, i: int) -> list[Forward]:
        latents = state.latents
        common = {
            "hidden_states": latents.to(self.transformer_dtype),
            "timestep": state.timesteps[i].expand(latents.shape[0]) - 1,
            **state.conditioning["common"],
        }
        branches = state.conditioning["branches"]
        return [Forward("transformer", branch, {**common, **inputs}) for branch, inputs in branches.items()]

    def form_of(self, name: str, value: Any) -> Hashable:
        if isinstance(value, PictureCache):
            return value.tokens
        return super().form_of(name, value)

    def join(self, name: str, values: list[Any]) -> Any:
        return PictureCache.join(values) if name == "kv_caches" else super().join(name, values)

    def advance(self, state: View, i: int, prediction: Sequence[torch.Tensor]) -> None:
        noise, *rest = (each.float() for each in prediction)
        for unconditional in rest:
            noise = unconditional + state.guidance_scale * (noise - unconditional)
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
        mean, std = statistics(self.vae, self.device)
        latents = state.latents.to(self.vae.dtype) * std + mean
        image = self.vae.decode(latents, return_dict=False)[0]
        state.images = self.helpers.image_processor.postprocess(image, output_type=state.output_type)


class GlmImage(Family):
    """GLM-Image. Guidance is on where `guidance_scale` is above 1; there is no negative prompt."""

    pipelines = ("GlmImagePipeline",)
    tasks = {"text-to-image": "a picture from a prompt", "edit": "a picture from a prompt and one or several pictures"}
    geometry = {"vae": Need.CONFIG, "transformer": Need.CONFIG}
    admission = {"processor": Need.FULL}
    refused = {"attention_kwargs"}

    def compose(self) -> None:
        self.add_stage(PriorGeneration)
        self.add_stage(ImagePriorGeneration)
        self.add_stage(GlyphEncoding)
        self.add_stage(ImageEncoding)
        self.add_stage(GlmDenoising)
        self.add_stage(Decoding)

    def task_of(self, parameters: Mapping[str, Any]) -> str:
        return "text-to-image" if parameters["image"] is None else "edit"

    def admit(self, parameters: dict[str, Any], helpers: Any) -> None:
        # The autoregressive model's tokens are twice as wide as the transformer's.
        multiple = helpers.vae_scale_factor * helpers.transformer.config.patch_size * 2
        check_multiple(parameters, [name for name in ("height", "width") if parameters[name] is not None], multiple)
        sizes = [helpers.default_sample_size * helpers.vae_scale_factor] * 2
        if parameters["image"] is not None:
            parameters["image"] = [fit(helpers, picture, multiple) for picture in pictures_of(parameters["image"])]
            sizes = [parameters["image"][0].height, parameters["image"][0].width]
        for name, size in zip(("height", "width"), sizes):
            parameters[name] = parameters[name] or size
        check_tensors(parameters, dict.fromkeys(("prompt_embeds", "negative_prompt_embeds"), (None, None, None)))
        check_inputs(helpers, parameters)
        if parameters["prior_token_ids"] is None:
            check_placeholders(parameters, ["prompt"], [helpers.processor.image_token])
        config = helpers.transformer.config
        tokens = parameters["height"] * parameters["width"] * 4 // multiple**2
        check_prior(parameters, tokens, config.prior_vq_quantizer_codebook_size)
        sides = [parameters[name] // helpers.vae_scale_factor for name in ("height", "width")]
        check_latents(parameters, (config.in_channels, *sides))
        check_crop(parameters)
        check_schedule(parameters)


def statistics(vae: Any, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the latents' means and deviations, (1, channels, 1, 1), in the autoencoder's dtype."""
    import torch

    mean, std = (
        torch.tensor(each).view(1, vae.config.latent_channels, 1, 1).to(device, vae.dtype)
        for each in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, std


def pictures_of(image: Any) -> list[Any]:
    """Return the pictures of the parameter `image`: one, a list of them, or a list of one list.

    Raises:
        ParameterError: there is none.
    """
    pictures = list(image) if isinstance(image, (list, tuple)) else [image]
    if len(pictures) == 1 and isinstance(pictures[0], (list, tuple)):
        pictures = list(pictures[0])
    if not pictures:
        raise ParameterError("image", image, "give one or more pictures, or leave it out")
    return pictures


def fit(helpers: Any, picture: Any, multiple: int) -> Any:
    """Return a picture upright, in colour and scaled to the nearest size that both models take.

    Raises:
        ParameterError: it is no picture, or of no shape that the autoregressive model takes.
    """
    from PIL import Image, ImageOps
    from transformers.models.glm_image.image_processing_pil_glm_image import smart_resize

    if not isinstance(picture, Image.Image):
        raise ParameterError("image", picture, f"a PIL image is accepted, not {type(picture).__name__}")
    picture = ImageOps.exif_transpose(picture).convert("RGB")
    processor = helpers.processor.image_processor
    limits = processor.size["shortest_edge"], processor.size["longest_edge"]
    try:
        seen = smart_resize(picture.height, picture.width, processor.patch_size * processor.merge_size, *limits)
    except (ValueError, ZeroDivisionError) as error:
        raise ParameterError("image", picture, f"the autoregressive model does not take it: {error}") from error
    height, width = (side // processor.patch_size * multiple for side in seen)
    if (picture.height, picture.width) != (height, width):
        picture = helpers.image_processor.resize(picture, height, width)
    return picture


def check_prior(parameters: Mapping[str, Any], tokens: int, parts: int) -> None:
    """Check embeddings and tokens that are given in place of what the encoder makes.

    Args:
        tokens: how many a picture of the request's size has.
        parts: how many tokens there are to make pictures of.

    Raises:
        ParameterError: they are of another prompt's, picture's or size's number, or no parts of pictures.
    """
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        if parameters[name] is not None and len(parameters[name]) > 1:
            raise ParameterError(name, parameters[name], "this pipeline takes one prompt at a time: one row")
    prior = parameters["prior_token_ids"]
    if prior is None:
        return
    shape = tuple(getattr(prior, "shape", ()))
    if shape != (1, tokens):
        raise ParameterError("prior_token_ids", prior, f"(1, {tokens}) tokens are accepted for this size, not {shape}")
    if parameters["image"] is None:
        check_codes("prior_token_ids", [prior], parts)
        return
    ids, grids = parameters["prior_token_image_ids"], parameters["source_image_grid_thw"]
    if ids is None or len(ids) != 1 or len(grids) != 1 or len(grids[0]) != len(parameters["image"]):
        reason = "with pictures and prior_token_ids, give one list entry for all pictures, and a grid for each"
        raise ParameterError("prior_token_image_ids", ids, reason)
    check_codes("prior_token_ids", [prior], parts)
    check_codes("prior_token_image_ids", ids, parts)


def check_codes(name: str, given: Sequence[Any], parts: int) -> None:
    """Check that tokens are parts of pictures.

    Raises:
        ParameterError: one is none.
    """
    import torch

    for each in given:
        whole = isinstance(each, torch.Tensor) and each.dtype in (torch.int32, torch.int64)
        if not whole or not each.numel() or not 0 <= int(each.min()) <= int(each.max()) < parts:
            raise ParameterError(name, each, f"a tensor of whole numbers from 0 to {parts - 1} is accepted")


def check_crop(parameters: Mapping[str, Any]) -> None:
    """Check where the picture is said to be cut out.

    Raises:
        ParameterError: these are not two finite numbers.
    """
    crop = parameters["crops_coords_top_left"]
    try:
        fits = len(crop) == 2 and all(math.isfinite(each) for each in crop)
    except (TypeError, OverflowError):
        fits = False
    if not fits:
        raise ParameterError("crops_coords_top_left", crop, "two finite numbers are accepted: (top, left)")


def check_schedule(parameters: Mapping[str, Any]) -> None:
    """Check given timesteps and noise levels: the scheduler takes as many of one as of the other.

    Raises:
        ParameterError: their numbers differ.
    """
    timesteps, sigmas = parameters["timesteps"], parameters["sigmas"]
    steps = parameters["num_inference_steps"] if timesteps is None else len(timesteps)
    if sigmas is not None and len(sigmas) != steps:
        raise ParameterError("sigmas", sigmas, f"as many as steps are accepted: {steps}")
