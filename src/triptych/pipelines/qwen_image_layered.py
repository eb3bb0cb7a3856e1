"""Qwen-Image-Layered: a picture taken apart into RGBA layers, with a caption that is given or written by the model.

Oracle: `diffusers.QwenImageLayeredPipeline`.

A result has one entry per output, as the oracle's: the layers from the bottom up, as `output_type` says (a list of PIL
images, an array or a tensor). For several outputs the oracle runs one batch, and so do we, with the same numbers; but
it cuts the layers of all outputs into groups of `layers + 1`, where the last ones come out short. Ours have `layers`.
With `output_type="latent"` the oracle fails; a result holds the packed latents then, as after its last step.

An empty prompt is replaced by a caption, which `prompt` of the result then tells. Where the checkpoint's own settings
let captions be sampled, the oracle draws from torch's global random state; here it is set to the request's seed first,
and put back, so that a request always gives the same layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MethodType
from typing import TYPE_CHECKING, Any

from triptych.components.need import Need
from triptych.errors import ParameterError
from triptych.pipelines import qwen_image, qwen_image_edit
from triptych.pipelines.base import Family
from triptych.roles import RoleType
from triptych.stages.base import Stage
from triptych.stages.drawing import seeded
from triptych.state import View

if TYPE_CHECKING:
    import torch

RESOLUTIONS = (640, 1024)
"""The sides of the squares whose area a picture may be scaled to, in pixels; the model knows no others."""

POSITIONS = 32
"""Of how many layers the transformer keeps the positions: of one of 1024 x 1024 pixels they take 2 MiB."""

EMPTY = (None, "", " ")
"""Prompts in whose place the oracle writes a caption."""


class Captioning(Stage):
    """Write a caption of the picture, by the model that encodes the prompt."""

    role = RoleType.ENCODER
    tasks = {"image-to-layers-captioned"}
    needs = {"text_encoder": Need.FULL, "processor": Need.FULL}
    reads = {"image", "resolution", "use_en_prompt", "seed"}
    writes = {"prompt"}

    def run(self, state: View) -> None:
        width, height = scaled(state.image, state.resolution)
        image = self.helpers.image_processor.resize(state.image, height, width)
        with seeded(state.seed, self.device):
            state.prompt = self.helpers.get_image_caption(image, use_en_prompt=state.use_en_prompt, device=self.device)


class ImageEncoding(qwen_image_edit.ImageEncoding):
    """Turn the picture into packed latents, and tell its shape in tokens and the size of its layers."""

    reads = {"image", "resolution"}
    writes = qwen_image_edit.ImageEncoding.writes | {"height", "width"}

    def run(self, state: View) -> None:
        super().run(state)
        state.width, state.height = size_of_layers(state.image, state.resolution, self.helpers)

    def pixels(self, state: View) -> Iterable[torch.Tensor]:
        width, height = scaled(state.image, state.resolution)
        processor = self.helpers.image_processor
        yield processor.preprocess(processor.resize(state.image, height, width), height, width)

    def pack(self, latents: torch.Tensor) -> torch.Tensor:
        rows, columns = latents.shape[3:]
        packed: torch.Tensor = self.helpers._pack_latents(
            latents.permute(0, 2, 1, 3, 4), 1, latents.shape[1], rows, columns, 1
        )
        return packed


class QwenLayeredDenoising(qwen_image_edit.QwenEditDenoising):
    """Denoise the packed latents of the whole picture and of each layer, those of the given picture appended."""

    reads = qwen_image_edit.QwenEditDenoising.reads | {"layers", "cfg_normalize"}
    layered = True

    def __init__(self, name: str, components: Mapping[str, Any], helpers: Any, device: torch.device) -> None:
        super().__init__(name, components, helpers, device)
        limit_positions(self.transformer.pos_embed)

    def noise(self, state: View, rows: int, dtype: torch.dtype) -> torch.Tensor:
        channels = self.transformer.config.in_channels // 4
        height, width = state.height, state.width
        latents: torch.Tensor
        latents, _ = self.helpers.prepare_latents(
            None, rows, channels, height, width, state.layers, dtype, self.device, state.generator, state.latents
        )
        return latents

    def common(self, state: View, rows: int) -> dict[str, Any]:
        import torch

        # The oracle tells the transformer that no picture lacks transparency.
        opaque = torch.zeros(rows, dtype=torch.long, device=self.device)
        return {**super().common(state, rows), "additional_t_cond": opaque}

    def shapes(self, state: View) -> list[tuple[int, int, int]]:
        picture, *given = super().shapes(state)
        return [picture] * (state.layers + 1) + given

    def sigmas(self, steps: int) -> Any:
        import numpy as np

        return np.linspace(1.0, 0, steps + 1)[:-1]

    def shift(self, state: View) -> float:
        # The oracle shifts by the given picture's size beside one of 256 x 256 pixels, in tokens of 16 x 16.
        tokens: int = state.image_latents.shape[1]
        return float((tokens / (256 * 256 / 16 / 16)) ** 0.5)

    def guide(self, state: View, conditional: torch.Tensor, combined: torch.Tensor) -> torch.Tensor:
        return super().guide(state, conditional, combined) if state.cfg_normalize else combined


class Decoding(qwen_image.Decoding):
    """Undo the latents' packing and normalisation and decode each layer to an image with transparency."""

    reads = qwen_image.Decoding.reads | {"layers"}

    def run(self, state: View) -> None:
        if state.output_type == "latent":
            state.images = state.latents
            return
        layers, factor = state.layers, self.helpers.vae_scale_factor
        latents = self.helpers._unpack_latents(state.latents, state.height, state.width, layers, factor)
        latents = self.denormalise(latents)[:, :, 1:]  # the first is the whole picture again
        latents = latents.permute(0, 2, 1, 3, 4).reshape(-1, latents.shape[1], 1, *latents.shape[3:])
        image = self.vae.decode(latents, return_dict=False)[0].squeeze(2)
        images = self.helpers.image_processor.postprocess(image, output_type=state.output_type)
        state.images = [images[start : start + layers] for start in range(0, len(images), layers)]


class QwenImageLayered(Family):
    """Qwen-Image-Layered. Guidance is on where a negative prompt is given, even an empty one, and the scale > 1."""

    pipelines = ("QwenImageLayeredPipeline",)
    tasks = {
        "image-to-layers": "RGBA layers of a picture and its caption",
        "image-to-layers-captioned": "RGBA layers of a picture, whose caption the model writes",
    }
    geometry = {"vae": Need.CONFIG}
    refused = {"attention_kwargs"}
    transparency = True

    def compose(self) -> None:
        self.add_stage(Captioning)
        self.add_stage(qwen_image.TextEncoding)
        self.add_stage(ImageEncoding)
        self.add_stage(QwenLayeredDenoising)
        self.add_stage(Decoding)

    def task_of(self, parameters: Mapping[str, Any]) -> str:
        captioned = parameters["prompt"] in EMPTY and parameters["prompt_embeds"] is None
        return "image-to-layers-captioned" if captioned else "image-to-layers"

    def admit(self, parameters: dict[str, Any], helpers: Any) -> None:
        layers, resolution = parameters["layers"], parameters["resolution"]
        if layers < 1:
            raise ParameterError("layers", layers, "a whole number of at least 1 is accepted")
        if resolution not in RESOLUTIONS:
            raise ParameterError("resolution", resolution, f"{' or '.join(map(str, RESOLUTIONS))} is accepted")
        images = qwen_image_edit.check_pictures(parameters, helpers, (resolution * resolution,))
        if len(images) > 1:
            raise ParameterError("image", parameters["image"], "one picture is taken apart, so give one")
        width, height = size_of_layers(images, resolution, helpers)
        qwen_image.check_given(parameters, helpers, height, width, pictures=layers + 1)
        embeds = parameters["prompt_embeds"]
        if embeds is not None and len(embeds) > 1:
            raise ParameterError("prompt_embeds", embeds, "this pipeline takes one prompt at a time: one row")
        qwen_image.warn_of_guidance(parameters)


def limit_positions(embedder: Any) -> None:
    """Let a transformer's embedder of positions keep a limited number, its own: its class keeps all, for ever."""
    from diffusers.utils.torch_utils import lru_cache_unless_export

    # A transformer that knows no layers has no second one.
    for name in {"_compute_video_freqs", "_compute_condition_freqs"} & vars(type(embedder)).keys():
        compute = MethodType(getattr(type(embedder), name).__wrapped__, embedder)
        setattr(embedder, name, lru_cache_unless_export(maxsize=POSITIONS)(compute))


def scaled(image: Any, resolution: int) -> tuple[int, int]:
    """Return the width and height that the oracle scales the picture to."""
    return qwen_image_edit.scaled(qwen_image_edit.first(image), resolution * resolution)


def size_of_layers(image: Any, resolution: int, helpers: Any) -> tuple[int, int]:
    """Return the width and height that the layers of a picture have."""
    multiple = helpers.vae_scale_factor * 2
    width, height = scaled(image, resolution)
    return width // multiple * multiple, height // multiple * multiple
