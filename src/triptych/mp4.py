"""MP4 files from frames and sound."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, BinaryIO, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from av import AudioStream
    from av.container import OutputContainer
    from PIL.Image import Image

Sound: TypeAlias = "tuple[npt.NDArray[np.float32], int]"
"""Samples from -1 to 1 (channels, samples), one or two channels, and their rate in Hz."""

_SOUND_FRAME = 1024  # samples: what AAC encodes at a time


def write_mp4(file: BinaryIO, frames: Sequence[Image], fps: float, sound: Sound | None = None) -> None:
    """Write frames of one size, and their sound if there is any.

    Encodes H.264 (MPEG-4 part 2 where PyAV comes without x264), 4:2:0 and BT.709, which every player shows.

    4:2:0 needs even sizes: the last row or column of an odd one is repeated. Sound is AAC.
    """
    import av
    import numpy as np
    from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

    rate = Fraction(float(fps)).limit_denominator(1001)
    h264 = "libx264" in av.codecs_available
    with av.open(file, "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264" if h264 else "mpeg4", rate=rate)
        stream.options = {"crf": "16"} if h264 else {"qmin": "2", "qmax": "4"}
        width, height = frames[0].size
        stream.width, stream.height, stream.pix_fmt = width + width % 2, height + height % 2, "yuv420p"
        stream.colorspace, stream.color_range = Colorspace.ITU709, ColorRange.MPEG
        stream.color_primaries, stream.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        track = None if sound is None else _sound_track(container, *sound)
        for k, image in enumerate(frames):
            pixels = np.asarray(image.convert("RGB"))
            padded = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            frame = av.VideoFrame.from_ndarray(padded, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
            frame.pts, frame.time_base = k, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if track is not None and sound is not None:
            _write_sound(container, track, sound[0])


def _sound_track(container: OutputContainer, samples: npt.NDArray[np.float32], rate: int) -> AudioStream:
    return container.add_stream("aac", rate=rate, layout="mono" if len(samples) == 1 else "stereo")


def _write_sound(container: OutputContainer, track: AudioStream, samples: npt.NDArray[np.float32]) -> None:
    import av
    import numpy as np

    planes = np.ascontiguousarray(samples.clip(-1, 1), np.float32)
    for start in range(0, planes.shape[1], _SOUND_FRAME):
        part = np.ascontiguousarray(planes[:, start : start + _SOUND_FRAME])
        frame = av.AudioFrame.from_ndarray(part, format="fltp", layout=track.layout.name)
        frame.sample_rate, frame.pts, frame.time_base = track.rate, start, Fraction(1, track.rate)
        container.mux(track.encode(frame))
    container.mux(track.encode())
