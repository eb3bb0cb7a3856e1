"""LongCat-Image: text to image, the prompt rewritten first where that is asked for; LongCat-Image-Edit: a picture edited.

Oracles: `diffusers.LongCatImagePipeline` and `diffusers.LongCatImageEditPipeline`. Both fail with `prompt_embeds`, so
requests cannot carry them.

Rewriting is on by default, as in the oracle, and is a task of its own: loaded for `text-to-image` alone, the model that
encodes the prompt has no output head. `prompt` of the result tells what was written. Where the checkpoint's own
settings let text be sampled, the oracle draws from torch's global random state; here it is set to the request's seed
first, and put back, so that a request always gives the same picture.

Edit scales a picture to about a megapixel, which is the size of the result too: it takes none. The vision-language
model is shown half as many rows and columns; given a list of one, its oracle leaves the picture as it is, and so do we.
A prompt of more than 512 tokens is cut by the first oracle and lets the second fail, so there it is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from triptych.components.need import VISION, Need
from triptych.errors import ParameterError
from triptych.pipelines.base import Family, check_inputs, check_latents, check_multiple, check_placeholders
from triptych.pipelines.qwen_image_edit import MODES, PIXELS, PLACEHOLDERS, first, listed
from triptych.roles import RoleType
from triptych.stages.base import Stage
from triptych.stages.denoising import Denoising, Forward
from triptych.stages.drawing import seeded
from triptych.stages.noise_levels import begin_at_first, even_sigmas, resolution_shift
from triptych.state import View

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)


class PromptRewriting(Stage):
    """Let the model that encodes the prompt write a longer one first."""

    role = RoleType.ENCODER
    tasks = {"text-to-image-rewritten"}
    needs = {"text_encoder": Need.without(VISION), "text_processor": Need.FULL}
    reads = {"prompt", "seed"}
    writes = {"prompt"}

    def run(self, state: View) -> None:
        with seeded(state.seed, self.device):
            (state.prompt,) = self.helpers.rewire_prompt(state.prompt, self.device)


class TextEncoding(Stage):
    """Turn the prompt, and for guidance the negative prompt, into embeddings of shape (1, tokens, width).

    All prompts are padded to one length. Without a negative prompt it is the empty one.
    """

    role = RoleType.ENCODER
    row_wise = {"text_encoder"}
    needs = {"text_encoder": Need.hidden(-1), "tokenizer": Need.FULL}
    reads = {"prompt", "negative_prompt", "negative_prompt_embeds", "guidance_scale"}
    writes = {"prompt_embeds", "negative_prompt_embeds"}

    def run(self, state: View) -> None:
        state.prompt_embeds = self.embed(state, state.prompt)
        negative = state.negative_prompt_embeds
        if state.guidance_scale <= 1:
            negative = None
        elif negative is None:
            negative = self.embed(state, state.negative_prompt or "")
        state.negative_prompt_embeds = negative

    def embed(self, state: View, prompt: str) -> torch.Tensor:
        embeds: torch.Tensor = self.helpers.encode_prompt(prompt=prompt)[0]
        return embeds


class LongCatDenoising(Denoising):
    """Denoise the packed latents, of shape (rows, tokens, channels).

    `enable_cfg_renorm` keeps guidance from lengthening a token's prediction, and `cfg_renorm_min` from shortening it
    to less than that part.
    """

    needs = {"transformer": Need.FULL, "scheduler": Need.FULL}
    reads = {
        "prompt_embeds", "negative_prompt_embeds", "generator", "latents", "height", "width", "num_images_per_prompt",
        "num_inference_steps", "sigmas", "guidance_scale", "enable_cfg_renorm", "cfg_renorm_min", "exact",
    }  # fmt: skip
    writes = {"latents", "conditioning", "scheduler", "timesteps"}
    shared = frozenset(("txt_ids", "img_ids"))

    def begin(self, state: View) -> None:
        from diffusers.pipelines.longcat_image.pipeline_longcat_image import calculate_shift, retrieve_timesteps

        text = {"cond": self.repeat(state, state.prompt_embeds)}
        if state.negative_prompt_embeds is not None:
            text["uncond"] = self.repeat(state, state.negative_prompt_embeds)
        state.latents, ids, given = self.prepare(state, text["cond"]["encoder_hidden_states"])
        state.conditioning = {"text": text, "ids": ids, "given": given}
        state.scheduler = self.new_scheduler()
        steps = state.num_inference_steps
        sigmas = even_sigmas(steps) if state.sigmas is None else state.sigmas
        mu = resolution_shift(calculate_shift, state.scheduler.config, state.latents.shape[1])
        state.timesteps, _ = retrieve_timesteps(state.scheduler, steps, self.device, sigmas=sigmas, mu=mu)
        begin_at_first(state.scheduler)

    def repeat(self, state: View, embeds: torch.Tensor) -> dict[str, torch.Tensor]:
        """Repeat one prompt's embeddings for each output; returns them and the positions of their tokens."""
        embeds, ids = self.helpers.encode_prompt(
            prompt="", prompt_embeds=embeds, num_images_per_prompt=state.num_images_per_prompt
        )
        return {"encoder_hidden_states": embeds, "txt_ids": ids}

    def prepare(self, state: View, embeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Draw the latents, or take those that are given.

        Returns the latents, the positions of all tokens of pictures, and the tokens of the picture that is given.
        """
        latents, ids = self.helpers.prepare_latents(
            len(embeds), self.channels, state.height, state.width, embeds.dtype, self.device, state.generator,
            state.latents,
        )  # fmt: skip
        return latents, ids, None

    @property
    def channels(self) -> int:
        """Channels of latents that are not packed. The oracles only run where they are 16."""
        channels: int = self.transformer.config.in_channels // 4
        return channels

    def model_inputs(self, state: View, i: int) -> list[Forward]:
        import torch

        latents, given = state.latents, state.conditioning["given"]
        timestep = state.timesteps[i].expand(latents.shape[0]).to(latents.dtype)
        hidden = latents if given is None else torch.cat([latents, given], dim=1)
        common = {"hidden_states": hidden, "timestep": timestep / 1000, "img_ids": state.conditioning["ids"]}
        text = state.conditioning["text"]
        return [Forward("transformer", branch, {**common, **inputs}) for branch, inputs in text.items()]

    def advance(self, state: View, i: int, prediction: Sequence[torch.Tensor]) -> None:
        # Of what the transformer predicts, the tokens of the picture that was given are nobody's.
        noise, *rest = (each[:, : state.latents.shape[1]] for each in prediction)
        for unconditional in rest:
            noise = self.guide(state, noise, unconditional + state.guidance_scale * (noise - unconditional))
        state.latents = self.take_step(state, i, noise)

    def guide(self, state: View, conditional: torch.Tensor, combined: torch.Tensor) -> torch.Tensor:
        """Return the guided prediction, no token of it longer than the conditional one where that is asked for."""
        import torch

        if not state.enable_cfg_renorm:
            return combined
        norm, guided_norm = (torch.norm(each, dim=-1, keepdim=True) for each in (conditional, combined))
        limited: torch.Tensor = combined * (norm / (guided_norm + 1e-8)).clamp(min=state.cfg_renorm_min, max=1.0)
        return limited


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
        image = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]
        state.images = self.helpers.image_processor.postprocess(image, output_type=state.output_type)


class LongCatImage(Family):
    """LongCat-Image. Guidance is on where `guidance_scale` > 1, as it is by default."""

    pipelines = ("LongCatImagePipeline",)
    tasks = {
        "text-to-image": "a picture from a prompt as it is (enable_prompt_rewrite=False)",
        "text-to-image-rewritten": "a picture from a prompt that the model rewrites first",
    }
    geometry = {"vae": Need.CONFIG}
    refused = {"joint_attention_kwargs", "prompt_embeds"}
    optional = {"enable_prompt_rewrite", "enable_cfg_renorm"}  # None switches them off

    def compose(self) -> None:
        self.add_stage(PromptRewriting)
        self.add_stage(TextEncoding)
        self.add_stage(LongCatDenoising)
        self.add_stage(Decoding)

    def task_of(self, parameters: Mapping[str, Any]) -> str:
        return "text-to-image-rewritten" if parameters["enable_prompt_rewrite"] else "text-to-image"

    def admit(self, parameters: dict[str, Any], helpers: Any) -> None:
        for name in ("height", "width"):
            parameters[name] = parameters[name] or helpers.default_sample_size * helpers.vae_scale_factor
        check_multiple(parameters, ("height", "width"), helpers.vae_scale_factor * 2)
        if not 0 <= parameters["cfg_renorm_min"] <= 1:
            raise ParameterError("cfg_renorm_min", parameters["cfg_renorm_min"], "a number from 0 to 1 is accepted")
        if parameters["enable_prompt_rewrite"]:
            check_placeholders(parameters, ["prompt"], PLACEHOLDERS)
        check_text(parameters, helpers)


class EditTextEncoding(TextEncoding):
    """Turn the prompt, and for guidance the negative prompt, into embeddings, each read together with the picture.

    Their tokens are those of the picture, then those of the prompt.
    """

    needs = {
        "text_encoder": Need.hidden(-1, vision=True), "tokenizer": Need.FULL, "text_processor": Need.FULL,
    }  # fmt: skip
    reads = TextEncoding.reads | {"image"}

    def embed(self, state: View, prompt: str) -> torch.Tensor:
        width, height = scaled(state.image)
        resize = self.helpers.image_processor.resize
        # The oracle shrinks what it has scaled before.
        seen = resize(resize(state.image, height, width), height // 2, width // 2)
        embeds: torch.Tensor = self.helpers.encode_prompt(prompt=prompt, image=seen)[0]
        return embeds


class ImageEncoding(Stage):
    """Turn the picture into latents of shape (1, channels, rows, columns), and settle the size of the result."""

    role = RoleType.ENCODER
    needs = {"vae": Need.ENCODE}
    # The oracle encodes the picture in the dtype of the embeddings.
    reads = {"image", "prompt_embeds"}
    writes = {"image_latents", "height", "width"}

    def run(self, state: View) -> None:
        width, height = scaled(state.image)
        processor = self.helpers.image_processor
        pixels = processor.preprocess(processor.resize(state.image, height, width), height, width)
        pixels = pixels.to(device=self.device, dtype=state.prompt_embeds.dtype)
        state.image_latents = self.helpers._encode_vae_image(image=pixels, generator=None)
        state.height, state.width = height, width


class LongCatEditDenoising(LongCatDenoising):
    """Denoise the packed latents, those of the picture appended; guidance is as it comes."""

    reads = LongCatDenoising.reads - {"enable_cfg_renorm", "cfg_renorm_min"} | {"image_latents"}

    def prepare(self, state: View, embeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        import torch

        # Latents in the place of the picture are taken as they are, repeated and packed.
        latents, given, ids, given_ids = self.helpers.prepare_latents(
            state.image_latents, len(embeds), self.channels, state.height, state.width, embeds.dtype, embeds.shape[1],
            self.device, state.generator, state.latents,
        )  # fmt: skip
        return latents, torch.cat([ids, given_ids], dim=0), given

    def guide(self, state: View, conditional: torch.Tensor, combined: torch.Tensor) -> torch.Tensor:
        return combined


class LongCatImageEdit(Family):
    """LongCat-Image-Edit. Guidance is on where `guidance_scale` > 1, as it is by default."""

    pipelines = ("LongCatImageEditPipeline",)
    tasks = {"edit": "a picture edited after a prompt"}
    # The pipeline's constructor takes the processor apart, in every role.
    geometry = {"vae": Need.CONFIG, "text_processor": Need.CONFIG}
    admission = {"tokenizer": Need.CONFIG}
    refused = {"joint_attention_kwargs", "prompt_embeds"}

    def compose(self) -> None:
        self.add_stage(EditTextEncoding, "text_encoding")
        self.add_stage(ImageEncoding)
        self.add_stage(LongCatEditDenoising)
        self.add_stage(Decoding)

    def admit(self, parameters: dict[str, Any], helpers: Any) -> None:
        check_picture(parameters, helpers)
        width, height = scaled(parameters["image"])
        check_placeholders(parameters, ("prompt", "negative_prompt"), PLACEHOLDERS)
        check_text({**parameters, "width": width, "height": height}, helpers)
        guided = parameters["guidance_scale"] > 1
        for name in ("prompt", "negative_prompt") if guided else ("prompt",):
            tokens = count_tokens(helpers.tokenizer, parameters[name] or "")
            if tokens > helpers.tokenizer_max_length:
                reason = f"at most {helpers.tokenizer_max_length} tokens are accepted; these are {tokens}"
                raise ParameterError(name, parameters[name], reason)


def check_text(parameters: Mapping[str, Any], helpers: Any) -> None:
    """Check the prompts of a request, and let the pipeline check them with the rest.

    Raises:
        UsageError: there is no prompt, or two negative ones, or embeddings or latents are not those of one.
    """
    if parameters["prompt"] is None:
        raise ParameterError("prompt", None, "give a text; this pipeline takes no embeddings in its place")
    check_inputs(helpers, parameters)
    embeds = parameters["negative_prompt_embeds"]
    if embeds is not None and (getattr(embeds, "ndim", 0) != 3 or len(embeds) != 1):
        shape = f"of shape {tuple(getattr(embeds, 'shape', ()))}"
        raise ParameterError("negative_prompt_embeds", shape, "those of one prompt are accepted: (1, tokens, width)")
    patch = helpers.vae_scale_factor * 2
    tokens = (parameters["height"] // patch) * (parameters["width"] // patch)
    check_latents(parameters, (tokens, helpers.vae.config.latent_channels * 4))
    if parameters["guidance_scale"] <= 1 and (parameters["negative_prompt"] is not None or embeds is not None):
        log.warning("the negative prompt has no effect: guidance needs guidance_scale > 1")


def count_tokens(tokenizer: Any, prompt: str) -> int:
    """Return how many tokens a prompt is read as: text in quotation marks is read character by character."""
    from diffusers.pipelines.longcat_image.pipeline_longcat_image_edit import split_quotation

    texts = [text for part, quoted in split_quotation(prompt) for text in (part if quoted else [part])]
    return sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)


def scaled(image: Any) -> tuple[int, int]:
    """Return the width and height that the oracle scales a picture to, and gives the result."""
    from diffusers.pipelines.longcat_image.pipeline_longcat_image_edit import calculate_dimensions

    image = first(image)
    width, height = calculate_dimensions(PIXELS, image.width / image.height)
    return width, height


def check_picture(parameters: dict[str, Any], helpers: Any) -> None:
    """Check the picture of a request and give it the channels that the autoencoder takes, in place.

    The oracle fails for any other kind of picture.

    Raises:
        ParameterError: there is none or more than one, or it is not usable.
    """
    from PIL.Image import Image
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    given = parameters["image"]
    pictures = [] if given is None else listed(given)
    if len(pictures) != 1:
        reason = "one picture is edited, so give one" if pictures else "give a picture: it is what this model works on"
        raise ParameterError("image", given, reason)
    (picture,) = pictures
    if not isinstance(picture, Image):
        raise ParameterError("image", given, f"a PIL image is accepted, not {type(picture).__name__}")
    width, height = scaled(picture)
    seen = (picture.width, picture.height) if isinstance(given, (list, tuple)) else (width // 2, height // 2)
    try:
        smart_resize(seen[1], seen[0])  # the vision-language model's own limits
    except (ValueError, ZeroDivisionError) as error:
        raise ParameterError("image", given, f"too narrow: {error}") from error
    mode = MODES[helpers.vae.config.in_channels]
    picture = picture if picture.mode == mode else picture.convert(mode)
    parameters["image"] = [picture] if isinstance(given, (list, tuple)) else picture
