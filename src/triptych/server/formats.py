"""Formats: which file of a result a caller asks for."""

from __future__ import annotations

from dataclasses import dataclass

from triptych.errors import ParameterError
from triptych.server.problems import Refusal


@dataclass(frozen=True)
class Format:
    """A kind of file that outputs can be had as."""

    name: str
    suffix: str
    media_type: str


_IMAGES = (
    Format("png", ".png", "image/png"),
    Format("jpeg", ".jpg", "image/jpeg"),
    Format("webp", ".webp", "image/webp"),
)
_VIDEOS = (
    Format("mp4", ".mp4", "video/mp4"),
    Format("webp", ".webp", "image/webp"),
    Format("gif", ".gif", "image/gif"),
)
FORMATS = {"images": _IMAGES, "videos": _VIDEOS}
"""By what a model makes; the first is what a caller without a wish gets."""
MEDIA_TYPES = sorted({each.media_type for several in FORMATS.values() for each in several})
"""Of all of them."""
_ALIASES = {"jpg": "jpeg"}


def named(makes: str, name: str) -> Format:
    """Return the format of that name.

    Raises:
        ParameterError: such outputs cannot be had in it.
    """
    wanted = _ALIASES.get(name.lower(), name.lower())
    for each in FORMATS[makes]:
        if each.name == wanted:
            return each
    raise ParameterError("format", name, f"{makes} can be had as {', '.join(each.name for each in FORMATS[makes])}")


def accepted(makes: str, accept: str | None) -> Format:
    """Return the format that an `Accept` header prefers.

    Raises:
        Refusal: it takes none that there is.
    """
    offered = FORMATS[makes]
    if not accept or not accept.strip():
        return offered[0]
    ranges = [_range(part) for part in accept.split(",")]
    best = max(offered, key=lambda each: (_quality(each, ranges), -offered.index(each)))
    if _quality(best, ranges) > 0:
        return best
    media_types = ", ".join(each.media_type for each in offered)
    raise Refusal(406, "not_acceptable", f"{makes} can be had as {media_types}, not as {accept}")


def _range(text: str) -> tuple[str, float]:
    media_type, *options = (part.strip().lower() for part in text.split(";"))
    quality = 1.0
    for option in options:
        if option.startswith("q="):
            try:
                quality = float(option[2:])
            except ValueError:
                quality = 0.0
    return media_type, quality


def _quality(each: Format, ranges: list[tuple[str, float]]) -> float:
    """Return how welcome a format is: by the range that names it most closely (RFC 9110, 12.5.1)."""
    kind = each.media_type.partition("/")[0]
    for name in (each.media_type, f"{kind}/*", "*/*"):
        qualities = [quality for media_type, quality in ranges if media_type == name]
        if qualities:
            return max(qualities)
    return 0.0
