"""Pictures and videos that the user names by their files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from triptych.errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

VIDEOS = (".mp4", ".mov", ".webm", ".mkv", ".gif")


def open_media(path: Path, option: str) -> Image | list[Image]:
    """Return what a file shows: the frames of a video, or a picture.

    Raises:
        UsageError: it is missing or holds neither.
    """
    if path.suffix.lower() in VIDEOS:
        return open_video(path, option)
    picture = open_images([path], option)
    assert picture is not None
    return picture


def open_video(path: Path, option: str) -> list[Image]:
    """Return the frames of a video, upright as players show them.

    Raises:
        UsageError: it is missing or holds no video.
    """
    import av
    from PIL.Image import fromarray

    try:
        with av.open(path.absolute()) as container:  # FFmpeg takes what precedes a colon for a protocol
            frames = [
                fromarray(frame.to_ndarray(format="rgb24")).rotate(frame.rotation, expand=True)
                for frame in container.decode(video=0)
            ]
    except (OSError, av.FFmpegError, IndexError) as error:
        raise UsageError(f"{option} {path}: {getattr(error, 'strerror', None) or 'this is no video'}") from error
    if not frames:
        raise UsageError(f"{option} {path}: this video has no frames")
    return frames


def open_images(paths: list[Path], option: str = "--image") -> Image | list[Image] | None:
    """Return the pictures in these files, upright: RGBA where anything may be transparent, else RGB.

    One is returned by itself, and None where there is none.

    Raises:
        UsageError: a file is missing or holds no picture.
    """
    if not paths:
        return None
    from PIL import Image, UnidentifiedImageError

    from triptych.server.submission import UNREADABLE, upright

    images = []
    for path in paths:
        try:
            with Image.open(path) as opened:
                images.append(upright(opened, transparency=True))
        except UnidentifiedImageError as error:
            raise UsageError(f"{option} {path}: this is no image") from error
        except OSError as error:
            raise UsageError(f"{option} {path}: {error.strerror or f'damaged ({error})'}") from error
        except (*UNREADABLE, Image.DecompressionBombError) as error:
            raise UsageError(f"{option} {path}: cannot be read: {error}") from error
    return images[0] if len(images) == 1 else images
