"""FLUX.1 Kontext: editing one reference image, and text to image; guidance embedded, and true guidance beside it.

Oracle: `diffusers.FluxKontextPipeline`, without IP adapters. It fits every size to an area (`max_area`, a megapixel by
default) and the reference image to one of the sizes that the model was trained on (unless `_auto_resize` is False),
whatever the other's is. Given embeddings are repeated for `num_images_per_prompt`, as in FLUX.1.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from triptych.components.need import Need
from triptych.errors import ParameterError
from triptych.pipelines import flux
from triptych.roles import RoleType
from triptych.stages.base import Stage
from triptych.stages.noise_levels import even_sigmas
from triptych.state import View

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)


class ImageEncoding(Stage):
    """Turn the reference image into packed latents, (1, tokens, channels), with their positions, (tokens, 3)."""

    role = RoleType.ENCODER
    tasks = {"edit"}
    needs = {"vae": Need.ENCODE}
    reads = {"image", "prompt_embeds", "_auto_resize"}
    writes = {"image_latents", "image_latent_ids"}

    def run(self, state: View) -> None:
        processor, dtype = self.helpers.image_processor, state.prompt_embeds.dtype
        width, height = reference_size(self.helpers, state.image, state._auto_resize)
        pixels = processor.preprocess(processor.resize(state.image, height, width), height, width)
        latents = self.helpers._encode_vae_image(pixels.to(self.device, self.vae.dtype), generator=None).to(dtype)
        channels, rows, columns = latents.shape[1:]
        state.image_latents = self.helpers._pack_latents(latents, 1, channels, rows, columns)
        ids = self.helpers._prepare_latent_image_ids(1, rows // 2, columns // 2, self.device, dtype)
        ids[..., 0] = 1  # where those of the picture that is made have 0
        state.image_latent_ids = ids


class KontextDenoising(flux.FluxDenoising):
    """Denoise the packed latents, of shape (rows, tokens, channels), those of the reference image appended."""

    reads = flux.FluxDenoising.reads | {"image_latents", "image_latent_ids"}

    def noise(self, state: View, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        channels = self.transformer.config.in_channels // 4
        size, dtype = (state.height, state.width), state.prompt_embeds.dtype
        latents, _, ids, _ = self.helpers.prepare_latents(
            None, rows, channels, *size, dtype, self.device, state.generator, state.latents
        )
        return latents, ids if state.image_latent_ids is None else torch.cat([ids, state.image_latent_ids])

    def sigmas(self, state: View, steps: int) -> Any:
        return even_sigmas(steps) if state.sigmas is None else state.sigmas

    def tokens(self, state: View) -> torch.Tensor:
        import torch

        latents: torch.Tensor = state.latents
        if state.image_latents is None:
            return latents
        return torch.cat([latents, state.image_latents.expand(len(latents), -1, -1)], dim=1)


class FluxKontext(flux.Flux):
    """FLUX.1 Kontext. True guidance is on where a negative prompt is given, even an empty one, and its scale > 1."""

    pipelines = ("FluxKontextPipeline",)
    tasks = {"edit": "a picture from a prompt and a reference image", "text-to-image": "a picture from a prompt"}

    def compose(self) -> None:
        self.add_stage(flux.TextEncoding)
        self.add_stage(ImageEncoding)
        self.add_stage(KontextDenoising)
        self.add_stage(flux.Decoding)

    def task_of(self, parameters: Mapping[str, Any]) -> str:
        return "edit" if parameters["image"] is not None else "text-to-image"

    def admit(self, parameters: dict[str, Any], helpers: Any) -> None:
        for name in ("height", "width"):
            parameters[name] = parameters[name] or helpers.default_sample_size * helpers.vae_scale_factor
        fit_size(parameters, helpers)
        if parameters["image"] is not None:
            check_reference(parameters, helpers)
        flux.check_text(parameters, helpers)


def fit_size(parameters: dict[str, Any], helpers: Any) -> None:
    """Bring height and width to the area that the request allows, and to whole tokens, in place.

    The oracle's arithmetic, which is part of its call and no method of its own.

    Raises:
        ParameterError: there is no area, a side of that shape has no token in it, or the numbers are beyond measure.
    """
    height, width, area = (parameters[name] for name in ("height", "width", "max_area"))
    if area <= 0:
        raise ParameterError("max_area", area, "a number of pixels is accepted")
    multiple = helpers.vae_scale_factor * 2
    try:
        ratio = width / height
        sides = round((area / ratio) ** 0.5), round((area * ratio) ** 0.5)
    except (OverflowError, ZeroDivisionError) as error:
        largest = max(("height", "width", "max_area"), key=lambda name: parameters[name])
        raise ParameterError(largest, parameters[largest], "less is accepted: no picture is as large") from error
    fitted = tuple(side // multiple * multiple for side in sides)
    for name, side in zip(("height", "width"), fitted):
        if not side:
            reason = f"too narrow: at {fitted[1]} x {fitted[0]} pixels, of max_area={area}, a picture has no latents"
            raise ParameterError(name, parameters[name], reason)
        parameters[name] = side
    if fitted != (height, width):
        wanted = f"height={height}, width={width}"
        log.warning("%s is fitted to max_area=%s: height=%s, width=%s", wanted, area, *fitted)


def check_reference(parameters: dict[str, Any], helpers: Any) -> None:
    """Check the reference image and settle it: one picture, in the colours that the autoencoder takes.

    Raises:
        ParameterError: it is none, too small, or there are several.
    """
    from PIL.Image import Image

    given = parameters["image"]
    images = list(given) if isinstance(given, (list, tuple)) else [given]
    if len(images) != 1:
        raise ParameterError("image", given, "one reference image is accepted; leave it out to draw from the prompt")
    (image,) = images
    if not isinstance(image, Image):
        raise ParameterError("image", given, f"a PIL image is accepted, not {type(image).__name__}")
    multiple = helpers.vae_scale_factor * 2
    if min(image.size) < multiple:
        raise ParameterError("image", given, f"too small: at least {multiple} x {multiple} pixels are accepted")
    parameters["image"] = image if image.mode == "RGB" else image.convert("RGB")


def reference_size(helpers: Any, image: Any, auto_resize: bool) -> tuple[int, int]:
    """Return the width and height that the oracle encodes a reference image at.

    Its own, or of the sizes that the model was trained on that of the nearest shape; in whole tokens.
    """
    from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS

    height, width = helpers.image_processor.get_default_height_width(image)
    if auto_resize:
        ratio = width / height
        _, width, height = min((abs(ratio - w / h), w, h) for w, h in PREFERRED_KONTEXT_RESOLUTIONS)
    multiple = helpers.vae_scale_factor * 2
    return width // multiple * multiple, height // multiple * multiple
