"""What a request comes back with, and how it becomes files."""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, TypeAlias, TypeGuard

from triptych.errors import ParameterError, UsageError
from triptych.mp4 import Sound, write_mp4

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch
    from PIL.Image import Image
    from PIL.PngImagePlugin import PngInfo

    Floats: TypeAlias = npt.NDArray[np.floating] | torch.Tensor

log = logging.getLogger(__name__)

DEFAULT_FPS = 16.0
"""Frames per second of a video whose family names no rate."""
SLOWEST = 0.01
"""Frames per second that every format can play."""
FASTEST = 1000
"""Frames per second that MP4 and WebP can play; a GIF plays fewer."""

_FORMATS = {
    "images": {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"},
    "videos": {".mp4": "MP4", ".gif": "GIF", ".webp": "WEBP"},
}
_LONGEST_NAME = 250
"""Bytes: the 255 that a file system takes, less the number of one of several outputs."""
_QUALITY = 95
"""Of JPEG and WebP, which both run from 0 to 100."""


@dataclass(kw_only=True, eq=False)
class Result:
    """The outputs of one request, exactly as the family's own pipeline returns them for the request's `output_type`.

    Attributes:
        images: `pil` a list of PIL images; `np` floats (n, height, width, channels) and `pt` floats
            (n, channels, height, width), both in [0, 1]; `latent` the denoised latents. None where the family makes
            no images. Images in layers are a list of such batches, one for each output.
        frames: videos. `pil` one list of PIL images per video; `np` floats (n, frames, height, width, channels);
            `pt` floats (n, frames, channels, height, width); `latent` the denoised latents.
        fps: frames per second of `frames`; None where the family names no rate.
        audio: samples from -1 to 1 with `sample_rate` in Hz: floats (n, channels, samples), one or two channels.
        mesh: a 3D shape.
        seed: what the random generator started from, drawn or given.
        timings: seconds spent in each stage, by the stage's name.
        parameters: those of the request that read as text: the ones given, sizes, steps and guidance as settled.
    """

    seed: int
    images: list[Image] | Floats | None = None
    frames: list[list[Image]] | Floats | None = None
    fps: float | None = None
    audio: Floats | None = None
    sample_rate: int | None = None
    mesh: object | None = None
    timings: dict[str, float] = field(default_factory=dict)
    parameters: dict[str, object] = field(default_factory=dict)

    def save(self, path: str | os.PathLike[str]) -> list[Path]:
        """Write the images or videos and return the files written, in order.

        The suffix decides the format: `.png`, `.jpg`, `.jpeg` and `.webp` for images (JPEG drops transparency), `.mp4`,
        `.gif` and `.webp` for videos. One output gets `path` itself, several get a number: `fox-0.png`, `fox-1.png`.
        An MP4 has the audio as its sound track. A PNG carries the seed and the parameters as JSON in its text chunk
        `parameters`. Files appear complete or not at all, and replace what was there.

        Raises:
            UsageError: the suffix or the name does not suit, the folder does not exist, or the outputs are latents.
            ParameterError: `fps` is not a rate, or not one the format can play.
        """
        path = Path(path)
        latent = self.parameters.get("output_type") == "latent"
        writers: list[Callable[[BinaryIO], None]]
        if self.images is not None:
            format = check_path(path, "images")
            text = self._png_text() if format == "PNG" else None
            pictures = [image for each in _layers(self.images) for image in _split(each, 4, latent)]
            writers = [_image_writer(_picture(image), format, text) for image in pictures]
        elif self.frames is not None:
            format = check_path(path, "videos")
            fps = DEFAULT_FPS if self.fps is None else self.fps
            videos = _split(self.frames, 5, latent)
            sounds = _sounds(self.audio, self.sample_rate, len(videos))
            if self.audio is not None and format != "MP4":
                log.warning("%s has no sound: only MP4 does", path)
            writers = [_video_writer(video, format, fps, sound) for video, sound in zip(videos, sounds)]
        else:
            raise UsageError("this result has neither images nor frames to save")
        if not writers:
            raise UsageError("this result is empty: there is nothing to save")
        paths = numbered(path, len(writers))
        write_all(paths, writers)
        return paths

    @property
    def count(self) -> int:
        """How many outputs there are, and so files that `save` writes."""
        if self.images is not None:
            return sum(len(each) for each in _layers(self.images))
        return 0 if self.frames is None else len(self.frames)

    def _png_text(self) -> PngInfo:
        from PIL.PngImagePlugin import PngInfo

        plain = {name: value for name, value in self.parameters.items() if is_plain(value)}
        info = PngInfo()
        info.add_text("parameters", json.dumps({**plain, "seed": self.seed}, ensure_ascii=False))
        return info


def check_path(path: str | os.PathLike[str], outputs: Literal["images", "videos"]) -> str:
    """Return the format that `path` asks for, once it is known that such outputs can be saved there.

    Raises:
        UsageError: the suffix does not suit the outputs, the name is none that a file can have, or the folder does not
            exist or cannot be written to.
    """
    path = Path(path)
    formats = _FORMATS[outputs]
    if path.suffix.lower() not in formats:
        given = f"the suffix {path.suffix!r}" if path.suffix else "no suffix"
        raise UsageError(f"{path}: {outputs} cannot be saved with {given}; accepted are {', '.join(formats)}")
    check_folder(path)
    return formats[path.suffix.lower()]


def check_rate(format: str, fps: float) -> None:
    """Check that a format of videos can play as many frames a second.

    Raises:
        ParameterError: it cannot.
    """
    # GIF has 16 bits for the 1/100 s that a frame stays, and MP4 is given a rate as a fraction of small numbers.
    # A GIF counts in 1/100 s, and players slow 1/100 s down.
    fastest = {"MP4": FASTEST, "GIF": 50, "WEBP": FASTEST}[format]
    if not SLOWEST <= fps <= fastest:
        raise ParameterError("fps", fps, f"{format} plays at least {SLOWEST} and at most {fastest} frames a second")


def check_folder(path: Path) -> None:
    """Check that a file can be written at a path.

    Raises:
        UsageError: its name is none that a file can have, or its folder does not exist or cannot be written to.
    """
    folder, size = path.parent, len(path.name.encode(errors="surrogatepass"))
    if size > _LONGEST_NAME or "\0" in path.name:
        problem = f"a name of {size} bytes is too long" if size > _LONGEST_NAME else "the name has a zero byte"
        raise UsageError(f"{path}: {problem}; at most {_LONGEST_NAME} bytes are accepted, none of them zero")
    if not os.path.isdir(folder):  # `Path.is_dir` raises for what is too long to be a path
        raise UsageError(f"{path}: there is no folder {str(folder)!r}; create it first")
    if not os.access(folder, os.W_OK):
        raise UsageError(f"{path}: the folder {str(folder)!r} cannot be written to")


def is_plain(value: object) -> bool:
    """Whether a parameter reads as text: a scalar, None, or a list of them; not an image or a tensor."""
    if isinstance(value, (list, tuple)):
        return all(is_plain(item) for item in value)
    if isinstance(value, float):
        return math.isfinite(value)  # JSON has no others
    return value is None or isinstance(value, (str, int))


def _layers(images: Any) -> list[Any]:
    """Return the batches of pictures in `images`: one, or for images in layers, one for each output."""
    first = images[0] if isinstance(images, (list, tuple)) and images else None
    stacked = isinstance(first, (list, tuple)) or getattr(first, "ndim", 0) == 4
    return list(images) if stacked else [images]


def _split(outputs: Sequence[object] | Floats, rank: int, latent: bool) -> list[object]:
    """Return the outputs one by one: images of a batch with `rank` 4 dimensions, videos of one with 5."""
    if latent:
        raise UsageError("output_type='latent' gives no pictures: only 'pil', 'np' and 'pt' can be saved")
    if not isinstance(outputs, Sequence) and outputs.ndim != rank:
        raise UsageError(
            f"an array of shape {tuple(outputs.shape)} holds no pictures; with output_type='latent' the outputs are "
            "latents, and only those of 'pil', 'np' and 'pt' can be saved"
        )
    return list(outputs)


def _picture(picture: object) -> Image:
    """Return one picture as a PIL image, rounding floats to 8 bits the way diffusers' own image processor does.

    `picture` is a PIL image, a NumPy array (height, width, channels) or a tensor (channels, height, width).
    """
    import numpy as np
    from PIL import Image

    if isinstance(picture, Image.Image):
        return picture
    if isinstance(picture, np.ndarray):
        floats = picture
    elif _is_tensor(picture):
        floats = picture.detach().movedim(0, -1).float().cpu().numpy()
    else:
        raise UsageError(f"a {type(picture).__name__} is no picture: expected a PIL image, an array or a tensor")
    fits = floats.ndim == 3 and floats.shape[-1] in (1, 3, 4) and floats.dtype.kind == "f"
    if not fits or not (floats.min() >= 0 and floats.max() <= 1):  # a NaN is no colour either
        raise UsageError(
            f"an array of shape {floats.shape} and type {floats.dtype} is no picture: expected 1, 3 or 4 channels of "
            "floats from 0 to 1, as output_type='np' and 'pt' give them ('latent' does not)"
        )
    pixels = (floats * 255).round().astype(np.uint8)
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def _is_tensor(value: object) -> TypeGuard[torch.Tensor]:
    """Whether `value` is a tensor, without importing torch for results that hold none."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _image_writer(image: Image, format: str, text: PngInfo | None) -> Callable[[BinaryIO], None]:
    def write(file: BinaryIO) -> None:
        if format == "PNG":
            image.save(file, format, pnginfo=text)
        else:
            flat = image.convert("RGB") if format == "JPEG" and image.mode not in ("L", "RGB") else image
            flat.save(file, format, quality=_QUALITY)

    return write


def _sounds(audio: Floats | None, sample_rate: int | None, count: int) -> list[Sound | None]:
    """Return the sound of each of `count` videos: samples (channels, samples) and their rate.

    Raises:
        UsageError: it is not one sound for each video, of one or two channels.
    """
    import numpy as np

    if audio is None:
        return [None] * count
    samples = audio.detach().float().cpu().numpy() if _is_tensor(audio) else np.asarray(audio, np.float32)
    if samples.ndim == 2:
        samples = samples[:, None]
    if sample_rate is None or samples.ndim != 3 or len(samples) != count or samples.shape[1] not in (1, 2):
        raise UsageError(
            f"audio of shape {samples.shape} at {sample_rate} Hz is no sound for {count} videos: expected "
            f"({count}, channels, samples) with one or two channels, and a rate"
        )
    return [(each, sample_rate) for each in samples]


def _video_writer(video: object, format: str, fps: float, sound: Sound | None) -> Callable[[BinaryIO], None]:
    check_rate(format, fps)
    if not hasattr(video, "__iter__") or not (frames := [_picture(frame) for frame in video]):
        raise UsageError("a video needs at least one frame, and is a list of PIL images, an array or a tensor")

    def write(file: BinaryIO) -> None:
        if format == "MP4":
            write_mp4(file, frames, fps, sound)
            return
        unit = 10 if format == "GIF" else 1  # ms
        ticks = [round(k * 1000 / fps / unit) for k in range(len(frames) + 1)]  # rounding must not add up
        durations = [(end - start) * unit for start, end in pairwise(ticks)]
        quality = {} if format == "GIF" else {"quality": _QUALITY}
        frames[0].save(file, format, save_all=True, append_images=frames[1:], duration=durations, loop=0, **quality)

    return write


def numbered(path: Path, count: int) -> list[Path]:
    """Return the files of `count` outputs: the path itself, or numbered ones where there are several."""
    return [path] if count == 1 else [path.with_stem(f"{path.stem}-{k}") for k in range(count)]


def write_all(paths: Sequence[Path], writers: Sequence[Callable[[BinaryIO], None]]) -> None:
    """Write every file beside its place under another name; when all are complete, move them to their places.

    Raises:
        UsageError: one of the paths is a folder.
    """
    if taken := next((path for path in paths if path.is_dir()), None):
        raise UsageError(f"{taken}: this is a folder")
    # Absolute, because FFmpeg opens an MP4 again by its name, and takes what precedes a colon for a protocol.
    unfinished = [path.absolute().with_name(f".triptych-{secrets.token_hex(8)}{path.suffix}") for path in paths]
    try:
        for partial, write in zip(unfinished, writers):
            with open(partial, "xb") as file:
                write(file)
        for path, partial in zip(paths, unfinished):
            os.replace(partial, path)
    finally:
        for partial in unfinished:
            partial.unlink(missing_ok=True)
