"""Wan: image to video; 2.1 from the first frame, or from the first and the last; 2.2 with two transformers; 2.2 TI2V-5B.

Oracle: `diffusers.WanImageToVideoPipeline`. For several outputs of one prompt it fails where the model takes CLIP's
embeddings (2.1): there output k is its single run, with the k-th draw of the same generator for its noise, so every
forward and every decoding is that of one video. Elsewhere several outputs are one batch, as in the oracle.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from triptych.components.need import Need
from triptych.errors import ModelError, ParameterError
from triptych.pipelines.base import in_colour
from triptych.pipelines.wan import Decoding, TextEncoding, Wan, WanDenoising, check_frames, count_videos
from triptych.roles import RoleType
from triptych.stages.base import Stage
from triptych.stages.denoising import Forward
from triptych.state import View

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

FRAMES_ENCODED_AT_ONCE = 4
"""diffusers' autoencoder takes so many frames at a time, whatever its factor, and leaves out those that are over."""

OVER_TIME = "encoder.*.time_conv"
"""The autoencoder's convolutions that join frames to one frame of latents."""

TEXT_TOKENS = 512
"""diffusers' transformer takes this many of its context's last tokens for text, and those before for CLIP's."""


class ImageEmbedding(Stage):
    """Turn the given frames into CLIP's embeddings, for the models that take them.

    `image_embeds` is [frames given, tokens, width]: the last layer but one.
    """

    role = RoleType.ENCODER
    needs = {"image_encoder": Need.hidden(-2).optional(), "image_processor": Need.FULL.optional()}
    reads = {"image", "last_image"}
    writes = {"image_embeds"}

    def run(self, state: View) -> None:
        if self.image_encoder is not None:
            images = state.image if state.last_image is None else [state.image, state.last_image]
            state.image_embeds = self.helpers.encode_image(images, self.device)


class FrameEncoding(Stage):
    """Turn the given frames into latents.

    `image_condition` is a video of latents with the given frames in their places, and before it the channels that tell
    which frames are given: [1, channels, frames, height, width]. For the models with a timestep for each token it is
    the first frame alone, and `first_frame_mask` is 0 there and 1 on all others: [1, 1, frames, height, width].
    """

    role = RoleType.ENCODER
    needs = {"vae": Need.ENCODE}
    reads = {"image", "last_image", "height", "width", "num_frames"}
    writes = {"image_condition", "first_frame_mask"}

    def run(self, state: View) -> None:
        import torch

        _, condition, *mask = self.helpers.prepare_latents(
            image=self.pixels(state, state.image),
            batch_size=1,
            height=state.height,
            width=state.width,
            num_frames=state.num_frames,
            dtype=torch.float32,
            device=self.device,
            # The helper draws the noise too, where it is given none; ours is drawn in the denoiser.
            latents=torch.empty(0, dtype=torch.float32, device=self.device),
            last_image=None if state.last_image is None else self.pixels(state, state.last_image),
        )
        state.image_condition = condition
        state.first_frame_mask = mask[0] if mask else None

    def pixels(self, state: View, image: Any) -> torch.Tensor:
        """Return an image at the video's size, float32 between -1 and 1: [1, 3, height, width]."""
        import torch

        pixels = self.helpers.video_processor.preprocess(image, height=state.height, width=state.width)
        moved: torch.Tensor = pixels.to(self.device, dtype=torch.float32)
        return moved


class FirstFrameEncoding(FrameEncoding):
    """Turn the first frame alone into latents: the encoder's convolutions over time do not run."""

    needs = {"vae": Need.without(*Need.ENCODE.unused, OVER_TIME)}


class I2VDenoising(WanDenoising):
    """Denoise the video latents beside the given frames' latents, in float32 between the steps."""

    reads = {*WanDenoising.reads, "image_embeds", "image_condition", "first_frame_mask"}
    writes = {*WanDenoising.writes, "one_by_one"}

    def begin(self, state: View) -> None:
        state.one_by_one = state.image_embeds is not None and state.num_videos_per_prompt > 1
        super().begin(state)

    def noise(self, state: View, videos: int) -> torch.Tensor:
        import torch
        from diffusers.utils.torch_utils import randn_tensor

        if state.latents is not None:
            given: torch.Tensor = state.latents.to(self.device, dtype=torch.float32)
            return given
        frames = state.image_condition if state.first_frame_mask is None else state.first_frame_mask
        shape = (self.helpers.vae.config.z_dim, *frames.shape[2:])
        draws = [1] * videos if state.one_by_one else [videos]
        drawn = (
            randn_tensor((count, *shape), generator=state.generator, device=self.device, dtype=torch.float32)
            for count in draws
        )
        return torch.cat(list(drawn))

    def model_inputs(self, state: View, i: int) -> list[Forward]:
        videos = len(state.latents)
        rows = 1 if state.one_by_one else videos
        model = "transformer_2" if state.late_steps[i] else "transformer"
        images = None if state.image_embeds is None else state.image_embeds.repeat(rows, 1, 1)
        common = {
            "timestep": self.timestep(state, i)[:rows],
            "encoder_hidden_states_image": images if images is None else images.to(self.transformer_dtype),
        }
        hidden = self.hidden_states(state)
        return [
            Forward(
                model,
                branch if not first else f"{branch}_{first}",
                {
                    "hidden_states": hidden[first : first + rows],
                    "encoder_hidden_states": embeds[first : first + rows],
                    **common,
                },
            )
            for branch, embeds in state.conditioning.items()
            for first in range(0, videos, rows)
        ]

    def hidden_states(self, state: View) -> torch.Tensor:
        """Join the latents with those of the given frames: as more channels, or in the first frame's place."""
        import torch

        joined = (
            torch.cat([state.latents, state.image_condition.repeat(len(state.latents), 1, 1, 1, 1)], dim=1)
            if state.first_frame_mask is None
            else self.with_first_frame(state)
        )
        return joined.to(self.transformer_dtype)

    def with_first_frame(self, state: View) -> torch.Tensor:
        mask = state.first_frame_mask
        replaced: torch.Tensor = (1 - mask) * state.image_condition + mask * state.latents
        return replaced

    def timestep(self, state: View, i: int) -> torch.Tensor:
        t, videos = state.timesteps[i], len(state.latents)
        if state.first_frame_mask is None:
            one: torch.Tensor = t.expand(videos)
            return one
        # The oracle takes every second row and column, whatever the transformer's patch size.
        each: torch.Tensor = (state.first_frame_mask[0][0][:, ::2, ::2] * t).flatten().unsqueeze(0).expand(videos, -1)
        return each

    def advance(self, state: View, i: int, prediction: Sequence[torch.Tensor]) -> None:
        import torch

        if state.one_by_one:
            videos = len(state.latents)
            prediction = [torch.cat(list(prediction[at : at + videos])) for at in range(0, len(prediction), videos)]
        super().advance(state, i, prediction)

    def finish(self, state: View) -> None:
        if state.first_frame_mask is not None:
            state.latents = self.with_first_frame(state)


class I2VDecoding(Decoding):
    """Undo the latents' normalisation and decode them to frames."""

    reads = {*Decoding.reads, "one_by_one"}

    def video(self, state: View) -> torch.Tensor:
        import torch

        if not state.one_by_one:
            return super().video(state)
        return torch.cat([self.decode(latents) for latents in state.latents.split(1)])


class FirstFrameDecoding(I2VDecoding):
    """Undo the latents' normalisation and decode them to frames."""

    # Named although they are part of the encoder: a whole model leaves out what both stages name.
    needs = {"vae": Need.without(*Need.DECODE.unused, OVER_TIME)}


class WanImageToVideo(Wan):
    """Wan 2.1 and 2.2, image to video."""

    pipelines = ("WanImageToVideoPipeline",)
    tasks = {"image-to-video": "a video from a prompt and its first frame, or its first and its last"}
    # The oracle takes embeddings of an image only instead of the image, without which it fails later.
    refused = {*Wan.refused, "image_embeds"}

    def compose(self) -> None:
        self.add_stage(TextEncoding)
        self.add_stage(ImageEmbedding)
        first_only = self.repository.options.get("expand_timesteps")
        self.add_stage(FirstFrameEncoding if first_only else FrameEncoding, "frame_encoding")
        self.add_stage(I2VDenoising)
        self.add_stage(FirstFrameDecoding if first_only else I2VDecoding, "decoding")

    @property
    def takes_image_embeds(self) -> bool:
        """Whether the transformer takes CLIP's embeddings, as those of 2.1 do."""
        return self.repository.config("transformer").get("image_dim") is not None

    def present(self, needs: Mapping[str, Need]) -> dict[str, Need]:
        """Leave out CLIP too, where the transformer has no use for it."""
        present = super().present(needs)
        if self.takes_image_embeds:
            return present
        return {name: need for name, need in present.items() if name not in ImageEmbedding.needs}

    def check(self) -> None:
        super().check()
        if self.takes_image_embeds:
            for name in ImageEmbedding.needs:
                if name not in self.repository.components:
                    raise ModelError(
                        f"{self.repository.name} has no component {name!r}, but its transformer takes embeddings of "
                        "the image (`image_dim`)"
                    )

    def admit(self, parameters: dict[str, Any], helpers: Any) -> None:
        transformer = helpers.transformer.config
        parameters["image"] = single_image("image", parameters["image"])
        if parameters["last_image"] is not None:
            parameters["last_image"] = single_image("last_image", parameters["last_image"])
        check_last_image(
            parameters["image"], parameters["last_image"], transformer, per_token=helpers.config.expand_timesteps
        )
        super().admit(parameters, helpers)
        self.check_frames_to_encode(parameters, helpers)
        tokens = parameters["max_sequence_length"]
        if transformer.added_kv_proj_dim is not None and tokens != TEXT_TOKENS:
            log.warning(
                "max_sequence_length=%s: diffusers' Wan tells text from image by counting %s tokens of text; any "
                "other length mixes the two, as it does in diffusers",
                tokens,
                TEXT_TOKENS,
            )

    def shape_of_latents(self, parameters: Mapping[str, Any], helpers: Any) -> tuple[int | None, ...]:
        frames = (parameters["num_frames"] - 1) // helpers.vae_scale_factor_temporal + 1
        sides = (parameters[name] // helpers.vae_scale_factor_spatial for name in ("height", "width"))
        sizes = (helpers.vae.config.z_dim, frames, *sides)
        given = tuple(getattr(parameters["latents"], "shape", ()))[1:]
        if helpers.config.expand_timesteps and len(given) == len(sizes):
            # They are added to the first frame's, which repeats what there is only one of.
            sizes = tuple(1 if own == 1 else size for own, size in zip(given, sizes))
        return (count_videos(parameters), *sizes)

    def check_frames_to_encode(self, parameters: Mapping[str, Any], helpers: Any) -> None:
        """Check the number of frames of a video that is encoded whole: the given ones, and black between.

        Raises:
            ParameterError: the autoencoder would not encode all of it, or there is no room for the last frame.
        """
        if helpers.config.expand_timesteps:
            return
        frames = parameters["num_frames"]
        multiple = math.lcm(FRAMES_ENCODED_AT_ONCE, helpers.vae_scale_factor_temporal)
        if frames == 1 and parameters["last_image"] is not None:
            accepted = f"with a first and a last frame, {multiple + 1} or more are accepted"
            raise ParameterError("num_frames", frames, accepted)
        check_frames(frames, multiple)


def single_image(name: str, image: Any) -> Any:
    """Return the one image that a request gives under `name`, out of its list if it is in one.

    Raises:
        ParameterError: it is none, or there are several.
    """
    import torch
    from PIL import Image

    if isinstance(image, (list, tuple)) and len(image) == 1:
        image = image[0]
    if image is None:
        raise ParameterError(name, image, "the video's first frame is missing")
    if isinstance(image, (list, tuple)) or (isinstance(image, torch.Tensor) and image.ndim == 4 and len(image) != 1):
        raise ParameterError(name, image, f"one image is accepted, not {len(image)}; the last frame is `last_image`")
    if not isinstance(image, (torch.Tensor, Image.Image)):
        raise ParameterError(name, image, f"a PIL image or a tensor is accepted, not {type(image).__name__}")
    return in_colour(image)


def check_last_image(image: Any, last_image: Any, transformer: Any, *, per_token: bool) -> None:
    """Check that a last frame is given to a model that must have one, and to none that cannot have it.

    Raises:
        ParameterError: it is not.
    """
    import torch

    if last_image is None:
        if transformer.pos_embed_seq_len is not None:
            raise ParameterError("last_image", None, "this model makes a video from its first and its last frame")
    elif per_token or (transformer.image_dim is not None and transformer.pos_embed_seq_len is None):
        raise ParameterError("last_image", last_image, "this model makes a video from its first frame only")
    embedded = last_image is not None and transformer.image_dim is not None
    if embedded and isinstance(image, torch.Tensor) and not isinstance(last_image, torch.Tensor):  # by one call
        raise ParameterError("last_image", type(last_image).__name__, "a tensor is accepted, as the first frame is one")
