"""Helios: text, image and video to long video, chunk by chunk, each chunk in sight of those before it.

Oracle: `diffusers.HeliosPipeline` (paper: arxiv.org/abs/2603.04379). Of its parameters, it never reads `latents`, and
it fails without `keep_first_frame`. For several outputs of one prompt it fails too: there what is given is encoded and
noised once, and output k is the oracle's single run in which every draw of the denoiser is the k-th of as many draws
of the same generator; every forward, step and decoding is that of one video. Given embeddings of several prompts are
one batch, as in the oracle.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from triptych.components.need import Need
from triptych.errors import ModelError, ParameterError
from triptych.pipelines.base import Family, check_inputs, check_multiple, check_tensors, in_colour
from triptych.pipelines.wan import EMBEDDINGS, SIZE_MULTIPLE, Decoding, TextEncoding
from triptych.roles import RoleType
from triptych.stages.base import Stage
from triptych.stages.denoising import Denoising, Forward
from triptych.stages.noise_levels import resolution_shift
from triptych.state import View

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

TEXT, IMAGE, VIDEO = "text-to-video", "image-to-video", "video-to-video"
INDICES = ("indices_latents_history_long", "indices_latents_history_mid", "indices_latents_history_short")
HISTORIES = ("latents_history_long", "latents_history_mid", "latents_history_short")


class FrameEncoding(Stage):
    """Turn the given image or video into latents, and noise those a little. The draws begin here.

    All are float32, [1, channels, frames, height, width]. `image_latents` is the frame that every chunk sees: the
    image, or the first frame of the video. `fake_image_latents` is the last frame of a still video of the image, and
    `video_latents` as many of the video's last frames as make whole chunks; both are history to the first chunk.
    """

    role = RoleType.ENCODER
    tasks = {IMAGE, VIDEO}
    needs = {"vae": Need.ENCODE}
    writes = {"image_latents", "fake_image_latents", "video_latents"}
    reads = {
        "image", "video", "generator", "height", "width", "num_latent_frames_per_chunk", "add_noise_to_image_latents",
        "image_noise_sigma_min", "image_noise_sigma_max", "add_noise_to_video_latents", "video_noise_sigma_min",
        "video_noise_sigma_max", *writes,
    }  # fmt: skip

    def run(self, state: View) -> None:
        if state.image is not None:
            self.encode_image(state)
        if state.image_latents is not None and state.add_noise_to_image_latents:
            state.image_latents = self.noised(state, state.image_latents, self.image_sigmas(state))
            # Of the video's strength, though it is made of the image.
            state.fake_image_latents = self.noised(state, state.fake_image_latents, self.video_sigmas(state, 1))
        if state.video is not None:
            self.encode_video(state)
        if state.video_latents is not None and state.add_noise_to_video_latents:
            state.image_latents = self.noised(state, state.image_latents, self.image_sigmas(state))
            state.video_latents = self.noised_video(state)

    def encode_image(self, state: View) -> None:
        state.image_latents, state.fake_image_latents = self.helpers.prepare_image_latents(
            self.helpers.video_processor.preprocess(state.image, height=state.height, width=state.width),
            latents=state.image_latents,
            fake_latents=state.fake_image_latents,
            **self.encoding(state),
        )

    def encode_video(self, state: View) -> None:
        state.image_latents, state.video_latents = self.helpers.prepare_video_latents(
            self.helpers.video_processor.preprocess_video(state.video, height=state.height, width=state.width),
            **self.encoding(state),
        )

    def encoding(self, state: View) -> dict[str, Any]:
        """Return what the helpers take for image and video alike."""
        import torch

        config = self.vae.config
        mean, std = (
            torch.tensor(each).view(1, config.z_dim, 1, 1, 1).to(self.device, self.vae.dtype)
            for each in (config.latents_mean, config.latents_std)
        )
        return {
            "latents_mean": mean,
            "latents_std": 1.0 / std,
            "num_latent_frames_per_chunk": state.num_latent_frames_per_chunk,
            "dtype": torch.float32,
            "device": self.device,
            "generator": state.generator,
        }

    def noised_video(self, state: View) -> torch.Tensor:
        """Noise the video chunk by chunk, each frame by a strength of its own; what is no whole chunk is left out."""
        import torch

        frames = state.num_latent_frames_per_chunk
        chunks = state.video_latents.split(frames, dim=2)[: state.video_latents.shape[2] // frames]
        return torch.cat([self.noised(state, chunk, self.video_sigmas(state, frames)) for chunk in chunks], dim=2)

    def image_sigmas(self, state: View) -> torch.Tensor:
        return self.sigmas(state, 1, state.image_noise_sigma_min, state.image_noise_sigma_max)

    def video_sigmas(self, state: View, frames: int) -> torch.Tensor:
        return self.sigmas(state, frames, state.video_noise_sigma_min, state.video_noise_sigma_max)

    def sigmas(self, state: View, frames: int, low: float, high: float) -> torch.Tensor:
        """Draw the strength of the noise on each of so many frames: [1, 1, frames, 1, 1]."""
        import torch

        # Drawn where the generator is; the oracle cannot draw them on another device than the model's.
        drawn = torch.rand(frames, generator=state.generator, device=state.generator.device).to(self.device)
        strengths: torch.Tensor = (drawn * (high - low) + low).view(1, 1, frames, 1, 1)
        return strengths

    def noised(self, state: View, latents: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
        from diffusers.utils.torch_utils import randn_tensor

        noise: torch.Tensor = randn_tensor(latents.shape, generator=state.generator, device=self.device)
        return sigmas * noise + (1 - sigmas) * latents


@dataclass(frozen=True)
class Pass:
    """A run of steps under one setting of the scheduler: those of a chunk, or of one level of its pyramid.

    Attributes:
        first: the first step's number in the whole loop.
        settings: the arguments of the scheduler's `set_timesteps`.
    """

    chunk: int
    level: int
    first: int
    settings: Mapping[str, Any]


class HeliosDenoising(Denoising):
    """Denoise a video's chunks one after another; all their steps are one loop.

    A chunk begins where the one before it ends: in `begin` and in `advance`. `latents` is the chunk being denoised, and
    `latent_chunks` has those that are done: [videos, channels, frames, height, width], float32. `history` is what the
    next chunk looks back at, `first_frame` the frame it always sees, and `given_latents`, for the output type `latent`
    alone, the frames before the first chunk. `videos_per_batch` is how many videos are one batch in the oracle.
    """

    needs = {"transformer": Need.FULL, "scheduler": Need.FULL}
    reads = {
        "prompt_embeds", "negative_prompt_embeds", "image_latents", "fake_image_latents", "video_latents", "generator",
        "height", "width", "num_frames", "num_videos_per_prompt", "num_inference_steps", "sigmas", "guidance_scale",
        "history_sizes", "num_latent_frames_per_chunk", "is_skip_first_chunk", "output_type", "exact",
    }  # fmt: skip
    writes = {
        "latents", "latent_chunks", "given_latents", "videos_per_batch", "conditioning", "history", "first_frame",
        "schedulers", "passes", "timesteps",
    }  # fmt: skip
    shared = frozenset(("indices_hidden_states", *INDICES))

    def begin(self, state: View) -> None:
        import torch

        copies = state.num_videos_per_prompt
        branches = {"cond": state.prompt_embeds, "uncond": state.negative_prompt_embeds}
        text = {
            branch: embeds.to(self.transformer_dtype).repeat_interleave(copies, dim=0)
            for branch, embeds in branches.items()
            if embeds is not None
        }
        state.conditioning = {"text": text, "indices": self.indices(state), "histories": {}}
        state.videos_per_batch = len(state.prompt_embeds)
        state.first_frame = repeated(state.image_latents, copies)
        self.begin_history(state, len(text["cond"]))
        state.latent_chunks = []
        state.schedulers = [self.new_scheduler() for _ in range(copies)]
        passes: list[Pass] = []
        timesteps = []
        for chunk in range(self.chunks(state)):
            for level, settings in enumerate(self.settings(state, chunk)):
                state.schedulers[0].set_timesteps(**settings)
                each = Pass(chunk, level, len(passes), settings)
                passes += [each] * len(state.schedulers[0].timesteps)
                timesteps.append(state.schedulers[0].timesteps)
        state.passes, state.timesteps = passes, torch.cat(timesteps)
        self.begin_pass(state, passes[0])

    def chunks(self, state: View) -> int:
        """Return how many chunks make a video of at least the frames asked for."""
        chunks: int = math.ceil(state.num_frames / self.frames_per_chunk(state))
        return chunks

    def frames_per_chunk(self, state: View) -> int:
        frames: int = (state.num_latent_frames_per_chunk - 1) * self.helpers.vae_scale_factor_temporal + 1
        return frames

    def size(self, state: View) -> tuple[int, int]:
        """Return height and width of the video's latents."""
        factor = self.helpers.vae_scale_factor_spatial
        return state.height // factor, state.width // factor

    def indices(self, state: View) -> dict[str, torch.Tensor]:
        """Return where in time each part of the transformer's input lies; the frame always seen comes first of all."""
        import torch

        sizes = [1, *state.history_sizes, state.num_latent_frames_per_chunk]
        prefix, long, mid, short, latents = torch.split(torch.arange(sum(sizes)), sizes)
        histories = dict(zip(INDICES, (long, mid, torch.cat([prefix, short]))))
        return {name: each.unsqueeze(0) for name, each in {"indices_hidden_states": latents, **histories}.items()}

    def begin_history(self, state: View, videos: int) -> None:
        """Set what the first chunk looks back at: what is given, and zeros before it."""
        import torch

        given = (state.fake_image_latents, state.video_latents)
        fake, video = (repeated(each, state.num_videos_per_prompt) for each in given)
        shape = (videos, self.transformer.config.in_channels, sum(state.history_sizes), *self.size(state))
        history = torch.zeros(shape, device=self.device, dtype=torch.float32)
        frames = 0
        if fake is not None:
            history = torch.cat([history[:, :, :-1], fake], dim=2)
            frames += 1
        if video is not None:
            kept = max(0, history.shape[2] - video.shape[2])
            history = torch.cat([history[:, :, :kept], video], dim=2) if kept else video
            frames += video.shape[2]
        state.given_latents = history[:, :, -frames:] if frames and state.output_type == "latent" else None
        state.history = history[:, :, -sum(state.history_sizes) :]

    def settings(self, state: View, chunk: int) -> list[dict[str, Any]]:
        """Return the arguments of the scheduler's `set_timesteps` for each level of a chunk."""
        import numpy as np

        steps, sigmas = state.num_inference_steps, state.sigmas
        sigmas = np.linspace(0.999, 0.0, steps + 1)[:-1] if sigmas is None else np.asarray(sigmas)
        shift = self.shift(state, *self.size(state))
        return [{"num_inference_steps": steps, "device": self.device, "sigmas": sigmas, "mu": shift}]

    def shift(self, state: View, height: int, width: int) -> float:
        """Return how far the scheduler shifts the noise levels of a chunk of this size."""
        from diffusers.pipelines.helios.pipeline_helios import calculate_shift

        tokens = state.num_latent_frames_per_chunk * height * width // math.prod(self.transformer.config.patch_size)
        return resolution_shift(calculate_shift, self.scheduler.config, tokens)

    def begin_pass(self, state: View, each: Pass) -> None:
        """Set the schedulers and the latents to the start of a pass; the first of a chunk looks back too."""
        import torch

        if each.level == 0:
            state.conditioning = {**state.conditioning, "histories": self.histories(state)}
        for scheduler in state.schedulers:
            scheduler.set_timesteps(**each.settings)
        before = [None] * len(state.schedulers) if each.level == 0 else state.latents.split(state.videos_per_batch)
        state.latents = torch.cat([self.start(state, each, latents) for latents in before])

    def histories(self, state: View) -> dict[str, torch.Tensor]:
        """Return what a chunk looks back at, far, nearer and near, in the transformer's dtype."""
        import torch

        long, mid, short = state.history.split(state.history_sizes, dim=2)
        first = state.first_frame
        if first is None:
            first = short.new_zeros((*short.shape[:2], 1, *short.shape[3:]))
        parts = (long, mid, torch.cat([first, short], dim=2))
        return {name: part.to(self.transformer_dtype) for name, part in zip(HISTORIES, parts)}

    def start(self, state: View, each: Pass, latents: torch.Tensor | None) -> torch.Tensor:
        """Return the latents that a pass starts from, for the videos of one batch; `latents` come from a level below."""
        return self.noise(state)

    def noise(self, state: View) -> torch.Tensor:
        """Draw the noise of a chunk, for the videos of one batch."""
        import torch

        noise: torch.Tensor = self.helpers.prepare_latents(
            state.videos_per_batch,
            self.transformer.config.in_channels,
            state.height,
            state.width,
            self.frames_per_chunk(state),
            dtype=torch.float32,
            device=self.device,
            generator=state.generator,
        )
        return noise

    def model_inputs(self, state: View, i: int) -> list[Forward]:
        rows, videos = state.videos_per_batch, len(state.latents)
        tensors = {"hidden_states": state.latents.to(self.transformer_dtype), **state.conditioning["histories"]}
        common = {"timestep": self.timestep(state, i).expand(rows), **state.conditioning["indices"]}
        return [
            Forward(
                "transformer",
                branch if not first else f"{branch}_{first}",
                {
                    **{name: tensor[first : first + rows] for name, tensor in tensors.items()},
                    "encoder_hidden_states": embeds[first : first + rows],
                    **common,
                },
            )
            for branch, embeds in state.conditioning["text"].items()
            for first in range(0, videos, rows)
        ]

    def timestep(self, state: View, i: int) -> torch.Tensor:
        """Return step i's timestep as the transformer gets it: not a whole number."""
        timestep: torch.Tensor = state.timesteps[i]
        return timestep

    def advance(self, state: View, i: int, prediction: Sequence[torch.Tensor]) -> None:
        import torch

        batches = len(state.schedulers)
        branches = [prediction[at : at + batches] for at in range(0, len(prediction), batches)]
        stepped = []
        for number, latents in enumerate(state.latents.split(state.videos_per_batch)):
            noise, *rest = (branch[number] for branch in branches)
            for unconditional in rest:
                noise = self.guide(state, i, noise, unconditional)
            stepped.append(self.step(state, i, number, noise, latents))
        state.latents = torch.cat(stepped)
        self.go_on(state, i)

    def guide(self, state: View, i: int, conditional: torch.Tensor, unconditional: torch.Tensor) -> torch.Tensor:
        guided: torch.Tensor = unconditional + state.guidance_scale * (conditional - unconditional)
        return guided

    def step(self, state: View, i: int, number: int, noise: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """Take the scheduler's step for the videos of batch `number`."""
        scheduler, t = state.schedulers[number], state.timesteps[i]
        stepped: torch.Tensor = scheduler.step(noise, t, latents, generator=state.generator, return_dict=False)[0]
        return stepped

    def go_on(self, state: View, i: int) -> None:
        """After the last step of a pass, begin the next; after the last of a chunk, put the chunk away before."""
        this, following = state.passes[i], None if i + 1 == len(state.passes) else state.passes[i + 1]
        if following is this:
            return
        if following is None or following.chunk != this.chunk:
            self.end_chunk(state, this.chunk)
        if following is not None:
            self.begin_pass(state, following)

    def end_chunk(self, state: View, chunk: int) -> None:
        """Add a finished chunk to those that are done, and to what the next looks back at."""
        import torch

        if state.first_frame is None or (state.is_skip_first_chunk and chunk == 1):
            state.first_frame = state.latents[:, :, :1]
        frames = state.latents.shape[2]
        history = torch.cat([state.history, state.latents], dim=2)
        state.latent_chunks = [*state.latent_chunks, history[:, :, -frames:].contiguous()]
        state.history = history[:, :, -sum(state.history_sizes) :]


class HeliosDecoding(Decoding):
    """Decode each chunk by itself and join them, less the frames that are over at the end."""

    reads = {"latent_chunks", "given_latents", "videos_per_batch", "output_type"}

    def run(self, state: View) -> None:
        import torch

        state.fps = Helios.fps
        if state.output_type == "latent":
            given = [] if state.given_latents is None else [state.given_latents]
            state.frames = torch.cat([*given, *state.latent_chunks], dim=2)
            return
        video = torch.cat([self.chunk(state, latents) for latents in state.latent_chunks], dim=2)
        factor = self.helpers.vae_scale_factor_temporal
        video = video[:, :, : (video.shape[2] - 1) // factor * factor + 1]
        state.frames = self.helpers.video_processor.postprocess_video(video, output_type=state.output_type)

    def chunk(self, state: View, latents: torch.Tensor) -> torch.Tensor:
        """Return a chunk's pixels, between -1 and 1: [videos, 3, frames, height, width]."""
        import torch

        return torch.cat([self.decode(each) for each in torch.split(latents, state.videos_per_batch)])


class Helios(Family):
    """Helios. Videos are whole chunks long: as many as it takes for the frames asked for."""

    pipelines = ("HeliosPipeline",)
    tasks = {
        TEXT: "a video from a prompt",
        IMAGE: "a video from a prompt and an image",
        VIDEO: "a video from a prompt that goes on from a video",
    }
    geometry = {"vae": Need.CONFIG}
    admission = {"transformer": Need.CONFIG}
    refused = {"attention_kwargs", "latents", "keep_first_frame"}
    fps = 24

    def compose(self) -> None:
        self.add_stage(TextEncoding)
        self.add_stage(FrameEncoding)
        self.add_stage(HeliosDenoising)
        self.add_stage(HeliosDecoding, "decoding")

    def task_of(self, parameters: Mapping[str, Any]) -> str:
        if parameters["video"] is not None or parameters["video_latents"] is not None:
            return VIDEO
        given = ("image", "image_latents", "fake_image_latents")
        return TEXT if all(parameters[name] is None for name in given) else IMAGE

    def check(self) -> None:
        super().check()
        self.check_scheduler()

    def check_scheduler(self) -> None:
        """Check that the scheduler is one that the pipeline can step.

        Raises:
            ModelError: it is not.
        """
        stages = self.repository.config("scheduler").get("stages")
        if stages != 1:
            raise ModelError(
                f"{self.repository.name} has a scheduler for pyramids (stages={stages!r}); those are made by "
                "HeliosPyramidPipeline, and HeliosPipeline needs stages=1"
            )

    def enlargement(self, parameters: Mapping[str, Any]) -> float:
        made = self.chunks(parameters) * self.frames_per_chunk(parameters)
        seen: int = sum(parameters["history_sizes"]) * self.frames_per_latent  # what a chunk looks back at takes room
        return (made + seen) / int(parameters["num_frames"])

    @property
    def frames_per_latent(self) -> int:
        frames = self.repository.config("vae").get("scale_factor_temporal", 4)
        return frames if isinstance(frames, int) else 4

    def chunks(self, parameters: Mapping[str, Any]) -> int:
        return math.ceil(int(parameters["num_frames"]) / self.frames_per_chunk(parameters))

    def frames_per_chunk(self, parameters: Mapping[str, Any]) -> int:
        return (int(parameters["num_latent_frames_per_chunk"]) - 1) * self.frames_per_latent + 1

    def admit(self, parameters: dict[str, Any], helpers: Any) -> None:
        patch = helpers.transformer.config.patch_size[1:]
        for name, pixels in zip(("height", "width"), patch):
            multiple = math.lcm(SIZE_MULTIPLE, helpers.vae_scale_factor_spatial * pixels * self.shrinks(parameters))
            check_multiple(parameters, (name,), multiple)
        check_tensors(parameters, EMBEDDINGS)
        check_inputs(helpers, parameters)
        check_whole("num_latent_frames_per_chunk", parameters["num_latent_frames_per_chunk"], 1)
        parameters["history_sizes"] = check_history_sizes(parameters["history_sizes"])
        check_embeds(parameters)
        check_given(parameters)
        check_latents(parameters, helpers)
        window = (parameters["num_latent_frames_per_chunk"] - 1) * helpers.vae_scale_factor_temporal + 1
        if parameters["image"] is not None:
            parameters["image"] = single_image(parameters["image"])
        if parameters["video"] is not None and (frames := count_frames(parameters["video"])) < window:
            accepted = f"a video of at least {window} frames (one chunk) is accepted, not of {frames}"
            raise ParameterError("video", f"<{frames} frames>", accepted)
        parameters["video"] = in_colour(parameters["video"])
        if parameters["num_frames"] % window:
            chunks = math.ceil(parameters["num_frames"] / window)
            asked = parameters["num_frames"]
            log.warning("num_frames=%s: videos are whole chunks of %s frames; this one has %s", asked, window, chunks)

    def shrinks(self, parameters: Mapping[str, Any]) -> int:
        """Return by how much the latents are smaller where denoising begins."""
        return 1


def repeated(latents: torch.Tensor | None, copies: int) -> torch.Tensor | None:
    """Return latents once for each output; None where there are none."""
    return None if latents is None else latents.repeat(copies, 1, 1, 1, 1)


def check_whole(name: str, value: Any, least: int) -> None:
    """Check a whole number.

    Raises:
        ParameterError: it is none, or too small.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ParameterError(name, value, f"a whole number of at least {least} is accepted")


def check_history_sizes(sizes: Any) -> list[int]:
    """Return how many frames are seen from far, nearer and near: from the largest number to the smallest.

    Raises:
        ParameterError: they are not three whole numbers, or one that cannot be 0 is.
    """
    accepted = "three whole numbers are accepted, such as [16, 2, 1]; the smallest may be 0"
    if not isinstance(sizes, (list, tuple)) or len(sizes) != 3:
        raise ParameterError("history_sizes", sizes, accepted)
    if any(isinstance(size, bool) or not isinstance(size, int) for size in sizes):
        raise ParameterError("history_sizes", sizes, accepted)
    ordered = sorted(sizes, reverse=True)
    if ordered[1] < 1 or ordered[2] < 0:
        raise ParameterError("history_sizes", sizes, accepted)
    return ordered


def check_embeds(parameters: Mapping[str, Any]) -> None:
    """Check that embeddings of several prompts come alone: they are one batch, and images and copies belong to one.

    Raises:
        ParameterError: they do not.
    """
    embeds = parameters["prompt_embeds"]
    if embeds is None or len(embeds) == 1:
        return
    accepted = f"not with embeddings of {len(embeds)} prompts; one is accepted"
    if parameters["num_videos_per_prompt"] != 1:
        raise ParameterError("num_videos_per_prompt", parameters["num_videos_per_prompt"], accepted)
    for name in ("image", "video"):
        if parameters[name] is not None:
            raise ParameterError(name, f"<{name}>", accepted)


def check_given(parameters: Mapping[str, Any]) -> None:
    """Check that latents are not given beside what they are made of, and not without those that belong to them.

    Raises:
        ParameterError: they are.
    """
    names = ("image_latents", "fake_image_latents", "video", "video_latents")
    has = {name for name in names if parameters[name] is not None}
    noised = parameters["image"] is not None or parameters["add_noise_to_image_latents"]
    if "image_latents" in has and "fake_image_latents" not in has and noised:
        accepted = "`image_latents` go with `fake_image_latents`, or are given without `image` and without noise"
        raise ParameterError("fake_image_latents", None, accepted)
    if {"video", "video_latents"} <= has:
        raise ParameterError("video_latents", "<latents>", "`video` or `video_latents` is accepted, not both")
    first = parameters["image"] is not None or "image_latents" in has
    if "video_latents" in has and parameters["add_noise_to_video_latents"] and not first:
        raise ParameterError("image_latents", None, "`video_latents` that are noised go with `image_latents`")


def check_latents(parameters: Mapping[str, Any], helpers: Any) -> None:
    """Check the kind and shape of latents that are given in the place of an image or a video.

    Raises:
        ParameterError: they are no tensors of floating point numbers, or of another size than the video that is made.
    """
    prompts = 1 if parameters["prompt_embeds"] is None else len(parameters["prompt_embeds"])
    sides = [parameters[name] // helpers.vae_scale_factor_spatial for name in ("height", "width")]
    for name, frames in {"image_latents": 1, "fake_image_latents": None, "video_latents": None}.items():
        check_tensors(parameters, {name: (prompts, helpers.transformer.config.in_channels, frames, *sides)})
    video, least = parameters["video_latents"], parameters["num_latent_frames_per_chunk"]
    if video is not None and parameters["add_noise_to_video_latents"] and video.shape[2] < least:
        accepted = f"with noise at least {least} frames (one chunk) are accepted, not {video.shape[2]}"
        raise ParameterError("video_latents", f"of shape {tuple(video.shape)}", accepted)


def single_image(image: Any) -> Any:
    """Return the one image that a request gives, out of its list if it is in one.

    Raises:
        ParameterError: it is none, or there are several.
    """
    import numpy as np
    import torch
    from PIL import Image

    if isinstance(image, (list, tuple)) and len(image) == 1:
        image = image[0]
    arrays = (torch.Tensor, np.ndarray)
    if isinstance(image, (list, tuple)) or (isinstance(image, arrays) and image.ndim == 4 and len(image) != 1):
        raise ParameterError("image", f"<{len(image)} images>", f"one image is accepted, not {len(image)}")
    if not isinstance(image, (Image.Image, *arrays)):
        raise ParameterError(
            "image", image, f"a PIL image, an array or a tensor is accepted, not {type(image).__name__}"
        )
    return in_colour(image)


def count_frames(video: Any) -> int:
    """Return how many frames the one video has that a request gives.

    Raises:
        ParameterError: it is none, or there are several.
    """
    import numpy as np
    import torch
    from PIL import Image

    arrays = (torch.Tensor, np.ndarray)
    rank = video.ndim if isinstance(video, arrays) else 0
    if rank == 4:
        return len(video)
    several = rank == 5 or (isinstance(video, list) and bool(video) and not _is_frame(video[0], (Image.Image, *arrays)))
    if several and len(video) == 1:
        return count_frames(video[0])
    if several and (rank == 5 or all(isinstance(each, (list, *arrays)) for each in video)):
        raise ParameterError("video", f"<{len(video)} videos>", f"one video is accepted, not {len(video)}")
    if several or rank or not isinstance(video, list):
        accepted = f"a list of frames, an array or a tensor is accepted, not {type(video).__name__}"
        raise ParameterError("video", f"<{type(video).__name__}>", accepted)
    return len(video)


def _is_frame(value: Any, kinds: tuple[type[Any], ...]) -> bool:
    return isinstance(value, kinds) and getattr(value, "ndim", 3) <= 3
