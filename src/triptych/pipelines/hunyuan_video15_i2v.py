"""HunyuanVideo 1.5: image to video; guided by the model's own guider, or distilled, also to few steps (MeanFlow).

Oracle: `diffusers.HunyuanVideo15ImageToVideoPipeline`. For several outputs of one prompt it can make latents, as one
batch, but not decode them: the autoencoder cannot decode two videos at once. So latents are as in the oracle; of
videos, output k is its single run, with the k-th draw of the same generator for its noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from triptych.components.need import Need
from triptych.errors import ParameterError
from triptych.pipelines.base import check_multiple
from triptych.pipelines.hunyuan_video15 import (
    Decoding,
    HunyuanDenoising,
    HunyuanVideo15,
    TextEncoding,
    multiple_of,
)
from triptych.roles import RoleType
from triptych.stages.base import Stage
from triptych.state import View

if TYPE_CHECKING:
    import torch


class ImageEncoding(Stage):
    """Turn the first frame into SigLIP's embeddings and into latents, at the size that its shape gives the video.

    `image_embeds` is [1, tokens, width], `image_latents` [1, channels, 1, height, width].
    """

    role = RoleType.ENCODER
    needs = {"image_encoder": Need.BODY, "feature_extractor": Need.FULL, "vae": Need.ENCODE}
    reads = {"image"}
    writes = {"image_embeds", "image_latents", "height", "width"}

    def run(self, state: View) -> None:
        processor = self.helpers.video_processor
        state.height, state.width = size_of(self.helpers, state.image)
        image = processor.resize(state.image, height=state.height, width=state.width, resize_mode="crop")
        state.image_embeds = self.helpers.encode_image(
            image, batch_size=1, device=self.device, dtype=self.helpers.transformer.dtype
        )
        state.image_latents = self.helpers._get_image_latents(
            self.vae, processor, image, state.height, state.width, self.device
        )


class I2VDenoising(HunyuanDenoising):
    """Denoise the video latents beside those of the first frame."""

    reads = {*HunyuanDenoising.reads, "image_embeds", "image_latents", "output_type"}

    def rows(self, state: View) -> int:
        videos: int = state.num_videos_per_prompt
        return videos if state.output_type == "latent" else 1

    def image_embeds(self, state: View) -> torch.Tensor:
        embeds: torch.Tensor = state.image_embeds
        return embeds.repeat(len(state.latents), 1, 1)

    def frames(self, state: View) -> torch.Tensor:
        import torch

        latents, given = torch.zeros_like(state.latents), torch.zeros_like(state.latents[:, :1])
        latents[:, :, :1], given[:, :, :1] = state.image_latents, 1
        return torch.cat([latents, given], dim=1)

    def times(self, state: View, i: int) -> dict[str, torch.Tensor]:
        times = super().times(state, i)
        if self.transformer.config.use_meanflow:
            last = i == len(state.timesteps) - 1
            times["timestep_r"] = state.timesteps.new_zeros(1) if last else state.timesteps[i + 1]
        return times


class HunyuanVideo15ImageToVideo(HunyuanVideo15):
    """HunyuanVideo 1.5, image to video. The image's shape decides the video's size."""

    pipelines = ("HunyuanVideo15ImageToVideoPipeline",)
    tasks = {"image-to-video": "a video from a prompt and its first frame"}

    def compose(self) -> None:
        self.add_stage(TextEncoding)
        self.add_stage(ImageEncoding)
        self.add_stage(I2VDenoising)
        self.add_stage(Decoding)

    def admit(self, parameters: dict[str, Any], helpers: Any) -> None:
        parameters["image"] = single_image(parameters["image"])
        super().admit(parameters, helpers)

    def check_size(self, parameters: dict[str, Any], helpers: Any) -> None:
        sizes = dict(zip(("height", "width"), size_of(helpers, parameters["image"])))
        check_multiple(sizes, sizes, multiple_of(helpers))

    def sides_of_latents(self, parameters: Mapping[str, Any], helpers: Any) -> tuple[int | None, int | None]:
        height, width = size_of(helpers, parameters["image"])
        return height // helpers.vae_scale_factor_spatial, width // helpers.vae_scale_factor_spatial


def size_of(helpers: Any, image: Any) -> tuple[int, int]:
    """Return the height and width of the video that a first frame gives: of the model's area, nearest in shape."""
    height, width = helpers.video_processor.calculate_default_height_width(
        height=image.height, width=image.width, target_size=helpers.target_size
    )
    return height, width


def single_image(image: Any) -> Any:
    """Return the one picture that a request gives, out of its list if it is in one.

    Raises:
        ParameterError: it is none, or there are several.
    """
    from PIL import Image

    images = list(image) if isinstance(image, (list, tuple)) else [image]
    if images == [None]:
        raise ParameterError("image", None, "the video's first frame is missing")
    if len(images) != 1:
        raise ParameterError("image", image, f"one image is accepted, the video's first frame, not {len(images)}")
    if not isinstance(images[0], Image.Image):
        raise ParameterError("image", image, f"a PIL image is accepted, not {type(images[0]).__name__}")
    return images[0]
