"""LTX-2, 2.3 and 2.5: video with sound, from text, or from text and the first frame.

Oracle: `diffusers.LTX2Pipeline` and `diffusers.LTX2ImageToVideoPipeline`, without the enhancing of prompts by a language
model. Both take the same components, so a repository that names the first serves both tasks. Where the repository has a
`latent_upsampler` there are two stages, see `ltx2_two_stage`. Where its index names a `diffusion_decoder` (2.5), that
one decodes the video, after `diffusers.LTX2VideoDiffusionDecodePipeline`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from triptych.components.need import Need
from triptych.components.repository import Entry, Repository
from triptych.errors import ComponentFileError, ParameterError
from triptych.pipelines.base import Family, check_inputs, check_multiple, check_tensors, in_colour
from triptych.pipelines.wan import check_frames
from triptych.result import FASTEST, SLOWEST
from triptych.roles import RoleType
from triptych.stages.base import Stage
from triptych.stages.denoising import Denoising, Forward
from triptych.stages.noise_levels import begin_at_first, even_sigmas
from triptych.state import View

if TYPE_CHECKING:
    import torch

SIZE_MULTIPLE = 32
"""The oracle accepts only multiples of this many pixels, whatever the model."""

NUM_FRAMES = 121
"""The oracle's length of a video where none is given and no component predicts it."""

ALL_HIDDEN_STATES = dataclasses.replace(
    Need.hidden(-1), unused=Need.hidden(-1).unused | {"*.embed_vision", "*.embed_audio"}
)
"""Gemma up to its last layer, without what reads images and sound: Gemma 4 (2.5) has no tower, but embedders."""

STATISTICS = Need.without("encoder", "decoder")
"""The means and deviations of an autoencoder's latents: two small buffers among its weights."""

Sizes = Mapping[str, int]
"""Of the latents: `num_frames`, `height` and `width` of the video's, `audio_num_frames` of the sound's."""

TEXT, IMAGE = "text-to-video", "image-to-video"
TWO_STAGES = {TEXT: f"{TEXT}-two-stage", IMAGE: f"{IMAGE}-two-stage"}

TEXT_TASKS = frozenset((TEXT, TWO_STAGES[TEXT]))
IMAGE_TASKS = frozenset((IMAGE, TWO_STAGES[IMAGE]))


@dataclass(frozen=True)
class Guidance:
    """How strongly one modality is led away from weaker predictions.

    Attributes:
        text: away from the negative prompt's; off at 1.
        stg: away from that of a transformer with some blocks perturbed (spatio-temporal guidance); off at 0.
        modality: away from that of a transformer whose modalities do not see each other; off at 1.
        rescale: how much of the prediction's deviation is restored.
    """

    text: float = 1.0
    stg: float = 0.0
    modality: float = 1.0
    rescale: float = 0.0


def guided(scale: float, audio_scale: float) -> bool:
    """Return whether the negative prompt is asked for: a scale above 1, of either modality."""
    return scale > 1 or audio_scale > 1


class TextEncoding(Stage):
    """Turn the prompt, and for guidance the negative prompt, into all hidden states of Gemma, one after another.

    `prompt_embeds` is [1, tokens, width x hidden states], `prompt_attention_mask` [1, tokens].
    """

    role = RoleType.ENCODER
    needs = {"text_encoder": ALL_HIDDEN_STATES, "tokenizer": Need.FULL}
    writes = {
        "prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask",
    }  # fmt: skip
    reads = {"prompt", "negative_prompt", "guidance_scale", "audio_guidance_scale", "max_sequence_length", *writes}

    def run(self, state: View) -> None:
        (
            state.prompt_embeds,
            state.prompt_attention_mask,
            state.negative_prompt_embeds,
            state.negative_prompt_attention_mask,
        ) = self.helpers.encode_prompt(
            prompt=state.prompt,
            negative_prompt=state.negative_prompt,
            do_classifier_free_guidance=guided(state.guidance_scale, state.audio_guidance_scale),
            prompt_embeds=state.prompt_embeds,
            negative_prompt_embeds=state.negative_prompt_embeds,
            prompt_attention_mask=state.prompt_attention_mask,
            negative_prompt_attention_mask=state.negative_prompt_attention_mask,
            max_sequence_length=state.max_sequence_length,
            device=self.device,
        )


class TextConnecting(Stage):
    """Turn Gemma's hidden states into what each modality reads, and where no length is given, predict it.

    `connector_prompt_embeds` and `connector_audio_prompt_embeds` are [rows, tokens, width], the mask [rows, tokens]:
    the negative prompt's row, if there is guidance, then the prompt's. `batch_size` is the number of videos.
    """

    role = RoleType.ENCODER
    tasks = frozenset((TEXT, IMAGE))
    needs = {"connectors": Need.FULL, "tokenizer": Need.FULL, "duration_head": Need.FULL.optional()}
    reads = {
        "prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask",
        "guidance_scale", "audio_guidance_scale", "num_videos_per_prompt", "num_frames", "frame_rate", "min_seconds",
        "max_seconds", "exact",
    }  # fmt: skip
    writes = {
        "connector_prompt_embeds", "connector_audio_prompt_embeds", "connector_attention_mask", "batch_size",
        "num_frames", "embeds_dtype",
    }  # fmt: skip

    def run(self, state: View) -> None:
        both = guided(state.guidance_scale, state.audio_guidance_scale)
        video, audio, mask = self.connect(state, with_negative=both)
        state.connector_prompt_embeds, state.connector_audio_prompt_embeds = video, audio
        state.connector_attention_mask = mask
        prompts = len(state.prompt_embeds)
        state.batch_size = prompts * state.num_videos_per_prompt
        # The latents are rounded to it before they are decoded.
        state.embeds_dtype = str(state.prompt_embeds.dtype).removeprefix("torch.")
        if state.num_frames is None:
            first = len(video) // 2 if both else 0
            state.num_frames = self.duration_head.predict_num_frames(
                video[first : first + 1],
                audio[first : first + 1],
                frame_rate=state.frame_rate,
                temporal_compression_ratio=self.helpers.vae_temporal_compression_ratio,
                min_seconds=state.min_seconds,
                max_seconds=state.max_seconds,
            )

    def connect(self, state: View, *, with_negative: bool) -> list[torch.Tensor]:
        """Return what each modality reads and which of its tokens count, one copy of each prompt.

        The connectors run on as many copies as the oracle runs them on, because rounding depends on it; where that
        makes the copies differ, all are returned.
        """
        import torch

        copies = state.num_videos_per_prompt if state.exact else 1
        pairs = [(state.prompt_embeds, state.prompt_attention_mask)]
        if with_negative:
            pairs.insert(0, (state.negative_prompt_embeds, state.negative_prompt_attention_mask))
        embeds, masks = (torch.cat([each.repeat_interleave(copies, dim=0) for each in some]) for some in zip(*pairs))
        connected = self.connectors(embeds, masks, padding_side=self.tokenizer.padding_side)
        firsts = [each[::copies] for each in connected]
        if copies == 1 or all(
            torch.equal(one.repeat_interleave(copies, dim=0), each) for one, each in zip(firsts, connected)
        ):
            return firsts
        return list(connected)


class FrameEncoding(Stage):
    """Turn the first frame into latents, normalised: [1, channels, 1, height, width]."""

    role = RoleType.ENCODER
    tasks = IMAGE_TASKS
    needs = {"vae": Need.ENCODE, "text_encoder": Need.CONFIG}
    reads = {"image", "image_crf", "height", "width", "latents", "embeds_dtype"}
    writes = {"image_latents"}

    def run(self, state: View) -> None:
        import torch

        if state.latents is not None:
            return
        pixels = self.helpers.video_processor.preprocess(self.compressed(state), state.height, state.width)
        frame = pixels.to(self.device, getattr(torch, state.embeds_dtype)).unsqueeze(2)
        latents = self.vae.encode(frame).latent_dist.mode().to(torch.float32)
        state.image_latents = self.helpers._normalize_latents(latents, self.vae.latents_mean, self.vae.latents_std)

    def compressed(self, state: View) -> Any:
        """Return the image with the losses of a video's compression, which the model was trained on."""
        import numpy as np
        from diffusers.pipelines.ltx2.utils import apply_image_conditioning_crf, resolve_default_image_crf
        from PIL import Image

        crf = resolve_default_image_crf(self.text_encoder) if state.image_crf is None else state.image_crf
        if crf == 0:
            return state.image
        return Image.fromarray(apply_image_conditioning_crf(np.array(state.image.convert("RGB")), crf))


class LTX2Denoising(Denoising):
    """Denoise the latents of video and sound together.

    Between the steps both are packed, float32: `latents` [videos, tokens, channels], `audio_latents` [videos, latent
    frames, channels x mel bins]. Afterwards the video's are unpacked, [videos, channels, frames, height, width].

    A forward's result is both predictions side by side, [rows, numbers of the video's and of the sound's].
    """

    tasks = TEXT_TASKS
    needs = {"transformer": Need.FULL, "scheduler": Need.FULL, "vae": STATISTICS, "audio_vae": STATISTICS}
    reads = {
        "connector_prompt_embeds", "connector_audio_prompt_embeds", "connector_attention_mask", "batch_size",
        "generator", "latents", "audio_latents", "noise_scale", "height", "width", "num_frames", "frame_rate",
        "motion_speed", "num_inference_steps", "sigmas", "guidance_scale", "stg_scale", "modality_scale",
        "guidance_rescale", "audio_guidance_scale", "audio_stg_scale", "audio_modality_scale",
        "audio_guidance_rescale", "spatio_temporal_guidance_blocks", "use_cross_timestep", "exact",
    }  # fmt: skip
    writes = {"latents", "audio_latents", "conditioning", "scheduler", "audio_scheduler", "timesteps"}

    def begin(self, state: View) -> None:
        from diffusers.pipelines.ltx2.pipeline_ltx2 import calculate_shift, retrieve_timesteps
        from diffusers.pipelines.ltx2.utils import conditioning_frame_rate

        fps = conditioning_frame_rate(state.frame_rate, state.motion_speed)
        sizes = self.sizes(state)
        grid, audio_frames = (sizes["num_frames"], sizes["height"], sizes["width"]), sizes["audio_num_frames"]
        state.latents, mask = self.video_noise(state, sizes)
        state.audio_latents = self.audio_noise(state, audio_frames)
        videos, tokens, _ = state.latents.shape
        rope, audio_rope = self.transformer.rope, self.transformer.audio_rope
        state.conditioning = {
            "text": self.text(state),
            "clean": mask,
            "coords": {
                "video_coords": rope.prepare_video_coords(videos, *grid, self.device, fps=fps),
                "audio_coords": audio_rope.prepare_audio_coords(videos, audio_frames, self.device),
            },
            "sizes": sizes,
            "fps": fps,
        }
        config = self.scheduler.config
        mu = calculate_shift(
            tokens,
            config.get("base_image_seq_len", 1024),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.95),
            config.get("max_shift", 2.05),
        )
        sigmas = self.sigmas(state)
        state.scheduler, state.audio_scheduler = self.new_scheduler(), self.new_scheduler()
        for each in (state.scheduler, state.audio_scheduler):
            state.timesteps, _ = retrieve_timesteps(each, device=self.device, sigmas=sigmas, mu=mu)
            begin_at_first(each)

    def sizes(self, state: View) -> Sizes:
        """Return the sizes of the latents of video and sound, as the oracle's call computes them."""
        helpers, latents, audio = self.helpers, state.latents, state.audio_latents
        if latents is not None and latents.ndim == 5:
            frames, height, width = latents.shape[2:]
        else:
            frames = (state.num_frames - 1) // helpers.vae_temporal_compression_ratio + 1
            height = state.height // helpers.vae_spatial_compression_ratio
            width = state.width // helpers.vae_spatial_compression_ratio
        if audio is not None and audio.ndim == 4:
            audio_frames = audio.shape[2]
        else:
            audio_frames = audio_latent_frames(state.num_frames, state.frame_rate, helpers)
        return {"num_frames": frames, "height": height, "width": width, "audio_num_frames": audio_frames}

    def video_noise(self, state: View, sizes: Sizes) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the latents to start from, and where they are an image's already: 1 there, [videos, tokens]."""
        return self.drawn(state), None

    def drawn(self, state: View) -> torch.Tensor:
        """Draw the video's noise, or add it to the latents that are given."""
        import torch
        from diffusers import LTX2Pipeline

        noise: torch.Tensor = LTX2Pipeline.prepare_latents(
            self.helpers,
            batch_size=state.batch_size,
            num_channels_latents=self.transformer.config.in_channels,
            height=state.height,
            width=state.width,
            num_frames=state.num_frames,
            noise_scale=self.noise_scale(state),
            dtype=torch.float32,
            device=self.device,
            generator=state.generator,
            latents=state.latents,
        )
        return noise

    def audio_noise(self, state: View, frames: int) -> torch.Tensor:
        """Draw the sound's noise, or add it to the latents that are given."""
        import torch

        noise: torch.Tensor = self.helpers.prepare_audio_latents(
            batch_size=state.batch_size,
            num_channels_latents=self.audio_vae.config.latent_channels,
            audio_latent_length=frames,
            num_mel_bins=self.audio_vae.config.mel_bins,
            noise_scale=self.noise_scale(state),
            dtype=torch.float32,
            device=self.device,
            generator=state.generator,
            latents=state.audio_latents,
        )
        return noise

    def noise_scale(self, state: View) -> float:
        """Return how much of given latents becomes noise."""
        scale: float = state.noise_scale
        return scale

    def sigmas(self, state: View) -> Any:
        return even_sigmas(state.num_inference_steps) if state.sigmas is None else state.sigmas

    def guidance(self, state: View) -> tuple[Guidance, Guidance]:
        """Return the scales of the video and of the sound."""
        video = state.guidance_scale, state.stg_scale, state.modality_scale, state.guidance_rescale
        audio = (
            state.audio_guidance_scale, state.audio_stg_scale, state.audio_modality_scale, state.audio_guidance_rescale,
        )  # fmt: skip
        return Guidance(*video), Guidance(*audio)

    def text(self, state: View) -> dict[str, torch.Tensor]:
        """Return the transformer's inputs that come from text: a row a video, after the negative prompt's if guided."""
        video, audio = self.guidance(state)
        rows = state.batch_size * (2 if guided(video.text, audio.text) else 1)
        embeds, audio_embeds, mask = (each.repeat_interleave(rows // len(each), dim=0) for each in self.embeds(state))
        return {
            "encoder_hidden_states": embeds,
            "audio_encoder_hidden_states": audio_embeds,
            "encoder_attention_mask": mask,
            "audio_encoder_attention_mask": mask,
        }

    def embeds(self, state: View) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return what each modality reads, and which of its tokens count."""
        return state.connector_prompt_embeds, state.connector_audio_prompt_embeds, state.connector_attention_mask

    def model_inputs(self, state: View, i: int) -> list[Forward]:
        scales = self.guidance(state)
        copies = len(state.conditioning["text"]["encoder_hidden_states"]) // len(state.latents)
        forwards = [self.forward(state, i, "cond_uncond", copies)]
        if any(each.stg > 0 for each in scales):
            blocks = tuple(state.spatio_temporal_guidance_blocks)
            forwards.append(self.forward(state, i, "uncond_stg", 1, spatio_temporal_guidance_blocks=blocks))
        if any(each.modality > 1 for each in scales):
            forwards.append(self.forward(state, i, "uncond_modality", 1, isolate_modalities=True))
        return forwards

    def forward(self, state: View, i: int, branch: str, copies: int, **changes: Any) -> Forward:
        """Return a forward of the latents, `copies` times: once with the prompt alone, twice with the negative too."""
        import torch

        rows = copies * len(state.latents)
        dtype = state.conditioning["text"]["encoder_hidden_states"].dtype
        # One copy stays what it is: the strides of packed latents decide how a narrow transformer rounds.
        video, audio = (
            each if copies == 1 else torch.cat([each] * copies) for each in (state.latents, state.audio_latents)
        )
        timestep = state.timesteps[i].expand(rows)
        inputs = {
            "hidden_states": video.to(dtype),
            "audio_hidden_states": audio.to(dtype),
            **{name: each[-rows:] for name, each in state.conditioning["text"].items()},
            **self.noise_levels(state, timestep),
            "sigma": timestep,
            **state.conditioning["sizes"],
            "fps": state.conditioning["fps"],
            **{name: each.repeat(copies, 1, 1, 1) for name, each in state.conditioning["coords"].items()},
            "use_cross_timestep": state.use_cross_timestep,
        }
        return Forward("transformer", branch, {**inputs, **changes})

    def noise_levels(self, state: View, timestep: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the timesteps of the video's rows, or of each of its tokens, and of the sound's."""
        return {"timestep": timestep}

    def call(self, forward: Forward) -> torch.Tensor:
        import torch

        with self.transformer.cache_context(forward.branch):
            video, audio = self.transformer(**forward.inputs, return_dict=False)
        return torch.cat([video.flatten(1), audio.flatten(1)], dim=1)

    def advance(self, state: View, i: int, prediction: Sequence[torch.Tensor]) -> None:
        video, audio = self.guidance(state)
        names = ["cond"]
        names += ["stg"] if video.stg > 0 or audio.stg > 0 else []
        names += ["modality"] if video.modality > 1 or audio.modality > 1 else []
        noise = {name: each.float() for name, each in zip(names, prediction, strict=True)}
        if guided(video.text, audio.text):
            noise["text"], noise["cond"] = noise["cond"].chunk(2)
        size = state.latents[0].numel()
        of_video = {name: each[:, :size].reshape(state.latents.shape) for name, each in noise.items()}
        of_audio = {name: each[:, size:].reshape(state.audio_latents.shape) for name, each in noise.items()}
        clean = self.guide(state.latents, of_video, i, state.scheduler, video)
        clean_audio = self.guide(state.audio_latents, of_audio, i, state.audio_scheduler, audio)
        state.latents = self.step_video(state, i, clean)
        velocity = self.helpers.convert_x0_to_velocity(state.audio_latents, clean_audio, i, state.audio_scheduler)
        state.audio_latents = self.take_step(
            state, i, velocity, scheduler=state.audio_scheduler, latents=state.audio_latents
        )

    def guide(
        self, latents: torch.Tensor, noise: Mapping[str, torch.Tensor], i: int, scheduler: Any, scales: Guidance
    ) -> torch.Tensor:
        """Return a modality's clean latents, led away from each weaker prediction of them."""
        from diffusers.pipelines.ltx2.pipeline_ltx2 import rescale_noise_cfg

        clean = {name: self.helpers.convert_velocity_to_x0(latents, each, i, scheduler) for name, each in noise.items()}
        weights = {"text": scales.text - 1, "stg": scales.stg, "modality": scales.modality - 1}
        cond: torch.Tensor = clean["cond"]
        result = cond
        for name, weight in weights.items():
            if name in clean:
                result = result + weight * (cond - clean[name])
        if scales.rescale > 0:
            result = rescale_noise_cfg(result, cond, guidance_rescale=scales.rescale)
        return result

    def step_video(self, state: View, i: int, clean: torch.Tensor) -> torch.Tensor:
        velocity = self.helpers.convert_x0_to_velocity(state.latents, clean, i, state.scheduler)
        return self.take_step(state, i, velocity)

    def finish(self, state: View) -> None:
        state.latents = self.unpacked(state.latents, state.conditioning["sizes"])

    def unpacked(self, latents: torch.Tensor, sizes: Sizes) -> torch.Tensor:
        """Return packed latents as a video: [videos, channels, frames, height, width]."""
        grid = sizes["num_frames"], sizes["height"], sizes["width"]
        video: torch.Tensor = self.helpers._unpack_latents(latents, *grid, *self.patch)
        return video

    def packed(self, video: torch.Tensor) -> torch.Tensor:
        """Return a video's latents as tokens: [videos, tokens, channels]."""
        tokens: torch.Tensor = self.helpers._pack_latents(video, *self.patch)
        return tokens

    @property
    def patch(self) -> tuple[int, int]:
        return self.helpers.transformer_spatial_patch_size, self.helpers.transformer_temporal_patch_size


class I2VDenoising(LTX2Denoising):
    """Denoise the latents of video and sound together; the first frame's stay as they are."""

    tasks = IMAGE_TASKS
    reads = {*LTX2Denoising.reads, "image_latents"}

    def video_noise(self, state: View, sizes: Sizes) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        if state.latents is not None:
            latents, mask = self.helpers.prepare_latents(
                noise_scale=self.noise_scale(state),
                dtype=torch.float32,
                device=self.device,
                generator=state.generator,
                latents=state.latents,
            )
            return latents, mask
        video = self.unpacked(self.drawn(state), sizes).contiguous()
        video[:, :, :1] = state.image_latents
        mask = torch.zeros_like(video[:, :1])
        mask[:, :, 0] = 1.0
        return self.packed(video), self.packed(mask).squeeze(-1)

    def noise_levels(self, state: View, timestep: torch.Tensor) -> dict[str, torch.Tensor]:
        mask = state.conditioning["clean"]
        of_tokens = timestep.unsqueeze(-1) * (1 - mask.repeat(len(timestep) // len(mask), 1))
        return {"timestep": of_tokens, "audio_timestep": timestep}

    def step_video(self, state: View, i: int, clean: torch.Tensor) -> torch.Tensor:
        import torch

        latents, clean = (self.unpacked(each, state.conditioning["sizes"]) for each in (state.latents, clean))
        velocity = self.helpers.convert_x0_to_velocity(latents, clean, i, state.scheduler)
        later = self.take_step(state, i, velocity[:, :, 1:], latents=latents[:, :, 1:])
        return self.packed(torch.cat([latents[:, :, :1], later], dim=2))


class Decoding(Stage):
    """Undo the latents' normalisation and decode them to frames, and to sound."""

    role = RoleType.DECODER
    row_wise = {"vae", "audio_vae", "vocoder"}
    needs = {"vae": Need.DECODE, "audio_vae": Need.DECODE, "vocoder": Need.FULL}
    reads = {
        "latents", "audio_latents", "embeds_dtype", "frame_rate", "generator", "decode_timestep", "decode_noise_scale",
        "output_type",
    }  # fmt: skip
    writes = {"frames", "fps", "audio", "sample_rate"}

    def run(self, state: View) -> None:
        state.fps = state.frame_rate
        audio = unpacked_audio(self.helpers, state.audio_latents, self.audio_vae)
        if state.output_type == "latent":
            state.frames, state.audio = denormalised(self.helpers, state.latents, self.vae), audio
            return
        video = self.video(state)
        state.frames = self.helpers.video_processor.postprocess_video(video, output_type=state.output_type)
        spectrograms = self.audio_vae.decode(audio.to(self.audio_vae.dtype), return_dict=False)[0]
        state.audio = self.vocoder(spectrograms)
        state.sample_rate = self.vocoder.config.output_sampling_rate

    def video(self, state: View) -> torch.Tensor:
        """Return the pixels, between -1 and 1: [videos, 3, frames, height, width]."""
        import torch

        latents = state.latents.to(getattr(torch, state.embeds_dtype))
        timestep = None
        if self.vae.config.timestep_conditioning:
            latents, timestep = self.renoised(state, latents)
        latents = denormalised(self.helpers, latents, self.vae).to(self.vae.dtype)
        video: torch.Tensor = self.vae.decode(latents, timestep, return_dict=False)[0]
        return video

    def renoised(self, state: View, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the noise of the step that the autoencoder is told it is at; returns the latents and that step."""
        import torch
        from diffusers.utils.torch_utils import randn_tensor

        noise = randn_tensor(latents.shape, generator=state.generator, device=self.device, dtype=latents.dtype)
        times, scales = (
            torch.tensor(
                each if isinstance(each, list) else [each] * len(latents), device=self.device, dtype=latents.dtype
            )
            for each in (
                state.decode_timestep,
                state.decode_timestep if state.decode_noise_scale is None else state.decode_noise_scale,
            )
        )
        scales = scales[:, None, None, None, None]
        return (1 - scales) * latents + scales * noise, times


class DiffusionDecoding(Decoding):
    """Undo the latents' normalisation, denoise pixels beside them to frames, and decode the sound."""

    # That decoder draws noise from its request's generator: what takes the time cannot be shared, so requests are not to
    # wait for each other for the sake of the sound.
    row_wise = set[str]()
    needs = {**Decoding.needs, "vae": STATISTICS, "diffusion_decoder": Need.FULL}
    reads = Decoding.reads - {"embeds_dtype", "decode_timestep", "decode_noise_scale"}

    def video(self, state: View) -> torch.Tensor:
        latents = denormalised(self.helpers, state.latents, self.vae).to(self.diffusion_decoder.dtype)
        video: torch.Tensor = self.diffusion_decoder.decode(latents, generator=state.generator, return_dict=False)[0]
        return video


def denormalised(helpers: Any, latents: torch.Tensor, vae: Any) -> torch.Tensor:
    """Return the video's latents as its autoencoder made them."""
    video: torch.Tensor = helpers._denormalize_latents(
        latents, vae.latents_mean, vae.latents_std, vae.config.scaling_factor
    )
    return video


def unpacked_audio(helpers: Any, latents: torch.Tensor, audio_vae: Any) -> torch.Tensor:
    """Return the sound's latents as its autoencoder made them: [videos, channels, latent frames, latent mel bins]."""
    latents = helpers._denormalize_audio_latents(latents, audio_vae.latents_mean, audio_vae.latents_std)
    bins = audio_vae.config.mel_bins // helpers.audio_vae_mel_compression_ratio
    audio: torch.Tensor = helpers._unpack_audio_latents(latents, latents.shape[1], num_mel_bins=bins)
    return audio


def audio_latent_frames(num_frames: int, frame_rate: float, helpers: Any) -> int:
    """Return how many latent frames of sound a video has, as the oracle's call computes it."""
    per_second = (
        helpers.audio_sampling_rate / helpers.audio_hop_length / float(helpers.audio_vae_temporal_compression_ratio)
    )
    frames: int = round(num_frames / frame_rate * per_second)
    return frames


class LTX2(Family):
    """LTX-2, 2.3 and 2.5, text or image to video. A scale of the sound that is 0 is the video's, as in the oracle."""

    pipelines = ("LTX2Pipeline",)
    tasks = {
        TEXT: "a video with sound from a prompt",
        IMAGE: "a video with sound from a prompt and its first frame",
        TWO_STAGES[TEXT]: "a video with sound from a prompt, generated small, upsampled and refined",
        TWO_STAGES[IMAGE]: "a video with sound from a prompt and its first frame, upsampled and refined",
    }
    # The pipeline's constructor reads sizes off the models and asks the tokenizer for its longest text, in every role.
    geometry = {"vae": Need.CONFIG, "audio_vae": Need.CONFIG, "transformer": Need.CONFIG, "tokenizer": Need.CONFIG}
    admission = {"text_encoder": Need.CONFIG, "connectors": Need.CONFIG}
    # They follow the video's then.
    optional = {"audio_guidance_scale", "audio_stg_scale", "audio_modality_scale", "audio_guidance_rescale"}
    # The oracle always gives its scheduler sigmas, and no scheduler takes timesteps beside them.
    refused = {
        "timesteps", "attention_kwargs", "system_prompt", "enable_prompt_enhancement", "prompt_max_new_tokens",
        "prompt_enhancement_kwargs", "prompt_enhancement_seed",
    }  # fmt: skip

    def __init__(self, repository: Repository) -> None:
        repository = with_upsampler(repository)
        # Without a repository, for `triptych families`, all is possible.
        if repository.components and "latent_upsampler" not in repository.components:
            self.tasks = {task: line for task, line in self.tasks.items() if task not in TWO_STAGES.values()}
        super().__init__(repository)

    def compose(self) -> None:
        from triptych.pipelines import ltx2_two_stage as two_stage  # which builds on this file

        twice = any(task in self.tasks for task in TWO_STAGES.values())
        self.add_stage(TextEncoding)
        self.add_stage(TextConnecting)
        if twice:
            self.add_stage(two_stage.TwoStageTextConnecting)
        self.add_stage(FrameEncoding)
        if twice and self.repository.loras():
            self.add_stage(two_stage.LoraLoading)
        self.add_stage(LTX2Denoising)
        self.add_stage(I2VDenoising)
        if twice:
            for stage in two_stage.DENOISER_STAGES:
                self.add_stage(stage)
        diffuses = "diffusion_decoder" in self.repository.components
        self.add_stage(DiffusionDecoding if diffuses else Decoding, "decoding")

    @cached_property
    def oracle(self) -> type[Any]:
        """The pipeline for images, whatever the repository names: its helpers are the other's, and more."""
        import diffusers

        cls: type[Any] = diffusers.LTX2ImageToVideoPipeline
        return cls

    @cached_property
    def parameters(self) -> dict[str, object]:
        own = dict(super().parameters)
        if any(task in self.tasks for task in TWO_STAGES.values()):
            from triptych.pipelines.ltx2_two_stage import parameters

            own.update(parameters())
        return own

    def enlargement(self, parameters: Mapping[str, Any]) -> float:
        return 4.0 if parameters.get("two_stage") else 1.0

    def task_of(self, parameters: Mapping[str, Any]) -> str:
        task = TEXT if parameters["image"] is None and TEXT in self.tasks else IMAGE
        return TWO_STAGES[task] if parameters.get("two_stage") else task

    def admit(self, parameters: dict[str, Any], helpers: Any) -> None:
        with_image = self.task_of(parameters) in IMAGE_TASKS
        if with_image:
            check_image(parameters)
        elif parameters["image_crf"] is not None:
            raise ParameterError("image_crf", parameters["image_crf"], "it needs an image")
        name = "spatio_temporal_guidance_blocks"
        if parameters[name] != self.parameters[name]:  # diffusers' own choice, whatever the transformer
            check_blocks(name, parameters[name], helpers.transformer.config.num_layers)
        for name in ("guidance_scale", "stg_scale", "modality_scale", "guidance_rescale"):
            parameters[f"audio_{name}"] = parameters[f"audio_{name}"] or parameters[name]
        spatial = helpers.vae_spatial_compression_ratio * helpers.transformer_spatial_patch_size
        check_multiple(parameters, ("height", "width"), math.lcm(SIZE_MULTIPLE, spatial))
        check_rates(parameters)
        self.check_given(parameters, helpers)
        # The oracle checks the shape of given latents only where they take an image's place.
        unchecked = {"audio_latents": None} if with_image else {"audio_latents": None, "latents": None}
        check_inputs(helpers, {**parameters, **unchecked})
        if parameters["num_frames"] is None and "duration_head" not in self.repository.components:
            parameters["num_frames"] = NUM_FRAMES
        if parameters["num_frames"] is not None:
            check_frames(parameters["num_frames"], helpers.vae_temporal_compression_ratio)
            if not audio_latent_frames(parameters["num_frames"], parameters["frame_rate"], helpers):
                accepted = f"at a frame rate of {parameters['frame_rate']} this is too short for any sound"
                raise ParameterError("num_frames", parameters["num_frames"], accepted)
        self.check_text(parameters, helpers)
        if parameters.get("two_stage") and self.loras is not None:
            from triptych.pipelines import ltx2_two_stage as two_stage

            two_stage.settle(parameters, self.loras)

    def check_text(self, parameters: Mapping[str, Any], helpers: Any) -> None:
        """Check the length of the text, which the connectors fill up with their registers, and given embeddings.

        Raises:
            ParameterError: they do not fit.
        """
        config, embeds = helpers.connectors.config, parameters["prompt_embeds"]
        registers = config.video_connector_num_learnable_registers, config.audio_connector_num_learnable_registers
        if embeds is None:
            check_multiple(parameters, ("max_sequence_length",), math.lcm(*(count for count in registers if count)))
        elif parameters["num_videos_per_prompt"] > 1:
            accepted = "the oracle takes one row of `prompt_embeds` for each video, and 1 here"
            raise ParameterError("num_videos_per_prompt", parameters["num_videos_per_prompt"], accepted)

    def check_given(self, parameters: Mapping[str, Any], helpers: Any) -> None:
        """Check the kind and shape of given embeddings and latents, which may be packed or not.

        Raises:
            ParameterError: they are no tensors of floating point numbers, or not of as many videos as are made.
        """
        embeds, latents, audio = (parameters[name] for name in ("prompt_embeds", "latents", "audio_latents"))
        for name in ("prompt_embeds", "negative_prompt_embeds"):
            # The hidden states are one after another, or have a dimension of their own.
            check_tensors(parameters, {name: of_rank(parameters[name], (None,) * 3, (None,) * 4)})
        videos = parameters["num_videos_per_prompt"] * (1 if embeds is None else len(embeds))
        channels = helpers.vae.config.latent_channels
        if tuple(getattr(latents, "shape", ()))[1:2] == (1,):
            channels = 1  # which the oracle repeats when it normalises them
        unpacked, packed = (videos, channels, None, None, None), (videos, None, helpers.transformer.config.in_channels)
        shapes = {
            "latents": of_rank(latents, unpacked, packed),
            "audio_latents": of_rank(audio, (videos, None, None, None), (videos, None, None)),
        }
        check_tensors(parameters, shapes)


class LTX2ImageToVideo(LTX2):
    """LTX-2, 2.3 and 2.5, image to video."""

    pipelines = ("LTX2ImageToVideoPipeline",)
    tasks = {task: line for task, line in LTX2.tasks.items() if task in IMAGE_TASKS}


def with_upsampler(repository: Repository) -> Repository:
    """Return the repository with the upsampler that lies in its folder, as published: outside the index."""
    name = "latent_upsampler"
    if name in repository.components or not repository.components:
        return repository
    try:
        kind = str(repository.config(name).get("_class_name"))
    except ComponentFileError:
        return repository
    entry = Entry(name, "ltx2", kind)
    return dataclasses.replace(repository, components={**repository.components, name: entry})


def check_image(parameters: dict[str, Any]) -> None:
    """Check that one image is given, and take it out of its list if it is in one.

    Raises:
        ParameterError: there is none, or there are several.
    """
    import torch
    from PIL import Image

    image = parameters["image"]
    if isinstance(image, (list, tuple)) and len(image) == 1:
        image = image[0]
    if image is None and parameters["latents"] is None:
        raise ParameterError("image", image, "the video's first frame is missing")
    if isinstance(image, (list, tuple)) or (isinstance(image, torch.Tensor) and image.ndim == 4 and len(image) != 1):
        raise ParameterError("image", image, f"one image is accepted, not {len(image)}")
    if not isinstance(image, (torch.Tensor, Image.Image, type(None))):
        raise ParameterError("image", image, f"a PIL image or a tensor is accepted, not {type(image).__name__}")
    image = in_colour(image)
    crf = parameters["image_crf"]
    if crf is not None and not 0 <= crf <= 51:  # of x264, which compresses it as the model's training videos are
        raise ParameterError("image_crf", crf, "a whole number from 0 to 51 is accepted; 0 leaves the image as it is")
    if isinstance(image, Image.Image) and min(image.size) < 2 and crf != 0:
        raise ParameterError("image", f"{image.width}x{image.height}", "at least 2x2 pixels are accepted")
    parameters["image"] = image


def check_blocks(name: str, blocks: Any, count: int) -> None:
    """Check the blocks that spatio-temporal guidance disturbs.

    Raises:
        ParameterError: they are no blocks of the transformer.
    """
    wrong = not isinstance(blocks, (list, tuple)) or any(
        isinstance(each, bool) or not isinstance(each, int) or not 0 <= each < count for each in blocks
    )
    if wrong:
        accepted = f"a list of whole numbers from 0 to {count - 1} is accepted: the transformer's blocks"
        raise ParameterError(name, blocks, accepted)


def check_rates(parameters: Mapping[str, Any]) -> None:
    """Check the rate of the frames, which a file must be able to play, and that of what moves in them.

    Raises:
        ParameterError: one is out of range.
    """
    rate, speed = parameters["frame_rate"], parameters["motion_speed"]
    if not SLOWEST <= rate <= FASTEST:
        raise ParameterError("frame_rate", rate, f"a number of at least {SLOWEST:g} and at most {FASTEST} is accepted")
    if speed <= 0:
        raise ParameterError("motion_speed", speed, "a number above 0 is accepted")


def of_rank(tensor: Any, *shapes: Sequence[int | None]) -> Sequence[int | None]:
    """Return the shape that has as many dimensions as a tensor, or where none has, the first."""
    return next((shape for shape in shapes if len(shape) == getattr(tensor, "ndim", 0)), shapes[0])
