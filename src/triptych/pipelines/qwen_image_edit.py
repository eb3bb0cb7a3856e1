"""Qwen-Image-Edit: a picture edited after a prompt; Edit-Plus: a picture from a prompt and one or several others.

Oracles: `diffusers.QwenImageEditPipeline` and `diffusers.QwenImageEditPlusPipeline`.

The vision-language model reads the pictures together with the prompt, and the transformer sees their latents beside
those it denoises. Edit shows both the same picture of about a megapixel. Given a list of one, its oracle leaves the
picture as it is for the vision-language model, and so do we. Edit-Plus shows the vision-language model less: each
picture has its own two sizes. `max_sequence_length` is only checked: the oracles cut no prompt.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from triptych.components.need import Need
from triptych.errors import ParameterError
from triptych.pipelines import qwen_image
from triptych.pipelines.base import Family, check_multiple, check_placeholders
from triptych.roles import RoleType
from triptych.stages.base import Stage
from triptych.state import View

if TYPE_CHECKING:
    import torch

PIXELS = 1024 * 1024
"""The area that the oracles scale a picture to, whatever its size, before they encode it."""

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Kinds of pictures by the channels that an autoencoder takes."""

PLACEHOLDERS = ("<|image_pad|>", "<|video_pad|>")
"""What stands for pictures and videos in the text that the vision-language model reads."""


class TextEncoding(qwen_image.TextEncoding):
    """Turn the prompt, and for guidance the negative prompt, into embeddings, each read together with the pictures."""

    needs = {"text_encoder": Need.hidden(-1, vision=True), "processor": Need.FULL}
    reads = qwen_image.TextEncoding.reads - {"max_sequence_length"} | {"image"}

    def embed(
        self, state: View, prompt: str | None, embeds: torch.Tensor | None, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        encoded: tuple[torch.Tensor, torch.Tensor | None] = self.helpers.encode_prompt(
            prompt=prompt,
            image=self.seen(state.image) if embeds is None else None,
            prompt_embeds=embeds,
            prompt_embeds_mask=mask,
            device=self.device,
        )
        return encoded

    def seen(self, image: Any) -> Any:
        """Return the picture as the vision-language model is shown it."""
        width, height = scaled(first(image), PIXELS)
        return self.helpers.image_processor.resize(image, height, width)


class ImageEncoding(Stage):
    """Turn each picture into packed latents, and tell its shape in tokens."""

    role = RoleType.ENCODER
    # A picture is a video of one frame, and resampling in time begins with the second.
    needs = {"vae": Need.without("decoder", "post_quant_conv", "*.time_conv")}
    reads = {"image"}
    writes = {"image_latents", "image_shapes"}

    def run(self, state: View) -> None:
        import torch

        encoded, shapes = [], []
        for pixels in self.pixels(state):
            pixels = pixels.unsqueeze(2).to(device=self.device, dtype=self.vae.dtype)
            latents = self.helpers._encode_vae_image(image=pixels, generator=None)
            encoded.append(self.pack(latents))
            shapes.append([1, latents.shape[3] // 2, latents.shape[4] // 2])
        state.image_latents, state.image_shapes = torch.cat(encoded, dim=1), shapes

    def pixels(self, state: View) -> Iterable[torch.Tensor]:
        """Go through the pictures as the autoencoder is given them: (1, channels, height, width), from -1 to 1."""
        width, height = scaled(first(state.image), PIXELS)
        processor = self.helpers.image_processor
        yield processor.preprocess(processor.resize(state.image, height, width), height, width)

    def pack(self, latents: torch.Tensor) -> torch.Tensor:
        """Turn latents of shape (1, channels, 1, height, width) into tokens of 2 x 2."""
        packed: torch.Tensor = self.helpers._pack_latents(latents, 1, latents.shape[1], *latents.shape[3:])
        return packed


class QwenEditDenoising(qwen_image.QwenDenoising):
    """Denoise the packed latents, those of the pictures appended."""

    reads = qwen_image.QwenDenoising.reads | {"image_latents", "image_shapes"}

    def noise(self, state: View, rows: int, dtype: torch.dtype) -> torch.Tensor:
        channels = self.transformer.config.in_channels // 4
        latents: torch.Tensor
        latents, _ = self.helpers.prepare_latents(
            None, rows, channels, state.height, state.width, dtype, self.device, state.generator, state.latents
        )
        return latents

    def shapes(self, state: View) -> list[tuple[int, int, int]]:
        return [*super().shapes(state), *((frames, rows, columns) for frames, rows, columns in state.image_shapes)]

    def tokens(self, state: View) -> torch.Tensor:
        import torch

        return torch.cat([state.latents, state.image_latents.expand(len(state.latents), -1, -1)], dim=1)


class QwenImageEdit(Family):
    """Qwen-Image-Edit. Guidance is on where a negative prompt is given, even an empty one, and `true_cfg_scale` > 1."""

    pipelines = ("QwenImageEditPipeline",)
    tasks = {"edit": "a picture edited after a prompt"}
    geometry = {"vae": Need.CONFIG}
    refused = {"attention_kwargs"}

    def compose(self) -> None:
        self.add_stage(TextEncoding)
        self.add_stage(ImageEncoding)
        self.add_stage(QwenEditDenoising)
        self.add_stage(qwen_image.Decoding)

    def admit(self, parameters: dict[str, Any], helpers: Any) -> None:
        images = check_pictures(parameters, helpers, self.viewed_areas())
        if len(images) > 1:
            reason = "one picture is edited; models of QwenImageEditPlusPipeline take several"
            raise ParameterError("image", parameters["image"], reason)
        self.settle(parameters, helpers, images)

    def viewed_areas(self) -> tuple[int, ...]:
        """Return the areas that a picture is scaled to, in pixels; the first is the one that is encoded."""
        return (PIXELS,)

    def settle(self, parameters: dict[str, Any], helpers: Any, images: list[Any]) -> None:
        """Settle the size where it is not given: that of the last picture, scaled; then check the rest."""
        multiple = helpers.vae_scale_factor * 2
        check_multiple(parameters, [name for name in ("height", "width") if parameters[name] is not None], multiple)
        width, height = scaled(images[-1], PIXELS)
        parameters["width"] = parameters["width"] or width // multiple * multiple
        parameters["height"] = parameters["height"] or height // multiple * multiple
        check_placeholders(parameters, ("prompt", "negative_prompt"), PLACEHOLDERS)
        qwen_image.check_given(parameters, helpers, parameters["height"], parameters["width"])
        qwen_image.warn_of_guidance(parameters)


class PlusTextEncoding(TextEncoding):
    """Turn the prompts into embeddings, each read together with all pictures."""

    def seen(self, image: Any) -> Any:
        from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import CONDITION_IMAGE_SIZE

        sizes = [(each, *scaled(each, CONDITION_IMAGE_SIZE)) for each in listed(image)]
        return [self.helpers.image_processor.resize(each, height, width) for each, width, height in sizes]


class PlusImageEncoding(ImageEncoding):
    """Turn each picture into packed latents, and tell its shape in tokens."""

    def pixels(self, state: View) -> Iterable[torch.Tensor]:
        for each in listed(state.image):
            width, height = scaled(each, PIXELS)
            yield self.helpers.image_processor.preprocess(each, height, width)


class QwenImageEditPlus(QwenImageEdit):
    """Qwen-Image-Edit-Plus: as Qwen-Image-Edit, with one or several pictures."""

    pipelines = ("QwenImageEditPlusPipeline",)
    tasks = {"edit": "a picture from a prompt and one or several pictures"}

    def compose(self) -> None:
        self.add_stage(PlusTextEncoding, "text_encoding")
        self.add_stage(PlusImageEncoding, "image_encoding")
        self.add_stage(QwenEditDenoising)
        self.add_stage(qwen_image.Decoding)

    def admit(self, parameters: dict[str, Any], helpers: Any) -> None:
        self.settle(parameters, helpers, check_pictures(parameters, helpers, self.viewed_areas()))
        embeds = parameters["prompt_embeds"]
        if embeds is not None and len(embeds) > 1:
            raise ParameterError("prompt_embeds", embeds, "this pipeline takes one prompt at a time: one row")

    def viewed_areas(self) -> tuple[int, ...]:
        from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import CONDITION_IMAGE_SIZE

        return PIXELS, CONDITION_IMAGE_SIZE


def listed(image: Any) -> list[Any]:
    """Return the pictures of a parameter that is one or a list of them."""
    return list(image) if isinstance(image, (list, tuple)) else [image]


def first(image: Any) -> Any:
    """Return the first picture of a parameter that is one or a list of them."""
    return listed(image)[0]


def scaled(image: Any, area: int) -> tuple[int, int]:
    """Return the width and height that the oracles scale a picture to, for an area in pixels."""
    # Every pipeline of this kind has the same function.
    from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import calculate_dimensions

    width, height = calculate_dimensions(area, image.width / image.height)
    return width, height


def check_pictures(parameters: dict[str, Any], helpers: Any, areas: Iterable[int]) -> list[Any]:
    """Check the pictures of a request and give them the channels that the autoencoder takes, in place.

    The oracles fail for any other kind of picture.

    Args:
        areas: what the pictures will be scaled to; the first area is what is encoded.

    Raises:
        ParameterError: there is none, or one is not usable.
    """
    from PIL.Image import Image
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    given = parameters["image"]
    pictures = [] if given is None else listed(given)
    if not pictures:
        raise ParameterError("image", given, "give a picture: it is what this model works on")
    multiple = helpers.vae_scale_factor * 2
    mode = MODES[helpers.vae.config.input_channels]
    for position, picture in enumerate(pictures):
        if not isinstance(picture, Image):
            raise ParameterError("image", given, f"a PIL image is accepted, not {type(picture).__name__}")
        sizes = [(picture.width, picture.height), *(scaled(picture, area) for area in areas)]
        width, height = sizes[1]
        if min(width, height) < multiple:
            raise ParameterError("image", given, f"too narrow: at {width} x {height} pixels it has no latents")
        try:
            for width, height in sizes:
                smart_resize(height, width)  # the vision-language model's own limits
        except (ValueError, ZeroDivisionError) as error:
            raise ParameterError("image", given, f"too narrow: {error}") from error
        if picture.mode != mode:
            pictures[position] = picture.convert(mode)
    parameters["image"] = pictures if isinstance(given, (list, tuple)) else pictures[0]
    return pictures
